//! Two hosts on loopback: pairing, trust, garbage, last words. Only what `link` gives to the other rooms is used.

use doublure::format::Message;
use doublure::link::{Channel, HostKey, Link, Peer};
use doublure::model::{Code, Fault, Res};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

/// Longer than anything here takes; nothing is concluded from how long a thing took.
const PATIENCE: Duration = Duration::from_secs(60);

static RUNTIME: LazyLock<tokio::runtime::Runtime> =
    LazyLock::new(|| tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap());

struct Host {
    name: &'static str,
    link: Arc<Link>,
    address: SocketAddr,
    fingerprint: String,
    arrivals: Receiver<Channel>,
    _home: tempfile::TempDir,
}

impl Host {
    fn new(name: &'static str) -> Host {
        Host::knowing(name, |_| vec![])
    }

    /// A host that has pinned `peers`, which may depend on its own fingerprint.
    fn knowing(name: &'static str, peers: impl FnOnce(&str) -> Vec<Peer>) -> Host {
        let home = tempfile::tempdir().unwrap();
        let key = HostKey::load_or_make(&home.path().join("keys"), name).unwrap();
        let fingerprint = key.fingerprint();
        let link = Link::new(RUNTIME.handle().clone(), key, name, peers(&fingerprint)).unwrap();
        let (arrived, arrivals) = channel();
        let address = link.listen("127.0.0.1:0", Arc::new(move |channel| drop(arrived.send(channel)))).unwrap();
        Host { name, link, address, fingerprint, arrivals, _home: home }
    }

    fn as_peer(&self) -> Peer {
        Peer { name: self.name.into(), address: self.address.to_string(), fingerprint: self.fingerprint.clone() }
    }

    fn open(&self) -> String {
        self.link.open_pairing(PATIENCE, Box::new(|_| Ok(()))).unwrap()
    }

    fn pair(&self, with: &Host, code: &str) -> Res<Peer> {
        self.link.pair(&with.address.to_string(), code, &self.address.to_string(), PATIENCE)
    }

    /// A connection to `to`, both ends of it.
    fn connect(&self, to: &Host) -> (Channel, Channel) {
        let mine = self.link.connect(to.name, PATIENCE).unwrap();
        let theirs = to.arrivals.recv_timeout(PATIENCE).unwrap();
        assert_eq!((mine.peer(), theirs.peer()), (to.name, self.name));
        (mine, theirs)
    }
}

fn paired() -> (Host, Host) {
    let (a, b) = (Host::new("a"), Host::new("b"));
    let code = b.open();
    a.pair(&b, &code).unwrap();
    (a, b)
}

fn code_of<T>(result: Res<T>) -> Code {
    result.err().expect("this must fail").code
}

/// What one end counts as sent the other counts as received. The sender counts once the socket has taken the bytes, which the
/// receiver may see first: so this waits, for ever if it never comes true.
fn counts_agree(near: &Channel, far: &Channel) {
    while near.bytes().0 != far.bytes().1 || near.bytes().1 != far.bytes().0 {
        std::thread::yield_now();
    }
}

/// A code that is well formed and not this one.
fn another(code: &str) -> String {
    let first = if code.starts_with('7') { '8' } else { '7' };
    format!("{first}{}", &code[1..])
}

fn chunks(bytes: usize, seed: usize) -> Message {
    Message::Chunks { bytes: (0..bytes).map(|at| (at * 31 + seed * 7) as u8).collect() }
}

#[test]
fn pairing_pins_both_and_messages_flow_both_ways() {
    let (a, b) = (Host::new("a"), Host::new("b"));
    let (told, hear) = channel();
    let code = b.link.open_pairing(PATIENCE, Box::new(move |peer| told.send(peer).map_err(|_| unreachable!()))).unwrap();
    assert_eq!(a.pair(&b, &code.to_lowercase()).unwrap(), b.as_peer());
    assert_eq!(hear.try_recv().unwrap(), a.as_peer());
    assert_eq!((a.link.peers(), b.link.peers()), (vec![b.as_peer()], vec![a.as_peer()]));

    for (from, to) in [(&a, &b), (&b, &a)] {
        let (mut near, mut far) = from.connect(to);
        near.send(&Message::Ping).unwrap();
        assert_eq!(far.recv(PATIENCE).unwrap(), Some(Message::Ping));
        far.send(&Message::Pong).unwrap();
        assert_eq!(near.recv(PATIENCE).unwrap(), Some(Message::Pong));
        assert_eq!(near.recv(Duration::ZERO).unwrap(), None);
        counts_agree(&near, &far);
        drop(near);
        assert_eq!(code_of(far.recv(PATIENCE)), Code::PeerUnreachable);
        assert_eq!(code_of(far.send(&Message::Ping)), Code::PeerUnreachable);
    }
}

#[test]
fn a_host_that_listens_on_every_address_is_pinned_under_the_one_it_came_from() {
    let (a, b) = (Host::new("a"), Host::new("b"));
    let code = b.open();
    a.link.pair(&b.address.to_string(), &code, &format!("0.0.0.0:{}", a.address.port()), PATIENCE).unwrap();
    assert_eq!(b.link.peers(), vec![a.as_peer()]);
    b.connect(&a);
}

#[test]
fn a_wrong_code_pins_nothing_and_leaves_the_window_open() {
    let (a, b) = (Host::new("a"), Host::new("b"));
    let code = b.open();
    let wrong = another(&code);
    let fault = a.pair(&b, &wrong).unwrap_err();
    assert_eq!(fault.code, Code::PairingFailed);
    assert!(fault.cause.contains("wrong"), "{fault}");
    assert!(a.link.peers().is_empty() && b.link.peers().is_empty());
    assert_eq!(code_of(a.pair(&b, "not a code")), Code::BadArgument);
    a.pair(&b, &code).unwrap();
}

#[test]
fn the_sixth_attempt_comes_too_late_even_with_the_right_code() {
    let (a, b) = (Host::new("a"), Host::new("b"));
    let code = b.open();
    for _ in 0..5 {
        assert_eq!(code_of(a.pair(&b, &another(&code))), Code::PairingFailed);
    }
    assert_eq!(code_of(a.pair(&b, &code)), Code::PairingFailed);
    assert!(a.link.peers().is_empty() && b.link.peers().is_empty());
}

#[test]
fn a_code_works_once_and_not_after_its_time() {
    let (a, b, c) = (Host::new("a"), Host::new("b"), Host::new("c"));
    let code = b.open();
    a.pair(&b, &code).unwrap();
    assert_eq!(code_of(c.pair(&b, &code)), Code::PairingFailed);
    assert_eq!(code_of(a.pair(&b, &code)), Code::PairingFailed, "not for the one either that it was used by");
    let late = b.link.open_pairing(Duration::ZERO, Box::new(|_| Ok(()))).unwrap();
    assert_eq!(code_of(c.pair(&b, &late)), Code::PairingFailed);
    assert!(c.link.peers().is_empty());
    assert_eq!(b.link.peers(), vec![a.as_peer()]);
}

#[test]
fn when_the_new_peer_cannot_be_written_down_nothing_is_pinned_and_the_dialler_is_told() {
    let (a, b) = (Host::new("a"), Host::new("b"));
    let full = || Fault::new(Code::DiskFull, "the ledger", "no space left", "free space");
    let code = b.link.open_pairing(PATIENCE, Box::new(move |_| Err(full()))).unwrap();
    let fault = a.pair(&b, &code).unwrap_err();
    assert_eq!(fault.code, Code::PairingFailed);
    assert!(fault.cause.contains("no space left"), "{fault}");
    assert!(a.link.peers().is_empty() && b.link.peers().is_empty());
}

#[test]
fn hosts_that_cannot_be_told_apart_do_not_pair() {
    let (a, other_a) = (Host::new("a"), Host::new("a"));
    let code = a.open();
    let fault = a.pair(&a, &code).unwrap_err();
    assert_eq!(fault.code, Code::PairingFailed);
    let fault = other_a.pair(&a, &code).unwrap_err();
    assert_eq!(fault.code, Code::PairingFailed);
    assert!(fault.cause.contains("call themselves a"), "{fault}");
    assert!(a.link.peers().is_empty() && other_a.link.peers().is_empty());
}

#[test]
fn a_reinstalled_host_replaces_its_old_key() {
    let (a, b) = paired();
    let reinstalled = Host::new("b");
    let code = reinstalled.open();
    a.pair(&reinstalled, &code).unwrap();
    assert_eq!(a.link.peers(), vec![reinstalled.as_peer()]);
    assert_eq!(code_of(b.link.connect("a", PATIENCE)), Code::PeerNotTrusted);
    a.connect(&reinstalled);
}

#[test]
fn a_client_that_is_not_pinned_is_refused_window_or_not() {
    let b = Host::new("b");
    let stranger = Host::knowing("a", |_| vec![b.as_peer()]);
    let fault = stranger.link.connect("b", PATIENCE).err().unwrap();
    assert_eq!(fault.code, Code::PeerNotTrusted, "{fault}");
    // An open window lets the key through the handshake, but only to pair.
    let _code = b.open();
    let fault = stranger.link.connect("b", PATIENCE).err().unwrap();
    assert_eq!(fault.code, Code::PeerNotTrusted, "{fault}");
    assert!(b.arrivals.try_recv().is_err(), "a stranger was served");
    assert_eq!(code_of(stranger.link.connect("c", PATIENCE)), Code::PeerNotTrusted);
}

#[test]
fn a_server_with_another_key_is_not_the_peer() {
    let (a, b) = paired();
    let impostor = Host::knowing("b", |_| vec![a.as_peer()]);
    let fooled = Host::knowing("x", |_| vec![Peer { address: impostor.address.to_string(), ..b.as_peer() }]);
    let fault = fooled.link.connect("b", PATIENCE).err().unwrap();
    assert_eq!(fault.code, Code::PeerNotTrusted);
    assert!(fault.cause.contains("not the one that was paired"), "{fault}");
    assert!(impostor.arrivals.try_recv().is_err());
}

#[test]
fn nobody_there_is_unreachable() {
    let (a, b) = paired();
    drop(b);
    assert_eq!(code_of(a.link.connect("b", PATIENCE)), Code::PeerUnreachable);
    // Something accepts and says nothing.
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = Peer { name: "m".into(), address: mute.local_addr().unwrap().to_string(), fingerprint: "0".repeat(64) };
    let c = Host::knowing("c", |_| vec![silent]);
    assert_eq!(code_of(c.link.connect("m", Duration::from_millis(50))), Code::PeerUnreachable);
}

/// The first message of a TLS 1.2 client, which knows no later version.
fn tls12_hello() -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([0x5a; 32]);
    body.push(0);
    body.extend([0, 4, 0xc0, 0x2b, 0xc0, 0x2f]);
    body.extend([1, 0]);
    let extensions = [0u8, 0x0d, 0, 4, 0, 2, 4, 3, 0, 0x0a, 0, 4, 0, 2, 0, 0x17];
    body.extend([0, extensions.len() as u8]);
    body.extend(extensions);
    let mut hello = vec![0x16, 3, 1, 0, body.len() as u8 + 4, 1, 0, 0, body.len() as u8];
    hello.extend(body);
    hello
}

#[test]
fn garbage_on_the_port_leaves_the_listener_working() {
    let (a, b) = paired();
    let random: Vec<u8> = (0..100_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let pieces: [&[u8]; 6] =
        [b"", b"GET / HTTP/1.1\r\nHost: b\r\n\r\n", &random, &tls12_hello(), &[0x16, 3, 1, 0xff, 0xff], &[0; 4096]];
    for piece in pieces {
        let mut tcp = TcpStream::connect(b.address).unwrap();
        // It may close while we still write.
        let _ = tcp.write_all(piece);
        let _ = tcp.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        // It closes: were it to keep the connection, this would wait until the handshake's limit.
        let _ = tcp.read_to_end(&mut answer);
        if piece == tls12_hello() {
            assert_eq!((answer.first(), answer.last()), (Some(&0x15), Some(&70)), "the alert `protocol_version`: {answer:?}");
        }
        a.connect(&b);
    }
}

#[test]
fn silent_strangers_are_bounded_and_do_not_stay() {
    let (a, b) = paired();
    let idle: Vec<TcpStream> = (0..80).map(|_| TcpStream::connect(b.address).unwrap()).collect();
    // The 65th and later ones are closed without a word, while the first ones are still waited for.
    for mut late in idle.iter().skip(64) {
        assert!(matches!(late.read(&mut [0]), Ok(0) | Err(_)));
    }
    idle[0].set_nonblocking(true).unwrap();
    assert_eq!((&idle[0]).read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    drop(idle);
    let again = std::iter::repeat_with(|| a.link.connect("b", PATIENCE)).find(Result::is_ok);
    assert!(again.is_some());
}

#[test]
fn an_address_in_use_is_one_sentence() {
    let a = Host::new("a");
    let fault = a.link.listen(&a.address.to_string(), Arc::new(drop)).unwrap_err();
    assert_eq!(fault.code, Code::IoError);
    assert!(fault.to_string().contains("another program listens there already"), "{fault}");
    assert_eq!(code_of(a.link.listen("localhost:1", Arc::new(drop))), Code::BadArgument);
    assert_eq!(code_of(a.link.listen("203.0.113.77:1", Arc::new(drop))), Code::IoError);
}

#[test]
fn large_frames_arrive_whole_and_in_order_while_as_many_go_the_other_way() {
    let (a, b) = paired();
    let (near, far) = a.connect(&b);
    let talk = |mut channel: Channel| {
        move || {
            for round in 0..40 {
                channel.send(&chunks((1 << 20) - round * 1000, round)).unwrap();
                if round % 4 == 3 {
                    for expected in round - 3..=round {
                        let got = channel.recv(PATIENCE).unwrap();
                        assert!(got == Some(chunks((1 << 20) - expected * 1000, expected)), "round {expected}");
                    }
                }
            }
            channel
        }
    };
    let threads = [std::thread::spawn(talk(near)), std::thread::spawn(talk(far))];
    let [near, far] = threads.map(|thread| thread.join().unwrap());
    counts_agree(&near, &far);
    assert!(near.bytes().0 > 38 << 20);
}

#[test]
fn last_words_reach_a_peer_that_talks_without_pause() {
    let (a, b) = paired();
    let (mut near, far) = a.connect(&b);
    let fault = Fault::new(Code::StaleEpoch, "group pg", "epoch 7 is known here", "ask the other host");
    // Both directions are full of what `far` will never read: closing then resets the connection unless it is done with care.
    while far.bytes().1 < 3 << 20 {
        near.send(&chunks(1 << 18, 1)).unwrap();
    }
    far.send(&Message::Refused { fault: fault.clone() }).unwrap();
    drop(far);
    let failed = std::iter::repeat_with(|| near.send(&chunks(1 << 18, 2))).find_map(Result::err).unwrap();
    assert_eq!(failed.code, Code::PeerUnreachable);
    assert_eq!(near.recv(PATIENCE).unwrap(), Some(Message::Refused { fault }));
    assert_eq!(code_of(near.recv(PATIENCE)), Code::PeerUnreachable);
}

#[test]
fn last_words_behind_megabytes_reach_a_peer_that_goes_on_talking() {
    let (a, b) = paired();
    let (mut near, far) = a.connect(&b);
    // A socket closed with unread bytes in it throws away what it has not sent yet. Here there are both, for as long as `near`
    // takes in slowly and talks on.
    (0..6 << 2).for_each(|round| far.send(&chunks(1 << 18, round)).unwrap());
    let fault = Fault::new(Code::StaleEpoch, "group pg", "epoch 7 is known here", "ask the other host");
    far.send(&Message::Refused { fault: fault.clone() }).unwrap();
    drop(far);
    for round in 0..6 << 2 {
        // Once `far` is gone these fail; what it said before must arrive all the same.
        (0..2).for_each(|_| drop(near.send(&chunks(1 << 18, 1))));
        assert!(near.recv(PATIENCE).unwrap() == Some(chunks(1 << 18, round)), "round {round}");
    }
    assert_eq!(near.recv(PATIENCE).unwrap(), Some(Message::Refused { fault }));
}

#[test]
fn a_message_too_large_for_a_frame_costs_only_itself() {
    let (a, b) = paired();
    let (near, mut far) = a.connect(&b);
    assert_eq!(code_of(near.send(&chunks((1 << 20) + 1, 0))), Code::Internal);
    near.send(&Message::Ping).unwrap();
    assert_eq!(far.recv(PATIENCE).unwrap(), Some(Message::Ping));
}

#[test]
fn a_cap_is_obeyed_and_can_be_lifted_while_it_holds_something_back() {
    let (a, b) = paired();
    let (near, mut far) = a.connect(&b);
    // At a byte a second nothing of this size leaves while the test lives.
    a.link.set_bandwidth(Some(1));
    near.send(&chunks(1 << 20, 3)).unwrap();
    assert_eq!(far.recv(Duration::from_millis(20)).unwrap(), None);
    assert_eq!(near.bytes().0, 0);
    a.link.set_bandwidth(None);
    assert_eq!(far.recv(PATIENCE).unwrap(), Some(chunks(1 << 20, 3)));
}

#[test]
fn neither_key_nor_code_is_in_anything_that_can_be_printed() {
    let (a, b) = (Host::new("a"), Host::new("b"));
    let code = b.open();
    let key = std::fs::read(b._home.path().join("keys/key.der")).unwrap();
    // The seed stands at the end of the first octet string of the file: any eight bytes of it would be too much.
    let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut printed = vec![format!("{:?}", a.pair(&b, &another(&code))), format!("{:?}", a.pair(&b, &format!("{code}X")))];
    printed.push(format!("{:?}", a.pair(&b, &code)));
    printed.push(format!("{:?} {:?}", a.link.peers(), b.link.peers()));
    printed.push(format!("{:?}", a.link.connect("b", PATIENCE).err()));
    printed.push(format!("{:?}", a.pair(&b, &code)));
    let bare: String = code.chars().filter(|c| *c != '-').collect();
    for text in printed {
        assert!(!text.contains(&code) && !text.contains(&bare), "{text}");
        for part in (32..96).step_by(2) {
            assert!(!text.contains(&hex[part..part + 16]), "{text}");
        }
    }
}

/// Not a test of anything but a figure: `cargo test --release --test link_pair throughput -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn throughput() {
    let (a, b) = paired();
    let (near, mut far) = a.connect(&b);
    for frame in [1 << 20, 256 << 10, 64 << 10, 4 << 10] {
        let total: usize = 2 << 30;
        let began = std::time::Instant::now();
        let count = total / frame;
        let receiver = std::thread::spawn(move || {
            for _ in 0..count {
                assert!(matches!(far.recv(PATIENCE).unwrap(), Some(Message::Chunks { .. })));
            }
            far
        });
        let message = chunks(frame - 64, 0);
        (0..count).for_each(|_| near.send(&message).unwrap());
        far = receiver.join().unwrap();
        let seconds = began.elapsed().as_secs_f64();
        println!("frames of {frame} bytes: {:.0} MB/s", total as f64 / seconds / 1e6);
    }
}
