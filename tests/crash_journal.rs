//! The journal against every crash: scripts of a few generations, the power cut at every storage operation, every subset and
//! tear of what was not flushed, again during recovery; planted errors at every call; and wrong orders that must be found.
//!
//! What is asked of each state: every acknowledged generation is there with its own bytes, nothing else is (but the one whose
//! COMMIT was under way, whole), and no false alarm. What is not asked here: apply and the ledger, which are taken as durable.

use doublure::delta::{encode, encode_sectors};
use doublure::durable::double::{Dice, Disks, Limits, Op, Trouble, World, crash_states};
use doublure::journal::double::WorldOverflow;
use doublure::journal::{Journal, Recovered, Sealed, Step};
use doublure::model::{BLOCK_BYTES, BlockRun, Code, Digest, FileSystem, Moment, Position, Res, SealedProof, Uuid, VolumeSpec};

const GROUP: Uuid = Uuid([7; 16]);
/// Four blocks of management, and a ring of eleven: three small generations, or one of up to nine blocks of payload.
const RING_BYTES: u64 = 15 * 4096;

/// What the standby does. Sizes are changed blocks, each a record of 4 KiB and a header, by turns of blocks and of sectors.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// A generation arrives and is sealed.
    Send(u64),
    /// One arrives, its announced size larger than it.
    SendLess(u64, u64),
    /// One arrives in part, and is given up.
    Abandon(u64),
    /// The oldest one is applied (the ledger says so durably) and released.
    Apply,
    /// The process is killed and starts again.
    Restart,
}
use Act::{Abandon, Apply, Restart, Send, SendLess};

const SCRIPTS: &[&[Act]] = &[
    &[Send(1)],
    &[Send(0), Send(1), Send(2)],
    &[Send(2), Apply, Send(1), Apply, Send(2)],
    // Wraps: the third fits only at the ring's beginning, once the first is released.
    &[Send(2), Send(1), Apply, Send(2), Apply, Apply],
    &[Send(3), Apply, Send(3), Apply, Send(3)],
    &[Send(1), Apply, Send(1), Apply, Send(1), Apply, Send(1), Send(1)],
    // Larger than the ring, alone and between others.
    &[Send(10), Apply, Send(1)],
    &[Send(1), Send(11), Send(1), Apply, Apply, Send(1), Apply],
    // The ring is full of what is not applied: overflow, too.
    &[Send(3), Send(3), Send(2), Apply, Apply, Send(2)],
    // Given up, and then another one in its place.
    &[Abandon(2), Send(1)],
    &[Send(1), Abandon(12), Send(2), Abandon(1), Apply],
    &[SendLess(1, 3), SendLess(2, 8), Apply, Send(1)],
    &[Send(1), Restart, Send(2), Apply, Restart, Send(1)],
    &[Send(2), Apply, Restart, Send(2), Restart, Send(12), Restart, Apply, Send(1)],
];

struct Attempt {
    position: Position,
    digest: Digest,
    payload: Vec<u8>,
}

const SEALING: u64 = 1 << 32;
const SEALED: u64 = 2 << 32;
const APPLIED: u64 = 3 << 32;
/// A start of the process is over: what it did not find is gone for good.
const STARTED: u64 = 4 << 32;

/// The standby, and all that was ever sent to it. Notes in the world's log say what the outside knows.
struct Standby {
    world: World,
    journal: Option<Journal>,
    waiting: Vec<Sealed>,
    attempts: Vec<Attempt>,
    applied: Position,
    order: Option<&'static [Step]>,
    dice: Dice,
}

fn volumes() -> Vec<VolumeSpec> {
    vec![VolumeSpec {
        id: Uuid([1; 16]),
        name: "data".into(),
        size_bytes: 1000 * BLOCK_BYTES,
        fs: FileSystem::Ext4,
        mount_options: String::new(),
    }]
}

fn open(world: &World, applied: Position) -> Res<(Journal, Recovered)> {
    Journal::open(GROUP, Box::new(world.disk("ring", RING_BYTES)), Box::new(WorldOverflow(world.clone())), applied)
}

impl Standby {
    fn new(world: World, order: Option<&'static [Step]>, seed: u64) -> Standby {
        let (waiting, attempts) = (Vec::new(), Vec::new());
        Standby { world, journal: None, waiting, attempts, applied: Position::default(), order, dice: Dice::new(seed) }
    }

    /// As after a start of the process. What is found sealed counts as acknowledged: the primary is told of the tip.
    fn start(&mut self) -> Res<Recovered> {
        self.journal = None;
        let (mut journal, recovered) = open(&self.world, self.applied)?;
        if let Some(order) = self.order {
            plant(&mut journal, order);
        }
        self.waiting = recovered.sealed.clone();
        for sealed in &self.waiting {
            let attempt = self.attempt(sealed).expect("only what was sent is found");
            self.world.note(SEALED | attempt as u64);
        }
        self.world.note(STARTED);
        self.journal = Some(journal);
        Ok(recovered)
    }

    fn attempt(&self, sealed: &Sealed) -> Option<usize> {
        self.attempts.iter().rposition(|attempt| (attempt.position, attempt.digest) == (sealed.position(), sealed.digest()))
    }

    fn payload(&mut self, blocks: u64) -> Vec<u8> {
        let mut payload = Vec::new();
        for n in 0..blocks {
            let block: Vec<u8> = (0..BLOCK_BYTES).map(|_| self.dice.roll() as u8).collect();
            match n % 2 {
                0 => encode(0, BlockRun { start: n, count: 1 }, &block, &mut payload),
                _ => encode_sectors(0, n * 8 + 3, &block, true, &mut payload),
            }
        }
        encode(0, BlockRun { start: 500 + blocks, count: 1 }, &[0; 4096], &mut payload);
        payload
    }

    fn act(&mut self, act: Act) -> Res<()> {
        let (blocks, announced) = match act {
            Send(blocks) | Abandon(blocks) => (blocks, blocks),
            SendLess(blocks, announced) => (blocks, announced),
            Apply => return self.apply(),
            Restart => return self.start().map(|_| ()),
        };
        let payload = self.payload(blocks);
        let Some(journal) = &mut self.journal else { return Ok(()) };
        let (parent, parent_digest) = journal.tip();
        let position = Position { epoch: 1, generation: parent.generation + 1 };
        let payload_digest = Digest(*blake3::hash(&payload).as_bytes());
        let chained = [&parent_digest.0[..], &payload_digest.0].concat();
        let digest = Digest(*blake3::hash(&chained).as_bytes());
        journal.begin(position, parent, parent_digest, payload.len() as u64 + (announced - blocks) * 4200)?;
        let (head, tail) = payload.split_at(if blocks > 0 { 4128 } else { 0 });
        journal.append(head, &volumes())?;
        if let Abandon(_) = act {
            return journal.abandon();
        }
        journal.append(tail, &volumes())?;
        self.world.note(SEALING | self.attempts.len() as u64);
        let bytes = payload.len() as u64;
        self.attempts.push(Attempt { position, digest, payload });
        let sealed = journal.seal(bytes, payload_digest, digest, Moment(1))?;
        self.world.note(SEALED | (self.attempts.len() as u64 - 1));
        self.waiting.push(sealed);
        Ok(())
    }

    fn apply(&mut self) -> Res<()> {
        let (Some(journal), Some(sealed)) = (&mut self.journal, self.waiting.first()) else { return Ok(()) };
        journal.read(sealed, &mut |_| Ok(()))?;
        let sealed = self.waiting.remove(0);
        self.applied = sealed.position();
        let attempt = self.attempt(&sealed).expect("only what was sent is applied");
        self.world.note(APPLIED | attempt as u64);
        match &mut self.journal {
            Some(journal) => journal.release(self.applied),
            None => Ok(()),
        }
    }
}

#[cfg(debug_assertions)]
fn plant(journal: &mut Journal, order: &'static [Step]) {
    journal.plant_order(order);
}
#[cfg(not(debug_assertions))]
fn plant(_: &mut Journal, _: &'static [Step]) {
    unreachable!("orders are planted in debug builds only");
}

/// What the outside knows at a place of the log.
#[derive(Default, Clone, Debug)]
struct Known {
    applied: Position,
    acknowledged: Vec<usize>,
    sealing: Option<usize>,
}

impl Known {
    fn at(log: &[Op], attempts: &[Attempt]) -> Known {
        let mut known = Known::default();
        for op in log {
            let Op::Note(note) = op else { continue };
            let attempt = (note & 0xffff_ffff) as usize;
            match note - (note & 0xffff_ffff) {
                SEALING => known.sealing = Some(attempt),
                SEALED => {
                    known.sealing = known.sealing.filter(|sealing| *sealing != attempt);
                    if !known.acknowledged.contains(&attempt) {
                        known.acknowledged.push(attempt);
                    }
                }
                STARTED => known.sealing = None,
                APPLIED => known.applied = attempts[attempt].position,
                _ => unreachable!(),
            }
        }
        known.acknowledged.retain(|attempt| attempts[*attempt].position > known.applied);
        known
    }

    /// Compares what recovery gives with what must be there. `lenient`: a liar was at work, so things may be missing if it is said.
    fn check(&self, attempts: &[Attempt], journal: &Journal, recovered: &Recovered, lenient: bool) -> Result<(), String> {
        let found: Vec<Position> = recovered.sealed.iter().map(Sealed::position).collect();
        let wanted: Vec<Position> = self.acknowledged.iter().map(|attempt| attempts[*attempt].position).collect();
        let also: Vec<Position> = wanted.iter().copied().chain(self.sealing.map(|attempt| attempts[attempt].position)).collect();
        if !lenient && (recovered.corrupt.is_some() || recovered.flush_not_kept) {
            return Err(format!("a false alarm: {recovered:?}"));
        }
        let said = lenient && recovered.corrupt.is_some() && also.starts_with(&found);
        if found != wanted && found != also && !said {
            return Err(format!("found {found:?}, acknowledged {wanted:?}, perhaps {also:?}; {:?}", recovered.corrupt));
        }
        for (sealed, attempt) in recovered.sealed.iter().zip(self.acknowledged.iter().chain(&self.sealing)) {
            let attempt = &attempts[*attempt];
            let mut bytes = Vec::new();
            journal
                .read(sealed, &mut |piece| {
                    bytes.extend_from_slice(piece);
                    Ok(())
                })
                .map_err(|fault| format!("reading {}: {fault}", attempt.position))?;
            if sealed.digest() != attempt.digest || bytes != attempt.payload {
                return Err(format!("wrong bytes in {}", attempt.position));
            }
        }
        Ok(())
    }
}

struct Explorer<'a> {
    attempts: &'a [Attempt],
    lenient: bool,
    states: u64,
    seed: u64,
}

impl Explorer<'_> {
    /// One state after power on: recover, compare; crash in that recovery everywhere; now and then go on living.
    fn state(&mut self, known: &Known, disks: &Disks, depth: u32) -> Result<(), String> {
        self.states += 1;
        let world = World::from_disks(disks);
        let (mut journal, recovered) = open(&world, known.applied).map_err(|fault| format!("opening: {fault}"))?;
        known.check(self.attempts, &journal, &recovered, self.lenient)?;
        let log = world.log();
        if depth > 0 && log.iter().any(|op| !matches!(op, Op::Flush(_))) {
            let mut wrong = None;
            let limits = Limits { writes_max: 4, tears_max: 32, samples: 1, seed: self.seed };
            crash_states(disks, &log, limits, &mut |_, disks| {
                if wrong.is_none() {
                    wrong = self.state(known, disks, depth - 1).err();
                }
            });
            wrong.map_or(Ok(()), |wrong| Err(format!("after a crash in recovery: {wrong}")))?;
        }
        if self.states.is_multiple_of(16) && recovered.corrupt.is_none() {
            let (parent, parent_digest) = journal.tip();
            let position = Position { epoch: 2, generation: parent.generation + 1 };
            let mut payload = Vec::new();
            encode(0, BlockRun { start: 3, count: 1 }, &[self.states as u8 | 1; 4096], &mut payload);
            let digest = Digest(*blake3::hash(&payload).as_bytes());
            let mut on = || {
                journal.begin(position, parent, parent_digest, payload.len() as u64)?;
                journal.append(&payload, &volumes())?;
                journal.seal(payload.len() as u64, digest, digest, Moment(1))
            };
            let sealed = on().map_err(|fault| format!("going on after recovery: {fault}"))?;
            let (_, again) = open(&world, known.applied).map_err(|fault| format!("opening again: {fault}"))?;
            if again.sealed.len() != recovered.sealed.len() + 1 || again.sealed.last() != Some(&sealed) {
                return Err(format!("after going on: {again:?}"));
            }
        }
        Ok(())
    }
}

/// Every crash of one script. Returns the number of states looked at, or the first that is wrong.
fn explore(script: &[Act], order: Option<&'static [Step]>, samples: usize) -> Result<u64, String> {
    let mut standby = Standby::new(World::new(), order, 1);
    standby.start().map_err(|fault| fault.to_string())?;
    for act in script {
        standby.act(*act).map_err(|fault| format!("{act:?}: {fault}"))?;
    }
    let limits = Limits { writes_max: 10, tears_max: usize::MAX, samples, seed: 1 };
    explore_log(&standby, 1, limits).map_err(|wrong| format!("{script:?}: {wrong}"))
}

/// Looks at one state of every `stride`.
fn explore_log(standby: &Standby, stride: u64, limits: Limits) -> Result<u64, String> {
    let log = standby.world.log();
    let mut explorer = Explorer { attempts: &standby.attempts, lenient: false, states: 0, seed: limits.seed };
    let mut shown = limits.seed;
    let (mut wrong, mut place, mut known) = (None, usize::MAX, Known::default());
    crash_states(&Disks::new(), &log, limits, &mut |at, disks| {
        shown += 1;
        if wrong.is_some() || !shown.is_multiple_of(stride) || !disks.contains_key("ring") {
            return;
        }
        if at != place {
            (place, known) = (at, Known::at(&log[..at], &standby.attempts));
        }
        wrong = explorer
            .state(&known, disks, 1)
            .err()
            .map(|wrong| format!("power cut after {at} of {} operations: {wrong}", log.len()));
    });
    wrong.map_or(Ok(explorer.states), Err)
}

#[test]
fn every_crash_leaves_every_acknowledged_generation_and_nothing_else() {
    let mut states = 0;
    for script in SCRIPTS {
        states += explore(script, None, 60).unwrap_or_else(|wrong| panic!("{wrong}"));
    }
    println!("crash_journal: {states} states of {} scripts", SCRIPTS.len());
    assert!(states > 10_000, "{states} states are too few to mean anything");
}

/// The test of the test: each wrong order must be found.
#[cfg(debug_assertions)]
#[test]
fn each_wrong_order_is_found() {
    use Step::{Commit, Flush, FlushCommit, Header, Payload, ReadBack};
    const WRONG: &[(&str, &[Step])] = &[
        ("without flush 3", &[Payload, Header, Flush, ReadBack, Commit, FlushCommit]),
        ("without flush 5", &[Payload, Flush, Header, ReadBack, Commit, FlushCommit]),
        ("without both", &[Payload, Header, ReadBack, Commit, FlushCommit]),
        ("without flush 8", &[Payload, Flush, Header, Flush, ReadBack, Commit]),
        ("COMMIT before header", &[Payload, Flush, Commit, Header, Flush, ReadBack, FlushCommit]),
        ("COMMIT flushed before header", &[Payload, Flush, Commit, FlushCommit, Header, Flush, ReadBack]),
        ("payload last", &[Header, Flush, Payload, Flush, ReadBack, Commit, FlushCommit]),
        ("COMMIT forgotten", &[Payload, Flush, Header, Flush, ReadBack, FlushCommit]),
    ];
    for (name, order) in WRONG {
        let found = SCRIPTS.iter().find_map(|script| explore(script, Some(order), 20).err());
        println!("{name}: {}", found.as_deref().unwrap_or("NOT FOUND"));
        assert!(found.is_some(), "the order {name} was not found out");
    }
    // The last one needs a disk that writes something else than it was told.
    let order: &[Step] = &[Payload, Flush, Header, Flush, Commit, FlushCommit];
    let found = SCRIPTS[..4].iter().find_map(|script| troubled(script, Some(order), &[Trouble::FlipsABit, Trouble::Lies]).err());
    println!("without read-back: {}", found.as_deref().unwrap_or("NOT FOUND"));
    assert!(found.is_some(), "an order without read-back was not found out");
}

/// Plants each trouble at each call, lets the standby react as the agent would (restart when the journal asks for it, send
/// again what was not acknowledged), and then looks at every crash of what came of it.
fn troubled(script: &[Act], order: Option<&'static [Step]>, troubles: &[Trouble]) -> Result<u64, String> {
    let mut clean = Standby::new(World::new(), None, 2);
    clean.start().map_err(|fault| fault.to_string())?;
    script.iter().try_for_each(|act| clean.act(*act)).map_err(|fault| fault.to_string())?;
    let mut states = 0;
    for call in 0..clean.world.calls() {
        for trouble in troubles {
            states += one_trouble(script, order, call, *trouble)
                .map_err(|wrong| format!("{script:?}, {trouble:?} at call {call}: {wrong}"))?;
        }
    }
    Ok(states)
}

fn one_trouble(script: &[Act], order: Option<&'static [Step]>, call: u64, trouble: Trouble) -> Result<u64, String> {
    let world = World::new();
    world.plant(call, trouble);
    let mut standby = Standby::new(world, order, 2);
    let restart = |standby: &mut Standby| {
        for _ in 0..3 {
            match standby.start() {
                Ok(recovered) if recovered.corrupt.is_none() => return Ok(()),
                Ok(_) | Err(_) => {}
            }
        }
        Err(format!("it does not come back: {:?}", standby.start().map(|recovered| recovered.corrupt)))
    };
    let mut come_back = restart(&mut standby);
    for act in script {
        for tries in 0..3 {
            if come_back.is_err() {
                break;
            }
            match standby.act(*act) {
                Ok(()) => break,
                Err(fault) if fault.code == Code::Internal => return Err(fault.to_string()),
                // What asks to be opened again, or fails twice, gets a new process; the rest is simply sent again.
                Err(fault) if tries > 0 || fault.code == Code::FlushFailed => come_back = restart(&mut standby),
                Err(_) => {}
            }
        }
    }
    let lying = matches!(trouble, Trouble::Lies | Trouble::FlipsABit);
    // Only a superblock is not read back: if it stays the older one, what was written over is missed, loudly.
    let lenient = lying && standby.world.struck().is_some_and(|(disk, offset)| disk == "ring" && offset < 8192);
    if let Err(wrong) = come_back {
        return if lenient { Ok(1) } else { Err(wrong) };
    }
    // Killed: nothing that was written is lost, not even by a flush that lied.
    let known = Known::at(&standby.world.log(), &standby.attempts);
    let mut explorer = Explorer { attempts: &standby.attempts, lenient, states: 1, seed: 3 };
    explorer.state(&known, &standby.world.after_kill(), 1).map_err(|wrong| format!("killed at the end: {wrong}"))?;
    if lying {
        return Ok(explorer.states);
    }
    let limits = Limits { writes_max: 3, tears_max: 4, samples: 1, seed: call };
    Ok(explorer.states + explore_log(&standby, 4, limits)?)
}

#[test]
fn no_error_at_any_call_loses_or_changes_what_was_acknowledged() {
    let mut states = 0;
    let honest = [Trouble::Fails, Trouble::FailsHalfway, Trouble::FailsAfterwards, Trouble::FailsAndForgets];
    for script in [SCRIPTS[3], SCRIPTS[6]] {
        states += troubled(script, None, &honest).unwrap_or_else(|wrong| panic!("{wrong}"));
    }
    println!("crash_journal: {states} states after planted errors");
    assert!(states > 5_000);
}

#[test]
fn a_disk_that_lies_is_caught_or_harmless_while_the_power_stays() {
    let mut runs = 0;
    for script in SCRIPTS {
        runs += troubled(script, None, &[Trouble::Lies, Trouble::FlipsABit]).unwrap_or_else(|wrong| panic!("{wrong}"));
    }
    println!("crash_journal: {runs} states after planted lies");
    assert!(runs > 300);
}

/// Long lives with many power cuts, each at a random call and with a random rest of the cache; every life from a seed.
#[test]
fn lives_with_many_power_cuts() {
    let (mut cuts, mut sealed) = (0, 0);
    for seed in 0..150 {
        let mut dice = Dice::new(seed);
        let mut standby = Standby::new(World::new(), None, seed);
        standby.start().unwrap();
        for _ in 0..12 {
            // The cut is an error that ends the process; then the cache is lost, sector by sector.
            let at = standby.world.calls() + dice.below(40);
            standby.world.plant(at, [Trouble::Fails, Trouble::FailsHalfway, Trouble::FailsAfterwards][dice.below(3) as usize]);
            while standby.world.calls() <= at {
                let act = match dice.below(10) {
                    0 => Abandon(dice.below(4)),
                    1 => Send(9 + dice.below(4)),
                    2 => SendLess(dice.below(3), 3),
                    3..=5 => Apply,
                    _ => Send(dice.below(4)),
                };
                if standby.act(act).is_err() {
                    break;
                }
            }
            cuts += 1;
            let known = Known::at(&standby.world.log(), &standby.attempts);
            let disks = standby.world.after_power_cut(&mut || dice.roll() & 1 == 1);
            let mut explorer = Explorer { attempts: &standby.attempts, lenient: false, states: cuts, seed };
            explorer.state(&known, &disks, 1).unwrap_or_else(|wrong| panic!("seed {seed}, cut {cuts}: {wrong}"));
            standby.world = World::from_disks(&disks);
            for attempt in &known.acknowledged {
                standby.world.note(SEALED | *attempt as u64);
            }
            standby.applied = known.applied;
            standby.start().unwrap();
            if let Some(last) = standby.attempts.iter().rposition(|attempt| attempt.position == known.applied) {
                standby.world.note(APPLIED | last as u64);
            }
        }
        sealed += standby.attempts.len();
    }
    println!("crash_journal: {cuts} power cuts in 150 lives, {sealed} generations sent");
}

#[test]
fn rot_in_any_block_is_noticed_and_what_is_before_it_can_still_be_had() {
    let mut standby = Standby::new(World::new(), None, 5);
    standby.start().unwrap();
    for act in [Send(1), Apply, Send(1), Send(0), Send(9)] {
        standby.act(act).unwrap();
    }
    let known = Known::at(&standby.world.log(), &standby.attempts);
    let disks = standby.world.after_kill();
    let (mut noticed, mut harmless) = (0, 0);
    for (name, image) in &disks {
        for byte in (0..image.len_bytes()).step_by(97) {
            let world = World::from_disks(&disks);
            world.rot(name, byte, byte as u8);
            let (journal, recovered) = open(&world, known.applied).unwrap();
            known
                .check(&standby.attempts, &journal, &recovered, true)
                .unwrap_or_else(|wrong| panic!("{name} at {byte}: {wrong}"));
            match recovered.corrupt {
                Some(fault) => {
                    assert_eq!(fault.code, Code::Corrupt);
                    noticed += 1;
                }
                None => harmless += 1,
            }
        }
    }
    println!("crash_journal: {noticed} rotten bytes noticed, {harmless} did not matter");
    assert!(noticed > 100 && harmless > 10);
}
