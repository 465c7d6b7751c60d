//! The double of the overflow directory: disks of a `durable::double::World`.

use crate::durable::Storage;
use crate::durable::double::World;
use crate::journal::Overflow;
use crate::model::{Position, Res};

/// Overflow files as disks named `overflow EPOCH GENERATION`.
#[derive(Debug)]
pub struct WorldOverflow(pub World);

fn name(position: Position) -> String {
    format!("overflow {} {}", position.epoch, position.generation)
}

impl Overflow for WorldOverflow {
    fn create(&mut self, position: Position, len_bytes: u64) -> Res<Box<dyn Storage>> {
        Ok(Box::new(self.0.create(&name(position), len_bytes)?))
    }
    fn existing(&mut self) -> Res<Vec<(Position, Box<dyn Storage>)>> {
        let mut found: Vec<(Position, Box<dyn Storage>)> = Vec::new();
        for disk in self.0.names() {
            let numbers: Vec<u64> = disk.split(' ').filter_map(|word| word.parse().ok()).collect();
            if let (true, [epoch, generation]) = (disk.starts_with("overflow "), numbers.as_slice()) {
                let position = Position { epoch: *epoch, generation: *generation };
                found.push((position, Box::new(self.0.disk(&disk, 0))));
            }
        }
        found.sort_by_key(|(position, _)| *position);
        Ok(found)
    }
    fn remove(&mut self, position: Position) -> Res<()> {
        self.0.remove(&name(position))
    }
}
