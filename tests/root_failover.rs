//! Failovers of a small group with the real hands: journal, ledger, loop devices, file systems, a dockerd of the test's own.

#[path = "common/dockerd.rs"]
mod dockerd;

use dockerd::Dockerd;
use doublure::delta;
use doublure::device::{self, DeviceFile};
use doublure::docker::Docker;
use doublure::durable::{FileStorage, Storage};
use doublure::failover::{self, Outcome, Report, Stage, StepReport};
use doublure::host;
use doublure::journal::{Journal, Overflow, Sealed};
use doublure::ledger::{Ledger, Record, SLOT_BYTES};
use doublure::model::{
    BLOCK_BYTES, BlockRun, Code, ContainerSpec, Digest, EngineKind, Exit, Fault, FileSystem, GroupSpec, Moment, Position, Res,
    Role, Uuid, VolumeSpec,
};
use doublure::role::{Peer, Plan, Step, plan_failover};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const SIZE: u64 = 16 << 20;
const CUT_AT: Moment = Moment(1_700_000_000_000);
const SEALED: Position = Position { epoch: 1, generation: 2 };
const BASE: Position = Position { epoch: 1, generation: 1 };

fn sh(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Nothing here is larger than the ring.
struct NoOverflow;

impl Overflow for NoOverflow {
    fn create(&mut self, position: Position, len_bytes: u64) -> Res<Box<dyn Storage>> {
        panic!("generation {position} of {len_bytes} bytes does not fit into the ring of the test")
    }
    fn existing(&mut self) -> Res<Vec<(Position, Box<dyn Storage>)>> {
        Ok(Vec::new())
    }
    fn remove(&mut self, _position: Position) -> Res<()> {
        Ok(())
    }
}

/// A standby with one dockerd and a group of two volumes and three containers.
struct World {
    dir: PathBuf,
    docker: Docker,
    dockerd: Dockerd,
    _runtime: tokio::runtime::Runtime,
    spec: GroupSpec,
    /// What the volumes hold at the sealed position.
    contents: Vec<Vec<u8>>,
}

impl World {
    fn new() -> World {
        let dockerd = Dockerd::start();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let docker = Docker::connect(runtime.handle().clone(), &dockerd.socket()).unwrap();
        let dir = dockerd.dir().join("standby");
        std::fs::create_dir(&dir).unwrap();
        dockerd.busybox("shop/app:1", &[("data/of-the-image", b"x")], &["CMD [\"sleep\",\"1000\"]"]);
        let (mut volumes, mut contents) = (Vec::new(), Vec::new());
        for (number, name) in ["pgdata", "files"].into_iter().enumerate() {
            let tree = dir.join("tree");
            std::fs::create_dir_all(&tree).unwrap();
            std::fs::write(tree.join("hello"), format!("hello from {name}")).unwrap();
            let file = dir.join("content.img");
            std::fs::File::create(&file).unwrap().set_len(SIZE).unwrap();
            sh("mkfs.ext4", &["-q", "-F", "-d", tree.to_str().unwrap(), file.to_str().unwrap()]);
            contents.push(std::fs::read(&file).unwrap());
            std::fs::remove_file(&file).unwrap();
            let id = Uuid([number as u8 + 1; 16]);
            volumes.push(VolumeSpec {
                id,
                name: name.into(),
                size_bytes: SIZE,
                fs: FileSystem::Ext4,
                mount_options: String::new(),
            });
        }
        let spec = GroupSpec { id: Uuid([9; 16]), name: "shop".into(), volumes, containers: Vec::new() };
        let mut world = World { dir, docker, dockerd, _runtime: runtime, spec, contents };
        world.spec.containers = vec![
            world.capture("db", &["--volume", "pgdata:/data:nocopy", "--env", "PW=hunter2-secret"], &[]),
            world.capture("web", &["--volume", "files:/srv", "--volume", "pgdata:/data:ro,nocopy"], &[]),
            world.capture("cache", &[], &[]),
        ];
        world
    }

    /// A container as a primary would have captured it. It and its volumes are gone afterwards.
    fn capture(&self, name: &str, options: &[&str], command: &[&str]) -> ContainerSpec {
        for volume in &self.spec.volumes {
            self.docker.ensure_volume(&volume.name, FileSystem::Ext4, Path::new("/nowhere/primary"), "").unwrap();
        }
        let create = ["create", "--name", name, "--restart", "always"];
        self.dockerd.cli(&[&create[..], options, &["shop/app:1"], command].concat());
        let spec = self.docker.capture(name).unwrap();
        self.dockerd.cli(&["rm", name]);
        self.spec.volumes.iter().for_each(|volume| {
            self.dockerd.cli(&["volume", "rm", &volume.name]);
        });
        spec
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
    fn images(&self) -> Vec<PathBuf> {
        self.spec.volumes.iter().map(|volume| self.path(&format!("{}.img", volume.id))).collect()
    }

    /// A standby that has committed one generation and applied nothing of it, with half of the next one in its journal.
    fn reset(&self) {
        for name in self.spec.containers.iter().map(|container| &container.name) {
            self.dockerd.cli_ok(&["rm", "--force", "--volumes", name]);
        }
        self.spec.volumes.iter().for_each(|volume| {
            self.dockerd.cli_ok(&["volume", "rm", &volume.name]);
        });
        self.detach();
        for path in self.images() {
            std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
        }
        for name in ["ledger", "journal"] {
            let _ = std::fs::remove_file(self.path(name));
        }
        let record = Record {
            role: Role::Standby,
            epoch: 1,
            spec: self.spec.clone(),
            peer: "primary".into(),
            committed: BASE,
            committed_digest: Digest([7; 32]),
            committed_cut_at: Moment(1),
            applied: BASE,
            applied_digest: Digest([7; 32]),
            applied_cut_at: Moment(1),
            syncing: false,
            images: Default::default(),
            last_failover: None,
        };
        let (mut ledger, _) = self.ledger();
        ledger
            .commit(&mut |slot| {
                *slot = Some(record.clone());
                Ok(())
            })
            .unwrap();
        let (mut journal, sealed) = self.journal(BASE);
        assert!(sealed.is_empty());
        let payload = self.payload();
        journal.begin(SEALED, BASE, Digest([7; 32]), payload.len() as u64).unwrap();
        journal.append(&payload, &self.spec.volumes).unwrap();
        let digest = Digest(*blake3::hash(&payload).as_bytes());
        journal.seal(payload.len() as u64, digest, Digest([8; 32]), CUT_AT).unwrap();
    }

    fn payload(&self) -> Vec<u8> {
        let mut payload = Vec::new();
        for (volume, content) in self.contents.iter().enumerate() {
            for (start, block) in content.chunks(BLOCK_BYTES as usize).enumerate() {
                if block.iter().any(|byte| *byte != 0) {
                    delta::encode(volume as u16, BlockRun { start: start as u64, count: 1 }, block, &mut payload);
                }
            }
        }
        payload
    }

    fn detach(&self) {
        for path in self.images().iter().filter(|path| path.exists()) {
            for device in host::loops_of(path).unwrap() {
                host::detach_loop(&device, Duration::from_secs(10)).unwrap();
            }
        }
    }

    fn ledger(&self) -> (Ledger, Option<Record>) {
        let (storage, _) = FileStorage::open_or_create(&self.path("ledger"), 2 * SLOT_BYTES).unwrap();
        Ledger::open(Box::new(storage)).unwrap()
    }
    fn journal(&self, applied: Position) -> (Journal, Vec<Sealed>) {
        let (storage, _) = FileStorage::open_or_create(&self.path("journal"), 64 << 20).unwrap();
        let (journal, recovered) = Journal::open(self.spec.id, Box::new(storage), Box::new(NoOverflow), applied).unwrap();
        (journal, recovered.sealed)
    }
    fn record(&self) -> Record {
        self.ledger().1.unwrap()
    }

    /// What an agent does that was just started: open, look, plan, run.
    fn failover(&self, on_step: &mut dyn FnMut(&StepReport)) -> Res<(Plan, Report)> {
        self.failover_from(on_step, &mut || Ok(()))
    }

    fn failover_from(&self, on_step: &mut dyn FnMut(&StepReport), release: &mut dyn FnMut() -> Res<()>) -> Res<(Plan, Report)> {
        let (mut ledger, record) = self.ledger();
        let (mut journal, sealed) = self.journal(record.unwrap().applied);
        let facts = failover::look(&ledger, &journal, &sealed, &self.docker, Peer::Unreachable, false)?;
        let plan = plan_failover(&facts)?;
        let report = self.run(&plan, &mut ledger, &mut journal, &sealed, on_step, release)?;
        Ok((plan, report))
    }

    fn run(
        &self,
        plan: &Plan,
        ledger: &mut Ledger,
        journal: &mut Journal,
        sealed: &[Sealed],
        on_step: &mut dyn FnMut(&StepReport),
        release: &mut dyn FnMut() -> Res<()>,
    ) -> Res<Report> {
        let replicas: Vec<DeviceFile> = self.images().iter().map(|path| DeviceFile::open(path, true).unwrap()).collect();
        let mut engine = device::engine(EngineKind::Auto, 8).unwrap();
        let stage = Stage {
            ledger,
            journal,
            replicas: &replicas,
            image_paths: &self.images(),
            engine: engine.as_mut(),
            docker: &self.docker,
            link_dir: &self.path("dev"),
            scratch_dir: &self.path("scratch"),
            health_timeout: Duration::from_secs(20),
            now: &|| Moment(CUT_AT.0 + 1500),
            release_standby: release,
        };
        failover::run(plan, stage, sealed, on_step)
    }

    /// The group serves from here, with the data of the sealed position.
    fn assert_serves(&self, context: &str) {
        for (container, path, want) in [("db", "/data/hello", "hello from pgdata"), ("web", "/srv/hello", "hello from files")] {
            assert_eq!(self.dockerd.cli(&["exec", container, "cat", path]), want, "{context}");
        }
        assert!(self.docker.state("cache").unwrap().running, "{context}");
        let record = self.record();
        assert_eq!((record.role, record.epoch, record.applied), (Role::Primary, 2, SEALED), "{context}");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for container in &self.spec.containers {
            self.dockerd.cli_ok(&["rm", "--force", "--volumes", &container.name]);
        }
        // Also in the middle of a failed test: a panic here would hide its cause.
        for path in self.images().iter().filter(|path| path.exists()) {
            for device in host::loops_of(path).unwrap_or_default() {
                let _ = host::detach_loop(&device, Duration::from_secs(10));
            }
        }
    }
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_group_fails_over_and_a_second_time_is_already_so() {
    let world = World::new();
    world.reset();
    let mut seen = Vec::new();
    let (plan, report) = world.failover(&mut |step| seen.push(step.clone())).unwrap();
    eprintln!("{plan}\nrto {} ms", report.rto_ms);
    report.steps.iter().for_each(|step| eprintln!("{:>6} ms  {:<10} {} {}", step.ms, step.outcome, step.step, step.detail));
    world.assert_serves("first");
    assert_eq!(report.exit(), Exit::Done);
    assert_eq!((report.epoch, report.position, report.recoverable_to), (2, SEALED, CUT_AT));
    assert_eq!(plan.expected_loss_ms(Moment(CUT_AT.0 + 1500)), Some(1500));
    assert_eq!(seen, report.steps);
    assert_eq!(report.steps.iter().map(|step| step.step.clone()).collect::<Vec<_>>(), plan.steps);
    for step in &report.steps {
        let changes = !matches!(step.step, Step::Check { .. } | Step::AwaitHealth { .. });
        assert_eq!(step.outcome, if changes { Outcome::Changed } else { Outcome::AlreadySo }, "{step:?}");
    }
    let kept = world.record().last_failover.unwrap();
    assert_eq!(kept["rto_ms"], serde_json::json!(report.rto_ms));
    assert!(!kept.to_string().contains("hunter2-secret"));

    let (plan_again, again) = world.failover(&mut |_| ()).unwrap();
    assert!(plan_again.steps.is_empty() && !again.changed());

    // The plan of the first time is void by now: the epoch moved on.
    let (mut ledger, record) = world.ledger();
    let (mut journal, sealed) = world.journal(record.unwrap().applied);
    assert!(sealed.is_empty(), "what is applied is released");
    let fault = world.run(&plan, &mut ledger, &mut journal, &sealed, &mut |_| (), &mut || Ok(())).unwrap_err();
    assert_eq!(fault.code, Code::GroupBusy, "{fault}");
    drop((ledger, journal));

    // Something died since: the same command brings it back, in the same epoch.
    world.dockerd.cli(&["kill", "db"]);
    let (plan, report) = world.failover(&mut |_| ()).unwrap();
    assert!(!plan.steps.iter().any(|step| matches!(step, Step::Fence { .. })));
    let changed: Vec<&Step> =
        report.steps.iter().filter(|step| step.outcome == Outcome::Changed).map(|step| &step.step).collect();
    assert_eq!(changed, [&Step::Start { name: "db".into() }]);
    world.assert_serves("after a container died");
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_crash_after_any_step_is_resumed_in_the_same_epoch() {
    let world = World::new();
    world.reset();
    let (plan, _) = world.failover(&mut |_| ()).unwrap();
    // After the last step there is nothing left to crash.
    for crash_at in 0..plan.steps.len() - 1 {
        world.reset();
        let mut done = 0;
        let crashed = catch_unwind(AssertUnwindSafe(|| {
            world.failover(&mut |_| {
                done += 1;
                if done == crash_at + 1 {
                    std::panic::resume_unwind(Box::new("crash"));
                }
            })
        }));
        assert!(crashed.is_err());
        let record = world.record();
        assert_eq!((record.role, record.epoch), (Role::Promoting, 2), "the fence is the first thing that is durable");
        let (_, report) = world.failover(&mut |_| ()).unwrap();
        let context = format!("crash after step {crash_at}: {}", plan.steps[crash_at]);
        assert_eq!(report.exit(), Exit::Done, "{context}");
        world.assert_serves(&context);
        // What was done before the crash is not done again.
        assert_eq!(report.steps[0].outcome, Outcome::AlreadySo, "{context}");
    }
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_prepared_standby_only_attaches_and_starts() {
    let world = World::new();
    world.reset();
    // As a standby is between failovers: replicas held against everybody, containers made and never started.
    let attached: Vec<_> = world.images().iter().map(|path| host::attach_loop(path, true).unwrap().0).collect();
    let mut held: Vec<_> = attached.iter().map(|device| host::hold_exclusive(&device.path, false).unwrap()).collect();
    for volume in &world.spec.volumes {
        assert!(world.docker.ensure_volume(&volume.name, volume.fs, &world.path("dev").join(&volume.name), "").unwrap());
    }
    for container in &world.spec.containers {
        let image = world.docker.find_image(&container.image).unwrap().unwrap();
        assert!(world.docker.ensure_container(container, &image).unwrap());
    }
    let mut release = || {
        held.clear();
        attached.iter().try_for_each(|device| host::detach_loop(device, Duration::from_secs(10)))
    };
    let (_, report) = world.failover_from(&mut |_| (), &mut release).unwrap();
    eprintln!("rto {} ms", report.rto_ms);
    world.assert_serves("prepared");
    for step in &report.steps {
        let prepared = matches!(step.step, Step::EnsureVolume { .. } | Step::EnsureContainer { .. });
        assert!(!prepared || step.outcome == Outcome::AlreadySo, "{step:?}");
    }
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn what_fails_is_named_and_the_rest_serves() {
    let mut world = World::new();
    let broken = world.capture("broken", &["--env", "PW=hunter2-secret"], &["sh", "-c", "exit 9"]);
    let absent = {
        let mut spec = world.capture("absent", &[], &[]);
        spec.image.config_digest = format!("sha256:{}", "0".repeat(64));
        spec
    };
    let bold = world.capture("bold", &["--privileged"], &[]);
    world.spec.containers.extend([broken, absent, bold]);
    world.reset();
    let (plan, report) = world.failover(&mut |_| ()).unwrap();
    assert!(plan.warnings.iter().any(|warning| warning.contains("absent")), "{:?}", plan.warnings);
    assert_eq!(report.exit(), Exit::Degraded);
    world.assert_serves("beside three that fail");
    assert_eq!(report.degraded.len(), 3, "{:?}", report.degraded);
    for (name, code) in [("broken", "CONTAINER_FAILED"), ("absent", "IMAGE_MISSING"), ("bold", "POLICY_REFUSED")] {
        assert!(report.degraded.iter().any(|line| line.contains(name) && line.contains(code)), "{name}: {:?}", report.degraded);
    }
    assert!(!serde_json::to_string(&report).unwrap().contains("hunter2-secret"));
    let of = |step: Step| report.steps.iter().find(|report| report.step == step).unwrap().outcome;
    assert_eq!(of(Step::EnsureContainer { name: "bold".into() }), Outcome::Failed);
    assert_eq!(of(Step::Start { name: "bold".into() }), Outcome::LeftOut);

    // A file system that nothing can repair takes its containers out, and nobody else.
    world.reset();
    world.contents[1] = vec![0xa5; SIZE as usize];
    world.contents[1][0..4].copy_from_slice(b"none");
    world.reset();
    let (_, report) = world.failover(&mut |_| ()).unwrap();
    assert_eq!(report.exit(), Exit::Degraded);
    assert!(report.degraded.iter().any(|line| line.starts_with("volume") || line.contains("files")), "{:?}", report.degraded);
    assert_eq!(world.dockerd.cli(&["exec", "db", "cat", "/data/hello"]), "hello from pgdata");
    assert_eq!(world.docker.find_state("web").unwrap(), None, "never on a volume that failed its check");
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn with_nothing_that_serves_the_role_stays_and_a_repetition_goes_on() {
    let mut world = World::new();
    world.spec.containers.truncate(1);
    world.reset();
    // Somebody else's container has the name.
    world.dockerd.cli(&["create", "--name", "db", "shop/app:1"]);
    let fault: Fault = world.failover(&mut |_| ()).unwrap_err();
    assert_eq!(fault.code, Code::NameTaken, "{fault}");
    let record = world.record();
    assert_eq!((record.role, record.epoch, record.applied), (Role::Promoting, 2, SEALED));
    world.dockerd.cli(&["rm", "db"]);
    let (_, report) = world.failover(&mut |_| ()).unwrap();
    assert_eq!(report.exit(), Exit::Done);
    assert_eq!(world.dockerd.cli(&["exec", "db", "cat", "/data/hello"]), "hello from pgdata");
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_container_that_sees_another_device_is_killed() {
    let mut world = World::new();
    world.spec.containers.truncate(1);
    world.reset();
    world.failover(&mut |_| ()).unwrap();
    world.dockerd.cli(&["kill", "db"]);
    // The name of the device leads elsewhere by now, and the container was started on that.
    let other = world.path("other.img");
    std::fs::write(&other, &world.contents[1]).unwrap();
    let (device, _) = host::attach_loop(&other, false).unwrap();
    struct Detach(host::LoopDevice);
    impl Drop for Detach {
        fn drop(&mut self) {
            let _ = host::detach_loop(&self.0, Duration::from_secs(10));
        }
    }
    let other = Detach(device);
    host::point_link(&world.path("dev").join("pgdata"), &other.0.path).unwrap();
    world.dockerd.cli(&["start", "db"]);
    assert_eq!(world.dockerd.cli(&["exec", "db", "cat", "/data/hello"]), "hello from files");
    // As after a crash between start and record.
    world
        .ledger()
        .0
        .commit(&mut |record| {
            record.as_mut().unwrap().role = Role::Promoting;
            Ok(())
        })
        .unwrap();
    let fault = world.failover(&mut |_| ()).unwrap_err();
    assert_eq!(fault.code, Code::IdentityChanged, "{fault}");
    assert!(!world.docker.state("db").unwrap().running);
    // The link is right again, so that the next try is, too.
    world.failover(&mut |_| ()).unwrap();
    assert_eq!(world.dockerd.cli(&["exec", "db", "cat", "/data/hello"]), "hello from pgdata");
}
