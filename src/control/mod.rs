//! Owns the operator's door: a local socket, requests and replies as lines of JSON, who may knock.
//! Gives each request to the agent's handler and streams its events back.
//! Keeps everybody but root out (peer credentials) and each line bounded.
//! Never decides anything about a group.
//! Assumes nothing.

mod client;
mod line;
mod moment;
mod server;

pub use client::call;
pub use moment::{from_rfc3339, rfc3339};
pub use server::{Server, serve};

use crate::model::{Exit, Fault, FileSystem, Res};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Version of this conversation; it stands in every line, both ways. It grows whenever a word changes its meaning.
pub const VERSION: u32 = 1;
/// Longest request line, in bytes, its end included.
pub const REQUEST_MAX_BYTES: usize = 1 << 20;
/// Longest reply line, in bytes: a status of many volumes is longer than any request.
pub const REPLY_MAX_BYTES: usize = 16 << 20;

/// Where the control socket of an agent with this `run_dir` is.
pub fn socket_in(run_dir: &Path) -> PathBuf {
    run_dir.join("control.sock")
}

/// What an operator asks. One per connection, one line of JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case")]
pub enum Request {
    /// The status value of design.md section 5.
    Status,
    /// Makes a loop file with a file system and a Docker volume on it.
    VolumeCreate {
        /// Its name, in Docker too.
        name: String,
        /// Its size in bytes.
        size_bytes: u64,
        /// Its file system.
        fs: FileSystem,
        /// Mount options, with commas; empty for none.
        mount_options: String,
    },
    /// All volumes of this host.
    VolumeList,
    /// Removes a volume that no group and no container uses.
    VolumeRemove {
        /// Its name.
        name: String,
        /// Must repeat the name: its data goes.
        confirm: Option<String>,
    },
    /// Makes a group of containers and volumes, replicated to a paired peer.
    Protect {
        /// Its name.
        group: String,
        /// The peer; may be left out when one only is paired.
        peer: Option<String>,
        /// Its containers.
        containers: Vec<String>,
        /// Volumes besides those of its containers.
        volumes: Vec<String>,
    },
    /// Asks for a cut now.
    Sync {
        /// The group.
        group: String,
        /// Until the standby has committed it.
        wait: bool,
    },
    /// Promotes this host for the group.
    Failover {
        /// The group.
        group: String,
        /// Gives the plan and changes nothing.
        dry_run: bool,
        /// Goes on although the old primary could not be asked or still serves.
        force: bool,
    },
    /// Compares both sides block by block, online.
    Verify {
        /// The group.
        group: String,
    },
    /// Opens a pairing window and gives the code.
    PairOpen,
    /// Pairs with a host whose window is open.
    Pair {
        /// Where it listens, `address:port`.
        address: String,
        /// The code; it comes on the operator's standard input, never in argv.
        code: Secret,
    },
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
    /// How far it is.
    Progress {
        /// Of what, in words: one bar for each.
        what: String,
        /// So much is done.
        done: u64,
        /// Of so much, 0 = unknown.
        total: u64,
        /// `bytes` or `blocks`.
        unit: String,
    },
    /// One step, for people and for logs.
    Step {
        /// What it does, in words.
        name: String,
        /// `changed`, `already so`, `would change` or `failed`.
        outcome: String,
        /// More words, or none.
        detail: String,
        /// How long it took, in milliseconds.
        ms: u64,
    },
    /// The end: the result.
    Done {
        /// What the verb gives.
        value: serde_json::Value,
        /// How the command ends.
        exit: Exit,
    },
    /// The end: a fault.
    Failed {
        /// It.
        fault: Fault,
    },
}

/// Where a handler puts its events (never `Done` or `Failed`, which its return value becomes).
pub type Sink<'a> = &'a mut dyn FnMut(Event);
/// The agent's handler; called on a thread of its own.
pub type Handler = Arc<dyn Fn(Request, Sink<'_>) -> Res<(serde_json::Value, Exit)> + Send + Sync>;

/// One line of the conversation: the version, then the words.
#[derive(Serialize)]
struct Versioned<'a, T> {
    version: u32,
    #[serde(flatten)]
    words: &'a T,
}

/// Why a line could not be understood.
#[derive(Debug, PartialEq)]
enum Unclear {
    /// The other side's version, 0 when it gave none that could be read.
    Version(u64),
    /// Not what the conversation allows.
    Words(String),
}

/// One line of JSON with its newline.
fn to_line<T: Serialize>(words: &T) -> Res<Vec<u8>> {
    let mut line = serde_json::to_vec(&Versioned { version: VERSION, words })
        .map_err(|e| Fault::internal("a line of the control socket", e.to_string()))?;
    line.push(b'\n');
    Ok(line)
}

/// The words of one line. The version is looked at first, so that another version's words are never guessed at.
fn from_line<T: serde::de::DeserializeOwned>(line: &[u8]) -> Result<T, Unclear> {
    let mut value: serde_json::Value = serde_json::from_slice(line).map_err(|e| Unclear::Words(e.to_string()))?;
    let Some(object) = value.as_object_mut() else {
        return Err(Unclear::Words("it is not an object".into()));
    };
    match object.remove("version").map(|v| v.as_u64().unwrap_or(0)) {
        Some(version) if version == u64::from(VERSION) => {}
        other => return Err(Unclear::Version(other.unwrap_or(0))),
    }
    serde_json::from_value(value).map_err(|e| Unclear::Words(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Code;

    #[test]
    fn every_request_survives_its_line() {
        let all = [
            Request::Status,
            Request::VolumeCreate {
                name: "a".into(),
                size_bytes: u64::MAX,
                fs: FileSystem::Xfs,
                mount_options: "noatime".into(),
            },
            Request::VolumeList,
            Request::VolumeRemove { name: "a".into(), confirm: None },
            Request::Protect { group: "g".into(), peer: Some("b".into()), containers: vec!["c".into()], volumes: vec![] },
            Request::Sync { group: "g".into(), wait: true },
            Request::Failover { group: "g".into(), dry_run: true, force: false },
            Request::Verify { group: "g".into() },
            Request::PairOpen,
            Request::Pair { address: "10.0.0.1:7400".into(), code: Secret("1234".into()) },
            Request::Doctor,
        ];
        for request in all {
            let line = to_line(&request).unwrap();
            assert_eq!(line.iter().filter(|b| **b == b'\n').count(), 1);
            assert_eq!(from_line::<Request>(&line), Ok(request));
        }
    }

    #[test]
    fn every_event_survives_its_line() {
        let fault = Fault::new(Code::GroupBusy, "group g", "a sync\nruns", "wait");
        let all = [
            Event::Progress { what: "pgdata".into(), done: 1, total: u64::MAX, unit: "bytes".into() },
            Event::Step { name: "a".into(), outcome: "changed".into(), detail: String::new(), ms: 3 },
            Event::Done { value: serde_json::json!({"version": 9, "event": "x", "deep": [1, null]}), exit: Exit::Degraded },
            Event::Failed { fault },
        ];
        for event in all {
            assert_eq!(from_line::<Event>(&to_line(&event).unwrap()), Ok(event));
        }
    }

    #[test]
    fn another_version_is_told_apart_from_nonsense() {
        assert_eq!(from_line::<Request>(br#"{"version":2,"verb":"from the future"}"#), Err(Unclear::Version(2)));
        assert_eq!(from_line::<Request>(br#"{"verb":"status"}"#), Err(Unclear::Version(0)));
        assert_eq!(from_line::<Request>(br#"{"version":"1","verb":"status"}"#), Err(Unclear::Version(0)));
        for nonsense in ["", "\0\0", "[]", "7", "{", r#"{"version":1}"#, r#"{"version":1,"verb":"sing"}"#, &"[".repeat(100_000)] {
            assert!(matches!(from_line::<Request>(nonsense.as_bytes()), Err(Unclear::Words(_))), "{nonsense:.40}");
        }
    }

    #[test]
    fn a_secret_is_not_shown_by_debug() {
        let shown = format!("{:?}", Request::Pair { address: "a:1".into(), code: Secret("hush".into()) });
        assert!(!shown.contains("hush"), "{shown}");
    }
}
