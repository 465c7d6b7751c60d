//! Owns the small durable record of a group on this host: role, epoch, positions, the pinned inventory.
//! Gives the last edit that was committed, whole.
//! Keeps every change begin -> edit -> commit: two slots written in turn, the newest valid one counts.
//! Never decides what may be written into it.
//! Assumes the notes headed F in `kernel-notes.md`.

//!
//! Two slots of [`SLOT_BYTES`], written in turn. Each holds the record twice if it fits twice, so that one bad sector of the
//! newest slot does not bring an older record (an older epoch!) back:
//!
//! ```text
//! slot:  header 4 KiB | record ...      half a slot further, again:  header 4 KiB | record ...
//! ```
//!
//! A commit, in this order:
//! 1. write the slot that does not hold the current record  2. flush  3. read it back and compare. Only then it counts.
//!
//! The very first commit goes to both slots, one after the other: a damaged slot beside one that was never written is then always
//! a first commit that a crash cut off.

use crate::durable::{ALIGN_BYTES, AlignedBuf, Storage};
use crate::format::{Found, LedgerHead, SECTOR_BYTES, Sector};
use crate::model::{Code, Digest, Fault, GroupSpec, Moment, Position, Res, Role};
use serde::{Deserialize, Serialize};

/// Everything that the ledger holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// What this host is to the group.
    pub role: Role,
    /// The highest epoch ever made durable here.
    pub epoch: u64,
    /// The group.
    pub spec: GroupSpec,
    /// The peer's name.
    pub peer: String,
    /// Standby: last committed position known to the ledger (the journal may be further); primary: last acknowledged.
    pub committed: Position,
    /// Its digest.
    pub committed_digest: Digest,
    /// When the cut of `committed` began.
    pub committed_cut_at: Moment,
    /// Standby: everything up to here is on the replica.
    pub applied: Position,
    /// Digest of `applied`.
    pub applied_digest: Digest,
    /// When the cut of `applied` began.
    pub applied_cut_at: Moment,
    /// Standby: a direct first sync has begun and not ended: the replica is not promotable.
    pub syncing: bool,
    /// Images that were proven here: config digest -> local image id.
    pub images: std::collections::BTreeMap<String, String>,
    /// The last failover's report, as `failover` made it.
    #[serde(default)]
    pub last_failover: Option<serde_json::Value>,
}

impl Record {
    /// The first record of a group on a host: nothing committed, nothing applied.
    pub fn new(role: Role, epoch: u64, spec: GroupSpec, peer: &str) -> Record {
        Record {
            role,
            epoch,
            spec,
            peer: peer.into(),
            committed: Position::default(),
            committed_digest: Digest::default(),
            committed_cut_at: Moment(0),
            applied: Position::default(),
            applied_digest: Digest::default(),
            applied_cut_at: Moment(0),
            syncing: false,
            images: Default::default(),
            last_failover: None,
        }
    }
}

/// Length of a slot in bytes.
pub const SLOT_BYTES: u64 = 1 << 20;
/// Length of the ledger's storage in bytes.
pub const STORAGE_BYTES: u64 = 2 * SLOT_BYTES;
/// Largest encoded record, in bytes.
pub const RECORD_BYTES_MAX: u64 = SLOT_BYTES - HEADER_BYTES;

/// What stands before a record, in bytes.
const HEADER_BYTES: u64 = ALIGN_BYTES as u64;
/// Where the second copy stands in a slot, in bytes.
const COPY: u64 = SLOT_BYTES / 2;

/// The ledger of one group on this host.
pub struct Ledger {
    storage: Box<dyn Storage>,
    current: Option<Record>,
    /// Of the current record; 0 = none yet.
    sequence: u64,
    poisoned: Option<Fault>,
}

impl std::fmt::Debug for Ledger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ledger").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

/// What was found in one slot.
enum Slot {
    Blank,
    Damaged,
    Valid(u64, Box<Record>),
}

impl Ledger {
    /// Opens it: `None` when no commit was ever finished; `CORRUPT` when there was one and no slot is valid.
    ///
    /// Further errors: `BAD_ARGUMENT` when the storage is shorter than [`STORAGE_BYTES`], `VERSION_MISMATCH` when a newer program
    /// wrote it, `IO_ERROR`. What is found is flushed first, so that it can be relied on.
    pub fn open(mut storage: Box<dyn Storage>) -> Res<(Ledger, Option<Record>)> {
        if storage.len_bytes() < STORAGE_BYTES {
            let cause = format!("its storage has {} bytes", storage.len_bytes());
            return Err(Fault::new(Code::BadArgument, "the ledger", cause, format!("give it {STORAGE_BYTES} bytes")));
        }
        storage.flush()?;
        let slots = [read_slot(&*storage, 0)?, read_slot(&*storage, 1)?];
        let (sequence, current) = match slots {
            [Slot::Valid(a, record), Slot::Valid(b, newer)] => {
                if b > a {
                    (b, Some(*newer))
                } else {
                    (a, Some(*record))
                }
            }
            [Slot::Valid(sequence, record), _] | [_, Slot::Valid(sequence, record)] => (sequence, Some(*record)),
            [Slot::Blank | Slot::Damaged, Slot::Blank] => (0, None),
            [_, Slot::Damaged] => {
                let next = "restore the state directory from a backup, or set the group up again";
                return Err(Fault::new(Code::Corrupt, "the ledger", "neither of its two slots is whole", next));
            }
        };
        let mut ledger = Ledger { storage, current: None, sequence, poisoned: None };
        if let Some(record) = &current
            && sequence == 1
        {
            // The first commit was cut off between its two slots: it is finished now.
            ledger.write(record)?;
        }
        ledger.current = current.clone();
        Ok((ledger, current))
    }

    /// The committed record; `None` before the first commit.
    pub fn record(&self) -> Option<&Record> {
        self.current.as_ref()
    }

    /// Edits a copy and commits it durably; on an error the old record still counts and, if a write or flush failed, the ledger
    /// is poisoned: which of the two records counts is found out by opening it again.
    ///
    /// `edit` must leave a record: `None` afterwards is `BAD_ARGUMENT`, as is one longer than [`RECORD_BYTES_MAX`].
    pub fn commit(&mut self, edit: &mut dyn FnMut(&mut Option<Record>) -> Res<()>) -> Res<&Record> {
        if let Some(fault) = &self.poisoned {
            return Err(fault.clone());
        }
        let mut copy = self.current.clone();
        edit(&mut copy)?;
        let Some(record) = copy else {
            return Err(Fault::new(
                Code::BadArgument,
                "the ledger",
                "an edit took the record away",
                "remove the ledger's file instead",
            ));
        };
        let first = self.sequence == 0;
        let mut written = self.write(&record);
        if first && written.is_ok() {
            written = self.write(&record);
        }
        if let Err(fault) = written {
            // A record that is too long never reached the storage.
            if fault.code != Code::BadArgument {
                let cause = format!("what it holds is in doubt after: {}", fault.cause);
                self.poisoned =
                    Some(Fault::new(Code::FlushFailed, "the ledger", cause, "it must be opened again: restart the agent"));
            }
            return Err(fault);
        }
        Ok(self.current.insert(record))
    }

    /// Steps 1 to 3 of a commit.
    fn write(&mut self, record: &Record) -> Res<()> {
        let json = serde_json::to_vec(record).map_err(|error| Fault::internal("the ledger's record", error.to_string()))?;
        if json.len() as u64 > RECORD_BYTES_MAX {
            let cause = format!("its record is {} bytes long, {RECORD_BYTES_MAX} are allowed", json.len());
            return Err(Fault::new(Code::BadArgument, "the ledger", cause, "put fewer or smaller containers into the group"));
        }
        let sequence = self.sequence + 1;
        let head = LedgerHead::of(record.spec.id, sequence, &json);
        let mut image = AlignedBuf::new((HEADER_BYTES as usize + json.len()).next_multiple_of(ALIGN_BYTES));
        image[..SECTOR_BYTES].copy_from_slice(&head.encode());
        image[HEADER_BYTES as usize..][..json.len()].copy_from_slice(&json);
        let slot = (sequence - 1) % 2;
        self.storage.write_at(slot * SLOT_BYTES, &image)?;
        if image.len() as u64 <= COPY {
            self.storage.write_at(slot * SLOT_BYTES + COPY, &image)?;
        }
        self.storage.flush()?;
        match read_slot(&*self.storage, slot)? {
            Slot::Valid(found, same) if found == sequence && *same == *record => {
                self.sequence = sequence;
                Ok(())
            }
            _ => Err(Fault::new(
                Code::Corrupt,
                "the ledger",
                "its disk gives back other bytes than were written",
                "replace the disk",
            )),
        }
    }
}

/// Reads a slot: its first copy, else its second. A stale second copy (the first record was long, an older one short) has a lower
/// sequence and is only taken when the first copy is damaged; then it is no newer than the other slot, unless both are damaged.
fn read_slot(storage: &dyn Storage, slot: u64) -> Res<Slot> {
    let mut found = Slot::Blank;
    for copy in [0, COPY] {
        match read_copy(storage, slot * SLOT_BYTES + copy, SLOT_BYTES - copy)? {
            valid @ Slot::Valid(..) => return Ok(valid),
            Slot::Damaged => found = Slot::Damaged,
            Slot::Blank => {}
        }
    }
    Ok(found)
}

fn read_copy(storage: &dyn Storage, offset: u64, room: u64) -> Res<Slot> {
    let mut block = AlignedBuf::new(HEADER_BYTES as usize);
    storage.read_at(offset, &mut block)?;
    let sector: Sector = std::array::from_fn(|i| block[i]);
    let head = match LedgerHead::decode(&sector) {
        Found::Whole(head) if head.record_bytes <= room - HEADER_BYTES => head,
        Found::Blank => return Ok(Slot::Blank),
        Found::Whole(_) | Found::Damaged => return Ok(Slot::Damaged),
        Found::Newer(version) => {
            let cause = format!("it is of version {version}, which this program does not know");
            return Err(Fault::new(
                Code::VersionMismatch,
                "the ledger",
                cause,
                "start the version that wrote it, or a later one",
            ));
        }
    };
    let len = head.record_bytes as usize;
    let mut bytes = AlignedBuf::new(len.next_multiple_of(ALIGN_BYTES));
    storage.read_at(offset + HEADER_BYTES, &mut bytes)?;
    if !head.names(&bytes[..len]) {
        return Ok(Slot::Damaged);
    }
    match serde_json::from_slice::<Record>(&bytes[..len]) {
        Ok(record) if record.spec.id == head.group => Ok(Slot::Valid(head.sequence, Box::new(record))),
        _ => Ok(Slot::Damaged),
    }
}
