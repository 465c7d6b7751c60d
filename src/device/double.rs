//! The double of this room: a disk in memory that fails when told, and forgets what was not flushed when its power is cut.
//!
//! Both engines take it, through the same [`DeviceFile`]; requests are then served one at a time.

use crate::device::file::DeviceFile;
use crate::model::ByteRun;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A disk in memory.
pub struct RamDisk {
    disk: Mutex<Disk>,
    size: u64,
    align: u64,
}

struct Disk {
    /// What a reader sees.
    seen: Vec<u8>,
    /// What survives a power cut for certain.
    stable: Vec<u8>,
    /// Written and not flushed, in the order written.
    unflushed: Vec<ByteRun>,
    /// Countdown to the operation that fails, and its errno.
    failing: Option<(u64, i32)>,
}

impl RamDisk {
    /// A disk of `size_bytes` zeroes; twice that in memory.
    pub fn new(size_bytes: u64) -> Arc<RamDisk> {
        RamDisk::aligned(size_bytes, 512)
    }

    /// The same, refusing (`EINVAL`) what does not begin and end with its units of `align` bytes, or with the disk.
    pub fn aligned(size_bytes: u64, align: u64) -> Arc<RamDisk> {
        let zeroes = vec![0; size_bytes as usize];
        let disk = Disk { seen: zeroes.clone(), stable: zeroes, unflushed: Vec::new(), failing: None };
        Arc::new(RamDisk { disk: Mutex::new(disk), size: size_bytes, align })
    }

    /// Opens it; several handles see the same bytes, each with a poison of its own.
    pub fn open(self: &Arc<Self>, writable: bool) -> DeviceFile {
        DeviceFile::ram(self.clone(), self.size, writable)
    }

    /// Lets the `nth` operation from now (1 = the next; read, write, zero and flush all count) fail with `errno`. A failed flush
    /// loses what it should have made stable, as Linux does: the next one succeeds and says nothing of it.
    pub fn fail_nth(&self, nth: u64, errno: i32) {
        self.lock().failing = Some((nth.max(1), errno));
    }

    /// Cuts the power: every 512-byte sector written and not flushed is kept or lost as `keeps` says of its index.
    pub fn cut_power(&self, keeps: &mut dyn FnMut(u64) -> bool) {
        let mut disk = self.lock();
        let disk = &mut *disk;
        for run in std::mem::take(&mut disk.unflushed) {
            for sector in run.offset / 512..run.end().div_ceil(512) {
                let at = sector as usize * 512..(sector as usize * 512 + 512).min(disk.seen.len());
                if keeps(sector) {
                    disk.stable[at.clone()].copy_from_slice(&disk.seen[at]);
                }
            }
        }
        disk.seen.copy_from_slice(&disk.stable);
    }

    /// A copy of what a reader would see.
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().seen.clone()
    }

    pub(super) fn align_bytes(&self) -> u64 {
        self.align
    }

    fn fits(&self, run: ByteRun) -> io::Result<()> {
        let whole = |at: u64| at.is_multiple_of(self.align) || at == self.size;
        match whole(run.offset) && whole(run.end()) {
            true => Ok(()),
            false => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn read(&self, run: ByteRun, to: &mut [u8]) -> io::Result<()> {
        self.fits(run)?;
        let mut disk = self.lock();
        disk.count()?;
        to[..run.len as usize].copy_from_slice(&disk.seen[range(run)]);
        Ok(())
    }

    pub(super) fn write(&self, run: ByteRun, from: &[u8]) -> io::Result<()> {
        self.fits(run)?;
        let mut disk = self.lock();
        disk.count()?;
        disk.seen[range(run)].copy_from_slice(&from[..run.len as usize]);
        disk.unflushed.push(run);
        Ok(())
    }

    pub(super) fn zero(&self, run: ByteRun) -> io::Result<()> {
        self.fits(run)?;
        let mut disk = self.lock();
        disk.count()?;
        disk.seen[range(run)].fill(0);
        disk.unflushed.push(run);
        Ok(())
    }

    pub(super) fn flush(&self) -> io::Result<()> {
        let mut disk = self.lock();
        let disk = &mut *disk;
        let unflushed = std::mem::take(&mut disk.unflushed);
        disk.count()?;
        for run in unflushed {
            disk.stable[range(run)].copy_from_slice(&disk.seen[range(run)]);
        }
        Ok(())
    }
}

impl Disk {
    fn count(&mut self) -> io::Result<()> {
        match self.failing.take() {
            Some((1, errno)) => Err(io::Error::from_raw_os_error(errno)),
            Some((left, errno)) => {
                self.failing = Some((left - 1, errno));
                Ok(())
            }
            None => Ok(()),
        }
    }
}

fn range(run: ByteRun) -> std::ops::Range<usize> {
    run.offset as usize..run.end() as usize
}
