//! lz4 where it pays, and the decision that it does not, made cheaply.

use crate::model::BLOCK_BYTES;
use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};
use std::cell::RefCell;

/// Runs longer than this are tried on samples first.
const SAMPLED_FROM_BYTES: usize = 4 * BLOCK_BYTES as usize;

thread_local! {
    // lz4's match tables, made once a thread instead of once a run. They are cleared before each use, so no
    // byte of one run can show in another; two, because the small one turns into a large one for good.
    static TABLES: RefCell<(CompressTable, CompressTable)> = RefCell::new((CompressTable::small(), CompressTable::large()));
}

/// Whether so many stored bytes are worth the work of unpacking them: less than 7/8 of the plain ones.
fn pays(stored: usize, plain: usize) -> bool {
    stored * 8 < plain * 7
}

/// Appends the lz4 form of `plain` to `out` and gives its length, or leaves `out` as it was when that does not pay.
pub fn pack(plain: &[u8], out: &mut Vec<u8>) -> Option<usize> {
    TABLES.with_borrow_mut(|(small, large)| {
        if plain.len() > SAMPLED_FROM_BYTES && !a_sample_pays(plain, out, small) {
            return None;
        }
        let table = if plain.len() < usize::from(u16::MAX) { small } else { large };
        try_pack(plain, out, table)
    })
}

/// lz4 on the whole of an incompressible run costs a zero fill and two copies of it. Three blocks (first, middle, last) tell
/// almost as well; one of them alone would misjudge a run that begins with a compressed header page and goes on with text.
fn a_sample_pays(plain: &[u8], out: &mut Vec<u8>, table: &mut CompressTable) -> bool {
    let block = BLOCK_BYTES as usize;
    let middle = plain.len() / block / 2 * block;
    [0, middle, plain.len() - block].into_iter().any(|at| {
        let before = out.len();
        let paid = try_pack(&plain[at..at + block], out, table).is_some();
        out.truncate(before);
        paid
    })
}

fn try_pack(plain: &[u8], out: &mut Vec<u8>, table: &mut CompressTable) -> Option<usize> {
    let before = out.len();
    out.resize(before + get_maximum_output_size(plain.len()), 0);
    let stored = compress_into_with_table(plain, &mut out[before..], table).ok().filter(|stored| pays(*stored, plain.len()));
    out.truncate(before + stored.unwrap_or(0));
    stored
}

/// Unpacks `stored` into `plain`, which must be filled exactly; false when it is not what lz4 makes.
pub fn unpack(stored: &[u8], plain: &mut [u8]) -> bool {
    // RUSTSEC-2026-0041: a bad stream may leave, or refer to, what the buffer held before. It holds nothing.
    plain.fill(0);
    let whole = matches!(decompress_into(stored, plain), Ok(len) if len == plain.len());
    if !whole {
        plain.fill(0);
    }
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that do not compress (splitmix64).
    fn noise(len: usize, mut seed: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = seed;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            bytes.extend_from_slice(&(z ^ (z >> 31)).to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }

    #[test]
    fn noise_is_left_plain_and_out_untouched() {
        for len in [512, 4096, 16384, 16385, 65536, 262_144] {
            let mut out = vec![1, 2, 3];
            assert_eq!(pack(&noise(len, 7), &mut out), None, "{len}");
            assert_eq!(out, [1, 2, 3]);
        }
    }

    #[test]
    fn a_run_that_begins_with_noise_and_goes_on_with_text_is_packed() {
        let mut plain = noise(4096, 1);
        plain.extend(b"the quick brown fox ".iter().cycle().take(60 * 4096));
        let mut out = Vec::new();
        assert!(pack(&plain, &mut out).is_some_and(|stored| stored == out.len() && stored < 16384));
    }

    #[test]
    fn no_table_carries_one_run_into_the_next() {
        // The same run packed first and last, with others of both table sizes between: the same bytes.
        let text: Vec<u8> = b"abcdefghij".iter().cycle().take(8192).copied().collect();
        let (mut first, mut last) = (Vec::new(), Vec::new());
        pack(&text, &mut first);
        pack(&vec![5; 262_144], &mut Vec::new());
        pack(&noise(4096, 3), &mut Vec::new());
        pack(&text, &mut last);
        assert!(!first.is_empty() && first == last);
    }

    #[test]
    fn a_bad_stream_leaves_only_zeroes() {
        // A match that reaches before the start of the output, and one that is cut off: what the buffer held must not show.
        let reach_back: &[u8] = &[0x0f, 0x01, 0x00, 200, 0x00];
        let cut_off: &[u8] = &[0x50, 1, 2, 3];
        let too_short: &[u8] = &[0x10, 9];
        for stored in [reach_back, cut_off, too_short, &[]] {
            let mut plain = vec![0xaa; 4096];
            assert!(!unpack(stored, &mut plain), "{stored:?}");
            assert!(plain.iter().all(|b| *b == 0), "{stored:?}");
        }
    }
}
