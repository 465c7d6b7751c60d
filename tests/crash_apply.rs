//! Apply against a plain array of bytes, on disks in memory and on files, and with the power cut at every operation.

use doublure::apply::{Applied, apply, apply_direct, apply_together, flush_replicas};
use doublure::delta::{encode, encode_sectors};
use doublure::device::double::RamDisk;
use doublure::device::{DeviceFile, Engine, RUN_BYTES_MAX, engine};
use doublure::durable::double::{Dice, Trouble, World};
use doublure::format::generation_digest;
use doublure::journal::double::WorldOverflow;
use doublure::journal::{Journal, Sealed};
use doublure::ledger::{Ledger, Record, STORAGE_BYTES};
use doublure::model::{BLOCK_BYTES, BlockRun, ByteRun, Code, Digest, EngineKind, FileSystem, GroupSpec, Moment, Position};
use doublure::model::{Res, Role, SealedProof, Uuid, VolumeSpec};
use proptest::prelude::*;
use std::sync::Arc;

/// A volume of 80 blocks, and one whose last block has three sectors.
const SIZES: [u64; 2] = [80 * BLOCK_BYTES, 40 * BLOCK_BYTES + 1536];
/// What replicas take: sectors, and nothing less than a block.
const ALIGNS: [u64; 2] = [512, 4096];

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

/// A change of `count` units (of 512 or 4096 bytes) from unit number `start` on.
#[derive(Clone, Copy, Debug)]
struct Change {
    volume: usize,
    unit: u64,
    start: u64,
    count: u64,
    /// 0 = zeroes, odd = one byte throughout, even = noise.
    what: u64,
}

fn blocks(volume: usize, start: u64, count: u64, what: u64) -> Change {
    Change { volume, unit: BLOCK_BYTES, start, count, what }
}

fn sectors(volume: usize, start: u64, count: u64, what: u64) -> Change {
    Change { volume, unit: 512, start, count, what }
}

/// Encodes changes, and makes them on plain arrays.
fn payload(changes: &[Change], plain: &mut [Vec<u8>; 2]) -> Vec<u8> {
    let mut out = Vec::new();
    for Change { volume, unit, start, count, what } in changes {
        let size_bytes = SIZES[*volume];
        let start = start % size_bytes.div_ceil(*unit);
        let offset = start * unit;
        let len = ((*count).max(1) * unit).min(RUN_BYTES_MAX).min(size_bytes - offset);
        let mut dice = Dice::new(*what);
        let data: Vec<u8> = (0..len)
            .map(|_| match what {
                0 => 0,
                odd if odd % 2 == 1 => *odd as u8,
                _ => dice.roll() as u8,
            })
            .collect();
        match unit {
            512 => encode_sectors(*volume as u16, start, &data, what % 3 != 0, &mut out),
            _ => encode(*volume as u16, BlockRun { start, count: len.div_ceil(BLOCK_BYTES) }, &data, &mut out),
        }
        plain[*volume][offset as usize..(offset + len) as usize].copy_from_slice(&data);
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
    fn new(align: u64) -> Standby {
        Standby::start(World::new(), SIZES.map(|size| RamDisk::aligned(size, align))).0
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
    fn apply_together(&mut self, sealed: &[Sealed]) -> Res<Applied> {
        let replicas = self.replicas();
        let mut engine = engine(EngineKind::Pread, 4)?;
        apply_together(&self.journal, sealed, &spec(), &replicas, &mut *engine, &mut self.ledger)
    }
    fn bytes(&self) -> [Vec<u8>; 2] {
        self.disks.each_ref().map(|disk| disk.bytes())
    }
}

/// Blocks and sectors; some of the sectors close together, so that many share a block, with each other and with blocks.
fn changes(max: usize) -> impl Strategy<Value = Vec<Change>> {
    let change = prop_oneof![
        2 => (0u64..80, 1u64..=64).prop_map(|(start, count)| (BLOCK_BYTES, start, count)),
        1 => (0u64..4, 1u64..=2).prop_map(|(start, count)| (BLOCK_BYTES, start, count)),
        2 => (0u64..640, 1u64..=512).prop_map(|(start, count)| (512, start, count)),
        3 => (0u64..32, 1u64..=9).prop_map(|(start, count)| (512, start, count)),
        1 => (318u64..=322, 1u64..=9).prop_map(|(start, count)| (512, start, count)),
    ];
    let one = (0usize..2, change, 0u64..12);
    prop::collection::vec(
        one.prop_map(|(volume, (unit, start, count), what)| Change { volume, unit, start, count, what }),
        0..max,
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn replicas_are_what_a_plain_array_would_be(generations in prop::collection::vec(changes(16), 1..4), align in prop::sample::select(&ALIGNS)) {
        let mut standby = Standby::new(align);
        let mut plain = blank();
        for changes in &generations {
            let payload = payload(changes, &mut plain);
            let sealed = standby.seal(&payload);
            let applied = standby.apply(&sealed).unwrap();
            prop_assert_eq!((applied.position(), applied.digest()), (sealed.position(), sealed.digest()));
            prop_assert!(standby.bytes() == plain);
            let record = standby.ledger.record().unwrap();
            prop_assert_eq!((record.applied, record.committed, record.applied_cut_at), (sealed.position(), sealed.position(), sealed.cut_at()));
            // Again is already so.
            standby.apply(&sealed).unwrap();
            standby.journal.release(applied.position()).unwrap();
        }
    }

    /// Several in a row, broken off anywhere, and again from where the ledger stands: one by one or together.
    #[test]
    fn generations_applied_together_are_what_they_are_one_by_one(
        generations in prop::collection::vec(changes(10), 2..5), align in prop::sample::select(&ALIGNS), nth in 1u64..30, disk in 0usize..2,
        seed: u64, singly: bool,
    ) {
        let mut standby = Standby::new(align);
        let mut plain = blank();
        let sealed: Vec<Sealed> = generations.iter().map(|changes| standby.seal(&payload(changes, &mut plain))).collect();
        standby.disks[disk].fail_nth(nth, 5);
        let mut dice = Dice::new(seed);
        if standby.apply_together(&sealed).is_err() {
            standby.disks.iter().for_each(|disk| disk.cut_power(&mut |_| dice.roll() & 1 == 1));
            prop_assert_eq!(standby.ledger.record().unwrap().applied, Position::default(), "nothing is called applied before all of it is");
        }
        standby.disks[disk].fail_nth(u64::MAX, 5);
        match singly && standby.ledger.record().unwrap().applied == Position::default() {
            true => sealed.iter().for_each(|one| assert_eq!(standby.apply(one).unwrap().position(), one.position())),
            false => assert_eq!(standby.apply_together(&sealed).unwrap().position(), sealed[sealed.len() - 1].position()),
        }
        prop_assert!(standby.bytes() == plain);
        prop_assert_eq!(standby.ledger.record().unwrap().applied, sealed.last().unwrap().position());
        let mut gap = vec![sealed[0].clone()];
        gap.extend_from_slice(&sealed[2..]);
        if gap.len() > 1 {
            prop_assert!(Standby::new(align).apply_together(&gap).is_err(), "a gap is refused");
        }
    }

    /// Whatever a first attempt left (any of its writes, whole or torn at a sector, or none), the second gives the same bytes.
    #[test]
    fn a_second_attempt_on_any_remains_of_the_first_gives_the_same(
        before in changes(6), during in changes(16), align in prop::sample::select(&ALIGNS), nth in 1u64..20, disk in 0usize..2, seed: u64,
    ) {
        let mut standby = Standby::new(align);
        let mut plain = blank();
        let sealed = standby.seal(&payload(&before, &mut plain));
        standby.apply(&sealed).unwrap();
        let sealed = standby.seal(&payload(&during, &mut plain));
        standby.disks[disk].fail_nth(nth, 5);
        let mut dice = Dice::new(seed);
        if standby.apply(&sealed).is_err() {
            standby.disks.iter().for_each(|disk| disk.cut_power(&mut |_| dice.roll() & 1 == 1));
        }
        // A countdown that did not come to its end is over.
        standby.disks[disk].fail_nth(u64::MAX, 5);
        standby.apply(&sealed).unwrap();
        prop_assert!(standby.bytes() == plain);
    }
}

/// Real files and both engines, a payload of several pieces, directly and through the journal.
#[test]
fn files_are_written_by_both_engines() {
    let dir = tempfile::tempdir().unwrap();
    for kind in [EngineKind::Auto, EngineKind::Pread] {
        let mut standby = Standby::new(512);
        let mut plain = blank();
        let list: Vec<Change> = (0..300u64)
            .map(|n| match n % 4 {
                0 | 1 => blocks(n as usize % 2, (n * 37) % 80, 1 + n % 64, n * 5 % 12),
                2 => sectors(n as usize / 4 % 2, (n * 61) % 640, 1 + n * 7 % 512, n * 5 % 12),
                _ => sectors(n as usize / 4 % 2, (n * 11) % 640, 1 + n % 9, n * 5 % 12),
            })
            .collect();
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
    let mut standby = Standby::new(512);
    let mut plain = blank();
    let first = standby.seal(&payload(&[blocks(0, 0, 1, 1)], &mut plain));
    let second = standby.seal(&payload(&[blocks(0, 1, 1, 3), sectors(0, 3, 1, 5)], &mut plain));
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
    let standby = Standby::new(4096);
    let mut engine = engine(EngineKind::Pread, 4).unwrap();
    let list = [blocks(0, 0, 20, 0), blocks(0, 30, 2, 4), sectors(0, 3, 1, 6), sectors(0, 7, 200, 0), sectors(1, 321, 2, 2)];
    let good = payload(&list, &mut blank());
    for cut in [1, 31, 33, 60, good.len() - 1, good.len() - 1024, good.len() - 1060] {
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
    let first: &[Change] = &[
        blocks(0, 0, 20, 2),
        blocks(1, 3, 5, 0),
        sectors(0, 90, 3, 4),
        blocks(0, 10, 40, 0),
        blocks(0, 12, 2, 5),
        sectors(0, 93, 20, 7),
        sectors(0, 95, 1, 0),
        blocks(1, 38, 3, 4),
        sectors(1, 321, 1, 9),
    ];
    let second: &[Change] = &[
        blocks(1, 0, 2, 7),
        sectors(1, 13, 1, 2),
        sectors(0, 91, 512, 4),
        blocks(0, 11, 1, 8),
        sectors(0, 94, 1, 2),
        sectors(0, 641, 1, 3),
        blocks(0, 0, 64, 0),
        blocks(1, 40, 1, 6),
        sectors(1, 322, 1, 0),
        sectors(1, 319, 2, 5),
        sectors(0, 87, 2, 11),
    ];
    let (mut cuts, mut redone, mut held) = (0, 0, 0);
    for (seed, align) in (0..4).flat_map(|seed| ALIGNS.map(|align| (seed, align))) {
        for target in 0..3 {
            for nth in 1.. {
                let mut standby = Standby::new(align);
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

/// Counts how often it is asked to read, and for how many runs.
struct Counting(Box<dyn Engine>, usize, usize);

impl Engine for Counting {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn read(
        &mut self,
        file: &DeviceFile,
        runs: &mut dyn Iterator<Item = ByteRun>,
        sink: &mut dyn FnMut(ByteRun, &[u8]) -> Res<()>,
    ) -> Res<()> {
        let Counting(engine, reads, asked) = self;
        let mut runs = runs.inspect(|_| *asked += 1).peekable();
        *reads += usize::from(runs.peek().is_some());
        engine.read(file, &mut runs, sink)
    }
    fn write(&mut self, file: &DeviceFile, fill: &mut dyn FnMut(&mut [u8]) -> Res<Option<ByteRun>>) -> Res<()> {
        self.0.write(file, fill)
    }
}

/// Ten thousand sectors, each in a block of its own, on two volumes that take turns: their blocks are read many at a time, and
/// not all at once, or a payload of headers alone could ask for any amount of memory.
#[test]
fn many_sectors_cost_few_rounds_of_reading() {
    let size_bytes = 5000 * BLOCK_BYTES;
    let mut spec = spec();
    spec.volumes.iter_mut().for_each(|volume| volume.size_bytes = size_bytes);
    for align in ALIGNS {
        let disks = [0, 1].map(|_| RamDisk::aligned(size_bytes, align));
        let replicas = disks.each_ref().map(|disk| disk.open(true));
        let (mut records, mut plain) = (Vec::new(), [0, 1].map(|_| vec![0; size_bytes as usize]));
        for n in 0..10_000u64 {
            let (volume, sector, byte) = (n % 2, n / 2 * 8 + n % 7, 1 + (n % 255) as u8);
            encode_sectors(volume as u16, sector, &[byte; 512], true, &mut records);
            plain[volume as usize][sector as usize * 512..][..512].fill(byte);
        }
        let mut counting = Counting(engine(EngineKind::Pread, 16).unwrap(), 0, 0);
        assert_eq!(apply_direct(&records, &spec, &replicas, &mut counting).unwrap(), 10_000 * 512);
        let Counting(_, reads, asked) = counting;
        match align {
            512 => assert_eq!((reads, asked), (0, 0), "sectors are written as they are"),
            _ => assert!((10..=12).contains(&reads) && (157..200).contains(&asked), "{reads} rounds, {asked} runs"),
        }
        assert!(disks.each_ref().map(|disk| disk.bytes()) == plain);
    }
}

#[test]
fn what_is_read_is_only_what_is_changed_in_part() {
    let disks = SIZES.map(|size| RamDisk::aligned(size, 4096));
    let replicas = disks.each_ref().map(|disk| disk.open(true));
    let mut plain = blank();
    // 64 blocks and two edges; one that ends with the volume; whole blocks in sectors; a hole in sectors, next to one in blocks.
    let list = [sectors(0, 7, 512, 2), sectors(1, 320, 3, 4), sectors(0, 528, 16, 6), sectors(1, 0, 128, 0), blocks(1, 16, 1, 0)];
    let records = payload(&list, &mut plain);
    let mut counting = Counting(engine(EngineKind::Pread, 4).unwrap(), 0, 0);
    apply_direct(&records, &spec(), &replicas, &mut counting).unwrap();
    assert_eq!((counting.1, counting.2), (1, 2));
    assert!(disks.each_ref().map(|disk| disk.bytes()) == plain);
}
