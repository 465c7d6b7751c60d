//! What a block device is, read through one open descriptor; and holding it.

use crate::host::loops;
use crate::host::mounts::mounts_of;
use crate::model::{Code, Fault, Res};
use nix::errno::Errno;
use nix::sys::stat::{major, minor};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

nix::ioctl_read!(blk_get_size64, 0x12, 114, u64);
nix::ioctl_read_bad!(blk_read_only, nix::request_code_none!(0x12, 94), libc::c_int);
nix::ioctl_read!(blk_get_diskseq, 0x12, 128, u64);

/// Major number of loop devices.
const LOOP_MAJOR: u32 = 7;

/// What the kernel says a block device is (S8): any change means another device or other bytes under the same name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceIdentity {
    /// Major and minor number of the whole disk.
    pub major: u32,
    /// See `major`.
    pub minor: u32,
    /// The disk's sequence number (`BLKGETDISKSEQ`), new at every attach.
    pub diskseq: u64,
    /// Size in bytes.
    pub size_bytes: u64,
    /// For a loop device: device number and inode of the backing file, offset, size limit.
    pub backing: Option<Backing>,
}

/// The file behind a loop device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backing {
    /// Device number of the file system that holds the file.
    pub dev: u64,
    /// Inode number of the file.
    pub inode: u64,
    /// Where in the file the device begins, in bytes.
    pub offset_bytes: u64,
    /// `lo_sizelimit`, 0 = none, in bytes.
    pub sizelimit_bytes: u64,
}

/// The identity of a block device, through an open descriptor. Errors: `IO_ERROR`, `NOT_A_BLOCK_IMAGE` (no block device, or a
/// partition: only whole disks have an identity and can be tracked), `KERNEL_UNSUPPORTED` (before 5.15).
pub fn identity(device: &Path) -> Res<DeviceIdentity> {
    of_open(&open_device(device, false, 0)?, device)
}

/// Opens a block device, and only that: a FIFO or a tape under the name is recognised without being opened.
pub(super) fn open_device(device: &Path, writable: bool, flags: i32) -> Res<File> {
    try_open(device, writable, flags)?.map_err(|e| Fault::io(device.display().to_string(), &e))
}

/// The same, with the error of the open itself kept apart.
fn try_open(device: &Path, writable: bool, flags: i32) -> Res<io::Result<File>> {
    let fault = |error: io::Error| Fault::io(device.display().to_string(), &error);
    let pin = File::options().read(true).custom_flags(libc::O_PATH).open(device).map_err(fault)?;
    if !pin.metadata().map_err(fault)?.file_type().is_block_device() {
        let next = "name a block device such as /dev/loop0";
        return Err(Fault::new(Code::NotABlockImage, device.display().to_string(), "it is not a block device", next));
    }
    let same = format!("/proc/self/fd/{}", pin.as_raw_fd());
    Ok(File::options().read(true).write(writable).custom_flags(flags).open(same))
}

/// The identity behind an open descriptor.
pub(super) fn of_open(file: &File, device: &Path) -> Res<DeviceIdentity> {
    let name = || device.display().to_string();
    let number = file.metadata().map_err(|e| Fault::io(name(), &e))?.rdev();
    let (major, minor) = (major(number) as u32, minor(number) as u32);
    if Path::new(&format!("/sys/dev/block/{major}:{minor}/partition")).exists() {
        return Err(Fault::new(Code::NotABlockImage, name(), "it is a partition", "name the whole disk, or a logical volume"));
    }
    // A loop device can change its file under us (LOOP_CHANGE_FD), so the parts are read until the sequence number stood still.
    for _ in 0..100 {
        let before = diskseq(file, device)?;
        let backing = match major {
            LOOP_MAJOR => loops::status(file).map_err(|e| Fault::io(name(), &e))?.map(|status| status.backing()),
            _ => None,
        };
        let mut size_bytes = 0u64;
        // SAFETY: BLKGETSIZE64 writes one u64 to the place given.
        unsafe { blk_get_size64(file.as_raw_fd(), &raw mut size_bytes) }.map_err(|e| Fault::io(name(), &e.into()))?;
        let diskseq = diskseq(file, device)?;
        if before == diskseq {
            return Ok(DeviceIdentity { major, minor, diskseq, size_bytes, backing });
        }
    }
    Err(Fault::new(
        Code::IdentityChanged,
        name(),
        "it keeps changing while it is looked at",
        "stop whatever attaches and detaches it",
    ))
}

fn diskseq(file: &File, device: &Path) -> Res<u64> {
    let mut seq = 0u64;
    // SAFETY: BLKGETDISKSEQ writes one u64 to the place given.
    match unsafe { blk_get_diskseq(file.as_raw_fd(), &raw mut seq) } {
        Ok(_) => Ok(seq),
        Err(Errno::ENOTTY | Errno::EINVAL) => {
            let cause = "this kernel gives disks no sequence number (BLKGETDISKSEQ)";
            Err(Fault::new(Code::KernelUnsupported, device.display().to_string(), cause, "use Linux 5.15 or later"))
        }
        Err(error) => Err(Fault::io(device.display().to_string(), &error.into())),
    }
}

/// Sectors written plus discarded since the device came up (`/sys/dev/block/M:m/stat`, in 512-byte sectors).
pub fn sectors_changed(major: u32, minor: u32) -> Res<u64> {
    let path = format!("/sys/dev/block/{major}:{minor}/stat");
    let text = std::fs::read_to_string(&path).map_err(|e| Fault::io(&*path, &e))?;
    sectors_of(&text)
        .ok_or_else(|| Fault::new(Code::KernelUnsupported, path, format!("it says {:?}", text.trim()), "use Linux 5.15 or later"))
}

/// Field 7 of `stat` is sectors written, field 14 sectors discarded.
fn sectors_of(text: &str) -> Option<u64> {
    let field = |n: usize| text.split_ascii_whitespace().nth(n)?.parse::<u64>().ok();
    field(6)?.checked_add(field(13)?)
}

/// An exclusive open of a device: while it lives nobody can mount it. `VOLUME_IN_USE` names who holds it, where known.
/// Other errors: `IO_ERROR` (for one, a read-only device and `writable`), `NOT_A_BLOCK_IMAGE`.
pub fn hold_exclusive(device: &Path, writable: bool) -> Res<OwnedFd> {
    // A short-lived prober (udev after an attach) may hold it for a moment.
    for tries in 0.. {
        match try_open(device, writable, libc::O_EXCL)? {
            Ok(file) if writable && is_read_only(&file) => {
                return Err(Fault::io(device.display().to_string(), &io::Error::from_raw_os_error(libc::EROFS)));
            }
            Ok(file) => return Ok(file.into()),
            Err(error) if error.raw_os_error() != Some(libc::EBUSY) => {
                return Err(Fault::io(device.display().to_string(), &error));
            }
            Err(_) if tries < 10 => std::thread::sleep(Duration::from_millis(10)),
            Err(_) => break,
        }
    }
    Err(in_use(device, &open_device(device, false, 0)?))
}

/// The kernel lets a read-only device be opened for writing, and only the writes fail.
fn is_read_only(device: &File) -> bool {
    let mut read_only: libc::c_int = 0;
    // SAFETY: BLKROGET writes one int to the place given.
    let asked = unsafe { blk_read_only(device.as_raw_fd(), &raw mut read_only) };
    asked.is_ok() && read_only != 0
}

/// `VOLUME_IN_USE` with everybody we can find.
pub(super) fn in_use(device: &Path, open: &File) -> Fault {
    let holders = open.metadata().map(|meta| holders(major(meta.rdev()) as u32, minor(meta.rdev()) as u32)).unwrap_or_default();
    let cause = match holders.is_empty() {
        true => {
            "somebody holds it, and /proc does not show who (a mount that was detached lazily, or another container)".to_string()
        }
        false => format!("it is held: {}", holders.join(", ")),
    };
    Fault::new(Code::VolumeInUse, device.display().to_string(), cause, "unmount it or stop what uses it, then try again")
}

/// Who uses a device, in words: mounts, devices stacked on it, processes that have it open (not this one). At most 8.
fn holders(major: u32, minor: u32) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for mount in mounts_of(major, minor).unwrap_or_default() {
        found.push(format!("mounted on {}", mount.path.display()));
    }
    if let Ok(stacked) = std::fs::read_dir(format!("/sys/dev/block/{major}:{minor}/holders")) {
        found.extend(stacked.flatten().map(|entry| format!("under {}", entry.file_name().to_string_lossy())));
    }
    found.extend(openers(major, minor).iter().map(|(pid, name)| format!("open in process {pid} ({name})")));
    found.truncate(8);
    found
}

fn openers(want_major: u32, want_minor: u32) -> Vec<(u32, String)> {
    let me = std::process::id();
    let opens = |fds: PathBuf| {
        std::fs::read_dir(fds).is_ok_and(|list| {
            list.flatten().any(|fd| {
                // The link's text first: following it could wait on a dead network file system.
                std::fs::read_link(fd.path()).is_ok_and(|to| to.starts_with("/dev"))
                    && std::fs::metadata(fd.path()).is_ok_and(|meta| {
                        meta.file_type().is_block_device()
                            && (major(meta.rdev()), minor(meta.rdev())) == (want_major.into(), want_minor.into())
                    })
            })
        })
    };
    let pids = crate::host::mounts::processes().into_iter().filter(|pid| *pid != me);
    let mut found = Vec::new();
    for pid in pids.filter(|pid| opens(PathBuf::from(format!("/proc/{pid}/fd")))) {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        found.push((pid, name.trim().to_string()));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_are_written_plus_discarded() {
        assert_eq!(sectors_of("1 2 3 4 5 6 700 8 9 10 11 12 13 40 15 16 17\n"), Some(740));
        assert_eq!(sectors_of("1 2 3 4 5 6 700 8 9 10 11\n"), None, "a kernel without discard counters must not count as zero");
    }

    #[test]
    fn what_is_no_block_device_has_no_identity() {
        assert_eq!(identity(Path::new("/dev/null")).unwrap_err().code, Code::NotABlockImage);
        assert_eq!(identity(Path::new("/dev/no-such-device")).unwrap_err().code, Code::IoError);
        assert_eq!(hold_exclusive(Path::new("/"), false).unwrap_err().code, Code::NotABlockImage);
    }
}
