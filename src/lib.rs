//! doublure: block-level disaster recovery for Docker volumes. This page is the floor plan.
//!
//! The journey of one changed block, room by room:
//!
//! ```text
//! kernel -> tracker -> cut -> reader -> delta -> session/format/link ==> session -> journal -> apply -> replica
//! ```
//!
//! Four kinds of line, a room holds one kind: *quiet* rooms decide (no I/O, clock, thread or `unsafe`), *hands* touch
//! one outside thing, *stages* put hands in a fixed order, the *front* faces people and time. `tests/house.rs` holds
//! this plan as data and fails when a line stands in the wrong room.

// Quiet: words and deciders.
pub mod model;

pub mod config;
pub mod delta;
pub mod format;
pub mod role;
pub mod session;

// Hands: each touches one outside thing.
pub mod device;
pub mod docker;
pub mod durable;
pub mod host;
pub mod journal;
pub mod known;
pub mod ledger;
pub mod link;
pub mod tracker;

// Stages: a fixed order of hands.
pub mod apply;
pub mod cut;
pub mod failover;
pub mod reader;
pub mod verify;

// Front: people, threads, the clock.
pub mod agent;
pub mod cli;
pub mod control;
