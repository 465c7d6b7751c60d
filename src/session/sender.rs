//! The sender's half of the conversation: the primary's.

use crate::format::{
    CONTROL_MAX, FRAME_PAYLOAD_MAX, Landing, Message, PROTOCOL, PROTOCOL_SECTORS, Purpose, Standing, generation_digest,
};
use crate::model::{Code, Digest, Fault, GroupId, Moment, Position, Res, Role};
use crate::session::payload::Payload;
use crate::session::receiver::wrong_role;
use crate::session::{Acknowledged, chain_broken, follows, out_of_turn, stale, unknown_version};
use std::collections::VecDeque;

/// Ranges of digests that may be asked for before the first is answered.
const RANGES_MAX: usize = 64;

/// The sender's half (the primary). Made when the connection is up.
///
/// Its own methods fail with `INTERNAL` (or `CHAIN_BROKEN`, `STALE_EPOCH`) when they are called out of turn; nothing has changed then
/// and nothing is to be sent. An error of [`Sender::on_message`] ends the conversation.
#[derive(Debug)]
pub struct Sender {
    /// The version that was said in `Hello`, and must come back.
    protocol: u16,
    purpose: Purpose,
    group: GroupId,
    epoch: u64,
    stage: Stage,
    /// What the standby said of itself, its tip moved on by what it committed since.
    tip: Position,
    tip_digest: Digest,
    defined: bool,
    /// A beginning that the standby holds and that this conversation has not touched.
    held: Option<(Position, u64)>,
    credit: u64,
    segments_sent: u64,
    segments_done: u64,
    ranges: VecDeque<Range>,
}

#[derive(Debug)]
enum Stage {
    Greeting,
    Ready,
    Defining,
    Open(Open),
    Ended { position: Position, digest: Digest },
    Closed,
}

/// A transfer under way. Its parent is the sender's `tip`.
#[derive(Debug)]
struct Open {
    position: Position,
    landing: Landing,
    payload: Payload,
}

/// A range of digests that was asked for: what is still to come of it.
#[derive(Debug)]
struct Range {
    volume: u16,
    next: u64,
    end: u64,
}

/// What the sender learns from a message.
#[derive(Debug, PartialEq)]
pub enum SenderEvent {
    /// The standby introduced itself.
    Welcome {
        /// Its name.
        host: String,
        /// How it stands to the group.
        standing: Standing,
    },
    /// The definition is durable there.
    Defined,
    /// A segment of a direct transfer is durable there.
    SegmentDone {
        /// Its number.
        number: u64,
    },
    /// The generation is committed; the only way to obtain a receipt. Its digest was checked against ours.
    Committed(Acknowledged),
    /// Digests of a range.
    Digests {
        /// Number of the volume.
        volume: u16,
        /// First block.
        start: u64,
        /// 16 bytes a block.
        digests: Vec<u8>,
    },
    /// The range is done.
    DigestsDone {
        /// Number of the volume.
        volume: u16,
    },
    /// An answer in an image conversation (`ImageWanted` or `ImageReady`), as it is.
    Image(Message),
    /// Credit was added, or a pong came: nothing to do.
    Nothing,
}

impl Sender {
    /// A new conversation and the `Hello` to send.
    pub fn new(host: &str, purpose: Purpose, group: GroupId, epoch: u64) -> (Sender, Message) {
        Sender::speaking(PROTOCOL, host, purpose, group, epoch)
    }

    /// The same to replicate with sector records in the payload. A standby that does not know them refuses it with `VERSION_MISMATCH`,
    /// before anything is sent: replicate without them then, or say so.
    pub fn with_sectors(host: &str, group: GroupId, epoch: u64) -> (Sender, Message) {
        Sender::speaking(PROTOCOL_SECTORS, host, Purpose::Replicate, group, epoch)
    }

    fn speaking(protocol: u16, host: &str, purpose: Purpose, group: GroupId, epoch: u64) -> (Sender, Message) {
        let sender = Sender {
            protocol,
            purpose,
            group,
            epoch,
            stage: Stage::Greeting,
            tip: Position::default(),
            tip_digest: Digest::default(),
            defined: false,
            held: None,
            credit: 0,
            segments_sent: 0,
            segments_done: 0,
            ranges: VecDeque::new(),
        };
        (sender, Message::Hello { protocol, host: host.to_string(), purpose, group, epoch })
    }

    /// Takes a message. A `Refused` becomes its fault; anything out of turn is `PROTOCOL_ERROR`.
    ///
    /// Any error ends the conversation: whatever comes after it is refused. A receipt that names another digest is `CORRUPT`; a
    /// standby of a higher epoch is `STALE_EPOCH`, one that is no standby `WRONG_ROLE`.
    pub fn on_message(&mut self, message: Message) -> Res<SenderEvent> {
        let event = self.take(message);
        if event.is_err() {
            self.stage = Stage::Closed;
        }
        event
    }

    fn take(&mut self, message: Message) -> Res<SenderEvent> {
        match (&self.stage, message) {
            (Stage::Closed, message) => Err(out_of_turn(&message, "after the conversation has ended")),
            // The standby tells this from where it stands ("it speaks version 2"); here it must be said the other way round.
            (Stage::Greeting, Message::Refused { fault })
                if self.protocol == PROTOCOL_SECTORS && fault.code == Code::VersionMismatch =>
            {
                Err(no_sectors())
            }
            (_, Message::Refused { fault }) => Err(fault),
            (Stage::Greeting, Message::Welcome { protocol, host, standing, credit_bytes }) => {
                self.welcomed(protocol, host, standing, credit_bytes)
            }
            (Stage::Greeting, message) => Err(out_of_turn(&message, "before Welcome")),
            (_, Message::Ping | Message::Pong) => Ok(SenderEvent::Nothing),
            (_, message @ (Message::ImageWanted { .. } | Message::ImageReady)) if self.purpose == Purpose::Images => {
                Ok(SenderEvent::Image(message))
            }
            (_, message) if self.purpose != Purpose::Replicate => {
                Err(out_of_turn(&message, "in a conversation of another purpose"))
            }
            (_, Message::Credit { bytes }) => {
                let credit = self.credit.checked_add(bytes);
                self.credit = credit.ok_or_else(|| Fault::protocol("the credit is more than can be counted"))?;
                Ok(SenderEvent::Nothing)
            }
            (Stage::Defining, Message::Defined) => {
                self.stage = Stage::Ready;
                self.defined = true;
                Ok(SenderEvent::Defined)
            }
            (_, Message::SegmentDone { number })
                if self.segments_done < self.segments_sent && number == self.segments_done + 1 =>
            {
                self.segments_done = number;
                Ok(SenderEvent::SegmentDone { number })
            }
            (Stage::Ended { position, digest }, Message::Committed { position: theirs, digest: their_digest }) => {
                let (position, digest) = (*position, *digest);
                self.committed(position, digest, theirs, their_digest)
            }
            (_, Message::Digests { volume, start, digests }) => self.digests(volume, start, digests),
            (_, Message::DigestsDone { volume }) if self.ranges.front().is_some_and(|range| range.volume == volume) => {
                self.ranges.pop_front();
                Ok(SenderEvent::DigestsDone { volume })
            }
            (_, message) => Err(out_of_turn(&message, "here")),
        }
    }

    fn welcomed(&mut self, protocol: u16, host: String, standing: Standing, credit_bytes: u64) -> Res<SenderEvent> {
        if protocol != self.protocol {
            return Err(unknown_version(protocol));
        }
        if self.purpose != Purpose::Ask {
            if standing.epoch > self.epoch {
                return Err(stale(self.epoch, standing.epoch));
            }
            if standing.role != Role::Standby {
                return Err(wrong_role(&host, standing.role));
            }
        }
        self.stage = Stage::Ready;
        (self.tip, self.tip_digest) = (standing.tip, standing.tip_digest);
        (self.defined, self.held) = (standing.defined, standing.open);
        self.credit = credit_bytes;
        Ok(SenderEvent::Welcome { host, standing })
    }

    fn committed(&mut self, ours: Position, digest: Digest, theirs: Position, their_digest: Digest) -> Res<SenderEvent> {
        if theirs != ours || self.segments_done != self.segments_sent {
            return Err(Fault::protocol(format!("generation {theirs} is said to be committed, {ours} was sent")));
        }
        if their_digest != digest {
            return Err(Fault::new(
                Code::Corrupt,
                format!("generation {ours}"),
                format!("the standby committed digest {their_digest}, {digest} was sent"),
                "nothing is called in sync; both sides are compared in full",
            ));
        }
        (self.tip, self.tip_digest) = (ours, digest);
        self.stage = Stage::Ready;
        Ok(SenderEvent::Committed(Acknowledged { position: ours, digest }))
    }

    fn digests(&mut self, volume: u16, start: u64, digests: Vec<u8>) -> Res<SenderEvent> {
        let count = digests.len() as u64 / 16;
        let end = start.checked_add(count);
        match self.ranges.front_mut() {
            Some(range)
                if range.volume == volume && start >= range.next && end.is_some_and(|end| end <= range.end) && count > 0 =>
            {
                range.next = start + count;
                Ok(SenderEvent::Digests { volume, start, digests })
            }
            _ => Err(Fault::protocol("digests came that nobody asked for")),
        }
    }

    /// Whether the payload may hold sector records.
    pub fn sectors(&self) -> bool {
        self.protocol == PROTOCOL_SECTORS
    }

    /// Payload bytes that may be sent now.
    pub fn credit_bytes(&self) -> u64 {
        self.credit
    }

    /// A receipt lost with an earlier connection: when the standby's tip, as it stands in its `Welcome`, is exactly the generation
    /// that was ended there as `position` with `digest`, it is committed.
    pub fn settled(&self, position: Position, digest: Digest) -> Option<Acknowledged> {
        let here = self.purpose == Purpose::Replicate && !matches!(self.stage, Stage::Greeting | Stage::Closed);
        let same = self.tip == position && self.tip_digest == digest && position.generation > 0;
        (here && same).then_some(Acknowledged { position, digest })
    }

    /// The definition.
    pub fn define(&mut self, spec: Vec<u8>) -> Res<Message> {
        self.replicating(matches!(self.stage, Stage::Ready), "Define")?;
        if spec.len() > CONTROL_MAX {
            let cause = format!("its definition has {} bytes, {CONTROL_MAX} can be sent", spec.len());
            return Err(Fault::new(Code::BadArgument, "the group", cause, "protect fewer containers in one group"));
        }
        self.stage = Stage::Defining;
        Ok(Message::Define { spec })
    }

    /// Begins a transfer on top of the standby's tip. `CHAIN_BROKEN` or `STALE_EPOCH` when `position` does not follow it. A beginning
    /// that the standby holds is dropped by it.
    pub fn begin(&mut self, position: Position, landing: Landing, payload_max_bytes: u64) -> Res<Message> {
        self.replicating(matches!(self.stage, Stage::Ready) && self.defined, "Begin")?;
        follows(position, self.tip, self.epoch)?;
        if landing == Landing::Direct && self.tip.generation != 0 {
            return Err(Fault::internal("a direct transfer", "the standby has something committed that it would overwrite"));
        }
        self.held = None;
        self.stage = Stage::Open(Open { position, landing, payload: Payload::new(payload_max_bytes) });
        Ok(Message::Begin { position, parent: self.tip, parent_digest: self.tip_digest, landing, payload_max_bytes })
    }

    /// A piece of payload (whole records). Fails with `INTERNAL` beyond the credit.
    pub fn chunks(&mut self, bytes: Vec<u8>) -> Res<Message> {
        let Stage::Open(open) = &mut self.stage else { return Err(misplaced("Chunks")) };
        let len = bytes.len() as u64;
        if len > self.credit || bytes.len() > FRAME_PAYLOAD_MAX {
            let cause = format!("{len} bytes, with a credit of {} and frames of {FRAME_PAYLOAD_MAX}", self.credit);
            return Err(Fault::internal("a piece of payload", cause));
        }
        open.payload.take(&bytes).map_err(|fault| Fault::internal("a piece of payload", fault.cause))?;
        self.credit -= len;
        Ok(Message::Chunks { bytes })
    }

    /// Asks that a direct transfer so far be made durable. Segments are numbered from 1 within a conversation.
    pub fn segment(&mut self) -> Res<(u64, Message)> {
        if !matches!(&self.stage, Stage::Open(open) if open.landing == Landing::Direct) {
            return Err(misplaced("Segment"));
        }
        self.segments_sent += 1;
        Ok((self.segments_sent, Message::Segment { number: self.segments_sent }))
    }

    /// Ends the payload. The sender remembers the digest that the receipt must bring.
    pub fn end(&mut self, cut_at: Moment) -> Res<(Digest, Message)> {
        let Stage::Open(Open { position, payload, .. }) = &self.stage else { return Err(misplaced("End")) };
        let (position, payload_bytes, payload_digest) = (*position, payload.bytes(), payload.digest());
        let digest = generation_digest(self.group, position, self.tip, self.tip_digest, payload_bytes, payload_digest, cut_at);
        self.stage = Stage::Ended { position, digest };
        Ok((digest, Message::End { payload_bytes, payload_digest, cut_at }))
    }

    /// Gives up the open transfer, or the beginning that the standby holds. With neither (an ended transfer above all, whose commit
    /// cannot be called back) it ends the conversation: what became of it stands in the next `Welcome`.
    pub fn abort(&mut self, reason: &str) -> Message {
        self.stage = match (&self.stage, self.held.take()) {
            (Stage::Open(_), _) | (Stage::Ready, Some(_)) => Stage::Ready,
            _ => Stage::Closed,
        };
        Message::Abort { reason: reason.to_string() }
    }

    /// Says that nothing has changed since the standby's tip up to `at`. `INTERNAL` while a transfer is open or before the first.
    pub fn unchanged(&mut self, at: Moment) -> Res<Message> {
        match self.stage {
            Stage::Ready if self.tip.generation > 0 => Ok(Message::Unchanged { position: self.tip, at }),
            _ => Err(Fault::internal("Unchanged", "it was to be said where the conversation has no place for it")),
        }
    }

    /// Asks for digests of a range of `count` blocks (at least 1). Several ranges may be asked for before the first is answered.
    pub fn want_digests(&mut self, volume: u16, start: u64, count: u64) -> Res<Message> {
        self.replicating(matches!(self.stage, Stage::Ready | Stage::Open(_)) && self.defined, "DigestsWanted")?;
        match start.checked_add(count) {
            Some(end) if count > 0 && self.ranges.len() < RANGES_MAX => {
                self.ranges.push_back(Range { volume, next: start, end });
                Ok(Message::DigestsWanted { volume, start, count })
            }
            _ => {
                Err(Fault::internal("a range of digests", format!("{count} blocks at {start}, {} asked for", self.ranges.len())))
            }
        }
    }

    /// Resumes an open journalled transfer of which the standby holds `held_bytes` of payload (a prefix of what we sent,
    /// ending at a record): the hash state continues as if those bytes, given here in the same pieces, had just been sent.
    ///
    /// The caller must know that the beginning is of this very payload: a position and a count do not tell it from another payload that
    /// was begun at the same position and given up while the connection broke. Where a position was begun with more than one payload,
    /// [`Sender::begin`] afresh. A wrong guess can never be committed (the `End` does not match), but it costs a refused transfer.
    ///
    /// The pieces may be cut anywhere; together they must have exactly the length that the `Welcome` said. Nothing is to be sent: go on
    /// with [`Sender::chunks`] or [`Sender::end`]. Errors leave the beginning alone; [`Sender::begin`] afresh then.
    pub fn resume(&mut self, position: Position, held: &mut dyn Iterator<Item = &[u8]>) -> Res<()> {
        self.replicating(matches!(self.stage, Stage::Ready) && self.defined, "a resumed transfer")?;
        follows(position, self.tip, self.epoch)?;
        let Some((theirs, held_bytes)) = self.held.filter(|(theirs, _)| *theirs == position) else {
            return Err(chain_broken(format!("the standby holds no beginning of generation {position}")));
        };
        // The announced maximum was said in the connection that broke; the standby still holds us to it.
        let mut payload = Payload::new(u64::MAX);
        for piece in held.filter(|piece| !piece.is_empty()) {
            payload.take(piece)?;
            if payload.bytes() > held_bytes {
                break;
            }
        }
        if payload.bytes() != held_bytes {
            let cause = format!("the standby holds {held_bytes} bytes of generation {theirs}, {} were given", payload.bytes());
            return Err(Fault::internal("a resumed transfer", cause));
        }
        self.held = None;
        self.stage = Stage::Open(Open { position, landing: Landing::Journal, payload });
        Ok(())
    }

    fn replicating(&self, in_turn: bool, what: &str) -> Res<()> {
        match in_turn && self.purpose == Purpose::Replicate {
            true => Ok(()),
            false => Err(misplaced(what)),
        }
    }
}

/// The fault for a standby that is older than sector records.
fn no_sectors() -> Fault {
    Fault::new(
        Code::VersionMismatch,
        "the standby",
        "its release of doublure does not know records of single sectors, which cuts of captured writes need",
        "install the same release of doublure on both hosts, the standby first; until then set mode = \"freeze\"",
    )
}

fn misplaced(what: &str) -> Fault {
    Fault::internal(what, "it was to be sent where the conversation has no place for it")
}
