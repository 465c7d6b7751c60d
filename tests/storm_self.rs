//! The storm's own test, without root: the checker passes streams that are right and finds each planted fault, and the writers
//! write what their journal says.
#![allow(missing_docs, unsafe_code)]

mod storm;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use storm::{Checked, Checker, Dice, End, Follows, Journal, Kind, Mode, Options, Pool, SECTOR, Stamp, Storm, Target, Violation};

const VOLUME_SECTORS: u64 = 512;
const LANES: u64 = 8;

/// A record as a capture would make it, when its write completes.
#[derive(Clone, Debug)]
struct Record {
    volume: u32,
    offset: u64,
    bytes: Vec<u8>,
    seq: u64,
}

/// One generation: its records in order, and its bounds.
#[derive(Clone, Default, Debug)]
struct Generation {
    records: Vec<Record>,
    low: u64,
    high: u64,
}

/// Plays writers of two volumes on one thread: writes begin and complete in a random order, never two in one lane of a volume.
/// Every fifth write is a zeroed range, every ninth fails after a part of it, every third names the last completed one.
fn play(seed: u64, generations: usize) -> (Arc<Journal>, Vec<Generation>) {
    let journal = Arc::new(Journal::new(seed, 1));
    let pool = Pool::new(seed);
    let mut dice = Dice::new(seed);
    let mut busy = [[false; LANES as usize]; 2];
    let mut flying: Vec<(usize, Record, End)> = Vec::new();
    let mut last: Option<Follows> = None;
    let mut out = Vec::new();
    for _ in 0..generations {
        let mut generation = Generation { low: journal.now(), ..Generation::default() };
        for _ in 0..20 + dice.below(60) {
            let (volume, lane) = (dice.below(2) as usize, dice.below(LANES));
            if !busy[volume][lane as usize] && dice.once_in(2) {
                busy[volume][lane as usize] = true;
                let width = VOLUME_SECTORS / LANES;
                let sectors = 1 + dice.below(width);
                let first = lane * width + dice.below(width - sectors + 1);
                let kind = if dice.once_in(5) { Kind::Zero } else { Kind::Direct };
                let seq = journal.submit(0, volume as u32, first, sectors, kind);
                let mut bytes = vec![0; sectors as usize * SECTOR];
                if kind == Kind::Direct {
                    let follows = last.filter(|_| seq.is_multiple_of(3));
                    let stamp = Stamp { volume: volume as u32, writer: 0, sector: first, version: seq, seq, follows };
                    pool.fill(&mut bytes, &stamp);
                }
                let end = if seq % 9 == 8 { End::Failed } else { End::There };
                flying.push((lane as usize, Record { volume: volume as u32, offset: first * SECTOR as u64, bytes, seq }, end));
            } else if !flying.is_empty() {
                let (lane, mut record, end) = flying.swap_remove(dice.below(flying.len() as u64) as usize);
                busy[record.volume as usize][lane] = false;
                if end == End::Failed {
                    record.bytes.truncate(record.bytes.len() / 2 / SECTOR * SECTOR);
                } else if dice.once_in(2) {
                    last = Some(Follows { volume: record.volume, sector: record.offset / SECTOR as u64, seq: record.seq });
                }
                journal.end(0, &[record.seq], end);
                generation.records.push(record);
            }
        }
        generation.low = journal.now();
        // Of what is in flight, any sectors may be there; a few of them are.
        if let Some((_, record, _)) = flying.first().filter(|_| dice.once_in(2)) {
            let mut torn = record.clone();
            torn.bytes.truncate(SECTOR);
            generation.records.push(torn);
        }
        generation.high = journal.now();
        out.push(generation);
    }
    (journal, out)
}

fn judge(journal: &Arc<Journal>, generations: &[Generation]) -> Result<Checked, Violation> {
    let bytes = VOLUME_SECTORS * SECTOR as u64;
    let mut checker = Checker::new(journal.clone(), &[(0, bytes), (1, bytes)]);
    let mut sum = Checked::default();
    for generation in generations {
        for record in &generation.records {
            checker.apply(record.volume, record.offset, &record.bytes);
        }
        let checked = checker.check(generation.low, generation.high)?;
        sum.changed += checked.changed;
        sum.required += checked.required;
        sum.undefined += checked.undefined;
        sum.links += checked.links;
    }
    Ok(sum)
}

#[test]
fn right_streams_pass() {
    let mut sum = Checked::default();
    for seed in 0..20 {
        let (journal, generations) = play(seed, 100);
        let checked = judge(&journal, &generations).unwrap_or_else(|v| panic!("seed {seed}: {v}"));
        sum.changed += checked.changed;
        sum.required += checked.required;
        sum.links += checked.links;
        sum.undefined += checked.undefined;
    }
    assert!(sum.changed > 100_000 && sum.required > 10_000 && sum.links > 1000 && sum.undefined > 100, "{sum:?}");
}

/// Plants a fault in streams of many seeds. Where `plant` says that it changed something, the checker must say so; and it must
/// have changed something nearly always.
fn is_found(what: &str, plant: impl Fn(&mut Vec<Generation>, &mut Dice, &Journal) -> bool) {
    let (mut planted, mut found) = (0, 0);
    for seed in 100..140 {
        let (journal, mut generations) = play(seed, 30);
        if plant(&mut generations, &mut Dice::new(seed), &journal) {
            planted += 1;
            match judge(&journal, &generations) {
                Err(violation) => {
                    found += 1;
                    if found == 1 {
                        println!("{what}: {violation}");
                    }
                }
                Ok(_) => println!("{what}: not found with seed {seed}"),
            }
        }
    }
    assert!(planted >= 30 && found == planted, "{what}: planted {planted}, found {found}");
}

fn sectors_of(record: &Record) -> std::ops::Range<u64> {
    let first = record.offset / SECTOR as u64;
    first..first + (record.bytes.len() / SECTOR) as u64
}

fn overlap(a: &std::ops::Range<u64>, b: &std::ops::Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Whether these sectors of a record have exactly one legal content at the end of its generation: it succeeded, is data, and
/// nothing that came later there could excuse anything else.
fn decides(generation: &Generation, at: usize, sectors: &std::ops::Range<u64>, journal: &Journal) -> bool {
    let record = &generation.records[at];
    let shard = journal.shard(0);
    let op = shard.ops[record.seq as usize];
    let whole = record.bytes.len() == op.sectors as usize * SECTOR && !record.bytes.is_empty();
    let there = shard.ends.iter().any(|(seq, end, when)| (*seq, *end) == (op.seq, End::There) && *when < generation.low);
    let later = |r: &Record| r.volume == op.volume && overlap(&sectors_of(r), sectors);
    let covered = generation.records[at + 1..].iter().any(later);
    let excused = shard.ops[op.seq as usize + 1..].iter().any(|o| {
        let failed = o.seq % 9 == 8 || o.kind == Kind::Zero;
        failed && o.volume == op.volume && overlap(&(o.first..o.first + o.sectors), sectors)
    });
    whole && there && op.kind == Kind::Direct && !covered && !excused
}

/// A random record for which `fits` holds: (generation, place).
fn pick(generations: &[Generation], dice: &mut Dice, fits: impl Fn(usize, usize) -> bool) -> Option<(usize, usize)> {
    let all = generations.iter().enumerate().flat_map(|(g, generation)| (0..generation.records.len()).map(move |r| (g, r)));
    let fitting: Vec<(usize, usize)> = all.filter(|(g, r)| fits(*g, *r)).collect();
    (!fitting.is_empty()).then(|| fitting[dice.below(fitting.len() as u64) as usize])
}

fn decisive(generations: &[Generation], dice: &mut Dice, journal: &Journal) -> Option<(usize, usize)> {
    let fits = |g: usize, r: usize| {
        let generation: &Generation = &generations[g];
        decides(generation, r, &sectors_of(&generation.records[r]), journal)
    };
    pick(generations, dice, fits)
}

#[test]
fn a_dropped_write_is_found() {
    is_found("dropped", |generations, dice, journal| {
        let Some((g, r)) = decisive(generations, dice, journal) else { return false };
        generations[g].records.remove(r);
        true
    });
}

#[test]
fn two_swapped_records_are_found() {
    is_found("swapped", |generations, dice, journal| {
        let older = |g: usize, r: usize| {
            let generation: &Generation = &generations[g];
            let new = &generation.records[r];
            let common = |o: &Record| o.volume == new.volume && o.seq < new.seq && overlap(&sectors_of(o), &sectors_of(new));
            let old = generation.records[..r].iter().position(common)?;
            let (a, b) = (sectors_of(&generation.records[old]), sectors_of(new));
            let common = a.start.max(b.start)..a.end.min(b.end);
            let data = generation.records[old].bytes.iter().any(|b| *b != 0);
            (data && decides(generation, r, &common, journal)).then_some(old)
        };
        let Some((g, r)) = pick(generations, dice, |g, r| older(g, r).is_some()) else { return false };
        let old = older(g, r).unwrap();
        generations[g].records.swap(old, r);
        true
    });
}

#[test]
fn data_shifted_by_a_page_is_found() {
    is_found("shifted", |generations, dice, journal| {
        let Some((g, r)) = decisive(generations, dice, journal) else { return false };
        let record = &mut generations[g].records[r];
        let up = record.offset + record.bytes.len() as u64 + 4096 <= VOLUME_SECTORS * SECTOR as u64;
        record.offset = if up { record.offset + 4096 } else { record.offset - 4096 };
        true
    });
}

#[test]
fn a_lost_hole_is_found() {
    // What a cap on captured data cuts off, and nobody reads again.
    is_found("hole", |generations, dice, journal| {
        let tail = |g: usize, r: usize| {
            let sectors = sectors_of(&generations[g].records[r]);
            (sectors.end - sectors.start) / 2 + sectors.start..sectors.end
        };
        let Some((g, r)) = pick(generations, dice, |g, r| decides(&generations[g], r, &tail(g, r), journal)) else {
            return false;
        };
        let record = &mut generations[g].records[r];
        record.bytes.truncate(record.bytes.len() / SECTOR / 2 * SECTOR);
        true
    });
}

#[test]
fn a_hole_read_after_its_cut_is_found() {
    is_found("late hole", |generations, dice, journal| {
        let Some((g, r)) = decisive(generations, dice, journal) else { return false };
        if g + 1 == generations.len() {
            return false;
        }
        let record = generations[g].records.remove(r);
        generations[g + 1].records.insert(0, record);
        true
    });
}

#[test]
fn a_future_write_is_found() {
    is_found("future", |generations, dice, journal| {
        let future = |g: usize, r: usize| {
            let record: &Record = &generations[g].records[r];
            let op = journal.shard(0).ops[record.seq as usize];
            g > 0 && op.submitted > generations[g - 1].high && op.kind == Kind::Direct && !record.bytes.is_empty()
        };
        let Some((g, r)) = pick(generations, dice, future) else { return false };
        let record = generations[g].records[r].clone();
        generations[g - 1].records.push(record);
        true
    });
}

#[test]
fn a_torn_dependency_is_found() {
    // No lower bound is given: only that something later is there tells that something is missing.
    is_found("dependency", |generations, dice, journal| {
        for generation in generations.iter_mut() {
            generation.low = journal.now();
        }
        let torn = |g: usize, r: usize| {
            let generation: &Generation = &generations[g];
            let shard = journal.shard(0);
            let ended = shard.ends.iter().find(|(seq, ..)| *seq == generation.records[r].seq).map(|(_, _, when)| *when);
            let follows = |b: &Record| {
                let op = shard.ops[b.seq as usize];
                let other = b.volume != generation.records[r].volume && op.kind == Kind::Direct && !b.bytes.is_empty();
                other && ended.is_some_and(|ended| op.submitted > ended)
            };
            let some = generation.records[r + 1..].iter().any(follows);
            drop(shard);
            some && decides(generation, r, &sectors_of(&generation.records[r]), journal)
        };
        let Some((g, r)) = pick(generations, dice, torn) else { return false };
        generations[g].records.remove(r);
        for generation in generations.iter_mut() {
            generation.low = 0;
        }
        generations.truncate(g + 1);
        true
    });
}

#[test]
fn a_torn_sector_is_found() {
    is_found("torn", |generations, dice, journal| {
        let Some((g, r)) = decisive(generations, dice, journal) else { return false };
        generations[g].records[r].bytes[300] ^= 1;
        true
    });
}

#[test]
fn what_was_there_before_stays_until_it_is_written() {
    let journal = Arc::new(Journal::new(9, 1));
    let seq = journal.submit(0, 0, 4, 2, Kind::Zero);
    let old = [9; 8 * SECTOR];
    let fresh = || {
        let mut checker = Checker::new(journal.clone(), &[(0, old.len() as u64)]);
        checker.base(0, 0, &old);
        checker
    };
    // In flight: there, half there, or not.
    for zeroed in 0..3u64 {
        let mut checker = fresh();
        checker.apply_zero(0, 4 * SECTOR as u64, zeroed * SECTOR as u64);
        checker.check(0, journal.now()).unwrap();
    }
    journal.end(0, &[seq], End::There);
    let now = journal.now() + 1;
    for zeroed in 0..3u64 {
        let mut checker = fresh();
        checker.apply_zero(0, 4 * SECTOR as u64, zeroed * SECTOR as u64);
        assert_eq!(checker.check(now, now).is_ok(), zeroed == 2, "{zeroed} of 2 sectors zeroed");
    }
    // Elsewhere nothing may change, neither to zeroes nor to anything else.
    for byte in [0, 7] {
        let mut checker = fresh();
        checker.apply(0, 100, &[byte; 3]);
        checker.apply_zero(0, 0, if byte == 0 { SECTOR as u64 } else { 0 });
        assert!(checker.check(0, now).is_err(), "{byte}");
    }
}

/// Two files that writers take for raw devices: what their page cache shows is what a device would hold.
fn raw_files(dir: &tempfile::TempDir, bytes: u64) -> [PathBuf; 2] {
    ["a", "b"].map(|name| {
        let path = dir.path().join(name);
        std::fs::write(&path, vec![0; bytes as usize]).unwrap();
        path
    })
}

#[test]
fn writers_write_what_they_note() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let bytes = 16 << 20;
    let paths = raw_files(&dir, bytes);
    let mut targets: Vec<Target> = paths.iter().map(|path| Target::raw(path, bytes)).collect();
    targets[1].modes.push(Mode::Clash);
    let options = Options { chains: vec![(0, 1, false), (1, 0, true)], depth: 512, ..Options::default() };
    let storm = Storm::start(5, targets, options);
    let mut checker = storm.checker();
    let journal = storm.journal();
    // Until every thread has done something of all that it does, however slow the disk is.
    let enough = || {
        let (mut zero, mut discard) = (0, 0);
        let busy = (0..journal.threads()).all(|thread| {
            let shard = journal.shard(thread);
            zero += shard.ops.iter().filter(|op| op.kind == Kind::Zero).count();
            discard += shard.ops.iter().filter(|op| op.kind == Kind::Discard).count();
            shard.ops.len() > 40
        });
        busy && zero > 4 && discard > 4
    };
    while !(enough() || storm.broken()) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let summary = storm.stop();
    println!("{summary:?}");
    assert!(summary.linked > 10 && summary.zeroed > 0 && summary.discarded > 0, "{summary:?}");
    for (volume, path) in (0..).zip(&paths) {
        checker.load(volume, path, 0).unwrap();
    }
    let now = journal.now();
    let checked = checker.check(now, now).unwrap_or_else(|v| panic!("{v}"));
    println!("{checked:?}");
    assert_eq!(checked.required, summary.writes);
    assert!(checked.changed > 1000 && checked.links > 0 && checked.undefined > 0, "{checked:?}");
    for (volume, path) in (0..).zip(&paths) {
        assert_eq!(checker.final_equal(volume, path).unwrap(), 0);
    }
    // A last write goes astray: the whole comparison sees it.
    let astray = bytes as usize / 2 / SECTOR * SECTOR;
    let defined = (0..64).map(|n| (astray + n * SECTOR) as u64).find(|at| {
        use std::os::unix::fs::FileExt;
        let file = std::fs::OpenOptions::new().write(true).read(true).open(&paths[0]).unwrap();
        let mut before = [0; SECTOR];
        file.read_exact_at(&mut before, *at).unwrap();
        file.write_all_at(&[7; SECTOR], *at).unwrap();
        let seen = checker.final_equal(0, &paths[0]).is_err();
        file.write_all_at(&before, *at).unwrap();
        seen
    });
    assert!(defined.is_some());
}

#[test]
fn a_plain_copy_of_what_is_being_written_is_found() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let bytes = 1 << 20;
    let paths = raw_files(&dir, bytes);
    let target = |path: &PathBuf| Target { modes: vec![], ..Target::raw(path, bytes) };
    let options = Options { chains: vec![(0, 1, false)], ..Options::default() };
    let storm = Storm::start(6, paths.iter().map(target).collect(), options);
    let mut checker = storm.checker();
    let wait = |writes: u64| {
        while storm.writes() < writes && !storm.broken() {
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    wait(100);
    let t_low = storm.now();
    checker.load(0, &paths[0], 0).unwrap();
    wait(storm.writes() + 1000);
    checker.load(1, &paths[1], 0).unwrap();
    let violation = checker.check(t_low, storm.now()).expect_err("the second volume is a thousand writes ahead");
    println!("{violation}");
    storm.stop();
}
