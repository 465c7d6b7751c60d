//! The agent's end: one thread a connection, one request each, events back as they come.

use crate::control::line::{Lines, NoLine};
use crate::control::{Event, Handler, REPLY_MAX_BYTES, REQUEST_MAX_BYTES, Request, Unclear, VERSION, from_line, to_line};
use crate::model::{Code, Fault, Res};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;
use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

/// Connections served at a time.
const CONNECTIONS_MAX: usize = 64;
/// Of these, how many may be requests that wait for another host: a failover must always find a free place.
const WAITING_MAX: usize = 48;
/// How long a client has for its request line.
const REQUEST_PATIENCE: Duration = Duration::from_secs(10);
/// How long a client may take no byte before it counts as gone.
const REPLY_PATIENCE: Duration = Duration::from_secs(30);
/// Between two empty lines, by which a client sees that the agent lives, and the agent that the client does.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// Events that wait for a slow client; progress beyond that is dropped, the operation never waits.
const EVENTS_WAITING_MAX: usize = 1024;

/// Binds `socket` and serves it on a thread of its own until the process ends; returns once clients can connect.
///
/// Errors: those of [`Server::bind`].
pub fn serve(socket: &Path, handler: Handler) -> Res<()> {
    let server = Server::bind(socket)?;
    let accepting = std::thread::Builder::new().name("control accept".into());
    accepting.spawn(move || server.run(handler)).map(drop).map_err(|e| Fault::io("a thread for the control socket", &e))
}

/// A bound control socket. Clients may connect from here on; they are answered once it runs.
pub struct Server {
    listener: UnixListener,
    /// Held as long as the server lives: only its holder may call a socket file stale and replace it.
    _lock: Flock<File>,
}

impl Server {
    /// Makes the directory (0700, ours) and the socket (0600). A socket file that nobody listens on is replaced.
    ///
    /// Errors: `STATE_DIR_HELD` when another agent listens, `STATE_DIR_UNSAFE` when the directory is open to others or
    /// something else stands in the socket's place, `CONFIG_INVALID` when the path is too long for a socket, `IO_ERROR`.
    pub fn bind(socket: &Path) -> Res<Server> {
        let thing = || format!("control socket {}", socket.display());
        let held = |cause: &str| {
            Fault::new(Code::StateDirHeld, thing(), cause, "stop that agent first, or give this one a run_dir of its own")
        };
        let taken = |cause: &str| Fault::new(Code::StateDirUnsafe, thing(), cause, "move it away and start the agent again");
        if std::os::unix::net::SocketAddr::from_pathname(socket).is_err() {
            let cause = "its path is longer than a socket's may be (107 bytes)";
            return Err(Fault::new(Code::ConfigInvalid, thing(), cause, "choose a shorter run_dir"));
        }
        let directory = socket.parent().unwrap_or(Path::new("."));
        private_dir(directory)?;
        let lock_path = socket.with_extension("lock");
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(nix::libc::O_NOFOLLOW)
            .open(&lock_path)
            .map_err(|e| Fault::io(lock_path.display().to_string(), &e))?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            nix::errno::Errno::EWOULDBLOCK => held("another agent holds it"),
            other => Fault::io(lock_path.display().to_string(), &other.into()),
        })?;
        match std::fs::symlink_metadata(socket) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Fault::io(thing(), &e)),
            Ok(found) if !found.file_type().is_socket() => return Err(taken("something that is no socket stands there")),
            // The lock keeps agents apart; this keeps us from a listener that takes no lock.
            Ok(_) => match UnixStream::connect(socket) {
                Ok(_) => return Err(held("somebody listens on it already")),
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(socket).map_err(|e| Fault::io(thing(), &e))?;
                }
                Err(e) => return Err(Fault::io(thing(), &e)),
            },
        }
        // Between bind and chmod nobody else can reach it: the directory is ours alone.
        let listener = UnixListener::bind(socket).map_err(|e| Fault::io(thing(), &e))?;
        std::fs::set_permissions(socket, Permissions::from_mode(0o600)).map_err(|e| Fault::io(thing(), &e))?;
        Ok(Server { listener, _lock: lock })
    }

    /// Answers until the process ends; every request runs on a thread of its own.
    pub fn run(self, handler: Handler) {
        let places = Arc::new(AtomicUsize::new(0));
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) => {
                    // Out of descriptors, mostly: they come back, the operator's door must not stay shut.
                    tracing::warn!("the control socket cannot accept: {e}");
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            if let Err(fault) = trusted(&stream) {
                tracing::warn!("{fault}");
                refuse(&stream, fault);
                continue;
            }
            let Some(place) = Place::take(&places, CONNECTIONS_MAX) else {
                refuse(&stream, crowded(CONNECTIONS_MAX));
                continue;
            };
            let handler = handler.clone();
            let serving = std::thread::Builder::new().name("control".into()).spawn(move || converse(&stream, &handler, &place));
            if let Err(e) = serving {
                tracing::warn!("no thread for a control request: {e}"); // the client sees its connection end
            }
        }
    }
}

/// One of the places for connections, given back when dropped.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(places: &Arc<AtomicUsize>, max: usize) -> Option<Place> {
        let place = Place(places.clone()); // counted before the question, so that dropping it is always right
        (places.fetch_add(1, Ordering::SeqCst) < max).then_some(place)
    }
    fn taken(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn crowded(max: usize) -> Fault {
    let cause = format!("{max} requests of operators are being served already");
    Fault::new(Code::GroupBusy, "the agent", cause, "let one of them end, or stop those that wait for nothing")
}

/// Makes a directory of ours, or checks that it is one and closed to everybody else.
fn private_dir(directory: &Path) -> Res<()> {
    let thing = || format!("directory {}", directory.display());
    if !directory.exists() {
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(|e| Fault::io(thing(), &e))?;
    }
    let found = std::fs::symlink_metadata(directory).map_err(|e| Fault::io(thing(), &e))?;
    let cause = match (found.is_dir(), found.uid() == geteuid().as_raw(), found.mode() & 0o077) {
        (true, true, 0) => return Ok(()),
        (false, ..) => "it is not a directory".into(),
        (_, false, _) => format!("it belongs to user {}", found.uid()),
        (.., open) => format!("it is open to others (mode {:04o})", open | 0o700),
    };
    let next = format!("chown root {0} && chmod 0700 {0}", directory.display());
    Err(Fault::new(Code::StateDirUnsafe, thing(), cause, next))
}

/// Root may knock, and so may the user that the agent runs as (root too, but for a test).
fn trusted(stream: &UnixStream) -> Res<()> {
    let thing = "the control socket";
    let who = getsockopt(stream, PeerCredentials).map_err(|errno| Fault::io(thing, &errno.into()))?;
    match may_knock(who.uid(), geteuid().as_raw()) {
        true => Ok(()),
        false => Err(Fault::new(
            Code::NotRoot,
            thing,
            format!("process {} of user {} knocked", who.pid(), who.uid()),
            "run the command as root (sudo doublure ...)",
        )),
    }
}

/// The whole right to speak to an agent of user `ours`.
pub(super) fn may_knock(uid: u32, ours: u32) -> bool {
    uid == 0 || uid == ours
}

/// One connection, from its request to its last event.
fn converse(stream: &UnixStream, handler: &Handler, place: &Place) {
    let request = match read_request(stream) {
        Ok(Some(request)) => request,
        Ok(None) => return,
        Err(fault) => return refuse(stream, fault),
    };
    match request {
        Request::Status => tracing::debug!("asked for the status"),
        _ => tracing::info!("asked: {request:?}"),
    }
    let waits = matches!(request, Request::Sync { wait: true, .. } | Request::Verify { .. });
    if waits && place.taken() > WAITING_MAX {
        return refuse(stream, crowded(WAITING_MAX));
    }
    let (queue, events) = sync_channel(EVENTS_WAITING_MAX);
    std::thread::scope(|scope| {
        let writer = std::thread::Builder::new().name("control reply".into());
        if let Err(e) = writer.spawn_scoped(scope, move || write_events(stream, &events)) {
            return refuse(stream, Fault::io("a thread for the reply", &e));
        }
        let last = run_handler(handler, request, &queue);
        let _ = queue.send(last); // fails when the client is gone: then nobody asks any more
        drop(queue);
    });
}

/// Runs the handler to its end, whatever becomes of the client. Events never wait for it.
fn run_handler(handler: &Handler, request: Request, queue: &SyncSender<Event>) -> Event {
    let mut gone = false;
    let mut sink = |event: Event| {
        let ends = matches!(event, Event::Done { .. } | Event::Failed { .. });
        if gone || ends {
            return; // an end comes from the handler's return value alone
        }
        let small = matches!(event, Event::Progress { .. });
        match queue.try_send(event) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) if small => {}
            Err(_) => gone = true,
        }
    };
    match catch_unwind(AssertUnwindSafe(|| handler(request, &mut sink))) {
        Ok(Ok((value, exit))) => Event::Done { value, exit },
        Ok(Err(fault)) => Event::Failed { fault },
        Err(_) => Event::Failed { fault: Fault::internal("the request", "its handler panicked") },
    }
}

/// Writes events until the last, with an empty line now and then. Returning early drops the queue's other end.
fn write_events(stream: &UnixStream, events: &Receiver<Event>) {
    if stream.set_write_timeout(Some(REPLY_PATIENCE)).is_err() {
        return;
    }
    loop {
        let line = match events.recv_timeout(HEARTBEAT) {
            Ok(event) => event_line(&event),
            Err(RecvTimeoutError::Timeout) => b"\n".to_vec(),
            Err(RecvTimeoutError::Disconnected) => break,
        };
        if (&mut &*stream).write_all(&line).is_err() {
            break;
        }
    }
    let _ = stream.shutdown(std::net::Shutdown::Both);
}

/// The line of an event; one that cannot be said becomes a fault that can.
fn event_line(event: &Event) -> Vec<u8> {
    let fits = |line: Vec<u8>| match line.len() <= REPLY_MAX_BYTES {
        true => Ok(line),
        false => {
            Err(Fault::internal("a reply", format!("it is {} bytes long, at most {REPLY_MAX_BYTES} can be sent", line.len())))
        }
    };
    to_line(event).and_then(fits).or_else(|fault| to_line(&Event::Failed { fault })).unwrap_or_default()
}

/// The request; `None` when the client left without a word.
fn read_request(stream: &UnixStream) -> Res<Option<Request>> {
    let protocol = |cause: String| {
        let next = "ask with the doublure command of the agent's version";
        Fault::new(Code::ProtocolError, "the request on the control socket", cause, next)
    };
    let line = match Lines::new(stream, REQUEST_MAX_BYTES).next(REQUEST_PATIENCE) {
        Ok(line) => line,
        Err(NoLine::End(0)) => return Ok(None),
        Err(NoLine::End(bytes)) => return Err(protocol(format!("it ends after {bytes} bytes in the middle of a line"))),
        Err(NoLine::TooLong) => return Err(protocol(format!("its line is longer than {REQUEST_MAX_BYTES} bytes"))),
        Err(NoLine::Late) => return Err(protocol(format!("it did not come within {} seconds", REQUEST_PATIENCE.as_secs()))),
        Err(NoLine::Io(e)) => return Err(Fault::io("the control socket", &e)),
    };
    from_line(&line).map(Some).map_err(|unclear| match unclear {
        Unclear::Words(cause) => protocol(cause),
        Unclear::Version(theirs) => Fault::new(
            Code::VersionMismatch,
            "the request on the control socket",
            format!("it speaks version {theirs}, this agent speaks version {VERSION}"),
            "use the command of the agent's version, or restart the agent after an upgrade",
        ),
    })
}

/// Says one fault and closes. Waits for nobody: the thread that accepts may be the one that speaks.
fn refuse(stream: &UnixStream, fault: Fault) {
    let _ = stream.set_write_timeout(Some(Duration::from_millis(100)));
    let _ = (&mut &*stream).write_all(&event_line(&Event::Failed { fault }));
    let _ = stream.shutdown(std::net::Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Exit;

    #[test]
    fn only_root_and_our_own_user_may_knock() {
        assert!(may_knock(0, 0) && may_knock(0, 1000) && may_knock(1000, 1000));
        assert!(!may_knock(1000, 0) && !may_knock(65534, 0) && !may_knock(u32::MAX, 1000));
    }

    #[test]
    fn places_are_given_back() {
        let places = Arc::new(AtomicUsize::new(0));
        let held: Vec<_> = (0..3).map(|_| Place::take(&places, 3).unwrap()).collect();
        for _ in 0..5 {
            assert!(Place::take(&places, 3).is_none());
        }
        assert_eq!(held[0].taken(), 3);
        drop(held);
        assert!(Place::take(&places, 3).is_some());
        assert_eq!(places.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_reply_too_long_becomes_a_fault() {
        let value = serde_json::Value::String("x".repeat(REPLY_MAX_BYTES));
        let line = event_line(&Event::Done { value, exit: Exit::Done });
        let told: Event = from_line(&line).unwrap();
        assert!(matches!(told, Event::Failed { fault } if fault.code == Code::Internal));
    }

    #[test]
    fn a_client_that_does_not_read_never_holds_up_the_operation() {
        let (queue, events) = sync_channel(EVENTS_WAITING_MAX);
        let handler: Handler = Arc::new(|_, sink| {
            for done in 0..10 * EVENTS_WAITING_MAX as u64 {
                sink(Event::Progress { what: "a".into(), done, total: 0, unit: "bytes".into() });
                sink(Event::Step { name: "b".into(), outcome: "changed".into(), detail: String::new(), ms: 0 });
            }
            Ok((serde_json::json!("whole"), Exit::Done))
        });
        let (told, hears) = std::sync::mpsc::channel();
        std::thread::spawn(move || told.send(run_handler(&handler, Request::Status, &queue)));
        let last = hears.recv_timeout(Duration::from_secs(120)).expect("an operation that waits for nobody");
        assert_eq!(last, Event::Done { value: serde_json::json!("whole"), exit: Exit::Done });
        assert_eq!(events.iter().count(), EVENTS_WAITING_MAX);
    }

    #[test]
    fn a_handler_that_panics_or_ends_twice_gives_one_end() {
        let (queue, events) = sync_channel(EVENTS_WAITING_MAX);
        let handler: Handler = Arc::new(|_, sink| {
            sink(Event::Done { value: serde_json::json!(1), exit: Exit::Done });
            panic!("a planted panic")
        });
        let last = run_handler(&handler, Request::Status, &queue);
        assert!(matches!(last, Event::Failed { fault } if fault.code == Code::Internal));
        drop(queue);
        assert_eq!(events.iter().count(), 0);
    }
}
