//! The steps of a plan, carried out in order.
//!
//! 1. fence: the higher epoch is durable before anything else happens (a crash from here on resumes in that epoch);
//! 2. the replica gets all that was committed, and what was not is dropped;
//! 3. the devices are attached, their file systems checked;
//! 4. Docker volumes and containers, of which the standby normally has all beforehand;
//! 5. starts in the order of the group, each followed by a look at what the container really sees;
//! 6. health, side by side;
//! 7. the role is recorded, with the report.
//!
//! Up to 2 a failure ends the failover. From 3 on it takes out one volume and the containers on it, and the others go on.

use crate::apply;
use crate::device::{DeviceFile, Engine};
use crate::docker::{self, Docker};
use crate::durable;
use crate::failover::mounted;
use crate::failover::report::{Outcome, Report, StepReport};
use crate::host::{self, LoopDevice};
use crate::journal::{Journal, Sealed};
use crate::ledger::{Ledger, Record};
use crate::model::{Code, ContainerSpec, Fault, GroupSpec, Moment, Res, Role, SealedProof, check_name};
use crate::role::{Plan, Step};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What a failover works with.
pub struct Stage<'a> {
    /// The group's ledger.
    pub ledger: &'a mut Ledger,
    /// The group's journal.
    pub journal: &'a mut Journal,
    /// The replicas, one per volume in the order of the group, writable.
    pub replicas: &'a [DeviceFile],
    /// Their files, in the same order.
    pub image_paths: &'a [PathBuf],
    /// How they are written.
    pub engine: &'a mut dyn Engine,
    /// The dockerd of this host.
    pub docker: &'a Docker,
    /// Where the links to devices are, one per Docker volume, named like it.
    pub link_dir: &'a Path,
    /// Where a file system may be mounted for its check.
    pub scratch_dir: &'a Path,
    /// How long a container may take to become healthy.
    pub health_timeout: Duration,
    /// The wall clock.
    pub now: &'a dyn Fn() -> Moment,
    /// Lets go of the exclusive read-only holds on the replicas.
    pub release_standby: &'a mut dyn FnMut() -> Res<()>,
}

/// Proof that this host's higher epoch is durable. Only [`fence`] makes it.
struct Fenced {
    _private: (),
}

/// Proof that the replicas hold exactly the plan's position. Only [`finish`] makes it.
struct Whole {
    _private: (),
}

/// What a step says when it went well: whether it changed anything, and what there is to tell.
type Done = (bool, String);

/// A failover under way.
struct Run<'a, 'b> {
    plan: &'b Plan,
    stage: Stage<'a>,
    spec: GroupSpec,
    on_step: &'b mut dyn FnMut(&StepReport),
    steps: Vec<StepReport>,
    /// Devices of the volumes that are attached, by name.
    devices: BTreeMap<String, LoopDevice>,
    /// What went wrong with a volume or container, by name.
    volume_faults: BTreeMap<String, Fault>,
    container_faults: BTreeMap<String, Fault>,
}

/// Carries the plan out. Every step can be repeated: after a crash at any point, look, plan and run again.
///
/// An error means that nothing serves (the epoch may be raised all the same, and a repetition goes on from there): those of the
/// fence and of the data, or the first cause when not one container runs. With some of them down the report says so
/// (`Exit::Degraded`).
pub fn run(plan: &Plan, stage: Stage<'_>, sealed: &[Sealed], on_step: &mut dyn FnMut(&StepReport)) -> Res<Report> {
    let begun = Instant::now();
    let started_at = (stage.now)();
    let record = stage.ledger.record().ok_or_else(|| Fault::internal("the group's ledger", "it has no record"))?;
    let spec = record.spec.clone();
    if stage.image_paths.len() != spec.volumes.len() || stage.replicas.len() != spec.volumes.len() {
        return Err(Fault::internal("a failover", "replicas and volumes are not the same number"));
    }
    spec.volumes.iter().try_for_each(|volume| check_name("volume", &volume.name))?;
    let mut run = Run {
        plan,
        stage,
        spec,
        on_step,
        steps: Vec::new(),
        devices: BTreeMap::new(),
        volume_faults: BTreeMap::new(),
        container_faults: BTreeMap::new(),
    };
    let mut report = Report {
        group: plan.group.clone(),
        epoch: plan.epoch,
        position: plan.position,
        recoverable_to: plan.recoverable_to,
        fencing: plan.fencing,
        started_at,
        rto_ms: 0,
        steps: Vec::new(),
        degraded: Vec::new(),
    };
    if plan.steps.is_empty() {
        return Ok(report);
    }
    let fenced = run.fence()?;
    let whole = run.finish(&fenced, sealed)?;
    run.serve(&whole)?;
    report.rto_ms = begun.elapsed().as_millis() as u64;
    report.degraded = run.degraded();
    run.record(&fenced, report)
}

impl Run<'_, '_> {
    /// Carries one step out, measures and reports it. A failure is reported and handed on.
    fn step(&mut self, step: Step, work: impl FnOnce(&mut Self) -> Res<Done>) -> Res<()> {
        let begun = Instant::now();
        let result = work(self);
        self.tell(step, result, begun.elapsed())
    }

    fn tell(&mut self, step: Step, result: Res<Done>, took: Duration) -> Res<()> {
        let (outcome, detail) = match &result {
            Ok((true, detail)) => (Outcome::Changed, detail.clone()),
            Ok((false, detail)) => (Outcome::AlreadySo, detail.clone()),
            Err(fault) => (Outcome::Failed, fault.to_string()),
        };
        self.put(StepReport { step, outcome, detail, ms: took.as_millis() as u64 });
        result.map(drop)
    }

    fn leave_out(&mut self, step: Step, detail: &str) {
        self.put(StepReport { step, outcome: Outcome::LeftOut, detail: detail.to_string(), ms: 0 });
    }

    fn put(&mut self, report: StepReport) {
        (self.on_step)(&report);
        self.steps.push(report);
    }

    /// Step 1. The plan is void when the ledger moved since it was made: two failovers at once, and the other one won.
    fn fence(&mut self) -> Res<Fenced> {
        let plan = self.plan;
        let stale = |record: &Record| {
            Fault::new(
                Code::GroupBusy,
                format!("group {}", plan.group),
                format!(
                    "it is {:?} in epoch {} by now; this plan was made in epoch {}",
                    record.role, record.epoch, plan.from_epoch
                ),
                "repeat the command: it plans anew",
            )
        };
        let record = self.stage.ledger.record().ok_or_else(|| Fault::internal("the group's ledger", "it has no record"))?;
        let Some(Step::Fence { epoch }) = plan.steps.first() else {
            // A primary by an earlier failover, of which something does not run.
            let same = record.role == Role::Primary && record.epoch == plan.epoch;
            return if same { Ok(Fenced { _private: () }) } else { Err(stale(record)) };
        };
        let epoch = *epoch;
        let resumed = record.role == Role::Promoting && record.epoch == epoch;
        let fresh = record.role == Role::Standby && record.epoch == plan.from_epoch && epoch > record.epoch;
        if !(resumed || fresh) || epoch != plan.epoch {
            return Err(stale(record));
        }
        self.step(Step::Fence { epoch }, |run| {
            if resumed {
                return Ok((false, String::new()));
            }
            run.stage.ledger.commit(&mut |record| {
                let record = record.as_mut().ok_or_else(|| Fault::internal("the group's ledger", "it has no record"))?;
                record.role = Role::Promoting;
                record.epoch = epoch;
                Ok(())
            })?;
            Ok((true, plan.fencing.to_string()))
        })?;
        Ok(Fenced { _private: () })
    }

    /// Step 2. Nothing is written to a replica on which a file system is mounted.
    fn finish(&mut self, _fenced: &Fenced, sealed: &[Sealed]) -> Res<Whole> {
        let plan = self.plan;
        let applied = |run: &Self| run.stage.ledger.record().map(|record| record.applied).unwrap_or_default();
        if let Some(step) = plan.steps.iter().find(|step| matches!(step, Step::FinishApply { .. })) {
            self.step(step.clone(), |run| {
                run.refuse_mounted()?;
                let mut count = 0;
                for one in sealed.iter().filter(|one| one.position() <= plan.position) {
                    if one.position() > applied(run) {
                        let stage = &mut run.stage;
                        apply::apply(stage.journal, one, &run.spec, stage.replicas, stage.engine, stage.ledger)?;
                        count += 1;
                    }
                }
                Ok((count > 0, format!("{count} applied")))
            })?;
        }
        if let Some(step) = plan.steps.iter().find(|step| matches!(step, Step::DropUncommitted)) {
            self.step(step.clone(), |run| {
                let open = run.stage.journal.open_generation();
                run.stage.journal.abandon()?;
                Ok((open.is_some(), open.map(|(position, bytes)| format!("{position}, {bytes} bytes")).unwrap_or_default()))
            })?;
        }
        // A crash may have come between an apply and its release.
        let done = applied(self);
        if sealed.iter().any(|one| one.position() <= done) {
            self.stage.journal.release(done)?;
        }
        let record = self.stage.ledger.record().ok_or_else(|| Fault::internal("the group's ledger", "it has no record"))?;
        if record.role == Role::Promoting && record.applied != plan.position {
            let cause = format!("the replica is at {}, the plan says {}", record.applied, plan.position);
            return Err(Fault::new(Code::GroupBusy, format!("group {}", plan.group), cause, "repeat the command: it plans anew"));
        }
        Ok(Whole { _private: () })
    }

    fn refuse_mounted(&self) -> Res<()> {
        for (path, volume) in self.stage.image_paths.iter().zip(&self.spec.volumes) {
            for device in host::loops_of(path)? {
                if let Some(mount) = host::mounts_of(device.identity.major, device.identity.minor)?.first() {
                    let cause =
                        format!("its replica is mounted at {}, and not everything committed is on it", mount.path.display());
                    let next = "stop what uses it, then repeat the command";
                    return Err(Fault::new(Code::VolumeInUse, format!("volume {}", volume.name), cause, next));
                }
            }
        }
        Ok(())
    }

    /// Steps 3 to 6.
    fn serve(&mut self, _whole: &Whole) -> Res<()> {
        (self.stage.release_standby)()?;
        durable::private_dir(self.stage.link_dir)?;
        self.attach();
        self.check();
        for step in self.plan.steps.clone() {
            match step {
                Step::EnsureVolume { ref name } => self.ensure_volume(step.clone(), name),
                Step::EnsureContainer { ref name } => self.on_container(step.clone(), name, Self::ensure_container),
                Step::Start { ref name } => self.on_container(step.clone(), name, Self::start),
                _ => {}
            }
        }
        self.await_health();
        Ok(())
    }

    /// The volumes that the plan has a step of this kind for and that are well so far, with their place in the group.
    fn volumes_for(&self, wanted: impl Fn(&Step) -> Option<&String>) -> Vec<(usize, Step)> {
        let steps = self.plan.steps.iter().filter_map(|step| Some((wanted(step)?, step)));
        let place = |name: &String| self.spec.volumes.iter().position(|volume| volume.name == *name);
        let well = steps.filter(|(name, _)| !self.volume_faults.contains_key(*name));
        well.filter_map(|(name, step)| Some((place(name)?, step.clone()))).collect()
    }

    fn attach(&mut self) {
        let wanted = self.volumes_for(|step| if let Step::Attach { volume } = step { Some(volume) } else { None });
        let (paths, volumes, link_dir) = (self.stage.image_paths, &self.spec.volumes, self.stage.link_dir);
        let done = side_by_side(&wanted, |(at, _)| {
            let (device, attached) = host::attach_loop(&paths[*at], false)?;
            let linked = host::point_link(&link_dir.join(&volumes[*at].name), &device.path)?;
            Ok((device, attached || linked))
        });
        for ((at, step), (result, took)) in wanted.into_iter().zip(done) {
            let name = self.spec.volumes[at].name.clone();
            let result = result.map(|(device, changed)| {
                let path = device.path.display().to_string();
                self.devices.insert(name.clone(), device);
                (changed, path)
            });
            if let Err(fault) = self.tell(step, result, took) {
                self.volume_faults.insert(name, fault);
            }
        }
    }

    fn check(&mut self) {
        let wanted = self.volumes_for(|step| if let Step::Check { volume } = step { Some(volume) } else { None });
        let (volumes, devices, scratch_dir) = (&self.spec.volumes, &self.devices, self.stage.scratch_dir);
        let done = side_by_side(&wanted, |(at, _)| {
            let volume = &volumes[*at];
            let device = devices.get(&volume.name).ok_or_else(|| Fault::internal("a failover", "a check before its attach"))?;
            // Mounted: a repetition, and the container of the first time serves already.
            match host::mounts_of(device.identity.major, device.identity.minor)?.first() {
                Some(_) => Ok((false, "in use".to_string())),
                None => {
                    let changed = host::check_fs(&device.path, volume.fs, &scratch_dir.join(volume.id.to_string()))?;
                    Ok((changed, String::from(if changed { "journal replayed" } else { "clean" })))
                }
            }
        });
        for ((at, step), (result, took)) in wanted.into_iter().zip(done) {
            let name = self.spec.volumes[at].name.clone();
            if let Err(fault) = self.tell(step, result, took) {
                self.volume_faults.insert(name, fault);
            }
        }
    }

    fn ensure_volume(&mut self, step: Step, name: &str) {
        if let Some(fault) = self.volume_faults.get(name) {
            let detail = fault.to_string();
            return self.leave_out(step, &detail);
        }
        let result = self.step(step, |run| {
            let volume = run.spec.volumes.iter().find(|volume| volume.name == name);
            let volume = volume.ok_or_else(|| Fault::internal("a failover", "a volume that the group does not have"))?;
            let link = run.stage.link_dir.join(name);
            Ok((run.stage.docker.ensure_volume(name, volume.fs, &link, &volume.mount_options)?, String::new()))
        });
        if let Err(fault) = result {
            self.volume_faults.insert(name.to_string(), fault);
        }
    }

    /// A step of one container, unless it or one of its volumes failed before.
    fn on_container(&mut self, step: Step, name: &str, work: fn(&Self, &ContainerSpec) -> Res<Done>) {
        if let Some(fault) = self.container_faults.get(name) {
            let detail = fault.to_string();
            return self.leave_out(step, &detail);
        }
        let result = self.step(step, |run| {
            let spec = run.spec.containers.iter().find(|container| container.name == name);
            let spec = spec.ok_or_else(|| Fault::internal("a failover", "a container that the group does not have"))?;
            work(run, spec)
        });
        if let Err(fault) = result {
            self.container_faults.insert(name.to_string(), fault);
        }
    }

    fn ensure_container(&self, spec: &ContainerSpec) -> Res<Done> {
        let thing = || format!("container {}", spec.name);
        for (volume, _) in docker::volumes_of(spec)? {
            if !self.spec.volumes.iter().any(|known| known.name == volume) {
                let cause = format!("its recipe mounts volume {volume}, which is not of this group");
                return Err(Fault::new(Code::PolicyRefused, thing(), cause, "protect that volume with the group"));
            }
            if let Some(fault) = self.volume_faults.get(&volume) {
                let cause = format!("volume {volume} cannot be used: {}", fault.cause);
                return Err(Fault::new(fault.code, thing(), cause, fault.next.clone()));
            }
        }
        let missing =
            || Fault::new(Code::ImageMissing, thing(), "its pinned image is not on this host", "import the image, then repeat");
        let image = self.stage.docker.find_image(&spec.image)?.ok_or_else(missing)?;
        Ok((self.stage.docker.ensure_container(spec, &image)?, String::new()))
    }

    /// Starts a container and looks at the devices that it sees. One that sees another device is killed at once.
    fn start(&self, spec: &ContainerSpec) -> Res<Done> {
        let changed = self.stage.docker.start(&spec.name)?;
        let result = self.look_inside(spec);
        if result.is_err() {
            self.stage.docker.kill(&spec.name)?;
        }
        result.map(|detail| (changed, detail))
    }

    fn look_inside(&self, spec: &ContainerSpec) -> Res<String> {
        let state = self.stage.docker.state(&spec.name)?;
        let mountinfo = match state.pid {
            0 => None,
            pid => std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).ok().filter(|table| !table.is_empty()),
        };
        // It ended already: the wait for its health says so.
        let Some(mountinfo) = mountinfo else { return Ok("it has ended already".into()) };
        for (volume, destination) in docker::volumes_of(spec)? {
            let want = self.devices.get(&volume).map(|device| (device.identity.major, device.identity.minor));
            let have = mounted::device_at(&mountinfo, &destination);
            if want.is_none() || have != want {
                // The process may have ended while its table was read.
                if !self.stage.docker.state(&spec.name)?.running {
                    return Ok("it has ended already".into());
                }
                let show = |device: Option<(u32, u32)>| {
                    device.map_or("nothing".into(), |(major, minor)| format!("device {major}:{minor}"))
                };
                let cause =
                    format!("it sees {} at {destination} where volume {volume} is {}; it was killed", show(have), show(want));
                let next = "see `docker volume inspect` and `losetup`, then repeat the command";
                return Err(Fault::new(Code::IdentityChanged, format!("container {}", spec.name), cause, next));
            }
        }
        Ok(String::new())
    }

    fn await_health(&mut self) {
        let mut wanted = Vec::new();
        for step in self.plan.steps.clone() {
            if let Step::AwaitHealth { name } = &step {
                match self.container_faults.get(name).map(Fault::to_string) {
                    Some(detail) => self.leave_out(step, &detail),
                    None => wanted.push((name.clone(), step)),
                }
            }
        }
        let (docker, patience) = (self.stage.docker, self.stage.health_timeout);
        let done = side_by_side(&wanted, |(name, _)| docker.await_health(name, patience).map(|_| (false, String::new())));
        for ((name, step), (result, took)) in wanted.into_iter().zip(done) {
            if let Err(fault) = self.tell(step, result, took) {
                self.container_faults.insert(name, fault);
            }
        }
    }

    fn degraded(&self) -> Vec<String> {
        // A container's fault already tells of its volume; a volume that no container needs is told here.
        self.volume_faults.values().chain(self.container_faults.values()).map(Fault::to_string).collect()
    }

    /// Step 7. With nothing that serves the role stays as it is, so that a repetition goes on from here.
    fn record(&mut self, _fenced: &Fenced, mut report: Report) -> Res<Report> {
        let containers = self.spec.containers.len();
        let nothing_serves =
            if containers > 0 { self.container_faults.len() == containers } else { !self.volume_faults.is_empty() };
        if nothing_serves && let Some(fault) = self.volume_faults.values().chain(self.container_faults.values()).next() {
            return Err(fault.clone());
        }
        report.steps = self.steps.clone();
        let value = serde_json::to_value(&report).map_err(|e| Fault::internal("the report of a failover", e.to_string()))?;
        let group = report.group.clone();
        self.step(Step::Record, |run| {
            let mut changed = false;
            run.stage.ledger.commit(&mut |record| {
                let record =
                    record.as_mut().ok_or_else(|| Fault::internal(format!("the ledger of group {group}"), "it has no record"))?;
                changed = record.role != Role::Primary;
                record.role = Role::Primary;
                record.last_failover = Some(value.clone());
                Ok(())
            })?;
            Ok((changed, String::new()))
        })?;
        report.steps = self.steps.clone();
        Ok(report)
    }
}

/// Does the same work for each of a few things at once, and measures each; results in the order of the things.
fn side_by_side<T: Sync, R: Send>(things: &[T], work: impl Fn(&T) -> Res<R> + Sync) -> Vec<(Res<R>, Duration)> {
    std::thread::scope(|scope| {
        let timed = |thing| {
            let begun = Instant::now();
            (work(thing), begun.elapsed())
        };
        let threads: Vec<_> = things.iter().map(|thing| scope.spawn(move || timed(thing))).collect();
        let panicked = |_| (Err(Fault::internal("a failover", "a thread of it panicked")), Duration::ZERO);
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect()
    })
}
