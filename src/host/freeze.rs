//! The agent's side of a freeze.
//!
//! Four things undo a freeze, whichever comes first: our request; the helper at the deadline; the helper when this process dies;
//! the watching thread here when the helper dies.

use crate::host::filesystems::open_on;
use crate::host::freeze_wire::{End, HELPER_FD, MOUNTS_MAX, Message, fithaw, receive, send};
use crate::model::{Code, Fault, Res};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::collections::HashSet;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long the helper may take to come up.
const START_PATIENCE: Duration = Duration::from_secs(20);
/// How long past what was agreed the helper may be silent before it counts as hung.
const ANSWER_PATIENCE: Duration = Duration::from_secs(2);

/// The small process that holds frozen file systems and thaws them at the deadline or when this process dies.
///
/// Takes one thread and about a megabyte. A helper that died or hung is replaced at the next freeze.
pub struct Freezer {
    program: PathBuf,
    helper: Option<Helper>,
    next_id: u64,
}

struct Helper {
    child: Child,
    socket: Arc<OwnedFd>,
    answers: Receiver<Message>,
    held: Arc<Mutex<Held>>,
}

/// What the watching thread thaws should the helper die.
#[derive(Default)]
struct Held {
    fds: Vec<OwnedFd>,
    dead: bool,
}

impl Freezer {
    /// Starts it: `program` is this binary, run with the hidden verb `freeze-helper` and a socket on descriptor 3.
    /// Errors: `TOOL_FAILED`, `IO_ERROR`.
    pub fn start(program: &Path) -> Res<Freezer> {
        let mut freezer = Freezer { program: program.into(), helper: None, next_id: 1 };
        freezer.helper = Some(freezer.start_helper()?);
        Ok(freezer)
    }

    /// The helper's process id, for `status` and for tests; `None` when it is to be started anew.
    pub fn helper_pid(&self) -> Option<u32> {
        self.helper.as_ref().filter(|helper| !helper.lock().dead).map(|helper| helper.child.id())
    }

    fn start_helper(&self) -> Res<Helper> {
        let fault = |error: io::Error| Fault::io("the freeze helper", &error);
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).map_err(|e| fault(e.into()))?;
        // Well above 3: dup2 of a descriptor onto itself would leave it marked close-on-exec.
        let high = fcntl(&theirs, FcntlArg::F_DUPFD_CLOEXEC(HELPER_FD + 7)).map_err(|e| fault(e.into()))?;
        // SAFETY: fcntl has just made this descriptor for us.
        let theirs = unsafe {
            drop(theirs);
            OwnedFd::from_raw_fd(high)
        };
        let mut command = Command::new(&self.program);
        command.arg("freeze-helper").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: between fork and exec only two system calls that are async-signal-safe, and no memory is allocated.
        unsafe {
            command.pre_exec(move || {
                Errno::result(libc::setsid())?;
                Errno::result(libc::dup2(high, HELPER_FD))?;
                Ok(())
            });
        }
        let failed = |cause: String| {
            Fault::new(
                Code::ToolFailed,
                "the freeze helper",
                cause,
                "check that the doublure binary can be run where it was installed",
            )
        };
        let child = command.spawn().map_err(|e| failed(format!("{} could not be run: {e}", self.program.display())))?;
        drop(theirs);
        let socket = Arc::new(ours);
        let held = Arc::new(Mutex::new(Held::default()));
        let (tell, answers) = channel();
        let mut helper = Helper { child, socket, answers, held };
        let (socket, held) = (helper.socket.clone(), helper.held.clone());
        if let Err(error) = std::thread::Builder::new().name("freeze-watch".into()).spawn(move || watch(&socket, &held, &tell)) {
            helper.end();
            return Err(fault(error));
        }
        match helper.answers.recv_timeout(START_PATIENCE) {
            Ok(Message::Hello) => Ok(helper),
            other => {
                helper.end();
                Err(failed(format!("{} freeze-helper did not report ({other:?})", self.program.display())))
            }
        }
    }

    /// Freezes all `mounts` or none, within `deadline` counted from the first freeze. Errors: `FREEZE_TIMEOUT`, `IO_ERROR`.
    ///
    /// Two mounts of one file system count once. Sync them first ([`sync_fs`](crate::host::sync_fs)): a freeze does its own sync with
    /// the writers already standing still. Refused with `BAD_ARGUMENT`: no mount, more than 250, and a file system that this host or
    /// this program itself stands on. `deadline` is cut to an hour.
    pub fn freeze(&mut self, mounts: &[PathBuf], deadline: Duration) -> Res<Frozen<'_>> {
        let (fds, names) = self.open_mounts(mounts)?;
        let id = self.next_id;
        self.next_id += 1;
        self.ask(id, deadline, fds)?;
        let began = Instant::now();
        let answer = match &self.helper {
            Some(helper) => helper.wait(id, deadline + ANSWER_PATIENCE),
            None => Err(RecvTimeoutError::Disconnected),
        };
        let thing = || format!("freezing {}", names.join(", "));
        let busy = "somebody else keeps it frozen";
        let fault = match answer {
            Ok(Message::Frozen { .. }) => return Ok(Frozen { freezer: self, id, began, names, open: true }),
            Ok(Message::Failed { errno, index, .. }) => {
                self.release();
                let name = names.get(index as usize).cloned().unwrap_or_default();
                match Errno::from_raw(errno) {
                    Errno::ETIMEDOUT => timed_out(&names, format!("it was not complete within {deadline:?}, and was undone")),
                    Errno::EAGAIN => timed_out(&names, "the freeze before it is still stuck in the kernel".into()),
                    Errno::EBUSY => Fault::new(
                        Code::IoError,
                        format!("freezing {name}"),
                        busy,
                        "find who runs fsfreeze on it, or run fsfreeze -u, then try again",
                    ),
                    Errno::EOPNOTSUPP | Errno::ENOTTY => {
                        let next = "use the exact cut by capture, which needs no freeze";
                        Fault::new(Code::IoError, format!("freezing {name}"), "its file system cannot be frozen", next)
                    }
                    error => Fault::io(format!("freezing {name}"), &error.into()),
                }
            }
            // Its watching thread has thawed everything by then.
            Err(RecvTimeoutError::Disconnected) => {
                self.drop_helper();
                Fault::new(
                    Code::IoError,
                    thing(),
                    "the freeze helper died; everything was thawed",
                    "it is started anew at the next cut",
                )
            }
            Ok(_) | Err(RecvTimeoutError::Timeout) => {
                // What hangs in the kernel is thawed by the watching thread as soon as the helper is really gone.
                self.drop_helper();
                timed_out(&names, "the freeze helper hangs; it was stopped".into())
            }
        };
        Err(fault)
    }

    /// Opens each file system once.
    fn open_mounts(&self, mounts: &[PathBuf]) -> Res<(Vec<OwnedFd>, Vec<String>)> {
        let refuse = |thing: String, cause: &str, next: &str| Err(Fault::new(Code::BadArgument, thing, cause, next));
        let standing: Vec<u64> =
            [Path::new("/"), &self.program].iter().filter_map(|path| Some(std::fs::metadata(path).ok()?.dev())).collect();
        let (mut fds, mut names, mut seen) = (Vec::new(), Vec::new(), HashSet::new());
        for mount in mounts {
            let file = open_on(mount)?;
            let dev = file.metadata().map_err(|e| Fault::io(mount.display().to_string(), &e))?.dev();
            if standing.contains(&dev) {
                let next = "put the volume's data on a file system of its own";
                return refuse(
                    format!("freezing {}", mount.display()),
                    "this host and doublure itself stand on that file system",
                    next,
                );
            }
            if seen.insert(dev) {
                fds.push(file.into());
                names.push(mount.display().to_string());
            }
        }
        match fds.len() {
            1..=MOUNTS_MAX => Ok((fds, names)),
            0 => refuse("a freeze".into(), "it names no file system", "name at least one mount"),
            _ => refuse("a freeze".into(), "it names more than 250 file systems", "split the group"),
        }
    }

    /// Sends the request, to a new helper where the old one is gone.
    fn ask(&mut self, id: u64, deadline: Duration, fds: Vec<OwnedFd>) -> Res<()> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let mut fds = Some(fds);
        for fresh in [false, true] {
            if fresh || self.helper_pid().is_none() {
                self.drop_helper();
                self.helper = Some(self.start_helper()?);
            }
            let Some(helper) = &self.helper else { continue };
            // Late words on a freeze that was given up.
            while helper.answers.try_recv().is_ok() {}
            let mut held = helper.lock();
            if held.dead {
                continue;
            }
            held.fds = fds.take().unwrap_or_default();
            match send(&helper.socket, Message::Freeze { id, deadline }, &raw) {
                Ok(()) => return Ok(()),
                Err(_) => fds = Some(std::mem::take(&mut held.fds)),
            }
        }
        Err(Fault::new(
            Code::ToolFailed,
            "the freeze helper",
            "it dies as soon as it is started",
            "see the kernel log for what kills it",
        ))
    }

    /// Closes our descriptors of what is thawed.
    fn release(&self) {
        if let Some(helper) = &self.helper {
            helper.lock().fds.clear();
        }
    }

    fn drop_helper(&mut self) {
        if let Some(mut helper) = self.helper.take() {
            helper.end();
        }
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        self.drop_helper();
    }
}

fn timed_out(names: &[String], cause: String) -> Fault {
    let next = "that cut is discarded and tried again; if it happens often, look for slow writes on that disk";
    Fault::new(Code::FreezeTimeout, format!("freezing {}", names.join(", ")), cause, next)
}

impl Helper {
    fn lock(&self) -> MutexGuard<'_, Held> {
        lock(&self.held)
    }

    /// The answer to `id`; words on older ids are passed over.
    fn wait(&self, id: u64, patience: Duration) -> Result<Message, RecvTimeoutError> {
        let until = Instant::now() + patience;
        loop {
            let message = self.answers.recv_timeout(until.saturating_duration_since(Instant::now()))?;
            match message {
                Message::Frozen { id: of } | Message::Failed { id: of, .. } | Message::Thawed { id: of, .. } if of != id => {}
                message => return Ok(message),
            }
        }
    }

    /// Lets the helper go: it thaws and ends when the socket closes; one that does not is killed, and the watching thread thaws.
    fn end(&mut self) {
        // The watching thread holds the socket as well, so closing it here would not be seen.
        let _ = nix::sys::socket::shutdown(self.socket.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        let until = Instant::now() + Duration::from_millis(500);
        while Instant::now() < until {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = self.child.kill();
        for _ in 0..100 {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        // Killed or stuck in the kernel: in both cases what it froze is ours to thaw.
        thaw_all(&self.lock().fds);
    }
}

fn lock(held: &Mutex<Held>) -> MutexGuard<'_, Held> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Thaws, last first, all of them whatever becomes of one. True when every one was frozen until now.
fn thaw_all(fds: &[OwnedFd]) -> bool {
    let mut all = true;
    for fd in fds.iter().rev() {
        all &= matches!(fithaw(fd), Ok(true));
    }
    all
}

/// Passes the helper's answers on; when it dies, thaws what it leaves behind. Nobody else would.
fn watch(socket: &OwnedFd, held: &Mutex<Held>, tell: &Sender<Message>) {
    while let Some((message, _)) = receive(socket) {
        if tell.send(message).is_err() {
            break;
        }
    }
    let mut held = lock(held);
    held.dead = true;
    thaw_all(&held.fds);
    held.fds.clear();
}

/// Frozen file systems. Dropping it thaws.
pub struct Frozen<'a> {
    freezer: &'a mut Freezer,
    id: u64,
    began: Instant,
    names: Vec<String>,
    open: bool,
}

impl Frozen<'_> {
    /// Thaws; gives how long the longest was frozen. `FREEZE_TIMEOUT` when the helper had already thawed: then nothing read
    /// meanwhile may be used.
    pub fn thaw(mut self) -> Res<Duration> {
        self.undo()
    }

    fn undo(&mut self) -> Res<Duration> {
        self.open = false;
        let answer = match &self.freezer.helper {
            Some(helper) => match send(&helper.socket, Message::Thaw { id: self.id }, &[]) {
                Ok(()) => helper.wait(self.id, ANSWER_PATIENCE),
                // Gone, or its queue is full because it hangs.
                Err(Errno::EPIPE | Errno::ECONNRESET) => Err(RecvTimeoutError::Disconnected),
                Err(_) => Err(RecvTimeoutError::Timeout),
            },
            None => Err(RecvTimeoutError::Disconnected),
        };
        match answer {
            Ok(Message::Thawed { held, end: End::Asked, .. }) => {
                self.freezer.release();
                Ok(held)
            }
            Ok(Message::Thawed { held, end: End::Late, .. }) => {
                self.freezer.release();
                Err(timed_out(&self.names, format!("the deadline came first; it was thawed after {held:?}")))
            }
            Ok(Message::Thawed { end: End::Stolen, .. }) => {
                self.freezer.release();
                Err(timed_out(&self.names, "somebody else thawed it meanwhile".into()))
            }
            Ok(Message::Thawed { end: End::Refused, .. }) => {
                self.freezer.release();
                let next = "see the kernel log; fsfreeze -u and, if that fails too, unmounting may free it";
                Err(Fault::new(
                    Code::IoError,
                    format!("thawing {}", self.names.join(", ")),
                    "the kernel refuses to thaw it",
                    next,
                ))
            }
            Err(RecvTimeoutError::Disconnected) => {
                // The watching thread thaws at the helper's death; by our own hand too, in case it is slower than we are.
                self.thaw_ourselves();
                Err(timed_out(&self.names, "the freeze helper died, and everything was thawed at once".into()))
            }
            Ok(_) | Err(RecvTimeoutError::Timeout) => {
                let frozen_until_now = self.thaw_ourselves();
                let held = self.began.elapsed();
                match frozen_until_now {
                    true => Ok(held),
                    false => Err(timed_out(
                        &self.names,
                        "the freeze helper hangs, and something was thawed before it was asked to".into(),
                    )),
                }
            }
        }
    }

    fn thaw_ourselves(&mut self) -> bool {
        let Some(helper) = &self.freezer.helper else { return false };
        let all = {
            let held = helper.lock();
            !held.dead && thaw_all(&held.fds)
        };
        self.freezer.drop_helper();
        all
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        if self.open
            && let Err(fault) = self.undo()
        {
            tracing::warn!(%fault, "thawing after a freeze that was given up");
        }
    }
}

/// Thaws a file system that a dead helper may have left frozen; false when it was not frozen. Error: `IO_ERROR`.
pub fn thaw_leftover(mount: &Path) -> Res<bool> {
    let fd: OwnedFd = open_on(mount)?.into();
    fithaw(&fd).map_err(|e| Fault::io(format!("thawing {}", mount.display()), &e.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_no_helper_is_refused() {
        for program in ["/no/such/program", "/bin/true"] {
            let fault = Freezer::start(Path::new(program)).err().unwrap();
            assert_eq!(fault.code, Code::ToolFailed, "{fault}");
        }
    }
}
