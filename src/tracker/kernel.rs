//! The pinned half of the tracker: programs, links and maps in bpffs, found again or made anew.
//!
//! Everything lies under `PIN_DIR/v<schema>-<hash of the object>`. Another directory of that form belongs to another
//! build: it is unpinned, so its programs go and its bits with them, and every volume begins afresh. The host note says
//! that the pins are complete and which programs and links they were; whatever does not match it is taken down as a
//! whole. The pinned link is the only thing that keeps a program attached: no descriptor of the agent does.

use crate::model::{Code, Fault, Res};
use crate::tracker::capture::Plant;
use crate::tracker::halves::{Shape, Words};
use crate::tracker::leaves::{INBOX_WORDS, Leaves, most_leaves};
use crate::tracker::notes::{HostNote, NOTE_BYTES, PROGRAMS, Record};
use crate::tracker::sysfs::boot_id;
use crate::tracker::witness::{Counts, NAMES};
use libbpf_rs::libbpf_sys::bpf_map_create_opts;
use libbpf_rs::{Link, MapCore, MapFlags, MapHandle, MapType, ObjectBuilder, Program};
use memmap2::MmapOptions;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The programs as `build.rs` made them.
static OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/bitmap.bpf.o"));
/// Version of everything that this side keeps in the maps: the notes and the layout of the bits.
const SCHEMA: u32 = 6;
/// Most volumes, and most groups, that can be tracked at once; `MAX_VOLUMES` in `bitmap.bpf.c`.
pub(super) const MAX_VOLUMES: u32 = 1024;
/// The element of the array of maps that exists only to be updated.
const SPARE_SLOT: u32 = MAX_VOLUMES;
/// Maps that are pinned under their own names.
const MAPS: [&str; 12] = [
    "volumes",
    "groups",
    "bits",
    "leaves",
    "inbox",
    "counters",
    "rings",
    "shares",
    "flights",
    "host_note",
    "group_notes",
    "volume_notes",
];
/// The program that has no copy and no counters: it only takes refused writes out of the in-flight table.
const DROP: &str = "drop";
/// 64-bit words of a volume's `struct share`.
const SHARE_WORDS: usize = 8;
/// Words of the in-flight table: sets, ways, words of a `struct flight`.
const FLIGHT_WORDS: usize = 4096 * 8 * 4;
/// Bit of the phase word that says that capture is on.
const CAPTURE_BIT: u64 = 1 << 32;
/// The program that user space calls; no event runs it.
const LEAF_WORK: &str = "leaf_work";
/// Words of a `struct counters`.
const COUNTER_WORDS: usize = 5;
/// The magic number of bpffs in `statfs(2)`.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
/// Flags of the inner maps: may be mapped, may differ in length from the template.
const INNER_FLAGS: u32 = 1 << 10 | 1 << 12;

/// A pinned program and the link that attaches it.
struct Attached {
    program: OwnedFd,
    program_id: u64,
    link_id: u64,
}

/// What the programs look up for a disk: `struct volume` in `bitmap.bpf.c`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// Index of the volume's map, counters and note.
    pub slot: u32,
    /// Index of the group's phase and note.
    pub group: u32,
    /// The disk's sequence number.
    pub diskseq: u64,
    /// Number of blocks.
    pub blocks: u64,
    /// Words of one half.
    pub words: u32,
    /// Words of the summary of one half.
    pub summary_words: u32,
    /// The blocks' bits are in leaves.
    pub sparse: bool,
}

impl Target {
    const BYTES: usize = 40;
    fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&self.slot.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.group.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.diskseq.to_ne_bytes());
        bytes[16..24].copy_from_slice(&self.blocks.to_ne_bytes());
        bytes[24..28].copy_from_slice(&self.words.to_ne_bytes());
        bytes[28..32].copy_from_slice(&self.summary_words.to_ne_bytes());
        bytes[32..36].copy_from_slice(&u32::from(self.sparse).to_ne_bytes());
        bytes
    }
    fn from_bytes(bytes: &[u8]) -> Option<Target> {
        let bytes: &[u8; Self::BYTES] = bytes.try_into().ok()?;
        let word = |at: usize| u32::from_ne_bytes(std::array::from_fn(|i| bytes[at + i]));
        let long = |at: usize| u64::from_ne_bytes(std::array::from_fn(|i| bytes[at + i]));
        let (slot, group, diskseq, blocks) = (word(0), word(4), long(8), long(16));
        Some(Target { slot, group, diskseq, blocks, words: word(24), summary_words: word(28), sparse: word(32) == 1 })
    }
}

/// Handles on everything pinned.
pub(super) struct Kernel {
    dir: PathBuf,
    volumes: MapHandle,
    bits: MapHandle,
    /// Of all volumes that have leaves.
    pub(super) leaves: Arc<Leaves>,
    leaves_map: MapHandle,
    counters: Words,
    host_note: MapHandle,
    group_notes: MapHandle,
    volume_notes: MapHandle,
    groups: Words,
    rings: MapHandle,
    shares: Words,
    flights: Words,
    spare: MapHandle,
    attached: Vec<Attached>,
}

/// A write that was submitted and not seen to complete: `struct flight` in `shared.bpf.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flight {
    /// First sector of 512 bytes.
    pub sector: u64,
    /// Number of sectors.
    pub sectors: u64,
}

/// An error of libbpf about `thing`.
pub(super) fn fault_of(thing: &str, error: &libbpf_rs::Error) -> Fault {
    match error.kind() {
        libbpf_rs::ErrorKind::PermissionDenied => Fault::new(
            Code::NotRoot,
            thing,
            format!("the kernel refuses it ({error})"),
            "run the agent as root, outside of a restricted container",
        ),
        libbpf_rs::ErrorKind::OutOfMemory => Fault::new(
            Code::KernelUnsupported,
            thing,
            "the kernel has not enough memory for it",
            "free memory or raise the agent's memory limit",
        ),
        _ => Fault::new(
            Code::KernelUnsupported,
            thing,
            format!("{error:#}"),
            "see `doublure doctor` for what the tracker needs of the kernel",
        ),
    }
}

/// FNV-1a, enough to tell builds apart; nobody attacks his own pins.
fn object_hash() -> u64 {
    OBJECT.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

impl Kernel {
    /// Finds the pins under `pin_dir` whole, or takes down what is there and makes them.
    /// New ones have room for `leaves` leaves; as many as the machine's memory allows when it is `None`. `plant`: see `Tracker::open_planted`.
    pub(super) fn open(pin_dir: &Path, leaves: Option<u32>, plant: Plant) -> Res<Kernel> {
        if !Path::new("/sys/kernel/btf/vmlinux").exists() {
            let next = "use a kernel built with CONFIG_DEBUG_INFO_BTF (every current distribution's is)";
            return Err(Fault::new(
                Code::KernelUnsupported,
                "the tracker",
                "this kernel has no BTF (/sys/kernel/btf/vmlinux)",
                next,
            ));
        }
        libbpf_rs::set_print(Some((libbpf_rs::PrintLevel::Info, |_, text| tracing::debug!("libbpf: {}", text.trim_end()))));
        ensure_bpffs(pin_dir)?;
        let own = format!("v{SCHEMA}-{:016x}", object_hash());
        for entry in fs::read_dir(pin_dir).map_err(|e| Fault::io(pin_dir.display().to_string(), &e))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name != own && is_pins_name(&name) {
                tracing::warn!(pins = %name, "pins of another build: unpinned, every volume begins afresh");
                remove_pins(&entry.path())?;
            }
        }
        let dir = pin_dir.join(own);
        if dir.exists() {
            match Kernel::found(&dir) {
                Ok(kernel) => return Ok(kernel),
                Err(reason) => {
                    tracing::warn!(%reason, "the pins are not whole: made anew, every volume begins afresh");
                    remove_pins(&dir)?;
                }
            }
        }
        make(&dir, leaves.unwrap_or_else(|| most_leaves(memory_bytes())), plant)?;
        Kernel::found(&dir)
    }

    /// The pins, if they are all there and what the host note says they were.
    fn found(dir: &Path) -> Res<Kernel> {
        let open = |name: &str| {
            let path = dir.join(name);
            MapHandle::from_pinned_path(&path).map_err(|e| fault_of(&format!("pinned map {}", path.display()), &e))
        };
        let [volumes, groups, bits, counters] = [open("volumes")?, open("groups")?, open("bits")?, open("counters")?];
        let [host_note, group_notes, volume_notes] = [open("host_note")?, open("group_notes")?, open("volume_notes")?];
        let attached = NAMES.iter().map(|name| attached_at(dir, name)).collect::<Res<Vec<_>>>()?;
        attached_at(dir, DROP)?;
        let groups = map_words(&groups, u64::from(MAX_VOLUMES))?;
        let (rings, shares, flights) = (open("rings")?, open("shares")?, open("flights")?);
        let shares = map_words(&shares, u64::from(MAX_VOLUMES) * SHARE_WORDS as u64)?;
        let flights = map_words(&flights, FLIGHT_WORDS as u64)?;
        let inbox = map_words(&open("inbox")?, INBOX_WORDS)?;
        let work = Program::fd_from_pinned_path(dir.join(LEAF_WORK));
        let work = work.map_err(|e| fault_of(&format!("the pinned program {LEAF_WORK}"), &e))?;
        let (leaves, leaves_map) = (Arc::new(Leaves::new(work, inbox)), open("leaves")?);
        let counters = map_words(&counters, u64::from(counters.max_entries()) * COUNTER_WORDS as u64)?;
        let spare = new_bits(1)?;
        let kernel = Kernel {
            dir: dir.into(),
            volumes,
            bits,
            leaves,
            leaves_map,
            counters,
            host_note,
            group_notes,
            volume_notes,
            groups,
            rings,
            shares,
            flights,
            spare,
            attached,
        };
        let (says, is) = (HostNote::from_record(&read_record(&kernel.host_note, 0)?), host_note_of(&kernel.attached)?);
        match says == is {
            true => Ok(kernel),
            false => Err(Fault::internal(
                "the pins",
                "the programs or links are not those that were pinned, or the pinning was cut short",
            )),
        }
    }

    /// The phase of a group: counts flips; its remainder by the number of halves is the active half.
    pub(super) fn phase(&self, group: u32) -> u32 {
        self.groups.all()[group as usize].load(Ordering::SeqCst) as u32
    }
    /// Whether the phase word says that writes of the group are captured.
    pub(super) fn captures(&self, group: u32) -> bool {
        self.groups.all()[group as usize].load(Ordering::SeqCst) & CAPTURE_BIT != 0
    }
    /// Stores a phase and whether capture is on, in one store, after everything that this thread wrote to the halves.
    pub(super) fn set_phase(&self, group: u32, phase: u32, capture: bool) {
        let word = u64::from(phase) | if capture { CAPTURE_BIT } else { 0 };
        self.groups.all()[group as usize].store(word, Ordering::SeqCst);
    }
    /// The directory of the pins.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }
    /// Gives a group's programs this ring.
    pub(super) fn set_ring(&self, group: u32, ring: &MapHandle) -> Res<()> {
        let done = self.rings.update(&group.to_ne_bytes(), &ring.as_fd().as_raw_fd().to_ne_bytes(), MapFlags::ANY);
        done.map_err(|e| fault_of("the table of rings", &e))
    }
    /// Takes a group's ring away.
    pub(super) fn drop_ring(&self, group: u32) -> Res<()> {
        match self.rings.delete(&group.to_ne_bytes()) {
            Err(error) if error.kind() != libbpf_rs::ErrorKind::NotFound => Err(fault_of("the table of rings", &error)),
            _ => Ok(()),
        }
    }
    /// Begins a volume's account with its ring: nothing put, nothing taken, so many bytes of room.
    pub(super) fn begin_share(&self, slot: u32, room_bytes: u64) {
        let words = self.share(slot);
        [0, 0, room_bytes, 0].iter().zip(words).for_each(|(value, word)| word.store(*value, Ordering::SeqCst));
    }
    fn share(&self, slot: u32) -> &[AtomicU64] {
        &self.shares.all()[slot as usize * SHARE_WORDS..(slot as usize + 1) * SHARE_WORDS]
    }
    /// Writes of a volume that were submitted and not seen to complete.
    pub(super) fn flights(&self, slot: u32) -> Vec<Flight> {
        flights_in(self.flights.all(), slot)
    }
    /// Takes every free place of the in-flight table, for nobody.
    pub(super) fn crowd_flights(&self) {
        for entry in self.flights.all().chunks_exact(4) {
            entry[3].store(u64::MAX, Ordering::Relaxed);
            entry[0].store(u64::MAX, Ordering::SeqCst);
        }
    }
    /// Another mapping of the shares and of the in-flight table, for whoever must look without the tracker's lock.
    pub(super) fn map_again(&self) -> Res<(Words, Words)> {
        let open = |name: &str, words: usize| {
            let path = self.dir.join(name);
            let map = MapHandle::from_pinned_path(&path).map_err(|e| fault_of(&format!("pinned map {}", path.display()), &e))?;
            map_words(&map, words as u64)
        };
        Ok((open("shares", MAX_VOLUMES as usize * SHARE_WORDS)?, open("flights", FLIGHT_WORDS)?))
    }
    /// The counters and the program that enters writes into the in-flight table, for the same.
    pub(super) fn entries_again(&self) -> Res<(Words, OwnedFd)> {
        let path = self.dir.join("counters");
        let map = MapHandle::from_pinned_path(&path).map_err(|e| fault_of(&format!("pinned map {}", path.display()), &e))?;
        let counters = map_words(&map, u64::from(map.max_entries()) * COUNTER_WORDS as u64)?;
        let program = self.attached[0].program.try_clone().map_err(|e| Fault::io("a program's descriptor", &e))?;
        Ok((counters, program))
    }
    /// Updates the spare element of the array of maps, which makes the kernel wait for running programs.
    pub(super) fn touch_spare(&self) -> libbpf_rs::Result<()> {
        self.bits.update(&SPARE_SLOT.to_ne_bytes(), &self.spare.as_fd().as_raw_fd().to_ne_bytes(), MapFlags::ANY)
    }

    /// `struct note` number `at` of the groups.
    pub(super) fn group_record(&self, at: u32) -> Res<Record> {
        read_record(&self.group_notes, at)
    }
    /// Writes a group's note; whole or not at all.
    pub(super) fn set_group_record(&self, at: u32, record: &Record) -> Res<()> {
        write_record(&self.group_notes, at, record)
    }
    /// `struct note` number `at` of the volumes.
    pub(super) fn volume_record(&self, at: u32) -> Res<Record> {
        read_record(&self.volume_notes, at)
    }
    /// Writes a volume's note; whole or not at all.
    pub(super) fn set_volume_record(&self, at: u32, record: &Record) -> Res<()> {
        write_record(&self.volume_notes, at, record)
    }

    /// What the programs do for this disk.
    pub(super) fn target(&self, device: u32) -> Res<Option<Target>> {
        let found = self.volumes.lookup(&device.to_ne_bytes(), MapFlags::ANY).map_err(|e| fault_of("the table of disks", &e))?;
        Ok(found.and_then(|bytes| Target::from_bytes(&bytes)))
    }
    /// Makes the programs track this disk from now on.
    pub(super) fn set_target(&self, device: u32, target: Target) -> Res<()> {
        let done = self.volumes.update(&device.to_ne_bytes(), &target.to_bytes(), MapFlags::ANY);
        done.map_err(|e| fault_of("the table of disks", &e))
    }
    /// Makes the programs forget whichever disks belong to this slot.
    pub(super) fn drop_targets(&self, slot: u32) -> Res<()> {
        let devices: Vec<Vec<u8>> = self.volumes.keys().collect();
        for device in devices {
            let found = self.volumes.lookup(&device, MapFlags::ANY).map_err(|e| fault_of("the table of disks", &e))?;
            if found.and_then(|bytes| Target::from_bytes(&bytes)).is_some_and(|target| target.slot == slot) {
                self.volumes.delete(&device).map_err(|e| fault_of("the table of disks", &e))?;
            }
        }
        Ok(())
    }

    fn bits_path(&self, slot: u32) -> PathBuf {
        self.dir.join(format!("bits_{slot}"))
    }
    /// Makes, pins and installs the map of a slot, all zero, and its counters, all zero. Its leaves went with its last volume.
    pub(super) fn make_bits(&self, slot: u32, shape: Shape) -> Res<Words> {
        let words = shape.map_words();
        let mut map = new_bits(words)?;
        let path = self.bits_path(slot);
        map.pin(&path).map_err(|e| fault_of(&format!("pinning {}", path.display()), &e))?;
        let done = self.bits.update(&slot.to_ne_bytes(), &map.as_fd().as_raw_fd().to_ne_bytes(), MapFlags::ANY);
        done.map_err(|e| fault_of("the table of bitmaps", &e))?;
        for program in 0..PROGRAMS {
            self.counters_of(slot, program).flatten().for_each(|word| word.store(0, Ordering::Relaxed));
        }
        map_words(&map, words)
    }
    /// The counters of a slot and a program, one `struct counters` for each CPU.
    fn counters_of(&self, slot: u32, program: usize) -> impl Iterator<Item = &[AtomicU64]> {
        counters_in(&self.counters, slot, program)
    }
    /// The pinned map of a slot; an error when it is not there or has another length than `shape`.
    pub(super) fn found_bits(&self, slot: u32, shape: Shape) -> Res<Words> {
        let (path, words) = (self.bits_path(slot), shape.map_words());
        let map = MapHandle::from_pinned_path(&path).map_err(|e| fault_of(&format!("pinned map {}", path.display()), &e))?;
        if u64::from(map.max_entries()) != words {
            return Err(Fault::internal(path.display().to_string(), format!("it has {} words, not {words}", map.max_entries())));
        }
        map_words(&map, words)
    }
    /// Removes the leaves of a slot that no program uses any more, takes its map out of their sight and unpins it.
    pub(super) fn drop_bits(&self, slot: u32) -> Res<()> {
        self.leaves.forget(slot)?;
        if let Err(error) = self.bits.delete(&slot.to_ne_bytes())
            && error.kind() != libbpf_rs::ErrorKind::NotFound
        {
            return Err(fault_of("the table of bitmaps", &error));
        }
        match fs::remove_file(self.bits_path(slot)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Fault::io("unpinning a bitmap", &error)),
            _ => Ok(()),
        }
    }
    /// What the programs counted for a slot, all CPUs together. Read from the mapping: no system call.
    pub(super) fn counts(&self, slot: u32) -> Counts {
        let mut counts = Counts::default();
        for program in 0..PROGRAMS {
            for cpu in self.counters_of(slot, program) {
                let field = |at: usize| cpu[at].load(Ordering::Acquire);
                counts.sectors[program] += field(0);
                counts.unknown += field(1);
                counts.outside += field(2);
                counts.stale += field(3);
                counts.untracked += field(4);
            }
        }
        counts.refused = self.share(slot)[4].load(Ordering::Acquire);
        counts
    }

    /// How often the kernel skipped each program because it was already running on that CPU, all disks of the host.
    pub(super) fn misses(&self) -> Res<[u64; PROGRAMS]> {
        let mut misses = [0; PROGRAMS];
        for (miss, attached) in misses.iter_mut().zip(&self.attached) {
            *miss = number_in(&fd_info(attached.program.as_raw_fd())?, "recursion_misses:").ok_or_else(|| {
                let next = "use a kernel from 5.12 on";
                Fault::new(Code::KernelUnsupported, "the tracker's programs", "the kernel does not count skipped runs", next)
            })?;
        }
        Ok(misses)
    }
    /// Runs of each program and the nanoseconds they took together; zero unless `kernel.bpf_stats_enabled` is set.
    pub(super) fn run_stats(&self) -> Res<[(u64, u64); PROGRAMS]> {
        let mut stats = [(0, 0); PROGRAMS];
        for (stat, attached) in stats.iter_mut().zip(&self.attached) {
            let text = fd_info(attached.program.as_raw_fd())?;
            let field = |name| number_in(&text, name).unwrap_or(0);
            *stat = (field("run_cnt:"), field("run_time_ns:"));
        }
        Ok(stats)
    }
    /// Kernel memory of the bits of a slot and of the leaves of all slots, in bytes, by the kernel's own account.
    pub(super) fn memory_of(&self, slot: u32) -> Res<(u64, u64)> {
        let path = self.bits_path(slot);
        let bits = MapHandle::from_pinned_path(&path).map_err(|e| fault_of(&format!("pinned map {}", path.display()), &e))?;
        let of = |map: &MapHandle| Ok(number_in(&fd_info(map.as_fd().as_raw_fd())?, "memlock:").unwrap_or(0));
        Ok((of(&bits)?, of(&self.leaves_map)?))
    }
    /// Which programs are still attached by the link that was pinned for them.
    pub(super) fn links(&self) -> [bool; PROGRAMS] {
        std::array::from_fn(|at| match attached_at(&self.dir, NAMES[at]) {
            Ok(now) => now.link_id == self.attached[at].link_id && now.program_id == self.attached[at].program_id,
            Err(_) => false,
        })
    }
}

/// The words of a volume's `struct share` in a mapping of all of them: put, taken, room, lost.
pub(super) fn share_in(shares: &Words, slot: u32) -> &[AtomicU64] {
    &shares.all()[slot as usize * SHARE_WORDS..(slot as usize + 1) * SHARE_WORDS]
}

/// Writes of a volume that found no place in the in-flight table; only the first program enters any.
pub(super) fn untracked_in(counters: &Words, slot: u32) -> u64 {
    counters_in(counters, slot, 0).map(|cpu| cpu[4].load(Ordering::Acquire)).sum()
}

/// The counters of a slot and a program in a mapping of all, one `struct counters` for each CPU.
fn counters_in(counters: &Words, slot: u32, program: usize) -> impl Iterator<Item = &[AtomicU64]> {
    let (own, per_cpu) = (slot as usize * PROGRAMS + program, MAX_VOLUMES as usize * PROGRAMS);
    counters.all().chunks_exact(COUNTER_WORDS).skip(own).step_by(per_cpu)
}

/// The entries of a volume in the in-flight table. One that is being written belongs to a write that has not even begun.
pub(super) fn flights_in(table: &[AtomicU64], slot: u32) -> Vec<Flight> {
    let halves = |word: u64| (word as u32, (word >> 32) as u32);
    let mut found = Vec::new();
    for entry in table.chunks_exact(4) {
        let bio = entry[0].load(Ordering::Acquire);
        if bio <= 1 {
            continue;
        }
        let (sectors, _left) = halves(entry[2].load(Ordering::Relaxed));
        let (_device, its_slot) = halves(entry[3].load(Ordering::Relaxed));
        if its_slot == slot {
            found.push(Flight { sector: entry[1].load(Ordering::Relaxed), sectors: u64::from(sectors) });
        }
    }
    found
}

/// Loads the object, pins it piece by piece, and says last that it is whole.
///
/// 1. Maps and programs are pinned.
/// 2. Each program is attached and its link pinned.
/// 3. The host note is written.
///
/// A death before 3 leaves pins that [`Kernel::found`] refuses and the next start takes down; no volume is tracked before 3.
fn make(dir: &Path, most: u32, plant: Plant) -> Res<()> {
    fs::create_dir(dir).map_err(|e| Fault::io(dir.display().to_string(), &e))?;
    let load = || -> libbpf_rs::Result<()> {
        let mut open = ObjectBuilder::default().name("doublure")?.open_memory(OBJECT)?;
        for mut map in open.maps_mut() {
            if map.name() == "counters" {
                map.set_max_entries(libbpf_rs::num_possible_cpus()? as u32 * MAX_VOLUMES * PROGRAMS as u32)?;
            } else if map.name() == "leaves" {
                map.set_max_entries(most)?;
            } else if map.name().to_string_lossy().ends_with(".rodata.fault") {
                map.set_initial_value(&(plant as u32).to_ne_bytes())?;
            }
        }
        let mut object = open.load()?;
        for mut map in object.maps_mut() {
            let name = map.name().to_string_lossy().into_owned();
            if MAPS.contains(&name.as_str()) {
                map.pin(dir.join(name))?;
            }
        }
        for mut program in object.progs_mut() {
            let name = program.name().to_string_lossy().into_owned();
            program.pin(dir.join(&name))?;
            if name == LEAF_WORK {
                continue;
            }
            let mut link = program.attach()?;
            link.pin(dir.join(format!("link_{name}")))?;
        }
        Ok(())
    };
    load().map_err(|e| fault_of("the tracker's programs (tp_btf/block_bio_queue, tp_btf/block_rq_complete)", &e))?;
    let attached = NAMES.iter().map(|name| attached_at(dir, name)).collect::<Res<Vec<_>>>()?;
    let path = dir.join("host_note");
    let map = MapHandle::from_pinned_path(&path).map_err(|e| fault_of(&path.display().to_string(), &e))?;
    write_record(&map, 0, &host_note_of(&attached)?.to_record())
}

/// What the host note says of these programs when they are complete.
fn host_note_of(attached: &[Attached]) -> Res<HostNote> {
    let programs = std::array::from_fn(|at| attached[at].program_id);
    Ok(HostNote { complete: 1, boot: boot_id()?, programs, links: std::array::from_fn(|at| attached[at].link_id) })
}

/// A pinned program and its pinned link. An error when either is missing or the link attaches another program.
fn attached_at(dir: &Path, name: &str) -> Res<Attached> {
    let find = || -> libbpf_rs::Result<(OwnedFd, u32, libbpf_rs::query::LinkInfo)> {
        let program = Program::fd_from_pinned_path(dir.join(name))?;
        let id = Program::id_from_fd(program.as_fd())?;
        Ok((program, id, Link::open(dir.join(format!("link_{name}")))?.info()?))
    };
    let (program, id, link) = find().map_err(|e| fault_of(&format!("pinned program {name}"), &e))?;
    match link.prog_id == id {
        true => Ok(Attached { program, program_id: u64::from(id), link_id: u64::from(link.id) }),
        false => Err(Fault::internal(format!("pinned program {name}"), "its link attaches another program")),
    }
}

/// Bytes of memory of the machine.
fn memory_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    line.and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok()).unwrap_or(0) << 10
}

/// A new inner map of `words` words.
fn new_bits(words: u64) -> Res<MapHandle> {
    let thing = format!("a bitmap of {words} words");
    let entries = u32::try_from(words).map_err(|_| {
        Fault::new(Code::KernelUnsupported, thing.as_str(), "it is larger than a kernel map can be", "use a smaller volume")
    })?;
    let opts = bpf_map_create_opts {
        sz: size_of::<bpf_map_create_opts>() as libbpf_rs::libbpf_sys::size_t,
        map_flags: INNER_FLAGS,
        ..Default::default()
    };
    MapHandle::create(MapType::Array, Some("doublure_bits"), 4, 8, entries, &opts).map_err(|e| fault_of(&thing, &e))
}

/// Maps an array of 8-byte elements.
pub(super) fn map_words(map: &MapHandle, words: u64) -> Res<Words> {
    let bytes = words as usize * 8;
    // SAFETY: the descriptor is a BPF array of `words` elements of 8 bytes; such a map cannot shrink, and `Words` hands
    // out its content as atomics only, so that the programs' writes are no data races.
    let mapping = unsafe { MmapOptions::new().len(bytes).map_mut(map.as_fd().as_raw_fd()) };
    mapping.map(Words::new).map_err(|e| Fault::io("mapping a bitmap", &e))
}

fn read_record(map: &MapHandle, at: u32) -> Res<Record> {
    let mut record = [0; NOTE_BYTES];
    let found =
        map.lookup_into(&at.to_ne_bytes(), &mut record, MapFlags::ANY).map_err(|e| fault_of("the tracker's notes", &e))?;
    match found {
        true => Ok(record),
        false => Err(Fault::internal("the tracker's notes", format!("there is no note {at}"))),
    }
}

fn write_record(map: &MapHandle, at: u32, record: &Record) -> Res<()> {
    map.update(&at.to_ne_bytes(), record, MapFlags::ANY).map_err(|e| fault_of("the tracker's notes", &e))
}

/// The count of skipped runs in a program's `fdinfo`.
pub(super) fn misses_in(text: &str) -> Option<u64> {
    number_in(text, "recursion_misses:")
}

/// What the kernel says of a program or map of ours.
fn fd_info(fd: RawFd) -> Res<String> {
    let path = format!("/proc/self/fdinfo/{fd}");
    fs::read_to_string(&path).map_err(|e| Fault::io(path.as_str(), &e))
}

/// The number after `name` in an `fdinfo`.
fn number_in(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok()
}

/// `v<number>-<16 hexadecimal digits>`.
fn is_pins_name(name: &str) -> bool {
    let parts = name.strip_prefix('v').and_then(|rest| rest.split_once('-'));
    parts.is_some_and(|(schema, hash)| {
        !schema.is_empty()
            && schema.bytes().all(|b| b.is_ascii_digit())
            && hash.len() == 16
            && hash.bytes().all(|b| b.is_ascii_hexdigit())
    })
}

/// Unpins everything in a directory of pins. Links first: no program may run on while its maps go.
fn remove_pins(dir: &Path) -> Res<()> {
    let fail = |e: std::io::Error| Fault::io(format!("unpinning {}", dir.display()), &e);
    let mut paths: Vec<PathBuf> =
        fs::read_dir(dir).map_err(fail)?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>().map_err(fail)?;
    paths.sort_by_key(|path| !path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("link_")));
    for path in paths {
        fs::remove_file(path).map_err(fail)?;
    }
    fs::remove_dir(dir).map_err(fail)
}

/// Makes `pin_dir` a directory on bpffs, mounting one where none is.
fn ensure_bpffs(pin_dir: &Path) -> Res<()> {
    let fail = |path: &Path, e: std::io::Error| Fault::io(format!("pin directory {}", path.display()), &e);
    // The nearest ancestor that exists, and the first component that does not.
    let mut existing = pin_dir;
    let mut missing = None;
    while !existing.exists() {
        missing = Some(existing);
        existing = existing.parent().ok_or_else(|| {
            Fault::new(
                Code::BadArgument,
                format!("pin directory {}", pin_dir.display()),
                "it is not an absolute path",
                "give an absolute path",
            )
        })?;
    }
    if !on_bpffs(existing)? {
        // sysfs has an empty directory for exactly this and lets nobody make another one.
        let sysfs_point = Path::new("/sys/fs/bpf");
        let point = match missing {
            Some(_) if existing == sysfs_point => sysfs_point,
            Some(first) => {
                fs::create_dir(first).map_err(|e| fail(first, e))?;
                first
            }
            None => existing,
        };
        let busy = fs::read_dir(point).map_err(|e| fail(point, e))?.next().is_some();
        if busy {
            let next = "mount one there, or choose another pin directory";
            return Err(Fault::new(
                Code::BadArgument,
                format!("pin directory {}", point.display()),
                "it is not on bpffs and not empty",
                next,
            ));
        }
        let none: Option<&str> = None;
        nix::mount::mount(Some("bpf"), point, Some("bpf"), nix::mount::MsFlags::empty(), none)
            .map_err(|e| fail(point, e.into()))?;
    }
    fs::create_dir_all(pin_dir).map_err(|e| fail(pin_dir, e))
}

fn on_bpffs(path: &Path) -> Res<bool> {
    let stat = nix::sys::statfs::statfs(path).map_err(|e| Fault::io(path.display().to_string(), &e.into()))?;
    Ok(stat.filesystem_type().0 as i64 & 0xffff_ffff == BPF_FS_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_directories_of_pins_are_taken_for_pins() {
        assert!(is_pins_name(&format!("v{SCHEMA}-{:016x}", object_hash())));
        for other in ["v1", "v-0123456789abcdef", "v1-0123", "x1-0123456789abcdef", "v1-0123456789abcdeg", "v1-0123456789abcdef0"]
        {
            assert!(!is_pins_name(other), "{other}");
        }
    }

    #[test]
    fn numbers_are_read_by_name() {
        let text = "pos:\t0\nrun_cnt:\t9\nrecursion_misses:\t12\nverified_insns:\t3\n";
        assert_eq!(number_in(text, "recursion_misses:"), Some(12));
        assert_eq!(number_in(text, "run_cnt:"), Some(9));
        assert_eq!(number_in("pos:\t0\n", "recursion_misses:"), None);
    }

    #[test]
    fn a_target_survives_the_kernel_layout() {
        let target = Target { slot: 1, group: 2, diskseq: 3 << 33, blocks: 4 << 33, words: 5, summary_words: 6, sparse: true };
        assert_eq!(Target::from_bytes(&target.to_bytes()), Some(target));
        assert_eq!(Target::from_bytes(&[0; 31]), None);
    }
}
