//! A dockerd of a test's own: own network and mount namespaces, own containerd, data in a temporary directory, gone at the end.
//!
//! It shares the test's process namespace, so that `State.Pid` means the same to both. `--bridge=none` in the host's network
//! namespace would take the bridge of another daemon away, hence `unshare --net`; mounts of volumes vanish with the mount
//! namespace, whatever happened.
//!
//! Two variables choose what is tested: `DOUBLURE_TEST_DOCKER_PATH` is searched for dockerd and containerd before `PATH`, and
//! `DOUBLURE_TEST_CONTAINERD_STORE=1` turns containerd's image store on (dockerd 26 or later).

#![allow(dead_code)]

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A running dockerd. Dropping it ends its containers, itself and its containerd.
pub struct Dockerd {
    dir: tempfile::TempDir,
    /// containerd first, then dockerd.
    children: Vec<Child>,
}

impl Dockerd {
    /// Starts containerd and dockerd and waits until it answers. Panics with their logs when they do not.
    pub fn start() -> Dockerd {
        // Short, since paths of sockets are; on the disk, since overlay2 needs a file system that is not an overlay.
        let dir = tempfile::Builder::new().prefix("dbl-").tempdir_in("/var/tmp").expect("a directory for dockerd");
        let mut dockerd = Dockerd { dir, children: Vec::new() };
        let path = |name: &str| dockerd.dir.path().join(name).display().to_string();
        let containerd_store = std::env::var("DOUBLURE_TEST_CONTAINERD_STORE").is_ok_and(|on| on == "1");
        let features = if containerd_store { "{\"features\":{\"containerd-snapshotter\":true}}" } else { "{}" };
        std::fs::write(path("daemon.json"), features).unwrap();
        std::fs::write(path("containerd.toml"), format!("version = 2\nroot = {:?}\nstate = {:?}\n[grpc]\naddress = {:?}\n[ttrpc]\naddress = {:?}\n[plugins.\"io.containerd.grpc.v1.cri\"]\ndisable_tcp_service = true\n",
            path("ctd"), path("ctd-state"), path("ctd.sock"), path("ctd.ttrpc"))).unwrap();
        // One shell makes the namespaces, the daemons replace their shells: each pid that we hold is the daemon's own.
        let containerd = format!(
            "ip link set lo up; mount --make-rprivate /; exec containerd --config {} --log-level error",
            path("containerd.toml")
        );
        let first = dockerd.spawn(Command::new("unshare").args(["--net", "--mount", "sh", "-ec", &containerd]), "containerd.log");
        let target = first.to_string();
        dockerd.await_path("ctd.sock");
        let path = |name: &str| dockerd.dir.path().join(name).display().to_string();
        let arguments = [
            format!("--host=unix://{}", path("docker.sock")),
            format!("--data-root={}", path("data")),
            format!("--exec-root={}", path("exec")),
            format!("--pidfile={}", path("docker.pid")),
            format!("--config-file={}", path("daemon.json")),
            format!("--containerd={}", path("ctd.sock")),
            format!("--storage-driver={}", if containerd_store { "overlayfs" } else { "overlay2" }),
            "--log-level=warn".into(),
            "--userland-proxy=false".into(),
            "--shutdown-timeout=1".into(),
        ];
        let mut command = Command::new("nsenter");
        command.args(["--target", &target, "--net", "--mount", "--", "dockerd"]).args(arguments);
        dockerd.spawn(&mut command, "dockerd.log");
        let deadline = Instant::now() + Duration::from_secs(60);
        while !dockerd.cli_raw(&["version"]).status.success() {
            assert!(Instant::now() < deadline, "dockerd does not answer:\n{}", dockerd.logs());
            std::thread::sleep(Duration::from_millis(50));
        }
        dockerd
    }

    fn spawn(&mut self, command: &mut Command, log: &str) -> u32 {
        let log = std::fs::File::create(self.dir.path().join(log)).unwrap();
        if let Ok(first) = std::env::var("DOUBLURE_TEST_DOCKER_PATH") {
            command.env("PATH", format!("{first}:{}", std::env::var("PATH").unwrap_or_default()));
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).process_group(0);
        let child = command.spawn().expect("unshare, nsenter, containerd and dockerd installed");
        let pid = child.id();
        self.children.push(child);
        pid
    }

    fn await_path(&mut self, name: &str) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !self.dir.path().join(name).exists() {
            let ended = self.children.iter_mut().any(|child| child.try_wait().unwrap().is_some());
            assert!(!ended && Instant::now() < deadline, "{name} does not appear:\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What both daemons said.
    pub fn logs(&self) -> String {
        let read = |name: &str| std::fs::read_to_string(self.dir.path().join(name)).unwrap_or_default();
        format!("containerd: {}\ndockerd: {}", read("containerd.log"), read("dockerd.log"))
    }

    /// Whether images live in containerd's store, where an id is not a configuration's digest.
    pub fn has_containerd_store(&self) -> bool {
        self.cli(&["info", "--format", "{{json .DriverStatus}}"]).contains("io.containerd.snapshotter")
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("docker.sock")
    }

    /// A directory of its own for the test's files, removed with it.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The pid of dockerd; its namespaces can be entered through it.
    pub fn pid(&self) -> u32 {
        self.children[1].id()
    }

    fn cli_raw(&self, arguments: &[&str]) -> Output {
        Command::new("docker")
            .arg(format!("--host=unix://{}", self.socket().display()))
            .args(arguments)
            .env_remove("DOCKER_HOST")
            .env_remove("DOCKER_CONTEXT")
            .stdin(Stdio::null())
            .output()
            .expect("the docker command line")
    }

    /// Runs the docker command line against it; panics when it fails, gives its output trimmed.
    pub fn cli(&self, arguments: &[&str]) -> String {
        let output = self.cli_raw(arguments);
        assert!(output.status.success(), "docker {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_string()
    }

    /// Whether a command of the docker command line succeeds.
    pub fn cli_ok(&self, arguments: &[&str]) -> bool {
        self.cli_raw(arguments).status.success()
    }

    /// Imports an image of one busybox with `extra` files beside it and `changes` as of a Dockerfile. Gives its id.
    pub fn busybox(&self, name: &str, extra: &[(&str, &[u8])], changes: &[&str]) -> String {
        let busybox =
            ["/bin/busybox", "/usr/bin/busybox"].iter().find(|path| Path::new(path).exists()).expect("busybox-static installed");
        let mut archive = tar::Builder::new(Vec::new());
        let mut add = |path: &str, bytes: &[u8], mode: u32| {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(mode);
            archive.append_data(&mut header, path, bytes).unwrap();
        };
        let program = std::fs::read(busybox).unwrap();
        add("bin/busybox", &program, 0o755);
        for (path, bytes) in extra {
            add(path, bytes, 0o644);
        }
        for applet in ["sh", "sleep", "cat", "true", "false", "ls", "echo", "sync", "mkdir", "touch", "test", "nc", "env", "stat"]
        {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
            header.set_mode(0o777);
            archive.append_link(&mut header, format!("bin/{applet}"), "busybox").unwrap();
        }
        let file = self.dir.path().join("busybox.tar");
        std::fs::File::create(&file).unwrap().write_all(&archive.into_inner().unwrap()).unwrap();
        let mut arguments = vec!["import"];
        for change in changes {
            arguments.extend(["--change", change]);
        }
        let file = file.display().to_string();
        arguments.extend([file.as_str(), name]);
        self.cli(&arguments)
    }
}

/// Ends a process that we started and reaps it.
fn end(child: &mut Child, patience: Duration) {
    let signal = |name: &str, child: &Child| {
        let _ = Command::new("kill").args([name, &child.id().to_string()]).stderr(Stdio::null()).status();
    };
    if !matches!(child.try_wait(), Ok(None)) {
        return;
    }
    signal("-TERM", child);
    let deadline = Instant::now() + patience;
    while matches!(child.try_wait(), Ok(None)) {
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Drop for Dockerd {
    fn drop(&mut self) {
        if self.children.len() == 2 {
            let ids = String::from_utf8_lossy(&self.cli_raw(&["ps", "--all", "--quiet"]).stdout).to_string();
            let ids: Vec<&str> = ids.split_whitespace().collect();
            if !ids.is_empty() {
                self.cli_raw(&[&["rm", "--force", "--volumes"], ids.as_slice()].concat());
            }
        }
        // A shim that outlives its dockerd holds the mount namespace: found by the state directory in its own arguments.
        let mark = self.dir.path().join("ctd.sock").display().to_string();
        let mut left = Vec::new();
        for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).to_string();
            if line.contains("containerd-shim") && line.contains(&mark) {
                left.push(pid);
            }
        }
        for child in self.children.iter_mut().rev() {
            end(child, Duration::from_secs(10));
        }
        for pid in left {
            let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).stderr(Stdio::null()).status();
        }
    }
}
