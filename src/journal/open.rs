//! Opening the journal: what a crash left is read, judged by the tables of `recovery`, and said.
//!
//! 1. flush, so that what is read now is durable and may be called so (a killed process leaves writes in a disk's cache)
//! 2. read the superblocks; a ring that was never used is made ready: both slots, a flush after each
//! 3. read the marks
//! 4. walk the chain from the superblock's floor, one decision per place
//! 5. judge the end of the chain
//! 6. only if nothing is missing: mend a damaged superblock and a missing COMMIT (a mark alone commits a generation only until
//!    two later ones have taken its place), flush; remove overflow files that nothing leads to
//!
//! Every step can be repeated; a crash in any of them leaves what the next opening judges alike.

use crate::durable::{AlignedBuf, Storage};
use crate::format::{Commit, Found, GenerationHead, JOURNAL_BLOCK_BYTES, SECTOR_BYTES, Sector, Superblock};
use crate::journal::recovery::{Decision, End, Ending, Place};
use crate::journal::seal::ORDER;
use crate::journal::{
    BLOCK, Base, Held, Journal, MARKS, Overflow, RING_START, Recovered, Sealed, payload_digest, piece_of, span,
};
use crate::model::{Code, Digest, Fault, GroupId, Position, Res, Uuid};
use std::collections::BTreeMap;

/// Known to this ring alone.
pub(super) fn new_lineage() -> Res<Uuid> {
    let mut lineage = [0; 16];
    match getrandom::fill(&mut lineage) {
        Ok(()) => Ok(Uuid(lineage)),
        Err(error) => Err(Fault::new(Code::IoError, "the kernel's random numbers", error.to_string(), "try again")),
    }
}

/// A generation found at some place.
struct Candidate {
    head: GenerationHead,
    base: Base,
}

impl Journal {
    /// Opens the ring and recovers. `applied` = the position up to which the ledger says everything is applied.
    ///
    /// Errors: `IDENTITY_CHANGED` when the ring is another group's or has another length than it was made with,
    /// `VERSION_MISMATCH` when a newer program wrote it, `CORRUPT` when neither superblock can be read, `BAD_ARGUMENT` when the
    /// ring is too small, `IO_ERROR`. A missing generation is no error of the call but [`Recovered::corrupt`].
    pub fn open(
        group: GroupId,
        mut ring: Box<dyn Storage>,
        mut overflow: Box<dyn Overflow>,
        applied: Position,
    ) -> Res<(Journal, Recovered)> {
        if ring.len_bytes() < RING_START + 3 * BLOCK {
            let cause = format!("{} bytes are too few for a ring", ring.len_bytes());
            return Err(Fault::new(Code::BadArgument, format!("the journal of group {group}"), cause, "give it at least 64 KiB"));
        }
        ring.flush()?;
        let mut files = BTreeMap::new();
        for (position, mut file) in overflow.existing()? {
            file.flush()?;
            files.insert(position, file);
        }
        let mut block = AlignedBuf::new(JOURNAL_BLOCK_BYTES);
        let slots = [superblock(&*ring, 0, group, &mut block)?, superblock(&*ring, 1, group, &mut block)?];
        let mut journal = Journal {
            group,
            lineage: Uuid([0; 16]),
            ring,
            overflow,
            files,
            superblock_sequence: 0,
            mark_sequence: 0,
            floor: Default::default(),
            tip: Default::default(),
            cursor: RING_START,
            held: Default::default(),
            scars: Vec::new(),
            open: None,
            poisoned: None,
            corrupt: None,
            buffer: AlignedBuf::new(0),
            block: AlignedBuf::new(JOURNAL_BLOCK_BYTES),
            plain: Vec::new(),
            order: ORDER,
        };
        let newest = slots.iter().filter_map(|slot| slot.whole()).max_by_key(|slot| slot.sequence);
        let Some(newest) = newest else {
            return match slots {
                // The first slot torn and the second never written: it was being made ready, so nothing was ever in it.
                [Found::Blank | Found::Damaged, Found::Blank] => {
                    journal.lineage = new_lineage()?;
                    journal.make_ready()
                }
                _ => Err(journal.fault("neither of its superblocks can be read".into())),
            };
        };
        journal.lineage = newest.lineage;
        journal.superblock_sequence = newest.sequence;
        (journal.floor, journal.tip) = ((newest.floor, newest.floor_digest), (newest.floor, newest.floor_digest));
        journal.cursor = newest.tail;
        let other_whole = slots.iter().all(|slot| slot.whole().is_some());
        let damaged = slots.iter().any(|slot| matches!(slot, Found::Damaged));
        let (mut recovered, uncommitted) = journal.walk(applied, damaged)?;
        if recovered.corrupt.is_none() {
            for Candidate { head, base } in &uncommitted {
                journal.write_commit(*base, head)?;
                journal.flush_base(*base)?;
            }
            if !other_whole {
                // The same words once more, so that one bad sector later cannot lead back to an older state.
                journal.write_superblock(journal.floor, newest.tail)?;
            }
            journal.remove_strays(&mut recovered)?;
        }
        journal.corrupt = recovered.corrupt.clone();
        Ok((journal, recovered))
    }

    /// The first use of a ring. Overflow files that lie about can belong to no chain of it.
    fn make_ready(mut self) -> Res<(Journal, Recovered)> {
        self.write_superblock(self.floor, RING_START)?;
        self.write_superblock(self.floor, RING_START)?;
        let mut recovered = Recovered { sealed: Vec::new(), dropped: Vec::new(), corrupt: None, flush_not_kept: false };
        self.remove_strays(&mut recovered)?;
        Ok((self, recovered))
    }

    /// Removes the overflow files that the chain does not lead to.
    fn remove_strays(&mut self, recovered: &mut Recovered) -> Res<()> {
        let led_to = |position: &Position| self.held.iter().any(|held| held.base == Base::File(*position));
        let strays: Vec<Position> = self.files.keys().filter(|position| !led_to(position)).copied().collect();
        for position in strays {
            if position > self.tip.0 {
                recovered.dropped.push(format!("generation {position} (overflow): it was not committed"));
            }
            self.files.remove(&position);
            self.overflow.remove(position)?;
        }
        Ok(())
    }

    fn fault(&self, cause: String) -> Fault {
        Fault::new(
            Code::Corrupt,
            self.thing(),
            cause,
            "apply what is intact, then compare the volumes in full: run `doublure sync`",
        )
    }

    /// Returns what was found, and those kept whose own COMMIT is not there.
    fn walk(&mut self, applied: Position, damaged: bool) -> Res<(Recovered, Vec<Candidate>)> {
        let mut recovered = Recovered { sealed: Vec::new(), dropped: Vec::new(), corrupt: None, flush_not_kept: false };
        let marks = self.marks()?;
        self.mark_sequence = marks.iter().map(|mark| mark.sequence).max().unwrap_or(0);
        let mut uncommitted = Vec::new();
        loop {
            let mut found: Option<(Decision, Candidate)> = None;
            let mut dropped = Vec::new();
            for base in self.places() {
                let Some(candidate) = self.candidate(base)? else { continue };
                let decision = self.judge(&candidate, &marks, applied)?;
                match decision {
                    Decision::Nothing => {}
                    Decision::Drop | Decision::DropUnkept => dropped.push((decision, candidate)),
                    Decision::Corrupt if found.is_some() => {}
                    // An attempt that was given up may stand beside the one that was committed.
                    Decision::Corrupt | Decision::Keep | Decision::Pass => {
                        let better = found.as_ref().is_none_or(|(before, _)| *before == Decision::Corrupt);
                        if better {
                            found = Some((decision, candidate));
                        }
                    }
                }
            }
            let Some((decision, candidate)) = found else {
                self.end(applied, damaged, &marks, dropped, &mut recovered)?;
                break;
            };
            let Candidate { head, base } = candidate;
            if decision == Decision::Corrupt {
                recovered.corrupt =
                    Some(self.fault(format!("generation {} was committed and its bytes are damaged", head.position)));
                break;
            }
            let held = Held { sealed: Sealed::of(&head), base, released: decision == Decision::Pass };
            if let Some((_, end)) = held.extent() {
                self.cursor = end;
            }
            self.tip = (head.position, head.digest);
            if !held.released {
                recovered.sealed.push(held.sealed.clone());
                if !self.commit_of(&candidate)? {
                    uncommitted.push(candidate);
                }
            }
            self.held.push_back(held);
        }
        Ok((recovered, uncommitted))
    }

    /// Where the next generation of the chain can stand.
    fn places(&self) -> Vec<Base> {
        let mut places = vec![Base::Ring(self.cursor)];
        if self.cursor != RING_START {
            places.push(Base::Ring(RING_START));
        }
        places.extend(self.files.keys().filter(|position| **position > self.tip.0).map(|position| Base::File(*position)));
        places
    }

    /// The whole header that stands at a place and means that place, if there is one.
    fn candidate(&mut self, base: Base) -> Res<Option<Candidate>> {
        let len = self.storage(base)?.len_bytes();
        if base.offset().checked_add(2 * BLOCK).is_none_or(|end| end > len) {
            return Ok(None);
        }
        let sector = self.sector(base, base.offset())?;
        let Some(head) = GenerationHead::decode(&sector).whole() else { return Ok(None) };
        let fits = span(head.payload_bytes).and_then(|span| base.offset().checked_add(span)).is_some_and(|end| end <= len);
        let named = match base {
            Base::Ring(_) => true,
            Base::File(position) => position == head.position,
        };
        let ours = head.group == self.group && head.lineage == self.lineage && head.offset == base.offset();
        Ok((fits && named && ours).then_some(Candidate { head, base }))
    }

    fn judge(&mut self, candidate: &Candidate, marks: &[Commit], applied: Position) -> Res<Decision> {
        let Candidate { head, base } = candidate;
        let chains = (head.parent, head.parent_digest) == self.tip && head.position > self.tip.0;
        let mut place = Place {
            head: true,
            chains,
            committed: chains && (self.commit_of(candidate)? || marks.iter().any(|mark| mark.names(head))),
            applied: head.position <= applied,
            later: marks.iter().any(|mark| mark.position > head.position),
            intact: false,
        };
        if place.needs_payload() {
            // A sector that cannot be read is as bad as one that reads wrong, and says so in the kernel's log.
            let mut buffer = AlignedBuf::new(piece_of(head.payload_bytes));
            let digest = payload_digest(self.storage(*base)?, *base, head.payload_bytes, &mut buffer);
            place.intact = digest.is_ok_and(|digest: Digest| digest == head.payload_digest);
        }
        Ok(place.decide())
    }

    fn commit_of(&mut self, candidate: &Candidate) -> Res<bool> {
        self.commit_stands(candidate.base, &candidate.head)
    }

    /// Whether the COMMIT at a generation's end names its header.
    pub(super) fn commit_stands(&mut self, base: Base, head: &GenerationHead) -> Res<bool> {
        let Some(span) = span(head.payload_bytes) else { return Ok(false) };
        let sector = self.sector(base, base.offset() + span - BLOCK)?;
        Ok(Commit::decode(&sector).whole().is_some_and(|commit| commit.names(head)))
    }

    /// What is said when no place continues the chain.
    fn end(
        &mut self,
        applied: Position,
        damaged: bool,
        marks: &[Commit],
        dropped: Vec<(Decision, Candidate)>,
        recovered: &mut Recovered,
    ) -> Res<()> {
        let mut last = marks.iter().map(|mark| mark.position).max();
        for base in self.places().into_iter().filter(|base| matches!(base, Base::File(_))) {
            if let Some(candidate) = self.candidate(base)?
                && self.commit_of(&candidate)?
            {
                last = last.max(Some(candidate.head.position));
            }
        }
        let beyond = last.filter(|last| *last > self.tip.0);
        let end = End {
            beyond: beyond.is_some(),
            beyond_applied: beyond.is_none_or(|last| last <= applied),
            damaged,
            reached: self.tip.0 >= applied,
            floor_ahead: self.floor.0 > applied,
        };
        match end.decide() {
            Ending::Whole => {
                for (decision, Candidate { head, base }) in dropped {
                    let why = match decision {
                        Decision::DropUnkept => {
                            "it was not committed, and the disk has not kept its payload although it flushed it"
                        }
                        _ => "it was not committed",
                    };
                    recovered.dropped.push(format!("generation {}: {why}", head.position));
                    recovered.flush_not_kept |= decision == Decision::DropUnkept;
                    match base {
                        Base::Ring(offset) => self.scars.push(offset),
                        // Named here; it is no stray any more when those are named.
                        Base::File(position) => {
                            self.files.remove(&position);
                            self.overflow.remove(position)?;
                        }
                    }
                }
            }
            Ending::Lost => {
                let cause = match beyond {
                    Some(last) => format!("generation {last} was committed and cannot be reached from {}", self.tip.0),
                    None => format!("a superblock is damaged, and generations between {} and {applied} are missing", self.tip.0),
                };
                recovered.corrupt = Some(self.fault(cause));
            }
            Ending::LedgerBehind => {
                let cause = format!("it let go of everything up to {}, and the ledger knows of {applied} only", self.floor.0);
                recovered.corrupt = Some(self.fault(cause));
            }
        }
        Ok(())
    }

    fn marks(&mut self) -> Res<Vec<Commit>> {
        let mut marks = Vec::new();
        for slot in 0..2 {
            let sector = self.sector(Base::Ring(0), MARKS + slot * BLOCK)?;
            let ours = |mark: &Commit| mark.group == self.group && mark.lineage == self.lineage;
            marks.extend(Commit::decode_mark(&sector).whole().filter(ours));
        }
        Ok(marks)
    }

    fn sector(&mut self, base: Base, offset: u64) -> Res<Sector> {
        let mut block = std::mem::replace(&mut self.block, AlignedBuf::new(0));
        let read = self.storage(base).and_then(|storage| storage.read_at(offset, &mut block));
        let sector = std::array::from_fn(|i| block[i]);
        // It must be zero behind the first sector whenever a block is written from it.
        block.fill(0);
        self.block = block;
        read.map(|()| sector)
    }
}

/// Reads a superblock slot and checks what can be checked of it alone.
fn superblock(ring: &dyn Storage, slot: u64, group: GroupId, block: &mut AlignedBuf) -> Res<Found<Superblock>> {
    ring.read_at(slot * BLOCK, block)?;
    let sector: Sector = std::array::from_fn(|i| block[i]);
    let thing = format!("the journal of group {group}");
    let found = Superblock::decode(&sector);
    match found {
        Found::Newer(version) => {
            let cause = format!("it is of version {version}, which this program does not know");
            Err(Fault::new(Code::VersionMismatch, thing, cause, "start the version that wrote it, or a later one"))
        }
        Found::Whole(superblock) if superblock.group != group => {
            let cause = format!("the ring belongs to group {}", superblock.group);
            Err(Fault::new(Code::IdentityChanged, thing, cause, "put the right file back"))
        }
        Found::Whole(superblock) if superblock.ring_bytes != ring.len_bytes() => {
            let cause = format!("the ring was made with {} bytes and has {} now", superblock.ring_bytes, ring.len_bytes());
            Err(Fault::new(Code::IdentityChanged, thing, cause, "put the file back as it was"))
        }
        Found::Whole(superblock)
            if superblock.tail < RING_START || superblock.tail % BLOCK != 0 || superblock.tail >= ring.len_bytes() =>
        {
            Ok(Found::Damaged)
        }
        _ => Ok(found),
    }
}

const _: () = assert!(SECTOR_BYTES <= JOURNAL_BLOCK_BYTES);
