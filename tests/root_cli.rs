//! Who is not root is turned away twice: by the command, and by the socket's own look at who knocks.

use doublure::control::{Handler, Server, socket_in};
use doublure::model::Exit;
use serde_json::json;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const NOBODY: [&str; 4] = ["--reuid=65534", "--regid=65534", "--clear-groups", "--"];

fn as_nobody(words: &[&str]) -> Output {
    Command::new("setpriv").args(NOBODY).args(words).output().unwrap()
}

/// Where this program, started once more as nobody, is to knock.
const KNOCK_AT: &str = "DOUBLURE_TEST_KNOCK_AT";

/// Asks for the status over the bare socket and prints what it hears.
fn knock_and_tell(socket: &Path) {
    let heard = UnixStream::connect(socket).and_then(|mut stream| {
        stream.write_all(b"{\"version\":1,\"verb\":\"status\"}\n")?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        Ok(answer)
    });
    println!("\nheard: {}", heard.unwrap_or_else(|e| format!("{:?}", e.kind())).trim_end());
}

fn open_to_all(path: &Path) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn who_is_not_root_is_refused_by_command_and_socket() {
    if let Some(socket) = std::env::var_os(KNOCK_AT) {
        return knock_and_tell(Path::new(&socket));
    }
    assert!(nix::unistd::geteuid().is_root(), "run it with sudo");
    let dir = tempfile::tempdir().unwrap();
    open_to_all(dir.path());
    // A copy, since the build directory may be closed to others.
    let binary = dir.path().join("doublure");
    std::fs::copy(env!("CARGO_BIN_EXE_doublure"), &binary).unwrap();
    let binary = binary.to_str().unwrap();
    let run_dir = dir.path().join("run");
    let config = dir.path().join("doublure.toml");
    std::fs::write(&config, format!("host = \"alpha\"\nrun_dir = \"{}\"\n", run_dir.display())).unwrap();
    let config = config.to_str().unwrap();

    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let handler: Handler = Arc::new(move |_, _| {
        count.fetch_add(1, Ordering::SeqCst);
        Ok((json!({}), Exit::Done))
    });
    let socket = socket_in(&run_dir);
    let server = Server::bind(&socket).unwrap();
    std::thread::spawn(move || server.run(handler));

    // The command, for every verb that asks; help and version are for anybody.
    let verbs: [&[&str]; 9] = [
        &["agent"],
        &["status"],
        &["status", "--watch"],
        &["pair"],
        &["volume", "list"],
        &["protect", "g", "--volume", "a"],
        &["sync", "g"],
        &["failover", "g"],
        &["verify", "g"],
    ];
    for verb in verbs {
        let out = as_nobody(&[&[binary], verb, &["--config", config]].concat());
        assert_eq!(out.status.code(), Some(2), "{verb:?}");
        let said = String::from_utf8(out.stderr).unwrap();
        assert!(said.contains("sudo doublure") && said.ends_with("[NOT_ROOT]\n"), "{verb:?}: {said}");
    }
    for words in [[binary, "--version"], [binary, "--help"]] {
        assert_eq!(as_nobody(&words).status.code(), Some(0), "{words:?}");
    }

    // The socket: first its place keeps others out, then, were that ever open, its look at who knocks does.
    let knocker = dir.path().join("knocker");
    std::fs::copy(std::env::current_exe().unwrap(), &knocker).unwrap();
    let knock = || {
        let own_name = "who_is_not_root_is_refused_by_command_and_socket";
        let mut command = Command::new("setpriv");
        command.args(NOBODY).arg(&knocker).args(["--ignored", "--exact", own_name, "--nocapture"]);
        let out = command.env(KNOCK_AT, &socket).output().unwrap();
        String::from_utf8(out.stdout).unwrap()
    };
    let heard = knock();
    assert!(heard.contains("heard: PermissionDenied"), "{heard}");
    open_to_all(&run_dir);
    open_to_all(&socket);
    let heard = knock();
    let answer = heard.lines().find_map(|l| l.split_once("heard: ")).unwrap_or_else(|| panic!("{heard}")).1;
    let answer: serde_json::Value = serde_json::from_str(answer).unwrap_or_else(|e| panic!("{e}: {heard}"));
    assert_eq!((answer["event"].as_str(), answer["fault"]["code"].as_str()), (Some("failed"), Some("NOT_ROOT")));
    assert!(answer["fault"]["cause"].as_str().unwrap().contains("user 65534"), "{answer}");

    assert_eq!(asked.load(Ordering::SeqCst), 0, "no request of theirs reached the handler");
    let out = Command::new(binary).args(["status", "--config", config]).output().unwrap();
    assert_eq!((out.status.code(), asked.load(Ordering::SeqCst)), (Some(0), 1), "root is served");
}

/// A host of our own in a directory; what an agent of it leaves in the kernel goes when the test ends, however it ends.
struct Host {
    dir: tempfile::TempDir,
    pins: std::path::PathBuf,
    agent: Option<std::process::Child>,
}

impl Host {
    fn new(name: &str) -> Host {
        let dir = tempfile::tempdir().unwrap();
        let pins = Path::new("/sys/fs/bpf").join(format!("doublure-test-{name}-{}", std::process::id()));
        let (at, pinned) = (dir.path().display(), pins.display());
        let config = format!("host = \"alpha\"\nstate_dir = \"{at}/state\"\nrun_dir = \"{at}/run\"\npin_dir = \"{pinned}\"\n");
        std::fs::write(dir.path().join("doublure.toml"), config).unwrap();
        Host { dir, pins, agent: None }
    }
    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_doublure"));
        command.args(words).arg("--config").arg(self.dir.path().join("doublure.toml")).stdin(std::process::Stdio::null());
        command
    }
    fn run(&self, words: &[&str]) -> (Option<i32>, String, String) {
        let out = self.command(words).output().unwrap();
        (out.status.code(), String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(agent) = &mut self.agent {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        let _ = std::fs::remove_dir_all(&self.pins);
    }
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn the_doctor_looks_for_itself_where_no_agent_runs() {
    let host = Host::new("doctor");
    let (code, said, complaint) = host.run(&["doctor", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}{complaint}"));
    let checks = value["checks"].as_array().unwrap();
    let outcome = |wanted: &str| checks.iter().filter(|c| c["outcome"] == wanted).count();
    let wanted = match (outcome("failed"), outcome("degraded")) {
        (0, 0) => 0,
        (0, _) => 4,
        _ => 3,
    };
    assert_eq!((code, complaint.as_str()), (Some(wanted), ""));
    assert_eq!(outcome("ok") + outcome("failed") + outcome("degraded"), checks.len());
    let (code, said, _) = host.run(&["doctor"]);
    assert_eq!(code, Some(wanted));
    for check in checks {
        assert!(said.contains(check["name"].as_str().unwrap()), "{said}");
    }
    assert_eq!(std::fs::read_dir(host.dir.path()).unwrap().count(), 1, "nothing was made beside the configuration");
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn an_agent_answers_from_its_readiness_until_it_is_told_to_stop() {
    let mut host = Host::new("agent");
    let notified = host.dir.path().join("notify");
    let manager = std::os::unix::net::UnixDatagram::bind(&notified).unwrap();
    manager.set_read_timeout(Some(std::time::Duration::from_secs(120))).unwrap();
    let log = std::fs::File::create(host.dir.path().join("log")).unwrap();
    host.agent = Some(host.command(&["agent"]).env("NOTIFY_SOCKET", &notified).stderr(log).spawn().unwrap());
    let mut said = [0; 64];
    let log = || std::fs::read_to_string(host.dir.path().join("log")).unwrap();
    let got = manager.recv(&mut said).unwrap_or_else(|e| panic!("{e}: {}", log()));
    assert_eq!(&said[..got], b"READY=1\n");

    let (code, said, complaint) = host.run(&["status", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}{complaint}"));
    assert_eq!((code, value["host"].as_str(), value["groups"].as_array().map(Vec::len)), (Some(0), Some("alpha"), Some(0)));
    for verb in ["sync", "failover", "verify"] {
        let (code, _, complaint) = host.run(&[verb, "nowhere"]);
        assert!(code == Some(2) && complaint.ends_with("[GROUP_UNKNOWN]\n"), "{verb}: {complaint}");
    }
    let (code, _, complaint) = host.run(&["agent"]);
    assert!(code == Some(5) && complaint.ends_with("[STATE_DIR_HELD]\n"), "a second agent: {complaint}");

    let agent = host.agent.as_mut().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(agent.id() as i32), nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(agent.wait().unwrap().code(), Some(0));
    assert_eq!(host.run(&["status"]).0, Some(6));
}
