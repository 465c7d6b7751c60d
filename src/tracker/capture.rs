//! Capture: the programs that copy the data of writes into rings, and one group's end of it.
//!
//! The programs are not pinned. When the agent dies they go with it: a ring that nobody reads is of no use, and every
//! write of the time between has its bit, which is pinned. So the gap costs the application nothing and is bridged by
//! reading what the bitmap names.

use crate::model::{ByteRun, Code, Fault, Res, VolumeId};
use crate::tracker::halves::Words;
use crate::tracker::kernel::{Kernel, fault_of, flights_in, misses_in, share_in, untracked_in};
use crate::tracker::ring::{Captured, Ring, What};
use crate::tracker::sysfs::Disk;
use libbpf_rs::{Link, MapCore, MapFlags, MapHandle, Object, ObjectBuilder, OpenObject};
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

/// The programs as `build.rs` made them.
static OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/capture.bpf.o"));
/// Maps that belong to the bitmap's object and are shared with it.
const SHARED: [&str; 4] = ["volumes", "groups", "rings", "shares"];
/// The two copies.
const COPIES: [&str; 2] = ["capture_a", "capture_b"];
/// Data of one request beyond this is not copied, so that nobody who submits pays for a long copy; 256 pages take some 100 us,
/// less than a disk takes for them.
const DATA_MAX_BYTES: u32 = 1 << 20;
/// Bytes of a record before its data; `struct record`.
const HEAD_BYTES: u64 = 24;
/// How often the two accounts are compared at a cut. A write that was traced and is not yet in the kernel's account hides one
/// that went by unseen; it does so for an instant only.
const LOOKS: usize = 3;

/// Where the running kernel maps its memory, found out by [`Calibration`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Address of the first `struct page`.
    pub vmemmap: u64,
    /// Address at which physical memory is mapped.
    pub page_offset: u64,
}

/// A fault that a test plants in the programs; they must then be found wrong.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Plant {
    /// None.
    #[default]
    Nothing,
    /// The page after the right one is copied.
    NextPage,
    /// Holes are not recorded.
    LoseHoles,
    /// Data is not recorded.
    LoseData,
    /// Some writes find no room in the ring, not even for a hole. Not a fault: it is counted, and a cut must be exact all the same.
    NoRoom,
    /// Some completions are seen by no program at all (kernel-notes T8). Not a fault either.
    Unseen,
    /// Only the bio's own device is looked at, which for a partition is not the disk.
    OwnDevice,
    /// A bit is set at submit alone, and nobody waits for what is in flight.
    SubmitOnly,
    /// Some completions are seen by no program, and half of all writes found no place in the in-flight table. Not a fault either.
    UnseenAndNotEntered,
}

fn refused(cause: &str, error: &libbpf_rs::Error) -> Fault {
    let fault = fault_of("capture", error);
    // "none integrity [confidentiality]": the one in brackets is in force.
    let lockdown = fs::read_to_string("/sys/kernel/security/lockdown").unwrap_or_default();
    if lockdown.contains("[confidentiality]") {
        return Fault::new(
            Code::KernelUnsupported,
            "capture",
            "this kernel is locked down for confidentiality, which forbids programs to read memory",
            "cuts are made with a freeze instead; boot with lockdown=integrity to have them without",
        );
    }
    Fault { cause: format!("{cause}: {}", fault.cause), next: "cuts are made with a freeze instead".into(), ..fault }
}

/// Opens the object with its shared maps and only the named programs.
fn open(kernel: &Kernel, programs: &[&str]) -> libbpf_rs::Result<OpenObject> {
    let mut object = ObjectBuilder::default().name("doublure_capture")?.open_memory(OBJECT)?;
    for mut map in object.maps_mut() {
        let name = map.name().to_string_lossy().into_owned();
        if SHARED.contains(&name.as_str()) {
            map.reuse_pinned_map(kernel.dir().join(name))?;
        }
    }
    for mut program in object.progs_mut() {
        let name = program.name().to_string_lossy().into_owned();
        program.set_autoload(programs.contains(&name.as_str()));
    }
    Ok(object)
}

fn set_tune(object: &mut OpenObject, layout: Layout, plant: Plant) -> libbpf_rs::Result<()> {
    // SAFETY: sysconf(3) takes no pointers.
    let page_shift = unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.trailing_zeros();
    for mut map in object.maps_mut() {
        if map.name().to_string_lossy().ends_with(".rodata.tune") {
            let mut value = map.initial_value_mut().map(|value| value.to_vec()).unwrap_or_default();
            value[..8].copy_from_slice(&layout.vmemmap.to_ne_bytes());
            value[8..16].copy_from_slice(&layout.page_offset.to_ne_bytes());
            value[16..20].copy_from_slice(&page_shift.to_ne_bytes());
            value[20..24].copy_from_slice(&DATA_MAX_BYTES.to_ne_bytes());
            value[24..28].copy_from_slice(&(plant as u32).to_ne_bytes());
            map.set_initial_value(&value)?;
        }
    }
    Ok(())
}

/// The program that finds out where the kernel maps its memory, attached.
pub(super) struct Calibration {
    object: Object,
    _link: Link,
}

/// `struct calibration`: device, found, frame, pattern, vmemmap, page_offset.
const CALIBRATION_BYTES: usize = 64;

impl Calibration {
    /// Waits for a write to `device` (major << 20 | minor) whose first page is the frame `frame`, which begins with `pattern`.
    pub(super) fn begin(kernel: &Kernel, device: u32, frame: u64, pattern: [u8; 32]) -> Res<Calibration> {
        let load = || -> libbpf_rs::Result<Calibration> {
            let mut opened = open(kernel, &["calibrate"])?;
            set_tune(&mut opened, Layout { vmemmap: 0, page_offset: 0 }, Plant::Nothing)?;
            let object = opened.load()?;
            let mut value = [0; CALIBRATION_BYTES];
            value[..4].copy_from_slice(&device.to_ne_bytes());
            value[8..16].copy_from_slice(&frame.to_ne_bytes());
            value[16..48].copy_from_slice(&pattern);
            for map in object.maps().filter(|map| map.name() == "calibrations") {
                map.update(&0u32.to_ne_bytes(), &value, MapFlags::ANY)?;
            }
            let link = object
                .progs_mut()
                .find(|program| program.name() == "calibrate")
                .ok_or_else(|| libbpf_rs::Error::from(std::io::Error::from(std::io::ErrorKind::NotFound)))?
                .attach()?;
            Ok(Calibration { object, _link: link })
        };
        load().map_err(|e| refused("the kernel does not take its programs", &e))
    }
    /// What was found, once the write has ended.
    pub(super) fn layout(&self) -> Res<Layout> {
        let found =
            self.object.maps().find(|map| map.name() == "calibrations").map(|map| map.lookup(&0u32.to_ne_bytes(), MapFlags::ANY));
        let Some(Ok(Some(value))) = found else { return Err(Fault::internal("calibration", "its map cannot be read")) };
        let long = |at: usize| u64::from_ne_bytes(std::array::from_fn(|i| value[at + i]));
        match value.get(4..8) {
            Some([1, 0, 0, 0]) => Ok(Layout { vmemmap: long(48), page_offset: long(56) }),
            _ => Err(Fault::new(
                Code::KernelUnsupported,
                "capture",
                "where this kernel maps its memory could not be found out",
                "cuts are made with a freeze instead",
            )),
        }
    }
}

/// The loaded and attached programs of one host.
pub(super) struct Capturer {
    _links: Vec<Link>,
    sights: MapHandle,
    programs: Vec<OwnedFd>,
    _object: Object,
}

impl Capturer {
    /// Loads the programs for this layout and attaches them, after the bitmap's.
    pub(super) fn load(kernel: &Kernel, layout: Layout, plant: Plant) -> Res<Capturer> {
        let load = || -> libbpf_rs::Result<Capturer> {
            let mut opened = open(kernel, &COPIES)?;
            set_tune(&mut opened, layout, plant)?;
            let object = opened.load()?;
            let missing = || libbpf_rs::Error::from(std::io::Error::from(std::io::ErrorKind::NotFound));
            let sights = object.maps().find(|map| map.name() == "sights").ok_or_else(missing)?;
            let sights = MapHandle::try_from(&sights)?;
            let (mut links, mut programs) = (Vec::new(), Vec::new());
            for name in COPIES {
                let program = object.progs_mut().find(|program| program.name() == name).ok_or_else(missing)?;
                programs.push(program.as_fd().try_clone_to_owned()?);
                links.push(program.attach()?);
            }
            Ok(Capturer { _links: links, sights, programs, _object: object })
        };
        load().map_err(|e| refused("the kernel does not take its programs", &e))
    }

    /// A group's end, not yet capturing.
    pub(super) fn begin(
        &self,
        kernel: &Kernel,
        group_slot: u32,
        volumes: Vec<(VolumeId, u32, Disk, Entries)>,
        ring_bytes: u32,
    ) -> Res<Capture> {
        let ring = Ring::new(ring_bytes)?;
        // A quarter stays for holes, which are small: whose share is used up still says where it changed.
        let room = u64::from(ring_bytes) / 4 * 3 / volumes.len().max(1) as u64;
        let (shares, flights) = kernel.map_again()?;
        kernel.set_ring(group_slot, ring.map())?;
        let clone = |fd: &OwnedFd| fd.try_clone().map_err(|e| Fault::io("a program's descriptor", &e));
        let (counters, enters) = kernel.entries_again()?;
        let mut capture = Capture {
            ring,
            shares,
            flights,
            counters,
            enters,
            sights: MapHandle::try_from(&self.sights).map_err(|e| fault_of("the capture counters", &e))?,
            programs: self.programs.iter().map(clone).collect::<Res<_>>()?,
            volumes: Vec::new(),
            walked: 0,
            misses: [[0; 2]; 2],
        };
        capture.misses = [capture.misses_now()?; 2];
        for (id, slot, disk, entries) in volumes {
            kernel.begin_share(slot, room);
            // The kernel's account first: what completes in between is taken for lost once, and answered; the other way round
            // it would hide that much for ever.
            let stat_sectors = disk.sectors_changed()?;
            let seen = capture.seen(slot)?;
            capture.volumes.push(Side { id, slot, disk, entries, stat_sectors, seen, answered: 0, lost: 0, walked_bytes: 0 });
        }
        Ok(capture)
    }
}

/// What the in-flight table lacks: it grows when a write finds no place there, or when the program that enters them is skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entries {
    /// Writes of the volume that found no place.
    pub untracked: u64,
    /// Skipped runs of the program, all disks of the host.
    pub misses: u64,
}

/// One volume of a capture.
struct Side {
    id: VolumeId,
    slot: u32,
    disk: Disk,
    /// As it was when nothing was in flight: since then every write was entered if it still is so.
    entries: Entries,
    /// The two accounts when capture began, in sectors.
    stat_sectors: u64,
    seen: [u64; 2],
    /// Sectors that went by unseen and were answered.
    answered: u64,
    /// `lost` of the share when it was last looked at.
    lost: u64,
    /// Data bytes walked and not released.
    walked_bytes: u64,
}

/// What capture does not hold although it happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missed {
    /// Changes within these ranges.
    Ranges(Vec<ByteRun>),
    /// Changes anywhere among the dirty blocks.
    Anywhere,
}

/// One group's end of capture: its ring, and the witnesses of what is not in it.
pub struct Capture {
    ring: Ring,
    shares: Words,
    flights: Words,
    counters: Words,
    enters: OwnedFd,
    sights: MapHandle,
    programs: Vec<OwnedFd>,
    volumes: Vec<Side>,
    /// Where the next walk begins.
    walked: u64,
    /// Misses of both copies at the last two looks, the older first.
    misses: [[u64; 2]; 2],
}

impl Capture {
    /// Where the next record will begin. Every write that completed before this call has its record before it.
    pub fn produced(&self) -> u64 {
        self.ring.produced()
    }
    /// Where the next walk begins.
    pub fn walked(&self) -> u64 {
        self.walked
    }
    /// Bytes of the ring that are in use.
    pub fn used_bytes(&self) -> u64 {
        self.produced().saturating_sub(self.ring.released())
    }
    /// Bytes of a volume's data in the ring.
    pub fn pending_bytes(&self, index: usize) -> u64 {
        let share = share_in(&self.shares, self.volumes[index].slot);
        share[0].load(Ordering::Acquire).saturating_sub(share[1].load(Ordering::Acquire))
    }
    /// Size of the ring in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.ring.size_bytes()
    }
    /// Becomes readable when a record comes after everything was released.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.ring.fd()
    }
    /// Hands over the records from the last walk's end up to `to` (a value of [`Capture::produced`]), in the order of completion;
    /// volumes by their index in the order in which capture was started with them. Error: `INTERNAL` for a torn ring.
    pub fn walk(&mut self, to: u64, sink: &mut dyn FnMut(usize, Captured)) -> Res<()> {
        let Capture { ring, volumes, walked, .. } = self;
        let mut strange = None;
        ring.walk(*walked, to, &mut |record| match volumes.iter().position(|side| side.slot == record.slot) {
            Some(index) => {
                if let What::Data(_) = record.what {
                    volumes[index].walked_bytes += HEAD_BYTES + record.len_bytes;
                }
                sink(index, record);
            }
            None => strange = Some(record.slot),
        })?;
        *walked = to;
        match strange {
            Some(slot) => {
                Err(Fault::internal("the capture ring", format!("a record of slot {slot}, which is not of this group")))
            }
            None => Ok(()),
        }
    }
    /// The bytes of a [`What::Data`] that was walked and not released.
    pub fn bytes(&self, position: u64, len: usize) -> &[u8] {
        self.ring.bytes(position, len)
    }
    /// Gives back the room of everything that was walked.
    pub fn release(&mut self) {
        self.ring.release(self.walked);
        for side in &mut self.volumes {
            let taken = std::mem::take(&mut side.walked_bytes);
            share_in(&self.shares, side.slot)[1].fetch_add(taken, Ordering::AcqRel);
        }
    }

    /// What completed until now and is in no record so far, by volume index. To be asked after a walk: every record that this
    /// call does not know of comes after the position that was walked to. Errors of sysfs and maps.
    ///
    /// 1. Not even a hole found room: anywhere.
    /// 2. Both copies were skipped at least once, somewhere on this host: anywhere.
    /// 3. The kernel's account of the disk is ahead of what either copy saw: a completion went by without its programs; it is
    ///    one of those in the in-flight table (or has left it with a hole, see `flight.bpf.h`). Anywhere, if writes were not
    ///    all entered there.
    pub fn missed(&mut self) -> Res<Vec<(usize, Missed)>> {
        let misses = self.misses_now()?;
        // Against the look before the last: a request may be skipped by copy a before one look and by copy b after it (it has
        // not ended then, so the cut in between needs nothing of it).
        let skipped = (0..2).all(|copy| misses[copy] != self.misses[0][copy]);
        self.misses = match skipped {
            true => [misses; 2],
            false => [self.misses[1], misses],
        };
        let mut missed = Vec::new();
        for index in 0..self.volumes.len() {
            let lost_now = share_in(&self.shares, self.volumes[index].slot)[3].load(Ordering::Acquire);
            let unseen = self.unseen(index)?;
            let entered = unseen == 0 || self.entries(index)? == self.volumes[index].entries;
            let side = &mut self.volumes[index];
            let unrecorded = lost_now != side.lost;
            side.lost = lost_now;
            side.answered += unseen;
            if unrecorded || skipped || !entered {
                tracing::debug!(volume = %side.id, unrecorded, skipped, entered, "capture missed something");
                missed.push((index, Missed::Anywhere));
            }
            // Also beside the other: a bit that a receipt cleared while its write was in flight is set again by its completion, if
            // that was seen.
            if unseen > 0 {
                let sectors =
                    |flight: &crate::tracker::kernel::Flight| ByteRun { offset: flight.sector << 9, len: flight.sectors << 9 };
                let ranges: Vec<ByteRun> = flights_in(self.flights.all(), side.slot).iter().map(sectors).collect();
                tracing::debug!(volume = %side.id, sectors = unseen, ranges = ranges.len(), "completions were not seen: their blocks are read");
                missed.push((index, Missed::Ranges(ranges)));
            }
        }
        Ok(missed)
    }

    /// What the in-flight table lacks of a volume's writes.
    fn entries(&self, index: usize) -> Res<Entries> {
        Ok(Entries { untracked: untracked_in(&self.counters, self.volumes[index].slot), misses: misses_of(&self.enters)? })
    }

    /// Ranges of a volume that were submitted and not seen to complete: what a read finds there may be old or new.
    pub fn in_flight(&self, index: usize) -> Vec<ByteRun> {
        let slot = self.volumes[index].slot;
        let run = |flight: &crate::tracker::kernel::Flight| ByteRun { offset: flight.sector << 9, len: flight.sectors << 9 };
        flights_in(self.flights.all(), slot).iter().map(run).collect()
    }

    /// Sectors completed that no copy saw and nobody answered: the most that is found in a few looks.
    fn unseen(&self, index: usize) -> Res<u64> {
        let side = &self.volumes[index];
        let mut most = 0;
        for look in 0..LOOKS {
            if look > 0 {
                std::thread::yield_now();
            }
            // The kernel's account first: it is never ahead but by what was not seen.
            let by_kernel = side.disk.sectors_changed()?.saturating_sub(side.stat_sectors);
            let seen = self.seen(side.slot)?;
            let by_us = (seen[0] - side.seen[0]).max(seen[1] - side.seen[1]);
            most = most.max(by_kernel.saturating_sub(by_us).saturating_sub(side.answered));
        }
        Ok(most)
    }
    /// Sectors whose completion each copy saw, since the programs were loaded.
    fn seen(&self, slot: u32) -> Res<[u64; 2]> {
        let mut seen = [0; 2];
        for (copy, seen) in seen.iter_mut().enumerate() {
            let key = (slot * 2 + copy as u32).to_ne_bytes();
            let found = self.sights.lookup_percpu(&key, MapFlags::ANY).map_err(|e| fault_of("the capture counters", &e))?;
            *seen = found.into_iter().flatten().map(|cpu| u64::from_ne_bytes(std::array::from_fn(|i| cpu[i]))).sum();
        }
        Ok(seen)
    }
    fn misses_now(&self) -> Res<[u64; 2]> {
        let mut misses = [0; 2];
        for (miss, program) in misses.iter_mut().zip(&self.programs) {
            *miss = misses_of(program)?;
        }
        Ok(misses)
    }
}

fn misses_of(program: &OwnedFd) -> Res<u64> {
    let path = format!("/proc/self/fdinfo/{}", program.as_raw_fd());
    let text = fs::read_to_string(&path).map_err(|e| Fault::io(path.as_str(), &e))?;
    Ok(misses_in(&text).unwrap_or(0))
}
