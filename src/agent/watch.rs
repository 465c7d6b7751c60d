//! Ends an idle group's sleep at its first write: a thread that waits for the group's ring, and rings the bell of whoever sleeps.

use crate::link::Bell;
use crate::model::{Fault, Res};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// What the thread is to do.
#[derive(Default)]
struct Orders {
    /// Wait for the ring, then ring this.
    armed: Option<Bell>,
    ended: bool,
}

/// The watch over one ring. Ends with its owner.
pub struct Watch {
    orders: Arc<(Mutex<Orders>, Condvar)>,
    end: Arc<EventFd>,
}

impl Watch {
    /// Starts to watch; `ring` becomes readable when a record comes. Error: `IO_ERROR`.
    pub fn start(ring: BorrowedFd<'_>) -> Res<Watch> {
        let io = |e: std::io::Error| Fault::io("the watch over a ring", &e);
        let ring = ring.try_clone_to_owned().map_err(io)?;
        let end = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(|e| io(e.into()))?);
        let watch = Watch { orders: Arc::default(), end };
        let (orders, end) = (watch.orders.clone(), watch.end.clone());
        let name = std::thread::Builder::new().name("ring-watch".into());
        name.spawn(move || run(&orders, &ring, &end)).map_err(io)?;
        Ok(watch)
    }
    /// From now on the first record rings this bell, once.
    pub fn arm(&self, bell: Bell) {
        self.orders.0.lock().unwrap_or_else(PoisonError::into_inner).armed = Some(bell);
        self.orders.1.notify_one();
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.orders.0.lock().unwrap_or_else(PoisonError::into_inner).ended = true;
        self.orders.1.notify_one();
        let _ = self.end.write(1);
    }
}

fn run(orders: &(Mutex<Orders>, Condvar), ring: &OwnedFd, end: &EventFd) {
    loop {
        let bell = {
            let mut held = orders.0.lock().unwrap_or_else(PoisonError::into_inner);
            loop {
                if held.ended {
                    return;
                }
                if let Some(bell) = held.armed.take() {
                    break bell;
                }
                held = orders.1.wait(held).unwrap_or_else(PoisonError::into_inner);
            }
        };
        let mut fds = [PollFd::new(ring.as_fd(), PollFlags::POLLIN), PollFd::new(end.as_fd(), PollFlags::POLLIN)];
        // An interrupted wait rings too early, which costs a look.
        let _ = poll(&mut fds, PollTimeout::NONE);
        bell.ring();
    }
}
