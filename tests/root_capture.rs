//! Capture against the real kernel: what is in the ring is what was written, and a cut is exact.

#![allow(missing_docs, unsafe_code)]

mod capture;
mod rig;
mod storm;

use capture::{Field, GROUP, Setting, Tally};
use doublure::model::{BLOCK_BYTES, Uuid};
use doublure::tracker::{Captured, Tracker, What};
use rig::{Loop, Pins};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;
use storm::{Checked, Checker, Mode, Options, Storm, Summary, Target, Violation};

const VOLUME: Uuid = Uuid(*b"volume one......");

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_write_is_captured_with_its_bytes_and_refusals_have_reasons() {
    let pins = Pins::new("capture");
    let mut tracker = Tracker::open(&pins.0).unwrap();
    tracker.self_test(Path::new("/var/tmp")).unwrap();
    tracker.prepare_capture(Path::new("/var/tmp")).unwrap();
    assert_eq!(tracker.capture_refusal(), None);
    let device = Loop::new(64 << 20);
    tracker.track(GROUP, VOLUME, &device.identity()).unwrap();
    let mut capture = tracker.start_capture(GROUP, &[VOLUME], 1 << 20).unwrap();
    let memory = memmap2::MmapMut::map_anon(16 << 20).unwrap();
    let mut memory = memory;
    let _huge = memory.advise(memmap2::Advice::HugePage);
    memory.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at / 512) as u8 ^ at as u8);
    let direct = device.direct();
    direct.write_all_at(&memory[4096..4096 + 1536], 8192 + 512).unwrap();
    direct.write_all_at(&memory[..65536], 1 << 20).unwrap();
    direct.write_all_at(&memory[..], 32 << 20).unwrap();
    let mut records: Vec<Captured> = Vec::new();
    let to = capture.produced();
    capture.walk(to, &mut |volume, record| {
        assert_eq!(volume, 0);
        records.push(record);
    })
    .unwrap();
    assert!(records.len() >= 3, "{records:?}");
    let What::Data(at) = records[0].what else { panic!("{records:?}") };
    assert_eq!((records[0].offset_bytes, records[0].len_bytes), (8192 + 512, 1536));
    assert_eq!(capture.bytes(at, 1536), &memory[4096..4096 + 1536]);
    let What::Data(at) = records[1].what else { panic!("{records:?}") };
    assert_eq!(capture.bytes(at, 65536), &memory[..65536]);
    // What is over the cap says where it was, and no more.
    let large: Vec<_> = records[2..].iter().map(|r| (r.what == What::Hole, r.len_bytes)).collect();
    assert!(large.iter().all(|(hole, len)| *hole || *len <= 1 << 20), "{large:?}");
    assert_eq!(large.iter().map(|(_, len)| len).sum::<u64>(), 16 << 20);
    assert_eq!(capture.missed().unwrap(), vec![]);
    tracker.stop_capture(GROUP).unwrap();
}

// ---- cuts ------------------------------------------------------------------------------------------------------------------

const MIB: u64 = 1 << 20;

/// `DOUBLURE_SEED`, or one that differs every time; printed, so that it can be repeated.
fn seed() -> u64 {
    let given = std::env::var("DOUBLURE_SEED").ok().map(|text| text.parse().expect("DOUBLURE_SEED is a number"));
    let seed = given.unwrap_or_else(|| std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64 % 1_000_000);
    println!("DOUBLURE_SEED={seed}");
    seed
}

/// So many generations; fifty times as many with `DOUBLURE_LONG`.
fn many(generations: u64) -> u64 {
    if std::env::var_os("DOUBLURE_LONG").is_some() { generations * 50 } else { generations }
}

/// Says to standard error what the tracker has to say, once for all tests.
fn listen() {
    let filter = std::env::var("DOUBLURE_LOG").unwrap_or_else(|_| "doublure=warn".into());
    let filter: tracing_subscriber::filter::Targets = filter.parse().expect("DOUBLURE_LOG");
    use tracing_subscriber::prelude::*;
    let _already = tracing_subscriber::registry().with(tracing_subscriber::fmt::layer().with_filter(filter)).try_init();
}

/// Why a run ended early.
#[derive(Debug)]
enum Wrong {
    Image(Violation),
    Cut(doublure::model::Fault),
}
impl std::fmt::Display for Wrong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Wrong::Image(violation) => violation.fmt(f),
            Wrong::Cut(fault) => fault.fmt(f),
        }
    }
}

/// A storm on raw devices and how it is cut.
struct Run {
    name: &'static str,
    seed: u64,
    generations: u64,
    loops: Vec<Loop>,
    /// Of each volume: the modes of its writers. No mode and no chain: not written.
    modes: Vec<Vec<Mode>>,
    options: Options,
    setting: Setting,
    /// Successes are read back: the place below may be full.
    read_back: bool,
}

impl Run {
    fn new(name: &'static str, seed: u64, generations: u64, loops: Vec<Loop>) -> Run {
        let modes = vec![vec![Mode::Direct, Mode::Buffered, Mode::Mapped, Mode::Ring]; loops.len()];
        let rest = Duration::from_millis(2);
        let options = Options { chains: vec![(0, 1, false), (1, 0, true)], depth: 512, rest, ..Options::default() };
        Run { name, seed, generations, loops, modes, options, setting: Setting::default(), read_back: false }
    }

    /// Every generation is checked as it comes, and everything at the end. Gives what was seen, or the first thing that is wrong.
    fn go(self) -> (Tally, Result<(Checked, Summary), Wrong>) {
        let Run { name, seed, generations, loops, modes, options, setting, read_back } = self;
        let mut field = Field::new(name, seed, loops, setting);
        let target = |(made, modes): (&Loop, &Vec<Mode>)| Target {
            modes: modes.clone(),
            read_back,
            ..Target::raw(made.path(), made.identity().size_bytes / BLOCK_BYTES * BLOCK_BYTES)
        };
        let storm = Storm::start(seed, field.loops.iter().zip(&modes).map(target).collect(), options);
        let outcome = judged(&mut field, storm, generations);
        let tally = field.finish();
        tally.print(name);
        (tally, outcome)
    }

    /// All of it must be right.
    fn holds(self) -> (Tally, Checked, Summary) {
        let (name, seed) = (self.name, self.seed);
        let (tally, outcome) = self.go();
        let (checked, summary) =
            outcome.unwrap_or_else(|wrong| panic!("{name}, DOUBLURE_SEED={seed}, generation {}: {wrong}", tally.generations));
        println!("{name}: {checked:?}\n{name}: {summary:?}");
        (tally, checked, summary)
    }
}

fn judged(field: &mut Field, storm: Storm, generations: u64) -> Result<(Checked, Summary), Wrong> {
    let mut checker = storm.checker();
    let journal = storm.journal();
    let mut sum = Checked::default();
    let mut next = |field: &mut Field, checker: &mut Checker| {
        let cut = field.generation(&|| journal.now(), &mut |volume, at, bytes| {
            // The storm leaves a last part of a block alone.
            let room = (checker.replica(volume).len() as u64).saturating_sub(at).min(bytes.len() as u64);
            checker.apply(volume, at, &bytes[..room as usize]);
        });
        let (low, high) = cut.map_err(Wrong::Cut)?;
        let checked = checker.check(low, high).map_err(Wrong::Image)?;
        sum.changed += checked.changed;
        sum.required += checked.required;
        sum.links += checked.links;
        sum.undefined += checked.undefined;
        Ok(())
    };
    for _ in 0..generations {
        assert!(!storm.broken(), "a writer is gone");
        next(field, &mut checker)?;
        if field.tally.generations % 50 == 0 && std::env::var_os("DOUBLURE_PROGRESS").is_some() {
            field.tally.print("so far");
        }
    }
    let summary = storm.stop();
    next(field, &mut checker)?;
    let now = journal.now();
    checker.check(now, now).map_err(Wrong::Image)?;
    for (volume, made) in (0..).zip(&field.loops) {
        // The file is what the device holds, whatever a cache above it shows.
        checker.final_equal(volume, &made.image()).map_err(Wrong::Image)?;
    }
    Ok((sum, summary))
}

/// A loop device whose file is read and written past the page cache, and one whose file is not.
fn pair(bytes: u64) -> Vec<Loop> {
    let place = Path::new("/var/tmp");
    vec![Loop::on(place, bytes, &["--direct-io=on"]), Loop::on(place, bytes, &["--direct-io=off"])]
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn cuts_of_raw_devices_are_exact_with_a_large_ring() {
    listen();
    let mut run = Run::new("large-ring", seed(), many(700), pair(48 * MIB));
    run.setting = Setting { death_once_in: 150, ..Setting::default() };
    let (tally, checked, summary) = run.holds();
    assert!(checked.changed > 10_000 && checked.required > 1000 && checked.links > 10, "{checked:?}");
    assert!(summary.zeroed > 0 && summary.discarded > 0 && summary.linked > 0 && summary.again > 0, "{summary:?}");
    assert!(tally.counts.captured_bytes > 64 * MIB && tally.receipts > 0, "{tally:?}");
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn cuts_of_raw_devices_are_exact_with_a_ring_that_overflows() {
    listen();
    let mut loops = pair(32 * MIB);
    loops.push(Loop::new(32 * MIB + 3 * 4096 + 512));
    let mut run = Run::new("tiny-ring", seed(), many(700), loops);
    run.options.chains.push((2, 0, false));
    run.setting = Setting {
        ring_bytes: 1 << 20,
        cut_max_bytes: MIB,
        death_once_in: 200,
        rest: Duration::from_millis(20),
        ..Setting::default()
    };
    let (tally, checked, _) = run.holds();
    assert!(checked.changed > 10_000 && checked.required > 1000 && checked.links > 10, "{checked:?}");
    assert!(tally.rounds > 10 && tally.counts.holes > 100 && tally.counts.missed > 10, "{tally:?}");
}
