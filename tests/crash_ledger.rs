//! The ledger against every crash and every error: what was committed is what is found, whole, and never an older one.

use doublure::durable::Storage;
use doublure::durable::double::{Disks, Limits, Op, Trouble, World, crash_states};
use doublure::ledger::{Ledger, Record, SLOT_BYTES, STORAGE_BYTES};
use doublure::model::{Code, Digest, GroupSpec, Moment, Position, Res, Role, Uuid};

/// Epoch `epoch`, with a name long enough to make the record as large as wanted.
fn record(epoch: u64, bytes: usize) -> Record {
    Record {
        role: Role::Standby,
        epoch,
        spec: GroupSpec { id: Uuid([9; 16]), name: "x".repeat(bytes), volumes: vec![], containers: vec![] },
        peer: "b".into(),
        committed: Position { epoch, generation: 2 * epoch },
        committed_digest: Digest([epoch as u8; 32]),
        committed_cut_at: Moment(1),
        applied: Position { epoch, generation: epoch },
        applied_digest: Digest([epoch as u8; 32]),
        applied_cut_at: Moment(2),
        syncing: false,
        images: Default::default(),
        last_failover: None,
    }
}

/// Lengths of consecutive records: short (twice in a slot) and long (once).
const SCRIPTS: &[&[usize]] = &[&[10, 20, 3000], &[10, 600_000, 10, 10], &[600_000, 10, 600_000]];

fn disk(world: &World) -> Box<dyn Storage> {
    Box::new(world.disk("ledger", STORAGE_BYTES))
}

fn put(ledger: &mut Ledger, record: &Record) -> Res<()> {
    let mut edit = |slot: &mut Option<Record>| {
        *slot = Some(record.clone());
        Ok(())
    };
    ledger.commit(&mut edit).map(|_| ())
}

const BEGUN: u64 = 1 << 32;
const DONE: u64 = 2 << 32;

/// Epoch of the last finished commit, and of one under way.
fn known(log: &[Op]) -> (u64, u64) {
    let (mut done, mut begun) = (0, 0);
    for op in log {
        match op {
            Op::Note(note) if *note >= DONE => done = note - DONE,
            Op::Note(note) => begun = note - BEGUN,
            _ => {}
        }
    }
    (done, begun.max(done))
}

fn check(disks: &Disks, (done, begun): (u64, u64), sizes: &[usize], depth: u32) -> Result<u64, String> {
    let world = World::from_disks(disks);
    let (mut ledger, found) = Ledger::open(disk(&world)).map_err(|fault| fault.to_string())?;
    let epoch = found.as_ref().map_or(0, |record| record.epoch);
    if epoch != done && epoch != begun {
        return Err(format!("epoch {epoch} is found, {done} was committed and {begun} under way"));
    }
    if let Some(found) = &found
        && (*found != record(epoch, sizes[epoch as usize - 1]) || ledger.record() != Some(found))
    {
        return Err(format!("the record of epoch {epoch} is another one"));
    }
    let (log, mut states, mut wrong) = (world.log(), 1, None);
    if depth > 0 && log.len() > 1 {
        let limits = Limits { writes_max: 4, tears_max: 6, samples: 2, seed: 1 };
        crash_states(disks, &log, limits, &mut |_, disks| {
            if wrong.is_none() {
                // What an opening has told must not be taken back by a crash in it: it was durable before it was told.
                match check(disks, (epoch, epoch), sizes, depth - 1) {
                    Ok(more) => states += more,
                    Err(fault) => wrong = Some(format!("after a crash in opening: {fault}")),
                }
            }
        });
    }
    if let Some(wrong) = wrong {
        return Err(wrong);
    }
    // And life goes on.
    put(&mut ledger, &record(99, 10)).map_err(|fault| fault.to_string())?;
    match Ledger::open(disk(&world)) {
        Ok((_, Some(found))) if found.epoch == 99 => Ok(states),
        other => Err(format!("going on: {:?}", other.map(|(_, found)| found.map(|record| record.epoch)))),
    }
}

fn run(world: &World, sizes: &[usize]) {
    let opened = Ledger::open(disk(world));
    let mut ledger = opened.ok().map(|(ledger, _)| ledger);
    for (n, bytes) in sizes.iter().enumerate() {
        let epoch = n as u64 + 1;
        for _ in 0..3 {
            let at = |ledger: &Option<Ledger>| ledger.as_ref().and_then(Ledger::record).map_or(0, |record| record.epoch);
            if at(&ledger) == epoch {
                break;
            }
            world.note(BEGUN + epoch);
            if let Some(Ok(())) = ledger.as_mut().map(|ledger| put(ledger, &record(epoch, *bytes))) {
                world.note(DONE + epoch);
                break;
            }
            // As the agent would: a poisoned ledger is opened again, and tells which record counts.
            ledger = Ledger::open(disk(world)).ok().map(|(ledger, _)| ledger);
            if at(&ledger) == epoch {
                world.note(DONE + epoch);
            }
        }
    }
}

fn explore(world: &World, sizes: &[usize], tears_max: usize, samples: usize) -> Result<u64, String> {
    let log = world.log();
    let (mut states, mut wrong) = (0, None);
    crash_states(&Disks::new(), &log, Limits { writes_max: 10, tears_max, samples, seed: 1 }, &mut |at, disks| {
        if wrong.is_none() && disks.contains_key("ledger") {
            match check(disks, known(&log[..at]), sizes, 1) {
                Ok(more) => states += more,
                Err(fault) => wrong = Some(format!("power cut after {at} of {}: {fault}", log.len())),
            }
        }
    });
    wrong.map_or(Ok(states), Err)
}

#[test]
fn every_crash_leaves_the_last_commit_or_the_one_under_way() {
    let mut states = 0;
    for (sizes, (tears, samples)) in SCRIPTS.iter().zip([(usize::MAX, 60), (12, 4), (12, 4)]) {
        let world = World::new();
        run(&world, sizes);
        assert_eq!(known(&world.log()).0, sizes.len() as u64);
        states += explore(&world, sizes, tears, samples).unwrap_or_else(|wrong| panic!("{sizes:?}: {wrong}"));
    }
    println!("crash_ledger: {states} states");
    assert!(states > 2_000, "{states} states are too few to mean anything");
}

#[test]
fn no_error_at_any_call_brings_an_older_record_back() {
    let (sizes, mut states) = (SCRIPTS[0], 0);
    let clean = World::new();
    run(&clean, sizes);
    for call in 0..clean.calls() {
        for trouble in Trouble::ALL {
            let world = World::new();
            world.plant(call, trouble);
            run(&world, sizes);
            let killed = check(&world.after_kill(), known(&world.log()), sizes, 1);
            states += killed.unwrap_or_else(|wrong| panic!("{trouble:?} at call {call}, killed: {wrong}"));
            // A flush that lied loses the commit at a power cut; nobody can see that beforehand.
            if trouble != Trouble::Lies {
                let cut = explore(&world, sizes, 3, 1);
                states += cut.unwrap_or_else(|wrong| panic!("{trouble:?} at call {call}: {wrong}"));
            }
        }
    }
    println!("crash_ledger: {states} states after planted errors");
    assert!(states > 2_000);
}

#[test]
fn one_rotten_byte_never_brings_an_older_record_back() {
    let world = World::new();
    run(&world, SCRIPTS[0]);
    let disks = world.after_kill();
    for slot in [0, SLOT_BYTES] {
        for byte in (0..520).chain((4096..8192).step_by(61)).chain([SLOT_BYTES / 2, SLOT_BYTES / 2 + 4100]) {
            let world = World::from_disks(&disks);
            world.rot("ledger", slot + byte, byte as u8);
            let (_, found) = Ledger::open(disk(&world)).unwrap();
            assert_eq!(found.map(|record| record.epoch), Some(3), "byte {byte} of the slot at {slot}");
        }
    }
}

#[test]
fn two_ruined_slots_are_said_and_not_taken_for_a_new_ledger() {
    let world = World::new();
    run(&world, SCRIPTS[0]);
    for slot in [0, SLOT_BYTES] {
        for copy in [0, SLOT_BYTES / 2] {
            world.rot("ledger", slot + copy + 30, 1);
        }
    }
    assert_eq!(Ledger::open(disk(&world)).unwrap_err().code, Code::Corrupt);
}

/// The test of the test: a disk whose flushes do nothing must be seen to lose commits.
#[test]
fn a_ledger_without_flushes_is_found_out() {
    let world = World::new();
    run(&world, SCRIPTS[0]);
    let log: Vec<Op> = world.log().into_iter().filter(|op| !matches!(op, Op::Flush(_))).collect();
    let mut wrong = None;
    crash_states(&Disks::new(), &log, Limits { writes_max: 10, tears_max: 6, samples: 20, seed: 1 }, &mut |at, disks| {
        if wrong.is_none() && disks.contains_key("ledger") {
            wrong = check(disks, known(&log[..at]), SCRIPTS[0], 0).err();
        }
    });
    println!("without flushes: {wrong:?}");
    assert!(wrong.is_some());
}

#[test]
fn an_edit_that_fails_or_grows_too_large_changes_nothing() {
    let world = World::new();
    let (mut ledger, none) = Ledger::open(disk(&world)).unwrap();
    assert!(none.is_none() && ledger.record().is_none());
    put(&mut ledger, &record(1, 10)).unwrap();
    let refuse = &mut |_: &mut Option<Record>| Err(doublure::model::Fault::internal("edit", "no"));
    assert_eq!(ledger.commit(refuse).unwrap_err().code, Code::Internal);
    assert_eq!(put(&mut ledger, &record(2, 1 << 20)).unwrap_err().code, Code::BadArgument);
    assert_eq!(
        ledger
            .commit(&mut |slot| {
                slot.take();
                Ok(())
            })
            .unwrap_err()
            .code,
        Code::BadArgument
    );
    assert_eq!(ledger.record(), Some(&record(1, 10)));
    put(&mut ledger, &record(3, 10)).unwrap();
    assert_eq!(ledger.record(), Some(&record(3, 10)));
}
