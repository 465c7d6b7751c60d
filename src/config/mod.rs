//! Owns the text of the configuration: keys, units, defaults and limits in one place.
//! Gives validated settings or one sentence that says what is wrong and where.
//! Keeps unknown keys, wrong units and values out of range out.
//! Never opens a file (its caller reads it), never looks at the host.
//! Assumes nothing.
#![forbid(unsafe_code)]
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::model::{EngineKind, Res};
use std::path::PathBuf;
use std::time::Duration;

/// The settings of one host.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// `host`: this host's name.
    pub host: String,
    /// `state_dir`, default /var/lib/doublure.
    pub state_dir: PathBuf,
    /// `run_dir`, default /run/doublure: the control socket and the device links.
    pub run_dir: PathBuf,
    /// `pin_dir`, default /sys/fs/bpf/doublure.
    pub pin_dir: PathBuf,
    /// `listen`, `address:port`; no default: without it nothing listens.
    pub listen: Option<String>,
    /// `docker_socket`, default /run/docker.sock.
    pub docker_socket: PathBuf,
    /// `interval`, default 1 s: between the beginnings of two cuts.
    pub interval: Duration,
    /// `freeze_deadline`, default 2 s, at most 10 s.
    pub freeze_deadline: Duration,
    /// `cut_max`, default "32 MiB": the set is made at most this large by rounds before a freeze.
    pub cut_max_bytes: u64,
    /// `journal`, default "1 GiB", at least 16 MiB.
    pub journal_bytes: u64,
    /// `bandwidth`, default none, bytes a second.
    pub bandwidth_bytes_per_second: Option<u64>,
    /// `io_engine`, default auto.
    pub io_engine: EngineKind,
    /// `queue_depth`, default 32, 1 to 256.
    pub queue_depth: usize,
    /// `credit`, default "16 MiB": payload in flight that this host grants as a standby.
    pub credit_bytes: u64,
    /// `health_timeout`, default 60 s.
    pub health_timeout: Duration,
}

/// Parses the text of a configuration file; `name` is shown in errors. `CONFIG_INVALID` with line and key.
pub fn parse(_text: &str, _name: &str) -> Res<Settings> { todo!() }
/// Parses a size such as `2G`, `512 MiB`, `1048576`. Binary units; `BAD_ARGUMENT` otherwise.
pub fn parse_size(_text: &str) -> Res<u64> { todo!() }
