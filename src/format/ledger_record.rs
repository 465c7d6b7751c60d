//! The ledger's slot header. The record itself, canonical JSON, follows at the next 4 KiB.
//!
//! One 512-byte sector, little endian; the rest of its 4 KiB block is zero:
//!
//! | bytes | what |
//! |---|---|
//! | `[0..4)` | u32 magic `0x4c4c4244` (`DBLL`) |
//! | `[4..6)` | u16 version, 1 |
//! | `[6..8)` | u16 kind, 5 |
//! | `[8..24)` | identity of the group |
//! | `[24..32)` | u64 sequence, from 1 |
//! | `[32..40)` | u64 length of the record in bytes |
//! | `[40..72)` | blake3 of the record |
//! | `[508..512)` | u32 crc32 of the kind's salt and bytes `[0..508)` |

use crate::format::journal_record::{Found, SECTOR_BYTES, Sector};
use crate::model::{Digest, GroupId, Uuid};

const MAGIC: u32 = 0x4c4c_4244;
const VERSION: u16 = 1;
const KIND: u16 = 5;
const SALT: &[u8] = b"dl\x05\xa5";
const CRC_AT: usize = SECTOR_BYTES - 4;

/// What a slot of the ledger holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LedgerHead {
    /// The group.
    pub group: GroupId,
    /// Counts the commits, from 1; the valid slot with the higher one counts.
    pub sequence: u64,
    /// Length of the record in bytes.
    pub record_bytes: u64,
    /// blake3 of the record.
    pub record_digest: Digest,
}

fn crc(sector: &Sector) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(SALT);
    crc.update(&sector[..CRC_AT]);
    crc.finalize()
}

impl LedgerHead {
    /// The header of a record.
    pub fn of(group: GroupId, sequence: u64, record: &[u8]) -> LedgerHead {
        LedgerHead { group, sequence, record_bytes: record.len() as u64, record_digest: digest(record) }
    }
    /// Whether `record` is what the header says.
    pub fn names(&self, record: &[u8]) -> bool {
        self.record_bytes == record.len() as u64 && self.record_digest == digest(record)
    }
    /// The header's sector.
    pub fn encode(&self) -> Sector {
        let mut sector = [0; SECTOR_BYTES];
        sector[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        sector[4..6].copy_from_slice(&VERSION.to_le_bytes());
        sector[6..8].copy_from_slice(&KIND.to_le_bytes());
        sector[8..24].copy_from_slice(&self.group.0);
        sector[24..32].copy_from_slice(&self.sequence.to_le_bytes());
        sector[32..40].copy_from_slice(&self.record_bytes.to_le_bytes());
        sector[40..72].copy_from_slice(&self.record_digest.0);
        let crc = crc(&sector);
        sector[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        sector
    }
    /// Reads a header. The length is as it was written: check it against the slot before anything is allocated.
    pub fn decode(sector: &Sector) -> Found<LedgerHead> {
        if sector.iter().all(|byte| *byte == 0) {
            return Found::Blank;
        }
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| sector[at + i]));
        let word = number(0);
        if word as u32 != MAGIC || (word >> 48) as u16 != KIND || u64::from(crc(sector)) != number(CRC_AT - 4) >> 32 {
            return Found::Damaged;
        }
        match (word >> 32) as u16 {
            VERSION => Found::Whole(LedgerHead {
                group: Uuid(std::array::from_fn(|i| sector[8 + i])),
                sequence: number(24),
                record_bytes: number(32),
                record_digest: Digest(std::array::from_fn(|i| sector[40 + i])),
            }),
            newer => Found::Newer(newer),
        }
    }
}

fn digest(record: &[u8]) -> Digest {
    Digest(*blake3::hash(record).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head() -> LedgerHead {
        LedgerHead::of(Uuid([1; 16]), 7, b"{}")
    }

    #[test]
    fn version_1_bytes_are_what_they_were() {
        let mut bytes = vec![0x44, 0x42, 0x4c, 0x4c, 1, 0, 5, 0];
        bytes.extend([1; 16]);
        bytes.extend(7u64.to_le_bytes());
        bytes.extend(2u64.to_le_bytes());
        bytes.extend(blake3::hash(b"{}").as_bytes());
        bytes.resize(508, 0);
        bytes.extend(crc32fast::hash(&[b"dl\x05\xa5".as_slice(), &bytes].concat()).to_le_bytes());
        assert_eq!(head().encode().as_slice(), bytes);
        assert_eq!(bytes[508..], [254, 158, 164, 99], "the crc itself is golden too");
    }

    #[test]
    fn every_flipped_bit_is_noticed_and_a_newer_version_is_told_apart() {
        assert_eq!(LedgerHead::decode(&head().encode()), Found::Whole(head()));
        assert_eq!(LedgerHead::decode(&[0; SECTOR_BYTES]), Found::Blank);
        for bit in 0..SECTOR_BYTES * 8 {
            let mut sector = head().encode();
            sector[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(LedgerHead::decode(&sector), Found::Damaged, "bit {bit}");
        }
        let mut newer = head().encode();
        newer[4] = 2;
        let again = crc(&newer);
        newer[CRC_AT..].copy_from_slice(&again.to_le_bytes());
        assert_eq!(LedgerHead::decode(&newer), Found::Newer(2));
    }

    #[test]
    fn a_record_that_differs_is_not_the_one_that_was_named() {
        assert!(head().names(b"{}"));
        assert!(!head().names(b"[]"));
        assert!(!head().names(b"{} "));
    }
}
