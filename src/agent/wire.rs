//! A conversation as the primary's threads hold it: a channel, the sender's state, credit and keep-alive.

use crate::format::Message;
use crate::format::Purpose;
use crate::format::Standing;
use crate::link::{Bell, Channel};
use crate::model::{Code, Fault, GroupId, Res};
use crate::session::Sender;
use crate::session::SenderEvent;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Silence after which a peer that owes us an answer is taken for gone.
const SILENCE_MAX: Duration = Duration::from_secs(20);
const PING_EVERY: Duration = Duration::from_secs(5);

/// A conversation with the standby.
pub struct Wire {
    channel: Channel,
    /// The sender's half of the session.
    pub sender: Sender,
    events: VecDeque<SenderEvent>,
    heard: Instant,
    pinged: Instant,
}

impl Wire {
    /// Says hello on a fresh channel, to replicate with records of single sectors or without, and waits for the standby's standing.
    pub fn replicate(channel: Channel, host: &str, group: GroupId, epoch: u64, sectors: bool) -> Res<(Wire, Standing)> {
        Wire::greet(
            channel,
            match sectors {
                true => Sender::with_sectors(host, group, epoch),
                false => Sender::new(host, Purpose::Replicate, group, epoch),
            },
        )
    }

    fn greet(channel: Channel, (sender, hello): (Sender, Message)) -> Res<(Wire, Standing)> {
        let now = Instant::now();
        let mut wire = Wire { channel, sender, events: VecDeque::new(), heard: now, pinged: now };
        wire.send(&hello)?;
        match wire.wait()? {
            SenderEvent::Welcome { standing, .. } => Ok((wire, standing)),
            other => Err(Fault::protocol(format!("the peer answered a hello with {other:?}"))),
        }
    }

    /// Sends a message as it is. When the peer has hung up, its reason may have arrived before: that is the better answer.
    pub fn send(&mut self, message: &Message) -> Res<()> {
        let Err(broken) = self.channel.send(message) else { return Ok(()) };
        while let Ok(Some(message)) = self.channel.recv(Duration::from_millis(500)) {
            self.sender.on_message(message)?;
        }
        Err(broken)
    }

    /// Takes what has arrived, waiting at most `patience` for the first message.
    pub fn pump(&mut self, patience: Duration) -> Res<()> {
        let mut wait = patience;
        while let Some(message) = self.channel.recv(wait)? {
            self.heard = Instant::now();
            match self.sender.on_message(message)? {
                SenderEvent::Nothing => {}
                event => self.events.push_back(event),
            }
            wait = Duration::ZERO;
        }
        let now = Instant::now();
        if now - self.heard > SILENCE_MAX {
            return Err(Fault::new(
                Code::PeerUnreachable,
                format!("peer {}", self.channel.peer()),
                format!("nothing was heard for {} s", SILENCE_MAX.as_secs()),
                "it is tried again; check the other host and the network",
            ));
        }
        // Also while nothing is owed to us: the peer, too, takes long silence for a dead connection.
        if now - self.pinged > PING_EVERY {
            self.pinged = now;
            self.send(&Message::Ping)?;
        }
        Ok(())
    }

    /// Ends a wait in [`Wire::pump`] from another thread.
    pub fn bell(&self) -> Bell {
        self.channel.bell()
    }

    /// The next event, if one has come.
    pub fn take(&mut self) -> Option<SenderEvent> {
        self.events.pop_front()
    }

    /// Waits for the next event. The peer's silence counts from here: till now we may have been busy and not listened.
    pub fn wait(&mut self) -> Res<SenderEvent> {
        self.rested();
        loop {
            if let Some(event) = self.take() {
                return Ok(event);
            }
            self.pump(Duration::from_millis(500))?;
        }
    }

    /// Waits until `bytes` of payload may be sent.
    pub fn await_credit(&mut self, bytes: u64) -> Res<()> {
        if self.sender.credit_bytes() < bytes {
            self.rested();
        }
        while self.sender.credit_bytes() < bytes {
            self.pump(Duration::from_millis(500))?;
        }
        Ok(())
    }

    /// Sends a piece of payload, within the credit.
    pub fn payload(&mut self, piece: Vec<u8>) -> Res<()> {
        self.await_credit(piece.len() as u64)?;
        let message = self.sender.chunks(piece)?;
        self.send(&message)
    }

    /// Called now and then during long work that sends nothing (most blocks are there already): keeps the connection alive.
    pub fn breathe(&mut self) -> Res<()> {
        match self.pinged.elapsed() > PING_EVERY {
            true => {
                self.rested();
                self.pump(Duration::ZERO)
            }
            false => Ok(()),
        }
    }

    /// Nothing was asked of the peer for a while: its silence till now does not count.
    pub fn rested(&mut self) {
        self.heard = Instant::now();
    }
}
