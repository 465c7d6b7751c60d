//! Recovery as two tables: what to make of one place where a generation may stand, and what to make of the end of the chain.
//!
//! The walk begins at the superblock's floor and looks, again and again, at the few places where the next generation can stand:
//! where the last one ended, the ring's beginning, and the overflow files. Each place is asked the same questions and gets one
//! decision. Old generations of an earlier lap need no wiping: a header chains only if it names the tip, position and digest, as
//! its parent and stands after it, and the tip never goes back.

use crate::journal::recovery::Decision::*;

/// What is asked of one place. A later question is asked only where a row needs its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// A whole header of this ring stands there, and says that it stands there.
    pub head: bool,
    /// It names the tip as its parent and comes after it.
    pub chains: bool,
    /// Its COMMIT is whole and names it, or a mark does.
    pub committed: bool,
    /// The ledger says that it is on the replica.
    pub applied: bool,
    /// A mark names a later position.
    pub later: bool,
    /// Its payload gives the digest that the header says.
    pub intact: bool,
}

/// What is made of one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// Nothing of the chain stands there.
    Nothing,
    /// Part of the chain, and no longer wanted: walk on.
    Pass,
    /// Part of the chain, whole and still to be applied: walk on.
    Keep,
    /// It was never committed: drop it and say so.
    Drop,
    /// As `Drop`, and its payload is not what was flushed before its header was written: the disk does not keep its flushes.
    DropUnkept,
    /// It was committed and cannot be had: stop here, say so, take nothing on top.
    Corrupt,
}

type Row = ([Option<bool>; 6], Decision);
const Y: Option<bool> = Some(true);
const N: Option<bool> = Some(false);
const ANY: Option<bool> = None;

/// head, chains, committed, applied, later, intact.
#[rustfmt::skip]
pub(super) const PLACES: &[Row] = &[
    // Nothing was ever written there, or payload of another generation stands there now.
    ([N,   ANY, ANY, ANY, ANY, ANY], Nothing),
    // An older generation, or one whose parent was dropped.
    ([Y,   N,   ANY, ANY, ANY, ANY], Nothing),
    // On the replica already: the crash came between APPLIED and the superblock's advance. The payload is not read again.
    ([Y,   Y,   Y,   Y,   ANY, ANY], Pass),
    // Sealed, perhaps acknowledged, not applied.
    ([Y,   Y,   Y,   N,   ANY, Y  ], Keep),
    // Sealed and rotten since.
    ([Y,   Y,   Y,   N,   ANY, N  ], Corrupt),
    // Its COMMIT is rotten, a later generation was committed on top of it, and it is on the replica: only its place matters.
    ([Y,   Y,   N,   Y,   Y,   ANY], Pass),
    // The position was reached by another way (a direct sync) after this attempt was given up.
    ([Y,   Y,   N,   Y,   N,   ANY], Drop),
    // Its COMMIT is rotten and it is not on the replica. That it is whole is likely; likely is not enough.
    ([Y,   Y,   N,   N,   Y,   ANY], Corrupt),
    // The crash came between header and COMMIT. It was never acknowledged.
    ([Y,   Y,   N,   N,   N,   Y  ], Drop),
    // The same, but the payload was flushed before the header was written and is not there.
    ([Y,   Y,   N,   N,   N,   N  ], DropUnkept),
];

impl Place {
    fn answers(self) -> [bool; 6] {
        [self.head, self.chains, self.committed, self.applied, self.later, self.intact]
    }
    /// The decision; the table has one row for every combination.
    pub fn decide(self) -> Decision {
        lookup(PLACES, self.answers()).unwrap_or(Corrupt)
    }
    /// Whether the decision still hangs on the payload, which is dear to read.
    pub fn needs_payload(self) -> bool {
        Place { intact: true, ..self }.decide() != Place { intact: false, ..self }.decide()
    }
}

/// What is asked when no place continues the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct End {
    /// A mark or an overflow file shows that something after the tip was committed.
    pub beyond: bool,
    /// The ledger says that the last of it is on the replica.
    pub beyond_applied: bool,
    /// One superblock is damaged, and may have been the newer one.
    pub damaged: bool,
    /// The tip is at or after the position that the ledger calls applied.
    pub reached: bool,
    /// The floor is after the position that the ledger calls applied: what was let go of is not on the replica.
    pub floor_ahead: bool,
}

/// What is made of the end of the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// This is all there is.
    Whole,
    /// Committed generations are missing.
    Lost,
    /// The ledger is older than the journal.
    LedgerBehind,
}

/// beyond, beyond_applied, damaged, reached, floor_ahead.
#[rustfmt::skip]
pub(super) const ENDS: &[([Option<bool>; 5], Ending)] = &[
    // Generations are let go of only when the ledger has durably called them applied.
    ([ANY, ANY, ANY, ANY, Y  ], Ending::LedgerBehind),
    // A sealed generation cannot be reached: a bad block before a good one is rot, not a torn tail.
    ([Y,   N,   ANY, ANY, N  ], Ending::Lost),
    // What cannot be reached is on the replica, all of it: nothing is missing.
    ([Y,   Y,   ANY, ANY, N  ], Ending::Whole),
    // The older superblock may point to where newer generations have been written since. The ledger has seen later ones.
    ([N,   ANY, Y,   N,   N  ], Ending::Lost),
    // The older superblock, and everything that the ledger knows of was found: the newer one was torn, or freed nothing wanted.
    ([N,   ANY, Y,   Y,   N  ], Ending::Whole),
    ([N,   ANY, N,   ANY, N  ], Ending::Whole),
];

impl End {
    fn answers(self) -> [bool; 5] {
        [self.beyond, self.beyond_applied, self.damaged, self.reached, self.floor_ahead]
    }
    /// The decision; the table has one row for every combination.
    pub fn decide(self) -> Ending {
        lookup(ENDS, self.answers()).unwrap_or(Ending::Lost)
    }
}

fn matches<const N: usize>(row: &[Option<bool>; N], answers: [bool; N]) -> bool {
    row.iter().zip(answers).all(|(wanted, answer)| wanted.is_none_or(|wanted| wanted == answer))
}

fn lookup<const N: usize, T: Copy>(table: &[([Option<bool>; N], T)], answers: [bool; N]) -> Option<T> {
    table.iter().find(|(row, _)| matches(row, answers)).map(|(_, decision)| *decision)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one_row_each<const N: usize, T: Copy>(table: &[([Option<bool>; N], T)]) {
        let mut used = vec![0; table.len()];
        for bits in 0..1u32 << N {
            let answers = std::array::from_fn(|i| bits >> i & 1 == 1);
            let rows: Vec<usize> = (0..table.len()).filter(|row| matches(&table[*row].0, answers)).collect();
            assert_eq!(rows.len(), 1, "{answers:?} is in rows {rows:?}");
            used[rows[0]] += 1;
        }
        assert!(used.iter().all(|times| *times > 0));
    }

    #[test]
    fn every_combination_has_exactly_one_row() {
        one_row_each(PLACES);
        one_row_each(ENDS);
    }

    /// Said a second time, in words instead of rows.
    #[test]
    fn what_is_not_committed_is_never_kept_and_what_is_committed_is_never_dropped() {
        for bits in 0..64u8 {
            let b = |i: u8| bits >> i & 1 == 1;
            let place = Place { head: b(0), chains: b(1), committed: b(2), applied: b(3), later: b(4), intact: b(5) };
            let decision = place.decide();
            let ours = place.head && place.chains;
            assert_eq!(decision == Nothing, !ours);
            assert_eq!(decision == Keep, ours && place.committed && place.intact && !place.applied);
            if matches!(decision, Drop | DropUnkept) {
                assert!(!place.committed && !place.later);
            }
            if decision == Corrupt {
                assert!(!place.applied, "what is on the replica is not missed");
            }
        }
    }
}
