//! Owns the conversation between two agents as two state machines without I/O: sender and receiver.
//! Gives the next action for each message; refuses, in words, whatever is out of turn.
//! Keeps the bytes in flight within the credit that the receiver gave.
//! Never touches a socket, a clock or a disk; an acknowledgement can be built from a `SealedProof` only.
//! Assumes messages come from the peer that `link` authenticated.
//!
//! ```text
//! Hello ──► Welcome ──┬─ Ask:       (Ping ──► Pong)*
//!                     ├─ Images:    (ImageOffer ──► ImageWanted, ImageBytes* , ImageEnd ──► ImageReady)*
//!                     └─ Replicate: Define ──► Defined
//!                                   DigestsWanted ──► Digests*, DigestsDone
//!                                   Unchanged
//!                                   Begin, (Chunks ──► Credit | Segment ──► SegmentDone)*, End ──► Committed
//! ```
//!
//! An error ends the conversation on the side that found it: it is said once (`Refused`), and nothing is accepted afterwards.
#![forbid(unsafe_code)]
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod payload;
mod receiver;
mod sender;

pub use receiver::{OpenTransfer, Receiver, ReceiverAction};
pub use sender::{Sender, SenderEvent};

use crate::format::{Message, PROTOCOL_SECTORS, version_mismatch};
use crate::model::{Code, Digest, Fault, Position, Receipt, Res};

/// The peer's acknowledgement of one generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acknowledged {
    position: Position,
    digest: Digest,
}

impl Receipt for Acknowledged {
    fn position(&self) -> Position {
        self.position
    }
    fn digest(&self) -> Digest {
        self.digest
    }
}

/// Whether a generation at `position` may follow `tip` in a conversation that was opened in `epoch` (S2, S6).
fn follows(position: Position, tip: Position, epoch: u64) -> Res<()> {
    if position.epoch < epoch.max(tip.epoch) {
        return Err(stale(position.epoch, epoch.max(tip.epoch)));
    }
    if position.epoch > epoch {
        let (said, is) = (epoch, position.epoch);
        return Err(Fault::protocol(format!("the conversation was opened in epoch {said}, the generation is of epoch {is}")));
    }
    if tip.generation.checked_add(1) != Some(position.generation) {
        return Err(chain_broken(format!("generation {position} does not follow {tip}")));
    }
    Ok(())
}

/// The fault for a peer whose hello or welcome is of a version that has no place here.
fn unknown_version(theirs: u16) -> Fault {
    let fault = version_mismatch(theirs);
    Fault { cause: format!("{}, and {PROTOCOL_SECTORS} where sector records are sent", fault.cause), ..fault }
}

fn stale(theirs: u64, ours: u64) -> Fault {
    let cause = format!("epoch {theirs} is over, epoch {ours} is known");
    Fault::new(
        Code::StaleEpoch,
        "the group",
        cause,
        "stop serving it on the host of the lower epoch, then run `doublure failback`",
    )
}

fn chain_broken(cause: impl Into<String>) -> Fault {
    Fault::new(Code::ChainBroken, "the generation", cause, "both sides are compared and the next generation carries what differs")
}

/// The fault for a message that has no place here. Its content is not repeated: it may be large, or secret.
fn out_of_turn(message: &Message, stage: &str) -> Fault {
    Fault::protocol(format!("{} is out of turn {stage}", word(message)))
}

fn word(message: &Message) -> &'static str {
    match message {
        Message::Hello { .. } => "Hello",
        Message::Welcome { .. } => "Welcome",
        Message::Define { .. } => "Define",
        Message::Defined => "Defined",
        Message::Begin { .. } => "Begin",
        Message::Chunks { .. } => "Chunks",
        Message::Segment { .. } => "Segment",
        Message::SegmentDone { .. } => "SegmentDone",
        Message::End { .. } => "End",
        Message::Committed { .. } => "Committed",
        Message::Abort { .. } => "Abort",
        Message::Credit { .. } => "Credit",
        Message::DigestsWanted { .. } => "DigestsWanted",
        Message::Digests { .. } => "Digests",
        Message::DigestsDone { .. } => "DigestsDone",
        Message::ImageOffer { .. } => "ImageOffer",
        Message::ImageWanted { .. } => "ImageWanted",
        Message::ImageBytes { .. } => "ImageBytes",
        Message::ImageEnd => "ImageEnd",
        Message::ImageReady => "ImageReady",
        Message::Ping => "Ping",
        Message::Pong => "Pong",
        Message::Refused { .. } => "Refused",
        Message::Unchanged { .. } => "Unchanged",
    }
}

#[cfg(test)]
mod pipe_tests;
#[cfg(test)]
mod tests;
