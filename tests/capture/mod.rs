//! One group under capture: loop devices, a tracker, a stream of cuts, agents that die, and receipts that come or not.
//!
//! What a generation holds goes to whoever keeps the replica; whether it is right is the checker's business.

use crate::rig::{Loop, Pins};
use doublure::cut::{Change, Limits, Source, Step, Stream, StreamCounts, StreamPlant};
use doublure::device::{DeviceFile, Engine, engine};
use doublure::host::DeviceIdentity;
use doublure::model::{BLOCK_BYTES, BlockSet, Code, Digest, EngineKind, Position, Receipt, Res, Uuid};
use doublure::tracker::{Base, Continuity, Plant, Tracker};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::storm::Dice;

pub const GROUP: Uuid = Uuid(*b"group one.......");
/// Where the tracker makes its scratch devices.
const SCRATCH: &str = "/var/tmp";
/// So often may a cut be given up in a row, each time after many reads, before the test is.
const PATIENCE: u32 = 40;
/// Rounds before a cut, after which there will be none.
const LARGES_MAX: u32 = 500;

/// How a group is run.
#[derive(Clone, Debug)]
pub struct Setting {
    pub ring_bytes: u32,
    pub cut_max_bytes: u64,
    pub plant: StreamPlant,
    pub kernel: Plant,
    /// One generation in so many begins with a flip (a checkpoint); 0 = none.
    pub flip_once_in: u64,
    /// After one generation in so many the agent dies; 0 = never.
    pub death_once_in: u64,
    /// Each generation has a stream of its own.
    pub interval: bool,
    /// Nothing is taken out of the ring for up to so long between two cuts.
    pub rest: Duration,
    /// Bits are cleared by receipts before what they stand for was cut.
    pub early_receipts: bool,
    /// No receipt ever comes.
    pub no_receipts: bool,
    /// The file system of the images, frozen from before a generation to its end: what is in flight stays there all the time.
    pub frozen_below: Option<PathBuf>,
}

/// A frozen file system.
struct Frozen(PathBuf);

impl Frozen {
    fn new(mount: &Path) -> Frozen {
        crate::rig::run("fsfreeze", &["--freeze", mount.to_str().unwrap()]);
        Frozen(mount.into())
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let done = std::process::Command::new("fsfreeze").arg("--unfreeze").arg(&self.0).status();
        if !done.is_ok_and(|status| status.success()) {
            eprintln!("left frozen: {}", self.0.display());
        }
    }
}

impl Default for Setting {
    fn default() -> Setting {
        Setting {
            ring_bytes: 16 << 20,
            cut_max_bytes: 32 << 20,
            plant: StreamPlant::Nothing,
            kernel: Plant::Nothing,
            flip_once_in: 10,
            death_once_in: 0,
            interval: false,
            rest: Duration::ZERO,
            early_receipts: false,
            no_receipts: false,
            frozen_below: None,
        }
    }
}

/// What was seen.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub generations: u64,
    pub rounds: u64,
    pub flips: u64,
    pub receipts: u64,
    pub deaths: u64,
    /// Looks that gave a cut up.
    pub inexact: u64,
    /// Deaths after which the bits were in doubt, so that everything was marked.
    pub doubts: u64,
    pub applied_bytes: u64,
    pub counts: StreamCounts,
    pub took: Duration,
}

impl Tally {
    pub fn print(&self, what: &str) {
        println!(
            "{what}: {} generations in {:.1} s; captured {} MiB, read again {} MiB, applied {} MiB; {} holes, {} rounds, {} looks that \
             missed something, {} cuts given up; {} flips, {} receipts, {} deaths ({} in doubt)",
            self.generations,
            self.took.as_secs_f64(),
            self.counts.captured_bytes >> 20,
            self.counts.reread_bytes >> 20,
            self.applied_bytes >> 20,
            self.counts.holes,
            self.rounds,
            self.counts.missed,
            self.inexact,
            self.flips,
            self.receipts,
            self.deaths,
            self.doubts
        );
    }
}

struct TestReceipt(Position, Digest);

impl Receipt for TestReceipt {
    fn position(&self) -> Position {
        self.0
    }
    fn digest(&self) -> Digest {
        self.1
    }
}

struct Volume {
    id: Uuid,
    device: PathBuf,
    identity: DeviceIdentity,
    image: DeviceFile,
}

/// Takes a piece of a generation: volume, offset in bytes, bytes.
pub type Replica<'a> = dyn FnMut(u32, u64, &[u8]) + 'a;

/// The group. Its parts go in the order in which they stand here.
pub struct Field {
    stream: Option<Stream>,
    tracker: Option<Mutex<Tracker>>,
    engine: Box<dyn Engine>,
    volumes: Vec<Volume>,
    pub setting: Setting,
    pub dice: Dice,
    pub tally: Tally,
    /// A generation whose receipt has not come.
    pending: Option<(Position, Digest)>,
    pins: Pins,
    pub loops: Vec<Loop>,
    began: Instant,
}

impl Field {
    /// Tracks these devices as a group from here on. They are all zero, and so are their replicas.
    pub fn new(name: &str, seed: u64, loops: Vec<Loop>, setting: Setting) -> Field {
        let volumes = loops.iter().enumerate().map(|(at, made)| Volume {
            id: Uuid([at as u8 + 1; 16]),
            device: made.path().into(),
            identity: doublure::host::identity(made.path()).unwrap(),
            image: DeviceFile::open(&made.image(), false).unwrap(),
        });
        let mut field = Field {
            stream: None,
            tracker: None,
            engine: engine(EngineKind::Auto, 32).unwrap(),
            volumes: volumes.collect(),
            setting,
            dice: Dice::new(seed ^ 0x00f1_e1d5),
            tally: Tally::default(),
            pending: None,
            pins: Pins::new(name),
            loops,
            began: Instant::now(),
        };
        for continuity in field.live() {
            assert_eq!(continuity, Continuity::Fresh);
        }
        field
    }

    /// An agent begins.
    fn live(&mut self) -> Vec<Continuity> {
        let mut tracker = Tracker::open_planted(&self.pins.0, self.setting.kernel).unwrap();
        tracker.prepare_capture(Path::new(SCRATCH)).unwrap();
        let found = self.volumes.iter().map(|v| tracker.track(GROUP, v.id, &v.identity).unwrap()).collect();
        self.tracker = Some(Mutex::new(tracker));
        found
    }

    /// The agent dies and another one begins.
    pub fn die(&mut self) {
        self.count_stream();
        self.stream = None;
        self.tracker = None;
        self.pending = None;
        self.tally.deaths += 1;
        if self.dice.once_in(2) {
            // Writes go on while nobody is there.
            std::thread::sleep(Duration::from_millis(self.dice.below(200)));
        }
        let found = self.live();
        let tracker = self.tracker.as_ref().unwrap();
        let mut tracker = tracker.lock().unwrap();
        if found.contains(&Continuity::Fresh) {
            // Only a doubt that the tracker names itself; then everything is compared, here: read.
            self.tally.doubts += 1;
            for (volume, made) in self.volumes.iter().zip(&self.loops) {
                tracker.mark(volume.id, &BlockSet::full(made.blocks())).unwrap();
            }
        }
        tracker.give_back(GROUP).unwrap();
    }

    fn count_stream(&mut self) {
        if let Some(stream) = &self.stream {
            let (sum, now) = (&mut self.tally.counts, stream.counts());
            sum.captured_bytes += now.captured_bytes;
            sum.reread_bytes += now.reread_bytes;
            sum.holes += now.holes;
            sum.missed += now.missed;
        }
    }

    /// Ends the stream as it is between two cuts.
    pub fn close(&mut self) {
        self.count_stream();
        if let Some(stream) = self.stream.take() {
            stream.close(self.tracker.as_ref().unwrap()).unwrap();
        }
    }

    /// The next generation. Gives (t_low, t_high) of its cut.
    pub fn generation(&mut self, now: &dyn Fn() -> u64, replica: &mut Replica<'_>) -> Res<(u64, u64)> {
        if !self.setting.rest.is_zero() {
            let most = self.setting.rest.as_micros() as u64;
            std::thread::sleep(Duration::from_micros(self.dice.below(most)));
        }
        if self.setting.death_once_in > 0 && self.dice.once_in(self.setting.death_once_in) {
            self.die();
        }
        let _frozen = self.setting.frozen_below.as_deref().map(|mount| {
            let frozen = Frozen::new(mount);
            // Until something waits for it.
            std::thread::sleep(Duration::from_millis(5));
            frozen
        });
        let flips = self.setting.flip_once_in > 0 && self.dice.once_in(self.setting.flip_once_in);
        let Field { stream, tracker, volumes, setting, tally, .. } = self;
        let tracker = tracker.as_ref().unwrap();
        let sources: Vec<Source<'_>> = volumes
            .iter()
            .map(|v| Source { id: v.id, name: "stormy", device: v.device.clone(), identity: v.identity.clone(), image: &v.image })
            .collect();
        let limits = Limits { freeze_deadline: Duration::from_secs(2), cut_max_bytes: setting.cut_max_bytes };
        let begins = stream.is_none();
        if begins {
            let mut opened = Stream::open(tracker, GROUP, &sources, setting.ring_bytes)?;
            opened.plant(setting.plant);
            *stream = Some(opened);
        }
        let stream = stream.as_mut().unwrap();
        if flips && !begins {
            stream.flip(tracker)?;
            tally.flips += 1;
        }
        let (mut given_up, mut larges) = (0, 0);
        let bounds = loop {
            let low = now();
            match stream.look(tracker, &sources, self.engine.as_mut(), limits) {
                Ok(Step::Cut) => break (low, now()),
                Ok(Step::Large(sets)) => {
                    tally.rounds += 1;
                    larges += 1;
                    assert!(larges < LARGES_MAX, "{larges} rounds and no cut");
                    for (number, (set, source)) in (0..).zip(sets.iter().zip(&sources)) {
                        doublure::reader::read(self.engine.as_mut(), source.image, set, &mut |run, bytes| {
                            tally.applied_bytes += bytes.len() as u64;
                            replica(number, run.start * BLOCK_BYTES, bytes);
                            Ok(())
                        })?;
                    }
                }
                Err(fault) if fault.code == Code::CutNotExact && given_up < PATIENCE => {
                    given_up += 1;
                    tally.inexact += 1;
                }
                Err(fault) => return Err(fault),
            }
        };
        stream.emit(&mut |volume, change| {
            let (at, bytes) = match change {
                Change::Blocks(run, bytes) => (run.start * BLOCK_BYTES, bytes),
                Change::Sectors(first, bytes) => (first * 512, bytes),
            };
            tally.applied_bytes += bytes.len() as u64;
            replica(u32::from(volume), at, bytes);
            Ok(())
        })?;
        tally.generations += 1;
        tally.took = self.began.elapsed();
        if begins || flips {
            self.receipts();
        }
        if self.setting.interval {
            self.close();
            if self.pending.is_some() {
                // Nobody knows whether the standby has it.
                self.tracker.as_ref().unwrap().lock().unwrap().give_back(GROUP).unwrap();
                self.pending = None;
            }
        }
        Ok(bounds)
    }

    /// The generation that was just emitted is on its way to a standby; its receipt comes now, later or never.
    fn receipts(&mut self) {
        let mut tracker = self.tracker.as_ref().unwrap().lock().unwrap();
        let place = (Position { epoch: 1, generation: self.tally.generations }, Digest([self.tally.generations as u8; 32]));
        if self.setting.early_receipts {
            // What the next cuts would have held is taken to be in this one.
            tracker.flip(GROUP).unwrap();
        }
        let acked = tracker.base(GROUP).unwrap().acked;
        tracker.set_base(GROUP, Base { acked, pending: place }).unwrap();
        self.pending = Some(place);
        if !self.setting.no_receipts && (self.setting.early_receipts || !self.dice.once_in(3)) {
            tracker.release(GROUP, &TestReceipt(place.0, place.1)).unwrap();
            self.pending = None;
            self.tally.receipts += 1;
        }
    }

    /// Counts what the running stream saw, and the time.
    pub fn finish(&mut self) -> Tally {
        self.close();
        self.tally.took = self.began.elapsed();
        self.tally
    }
}
