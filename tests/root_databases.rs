//! Databases under load on two volumes of one group: every cut of the continuous capture is a state that they start from, with no
//! repair, and what is found there is a prefix of what was acknowledged.
//!
//! PostgreSQL has its data on one volume (ext4) and its log on the other (XFS); SQLite databases on both wait for each other. The real
//! capture makes a generation every 100 ms, through a ring and a limit so small that there are holes and rounds. Each generation is
//! applied to copies on a file system that clones files in one instant; at random ones both copies are cloned. Later each pair of
//! clones is mounted, and its databases are started: `tests/databases/databases.py` says what they hold, and `judge` compares it with
//! the log of acknowledgements. `DOUBLURE_LONG=1` takes ten times as many states.

mod rig;

use doublure::cut::{Change, Limits, Source, Step, Stream, StreamCounts, StreamPlant};
use doublure::device::{DeviceFile, Engine, engine};
use doublure::model::{BLOCK_BYTES, BlockRun, BlockSet, Digest, EngineKind, Position, Receipt, Res, Uuid};
use doublure::tracker::{Base, Tracker};
use rig::{Loop, Pins, run};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const GROUP: Uuid = Uuid(*b"databases group.");
const VOLUMES: [(Uuid, &str); 2] = [(Uuid(*b"databases data.."), "data"), (Uuid(*b"databases log..."), "log")];
const PYTHON: &str = "/usr/bin/python3";
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/databases/databases.py");
const VOLUME_BYTES: u64 = 512 * MIB;
/// Small: a checkpoint of the database alone fills it.
const RING_BYTES: u32 = 4 << 20;
const CUT_MAX_BYTES: u64 = 3 << 20;
/// How many states are taken in one run of the load.
const STATES: usize = 50;
/// How many states are started at the same time.
const CHECKERS: usize = 4;

fn now_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

/// Numbers that follow from a seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }
}

// ---- what was promised, and what is there --------------------------------------------------------------------------

/// When a row was sent and when its commit was acknowledged; CLOCK_MONOTONIC, in nanoseconds.
#[derive(Clone, Copy)]
struct Row {
    sent: u64,
    acknowledged: u64,
}

/// The rows of each writer, the first one numbered 1.
type Log = BTreeMap<String, Vec<Row>>;

fn read_log(path: &Path) -> Log {
    let mut log = Log::new();
    for line in std::fs::read_to_string(path).unwrap().lines() {
        let [writer, n, sent, acknowledged] = line.split(' ').collect::<Vec<_>>().try_into().unwrap();
        let rows = log.entry(writer.to_string()).or_default();
        rows.push(Row { sent: sent.parse().unwrap(), acknowledged: acknowledged.parse().unwrap() });
        assert_eq!(rows.len().to_string(), n, "the log of {writer}");
    }
    log
}

/// What is wrong with a cut made between two times that holds the first `found` rows of each writer.
///
/// 1. A row that was sent after the cut cannot be there. 2. A row that was acknowledged before the cut began is there. 3. So is
///    one that was acknowledged before any row that is there was sent, whoever wrote the two.
fn judge(log: &Log, found: &BTreeMap<String, u64>, t_low: u64, t_high: u64) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut latest = (t_low, "the cut".to_string());
    for (writer, rows) in log {
        let Some(found) = found.get(writer) else {
            wrong.push(format!("{writer} was not looked for"));
            continue;
        };
        let found = *found as usize;
        if found > rows.len() {
            wrong.push(format!("{writer}: {found} rows, but {} were sent", rows.len()));
        } else if let Some(last) = found.checked_sub(1).map(|last| rows[last]) {
            if last.sent > t_high {
                wrong.push(format!("{writer}: row {found} was sent {} ns after the cut", last.sent - t_high));
            }
            if last.sent > latest.0 {
                latest = (last.sent, format!("row {found} of {writer}, which is there"));
            }
        }
    }
    for (writer, rows) in log {
        let Some(found) = found.get(writer).map(|found| *found as usize) else { continue };
        let lost: Vec<_> = rows.iter().skip(found).take_while(|row| row.acknowledged < latest.0).collect();
        if let Some(first) = lost.first() {
            let (before, what) = (latest.0 - first.acknowledged, &latest.1);
            wrong.push(format!(
                "{writer}: {} rows after {found} are lost, the first acknowledged {before} ns before {what}",
                lost.len()
            ));
        }
    }
    wrong
}

#[test]
fn the_judge_sees_what_is_lost_early_or_out_of_order() {
    let rows = |times: &[(u64, u64)]| {
        times.iter().map(|(sent, acknowledged)| Row { sent: *sent, acknowledged: *acknowledged }).collect()
    };
    let log: Log = [("a".into(), rows(&[(10, 20), (30, 40), (50, 60)])), ("b".into(), rows(&[(22, 32), (42, 52)]))].into();
    let found = |a, b| BTreeMap::from([("a".to_string(), a), ("b".to_string(), b)]);
    let wrong = |a, b, low, high| judge(&log, &found(a, b), low, high).len();
    assert_eq!((wrong(2, 1, 41, 45), wrong(2, 2, 41, 45), wrong(1, 1, 35, 36)), (0, 0, 0));
    // Acknowledged before the cut; sent after it; before another row that is there; never sent; never looked for.
    assert_eq!((wrong(1, 1, 41, 45), wrong(2, 0, 33, 45), wrong(0, 0, 50, 55)), (1, 1, 2));
    assert_eq!((wrong(3, 2, 41, 45), wrong(2, 2, 30, 40)), (1, 1));
    assert_eq!((wrong(0, 1, 15, 45), wrong(1, 2, 35, 45)), (1, 1));
    assert_eq!(wrong(4, 2, 61, 65), 1);
    assert_eq!(judge(&log, &BTreeMap::from([("a".to_string(), 0)]), 5, 6).len(), 1);
}

// ---- processes in a world of their own -----------------------------------------------------------------------------

/// The script in namespaces of its own: when it goes, everything goes that it started or mounted.
struct World {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl World {
    fn start(arguments: &[&str]) -> World {
        let mut child = Command::new("unshare")
            .args([
                "--mount",
                "--pid",
                "--ipc",
                "--net",
                "--fork",
                "--kill-child=SIGKILL",
                "--mount-proc",
                "--",
                PYTHON,
                "-B",
                SCRIPT,
            ])
            .args(arguments)
            .env("LC_ALL", "C.UTF-8")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        World { child, out }
    }
    /// Its next line; what went wrong stands on our own standard error when there is none.
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        assert!(line.ends_with('\n'), "the script ended early");
        line.trim().to_string()
    }
    /// Waits for a good end.
    fn end(mut self) {
        let status = self.child.wait().unwrap();
        assert!(status.success(), "the script ended with {status}");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // Its first process: the kernel ends all others with it, and `unshare` has nothing left to wait for.
            let id = self.child.id();
            let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
            match children.trim().parse() {
                Ok(first) => drop(nix::sys::signal::kill(nix::unistd::Pid::from_raw(first), nix::sys::signal::Signal::SIGKILL)),
                Err(_) => drop(self.child.kill()),
            }
            let _gone = self.child.wait();
        }
    }
}

// ---- the stage -----------------------------------------------------------------------------------------------------

/// A mounted file system that clones files.
struct Below(PathBuf);

impl Below {
    fn new(disk: &Loop, at: PathBuf) -> Below {
        run("mkfs.xfs", &["-q", "-m", "reflink=1", &path_of(disk)]);
        std::fs::create_dir(&at).unwrap();
        run("mount", &[&path_of(disk), at.to_str().unwrap()]);
        Below(at)
    }
}

impl Drop for Below {
    fn drop(&mut self) {
        // Lazily: a loop device that was told to go may need a moment.
        let _gone = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// Fields go in this order: whoever uses something goes before it.
struct Stage {
    /// The copies and their clones lie here.
    below: Below,
    _disk: Loop,
    volumes: [Loop; 2],
    pins: Pins,
    dir: tempfile::TempDir,
}

impl Stage {
    fn new(name: &str) -> Stage {
        let dir = tempfile::Builder::new().prefix("doublure-databases").tempdir_in("/var/tmp").unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir(&root).unwrap();
        run(PYTHON, &["-B", SCRIPT, "root", root.to_str().unwrap()]);
        let volumes = [Loop::new(VOLUME_BYTES), Loop::new(VOLUME_BYTES)];
        run("mkfs.ext4", &["-q", "-E", "nodiscard", &path_of(&volumes[0])]);
        run("mkfs.xfs", &["-q", "-K", &path_of(&volumes[1])]);
        let disk = Loop::new(24 << 30);
        let below = Below::new(&disk, dir.path().join("below"));
        Stage { below, _disk: disk, volumes, pins: Pins::new(name), dir }
    }
    fn root(&self) -> String {
        self.dir.path().join("root").to_str().unwrap().into()
    }
    fn acks(&self) -> PathBuf {
        self.dir.path().join("acknowledged")
    }
    fn copy(&self, volume: usize) -> PathBuf {
        self.below.0.join(VOLUMES[volume].1)
    }
    fn load(&self, seed: u64) -> World {
        let [first, second] = [0, 1].map(|volume| path_of(&self.volumes[volume]));
        World::start(&["load", &self.root(), &first, &second, self.acks().to_str().unwrap(), &seed.to_string()])
    }
}

fn path_of(device: &Loop) -> String {
    format!("/dev/{}", device.name())
}

/// A copy of a volume, as a standby has it.
struct Replica(File);

impl Replica {
    fn write(&self, change: &Change<'_>) {
        match change {
            Change::Blocks(run, bytes) => self.write_run(*run, bytes),
            Change::Sectors(first, bytes) => self.0.write_all_at(bytes, first * 512).unwrap(),
        }
    }
    fn write_run(&self, run: BlockRun, bytes: &[u8]) {
        let at = run.start * BLOCK_BYTES;
        // Large volumes are mostly nothing.
        if bytes.iter().any(|byte| *byte != 0) {
            self.0.write_all_at(bytes, at).unwrap();
        } else {
            let hole = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
            nix::fcntl::fallocate(&self.0, hole, at as i64, bytes.len() as i64).unwrap();
        }
    }
}

/// What a standby says when a generation is safe with it.
struct Applied(Position, Digest);

impl Receipt for Applied {
    fn position(&self) -> Position {
        self.0
    }
    fn digest(&self) -> Digest {
        self.1
    }
}

/// Both copies at one generation.
struct State {
    generation: u64,
    clones: [PathBuf; 2],
    t_low: u64,
    t_high: u64,
}

/// The capture of the group, from cut to cut.
struct Cutter<'a> {
    tracker: &'a Mutex<Tracker>,
    sources: &'a [Source<'a>],
    stream: Stream,
    engine: Box<dyn Engine>,
    replicas: [Replica; 2],
    generation: u64,
    /// Generations with a hole in them.
    holed: u64,
    rounds: u64,
    flips: u64,
    refused: u64,
}

impl Cutter<'_> {
    /// The next generation, applied. Gives the times between which it was cut.
    fn cut(&mut self) -> (u64, u64) {
        let holes = self.stream.counts().holes;
        let limits = Limits { freeze_deadline: Duration::from_secs(2), cut_max_bytes: CUT_MAX_BYTES };
        let t_low = loop {
            let t_low = now_ns();
            match self.stream.look(self.tracker, self.sources, self.engine.as_mut(), limits) {
                Ok(Step::Cut) => break t_low,
                Ok(Step::Large(sets)) => self.round(&sets),
                // The agent tries again too.
                Err(fault) if fault.code == doublure::model::Code::CutNotExact => self.refused += 1,
                Err(fault) => panic!("{fault}"),
            }
        };
        let t_high = now_ns();
        let replicas = &self.replicas;
        self.stream
            .emit(&mut |volume, change| {
                replicas[usize::from(volume)].write(&change);
                Ok(())
            })
            .unwrap();
        self.generation += 1;
        self.holed += u64::from(self.stream.counts().holes > holes);
        (t_low, t_high)
    }
    /// What is too large for a cut is copied while it changes. No instant yet: one comes with the cut.
    fn round(&mut self, sets: &[BlockSet]) {
        self.rounds += 1;
        for ((set, source), replica) in sets.iter().zip(self.sources).zip(&self.replicas) {
            let mut write = |run: BlockRun, bytes: &[u8]| -> Res<()> {
                replica.write_run(run, bytes);
                Ok(())
            };
            doublure::reader::read(self.engine.as_mut(), source.image, set, &mut write).unwrap();
        }
    }
    /// A half of the bitmap begins, and what was taken leaves after the next cut, as it does with a standby's receipt.
    fn checkpoint(&mut self) -> (u64, u64) {
        self.flips += 1;
        self.stream.flip(self.tracker).unwrap();
        let times = self.cut();
        let place = (Position { epoch: 1, generation: self.generation }, Digest([self.generation as u8; 32]));
        let mut tracker = self.tracker.lock().unwrap();
        tracker.set_base(GROUP, Base { acked: Default::default(), pending: place }).unwrap();
        tracker.release(GROUP, &Applied(place.0, place.1)).unwrap();
        times
    }
    /// Until the next look: 100 ms, or less when the ring fills, as the agent does it; now and then longer, whatever the ring says.
    fn pause(&self, dice: &mut Dice) {
        let stalled = dice.below(25) == 0;
        let next = Instant::now() + Duration::from_millis(if stalled { 100 + dice.below(500) } else { 100 });
        while Instant::now() < next && (stalled || self.stream.capture().used_bytes() * 4 < self.stream.capture().size_bytes()) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// What one run of the load left behind.
struct Harvest {
    states: Vec<State>,
    log: Log,
    /// What the stream saw after the first cut.
    holes: u64,
    holed: u64,
    rounds: u64,
    counts: StreamCounts,
    flips: u64,
    refused: u64,
    generations: u64,
    load_seconds: f64,
    /// What differs between the volumes and the copies after the end: blocks, and what of it can be seen in files.
    differing: (u64, Vec<String>),
}

/// Runs the databases, cuts while they run, and clones both copies at random generations.
fn harvest(stage: &Stage, wanted: usize, mean_gap_ms: u64, plant: StreamPlant, dice: &mut Dice) -> Harvest {
    let mut load = stage.load(dice.below(1 << 40));
    assert_eq!(load.line(), "ready");
    let mut tracker = Tracker::open(&stage.pins.0).unwrap();
    tracker.prepare_capture(Path::new("/var/tmp")).unwrap();
    let images: Vec<_> = stage.volumes.iter().map(|volume| DeviceFile::open(&volume.image(), false).unwrap()).collect();
    let mut sources = Vec::new();
    for ((volume, image), (id, name)) in stage.volumes.iter().zip(&images).zip(VOLUMES) {
        let identity = volume.identity();
        tracker.track(GROUP, id, &identity).unwrap();
        tracker.mark(id, &BlockSet::full(volume.blocks())).unwrap();
        sources.push(Source { id, name, device: path_of(volume).into(), identity, image });
    }
    let tracker = Mutex::new(tracker);
    let replicas = [0, 1].map(|volume| {
        let file = File::create(stage.copy(volume)).unwrap();
        file.set_len(VOLUME_BYTES).unwrap();
        Replica(file)
    });
    let stream = Stream::open(&tracker, GROUP, &sources, RING_BYTES).unwrap();
    let engine = engine(EngineKind::Auto, 32).unwrap();
    let mut cutter = Cutter {
        tracker: &tracker,
        sources: &sources,
        stream,
        engine,
        replicas,
        generation: 0,
        holed: 0,
        rounds: 0,
        flips: 0,
        refused: 0,
    };
    // The first generation is the whole of both, read while the databases write; the flip lets its bits go.
    cutter.cut();
    cutter.checkpoint();
    cutter.stream.plant(plant);
    let (first_counts, first_rounds, began) = (cutter.stream.counts(), cutter.rounds, Instant::now());
    let mut states: Vec<State> = Vec::new();
    let mut due = Instant::now() + Duration::from_millis(mean_gap_ms);
    while states.len() < wanted {
        cutter.pause(dice);
        let (t_low, t_high) = match dice.below(30) {
            0 => cutter.checkpoint(),
            _ => cutter.cut(),
        };
        if Instant::now() >= due {
            due = Instant::now() + Duration::from_millis(dice.below(2 * mean_gap_ms));
            let clones = [0, 1].map(|volume| {
                let clone = stage.copy(volume).with_extension(states.len().to_string());
                run("cp", &["--reflink=always", stage.copy(volume).to_str().unwrap(), clone.to_str().unwrap()]);
                clone
            });
            states.push(State { generation: cutter.generation, clones, t_low, t_high });
        }
        assert!(load.child.try_wait().unwrap().is_none(), "the load ended early");
    }
    let load_seconds = began.elapsed().as_secs_f64();
    drop(load.child.stdin.take());
    let told = loop {
        // The databases close their files and the volumes are unmounted: captured like anything else.
        cutter.cut();
        let mut fds = [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(load.out.get_ref()), nix::poll::PollFlags::POLLIN)];
        if nix::poll::poll(&mut fds, 100u8).unwrap() > 0 {
            break load.line();
        }
    };
    assert_eq!(told, r#"{"failures": []}"#);
    load.end();
    cutter.cut();
    let counts = cutter.stream.counts();
    let Cutter { stream, rounds, flips, refused, generation, holed, .. } = cutter;
    stream.close(&tracker).unwrap();
    let differing = differing(stage);
    Harvest {
        states,
        log: read_log(&stage.acks()),
        holes: counts.holes - first_counts.holes,
        holed,
        rounds: rounds - first_rounds,
        counts,
        flips,
        refused,
        generations: generation,
        load_seconds,
        differing,
    }
}

/// Compares the volumes, which nobody writes any more, with the copies.
fn differing(stage: &Stage) -> (u64, Vec<String>) {
    let mut blocks = 0;
    let (mut ours, mut theirs) = (vec![0; MIB as usize], vec![0; MIB as usize]);
    for volume in 0..2 {
        let (image, copy) = (File::open(stage.volumes[volume].image()).unwrap(), File::open(stage.copy(volume)).unwrap());
        for at in (0..VOLUME_BYTES).step_by(MIB as usize) {
            image.read_exact_at(&mut ours, at).unwrap();
            copy.read_exact_at(&mut theirs, at).unwrap();
            if ours != theirs {
                let pairs = ours.chunks(BLOCK_BYTES as usize).zip(theirs.chunks(BLOCK_BYTES as usize));
                blocks += pairs.filter(|(a, b)| a != b).count() as u64;
            }
        }
    }
    if blocks == 0 {
        return (0, Vec::new());
    }
    let [first, second] = [0, 1].map(|volume| path_of(&stage.volumes[volume]));
    let [first_copy, second_copy] = [0, 1].map(|volume| stage.copy(volume));
    let (first_copy, second_copy) = (first_copy.to_str().unwrap(), second_copy.to_str().unwrap());
    let mut world = World::start(&["same", &stage.root(), &first, &second, first_copy, second_copy]);
    let seen = serde_json::from_str(&world.line()).unwrap();
    world.end();
    (blocks, seen)
}

/// What the databases of one state hold.
struct Checked {
    wrong: Vec<String>,
    rows: u64,
    recovery_ms: Option<u64>,
}

/// Mounts a state and starts its databases. `sampled`: the file systems and all of PostgreSQL's tables and indices are checked too.
fn check(stage: &Stage, log: &Log, state: &State, sampled: bool) -> Checked {
    let [first, second] = state.clones.each_ref().map(|clone| clone.to_str().unwrap());
    let mut world = World::start(&["state", &stage.root(), first, second, if sampled { "1" } else { "0" }]);
    let told: serde_json::Value = serde_json::from_str(&world.line()).unwrap();
    world.end();
    let mut wrong: Vec<String> = serde_json::from_value(told["wrong"].clone()).unwrap();
    let rows: BTreeMap<String, u64> = serde_json::from_value(told["rows"].clone()).unwrap();
    wrong.extend(judge(log, &rows, state.t_low, state.t_high));
    Checked { wrong, rows: rows.values().sum(), recovery_ms: told["recovery_ms"].as_u64() }
}

fn seed() -> Dice {
    let seed = now_ns() | 1;
    println!("seed {seed}");
    Dice(seed)
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn every_cut_is_a_state_that_databases_start_from() {
    let mut dice = seed();
    let turns = if std::env::var_os("DOUBLURE_LONG").is_some() { 10 } else { 1 };
    for turn in 1..=turns {
        let stage = Stage::new("databases");
        let harvest = harvest(&stage, STATES, 500, StreamPlant::Nothing, &mut dice);
        let (next, began) = (AtomicUsize::new(0), Instant::now());
        let checked = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..CHECKERS {
                scope.spawn(|| {
                    while let Some(state) = harvest.states.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let found = check(&stage, &harvest.log, state, state.generation % 6 == 0);
                        checked.lock().unwrap().push((state.generation, found));
                        state.clones.iter().for_each(|clone| std::fs::remove_file(clone).unwrap());
                    }
                });
            }
        });
        let checked = checked.into_inner().unwrap();
        let rows: Vec<_> = checked.iter().map(|(_, found)| found.rows).collect();
        let recovery: Vec<_> = checked.iter().filter_map(|(_, found)| found.recovery_ms).collect();
        println!(
            "turn {turn}: {} states of {} generations, {} transactions acknowledged in {:.1} s, {} to {} of them found, recovery in {} to {} ms, \
             {} holes in {} generations, {} rounds, {} looks that missed something, {} flips, {} looks refused, {} MiB captured, checked in {:.1} s",
            checked.len(),
            harvest.generations,
            harvest.log.values().map(Vec::len).sum::<usize>(),
            harvest.load_seconds,
            rows.iter().min().unwrap(),
            rows.iter().max().unwrap(),
            recovery.iter().min().unwrap_or(&0),
            recovery.iter().max().unwrap_or(&0),
            harvest.holes,
            harvest.holed,
            harvest.rounds,
            harvest.counts.missed,
            harvest.flips,
            harvest.refused,
            harvest.counts.captured_bytes / MIB,
            began.elapsed().as_secs_f64(),
        );
        let wrong: Vec<_> =
            checked.iter().filter(|(_, found)| !found.wrong.is_empty()).map(|(g, found)| (g, &found.wrong)).collect();
        assert!(wrong.is_empty(), "{wrong:#?}");
        let (blocks, seen) = &harvest.differing;
        println!("after the end {blocks} blocks differ; in files: {seen:?}");
        assert!(seen.is_empty(), "{seen:#?}");
        assert_eq!(recovery.len(), STATES);
        assert!(rows.iter().max() > rows.iter().min(), "nothing was written");
        assert!(harvest.holed < harvest.generations, "every cut had a hole: the ring is too small for this load");
        assert!(
            harvest.holes > 0 && harvest.rounds > 0 && harvest.flips > 1,
            "nothing was missing from the ring: it or the limit is too large for this load"
        );
    }
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_capture_that_drops_records_is_found_out_by_the_databases() {
    let mut dice = seed();
    let stage = Stage::new("databases-plant");
    let harvest = harvest(&stage, 6, 500, StreamPlant::DropRecords(20), &mut dice);
    let mut wrong = Vec::new();
    for state in &harvest.states {
        wrong = check(&stage, &harvest.log, state, true).wrong;
        if !wrong.is_empty() {
            println!("found in generation {}: {wrong:#?}", state.generation);
            break;
        }
    }
    assert!(!wrong.is_empty(), "one record in 20 was dropped, and {} states of databases are fine", harvest.states.len());
    let (blocks, seen) = &harvest.differing;
    println!("after the end {blocks} blocks differ; in files: {seen:?}");
    assert!(!seen.is_empty(), "one record in 20 was dropped, and the copies are what the volumes are");
}
