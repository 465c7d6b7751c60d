//! The way from a payload that arrived to a generation that survives power loss.
//!
//! 1. reserve the room (`begin`)
//! 2. write the payload (`append`, and the last piece here)
//! 3. flush
//! 4. write the header
//! 5. flush
//! 6. read header and payload back from the medium and compare
//! 7. write COMMIT at the generation's end, and the same words into the older mark
//! 8. flush, and read COMMIT back: from here on it is sealed
//!
//! Why each is where it is: 6 comes after 5, so that it reads what a power cut would leave; 7 comes after 6, so that neither COMMIT
//! nor mark ever names what is not there (either of them alone is enough for recovery, so one bad sector loses nothing). 3 would
//! not be needed for that, 5 covers it; but with it a header stands for a payload that was flushed, and recovery can tell a
//! disk that does not keep its flushes from a crash at a bad moment.

use crate::format::{Commit, GenerationHead, SECTOR_BYTES};
use crate::journal::{BLOCK, Base, Held, Journal, MARKS, Sealed, not_open, payload_digest, span};
use crate::model::{Code, Digest, Fault, Moment, Res};

/// One step of the order above. Public only so that the crash tests can plant a wrong order.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// 2
    Payload,
    /// 3 and 5
    Flush,
    /// 4
    Header,
    /// 6
    ReadBack,
    /// 7
    Commit,
    /// 8
    FlushCommit,
}

/// The order.
pub(super) const ORDER: &[Step] =
    &[Step::Payload, Step::Flush, Step::Header, Step::Flush, Step::ReadBack, Step::Commit, Step::FlushCommit];

impl Journal {
    /// Flush payload, write header, flush, read everything back and verify, write COMMIT, flush. `CORRUPT` when the bytes read
    /// back differ; the generation is then dropped and nothing of it can be promoted.
    ///
    /// It is dropped after any error. After one of the last two steps it may nevertheless be found sealed when the journal is
    /// opened again, which is asked for with `FLUSH_FAILED` until it was.
    pub fn seal(&mut self, payload_bytes: u64, payload_digest: Digest, digest: Digest, cut_at: Moment) -> Res<Sealed> {
        self.usable()?;
        let Some(open) = &self.open else { return Err(not_open()) };
        let arrived = (open.payload_bytes(), Digest(*open.hasher.finalize().as_bytes()));
        let head = GenerationHead {
            group: self.group,
            lineage: self.lineage,
            position: open.position,
            parent: open.parent,
            parent_digest: open.parent_digest,
            digest,
            payload_bytes,
            payload_digest,
            cut_at,
            offset: open.base.offset(),
        };
        let base = open.base;
        if arrived != (payload_bytes, payload_digest) {
            self.drop_open();
            let cause = format!("{} bytes arrived and they are not the {payload_bytes} bytes that were sent", arrived.0);
            return Err(Fault::new(
                Code::Corrupt,
                format!("generation {}", head.position),
                cause,
                "it is dropped and sent again",
            ));
        }
        for step in self.order {
            if let Err(fault) = self.step(*step, base, &head) {
                if matches!(step, Step::Commit | Step::FlushCommit) {
                    // In doubt: an overflow file stays for recovery to judge.
                    self.open = None;
                    return self.or_poison(Err(fault));
                }
                if let Base::Ring(offset) = base {
                    self.scars.push(offset);
                }
                self.drop_open();
                return Err(fault);
            }
        }
        self.open = None;
        let sealed = Sealed::of(&head);
        let held = Held { sealed: sealed.clone(), base, released: false };
        if let Some((_, end)) = held.extent() {
            self.cursor = end;
        }
        self.held.push_back(held);
        self.tip = (head.position, head.digest);
        Ok(sealed)
    }

    fn step(&mut self, step: Step, base: Base, head: &GenerationHead) -> Res<()> {
        match step {
            Step::Payload => self.write_buffer(),
            Step::Flush => self.flush_base(base),
            Step::Header => {
                let sector = head.encode();
                self.write_block(base, base.offset(), &sector)
            }
            Step::ReadBack => self.read_back(base, head),
            Step::Commit => {
                self.write_commit(base, head)?;
                let sequence = self.mark_sequence + 1;
                self.write_ring_block(MARKS + (sequence - 1) % 2 * BLOCK, &Commit::of(head, sequence).encode())?;
                self.mark_sequence = sequence;
                Ok(())
            }
            Step::FlushCommit => {
                if let Base::File(_) = base {
                    self.flush_base(base)?;
                }
                self.ring.flush()?;
                // A disk that swallowed it: the mark still commits, and opening again mends it.
                match self.commit_stands(base, head)? {
                    true => Ok(()),
                    false => {
                        let cause = "the journal's disk does not give its COMMIT back";
                        Err(Fault::new(Code::Corrupt, format!("generation {}", head.position), cause, "restart the agent"))
                    }
                }
            }
        }
    }

    /// Writes COMMIT at the generation's end.
    pub(super) fn write_commit(&mut self, base: Base, head: &GenerationHead) -> Res<()> {
        let end = base.offset() + span(head.payload_bytes).unwrap_or(0);
        self.write_block(base, end - BLOCK, &Commit::of(head, 0).encode())
    }

    pub(super) fn flush_base(&mut self, base: Base) -> Res<()> {
        match base {
            Base::Ring(_) => self.ring.flush(),
            Base::File(position) => self.files.get_mut(&position).ok_or_else(not_open)?.flush(),
        }
    }

    fn write_block(&mut self, base: Base, offset: u64, sector: &[u8; SECTOR_BYTES]) -> Res<()> {
        self.block[..SECTOR_BYTES].copy_from_slice(sector);
        match base {
            Base::Ring(_) => self.ring.write_at(offset, &self.block),
            Base::File(position) => self.files.get_mut(&position).ok_or_else(not_open)?.write_at(offset, &self.block),
        }
    }

    fn read_back(&mut self, base: Base, head: &GenerationHead) -> Res<()> {
        let storage = match base {
            Base::Ring(_) => &*self.ring,
            Base::File(position) => &**self.files.get(&position).ok_or_else(not_open)?,
        };
        storage.read_at(base.offset(), &mut self.buffer[..BLOCK as usize])?;
        let same = self.buffer[..SECTOR_BYTES] == head.encode()
            && payload_digest(storage, base, head.payload_bytes, &mut self.buffer)? == head.payload_digest;
        match same {
            true => Ok(()),
            false => {
                let cause = "the journal's disk gives back other bytes than were written";
                let next = "it is dropped and sent again; replace the disk when it happens twice";
                Err(Fault::new(Code::Corrupt, format!("generation {}", head.position), cause, next))
            }
        }
    }

    /// Plants a wrong order, to see whether the crash tests find it. Not in release builds.
    #[cfg(debug_assertions)]
    #[doc(hidden)]
    pub fn plant_order(&mut self, order: &'static [Step]) {
        self.order = order;
    }
}
