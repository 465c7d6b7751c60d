//! The bytes of every message and change record that version 1 ever wrote, kept under `tests/golden/v1/`.
//!
//! Both directions are compared: today's encoder must write them, today's decoder must read them. They never change. What a
//! later version writes gets a directory of its own, beside this one, and the old files must still be readable.
//!
//! New samples are added to the lists below and written by
//! `cargo test --test format_golden make_golden -- --ignored`, which never touches a file that is there.

use doublure::delta;
use doublure::format::{
    FRAME_HEADER_BYTES, FrameHead, Landing, Message, PROTOCOL, PROTOCOL_SECTORS, Purpose, Standing, generation_digest,
};
use doublure::model::{BlockRun, ByteRun, Code, Digest, Fault, FileSystem, ImagePin, Moment, Position, Role, Uuid, VolumeSpec};
use std::path::PathBuf;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1").join(name)
}

/// 0, 1, 2, ... so that a shifted or swapped field shows.
fn count<const N: usize>(from: u8) -> [u8; N] {
    std::array::from_fn(|at| from.wrapping_add(at as u8))
}

fn at(epoch: u64, generation: u64) -> Position {
    Position { epoch, generation }
}

fn messages() -> Vec<(&'static str, Message)> {
    let empty = Standing {
        role: Role::Standby,
        epoch: 3,
        tip: Position::default(),
        tip_digest: Digest::default(),
        open: None,
        syncing: false,
        defined: false,
    };
    let full = Standing {
        role: Role::Primary,
        epoch: u64::MAX,
        tip: at(0x0102_0304_0506_0708, 900),
        tip_digest: Digest(count(0)),
        open: Some((at(7, 901), 1 << 40)),
        syncing: true,
        defined: true,
    };
    let standing_of = |role| Message::Welcome {
        protocol: PROTOCOL,
        host: "lyon".into(),
        standing: Standing { role, ..empty.clone() },
        credit_bytes: 0,
    };
    let hello = |purpose| Message::Hello {
        protocol: PROTOCOL,
        host: "paris-1.example".into(),
        purpose,
        group: Uuid(count(16)),
        epoch: 3,
    };
    // From the first release on that knows sector records; those before it refuse this version in words.
    let hello_sectors = Message::Hello {
        protocol: PROTOCOL_SECTORS,
        host: "paris-1.example".into(),
        purpose: Purpose::Replicate,
        group: Uuid(count(16)),
        epoch: 3,
    };
    let begin = |landing| Message::Begin {
        position: at(4, 12),
        parent: at(3, 11),
        parent_digest: Digest(count(32)),
        landing,
        payload_max_bytes: 5_000_000_000,
    };
    let id = |digit: &str| format!("sha256:{}", digit.repeat(64));
    vec![
        ("hello_replicate", hello(Purpose::Replicate)),
        ("hello_images", hello(Purpose::Images)),
        ("hello_ask", hello(Purpose::Ask)),
        ("hello_sectors", hello_sectors),
        ("welcome_empty", standing_of(Role::Standby)),
        ("welcome_promoting", standing_of(Role::Promoting)),
        ("welcome_fenced", standing_of(Role::Fenced)),
        ("welcome_full", Message::Welcome { protocol: PROTOCOL, host: "lyon".into(), standing: full, credit_bytes: 64 << 20 }),
        ("define", Message::Define { spec: br#"{"id":"00","name":"shop"}"#.to_vec() }),
        ("defined", Message::Defined),
        ("begin_journal", begin(Landing::Journal)),
        ("begin_direct", begin(Landing::Direct)),
        ("chunks", Message::Chunks { bytes: count::<200>(0).to_vec() }),
        ("segment", Message::Segment { number: 1 }),
        ("segment_done", Message::SegmentDone { number: 1 }),
        ("end", Message::End { payload_bytes: 77, payload_digest: Digest(count(64)), cut_at: Moment(1_770_000_000_123) }),
        ("committed", Message::Committed { position: at(4, 12), digest: Digest(count(96)) }),
        ("abort", Message::Abort { reason: "the cut was not \"exact\" (é)".into() }),
        ("credit", Message::Credit { bytes: 262_176 }),
        ("digests_wanted", Message::DigestsWanted { volume: 2, start: 1 << 33, count: 16384 }),
        ("digests", Message::Digests { volume: 2, start: 1 << 33, digests: count::<48>(5).to_vec() }),
        ("digests_done", Message::DigestsDone { volume: 2 }),
        (
            "image_offer",
            Message::ImageOffer {
                pin: ImagePin {
                    config_digest: id("a"),
                    diff_ids: vec![id("0"), id("1")],
                    name: "registry.example/shop/db:16.3".into(),
                },
                archive_bytes: 123_456_789,
            },
        ),
        ("image_wanted", Message::ImageWanted { from_byte: Some(4096) }),
        ("image_not_wanted", Message::ImageWanted { from_byte: None }),
        ("image_bytes", Message::ImageBytes { bytes: count::<100>(100).to_vec() }),
        ("image_end", Message::ImageEnd),
        ("image_ready", Message::ImageReady),
        ("ping", Message::Ping),
        ("pong", Message::Pong),
        ("unchanged", Message::Unchanged { position: at(4, 12), at: Moment(1_790_000_000_123) }),
        (
            "refused",
            Message::Refused { fault: Fault::new(Code::StaleEpoch, "group shop", "epoch 5 is known here", "fence this host") },
        ),
    ]
}

/// A change record: name, volume number, first unit and number of units, plain bytes, and the encoding that they were given.
type Record = (&'static str, u16, BlockRun, Vec<u8>, u8);

/// From encoding 4 on the unit is the sector.
fn put_record((_, number, run, plain, encoding): &Record, out: &mut Vec<u8>) {
    match encoding {
        0..4 => delta::encode(*number, *run, plain, out),
        _ => delta::encode_sectors(*number, run.start, plain, true, out),
    }
}

fn records() -> (Vec<VolumeSpec>, Vec<Record>) {
    let volume = |id: u8, size_bytes| VolumeSpec {
        id: Uuid([id; 16]),
        name: format!("v{id}"),
        size_bytes,
        fs: FileSystem::Xfs,
        mount_options: String::new(),
    };
    // A byte sequence without repeats that lz4 could use.
    let mut state = 1u32;
    let mut noise = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    });
    let text = b"insert into accounts values (1, 'doublure');\n".iter().copied().cycle();
    let run = |start, count| BlockRun { start, count };
    let volumes = vec![volume(1, 1 << 45), volume(2, 8 * 4096 + 512)];
    let records = vec![
        ("record_zero", 0, run(0xffff_fff0, 64), vec![0; 64 * 4096], 0),
        ("record_zero_short", 1, run(7, 2), vec![0; 4096 + 512], 0),
        ("record_plain_short", 1, run(8, 1), noise.by_ref().take(512).collect(), 1),
        ("record_lz4", 0, run(1 << 30, 2), text.clone().take(8192).collect(), 2),
        ("record_lz4_short", 1, run(7, 2), text.clone().take(4096 + 512).collect(), 2),
        ("record_sectors_zero", 0, run(0x1_ffff_fff1, 512), vec![0; 512 * 512], 4),
        ("record_sectors_plain", 0, run((1 << 36) - 1, 1), noise.take(512).collect(), 5),
        ("record_sectors_lz4", 1, run(61, 4), text.take(4 * 512).collect(), 6),
    ];
    (volumes, records)
}

fn encoded(message: &Message) -> Vec<u8> {
    let mut out = Vec::new();
    message.encode(&mut out);
    out
}

fn stored(name: &str) -> Vec<u8> {
    let path = golden(&format!("{name}.bin"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn every_message_is_written_and_read_as_version_1_did() {
    for (name, message) in messages() {
        let bytes = stored(name);
        assert_eq!(encoded(&message), bytes, "{name}: what is written has changed");
        let head = FrameHead::decode(bytes.first_chunk().unwrap()).unwrap_or_else(|fault| panic!("{name}: {fault}"));
        assert_eq!(head.message(bytes[FRAME_HEADER_BYTES..].to_vec()), Ok(message), "{name}: what is read has changed");
    }
}

#[test]
fn every_record_is_read_as_version_1_wrote_it_and_written_alike() {
    let (volumes, records) = records();
    for record in records {
        let (name, number, run, plain, encoding) = &record;
        let bytes = stored(name);
        let head = delta::head(&bytes, &volumes).unwrap().unwrap();
        let unit_bytes = if *encoding < 4 { 4096 } else { 512 };
        let place = ByteRun { offset: run.start * unit_bytes, len: plain.len() as u64 };
        assert_eq!((head.volume, head.bytes(), head.encoding), (*number, place, *encoding), "{name}");
        let mut back = vec![0xaa; plain.len()];
        delta::decode(&head, &bytes[delta::RECORD_HEADER_BYTES..], &mut back).unwrap();
        assert!(back == *plain, "{name}: other bytes were read");
        let mut again = Vec::new();
        put_record(&record, &mut again);
        // lz4 has many spellings of the same bytes, and a later compressor may choose another. All else is fixed.
        match encoding {
            2 | 6 => assert_eq!(again[..20], bytes[..20], "{name}"),
            _ => assert_eq!(again, bytes, "{name}"),
        }
    }
}

#[test]
fn the_digest_of_a_generation_is_that_of_version_1() {
    let digest = generation_digest(Uuid(count(0)), at(2, 9), at(1, 8), Digest(count(16)), 1234, Digest(count(48)), Moment(5678));
    assert_eq!(digest.to_string(), "a7d9a537ac78d203e4da2d55bb08e82ff3f77219f4d4c4e202b78e97c85414e8");
}

#[test]
fn the_digest_of_a_block_is_that_of_version_1() {
    let block: Vec<u8> = (0..4096u32).map(|at| (at * 7 / 3) as u8).collect();
    let hex: String = delta::BlockDigest::of(&block).0.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, "75c6a5ea6c4ac7a985bd04fb3defbc35");
}

#[test]
fn no_sample_is_forgotten() {
    let (_, records) = records();
    let mut named: Vec<String> =
        messages().iter().map(|m| m.0).chain(records.iter().map(|r| r.0)).map(|n| format!("{n}.bin")).collect();
    let kinds: std::collections::BTreeSet<u16> =
        messages().iter().map(|(_, message)| u16::from_le_bytes([encoded(message)[6], encoded(message)[7]])).collect();
    assert_eq!(kinds, (1..=24).collect(), "each kind of message has a sample");
    let entries = std::fs::read_dir(golden("")).unwrap();
    let mut kept: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    kept.retain(|name| !name.starts_with("journal_") && !name.starts_with("ledger_"));
    named.sort();
    kept.sort();
    assert_eq!(kept, named);
}

#[test]
#[ignore = "writes missing samples: cargo test --test format_golden make_golden -- --ignored"]
fn make_golden() {
    let (_, records) = records();
    let records = records.into_iter().map(|record| {
        let mut out = Vec::new();
        put_record(&record, &mut out);
        (record.0, out)
    });
    for (name, bytes) in messages().iter().map(|(name, message)| (*name, encoded(message))).chain(records) {
        let path = golden(&format!("{name}.bin"));
        // `create_new`: bytes that were shipped are never written over.
        match std::fs::File::options().write(true).create_new(true).open(&path) {
            Ok(mut file) => std::io::Write::write_all(&mut file, &bytes).unwrap(),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists, "{}", path.display()),
        }
    }
}
