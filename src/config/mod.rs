//! Owns the text of the configuration: keys, units, defaults and limits in one place.
//! Gives validated settings or one sentence that says what is wrong and where.
//! Keeps unknown keys, wrong units and values out of range out.
//! Never opens a file (its caller reads it), never looks at the host.
//! Assumes nothing.
#![forbid(unsafe_code)]
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod keys;
mod units;

pub use keys::parse;
pub use units::{parse_duration, parse_size};

use crate::model::EngineKind;
use std::path::PathBuf;
use std::time::Duration;

/// How a primary makes generations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// From captured writes, as they come.
    Continuous,
    /// One cut every `interval`; capture runs during a cut only.
    Interval,
    /// One cut every `interval`, with the file systems frozen: the fallback of hosts that cannot capture, by choice.
    Freeze,
}

/// The settings of one host.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// `host`: this host's name.
    pub host: String,
    /// `state_dir`, default /var/lib/doublure.
    pub state_dir: PathBuf,
    /// `volume_dir`, default `<state_dir>/volumes`: where the images of volumes and replicas live.
    pub volume_dir: PathBuf,
    /// `run_dir`, default /run/doublure: the control socket and the device links.
    pub run_dir: PathBuf,
    /// `pin_dir`, default /sys/fs/bpf/doublure.
    pub pin_dir: PathBuf,
    /// `listen`, `address:port`; no default: without it nothing listens.
    pub listen: Option<String>,
    /// `docker_socket`, default /run/docker.sock.
    pub docker_socket: PathBuf,
    /// `mode`, default continuous: whether captured writes are shipped as they come, or a cut is made every `interval`.
    pub mode: Mode,
    /// `interval`, default 100 ms in continuous mode and 1 s in interval mode, 50 ms to 1 h: between the beginnings of two cuts.
    pub interval: Duration,
    /// `checkpoint_interval`, default 60 s, 1 s to 1 h: how often, in continuous mode, what was shipped is compared with the volumes.
    pub checkpoint_interval: Duration,
    /// `capture_ring`, default "64 MiB", 1 MiB to 1 GiB, rounded up to a power of two: kernel memory for captured writes, for each
    /// group that is being written.
    pub capture_ring_bytes: u64,
    /// `freeze_deadline`, default 2 s, 100 ms to 10 s.
    pub freeze_deadline: Duration,
    /// `cut_max`, default "32 MiB", 1 to 256 MiB: the set is made at most this large by rounds before a freeze.
    pub cut_max_bytes: u64,
    /// `journal`, default "1 GiB", at least 16 MiB.
    pub journal_bytes: u64,
    /// `bandwidth`, default none, bytes a second, at least 64 KiB.
    pub bandwidth_bytes_per_second: Option<u64>,
    /// `io_engine`, default auto.
    pub io_engine: EngineKind,
    /// `queue_depth`, default 32, 1 to 256.
    pub queue_depth: usize,
    /// `credit`, default "16 MiB", 1 to 256 MiB: payload in flight that this host grants as a standby.
    pub credit_bytes: u64,
    /// `health_timeout`, default 60 s, 1 s to 1 h.
    pub health_timeout: Duration,
}

#[cfg(test)]
mod tests;
