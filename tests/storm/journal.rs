//! What was written when: the only witness that the checker believes.
//!
//! 1. A write is noted, with a time taken before, and only then submitted: whatever is found on a disk is in the journal.
//! 2. Its end is noted with a time taken after it was known: whoever was submitted later may rely on it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

/// What a write does to its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Stamped sectors, each whole or not there.
    Direct,
    /// Stamped sectors from memory that may change under the device: a sector may be torn until it is synced.
    Cached,
    /// Zeroes.
    Zero,
    /// Anything from its submission on, until written again.
    Discard,
    /// Overlaps others on purpose: anything, until written again.
    Clash,
}

/// One write.
#[derive(Clone, Copy, Debug)]
pub struct Op {
    /// Its number.
    pub seq: u64,
    /// Its volume.
    pub volume: u32,
    /// First sector.
    pub first: u64,
    /// Number of sectors.
    pub sectors: u64,
    /// What it does.
    pub kind: Kind,
    /// Nanoseconds since the storm began, taken before it was submitted.
    pub submitted: u64,
}

/// How a write ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It is on the device (for cached ones and those to files: a sync has returned).
    There,
    /// It failed or was given up: its range is anything from its submission on, until written again.
    Failed,
}

/// One thread's part.
#[derive(Default)]
pub struct Shard {
    /// In order of their submission.
    pub ops: Vec<Op>,
    /// (sequence, how, when it was known).
    pub ends: Vec<(u64, End, u64)>,
}

/// The journal of one storm.
pub struct Journal {
    began: Instant,
    next: AtomicU64,
    shards: Vec<Mutex<Shard>>,
    /// Decides all that is random, and marks the stamps.
    pub seed: u64,
}

impl Journal {
    /// An empty journal for `threads` writers.
    pub fn new(seed: u64, threads: usize) -> Journal {
        let shards = (0..threads).map(|_| Mutex::default()).collect();
        Journal { began: Instant::now(), next: AtomicU64::new(0), shards, seed }
    }

    /// Nanoseconds since the storm began; never 0.
    pub fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64 + 1
    }

    /// The number of writers.
    pub fn threads(&self) -> usize {
        self.shards.len()
    }

    /// What one thread noted.
    pub fn shard(&self, thread: usize) -> MutexGuard<'_, Shard> {
        self.shards[thread].lock().unwrap()
    }

    /// Notes a write that is about to be submitted; returns its sequence.
    pub fn submit(&self, thread: usize, volume: u32, first: u64, sectors: u64, kind: Kind) -> u64 {
        let seq = self.next.fetch_add(1, Ordering::Relaxed);
        assert!(seq < u64::from(u32::MAX) - 8, "a storm has at most 2^32 writes");
        let submitted = self.now();
        self.shard(thread).ops.push(Op { seq, volume, first, sectors, kind, submitted });
        seq
    }

    /// Notes how some writes ended, just now.
    pub fn end(&self, thread: usize, seqs: &[u64], end: End) {
        let now = self.now();
        self.shard(thread).ends.extend(seqs.iter().map(|seq| (*seq, end, now)));
    }

    /// How many writes were noted so far.
    pub fn len(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }
}
