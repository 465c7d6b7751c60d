//! The instant cut as a model: every interleaving of a few writes, the kernel programs' steps and the agent's steps.
//!
//! What is modelled: the phase word, both bitmap halves and the held bits, the in-flight table, the ring with reserved and
//! committed records, the two accounts of completions, misses, receipts and deaths of the agent; a device of three blocks
//! of two sectors, each sector written on its own. Every program instance is a critical section of its own, so the grace
//! period promises no more than the kernel does: nothing that was running at the store is running any more.
//!
//! What is asked: at each cut the image is legal (all that completed before its position is there, of what was in flight any
//! sectors, and nothing without what it followed), in each state every completed write is at the standby, has a bit, or is
//! in the table; and no schedule gets stuck. Then faults are planted, and each of them must be found.
//!
//! What is not modelled: memory order weaker than interleaving, a ring that wraps, and writes of which neither the submit
//! nor the completion was seen (doubt: compared in full, not cut).

use std::collections::{BTreeSet, HashSet};
use std::fmt::Write as _;
use std::hash::{BuildHasherDefault, Hash, Hasher};

/// Two sectors a block; block 0 is volume 0, blocks 1 and 2 are volume 1.
const SECTORS: usize = 6;
const WRITES: usize = 4;
const RING: usize = 4;

/// How a write ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Plain,
    /// Any subset of its sectors reaches the device, then it fails.
    Fails,
    /// Over the cap, or the ring is full, or unreadable: the record is a hole.
    Hole,
    /// Every copy of the capture program was skipped, or not even a hole fitted: only a counter tells.
    Lost,
    /// No program ran at its completion; only the kernel's own account tells.
    Unseen,
}
use Kind::{Fails, Hole, Lost, Plain, Unseen};

#[derive(Clone, Copy, Debug)]
struct Write {
    /// Bit mask over the sectors, all in one block.
    sectors: u8,
    /// Submitted by somebody who saw these writes complete.
    after: u8,
    kind: Kind,
    /// Both copies of the completion's bit program ran, and read the phase each for itself.
    both_copies: bool,
}

const fn write(sectors: u8, after: u8, kind: Kind) -> Write {
    Write { sectors, after, kind, both_copies: false }
}

impl Write {
    fn block(&self) -> u8 {
        1 << (self.sectors.trailing_zeros() / 2)
    }
}

/// What the agent does, in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Round {
    Checkpoint,
    /// One more position of a running capture.
    Continuous,
    /// Capture is turned off until the next checkpoint (interval mode). It needs no grace period: a record that comes late
    /// lies before the next reads, and so below them.
    Stop,
}
use Round::{Checkpoint, Continuous, Stop};

struct Scenario {
    name: &'static str,
    writes: &'static [Write],
    rounds: &'static [Round],
    deaths: u8,
    /// Generations on their way when the next round begins.
    ahead: u8,
}

const B0: u8 = 0b00_0011;
const FIRST_OF_0: u8 = 0b00_0001;
const FIRST_OF_1: u8 = 0b00_0100;
const FIRST_OF_2: u8 = 0b01_0000;

const W0: u8 = 1;
const W1: u8 = 2;
const W2: u8 = 4;

const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "a chain across two volumes, back to the first",
        writes: &[write(B0, 0, Plain), write(FIRST_OF_1, W0, Plain), write(FIRST_OF_0, W1, Plain)],
        rounds: &[Checkpoint, Continuous],
        deaths: 0,
        ahead: 0,
    },
    Scenario {
        name: "two at the same place at the same time, one after both",
        writes: &[write(B0, 0, Plain), write(FIRST_OF_0, 0, Plain), write(FIRST_OF_1, W0 | W1, Plain)],
        rounds: &[Checkpoint],
        deaths: 0,
        ahead: 0,
    },
    Scenario {
        name: "both copies of the bit program",
        writes: &[Write { both_copies: true, ..write(FIRST_OF_0, 0, Plain) }, write(FIRST_OF_1, W0, Plain)],
        rounds: &[Checkpoint, Continuous],
        deaths: 1,
        ahead: 0,
    },
    Scenario {
        name: "a hole between two records of its place",
        writes: &[
            write(FIRST_OF_0, 0, Plain),
            write(B0, W0, Hole),
            write(FIRST_OF_1, W0 | W1, Plain),
            write(FIRST_OF_0, W2, Plain),
        ],
        rounds: &[Checkpoint],
        deaths: 0,
        ahead: 0,
    },
    Scenario {
        name: "two holes at one place while another writes",
        writes: &[write(FIRST_OF_0, 0, Hole), write(FIRST_OF_0, W0, Hole), write(FIRST_OF_1, 0, Plain)],
        rounds: &[Checkpoint, Continuous],
        deaths: 0,
        ahead: 0,
    },
    Scenario {
        name: "a failed write, read back and believed",
        writes: &[write(B0, 0, Fails), write(FIRST_OF_1, W0, Plain), write(FIRST_OF_0, W1, Plain)],
        rounds: &[Checkpoint, Continuous],
        deaths: 0,
        ahead: 0,
    },
    Scenario {
        name: "a capture that was missed",
        writes: &[write(FIRST_OF_0, 0, Lost), write(FIRST_OF_1, W0, Plain), write(FIRST_OF_0, W1, Plain)],
        rounds: &[Checkpoint, Continuous],
        deaths: 0,
        ahead: 0,
    },
    Scenario {
        name: "a completion that nobody saw",
        writes: &[write(FIRST_OF_0, 0, Unseen), write(FIRST_OF_1, W0, Plain), write(FIRST_OF_2, 0, Plain)],
        rounds: &[Checkpoint, Continuous],
        deaths: 0,
        ahead: 0,
    },
    Scenario {
        name: "a completion that nobody saw, and a death",
        writes: &[write(FIRST_OF_0, 0, Unseen), write(FIRST_OF_1, W0, Plain)],
        rounds: &[Checkpoint, Checkpoint],
        deaths: 1,
        ahead: 0,
    },
    Scenario {
        name: "two checkpoints under a running capture",
        writes: &[write(FIRST_OF_0, 0, Plain), write(FIRST_OF_1, W0, Plain), write(FIRST_OF_0, W0, Plain)],
        rounds: &[Checkpoint, Checkpoint],
        deaths: 0,
        ahead: 0,
    },
    Scenario {
        name: "interval mode",
        writes: &[write(FIRST_OF_0, 0, Plain), write(FIRST_OF_0, W0, Plain), write(FIRST_OF_1, W0, Plain)],
        rounds: &[Checkpoint, Stop, Checkpoint],
        deaths: 0,
        ahead: 0,
    },
    Scenario {
        name: "interval mode and a death",
        writes: &[write(FIRST_OF_0, 0, Plain), write(FIRST_OF_1, W0, Plain)],
        rounds: &[Checkpoint, Stop, Checkpoint],
        deaths: 1,
        ahead: 0,
    },
    Scenario {
        name: "a death at any point",
        writes: &[write(FIRST_OF_0, 0, Plain), write(FIRST_OF_1, W0, Plain)],
        rounds: &[Checkpoint, Continuous, Checkpoint],
        deaths: 2,
        ahead: 0,
    },
    Scenario {
        name: "receipts that come late",
        writes: &[write(FIRST_OF_0, 0, Plain), write(FIRST_OF_1, W0, Plain)],
        rounds: &[Checkpoint, Checkpoint, Continuous],
        deaths: 0,
        ahead: 1,
    },
    Scenario {
        name: "receipts that come late or never",
        writes: &[write(FIRST_OF_0, 0, Plain), write(FIRST_OF_0, W0, Hole)],
        rounds: &[Checkpoint, Checkpoint],
        deaths: 1,
        ahead: 1,
    },
    Scenario {
        name: "a death with holes",
        writes: &[write(FIRST_OF_0, 0, Hole), write(FIRST_OF_0, W0, Lost)],
        rounds: &[Checkpoint, Continuous],
        deaths: 1,
        ahead: 0,
    },
];

/// One mistake in the algorithm.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    None,
    /// The half and the capture flag are stored one after the other.
    StoredInTwo,
    /// A program reads the flag, and then the half.
    ReadTwice,
    NoGrace,
    /// The position is taken before the last read of the dirty blocks has ended.
    PositionBeforeReads,
    /// The counters are read before the end of the batch is known.
    CountersEarly,
    HoleDropped,
    /// The hole's record is made when the write is submitted: the place may be read again before the write.
    HoleAtSubmit,
    /// The cut is made when a hole was found, its place is read afterwards.
    CutBeforeReread,
    /// The position stays where it was before the holes were read again.
    PositionKept,
    /// What was read again lies under all records instead of above those that are older than the read.
    RereadUnderRecords,
    OrderSwapped,
    ClearedBeforeReceipt,
    NoCompletionBit,
    CaptureBeforeBit,
    /// Misses of the capture program are not looked at.
    MissesIgnored,
    /// The two accounts of completions are not compared.
    AccountsIgnored,
    /// They are compared while a completion is counted by the programs, but not yet by the kernel.
    AccountsUnsettled,
    /// A new life of the agent takes the difference that it finds for the one that was always there.
    AccountsForgotten,
    /// A new life of the agent looks only at the half that it flips away from.
    OneHalfAtStart,
    /// The dirty blocks lie under all records since the store instead of above those that are older than their reads.
    BlocksUnderRecords,
    /// A receipt clears what was taken after the generation that it is for.
    ReceiptClearsLater,
    /// Bits leave the old half before they are in the held region.
    ClearedBeforeHeld,
}

/// Where a write is.
mod pc {
    pub const IDLE: u8 = 0;
    /// The submit program has read the phase.
    pub const SUBMIT: u8 = 1;
    /// The device has it.
    pub const FLYING: u8 = 2;
    /// The completion's bit program has read the phase; the same of its second copy.
    pub const BIT: u8 = 3;
    pub const BIT_AGAIN: u8 = 4;
    /// Between two programs.
    pub const GAP_AGAIN: u8 = 5;
    pub const GAP: u8 = 6;
    /// The capture program has read the phase.
    pub const CAPTURE: u8 = 7;
    /// Its record is reserved, not committed.
    pub const RESERVED: u8 = 8;
    /// The programs are done, the kernel has not accounted for it.
    pub const COUNTED: u8 = 9;
    /// Accounted for, and its submitter knows.
    pub const DONE: u8 = 10;
    /// (Planted: a program has read the flag alone.)
    pub const FLAG: u8 = 11;
    /// (Planted: the capture program is over, the bit program comes.)
    pub const GAP_REVERSED: u8 = 12;
}

/// Where the agent is.
mod at {
    pub const BEGIN: u8 = 0;
    pub const STORE: u8 = 1;
    pub const STORE_FLAG: u8 = 2;
    pub const GRACE: u8 = 3;
    pub const TAKE: u8 = 4;
    pub const CLEAR: u8 = 5;
    pub const READ: u8 = 6;
    pub const POSITION: u8 = 7;
    pub const CHECK: u8 = 8;
    pub const REREAD: u8 = 9;
    pub const SENT: u8 = 10;
    pub const END: u8 = 11;
    pub const STOP: u8 = 12;
}

const HALF: u8 = 1;
const CAPTURING: u8 = 2;
const IS_HOLE: u8 = 0x10;
const COMMITTED: u8 = 0x20;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
struct Flight {
    pc: u8,
    /// The phase that the running program has read.
    phase: u8,
    /// Sectors that have reached the device.
    applied: u8,
    /// The writes whose completion was known when this one was submitted.
    followed: u8,
}

/// A generation without a receipt.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
struct Sent {
    image: [u8; SECTORS],
    difference: u8,
    /// How often bits had been taken when it was cut.
    takes: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
struct State {
    // The kernel's.
    phase: u8,
    halves: [u8; 2],
    held: u8,
    /// Content: 0, or the number of a write plus one.
    device: [u8; SECTORS],
    flights: [Flight; WRITES],
    ring: [u8; RING],
    ring_len: u8,
    table: u8,
    by_kernel: u8,
    by_programs: u8,
    missed: u8,
    // Remembered beside the bits: how far the accounts differed at the last receipt.
    known_difference: u8,
    // The standby's.
    standby: [u8; SECTORS],
    // The agent's, gone with it.
    at: u8,
    fresh: bool,
    grace_for: u8,
    to_read: u8,
    image: [u8; SECTORS],
    /// Records before this position are older than what was read of the sector.
    read_at: [u8; SECTORS],
    start: u8,
    position: u8,
    holes_done: u8,
    reading_from: u8,
    base_missed: u8,
    base_difference: u8,
    early: u8,
    takes: u8,
    sent: [Sent; 2],
    sent_len: u8,
    round: u8,
    deaths: u8,
    // What the proof remembers: who was done and who was submitted when the position was taken.
    done_at: u8,
    submitted_at: u8,
}

impl State {
    fn done(&self) -> u8 {
        mask(|w| self.flights[w].pc == pc::DONE)
    }
    fn submitted(&self) -> u8 {
        mask(|w| self.flights[w].pc != pc::IDLE)
    }
    fn running(&self) -> u8 {
        let programs = [pc::SUBMIT, pc::BIT, pc::BIT_AGAIN, pc::CAPTURE, pc::RESERVED, pc::FLAG];
        mask(|w| programs.contains(&self.flights[w].pc))
    }
    /// No completion is between the programs' account and the kernel's.
    fn settled(&self) -> bool {
        let between = [pc::BIT_AGAIN, pc::GAP_AGAIN, pc::GAP, pc::CAPTURE, pc::RESERVED, pc::COUNTED];
        !self.flights.iter().any(|f| between.contains(&f.pc))
    }
    fn difference(&self) -> u8 {
        self.by_kernel.wrapping_sub(self.by_programs)
    }
}

fn mask(is: impl Fn(usize) -> bool) -> u8 {
    (0..WRITES).filter(|w| is(*w)).fold(0, |all, w| all | 1 << w)
}
fn bits(of: u8) -> impl Iterator<Item = usize> {
    (0..8).filter(move |b| of & 1 << b != 0)
}
fn sectors_of_blocks(blocks: u8) -> u8 {
    bits(blocks).fold(0, |all, b| all | 0b11 << (2 * b))
}

type Step = (&'static str, u8);

/// What a run came across, so that a test can say that it was not empty.
#[derive(Default, Debug)]
struct Seen {
    states: usize,
    cuts: usize,
    /// Cuts with a part of a write that was in flight.
    torn_cuts: usize,
    rereads: usize,
    receipts: usize,
    deaths: usize,
    ends: usize,
}

struct Model<'a> {
    scenario: &'a Scenario,
    fault: Fault,
    seen: Seen,
}

impl Model<'_> {
    fn write(&self, w: usize) -> &Write {
        &self.scenario.writes[w]
    }

    /// The sectors in which a write has a defined effect.
    fn effect(&self, s: &State, w: usize) -> u8 {
        if self.write(w).kind == Fails { s.flights[w].applied } else { self.write(w).sectors }
    }

    /// Whether content `value` of a sector is there in spite of write `w`, which must be there.
    fn older(s: &State, value: u8, w: usize) -> bool {
        value == 0 || (value as usize - 1 != w && s.flights[w].followed & 1 << (value - 1) != 0)
    }

    fn legal(&mut self, s: &State) -> Result<(), String> {
        let present = s.image.iter().filter(|v| **v != 0).fold(0u8, |all, v| all | 1 << (v - 1));
        if present & !s.submitted_at != 0 {
            return Err(format!("illegal cut: writes {:#b} were submitted after the position", present & !s.submitted_at));
        }
        let required = bits(present).fold(s.done_at, |all, w| all | s.flights[w].followed);
        for w in bits(required) {
            for sector in bits(self.effect(s, w)) {
                if Self::older(s, s.image[sector], w) {
                    return Err(format!("illegal cut: sector {sector} holds {}, w{w} must be there", s.image[sector]));
                }
            }
        }
        self.seen.cuts += 1;
        self.seen.torn_cuts += usize::from(present & !s.done_at != 0);
        Ok(())
    }

    /// Every completed write is at the standby, has a bit, or is in the table.
    fn remembered(&self, s: &State) -> Result<(), String> {
        for w in bits(s.done()) {
            let bit = (s.halves[0] | s.halves[1] | s.held) & self.write(w).block() != 0;
            let there = bits(self.effect(s, w)).all(|sector| !Self::older(s, s.standby[sector], w));
            if !bit && !there && s.table & 1 << w == 0 {
                return Err(format!("lost bit: nothing remembers w{w}"));
            }
        }
        Ok(())
    }

    fn next(&mut self, s: &State, out: &mut Vec<(Step, State)>) -> Result<(), String> {
        self.remembered(s)?;
        for w in 0..self.scenario.writes.len() {
            self.write_steps(s, w, out);
        }
        let writes_stuck = out.is_empty();
        self.agent_steps(s, out)?;
        if s.at != at::END && s.deaths < self.scenario.deaths {
            self.seen.deaths += 1;
            out.push((("the agent dies", 0), self.reborn(s)));
            // A generation may have been committed, and the agent dies before its receipt.
            for sent in &s.sent[..s.sent_len as usize] {
                out.push((("the agent dies, a generation arrived", 0), self.reborn(&State { standby: sent.image, ..*s })));
            }
        }
        if out.is_empty() {
            let over = s.at == at::END && s.sent_len == 0 && s.done() == (1u8 << self.scenario.writes.len()) - 1;
            if !(over && writes_stuck) {
                return Err("stuck: nobody can take a step".into());
            }
            self.seen.ends += 1;
        }
        Ok(())
    }

    fn write_steps(&self, s: &State, w: usize, out: &mut Vec<(Step, State)>) {
        let plan = self.write(w);
        let mut n = *s;
        let f = &mut n.flights[w];
        let me = 1 << w;
        let number = w as u8;
        match f.pc {
            pc::IDLE if s.done() & plan.after == plan.after => {
                *f = Flight { pc: pc::SUBMIT, phase: s.phase, applied: 0, followed: s.done() };
                out.push((("submitted, phase read", number), n));
            }
            pc::SUBMIT => {
                f.pc = pc::FLYING;
                n.halves[(f.phase & HALF) as usize] |= plan.block();
                if self.fault == Fault::HoleAtSubmit && plan.kind == Hole && f.phase & CAPTURING != 0 {
                    n.ring[n.ring_len as usize] = number | IS_HOLE | COMMITTED;
                    n.ring_len += 1;
                }
                f.phase = 0;
                n.table |= me;
                n.grace_for &= !me;
                out.push((("bit at submit", number), n));
            }
            pc::FLYING => {
                for sector in bits(plan.sectors & !f.applied) {
                    let mut further = *s;
                    further.device[sector] = number + 1;
                    further.flights[w].applied |= 1 << sector;
                    out.push((("a sector on the device", number), further));
                }
                if f.applied == plan.sectors || plan.kind == Fails {
                    if plan.kind == Unseen {
                        f.pc = pc::COUNTED;
                        out.push((("completed, unseen", number), n));
                        return;
                    }
                    f.phase = s.phase;
                    match self.fault {
                        Fault::ReadTwice => (f.pc, f.phase) = (pc::FLAG, s.phase & CAPTURING),
                        Fault::CaptureBeforeBit => f.pc = pc::CAPTURE,
                        Fault::NoCompletionBit => {
                            (f.pc, f.phase) = (pc::GAP, 0);
                            n.by_programs += 1;
                        }
                        _ => f.pc = pc::BIT,
                    }
                    out.push((("completes, phase read", number), n));
                }
            }
            pc::FLAG => {
                (f.pc, f.phase) = (pc::BIT, f.phase | s.phase & HALF);
                out.push((("half read", number), n));
            }
            pc::BIT | pc::BIT_AGAIN => {
                n.halves[(f.phase & HALF) as usize] |= plan.block();
                n.by_programs += u8::from(f.pc == pc::BIT);
                let first = f.pc == pc::BIT;
                if self.fault == Fault::ReadTwice {
                    f.pc = pc::CAPTURE;
                } else {
                    f.phase = 0;
                    f.pc = match (self.fault, first && plan.both_copies) {
                        (Fault::CaptureBeforeBit, _) => pc::COUNTED,
                        (_, true) => pc::GAP_AGAIN,
                        (_, false) => pc::GAP,
                    };
                    n.grace_for &= !me;
                }
                out.push((("bit at completion", number), n));
            }
            pc::GAP_AGAIN => {
                (f.pc, f.phase) = (pc::BIT_AGAIN, s.phase);
                out.push((("second copy, phase read", number), n));
            }
            pc::GAP if plan.kind == Lost => {
                f.pc = pc::COUNTED;
                n.missed += 1;
                out.push((("capture missed", number), n));
            }
            pc::GAP => {
                (f.pc, f.phase) = (pc::CAPTURE, s.phase);
                out.push((("capture program, phase read", number), n));
            }
            pc::GAP_REVERSED => {
                (f.pc, f.phase) = (pc::BIT, s.phase);
                out.push((("late bit program, phase read", number), n));
            }
            pc::CAPTURE => {
                let at_submit = self.fault == Fault::HoleAtSubmit && plan.kind == Hole;
                if f.phase & CAPTURING != 0 && !at_submit {
                    let hole = if matches!(plan.kind, Hole | Fails) { IS_HOLE } else { 0 };
                    f.pc = pc::RESERVED;
                    n.ring[n.ring_len as usize] = number | hole;
                    n.ring_len += 1;
                    f.phase = 0;
                    out.push((("record reserved", number), n));
                } else {
                    self.capture_over(&mut n, w);
                    out.push((("not captured", number), n));
                }
            }
            pc::RESERVED => {
                let record = n.ring.iter_mut().take(s.ring_len as usize).find(|r| **r & !IS_HOLE == number).unwrap();
                *record |= COMMITTED;
                self.capture_over(&mut n, w);
                out.push((("record committed", number), n));
            }
            pc::COUNTED => {
                f.pc = pc::DONE;
                n.by_kernel += 1;
                out.push((("accounted, submitter knows", number), n));
            }
            _ => {}
        }
    }

    fn capture_over(&self, n: &mut State, w: usize) {
        n.table &= !(1 << w);
        n.grace_for &= !(1 << w);
        n.flights[w].phase = 0;
        n.flights[w].pc = if self.fault == Fault::CaptureBeforeBit { pc::GAP_REVERSED } else { pc::COUNTED };
    }

    fn reborn(&self, s: &State) -> State {
        State {
            at: at::BEGIN,
            fresh: true,
            grace_for: 0,
            to_read: 0,
            image: s.standby,
            read_at: [0; SECTORS],
            start: 0,
            position: 0,
            holes_done: 0,
            reading_from: 0,
            base_missed: 0,
            base_difference: 0,
            early: 0,
            takes: 0,
            sent: [Sent::default(); 2],
            sent_len: 0,
            deaths: s.deaths + 1,
            done_at: 0,
            submitted_at: 0,
            ..*s
        }
    }

    /// The oldest generation has arrived: its bits are released, unless others were taken since; those go with a later one.
    fn receipt(&mut self, s: &State, out: &mut Vec<(Step, State)>) {
        let mut n = *s;
        self.seen.receipts += 1;
        let sent = s.sent[0];
        n.sent = [s.sent[1], Sent::default()];
        n.sent_len -= 1;
        n.standby = sent.image;
        n.known_difference = sent.difference;
        if sent.takes == s.takes || self.fault == Fault::ReceiptClearsLater {
            n.held = 0;
        }
        out.push((("a receipt", s.round), n));
    }

    fn agent_steps(&mut self, s: &State, out: &mut Vec<(Step, State)>) -> Result<(), String> {
        let mut n = *s;
        let fault = self.fault;
        if s.sent_len > 0 {
            self.receipt(s, out);
        }
        let old = (s.phase & HALF ^ HALF) as usize;
        match s.at {
            at::BEGIN => {
                n.base_missed = s.missed;
                if s.fresh {
                    let forget = fault == Fault::AccountsForgotten;
                    n.base_difference = if forget { s.difference() } else { s.known_difference };
                }
                n.start = s.ring_len;
                n.holes_done = s.ring_len;
                n.at = at::STORE;
                out.push((("1 counters and the ring's position", 0), n));
            }
            at::STORE => {
                let flag = if fault == Fault::StoredInTwo { s.phase & CAPTURING } else { CAPTURING };
                n.phase = (s.phase & HALF ^ HALF) | flag;
                n.grace_for = s.running();
                n.at = if flag == 0 { at::STORE_FLAG } else { at::GRACE };
                out.push((("2 the store", 0), n));
            }
            at::STORE_FLAG => {
                n.phase |= CAPTURING;
                n.grace_for = s.running();
                n.at = at::GRACE;
                out.push((("2 the flag's own store", 0), n));
            }
            at::GRACE if s.grace_for == 0 || fault == Fault::NoGrace => {
                n.grace_for = 0;
                n.at = if fault == Fault::ClearedBeforeHeld { at::CLEAR } else { at::TAKE };
                if fault == Fault::ClearedBeforeHeld {
                    n.early = s.halves[old];
                }
                out.push((("3 the grace period is over", 0), n));
            }
            at::TAKE => {
                // Counted no later than the first bit is there: a receipt may come right after.
                n.takes += 1;
                if fault == Fault::ClearedBeforeHeld {
                    n.held |= s.early;
                    n.early = 0;
                    self.begin_reading(&mut n);
                } else {
                    n.held |= s.halves[old];
                    n.at = at::CLEAR;
                }
                out.push((("4 the old half is held", 0), n));
            }
            at::CLEAR => {
                n.halves[old] = 0;
                if fault == Fault::ClearedBeforeHeld {
                    n.at = at::TAKE;
                } else {
                    self.begin_reading(&mut n);
                }
                out.push((("4 the old half is cleared", 0), n));
            }
            at::READ | at::REREAD => {
                let sector = s.to_read.trailing_zeros() as usize;
                n.image[sector] = s.device[sector];
                n.read_at[sector] = s.reading_from;
                n.to_read &= !(1 << sector);
                if n.to_read == 0 {
                    n.at = match (fault, s.at) {
                        (Fault::PositionBeforeReads, at::READ) | (Fault::PositionKept, at::REREAD) => at::CHECK,
                        _ => at::POSITION,
                    };
                    n.reading_from = 0;
                    self.counters_early(&mut n);
                }
                out.push((("5 a sector is read", sector as u8), n));
            }
            at::POSITION => {
                Self::take_position(&mut n);
                n.at = at::CHECK;
                out.push((("6 the position", n.position), n));
            }
            at::CHECK => {
                let committed = s.ring[..s.position as usize].iter().all(|r| r & COMMITTED != 0);
                if committed && (s.settled() || fault == Fault::AccountsUnsettled) {
                    self.check(&mut n)?;
                    out.push((("7 consumed, counters and holes", s.position), n));
                }
            }
            at::SENT if s.sent_len <= self.scenario.ahead => {
                self.next_round(&mut n);
                if n.at == at::POSITION {
                    self.counters_early(&mut n);
                }
                out.push((("the next round", n.round), n));
            }
            at::STOP => {
                n.phase &= HALF;
                self.next_round(&mut n);
                out.push((("capture off", s.round), n));
            }
            _ => {}
        }
        Ok(())
    }

    fn next_round(&self, n: &mut State) {
        n.round += 1;
        n.at = match self.scenario.rounds.get(n.round as usize) {
            None => at::END,
            Some(Checkpoint) => at::BEGIN,
            Some(Continuous) => at::POSITION,
            Some(Stop) => at::STOP,
        };
        if n.at == at::END {
            // The agent is idle: what it remembers makes no difference any more.
            let kept = *n;
            *n = self.reborn(&kept);
            (n.at, n.deaths, n.image) = (at::END, kept.deaths, [0; SECTORS]);
            (n.takes, n.sent, n.sent_len) = (kept.takes, kept.sent, kept.sent_len);
        }
    }

    /// A new life may find bits in both halves: the one before may have died between its store and its taking.
    fn begin_reading(&self, n: &mut State) {
        let both = n.fresh && self.fault != Fault::OneHalfAtStart;
        let also = if both { n.halves[0] | n.halves[1] } else { 0 };
        n.to_read = sectors_of_blocks(n.held | also);
        n.at = if n.to_read == 0 { at::POSITION } else { at::READ };
        if self.fault == Fault::PositionBeforeReads {
            Self::take_position(n);
        }
        if n.at == at::POSITION {
            self.counters_early(n);
        } else {
            n.reading_from = if self.fault == Fault::BlocksUnderRecords { n.start } else { n.ring_len };
        }
    }

    fn take_position(n: &mut State) {
        n.position = n.ring_len;
        n.done_at = n.done();
        n.submitted_at = n.submitted();
    }

    /// (Planted.)
    fn counters_early(&self, n: &mut State) {
        if self.fault == Fault::CountersEarly {
            n.early = self.not_captured(n);
        }
    }

    /// The sectors of which the counters say that something passed by, once.
    fn not_captured(&self, n: &mut State) -> u8 {
        let mut places = 0;
        if n.missed != n.base_missed && self.fault != Fault::MissesIgnored {
            n.base_missed = n.missed;
            places |= sectors_of_blocks(n.halves[(n.phase & HALF) as usize]);
        }
        // The kernel's account can only be behind where a completion is between the two.
        let ahead = n.difference().wrapping_sub(n.base_difference);
        if ahead != 0 && ahead < 0x80 && self.fault != Fault::AccountsIgnored {
            n.base_difference = n.difference();
            places |= bits(n.table).fold(0, |all, w| all | self.write(w).sectors);
        }
        places
    }

    fn check(&mut self, n: &mut State) -> Result<(), String> {
        let mut places = match self.fault {
            Fault::CountersEarly => std::mem::take(&mut n.early),
            _ => self.not_captured(n),
        };
        for record in &n.ring[n.holes_done as usize..n.position as usize] {
            if record & IS_HOLE != 0 && self.fault != Fault::HoleDropped {
                places |= self.write((record & 0xf) as usize).sectors;
            }
        }
        n.holes_done = n.position;
        if places != 0 && self.fault != Fault::CutBeforeReread {
            self.seen.rereads += 1;
            n.to_read = places;
            n.reading_from = if self.fault == Fault::RereadUnderRecords { n.start } else { n.ring_len };
            n.at = at::REREAD;
            return Ok(());
        }
        let mut batch: Vec<usize> = (n.start as usize..n.position as usize).collect();
        if self.fault == Fault::OrderSwapped && batch.len() > 1 {
            let last = batch.len() - 1;
            batch.swap(last - 1, last);
        }
        for position in batch {
            let record = n.ring[position];
            if record & IS_HOLE == 0 {
                let w = record & 0xf;
                for sector in bits(self.write(w as usize).sectors) {
                    if position >= n.read_at[sector] as usize {
                        n.image[sector] = w + 1;
                    }
                }
            }
        }
        self.legal(n)?;
        n.start = n.position;
        n.read_at = [0; SECTORS];
        (n.done_at, n.submitted_at) = (0, 0);
        if self.fault == Fault::ClearedBeforeReceipt {
            n.held = 0;
        }
        n.fresh = false;
        n.sent[n.sent_len as usize] = Sent { image: n.image, difference: n.base_difference, takes: n.takes };
        n.sent_len += 1;
        n.at = at::SENT;
        Ok(())
    }
}

/// Two lanes of multiply and rotate: 128 bits tell some millions of states apart.
#[derive(Default)]
struct Lanes(u64, u64);
impl Lanes {
    fn mix(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        self.1 = (self.1.rotate_left(23) ^ word).wrapping_mul(0xc2b2_ae3d_27d4_eb4f);
    }
}
impl Hasher for Lanes {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.mix(u64::from_le_bytes(word));
        }
    }
    fn write_u8(&mut self, byte: u8) {
        self.mix(u64::from(byte));
    }
    fn write_usize(&mut self, _: usize) {}
    fn finish(&self) -> u64 {
        self.0
    }
}

/// The key is a hash already.
#[derive(Default)]
struct Already(u64);
impl Hasher for Already {
    fn write(&mut self, _: &[u8]) {
        unreachable!("only words of 128 bits are kept");
    }
    fn write_u128(&mut self, word: u128) {
        self.0 = (word as u64) ^ (word >> 64) as u64;
    }
    fn finish(&self) -> u64 {
        self.0
    }
}

fn key(state: &State) -> u128 {
    let mut lanes = Lanes::default();
    state.hash(&mut lanes);
    (u128::from(lanes.0 ^ lanes.0 >> 32) << 64) | u128::from(lanes.1 ^ lanes.1 >> 31)
}

/// All schedules, depth first. A violation that begins with `wanted` comes with the steps that lead to it; one of another kind
/// ends its schedule. After `most_states` it gives up, as if there were none.
fn explore(scenario: &Scenario, fault: Fault, wanted: &str, most_states: usize) -> Result<Seen, String> {
    assert!(scenario.writes.len() <= WRITES && scenario.writes.iter().filter(|w| w.kind != Unseen).count() <= RING);
    let mut model = Model { scenario, fault, seen: Seen::default() };
    let mut known: HashSet<u128, BuildHasherDefault<Already>> = HashSet::default();
    let first = State { fresh: true, ..State::default() };
    known.insert(key(&first));
    let mut path: Vec<Step> = Vec::new();
    // What is left to try, by depth.
    let mut open: Vec<Vec<(Step, State)>> = vec![vec![(("start", 0), first)]];
    while let Some(level) = open.last_mut() {
        if model.seen.states == most_states {
            break;
        }
        let Some((step, state)) = level.pop() else {
            open.pop();
            path.pop();
            continue;
        };
        path.push(step);
        model.seen.states += 1;
        let mut out = Vec::with_capacity(8);
        if let Err(why) = model.next(&state, &mut out) {
            if !why.starts_with(wanted) {
                path.pop();
                continue;
            }
            let mut story = format!("{why}\n  in `{}`, after", scenario.name);
            for (what, number) in &path {
                let _ = write!(story, "\n    {what} [{number}]");
            }
            return Err(story);
        }
        out.retain(|(_, next)| known.insert(key(next)));
        open.push(out);
    }
    Ok(model.seen)
}

#[test]
fn every_schedule_gives_legal_cuts_and_loses_no_bit() {
    let mut names = BTreeSet::new();
    for scenario in SCENARIOS {
        assert!(names.insert(scenario.name), "two scenarios with one name");
        let seen = explore(scenario, Fault::None, "", usize::MAX).unwrap_or_else(|story| panic!("{story}"));
        println!("{}: {seen:?}", scenario.name);
        // The proof is not empty: cuts were made in the middle of writes, and what the scenario is for took place.
        assert!(seen.cuts > 0 && seen.ends > 0 && seen.torn_cuts > 0, "{}: {seen:?}", scenario.name);
        assert!(seen.receipts >= scenario.rounds.len(), "{}: {seen:?}", scenario.name);
        let holes = scenario.writes.iter().any(|w| w.kind != Plain);
        assert_eq!(seen.rereads > 0, holes, "{}: {seen:?}", scenario.name);
        assert_eq!(seen.deaths > 0, scenario.deaths > 0, "{}: {seen:?}", scenario.name);
    }
}

/// The fault leads to a violation of this kind in at least one scenario.
fn is_found(fault: Fault, kind: &str) {
    // A look into each first: where a fault shows at all, it mostly shows soon.
    for most_states in [20_000, usize::MAX] {
        for scenario in SCENARIOS {
            if let Err(story) = explore(scenario, fault, kind, most_states) {
                println!("{fault:?}: {story}");
                return;
            }
        }
    }
    panic!("{fault:?} was not found as `{kind}`");
}

macro_rules! planted {
    ($($test:ident: $fault:ident => $kind:literal;)*) => {
        $(#[test] fn $test() { is_found(Fault::$fault, $kind); })*
    };
}

planted! {
    half_and_flag_stored_in_two_steps: StoredInTwo => "illegal cut";
    phase_read_twice_by_one_program: ReadTwice => "illegal cut";
    no_grace_period: NoGrace => "illegal cut";
    no_grace_period_and_a_death: NoGrace => "lost bit";
    position_taken_before_the_last_read: PositionBeforeReads => "illegal cut";
    counters_read_before_the_end_of_the_batch: CountersEarly => "illegal cut";
    a_hole_dropped: HoleDropped => "illegal cut";
    a_hole_recorded_before_its_write_completed: HoleAtSubmit => "illegal cut";
    a_cut_between_a_hole_and_its_second_read: CutBeforeReread => "illegal cut";
    position_not_moved_behind_the_second_read: PositionKept => "illegal cut";
    second_read_laid_under_older_records: RereadUnderRecords => "illegal cut";
    two_records_swapped: OrderSwapped => "illegal cut";
    bits_cleared_before_the_receipt: ClearedBeforeReceipt => "lost bit";
    no_bit_at_completion: NoCompletionBit => "lost bit";
    capture_program_before_bit_program: CaptureBeforeBit => "illegal cut";
    misses_not_looked_at: MissesIgnored => "illegal cut";
    accounts_not_compared: AccountsIgnored => "illegal cut";
    accounts_compared_while_a_completion_is_between_them: AccountsUnsettled => "illegal cut";
    accounts_forgotten_by_a_new_life: AccountsForgotten => "illegal cut";
    dirty_blocks_laid_under_older_records: BlocksUnderRecords => "illegal cut";
    dirty_blocks_laid_under_older_records_and_released: BlocksUnderRecords => "lost bit";
    only_one_half_read_by_a_new_life: OneHalfAtStart => "illegal cut";
    a_receipt_that_clears_what_was_taken_later: ReceiptClearsLater => "lost bit";
    old_half_cleared_before_it_is_held: ClearedBeforeHeld => "lost bit";
}
