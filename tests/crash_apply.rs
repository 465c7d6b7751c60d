//! Apply against a plain array of bytes, on disks in memory and on files, and with the power cut at every operation.

use doublure::apply::{Applied, apply, apply_direct, flush_replicas};
use doublure::delta::encode;
use doublure::device::double::RamDisk;
use doublure::device::{DeviceFile, engine};
use doublure::durable::double::{Dice, Trouble, World};
use doublure::format::generation_digest;
use doublure::journal::double::WorldOverflow;
use doublure::journal::{Journal, Sealed};
use doublure::ledger::{Ledger, Record, STORAGE_BYTES};
use doublure::model::{BLOCK_BYTES, BlockRun, Code, Digest, EngineKind, FileSystem, GroupSpec, Moment, Position};
use doublure::model::{Res, Role, SealedProof, Uuid, VolumeSpec};
use proptest::prelude::*;
use std::sync::Arc;

/// A volume of 80 blocks, and one whose last block is short.
const SIZES: [u64; 2] = [80 * BLOCK_BYTES, 40 * BLOCK_BYTES + 512];

fn spec() -> GroupSpec {
    let volume = |n: u8| VolumeSpec {
        id: Uuid([n; 16]),
        name: format!("v{n}"),
        size_bytes: SIZES[usize::from(n)],
        fs: FileSystem::Ext4,
        mount_options: String::new(),
    };
    GroupSpec { id: Uuid([3; 16]), name: "shop".into(), volumes: vec![volume(0), volume(1)], containers: vec![] }
}

/// (volume, start, count, what): what 0 = zeroes, odd = one byte throughout, even = noise.
type Change = (usize, u64, u64, u64);

/// Encodes changes, and makes them on plain arrays.
fn payload(changes: &[Change], plain: &mut [Vec<u8>; 2]) -> Vec<u8> {
    let mut out = Vec::new();
    for (volume, start, count, what) in changes {
        let blocks = SIZES[*volume].div_ceil(BLOCK_BYTES);
        let start = start % blocks;
        let run = BlockRun { start, count: (*count).clamp(1, 64).min(blocks - start) };
        let bytes = run.bytes(SIZES[*volume]);
        let mut dice = Dice::new(*what);
        let data: Vec<u8> = (0..bytes.len)
            .map(|_| match what {
                0 => 0,
                odd if odd % 2 == 1 => *odd as u8,
                _ => dice.roll() as u8,
            })
            .collect();
        encode(*volume as u16, run, &data, &mut out);
        plain[*volume][bytes.offset as usize..bytes.end() as usize].copy_from_slice(&data);
    }
    out
}

fn blank() -> [Vec<u8>; 2] {
    SIZES.map(|size| vec![0; size as usize])
}

struct Standby {
    world: World,
    journal: Journal,
    ledger: Ledger,
    disks: [Arc<RamDisk>; 2],
}

impl Standby {
    /// After a start: what the disks hold.
    fn start(world: World, disks: [Arc<RamDisk>; 2]) -> (Standby, Vec<Sealed>) {
        let (mut ledger, record) = Ledger::open(Box::new(world.disk("ledger", STORAGE_BYTES))).unwrap();
        if record.is_none() {
            let new = Record {
                role: Role::Standby,
                epoch: 1,
                spec: spec(),
                peer: "b".into(),
                committed: Position::default(),
                committed_digest: Digest::default(),
                committed_cut_at: Moment(0),
                applied: Position::default(),
                applied_digest: Digest::default(),
                applied_cut_at: Moment(0),
                syncing: false,
                images: Default::default(),
                last_failover: None,
            };
            let mut edit = |slot: &mut Option<Record>| {
                *slot = Some(new.clone());
                Ok(())
            };
            ledger.commit(&mut edit).unwrap();
        }
        let applied = ledger.record().unwrap().applied;
        let ring = Box::new(world.disk("ring", 1 << 20));
        let (journal, recovered) = Journal::open(spec().id, ring, Box::new(WorldOverflow(world.clone())), applied).unwrap();
        assert!(recovered.corrupt.is_none() && recovered.dropped.is_empty(), "{recovered:?}");
        (Standby { world, journal, ledger, disks }, recovered.sealed)
    }
    fn new() -> Standby {
        Standby::start(World::new(), SIZES.map(RamDisk::new)).0
    }
    fn replicas(&self) -> [DeviceFile; 2] {
        self.disks.each_ref().map(|disk| disk.open(true))
    }
    fn seal(&mut self, payload: &[u8]) -> Sealed {
        let (parent, parent_digest) = self.journal.tip();
        let position = Position { epoch: 1, generation: parent.generation + 1 };
        let payload_digest = Digest(*blake3::hash(payload).as_bytes());
        let (bytes, at) = (payload.len() as u64, Moment(position.generation));
        let digest = generation_digest(spec().id, position, parent, parent_digest, bytes, payload_digest, at);
        self.journal.begin(position, parent, parent_digest, bytes).unwrap();
        self.journal.append(payload, &spec().volumes).unwrap();
        self.journal.seal(bytes, payload_digest, digest, at).unwrap()
    }
    fn apply(&mut self, sealed: &Sealed) -> Res<Applied> {
        let replicas = self.replicas();
        let mut engine = engine(EngineKind::Pread, 4)?;
        apply(&self.journal, sealed, &spec(), &replicas, &mut *engine, &mut self.ledger)
    }
    fn bytes(&self) -> [Vec<u8>; 2] {
        self.disks.each_ref().map(|disk| disk.bytes())
    }
}

fn changes(max: usize) -> impl Strategy<Value = Vec<Change>> {
    prop::collection::vec((0usize..2, 0u64..80, 1u64..=64, 0u64..12), 0..max)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn replicas_are_what_a_plain_array_would_be(generations in prop::collection::vec(changes(8), 1..4)) {
        let mut standby = Standby::new();
        let mut plain = blank();
        for changes in &generations {
            let payload = payload(changes, &mut plain);
            let sealed = standby.seal(&payload);
            let applied = standby.apply(&sealed).unwrap();
            prop_assert_eq!((applied.position(), applied.digest()), (sealed.position(), sealed.digest()));
            prop_assert_eq!(standby.bytes(), plain.clone());
            let record = standby.ledger.record().unwrap();
            prop_assert_eq!((record.applied, record.committed, record.applied_cut_at), (sealed.position(), sealed.position(), sealed.cut_at()));
            // Again is already so.
            standby.apply(&sealed).unwrap();
            standby.journal.release(applied.position()).unwrap();
        }
    }
}

/// Real files and both engines, a payload of several pieces, directly and through the journal.
#[test]
fn files_are_written_by_both_engines() {
    let dir = tempfile::tempdir().unwrap();
    for kind in [EngineKind::Auto, EngineKind::Pread] {
        let mut standby = Standby::new();
        let mut plain = blank();
        let list: Vec<Change> = (0..150).map(|n| (n % 2, (n as u64 * 37) % 80, 1 + n as u64 % 64, n as u64 * 5 % 12)).collect();
        let payload = payload(&list, &mut plain);
        assert!(payload.len() > 2 << 20);
        let sealed = standby.seal(&payload);
        let mut engine = engine(kind, 16).unwrap();
        for direct in [false, true] {
            let replicas: Vec<DeviceFile> = (0..2)
                .map(|n| {
                    let path = dir.path().join(format!("{kind:?}-{direct}-{n}"));
                    std::fs::File::create(&path).unwrap().set_len(SIZES[n]).unwrap();
                    DeviceFile::open(&path, true).unwrap()
                })
                .collect();
            if direct {
                let written = apply_direct(&payload, &spec(), &replicas, &mut *engine).unwrap();
                flush_replicas(&replicas).unwrap();
                assert!(written > payload.len() as u64, "zeroes count as written");
            } else {
                apply(&standby.journal, &sealed, &spec(), &replicas, &mut *engine, &mut standby.ledger).unwrap();
            }
            for (n, plain) in plain.iter().enumerate() {
                let file = std::fs::read(dir.path().join(format!("{kind:?}-{direct}-{n}"))).unwrap();
                assert!(file == *plain, "volume {n}, {kind:?}, direct {direct}");
            }
        }
    }
}

#[test]
fn what_does_not_follow_or_fit_is_refused_before_a_byte_is_written() {
    let mut standby = Standby::new();
    let mut plain = blank();
    let first = standby.seal(&payload(&[(0, 0, 1, 1)], &mut plain));
    let second = standby.seal(&payload(&[(0, 1, 1, 3)], &mut plain));
    assert_eq!(standby.apply(&second).unwrap_err().code, Code::ChainBroken);
    let mut engine = engine(EngineKind::Pread, 4).unwrap();
    for (size, code) in [(SIZES[1] - 512, Code::DeviceTooSmall), (SIZES[1] + 512, Code::IdentityChanged)] {
        let replicas = [standby.disks[0].open(true), RamDisk::new(size).open(true)];
        let fault = apply(&standby.journal, &first, &spec(), &replicas, &mut *engine, &mut standby.ledger).unwrap_err();
        assert_eq!(fault.code, code);
        assert_eq!(apply_direct(&[], &spec(), &replicas, &mut *engine).unwrap_err().code, code);
    }
    let mut syncing = |slot: &mut Option<Record>| {
        slot.as_mut().unwrap().syncing ^= true;
        Ok(())
    };
    standby.ledger.commit(&mut syncing).unwrap();
    assert_eq!(standby.apply(&first).unwrap_err().code, Code::ChainBroken);
    assert_eq!(standby.bytes(), blank());
    standby.ledger.commit(&mut syncing).unwrap();
    standby.apply(&first).unwrap();
    standby.apply(&second).unwrap();
    assert_eq!(standby.bytes(), plain);
    assert_eq!(standby.apply(&first).unwrap_err().code, Code::ChainBroken, "never backwards");
}

#[test]
fn hostile_direct_records_are_refused() {
    let standby = Standby::new();
    let mut engine = engine(EngineKind::Pread, 4).unwrap();
    let good = payload(&[(0, 0, 20, 0), (0, 30, 2, 4)], &mut blank());
    for cut in [1, 31, 33, 60, good.len() - 1] {
        assert!(apply_direct(&good[..cut], &spec(), &standby.replicas(), &mut *engine).is_err(), "cut at {cut}");
    }
    for byte in 0..good.len() {
        let mut bad = good.clone();
        bad[byte] ^= 1;
        assert!(apply_direct(&bad, &spec(), &standby.replicas(), &mut *engine).is_err(), "byte {byte}");
    }
}

/// The power goes at every operation of the replicas and of the ledger; then recovery and apply again give the exact bytes, and
/// what the ledger called applied was there without it.
#[test]
fn a_power_cut_anywhere_is_made_good_by_applying_again() {
    let first: &[Change] = &[(0, 0, 20, 2), (1, 3, 5, 0), (0, 10, 40, 0), (0, 12, 2, 5), (1, 38, 3, 4)];
    let second: &[Change] = &[(1, 0, 2, 7), (0, 11, 1, 8), (0, 0, 64, 0), (1, 40, 1, 6)];
    let (mut cuts, mut redone, mut held) = (0, 0, 0);
    for seed in 0..6 {
        for target in 0..3 {
            for nth in 1.. {
                let mut standby = Standby::new();
                let (mut plain, mut dice) = (blank(), Dice::new(seed * 1000 + nth));
                let mut stages = vec![plain.clone()];
                let sealed: Vec<Sealed> = [first, second]
                    .map(|changes| {
                        let sealed = standby.seal(&payload(changes, &mut plain));
                        stages.push(plain.clone());
                        sealed
                    })
                    .into();
                match target {
                    2 => standby.world.plant(standby.world.calls() + nth - 1, Trouble::Fails),
                    disk => standby.disks[disk].fail_nth(nth, 5),
                }
                let died = sealed.iter().any(|sealed| {
                    let applied = standby.apply(sealed);
                    applied.and_then(|applied| standby.journal.release(applied.position())).is_err()
                });
                standby.disks.iter().for_each(|disk| disk.cut_power(&mut |_| dice.roll() & 1 == 1));
                let media = standby.world.after_power_cut(&mut || dice.roll() & 1 == 1);
                let (mut standby, left) = Standby::start(World::from_disks(&media), standby.disks);
                let applied = standby.ledger.record().unwrap().applied.generation as usize;
                assert_eq!(left.len(), 2 - applied, "seed {seed}, target {target}, operation {nth}");
                if left.is_empty() {
                    assert_eq!(standby.bytes(), stages[2]);
                    held += 1;
                }
                for sealed in &left {
                    standby.apply(sealed).unwrap();
                    assert_eq!(standby.bytes(), stages[sealed.position().generation as usize]);
                    redone += 1;
                }
                cuts += 1;
                if !died {
                    break;
                }
            }
        }
    }
    println!("apply: {cuts} power cuts, {redone} generations applied again, {held} times nothing was left to do");
    assert!(cuts > 100 && redone > 100 && held > 5);
}
