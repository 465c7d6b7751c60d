//! A proven connection as a blocking channel of messages.
//!
//! ```text
//! send -> [outbox, bytes bounded] -> writer task -> TLS -> ... -> TLS -> reader task -> [inbox, bytes bounded] -> recv
//! ```
//!
//! Back-pressure is nothing but the two bounds: a full inbox stops the reader, TCP's window shuts, the writer stops, the outbox
//! fills, `send` blocks.

use crate::format::{FRAME_HEADER_BYTES, FRAME_PAYLOAD_MAX, FrameHead, Message};
use crate::link::pace::Pace;
use crate::link::socket::Socket;
use crate::link::tls;
use crate::model::{Code, Fault, Res};
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;
use tokio_rustls::TlsStream;

/// `send` blocks while so many bytes wait in the outbox. The writer holds as many again, so up to twice this, plus a frame, is
/// kept for one connection.
pub(in crate::link) const OUTBOX_BYTES: usize = 2 << 20;
/// The reader stops while so many bytes wait in the inbox.
pub(in crate::link) const INBOX_BYTES: usize = 4 << 20;
/// What a message costs in the inbox beyond its frame: an empty one is not free.
const MESSAGE_COST: usize = 256;
/// The largest piece that is handed to TLS at once, in bytes.
const PIECE_BYTES: usize = 256 << 10;
/// How much is read ahead of TLS, in bytes.
const AHEAD_BYTES: usize = 256 << 10;
/// How long what was queued may take to leave once the channel is dropped.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// After so long without anything to send, the buffers of a burst are given back.
const IDLE: Duration = Duration::from_secs(5);
/// What is kept of them, in bytes.
const IDLE_BYTES: usize = 16 << 10;

/// An authenticated connection; `send` and `recv` block their thread, so never call them on the runtime.
///
/// Dropping it sends what is queued (for at most two seconds, in the background), then closes.
pub struct Channel {
    peer: String,
    shared: Arc<Shared>,
}

impl Channel {
    /// Starts the two tasks of a connection whose peer was proven to be `peer`.
    pub(in crate::link) fn start(
        runtime: &tokio::runtime::Handle,
        mut tls: TlsStream<Socket>,
        peer: String,
        pace: Arc<Pace>,
    ) -> Channel {
        tls.get_mut().0.widen(AHEAD_BYTES);
        match &mut tls {
            TlsStream::Client(tls) => tls.get_mut().1.set_buffer_limit(Some(tls::RECORDS_BYTES)),
            TlsStream::Server(tls) => tls.get_mut().1.set_buffer_limit(Some(tls::RECORDS_BYTES)),
        }
        Self::over(runtime, tls, peer, pace)
    }

    /// The same over any stream of bytes.
    pub(in crate::link) fn over<T>(runtime: &tokio::runtime::Handle, stream: T, peer: String, pace: Arc<Pace>) -> Channel
    where
        T: AsyncRead + AsyncWrite + Send + 'static,
    {
        let shared = Arc::new(Shared {
            peer: peer.clone(),
            out: Mutex::new(Outbox { bytes: Vec::new(), closing: false, end: None }),
            out_room: Condvar::new(),
            out_ready: Notify::new(),
            inbox: Mutex::new(Inbox { messages: VecDeque::new(), held: 0, rung: false, closing: false, end: None }),
            in_ready: Condvar::new(),
            in_room: Notify::new(),
            closing: Notify::new(),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
        });
        runtime.spawn(run(stream, shared.clone(), pace));
        Channel { peer, shared }
    }

    /// The proven peer's name.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Queues a message; blocks while more than a few MiB wait to be sent.
    ///
    /// Errors: why the connection is gone (mostly `PEER_UNREACHABLE`); the peer's last words may still be had from
    /// [`Channel::recv`]. `INTERNAL` for a message too large for a frame, which is not sent.
    pub fn send(&self, message: &Message) -> Res<()> {
        let mut out = lock(&self.shared.out);
        while out.end.is_none() && out.bytes.len() >= OUTBOX_BYTES {
            out = self.shared.out_room.wait(out).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(fault) = &out.end {
            return Err(fault.clone());
        }
        let before = out.bytes.len();
        // `encode` panics on what no frame can hold. Half a frame must not stay behind for the next message to follow.
        let encoded = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| message.encode(&mut out.bytes)));
        if encoded.is_err() || out.bytes.len() - before > FRAME_HEADER_BYTES + FRAME_PAYLOAD_MAX {
            out.bytes.truncate(before);
            return Err(Fault::internal(format!("a message to {}", self.peer), "it is too large for a frame"));
        }
        drop(out);
        self.shared.out_ready.notify_one();
        Ok(())
    }

    /// The next message; `None` when `patience` has passed or the bell was rung.
    ///
    /// Once the connection is gone, what had arrived is still given, then the reason as an error: `PEER_UNREACHABLE`,
    /// `PROTOCOL_ERROR` or `VERSION_MISMATCH` when it was what the peer sent.
    pub fn recv(&mut self, patience: Duration) -> Res<Option<Message>> {
        let until = Instant::now().checked_add(patience);
        let mut inbox = lock(&self.shared.inbox);
        loop {
            if let Some((message, cost)) = inbox.messages.pop_front() {
                inbox.held -= cost;
                drop(inbox);
                self.shared.in_room.notify_one();
                return Ok(Some(message));
            }
            if let Some(fault) = &inbox.end {
                return Err(fault.clone());
            }
            if std::mem::take(&mut inbox.rung) {
                return Ok(None);
            }
            let left = until.map_or(Duration::MAX, |until| until.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Ok(None);
            }
            inbox = self.shared.in_ready.wait_timeout(inbox, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A bell that ends a wait in [`Channel::recv`] from another thread.
    pub fn bell(&self) -> Bell {
        Bell { shared: Arc::downgrade(&self.shared) }
    }

    /// Bytes of frames (header and payload, before TLS) sent and received so far.
    pub fn bytes(&self) -> (u64, u64) {
        (self.shared.sent.load(Relaxed), self.shared.received.load(Relaxed))
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        lock(&self.shared.out).closing = true;
        lock(&self.shared.inbox).closing = true;
        self.shared.out_ready.notify_one();
        self.shared.in_room.notify_one();
        self.shared.closing.notify_one();
    }
}

/// Wakes whoever waits in [`Channel::recv`]; rung while nobody waits, the next wait ends at once. Outlives the channel harmlessly.
#[derive(Clone)]
pub struct Bell {
    shared: std::sync::Weak<Shared>,
}

impl Bell {
    /// Rings.
    pub fn ring(&self) {
        if let Some(shared) = self.shared.upgrade() {
            lock(&shared.inbox).rung = true;
            shared.in_ready.notify_all();
        }
    }
}

/// What the channel and its tasks share.
struct Shared {
    peer: String,
    out: Mutex<Outbox>,
    out_room: Condvar,
    out_ready: Notify,
    inbox: Mutex<Inbox>,
    in_ready: Condvar,
    in_room: Notify,
    /// The channel was dropped: the clock of the last words runs.
    closing: Notify,
    sent: AtomicU64,
    received: AtomicU64,
}

struct Outbox {
    /// Whole frames, ready for the wire.
    bytes: Vec<u8>,
    closing: bool,
    /// Why nothing can be sent any more.
    end: Option<Fault>,
}

struct Inbox {
    /// Messages and what each counts against the bound.
    messages: VecDeque<(Message, usize)>,
    held: usize,
    /// The bell was rung and nobody heard it yet.
    rung: bool,
    closing: bool,
    /// Why nothing more will arrive.
    end: Option<Fault>,
}

impl Shared {
    /// Nothing can be sent any more. The first reason stays.
    fn end_sending(&self, fault: Fault) {
        lock(&self.out).end.get_or_insert(fault);
        self.out_room.notify_all();
    }

    /// Nothing more will arrive. The first reason stays.
    fn end_receiving(&self, fault: Fault) {
        lock(&self.inbox).end.get_or_insert(fault);
        self.in_ready.notify_all();
    }

    fn gone(&self, cause: impl Into<String>) -> Fault {
        gone(&self.peer, cause)
    }

    fn lost(&self, error: &io::Error) -> Fault {
        self.gone(format!("the connection is gone: {error}"))
    }
}

/// There is no connection to `peer`, because of `cause`.
pub(in crate::link) fn gone(peer: &str, cause: impl Into<String>) -> Fault {
    Fault::new(
        Code::PeerUnreachable,
        format!("peer {peer}"),
        cause,
        "the agent tries again by itself; see that the peer's agent runs and the network lets it through",
    )
}

/// However the tasks end (the runtime may drop them), nobody stays blocked in `send` or `recv`.
struct Ended<'s>(&'s Shared);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.end_sending(self.0.gone("the connection was closed"));
        self.0.end_receiving(self.0.gone("the connection was closed"));
    }
}

/// One connection from beginning to end.
async fn run<T: AsyncRead + AsyncWrite + Send + 'static>(stream: T, shared: Arc<Shared>, pace: Arc<Pace>) {
    let _ended = Ended(&shared);
    let (from, mut to) = tokio::io::split(stream);
    // A task of its own: checking and decoding what arrives then has another core than encrypting what leaves.
    let mut reader = Task(tokio::spawn(read_all(from, shared.clone())));
    let last_call = async {
        shared.closing.notified().await;
        tokio::time::sleep(LAST_WORDS).await;
    };
    let conversation = async {
        let written = tokio::select! {
            _ = &mut reader.0 => return,
            written = write_all(&mut to, &shared, &pace) => written,
        };
        match written {
            // Closed with data unread, TCP would send a reset, and a reset can overtake our last words: so say goodbye, then
            // read (and drop) until the peer has closed too.
            Ok(()) => drop(to.shutdown().await),
            Err(error) => shared.end_sending(shared.lost(&error)),
        }
        // After a failed write the peer's last words may still lie in the socket.
        drop(tokio::time::timeout(LAST_WORDS, &mut reader.0).await);
    };
    tokio::select! { () = conversation => {}, () = last_call => {} }
}

/// A task that ends with its owner.
struct Task(tokio::task::JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Writes the outbox until the channel is dropped and everything has left.
async fn write_all(to: &mut (impl AsyncWrite + Unpin), shared: &Shared, pace: &Pace) -> io::Result<()> {
    // Two buffers change places: one is filled by `send` while the other is written.
    let mut batch = Vec::new();
    loop {
        let closing = {
            let mut out = lock(&shared.out);
            std::mem::swap(&mut out.bytes, &mut batch);
            out.closing
        };
        if batch.is_empty() {
            to.flush().await?;
            if closing {
                return Ok(());
            }
            if tokio::time::timeout(IDLE, shared.out_ready.notified()).await.is_err() {
                batch.shrink_to(IDLE_BYTES);
                lock(&shared.out).bytes.shrink_to(IDLE_BYTES);
                shared.out_ready.notified().await;
            }
            continue;
        }
        shared.out_room.notify_all();
        let mut rest = batch.as_slice();
        while !rest.is_empty() {
            let granted = pace.grant(rest.len().min(PIECE_BYTES)).await;
            let (piece, after) = rest.split_at(granted);
            to.write_all(piece).await?;
            shared.sent.fetch_add(piece.len() as u64, Relaxed);
            rest = after;
        }
        batch.clear();
    }
}

/// Reads frames into the inbox until the peer closes, fails or talks nonsense. Returning closes the connection.
async fn read_all(mut from: impl AsyncRead + Unpin, shared: Arc<Shared>) {
    let _ended = Ended(&shared);
    let fault = match read_frames(&mut from, &shared).await {
        Ok(Some(fault)) => fault,
        Ok(None) => shared.gone("it closed the connection"),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => shared.gone("it closed the connection without a goodbye"),
        Err(error) => shared.lost(&error),
    };
    shared.end_sending(fault.clone());
    shared.end_receiving(fault);
}

/// `Ok(None)`: the peer said goodbye between two frames. `Ok(Some)`: what it sent is not a frame.
async fn read_frames(from: &mut (impl AsyncRead + Unpin), shared: &Shared) -> io::Result<Option<Fault>> {
    loop {
        let mut header = [0; FRAME_HEADER_BYTES];
        let first = from.read(&mut header).await?;
        if first == 0 {
            return Ok(None);
        }
        from.read_exact(&mut header[first..]).await?;
        let head = match FrameHead::decode(&header) {
            Ok(head) if head.payload_bytes <= FRAME_PAYLOAD_MAX => head,
            Ok(_) => return Ok(Some(Fault::protocol("a frame larger than the protocol allows"))),
            Err(fault) => return Ok(Some(fault)),
        };
        let mut payload = Vec::with_capacity(head.payload_bytes);
        let mut body = (&mut *from).take(head.payload_bytes as u64);
        while payload.len() < head.payload_bytes {
            if body.read_buf(&mut payload).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let frame = FRAME_HEADER_BYTES + head.payload_bytes;
        shared.received.fetch_add(frame as u64, Relaxed);
        match head.message(payload) {
            Ok(message) => deliver(message, frame + MESSAGE_COST, shared).await,
            Err(fault) => return Ok(Some(fault)),
        }
    }
}

/// Puts a message into the inbox once there is room. When nobody will take it any more it is dropped.
async fn deliver(message: Message, cost: usize, shared: &Shared) {
    loop {
        {
            let mut inbox = lock(&shared.inbox);
            if inbox.closing {
                return;
            }
            if inbox.held < INBOX_BYTES {
                inbox.held += cost;
                inbox.messages.push_back((message, cost));
                shared.in_ready.notify_one();
                return;
            }
        }
        shared.in_room.notified().await;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
