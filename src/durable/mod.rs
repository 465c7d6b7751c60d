//! Owns making bytes and names survive power loss: positioned storage with explicit flushes, atomic replacement, locks.
//! Gives `Storage`, on which journal and ledger are built and crash-tested.
//! Keeps a failed flush failed: it is never retried on the same handle.
//! Never knows what the bytes mean.
//! Assumes the notes headed F in `kernel-notes.md`.

mod aligned;
#[doc(hidden)]
pub mod double;
mod file;
mod names;

pub use aligned::{ALIGN_BYTES, AlignedBuf};
pub use file::FileStorage;
pub use names::{lock_dir, private_dir, remove_file, replace_file};

use crate::model::Res;

/// Positioned bytes of a fixed length with explicit durability. Nothing is assumed of the order of unflushed writes.
pub trait Storage: Send {
    /// Length in bytes.
    fn len_bytes(&self) -> u64;
    /// Reads exactly `buffer.len()` bytes at `offset`, from the medium rather than a cache where it can.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Res<()>;
    /// Writes all of `bytes` at `offset`.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Res<()>;
    /// All writes before it survive power loss once it returns. After a failure every later call fails (`FLUSH_FAILED`).
    fn flush(&mut self) -> Res<()>;
}

#[cfg(test)]
mod tests;
