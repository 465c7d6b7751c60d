//! Owns the knowledge of which blocks changed: eBPF programs, pinned bitmaps, counters, witnesses.
//! Gives the set of blocks taken at a flip, and every reason to doubt it.
//! Keeps a bit until the receipt of the generation that carried it; an agent's death loses none.
//! Never guesses clean: what it cannot prove is reported as doubt.
//! Assumes the notes headed T in `kernel-notes.md`.

use crate::host::DeviceIdentity;
use crate::model::{BlockSet, Digest, GroupId, Position, Receipt, Res, VolumeId};
use std::path::Path;

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

/// The tracker of one host.
pub struct Tracker;

impl Tracker {
    /// Opens the pinned programs and maps under `pin_dir` (on bpffs, mounted if it is not), or loads and pins them.
    /// Errors: `KERNEL_UNSUPPORTED` (no BTF, no BPF, no tracepoint; names which).
    pub fn open(_pin_dir: &Path) -> Res<Tracker> { todo!() }
    /// Writes known patterns to a scratch loop device in `scratch_dir` (a partition and a 128 MiB write among them, discards,
    /// write-zeroes) and must see every block. Error: `TRACKER_BLIND` with the first block missed.
    pub fn self_test(&mut self, _scratch_dir: &Path) -> Res<()> { todo!() }
    /// Tracks a device as a volume of a group. All volumes of a group flip together.
    pub fn track(&mut self, _group: GroupId, _volume: VolumeId, _device: &DeviceIdentity) -> Res<Continuity> { todo!() }
    /// Forgets a volume, its bits and pins.
    pub fn untrack(&mut self, _volume: VolumeId) -> Res<()> { todo!() }
    /// Begins a new phase for the group: bits that were taken without a receipt go back first, then one store and one grace
    /// period; after it every earlier write has its bit in the taken half.
    pub fn flip(&mut self, _group: GroupId) -> Res<()> { todo!() }
    /// The blocks taken by the last flip.
    pub fn taken(&self, _volume: VolumeId) -> Res<BlockSet> { todo!() }
    /// The blocks dirtied since the last flip, so far.
    pub fn active(&self, _volume: VolumeId) -> Res<BlockSet> { todo!() }
    /// Number of blocks in either half.
    pub fn dirty_blocks(&self, _volume: VolumeId) -> Res<u64> { todo!() }
    /// Sets bits in the active half (returned bits, repairs, a full comparison).
    pub fn mark(&mut self, _volume: VolumeId, _blocks: &BlockSet) -> Res<()> { todo!() }
    /// Clears the taken halves of the group against the receipt of the generation that carried them, and remembers it as base.
    pub fn release(&mut self, _group: GroupId, _receipt: &dyn Receipt) -> Res<()> { todo!() }
    /// Removes blocks from the taken half of a volume against a receipt (a first sync is received in segments).
    pub fn release_blocks(&mut self, _volume: VolumeId, _blocks: &BlockSet, _receipt: &dyn Receipt) -> Res<()> { todo!() }
    /// The pinned base of a group.
    pub fn base(&self, _group: GroupId) -> Res<Base> { todo!() }
    /// Replaces the pinned base.
    pub fn set_base(&mut self, _group: GroupId, _base: Base) -> Res<()> { todo!() }
    /// Reads misses of every copy, link state, identity of each device as the programs see it, and the `/sys/block/X/stat`
    /// witness. Empty = the bits count. `now` = the identities as read by the caller at this cut.
    pub fn doubts(&mut self, _group: GroupId, _now: &[(VolumeId, DeviceIdentity)]) -> Res<Vec<Doubt>> { todo!() }
    /// Starts counting witnesses and misses anew, after a doubt was answered by marking everything.
    pub fn trust_from_here(&mut self, _group: GroupId) -> Res<()> { todo!() }
}
