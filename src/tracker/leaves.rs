//! Leaves: the bits of a large volume's blocks, made where something was written.
//!
//! A volume with leaves is divided into ranges of [`LEAF_BLOCKS`] blocks (14 MiB). Each region of its bits (two halves and what is
//! held) has a hash map from a range's number to the range's bits, the leaf. Programs make leaves in the active half; they
//! allocate from the kernel's BPF allocator, which serves any context, and fall back to "the whole range is dirty".
//!
//! Memory of one leaf: header of a hash element 48 bytes, key 8, link of the allocator 8, bits 448 = 512, a size class of the
//! kernel's allocator. A TiB has 74,899 ranges: 36.6 MiB of leaves if all of it is written in places. The buckets are
//! allocated with the map, 16 bytes for each entry that it may have, rounded up to a power of two; so a map has room for at most
//! [`MOST_LEAVES`] = 131,072 leaves (1.75 TiB written all over within one phase; buckets 2 MiB), past which whole ranges are dirty.
//!
//! Why no bit is lost to the reuse of an element. The kernel's allocator may give a deleted element to the next insertion at
//! once, without waiting for programs that still hold a pointer into it; a program that did would set its bit in another range's leaf.
//! 1. Programs look leaves up in the active half alone, and every region has a map, and so elements, of its own.
//! 2. Leaves are removed only from a half that is not active, or from what is held. When a half ceases to be active, a
//!    grace period is waited for before anything else is done with it (`flip`; `open`, for a life that died in between), after
//!    which no program holds a pointer into it.
//! 3. In the active half no leaf is ever removed or replaced: user space has bits set there by a program too (`insert`), because an
//!    update by system call would replace the element under the programs.
//! 4. `begin` makes new maps, and `clear_slot` drops the maps only after the programs forgot the disk and a grace period;
//!    the kernel frees a dropped map after one of its own.

use crate::model::{Code, Fault, Res};
use crate::tracker::halves::{HALVES, REGIONS, Words};
use crate::tracker::kernel::fault_of;
use libbpf_rs::libbpf_sys::{self, bpf_map_batch_opts, bpf_map_create_opts, bpf_test_run_opts};
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Words of one leaf; `LEAF_WORDS` in `bitmap.bpf.c`.
pub(super) const LEAF_WORDS: u64 = 56;
/// Blocks of one leaf: the length of a range.
pub(super) const LEAF_BLOCKS: u64 = LEAF_WORDS * 64;
/// The bits of one range.
pub(super) type Leaf = [u64; LEAF_WORDS as usize];

/// Most leaves in one region of one volume.
const MOST_LEAVES: u64 = 1 << 17;
/// `INBOX_LEAVES` in `bitmap.bpf.c`.
const INBOX_LEAVES: usize = 128;
/// Words of a `struct letter`: the range and whether it was refused, then the leaf.
const LETTER_WORDS: usize = 1 + LEAF_WORDS as usize;
/// `BPF_F_NO_PREALLOC`: an element is allocated when it is inserted.
const NO_PREALLOC: u32 = 1;
/// So many ranges are looked up one by one; a batch would walk all buckets.
const FEW: usize = 256;
/// Elements per batch; more than any bucket holds, or the kernel refuses to go on.
const BATCH: usize = 1024;

/// Where the leaves of one volume are. The double in `halves` keeps them in memory.
pub(super) trait LeafStore {
    /// Calls `each` with the leaves of `ranges` that are there, in any order; others of the region may be among them.
    fn read(&self, region: u64, ranges: &[u32], each: &mut dyn FnMut(u32, &Leaf)) -> Res<()>;
    /// Sets bits; a leaf that is not there is made. Gives the ranges for which none could be made.
    fn insert(&self, region: u64, leaves: &[(u32, Leaf)]) -> Res<Vec<u32>>;
    /// Removes the leaves of `ranges` that are there, of a region that no program uses.
    fn remove(&self, region: u64, ranges: &[u32]) -> Res<()>;
}

/// The maps and the program that all volumes' leaves need.
pub(super) struct LeafMaps {
    outer: MapHandle,
    inbox: Words,
    insert: OwnedFd,
    most: AtomicU32,
}

impl LeafMaps {
    /// Over the pinned array of maps, the mapped inbox and the pinned program.
    pub(super) fn new(outer: MapHandle, inbox: Words, insert: OwnedFd) -> LeafMaps {
        LeafMaps { outer, inbox, insert, most: AtomicU32::new(MOST_LEAVES as u32) }
    }
    /// Number of words of the inbox.
    pub(super) const fn inbox_words() -> u64 {
        (INBOX_LEAVES * LETTER_WORDS) as u64
    }
    /// The most leaves of a region of volumes tracked from now on. For tests.
    pub(super) fn limit(&self, most: u32) {
        self.most.store(most, Ordering::Relaxed);
    }
    fn capacity(&self, ranges: u64) -> u32 {
        ranges.min(u64::from(self.most.load(Ordering::Relaxed))) as u32
    }
    fn key(slot: u32, region: u64) -> [u8; 4] {
        (slot * REGIONS as u32 + region as u32).to_ne_bytes()
    }
    /// Makes empty maps for both halves of a volume with `ranges` ranges. What is held gets one when something is held.
    pub(super) fn make(&self, slot: u32, ranges: u64) -> Res<()> {
        (0..HALVES).try_for_each(|half| self.make_region(slot, half, ranges).map(drop))
    }
    fn make_region(&self, slot: u32, region: u64, ranges: u64) -> Res<MapHandle> {
        let opts = bpf_map_create_opts {
            sz: size_of::<bpf_map_create_opts>() as libbpf_sys::size_t,
            map_flags: NO_PREALLOC,
            ..Default::default()
        };
        let entries = self.capacity(ranges);
        let map = MapHandle::create(MapType::Hash, Some("doublure_leaves"), 4, LEAF_WORDS as u32 * 8, entries, &opts);
        let map = map.map_err(|e| fault_of(&format!("a map for {entries} leaves"), &e))?;
        let done = self.outer.update(&Self::key(slot, region), &map.as_fd().as_raw_fd().to_ne_bytes(), MapFlags::ANY);
        done.map_err(|e| fault_of("the table of leaves", &e))?;
        Ok(map)
    }
    /// The map of a region; `None` when there is none.
    fn region(&self, slot: u32, region: u64) -> Res<Option<MapHandle>> {
        let found =
            self.outer.lookup(&Self::key(slot, region), MapFlags::ANY).map_err(|e| fault_of("the table of leaves", &e))?;
        let Some(id) = found.and_then(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes) else { return Ok(None) };
        MapHandle::from_map_id(id).map(Some).map_err(|e| fault_of("a map of leaves", &e))
    }
    /// Whether both halves of a volume have their maps.
    pub(super) fn are_there(&self, slot: u32) -> Res<bool> {
        Ok(self.region(slot, 0)?.is_some() && self.region(slot, 1)?.is_some())
    }
    /// The maps of a volume that are there.
    pub(super) fn maps_of(&self, slot: u32) -> Res<Vec<MapHandle>> {
        (0..REGIONS).filter_map(|region| self.region(slot, region).transpose()).collect()
    }
    /// Takes a volume's maps out of the programs' sight; the kernel frees them.
    pub(super) fn drop_all(&self, slot: u32) -> Res<()> {
        for region in 0..REGIONS {
            if self.region(slot, region)?.is_some() {
                self.outer.delete(&Self::key(slot, region)).map_err(|e| fault_of("the table of leaves", &e))?;
            }
        }
        Ok(())
    }
}

/// The leaves of one volume in the kernel.
pub(super) struct KernelLeaves {
    maps: Arc<LeafMaps>,
    slot: u32,
    ranges: u64,
}

impl KernelLeaves {
    /// The leaves of the volume in `slot`, which has `ranges` ranges.
    pub(super) fn new(maps: Arc<LeafMaps>, slot: u32, ranges: u64) -> KernelLeaves {
        KernelLeaves { maps, slot, ranges }
    }
}

/// The fault of a system call about leaves.
fn failed(what: &str) -> Fault {
    Fault::io(format!("{what} the leaves of a bitmap"), &io::Error::last_os_error())
}

impl LeafStore for KernelLeaves {
    fn read(&self, region: u64, ranges: &[u32], each: &mut dyn FnMut(u32, &Leaf)) -> Res<()> {
        if ranges.is_empty() {
            return Ok(());
        }
        let Some(map) = self.maps.region(self.slot, region)? else { return Ok(()) };
        let fd = map.as_fd().as_raw_fd();
        match ranges.len() <= FEW {
            true => read_each(fd, ranges, each),
            false => read_all(fd, each),
        }
    }

    fn insert(&self, region: u64, leaves: &[(u32, Leaf)]) -> Res<Vec<u32>> {
        let mut refused = Vec::new();
        if leaves.is_empty() {
            return Ok(refused);
        }
        if self.maps.region(self.slot, region)?.is_none() {
            self.maps.make_region(self.slot, region, self.ranges)?;
        }
        for batch in leaves.chunks(INBOX_LEAVES) {
            let letters = self.maps.inbox.all().chunks_exact(LETTER_WORDS);
            for (letter, (range, leaf)) in letters.clone().zip(batch) {
                letter[0].store(letter_head(*range, 0), Ordering::Relaxed);
                letter[1..].iter().zip(leaf).for_each(|(to, word)| to.store(*word, Ordering::Relaxed));
            }
            run_insert(&self.maps.insert, self.slot, region as u32, batch.len() as u32)?;
            let unmade =
                letters.zip(batch).filter(|(letter, (range, _))| letter[0].load(Ordering::Relaxed) != letter_head(*range, 0));
            refused.extend(unmade.map(|(_, (range, _))| *range));
        }
        Ok(refused)
    }

    fn remove(&self, region: u64, ranges: &[u32]) -> Res<()> {
        if ranges.is_empty() {
            return Ok(());
        }
        let Some(map) = self.maps.region(self.slot, region)? else { return Ok(()) };
        remove_each(map.as_fd().as_raw_fd(), ranges)
    }
}

/// The first word of a `struct letter`: `{u32 range; u32 refused}`.
fn letter_head(range: u32, refused: u32) -> u64 {
    let ([a, b, c, d], [e, f, g, h]) = (range.to_ne_bytes(), refused.to_ne_bytes());
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

fn read_each(fd: RawFd, ranges: &[u32], each: &mut dyn FnMut(u32, &Leaf)) -> Res<()> {
    let mut leaf: Leaf = [0; LEAF_WORDS as usize];
    for range in ranges {
        // SAFETY: the map's key is a u32, its value LEAF_WORDS words; both are read or written during the call only.
        let done = unsafe { libbpf_sys::bpf_map_lookup_elem(fd, std::ptr::from_ref(range).cast(), leaf.as_mut_ptr().cast()) };
        match done {
            0 => each(*range, &leaf),
            // The range has its coarse bit and no leaf (yet): it is dirty as a whole, or being written for the first time.
            _ if io::Error::last_os_error().raw_os_error() == Some(libc::ENOENT) => {}
            _ => return Err(failed("reading")),
        }
    }
    Ok(())
}

fn batch_opts() -> bpf_map_batch_opts {
    bpf_map_batch_opts { sz: size_of::<bpf_map_batch_opts>() as libbpf_sys::size_t, ..Default::default() }
}

fn read_all(fd: RawFd, each: &mut dyn FnMut(u32, &Leaf)) -> Res<()> {
    let (mut keys, mut values) = (vec![0u32; BATCH], vec![[0u64; LEAF_WORDS as usize]; BATCH]);
    let opts = batch_opts();
    let mut place = 0u32;
    let mut begun = false;
    loop {
        let mut count = BATCH as u32;
        let from = if begun { (&raw mut place).cast() } else { std::ptr::null_mut() };
        // SAFETY: `keys` and `values` have room for `count` elements of the map's sizes, `place` for a bucket's number.
        let done = unsafe {
            libbpf_sys::bpf_map_lookup_batch(
                fd,
                from,
                (&raw mut place).cast(),
                keys.as_mut_ptr().cast(),
                values.as_mut_ptr().cast(),
                &raw mut count,
                &raw const opts,
            )
        };
        let end = done != 0 && io::Error::last_os_error().raw_os_error() == Some(libc::ENOENT);
        if done != 0 && !end {
            return Err(failed("reading"));
        }
        keys.iter().zip(&values).take(count as usize).for_each(|(range, leaf)| each(*range, leaf));
        if end {
            return Ok(());
        }
        begun = true;
    }
}

fn remove_each(fd: RawFd, ranges: &[u32]) -> Res<()> {
    let opts = batch_opts();
    let mut rest = ranges;
    while !rest.is_empty() {
        let mut count = rest.len() as u32;
        // SAFETY: `rest` holds `count` keys of the map's size.
        let done = unsafe { libbpf_sys::bpf_map_delete_batch(fd, rest.as_ptr().cast(), &raw mut count, &raw const opts) };
        let skip = match done {
            0 => 0,
            // The kernel stops at a range without a leaf; so many before it are gone.
            _ if io::Error::last_os_error().raw_os_error() == Some(libc::ENOENT) => 1,
            _ => return Err(failed("removing")),
        };
        rest = &rest[(count as usize + skip).min(rest.len())..];
    }
    Ok(())
}

/// `struct insertion` in `bitmap.bpf.c`.
#[repr(C)]
struct Insertion {
    slot: u32,
    region: u32,
    letters: u32,
}

fn run_insert(program: &OwnedFd, slot: u32, region: u32, letters: u32) -> Res<()> {
    let asked = Insertion { slot, region, letters };
    let mut opts = bpf_test_run_opts {
        sz: size_of::<bpf_test_run_opts>() as libbpf_sys::size_t,
        ctx_in: (&raw const asked).cast(),
        ctx_size_in: size_of::<Insertion>() as u32,
        ..Default::default()
    };
    // SAFETY: the descriptor is a program; `asked` is its context, `opts` says how long it is, both live through the call.
    match unsafe { libbpf_sys::bpf_prog_test_run_opts(program.as_raw_fd(), &raw mut opts) } {
        0 if opts.retval == 0 => Ok(()),
        0 => Err(Fault::internal("the leaves of a bitmap", format!("the program that sets them ended with {}", opts.retval))),
        _ => {
            let next = "use a kernel from 5.17 on";
            Err(Fault::new(Code::KernelUnsupported, "the leaves of a bitmap", io::Error::last_os_error().to_string(), next))
        }
    }
}
