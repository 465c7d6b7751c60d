//! An open image: its descriptors, its size, its poison.

use crate::device::RUN_BYTES_MAX;
use crate::device::double::RamDisk;
use crate::device::transfer::{After, Lanes, Piece, Transfer};
use crate::model::{ByteRun, Code, Fault, Res};
use memmap2::MmapMut;
use nix::errno::Errno;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

nix::ioctl_read!(blk_get_size64, 0x12, 114, u64);
nix::ioctl_read_bad!(blk_sector_size, nix::request_code_none!(0x12, 104), libc::c_int);
nix::ioctl_read_bad!(blk_read_only, nix::request_code_none!(0x12, 94), libc::c_int);
nix::ioctl_write_ptr_bad!(blk_zeroout, nix::request_code_none!(0x12, 127), [u64; 2]);

/// Largest alignment that direct I/O may ask for; buffers are aligned to it. Beyond it the page cache is used.
const ALIGN_MAX: u64 = 4096;

/// An open image (regular file or block device), O_DIRECT where the file system allows it.
///
/// Alignment: whole runs go direct. Where direct I/O asks for more than the 512 bytes that image sizes are multiples of (a file
/// system on a disk of 4096-byte sectors), the last, short piece of an image is written through the page cache; reads of it stay direct.
pub struct DeviceFile {
    path: PathBuf,
    medium: Medium,
    size: u64,
    writable: bool,
    poisoned: AtomicBool,
}

/// Where the bytes are.
enum Medium {
    Os(OsFile),
    Ram(Arc<RamDisk>),
}

struct OsFile {
    /// Opened with O_DIRECT; `None` where that is refused.
    direct: Option<File>,
    /// The same inode, through the page cache.
    cached: File,
    block_device: bool,
    lanes: Lanes,
}

impl DeviceFile {
    /// Opens an existing image. Errors: `IO_ERROR`, `NOT_A_BLOCK_IMAGE` (neither file nor block device, or size 0 or not a multiple of 512).
    pub fn open(path: &Path, writable: bool) -> Res<DeviceFile> {
        let fault = |error: io::Error| Fault::io(path.display().to_string(), &error);
        // O_PATH first: a FIFO or a tape must be recognised without being opened.
        let pin = File::options().read(true).custom_flags(libc::O_PATH).open(path).map_err(fault)?;
        let kind = pin.metadata().map_err(fault)?.file_type();
        let not_image = |cause: String| {
            Fault::new(Code::NotABlockImage, path.display().to_string(), cause, "name a disk image or a block device")
        };
        if !kind.is_file() && !kind.is_block_device() {
            return Err(not_image("it is neither a regular file nor a block device".into()));
        }
        let same = format!("/proc/self/fd/{}", pin.as_raw_fd());
        let cached = File::options().read(true).write(writable).open(&same).map_err(fault)?;
        let size = match kind.is_block_device() {
            true => {
                let mut size = 0u64;
                // SAFETY: BLKGETSIZE64 writes one u64 to the place given, which lives through the call.
                unsafe { blk_get_size64(cached.as_raw_fd(), &raw mut size) }.map_err(|e| fault(e.into()))?;
                size
            }
            false => cached.metadata().map_err(fault)?.len(),
        };
        if size == 0 || !size.is_multiple_of(512) {
            return Err(not_image(format!("its size is {size} bytes, not a multiple of 512 above zero")));
        }
        if writable && kind.is_block_device() {
            let mut read_only: libc::c_int = 0;
            // The kernel lets a read-only device be opened for writing, and only the writes fail.
            // SAFETY: BLKROGET writes one int to the place given.
            unsafe { blk_read_only(cached.as_raw_fd(), &raw mut read_only) }.map_err(|e| fault(e.into()))?;
            if read_only != 0 {
                return Err(fault(io::Error::from_raw_os_error(libc::EROFS)));
            }
        }
        let direct = File::options().read(true).write(writable).custom_flags(libc::O_DIRECT).open(&same).ok();
        let direct = direct.and_then(|file| direct_alignment(&file, kind.is_block_device()).map(|align| (file, align)));
        if direct.is_none() {
            // Without direct I/O at least do not let a pass over the whole image push everybody's working set out of the cache.
            // SAFETY: advice on a descriptor that we own; no memory is involved. An old kernel that refuses it costs nothing.
            unsafe { libc::posix_fadvise(cached.as_raw_fd(), 0, 0, libc::POSIX_FADV_NOREUSE) };
        }
        let lanes = Lanes { align: direct.as_ref().map(|(_, align)| *align), cached_reads: kind.is_file() };
        let os = OsFile { direct: direct.map(|(file, _)| file), cached, block_device: kind.is_block_device(), lanes };
        Ok(DeviceFile { path: path.into(), medium: Medium::Os(os), size, writable, poisoned: AtomicBool::new(false) })
    }

    /// Makes a new image that reads as zeroes and takes no space: `size_bytes` long, mode 0600, its name durable.
    /// Errors: `NAME_TAKEN` when something is there already, `BAD_ARGUMENT` for a size that is 0 or no multiple of 512, `DISK_FULL`, `IO_ERROR`.
    ///
    /// Order of durability:
    /// 1. the file, of its full length, is flushed under its name;
    /// 2. the directory is flushed. Before 2 a power cut may leave nothing, never a shorter image under the name that was returned.
    pub fn create(path: &Path, size_bytes: u64) -> Res<DeviceFile> {
        let name = path.display().to_string();
        if size_bytes == 0 || !size_bytes.is_multiple_of(512) || size_bytes > i64::MAX as u64 {
            let cause = format!("{size_bytes} bytes is not a size for an image");
            return Err(Fault::new(Code::BadArgument, name, cause, "choose a multiple of 512 above zero"));
        }
        let file = match File::options().read(true).write(true).create_new(true).mode(0o600).open(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(Fault::new(
                    Code::NameTaken,
                    name,
                    "it exists already",
                    "choose another name, or remove that file if it is not needed",
                ));
            }
            other => other.map_err(|e| Fault::io(&*name, &e))?,
        };
        let make = || {
            file.set_len(size_bytes)?;
            file.sync_all()?;
            let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            File::open(parent)?.sync_all()
        };
        let opened = make().map_err(|e| Fault::io(&*name, &e)).and_then(|()| DeviceFile::open(path, true));
        if opened.is_err() {
            // We made the name a moment ago and nobody was told of it.
            let _ = std::fs::remove_file(path);
        }
        opened
    }

    /// An open RAM disk.
    pub(super) fn ram(disk: Arc<RamDisk>, size: u64, writable: bool) -> DeviceFile {
        DeviceFile { path: "RAM disk".into(), medium: Medium::Ram(disk), size, writable, poisoned: AtomicBool::new(false) }
    }

    /// Size in bytes, as it was at open.
    pub fn size_bytes(&self) -> u64 {
        self.size
    }

    /// The unit in bytes (512 to 4096) that runs should begin and end with, the end of the image aside. On a block device no other run is
    /// taken; on a file one goes, in part, through the page cache, which is slow and gets in the way of direct I/O beside it.
    pub fn align_bytes(&self) -> u64 {
        match &self.medium {
            Medium::Os(os) => os.lanes.align.unwrap_or(512),
            Medium::Ram(disk) => disk.align_bytes(),
        }
    }

    /// Whether bytes go past the page cache. False on tmpfs and wherever else O_DIRECT is refused.
    pub fn direct(&self) -> bool {
        matches!(&self.medium, Medium::Os(os) if os.direct.is_some())
    }

    /// Device number of the file system and inode number, through the open descriptor; equal numbers are the same file under any
    /// name (and what `host::Backing` says of a loop device). Error: `IO_ERROR`.
    pub fn identity(&self) -> Res<(u64, u64)> {
        match &self.medium {
            Medium::Os(os) => {
                let meta = os.cached.metadata().map_err(|e| Fault::io(self.name(), &e))?;
                Ok((meta.dev(), meta.ino()))
            }
            Medium::Ram(disk) => Ok((0, Arc::as_ptr(disk).addr() as u64)),
        }
    }

    /// Makes all completed writes survive power loss. A failure poisons the handle (`FLUSH_FAILED`), for ever.
    pub fn flush(&self) -> Res<()> {
        self.sound()?;
        let flushed = match &self.medium {
            Medium::Os(os) => again(|| os.cached.sync_data()),
            Medium::Ram(disk) => disk.flush(),
        };
        flushed.map_err(|error| {
            // The kernel reports a lost page once and then calls it clean: a second fsync would say "fine" (never retried).
            self.poisoned.store(true, Ordering::SeqCst);
            let cause = format!("the flush failed: {error}");
            Fault::new(
                Code::FlushFailed,
                self.name(),
                cause,
                "see the kernel log for the disk; the data is fetched again once it is sound",
            )
        })
    }

    /// Makes a range read as zeroes: punches a hole where file or device can, BLKZEROOUT on a device, writes zeroes where neither
    /// works. Any length; offset and length are multiples of 512. Not durable before [`DeviceFile::flush`].
    pub fn zero(&self, run: ByteRun) -> Res<()> {
        if run.len == 0 {
            return Ok(());
        }
        self.check_range(run, true)?;
        let done = match &self.medium {
            Medium::Ram(disk) => disk.zero(run).map(|()| true),
            // On a device too: BLKZEROOUT alone keeps blocks allocated, which fills the disk under a sparse or thin one.
            Medium::Os(os) => match punch(&os.cached, run) {
                Ok(false) if os.block_device => zero_device(&os.cached, run),
                done => done,
            },
        };
        match done {
            Ok(true) => Ok(()),
            Ok(false) => self.write_zeroes(run),
            Err(error) => Err(self.spoil("zeroing", run.offset, &error)),
        }
    }

    fn write_zeroes(&self, run: ByteRun) -> Res<()> {
        let zeroes = buffer()?;
        let mut at = run.offset;
        while at < run.end() {
            let len = RUN_BYTES_MAX.min(run.end() - at);
            self.write_run(ByteRun { offset: at, len }, &zeroes)?;
            at += len;
        }
        Ok(())
    }

    /// The ranges of `within` that may hold data (SEEK_DATA/SEEK_HOLE; everything for a block device), ascending.
    ///
    /// What is not in them reads as zeroes. A badly fragmented file gives one range per fragment: ask for a part at a time.
    pub fn data_extents(&self, within: ByteRun) -> Res<Vec<ByteRun>> {
        let end = within.end().min(self.size);
        let whole = |offset: u64| Vec::from_iter((offset < end).then(|| ByteRun { offset, len: end - offset }));
        let file = match &self.medium {
            Medium::Os(os) if !os.block_device => &os.cached,
            _ => return Ok(whole(within.offset)),
        };
        let mut found = Vec::new();
        let mut at = within.offset;
        while at < end {
            let data = match seek(file, at, libc::SEEK_DATA) {
                Ok(data) => data,
                Err(Errno::ENXIO) => break,
                Err(Errno::EINVAL) => return Ok(whole(within.offset)),
                Err(error) => return Err(self.fault("looking for data", at, &error.into())),
            };
            if data >= end {
                break;
            }
            // A hole always follows, at the end of the file if nowhere else; ENXIO means that the file was just cut short.
            let hole = match seek(file, data, libc::SEEK_HOLE) {
                Ok(hole) => hole.min(end),
                Err(Errno::ENXIO) => end,
                Err(error) => return Err(self.fault("looking for a hole", data, &error.into())),
            };
            if hole <= data {
                return Err(Fault::internal(self.name(), format!("a hole at {hole} before the data at {data}")));
            }
            found.push(ByteRun { offset: data, len: hole - data });
            at = hole;
        }
        Ok(found)
    }

    /// What the image is called in words.
    pub(super) fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// `FLUSH_FAILED` once a write or a flush has failed.
    fn sound(&self) -> Res<()> {
        match self.poisoned.load(Ordering::SeqCst) {
            false => Ok(()),
            true => {
                let cause = "an earlier write or flush on it failed, so what it holds is not known";
                Err(Fault::new(
                    Code::FlushFailed,
                    self.name(),
                    cause,
                    "see the kernel log for the disk; the data is fetched again once it is sound",
                ))
            }
        }
    }

    /// Whether a run may be moved at all: sound handle, right mode, inside the image, whole sectors.
    pub(super) fn check(&self, run: ByteRun, write: bool) -> Res<()> {
        if run.len == 0 || run.len > RUN_BYTES_MAX {
            return Err(Fault::internal(self.name(), format!("a run of {} bytes at {}", run.len, run.offset)));
        }
        self.check_range(run, write)
    }

    fn check_range(&self, run: ByteRun, write: bool) -> Res<()> {
        self.sound()?;
        let end = run.offset.checked_add(run.len).filter(|end| *end <= self.size);
        // The size is a multiple of 512, so a run that ends with the image has whole sectors as well.
        if end.is_none() || !run.offset.is_multiple_of(512) || !run.len.is_multiple_of(512) {
            let cause =
                format!("{} bytes at {} do not fit an image of {} bytes in whole sectors", run.len, run.offset, self.size);
            return Err(Fault::internal(self.name(), cause));
        }
        if let Medium::Os(OsFile { block_device: true, lanes: Lanes { align: Some(align), .. }, .. }) = &self.medium
            && !(run.offset.is_multiple_of(*align) && run.len.is_multiple_of(*align))
        {
            // A device has whole sectors to its end; less than one would have to go through its page cache.
            let cause = format!("{} bytes at {} are no whole sectors of {align} bytes", run.len, run.offset);
            return Err(Fault::internal(self.name(), cause));
        }
        if write && !self.writable {
            return Err(Fault::internal(self.name(), "a write to an image opened for reading"));
        }
        Ok(())
    }

    /// A fault with its offset.
    pub(super) fn fault(&self, doing: &str, offset: u64, error: &io::Error) -> Fault {
        Fault::io(format!("{} ({doing} at byte {offset})", self.name()), error)
    }

    /// A fault of a write: poisons, except for a full disk, where nothing was accepted that could get lost later.
    pub(super) fn spoil(&self, doing: &str, offset: u64, error: &io::Error) -> Fault {
        let fault = self.fault(doing, offset, error);
        if fault.code != Code::DiskFull {
            self.poisoned.store(true, Ordering::SeqCst);
        }
        fault
    }

    /// The fault of a piece that moved nothing.
    pub(super) fn stuck(&self, write: bool, offset: u64) -> Fault {
        match write {
            true => self.spoil("writing", offset, &io::Error::from(io::ErrorKind::WriteZero)),
            false => self.fault(
                "reading",
                offset,
                &io::Error::new(io::ErrorKind::UnexpectedEof, "the image ends there, shorter than it was at open"),
            ),
        }
    }

    /// The start of moving a run; `None` for a RAM disk, which has no descriptor.
    pub(super) fn transfer(&self, run: ByteRun, write: bool) -> Option<Transfer> {
        match &self.medium {
            Medium::Os(os) => Some(Transfer::new(run, write, os.lanes)),
            Medium::Ram(_) => None,
        }
    }

    /// The descriptor for a piece.
    pub(super) fn descriptor(&self, piece: Piece) -> RawFd {
        match &self.medium {
            Medium::Os(os) => os.lane(piece).as_raw_fd(),
            Medium::Ram(_) => -1,
        }
    }

    /// Reads a checked run to the start of `bytes` (aligned, [`RUN_BYTES_MAX`] long), in this thread.
    pub(super) fn read_run(&self, run: ByteRun, bytes: &mut [u8]) -> Res<()> {
        let os = match &self.medium {
            Medium::Os(os) => os,
            Medium::Ram(disk) => return disk.read(run, bytes).map_err(|e| self.fault("reading", run.offset, &e)),
        };
        let mut transfer = Transfer::new(run, false, os.lanes);
        loop {
            let piece = transfer.piece();
            let to = &mut bytes[piece.at..piece.at + piece.len];
            let moved =
                again(|| os.lane(piece).read_at(to, piece.offset)).map_err(|e| self.fault("reading", piece.offset, &e))?;
            match transfer.advance(piece, moved) {
                After::Whole => return Ok(()),
                After::More => {}
                After::Stuck(offset) => return Err(self.stuck(false, offset)),
            }
        }
    }

    /// Writes a checked run from the start of `bytes`, in this thread.
    pub(super) fn write_run(&self, run: ByteRun, bytes: &[u8]) -> Res<()> {
        let os = match &self.medium {
            Medium::Os(os) => os,
            Medium::Ram(disk) => return disk.write(run, bytes).map_err(|e| self.spoil("writing", run.offset, &e)),
        };
        let mut transfer = Transfer::new(run, true, os.lanes);
        loop {
            let piece = transfer.piece();
            let from = &bytes[piece.at..piece.at + piece.len];
            let moved =
                again(|| os.lane(piece).write_at(from, piece.offset)).map_err(|e| self.spoil("writing", piece.offset, &e))?;
            match transfer.advance(piece, moved) {
                After::Whole => return Ok(()),
                After::More => {}
                After::Stuck(offset) => return Err(self.stuck(true, offset)),
            }
        }
    }
}

impl OsFile {
    fn lane(&self, piece: Piece) -> &File {
        match &self.direct {
            Some(direct) if piece.direct => direct,
            _ => &self.cached,
        }
    }
}

/// A page-aligned buffer of [`RUN_BYTES_MAX`] zeroes, whose pages take memory once they are touched.
pub(super) fn buffer() -> Res<MmapMut> {
    MmapMut::map_anon(RUN_BYTES_MAX as usize).map_err(|e| Fault::io("memory for a buffer", &e))
}

/// Repeats what a signal interrupted, and for a second what the kernel was short of something for.
fn again<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let mut retries = 0;
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && retries < 1000 => {
                retries += 1;
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            other => return other,
        }
    }
}

fn seek(file: &File, from: u64, whence: libc::c_int) -> Result<u64, Errno> {
    // SAFETY: no memory is involved. The descriptor's position moves, and nobody uses it: all reads and writes name their offset.
    let at = unsafe { libc::lseek(file.as_raw_fd(), from as libc::off_t, whence) };
    Errno::result(at).map(|at| at as u64)
}

/// The alignment that direct I/O on this file asks for, `None` when it does not work.
fn direct_alignment(file: &File, block_device: bool) -> Option<u64> {
    // SAFETY: all-zero bytes are a valid statx (plain integers).
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    let mask = libc::STATX_DIOALIGN;
    // SAFETY: the path is a NUL-terminated empty string, `stat` is writable and large enough.
    let got = unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, mask, &raw mut stat) };
    if got == 0 && stat.stx_mask & mask != 0 {
        let (memory, offset) = (u64::from(stat.stx_dio_mem_align), u64::from(stat.stx_dio_offset_align));
        let fits = |align: u64| align.is_power_of_two() && align <= ALIGN_MAX;
        return (fits(memory) && fits(offset)).then_some(offset.max(512));
    }
    // tmpfs takes O_DIRECT since Linux 6.6 and goes on through the page cache, which is all it has.
    if nix::sys::statfs::fstatfs(file).is_ok_and(|stat| stat.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC) && !block_device
    {
        return None;
    }
    // A kernel before 6.1, or a file system that does not tell: the device's own sector, or 4096, which every one takes; then try it.
    let mut sector: libc::c_int = 0;
    let align = match block_device {
        // SAFETY: BLKSSZGET writes one int to the place given.
        true => match unsafe { blk_sector_size(file.as_raw_fd(), &raw mut sector) } {
            Ok(_) if sector >= 512 && (sector as u64) <= ALIGN_MAX => sector as u64,
            _ => return None,
        },
        false => ALIGN_MAX,
    };
    let mut page = MmapMut::map_anon(ALIGN_MAX as usize).ok()?;
    again(|| file.read_at(&mut page[..align as usize], 0)).ok().map(|_| align)
}

/// True when done, false when neither a hole nor a zeroed range is known there.
fn punch(file: &File, run: ByteRun) -> io::Result<bool> {
    let keep = libc::FALLOC_FL_KEEP_SIZE;
    for mode in [libc::FALLOC_FL_PUNCH_HOLE | keep, libc::FALLOC_FL_ZERO_RANGE | keep] {
        let done = again(|| {
            // SAFETY: no memory is involved; the range was checked against the size, which fits off_t.
            let rc = unsafe { libc::fallocate(file.as_raw_fd(), mode, run.offset as libc::off_t, run.len as libc::off_t) };
            if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        });
        match done {
            Ok(()) => return Ok(true),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// True when done, false when the range does not fit the device's sectors or the driver cannot.
fn zero_device(file: &File, run: ByteRun) -> io::Result<bool> {
    let range = [run.offset, run.len];
    again(|| {
        // SAFETY: BLKZEROOUT reads two u64 from the place given.
        match unsafe { blk_zeroout(file.as_raw_fd(), &raw const range) } {
            Ok(_) => Ok(true),
            Err(Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOTTY) => Ok(false),
            Err(error) => Err(error.into()),
        }
    })
}
