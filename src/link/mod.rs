//! Owns the socket between two hosts: keys, TLS 1.3, frames in and out, pairing.
//! Gives a blocking channel of messages to a peer whose pinned key was proven.
//! Keeps memory per connection bounded before and after authentication, and the sending rate under the cap.
//! Never interprets a message, never accepts an unpinned key except in an open pairing window, and then only to pair.
//! Assumes ring and rustls are right.

use crate::format::Message;
use crate::model::Res;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// This host's key and certificate. No Debug on purpose.
pub struct HostKey { _p: () }

impl HostKey {
    /// Loads `key.der` and `cert.der` from a private directory, or makes them (0600).
    pub fn load_or_make(_dir: &Path, _host: &str) -> Res<HostKey> { todo!() }
    /// blake3 of the public key info, hexadecimal.
    pub fn fingerprint(&self) -> String { todo!() }
}

/// A paired peer.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Peer {
    /// Its host name.
    pub name: String,
    /// Where it listens, `address:port`.
    pub address: String,
    /// Its key's fingerprint.
    pub fingerprint: String,
}

/// Runs every connection of this host.
pub struct Link { _p: () }

/// An authenticated connection; `send` and `recv` block their thread, so never call them on the runtime.
pub struct Channel { _p: () }

impl Channel {
    /// The proven peer's name.
    pub fn peer(&self) -> &str { todo!() }
    /// Queues a message; blocks while more than a few MiB wait to be sent.
    pub fn send(&self, _message: &Message) -> Res<()> { todo!() }
    /// The next message; `None` when `patience` has passed. `PEER_UNREACHABLE` once the connection is gone.
    pub fn recv(&mut self, _patience: Duration) -> Res<Option<Message>> { todo!() }
    /// Payload bytes sent and received so far, as framed (before TLS).
    pub fn bytes(&self) -> (u64, u64) { todo!() }
}

impl Link {
    /// A link with this host's key; peers are added as they are paired.
    pub fn new(_runtime: tokio::runtime::Handle, _key: HostKey, _host: &str, _peers: Vec<Peer>) -> Res<Arc<Link>> { todo!() }
    /// Listens; each authenticated connection is handed to `serve` on a thread of its own.
    pub fn listen(self: &Arc<Self>, _address: &str, _serve: Arc<dyn Fn(Channel) + Send + Sync>) -> Res<std::net::SocketAddr> { todo!() }
    /// Connects to a paired peer. `PEER_UNREACHABLE`, `PEER_NOT_TRUSTED`, `VERSION_MISMATCH`.
    pub fn connect(&self, _peer: &str, _patience: Duration) -> Res<Channel> { todo!() }
    /// Caps what this host sends, bytes a second; `None` = no cap. Takes effect at once.
    pub fn set_bandwidth(&self, _bytes_per_second: Option<u64>) { todo!() }
    /// The paired peers.
    pub fn peers(&self) -> Vec<Peer> { todo!() }
    /// Opens a pairing window: gives the one-time code; `done` is called with the new peer when it was used.
    pub fn open_pairing(&self, _lasts: Duration, _done: Box<dyn FnOnce(Peer) -> Res<()> + Send>) -> Res<String> { todo!() }
    /// Pairs with a host that has a window open; `own_address` is where we listen. The new peer is pinned on both sides.
    pub fn pair(&self, _address: &str, _code: &str, _own_address: &str, _patience: Duration) -> Res<Peer> { todo!() }
}
