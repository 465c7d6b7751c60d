//! What an operator can ask, each request carried out by the rooms that own its parts.

use crate::agent::Agent;
use crate::agent::group::{Command, Group, SyncWaiter, lock};
use crate::agent::images;
use crate::agent::promote;
use crate::agent::status;
use crate::config::Settings;
use crate::control::{Event, Request, Sink};
use crate::durable;
use crate::ledger::Record;
use crate::link::Peer;
use crate::model::{Code, Exit, Fault, GroupSpec, Res, Role, VolumeSpec, check_name};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

const PAIRING_LASTS: Duration = Duration::from_secs(600);
/// How long `sync --wait` lets a fault stand before it gives it as the answer.
const SYNC_PATIENCE: Duration = Duration::from_secs(10);

/// Answers one request.
pub fn handle(agent: &Arc<Agent>, request: Request, sink: Sink<'_>) -> Res<(Value, Exit)> {
    match request {
        Request::Status => Ok((status::value(agent), status::exit(agent))),
        Request::VolumeCreate { name, size_bytes, fs, mount_options } => {
            agent.volume_create(&name, size_bytes, fs, &mount_options)
        }
        Request::VolumeList => agent.volume_list(),
        Request::VolumeRemove { name, confirm } => agent.volume_remove(&name, confirm.as_deref()),
        Request::Protect { group, peer, containers, volumes } => protect(agent, &group, peer, &containers, &volumes, sink),
        Request::Sync { group, wait } => sync(&*agent.group(&group)?, wait, sink),
        Request::Failover { group, dry_run, force } => promote::failover(agent, &*agent.group(&group)?, dry_run, force, sink),
        Request::Verify { group } => verify(&*agent.group(&group)?, sink),
        Request::PairOpen => pair_open(agent),
        Request::Pair { address, code } => pair(agent, &address, &code.0),
        Request::Doctor => crate::agent::doctor(&agent.settings),
    }
}

/// The pinned peers, from a small file.
pub fn load_peers(settings: &Settings) -> Res<Vec<Peer>> {
    let path = settings.state_dir.join("peers.json");
    match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| {
            Fault::new(Code::Corrupt, path.display().to_string(), e.to_string(), "remove it and pair the hosts again")
        }),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(Fault::io(path.display().to_string(), &e)),
    }
}

/// Adds or replaces a peer, durably.
pub fn save_peer(settings: &Settings, peer: &Peer) -> Res<()> {
    check_name("host", &peer.name)?;
    let mut peers = load_peers(settings)?;
    peers.retain(|p| p.name != peer.name);
    peers.push(peer.clone());
    let bytes = serde_json::to_vec_pretty(&peers).map_err(|e| Fault::internal("the list of peers", e.to_string()))?;
    durable::replace_file(&settings.state_dir.join("peers.json"), &bytes)
}

fn pair_open(agent: &Arc<Agent>) -> Res<(Value, Exit)> {
    let Some(listen) = agent.settings.listen.clone() else {
        return Err(Fault::new(
            Code::ConfigInvalid,
            "pairing",
            "this host listens nowhere",
            "set `listen` in the configuration and restart the agent",
        ));
    };
    let saving = agent.clone();
    let code = agent.link.open_pairing(PAIRING_LASTS, Box::new(move |peer| saving.save_peer(&peer)))?;
    Ok((
        json!({ "code": code, "listen": listen, "host": agent.settings.host, "valid_seconds": PAIRING_LASTS.as_secs() }),
        Exit::Done,
    ))
}

fn pair(agent: &Arc<Agent>, address: &str, code: &str) -> Res<(Value, Exit)> {
    let own = agent.settings.listen.clone().unwrap_or_default();
    let peer = agent.link.pair(address, code, &own, Duration::from_secs(10))?;
    agent.save_peer(&peer)?;
    Ok((json!({ "peer": peer.name, "address": peer.address, "fingerprint": peer.fingerprint }), Exit::Done))
}

fn pick_peer(agent: &Agent, wanted: Option<String>) -> Res<String> {
    let peers = agent.link.peers();
    let names: Vec<_> = peers.iter().map(|p| p.name.clone()).collect();
    match wanted {
        Some(name) if names.contains(&name) => Ok(name),
        Some(name) => Err(Fault::new(
            Code::PeerNotTrusted,
            format!("peer {name}"),
            "it is not paired with this host",
            "pair the hosts first: `doublure pair`",
        )),
        None if names.len() == 1 => Ok(names[0].clone()),
        None if names.is_empty() => Err(Fault::new(
            Code::PeerNotTrusted,
            "the standby",
            "no host is paired with this one",
            "pair the hosts first: `doublure pair`",
        )),
        None => Err(Fault::new(
            Code::BadArgument,
            "the standby",
            format!("several hosts are paired: {}", names.join(", ")),
            "name one with --peer",
        )),
    }
}

/// Makes a group of containers and the volumes they use, and begins to ship it.
fn protect(
    agent: &Arc<Agent>,
    name: &str,
    peer: Option<String>,
    containers: &[String],
    volumes: &[String],
    sink: Sink<'_>,
) -> Res<(Value, Exit)> {
    check_name("group", name)?;
    let peer = pick_peer(agent, peer)?;
    agent.tracker_cell()?;
    let docker = agent.docker()?;
    let mut names: Vec<String> = volumes.to_vec();
    let mut specs = Vec::new();
    for container in containers {
        check_name("container", container)?;
        for (kind, source) in docker.mounts_of(container)? {
            match kind.as_str() {
                "volume" => names.push(source),
                "tmpfs" => {}
                _ => {
                    return Err(Fault::new(
                        Code::BadArgument,
                        format!("container {container}"),
                        format!("it mounts {source} ({kind}), which is on no volume of ours and would be missing on the standby"),
                        "move that data to a volume made with `doublure volume create`",
                    ));
                }
            }
        }
        specs.push(docker.capture(container)?);
    }
    names.sort();
    names.dedup();
    let mut chosen: Vec<VolumeSpec> = Vec::new();
    for volume in &names {
        let found = lock(&agent.volumes).find(volume).cloned();
        chosen.push(found.ok_or_else(|| {
            Fault::new(
                Code::VolumeUnknown,
                format!("volume {volume}"),
                "it is not a volume that doublure made, so its blocks cannot be followed",
                "make one with `doublure volume create` and move the data there",
            )
        })?);
        if let Some(user) =
            docker.users_of_volume(volume)?.into_iter().find(|u| !containers.contains(u) && !containers.is_empty())
        {
            return Err(Fault::new(
                Code::BadArgument,
                format!("volume {volume}"),
                format!("container {user} uses it and is not part of the group"),
                format!("add it: --container {user}"),
            ));
        }
    }
    if chosen.is_empty() {
        return Err(Fault::new(
            Code::BadArgument,
            format!("group {name}"),
            "it has no volume",
            "name a container or a volume that has data",
        ));
    }
    if let Ok(old) = agent.group(name) {
        let record = old.record()?;
        let same = record.role == Role::Primary
            && record.spec.volumes == chosen
            && record.spec.containers.iter().map(|c| &c.name).eq(specs.iter().map(|c| &c.name));
        return match same {
            true => Ok((json!({ "group": name, "changed": false }), Exit::Done)),
            false => Err(Fault::new(
                Code::NameTaken,
                format!("group {name}"),
                "it exists with other volumes or containers",
                "choose another name",
            )),
        };
    }
    for volume in &chosen {
        if let Some(group) = agent.group_of_volume(volume.id) {
            return Err(Fault::new(
                Code::VolumeInUse,
                format!("volume {}", volume.name),
                format!("group {group} protects it already"),
                "a volume belongs to one group",
            ));
        }
    }
    let spec = GroupSpec { id: crate::agent::new_id()?, name: name.into(), volumes: chosen, containers: specs };
    let record = Record::new(Role::Primary, 1, spec.clone(), &peer);
    let group = Arc::new(Group::create(&agent.group_dir(spec.id), record)?);
    agent.add_group(group.clone());
    agent.start_primary(&group)?;
    sink(Event::Step {
        name: format!("replicate {} volume(s) to {peer}", spec.volumes.len()),
        outcome: "changed".into(),
        detail: names.join(", "),
        ms: 0,
    });
    images::start_shipping(agent, &group)?;
    Ok((
        json!({ "group": name, "id": spec.id, "peer": peer, "volumes": names, "containers": containers, "changed": true }),
        Exit::Done,
    ))
}

fn sync(group: &Group, wait: bool, sink: Sink<'_>) -> Res<(Value, Exit)> {
    let (done, answer) = std::sync::mpsc::channel();
    let waiter = SyncWaiter { asked_at: crate::agent::now(), asked: Instant::now(), patience: SYNC_PATIENCE, done };
    group.tell(Command::Sync(waiter))?;
    if !wait {
        return Ok((json!({ "group": group.name, "asked": true }), Exit::Done));
    }
    let (position, at) = watch(group, &answer, sink)?;
    Ok((
        json!({ "group": group.name, "epoch": position.epoch, "generation": position.generation, "recoverable_to_ms": at.0 }),
        Exit::Done,
    ))
}

fn verify(group: &Group, sink: Sink<'_>) -> Res<(Value, Exit)> {
    let _busy = group.begin("verify")?;
    let (done, answer) = std::sync::mpsc::channel();
    group.tell(Command::Verify(done))?;
    watch(group, &answer, sink)
}

/// Waits for an answer of a group's thread and shows how far it is meanwhile.
fn watch<T>(group: &Group, answer: &std::sync::mpsc::Receiver<Res<T>>, sink: Sink<'_>) -> Res<T> {
    loop {
        match answer.recv_timeout(Duration::from_millis(200)) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Fault::new(
                    Code::PeerUnreachable,
                    format!("group {}", group.name),
                    "its work was broken off before the answer",
                    "see `doublure status` for why, then try again",
                ));
            }
            Err(RecvTimeoutError::Timeout) => {
                if let Some(progress) = group.with_live(|live| live.progress.clone()) {
                    sink(Event::Progress {
                        what: progress.what,
                        done: progress.done,
                        total: progress.total,
                        unit: "bytes".into(),
                    });
                }
            }
        }
    }
}
