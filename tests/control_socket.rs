//! The control socket over a real socket: who may knock, what may be said, and that no client ends an operation.

use doublure::control::{Event, Handler, REPLY_MAX_BYTES, REQUEST_MAX_BYTES, Request, Server, call, serve, socket_in};
use doublure::model::{Code, Exit, Fault, FileSystem};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A guard against hanging for ever, never a measure.
const LONG: Duration = Duration::from_secs(120);

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        Place { dir: tempfile::tempdir().unwrap() }
    }
    fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }
    fn socket(&self) -> PathBuf {
        socket_in(&self.run_dir())
    }
    fn serve(&self, handler: Handler) -> PathBuf {
        serve(&self.socket(), handler).unwrap(); // clients can connect from here on
        self.socket()
    }
}

fn echo() -> Handler {
    Arc::new(|request, sink| {
        sink(Event::Step { name: "heard".into(), outcome: "changed".into(), detail: String::new(), ms: 0 });
        sink(Event::Progress { what: "echo".into(), done: 1, total: 2, unit: "bytes".into() });
        match request {
            Request::Verify { group } => Err(Fault::new(Code::VerifyMismatch, group, "planted", "look")),
            other => Ok((serde_json::to_value(other).unwrap(), Exit::Degraded)),
        }
    })
}

/// Says raw bytes and gives every line that comes back.
fn raw(socket: &Path, said: &[u8]) -> Vec<Value> {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    let _ = stream.write_all(said); // a server that has heard enough closes
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut lines = Vec::new();
    for line in BufReader::new(stream).lines() {
        match line {
            Ok(line) if line.is_empty() => {}
            Ok(line) => lines.push(serde_json::from_str(&line).unwrap()),
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(e) => panic!("{e}"),
        }
    }
    lines
}

fn code_of(lines: &[Value]) -> &str {
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert_eq!((&lines[0]["version"], &lines[0]["event"]), (&json!(1), &json!("failed")));
    lines[0]["fault"]["code"].as_str().unwrap()
}

#[test]
fn a_request_gets_its_events_in_order_and_the_last_is_given() {
    let place = Place::new();
    let socket = place.serve(echo());
    let request = Request::VolumeCreate { name: "a".into(), size_bytes: 7, fs: FileSystem::Xfs, mount_options: "noatime".into() };
    let mut seen = Vec::new();
    let last = call(&socket, &request, &mut |event| seen.push(event.clone())).unwrap();
    assert_eq!(last, Event::Done { value: serde_json::to_value(&request).unwrap(), exit: Exit::Degraded });
    assert!(
        matches!(&seen[..], [Event::Step { .. }, Event::Progress { done: 1, total: 2, .. }, end] if *end == last),
        "{seen:?}"
    );

    let last = call(&socket, &Request::Verify { group: "shop".into() }, &mut |_| {}).unwrap();
    assert!(matches!(last, Event::Failed { fault } if fault.code == Code::VerifyMismatch && fault.thing == "shop"));
}

#[test]
fn socket_and_directory_are_closed_to_others() {
    let place = Place::new();
    let socket = place.serve(echo());
    let mode = |path: &Path| std::fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&socket), 0o600);
    assert_eq!(mode(&place.run_dir()), 0o700);
    for entry in std::fs::read_dir(place.run_dir()).unwrap() {
        assert_eq!(mode(&entry.unwrap().path()), 0o600);
    }
}

#[test]
fn nonsense_is_refused_in_words_and_the_next_one_is_served() {
    let place = Place::new();
    let socket = place.serve(echo());
    let mut noise = vec![0u8; 4096];
    noise.iter_mut().enumerate().for_each(|(n, b)| *b = (n * 167 + 13) as u8);
    let deep = format!("{}\n", "[".repeat(500_000));
    let cases: [(&[u8], &str); 11] = [
        (b"\n", "PROTOCOL_ERROR"),
        (b"hello\n", "PROTOCOL_ERROR"),
        (b"GET / HTTP/1.1\r\n\r\n", "PROTOCOL_ERROR"),
        (b"{\"version\":1,\"verb\":\"sta", "PROTOCOL_ERROR"),
        (b"{\"version\":1,\"verb\":\"dance\"}\n", "PROTOCOL_ERROR"),
        (b"{\"version\":1,\"verb\":\"sync\",\"group\":7,\"wait\":true}\n", "PROTOCOL_ERROR"),
        (b"{\"version\":1,\"verb\":\"volume_create\",\"name\":\"a\",\"size_bytes\":-1,\"fs\":\"ext4\",\"mount_options\":\"\"}\n", "PROTOCOL_ERROR"),
        (b"{\"version\":2,\"verb\":\"status\"}\n", "VERSION_MISMATCH"),
        (b"{\"verb\":\"status\"}\n", "VERSION_MISMATCH"),
        (&noise, "PROTOCOL_ERROR"),
        (deep.as_bytes(), "PROTOCOL_ERROR"),
    ];
    for (said, code) in cases {
        assert_eq!(code_of(&raw(&socket, said)), code, "{:?}", String::from_utf8_lossy(&said[..said.len().min(80)]));
    }
    assert_eq!(raw(&socket, b""), Vec::<Value>::new(), "who says nothing is told nothing");
    assert!(call(&socket, &Request::Status, &mut |_| {}).is_ok());
}

#[test]
fn a_line_without_end_is_cut_off_at_its_limit() {
    let place = Place::new();
    let socket = place.serve(echo());
    let lines = raw(&socket, &vec![b'x'; 4 * REQUEST_MAX_BYTES]);
    assert_eq!(code_of(&lines), "PROTOCOL_ERROR");
    assert!(lines[0]["fault"]["cause"].as_str().unwrap().contains("longer than 1048576 bytes"), "{lines:?}");
    // Our own end refuses to say such a line at all.
    let name = "x".repeat(REQUEST_MAX_BYTES);
    let fault = call(&socket, &Request::Verify { group: name }, &mut |_| {}).unwrap_err();
    assert_eq!(fault.code, Code::BadArgument);
}

/// A handler that waits for the test between two steps and says when it is through.
fn gated() -> (Handler, Receiver<()>, Sender<()>, Receiver<()>) {
    let (began, has_begun) = channel();
    let (go_on, gate) = channel();
    let (ended, has_ended) = channel();
    let gate = Mutex::new(gate);
    let handler: Handler = Arc::new(move |_, sink| {
        began.send(()).unwrap();
        gate.lock().unwrap().recv().unwrap();
        for ms in 0..100_000 {
            sink(Event::Step { name: "x".repeat(100), outcome: "changed".into(), detail: String::new(), ms });
        }
        ended.send(()).unwrap();
        Ok((json!(null), Exit::Done))
    });
    (handler, has_begun, go_on, has_ended)
}

#[test]
fn a_client_that_dies_or_stops_reading_ends_no_operation() {
    let place = Place::new();
    let (handler, has_begun, go_on, has_ended) = gated();
    let socket = place.serve(handler);
    let knock = || {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.write_all(b"{\"version\":1,\"verb\":\"status\"}\n").unwrap();
        has_begun.recv_timeout(LONG).unwrap();
        stream
    };
    drop(knock()); // dies
    go_on.send(()).unwrap();
    has_ended.recv_timeout(LONG).unwrap();
    let stalled = knock(); // lives, but reads nothing: 10 MB of events do not fit into any buffer
    go_on.send(()).unwrap();
    has_ended.recv_timeout(LONG).unwrap();
    drop(stalled);
}

#[test]
fn waiting_requests_leave_a_place_for_a_failover() {
    let place = Place::new();
    let (began, has_begun) = channel();
    let gate = Arc::new((Mutex::new(false), std::sync::Condvar::new()));
    let opened = gate.clone();
    let handler: Handler = Arc::new(move |request, _| {
        if !matches!(request, Request::Failover { .. }) {
            began.send(()).unwrap();
            let (open, change) = &*opened;
            drop(change.wait_while(open.lock().unwrap(), |open| !*open).unwrap());
        }
        Ok((json!("done"), Exit::Done))
    });
    let socket = place.serve(handler);
    let ask = |request: Request| {
        let (told, hears) = channel();
        let socket = socket.clone();
        std::thread::spawn(move || told.send(call(&socket, &request, &mut |_| {}).unwrap()));
        hears.recv_timeout(LONG).expect("an answer at once")
    };
    let busy = |event: &Event| matches!(event, Event::Failed { fault } if fault.code == Code::GroupBusy);
    // A place comes back a moment after its client has its answer, so whoever ought to find one may have to knock twice.
    let insist = |request: Request| {
        let socket = socket.clone();
        std::thread::spawn(move || {
            loop {
                let event = call(&socket, &request, &mut |_| {}).unwrap();
                if !busy(&event) {
                    return event;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        })
    };
    let waiting = || Request::Sync { group: "g".into(), wait: true };
    let mut held: Vec<_> = (0..48).map(|_| insist(waiting())).collect();
    for _ in 0..48 {
        has_begun.recv_timeout(LONG).unwrap();
    }
    assert!(busy(&ask(waiting())), "the 49th that waits is refused");
    let failover = || Request::Failover { group: "g".into(), dry_run: false, force: false };
    assert!(matches!(ask(failover()), Event::Done { .. }), "a failover finds its place");
    held.extend((0..16).map(|_| insist(Request::Status)));
    for _ in 0..16 {
        has_begun.recv_timeout(LONG).unwrap();
    }
    assert!(busy(&ask(Request::Status)), "the 65th of any kind is refused");
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
    for one in held {
        assert!(matches!(one.join().unwrap(), Event::Done { .. }));
    }
    assert!(matches!(insist(Request::Status).join().unwrap(), Event::Done { .. }), "places come back");
}

#[test]
fn two_agents_never_share_a_socket() {
    let place = Place::new();
    let socket = place.serve(echo());
    for fault in [Server::bind(&socket).err().unwrap(), serve(&socket, echo()).unwrap_err()] {
        assert_eq!((fault.code, fault.code.exit()), (Code::StateDirHeld, Exit::Busy));
        assert!(fault.thing.contains("control.sock"), "{fault}");
    }
    assert!(call(&socket, &Request::Status, &mut |_| {}).is_ok(), "the first still answers");
}

#[test]
fn a_listener_without_the_lock_is_left_alone_and_a_stale_file_is_not() {
    let place = Place::new();
    std::fs::create_dir(place.run_dir()).unwrap();
    std::fs::set_permissions(place.run_dir(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let listener = UnixListener::bind(place.socket()).unwrap();
    assert_eq!(Server::bind(&place.socket()).err().unwrap().code, Code::StateDirHeld);
    drop(listener); // the file stays, as after kill -9
    assert!(place.socket().exists());
    let socket = place.serve(echo());
    assert!(call(&socket, &Request::Status, &mut |_| {}).is_ok());
}

#[test]
fn what_is_no_socket_or_no_private_directory_is_refused_and_kept() {
    let place = Place::new();
    let refused = |socket: &Path| {
        let fault = Server::bind(socket).err().unwrap();
        assert_eq!((fault.code, fault.code.exit()), (Code::StateDirUnsafe, Exit::Refused), "{fault}");
        fault.to_string()
    };
    let make = |name: &str, mode: u32| {
        let dir = place.dir.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(mode)).unwrap();
        dir
    };
    let open = make("open", 0o755);
    assert!(refused(&open.join("control.sock")).contains("mode 0755"));
    assert_eq!(std::fs::read_dir(&open).unwrap().count(), 0);

    let mine = make("mine", 0o700);
    symlink(&mine, place.dir.path().join("link")).unwrap();
    assert!(refused(&place.dir.path().join("link/control.sock")).contains("not a directory"));

    std::fs::write(mine.join("control.sock"), "precious").unwrap();
    assert!(refused(&mine.join("control.sock")).contains("no socket"));
    assert_eq!(std::fs::read_to_string(mine.join("control.sock")).unwrap(), "precious");

    let fault = Server::bind(&place.dir.path().join("x".repeat(120)).join("control.sock")).err().unwrap();
    assert_eq!(fault.code, Code::ConfigInvalid, "{fault}");
}

#[test]
fn without_an_agent_the_sentence_says_how_to_start_one() {
    let place = Place::new();
    let ask = |socket: &Path| {
        let fault = call(socket, &Request::Status, &mut |_| {}).unwrap_err();
        assert_eq!((fault.code, fault.code.exit()), (Code::NoAgent, Exit::NoAgent));
        assert!(fault.next.contains("systemctl start doublure") && fault.next.contains("doublure agent"), "{fault}");
        fault.cause
    };
    assert!(ask(&place.socket()).contains("no such socket"));
    std::fs::create_dir(place.run_dir()).unwrap();
    drop(UnixListener::bind(place.socket()).unwrap());
    assert!(ask(&place.socket()).contains("nobody listens"));
}

/// An agent that says these bytes to whoever asks, then closes.
fn strange_agent(place: &Place, said: Vec<u8>) -> Fault {
    std::fs::create_dir(place.run_dir()).unwrap();
    let listener = UnixListener::bind(place.socket()).unwrap();
    let agent = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut line = Vec::new();
        BufReader::new(&stream).read_until(b'\n', &mut line).unwrap();
        let _ = stream.write_all(&said);
        line
    });
    let fault = call(&place.socket(), &Request::Status, &mut |_| {}).unwrap_err();
    assert_eq!(agent.join().unwrap(), b"{\"version\":1,\"verb\":\"status\"}\n");
    fault
}

#[test]
fn an_agent_that_answers_strangely_is_told_apart() {
    let step =
        b"\n\n{\"version\":1,\"event\":\"step\",\"name\":\"a\",\"outcome\":\"changed\",\"detail\":\"\",\"ms\":1}\n".to_vec();
    let cases: Vec<(Vec<u8>, Code, &str)> = vec![
        (vec![], Code::NoAgent, "closed the connection"),
        (step, Code::NoAgent, "closed the connection"),
        (b"{\"version\":1,\"event\":\"done\",\"value\":{}".to_vec(), Code::NoAgent, "closed the connection"),
        (b"{\"version\":2,\"event\":\"later\"}\n".to_vec(), Code::VersionMismatch, "version 2"),
        (b"{\"event\":\"done\"}\n".to_vec(), Code::VersionMismatch, "version 0"),
        (b"{\"version\":1,\"event\":\"later\"}\n".to_vec(), Code::ProtocolError, "later"),
        (b"what?\n".to_vec(), Code::ProtocolError, "expected"),
        (vec![b'x'; REPLY_MAX_BYTES + 1], Code::ProtocolError, "longer than"),
    ];
    for (said, code, cause) in cases {
        let shown = String::from_utf8_lossy(&said[..said.len().min(60)]).into_owned();
        let fault = strange_agent(&Place::new(), said);
        assert_eq!(fault.code, code, "{shown}: {fault}");
        assert!(fault.cause.contains(cause), "{shown}: {fault}");
    }
}

#[test]
fn a_request_can_be_logged_without_its_pairing_code() {
    let place = Place::new();
    let socket = place.serve(Arc::new(|request, _| Ok((json!(format!("{request:?}")), Exit::Done))));
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(b"{\"version\":1,\"verb\":\"pair\",\"address\":\"a:1\",\"code\":\"hush-hush\"}\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("Secret") && !answer.contains("hush"), "{answer}");
}
