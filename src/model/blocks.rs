//! Block arithmetic: the 4 KiB block, runs of blocks, and sets of them that cost what is in them.

use std::collections::btree_map::{self, BTreeMap, Entry};

/// Size of the unit of tracking, in bytes.
pub const BLOCK_BYTES: u64 = 4096;

/// A run of whole blocks: `start` is a block index, `count` a number of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockRun {
    /// Index of the first block.
    pub start: u64,
    /// Number of blocks, at least 1 in every run that a set hands out.
    pub count: u64,
}

impl BlockRun {
    /// The bytes of the run, cut off at `size_bytes` (the last block of a device may be short).
    pub fn bytes(self, size_bytes: u64) -> ByteRun {
        let offset = self.start * BLOCK_BYTES;
        let end = (offset + self.count * BLOCK_BYTES).min(size_bytes);
        ByteRun { offset, len: end.saturating_sub(offset) }
    }
    /// Index one past the last block.
    pub fn end(self) -> u64 {
        self.start + self.count
    }
}

/// A run of bytes on a device: offset and length, both in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteRun {
    /// Offset from the start of the device, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

impl ByteRun {
    /// Offset one past the last byte.
    pub fn end(self) -> u64 {
        self.offset + self.len
    }
    /// Whether the two runs share a byte.
    pub fn overlaps(self, other: ByteRun) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }
}

/// Words of 64 blocks in a chunk of a set.
const CHUNK_WORDS: u64 = 64;
/// Blocks in a chunk: 16 MiB of the device.
const CHUNK_BLOCKS: u64 = CHUNK_WORDS * 64;

/// The part of a set that lies in one chunk of the device. A chunk without a block is not kept, one with every block is `Full`:
/// so equal sets are equal values.
#[derive(Clone, PartialEq, Eq)]
enum Chunk {
    /// Every block, without memory for them.
    Full,
    /// Some blocks, one bit each (bit 0 = lowest index).
    Bits(Box<[u64; CHUNK_WORDS as usize]>),
}

impl Chunk {
    fn empty() -> Chunk {
        Chunk::Bits(Box::new([0; CHUNK_WORDS as usize]))
    }
    fn word(&self, at: u64) -> u64 {
        match self {
            Chunk::Full => u64::MAX,
            Chunk::Bits(words) => words[at as usize],
        }
    }
    fn count(&self) -> u64 {
        match self {
            Chunk::Full => CHUNK_BLOCKS,
            Chunk::Bits(words) => words.iter().map(|word| u64::from(word.count_ones())).sum(),
        }
    }
    /// The words, given memory of their own if they had none.
    fn words_mut(&mut self) -> &mut [u64; CHUNK_WORDS as usize] {
        if let Chunk::Full = self {
            *self = Chunk::Bits(Box::new([u64::MAX; CHUNK_WORDS as usize]));
        }
        match self {
            Chunk::Bits(words) => words,
            Chunk::Full => unreachable!("it was given words above"),
        }
    }
    /// After bits were set: gives the memory of a full chunk back.
    fn settle(&mut self) {
        if matches!(self, Chunk::Bits(words) if words.iter().all(|word| *word == u64::MAX)) {
            *self = Chunk::Full;
        }
    }
    fn is_empty(&self) -> bool {
        matches!(self, Chunk::Bits(words) if words.iter().all(|word| *word == 0))
    }
    /// The first block at or after `from` that is in the chunk; both count from the chunk's start.
    fn next_set(&self, from: u64) -> Option<u64> {
        let mut at = from / 64;
        let mut word = (at < CHUNK_WORDS).then(|| self.word(at) & u64::MAX << (from % 64))?;
        while word == 0 {
            at += 1;
            word = (at < CHUNK_WORDS).then(|| self.word(at))?;
        }
        Some(at * 64 + u64::from(word.trailing_zeros()))
    }
    /// The first block at or after `from` that is not in the chunk, or the chunk's end.
    fn next_clear(&self, from: u64) -> u64 {
        let Chunk::Bits(words) = self else { return CHUNK_BLOCKS };
        let mut at = from;
        while at < CHUNK_BLOCKS {
            let ones = u64::from((words[(at / 64) as usize] >> (at % 64)).trailing_ones()).min(64 - at % 64);
            at += ones;
            if ones == 0 || !at.is_multiple_of(64) {
                break;
            }
        }
        at
    }
}

/// A set of blocks of one device, kept in chunks of 4,096 blocks.
///
/// Memory: about 550 bytes per chunk (16 MiB of the device) that has some of its blocks in the set, a few dozen bytes per chunk
/// that has all of them, nothing for the others. So does the time of everything that looks at the whole set.
#[derive(Clone, PartialEq, Eq)]
pub struct BlockSet {
    chunks: BTreeMap<u64, Chunk>,
    blocks: u64,
}

impl std::fmt::Debug for BlockSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlockSet({} of {})", self.count(), self.blocks)
    }
}

impl BlockSet {
    /// An empty set over a device of `blocks` blocks.
    pub fn empty(blocks: u64) -> Self {
        BlockSet { chunks: BTreeMap::new(), blocks }
    }
    /// The set of all `blocks` blocks.
    pub fn full(blocks: u64) -> Self {
        let mut set = Self::empty(blocks);
        set.insert(BlockRun { start: 0, count: blocks });
        set
    }
    /// Adds the blocks of consecutive bitmap words, 64 blocks a word, of which the first is word number `first`; bits past the
    /// device are ignored.
    pub fn insert_words(&mut self, first: u64, words: &[u64]) {
        let (mut at, mut rest) = (first, words);
        while !rest.is_empty() && at < self.blocks.div_ceil(64) {
            let (index, skip) = (at / CHUNK_WORDS, at % CHUNK_WORDS);
            let (here, later) = rest.split_at(rest.len().min((CHUNK_WORDS - skip) as usize));
            if here.iter().any(|word| *word != 0) && self.chunks.get(&index) != Some(&Chunk::Full) {
                let blocks = self.blocks;
                let chunk = self.chunks.entry(index).or_insert_with(Chunk::empty);
                for (mine, (theirs, number)) in chunk.words_mut()[skip as usize..].iter_mut().zip(here.iter().zip(at..)) {
                    *mine |= theirs & mask_to(blocks.saturating_sub(number * 64));
                }
                chunk.settle();
                if chunk.is_empty() {
                    self.chunks.remove(&index);
                }
            }
            at += here.len() as u64;
            rest = later;
        }
    }
    /// The bitmap words that are not zero, each with its number (64 blocks a word), ascending.
    pub fn words(&self) -> impl Iterator<Item = (u64, u64)> {
        self.chunks.iter().flat_map(|(index, chunk)| {
            (0..CHUNK_WORDS).map(move |at| (index * CHUNK_WORDS + at, chunk.word(at))).filter(|(_, word)| *word != 0)
        })
    }
    /// Number of blocks of the device.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }
    /// Number of blocks in the set.
    pub fn count(&self) -> u64 {
        self.chunks.values().map(Chunk::count).sum()
    }
    /// Whether no block is in the set.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }
    /// Whether `block` is in the set; blocks past the device are not.
    pub fn contains(&self, block: u64) -> bool {
        let chunk = self.chunks.get(&(block / CHUNK_BLOCKS));
        chunk.is_some_and(|chunk| chunk.word(block % CHUNK_BLOCKS / 64) >> (block % 64) & 1 == 1)
    }
    /// Adds a run; what lies past the device is ignored.
    pub fn insert(&mut self, run: BlockRun) {
        for (index, from, to) in self.parts(run) {
            if to - from == CHUNK_BLOCKS {
                self.chunks.insert(index, Chunk::Full);
                continue;
            }
            let chunk = self.chunks.entry(index).or_insert_with(Chunk::empty);
            if let Chunk::Bits(words) = chunk {
                each_mask(from, to, |at, mask| words[at] |= mask);
                chunk.settle();
            }
        }
    }
    /// Removes a run; what lies past the device is ignored.
    pub fn remove(&mut self, run: BlockRun) {
        for (index, from, to) in self.parts(run) {
            if let Entry::Occupied(mut chunk) = self.chunks.entry(index) {
                if to - from < CHUNK_BLOCKS {
                    let words = chunk.get_mut().words_mut();
                    each_mask(from, to, |at, mask| words[at] &= !mask);
                }
                if to - from == CHUNK_BLOCKS || chunk.get().is_empty() {
                    chunk.remove();
                }
            }
        }
    }
    /// The parts of a run, each with its chunk's number and its bounds in that chunk.
    fn parts(&self, run: BlockRun) -> impl Iterator<Item = (u64, u64, u64)> + use<> {
        let end = run.start.saturating_add(run.count).min(self.blocks);
        let chunks = if run.start < end { run.start / CHUNK_BLOCKS..end.div_ceil(CHUNK_BLOCKS) } else { 0..0 };
        chunks.map(move |index| {
            let base = index * CHUNK_BLOCKS;
            (index, run.start.max(base) - base, (end - base).min(CHUNK_BLOCKS))
        })
    }
    /// Adds every block of `other`, which must be of the same device size.
    pub fn union(&mut self, other: &BlockSet) {
        assert_eq!(self.blocks, other.blocks, "union of sets over devices of different size");
        for (index, theirs) in &other.chunks {
            match (self.chunks.entry(*index), theirs) {
                (Entry::Vacant(free), _) => drop(free.insert(theirs.clone())),
                (Entry::Occupied(mut mine), Chunk::Full) => drop(mine.insert(Chunk::Full)),
                (Entry::Occupied(mut mine), Chunk::Bits(theirs)) => {
                    if let Chunk::Bits(words) = mine.get_mut() {
                        words.iter_mut().zip(theirs.iter()).for_each(|(mine, theirs)| *mine |= theirs);
                        mine.get_mut().settle();
                    }
                }
            }
        }
    }
    /// Removes every block of `other`, which must be of the same device size.
    pub fn subtract(&mut self, other: &BlockSet) {
        assert_eq!(self.blocks, other.blocks, "difference of sets over devices of different size");
        self.chunks.retain(|index, mine| match other.chunks.get(index) {
            None => true,
            Some(Chunk::Full) => false,
            Some(Chunk::Bits(theirs)) => {
                mine.words_mut().iter_mut().zip(theirs.iter()).for_each(|(mine, theirs)| *mine &= !theirs);
                !mine.is_empty()
            }
        });
    }
    /// Whether the two sets share a block.
    pub fn intersects(&self, other: &BlockSet) -> bool {
        let share = |(index, mine): (&u64, &Chunk)| {
            other.chunks.get(index).is_some_and(|theirs| (0..CHUNK_WORDS).any(|at| mine.word(at) & theirs.word(at) != 0))
        };
        self.chunks.iter().any(share)
    }
    /// The runs of the set in ascending order, each at most `max_blocks` long (at least 1).
    pub fn runs(&self, max_blocks: u64) -> Runs<'_> {
        let mut chunks = self.chunks.iter();
        Runs { here: chunks.next(), chunks, at: 0, max: max_blocks.max(1) }
    }
}

/// A word with the lowest `bits` bits, all of them from 64 on.
fn mask_to(bits: u64) -> u64 {
    if bits < 64 { (1 << bits) - 1 } else { u64::MAX }
}

/// The words that `from..to` touches, each with the bits that lie in it.
fn each_mask(from: u64, to: u64, mut each: impl FnMut(usize, u64)) {
    let mut at = from;
    while at < to {
        let bits = (64 - at % 64).min(to - at);
        each((at / 64) as usize, mask_to(bits) << (at % 64));
        at += bits;
    }
}

/// Iterator over the runs of a [`BlockSet`].
pub struct Runs<'a> {
    here: Option<(&'a u64, &'a Chunk)>,
    chunks: btree_map::Iter<'a, u64, Chunk>,
    /// Where to go on, a block index.
    at: u64,
    max: u64,
}

impl Iterator for Runs<'_> {
    type Item = BlockRun;
    fn next(&mut self) -> Option<BlockRun> {
        let start = loop {
            let (index, chunk) = self.here?;
            let base = index * CHUNK_BLOCKS;
            match chunk.next_set(self.at.saturating_sub(base)) {
                Some(at) => break base + at,
                None => self.here = self.chunks.next(),
            }
        };
        let limit = start.saturating_add(self.max);
        let mut end = start;
        while let Some((index, chunk)) = self.here {
            let base = index * CHUNK_BLOCKS;
            if base > end || end >= limit {
                break;
            }
            let clear = chunk.next_clear(end - base);
            end = base + clear;
            if clear < CHUNK_BLOCKS || end > limit {
                break;
            }
            self.here = self.chunks.next();
        }
        end = end.min(limit);
        self.at = end;
        Some(BlockRun { start, count: end - start })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// Sizes around a word, a chunk and several.
    fn sizes() -> impl Strategy<Value = u64> {
        prop_oneof![1u64..400, CHUNK_BLOCKS - 2..CHUNK_BLOCKS + 70, CHUNK_BLOCKS * 3 - 70..CHUNK_BLOCKS * 3 + 2]
    }

    fn built(blocks: u64, ops: &[(bool, u64, u64)]) -> (BlockSet, BTreeSet<u64>) {
        let (mut set, mut naive) = (BlockSet::empty(blocks), BTreeSet::new());
        for (add, start, count) in ops {
            // Some of the runs reach past the device.
            let run = BlockRun { start: start % (blocks + 20), count: count % (blocks + 20) };
            for b in run.start..run.end().min(blocks) {
                if *add {
                    naive.insert(b);
                } else {
                    naive.remove(&b);
                }
            }
            if *add { set.insert(run) } else { set.remove(run) }
        }
        (set, naive)
    }

    fn members(set: &BlockSet) -> Vec<u64> {
        set.runs(u64::MAX).flat_map(|run| run.start..run.end()).collect()
    }

    proptest! {
        #[test]
        fn behaves_like_a_naive_set(blocks in sizes(), ops in prop::collection::vec((any::<bool>(), any::<u64>(), any::<u64>()), 0..12), max in prop_oneof![1u64..150, 4000u64..9000]) {
            let (set, naive) = built(blocks, &ops);
            prop_assert_eq!(set.count(), naive.len() as u64);
            prop_assert_eq!(set.is_empty(), naive.is_empty());
            prop_assert!((0..blocks + 70).all(|block| set.contains(block) == naive.contains(&block)));
            let mut seen = Vec::new();
            for run in set.runs(max) {
                prop_assert!(run.count >= 1 && run.count <= max);
                seen.extend(run.start..run.end());
            }
            prop_assert_eq!(&seen, &naive.iter().copied().collect::<Vec<_>>());
            // Without a bound, each run is as long as it can be, wherever it starts.
            let whole: Vec<BlockRun> = set.runs(u64::MAX).collect();
            prop_assert!(whole.windows(2).all(|pair| pair[0].end() < pair[1].start));
            prop_assert_eq!(whole.iter().map(|run| run.count).sum::<u64>(), set.count());
            // However a set was made, it is one value.
            let (mut again, mut by_words) = (BlockSet::empty(blocks), BlockSet::empty(blocks));
            naive.iter().for_each(|block| again.insert(BlockRun { start: *block, count: 1 }));
            prop_assert_eq!(&again, &set);
            set.words().for_each(|(at, word)| by_words.insert_words(at, &[word]));
            prop_assert_eq!(&by_words, &set);
        }

        #[test]
        fn two_sets_behave_like_two_naive_sets(blocks in sizes(), one in prop::collection::vec((any::<bool>(), any::<u64>(), any::<u64>()), 0..8),
                                               two in prop::collection::vec((any::<bool>(), any::<u64>(), any::<u64>()), 0..8)) {
            let ((a, naive_a), (b, naive_b)) = (built(blocks, &one), built(blocks, &two));
            prop_assert_eq!(a.intersects(&b), !naive_a.is_disjoint(&naive_b));
            prop_assert_eq!(a == b, naive_a == naive_b);
            let (mut more, mut less) = (a.clone(), a.clone());
            more.union(&b);
            prop_assert_eq!(members(&more), naive_a.union(&naive_b).copied().collect::<Vec<_>>());
            less.subtract(&b);
            prop_assert_eq!(members(&less), naive_a.difference(&naive_b).copied().collect::<Vec<_>>());
            more.subtract(&b);
            prop_assert_eq!(more, less);
        }

        #[test]
        fn words_land_where_they_belong(blocks in sizes(), first in 0u64..200, words in prop::collection::vec(prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 0..150)) {
            let (mut set, mut naive) = (BlockSet::empty(blocks), BTreeSet::new());
            set.insert_words(first, &words);
            for (at, word) in words.iter().enumerate() {
                let bits = (0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| (first + at as u64) * 64 + bit);
                naive.extend(bits.filter(|block| *block < blocks));
            }
            prop_assert_eq!(members(&set), naive.into_iter().collect::<Vec<_>>());
            let mut again = BlockSet::empty(blocks);
            set.runs(7).for_each(|run| again.insert(run));
            prop_assert_eq!(set, again);
        }
    }

    #[test]
    fn a_set_costs_what_is_in_it() {
        let blocks = (16u64 << 40) / BLOCK_BYTES;
        let mut set = BlockSet::empty(blocks);
        for at in 0..128 {
            set.insert(BlockRun { start: at * (blocks / 128) + 7, count: 1 });
        }
        assert_eq!((set.chunks.len(), set.count(), set.runs(64).count()), (128, 128, 128));
        set.insert(BlockRun { start: 0, count: blocks / 2 });
        let bits = set.chunks.values().filter(|chunk| matches!(chunk, Chunk::Bits(_))).count();
        assert_eq!(bits, 64, "what is there as a whole has no bits of its own");
        assert_eq!(set.runs(u64::MAX).count(), 65);
        set.remove(BlockRun { start: 0, count: blocks });
        assert!(set.chunks.is_empty());
    }

    #[test]
    fn a_full_set_is_one_run_and_ends_at_the_device() {
        for blocks in [1, 63, 64, 65, 128, 1000, 4095, 4096, 4097, 12_288, 12_289] {
            let set = BlockSet::full(blocks);
            assert_eq!(set.runs(u64::MAX).collect::<Vec<_>>(), vec![BlockRun { start: 0, count: blocks }]);
            assert!(!set.contains(blocks));
        }
    }

    #[test]
    fn the_last_run_is_cut_at_the_size_in_bytes() {
        let run = BlockRun { start: 2, count: 2 };
        assert_eq!(run.bytes(3 * 4096 + 512), ByteRun { offset: 8192, len: 4096 + 512 });
    }
}
