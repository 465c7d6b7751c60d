//! The peers whose keys are pinned.

use crate::model::{Code, Fault, Res, check_name};
use std::sync::{PoisonError, RwLock};

/// A paired peer.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Peer {
    /// Its host name.
    pub name: String,
    /// Where it listens, `address:port`; empty when it does not.
    pub address: String,
    /// Its key's fingerprint.
    pub fingerprint: String,
}

/// The pinned set. Changed while connections come and go; every handshake looks anew.
pub(in crate::link) struct Pins(RwLock<Vec<Peer>>);

impl Pins {
    /// A set of these peers. `BAD_ARGUMENT` for a name, address or fingerprint that cannot be one.
    pub fn new(peers: Vec<Peer>) -> Res<Pins> {
        peers.iter().try_for_each(check)?;
        let pins = Pins(RwLock::new(Vec::with_capacity(peers.len())));
        peers.into_iter().for_each(|peer| pins.pin(peer));
        Ok(pins)
    }

    /// Pins a peer. Whoever had its name or its key before is replaced: a host that was reinstalled has a new key, a host that
    /// was renamed has a new name, and each shall be in the set once.
    pub fn pin(&self, peer: Peer) {
        let mut peers = self.0.write().unwrap_or_else(PoisonError::into_inner);
        peers.retain(|old| old.name != peer.name && old.fingerprint != peer.fingerprint);
        peers.push(peer);
    }

    /// The peer with this key.
    pub fn by_fingerprint(&self, fingerprint: &str) -> Option<Peer> {
        self.find(|peer| peer.fingerprint == fingerprint)
    }

    /// The peer of this name.
    pub fn by_name(&self, name: &str) -> Option<Peer> {
        self.find(|peer| peer.name == name)
    }

    /// All of them.
    pub fn all(&self) -> Vec<Peer> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn find(&self, wanted: impl Fn(&&Peer) -> bool) -> Option<Peer> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).iter().find(wanted).cloned()
    }
}

fn check(peer: &Peer) -> Res<()> {
    check_name("peer", &peer.name)?;
    check_address(&peer.address)?;
    let hexadecimal = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
    match peer.fingerprint.len() == 64 && peer.fingerprint.bytes().all(hexadecimal) {
        true => Ok(()),
        false => Err(Fault::new(
            Code::BadArgument,
            format!("peer {}", peer.name),
            "its fingerprint is not 64 lower-case hexadecimal digits",
            "pair with it again",
        )),
    }
}

/// Accepts `host:port` or `[v6]:port`, or nothing at all for a host that does not listen.
pub(in crate::link) fn check_address(address: &str) -> Res<()> {
    let fine = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b':' | b'-' | b'_' | b'[' | b']' | b'%');
    let port = address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    match address.is_empty() || (port && address.len() <= 255 && address.bytes().all(fine)) {
        true => Ok(()),
        false => Err(Fault::new(
            Code::BadArgument,
            format!("address {:?}", address.chars().take(80).collect::<String>()),
            "it is not address:port",
            "write it as 10.0.0.2:7420, [fd00::2]:7420 or host.example:7420",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(name: &str, digit: char) -> Peer {
        Peer { name: name.into(), address: "10.0.0.1:7420".into(), fingerprint: digit.to_string().repeat(64) }
    }

    #[test]
    fn a_name_and_a_key_stand_in_the_set_once() {
        let pins = Pins::new(vec![peer("a", '1'), peer("b", '2')]).unwrap();
        pins.pin(peer("a", '3'));
        assert_eq!(pins.by_fingerprint(&"1".repeat(64)), None, "the key of the reinstalled host counts no more");
        pins.pin(peer("c", '2'));
        assert_eq!(pins.by_name("b"), None);
        let names: Vec<_> = pins.all().into_iter().map(|p| p.name).collect();
        assert_eq!(names, ["a", "c"]);
    }

    #[test]
    fn what_cannot_be_a_peer_is_refused() {
        for bad in [
            Peer { name: "../x".into(), ..peer("a", '1') },
            Peer { fingerprint: "1".repeat(63), ..peer("a", '1') },
            Peer { fingerprint: "G".repeat(64), ..peer("a", '1') },
            Peer { fingerprint: "A".repeat(64), ..peer("a", '1') },
            Peer { address: "10.0.0.1".into(), ..peer("a", '1') },
            Peer { address: "x:70000".into(), ..peer("a", '1') },
            Peer { address: "x\n:7".into(), ..peer("a", '1') },
        ] {
            assert_eq!(Pins::new(vec![bad]).err().unwrap().code, Code::BadArgument);
        }
        for good in ["", "10.0.0.1:1", "[fe80::1%eth0]:7420", "standby.example:7420"] {
            assert!(check_address(good).is_ok(), "{good}");
        }
    }
}
