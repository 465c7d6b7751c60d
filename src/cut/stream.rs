//! Cuts from captured writes: no freeze, no wait, one after the other.
//!
//! Capture makes its records as writes complete, so every prefix of the ring is a prefix of an order in which the writes may have
//! happened. A cut at position P of the ring holds every write that completed before P, in order, and perhaps parts of writes
//! that were in flight at P (they were seen by a read): a state that a power cut at that moment could have left.
//!
//! A set to be read (what a checkpoint took, or a hole: "this changed, its data is not here") is read at some time between two
//! positions. What completes meanwhile has its record, and records are laid over what was read, so the cut lies at a position
//! after the read. That is the only rule: *no cut between a hole and the end of a read of its range begun after it*.

use crate::cut::batch::{Change, Gathered};
use crate::cut::{Limits, Source, check_identities, lock};
use crate::device::Engine;
use crate::model::{BLOCK_BYTES, BlockRun, BlockSet, ByteRun, Code, Fault, GroupId, Res};
use crate::reader;
use crate::tracker::{Capture, Missed, Tracker, What};
use std::sync::Mutex;
use std::time::Duration;

/// How often a cut moves on behind a read before it is given up. Each time less is left to read; only a device whose every write is a
/// hole, faster than it can be read, comes near it.
const MOVES: usize = 64;
/// How far apart a planted fault tears what belongs together.
const PLANTED_PAUSE: Duration = Duration::from_millis(3);
/// A range of zeroes larger than this is read again (its holes cost nothing) instead of being spelled out.
const ZERO_BYTES_MAX: u64 = 256 << 10;
/// Zeroes are spelled out while fewer parts of blocks than this (32 MiB of memory) were gathered; then they are read again too: 32 bytes
/// of the ring may say that 64 blocks are zero, which would let a ring of 64 MiB grow to 4 GiB while a peer is slow.
const ZERO_PARTS_MAX: usize = 1 << 20;

/// How a look for a cut ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// There is a cut: what was gathered is one instant.
    Cut,
    /// So much must be read first that it is to be shipped in a round of its own: the sets, by volume. They count as read when the
    /// caller asks for the next step.
    Large(Vec<BlockSet>),
}

/// What the stream has seen, in numbers.
#[derive(Clone, Copy, Debug, Default)]
pub struct StreamCounts {
    /// Bytes captured.
    pub captured_bytes: u64,
    /// Bytes read because their data was not in the ring.
    pub reread_bytes: u64,
    /// Holes: ranges whose data was not in the ring.
    pub holes: u64,
    /// Looks that found that something had gone by unseen.
    pub missed: u64,
}

/// The same of one volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VolumeCounts {
    /// Bytes captured.
    pub captured_bytes: u64,
    /// Bytes read because their data was not in the ring.
    pub reread_bytes: u64,
    /// Holes: ranges whose data was not in the ring.
    pub holes: u64,
}

/// One group's captured writes on their way into cuts.
pub struct Stream {
    group: GroupId,
    capture: Capture,
    gathered: Gathered,
    /// What must be read before the next cut, by volume.
    unread: Vec<BlockSet>,
    sizes: Vec<u64>,
    counts: StreamCounts,
    /// By volume.
    each: Vec<VolumeCounts>,
    /// The bitmap was flipped since it was last asked what capture missed.
    flipped: bool,
    /// A fault planted by a test.
    plant: StreamPlant,
}

/// A fault that a test plants in the order of a cut; it must then be found wrong.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StreamPlant {
    /// None.
    #[default]
    Nothing,
    /// One record in so many is dropped.
    DropRecords(u64),
    /// Two records in a row change places.
    SwapRecords,
    /// What was missed is asked for a moment before the records are walked.
    CountersFirst,
    /// The cut stays where it was before a hole was read.
    CutBeforeRead,
    /// The half is flipped in one store, and capture goes on with another one a moment later.
    TwoStores,
    /// The end of a record is left to the next cut.
    CutInsideRecord,
    /// What was gathered before a round is laid over what the round reads.
    OldOverRound,
}

impl Stream {
    /// Turns capture on and takes what is dirty: the beginning of a first cut. Errors: those of `Tracker::start_capture`,
    /// `IDENTITY_CHANGED`.
    pub fn open(tracker: &Mutex<Tracker>, group: GroupId, sources: &[Source<'_>], ring_bytes: u32) -> Res<Stream> {
        check_identities(sources)?;
        let ids: Vec<_> = sources.iter().map(|source| source.id).collect();
        let capture = lock(tracker).start_capture(group, &ids, ring_bytes)?;
        let mut stream = Stream {
            group,
            capture,
            gathered: Gathered::default(),
            unread: sources.iter().map(|s| BlockSet::empty(s.image.size_bytes().div_ceil(BLOCK_BYTES))).collect(),
            sizes: sources.iter().map(|s| s.image.size_bytes()).collect(),
            counts: StreamCounts::default(),
            each: vec![VolumeCounts::default(); sources.len()],
            flipped: true,
            plant: StreamPlant::Nothing,
        };
        match stream.read_taken(tracker, sources) {
            Ok(()) => Ok(stream),
            Err(fault) => {
                stream.close(tracker)?;
                Err(fault)
            }
        }
    }

    /// What the flip took must be read before the next cut: capture does not hold it. (What is held beside it was shipped by rounds
    /// of the same generation, or there is none.)
    fn read_taken(&mut self, tracker: &Mutex<Tracker>, sources: &[Source<'_>]) -> Res<()> {
        for (unread, source) in self.unread.iter_mut().zip(sources) {
            unread.union(&lock(tracker).taken(source.id)?);
        }
        Ok(())
    }

    /// Begins a new half of the bitmap while capture goes on. Everything that was taken is in a generation that is cut
    /// after this call. Errors of the tracker.
    pub fn flip(&mut self, tracker: &Mutex<Tracker>) -> Res<()> {
        self.flipped = true;
        match self.plant {
            StreamPlant::TwoStores => lock(tracker).flip_in_two_stores(self.group, PLANTED_PAUSE),
            _ => lock(tracker).flip(self.group),
        }
    }

    /// Looks for a cut.
    ///
    /// 1. Identities are read. 2. P is the ring's position; the records before it are walked. 3. What must be read (by holes among
    ///    them) is read, and the look goes on from 2: P moves behind the read. 4. *Then* it is asked what capture missed;
    ///    whatever it was must be read too, from 2. 5. Identities again. P is the cut.
    ///
    /// Errors: `IDENTITY_CHANGED`, `CUT_NOT_EXACT` when holes come faster than they can be read, those of reader and tracker.
    pub fn look(
        &mut self,
        tracker: &Mutex<Tracker>,
        sources: &[Source<'_>],
        engine: &mut dyn Engine,
        limits: Limits,
    ) -> Res<Step> {
        check_identities(sources)?;
        for _ in 0..MOVES {
            let early = (self.plant == StreamPlant::CountersFirst).then(|| self.capture.missed()).transpose()?;
            if early.is_some() {
                std::thread::sleep(PLANTED_PAUSE);
            }
            self.walk()?;
            let wanted_bytes: u64 = self.unread.iter().map(|set| set.count() * BLOCK_BYTES).sum();
            if wanted_bytes > 0 {
                if self.gathered.arena_bytes() + wanted_bytes > limits.cut_max_bytes {
                    return self.large(tracker, sources);
                }
                self.read_unread(sources, engine)?;
                if self.plant != StreamPlant::CutBeforeRead {
                    continue;
                }
            }
            let missed = match early {
                Some(missed) => missed,
                None => self.capture.missed()?,
            };
            if missed.is_empty() {
                self.flipped = false;
                check_identities(sources)?;
                return Ok(Step::Cut);
            }
            self.read_missed(tracker, sources, missed)?;
        }
        Err(Fault::new(
            Code::CutNotExact,
            "the cut",
            format!("after {MOVES} reads there was still something that capture could not copy"),
            "it is tried again by itself; a larger capture_ring or a slower writer helps",
        ))
    }

    /// What was missed must be read. Where it may be anywhere: among what is dirty since the last flip; and, the first time after a flip,
    /// among all that has no receipt, for it may have been missed before that flip.
    fn read_missed(&mut self, tracker: &Mutex<Tracker>, sources: &[Source<'_>], missed: Vec<(usize, Missed)>) -> Res<()> {
        self.counts.missed += u64::from(!missed.is_empty());
        for (index, missed) in missed {
            match missed {
                Missed::Ranges(ranges) => ranges.into_iter().for_each(|range| self.must_read(index, range)),
                Missed::Anywhere if self.flipped => self.unread[index].union(&lock(tracker).dirty(sources[index].id)?),
                Missed::Anywhere => self.unread[index].union(&lock(tracker).active(sources[index].id)?),
            }
        }
        self.flipped = false;
        Ok(())
    }

    /// There is too much to be read for this cut: it goes out in a round.
    ///
    /// The bitmap is flipped before, so that what is missed from here on is looked for among what changed from here on: otherwise each
    /// write without room in the ring would have the whole round shipped again. 1. flip 2. the records so far 3. what was missed until
    /// here 4. all of it, with what was gathered, is the round.
    fn large(&mut self, tracker: &Mutex<Tracker>, sources: &[Source<'_>]) -> Res<Step> {
        if self.plant == StreamPlant::OldOverRound {
            return Ok(Step::Large(self.all_to_read()));
        }
        self.flip(tracker)?;
        self.walk()?;
        let missed = self.capture.missed()?;
        self.read_missed(tracker, sources, missed)?;
        Ok(Step::Large(self.all_to_read()))
    }

    /// Everything that is in hand, as sets to be read. What was gathered must not be laid over a read that comes later: it may be older
    /// than a hole of the same block. So it is read too, and the ring is empty for what comes meanwhile.
    fn all_to_read(&mut self) -> Vec<BlockSet> {
        let Stream { gathered, unread, .. } = self;
        if self.plant == StreamPlant::OldOverRound {
            let fresh = unread.iter().map(|set| BlockSet::empty(set.blocks())).collect();
            return std::mem::replace(unread, fresh);
        }
        gathered.each_block(&mut |volume, block| unread[usize::from(volume)].insert(BlockRun { start: block, count: 1 }));
        gathered.clear();
        self.capture.release();
        let fresh = self.unread.iter().map(|set| BlockSet::empty(set.blocks())).collect();
        std::mem::replace(&mut self.unread, fresh)
    }

    /// Takes the records that are there.
    fn walk(&mut self) -> Res<()> {
        let Stream { capture, gathered, unread, sizes, counts, each, plant, .. } = self;
        let to = capture.produced();
        let mut records = Vec::new();
        let mut number = counts.captured_bytes;
        let mut take = |volume: usize, record: crate::tracker::Captured| {
            let range = ByteRun { offset: record.offset_bytes, len: record.len_bytes };
            let inside = range.end() <= sizes[volume].next_multiple_of(512);
            match record.what {
                What::Data(position) if inside => {
                    gathered.add_data(volume as u16, range.offset, range.len, position);
                    counts.captured_bytes += range.len;
                    each[volume].captured_bytes += range.len;
                }
                What::Zero if inside && range.len <= ZERO_BYTES_MAX && gathered.len() < ZERO_PARTS_MAX => {
                    gathered.add_zero(volume as u16, range.offset, range.len)
                }
                _ => {
                    counts.holes += 1;
                    each[volume].holes += 1;
                    insert(&mut unread[volume], range);
                }
            }
        };
        match *plant {
            StreamPlant::DropRecords(every) => capture.walk(to, &mut |volume, record| {
                number += 1;
                if number % every != 0 {
                    take(volume, record);
                }
            }),
            StreamPlant::SwapRecords => {
                capture.walk(to, &mut |volume, record| records.push((volume, record)))?;
                records.chunks_mut(2).for_each(<[_]>::reverse);
                records.into_iter().for_each(|(volume, record)| take(volume, record));
                Ok(())
            }
            StreamPlant::CutInsideRecord => capture.walk(to, &mut |volume, mut record| {
                record.len_bytes = (record.len_bytes / 2).next_multiple_of(512);
                take(volume, record);
            }),
            _ => capture.walk(to, &mut take),
        }
    }

    /// This range of a volume (by index) is read before the next cut.
    pub fn must_read(&mut self, index: usize, range: ByteRun) {
        insert(&mut self.unread[index], range);
    }

    /// Reads what must be read into memory, as it is now.
    fn read_unread(&mut self, sources: &[Source<'_>], engine: &mut dyn Engine) -> Res<()> {
        for (index, source) in sources.iter().enumerate() {
            if self.unread[index].is_empty() {
                continue;
            }
            let blocks = self.unread[index].blocks();
            let set = std::mem::replace(&mut self.unread[index], BlockSet::empty(blocks));
            let gathered = &mut self.gathered;
            let read = reader::read(engine, source.image, &set, &mut |run, bytes| {
                gathered.add_read(index as u16, run, bytes);
                Ok(())
            });
            match read {
                Ok(bytes) => {
                    self.counts.reread_bytes += bytes;
                    self.each[index].reread_bytes += bytes;
                }
                Err(fault) => {
                    // What was read stays true; what was not must still be read.
                    self.unread[index].union(&set);
                    return Err(fault);
                }
            }
        }
        Ok(())
    }

    /// Whether nothing was written since the last cut, as far as the records tell.
    pub fn is_empty(&self) -> bool {
        self.gathered.is_empty() && self.unread.iter().all(BlockSet::is_empty) && self.capture.produced() == self.capture.walked()
    }

    /// Hands out what the cut holds: the last write to each sector, volume by volume in ascending order; then the ring's room is given
    /// back. After [`Step::Cut`] only. Gives the number of blocks. Errors are the sink's; then nothing is given back, and the next
    /// look goes on from here.
    pub fn emit(&mut self, sink: &mut dyn FnMut(u16, Change<'_>) -> Res<()>) -> Res<u64> {
        let Stream { capture, gathered, sizes, .. } = self;
        let capture_ref: &Capture = capture;
        let blocks = gathered.emit(&|position, len| capture_ref.bytes(position, len), sizes, sink)?;
        self.gathered.clear();
        self.capture.release();
        Ok(blocks)
    }

    /// The end of the ring and its witnesses.
    pub fn capture(&self) -> &Capture {
        &self.capture
    }
    /// What was seen so far.
    pub fn counts(&self) -> StreamCounts {
        self.counts
    }
    /// What was seen of one volume (by index) so far.
    pub fn volume_counts(&self, index: usize) -> VolumeCounts {
        self.each[index]
    }
    /// Parts of blocks gathered for the next cut.
    pub fn gathered(&self) -> usize {
        self.gathered.len()
    }
    /// Plants a fault. For tests.
    #[doc(hidden)]
    pub fn plant(&mut self, plant: StreamPlant) {
        self.plant = plant;
    }
    /// Ends capture. Bits stay as they are.
    pub fn close(self, tracker: &Mutex<Tracker>) -> Res<()> {
        lock(tracker).stop_capture(self.group)
    }
}

/// Inserts the blocks that a range touches, within the volume.
fn insert(set: &mut BlockSet, range: ByteRun) {
    let (first, end) = (range.offset / BLOCK_BYTES, range.end().div_ceil(BLOCK_BYTES).min(set.blocks()));
    if first < end {
        set.insert(BlockRun { start: first, count: end - first });
    }
}
