//! Every connection of this host: those it accepts, those it makes, and pairing in both directions.

use crate::link::channel::{Channel, gone};
use crate::link::key::HostKey;
use crate::link::note::{self, Note};
use crate::link::pace::Pace;
use crate::link::pairing::{self, CodeKey, Pairing, Prover, Session};
use crate::link::peers::{Peer, Pins, check_address};
use crate::link::socket::{self, Socket};
use crate::link::tls;
use crate::model::{Code, Digest, Fault, Res, check_name};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_rustls::rustls::{AlertDescription, CertificateError, Error as TlsError, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

/// A handshake, the first note included, may take so long.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// So many connections may be on their way through it at once; the next is closed unheard.
const STRANGERS_MAX: usize = 64;
/// So many authenticated connections are served at once; a peer that opens more gets nothing but a closed one.
const SERVED_MAX: usize = 256;
/// The kernel's stack does not tell why `accept` failed for want of descriptors, and it fails again at once: wait.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Runs every connection of this host. Dropping it stops the listeners; channels live on.
pub struct Link {
    inner: Arc<Inner>,
    listeners: Mutex<Vec<tokio::task::AbortHandle>>,
}

type Serve = Arc<dyn Fn(Channel) + Send + Sync>;

struct Inner {
    runtime: tokio::runtime::Handle,
    host: String,
    key: HostKey,
    pins: Arc<Pins>,
    pairing: Arc<Pairing>,
    pace: Arc<Pace>,
    server: Arc<ServerConfig>,
    strangers: Arc<Semaphore>,
    served: Arc<Semaphore>,
}

impl Link {
    /// A link with this host's key; peers are added as they are paired.
    ///
    /// Error: `BAD_ARGUMENT` for a host or peer that cannot be one.
    pub fn new(runtime: tokio::runtime::Handle, key: HostKey, host: &str, peers: Vec<Peer>) -> Res<Arc<Link>> {
        check_name("host", host)?;
        let (pins, pairing) = (Arc::new(Pins::new(peers)?), Arc::new(Pairing::new()));
        let server = tls::server(&key, pins.clone(), pairing.clone())?;
        let inner = Inner {
            runtime,
            host: host.to_string(),
            key,
            pins,
            pairing,
            pace: Arc::new(Pace::new()),
            server,
            strangers: Arc::new(Semaphore::new(STRANGERS_MAX)),
            served: Arc::new(Semaphore::new(SERVED_MAX)),
        };
        Ok(Arc::new(Link { inner: Arc::new(inner), listeners: Mutex::new(Vec::new()) }))
    }

    /// Listens; each authenticated connection is handed to `serve` on a thread of its own. Gives the address that is really
    /// listened on (a port of 0 is chosen by the kernel).
    ///
    /// Errors: `BAD_ARGUMENT` for an address that is none, `IO_ERROR` when it cannot be had.
    pub fn listen(self: &Arc<Self>, address: &str, serve: Arc<dyn Fn(Channel) + Send + Sync>) -> Res<SocketAddr> {
        let wanted: SocketAddr = address.parse().map_err(|_| {
            let thing = format!("listen address {:?}", address.chars().take(80).collect::<String>());
            Fault::new(Code::BadArgument, thing, "it is not a numeric address with a port", "write it as 10.0.0.1:7420")
        })?;
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::AddrInUse => Fault::new(
                Code::IoError,
                format!("listen address {wanted}"),
                "another program listens there already",
                "stop it (`ss -ltnp` names it) or choose another port for `listen`",
            ),
            io::ErrorKind::AddrNotAvailable => Fault::new(
                Code::IoError,
                format!("listen address {wanted}"),
                "this host does not have that address",
                "set `listen` to an address that `ip address` shows",
            ),
            _ => Fault::io(format!("listen address {wanted}"), &error),
        };
        let listener = std::net::TcpListener::bind(wanted).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        let listener = {
            let _runtime = self.inner.runtime.enter();
            TcpListener::from_std(listener).map_err(failed)?
        };
        let accepting = self.inner.runtime.spawn(accept_all(self.inner.clone(), listener, serve));
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner).push(accepting.abort_handle());
        Ok(bound)
    }

    /// Connects to a paired peer, and returns once it has welcomed us.
    ///
    /// Errors: `PEER_UNREACHABLE`, `PEER_NOT_TRUSTED`, `VERSION_MISMATCH`, `PROTOCOL_ERROR`.
    pub fn connect(&self, peer: &str, patience: Duration) -> Res<Channel> {
        let found = self.inner.pins.by_name(peer).ok_or_else(|| {
            let thing = format!("peer {:?}", peer.chars().take(80).collect::<String>());
            Fault::new(Code::PeerNotTrusted, thing, "this host is not paired with it", "pair the two hosts with `doublure pair`")
        })?;
        let inner = self.inner.clone();
        self.inner.wait(async move {
            let name = found.name.clone();
            match timeout(patience, inner.connect(found)).await {
                Ok(channel) => channel,
                Err(_) => Err(gone(&name, "it did not answer in time")),
            }
        })
    }

    /// Caps what this host sends, bytes a second; `None` = no cap. Takes effect at once, for all connections together.
    pub fn set_bandwidth(&self, bytes_per_second: Option<u64>) {
        self.inner.pace.set(bytes_per_second);
    }

    /// The paired peers.
    pub fn peers(&self) -> Vec<Peer> {
        self.inner.pins.all()
    }

    /// Opens a pairing window: gives the one-time code; `done` is called with the new peer when it was used.
    ///
    /// The window closes after `lasts` (at most ten minutes), after its first right use, after five wrong ones, and when another
    /// is opened. When `done` fails the dialler is told so and nothing is pinned.
    pub fn open_pairing(&self, lasts: Duration, done: Box<dyn FnOnce(Peer) -> Res<()> + Send>) -> Res<String> {
        self.inner.pairing.open(lasts, done)
    }

    /// Pairs with a host that has a window open; `own_address` is where we listen (empty: nowhere). The new peer is pinned on
    /// both sides, under the address given here, which has just been shown to work.
    ///
    /// The other host keeps us first. Should its answer be lost, it knows us and we do not know it: pair again with a new code.
    /// Errors: `BAD_ARGUMENT`, `PEER_UNREACHABLE`, `PAIRING_FAILED`, `VERSION_MISMATCH`, `PROTOCOL_ERROR`.
    pub fn pair(&self, address: &str, code: &str, own_address: &str, patience: Duration) -> Res<Peer> {
        check_address(address)?;
        check_address(own_address)?;
        if address.is_empty() {
            return Err(Fault::new(Code::BadArgument, "the other host's address", "it is empty", "write it as 10.0.0.2:7420"));
        }
        let code = CodeKey::read(code)?;
        let (inner, address, own_address) = (self.inner.clone(), address.to_string(), own_address.to_string());
        self.inner.wait(async move {
            match timeout(patience, inner.pair(&address, code, own_address)).await {
                Ok(peer) => peer,
                Err(_) => Err(gone(&address, "it did not answer in time")),
            }
        })
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let listeners = std::mem::take(&mut *self.listeners.lock().unwrap_or_else(PoisonError::into_inner));
        listeners.iter().for_each(tokio::task::AbortHandle::abort);
    }
}

/// Accepts for ever. Nothing that one connection does or sends can end this.
async fn accept_all(inner: Arc<Inner>, listener: TcpListener, serve: Serve) {
    loop {
        match listener.accept().await {
            Ok((tcp, from)) => match inner.strangers.clone().try_acquire_owned() {
                Ok(permit) => drop(tokio::spawn(inner.clone().receive(tcp, from, permit, serve.clone()))),
                Err(_) => tracing::warn!(%from, "closed unheard: {STRANGERS_MAX} connections are in their handshake already"),
            },
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// What a connection turned out to be.
enum Arrival {
    /// A pinned peer.
    Known(TlsStream<Socket>, Peer),
    /// Somebody who wants to pair: its proof, what it says of itself, and the session that the proof is about.
    Pairing { tls: TlsStream<Socket>, session: Session, proof: Digest, peer: Peer },
}

impl Inner {
    /// Runs `future` on the runtime and blocks this thread until it is done.
    fn wait<T: Send + 'static>(&self, future: impl Future<Output = Res<T>> + Send + 'static) -> Res<T> {
        let (done, answer) = std::sync::mpsc::sync_channel(1);
        self.runtime.spawn(async move { drop(done.send(future.await)) });
        answer.recv().unwrap_or_else(|_| Err(Fault::internal("the network runtime", "it has stopped")))
    }

    /// One accepted connection, up to the moment it is served or closed.
    async fn receive(self: Arc<Self>, tcp: TcpStream, from: SocketAddr, permit: OwnedSemaphorePermit, serve: Serve) {
        let arrival = match timeout(HANDSHAKE, self.greet(tcp, from)).await {
            Ok(Ok(arrival)) => arrival,
            Ok(Err(fault)) => return tracing::warn!(%from, "refused a connection: {fault}"),
            Err(_) => return tracing::warn!(%from, "closed a connection that took longer than 5 s to introduce itself"),
        };
        match arrival {
            Arrival::Pairing { tls, session, proof, peer } => {
                let name = peer.name.clone();
                match self.finish_pairing(tls, &session, proof, peer).await {
                    Ok(()) => tracing::info!(%from, peer = name, "paired"),
                    Err(fault) => tracing::warn!(%from, "a pairing failed: {fault}"),
                }
            }
            Arrival::Known(tls, peer) => {
                drop(permit);
                self.serve(tls, peer, serve);
            }
        }
    }

    /// Hands a proven connection to a thread of its own.
    fn serve(&self, tls: TlsStream<Socket>, peer: Peer, serve: Serve) {
        let Ok(place) = self.served.clone().try_acquire_owned() else {
            return tracing::warn!(peer = peer.name, "closed a connection: {SERVED_MAX} are served already");
        };
        let thread = std::thread::Builder::new().name(format!("serve {}", peer.name));
        let channel = Channel::start(&self.runtime, tls, peer.name, self.pace.clone());
        let run = move || {
            serve(channel);
            drop(place);
        };
        if let Err(error) = thread.spawn(run) {
            tracing::warn!(%error, "closed a connection: there is no thread to serve it");
        }
    }

    /// TLS, then the first note: welcome, or why not. A pairing also says its proof here.
    async fn greet(&self, tcp: TcpStream, from: SocketAddr) -> Res<Arrival> {
        let lost = |error: io::Error| handshake_fault(&from.to_string(), &error);
        socket::tune(&tcp).map_err(lost)?;
        let accepted = TlsAcceptor::from(self.server.clone()).accept(Socket::new(tcp)).await.map_err(lost)?;
        let mut tls = TlsStream::Server(accepted);
        let theirs = their_key(&tls)?;
        let fingerprint = theirs.to_hex().to_string();
        if tls.get_ref().1.alpn_protocol() == Some(tls::ALPN_PAIR) {
            if !self.pairing.is_open() {
                return Err(refuse(&mut tls, pairing::closed()).await);
            }
            note::write(&mut tls, &Note::Welcome {}).await.map_err(lost)?;
            let Note::Prove { proof, name, address } = note::read(&mut tls).await.map_err(lost)?? else {
                return Err(refuse(&mut tls, note::out_of_turn()).await);
            };
            let session = Session { exporter: exporter(&tls)?, client: theirs, server: self.own_key()? };
            let peer = Peer { name, address: reachable(&address, from.ip()), fingerprint };
            return Ok(Arrival::Pairing { tls, session, proof, peer });
        }
        // Only now is it known that a key let in by an open window did not come to pair.
        let known = self.pins.by_fingerprint(&fingerprint).filter(|_| tls.get_ref().1.alpn_protocol() == Some(&tls::alpn()));
        match known {
            Some(peer) => {
                note::write(&mut tls, &Note::Welcome {}).await.map_err(lost)?;
                Ok(Arrival::Known(tls, peer))
            }
            None => Err(refuse(&mut tls, note::stranger()).await),
        }
    }

    /// The listener's half of a pairing, from the dialler's proof on.
    ///
    /// 1. The proof is checked: from here on the code is used up. 2. `done` writes the peer down. 3. It is pinned. 4. It is told.
    async fn finish_pairing(&self, mut tls: TlsStream<Socket>, session: &Session, proof: Digest, peer: Peer) -> Res<()> {
        // Before the proof is looked at: what cannot be a peer at all shall not use the code up.
        let fit = match () {
            () if session.client == session.server => Err(itself()),
            () if peer.name == self.host => Err(namesake(&peer.name)),
            () => check_name("host", &peer.name).and_then(|()| check_address(&peer.address)),
        };
        let kept = match fit.and_then(|()| self.pairing.attempt(session, proof)) {
            Err(fault) => Err(fault),
            Ok((answer, done)) => {
                let new = peer.clone();
                let done = tokio::task::spawn_blocking(move || done(new)).await;
                done.unwrap_or_else(|_| Err(Fault::internal("pairing", "writing the new peer down panicked"))).map(|()| answer)
            }
        };
        match kept {
            Err(fault) => Err(in_time(refuse(&mut tls, fault)).await?),
            Ok(answer) => {
                self.pins.pin(peer);
                let paired = Note::Paired { proof: answer, name: self.host.clone() };
                let told = in_time(note::write(&mut tls, &paired)).await?;
                told.map_err(|error| {
                    Fault::new(
                        Code::PairingFailed,
                        "pairing",
                        format!("its last answer was lost: {error}"),
                        "pair again with a new code",
                    )
                })?;
                in_time(tls.shutdown()).await?.ok();
                Ok(())
            }
        }
    }

    /// The dialler's half of a connection.
    async fn connect(&self, peer: Peer) -> Res<Channel> {
        if peer.address.is_empty() {
            return Err(gone(&peer.name, "it had no address to listen on when it was paired"));
        }
        let config = tls::client(&self.key, Some(peer.fingerprint.clone()), tls::alpn())?;
        let tcp = TcpStream::connect(&peer.address)
            .await
            .map_err(|error| gone(&peer.name, format!("no connection to {}: {error}", peer.address)))?;
        let greeted = timeout(HANDSHAKE, async {
            let mut tls = dial(tcp, config).await?;
            let note = note::read(&mut tls).await?;
            io::Result::Ok((tls, note))
        });
        let (tls, note) = match greeted.await {
            Ok(greeted) => greeted.map_err(|error| handshake_fault(&peer.name, &error))?,
            Err(_) => return Err(gone(&peer.name, "it did not introduce itself within 5 s")),
        };
        match note? {
            Note::Welcome {} => Ok(Channel::start(&self.runtime, tls, peer.name, self.pace.clone())),
            Note::Refused { fault } => Err(fault),
            _ => Err(note::out_of_turn()),
        }
    }

    /// The dialler's half of a pairing. Until the listener's proof is checked, nothing it says is believed or shown unfiltered.
    async fn pair(&self, address: &str, code: CodeKey, own_address: String) -> Res<Peer> {
        let lost = |error: io::Error| match handshake_fault(address, &error) {
            // The key of a stranger is refused in the handshake already when no window is open.
            fault if fault.code == Code::PeerNotTrusted => pairing::closed(),
            fault => fault,
        };
        let config = tls::client(&self.key, None, tls::ALPN_PAIR.to_vec())?;
        let tcp = TcpStream::connect(address).await.map_err(|error| gone(address, format!("no connection: {error}")))?;
        let mut tls = match timeout(HANDSHAKE, dial(tcp, config)).await {
            Ok(tls) => tls.map_err(lost)?,
            Err(_) => return Err(gone(address, "it did not introduce itself within 5 s")),
        };
        match note::read(&mut tls).await.map_err(lost)?? {
            Note::Welcome {} => {}
            Note::Refused { fault } => return Err(unpaired(fault)),
            _ => return Err(note::out_of_turn()),
        }
        let session = Session { exporter: exporter(&tls)?, client: self.own_key()?, server: their_key(&tls)? };
        if session.client == session.server {
            return Err(itself());
        }
        let proof = Digest(*code.proof(Prover::Client, &session).as_bytes());
        let prove = Note::Prove { proof, name: self.host.clone(), address: own_address };
        note::write(&mut tls, &prove).await.map_err(lost)?;
        let (proof, name) = match note::read(&mut tls).await.map_err(lost)?? {
            Note::Paired { proof, name } => (proof, name),
            Note::Refused { fault } => return Err(unpaired(fault)),
            _ => return Err(note::out_of_turn()),
        };
        if !code.proves(Prover::Server, &session, proof) {
            return Err(Fault::new(
                Code::PairingFailed,
                format!("the host at {address}"),
                "it does not know the code that it was to show",
                "see that the address is the right one and that nobody sits in between, then run `doublure pair` there again",
            ));
        }
        check_name("host", &name).map_err(unpaired)?;
        if name == self.host {
            return Err(namesake(&name));
        }
        let peer = Peer { name, address: address.to_string(), fingerprint: session.server.to_hex().to_string() };
        self.pins.pin(peer.clone());
        tls.shutdown().await.ok();
        Ok(peer)
    }

    fn own_key(&self) -> Res<blake3::Hash> {
        blake3::Hash::from_hex(self.key.fingerprint())
            .map_err(|error| Fault::internal("this host's fingerprint", error.to_string()))
    }
}

/// TLS towards a listener.
pub(in crate::link) async fn dial(
    tcp: TcpStream,
    config: Arc<tokio_rustls::rustls::ClientConfig>,
) -> io::Result<TlsStream<Socket>> {
    socket::tune(&tcp)?;
    let tls = TlsConnector::from(config).connect(tls::server_name(), Socket::new(tcp)).await?;
    Ok(TlsStream::Client(tls))
}

/// Says why not, closes, and gives the reason back.
async fn refuse(tls: &mut TlsStream<Socket>, fault: Fault) -> Fault {
    let said = note::write(tls, &Note::Refused { fault: note::tidy(fault.clone()) }).await;
    if said.is_ok() {
        tls.shutdown().await.ok();
    }
    fault
}

/// Saying the last word of a pairing must not keep the connection for ever.
async fn in_time<T>(said: impl Future<Output = T>) -> Res<T> {
    timeout(HANDSHAKE, said).await.map_err(|_| {
        Fault::new(Code::PairingFailed, "pairing", "the other host does not take its answer", "pair again with a new code")
    })
}

/// The key that the other side has proven.
fn their_key(tls: &TlsStream<Socket>) -> Res<blake3::Hash> {
    let certificate = tls.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let certificate = certificate.ok_or_else(|| Fault::protocol("a TLS session without a certificate"))?;
    tls::fingerprint(certificate).map_err(|_| Fault::protocol("a certificate that cannot be read"))
}

/// 32 bytes that only the two ends of this very session know.
fn exporter(tls: &TlsStream<Socket>) -> Res<[u8; 32]> {
    let exported = match tls {
        TlsStream::Client(tls) => tls.get_ref().1.export_keying_material([0; 32], pairing::EXPORTER, None),
        TlsStream::Server(tls) => tls.get_ref().1.export_keying_material([0; 32], pairing::EXPORTER, None),
    };
    exported.map_err(|error| Fault::internal("the TLS exporter", error.to_string()))
}

/// Where a host that says it listens on `address` is reached from here: one that listens on every address of its own cannot say
/// which of them leads to it, but we see the one that it came from.
fn reachable(address: &str, from: IpAddr) -> String {
    match address.parse::<SocketAddr>() {
        Ok(own) if own.ip().is_unspecified() => SocketAddr::new(from.to_canonical(), own.port()).to_string(),
        _ => address.to_string(),
    }
}

/// What a failed handshake with `peer` means.
fn handshake_fault(peer: &str, error: &io::Error) -> Fault {
    let thing = || format!("peer {peer}");
    match error.get_ref().and_then(|inner| inner.downcast_ref::<TlsError>()) {
        Some(TlsError::AlertReceived(AlertDescription::NoApplicationProtocol) | TlsError::NoApplicationProtocol) => Fault::new(
            Code::VersionMismatch,
            thing(),
            "it speaks another version of the protocol",
            "install the same version of doublure on both hosts",
        ),
        Some(TlsError::InvalidCertificate(CertificateError::ApplicationVerificationFailure)) => Fault::new(
            Code::PeerNotTrusted,
            thing(),
            "its key is not the one that was paired",
            "if it was reinstalled, pair the two hosts again; if not, somebody else answers at its address",
        ),
        Some(TlsError::AlertReceived(AlertDescription::AccessDenied)) => note::stranger(),
        Some(other) => Fault::new(
            Code::ProtocolError,
            thing(),
            format!("it does not speak as a doublure agent does ({other})"),
            "see that the address and port are those of its agent",
        ),
        None => gone(peer, format!("the connection was lost: {error}")),
    }
}

/// What the other side said instead of pairing. Its own code must not become ours: it is a stranger yet.
fn unpaired(fault: Fault) -> Fault {
    match fault.code {
        Code::PairingFailed => fault,
        _ => {
            let cause = format!("the other host could not do it ({}: {})", fault.thing, fault.cause);
            Fault::new(Code::PairingFailed, "pairing", cause, "see its log, then run `doublure pair` there for a new code")
        }
    }
}

fn itself() -> Fault {
    Fault::new(
        Code::PairingFailed,
        "pairing",
        "both ends are the same host, or hold a copy of one key",
        "give the address of another host",
    )
}

fn namesake(name: &str) -> Fault {
    Fault::new(
        Code::PairingFailed,
        "pairing",
        format!("both hosts call themselves {name}"),
        "give one of them another `host` name",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_listens_everywhere_is_known_by_where_it_came_from() {
        let from = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(reachable("0.0.0.0:7420", from("10.1.2.3")), "10.1.2.3:7420");
        assert_eq!(reachable("[::]:7420", from("::ffff:10.1.2.3")), "10.1.2.3:7420");
        assert_eq!(reachable("[::]:7420", from("fd00::2")), "[fd00::2]:7420");
        assert_eq!(reachable("10.9.9.9:1", from("10.1.2.3")), "10.9.9.9:1");
        assert_eq!(reachable("", from("10.1.2.3")), "");
    }
}
