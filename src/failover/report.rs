//! What a failover did, for people, for the ledger and for whoever audits it.

use crate::model::{Exit, Moment, Position};
use crate::role::{Fencing, Step};
use serde::{Deserialize, Serialize};

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It was done.
    Changed,
    /// There was nothing to do.
    AlreadySo,
    /// It failed; `detail` says why.
    Failed,
    /// It was left out because of an earlier failure, named in `detail`.
    LeftOut,
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Outcome::Changed => "changed",
            Outcome::AlreadySo => "already so",
            Outcome::Failed => "failed",
            Outcome::LeftOut => "left out",
        })
    }
}

/// One step that was carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepReport {
    /// The step.
    #[serde(flatten)]
    pub step: Step,
    /// How it ended.
    pub outcome: Outcome,
    /// What there is to say about it, without secrets; empty for nothing.
    pub detail: String,
    /// How long it took, in milliseconds. Steps of one kind for several volumes or containers may have run side by side.
    pub ms: u64,
}

/// A whole failover.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The group's name.
    pub group: String,
    /// The epoch in which this host serves now.
    pub epoch: u64,
    /// What the volumes held when the containers started.
    pub position: Position,
    /// The instant of the old primary's that they held; 0 = unknown.
    pub recoverable_to: Moment,
    /// What was known about the old primary.
    pub fencing: Fencing,
    /// When it began.
    pub started_at: Moment,
    /// From the beginning to the last container's health, in milliseconds.
    pub rto_ms: u64,
    /// Every step, in order.
    pub steps: Vec<StepReport>,
    /// What does not serve, each with its cause. Empty: everything does.
    pub degraded: Vec<String>,
}

impl Report {
    /// How the command ends.
    pub fn exit(&self) -> Exit {
        if self.degraded.is_empty() { Exit::Done } else { Exit::Degraded }
    }
    /// Whether anything was changed.
    pub fn changed(&self) -> bool {
        self.steps.iter().any(|step| step.outcome == Outcome::Changed)
    }
}
