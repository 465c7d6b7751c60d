//! The command's end: one request, then events until the last.

use crate::control::line::{Lines, NoLine};
use crate::control::server::may_knock;
use crate::control::{Event, REPLY_MAX_BYTES, REQUEST_MAX_BYTES, Request, Unclear, VERSION, from_line, to_line};
use crate::model::{Code, Fault, Res};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;
use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// The agent says something at least every few seconds, an empty line if need be; after this silence it is stuck or gone.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// How long the whole answer to a status may take.
const STATUS_PATIENCE: Duration = Duration::from_secs(30);

/// Sends one request and hands every event to `on_event`, the last one too; gives the last, `Done` or `Failed`.
///
/// Errors: `NO_AGENT` when nothing answers or the answer breaks off, `VERSION_MISMATCH`, `NOT_ROOT` when the socket may not
/// be opened, `PEER_NOT_TRUSTED` when another user's process listens there, `PROTOCOL_ERROR`.
/// A status is facts that are there already: later than this it is `TIMED_OUT`, and monitoring is not held up.
pub fn call(socket: &Path, request: &Request, on_event: &mut dyn FnMut(&Event)) -> Res<Event> {
    let patience = matches!(request, Request::Status).then_some(STATUS_PATIENCE);
    call_within(socket, request, patience, on_event)
}

/// Without `patience` the operation may last as long as it does, while the agent shows that it lives.
fn call_within(socket: &Path, request: &Request, patience: Option<Duration>, on_event: &mut dyn FnMut(&Event)) -> Res<Event> {
    let deadline = patience.map(|p| Instant::now() + p);
    let stream = connect(socket)?;
    let line = to_line(request)?;
    if line.len() > REQUEST_MAX_BYTES {
        let cause = format!("it is {} bytes long, at most {REQUEST_MAX_BYTES} can be sent", line.len());
        return Err(Fault::new(Code::BadArgument, "the request", cause, "ask for less at a time"));
    }
    let thing = || format!("the agent at {}", socket.display());
    stream.set_write_timeout(Some(SILENCE_MAX)).map_err(|e| Fault::io(thing(), &e))?;
    // An agent that refuses may close before it has read all: what it said is there nevertheless, so read in any case.
    let sent = (&mut &stream).write_all(&line);
    let mut lines = Lines::new(&stream, REPLY_MAX_BYTES);
    loop {
        let left = deadline.map_or(SILENCE_MAX, |d| d.saturating_duration_since(Instant::now()).min(SILENCE_MAX));
        let late = |left: Duration| left < SILENCE_MAX; // our own deadline rather than its silence
        let line = match lines.next(left) {
            Ok(line) if line.is_empty() => continue,
            Ok(line) => line,
            Err(NoLine::Late) if late(left) => {
                let cause = format!("it lives but has not answered within {} seconds", patience.unwrap_or_default().as_secs());
                let next =
                    "an operation of it hangs: keep its log (journalctl -u doublure) and restart it (systemctl restart doublure)";
                return Err(Fault::new(Code::TimedOut, thing(), cause, next));
            }
            Err(NoLine::End(_)) => return Err(broken_off(socket, sent.err())),
            Err(NoLine::Late) => {
                let cause = format!("it has said nothing for {} seconds", SILENCE_MAX.as_secs());
                let next = "look at its log (journalctl -u doublure) and restart it (systemctl restart doublure)";
                return Err(Fault::new(Code::NoAgent, thing(), cause, next));
            }
            Err(NoLine::TooLong) => return Err(strange(socket, format!("its reply is longer than {REPLY_MAX_BYTES} bytes"))),
            Err(NoLine::Io(e)) => return Err(Fault::io(thing(), &e)),
        };
        let event: Event = from_line(&line).map_err(|unclear| match unclear {
            Unclear::Words(cause) => strange(socket, cause),
            Unclear::Version(theirs) => Fault::new(
                Code::VersionMismatch,
                thing(),
                format!("it speaks version {theirs}, this command speaks version {VERSION}"),
                "use the command of the agent's version, or restart the agent after an upgrade",
            ),
        })?;
        on_event(&event);
        if matches!(event, Event::Done { .. } | Event::Failed { .. }) {
            return Ok(event);
        }
    }
}

fn connect(socket: &Path) -> Res<UnixStream> {
    let thing = || format!("the agent at {}", socket.display());
    let start = "start it with `systemctl start doublure`, or by hand with `sudo doublure agent`";
    let stream = UnixStream::connect(socket).map_err(|e| match e.kind() {
        ErrorKind::NotFound => Fault::new(Code::NoAgent, thing(), "there is no such socket: no agent runs", start),
        ErrorKind::ConnectionRefused => Fault::new(Code::NoAgent, thing(), "nobody listens: the agent has ended", start),
        ErrorKind::PermissionDenied => {
            Fault::new(Code::NotRoot, thing(), "the socket is root's alone", "run the command as root (sudo doublure ...)")
        }
        ErrorKind::InvalidInput => Fault::new(
            Code::ConfigInvalid,
            thing(),
            "its path is longer than a socket's may be (107 bytes)",
            "choose a shorter run_dir",
        ),
        _ => Fault::new(Code::NoAgent, thing(), e.to_string(), start),
    })?;
    // A pairing code goes through here: it is told to root only.
    let who = getsockopt(&stream, PeerCredentials).map_err(|errno| Fault::io(thing(), &errno.into()))?;
    match may_knock(who.uid(), geteuid().as_raw()) {
        true => Ok(stream),
        false => Err(Fault::new(
            Code::PeerNotTrusted,
            thing(),
            format!("process {} of user {} listens there, not root's agent", who.pid(), who.uid()),
            "find out what it is, end it, and start the agent",
        )),
    }
}

fn broken_off(socket: &Path, sent: Option<std::io::Error>) -> Fault {
    let cause = match sent {
        None => "it closed the connection before it was done".to_string(),
        Some(e) => format!("it closed the connection before it had heard the request ({e})"),
    };
    let next = "see its log (journalctl -u doublure), then `doublure status`; every operation can be asked for again";
    Fault::new(Code::NoAgent, format!("the agent at {}", socket.display()), cause, next)
}

fn strange(socket: &Path, cause: String) -> Fault {
    let next = "use the doublure command of the agent's version";
    Fault::new(Code::ProtocolError, format!("the reply of the agent at {}", socket.display()), cause, next)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{Handler, serve};
    use std::sync::Arc;

    #[test]
    fn an_agent_that_hangs_behind_its_heartbeat_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let socket = crate::control::socket_in(&dir.path().join("run"));
        let handler: Handler = Arc::new(|_, _| {
            loop {
                std::thread::park(); // a deadlock, as far as anybody can see
            }
        });
        serve(&socket, handler).unwrap();
        let fault = call_within(&socket, &Request::Status, Some(Duration::from_millis(200)), &mut |_| {}).unwrap_err();
        assert_eq!(fault.code, Code::TimedOut, "{fault}");
    }
}
