//! The tracker against the real kernel: loop devices, file systems, `kill -9`, and writers that do not wait.
//!
//! Everything is compared with an oracle: the blocks that were written on purpose, or the bytes of the backing file.

use doublure::host::{Backing, DeviceIdentity};
use doublure::model::{BLOCK_BYTES, BlockRun, BlockSet, Code, Digest, Position, Receipt, Uuid};
use doublure::tracker::{Base, Continuity, Tracker};
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const GROUP: Uuid = Uuid(*b"group one.......");
const VOLUME: Uuid = Uuid(*b"volume one......");

// ---- a rig that cleans up after itself -----------------------------------------------------------------------------

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A pin directory of its own in bpffs; unpinned at the end, so that the programs go.
struct Pins(PathBuf);

impl Pins {
    fn new(name: &str) -> Pins {
        let pins = Pins(PathBuf::from(format!("/sys/fs/bpf/doublure-test-{name}-{}", std::process::id())));
        pins.clear();
        pins
    }
    /// The directory of the build under test; there is exactly one.
    fn inner(&self) -> PathBuf {
        let found: Vec<_> = fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(found.len(), 1, "{found:?}");
        found[0].clone()
    }
    fn clear(&self) {
        for dir in fs::read_dir(&self.0).into_iter().flatten().flatten() {
            for pin in fs::read_dir(dir.path()).into_iter().flatten().flatten() {
                let _gone = fs::remove_file(pin.path());
            }
            let _gone = fs::remove_dir(dir.path());
        }
        let _gone = fs::remove_dir(&self.0);
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        self.clear();
    }
}

/// A loop device over a sparse file in a directory of its own.
struct Loop {
    dir: tempfile::TempDir,
    path: PathBuf,
}

impl Loop {
    fn new(bytes: u64) -> Loop {
        let dir = tempfile::Builder::new().prefix("doublure-tracker").tempdir_in("/var/tmp").unwrap();
        File::create(dir.path().join("image")).unwrap().set_len(bytes).unwrap();
        let mut made = Loop { dir, path: PathBuf::new() };
        made.attach();
        made
    }
    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }
    fn attach(&mut self) {
        let image = self.image();
        self.path = run("losetup", &["--find", "--show", "--direct-io=on", image.to_str().unwrap()]).trim().into();
    }
    fn name(&self) -> String {
        self.path.file_name().unwrap().to_string_lossy().into_owned()
    }
    fn sys(&self, attribute: &str) -> u64 {
        fs::read_to_string(format!("/sys/block/{}/{attribute}", self.name())).unwrap().trim().parse().unwrap()
    }
    fn identity(&self) -> DeviceIdentity {
        let (device, image) = (fs::metadata(&self.path).unwrap().rdev(), fs::metadata(self.image()).unwrap());
        DeviceIdentity {
            major: nix::sys::stat::major(device) as u32,
            minor: nix::sys::stat::minor(device) as u32,
            diskseq: self.sys("diskseq"),
            size_bytes: self.sys("size") * 512,
            backing: Some(Backing {
                dev: image.dev(),
                inode: image.ino(),
                offset_bytes: self.sys("loop/offset"),
                sizelimit_bytes: self.sys("loop/sizelimit"),
            }),
        }
    }
    fn blocks(&self) -> u64 {
        self.identity().size_bytes.div_ceil(BLOCK_BYTES)
    }
    fn direct(&self) -> File {
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&self.path).unwrap()
    }
    /// The bytes of the backing file, which is what a reader of the device would see once writes have completed.
    fn bytes(&self) -> Vec<u8> {
        fs::read(self.image()).unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _gone = Command::new("losetup").args(["-d", self.path.to_str().unwrap()]).output();
    }
}

/// A mounted file system.
struct Mounted {
    dir: tempfile::TempDir,
}

impl Mounted {
    fn new(device: &Loop, kind: &str) -> Mounted {
        let path = device.path.to_str().unwrap();
        let force = if kind == "xfs" { "-f" } else { "-F" };
        run(&format!("mkfs.{kind}"), &["-q", force, path]);
        let dir = tempfile::Builder::new().prefix("doublure-mount").tempdir_in("/var/tmp").unwrap();
        run("mount", &[path, dir.path().to_str().unwrap()]);
        Mounted { dir }
    }
    fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _gone = Command::new("umount").arg(self.dir.path()).output();
    }
}

/// Memory aligned for direct I/O.
struct Page(Vec<u8>, usize);

impl Page {
    fn new(bytes: usize) -> Page {
        let memory = vec![0; bytes + 4096];
        let skip = memory.as_ptr().align_offset(4096);
        Page(memory, skip)
    }
    fn get(&mut self) -> &mut [u8] {
        let end = self.0.len() - 4096 + self.1;
        &mut self.0[self.1..end]
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

fn tracked(pins: &Pins, device: &Loop) -> Tracker {
    let mut tracker = Tracker::open(&pins.0).unwrap();
    assert_eq!(tracker.track(GROUP, VOLUME, &device.identity()).unwrap(), Continuity::Fresh);
    tracker
}

fn set(blocks: u64, runs: &[(u64, u64)]) -> BlockSet {
    let mut set = BlockSet::empty(blocks);
    runs.iter().for_each(|&(start, count)| set.insert(BlockRun { start, count }));
    set
}

fn runs(set: &BlockSet) -> Vec<(u64, u64)> {
    set.runs(1 << 40).map(|run| (run.start, run.count)).collect()
}

/// Blocks whose bytes differ between two images of the same length.
fn changed(before: &[u8], after: &[u8]) -> BlockSet {
    assert_eq!(before.len(), after.len());
    let blocks = (before.len() as u64).div_ceil(BLOCK_BYTES);
    let mut set = BlockSet::empty(blocks);
    for (at, (a, b)) in before.chunks(4096).zip(after.chunks(4096)).enumerate() {
        if a != b {
            set.insert(BlockRun { start: at as u64, count: 1 });
        }
    }
    set
}

fn flip_and_take(tracker: &mut Tracker) -> BlockSet {
    tracker.flip(GROUP).unwrap();
    tracker.taken(VOLUME).unwrap()
}

/// Forgets what was taken, as after a receipt.
fn acknowledge(tracker: &mut Tracker, generation: u64) {
    let place = (Position { epoch: 1, generation }, Digest([generation as u8; 32]));
    let acked = tracker.base(GROUP).unwrap().acked;
    tracker.set_base(GROUP, Base { acked, pending: place }).unwrap();
    tracker.release(GROUP, &TestReceipt(place.0, place.1)).unwrap();
    assert_eq!(tracker.base(GROUP).unwrap(), Base { acked: place, pending: Default::default() });
}

fn no_doubts(tracker: &mut Tracker, device: &Loop) {
    let doubts = tracker.doubts(GROUP, &[(VOLUME, device.identity())]).unwrap();
    assert!(doubts.is_empty(), "{doubts:#?}");
}

fn reasons(tracker: &mut Tracker, device: &Loop) -> String {
    let doubts = tracker.doubts(GROUP, &[(VOLUME, device.identity())]).unwrap();
    doubts.into_iter().map(|doubt| doubt.reason).collect::<Vec<_>>().join("; ")
}

// ---- the self-test -------------------------------------------------------------------------------------------------

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn the_self_test_sees_everything_and_leaves_nothing() {
    let pins = Pins::new("self");
    let mut tracker = Tracker::open(&pins.0).unwrap();
    let dir = tempfile::Builder::new().prefix("doublure-tracker").tempdir_in("/var/tmp").unwrap();
    let pinned = || fs::read_dir(pins.inner()).unwrap().count();
    let before = pinned();
    let begun = Instant::now();
    tracker.self_test(dir.path()).unwrap();
    eprintln!("self-test: {:?}", begun.elapsed());
    tracker.self_test(dir.path()).unwrap();
    assert_eq!(pinned(), before);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

// ---- which blocks --------------------------------------------------------------------------------------------------

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn every_kind_of_write_marks_exactly_its_blocks() {
    let (pins, device) = (Pins::new("kinds"), Loop::new(64 * MIB + 512));
    let mut tracker = tracked(&pins, &device);
    let (blocks, file) = (device.blocks(), device.direct());
    assert_eq!(blocks, 64 * 256 + 1, "the last block is short");
    let mut page = Page::new(1 << 20);
    let mut generation = 0;
    let mut check = |what: &str, expected: &[(u64, u64)]| {
        assert_eq!(runs(&tracker.active(VOLUME).unwrap()), expected, "{what}: active");
        assert_eq!(runs(&flip_and_take(&mut tracker)), expected, "{what}: taken");
        assert!(tracker.active(VOLUME).unwrap().is_empty());
        assert_eq!(tracker.dirty_blocks(VOLUME).unwrap(), expected.iter().map(|run| run.1).sum::<u64>());
        generation += 1;
        acknowledge(&mut tracker, generation);
        assert_eq!(tracker.dirty_blocks(VOLUME).unwrap(), 0, "{what}: released");
        no_doubts(&mut tracker, &device);
    };
    file.read_exact_at(&mut page.get()[..65536], 0).unwrap();
    check("reads", &[]);
    file.sync_all().unwrap();
    check("an empty flush", &[]);
    file.write_all_at(&page.get()[..4096], 7 * 4096).unwrap();
    check("one block", &[(7, 1)]);
    file.write_all_at(&page.get()[..512], 7 * 4096 + 3584).unwrap();
    check("the last sector of a block", &[(7, 1)]);
    file.write_all_at(&page.get()[..4096], 7 * 4096 + 3584).unwrap();
    check("an unaligned block", &[(7, 2)]);
    file.write_all_at(page.get(), 60 * 4096 + 512).unwrap();
    check("a MiB across words", &[(60, 257)]);
    file.write_all_at(&page.get()[..512], 64 * MIB).unwrap();
    check("the short last block", &[(blocks - 1, 1)]);
    let range = |what: &str, flag: &str, offset: u64, bytes: u64| {
        run("blkdiscard", &[flag, "-o", &offset.to_string(), "-l", &bytes.to_string(), device.path.to_str().unwrap()]);
        eprintln!("{what} done");
    };
    range("discard", "--force", 8 * MIB, 5 * MIB);
    check("a discard", &[(2048, 1280)]);
    range("zeroes", "--zeroout", 16 * MIB + 512, MIB);
    check("zeroes from the second sector of a block", &[(4096, 257)]);
    file.write_all_at(&page.get()[..8192], 100 * 4096).unwrap();
    file.write_all_at(&page.get()[..4096], 100 * 4096).unwrap();
    check("the same block twice", &[(100, 2)]);
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_write_through_a_partition_marks_the_disk() {
    let (pins, device) = (Pins::new("part"), Loop::new(64 * MIB));
    let mut tracker = tracked(&pins, &device);
    run("partx", &["--version"]);
    let disk = device.path.to_str().unwrap();
    run("addpart", &[disk, "1", "40963", "8192"]);
    let name = format!("{0}p1", device.name());
    let numbers = fs::read_to_string(format!("/sys/block/{}/{name}/dev", device.name())).unwrap();
    let (major, minor) = numbers.trim().split_once(':').unwrap();
    let node = device.dir.path().join("part");
    run("mknod", &[node.to_str().unwrap(), "b", major, minor]);
    let part = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(&node).unwrap();
    let mut page = Page::new(4096);
    part.write_all_at(page.get(), 24 * 512).unwrap();
    drop(part);
    // Sector 40963 + 24 = 40987 = block 5123 and three sectors.
    assert_eq!(runs(&flip_and_take(&mut tracker)), [(5123, 2)]);
    no_doubts(&mut tracker, &device);
    // A partition itself is refused.
    let mut identity = device.identity();
    (identity.major, identity.minor) = (major.parse().unwrap(), minor.parse().unwrap());
    let fault = tracker.track(GROUP, Uuid([9; 16]), &identity).unwrap_err();
    assert_eq!(fault.code, Code::NotABlockImage, "{fault}");
    run("delpart", &[disk, "1"]);
}

// ---- measured ------------------------------------------------------------------------------------------------------

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn what_a_flip_costs() {
    let (pins, device) = (Pins::new("cost"), Loop::new(1 << 40));
    let begun = Instant::now();
    let mut tracker = tracked(&pins, &device);
    eprintln!("track 1 TiB: {:?}", begun.elapsed());
    let median = |what: &str, samples: &mut Vec<Duration>| {
        samples.sort();
        eprintln!("{what}: median {:?}, worst {:?} of {}", samples[samples.len() / 2], samples[samples.len() - 1], samples.len());
    };
    let mut samples: Vec<Duration> = (0..50)
        .map(|_| {
            let begun = Instant::now();
            tracker.flip(GROUP).unwrap();
            begun.elapsed()
        })
        .collect();
    median("flip of an idle TiB", &mut samples);
    let blocks = device.blocks();
    let begun = Instant::now();
    tracker.mark(VOLUME, &BlockSet::full(blocks)).unwrap();
    eprintln!("mark a full TiB: {:?}", begun.elapsed());
    let begun = Instant::now();
    assert_eq!(flip_and_take(&mut tracker).count(), blocks);
    eprintln!("flip and take a full TiB: {:?}", begun.elapsed());
    let begun = Instant::now();
    assert_eq!(tracker.dirty_blocks(VOLUME).unwrap(), blocks);
    eprintln!("count a full TiB: {:?}", begun.elapsed());
    let begun = Instant::now();
    assert_eq!(flip_and_take(&mut tracker).count(), blocks);
    eprintln!("flip a full TiB without a receipt, and take it: {:?}", begun.elapsed());
    acknowledge(&mut tracker, 1);
    assert_eq!(tracker.dirty_blocks(VOLUME).unwrap(), 0);
}
