//! Images on their way to the standby, long before a disaster: exported, sent, proven, loaded.

use crate::agent::Agent;
use crate::agent::group::Group;
use crate::format::{FRAME_PAYLOAD_MAX, Message, Purpose, Standing};
use crate::link::Channel;
use crate::model::{Code, Fault, ImagePin, Res, Role};
use crate::session::{Receiver, ReceiverAction, Sender, SenderEvent};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(30);
/// Loading and proving an image on the standby may take this long.
const LOAD_PATIENCE: Duration = Duration::from_secs(600);
/// Pins are compared with the standby's again this often.
const CHECK_EVERY: Duration = Duration::from_secs(3600);
const PIECE_BYTES: usize = 512 << 10;

/// Starts the thread that keeps a group's images on the standby.
pub fn start_shipping(agent: &Arc<Agent>, group: &Arc<Group>) -> Res<()> {
    let (agent, group) = (agent.clone(), group.clone());
    std::thread::Builder::new()
        .name(format!("images-{}", group.name))
        .spawn(move || {
            let mut retry = Duration::from_secs(1);
            loop {
                let primary = group.record().is_ok_and(|r| r.role == Role::Primary && r.last_failover.is_none());
                if !primary {
                    return;
                }
                match ship(&agent, &group) {
                    Ok(()) => {
                        group.with_live(|live| live.clear(Code::ImageMissing));
                        retry = Duration::from_secs(1);
                        std::thread::sleep(CHECK_EVERY);
                    }
                    Err(fault) => {
                        tracing::warn!(group = %group.name, "images: {fault}");
                        // Named for what it means: a failover now would fail for want of an image.
                        group.with_live(|live| {
                            live.fault(Fault { code: Code::ImageMissing, ..fault });
                        });
                        std::thread::sleep(retry);
                        retry = (retry * 2).min(Duration::from_secs(60));
                    }
                }
            }
        })
        .map(drop)
        .map_err(|e| Fault::io("a new thread", &e))
}

fn spool(agent: &Agent, pin: &ImagePin, way: &str) -> PathBuf {
    let short: String = pin.config_digest.chars().filter(char::is_ascii_hexdigit).take(64).collect();
    agent.settings.state_dir.join("images").join(format!("{short}.{way}"))
}

fn ship(agent: &Agent, group: &Group) -> Res<()> {
    let record = group.record()?;
    let mut pins: Vec<ImagePin> = record.spec.containers.iter().map(|c| c.image.clone()).collect();
    pins.dedup();
    if pins.is_empty() {
        return Ok(());
    }
    // The group must be defined there first: that is the replicating thread's work.
    if group.with_live(|live| !live.connected) {
        return Err(Fault::new(Code::PeerUnreachable, "the standby", "it is not connected yet", "it is tried again by itself"));
    }
    let mut channel = agent.link.connect(&record.peer, Duration::from_secs(5))?;
    let (mut sender, hello) = Sender::new(&agent.settings.host, Purpose::Images, group.id, record.epoch);
    channel.send(&hello)?;
    let welcome = next(&mut channel, PATIENCE)?;
    match sender.on_message(welcome)? {
        SenderEvent::Welcome { .. } => {}
        other => return Err(Fault::protocol(format!("{other:?} came where a welcome was due"))),
    }
    for pin in pins {
        offer(agent, &mut channel, &pin)?;
        group.with_live(|live| {
            if !live.images_there.contains(&pin.config_digest) {
                live.images_there.push(pin.config_digest.clone());
            }
        });
    }
    Ok(())
}

/// The next message; a refusal is its fault.
fn next(channel: &mut Channel, patience: Duration) -> Res<Message> {
    match channel.recv(patience)? {
        Some(Message::Refused { fault }) => Err(fault),
        Some(message) => Ok(message),
        None => Err(Fault::new(
            Code::TimedOut,
            format!("peer {}", channel.peer()),
            "it did not answer in time",
            "it is tried again by itself",
        )),
    }
}

fn offer(agent: &Agent, channel: &mut Channel, pin: &ImagePin) -> Res<()> {
    let path = spool(agent, pin, "out");
    // Asked with length 0 first: most of the time the image is there and nothing need be exported.
    channel.send(&Message::ImageOffer { pin: pin.clone(), archive_bytes: 0 })?;
    match next(channel, LOAD_PATIENCE)? {
        Message::ImageWanted { from_byte: None } => return Ok(()),
        Message::ImageWanted { .. } => {}
        other => return Err(Fault::protocol(format!("{} came where an answer to an offer was due", kind(&other)))),
    }
    let name = if pin.name.is_empty() { &pin.config_digest } else { &pin.name };
    let outcome = (|| {
        let (found, archive_bytes) = agent.docker()?.export_image(name, &path)?;
        if found.config_digest != pin.config_digest || found.diff_ids != pin.diff_ids {
            return Err(Fault::new(
                Code::ImageMismatch,
                format!("image {name}"),
                "the image of that name is no longer the one that the container runs from",
                "recreate the container from the new image, or tag the old one again",
            ));
        }
        channel.send(&Message::ImageOffer { pin: pin.clone(), archive_bytes })?;
        let from = match next(channel, PATIENCE)? {
            Message::ImageWanted { from_byte: Some(from) } if from <= archive_bytes => from,
            Message::ImageWanted { from_byte: None } => return Ok(()),
            other => return Err(Fault::protocol(format!("{} came where an answer to an offer was due", kind(&other)))),
        };
        let io = |e: std::io::Error| Fault::io(path.display().to_string(), &e);
        let mut file = std::fs::File::open(&path).map_err(io)?;
        file.seek(SeekFrom::Start(from)).map_err(io)?;
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let len = file.read(&mut piece).map_err(io)?;
            if len == 0 {
                break;
            }
            channel.send(&Message::ImageBytes { bytes: piece[..len].to_vec() })?;
        }
        channel.send(&Message::ImageEnd)?;
        match next(channel, LOAD_PATIENCE)? {
            Message::ImageReady => Ok(()),
            other => Err(Fault::protocol(format!("{} came where a loaded image was due", kind(&other)))),
        }
    })();
    let _ = std::fs::remove_file(&path);
    outcome
}

fn kind(message: &Message) -> String {
    let words = format!("{message:?}");
    words.split([' ', '{']).next().unwrap_or_default().to_string()
}

/// The standby's side. An archive that was broken off is not resumed: `docker save` does not give the same bytes twice on every
/// version, so a kept beginning might not fit.
pub fn receive(agent: &Agent, group: &Group, channel: &mut Channel, receiver: &mut Receiver, standing: Standing) -> Res<()> {
    channel.send(&receiver.welcome(standing, 0))?;
    let mut current: Option<(ImagePin, u64, std::fs::File, PathBuf, u64)> = None;
    while let Some(message) = channel.recv(LOAD_PATIENCE)? {
        let message = match receiver.on_message(message)? {
            ReceiverAction::Image(message) => message,
            ReceiverAction::Send(answer) => {
                channel.send(&answer)?;
                continue;
            }
            _ => return Err(Fault::protocol("the message does not belong in a conversation about images")),
        };
        match message {
            Message::ImageOffer { pin, archive_bytes } => {
                let wanted = group.record()?.spec.containers.iter().any(|c| c.image == pin);
                if !wanted || pin.diff_ids.len() > 512 {
                    return Err(Fault::protocol("an image was offered that no container of the group needs"));
                }
                if let Some(id) = agent.docker()?.find_image(&pin)? {
                    remember(group, &pin, &id)?;
                    channel.send(&Message::ImageWanted { from_byte: None })?;
                    continue;
                }
                if archive_bytes > 0 {
                    let free = crate::host::free_bytes(&agent.settings.state_dir)?;
                    if archive_bytes.saturating_mul(2) > free {
                        return Err(Fault::new(
                            Code::StandbyDiskFull,
                            format!("image {}", pin.name),
                            format!("its archive of {archive_bytes} bytes does not fit into {free} free bytes"),
                            "free space on the standby's state directory",
                        ));
                    }
                    let path = spool(agent, &pin, "in");
                    let file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
                    let file = file.map_err(|e| Fault::io(path.display().to_string(), &e))?;
                    current = Some((pin, archive_bytes, file, path, 0));
                }
                channel.send(&Message::ImageWanted { from_byte: Some(0) })?;
            }
            Message::ImageBytes { bytes } => {
                let Some((_, total, file, path, got)) = &mut current else {
                    return Err(Fault::protocol("image bytes came without an offer"));
                };
                *got += bytes.len() as u64;
                if *got > *total || bytes.len() > FRAME_PAYLOAD_MAX {
                    return Err(Fault::protocol("more image bytes came than were offered"));
                }
                file.write_all(&bytes).map_err(|e| Fault::io(path.display().to_string(), &e))?;
            }
            Message::ImageEnd => {
                let Some((pin, total, file, path, got)) = current.take() else {
                    return Err(Fault::protocol("an image ended that had not begun"));
                };
                drop(file);
                let loaded = match got == total {
                    true => agent.docker().and_then(|d| d.import_image(&pin, &path)),
                    false => Err(Fault::protocol("fewer image bytes came than were offered")),
                };
                let _ = std::fs::remove_file(&path);
                remember(group, &pin, &loaded?)?;
                channel.send(&Message::ImageReady)?;
            }
            _ => return Err(Fault::protocol("the message does not belong in a conversation about images")),
        }
    }
    Ok(())
}

fn remember(group: &Group, pin: &ImagePin, id: &str) -> Res<()> {
    if group.record()?.images.get(&pin.config_digest).is_some_and(|known| known == id) {
        return Ok(());
    }
    group.edit_ledger(|record| {
        record.images.insert(pin.config_digest.clone(), id.to_string());
        Ok(())
    })
}
