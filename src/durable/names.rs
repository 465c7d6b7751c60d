//! Names that survive power loss: replacement, removal, private directories and the lock on one.

use crate::model::{Code, Fault, Res};
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

fn fail(path: &Path, error: &std::io::Error) -> Fault {
    Fault::io(path.display().to_string(), error)
}

/// The directory that a name stands in.
pub(super) fn dir_of(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// The name that a file has until it is whole. One writer per directory is assumed (see [`lock_dir`]): a leftover is overwritten.
pub(super) fn temporary(path: &Path) -> Res<PathBuf> {
    let Some(name) = path.file_name() else {
        return Err(Fault::new(Code::BadArgument, path.display().to_string(), "it names no file", "give the path of a file"));
    };
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(".new");
    Ok(path.with_file_name(hidden))
}

/// Makes the names in a directory durable.
pub(super) fn flush_dir(dir: &Path) -> Res<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|error| match fail(dir, &error) {
        full if full.code == Code::DiskFull => full,
        other => Fault { code: Code::FlushFailed, ..other },
    })
}

/// Replaces a small file whole or not at all: temporary in the same directory, flush, rename, flush of the directory. Mode 0600.
///
/// 1. write `.NAME.new`  2. flush it  3. rename it to NAME  4. flush the directory.
pub fn replace_file(path: &Path, bytes: &[u8]) -> Res<()> {
    let new = temporary(path)?;
    // A leftover of an earlier crash would keep its mode; it goes first.
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(fail(&new, &error)),
        _ => {}
    }
    let flags = libc::O_CLOEXEC | libc::O_NOFOLLOW;
    let written =
        OpenOptions::new().write(true).create_new(true).mode(0o600).custom_flags(flags).open(&new).and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        });
    if let Err(error) = written.and_then(|()| std::fs::rename(&new, path)) {
        let _ = std::fs::remove_file(&new);
        return Err(fail(path, &error));
    }
    flush_dir(dir_of(path))
}

/// Removes a file and makes the removal durable; fine when it is not there.
pub fn remove_file(path: &Path) -> Res<()> {
    match std::fs::remove_file(path) {
        Ok(()) => flush_dir(dir_of(path)),
        // Perhaps removed just before a crash, and not yet durably so.
        Err(error) if error.kind() == ErrorKind::NotFound && dir_of(path).is_dir() => flush_dir(dir_of(path)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(fail(path, &error)),
    }
}

/// Makes a directory (0700, ours) or checks that it is one; `STATE_DIR_UNSAFE` otherwise.
pub fn private_dir(path: &Path) -> Res<()> {
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => flush_dir(dir_of(path))?,
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        Err(error) => return Err(fail(path, &error)),
    }
    let unsafe_because =
        |cause: String, next: String| Err(Fault::new(Code::StateDirUnsafe, path.display().to_string(), cause, next));
    let meta = std::fs::symlink_metadata(path).map_err(|error| fail(path, &error))?;
    if !meta.file_type().is_dir() {
        return unsafe_because("it is not a directory".into(), "move it away, or configure another directory".into());
    }
    let us = nix::unistd::geteuid().as_raw();
    if meta.uid() != us {
        return unsafe_because(
            format!("it belongs to user {}, not to {us}", meta.uid()),
            format!("chown {us} it, after looking inside"),
        );
    }
    match meta.mode() & 0o077 {
        0 => Ok(()),
        _ => unsafe_because(
            format!("others may enter it (mode {:04o})", meta.mode() & 0o7777),
            "chmod 0700 it, after looking inside".into(),
        ),
    }
}

/// Takes the lock of a state directory (OFD lock on `lock`); `STATE_DIR_HELD` names the holder's pid.
///
/// The lock belongs to the returned descriptor and goes with it, however the process ends.
pub fn lock_dir(dir: &Path) -> Res<OwnedFd> {
    let path = dir.join("lock");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
        .open(&path)
        .map_err(|error| fail(&path, &error))?;
    let whole = libc::flock { l_type: libc::F_WRLCK as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
    match nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&whole)) {
        Ok(_) => {}
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => {
            // An OFD lock has no pid of its own to ask for; the holder wrote it down.
            let mut text = String::new();
            let _ = Read::by_ref(&mut file).take(32).read_to_string(&mut text);
            let holder = match text.trim().parse::<u32>() {
                Ok(pid) => format!("the process with pid {pid} holds it"),
                Err(_) => "another process holds it".into(),
            };
            return Err(Fault::new(Code::StateDirHeld, dir.display().to_string(), holder, "stop that agent first, or use it"));
        }
        Err(error) => return Err(fail(&path, &error.into())),
    }
    let pid = std::process::id().to_string();
    file.set_len(0).and_then(|()| file.write_all_at(pid.as_bytes(), 0)).map_err(|error| fail(&path, &error))?;
    Ok(file.into())
}
