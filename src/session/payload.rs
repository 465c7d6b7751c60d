//! The running count and digest of a generation's payload, kept alike on both sides.

use crate::model::{Digest, Fault, Res};

/// Payload so far.
#[derive(Debug)]
pub struct Payload {
    // Boxed: it is 2 KB, and it is moved about with the stages of the conversation.
    hasher: Box<blake3::Hasher>,
    bytes: u64,
    max_bytes: u64,
}

impl Payload {
    /// Nothing yet, of at most `max_bytes`.
    pub fn new(max_bytes: u64) -> Payload {
        Payload { hasher: Box::default(), bytes: 0, max_bytes }
    }
    /// Takes a piece. `PROTOCOL_ERROR` when it is empty or more than was announced; then nothing has changed.
    pub fn take(&mut self, piece: &[u8]) -> Res<()> {
        let after = self.bytes.checked_add(piece.len() as u64).filter(|after| *after <= self.max_bytes);
        match after {
            _ if piece.is_empty() => Err(Fault::protocol("an empty piece of payload")),
            None => Err(Fault::protocol(format!("the payload is longer than the {} bytes that were announced", self.max_bytes))),
            Some(after) => {
                self.hasher.update(piece);
                self.bytes = after;
                Ok(())
            }
        }
    }
    /// Bytes so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
    /// blake3 of the bytes so far.
    pub fn digest(&self) -> Digest {
        Digest(*self.hasher.finalize().as_bytes())
    }
}
