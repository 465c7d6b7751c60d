//! The status value: facts as they are known; what is unknown is `null`.

use crate::agent::Agent;
use crate::agent::group::{Group, lock};
use crate::model::{BLOCK_BYTES, Code, Exit, Moment, Role};
use serde_json::{Value, json};
use std::sync::Arc;

/// The status of this host (design.md section 5), with `counters`, `faults` and `state` for each group.
pub fn value(agent: &Agent) -> Value {
    let groups: Vec<Arc<Group>> = lock(&agent.groups).values().cloned().collect();
    let rows: Vec<Value> = groups.iter().map(|g| row(g)).collect();
    let tracker = match &agent.tracker {
        Ok(_) => json!("bitmap"),
        Err(fault) => json!(fault.to_string()),
    };
    json!({
        "host": agent.settings.host,
        "agent_version": env!("CARGO_PKG_VERSION"),
        "tracker": tracker,
        "peers": agent.link.peers().iter().map(|p| json!({ "name": p.name, "address": p.address })).collect::<Vec<_>>(),
        "groups": rows,
    })
}

/// 0 when all is well, 4 when a group has a standing fault.
pub fn exit(agent: &Agent) -> Exit {
    let degraded = lock(&agent.groups).values().any(|g| g.with_live(|live| !live.faults.is_empty()));
    if degraded { Exit::Degraded } else { Exit::Done }
}

fn row(group: &Group) -> Value {
    let record = group.peek();
    let live = group.with_live(|live| live.clone());
    let serving_alone = record.role == Role::Primary && record.last_failover.is_some();
    // A promise about the standby's copy: a primary that never heard of one, or serves alone, has none.
    let recoverable = match live.recoverable_to {
        Moment(0) => None,
        _ if serving_alone => None,
        at => Some(at),
    };
    let now = crate::agent::now();
    let images: Vec<Value> = record
        .spec
        .containers
        .iter()
        .map(|c| {
            let there = match record.role {
                Role::Standby | Role::Promoting => Some(record.images.contains_key(&c.image.config_digest)),
                _ if serving_alone => None,
                _ => Some(live.images_there.contains(&c.image.config_digest)),
            };
            json!({ "ref": c.image.name, "id": c.image.config_digest, "on_standby": there })
        })
        .collect();
    let volumes: Vec<Value> = record
        .spec
        .volumes
        .iter()
        .enumerate()
        .map(|(index, volume)| {
            let known = live.volumes.get(index);
            let seen = known.cloned().unwrap_or_default();
            json!({
                "name": volume.name, "device": seen.device, "size_bytes": volume.size_bytes, "block_bytes": BLOCK_BYTES,
                "dirty_bytes": seen.dirty_bytes, "tracker": seen.tracker, "cut": seen.cut, "in_sync": live.in_sync,
                "cut_reason": seen.cut_reason, "captured_bytes": known.map(|v| v.captured_bytes),
                "holes": known.map(|v| v.holes), "reread_bytes": known.map(|v| v.reread_bytes),
            })
        })
        .collect();
    json!({
        "name": group.name,
        "id": group.id,
        "role": record.role,
        "epoch": record.epoch,
        "generation": live.position.generation,
        "applied_generation": (record.role != Role::Primary).then_some(live.applied.generation),
        "recoverable_to": recoverable.and_then(crate::control::rfc3339),
        "recoverable_to_ms": recoverable.map(|at| at.0),
        "rpo_seconds": recoverable.map(|at| now.0.saturating_sub(at.0) as f64 / 1000.0),
        "mode": live.mode,
        "state": live.state,
        "in_sync": live.in_sync,
        "syncing": record.syncing,
        "peer": { "name": record.peer, "connected": live.connected },
        "volumes": volumes,
        "containers": record.spec.containers.iter().map(|c| c.name.clone()).collect::<Vec<_>>(),
        "images": images,
        "io_engine": live.engine,
        "progress": live.progress.map(|p| json!({ "what": p.what, "done_bytes": p.done, "total_bytes": p.total })),
        "counters": live.counters.json(),
        "last_failover": record.last_failover,
        "last_drill": Value::Null,
        "faults": live.faults.iter().map(|f| f.to_string()).collect::<Vec<_>>(),
        "fault_codes": live.faults.iter().map(|f| f.code).collect::<Vec<Code>>(),
    })
}
