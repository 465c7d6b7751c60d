//! The docker room against real dockerds: images that travel, containers made from recipes, volumes on devices, policy.

#[path = "common/dockerd.rs"]
mod dockerd;

use dockerd::Dockerd;
use doublure::docker::Docker;
use doublure::model::{Code, ContainerSpec, FileSystem};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn sh(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_string()
}

/// A loop device on a fresh ext4, behind a link; detached at the end.
struct Disk {
    device: String,
    link: PathBuf,
}

impl Disk {
    fn new(dir: &Path, name: &str) -> Disk {
        let file = dir.join(format!("{name}.img"));
        std::fs::File::create(&file).unwrap().set_len(32 << 20).unwrap();
        sh("mkfs.ext4", &["-q", "-F", file.to_str().unwrap()]);
        let device = sh("losetup", &["--find", "--show", file.to_str().unwrap()]);
        let link = dir.join(name);
        std::os::unix::fs::symlink(&device, &link).unwrap();
        Disk { device, link }
    }
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        std::fs::File::open(&self.device).unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.device]).status();
    }
}

/// Moves the image of a captured container from one dockerd to the other and gives its local id there.
fn carry(from: &Docker, to: &Docker, dir: &Path, spec: &ContainerSpec) -> String {
    let file = dir.join("image.tar");
    let (pin, bytes) = from.export_image(&spec.image.name, &file).unwrap();
    assert_eq!(pin, spec.image);
    assert_eq!(bytes, std::fs::metadata(&file).unwrap().len());
    to.import_image(&pin, &file).unwrap()
}

/// The inspect of a container without what is new in every container or on every daemon.
fn essence(dockerd: &Dockerd, name: &str) -> serde_json::Value {
    let mut all: serde_json::Value = serde_json::from_str(&dockerd.cli(&["container", "inspect", name])).unwrap();
    let mut one = all[0].take();
    let id = one["Id"].as_str().unwrap().to_string();
    for key in [
        "Id",
        "Created",
        "State",
        "ResolvConfPath",
        "HostnamePath",
        "HostsPath",
        "LogPath",
        "GraphDriver",
        "Mounts",
        "Path",
        "Args",
    ] {
        one.as_object_mut().unwrap().remove(key);
    }
    let host = one["HostConfig"].as_object_mut().unwrap();
    for key in ["Binds", "Mounts", "RestartPolicy", "NetworkMode"] {
        host.remove(key);
    }
    let labels = one["Config"]["Labels"].as_object_mut().unwrap();
    labels.retain(|name, _| !name.starts_with("doublure."));
    one["Config"]["Image"] = serde_json::Value::Null;
    for key in ["AttachStdout", "AttachStderr"] {
        one["Config"][key] = serde_json::Value::Null;
    }
    if one["Config"]["Hostname"] == id[..12] {
        one["Config"]["Hostname"] = serde_json::Value::Null;
    }
    let mut settings = serde_json::json!({});
    for (network, endpoint) in one["NetworkSettings"]["Networks"].as_object().unwrap() {
        let mut aliases = endpoint["Aliases"].as_array().cloned().unwrap_or_default();
        aliases.retain(|alias| alias != &id[..12]);
        settings[network] = serde_json::json!({"Aliases": aliases, "IPAMConfig": endpoint["IPAMConfig"]});
    }
    one["NetworkSettings"] = settings;
    without_empty(one)
}

/// dockerd says null or an empty list for the same nothing.
fn without_empty(value: serde_json::Value) -> serde_json::Value {
    use serde_json::Value;
    match value {
        Value::Object(members) => {
            let members = members.into_iter().map(|(key, value)| (key, without_empty(value)));
            let members: serde_json::Map<_, _> = members.filter(|(_, value)| !value.is_null()).collect();
            if members.is_empty() { Value::Null } else { Value::Object(members) }
        }
        Value::Array(items) if items.is_empty() => Value::Null,
        other => other,
    }
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn an_image_travels_and_is_proven_on_both_sides() {
    let (primary, standby) = (Dockerd::start(), Dockerd::start());
    let runtime = runtime();
    let from = Docker::connect(runtime.handle().clone(), &primary.socket()).unwrap();
    let to = Docker::connect(runtime.handle().clone(), &standby.socket()).unwrap();
    let id = primary.busybox("shop/app:1", &[("data/hello", b"hello")], &["CMD [\"sleep\",\"1000\"]"]);
    let file = primary.dir().join("image.tar");

    let (pin, _) = from.export_image("shop/app:1", &file).unwrap();
    let graph = !primary.has_containerd_store();
    assert_eq!(pin.config_digest == id, graph);
    assert_eq!(pin.name, "shop/app:1");
    let told: Vec<String> = serde_json::from_str(&primary.cli(&["inspect", "--format", "{{json .RootFS.Layers}}", &id])).unwrap();
    assert_eq!(pin.diff_ids, told);
    // By id, the name that people know is found all the same.
    assert_eq!(from.export_image(&id, &file).unwrap().0, pin);

    // A name on the standby that the archive must not move.
    let other = standby.busybox("shop/app:1", &[("data/other", b"other")], &[]);
    assert_eq!(to.find_image(&pin).unwrap(), None);
    let local = to.import_image(&pin, &file).unwrap();
    assert!(local == id || !graph);
    assert_eq!(to.find_image(&pin).unwrap(), Some(local.clone()));
    assert_eq!(to.import_image(&pin, &file).unwrap(), local, "twice is as good as once");
    // One who has proven nothing yet finds the same.
    let fresh = Docker::connect(runtime.handle().clone(), &standby.socket()).unwrap();
    assert_eq!(fresh.find_image(&pin).unwrap(), Some(local.clone()));
    assert_eq!(standby.cli(&["inspect", "--format", "{{.Id}}", "shop/app:1"]), other);
    let tag = format!("doublure.local/pin:{}", &pin.config_digest[7..19]);
    assert_eq!(standby.cli(&["inspect", "--format", "{{.Id}}", &tag]), local);
    assert_eq!(standby.cli(&["ps", "--all", "--quiet"]), "", "the throw-away container is gone");

    // The same layers under another configuration are another image.
    let mut wrong = pin.clone();
    wrong.config_digest = other;
    assert_eq!(to.import_image(&wrong, &file).unwrap_err().code, Code::ImageMismatch);
    let mut wrong = pin.clone();
    wrong.diff_ids.reverse();
    wrong.diff_ids.push(pin.config_digest.clone());
    assert_eq!(to.find_image(&wrong).unwrap(), None);
    assert_eq!(from.export_image("no/such:1", &file).unwrap_err().code, Code::ImageMissing);
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_tampered_archive_never_reaches_dockerd() {
    let (primary, standby) = (Dockerd::start(), Dockerd::start());
    let runtime = runtime();
    let from = Docker::connect(runtime.handle().clone(), &primary.socket()).unwrap();
    let to = Docker::connect(runtime.handle().clone(), &standby.socket()).unwrap();
    primary.busybox("shop/app:1", &[], &[]);
    let file = primary.dir().join("image.tar");
    let (pin, _) = from.export_image("shop/app:1", &file).unwrap();

    let bytes = std::fs::read(&file).unwrap();
    // In the middle of what is largest by far: the layer, compressed or not.
    let at = bytes.len() / 2;
    let mut handle = std::fs::OpenOptions::new().write(true).open(&file).unwrap();
    handle.seek(SeekFrom::Start(at as u64)).unwrap();
    handle.write_all(&[bytes[at] ^ 1]).unwrap();
    let fault = to.import_image(&pin, &file).unwrap_err();
    assert_eq!(fault.code, Code::ImageMismatch, "{fault}");

    // Cut short.
    std::fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    assert_eq!(to.import_image(&pin, &file).unwrap_err().code, Code::ImageMismatch);

    // Whole, but under a name of somebody else: `docker save` by the people's name.
    primary.cli(&["save", "--output", file.to_str().unwrap(), "shop/app:1"]);
    let fault = to.import_image(&pin, &file).unwrap_err();
    assert!(fault.code == Code::ImageMismatch && fault.cause.contains("shop/app:1"), "{fault}");

    assert_eq!(standby.cli(&["image", "ls", "--all", "--quiet"]), "", "dockerd has seen nothing of it");
    std::fs::write(&file, &bytes).unwrap();
    to.import_image(&pin, &file).unwrap();
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_container_is_made_again_from_its_recipe() {
    let (primary, standby) = (Dockerd::start(), Dockerd::start());
    let runtime = runtime();
    let from = Docker::connect(runtime.handle().clone(), &primary.socket()).unwrap();
    let to = Docker::connect(runtime.handle().clone(), &standby.socket()).unwrap();
    primary.busybox("shop/db:1", &[("var/lib/data/seed", b"seed")], &["ENTRYPOINT [\"/bin/false\"]", "USER 7"]);
    let here = Disk::new(primary.dir(), "pgdata");
    let there = Disk::new(standby.dir(), "pgdata");
    assert!(from.ensure_volume("pgdata", FileSystem::Ext4, &here.link, "noatime").unwrap());
    for dockerd in [&primary, &standby] {
        dockerd.cli(&["network", "create", "--subnet", "10.77.0.0/24", "shop"]);
        dockerd.cli(&["network", "create", "--subnet", "10.78.0.0/24", "back"]);
    }
    primary.cli(&[
        "create",
        "--name",
        "db",
        "--entrypoint",
        "",
        "--env",
        "PASSWORD=hunter2-secret",
        "--volume",
        "pgdata:/var/lib/data",
        "--network",
        "shop",
        "--ip",
        "10.77.0.9",
        "--network-alias",
        "database",
        "--restart",
        "always",
        "--memory",
        "64m",
        "--health-cmd",
        "test -f /var/lib/data/ready",
        "--health-interval",
        "1s",
        "--label",
        "tier=gold",
        "--publish",
        "8123:80",
        "--ulimit",
        "nofile=512:1024",
        "--init",
        "--read-only",
        "--tmpfs",
        "/run:size=1m",
        "--stop-timeout",
        "3",
        "--cap-drop",
        "ALL",
        "--security-opt",
        "no-new-privileges",
        "--dns",
        "10.9.9.9",
        "--add-host",
        "peer:10.1.2.3",
        "--log-opt",
        "max-size=1m",
        "--hostname",
        "database-host",
        "--user",
        "0:0",
        "shop/db:1",
        "sh",
        "-c",
        "touch /var/lib/data/ready; exec sleep 1000",
    ]);
    primary.cli(&["network", "connect", "--alias", "storage", "back", "db"]);

    let spec = from.capture("db").unwrap();
    assert_eq!((spec.name.as_str(), spec.image.name.as_str()), ("db", "shop/db:1"));
    assert!(!format!("{spec:?}").contains("hunter2-secret"));
    assert_eq!(doublure::docker::volumes_of(&spec).unwrap(), vec![("pgdata".to_string(), "/var/lib/data".to_string())]);
    let image = carry(&from, &to, standby.dir(), &spec);

    // The volume must be there first: dockerd would make an empty one.
    assert_eq!(to.ensure_container(&spec, &image).unwrap_err().code, Code::VolumeUnknown);
    assert_eq!(to.volume("pgdata").unwrap(), None);
    assert!(to.ensure_volume("pgdata", FileSystem::Ext4, &there.link, "noatime").unwrap());

    // NoCopy: the image has the directory, and yet the device stays as it is.
    let before = there.bytes();
    assert!(to.ensure_container(&spec, &image).unwrap());
    assert!(!to.ensure_container(&spec, &image).unwrap());
    assert!(there.bytes() == before, "the device was written to by the mere creation of its container");

    assert_eq!(essence(&primary, "db"), essence(&standby, "db"));
    let policy = "{{.HostConfig.RestartPolicy.Name}} {{.HostConfig.AutoRemove}} {{.State.Status}}";
    assert_eq!(standby.cli(&["container", "inspect", "--format", policy, "db"]), "no false created");
    assert_eq!(to.users_of_volume("pgdata").unwrap(), vec!["db"]);
    assert!(to.mounts_of("db").unwrap().contains(&("volume".to_string(), "pgdata".to_string())));

    // It runs on the device, and its health check passes.
    assert!(to.start("db").unwrap());
    assert!(!to.start("db").unwrap());
    to.await_health("db", Duration::from_secs(30)).unwrap();
    let state = to.state("db").unwrap();
    assert!(state.running && state.health.as_deref() == Some("healthy"), "{state:?}");
    let number = std::fs::read_to_string(format!("/sys/block/{}/dev", there.device.trim_start_matches("/dev/"))).unwrap();
    let table = std::fs::read_to_string(format!("/proc/{}/mountinfo", state.pid)).unwrap();
    let line = table.lines().find(|line| line.split(' ').nth(4) == Some("/var/lib/data")).unwrap();
    assert_eq!(line.split(' ').nth(2), Some(number.trim()), "{line}");
    assert!(to.kill("db").unwrap());
    assert!(!to.kill("db").unwrap());

    // Another recipe under the same name: made anew while it never ran, refused once it has.
    let mut changed = spec.clone();
    changed.inspect["Config"]["Env"] = serde_json::json!(["PASSWORD=another-secret"]);
    let fault = to.ensure_container(&changed, &image).unwrap_err();
    assert_eq!(fault.code, Code::NameTaken, "{fault}");
    standby.cli(&["rm", "--force", "db"]);
    assert!(to.ensure_container(&spec, &image).unwrap());
    assert!(to.ensure_container(&changed, &image).unwrap());
    standby.cli(&["rm", "--force", "db"]);
    standby.cli(&["create", "--name", "db", &image, "true"]);
    assert_eq!(to.ensure_container(&spec, &image).unwrap_err().code, Code::NameTaken);
    standby.cli(&["rm", "--force", "db"]);

    // Without its definition a network that is missing is named, before anything is made; with it, it is made again.
    standby.cli(&["network", "rm", "back", "shop"]);
    let mut bare = spec.clone();
    bare.inspect["DoublureNetworks"] = serde_json::json!({});
    let fault = to.ensure_container(&bare, &image).unwrap_err();
    assert!(fault.code == Code::DockerError && fault.thing.contains("shop"), "{fault}");
    assert!(!standby.cli_ok(&["container", "inspect", "db"]));
    assert!(to.ensure_container(&spec, &image).unwrap());
    for network in ["shop", "back"] {
        let format = "{{json .IPAM.Config}} {{.Driver}} {{.Internal}} {{json .Options}}";
        let [one, two] = [&primary, &standby].map(|dockerd| dockerd.cli(&["network", "inspect", "--format", format, network]));
        assert_eq!(one, two);
    }
    assert!(to.start("db").unwrap());
    to.await_health("db", Duration::from_secs(30)).unwrap();
    standby.cli(&["rm", "--force", "db"]);

    assert!(to.remove_volume("pgdata", &there.link).unwrap());
    assert!(!to.remove_volume("pgdata", &there.link).unwrap());
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_volume_is_never_taken_for_another() {
    let dockerd = Dockerd::start();
    let runtime = runtime();
    let docker = Docker::connect(runtime.handle().clone(), &dockerd.socket()).unwrap();
    let link = Path::new("/nowhere/doublure/vol");
    assert_eq!(docker.volume("vol").unwrap(), None);
    assert!(docker.ensure_volume("vol", FileSystem::Xfs, link, "").unwrap());
    assert!(!docker.ensure_volume("vol", FileSystem::Xfs, link, "").unwrap());
    let have = docker.volume("vol").unwrap().unwrap();
    assert_eq!(have.driver, "local");
    assert_eq!(have.options["device"], link.to_str().unwrap());

    for (fs, device, options) in
        [(FileSystem::Ext4, link, ""), (FileSystem::Xfs, Path::new("/nowhere/else"), ""), (FileSystem::Xfs, link, "noatime")]
    {
        let fault = docker.ensure_volume("vol", fs, device, options).unwrap_err();
        assert_eq!(fault.code, Code::NameTaken);
        assert!(fault.cause.contains("type=xfs") && fault.cause.contains(&device.display().to_string()), "{fault}");
    }
    dockerd.cli(&["volume", "create", "plain"]);
    assert_eq!(docker.ensure_volume("plain", FileSystem::Xfs, link, "").unwrap_err().code, Code::NameTaken);
    assert_eq!(docker.remove_volume("plain", link).unwrap_err().code, Code::NameTaken);
    assert!(docker.volume("plain").unwrap().is_some());

    dockerd.busybox("app:1", &[], &[]);
    dockerd.cli(&["create", "--name", "user", "--volume", "vol:/x", "app:1", "true"]);
    let fault = docker.remove_volume("vol", link).unwrap_err();
    assert!(fault.code == Code::VolumeInUse && fault.cause.contains("user"), "{fault}");
    assert_eq!(docker.users_of_volume("/x").unwrap_err().code, Code::BadArgument);
    assert!(docker.users_of_volume("x").unwrap().is_empty());
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_recipe_gets_no_rights_and_a_failure_no_secrets() {
    let dockerd = Dockerd::start();
    let runtime = runtime();
    let docker = Docker::connect(runtime.handle().clone(), &dockerd.socket()).unwrap();
    let id = dockerd.busybox("app:1", &[], &[]);
    let asks: [&[&str]; 8] = [
        &["--privileged"],
        &["--pid", "host"],
        &["--network", "host"],
        &["--ipc", "host"],
        &["--cap-add", "SYS_ADMIN"],
        &["--device", "/dev/null:/dev/x"],
        &["--security-opt", "seccomp=unconfined"],
        &["--volume", "/etc:/host"],
    ];
    for ask in asks {
        dockerd.cli(&[&["create", "--name", "bold", "--env", "KEY=hunter2-secret"], ask, &["app:1", "true"]].concat());
        let spec = docker.capture("bold").unwrap();
        dockerd.cli(&["rm", "bold"]);
        let fault = docker.ensure_container(&spec, &id).unwrap_err();
        assert_eq!(fault.code, Code::PolicyRefused, "{ask:?}: {fault}");
        assert!(!fault.to_string().contains("hunter2-secret"));
        assert!(!dockerd.cli_ok(&["container", "inspect", "bold"]), "{ask:?} was made all the same");
    }

    // A volume that is a path of this host in disguise, and one that is plain.
    dockerd.cli(&["create", "--name", "sly", "--volume", "disguise:/x", "app:1", "true"]);
    let sly = docker.capture("sly").unwrap();
    dockerd.cli(&["rm", "sly"]);
    assert_eq!(docker.ensure_container(&sly, &id).unwrap_err().code, Code::NameTaken);
    dockerd.cli(&["volume", "rm", "disguise"]);
    dockerd.cli(&["volume", "create", "--opt", "type=none", "--opt", "o=bind", "--opt", "device=/etc", "disguise"]);
    assert_eq!(docker.ensure_container(&sly, &id).unwrap_err().code, Code::PolicyRefused);

    // dockerd repeats what it does not like: a command that is not there, an environment that is none.
    dockerd.cli(&["create", "--name", "broken", "--env", "KEY=/no/hunter2-secret", "app:1", "/no/hunter2-secret"]);
    let spec = docker.capture("broken").unwrap();
    dockerd.cli(&["rm", "broken"]);
    assert!(docker.ensure_container(&spec, &id).unwrap());
    let fault = docker.start("broken").unwrap_err();
    assert_eq!(fault.code, Code::ContainerFailed);
    assert!(!fault.to_string().contains("hunter2-secret"), "{fault}");
    let fault = docker.await_health("broken", Duration::from_secs(5)).unwrap_err();
    assert_eq!(fault.code, Code::ContainerFailed);
    assert!(!fault.to_string().contains("hunter2-secret") && fault.cause.contains("***"), "{fault}");

    // One that ends at once, one that never gets healthy, one that says that it is not.
    dockerd.cli(&["run", "--detach", "--name", "short", "app:1", "sh", "-c", "exit 7"]);
    dockerd.cli(&["wait", "short"]);
    let fault = docker.await_health("short", Duration::from_secs(5)).unwrap_err();
    assert!(fault.code == Code::ContainerFailed && fault.cause.contains('7'), "{fault}");
    let health = ["--health-interval", "1s", "--health-retries", "1", "--health-cmd"];
    dockerd.cli(&[&["run", "--detach", "--name", "ill"], &health[..], &["false", "app:1", "sleep", "1000"]].concat());
    let fault = docker.await_health("ill", Duration::from_secs(30)).unwrap_err();
    assert!(fault.code == Code::ContainerFailed && fault.cause.contains("unhealthy"), "{fault}");
    dockerd.cli(&[&["run", "--detach", "--name", "slow"], &health[..], &["sleep 900", "app:1", "sleep", "1000"]].concat());
    // dockerd takes the beginning of an id for a name; we do not.
    let id = dockerd.cli(&["container", "inspect", "--format", "{{.Id}}", "slow"]);
    assert!(dockerd.cli_ok(&["container", "inspect", &id[..3]]));
    assert_eq!(docker.state(&id[..3]).unwrap_err().code, Code::DockerError);
    assert!(docker.state(&id[..12]).unwrap().running);
    let fault = docker.await_health("slow", Duration::from_millis(300)).unwrap_err();
    assert!(fault.code == Code::ContainerFailed && fault.cause.contains("not healthy after"), "{fault}");
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn no_dockerd_is_said_plainly() {
    let runtime = runtime();
    let fault = Docker::connect(runtime.handle().clone(), Path::new("/nowhere/docker.sock")).err().unwrap();
    assert_eq!(fault.code, Code::DockerError);
    assert!(fault.to_string().contains("/nowhere/docker.sock"), "{fault}");
}
