//! What must be remembered exactly as long as the bits live, as fixed records in pinned maps.
//!
//! A record is written by one system call that the kernel finishes once it has begun, so a death of the agent leaves the
//! old record or the new one. All numbers little-endian, in the order of the fields. The layout belongs to
//! `kernel::SCHEMA`: a change there makes older pins unreadable, and they are dropped as a whole.

use crate::host::Backing;
use crate::host::DeviceIdentity;
use crate::model::{Digest, GroupId, Position, Uuid, VolumeId};
use crate::tracker::Base;
use crate::tracker::witness::Counts;

/// Size of every record, in bytes; `NOTE_BYTES` in `bitmap.bpf.c`.
pub(super) const NOTE_BYTES: usize = 256;
/// Number of programs: submit a, submit b, complete a, complete b.
pub(super) const PROGRAMS: usize = 4;

/// One record as it lies in the map.
pub(super) type Record = [u8; NOTE_BYTES];

/// Says that the pins are complete, and what they were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct HostNote {
    /// Written last; 0 while the pins are being made.
    pub complete: u64,
    /// The kernel's boot id.
    pub boot: [u8; 16],
    /// Kernel ids of the programs.
    pub programs: [u64; PROGRAMS],
    /// Kernel ids of the links that attach them.
    pub links: [u64; PROGRAMS],
}

/// A group: what is known of the standby's copy, and since when misses are counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct GroupNote {
    /// 1 = the slot is taken.
    pub used: u64,
    /// Which group.
    pub id: [u8; 16],
    /// The standby's copy.
    pub base: Base,
    /// The phase at which `base.pending` was set: a receipt for it clears only what was taken by that flip.
    pub pending_phase: u64,
    /// Misses of each program when the bits were last known to be whole.
    pub misses: [u64; PROGRAMS],
}

/// How far the making of a volume has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Stage {
    /// The slot is free.
    #[default]
    Free,
    /// Being made or taken down: worth nothing.
    Building,
    /// Its bits count, if nothing else speaks against them.
    Live,
}

/// A volume: whose bits these are, and where its counters stood when they were last known to be whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct VolumeNote {
    /// See [`Stage`].
    pub stage: Stage,
    /// Which volume.
    pub id: VolumeId,
    /// Of which group.
    pub group: GroupId,
    /// The device at the time it began.
    pub identity: DeviceIdentity,
    /// Sectors written and discarded by the kernel's own account.
    pub stat_sectors: u64,
    /// What the programs counted.
    pub counts: Counts,
    /// No write was under way while the two were read: they may be compared for equality.
    pub quiet: bool,
    /// Sectors whose completions were lost since then, and were answered by taking blocks once more.
    pub answered: u64,
    /// Nothing was in flight at the last flip.
    pub flip_settled: bool,
    /// Nothing was in flight at the flip of the last generation with a receipt, or when counting began.
    pub cut_settled: bool,
    /// A completion was lost that may be that of a write in flight over a cut: the volume is in doubt.
    pub loose: bool,
}

/// Writes fields one after the other.
struct Pen {
    record: Record,
    at: usize,
}

impl Pen {
    fn new() -> Pen {
        Pen { record: [0; NOTE_BYTES], at: 0 }
    }
    fn bytes(mut self, bytes: &[u8]) -> Pen {
        self.record[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
        self
    }
    fn numbers(self, numbers: &[u64]) -> Pen {
        numbers.iter().fold(self, |pen, number| pen.bytes(&number.to_le_bytes()))
    }
    fn place(self, (position, digest): (Position, Digest)) -> Pen {
        self.numbers(&[position.epoch, position.generation]).bytes(&digest.0)
    }
}

/// Reads fields one after the other.
struct Eye<'a> {
    record: &'a Record,
    at: usize,
}

impl Eye<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let field = std::array::from_fn(|i| self.record[self.at + i]);
        self.at += N;
        field
    }
    fn number(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }
    fn numbers<const N: usize>(&mut self) -> [u64; N] {
        std::array::from_fn(|_| self.number())
    }
    fn place(&mut self) -> (Position, Digest) {
        let [epoch, generation] = self.numbers();
        (Position { epoch, generation }, Digest(self.bytes()))
    }
}

impl HostNote {
    /// As bytes.
    pub(super) fn to_record(self) -> Record {
        Pen::new().numbers(&[self.complete]).bytes(&self.boot).numbers(&self.programs).numbers(&self.links).record
    }
    /// From bytes.
    pub(super) fn from_record(record: &Record) -> HostNote {
        let mut eye = Eye { record, at: 0 };
        HostNote { complete: eye.number(), boot: eye.bytes(), programs: eye.numbers(), links: eye.numbers() }
    }
}

impl GroupNote {
    /// As bytes.
    pub(super) fn to_record(self) -> Record {
        let pen = Pen::new().numbers(&[self.used]).bytes(&self.id).place(self.base.acked).place(self.base.pending);
        pen.numbers(&[self.pending_phase]).numbers(&self.misses).record
    }
    /// From bytes.
    pub(super) fn from_record(record: &Record) -> GroupNote {
        let mut eye = Eye { record, at: 0 };
        let (used, id) = (eye.number(), eye.bytes());
        let base = Base { acked: eye.place(), pending: eye.place() };
        GroupNote { used, id, base, pending_phase: eye.number(), misses: eye.numbers() }
    }
}

impl VolumeNote {
    /// As bytes.
    pub(super) fn to_record(&self) -> Record {
        let device = &self.identity;
        let backing = device.backing.as_ref();
        let file = backing.map_or([0; 5], |b| [1, b.dev, b.inode, b.offset_bytes, b.sizelimit_bytes]);
        let pen = Pen::new().numbers(&[self.stage as u64]).bytes(&self.id.0).bytes(&self.group.0);
        let pen = pen.numbers(&[u64::from(device.major), u64::from(device.minor), device.diskseq, device.size_bytes]);
        let counts = &self.counts;
        let pen = pen.numbers(&file).numbers(&[self.stat_sectors, u64::from(self.quiet)]).numbers(&counts.sectors);
        let pen = pen.numbers(&[counts.unknown, counts.outside, counts.stale, counts.untracked, counts.refused, self.answered]);
        pen.bytes(&[self.flip_settled, self.cut_settled, self.loose].map(u8::from)).record
    }
    /// From bytes; a free slot is `None`.
    pub(super) fn from_record(record: &Record) -> Option<VolumeNote> {
        let mut eye = Eye { record, at: 0 };
        let stage = match eye.number() {
            0 => return None,
            2 => Stage::Live,
            _ => Stage::Building,
        };
        let (id, group) = (Uuid(eye.bytes()), Uuid(eye.bytes()));
        let [major, minor, diskseq, size_bytes] = eye.numbers();
        let [is_file, dev, inode, offset_bytes, sizelimit_bytes] = eye.numbers();
        let backing = (is_file == 1).then_some(Backing { dev, inode, offset_bytes, sizelimit_bytes });
        let identity = DeviceIdentity { major: major as u32, minor: minor as u32, diskseq, size_bytes, backing };
        let (stat_sectors, quiet) = (eye.number(), eye.number() == 1);
        let sectors = eye.numbers();
        let [unknown, outside, stale, untracked, refused, answered] = eye.numbers();
        let counts = Counts { sectors, unknown, outside, stale, untracked, refused };
        let [flip_settled, cut_settled, loose] = eye.bytes().map(|byte: u8| byte == 1);
        let account =
            VolumeNote { stage, id, group, identity, stat_sectors, counts, quiet, answered, flip_settled, cut_settled, loose };
        Some(account)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(seed: u8) -> (Position, Digest) {
        (Position { epoch: u64::from(seed), generation: u64::from(seed) << 40 }, Digest([seed; 32]))
    }

    #[test]
    fn every_record_comes_back_as_it_was() {
        let host = HostNote { complete: 1, boot: [7; 16], programs: [1, 2, 3, 4], links: [5, 6, 7, u64::MAX] };
        assert_eq!(HostNote::from_record(&host.to_record()), host);
        let base = Base { acked: place(3), pending: place(4) };
        let group = GroupNote { used: 1, id: [9; 16], base, pending_phase: 12, misses: [1, 2, 3, u64::MAX] };
        assert_eq!(GroupNote::from_record(&group.to_record()), group);
        for backing in [None, Some(Backing { dev: 1, inode: 2, offset_bytes: 3, sizelimit_bytes: 4 })] {
            for stage in [Stage::Building, Stage::Live] {
                let identity = DeviceIdentity { major: 7, minor: 900, diskseq: 5, size_bytes: 1 << 44, backing: backing.clone() };
                let counts = Counts { sectors: [1, 2, 3, u64::MAX], unknown: 5, outside: 6, stale: 7, untracked: 8, refused: 9 };
                let note = VolumeNote {
                    stage,
                    id: Uuid([1; 16]),
                    group: Uuid([2; 16]),
                    identity,
                    stat_sectors: 8,
                    counts,
                    quiet: true,
                    answered: 9,
                    flip_settled: true,
                    cut_settled: false,
                    loose: true,
                };
                assert_eq!(VolumeNote::from_record(&note.to_record()), Some(note));
            }
        }
    }

    #[test]
    fn an_empty_slot_is_free() {
        assert_eq!(VolumeNote::from_record(&[0; NOTE_BYTES]), None);
        assert_eq!(GroupNote::from_record(&[0; NOTE_BYTES]).used, 0);
        assert_eq!(HostNote::from_record(&[0; NOTE_BYTES]).complete, 0);
    }
}
