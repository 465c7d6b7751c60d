//! The bits of one volume: two halves of a bitmap and their summaries, shared with the programs through one mapping.
//!
//! Layout, in words of 64 bits, the same in `bitmap.bpf.c`:
//! `[half 0: words][half 1: words][held: words][half 0: summary][half 1: summary][held: summary]`. A summary bit stands for a page of 512 words
//! (128 MiB of the device); whoever sets a bit has set its summary bit before. So an idle volume of a TiB is scanned in
//! 128 words, and a half may be cleared page by page, the summary last.

use crate::model::{BlockRun, BlockSet};
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

/// How many words one half of a volume of `blocks` blocks takes, and how many its summary.
pub(super) fn words_for(blocks: u64) -> (u64, u64) {
    let words = blocks.div_ceil(64);
    (words, words.div_ceil(PAGE_WORDS).div_ceil(64))
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

/// Both halves of one volume.
pub(super) struct Halves {
    shared: Words,
    blocks: u64,
    words: u64,
    summary_words: u64,
}

impl Halves {
    /// The halves of a volume of `blocks` blocks over `shared`, which holds at least their words.
    pub(super) fn new(shared: Words, blocks: u64) -> Halves {
        let (words, summary_words) = words_for(blocks);
        assert!(shared.all().len() as u64 >= REGIONS * (words + summary_words), "the map is shorter than its volume");
        Halves { shared, blocks, words, summary_words }
    }
    /// Number of blocks of the volume.
    pub(super) fn blocks(&self) -> u64 {
        self.blocks
    }
    fn bits(&self, half: u64) -> &[AtomicU64] {
        let start = (half * self.words) as usize;
        &self.shared.all()[start..start + self.words as usize]
    }
    fn summary(&self, half: u64) -> &[AtomicU64] {
        let start = (REGIONS * self.words + half * self.summary_words) as usize;
        &self.shared.all()[start..start + self.summary_words as usize]
    }
    /// The word indices of each page that may hold a bit in any of `halves`, ascending.
    fn pages(&self, halves: &[u64]) -> impl Iterator<Item = std::ops::Range<usize>> {
        let summaries: Vec<&[AtomicU64]> = halves.iter().map(|half| self.summary(*half)).collect();
        let words = self.words;
        (0..self.summary_words).flat_map(move |index| {
            let mut rest = summaries.iter().fold(0, |all, summary| all | summary[index as usize].load(Ordering::Relaxed));
            std::iter::from_fn(move || {
                let bit = u64::from(rest.trailing_zeros());
                rest &= rest.checked_sub(1)?;
                let start = (index * 64 + bit) * PAGE_WORDS;
                Some(start.min(words) as usize..(start + PAGE_WORDS).min(words) as usize)
            })
        })
    }
    /// The blocks of one half.
    pub(super) fn set_of(&self, half: u64) -> BlockSet {
        let mut words = vec![0; self.words as usize];
        let bits = self.bits(half);
        for at in self.pages(&[half]).flatten() {
            words[at] = bits[at].load(Ordering::Relaxed);
        }
        BlockSet::from_words(words, self.blocks)
    }
    /// Number of blocks that are in at least one region.
    pub(super) fn count_in_any(&self) -> u64 {
        self.any_word().map(|(_, word)| u64::from(word.count_ones())).sum()
    }
    /// The blocks that are in at least one region.
    pub(super) fn set_of_any(&self) -> BlockSet {
        let mut words = vec![0; self.words as usize];
        self.any_word().for_each(|(at, word)| words[at] = word);
        BlockSet::from_words(words, self.blocks)
    }
    fn any_word(&self) -> impl Iterator<Item = (usize, u64)> {
        let regions: Vec<&[AtomicU64]> = (0..REGIONS).map(|region| self.bits(region)).collect();
        let union = move |at: usize| regions.iter().fold(0, |all, bits| all | bits[at].load(Ordering::Relaxed));
        self.pages(&[0, 1, HELD]).flatten().map(move |at| (at, union(at)))
    }
    /// Number of blocks in one region.
    pub(super) fn count(&self, half: u64) -> u64 {
        let bits = self.bits(half);
        self.pages(&[half]).flatten().map(|at| u64::from(bits[at].load(Ordering::Relaxed).count_ones())).sum()
    }
    /// Sets every bit of half `from` in half `to` too. `from` stays as it is.
    pub(super) fn give_back(&self, from: u64, to: u64) {
        let bits = self.bits(from);
        for page in self.pages(&[from]) {
            for at in page {
                self.set_word(to, at, bits[at].load(Ordering::Relaxed));
            }
        }
    }
    /// Clears a half that no program writes: the bits first, the summary last, so that a death in between leaves a
    /// summary that promises too much, never too little.
    pub(super) fn clear(&self, half: u64) {
        let bits = self.bits(half);
        for at in self.pages(&[half]).flatten() {
            bits[at].store(0, Ordering::Relaxed);
        }
        self.summary(half).iter().for_each(|word| word.store(0, Ordering::Release));
    }
    /// Sets the bits of `blocks` in a half that programs may be writing.
    pub(super) fn insert(&self, half: u64, blocks: &BlockSet) {
        for (at, word) in blocks.words().iter().enumerate() {
            self.set_word(half, at, *word);
        }
    }
    fn set_word(&self, half: u64, at: usize, bits: u64) {
        if bits == 0 {
            return;
        }
        let page = at as u64 / PAGE_WORDS;
        let (summary, bit) = (&self.summary(half)[(page / 64) as usize], 1 << (page % 64));
        if summary.load(Ordering::Relaxed) & bit == 0 {
            summary.fetch_or(bit, Ordering::AcqRel);
        }
        self.bits(half)[at].fetch_or(bits, Ordering::AcqRel);
    }
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

    fn halves(blocks: u64) -> Halves {
        let (words, summary) = words_for(blocks);
        let bytes = (REGIONS * (words + summary) * 8).max(8) as usize;
        Halves::new(Words::new(MmapMut::map_anon(bytes).unwrap()), blocks)
    }

    fn set(blocks: u64, members: &[u64]) -> BlockSet {
        let mut set = BlockSet::empty(blocks);
        members.iter().for_each(|at| set.insert(BlockRun { start: at % blocks, count: 1 }));
        set
    }

    proptest! {
        #[test]
        fn halves_agree_with_plain_sets(blocks in 1u64..200_000, one in prop::collection::vec(any::<u64>(), 0..40),
                                        two in prop::collection::vec(any::<u64>(), 0..40)) {
            let (a, b) = (set(blocks, &one), set(blocks, &two));
            let halves = halves(blocks);
            halves.insert(0, &a);
            halves.insert(1, &b);
            prop_assert_eq!(&halves.set_of(0), &a);
            prop_assert_eq!(&halves.set_of(1), &b);
            let mut both = a.clone();
            both.union(&b);
            prop_assert_eq!(halves.count_in_any(), both.count());
            prop_assert_eq!(&halves.set_of_any(), &both);
            prop_assert_eq!(halves.count(1), b.count());
            halves.give_back(0, 1);
            prop_assert_eq!(&halves.set_of(1), &both);
            prop_assert_eq!(&halves.set_of(0), &a);
            halves.give_back(1, HELD);
            halves.clear(0);
            prop_assert!(halves.set_of(0).is_empty());
            prop_assert_eq!(&halves.set_of(1), &both);
            halves.clear(1);
            prop_assert_eq!(&halves.set_of(HELD), &both);
            prop_assert_eq!(halves.count_in_any(), both.count());
        }
    }

    #[test]
    fn the_last_block_of_a_large_volume_has_a_bit() {
        let blocks = (16u64 << 30) / 4096 + 1;
        let halves = halves(blocks);
        let last = set_of_run(blocks - 1, 1, blocks);
        halves.insert(1, &last);
        assert_eq!(halves.set_of(1), last);
        assert!(halves.set_of(0).is_empty());
    }
}
