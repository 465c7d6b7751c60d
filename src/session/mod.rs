//! Owns the conversation between two agents as two state machines without I/O: sender and receiver.
//! Gives the next action for each message; refuses, in words, whatever is out of turn.
//! Keeps the bytes in flight within the credit that the receiver gave.
//! Never touches a socket, a clock or a disk; an acknowledgement can be built from a `SealedProof` only.
//! Assumes messages come from the peer that `link` authenticated.
#![forbid(unsafe_code)]
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::format::{Landing, Message, Purpose, Standing};
use crate::model::{Digest, GroupId, Moment, Position, Receipt, Res, SealedProof};

/// The peer's acknowledgement of one generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acknowledged { position: Position, digest: Digest }
impl Receipt for Acknowledged {
    fn position(&self) -> Position { self.position }
    fn digest(&self) -> Digest { self.digest }
}

/// The sender's half (the primary). Made when the connection is up.
#[derive(Debug)]
pub struct Sender { _p: () }

/// What the sender learns from a message.
#[derive(Debug, PartialEq)]
pub enum SenderEvent {
    /// The standby introduced itself.
    Welcome { host: String, standing: Standing },
    /// The definition is durable there.
    Defined,
    /// A segment of a direct transfer is durable there.
    SegmentDone { number: u64 },
    /// The generation is committed; the only way to obtain a receipt. Its digest was checked against ours.
    Committed(Acknowledged),
    /// Digests of a range.
    Digests { volume: u16, start: u64, digests: Vec<u8> },
    /// The range is done.
    DigestsDone { volume: u16 },
    /// Credit was added, or a pong came: nothing to do.
    Nothing,
}

impl Sender {
    /// A new conversation and the `Hello` to send.
    pub fn new(_host: &str, _purpose: Purpose, _group: GroupId, _epoch: u64) -> (Sender, Message) { todo!() }
    /// Takes a message. A `Refused` becomes its fault; anything out of turn is `PROTOCOL_ERROR`.
    pub fn on_message(&mut self, _message: Message) -> Res<SenderEvent> { todo!() }
    /// Payload bytes that may be sent now.
    pub fn credit_bytes(&self) -> u64 { todo!() }
    /// The definition.
    pub fn define(&mut self, _spec: Vec<u8>) -> Res<Message> { todo!() }
    /// Begins a transfer on top of the standby's tip.
    pub fn begin(&mut self, _position: Position, _landing: Landing, _payload_max_bytes: u64) -> Res<Message> { todo!() }
    /// A piece of payload (whole records). Fails with `INTERNAL` beyond the credit.
    pub fn chunks(&mut self, _bytes: Vec<u8>) -> Res<Message> { todo!() }
    /// Asks that a direct transfer so far be made durable.
    pub fn segment(&mut self) -> Res<(u64, Message)> { todo!() }
    /// Ends the payload. The sender remembers the digest that the receipt must bring.
    pub fn end(&mut self, _cut_at: Moment) -> Res<(Digest, Message)> { todo!() }
    /// Gives up the open transfer.
    pub fn abort(&mut self, _reason: &str) -> Message { todo!() }
    /// Asks for digests of a range.
    pub fn want_digests(&mut self, _volume: u16, _start: u64, _count: u64) -> Res<Message> { todo!() }
    /// Resumes an open journalled transfer of which the standby holds `held_bytes` of payload (a prefix of what we sent,
    /// ending at a record): the hash state continues as if those bytes, given here in the same pieces, had just been sent.
    pub fn resume(&mut self, _position: Position, _held: &mut dyn Iterator<Item = &[u8]>) -> Res<()> { todo!() }
}

/// The receiver's half (the standby).
#[derive(Debug)]
pub struct Receiver { _p: () }

/// What the receiver is to do.
#[derive(Debug, PartialEq)]
pub enum ReceiverAction {
    /// Look the group up and answer with [`Receiver::welcome`].
    Greet { host: String, purpose: Purpose, group: GroupId, epoch: u64 },
    /// Make the definition durable, create the replicas, then send `Defined`.
    Define { spec: Vec<u8> },
    /// Reserve and open a transfer (position, parent and epoch were checked against the standing).
    Begin { position: Position, parent: Position, parent_digest: Digest, landing: Landing, payload_max_bytes: u64 },
    /// Check and store these whole records, then give the credit back.
    Store { bytes: Vec<u8> },
    /// Make the direct transfer durable, then send `SegmentDone`.
    Segment { number: u64 },
    /// Verify and commit, then answer with [`Receiver::committed`]. The digest is the chained one to seal under.
    Commit { position: Position, payload_bytes: u64, payload_digest: Digest, digest: Digest, cut_at: Moment },
    /// Drop the open transfer.
    Drop { reason: String },
    /// Send digests of this range of the replica.
    SendDigests { volume: u16, start: u64, count: u64 },
    /// An image conversation: the message as it is.
    Image(Message),
    /// Send this.
    Send(Message),
}

impl Receiver {
    /// A new conversation.
    pub fn new(_host: &str) -> Receiver { todo!() }
    /// Takes a message. Out of turn, wrong epoch (`STALE_EPOCH`), wrong parent (`CHAIN_BROKEN`): an error to send as `Refused`.
    pub fn on_message(&mut self, _message: Message) -> Res<ReceiverAction> { todo!() }
    /// The answer to a hello.
    pub fn welcome(&mut self, _standing: Standing, _credit_bytes: u64) -> Message { todo!() }
    /// Gives back credit for bytes that were stored.
    pub fn stored(&mut self, _bytes: u64) -> Message { todo!() }
    /// The acknowledgement: only for what is sealed, and only for what was asked.
    pub fn committed(&mut self, _proof: &dyn SealedProof) -> Res<Message> { todo!() }
}
