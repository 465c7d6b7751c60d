//! File systems: made, checked, synced, measured.

use crate::host::identity::{hold_exclusive, open_device};
use crate::host::{loops, tools};
use crate::model::{Code, Fault, FileSystem, Res};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

/// Makes a file system. `TOOL_FAILED` with the tool's last line; `VOLUME_IN_USE` when the device is mounted or held.
///
/// ext4: all tables are written now or known to be zero. By default the kernel would zero them in the background after the first
/// mount, for hours on a large volume, and each of those writes would be replicated. On a loop device whose file has no block yet
/// nothing need be written at all (`assume_storage_prezeroed`), so a sparse image stays sparse.
/// XFS: its own defaults, which write little. Both may discard: it makes a reused image sparse again.
pub fn make_fs(device: &Path, fs: FileSystem) -> Res<()> {
    drop(hold_exclusive(device, true)?);
    let (tool, package) = match fs {
        FileSystem::Ext4 => ("mkfs.ext4", "e2fsprogs"),
        FileSystem::Xfs => ("mkfs.xfs", "xfsprogs"),
    };
    let at_once: &[&str] = &["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"];
    let ended = match fs {
        FileSystem::Xfs => tools::run(tool, &["-q", "-f"], device, package)?,
        FileSystem::Ext4 if is_all_hole(device)? => {
            let ended = tools::run(tool, &["-q", "-F", "-E", "assume_storage_prezeroed=1"], device, package)?;
            // e2fsprogs before 1.47 does not know the option and has then not touched the device.
            match ended.code != Some(0) && ended.said.contains("assume_storage_prezeroed") {
                true => tools::run(tool, at_once, device, package)?,
                false => ended,
            }
        }
        FileSystem::Ext4 => tools::run(tool, at_once, device, package)?,
    };
    match ended.code {
        Some(0) => Ok(()),
        _ => Err(tools::failed(tool, device, &ended)),
    }
}

/// Whether this is a loop device over a file without a single block. The file is believed only if it is the very inode attached.
fn is_all_hole(device: &Path) -> Res<bool> {
    let open = open_device(device, false, 0)?;
    let rdev = open.metadata().map_err(|e| Fault::io(device.display().to_string(), &e))?.rdev();
    let (major, minor) = (nix::sys::stat::major(rdev), nix::sys::stat::minor(rdev));
    let Ok(path) = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/loop/backing_file")) else { return Ok(false) };
    let Ok(Some(status)) = loops::status(&open) else { return Ok(false) };
    let backing = status.backing();
    Ok(std::fs::metadata(path.trim_end_matches('\n'))
        .is_ok_and(|meta| (meta.dev(), meta.ino()) == (backing.dev, backing.inode) && meta.blocks() == 0))
}

/// Replays the journal and checks: `e2fsck -p`, or mount+umount and `xfs_repair -n`. Returns whether anything was changed.
///
/// `scratch_dir` (made if missing) serves as mount point, inside a mount namespace of its own: nobody else ever sees that mount,
/// and the kernel undoes it should this process die. A journal that was replayed counts as a change. ext4 is searched in full only
/// when its own state asks for that. Errors: `FILE_SYSTEM_DAMAGED`, `VOLUME_IN_USE`, `TOOL_FAILED`, `IO_ERROR`.
pub fn check_fs(device: &Path, fs: FileSystem, scratch_dir: &Path) -> Res<bool> {
    drop(hold_exclusive(device, true)?);
    match fs {
        FileSystem::Ext4 => check_ext4(device),
        FileSystem::Xfs => check_xfs(device, scratch_dir),
    }
}

fn damaged(device: &Path, cause: String, tool: &str) -> Fault {
    let next = format!("look at it with {tool} on a copy, or promote an older restore point");
    Fault::new(Code::FileSystemDamaged, device.display().to_string(), cause, next)
}

fn check_ext4(device: &Path) -> Res<bool> {
    let ended = tools::run("e2fsck", &["-p"], device, "e2fsprogs")?;
    match ended.code {
        Some(0) => Ok(ended.said.contains("recovering journal")),
        Some(1) => Ok(true),
        // 2 asks for a reboot (the device was in use), 4 is damage, 8 an operational error: no file system that it knows.
        Some(code) if code & !0b1111 == 0 => {
            Err(damaged(device, format!("e2fsck ended with {code}: {}", words(&ended)), "e2fsck"))
        }
        _ => Err(tools::failed("e2fsck", device, &ended)),
    }
}

/// The first line that is no advice: e2fsck's last lines are about superblocks in general.
fn words(ended: &tools::Ended) -> String {
    let line = ended.said.lines().map(str::trim).find(|line| line.contains("UNEXPECTED") || line.contains("Bad magic"));
    line.map_or_else(|| ended.last_words(), |line| line.chars().filter(|c| !c.is_control()).take(300).collect())
}

fn check_xfs(device: &Path, scratch_dir: &Path) -> Res<bool> {
    // Asked before the mount replays it. Garbage has no state at all: then the mount is the judge.
    let log = tools::run("xfs_logprint", &["-t"], device, "xfsprogs")?;
    let replayed = log.said.contains("<DIRTY>");
    mount_once(device, scratch_dir)?;
    let ended = tools::run("xfs_repair", &["-n"], device, "xfsprogs")?;
    match ended.code {
        Some(0) => Ok(replayed),
        Some(1) => Err(damaged(device, format!("xfs_repair found damage: {}", ended.last_words()), "xfs_repair")),
        _ => Err(tools::failed("xfs_repair", device, &ended)),
    }
}

/// Mounts and unmounts an XFS, which replays its log.
fn mount_once(device: &Path, scratch_dir: &Path) -> Res<()> {
    std::fs::create_dir_all(scratch_dir).map_err(|e| Fault::io(scratch_dir.display().to_string(), &e))?;
    let (device, scratch) = (device.to_path_buf(), scratch_dir.to_path_buf());
    // A thread of its own, because a mount namespace belongs to a thread and is left for good.
    let work = move || -> Res<()> {
        let none = None::<&str>;
        let apart = || -> nix::Result<()> {
            unshare(CloneFlags::CLONE_NEWNS)?;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        };
        apart().map_err(|e| Fault::io("a mount namespace of our own", &e.into()))?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME;
        // A clone of this volume may be mounted at the same time, with the same UUID.
        mount(Some(&device), &scratch, Some("xfs"), flags, Some("nouuid")).map_err(|error| match error {
            Errno::EBUSY => {
                Fault::new(Code::VolumeInUse, device.display().to_string(), "it is in use", "stop what uses it, then try again")
            }
            Errno::ENODEV => {
                Fault::new(Code::KernelUnsupported, "xfs", "this kernel cannot mount it", "load the module xfs and try again")
            }
            Errno::EINVAL | Errno::EUCLEAN | Errno::EIO | Errno::EBADMSG | Errno::ENOSPC => {
                damaged(&device, format!("the kernel cannot mount it: {error}"), "xfs_repair")
            }
            error => Fault::io(format!("mounting {}", device.display()), &error.into()),
        })?;
        for _ in 0..50 {
            match umount2(&scratch, MntFlags::UMOUNT_NOFOLLOW) {
                Ok(()) => return Ok(()),
                Err(Errno::EBUSY | Errno::EINTR) => std::thread::sleep(Duration::from_millis(20)),
                Err(error) => return Err(Fault::io(format!("unmounting {}", scratch.display()), &error.into())),
            }
        }
        Err(Fault::new(Code::VolumeInUse, scratch.display().to_string(), "it cannot be unmounted", "try again"))
    };
    let thread = std::thread::Builder::new().name("check-xfs".into()).spawn(work).map_err(|e| Fault::io("a thread", &e))?;
    thread.join().unwrap_or_else(|_| Err(Fault::internal("checking a file system", "the thread panicked")))
}

/// syncfs(2) on the file system at `mount`. Error: `IO_ERROR` (also when the file system lost a page since it was last asked).
pub fn sync_fs(mount: &Path) -> Res<()> {
    let fault = |error: std::io::Error| Fault::io(format!("syncing {}", mount.display()), &error);
    let file = open_on(mount)?;
    // SAFETY: no memory is involved.
    let rc = unsafe { libc::syncfs(file.as_raw_fd()) };
    Errno::result(rc).map(drop).map_err(|e| fault(e.into()))
}

/// Opens whatever a mount point is (a directory, or a file that was bound), without waiting for anything.
pub(super) fn open_on(mount: &Path) -> Res<File> {
    let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(mount);
    opened.map_err(|e| Fault::io(mount.display().to_string(), &e))
}

/// Free bytes for anybody, without what is reserved, on the file system of `path`.
pub fn free_bytes(path: &Path) -> Res<u64> {
    let stat = nix::sys::statvfs::statvfs(path).map_err(|e| Fault::io(path.display().to_string(), &e.into()))?;
    Ok((stat.blocks_available() as u64).saturating_mul(stat.fragment_size() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_space_is_asked_of_the_right_place() {
        assert!(free_bytes(Path::new("/proc/self/cwd")).unwrap() > 0);
        assert_eq!(free_bytes(Path::new("/no/such/place")).unwrap_err().code, Code::IoError);
        sync_fs(tempfile::tempdir().unwrap().path()).unwrap();
        assert_eq!(sync_fs(Path::new("/no/such/place")).unwrap_err().code, Code::IoError);
    }

    #[test]
    fn what_is_no_device_gets_no_file_system() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        for fs in [FileSystem::Ext4, FileSystem::Xfs] {
            assert_eq!(make_fs(&file, fs).unwrap_err().code, Code::NotABlockImage);
            assert_eq!(check_fs(&file, fs, dir.path()).unwrap_err().code, Code::NotABlockImage);
        }
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    }
}
