//! Tests of frames and messages: faithful both ways, one spelling, and an error for everything else.

use crate::format::{
    CONTROL_MAX, FRAME_HEADER_BYTES, FRAME_PAYLOAD_MAX, FrameHead, Landing, Message, PROTOCOL, Purpose, Standing,
    generation_digest,
};
use crate::model::{Code, Digest, Fault, ImagePin, Moment, Position, Res, Role, Uuid};
use proptest::prelude::*;

fn position() -> impl Strategy<Value = Position> {
    (any::<u64>(), any::<u64>()).prop_map(|(epoch, generation)| Position { epoch, generation })
}
fn digest() -> impl Strategy<Value = Digest> {
    any::<[u8; 32]>().prop_map(Digest)
}
fn host() -> impl Strategy<Value = String> {
    "[A-Za-z0-9][A-Za-z0-9_.-]{0,127}"
}
fn words() -> impl Strategy<Value = String> {
    "\\PC{0,60}".prop_map(|text| text.chars().filter(|c| !c.is_control()).collect())
}
fn bytes(max: usize) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..max)
}
fn standing() -> impl Strategy<Value = Standing> {
    let role = prop::sample::select(vec![Role::Primary, Role::Standby, Role::Promoting, Role::Fenced]);
    (role, any::<u64>(), position(), digest(), prop::option::of((position(), any::<u64>())), any::<bool>(), any::<bool>())
        .prop_map(|(role, epoch, tip, tip_digest, open, syncing, defined)| Standing {
            role,
            epoch,
            tip,
            tip_digest,
            open,
            syncing,
            defined,
        })
}
fn pin() -> impl Strategy<Value = ImagePin> {
    let id = || "sha256:[0-9a-f]{64}";
    (id(), prop::collection::vec(id(), 0..9), words()).prop_map(|(config_digest, diff_ids, name)| ImagePin {
        config_digest,
        diff_ids,
        name,
    })
}
fn fault() -> impl Strategy<Value = Fault> {
    (prop::sample::select(Code::ALL), words(), words(), words()).prop_map(|(code, a, b, c)| Fault::new(code, a, b, c))
}

fn message() -> impl Strategy<Value = Message> {
    let purpose = prop::sample::select(vec![Purpose::Replicate, Purpose::Images, Purpose::Ask]);
    let landing = prop::sample::select(vec![Landing::Direct, Landing::Journal]);
    prop_oneof![
        (any::<u16>(), host(), purpose, any::<[u8; 16]>(), any::<u64>()).prop_map(|(protocol, host, purpose, group, epoch)| {
            Message::Hello { protocol, host, purpose, group: Uuid(group), epoch }
        }),
        (any::<u16>(), host(), standing(), any::<u64>()).prop_map(|(protocol, host, standing, credit_bytes)| Message::Welcome {
            protocol,
            host,
            standing,
            credit_bytes
        }),
        bytes(300).prop_map(|spec| Message::Define { spec }),
        (position(), position(), digest(), landing, any::<u64>()).prop_map(|(position, parent, parent_digest, landing, max)| {
            Message::Begin { position, parent, parent_digest, landing, payload_max_bytes: max }
        }),
        bytes(300).prop_map(|bytes| Message::Chunks { bytes }),
        any::<u64>().prop_map(|number| Message::Segment { number }),
        any::<u64>().prop_map(|number| Message::SegmentDone { number }),
        (any::<u64>(), digest(), any::<u64>()).prop_map(|(payload_bytes, payload_digest, at)| Message::End {
            payload_bytes,
            payload_digest,
            cut_at: Moment(at)
        }),
        (position(), digest()).prop_map(|(position, digest)| Message::Committed { position, digest }),
        words().prop_map(|reason| Message::Abort { reason }),
        any::<u64>().prop_map(|bytes| Message::Credit { bytes }),
        (any::<u16>(), any::<u64>(), any::<u64>()).prop_map(|(volume, start, count)| Message::DigestsWanted {
            volume,
            start,
            count
        }),
        (any::<u16>(), any::<u64>(), prop::collection::vec(any::<[u8; 16]>(), 0..9))
            .prop_map(|(volume, start, digests)| Message::Digests { volume, start, digests: digests.concat() }),
        any::<u16>().prop_map(|volume| Message::DigestsDone { volume }),
        (pin(), any::<u64>()).prop_map(|(pin, archive_bytes)| Message::ImageOffer { pin, archive_bytes }),
        prop::option::of(any::<u64>()).prop_map(|from_byte| Message::ImageWanted { from_byte }),
        bytes(300).prop_map(|bytes| Message::ImageBytes { bytes }),
        fault().prop_map(|fault| Message::Refused { fault }),
        (any::<u64>(), any::<u64>(), any::<u64>()).prop_map(|(epoch, generation, at)| Message::Unchanged {
            position: Position { epoch, generation },
            at: Moment(at),
        }),
        prop::sample::select(vec![Message::Defined, Message::ImageEnd, Message::ImageReady, Message::Ping, Message::Pong]),
    ]
}

fn frame(message: &Message) -> Vec<u8> {
    let mut out = Vec::new();
    message.encode(&mut out);
    out
}

/// Takes the first frame off, as a socket's reader would.
fn take(bytes: &mut &[u8]) -> Res<Message> {
    let short = || Fault::protocol("cut off");
    let (header, rest) = bytes.split_first_chunk::<FRAME_HEADER_BYTES>().ok_or_else(short)?;
    let head = FrameHead::decode(header)?;
    let (payload, rest) = rest.split_at_checked(head.payload_bytes).ok_or_else(short)?;
    *bytes = rest;
    head.message(payload.to_vec())
}

proptest! {
    #[test]
    fn what_was_encoded_is_decoded(messages in prop::collection::vec(message(), 1..5)) {
        let mut stream = Vec::new();
        messages.iter().for_each(|message| message.encode(&mut stream));
        let mut rest = &stream[..];
        for message in messages {
            prop_assert_eq!(take(&mut rest).unwrap(), message);
        }
        prop_assert!(rest.is_empty());
    }

    /// Up to four bytes in a row changed: crc32 is certain to notice.
    #[test]
    fn a_changed_frame_is_never_another_message(message in message(), at in any::<prop::sample::Index>(), flip in any::<[u8; 4]>()) {
        let good = frame(&message);
        let mut bad = good.clone();
        let at = at.index(bad.len());
        bad[at..].iter_mut().zip(flip).for_each(|(byte, flip)| *byte ^= flip);
        match take(&mut &bad[..]) {
            Ok(read) => prop_assert!(bad == good && read == message),
            Err(fault) => prop_assert!(bad != good && matches!(fault.code, Code::ProtocolError)),
        }
    }

    #[test]
    fn a_frame_cut_off_is_an_error(message in message(), at in any::<prop::sample::Index>()) {
        let bytes = frame(&message);
        prop_assert!(take(&mut &bytes[..at.index(bytes.len())]).is_err());
    }

    #[test]
    fn noise_is_no_frame(bytes in bytes(200)) {
        prop_assert!(take(&mut &bytes[..]).is_err());
    }

    /// A peer can make any crc right. Whatever payload is then taken is the one spelling of what was understood.
    #[test]
    fn a_payload_that_is_taken_is_spelled_in_one_way(kind in 0u16..30, payload in bytes(200)) {
        if let Ok(message) = Message::decode(kind, payload.clone()) {
            prop_assert_eq!(&frame(&message)[FRAME_HEADER_BYTES..], &payload[..]);
        }
    }

    #[test]
    fn so_is_a_payload_close_to_a_good_one(
        message in message(), at in any::<prop::sample::Index>(), with in "[ \\\\\"{}:,0-9a-fA-F+.e\\x00-]{0,3}", gone in 0usize..4, kind_off in 0u16..2,
    ) {
        let good = frame(&message);
        let kind = u16::from_le_bytes([good[6], good[7]]) + kind_off;
        let mut payload = good[FRAME_HEADER_BYTES..].to_vec();
        let at = at.index(payload.len() + 1);
        payload.splice(at..(at + gone).min(payload.len()), with.bytes());
        if let Ok(read) = Message::decode(kind, payload.clone()) {
            prop_assert_eq!(&frame(&read)[FRAME_HEADER_BYTES..], &payload[..]);
            prop_assert_eq!(frame(&read)[6..8].to_vec(), kind.to_le_bytes().to_vec());
        }
    }
}

fn decode_json(kind: u16, json: &str) -> Res<Message> {
    Message::decode(kind, json.as_bytes().to_vec())
}

#[test]
fn json_in_any_other_spelling_is_refused() {
    let good =
        r#"{"position":{"epoch":1,"generation":2},"digest":"00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"}"#;
    assert!(matches!(decode_json(10, good).unwrap(), Message::Committed { position: Position { epoch: 1, generation: 2 }, .. }));
    for (what, bad) in [
        ("an unknown field", good.replace("}", r#","more":1}"#)),
        ("an unknown field inside", good.replace(r#""epoch":1"#, r#""epoch":1,"more":1"#)),
        ("a doubled field", good.replace(r#""epoch":1"#, r#""epoch":1,"epoch":1"#)),
        ("a missing field", good.replace(r#""epoch":1,"#, "")),
        ("another order", good.replace(r#""epoch":1,"generation":2"#, r#""generation":2,"epoch":1"#)),
        ("a space", good.replace(',', ", ")),
        ("something after it", format!("{good} ")),
        ("upper case", good.replace('a', "A")),
        ("a digest with signs", good.replace("00112233", "+0+12233")),
        ("a short digest", good.replace("0011", "")),
        ("an escape", good.replace("aa", "\\u0061a")),
        ("a negative number", good.replace(":1,", ":-1,")),
        ("a fraction", good.replace(":1,", ":1.0,")),
        ("a number too large", good.replace(":1,", ":18446744073709551616,")),
        ("another type", "[]".to_string()),
        ("nothing", String::new()),
        ("depth", "[".repeat(5000)),
    ] {
        assert_ne!(bad, good, "{what}");
        assert_eq!(decode_json(10, &bad).expect_err(what).code, Code::ProtocolError, "{what}");
    }
}

#[test]
fn names_words_and_digests_of_a_peer_are_checked() {
    let hello = |host: &str| {
        format!(r#"{{"protocol":1,"host":"{host}","purpose":"ask","group":"00112233445566778899aabbccddeeff","epoch":1}}"#)
    };
    assert!(decode_json(1, &hello("paris-1")).is_ok());
    for host in ["", "../x", "a b", "-a", "a\\u0000", "a\\n", &"x".repeat(129)] {
        assert!(decode_json(1, &hello(host)).is_err(), "{host:?}");
    }
    let abort = |reason: &str| format!(r#"{{"reason":"{reason}"}}"#);
    assert!(decode_json(11, &abort("the cut was not exact")).is_ok());
    assert!(decode_json(11, &abort(&"x".repeat(2000))).is_ok());
    for reason in ["\\u001b[2J", "\\n", "\u{9b}2J", "\\u0000", &"x".repeat(2001)] {
        assert!(decode_json(11, &abort(reason)).is_err(), "{reason:?}");
    }
    let id = format!("sha256:{}", "0".repeat(64));
    let offer = |config: &str, layers: &str| {
        format!(r#"{{"pin":{{"config_digest":"{config}","diff_ids":[{layers}],"name":"db:1"}},"archive_bytes":9}}"#)
    };
    assert!(decode_json(16, &offer(&id, &format!("\"{id}\",\"{id}\""))).is_ok());
    for (config, layers) in [("", ""), ("sha256:00", ""), (&id, "\"\",\"\""), (&id, "\"sha512:00\""), (&id.to_uppercase(), "")] {
        assert!(decode_json(16, &offer(config, layers)).is_err(), "{config} {layers}");
    }
}

#[test]
fn words_that_leave_are_cut_and_tidied() {
    let fault = Fault::new(Code::ToolFailed, "mkfs\u{1b}[2J\n", "é".repeat(1500), "try again");
    let Message::Refused { fault } = take(&mut &frame(&Message::Refused { fault })[..]).unwrap() else {
        panic!("another message")
    };
    assert_eq!(fault, Fault::new(Code::ToolFailed, "mkfs [2J ", "é".repeat(1000), "try again"));
    let cut_inside_a_letter = format!("x{}", "é".repeat(1500));
    let Message::Abort { reason } = take(&mut &frame(&Message::Abort { reason: cut_inside_a_letter })[..]).unwrap() else {
        panic!("another message")
    };
    assert_eq!(reason, format!("x{}", "é".repeat(999)));
}

/// A header with one field changed and its crc made right again.
fn forged(at: usize, bytes: &[u8]) -> [u8; FRAME_HEADER_BYTES] {
    let mut header = *frame(&Message::Ping).first_chunk().unwrap();
    header[at..at + bytes.len()].copy_from_slice(bytes);
    let crc = crc32fast::hash(&header[..20]);
    header[20..24].copy_from_slice(&crc.to_le_bytes());
    header
}

#[test]
fn a_header_out_of_range_is_refused_before_anything_is_allocated() {
    assert_eq!(FrameHead::decode(&forged(0, b"DBLR")).unwrap().kind, 21);
    let cases: &[(&str, usize, &[u8])] = &[
        ("magic", 0, b"DBLX"),
        ("kind 0", 6, &[0, 0]),
        ("kind 25", 6, &[25, 0]),
        ("kind 65535", 6, &[255, 255]),
        ("a ping of more than 64 KiB", 8, &(64u32 * 1025 + 1).to_le_bytes()),
        ("a ping of 4 GiB", 8, &u32::MAX.to_le_bytes()),
        ("reserved", 16, &[1]),
        ("reserved", 19, &[1]),
    ];
    for (what, at, bytes) in cases {
        assert_eq!(FrameHead::decode(&forged(*at, bytes)).expect_err(what).code, Code::ProtocolError, "{what}");
    }
    for (kind, max) in
        [(3u16, CONTROL_MAX), (6, FRAME_PAYLOAD_MAX), (14, FRAME_PAYLOAD_MAX), (18, FRAME_PAYLOAD_MAX), (1, 64 << 10)]
    {
        let sized = |bytes: usize| forged(6, &[&kind.to_le_bytes()[..], &(bytes as u32).to_le_bytes()[..]].concat());
        assert_eq!(FrameHead::decode(&sized(max)).unwrap().payload_bytes, max);
        assert!(FrameHead::decode(&sized(max + 1)).is_err(), "kind {kind}");
        assert!(Message::decode(kind, vec![b' '; max + 1]).is_err(), "kind {kind}");
    }
}

#[test]
fn another_version_is_named_with_ours() {
    for theirs in [0u16, 2, 700] {
        let fault = FrameHead::decode(&forged(4, &theirs.to_le_bytes())).unwrap_err();
        assert_eq!(fault.code, Code::VersionMismatch);
        assert!(
            fault.cause.contains(&format!("version {theirs} ")) && fault.cause.ends_with(&format!("version {PROTOCOL}")),
            "{fault}"
        );
    }
}

#[test]
fn a_payload_of_another_length_or_crc_is_refused() {
    let bytes = frame(&Message::Chunks { bytes: vec![7; 100] });
    let head = FrameHead::decode(bytes.first_chunk().unwrap()).unwrap();
    assert!(head.message(vec![7; 100]).is_ok());
    assert!(head.message(vec![7; 99]).is_err());
    assert!(head.message(vec![8; 100]).is_err());
}

#[test]
fn digests_are_sixteen_bytes_a_block() {
    let good = Message::Digests { volume: 3, start: 1 << 40, digests: vec![9; 32] };
    let payload = frame(&good)[FRAME_HEADER_BYTES..].to_vec();
    assert_eq!(Message::decode(14, payload.clone()).unwrap(), good);
    for len in (0..16).chain(17..32).chain(33..48) {
        assert!(Message::decode(14, payload[..len].to_vec()).is_err(), "{len}");
    }
    for at in 2..8 {
        let mut reserved = payload.clone();
        reserved[at] = 1;
        assert!(Message::decode(14, reserved).is_err(), "{at}");
    }
}

#[test]
fn the_largest_payload_passes_and_a_larger_one_never_leaves() {
    let largest = Message::Chunks { bytes: vec![1; FRAME_PAYLOAD_MAX] };
    assert_eq!(take(&mut &frame(&largest)[..]).unwrap(), largest);
    let too_large = Message::Chunks { bytes: vec![1; FRAME_PAYLOAD_MAX + 1] };
    assert!(std::panic::catch_unwind(|| frame(&too_large)).is_err());
}

#[test]
fn a_generation_digest_covers_each_of_its_parts() {
    let at = |epoch, generation| Position { epoch, generation };
    let (group, digest) = (Uuid([1; 16]), Digest([2; 32]));
    let all = [
        generation_digest(group, at(3, 4), at(5, 6), digest, 7, digest, Moment(8)),
        generation_digest(Uuid([2; 16]), at(3, 4), at(5, 6), digest, 7, digest, Moment(8)),
        generation_digest(group, at(2, 4), at(5, 6), digest, 7, digest, Moment(8)),
        generation_digest(group, at(3, 3), at(5, 6), digest, 7, digest, Moment(8)),
        generation_digest(group, at(3, 4), at(4, 6), digest, 7, digest, Moment(8)),
        generation_digest(group, at(3, 4), at(5, 5), digest, 7, digest, Moment(8)),
        generation_digest(group, at(3, 4), at(5, 6), Digest([3; 32]), 7, digest, Moment(8)),
        generation_digest(group, at(3, 4), at(5, 6), digest, 6, digest, Moment(8)),
        generation_digest(group, at(3, 4), at(5, 6), digest, 7, Digest([3; 32]), Moment(8)),
        generation_digest(group, at(3, 4), at(5, 6), digest, 7, digest, Moment(9)),
    ];
    let distinct: std::collections::HashSet<_> = all.iter().collect();
    assert_eq!(distinct.len(), all.len());
}

#[test]
fn a_generation_digest_is_blake3_of_the_byte_map() {
    let (group, parent_digest, payload_digest) = ([1; 16], [2; 32], [3; 32]);
    let numbers = |numbers: &[u64]| numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
    let bytes = [
        b"DBLR-GENERATION1".to_vec(),
        group.to_vec(),
        numbers(&[4, 5, 6, 7]),
        parent_digest.to_vec(),
        numbers(&[8]),
        payload_digest.to_vec(),
        numbers(&[9]),
    ]
    .concat();
    assert_eq!(bytes.len(), 144);
    let at = |epoch, generation| Position { epoch, generation };
    let digest = generation_digest(Uuid(group), at(4, 5), at(6, 7), Digest(parent_digest), 8, Digest(payload_digest), Moment(9));
    assert_eq!(digest.0, *blake3::hash(&bytes).as_bytes());
}
