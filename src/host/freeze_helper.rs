//! The freeze helper: a process of its own that does nothing but freeze when asked and thaw in time.
//!
//! A freeze outlives the process that made it, so the one that promises to undo it must not be the one that is busy: this one
//! opens no file, takes no lock, writes no log while something is frozen. It ends when the agent's end of the socket closes.

use crate::host::freeze_wire::{End, HELPER_FD, Message, fifreeze, fithaw, receive, send};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::socket::{SockType, getsockopt, sockopt};
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What the hidden verb runs: serves freeze requests on descriptor 3 until it closes, then thaws what is left.
///
/// Gives the exit code: 0, or 2 when descriptor 3 is no such socket (somebody typed the hidden verb by hand).
pub fn freeze_helper_main() -> i32 {
    // SAFETY: only looked at; if nothing is open there, the call below says so.
    let there = unsafe { BorrowedFd::borrow_raw(HELPER_FD) };
    if !matches!(getsockopt(&there, sockopt::SockType), Ok(SockType::SeqPacket)) {
        return 2;
    }
    // SAFETY: whoever started us gave us this descriptor, and nothing in this young process has taken it.
    let socket = unsafe { OwnedFd::from_raw_fd(HELPER_FD) };
    withdraw();
    match Helper::new(socket) {
        Ok(mut helper) => {
            helper.serve();
            0
        }
        Err(_) => 1,
    }
}

/// Cuts every tie that could stop or delay this process while something is frozen. Each step is best effort: without it the helper
/// still works, only less surely.
fn withdraw() {
    // SAFETY: this process has just begun; what the parent leaked to us is used by nobody here.
    unsafe { libc::close_range(HELPER_FD as u32 + 1, u32::MAX, 0) };
    // A service manager that stops everything in the group must not stop us between freeze and thaw; the closed socket ends us.
    for ignored in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGPIPE] {
        // SAFETY: ignoring runs no code of ours.
        let _ = unsafe { signal(ignored, SigHandler::SigIgn) };
    }
    let _ = std::env::set_current_dir("/");
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    let _ = nix::sys::prctl::set_name(c"doublure-freeze");
    // MCL_ONFAULT (4): pages stay once touched, but the whole program is not read in for it.
    // SAFETY: locks pages, changes no content.
    unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) };
}

/// File systems of one request, shared with the freezing thread.
struct Job {
    id: u64,
    fds: Vec<OwnedFd>,
    progress: Mutex<Progress>,
}

#[derive(Default)]
struct Progress {
    /// Indices of what is frozen, in order.
    frozen: Vec<usize>,
    /// The deadline came or the agent went: freeze no more, and thaw what freezes from now on.
    aborted: bool,
    /// Set once the thread is through.
    outcome: Option<Result<(), (Errno, usize)>>,
}

impl Job {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Freezes in order, all or none. Runs in the freezing thread, because the ioctl can take long and cannot be interrupted.
    fn freeze(&self) {
        for (index, fd) in self.fds.iter().enumerate() {
            if self.lock().aborted {
                break;
            }
            let frozen = fifreeze(fd);
            let mut progress = self.lock();
            match frozen {
                Ok(()) if progress.aborted => {
                    let _ = fithaw(fd);
                    break;
                }
                Ok(()) => progress.frozen.push(index),
                Err(error) => {
                    drop(progress);
                    self.thaw();
                    self.lock().outcome = Some(Err((error, index)));
                    return;
                }
            }
        }
        self.lock().outcome = Some(Ok(()));
    }

    /// Thaws what is frozen, last first.
    fn thaw(&self) -> End {
        let mut progress = self.lock();
        let mut end = End::Asked;
        while let Some(index) = progress.frozen.pop() {
            match fithaw(&self.fds[index]) {
                Ok(true) => {}
                Ok(false) if end == End::Asked => end = End::Stolen,
                Ok(false) => {}
                Err(_) => end = End::Refused,
            }
        }
        end
    }
}

enum State {
    Idle,
    /// The thread is at it.
    Freezing {
        job: Arc<Job>,
        began: Instant,
        deadline: Instant,
    },
    Frozen {
        job: Arc<Job>,
        began: Instant,
        deadline: Instant,
    },
    /// Thawed at the deadline; the agent does not know yet.
    Late {
        id: u64,
        held: Duration,
    },
    /// Given up while the thread is still in the kernel; it thaws what it freezes. Kept until it comes back.
    Stuck {
        job: Arc<Job>,
    },
}

struct Helper {
    socket: OwnedFd,
    jobs: Sender<Arc<Job>>,
    ready: PipeReader,
    state: State,
}

impl Helper {
    fn new(socket: OwnedFd) -> std::io::Result<Helper> {
        let (ready, tell) = std::io::pipe()?;
        let (jobs, take) = channel();
        // Started now, so that a freeze needs neither a new thread nor its memory.
        std::thread::Builder::new().name("freeze".into()).spawn(move || freezing_thread(take, tell))?;
        send(&socket, Message::Hello, &[])?;
        Ok(Helper { socket, jobs, ready, state: State::Idle })
    }

    fn serve(&mut self) {
        loop {
            let wait = match &self.state {
                State::Freezing { deadline, .. } | State::Frozen { deadline, .. } => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    // Rounded up, and cut: a wake-up too early only turns the loop once more.
                    PollTimeout::try_from(left.as_millis().saturating_add(1).min(60_000) as i32).unwrap_or(PollTimeout::MAX)
                }
                _ => PollTimeout::NONE,
            };
            let (asked, ready) = {
                let mut fds =
                    [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN), PollFd::new(self.ready.as_fd(), PollFlags::POLLIN)];
                match poll(&mut fds, wait) {
                    Ok(_) => {}
                    Err(Errno::EINTR | Errno::EAGAIN) => continue,
                    // Nothing can be watched any more: thaw and go.
                    Err(_) => break,
                }
                (fds[0].any().unwrap_or(true), fds[1].any().unwrap_or(true))
            };
            if ready {
                self.freezing_done();
            }
            if asked && !self.answer() {
                break;
            }
            self.watch_deadline();
        }
        self.end();
    }

    /// The freezing thread is through with its job.
    fn freezing_done(&mut self) {
        let _ = self.ready.read(&mut [0]);
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Freezing { job, began, deadline } => {
                let outcome = job.lock().outcome.take().unwrap_or(Err((Errno::ECANCELED, 0)));
                let id = job.id;
                match outcome {
                    Ok(()) => {
                        self.state = State::Frozen { job, began, deadline };
                        self.say(Message::Frozen { id });
                    }
                    Err((error, index)) => {
                        drop(job);
                        self.say(Message::Failed { id, errno: error as i32, index: index as u32 });
                    }
                }
            }
            State::Stuck { .. } => {}
            other => self.state = other,
        }
    }

    /// One message of the agent; false when it is gone.
    fn answer(&mut self) -> bool {
        let Some((message, fds)) = receive(&self.socket) else { return false };
        match message {
            Message::Freeze { id, deadline } => match self.state {
                State::Idle | State::Late { .. } => self.begin(id, deadline, fds),
                _ => self.say(Message::Failed { id, errno: Errno::EAGAIN as i32, index: 0 }),
            },
            Message::Thaw { id } => self.thaw(id),
            _ => return false,
        }
        true
    }

    fn begin(&mut self, id: u64, deadline: Duration, fds: Vec<OwnedFd>) {
        let began = Instant::now();
        let far = Duration::from_secs(3600);
        let deadline = began + deadline.min(far);
        let job = Arc::new(Job { id, fds, progress: Mutex::default() });
        match self.jobs.send(job.clone()) {
            Ok(()) => self.state = State::Freezing { job, began, deadline },
            Err(_) => self.say(Message::Failed { id, errno: Errno::ECANCELED as i32, index: 0 }),
        }
    }

    fn thaw(&mut self, wanted: u64) {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Frozen { job, began, .. } if job.id == wanted => {
                let end = job.thaw();
                let held = began.elapsed();
                // Closed before the answer: the caller may want to unmount at once.
                drop(job);
                self.say(Message::Thawed { id: wanted, held, end });
            }
            State::Late { id, held } if id == wanted => self.say(Message::Thawed { id, held, end: End::Late }),
            other => {
                self.state = other;
                self.say(Message::Thawed { id: wanted, held: Duration::ZERO, end: End::Late });
            }
        }
    }

    fn watch_deadline(&mut self) {
        let now = Instant::now();
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Freezing { job, deadline, .. } if now >= deadline => {
                job.lock().aborted = true;
                job.thaw();
                let id = job.id;
                self.state = State::Stuck { job };
                self.say(Message::Failed { id, errno: Errno::ETIMEDOUT as i32, index: 0 });
            }
            State::Frozen { job, began, deadline } if now >= deadline => {
                job.thaw();
                self.state = State::Late { id: job.id, held: began.elapsed() };
            }
            other => self.state = other,
        }
    }

    /// A send that fails means that the agent is gone, which the next poll sees.
    fn say(&self, message: Message) {
        let _ = send(&self.socket, message, &[]);
    }

    /// The agent is gone: nothing stays frozen.
    fn end(&mut self) {
        match &self.state {
            State::Frozen { job, .. } => {
                job.thaw();
            }
            State::Freezing { job, .. } | State::Stuck { job } => {
                job.lock().aborted = true;
                job.thaw();
                // The thread may be inside the ioctl. Leaving now would leave behind what it freezes.
                let _ = self.ready.read(&mut [0]);
                job.thaw();
            }
            State::Idle | State::Late { .. } => {}
        }
    }
}

fn freezing_thread(take: Receiver<Arc<Job>>, mut tell: PipeWriter) {
    for job in take {
        job.freeze();
        // Let go of the descriptors before anybody is told.
        drop(job);
        let _ = tell.write_all(&[1]);
    }
}
