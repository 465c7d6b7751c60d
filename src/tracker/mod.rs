//! Owns the knowledge of which blocks changed: eBPF programs, pinned bitmaps, counters, witnesses.
//! Gives the set of blocks taken at a flip, and every reason to doubt it.
//! Keeps a bit until the receipt of the generation that carried it; an agent's death loses none.
//! Never guesses clean: what it cannot prove is reported as doubt.
//! Assumes the notes headed T in `kernel-notes.md`.
#![allow(unsafe_code)]

mod capture;
mod grace;
mod halves;
mod kernel;
mod leaves;
mod notes;
mod ring;
mod scratch;
mod sysfs;
mod witness;

pub use capture::{Capture, Missed, Plant};
pub use ring::{Captured, What};

use crate::host::DeviceIdentity;
use crate::model::{BLOCK_BYTES, BlockRun, BlockSet, Code, Digest, Fault, GroupId, Position, Receipt, Res, Uuid, VolumeId};
use crate::tracker::capture::Capturer;
use crate::tracker::halves::{HALVES, HELD, Halves, Shape, Words};
use crate::tracker::kernel::{Flight, Kernel, MAX_VOLUMES, Target};
use crate::tracker::leaves::{KernelLeaves, LeafStore};
use crate::tracker::notes::{GroupNote, Stage, VolumeNote};
use crate::tracker::sysfs::{Account, Disk};
use crate::tracker::witness::Reading;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Why a volume's set of changed blocks cannot be trusted; each leads to a full comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Doubt {
    /// The volume.
    pub volume: VolumeId,
    /// A sentence for `status` and the log.
    pub reason: String,
}

/// What is remembered, in the kernel beside the bits and exactly as long as they live, about the standby's copy of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Base {
    /// The last position with a receipt and its digest; generation 0 = none.
    pub acked: (Position, Digest),
    /// A generation that was cut and may or may not have been committed by the standby; generation 0 = none.
    pub pending: (Position, Digest),
}

/// How a volume came to be tracked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Continuity {
    /// The pinned bits were found and nothing broke since they began: they count.
    Unbroken,
    /// Tracking begins now; nothing is known of the time before.
    Fresh,
}

/// A volume whose bits are in the kernel.
struct Volume {
    slot: u32,
    note: VolumeNote,
    halves: Halves,
    /// Its disk's statistics, kept open: a flip of a thousand volumes must not look up thousands of paths.
    account: Option<Account>,
    /// Named by `track` in this life of the agent; a volume that was only found is carried along, but not believed.
    claimed: bool,
}

/// How long the two accounts of a disk are given to meet: a completion that was counted by a program reaches the
/// kernel's statistics a few instructions later, or, interrupted, a little after that.
const SETTLE: Duration = Duration::from_millis(10);
/// How often a moment without writes is looked for when counting begins anew.
const SETTLE_TRIES: usize = 3;

/// The tracker of one host.
pub struct Tracker {
    kernel: Kernel,
    /// The slot of each group.
    groups: BTreeMap<GroupId, u32>,
    volumes: BTreeMap<VolumeId, Volume>,
    /// The capture programs, once they were proven; why not, otherwise.
    capturer: Result<Capturer, Fault>,
    /// A fault planted by a test.
    plant: Plant,
}

impl Tracker {
    /// Opens the pinned programs and maps under `pin_dir` (on bpffs, mounted if it is not), or loads and pins them.
    /// Errors: `KERNEL_UNSUPPORTED` (no BTF, no BPF, no tracepoint; names which).
    pub fn open(pin_dir: &Path) -> Res<Tracker> {
        Tracker::open_made(pin_dir, None, Plant::Nothing)
    }

    /// As [`Tracker::open`], with room for so many leaves (see `leaves`) if programs are loaded. For tests.
    #[doc(hidden)]
    pub fn open_with(pin_dir: &Path, leaves: Option<u32>) -> Res<Tracker> {
        Tracker::open_made(pin_dir, leaves, Plant::Nothing)
    }

    /// As [`Tracker::open`], with a fault planted into the programs that it loads and into those that the next
    /// [`Tracker::prepare_capture`] loads, which then leaves out the proof that would find it. For tests.
    #[doc(hidden)]
    pub fn open_planted(pin_dir: &Path, plant: Plant) -> Res<Tracker> {
        Tracker::open_made(pin_dir, None, plant)
    }

    fn open_made(pin_dir: &Path, leaves: Option<u32>, plant: Plant) -> Res<Tracker> {
        sysfs::allow_many_files();
        let kernel = Kernel::open(pin_dir, leaves, plant)?;
        let untried = Fault::new(Code::KernelUnsupported, "capture", "it was not asked for yet", "restart the agent");
        let mut tracker = Tracker { kernel, groups: BTreeMap::new(), volumes: BTreeMap::new(), capturer: Err(untried), plant };
        // A previous life may have died between the store of a phase and its grace period.
        tracker.grace_period()?;
        for slot in 0..MAX_VOLUMES {
            let note = GroupNote::from_record(&tracker.kernel.group_record(slot)?);
            if note.used != 0 {
                tracker.groups.insert(Uuid(note.id), slot);
                // Whoever read its ring is dead.
                tracker.end_capture(slot)?;
            }
        }
        for slot in 0..MAX_VOLUMES {
            let Some(note) = VolumeNote::from_record(&tracker.kernel.volume_record(slot)?) else { continue };
            match tracker.found_volume(slot, &note) {
                Some(halves) => {
                    drop(tracker.volumes.insert(note.id, Volume { slot, note, halves, account: None, claimed: false }))
                }
                None => tracker.clear_slot(slot)?,
            }
        }
        let empty: Vec<GroupId> = tracker.groups.keys().copied().filter(|group| tracker.members(*group).is_empty()).collect();
        empty.into_iter().try_for_each(|group| tracker.drop_group(group))?;
        Ok(tracker)
    }

    /// Writes known patterns to a scratch loop device in `scratch_dir` (a partition and a 128 MiB write among them, discards,
    /// write-zeroes) and must see every block. Error: `TRACKER_BLIND` with the first block missed.
    pub fn self_test(&mut self, scratch_dir: &Path) -> Res<()> {
        scratch::run(self, scratch_dir)
    }

    /// Loads the capture programs and proves them: where the kernel maps its memory is found out, then writes of every kind to a
    /// scratch loop device in `scratch_dir` are captured and compared with what the device holds. An error is the reason why
    /// this host cuts with a freeze instead; [`Tracker::capture_refusal`] goes on naming it.
    pub fn prepare_capture(&mut self, scratch_dir: &Path) -> Res<()> {
        let tried = scratch::calibrate(self, scratch_dir)
            .and_then(|layout| Capturer::load(&self.kernel, layout, self.plant))
            .and_then(|capturer| {
                self.capturer = Ok(capturer);
                match self.plant {
                    Plant::Nothing => scratch::prove_capture(self, scratch_dir),
                    _ => Ok(()),
                }
            });
        if let Err(fault) = &tried {
            self.capturer = Err(fault.clone());
        }
        tried
    }

    /// Why this host cannot capture; `None` when it can.
    pub fn capture_refusal(&self) -> Option<&Fault> {
        self.capturer.as_ref().err()
    }

    /// Begins to capture: a ring for the group, then a flip whose one store also turns capture on. Every write that completes after
    /// this call returns has a record; every one that completed before the store has its bit in the taken half or is held.
    /// `volumes`: all of the group; their place here is their index in what [`Capture`] says. `ring_bytes`: a power of two. Errors: `GROUP_UNKNOWN`, the reason of
    /// [`Tracker::capture_refusal`], `KERNEL_UNSUPPORTED` without memory for the ring.
    pub fn start_capture(&mut self, group: GroupId, volumes: &[VolumeId], ring_bytes: u32) -> Res<Capture> {
        let slot = self.group_slot(group)?;
        self.end_capture(slot)?;
        let capturer = self.capturer.as_ref().map_err(Clone::clone)?;
        let misses = self.group_note(slot)?.misses[0];
        let mut sides = Vec::new();
        for id in volumes {
            let volume = self.volume(*id)?;
            let entries = capture::Entries { untracked: volume.note.counts.untracked, misses };
            sides.push((*id, volume.slot, Disk::find(volume.note.identity.major, volume.note.identity.minor)?, entries));
        }
        let capture = capturer.begin(&self.kernel, slot, sides, ring_bytes)?;
        self.kernel.set_phase(slot, self.kernel.phase(slot), false);
        if let Err(fault) = self.flip_steps(&[group], 4, Some(true)) {
            // Nobody would read that ring.
            self.end_capture(slot)?;
            return Err(fault);
        }
        Ok(capture)
    }

    /// Ends capture: the store, a grace period, and the programs know no ring any more. Fine when there was none.
    pub fn stop_capture(&mut self, group: GroupId) -> Res<()> {
        match self.groups.get(&group) {
            Some(slot) => self.end_capture(*slot),
            None => Ok(()),
        }
    }

    /// Tracks a device as a volume of a group. All volumes of a group flip together.
    ///
    /// `Fresh` leaves both halves empty, and the group without a base (S5): the caller marks what it does not know to be equal,
    /// usually everything. Errors:
    /// `NOT_A_BLOCK_IMAGE`, `KERNEL_UNSUPPORTED`, `VOLUME_IN_USE` for devices whose writes would not all be seen;
    /// `IDENTITY_CHANGED` when the device is no longer what `device` says.
    pub fn track(&mut self, group: GroupId, volume: VolumeId, device: &DeviceIdentity) -> Res<Continuity> {
        let disk = Disk::find(device.major, device.minor)?;
        disk.check_trackable()?;
        if let Some(difference) = disk.difference(device) {
            return Err(Fault::new(
                Code::IdentityChanged,
                format!("volume {volume}"),
                difference,
                "read its identity again and retry",
            ));
        }
        if device.size_bytes == 0 {
            return Err(Fault::new(Code::NotABlockImage, disk.device(), "it has no bytes", "attach a file that is not empty"));
        }
        let same_disk = |other: &Volume| {
            let known = &other.note.identity;
            other.claimed && (known.major, known.minor, known.diskseq) == (device.major, device.minor, device.diskseq)
        };
        if let Some((other, _)) = self.volumes.iter().find(|(id, other)| **id != volume && same_disk(other)) {
            let cause = format!("it is already tracked as volume {other}");
            return Err(Fault::new(Code::VolumeInUse, disk.device(), cause, "use one volume per device"));
        }
        if self.volumes.contains_key(&volume) {
            match self.broken(group, volume, device, &self.programs()?)?.into_iter().next() {
                None => {
                    self.volume_mut(volume)?.claimed = true;
                    return Ok(Continuity::Unbroken);
                }
                Some(reason) => {
                    tracing::warn!(%volume, %reason, "the pinned bits do not count: tracking begins afresh");
                    self.untrack(volume)?;
                }
            }
        }
        self.begin(group, volume, device, &disk)?;
        Ok(Continuity::Fresh)
    }

    /// Forgets a volume, its bits and pins. Error: `VOLUME_UNKNOWN`.
    pub fn untrack(&mut self, volume: VolumeId) -> Res<()> {
        let Some(known) = self.volumes.get(&volume) else { return Err(unknown_volume(volume)) };
        let (slot, group) = (known.slot, known.note.group);
        self.clear_slot(slot)?;
        self.volumes.remove(&volume);
        if self.members(group).is_empty() {
            self.drop_group(group)?;
        }
        Ok(())
    }

    /// Begins a new phase for the group: bits that were taken before are held until a receipt, then one store and one grace
    /// period; after it every earlier write has its bit in the taken half or in the held region. Error: `GROUP_UNKNOWN`.
    ///
    /// Before that, each volume whose completions were not all seen takes what has no receipt once more (see `witness`).
    ///
    /// Why a death between any two steps loses no bit:
    /// 1. *Hold*: every bit of the taken half is set in the held region too. Died before the end: the taken half still has
    ///    all of its bits, and the next flip begins here again.
    /// 2. *Clear* the taken half. No program writes to it (the previous flip waited), and died at any word, each cleared
    ///    bit stands in the held region.
    /// 3. *Store* the phase: the cleared half becomes active for every program that reads the phase from now on. Died
    ///    before: nothing flipped. Died after: the taken half has everything from before.
    /// 4. *Wait* a grace period, so that programs that read the old phase have set their bits. Died before its end:
    ///    `open` waits one before it does anything else.
    pub fn flip(&mut self, group: GroupId) -> Res<()> {
        self.flip_steps(&[group], 4, None)
    }

    /// Flips several groups with one grace period for all of them, each as [`Tracker::flip`] does: the four steps are gone through
    /// together. They are cut at different instants, one after the other. Error: `GROUP_UNKNOWN`; then none was flipped.
    pub fn flip_all(&mut self, groups: &[GroupId]) -> Res<()> {
        self.flip_steps(groups, 4, None)
    }

    /// Gives every bit without a receipt (taken or held) back to the active half. Error: `GROUP_UNKNOWN`.
    ///
    /// 1. Held and taken bits are set in the active half. 2. Then the two are cleared. Died in between, a bit stands twice.
    pub fn give_back(&mut self, group: GroupId) -> Res<()> {
        let active = u64::from(self.kernel.phase(self.group_slot(group)?)) % HALVES;
        let taken = (active + 1) % HALVES;
        for volume in self.members(group) {
            volume.halves.give_back(HELD, active)?;
            volume.halves.give_back(taken, active)?;
            volume.halves.clear(HELD)?;
            volume.halves.clear(taken)?;
        }
        Ok(())
    }

    /// The first `steps` of the four steps of [`Tracker::flip`]; fewer than four is what a death leaves behind. For tests.
    #[doc(hidden)]
    pub fn flip_until(&mut self, group: GroupId, steps: u32) -> Res<()> {
        self.flip_steps(&[group], steps, None)
    }

    /// Fills the in-flight table, so that no write finds a place in it. For tests.
    #[doc(hidden)]
    pub fn crowd_flights(&self) {
        self.kernel.crowd_flights();
    }

    /// Runs of each program and the nanoseconds they took together, since they were loaded and while `kernel.bpf_stats_enabled` was
    /// set. For measurements.
    #[doc(hidden)]
    pub fn run_stats(&self) -> Res<Vec<(u64, u64)>> {
        Ok(self.kernel.run_stats()?.to_vec())
    }

    /// Kernel memory in bytes, by the kernel's own account (before 6.4 it leaves the leaves out): a volume's own map, and the map of all
    /// volumes' leaves. Error: `VOLUME_UNKNOWN`. For measurements.
    #[doc(hidden)]
    pub fn memory_bytes(&self, volume: VolumeId) -> Res<(u64, u64)> {
        self.kernel.memory_of(self.volume(volume)?.slot)
    }

    /// Flips with capture off, and turns it on again after a pause: what two separate stores would do. For tests.
    #[doc(hidden)]
    pub fn flip_in_two_stores(&mut self, group: GroupId, pause: Duration) -> Res<()> {
        let slot = self.group_slot(group)?;
        let captures = self.kernel.captures(slot);
        self.flip_steps(&[group], 4, Some(false))?;
        std::thread::sleep(pause);
        self.kernel.set_phase(slot, self.kernel.phase(slot), captures);
        Ok(())
    }

    /// The blocks taken by the last flip. Error: `VOLUME_UNKNOWN`.
    pub fn taken(&self, volume: VolumeId) -> Res<BlockSet> {
        let known = self.volume(volume)?;
        known.halves.take(self.taken_half(known)?)
    }

    /// The blocks dirtied since the last flip, so far. Error: `VOLUME_UNKNOWN`.
    pub fn active(&self, volume: VolumeId) -> Res<BlockSet> {
        let known = self.volume(volume)?;
        known.halves.set_of(self.active_half(known)?)
    }

    /// Number of blocks dirtied since the last flip, so far. Error: `VOLUME_UNKNOWN`.
    pub fn active_blocks(&self, volume: VolumeId) -> Res<u64> {
        let known = self.volume(volume)?;
        known.halves.count(self.active_half(known)?)
    }

    /// The blocks that were dirtied and have no receipt: active, taken or held. Error: `VOLUME_UNKNOWN`.
    pub fn dirty(&self, volume: VolumeId) -> Res<BlockSet> {
        self.volume(volume)?.halves.set_of_any()
    }

    /// The blocks of writes that were submitted and not seen to complete: what a read finds there may be old or new, and their bits of
    /// before the last receipt are gone. To be asked after the bits: a write leaves only once its bit is set again. Error: `VOLUME_UNKNOWN`.
    pub fn in_flight(&self, volume: VolumeId) -> Res<BlockSet> {
        let known = self.volume(volume)?;
        Ok(blocks_of(&self.kernel.flights(known.slot), known.halves.blocks()))
    }

    /// Number of blocks that were dirtied and have no receipt. Error: `VOLUME_UNKNOWN`.
    pub fn dirty_blocks(&self, volume: VolumeId) -> Res<u64> {
        self.volume(volume)?.halves.count_in_any()
    }

    /// Sets bits in the active half (returned bits, repairs, a full comparison). Error: `VOLUME_UNKNOWN`; `INTERNAL` when
    /// the set is over another number of blocks.
    pub fn mark(&mut self, volume: VolumeId, blocks: &BlockSet) -> Res<()> {
        let known = self.volume(volume)?;
        check_size(volume, known, blocks)?;
        known.halves.insert(self.active_half(known)?, blocks)
    }

    /// Clears what is taken and held of the group against the receipt of the generation that carried them, and remembers it as base.
    /// Errors: `GROUP_UNKNOWN`; `CHAIN_BROKEN` when the receipt is not that of `base.pending`.
    ///
    /// 1. The base is written: acked = the receipt's, pending = none.
    /// 2. Whether anything was in flight at the generation's flip is noted.
    /// 3. The taken halves and held regions are cleared.
    ///
    /// Died in between, the bits are still there and are sent once more, on top of a base that is true. In the other order a
    /// death would leave a base that is older than the bits: changes between the two would be in neither.
    ///
    /// When the group flipped again after `base.pending` was set, the halves hold what a later flip took: only 1 is done.
    pub fn release(&mut self, group: GroupId, receipt: &dyn Receipt) -> Res<()> {
        let slot = self.group_slot(group)?;
        let mut note = self.group_note(slot)?;
        check_receipt(group, &note.base, receipt)?;
        let same_flip = note.pending_phase == u64::from(self.kernel.phase(slot));
        note.base = Base { acked: note.base.pending, pending: Default::default() };
        self.kernel.set_group_record(slot, &note.to_record())?;
        if same_flip {
            let taken = u64::from(self.kernel.phase(slot).wrapping_add(1)) % HALVES;
            for volume in self.volumes.values_mut().filter(|volume| volume.claimed && volume.note.group == group) {
                volume.note.cut_settled = volume.note.flip_settled;
                self.kernel.set_volume_record(volume.slot, &volume.note.to_record())?;
                volume.halves.clear(taken)?;
                volume.halves.clear(HELD)?;
            }
        }
        Ok(())
    }

    /// The pinned base of a group. Error: `GROUP_UNKNOWN`.
    pub fn base(&self, group: GroupId) -> Res<Base> {
        Ok(self.group_note(self.group_slot(group)?)?.base)
    }

    /// Replaces the pinned base, whole or not at all. Error: `GROUP_UNKNOWN`. A new `pending` belongs to the last flip.
    pub fn set_base(&mut self, group: GroupId, base: Base) -> Res<()> {
        let slot = self.group_slot(group)?;
        let mut note = self.group_note(slot)?;
        if note.base.pending != base.pending {
            note.pending_phase = u64::from(self.kernel.phase(slot));
        }
        note.base = base;
        self.kernel.set_group_record(slot, &note.to_record())
    }

    /// Reads misses of every copy, link state, identity of each device as the programs see it, and the `/sys/block/X/stat`
    /// witness. Empty = the bits count. `now` = the identities as read by the caller at this cut. Error: `GROUP_UNKNOWN`.
    pub fn doubts(&mut self, group: GroupId, now: &[(VolumeId, DeviceIdentity)]) -> Res<Vec<Doubt>> {
        let slot = self.group_slot(group)?;
        let mut note = self.group_note(slot)?;
        // Read before the accounts: what was missed until here is in the kernel's account by then, or not yet completed.
        let programs = self.programs()?;
        let ids: Vec<VolumeId> =
            self.volumes.iter().filter(|(_, v)| v.claimed && v.note.group == group).map(|(id, _)| *id).collect();
        let mut doubts = Vec::new();
        for volume in ids {
            let reasons = match now.iter().find(|(id, _)| *id == volume) {
                Some((_, device)) => self.broken(group, volume, device, &programs)?,
                None => vec!["its device was not looked at".to_owned()],
            };
            doubts.extend(reasons.into_iter().map(|reason| Doubt { volume, reason }));
        }
        // Misses that were shown to concern nobody here need not be explained again. One copy standing still is not enough
        // for that: a bio may be missed by copy a before the misses are read and by copy b after it.
        if doubts.is_empty() && note.misses != programs.misses && self.all_proved_whole(group)? {
            note.misses = programs.misses;
            self.kernel.set_group_record(slot, &note.to_record())?;
        }
        Ok(doubts)
    }

    /// Starts counting witnesses and misses anew, after a doubt was answered by marking everything. A device that is no
    /// longer the one recorded stays in doubt until it is tracked again. Error: `GROUP_UNKNOWN`.
    pub fn trust_from_here(&mut self, group: GroupId) -> Res<()> {
        let slot = self.group_slot(group)?;
        let mut note = self.group_note(slot)?;
        note.misses = self.kernel.misses()?;
        for id in self.volumes.iter().filter(|(_, v)| v.note.group == group).map(|(id, _)| *id).collect::<Vec<_>>() {
            let known = self.volume_mut(id)?;
            let (slot, identity) = (known.slot, known.note.identity.clone());
            let Ok(disk) = Disk::find(identity.major, identity.minor) else { continue };
            let reading = self.beginning(slot, &disk)?;
            let known = self.volume_mut(id)?;
            known.note.trust(&reading);
            let record = known.note.to_record();
            self.kernel.set_volume_record(slot, &record)?;
        }
        self.kernel.set_group_record(slot, &note.to_record())
    }
}

/// Why writes of this device cannot be captured exactly although its bits can be trusted; `None` when they can.
/// Error: `IDENTITY_CHANGED` when it is gone.
pub fn capture_excluded(device: &DeviceIdentity) -> Res<Option<String>> {
    let disk = Disk::find(device.major, device.minor)?;
    if !disk.keeps_account() {
        return Ok(Some(format!(
            "{} keeps no statistics (queue/iostats is 0), without which a write that no program saw would not be noticed",
            disk.device()
        )));
    }
    Ok(disk
        .has_atomic_writes()
        .then(|| format!("{} takes atomic writes, of which a read beside them may see a part", disk.device())))
}

/// How the programs of the host stand at one moment.
struct Programs {
    misses: [u64; notes::PROGRAMS],
    links: [bool; notes::PROGRAMS],
}

impl Tracker {
    fn programs(&self) -> Res<Programs> {
        Ok(Programs { misses: self.kernel.misses()?, links: self.kernel.links() })
    }
    fn grace_period(&self) -> Res<()> {
        grace::wait(&self.kernel)
    }
    fn end_capture(&self, group_slot: u32) -> Res<()> {
        if self.kernel.captures(group_slot) {
            self.kernel.set_phase(group_slot, self.kernel.phase(group_slot), false);
            self.grace_period()?;
        }
        self.kernel.drop_ring(group_slot)
    }
    fn group_slot(&self, group: GroupId) -> Res<u32> {
        self.groups.get(&group).copied().ok_or_else(|| {
            Fault::new(Code::GroupUnknown, format!("group {group}"), "no volume of it is tracked", "track its volumes first")
        })
    }
    fn group_note(&self, slot: u32) -> Res<GroupNote> {
        Ok(GroupNote::from_record(&self.kernel.group_record(slot)?))
    }
    /// All volumes of the group, those only found among them: they flip too, or their bits would be lost to the phase.
    fn members(&self, group: GroupId) -> Vec<&Volume> {
        self.volumes.values().filter(|volume| volume.note.group == group).collect()
    }
    fn volume(&self, volume: VolumeId) -> Res<&Volume> {
        self.volumes.get(&volume).filter(|known| known.claimed).ok_or_else(|| unknown_volume(volume))
    }
    fn volume_mut(&mut self, volume: VolumeId) -> Res<&mut Volume> {
        self.volumes.get_mut(&volume).ok_or_else(|| unknown_volume(volume))
    }
    fn active_half(&self, volume: &Volume) -> Res<u64> {
        Ok(u64::from(self.kernel.phase(self.group_slot(volume.note.group)?)) % HALVES)
    }
    fn taken_half(&self, volume: &Volume) -> Res<u64> {
        Ok((self.active_half(volume)? + 1) % HALVES)
    }

    /// The halves of a volume that was found in the pins; `None` when it is not whole.
    fn found_volume(&self, slot: u32, note: &VolumeNote) -> Option<Halves> {
        let shape = Shape::of(note.identity.size_bytes.div_ceil(BLOCK_BYTES));
        let whole = note.stage == Stage::Live && self.groups.contains_key(&note.group) && !self.volumes.contains_key(&note.id);
        let shared = whole.then(|| self.kernel.found_bits(slot, shape))?;
        match shared {
            Ok(shared) => Some(self.halves(slot, shared, shape)),
            Err(fault) => {
                tracing::warn!(volume = %note.id, %fault, "a volume's bits were not found whole: it begins afresh");
                None
            }
        }
    }

    fn halves(&self, slot: u32, shared: Words, shape: Shape) -> Halves {
        let leaves = || KernelLeaves::new(Arc::clone(&self.kernel.leaves), slot);
        Halves::new(shared, shape, shape.sparse.then(|| Box::new(leaves()) as Box<dyn LeafStore + Send>))
    }

    /// Makes a volume from nothing, in six steps. A death before the sixth leaves a slot that the next `open` clears.
    fn begin(&mut self, group: GroupId, volume: VolumeId, device: &DeviceIdentity, disk: &Disk) -> Res<()> {
        let taken: Vec<u32> = self.volumes.values().map(|known| known.slot).collect();
        let free = |taken: &[u32]| (0..MAX_VOLUMES).find(|slot| !taken.contains(slot));
        let slot = free(&taken).ok_or_else(too_many)?;
        // 1. The group, if it is new.
        let group_slot = match self.groups.get(&group) {
            // Its base spoke of this volume too, whose bits begin with nothing. Said here, durably, before the volume is live: the
            // caller knows of `Fresh` only until it dies, and its next life would find everything unbroken on top of that base.
            Some(slot) => {
                let mut note = self.group_note(*slot)?;
                note.base = Base::default();
                self.kernel.set_group_record(*slot, &note.to_record())?;
                *slot
            }
            None => {
                let slot = free(&self.groups.values().copied().collect::<Vec<_>>()).ok_or_else(too_many)?;
                let note = GroupNote { used: 1, id: group.0, misses: self.kernel.misses()?, ..GroupNote::default() };
                self.kernel.set_group_record(slot, &note.to_record())?;
                self.groups.insert(group, slot);
                slot
            }
        };
        // 2. The note, not yet live.
        let mut note = VolumeNote {
            stage: Stage::Building,
            id: volume,
            group,
            identity: device.clone(),
            stat_sectors: 0,
            counts: Default::default(),
            quiet: false,
            answered: 0,
            flip_settled: false,
            cut_settled: false,
            loose: false,
        };
        self.kernel.set_volume_record(slot, &note.to_record())?;
        // 3. Bits and counters, all zero.
        let blocks = device.size_bytes.div_ceil(BLOCK_BYTES);
        let shape = Shape::of(blocks);
        let made = self.kernel.make_bits(slot, shape);
        let shared = made.inspect_err(|_| drop(self.clear_slot(slot)))?;
        // 4. The programs see the disk. A write that both kinds miss completed before this, so any later read sees it.
        let target = Target {
            slot,
            group: group_slot,
            diskseq: device.diskseq,
            blocks,
            words: shape.words as u32,
            summary_words: shape.summary_words as u32,
            sparse: shape.sparse,
        };
        self.kernel.set_target(device_key(device), target)?;
        // 5. Programs that looked the disk up before have ended; the accounts begin.
        self.grace_period()?;
        note.trust(&self.beginning(slot, disk)?);
        // 6. The note is live.
        note.stage = Stage::Live;
        self.kernel.set_volume_record(slot, &note.to_record())?;
        let halves = self.halves(slot, shared, shape);
        self.volumes.insert(volume, Volume { slot, note, halves, account: None, claimed: true });
        Ok(())
    }

    /// Takes down whatever a slot has: 1 the note says so, 2 the programs forget the disk, 3 running ones end, 4 the bits
    /// go, 5 the slot is free. Died in between, `open` finds a note that is not live and does it again.
    fn clear_slot(&self, slot: u32) -> Res<()> {
        let mut record = self.kernel.volume_record(slot)?;
        record[..8].copy_from_slice(&(Stage::Building as u64).to_le_bytes());
        self.kernel.set_volume_record(slot, &record)?;
        self.kernel.drop_targets(slot)?;
        self.grace_period()?;
        self.kernel.drop_bits(slot)?;
        self.kernel.set_volume_record(slot, &[0; notes::NOTE_BYTES])
    }
    fn drop_group(&mut self, group: GroupId) -> Res<()> {
        let slot = self.group_slot(group)?;
        self.kernel.set_group_record(slot, &[0; notes::NOTE_BYTES])?;
        self.groups.remove(&group);
        Ok(())
    }

    /// Every reason why the bits of a volume do not count; `device` = its identity as the caller reads it now.
    /// `programs` was read just before: whatever they skipped until then shows in the accounts that are read here.
    fn broken(&self, group: GroupId, volume: VolumeId, device: &DeviceIdentity, programs: &Programs) -> Res<Vec<String>> {
        let Some(known) = self.volumes.get(&volume) else { return Err(unknown_volume(volume)) };
        let mut reasons = Vec::new();
        if known.note.group != group {
            reasons.push(format!("it was a volume of group {}", known.note.group));
        }
        if let Some(difference) = identity_difference(&known.note.identity, device) {
            reasons.push(difference);
        }
        let disk = match Disk::find(known.note.identity.major, known.note.identity.minor) {
            Ok(disk) => disk,
            Err(gone) => {
                reasons.push(gone.cause);
                return Ok(reasons);
            }
        };
        reasons.extend(disk.difference(&known.note.identity));
        let target = self.kernel.target(device_key(&known.note.identity))?;
        if !target.is_some_and(|target| target.slot == known.slot && target.diskseq == known.note.identity.diskseq) {
            reasons.push(format!("the programs no longer follow {} for it", disk.device()));
        }
        let (then, Programs { misses, links }) = (self.group_note(self.group_slot(known.note.group)?)?.misses, programs);
        let now = self.reading(known.slot, || disk.sectors_changed())?;
        let detached = witness::broken_kinds(&then, &then, links);
        let mut skipped = witness::broken_kinds(&then, misses, links);
        if disk.keeps_account() {
            // Completions that were skipped are found by the kernel's account, and answered by the next flip.
            skipped.retain(|kind| *kind != "complete");
        }
        if !detached.is_empty() {
            reasons.push(format!("no program of kind {} is attached any more (restart the agent)", detached.join(" and ")));
        } else if !skipped.is_empty() && !witness::proved_whole(&known.note.reading(), &now) {
            reasons.push(format!(
                "every copy of {} was skipped at least once (misses {then:?}, now {misses:?})",
                skipped.join(" and ")
            ));
        }
        reasons.extend(witness::accounts_differ(&known.note.reading(), &now));
        if known.note.loose {
            reasons.push("the completion of a write that may have been in flight over a cut was not seen".to_owned());
        }
        Ok(reasons)
    }

    /// See [`Tracker::flip`] and [`Tracker::flip_all`].
    /// `captures`: whether capture is on from the store on; `None` = as it is.
    fn flip_steps(&mut self, groups: &[GroupId], steps: u32, captures: Option<bool>) -> Res<()> {
        // A group that is named twice flips once: its taken half is cleared once.
        let phases: BTreeMap<GroupId, (u32, u32)> = groups
            .iter()
            .map(|group| self.group_slot(*group).map(|slot| (*group, (slot, self.kernel.phase(slot)))))
            .collect::<Res<_>>()?;
        let half = |phase: u32| u64::from(phase) % HALVES;
        let active_of = |volume: &Volume| phases.get(&volume.note.group).map(|(_, phase)| half(*phase));
        let members: Vec<(VolumeId, u64)> =
            self.volumes.iter().filter_map(|(id, volume)| Some((*id, active_of(volume)?))).collect();
        let before = self.answer_lost_completions(&members)?;
        let taken = || members.iter().map(|(id, active)| (&self.volumes[id].halves, (active + 1) % HALVES));
        if steps >= 1 {
            taken().try_for_each(|(halves, taken)| halves.give_back(taken, HELD))?;
        }
        if steps >= 2 {
            taken().try_for_each(|(halves, taken)| halves.clear(taken))?;
        }
        if steps >= 3 {
            phases.values().for_each(|(slot, phase)| {
                let captures = captures.unwrap_or_else(|| self.kernel.captures(*slot));
                self.kernel.set_phase(*slot, phase.wrapping_add(1), captures);
            });
        }
        if steps >= 4 {
            self.grace_period()?;
            self.begin_anew_in_quiet(before)?;
        }
        Ok(())
    }

    /// Looks for completions that no program saw. Where some are missing, everything without a receipt goes back to the
    /// active half, which the flip then takes: 1 the bits, 2 the note that says they were answered (died in between, they
    /// are answered twice). Gives the readings of the volumes whose accounts did not begin in quiet.
    fn answer_lost_completions(&mut self, members: &[(VolumeId, u64)]) -> Res<Vec<(VolumeId, Reading)>> {
        let mut not_quiet = Vec::new();
        for (id, active) in members.iter().copied() {
            let known = self.volume_mut(id)?;
            if !known.claimed {
                continue;
            }
            if !known.account.as_ref().is_some_and(|account| account.is_of(known.note.identity.diskseq)) {
                known.account = None;
                // A disk that is gone or another one is for `doubts` to name.
                let Ok(disk) = Disk::find(known.note.identity.major, known.note.identity.minor) else { continue };
                if disk.difference(&known.note.identity).is_some() {
                    continue;
                }
                known.account = Some(disk.account()?);
            }
            let known = self.volume(id)?;
            let Some(account) = &known.account else { continue };
            let now = self.reading(known.slot, || account.sectors_changed())?;
            let witness::Completions { lost, settled } = witness::completions(&known.note.reading(), known.note.answered, &now);
            // The in-flight table knows which they may have been, if every write since the accounts began was entered.
            let entered = lost > 0
                && known.note.counts.untracked == now.counts.untracked
                && self.group_note(self.group_slot(known.note.group)?)?.misses[0] == self.kernel.misses()?[0];
            if lost > 0 && entered {
                let flights = self.kernel.flights(known.slot);
                tracing::info!(volume = %id, sectors = lost, writes = flights.len(), "completions were not seen: their blocks are taken once more");
                known.halves.insert(active, &blocks_of(&flights, known.halves.blocks()))?;
            } else if lost > 0 {
                tracing::info!(volume = %id, sectors = lost, "completions were not seen: what has no receipt is taken once more");
                known.halves.give_back(HELD, active)?;
                known.halves.give_back((active + 1) % HALVES, active)?;
            }
            let known = self.volume_mut(id)?;
            let was = known.note.clone();
            known.note.loose |= lost > 0 && !entered && !known.note.cut_settled;
            known.note.answered += lost;
            known.note.flip_settled = settled;
            if settled {
                known.note.take(&now);
            } else if !known.note.quiet {
                not_quiet.push((id, now));
            }
            let (slot, note) = (known.slot, &known.note);
            if *note != was {
                let record = note.to_record();
                self.kernel.set_volume_record(slot, &record)?;
            }
        }
        Ok(not_quiet)
    }

    /// A volume whose accounts began while it was written cannot show that nothing is in flight. When it stood still for the
    /// whole of a flip (a freeze, usually), its accounts begin anew.
    fn begin_anew_in_quiet(&mut self, before: Vec<(VolumeId, Reading)>) -> Res<()> {
        for (id, then) in before {
            let known = self.volume(id)?;
            let Ok(disk) = Disk::find(known.note.identity.major, known.note.identity.minor) else { continue };
            let (slot, now) = (known.slot, self.reading(known.slot, || disk.sectors_changed())?);
            if then.quiet && then == now && disk.is_idle() {
                let known = self.volume_mut(id)?;
                known.note.take(&now);
                known.note.flip_settled = true;
                let record = known.note.to_record();
                self.kernel.set_volume_record(slot, &record)?;
            }
        }
        Ok(())
    }

    /// Whether both accounts of every volume of the group are equal at this moment.
    fn all_proved_whole(&self, group: GroupId) -> Res<bool> {
        for volume in self.members(group) {
            let Ok(disk) = Disk::find(volume.note.identity.major, volume.note.identity.minor) else { return Ok(false) };
            if !witness::proved_whole(&volume.note.reading(), &self.reading(volume.slot, || disk.sectors_changed())?) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Both accounts of a disk: the kernel's first, the programs' afterwards.
    fn reading(&self, slot: u32, sectors_changed: impl FnOnce() -> Res<u64>) -> Res<Reading> {
        let before = self.kernel.counts(slot);
        let stat_sectors = sectors_changed()?;
        let counts = self.kernel.counts(slot);
        Ok(Reading { stat_sectors, counts, quiet: before == counts })
    }

    /// Both accounts as a beginning, so that the programs' may only be ahead later on: theirs first, the kernel's after it
    /// caught up. Without a moment of quiet what was written meanwhile remains as slack of the witness.
    fn beginning(&self, slot: u32, disk: &Disk) -> Res<Reading> {
        let mut reading = Reading::default();
        for _ in 0..SETTLE_TRIES {
            let counts = self.kernel.counts(slot);
            std::thread::sleep(SETTLE);
            let stat_sectors = disk.sectors_changed()?;
            reading = Reading { stat_sectors, counts, quiet: self.kernel.counts(slot) == counts && disk.is_idle() };
            if reading.quiet {
                break;
            }
        }
        Ok(reading)
    }
}

impl VolumeNote {
    /// The accounts are counted from this reading on; everything before is answered.
    fn take(&mut self, reading: &Reading) {
        (self.stat_sectors, self.counts, self.quiet) = (reading.stat_sectors, reading.counts, reading.quiet);
        self.answered = 0;
    }
    /// The bits are trusted from this reading on.
    fn trust(&mut self, reading: &Reading) {
        self.take(reading);
        (self.flip_settled, self.cut_settled, self.loose) = (false, reading.quiet, false);
    }
    fn reading(&self) -> Reading {
        Reading { stat_sectors: self.stat_sectors, counts: self.counts, quiet: self.quiet }
    }
}

/// The blocks that these writes touch.
fn blocks_of(flights: &[Flight], blocks: u64) -> BlockSet {
    let mut set = BlockSet::empty(blocks);
    for flight in flights {
        let (first, end) = (flight.sector * 512 / BLOCK_BYTES, ((flight.sector + flight.sectors) * 512).div_ceil(BLOCK_BYTES));
        if first < end.min(blocks) {
            set.insert(BlockRun { start: first, count: end.min(blocks) - first });
        }
    }
    set
}

/// How the programs name a disk: major << 20 | first minor.
fn device_key(device: &DeviceIdentity) -> u32 {
    device.major << 20 | device.minor
}

/// In words, how the identity that the caller read differs from the recorded one.
fn identity_difference(was: &DeviceIdentity, is: &DeviceIdentity) -> Option<String> {
    let differs = |what: &str, was: String, is: String| (was != is).then(|| format!("its {what} is {is}, was {was}"));
    differs("device number", format!("{}:{}", was.major, was.minor), format!("{}:{}", is.major, is.minor))
        .or_else(|| differs("sequence number", was.diskseq.to_string(), is.diskseq.to_string()))
        .or_else(|| differs("size in bytes", was.size_bytes.to_string(), is.size_bytes.to_string()))
        .or_else(|| differs("backing file", format!("{:?}", was.backing), format!("{:?}", is.backing)))
}

fn unknown_volume(volume: VolumeId) -> Fault {
    Fault::new(Code::VolumeUnknown, format!("volume {volume}"), "it is not tracked", "track it first")
}

fn too_many() -> Fault {
    let cause = format!("{MAX_VOLUMES} volumes or groups are tracked already");
    Fault::new(Code::KernelUnsupported, "the tracker", cause, "protect fewer volumes on this host")
}

fn check_size(volume: VolumeId, known: &Volume, blocks: &BlockSet) -> Res<()> {
    match blocks.blocks() == known.halves.blocks() {
        true => Ok(()),
        false => {
            let cause = format!("a set over {} blocks was given, it has {}", blocks.blocks(), known.halves.blocks());
            Err(Fault::internal(format!("volume {volume}"), cause))
        }
    }
}

fn check_receipt(group: GroupId, base: &Base, receipt: &dyn Receipt) -> Res<()> {
    let (is, pending) = ((receipt.position(), receipt.digest()), base.pending);
    if is == pending && pending.0.generation != 0 {
        return Ok(());
    }
    let cause = format!("the receipt is for {} ({}), the generation under way is {} ({})", is.0, is.1, pending.0, pending.1);
    Err(Fault::new(Code::ChainBroken, format!("group {group}"), cause, "the changed blocks are kept and sent again"))
}
