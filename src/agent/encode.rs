//! Blocks on their way out: what the standby holds already is left out, the rest becomes change records in pieces.

use crate::delta;
use crate::delta::BlockDigest;
use crate::known::Known;
use crate::model::{BLOCK_BYTES, BlockRun, ByteRun, Res};
use std::collections::BTreeMap;
use std::time::Instant;

/// Size at which a piece of payload is sent, in bytes.
pub const PIECE_BYTES: usize = 256 << 10;
/// Digests remembered for one receipt at most (64 MiB of memory is the agent's bar); beyond it blocks stay "unknown", which
/// only costs sending them once more should they be written again.
const REMEMBERED_BLOCKS_MAX: usize = 1 << 20;

/// The digests of what was sent, to be believed when its receipt comes. A block may have been sent more than once (in rounds): the
/// last word counts.
#[derive(Default)]
pub struct Sent {
    runs: Vec<(u16, u64, u32)>,
    digests: Vec<u8>,
    /// What was sent beyond the bound, as one range for each volume: of its blocks nothing is believed, an earlier digest least of all.
    beyond: BTreeMap<u16, BlockRun>,
    /// Blocks of which only some sectors were sent last: whatever was sent of them before, the standby holds something else.
    parts: Vec<(u16, BlockRun)>,
}

impl Sent {
    /// The receipt has come: the standby holds this.
    pub fn believe(self, known: &mut [Known]) -> Res<()> {
        let mut at = 0;
        for (volume, start, count) in self.runs {
            let end = at + count as usize * 16;
            let run = BlockRun { start, count: u64::from(count) };
            // Left as they are, which is "unknown" since they were sent.
            let doubtful = self.beyond.get(&volume).is_some_and(|beyond| run.start < beyond.end() && beyond.start < run.end());
            if !doubtful {
                known[usize::from(volume)].set(start, &self.digests[at..end])?;
            }
            at = end;
        }
        for (volume, run) in self.parts {
            known[usize::from(volume)].forget(run)?;
        }
        Ok(())
    }
    /// Takes another's runs after our own, within the bound.
    pub fn append(&mut self, other: Sent) {
        let mut at = 0;
        for (volume, start, count) in other.runs {
            let end = at + count as usize * 16;
            self.note(volume, BlockRun { start, count: u64::from(count) }, &other.digests[at..end]);
            at = end;
        }
        for (volume, run) in other.beyond {
            self.pass(volume, run);
        }
        self.parts.extend(other.parts);
    }
    /// Nothing is believed of this run.
    fn pass(&mut self, volume: u16, run: BlockRun) {
        let all = self.beyond.entry(volume).or_insert(run);
        let (start, end) = (all.start.min(run.start), all.end().max(run.end()));
        *all = BlockRun { start, count: end - start };
    }
    fn note(&mut self, volume: u16, run: BlockRun, digests: &[u8]) {
        if self.digests.len() / 16 + run.count as usize <= REMEMBERED_BLOCKS_MAX {
            self.runs.push((volume, run.start, run.count as u32));
            self.digests.extend_from_slice(digests);
        } else {
            self.pass(volume, run);
        }
    }
}

/// Whether lz4 gets a large set across faster than plain bytes: both are tried on a window each, the better one is kept for a
/// while, then both are tried again. On a link that is slower than the processor lz4 wins, on a local one it only costs.
pub struct Effort {
    began: Instant,
    window_bytes: u64,
    windows: u32,
    /// Bytes a second with lz4 and without, as last seen.
    rates: [f64; 2],
    /// Whether the set is large enough for trials to pay.
    trials: bool,
}

/// Long enough that what waits in buffers does not decide.
const WINDOW_BYTES: u64 = 32 << 20;
/// Windows between two trials, the two trial windows included.
const WINDOWS: u32 = 16;

impl Effort {
    /// For a set of so many bytes. Begins with lz4, and stays with it where the set is too small for trials to pay.
    pub fn new(set_bytes: u64) -> Effort {
        let trials = set_bytes >= WINDOW_BYTES * u64::from(WINDOWS / 2);
        Effort { began: Instant::now(), window_bytes: 0, windows: 0, rates: [0.0; 2], trials }
    }
    /// So many plain bytes went by; says whether lz4 is to be tried on the next ones.
    pub fn passed(&mut self, bytes: u64) -> bool {
        self.window_bytes += bytes;
        if self.window_bytes >= WINDOW_BYTES {
            let seconds = self.began.elapsed().as_secs_f64().max(1e-9);
            self.ended(self.window_bytes as f64 / seconds);
            (self.began, self.window_bytes) = (Instant::now(), 0);
        }
        self.packs()
    }
    fn ended(&mut self, rate: f64) {
        if self.windows < 2 {
            self.rates[self.windows as usize] = rate;
        }
        self.windows = (self.windows + 1) % WINDOWS;
    }
    fn packs(&self) -> bool {
        match self.windows {
            _ if !self.trials => true,
            0 => true,
            1 => false,
            _ => self.rates[0] >= self.rates[1],
        }
    }
}

/// Whether captured writes are worth lz4: tried on all while it pays, on one run in sixteen while it does not.
#[derive(Default)]
pub struct Thrift {
    plain_bytes: u64,
    stored_bytes: u64,
    passed: u32,
}

/// Judged on so many plain bytes.
const THRIFT_BYTES: u64 = 1 << 20;

impl Thrift {
    /// Whether lz4 is to be tried on the next run.
    pub fn tries(&mut self) -> bool {
        self.passed += 1;
        // Less than one byte in sixteen saved is not worth the work.
        let pays = self.plain_bytes < THRIFT_BYTES / 4 || self.stored_bytes * 16 < self.plain_bytes * 15;
        pays || self.passed.is_multiple_of(16)
    }
    /// So many bytes became so many.
    pub fn tried(&mut self, plain_bytes: u64, stored_bytes: u64) {
        self.plain_bytes += plain_bytes;
        self.stored_bytes += stored_bytes;
        if self.plain_bytes > THRIFT_BYTES {
            // The newest counts most.
            self.plain_bytes /= 2;
            self.stored_bytes /= 2;
        }
    }
}

/// Builds pieces of payload.
pub struct Encoder {
    piece: Vec<u8>,
    /// Whether lz4 is tried.
    pub packs: bool,
    digests: Vec<u8>,
    taken_bytes: u64,
    /// What the pieces so far carry.
    pub sent: Sent,
}

impl Default for Encoder {
    fn default() -> Self {
        Encoder { piece: Vec::new(), packs: true, digests: Vec::new(), taken_bytes: 0, sent: Sent::default() }
    }
}

impl Encoder {
    /// Adds a run of a volume (at most `reader::RUN_BLOCKS` blocks); a full piece comes back.
    /// Error: `DISK_FULL` when the digest map has no room.
    pub fn add(&mut self, volume: u16, run: BlockRun, bytes: &[u8], known: &mut Known) -> Res<Option<Vec<u8>>> {
        self.digests.clear();
        let (mut from, mut at) = (None, 0u64);
        let blocks = bytes.chunks(BLOCK_BYTES as usize);
        for block in blocks {
            let digest = BlockDigest::of(block);
            let same = known.get(run.start + at) == digest;
            match (same, from) {
                (false, None) => from = Some(at),
                (true, Some(start)) => {
                    self.record(volume, run, start..at, bytes, known)?;
                    from = None;
                }
                _ => {}
            }
            if !same {
                self.digests.extend_from_slice(&digest.0);
            }
            at += 1;
        }
        if let Some(start) = from {
            self.record(volume, run, start..at, bytes, known)?;
        }
        Ok((self.piece.len() >= PIECE_BYTES).then(|| self.take()))
    }

    fn record(&mut self, volume: u16, run: BlockRun, part: std::ops::Range<u64>, bytes: &[u8], known: &mut Known) -> Res<()> {
        let part_run = BlockRun { start: run.start + part.start, count: part.end - part.start };
        let plain = &bytes[(part.start * BLOCK_BYTES) as usize..bytes.len().min((part.end * BLOCK_BYTES) as usize)];
        // Forgotten before it is sent: if we die between the standby's commit and the receipt, an old digest must not make a
        // later write of the old content look like "the standby holds it already".
        known.forget(part_run)?;
        match self.packs {
            true => delta::encode(volume, part_run, plain, &mut self.piece),
            false => delta::encode_unpacked(volume, part_run, plain, &mut self.piece),
        }
        self.sent.note(volume, part_run, &self.digests);
        self.digests.clear();
        Ok(())
    }

    /// Adds single sectors of a block, of which nothing else is known; a full piece comes back. Error: `DISK_FULL`.
    pub fn add_sectors(&mut self, volume: u16, first: u64, bytes: &[u8], known: &mut Known) -> Res<Option<Vec<u8>>> {
        let at = ByteRun { offset: first * delta::SECTOR_BYTES, len: bytes.len() as u64 };
        let start = at.offset / BLOCK_BYTES;
        // What the whole block is on the standby is unknown from here on, until it is sent whole.
        let run = BlockRun { start, count: at.end().div_ceil(BLOCK_BYTES) - start };
        known.forget(run)?;
        self.sent.parts.push((volume, run));
        delta::encode_sectors(volume, first, bytes, self.packs, &mut self.piece);
        Ok((self.piece.len() >= PIECE_BYTES).then(|| self.take()))
    }

    /// Bytes of all pieces so far.
    pub fn stored_bytes(&self) -> u64 {
        self.taken_bytes + self.piece.len() as u64
    }

    /// The last piece; empty when nothing is left.
    pub fn take(&mut self) -> Vec<u8> {
        self.taken_bytes += self.piece.len() as u64;
        std::mem::replace(&mut self.piece, Vec::with_capacity(PIECE_BYTES + (64 << 10)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Digest, FileSystem, Uuid, VolumeSpec};

    #[test]
    fn the_faster_way_is_kept_and_both_are_tried_again() {
        for (packed, plain) in [(5.0, 9.0), (9.0, 5.0)] {
            let mut effort = Effort::new(1 << 30);
            let mut seen = Vec::new();
            for _ in 0..2 * WINDOWS {
                seen.push(effort.packs());
                effort.ended(if effort.packs() { packed } else { plain });
            }
            let better = packed > plain;
            for round in seen.chunks(WINDOWS as usize) {
                assert_eq!(round[..2], [true, false]);
                assert!(round[2..].iter().all(|packs| *packs == better));
            }
        }
        assert!(Effort::new(80 << 20).passed(80 << 20), "a small set is not worth a trial");
    }

    #[test]
    fn only_what_differs_is_sent_and_believed_only_after_the_receipt() {
        let dir = tempfile::tempdir().unwrap();
        let (mut known, _) = Known::open(&dir.path().join("known"), 64, Digest([1; 32])).unwrap();
        let mut bytes = vec![0u8; 8 * 4096];
        for block in [1usize, 2, 5] {
            bytes[block * 4096] = 9;
        }
        let run = BlockRun { start: 8, count: 8 };
        let mut encoder = Encoder::default();
        assert!(encoder.add(0, run, &bytes, &mut known).unwrap().is_none());
        let spec = VolumeSpec {
            id: Uuid([0; 16]),
            name: "v".into(),
            size_bytes: 64 * 4096,
            fs: FileSystem::Ext4,
            mount_options: String::new(),
        };
        let piece = encoder.take();
        let (mut at, mut runs) = (0, Vec::new());
        while let Some(head) = delta::head(&piece[at..], std::slice::from_ref(&spec)).unwrap() {
            runs.push(head.block_run());
            at += delta::RECORD_HEADER_BYTES + head.stored_bytes as usize;
        }
        // Zero blocks are known to be there (a new replica is zero); the others go in two runs.
        assert_eq!(runs, vec![BlockRun { start: 9, count: 2 }, BlockRun { start: 13, count: 1 }]);
        assert_eq!(known.get(9), BlockDigest::UNKNOWN);
        let mut maps = [known];
        std::mem::take(&mut encoder.sent).believe(&mut maps).unwrap();
        let [mut known] = maps;
        encoder.add(0, run, &bytes, &mut known).unwrap();
        assert!(encoder.take().is_empty(), "everything is there now");
        bytes[4096] = 8;
        encoder.add(0, run, &bytes, &mut known).unwrap();
        assert!(!encoder.take().is_empty());
    }

    #[test]
    fn of_a_block_sent_twice_an_old_digest_never_counts_even_beyond_the_bound() {
        let dir = tempfile::tempdir().unwrap();
        let (mut known, _) = Known::open(&dir.path().join("known"), 2 << 20, Digest([1; 32])).unwrap();
        let (mut first, mut second) = (Sent::default(), Sent::default());
        let one = BlockRun { start: (1 << 20) + 7, count: 1 };
        known.forget(one).unwrap();
        known.forget(BlockRun { start: 0, count: 1 << 20 }).unwrap();
        first.note(0, one, &[1; 16]);
        first.note(0, BlockRun { start: 3, count: 1 }, &[5; 16]);
        // The second round is large: what it says of the block comes after its bound.
        for start in (0..1 << 20).step_by(64) {
            second.note(0, BlockRun { start, count: 64 }, &[2; 64 * 16]);
        }
        second.note(0, one, &[3; 16]);
        first.append(second);
        assert!(first.digests.len() <= REMEMBERED_BLOCKS_MAX * 16, "the bound is that of all rounds together");
        let mut maps = [known];
        first.believe(&mut maps).unwrap();
        assert_eq!(maps[0].get(one.start), BlockDigest::UNKNOWN, "the standby holds digest 3, not 1");
        assert_ne!(maps[0].get(3), BlockDigest([5; 16]), "the standby holds digest 2, not 5");
    }
}
