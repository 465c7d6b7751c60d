//! The change record: one run of blocks of one volume, as it stands in a generation's payload, on the wire and in the journal.
//!
//! Byte map (little endian):
//!
//! | bytes | what |
//! |---|---|
//! | `[0..2)` | u16 magic `0x5244` (`DR`) |
//! | `[2]` | version, 1 |
//! | `[3]` | encoding: 0 zero, 1 plain, 2 lz4 block |
//! | `[4..6)` | u16 index of the volume in the group |
//! | `[6..8)` | zero |
//! | `[8..16)` | u64 index of the first block |
//! | `[16..20)` | u32 number of blocks, 1 to 64 |
//! | `[20..24)` | u32 stored bytes: 0 for zero, the plain length for plain, less than it for lz4 |
//! | `[24..28)` | u32 crc32 of the plain bytes, whatever the encoding |
//! | `[28..32)` | u32 crc32 of bytes `[0..28)` |
//! | `[32..)` | the stored bytes |
//!
//! The plain length is not stored: it is the run's, cut at the volume's size, and both sides know that.

use crate::delta::pack::{pack, unpack};
use crate::delta::zero::is_zero;
use crate::model::{BLOCK_BYTES, BlockRun, Code, Fault, Res, VolumeSpec};

/// Length of a change record's header in bytes (byte map in the module docs of `delta::record`).
pub const RECORD_HEADER_BYTES: usize = 32;
/// Longest run of one record, in blocks.
pub const RUN_BLOCKS_MAX: u64 = 64;
/// Longest record, header and stored bytes, in bytes: what a buffer must hold to take any one of them.
pub const RECORD_BYTES_MAX: usize = RECORD_HEADER_BYTES + (RUN_BLOCKS_MAX * BLOCK_BYTES) as usize;

const MAGIC: u16 = 0x5244;
const VERSION: u8 = 1;
const ZERO: u8 = 0;
const PLAIN: u8 = 1;
const LZ4: u8 = 2;

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
///
/// Allocates only where `out` must grow: hand the same one in again. Panics when `plain` cannot be the bytes of `run` or the
/// run is longer than [`RUN_BLOCKS_MAX`]: that is a mistake of the caller, and such a record must never be stored.
pub fn encode(volume: u16, run: BlockRun, plain: &[u8], out: &mut Vec<u8>) {
    encode_as(volume, run, plain, true, out);
}

/// The same without trying lz4: for a link that is faster than the processor.
pub fn encode_unpacked(volume: u16, run: BlockRun, plain: &[u8], out: &mut Vec<u8>) {
    encode_as(volume, run, plain, false, out);
}

fn encode_as(volume: u16, run: BlockRun, plain: &[u8], try_lz4: bool, out: &mut Vec<u8>) {
    assert!(fits(run.count, plain.len()), "{} bytes are not those of a run of {} blocks", plain.len(), run.count);
    let at = out.len();
    out.resize(at + RECORD_HEADER_BYTES, 0);
    let (encoding, stored_bytes) = if is_zero(plain) {
        (ZERO, 0)
    } else if let Some(stored) = try_lz4.then(|| pack(plain, out)).flatten() {
        (LZ4, stored)
    } else {
        out.extend_from_slice(plain);
        (PLAIN, plain.len())
    };
    let header = &mut out[at..at + RECORD_HEADER_BYTES];
    header[0..2].copy_from_slice(&MAGIC.to_le_bytes());
    header[2] = VERSION;
    header[3] = encoding;
    header[4..6].copy_from_slice(&volume.to_le_bytes());
    header[8..16].copy_from_slice(&run.start.to_le_bytes());
    header[16..20].copy_from_slice(&(run.count as u32).to_le_bytes());
    header[20..24].copy_from_slice(&(stored_bytes as u32).to_le_bytes());
    header[24..28].copy_from_slice(&crc32fast::hash(plain).to_le_bytes());
    let crc = crc32fast::hash(&header[..28]);
    header[28..32].copy_from_slice(&crc.to_le_bytes());
}

/// Whether `len` bytes can be those of `count` blocks, the last of which may be short, and `count` is allowed.
fn fits(count: u64, len: usize) -> bool {
    (1..=RUN_BLOCKS_MAX).contains(&count) && (len as u64).div_ceil(BLOCK_BYTES) == count
}

/// Reads the next record's head at the start of `bytes`: `None` when fewer bytes than a header are there. Every field is
/// checked against `volumes`. Error: `PROTOCOL_ERROR`.
pub fn head(bytes: &[u8], volumes: &[VolumeSpec]) -> Res<Option<RecordHead>> {
    let Some(header) = bytes.first_chunk::<RECORD_HEADER_BYTES>() else { return Ok(None) };
    let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let u32_at = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let refuse = |why: String| Err(Fault::protocol(format!("a change record {why}")));
    if u16_at(0) != MAGIC || crc32fast::hash(&header[..28]) != u32_at(28) {
        return refuse("does not begin with a record's header".into());
    }
    if header[2] != VERSION {
        return refuse(format!("is of version {}, which is not {VERSION}", header[2]));
    }
    let head = RecordHead {
        volume: u16_at(4),
        run: BlockRun { start: u64::from(u32_at(8)) | u64::from(u32_at(12)) << 32, count: u64::from(u32_at(16)) },
        stored_bytes: u32_at(20),
        plain_crc32: u32_at(24),
        encoding: header[3],
    };
    let Some(volume) = volumes.get(usize::from(head.volume)) else {
        return refuse(format!("names volume number {} of {}", head.volume, volumes.len()));
    };
    let (run, blocks) = (head.run, volume.blocks());
    if !(1..=RUN_BLOCKS_MAX).contains(&run.count) || run.start >= blocks || run.count > blocks - run.start {
        return refuse(format!(
            "of {} blocks at {} does not lie in volume {} of {blocks} blocks",
            run.count, run.start, volume.name
        ));
    }
    let (plain, stored) = (run.bytes(volume.size_bytes).len, u64::from(head.stored_bytes));
    let fine = match head.encoding {
        ZERO => stored == 0,
        PLAIN => stored == plain,
        LZ4 => stored > 0 && stored < plain,
        _ => false,
    };
    match fine && u16_at(6) == 0 {
        true => Ok(Some(head)),
        false => refuse(format!("says {stored} stored bytes of encoding {} for {plain} bytes", head.encoding)),
    }
}

/// Decodes a record's stored bytes into `plain`, whose length must be the run's in bytes; checks the crc. Error: `CORRUPT`; then
/// `plain` is all zero.
pub fn decode(head: &RecordHead, stored: &[u8], plain: &mut [u8]) -> Res<()> {
    let unpacked = fits(head.run.count, plain.len())
        && stored.len() == head.stored_bytes as usize
        && match head.encoding {
            ZERO => {
                plain.fill(0);
                stored.is_empty()
            }
            PLAIN if stored.len() == plain.len() => {
                plain.copy_from_slice(stored);
                true
            }
            LZ4 => unpack(stored, plain),
            _ => false,
        };
    if unpacked && crc32fast::hash(plain) == head.plain_crc32 {
        return Ok(());
    }
    plain.fill(0);
    let BlockRun { start, count } = head.run;
    Err(Fault::new(
        Code::Corrupt,
        format!("the change record of {count} blocks at {start} of volume number {}", head.volume),
        "its bytes do not give what its checksum says",
        "the generation is dropped and sent again; check memory and disks when it happens twice",
    ))
}
