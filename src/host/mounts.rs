//! Where a device is mounted, in every mount namespace that a process lives in.

use crate::model::{Fault, Res};
use nix::sys::stat::{major, minor};
use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// One place where a device is mounted, in whatever mount namespace, reached through `/proc/PID/root`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountPoint {
    /// A path that this process can open.
    pub path: PathBuf,
    /// The file system's name.
    pub fs: String,
    /// The file system itself is mounted read-only (a read-only view of a writable one does not count).
    pub read_only: bool,
}

/// Where a device is mounted, in any mount namespace (`/proc/*/mountinfo`), one entry per distinct mount namespace is enough.
///
/// Ours come first and as plain paths, and of those first the ones that still lead to the device (a later mount may lie on top).
/// Not shown, and found only by an exclusive open: mounts detached lazily, and namespaces that no process lives in. Error: `IO_ERROR`.
pub fn mounts_of(major: u32, minor: u32) -> Res<Vec<MountPoint>> {
    let own = std::fs::read("/proc/self/mountinfo").map_err(|e| Fault::io("/proc/self/mountinfo", &e))?;
    let mut found = mounts_in(&own, major, minor, Path::new("/"));
    let mut seen = HashSet::new();
    seen.extend(view(Path::new("/proc/self")));
    for pid in processes() {
        // A process may vanish at any of these steps; what it held is then gone with it.
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let Some(view) = view(&proc) else { continue };
        if seen.contains(&view) {
            continue;
        }
        let Ok(text) = std::fs::read(proc.join("mountinfo")) else { continue };
        seen.insert(view);
        found.extend(mounts_in(&text, major, minor, &proc.join("root")));
    }
    // Stable: within each kind the order is kept.
    found.sort_by_key(|mount| !leads_to(&mount.path, major, minor));
    Ok(found)
}

/// Process ids, ascending.
pub(super) fn processes() -> Vec<u32> {
    let Ok(list) = std::fs::read_dir("/proc") else { return Vec::new() };
    let mut pids: Vec<u32> = list.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    pids
}

/// What decides which lines a process's mountinfo shows: its mount namespace and, within that, its root directory.
fn view(proc: &Path) -> Option<(PathBuf, u64, u64)> {
    let namespace = std::fs::read_link(proc.join("ns/mnt")).ok()?;
    let root = std::fs::metadata(proc.join("root")).ok()?;
    Some((namespace, root.dev(), root.ino()))
}

/// Whether opening the path gives a file on that device. O_PATH: neither a dead server nor a FIFO is waited for.
fn leads_to(path: &Path, want_major: u32, want_minor: u32) -> bool {
    let open = File::options().read(true).custom_flags(libc::O_PATH).open(path);
    open.and_then(|file| file.metadata())
        .is_ok_and(|meta| (major(meta.dev()), minor(meta.dev())) == (want_major.into(), want_minor.into()))
}

/// The lines of a mountinfo that are of this device, as paths under `root`.
fn mounts_in(text: &[u8], major: u32, minor: u32, root: &Path) -> Vec<MountPoint> {
    let device = format!("{major}:{minor}");
    text.split(|b| *b == b'\n').filter_map(|line| parse(line, device.as_bytes(), root)).collect()
}

/// `36 35 98:0 /sub /mnt/point rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
fn parse(line: &[u8], device: &[u8], root: &Path) -> Option<MountPoint> {
    let mut fields = line.split(|b| *b == b' ');
    if fields.nth(2)? != device {
        return None;
    }
    let point = unescape(fields.nth(1)?);
    // Optional fields, any number of them, end with a single dash.
    fields.by_ref().find(|field| *field == b"-")?;
    let fs = String::from_utf8_lossy(&unescape(fields.next()?)).into_owned();
    let read_only = fields.nth(1)?.split(|b| *b == b',').any(|option| option == b"ro");
    let below = Path::new(OsStr::from_bytes(point.strip_prefix(b"/")?)).to_path_buf();
    Some(MountPoint { path: root.join(below), fs, read_only })
}

/// Space, tab, newline and backslash are written as a backslash and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut at = 0;
    while at < field.len() {
        let octal = |i: usize| field.get(i).filter(|b| (b'0'..=b'7').contains(b)).map(|b| u32::from(b - b'0'));
        match (field[at], octal(at + 1), octal(at + 2), octal(at + 3)) {
            (b'\\', Some(a), Some(b), Some(c)) if a * 64 + b * 8 + c < 256 => {
                out.push((a * 64 + b * 8 + c) as u8);
                at += 4;
            }
            (byte, ..) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TEXT: &[u8] = b"27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard\n\
        40 27 7:1 / /mnt/a\\040b\\134c rw,noatime shared:3 master:1 - xfs /dev/loop1 rw\n\
        41 27 7:1 /sub /mnt/view ro - xfs /dev/loop1 rw,attr2\n\
        42 27 7:11 / /mnt/other rw - ext4 /dev/loop11 ro\n\
        43 27 7:2 / /mnt/frozen rw - ext4 /dev/loop2 ro,noload\n\
        half a line 7:1";

    fn found(major: u32, minor: u32, root: &str) -> Vec<(PathBuf, String, bool)> {
        mounts_in(TEXT, major, minor, Path::new(root)).into_iter().map(|m| (m.path, m.fs, m.read_only)).collect()
    }

    #[test]
    fn only_lines_of_the_device_count_and_their_paths_are_unescaped() {
        let expected = [("/mnt/a b\\c".into(), "xfs".into(), false), ("/mnt/view".into(), "xfs".into(), false)];
        assert_eq!(found(7, 1, "/"), expected);
        assert_eq!(found(7, 2, "/proc/9/root"), [("/proc/9/root/mnt/frozen".into(), "ext4".into(), true)]);
        assert_eq!(found(254, 0, "/proc/9/root"), [("/proc/9/root/".into(), "ext4".into(), false)]);
        assert_eq!(found(7, 3, "/"), []);
    }

    #[test]
    fn this_process_finds_its_own_root() {
        let text = String::from_utf8(std::fs::read("/proc/self/mountinfo").unwrap()).unwrap();
        let root = text.lines().find(|line| line.split(' ').nth(4) == Some("/")).expect("a root mount");
        let (major, minor) = root.split(' ').nth(2).unwrap().split_once(':').unwrap();
        let found = mounts_of(major.parse().unwrap(), minor.parse().unwrap()).unwrap();
        assert!(found.iter().any(|mount| mount.path == Path::new("/")), "{found:?}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_without_panic(line in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = mounts_in(&line, 7, 1, Path::new("/"));
        }
        #[test]
        fn escapes_are_undone(name in prop::collection::vec(any::<u8>(), 0..50)) {
            let escaped: Vec<u8> = name.iter().flat_map(|b| match b {
                b' ' | b'\t' | b'\n' | b'\\' => format!("\\{b:03o}").into_bytes(),
                b => vec![*b],
            }).collect();
            prop_assert_eq!(unescape(&escaped), name);
        }
    }
}
