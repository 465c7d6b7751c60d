//! Owns the running host: threads, clocks, channels, the registry of volumes and groups, and their status.
//! Gives each operator's request and each peer's connection to the room that answers it.
//! Keeps one writer for each group and says what it does; stops on a signal without losing a bit.
//! Never holds a rule of replication that a quiet room could hold.
//! Assumes one agent a state directory (it holds the lock).

mod doctor;
mod encode;
mod group;
mod images;
mod live;
mod operations;
mod primary;
mod promote;
mod standby;
mod status;
mod volumes;
mod watch;
mod wire;

pub use doctor::doctor;

use crate::config::{Mode, Settings};
use crate::control;
use crate::docker::Docker;
use crate::durable;
use crate::link::{HostKey, Link, Peer};
use crate::model::{Code, Fault, GroupId, GroupSpec, Moment, Res, Role, Uuid};
use crate::tracker::Tracker;
use group::{Command, Group, lock};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The wall clock. Only shown, never used for order.
pub(crate) fn now() -> Moment {
    Moment(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64)
}

fn new_id() -> Res<Uuid> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|e| Fault::internal("the random source", e.to_string()))?;
    Ok(Uuid(bytes))
}

/// The running agent.
pub(crate) struct Agent {
    settings: Settings,
    program: PathBuf,
    runtime: tokio::runtime::Handle,
    link: Arc<Link>,
    docker: Mutex<Option<Arc<Docker>>>,
    tracker: Result<Mutex<Tracker>, Fault>,
    groups: Mutex<BTreeMap<String, Arc<Group>>>,
    volumes: Mutex<volumes::Registry>,
}

impl Agent {
    fn tracker_cell(&self) -> Res<&Mutex<Tracker>> {
        self.tracker.as_ref().map_err(Clone::clone)
    }

    fn tracker(&self) -> Res<MutexGuard<'_, Tracker>> {
        Ok(lock(self.tracker_cell()?))
    }

    /// dockerd, connected when first needed and again after it was gone.
    fn docker(&self) -> Res<Arc<Docker>> {
        let mut slot = lock(&self.docker);
        if slot.is_none() {
            *slot = Some(Arc::new(Docker::connect(self.runtime.clone(), &self.settings.docker_socket)?));
        }
        slot.clone().ok_or_else(|| Fault::internal("docker", "no connection"))
    }

    fn group(&self, name: &str) -> Res<Arc<Group>> {
        let groups = lock(&self.groups);
        groups.get(name).cloned().ok_or_else(|| {
            let known: Vec<_> = groups.keys().cloned().collect();
            Fault::new(
                Code::GroupUnknown,
                format!("group {name}"),
                match known.is_empty() {
                    true => "this host has no groups".to_string(),
                    false => format!("this host has {}", known.join(", ")),
                },
                "check the name with `doublure status`",
            )
        })
    }

    fn group_by_id(&self, id: GroupId) -> Option<Arc<Group>> {
        lock(&self.groups).values().find(|g| g.id == id).cloned()
    }

    fn group_dir(&self, id: GroupId) -> PathBuf {
        self.settings.state_dir.join("groups").join(id.to_string())
    }

    fn add_group(&self, group: Arc<Group>) {
        lock(&self.groups).insert(group.name.clone(), group);
    }

    /// Names that a new group may not take from what is here.
    fn refuse_taken_names(&self, spec: &GroupSpec) -> Res<()> {
        let taken = |what: &str, name: &str| {
            Fault::new(Code::NameTaken, format!("{what} {name}"), "this host has one of that name", "rename one of the two")
        };
        if lock(&self.groups).contains_key(&spec.name) {
            return Err(taken("group", &spec.name));
        }
        let groups: Vec<_> = lock(&self.groups).values().cloned().collect();
        for volume in &spec.volumes {
            let in_group = groups.iter().any(|g| g.record().is_ok_and(|r| r.spec.volumes.iter().any(|v| v.name == volume.name)));
            if in_group || lock(&self.volumes).find(&volume.name).is_some() {
                return Err(taken("volume", &volume.name));
            }
        }
        Ok(())
    }

    /// Starts the thread that ships a group.
    fn start_primary(self: &Arc<Self>, group: &Arc<Group>) -> Res<()> {
        let (inbox, commands) = std::sync::mpsc::channel();
        *lock(&group.commands) = Some(inbox);
        let (agent, group) = (self.clone(), group.clone());
        std::thread::Builder::new()
            .name(format!("ship-{}", group.name))
            .spawn(move || {
                let work = std::panic::AssertUnwindSafe(|| primary::run(agent, group.clone(), commands));
                if std::panic::catch_unwind(work).is_err() {
                    // An assertion of ours is broken: this group's shipping stops, its bits and data stay (S12).
                    let fault =
                        Fault::internal(format!("group {}", group.name), "its shipping thread broke an assertion and stopped");
                    group.with_live(|live| {
                        live.connected = false;
                        live.in_sync = false;
                        live.state = format!("stopped: {fault}");
                        live.fault(fault);
                    });
                }
                *lock(&group.commands) = None;
            })
            .map(drop)
            .map_err(|e| Fault::io("a new thread", &e))
    }

    fn stop_groups(&self) {
        let groups: Vec<_> = lock(&self.groups).values().cloned().collect();
        for group in &groups {
            let _ = group.tell(Command::Stop);
        }
        for group in groups {
            let deadline = std::time::Instant::now() + Duration::from_secs(5);
            while lock(&group.commands).is_some() && std::time::Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

/// Runs the agent until SIGTERM or SIGINT. `ready` is called once the control socket answers.
///
/// The order of coming up: the lock, then keys and peers, then what needs the kernel, then the groups' own recovery, and only
/// then the doors through which others come in.
pub fn run(settings: Settings, ready: &dyn Fn()) -> Res<()> {
    durable::private_dir(&settings.state_dir)?;
    let _lock = durable::lock_dir(&settings.state_dir)?;
    durable::private_dir(&settings.volume_dir)?;
    durable::private_dir(&settings.state_dir.join("groups"))?;
    durable::private_dir(&settings.state_dir.join("images"))?;
    durable::private_dir(&settings.run_dir)?;
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 4));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()
        .map_err(|e| Fault::io("the runtime", &e))?;
    let key = HostKey::load_or_make(&settings.state_dir.join("keys"), &settings.host)?;
    let link = Link::new(runtime.handle().clone(), key, &settings.host, operations::load_peers(&settings)?)?;
    link.set_bandwidth(settings.bandwidth_bytes_per_second);
    let program = std::env::current_exe().map_err(|e| Fault::io("this program's own path", &e))?;
    let tracker = open_tracker(&settings);
    if let Err(fault) = &tracker {
        tracing::error!("{fault}");
    }
    let registry = volumes::Registry::load(&settings)?;
    let agent = Arc::new(Agent {
        program,
        runtime: runtime.handle().clone(),
        link: link.clone(),
        docker: Mutex::new(None),
        tracker: tracker.map(Mutex::new),
        groups: Mutex::new(BTreeMap::new()),
        volumes: Mutex::new(registry),
        settings,
    });
    agent.recover_groups()?;
    agent.attach_free_volumes();
    if let Some(listen) = &agent.settings.listen {
        let serving = agent.clone();
        link.listen(listen, Arc::new(move |channel| standby::serve(&serving, channel)))?;
    }
    let serving = agent.clone();
    let socket = agent.settings.run_dir.join("control.sock");
    control::serve(&socket, Arc::new(move |request, sink| operations::handle(&serving, request, sink)))?;
    ready();
    let stopped = runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let mut term = signal(SignalKind::terminate())?;
        let mut int = signal(SignalKind::interrupt())?;
        tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
        Ok::<(), std::io::Error>(())
    });
    tracing::info!("stopping; changes go on being tracked in the kernel");
    agent.stop_groups();
    let _ = std::fs::remove_file(&socket);
    runtime.shutdown_timeout(Duration::from_secs(1));
    stopped.map_err(|e| Fault::io("signals", &e))
}

fn open_tracker(settings: &Settings) -> Res<Tracker> {
    let mut tracker = Tracker::open(&settings.pin_dir)?;
    tracker.self_test(&settings.state_dir)?;
    if settings.mode != Mode::Freeze
        && let Err(refusal) = tracker.prepare_capture(&settings.state_dir)
    {
        tracing::warn!("{refusal}");
    }
    Ok(tracker)
}

impl Agent {
    /// Opens every group of the state directory and lets each take up its role.
    fn recover_groups(self: &Arc<Self>) -> Res<()> {
        let dir = self.settings.state_dir.join("groups");
        let entries = std::fs::read_dir(&dir).map_err(|e| Fault::io(dir.display().to_string(), &e))?;
        for entry in entries {
            let path = entry.map_err(|e| Fault::io(dir.display().to_string(), &e))?.path();
            let Some(group) = Group::open(&path)? else { continue };
            let group = Arc::new(group);
            self.add_group(group.clone());
            let record = group.record()?;
            let outcome = match record.role {
                Role::Primary => {
                    for volume in &record.spec.volumes {
                        if let Err(fault) = self.attach_volume(volume) {
                            group.with_live(|live| live.fault(fault));
                        }
                    }
                    // A group that was promoted here has no standby until it is failed back.
                    match record.last_failover.is_some() {
                        true => {
                            group.with_live(|live| live.state = promote::SERVING_ALONE.into());
                            Ok(())
                        }
                        false => self.start_primary(&group).and_then(|()| images::start_shipping(self, &group)),
                    }
                }
                Role::Standby => standby::Standby::open(self, &group).map(|standby| *lock(&group.standby) = Some(standby)),
                Role::Promoting => {
                    group.with_live(|live| live.state = "a failover was broken off: run it again".into());
                    standby::Standby::open(self, &group).map(|standby| *lock(&group.standby) = Some(standby))
                }
                Role::Fenced => {
                    group.with_live(|live| live.state = "fenced: the other side was promoted".into());
                    Ok(())
                }
            };
            if let Err(fault) = outcome {
                tracing::error!(group = %group.name, "{fault}");
                group.with_live(|live| {
                    live.state = format!("stopped: {fault}");
                    live.fault(fault);
                });
            }
        }
        Ok(())
    }

    fn save_peer(&self, peer: &Peer) -> Res<()> {
        operations::save_peer(&self.settings, peer)
    }
}
