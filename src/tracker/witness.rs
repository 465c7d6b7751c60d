//! Whether the bits count: what the programs counted, what they missed, and what the kernel's own statistics say.
//!
//! A bit is lost to a kind of program (submit, complete) only if every copy of the kind missed its bio, so while one
//! copy's misses stand still the kind is whole. Misses are counted by the kernel for all disks of the host together:
//! when all copies have moved, a volume may still be shown to be whole by equality: if everything that its disk has
//! completed was counted by one copy of `complete` alone, nothing of this volume was missed by it, and its completion
//! bits alone are enough (a write that completed after a read began is read again).
//!
//! `complete` counts in `block_rq_complete`, which fires just before the kernel adds the same bytes to the disk's
//! statistics. So "statistics first, counters afterwards" may only ever show the counters ahead.

use crate::tracker::notes::PROGRAMS;

/// The names of the programs, in the order of their numbers.
pub(super) const NAMES: [&str; PROGRAMS] = ["submit_a", "submit_b", "complete_a", "complete_b"];
/// Which programs are copies of each other.
const KINDS: [(&str, [usize; 2]); 2] = [("submit", [0, 1]), ("complete", [2, 3])];

/// What the programs counted for one volume since it began, all CPUs together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Sectors of 512 bytes changed, as each program saw them.
    pub sectors: [u64; PROGRAMS],
    /// Operations of a kind that the programs do not know.
    pub unknown: u64,
    /// Ranges that could not be recorded.
    pub outside: u64,
    /// Operations on another disk under the volume's number.
    pub stale: u64,
}

impl Counts {
    /// Sectors completed as the copy that saw most of them counted.
    pub(super) fn completed(&self) -> u64 {
        self.sectors[2].max(self.sectors[3])
    }
}

/// One reading of the two accounts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Reading {
    /// The kernel's account, in sectors; read first.
    pub stat_sectors: u64,
    /// The programs' account, read afterwards.
    pub counts: Counts,
    /// The programs' account did not move while both were read, and every write in it has reached the kernel's account.
    pub quiet: bool,
}

/// The kinds of program of which no copy is known to have seen everything since `then`.
pub(super) fn broken_kinds(then: &[u64; PROGRAMS], now: &[u64; PROGRAMS], attached: &[bool; PROGRAMS]) -> Vec<&'static str> {
    let whole = |at: usize| attached[at] && then[at] == now[at];
    KINDS.iter().filter(|(_, copies)| !copies.iter().any(|at| whole(*at))).map(|(name, _)| *name).collect()
}

/// Reasons to doubt one volume by what was counted for it since `then`.
pub(super) fn accounts_differ(then: &Reading, now: &Reading) -> Vec<String> {
    let mut reasons = Vec::new();
    let (was, is) = (&then.counts, &now.counts);
    if is.unknown != was.unknown {
        reasons.push(format!("{} operations of a kind unknown to the tracker", is.unknown.wrapping_sub(was.unknown)));
    }
    if is.outside != was.outside {
        reasons.push(format!("{} writes lay outside the volume as it was recorded", is.outside.wrapping_sub(was.outside)));
    }
    if is.stale != was.stale {
        reasons.push(format!("{} writes went to another disk under the same number", is.stale.wrapping_sub(was.stale)));
    }
    let by_kernel = now.stat_sectors.wrapping_sub(then.stat_sectors);
    let by_us = is.completed().wrapping_sub(was.completed());
    if now.stat_sectors < then.stat_sectors {
        reasons.push("the kernel's statistics of the device began anew".to_owned());
    } else if by_kernel > by_us {
        reasons.push(format!("the kernel counted {by_kernel} sectors written or discarded, the tracker {by_us}"));
    }
    reasons
}

/// Whether equality of both accounts proves that one copy of `complete` missed nothing of this volume since `then`.
pub(super) fn proved_whole(then: &Reading, now: &Reading) -> bool {
    let by_kernel = now.stat_sectors.wrapping_sub(then.stat_sectors);
    let equal = |at: usize| now.counts.sectors[at].wrapping_sub(then.counts.sectors[at]) == by_kernel;
    then.quiet && now.quiet && now.stat_sectors >= then.stat_sectors && (equal(2) || equal(3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(stat_sectors: u64, sectors: [u64; PROGRAMS], quiet: bool) -> Reading {
        Reading { stat_sectors, counts: Counts { sectors, ..Counts::default() }, quiet }
    }

    #[test]
    fn a_kind_is_whole_while_one_attached_copy_stands_still() {
        let all = [true; PROGRAMS];
        assert!(broken_kinds(&[1, 2, 3, 4], &[1, 2, 3, 4], &all).is_empty());
        assert!(broken_kinds(&[1, 2, 3, 4], &[9, 2, 3, 9], &all).is_empty());
        assert_eq!(broken_kinds(&[1, 2, 3, 4], &[2, 3, 3, 4], &all), ["submit"]);
        assert_eq!(broken_kinds(&[1, 2, 3, 4], &[2, 3, 4, 5], &all), ["submit", "complete"]);
        assert_eq!(broken_kinds(&[1, 2, 3, 4], &[1, 2, 3, 5], &[true, true, false, true]), ["complete"]);
        assert!(broken_kinds(&[1, 2, 3, 4], &[1, 2, 3, 4], &[false, true, true, false]).is_empty());
    }

    #[test]
    fn a_sector_that_only_the_kernel_saw_is_a_reason() {
        let then = reading(100, [0, 0, 40, 50], true);
        assert!(accounts_differ(&then, &reading(108, [8, 8, 48, 58], true)).is_empty());
        assert!(accounts_differ(&then, &reading(108, [8, 8, 40, 58], true)).is_empty(), "one copy is enough");
        assert!(accounts_differ(&then, &reading(108, [16, 16, 48, 66], true)).is_empty(), "the counters may be ahead");
        assert_eq!(accounts_differ(&then, &reading(116, [8, 8, 48, 58], true)).len(), 1);
        assert_eq!(accounts_differ(&then, &reading(99, [8, 8, 48, 58], true)).len(), 1, "the statistics went backwards");
    }

    #[test]
    fn unknown_outside_and_stale_are_reasons() {
        let then = reading(0, [0; PROGRAMS], true);
        for (unknown, outside, stale) in [(1, 0, 0), (0, 1, 0), (0, 0, 1)] {
            let now = Reading { counts: Counts { unknown, outside, stale, ..Counts::default() }, ..then };
            assert_eq!(accounts_differ(&then, &now).len(), 1);
        }
    }

    #[test]
    fn only_equal_accounts_read_in_quiet_prove_anything() {
        let then = reading(100, [0, 0, 40, 50], true);
        assert!(proved_whole(&then, &reading(108, [8, 8, 48, 50], true)));
        assert!(proved_whole(&then, &reading(108, [0, 0, 40, 58], true)));
        assert!(!proved_whole(&then, &reading(108, [8, 8, 47, 57], true)));
        assert!(!proved_whole(&then, &reading(108, [8, 8, 48, 58], false)));
        assert!(!proved_whole(&reading(100, [0, 0, 40, 50], false), &reading(108, [8, 8, 48, 58], true)));
    }
}
