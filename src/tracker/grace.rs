//! The RCU grace period: after it no program run is left that began before it.
//!
//! Two ways to have one, both without a kernel module. (1) An update of an array-of-maps element: the kernel waits for
//! running programs before the call returns, so that user space may rely on the new inner map being in use. (2)
//! `membarrier(MEMBARRIER_CMD_GLOBAL)`, which does nothing but wait; but it returns at once on a machine with one CPU
//! (wrong where tracepoint programs are preemptible) and is refused where `nohz_full` is set. Both cost one
//! `synchronize_rcu()`; the first is right everywhere, so it is asked first.

use crate::model::{Fault, Res};
use crate::tracker::kernel::{Kernel, fault_of};
use std::io;

/// `MEMBARRIER_CMD_GLOBAL` of the kernel's `membarrier(2)`.
const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;

/// Waits one grace period. Error: `KERNEL_UNSUPPORTED` when the kernel offers neither way.
pub(super) fn wait(kernel: &Kernel) -> Res<()> {
    let Err(first) = by_map_update(kernel) else { return Ok(()) };
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    match by_membarrier() {
        Ok(()) if cpus > 1 => Ok(()),
        _ => Err(fault_of("waiting for running programs", &first)),
    }
}

/// Replaces the spare element of the array of maps by itself.
pub(super) fn by_map_update(kernel: &Kernel) -> libbpf_rs::Result<()> {
    kernel.touch_spare()
}

/// The system call that only waits.
pub(super) fn by_membarrier() -> Res<()> {
    // SAFETY: membarrier(2) takes no pointers; GLOBAL needs no registration.
    let done = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    match done {
        0 => Ok(()),
        _ => Err(Fault::io("membarrier", &io::Error::last_os_error())),
    }
}
