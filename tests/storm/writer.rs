//! The threads that write. Each has ranges of its own on its targets, so that no two writes of one sector are in flight at the
//! same time; only `Mode::Clash` breaks that, and says so in the journal.

use super::Dice;
use super::checker::Checker;
use super::journal::{End, Journal, Kind};
use super::stamp::{Follows, Found, Pool, SECTOR, Stamp};
use io_uring::{IoUring, opcode, types};
use memmap2::{Advice, MmapMut, MmapOptions};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

const HUGE: usize = 2 << 20;
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKZEROOUT: libc::c_ulong = 0x127f;
const FITRIM: libc::c_ulong = 0xc018_5879;

/// Where to write.
#[derive(Clone, Debug)]
pub struct Target {
    /// A block device or a file, at least `bytes` long.
    pub path: PathBuf,
    /// How much of it the storm may use, from its beginning.
    pub bytes: u64,
    /// The smallest unit of a direct write, a power of two from 512 to 4096.
    pub unit: u64,
    /// The backing file may run out of room. A loop device then calls a write that was cut short a success (seen on 6.18), so
    /// every success is read back from the device before it is noted; one that is not there counts as failed.
    pub read_back: bool,
    /// A file on a mounted file system: only a sync makes a write durable. Otherwise a completed direct write is.
    pub on_file_system: bool,
    /// One thread for each; their ranges share the target evenly.
    pub modes: Vec<Mode>,
}

impl Target {
    /// A raw device with writers of all modes.
    pub fn raw(path: &Path, bytes: u64) -> Target {
        let modes = vec![Mode::Direct, Mode::Buffered, Mode::Mapped, Mode::Ring];
        Target { path: path.into(), bytes, unit: 512, read_back: false, on_file_system: false, modes }
    }
    /// A file on a mounted file system. It has its full size and its blocks already (a mapped write to a hole kills).
    pub fn file(path: &Path, bytes: u64) -> Target {
        Target { unit: 4096, on_file_system: true, ..Target::raw(path, bytes) }
    }
}

/// How a thread writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// O_DIRECT, one after the other, with zeroed and discarded ranges in between.
    Direct,
    /// Through the page cache, with a sync now and then.
    Buffered,
    /// Through a shared mapping, with a sync now and then.
    Mapped,
    /// io_uring and O_DIRECT, up to `Options::depth` at once, some of them RWF_NOWAIT.
    Ring,
    /// Two threads with O_DIRECT in the same range. Its content is undefined.
    Clash,
}

/// What the storm is like.
#[derive(Clone, Debug)]
pub struct Options {
    /// The largest single write, in bytes. At most 512 MiB and the thread's range.
    pub largest: usize,
    /// One write in so many may be that large (and every such one of a direct writer takes memory of its size).
    pub large_once_in: u64,
    /// The most that io_uring writers have in flight.
    pub depth: usize,
    /// Pairs of targets with a writer that writes to both in turn, each write following the other; and whether through the
    /// page cache with a sync after each write (else direct, without any).
    pub chains: Vec<(usize, usize, bool)>,
    /// Direct writers also zero ranges (BLKZEROOUT, or a zeroed range of a file).
    pub zero: bool,
    /// Direct writers also discard ranges (BLKDISCARD, or a punched hole).
    pub discard: bool,
    /// io_uring writers use RWF_NOWAIT.
    pub nowait: bool,
    /// Mount points that are trimmed about once a second.
    pub trim: Vec<PathBuf>,
    /// How long each thread rests between two writes.
    pub rest: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            largest: 8 << 20,
            large_once_in: 4000,
            depth: 64,
            chains: vec![],
            zero: true,
            discard: true,
            nowait: true,
            trim: vec![],
            rest: Duration::ZERO,
        }
    }
}

/// What a storm did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Summary {
    /// Writes of all kinds.
    pub writes: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Failed or given up.
    pub failed: u64,
    /// Answers "would block".
    pub again: u64,
    /// Zeroed ranges that succeeded.
    pub zeroed: u64,
    /// Discarded ranges that succeeded.
    pub discarded: u64,
    /// Writes that name the one they followed.
    pub linked: u64,
    /// Trims of mounted file systems.
    pub trims: u64,
}

#[derive(Default)]
struct Tally {
    again: AtomicU64,
    linked: AtomicU64,
    trims: AtomicU64,
}

struct Shared {
    journal: Arc<Journal>,
    options: Options,
    stop: AtomicBool,
    tally: Tally,
}

/// Threads that write until they are stopped. Dropping it stops them too.
pub struct Storm {
    shared: Arc<Shared>,
    volumes: Vec<(u32, u64)>,
    threads: Vec<JoinHandle<()>>,
}

/// A thread's part of a target.
#[derive(Clone)]
struct Range {
    volume: u32,
    target: Target,
    first: u64,
    sectors: u64,
}

impl Storm {
    /// Opens all targets and begins to write. The number of a volume is the place of its target. Panics where a target
    /// cannot be opened.
    pub fn start(seed: u64, targets: Vec<Target>, options: Options) -> Storm {
        let mut shares: Vec<u64> = targets.iter().map(|t| t.modes.len() as u64).collect();
        for (one, two, _) in &options.chains {
            assert_ne!(one, two, "a chain joins two volumes");
            shares[*one] += 1;
            shares[*two] += 1;
        }
        let mut used = vec![0; targets.len()];
        let mut range = |at: usize| {
            let target = targets[at].clone();
            assert!(target.bytes.is_multiple_of(4096), "a target is whole blocks of 4 KiB");
            let sectors = target.bytes / shares[at] / 4096 * 8;
            assert!(sectors > 0, "{}: too small for its writers", target.path.display());
            used[at] += 1;
            Range { volume: at as u32, target, first: (used[at] - 1) * sectors, sectors }
        };
        // What each thread does is decided, and every file is opened, before the first write.
        let mut jobs: Vec<Box<dyn FnOnce(Writer) + Send>> = Vec::new();
        for (at, target) in targets.iter().enumerate() {
            for mode in &target.modes {
                let range = range(at);
                match mode {
                    Mode::Direct => jobs.push(job(Place::open(range, true), |w, p| w.direct(p, false))),
                    Mode::Buffered => jobs.push(job(Place::open(range, false), Writer::buffered)),
                    Mode::Mapped => jobs.push(job(Place::open(range, false), Writer::mapped)),
                    Mode::Ring => jobs.push(job(Place::open(range, true), Writer::ring)),
                    Mode::Clash => {
                        for _ in 0..2 {
                            jobs.push(job(Place::open(range.clone(), true), |w, p| w.direct(p, true)));
                        }
                    }
                }
            }
        }
        for (one, two, synced) in &options.chains {
            let places = (Place::open(range(*one), !synced), Place::open(range(*two), !synced));
            jobs.push(job(places, |w, (one, two)| w.chain(one, two)));
        }
        let volumes = targets.iter().enumerate().map(|(at, target)| (at as u32, target.bytes)).collect();
        let journal = Arc::new(Journal::new(seed, jobs.len()));
        let shared = Arc::new(Shared { journal, options, stop: AtomicBool::new(false), tally: Tally::default() });
        let mut threads = Vec::new();
        for (id, job) in jobs.into_iter().enumerate() {
            let writer = Writer {
                id,
                shared: shared.clone(),
                pool: Pool::new(seed),
                dice: Dice::new(seed.wrapping_mul(1_000_003) + id as u64),
                buffer: Aligned::new(HUGE),
                version: 0,
            };
            threads.push(std::thread::Builder::new().name(format!("storm-{id}")).spawn(move || job(writer)).unwrap());
        }
        if !shared.options.trim.is_empty() {
            let shared = shared.clone();
            threads.push(std::thread::spawn(move || trim(&shared)));
        }
        Storm { shared, volumes, threads }
    }

    /// The time of the journal, in nanoseconds.
    pub fn now(&self) -> u64 {
        self.shared.journal.now()
    }

    /// The journal, which outlives the storm.
    pub fn journal(&self) -> Arc<Journal> {
        self.shared.journal.clone()
    }

    /// A checker of all volumes, whose images begin as zeroes.
    pub fn checker(&self) -> Checker {
        Checker::new(self.journal(), &self.volumes)
    }

    /// How many writes were noted so far.
    pub fn writes(&self) -> u64 {
        self.shared.journal.len()
    }

    /// Whether a thread has ended early, which only a panic does.
    pub fn broken(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }

    /// Ends all threads after a last sync. Panics if one of them did.
    pub fn stop(mut self) -> Summary {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().expect("a writer of the storm panicked");
        }
        let journal = &self.shared.journal;
        let mut summary = Summary {
            again: self.shared.tally.again.load(Ordering::Relaxed),
            linked: self.shared.tally.linked.load(Ordering::Relaxed),
            trims: self.shared.tally.trims.load(Ordering::Relaxed),
            ..Summary::default()
        };
        for thread in 0..journal.threads() {
            let shard = journal.shard(thread);
            let ended: std::collections::HashMap<u64, End> = shard.ends.iter().map(|(seq, end, _)| (*seq, *end)).collect();
            for op in &shard.ops {
                let there = ended[&op.seq] == End::There;
                summary.writes += 1;
                summary.bytes += op.sectors * SECTOR as u64;
                summary.failed += u64::from(!there);
                summary.zeroed += u64::from(there && op.kind == Kind::Zero);
                summary.discarded += u64::from(there && op.kind == Kind::Discard);
            }
        }
        summary
    }
}

impl Drop for Storm {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn job<P: Send + 'static>(places: P, run: impl FnOnce(&mut Writer, P) + Send + 'static) -> Box<dyn FnOnce(Writer) + Send> {
    Box::new(move |mut writer| run(&mut writer, places))
}

fn trim(shared: &Shared) {
    let mounts: Vec<File> = shared.options.trim.iter().map(|path| File::open(path).expect("a mount point")).collect();
    let mut beat = 0;
    while !shared.stop.load(Ordering::Relaxed) {
        if beat % 20 == 0 {
            for mount in &mounts {
                let mut range = [0u64, u64::MAX, 0];
                // SAFETY: FITRIM reads and writes three words, which `range` holds.
                if unsafe { libc::ioctl(mount.as_raw_fd(), FITRIM, range.as_mut_ptr()) } == 0 {
                    shared.tally.trims.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        beat += 1;
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Memory aligned to huge pages, so that the largest writes are one bio where the kernel can make one.
struct Aligned {
    map: MmapMut,
    shift: usize,
    bytes: usize,
}

impl Aligned {
    fn new(bytes: usize) -> Aligned {
        let bytes = bytes.next_multiple_of(HUGE);
        let map = MmapMut::map_anon(bytes + HUGE).expect("memory for the storm's writes");
        // Advice only: without huge pages the writes are split a little more.
        let _ = map.advise(Advice::HugePage);
        let shift = (map.as_ptr() as usize).next_multiple_of(HUGE) - map.as_ptr() as usize;
        Aligned { map, shift, bytes }
    }
    fn of(&mut self, bytes: usize) -> &mut [u8] {
        if self.bytes < bytes {
            *self = Aligned::new(bytes);
        }
        &mut self.map[self.shift..self.shift + bytes]
    }
}

/// One open range.
struct Place {
    range: Range,
    file: File,
    block_device: bool,
    /// A completed write is there; else only after a sync.
    at_once: bool,
    unsynced: Vec<Made>,
    /// What reads successes back.
    proof: Option<File>,
}

/// A write that was made.
#[derive(Clone, Copy)]
struct Made {
    seq: u64,
    first: u64,
    sectors: u64,
    kind: Kind,
}

impl Place {
    fn open(range: Range, direct: bool) -> Place {
        let flags = if direct { libc::O_DIRECT } else { 0 };
        let path = &range.target.path;
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
        let file = file.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let block_device = file.metadata().unwrap().file_type().is_block_device();
        let at_once = direct && !range.target.on_file_system;
        let proof = range.target.read_back.then(|| {
            let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path);
            file.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        });
        Place { range, file, block_device, at_once, unsynced: Vec::new(), proof }
    }

    /// Whether the write, or one that came later at its place, is what the device holds.
    fn holds(&self, made: &Made, pool: &Pool) -> bool {
        let Some(proof) = self.proof.as_ref().filter(|_| made.kind != Kind::Discard) else { return true };
        let mut memory = Aligned::new((made.sectors as usize * SECTOR).next_multiple_of(4096));
        let bytes = memory.of(made.sectors as usize * SECTOR);
        let read = proof.read_exact_at(bytes, made.first * SECTOR as u64);
        let is_there = |sector: &[u8]| match pool.read(sector) {
            Found::Stamp(stamp) => stamp.seq >= made.seq,
            Found::Zero => made.kind == Kind::Zero,
            Found::Garbage => false,
        };
        read.is_ok() && bytes.chunks(SECTOR).all(is_there)
    }

    fn write_all(&self, bytes: &[u8], sector: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, sector * SECTOR as u64)
    }

    /// Zeroes or discards.
    fn clear(&self, first: u64, sectors: u64, discard: bool) -> io::Result<()> {
        let (at, length) = (first * SECTOR as u64, sectors * SECTOR as u64);
        let fd = self.file.as_raw_fd();
        let done = if self.block_device {
            let range = [at, length];
            let request = if discard { BLKDISCARD } else { BLKZEROOUT };
            // SAFETY: both requests read two words, which `range` holds.
            unsafe { libc::ioctl(fd, request as _, range.as_ptr()) }
        } else {
            let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let mode = if discard { punch } else { libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE };
            // SAFETY: no memory is passed.
            unsafe { libc::fallocate(fd, mode, at as i64, length as i64) }
        };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

struct Writer {
    id: usize,
    shared: Arc<Shared>,
    pool: Pool,
    dice: Dice,
    buffer: Aligned,
    version: u64,
}

impl Writer {
    fn goes_on(&self) -> bool {
        if !self.shared.options.rest.is_zero() {
            std::thread::sleep(self.shared.options.rest);
        }
        !self.shared.stop.load(Ordering::Relaxed)
    }

    /// How many bytes the next write has: mostly few.
    fn size(&mut self, range: &Range) -> u64 {
        let most = (self.shared.options.largest as u64).min(range.sectors * SECTOR as u64).min(512 << 20);
        let below = match self.dice.below(100) {
            _ if self.dice.once_in(self.shared.options.large_once_in.max(1)) => most,
            0 => 1 << 20,
            1..10 => 256 << 10,
            10..50 => 64 << 10,
            _ => 4096,
        };
        let unit = range.target.unit;
        (1 + self.dice.below(below / unit)).saturating_mul(unit).min(most / unit * unit).max(unit)
    }

    /// A place in the range for so many bytes: (first sector, sectors).
    fn spot(&mut self, range: &Range, bytes: u64) -> (u64, u64) {
        let per_unit = range.target.unit / SECTOR as u64;
        let sectors = bytes / SECTOR as u64;
        let spare = (range.sectors - sectors) / per_unit;
        (range.first + self.dice.below(spare + 1) * per_unit, sectors)
    }

    fn note(&mut self, range: &Range, first: u64, sectors: u64, kind: Kind) -> u64 {
        self.version += 1;
        self.shared.journal.submit(self.id, range.volume, first, sectors, kind)
    }

    fn stamp(&self, range: &Range, first: u64, seq: u64, follows: Option<Follows>) -> Stamp {
        if follows.is_some() {
            self.shared.tally.linked.fetch_add(1, Ordering::Relaxed);
        }
        Stamp { volume: range.volume, writer: self.id as u32, sector: first, version: self.version, seq, follows }
    }

    fn ended(&self, place: &mut Place, made: Made, result: &io::Result<()>) {
        let end = match result {
            Err(_) => End::Failed,
            Ok(()) if !place.at_once => return place.unsynced.push(made),
            Ok(()) if place.holds(&made, &self.pool) => End::There,
            Ok(()) => End::Failed,
        };
        self.shared.journal.end(self.id, &[made.seq], end);
    }

    fn sync(&self, place: &mut Place) {
        if !place.unsynced.is_empty() {
            let synced = place.file.sync_data().is_ok();
            let made = std::mem::take(&mut place.unsynced);
            let (there, failed): (Vec<Made>, Vec<Made>) = made.iter().partition(|m| synced && place.holds(m, &self.pool));
            for (made, end) in [(there, End::There), (failed, End::Failed)] {
                let seqs: Vec<u64> = made.iter().map(|m| m.seq).collect();
                self.shared.journal.end(self.id, &seqs, end);
            }
        }
    }

    /// One write with the file's own system call; returns its sequence, and its first sector.
    fn write(&mut self, place: &mut Place, bytes: u64, kind: Kind, follows: Option<Follows>) -> (u64, u64) {
        let (first, sectors) = self.spot(&place.range, bytes);
        let seq = self.note(&place.range, first, sectors, kind);
        let stamp = self.stamp(&place.range, first, seq, follows);
        let buffer = self.buffer.of(bytes as usize);
        self.pool.fill(buffer, &stamp);
        let result = place.write_all(buffer, first);
        self.ended(place, Made { seq, first, sectors, kind }, &result);
        (seq, first)
    }

    fn direct(&mut self, mut place: Place, clash: bool) {
        let kind = if clash { Kind::Clash } else { Kind::Direct };
        while self.goes_on() {
            let bytes = self.size(&place.range);
            let discard = self.dice.once_in(2);
            let allowed = if discard { self.shared.options.discard } else { self.shared.options.zero };
            if allowed && !clash && self.dice.once_in(30) {
                let (first, sectors) = self.spot(&place.range, bytes);
                let kind = if discard { Kind::Discard } else { Kind::Zero };
                let seq = self.note(&place.range, first, sectors, kind);
                let result = place.clear(first, sectors, discard);
                self.ended(&mut place, Made { seq, first, sectors, kind }, &result);
            } else {
                self.write(&mut place, bytes, kind, None);
            }
            if self.dice.once_in(50) {
                self.sync(&mut place);
            }
        }
        self.sync(&mut place);
    }

    fn buffered(&mut self, mut place: Place) {
        while self.goes_on() {
            let bytes = self.size(&place.range);
            self.write(&mut place, bytes, Kind::Cached, None);
            if self.dice.once_in(60) {
                self.sync(&mut place);
            }
        }
        self.sync(&mut place);
    }

    fn mapped(&mut self, mut place: Place) {
        let (from, bytes) = (place.range.first * SECTOR as u64, place.range.sectors as usize * SECTOR);
        let mut options = MmapOptions::new();
        // SAFETY: nobody shortens a target of a storm; others who change it change other ranges.
        let mut map = unsafe { options.offset(from).len(bytes).map_mut(&place.file) }.expect("a mapping of the target");
        while self.goes_on() {
            let bytes = self.size(&place.range);
            let (first, sectors) = self.spot(&place.range, bytes);
            let seq = self.note(&place.range, first, sectors, Kind::Cached);
            let stamp = self.stamp(&place.range, first, seq, None);
            let at = (first - place.range.first) as usize * SECTOR;
            self.pool.fill(&mut map[at..at + bytes as usize], &stamp);
            place.unsynced.push(Made { seq, first, sectors, kind: Kind::Cached });
            if self.dice.once_in(40) {
                self.sync(&mut place);
            }
        }
        self.sync(&mut place);
    }

    /// Each write is made when the other one is known to be there.
    fn chain(&mut self, one: Place, two: Place) {
        let mut places = [one, two];
        let mut follows = None;
        for turn in 0.. {
            if !self.goes_on() {
                break;
            }
            let place = &mut places[turn % 2];
            let bytes = self.size(&place.range).min(32 << 10);
            let kind = if place.at_once { Kind::Direct } else { Kind::Cached };
            let before = self.shared.journal.shard(self.id).ends.len();
            let (seq, sector) = self.write(place, bytes, kind, follows);
            self.sync(place);
            let there = self.shared.journal.shard(self.id).ends[before..].iter().all(|(_, end, _)| *end == End::There);
            follows = there.then_some(Follows { volume: place.range.volume, sector, seq });
        }
    }

    fn ring(&mut self, mut place: Place) {
        let most = self.shared.options.depth.clamp(1, 512);
        let mut ring = IoUring::new(most.next_power_of_two() as u32).expect("io_uring");
        let unit = place.range.target.unit;
        // Every slot has a part of the range and of the buffer, so that nothing overlaps.
        let mut memory = Aligned::new(HUGE);
        while self.goes_on() {
            let blocks = place.range.sectors / 8;
            let depth = (1 << self.dice.below(u64::from(most.ilog2()) + 1)).min(blocks) as usize;
            let part = blocks / depth as u64 * 8;
            let slot_bytes = (part * SECTOR as u64).min((HUGE / depth) as u64).max(4096);
            memory.of(slot_bytes as usize * depth);
            let mut slots: Vec<Slot> = vec![Slot::default(); depth];
            let mut to_begin = depth as u64 + self.dice.below(4 * depth as u64);
            let mut in_flight = 0;
            let mut free: Vec<usize> = (0..depth).collect();
            while to_begin + in_flight > 0 {
                while to_begin > 0
                    && let Some(slot) = free.pop()
                {
                    let bytes = self.size(&place.range).min(slot_bytes / unit * unit).max(unit);
                    let mut range = place.range.clone();
                    (range.first, range.sectors) = (range.first + part * slot as u64, part);
                    let (first, sectors) = self.spot(&range, bytes);
                    let seq = self.note(&range, first, sectors, Kind::Direct);
                    let stamp = self.stamp(&range, first, seq, None);
                    let memory = &mut memory.of(slot_bytes as usize * depth)[slot * slot_bytes as usize..][..bytes as usize];
                    self.pool.fill(memory, &stamp);
                    let nowait = self.shared.options.nowait && self.dice.once_in(3);
                    slots[slot] = Slot { seq, first, bytes: bytes as u32, address: memory.as_ptr() as usize, nowait };
                    slots[slot].push(slot, &mut ring, &place.file);
                    (to_begin, in_flight) = (to_begin - 1, in_flight + 1);
                }
                ring.submit_and_wait(1).or_else(again).expect("io_uring");
                let done: Vec<(usize, i32)> = ring.completion().map(|c| (c.user_data() as usize, c.result())).collect();
                for (at, result) in done {
                    let slot = slots[at];
                    if result == -libc::EAGAIN {
                        self.shared.tally.again.fetch_add(1, Ordering::Relaxed);
                    }
                    let whole = result == slot.bytes as i32;
                    let unable = [-libc::EAGAIN, -libc::EOPNOTSUPP, -libc::EINVAL].contains(&result);
                    // A part or a refusal is made good by writing all of it again; that is the same write, still in flight.
                    if !whole && (result > 0 || (slot.nowait && unable && !self.dice.once_in(4))) {
                        slots[at].nowait = false;
                        slots[at].push(at, &mut ring, &place.file);
                        continue;
                    }
                    let result = if whole { Ok(()) } else { Err(io::Error::from_raw_os_error(-result)) };
                    let (seq, first) = (slot.seq, slot.first);
                    let made = Made { seq, first, sectors: u64::from(slot.bytes) / SECTOR as u64, kind: Kind::Direct };
                    self.ended(&mut place, made, &result);
                    free.push(at);
                    in_flight -= 1;
                }
            }
            if self.dice.once_in(4) {
                self.sync(&mut place);
            }
        }
        self.sync(&mut place);
    }
}

fn again(error: io::Error) -> io::Result<usize> {
    if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) { Ok(0) } else { Err(error) }
}

#[derive(Clone, Copy, Default)]
struct Slot {
    seq: u64,
    first: u64,
    bytes: u32,
    address: usize,
    nowait: bool,
}

impl Slot {
    fn push(&self, slot: usize, ring: &mut IoUring, file: &File) {
        let flags = if self.nowait { libc::RWF_NOWAIT } else { 0 };
        let entry = opcode::Write::new(types::Fd(file.as_raw_fd()), self.address as *const u8, self.bytes)
            .offset(self.first * SECTOR as u64)
            .rw_flags(flags as _)
            .build()
            .user_data(slot as u64);
        // SAFETY: the memory outlives the request, since a round ends only when nothing is in flight, and is not written
        // before the slot is free again.
        unsafe { ring.submission().push(&entry) }.expect("as many entries as slots");
    }
}
