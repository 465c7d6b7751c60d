//! Leaves: the bits of a large volume's blocks, made where something was written.
//!
//! A volume with leaves is divided into ranges of [`LEAF_BLOCKS`] blocks (14 MiB). One hash map of the host has the bits of each
//! range that was written, the leaf, by slot, region (two halves and what is held) and number of the range. Programs make
//! leaves in the active half; they allocate from the kernel's BPF allocator, which serves any context, and where it cannot, or
//! the map is full, the whole range is dirty.
//!
//! Memory of one leaf: header of a hash element 48 bytes, key 8, link of the allocator 8, bits 448 = 512, a size class of the
//! kernel's allocator. A TiB has 74,899 ranges: 36.6 MiB of leaves if it is written all over. The map's buckets are allocated with
//! it, 16 bytes for each leaf that it may have: 2 to 32 MiB once per host (see [`most_leaves`]), nothing per volume. A volume itself
//! has its map of ranges: 0.9 MiB for 16 TiB.
//!
//! Why no bit is lost to the reuse of an element. The kernel's allocator may give a deleted element to the next insertion at
//! once, without waiting for programs that still hold a pointer into it; a program that did would set its bit in another range's leaf.
//! 1. Programs look up leaves of the active half alone.
//! 2. Leaves are removed only from a half that is not active, or from what is held. When a half ceases to be active, a
//!    grace period is waited for before anything else is done with it (`flip`; `open`, for a life that died in between), after
//!    which no program holds a pointer into it.
//! 3. In the active half no leaf is ever removed or replaced: user space has bits set there by a program too, because an
//!    update by system call would replace the element under the programs.
//! 4. `clear_slot` removes a volume's leaves only after the programs forgot the disk and a grace period, and a slot is free only after
//!    that: `begin` finds none. (A leaf that was left behind would have no coarse bit.)
//! 5. A program that walks a bucket may stand on an element that is removed and used again under it. Then it ends in another
//!    bucket, sees so by the list's end mark, and begins again; or it sees the new key, which the kernel writes before and the hash,
//!    which it compares too, after the bits were zeroed. (That order is the processor's where it keeps stores in order. Where
//!    not, two first writes to a range and a removal in the same bucket within nanoseconds could lose the bit of one
//!    program run; the block's other three runs, two of them at completion, set it again.)

use crate::model::{Code, Fault, Res};
use crate::tracker::halves::Words;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

/// Words of one leaf; `LEAF_WORDS` in `bitmap.bpf.c`.
pub(super) const LEAF_WORDS: u64 = 56;
/// Blocks of one leaf: the length of a range.
pub(super) const LEAF_BLOCKS: u64 = LEAF_WORDS * 64;
/// The bits of one range.
pub(super) type Leaf = [u64; LEAF_WORDS as usize];

/// `INBOX_LEAVES` in `bitmap.bpf.c`.
const INBOX_LEAVES: usize = 128;
/// Words of a `struct letter`: the range and whether its leaf is absent, then the leaf.
const LETTER_WORDS: usize = 1 + LEAF_WORDS as usize;
/// Words of the inbox.
pub(super) const INBOX_WORDS: u64 = (INBOX_LEAVES * LETTER_WORDS) as u64;

/// Where the leaves of one volume are. The double in `halves` keeps them in memory.
pub(super) trait LeafStore {
    /// Calls `each` with the leaves of `ranges` that are there.
    fn read(&self, region: u64, ranges: &[u32], each: &mut dyn FnMut(u32, &Leaf)) -> Res<()>;
    /// Sets bits; a leaf that is not there is made. Gives the ranges for which none could be made.
    fn insert(&self, region: u64, leaves: &[(u32, Leaf)]) -> Res<Vec<u32>>;
    /// Removes the leaves of `ranges` that are there, of a region that no program uses.
    fn remove(&self, region: u64, ranges: &[u32]) -> Res<()>;
}

/// How many leaves the host's map has room for: a 128th of the machine's memory, at least 64 MiB (1.75 TiB written all over) and
/// at most a GiB. `memory` is in bytes.
pub(super) fn most_leaves(memory: u64) -> u32 {
    let leaves = (memory / 128 / 512).clamp(1 << 17, 1 << 21);
    1 << leaves.ilog2()
}

/// The program that works on the map of leaves, and the mapped array through which leaves go in and out.
pub(super) struct Leaves {
    program: OwnedFd,
    inbox: Mutex<Words>,
}

/// What the program is to do; the numbers of `bitmap.bpf.c`.
#[derive(Clone, Copy)]
enum Work {
    Insert = 0,
    Read = 1,
    Remove = 2,
    Forget = 3,
}

/// `struct work` in `bitmap.bpf.c`.
#[repr(C)]
struct Asked {
    what: u32,
    slot: u32,
    region: u32,
    letters: u32,
}

impl Leaves {
    /// Over the pinned program and the mapped inbox of [`INBOX_WORDS`] words.
    pub(super) fn new(program: OwnedFd, inbox: Words) -> Leaves {
        Leaves { program, inbox: Mutex::new(inbox) }
    }

    fn run(&self, what: Work, slot: u32, region: u64, letters: usize) -> Res<()> {
        let asked = Asked { what: what as u32, slot, region: region as u32, letters: letters as u32 };
        let mut opts = libbpf_rs::libbpf_sys::bpf_test_run_opts {
            sz: size_of::<libbpf_rs::libbpf_sys::bpf_test_run_opts>() as libbpf_rs::libbpf_sys::size_t,
            ctx_in: (&raw const asked).cast(),
            ctx_size_in: size_of::<Asked>() as u32,
            ..Default::default()
        };
        // SAFETY: the descriptor is a program; `asked` is its context, `opts` says how long it is, both live through the call.
        let done = unsafe { libbpf_rs::libbpf_sys::bpf_prog_test_run_opts(self.program.as_raw_fd(), &raw mut opts) };
        match done {
            0 if opts.retval == 0 => Ok(()),
            0 => {
                let cause = format!("the program that works on them ended with {}", opts.retval);
                Err(Fault::internal("the leaves of a bitmap", cause))
            }
            _ => {
                let cause = io::Error::last_os_error().to_string();
                Err(Fault::new(Code::KernelUnsupported, "the leaves of a bitmap", cause, "use a kernel from 5.17 on"))
            }
        }
    }

    /// Has the program work on a batch of letters: `write` fills the letter of an item but for its head, `back` gets each
    /// item and its letter, if the leaf is there, afterwards.
    fn post<T>(
        &self,
        (what, slot, region): (Work, u32, u64),
        items: &[T],
        range: impl Fn(&T) -> u32,
        write: impl Fn(&T) -> Option<&Leaf>,
        mut back: impl FnMut(&T, Option<Leaf>),
    ) -> Res<()> {
        // What a panic left in the inbox is overwritten.
        let inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        for batch in items.chunks(INBOX_LEAVES) {
            let letters = || inbox.all().chunks_exact(LETTER_WORDS).zip(batch);
            for (letter, item) in letters() {
                letter[0].store(head(range(item), false), Ordering::Relaxed);
                for (to, word) in letter[1..].iter().zip(write(item).into_iter().flatten()) {
                    to.store(*word, Ordering::Relaxed);
                }
            }
            self.run(what, slot, region, batch.len())?;
            for (letter, item) in letters() {
                let there = letter[0].load(Ordering::Acquire) == head(range(item), false);
                back(item, there.then(|| std::array::from_fn(|at| letter[1 + at].load(Ordering::Relaxed))));
            }
        }
        Ok(())
    }

    /// Removes all leaves of a slot, whatever its bits say. No program may use the slot any more.
    pub(super) fn forget(&self, slot: u32) -> Res<()> {
        self.run(Work::Forget, slot, 0, 0)
    }
}

/// The first word of a `struct letter`: `{u32 range; u32 absent}`.
fn head(range: u32, absent: bool) -> u64 {
    let ([a, b, c, d], [e, f, g, h]) = (range.to_ne_bytes(), u32::from(absent).to_ne_bytes());
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

/// The leaves of one volume in the kernel.
pub(super) struct KernelLeaves {
    leaves: Arc<Leaves>,
    slot: u32,
}

impl KernelLeaves {
    /// The leaves of the volume in `slot`.
    pub(super) fn new(leaves: Arc<Leaves>, slot: u32) -> KernelLeaves {
        KernelLeaves { leaves, slot }
    }
}

impl LeafStore for KernelLeaves {
    fn read(&self, region: u64, ranges: &[u32], each: &mut dyn FnMut(u32, &Leaf)) -> Res<()> {
        // Where there is none, the range has its coarse bit alone: dirty as a whole, or being written for the first time.
        let back = |range: &u32, leaf: Option<Leaf>| leaf.iter().for_each(|leaf| each(*range, leaf));
        self.leaves.post((Work::Read, self.slot, region), ranges, |range| *range, |_| None, back)
    }

    fn insert(&self, region: u64, leaves: &[(u32, Leaf)]) -> Res<Vec<u32>> {
        let mut refused = Vec::new();
        let back = |(range, _): &(u32, Leaf), leaf: Option<Leaf>| refused.extend(leaf.is_none().then_some(*range));
        self.leaves.post((Work::Insert, self.slot, region), leaves, |(range, _)| *range, |(_, leaf)| Some(leaf), back)?;
        Ok(refused)
    }

    fn remove(&self, region: u64, ranges: &[u32]) -> Res<()> {
        self.leaves.post((Work::Remove, self.slot, region), ranges, |range| *range, |_| None, |_, _| {})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_for_leaves_grows_with_the_machine() {
        assert_eq!(most_leaves(1 << 30), 1 << 17);
        assert_eq!(most_leaves(24 << 30), 1 << 18);
        assert_eq!(most_leaves(64 << 30), 1 << 20);
        assert_eq!(most_leaves(1 << 40), 1 << 21);
    }
}
