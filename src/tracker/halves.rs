//! The bits of one volume: two halves of a bitmap, what is held, and their summaries, shared with the programs through one mapping.
//!
//! Layout, in words of 64 bits, the same in `bitmap.bpf.c`:
//! `[half 0: words][half 1: words][held: words][half 0: summary][half 1: summary][held: summary]`. A summary bit stands for a page of 512 words;
//! whoever sets a bit has set its summary bit before. So an idle volume is scanned in a word, and a half may be cleared
//! page by page, the summary last.
//!
//! A volume of up to [`FLAT_BLOCKS`] blocks has a bit in `words` for each block. A larger one has a bit for each range of
//! blocks there (the coarse level), the blocks' bits in leaves (see `leaves`), and three more regions in the mapping:
//! `[half 0: words][half 1: words][held: words]`, the ranges that are dirty as a whole. Orders, so that a death between any two steps loses nothing:
//!
//! - To set: 1 summary, 2 coarse bit, 3 leaf or whole bit.
//! - To clear (a region that no program writes): 1 leaves, 2 whole bits, 3 coarse bits, 4 summary.

use crate::model::{BlockRun, BlockSet, Res};
use crate::tracker::leaves::{LEAF_BLOCKS, LEAF_WORDS, Leaf, LeafStore};
use memmap2::MmapMut;
use std::sync::atomic::{AtomicU64, Ordering};

/// Number of halves; the phase word modulo this number is the active one.
pub(super) const HALVES: u64 = 2;
/// The region beside the halves, which no program writes: what earlier flips took without a receipt.
pub(super) const HELD: u64 = 2;
/// Halves and the held region.
pub(super) const REGIONS: u64 = 3;
/// Words of the bitmap for which one summary bit stands.
const PAGE_WORDS: u64 = 512;
/// Largest volume whose blocks' bits are not in leaves, in blocks: 512 MiB of the device, 48 KiB of bits.
const FLAT_BLOCKS: u64 = 1 << 17;
/// Leaves that are handed on at once.
const LEAVES_AT_ONCE: usize = 128;

/// How the bits of a volume lie in its mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// Blocks of the volume.
    pub blocks: u64,
    /// Words of one region: a bit for a block, or for a range.
    pub words: u64,
    /// Words of the summary of one region.
    pub summary_words: u64,
    /// The blocks' bits are in leaves, a bit in `words` stands for a range.
    pub sparse: bool,
}

impl Shape {
    /// The shape for a volume of `blocks` blocks.
    pub(super) fn of(blocks: u64) -> Shape {
        let sparse = blocks > FLAT_BLOCKS;
        let words = if sparse { blocks.div_ceil(LEAF_BLOCKS) } else { blocks }.div_ceil(64);
        Shape { blocks, words, summary_words: words.div_ceil(PAGE_WORDS).div_ceil(64), sparse }
    }
    /// Words of the whole mapping.
    pub(super) fn map_words(self) -> u64 {
        REGIONS * (self.words * (1 + u64::from(self.sparse)) + self.summary_words)
    }
    fn run_of(self, range: u32) -> BlockRun {
        let start = u64::from(range) * LEAF_BLOCKS;
        BlockRun { start, count: LEAF_BLOCKS.min(self.blocks.saturating_sub(start)) }
    }
}

/// A mapping of words that kernel programs write at the same time.
pub(super) struct Words {
    map: MmapMut,
}

impl Words {
    /// Takes a mapping of a BPF array (page-aligned by nature).
    pub(super) fn new(map: MmapMut) -> Words {
        Words { map }
    }
    /// All words of the mapping.
    pub(super) fn all(&self) -> &[AtomicU64] {
        let (start, len) = (self.map.as_ptr().cast::<AtomicU64>(), self.map.len() / 8);
        // SAFETY: the mapping is page-aligned, `len * 8` bytes long, lives as long as `self` and, being shared with
        // kernel programs, is only ever touched through atomics; AtomicU64 has the layout of u64.
        unsafe { std::slice::from_raw_parts(start, len) }
    }
}

/// All bits of one volume.
pub(super) struct Halves {
    shared: Words,
    shape: Shape,
    /// For a volume that is `sparse`.
    leaves: Option<Box<dyn LeafStore + Send>>,
}

impl Halves {
    /// The bits over `shared`, which holds at least the shape's words; `leaves` exactly when the shape is sparse.
    pub(super) fn new(shared: Words, shape: Shape, leaves: Option<Box<dyn LeafStore + Send>>) -> Halves {
        assert!(shared.all().len() as u64 >= shape.map_words(), "the map is shorter than its volume");
        assert_eq!(leaves.is_some(), shape.sparse, "leaves belong to large volumes");
        Halves { shared, shape, leaves }
    }
    /// Number of blocks of the volume.
    pub(super) fn blocks(&self) -> u64 {
        self.shape.blocks
    }
    fn region_at(&self, start: u64, words: u64) -> &[AtomicU64] {
        &self.shared.all()[start as usize..(start + words) as usize]
    }
    /// One bit for each block, or for each range of a volume with leaves.
    fn bits(&self, region: u64) -> &[AtomicU64] {
        self.region_at(region * self.shape.words, self.shape.words)
    }
    fn summary(&self, region: u64) -> &[AtomicU64] {
        self.region_at(REGIONS * self.shape.words + region * self.shape.summary_words, self.shape.summary_words)
    }
    /// One bit for each range that is dirty as a whole, of a volume with leaves.
    fn whole(&self, region: u64) -> &[AtomicU64] {
        let start = REGIONS * (self.shape.words + self.shape.summary_words) + region * self.shape.words;
        self.region_at(start, self.shape.words)
    }
    /// The word indices of each page that may hold a bit in any of `regions`, ascending.
    fn pages(&self, regions: &[u64]) -> impl Iterator<Item = std::ops::Range<usize>> {
        let summaries: Vec<&[AtomicU64]> = regions.iter().map(|region| self.summary(*region)).collect();
        let words = self.shape.words;
        (0..self.shape.summary_words).flat_map(move |index| {
            let mut rest = summaries.iter().fold(0, |all, summary| all | summary[index as usize].load(Ordering::Relaxed));
            std::iter::from_fn(move || {
                let bit = u64::from(rest.trailing_zeros());
                rest &= rest.checked_sub(1)?;
                let start = (index * 64 + bit) * PAGE_WORDS;
                Some(start.min(words) as usize..(start + PAGE_WORDS).min(words) as usize)
            })
        })
    }
    /// Whether a region has no bit, as far as its summary says. False when in doubt.
    fn is_idle(&self, region: u64) -> bool {
        self.summary(region).iter().all(|word| word.load(Ordering::Relaxed) == 0)
    }
    /// What the levels above the leaves say about the ranges of a region: each that may have a bit.
    fn coarse(&self, region: u64) -> Coarse {
        let (bits, whole) = (self.bits(region), self.whole(region));
        let mut coarse = Coarse::default();
        for at in self.pages(&[region]).flatten() {
            let word = bits[at].load(Ordering::Relaxed);
            let all = if word == 0 { 0 } else { whole[at].load(Ordering::Relaxed) };
            let mut rest = word;
            while rest != 0 {
                let bit = rest.trailing_zeros();
                let to = if all >> bit & 1 == 1 { &mut coarse.whole } else { &mut coarse.in_leaves };
                to.push(at as u32 * 64 + bit);
                rest &= rest - 1;
            }
        }
        coarse
    }
    /// The blocks of one region.
    pub(super) fn set_of(&self, region: u64) -> Res<BlockSet> {
        let mut set = BlockSet::empty(self.shape.blocks);
        self.add_to(&mut set, region)?;
        Ok(set)
    }
    fn add_to(&self, set: &mut BlockSet, region: u64) -> Res<()> {
        let Some(leaves) = &self.leaves else {
            let bits = self.bits(region);
            let mut page = Vec::with_capacity(PAGE_WORDS as usize);
            for range in self.pages(&[region]) {
                page.clear();
                page.extend(bits[range.clone()].iter().map(|word| word.load(Ordering::Relaxed)));
                set.insert_words(range.start as u64, &page);
            }
            return Ok(());
        };
        let coarse = self.coarse(region);
        coarse.whole.iter().for_each(|range| set.insert(self.shape.run_of(*range)));
        leaves.read(region, &coarse.in_leaves, &mut |range, leaf| set.insert_words(u64::from(range) * LEAF_WORDS, leaf))
    }
    /// The blocks that are in at least one region.
    pub(super) fn set_of_any(&self) -> Res<BlockSet> {
        let mut set = BlockSet::empty(self.shape.blocks);
        (0..REGIONS).try_for_each(|region| self.add_to(&mut set, region))?;
        Ok(set)
    }
    /// Number of blocks that are in at least one region.
    pub(super) fn count_in_any(&self) -> Res<u64> {
        let busy: Vec<u64> = (0..REGIONS).filter(|region| !self.is_idle(*region)).collect();
        if let [] | [_] = busy[..] {
            return busy.first().map_or(Ok(0), |region| self.count(*region));
        }
        if self.shape.sparse {
            return Ok(self.set_of_any()?.count());
        }
        let regions: Vec<&[AtomicU64]> = busy.iter().map(|region| self.bits(*region)).collect();
        let union = |at: usize| regions.iter().fold(0, |all, bits| all | bits[at].load(Ordering::Relaxed));
        Ok(self.pages(&busy).flatten().map(|at| u64::from(union(at).count_ones())).sum())
    }
    /// Number of blocks in one region.
    pub(super) fn count(&self, region: u64) -> Res<u64> {
        let Some(leaves) = &self.leaves else {
            let bits = self.bits(region);
            let ones = |at: usize| u64::from(bits[at].load(Ordering::Relaxed).count_ones());
            return Ok(self.pages(&[region]).flatten().map(ones).sum());
        };
        let coarse = self.coarse(region);
        let mut count: u64 = coarse.whole.iter().map(|range| self.shape.run_of(*range).count).sum();
        leaves.read(region, &coarse.in_leaves, &mut |_, leaf| count += ones_in(leaf))?;
        Ok(count)
    }
    /// Sets every bit of region `from` in region `to` too. `from` stays as it is.
    pub(super) fn give_back(&self, from: u64, to: u64) -> Res<()> {
        let Some(leaves) = &self.leaves else {
            let bits = self.bits(from);
            for at in self.pages(&[from]).flatten() {
                self.set_word(to, at as u64, bits[at].load(Ordering::Relaxed));
            }
            return Ok(());
        };
        let coarse = self.coarse(from);
        coarse.whole.iter().for_each(|range| self.set_whole(to, *range));
        let mut ready = Vec::new();
        leaves.read(from, &coarse.in_leaves, &mut |range, leaf| ready.push((range, *leaf)))?;
        self.insert_leaves(to, &ready)
    }
    /// Clears a region that no program writes: the bits first, the summary last, so that a death in between leaves a
    /// summary that promises too much, never too little.
    pub(super) fn clear(&self, region: u64) -> Res<()> {
        if self.is_idle(region) {
            return Ok(());
        }
        if let Some(leaves) = &self.leaves {
            let coarse = self.coarse(region);
            leaves.remove(region, &coarse.in_leaves)?;
            leaves.remove(region, &coarse.whole)?;
            let whole = self.whole(region);
            self.pages(&[region]).flatten().for_each(|at| whole[at].store(0, Ordering::Release));
        }
        let bits = self.bits(region);
        for at in self.pages(&[region]).flatten() {
            bits[at].store(0, Ordering::Release);
        }
        self.summary(region).iter().for_each(|word| word.store(0, Ordering::Release));
        Ok(())
    }
    /// The blocks of a region that no program writes. Leaves of which every bit is set give their memory back: 1 the range becomes
    /// dirty as a whole, 2 the leaf goes. The set stays what it was.
    pub(super) fn take(&self, region: u64) -> Res<BlockSet> {
        let Some(leaves) = &self.leaves else { return self.set_of(region) };
        let mut set = BlockSet::empty(self.shape.blocks);
        let coarse = self.coarse(region);
        coarse.whole.iter().for_each(|range| set.insert(self.shape.run_of(*range)));
        let mut full = Vec::new();
        leaves.read(region, &coarse.in_leaves, &mut |range, leaf| {
            set.insert_words(u64::from(range) * LEAF_WORDS, leaf);
            if self.is_full(range, leaf) {
                full.push(range);
            }
        })?;
        full.iter().for_each(|range| self.set_whole(region, *range));
        leaves.remove(region, &full)?;
        Ok(set)
    }
    /// Sets the bits of `blocks` in a region that programs may be writing.
    pub(super) fn insert(&self, region: u64, blocks: &BlockSet) -> Res<()> {
        if self.leaves.is_none() {
            blocks.words().for_each(|(at, word)| self.set_word(region, at, word));
            return Ok(());
        }
        let mut ready: Vec<(u32, Leaf)> = Vec::with_capacity(LEAVES_AT_ONCE);
        for (at, word) in blocks.words() {
            let (range, place) = ((at / LEAF_WORDS) as u32, (at % LEAF_WORDS) as usize);
            if ready.last().is_none_or(|(last, _)| *last != range) {
                if ready.len() == LEAVES_AT_ONCE {
                    self.insert_leaves(region, &ready)?;
                    ready.clear();
                }
                ready.push((range, [0; LEAF_WORDS as usize]));
            }
            if let Some((_, leaf)) = ready.last_mut() {
                leaf[place] = word;
            }
        }
        self.insert_leaves(region, &ready)
    }
    fn insert_leaves(&self, region: u64, all: &[(u32, Leaf)]) -> Res<()> {
        let Some(leaves) = &self.leaves else { return Ok(()) };
        let mut rest = Vec::with_capacity(all.len());
        for (range, leaf) in all {
            match self.is_full(*range, leaf) {
                true => self.set_whole(region, *range),
                false => {
                    self.set_word(region, u64::from(*range) / 64, 1 << (range % 64));
                    rest.push((*range, *leaf));
                }
            }
        }
        // Doubt means dirty: where no leaf can be made, the whole range is.
        leaves.insert(region, &rest)?.into_iter().for_each(|range| self.set_whole(region, range));
        Ok(())
    }
    fn is_full(&self, range: u32, leaf: &Leaf) -> bool {
        ones_in(leaf) == self.shape.run_of(range).count
    }
    fn set_whole(&self, region: u64, range: u32) {
        self.set_word(region, u64::from(range) / 64, 1 << (range % 64));
        self.whole(region)[range as usize / 64].fetch_or(1 << (range % 64), Ordering::AcqRel);
    }
    fn set_word(&self, region: u64, at: u64, bits: u64) {
        if bits == 0 {
            return;
        }
        let page = at / PAGE_WORDS;
        let (summary, bit) = (&self.summary(region)[(page / 64) as usize], 1 << (page % 64));
        if summary.load(Ordering::Relaxed) & bit == 0 {
            summary.fetch_or(bit, Ordering::AcqRel);
        }
        self.bits(region)[at as usize].fetch_or(bits, Ordering::AcqRel);
    }
}

fn ones_in(leaf: &Leaf) -> u64 {
    leaf.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// The ranges of a region that may have a bit, ascending.
#[derive(Default)]
struct Coarse {
    /// Dirty as a whole; a leaf beside it adds nothing.
    whole: Vec<u32>,
    /// The others: what their leaves say.
    in_leaves: Vec<u32>,
}

/// A run of blocks as a set over a volume of `blocks` blocks.
pub(super) fn set_of_run(start: u64, count: u64, blocks: u64) -> BlockSet {
    let mut set = BlockSet::empty(blocks);
    set.insert(BlockRun { start, count });
    set
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::sync::{Arc, Mutex};

    /// Leaves in memory, in place of the kernel's maps; at most `room` in a region.
    struct Memory {
        regions: Mutex<Vec<BTreeMap<u32, Leaf>>>,
        room: usize,
    }

    impl LeafStore for Memory {
        fn read(&self, region: u64, ranges: &[u32], each: &mut dyn FnMut(u32, &Leaf)) -> Res<()> {
            let regions = self.regions.lock().unwrap();
            let leaves = &regions[region as usize];
            ranges.iter().filter_map(|range| Some((*range, leaves.get(range)?))).for_each(|(range, leaf)| each(range, leaf));
            Ok(())
        }
        fn insert(&self, region: u64, new: &[(u32, Leaf)]) -> Res<Vec<u32>> {
            let mut regions = self.regions.lock().unwrap();
            let leaves = &mut regions[region as usize];
            let mut refused = Vec::new();
            for (range, bits) in new {
                if leaves.len() == self.room && !leaves.contains_key(range) {
                    refused.push(*range);
                    continue;
                }
                let leaf = leaves.entry(*range).or_insert([0; LEAF_WORDS as usize]);
                leaf.iter_mut().zip(bits).for_each(|(mine, theirs)| *mine |= theirs);
            }
            Ok(refused)
        }
        fn remove(&self, region: u64, ranges: &[u32]) -> Res<()> {
            let mut regions = self.regions.lock().unwrap();
            regions[region as usize].retain(|range, _| !ranges.contains(range));
            Ok(())
        }
    }

    /// Bits over plain memory, the second value being its leaves.
    fn halves_with_room(blocks: u64, room: usize) -> (Halves, Arc<Memory>) {
        let shape = Shape::of(blocks);
        let words = Words::new(MmapMut::map_anon(shape.map_words() as usize * 8).unwrap());
        let memory = Arc::new(Memory { regions: Mutex::new(vec![BTreeMap::new(); REGIONS as usize]), room });
        let leaves = shape.sparse.then(|| Box::new(Arc::clone(&memory)) as Box<dyn LeafStore + Send>);
        (Halves::new(words, shape, leaves), memory)
    }

    impl LeafStore for Arc<Memory> {
        fn read(&self, region: u64, ranges: &[u32], each: &mut dyn FnMut(u32, &Leaf)) -> Res<()> {
            Memory::read(self, region, ranges, each)
        }
        fn insert(&self, region: u64, leaves: &[(u32, Leaf)]) -> Res<Vec<u32>> {
            Memory::insert(self, region, leaves)
        }
        fn remove(&self, region: u64, ranges: &[u32]) -> Res<()> {
            Memory::remove(self, region, ranges)
        }
    }

    fn halves(blocks: u64) -> Halves {
        halves_with_room(blocks, usize::MAX).0
    }

    fn set(blocks: u64, members: &[(u64, u64)]) -> BlockSet {
        let mut set = BlockSet::empty(blocks);
        members.iter().for_each(|(at, count)| set.insert(BlockRun { start: at % blocks, count: *count }));
        set
    }

    /// Volumes with and without leaves, some at the limits.
    fn sizes() -> impl Strategy<Value = u64> {
        prop_oneof![
            1u64..200_000,
            FLAT_BLOCKS - 1..FLAT_BLOCKS + 3,
            LEAF_BLOCKS * 64 - 1..LEAF_BLOCKS * 64 + 2,
            1u64 << 28..1u64 << 32,
        ]
    }

    /// Runs that fill leaves, parts of leaves and single blocks, near to each other so that they meet.
    fn members() -> impl Strategy<Value = Vec<(u64, u64)>> {
        let place = prop_oneof![any::<u64>(), 0..LEAF_BLOCKS * 4, (0..6u64).prop_map(|range| range * LEAF_BLOCKS)];
        prop::collection::vec((place, prop_oneof![Just(1), 1..200u64, LEAF_BLOCKS - 1..LEAF_BLOCKS * 2 + 2]), 0..30)
    }

    proptest! {
        #[test]
        fn halves_agree_with_plain_sets(blocks in sizes(), one in members(), two in members()) {
            let (a, b) = (set(blocks, &one), set(blocks, &two));
            let (halves, memory) = halves_with_room(blocks, usize::MAX);
            halves.insert(0, &a).unwrap();
            halves.insert(1, &b).unwrap();
            prop_assert_eq!(&halves.set_of(0).unwrap(), &a);
            prop_assert_eq!(&halves.set_of(1).unwrap(), &b);
            let mut both = a.clone();
            both.union(&b);
            prop_assert_eq!(halves.count_in_any().unwrap(), both.count());
            prop_assert_eq!(&halves.set_of_any().unwrap(), &both);
            prop_assert_eq!(halves.count(1).unwrap(), b.count());
            halves.give_back(0, 1).unwrap();
            prop_assert_eq!(&halves.set_of(1).unwrap(), &both);
            prop_assert_eq!(&halves.set_of(0).unwrap(), &a);
            prop_assert_eq!(&halves.take(1).unwrap(), &both);
            prop_assert!(memory.regions.lock().unwrap()[1].iter().all(|(range, leaf)| !halves.is_full(*range, leaf)));
            prop_assert_eq!(&halves.take(1).unwrap(), &both);
            prop_assert_eq!(halves.count(1).unwrap(), both.count());
            halves.give_back(1, HELD).unwrap();
            halves.clear(0).unwrap();
            prop_assert!(halves.set_of(0).unwrap().is_empty());
            prop_assert_eq!(&halves.set_of(1).unwrap(), &both);
            halves.clear(1).unwrap();
            prop_assert_eq!(&halves.set_of(HELD).unwrap(), &both);
            prop_assert_eq!(halves.count_in_any().unwrap(), both.count());
            halves.clear(HELD).unwrap();
            prop_assert_eq!(halves.count_in_any().unwrap(), 0);
            prop_assert!(memory.regions.lock().unwrap().iter().all(BTreeMap::is_empty), "no leaf is left behind");
        }

        /// Where there is no room for leaves, whole ranges are dirty: nothing is lost, and nothing outside of those ranges is added.
        #[test]
        fn without_room_whole_ranges_are_dirty(blocks in FLAT_BLOCKS + 1..1u64 << 30, one in members(), two in members(), room in 0usize..4) {
            let (a, b) = (set(blocks, &one), set(blocks, &two));
            let (halves, memory) = halves_with_room(blocks, room);
            halves.insert(0, &a).unwrap();
            halves.insert(0, &b).unwrap();
            let mut exact = a;
            exact.union(&b);
            let mut rounded = BlockSet::empty(blocks);
            exact.runs(u64::MAX).for_each(|run| {
                let first = run.start / LEAF_BLOCKS * LEAF_BLOCKS;
                rounded.insert(BlockRun { start: first, count: run.end().next_multiple_of(LEAF_BLOCKS) - first });
            });
            for half in [0, 1] {
                let is = halves.set_of(half).unwrap();
                prop_assert_eq!(halves.count(half).unwrap(), is.count());
                let (mut lost, mut added) = (exact.clone(), is);
                lost.subtract(&added);
                added.subtract(&rounded);
                prop_assert_eq!((lost.count(), added.count()), (0, 0));
                prop_assert!(memory.regions.lock().unwrap()[half as usize].len() <= room);
                halves.give_back(0, 1).unwrap();
            }
        }
    }

    #[test]
    fn the_last_block_of_a_large_volume_has_a_bit() {
        for size in [16u64 << 30, 16 << 40] {
            let blocks = size / 4096 + 1;
            let halves = halves(blocks);
            let last = set_of_run(blocks - 1, 1, blocks);
            halves.insert(1, &last).unwrap();
            assert_eq!(halves.set_of(1).unwrap(), last);
            assert!(halves.set_of(0).unwrap().is_empty());
        }
    }

    #[test]
    fn a_large_idle_volume_is_small() {
        let shape = Shape::of((16u64 << 40) / 4096);
        assert!(shape.map_words() * 8 < 1 << 20, "{shape:?}");
        assert!(shape.summary_words == 1, "{shape:?}");
    }
}
