//! The door that `failover` codes against until the room's owner opens it.

use crate::device::{DeviceFile, Engine};
use crate::journal::{Journal, Sealed};
use crate::ledger::Ledger;
use crate::model::{GroupSpec, Res};

/// Proof that a generation is on the replicas. Only `apply` makes it.
pub struct Applied {
    _p: (),
}

/// Writes a sealed generation to the replicas, flushes them, and records the position.
pub fn apply(
    _journal: &Journal,
    _sealed: &Sealed,
    _spec: &GroupSpec,
    _replicas: &[DeviceFile],
    _engine: &mut dyn Engine,
    _ledger: &mut Ledger,
) -> Res<Applied> {
    todo!()
}
