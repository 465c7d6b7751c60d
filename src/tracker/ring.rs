//! The ring of one group: records in the order of completion, written by kernel programs, read here.
//!
//! Layout of a BPF ring buffer's mapping: a page with the consumer's position (ours to write), a page with the producers'
//! position, then the data twice in a row, so that a record that wraps around is in one piece. A record begins with two
//! 32-bit words: its length with two flag bits (busy: still being written; discarded), and a number that we do not need.

use crate::model::{Fault, Res};
use crate::tracker::kernel::fault_of;
use libbpf_rs::libbpf_sys::bpf_map_create_opts;
use libbpf_rs::{MapHandle, MapType};
use memmap2::{Mmap, MmapMut, MmapOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

const BUSY: u32 = 1 << 31;
const DISCARDED: u32 = 1 << 30;
/// Bytes before each record.
const FRAME_BYTES: u64 = 8;
/// `struct record` in `shared.bpf.h`.
const HEAD_BYTES: u64 = 24;

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// These bytes were written; they stand in the ring at this position.
    Data(u64),
    /// The range is zero now.
    Zero,
    /// The range changed; what it holds must be read.
    Hole,
}

/// One record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Captured {
    /// The tracker's slot of the volume.
    pub slot: u32,
    /// Where the range begins, in bytes.
    pub offset_bytes: u64,
    /// Its length in bytes.
    pub len_bytes: u64,
    /// What happened to it.
    pub what: What,
}

/// A mapped ring.
pub(super) struct Ring {
    map: MapHandle,
    consumer: MmapMut,
    rest: Mmap,
    page_bytes: usize,
    size_bytes: u64,
}

impl Ring {
    /// A new ring of `size_bytes` (a power of two, at least a page).
    pub(super) fn new(size_bytes: u32) -> Res<Ring> {
        let opts =
            bpf_map_create_opts { sz: size_of::<bpf_map_create_opts>() as libbpf_rs::libbpf_sys::size_t, ..Default::default() };
        let thing = format!("a capture ring of {size_bytes} bytes");
        let map = MapHandle::create(MapType::RingBuf, Some("doublure_ring"), 0, 0, size_bytes, &opts);
        let map = map.map_err(|e| fault_of(&thing, &e))?;
        // SAFETY: sysconf(3) takes no pointers.
        let page_bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let fd = map.as_fd().as_raw_fd();
        let io = |e: std::io::Error| Fault::io(thing.clone(), &e);
        // SAFETY: the first page of a ring buffer's mapping is the consumer's position; it belongs to us, and is used
        // through an atomic only. A ring buffer map cannot shrink.
        let consumer = unsafe { MmapOptions::new().len(page_bytes).map_mut(fd) }.map_err(io)?;
        // SAFETY: behind it come the producers' page and the data, twice; programs write there, and we read a record only
        // after its busy bit was seen cleared with acquire order, until it is released.
        let rest = unsafe { MmapOptions::new().offset(page_bytes as u64).len(page_bytes + 2 * size_bytes as usize).map(fd) }
            .map_err(io)?;
        Ok(Ring { map, consumer, rest, page_bytes, size_bytes: u64::from(size_bytes) })
    }
    /// The map, to be given to the programs.
    pub(super) fn map(&self) -> &MapHandle {
        &self.map
    }
    /// Becomes readable when a record comes after everything was released.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }
    /// Its size in bytes.
    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
    /// Where the next record will begin: everything before was reserved before this call.
    pub(super) fn produced(&self) -> u64 {
        // SAFETY: the mapping is page-aligned and begins with the producers' position, which programs store atomically.
        unsafe { &*self.rest.as_ptr().cast::<AtomicU64>() }.load(Ordering::Acquire)
    }
    fn consumer(&self) -> &AtomicU64 {
        // SAFETY: the mapping is page-aligned and begins with the consumer's position.
        unsafe { &*self.consumer.as_ptr().cast::<AtomicU64>() }
    }
    /// Everything before this position was released.
    pub(super) fn released(&self) -> u64 {
        self.consumer().load(Ordering::Relaxed)
    }
    /// Gives the room of everything before `position` back to the programs.
    pub(super) fn release(&mut self, position: u64) {
        self.consumer().store(position, Ordering::Release);
    }
    fn frame(&self, position: u64) -> u32 {
        let at = self.page_bytes + (position & (self.size_bytes - 1)) as usize;
        // SAFETY: records are 8-byte aligned in the page-aligned mapping, `at` lies within its first copy of the data; the
        // programs store the word atomically.
        unsafe { &*self.rest.as_ptr().add(at).cast::<AtomicU32>() }.load(Ordering::Acquire)
    }
    /// `len` bytes at a position of the ring that was given by [`What::Data`] and has not been released.
    pub(super) fn bytes(&self, position: u64, len: usize) -> &[u8] {
        let at = self.page_bytes + (position & (self.size_bytes - 1)) as usize;
        &self.rest[at..at + len]
    }
    /// Hands over the records from `from` up to `to` (a value of [`Ring::produced`]), in order. A record that is still being
    /// written is waited for: its program is at work on some CPU and copies at most one request.
    pub(super) fn walk(&self, from: u64, to: u64, sink: &mut dyn FnMut(Captured)) -> Res<()> {
        let mut at = from;
        while at < to {
            let mut frame = self.frame(at);
            while frame & BUSY != 0 {
                std::thread::yield_now();
                frame = self.frame(at);
            }
            let len = u64::from(frame & !(BUSY | DISCARDED));
            if frame & DISCARDED == 0 {
                sink(self.record(at, len)?);
            }
            at += (len + FRAME_BYTES).next_multiple_of(8);
        }
        match at == to {
            true => Ok(()),
            false => Err(Fault::internal("the capture ring", format!("a record ends at {at}, beyond {to}"))),
        }
    }
    fn record(&self, at: u64, len: u64) -> Res<Captured> {
        let bad = |why: String| Fault::internal("the capture ring", why);
        if len < HEAD_BYTES {
            return Err(bad(format!("a record of {len} bytes")));
        }
        let head = self.bytes(at + FRAME_BYTES, HEAD_BYTES as usize);
        let word = |at: usize| u32::from_ne_bytes(std::array::from_fn(|i| head[at + i]));
        let long = |at: usize| u64::from_ne_bytes(std::array::from_fn(|i| head[at + i]));
        let (slot, kind, offset_bytes, len_bytes) = (word(0), word(4), long(8), long(16));
        let what = match kind {
            1 if len_bytes == len - HEAD_BYTES => What::Data(at + FRAME_BYTES + HEAD_BYTES),
            2 => What::Zero,
            3 => What::Hole,
            _ => return Err(bad(format!("a record of kind {kind} and {len_bytes} bytes in {len}"))),
        };
        Ok(Captured { slot, offset_bytes, len_bytes, what })
    }
}
