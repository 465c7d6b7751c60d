//! The standby's side of a group: replicas, journal, and the conversation with the primary.

use crate::agent::Agent;
use crate::agent::group::{Group, lock};
use crate::apply;
use crate::device;
use crate::device::DeviceFile;
use crate::device::Engine;
use crate::durable::FileStorage;
use crate::format::{Landing, Message, Purpose, Standing};
use crate::host;
use crate::journal::{DirOverflow, Journal, Sealed};
use crate::ledger::Record;
use crate::link::Channel;
use crate::model::{BLOCK_BYTES, BlockRun, Code, Digest, Fault, GroupId, GroupSpec, Moment, Position, Res, Role, SealedProof};
use crate::session::{OpenTransfer, Receiver, ReceiverAction};
use crate::verify;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

/// Silence after which a connection is taken for dead. Long, because a primary says nothing while it syncs a file system or looks for
/// holes; a host that is gone is found by the link within seconds, and a newer connection takes the place of this one anyway.
const SILENCE_MAX: Duration = Duration::from_secs(300);
/// What is committed is applied at the latest after so long,
const APPLY_EVERY: Duration = Duration::from_secs(1);
/// or when so many bytes of payload wait (less with a small journal).
const APPLY_BYTES: u64 = 32 << 20;
/// So often a primary that waits for long work of ours hears that we live.
const PULSE: Duration = Duration::from_secs(5);

/// A read-only device on a replica, and the descriptor that keeps everybody else out.
pub type Hold = (host::LoopDevice, Option<OwnedFd>);

/// Lets go of the exclusive read-only devices, before the replicas are attached to serve.
pub fn release_holds(holds: &mut Vec<Hold>) -> Res<()> {
    while let Some((device, fd)) = holds.last_mut() {
        fd.take();
        host::detach_loop(device, Duration::from_secs(5))?;
        holds.pop();
    }
    Ok(())
}

/// The opened standby's side.
pub struct Standby {
    /// The journal.
    pub journal: Journal,
    /// The replicas' images, in the order of the group.
    pub replicas: Vec<DeviceFile>,
    /// Their paths.
    pub paths: Vec<PathBuf>,
    /// Read-only loop devices held exclusively: nobody mounts or writes a replica through a device.
    pub holds: Vec<Hold>,
    /// Committed and not yet applied.
    pub sealed: Vec<Sealed>,
    /// The engine.
    pub engine: Box<dyn Engine>,
    open: Option<OpenTransfer>,
    landing: Landing,
    spec: GroupSpec,
    /// When what is sealed must be applied at the latest.
    apply_due: Option<Instant>,
}

impl Standby {
    /// Opens replicas and journal, recovers, and applies what was committed.
    pub fn open(agent: &Agent, group: &Group) -> Res<Standby> {
        let record = group.record()?;
        let engine = device::engine(agent.settings.io_engine, agent.settings.queue_depth)?;
        let (mut replicas, mut paths, mut holds) = (Vec::new(), Vec::new(), Vec::new());
        for volume in &record.spec.volumes {
            let path = agent.image_path(volume.id);
            let replica = DeviceFile::open(&path, true)?;
            if replica.size_bytes() < volume.size_bytes {
                return Err(Fault::new(
                    Code::DeviceTooSmall,
                    format!("the replica of volume {}", volume.name),
                    format!("it is {} bytes and the volume {}", replica.size_bytes(), volume.size_bytes),
                    "give the replica its full size",
                ));
            }
            // A writable attachment is somebody serving the replica: refused before anything is written.
            if record.role == Role::Standby {
                let (device, _) = host::attach_loop(&path, true)?;
                let fd = host::hold_exclusive(&device.path, false)?;
                holds.push((device, Some(fd)));
            }
            replicas.push(replica);
            paths.push(path);
        }
        let (journal, sealed) = open_journal(agent, group, &record)?;
        let mut standby = Standby {
            journal,
            replicas,
            paths,
            holds,
            sealed,
            engine,
            open: None,
            landing: Landing::Journal,
            spec: record.spec.clone(),
            apply_due: None,
        };
        if let Some(fault) = standby.gap(&record) {
            standby.give_up_lost(group, record.role, fault)?;
        } else if record.role == Role::Standby {
            standby.apply_sealed(group)?;
        }
        if let Some(fault) = standby.journal.corrupt().cloned() {
            standby.give_up_lost(group, record.role, fault)?;
        }
        let engine = standby.engine.name().to_string();
        let applied = group.record()?.applied;
        group.with_live(|live| {
            live.engine = engine;
            live.volumes = vec![Default::default(); record.spec.volumes.len()];
            for (volume, (device, _)) in live.volumes.iter_mut().zip(&standby.holds) {
                volume.device = device.path.display().to_string();
            }
            live.state = "standby".into();
            live.applied = applied;
        });
        Ok(standby)
    }

    /// Whether what the journal holds does not follow what the ledger calls applied: generations in between are gone.
    fn gap(&self, record: &Record) -> Option<Fault> {
        let first = self.sealed.iter().find(|sealed| sealed.position() > record.applied)?;
        (first.parent() != (record.applied, record.applied_digest)).then(|| {
            let cause = format!(
                "it holds {} next, which follows {}, and {} is applied",
                first.position(),
                first.parent().0,
                record.applied
            );
            let next =
                "both sides are compared in full by themselves; look for a failing disk or a state directory that was put back";
            Fault::new(Code::Corrupt, format!("the journal of group {}", record.spec.name), cause, next)
        })
    }

    /// Something acknowledged cannot be had any more (a failing disk, a hand in the files), and the replica may hold a part of it.
    ///
    /// 1. The ledger says `syncing`, durably: nothing here is promoted any more (S3, S12). It also takes over the journal's tip as the
    ///    place in the chain: positions never go back, and while `syncing` stands it says nothing of the replica's bytes.
    /// 2. The journal gives up what it lost or holds beyond a gap, and goes on from its tip.
    /// 3. The primary sees `syncing`, compares in full, and ships what differs; its commit ends `syncing` (see `Commit` below).
    ///
    /// A host that is being promoted has no primary to compare with: there it stays an error.
    fn give_up_lost(&mut self, group: &Group, role: Role, fault: Fault) -> Res<()> {
        tracing::error!(group = %group.name, "{fault}");
        if role != Role::Standby {
            return Err(fault);
        }
        // 1
        let (tip, tip_digest) = self.journal.tip();
        group.edit_ledger(|record| {
            record.syncing = true;
            if tip > record.applied {
                (record.applied, record.applied_digest, record.applied_cut_at) = (tip, tip_digest, Moment(0));
                (record.committed, record.committed_digest, record.committed_cut_at) = (tip, tip_digest, Moment(0));
            }
            Ok(())
        })?;
        // 2
        if !self.sealed.is_empty() {
            self.sealed.clear();
            self.journal.release(tip)?;
        }
        self.journal.discard_corrupt()?;
        group.with_live(|live| {
            live.recoverable_to = Moment(0);
            live.in_sync = false;
            live.fault(fault);
        });
        Ok(())
    }

    /// Applies what is committed, oldest first, and lets the journal forget it.
    pub fn apply_sealed(&mut self, group: &Group) -> Res<()> {
        let Some(last) = self.sealed.last().cloned() else { return Ok(()) };
        let mut ledger = group.ledger();
        let spec = ledger.record().ok_or_else(|| Fault::internal("the ledger", "it is empty"))?.spec.clone();
        apply::apply_together(&self.journal, &self.sealed, &spec, &self.replicas, self.engine.as_mut(), &mut ledger)?;
        drop(ledger);
        self.journal.release(last.position())?;
        let payload_bytes: u64 = self.sealed.drain(..).map(|one| one.payload_bytes()).sum();
        group.with_live(|live| {
            live.position = last.position();
            live.applied = last.position();
            live.recoverable_to = live.recoverable_to.max(last.cut_at());
            live.counters.bytes_written += payload_bytes;
        });
        self.apply_due = None;
        Ok(())
    }

    /// Applies what is committed when it has waited long enough or become large. What is sealed is safe either way; several
    /// generations together cost one flush and one word in the ledger, and a promote has at most this much to finish.
    fn apply_when_due(&mut self, group: &Group) -> Res<()> {
        let waiting_bytes: u64 = self.sealed.iter().map(Sealed::payload_bytes).sum();
        let due = *self.apply_due.get_or_insert_with(|| Instant::now() + APPLY_EVERY);
        match Instant::now() >= due || waiting_bytes >= APPLY_BYTES.min(self.journal.fill().1 / 4) {
            true => self.apply_sealed(group),
            false => Ok(()),
        }
    }

    fn standing(&self, record: &Record) -> Standing {
        let (tip, tip_digest) = match self.sealed.last() {
            Some(sealed) => (sealed.position(), sealed.digest()),
            None => (record.applied, record.applied_digest),
        };
        Standing {
            role: record.role,
            epoch: record.epoch,
            tip,
            tip_digest,
            open: match self.landing {
                Landing::Journal if self.open.is_some() => self.journal.open_generation(),
                _ => None,
            },
            syncing: record.syncing,
            defined: true,
        }
    }
}

fn open_journal(agent: &Agent, group: &Group, record: &Record) -> Res<(Journal, Vec<Sealed>)> {
    let (ring, _) = FileStorage::open_or_create(&group.dir.join("journal"), agent.settings.journal_bytes)?;
    let overflow = DirOverflow::open(&group.dir.join("overflow"))?;
    let (journal, recovered) = Journal::open(group.id, Box::new(ring), Box::new(overflow), record.applied)?;
    for words in recovered.dropped {
        tracing::info!(group = %group.name, "journal: {words}");
    }
    if recovered.flush_not_kept {
        tracing::error!(group = %group.name, "journal: this disk does not keep what it flushes; its write cache is not to be trusted");
    }
    Ok((journal, recovered.sealed))
}

/// Serves one authenticated connection until it ends. Every refusal is said in words before the connection closes.
pub fn serve(agent: &Arc<Agent>, mut channel: Channel) {
    let peer = channel.peer().to_string();
    let mut receiver = Receiver::new(&agent.settings.host);
    if let Err(fault) = greet(agent, &mut channel, &mut receiver)
        && fault.code != Code::PeerUnreachable
    {
        tracing::warn!(%peer, "{fault}");
        let _ = channel.send(&Message::Refused { fault });
    }
}

fn greet(agent: &Arc<Agent>, channel: &mut Channel, receiver: &mut Receiver) -> Res<()> {
    let Some(message) = channel.recv(Duration::from_secs(10))? else { return Ok(()) };
    let ReceiverAction::Greet { purpose, group: id, epoch, .. } = receiver.on_message(message)? else {
        return Err(Fault::protocol("the conversation did not begin with a hello"));
    };
    match (purpose, agent.group_by_id(id)) {
        (_, Some(group)) => {
            let record = group.record()?;
            if record.peer != channel.peer() {
                return Err(Fault::new(
                    Code::PeerNotTrusted,
                    format!("peer {}", channel.peer()),
                    format!("group {} belongs to another pair", group.name),
                    "check which hosts are paired for it",
                ));
            }
            match purpose {
                Purpose::Replicate => replicate(agent, &group, channel, receiver, epoch),
                Purpose::Images => crate::agent::images::receive(agent, &group, channel, receiver, welcome_of(&group)?),
                Purpose::Ask => answer(channel, receiver, welcome_of(&group)?),
            }
        }
        (Purpose::Replicate, None) => {
            let nothing = Standing {
                role: Role::Standby,
                epoch: 0,
                tip: Position::default(),
                tip_digest: Digest::default(),
                open: None,
                syncing: false,
                defined: false,
            };
            channel.send(&receiver.welcome(nothing, agent.settings.credit_bytes))?;
            let Some(message) = channel.recv(SILENCE_MAX)? else { return Ok(()) };
            let ReceiverAction::Define { spec } = receiver.on_message(message)? else {
                return Err(Fault::protocol("a group that is not known here was not defined first"));
            };
            let group = define_new(agent, channel.peer(), id, epoch, &spec)?;
            let mine = group.connection.fetch_add(1, Ordering::SeqCst) + 1;
            channel.send(&Message::Defined)?;
            converse(agent, &group, channel, receiver, mine)
        }
        (_, None) => Err(Fault::new(
            Code::GroupUnknown,
            format!("group {id}"),
            "this host does not know it",
            "protect it first, on the host that serves it",
        )),
    }
}

fn welcome_of(group: &Group) -> Res<Standing> {
    let record = group.record()?;
    Ok(standing_of(&record, lock(&group.standby).as_ref()))
}

fn standing_of(record: &Record, standby: Option<&Standby>) -> Standing {
    match standby {
        Some(standby) => standby.standing(record),
        None => Standing {
            role: record.role,
            epoch: record.epoch,
            tip: record.applied.max(record.committed),
            tip_digest: record.applied_digest,
            open: None,
            syncing: record.syncing,
            defined: true,
        },
    }
}

fn answer(channel: &mut Channel, receiver: &mut Receiver, standing: Standing) -> Res<()> {
    channel.send(&receiver.welcome(standing, 0))?;
    while let Some(message) = channel.recv(Duration::from_secs(5))? {
        if let ReceiverAction::Send(message) = receiver.on_message(message)? {
            channel.send(&message)?;
        }
    }
    Ok(())
}

fn parse_spec(bytes: &[u8], id: GroupId) -> Res<GroupSpec> {
    let spec: GroupSpec =
        serde_json::from_slice(bytes).map_err(|e| Fault::protocol(format!("the group's definition cannot be read: {e}")))?;
    crate::model::check_name("group", &spec.name)?;
    if spec.id != id || spec.volumes.is_empty() || spec.volumes.len() > 256 || spec.containers.len() > 256 {
        return Err(Fault::protocol("the group's definition is not of this group, or empty, or too large"));
    }
    for volume in &spec.volumes {
        crate::model::check_name("volume", &volume.name)?;
        if volume.size_bytes < 1 << 20 || volume.size_bytes % 512 != 0 || volume.size_bytes > 1 << 50 {
            return Err(Fault::protocol(format!("volume {} has an impossible size", volume.name)));
        }
        if volume.mount_options.len() > 1024 || volume.mount_options.contains(['\n', '\0']) {
            return Err(Fault::protocol(format!("volume {} has impossible mount options", volume.name)));
        }
    }
    for container in &spec.containers {
        crate::model::check_name("container", &container.name)?;
    }
    let mut ids: Vec<_> = spec.volumes.iter().map(|v| v.id).collect();
    ids.sort();
    ids.dedup();
    if ids.len() != spec.volumes.len() {
        return Err(Fault::protocol("the group's definition names a volume twice"));
    }
    Ok(spec)
}

/// Makes a group's standby side: replicas first, the ledger last, so that what a crash leaves is nothing or everything.
fn define_new(agent: &Arc<Agent>, peer: &str, id: GroupId, epoch: u64, bytes: &[u8]) -> Res<Arc<Group>> {
    let spec = parse_spec(bytes, id)?;
    agent.refuse_taken_names(&spec)?;
    for volume in &spec.volumes {
        let path = agent.image_path(volume.id);
        match path.exists() {
            // Left by a definition that was broken off before its ledger: nothing was ever written to it.
            true => {
                let old = DeviceFile::open(&path, false)?;
                if old.size_bytes() != volume.size_bytes || !old.data_extents(whole(&old))?.is_empty() {
                    return Err(Fault::new(
                        Code::NameTaken,
                        format!("replica file {}", path.display()),
                        "it exists and holds data of no group that is known here",
                        "move it away by hand once you know what it is",
                    ));
                }
            }
            false => drop(DeviceFile::create(&path, volume.size_bytes)?),
        }
    }
    let record = Record::new(Role::Standby, epoch, spec, peer);
    let group = Arc::new(Group::create(&agent.group_dir(id), record)?);
    // Known from here on, whatever fails below: its ledger is there, so that it could not be defined a second time.
    let mut guard = lock(&group.standby);
    agent.add_group(group.clone());
    *guard = Some(Standby::open(agent, &group)?);
    drop(guard);
    tracing::info!(group = %group.name, %peer, "defined as standby");
    Ok(group)
}

fn whole(file: &DeviceFile) -> crate::model::ByteRun {
    crate::model::ByteRun { offset: 0, len: file.size_bytes() }
}

fn replicate(agent: &Arc<Agent>, group: &Arc<Group>, channel: &mut Channel, receiver: &mut Receiver, epoch: u64) -> Res<()> {
    let mut guard = lock(&group.standby);
    // Read under the lock: a failover that was waited for here has changed it, and what it promoted is not to be received into.
    let record = group.record()?;
    if record.role == Role::Standby && guard.is_none() {
        *guard = Some(Standby::open(agent, group)?);
    }
    // From here on an older connection's messages are refused, so that the standing said below stays true: without this, an `End`
    // that still waits in its inbox could commit a generation after the primary was told of the one before.
    let mine = group.connection.fetch_add(1, Ordering::SeqCst) + 1;
    let mut standing = standing_of(&record, guard.as_ref());
    if let (Some(standby), Role::Standby) = (guard.as_mut(), record.role)
        && let Some(open) = standby.open.take()
    {
        standing.open = standby.journal.open_generation();
        receiver.adopt(open);
    }
    drop(guard);
    channel.send(&receiver.welcome(standing, agent.settings.credit_bytes))?;
    // The standing above says whether this is refused; only after that may the hello's epoch count.
    if record.role == Role::Standby && epoch > record.epoch {
        group.edit_ledger(|record| {
            // A failover may have come in between: its epoch is its own.
            if record.role == Role::Standby {
                record.epoch = record.epoch.max(epoch);
            }
            Ok(())
        })?;
    }
    converse(agent, group, channel, receiver, mine)
}

fn superseded() -> Fault {
    let next = "nothing is to be done";
    Fault::new(Code::PeerUnreachable, "this connection", "a newer one, or a failover, has taken its place", next)
}

/// The conversation proper, of the connection with the number `mine`. A newer connection of the same primary ends this one.
fn converse(agent: &Arc<Agent>, group: &Arc<Group>, channel: &mut Channel, receiver: &mut Receiver, mine: u64) -> Res<()> {
    group.with_live(|live| live.connected = true);
    let outcome = (|| {
        let mut silent = Duration::ZERO;
        loop {
            let step = Duration::from_millis(500);
            let message = channel.recv(step)?;
            if group.connection.load(Ordering::SeqCst) != mine {
                return Err(superseded());
            }
            let Some(message) = message else {
                // The primary is silent: what waits to be applied need not wait longer.
                if let Some(standby) = lock(&group.standby).as_mut().filter(|_| is_standby(group)) {
                    standby.apply_sealed(group)?;
                }
                silent += step;
                if silent > SILENCE_MAX {
                    let next = "it connects again by itself";
                    return Err(Fault::new(Code::PeerUnreachable, "the primary", "it has been silent too long", next));
                }
                continue;
            };
            silent = Duration::ZERO;
            let action = receiver.on_message(message)?;
            act(agent, group, channel, receiver, action, mine)?;
        }
    })();
    let mut guard = lock(&group.standby);
    if group.connection.load(Ordering::SeqCst) == mine {
        group.with_live(|live| live.connected = false);
        // A handle that a failed write or flush has poisoned never works again. The next connection opens all anew: what the journal
        // holds is judged by what is on the disk, and what was not applied is applied from its start.
        if outcome.as_ref().is_err_and(|fault: &Fault| fault.code == Code::FlushFailed) {
            *guard = None;
        }
        // A journalled generation that was broken off is kept: its beginning need not be sent again.
        if let Some(standby) = &mut *guard {
            if is_standby(group)
                && let Err(fault) = standby.apply_sealed(group)
            {
                tracing::error!(group = %group.name, "{fault}");
            }
            standby.open = std::mem::replace(receiver, Receiver::new(&agent.settings.host)).into_open();
        }
    }
    outcome
}

fn is_standby(group: &Group) -> bool {
    group.ledger().record().is_some_and(|record| record.role == Role::Standby)
}

/// Does long work while the peer hears from us: reading back and applying what a long outage left takes minutes, and a primary that
/// took us for dead meanwhile would send it all again, for ever.
fn alive<T>(channel: &Channel, work: impl FnOnce() -> T) -> T {
    let (working, ended) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let pulse = move || {
            while ended.recv_timeout(PULSE) == Err(RecvTimeoutError::Timeout) && channel.send(&Message::Pong).is_ok() {}
        };
        // Without a thread the work is done all the same.
        let _ = std::thread::Builder::new().name("pulse".into()).spawn_scoped(scope, pulse);
        let _working = working;
        work()
    })
}

fn act(
    agent: &Arc<Agent>,
    group: &Arc<Group>,
    channel: &mut Channel,
    receiver: &mut Receiver,
    action: ReceiverAction,
    mine: u64,
) -> Res<()> {
    let mut guard = lock(&group.standby);
    // Looked at again under the lock: whoever takes this connection's place does so under it.
    if group.connection.load(Ordering::SeqCst) != mine {
        return Err(superseded());
    }
    // A failover that did not come to its end leaves this side open, but what it has promoted takes nothing any more (S6).
    let role = group.ledger().record().map(|record| record.role);
    let standby = guard.as_mut().filter(|_| role == Some(Role::Standby)).ok_or_else(|| {
        Fault::new(
            Code::WrongRole,
            format!("group {}", group.name),
            "this host is no longer its standby",
            "see `doublure status`",
        )
    })?;
    match action {
        ReceiverAction::Send(message) => channel.send(&message),
        ReceiverAction::Define { spec } => {
            redefine(group, &spec)?;
            channel.send(&Message::Defined)
        }
        ReceiverAction::Begin { position, parent, parent_digest, landing, payload_max_bytes } => {
            standby.landing = landing;
            match landing {
                Landing::Direct => {
                    standby.apply_sealed(group)?;
                    let free = host::free_bytes(&agent.settings.volume_dir)?;
                    if payload_max_bytes / 8 > free {
                        tracing::warn!(group = %group.name, free, payload_max_bytes, "the first sync may not fit");
                    }
                    // Durable before the first byte: a replica that is neither empty nor whole is never promoted (S3).
                    group.edit_ledger(|record| {
                        record.syncing = true;
                        record.epoch = record.epoch.max(position.epoch);
                        Ok(())
                    })?;
                    group.with_live(|live| live.state = "receiving the first sync".into());
                    Ok(())
                }
                Landing::Journal => standby.journal.begin(position, parent, parent_digest, payload_max_bytes),
            }
        }
        ReceiverAction::Store { bytes } => {
            let len = bytes.len() as u64;
            let written = match standby.landing {
                Landing::Direct => {
                    apply::apply_direct(&bytes, &standby.spec, &standby.replicas, standby.engine.as_mut()).map_err(on_standby)?
                }
                Landing::Journal => {
                    standby.journal.append(&bytes, &standby.spec.volumes).map_err(on_standby)?;
                    len
                }
            };
            group.with_live(|live| {
                live.counters.bytes_sent += len;
                live.counters.bytes_written += written;
            });
            channel.send(&receiver.stored(len))
        }
        ReceiverAction::Segment { number } => {
            alive(channel, || apply::flush_replicas(&standby.replicas))?;
            channel.send(&Message::SegmentDone { number })
        }
        ReceiverAction::Commit { position, payload_bytes, payload_digest, digest, cut_at } => {
            let answer = alive(channel, || match standby.landing {
                Landing::Direct => {
                    let applied = apply::seal_direct(&standby.replicas, &mut group.ledger(), position, digest, cut_at)?;
                    let record = group.record()?;
                    // The journal's chain goes on from here.
                    let (journal, sealed) = open_journal(agent, group, &record)?;
                    standby.journal = journal;
                    standby.sealed = sealed;
                    standby.landing = Landing::Journal;
                    group.with_live(|live| live.applied = position);
                    receiver.committed(&applied)
                }
                Landing::Journal => {
                    let sealed = standby.journal.seal(payload_bytes, payload_digest, digest, cut_at).map_err(on_standby)?;
                    let answer = receiver.committed(&sealed)?;
                    standby.sealed.push(sealed);
                    // The comparison that made good for what was lost is sealed with this generation: from here on its redo makes
                    // the replica whole, whatever part of anything it held.
                    if group.record()?.syncing {
                        group.edit_ledger(|record| {
                            record.syncing = false;
                            Ok(())
                        })?;
                        group.with_live(|live| live.clear(Code::Corrupt));
                    }
                    Ok(answer)
                }
            })?;
            // Acknowledged first, applied afterwards: what is sealed survives either way.
            let sent = channel.send(&answer);
            group.with_live(|live| {
                live.counters.generations += 1;
                live.position = position;
                live.recoverable_to = cut_at;
                live.in_sync = true;
                live.state = "standby".into();
            });
            alive(channel, || standby.apply_when_due(group))?;
            sent
        }
        ReceiverAction::Unchanged { at } => {
            alive(channel, || standby.apply_when_due(group))?;
            group.with_live(|live| live.recoverable_to = live.recoverable_to.max(at));
            Ok(())
        }
        ReceiverAction::Drop { reason } => {
            tracing::info!(group = %group.name, "transfer given up: {reason}");
            match standby.landing {
                Landing::Journal => standby.journal.abandon(),
                Landing::Direct => Ok(()),
            }
        }
        ReceiverAction::SendDigests { volume, start, count } => {
            let index = usize::from(volume);
            let Some(replica) = standby.replicas.get(index) else {
                return Err(Fault::protocol(format!("volume number {volume} is not in the group")));
            };
            let blocks = replica.size_bytes().div_ceil(BLOCK_BYTES);
            if start.checked_add(count).is_none_or(|end| end > blocks) {
                return Err(Fault::protocol(format!("blocks {start}+{count} are past the volume's {blocks}")));
            }
            // What it stands for is what was acknowledged, not what happens to be applied.
            alive(channel, || standby.apply_sealed(group))?;
            let replica = &standby.replicas[index];
            verify::digests(standby.engine.as_mut(), replica, BlockRun { start, count }, &mut |start, digests| {
                channel.send(&Message::Digests { volume, start, digests })
            })?;
            channel.send(&Message::DigestsDone { volume })
        }
        ReceiverAction::Greet { .. } | ReceiverAction::Image(_) => {
            Err(Fault::protocol("the message does not belong in this conversation"))
        }
    }
}

/// A full disk here is the standby's full disk for the primary's reader.
fn on_standby(fault: Fault) -> Fault {
    match fault.code {
        Code::DiskFull => Fault { code: Code::StandbyDiskFull, ..fault },
        _ => fault,
    }
}

/// The primary says the definition again; containers and images may change, volumes may not.
fn redefine(group: &Group, bytes: &[u8]) -> Res<()> {
    let spec = parse_spec(bytes, group.id)?;
    let old = group.record()?.spec;
    if spec == old {
        return Ok(());
    }
    if spec.volumes != old.volumes || spec.name != old.name {
        return Err(Fault::new(
            Code::IdentityChanged,
            format!("group {}", group.name),
            "its volumes are not those that this standby keeps",
            "protect the changed set under a new group name",
        ));
    }
    group.edit_ledger(|record| {
        record.spec = spec.clone();
        Ok(())
    })
}
