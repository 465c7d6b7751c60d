//! Pairing: a one-time code, read from one screen and typed on the other, turns two unknown keys into two pinned ones.
//!
//! Both sides prove that they know the code with a keyed hash over their role, the TLS exporter and both keys. Someone in the
//! middle has two TLS sessions with two exporters, so a proof passed on proves nothing.
//!
//! **The dialler proves first.** Whoever proves first shows the other side something to test guesses of the code against. With 80
//! bits and ten minutes that is worth nothing either way; but if the listener went first, anybody who can reach the port would be
//! shown it without spending one of the five attempts, while a dialler shows it only to the one address that its operator typed.

use crate::link::peers::Peer;
use crate::model::{Code, Digest, Fault, Res};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Thirty-two symbols that are told apart when read aloud and typed: no I, L, O and U.
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
/// Symbols of a code; five bits each.
const SYMBOLS: usize = 16;
/// The longest life of a code.
const LASTS_MAX: Duration = Duration::from_secs(600);
/// So many wrong attempts close the window.
const WRONG_MAX: u32 = 5;
/// Keeps this use of blake3 apart from every other.
const CONTEXT: &str = "doublure pairing code, version 1";
/// The label of the TLS exporter.
pub(in crate::link) const EXPORTER: &[u8] = b"EXPORTER-doublure-pair-1";

/// What is done with the new peer: it is written down. Fails when it could not be.
pub(in crate::link) type Done = Box<dyn FnOnce(Peer) -> Res<()> + Send>;

/// What both proofs are about: this TLS session and these two keys.
pub(in crate::link) struct Session {
    /// Exported keying material of the session.
    pub exporter: [u8; 32],
    /// The dialler's fingerprint.
    pub client: blake3::Hash,
    /// The listener's fingerprint.
    pub server: blake3::Hash,
}

/// A code, stretched to a key. Never the code itself, and no Debug.
pub(in crate::link) struct CodeKey([u8; 32]);

/// The role words have one length, so no two transcripts can be read two ways.
#[derive(Clone, Copy)]
pub(in crate::link) enum Prover {
    /// Who dials.
    Client,
    /// Who listens.
    Server,
}

impl CodeKey {
    /// Reads a code as a person types it: any case, blanks and dashes anywhere, I and L for 1, O for 0.
    ///
    /// Error: `BAD_ARGUMENT`, which does not repeat what was typed.
    pub fn read(typed: &str) -> Res<CodeKey> {
        let symbol = |c: char| match c.to_ascii_uppercase() {
            'I' | 'L' => '1',
            'O' => '0',
            other => other,
        };
        let code: String = typed.chars().filter(|c| !matches!(c, '-' | ' ')).take(SYMBOLS + 1).map(symbol).collect();
        if code.len() != SYMBOLS || !code.bytes().all(|b| ALPHABET.contains(&b)) {
            return Err(Fault::new(
                Code::BadArgument,
                "the pairing code",
                "it is not four groups of four letters and digits",
                "type it as the other host shows it, XXXX-XXXX-XXXX-XXXX",
            ));
        }
        Ok(CodeKey(blake3::derive_key(CONTEXT, code.as_bytes())))
    }

    /// The proof of one side in one session.
    pub fn proof(&self, prover: Prover, session: &Session) -> blake3::Hash {
        let role = match prover {
            Prover::Client => b"client",
            Prover::Server => b"server",
        };
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(role).update(&session.exporter).update(session.client.as_bytes()).update(session.server.as_bytes());
        hasher.finalize()
    }

    /// Whether this is that side's proof; compared in constant time (blake3's own equality).
    pub fn proves(&self, prover: Prover, session: &Session, proof: Digest) -> bool {
        self.proof(prover, session) == blake3::Hash::from_bytes(proof.0)
    }
}

/// The pairing window of this host: at most one, usually none.
pub(in crate::link) struct Pairing(Mutex<Option<Window>>);

struct Window {
    key: CodeKey,
    until: Instant,
    wrong: u32,
    done: Done,
}

impl Pairing {
    /// No window.
    pub fn new() -> Pairing {
        Pairing(Mutex::new(None))
    }

    /// Opens a window and gives its code; an older window and its code are gone.
    pub fn open(&self, lasts: Duration, done: Done) -> Res<String> {
        let mut random = [0; SYMBOLS];
        getrandom::fill(&mut random)
            .map_err(|error| Fault::internal("the kernel's random numbers", format!("none were given: {error}")))?;
        // 256 is a multiple of 32: the low five bits of a random byte are a fair choice.
        let symbols: Vec<char> = random.iter().map(|byte| char::from(ALPHABET[usize::from(byte & 31)])).collect();
        let code = symbols.chunks(4).map(String::from_iter).collect::<Vec<_>>().join("-");
        let until = Instant::now() + lasts.min(LASTS_MAX);
        *self.lock() = Some(Window { key: CodeKey::read(&code)?, until, wrong: 0, done });
        Ok(code)
    }

    /// Whether a stranger may try.
    pub fn is_open(&self) -> bool {
        open(&mut self.lock()).is_some()
    }

    /// Checks the dialler's proof. The right one uses the window up, whatever happens then: gives our own proof and what is to be
    /// done with the peer. A wrong one is counted, and the fifth closes the window. Error: `PAIRING_FAILED`.
    pub fn attempt(&self, session: &Session, proof: Digest) -> Res<(Digest, Done)> {
        let mut guard = self.lock();
        let Some(window) = open(&mut guard) else { return Err(closed()) };
        if !window.key.proves(Prover::Client, session, proof) {
            window.wrong += 1;
            if window.wrong >= WRONG_MAX {
                *guard = None;
            }
            return Err(wrong());
        }
        let window = guard.take().ok_or_else(closed)?;
        Ok((Digest(*window.key.proof(Prover::Server, session).as_bytes()), window.done))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Window>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The window, unless its time is over.
fn open<'w>(guard: &'w mut MutexGuard<'_, Option<Window>>) -> Option<&'w mut Window> {
    if guard.as_ref().is_some_and(|window| Instant::now() >= window.until) {
        **guard = None;
    }
    guard.as_mut()
}

/// Nobody waits for a code.
pub(in crate::link) fn closed() -> Fault {
    Fault::new(
        Code::PairingFailed,
        "pairing",
        "the other host has no pairing window open (its code was used, is too old, or was tried wrong too often)",
        "run `doublure pair` there for a new code",
    )
}

/// The proof does not fit the code.
pub(in crate::link) fn wrong() -> Fault {
    Fault::new(
        Code::PairingFailed,
        "pairing",
        "the code is wrong",
        "type it again, exactly as the other host shows it; five wrong attempts close its window",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(byte: u8) -> Session {
        Session { exporter: [byte; 32], client: blake3::hash(b"client"), server: blake3::hash(b"server") }
    }

    fn proof(code: &str, session: &Session) -> Digest {
        Digest(*CodeKey::read(code).unwrap().proof(Prover::Client, session).as_bytes())
    }

    fn opened(pairing: &Pairing, lasts: Duration) -> String {
        pairing.open(lasts, Box::new(|_| Ok(()))).unwrap()
    }

    #[test]
    fn a_code_looks_as_promised_and_is_read_as_people_type_it() {
        let code = opened(&Pairing::new(), LASTS_MAX);
        let groups: Vec<&str> = code.split('-').collect();
        assert_eq!(groups.len(), 4);
        assert!(groups.iter().all(|group| group.len() == 4 && group.bytes().all(|b| ALPHABET.contains(&b))), "{code}");
        assert_ne!(code, opened(&Pairing::new(), LASTS_MAX));
        let key = |typed: &str| CodeKey::read(typed).unwrap().0;
        assert_eq!(key("0123-4567-89AB-CDEF"), key(" o l23 4567-89ab cdef"));
        for bad in ["", "0123-4567-89AB-CDE", "0123-4567-89AB-CDEFG", "0123-4567-89AB-CDE!", "0123-4567-89AB-CDÉF"] {
            let fault = CodeKey::read(bad).err().unwrap();
            assert_eq!(fault.code, Code::BadArgument);
            assert!(!fault.to_string().contains("4567"), "an error must not repeat the code");
        }
    }

    #[test]
    fn the_right_proof_works_once() {
        let pairing = Pairing::new();
        let code = opened(&pairing, LASTS_MAX);
        let session = session(1);
        let (ours, _) = pairing.attempt(&session, proof(&code, &session)).unwrap();
        let key = CodeKey::read(&code).unwrap();
        assert!(key.proves(Prover::Server, &session, ours));
        assert!(!key.proves(Prover::Client, &session, ours), "a proof cannot be sent back as one's own");
        assert!(!pairing.is_open());
        assert_eq!(pairing.attempt(&session, proof(&code, &session)).err().unwrap().code, Code::PairingFailed);
    }

    #[test]
    fn a_proof_counts_only_in_its_own_session_between_its_own_keys() {
        let pairing = Pairing::new();
        let code = opened(&pairing, LASTS_MAX);
        let mine = session(1);
        let relayed = proof(&code, &session(2));
        assert!(pairing.attempt(&mine, relayed).is_err());
        let other_key = Session { client: blake3::hash(b"mallory"), ..session(1) };
        assert!(pairing.attempt(&mine, proof(&code, &other_key)).is_err());
        let other_server = Session { server: blake3::hash(b"mallory"), ..session(1) };
        assert!(pairing.attempt(&mine, proof(&code, &other_server)).is_err());
        assert!(pairing.attempt(&mine, proof(&code, &mine)).is_ok());
    }

    #[test]
    fn four_wrong_attempts_are_forgiven_and_the_fifth_closes() {
        for (tries, works) in [(4, true), (5, false)] {
            let pairing = Pairing::new();
            let code = opened(&pairing, LASTS_MAX);
            let session = session(1);
            for _ in 0..tries {
                assert!(pairing.attempt(&session, Digest([9; 32])).is_err());
            }
            assert_eq!(pairing.is_open(), works);
            assert_eq!(pairing.attempt(&session, proof(&code, &session)).is_ok(), works);
        }
    }

    #[test]
    fn a_window_ends_with_its_time_and_with_the_next_one() {
        let pairing = Pairing::new();
        let session = session(1);
        let code = opened(&pairing, Duration::ZERO);
        assert!(!pairing.is_open());
        assert!(pairing.attempt(&session, proof(&code, &session)).is_err());
        let old = opened(&pairing, LASTS_MAX);
        let new = opened(&pairing, Duration::MAX);
        assert!(pairing.attempt(&session, proof(&old, &session)).is_err());
        assert!(pairing.attempt(&session, proof(&new, &session)).is_ok());
    }
}
