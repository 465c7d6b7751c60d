//! Owns the order in which a sealed generation reaches the replicas, and a first sync likewise.
//! Gives `Applied` once every byte of it would survive power loss on the replicas and the ledger says so.
//! Keeps replay harmless: applied twice, or half and then whole, the bytes are the same.
//! Never needs network or primary, never acknowledges.
//! Assumes nobody else writes the replicas (the agent holds them).

use crate::delta;
use crate::device::DeviceFile;
use crate::device::Engine;
use crate::device::RUN_BYTES_MAX;
use crate::journal::{Journal, Sealed};
use crate::ledger::Ledger;
use crate::model::{ByteRun, Code, Digest, Fault, GroupSpec, Moment, Position, Res, SealedProof};

/// Zero runs from this size on become holes; smaller ones are written among the others, so that batches stay whole.
const PUNCH_BYTES: u64 = 64 << 10;

/// Proof that everything up to a position is on the replicas, durably, and in the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Applied {
    position: Position,
    digest: Digest,
}

impl SealedProof for Applied {
    fn position(&self) -> Position {
        self.position
    }
    fn digest(&self) -> Digest {
        self.digest
    }
}

/// Applies one sealed generation on top of what the ledger says is applied.
///
/// 1. Every record is decoded, checked, and written in the order in which it was sent (a later one for a block wins).
/// 2. The journal has verified the payload's digest by then; only after that
/// 3. the replicas are flushed, and only after that
/// 4. the ledger says `applied`, durably. The journal may let go of the generation afterwards, not before.
///
/// Died anywhere, the journal still has it and it is applied again. Errors: `CHAIN_BROKEN` when it does not follow,
/// `DEVICE_TOO_SMALL`, `CORRUPT`, `IO_ERROR`, `FLUSH_FAILED`.
pub fn apply(
    journal: &Journal,
    sealed: &Sealed,
    spec: &GroupSpec,
    replicas: &[DeviceFile],
    engine: &mut dyn Engine,
    ledger: &mut Ledger,
) -> Res<Applied> {
    let record = ledger.record().ok_or_else(|| Fault::internal("the ledger", "it has no record"))?;
    if sealed.parent() != (record.applied, record.applied_digest) {
        return Err(Fault::new(
            Code::ChainBroken,
            format!("generation {}", sealed.position()),
            format!("it follows {}, and {} is applied", sealed.parent().0, record.applied),
            "both sides are compared in full; see `doublure status`",
        ));
    }
    check_sizes(spec, replicas)?;
    let mut touched = vec![false; replicas.len()];
    journal.read(sealed, &mut |records| {
        write_records(records, spec, replicas, engine, &mut touched)?;
        Ok(())
    })?;
    for (replica, _) in replicas.iter().zip(&touched).filter(|(_, touched)| **touched) {
        replica.flush()?;
    }
    record_applied(ledger, sealed.position(), sealed.digest(), sealed.cut_at(), false)
}

/// Writes records of a first sync straight to the replicas (S3: the ledger says `syncing` meanwhile). Gives the bytes written.
/// Nothing is durable before [`flush_replicas`]. Errors as [`apply`].
pub fn apply_direct(records: &[u8], spec: &GroupSpec, replicas: &[DeviceFile], engine: &mut dyn Engine) -> Res<u64> {
    check_sizes(spec, replicas)?;
    write_records(records, spec, replicas, engine, &mut vec![false; replicas.len()])
}

/// Makes what was written durable.
pub fn flush_replicas(replicas: &[DeviceFile]) -> Res<()> {
    replicas.iter().try_for_each(DeviceFile::flush)
}

/// Ends a first sync: 1 the replicas are flushed, 2 the ledger says that they hold `position`, whole.
pub fn seal_direct(replicas: &[DeviceFile], ledger: &mut Ledger, position: Position, digest: Digest, cut_at: Moment) -> Res<Applied> {
    flush_replicas(replicas)?;
    record_applied(ledger, position, digest, cut_at, true)
}

fn record_applied(ledger: &mut Ledger, position: Position, digest: Digest, cut_at: Moment, whole: bool) -> Res<Applied> {
    ledger.commit(&mut |record| {
        let record = record.as_mut().ok_or_else(|| Fault::internal("the ledger", "it has no record"))?;
        (record.applied, record.applied_digest, record.applied_cut_at) = (position, digest, cut_at);
        (record.committed, record.committed_digest, record.committed_cut_at) = (position, digest, cut_at);
        record.epoch = record.epoch.max(position.epoch);
        if whole {
            record.syncing = false;
        }
        Ok(())
    })?;
    Ok(Applied { position, digest })
}

fn check_sizes(spec: &GroupSpec, replicas: &[DeviceFile]) -> Res<()> {
    if spec.volumes.len() != replicas.len() {
        return Err(Fault::internal("apply", format!("{} volumes and {} replicas", spec.volumes.len(), replicas.len())));
    }
    for (volume, replica) in spec.volumes.iter().zip(replicas) {
        if replica.size_bytes() < volume.size_bytes {
            return Err(Fault::new(
                Code::DeviceTooSmall,
                format!("the replica of volume {}", volume.name),
                format!("it has {} bytes and the volume {}", replica.size_bytes(), volume.size_bytes),
                "give the replica its full size, then try again",
            ));
        }
    }
    Ok(())
}

/// One record, found in a piece: where it goes and where its stored bytes are.
struct Found {
    head: delta::RecordHead,
    run: ByteRun,
    stored: std::ops::Range<usize>,
}

fn write_records(
    records: &[u8],
    spec: &GroupSpec,
    replicas: &[DeviceFile],
    engine: &mut dyn Engine,
    touched: &mut [bool],
) -> Res<u64> {
    // Read through before anything is written: a piece with a bad record writes nothing.
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(head) = delta::head(&records[at..], &spec.volumes)? {
        let from = at + delta::RECORD_HEADER_BYTES;
        let to = from + head.stored_bytes as usize;
        if to > records.len() {
            return Err(Fault::protocol("a change record is cut off"));
        }
        let run = head.run.bytes(spec.volumes[usize::from(head.volume)].size_bytes);
        found.push(Found { head, run, stored: from..to });
        at = to;
    }
    if at != records.len() {
        return Err(Fault::protocol("bytes are left after the last change record"));
    }
    let punched = |f: &Found| f.head.encoding == 0 && f.run.len >= PUNCH_BYTES;
    let (mut next, mut written) = (0, 0);
    while next < found.len() {
        let volume = usize::from(found[next].head.volume);
        touched[volume] = true;
        if punched(&found[next]) {
            delta_is_zero(&found[next], records)?;
            replicas[volume].zero(found[next].run)?;
            next += 1;
            continue;
        }
        let batch_len = found[next..].iter().take_while(|f| usize::from(f.head.volume) == volume && !punched(f)).count();
        let mut batch = found[next..next + batch_len].iter();
        engine.write(&replicas[volume], &mut |buffer| {
            let Some(one) = batch.next() else { return Ok(None) };
            let len = one.run.len as usize;
            if len > RUN_BYTES_MAX as usize {
                return Err(Fault::protocol("a change record is longer than a run may be"));
            }
            delta::decode(&one.head, &records[one.stored.clone()], &mut buffer[..len])?;
            written += one.run.len;
            Ok(Some(one.run))
        })?;
        next += batch_len;
    }
    Ok(written)
}

/// A zero record is checked as every other is: its crc must be that of as many zeroes.
fn delta_is_zero(found: &Found, records: &[u8]) -> Res<()> {
    let mut plain = vec![0; found.run.len as usize];
    delta::decode(&found.head, &records[found.stored.clone()], &mut plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::engine;
    use crate::model::{BlockRun, EngineKind, FileSystem, Uuid, VolumeSpec};
    use proptest::prelude::*;

    fn spec(sizes: &[u64]) -> GroupSpec {
        let volume = |(n, size): (usize, &u64)| VolumeSpec {
            id: Uuid([n as u8; 16]),
            name: format!("v{n}"),
            size_bytes: *size,
            fs: FileSystem::Ext4,
            mount_options: String::new(),
        };
        GroupSpec { id: Uuid([9; 16]), name: "g".into(), volumes: sizes.iter().enumerate().map(volume).collect(), containers: vec![] }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn records_land_where_a_naive_copy_puts_them(writes in prop::collection::vec((0u16..2, 0u64..90, 1u64..=40, 0u8..3), 1..30)) {
            let sizes = [100 * 4096u64, 90 * 4096 + 512];
            let spec = spec(&sizes);
            let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
            let replicas: Vec<DeviceFile> = sizes.iter().enumerate().map(|(n, size)| DeviceFile::create(&dir.path().join(n.to_string()), *size).unwrap()).collect();
            let mut naive: Vec<Vec<u8>> = sizes.iter().map(|s| vec![0; *s as usize]).collect();
            let (mut records, mut want) = (Vec::new(), 0u64);
            for (volume, start, count, byte) in writes {
                let size = sizes[usize::from(volume)];
                let blocks = size.div_ceil(4096);
                let run = BlockRun { start: start.min(blocks - 1), count: count.min(blocks - start.min(blocks - 1)) };
                let bytes = run.bytes(size);
                let plain: Vec<u8> = (0..bytes.len).map(|i| if byte == 0 { 0 } else { byte ^ (i % 7) as u8 }).collect();
                delta::encode(volume, run, &plain, &mut records);
                naive[usize::from(volume)][bytes.offset as usize..bytes.end() as usize].copy_from_slice(&plain);
                want += bytes.len;
            }
            let mut engine = engine(EngineKind::Auto, 8).unwrap();
            for _ in 0..2 {
                prop_assert!(apply_direct(&records, &spec, &replicas, engine.as_mut()).unwrap() <= want);
                flush_replicas(&replicas).unwrap();
                for (n, bytes) in naive.iter().enumerate() {
                    prop_assert!(std::fs::read(dir.path().join(n.to_string())).unwrap() == *bytes, "volume {n} differs");
                }
            }
        }
    }

    #[test]
    fn a_bad_record_writes_nothing_and_a_small_replica_is_refused() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let spec = spec(&[100 * 4096]);
        let path = dir.path().join("0");
        let replicas = [DeviceFile::create(&path, 100 * 4096).unwrap()];
        let mut engine = engine(EngineKind::Auto, 8).unwrap();
        let mut records = Vec::new();
        delta::encode(0, BlockRun { start: 0, count: 1 }, &[7; 4096], &mut records);
        let whole = records.len();
        delta::encode(0, BlockRun { start: 5, count: 1 }, &[8; 4096], &mut records);
        for cut in [whole + 5, records.len() - 1] {
            assert!(apply_direct(&records[..cut], &spec, &replicas, engine.as_mut()).is_err());
            assert!(std::fs::read(&path).unwrap().iter().all(|b| *b == 0));
        }
        let small = [DeviceFile::create(&dir.path().join("small"), 99 * 4096).unwrap()];
        let fault = apply_direct(&records, &spec, &small, engine.as_mut()).unwrap_err();
        assert_eq!(fault.code, Code::DeviceTooSmall);
    }
}
