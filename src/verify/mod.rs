//! Owns comparison by digest: an image's blocks become digests, two lists of digests become the blocks that differ.
//! Gives digests in batches, skipping holes (a block that nobody names is zero).
//! Keeps both sides reading only their own device.
//! Never repairs, never sends.
//! Assumes 128 bits of blake3 do not collide.

use crate::delta::BlockDigest;
use crate::device::DeviceFile;
use crate::device::Engine;
use crate::model::{BLOCK_BYTES, BlockRun, BlockSet, ByteRun, Res};
use crate::reader;

/// Digests in one batch (256 KiB of digests, 64 MiB of image).
pub const BATCH_BLOCKS: u64 = 16_384;

/// Computes the digests of the blocks of `range` that may hold data and hands them to `sink` as (first block, 16 bytes each), in
/// ascending order, at most [`BATCH_BLOCKS`] at once. Errors are the device's and the sink's.
pub fn digests(
    engine: &mut dyn Engine,
    file: &DeviceFile,
    range: BlockRun,
    sink: &mut dyn FnMut(u64, Vec<u8>) -> Res<()>,
) -> Res<()> {
    let blocks = file.size_bytes().div_ceil(BLOCK_BYTES);
    let mut set = BlockSet::empty(blocks);
    for extent in file.data_extents(range.bytes(file.size_bytes()))? {
        let start = extent.offset / BLOCK_BYTES;
        set.insert(BlockRun { start, count: extent.end().div_ceil(BLOCK_BYTES) - start });
    }
    let (mut first, mut batch) = (0, Vec::new());
    let size_bytes = file.size_bytes();
    let mut runs = set.runs(reader::RUN_BLOCKS).map(|run| run.bytes(size_bytes));
    engine.read(file, &mut runs, &mut |at: ByteRun, bytes: &[u8]| {
        let start = at.offset / BLOCK_BYTES;
        let next = first + (batch.len() / 16) as u64;
        if !batch.is_empty() && (start != next || batch.len() as u64 / 16 >= BATCH_BLOCKS - reader::RUN_BLOCKS) {
            sink(first, std::mem::take(&mut batch))?;
        }
        if batch.is_empty() {
            first = start;
        }
        for block in bytes.chunks(BLOCK_BYTES as usize) {
            batch.extend_from_slice(&BlockDigest::of(block).0);
        }
        Ok(())
    })?;
    if !batch.is_empty() {
        sink(first, batch)?;
    }
    Ok(())
}

/// The blocks of `mine` whose digest is not the one in `theirs` (16 bytes a block from `first` on, zero where nobody named one).
pub fn differing(engine: &mut dyn Engine, file: &DeviceFile, mine: &BlockSet, first: u64, theirs: &[u8]) -> Res<BlockSet> {
    let mut differ = BlockSet::empty(mine.blocks());
    reader::read(engine, file, mine, &mut |run, bytes| {
        for (index, block) in bytes.chunks(BLOCK_BYTES as usize).enumerate() {
            let number = run.start + index as u64;
            let at = ((number - first) * 16) as usize;
            if theirs.get(at..at + 16) != Some(&BlockDigest::of(block).0[..]) {
                differ.insert(BlockRun { start: number, count: 1 });
            }
        }
        Ok(())
    })?;
    Ok(differ)
}

/// The blocks of `mine` whose digest is not the one that `held` names. A block of which nothing is known is no difference.
pub fn differing_from(
    engine: &mut dyn Engine,
    file: &DeviceFile,
    mine: &BlockSet,
    held: &dyn Fn(u64) -> BlockDigest,
) -> Res<BlockSet> {
    let mut differ = BlockSet::empty(mine.blocks());
    reader::read(engine, file, mine, &mut |run, bytes| {
        for (number, block) in (run.start..).zip(bytes.chunks(BLOCK_BYTES as usize)) {
            let held = held(number);
            if held != BlockDigest::UNKNOWN && held != BlockDigest::of(block) {
                differ.insert(BlockRun { start: number, count: 1 });
            }
        }
        Ok(())
    })?;
    Ok(differ)
}
