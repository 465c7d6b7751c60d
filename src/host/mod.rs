//! Owns the Linux host's tables and tools: loop devices, mounts, file-system tools, freeze.
//! Gives identities read through open descriptors, attached devices, frozen file systems.
//! Keeps a freeze bounded: a separate process thaws at the deadline or when the agent dies.
//! Never reads or writes what is on a device, never speaks to Docker.
//! Assumes the notes headed H in `kernel-notes.md`.

use crate::model::{FileSystem, Res};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Duration;

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

/// Attaches `file` (whole file, direct I/O when it can) to a free loop device. Already attached with the same mode: that one is
/// returned with `false`; attached otherwise: `VOLUME_IN_USE`. `.1` = newly attached.
pub fn attach_loop(_file: &Path, _read_only: bool) -> Res<(LoopDevice, bool)> { todo!() }
/// Loop devices whose backing file is this one (by inode).
pub fn loops_of(_file: &Path) -> Res<Vec<LoopDevice>> { todo!() }
/// Detaches and waits until the kernel has really let go; `VOLUME_IN_USE` when somebody holds it past `patience`.
pub fn detach_loop(_device: &LoopDevice, _patience: Duration) -> Res<()> { todo!() }
/// The identity of a block device, through an open descriptor.
pub fn identity(_device: &Path) -> Res<DeviceIdentity> { todo!() }
/// Sectors written plus discarded since the device came up (`/sys/dev/block/M:m/stat`, in 512-byte sectors).
pub fn sectors_changed(_major: u32, _minor: u32) -> Res<u64> { todo!() }
/// An exclusive open of a device: while it lives nobody can mount it. `VOLUME_IN_USE` names who holds it, where known.
pub fn hold_exclusive(_device: &Path, _writable: bool) -> Res<std::os::fd::OwnedFd> { todo!() }

/// One place where a device is mounted, in whatever mount namespace, reached through `/proc/PID/root`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountPoint {
    /// A path that this process can open.
    pub path: PathBuf,
    /// The file system's name.
    pub fs: String,
    /// Mounted read-only.
    pub read_only: bool,
}

/// Where a device is mounted, in any mount namespace (`/proc/*/mountinfo`), one entry per distinct mount namespace is enough.
pub fn mounts_of(_major: u32, _minor: u32) -> Res<Vec<MountPoint>> { todo!() }
/// Makes a file system. `TOOL_FAILED` with the tool's last line.
pub fn make_fs(_device: &Path, _fs: FileSystem) -> Res<()> { todo!() }
/// Replays the journal and checks: `e2fsck -p`, or mount+umount and `xfs_repair -n`. Returns whether anything was changed.
pub fn check_fs(_device: &Path, _fs: FileSystem, _scratch_dir: &Path) -> Res<bool> { todo!() }
/// syncfs(2) on the file system at `mount`.
pub fn sync_fs(_mount: &Path) -> Res<()> { todo!() }
/// Free bytes for root on the file system of `path`.
pub fn free_bytes(_path: &Path) -> Res<u64> { todo!() }
/// Puts a symlink `link` -> `target` in place, atomically (S8: Docker sees only the link).
pub fn point_link(_link: &Path, _target: &Path) -> Res<bool> { todo!() }

/// The small process that holds frozen file systems and thaws them at the deadline or when this process dies.
pub struct Freezer;

impl Freezer {
    /// Starts it: `program` is this binary, run with the hidden verb `freeze-helper` and a socket on descriptor 3.
    pub fn start(_program: &Path) -> Res<Freezer> { todo!() }
    /// Freezes all `mounts` or none, within `deadline` counted from the first freeze. Errors: `FREEZE_TIMEOUT`, `IO_ERROR`.
    pub fn freeze(&mut self, _mounts: &[PathBuf], _deadline: Duration) -> Res<Frozen<'_>> { todo!() }
}

/// Frozen file systems. Dropping it thaws.
pub struct Frozen<'a>(std::marker::PhantomData<&'a mut Freezer>);

impl Frozen<'_> {
    /// Thaws; gives how long the longest was frozen. `FREEZE_TIMEOUT` when the helper had already thawed: then nothing read
    /// meanwhile may be used.
    pub fn thaw(self) -> Res<Duration> { todo!() }
}

/// What the hidden verb runs: serves freeze requests on descriptor 3 until it closes, then thaws what is left.
pub fn freeze_helper_main() -> i32 { todo!() }
/// Thaws a file system that a dead helper may have left frozen; false when it was not frozen.
pub fn thaw_leftover(_mount: &Path) -> Res<bool> { todo!() }
