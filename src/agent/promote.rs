//! Failover on this host: the facts are gathered, the plan is decided, its steps are carried out.

use crate::agent::Agent;
use crate::agent::group::{Group, lock};
use crate::agent::standby::Standby;
use crate::control::{Event, Sink};
use crate::failover;
use crate::format::Purpose;
use crate::ledger::Record;
use crate::model::{Code, Exit, Fault, Moment, Res, Role, SealedProof};
use crate::role::{ContainerFact, Facts, Peer, plan_failover};
use crate::session::{Sender, SenderEvent};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// What `status` says of a group that was promoted here and has no standby yet.
pub const SERVING_ALONE: &str = "serving alone: promoted here, nothing replicates it until it is failed back";
/// The peer is asked for this long whether it still serves.
const ASK_PATIENCE: Duration = Duration::from_secs(2);

/// Promotes this host for a group, or says what that would do.
pub fn failover(agent: &Arc<Agent>, group: &Group, dry_run: bool, force: bool, sink: Sink<'_>) -> Res<(Value, Exit)> {
    let _busy = group.begin("failover")?;
    let record = group.record()?;
    let peer = match record.role {
        Role::Standby => ask(agent, group, &record),
        _ => Peer::NotAsked,
    };
    // From here on nothing more is received: whoever is connected is let go, and its next message is refused.
    if !dry_run && matches!(record.role, Role::Standby | Role::Promoting) {
        group.connection.fetch_add(1, Ordering::SeqCst);
    }
    let mut guard = lock(&group.standby);
    if guard.is_none() && matches!(record.role, Role::Standby | Role::Promoting) {
        *guard = Some(Standby::open(agent, group)?);
    }
    let facts = facts(agent, group, &record, guard.as_ref(), peer, force)?;
    let plan = plan_failover(&facts)?;
    if dry_run {
        for step in &plan.steps {
            sink(Event::Step { name: step.to_string(), outcome: "would change".into(), detail: String::new(), ms: 0 });
        }
        let loss_ms = plan.expected_loss_ms(crate::agent::now());
        return Ok((json!({ "group": group.name, "dry_run": true, "plan": plan, "words": plan.to_string(), "expected_loss_ms": loss_ms }), Exit::Done));
    }
    if plan.steps.is_empty() {
        return Ok((json!({ "group": group.name, "changed": false, "epoch": plan.epoch, "words": plan.to_string() }), Exit::Done));
    }
    let docker = agent.docker()?;
    let paths: Vec<_> = record.spec.volumes.iter().map(|v| agent.image_path(v.id)).collect();
    let report = {
        let mut ledger = group.ledger();
        let link_dir = agent.link_dir();
        crate::durable::private_dir(&link_dir)?;
        let scratch_dir = agent.settings.run_dir.join("scratch");
        crate::durable::private_dir(&scratch_dir)?;
        failover::run(
            &plan,
            failover::Stage {
                ledger: &mut ledger,
                standby: guard.as_mut().map(|s| s as &mut dyn failover::StandbySide),
                image_paths: &paths,
                docker: &docker,
                link_dir: &link_dir,
                scratch_dir: &scratch_dir,
                health_timeout: agent.settings.health_timeout,
                now: &crate::agent::now,
            },
            &mut |step| {
                sink(Event::Step {
                    name: step.name.clone(),
                    outcome: step.outcome.to_string(),
                    detail: step.detail.clone(),
                    ms: step.ms,
                });
            },
        )?
    };
    *guard = None;
    drop(guard);
    let exit = report.exit;
    let value = serde_json::to_value(&report).map_err(|e| Fault::internal("the report", e.to_string()))?;
    group.with_live(|live| {
        live.state = SERVING_ALONE.into();
        live.connected = false;
        live.in_sync = false;
        for fault in &report.degraded {
            live.fault(fault.clone());
        }
    });
    Ok((value, exit))
}

/// How the peer stands, as itself says; no answer in time is no answer.
fn ask(agent: &Agent, group: &Group, record: &Record) -> Peer {
    let question = || -> Res<Peer> {
        let mut channel = agent.link.connect(&record.peer, ASK_PATIENCE)?;
        let (mut sender, hello) = Sender::new(&agent.settings.host, Purpose::Ask, group.id, record.epoch);
        channel.send(&hello)?;
        let Some(message) = channel.recv(ASK_PATIENCE)? else {
            return Err(Fault::new(Code::TimedOut, "the peer", "it did not answer", "it is taken for unreachable"));
        };
        match sender.on_message(message)? {
            SenderEvent::Welcome { standing, .. } => Ok(Peer::Alive { role: standing.role, epoch: standing.epoch }),
            other => Err(Fault::protocol(format!("the peer answered a question with {other:?}"))),
        }
    };
    match question() {
        Ok(seen) => seen,
        Err(fault) => {
            tracing::info!(group = %group.name, "the peer was asked whether it serves: {fault}");
            Peer::Unreachable
        }
    }
}

fn facts(agent: &Agent, group: &Group, record: &Record, standby: Option<&Standby>, peer: Peer, force: bool) -> Res<Facts> {
    let docker = agent.docker()?;
    let mut containers = Vec::new();
    for container in &record.spec.containers {
        containers.push(ContainerFact {
            name: container.name.clone(),
            running: docker.state(&container.name).is_ok_and(|s| s.running),
            image_present: docker.find_image(&container.image)?.is_some(),
        });
    }
    let last = standby.and_then(|s| s.sealed.last());
    let (committed, cut_at) = match last {
        Some(sealed) => (sealed.position(), sealed.cut_at()),
        None => (record.applied.max(record.committed), record.applied_cut_at.max(record.committed_cut_at)),
    };
    // An idle primary says from time to time that nothing has changed: the copy is good for later than its cut.
    let known_good = group.with_live(|live| live.recoverable_to);
    Ok(Facts {
        group: group.name.clone(),
        role: record.role,
        epoch: record.epoch,
        committed,
        committed_cut_at: if cut_at == Moment(0) { cut_at } else { cut_at.max(known_good) },
        applied: record.applied,
        unapplied: standby.map_or(0, |s| s.sealed.len() as u64),
        uncommitted: standby.is_some_and(|s| s.journal.open_generation().is_some()),
        syncing: record.syncing,
        promoted_here: record.last_failover.is_some(),
        volumes: record.spec.volumes.iter().map(|v| v.name.clone()).collect(),
        containers,
        peer,
        force,
    })
}
