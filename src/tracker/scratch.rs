//! The self-test: known writes to a scratch loop device, each of which must leave its bits.
//!
//! One write for each way that is known to be easy to miss: small and unaligned, through a partition (whose bio names the
//! partition but carries the disk's sector), from the page cache, one single 128 MiB write from huge pages, a discard and
//! a write of zeroes. All four programs must have counted every one of them.

use crate::host::DeviceIdentity;
use crate::model::{BLOCK_BYTES, BlockRun, BlockSet, ByteRun, Code, Fault, Res, Uuid};
use crate::tracker::capture::{Calibration, Layout, Missed};
use crate::tracker::halves::set_of_run;
use crate::tracker::ring::What;
use crate::tracker::witness::NAMES;
use crate::tracker::{Continuity, Tracker};
use memmap2::{Advice, MmapMut};
use nix::sys::stat::{SFlag, major, makedev, minor, mknod, mode_t};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The group and volume of the self-test.
const SCRATCH: Uuid = Uuid(*b"doublure selftst");
/// Size of the scratch device: 65,536 blocks, sparse but for what is written.
const SCRATCH_BYTES: u64 = 256 << 20;
/// The one large write.
const LARGE_BYTES: usize = 128 << 20;
/// Alignment of the memory it comes from.
const HUGE_PAGE: usize = 2 << 20;
/// Where the partition begins: not on a block, so that rounding is tested too.
const PARTITION_AT: u64 = (200 << 20) + 3 * 512;
const PARTITION_BYTES: u64 = 4 << 20;

// ioctl numbers of <linux/loop.h>, <linux/fs.h>, <linux/blkpg.h>.
const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
const BLKPG: libc::c_ulong = 0x1269;
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKZEROOUT: libc::c_ulong = 0x127f;
const BLKGETDISKSEQ: libc::c_ulong = 0x8008_1280;
const BLKPG_ADD_PARTITION: i32 = 1;
/// Detach when the last descriptor closes (ours, at the latest when we die); scan partitions.
const LO_FLAGS: u32 = 4 | 8;

/// `struct loop_config` with its `struct loop_info64`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    names_and_keys: [u8; 64 + 64 + 32],
    init: [u64; 2],
    reserved: [u64; 8],
}

/// `struct blkpg_partition`.
#[repr(C)]
struct BlkpgPartition {
    start: i64,
    length: i64,
    number: i32,
    names: [u8; 128],
}

/// `struct blkpg_ioctl_arg`.
#[repr(C)]
struct BlkpgArg {
    op: i32,
    flags: i32,
    datalen: i32,
    data: *mut BlkpgPartition,
}

/// What was written, in words, where it must be seen, in bytes.
struct Expected {
    what: &'static str,
    blocks: BlockSet,
    sectors: u64,
    /// Small enough for its data to be captured.
    is_data: bool,
}

/// How often the test is run before completions that went by unseen count as blindness. A kernel may leave out tracing
/// programs now and then in the context that an interrupt found; a flip answers that, a program that never sees them is broken.
const TRIES: usize = 3;

/// Runs the test; the scratch volume and its device are gone afterwards, whatever happened.
pub(super) fn run(tracker: &mut Tracker, dir: &Path) -> Res<()> {
    let mut short = None;
    for _ in 0..TRIES {
        if tracker.volumes.contains_key(&SCRATCH) {
            tracker.untrack(SCRATCH)?;
        }
        let scratch = Scratch::attach(dir)?;
        let outcome = test(tracker, &scratch);
        if tracker.volumes.contains_key(&SCRATCH) {
            tracker.untrack(SCRATCH)?;
        }
        short = outcome?;
        match &short {
            None => return Ok(()),
            Some(words) => tracing::warn!("the tracker's self-test runs again: {words}"),
        }
    }
    Err(blind(short.unwrap_or_default()))
}

/// One run. Some = every block was seen, but not every completion, and in which program.
fn test(tracker: &mut Tracker, scratch: &Scratch) -> Res<Option<String>> {
    match tracker.track(SCRATCH, SCRATCH, &scratch.identity()?)? {
        Continuity::Fresh => {}
        Continuity::Unbroken => return Err(Fault::internal("the self-test", "its new device was taken for an old one")),
    }
    let slot = tracker.volume(SCRATCH)?.slot;
    let misses = tracker.kernel.misses()?;
    let expected = scratch.write_all()?;
    tracker.flip(SCRATCH)?;
    let taken = tracker.taken(SCRATCH)?;
    for write in &expected {
        let mut missed = write.blocks.clone();
        missed.subtract(&taken);
        if let Some(run) = missed.runs(1 << 40).next() {
            return Err(blind(format!("{}: block {} was written and not seen", write.what, run.start)));
        }
    }
    let mut extra = taken;
    expected.iter().for_each(|write| extra.subtract(&write.blocks));
    if let Some(run) = extra.runs(1 << 40).next() {
        return Err(blind(format!("block {} was seen and not written", run.start)));
    }
    let sectors: u64 = expected.iter().map(|write| write.sectors).sum();
    let counts = tracker.kernel.counts(slot)?;
    // A skipped run is the kernel's right (that is why there are copies); it is counted, and then the copies may differ.
    let skipped = tracker.kernel.misses()? != misses;
    let mut short = None;
    for (at, name) in NAMES.iter().enumerate() {
        let seen = counts.sectors[at];
        let words = format!("program {name} counted {seen} of {sectors} sectors");
        match seen == sectors || (skipped && 0 < seen && seen < sectors) {
            true => {}
            false if name.starts_with("complete") && seen < sectors => short = Some(words),
            false => return Err(blind(words)),
        }
    }
    scratch.write_after_flip()?;
    let late = set_of_run(LATE_BLOCK, 1, SCRATCH_BYTES / BLOCK_BYTES);
    if tracker.active(SCRATCH)? != late || tracker.taken(SCRATCH)?.intersects(&late) {
        return Err(blind(format!("a write to block {LATE_BLOCK} after the flip is not in the active half alone")));
    }
    Ok(short)
}

/// How often the calibration is tried: the kernel may move the page while it is looked at.
const CALIBRATIONS: usize = 5;
/// The ring of the proof: what is captured of the self-test fits several times.
const RING_BYTES: u32 = 16 << 20;

/// Finds out where the kernel maps its memory: the frame of a page of ours is known, and the program sees the page go by.
pub(super) fn calibrate(tracker: &Tracker, dir: &Path) -> Res<Layout> {
    let scratch = Scratch::attach(dir)?;
    let device = scratch.identity()?;
    let memory = |e: io::Error| Fault::io("the calibration's memory", &e);
    for _ in 0..CALIBRATIONS {
        let mut page = MmapMut::map_anon(page_bytes()).map_err(memory)?;
        getrandom::fill(&mut page).map_err(|e| Fault::internal("the calibration's memory", e.to_string()))?;
        page.lock().map_err(memory)?;
        let frame = frame_of(&page)?;
        let pattern = std::array::from_fn(|i| page[i]);
        let calibration = Calibration::begin(&tracker.kernel, device.major << 20 | device.minor, frame, pattern)?;
        scratch.direct.write_all_at(&page, 0).map_err(|e| Fault::io("the calibration's write", &e))?;
        // A locked page may still be moved by compaction; then the answer is worth nothing.
        if frame_of(&page)? != frame {
            continue;
        }
        let layout = calibration.layout()?;
        if cfg!(target_arch = "x86_64") && layout.vmemmap % (1 << 30) != 0 {
            continue;
        }
        return Ok(layout);
    }
    Err(Fault::new(
        Code::KernelUnsupported,
        "capture",
        "where this kernel maps its memory could not be found out",
        "cuts are made with a freeze instead",
    ))
}

fn page_bytes() -> usize {
    // SAFETY: sysconf(3) takes no pointers.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

/// The number of the frame that a page of ours lies in.
fn frame_of(page: &MmapMut) -> Res<u64> {
    let path = "/proc/self/pagemap";
    let mut entry = [0; 8];
    let at = (page.as_ptr() as usize / page_bytes() * 8) as u64;
    File::open(path).and_then(|map| map.read_exact_at(&mut entry, at)).map_err(|e| Fault::io(path, &e))?;
    // Bits 0 to 54; zero for whoever may not see them.
    match u64::from_ne_bytes(entry) & ((1 << 55) - 1) {
        0 => Err(Fault::new(
            Code::KernelUnsupported,
            path,
            "it does not show frame numbers",
            "cuts are made with a freeze instead",
        )),
        frame => Ok(frame),
    }
}

/// Captures the self-test's writes and compares what was captured with what the device holds. Nothing less proves it: a
/// layout that is wrong by a page reads other pages without any error.
pub(super) fn prove_capture(tracker: &mut Tracker, dir: &Path) -> Res<()> {
    let mut short = None;
    for _ in 0..TRIES {
        let scratch = Scratch::attach(dir)?;
        let outcome = tracker.track(SCRATCH, SCRATCH, &scratch.identity()?).and_then(|_| prove_once(tracker, &scratch));
        tracker.stop_capture(SCRATCH)?;
        tracker.untrack(SCRATCH)?;
        match outcome? {
            None => return Ok(()),
            some => short = some,
        }
    }
    Err(wrong_capture(short.unwrap_or_default()))
}

fn wrong_capture(cause: String) -> Fault {
    Fault::new(Code::KernelUnsupported, "capture", cause, "cuts are made with a freeze instead; report the kernel version")
}

/// One run. Some = something was not captured that a kernel may leave out now and then.
fn prove_once(tracker: &mut Tracker, scratch: &Scratch) -> Res<Option<String>> {
    let mut capture = tracker.start_capture(SCRATCH, &[SCRATCH], RING_BYTES)?;
    let expected = scratch.write_all()?;
    let mut records = Vec::new();
    let to = capture.produced();
    capture.walk(to, &mut |_, record| records.push(record))?;
    if capture.missed()?.iter().any(|(_, missed)| *missed == Missed::Anywhere) {
        return Ok(Some("records of known writes found no room in the ring".into()));
    }
    let blocks = SCRATCH_BYTES / BLOCK_BYTES;
    let (mut seen, mut copied) = (BlockSet::empty(blocks), BlockSet::empty(blocks));
    let mut held = vec![0; 1 << 20];
    for record in &records {
        let run = ByteRun { offset: record.offset_bytes, len: record.len_bytes };
        let (first, end) = (run.offset / BLOCK_BYTES, run.end().div_ceil(BLOCK_BYTES));
        seen.insert(BlockRun { start: first, count: end - first });
        let What::Data(position) = record.what else { continue };
        copied.insert(BlockRun { start: first, count: end - first });
        let held = &mut held[..record.len_bytes as usize];
        let read =
            OpenOptions::new().read(true).open(format!("/dev/{}", scratch.name)).and_then(|f| f.read_exact_at(held, run.offset));
        read.map_err(|e| Fault::io("reading the self-test's device", &e))?;
        if capture.bytes(position, held.len()) != &*held {
            return Err(wrong_capture(format!(
                "what was captured of {} bytes at {} is not what was written",
                run.len, run.offset
            )));
        }
    }
    for write in &expected {
        for (set, wanted) in [(&seen, true), (&copied, write.is_data)] {
            let mut missed = write.blocks.clone();
            missed.subtract(set);
            if wanted && let Some(run) = missed.runs(1 << 40).next() {
                return Ok(Some(format!("{}: block {} was written and not captured", write.what, run.start)));
            }
        }
    }
    Ok(None)
}

/// Written after the flip; nothing else touches it.
const LATE_BLOCK: u64 = 300;

fn blind(cause: String) -> Fault {
    Fault::new(
        Code::TrackerBlind,
        "the tracker's self-test",
        cause,
        "do not rely on this host's tracker; report the kernel version",
    )
}

/// A loop device over an unlinked file.
struct Scratch {
    name: String,
    dir: PathBuf,
    direct: File,
}

impl Scratch {
    fn attach(dir: &Path) -> Res<Scratch> {
        let fail = |what: &str, e: io::Error| Fault::io(format!("{what} for the self-test in {}", dir.display()), &e);
        let path = dir.join("tracker-selftest.img");
        let mut options = OpenOptions::new();
        let file =
            options.read(true).write(true).create(true).truncate(true).mode(0o600).open(&path).map_err(|e| fail("a file", e))?;
        fs::remove_file(&path).map_err(|e| fail("a file", e))?;
        file.set_len(SCRATCH_BYTES).map_err(|e| fail("a file", e))?;
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control").map_err(|e| {
            Fault::new(Code::KernelUnsupported, "/dev/loop-control", e.to_string(), "load the loop module (modprobe loop)")
        })?;
        // Somebody else may take the free device between the two calls.
        for _ in 0..16 {
            let number = control_ioctl(&control, LOOP_CTL_GET_FREE, 0).map_err(|e| fail("a free loop device", e))?;
            let name = format!("loop{number}");
            let mut direct = OpenOptions::new();
            let direct =
                direct.read(true).write(true).custom_flags(libc::O_DIRECT | libc::O_CLOEXEC).open(format!("/dev/{name}"));
            let direct = direct.map_err(|e| fail("a loop device", e))?;
            let config = LoopConfig {
                fd: file.as_raw_fd() as u32,
                block_size: 0,
                device: 0,
                inode: 0,
                rdevice: 0,
                offset: 0,
                sizelimit: 0,
                number: 0,
                encrypt_type: 0,
                encrypt_key_size: 0,
                flags: LO_FLAGS,
                names_and_keys: [0; 160],
                init: [0; 2],
                reserved: [0; 8],
            };
            // SAFETY: LOOP_CONFIGURE reads one `struct loop_config`, which `config` is, and keeps no pointer to it.
            let done = unsafe { libc::ioctl(direct.as_raw_fd(), LOOP_CONFIGURE as _, &raw const config) };
            if done == 0 {
                return Ok(Scratch { name, dir: dir.into(), direct });
            }
            let error = io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::EBUSY) {
                return Err(fail("configuring a loop device", error));
            }
        }
        Err(Fault::new(Code::TimedOut, "a loop device for the self-test", "sixteen in a row were taken by others", "try again"))
    }

    fn identity(&self) -> Res<DeviceIdentity> {
        let fail = |e: io::Error| Fault::io(format!("/dev/{}", self.name), &e);
        let rdev = self.direct.metadata().map_err(fail)?.rdev();
        let mut diskseq = 0u64;
        // SAFETY: BLKGETDISKSEQ writes one u64 to the given address.
        if unsafe { libc::ioctl(self.direct.as_raw_fd(), BLKGETDISKSEQ as _, &raw mut diskseq) } != 0 {
            return Err(fail(io::Error::last_os_error()));
        }
        Ok(DeviceIdentity {
            major: major(rdev) as u32,
            minor: minor(rdev) as u32,
            diskseq,
            size_bytes: SCRATCH_BYTES,
            backing: None,
        })
    }

    /// Every write of the test, and what it must leave.
    fn write_all(&self) -> Res<Vec<Expected>> {
        let fail = |what: &'static str| move |e: io::Error| Fault::io(format!("the self-test's {what}"), &e);
        let memory = huge_memory().map_err(fail("memory"))?;
        let mut done = Vec::new();
        let mut expect = |what: &'static str, offset: u64, bytes: u64| {
            let (first, end) = (offset / BLOCK_BYTES, (offset + bytes).div_ceil(BLOCK_BYTES));
            let blocks = set_of_run(first, end - first, SCRATCH_BYTES / BLOCK_BYTES);
            let is_data = bytes < LARGE_BYTES as u64 && !what.starts_with("a discard") && what != "a write of zeroes";
            done.push(Expected { what, blocks, sectors: bytes / 512, is_data });
        };

        let small = [
            ("a write to the first block", 0, 4096),
            ("a write to the last block", SCRATCH_BYTES - 4096, 4096),
            ("a write of one sector", 100 * 4096 + 7 * 512, 512),
            ("a write across three blocks", 200 * 4096 + 512, 8192),
            ("a write across two words", 63 * 4096, 8192),
            ("a write of 256 KiB", 2000 * 4096, 256 << 10),
        ];
        for (number, (what, offset, bytes)) in small.into_iter().enumerate() {
            // From a page of its own each, and not from its beginning: capture must find the right bytes of the right page.
            let from = (number + 1) * (3 << 20) + number * 4096 + (number % 2) * 512;
            self.direct.write_all_at(&memory[from..from + bytes], offset).map_err(fail(what))?;
            expect(what, offset, bytes as u64);
        }

        let partition = self.partition()?;
        partition.write_all_at(&memory[77 * 4096..78 * 4096], 24 * 512).map_err(fail("a write through a partition"))?;
        expect("a write through a partition", PARTITION_AT + 24 * 512, 4096);
        drop(partition);

        let buffered = OpenOptions::new().write(true).open(format!("/dev/{}", self.name)).map_err(fail("buffered write"))?;
        buffered.write_all_at(&memory[99 * 4096..102 * 4096], 1000 * 4096).map_err(fail("buffered write"))?;
        buffered.sync_all().map_err(fail("buffered write"))?;
        expect("a buffered write", 1000 * 4096, 12288);

        self.direct.write_all_at(&memory[..LARGE_BYTES], 64 << 20).map_err(fail("128 MiB write"))?;
        expect("a write of 128 MiB", 64 << 20, LARGE_BYTES as u64);

        let ranges = [("a discard", BLKDISCARD, 32u64 << 20, 5u64 << 20), ("a write of zeroes", BLKZEROOUT, 48 << 20, 3 << 20)];
        for (what, request, offset, bytes) in ranges {
            let range = [offset, bytes];
            // SAFETY: both requests read two u64 at the given address.
            match unsafe { libc::ioctl(self.direct.as_raw_fd(), request as _, range.as_ptr()) } {
                0 => expect(what, offset, bytes),
                _ => match io::Error::last_os_error() {
                    // A file system below that cannot punch holes: then nothing of the kind will ever be submitted.
                    error if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                        tracing::info!("the self-test could not try {what}: {error}")
                    }
                    error => return Err(fail(what)(error)),
                },
            }
        }
        Ok(done)
    }

    fn write_after_flip(&self) -> Res<()> {
        let memory = MmapMut::map_anon(4096).map_err(|e| Fault::io("the self-test's memory", &e))?;
        self.direct.write_all_at(&memory, LATE_BLOCK * BLOCK_BYTES).map_err(|e| Fault::io("the self-test's last write", &e))
    }

    /// Makes a partition and opens it. It goes with the device.
    fn partition(&self) -> Res<File> {
        let fail = |e: io::Error| Fault::io(format!("a partition of /dev/{} for the self-test", self.name), &e);
        let mut data = BlkpgPartition { start: PARTITION_AT as i64, length: PARTITION_BYTES as i64, number: 1, names: [0; 128] };
        let datalen = size_of::<BlkpgPartition>() as i32;
        let arg = BlkpgArg { op: BLKPG_ADD_PARTITION, flags: 0, datalen, data: &raw mut data };
        // SAFETY: BLKPG reads one `struct blkpg_ioctl_arg` and the `struct blkpg_partition` it points to; both live here.
        if unsafe { libc::ioctl(self.direct.as_raw_fd(), BLKPG as _, &raw const arg) } != 0 {
            return Err(fail(io::Error::last_os_error()));
        }
        // Its node in /dev may be made late or (in a container) never: we make our own.
        let numbers = fs::read_to_string(format!("/sys/block/{0}/{0}p1/dev", self.name)).map_err(fail)?;
        let parsed = numbers.trim().split_once(':').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        let (major, minor) = parsed.ok_or_else(|| Fault::internal("the self-test's partition", format!("number {numbers:?}")))?;
        let node = self.dir.join("tracker-selftest.part");
        let _leftover = fs::remove_file(&node);
        let mode = nix::sys::stat::Mode::from_bits_truncate(0o600 as mode_t);
        mknod(&node, SFlag::S_IFBLK, mode, makedev(major, minor)).map_err(|e| fail(e.into()))?;
        let opened = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT | libc::O_CLOEXEC).open(&node);
        fs::remove_file(&node).map_err(fail)?;
        opened.map_err(fail)
    }
}

fn control_ioctl(file: &File, request: libc::c_ulong, arg: libc::c_ulong) -> io::Result<i32> {
    // SAFETY: the request takes a plain number and no pointer.
    match unsafe { libc::ioctl(file.as_raw_fd(), request as _, arg) } {
        done if done < 0 => Err(io::Error::last_os_error()),
        done => Ok(done),
    }
}

/// A mapping of at least the large write, filled, in huge pages where the kernel gives them, beginning on one.
fn huge_memory() -> io::Result<Aligned> {
    let map = MmapMut::map_anon(LARGE_BYTES + HUGE_PAGE)?;
    if let Err(error) = map.advise(Advice::HugePage) {
        tracing::debug!("no huge pages: {error}");
    }
    let skip = map.as_ptr().align_offset(HUGE_PAGE).min(HUGE_PAGE);
    let mut memory = Aligned { map, skip };
    // Every eight bytes differ from all others.
    for (number, word) in memory.map[skip..skip + LARGE_BYTES].chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_ne_bytes());
    }
    Ok(memory)
}

/// Memory from an aligned address on.
struct Aligned {
    map: MmapMut,
    skip: usize,
}

impl std::ops::Deref for Aligned {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.map[self.skip..]
    }
}
