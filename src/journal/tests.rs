//! The room's own tests.
