//! Change records onto replicas: large writes many in flight, holes as holes, and sectors without a byte of what is around them.
//!
//! A replica takes writes of its alignment (512 or 4096 bytes, `DeviceFile::align_bytes`) straight. Of a sector record that does
//! not fit it, the units at its ends are *edges*: they are read first, all those of a batch together; every record of the batch is
//! laid over those that it shares bytes with, in order; and they are written last. So an edge is read and written once for any
//! number of records in it, and what it holds at the end is what writing them one after another would have left.

use crate::delta::{PLAIN_BYTES_MAX, RECORD_HEADER_BYTES, RecordHead, decode, head};
use crate::device::{DeviceFile, Engine, RUN_BYTES_MAX};
use crate::model::{BLOCK_BYTES, ByteRun, Fault, GroupSpec, Res};
use std::collections::BTreeSet;

/// Zero runs of at least this many blocks become holes (or BLKZEROOUT); shorter ones are written, which is one request among many
/// in flight instead of a call of its own.
const HOLE_BLOCKS_MIN: u64 = 16;
/// Most edges of one batch: 4 MiB of them. One record has two at most.
const EDGES_MAX: usize = 1024;

/// A record, and its stored bytes in the piece of payload that it came in.
struct Here<'a> {
    head: RecordHead,
    stored: &'a [u8],
}

/// Writes a piece of payload (whole records), those of one volume in their order; `touched` learns which volumes there were.
/// Gives the plain bytes of the records.
pub(super) fn write_records(
    records: &[u8],
    spec: &GroupSpec,
    replicas: &[DeviceFile],
    engine: &mut dyn Engine,
    touched: &mut [bool],
) -> Res<u64> {
    let mut all = index(records, spec)?;
    // Of two volumes no byte is the same, so their order means nothing, and records that take turns still go out together.
    all.sort_by_key(|here| here.head.volume);
    let mut plain = Vec::new();
    for of_volume in all.chunk_by(|a, b| a.head.volume == b.head.volume) {
        let volume = usize::from(of_volume[0].head.volume);
        touched[volume] = true;
        let mut rest = of_volume;
        while !rest.is_empty() {
            let taken = match is_hole(&rest[0].head, replicas[volume].size_bytes()) {
                true => punch(rest, &replicas[volume], &mut plain)?,
                false => write_batch(rest, &replicas[volume], engine, &mut plain)?,
            };
            rest = &rest[taken..];
        }
    }
    Ok(all.iter().map(|here| here.head.len_bytes).sum())
}

/// The records of a piece of payload, each checked against the geometry. `PROTOCOL_ERROR` when it does not end with one.
fn index<'a>(records: &'a [u8], spec: &GroupSpec) -> Res<Vec<Here<'a>>> {
    let cut = || Fault::protocol("a change record is cut off");
    let (mut all, mut rest) = (Vec::new(), records);
    while !rest.is_empty() {
        let head = head(rest, &spec.volumes)?.ok_or_else(cut)?;
        let end = RECORD_HEADER_BYTES + head.stored_bytes as usize;
        let stored = rest.get(RECORD_HEADER_BYTES..end).ok_or_else(cut)?;
        all.push(Here { head, stored });
        rest = &rest[end..];
    }
    Ok(all)
}

/// Zeroes of whole blocks: what may become part of a hole.
fn is_blank(head: &RecordHead, size_bytes: u64) -> bool {
    head.is_zero() && inside(head.bytes(), BLOCK_BYTES, size_bytes) == Some(head.bytes())
}

fn is_hole(head: &RecordHead, size_bytes: u64) -> bool {
    is_blank(head, size_bytes) && head.block_run().count >= HOLE_BLOCKS_MIN
}

/// The part of `run` that is whole units of `align` bytes; the last unit of a volume may be short. `None` when there is none.
fn inside(run: ByteRun, align: u64, size_bytes: u64) -> Option<ByteRun> {
    let from = run.offset.next_multiple_of(align);
    let to = if run.end() == size_bytes { size_bytes } else { run.end() / align * align };
    (from < to).then(|| ByteRun { offset: from, len: to - from })
}

/// Makes the hole that `records` begin with; neighbouring ones are one call. Gives how many records that was.
fn punch(records: &[Here<'_>], replica: &DeviceFile, plain: &mut Vec<u8>) -> Res<usize> {
    let (mut hole, mut taken) = (ByteRun { offset: records[0].head.offset_bytes, len: 0 }, 0);
    for here in records {
        if !is_blank(&here.head, replica.size_bytes()) || here.head.offset_bytes != hole.end() {
            break;
        }
        // A zero record's checksum is that of zeroes of its length; one that says otherwise was not made from zeroes.
        plain.resize(PLAIN_BYTES_MAX, 0);
        decode(&here.head, here.stored, &mut plain[..here.head.len_bytes as usize])?;
        (hole.len, taken) = (hole.len + here.head.len_bytes, taken + 1);
    }
    replica.zero(hole)?;
    Ok(taken)
}

/// Writes what `records` begin with, up to the next hole or [`EDGES_MAX`]. Gives how many records that was.
///
/// 1. read the edges; nothing is in flight then, so they are what the records before left  2. write, in order, what is whole units
///    of the replica, laying every record over the edges  3. write the edges, which waits for what it overlaps.
fn write_batch(records: &[Here<'_>], replica: &DeviceFile, engine: &mut dyn Engine, plain: &mut Vec<u8>) -> Res<usize> {
    let size_bytes = replica.size_bytes();
    // 1
    let (mut edges, taken) = Edges::of(records, replica);
    engine.read(replica, &mut edges.runs().into_iter(), &mut |run, bytes| {
        edges.lay(run, bytes);
        Ok(())
    })?;
    // 2, 3
    let (mut rest, mut edge_runs) = (records[..taken].iter(), edges.runs().into_iter());
    engine.write(replica, &mut |buffer| {
        for here in rest.by_ref() {
            let run = here.head.bytes();
            let whole = inside(run, edges.align, size_bytes);
            if whole == Some(run) {
                // Straight into the engine's buffer, which holds any record.
                let Some(to) = buffer.get_mut(..run.len as usize) else {
                    return Err(Fault::internal("a change record", "it is larger than a buffer of the engine"));
                };
                decode(&here.head, here.stored, to)?;
                edges.lay(run, to);
                return Ok(whole);
            }
            plain.resize(PLAIN_BYTES_MAX, 0);
            let plain = &mut plain[..run.len as usize];
            decode(&here.head, here.stored, plain)?;
            edges.lay(run, plain);
            if let Some(whole) = whole {
                let at = (whole.offset - run.offset) as usize;
                buffer[..whole.len as usize].copy_from_slice(&plain[at..at + whole.len as usize]);
                return Ok(Some(whole));
            }
        }
        Ok(edge_runs.next().inspect(|run| edges.copy(*run, buffer)))
    })?;
    Ok(taken)
}

/// Units of the replica that a batch changes in part, and what is in them.
struct Edges {
    /// Size of a unit.
    align: u64,
    size_bytes: u64,
    /// Their offsets, ascending.
    offsets: Vec<u64>,
    /// [`Edges::align`] bytes of each, one after another.
    bytes: Vec<u8>,
}

impl Edges {
    /// Those of the records up to the next hole or until there are [`EDGES_MAX`], still empty; and how many records that is,
    /// at least one where the first is no hole.
    fn of(records: &[Here<'_>], replica: &DeviceFile) -> (Edges, usize) {
        let (align, size_bytes) = (replica.align_bytes(), replica.size_bytes());
        let (mut offsets, mut taken) = (BTreeSet::new(), 0);
        for here in records {
            if is_hole(&here.head, size_bytes) || offsets.len() + 2 > EDGES_MAX {
                break;
            }
            let run = here.head.bytes();
            if !run.offset.is_multiple_of(align) {
                offsets.insert(run.offset / align * align);
            }
            if !run.end().is_multiple_of(align) && run.end() < size_bytes {
                offsets.insert(run.end() / align * align);
            }
            taken += 1;
        }
        let bytes = vec![0; offsets.len() * align as usize];
        (Edges { align, size_bytes, offsets: offsets.into_iter().collect(), bytes }, taken)
    }

    /// Where they lie; neighbours are one run, as far as a buffer of the engine holds it.
    fn runs(&self) -> Vec<ByteRun> {
        let mut runs: Vec<ByteRun> = Vec::new();
        for offset in &self.offsets {
            let len = self.align.min(self.size_bytes - offset);
            match runs.last_mut() {
                Some(last) if last.end() == *offset && last.len + len <= RUN_BYTES_MAX => last.len += len,
                _ => runs.push(ByteRun { offset: *offset, len }),
            }
        }
        runs
    }

    /// Puts those of `bytes`, which belong at `run`, that lie on an edge there.
    fn lay(&mut self, run: ByteRun, bytes: &[u8]) {
        self.shared(run, |edges, edge, other, len| edges[edge..edge + len].copy_from_slice(&bytes[other..other + len]));
    }

    /// Fills the start of `to` with what stands at `run`, which is one of [`Edges::runs`].
    fn copy(&mut self, run: ByteRun, to: &mut [u8]) {
        self.shared(run, |edges, edge, other, len| to[other..other + len].copy_from_slice(&edges[edge..edge + len]));
    }

    /// For each edge that shares bytes with `run`: where they are in [`Edges::bytes`], where in the run's, and how many.
    fn shared(&mut self, run: ByteRun, mut each: impl FnMut(&mut [u8], usize, usize, usize)) {
        let first = self.offsets.partition_point(|offset| offset + self.align <= run.offset);
        for (at, offset) in self.offsets.iter().enumerate().skip(first).take_while(|(_, offset)| **offset < run.end()) {
            let (from, to) = (run.offset.max(*offset), run.end().min(offset + self.align));
            let edge = at * self.align as usize + (from - offset) as usize;
            each(&mut self.bytes, edge, (from - run.offset) as usize, (to - from) as usize);
        }
    }
}
