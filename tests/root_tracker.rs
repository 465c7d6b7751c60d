//! The tracker against the real kernel: loop devices, file systems, `kill -9`, and writers that do not wait.
//!
//! Everything is compared with an oracle: the blocks that were written on purpose, or the bytes of the backing file.

use doublure::host::{Backing, DeviceIdentity};
use doublure::model::{BLOCK_BYTES, BlockRun, BlockSet, Code, Digest, Position, Receipt, Uuid};
use doublure::tracker::{Base, Continuity, Tracker};
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
/// A volume of this size has leaves; one of some MiB has not.
const TIB: u64 = 1 << 40;
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
        // Without discarding everything first: a test that expects some blocks must not find all.
        let options: &[&str] = if kind == "xfs" { &["-q", "-f", "-K", path] } else { &["-q", "-F", "-E", "nodiscard", path] };
        run(&format!("mkfs.{kind}"), options);
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
    every_kind_of_write(64 * MIB);
    every_kind_of_write(TIB);
}

fn every_kind_of_write(bytes: u64) {
    let (pins, device) = (Pins::new("kinds"), Loop::new(bytes + 512));
    let mut tracker = tracked(&pins, &device);
    let (blocks, file) = (device.blocks(), device.direct());
    assert_eq!(blocks, bytes / 4096 + 1, "the last block is short");
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
    file.write_all_at(&page.get()[..512], bytes).unwrap();
    check("the short last block", &[(blocks - 1, 1)]);
    let range = |what: &str, flag: &str, offset: u64, bytes: u64| {
        run("blkdiscard", &[flag, "-o", &offset.to_string(), "-l", &bytes.to_string(), device.path.to_str().unwrap()]);
        eprintln!("{what} done");
    };
    range("discard", "--force", 8 * MIB, 5 * MIB);
    check("a discard", &[(2048, 1280)]);
    // Four ranges with leaves: two as a whole, a part of a third and all but a block of a fourth.
    range("discard", "--force", 14 * MIB - 8192, 42 * MIB);
    check("a discard of several ranges", &[(3582, 10752)]);
    file.write_all_at(&page.get()[..16384], 14 * MIB - 8192).unwrap();
    check("a write across two ranges", &[(3582, 4)]);
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

// ---- death of the agent --------------------------------------------------------------------------------------------

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_death_after_any_step_of_a_flip_loses_no_bit() {
    for (steps, bytes) in (0..=4).flat_map(|steps| [(steps, 64 * MIB), (steps, TIB)]) {
        let (pins, device) = (Pins::new("steps"), Loop::new(bytes));
        let mut tracker = tracked(&pins, &device);
        let (file, mut page) = (device.direct(), Page::new(4096));
        let mut write = |block: u64| file.write_all_at(page.get(), block * 4096).unwrap();
        write(1);
        assert_eq!(runs(&flip_and_take(&mut tracker)), [(1, 1)]);
        // Block 1 is taken without a receipt; block 70 is active; the agent dies inside the next flip.
        write(70);
        tracker.flip_until(GROUP, steps).unwrap();
        drop(tracker);
        write(140);
        let mut tracker = Tracker::open(&pins.0).unwrap();
        assert_eq!(tracker.taken(VOLUME).unwrap_err().code, Code::VolumeUnknown, "found is not yet believed");
        assert_eq!(tracker.track(GROUP, VOLUME, &device.identity()).unwrap(), Continuity::Unbroken);
        write(210);
        let all = [(1, 1), (70, 1), (140, 1), (210, 1)];
        assert_eq!(runs(&tracker.dirty(VOLUME).unwrap()), all, "after {steps} steps");
        tracker.give_back(GROUP).unwrap();
        assert_eq!(runs(&tracker.active(VOLUME).unwrap()), all, "after {steps} steps, given back");
        assert_eq!(runs(&flip_and_take(&mut tracker)), all, "after {steps} steps and a whole flip");
        no_doubts(&mut tracker, &device);
    }
}

/// Not a test of its own: what `a_killed_agent_loses_no_bit` starts and kills. Without its environment it has nothing to do.
#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn child_that_flips_until_it_is_killed() {
    let Some((pins, identity)) = std::env::var_os("TRACKER_PINS").zip(std::env::var("TRACKER_DEVICE").ok()) else { return };
    let identity: DeviceIdentity = serde_json::from_str(&identity).unwrap();
    let mut tracker = Tracker::open(Path::new(&pins)).unwrap();
    let continuity = tracker.track(GROUP, VOLUME, &identity).unwrap();
    eprintln!("child: {continuity:?}");
    loop {
        tracker.flip(GROUP).unwrap();
    }
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_killed_agent_loses_no_bit() {
    killed_agents(64 * MIB, 1, 25);
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_killed_agent_loses_no_bit_of_a_large_volume() {
    // Places an eighth of a range apart: leaves are made, filled and moved all the time.
    killed_agents(TIB, 448, 40);
}

/// Writes to every `stride`-th block of the start of a volume while agents flip it and are killed.
fn killed_agents(bytes: u64, stride: u64, rounds: u64) {
    let (pins, device) = (Pins::new("kill"), Loop::new(bytes));
    drop(tracked(&pins, &device));
    let (file, mut page) = (device.direct(), Page::new(4096));
    let mut random = Random(7);
    let mut written = BlockSet::empty(device.blocks());
    for round in 0..rounds {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["child_that_flips_until_it_is_killed", "--exact", "--ignored", "--nocapture"])
            .env("TRACKER_PINS", &pins.0)
            .env("TRACKER_DEVICE", serde_json::to_string(&device.identity()).unwrap())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stderr.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line.trim(), "child: Unbroken", "round {round}");
        for _ in 0..random.below(400) {
            let block = random.below(64 * 256) * stride;
            file.write_all_at(page.get(), block * 4096).unwrap();
            written.insert(BlockRun { start: block, count: 1 });
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let mut tracker = Tracker::open(&pins.0).unwrap();
    assert_eq!(tracker.track(GROUP, VOLUME, &device.identity()).unwrap(), Continuity::Unbroken);
    no_doubts(&mut tracker, &device);
    assert_eq!(runs(&tracker.dirty(VOLUME).unwrap()), runs(&written));
}

// ---- writes in flight ----------------------------------------------------------------------------------------------

/// A loop device whose writes hang for as long as the file system below is frozen.
///
/// An XFS with a hole at the place: filling it begins a transaction, which waits on every kernel. An overwrite in place hangs
/// only where the loop driver itself asks for leave to write (6.18 does, 6.1 does not: there it goes through).
struct Slow {
    // In the order in which they must go.
    upper: Loop,
    below: Mounted,
    _lowest: Loop,
}

impl Slow {
    fn new() -> Slow {
        let lowest = Loop::new(512 * MIB);
        let below = Mounted::new(&lowest, "xfs");
        let dir = tempfile::Builder::new().tempdir_in(below.path()).unwrap();
        let image = File::create(dir.path().join("image")).unwrap();
        image.set_len(16 * MIB).unwrap();
        image.sync_all().unwrap();
        let mut upper = Loop { dir, path: PathBuf::new() };
        upper.attach();
        Slow { upper, below, _lowest: lowest }
    }
    fn freeze(&self) -> Frozen<'_> {
        run("fsfreeze", &["-f", self.below.path().to_str().unwrap()]);
        Frozen(self.below.path())
    }
}

struct Frozen<'a>(&'a Path);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _thawed = Command::new("fsfreeze").args(["-u", self.0.to_str().unwrap()]).output();
    }
}

/// Starts one write of 0xee to `block` in a thread and waits until the kernel holds it.
fn write_in_flight(device: &Loop, block: u64) -> std::thread::JoinHandle<()> {
    let file = device.direct();
    let inflight = PathBuf::from(format!("/sys/block/{}/inflight", device.name()));
    let thread = std::thread::spawn(move || {
        let mut page = Page::new(4096);
        page.get().fill(0xee);
        file.write_all_at(page.get(), block * 4096).unwrap();
    });
    let writes = || fs::read_to_string(&inflight).unwrap().split_whitespace().nth(1).unwrap().parse::<u64>().unwrap();
    while writes() == 0 {
        assert!(!thread.is_finished(), "the write did not wait for the frozen file system");
        std::thread::sleep(Duration::from_millis(1));
    }
    thread
}

/// Cuts, reads and receives a generation while a write hangs; then lets it finish. What a later round would read again.
fn round_around_a_hanging_write(tracker: &mut Tracker, slow: &Slow, receipt: bool) -> BlockSet {
    let frozen = slow.freeze();
    let writer = write_in_flight(&slow.upper, 5);
    assert_eq!(runs(&flip_and_take(tracker)), [(5, 1)], "submitted before the flip");
    // From the backing file: the loop device's one worker stands behind the frozen file system.
    assert_eq!(slow.upper.bytes()[5 * 4096], 0, "the read after the flip still sees the old bytes");
    if receipt {
        acknowledge(tracker, 1);
    }
    drop(frozen);
    writer.join().unwrap();
    assert_eq!(slow.upper.bytes()[5 * 4096], 0xee);
    flip_and_take(tracker)
}

/// Takes a kind of program away; it is gone when this returns.
fn detach(pins: &Pins, tracker: &mut Tracker, kind: &str) {
    for copy in ["a", "b"] {
        fs::remove_file(pins.inner().join(format!("link_{kind}_{copy}"))).unwrap();
    }
    // The kernel lets go of an unpinned link after a grace period or two.
    (0..4).for_each(|_| tracker.flip(GROUP).unwrap());
    std::thread::sleep(Duration::from_millis(200));
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_write_in_flight_over_a_flip_is_taken_again() {
    let (pins, slow) = (Pins::new("flight"), Slow::new());
    let mut tracker = tracked(&pins, &slow.upper);
    assert_eq!(runs(&round_around_a_hanging_write(&mut tracker, &slow, true)), [(5, 1)]);
    no_doubts(&mut tracker, &slow.upper);
}

/// Without the completion programs the bit is not set again; the in-flight table names the write all the same.
#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn without_completion_programs_the_table_knows_the_write() {
    let (pins, slow) = (Pins::new("table"), Slow::new());
    let mut tracker = tracked(&pins, &slow.upper);
    detach(&pins, &mut tracker, "complete");
    assert_eq!(runs(&round_around_a_hanging_write(&mut tracker, &slow, true)), [(5, 1)]);
    let reasons = reasons(&mut tracker, &slow.upper);
    assert!(
        !reasons.contains("in flight over a cut was not seen") && reasons.contains("no program of kind complete"),
        "{reasons}"
    );
}

/// The planted fault: with no place in the table either, the same round loses the write. The kernel's own account tells.
#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn without_completion_programs_and_table_that_write_would_be_lost_and_is_doubted() {
    let (pins, slow) = (Pins::new("planted"), Slow::new());
    let mut tracker = tracked(&pins, &slow.upper);
    detach(&pins, &mut tracker, "complete");
    tracker.crowd_flights();
    assert_eq!(runs(&round_around_a_hanging_write(&mut tracker, &slow, true)), []);
    assert!(reasons(&mut tracker, &slow.upper).contains("in flight over a cut was not seen"));
}

/// What T8 would do to a write whose submit and completion it both swallows: no miss is counted, the table has no entry. One refused write
/// (RWF_NOWAIT) before it hides it from the kernel's account for ever.
#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
#[allow(unsafe_code)]
fn a_write_that_nobody_saw_is_doubted_although_another_one_was_refused() {
    use std::os::fd::AsRawFd;
    let (pins, slow) = (Pins::new("nobody"), Slow::new());
    let mut tracker = tracked(&pins, &slow.upper);
    fs::write(format!("/sys/block/{}/queue/nr_requests", slow.upper.name()), "4").unwrap();
    let frozen = slow.freeze();
    let writers: Vec<_> = (0..4).map(|at| write_in_flight(&slow.upper, 2 * at)).collect();
    std::thread::sleep(Duration::from_millis(300));
    let (file, mut page) = (slow.upper.direct(), Page::new(4096));
    let refused = (0..4).filter(|_| {
        let part = libc::iovec { iov_base: page.get().as_mut_ptr().cast(), iov_len: 4096 };
        // SAFETY: one vector over a page that lives on.
        unsafe { libc::pwritev2(file.as_raw_fd(), &part, 1, 20 * 4096, libc::RWF_NOWAIT) == -1 }
    });
    assert!(refused.count() > 0, "none was refused");
    drop(frozen);
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    no_doubts(&mut tracker, &slow.upper);
    flip_and_take(&mut tracker);
    acknowledge(&mut tracker, 1);
    detach(&pins, &mut tracker, "submit");
    detach(&pins, &mut tracker, "complete");
    page.get().fill(7);
    file.write_all_at(page.get(), 30 * 4096).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let again = runs(&flip_and_take(&mut tracker));
    let reasons = reasons(&mut tracker, &slow.upper);
    println!("taken {again:?}; {reasons}");
    assert!(
        again.iter().any(|(start, count)| (*start..start + count).contains(&30))
            || reasons.contains("the kernel counted")
            || reasons.contains("in flight over a cut was not seen"),
        "nobody knows of block 30: taken {again:?}; {reasons}"
    );
}

/// Until the receipt the tracker can help itself: it knows what was taken, and that a completion is missing.
#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_lost_completion_before_the_receipt_takes_the_blocks_once_more() {
    let (pins, slow) = (Pins::new("heal"), Slow::new());
    let mut tracker = tracked(&pins, &slow.upper);
    detach(&pins, &mut tracker, "complete");
    assert_eq!(runs(&round_around_a_hanging_write(&mut tracker, &slow, false)), [(5, 1)]);
    let doubts = reasons(&mut tracker, &slow.upper);
    assert!(!doubts.contains("in flight over a cut") && !doubts.contains("the kernel counted"), "{doubts}");
    assert!(flip_and_take(&mut tracker).is_empty(), "answered once");
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_write_in_flight_when_tracking_begins_is_seen_at_its_end() {
    let (pins, slow) = (Pins::new("attach"), Slow::new());
    let frozen = slow.freeze();
    let writer = write_in_flight(&slow.upper, 9);
    let mut tracker = tracked(&pins, &slow.upper);
    assert!(flip_and_take(&mut tracker).is_empty());
    drop(frozen);
    writer.join().unwrap();
    assert_eq!(runs(&flip_and_take(&mut tracker)), [(9, 1)]);
    no_doubts(&mut tracker, &slow.upper);
}

/// xorshift: the same writes every time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_copy_made_of_live_reads_equals_the_device_in_the_end() {
    hunt(32 * MIB, 32 * MIB, 32 * MIB);
}

/// The same where the bits are in leaves. Places lie in chunks of 128 KiB far apart, so that leaves are made all the time.
#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_copy_of_a_large_sparse_volume_equals_it_in_the_end() {
    hunt(15 * TIB, 128 << 10, 3 * (14 << 30) / 1000);
}

/// Six writers over 32 MiB of places, which lie in chunks of `chunk` bytes, `apart` bytes from start to start.
fn hunt(size: u64, chunk: u64, apart: u64) {
    let (chunk, apart) = (chunk / 4096, apart / 4096);
    let place = |at: u64| at / chunk * apart + at % chunk;
    let (pins, device) = (Pins::new("hunt"), Loop::new(size));
    let mut tracker = tracked(&pins, &device);
    let (stop, stamp) = (AtomicBool::new(false), AtomicU64::new(1));
    let (reader, mut copy) = (device.direct(), vec![0u8; 32 << 20]);
    let all: Vec<u64> = (0..32 * 256).map(place).collect();
    let at_of = |block: u64| all.binary_search(&block).expect("only places are written");
    let mut page = Page::new(1 << 20);
    let mut rounds = 0u64;
    std::thread::scope(|scope| {
        for thread in 0..6u64 {
            let (file, stop, stamp) = (device.direct(), &stop, &stamp);
            scope.spawn(move || {
                let (mut page, mut random) = (Page::new(65536), Random(thread + 11));
                while !stop.load(Ordering::Relaxed) {
                    let count = 1 + random.below(16);
                    let at = random.below(32 * 256 - count);
                    // A write stays in its chunk: the places after it are elsewhere.
                    let count = count.min(chunk - at % chunk);
                    let block = place(at);
                    let bytes = (count * 4096) as usize;
                    let mark = stamp.fetch_add(1, Ordering::Relaxed);
                    page.get()[..bytes].chunks_mut(8).for_each(|word| word.copy_from_slice(&mark.to_le_bytes()));
                    file.write_all_at(&page.get()[..bytes], block * 4096).unwrap();
                }
            });
        }
        let mut round = |tracker: &mut Tracker| {
            let taken = flip_and_take(tracker);
            for run in taken.runs(256) {
                let (bytes, from) = (run.bytes(size), at_of(run.start) * 4096);
                let length = bytes.len as usize;
                reader.read_exact_at(&mut page.get()[..length], bytes.offset).unwrap();
                copy[from..from + length].copy_from_slice(&page.get()[..length]);
            }
            rounds += 1;
            taken.count()
        };
        let begun = Instant::now();
        let mut blocks = 0;
        while begun.elapsed() < Duration::from_secs(6) {
            blocks += round(&mut tracker);
        }
        stop.store(true, Ordering::Relaxed);
        // The writers end by themselves; what they had under way is in the last round at the latest.
        while stamp.load(Ordering::Relaxed) != {
            std::thread::sleep(Duration::from_millis(50));
            stamp.load(Ordering::Relaxed)
        } {}
        round(&mut tracker);
        eprintln!("{blocks} blocks read in {rounds} rounds, {} writes", stamp.load(Ordering::Relaxed));
    });
    let (image, mut now) = (File::open(device.image()).unwrap(), vec![0u8; 32 << 20]);
    for (block, bytes) in all.iter().zip(now.chunks_mut(4096)) {
        image.read_exact_at(bytes, block * 4096).unwrap();
    }
    let differing = runs(&changed(&copy, &now));
    assert_eq!(differing, []);
    acknowledge(&mut tracker, 1);
    assert!(flip_and_take(&mut tracker).is_empty());
    no_doubts(&mut tracker, &device);
}

fn storm(kind: &str) {
    let (pins, device) = (Pins::new(kind), Loop::new(512 * MIB));
    let mut tracker = tracked(&pins, &device);
    let before = device.bytes();
    let stop = AtomicBool::new(false);
    let mut union = BlockSet::empty(device.blocks());
    let flips = std::thread::scope(|scope| {
        let flipper = scope.spawn(|| {
            let mut flips = 0u64;
            while !stop.load(Ordering::Relaxed) {
                union.union(&flip_and_take(&mut tracker));
                flips += 1;
            }
            flips
        });
        let mounted = Mounted::new(&device, kind);
        let at = |name: &str| mounted.path().join(name).to_str().unwrap().to_owned();
        let common = ["--time_based", "--runtime=4", "--group_reporting", "--output=/dev/null"];
        let fio = |args: &[&str]| {
            let child = Command::new("fio").args(args).args(common).spawn().unwrap();
            move || assert!({ child }.wait().unwrap().success())
        };
        let (direct, mapped) = (at("direct"), at("mapped"));
        let waits: Vec<Box<dyn FnOnce()>> = vec![
            Box::new(fio(&[
                "--name=d",
                &format!("--filename={direct}"),
                "--size=64m",
                "--rw=randwrite",
                "--bs=512-64k",
                "--direct=1",
                "--ioengine=libaio",
                "--iodepth=16",
            ])),
            Box::new(fio(&[
                "--name=m",
                &format!("--filename={mapped}"),
                "--size=32m",
                "--rw=randwrite",
                "--bs=4k",
                "--ioengine=mmap",
                "--fsync=64",
            ])),
        ];
        for round in 0..4 {
            let dir = at(&format!("tree{round}"));
            fs::create_dir(&dir).unwrap();
            (0..300).for_each(|n| fs::write(format!("{dir}/{n}"), vec![n as u8; 700 * n]).unwrap());
            run("dd", &["if=/dev/urandom", &format!("of={}", at("dd")), "bs=1M", "count=24", "conv=fsync", "status=none"]);
            run("sync", &["-f", &dir]);
            fs::remove_dir_all(&dir).unwrap();
            run("fstrim", &["-l", "48M", mounted.path().to_str().unwrap()]);
        }
        waits.into_iter().for_each(|wait| wait());
        drop(mounted);
        stop.store(true, Ordering::Relaxed);
        flipper.join().unwrap()
    });
    union.union(&flip_and_take(&mut tracker));
    let mut missed = changed(&before, &device.bytes());
    let differing = missed.count();
    missed.subtract(&union);
    eprintln!("{kind}: {flips} flips, {differing} blocks differ, {} were marked", union.count());
    assert_eq!(runs(&missed), []);
    assert!(tracker.dirty(VOLUME).unwrap() == union, "what was taken is held");
    assert!(differing > 10_000, "the storm was a breeze: {differing}");
    assert!(union.count() < device.blocks() * 3 / 4, "a set of everything would prove nothing");
    no_doubts(&mut tracker, &device);
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_storm_on_ext4_is_seen_whole() {
    storm("ext4");
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_storm_on_xfs_is_seen_whole() {
    storm("xfs");
}

// ---- continuity and doubt ------------------------------------------------------------------------------------------

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn two_groups_flip_apart() {
    let (pins, one, other) = (Pins::new("groups"), Loop::new(16 * MIB), Loop::new(16 * MIB));
    let mut tracker = tracked(&pins, &one);
    let (group, volume) = (Uuid([2; 16]), Uuid([3; 16]));
    assert_eq!(tracker.track(group, volume, &other.identity()).unwrap(), Continuity::Fresh);
    let mut page = Page::new(4096);
    one.direct().write_all_at(page.get(), 4096).unwrap();
    other.direct().write_all_at(page.get(), 8192).unwrap();
    tracker.flip(GROUP).unwrap();
    assert_eq!(runs(&tracker.taken(VOLUME).unwrap()), [(1, 1)]);
    assert_eq!(runs(&tracker.active(volume).unwrap()), [(2, 1)]);
    assert!(tracker.taken(volume).unwrap().is_empty());
    let base = Base { acked: (Position { epoch: 4, generation: 5 }, Digest([6; 32])), pending: Default::default() };
    tracker.set_base(group, base).unwrap();
    acknowledge(&mut tracker, 1);
    assert_eq!(tracker.dirty_blocks(volume).unwrap(), 1);
    tracker.untrack(VOLUME).unwrap();
    assert_eq!(tracker.flip(GROUP).unwrap_err().code, Code::GroupUnknown);
    drop(tracker);
    let mut tracker = Tracker::open(&pins.0).unwrap();
    assert_eq!(tracker.track(group, volume, &other.identity()).unwrap(), Continuity::Unbroken);
    assert_eq!(tracker.base(group).unwrap(), base);
    assert_eq!(runs(&tracker.active(volume).unwrap()), [(2, 1)]);
    assert_eq!(tracker.track(GROUP, VOLUME, &one.identity()).unwrap(), Continuity::Fresh);
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn bits_leave_only_against_the_receipt_that_is_awaited() {
    let (pins, device) = (Pins::new("receipt"), Loop::new(16 * MIB));
    let mut tracker = tracked(&pins, &device);
    let (file, mut page) = (device.direct(), Page::new(4096));
    let place = |generation: u64| (Position { epoch: 1, generation }, Digest([generation as u8; 32]));
    let receipt = |generation: u64| TestReceipt(place(generation).0, place(generation).1);
    file.write_all_at(page.get(), 3 * 4096).unwrap();
    tracker.flip(GROUP).unwrap();
    assert_eq!(tracker.release(GROUP, &receipt(1)).unwrap_err().code, Code::ChainBroken, "nothing is awaited");
    assert_eq!(tracker.release(GROUP, &TestReceipt(Position::default(), Digest::default())).unwrap_err().code, Code::ChainBroken);
    tracker.set_base(GROUP, Base { acked: Default::default(), pending: place(1) }).unwrap();
    assert_eq!(tracker.release(GROUP, &receipt(2)).unwrap_err().code, Code::ChainBroken, "another generation");
    let forged = TestReceipt(place(1).0, Digest([9; 32]));
    assert_eq!(tracker.release(GROUP, &forged).unwrap_err().code, Code::ChainBroken, "another digest");
    assert_eq!(runs(&tracker.taken(VOLUME).unwrap()), [(3, 1)]);
    // Aborted, written again, cut again; now the receipt of the first cut arrives late: it is remembered, the bits stay.
    file.write_all_at(page.get(), 3 * 4096).unwrap();
    tracker.flip(GROUP).unwrap();
    tracker.release(GROUP, &receipt(1)).unwrap();
    assert_eq!(tracker.base(GROUP).unwrap().acked, place(1));
    assert_eq!(runs(&tracker.taken(VOLUME).unwrap()), [(3, 1)]);
    // Rounds: what earlier flips took is held until the receipt, and leaves with it.
    tracker.mark(VOLUME, &set(4096, &[(100, 300)])).unwrap();
    tracker.flip(GROUP).unwrap();
    file.write_all_at(page.get(), 9 * 4096).unwrap();
    tracker.flip(GROUP).unwrap();
    assert_eq!(runs(&tracker.taken(VOLUME).unwrap()), [(9, 1)]);
    assert_eq!(runs(&tracker.dirty(VOLUME).unwrap()), [(3, 1), (9, 1), (100, 300)]);
    tracker.give_back(GROUP).unwrap();
    assert_eq!(runs(&flip_and_take(&mut tracker)), [(3, 1), (9, 1), (100, 300)]);
    tracker.set_base(GROUP, Base { acked: place(1), pending: place(2) }).unwrap();
    tracker.release(GROUP, &receipt(2)).unwrap();
    assert_eq!(tracker.dirty_blocks(VOLUME).unwrap(), 0);
    assert_eq!(tracker.mark(VOLUME, &BlockSet::full(4095)).unwrap_err().code, Code::Internal);
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn another_disk_or_another_size_begins_afresh() {
    let (pins, mut device) = (Pins::new("identity"), Loop::new(16 * MIB));
    let mut tracker = tracked(&pins, &device);
    let mut page = Page::new(4096);
    device.direct().write_all_at(page.get(), 4096).unwrap();
    no_doubts(&mut tracker, &device);
    let stale = device.identity();

    // Grown under the same name and sequence number.
    File::options().write(true).open(device.image()).unwrap().set_len(32 * MIB).unwrap();
    run("losetup", &["-c", device.path.to_str().unwrap()]);
    assert!(reasons(&mut tracker, &device).contains("size in bytes"));
    tracker.trust_from_here(GROUP).unwrap();
    assert!(reasons(&mut tracker, &device).contains("size in bytes"), "no trust in a device that is not the recorded one");
    assert_eq!(tracker.track(GROUP, VOLUME, &stale).unwrap_err().code, Code::IdentityChanged);
    assert_eq!(tracker.track(GROUP, VOLUME, &device.identity()).unwrap(), Continuity::Fresh);
    assert_eq!(tracker.dirty_blocks(VOLUME).unwrap(), 0);
    device.direct().write_all_at(page.get(), 20 * MIB).unwrap();
    assert_eq!(runs(&tracker.active(VOLUME).unwrap()), [(5120, 1)]);
    no_doubts(&mut tracker, &device);

    // Detached and attached again: the same file, perhaps the same name, another sequence number.
    run("losetup", &["-d", device.path.to_str().unwrap()]);
    device.attach();
    device.direct().write_all_at(page.get(), 0).unwrap();
    assert!(reasons(&mut tracker, &device).contains("number"));
    drop(tracker);
    let mut tracker = Tracker::open(&pins.0).unwrap();
    assert_eq!(tracker.track(GROUP, VOLUME, &device.identity()).unwrap(), Continuity::Fresh);
    assert_eq!(tracker.dirty_blocks(VOLUME).unwrap(), 0);
    no_doubts(&mut tracker, &device);
    // One device, one volume.
    assert_eq!(tracker.track(GROUP, Uuid([9; 16]), &device.identity()).unwrap_err().code, Code::VolumeInUse);
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn detached_programs_are_doubted_and_the_witness_counts() {
    let (pins, device) = (Pins::new("detach"), Loop::new(16 * MIB));
    let mut tracker = tracked(&pins, &device);
    let (file, mut page) = (device.direct(), Page::new(65536));
    let unpin = |name: &str| fs::remove_file(pins.inner().join(name)).unwrap();
    file.write_all_at(page.get(), 0).unwrap();
    unpin("link_complete_a");
    file.write_all_at(page.get(), 0).unwrap();
    no_doubts(&mut tracker, &device);
    assert_eq!(tracker.active(VOLUME).unwrap().count(), 16);

    unpin("link_complete_b");
    let without_writes = reasons(&mut tracker, &device);
    assert!(without_writes.contains("no program of kind complete"), "{without_writes}");
    assert!(!without_writes.contains("the kernel counted"), "{without_writes}");
    // Nobody is attached any more; what is written then is in the kernel's account alone.
    detach(&pins, &mut tracker, "submit");
    file.write_all_at(page.get(), MIB).unwrap();
    let with_writes = reasons(&mut tracker, &device);
    assert!(with_writes.contains("the kernel counted 128 sectors written or discarded, the tracker 0"), "{with_writes}");
    drop(tracker);

    // The next life takes the ruin down and begins afresh.
    let mut tracker = tracked(&pins, &device);
    file.write_all_at(page.get(), 0).unwrap();
    assert_eq!(runs(&tracker.active(VOLUME).unwrap()), [(0, 16)]);
    no_doubts(&mut tracker, &device);
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn pins_of_another_build_or_half_made_are_taken_down() {
    let (pins, device) = (Pins::new("build"), Loop::new(16 * MIB));
    let tracker = tracked(&pins, &device);
    let inner = pins.inner();
    drop(tracker);
    let other = pins.0.join("v1-0123456789abcdef");
    fs::rename(&inner, &other).unwrap();
    let mut tracker = Tracker::open(&pins.0).unwrap();
    assert_eq!(pins.inner(), inner, "only our own build's pins are left");
    assert_eq!(tracker.track(GROUP, VOLUME, &device.identity()).unwrap(), Continuity::Fresh);
    drop(tracker);
    fs::remove_file(inner.join("group_notes")).unwrap();
    let mut tracker = Tracker::open(&pins.0).unwrap();
    assert_eq!(tracker.track(GROUP, VOLUME, &device.identity()).unwrap(), Continuity::Fresh);
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_device_without_requests_is_refused() {
    let pins = Pins::new("refuse");
    let mut tracker = Tracker::open(&pins.0).unwrap();
    let number = fs::read_to_string("/sys/block/zram0/dev").expect("this test needs the zram module (modprobe zram)");
    let (major, minor) = number.trim().split_once(':').unwrap();
    let (major, minor) = (major.parse().unwrap(), minor.parse().unwrap());
    let identity = DeviceIdentity { major, minor, diskseq: 1, size_bytes: MIB, backing: None };
    let fault = tracker.track(GROUP, VOLUME, &identity).unwrap_err();
    assert_eq!(fault.code, Code::KernelUnsupported, "{fault}");
    assert!(fault.to_string().contains("/dev/zram0"), "{fault}");
    let nowhere = DeviceIdentity { major: 4000, ..identity };
    assert_eq!(tracker.track(GROUP, VOLUME, &nowhere).unwrap_err().code, Code::IdentityChanged);
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn bpffs_is_mounted_where_the_pins_are_wanted() {
    let dir = tempfile::Builder::new().prefix("doublure-tracker").tempdir_in("/var/tmp").unwrap();
    struct Unmount(PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let _gone = Command::new("umount").arg(&self.0).output();
        }
    }
    let pins = dir.path().join("bpf").join("deep").join("pins");
    let _unmount = Unmount(dir.path().join("bpf"));
    drop(Tracker::open(&pins).unwrap());
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(mounts.contains(&format!("{} bpf ", dir.path().join("bpf").display())), "{mounts}");
    drop(Tracker::open(&pins).unwrap());
}

// ---- large volumes -------------------------------------------------------------------------------------------------

/// Just below the largest file of ext4.
const HUGE: u64 = 16 * TIB - 16 * MIB;

/// Writes `count` single blocks anywhere on the device.
fn scatter(device: &Loop, seed: u64, count: u64) -> BlockSet {
    let (file, mut page, mut random) = (device.direct(), Page::new(4096), Random(seed));
    let mut written = BlockSet::empty(device.blocks());
    for _ in 0..count {
        let block = random.below(device.blocks());
        file.write_all_at(page.get(), block * 4096).unwrap();
        written.insert(BlockRun { start: block, count: 1 });
    }
    written
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn every_block_written_to_sixteen_tib_is_found() {
    let (pins, device) = (Pins::new("huge"), Loop::new(HUGE));
    let mut tracker = tracked(&pins, &device);
    let first = scatter(&device, 3, 3000);
    assert!(tracker.active(VOLUME).unwrap() == first);
    assert!(flip_and_take(&mut tracker) == first);
    let second = scatter(&device, 4, 2000);
    drop(tracker);
    // The next life finds the leaves of both halves, and those of what is held after one more flip.
    let mut tracker = Tracker::open(&pins.0).unwrap();
    assert_eq!(tracker.track(GROUP, VOLUME, &device.identity()).unwrap(), Continuity::Unbroken);
    assert!(tracker.taken(VOLUME).unwrap() == first);
    assert!(tracker.active(VOLUME).unwrap() == second);
    assert_takes(&mut tracker, &second, &first);
    let mut both = first.clone();
    both.union(&second);
    assert!(tracker.dirty(VOLUME).unwrap() == both);
    drop(tracker);
    let mut tracker = Tracker::open(&pins.0).unwrap();
    assert_eq!(tracker.track(GROUP, VOLUME, &device.identity()).unwrap(), Continuity::Unbroken);
    assert!(tracker.dirty(VOLUME).unwrap() == both);
    assert_eq!(tracker.dirty_blocks(VOLUME).unwrap(), both.count());
    // Given back while the device is written: a program sets the bits, in leaves that others are setting bits in.
    let third = std::thread::scope(|scope| {
        let writer = scope.spawn(|| scatter(&device, 3, 3000));
        tracker.give_back(GROUP).unwrap();
        writer.join().unwrap()
    });
    assert!(third == first, "the same places again");
    assert!(tracker.active(VOLUME).unwrap() == both);
    tracker.mark(VOLUME, &BlockSet::full(device.blocks())).unwrap();
    assert_eq!(flip_and_take(&mut tracker).runs(u64::MAX).count(), 1);
    acknowledge(&mut tracker, 1);
    assert_eq!(tracker.dirty_blocks(VOLUME).unwrap(), 0);
    no_doubts(&mut tracker, &device);
}

/// A flip takes exactly `expected`; or, where it finds that a completion was not seen (T8), what has no receipt once more too.
fn assert_takes(tracker: &mut Tracker, expected: &BlockSet, without_receipt: &BlockSet) {
    let taken = flip_and_take(tracker);
    let mut all = expected.clone();
    all.union(without_receipt);
    assert!(taken == *expected || taken == all, "{taken:?}, not {expected:?} nor {all:?}");
}

/// Marks and writes meet in the same leaf: an update that replaced it would lose what a program set meanwhile. Without the programs
/// at completion, which would set most of it once more.
#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn marks_and_writes_in_the_same_leaf_lose_nothing() {
    const RANGE: u64 = 56 * 64;
    let (pins, device) = (Pins::new("meet"), Loop::new(TIB));
    let mut tracker = tracked(&pins, &device);
    detach(&pins, &mut tracker, "complete");
    let (file, blocks) = (device.direct(), device.blocks());
    let mut expected = BlockSet::empty(blocks);
    for range in 0..6 {
        let places = |odd: u64| (0..RANGE / 2).map(move |n| range * RANGE + 2 * n + odd);
        let mut marks = BlockSet::empty(blocks);
        places(1).for_each(|block| marks.insert(BlockRun { start: block, count: 1 }));
        // All but the last block: a full leaf would be dirty as a whole.
        marks.remove(BlockRun { start: (range + 1) * RANGE - 1, count: 1 });
        expected.union(&marks);
        places(0).for_each(|block| expected.insert(BlockRun { start: block, count: 1 }));
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut page = Page::new(4096);
                places(0).for_each(|block| file.write_all_at(page.get(), block * 4096).unwrap());
            });
            while !writer.is_finished() {
                tracker.mark(VOLUME, &marks).unwrap();
            }
        });
    }
    let (mut lost, mut added) = (expected.clone(), flip_and_take(&mut tracker));
    lost.subtract(&added);
    added.subtract(&expected);
    assert_eq!((runs(&lost), runs(&added)), (vec![], vec![]));
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn where_no_leaf_can_be_made_the_whole_range_is_dirty() {
    const RANGE: u64 = 56 * 64;
    let (pins, device) = (Pins::new("refused"), Loop::new(TIB));
    let mut tracker = Tracker::open_with(&pins.0, Some(100)).unwrap();
    assert_eq!(tracker.track(GROUP, VOLUME, &device.identity()).unwrap(), Continuity::Fresh);
    let blocks = device.blocks();
    let rounded = |set: &BlockSet| {
        let mut ranges = BlockSet::empty(blocks);
        set.runs(u64::MAX).for_each(|run| ranges.insert(BlockRun { start: run.start / RANGE * RANGE, count: RANGE }));
        ranges
    };
    let check = |taken: &BlockSet, written: &BlockSet| {
        let (mut lost, mut added) = (written.clone(), taken.clone());
        lost.subtract(taken);
        assert_eq!(runs(&lost), []);
        added.subtract(&rounded(written));
        assert_eq!(runs(&added), [], "only what lies in a range that was written");
        assert!(taken.count() > written.count() * 100, "{taken:?}: most ranges are dirty as a whole");
    };
    let mut written = scatter(&device, 5, 1000);
    check(&flip_and_take(&mut tracker), &written);
    // The other half, what is held, and marks by user space meet the same limit.
    let more = scatter(&device, 6, 1000);
    check(&flip_and_take(&mut tracker), &more);
    written.union(&more);
    check(&tracker.dirty(VOLUME).unwrap(), &written);
    tracker.give_back(GROUP).unwrap();
    check(&tracker.active(VOLUME).unwrap(), &written);
    tracker.flip(GROUP).unwrap();
    acknowledge(&mut tracker, 1);
    assert_eq!(tracker.dirty_blocks(VOLUME).unwrap(), 0);
    // The room is there again.
    let few = scatter(&device, 7, 50);
    assert!(flip_and_take(&mut tracker) == few);
    tracker.flip(GROUP).unwrap();
    tracker.mark(VOLUME, &more).unwrap();
    check(&flip_and_take(&mut tracker), &more);
    no_doubts(&mut tracker, &device);
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn groups_that_flip_together_flip_each_as_alone() {
    let (pins, one, other) = (Pins::new("together"), Loop::new(16 * MIB), Loop::new(TIB));
    let mut tracker = tracked(&pins, &one);
    let (group, volume) = (Uuid([2; 16]), Uuid([3; 16]));
    tracker.track(group, volume, &other.identity()).unwrap();
    let mut page = Page::new(4096);
    for round in 1..4u64 {
        one.direct().write_all_at(page.get(), 4096 * round).unwrap();
        other.direct().write_all_at(page.get(), 8192 * round).unwrap();
        assert_eq!(tracker.flip_all(&[GROUP, group, Uuid([8; 16])]).unwrap_err().code, Code::GroupUnknown);
        assert_eq!(runs(&tracker.active(VOLUME).unwrap()), [(round, 1)], "none was flipped");
        // Named twice, flipped once.
        tracker.flip_all(&[GROUP, group, GROUP]).unwrap();
        assert_eq!(runs(&tracker.taken(VOLUME).unwrap()), [(round, 1)]);
        assert_eq!(runs(&tracker.taken(volume).unwrap()), [(2 * round, 1)]);
        assert_eq!(tracker.dirty_blocks(VOLUME).unwrap(), round, "held");
    }
    tracker.flip_all(&[]).unwrap();
    no_doubts(&mut tracker, &one);
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
    tracker.flip(GROUP).unwrap();
    eprintln!("flip of a full TiB without a receipt: {:?}", begun.elapsed());
    assert_eq!(tracker.dirty_blocks(VOLUME).unwrap(), blocks);
    acknowledge(&mut tracker, 1);
    assert_eq!(tracker.dirty_blocks(VOLUME).unwrap(), 0);
}
