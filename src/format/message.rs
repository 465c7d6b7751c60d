//! What two agents say to each other, and the payload of each.
//!
//! | kind | message | payload |
//! |---|---|---|
//! | 1 | Hello | JSON |
//! | 2 | Welcome | JSON |
//! | 3 | Define | the definition as it is (canonical JSON of a `GroupSpec`) |
//! | 4 | Defined | JSON |
//! | 5 | Begin | JSON |
//! | 6 | Chunks | change records as they are (byte map in `delta::record`) |
//! | 7 | Segment | JSON |
//! | 8 | SegmentDone | JSON |
//! | 9 | End | JSON |
//! | 10 | Committed | JSON |
//! | 11 | Abort | JSON |
//! | 12 | Credit | JSON |
//! | 13 | DigestsWanted | JSON |
//! | 14 | Digests | `[0..2)` u16 volume, `[2..8)` zero, `[8..16)` u64 first block, then 16 bytes a block |
//! | 15 | DigestsDone | JSON |
//! | 16 | ImageOffer | JSON |
//! | 17 | ImageWanted | JSON |
//! | 18 | ImageBytes | a piece of the archive as it is |
//! | 19 | ImageEnd | JSON |
//! | 20 | ImageReady | JSON |
//! | 21 | Ping | JSON |
//! | 22 | Pong | JSON |
//! | 23 | Refused | JSON |
//! | 24 | Unchanged | JSON |
//!
//! A JSON payload is one object with the message's fields in the order of [`Message`], without spaces. No other spelling is
//! taken: what was decoded is encoded again and must give the same bytes. So nothing unknown, doubled or oversized slips through.

use crate::format::control;
use crate::format::frame::{FRAME_PAYLOAD_MAX, put_frame};
use crate::model::{Digest, Fault, GroupId, ImagePin, Moment, Position, Res, Role};
use serde::{Deserialize, Serialize};

/// Largest JSON control payload (a group's definition with its recipes), in bytes.
pub const CONTROL_MAX: usize = 1 << 20;
/// Largest JSON payload of the messages whose fields are bounded, in bytes.
const JSON_MAX: usize = 64 << 10;
/// What stands before the digests in a `Digests` payload, in bytes.
const DIGESTS_HEAD_BYTES: usize = 16;

const DEFINE: u16 = 3;
const CHUNKS: u16 = 6;
const DIGESTS: u16 = 14;
const IMAGE_BYTES: u16 = 18;
const LAST_KIND: u16 = 24;

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
#[serde(deny_unknown_fields)]
pub struct Standing {
    /// Its role, as `model::Role`.
    pub role: Role,
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
#[allow(missing_docs)]
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
    /// Nothing has changed since `position`, which is the standby's tip: its copy is that of the instant `at` as well.
    Unchanged { position: Position, at: Moment },
}

impl Message {
    /// Appends the frame (header + payload) to `out`. Words of a `Refused` or `Abort` are cut at their bound and lose their
    /// control characters. Panics when bytes are more than [`FRAME_PAYLOAD_MAX`] (or [`CONTROL_MAX`]): the caller's mistake.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Message::Define { spec } => put_bytes(DEFINE, &[spec], out),
            Message::Chunks { bytes } => put_bytes(CHUNKS, &[bytes], out),
            Message::ImageBytes { bytes } => put_bytes(IMAGE_BYTES, &[bytes], out),
            Message::Digests { volume, start, digests } => {
                put_bytes(DIGESTS, &[&volume.to_le_bytes(), &[0; 6], &start.to_le_bytes(), digests], out);
            }
            _ => put_frame(control::kind(self), out, |out| control::put(self, out)),
        }
    }

    /// Decodes one frame's payload by its kind. The crc is the frame's: see `FrameHead::message`, which checks it first.
    /// Error: `PROTOCOL_ERROR`.
    pub fn decode(kind: u16, payload: Vec<u8>) -> Res<Message> {
        match payload_max(kind) {
            None => return Err(Fault::protocol(format!("there is no message of kind {kind}"))),
            Some(max) if payload.len() > max => return Err(Fault::protocol(format!("a message of kind {kind} is too long"))),
            Some(_) => {}
        }
        match kind {
            DEFINE => Ok(Message::Define { spec: payload }),
            CHUNKS => Ok(Message::Chunks { bytes: payload }),
            IMAGE_BYTES => Ok(Message::ImageBytes { bytes: payload }),
            DIGESTS => digests(payload),
            _ => control::get(kind, &payload),
        }
    }
}

/// The most bytes a payload of this kind may have; `None` when there is no such kind.
pub fn payload_max(kind: u16) -> Option<usize> {
    match kind {
        DEFINE => Some(CONTROL_MAX),
        CHUNKS | DIGESTS | IMAGE_BYTES => Some(FRAME_PAYLOAD_MAX),
        1..=LAST_KIND => Some(JSON_MAX),
        _ => None,
    }
}

fn put_bytes(kind: u16, pieces: &[&[u8]], out: &mut Vec<u8>) {
    put_frame(kind, out, |out| pieces.iter().for_each(|piece| out.extend_from_slice(piece)));
}

fn digests(mut payload: Vec<u8>) -> Res<Message> {
    let Some(head) = payload.first_chunk::<DIGESTS_HEAD_BYTES>().copied() else {
        return Err(Fault::protocol("digests end before they begin"));
    };
    if head[2..8] != [0; 6] || !payload.len().is_multiple_of(16) {
        return Err(Fault::protocol("digests are not 16 bytes a block"));
    }
    let volume = u16::from_le_bytes([head[0], head[1]]);
    let start = u64::from_le_bytes([head[8], head[9], head[10], head[11], head[12], head[13], head[14], head[15]]);
    payload.drain(..DIGESTS_HEAD_BYTES);
    Ok(Message::Digests { volume, start, digests: payload })
}
