//! Owns the operator's door: a local socket, requests and replies as lines of JSON, who may knock.
//! Gives each request to the agent's handler and streams its events back.
//! Keeps everybody but root out (peer credentials) and each line bounded.
//! Never decides anything about a group.
//! Assumes nothing.

use crate::model::{Exit, Fault, FileSystem, Res};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;

/// What an operator asks. One per connection, one line of JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case")]
pub enum Request {
    /// The status value of design.md section 5.
    Status,
    /// Makes a loop file with a file system and a Docker volume on it.
    VolumeCreate { name: String, size_bytes: u64, fs: FileSystem, mount_options: String },
    /// All volumes of this host.
    VolumeList,
    /// Removes a volume that no group and no container uses. `confirm` must repeat the name: its data goes.
    VolumeRemove { name: String, confirm: Option<String> },
    /// Makes a group of containers and volumes, replicated to a paired peer.
    Protect { group: String, peer: Option<String>, containers: Vec<String>, volumes: Vec<String> },
    /// Asks for a cut now; with `wait`, until the standby has committed it.
    Sync { group: String, wait: bool },
    /// Promotes this host for the group.
    Failover { group: String, dry_run: bool, force: bool },
    /// Compares both sides block by block, online.
    Verify { group: String },
    /// Opens a pairing window and gives the code.
    PairOpen,
    /// Pairs with a host whose window is open. The code comes on the operator's standard input, never in argv.
    Pair { address: String, code: Secret },
    /// What this host can and cannot do.
    Doctor,
}

/// A text that `Debug` does not show.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

/// What comes back, one line of JSON each; the last is `Done` or `Failed`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// How far it is; `unit` is `bytes` or `blocks`.
    Progress { what: String, done: u64, total: u64, unit: String },
    /// One step, for people and for logs: `outcome` is `changed`, `already so`, `would change` or `failed`.
    Step { name: String, outcome: String, detail: String, ms: u64 },
    /// The end: the result value and the exit code.
    Done { value: serde_json::Value, exit: Exit },
    /// The end: a fault.
    Failed { fault: Fault },
}

/// Where a handler puts its events (never `Done` or `Failed`, which its return value becomes).
pub type Sink<'a> = &'a mut dyn FnMut(Event);
/// The agent's handler; called on a thread of its own.
pub type Handler = Arc<dyn Fn(Request, Sink<'_>) -> Res<(serde_json::Value, Exit)> + Send + Sync>;

/// Serves requests on `socket` (0600, directory 0700) until the process ends.
pub fn serve(_socket: &Path, _handler: Handler) -> Res<()> { todo!() }
/// Sends one request and hands every event to `on_event`; gives the last. `NO_AGENT` when nothing answers.
pub fn call(_socket: &Path, _request: &Request, _on_event: &mut dyn FnMut(&Event)) -> Res<Event> { todo!() }
