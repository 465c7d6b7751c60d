//! Owns the vocabulary: blocks and sets of them, positions, identities, specifications, faults.
//! Gives plain values that every other room speaks in; two of them are proofs that cross rooms.
//! Keeps arithmetic checked: an index, a count and a size are never mixed up silently.
//! Never does I/O, never reads a clock, never allocates by a number that a peer sent.
//! Assumes nothing about kernel, disk or network.
#![forbid(unsafe_code)]
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod blocks;
mod fault;
mod ids;
mod position;
mod spec;

pub use blocks::{BLOCK_BYTES, BlockRun, BlockSet, ByteRun};
pub use fault::{Code, Exit, Fault, Res};
pub use ids::{GroupId, Uuid, VolumeId, check_name};
pub use position::{Digest, Moment, Position, Receipt, SealedProof};
pub use spec::{ContainerSpec, EngineKind, FileSystem, GroupSpec, ImagePin, Role, VolumeSpec};
