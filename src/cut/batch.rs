//! The last write to each sector since the last cut, gathered from the ring and from re-reads, and handed out in order.
//!
//! Nothing is copied while it is gathered: an entry names where a block's bytes stand, in the ring (which keeps them until it
//! is released), in the arena of what was read again, or nowhere (zeroes). Sorting brings the entries of a block together,
//! the last one first; a block whose last write covers it whole, nearly every one, costs nothing else.

use crate::model::{BLOCK_BYTES, BlockRun, Res};

/// Bytes of a sector.
const SECTOR_BYTES: u64 = 512;
/// Sectors of a block.
const SECTORS: u64 = BLOCK_BYTES / SECTOR_BYTES;
/// Longest run handed out, in blocks.
const RUN_BLOCKS: u64 = 64;

/// Where the bytes of an entry stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In the ring: the position at which its block would begin (it may begin before the record does).
    Ring(i64),
    /// In the arena, as an index.
    Arena(usize),
    /// Zeroes.
    Zero,
}

/// One write's part of one block.
#[derive(Clone, Copy, Debug)]
struct Entry {
    volume: u16,
    block: u64,
    /// Later entries have larger numbers.
    order: u32,
    /// Which sectors of the block.
    mask: u8,
    place: Place,
}

/// What a cut holds of a volume.
#[derive(Debug, PartialEq, Eq)]
pub enum Change<'a> {
    /// Whole blocks (the last one cut off at the volume's end), at most 64.
    Blocks(BlockRun, &'a [u8]),
    /// Sectors of 512 bytes of one block, from the first one given; nothing else of the block is known.
    Sectors(u64, &'a [u8]),
}

/// What was gathered.
#[derive(Default)]
pub(super) struct Gathered {
    entries: Vec<Entry>,
    arena: Vec<u8>,
    scratch: Vec<u8>,
}

impl Gathered {
    /// Whether nothing was.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
    /// Bytes of memory that what was read again takes.
    pub(super) fn arena_bytes(&self) -> u64 {
        self.arena.len() as u64
    }
    /// Number of parts of blocks.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
    /// Names the block of each part.
    pub(super) fn each_block(&self, sink: &mut dyn FnMut(u16, u64)) {
        self.entries.iter().for_each(|entry| sink(entry.volume, entry.block));
    }
    /// Forgets everything; memory is kept for the next cut, within reason.
    pub(super) fn clear(&mut self) {
        self.entries.clear();
        self.arena.clear();
        self.arena.shrink_to(4 << 20);
        self.entries.shrink_to(64 << 10);
    }
    /// Bytes that were written, in the ring from `position` on.
    pub(super) fn add_data(&mut self, volume: u16, offset: u64, len: u64, position: u64) {
        self.add(volume, offset, len, |block| Place::Ring(position as i64 + (block * BLOCK_BYTES) as i64 - offset as i64));
    }
    /// Zeroes that were written.
    pub(super) fn add_zero(&mut self, volume: u16, offset: u64, len: u64) {
        self.add(volume, offset, len, |_| Place::Zero);
    }
    /// A run that was read again.
    pub(super) fn add_read(&mut self, volume: u16, run: BlockRun, bytes: &[u8]) {
        let from = self.arena.len();
        self.arena.extend_from_slice(bytes);
        self.add(volume, run.start * BLOCK_BYTES, bytes.len() as u64, |block| {
            Place::Arena(from + ((block - run.start) * BLOCK_BYTES) as usize)
        });
    }
    fn add(&mut self, volume: u16, offset: u64, len: u64, place: impl Fn(u64) -> Place) {
        let (first, end) = (offset / SECTOR_BYTES, (offset + len).div_ceil(SECTOR_BYTES));
        let mut at = first;
        while at < end {
            let (block, from) = (at / SECTORS, at % SECTORS);
            let upto = (end - block * SECTORS).min(SECTORS);
            let mask = (((1u16 << (upto - from)) - 1) << from) as u8;
            let order = self.entries.len() as u32;
            self.entries.push(Entry { volume, block, order, mask, place: place(block) });
            at = (block + 1) * SECTORS;
        }
    }

    /// Hands out the last write to each sector, volume by volume in ascending order. `ring` gives the ring's bytes; `sizes` are the
    /// volumes' in bytes. Gives the number of blocks. Errors are the sink's.
    pub(super) fn emit<'r>(
        &mut self,
        ring: &dyn Fn(u64, usize) -> &'r [u8],
        sizes: &[u64],
        sink: &mut dyn FnMut(u16, Change<'_>) -> Res<()>,
    ) -> Res<u64> {
        let Gathered { entries, arena, scratch } = self;
        entries.sort_unstable_by_key(|entry| (entry.volume, entry.block, std::cmp::Reverse(entry.order)));
        let mut run = Run { volume: 0, start: 0, places: Vec::with_capacity(RUN_BLOCKS as usize) };
        let mut composed = [0; BLOCK_BYTES as usize];
        let (mut at, mut blocks) = (0, 0);
        while at < entries.len() {
            let Entry { volume, block, mask, place, .. } = entries[at];
            let same = entries[at..].iter().take_while(|e| (e.volume, e.block) == (volume, block)).count();
            let parts = &entries[at..at + same];
            at += same;
            blocks += 1;
            let sectors = (sizes[usize::from(volume)].div_ceil(SECTOR_BYTES) - block * SECTORS).min(SECTORS);
            let whole = ((1u16 << sectors) - 1) as u8;
            if mask & whole == whole && sectors == SECTORS {
                if !run.takes(volume, block) {
                    run.flush(ring, arena, scratch, sink)?;
                    run.volume = volume;
                    run.start = block;
                }
                run.places.push(place);
                continue;
            }
            run.flush(ring, arena, scratch, sink)?;
            let known = compose(parts, ring, arena, &mut composed) & whole;
            if known == whole {
                let len = (sectors * SECTOR_BYTES) as usize;
                sink(volume, Change::Blocks(BlockRun { start: block, count: 1 }, &composed[..len]))?;
                continue;
            }
            let mut sector = 0;
            while sector < sectors {
                let count = (sector..sectors).take_while(|s| known & (1 << s) != 0).count() as u64;
                if count > 0 {
                    let bytes = &composed[(sector * SECTOR_BYTES) as usize..((sector + count) * SECTOR_BYTES) as usize];
                    sink(volume, Change::Sectors(block * SECTORS + sector, bytes))?;
                }
                sector += count + 1;
            }
        }
        run.flush(ring, arena, scratch, sink)?;
        Ok(blocks)
    }
}

/// Whole blocks in a row.
struct Run {
    volume: u16,
    start: u64,
    places: Vec<Place>,
}

impl Run {
    fn takes(&self, volume: u16, block: u64) -> bool {
        let count = self.places.len() as u64;
        count > 0 && count < RUN_BLOCKS && volume == self.volume && block == self.start + count
    }
    fn flush<'r>(
        &mut self,
        ring: &dyn Fn(u64, usize) -> &'r [u8],
        arena: &[u8],
        scratch: &mut Vec<u8>,
        sink: &mut dyn FnMut(u16, Change<'_>) -> Res<()>,
    ) -> Res<()> {
        let Some(first) = self.places.first().copied() else { return Ok(()) };
        let run = BlockRun { start: self.start, count: self.places.len() as u64 };
        let (block, len) = (BLOCK_BYTES as usize, self.places.len() * BLOCK_BYTES as usize);
        let follows = |at: usize| match (first, self.places[at]) {
            (Place::Ring(a), Place::Ring(b)) => b == a + (at * block) as i64,
            (Place::Arena(a), Place::Arena(b)) => b == a + at * block,
            _ => false,
        };
        let bytes: &[u8] = if (1..self.places.len()).all(follows) && first != Place::Zero {
            // The usual run comes from one record: its bytes stand in a row already.
            match first {
                Place::Ring(position) => ring(position as u64, len),
                Place::Arena(at) => &arena[at..at + len],
                Place::Zero => &[],
            }
        } else {
            scratch.clear();
            for place in &self.places {
                match *place {
                    Place::Ring(position) => scratch.extend_from_slice(ring(position as u64, block)),
                    Place::Arena(at) => scratch.extend_from_slice(&arena[at..at + block]),
                    Place::Zero => scratch.resize(scratch.len() + block, 0),
                }
            }
            scratch
        };
        sink(self.volume, Change::Blocks(run, bytes))?;
        self.places.clear();
        Ok(())
    }
}

/// Puts the parts of one block together, the last write first; gives the mask of the sectors that are known.
fn compose<'r>(parts: &[Entry], ring: &dyn Fn(u64, usize) -> &'r [u8], arena: &[u8], to: &mut [u8]) -> u8 {
    let mut known = 0u8;
    for part in parts {
        for sector in (0..SECTORS).filter(|s| part.mask & !known & (1 << s) != 0) {
            let at = (sector * SECTOR_BYTES) as usize;
            let to = &mut to[at..at + SECTOR_BYTES as usize];
            match part.place {
                Place::Ring(position) => to.copy_from_slice(ring((position + at as i64) as u64, to.len())),
                Place::Arena(from) => to.copy_from_slice(&arena[from + at..from + at + to.len()]),
                Place::Zero => to.fill(0),
            }
        }
        known |= part.mask;
    }
    known
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What happened, in order.
    #[derive(Clone, Debug)]
    enum Event {
        Data(u64, Vec<u8>),
        Zero(u64, u64),
        Read(u64, u64),
    }

    const SIZE_BYTES: u64 = 40 * 4096 + 3 * 512;

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let range = (0..SIZE_BYTES / 512, 1u64..60).prop_map(|(at, len)| (at * 512, (len * 512).min(SIZE_BYTES - at * 512)));
        let event = (range, 0..3u8, any::<u8>()).prop_map(|((at, len), kind, seed)| match kind {
            0 => Event::Data(at, (0..len).map(|i| seed ^ (i / 512) as u8 ^ i as u8).collect()),
            1 => Event::Zero(at, len),
            _ => Event::Read(at / 4096, len.div_ceil(4096)),
        });
        prop::collection::vec(event, 0..40)
    }

    proptest! {
        #[test]
        fn the_last_write_to_each_sector_is_handed_out_and_nothing_else(events in events()) {
            let (mut device, mut touched) = (vec![0xee; SIZE_BYTES as usize], vec![false; SIZE_BYTES as usize]);
            let (mut gathered, mut ring) = (Gathered::default(), vec![0u8; 24]);
            let mut volume_reads = 7u8;
            for event in &events {
                match event {
                    Event::Data(at, bytes) => {
                        gathered.add_data(0, *at, bytes.len() as u64, ring.len() as u64);
                        ring.extend_from_slice(bytes);
                        device[*at as usize..*at as usize + bytes.len()].copy_from_slice(bytes);
                        touched[*at as usize..*at as usize + bytes.len()].fill(true);
                    }
                    Event::Zero(at, len) => {
                        gathered.add_zero(0, *at, *len);
                        device[*at as usize..(at + len) as usize].fill(0);
                        touched[*at as usize..(at + len) as usize].fill(true);
                    }
                    Event::Read(block, count) => {
                        let run = BlockRun { start: *block, count: *count };
                        let bytes = run.bytes(SIZE_BYTES);
                        volume_reads = volume_reads.wrapping_mul(31);
                        device[bytes.offset as usize..bytes.end() as usize].fill(volume_reads);
                        gathered.add_read(0, run, &vec![volume_reads; bytes.len as usize]);
                        touched[bytes.offset as usize..bytes.end() as usize].fill(true);
                    }
                }
            }
            let mut out = vec![0xee; SIZE_BYTES as usize];
            let mut out_touched = vec![false; SIZE_BYTES as usize];
            let mut last = 0;
            gathered.emit(&|at, len| &ring[at as usize..at as usize + len], &[SIZE_BYTES], &mut |volume, change| {
                assert_eq!(volume, 0);
                let (at, bytes) = match change {
                    Change::Blocks(run, bytes) => {
                        assert_eq!(run.bytes(SIZE_BYTES).len, bytes.len() as u64);
                        (run.start * 4096, bytes)
                    }
                    Change::Sectors(sector, bytes) => (sector * 512, bytes),
                };
                assert!(at >= last, "ascending");
                last = at + bytes.len() as u64;
                out[at as usize..last as usize].copy_from_slice(bytes);
                assert!(out_touched[at as usize..last as usize].iter().all(|t| !t));
                out_touched[at as usize..last as usize].fill(true);
                Ok(())
            }).unwrap();
            prop_assert_eq!(out_touched, touched);
            prop_assert!(out == device);
        }
    }
}
