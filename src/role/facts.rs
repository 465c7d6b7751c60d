//! What must be known before anybody may promote.

use crate::model::{Moment, Position, Role};
use serde::{Deserialize, Serialize};

/// What the peer said when it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Peer {
    /// It answered.
    Alive {
        /// What it is to the group.
        role: Role,
        /// The highest epoch that it knows.
        epoch: u64,
    },
    /// It was asked and did not answer.
    Unreachable,
    /// Nobody asked it.
    NotAsked,
}

/// One container of the group, as this host has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerFact {
    /// Its name.
    pub name: String,
    /// It runs here.
    pub running: bool,
    /// Its pinned image is here, proven.
    pub image_present: bool,
}

/// Facts about a group on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// The group's name.
    pub group: String,
    /// What this host is to it.
    pub role: Role,
    /// The highest epoch made durable here.
    pub epoch: u64,
    /// The last committed position: the journal's last sealed generation, else the ledger's.
    pub committed: Position,
    /// When the cut of `committed` began.
    pub committed_cut_at: Moment,
    /// Everything up to here is on the replica.
    pub applied: Position,
    /// Sealed generations that are not on the replica yet.
    pub unapplied: u64,
    /// A generation is open in the journal, without its commit.
    pub uncommitted: bool,
    /// A direct first sync has begun and not ended.
    pub syncing: bool,
    /// This host became primary by a failover: what runs here was made from recipes.
    pub promoted_here: bool,
    /// Names of the volumes, in the order of the group.
    pub volumes: Vec<String>,
    /// The containers, in the order in which they start.
    pub containers: Vec<ContainerFact>,
    /// The peer.
    pub peer: Peer,
    /// The operator said `--force`.
    pub force: bool,
}
