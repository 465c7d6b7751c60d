//! Owns the small durable record of a group on this host: role, epoch, positions, the pinned inventory.
//! Gives the last edit that was committed, whole.
//! Keeps every change begin -> edit -> commit: two slots written in turn, the newest valid one counts.
//! Never decides what may be written into it.
//! Assumes the notes headed F in `kernel-notes.md`.

use crate::durable::Storage;
use crate::model::{Digest, GroupSpec, Moment, Position, Res, Role};
use serde::{Deserialize, Serialize};

/// Everything that the ledger holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// What this host is to the group.
    pub role: Role,
    /// The highest epoch ever made durable here.
    pub epoch: u64,
    /// The group.
    pub spec: GroupSpec,
    /// The peer's name.
    pub peer: String,
    /// Standby: last committed position known to the ledger (the journal may be further); primary: last acknowledged.
    pub committed: Position,
    /// Its digest.
    pub committed_digest: Digest,
    /// When the cut of `committed` began.
    pub committed_cut_at: Moment,
    /// Standby: everything up to here is on the replica.
    pub applied: Position,
    /// Digest of `applied`.
    pub applied_digest: Digest,
    /// When the cut of `applied` began.
    pub applied_cut_at: Moment,
    /// Standby: a direct first sync has begun and not ended: the replica is not promotable.
    pub syncing: bool,
    /// Images that were proven here: config digest -> local image id.
    pub images: std::collections::BTreeMap<String, String>,
    /// The last failover's report, as `failover` made it.
    #[serde(default)]
    pub last_failover: Option<serde_json::Value>,
}

/// The ledger of one group on this host.
pub struct Ledger { _p: () }

/// Largest encoded record, in bytes; a slot is this large.
pub const SLOT_BYTES: u64 = 1 << 20;

impl Ledger {
    /// Opens it: `None` when neither slot was ever written; `CORRUPT` when slots were written and none is valid.
    pub fn open(_storage: Box<dyn Storage>) -> Res<(Ledger, Option<Record>)> { todo!() }
    /// The committed record. Panics (INTERNAL) never: `None` before the first commit.
    pub fn record(&self) -> Option<&Record> { todo!() }
    /// Edits a copy and commits it durably; on an error the old record still counts and the ledger is poisoned if a flush failed.
    pub fn commit(&mut self, _edit: &mut dyn FnMut(&mut Option<Record>) -> Res<()>) -> Res<&Record> { todo!() }
}
