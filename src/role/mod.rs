//! Owns who may do what: from facts about a group to a plan, as a value that can be printed, sent and repeated.
//! Gives the steps of a failover in the order in which they must happen, or one fault that says why not.
//! Keeps a plan free of hope: what is not committed is not promised, what runs already is not done again.
//! Never touches a host, a clock or a peer; carries nothing out.
//! Assumes the facts were gathered under the group's lock.
#![forbid(unsafe_code)]
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod facts;
mod footing;
mod plan;
#[cfg(test)]
mod tests;

pub use facts::{ContainerFact, Facts, Peer};
pub use footing::{ALL_MARKED, Footing, Grounds, footing};
pub use plan::{Fencing, Plan, Step, plan_failover};
