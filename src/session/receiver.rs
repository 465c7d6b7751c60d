//! The receiver's half of the conversation: the standby's.

use crate::format::{Landing, Message, PROTOCOL, PROTOCOL_SECTORS, Purpose, Standing, generation_digest};
use crate::model::{Code, Digest, Fault, GroupId, Moment, Position, Res, Role, SealedProof, Uuid};
use crate::session::payload::Payload;
use crate::session::{chain_broken, follows, out_of_turn, stale, unknown_version};

/// The receiver's half (the standby).
///
/// An error of [`Receiver::on_message`] is sent as `Refused` and ends the conversation. Then, as when the connection breaks, ask
/// [`Receiver::into_open`] what may be resumed; an open generation of the journal that it does not name is to be dropped.
#[derive(Debug)]
pub struct Receiver {
    host: String,
    /// The version that the peer said in its hello.
    protocol: u16,
    stage: Stage,
    greeting: Greeting,
    /// The standby's tip, moved on by what was committed here.
    tip: Position,
    tip_digest: Digest,
    defined: bool,
    open: Option<OpenTransfer>,
    /// Whether `open` comes from an earlier connection and this one has not touched it.
    adopted: bool,
    /// Payload bytes that the peer may still send, and those that came and were not given back.
    credit: u64,
    owed: u64,
    segments: u64,
}

#[derive(Debug)]
enum Stage {
    Fresh,
    Greeted,
    Asking,
    Images(Image),
    Replicating,
    Committing { position: Position, digest: Digest },
    Closed,
}

#[derive(Debug)]
enum Image {
    None,
    /// Bytes of the archive that may still come, and whether any came.
    Offered {
        left: u64,
        begun: bool,
    },
}

/// What the peer said in its hello.
#[derive(Clone, Copy, Debug)]
struct Greeting {
    purpose: Purpose,
    group: GroupId,
    epoch: u64,
}

/// A journalled transfer that a broken connection left open: what it was, and the count and hash of the payload so far.
///
/// Taken from one receiver by [`Receiver::into_open`] and given to the next by [`Receiver::adopt`].
#[derive(Debug)]
pub struct OpenTransfer {
    group: GroupId,
    position: Position,
    parent: Position,
    parent_digest: Digest,
    landing: Landing,
    payload: Payload,
}

impl OpenTransfer {
    /// The group.
    pub fn group(&self) -> GroupId {
        self.group
    }
    /// The position that the generation will have.
    pub fn position(&self) -> Position {
        self.position
    }
    /// Payload bytes so far; must equal what the journal holds, or [`Receiver::welcome`] drops it.
    pub fn bytes(&self) -> u64 {
        self.payload.bytes()
    }
}

/// What the receiver is to do.
#[derive(Debug, PartialEq)]
pub enum ReceiverAction {
    /// Look the group up and answer with [`Receiver::welcome`].
    Greet {
        /// The peer's name, as it says.
        host: String,
        /// What for.
        purpose: Purpose,
        /// Which group.
        group: GroupId,
        /// The peer's epoch.
        epoch: u64,
    },
    /// Make the definition durable, create the replicas, then send `Defined`.
    Define {
        /// Canonical JSON of a `GroupSpec`, not yet looked at.
        spec: Vec<u8>,
    },
    /// Reserve and open a transfer (position, parent and epoch were checked against the standing). An open one is dropped. An epoch
    /// higher than the standing's is to be made durable first.
    Begin {
        /// The position that the generation will have.
        position: Position,
        /// Its parent, the tip.
        parent: Position,
        /// Its parent's digest.
        parent_digest: Digest,
        /// Where it lands.
        landing: Landing,
        /// The most bytes that its payload may have.
        payload_max_bytes: u64,
    },
    /// Check and store these whole records, then give the credit back.
    Store {
        /// Change records.
        bytes: Vec<u8>,
    },
    /// Make the direct transfer durable, then send `SegmentDone`.
    Segment {
        /// Its number, from 1 within a conversation.
        number: u64,
    },
    /// Verify and commit, then answer with [`Receiver::committed`]. The digest is the chained one to seal under.
    Commit {
        /// The position.
        position: Position,
        /// Length of the payload, equal to what came.
        payload_bytes: u64,
        /// blake3 of the payload, equal to what came.
        payload_digest: Digest,
        /// The chained digest.
        digest: Digest,
        /// When the cut began, as the primary says.
        cut_at: Moment,
    },
    /// The tip is good for this instant as well.
    Unchanged {
        /// The instant, as the primary says.
        at: Moment,
    },
    /// Drop the open transfer.
    Drop {
        /// The peer's words.
        reason: String,
    },
    /// Send digests of this range of the replica. It does not overflow, but is not yet checked against the volume.
    SendDigests {
        /// Number of the volume.
        volume: u16,
        /// First block.
        start: u64,
        /// Number of blocks, at least 1.
        count: u64,
    },
    /// An image conversation: the message as it is. No more bytes come than were offered.
    Image(Message),
    /// Send this.
    Send(Message),
}

impl Receiver {
    /// A new conversation.
    pub fn new(host: &str) -> Receiver {
        Receiver {
            host: host.to_string(),
            protocol: PROTOCOL,
            stage: Stage::Fresh,
            greeting: Greeting { purpose: Purpose::Ask, group: Uuid([0; 16]), epoch: 0 },
            tip: Position::default(),
            tip_digest: Digest::default(),
            defined: false,
            open: None,
            adopted: false,
            credit: 0,
            owed: 0,
            segments: 0,
        }
    }

    /// Takes a message. Out of turn, wrong epoch (`STALE_EPOCH`), wrong parent (`CHAIN_BROKEN`): an error to send as `Refused`.
    ///
    /// A payload that is not what its `End` says is `CORRUPT`: drop the open generation. A peer of another version is
    /// `VERSION_MISMATCH`. Any error ends the conversation.
    pub fn on_message(&mut self, message: Message) -> Res<ReceiverAction> {
        // A peer that gives up in words has sent nothing wrong: what it sent before may be resumed. One that broke the rules is not
        // taken at its earlier word either.
        let keeps_open = matches!(message, Message::Refused { .. });
        let action = self.take(message);
        if action.is_err() {
            self.stage = Stage::Closed;
            self.open = self.open.take().filter(|_| keeps_open);
        }
        action
    }

    fn take(&mut self, message: Message) -> Res<ReceiverAction> {
        match (&mut self.stage, message) {
            (Stage::Closed, message) => Err(out_of_turn(&message, "after the conversation has ended")),
            (_, Message::Refused { fault }) => Err(fault),
            (Stage::Fresh, Message::Hello { protocol, host, purpose, group, epoch }) => {
                if !(PROTOCOL..=PROTOCOL_SECTORS).contains(&protocol) {
                    return Err(unknown_version(protocol));
                }
                self.protocol = protocol;
                self.greeting = Greeting { purpose, group, epoch };
                self.stage = Stage::Greeted;
                Ok(ReceiverAction::Greet { host, purpose, group, epoch })
            }
            (Stage::Fresh, message) => Err(out_of_turn(&message, "before Hello")),
            (Stage::Greeted, message) => Err(out_of_turn(&message, "before Welcome")),
            (_, Message::Ping) => Ok(ReceiverAction::Send(Message::Pong)),
            (Stage::Images(image), message) => image.take(message),
            (Stage::Replicating, message) => self.replicate(message),
            (_, message) => Err(out_of_turn(&message, "here")),
        }
    }

    fn replicate(&mut self, message: Message) -> Res<ReceiverAction> {
        let at_rest = self.open.is_none() || self.adopted;
        match message {
            Message::Define { spec } if at_rest => {
                self.defined = true;
                Ok(ReceiverAction::Define { spec })
            }
            Message::Begin { position, parent, parent_digest, landing, payload_max_bytes } if at_rest && self.defined => {
                self.begin(position, parent, parent_digest, landing, payload_max_bytes)
            }
            Message::Chunks { bytes } => self.chunks(bytes),
            Message::Segment { number } if self.landing() == Some(Landing::Direct) && number == self.segments + 1 => {
                self.segments = number;
                Ok(ReceiverAction::Segment { number })
            }
            Message::End { payload_bytes, payload_digest, cut_at } => match self.open.take() {
                Some(open) => self.end(open, payload_bytes, payload_digest, cut_at),
                None => Err(Fault::protocol("End is out of turn without Begin")),
            },
            Message::Abort { reason } if self.open.is_some() => {
                self.open = None;
                Ok(ReceiverAction::Drop { reason })
            }
            Message::Unchanged { position, at } if at_rest && self.defined && position == self.tip && position.generation > 0 => {
                Ok(ReceiverAction::Unchanged { at })
            }
            Message::DigestsWanted { volume, start, count } if self.defined => match start.checked_add(count) {
                Some(_) if count > 0 => Ok(ReceiverAction::SendDigests { volume, start, count }),
                _ => Err(Fault::protocol(format!("digests of {count} blocks at {start} are wanted"))),
            },
            message => Err(out_of_turn(&message, "here")),
        }
    }

    fn landing(&self) -> Option<Landing> {
        self.open.as_ref().map(|open| open.landing)
    }

    fn begin(
        &mut self,
        position: Position,
        parent: Position,
        parent_digest: Digest,
        landing: Landing,
        max: u64,
    ) -> Res<ReceiverAction> {
        if parent != self.tip || parent_digest != self.tip_digest {
            return Err(chain_broken(format!("its parent is {parent}, the standby's last one is {}", self.tip)));
        }
        follows(position, self.tip, self.greeting.epoch)?;
        if landing == Landing::Direct && self.tip.generation != 0 {
            return Err(Fault::protocol(format!("a direct transfer would overwrite generation {}", self.tip)));
        }
        let group = self.greeting.group;
        self.open = Some(OpenTransfer { group, position, parent, parent_digest, landing, payload: Payload::new(max) });
        self.adopted = false;
        Ok(ReceiverAction::Begin { position, parent, parent_digest, landing, payload_max_bytes: max })
    }

    fn chunks(&mut self, bytes: Vec<u8>) -> Res<ReceiverAction> {
        let Some(open) = &mut self.open else { return Err(Fault::protocol("Chunks is out of turn without Begin")) };
        let len = bytes.len() as u64;
        if len > self.credit {
            return Err(Fault::protocol(format!("{len} bytes of payload came with a credit of {}", self.credit)));
        }
        open.payload.take(&bytes)?;
        self.adopted = false;
        self.credit -= len;
        self.owed += len;
        Ok(ReceiverAction::Store { bytes })
    }

    fn end(&mut self, open: OpenTransfer, payload_bytes: u64, payload_digest: Digest, cut_at: Moment) -> Res<ReceiverAction> {
        let OpenTransfer { position, parent, parent_digest, payload, .. } = open;
        if payload_bytes != payload.bytes() || payload_digest != payload.digest() {
            return Err(Fault::new(
                Code::Corrupt,
                format!("generation {position}"),
                format!("{} bytes came that are not the {payload_bytes} bytes that were sent", payload.bytes()),
                "it is dropped and sent again",
            ));
        }
        let digest =
            generation_digest(self.greeting.group, position, parent, parent_digest, payload_bytes, payload_digest, cut_at);
        self.stage = Stage::Committing { position, digest };
        self.adopted = false;
        Ok(ReceiverAction::Commit { position, payload_bytes, payload_digest, digest, cut_at })
    }

    /// Takes over what an earlier connection left open: between the `Greet` and [`Receiver::welcome`], which keeps it only if
    /// it still fits the group, the epoch, the tip and what the journal holds.
    pub fn adopt(&mut self, open: OpenTransfer) {
        if matches!(self.stage, Stage::Greeted) {
            self.open = Some(open);
        }
    }

    /// The answer to a hello: `Welcome`, or `Refused` when this side may not receive (`STALE_EPOCH`, `WRONG_ROLE`), which ends the
    /// conversation. The standing must be the final word: a commit that an earlier connection asked for has to be over by now.
    /// `standing.open` is what the journal holds; the peer is told of it only if it can be resumed here.
    pub fn welcome(&mut self, standing: Standing, credit_bytes: u64) -> Message {
        let Greeting { purpose, epoch, .. } = self.greeting;
        let refusal = match &self.stage {
            Stage::Greeted if purpose == Purpose::Ask => None,
            Stage::Greeted if standing.epoch > epoch => Some(stale(epoch, standing.epoch)),
            Stage::Greeted if standing.role != Role::Standby => Some(wrong_role(&self.host, standing.role)),
            Stage::Greeted => None,
            _ => Some(Fault::internal("Welcome", "it was to be sent where the conversation has no place for it")),
        };
        if let Some(fault) = refusal {
            self.stage = Stage::Closed;
            return Message::Refused { fault };
        }
        let mut standing = standing;
        self.stage = match purpose {
            Purpose::Ask => Stage::Asking,
            Purpose::Images => Stage::Images(Image::None),
            Purpose::Replicate => {
                self.open = self.open.take().filter(|open| open.fits(self.greeting, &standing));
                self.adopted = self.open.is_some();
                standing.open = self.open.as_ref().map(|open| (open.position, open.bytes()));
                Stage::Replicating
            }
        };
        (self.tip, self.tip_digest, self.defined) = (standing.tip, standing.tip_digest, standing.defined);
        self.credit = credit_bytes;
        Message::Welcome { protocol: self.protocol, host: self.host.clone(), standing, credit_bytes }
    }

    /// Gives back credit for bytes that were stored, at most those that came.
    pub fn stored(&mut self, bytes: u64) -> Message {
        let bytes = bytes.min(self.owed);
        self.owed -= bytes;
        self.credit += bytes;
        Message::Credit { bytes }
    }

    /// The acknowledgement: only for what is sealed, and only for what was asked. `INTERNAL` otherwise, which ends the conversation.
    pub fn committed(&mut self, proof: &dyn SealedProof) -> Res<Message> {
        match self.stage {
            Stage::Committing { position, digest } if proof.position() == position && proof.digest() == digest => {
                (self.tip, self.tip_digest) = (position, digest);
                self.stage = Stage::Replicating;
                Ok(Message::Committed { position, digest })
            }
            _ => {
                self.stage = Stage::Closed;
                let cause = format!("generation {} is sealed, which nobody asked for here", proof.position());
                Err(Fault::internal("an acknowledgement", cause))
            }
        }
    }

    /// At the end of a connection: the journalled transfer that the next one may resume. `None` for a direct one (its durable
    /// segments are found by comparing), for one whose `End` has come, and after an error in what came.
    pub fn into_open(self) -> Option<OpenTransfer> {
        self.open.filter(|open| open.landing == Landing::Journal)
    }
}

impl OpenTransfer {
    fn fits(&self, greeting: Greeting, standing: &Standing) -> bool {
        self.group == greeting.group
            && self.landing == Landing::Journal
            && self.position.epoch == greeting.epoch
            && (self.parent, self.parent_digest) == (standing.tip, standing.tip_digest)
            && standing.open == Some((self.position, self.bytes()))
    }
}

impl Image {
    fn take(&mut self, message: Message) -> Res<ReceiverAction> {
        *self = match (&*self, &message) {
            (Image::None | Image::Offered { begun: false, .. }, Message::ImageOffer { archive_bytes, .. }) => {
                Image::Offered { left: *archive_bytes, begun: false }
            }
            (Image::Offered { left, .. }, Message::ImageBytes { bytes }) => match left.checked_sub(bytes.len() as u64) {
                Some(left) if !bytes.is_empty() => Image::Offered { left, begun: true },
                _ => return Err(Fault::protocol("a piece of an image is empty or more than was offered")),
            },
            (Image::Offered { .. }, Message::ImageEnd) => Image::None,
            _ => return Err(out_of_turn(&message, "here")),
        };
        Ok(ReceiverAction::Image(message))
    }
}

/// The fault for a host that is asked to receive and is no standby.
pub fn wrong_role(host: &str, role: Role) -> Fault {
    let role = format!("{role:?}").to_lowercase();
    let next = "ask both hosts with `doublure status`; the way back is `doublure failback`";
    Fault::new(Code::WrongRole, format!("host {host}"), format!("it is {role} of the group, not standby"), next)
}
