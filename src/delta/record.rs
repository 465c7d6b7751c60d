//! The change record: one run of blocks, or of sectors, of one volume, as it stands in a generation's payload, on the wire and
//! in the journal.
//!
//! Byte map (little endian):
//!
//! | bytes | what |
//! |---|---|
//! | `[0..2)` | u16 magic `0x5244` (`DR`) |
//! | `[2]` | version: 1 for a run of blocks, 2 for a run of sectors |
//! | `[3]` | encoding: of blocks 0 zero, 1 plain, 2 lz4 block; of sectors 4 zero, 5 plain, 6 lz4 block |
//! | `[4..6)` | u16 index of the volume in the group |
//! | `[6..8)` | zero |
//! | `[8..16)` | u64 index of the first block (4096 bytes), or of the first sector (512 bytes) |
//! | `[16..20)` | u32 number of blocks, 1 to 64, or of sectors, 1 to 512 |
//! | `[20..24)` | u32 stored bytes: 0 for zero, the plain length for plain, less than it for lz4 |
//! | `[24..28)` | u32 crc32 of the plain bytes, whatever the encoding |
//! | `[28..32)` | u32 crc32 of bytes `[0..28)` |
//! | `[32..)` | the stored bytes |
//!
//! In an encoding the low two bits say how the bytes are stored and the bit of value 4 that the unit is the sector. 3, 7 and all
//! above are free; they are refused. The version says the unit a second time, for agents older than sector records: they
//! look at it first, and say "of version 2" where they would have said that a run lies outside its volume.
//!
//! The plain length is not stored. Of blocks it is the run's, cut at the volume's size, and both sides know that. Of sectors it
//! is exactly what the run says, and the bytes around it in their block are not touched by it: of a block of which only some
//! sectors were seen to change, nothing else may be said.

use crate::delta::pack::{pack, unpack};
use crate::delta::zero::is_zero;
use crate::model::{BLOCK_BYTES, BlockRun, ByteRun, Code, Fault, Res, VolumeSpec};

/// Length of a change record's header in bytes (byte map in the module docs of `delta::record`).
pub const RECORD_HEADER_BYTES: usize = 32;
/// Longest run of one record, in blocks.
pub const RUN_BLOCKS_MAX: u64 = 64;
/// Size of the unit of a sector record, in bytes.
pub const SECTOR_BYTES: u64 = 512;
/// Longest run of one sector record, in sectors: as many bytes as in [`RUN_BLOCKS_MAX`] blocks.
pub const RUN_SECTORS_MAX: u64 = PLAIN_BYTES_MAX as u64 / SECTOR_BYTES;
/// Most plain bytes of one record.
pub const PLAIN_BYTES_MAX: usize = (RUN_BLOCKS_MAX * BLOCK_BYTES) as usize;
/// Longest record, header and stored bytes, in bytes: what a buffer must hold to take any one of them.
pub const RECORD_BYTES_MAX: usize = RECORD_HEADER_BYTES + PLAIN_BYTES_MAX;

const MAGIC: u16 = 0x5244;
const ZERO: u8 = 0;
const PLAIN: u8 = 1;
const LZ4: u8 = 2;
/// Added to an encoding whose unit is the sector.
const OF_SECTORS: u8 = 4;

/// The version that stands in records of this unit.
fn version(sectors: bool) -> u8 {
    if sectors { 2 } else { 1 }
}

/// A change record read from bytes and checked against the geometry, not yet decompressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHead {
    /// Index of the volume in the group.
    pub volume: u16,
    /// Where its bytes begin in the volume, in bytes: a multiple of 4096, or of 512 in a sector record.
    pub offset_bytes: u64,
    /// How many plain bytes it has, cut at the volume's size: at least 1 sector, at most [`PLAIN_BYTES_MAX`].
    pub len_bytes: u64,
    /// Whether its unit is the sector, and it says nothing of the rest of the blocks that it lies in.
    pub sectors: bool,
    /// Bytes that follow the header.
    pub stored_bytes: u32,
    /// crc32 of the plain bytes.
    pub plain_crc32: u32,
    /// As in the byte map: 0 zero, 1 plain, 2 lz4; 4, 5, 6 the same of sectors.
    pub encoding: u8,
}

impl RecordHead {
    /// Its bytes in the volume.
    pub fn bytes(&self) -> ByteRun {
        ByteRun { offset: self.offset_bytes, len: self.len_bytes }
    }
    /// The blocks that it lies in: exactly its own, or those around its sectors.
    pub fn block_run(&self) -> BlockRun {
        let start = self.offset_bytes / BLOCK_BYTES;
        BlockRun { start, count: (self.offset_bytes + self.len_bytes).div_ceil(BLOCK_BYTES) - start }
    }
    /// Whether its bytes are all zero, and none are stored.
    pub fn is_zero(&self) -> bool {
        self.encoding & !OF_SECTORS == ZERO
    }
}

/// Appends the record of a run to `out`. `plain` is exactly the run's bytes (cut at the volume's size).
///
/// Allocates only where `out` must grow: hand the same one in again. Panics when `plain` cannot be the bytes of `run` or the
/// run is longer than [`RUN_BLOCKS_MAX`]: that is a mistake of the caller, and such a record must never be stored.
pub fn encode(volume: u16, run: BlockRun, plain: &[u8], out: &mut Vec<u8>) {
    encode_blocks(volume, run, plain, true, out);
}

/// The same without trying lz4: for a link that is faster than the processor.
pub fn encode_unpacked(volume: u16, run: BlockRun, plain: &[u8], out: &mut Vec<u8>) {
    encode_blocks(volume, run, plain, false, out);
}

/// Appends the record of the sectors (of 512 bytes) from `first_sector` on to `out`: those, and nothing else of their blocks.
///
/// Only for a standby that was asked in a conversation of `format::PROTOCOL_SECTORS`. Panics when `plain` is not 1 to
/// [`RUN_SECTORS_MAX`] whole sectors: that is a mistake of the caller, and such a record must never be stored.
pub fn encode_sectors(volume: u16, first_sector: u64, plain: &[u8], try_lz4: bool, out: &mut Vec<u8>) {
    let count = plain.len() as u64 / SECTOR_BYTES;
    let fits = plain.len().is_multiple_of(SECTOR_BYTES as usize) && (1..=RUN_SECTORS_MAX).contains(&count);
    assert!(fits, "{} bytes are not those of a run of sectors", plain.len());
    encode_as(volume, true, first_sector, count, plain, try_lz4, out);
}

fn encode_blocks(volume: u16, run: BlockRun, plain: &[u8], try_lz4: bool, out: &mut Vec<u8>) {
    let fits = (1..=RUN_BLOCKS_MAX).contains(&run.count) && (plain.len() as u64).div_ceil(BLOCK_BYTES) == run.count;
    assert!(fits, "{} bytes are not those of a run of {} blocks", plain.len(), run.count);
    encode_as(volume, false, run.start, run.count, plain, try_lz4, out);
}

fn encode_as(volume: u16, sectors: bool, start: u64, count: u64, plain: &[u8], try_lz4: bool, out: &mut Vec<u8>) {
    let at = out.len();
    out.resize(at + RECORD_HEADER_BYTES, 0);
    let (packing, stored_bytes) = if is_zero(plain) {
        (ZERO, 0)
    } else if let Some(stored) = try_lz4.then(|| pack(plain, out)).flatten() {
        (LZ4, stored)
    } else {
        out.extend_from_slice(plain);
        (PLAIN, plain.len())
    };
    let header = &mut out[at..at + RECORD_HEADER_BYTES];
    header[0..2].copy_from_slice(&MAGIC.to_le_bytes());
    header[2] = version(sectors);
    header[3] = packing | if sectors { OF_SECTORS } else { 0 };
    header[4..6].copy_from_slice(&volume.to_le_bytes());
    header[8..16].copy_from_slice(&start.to_le_bytes());
    header[16..20].copy_from_slice(&(count as u32).to_le_bytes());
    header[20..24].copy_from_slice(&(stored_bytes as u32).to_le_bytes());
    header[24..28].copy_from_slice(&crc32fast::hash(plain).to_le_bytes());
    let crc = crc32fast::hash(&header[..28]);
    header[28..32].copy_from_slice(&crc.to_le_bytes());
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
    let (encoding, sectors) = (header[3], header[3] & OF_SECTORS != 0);
    if !(1..=2).contains(&header[2]) {
        return refuse(format!("is of version {}, which is neither 1 nor 2", header[2]));
    }
    if header[2] != version(sectors) || encoding & !OF_SECTORS > LZ4 {
        return refuse(format!("is of encoding {encoding}, which version {} has not", header[2]));
    }
    let number = u16_at(4);
    let Some(volume) = volumes.get(usize::from(number)) else {
        return refuse(format!("names volume number {number} of {}", volumes.len()));
    };
    let (start, count) = (u64::from(u32_at(8)) | u64::from(u32_at(12)) << 32, u64::from(u32_at(16)));
    // A volume ends with a whole sector (its size is a multiple of 512), and perhaps within a block.
    let (unit_bytes, most, units, word) = match sectors {
        true => (SECTOR_BYTES, RUN_SECTORS_MAX, volume.size_bytes / SECTOR_BYTES, "sectors"),
        false => (BLOCK_BYTES, RUN_BLOCKS_MAX, volume.blocks(), "blocks"),
    };
    if !(1..=most).contains(&count) || start >= units || count > units - start {
        return refuse(format!("of {count} {word} at {start} does not lie in volume {} of {units} {word}", volume.name));
    }
    let offset_bytes = start * unit_bytes;
    let len_bytes = (count * unit_bytes).min(volume.size_bytes - offset_bytes);
    let head = RecordHead {
        volume: number,
        offset_bytes,
        len_bytes,
        sectors,
        stored_bytes: u32_at(20),
        plain_crc32: u32_at(24),
        encoding,
    };
    let stored = u64::from(head.stored_bytes);
    let fine = match encoding & !OF_SECTORS {
        ZERO => stored == 0,
        PLAIN => stored == len_bytes,
        LZ4 => stored > 0 && stored < len_bytes,
        _ => false,
    };
    match fine && u16_at(6) == 0 {
        true => Ok(Some(head)),
        false => refuse(format!("says {stored} stored bytes of encoding {encoding} for {len_bytes} bytes")),
    }
}

/// Decodes a record's stored bytes into `plain`, whose length must be the record's `len_bytes`; checks the crc. Error: `CORRUPT`; then
/// `plain` is all zero.
pub fn decode(head: &RecordHead, stored: &[u8], plain: &mut [u8]) -> Res<()> {
    let unpacked = plain.len() as u64 == head.len_bytes
        && stored.len() == head.stored_bytes as usize
        && match head.encoding & !OF_SECTORS {
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
    Err(Fault::new(
        Code::Corrupt,
        format!("the change record of {} bytes at {} of volume number {}", head.len_bytes, head.offset_bytes, head.volume),
        "its bytes do not give what its checksum says",
        "the generation is dropped and sent again; check memory and disks when it happens twice",
    ))
}
