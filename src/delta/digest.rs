//! The digest by which two hosts compare one block.

use crate::delta::zero::is_zero;
use crate::model::BLOCK_BYTES;

/// The first 16 bytes of blake3 over 4096 zeroes: what every digest is XORed with, so that zero means zero.
const OF_ZEROES: [u8; 16] = [182, 251, 115, 252, 70, 147, 140, 152, 30, 43, 11, 75, 30, 242, 130, 173];

/// A 128-bit digest of one block (blake3, cut), XORed with that of a zero block: all zero = "this block is zero".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockDigest(pub [u8; 16]);

impl BlockDigest {
    /// "Not known": equal to no block's digest (that one of them be equal is as unlikely as any collision).
    pub const UNKNOWN: BlockDigest = BlockDigest([0xff; 16]);
    /// The digest of a zero block.
    pub const ZERO: BlockDigest = BlockDigest([0; 16]);

    /// Of one block's bytes (a short last block is taken as padded with zeroes). At most 4096 bytes are taken.
    pub fn of(block: &[u8]) -> BlockDigest {
        let block = &block[..block.len().min(BLOCK_BYTES as usize)];
        // Not only quicker: sparse volumes are mostly this.
        if is_zero(block) {
            return BlockDigest::ZERO;
        }
        let hash = match block.len() as u64 {
            BLOCK_BYTES => blake3::hash(block),
            _ => {
                let mut padded = [0; BLOCK_BYTES as usize];
                padded[..block.len()].copy_from_slice(block);
                blake3::hash(&padded)
            }
        };
        let mut digest = OF_ZEROES;
        digest.iter_mut().zip(hash.as_bytes()).for_each(|(mine, theirs)| *mine ^= theirs);
        BlockDigest(digest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_constant_is_blake3_of_4096_zeroes() {
        assert_eq!(OF_ZEROES, blake3::hash(&[0; 4096]).as_bytes()[..16]);
    }

    #[test]
    fn zero_of_any_length_is_zero_and_nothing_else_is() {
        for len in [0, 1, 512, 4095, 4096] {
            assert_eq!(BlockDigest::of(&vec![0; len]), BlockDigest::ZERO, "{len}");
        }
        let mut block = [0; 4096];
        for at in [0, 1, 511, 4095] {
            block[at] = 1;
            assert_ne!(BlockDigest::of(&block), BlockDigest::ZERO);
            block[at] = 0;
        }
    }

    #[test]
    fn a_short_block_is_the_padded_one() {
        let mut block = [0; 4096];
        block[..700].fill(9);
        assert_eq!(BlockDigest::of(&block[..700]), BlockDigest::of(&block));
        assert_eq!(BlockDigest::of(&block[..1024]), BlockDigest::of(&block));
        assert_ne!(BlockDigest::of(&block[..699]), BlockDigest::of(&block));
        let long: Vec<u8> = block.iter().chain(&[1, 2, 3]).copied().collect();
        assert_eq!(BlockDigest::of(&long), BlockDigest::of(&block));
    }
}
