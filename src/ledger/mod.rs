//! Owns the small durable record of a group on this host: role, epoch, positions, the pinned inventory.
//! Gives the last edit that was committed, whole.
//! Keeps every change begin -> edit -> commit: two slots written in turn, the newest valid one counts.
//! Never decides what may be written into it.
//! Assumes the notes headed F in `kernel-notes.md`.

use crate::durable::Storage;
use crate::format::{Found, LedgerHead, SECTOR_BYTES};
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

/// The ledger of one group on this host.
///
/// Two slots of [`SLOT_BYTES`]: a header of one sector, then, from the next 4 KiB on, the record as JSON (bytes:
/// `format::LedgerHead`).
pub struct Ledger {
    storage: Box<dyn Storage>,
    record: Option<Record>,
    /// Sequence of the slot that counts; 0 = none. Slots are written in turn, so sequence modulo 2 names the slot.
    sequence: u64,
    /// A failed commit leaves it unknown what the slots hold: nothing more is written before they were read again.
    failed: Option<Fault>,
}

/// Largest encoded record with its header, in bytes; a slot is this large.
pub const SLOT_BYTES: u64 = 1 << 20;
const RECORD_AT: u64 = 4096;

enum Slot {
    Blank,
    Damaged,
    Newer(u16),
    Whole(u64, Box<Record>),
}

impl Ledger {
    /// Opens it: `None` when neither slot was ever written; `CORRUPT` when slots were written and none is valid;
    /// `VERSION_MISMATCH` when a newer version wrote it.
    pub fn open(storage: Box<dyn Storage>) -> Res<(Ledger, Option<Record>)> {
        let slots = [read_slot(storage.as_ref(), 0)?, read_slot(storage.as_ref(), 1)?];
        let mut ledger = Ledger { storage, record: None, sequence: 0, failed: None };
        let mut written = false;
        for slot in slots {
            match slot {
                Slot::Blank => {}
                Slot::Damaged => written = true,
                Slot::Newer(version) => {
                    let cause = format!("version {version} of doublure wrote it");
                    return Err(Fault::new(Code::VersionMismatch, "the group's ledger", cause, "use that version or a later one"));
                }
                Slot::Whole(sequence, record) if sequence > ledger.sequence => {
                    (ledger.sequence, ledger.record) = (sequence, Some(*record));
                }
                Slot::Whole(..) => {}
            }
        }
        // One slot damaged and the other blank is a first commit that was torn: nothing was ever promised by it. Two damaged
        // ones cannot come from one crash.
        let torn_first = written && ledger.record.is_none() && matches!(read_slot(ledger.storage.as_ref(), 0)?, Slot::Blank);
        if written && ledger.record.is_none() && !torn_first {
            return Err(Fault::new(
                Code::Corrupt,
                "the group's ledger",
                "neither of its slots is whole",
                "restore its file from a backup of the state directory, or protect the group again",
            ));
        }
        let record = ledger.record.clone();
        Ok((ledger, record))
    }

    /// The committed record; `None` before the first commit.
    pub fn record(&self) -> Option<&Record> {
        self.record.as_ref()
    }

    /// Edits a copy and commits it durably; on an error the old record still counts, and after an error of the disk nothing more is
    /// committed through this handle. An edit that changes nothing writes nothing.
    ///
    /// 1. The edit is made on a copy. 2. The older slot is written: record first, header after it, in one flush's reach.
    /// 3. Flush. Only then does the copy count. A crash before leaves the newer slot as it was; a torn slot fails its digest.
    pub fn commit(&mut self, edit: &mut dyn FnMut(&mut Option<Record>) -> Res<()>) -> Res<&Record> {
        if let Some(fault) = &self.failed {
            return Err(fault.clone());
        }
        let mut next = self.record.clone();
        edit(&mut next)?;
        let Some(next) = next else { return Err(Fault::internal("the ledger", "an edit removed the record")) };
        if self.record.as_ref() != Some(&next) {
            let bytes = serde_json::to_vec(&next).map_err(|e| Fault::internal("the ledger", e.to_string()))?;
            if bytes.len() as u64 > SLOT_BYTES - RECORD_AT {
                let cause = format!("its record has {} bytes and may have {}", bytes.len(), SLOT_BYTES - RECORD_AT);
                return Err(Fault::new(Code::BadArgument, "the group", cause, "protect fewer containers in one group"));
            }
            let sequence = self.sequence + 1;
            if let Err(fault) = write_slot(self.storage.as_mut(), sequence, next.spec.id, bytes) {
                self.failed = Some(fault.clone());
                return Err(fault);
            }
            self.sequence = sequence;
        }
        Ok(self.record.insert(next))
    }
}

fn write_slot(storage: &mut dyn Storage, sequence: u64, group: crate::model::GroupId, mut bytes: Vec<u8>) -> Res<()> {
    let at = sequence % 2 * SLOT_BYTES;
    let mut head = LedgerHead::of(group, sequence, &bytes).encode().to_vec();
    head.resize(RECORD_AT as usize, 0);
    bytes.resize(bytes.len().next_multiple_of(RECORD_AT as usize), 0);
    storage.write_at(at + RECORD_AT, &bytes)?;
    storage.write_at(at, &head)?;
    storage.flush()
}

fn read_slot(storage: &dyn Storage, index: u64) -> Res<Slot> {
    let at = index * SLOT_BYTES;
    let mut block = vec![0; RECORD_AT as usize];
    storage.read_at(at, &mut block)?;
    let mut sector = [0; SECTOR_BYTES];
    sector.copy_from_slice(&block[..SECTOR_BYTES]);
    let head = match LedgerHead::decode(&sector) {
        Found::Blank => return Ok(Slot::Blank),
        Found::Damaged => return Ok(Slot::Damaged),
        Found::Newer(version) => return Ok(Slot::Newer(version)),
        Found::Whole(head) => head,
    };
    if head.record_bytes > SLOT_BYTES - RECORD_AT || head.sequence % 2 != index {
        return Ok(Slot::Damaged);
    }
    let mut bytes = vec![0; (head.record_bytes as usize).next_multiple_of(RECORD_AT as usize)];
    storage.read_at(at + RECORD_AT, &mut bytes)?;
    bytes.truncate(head.record_bytes as usize);
    match serde_json::from_slice::<Record>(&bytes) {
        Ok(record) if head.names(&bytes) && record.spec.id == head.group => Ok(Slot::Whole(head.sequence, Box::new(record))),
        _ => Ok(Slot::Damaged),
    }
}
