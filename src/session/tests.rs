//! Every message in every stage of both halves, and each rule by name.

use crate::format::{FRAME_PAYLOAD_MAX, Landing, Message, PROTOCOL, PROTOCOL_SECTORS, Purpose, Standing, generation_digest};
use crate::model::{Code, Digest, Fault, ImagePin, Moment, Position, Receipt, Res, Role, SealedProof, Uuid};
use crate::session::{OpenTransfer, Receiver, ReceiverAction, Sender, SenderEvent, word};

const GROUP: Uuid = Uuid([7; 16]);
const EPOCH: u64 = 3;
const TIP: Position = Position { epoch: 2, generation: 41 };
const NEXT: Position = Position { epoch: EPOCH, generation: 42 };
const FIRST: Position = Position { epoch: EPOCH, generation: 1 };
const TIP_DIGEST: Digest = Digest([9; 32]);
const CUT_AT: Moment = Moment(1234);
const CREDIT: u64 = 1000;

struct Proof(Position, Digest);
impl SealedProof for Proof {
    fn position(&self) -> Position {
        self.0
    }
    fn digest(&self) -> Digest {
        self.1
    }
}

fn standing() -> Standing {
    Standing { role: Role::Standby, epoch: EPOCH, tip: TIP, tip_digest: TIP_DIGEST, open: None, syncing: false, defined: true }
}
fn empty() -> Standing {
    Standing { tip: Position::default(), tip_digest: Digest::default(), ..standing() }
}
fn welcome(standing: Standing) -> Message {
    Message::Welcome { protocol: PROTOCOL, host: "lyon".into(), standing, credit_bytes: CREDIT }
}
fn hello(purpose: Purpose, epoch: u64) -> Message {
    Message::Hello { protocol: PROTOCOL, host: "paris".into(), purpose, group: GROUP, epoch }
}
fn payload_digest(bytes: &[u8]) -> Digest {
    Digest(*blake3::hash(bytes).as_bytes())
}
/// The chained digest of generation 42 with this payload.
fn sealed_digest(payload: &[u8]) -> Digest {
    generation_digest(GROUP, NEXT, TIP, TIP_DIGEST, payload.len() as u64, payload_digest(payload), CUT_AT)
}
fn begin(position: Position, parent: Position, parent_digest: Digest, landing: Landing) -> Message {
    Message::Begin { position, parent, parent_digest, landing, payload_max_bytes: 500 }
}
fn begin_next() -> Message {
    begin(NEXT, TIP, TIP_DIGEST, Landing::Journal)
}
fn begin_first() -> Message {
    begin(FIRST, Position::default(), Digest::default(), Landing::Direct)
}
fn end(payload: &[u8]) -> Message {
    Message::End { payload_bytes: payload.len() as u64, payload_digest: payload_digest(payload), cut_at: CUT_AT }
}
fn chunks(bytes: &[u8]) -> Message {
    Message::Chunks { bytes: bytes.to_vec() }
}
fn code<T: std::fmt::Debug>(outcome: Res<T>) -> Code {
    outcome.expect_err("it was taken").code
}

/// One of each message, as right as it can be on its own.
fn one_of_each() -> Vec<Message> {
    let id = format!("sha256:{}", "0".repeat(64));
    vec![
        hello(Purpose::Replicate, EPOCH),
        welcome(standing()),
        Message::Define { spec: b"{}".to_vec() },
        Message::Defined,
        begin_next(),
        chunks(b"abc"),
        Message::Segment { number: 1 },
        Message::SegmentDone { number: 1 },
        end(b""),
        Message::Committed { position: NEXT, digest: sealed_digest(b"") },
        Message::Abort { reason: "changed my mind".into() },
        Message::Credit { bytes: 5 },
        Message::DigestsWanted { volume: 0, start: 0, count: 1 },
        Message::Digests { volume: 0, start: 0, digests: vec![1; 16] },
        Message::DigestsDone { volume: 0 },
        Message::ImageOffer { pin: ImagePin { config_digest: id, diff_ids: vec![], name: "db:1".into() }, archive_bytes: 100 },
        Message::ImageWanted { from_byte: Some(0) },
        Message::ImageBytes { bytes: vec![1; 10] },
        Message::ImageEnd,
        Message::ImageReady,
        Message::Ping,
        Message::Pong,
        Message::Unchanged { position: TIP, at: CUT_AT },
        Message::Refused { fault: Fault::new(Code::GroupBusy, "a", "b", "c") },
    ]
}

fn sender(purpose: Purpose, standing: Standing) -> Sender {
    let (mut sender, _) = Sender::new("paris", purpose, GROUP, EPOCH);
    sender.on_message(welcome(standing)).unwrap();
    sender
}
fn replicating() -> Sender {
    sender(Purpose::Replicate, standing())
}
fn receiver(purpose: Purpose, standing: Standing) -> Receiver {
    let mut receiver = Receiver::new("lyon");
    receiver.on_message(hello(purpose, EPOCH)).unwrap();
    assert!(matches!(receiver.welcome(standing, CREDIT), Message::Welcome { .. }));
    receiver
}
fn receiving(messages: &[Message]) -> Receiver {
    let mut receiver = receiver(Purpose::Replicate, standing());
    messages.iter().for_each(|message| drop(receiver.on_message(message.clone()).unwrap()));
    receiver
}
fn first_sync() -> Receiver {
    let mut receiver = receiver(Purpose::Replicate, empty());
    receiver.on_message(begin_first()).unwrap();
    receiver
}
/// What a connection that broke after `payload` leaves behind.
fn left_open(payload: &[u8]) -> OpenTransfer {
    receiving(&[begin_next(), chunks(payload)]).into_open().unwrap()
}
fn adopting(open: OpenTransfer, standing: Standing) -> (Receiver, Message) {
    let mut receiver = Receiver::new("lyon");
    receiver.on_message(hello(Purpose::Replicate, EPOCH)).unwrap();
    receiver.adopt(open);
    let answer = receiver.welcome(standing, CREDIT);
    (receiver, answer)
}

type Stage<T> = (&'static str, fn() -> T, &'static [&'static str]);

/// The sender's stages and the messages that have a place there.
const SENDER_STAGES: &[Stage<Sender>] = &[
    ("greeting", || Sender::new("paris", Purpose::Replicate, GROUP, EPOCH).0, &["Welcome"]),
    ("ready", replicating, &["Credit", "Ping", "Pong"]),
    (
        "ready, digests asked for",
        || {
            let mut sender = replicating();
            sender.want_digests(0, 0, 4).unwrap();
            sender
        },
        &["Credit", "Ping", "Pong", "Digests", "DigestsDone"],
    ),
    (
        "defining",
        || {
            let mut sender = sender(Purpose::Replicate, Standing { defined: false, ..standing() });
            sender.define(b"{}".to_vec()).unwrap();
            sender
        },
        &["Credit", "Ping", "Pong", "Defined"],
    ),
    (
        "open",
        || {
            let mut sender = replicating();
            sender.begin(NEXT, Landing::Journal, 500).unwrap();
            sender
        },
        &["Credit", "Ping", "Pong"],
    ),
    (
        "open, a segment asked for",
        || {
            let mut sender = sender(Purpose::Replicate, empty());
            sender.begin(FIRST, Landing::Direct, 500).unwrap();
            sender.segment().unwrap();
            sender
        },
        &["Credit", "Ping", "Pong", "SegmentDone"],
    ),
    (
        "ended",
        || {
            let mut sender = replicating();
            sender.begin(NEXT, Landing::Journal, 500).unwrap();
            sender.end(CUT_AT).unwrap();
            sender
        },
        &["Credit", "Ping", "Pong", "Committed"],
    ),
    (
        "aborted after its end",
        || {
            let mut sender = replicating();
            sender.begin(NEXT, Landing::Journal, 500).unwrap();
            sender.end(CUT_AT).unwrap();
            sender.abort("too late");
            sender
        },
        &[],
    ),
    ("asking", || sender(Purpose::Ask, Standing { role: Role::Primary, epoch: 99, ..standing() }), &["Ping", "Pong"]),
    ("images", || sender(Purpose::Images, standing()), &["Ping", "Pong", "ImageWanted", "ImageReady"]),
    (
        "refused",
        || {
            let mut sender = replicating();
            sender.on_message(one_of_each().pop().unwrap()).unwrap_err();
            sender
        },
        &[],
    ),
];

/// The receiver's stages and the messages that have a place there.
const RECEIVER_STAGES: &[Stage<Receiver>] = &[
    ("fresh", || Receiver::new("lyon"), &["Hello"]),
    (
        "greeted",
        || {
            let mut receiver = Receiver::new("lyon");
            receiver.on_message(hello(Purpose::Replicate, EPOCH)).unwrap();
            receiver
        },
        &[],
    ),
    ("asking", || receiver(Purpose::Ask, standing()), &["Ping"]),
    ("images", || receiver(Purpose::Images, standing()), &["Ping", "ImageOffer"]),
    (
        "an image offered",
        || {
            let mut receiver = receiver(Purpose::Images, standing());
            receiver.on_message(one_of_each()[15].clone()).unwrap();
            receiver
        },
        &["Ping", "ImageOffer", "ImageBytes", "ImageEnd"],
    ),
    (
        "an image begun",
        || {
            let mut receiver = receiver(Purpose::Images, standing());
            receiver.on_message(one_of_each()[15].clone()).unwrap();
            receiver.on_message(Message::ImageBytes { bytes: vec![0; 90] }).unwrap();
            receiver
        },
        &["Ping", "ImageBytes", "ImageEnd"],
    ),
    ("undefined", || receiver(Purpose::Replicate, Standing { defined: false, ..standing() }), &["Ping", "Define"]),
    ("ready", || receiving(&[]), &["Ping", "Define", "Begin", "DigestsWanted", "Unchanged"]),
    ("open", || receiving(&[begin_next()]), &["Ping", "Chunks", "End", "Abort", "DigestsWanted"]),
    ("open, a direct one", first_sync, &["Ping", "Chunks", "End", "Abort", "DigestsWanted", "Segment"]),
    (
        "adopted",
        || adopting(left_open(b"held"), Standing { open: Some((NEXT, 4)), ..standing() }).0,
        // `End` is in its place too, but not that of another payload: the next test has it.
        &["Ping", "Define", "Begin", "Chunks", "Abort", "DigestsWanted", "Unchanged"],
    ),
    ("committing", || receiving(&[begin_next(), end(b"")]), &["Ping"]),
    (
        "committed",
        || {
            let mut receiver = receiving(&[begin_next(), end(b"")]);
            receiver.committed(&Proof(NEXT, sealed_digest(b""))).unwrap();
            receiver
        },
        // `Begin` is in its place, but this one names the old parent.
        &["Ping", "Define", "DigestsWanted"],
    ),
    (
        "refused",
        || {
            let mut receiver = receiving(&[]);
            assert!(receiver.on_message(Message::Pong).is_err());
            receiver
        },
        &[],
    ),
];

/// Gives every message to every stage: what has a place is taken, what has none is an error that ends the conversation.
fn each_in_each<T, E: std::fmt::Debug>(
    stages: &[Stage<T>],
    mut take: impl FnMut(&mut T, Message) -> Res<E>,
    late: &[(&str, &str, Code)],
) {
    for (stage, make, legal) in stages {
        for message in one_of_each() {
            let what = word(&message);
            let mut half = make();
            let outcome = take(&mut half, message);
            if legal.contains(&what) {
                assert!(outcome.is_ok(), "{what} in stage {stage}: {outcome:?}");
                continue;
            }
            let expected = match late.iter().find(|(at, of, _)| at == stage && *of == what) {
                Some((_, _, code)) => *code,
                None if what == "Refused" && !legal.is_empty() => Code::GroupBusy,
                // Greeted has no message of its own, but it is not over: a refusal is still heard.
                None if what == "Refused" && *stage == "greeted" => Code::GroupBusy,
                None => Code::ProtocolError,
            };
            assert_eq!(code(outcome), expected, "{what} in stage {stage}");
            for message in one_of_each() {
                let after = word(&message);
                assert_eq!(code(take(&mut half, message)), Code::ProtocolError, "{after} after {what} in stage {stage}");
            }
        }
    }
}

#[test]
fn the_sender_takes_each_message_only_in_its_place() {
    each_in_each(SENDER_STAGES, Sender::on_message, &[]);
}

#[test]
fn the_receiver_takes_each_message_only_in_its_place() {
    let late = [
        ("adopted", "End", Code::Corrupt),
        ("committed", "Begin", Code::ChainBroken),
        ("open, a direct one", "Begin", Code::ProtocolError),
    ];
    each_in_each(RECEIVER_STAGES, Receiver::on_message, &late);
}

#[test]
fn the_sender_says_only_what_has_a_place() {
    type Say = (&'static str, fn(&mut Sender) -> Res<()>, &'static [&'static str]);
    const READY: &[&str] = &["ready", "ready, digests asked for"];
    let sayings: &[Say] = &[
        ("define", |s| s.define(vec![]).map(drop), READY),
        ("begin", |s| s.begin(NEXT, Landing::Journal, 9).map(drop), READY),
        ("chunks", |s| s.chunks(vec![1]).map(drop), &["open", "open, a segment asked for"]),
        ("segment", |s| s.segment().map(drop), &["open, a segment asked for"]),
        ("end", |s| s.end(CUT_AT).map(drop), &["open", "open, a segment asked for"]),
        (
            "digests",
            |s| s.want_digests(0, 0, 1).map(drop),
            &["ready", "ready, digests asked for", "open", "open, a segment asked for"],
        ),
        ("resume", |s| s.resume(NEXT, &mut std::iter::empty()).map(drop), &[]),
    ];
    for (what, say, legal) in sayings {
        for (stage, make, _) in SENDER_STAGES {
            let outcome = say(&mut make());
            assert_eq!(outcome.is_ok(), legal.contains(stage), "{what} in stage {stage}: {outcome:?}");
        }
    }
}

#[test]
fn a_whole_generation_goes_across_and_the_receipt_names_it() {
    let (mut sender, mut receiver) = (replicating(), receiving(&[]));
    let sent = sender.begin(NEXT, Landing::Journal, 500).unwrap();
    assert_eq!(
        receiver.on_message(sent).unwrap(),
        ReceiverAction::Begin {
            position: NEXT,
            parent: TIP,
            parent_digest: TIP_DIGEST,
            landing: Landing::Journal,
            payload_max_bytes: 500
        }
    );
    for piece in [&b"abc"[..], b"defg"] {
        let sent = sender.chunks(piece.to_vec()).unwrap();
        assert_eq!(receiver.on_message(sent).unwrap(), ReceiverAction::Store { bytes: piece.to_vec() });
    }
    assert_eq!(sender.credit_bytes(), CREDIT - 7);
    sender.on_message(receiver.stored(7)).unwrap();
    assert_eq!(sender.credit_bytes(), CREDIT);
    let (digest, sent) = sender.end(CUT_AT).unwrap();
    assert_eq!(digest, sealed_digest(b"abcdefg"));
    let payload_digest = payload_digest(b"abcdefg");
    assert_eq!(
        receiver.on_message(sent).unwrap(),
        ReceiverAction::Commit { position: NEXT, payload_bytes: 7, payload_digest, digest, cut_at: CUT_AT }
    );
    let answer = receiver.committed(&Proof(NEXT, digest)).unwrap();
    let SenderEvent::Committed(receipt) = sender.on_message(answer).unwrap() else { panic!("no receipt") };
    assert_eq!((receipt.position(), receipt.digest()), (NEXT, digest));
    // The tip has moved on, on both sides alike.
    let after = Position { epoch: EPOCH, generation: 43 };
    assert_eq!(code(sender.begin(NEXT, Landing::Journal, 1)), Code::ChainBroken);
    let sent = sender.begin(after, Landing::Journal, 1).unwrap();
    assert!(matches!(receiver.on_message(sent).unwrap(), ReceiverAction::Begin { parent: NEXT, .. }));
}

#[test]
fn a_first_sync_has_segments_and_one_digest_over_all_of_them() {
    let (mut sender, mut receiver) = (sender(Purpose::Replicate, empty()), receiver(Purpose::Replicate, empty()));
    receiver.on_message(sender.begin(FIRST, Landing::Direct, 500).unwrap()).unwrap();
    for number in 1..=3u64 {
        receiver.on_message(sender.chunks(vec![number as u8; 10]).unwrap()).unwrap();
        let (said, message) = sender.segment().unwrap();
        assert_eq!(said, number);
        assert_eq!(receiver.on_message(message).unwrap(), ReceiverAction::Segment { number });
        assert_eq!(sender.on_message(Message::SegmentDone { number }).unwrap(), SenderEvent::SegmentDone { number });
    }
    let (digest, message) = sender.end(CUT_AT).unwrap();
    let ReceiverAction::Commit { digest: theirs, payload_bytes: 30, .. } = receiver.on_message(message).unwrap() else {
        panic!("no commit")
    };
    assert_eq!(digest, theirs);
    assert!(receiver.into_open().is_none());
}

#[test]
fn segments_are_counted() {
    for wrong in [0, 2, u64::MAX] {
        assert_eq!(code(first_sync().on_message(Message::Segment { number: wrong })), Code::ProtocolError);
        let mut sender = sender(Purpose::Replicate, empty());
        sender.begin(FIRST, Landing::Direct, 500).unwrap();
        sender.segment().unwrap();
        assert_eq!(code(sender.on_message(Message::SegmentDone { number: wrong })), Code::ProtocolError);
    }
    // A commit cannot overtake a segment.
    let mut sender = sender(Purpose::Replicate, empty());
    sender.begin(FIRST, Landing::Direct, 500).unwrap();
    sender.segment().unwrap();
    let (digest, _) = sender.end(CUT_AT).unwrap();
    assert_eq!(code(sender.on_message(Message::Committed { position: FIRST, digest })), Code::ProtocolError);
}

#[test]
fn epochs_fence_and_roles_refuse() {
    use Code::{StaleEpoch, WrongRole};
    use Role::{Fenced, Primary, Promoting, Standby};
    // Role and epoch of the receiver, epoch of the hello, and the refusal.
    let cases = [
        (Standby, 3, 3, None),
        (Standby, 3, 4, None),
        (Standby, 3, 2, Some(StaleEpoch)),
        (Primary, 3, 2, Some(StaleEpoch)),
        (Primary, 3, 3, Some(WrongRole)),
        (Primary, 3, 4, Some(WrongRole)),
        (Promoting, 3, 2, Some(StaleEpoch)),
        (Promoting, 3, 3, Some(WrongRole)),
        (Fenced, 3, 4, Some(WrongRole)),
        (Fenced, 3, 2, Some(StaleEpoch)),
    ];
    for (role, ours, theirs, refusal) in cases {
        for purpose in [Purpose::Replicate, Purpose::Images, Purpose::Ask] {
            let standing = Standing { role, epoch: ours, ..standing() };
            let mut receiver = Receiver::new("lyon");
            receiver.on_message(hello(purpose, theirs)).unwrap();
            let answer = receiver.welcome(standing.clone(), CREDIT);
            let refusal = refusal.filter(|_| purpose != Purpose::Ask);
            match &answer {
                Message::Refused { fault } => assert_eq!(Some(fault.code), refusal, "{role:?} {ours} {theirs}"),
                Message::Welcome { standing: said, .. } => {
                    assert!(refusal.is_none() && *said == standing, "{role:?} {ours} {theirs}")
                }
                other => panic!("{other:?}"),
            }
            assert_eq!(receiver.on_message(Message::Ping).is_ok(), refusal.is_none(), "nothing is taken after a refusal");
            // A sender that is welcomed all the same draws the same conclusion by itself.
            let (mut sender, _) = Sender::new("paris", purpose, GROUP, theirs);
            assert_eq!(sender.on_message(welcome(standing)).err().map(|fault| fault.code), refusal);
        }
    }
}

#[test]
fn another_version_is_named_on_both_sides() {
    let mut receiver = Receiver::new("lyon");
    let fault = receiver
        .on_message(Message::Hello { protocol: 9, host: "paris".into(), purpose: Purpose::Ask, group: GROUP, epoch: 1 })
        .unwrap_err();
    assert!(
        fault.code == Code::VersionMismatch && fault.cause.contains("version 9") && fault.cause.contains("version 1"),
        "{fault}"
    );
    let (mut sender, _) = Sender::new("paris", Purpose::Ask, GROUP, EPOCH);
    let answer = Message::Welcome { protocol: 9, host: "lyon".into(), standing: standing(), credit_bytes: 0 };
    assert_eq!(code(sender.on_message(answer)), Code::VersionMismatch);
}

#[test]
fn sector_records_are_agreed_on_in_the_greeting() {
    for (made, version) in [
        (Sender::new("paris", Purpose::Replicate, GROUP, EPOCH), PROTOCOL),
        (Sender::with_sectors("paris", GROUP, EPOCH), PROTOCOL_SECTORS),
    ] {
        let (mut sender, hello) = made;
        assert_eq!(
            hello,
            Message::Hello { protocol: version, host: "paris".into(), purpose: Purpose::Replicate, group: GROUP, epoch: EPOCH }
        );
        let mut receiver = Receiver::new("lyon");
        receiver.on_message(hello).unwrap();
        let answer = receiver.welcome(standing(), CREDIT);
        assert!(matches!(answer, Message::Welcome { protocol, .. } if protocol == version), "{answer:?}");
        assert!(matches!(sender.on_message(answer), Ok(SenderEvent::Welcome { .. })));
        assert_eq!(sender.sectors(), version == PROTOCOL_SECTORS);
    }
    // Half an agreement is none: a welcome of the other version, either way.
    let (mut sender, _) = Sender::with_sectors("paris", GROUP, EPOCH);
    assert_eq!(code(sender.on_message(welcome(standing()))), Code::VersionMismatch);
    let (mut sender, _) = Sender::new("paris", Purpose::Replicate, GROUP, EPOCH);
    let answer = Message::Welcome { protocol: PROTOCOL_SECTORS, host: "lyon".into(), standing: standing(), credit_bytes: 0 };
    assert_eq!(code(sender.on_message(answer)), Code::VersionMismatch);
    for unknown in [0, 3] {
        let hello = Message::Hello { protocol: unknown, host: "paris".into(), purpose: Purpose::Ask, group: GROUP, epoch: 1 };
        assert_eq!(code(Receiver::new("lyon").on_message(hello)), Code::VersionMismatch);
    }
}

/// An older standby knows version 1 only, and says so in its own words: the primary says what it means here. It stays able to
/// replicate without sector records.
#[test]
fn a_standby_that_knows_no_sector_records_is_named() {
    let theirs = crate::format::version_mismatch(PROTOCOL_SECTORS);
    let (mut sender, _) = Sender::with_sectors("paris", GROUP, EPOCH);
    let fault = sender.on_message(Message::Refused { fault: theirs.clone() }).unwrap_err();
    assert!(
        fault.code == Code::VersionMismatch && fault.to_string().contains("standby") && fault.cause.contains("sectors"),
        "{fault}"
    );
    assert!(sender.on_message(welcome(standing())).is_err(), "the conversation has ended");
    // Any other refusal, and the same one of another conversation, is told as it came.
    let (mut sender, _) = Sender::with_sectors("paris", GROUP, EPOCH);
    assert_eq!(sender.on_message(Message::Refused { fault: crate::session::stale(1, 2) }), Err(crate::session::stale(1, 2)));
    let (mut sender, _) = Sender::new("paris", Purpose::Replicate, GROUP, EPOCH);
    assert_eq!(sender.on_message(Message::Refused { fault: theirs.clone() }), Err(theirs));
}

#[test]
fn a_generation_that_does_not_follow_is_refused_by_both() {
    use Landing::{Direct, Journal};
    let at = |epoch, generation| Position { epoch, generation };
    let cases = [
        ("another parent", begin(NEXT, at(2, 40), TIP_DIGEST, Journal), Code::ChainBroken),
        ("the parent's epoch", begin(NEXT, at(1, 41), TIP_DIGEST, Journal), Code::ChainBroken),
        ("another parent's digest", begin(NEXT, TIP, Digest([8; 32]), Journal), Code::ChainBroken),
        ("the same generation", begin(at(3, 41), TIP, TIP_DIGEST, Journal), Code::ChainBroken),
        ("one left out", begin(at(3, 43), TIP, TIP_DIGEST, Journal), Code::ChainBroken),
        ("an old epoch", begin(at(2, 42), TIP, TIP_DIGEST, Journal), Code::StaleEpoch),
        ("an epoch that was not said", begin(at(4, 42), TIP, TIP_DIGEST, Journal), Code::ProtocolError),
        ("over what is committed", begin(NEXT, TIP, TIP_DIGEST, Direct), Code::ProtocolError),
    ];
    for (what, message, expected) in cases {
        assert_eq!(code(receiving(&[]).on_message(message)), expected, "{what}");
    }
    for (position, landing, expected) in [
        (at(3, 41), Journal, Code::ChainBroken),
        (at(3, 43), Journal, Code::ChainBroken),
        (at(2, 42), Journal, Code::StaleEpoch),
        (at(4, 42), Journal, Code::ProtocolError),
        (NEXT, Direct, Code::Internal),
    ] {
        let mut sender = replicating();
        assert_eq!(code(sender.begin(position, landing, 1)), expected, "{position}");
        assert!(sender.begin(NEXT, Journal, 1).is_ok(), "nothing has changed by the error");
    }
    // The last generation there can be has no successor: no wrap to 0.
    let last = Standing { tip: at(3, u64::MAX), ..standing() };
    let mut receiver = receiver(Purpose::Replicate, last);
    assert_eq!(code(receiver.on_message(begin(at(3, 0), at(3, u64::MAX), TIP_DIGEST, Journal))), Code::ChainBroken);
}

#[test]
fn credit_bounds_what_is_in_flight_on_both_sides() {
    let mut sender = replicating();
    sender.begin(NEXT, Landing::Journal, 5000).unwrap();
    sender.chunks(vec![1; 1000]).unwrap();
    assert_eq!(code(sender.chunks(vec![1; 1])), Code::Internal);
    sender.on_message(Message::Credit { bytes: 10 }).unwrap();
    assert_eq!(code(sender.chunks(vec![1; 11])), Code::Internal);
    sender.chunks(vec![1; 10]).unwrap();
    assert_eq!(
        code(sender.on_message(Message::Credit { bytes: u64::MAX }).and(sender.on_message(Message::Credit { bytes: 1 }))),
        Code::ProtocolError
    );

    let begin = || Message::Begin {
        position: NEXT,
        parent: TIP,
        parent_digest: TIP_DIGEST,
        landing: Landing::Journal,
        payload_max_bytes: 5000,
    };
    assert_eq!(code(receiving(&[begin()]).on_message(chunks(&[1; 1001]))), Code::ProtocolError);
    let mut receiver = receiving(&[begin(), chunks(&[1; 1000])]);
    assert_eq!(receiver.stored(300), Message::Credit { bytes: 300 });
    assert_eq!(receiver.stored(900), Message::Credit { bytes: 700 }, "never more than came");
    assert_eq!(receiver.stored(1), Message::Credit { bytes: 0 });
    receiver.on_message(chunks(&[1; 1000])).unwrap();
    assert_eq!(code(receiver.on_message(chunks(&[1; 1]))), Code::ProtocolError);
}

#[test]
fn a_payload_has_the_announced_length_at_most_and_no_empty_pieces() {
    let mut sender = replicating();
    sender.begin(NEXT, Landing::Journal, 10).unwrap();
    for wrong in [0, 11] {
        assert_eq!(code(sender.chunks(vec![1; wrong])), Code::Internal);
    }
    assert_eq!(sender.credit_bytes(), CREDIT);
    sender.chunks(vec![1; 10]).unwrap();
    for wrong in [0, 501] {
        assert_eq!(code(receiving(&[begin_next()]).on_message(chunks(&vec![1; wrong]))), Code::ProtocolError);
    }
    let mut wide = Sender::new("paris", Purpose::Replicate, GROUP, EPOCH).0;
    wide.on_message(Message::Welcome { protocol: PROTOCOL, host: "lyon".into(), standing: standing(), credit_bytes: 1 << 40 })
        .unwrap();
    wide.begin(NEXT, Landing::Journal, 1 << 40).unwrap();
    assert_eq!(code(wide.chunks(vec![1; FRAME_PAYLOAD_MAX + 1])), Code::Internal);
    assert!(wide.chunks(vec![1; FRAME_PAYLOAD_MAX]).is_ok());
    assert_eq!(code(replicating().define(vec![b' '; (1 << 20) + 1])), Code::BadArgument);
}

#[test]
fn an_end_that_does_not_match_what_came_drops_the_transfer() {
    for wrong in
        [end(b"abd"), end(b"abcd"), Message::End { payload_bytes: 4, payload_digest: payload_digest(b"abc"), cut_at: CUT_AT }]
    {
        let mut receiver = receiving(&[begin_next(), chunks(b"abc")]);
        assert_eq!(code(receiver.on_message(wrong)), Code::Corrupt);
        assert!(receiver.into_open().is_none(), "nothing of it may be resumed");
    }
}

#[test]
fn a_receipt_for_something_else_is_no_receipt() {
    let ended = || {
        let mut sender = replicating();
        sender.begin(NEXT, Landing::Journal, 500).unwrap();
        sender.chunks(b"abc".to_vec()).unwrap();
        sender.end(CUT_AT).unwrap();
        sender
    };
    let right = sealed_digest(b"abc");
    assert!(ended().on_message(Message::Committed { position: NEXT, digest: right }).is_ok());
    assert_eq!(code(ended().on_message(Message::Committed { position: NEXT, digest: sealed_digest(b"abd") })), Code::Corrupt);
    for position in [TIP, Position { epoch: 4, generation: 42 }, Position { epoch: 3, generation: 43 }] {
        assert_eq!(code(ended().on_message(Message::Committed { position, digest: right })), Code::ProtocolError);
    }
}

#[test]
fn only_what_is_sealed_and_was_asked_for_is_acknowledged() {
    let digest = sealed_digest(b"");
    for proof in [Proof(TIP, digest), Proof(NEXT, TIP_DIGEST)] {
        let mut receiver = receiving(&[begin_next(), end(b"")]);
        assert_eq!(code(receiver.committed(&proof)), Code::Internal);
        assert!(receiver.on_message(Message::Ping).is_err());
    }
    for mut receiver in [receiving(&[]), receiving(&[begin_next()]), Receiver::new("lyon")] {
        assert_eq!(code(receiver.committed(&Proof(NEXT, digest))), Code::Internal);
    }
    let mut receiver = receiving(&[begin_next(), end(b"")]);
    receiver.committed(&Proof(NEXT, digest)).unwrap();
    assert_eq!(code(receiver.committed(&Proof(NEXT, digest))), Code::Internal, "once only");
}

#[test]
fn a_lost_receipt_is_found_in_the_next_welcome() {
    let tip = Standing { tip: NEXT, tip_digest: sealed_digest(b"abc"), ..standing() };
    let receipt = sender(Purpose::Replicate, tip.clone()).settled(NEXT, sealed_digest(b"abc")).unwrap();
    assert_eq!((receipt.position(), receipt.digest()), (NEXT, sealed_digest(b"abc")));
    assert_eq!(sender(Purpose::Replicate, tip.clone()).settled(NEXT, sealed_digest(b"abd")), None);
    assert_eq!(sender(Purpose::Replicate, tip.clone()).settled(TIP, sealed_digest(b"abc")), None);
    assert_eq!(sender(Purpose::Ask, tip.clone()).settled(NEXT, sealed_digest(b"abc")), None);
    assert_eq!(Sender::new("paris", Purpose::Replicate, GROUP, EPOCH).0.settled(Position::default(), Digest::default()), None);
    assert_eq!(sender(Purpose::Replicate, empty()).settled(Position::default(), Digest::default()), None);
    let mut refused = sender(Purpose::Replicate, tip);
    refused.on_message(Message::Defined).unwrap_err();
    assert_eq!(refused.settled(NEXT, sealed_digest(b"abc")), None);
}

#[test]
fn a_broken_transfer_goes_on_where_it_stood() {
    let (mut receiver, answer) = adopting(left_open(b"abcdef"), Standing { open: Some((NEXT, 6)), ..standing() });
    let (mut sender, _) = Sender::new("paris", Purpose::Replicate, GROUP, EPOCH);
    let SenderEvent::Welcome { standing, .. } = sender.on_message(answer).unwrap() else { panic!("no welcome") };
    assert_eq!(standing.open, Some((NEXT, 6)));
    // The held prefix may be given in other pieces, but must be the held prefix.
    assert_eq!(code(sender.resume(NEXT, &mut [&b"abc"[..]].into_iter())), Code::Internal);
    assert_eq!(code(sender.resume(NEXT, &mut [&b"abc"[..], b"defg"].into_iter())), Code::Internal);
    let other = Position { epoch: EPOCH, generation: 43 };
    assert_eq!(code(sender.resume(other, &mut std::iter::empty())), Code::ChainBroken);
    sender.resume(NEXT, &mut [&b"ab"[..], b"", b"cdef"].into_iter()).unwrap();
    receiver.on_message(sender.chunks(b"ghi".to_vec()).unwrap()).unwrap();
    let (digest, message) = sender.end(CUT_AT).unwrap();
    assert_eq!(digest, sealed_digest(b"abcdefghi"));
    assert!(matches!(receiver.on_message(message).unwrap(), ReceiverAction::Commit { digest: theirs, .. } if theirs == digest));
}

/// The standby holds a beginning of a payload that was given up, and the primary takes it for that of another one of the same
/// position. Position and count agree, so both go on; nothing of it may be committed.
#[test]
fn a_beginning_of_another_payload_is_never_committed() {
    let (mut receiver, answer) = adopting(left_open(b"abcdef"), Standing { open: Some((NEXT, 6)), ..standing() });
    let (mut sender, _) = Sender::new("paris", Purpose::Replicate, GROUP, EPOCH);
    sender.on_message(answer).unwrap();
    sender.resume(NEXT, &mut [&b"ABCDEF"[..]].into_iter()).unwrap();
    receiver.on_message(sender.chunks(b"ghi".to_vec()).unwrap()).unwrap();
    let (_, message) = sender.end(CUT_AT).unwrap();
    assert_eq!(code(receiver.on_message(message)), Code::Corrupt);
    assert!(receiver.into_open().is_none(), "the next try begins afresh");
}

#[test]
fn what_was_left_open_is_resumed_only_where_it_fits() {
    let fits = Standing { open: Some((NEXT, 6)), ..standing() };
    let cases = [
        ("the journal holds less", Standing { open: Some((NEXT, 5)), ..standing() }),
        ("the journal holds nothing", Standing { open: None, ..standing() }),
        ("the journal holds another", Standing { open: Some((FIRST, 6)), ..standing() }),
        ("the tip moved on", Standing { tip: NEXT, ..fits.clone() }),
        ("the tip is another", Standing { tip_digest: Digest([1; 32]), ..fits.clone() }),
    ];
    for (what, standing) in cases {
        let (mut receiver, answer) = adopting(left_open(b"abcdef"), standing);
        assert!(matches!(answer, Message::Welcome { standing: Standing { open: None, .. }, .. }), "{what}");
        assert!(receiver.on_message(chunks(b"x")).is_err(), "{what}");
    }
    for (group, epoch) in [(Uuid([8; 16]), EPOCH), (GROUP, EPOCH + 1)] {
        let mut receiver = Receiver::new("lyon");
        receiver
            .on_message(Message::Hello { protocol: PROTOCOL, host: "paris".into(), purpose: Purpose::Replicate, group, epoch })
            .unwrap();
        receiver.adopt(left_open(b"abcdef"));
        assert!(matches!(receiver.welcome(fits.clone(), 1), Message::Welcome { standing: Standing { open: None, .. }, .. }));
    }
    // What the journal holds without anybody who kept its hash cannot be resumed either.
    let mut receiver = Receiver::new("lyon");
    receiver.on_message(hello(Purpose::Replicate, EPOCH)).unwrap();
    assert!(matches!(receiver.welcome(fits, 1), Message::Welcome { standing: Standing { open: None, .. }, .. }));
}

#[test]
fn what_is_left_open_is_kept_through_breaks_and_polite_endings_only() {
    assert_eq!(left_open(b"abcdef").bytes(), 6);
    assert_eq!((left_open(b"a").position(), left_open(b"a").group()), (NEXT, GROUP));
    let mut polite = receiving(&[begin_next(), chunks(b"abc")]);
    polite.on_message(one_of_each().pop().unwrap()).unwrap_err();
    assert_eq!(polite.into_open().map(|open| open.bytes()), Some(3));
    let mut rude = receiving(&[begin_next(), chunks(b"abc")]);
    rude.on_message(Message::Pong).unwrap_err();
    assert!(rude.into_open().is_none());
    assert!(first_sync().into_open().is_none(), "a direct one is found by comparing");
    assert!(receiving(&[begin_next(), end(b"")]).into_open().is_none());
    assert!(receiving(&[begin_next(), Message::Abort { reason: String::new() }]).into_open().is_none());
    // Untouched in a second connection, it is there for the third.
    let (receiver, _) = adopting(left_open(b"abc"), Standing { open: Some((NEXT, 3)), ..standing() });
    assert_eq!(receiver.into_open().map(|open| open.bytes()), Some(3));
    // Begun afresh, it is not.
    let (mut receiver, _) = adopting(left_open(b"abc"), Standing { open: Some((NEXT, 3)), ..standing() });
    receiver.on_message(begin_next()).unwrap();
    assert_eq!(receiver.into_open().map(|open| open.bytes()), Some(0));
}

#[test]
fn an_abort_lets_both_begin_afresh() {
    let (mut sender, mut receiver) = (replicating(), receiving(&[]));
    receiver.on_message(sender.begin(NEXT, Landing::Journal, 500).unwrap()).unwrap();
    receiver.on_message(sender.chunks(b"abc".to_vec()).unwrap()).unwrap();
    let action = receiver.on_message(sender.abort("the cut was not exact")).unwrap();
    assert_eq!(action, ReceiverAction::Drop { reason: "the cut was not exact".into() });
    receiver.on_message(sender.begin(NEXT, Landing::Journal, 500).unwrap()).unwrap();
    receiver.on_message(sender.chunks(b"xyz".to_vec()).unwrap()).unwrap();
    let (digest, message) = sender.end(CUT_AT).unwrap();
    assert_eq!(digest, sealed_digest(b"xyz"), "nothing of the first try is in it");
    assert!(receiver.on_message(message).is_ok());
    // A beginning of another connection can be given up too.
    let held = Standing { open: Some((NEXT, 3)), ..standing() };
    let (mut receiver, answer) = adopting(left_open(b"abc"), held);
    let (mut sender, _) = Sender::new("paris", Purpose::Replicate, GROUP, EPOCH);
    sender.on_message(answer).unwrap();
    assert!(matches!(receiver.on_message(sender.abort("stale")).unwrap(), ReceiverAction::Drop { .. }));
    assert!(sender.begin(NEXT, Landing::Journal, 1).is_ok());
}

#[test]
fn digests_come_in_the_order_in_which_they_were_asked_for() {
    let digests = |volume, start, blocks: usize| Message::Digests { volume, start, digests: vec![1; blocks * 16] };
    let asked = || {
        let mut sender = replicating();
        sender.want_digests(1, 10, 10).unwrap();
        sender.want_digests(0, 0, 5).unwrap();
        sender
    };
    let mut sender = asked();
    for message in [
        digests(1, 10, 2),
        digests(1, 15, 5),
        Message::DigestsDone { volume: 1 },
        digests(0, 4, 1),
        Message::DigestsDone { volume: 0 },
    ] {
        sender.on_message(message).unwrap();
    }
    assert_eq!(code(sender.on_message(digests(0, 0, 1))), Code::ProtocolError);
    for wrong in [
        digests(0, 0, 1),
        digests(1, 9, 1),
        digests(1, 19, 2),
        digests(1, u64::MAX, 1),
        digests(1, 12, 0),
        Message::DigestsDone { volume: 0 },
    ] {
        assert_eq!(code(asked().on_message(wrong)), Code::ProtocolError);
    }
    let mut sender = asked();
    sender.on_message(digests(1, 12, 2)).unwrap();
    assert_eq!(code(sender.on_message(digests(1, 13, 1))), Code::ProtocolError, "not twice");
    for (start, count) in [(0, 0), (u64::MAX, 1), (1, u64::MAX)] {
        assert_eq!(code(replicating().want_digests(0, start, count)), Code::Internal);
        assert_eq!(code(receiving(&[]).on_message(Message::DigestsWanted { volume: 0, start, count })), Code::ProtocolError);
    }
    let mut sender = replicating();
    (0..64).for_each(|_| drop(sender.want_digests(0, 0, 1).unwrap()));
    assert_eq!(code(sender.want_digests(0, 0, 1)), Code::Internal, "what may be asked for at once is bounded");
}

#[test]
fn an_image_has_no_more_bytes_than_were_offered() {
    let offer = one_of_each()[15].clone();
    let piece = |len| Message::ImageBytes { bytes: vec![1; len] };
    let mut receiver = receiver(Purpose::Images, standing());
    for message in [offer.clone(), offer.clone(), piece(60), piece(40), Message::ImageEnd, offer.clone(), Message::ImageEnd] {
        assert_eq!(receiver.on_message(message.clone()).unwrap(), ReceiverAction::Image(message));
    }
    assert_eq!(code(receiver.on_message(piece(1))), Code::ProtocolError);
    for wrong in [0, 101] {
        let mut receiver = self::receiver(Purpose::Images, standing());
        receiver.on_message(offer.clone()).unwrap();
        assert_eq!(code(receiver.on_message(piece(wrong))), Code::ProtocolError);
    }
}

#[test]
fn a_welcome_is_given_once_and_only_to_a_hello() {
    let mut receiver = Receiver::new("lyon");
    assert!(matches!(receiver.welcome(standing(), 1), Message::Refused { fault } if fault.code == Code::Internal));
    assert!(receiver.on_message(hello(Purpose::Ask, 1)).is_err());
    let mut receiver = receiving(&[begin_next()]);
    assert!(matches!(receiver.welcome(standing(), 1), Message::Refused { .. }));
}
