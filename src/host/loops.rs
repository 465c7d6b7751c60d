//! Loop devices, by ioctl: attached whole, found by inode, detached for certain.

use crate::host::identity::{Backing, DeviceIdentity, in_use, of_open};
use crate::model::{Code, Fault, Res};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const LOOP_CLR_FD: libc::Ioctl = 0x4C01;
const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// How often a free device may be snatched away before we give up.
const TRIES: u32 = 200;
/// How long a device's node may take to appear, and another attacher of the same file to finish.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(5);

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Status {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Status,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<Status>() == 232 && size_of::<Config>() == 304);

impl Status {
    const ZERO: Status = Status {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        sizelimit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
    pub(super) fn backing(&self) -> Backing {
        Backing { dev: self.device, inode: self.inode, offset_bytes: self.offset, sizelimit_bytes: self.sizelimit }
    }
}

/// An attached loop device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoopDevice {
    /// `/dev/loopN`.
    pub path: PathBuf,
    /// N.
    pub number: u32,
    /// Its identity at attach.
    pub identity: DeviceIdentity,
}

/// What is attached to a loop device; `None` when nothing is.
pub(super) fn status(device: &File) -> io::Result<Option<Status>> {
    let mut status = Status::ZERO;
    // SAFETY: LOOP_GET_STATUS64 writes one loop_info64 to the place given, whose size is asserted above.
    let rc = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, &raw mut status) };
    match Errno::result(rc) {
        Ok(_) => Ok(Some(status)),
        Err(Errno::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Attaches `file` (whole file, direct I/O when it can) to a free loop device. Already attached with the same mode: that one is
/// returned with `false`; attached otherwise: `VOLUME_IN_USE`. `.1` = newly attached.
///
/// "Otherwise" is: another mode, an offset or a size limit, more than one device, or a device that vanishes at its last close
/// (autoclear). The device has sectors of 512 bytes whatever the disk beneath has, because a volume must be mountable on the other
/// host too, and a file system made for small sectors cannot be mounted on large ones.
/// Further errors: `NOT_A_BLOCK_IMAGE`, `IO_ERROR`, `KERNEL_UNSUPPORTED` (before 5.8).
pub fn attach_loop(file: &Path, read_only: bool) -> Res<(LoopDevice, bool)> {
    let name = || file.display().to_string();
    let io_fault = |error: io::Error| Fault::io(name(), &error);
    let not_image = |cause: String| Fault::new(Code::NotABlockImage, name(), cause, "name a disk image");
    let pin = File::options().read(true).custom_flags(libc::O_PATH).open(file).map_err(io_fault)?;
    let meta = pin.metadata().map_err(io_fault)?;
    if !meta.is_file() || meta.len() == 0 || !meta.len().is_multiple_of(512) {
        return Err(not_image("it is not a regular file of whole 512-byte sectors".into()));
    }
    let same = format!("/proc/self/fd/{}", pin.as_raw_fd());
    // Two attachers of one file must not both find none: a lock on a descriptor of its own (the loop device keeps the other one).
    let _turn = lock(File::open(&same).map_err(io_fault)?, file)?;
    let mut attached = loops_of_inode(meta.dev(), meta.ino())?;
    if let Some((device, status)) = attached.pop() {
        let whole = status.offset == 0 && status.sizelimit == 0;
        let lasting = status.flags & LO_FLAGS_AUTOCLEAR == 0;
        if attached.is_empty() && whole && lasting && (status.flags & LO_FLAGS_READ_ONLY != 0) == read_only {
            return Ok((device, false));
        }
        let mut names: Vec<String> = attached.iter().map(|(device, _)| device.path.display().to_string()).collect();
        names.push(device.path.display().to_string());
        let cause = format!("it is attached already, in another way, to {}", names.join(" and "));
        return Err(Fault::new(Code::VolumeInUse, name(), cause, "detach it there (losetup -d), then try again"));
    }
    let backing = File::options().read(true).write(!read_only).open(&same).map_err(io_fault)?;
    let (number, device, path) = configure(&backing, file, read_only)?;
    let identity = of_open(&device, &path)?;
    match &identity.backing {
        Some(found) if (found.dev, found.inode) == (meta.dev(), meta.ino()) => Ok((LoopDevice { path, number, identity }, true)),
        _ => Err(Fault::new(
            Code::IdentityChanged,
            path.display().to_string(),
            format!("it was taken for something else as soon as {} was attached to it", name()),
            "look at `losetup` and stop whatever manages loop devices beside doublure",
        )),
    }
}

/// Waits for our turn with this file.
fn lock(file: File, path: &Path) -> Res<Flock<File>> {
    let until = Instant::now() + PATIENCE;
    let mut file = file;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, Errno::EWOULDBLOCK | Errno::EINTR)) if Instant::now() < until => {
                file = back;
                std::thread::sleep(PAUSE);
            }
            Err((_, Errno::EWOULDBLOCK)) => {
                let next = "find the holder in /proc/locks and stop it";
                return Err(Fault::new(
                    Code::VolumeInUse,
                    path.display().to_string(),
                    "another program keeps it locked (flock)",
                    next,
                ));
            }
            Err((_, error)) => return Err(Fault::io(path.display().to_string(), &error.into())),
        }
    }
}

/// Puts the open file on some free device.
fn configure(backing: &File, file: &Path, read_only: bool) -> Res<(u32, File, PathBuf)> {
    let control =
        File::options().read(true).write(true).open("/dev/loop-control").map_err(|e| Fault::io("/dev/loop-control", &e))?;
    let mut direct = true;
    for _ in 0..TRIES {
        // SAFETY: LOOP_CTL_GET_FREE takes no argument.
        let free = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        let number = Errno::result(free).map_err(|e| Fault::io("/dev/loop-control", &e.into()))? as u32;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = open_node(&path, read_only)?;
        match set(device.as_raw_fd(), backing, file, read_only, direct) {
            Ok(()) => return Ok((number, device, path)),
            // Somebody was faster: the next free one, please.
            Err(Errno::EBUSY) => std::thread::sleep(Duration::from_millis(1)),
            Err(Errno::EINVAL) if direct => direct = false,
            Err(Errno::EINVAL | Errno::ENOTTY) => {
                let cause = "this kernel cannot set up a loop device in one step (LOOP_CONFIGURE)";
                return Err(Fault::new(Code::KernelUnsupported, path.display().to_string(), cause, "use Linux 5.8 or later"));
            }
            Err(error) => return Err(Fault::io(format!("attaching {} to {}", file.display(), path.display()), &error.into())),
        }
    }
    let cause = "every free loop device was taken by somebody else first";
    Err(Fault::new(Code::TimedOut, file.display().to_string(), cause, "try again when fewer programs attach loop devices"))
}

/// Opens the node of a device that may have been made a moment ago.
fn open_node(path: &Path, read_only: bool) -> Res<File> {
    let until = Instant::now() + PATIENCE;
    loop {
        match File::options().read(true).write(!read_only).open(path) {
            Ok(file) => return Ok(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound && Instant::now() < until => std::thread::sleep(PAUSE),
            Err(error) => return Err(Fault::io(path.display().to_string(), &error)),
        }
    }
}

fn set(device: RawFd, backing: &File, file: &Path, read_only: bool, direct: bool) -> Result<(), Errno> {
    let mut info = Status::ZERO;
    info.flags = if read_only { LO_FLAGS_READ_ONLY } else { 0 } | if direct { LO_FLAGS_DIRECT_IO } else { 0 };
    // Only for people who look at `losetup`; cut to what fits with its NUL.
    let shown = file.as_os_str().as_bytes();
    let len = shown.len().min(info.file_name.len() - 1);
    info.file_name[..len].copy_from_slice(&shown[..len]);
    let config = Config { fd: backing.as_raw_fd() as u32, block_size: 512, info, reserved: [0; 8] };
    // SAFETY: LOOP_CONFIGURE reads one loop_config, whose size is asserted above; the kernel takes its own reference to the file.
    let rc = unsafe { libc::ioctl(device, LOOP_CONFIGURE, &raw const config) };
    Errno::result(rc).map(drop)
}

/// Loop devices whose backing file is this one (by inode). Errors: `IO_ERROR`.
pub fn loops_of(file: &Path) -> Res<Vec<LoopDevice>> {
    let meta = std::fs::metadata(file).map_err(|e| Fault::io(file.display().to_string(), &e))?;
    Ok(loops_of_inode(meta.dev(), meta.ino())?.into_iter().map(|(device, _)| device).collect())
}

/// Every attached device is asked by ioctl: the path in sysfs may be cut, renamed, deleted, or of another mount namespace.
fn loops_of_inode(dev: u64, inode: u64) -> Res<Vec<(LoopDevice, Status)>> {
    let mut found = Vec::new();
    for number in attached_numbers()? {
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = match File::open(&path) {
            Ok(device) => device,
            // Detached or removed since it was listed; a node that is missing while the device is attached is an error below.
            Err(_) if !is_attached(number) => continue,
            Err(error) => return Err(Fault::io(path.display().to_string(), &error)),
        };
        let Some(status) = status(&device).map_err(|e| Fault::io(path.display().to_string(), &e))? else { continue };
        if (status.device, status.inode) == (dev, inode) {
            let identity = of_open(&device, &path)?;
            if identity.backing == Some(status.backing()) {
                found.push((LoopDevice { path, number, identity }, status));
            }
        }
    }
    Ok(found)
}

fn attached_numbers() -> Res<Vec<u32>> {
    let list = std::fs::read_dir("/sys/block").map_err(|e| Fault::io("/sys/block", &e))?;
    let names = list.flatten().map(|entry| entry.file_name());
    let mut numbers: Vec<u32> = names.filter_map(|name| name.to_str()?.strip_prefix("loop")?.parse().ok()).collect();
    numbers.retain(|number| is_attached(*number));
    numbers.sort_unstable();
    Ok(numbers)
}

fn is_attached(number: u32) -> bool {
    Path::new(&format!("/sys/block/loop{number}/loop")).exists()
}

/// Detaches and waits until the kernel has really let go; `VOLUME_IN_USE` when somebody holds it past `patience`.
///
/// Fine when it is gone already, also when its number serves another file by now: that one is left alone. After `VOLUME_IN_USE` the
/// kernel detaches by itself at the holder's last close.
pub fn detach_loop(device: &LoopDevice, patience: Duration) -> Res<()> {
    let fault = |error: io::Error| Fault::io(device.path.display().to_string(), &error);
    let until = Instant::now() + patience;
    let mut asked = false;
    loop {
        if !is_attached(device.number) {
            return Ok(());
        }
        let open = match File::open(&device.path) {
            Ok(open) => open,
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENOENT | libc::ENODEV))
                    && !is_attached(device.number) =>
            {
                return Ok(());
            }
            Err(error) => return Err(fault(error)),
        };
        let now = of_open(&open, &device.path)?;
        let ours =
            |backing: &Backing| Some((backing.dev, backing.inode)) == device.identity.backing.as_ref().map(|b| (b.dev, b.inode));
        match &now.backing {
            // Between "nothing attached" and the end of the clean-up in sysfs.
            None => {}
            Some(backing) if now.diskseq != device.identity.diskseq || !ours(backing) => return Ok(()),
            Some(_) if !asked => {
                // SAFETY: LOOP_CLR_FD takes no argument.
                match Errno::result(unsafe { libc::ioctl(open.as_raw_fd(), LOOP_CLR_FD) }) {
                    // With a second opener this only marks the device, and the kernel lets go at the last close.
                    Ok(_) => asked = true,
                    Err(Errno::ENXIO) => {}
                    Err(Errno::EBUSY | Errno::EINTR) => {}
                    Err(error) => return Err(fault(error.into())),
                }
            }
            Some(_) => {}
        }
        if Instant::now() >= until {
            let who = in_use(&device.path, &open);
            // Our own descriptor may be the last one: give it back before judging.
            drop(open);
            return if gone_soon(device.number) { Ok(()) } else { Err(who) };
        }
        drop(open);
        // Looking by opening would itself keep a marked device alive; look at sysfs for a while.
        for _ in 0..10 {
            if !is_attached(device.number) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn gone_soon(number: u32) -> bool {
    (0..10).any(|_| {
        std::thread::sleep(Duration::from_millis(2));
        !is_attached(number)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_attached_is_refused_before_a_device_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let ragged = dir.path().join("ragged");
        std::fs::write(&ragged, [0; 100]).unwrap();
        for path in [dir.path(), &ragged, Path::new("/dev/null")] {
            assert_eq!(attach_loop(path, false).unwrap_err().code, Code::NotABlockImage, "{path:?}");
        }
        assert_eq!(attach_loop(&dir.path().join("none"), false).unwrap_err().code, Code::IoError);
        assert_eq!(loops_of(&dir.path().join("none")).unwrap_err().code, Code::IoError);
    }
}
