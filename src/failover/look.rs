//! The facts of a group, gathered from the hands that have them.

use crate::docker::Docker;
use crate::journal::{Journal, Sealed};
use crate::ledger::Ledger;
use crate::model::{Fault, Res, SealedProof};
use crate::role::{ContainerFact, Facts, Peer};

/// Gathers what `role` wants to know. `sealed`: committed generations that the journal still holds, oldest first. Errors:
/// those of Docker, and `INTERNAL` without a record.
pub fn look(ledger: &Ledger, journal: &Journal, sealed: &[Sealed], docker: &Docker, peer: Peer, force: bool) -> Res<Facts> {
    let record = ledger.record().ok_or_else(|| Fault::internal("the group's ledger", "it has no record"))?;
    record.images.iter().for_each(|(digest, id)| docker.recall_proof(digest, id));
    let unapplied = sealed.iter().filter(|one| one.position() > record.applied).count() as u64;
    // The journal may be ahead of the ledger, and after a release it may hold nothing any more.
    let newest = sealed.last().filter(|one| one.position() > record.committed);
    let (committed, committed_cut_at) = match newest {
        Some(one) => (one.position(), one.cut_at()),
        None => (record.committed, record.committed_cut_at),
    };
    let mut containers = Vec::new();
    for spec in &record.spec.containers {
        containers.push(ContainerFact {
            name: spec.name.clone(),
            running: docker.find_state(&spec.name)?.is_some_and(|state| state.running),
            image_present: docker.find_image(&spec.image)?.is_some(),
        });
    }
    Ok(Facts {
        group: record.spec.name.clone(),
        role: record.role,
        epoch: record.epoch,
        committed,
        committed_cut_at,
        applied: record.applied,
        unapplied,
        uncommitted: journal.open_generation().is_some(),
        syncing: record.syncing,
        promoted_here: record.last_failover.is_some(),
        volumes: record.spec.volumes.iter().map(|volume| volume.name.clone()).collect(),
        containers,
        peer,
        force,
    })
}
