//! The room's own tests: against a plain model, on real files, and with what a peer might send. Crashes: `tests/crash_journal.rs`.

use super::*;
use crate::delta::{encode, encode_sectors};
use crate::durable::FileStorage;
use crate::durable::double::{Dice, World};
use crate::journal::double::WorldOverflow;
use crate::model::{BLOCK_BYTES, BlockRun, FileSystem};
use proptest::prelude::*;

const GROUP: GroupId = Uuid([4; 16]);

fn volumes() -> Vec<VolumeSpec> {
    vec![VolumeSpec {
        id: Uuid([1; 16]),
        name: "v".into(),
        size_bytes: 1 << 30,
        fs: FileSystem::Xfs,
        mount_options: String::new(),
    }]
}

fn records(blocks: &[u64], seed: u64) -> Vec<u8> {
    let (mut out, mut dice) = (Vec::new(), Dice::new(seed));
    for (n, count) in blocks.iter().enumerate() {
        let plain: Vec<u8> = (0..count * BLOCK_BYTES).map(|_| dice.roll() as u8).collect();
        encode(0, BlockRun { start: n as u64 * 64, count: *count }, &plain, &mut out);
        // Some of the same blocks' sectors, zero or not.
        let part = &plain[..512 * (1 + n % 3)];
        encode_sectors(0, n as u64 * 512 + 3, if n % 2 == 0 { part } else { &[0; 1024] }, true, &mut out);
    }
    out
}

fn hash(bytes: &[u8]) -> Digest {
    Digest(*blake3::hash(bytes).as_bytes())
}

fn open_world(world: &World, blocks: u64, applied: Position) -> (Journal, Recovered) {
    let ring = Box::new(world.disk("ring", (4 + blocks) * BLOCK));
    Journal::open(GROUP, ring, Box::new(WorldOverflow(world.clone())), applied).unwrap()
}

fn next(journal: &Journal) -> Position {
    Position { epoch: 1, generation: journal.tip().0.generation + 1 }
}

fn send(journal: &mut Journal, payload: &[u8], announced: u64) -> Res<Sealed> {
    let (parent, parent_digest) = journal.tip();
    journal.begin(next(journal), parent, parent_digest, announced)?;
    journal.append(payload, &volumes())?;
    journal.seal(payload.len() as u64, hash(payload), hash(&[&parent_digest.0, payload].concat()), Moment(5))
}

fn bytes_of(journal: &Journal, sealed: &Sealed) -> Res<Vec<u8>> {
    let mut bytes = Vec::new();
    journal.read(sealed, &mut |piece| {
        assert!(!piece.is_empty() && piece.len() <= PIECE_BYTES && whole_records(piece) == Some(piece.len()));
        bytes.extend_from_slice(piece);
        Ok(())
    })?;
    Ok(bytes)
}

#[test]
fn a_journal_can_be_handed_to_another_thread() {
    fn is_send<T: Send>() {}
    is_send::<Journal>();
}

#[derive(Clone, Debug)]
enum Act {
    Send { blocks: Vec<u64>, slack: u64 },
    Abandon(Vec<u64>),
    ReleaseOldest,
    ReleaseAll,
    Restart,
}

fn act() -> impl Strategy<Value = Act> {
    let blocks = || prop::collection::vec(1u64..4, 0..5);
    prop_oneof![
        5 => (blocks(), 0u64..30_000).prop_map(|(blocks, slack)| Act::Send { blocks, slack }),
        1 => blocks().prop_map(Act::Abandon),
        4 => Just(Act::ReleaseOldest),
        1 => Just(Act::ReleaseAll),
        1 => Just(Act::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// A plain list of payloads is the model; the ring has room for 6 to 40 blocks, so that it wraps and overflows all the time.
    #[test]
    fn behaves_like_a_list_of_payloads(acts in prop::collection::vec(act(), 1..40), blocks in 6u64..40) {
        let world = World::new();
        let (mut journal, _) = open_world(&world, blocks, Position::default());
        let mut list: Vec<(Sealed, Vec<u8>)> = Vec::new();
        let mut applied = Position::default();
        for (seed, act) in acts.into_iter().enumerate() {
            match act {
                Act::Send { blocks, slack } => {
                    let payload = records(&blocks, seed as u64);
                    let sealed = send(&mut journal, &payload, payload.len() as u64 + slack).unwrap();
                    list.push((sealed, payload));
                }
                Act::Abandon(blocks) => {
                    let payload = records(&blocks, seed as u64);
                    let (parent, digest) = journal.tip();
                    journal.begin(next(&journal), parent, digest, payload.len() as u64).unwrap();
                    journal.append(&payload, &volumes()).unwrap();
                    prop_assert_eq!(journal.open_generation(), Some((next(&journal), payload.len() as u64)));
                    journal.abandon().unwrap();
                    prop_assert_eq!(journal.open_generation(), None);
                }
                Act::ReleaseOldest if !list.is_empty() => {
                    applied = list.remove(0).0.position();
                    journal.release(applied).unwrap();
                }
                Act::ReleaseAll => {
                    applied = journal.tip().0;
                    journal.release(applied).unwrap();
                    list.clear();
                    prop_assert_eq!(journal.fill().0, 0);
                }
                Act::ReleaseOldest => {}
                Act::Restart => {
                    let recovered;
                    (journal, recovered) = open_world(&world, blocks, applied);
                    prop_assert_eq!(&recovered.sealed, &list.iter().map(|(sealed, _)| sealed.clone()).collect::<Vec<_>>());
                    prop_assert!(recovered.dropped.is_empty() && recovered.corrupt.is_none() && !recovered.flush_not_kept);
                }
            }
            for (sealed, payload) in &list {
                prop_assert_eq!(&bytes_of(&journal, sealed).unwrap(), payload);
            }
            let (used, all) = journal.fill();
            prop_assert!(used <= all && all == blocks * BLOCK);
            let files = world.names().iter().filter(|name| name.starts_with("overflow")).count();
            prop_assert!(files <= list.len(), "{files} overflow files for {} generations", list.len());
        }
    }
}

#[test]
fn large_generations_go_through_real_files_in_pieces() {
    let dir = tempfile::tempdir().unwrap();
    let open = |applied| {
        let ring = FileStorage::open_or_create(&dir.path().join("ring"), 4 << 20).unwrap().0;
        let overflow = DirOverflow::open(&dir.path().join("overflow")).unwrap();
        Journal::open(GROUP, Box::new(ring), Box::new(overflow), applied).unwrap()
    };
    let files = || std::fs::read_dir(dir.path().join("overflow")).unwrap().count();
    let (mut journal, _) = open(Position::default());
    // One in the ring, one too large for it, and one after it; sizes that end within a piece and within a block.
    let payloads: Vec<Vec<u8>> = [12u64, 30, 5].map(|count| records(&vec![64; count as usize], count)).into();
    let sealed: Vec<Sealed> = payloads.iter().map(|payload| send(&mut journal, payload, payload.len() as u64).unwrap()).collect();
    assert_eq!(files(), 2, "the second is larger than the ring, the third has no room beside the first");
    drop(journal);
    let (mut journal, recovered) = open(Position::default());
    assert_eq!(recovered.sealed, sealed);
    for (sealed, payload) in sealed.iter().zip(&payloads) {
        assert!(bytes_of(&journal, sealed).unwrap() == *payload);
    }
    journal.release(sealed[1].position()).unwrap();
    assert_eq!(files(), 1);
    assert_eq!(bytes_of(&journal, &sealed[0]).unwrap_err().code, Code::NothingCommitted);
    let (mut journal, recovered) = open(sealed[1].position());
    assert_eq!(recovered.sealed, sealed[2..]);
    journal.release(sealed[2].position()).unwrap();
    assert_eq!(files(), 0);
}

#[test]
fn the_length_of_a_record_is_read_where_delta_writes_it() {
    let mut payload = records(&[1, 3, 64], 1);
    encode(0, BlockRun { start: 9, count: 2 }, &[0; 8192], &mut payload);
    encode(0, BlockRun { start: 9, count: 2 }, &[7; 8192], &mut payload);
    encode_sectors(0, 9, &[0; 8192], true, &mut payload);
    encode_sectors(0, 9, &[7; 1024], true, &mut payload);
    let (mut at, mut ends) = (0, vec![0]);
    while let Some(head) = head(&payload[at..], &volumes()).unwrap() {
        at += RECORD_HEADER_BYTES + head.stored_bytes as usize;
        ends.push(at);
    }
    assert_eq!(ends.len(), 11);
    for cut in 0..=payload.len() {
        assert_eq!(whole_records(&payload[..cut]), ends.iter().rev().find(|end| **end <= cut).copied());
    }
    assert_eq!(whole_records(&[0xff; 64]), None);
}

#[test]
fn what_a_peer_may_send_does_not_get_in() {
    let world = World::new();
    let (mut journal, _) = open_world(&world, 20, Position::default());
    let good = records(&[1, 2], 1);
    assert_eq!(journal.append(&good, &volumes()).unwrap_err().code, Code::ProtocolError, "nothing is open");
    let at = |epoch, generation| Position { epoch, generation };
    let none = (Position::default(), Digest::default());
    for (position, parent) in [(at(0, 0), at(0, 0)), (at(1, 1), at(1, 1)), (at(2, 1), at(1, 1)), (at(1, 2), at(2, 1))] {
        assert_eq!(journal.begin(position, parent, none.1, 10).unwrap_err().code, Code::ChainBroken, "{position} on {parent}");
    }
    assert_eq!(journal.begin(at(1, 1), none.0, none.1, u64::MAX).unwrap_err().code, Code::StandbyDiskFull);
    journal.begin(at(1, 1), none.0, none.1, good.len() as u64).unwrap();
    for byte in 0..good.len() {
        let mut bad = good.clone();
        bad[byte] ^= 1;
        assert!(journal.append(&bad, &volumes()).is_err(), "byte {byte}");
    }
    assert_eq!(journal.append(&good[..good.len() - 1], &volumes()).unwrap_err().code, Code::ProtocolError);
    assert_eq!(journal.append(&[&good[..], &good[..]].concat(), &volumes()).unwrap_err().code, Code::ProtocolError, "too long");
    // None of it left a trace; a broken link goes on where it stopped.
    assert_eq!(journal.open_generation(), Some((at(1, 1), 0)));
    let first = RECORD_HEADER_BYTES + BLOCK as usize;
    journal.append(&good[..first], &volumes()).unwrap();
    assert_eq!(journal.open_generation(), Some((at(1, 1), first as u64)));
    journal.append(&good[first..], &volumes()).unwrap();
    let sealed = journal.seal(good.len() as u64, hash(&good), hash(b"1"), Moment(1)).unwrap();
    assert_eq!(bytes_of(&journal, &sealed).unwrap(), good);
    // A digest or length that is not that of what arrived drops the generation.
    for (bytes, digest) in [(good.len() as u64, hash(b"other")), (1, hash(&good))] {
        journal.begin(at(1, 2), at(1, 1), hash(b"1"), good.len() as u64).unwrap();
        journal.append(&good, &volumes()).unwrap();
        assert_eq!(journal.seal(bytes, digest, hash(b"2"), Moment(1)).unwrap_err().code, Code::Corrupt);
        assert_eq!(journal.open_generation(), None);
    }
    assert_eq!(journal.begin(at(1, 2), at(1, 1), hash(b"another"), 10).unwrap_err().code, Code::ChainBroken);
    assert_eq!(journal.begin(at(1, 9), at(1, 8), hash(b"8"), 10).unwrap_err().code, Code::ChainBroken, "1/1 is not applied");
}

#[test]
fn after_a_direct_sync_the_chain_begins_where_it_ended() {
    let world = World::new();
    let (mut journal, _) = open_world(&world, 20, Position::default());
    let sealed = send(&mut journal, &records(&[1], 1), 5000).unwrap();
    journal.release(sealed.position()).unwrap();
    let synced = Position { epoch: 2, generation: 40 };
    let position = Position { epoch: 2, generation: 41 };
    journal.begin(position, synced, hash(b"synced"), 5000).unwrap();
    let payload = records(&[1], 2);
    journal.append(&payload, &volumes()).unwrap();
    let sealed = journal.seal(payload.len() as u64, hash(&payload), hash(b"41"), Moment(1)).unwrap();
    assert_eq!(sealed.parent(), (synced, hash(b"synced")));
    let (_, recovered) = open_world(&world, 20, synced);
    assert_eq!(recovered.sealed, [sealed]);
    // And if the ledger forgot about the sync, that is said.
    let (mut journal, recovered) = open_world(&world, 20, Position { epoch: 1, generation: 1 });
    assert_eq!(recovered.corrupt.unwrap().code, Code::Corrupt);
    assert_eq!(journal.begin(position, synced, hash(b"synced"), 10).unwrap_err().code, Code::Corrupt);
}

#[test]
fn another_group_or_length_or_a_ruined_ring_is_refused() {
    let world = World::new();
    drop(open_world(&world, 20, Position::default()));
    let over = || Box::new(WorldOverflow(world.clone()));
    let at = Position::default();
    let open = |group: GroupId, world: &World| {
        Journal::open(group, Box::new(world.disk("ring", 0)), over(), at).map(|_| ()).unwrap_err().code
    };
    assert_eq!(open(Uuid([5; 16]), &world), Code::IdentityChanged);
    let mut longer = crate::durable::double::Image::new(40 * BLOCK);
    let mut block = vec![0; (2 * BLOCK) as usize];
    world.disk("ring", 0).read_at(0, &mut block).unwrap();
    longer.write(0, &block);
    let grown = World::from_disks(&[("ring".to_string(), longer)].into());
    assert_eq!(open(GROUP, &grown), Code::IdentityChanged);
    world.rot("ring", 30, 1);
    drop(open_world(&world, 20, Position::default()));
    world.rot("ring", 30, 1);
    world.rot("ring", BLOCK + 30, 1);
    assert_eq!(open(GROUP, &world), Code::Corrupt);
    assert_eq!(Journal::open(GROUP, Box::new(world.disk("small", 6 * BLOCK)), over(), at).unwrap_err().code, Code::BadArgument);
}

#[test]
fn what_is_missing_stops_the_journal_until_it_is_given_up_by_name() {
    let world = World::new();
    let (mut journal, _) = open_world(&world, 40, Position::default());
    let sealed: Vec<Sealed> = (1..4).map(|n| send(&mut journal, &records(&[2], n), 9000).unwrap()).collect();
    // The second one's payload rots.
    let second = journal.held[1].extent().unwrap().0 + BLOCK + 100;
    world.rot("ring", second, 3);
    assert_eq!(bytes_of(&journal, &sealed[1]).unwrap_err().code, Code::Corrupt);
    let (mut journal, recovered) = open_world(&world, 40, Position::default());
    assert_eq!(recovered.sealed, sealed[..1], "the intact one before it can be had");
    let fault = recovered.corrupt.unwrap();
    assert!(fault.code == Code::Corrupt && fault.cause.contains("1/2"), "{fault}");
    assert_eq!(bytes_of(&journal, &sealed[0]).unwrap(), records(&[2], 1));
    assert_eq!(send(&mut journal, &[], 0).unwrap_err().code, Code::Corrupt);
    assert_eq!(journal.discard_corrupt().unwrap_err().code, Code::GroupBusy);
    journal.release(sealed[0].position()).unwrap();
    journal.discard_corrupt().unwrap();
    let again = send(&mut journal, &records(&[1], 9), 5000).unwrap();
    assert_eq!(again.position().generation, 2);
    let (_, recovered) = open_world(&world, 40, sealed[0].position());
    assert_eq!((recovered.sealed, recovered.corrupt), (vec![again], None));
}

#[test]
fn a_poisoned_journal_takes_nothing_until_it_is_opened_again() {
    let world = World::new();
    let (mut journal, _) = open_world(&world, 20, Position::default());
    let before = world.calls();
    let first = send(&mut journal, &records(&[1], 1), 5000).unwrap();
    // The same call of the next generation: its last flush (which a read follows) fails and forgets.
    world.plant(world.calls() + (world.calls() - before) - 2, crate::durable::double::Trouble::FailsAndForgets);
    assert_eq!(send(&mut journal, &records(&[1], 2), 5000).unwrap_err().code, Code::FlushFailed);
    for _ in 0..2 {
        assert_eq!(send(&mut journal, &records(&[1], 2), 5000).unwrap_err().code, Code::FlushFailed);
        assert_eq!(journal.release(first.position()).unwrap_err().code, Code::FlushFailed);
    }
    let (mut journal, recovered) = open_world(&world, 20, Position::default());
    assert_eq!(recovered.sealed, [first]);
    send(&mut journal, &records(&[1], 2), 5000).unwrap();
}
