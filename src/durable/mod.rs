//! Owns making bytes and names survive power loss: positioned storage with explicit flushes, atomic replacement, locks.
//! Gives `Storage`, on which journal and ledger are built and crash-tested.
//! Keeps a failed flush failed: it is never retried on the same handle.
//! Never knows what the bytes mean.
//! Assumes the notes headed F in `kernel-notes.md`.

use crate::model::Res;
use std::path::Path;

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

/// A preallocated file as [`Storage`].
pub struct FileStorage;

impl FileStorage {
    /// Creates (fully allocated, `DISK_FULL` otherwise; directory entry durable) or opens a file of `len_bytes`.
    pub fn open_or_create(_path: &Path, _len_bytes: u64) -> Res<(FileStorage, bool)> { todo!() }
}

/// Replaces a small file whole or not at all: temporary in the same directory, flush, rename, flush of the directory. Mode 0600.
pub fn replace_file(_path: &Path, _bytes: &[u8]) -> Res<()> { todo!() }
/// Removes a file and makes the removal durable; fine when it is not there.
pub fn remove_file(_path: &Path) -> Res<()> { todo!() }
/// Makes a directory (0700, ours) or checks that it is one; `STATE_DIR_UNSAFE` otherwise.
pub fn private_dir(_path: &Path) -> Res<()> { todo!() }
/// Takes the lock of a state directory (OFD lock on `lock`); `STATE_DIR_HELD` names the holder's pid.
pub fn lock_dir(_dir: &Path) -> Res<std::os::fd::OwnedFd> { todo!() }
