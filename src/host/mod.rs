//! Owns the Linux host's tables and tools: loop devices, mounts, file-system tools, freeze.
//! Gives identities read through open descriptors, attached devices, frozen file systems.
//! Keeps a freeze bounded: a separate process thaws at the deadline or when the agent dies.
//! Never reads or writes what is on a device, never speaks to Docker.
//! Assumes the notes headed H in `kernel-notes.md`.

#![allow(unsafe_code)]

mod filesystems;
mod freeze;
mod freeze_helper;
mod freeze_wire;
mod identity;
mod loops;
mod mounts;
mod names;
mod tools;

pub use filesystems::{check_fs, free_bytes, make_fs, sync_fs};
pub use freeze::{Freezer, Frozen, thaw_leftover};
pub use freeze_helper::freeze_helper_main;
pub use identity::{Backing, DeviceIdentity, hold_exclusive, identity, sectors_changed};
pub use loops::{LoopDevice, attach_loop, detach_loop, loops_of};
pub use mounts::{MountPoint, mounts_of};
pub use names::point_link;
