//! One group on this host: its ledger, its live facts, the thread or connection that works on it.

use crate::agent::live::Live;
use crate::durable::FileStorage;
use crate::ledger;
use crate::ledger::{Ledger, Record};
use crate::link::Bell;
use crate::model::{Code, Exit, Fault, GroupId, Moment, Position, Res};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Somebody waits until the standby holds everything written before `asked_at`.
pub struct SyncWaiter {
    /// When it was asked.
    pub asked_at: Moment,
    /// The same on a clock that does not jump.
    pub asked: Instant,
    /// How long the answer may be put off by a fault.
    pub patience: Duration,
    /// Where the answer goes.
    pub done: Sender<Res<(Position, Moment)>>,
}

/// What a group's thread can be asked.
pub enum Command {
    /// Cut now.
    Sync(SyncWaiter),
    /// Compare both sides.
    Verify(Sender<Res<(serde_json::Value, Exit)>>),
    /// End.
    Stop,
}

/// One group.
pub struct Group {
    /// Its identity.
    pub id: GroupId,
    /// Its name.
    pub name: String,
    /// Its directory in the state directory.
    pub dir: PathBuf,
    ledger: Mutex<Ledger>,
    /// The record as last seen, for those who must not wait while a failover works on the ledger.
    seen: Mutex<Record>,
    live: Mutex<Live>,
    busy: Mutex<Option<String>>,
    /// The primary thread's inbox, while there is one.
    pub commands: Mutex<Option<Sender<Command>>>,
    /// Ends the primary thread's sleep when a command is sent.
    pub bell: Mutex<Option<Bell>>,
    /// The standby's side, opened.
    pub standby: Mutex<Option<crate::agent::standby::Standby>>,
    /// Counts connections of the primary: an older one must let go when a newer one comes.
    pub connection: std::sync::atomic::AtomicU64,
}

/// A poisoned lock is taken all the same: what it guards is ordered to be right at any stop.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The right to run one long operation on a group.
pub struct Busy<'a>(&'a Group);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        *lock(&self.0.busy) = None;
    }
}

impl Group {
    /// Opens the group in `dir`; `None` when its ledger holds nothing yet.
    pub fn open(dir: &Path) -> Res<Option<Group>> {
        let (storage, _) = FileStorage::open_or_create(&dir.join("ledger"), 2 * ledger::SLOT_BYTES)?;
        let (ledger, record) = Ledger::open(Box::new(storage))?;
        Ok(record.map(|record| Group::with(dir, ledger, &record)))
    }

    /// Makes the group in `dir` with its first record.
    pub fn create(dir: &Path, record: Record) -> Res<Group> {
        crate::durable::private_dir(dir)?;
        let (storage, _) = FileStorage::open_or_create(&dir.join("ledger"), 2 * ledger::SLOT_BYTES)?;
        let (mut ledger, old) = Ledger::open(Box::new(storage))?;
        if let Some(old) = old {
            return Err(Fault::new(
                Code::NameTaken,
                format!("group {}", record.spec.name),
                format!("its directory already holds group {}", old.spec.name),
                "choose another name",
            ));
        }
        ledger.commit(&mut |slot| {
            *slot = Some(record.clone());
            Ok(())
        })?;
        Ok(Group::with(dir, ledger, &record))
    }

    fn with(dir: &Path, ledger: Ledger, record: &Record) -> Group {
        let live = Live {
            state: "starting".into(),
            position: record.committed,
            recoverable_to: record.committed_cut_at,
            ..Live::default()
        };
        Group {
            id: record.spec.id,
            name: record.spec.name.clone(),
            dir: dir.to_path_buf(),
            ledger: Mutex::new(ledger),
            seen: Mutex::new(record.clone()),
            live: Mutex::new(live),
            busy: Mutex::new(None),
            commands: Mutex::new(None),
            bell: Mutex::new(None),
            standby: Mutex::new(None),
            connection: Default::default(),
        }
    }

    /// The ledger's record.
    pub fn record(&self) -> Res<Record> {
        let ledger = lock(&self.ledger);
        let record = ledger.record().ok_or_else(|| Fault::internal(format!("group {}", self.name), "its ledger is empty"))?;
        *lock(&self.seen) = record.clone();
        Ok(record.clone())
    }

    /// The ledger's record, or, while somebody works on the ledger, the one before that work.
    pub fn peek(&self) -> Record {
        if let Ok(ledger) = self.ledger.try_lock()
            && let Some(record) = ledger.record()
        {
            *lock(&self.seen) = record.clone();
        }
        lock(&self.seen).clone()
    }

    /// Edits the record durably.
    pub fn edit_ledger(&self, mut edit: impl FnMut(&mut Record) -> Res<()>) -> Res<()> {
        let mut ledger = lock(&self.ledger);
        ledger.commit(&mut |record| match record {
            Some(record) => edit(record),
            None => Err(Fault::internal("the ledger", "it is empty")),
        })?;
        // Who peeks while somebody works on the ledger must not be shown what was true before this edit.
        if let Some(record) = ledger.record() {
            *lock(&self.seen) = record.clone();
        }
        Ok(())
    }

    /// The ledger itself, for stages that commit to it.
    pub fn ledger(&self) -> MutexGuard<'_, Ledger> {
        lock(&self.ledger)
    }

    /// Reads or changes the live facts.
    pub fn with_live<T>(&self, change: impl FnOnce(&mut Live) -> T) -> T {
        change(&mut lock(&self.live))
    }

    /// Takes the right to run one long operation. `GROUP_BUSY` names the one that has it.
    pub fn begin(&self, operation: &str) -> Res<Busy<'_>> {
        let mut busy = lock(&self.busy);
        if let Some(other) = &*busy {
            return Err(Fault::new(
                Code::GroupBusy,
                format!("group {}", self.name),
                format!("operation {other} holds it"),
                "wait for it to end, then try again",
            ));
        }
        *busy = Some(format!("{operation}-{}", crate::agent::now().0));
        Ok(Busy(self))
    }

    /// Asks the primary thread for something.
    pub fn tell(&self, command: Command) -> Res<()> {
        let gone = |_| self.no_thread();
        lock(&self.commands).as_ref().ok_or_else(|| self.no_thread())?.send(command).map_err(gone)?;
        if let Some(bell) = lock(&self.bell).as_ref() {
            bell.ring();
        }
        Ok(())
    }

    fn no_thread(&self) -> Fault {
        Fault::new(
            Code::WrongRole,
            format!("group {}", self.name),
            "this host does not ship it",
            "run the command on the host that serves the group (see `doublure status`)",
        )
    }
}
