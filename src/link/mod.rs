//! Owns the socket between two hosts: keys, TLS 1.3, frames in and out, pairing.
//! Gives a blocking channel of messages to a peer whose pinned key was proven.
//! Keeps memory per connection bounded before and after authentication, and the sending rate under the cap.
//! Never interprets a message, never accepts an unpinned key except in an open pairing window, and then only to pair.
//! Assumes ring and rustls are right, and the notes headed L in `kernel-notes.md`.
//!
//! A connection's life: TCP, TLS 1.3 with both keys proven, one note from the listener that says *welcome* or why not,
//! then frames both ways until either side lets go of its [`Channel`].

mod channel;
mod hub;
mod key;
mod note;
mod pace;
mod pairing;
mod peers;
mod socket;
mod tls;

pub use channel::{Bell, Channel};
pub use hub::Link;
pub use key::HostKey;
pub use peers::Peer;

#[cfg(test)]
mod tests;
