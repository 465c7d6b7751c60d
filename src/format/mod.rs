//! Owns every byte that outlives the process or leaves the host: frames, messages, journal and ledger records.
//! Gives encoders and decoders with a byte map beside each; a version stands in each.
//! Keeps old bytes readable: golden tests hold the bytes of every version ever shipped.
//! Never does I/O; never allocates before the length is checked.
//! Assumes all its input is hostile.
#![forbid(unsafe_code)]
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::model::{Digest, Fault, GroupId, ImagePin, Moment, Position, Res};
use serde::{Deserialize, Serialize};

/// The wire protocol's version; hosts of different versions say so and stop.
pub const PROTOCOL: u16 = 1;
/// Largest payload of one frame, in bytes.
pub const FRAME_PAYLOAD_MAX: usize = 1 << 20;
/// Largest JSON control payload (a group's definition with its recipes), in bytes.
pub const CONTROL_MAX: usize = 1 << 20;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Purpose {
    /// Ship generations of one group.
    Replicate,
    /// Move images of one group.
    Images,
    /// Ask how the peer stands to a group (role, epoch, tip).
    Ask,
}

/// How a transfer lands on the standby.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Landing {
    /// Straight onto the replica: only while the standby has committed nothing (first sync).
    Direct,
    /// Through the journal: whole or invisible.
    Journal,
}

/// What the standby says of its replica of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// Its role, as `model::Role`.
    pub role: crate::model::Role,
    /// The highest epoch that it has made durable.
    pub epoch: u64,
    /// The last committed position and its digest; generation 0 = nothing committed.
    pub tip: Position,
    /// See `tip`.
    pub tip_digest: Digest,
    /// A journalled generation of which it holds a beginning: its position, and payload bytes held.
    pub open: Option<(Position, u64)>,
    /// Whether a direct first sync has begun (the replica is neither empty nor whole).
    pub syncing: bool,
    /// Whether it has the group's definition at all.
    pub defined: bool,
}

/// Everything that two agents say to each other. `Chunks`, `Digests` and `ImageBytes` are binary; the rest is JSON inside a frame.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// Opens every conversation: who, what for, which group and epoch.
    Hello { protocol: u16, host: String, purpose: Purpose, group: GroupId, epoch: u64 },
    /// The standby's answer.
    Welcome { protocol: u16, host: String, standing: Standing, credit_bytes: u64 },
    /// The whole definition of the group, canonical JSON of `GroupSpec`.
    Define { spec: Vec<u8> },
    /// The definition is durable and the replicas exist.
    Defined,
    /// Begins a transfer. `parent` must be the standby's tip. `payload_max_bytes` lets it reserve.
    Begin { position: Position, parent: Position, parent_digest: Digest, landing: Landing, payload_max_bytes: u64 },
    /// A piece of the payload: whole change records, one after another.
    Chunks { bytes: Vec<u8> },
    /// Makes what was sent directly so far durable; answered by `SegmentDone`.
    Segment { number: u64 },
    /// Answer to `Segment`.
    SegmentDone { number: u64 },
    /// Ends the payload: its length and blake3, and the wall-clock instants at which the cut began.
    End { payload_bytes: u64, payload_digest: Digest, cut_at: Moment },
    /// The generation is durable and whole.
    Committed { position: Position, digest: Digest },
    /// Gives up the open transfer.
    Abort { reason: String },
    /// Allows this many more payload bytes.
    Credit { bytes: u64 },
    /// Asks for the digests of a range of a volume's replica (blocks).
    DigestsWanted { volume: u16, start: u64, count: u64 },
    /// Digests of consecutive blocks from `start`; blocks that nobody names are zero. 16 bytes each.
    Digests { volume: u16, start: u64, digests: Vec<u8> },
    /// The range is done.
    DigestsDone { volume: u16 },
    /// Offers an image.
    ImageOffer { pin: ImagePin, archive_bytes: u64 },
    /// The image is wanted from this byte on; `None` = it is already here and proven.
    ImageWanted { from_byte: Option<u64> },
    /// A piece of the archive.
    ImageBytes { bytes: Vec<u8> },
    /// The archive is whole.
    ImageEnd,
    /// The image is loaded, proven equal to its pin, and runnable.
    ImageReady,
    /// Nothing to say, still here.
    Ping,
    /// Answer to `Ping`.
    Pong,
    /// Refuses in words; the connection then closes.
    Refused { fault: Fault },
}

impl Message {
    /// Appends the frame (header + payload) to `out`.
    pub fn encode(&self, _out: &mut Vec<u8>) { todo!() }
    /// Decodes one frame's payload by its kind.
    pub fn decode(_kind: u16, _payload: Vec<u8>) -> Res<Message> { todo!() }
}

/// Length of a frame header in bytes.
pub const FRAME_HEADER_BYTES: usize = 24;

/// A frame header that was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHead {
    /// Kind of message.
    pub kind: u16,
    /// Payload length in bytes, at most [`FRAME_PAYLOAD_MAX`].
    pub payload_bytes: usize,
    /// crc32 of the payload.
    pub payload_crc32: u32,
}

impl FrameHead {
    /// Decodes and checks a header. Errors: `PROTOCOL_ERROR` (magic, crc, length), `VERSION_MISMATCH`.
    pub fn decode(_bytes: &[u8; FRAME_HEADER_BYTES]) -> Res<FrameHead> { todo!() }
}

/// The chained digest of a generation: blake3 over a domain word, group, position, parent and its digest, payload length and
/// digest, cut instant.
pub fn generation_digest(_group: GroupId, _position: Position, _parent: Position, _parent_digest: Digest, _payload_bytes: u64, _payload_digest: Digest, _cut_at: Moment) -> Digest { todo!() }

mod journal_record;
mod ledger_record;
pub use journal_record::{Commit, Found, GenerationHead, JOURNAL_BLOCK_BYTES, SECTOR_BYTES, Sector, Superblock};
pub use ledger_record::LedgerHead;
