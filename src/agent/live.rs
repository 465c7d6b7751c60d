//! What `status` shows of a group: facts that the group's threads keep up to date, never guessed.

use crate::model::{Code, Fault, Moment, Position};
use serde_json::{Value, json};

/// The last measurements of one kind, for percentiles. Bounded: the newest replace the oldest.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    values_us: Vec<u64>,
    next: usize,
}

const SAMPLES_MAX: usize = 4096;

impl Samples {
    /// Adds one.
    pub fn add(&mut self, took: std::time::Duration) {
        let value = took.as_micros() as u64;
        match self.values_us.len() < SAMPLES_MAX {
            true => self.values_us.push(value),
            false => self.values_us[self.next % SAMPLES_MAX] = value,
        }
        self.next += 1;
    }
    /// The given percentile (0 to 100) in milliseconds; `null` without a sample.
    pub fn percentile_ms(&self, percent: f64) -> Value {
        let mut sorted = self.values_us.clone();
        sorted.sort_unstable();
        match sorted.len() {
            0 => Value::Null,
            n => json!(sorted[((n - 1) as f64 * percent / 100.0).round() as usize] as f64 / 1000.0),
        }
    }
}

/// Counters since the agent began; bytes unless named otherwise.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Generations committed (primary) or received and committed (standby).
    pub generations: u64,
    /// Full cycles and how long they took, from the beginning of the cut to the receipt.
    pub cycles: Samples,
    /// How long file systems were frozen.
    pub freezes: Samples,
    /// Changed blocks taken by cuts and rounds.
    pub bytes_changed: u64,
    /// Read from volumes.
    pub bytes_read: u64,
    /// Payload sent (primary) or received (standby).
    pub bytes_sent: u64,
    /// Written to journal and replica.
    pub bytes_written: u64,
    /// Full comparisons begun.
    pub comparisons: u64,
    /// Blocks found different where none should be, by `verify`.
    pub mismatched_blocks: u64,
    /// Cuts that were discarded.
    pub cuts_discarded: u64,
    /// Data of writes copied as they completed.
    pub bytes_captured: u64,
    /// Ranges that changed and were read because their data was not captured.
    pub holes: u64,
    /// Looks at which something had gone by without a record; it was read.
    pub capture_missed: u64,
    /// Rounds shipped before a cut because there was too much to read at once.
    pub rounds: u64,
    /// Checkpoints begun.
    pub checkpoints: u64,
    /// Blocks compared with what was shipped.
    pub checked_blocks: u64,
    /// Written blocks that differed from what was shipped, and were shipped again (pages that changed while they were written).
    pub repaired_blocks: u64,
    /// How old the standby's copy had become each time that it became newer: the peaks of the RPO.
    pub lags: Samples,
}

impl Counters {
    /// As JSON.
    pub fn json(&self) -> Value {
        json!({
            "generations": self.generations,
            "cycle_p50_ms": self.cycles.percentile_ms(50.0), "cycle_p99_ms": self.cycles.percentile_ms(99.0),
            "freeze_p50_ms": self.freezes.percentile_ms(50.0), "freeze_p99_ms": self.freezes.percentile_ms(99.0),
            "freeze_max_ms": self.freezes.percentile_ms(100.0),
            "bytes_changed": self.bytes_changed, "bytes_read": self.bytes_read,
            "bytes_sent": self.bytes_sent, "bytes_written": self.bytes_written,
            "comparisons": self.comparisons, "mismatched_blocks": self.mismatched_blocks,
            "cuts_discarded": self.cuts_discarded,
            "bytes_captured": self.bytes_captured, "holes": self.holes, "capture_missed": self.capture_missed,
            "rounds": self.rounds, "checkpoints": self.checkpoints, "checked_blocks": self.checked_blocks,
            "repaired_blocks": self.repaired_blocks,
            "lag_p50_ms": self.lags.percentile_ms(50.0), "lag_p99_ms": self.lags.percentile_ms(99.0),
            "lag_max_ms": self.lags.percentile_ms(100.0),
        })
    }
}

/// One volume.
#[derive(Clone, Debug, Default)]
pub struct LiveVolume {
    /// Its device here, empty = not attached.
    pub device: String,
    /// Changed and not yet acknowledged, in bytes; `None` = unknown.
    pub dirty_bytes: Option<u64>,
    /// `bitmap`, or why there is none.
    pub tracker: String,
    /// How it is cut: `capture`, `freeze`, `unmounted`.
    pub cut: String,
    /// Why not from captured writes; `None` where it is.
    pub cut_reason: Option<String>,
    /// Data of its writes copied as they completed, in bytes since the agent began.
    pub captured_bytes: u64,
    /// Its ranges that changed and were read because their data was not captured.
    pub holes: u64,
    /// What was read of it for these, in bytes.
    pub reread_bytes: u64,
}

/// How far a long step is.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// What is going on.
    pub what: String,
    /// Bytes done.
    pub done: u64,
    /// Bytes in all, as far as known.
    pub total: u64,
}

/// The live facts of a group.
#[derive(Clone, Debug, Default)]
pub struct Live {
    /// What the group is doing, in words.
    pub state: String,
    /// `continuous` or `interval` once replication runs.
    pub mode: String,
    /// Whether the peer is connected.
    pub connected: bool,
    /// Whether the standby holds every change up to the last cycle.
    pub in_sync: bool,
    /// The last position that the standby holds.
    pub position: Position,
    /// The last position that is on the replica itself (standby only); what lies between is in the journal.
    pub applied: Position,
    /// When the cut of `position` began (or a later instant at which nothing had changed since); 0 = unknown.
    pub recoverable_to: Moment,
    /// Volumes in the order of the group.
    pub volumes: Vec<LiveVolume>,
    /// How far first sync, comparison or verification is.
    pub progress: Option<Progress>,
    /// Standing faults, newest last, at most one a code.
    pub faults: Vec<Fault>,
    /// Images that the standby has proven to hold (config digests).
    pub images_there: Vec<String>,
    /// Counters.
    pub counters: Counters,
    /// The engine in use.
    pub engine: String,
}

impl Live {
    /// Records a standing fault, replacing the last of its code.
    pub fn fault(&mut self, fault: Fault) {
        self.clear(fault.code);
        self.faults.push(fault);
    }
    /// The standby's copy is good up to `at` now. Where it became newer by a generation, the age that it had reached is a sample of the
    /// lag: counted from what it was good for before, or from `woken`, the first write after a rest, if that is later.
    pub fn recoverable(&mut self, at: Moment, now: Moment, generation: Option<Moment>) {
        if let Some(woken) = generation.filter(|_| self.recoverable_to != Moment(0)) {
            let since = now.0.saturating_sub(self.recoverable_to.0.max(woken.0));
            self.counters.lags.add(std::time::Duration::from_millis(since));
        }
        self.recoverable_to = at;
    }
    /// A fault of this code stands no longer.
    pub fn clear(&mut self, code: Code) {
        self.faults.retain(|f| f.code != code);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn percentiles_come_from_the_newest_samples() {
        let mut samples = Samples::default();
        assert_eq!(samples.percentile_ms(50.0), Value::Null);
        for ms in 1..=100 {
            samples.add(Duration::from_millis(ms));
        }
        assert_eq!(samples.percentile_ms(0.0), json!(1.0));
        assert_eq!(samples.percentile_ms(100.0), json!(100.0));
        for _ in 0..SAMPLES_MAX {
            samples.add(Duration::from_millis(7));
        }
        assert_eq!(samples.percentile_ms(100.0), json!(7.0));
    }

    #[test]
    fn the_lag_is_the_age_that_the_copy_had_reached() {
        let mut live = Live::default();
        live.recoverable(Moment(1_000), Moment(1_050), Some(Moment(0)));
        assert_eq!(live.counters.lags.percentile_ms(100.0), Value::Null, "before the first copy there is no lag");
        live.recoverable(Moment(1_100), Moment(1_180), Some(Moment(0)));
        assert_eq!(live.counters.lags.percentile_ms(100.0), json!(180.0));
        live.recoverable(Moment(5_000), Moment(5_001), None);
        assert_eq!(live.counters.lags.percentile_ms(100.0), json!(180.0), "where nothing was written nothing lags");
        live.recoverable(Moment(9_950), Moment(9_990), Some(Moment(9_900)));
        assert_eq!(live.counters.lags.percentile_ms(0.0), json!(90.0), "a rest is no lag");
    }

    #[test]
    fn one_standing_fault_a_code() {
        let mut live = Live::default();
        live.fault(Fault::new(Code::PeerUnreachable, "a", "b", "c"));
        live.fault(Fault::new(Code::PeerUnreachable, "a", "later", "c"));
        assert_eq!(live.faults.len(), 1);
        live.clear(Code::PeerUnreachable);
        assert!(live.faults.is_empty());
    }
}
