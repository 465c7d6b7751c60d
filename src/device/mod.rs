//! Owns block images as bytes: aligned buffers, direct reads and writes through io_uring or pread.
//! Gives runs of bytes in the order asked for, with memory bounded by queue depth times buffer size.
//! Keeps a failed write or flush failed: the handle is poisoned and says so to every later caller.
//! Never decides what to read or write, never mounts; the one name it makes is that of a new image.
//! Assumes the notes headed D in `kernel-notes.md`.
#![allow(unsafe_code)]

pub mod double;
mod file;
mod pread;
mod transfer;
mod uring;

pub use file::DeviceFile;

use crate::model::{ByteRun, EngineKind, Res};

/// Largest run that an engine takes in one piece, in bytes.
pub const RUN_BYTES_MAX: u64 = 256 << 10;

/// Most requests in flight that an engine is opened with; a larger wish is cut down to it.
const DEPTH_MAX: usize = 1024;

/// A way of moving bytes; one per working thread.
pub trait Engine: Send {
    /// `io_uring` or `pread`, as shown in `status`.
    fn name(&self) -> &'static str;
    /// Reads `runs` (each at most [`RUN_BYTES_MAX`], offset a multiple of 512, length arbitrary only at the end of the image)
    /// with many in flight, and hands each to `sink` in the order given. Stops at the first error.
    fn read(
        &mut self,
        file: &DeviceFile,
        runs: &mut dyn Iterator<Item = ByteRun>,
        sink: &mut dyn FnMut(ByteRun, &[u8]) -> Res<()>,
    ) -> Res<()>;
    /// Writes until `fill` gives `None`. `fill` gets an aligned buffer of [`RUN_BYTES_MAX`] bytes, puts bytes at its start and
    /// says where they go. A run that overlaps one in flight waits for it. All writes have completed (not flushed) on return.
    fn write(&mut self, file: &DeviceFile, fill: &mut dyn FnMut(&mut [u8]) -> Res<Option<ByteRun>>) -> Res<()>;
}

/// Opens an engine with `depth` requests in flight (1 to 1024, cut to that range). Its buffers, [`RUN_BYTES_MAX`] bytes each, are made
/// when first needed, at most `depth` of them. `Auto` falls back to pread where the kernel refuses io_uring (seccomp, sysctl, age);
/// `IoUring` then fails with `KERNEL_UNSUPPORTED`.
pub fn engine(kind: EngineKind, depth: usize) -> Res<Box<dyn Engine>> {
    let depth = depth.clamp(1, DEPTH_MAX);
    match kind {
        EngineKind::Pread => Ok(Box::new(pread::Pread::new()?)),
        EngineKind::IoUring => Ok(Box::new(uring::Uring::new(depth)?)),
        EngineKind::Auto => match uring::Uring::new(depth) {
            Ok(ring) => Ok(Box::new(ring)),
            Err(fault) => {
                tracing::info!(%fault, "pread instead of io_uring");
                Ok(Box::new(pread::Pread::new()?))
            }
        },
    }
}
