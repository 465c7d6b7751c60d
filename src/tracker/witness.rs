//! Whether the bits count: what the programs counted, what they missed, and what the kernel's own statistics say.
//!
//! `complete` counts in `block_rq_complete`, which fires just before the kernel adds the same bytes to the disk's
//! statistics. So "statistics first, counters afterwards" may only ever show the counters ahead; where they are behind,
//! completions went by unseen. That happens without any count of misses too (a kernel may run no tracing program at all
//! in the context that an interrupt found), so the statistics, not the misses, decide about completions.
//!
//! What a lost completion costs. Its write was seen at submit, so its block was taken by the first flip after that. Only
//! if the write was still in flight when the block was read is the copy old, and then the block is among those that were
//! taken since the last receipt, unless the write was in flight over the very cut that the receipt was for. So a flip
//! that finds completions missing takes everything without a receipt once more, and that is enough if nothing was in
//! flight at the last cut. That nothing was is shown by equality: all that was submitted has been completed.
//!
//! A write that neither kind saw is lost for good: then the kernel's account is ahead of all programs', or every copy of
//! `submit` was skipped; the volume is in doubt.

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
    /// Writes that found no place in the in-flight table.
    pub untracked: u64,
    /// Sectors submitted that never became a request (RWF_NOWAIT, errors before the driver): the kernel will not count them.
    pub refused: u64,
}

impl Counts {
    /// Sectors completed as the copy that saw most of them counted, since `then`.
    fn completed_since(&self, then: &Counts) -> u64 {
        let since = |at: usize| self.sectors[at].wrapping_sub(then.sectors[at]);
        since(2).max(since(3))
    }
    /// Sectors submitted as the copy that saw most of them counted, since `then`.
    fn submitted_since(&self, then: &Counts) -> u64 {
        let since = |at: usize| self.sectors[at].wrapping_sub(then.sectors[at]);
        since(0).max(since(1)).saturating_sub(self.refused.wrapping_sub(then.refused))
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
    let by_us = is.submitted_since(was).max(is.completed_since(was));
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

/// What the accounts say about completions since `then`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Completions {
    /// Sectors completed that no copy saw, beyond those already answered.
    pub lost: u64,
    /// All that was submitted since `then` has been completed: nothing is in flight.
    pub settled: bool,
}

/// Completions since `then`, of which `answered` sectors are known to have been lost.
pub(super) fn completions(then: &Reading, answered: u64, now: &Reading) -> Completions {
    let by_kernel = now.stat_sectors.saturating_sub(then.stat_sectors);
    let lost = by_kernel.saturating_sub(now.counts.completed_since(&then.counts)).saturating_sub(answered);
    let all_known = now.counts.completed_since(&then.counts) + answered + lost == by_kernel;
    let settled = then.quiet && now.quiet && all_known && now.counts.submitted_since(&then.counts) == by_kernel;
    Completions { lost, settled }
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
        let then = reading(100, [10, 10, 40, 50], true);
        assert!(accounts_differ(&then, &reading(108, [18, 18, 48, 58], true)).is_empty());
        assert!(accounts_differ(&then, &reading(108, [10, 10, 40, 58], true)).is_empty(), "one copy is enough");
        assert!(accounts_differ(&then, &reading(108, [18, 10, 40, 50], true)).is_empty(), "of either kind");
        assert!(accounts_differ(&then, &reading(108, [26, 26, 48, 66], true)).is_empty(), "the counters may be ahead");
        assert_eq!(accounts_differ(&then, &reading(116, [18, 18, 48, 58], true)).len(), 1);
        assert_eq!(accounts_differ(&then, &reading(99, [18, 18, 48, 58], true)).len(), 1, "the statistics went backwards");
    }

    #[test]
    fn lost_completions_are_counted_once_and_nothing_in_flight_is_shown_by_equality() {
        let then = reading(100, [10, 10, 40, 50], true);
        let check = |answered, now| {
            let Completions { lost, settled } = completions(&then, answered, &now);
            (lost, settled)
        };
        assert_eq!(check(0, reading(124, [34, 34, 64, 74], true)), (0, true));
        assert_eq!(check(0, reading(124, [34, 30, 64, 60], true)), (0, true), "one copy of each is enough");
        assert_eq!(check(0, reading(124, [42, 42, 64, 74], true)), (0, false), "eight sectors in flight");
        assert_eq!(check(0, reading(124, [34, 34, 64, 74], false)), (0, false), "the counters moved");
        assert_eq!(check(0, reading(124, [34, 34, 56, 66], true)), (8, true), "eight went by unseen");
        assert_eq!(check(8, reading(124, [34, 34, 56, 66], true)), (0, true), "and are not counted again");
        assert_eq!(check(8, reading(132, [42, 42, 56, 66], true)), (8, true), "but others are");
        assert_eq!(check(0, reading(116, [34, 34, 64, 74], true)), (0, false), "counted, and not yet in the statistics");
        let busy = Reading { quiet: false, ..then };
        assert!(!completions(&busy, 0, &reading(124, [34, 34, 64, 74], true)).settled);
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
