//! The tracker at scale: what marks, bitmaps and flips of many volumes cost. Needs root. `./dev bench scale` runs it and writes
//! `target/bench/scale.json`; by itself (`cargo bench --bench tracker`) it prints the same figures as one line of JSON;
//! `marks`, `memory` or `flips` as argument chooses.
//!
//! Every figure is the median of several rounds. Nanoseconds per mark are those of all four programs' runs, by the
//! kernel's own account (`kernel.bpf_stats_enabled`), which adds some twenty to each run. Bytes are those that the kernel
//! accounts to the maps, with leaves rounded up to the 512 bytes that they take; `slab_*` is the growth of that size class in
//! `/proc/slabinfo` meanwhile, for comparison (other work on the machine shows there too).

use doublure::host::DeviceIdentity;
use doublure::model::{BLOCK_BYTES, BlockRun, BlockSet, Uuid};
use doublure::tracker::Tracker;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

const TIB: u64 = 1 << 40;
const GROUP: Uuid = Uuid(*b"bench group.....");
const VOLUME: Uuid = Uuid(*b"bench volume....");
/// Bytes of the device for which one leaf stands.
const RANGE: u64 = 56 * 64 * BLOCK_BYTES;
const VOLUMES: u128 = 1000;
const ROUNDS: usize = 5;

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The pins of the bench, gone at the end.
struct Pins(PathBuf);

impl Pins {
    fn new() -> Pins {
        Pins(PathBuf::from(format!("/sys/fs/bpf/doublure-bench-{}", std::process::id())))
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        for dir in fs::read_dir(&self.0).into_iter().flatten().flatten() {
            for pin in fs::read_dir(dir.path()).into_iter().flatten().flatten() {
                let _gone = fs::remove_file(pin.path());
            }
            let _gone = fs::remove_dir(dir.path());
        }
        let _gone = fs::remove_dir(&self.0);
    }
}

/// The kernel's account of program runs, switched off again at the end if it was off.
struct Stats(String);

impl Stats {
    fn on() -> Stats {
        let was = fs::read_to_string("/proc/sys/kernel/bpf_stats_enabled").unwrap();
        fs::write("/proc/sys/kernel/bpf_stats_enabled", "1").unwrap();
        Stats(was)
    }
}

impl Drop for Stats {
    fn drop(&mut self) {
        let _as_it_was = fs::write("/proc/sys/kernel/bpf_stats_enabled", &self.0);
    }
}

/// A loop device over a sparse file.
struct Loop {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

impl Loop {
    fn new(bytes: u64) -> Loop {
        let dir = tempfile::Builder::new().prefix("doublure-bench").tempdir_in("/var/tmp").unwrap();
        let image = dir.path().join("image");
        File::create(&image).unwrap().set_len(bytes).unwrap();
        let path = run("losetup", &["--find", "--show", "--direct-io=on", image.to_str().unwrap()]).trim().into();
        Loop { _dir: dir, path }
    }
    fn identity(&self) -> DeviceIdentity {
        let rdev = fs::metadata(&self.path).unwrap().rdev();
        let name = self.path.file_name().unwrap().to_string_lossy();
        let number = |what: &str| fs::read_to_string(format!("/sys/block/{name}/{what}")).unwrap().trim().parse::<u64>().unwrap();
        DeviceIdentity {
            major: nix::sys::stat::major(rdev) as u32,
            minor: nix::sys::stat::minor(rdev) as u32,
            diskseq: number("diskseq"),
            size_bytes: number("size") * 512,
            backing: None,
        }
    }
    fn direct(&self) -> File {
        OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(&self.path).unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _gone = Command::new("losetup").args(["-d", self.path.to_str().unwrap()]).output();
    }
}

/// One block of memory, aligned for direct I/O.
struct Page(Vec<u8>);

impl Page {
    fn new() -> Page {
        Page(vec![0x5a; 8192])
    }
    fn get(&self) -> &[u8] {
        let skip = self.0.as_ptr().align_offset(4096);
        &self.0[skip..skip + 4096]
    }
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

fn milliseconds(work: impl FnOnce()) -> f64 {
    let begun = Instant::now();
    work();
    begun.elapsed().as_secs_f64() * 1e3
}

/// Active objects of the size class that leaves are in, in bytes.
fn slab_bytes() -> f64 {
    let text = fs::read_to_string("/proc/slabinfo").unwrap_or_default();
    let objects = text.lines().filter(|line| line.starts_with("kmalloc-512 ") || line.starts_with("kmalloc-cg-512 "));
    objects.filter_map(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok()).sum::<f64>() * 512.0
}

/// The figures, in the order in which they were found.
#[derive(Default)]
struct Figures(serde_json::Map<String, serde_json::Value>);

impl Figures {
    fn put(&mut self, name: &str, value: f64) {
        eprintln!("  {name}: {value:.1}");
        let rounded = (value * 10.0).round() / 10.0;
        self.0.insert(name.to_owned(), serde_json::json!(rounded));
    }
}

fn random(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed;
    move |limit| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % limit
    }
}

/// Nanoseconds per run, of writes to the same places over and over.
fn mark_cost(pins: &Path, bytes: u64, apart: u64) -> f64 {
    let device = Loop::new(bytes);
    let mut tracker = Tracker::open(pins).unwrap();
    tracker.track(GROUP, VOLUME, &device.identity()).unwrap();
    let (file, page) = (device.direct(), Page::new());
    // Random places in 512 MiB, or as far apart as asked for: bits that are set already, as most are on a busy volume.
    let mut next = random(9);
    let places: Vec<u64> = (0..4096).map(|_| next(131_072) * apart).collect();
    let mut samples = Vec::new();
    for round in 0..=ROUNDS {
        let before = tracker.run_stats().unwrap();
        places.iter().for_each(|block| file.write_all_at(page.get(), block * BLOCK_BYTES).unwrap());
        let after = tracker.run_stats().unwrap();
        let of = |at: usize| (after[at].0 - before[at].0, after[at].1 - before[at].1);
        let (runs, time) = (0..4).map(of).fold((0, 0), |(a, b), (c, d)| (a + c, b + d));
        if round > 0 {
            samples.push(time as f64 / runs as f64);
        }
    }
    tracker.untrack(VOLUME).unwrap();
    median(samples)
}

/// The memory of one volume with `blocks` written through the device, in bytes, the buckets of the host's map of leaves among it:
/// by the maps' account, those buckets alone, and by the slab's account.
fn memory(pins: &Path, bytes: u64, blocks: &mut dyn Iterator<Item = u64>) -> (f64, f64, f64) {
    let device = Loop::new(bytes);
    let mut tracker = Tracker::open(pins).unwrap();
    let slab = slab_bytes();
    tracker.track(GROUP, VOLUME, &device.identity()).unwrap();
    let buckets = tracker.memory_bytes(VOLUME).unwrap().1 as f64;
    let (file, page) = (device.direct(), Page::new());
    let mut ranges = BlockSet::empty(bytes.div_ceil(RANGE));
    for block in blocks {
        file.write_all_at(page.get(), block * BLOCK_BYTES).unwrap();
        ranges.insert(BlockRun { start: block * BLOCK_BYTES / RANGE, count: 1 });
    }
    // The kernel's account knows an element's 504 bytes, not the 512 that it takes.
    let (own, leaves) = tracker.memory_bytes(VOLUME).unwrap();
    let taken = (own + leaves + ranges.count() * 8) as f64;
    let slab = slab_bytes() - slab;
    tracker.untrack(VOLUME).unwrap();
    (taken, buckets, slab)
}

fn memories(pins: &Path, figures: &mut Figures) {
    let (huge, mut next) = (16 * TIB - (16 << 20), random(5));
    for (name, bytes, blocks) in [
        ("16tib_idle", huge, Vec::new()),
        ("16tib_20480_blocks", huge, (0..20_480).map(|_| next(huge / BLOCK_BYTES)).collect()),
        ("1tib_full", TIB, (0..TIB / RANGE).map(|range| range * (RANGE / BLOCK_BYTES)).collect()),
    ] {
        let (maps, buckets, slab) = memory(pins, bytes, &mut blocks.into_iter());
        figures.put(&format!("bitmap_bytes_{name}"), maps);
        figures.put(&format!("slab_bytes_{name}"), slab);
        figures.put("leaf_map_bytes_of_host", buckets);
    }
}

fn flips(pins: &Path, figures: &mut Figures) {
    let devices: Vec<Loop> = (0..VOLUMES).map(|_| Loop::new(TIB)).collect();
    let mut tracker = Tracker::open(pins).unwrap();
    let id = |n: u128| Uuid((n + 1).to_be_bytes());
    let begun = Instant::now();
    for (n, device) in (0..).zip(&devices) {
        tracker.track(GROUP, id(n), &device.identity()).unwrap();
    }
    figures.put("track_1_of_1000_volumes_ms", begun.elapsed().as_secs_f64() * 1e3 / VOLUMES as f64);
    let own: u64 = (0..VOLUMES).map(|n| tracker.memory_bytes(id(n)).unwrap().0).sum();
    figures.put("bitmap_bytes_1000_idle_volumes_of_1tib", (own + tracker.memory_bytes(id(0)).unwrap().1) as f64);
    // The first flip opens the statistics of each disk.
    tracker.flip(GROUP).unwrap();
    let idle = (0..4 * ROUNDS).map(|_| milliseconds(|| tracker.flip(GROUP).unwrap())).collect();
    figures.put("flip_1000_volumes_ms", median(idle));
    let none = (0..4 * ROUNDS).map(|_| milliseconds(|| tracker.flip_all(&[]).unwrap())).collect();
    figures.put("flip_of_nothing_ms", median(none));
    let identities: Vec<_> = (0..).zip(&devices).map(|(n, device)| (id(n), device.identity())).collect();
    let doubts = (0..ROUNDS).map(|_| milliseconds(|| assert!(tracker.doubts(GROUP, &identities).unwrap().is_empty()))).collect();
    figures.put("doubts_1000_volumes_ms", median(doubts));
    drop(tracker);
    let opened: Vec<f64> = (0..ROUNDS).map(|_| milliseconds(|| drop(Tracker::open(pins).unwrap()))).collect();
    figures.put("open_1000_volumes_ms", median(opened));
    // Each volume in a group of its own, one grace period for all.
    let mut tracker = Tracker::open(pins).unwrap();
    for (n, device) in (0..).zip(&devices) {
        tracker.track(id(n), id(n), &device.identity()).unwrap();
    }
    let groups: Vec<Uuid> = (0..VOLUMES).map(id).collect();
    tracker.flip_all(&groups).unwrap();
    let together = (0..2 * ROUNDS).map(|_| milliseconds(|| tracker.flip_all(&groups).unwrap())).collect();
    figures.put("flip_1000_groups_together_ms", median(together));
}

fn main() {
    // Cargo asks test binaries for their tests; this is none.
    if std::env::args().any(|argument| argument == "--list") {
        return;
    }
    let named: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let wanted = |name: &str| named.is_empty() || named.iter().any(|other| other == name);
    let pins = Pins::new();
    let mut figures = Figures::default();
    if wanted("marks") {
        let _stats = Stats::on();
        let (mut flat, mut leaf) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            flat.push(mark_cost(&pins.0, 512 << 20, 1));
            leaf.push(mark_cost(&pins.0, 8 << 30, 16));
        }
        figures.put("mark_ns_flat", median(flat));
        figures.put("mark_ns_leaf", median(leaf));
    }
    if wanted("memory") {
        memories(&pins.0, &mut figures);
    }
    if wanted("flips") {
        flips(&pins.0, &mut figures);
    }
    println!("{}", serde_json::Value::Object(figures.0));
}
