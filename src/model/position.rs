//! Positions in the history of a group, digests, and the two proofs that cross rooms.

use serde::{Deserialize, Serialize};

/// (epoch, generation), ordered in that order: the fence first, then the count of cuts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Position {
    /// The fencing number; grows by one at every promote.
    pub epoch: u64,
    /// The number of the generation within the group's whole life; 0 = none yet.
    pub generation: u64,
}

impl std::fmt::Display for Position {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.epoch, self.generation)
    }
}

/// A 256-bit digest (blake3).
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Digest(pub [u8; 32]);

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        let bad = || serde::de::Error::custom("a digest is 64 hexadecimal digits");
        if text.len() != 64 || !text.is_ascii() {
            return Err(bad());
        }
        let mut bytes = [0; 32];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[at * 2..at * 2 + 2], 16).map_err(|_| bad())?;
        }
        Ok(Digest(bytes))
    }
}

/// A wall-clock instant in milliseconds since 1970 UTC; 0 = unknown. Only for people, never for order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Moment(pub u64);

/// Proof that the generation at `position` is durable and whole on this host.
///
/// Implemented by `journal::Sealed` (and its double), which only the journal can make; a standby's
/// acknowledgement can be built from nothing else.
pub trait SealedProof {
    /// The sealed position.
    fn position(&self) -> Position;
    /// The digest of the generation, chained to its parent's.
    fn digest(&self) -> Digest;
}

/// Proof, on the primary, that the peer has acknowledged the generation at `position`.
///
/// Made by `session` when the peer's acknowledgement arrives; demanded by `tracker` before bits are forgotten.
pub trait Receipt {
    /// The acknowledged position.
    fn position(&self) -> Position;
    /// The digest that the peer committed.
    fn digest(&self) -> Digest;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_higher_epoch_wins_over_any_generation() {
        let old = Position { epoch: 1, generation: 900 };
        let new = Position { epoch: 2, generation: 3 };
        assert!(new > old);
        assert_eq!(new.to_string(), "2/3");
    }
}
