//! Generations from captured writes: no freeze, no clone. Continuous mode leaves capture on; interval mode has it on for a cut.

use super::{Opened, Primary, ROUNDS_MAX, Rounds};
use crate::agent::encode::Encoder;
use crate::agent::watch::Watch;
use crate::agent::wire::Wire;
use crate::config::Mode;
use crate::cut;
use crate::cut::{Change, Step, Stream};
use crate::delta::RECORD_HEADER_BYTES;
use crate::format::Landing;
use crate::model::{BLOCK_BYTES, BlockRun, BlockSet, ByteRun, Code, Digest, Fault, Moment, Position, Res, VolumeSpec};
use crate::verify;
use std::time::{Duration, Instant};

/// An idle group says so often that nothing has changed; in between it sleeps.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(1);
/// A group that was not written for so long gives the memory of its ring back.
const RING_KEPT: Duration = Duration::from_secs(120);
/// A generation is made early when the ring is full to one part in so many.
const RING_FULL_PARTS: u64 = 4;
/// How often an active group looks whether its ring fills.
pub(super) const RING_LOOK: Duration = Duration::from_millis(20);
/// The ring of a group in interval mode, made anew for each cut.
const INTERVAL_RING_BYTES: u64 = 16 << 20;
/// Blocks compared between two generations (16 MiB), so that a check never delays one for long.
const CHECK_STEP_BLOCKS: u64 = 4096;
/// Blocks that nobody wrote, compared with each checkpoint (64 MiB): the scrub goes round.
const SCRUB_BLOCKS: u64 = 16_384;

/// What runs while writes are captured.
pub(super) struct Capturing {
    pub(super) stream: Stream,
    watch: Watch,
    /// When the last write was seen.
    written: Instant,
    checkpoint: Instant,
    /// What the last checkpoint took: to be compared where it has not been written since. By volume.
    check: Vec<BlockSet>,
    /// What nobody wrote, to be compared with it.
    scrub: Vec<BlockSet>,
}

impl Primary {
    /// Whether cuts are made from captured writes.
    pub(super) fn captures(&self) -> bool {
        self.capture_refusal.is_none()
    }

    /// Why this group is cut with a freeze; `None` when it is not.
    pub(super) fn refusal(agent: &crate::agent::Agent, volumes: &[Opened]) -> Res<Option<String>> {
        if agent.settings.mode == Mode::Freeze {
            return Ok(Some("mode = \"freeze\" is configured".into()));
        }
        if let Some(fault) = agent.tracker()?.capture_refusal() {
            return Ok(Some(fault.to_string()));
        }
        for volume in volumes {
            if let Some(reason) = crate::tracker::capture_excluded(&volume.identity)? {
                return Ok(Some(reason));
            }
        }
        Ok(None)
    }

    /// Ends capture, if it is on; whatever was captured and not committed is dirty and will be read.
    pub(super) fn stop_capturing(&mut self) {
        let Some(capturing) = self.capturing.take() else { return };
        let closed = self.agent.tracker_cell().and_then(|tracker| capturing.stream.close(tracker));
        if let Err(fault) = closed {
            tracing::error!(group = %self.group.name, "{fault}");
        }
    }

    /// Bytes captured of a volume and not shipped yet; `None` when capture is off.
    pub(super) fn captured_bytes(&self, index: usize) -> Option<u64> {
        self.capturing.as_ref().map(|capturing| capturing.stream.capture().pending_bytes(index))
    }

    /// Whether nothing was written since the last generation, as far as the ring tells; `None` when capture is off.
    pub(super) fn captured_nothing(&self) -> Option<bool> {
        self.capturing.as_ref().map(|capturing| capturing.stream.is_empty())
    }

    /// Whether so much was captured that it is better shipped now than at the interval's end.
    pub(super) fn ring_fills(&self) -> bool {
        let fills = |c: &Capturing| c.stream.capture().used_bytes() * RING_FULL_PARTS > c.stream.capture().size_bytes();
        self.capturing.as_ref().is_some_and(fills)
    }

    /// Arms the watch that ends an idle group's sleep at its first write.
    pub(super) fn watch(&self, wire: &Wire) {
        if let Some(capturing) = &self.capturing {
            capturing.watch.arm(wire.bell());
        }
    }

    /// One generation on top of `tip` from captured writes, or the word that nothing has changed.
    ///
    /// 1. Where capture is off: rounds while the set is large, then capture begins and what is dirty is to be read.
    /// 2. A checkpoint that is due flips the bitmap: what was taken is in this generation or in one before it.
    /// 3. The look for a cut. What is too large to be read at once goes out in rounds, uncommitted.
    /// 4. Nothing that the tracker doubts is sent.
    /// 5. The last write to each sector is encoded and sent as it is encoded. 6. The end, the receipt (see `finish`).
    /// 7. What the checkpoint took and has been clean since is compared, a step at a time.
    pub(super) fn captured_cycle(
        &mut self,
        wire: &mut Wire,
        tip: (Position, Digest),
        landing: Landing,
        began: Instant,
    ) -> Res<(Position, Digest)> {
        let position = Position { epoch: self.epoch, generation: tip.0.generation + 1 };
        let limits = cut::Limits { freeze_deadline: self.agent.settings.freeze_deadline, cut_max_bytes: self.cut_max_bytes };
        let mut rounds = Rounds::default();
        if !self.waiters.is_empty() {
            self.sync_mounted()?;
        }
        // 1
        if self.capturing.is_none() {
            let dirty_bytes = self.dirty_blocks()? * BLOCK_BYTES;
            if dirty_bytes > limits.cut_max_bytes || landing == Landing::Direct {
                self.rounds(wire, &mut rounds, position, landing, dirty_bytes, limits)?;
            }
            self.start_capturing()?;
        } else if self.capturing.as_ref().is_some_and(|c| c.checkpoint.elapsed() >= self.agent.settings.checkpoint_interval) {
            // 2
            self.begin_checkpoint()?;
        }
        // 3
        let cut_at = self.look(wire, &mut rounds, position, landing, limits)?;
        // 4
        self.refuse_doubts()?;
        let Some(capturing) = &mut self.capturing else { return Err(Fault::internal("the stream", "it has ended")) };
        let parts = capturing.stream.gathered() as u64;
        if parts == 0 && !rounds.open {
            self.nothing_changed(wire, tip.0, cut_at)?;
            self.check_step()?;
            return Ok(tip);
        }
        capturing.written = Instant::now();
        // 5
        let bound = parts * (BLOCK_BYTES + RECORD_HEADER_BYTES as u64);
        match rounds.open {
            true => self.check_room(&rounds, bound)?,
            false => self.begin(wire, &mut rounds, position, Landing::Journal, bound)?,
        }
        self.send_captured(wire, &mut rounds)?;
        // 6
        let sent = std::mem::take(&mut rounds.sent);
        let pending = super::Pending { position, cut_at, began, pieces: Vec::new(), sent, begun: true };
        let tip = self.finish(wire, pending)?;
        if self.agent.settings.mode == Mode::Interval {
            self.stop_capturing();
            return Ok(tip);
        }
        // 7
        self.check_step()?;
        Ok(tip)
    }

    fn start_capturing(&mut self) -> Res<()> {
        // For a cut now and then, what completes meanwhile is little.
        let ring_bytes = match self.agent.settings.mode {
            Mode::Interval => self.agent.settings.capture_ring_bytes.min(INTERVAL_RING_BYTES),
            _ => self.agent.settings.capture_ring_bytes,
        };
        let ring_bytes = u32::try_from(ring_bytes).unwrap_or(1 << 30);
        let sources = sources(&self.spec.volumes, &self.volumes);
        let stream = Stream::open(self.agent.tracker_cell()?, self.spec.id, &sources, ring_bytes)?;
        let watch = Watch::start(stream.capture().fd())?;
        let now = Instant::now();
        let check: Vec<BlockSet> = self.spec.volumes.iter().map(|v| BlockSet::empty(v.blocks())).collect();
        self.capturing = Some(Capturing { stream, watch, written: now, checkpoint: now, scrub: check.clone(), check });
        Ok(())
    }

    /// What users have handed to their file systems is handed to the devices: who asks for a sync means that too.
    fn sync_mounted(&self) -> Res<()> {
        for volume in &self.volumes {
            let points = crate::host::mounts_of(volume.identity.major, volume.identity.minor)?;
            if let Some(point) = points.iter().find(|point| !point.read_only) {
                crate::host::sync_fs(&point.path)?;
            }
        }
        Ok(())
    }

    /// Looks until there is a cut, shipping what is too large in rounds. Gives an instant that is not later than the cut.
    fn look(
        &mut self,
        wire: &mut Wire,
        rounds: &mut Rounds,
        position: Position,
        landing: Landing,
        limits: cut::Limits,
    ) -> Res<Moment> {
        for _ in 0..=ROUNDS_MAX {
            let cut_at = crate::agent::now();
            let Primary { agent, spec, volumes, engine, capturing, .. } = self;
            let Some(capturing) = capturing else { return Err(Fault::internal("the stream", "it has ended")) };
            let sources = sources(&spec.volumes, volumes);
            let before = capturing.stream.counts();
            let step = capturing.stream.look(agent.tracker_cell()?, &sources, engine.as_mut(), limits)?;
            let after = capturing.stream.counts();
            self.group.with_live(|live| {
                let captured = after.captured_bytes - before.captured_bytes;
                live.counters.bytes_captured += captured;
                live.counters.bytes_read += after.reread_bytes - before.reread_bytes;
                live.counters.bytes_changed += captured + after.reread_bytes - before.reread_bytes;
                live.counters.holes += after.holes - before.holes;
                live.counters.capture_missed += after.missed - before.missed;
            });
            match step {
                Step::Cut => return Ok(cut_at),
                Step::Large(sets) => {
                    let bytes = sets.iter().map(BlockSet::count).sum::<u64>() * BLOCK_BYTES;
                    self.state("catching up with a burst");
                    self.group.with_live(|live| live.counters.rounds += 1);
                    if !rounds.open {
                        self.begin(wire, rounds, position, landing, self.bound(bytes))?;
                    }
                    self.ship_sets(wire, rounds, landing, bytes, Some(&sets))?;
                }
            }
        }
        Err(Fault::new(
            Code::CutNotExact,
            format!("group {}", self.group.name),
            "blocks change faster than they can be shipped",
            "it is tried again; raise cut_max or the bandwidth, or slow the writer",
        ))
    }

    fn send_captured(&mut self, wire: &mut Wire, rounds: &mut Rounds) -> Res<()> {
        let mut encoder = Encoder::default();
        let capped = self.agent.settings.bandwidth_bytes_per_second.is_some();
        let Primary { known, group, capturing, thrift, .. } = self;
        let Some(capturing) = capturing else { return Err(Fault::internal("the stream", "it has ended")) };
        let mut sent_bytes = 0;
        capturing.stream.emit(&mut |volume, change| {
            let known = &mut known[usize::from(volume)];
            let piece = match change {
                Change::Blocks(run, bytes) => {
                    encoder.packs = capped || thrift.tries();
                    let (before, packed) = (encoder.stored_bytes(), encoder.packs);
                    let piece = encoder.add(volume, run, bytes, known)?;
                    if packed {
                        thrift.tried(bytes.len() as u64, encoder.stored_bytes() - before);
                    }
                    piece
                }
                Change::Sectors(first, bytes) => encoder.add_sectors(volume, first, bytes, known)?,
            };
            if let Some(piece) = piece {
                sent_bytes += piece.len() as u64;
                wire.payload(piece)?;
            }
            Ok(())
        })?;
        let last = encoder.take();
        if !last.is_empty() {
            sent_bytes += last.len() as u64;
            wire.payload(last)?;
        }
        rounds.payload_bytes += sent_bytes;
        rounds.sent.append(encoder.sent);
        group.with_live(|live| live.counters.bytes_sent += sent_bytes);
        Ok(())
    }

    /// The cut held nothing: what the standby has is true for `at` too.
    fn nothing_changed(&mut self, wire: &mut Wire, tip: Position, at: Moment) -> Res<()> {
        let message = wire.sender.unchanged(at)?;
        wire.send(&message)?;
        self.good(tip, at);
        let long = self.capturing.as_ref().is_some_and(|c| c.written.elapsed() > RING_KEPT);
        let mode = self.agent.settings.mode;
        // The bitmap goes on without the ring. What was taken and is held goes with the next receipt, as always.
        if long || mode == Mode::Interval {
            self.stop_capturing();
        }
        Ok(())
    }

    /// Flips the bitmap and remembers what was taken, to be compared.
    fn begin_checkpoint(&mut self) -> Res<()> {
        let Some(capturing) = &mut self.capturing else { return Ok(()) };
        capturing.checkpoint = Instant::now();
        capturing.stream.flip(self.agent.tracker_cell()?)?;
        let tracker = self.agent.tracker()?;
        for (index, volume) in self.spec.volumes.iter().enumerate() {
            // What an earlier checkpoint left over is compared too, in so far as it is clean.
            capturing.check[index].union(&tracker.taken(volume.id)?);
            let (blocks, at) = (volume.blocks(), &mut self.scrubbed[index]);
            let window = BlockRun { start: *at, count: SCRUB_BLOCKS.min(blocks - *at) };
            *at = if window.end() >= blocks { 0 } else { window.end() };
            let mut scrub = BlockSet::empty(blocks);
            scrub.insert(window);
            scrub.subtract(&capturing.check[index]);
            capturing.scrub[index] = scrub;
        }
        drop(tracker);
        self.group.with_live(|live| live.counters.checkpoints += 1);
        Ok(())
    }

    /// Compares a little of what is due: our own bytes with the digests of what the standby acknowledged.
    ///
    /// A block is compared if it was not written since the flip and not in flight before the read, nor written after it. A write sets its bit before
    /// its data changes anything; one that was submitted before the last flip stands in the in-flight table until its completion has set
    /// the bit again. So what differs was changed by nobody that we saw: of blocks written since the base that can be legal (pages that
    /// change while they are written), of others it never is.
    fn check_step(&mut self) -> Res<()> {
        let mut budget = CHECK_STEP_BLOCKS;
        for index in 0..self.spec.volumes.len() {
            for written in [true, false] {
                let Primary { capturing: Some(capturing), spec, agent, volumes, engine, known, .. } = self else { return Ok(()) };
                let due = if written { &mut capturing.check[index] } else { &mut capturing.scrub[index] };
                if budget == 0 || due.is_empty() {
                    continue;
                }
                let (id, blocks) = (spec.volumes[index].id, spec.volumes[index].blocks());
                let mut step = BlockSet::empty(blocks);
                for run in due.runs(64) {
                    let run = BlockRun { count: run.count.min(budget), ..run };
                    step.insert(run);
                    budget -= run.count;
                    if budget == 0 {
                        break;
                    }
                }
                due.subtract(&step);
                step.subtract(&agent.tracker()?.active(id)?);
                for range in capturing.stream.capture().in_flight(index) {
                    let (first, end) = (range.offset / BLOCK_BYTES, range.end().div_ceil(BLOCK_BYTES).min(blocks));
                    if first < end {
                        step.remove(BlockRun { start: first, count: end - first });
                    }
                }
                let held = |block: u64| known[index].get(block);
                let mut differ = verify::differing_from(engine.as_mut(), &volumes[index].image, &step, &held)?;
                differ.subtract(&agent.tracker()?.active(id)?);
                let compared = step.count();
                self.group.with_live(|live| live.counters.checked_blocks += compared);
                if !differ.is_empty() {
                    self.repair(index, &differ, written)?;
                }
            }
        }
        Ok(())
    }

    /// While capture is on, a bit alone ships nothing: these blocks are read for the next cut.
    pub(super) fn read_again(&mut self, index: usize, blocks: &BlockSet) {
        let Some(capturing) = &mut self.capturing else { return };
        for run in blocks.runs(u64::MAX) {
            let range = ByteRun { offset: run.start * BLOCK_BYTES, len: run.count * BLOCK_BYTES };
            capturing.stream.must_read(index, range);
        }
    }

    /// Blocks that differ from what was shipped are shipped again, counted, and named in the log.
    pub(super) fn repair(&mut self, index: usize, differ: &BlockSet, written: bool) -> Res<()> {
        let volume: &VolumeSpec = &self.spec.volumes[index];
        for run in differ.runs(u64::MAX) {
            self.known[index].forget(run)?;
            let (block, blocks) = (run.start, run.count);
            match written {
                true => {
                    tracing::warn!(volume = %volume.name, block, blocks, "check: written blocks differ from what was shipped, they are shipped again")
                }
                false => {
                    tracing::error!(volume = %volume.name, block, blocks, "check: blocks that nobody had written differ from what was shipped")
                }
            }
        }
        self.agent.tracker()?.mark(volume.id, differ)?;
        let name = self.group.name.clone();
        let count = differ.count();
        self.read_again(index, differ);
        self.group.with_live(|live| match written {
            true => live.counters.repaired_blocks += count,
            false => {
                live.counters.mismatched_blocks += count;
                live.fault(Fault::new(
                    Code::VerifyMismatch,
                    format!("group {name}"),
                    "blocks that nobody had written differ from what was shipped",
                    "they are sent again now; look for a failing disk or a writer of the image file, and run `doublure verify`",
                ));
            }
        });
        Ok(())
    }
}

/// The volumes as a cut sees them.
pub(super) fn sources<'a>(specs: &'a [VolumeSpec], volumes: &'a [Opened]) -> Vec<cut::Source<'a>> {
    let source = |(spec, v): (&'a VolumeSpec, &'a Opened)| cut::Source {
        id: spec.id,
        name: &spec.name,
        device: v.device.clone(),
        identity: v.identity.clone(),
        image: &v.image,
    };
    specs.iter().zip(volumes).map(source).collect()
}
