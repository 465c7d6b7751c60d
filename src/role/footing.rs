//! On what footing a primary stands towards its standby once both have introduced themselves.

use crate::format::{Landing, Standing};
use crate::model::{Code, Digest, Fault, Position, Res, Role};

/// What stands in the place of the last receipt from the moment that everything a first sync must carry is marked. It lives and dies
/// with the bits: only while it stands may a first sync be resumed on them.
pub const ALL_MARKED: (Position, Digest) = (Position { epoch: 0, generation: 0 }, Digest([1; 32]));

/// What the primary knows when the standby has said how it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grounds {
    /// Our epoch.
    pub epoch: u64,
    /// Every volume's bits are unbroken since the base, and nothing casts doubt on them.
    pub bits_count: bool,
    /// The digest maps are of this standby's copy and were never interrupted.
    pub known_counts: bool,
    /// The last position with a receipt; [`ALL_MARKED`] while a first sync has none.
    pub acked: (Position, Digest),
    /// A generation that was cut and may have been committed.
    pub pending: (Position, Digest),
}

/// What is to be done before ordinary cycles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Footing {
    /// The bits say what differs.
    Incremental,
    /// The standby holds nothing: all data is sent, straight to the replica.
    FirstSync,
    /// A first sync was broken off; the bits and digest maps say what is missing.
    ResumeFirstSync,
    /// Doubt: both sides are compared in full, then what differs is sent, landing thus.
    Compare(Landing),
}

/// Decides. Doubt means dirty (S5): whatever is not proven leads to a comparison. Errors: `STALE_EPOCH`, `WRONG_ROLE`.
pub fn footing(grounds: &Grounds, standing: &Standing) -> Res<Footing> {
    if standing.epoch > grounds.epoch {
        return Err(Fault::new(
            Code::StaleEpoch,
            "this group",
            format!("the other side holds epoch {} and we hold {}: it was promoted", standing.epoch, grounds.epoch),
            "this side serves and ships nothing until it is failed back",
        ));
    }
    if standing.role != Role::Standby {
        return Err(Fault::new(
            Code::WrongRole,
            "this group",
            format!("the peer is {:?} at epoch {}, not our standby", standing.role, standing.epoch),
            "check which side is to serve with `doublure status` on both hosts",
        ));
    }
    let tip = (standing.tip, standing.tip_digest);
    let counts = grounds.bits_count && grounds.known_counts;
    Ok(match (standing.tip.generation, standing.syncing) {
        (0, false) => Footing::FirstSync,
        (0, true) if counts && grounds.acked == ALL_MARKED => Footing::ResumeFirstSync,
        (0, true) => Footing::Compare(Landing::Direct),
        // It lost something that it had acknowledged: whatever it holds, only a comparison makes it whole.
        (_, true) => Footing::Compare(Landing::Journal),
        _ if counts && (tip == grounds.acked || tip == grounds.pending) => Footing::Incremental,
        _ => Footing::Compare(Landing::Journal),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(generation: u64) -> (Position, Digest) {
        (Position { epoch: 1, generation }, Digest([generation as u8; 32]))
    }

    #[test]
    fn every_combination_has_one_answer_and_doubt_means_comparison() {
        for bits_count in [true, false] {
            for known_counts in [true, false] {
                for syncing in [true, false] {
                    for (tip, marked) in [0, 4, 5, 6, 9].map(|tip| (tip, false)).into_iter().chain([(0, true), (5, true)]) {
                        let acked = if marked { ALL_MARKED } else { at(5) };
                        let grounds = Grounds { epoch: 1, bits_count, known_counts, acked, pending: at(6) };
                        let (tip, tip_digest) = if tip == 0 { Default::default() } else { at(tip) };
                        let standing =
                            Standing { role: Role::Standby, epoch: 1, tip, tip_digest, open: None, syncing, defined: true };
                        let got = footing(&grounds, &standing).unwrap();
                        let counts = bits_count && known_counts;
                        let want = match tip.generation {
                            0 if !syncing => Footing::FirstSync,
                            0 if counts && marked => Footing::ResumeFirstSync,
                            0 => Footing::Compare(Landing::Direct),
                            _ if syncing => Footing::Compare(Landing::Journal),
                            5 if marked => Footing::Compare(Landing::Journal),
                            5 | 6 if counts => Footing::Incremental,
                            _ => Footing::Compare(Landing::Journal),
                        };
                        assert_eq!(got, want, "{grounds:?} {standing:?}");
                        let forged = Standing { tip_digest: Digest([99; 32]), ..standing.clone() };
                        if tip.generation > 0 {
                            assert_eq!(footing(&grounds, &forged).unwrap(), Footing::Compare(Landing::Journal));
                        }
                        let ahead = Standing { epoch: 2, ..standing.clone() };
                        assert_eq!(footing(&grounds, &ahead).unwrap_err().code, Code::StaleEpoch);
                        let serving = Standing { role: Role::Primary, ..standing };
                        assert_eq!(footing(&grounds, &serving).unwrap_err().code, Code::WrongRole);
                    }
                }
            }
        }
    }
}
