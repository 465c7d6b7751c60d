//! Block arithmetic: the 4 KiB block, runs of blocks, and sets of them as a dense bitmap.

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

/// A set of blocks of one device, one bit a block, 64 blocks a word (bit 0 = lowest index).
///
/// Memory: one bit per block of the device (32 MiB per TiB), zero pages until touched.
#[derive(Clone, PartialEq, Eq)]
pub struct BlockSet {
    words: Vec<u64>,
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
        BlockSet { words: vec![0; blocks.div_ceil(64) as usize], blocks }
    }
    /// The set of all `blocks` blocks.
    pub fn full(blocks: u64) -> Self {
        let mut set = Self::empty(blocks);
        set.insert(BlockRun { start: 0, count: blocks });
        set
    }
    /// Builds a set from bitmap words; bits at or past `blocks` are dropped.
    pub fn from_words(mut words: Vec<u64>, blocks: u64) -> Self {
        words.resize(blocks.div_ceil(64) as usize, 0);
        if !blocks.is_multiple_of(64)
            && let Some(last) = words.last_mut()
        {
            *last &= (1u64 << (blocks % 64)) - 1;
        }
        BlockSet { words, blocks }
    }
    /// The bitmap words.
    pub fn words(&self) -> &[u64] {
        &self.words
    }
    /// Number of blocks of the device.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }
    /// Number of blocks in the set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }
    /// Whether no block is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|w| *w == 0)
    }
    /// Whether `block` is in the set; blocks past the device are not.
    pub fn contains(&self, block: u64) -> bool {
        block < self.blocks && self.words[(block / 64) as usize] >> (block % 64) & 1 == 1
    }
    /// Adds a run; what lies past the device is ignored.
    pub fn insert(&mut self, run: BlockRun) {
        self.each_word(run, |word, mask| *word |= mask);
    }
    /// Removes a run; what lies past the device is ignored.
    pub fn remove(&mut self, run: BlockRun) {
        self.each_word(run, |word, mask| *word &= !mask);
    }
    fn each_word(&mut self, run: BlockRun, mut change: impl FnMut(&mut u64, u64)) {
        let end = run.start.saturating_add(run.count).min(self.blocks);
        let mut at = run.start;
        while at < end {
            let in_word = (64 - at % 64).min(end - at);
            let mask = if in_word == 64 { u64::MAX } else { ((1u64 << in_word) - 1) << (at % 64) };
            change(&mut self.words[(at / 64) as usize], mask);
            at += in_word;
        }
    }
    /// Adds every block of `other`, which must be of the same device size.
    pub fn union(&mut self, other: &BlockSet) {
        assert_eq!(self.blocks, other.blocks, "union of sets over devices of different size");
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
    }
    /// Removes every block of `other`, which must be of the same device size.
    pub fn subtract(&mut self, other: &BlockSet) {
        assert_eq!(self.blocks, other.blocks, "difference of sets over devices of different size");
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine &= !theirs;
        }
    }
    /// Whether the two sets share a block.
    pub fn intersects(&self, other: &BlockSet) -> bool {
        self.words.iter().zip(&other.words).any(|(a, b)| a & b != 0)
    }
    /// The runs of the set in ascending order, each at most `max_blocks` long (at least 1).
    pub fn runs(&self, max_blocks: u64) -> Runs<'_> {
        Runs { set: self, at: 0, max: max_blocks.max(1) }
    }
}

/// Iterator over the runs of a [`BlockSet`].
pub struct Runs<'a> {
    set: &'a BlockSet,
    at: u64,
    max: u64,
}

impl Iterator for Runs<'_> {
    type Item = BlockRun;
    fn next(&mut self) -> Option<BlockRun> {
        let words = &self.set.words;
        let mut index = (self.at / 64) as usize;
        if index >= words.len() {
            return None;
        }
        let mut word = words[index] & (u64::MAX << (self.at % 64));
        while word == 0 {
            index += 1;
            word = *words.get(index)?;
        }
        let start = index as u64 * 64 + u64::from(word.trailing_zeros());
        let mut end = start;
        while end - start < self.max && end < self.set.blocks {
            let rest = words[(end / 64) as usize] >> (end % 64);
            let ones = u64::from(rest.trailing_ones()).min(64 - end % 64);
            end += ones;
            if ones == 0 || !end.is_multiple_of(64) {
                break;
            }
        }
        end = end.min(start.saturating_add(self.max));
        self.at = end;
        Some(BlockRun { start, count: end - start })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_like_a_naive_set(blocks in 1u64..400, ops in prop::collection::vec((any::<bool>(), 0u64..420, 0u64..200), 0..20), max in 1u64..150) {
            let (mut set, mut naive) = (BlockSet::empty(blocks), BTreeSet::new());
            for (add, start, count) in ops {
                let run = BlockRun { start, count };
                for b in start..(start + count).min(blocks) {
                    if add { naive.insert(b); } else { naive.remove(&b); }
                }
                if add { set.insert(run) } else { set.remove(run) }
            }
            prop_assert_eq!(set.count(), naive.len() as u64);
            let mut seen = Vec::new();
            for run in set.runs(max) {
                prop_assert!(run.count >= 1 && run.count <= max);
                seen.extend(run.start..run.end());
            }
            prop_assert_eq!(seen, naive.into_iter().collect::<Vec<_>>());
            // Without a bound, each run is as long as it can be, wherever it starts.
            let whole: Vec<BlockRun> = set.runs(u64::MAX).collect();
            prop_assert!(whole.windows(2).all(|pair| pair[0].end() < pair[1].start));
            prop_assert_eq!(whole.iter().map(|run| run.count).sum::<u64>(), set.count());
            prop_assert_eq!(BlockSet::from_words(set.words().to_vec(), blocks), set);
        }
    }

    #[test]
    fn a_full_set_is_one_run_and_ends_at_the_device() {
        for blocks in [1, 63, 64, 65, 128, 1000] {
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
