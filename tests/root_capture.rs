//! Capture against the real kernel: what is in the ring is what was written, and a cut is exact.

#![allow(missing_docs, unsafe_code)]

mod capture;
mod rig;
mod storm;

use capture::{Field, GROUP, Setting, Tally};
use doublure::cut::StreamPlant;
use doublure::model::{BLOCK_BYTES, Uuid};
use doublure::tracker::{Captured, Plant, Tracker, What};
use rig::{Loop, Pins};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
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
    capture
        .walk(to, &mut |volume, record| {
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

/// What the storm takes for a volume: a device, and where its bytes are in the group's.
struct Part {
    path: PathBuf,
    volume: u32,
    start: u64,
    bytes: u64,
    modes: Vec<Mode>,
}

/// A storm on raw devices and how it is cut.
struct Run {
    name: &'static str,
    seed: u64,
    generations: u64,
    loops: Vec<Loop>,
    parts: Vec<Part>,
    options: Options,
    setting: Setting,
    /// Successes are read back: the place below may be full.
    read_back: bool,
}

impl Run {
    fn new(name: &'static str, seed: u64, generations: u64, loops: Vec<Loop>) -> Run {
        let modes = vec![Mode::Direct, Mode::Buffered, Mode::Mapped, Mode::Ring];
        let part = |(volume, made): (u32, &Loop)| Part {
            path: made.path().into(),
            volume,
            start: 0,
            // The storm leaves a last part of a block alone.
            bytes: made.identity().size_bytes / BLOCK_BYTES * BLOCK_BYTES,
            modes: modes.clone(),
        };
        let parts = (0..).zip(&loops).map(part).collect();
        // The checker must keep up on a machine that has other things to do.
        let rest = Duration::from_millis(20);
        let options = Options { chains: vec![(0, 1, false), (1, 0, true)], depth: 512, rest, ..Options::default() };
        Run { name, seed, generations, loops, parts, options, setting: Setting::default(), read_back: false }
    }

    /// Every generation is checked as it comes, and everything at the end. Gives what was seen, or the first thing that is wrong.
    fn go(self) -> (Tally, Result<(Checked, Summary), Wrong>) {
        let Run { name, seed, generations, loops, parts, options, setting, read_back } = self;
        let mut field = Field::new(name, seed, loops, setting);
        let target = |part: &Part| Target { modes: part.modes.clone(), read_back, ..Target::raw(&part.path, part.bytes) };
        let storm = Storm::start(seed, parts.iter().map(target).collect(), options);
        let outcome = judged(&mut field, &parts, storm, generations);
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

    /// Something is planted: that must be found.
    fn must_be_found(self) {
        let (name, seed, most) = (self.name, self.seed, self.generations);
        let (tally, outcome) = self.go();
        match outcome {
            Err(Wrong::Image(violation)) => println!("{name}: found in generation {}: {violation}", tally.generations),
            Err(Wrong::Cut(fault)) => panic!("{name}, DOUBLURE_SEED={seed}: no cut: {fault}"),
            Ok(_) => panic!("{name}, DOUBLURE_SEED={seed}: not found in {most} generations"),
        }
    }
}

fn judged(field: &mut Field, parts: &[Part], storm: Storm, generations: u64) -> Result<(Checked, Summary), Wrong> {
    let mut checker = storm.checker();
    let journal = storm.journal();
    let mut sum = Checked::default();
    let mut next = |field: &mut Field, checker: &mut Checker| {
        let cut = field.generation(&|| journal.now(), &mut |volume, at, bytes| {
            for (number, part) in (0..).zip(parts).filter(|(_, part)| part.volume == volume) {
                let (first, end) = (at.max(part.start), (at + bytes.len() as u64).min(part.start + part.bytes));
                if first < end {
                    checker.apply(number, first - part.start, &bytes[(first - at) as usize..(end - at) as usize]);
                }
            }
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
        if field.tally.generations.is_multiple_of(50) && std::env::var_os("DOUBLURE_PROGRESS").is_some() {
            field.tally.print("so far");
        }
    }
    let summary = storm.stop();
    next(field, &mut checker)?;
    let now = journal.now();
    checker.check(now, now).map_err(Wrong::Image)?;
    for (number, part) in (0..).zip(parts) {
        // The file is what the device holds, whatever a cache above it shows.
        let image = field.loops[part.volume as usize].image();
        let path = if part.start == 0 { &image } else { &part.path };
        checker.final_equal(number, path).map_err(Wrong::Image)?;
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
    let mut run = Run::new("large-ring", seed(), many(700), pair(24 * MIB));
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
    let mut loops = pair(8 * MIB);
    loops.push(Loop::new(8 * MIB + 3 * 4096 + 512));
    let mut run = Run::new("tiny-ring", seed(), many(600), loops);
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
    assert!(tally.rounds > 10 && tally.counts.holes > 100 && tally.counts.missed > 0, "{tally:?}");
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn cuts_now_and_then_are_exact_and_so_is_what_completed_between_them() {
    listen();
    let mut run = Run::new("interval", seed(), many(200), pair(12 * MIB));
    run.setting = Setting { interval: true, death_once_in: 60, rest: Duration::from_millis(20), ..Setting::default() };
    let (tally, ..) = run.holds();
    assert!(tally.receipts > 50, "{tally:?}");
}

/// What is rare luck elsewhere happens all the time; a cut must be exact all the same.
fn unlucky(name: &'static str, kernel: Plant) {
    listen();
    // Bios that another disk refuses have, by and by, the addresses of those that were written here.
    let beside = Loop::new(8 * MIB);
    let modes = vec![Mode::Ring; 3];
    let target = Target { modes, ..Target::raw(beside.path(), 8 * MIB) };
    let options = Options { depth: 512, rest: Duration::from_millis(5), ..Options::default() };
    let _noise = Storm::start(1, vec![target], options);
    for (interval, generations) in [(false, 80), (true, 30)] {
        let mut run = Run::new(name, seed(), many(generations), pair(8 * MIB));
        run.options.depth = 64;
        run.setting = Setting { kernel, interval, death_once_in: 30, rest: Duration::from_millis(20), ..Setting::default() };
        // A write that was in flight over a flip whose bits a receipt cleared, and that is in no table, is not among the dirty
        // blocks: the next flip says that it doubts, which is not what is tried here.
        run.setting.no_receipts = kernel == Plant::UnseenAndNotEntered;
        let (tally, ..) = run.holds();
        assert!(tally.counts.missed > 10, "{tally:?}");
    }
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn what_found_no_room_in_the_ring_is_read() {
    unlucky("no-room", Plant::NoRoom);
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn what_no_program_saw_to_complete_is_read() {
    unlucky("unseen", Plant::Unseen);
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn what_no_program_saw_to_complete_and_no_table_holds_is_read() {
    unlucky("not-entered", Plant::UnseenAndNotEntered);
}

/// Unmounted and gone at the end.
struct Mount(tempfile::TempDir);

impl Mount {
    fn new(source: &Path, kind: &str, options: &str) -> Mount {
        let dir = tempfile::Builder::new().prefix("doublure-capture-mnt").tempdir_in("/var/tmp").unwrap();
        rig::run("mount", &["-t", kind, "-o", options, source.to_str().unwrap(), dir.path().to_str().unwrap()]);
        Mount(dir)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let done = std::process::Command::new("umount").arg(self.0.path()).status();
        if !done.is_ok_and(|status| status.success()) {
            eprintln!("left mounted: {}", self.0.path().display());
        }
    }
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn cuts_are_exact_while_writes_fail_for_want_of_room_below() {
    listen();
    let small = Mount::new(Path::new("tmpfs"), "tmpfs", "size=10m");
    let loops = vec![Loop::on(small.0.path(), 32 * MIB, &[]), Loop::new(16 * MIB)];
    let mut run = Run::new("full-disk", seed(), many(150), loops);
    run.parts[0].modes = vec![Mode::Direct, Mode::Buffered, Mode::Ring];
    run.read_back = true;
    // Nothing else fails then.
    run.options.nowait = false;
    run.setting.rest = Duration::from_millis(60);
    let (.., summary) = run.holds();
    assert!(summary.failed > 0 && summary.failed < summary.writes, "{summary:?}");
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn cuts_are_exact_beside_the_largest_writes() {
    listen();
    let mut run = Run::new("largest", seed(), many(60), vec![Loop::new(512 * MIB), Loop::new(16 * MIB)]);
    run.parts[0].modes = vec![Mode::Direct];
    run.options.chains = vec![];
    run.options.largest = 512 << 20;
    run.options.large_once_in = 100;
    run.setting.rest = Duration::from_millis(50);
    run.options.rest = Duration::from_millis(5);
    let (tally, _, summary) = run.holds();
    assert!(summary.bytes > 512 * MIB && tally.rounds > 0, "{summary:?} {tally:?}");
}

/// A file system of its own for images.
fn below() -> (Loop, Mount) {
    let below = Loop::new(128 * MIB);
    rig::run("mkfs.ext4", &["-q", below.path().to_str().unwrap()]);
    let mount = Mount::new(below.path(), "ext4", "rw");
    (below, mount)
}

/// A run in which writes are in flight before, during and after each cut, which has a stream of its own.
fn in_flight(name: &'static str, generations: u64, place: &Path) -> Run {
    let loops = vec![Loop::on(place, 8 * MIB, &["--direct-io=on"]), Loop::on(place, 8 * MIB, &["--direct-io=off"])];
    let mut run = Run::new(name, seed(), generations, loops);
    run.setting.frozen_below = Some(place.into());
    run.setting.rest = Duration::from_millis(30);
    run.setting.interval = true;
    run
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn what_is_in_flight_all_through_a_cut_is_in_the_next() {
    listen();
    let (_below, place) = below();
    let (tally, ..) = in_flight("in-flight", many(100), place.0.path()).holds();
    assert!(tally.receipts > 20, "{tally:?}");
}

/// Makes a partition of a loop device and a node for it in `dir`.
fn partition(made: &Loop, number: i32, start: u64, bytes: u64, dir: &Path) -> PathBuf {
    #[repr(C)]
    struct Partition {
        start: i64,
        length: i64,
        number: i32,
        names: [u8; 128],
    }
    #[repr(C)]
    struct Argument {
        op: i32,
        flags: i32,
        datalen: i32,
        data: *mut Partition,
    }
    const BLKPG: libc::c_ulong = 0x1269;
    let mut data = Partition { start: start as i64, length: bytes as i64, number, names: [0; 128] };
    let argument = Argument { op: 1, flags: 0, datalen: size_of::<Partition>() as i32, data: &raw mut data };
    let device = std::fs::File::open(made.path()).unwrap();
    // SAFETY: BLKPG reads one `struct blkpg_ioctl_arg` and the `struct blkpg_partition` that it points to; both live here.
    let done = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&device), BLKPG as _, &raw const argument) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    let numbers = std::fs::read_to_string(format!("/sys/block/{0}/{0}p{number}/dev", made.name())).unwrap();
    let (major, minor) = numbers.trim().split_once(':').unwrap();
    let node = dir.join(format!("p{number}"));
    rig::run("mknod", &[node.to_str().unwrap(), "b", major, minor]);
    node
}

/// A storm on two partitions of one device, neither on a block, and on another device.
fn on_partitions(name: &'static str, seed: u64, generations: u64, dir: &Path) -> Run {
    let loops = vec![Loop::on(Path::new("/var/tmp"), 40 * MIB, &["--direct-io=on", "--partscan"]), Loop::new(12 * MIB)];
    let places = [(1, MIB + 3 * 512, 12 * MIB), (2, 20 * MIB + 5 * 512, 12 * MIB)];
    let paths = places.map(|(number, start, bytes)| partition(&loops[0], number, start, bytes, dir));
    let mut run = Run::new(name, seed, generations, loops);
    let modes = run.parts[0].modes.clone();
    run.parts.remove(0);
    for ((_, start, bytes), path) in places.into_iter().zip(paths) {
        run.parts.push(Part { path, volume: 0, start, bytes, modes: modes.clone() });
    }
    run.options.chains.push((2, 1, false));
    run
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn what_is_written_through_partitions_arrives_at_its_place() {
    listen();
    let nodes = tempfile::Builder::new().prefix("doublure-capture-dir").tempdir_in("/var/tmp").unwrap();
    on_partitions("partitions", seed(), many(150), nodes.path()).holds();
}

// ---- mounted file systems --------------------------------------------------------------------------------------------------

/// A loop device over a copy of a replica.
fn copy_of(replica: &Path, dir: &Path) -> Loop {
    let at = dir.join("copy");
    rig::run("cp", &["--reflink=auto", "--sparse=always", replica.to_str().unwrap(), at.to_str().unwrap()]);
    Loop::of(&at)
}

/// The storm writes files on two mounted volumes while they are cut; random generations are copied, mounted (the journal is
/// replayed), read and checked by the file system's own tool.
fn mounted(kind: &'static str, generations: u64, looks: u64) -> Tally {
    listen();
    let seed = seed();
    let (disk, bytes) = (if kind == "xfs" { 320 * MIB } else { 160 * MIB }, 12 * MIB);
    let setting = Setting { death_once_in: generations / 2, rest: Duration::from_millis(30), ..Setting::default() };
    let mut field = Field::new(kind, seed, pair(disk), setting);
    let dir = tempfile::Builder::new().prefix("doublure-capture-dir").tempdir_in("/var/tmp").unwrap();
    let replicas = ["one", "two"].map(|name| {
        let path = dir.path().join(name);
        std::fs::File::create(&path).unwrap().set_len(disk).unwrap();
        (std::fs::OpenOptions::new().write(true).open(&path).unwrap(), path)
    });
    let (options, check): (&str, &[&str]) = match kind {
        "xfs" => ("nouuid", &["xfs_repair", "-n"]),
        "btrfs" => ("rw", &["btrfs", "check", "--readonly"]),
        _ => ("rw", &["e2fsck", "-fn"]),
    };
    let mut mounts = Vec::new();
    for made in &field.loops {
        let force: &[&str] = if kind == "ext4" { &["-q"] } else { &["-q", "-f"] };
        rig::run(&format!("mkfs.{kind}"), &[force, &[made.path().to_str().unwrap()]].concat());
        mounts.push(Mount::new(made.path(), kind, "rw"));
        std::fs::write(mounts.last().unwrap().0.path().join("file"), vec![0; bytes as usize]).unwrap();
    }
    nix::unistd::sync();
    let targets = mounts.iter().map(|mount| Target::file(&mount.0.path().join("file"), bytes)).collect();
    let options_of_storm = Options {
        chains: vec![(0, 1, true), (1, 0, false)],
        trim: mounts.iter().map(|mount| mount.0.path().into()).collect(),
        rest: Duration::from_millis(5),
        ..Options::default()
    };
    let storm = Storm::start(seed, targets, options_of_storm);
    let (mut checker, journal) = (storm.checker(), storm.journal());
    let mut storm = Some(storm);
    let (mut sum, mut looked) = (Checked::default(), 0);
    for generation in 0..=generations {
        let last = generation == generations;
        if last {
            let summary = storm.take().unwrap().stop();
            println!("{kind}: {summary:?}");
        }
        let (low, high) = field
            .generation(&|| journal.now(), &mut |volume, at, bytes| replicas[volume as usize].0.write_all_at(bytes, at).unwrap())
            .unwrap_or_else(|fault| panic!("{kind}, DOUBLURE_SEED={seed}: {fault}"));
        if !last && !field.dice.once_in(generations / looks) {
            continue;
        }
        looked += 1;
        for (number, (_, replica)) in (0..).zip(&replicas) {
            let copy = copy_of(replica, dir.path());
            let mount = Mount::new(copy.path(), kind, options);
            checker.load(number, &mount.0.path().join("file"), 0).unwrap();
            drop(mount);
            rig::run(check[0], &[&check[1..], &[copy.path().to_str().unwrap()]].concat());
        }
        let checked = checker.check(low, high).unwrap_or_else(|v| panic!("{kind}, DOUBLURE_SEED={seed}, {generation}: {v}"));
        sum.required += checked.required;
        sum.changed += checked.changed;
        sum.links += checked.links;
    }
    let tally = field.finish();
    tally.print(kind);
    drop(mounts);
    println!("{kind}: mounted {looked} generations: {sum:?}");
    assert!(sum.required > 100 && sum.changed > 1000 && sum.links > 0, "{sum:?}");
    tally
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn replicas_of_mounted_ext4_are_whole_at_any_generation() {
    mounted("ext4", many(150), 4);
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn replicas_of_mounted_xfs_are_whole_at_any_generation() {
    mounted("xfs", many(150), 4);
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn replicas_of_mounted_btrfs_are_whole_at_any_generation() {
    mounted("btrfs", many(150), 4);
}

// ---- planted faults --------------------------------------------------------------------------------------------------------

/// A run in which a fault is planted; small volumes, so that what belongs together meets often.
fn planted(name: &'static str, change: impl Fn(&mut Run)) {
    let mut run = Run::new(name, seed(), 400, pair(8 * MIB));
    run.options.rest = Duration::from_millis(3);
    run.setting.rest = Duration::from_millis(5);
    change(&mut run);
    run.must_be_found();
}

/// A run in which nothing goes on but direct writes, one after the other, at few places.
fn narrow(run: &mut Run) {
    for part in &mut run.parts {
        part.modes = vec![Mode::Direct];
        part.bytes = 256 << 10;
    }
    run.options.chains.truncate(1);
    run.options.rest = Duration::from_micros(100);
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn faults_in_the_order_of_a_cut_are_found() {
    listen();
    planted("drop-records", |run| run.setting.plant = StreamPlant::DropRecords(50));
    planted("swap-records", |run| {
        narrow(run);
        run.setting.plant = StreamPlant::SwapRecords;
    });
    planted("cut-before-read", |run| {
        run.setting.plant = StreamPlant::CutBeforeRead;
        run.setting.ring_bytes = 1 << 20;
    });
    planted("cut-inside-record", |run| run.setting.plant = StreamPlant::CutInsideRecord);
    planted("two-stores", |run| {
        run.setting.plant = StreamPlant::TwoStores;
        run.setting.flip_once_in = 2;
    });
    // What finds no room is found by the counters alone.
    planted("counters-first", |run| {
        run.setting.plant = StreamPlant::CountersFirst;
        run.setting.kernel = Plant::NoRoom;
    });
    planted("old-over-round", |run| {
        run.setting.plant = StreamPlant::OldOverRound;
        run.setting.ring_bytes = 1 << 20;
        run.setting.cut_max_bytes = 256 << 10;
    });
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn faults_in_the_programs_are_found() {
    listen();
    planted("next-page", |run| run.setting.kernel = Plant::NextPage);
    planted("lose-holes", |run| run.setting.kernel = Plant::LoseHoles);
    planted("lose-data", |run| run.setting.kernel = Plant::LoseData);
    let nodes = tempfile::Builder::new().prefix("doublure-capture-dir").tempdir_in("/var/tmp").unwrap();
    let mut run = on_partitions("own-device", seed(), 400, nodes.path());
    run.setting.kernel = Plant::OwnDevice;
    run.must_be_found();
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn bits_that_go_or_stay_at_the_wrong_time_are_found() {
    listen();
    // Nobody waits for writes in flight, since their completion sets the bit again: without that they are lost.
    let (_below, place) = below();
    let mut run = in_flight("submit-only", 100, place.0.path());
    run.setting.kernel = Plant::SubmitOnly;
    run.must_be_found();
    planted("early-receipts", |run| {
        run.setting.early_receipts = true;
        run.setting.flip_once_in = 3;
        run.setting.death_once_in = 5;
    });
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn many_small_zeroes_behind_a_slow_peer_do_not_fill_memory() {
    use std::os::fd::AsRawFd;
    let pins = Pins::new("zeroes");
    let mut tracker = Tracker::open(&pins.0).unwrap();
    tracker.prepare_capture(Path::new("/var/tmp")).unwrap();
    let device = Loop::new(64 << 20);
    tracker.track(GROUP, VOLUME, &device.identity()).unwrap();
    let tracker = std::sync::Mutex::new(tracker);
    let image = doublure::device::DeviceFile::open(&device.image(), false).unwrap();
    let identity = doublure::host::identity(device.path()).unwrap();
    let sources = [doublure::cut::Source { id: VOLUME, name: "zeroes", device: device.path().into(), identity, image: &image }];
    let mut stream = doublure::cut::Stream::open(&tracker, GROUP, &sources, 16 << 20).unwrap();
    let direct = device.direct();
    // BLKZEROOUT, a quarter of a MiB each: what comes while a peer owes us credit.
    for at in 0..30_000u64 {
        let mut range = [at % 256 * (256 << 10), 256 << 10];
        // SAFETY: the ioctl reads two 64-bit numbers.
        let done = unsafe { nix::libc::ioctl(direct.as_raw_fd(), 0x127f, range.as_mut_ptr()) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }
    direct.write_all_at(&memmap2::MmapMut::map_anon(4096).unwrap(), 0).unwrap();
    let limits = doublure::cut::Limits { freeze_deadline: Duration::from_secs(2), cut_max_bytes: 128 << 20 };
    let mut engine = doublure::device::engine(doublure::model::EngineKind::Auto, 32).unwrap();
    let step = stream.look(&tracker, &sources, engine.as_mut(), limits).unwrap();
    println!("{} parts gathered, {:?}", stream.gathered(), stream.counts());
    assert_eq!(step, doublure::cut::Step::Cut);
    assert!(stream.gathered() < (1 << 20) + 64 + 64 * 4096, "{} parts", stream.gathered());
    stream.close(&tracker).unwrap();
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn one_write_that_found_no_room_does_not_have_a_round_shipped_again() {
    let pins = Pins::new("again");
    let mut tracker = Tracker::open_planted(&pins.0, Plant::NoRoom).unwrap();
    tracker.prepare_capture(Path::new("/var/tmp")).unwrap();
    let device = Loop::new(64 << 20);
    tracker.track(GROUP, VOLUME, &device.identity()).unwrap();
    let tracker = std::sync::Mutex::new(tracker);
    let image = doublure::device::DeviceFile::open(&device.image(), false).unwrap();
    let identity = doublure::host::identity(device.path()).unwrap();
    let sources = [doublure::cut::Source { id: VOLUME, name: "again", device: device.path().into(), identity, image: &image }];
    let mut stream = doublure::cut::Stream::open(&tracker, GROUP, &sources, 16 << 20).unwrap();
    let direct = device.direct();
    let limits = doublure::cut::Limits { freeze_deadline: Duration::from_secs(2), cut_max_bytes: MIB };
    let mut engine = doublure::device::engine(doublure::model::EngineKind::Auto, 32).unwrap();
    let lost = |sector: &u64| sector.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58 == 7;
    let unlucky = (0..16_384u64).map(|block| block * 8).find(lost).unwrap();
    let page = memmap2::MmapMut::map_anon(4 << 20).unwrap();
    // A burst: 32 MiB in holes, shipped in a round.
    for at in 0..8 {
        direct.write_all_at(&page[..], at * (4 << 20)).unwrap();
    }
    let mut look = || stream.look(&tracker, &sources, engine.as_mut(), limits).unwrap();
    let blocks = |step: doublure::cut::Step| match step {
        doublure::cut::Step::Large(sets) => sets.iter().map(|set| set.count()).sum::<u64>(),
        doublure::cut::Step::Cut => 0,
    };
    println!("the burst: {} blocks", blocks(look()));
    for _ in 0..4 {
        // The round is shipped meanwhile; one block is written.
        direct.write_all_at(&page[..4096], unlucky * 512).unwrap();
        let again = blocks(look());
        println!("after one block more: {again} blocks to be shipped");
        assert!(again < 100, "{again} blocks are shipped again for one");
    }
}
