//! What a sector says about itself: whose write it is, where it belongs, and whether it is whole.

/// The atom of all checks.
pub const SECTOR: usize = 512;
const MAGIC: u64 = 0x7374_6f72_6d21_0a00;
const NOBODY: u32 = u32::MAX;
const BODY: usize = 64;
const CRC: usize = SECTOR - 4;

/// The write that its writer knew to be there when it wrote this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Follows {
    /// Volume of the earlier write.
    pub volume: u32,
    /// Its first sector.
    pub sector: u64,
    /// Its sequence.
    pub seq: u64,
}

/// One sector's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The volume it was written to.
    pub volume: u32,
    /// The thread that wrote it.
    pub writer: u32,
    /// Its address in sectors.
    pub sector: u64,
    /// The writer's own count of writes.
    pub version: u64,
    /// The write's number in the journal, unique in a storm.
    pub seq: u64,
    /// What it depends on, if that is known exactly.
    pub follows: Option<Follows>,
}

/// What a sector turned out to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// All zero.
    Zero,
    /// A whole stamp of this storm.
    Stamp(Stamp),
    /// Anything else: torn, or somebody else's.
    Garbage,
}

/// Random bytes that bodies are cut from, so that two writes differ in all of a sector.
pub struct Pool {
    seed: u64,
    bytes: Vec<u8>,
}

impl Pool {
    /// The pool of one storm.
    pub fn new(seed: u64) -> Pool {
        let mut dice = super::Dice::new(seed ^ MAGIC);
        Pool { seed, bytes: (0..512).flat_map(|_| dice.word().to_le_bytes()).collect() }
    }

    /// Writes `stamp` into each sector of `out`, counting its address up.
    pub fn fill(&self, out: &mut [u8], stamp: &Stamp) {
        let mut stamp = *stamp;
        for sector in out.chunks_exact_mut(SECTOR) {
            let shift = (stamp.seq.wrapping_mul(31).wrapping_add(stamp.sector.wrapping_mul(7)) % 448) as usize * 8;
            sector[BODY..CRC].copy_from_slice(&self.bytes[shift..shift + CRC - BODY]);
            let none = Follows { volume: NOBODY, sector: 0, seq: 0 };
            let follows = stamp.follows.unwrap_or(none);
            put(sector, 0, MAGIC ^ self.seed);
            put(sector, 8, u64::from(stamp.volume) | u64::from(stamp.writer) << 32);
            put(sector, 16, stamp.sector);
            put(sector, 24, stamp.version);
            put(sector, 32, stamp.seq);
            put(sector, 40, u64::from(follows.volume));
            put(sector, 48, follows.sector);
            put(sector, 56, follows.seq);
            let crc = crc32fast::hash(&sector[..CRC]);
            sector[CRC..].copy_from_slice(&crc.to_le_bytes());
            stamp.sector += 1;
        }
    }

    /// Reads one sector.
    pub fn read(&self, sector: &[u8]) -> Found {
        static ZEROES: [u8; SECTOR] = [0; SECTOR];
        let word = |at: usize| u64::from_le_bytes(sector[at..at + 8].try_into().unwrap());
        if word(0) != MAGIC ^ self.seed {
            return if sector == ZEROES { Found::Zero } else { Found::Garbage };
        }
        if crc32fast::hash(&sector[..CRC]).to_le_bytes() != sector[CRC..] {
            return Found::Garbage;
        }
        let volume = word(40) as u32;
        let follows = (volume != NOBODY).then(|| Follows { volume, sector: word(48), seq: word(56) });
        let (volume, writer) = (word(8) as u32, (word(8) >> 32) as u32);
        Found::Stamp(Stamp { volume, writer, sector: word(16), version: word(24), seq: word(32), follows })
    }
}

fn put(sector: &mut [u8], at: usize, word: u64) {
    sector[at..at + 8].copy_from_slice(&word.to_le_bytes());
}
