//! A preallocated file as storage: direct I/O, so that what is read comes from the medium and not from memory.

use crate::durable::Storage;
use crate::durable::aligned::{ALIGN_BYTES, AlignedBuf};
use crate::durable::names::{dir_of, flush_dir, temporary};
use crate::model::{Code, Fault, Res};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Largest piece that is copied when a caller's memory or offset is not aligned, in bytes.
const BOUNCE_BYTES: usize = 1 << 20;

/// A preallocated file as [`Storage`].
///
/// Opened with O_DIRECT where the file system takes it. Elsewhere (an old tmpfs) a read drops the cached pages first, which is
/// the best that can be had there.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    path: PathBuf,
    len_bytes: u64,
    direct: bool,
    /// Set by the first failed flush, for ever: the kernel marks the pages clean after reporting once, so that a second flush
    /// would succeed over lost data.
    poisoned: AtomicBool,
}

impl FileStorage {
    /// Creates (fully allocated, `DISK_FULL` otherwise; directory entry durable) or opens a file of `len_bytes`, a multiple of
    /// 4096; says whether it was created. Errors: `IDENTITY_CHANGED` when a file of another length or kind stands there.
    ///
    /// A new file takes its name only when it is whole:
    /// 1. create `.NAME.new`  2. allocate all of it  3. flush it  4. rename to NAME  5. flush the directory.
    pub fn open_or_create(path: &Path, len_bytes: u64) -> Res<(FileStorage, bool)> {
        if len_bytes == 0 || !len_bytes.is_multiple_of(ALIGN_BYTES as u64) {
            let cause = format!("a length of {len_bytes} bytes is not a multiple of {ALIGN_BYTES}");
            return Err(Fault::new(Code::BadArgument, path.display().to_string(), cause, "round the size up"));
        }
        let created = match std::fs::symlink_metadata(path) {
            Ok(_) => false,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => true,
            Err(error) => return Err(Fault::io(path.display().to_string(), &error)),
        };
        if created {
            let new = temporary(path)?;
            let made = Self::allocate(&new, len_bytes).and_then(|()| {
                std::fs::rename(&new, path).map_err(|error| Fault::io(path.display().to_string(), &error))?;
                flush_dir(dir_of(path))
            });
            if let Err(fault) = made {
                // What could not be made must not keep the space that it did get.
                let _ = std::fs::remove_file(&new);
                return Err(fault);
            }
        }
        let storage = Self::open(path)?;
        if storage.len_bytes != len_bytes {
            return Err(Fault::new(
                Code::IdentityChanged,
                path.display().to_string(),
                format!("it has {} bytes where {len_bytes} are expected", storage.len_bytes),
                "set the configured size back, or remove the file once everything in it is applied",
            ));
        }
        Ok((storage, created))
    }

    /// Opens an existing file, whatever its length.
    pub fn open(path: &Path) -> Res<FileStorage> {
        let fail = |error: &std::io::Error| Fault::io(path.display().to_string(), error);
        let with = |flags: i32| {
            OpenOptions::new().read(true).write(true).custom_flags(flags | libc::O_CLOEXEC | libc::O_NOFOLLOW).open(path)
        };
        let (file, direct) = match with(libc::O_DIRECT) {
            Ok(file) => (file, true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => (with(0).map_err(|e| fail(&e))?, false),
            Err(error) => return Err(fail(&error)),
        };
        let meta = file.metadata().map_err(|e| fail(&e))?;
        if !meta.file_type().is_file() || meta.size() % ALIGN_BYTES as u64 != 0 {
            return Err(Fault::new(
                Code::IdentityChanged,
                path.display().to_string(),
                "it is not a regular file of whole 4 KiB blocks",
                "look at what stands there; it was not made by this agent",
            ));
        }
        Ok(FileStorage { file, path: path.to_owned(), len_bytes: meta.size(), direct, poisoned: AtomicBool::new(false) })
    }

    fn allocate(path: &Path, len_bytes: u64) -> Res<()> {
        let fail = |error: &std::io::Error| Fault::io(path.display().to_string(), error);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
            .open(path)
            .map_err(|e| fail(&e))?;
        // Asked beforehand, because an allocation that cannot succeed would fill the disk before it fails.
        let room = nix::sys::statvfs::fstatvfs(&file).map_err(|e| fail(&e.into()))?;
        let free_bytes = room.blocks_available() as u64 * room.fragment_size() as u64;
        let Ok(len) = i64::try_from(len_bytes) else {
            return Err(fail(&std::io::Error::from(std::io::ErrorKind::StorageFull)));
        };
        if len_bytes > free_bytes {
            return Err(Fault::new(
                Code::DiskFull,
                path.display().to_string(),
                format!("{len_bytes} bytes are needed and {free_bytes} are free"),
                "free space on that file system and try again",
            ));
        }
        nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, len).map_err(|e| fail(&e.into()))?;
        file.sync_all().map_err(|e| fail(&e))
    }

    fn fault(&self, error: &std::io::Error) -> Fault {
        Fault::io(self.path.display().to_string(), error)
    }

    fn usable(&self, offset: u64, len: usize) -> Res<()> {
        if self.poisoned.load(Ordering::Acquire) {
            return Err(Fault::new(
                Code::FlushFailed,
                self.path.display().to_string(),
                "an earlier flush failed, so nothing on this handle is trusted",
                "check the disk, then restart the agent: it reads back what did survive",
            ));
        }
        match offset.checked_add(len as u64).is_some_and(|end| end <= self.len_bytes) {
            true => Ok(()),
            false => {
                let cause = format!("{len} bytes at {offset} lie outside of its {} bytes", self.len_bytes);
                Err(Fault::internal(self.path.display().to_string(), cause))
            }
        }
    }

    /// Whether the kernel takes this transfer as it is.
    fn fits(&self, offset: u64, address: *const u8, len: usize) -> bool {
        let all = offset | address as u64 | len as u64;
        !self.direct || all.is_multiple_of(ALIGN_BYTES as u64)
    }

    /// Cuts an unaligned transfer into aligned pieces: (offset, length of the piece; where in it and how much is wanted).
    fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
        let mut done = 0;
        std::iter::from_fn(move || {
            let at = offset + done as u64;
            let skip = (at % ALIGN_BYTES as u64) as usize;
            let want = (len - done).min(BOUNCE_BYTES - skip);
            done += want;
            (want > 0).then(|| (at - skip as u64, (skip + want).next_multiple_of(ALIGN_BYTES), skip, want))
        })
    }
}

impl Storage for FileStorage {
    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Res<()> {
        self.usable(offset, buffer.len())?;
        if !self.direct {
            // Clean pages go, dirty ones stay: after a flush this makes the read come from below.
            let _ = nix::fcntl::posix_fadvise(
                &self.file,
                offset as i64,
                buffer.len() as i64,
                nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED,
            );
        }
        if self.fits(offset, buffer.as_ptr(), buffer.len()) {
            return self.file.read_exact_at(buffer, offset).map_err(|e| self.fault(&e));
        }
        let mut bounce = AlignedBuf::new((buffer.len() + 2 * ALIGN_BYTES).min(BOUNCE_BYTES).next_multiple_of(ALIGN_BYTES));
        let mut done = 0;
        for (at, len, skip, want) in Self::pieces(offset, buffer.len()) {
            self.file.read_exact_at(&mut bounce[..len], at).map_err(|e| self.fault(&e))?;
            buffer[done..done + want].copy_from_slice(&bounce[skip..skip + want]);
            done += want;
        }
        Ok(())
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Res<()> {
        self.usable(offset, bytes.len())?;
        if self.fits(offset, bytes.as_ptr(), bytes.len()) {
            return self.file.write_all_at(bytes, offset).map_err(|e| self.fault(&e));
        }
        let mut bounce = AlignedBuf::new((bytes.len() + 2 * ALIGN_BYTES).min(BOUNCE_BYTES).next_multiple_of(ALIGN_BYTES));
        let mut done = 0;
        for (at, len, skip, want) in Self::pieces(offset, bytes.len()) {
            if (skip, want) != (0, len) {
                self.file.read_exact_at(&mut bounce[..len], at).map_err(|e| self.fault(&e))?;
            }
            bounce[skip..skip + want].copy_from_slice(&bytes[done..done + want]);
            self.file.write_all_at(&bounce[..len], at).map_err(|e| self.fault(&e))?;
            done += want;
        }
        Ok(())
    }

    fn flush(&mut self) -> Res<()> {
        self.usable(0, 0)?;
        // The length never changes, so fdatasync covers all that a later read needs (extent conversions included).
        self.file.sync_data().map_err(|error| {
            self.poisoned.store(true, Ordering::Release);
            Fault::new(
                Code::FlushFailed,
                self.path.display().to_string(),
                error.to_string(),
                "check the disk (dmesg), then restart the agent: it reads back what did survive",
            )
        })
    }
}
