//! The frame around every message.
//!
//! Byte map of the header (little endian), which the payload follows:
//!
//! | bytes | what |
//! |---|---|
//! | `[0..4)` | `DBLR` |
//! | `[4..6)` | u16 protocol version, 1 (of frames and messages; a conversation may be of version 2, see [`PROTOCOL_SECTORS`]) |
//! | `[6..8)` | u16 kind of message (the list stands in `format::message`) |
//! | `[8..12)` | u32 payload bytes |
//! | `[12..16)` | u32 crc32 of the payload |
//! | `[16..20)` | zero |
//! | `[20..24)` | u32 crc32 of bytes `[0..20)` |

use crate::format::message::{Message, payload_max};
use crate::model::{Code, Fault, Res};

/// The wire protocol's version; hosts of different versions say so and stop.
pub const PROTOCOL: u16 = 1;
/// What `Hello` and `Welcome` say instead of [`PROTOCOL`] in a conversation whose payload may hold sector records (`delta::record`).
///
/// Frames and messages are those of version 1. Whoever sends no sector records goes on saying 1, so that hosts of different age
/// understand each other as long as they can; a host that does not know sector records refuses the `Hello` by its version, in words,
/// before a byte of payload is sent.
pub const PROTOCOL_SECTORS: u16 = 2;
/// Largest payload of one frame, in bytes.
pub const FRAME_PAYLOAD_MAX: usize = 1 << 20;
/// Length of a frame header in bytes.
pub const FRAME_HEADER_BYTES: usize = 24;

const MAGIC: &[u8; 4] = b"DBLR";

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
    ///
    /// The length is checked against the most that a message of this kind may have, so it is safe to allocate.
    pub fn decode(bytes: &[u8; FRAME_HEADER_BYTES]) -> Res<FrameHead> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if bytes[..4] != *MAGIC {
            return Err(Fault::protocol("it does not begin like a frame"));
        }
        if crc32fast::hash(&bytes[..20]) != u32_at(20) {
            return Err(Fault::protocol("the checksum of a frame's header is wrong"));
        }
        // The version comes before all that a version may change.
        if u16_at(4) != PROTOCOL {
            return Err(version_mismatch(u16_at(4)));
        }
        let (kind, payload_bytes) = (u16_at(6), u32_at(8) as usize);
        match payload_max(kind) {
            None => Err(Fault::protocol(format!("there is no message of kind {kind}"))),
            Some(max) if payload_bytes > max => {
                Err(Fault::protocol(format!("a message of kind {kind} has {payload_bytes} bytes, more than {max}")))
            }
            Some(_) if u32_at(16) != 0 => Err(Fault::protocol("a frame's header has something where it must be zero")),
            Some(_) => Ok(FrameHead { kind, payload_bytes, payload_crc32: u32_at(12) }),
        }
    }

    /// The message whose payload this is: checks length and crc first. Error: `PROTOCOL_ERROR`.
    pub fn message(&self, payload: Vec<u8>) -> Res<Message> {
        if payload.len() != self.payload_bytes || crc32fast::hash(&payload) != self.payload_crc32 {
            return Err(Fault::protocol("a payload is not what its frame's header says"));
        }
        Message::decode(self.kind, payload)
    }
}

/// The fault for a peer that speaks version `theirs`.
pub fn version_mismatch(theirs: u16) -> Fault {
    Fault::new(
        Code::VersionMismatch,
        "the peer",
        format!("it speaks version {theirs} of the protocol, this host speaks version {PROTOCOL}"),
        "install the same release of doublure on both hosts",
    )
}

/// Appends a frame of `kind` whose payload `fill` appends. Panics on a payload that no peer would take.
pub fn put_frame(kind: u16, out: &mut Vec<u8>, fill: impl FnOnce(&mut Vec<u8>)) {
    let at = out.len();
    out.resize(at + FRAME_HEADER_BYTES, 0);
    fill(out);
    let (header, payload) = out[at..].split_at_mut(FRAME_HEADER_BYTES);
    let fits = payload_max(kind).is_some_and(|max| payload.len() <= max);
    assert!(fits, "a message of kind {kind} cannot have {} bytes", payload.len());
    header[..4].copy_from_slice(MAGIC);
    header[4..6].copy_from_slice(&PROTOCOL.to_le_bytes());
    header[6..8].copy_from_slice(&kind.to_le_bytes());
    header[8..12].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    header[12..16].copy_from_slice(&crc32fast::hash(payload).to_le_bytes());
    let crc = crc32fast::hash(&header[..20]);
    header[20..24].copy_from_slice(&crc.to_le_bytes());
}
