//! The double of a disk: a volatile cache over a medium, trouble on demand, and every state that a power cut can leave.
//!
//! A [`World`] holds disks by name and keeps a log of what was done to all of them, in order. [`crash_states`] walks such a log
//! and shows, for every place in it, what the media may hold if the power goes there: unflushed writes in every combination,
//! each of them whole or torn between sectors. It imitates the medium, not a file system: names are durable when made.

use crate::durable::Storage;
use crate::model::{Code, Fault, Res};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a disk writes whole or not at all, in bytes.
pub const SECTOR_BYTES: usize = 512;
const PAGE_BYTES: usize = 4096;

/// The bytes of one disk; what was never written is zero and costs nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    pages: BTreeMap<u64, Arc<[u8; PAGE_BYTES]>>,
    len_bytes: u64,
}

impl Image {
    /// An image of zeroes.
    pub fn new(len_bytes: u64) -> Image {
        Image { pages: BTreeMap::new(), len_bytes }
    }
    /// Length in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }
    /// Puts bytes in.
    pub fn write(&mut self, mut offset: u64, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let skip = (offset % PAGE_BYTES as u64) as usize;
            let len = bytes.len().min(PAGE_BYTES - skip);
            let page = self.pages.entry(offset / PAGE_BYTES as u64).or_insert_with(|| Arc::new([0; PAGE_BYTES]));
            Arc::make_mut(page)[skip..skip + len].copy_from_slice(&bytes[..len]);
            (offset, bytes) = (offset + len as u64, &bytes[len..]);
        }
    }
    /// Takes bytes out.
    pub fn read(&self, mut offset: u64, mut buffer: &mut [u8]) {
        while !buffer.is_empty() {
            let skip = (offset % PAGE_BYTES as u64) as usize;
            let len = buffer.len().min(PAGE_BYTES - skip);
            let (piece, rest) = buffer.split_at_mut(len);
            match self.pages.get(&(offset / PAGE_BYTES as u64)) {
                Some(page) => piece.copy_from_slice(&page[skip..skip + len]),
                None => piece.fill(0),
            }
            (offset, buffer) = (offset + len as u64, rest);
        }
    }
}

/// What was done to a world, in order.
#[derive(Clone, Debug)]
pub enum Op {
    /// Bytes went to a disk's cache.
    Write {
        /// The disk.
        disk: String,
        /// Where, in bytes.
        offset: u64,
        /// What.
        bytes: Arc<[u8]>,
    },
    /// The cache of a disk went to its medium.
    Flush(String),
    /// The cache of a disk was lost without a power cut (a failed flush).
    Lost(String),
    /// A disk was made, zero and durable.
    Create(String, u64),
    /// A disk is gone.
    Remove(String),
    /// The test's own remark, for instance that something was acknowledged.
    Note(u64),
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The call fails and does nothing.
    Fails,
    /// A write fails after half of its sectors; a flush fails after half of the cached writes.
    FailsHalfway,
    /// The call fails although it did all that it should.
    FailsAfterwards,
    /// A flush fails and what was cached is lost (the kernel's own way); other calls fail.
    FailsAndForgets,
    /// The call says that all is well and did nothing. A read gives what was there.
    Lies,
    /// One bit of a write is turned over, or of what is read.
    FlipsABit,
}

impl Trouble {
    /// All of them.
    pub const ALL: [Trouble; 6] = [
        Trouble::Fails,
        Trouble::FailsHalfway,
        Trouble::FailsAfterwards,
        Trouble::FailsAndForgets,
        Trouble::Lies,
        Trouble::FlipsABit,
    ];
}

#[derive(Clone, Debug)]
struct Disk {
    medium: Image,
    cached: Vec<(u64, Arc<[u8]>)>,
    /// Medium and cache together: what a read gives.
    view: Image,
}

impl Disk {
    fn new(medium: Image) -> Disk {
        Disk { view: medium.clone(), medium, cached: Vec::new() }
    }
}

#[derive(Debug, Default)]
struct State {
    disks: BTreeMap<String, Disk>,
    log: Vec<Op>,
    calls: u64,
    trouble: Option<(u64, Trouble)>,
    struck: Option<(String, u64)>,
}

impl State {
    /// The trouble of this call, which is counted.
    fn call(&mut self) -> Option<Trouble> {
        self.calls += 1;
        self.trouble.filter(|(at, _)| *at == self.calls - 1).map(|(_, trouble)| trouble)
    }
    fn disk(&mut self, name: &str) -> Res<&mut Disk> {
        self.disks.get_mut(name).ok_or_else(|| Fault::new(Code::IoError, name, "there is no such disk", "look at the test"))
    }
    fn write(&mut self, name: &str, offset: u64, bytes: &[u8]) -> Res<()> {
        let bytes: Arc<[u8]> = bytes.into();
        let disk = self.disk(name)?;
        disk.view.write(offset, &bytes);
        disk.cached.push((offset, bytes.clone()));
        self.log.push(Op::Write { disk: name.into(), offset, bytes });
        Ok(())
    }
    fn flush(&mut self, name: &str) -> Res<()> {
        let disk = self.disk(name)?;
        for (offset, bytes) in disk.cached.drain(..) {
            disk.medium.write(offset, &bytes);
        }
        self.log.push(Op::Flush(name.into()));
        Ok(())
    }
    fn forget(&mut self, name: &str) -> Res<()> {
        let disk = self.disk(name)?;
        disk.cached.clear();
        disk.view = disk.medium.clone();
        self.log.push(Op::Lost(name.into()));
        Ok(())
    }
}

fn eio(what: &str, name: &str) -> Fault {
    Fault::new(Code::IoError, name, format!("a planted {what} error"), "look at the test")
}

/// Disks by name, what was done to them, and what is to go wrong. Clones share one world.
#[derive(Clone, Debug, Default)]
pub struct World(Arc<Mutex<State>>);

/// What the media hold when the power comes back, by disk.
pub type Disks = BTreeMap<String, Image>;

impl World {
    /// A world without disks.
    pub fn new() -> World {
        World::default()
    }
    /// A world after power on.
    pub fn from_disks(disks: &Disks) -> World {
        let world = World::new();
        world.state().disks = disks.iter().map(|(name, image)| (name.clone(), Disk::new(image.clone()))).collect();
        world
    }
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// Opens a disk; it is made when it is not there.
    pub fn disk(&self, name: &str, len_bytes: u64) -> CrashDisk {
        let mut state = self.state();
        if !state.disks.contains_key(name) {
            state.disks.insert(name.into(), Disk::new(Image::new(len_bytes)));
            state.log.push(Op::Create(name.into(), len_bytes));
        }
        let len_bytes = state.disks[name].medium.len_bytes();
        drop(state);
        CrashDisk { world: self.clone(), name: name.into(), len_bytes, poisoned: false }
    }
    /// As [`World::disk`], but a call that trouble may hit; what was there under the name is replaced.
    pub fn create(&self, name: &str, len_bytes: u64) -> Res<CrashDisk> {
        let trouble = self.state().call();
        if trouble.is_some_and(|t| t != Trouble::FailsAfterwards && t != Trouble::FlipsABit) {
            return Err(eio("create", name));
        }
        self.state().disks.insert(name.into(), Disk::new(Image::new(len_bytes)));
        self.state().log.push(Op::Create(name.into(), len_bytes));
        match trouble {
            Some(Trouble::FailsAfterwards) => Err(eio("create", name)),
            _ => Ok(self.disk(name, len_bytes)),
        }
    }
    /// Removes a disk; a call that trouble may hit.
    pub fn remove(&self, name: &str) -> Res<()> {
        let trouble = self.state().call();
        if !matches!(trouble, None | Some(Trouble::FailsAfterwards | Trouble::FlipsABit)) {
            return Err(eio("remove", name));
        }
        let mut state = self.state();
        if state.disks.remove(name).is_some() {
            state.log.push(Op::Remove(name.into()));
        }
        trouble.filter(|t| *t == Trouble::FailsAfterwards).map_or(Ok(()), |_| Err(eio("remove", name)))
    }
    /// The names of the disks.
    pub fn names(&self) -> Vec<String> {
        self.state().disks.keys().cloned().collect()
    }
    /// Puts a remark into the log.
    pub fn note(&self, remark: u64) {
        self.state().log.push(Op::Note(remark));
    }
    /// What was done so far.
    pub fn log(&self) -> Vec<Op> {
        self.state().log.clone()
    }
    /// Number of calls so far that trouble can hit: reads, writes, flushes, creations and removals.
    pub fn calls(&self) -> u64 {
        self.state().calls
    }
    /// Lets call number `at` (from 0) go wrong.
    pub fn plant(&self, at: u64, trouble: Trouble) {
        self.state().trouble = Some((at, trouble));
    }
    /// The write that trouble hit, if it hit one: the disk, and where in bytes.
    pub fn struck(&self) -> Option<(String, u64)> {
        self.state().struck.clone()
    }
    /// Turns over one bit of a disk's medium, behind everybody's back.
    pub fn rot(&self, name: &str, byte: u64, bit: u8) {
        let mut state = self.state();
        if let Ok(disk) = state.disk(name) {
            let mut one = [0];
            disk.medium.read(byte, &mut one);
            one[0] ^= 1 << (bit % 8);
            disk.medium.write(byte, &one);
            disk.view.write(byte, &one);
        }
    }
    /// What a killed process leaves: everything that was written, flushed or not.
    pub fn after_kill(&self) -> Disks {
        self.state().disks.iter().map(|(name, disk)| (name.clone(), disk.view.clone())).collect()
    }
    /// One of the states that a power cut now may leave, every cached sector kept or not by `keep`.
    pub fn after_power_cut(&self, keep: &mut dyn FnMut() -> bool) -> Disks {
        let state = self.state();
        let mut left = Disks::new();
        for (name, disk) in &state.disks {
            let mut medium = disk.medium.clone();
            for (offset, bytes) in &disk.cached {
                for (n, sector) in bytes.chunks(SECTOR_BYTES).enumerate() {
                    if keep() {
                        medium.write(offset + (n * SECTOR_BYTES) as u64, sector);
                    }
                }
            }
            left.insert(name.clone(), medium);
        }
        left
    }
}

/// One disk of a [`World`] as [`Storage`]. Poisoned by a failed flush, as the real one is.
#[derive(Debug)]
pub struct CrashDisk {
    world: World,
    name: String,
    len_bytes: u64,
    poisoned: bool,
}

impl CrashDisk {
    fn usable(&self, offset: u64, len: usize) -> Res<()> {
        if self.poisoned {
            return Err(Fault::new(Code::FlushFailed, &*self.name, "an earlier flush failed", "open it again"));
        }
        match offset.checked_add(len as u64).is_some_and(|end| end <= self.len_bytes) {
            true => Ok(()),
            false => Err(Fault::internal(&*self.name, format!("{len} bytes at {offset} of {}", self.len_bytes))),
        }
    }
}

impl Storage for CrashDisk {
    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Res<()> {
        self.usable(offset, buffer.len())?;
        let mut state = self.world.state();
        let trouble = state.call();
        state.disk(&self.name)?.view.read(offset, buffer);
        match trouble {
            None | Some(Trouble::Lies) => Ok(()),
            Some(Trouble::FlipsABit) => {
                if let Some(byte) = buffer.get_mut(offset as usize % 7) {
                    *byte ^= 0x10;
                }
                Ok(())
            }
            Some(_) => Err(eio("read", &self.name)),
        }
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Res<()> {
        self.usable(offset, bytes.len())?;
        let mut state = self.world.state();
        let trouble = state.call();
        if trouble.is_some() {
            state.struck = Some((self.name.clone(), offset));
        }
        match trouble {
            None => state.write(&self.name, offset, bytes),
            Some(Trouble::Lies) => Ok(()),
            Some(Trouble::FlipsABit) => {
                let mut wrong = bytes.to_vec();
                // Among the first sector's bytes, where every kind of block has something to lose.
                if let Some(byte) = wrong.get_mut(300.min(bytes.len().saturating_sub(1))) {
                    *byte ^= 0x10;
                }
                state.write(&self.name, offset, &wrong)
            }
            Some(trouble) => {
                let sectors = bytes.len().div_ceil(SECTOR_BYTES);
                let done = match trouble {
                    Trouble::FailsAfterwards => bytes.len(),
                    Trouble::FailsHalfway => (sectors.div_ceil(2) * SECTOR_BYTES).min(bytes.len()),
                    _ => 0,
                };
                if done > 0 {
                    state.write(&self.name, offset, &bytes[..done])?;
                }
                Err(eio("write", &self.name))
            }
        }
    }

    fn flush(&mut self) -> Res<()> {
        self.usable(0, 0)?;
        let mut state = self.world.state();
        let trouble = match state.call() {
            None => return state.flush(&self.name),
            Some(Trouble::Lies) => return Ok(()),
            Some(trouble) => trouble,
        };
        match trouble {
            Trouble::FailsAfterwards => state.flush(&self.name)?,
            Trouble::FailsAndForgets => state.forget(&self.name)?,
            Trouble::FailsHalfway => {
                // The older half becomes durable, the rest is lost.
                let disk = state.disk(&self.name)?;
                let kept: Vec<_> = disk.cached.drain(..).collect();
                disk.view = disk.medium.clone();
                state.log.push(Op::Lost(self.name.clone()));
                for (offset, bytes) in &kept[..kept.len() / 2] {
                    state.write(&self.name, *offset, bytes)?;
                }
                state.flush(&self.name)?;
            }
            _ => {}
        }
        drop(state);
        self.poisoned = true;
        Err(Fault::new(Code::FlushFailed, &*self.name, "a planted flush error", "look at the test"))
    }
}

/// How far [`crash_states`] goes.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// All subsets of up to this many unflushed writes; above it, `samples` of them.
    pub writes_max: usize,
    /// How many ways of tearing one write are shown; if there are more, evenly chosen ones.
    pub tears_max: usize,
    /// Number of random states (sector by sector, and of subsets where there are too many) at each place in the log.
    pub samples: usize,
    /// Where the random ones begin.
    pub seed: u64,
}

/// A small generator (xorshift64*), so that a seed says everything.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// From a seed.
    pub fn new(seed: u64) -> Dice {
        Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    /// The next number.
    pub fn roll(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }
    /// A number below `bound` (at least 1).
    pub fn below(&mut self, bound: u64) -> u64 {
        self.roll() % bound
    }
}

/// An unflushed write: the disk, where, and what.
type Pending = (String, u64, Arc<[u8]>);

/// Shows `visit` what a power cut may leave, for every place of `log` (given as the number of operations done before the cut),
/// beginning at `start`. Each state of a place is shown once for each way to reach it that is enumerated; the order is fixed.
pub fn crash_states(start: &Disks, log: &[Op], limits: Limits, visit: &mut dyn FnMut(usize, &Disks)) {
    let mut media = start.clone();
    let mut pending: Vec<Pending> = Vec::new();
    visit(0, &media);
    for (at, op) in log.iter().enumerate() {
        let mut newest = false;
        match op {
            Op::Write { disk, offset, bytes } => {
                pending.push((disk.clone(), *offset, bytes.clone()));
                newest = true;
            }
            Op::Flush(flushed) => pending.retain(|(disk, offset, bytes)| {
                let stays = disk != flushed;
                if !stays && let Some(image) = media.get_mut(disk) {
                    image.write(*offset, bytes);
                }
                stays
            }),
            Op::Lost(lost) => pending.retain(|(disk, ..)| disk != lost),
            Op::Create(disk, len) => {
                media.insert(disk.clone(), Image::new(*len));
            }
            Op::Remove(removed) => {
                media.remove(removed);
                pending.retain(|(disk, ..)| disk != removed);
            }
            Op::Note(_) => {}
        }
        let limits = Limits { seed: limits.seed ^ (at as u64) << 20, ..limits };
        one_place(&media, &pending, newest, limits, &mut |disks| visit(at + 1, disks));
    }
}

fn put(disks: &mut Disks, (disk, offset, bytes): &Pending, keep: &mut dyn FnMut(usize) -> bool) {
    let Some(image) = disks.get_mut(disk) else { return };
    for (n, sector) in bytes.chunks(SECTOR_BYTES).enumerate() {
        if keep(n) {
            image.write(offset + (n * SECTOR_BYTES) as u64, sector);
        }
    }
}

/// All states at one place. `newest`: the last pending write is new, so the states without it were shown at the place before.
fn one_place(media: &Disks, pending: &[Pending], newest: bool, limits: Limits, visit: &mut dyn FnMut(&Disks)) {
    let n = pending.len();
    let mut dice = Dice::new(limits.seed);
    // 1. Whole writes, in every combination.
    let mut subset = |chosen: &mut dyn FnMut(usize) -> bool| {
        let mut disks = media.clone();
        for (i, write) in pending.iter().enumerate() {
            if chosen(i) {
                put(&mut disks, write, &mut |_| true);
            }
        }
        visit(&disks);
    };
    if n <= limits.writes_max {
        for bits in 0..1u64 << n {
            if !newest || bits >> (n - 1) & 1 == 1 {
                subset(&mut |i| bits >> i & 1 == 1);
            }
        }
    } else {
        (0..limits.samples).for_each(|_| subset(&mut |_| dice.roll() & 1 == 1));
    }
    // 2. One write torn: each beginning of it, and each single sector missing; the others all there, none there, or some.
    for (torn, write) in pending.iter().enumerate() {
        let sectors = write.2.len().div_ceil(SECTOR_BYTES);
        for shape in (0..2 * sectors).step_by((2 * sectors).div_ceil(limits.tears_max.max(1)).max(1)) {
            let kept = |sector: usize| match shape < sectors {
                true => sector < shape,
                false => sector != shape - sectors,
            };
            let some = dice.roll();
            for others in [0, u64::MAX, some] {
                let mut disks = media.clone();
                for (i, other) in pending.iter().enumerate() {
                    match i == torn {
                        true => put(&mut disks, write, &mut { |sector| kept(sector) }),
                        false if others >> (i % 64) & 1 == 1 => put(&mut disks, other, &mut |_| true),
                        false => {}
                    }
                }
                visit(&disks);
                if n == 1 {
                    break;
                }
            }
        }
    }
    // 3. Anything at all, sector by sector.
    if n > 0 {
        for _ in 0..limits.samples {
            let mut disks = media.clone();
            pending.iter().for_each(|write| put(&mut disks, write, &mut |_| dice.roll() & 1 == 1));
            visit(&disks);
        }
    }
}
