//! The plan of a failover: its rules, its steps, its printed form.

use crate::model::{Code, Fault, Moment, Position, Res, Role};
use crate::role::facts::{Facts, Peer};
use serde::{Deserialize, Serialize};

/// One step. Each can be repeated, and says then that it was so already.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum Step {
    /// Makes the higher epoch durable: from here on the old primary is refused.
    Fence {
        /// The new epoch.
        epoch: u64,
    },
    /// Writes what is committed and not on the replica yet.
    FinishApply {
        /// Generations.
        count: u64,
    },
    /// Drops what arrived and was never committed.
    DropUncommitted,
    /// Attaches a replica writable.
    Attach {
        /// The volume.
        volume: String,
    },
    /// Replays the journal of the file system and checks it.
    Check {
        /// The volume.
        volume: String,
    },
    /// The Docker volume on that device.
    EnsureVolume {
        /// Its name.
        name: String,
    },
    /// The container from its recipe and pinned image.
    EnsureContainer {
        /// Its name.
        name: String,
    },
    /// Starts it, and looks whether it has the right devices.
    Start {
        /// Its name.
        name: String,
    },
    /// Waits until it is healthy.
    AwaitHealth {
        /// Its name.
        name: String,
    },
    /// Writes role and report into the ledger.
    Record,
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Step::Fence { epoch } => write!(f, "fence the old primary with epoch {epoch}"),
            Step::FinishApply { count: 1 } => f.write_str("apply 1 committed generation"),
            Step::FinishApply { count } => write!(f, "apply {count} committed generations"),
            Step::DropUncommitted => f.write_str("drop what was not committed"),
            Step::Attach { volume } => write!(f, "attach volume {volume}"),
            Step::Check { volume } => write!(f, "check the file system of volume {volume}"),
            Step::EnsureVolume { name } => write!(f, "Docker volume {name}"),
            Step::EnsureContainer { name } => write!(f, "container {name}"),
            Step::Start { name } => write!(f, "start container {name}"),
            Step::AwaitHealth { name } => write!(f, "await health of container {name}"),
            Step::Record => f.write_str("record the new role"),
        }
    }
}

/// What is known about the old primary no longer serving.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fencing {
    /// The peer itself said that it does not serve.
    PeerDoesNotServe,
    /// Nothing: the peer did not answer, whoever called decided.
    NoProof,
    /// The peer serves, and the operator went on by force.
    Forced,
    /// The epoch was raised before; nothing is decided anew.
    DecidedBefore,
}

impl std::fmt::Display for Fencing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Fencing::PeerDoesNotServe => "the peer says that it does not serve",
            Fencing::NoProof => "no proof that the old primary is down: the caller decided",
            Fencing::Forced => "by force, while the old primary serves",
            Fencing::DecidedBefore => "decided before",
        })
    }
}

/// The plan of one failover.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The group's name.
    pub group: String,
    /// The epoch that this plan was made in: it is void in another.
    pub from_epoch: u64,
    /// The epoch in which this host will serve.
    pub epoch: u64,
    /// What the volumes will hold.
    pub position: Position,
    /// The instant of the old primary's that they will hold; 0 = unknown.
    pub recoverable_to: Moment,
    /// What is known about the old primary.
    pub fencing: Fencing,
    /// What will be missing or is risky, in words.
    pub warnings: Vec<String>,
    /// The steps, in order. Empty: everything is so already.
    pub steps: Vec<Step>,
}

impl Plan {
    /// Writes that are lost if the old primary served until `now`, in milliseconds; `None` when the instant is not known.
    pub fn expected_loss_ms(&self, now: Moment) -> Option<u64> {
        (self.recoverable_to.0 != 0).then(|| now.0.saturating_sub(self.recoverable_to.0))
    }
}

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.steps.is_empty() {
            return write!(f, "group {}: already primary in epoch {}, all containers run", self.group, self.epoch);
        }
        writeln!(f, "group {}: to position {} as primary in epoch {}", self.group, self.position, self.epoch)?;
        writeln!(f, "  fencing: {}", self.fencing)?;
        self.warnings.iter().try_for_each(|warning| writeln!(f, "  warning: {warning}"))?;
        for (number, step) in self.steps.iter().enumerate() {
            write!(f, "{}{:3}. {step}", if number == 0 { "" } else { "\n" }, number + 1)?;
        }
        Ok(())
    }
}

/// Plans the failover of a group to this host.
///
/// | this host | peer | |
/// |---|---|---|
/// | fenced | any | `WRONG_ROLE` |
/// | any | has a higher epoch | `STALE_EPOCH`, also by force |
/// | primary, all containers run | | nothing to do |
/// | primary by failover, some do not run | | the steps again, same epoch |
/// | primary from the beginning, some do not run | | `WRONG_ROLE` |
/// | promoting | | goes on in the same epoch |
/// | standby, syncing or nothing committed | | `NOTHING_COMMITTED`, also by force |
/// | standby | serves or is about to | `PEER_ALIVE` unless by force |
/// | standby | answers and does not serve | goes, with that as proof |
/// | standby | no answer, or not asked | goes, without proof |
pub fn plan_failover(facts: &Facts) -> Res<Plan> {
    let group = format!("group {}", facts.group);
    if facts.role == Role::Fenced {
        let next = "failover on the host that is primary now needs nothing; bring this host back as a standby first";
        return Err(Fault::new(Code::WrongRole, group, "this host was fenced by a higher epoch and its data is behind", next));
    }
    if let Peer::Alive { epoch, .. } = facts.peer
        && epoch > facts.epoch
    {
        let cause = format!("the peer is in epoch {epoch}, this host in {}: its data is newer", facts.epoch);
        return Err(Fault::new(Code::StaleEpoch, group, cause, "serve it from the peer, or bring this host up to date first"));
    }
    match facts.role {
        Role::Primary if facts.containers.iter().all(|container| container.running) => {
            Ok(plan(facts, Fencing::DecidedBefore, Vec::new()))
        }
        Role::Primary if facts.promoted_here => Ok(plan(facts, Fencing::DecidedBefore, serve(facts))),
        Role::Primary => {
            let stopped: Vec<&str> = facts.containers.iter().filter(|c| !c.running).map(|c| c.name.as_str()).collect();
            let cause = format!("this host is its primary already, and {} does not run", stopped.join(", "));
            Err(Fault::new(Code::WrongRole, group, cause, "start it with `docker start`; failover is for the standby"))
        }
        Role::Promoting => Ok(plan(facts, Fencing::DecidedBefore, promote(facts, facts.epoch))),
        Role::Standby | Role::Fenced => {
            let fencing = fencing(facts, &group)?;
            let Some(epoch) = facts.epoch.checked_add(1) else { return Err(Fault::internal(group, "the epoch is at its end")) };
            Ok(plan(facts, fencing, promote(facts, epoch)))
        }
    }
}

/// Whether a standby may promote, and with what proof.
fn fencing(facts: &Facts, group: &str) -> Res<Fencing> {
    if facts.syncing {
        let cause = "its first synchronisation has not ended, so that the replica is no state of any instant";
        return Err(Fault::new(Code::NothingCommitted, group, cause, "let the synchronisation end; force does not help"));
    }
    if facts.committed.generation == 0 {
        let cause = "this standby has no whole generation";
        return Err(Fault::new(Code::NothingCommitted, group, cause, "let a first synchronisation end; force does not help"));
    }
    match (facts.peer, facts.force) {
        (Peer::Alive { role: Role::Standby | Role::Fenced, .. }, _) => Ok(Fencing::PeerDoesNotServe),
        (Peer::Alive { .. }, true) => Ok(Fencing::Forced),
        (Peer::Alive { role, epoch }, false) => {
            let does = if role == Role::Promoting { "is about to serve" } else { "serves" };
            Err(Fault::new(
                Code::PeerAlive,
                group,
                format!("the peer answers and {does} it in epoch {epoch}"),
                "stop its containers there first; --force goes on all the same, and then both hosts may serve (split brain): \
                 what the peer writes from now on is not replicated and will have to be given up or merged by hand",
            ))
        }
        (Peer::Unreachable | Peer::NotAsked, _) => Ok(Fencing::NoProof),
    }
}

fn plan(facts: &Facts, fencing: Fencing, steps: Vec<Step>) -> Plan {
    let epoch =
        steps.iter().find_map(|step| if let Step::Fence { epoch } = step { Some(*epoch) } else { None }).unwrap_or(facts.epoch);
    let mut warnings = Vec::new();
    if !steps.is_empty() {
        match fencing {
            Fencing::NoProof => warnings.push("if the old primary still serves, both hosts will (split brain)".to_string()),
            Fencing::Forced => warnings.push("the peer serves now; what it writes from here on is not replicated".to_string()),
            Fencing::PeerDoesNotServe | Fencing::DecidedBefore => {}
        }
        let missing = facts.containers.iter().filter(|container| !container.image_present && !container.running);
        warnings.extend(missing.map(|c| format!("container {} cannot start: its pinned image is not here", c.name)));
    }
    Plan {
        group: facts.group.clone(),
        from_epoch: facts.epoch,
        epoch,
        position: facts.committed,
        recoverable_to: facts.committed_cut_at,
        fencing,
        warnings,
        steps,
    }
}

/// Fence first, then the data, then the service.
fn promote(facts: &Facts, epoch: u64) -> Vec<Step> {
    let mut steps = vec![Step::Fence { epoch }];
    if facts.unapplied > 0 {
        steps.push(Step::FinishApply { count: facts.unapplied });
    }
    if facts.uncommitted {
        steps.push(Step::DropUncommitted);
    }
    steps.extend(serve(facts));
    steps
}

/// From data that is whole to containers that are healthy.
fn serve(facts: &Facts) -> Vec<Step> {
    let volumes = |make: fn(String) -> Step| facts.volumes.iter().cloned().map(make);
    let containers = |make: fn(String) -> Step| facts.containers.iter().map(|container| container.name.clone()).map(make);
    volumes(|volume| Step::Attach { volume })
        .chain(volumes(|volume| Step::Check { volume }))
        .chain(volumes(|name| Step::EnsureVolume { name }))
        .chain(containers(|name| Step::EnsureContainer { name }))
        .chain(containers(|name| Step::Start { name }))
        .chain(containers(|name| Step::AwaitHealth { name }))
        .chain([Step::Record])
        .collect()
}
