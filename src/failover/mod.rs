//! Owns the order of a failover: fence, finish the data, attach, check, volumes and containers, start, health, record.
//! Gives a report of every step with its time: changed, already so, failed or left out.
//! Keeps the fence first: no later step can be called without the value that only a durable higher epoch makes.
//! Never decides whether to promote (that is `role`), never starts a container on a volume that failed its check.
//! Assumes the group's lock is held, and that every step may have been carried out before, in whole or in part.

mod look;
mod mounted;
mod report;
mod run;

pub use look::look;
pub use report::{Outcome, Report, StepReport};
pub use run::{Stage, run};
