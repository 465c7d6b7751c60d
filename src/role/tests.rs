//! Every combination of the facts that decide, against the table of [`plan_failover`] written down a second time.

use crate::model::{Code, Moment, Position, Role};
use crate::role::{ContainerFact, Facts, Fencing, Peer, Plan, Step, plan_failover};

const EPOCH: u64 = 3;

fn facts() -> Facts {
    let container = |name: &str| ContainerFact { name: name.into(), running: false, image_present: true };
    Facts {
        group: "shop".into(),
        role: Role::Standby,
        epoch: EPOCH,
        committed: Position { epoch: EPOCH, generation: 9 },
        committed_cut_at: Moment(5_000),
        applied: Position { epoch: EPOCH, generation: 7 },
        unapplied: 2,
        uncommitted: true,
        syncing: false,
        promoted_here: false,
        volumes: vec!["pgdata".into(), "files".into()],
        containers: vec![container("db"), container("web")],
        peer: Peer::Unreachable,
        force: false,
    }
}

/// What is expected: a fault's code, or (fencing, new epoch, whether anything is to be done, whether it begins with the fence).
type Expected = Result<(Fencing, u64, bool, bool), Code>;

fn expected(facts: &Facts) -> Expected {
    let all_run = facts.containers.iter().all(|c| c.running);
    let peer_epoch = if let Peer::Alive { epoch, .. } = facts.peer { epoch } else { 0 };
    if facts.role == Role::Fenced {
        return Err(Code::WrongRole);
    }
    if peer_epoch > facts.epoch {
        return Err(Code::StaleEpoch);
    }
    match (facts.role, all_run, facts.promoted_here) {
        (Role::Primary, true, _) => return Ok((Fencing::DecidedBefore, EPOCH, false, false)),
        (Role::Primary, false, true) => return Ok((Fencing::DecidedBefore, EPOCH, true, false)),
        (Role::Primary, false, false) => return Err(Code::WrongRole),
        (Role::Promoting, ..) => return Ok((Fencing::DecidedBefore, EPOCH, true, true)),
        _ => {}
    }
    if facts.syncing || facts.committed.generation == 0 {
        return Err(Code::NothingCommitted);
    }
    let serves = matches!(facts.peer, Peer::Alive { role: Role::Primary | Role::Promoting, .. });
    match (facts.peer, serves, facts.force) {
        (_, true, false) => Err(Code::PeerAlive),
        (_, true, true) => Ok((Fencing::Forced, EPOCH + 1, true, true)),
        (Peer::Alive { .. }, false, _) => Ok((Fencing::PeerDoesNotServe, EPOCH + 1, true, true)),
        _ => Ok((Fencing::NoProof, EPOCH + 1, true, true)),
    }
}

#[test]
fn every_combination_has_its_row() {
    let roles = [Role::Primary, Role::Standby, Role::Promoting, Role::Fenced];
    let mut peers = vec![Peer::Unreachable, Peer::NotAsked];
    for role in roles {
        peers.extend([EPOCH - 1, EPOCH, EPOCH + 1].map(|epoch| Peer::Alive { role, epoch }));
    }
    let bits = [false, true];
    let mut seen = 0;
    let mut codes = std::collections::BTreeMap::new();
    for (role, peer) in roles.into_iter().flat_map(|role| peers.iter().map(move |peer| (role, *peer))) {
        for mask in 0..64u32 {
            let bit = |number: u32| bits[(mask >> number & 1) as usize];
            let mut facts = facts();
            (facts.role, facts.peer) = (role, peer);
            (facts.force, facts.syncing, facts.promoted_here) = (bit(0), bit(1), bit(2));
            facts.containers[0].running = bit(3);
            facts.containers[1].running = bit(4);
            if bit(5) {
                facts.committed = Position::default();
            }
            let got = plan_failover(&facts);
            match (&got, expected(&facts)) {
                (Ok(plan), Ok((fencing, epoch, work, fence))) => {
                    assert_eq!((plan.fencing, plan.epoch, !plan.steps.is_empty()), (fencing, epoch, work), "{facts:?}");
                    assert_eq!(matches!(plan.steps.first(), Some(Step::Fence { .. })), fence, "{facts:?}");
                    check_order(plan, &facts);
                }
                (Err(fault), Err(code)) => {
                    assert_eq!(fault.code, code, "{facts:?}");
                    *codes.entry(code.as_str()).or_insert(0) += 1;
                }
                (got, want) => panic!("{facts:?}: got {got:?}, want {want:?}"),
            }
            seen += 1;
        }
    }
    assert_eq!(seen, 4 * 14 * 64);
    assert_eq!(codes.keys().copied().collect::<Vec<_>>(), ["NOTHING_COMMITTED", "PEER_ALIVE", "STALE_EPOCH", "WRONG_ROLE"]);
}

/// What must come before what, in any plan.
fn check_order(plan: &Plan, facts: &Facts) {
    if plan.steps.is_empty() {
        return;
    }
    let at = |wanted: &Step| plan.steps.iter().position(|step| step == wanted);
    let fences = plan.steps.iter().filter(|step| matches!(step, Step::Fence { .. })).count();
    assert_eq!(fences, usize::from(facts.role != Role::Primary));
    assert_eq!(plan.steps.last(), Some(&Step::Record));
    for volume in &facts.volumes {
        let attach = at(&Step::Attach { volume: volume.clone() }).unwrap();
        let check = at(&Step::Check { volume: volume.clone() }).unwrap();
        let ensure = at(&Step::EnsureVolume { name: volume.clone() }).unwrap();
        assert!(attach < check && check < ensure);
        if facts.role != Role::Primary {
            assert!(at(&Step::FinishApply { count: 2 }).unwrap() < attach && at(&Step::DropUncommitted).unwrap() < attach);
        }
        for container in &facts.containers {
            assert!(ensure < at(&Step::EnsureContainer { name: container.name.clone() }).unwrap());
        }
    }
    let starts: Vec<_> = facts.containers.iter().map(|c| at(&Step::Start { name: c.name.clone() }).unwrap()).collect();
    assert!(starts.is_sorted(), "containers start in the order of the group");
}

#[test]
fn force_says_what_it_risks() {
    let mut facts = facts();
    facts.peer = Peer::Alive { role: Role::Primary, epoch: EPOCH };
    let fault = plan_failover(&facts).unwrap_err();
    assert!(fault.next.contains("split brain"), "{fault}");
    facts.force = true;
    assert_eq!(plan_failover(&facts).unwrap().warnings.len(), 1);
}

#[test]
fn nothing_to_apply_or_drop_is_no_step() {
    let mut facts = facts();
    (facts.unapplied, facts.uncommitted) = (0, false);
    let plan = plan_failover(&facts).unwrap();
    assert!(!plan.steps.iter().any(|step| matches!(step, Step::FinishApply { .. } | Step::DropUncommitted)));
}

#[test]
fn a_plan_is_printed_and_survives_json() {
    let mut facts = facts();
    facts.containers[1].image_present = false;
    let plan = plan_failover(&facts).unwrap();
    let text = plan.to_string();
    for line in [
        "group shop: to position 3/9 as primary in epoch 4",
        "  fencing: no proof that the old primary is down: the caller decided",
        "  warning: container web cannot start: its pinned image is not here",
        "  1. fence the old primary with epoch 4",
        "  2. apply 2 committed generations",
        " 16. record the new role",
    ] {
        assert!(text.lines().any(|have| have == line), "{line:?} in\n{text}");
    }
    assert_eq!(serde_json::from_str::<Plan>(&serde_json::to_string(&plan).unwrap()).unwrap(), plan);
    assert_eq!(plan.expected_loss_ms(Moment(6_500)), Some(1_500));
    assert_eq!(plan.expected_loss_ms(Moment(4_000)), Some(0));
    facts.committed_cut_at = Moment(0);
    assert_eq!(plan_failover(&facts).unwrap().expected_loss_ms(Moment(1)), None);
}
