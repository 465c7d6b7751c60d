//! The journal's own blocks: superblock, generation header, COMMIT and mark. Payload stands between them as it came.
//!
//! Each block is one 512-byte sector at the start of a 4 KiB block of zeroes: a disk writes a sector whole or not at all, and
//! where one does not, the crc says so. All numbers are little endian. Every block begins and ends alike:
//!
//! | bytes | what |
//! |---|---|
//! | `[0..4)` | u32 magic `0x4a4c4244` (`DBLJ`) |
//! | `[4..6)` | u16 version, 1 |
//! | `[6..8)` | u16 kind: 1 superblock, 2 header, 3 COMMIT, 4 mark |
//! | `[8..24)` | identity of the group |
//! | `[24..40)` | lineage: random, made with the ring and known to nobody else, so that no payload can pretend to be a block |
//! | ... | the kind's own fields, then zeroes |
//! | `[508..512)` | u32 crc32 of the kind's salt and bytes `[0..508)` |
//!
//! Superblock (two slots, the valid one with the higher sequence counts):
//!
//! | bytes | what |
//! |---|---|
//! | `[40..48)` | u64 sequence, from 1 |
//! | `[48..56)` | u64 length of the ring's storage in bytes |
//! | `[56..64)` | u64 tail: where the oldest generation that may still be wanted begins, in bytes |
//! | `[64..80)` | u64 epoch, u64 generation of the floor: the parent of that generation |
//! | `[80..112)` | digest of the floor |
//!
//! Generation header:
//!
//! | bytes | what |
//! |---|---|
//! | `[40..56)` | u64 epoch, u64 generation |
//! | `[56..72)` | u64 epoch, u64 generation of the parent |
//! | `[72..104)` | digest of the parent |
//! | `[104..136)` | digest of this generation, chained to the parent's |
//! | `[136..144)` | u64 length of the payload in bytes |
//! | `[144..176)` | blake3 of the payload |
//! | `[176..184)` | u64 cut instant, milliseconds since 1970 |
//! | `[184..192)` | u64 where this block stands, in bytes (0 in an overflow file) |
//!
//! COMMIT (at the end of the generation) and mark (two slots beside the superblocks; the same words once more):
//!
//! | bytes | what |
//! |---|---|
//! | `[40..56)` | u64 epoch, u64 generation |
//! | `[56..64)` | u64 where the header stands, in bytes (0 in an overflow file) |
//! | `[64..72)` | u64 sequence of the mark; 0 in a COMMIT |
//! | `[72..104)` | blake3 of the header's 512 bytes |
//! | `[104..136)` | digest of the generation |

use crate::model::{Digest, GroupId, Moment, Position, Uuid};

/// Unit of the journal's layout, in bytes: every block and every payload begins at a multiple of it.
pub const JOURNAL_BLOCK_BYTES: usize = 4096;
/// What of a block is ever written other than zero, in bytes: one sector.
pub const SECTOR_BYTES: usize = 512;
/// A block as it is stored: its first sector.
pub type Sector = [u8; SECTOR_BYTES];

const MAGIC: u32 = 0x4a4c_4244;
const VERSION: u16 = 1;
const CRC_AT: usize = SECTOR_BYTES - 4;

/// What stands where a block of some kind was looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found<T> {
    /// Only zeroes: nothing was ever written.
    Blank,
    /// Something else: torn, rotten, or another kind of block.
    Damaged,
    /// A whole block of a version that this program does not know.
    Newer(u16),
    /// The block.
    Whole(T),
}

impl<T> Found<T> {
    /// The block, if it is whole.
    pub fn whole(self) -> Option<T> {
        match self {
            Found::Whole(block) => Some(block),
            Found::Blank | Found::Damaged | Found::Newer(_) => None,
        }
    }
}

/// Where the journal begins to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// The group that the ring belongs to.
    pub group: GroupId,
    /// Made with the ring.
    pub lineage: Uuid,
    /// Counts the superblocks written, from 1.
    pub sequence: u64,
    /// Length of the ring's storage in bytes.
    pub ring_bytes: u64,
    /// Where the oldest generation that may still be wanted begins, in bytes.
    pub tail: u64,
    /// Its parent.
    pub floor: Position,
    /// The parent's digest.
    pub floor_digest: Digest,
}

/// What a generation is and what it follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GenerationHead {
    /// The group.
    pub group: GroupId,
    /// The ring's lineage.
    pub lineage: Uuid,
    /// Its position.
    pub position: Position,
    /// What it follows.
    pub parent: Position,
    /// The parent's digest.
    pub parent_digest: Digest,
    /// Its own digest, chained to the parent's.
    pub digest: Digest,
    /// Length of its payload in bytes.
    pub payload_bytes: u64,
    /// blake3 of its payload.
    pub payload_digest: Digest,
    /// When its cut began.
    pub cut_at: Moment,
    /// Where this header stands, in bytes; 0 in an overflow file.
    pub offset: u64,
}

/// That a generation was found durable and whole. Stands twice: at its end, and in one of the two marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// The group.
    pub group: GroupId,
    /// The ring's lineage.
    pub lineage: Uuid,
    /// The generation's position.
    pub position: Position,
    /// Where its header stands, in bytes; 0 in an overflow file.
    pub offset: u64,
    /// Counts the marks, from 1; 0 in a COMMIT.
    pub sequence: u64,
    /// blake3 of the header.
    pub head_digest: Digest,
    /// The generation's digest.
    pub digest: Digest,
}

#[derive(Clone, Copy)]
enum Kind {
    Superblock = 1,
    Head = 2,
    Commit = 3,
    Mark = 4,
}

impl Kind {
    /// The crc begins with the kind, so that the right bytes in the wrong place are refused even if their kind field were hit.
    fn crc(self, sector: &Sector) -> u32 {
        let mut crc = crc32fast::Hasher::new();
        crc.update(&[b'd', b'j', self as u8, 0xa5]);
        crc.update(&sector[..CRC_AT]);
        crc.finalize()
    }
}

struct Writer {
    sector: Sector,
    at: usize,
    kind: Kind,
}

impl Writer {
    fn new(kind: Kind, group: GroupId, lineage: Uuid) -> Writer {
        let mut writer = Writer { sector: [0; SECTOR_BYTES], at: 0, kind };
        writer.put(&MAGIC.to_le_bytes());
        writer.put(&VERSION.to_le_bytes());
        writer.put(&(kind as u16).to_le_bytes());
        writer.put(&group.0);
        writer.put(&lineage.0);
        writer
    }
    fn put(&mut self, bytes: &[u8]) {
        self.sector[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }
    fn number(&mut self, value: u64) {
        self.put(&value.to_le_bytes());
    }
    fn position(&mut self, position: Position) {
        self.number(position.epoch);
        self.number(position.generation);
    }
    fn seal(mut self) -> Sector {
        let crc = self.kind.crc(&self.sector);
        self.sector[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        self.sector
    }
}

struct Reader<'a> {
    sector: &'a Sector,
    at: usize,
}

impl<'a> Reader<'a> {
    /// Checks magic, kind, crc and version, then stands behind the lineage.
    fn new(kind: Kind, sector: &'a Sector) -> Found<(Reader<'a>, GroupId, Uuid)> {
        if sector.iter().all(|byte| *byte == 0) {
            return Found::Blank;
        }
        let mut reader = Reader { sector, at: 0 };
        let magic = u32::from_le_bytes(reader.take());
        let version = u16::from_le_bytes(reader.take());
        let found_kind = u16::from_le_bytes(reader.take());
        let crc = Reader { sector, at: CRC_AT }.take();
        if magic != MAGIC || found_kind != kind as u16 || kind.crc(sector) != u32::from_le_bytes(crc) {
            return Found::Damaged;
        }
        if version != VERSION {
            return Found::Newer(version);
        }
        let (group, lineage) = (Uuid(reader.take()), Uuid(reader.take()));
        Found::Whole((reader, group, lineage))
    }
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.sector[self.at..self.at + N]);
        self.at += N;
        bytes
    }
    fn number(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
    fn position(&mut self) -> Position {
        Position { epoch: self.number(), generation: self.number() }
    }
    fn digest(&mut self) -> Digest {
        Digest(self.take())
    }
}

/// Takes the frame of a block off and hands what is inside to `body`.
fn open<'a, T>(kind: Kind, sector: &'a Sector, body: impl FnOnce(&mut Reader<'a>, GroupId, Uuid) -> T) -> Found<T> {
    match Reader::new(kind, sector) {
        Found::Whole((mut reader, group, lineage)) => Found::Whole(body(&mut reader, group, lineage)),
        Found::Blank => Found::Blank,
        Found::Damaged => Found::Damaged,
        Found::Newer(version) => Found::Newer(version),
    }
}

impl Superblock {
    /// The block's sector.
    pub fn encode(&self) -> Sector {
        let mut to = Writer::new(Kind::Superblock, self.group, self.lineage);
        to.number(self.sequence);
        to.number(self.ring_bytes);
        to.number(self.tail);
        to.position(self.floor);
        to.put(&self.floor_digest.0);
        to.seal()
    }
    /// Reads a slot. The numbers are as they were written; whether they fit the ring is the reader's question.
    pub fn decode(sector: &Sector) -> Found<Superblock> {
        open(Kind::Superblock, sector, |from, group, lineage| Superblock {
            group,
            lineage,
            sequence: from.number(),
            ring_bytes: from.number(),
            tail: from.number(),
            floor: from.position(),
            floor_digest: from.digest(),
        })
    }
}

impl GenerationHead {
    /// The block's sector.
    pub fn encode(&self) -> Sector {
        let mut to = Writer::new(Kind::Head, self.group, self.lineage);
        to.position(self.position);
        to.position(self.parent);
        to.put(&self.parent_digest.0);
        to.put(&self.digest.0);
        to.number(self.payload_bytes);
        to.put(&self.payload_digest.0);
        to.number(self.cut_at.0);
        to.number(self.offset);
        to.seal()
    }
    /// Reads a header. The numbers are as they were written; whether they fit the ring is the reader's question.
    pub fn decode(sector: &Sector) -> Found<GenerationHead> {
        open(Kind::Head, sector, |from, group, lineage| GenerationHead {
            group,
            lineage,
            position: from.position(),
            parent: from.position(),
            parent_digest: from.digest(),
            digest: from.digest(),
            payload_bytes: from.number(),
            payload_digest: from.digest(),
            cut_at: Moment(from.number()),
            offset: from.number(),
        })
    }
    /// blake3 of the encoded header, by which COMMIT and mark name it.
    pub fn own_digest(&self) -> Digest {
        Digest(*blake3::hash(&self.encode()).as_bytes())
    }
}

impl Commit {
    /// The COMMIT of a header (sequence 0), or the mark of that sequence for it.
    pub fn of(head: &GenerationHead, sequence: u64) -> Commit {
        Commit {
            group: head.group,
            lineage: head.lineage,
            position: head.position,
            offset: head.offset,
            sequence,
            head_digest: head.own_digest(),
            digest: head.digest,
        }
    }
    /// The sector of a COMMIT (sequence 0) or a mark (any other).
    pub fn encode(&self) -> Sector {
        let kind = if self.sequence == 0 { Kind::Commit } else { Kind::Mark };
        let mut to = Writer::new(kind, self.group, self.lineage);
        to.position(self.position);
        to.number(self.offset);
        to.number(self.sequence);
        to.put(&self.head_digest.0);
        to.put(&self.digest.0);
        to.seal()
    }
    /// Reads a COMMIT.
    pub fn decode(sector: &Sector) -> Found<Commit> {
        open(Kind::Commit, sector, Commit::body)
    }
    /// Reads a mark.
    pub fn decode_mark(sector: &Sector) -> Found<Commit> {
        open(Kind::Mark, sector, Commit::body)
    }
    fn body(from: &mut Reader<'_>, group: GroupId, lineage: Uuid) -> Commit {
        Commit {
            group,
            lineage,
            position: from.position(),
            offset: from.number(),
            sequence: from.number(),
            head_digest: from.digest(),
            digest: from.digest(),
        }
    }
    /// Whether this commits that header and no other.
    pub fn names(&self, head: &GenerationHead) -> bool {
        (self.group, self.lineage, self.position, self.offset, self.digest)
            == (head.group, head.lineage, head.position, head.offset, head.digest)
            && self.head_digest == head.own_digest()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn superblock() -> Superblock {
        Superblock {
            group: Uuid([1; 16]),
            lineage: Uuid([2; 16]),
            sequence: 3,
            ring_bytes: 1 << 20,
            tail: 16384,
            floor: Position { epoch: 4, generation: 5 },
            floor_digest: Digest([6; 32]),
        }
    }
    fn head() -> GenerationHead {
        GenerationHead {
            group: Uuid([1; 16]),
            lineage: Uuid([2; 16]),
            position: Position { epoch: 4, generation: 6 },
            parent: Position { epoch: 4, generation: 5 },
            parent_digest: Digest([6; 32]),
            digest: Digest([7; 32]),
            payload_bytes: 0x0102_0304,
            payload_digest: Digest([8; 32]),
            cut_at: Moment(1_700_000_000_000),
            offset: 16384,
        }
    }
    fn commit(sequence: u64) -> Commit {
        Commit::of(&head(), sequence)
    }

    /// The bytes of version 1, spelled out by hand from the byte map above and not by the encoder.
    fn golden(kind: u8, salt: &[u8], fields: &[&[u8]]) -> Vec<u8> {
        let mut bytes = vec![0x44, 0x42, 0x4c, 0x4a, 1, 0, kind, 0];
        bytes.extend([1; 16]);
        bytes.extend([2; 16]);
        fields.iter().for_each(|field| bytes.extend_from_slice(field));
        bytes.resize(508, 0);
        let crc = crc32fast::hash(&[salt, &bytes].concat());
        bytes.extend(crc.to_le_bytes());
        bytes
    }

    #[test]
    fn version_1_bytes_are_what_they_were() {
        let n = |value: u64| value.to_le_bytes();
        let at = golden(1, b"dj\x01\xa5", &[&n(3), &n(1 << 20), &n(16384), &n(4), &n(5), &[6; 32]]);
        assert_eq!(superblock().encode().as_slice(), at);
        assert_eq!(at[508..], [149, 176, 142, 36], "the crc itself is golden too");
        let fields: [&[u8]; 10] =
            [&n(4), &n(6), &n(4), &n(5), &[6; 32], &[7; 32], &n(0x0102_0304), &[8; 32], &n(1_700_000_000_000), &n(16384)];
        assert_eq!(head().encode().as_slice(), golden(2, b"dj\x02\xa5", &fields));
        let head_digest = blake3::hash(&head().encode());
        let tail: [&[u8]; 5] = [&n(4), &n(6), &n(16384), head_digest.as_bytes(), &[7; 32]];
        let with = |sequence: u64| [tail[0], tail[1], tail[2], &n(sequence)[..], tail[3], tail[4]].concat();
        assert_eq!(commit(0).encode().as_slice(), golden(3, b"dj\x03\xa5", &[&with(0)]));
        assert_eq!(commit(9).encode().as_slice(), golden(4, b"dj\x04\xa5", &[&with(9)]));
    }

    #[test]
    fn each_kind_is_read_as_itself_and_as_no_other() {
        assert_eq!(Superblock::decode(&superblock().encode()), Found::Whole(superblock()));
        assert_eq!(GenerationHead::decode(&head().encode()), Found::Whole(head()));
        assert_eq!(Commit::decode(&commit(0).encode()), Found::Whole(commit(0)));
        assert_eq!(Commit::decode_mark(&commit(1).encode()), Found::Whole(commit(1)));
        assert_eq!(Commit::decode(&commit(1).encode()), Found::Damaged);
        assert_eq!(Commit::decode_mark(&commit(0).encode()), Found::Damaged);
        assert_eq!(GenerationHead::decode(&superblock().encode()), Found::Damaged);
        assert_eq!(Superblock::decode(&[0; SECTOR_BYTES]), Found::Blank);
        // The kind field alone does not make a header of a superblock: the salt is in the crc.
        let mut forged = superblock().encode();
        forged[6] = 2;
        let crc = crc32fast::hash(&[b"dj\x01\xa5".as_slice(), &forged[..508]].concat());
        forged[508..].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(GenerationHead::decode(&forged), Found::Damaged);
    }

    #[test]
    fn a_newer_version_is_told_apart_from_damage() {
        let mut newer = superblock().encode();
        newer[4] = 2;
        let crc = Kind::Superblock.crc(&newer);
        newer[508..].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(Superblock::decode(&newer), Found::Newer(2));
    }

    #[test]
    fn a_commit_names_one_header_only() {
        assert!(commit(0).names(&head()));
        assert!(!commit(0).names(&GenerationHead { payload_digest: Digest([9; 32]), ..head() }));
        assert!(!commit(0).names(&GenerationHead { offset: 0, ..head() }));
        assert!(!commit(0).names(&GenerationHead { lineage: Uuid([3; 16]), ..head() }));
    }

    proptest! {
        #[test]
        fn one_flipped_bit_is_noticed(bit in 0usize..SECTOR_BYTES * 8) {
            let mut sector = head().encode();
            sector[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(GenerationHead::decode(&sector), Found::Damaged);
        }
        #[test]
        fn any_bytes_are_read_without_harm(bytes in prop::collection::vec(any::<u8>(), SECTOR_BYTES)) {
            let sector: Sector = bytes.try_into().unwrap();
            prop_assert!(Superblock::decode(&sector).whole().is_none());
            prop_assert!(Commit::decode(&sector).whole().is_none());
        }
    }
}
