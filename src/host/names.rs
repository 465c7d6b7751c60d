//! Symlinks that stand for devices.

use crate::model::{Code, Fault, Res};
use std::io;
use std::path::Path;

/// Puts a symlink `link` -> `target` in place, atomically (S8: Docker sees only the link). Gives whether anything changed.
/// Errors: `NAME_TAKEN` when something else than a symlink is there, `IO_ERROR`.
///
/// The link is made anew at every attach, so it need not survive power loss and nothing is flushed.
pub fn point_link(link: &Path, target: &Path) -> Res<bool> {
    let fault = |error: io::Error| Fault::io(link.display().to_string(), &error);
    match std::fs::symlink_metadata(link) {
        Ok(meta) if meta.is_symlink() => {
            if std::fs::read_link(link).map_err(fault)? == target {
                return Ok(false);
            }
        }
        Ok(_) => {
            let next = "move it out of the way; doublure wants to put a symlink there";
            return Err(Fault::new(Code::NameTaken, link.display().to_string(), "it is there already and is no symlink", next));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(fault(error)),
    }
    let Some(name) = link.file_name() else {
        return Err(Fault::new(Code::BadArgument, link.display().to_string(), "it names no file", "give the link a name"));
    };
    let mut new = std::ffi::OsString::from(".");
    new.push(name);
    new.push(format!(".{}.new", std::process::id()));
    let new = link.with_file_name(new);
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(fault(error)),
        _ => {}
    }
    std::os::unix::fs::symlink(target, &new).map_err(fault)?;
    if let Err(error) = std::fs::rename(&new, link) {
        let _ = std::fs::remove_file(&new);
        return Err(fault(error));
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_made_left_alone_and_moved() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("volume");
        assert!(point_link(&link, Path::new("/dev/loop1")).unwrap());
        assert!(!point_link(&link, Path::new("/dev/loop1")).unwrap());
        assert!(point_link(&link, Path::new("/dev/loop2")).unwrap());
        assert_eq!(std::fs::read_link(&link).unwrap(), Path::new("/dev/loop2"));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "the temporary name stayed");
    }

    #[test]
    fn nothing_but_a_symlink_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let taken = dir.path().join("file");
        std::fs::write(&taken, "mine").unwrap();
        assert_eq!(point_link(&taken, Path::new("/dev/loop1")).unwrap_err().code, Code::NameTaken);
        assert_eq!(point_link(&dir.path().join("no/such"), Path::new("/x")).unwrap_err().code, Code::IoError);
        assert_eq!(std::fs::read_to_string(&taken).unwrap(), "mine");
    }
}
