//! Owns the smallest faithful form of a run of blocks or sectors, and back: zero, plain or lz4, with crc32 of the plain bytes.
//! Gives change records that stand one after another in a generation's payload.
//! Keeps decode(encode(x)) = x; whatever else is decoded is an error, never other bytes.
//! Never allocates more than the run's declared size, which it checks against the volume's geometry first.
//! Assumes lz4_flex checks its input (0.12.1 or later).
#![forbid(unsafe_code)]
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod digest;
mod pack;
mod record;
mod zero;

pub use digest::BlockDigest;
pub use record::{PLAIN_BYTES_MAX, RECORD_BYTES_MAX, RECORD_HEADER_BYTES, RUN_BLOCKS_MAX, RUN_SECTORS_MAX, SECTOR_BYTES};
pub use record::{RecordHead, decode, encode, encode_sectors, encode_unpacked, head};
pub use zero::is_zero;

#[cfg(test)]
mod tests;
