//! Tests of the change record: faithful both ways, and an error for everything else.

use crate::delta::{RECORD_BYTES_MAX, RECORD_HEADER_BYTES, RUN_BLOCKS_MAX, RecordHead, decode, encode, head};
use crate::model::{BLOCK_BYTES, BlockRun, Code, FileSystem, Uuid, VolumeSpec};
use proptest::prelude::*;

fn volume(size_bytes: u64) -> VolumeSpec {
    VolumeSpec { id: Uuid([1; 16]), name: "pgdata".into(), size_bytes, fs: FileSystem::Ext4, mount_options: String::new() }
}

/// Bytes of several kinds: zero, one byte over and over, text, noise, and a mixture.
fn content(kind: u8, len: usize, seed: u64) -> Vec<u8> {
    let noise = (0..).scan(seed | 1, |state: &mut u64, _: u64| {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        Some((*state >> 24) as u8)
    });
    match kind % 5 {
        0 => vec![0; len],
        1 => vec![seed as u8 | 1; len],
        2 => b"insert into accounts values (".iter().cycle().take(len).copied().collect(),
        3 => noise.take(len).collect(),
        _ => noise.take(len).enumerate().map(|(at, b)| if at / 4096 % 2 == 0 { b } else { b'x' }).collect(),
    }
}

fn encoded(run: BlockRun, plain: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    encode(0, run, plain, &mut out);
    out
}

/// Puts a value into a header and makes its crc right again: a hostile peer can do that.
fn forged(record: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut record = record.to_vec();
    record[at..at + bytes.len()].copy_from_slice(bytes);
    let crc = crc32fast::hash(&record[..28]);
    record[28..32].copy_from_slice(&crc.to_le_bytes());
    record
}

proptest! {
    #[test]
    fn what_was_encoded_is_decoded(
        kind in 0u8..5, start in 0u64..1 << 40, count in 1u64..=64, short in 0u64..4096, at_end in any::<bool>(), seed in any::<u64>(), before in 0usize..50,
    ) {
        let run = BlockRun { start, count };
        let size = match at_end { true => run.end() * BLOCK_BYTES - short / 512 * 512, false => (run.end() + 3) * BLOCK_BYTES };
        let volumes = [volume(4096), volume(size)];
        let plain = content(kind, run.bytes(size).len as usize, seed);
        let mut out = vec![9; before];
        encode(1, run, &plain, &mut out);
        prop_assert_eq!(&out[..before], &vec![9; before]);
        let record = &out[before..];
        prop_assert!(record.len() <= RECORD_BYTES_MAX);
        let head = head(record, &volumes).unwrap().unwrap();
        prop_assert_eq!((head.volume, head.run), (1, run));
        let stored = &record[RECORD_HEADER_BYTES..];
        prop_assert_eq!(stored.len(), head.stored_bytes as usize);
        let mut back = vec![0xaa; plain.len()];
        decode(&head, stored, &mut back).unwrap();
        prop_assert!(back == plain);
        let encodings: &[u8] = match kind { 0 => &[0], 1 | 2 => &[2], 3 => &[1], _ => &[1, 2] };
        prop_assert!(encodings.contains(&head.encoding), "kind {} became encoding {}", kind, head.encoding);
    }

    /// One flipped byte is an error, in the head or in the body: never other bytes.
    #[test]
    fn a_changed_byte_is_noticed(kind in 0u8..5, count in 1u64..9, seed in any::<u64>(), at in any::<prop::sample::Index>(), flip in 1u8..) {
        let run = BlockRun { start: 5, count };
        let volumes = [volume(1 << 20)];
        let plain = content(kind, (count * BLOCK_BYTES) as usize, seed);
        let mut record = encoded(run, &plain);
        let at = at.index(record.len());
        record[at] ^= flip;
        match head(&record, &volumes) {
            Err(fault) => prop_assert_eq!(fault.code, Code::ProtocolError),
            Ok(head) => {
                prop_assert!(at >= RECORD_HEADER_BYTES);
                let mut back = vec![0xaa; plain.len()];
                // lz4 has more than one spelling of the same bytes: those may pass, others may not.
                match decode(&head.unwrap(), &record[RECORD_HEADER_BYTES..], &mut back) {
                    Ok(()) => prop_assert!(back == plain),
                    Err(fault) => prop_assert!(fault.code == Code::Corrupt && back.iter().all(|b| *b == 0)),
                }
            }
        }
    }

    /// Hostile stored bytes under a correct head: an error or the right crc, never a panic, never what the buffer held.
    #[test]
    fn noise_as_a_body_is_refused(stored in prop::collection::vec(any::<u8>(), 1..600), crc in any::<u32>(), count in 1u64..=64) {
        let head = RecordHead { volume: 0, run: BlockRun { start: 0, count }, stored_bytes: stored.len() as u32, plain_crc32: crc, encoding: 2 };
        let mut plain = vec![0xaa; (count * BLOCK_BYTES) as usize];
        prop_assert!(decode(&head, &stored, &mut plain).is_err());
        prop_assert!(plain.iter().all(|b| *b == 0));
    }

    #[test]
    fn noise_as_a_head_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        match bytes.len() < RECORD_HEADER_BYTES {
            true => prop_assert_eq!(head(&bytes, &[volume(1 << 20)]).unwrap(), None),
            false => prop_assert!(head(&bytes, &[volume(1 << 20)]).is_err()),
        }
    }

    /// Any head that passes lies inside its volume and never asks for more than the run holds.
    #[test]
    fn a_forged_head_that_passes_is_harmless(fields in any::<[u8; 24]>(), keep in any::<u32>(), size in 1u64..1 << 20) {
        let record = encoded(BlockRun { start: 0, count: 1 }, &[3; 4096]);
        let mut forgery = record[..28].to_vec();
        forgery.extend_from_slice(&[0; 4]);
        for at in (4..28).filter(|at| keep >> at & 1 == 0) {
            forgery[at] = fields[at - 4];
        }
        let forgery = forged(&forgery, 0, &[]);
        if let Ok(Some(head)) = head(&forgery, &[volume(size * 512)]) {
            prop_assert!(head.run.end() <= (size * 512).div_ceil(BLOCK_BYTES) && head.run.count <= RUN_BLOCKS_MAX);
            prop_assert!(u64::from(head.stored_bytes) <= head.run.bytes(size * 512).len);
        }
    }
}

#[test]
fn every_field_out_of_range_is_refused() {
    let volumes = [volume(10 * BLOCK_BYTES)];
    let run = BlockRun { start: 8, count: 2 };
    let packed = encoded(run, &[3; 8192]);
    assert_eq!(head(&forged(&packed, 0, &[]), &volumes).unwrap().unwrap().run, run, "the forger's crc is right");
    let cases: &[(&str, usize, &[u8])] = &[
        ("magic", 0, &[0x45]),
        ("version", 2, &[2]),
        ("encoding", 3, &[3]),
        ("encoding plain of lz4's length", 3, &[1]),
        ("encoding zero with bytes", 3, &[0]),
        ("volume", 4, &[1, 0]),
        ("reserved", 6, &[1]),
        ("reserved", 7, &[1]),
        ("start past the end", 8, &10u64.to_le_bytes()),
        ("end past the end", 8, &9u64.to_le_bytes()),
        ("start that overflows", 8, &u64::MAX.to_le_bytes()),
        ("no blocks", 16, &0u32.to_le_bytes()),
        ("too many blocks", 16, &65u32.to_le_bytes()),
        ("very many blocks", 16, &u32::MAX.to_le_bytes()),
        ("no stored bytes", 20, &0u32.to_le_bytes()),
        ("as many stored bytes as plain ones", 20, &8192u32.to_le_bytes()),
        ("more stored bytes than plain ones", 20, &u32::MAX.to_le_bytes()),
    ];
    for (what, at, bytes) in cases {
        let fault = head(&forged(&packed, *at, bytes), &volumes).expect_err(what);
        assert_eq!(fault.code, Code::ProtocolError, "{what}");
    }
    assert!(head(&packed, &[]).is_err(), "no volumes at all");
    // 65 blocks are too many even where the volume has them.
    assert!(head(&forged(&packed, 16, &65u32.to_le_bytes()), &[volume(1 << 30)]).is_err());
}

#[test]
fn a_record_cut_off_inside_its_head_is_not_there_yet() {
    let record = encoded(BlockRun { start: 0, count: 1 }, &[3; 4096]);
    for len in 0..RECORD_HEADER_BYTES {
        assert_eq!(head(&record[..len], &[volume(4096)]).unwrap(), None);
    }
}

#[test]
fn a_short_last_block_keeps_its_length() {
    let volumes = [volume(2 * BLOCK_BYTES + 512)];
    let run = BlockRun { start: 1, count: 2 };
    let record = encoded(run, &[7; 4096 + 512]);
    let head = head(&record, &volumes).unwrap().unwrap();
    let mut plain = [0; 4096 + 512];
    decode(&head, &record[32..], &mut plain).unwrap();
    assert_eq!(plain, [7; 4096 + 512]);
    // A buffer of another length is an error even where it is of as many blocks.
    for wrong in [0, 512, 4096, 4096 + 1024, 8192, 8193] {
        assert_eq!(decode(&head, &record[32..], &mut vec![0xaa; wrong]).unwrap_err().code, Code::Corrupt, "{wrong}");
    }
}

#[test]
fn zeroes_of_another_length_are_not_the_same_zeroes() {
    let record = encoded(BlockRun { start: 0, count: 1 }, &[0; 4096]);
    let head = head(&record, &[volume(4096)]).unwrap().unwrap();
    assert_eq!(record.len(), RECORD_HEADER_BYTES);
    assert!(decode(&head, &[], &mut [1; 4096]).is_ok());
    assert!(decode(&head, &[], &mut [1; 2048]).is_err());
    assert!(decode(&head, &[0], &mut [1; 4096]).is_err());
}

#[test]
#[should_panic(expected = "not those of a run")]
fn a_run_of_other_bytes_is_never_encoded() {
    encoded(BlockRun { start: 0, count: 2 }, &[1; 4096]);
}

#[test]
#[should_panic(expected = "not those of a run")]
fn a_run_too_long_is_never_encoded() {
    encoded(BlockRun { start: 0, count: 65 }, &vec![1; 65 * 4096]);
}
