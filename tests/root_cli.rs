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
