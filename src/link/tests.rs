//! A channel with a peer that breaks every rule: what the public door cannot be made to do.

use crate::format::{FRAME_PAYLOAD_MAX, Message, PROTOCOL};
use crate::link::channel::{Channel, INBOX_BYTES, OUTBOX_BYTES};
use crate::link::hub::{Link, dial};
use crate::link::key::HostKey;
use crate::link::note::{self, Note};
use crate::link::pace::Pace;
use crate::link::pairing::Pairing;
use crate::link::peers::{Peer, Pins};
use crate::link::socket::Socket;
use crate::link::tls;
use crate::model::{Code, Fault, Res};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::runtime::Runtime;
use tokio_rustls::{TlsAcceptor, TlsStream};

const PATIENCE: Duration = Duration::from_secs(60);

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn key(name: &str) -> HostKey {
    HostKey::load_or_make(&tempfile::tempdir().unwrap().path().join("keys"), name).unwrap()
}

/// The crc of a frame, bit by bit: a second opinion, and the way to forge headers that pass it.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 })
    })
}

/// A header whose own crc is right, whatever else it says.
fn header(version: u16, kind: u16, payload_bytes: u32, payload_crc32: u32) -> Vec<u8> {
    let mut bytes = b"DBLR".to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend(kind.to_le_bytes());
    bytes.extend(payload_bytes.to_le_bytes());
    bytes.extend(payload_crc32.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(crc32(&bytes).to_le_bytes());
    bytes
}

fn frame(message: &Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    bytes
}

/// A channel over a pipe in memory whose other end is ours to abuse.
fn piped(runtime: &Runtime, buffer: usize) -> (Channel, DuplexStream) {
    let (near, far) = duplex(buffer);
    (Channel::over(runtime.handle(), near, "evil".into(), Arc::new(Pace::new())), far)
}

/// What `recv` ends with after the peer sent these bytes and closed.
fn after(bytes: &[u8]) -> Fault {
    let runtime = runtime();
    let (mut channel, mut far) = piped(&runtime, 64 << 10);
    let bytes = bytes.to_vec();
    runtime.spawn(async move {
        // It closes before all is taken when it has seen enough.
        let _ = far.write_all(&bytes).await;
    });
    loop {
        match channel.recv(PATIENCE) {
            Ok(message) => assert!(message.is_some(), "nothing arrives and nothing ends"),
            Err(fault) => {
                assert_eq!(channel.send(&Message::Ping).unwrap_err(), fault, "both directions end for one reason");
                return fault;
            }
        }
    }
}

#[test]
fn what_is_not_a_frame_ends_the_connection_with_its_own_code() {
    let good = frame(&Message::Chunks { bytes: vec![7; 1000] });
    let chunks_kind = u16::from_le_bytes([good[6], good[7]]);
    assert_eq!(header(PROTOCOL, chunks_kind, 1000, crc32(&[7; 1000])), good[..24], "the forger knows the format");

    let (max, over) = (FRAME_PAYLOAD_MAX as u32, FRAME_PAYLOAD_MAX as u32 + 1);
    assert_eq!(after(&header(PROTOCOL, chunks_kind, over, 0)).code, Code::ProtocolError);
    assert_eq!(after(&header(PROTOCOL, chunks_kind, u32::MAX, 0)).code, Code::ProtocolError);
    assert_eq!(after(&header(PROTOCOL + 1, chunks_kind, 0, 0)).code, Code::VersionMismatch);
    assert_eq!(after(&header(PROTOCOL, 0xffff, 0, 0)).code, Code::ProtocolError);
    assert_eq!(after(b"GET / HTTP/1.1\r\nHost: standby\r\n\r\n").code, Code::ProtocolError);
    assert_eq!(after(&[0; 4096]).code, Code::ProtocolError);
    // One bit turned anywhere in header or payload is seen.
    for at in [0, 5, 7, 9, 13, 17, 21, 24, 500, 1023] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        let code = after(&bad).code;
        assert!(matches!(code, Code::ProtocolError | Code::VersionMismatch), "byte {at}: {code:?}");
    }
    // Cut off in the middle is a lost connection, not nonsense; so is a promise of bytes that never come.
    for at in [1, 23, 24, 1023] {
        assert_eq!(after(&good[..at]).code, Code::PeerUnreachable, "cut at {at}");
    }
    assert_eq!(after(&header(PROTOCOL, chunks_kind, max, 0)).code, Code::PeerUnreachable);
    assert_eq!(after(b"").code, Code::PeerUnreachable);
}

#[test]
fn what_came_before_the_nonsense_is_still_given() {
    let runtime = runtime();
    let (mut channel, mut far) = piped(&runtime, 64 << 10);
    let mut bytes = frame(&Message::Ping);
    bytes.extend(frame(&Message::Credit { bytes: 5 }));
    bytes.extend([0; 24]);
    runtime.block_on(far.write_all(&bytes)).unwrap();
    assert_eq!(channel.recv(PATIENCE).unwrap(), Some(Message::Ping));
    assert_eq!(channel.recv(PATIENCE).unwrap(), Some(Message::Credit { bytes: 5 }));
    assert_eq!(channel.recv(PATIENCE).unwrap_err().code, Code::ProtocolError);
    // And the peer is let go: its end sees the close.
    let mut rest = Vec::new();
    runtime.block_on(far.read_to_end(&mut rest)).unwrap();
}

#[test]
fn a_peer_that_does_not_read_costs_bounded_memory_and_gets_all_in_the_end() {
    let runtime = runtime();
    const PIPE: usize = 64 << 10;
    const PAYLOAD: usize = 300_000;
    const COUNT: usize = 100;
    let (channel, mut far) = piped(&runtime, PIPE);
    let (sent, queued) = channel_of_counts();
    let sender = std::thread::spawn(move || {
        for number in 0..COUNT {
            channel.send(&Message::Chunks { bytes: vec![number as u8; PAYLOAD] }).unwrap();
            sent.send(()).unwrap();
        }
        channel
    });
    // What may be queued without anybody reading: two full buffers, a frame over in each, and the pipe.
    let bound = (2 * (OUTBOX_BYTES + PAYLOAD + 24) + PIPE) / PAYLOAD + 1;
    assert!(bound < COUNT);
    let least = OUTBOX_BYTES / PAYLOAD;
    (0..least).for_each(|_| queued.recv_timeout(PATIENCE).unwrap());
    let mut count = least;
    while queued.recv_timeout(Duration::from_millis(50)).is_ok() {
        count += 1;
        assert!(count <= bound, "{count} messages were queued for a peer that reads nothing, {bound} may be");
    }
    let mut all = vec![0; COUNT * (PAYLOAD + 24)];
    runtime.block_on(far.read_exact(&mut all)).unwrap();
    let channel = sender.join().unwrap();
    for (number, frame) in all.chunks(PAYLOAD + 24).enumerate() {
        assert!(frame[24..].iter().all(|byte| *byte == number as u8), "message {number}");
    }
    drop(channel);
}

fn channel_of_counts() -> (std::sync::mpsc::Sender<()>, Receiver<()>) {
    channel()
}

#[test]
fn a_flood_that_nobody_receives_is_taken_up_to_the_bound_and_no_further() {
    let runtime = runtime();
    const PIPE: usize = 64 << 10;
    for message in [Message::Chunks { bytes: vec![1; 100_000] }, Message::Ping] {
        let (mut channel, mut far) = piped(&runtime, PIPE);
        let one = frame(&message);
        let batch = one.repeat((1 << 20) / one.len());
        let writer = runtime.spawn(async move {
            let mut taken = 0;
            // The pipe takes what the reader leaves room for; once nothing moves for a while, the bound is reached.
            while let Ok(written) = tokio::time::timeout(Duration::from_millis(200), far.write(&batch[taken % one.len()..])).await
            {
                taken += written.unwrap();
                assert!(taken <= INBOX_BYTES + one.len() + PIPE + (1 << 20), "{taken} bytes were taken");
            }
            (taken, taken / one.len(), far)
        });
        let (taken, whole, far) = runtime.block_on(writer).unwrap();
        assert!(channel.bytes().1 <= taken as u64);
        // Small messages are charged for what they cost to keep, not only for what they weigh on the wire.
        assert!(whole * (frame(&message).len() + 256) <= INBOX_BYTES + (2 << 20) + PIPE * 12, "{whole} messages");
        drop(far);
        let mut got = 0;
        while let Ok(Some(received)) = channel.recv(PATIENCE) {
            assert_eq!(received, message);
            got += 1;
        }
        assert_eq!(got, whole, "every whole message that was taken is given");
    }
}

#[test]
fn a_dropped_channel_lets_go_of_a_peer_that_never_reads() {
    let runtime = runtime();
    let (channel, mut far) = piped(&runtime, 1024);
    channel.send(&Message::Chunks { bytes: vec![1; 100_000] }).unwrap();
    drop(channel);
    // Nothing is read until the connection is closed for want of a reader: only then do writes fail.
    runtime.block_on(async { while far.write_all(&frame(&Message::Ping)).await.is_ok() {} });
    let mut left = Vec::new();
    runtime.block_on(far.read_to_end(&mut left)).unwrap();
    assert!(left.len() < 100_000);
}

#[test]
fn when_the_runtime_goes_nobody_stays_blocked() {
    let runtime = runtime();
    let (mut channel, far) = piped(&runtime, 1024);
    let blocked = std::thread::spawn(move || {
        let waited = channel.recv(PATIENCE);
        (waited, std::iter::repeat_with(|| channel.send(&Message::Chunks { bytes: vec![0; 1 << 20] })).find_map(Result::err))
    });
    runtime.shutdown_background();
    let (waited, sent) = blocked.join().unwrap();
    assert_eq!(waited.unwrap_err().code, Code::PeerUnreachable);
    assert_eq!(sent.unwrap().code, Code::PeerUnreachable);
    drop(far);
}

/// A listener that behaves as one of another version would.
async fn listen_as(key: HostKey, pins: Vec<Peer>, alpn: &[u8]) -> SocketAddr {
    let config = tls::server(&key, Arc::new(Pins::new(pins).unwrap()), Arc::new(Pairing::new())).unwrap();
    let mut config = (*config).clone();
    config.alpn_protocols = vec![alpn.to_vec()];
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let _ = TlsAcceptor::from(Arc::new(config.clone())).accept(Socket::new(tcp)).await;
        }
    });
    address
}

fn peer(name: &str, address: SocketAddr, fingerprint: String) -> Peer {
    Peer { name: name.into(), address: address.to_string(), fingerprint }
}

#[test]
fn a_listener_of_another_version_is_a_version_mismatch() {
    let runtime = runtime();
    let (mine, theirs) = (key("a"), key("b"));
    let (my_print, their_print) = (mine.fingerprint(), theirs.fingerprint());
    let nowhere = "127.0.0.1:1".parse().unwrap();
    let address = runtime.block_on(listen_as(theirs, vec![peer("a", nowhere, my_print)], b"doublure/2"));
    let link = Link::new(runtime.handle().clone(), mine, "a", vec![peer("b", address, their_print)]).unwrap();
    assert_eq!(link.connect("b", PATIENCE).err().unwrap().code, Code::VersionMismatch);
    let pairing = link.pair(&address.to_string(), "0123-4567-89AB-CDEF", "", PATIENCE);
    assert_eq!(pairing.unwrap_err().code, Code::VersionMismatch);
}

/// A listening host and what it serves.
fn host(runtime: &Runtime, pins: Vec<Peer>) -> (Arc<Link>, Peer, Receiver<Channel>) {
    let key = key("b");
    let fingerprint = key.fingerprint();
    let link = Link::new(runtime.handle().clone(), key, "b", pins).unwrap();
    let (arrived, arrivals) = channel();
    let address = link.listen("127.0.0.1:0", Arc::new(move |channel| drop(arrived.send(channel)))).unwrap();
    (link, peer("b", address, fingerprint), arrivals)
}

/// A TLS connection to `to` under any ALPN, before a note is read.
async fn raw(key: &HostKey, to: &Peer, alpn: &[u8]) -> std::io::Result<TlsStream<Socket>> {
    let config = tls::client(key, Some(to.fingerprint.clone()), alpn.to_vec()).unwrap();
    dial(tokio::net::TcpStream::connect(&to.address).await?, config).await
}

#[test]
fn a_dialler_of_another_version_or_of_none_gets_nowhere() {
    let runtime = runtime();
    let mine = key("a");
    let (_link, b, arrivals) = host(&runtime, vec![peer("a", "127.0.0.1:1".parse().unwrap(), mine.fingerprint())]);
    let refused = runtime.block_on(raw(&mine, &b, b"doublure/2")).err().unwrap();
    assert!(refused.to_string().contains("NoApplicationProtocol"), "{refused}");
    let mut silent = (*tls::client(&mine, Some(b.fingerprint.clone()), vec![]).unwrap()).clone();
    silent.alpn_protocols.clear();
    let note = runtime.block_on(async {
        let mut tls = dial(tokio::net::TcpStream::connect(&b.address).await.unwrap(), Arc::new(silent)).await.unwrap();
        note::read(&mut tls).await.unwrap()
    });
    assert!(matches!(note, Ok(Note::Refused { fault }) if fault.code == Code::PeerNotTrusted));
    assert!(arrivals.try_recv().is_err());
}

#[test]
fn a_proven_peer_that_sends_nonsense_over_tls_is_cut_off_with_the_right_code() {
    let runtime = runtime();
    let mine = key("a");
    let (_link, b, arrivals) = host(&runtime, vec![peer("a", "127.0.0.1:1".parse().unwrap(), mine.fingerprint())]);
    let mut tls = runtime.block_on(async {
        let mut tls = raw(&mine, &b, &tls::alpn()).await.unwrap();
        assert!(matches!(note::read(&mut tls).await.unwrap(), Ok(Note::Welcome {})));
        tls.write_all(&header(PROTOCOL, 6, FRAME_PAYLOAD_MAX as u32 + 1, 0)).await.unwrap();
        tls.flush().await.unwrap();
        tls
    });
    let mut served = arrivals.recv_timeout(PATIENCE).unwrap();
    assert_eq!(served.recv(PATIENCE).unwrap_err().code, Code::ProtocolError);
    // The connection is closed although the channel still lives.
    assert!(matches!(runtime.block_on(tls.read(&mut [0; 64])), Ok(0) | Err(_)));
}

/// What a stranger's words to an open pairing window get it.
fn said(runtime: &Runtime, b: &Peer, mine: &HostKey, words: &[u8]) -> std::io::Result<Res<Note>> {
    runtime.block_on(async {
        let mut tls = raw(mine, b, tls::ALPN_PAIR).await?;
        note::read(&mut tls).await?.unwrap();
        tls.write_all(words).await?;
        tls.flush().await?;
        note::read(&mut tls).await
    })
}

#[test]
fn nonsense_in_a_pairing_window_neither_pairs_nor_uses_the_code_up() {
    let runtime = runtime();
    let (link, b, _arrivals) = host(&runtime, vec![]);
    let (mine, friend) = (key("evil"), key("a"));
    let code = link.open_pairing(PATIENCE, Box::new(|_| Ok(()))).unwrap();
    for words in [&b"\xff\xff"[..], b"\x02\0{}", b"\x10\0not json at all.", b"\x0e\0{\"welcome\":{}}"] {
        for _ in 0..3 {
            let answer = said(&runtime, &b, &mine, words);
            assert!(!matches!(answer, Ok(Ok(Note::Paired { .. } | Note::Welcome {}))), "{answer:?}");
        }
    }
    let mut names = Vec::new();
    for name in ["../../etc", "", "a b", "b"] {
        let note = Note::Prove { proof: crate::model::Digest([1; 32]), name: name.into(), address: "x:1".into() };
        runtime.block_on(note::write(&mut names, &note)).unwrap();
        let answer = said(&runtime, &b, &mine, &names).unwrap().unwrap();
        assert!(matches!(answer, Note::Refused { .. }), "{answer:?}");
        names.clear();
    }
    let honest = Link::new(runtime.handle().clone(), friend, "a", vec![]).unwrap();
    honest.pair(&b.address, &code, "", PATIENCE).unwrap();
    assert_eq!(link.peers().len(), 1);
}

/// A listener that shows everything it must except that it knows the code.
#[test]
fn a_listener_that_does_not_know_the_code_is_not_pinned() {
    let runtime = runtime();
    let (theirs, mine) = (key("evil"), key("a"));
    let own = mine.fingerprint();
    let config = tls::server(
        &theirs,
        Arc::new(Pins::new(vec![peer("a", "127.0.0.1:1".parse().unwrap(), own)]).unwrap()),
        Arc::new(Pairing::new()),
    )
    .unwrap();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    runtime.spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let mut tls = TlsAcceptor::from(config).accept(Socket::new(tcp)).await.unwrap();
        note::write(&mut tls, &Note::Welcome {}).await.unwrap();
        // It sends the dialler's own proof back, the best that it has.
        let Ok(Note::Prove { proof, .. }) = note::read(&mut tls).await.unwrap() else { panic!("no proof came") };
        note::write(&mut tls, &Note::Paired { proof, name: "b".into() }).await.unwrap();
        tls.shutdown().await.unwrap();
    });
    let link = Link::new(runtime.handle().clone(), mine, "a", vec![]).unwrap();
    let fault = link.pair(&address.to_string(), "0123-4567-89AB-CDEF", "", PATIENCE).unwrap_err();
    assert_eq!(fault.code, Code::PairingFailed);
    assert!(fault.cause.contains("does not know the code"), "{fault}");
    assert!(link.peers().is_empty());
}
