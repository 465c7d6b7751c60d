//! Owns block images as bytes: aligned buffers, direct reads and writes through io_uring or pread.
//! Gives runs of bytes in the order asked for, with memory bounded by queue depth times buffer size.
//! Keeps a failed write or flush failed: the handle is poisoned and says so to every later caller.
//! Never decides what to read or write, never mounts, never creates a name.
//! Assumes the notes headed D in `kernel-notes.md`.

use crate::model::{ByteRun, EngineKind, Res};
use std::path::Path;

/// Largest run that an engine takes in one piece, in bytes.
pub const RUN_BYTES_MAX: u64 = 256 << 10;

/// An open image (regular file or block device), O_DIRECT where the file system allows it.
pub struct DeviceFile;

impl DeviceFile {
    /// Opens an existing image. Errors: `IO_ERROR`, `NOT_A_BLOCK_IMAGE` (neither file nor block device, or size 0 or not a multiple of 512).
    pub fn open(_path: &Path, _writable: bool) -> Res<DeviceFile> { todo!() }
    /// Size in bytes.
    pub fn size_bytes(&self) -> u64 { todo!() }
    /// Makes all completed writes survive power loss. A failure poisons the handle (`FLUSH_FAILED`), for ever.
    pub fn flush(&self) -> Res<()> { todo!() }
    /// Makes a range read as zeroes: punches a hole in a file, BLKZEROOUT on a device, writes zeroes where neither works.
    pub fn zero(&self, _run: ByteRun) -> Res<()> { todo!() }
    /// The ranges of `within` that may hold data (SEEK_DATA/SEEK_HOLE; everything for a block device), ascending.
    pub fn data_extents(&self, _within: ByteRun) -> Res<Vec<ByteRun>> { todo!() }
}

/// A way of moving bytes; one per working thread.
pub trait Engine: Send {
    /// `io_uring` or `pread`, as shown in `status`.
    fn name(&self) -> &'static str;
    /// Reads `runs` (each at most [`RUN_BYTES_MAX`], offset a multiple of 512, length arbitrary only at the end of the image)
    /// with many in flight, and hands each to `sink` in the order given. Stops at the first error.
    fn read(&mut self, file: &DeviceFile, runs: &mut dyn Iterator<Item = ByteRun>, sink: &mut dyn FnMut(ByteRun, &[u8]) -> Res<()>) -> Res<()>;
    /// Writes until `fill` gives `None`. `fill` gets an aligned buffer of [`RUN_BYTES_MAX`] bytes, puts bytes at its start and
    /// says where they go. A run that overlaps one in flight waits for it. All writes have completed (not flushed) on return.
    fn write(&mut self, file: &DeviceFile, fill: &mut dyn FnMut(&mut [u8]) -> Res<Option<ByteRun>>) -> Res<()>;
}

/// Opens an engine with `depth` requests in flight.
pub fn engine(_kind: EngineKind, _depth: usize) -> Res<Box<dyn Engine>> { todo!() }
