//! Overflow as files in a directory: one per generation that does not fit into the ring.

use crate::durable::{FileStorage, Storage, private_dir, remove_file};
use crate::journal::Overflow;
use crate::model::{Code, Fault, Position, Res};
use std::path::{Path, PathBuf};

const PREFIX: &str = "generation-";

/// Overflow files `generation-EPOCH-NUMBER` (hexadecimal) in a private directory of their own.
#[derive(Debug)]
pub struct DirOverflow {
    dir: PathBuf,
}

impl DirOverflow {
    /// Makes the directory if need be. Errors: as `durable::private_dir`.
    pub fn open(dir: &Path) -> Res<DirOverflow> {
        private_dir(dir)?;
        Ok(DirOverflow { dir: dir.to_owned() })
    }
    fn path(&self, position: Position) -> PathBuf {
        self.dir.join(format!("{PREFIX}{:016x}-{:016x}", position.epoch, position.generation))
    }
}

fn position_of(name: &str) -> Option<Position> {
    let (epoch, generation) = name.strip_prefix(PREFIX)?.split_once('-')?;
    let number = |text: &str| (text.len() == 16).then(|| u64::from_str_radix(text, 16).ok()).flatten();
    Some(Position { epoch: number(epoch)?, generation: number(generation)? })
}

impl Overflow for DirOverflow {
    fn create(&mut self, position: Position, len_bytes: u64) -> Res<Box<dyn Storage>> {
        let path = self.path(position);
        // One that was given up, perhaps of another length.
        remove_file(&path)?;
        match FileStorage::open_or_create(&path, len_bytes) {
            Ok((storage, _)) => Ok(Box::new(storage)),
            Err(fault) if fault.code == Code::DiskFull => Err(Fault { code: Code::StandbyDiskFull, ..fault }),
            Err(fault) => Err(fault),
        }
    }

    fn existing(&mut self) -> Res<Vec<(Position, Box<dyn Storage>)>> {
        let fail = |error: std::io::Error| Fault::io(self.dir.display().to_string(), &error);
        let mut found: Vec<(Position, Box<dyn Storage>)> = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(fail)? {
            let name = entry.map_err(fail)?.file_name();
            let Some(name) = name.to_str() else { continue };
            if name.starts_with('.') && name.ends_with(".new") {
                // A crash came while it was made; it never had its name.
                remove_file(&self.dir.join(name))?;
            } else if let Some(position) = position_of(name) {
                found.push((position, Box::new(FileStorage::open(&self.path(position))?)));
            }
        }
        found.sort_by_key(|(position, _)| *position);
        Ok(found)
    }

    fn remove(&mut self, position: Position) -> Res<()> {
        remove_file(&self.path(position))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_come_back_in_order_and_leftovers_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("overflow");
        let at = |epoch, generation| Position { epoch, generation };
        let mut overflow = DirOverflow::open(&dir).unwrap();
        for (position, len) in [(at(2, 1), 8192), (at(1, 300), 4096), (at(1, 300), 12288)] {
            overflow.create(position, len).unwrap();
        }
        std::fs::write(dir.join(".generation-0000000000000001-0000000000000002.new"), "half").unwrap();
        std::fs::write(dir.join("notes-of-somebody"), "").unwrap();
        let found: Vec<_> = overflow.existing().unwrap().iter().map(|(p, s)| (*p, s.len_bytes())).collect();
        assert_eq!(found, [(at(1, 300), 12288), (at(2, 1), 8192)]);
        overflow.remove(at(1, 300)).unwrap();
        overflow.remove(at(1, 300)).unwrap();
        assert_eq!(overflow.existing().unwrap().len(), 1);
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 2);
        assert_eq!(overflow.create(at(3, 1), 1 << 60).map(|_| ()).unwrap_err().code, Code::StandbyDiskFull);
    }
}
