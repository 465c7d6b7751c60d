//! Failover on this host: the facts are gathered, the plan is decided, its steps are carried out.

use crate::agent::Agent;
use crate::agent::group::{Group, lock};
use crate::agent::standby::{Standby, release_holds};
use crate::control::{Event, Sink};
use crate::failover;
use crate::format::Purpose;
use crate::ledger::Record;
use crate::model::{Code, Exit, Fault, Moment, Res, Role};
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
    if record.role == Role::Primary && record.last_failover.is_none() {
        return already_primary(agent, group, &record, force);
    }
    let mut guard = lock(&group.standby);
    if guard.is_none() {
        *guard = Some(Standby::open(agent, group)?);
    }
    let standby = guard.as_mut().ok_or_else(|| Fault::internal("the standby's side", "it is not open"))?;
    let docker = agent.docker()?;
    let mut facts = failover::look(&group.ledger(), &standby.journal, &standby.sealed, &docker, peer, force)?;
    // An idle primary says from time to time that nothing has changed: the copy is good for later than its cut.
    if facts.committed_cut_at != Moment(0) {
        facts.committed_cut_at = facts.committed_cut_at.max(group.with_live(|live| live.recoverable_to));
    }
    let plan = plan_failover(&facts)?;
    if dry_run {
        for step in &plan.steps {
            sink(Event::Step { name: step.to_string(), outcome: "would change".into(), detail: String::new(), ms: 0 });
        }
        let loss_ms = plan.expected_loss_ms(crate::agent::now());
        let value =
            json!({ "group": group.name, "dry_run": true, "plan": plan, "words": plan.to_string(), "expected_loss_ms": loss_ms });
        return Ok((value, Exit::Done));
    }
    if plan.steps.is_empty() {
        return Ok((
            json!({ "group": group.name, "changed": false, "epoch": plan.epoch, "words": plan.to_string() }),
            Exit::Done,
        ));
    }
    // Nothing refuses it any more. From here on nothing is received either: whoever is connected is let go, and its next message
    // is refused (it is looked at under the lock that is held here).
    group.connection.fetch_add(1, Ordering::SeqCst);
    let (link_dir, scratch_dir) = (agent.link_dir(), agent.settings.run_dir.join("scratch"));
    crate::durable::private_dir(&link_dir)?;
    crate::durable::private_dir(&scratch_dir)?;
    let Standby { journal, replicas, paths, holds, sealed, engine, .. } = standby;
    let report = failover::run(
        &plan,
        failover::Stage {
            ledger: &mut group.ledger(),
            journal,
            replicas,
            image_paths: paths,
            engine: engine.as_mut(),
            docker: &docker,
            link_dir: &link_dir,
            scratch_dir: &scratch_dir,
            health_timeout: agent.settings.health_timeout,
            now: &crate::agent::now,
            release_standby: &mut || release_holds(holds),
        },
        sealed,
        &mut |step| {
            let (name, outcome) = (step.step.to_string(), step.outcome.to_string());
            sink(Event::Step { name, outcome, detail: step.detail.clone(), ms: step.ms });
        },
    )?;
    *guard = None;
    drop(guard);
    group.with_live(|live| {
        live.state = SERVING_ALONE.into();
        live.connected = false;
        live.in_sync = false;
        live.clear(Code::ContainerFailed);
        if !report.degraded.is_empty() {
            let next = "see dockerd's words, mend the cause, then run the failover again";
            live.fault(Fault::new(Code::ContainerFailed, format!("group {}", group.name), report.degraded.join("; "), next));
        }
    });
    let exit = report.exit();
    let mut value = serde_json::to_value(&report).map_err(|e| Fault::internal("the report", e.to_string()))?;
    value["changed"] = json!(report.changed());
    for (row, step) in value["steps"].as_array_mut().into_iter().flatten().zip(&report.steps) {
        row["name"] = json!(step.step.to_string());
    }
    Ok((value, exit))
}

/// A failover asked of the host that has served the group from the beginning: nothing to do, or the wrong host.
fn already_primary(agent: &Agent, group: &Group, record: &Record, force: bool) -> Res<(Value, Exit)> {
    let docker = agent.docker()?;
    let mut containers = Vec::new();
    for container in &record.spec.containers {
        let running = docker.find_state(&container.name)?.is_some_and(|state| state.running);
        containers.push(ContainerFact { name: container.name.clone(), running, image_present: true });
    }
    let plan = plan_failover(&Facts {
        group: group.name.clone(),
        role: record.role,
        epoch: record.epoch,
        committed: record.committed,
        committed_cut_at: record.committed_cut_at,
        applied: record.applied,
        unapplied: 0,
        uncommitted: false,
        syncing: false,
        promoted_here: false,
        volumes: record.spec.volumes.iter().map(|v| v.name.clone()).collect(),
        containers,
        peer: Peer::NotAsked,
        force,
    })?;
    Ok((json!({ "group": group.name, "changed": false, "epoch": plan.epoch, "words": plan.to_string() }), Exit::Done))
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
