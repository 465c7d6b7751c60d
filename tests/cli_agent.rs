//! The command against a real control server with a scripted handler behind it: what is asked, what is printed, how it ends.
//!
//! The command wants root. Who runs these tests as another user gets it in a user namespace (the server then sees that
//! user, whom it trusts because it runs as the same one); where none can be made, each test says so and checks the refusal.

use doublure::control::{Event, Request, Secret, Server, Sink, socket_in};
use doublure::model::{Code, Exit, Fault, FileSystem, Res};
use nix::sys::termios::{LocalFlags, tcgetattr};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A guard against hanging for ever, never a measure.
const LONG: Duration = Duration::from_secs(120);
const BINARY: &str = env!("CARGO_BIN_EXE_doublure");

/// A directory with a configuration, and perhaps an agent.
struct World {
    dir: tempfile::TempDir,
    asked: Arc<Mutex<Vec<Request>>>,
}

/// How to become root here: as we are, in a user namespace, or not at all.
fn as_root() -> Option<&'static [&'static str]> {
    const NAMESPACE: &[&str] = &["unshare", "--user", "--map-root-user"];
    if nix::unistd::geteuid().is_root() {
        return Some(&[]);
    }
    let possible = Command::new(NAMESPACE[0]).args(&NAMESPACE[1..]).arg("true").output();
    possible.is_ok_and(|out| out.status.success()).then_some(NAMESPACE)
}

impl World {
    /// `None` where nobody can be root: said aloud, and the refusal checked.
    fn new() -> Option<World> {
        let world = World { dir: tempfile::tempdir().unwrap(), asked: Arc::default() };
        let config = format!("host = \"alpha\"\nrun_dir = \"{}\"\n", world.run_dir().display());
        std::fs::write(world.config(), config).unwrap();
        if as_root().is_some() {
            return Some(world);
        }
        // Not eprintln: the harness would keep that to itself when a test passes.
        let aloud = b"NOT RUN: no root and no user namespace here; run it with sudo. Only the refusal is checked.\n";
        std::io::stderr().write_all(aloud).unwrap();
        let out = Command::new(BINARY).arg("status").arg("--config").arg(world.config()).output().unwrap();
        assert_eq!(out.status.code(), Some(2));
        assert!(String::from_utf8(out.stderr).unwrap().contains("[NOT_ROOT]"));
        None
    }
    fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }
    fn config(&self) -> PathBuf {
        self.dir.path().join("doublure.toml")
    }
    fn serve(&self, handler: impl Fn(Request, Sink<'_>) -> Res<(Value, Exit)> + Send + Sync + 'static) {
        let server = Server::bind(&socket_in(&self.run_dir())).unwrap();
        let asked = self.asked.clone();
        std::thread::spawn(move || {
            server.run(Arc::new(move |request, sink| {
                asked.lock().unwrap().push(request.clone());
                handler(request, sink)
            }))
        });
    }
    fn command_under(&self, wrapper: &[&str], words: &[&str]) -> Command {
        let all: Vec<&str> = as_root().unwrap().iter().chain(wrapper).copied().chain([BINARY]).collect();
        let mut command = Command::new(all[0]);
        command.args(&all[1..]).args(words).arg("--config").arg(self.config());
        command
    }
    fn command(&self, words: &[&str]) -> Command {
        self.command_under(&[], words)
    }
    fn run(&self, words: &[&str]) -> Output {
        self.command(words).stdin(Stdio::null()).output().unwrap()
    }
    fn asked(&self) -> Vec<Request> {
        self.asked.lock().unwrap().clone()
    }
}

fn said(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn status() -> Value {
    json!({"host": "alpha", "agent_version": "0.1.0", "io_engine": "io_uring", "groups": [{
        "name": "shop", "role": "primary", "epoch": 3, "generation": 120, "recoverable_to": "2026-08-22T10:11:12.345Z",
        "rpo_seconds": 1.25, "mode": "interval", "peer": {"name": "beta", "connected": false},
        "volumes": [
            {"name": "pgdata", "device": "/dev/loop3", "size_bytes": 2u64 << 30, "block_bytes": 4096, "dirty_bytes": 131_072,
             "tracker": "bitmap", "cut": "freeze", "cut_reason": "mode = \"freeze\" is configured", "in_sync": true},
            {"name": "up\u{1b}[31mloads", "device": null, "size_bytes": 1u64 << 20, "block_bytes": 4096, "dirty_bytes": null,
             "tracker": null, "cut": "freeze", "in_sync": null}],
        "images": [{"ref": "postgres:17", "id": "sha256:0123456789abcdef0123456789abcdef", "on_standby": true}],
        "counters": {"freeze_p99_ms": 45.2, "freeze_max_ms": 180.9, "lag_p99_ms": null},
        "containers": ["db", "web"], "progress": {"what": "first sync", "done_bytes": 1024, "total_bytes": 4096},
        "last_drill": null, "state": "replicating", "faults": ["peer beta: no route to host; look at the network [PEER_UNREACHABLE]"]}]})
}

#[test]
fn the_status_is_a_table_for_people_and_the_value_for_programs() {
    let Some(world) = World::new() else { return };
    world.serve(|_, _| Ok((status(), Exit::Degraded)));
    let out = world.run(&["status"]);
    assert_eq!((out.status.code(), said(&out.stderr).as_str()), (Some(4), ""));
    let text = said(&out.stdout);
    let (age_free, _) = text.split_once(" (").unwrap();
    assert!(age_free.ends_with("recoverable to  2026-08-22T10:11:12Z"), "{text}");
    let rest = text.lines().filter(|l| !l.contains("recoverable to")).collect::<Vec<_>>().join("\n");
    assert_eq!(
        rest,
        "host alpha, agent 0.1.0\n\
         \n\
         shop: primary, epoch 3, generation 120\n\
         \x20 rpo             1.3 s, mode interval, engine io_uring\n\
         \x20 peer            beta, NOT CONNECTED\n\
         \x20 state           replicating\n\
         \x20 progress        first sync, 1.0 KiB of 4.0 KiB\n\
         \x20 cut             freeze: stall p99 45 ms, max 181 ms; lag p99 unknown, max unknown; not from captured writes: mode = \"freeze\" is configured\n\
         \x20 VOLUME        DEVICE         SIZE      DIRTY  IN SYNC  CUT     TRACKER\n\
         \x20 pgdata        /dev/loop3  2.0 GiB  128.0 KiB  yes      freeze  bitmap\n\
         \x20 up\u{fffd}[31mloads  unknown     1.0 MiB    unknown  unknown  freeze  unknown\n\
         \x20 IMAGE        ID            ON STANDBY\n\
         \x20 postgres:17  0123456789ab  yes\n\
         \x20 containers      db, web\n\
         \x20 degraded: peer beta: no route to host; look at the network [PEER_UNREACHABLE]"
    );
    let out = world.run(&["status", "--json"]);
    assert_eq!(out.status.code(), Some(4));
    assert_eq!(said(&out.stdout).lines().count(), 1);
    assert_eq!(serde_json::from_slice::<Value>(&out.stdout).unwrap(), status());
    assert_eq!(world.asked(), [Request::Status, Request::Status]);
}

#[test]
fn the_doctor_s_findings_have_their_cures() {
    let Some(world) = World::new() else { return };
    world.serve(|_, _| {
        let checks = json!([
            {"name": "kernel", "outcome": "ok", "needed": true, "detail": "6.18.44", "cure": ""},
            {"name": "mkfs.xfs", "outcome": "degraded", "needed": false, "detail": "it is not installed", "cure": "install the package xfsprogs"},
            {"name": "docker", "outcome": "failed", "needed": true, "detail": "nobody answers", "cure": "start it"}]);
        Ok((json!({"host": "alpha", "checks": checks, "ok": false}), Exit::Refused))
    });
    let out = world.run(&["doctor"]);
    assert_eq!((out.status.code(), said(&out.stderr).as_str()), (Some(3), ""));
    assert_eq!(
        said(&out.stdout),
        "  ok   kernel               6.18.44\n\
         \x20 warn mkfs.xfs             it is not installed\n\
         \x20                           cure: install the package xfsprogs\n\
         \x20 FAIL docker               nobody answers\n\
         \x20                           cure: start it\n\
         This host cannot replicate until every FAIL above is cured.\n"
    );
}

#[test]
fn every_verb_asks_for_what_was_typed() {
    let Some(world) = World::new() else { return };
    world.serve(|_, _| Ok((json!({"name": "x"}), Exit::Done)));
    let s = |text: &str| text.to_string();
    let create = |fs, mount_options: &str| Request::VolumeCreate {
        name: s("pgdata"),
        size_bytes: 2 << 30,
        fs,
        mount_options: s(mount_options),
    };
    let group = s("shop");
    let cases: Vec<(&[&str], Request)> = vec![
        (&["volume", "create", "pgdata", "--size", "2G"], create(FileSystem::Ext4, "")),
        (
            &["volume", "create", "pgdata", "--size", "2 GiB", "--fs", "xfs", "--mount-options", "noatime,nodev"],
            create(FileSystem::Xfs, "noatime,nodev"),
        ),
        (&["volume", "list"], Request::VolumeList),
        (
            &["volume", "remove", "pgdata", "--confirm", "pgdata"],
            Request::VolumeRemove { name: s("pgdata"), confirm: Some(s("pgdata")) },
        ),
        (
            &["protect", "shop", "--container", "db", "--volume", "up", "--container", "web", "--peer", "beta"],
            Request::Protect {
                group: group.clone(),
                peer: Some(s("beta")),
                containers: vec![s("db"), s("web")],
                volumes: vec![s("up")],
            },
        ),
        (
            &["protect", "shop", "--volume", "up"],
            Request::Protect { group: group.clone(), peer: None, containers: vec![], volumes: vec![s("up")] },
        ),
        (&["sync", "shop"], Request::Sync { group: group.clone(), wait: false }),
        (&["sync", "shop", "--wait"], Request::Sync { group: group.clone(), wait: true }),
        (&["failover", "shop"], Request::Failover { group: group.clone(), dry_run: false, force: false }),
        (&["failover", "shop", "--dry-run"], Request::Failover { group: group.clone(), dry_run: true, force: false }),
        (&["failover", "--force", "shop"], Request::Failover { group: group.clone(), dry_run: false, force: true }),
        (&["verify", "shop"], Request::Verify { group }),
        (&["doctor"], Request::Doctor),
        (&["pair"], Request::PairOpen),
    ];
    for (words, request) in cases {
        let out = world.run(words);
        assert_eq!((out.status.code(), said(&out.stderr).as_str()), (Some(0), ""), "{words:?}");
        assert_eq!(world.asked().last(), Some(&request), "{words:?}");
        assert!(said(&out.stdout).contains('x'), "{words:?}");
    }
}

fn failover(sink: Sink<'_>) -> Value {
    for (name, outcome, detail, ms) in [
        ("raise the epoch", "changed", "4", 3),
        ("attach pgdata", "changed", "/dev/loop3", 12),
        ("start db", "already so", "", 0),
    ] {
        sink(Event::Step { name: name.into(), outcome: outcome.into(), detail: detail.into(), ms });
        sink(Event::Progress { what: "apply".into(), done: 1, total: 2, unit: "blocks".into() });
    }
    json!({"group": "shop", "epoch": 4, "rto_ms": 812, "steps": [{"name": "raise the epoch", "outcome": "changed", "detail": "4", "ms": 3}]})
}

#[test]
fn a_failover_shows_its_steps_and_as_json_its_report_alone() {
    let Some(world) = World::new() else { return };
    world.serve(|_, sink| Ok((failover(sink), Exit::Done)));
    let out = world.run(&["failover", "shop"]);
    assert_eq!((out.status.code(), said(&out.stderr).as_str()), (Some(0), ""), "no bar without a terminal");
    assert_eq!(
        said(&out.stdout),
        "  ok   raise the epoch                  changed           3 ms  4\n\
         \x20 ok   attach pgdata                    changed          12 ms  /dev/loop3\n\
         \x20 ok   start db                         already so        0 ms\n\
         epoch: 4\ngroup: shop\nrto: 812 ms\n"
    );
    let out = world.run(&["failover", "shop", "--json"]);
    assert_eq!((out.status.code(), said(&out.stderr).as_str()), (Some(0), ""));
    assert_eq!(serde_json::from_slice::<Value>(&out.stdout).unwrap(), failover(&mut |_| {}));
    assert_eq!(said(&out.stdout).lines().count(), 1);
}

#[test]
fn a_plan_is_shown_once_with_what_it_would_lose() {
    let Some(world) = World::new() else { return };
    let words = "group shop: to position 3/120 as primary in epoch 4\n  fencing: no proof\n  warning: image\u{1b} missing\n  1. fence\n  2. attach volume pgdata";
    world.serve(move |request, sink| {
        if matches!(request, Request::Failover { force: false, .. }) {
            for name in ["fence", "attach volume pgdata"] {
                sink(Event::Step { name: name.into(), outcome: "would change".into(), detail: String::new(), ms: 0 });
            }
        }
        Ok((
            json!({"group": "shop", "dry_run": true, "plan": {"steps": []}, "words": words, "expected_loss_ms": 1234}),
            Exit::Done,
        ))
    });
    let head = "group shop: to position 3/120 as primary in epoch 4\n  fencing: no proof\n  warning: image\u{fffd} missing\n";
    let steps = "  plan fence                            would change      0 ms\n  plan attach volume pgdata             would change      0 ms\n";
    let out = world.run(&["failover", "shop", "--dry-run"]);
    assert_eq!(said(&out.stdout), format!("{steps}{head}  expected loss: 1.3 s\n"));
    let out = world.run(&["failover", "shop", "--dry-run", "--force"]);
    assert_eq!(said(&out.stdout), format!("{head}  1. fence\n  2. attach volume pgdata\n  expected loss: 1.3 s\n"));
}

#[test]
fn faults_and_endings_have_their_exit_codes() {
    let Some(world) = World::new() else { return };
    world.serve(|request, sink| match request {
        Request::Sync { group, .. } => {
            let code = *Code::ALL.iter().find(|c| c.as_str() == group).unwrap();
            sink(Event::Step { name: "look".into(), outcome: "failed".into(), detail: String::new(), ms: 1 });
            Err(Fault::new(code, "volume pgdata", "planted\u{1b}[2J", "look"))
        }
        Request::Verify { group } => {
            let exit = [Exit::Done, Exit::Failed, Exit::Usage, Exit::Refused, Exit::Degraded, Exit::Busy, Exit::NoAgent];
            Ok((json!({"x": 1}), exit[group.parse::<usize>().unwrap()]))
        }
        _ => panic!("a planted panic"),
    });
    for code in Code::ALL {
        let out = world.run(&["sync", code.as_str()]);
        assert_eq!(out.status.code(), Some(code.exit() as i32), "{code:?}");
        assert_eq!(said(&out.stderr), format!("doublure: volume pgdata: planted\u{fffd}[2J; look [{}]\n", code.as_str()));
        assert!(said(&out.stdout).starts_with("  FAIL look"));
    }
    let out = world.run(&["sync", "GROUP_BUSY", "--json"]);
    assert_eq!((out.status.code(), said(&out.stderr).as_str()), (Some(5), ""));
    let error = json!({"error": {"code": "GROUP_BUSY", "thing": "volume pgdata", "cause": "planted\u{1b}[2J", "next": "look"}});
    assert_eq!(serde_json::from_slice::<Value>(&out.stdout).unwrap(), error);
    for exit in 0..=6 {
        assert_eq!(world.run(&["verify", &exit.to_string()]).status.code(), Some(exit));
    }
    let out = world.run(&["volume", "list"]);
    assert_eq!(out.status.code(), Some(1), "a handler that panics is a fault of ours, not the end of the agent");
    assert!(said(&out.stderr).contains("[INTERNAL]"));
    assert_eq!(world.run(&["verify", "0"]).status.code(), Some(0));
}

#[test]
fn without_an_agent_every_verb_ends_with_six() {
    let Some(world) = World::new() else { return };
    let verbs: [&[&str]; 9] = [
        &["status"],
        &["status", "--watch"],
        &["volume", "list"],
        &["volume", "create", "a", "--size", "1G"],
        &["volume", "remove", "a", "--confirm", "a"],
        &["protect", "shop", "--volume", "a"],
        &["sync", "shop"],
        &["failover", "shop"],
        &["verify", "shop"],
    ];
    for words in verbs {
        let out = world.run(words);
        assert_eq!((out.status.code(), said(&out.stdout).as_str()), (Some(6), ""), "{words:?}");
        let sentence = said(&out.stderr);
        assert!(sentence.contains("systemctl start doublure") && sentence.ends_with("[NO_AGENT]\n"), "{words:?}: {sentence}");
        let out = world.run(&[words, &["--json"]].concat());
        assert_eq!(serde_json::from_slice::<Value>(&out.stdout).unwrap()["error"]["code"], "NO_AGENT", "{words:?}");
    }
    assert!(!world.run_dir().exists(), "asking makes nothing");
}

#[test]
fn a_pairing_code_comes_as_a_line_and_goes_nowhere_else() {
    let Some(world) = World::new() else { return };
    world.serve(|request, _| match request {
        Request::PairOpen => {
            Ok((json!({"code": "1234-5678", "listen": "10.0.0.2:7400", "host": "alpha", "valid_seconds": 600}), Exit::Done))
        }
        _ => Ok((json!({"name": "beta"}), Exit::Done)),
    });
    let out = world.run(&["pair"]);
    assert_eq!(
        said(&out.stdout),
        "pairing code: 1234-5678   (once, good for 10 min)\n\nOn the other host, as root:\n\n    doublure pair 10.0.0.2:7400\n\nand type the code when it is asked for.\n"
    );
    let with_input = |input: &str| {
        let mut child = piped(&mut world.command(&["pair", "10.0.0.2:7400"]));
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        child.wait_with_output().unwrap()
    };
    let out = with_input("  1234-5678 \nmore\n");
    assert_eq!((out.status.code(), said(&out.stderr).as_str()), (Some(0), ""), "no question without a terminal");
    let pair = Request::Pair { address: "10.0.0.2:7400".into(), code: Secret("1234-5678".into()) };
    assert_eq!(world.asked()[1..], [pair]);
    assert_eq!(said(&out.stdout), "name: beta\n");
    for bad in ["", "\n", &"x".repeat(100_000)] {
        let out = with_input(bad);
        assert_eq!(out.status.code(), Some(2));
        assert!(said(&out.stderr).contains("pairing code"), "{}", said(&out.stderr));
    }
    assert_eq!(world.asked().len(), 2, "nothing was asked with a bad code");
}

#[test]
fn without_a_terminal_a_removal_is_never_a_question() {
    let Some(world) = World::new() else { return };
    world.serve(|_, _| Err(Fault::new(Code::VolumeInUse, "volume pgdata", "its data would be lost", "add --confirm pgdata")));
    let mut child = piped(&mut world.command(&["volume", "remove", "pgdata"]));
    let _ = child.stdin.take().unwrap().write_all(b"pgdata\n");
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(3), "what was piped in is no confirmation: the agent refuses");
    assert_eq!(said(&out.stderr), "doublure: volume pgdata: its data would be lost; add --confirm pgdata [VOLUME_IN_USE]\n");
    assert_eq!(world.asked(), [Request::VolumeRemove { name: "pgdata".into(), confirm: None }]);
}

fn piped(command: &mut Command) -> Child {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Ends a child that would run for ever, also when a test fails.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn watching_in_a_pipe_prints_lines_until_nobody_reads() {
    let Some(world) = World::new() else { return };
    world.serve(|_, _| Ok((status(), Exit::Degraded)));
    let mut child = Ended(piped(&mut world.command(&["status", "--watch"])));
    let mut reader = BufReader::new(child.0.stdout.take().unwrap());
    for _ in 0..2 {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        assert!(
            line.ends_with("Z shop: primary, epoch 3, generation 120, recoverable to 2026-08-22T10:11:12.345Z, rpo 1.3 s, dirty unknown, peer beta NOT CONNECTED, state replicating, faults 1\n"),
            "{line}"
        );
    }
    drop(reader);
    assert_eq!(child.0.wait().unwrap().code(), Some(0));
    let mut complaint = String::new();
    child.0.stderr.take().unwrap().read_to_string(&mut complaint).unwrap();
    assert_eq!(complaint, "");
}

#[test]
fn a_reader_that_leaves_ends_no_operation() {
    let Some(world) = World::new() else { return };
    world.serve(|_, sink| {
        for _ in 0..1000 {
            failover(sink);
        }
        Ok((json!({}), Exit::Degraded))
    });
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let out = world.command(&["failover", "shop"]).stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
    let out = out.wait_with_output().unwrap();
    assert_eq!((out.status.code(), said(&out.stderr).as_str()), (Some(4), ""), "the operation's own exit code");
}

/// The command on a terminal of its own.
struct Terminal {
    child: Ended,
    master: File,
    /// Kept open, so that the terminal's modes can be asked for after the command has ended.
    slave: OwnedFd,
    shown: String,
}

impl Terminal {
    fn new(world: &World, words: &[&str]) -> Terminal {
        let size = nix::pty::Winsize { ws_row: 40, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = nix::pty::openpty(Some(&size), None).unwrap();
        let side = || Stdio::from(pty.slave.try_clone().unwrap());
        // setsid makes it the controlling terminal, so that Ctrl-C is a signal as for a person.
        let mut command = world.command_under(&["setsid", "--ctty", "--wait"], words);
        let child = command.env("TERM", "xterm").stdin(side()).stdout(side()).stderr(side()).spawn().unwrap();
        Terminal { child: Ended(child), master: pty.master.into(), slave: pty.slave, shown: String::new() }
    }
    fn read_until(&mut self, wanted: &str) {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        let deadline = Instant::now() + LONG;
        while !self.shown.contains(wanted) {
            assert!(Instant::now() < deadline, "no {wanted:?} in {:?}", self.shown);
            let mut ready = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
            if poll(&mut ready, PollTimeout::from(1000u16)).unwrap() == 0 {
                continue;
            }
            let mut bytes = [0; 4096];
            let got = self.master.read(&mut bytes).unwrap();
            self.shown.push_str(&String::from_utf8_lossy(&bytes[..got]));
        }
    }
    fn type_in(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }
    fn echoes(&self) -> bool {
        tcgetattr(&self.slave).unwrap().local_flags.contains(LocalFlags::ECHO)
    }
    /// Waits until the terminal's echo is as said: the prompt may be seen before or after the mode changes.
    fn wait_for_echo(&self, wanted: bool) {
        let deadline = Instant::now() + LONG;
        while self.echoes() != wanted {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    fn end(&mut self) -> Option<i32> {
        self.child.0.wait().unwrap().code()
    }
}

#[test]
fn on_a_terminal_the_code_is_asked_for_unseen() {
    let Some(world) = World::new() else { return };
    world.serve(|_, _| Ok((json!({"name": "beta"}), Exit::Done)));
    let mut terminal = Terminal::new(&world, &["pair", "10.0.0.2:7400"]);
    terminal.read_until("code shown by `doublure pair` on 10.0.0.2:7400: ");
    terminal.wait_for_echo(false);
    terminal.type_in("1234-5678\n");
    terminal.read_until("name: beta");
    assert_eq!(terminal.end(), Some(0));
    assert!(!terminal.shown.contains("1234"), "{:?}", terminal.shown);
    assert!(terminal.echoes(), "the echo is back");
    assert_eq!(world.asked(), [Request::Pair { address: "10.0.0.2:7400".into(), code: Secret("1234-5678".into()) }]);
}

#[test]
fn ctrl_c_at_the_question_leaves_the_terminal_with_its_echo() {
    let Some(world) = World::new() else { return };
    world.serve(|_, _| Ok((json!({}), Exit::Done)));
    let mut terminal = Terminal::new(&world, &["pair", "10.0.0.2:7400"]);
    terminal.read_until("7400: ");
    terminal.wait_for_echo(false);
    terminal.type_in("12\x03");
    let code = terminal.end();
    assert!(code != Some(0), "{code:?}");
    assert!(terminal.echoes(), "the echo is back");
    assert!(world.asked().is_empty());
}

#[test]
fn on_a_terminal_a_removal_asks_for_the_name() {
    let Some(world) = World::new() else { return };
    world.serve(|_, _| Ok((json!({}), Exit::Done)));
    for (typed, code) in [("yes\n", 2), ("\n", 2), ("pgdata\n", 0)] {
        let mut terminal = Terminal::new(&world, &["volume", "remove", "pgdata"]);
        terminal.read_until("Type its name to go on: ");
        assert!(world.asked().is_empty());
        terminal.type_in(typed);
        assert_eq!(terminal.end(), Some(code), "{typed:?}");
    }
    assert_eq!(world.asked(), [Request::VolumeRemove { name: "pgdata".into(), confirm: Some("pgdata".into()) }]);
}

#[test]
fn on_a_terminal_progress_is_a_bar_and_the_watch_draws_again() {
    let Some(world) = World::new() else { return };
    let (go_on, gate) = std::sync::mpsc::channel::<()>();
    let gate = Mutex::new(gate);
    world.serve(move |request, sink| match request {
        Request::Status => Ok((status(), Exit::Done)),
        _ => {
            sink(Event::Progress { what: "first sync".into(), done: 3 << 20, total: 4 << 20, unit: "bytes".into() });
            gate.lock().unwrap().recv().unwrap();
            Ok((json!({"position": "1/1"}), Exit::Done))
        }
    });
    let mut terminal = Terminal::new(&world, &["sync", "shop", "--wait"]);
    terminal.read_until("3.00 MiB/4.00 MiB");
    assert!(terminal.shown.contains("first sync"));
    go_on.send(()).unwrap();
    terminal.read_until("position: 1/1");
    assert_eq!(terminal.end(), Some(0));

    let mut terminal = Terminal::new(&world, &["status", "--watch"]);
    terminal.read_until("degraded: peer beta");
    terminal.shown.clear();
    terminal.read_until("\x1b[Hhost alpha");
    terminal.type_in("\x03");
    assert_ne!(terminal.end(), Some(0));
}
