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
    /// `interval`, default 1 s, 100 ms to 1 h: between the beginnings of two cuts.
    pub interval: Duration,
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
