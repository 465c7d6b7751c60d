//! Failover on this host: the facts are gathered, the plan is decided, its steps are carried out.

use crate::agent::Agent;
use crate::agent::group::{Group, lock};
use crate::agent::standby::Standby;
use crate::control::{Event, Sink};
use crate::failover;
use crate::format::{Purpose, Standing};
use crate::model::{Code, Exit, Fault, Res, Role};
use crate::role::{Facts, PeerSeen, plan_failover};
use crate::session::{Sender, SenderEvent};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// What `status` says of a group that was promoted here and has no standby yet.
pub const SERVING_ALONE: &str = "serving alone: promoted here, nothing replicates it until it is failed back";
/// The peer is asked for this long whether it still serves.
const ASK_PATIENCE: Duration = Duration::from_secs(2);
