//! Owns the standby's record of deltas between arrival and apply: a preallocated ring, and overflow files for what is larger.
//! Gives `Sealed` for a generation once it would survive power loss, whole and verified.
//! Keeps a sealed generation readable, byte for byte, until it is released as applied.
//! Never acknowledges, never applies, never knows who listens.
//! Assumes the notes headed J in `kernel-notes.md`.

use crate::durable::Storage;
use crate::model::{Digest, GroupId, Moment, Position, Res, SealedProof, VolumeSpec};

/// Proof that a generation is durable and whole. Only the journal makes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed { position: Position, digest: Digest, cut_at: Moment, payload_bytes: u64, _private: () }
impl SealedProof for Sealed {
    fn position(&self) -> Position { self.position }
    fn digest(&self) -> Digest { self.digest }
}
impl Sealed {
    /// When the cut began, as the primary said.
    pub fn cut_at(&self) -> Moment { self.cut_at }
    /// Bytes of payload.
    pub fn payload_bytes(&self) -> u64 { self.payload_bytes }
}

/// What recovery found at start.
#[derive(Debug)]
pub struct Recovered {
    /// Committed generations not yet released, oldest first, chained.
    pub sealed: Vec<Sealed>,
    /// What was dropped and why (an uncommitted tail, for one), in words for the log.
    pub dropped: Vec<String>,
}

/// Where overflow files come from (one per oversized generation); the double gives crash disks.
pub trait Overflow: Send {
    /// Makes a fully allocated storage for a generation. `STANDBY_DISK_FULL` when it does not fit.
    fn create(&mut self, position: Position, len_bytes: u64) -> Res<Box<dyn Storage>>;
    /// Those that exist, for recovery.
    fn existing(&mut self) -> Res<Vec<(Position, Box<dyn Storage>)>>;
    /// Removes one.
    fn remove(&mut self, position: Position) -> Res<()>;
}

/// The journal of one group.
pub struct Journal { _p: () }

impl Journal {
    /// Opens the ring and recovers. `applied` = the position up to which the ledger says everything is applied.
    pub fn open(_group: GroupId, _ring: Box<dyn Storage>, _overflow: Box<dyn Overflow>, _applied: Position) -> Res<(Journal, Recovered)> { todo!() }
    /// Reserves room for a generation: in the ring, else in an overflow file. An open one is dropped first.
    pub fn begin(&mut self, _position: Position, _parent: Position, _parent_digest: Digest, _payload_max_bytes: u64) -> Res<()> { todo!() }
    /// The open generation and its payload bytes so far.
    pub fn open_generation(&self) -> Option<(Position, u64)> { todo!() }
    /// Appends whole change records, each of which is decoded and checked against `volumes` first (S3).
    pub fn append(&mut self, _records: &[u8], _volumes: &[VolumeSpec]) -> Res<()> { todo!() }
    /// Flush payload, write header, flush, read everything back and verify, write COMMIT, flush. `CORRUPT` when the bytes read
    /// back differ; the generation is then dropped and nothing of it can be promoted.
    pub fn seal(&mut self, _payload_bytes: u64, _payload_digest: Digest, _digest: Digest, _cut_at: Moment) -> Res<Sealed> { todo!() }
    /// Drops the open generation.
    pub fn abandon(&mut self) -> Res<()> { todo!() }
    /// Hands the payload of a sealed generation to `sink` in pieces of whole records, verifying its digest as it goes
    /// (an error at the end means: nothing of it may be called applied).
    pub fn read(&self, _sealed: &Sealed, _sink: &mut dyn FnMut(&[u8]) -> Res<()>) -> Res<()> { todo!() }
    /// Lets go of everything up to and including an applied position.
    pub fn release(&mut self, _applied: Position) -> Res<()> { todo!() }
    /// Bytes in use and in all.
    pub fn fill(&self) -> (u64, u64) { todo!() }
}
