//! Whether bytes are all zero.

/// Whether all bytes are zero; true of none at all.
///
/// The bytes are compared with themselves, one further on: if the first is zero and each equals the next, all are. That
/// is one `memcmp`, for which the C library picks the widest instructions of this machine, and it stops at the first difference.
pub fn is_zero(bytes: &[u8]) -> bool {
    match bytes.first() {
        None => true,
        Some(first) => *first == 0 && bytes[1..] == bytes[..bytes.len() - 1],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_set_bit_anywhere_is_seen() {
        for len in [0, 1, 2, 7, 8, 63, 64, 65, 512, 4096] {
            let mut bytes = vec![0u8; len];
            assert!(is_zero(&bytes), "{len}");
            for at in 0..len {
                bytes[at] = 1 << (at % 8);
                assert!(!is_zero(&bytes), "{at} of {len}");
                bytes[at] = 0;
            }
        }
        assert!(!is_zero(&[7; 4096]), "all equal is not all zero");
    }
}
