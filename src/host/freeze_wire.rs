//! What agent and freeze helper say to each other: one fixed-size packet per message, descriptors beside it; and the two ioctls.

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// The helper's end of the socket.
pub(super) const HELPER_FD: RawFd = 3;
/// Most file systems in one freeze; the kernel passes at most 253 descriptors at a time.
pub(super) const MOUNTS_MAX: usize = 250;
/// Length of every packet, in bytes: kind, verdict or zero, two zeroes, u32 mount index, u64 id, u64 value; little-endian.
const PACKET: usize = 24;

/// A message; the first two go to the helper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// Freeze the file systems of the descriptors that come along.
    Freeze { id: u64, deadline: Duration },
    /// Thaw them.
    Thaw { id: u64 },
    /// The helper is up.
    Hello,
    /// All are frozen.
    Frozen { id: u64 },
    /// None is frozen: the mount at `index` failed with `errno` (ETIMEDOUT: the deadline came first).
    Failed { id: u64, errno: i32, index: u32 },
    /// They were frozen for so long, and how that ended.
    Thawed { id: u64, held: Duration, end: End },
}

/// How a freeze ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Thawed because we were asked.
    Asked,
    /// The deadline came first.
    Late,
    /// Somebody else had thawed one of them.
    Stolen,
    /// The kernel refused to thaw one.
    Refused,
}

impl Message {
    fn bytes(self) -> [u8; PACKET] {
        let nanos = |d: Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
        let (kind, end, index, id, value) = match self {
            Message::Freeze { id, deadline } => (1, 0, 0, id, nanos(deadline)),
            Message::Thaw { id } => (2, 0, 0, id, 0),
            Message::Hello => (3, 0, 0, 0, 0),
            Message::Frozen { id } => (4, 0, 0, id, 0),
            Message::Failed { id, errno, index } => (5, 0, index, id, errno as u64),
            Message::Thawed { id, held, end } => (6, end as u8, 0, id, nanos(held)),
        };
        let mut bytes = [0; PACKET];
        bytes[0] = kind;
        bytes[1] = end;
        bytes[4..8].copy_from_slice(&u32::to_le_bytes(index));
        bytes[8..16].copy_from_slice(&u64::to_le_bytes(id));
        bytes[16..24].copy_from_slice(&u64::to_le_bytes(value));
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Option<Message> {
        let bytes: &[u8; PACKET] = bytes.try_into().ok()?;
        let index = u32::from_le_bytes(bytes[4..8].try_into().ok()?);
        let id = u64::from_le_bytes(bytes[8..16].try_into().ok()?);
        let value = u64::from_le_bytes(bytes[16..24].try_into().ok()?);
        Some(match bytes[0] {
            1 => Message::Freeze { id, deadline: Duration::from_nanos(value) },
            2 => Message::Thaw { id },
            3 => Message::Hello,
            4 => Message::Frozen { id },
            5 => Message::Failed { id, errno: i32::try_from(value).ok()?, index },
            6 => {
                let end = [End::Asked, End::Late, End::Stolen, End::Refused].into_iter().find(|end| *end as u8 == bytes[1])?;
                Message::Thawed { id, held: Duration::from_nanos(value), end }
            }
            _ => return None,
        })
    }
}

/// Sends a message with descriptors.
pub(super) fn send(socket: &OwnedFd, message: Message, fds: &[RawFd]) -> nix::Result<()> {
    let bytes = message.bytes();
    let rights = [ControlMessage::ScmRights(fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&bytes)], control, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Receives a message; `None` when the other end is gone or talks nonsense, which both mean: stop.
pub(super) fn receive(socket: &OwnedFd) -> Option<(Message, Vec<OwnedFd>)> {
    loop {
        let mut bytes = [0; PACKET];
        let mut control = nix::cmsg_space!([RawFd; MOUNTS_MAX]);
        let mut fds = Vec::new();
        let got = {
            let mut into = [IoSliceMut::new(&mut bytes)];
            match recvmsg::<()>(socket.as_raw_fd(), &mut into, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC) {
                Ok(packet) => {
                    for message in packet.cmsgs().ok()? {
                        if let ControlMessageOwned::ScmRights(passed) = message {
                            // SAFETY: the kernel has just made these descriptors for us, and nobody else knows them.
                            fds.extend(passed.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                        }
                    }
                    packet.bytes
                }
                Err(Errno::EINTR) => continue,
                Err(_) => return None,
            }
        };
        return Message::from_bytes(bytes.get(..got)?).map(|message| (message, fds));
    }
}

const FIFREEZE: libc::Ioctl = nix::request_code_readwrite!(b'X', 119, size_of::<libc::c_int>());
const FITHAW: libc::Ioctl = nix::request_code_readwrite!(b'X', 120, size_of::<libc::c_int>());

/// Freezes the file system of a descriptor. Cannot be interrupted; waits for its writers and its own sync.
pub(super) fn fifreeze(fd: &OwnedFd) -> nix::Result<()> {
    // SAFETY: the ioctl ignores its argument.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), FIFREEZE, 0) }).map(drop)
}

/// Thaws the file system of a descriptor; false when it was not frozen. Tries again for a while when the kernel fails at it.
pub(super) fn fithaw(fd: &OwnedFd) -> nix::Result<bool> {
    let mut tries = 0;
    loop {
        // SAFETY: the ioctl ignores its argument.
        match Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), FITHAW, 0) }) {
            Ok(_) => return Ok(true),
            Err(Errno::EINVAL) => return Ok(false),
            Err(Errno::EINTR) => {}
            Err(error) if tries == 20 => return Err(error),
            Err(_) => {
                tries += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use proptest::prelude::*;

    fn any_message() -> impl Strategy<Value = Message> {
        let span = any::<u64>().prop_map(Duration::from_nanos);
        let end = prop_oneof![Just(End::Asked), Just(End::Late), Just(End::Stolen), Just(End::Refused)];
        prop_oneof![
            (any::<u64>(), span.clone()).prop_map(|(id, deadline)| Message::Freeze { id, deadline }),
            any::<u64>().prop_map(|id| Message::Thaw { id }),
            Just(Message::Hello),
            any::<u64>().prop_map(|id| Message::Frozen { id }),
            (any::<u64>(), 0..i32::MAX, any::<u32>()).prop_map(|(id, errno, index)| Message::Failed { id, errno, index }),
            (any::<u64>(), span, end).prop_map(|(id, held, end)| Message::Thawed { id, held, end }),
        ]
    }

    proptest! {
        #[test]
        fn a_message_survives_its_packet(message in any_message()) {
            prop_assert_eq!(Message::from_bytes(&message.bytes()), Some(message));
        }
        #[test]
        fn nonsense_is_no_message_and_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            if let Some(message) = Message::from_bytes(&bytes) {
                prop_assert!(bytes.len() == PACKET && (1..=6).contains(&bytes[0]), "{:?}", message);
            }
        }
    }

    #[test]
    fn descriptors_travel_with_their_message_and_a_closed_end_is_noticed() {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let files: Vec<std::fs::File> = (0..MOUNTS_MAX).map(|_| std::fs::File::open("/").unwrap()).collect();
        let fds: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        send(&a, Message::Thaw { id: 5 }, &fds).unwrap();
        let (message, got) = receive(&b).unwrap();
        assert_eq!((message, got.len()), (Message::Thaw { id: 5 }, MOUNTS_MAX));
        drop(a);
        assert!(receive(&b).is_none());
        assert_eq!(send(&b, Message::Hello, &[]), Err(Errno::EPIPE));
    }
}
