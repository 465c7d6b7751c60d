//! The primary's side of one group: one thread that connects, finds its footing, and cycles.

mod continuous;

use crate::agent::Agent;
use crate::agent::encode::{Effort, Encoder, Sent, Thrift};
use crate::agent::group::{Command, Group, SyncWaiter, lock};
use crate::agent::live::Progress;
use crate::agent::wire::Wire;
use crate::config::Mode;
use crate::cut;
use crate::delta::RECORD_HEADER_BYTES;
use crate::device;
use crate::device::DeviceFile;
use crate::device::Engine;
use crate::format::{Landing, Standing};
use crate::host;
use crate::host::DeviceIdentity;
use crate::known::Known;
use crate::model::{
    BLOCK_BYTES, BlockRun, BlockSet, Code, Digest, Exit, Fault, GroupSpec, Moment, Position, Receipt, Res, Role, VolumeSpec,
};
use crate::reader;
use crate::role::{ALL_MARKED, Footing, Grounds, footing};
use crate::session::SenderEvent;
use crate::tracker::{Base, Continuity};
use crate::verify;
use serde_json::json;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use continuous::{HEARTBEAT, RING_LOOK};

const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// A first sync is made durable on the standby in steps of this many bytes.
const SEGMENT_BYTES: u64 = 256 << 20;
/// Rounds before a cut; a writer that dirties faster than we ship is then cut as it is, within the bounds of memory.
const ROUNDS_MAX: usize = 16;
/// However slow a disk is, a cut tries to read this much within a freeze (64 blocks).
const CUT_LEAST_BYTES: u64 = 64 * BLOCK_BYTES;
/// Blocks verified between two cycles (64 MiB).
const VERIFY_WINDOW_BLOCKS: u64 = verify::BATCH_BLOCKS;
/// After so many cuts in a row that capture could not make exact, cuts are made with a freeze.
const INEXACT_MAX: u32 = 5;
/// Containers are looked at again this often, and a changed recipe is sent.
const RECIPE_EVERY: Duration = Duration::from_secs(60);

/// One volume, opened.
struct Opened {
    device: PathBuf,
    identity: DeviceIdentity,
    image: DeviceFile,
}

/// A generation that was cut and encoded but has no receipt yet. It is kept over a broken connection: the cut stays valid.
struct Pending {
    position: Position,
    cut_at: Moment,
    began: Instant,
    pieces: Vec<Vec<u8>>,
    sent: Sent,
    /// Its `Begin` was sent: what the standby holds of this position may be its beginning.
    begun: bool,
}

/// Everything that the thread owns.
struct Primary {
    agent: Arc<Agent>,
    group: Arc<Group>,
    spec: GroupSpec,
    epoch: u64,
    volumes: Vec<Opened>,
    known: Vec<Known>,
    engine: Box<dyn Engine>,
    freezer: host::Freezer,
    pending: Option<Pending>,
    bits_count: bool,
    known_counts: bool,
    waiters: Vec<SyncWaiter>,
    recipe_looked: Instant,
    /// Grows when a transfer outgrew what was announced, and is 1 again once one went through.
    room_factor: u64,
    /// What a cut may read within a freeze, in bytes: less than configured after one that took too long on this disk.
    cut_max_bytes: u64,
    /// Why cuts are made with a freeze; `None` where writes are captured.
    capture_refusal: Option<String>,
    /// Capture, while it is on.
    capturing: Option<continuous::Capturing>,
    /// Whether captured writes are worth lz4.
    thrift: Thrift,
    /// What is to be compared, by volume. Outlives capture: what was shipped and not compared yet stays "written".
    checks: Vec<continuous::Checks>,
    /// When the last checkpoint began.
    checkpointed: Instant,
    /// Nothing was written at the last look: the next write ends the rest.
    asleep: bool,
    /// When the first write after a rest was seen.
    woken: Moment,
    /// Cuts from captured writes in a row that could not be made exact.
    inexact: u32,
}

/// Why the loop ended without a fault.
enum End {
    Stopped,
}

/// Runs until it is told to stop or a higher epoch is seen.
pub fn run(agent: Arc<Agent>, group: Arc<Group>, commands: Receiver<Command>) {
    let mut retry = RETRY_FIRST;
    let mut primary: Option<Primary> = None;
    loop {
        let outcome = match &mut primary {
            Some(p) => p.converse(&commands),
            None => Primary::open(&agent, &group).and_then(|p| primary.insert(p).converse(&commands)),
        };
        let fault = match outcome {
            Ok(End::Stopped) => return,
            Err(fault) => fault,
        };
        let was_connected = group.with_live(|live| {
            let was = std::mem::take(&mut live.connected);
            live.state = format!("waiting to try again: {fault}");
            live.progress = None;
            live.fault(fault.clone());
            was
        });
        tracing::warn!(group = %group.name, "{fault}");
        if fault.code == Code::StaleEpoch {
            fence(&group);
            return;
        }
        if let Some(p) = &mut primary {
            p.after_fault(&fault);
            // The device under the name, or the tracker, is not what it was: everything is opened anew.
            if matches!(fault.code, Code::IdentityChanged | Code::TrackerDoubt | Code::VolumeUnknown | Code::FlushFailed) {
                primary = None;
            }
        }
        retry = if was_connected { RETRY_FIRST } else { (retry * 2).min(RETRY_MAX) };
        match commands.recv_timeout(retry) {
            Ok(Command::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            Ok(Command::Sync(waiter)) => match &mut primary {
                Some(p) => p.waiters.push(waiter),
                None => drop(waiter.done.send(Err(fault))),
            },
            Ok(Command::Verify(reply)) => drop(reply.send(Err(fault))),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if let Some(p) = &mut primary {
            p.refuse_old_waiters();
        }
    }
}

/// A higher epoch was seen: this side serves and ships nothing from now on, also after a restart.
fn fence(group: &Group) {
    let fenced = group.edit_ledger(|record| {
        record.role = Role::Fenced;
        Ok(())
    });
    if let Err(fault) = fenced {
        tracing::error!(group = %group.name, "{fault}");
    }
    group.with_live(|live| live.state = "fenced: the other side was promoted".into());
}

impl Drop for Primary {
    fn drop(&mut self) {
        self.stop_capturing();
    }
}

impl Primary {
    fn open(agent: &Arc<Agent>, group: &Arc<Group>) -> Res<Primary> {
        let record = group.record()?;
        let mut volumes = Vec::new();
        let mut known = Vec::new();
        let (mut bits_count, mut known_counts) = (true, true);
        for spec in &record.spec.volumes {
            let image_path = agent.image_path(spec.id);
            let device = agent.attach_volume(spec)?;
            let image = DeviceFile::open(&image_path, false)?;
            let backing = device.identity.backing.as_ref().map(|b| (b.dev, b.inode));
            if backing != Some(image.identity()?) {
                return Err(Fault::new(
                    Code::IdentityChanged,
                    format!("volume {}", spec.name),
                    format!("{} is not attached to {}", device.path.display(), image_path.display()),
                    "detach that device and restart the agent",
                ));
            }
            if image.size_bytes() != spec.size_bytes {
                return Err(Fault::new(
                    Code::IdentityChanged,
                    format!("volume {}", spec.name),
                    format!("its image is {} bytes and was recorded with {}", image.size_bytes(), spec.size_bytes),
                    "put the image back, or remove and protect the group again",
                ));
            }
            let about = about(&record.spec, spec);
            let (map, fresh) = Known::open(&group.dir.join(format!("known-{}", spec.id)), spec.blocks(), about)?;
            known_counts &= !fresh;
            known.push(map);
            volumes.push(Opened { device: device.path.clone(), identity: device.identity, image });
        }
        {
            let mut tracker = agent.tracker()?;
            for (spec, volume) in record.spec.volumes.iter().zip(&volumes) {
                bits_count &= tracker.track(record.spec.id, spec.id, &volume.identity)? == Continuity::Unbroken;
            }
            tracker.give_back(record.spec.id)?;
        }
        let engine = device::engine(agent.settings.io_engine, agent.settings.queue_depth)?;
        let freezer = host::Freezer::start(&agent.program)?;
        let checks = record.spec.volumes.iter().map(|v| continuous::Checks::new(v.blocks())).collect();
        let capture_refusal = Primary::refusal(agent, &volumes)?;
        if let Some(reason) = &capture_refusal {
            tracing::warn!(group = %group.name, %reason, "cuts are made with a freeze");
        }
        group.with_live(|live| {
            live.engine = engine.name().into();
            // Opened again after a fault, counters go on.
            let mut before = std::mem::take(&mut live.volumes).into_iter();
            live.volumes = volumes
                .iter()
                .map(|v| crate::agent::live::LiveVolume {
                    device: v.device.display().to_string(),
                    dirty_bytes: None,
                    tracker: "bitmap".into(),
                    cut: if capture_refusal.is_some() { "freeze".into() } else { "capture".into() },
                    cut_reason: capture_refusal.clone(),
                    ..before.next().unwrap_or_default()
                })
                .collect();
        });
        Ok(Primary {
            agent: agent.clone(),
            group: group.clone(),
            epoch: record.epoch,
            spec: record.spec,
            volumes,
            known,
            engine,
            freezer,
            pending: None,
            bits_count,
            known_counts,
            waiters: Vec::new(),
            recipe_looked: Instant::now(),
            room_factor: 1,
            cut_max_bytes: agent.settings.cut_max_bytes,
            capture_refusal,
            capturing: None,
            thrift: Thrift::default(),
            checks,
            checkpointed: Instant::now(),
            asleep: false,
            woken: Moment(0),
            inexact: 0,
        })
    }

    /// What a fault leaves behind is put in order: bits without a receipt go back, unless their generation is kept.
    fn after_fault(&mut self, fault: &Fault) {
        if matches!(fault.code, Code::FreezeTimeout | Code::CutNotExact) {
            self.group.with_live(|live| live.counters.cuts_discarded += 1);
        }
        // The same set would take as long again, and it only grows: it is made smaller by rounds first.
        if fault.code == Code::FreezeTimeout {
            self.cut_max_bytes = (self.cut_max_bytes / 2).max(CUT_LEAST_BYTES);
        }
        // A kernel that goes on skipping the programs, or a disk slower than its holes: the declared fallback serves until the next start.
        // (A link that is too slow says the same code of the group; a freeze would not help it.)
        if fault.code == Code::CutNotExact && fault.thing == "the cut" && self.captures() {
            self.inexact += 1;
            if self.inexact >= INEXACT_MAX {
                let reason =
                    format!("{INEXACT_MAX} cuts in a row could not be made exact from captured writes ({})", fault.cause);
                tracing::warn!(group = %self.group.name, %reason, "cuts are made with a freeze from now on");
                self.refuse_capture(reason);
            }
        }
        // What was captured and not committed is read instead: its bits go back.
        self.stop_capturing();
        if self.pending.is_none()
            && let Err(worse) = self.agent.tracker().and_then(|mut t| t.give_back(self.spec.id))
        {
            tracing::error!(group = %self.group.name, "{worse}");
            self.bits_count = false;
        }
    }

    /// Those who wait for a sync are told why it does not come, once they have waited long enough to be told.
    fn refuse_old_waiters(&mut self) {
        let last = self.group.with_live(|live| live.faults.last().cloned());
        let Some(fault) = last else { return };
        self.waiters.retain(|waiter| {
            let keep = waiter.asked.elapsed() < waiter.patience;
            if !keep {
                let _ = waiter.done.send(Err(fault.clone()));
            }
            keep
        });
    }

    /// One connection: footing, then cycles until something breaks or we are told to stop.
    fn converse(&mut self, commands: &Receiver<Command>) -> Res<End> {
        let peer = self.group.record()?.peer;
        self.state("connecting");
        let channel = self.agent.link.connect(&peer, Duration::from_secs(5))?;
        let (mut wire, mut standing) =
            Wire::replicate(channel, &self.agent.settings.host, self.spec.id, self.epoch, self.captures())?;
        self.group.with_live(|live| {
            live.connected = true;
            live.clear(Code::PeerUnreachable);
        });
        *lock(&self.group.bell) = Some(wire.bell());
        self.define(&mut wire)?;
        let base = self.agent.tracker()?.base(self.spec.id)?;
        let grounds = Grounds {
            epoch: self.epoch,
            bits_count: self.bits_count,
            known_counts: self.known_counts,
            acked: base.acked,
            pending: base.pending,
        };
        if standing.syncing {
            // What it had acknowledged it does not vouch for now.
            self.group.with_live(|live| live.recoverable_to = Moment(0));
        }
        let step = footing(&grounds, &standing)?;
        let (tip, acked, maybe) = (standing.tip, base.acked.0, base.pending.0);
        tracing::info!(group = %self.group.name, ?step, %tip, %acked, %maybe, grounds.bits_count, grounds.known_counts, "connected");
        self.keep_or_drop_pending(&step, &standing)?;
        let mut tip = (standing.tip, standing.tip_digest);
        let mut landing = Landing::Journal;
        match step {
            Footing::Incremental => {
                // What was pending and is the standby's tip now counts as its base; its bits went back and are sent again.
                if tip == base.pending && self.pending.is_none() {
                    self.agent.tracker()?.set_base(self.spec.id, Base { acked: tip, pending: Default::default() })?;
                }
            }
            Footing::FirstSync => {
                landing = Landing::Direct;
                self.start_over(true, &mut wire)?;
            }
            Footing::ResumeFirstSync => landing = Landing::Direct,
            Footing::Compare(how) => {
                landing = how;
                self.start_over(false, &mut wire)?;
            }
        }
        let mode = match (self.captures(), self.agent.settings.mode) {
            (true, Mode::Continuous) => "continuous",
            _ => "interval",
        };
        self.group.with_live(|live| {
            live.mode = mode.into();
            live.position = tip.0;
        });
        // A connection that found its footing clears what stood in its way.
        self.group.with_live(|live| live.faults.retain(|f| matches!(f.code, Code::VerifyMismatch | Code::ImageMissing)));
        if let Some(pending) = self.pending.take() {
            standing.open = standing.open.filter(|(position, _)| *position == pending.position);
            tip = self.resend(&mut wire, pending, standing.open)?;
        }
        let mut next = Instant::now();
        loop {
            match self.rest(&mut wire, commands, next)? {
                Some(End::Stopped) => return Ok(End::Stopped),
                None => {}
            }
            let began = Instant::now();
            // Who asks for a sync means what he has written, also what no file system has handed to its device yet: a cut sees to that.
            let idle = self.capturing.is_none()
                && landing == Landing::Journal
                && self.waiters.is_empty()
                && self.dirty_blocks()? == 0
                && self.doubts()?.is_empty();
            if idle {
                self.unchanged(&mut wire, tip.0)?;
            } else if self.captures() {
                tip = self.captured_cycle(&mut wire, tip, landing, began)?;
                landing = Landing::Journal;
            } else {
                tip = self.cycle(&mut wire, tip, landing, began)?;
                landing = Landing::Journal;
            }
            if self.recipe_looked.elapsed() > RECIPE_EVERY {
                self.look_at_recipes(&mut wire)?;
            }
            // A group that nobody writes sleeps until its ring says otherwise, but for a word now and then.
            self.asleep = self.captured_nothing() == Some(true);
            let pause = match self.asleep || (idle && self.captures()) {
                true => self.agent.settings.interval.max(HEARTBEAT),
                false => self.agent.settings.interval,
            };
            next = (began + pause).max(Instant::now());
        }
    }

    fn state(&self, words: &str) {
        self.group.with_live(|live| live.state = words.into());
    }

    fn define(&mut self, wire: &mut Wire) -> Res<()> {
        let spec = serde_json::to_vec(&self.spec).map_err(|e| Fault::internal("the group's definition", e.to_string()))?;
        let message = wire.sender.define(spec)?;
        wire.send(&message)?;
        match wire.wait()? {
            SenderEvent::Defined => Ok(()),
            other => Err(Fault::protocol(format!("the peer answered a definition with {other:?}"))),
        }
    }

    /// A kept generation is sent again only on the very tip that it was cut for.
    fn keep_or_drop_pending(&mut self, step: &Footing, standing: &Standing) -> Res<()> {
        let fits = self.pending.as_ref().is_some_and(|p| {
            *step == Footing::Incremental
                && p.position.generation == standing.tip.generation + 1
                && p.position.epoch == self.epoch
        });
        if !fits && self.pending.take().is_some() {
            self.agent.tracker()?.give_back(self.spec.id)?;
        }
        Ok(())
    }

    /// The set of changed blocks is not known: it becomes everything that may differ (S5).
    ///
    /// 1. The digest maps count no more, here and for whoever starts after our death.
    /// 2. The old base is forgotten, and the bits count from here on.
    /// 3. Each volume is compared and what may differ is marked.
    /// 4. Only then the maps count again, and it is said beside the bits that everything is marked: a first sync that is resumed
    ///    relies on maps *and* marks of every volume.
    fn start_over(&mut self, replica_is_new: bool, wire: &mut Wire) -> Res<()> {
        self.pending = None;
        self.known_counts = false;
        self.known.iter_mut().try_for_each(Known::all_zero)?;
        {
            let mut tracker = self.agent.tracker()?;
            tracker.give_back(self.spec.id)?;
            tracker.set_base(self.spec.id, Base::default())?;
            tracker.trust_from_here(self.spec.id)?;
        }
        self.bits_count = true;
        self.group.with_live(|live| {
            live.in_sync = false;
            live.counters.comparisons += u64::from(!replica_is_new);
        });
        for index in 0..self.volumes.len() {
            if !replica_is_new {
                self.state("comparing with the standby");
                self.fetch_digests(wire, index)?;
            }
            let mut differs = reader::data_set(&self.volumes[index].image)?;
            differs.union(&self.known[index].nonzero()?);
            self.agent.tracker()?.mark(self.spec.volumes[index].id, &differs)?;
            wire.breathe()?;
        }
        for (known, volume) in self.known.iter_mut().zip(&self.spec.volumes) {
            known.trust(about(&self.spec, volume));
        }
        self.agent.tracker()?.set_base(self.spec.id, Base { acked: ALL_MARKED, pending: Default::default() })?;
        self.known_counts = true;
        Ok(())
    }

    fn fetch_digests(&mut self, wire: &mut Wire, index: usize) -> Res<()> {
        let blocks = self.known[index].blocks();
        let message = wire.sender.want_digests(index as u16, 0, blocks)?;
        wire.send(&message)?;
        loop {
            match wire.wait()? {
                SenderEvent::Digests { volume, start, digests } if usize::from(volume) == index => {
                    self.known[index].set(start, &digests)?;
                    let done = (start + digests.len() as u64 / 16) * BLOCK_BYTES;
                    self.progress("comparing", done, blocks * BLOCK_BYTES);
                }
                SenderEvent::DigestsDone { volume } if usize::from(volume) == index => return Ok(()),
                other => return Err(Fault::protocol(format!("{other:?} came among digests"))),
            }
        }
    }

    fn progress(&self, what: &str, done: u64, total: u64) {
        self.group.with_live(|live| live.progress = Some(Progress { what: what.into(), done, total: total.max(done) }));
    }

    /// Waits until `next`, serving commands and keeping the connection alive.
    fn rest(&mut self, wire: &mut Wire, commands: &Receiver<Command>, mut next: Instant) -> Res<Option<End>> {
        loop {
            match commands.try_recv() {
                Ok(Command::Stop) | Err(std::sync::mpsc::TryRecvError::Disconnected) => return Ok(Some(End::Stopped)),
                Ok(Command::Sync(waiter)) => {
                    self.waiters.push(waiter);
                    return Ok(None);
                }
                Ok(Command::Verify(reply)) => {
                    let result = self.verify(wire);
                    let broke = result.as_ref().err().filter(|f| f.code != Code::VerifyMismatch).cloned();
                    let _ = reply.send(result);
                    if let Some(fault) = broke {
                        return Err(fault);
                    }
                }
                Err(std::sync::mpsc::TryRecvError::Empty) => {}
            }
            let left = next.saturating_duration_since(Instant::now());
            if left.is_zero() {
                wire.pump(Duration::ZERO)?;
                return Ok(None);
            }
            wire.rested();
            if self.asleep {
                self.watch(wire);
            }
            // Commands and, in its sleep, the first write ring the bell.
            let awake = self.capturing.is_some() && !self.asleep;
            wire.pump(left.min(if awake { RING_LOOK } else { HEARTBEAT }))?;
            if awake && self.ring_fills() {
                next = Instant::now();
            }
            if self.asleep && self.captured_nothing() == Some(false) {
                // The write's neighbours go with it: what an application does comes in bursts.
                self.asleep = false;
                self.woken = crate::agent::now();
                next = next.min(Instant::now() + self.agent.settings.interval);
            }
            if let Some(event) = wire.take() {
                return Err(Fault::protocol(format!("{event:?} came unasked")));
            }
        }
    }

    fn dirty_blocks(&self) -> Res<u64> {
        let tracker = self.agent.tracker()?;
        let mut total = 0;
        let mut each = Vec::new();
        for volume in &self.spec.volumes {
            let dirty = tracker.dirty_blocks(volume.id)?;
            each.push(dirty);
            total += dirty;
        }
        drop(tracker);
        // While capture is on, bits stand until the next checkpoint's receipt, long after what they stand for was shipped.
        let shown: Vec<u64> =
            each.iter().enumerate().map(|(index, dirty)| self.captured_bytes(index).unwrap_or(dirty * BLOCK_BYTES)).collect();
        self.group.with_live(|live| {
            for (volume, bytes) in live.volumes.iter_mut().zip(shown) {
                volume.dirty_bytes = Some(bytes);
            }
        });
        Ok(total)
    }

    fn identities(&self) -> Vec<(crate::model::VolumeId, DeviceIdentity)> {
        let now = |v: &Opened| host::identity(&v.device).unwrap_or(DeviceIdentity { diskseq: 0, ..v.identity.clone() });
        self.spec.volumes.iter().zip(&self.volumes).map(|(spec, v)| (spec.id, now(v))).collect()
    }

    fn doubts(&self) -> Res<Vec<crate::tracker::Doubt>> {
        let identities = self.identities();
        self.agent.tracker()?.doubts(self.spec.id, &identities)
    }

    /// Nothing has changed since the tip: the standby's copy is good for now as well.
    fn unchanged(&mut self, wire: &mut Wire, tip: Position) -> Res<()> {
        let at = crate::agent::now();
        // Looked at after the clock: a write that ended before `at` has its bit by now, or is in the kernel's account.
        if self.dirty_blocks()? != 0 || !self.doubts()?.is_empty() {
            return Ok(());
        }
        let message = wire.sender.unchanged(at)?;
        wire.send(&message)?;
        self.good(tip, at);
        Ok(())
    }

    /// The standby holds everything up to `at`.
    fn good(&mut self, position: Position, at: Moment) {
        let generation = self.group.with_live(|live| live.position != position).then_some(self.woken);
        self.group.with_live(|live| {
            live.position = position;
            live.recoverable(at, crate::agent::now(), generation);
            live.in_sync = true;
            live.state = "replicating".into();
            live.progress = None;
        });
        for waiter in std::mem::take(&mut self.waiters) {
            match waiter.asked_at <= at {
                true => drop(waiter.done.send(Ok((position, at)))),
                false => self.waiters.push(waiter),
            }
        }
    }

    /// One generation on top of `tip`: rounds while the set is large, the cut, the transfer, the receipt.
    fn cycle(&mut self, wire: &mut Wire, tip: (Position, Digest), landing: Landing, began: Instant) -> Res<(Position, Digest)> {
        let position = Position { epoch: self.epoch, generation: tip.0.generation + 1 };
        let dirty_bytes = self.dirty_blocks()? * BLOCK_BYTES;
        let limits = cut::Limits { freeze_deadline: self.agent.settings.freeze_deadline, cut_max_bytes: self.cut_max_bytes };
        let mut rounds = Rounds::default();
        if dirty_bytes > limits.cut_max_bytes || landing == Landing::Direct {
            self.rounds(wire, &mut rounds, position, landing, dirty_bytes, limits)?;
        }
        let mut tries = 0;
        let (cut, cut_at, cut_began) = loop {
            // The instant is taken before the cut begins: what is promised is never later than the truth (S9).
            let (cut_at, cut_began) = (crate::agent::now(), Instant::now());
            match self.take_cut(limits)? {
                cut::Attempt::Done(cut) => break (cut, cut_at, cut_began),
                cut::Attempt::TooLarge => {
                    tries += 1;
                    if tries > ROUNDS_MAX {
                        return Err(Fault::new(
                            Code::CutNotExact,
                            format!("group {}", self.group.name),
                            "blocks change faster than they can be shipped",
                            "it is tried again; raise cut_max or the bandwidth, or slow the writer",
                        ));
                    }
                    if !rounds.open {
                        self.begin(wire, &mut rounds, position, landing, self.bound(dirty_bytes))?;
                    }
                    self.ship_taken(wire, &mut rounds, landing, 0)?;
                }
            }
        };
        self.refuse_doubts()?;
        self.group.with_live(|live| {
            live.counters.bytes_read += cut.bytes_read;
            live.counters.bytes_changed += cut.sets.iter().map(BlockSet::count).sum::<u64>() * BLOCK_BYTES;
            if let Some(frozen) = cut.frozen {
                live.counters.freezes.add(frozen);
            }
            for volume in &mut live.volumes {
                volume.cut = if cut.frozen.is_some() { "freeze".into() } else { "unmounted".into() };
            }
        });
        let mut encoder = Encoder::default();
        let mut pieces = Vec::new();
        for (volume, run, range) in &cut.runs {
            pieces.extend(encoder.add(*volume, *run, &cut.bytes[range.clone()], &mut self.known[usize::from(*volume)])?);
        }
        let last = encoder.take();
        if !last.is_empty() {
            pieces.push(last);
        }
        drop(cut);
        let pending = Pending { position, cut_at, began: began.min(cut_began), pieces, sent: encoder.sent, begun: false };
        if rounds.open {
            self.check_room(&rounds, pending.pieces.iter().map(|p| p.len() as u64).sum())?;
            for piece in &pending.pieces {
                self.send_piece(wire, piece.clone())?;
            }
            rounds.sent.append(pending.sent);
            return self.finish(wire, Pending { pieces: Vec::new(), sent: rounds.sent, ..pending });
        }
        self.resend(wire, pending, None)
    }

    /// What the tracker doubts is not sent: both sides are compared in full instead.
    fn refuse_doubts(&mut self) -> Res<()> {
        let doubts = self.doubts()?;
        if let Some(doubt) = doubts.first() {
            self.bits_count = false;
            // What was promised rested on bits that are in doubt now: unknown is shown as unknown (S9).
            self.group.with_live(|live| {
                live.recoverable_to = Moment(0);
                live.in_sync = false;
            });
            return Err(Fault::new(
                Code::TrackerDoubt,
                format!("group {}", self.group.name),
                doubt.reason.clone(),
                "both sides are compared in full now; nothing is taken for clean",
            ));
        }
        Ok(())
    }

    fn take_cut(&mut self, limits: cut::Limits) -> Res<cut::Attempt> {
        let sources = continuous::sources(&self.spec.volumes, &self.volumes);
        cut::take(self.agent.tracker_cell()?, self.spec.id, &sources, &mut self.freezer, self.engine.as_mut(), limits)
    }

    /// Sends a kept or fresh generation; what the standby holds of it already is not sent again.
    fn resend(&mut self, wire: &mut Wire, pending: Pending, open: Option<(Position, u64)>) -> Res<(Position, Digest)> {
        let (mut skip, mut pending) = (0, pending);
        if let Some((_, held_bytes)) = open.filter(|_| pending.begun) {
            let mut sum = 0;
            skip = pending
                .pieces
                .iter()
                .take_while(|p| {
                    sum += p.len() as u64;
                    sum <= held_bytes
                })
                .count();
            let held: u64 = pending.pieces[..skip].iter().map(|p| p.len() as u64).sum();
            if held != held_bytes {
                skip = 0;
            }
        }
        let outcome = (|| {
            if skip > 0 {
                wire.sender.resume(pending.position, &mut pending.pieces[..skip].iter().map(Vec::as_slice))?;
            } else {
                let payload_bytes: u64 = pending.pieces.iter().map(|p| p.len() as u64).sum();
                let message = wire.sender.begin(pending.position, Landing::Journal, payload_bytes)?;
                pending.begun = true;
                wire.send(&message)?;
            }
            for piece in &pending.pieces[skip..] {
                self.send_piece(wire, piece.clone())?;
            }
            Ok(())
        })();
        if let Err(fault) = outcome {
            self.pending = Some(pending);
            return Err(fault);
        }
        self.finish(wire, pending)
    }

    fn send_piece(&mut self, wire: &mut Wire, piece: Vec<u8>) -> Res<()> {
        let bytes = piece.len() as u64;
        wire.payload(piece)?;
        self.group.with_live(|live| live.counters.bytes_sent += bytes);
        Ok(())
    }

    /// The end of the payload, the wait for the receipt, and what it allows:
    ///
    /// 1. The pending position is remembered beside the bits, before the peer can commit it.
    /// 2. `End` is sent; the peer commits; its receipt is checked against our digest.
    /// 3. Only then are the bits let go,
    /// 4. and only then is the peer believed to hold what was sent.
    fn finish(&mut self, wire: &mut Wire, pending: Pending) -> Res<(Position, Digest)> {
        let Pending { position, cut_at, began, sent, pieces, begun } = pending;
        let outcome = (|| {
            let (digest, message) = wire.sender.end(cut_at)?;
            let mut tracker = self.agent.tracker()?;
            let base = tracker.base(self.spec.id)?;
            tracker.set_base(self.spec.id, Base { pending: (position, digest), ..base })?;
            drop(tracker);
            wire.send(&message)?;
            match wire.wait()? {
                SenderEvent::Committed(receipt) => Ok(receipt),
                other => Err(Fault::protocol(format!("{other:?} came where a receipt was due"))),
            }
        })();
        let receipt = match outcome {
            Ok(receipt) => receipt,
            Err(fault) => {
                // Without rounds the whole payload is in memory, and the cut stays valid.
                if !pieces.is_empty() {
                    self.pending = Some(Pending { position, cut_at, began, sent, pieces, begun });
                }
                return Err(fault);
            }
        };
        self.agent.tracker()?.release(self.spec.id, &receipt)?;
        self.room_factor = 1;
        self.inexact = 0;
        self.cut_max_bytes = (self.cut_max_bytes + self.cut_max_bytes / 16).min(self.agent.settings.cut_max_bytes);
        sent.believe(&mut self.known)?;
        self.group.with_live(|live| {
            live.counters.generations += 1;
            live.counters.cycles.add(began.elapsed());
        });
        self.dirty_blocks()?;
        self.good(receipt.position(), cut_at);
        Ok((receipt.position(), receipt.digest()))
    }

    /// An upper bound of a transfer with rounds: what is dirty now, a quarter more for what is written meanwhile, and room.
    fn bound(&self, dirty_bytes: u64) -> u64 {
        let room = dirty_bytes / 4 + (dirty_bytes / BLOCK_BYTES) * 32 + 2 * self.agent.settings.cut_max_bytes + (64 << 20);
        dirty_bytes + room * self.room_factor
    }

    /// A transfer with rounds may not outgrow what was announced: it is begun again with more room.
    fn check_room(&mut self, rounds: &Rounds, more_bytes: u64) -> Res<()> {
        if rounds.payload_bytes + more_bytes <= rounds.bound {
            return Ok(());
        }
        self.room_factor = (self.room_factor * 4).min(1 << 20);
        Err(Fault::new(
            Code::CutNotExact,
            format!("group {}", self.group.name),
            "more was written during the transfer than was announced",
            "it is begun again by itself, with more room",
        ))
    }

    fn begin(&mut self, wire: &mut Wire, rounds: &mut Rounds, position: Position, landing: Landing, bound: u64) -> Res<()> {
        let message = wire.sender.begin(position, landing, bound)?;
        wire.send(&message)?;
        rounds.open = true;
        rounds.bound = bound;
        Ok(())
    }

    /// Ships the set as it runs, again and again, until what is left can be cut. No drain is needed between flip and read: a
    /// write that was in flight sets its bit again when it completes (kernel-notes T).
    fn rounds(
        &mut self,
        wire: &mut Wire,
        rounds: &mut Rounds,
        position: Position,
        landing: Landing,
        dirty_bytes: u64,
        limits: cut::Limits,
    ) -> Res<()> {
        self.state(if landing == Landing::Direct { "first sync" } else { "catching up" });
        self.begin(wire, rounds, position, landing, self.bound(dirty_bytes))?;
        let mut before = u64::MAX;
        for _ in 0..ROUNDS_MAX {
            let left = self.active_bytes()?;
            // Small enough for a freeze, or no longer shrinking: the cut itself decides.
            if left <= limits.cut_max_bytes / 4 || (left <= limits.cut_max_bytes && left >= before) {
                break;
            }
            before = left;
            self.agent.tracker()?.flip(self.spec.id)?;
            self.ship_taken(wire, rounds, landing, left)?;
        }
        Ok(())
    }

    fn active_bytes(&self) -> Res<u64> {
        let tracker = self.agent.tracker()?;
        let mut blocks = 0;
        for volume in &self.spec.volumes {
            blocks += tracker.active_blocks(volume.id)?;
        }
        Ok(blocks * BLOCK_BYTES)
    }

    /// Reads and sends the taken sets as they are now.
    fn ship_taken(&mut self, wire: &mut Wire, rounds: &mut Rounds, landing: Landing, total: u64) -> Res<()> {
        self.ship_sets(wire, rounds, landing, total, None)
    }

    /// Reads and sends sets (by volume; the taken ones where none are given) as they are now.
    fn ship_sets(
        &mut self,
        wire: &mut Wire,
        rounds: &mut Rounds,
        landing: Landing,
        total: u64,
        sets: Option<&[BlockSet]>,
    ) -> Res<()> {
        let mut done = 0;
        for index in 0..self.volumes.len() {
            let taken = match sets {
                Some(sets) => sets[index].clone(),
                None => self.agent.tracker()?.taken(self.spec.volumes[index].id)?,
            };
            let changed = taken.count() * BLOCK_BYTES;
            self.check_room(rounds, changed + changed / BLOCK_BYTES * RECORD_HEADER_BYTES as u64)?;
            let mut encoder = Encoder::default();
            let mut effort = Effort::new(changed);
            // Under a cap the link is the narrow place, whatever a trial would say.
            let capped = self.agent.settings.bandwidth_bytes_per_second.is_some();
            let Primary { engine, volumes, known, group, .. } = self;
            let read = reader::read(engine.as_mut(), &volumes[index].image, &taken, &mut |run, bytes| {
                done += bytes.len() as u64;
                wire.breathe()?;
                encoder.packs = effort.passed(bytes.len() as u64) || capped;
                if let Some(piece) = encoder.add(index as u16, run, bytes, &mut known[index])? {
                    let sent_bytes = piece.len() as u64;
                    wire.payload(piece)?;
                    rounds.since_segment += sent_bytes;
                    rounds.payload_bytes += sent_bytes;
                    group.with_live(|live| {
                        live.counters.bytes_sent += sent_bytes;
                        live.progress = Some(Progress { what: live.state.clone(), done, total: total.max(done) });
                    });
                    if landing == Landing::Direct && rounds.since_segment >= SEGMENT_BYTES {
                        rounds.segment(wire, std::mem::take(&mut encoder.sent), known)?;
                    }
                }
                Ok(())
            })?;
            let last = encoder.take();
            if !last.is_empty() {
                rounds.payload_bytes += last.len() as u64;
                self.send_piece(wire, last)?;
            }
            match landing {
                Landing::Direct => rounds.segment(wire, encoder.sent, &mut self.known)?,
                Landing::Journal => rounds.sent.append(encoder.sent),
            }
            self.group.with_live(|live| {
                live.counters.bytes_read += read;
                live.counters.bytes_changed += changed;
            });
        }
        // Before a block can be sent once more: a late word on what was sent first would make its old digest count again.
        self.finish_segments(wire, rounds)
    }

    fn finish_segments(&mut self, wire: &mut Wire, rounds: &mut Rounds) -> Res<()> {
        while !rounds.segments.is_empty() {
            let event = wire.wait()?;
            rounds.on_event(event, &mut self.known)?;
        }
        Ok(())
    }

    /// Compares both sides window by window, between cycles: a block that differs and was not written is a mismatch.
    fn verify(&mut self, wire: &mut Wire) -> Res<(serde_json::Value, Exit)> {
        self.state("verifying");
        let (mut compared, mut skipped, mut mismatched) = (0u64, 0u64, Vec::new());
        let total: u64 = self.spec.volumes.iter().map(|v| v.blocks()).sum();
        for index in 0..self.volumes.len() {
            let volume = self.spec.volumes[index].clone();
            let mut start = 0;
            while start < volume.blocks() {
                let window = BlockRun { start, count: VERIFY_WINDOW_BLOCKS.min(volume.blocks() - start) };
                let theirs = self.digests_of(wire, index, window)?;
                let mut mine = BlockSet::empty(volume.blocks());
                mine.insert(window);
                let tracker = self.agent.tracker()?;
                mine.subtract(&tracker.dirty(volume.id)?);
                // A cut of captured writes waits for nobody: a write may have been in flight since before the last flip, its bit gone with
                // the receipt, and reach the device during the read, a moment before its completion sets the bit again.
                mine.subtract(&tracker.in_flight(volume.id)?);
                drop(tracker);
                skipped += window.count - mine.count();
                let mut differ =
                    verify::differing(self.engine.as_mut(), &self.volumes[index].image, &mine, window.start, &theirs)?;
                // A block that was written since the standby's tip may differ; its bit says so, set before its data changed.
                differ.subtract(&self.agent.tracker()?.dirty(volume.id)?);
                compared += mine.count();
                for run in differ.runs(u64::MAX) {
                    mismatched.push(json!({ "volume": volume.name, "block": run.start, "blocks": run.count }));
                    self.known[index].forget(run)?;
                    tracing::error!(volume = %volume.name, block = run.start, blocks = run.count, "verify: differs from the standby, will be sent again");
                }
                if !differ.is_empty() {
                    let count = differ.count();
                    self.group.with_live(|live| live.counters.mismatched_blocks += count);
                    self.agent.tracker()?.mark(volume.id, &differ)?;
                    self.read_again(index, &differ);
                }
                start = window.end();
                self.progress("verifying", (compared + skipped) * BLOCK_BYTES, total * BLOCK_BYTES);
            }
        }
        self.group.with_live(|live| live.progress = None);
        let exit = if mismatched.is_empty() { Exit::Done } else { Exit::Degraded };
        if exit == Exit::Degraded {
            self.group.with_live(|live| {
                live.fault(Fault::new(
                    Code::VerifyMismatch,
                    format!("group {}", self.group.name),
                    "blocks that nobody had written differ on the standby",
                    "they are sent again now; look for a failing disk or a writer of the image file",
                ));
            });
        } else {
            self.group.with_live(|live| live.clear(Code::VerifyMismatch));
        }
        Ok((
            json!({ "group": self.group.name, "compared_blocks": compared, "skipped_dirty_blocks": skipped, "mismatched": mismatched }),
            exit,
        ))
    }

    fn digests_of(&mut self, wire: &mut Wire, index: usize, window: BlockRun) -> Res<Vec<u8>> {
        let mut theirs = vec![0u8; window.count as usize * 16];
        let message = wire.sender.want_digests(index as u16, window.start, window.count)?;
        wire.send(&message)?;
        loop {
            match wire.wait()? {
                SenderEvent::Digests { volume, start, digests } if usize::from(volume) == index => {
                    let at = start.checked_sub(window.start).map(|b| b as usize * 16);
                    match at.and_then(|at| theirs.get_mut(at..at.checked_add(digests.len())?)) {
                        Some(place) => place.copy_from_slice(&digests),
                        None => return Err(Fault::protocol("digests came for blocks that were not asked for")),
                    }
                }
                SenderEvent::DigestsDone { .. } => return Ok(theirs),
                other => return Err(Fault::protocol(format!("{other:?} came among digests"))),
            }
        }
    }

    /// Containers are captured again; a changed recipe is made durable on both sides. A dockerd that does not answer changes
    /// nothing: the last recipe stays.
    fn look_at_recipes(&mut self, wire: &mut Wire) -> Res<()> {
        self.recipe_looked = Instant::now();
        let Ok(docker) = self.agent.docker() else { return Ok(()) };
        let mut spec = self.spec.clone();
        for container in &mut spec.containers {
            // Compared by name and image only where the container is gone: it may be between two lives.
            match docker.capture(&container.name) {
                Ok(now) if now.image == container.image => *container = now,
                _ => {}
            }
        }
        if recipes(&spec) != recipes(&self.spec) {
            self.spec = spec.clone();
            self.group.edit_ledger(|record| {
                record.spec = spec.clone();
                Ok(())
            })?;
            self.define(wire)?;
        }
        Ok(())
    }
}

/// What a digest map says it is about.
fn about(group: &GroupSpec, volume: &VolumeSpec) -> Digest {
    let mut about = [0; 32];
    about[..16].copy_from_slice(&group.id.0);
    about[16..].copy_from_slice(&volume.id.0);
    Digest(about)
}

/// The parts of a recipe whose change matters: configuration, not state.
fn recipes(spec: &GroupSpec) -> Vec<(String, serde_json::Value)> {
    let keep = ["Config", "HostConfig", "Mounts"];
    let part = |v: &serde_json::Value| json!(keep.map(|k| v.get(k).cloned().unwrap_or_default()));
    spec.containers.iter().map(|c| (c.name.clone(), part(&c.inspect))).collect()
}

/// A transfer with rounds.
#[derive(Default)]
struct Rounds {
    open: bool,
    /// Payload announced and sent, in bytes.
    bound: u64,
    payload_bytes: u64,
    sent: Sent,
    segments: VecDeque<(u64, Sent)>,
    since_segment: u64,
}

impl Rounds {
    /// Asks that what was sent directly so far be made durable; several may be on their way.
    fn segment(&mut self, wire: &mut Wire, sent: Sent, known: &mut [Known]) -> Res<()> {
        let (number, message) = wire.sender.segment()?;
        wire.send(&message)?;
        self.segments.push_back((number, sent));
        self.since_segment = 0;
        while let Some(event) = wire.take() {
            self.on_event(event, known)?;
        }
        Ok(())
    }

    fn on_event(&mut self, event: SenderEvent, known: &mut [Known]) -> Res<()> {
        match (event, self.segments.pop_front()) {
            (SenderEvent::SegmentDone { number }, Some((asked, sent))) if number == asked => sent.believe(known),
            (event, _) => Err(Fault::protocol(format!("{event:?} came where a segment was due"))),
        }
    }
}
