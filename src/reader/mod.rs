//! Owns the order of reading: a set of blocks becomes ascending runs of bytes, holes become zeroes without a read.
//! Gives runs of at most [`RUN_BLOCKS`] blocks to a sink, and the bytes that were really read.
//! Keeps memory bounded: what is in flight belongs to the engine, nothing else is held.
//! Never opens anything, never knows who takes the bytes.
//! Assumes the caller holds the image still, or wants it as it runs.

use crate::device::DeviceFile;
use crate::device::Engine;
use crate::model::{BLOCK_BYTES, BlockRun, BlockSet, ByteRun, Res};

/// Longest run handed out, in blocks (256 KiB).
pub const RUN_BLOCKS: u64 = 64;

/// Reads the blocks of `set` from `file` in ascending order and hands each run to `sink`. Ranges that are holes in the backing
/// file are handed out as zeroes without being read. Gives the bytes read. Errors are the device's and the sink's.
pub fn read(
    engine: &mut dyn Engine,
    file: &DeviceFile,
    set: &BlockSet,
    sink: &mut dyn FnMut(BlockRun, &[u8]) -> Res<()>,
) -> Res<u64> {
    let size_bytes = file.size_bytes();
    // Looking for holes costs system calls: it pays where the set is large, and only then are the extents asked for.
    let data = match set.count() > 16 * RUN_BLOCKS {
        true => data_blocks(file, set)?,
        false => None,
    };
    let mut bytes_read = 0;
    let Some(data) = data else {
        read_runs(engine, file, set, &mut |run, bytes| {
            bytes_read += bytes.len() as u64;
            sink(run, bytes)
        })?;
        return Ok(bytes_read);
    };
    let mut holes = set.clone();
    holes.subtract(&data);
    read_runs(engine, file, &data, &mut |run, bytes| {
        bytes_read += bytes.len() as u64;
        sink(run, bytes)
    })?;
    let zeroes = vec![0; (RUN_BLOCKS * BLOCK_BYTES) as usize];
    for run in holes.runs(RUN_BLOCKS) {
        sink(run, &zeroes[..run.bytes(size_bytes).len as usize])?;
    }
    Ok(bytes_read)
}

fn read_runs(
    engine: &mut dyn Engine,
    file: &DeviceFile,
    set: &BlockSet,
    sink: &mut dyn FnMut(BlockRun, &[u8]) -> Res<()>,
) -> Res<()> {
    let size_bytes = file.size_bytes();
    let mut runs = set.runs(RUN_BLOCKS).map(|run| run.bytes(size_bytes));
    engine.read(file, &mut runs, &mut |bytes: ByteRun, data: &[u8]| sink(block_run(bytes), data))
}

fn block_run(bytes: ByteRun) -> BlockRun {
    BlockRun { start: bytes.offset / BLOCK_BYTES, count: bytes.len.div_ceil(BLOCK_BYTES) }
}

/// The part of `set` that may hold data; `None` when that is all of it.
fn data_blocks(file: &DeviceFile, set: &BlockSet) -> Res<Option<BlockSet>> {
    let whole = ByteRun { offset: 0, len: file.size_bytes() };
    let extents = file.data_extents(whole)?;
    if extents == [whole] {
        return Ok(None);
    }
    let mut outside = set.clone();
    for extent in extents {
        let start = extent.offset / BLOCK_BYTES;
        outside.remove(BlockRun { start, count: extent.end().div_ceil(BLOCK_BYTES) - start });
    }
    let mut data = set.clone();
    data.subtract(&outside);
    Ok(Some(data))
}

/// All blocks of `file` that may hold data.
pub fn data_set(file: &DeviceFile) -> Res<BlockSet> {
    let mut set = BlockSet::empty(file.size_bytes().div_ceil(BLOCK_BYTES));
    for extent in file.data_extents(ByteRun { offset: 0, len: file.size_bytes() })? {
        let start = extent.offset / BLOCK_BYTES;
        set.insert(BlockRun { start, count: extent.end().div_ceil(BLOCK_BYTES) - start });
    }
    Ok(set)
}
