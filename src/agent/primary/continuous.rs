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
/// A generation is made early when the ring is full to one part in so many.
const RING_FULL_PARTS: u64 = 4;
/// How often an active group looks whether its ring fills.
pub(super) const RING_LOOK: Duration = Duration::from_millis(20);
/// A group that was not written for so many checkpoints gives the memory of its ring back.
const RING_KEPT_CHECKPOINTS: u32 = 2;
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
    /// The bitmap was flipped and no receipt has come since.
    flipped: bool,
}

/// What is to be compared of one volume, with what was shipped of it.
pub(super) struct Checks {
    /// What checkpoints took: to be compared where it has not been written since.
    written: BlockSet,
    /// What nobody wrote.
    scrub: BlockSet,
    /// Where the scrub goes on, in blocks.
    next: u64,
    /// Where the comparison of what was written goes on, in blocks: a busy beginning of the volume must not keep its end waiting.
    turn: u64,
    /// The scrub's first time round. What an earlier life of the agent took and had not compared is not known any more, so what
    /// differs now may have been written then: it counts as written.
    first_round: bool,
    /// The scrub's window is the last of its round.
    last_window: bool,
}

impl Checks {
    pub(super) fn new(blocks: u64) -> Checks {
        let none = BlockSet::empty(blocks);
        Checks { written: none.clone(), scrub: none, next: 0, turn: 0, first_round: true, last_window: false }
    }

    /// These blocks were written.
    fn took(&mut self, taken: &BlockSet) {
        // What an earlier checkpoint left over is compared too, in so far as it is clean.
        self.written.union(taken);
        // Also of a window that is not done: what was written since is no longer what nobody wrote.
        self.scrub.subtract(&self.written);
    }

    /// A checkpoint took these blocks: they are to be compared, and a window of what nobody wrote, once the last one is done.
    fn begin(&mut self, taken: &BlockSet) {
        if self.scrub.is_empty() {
            let blocks = self.written.blocks();
            if std::mem::take(&mut self.last_window) {
                self.first_round = false;
            }
            let window = BlockRun { start: self.next, count: SCRUB_BLOCKS.min(blocks - self.next) };
            self.last_window = window.end() >= blocks;
            self.next = if self.last_window { 0 } else { window.end() };
            self.scrub.insert(window);
        }
        self.took(taken);
    }

    /// Gives back the memory of sets that are empty: a new one has none until something is set.
    fn give_back(&mut self) {
        for set in [&mut self.written, &mut self.scrub] {
            if set.is_empty() {
                *set = BlockSet::empty(set.blocks());
            }
        }
    }

    /// The next blocks to compare, at most so many.
    fn step(&mut self, written: bool, most: u64) -> BlockSet {
        let (due, from) = if written { (&mut self.written, self.turn) } else { (&mut self.scrub, 0) };
        let mut step = BlockSet::empty(due.blocks());
        let mut left = most;
        for run in due.runs(64).filter(|run| run.end() > from) {
            let start = run.start.max(from);
            let run = BlockRun { start, count: (run.end() - start).min(left) };
            step.insert(run);
            left -= run.count;
            if left == 0 {
                break;
            }
        }
        if written {
            self.turn = if left == 0 { step.runs(u64::MAX).last().map_or(0, |run| run.end()) } else { 0 };
        }
        due.subtract(&step);
        step
    }
}

impl Primary {
    /// Whether cuts are made from captured writes.
    pub(super) fn captures(&self) -> bool {
        self.capture_refusal.is_none()
    }

    /// From here on cuts are made with a freeze, and `status` says why.
    pub(super) fn refuse_capture(&mut self, reason: String) {
        self.group.with_live(|live| {
            for volume in &mut live.volumes {
                volume.cut = "freeze".into();
                volume.cut_reason = Some(reason.clone());
            }
        });
        self.capture_refusal = Some(reason);
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
        } else if self.checkpointed.elapsed() >= self.agent.settings.checkpoint_interval {
            // 2
            self.begin_checkpoint()?;
        }
        // 3
        let cut_at = self.look(wire, &mut rounds, position, landing, limits)?;
        // 4
        self.refuse_doubts()?;
        let Some(capturing) = &mut self.capturing else { return Err(Fault::internal("the stream", "it has ended")) };
        let parts = capturing.stream.gathered() as u64;
        let quiet = parts == 0 && !rounds.open;
        if quiet && !self.owes_a_receipt()? {
            self.nothing_changed(wire, tip.0, cut_at)?;
            self.check_step()?;
            return Ok(tip);
        }
        match quiet {
            // It carries nothing: no lag ends with it.
            true => self.woken = cut_at,
            false => self.capturing.iter_mut().for_each(|capturing| capturing.written = Instant::now()),
        }
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
        self.capturing.iter_mut().for_each(|capturing| capturing.flipped = false);
        // 7
        self.check_step()?;
        if self.agent.settings.mode == Mode::Interval {
            self.stop_capturing();
        }
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
        let watch = match Watch::start(stream.capture().fd()) {
            Ok(watch) => watch,
            Err(fault) => {
                // Or the programs would go on copying for nobody until the next start.
                stream.close(self.agent.tracker_cell()?)?;
                return Err(fault);
            }
        };
        let now = Instant::now();
        self.capturing = Some(Capturing { stream, watch, written: now, flipped: true });
        let tracker = self.agent.tracker()?;
        // In interval mode each cut begins with a flip; now and then one of them is a checkpoint.
        let scrubs =
            self.agent.settings.mode == Mode::Interval && self.checkpointed.elapsed() >= self.agent.settings.checkpoint_interval;
        for (checks, volume) in self.checks.iter_mut().zip(&self.spec.volumes) {
            let taken = tracker.taken(volume.id)?;
            match scrubs {
                true => checks.begin(&taken),
                false => checks.took(&taken),
            }
        }
        drop(tracker);
        if scrubs {
            self.checkpointed = now;
            self.group.with_live(|live| live.counters.checkpoints += 1);
        }
        Ok(())
    }

    /// Whether there are bits that only a receipt can let go although everything that they stand for was shipped: a group that rests
    /// would carry them for ever, read it all again when it wakes without its ring, and never look clean. A generation
    /// without any block brings that receipt.
    fn owes_a_receipt(&mut self) -> Res<bool> {
        let Some(capturing) = &mut self.capturing else { return Ok(false) };
        if !capturing.flipped {
            return Ok(false);
        }
        let tracker = self.agent.tracker()?;
        for volume in &self.spec.volumes {
            if tracker.dirty_blocks(volume.id)? > tracker.active_blocks(volume.id)? {
                return Ok(true);
            }
        }
        capturing.flipped = false;
        Ok(false)
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
            let counted: Vec<_> = (0..spec.volumes.len()).map(|index| capturing.stream.volume_counts(index)).collect();
            let step = capturing.stream.look(agent.tracker_cell()?, &sources, engine.as_mut(), limits)?;
            let after = capturing.stream.counts();
            let each: Vec<_> = (0..self.spec.volumes.len()).map(|index| capturing.stream.volume_counts(index)).collect();
            let each = each.into_iter().zip(counted);
            self.group.with_live(|live| {
                for (volume, (after, before)) in live.volumes.iter_mut().zip(each) {
                    volume.captured_bytes += after.captured_bytes - before.captured_bytes;
                    volume.holes += after.holes - before.holes;
                    volume.reread_bytes += after.reread_bytes - before.reread_bytes;
                }
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
                    // The look has flipped the bitmap: what an earlier generation captured since the last checkpoint is taken now, and goes
                    // with this receipt. The next checkpoint will not see it, so it is noted here as written.
                    let tracker = self.agent.tracker()?;
                    for (checks, volume) in self.checks.iter_mut().zip(&self.spec.volumes) {
                        checks.took(&tracker.taken(volume.id)?);
                    }
                    drop(tracker);
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
        let kept = self.agent.settings.checkpoint_interval * RING_KEPT_CHECKPOINTS;
        let compared = self.checks.iter().all(|checks| checks.written.is_empty());
        let long = compared && self.capturing.as_ref().is_some_and(|c| c.written.elapsed() > kept);
        let mode = self.agent.settings.mode;
        // The bitmap goes on without the ring. What was taken and is held goes with the next receipt, as always.
        if long || mode == Mode::Interval {
            tracing::debug!(group = %self.group.name, "the ring's memory is given back");
            self.checks.iter_mut().for_each(Checks::give_back);
            self.stop_capturing();
        }
        Ok(())
    }

    /// Flips the bitmap and remembers what was taken, to be compared.
    fn begin_checkpoint(&mut self) -> Res<()> {
        let Some(capturing) = &mut self.capturing else { return Ok(()) };
        self.checkpointed = Instant::now();
        capturing.stream.flip(self.agent.tracker_cell()?)?;
        capturing.flipped = true;
        let tracker = self.agent.tracker()?;
        for (checks, volume) in self.checks.iter_mut().zip(&self.spec.volumes) {
            checks.begin(&tracker.taken(volume.id)?);
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
        let mut turns = 2 * self.spec.volumes.len() as u64;
        for index in 0..self.spec.volumes.len() {
            for written in [true, false] {
                let Primary { capturing: Some(capturing), spec, agent, volumes, engine, known, checks, .. } = self else {
                    return Ok(());
                };
                let (id, blocks) = (spec.volumes[index].id, spec.volumes[index].blocks());
                // To each its share, so that a busy volume does not keep the others from ever being looked at; what one leaves over
                // goes to the next.
                let mut step = checks[index].step(written, (budget / turns).max(1));
                budget -= step.count().min(budget);
                turns -= 1;
                if step.is_empty() {
                    continue;
                }
                let written = written || checks[index].first_round;
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
            if !written {
                tracing::error!(volume = %volume.name, block, blocks, "check: blocks that nobody had written differ from what was shipped");
            }
        }
        if written && let Some(BlockRun { start: first, .. }) = differ.runs(1).next() {
            // Legal, and with a program that writes through a mapping all the time: one line for all.
            let blocks = differ.count();
            tracing::info!(volume = %volume.name, first, blocks, "check: written blocks differ from what was shipped, they are shipped again");
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

#[cfg(test)]
mod tests {
    use super::*;

    fn set(blocks: u64, runs: &[(u64, u64)]) -> BlockSet {
        let mut set = BlockSet::empty(blocks);
        runs.iter().for_each(|(start, count)| set.insert(BlockRun { start: *start, count: *count }));
        set
    }

    #[test]
    fn the_scrub_goes_round_and_leaves_nothing_out_however_short_the_checkpoints_are() {
        let blocks = 2 * SCRUB_BLOCKS + 100;
        let (mut checks, mut seen) = (Checks::new(blocks), BlockSet::empty(blocks));
        let mut rounds = 0;
        while checks.first_round {
            checks.begin(&set(blocks, &[]));
            // Far less is compared between two checkpoints than a window holds.
            seen.union(&checks.step(false, 1000));
            rounds += 1;
            assert!(rounds < 100, "it never comes round");
        }
        assert_eq!(seen.count(), blocks);
    }

    #[test]
    fn what_was_written_is_never_compared_as_if_nobody_had_written_it() {
        let mut checks = Checks::new(1000);
        checks.begin(&set(1000, &[(5, 2)]));
        assert_eq!(checks.step(false, 10), set(1000, &[(0, 5), (7, 5)]));
        // Written while its window waits, found by a checkpoint or by a new beginning of capture.
        checks.begin(&set(1000, &[(20, 1)]));
        checks.took(&set(1000, &[(13, 1)]));
        assert_eq!(checks.step(false, 10), set(1000, &[(12, 1), (14, 6), (21, 3)]));
        // It stays "written" until it was compared as that.
        assert_eq!(checks.step(true, 3), set(1000, &[(5, 2), (13, 1)]));
        assert_eq!(checks.step(true, 3), set(1000, &[(20, 1)]));
        assert_eq!(checks.step(true, 3).count(), 0);
    }

    #[test]
    fn a_busy_beginning_does_not_keep_the_end_waiting() {
        let mut checks = Checks::new(1000);
        checks.took(&set(1000, &[(0, 100), (900, 1)]));
        for _ in 0..11 {
            checks.step(true, 10);
            checks.took(&set(1000, &[(0, 100)]));
        }
        assert_eq!(checks.written, set(1000, &[(0, 100)]), "block 900 was compared in its turn");
        checks.step(true, 1000);
        assert!(checks.step(true, 1000).count() == 0 && checks.written.is_empty());
    }
}
