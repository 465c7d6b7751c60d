//! Owns the smallest faithful form of a run of blocks, and back: zero, plain or lz4, with crc32 of the plain bytes.
//! Gives change records that stand one after another in a generation's payload.
//! Keeps decode(encode(x)) = x; whatever else is decoded is an error, never other bytes.
//! Never allocates more than the run's declared size, which it checks against the volume's geometry first.
//! Assumes lz4_flex checks its input (0.12.1 or later).
#![forbid(unsafe_code)]
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::model::{BlockRun, Res, VolumeSpec};

/// A 128-bit digest of one block (blake3, cut), XORed with that of a zero block: all zero = "this block is zero".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockDigest(pub [u8; 16]);

impl BlockDigest {
    /// "Not known": equal to no block's digest.
    pub const UNKNOWN: BlockDigest = BlockDigest([0xff; 16]);
    /// The digest of a zero block.
    pub const ZERO: BlockDigest = BlockDigest([0; 16]);
    /// Of one block's bytes (a short last block is taken as padded with zeroes).
    pub fn of(_block: &[u8]) -> BlockDigest { todo!() }
}

/// Length of a change record's header in bytes (byte map in the module docs of `delta::record`).
pub const RECORD_HEADER_BYTES: usize = 32;

/// A change record read from bytes and checked against the geometry, not yet decompressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHead {
    /// Index of the volume in the group.
    pub volume: u16,
    /// The blocks.
    pub run: BlockRun,
    /// Bytes that follow the header.
    pub stored_bytes: u32,
    /// crc32 of the plain bytes.
    pub plain_crc32: u32,
    /// 0 zero, 1 plain, 2 lz4.
    pub encoding: u8,
}

/// Appends the record of a run to `out`. `plain` is exactly the run's bytes (cut at the volume's size).
pub fn encode(_volume: u16, _run: BlockRun, _plain: &[u8], _out: &mut Vec<u8>) { todo!() }
/// Reads the next record's head at the start of `bytes`: `None` when fewer bytes than a header are there. Every field is
/// checked against `volumes`. Error: `PROTOCOL_ERROR`.
pub fn head(_bytes: &[u8], _volumes: &[VolumeSpec]) -> Res<Option<RecordHead>> { todo!() }
/// Decodes a record's stored bytes into `plain`, whose length must be the run's in bytes; checks the crc. Error: `CORRUPT`.
pub fn decode(_head: &RecordHead, _stored: &[u8], _plain: &mut [u8]) -> Res<()> { todo!() }
/// Whether all bytes are zero.
pub fn is_zero(_bytes: &[u8]) -> bool { todo!() }
