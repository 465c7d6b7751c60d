//! Tests of the change record: faithful both ways, and an error for everything else.

use crate::delta::{RECORD_BYTES_MAX, RECORD_HEADER_BYTES, RUN_BLOCKS_MAX, RUN_SECTORS_MAX, RecordHead, SECTOR_BYTES};
use crate::delta::{decode, encode, encode_sectors, head};
use crate::model::{BLOCK_BYTES, BlockRun, ByteRun, Code, FileSystem, Uuid, VolumeSpec};
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

fn encoded_sectors(first: u64, plain: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    encode_sectors(0, first, plain, true, &mut out);
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
        prop_assert_eq!((head.volume, head.block_run(), head.bytes(), head.sectors), (1, run, run.bytes(size), false));
        prop_assert_eq!((record[2], head.is_zero()), (1, kind == 0));
        let stored = &record[RECORD_HEADER_BYTES..];
        prop_assert_eq!(stored.len(), head.stored_bytes as usize);
        let mut back = vec![0xaa; plain.len()];
        decode(&head, stored, &mut back).unwrap();
        prop_assert!(back == plain);
        let encodings: &[u8] = match kind { 0 => &[0], 1 | 2 => &[2], 3 => &[1], _ => &[1, 2] };
        prop_assert!(encodings.contains(&head.encoding), "kind {} became encoding {}", kind, head.encoding);
    }

    #[test]
    fn sectors_that_were_encoded_are_decoded_and_say_where_they_lie(
        kind in 0u8..5, first in 0u64..1 << 43, count in 1u64..=512, after in 0u64..20, seed in any::<u64>(), try_lz4: bool, before in 0usize..50,
    ) {
        // A size that ends anywhere within a block, the record's last sector or some after it.
        let (bytes, size) = (ByteRun { offset: first * 512, len: count * 512 }, (first + count + after) * 512);
        let volumes = [volume(4096), volume(size)];
        let plain = content(kind, bytes.len as usize, seed);
        let mut out = vec![9; before];
        encode_sectors(1, first, &plain, try_lz4, &mut out);
        prop_assert_eq!(&out[..before], &vec![9; before]);
        let record = &out[before..];
        prop_assert!(record.len() <= RECORD_BYTES_MAX && record[2] == 2);
        let head = head(record, &volumes).unwrap().unwrap();
        prop_assert_eq!((head.volume, head.bytes(), head.sectors, head.is_zero()), (1, bytes, true, kind == 0));
        let run = head.block_run();
        prop_assert!(run.start * 4096 <= bytes.offset && bytes.offset < (run.start + 1) * 4096);
        prop_assert!((run.end() - 1) * 4096 < bytes.end() && bytes.end() <= run.end() * 4096);
        let stored = &record[RECORD_HEADER_BYTES..];
        prop_assert_eq!(stored.len(), head.stored_bytes as usize);
        let mut back = vec![0xaa; plain.len()];
        decode(&head, stored, &mut back).unwrap();
        prop_assert!(back == plain);
        let encodings: &[u8] = match (kind, try_lz4) { (0, _) => &[4], (_, false) | (3, _) => &[5], (1 | 2, _) => &[6], _ => &[5, 6] };
        prop_assert!(encodings.contains(&head.encoding), "kind {} became encoding {}", kind, head.encoding);
        // The same range in a volume that ends one sector before it does.
        prop_assert!(crate::delta::head(record, &[volume(4096), volume((first + count - 1).max(1) * 512)]).is_err() || first + count == 1);
    }

    /// One flipped byte is an error, in the head or in the body: never other bytes.
    #[test]
    fn a_changed_byte_is_noticed(
        kind in 0u8..5, count in 1u64..9, sectors: bool, seed in any::<u64>(), at in any::<prop::sample::Index>(), flip in 1u8..,
    ) {
        let volumes = [volume(1 << 20)];
        let plain = content(kind, (count * if sectors { SECTOR_BYTES } else { BLOCK_BYTES }) as usize, seed);
        let mut record = match sectors {
            true => encoded_sectors(5, &plain),
            false => encoded(BlockRun { start: 5, count }, &plain),
        };
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
    fn noise_as_a_body_is_refused(stored in prop::collection::vec(any::<u8>(), 1..600), crc in any::<u32>(), count in 1u64..=512, sectors: bool) {
        let len_bytes = if sectors { count * 512 } else { count.div_ceil(8) * BLOCK_BYTES };
        let encoding = if sectors { 6 } else { 2 };
        let head = RecordHead { volume: 0, offset_bytes: 0, len_bytes, sectors, stored_bytes: stored.len() as u32, plain_crc32: crc, encoding };
        let mut plain = vec![0xaa; len_bytes as usize];
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
    fn a_forged_head_that_passes_is_harmless(
        fields in any::<[u8; 24]>(), keep in any::<u32>(), sectors: bool, small: bool, size in 1u64..1 << 20,
    ) {
        let record = if sectors { encoded_sectors(3, &[3; 2048]) } else { encoded(BlockRun { start: 0, count: 1 }, &[3; 4096]) };
        let mut forgery = record[..28].to_vec();
        forgery.extend_from_slice(&[0; 4]);
        for at in (4..28).filter(|at| keep >> at & 1 == 0) {
            // Small numbers, or most of what passes would be what was not forged.
            let high = matches!(at, 4..6 | 10..16 | 18..20 | 22..24);
            forgery[at] = if small && high { 0 } else { fields[at - 4] };
        }
        let forgery = forged(&forgery, 0, &[]);
        if let Ok(Some(head)) = head(&forgery, &[volume(size * 512)]) {
            let (bytes, run) = (head.bytes(), head.block_run());
            let unit = if head.sectors { SECTOR_BYTES } else { BLOCK_BYTES };
            prop_assert!(bytes.len >= 512 && bytes.len <= (1 << 18) && bytes.end() <= size * 512);
            prop_assert!(bytes.offset % unit == 0 && (bytes.len % unit == 0 || bytes.end() == size * 512));
            prop_assert!(run.end() <= (size * 512).div_ceil(BLOCK_BYTES) && run.count <= RUN_BLOCKS_MAX + u64::from(head.sectors));
            prop_assert!(u64::from(head.stored_bytes) <= bytes.len && (head.encoding >= 4) == head.sectors);
        }
    }
}

#[test]
fn every_field_out_of_range_is_refused() {
    let volumes = [volume(10 * BLOCK_BYTES)];
    let run = BlockRun { start: 8, count: 2 };
    let packed = encoded(run, &[3; 8192]);
    assert_eq!(head(&forged(&packed, 0, &[]), &volumes).unwrap().unwrap().block_run(), run, "the forger's crc is right");
    let cases: &[(&str, usize, &[u8])] = &[
        ("magic", 0, &[0x45]),
        ("the version of sectors", 2, &[2]),
        ("a later version", 2, &[3]),
        ("no version", 2, &[0]),
        ("encoding", 3, &[3]),
        ("an encoding of sectors", 3, &[6]),
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
fn every_field_of_a_sector_record_out_of_range_is_refused() {
    // 83 sectors: ten blocks and three sectors of the eleventh.
    let volumes = [volume(10 * BLOCK_BYTES + 3 * 512)];
    let packed = encoded_sectors(79, &[3; 2048]);
    let tail = head(&forged(&packed, 0, &[]), &volumes).unwrap().unwrap();
    assert_eq!((tail.bytes(), tail.block_run()), (ByteRun { offset: 79 * 512, len: 2048 }, BlockRun { start: 9, count: 2 }));
    let cases: &[(&str, usize, &[u8])] = &[
        ("the version of blocks", 2, &[1]),
        ("a later version", 2, &[3]),
        ("an encoding of blocks", 3, &[2]),
        ("an encoding between", 3, &[3]),
        ("an encoding after", 3, &[7]),
        ("an encoding far after", 3, &[0x86]),
        ("encoding plain of lz4's length", 3, &[5]),
        ("encoding zero with bytes", 3, &[4]),
        ("volume", 4, &[1, 0]),
        ("reserved", 6, &[1]),
        ("reserved", 7, &[1]),
        ("start past the end", 8, &83u64.to_le_bytes()),
        ("end past the end", 8, &80u64.to_le_bytes()),
        ("end past the end, inside the last block", 16, &5u32.to_le_bytes()),
        ("start that overflows in bytes", 8, &(u64::MAX / 512 + 1 + 79).to_le_bytes()),
        ("start that overflows", 8, &u64::MAX.to_le_bytes()),
        ("no sectors", 16, &0u32.to_le_bytes()),
        ("too many sectors", 16, &513u32.to_le_bytes()),
        ("very many sectors", 16, &u32::MAX.to_le_bytes()),
        ("no stored bytes", 20, &0u32.to_le_bytes()),
        ("as many stored bytes as plain ones", 20, &2048u32.to_le_bytes()),
        ("more stored bytes than plain ones", 20, &u32::MAX.to_le_bytes()),
    ];
    for (what, at, bytes) in cases {
        let fault = head(&forged(&packed, *at, bytes), &volumes).expect_err(what);
        assert_eq!(fault.code, Code::ProtocolError, "{what}");
    }
    // 513 sectors are too many even where the volume has them; 512 are not.
    let long = encoded_sectors(1, &vec![3; 512 * 512]);
    assert_eq!(head(&long, &[volume(1 << 30)]).unwrap().unwrap().block_run(), BlockRun { start: 0, count: 65 });
    assert_eq!(RUN_SECTORS_MAX, 512);
    assert!(head(&forged(&long, 16, &513u32.to_le_bytes()), &[volume(1 << 30)]).is_err());
}

/// What agents from before sector records make of one: they look at the version first.
#[test]
fn a_version_that_is_not_known_is_named() {
    let fault = head(&forged(&encoded_sectors(0, &[3; 512]), 2, &[9]), &[volume(4096)]).unwrap_err();
    assert!(fault.cause.contains("of version 9,"), "{fault}");
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

#[test]
#[should_panic(expected = "not those of a run of sectors")]
fn half_a_sector_is_never_encoded() {
    encoded_sectors(0, &[1; 768]);
}

#[test]
#[should_panic(expected = "not those of a run of sectors")]
fn no_sectors_are_never_encoded() {
    encoded_sectors(0, &[]);
}

#[test]
#[should_panic(expected = "not those of a run of sectors")]
fn too_many_sectors_are_never_encoded() {
    encoded_sectors(0, &vec![1; 513 * 512]);
}
