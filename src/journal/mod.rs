//! Owns the standby's record of deltas between arrival and apply: a preallocated ring, and overflow files for what is larger.
//! Gives `Sealed` for a generation once it would survive power loss, whole and verified.
//! Keeps a sealed generation readable, byte for byte, until it is released as applied.
//! Never acknowledges, never applies, never knows who listens.
//! Assumes the notes headed J in `kernel-notes.md`.
//!
//! The ring's storage, in 4 KiB blocks (their bytes: `format::journal_record`):
//!
//! ```text
//! 0 superblock  1 superblock  2 mark  3 mark | 4 ring ... end
//! one generation, never split:  header | payload, padded to 4 KiB | COMMIT
//! ```
//!
//! A generation begins where the last one ended or, if it does not fit there, at the ring's beginning; if it fits at neither
//! place it goes, in the same form, to an overflow file. So a `begin` never waits for room in the ring: only a full disk refuses.

#[doc(hidden)]
pub mod double;
mod open;
mod overflow;
mod recovery;
mod seal;

pub use overflow::DirOverflow;
#[doc(hidden)]
pub use seal::Step;

use crate::delta::{PLAIN_BYTES_MAX, RECORD_BYTES_MAX, RECORD_HEADER_BYTES, decode, head};
use crate::durable::{AlignedBuf, Storage};
use crate::format::{GenerationHead, JOURNAL_BLOCK_BYTES, Sector, Superblock};
use crate::model::{Code, Digest, Fault, GroupId, Moment, Position, Res, SealedProof, Uuid, VolumeSpec};
use std::collections::{BTreeMap, VecDeque};

/// A block, in bytes.
const BLOCK: u64 = JOURNAL_BLOCK_BYTES as u64;
/// Where the marks stand; the superblocks stand at 0.
const MARKS: u64 = 2 * BLOCK;
/// Where the ring begins.
const RING_START: u64 = 4 * BLOCK;
/// Payload is written and read back in pieces of this many bytes.
const PIECE_BYTES: usize = 1 << 20;
/// Room for what is left of a record at the end of a piece, in bytes, a multiple of a block.
const CARRY_BYTES: usize = RECORD_BYTES_MAX.next_multiple_of(JOURNAL_BLOCK_BYTES);

/// Proof that a generation is durable and whole. Only the journal makes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    position: Position,
    digest: Digest,
    parent: Position,
    parent_digest: Digest,
    cut_at: Moment,
    payload_bytes: u64,
    payload_digest: Digest,
    _private: (),
}

impl SealedProof for Sealed {
    fn position(&self) -> Position {
        self.position
    }
    fn digest(&self) -> Digest {
        self.digest
    }
}

impl Sealed {
    /// When the cut began, as the primary said.
    pub fn cut_at(&self) -> Moment {
        self.cut_at
    }
    /// Bytes of payload.
    pub fn payload_bytes(&self) -> u64 {
        self.payload_bytes
    }
    /// What it follows: position and digest.
    pub fn parent(&self) -> (Position, Digest) {
        (self.parent, self.parent_digest)
    }
    fn of(head: &GenerationHead) -> Sealed {
        Sealed {
            position: head.position,
            digest: head.digest,
            parent: head.parent,
            parent_digest: head.parent_digest,
            cut_at: head.cut_at,
            payload_bytes: head.payload_bytes,
            payload_digest: head.payload_digest,
            _private: (),
        }
    }
}

/// What recovery found at start.
#[derive(Debug)]
pub struct Recovered {
    /// Committed generations not yet released, oldest first, chained.
    pub sealed: Vec<Sealed>,
    /// What was dropped and why (an uncommitted tail, for one), in words for the log.
    pub dropped: Vec<String>,
    /// Something committed cannot be had any more (`CORRUPT`, naming the position). Those in `sealed` are intact and can be
    /// applied; nothing later is taken until [`Journal::discard_corrupt`]. The replica may hold a part of the first missing
    /// generation, if its apply had begun: it is not to be promoted unasked until it was compared in full.
    pub corrupt: Option<Fault>,
    /// The disk does not keep what it flushes: a header was found whose payload, flushed before it, is not there. Nothing that
    /// was acknowledged is known to be lost by it, but the disk (or its write cache) is not to be trusted.
    pub flush_not_kept: bool,
}

/// Where overflow files come from (one per oversized generation); the double gives crash disks.
pub trait Overflow: Send {
    /// Makes a fully allocated storage for a generation, zero, its name durable; what was there under that position is
    /// replaced. `STANDBY_DISK_FULL` when it does not fit.
    fn create(&mut self, position: Position, len_bytes: u64) -> Res<Box<dyn Storage>>;
    /// Those that exist, for recovery, in order of position.
    fn existing(&mut self) -> Res<Vec<(Position, Box<dyn Storage>)>>;
    /// Removes one; fine when it is not there.
    fn remove(&mut self, position: Position) -> Res<()>;
}

/// Where a generation's header stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    /// At this offset of the ring's storage, in bytes.
    Ring(u64),
    /// At the beginning of the overflow file of that position.
    File(Position),
}

impl Base {
    fn offset(self) -> u64 {
        match self {
            Base::Ring(offset) => offset,
            Base::File(_) => 0,
        }
    }
}

/// Bytes from the header of a generation to the end of its COMMIT.
fn span(payload_bytes: u64) -> Option<u64> {
    payload_bytes.checked_next_multiple_of(BLOCK)?.checked_add(2 * BLOCK)
}

/// A sealed generation that the superblock still leads to.
#[derive(Debug)]
struct Held {
    sealed: Sealed,
    base: Base,
    released: bool,
}

impl Held {
    /// The part of the ring that it takes, as beginning and end in bytes.
    fn extent(&self) -> Option<(u64, u64)> {
        match self.base {
            Base::Ring(offset) => Some((offset, offset + span(self.sealed.payload_bytes)?)),
            Base::File(_) => None,
        }
    }
}

/// The open generation.
struct Open {
    position: Position,
    parent: Position,
    parent_digest: Digest,
    max_bytes: u64,
    base: Base,
    /// Payload bytes handed to the storage; the rest is in the buffer.
    written_bytes: u64,
    buffered: usize,
    hasher: blake3::Hasher,
}

impl Open {
    fn payload_bytes(&self) -> u64 {
        self.written_bytes + self.buffered as u64
    }
}

/// The journal of one group.
pub struct Journal {
    group: GroupId,
    lineage: Uuid,
    ring: Box<dyn Storage>,
    overflow: Box<dyn Overflow>,
    /// The open overflow files, by position.
    files: BTreeMap<Position, Box<dyn Storage>>,
    /// Of the newest superblock and mark.
    superblock_sequence: u64,
    mark_sequence: u64,
    /// What the superblock says: the parent of the oldest one held.
    floor: (Position, Digest),
    /// The last sealed generation, or what the next one must follow.
    tip: (Position, Digest),
    /// Where the next generation begins, if it fits there.
    cursor: u64,
    /// In the order of the chain; those released are a beginning of it, and keep their room until the superblock has moved on.
    held: VecDeque<Held>,
    /// Offsets of headers that stand in the ring uncommitted. Wiped before anything is written over their payload, so that a
    /// header without its payload always means a disk that does not keep its flushes.
    scars: Vec<u64>,
    open: Option<Open>,
    /// Why nothing is taken any more until the journal is opened again.
    poisoned: Option<Fault>,
    corrupt: Option<Fault>,
    /// Up to [`PIECE_BYTES`] of payload on their way; empty until the first generation comes.
    buffer: AlignedBuf,
    /// One block on its way.
    block: AlignedBuf,
    /// A record's plain bytes, decoded to be checked.
    plain: Vec<u8>,
    order: &'static [Step],
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal")
            .field("group", &self.group)
            .field("tip", &self.tip)
            .field("held", &self.held)
            .finish_non_exhaustive()
    }
}

impl Journal {
    /// Reserves room for a generation: in the ring, else in an overflow file. An open one is dropped first.
    ///
    /// The first one on a fresh journal, and one after everything sealed was released, may follow any later position (a direct
    /// sync put it on the replica); any other must follow the tip. Errors: `CHAIN_BROKEN`, `STANDBY_DISK_FULL`, `CORRUPT` while
    /// something committed is missing, `FLUSH_FAILED` when the journal must be opened again, `IO_ERROR`.
    pub fn begin(&mut self, position: Position, parent: Position, parent_digest: Digest, payload_max_bytes: u64) -> Res<()> {
        self.usable()?;
        if let Some(fault) = &self.corrupt {
            return Err(fault.clone());
        }
        self.abandon()?;
        if position <= parent || position.epoch < parent.epoch || position.generation <= parent.generation {
            return Err(self.broken(position, format!("it does not come after {parent}, which it names as its parent")));
        }
        let busy = self.held.iter().any(|held| !held.released);
        match (parent, parent_digest) == self.tip {
            true => {}
            false if busy || parent <= self.tip.0 => {
                return Err(self.broken(position, format!("it follows {parent}, and the last one here is {}", self.tip.0)));
            }
            false => self.advance(Some((parent, parent_digest)))?,
        }
        self.wipe_scars()?;
        let Some(span) = span(payload_max_bytes) else {
            let cause = format!("{payload_max_bytes} bytes are asked for");
            return Err(Fault::new(Code::StandbyDiskFull, self.thing(), cause, "send it in smaller generations"));
        };
        if self.room(span).is_none() && self.held.front().is_some_and(|held| held.released) {
            self.advance(None)?;
        }
        let base = match self.room(span) {
            Some(offset) => Base::Ring(offset),
            None => {
                self.files.insert(position, self.overflow.create(position, span)?);
                Base::File(position)
            }
        };
        if self.buffer.is_empty() {
            self.buffer = AlignedBuf::new(PIECE_BYTES);
        }
        self.open = Some(Open {
            position,
            parent,
            parent_digest,
            max_bytes: payload_max_bytes,
            base,
            written_bytes: 0,
            buffered: 0,
            hasher: blake3::Hasher::new(),
        });
        Ok(())
    }

    /// The open generation and its payload bytes so far.
    ///
    /// It stays open while the process lives, so that a broken transfer can go on where it stopped; it does not outlive a restart.
    pub fn open_generation(&self) -> Option<(Position, u64)> {
        self.open.as_ref().map(|open| (open.position, open.payload_bytes()))
    }

    /// Appends whole change records, each of which is decoded and checked against `volumes` first (S3).
    ///
    /// All of them or none: after `PROTOCOL_ERROR` or `CORRUPT` the generation is as it was before the call. After an error of the
    /// storage it is dropped.
    pub fn append(&mut self, records: &[u8], volumes: &[VolumeSpec]) -> Res<()> {
        self.usable()?;
        let Some(open) = &mut self.open else { return Err(not_open()) };
        if records.len() as u64 > open.max_bytes - open.payload_bytes() {
            return Err(Fault::protocol(format!(
                "generation {} is longer than the {} bytes announced",
                open.position, open.max_bytes
            )));
        }
        check_records(records, volumes, &mut self.plain)?;
        open.hasher.update(records);
        let mut rest = records;
        while !rest.is_empty() {
            let Some(open) = &mut self.open else { return Err(not_open()) };
            let len = rest.len().min(PIECE_BYTES - open.buffered);
            self.buffer[open.buffered..open.buffered + len].copy_from_slice(&rest[..len]);
            open.buffered += len;
            rest = &rest[len..];
            if open.buffered == PIECE_BYTES
                && let Err(fault) = self.write_buffer()
            {
                self.drop_open();
                return Err(fault);
            }
        }
        Ok(())
    }

    /// Drops the open generation. Nothing of it can come back.
    pub fn abandon(&mut self) -> Res<()> {
        if let Some(open) = self.open.take()
            && let Base::File(position) = open.base
        {
            self.files.remove(&position);
            self.overflow.remove(position)?;
        }
        Ok(())
    }

    /// As [`Journal::abandon`], after an error that says more than a failing removal could: recovery, or the next `begin` of that
    /// position, removes the file then.
    fn drop_open(&mut self) {
        if let Err(fault) = self.abandon() {
            tracing::warn!(%fault, "an overflow file that was given up stays until the next start");
        }
    }

    /// Hands the payload of a sealed generation to `sink` in pieces of whole records, verifying its digest as it goes
    /// (an error at the end means: nothing of it may be called applied).
    ///
    /// A piece is at most 1 MiB. Errors: `NOTHING_COMMITTED` when it is not held here (any more), `CORRUPT`, `IO_ERROR`, and
    /// whatever `sink` returns.
    pub fn read(&self, sealed: &Sealed, sink: &mut dyn FnMut(&[u8]) -> Res<()>) -> Res<()> {
        let Some(held) = self.held.iter().find(|held| held.sealed == *sealed && !held.released) else {
            let thing = format!("generation {}", sealed.position);
            return Err(Fault::new(
                Code::NothingCommitted,
                thing,
                "the journal does not hold it",
                "ask for the ones that it does hold",
            ));
        };
        let storage = self.storage(held.base)?;
        let corrupt = |cause: &str| {
            let next = "the volumes must be compared in full: run `doublure sync`";
            Fault::new(Code::Corrupt, format!("generation {} in the journal", sealed.position), cause, next)
        };
        // [ the rest of the last piece | a new piece, read to an aligned address ]
        let piece_bytes = piece_of(sealed.payload_bytes).min(PIECE_BYTES - CARRY_BYTES);
        let carry_bytes = CARRY_BYTES.min(piece_bytes);
        let mut buffer = AlignedBuf::new(carry_bytes + piece_bytes);
        let (mut done, mut carried, mut hasher) = (0u64, 0usize, blake3::Hasher::new());
        while done < sealed.payload_bytes {
            let len = (sealed.payload_bytes - done).min(piece_bytes as u64) as usize;
            let padded = len.next_multiple_of(JOURNAL_BLOCK_BYTES);
            storage.read_at(held.base.offset() + BLOCK + done, &mut buffer[carry_bytes..carry_bytes + padded])?;
            hasher.update(&buffer[carry_bytes..carry_bytes + len]);
            done += len as u64;
            let (start, end) = (carry_bytes - carried, carry_bytes + len);
            let whole = whole_records(&buffer[start..end]).ok_or_else(|| corrupt("what stands in it are not change records"))?;
            if whole > 0 {
                sink(&buffer[start..start + whole])?;
            }
            carried = end - start - whole;
            buffer.copy_within(start + whole..end, carry_bytes - carried);
        }
        match carried == 0 && Digest(*hasher.finalize().as_bytes()) == sealed.payload_digest {
            true => Ok(()),
            false => Err(corrupt("its payload no longer gives the digest that it was sealed under")),
        }
    }

    /// Lets go of everything up to and including an applied position, which the ledger must have durably called applied.
    ///
    /// The ring's room is taken back lazily, when it is needed: recovery skips what the ledger calls applied. An overflow file
    /// goes at once: 1. the superblock leads past it  2. flush  3. the file is removed.
    pub fn release(&mut self, applied: Position) -> Res<()> {
        self.usable()?;
        let mut file = false;
        for held in self.held.iter_mut().filter(|held| !held.released && held.sealed.position <= applied) {
            held.released = true;
            file |= matches!(held.base, Base::File(_));
        }
        match file {
            true => self.advance(None),
            false => Ok(()),
        }
    }

    /// Bytes in use and in all.
    pub fn fill(&self) -> (u64, u64) {
        let sealed: u64 =
            self.held.iter().filter(|held| !held.released).filter_map(Held::extent).map(|(from, to)| to - from).sum();
        let open = self.open.as_ref().filter(|open| matches!(open.base, Base::Ring(_))).and_then(|open| span(open.max_bytes));
        (sealed + open.unwrap_or(0), self.ring_end() - RING_START)
    }

    /// The position and digest that the next generation must follow: those of the last one sealed.
    ///
    /// Compare it with what the ledger calls committed: a journal that is behind was lost or replaced.
    pub fn tip(&self) -> (Position, Digest) {
        self.tip
    }

    /// Why nothing more is taken, when something committed is missing (see [`Recovered::corrupt`]).
    pub fn corrupt(&self) -> Option<&Fault> {
        self.corrupt.as_ref()
    }

    /// Gives up what recovery could not find, so that the group can go on after a full comparison. Only when an operator, or the
    /// comparison that makes good for it, says so. The journal begins anew at its tip; nothing of the old chain can come back.
    /// Errors: `GROUP_BUSY` while an intact generation waits to be applied.
    pub fn discard_corrupt(&mut self) -> Res<()> {
        self.usable()?;
        if self.corrupt.is_none() {
            return Ok(());
        }
        if self.held.iter().any(|held| !held.released) {
            let next = "apply them first";
            return Err(Fault::new(
                Code::GroupBusy,
                self.thing(),
                "intact generations before the missing one wait to be applied",
                next,
            ));
        }
        self.abandon()?;
        self.lineage = open::new_lineage()?;
        // Both superblocks: an old one alone must not lead anywhere. All other blocks of the old lineage are strangers now.
        self.advance(Some(self.tip))?;
        self.advance(Some(self.tip))?;
        for (position, _) in std::mem::take(&mut self.files) {
            self.overflow.remove(position)?;
        }
        self.scars.clear();
        self.corrupt = None;
        Ok(())
    }

    fn thing(&self) -> String {
        format!("the journal of group {}", self.group)
    }

    fn usable(&self) -> Res<()> {
        match &self.poisoned {
            Some(fault) => Err(fault.clone()),
            None => Ok(()),
        }
    }

    fn broken(&self, position: Position, cause: String) -> Fault {
        Fault::new(
            Code::ChainBroken,
            format!("generation {position}"),
            cause,
            "the primary asks where this side stands and goes on from there",
        )
    }

    /// A failed write or flush of a superblock, a mark or a COMMIT leaves the medium in one of two states. Only reading it back
    /// tells which, so nothing more is taken until the journal is opened again.
    fn or_poison<T>(&mut self, result: Res<T>) -> Res<T> {
        if let Err(fault) = &result {
            let cause = format!("what it holds is in doubt after: {}", fault.cause);
            self.poisoned =
                Some(Fault::new(Code::FlushFailed, self.thing(), cause, "it must be opened again: restart the agent"));
        }
        result
    }

    fn ring_end(&self) -> u64 {
        self.ring.len_bytes() / BLOCK * BLOCK
    }

    fn storage(&self, base: Base) -> Res<&dyn Storage> {
        match base {
            Base::Ring(_) => Ok(&*self.ring),
            Base::File(position) => match self.files.get(&position) {
                Some(file) => Ok(&**file),
                None => Err(Fault::internal(self.thing(), format!("the overflow file of {position} is not open"))),
            },
        }
    }

    /// The one place in the ring, of the two where recovery looks, that has `span` bytes of room.
    fn room(&self, span: u64) -> Option<u64> {
        let free = |from: u64| {
            let end = from.checked_add(span).filter(|end| *end <= self.ring_end())?;
            let taken = self.held.iter().filter_map(Held::extent).any(|(start, stop)| start < end && from < stop);
            (!taken).then_some(from)
        };
        free(self.cursor).or_else(|| free(RING_START))
    }

    /// Moves the superblock past everything released, which frees its room.
    ///
    /// 1. write the older superblock slot  2. flush  3. only then reuse the room, and remove overflow files.
    fn advance(&mut self, rebase: Option<(Position, Digest)>) -> Res<()> {
        let count = self.held.iter().take_while(|held| held.released).count();
        let last = self.held.iter().take(count).next_back().map(|held| (held.sealed.position, held.sealed.digest));
        let floor = rebase.or(last).unwrap_or(self.floor);
        let held = self.held.iter().skip(count).find_map(Held::extent).map(|(from, _)| from);
        let open = self.open.as_ref().and_then(|open| match open.base {
            Base::Ring(offset) => Some(offset),
            Base::File(_) => None,
        });
        let tail = held.or(open).unwrap_or(RING_START);
        self.write_superblock(floor, tail)?;
        if held.is_none() {
            // The ring is empty: it begins anew at the tail, where recovery will look first.
            self.cursor = tail;
        }
        self.floor = floor;
        if let Some(tip) = rebase {
            self.tip = tip;
        }
        for gone in self.held.drain(..count).collect::<Vec<_>>() {
            if let Base::File(position) = gone.base {
                self.files.remove(&position);
                self.overflow.remove(position)?;
            }
        }
        Ok(())
    }

    fn write_superblock(&mut self, (floor, floor_digest): (Position, Digest), tail: u64) -> Res<()> {
        let sequence = self.superblock_sequence + 1;
        let (group, lineage, ring_bytes) = (self.group, self.lineage, self.ring.len_bytes());
        let sector = Superblock { group, lineage, sequence, ring_bytes, tail, floor, floor_digest }.encode();
        let written = self.write_ring_block((sequence - 1) % 2 * BLOCK, &sector).and_then(|()| self.ring.flush());
        self.or_poison(written)?;
        self.superblock_sequence = sequence;
        Ok(())
    }

    fn write_ring_block(&mut self, offset: u64, sector: &Sector) -> Res<()> {
        self.block[..sector.len()].copy_from_slice(sector);
        self.ring.write_at(offset, &self.block)
    }

    /// 1. zero the header of every attempt that was given up after its header was written  2. flush.
    fn wipe_scars(&mut self) -> Res<()> {
        if self.scars.is_empty() {
            return Ok(());
        }
        for offset in self.scars.clone() {
            self.write_ring_block(offset, &[0; crate::format::SECTOR_BYTES])?;
        }
        self.ring.flush()?;
        self.scars.clear();
        Ok(())
    }

    /// Hands what is buffered to the storage, padded with zeroes to a whole block.
    fn write_buffer(&mut self) -> Res<()> {
        let Some(open) = &mut self.open else { return Err(not_open()) };
        let padded = open.buffered.next_multiple_of(JOURNAL_BLOCK_BYTES);
        self.buffer[open.buffered..padded].fill(0);
        let at = open.base.offset() + BLOCK + open.written_bytes;
        let storage = match open.base {
            Base::Ring(_) => &mut self.ring,
            Base::File(position) => match self.files.get_mut(&position) {
                Some(file) => file,
                None => return Err(Fault::internal("the journal", format!("the overflow file of {position} is not open"))),
            },
        };
        storage.write_at(at, &self.buffer[..padded])?;
        open.written_bytes += open.buffered as u64;
        open.buffered = 0;
        Ok(())
    }
}

fn not_open() -> Fault {
    Fault::new(Code::ProtocolError, "the journal", "no generation is open", "the primary begins it again")
}

/// Decodes every record and checks it against the geometry and its checksum; nothing is kept of it.
fn check_records(records: &[u8], volumes: &[VolumeSpec], plain: &mut Vec<u8>) -> Res<()> {
    plain.resize(PLAIN_BYTES_MAX, 0);
    let mut rest = records;
    while !rest.is_empty() {
        let cut = || Fault::protocol("a change record is cut off");
        let head = head(rest, volumes)?.ok_or_else(cut)?;
        let end = RECORD_HEADER_BYTES + head.stored_bytes as usize;
        let stored = rest.get(RECORD_HEADER_BYTES..end).ok_or_else(cut)?;
        decode(&head, stored, &mut plain[..head.len_bytes as usize])?;
        rest = &rest[end..];
    }
    Ok(())
}

/// How many bytes at the start of `bytes` are whole records; `None` when they cannot be records.
///
/// Only the length is looked at: bytes 20 to 24 of a record's header (byte map: `delta::record`). They were checked against the
/// geometry when they came, and whoever gets them from here checks them again.
fn whole_records(bytes: &[u8]) -> Option<usize> {
    let mut whole = 0;
    while let Some(header) = bytes[whole..].first_chunk::<RECORD_HEADER_BYTES>() {
        let stored = u32::from_le_bytes([header[20], header[21], header[22], header[23]]) as usize;
        let len = RECORD_HEADER_BYTES + stored;
        if len > RECORD_BYTES_MAX {
            return None;
        }
        match bytes.len() - whole >= len {
            true => whole += len,
            false => break,
        }
    }
    Some(whole)
}

/// How much of a payload is read at once, in bytes: all of it rounded up to blocks, or a piece.
fn piece_of(payload_bytes: u64) -> usize {
    payload_bytes.min(PIECE_BYTES as u64).next_multiple_of(BLOCK) as usize
}

/// The digest of `payload_bytes` of payload as they stand on the medium.
fn payload_digest(storage: &dyn Storage, base: Base, payload_bytes: u64, buffer: &mut AlignedBuf) -> Res<Digest> {
    let (mut done, mut hasher) = (0, blake3::Hasher::new());
    while done < payload_bytes {
        let len = (payload_bytes - done).min(buffer.len() as u64) as usize;
        storage.read_at(base.offset() + BLOCK + done, &mut buffer[..len.next_multiple_of(JOURNAL_BLOCK_BYTES)])?;
        hasher.update(&buffer[..len]);
        done += len as u64;
    }
    Ok(Digest(*hasher.finalize().as_bytes()))
}

#[cfg(test)]
mod tests;
