//! The chained digest of a generation.
//!
//! blake3 over these 144 bytes (little endian):
//!
//! | bytes | what |
//! |---|---|
//! | `[0..16)` | the domain word `DBLR-GENERATION1` |
//! | `[16..32)` | identity of the group |
//! | `[32..48)` | its position: u64 epoch, u64 generation |
//! | `[48..64)` | its parent's position: u64 epoch, u64 generation |
//! | `[64..96)` | its parent's digest (zeroes when nothing was committed before) |
//! | `[96..104)` | u64 payload bytes |
//! | `[104..136)` | blake3 of the payload |
//! | `[136..144)` | u64 cut instant, milliseconds since 1970 UTC |

use crate::model::{Digest, GroupId, Moment, Position};

const DOMAIN: &[u8; 16] = b"DBLR-GENERATION1";

/// The chained digest of a generation: blake3 over a domain word, group, position, parent and its digest, payload length and
/// digest, cut instant.
pub fn generation_digest(
    group: GroupId,
    position: Position,
    parent: Position,
    parent_digest: Digest,
    payload_bytes: u64,
    payload_digest: Digest,
    cut_at: Moment,
) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(DOMAIN).update(&group.0);
    for place in [position, parent] {
        hasher.update(&place.epoch.to_le_bytes()).update(&place.generation.to_le_bytes());
    }
    hasher.update(&parent_digest.0).update(&payload_bytes.to_le_bytes()).update(&payload_digest.0);
    hasher.update(&cut_at.0.to_le_bytes());
    Digest(*hasher.finalize().as_bytes())
}
