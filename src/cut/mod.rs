//! Owns the order of a cut: freeze, flip, take, read, thaw, look again; and its undoing.
//! Gives a `Cut`: the bytes of every changed block of every volume of a group at one instant.
//! Keeps the freeze bounded and the bits safe: a cut that fails leaves every bit with the tracker.
//! Never sends anything, never knows what a generation is.
//! Assumes the notes headed C in `kernel-notes.md`.

mod batch;
mod stream;

pub use batch::Change;
pub use stream::{Step, Stream, StreamCounts, StreamPlant, VolumeCounts};

use crate::device::DeviceFile;
use crate::device::Engine;
use crate::host::DeviceIdentity;
use crate::host::Freezer;
use crate::host::MountPoint;
use crate::model::{BLOCK_BYTES, BlockRun, BlockSet, Code, Fault, GroupId, Res, VolumeId};
use crate::reader;
use crate::tracker::Tracker;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// One volume as the cut sees it.
pub struct Source<'a> {
    /// Its identity.
    pub id: VolumeId,
    /// Its name, for words.
    pub name: &'a str,
    /// The tracked device (`/dev/loopN`).
    pub device: PathBuf,
    /// What that device was when tracking began.
    pub identity: DeviceIdentity,
    /// Where its bytes are read (the loop's backing file).
    pub image: &'a DeviceFile,
}

/// What bounds a cut.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The freeze is undone after this long.
    pub freeze_deadline: Duration,
    /// The sets taken together may be at most this large, in bytes; larger: `Attempt::TooLarge`.
    pub cut_max_bytes: u64,
}

/// The bytes of the changed blocks of a group at one instant.
pub struct Cut {
    /// The sets that were taken, in the order of the sources.
    pub sets: Vec<BlockSet>,
    /// The runs in ascending order, volume by volume, with their place in `bytes`.
    pub runs: Vec<(u16, BlockRun, std::ops::Range<usize>)>,
    /// Their bytes, one after another.
    pub bytes: Vec<u8>,
    /// Bytes really read.
    pub bytes_read: u64,
    /// How long the longest freeze lasted; `None` when nothing was mounted.
    pub frozen: Option<Duration>,
}

/// How an attempt ended.
pub enum Attempt {
    /// The cut.
    Done(Box<Cut>),
    /// The set had grown too large to be read within a freeze: another round over it is needed first. Its bits are taken.
    TooLarge,
}

/// How often an unfrozen cut is tried before it is given up.
const ATTEMPTS: usize = 8;

/// Cuts a group. The tracker keeps all bits until a receipt; after an error the caller gives them back.
///
/// The order, and why:
/// 1. Each device is still the one that is tracked (S8).
/// 2. File systems are synced while they run, so that the freeze has little left to write.
/// 3. Freeze: no write of a mounted volume is in flight or can begin.
/// 4. Flip the phase: every earlier write has its bit in the taken half.
/// 5. Take the sets; read them into memory. With the freeze on, that is one instant.
/// 6. Nothing may have been written since the flip (what is not mounted was not frozen), else the instant is not one: try again.
/// 7. Thaw. If the helper had to thaw before us, the bytes are of no use.
/// 8. Each device is still the same, and the tracker has seen everything; otherwise the caller compares in full.
pub fn take(
    tracker: &std::sync::Mutex<Tracker>,
    group: GroupId,
    sources: &[Source<'_>],
    freezer: &mut Freezer,
    engine: &mut dyn Engine,
    limits: Limits,
) -> Res<Attempt> {
    for _ in 0..ATTEMPTS {
        match attempt(tracker, group, sources, freezer, engine, limits)? {
            Some(attempt) => return Ok(attempt),
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    Err(Fault::new(
        Code::CutNotExact,
        "the cut",
        format!("a volume was written, past any freeze, during each of {ATTEMPTS} attempts"),
        "find who writes to the device directly, or mount it through Docker",
    ))
}

fn attempt(
    tracker: &std::sync::Mutex<Tracker>,
    group: GroupId,
    sources: &[Source<'_>],
    freezer: &mut Freezer,
    engine: &mut dyn Engine,
    limits: Limits,
) -> Res<Option<Attempt>> {
    check_identities(sources)?;
    let mut mounts: Vec<PathBuf> = Vec::new();
    for source in sources {
        let points = crate::host::mounts_of(source.identity.major, source.identity.minor)?;
        mounts.extend(points.iter().find(|m: &&MountPoint| !m.read_only).map(|point| point.path.clone()));
    }
    for mount in &mounts {
        crate::host::sync_fs(mount)?;
    }
    let frozen = match mounts.is_empty() {
        true => None,
        false => Some(freezer.freeze(&mounts, limits.freeze_deadline)?),
    };
    let begun = Instant::now();
    lock(tracker).flip(group)?;
    let sets = sources.iter().map(|s| lock(tracker).taken(s.id)).collect::<Res<Vec<_>>>()?;
    let wanted_bytes: u64 = sets.iter().map(|s| s.count() * BLOCK_BYTES).sum();
    if wanted_bytes > limits.cut_max_bytes {
        drop(frozen);
        return Ok(Some(Attempt::TooLarge));
    }
    let mut cut =
        Cut { sets: Vec::new(), runs: Vec::new(), bytes: Vec::with_capacity(wanted_bytes as usize), bytes_read: 0, frozen: None };
    for (index, (source, set)) in sources.iter().zip(&sets).enumerate() {
        let Cut { runs, bytes, .. } = &mut cut;
        cut.bytes_read += reader::read(engine, source.image, set, &mut |run, data| {
            let from = bytes.len();
            bytes.extend_from_slice(data);
            runs.push((index as u16, run, from..bytes.len()));
            if frozen_too_long(begun, limits, !mounts.is_empty()) {
                return Err(Fault::new(
                    Code::FreezeTimeout,
                    "the cut",
                    format!("reading the changed blocks took longer than {:?}", limits.freeze_deadline),
                    "it is tried again with a smaller set; a faster disk or a longer freeze_deadline helps",
                ));
            }
            Ok(())
        })?;
    }
    for source in sources {
        // Asked of every volume: one that was mounted when it was looked at may have been unmounted before the freeze.
        if lock(tracker).active_blocks(source.id)? != 0 {
            // Nothing is lost: the taken bits are still unreceipted, the new ones are in the active half.
            drop(frozen);
            lock(tracker).give_back(group)?;
            return Ok(None);
        }
    }
    cut.frozen = frozen.map(|f| f.thaw()).transpose()?;
    check_identities(sources)?;
    cut.sets = sets;
    Ok(Some(Attempt::Done(Box::new(cut))))
}

fn frozen_too_long(begun: Instant, limits: Limits, frozen: bool) -> bool {
    frozen && begun.elapsed() > limits.freeze_deadline
}

fn lock(tracker: &std::sync::Mutex<Tracker>) -> std::sync::MutexGuard<'_, Tracker> {
    // A panic elsewhere does not make the tracker's maps wrong: every change of them is ordered to be safe at any stop.
    tracker.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn check_identities(sources: &[Source<'_>]) -> Res<()> {
    for source in sources {
        let now = crate::host::identity(&source.device)?;
        if now != source.identity {
            return Err(Fault::new(
                Code::IdentityChanged,
                format!("volume {}", source.name),
                format!("{} is no longer the device that was tracked", source.device.display()),
                "a full comparison follows by itself; if the device was replaced on purpose, nothing else is to be done",
            ));
        }
    }
    Ok(())
}
