//! Owns every byte that outlives the process or leaves the host: frames, messages, journal and ledger records.
//! Gives encoders and decoders with a byte map beside each; a version stands in each.
//! Keeps old bytes readable: golden tests hold the bytes of every version ever shipped.
//! Never does I/O; never allocates before the length is checked.
//! Assumes all its input is hostile.
#![forbid(unsafe_code)]
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod control;
mod frame;
mod generation;
mod journal_record;
mod ledger_record;
mod message;

pub use frame::{FRAME_HEADER_BYTES, FRAME_PAYLOAD_MAX, FrameHead, PROTOCOL, PROTOCOL_SECTORS, version_mismatch};
pub use generation::generation_digest;
pub use journal_record::{Commit, Found, GenerationHead, JOURNAL_BLOCK_BYTES, SECTOR_BYTES, Sector, Superblock};
pub use ledger_record::LedgerHead;
pub use message::{CONTROL_MAX, Landing, Message, Purpose, Standing};

#[cfg(test)]
mod tests;
