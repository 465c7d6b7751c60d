//! Owns the way of a sealed generation onto the replicas, and the standby's word that it is there.
//! Gives `Applied` once every byte survives power loss and the ledger says so.
//! Keeps the order of the records where they overlap; doing it twice gives the same bytes.
//! Never needs the network or the primary; never lets go of the journal itself.
//! Assumes the replicas are held exclusively, and the notes headed D in `kernel-notes.md`.
//!
//! The order of one apply, of one generation or of several in a row:
//! 1. check chain, specification and sizes; nothing was written before a refusal
//! 2. write every record, those of a volume in order, straight onto the replicas; the journal's digest is verified on the way
//! 3. flush every replica that was written to
//! 4. commit APPLIED (position, digest, cut instant) to the ledger, which flushes
//! 5. now, and not before, the caller may let the journal go of it (`Journal::release`)
//!
//! A crash before 4 leaves a replica with a part of the generation, the whole of it in the journal, and a ledger that says so: it
//! is applied again from the start. That is safe because a record's bytes do not depend on what was there before, and what stands
//! around a sector record in the same block is either named by another record or still what it was before the first attempt.

mod records;

use crate::apply::records::write_records;
use crate::device::{DeviceFile, Engine};
use crate::journal::{Journal, Sealed};
use crate::ledger::{Ledger, Record};
use crate::model::{Code, Digest, Fault, GroupSpec, Moment, Position, Res, SealedProof};

/// Proof that everything up to a position is on the replicas, durably, and that the ledger says so. Only apply makes it.
#[derive(Debug)]
pub struct Applied {
    position: Position,
    digest: Digest,
    _private: (),
}

impl SealedProof for Applied {
    fn position(&self) -> Position {
        self.position
    }
    fn digest(&self) -> Digest {
        self.digest
    }
}

/// Puts a sealed generation onto the replicas (`replicas[i]` is that of `spec.volumes[i]`) and says so in the ledger.
///
/// Already so is fine and writes nothing. Errors: `CHAIN_BROKEN` when it does not follow what the ledger calls applied, or a direct
/// sync has not ended; `IDENTITY_CHANGED` or `DEVICE_TOO_SMALL` when replicas and specification do not fit; `CORRUPT` when the
/// journal's bytes rotted (the replica then holds a part of the generation, and the ledger goes on saying that it does not hold
/// it); errors of device and ledger. After any of them the same call can be made again, with a new handle where the old one is
/// poisoned.
pub fn apply(
    journal: &Journal,
    sealed: &Sealed,
    spec: &GroupSpec,
    replicas: &[DeviceFile],
    engine: &mut dyn Engine,
    ledger: &mut Ledger,
) -> Res<Applied> {
    apply_together(journal, std::slice::from_ref(sealed), spec, replicas, engine, ledger)
}

/// The same for several that follow one another, oldest first, with one flush and one word in the ledger for all: a crash before that
/// word leaves what a crash within one leaves, and all of them are applied again. Those that are applied already are passed over.
pub fn apply_together(
    journal: &Journal,
    sealed: &[Sealed],
    spec: &GroupSpec,
    replicas: &[DeviceFile],
    engine: &mut dyn Engine,
    ledger: &mut Ledger,
) -> Res<Applied> {
    // 1
    let Some(last) = sealed.last() else { return Err(Fault::internal("an apply", "nothing was given to it")) };
    let (position, digest) = (last.position(), last.digest());
    let thing = format!("generation {position} of group {}", spec.name);
    let Some(record) = ledger.record() else {
        return Err(Fault::new(Code::ChainBroken, thing, "the ledger holds nothing yet", "define the group first"));
    };
    if (record.applied, record.applied_digest) == (position, digest) {
        return Ok(Applied { position, digest, _private: () });
    }
    let due = match sealed.iter().position(|one| (one.position(), one.digest()) == (record.applied, record.applied_digest)) {
        Some(applied) => &sealed[applied + 1..],
        None => sealed,
    };
    let mut parent = (record.applied, record.applied_digest);
    for one in due {
        check_chain(record, parent, one, &thing)?;
        parent = (one.position(), one.digest());
    }
    if record.spec.id != spec.id {
        let cause = format!("the ledger is that of group {}", record.spec.id);
        return Err(Fault::new(Code::IdentityChanged, thing, cause, "open the ledger of this group"));
    }
    check_sizes(spec, replicas)?;
    // 2
    let mut touched = vec![false; replicas.len()];
    for one in due {
        journal.read(one, &mut |records| write_records(records, spec, replicas, engine, &mut touched).map(|_| ()))?;
    }
    // 3
    for (replica, _) in replicas.iter().zip(&touched).filter(|(_, touched)| **touched) {
        replica.flush()?;
    }
    // 4
    ledger.commit(&mut |record| {
        let Some(record) = record else { return Err(Fault::internal("the ledger", "its record went away during apply")) };
        (record.applied, record.applied_digest, record.applied_cut_at) = (position, digest, last.cut_at());
        if record.committed < position {
            (record.committed, record.committed_digest, record.committed_cut_at) = (position, digest, last.cut_at());
        }
        Ok(())
    })?;
    Ok(Applied { position, digest, _private: () })
}

fn check_chain(record: &Record, stands_at: (Position, Digest), sealed: &Sealed, thing: &str) -> Res<()> {
    let cause = match stands_at == sealed.parent() {
        true if !record.syncing => return Ok(()),
        true => "a direct sync of this replica has begun and not ended".to_string(),
        false => format!("it follows {} and the replica stands at {}", sealed.parent().0, stands_at.0),
    };
    Err(Fault::new(Code::ChainBroken, thing, cause, "compare the volumes in full: run `doublure sync`"))
}

/// Writes whole change records straight onto the replicas, for a first sync: not durable before [`flush_replicas`], and nothing
/// that could be promoted before the ledger says so. Returns the bytes written, zeroes included.
///
/// Errors: `PROTOCOL_ERROR`, `CORRUPT`, `IDENTITY_CHANGED`, `DEVICE_TOO_SMALL`, and those of the device. Some of the records may
/// have been written then.
pub fn apply_direct(records: &[u8], spec: &GroupSpec, replicas: &[DeviceFile], engine: &mut dyn Engine) -> Res<u64> {
    check_sizes(spec, replicas)?;
    write_records(records, spec, replicas, engine, &mut vec![false; replicas.len()])
}

/// Makes everything written to the replicas durable. `FLUSH_FAILED` poisons the handle that failed; what was sent since the last
/// flush is then to be sent again.
pub fn flush_replicas(replicas: &[DeviceFile]) -> Res<()> {
    replicas.iter().try_for_each(DeviceFile::flush)
}

/// Ends a direct sync: what came before it is whole now, and may be promoted.
///
/// 1. Flush every replica. 2. Commit to the ledger: applied and committed at `position`, no longer syncing. A crash before 2 leaves
///    `syncing`, and the sync is done again. Errors: `FLUSH_FAILED`, those of the ledger.
pub fn seal_direct(
    replicas: &[DeviceFile],
    ledger: &mut Ledger,
    position: Position,
    digest: Digest,
    cut_at: Moment,
) -> Res<Applied> {
    // 1
    flush_replicas(replicas)?;
    // 2
    ledger.commit(&mut |record| {
        let Some(record) = record else { return Err(Fault::internal("the ledger", "its record went away during a sync")) };
        (record.applied, record.applied_digest, record.applied_cut_at) = (position, digest, cut_at);
        (record.committed, record.committed_digest, record.committed_cut_at) = (position, digest, cut_at);
        record.epoch = record.epoch.max(position.epoch);
        record.syncing = false;
        Ok(())
    })?;
    Ok(Applied { position, digest, _private: () })
}

/// A replica of another size is another device under the name, or an image that somebody changed.
fn check_sizes(spec: &GroupSpec, replicas: &[DeviceFile]) -> Res<()> {
    if spec.volumes.len() != replicas.len() {
        let cause = format!("{} replicas for {} volumes", replicas.len(), spec.volumes.len());
        return Err(Fault::internal(format!("group {}", spec.name), cause));
    }
    for (volume, replica) in spec.volumes.iter().zip(replicas) {
        let code = match replica.size_bytes().cmp(&volume.size_bytes) {
            std::cmp::Ordering::Equal => continue,
            std::cmp::Ordering::Less => Code::DeviceTooSmall,
            std::cmp::Ordering::Greater => Code::IdentityChanged,
        };
        let cause = format!("it has {} bytes, and the volume has {}", replica.size_bytes(), volume.size_bytes);
        let next = "put the replica's own device back, or sync the group anew onto one of that size";
        return Err(Fault::new(code, format!("the replica of volume {}", volume.name), cause, next));
    }
    Ok(())
}
