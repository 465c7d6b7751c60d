//! The few words that two hosts exchange before frames flow: welcome or refusal, and the two proofs of a pairing.
//!
//! | bytes | meaning |
//! |---|---|
//! | `[0..2)` | u16 little endian, length of the rest, at most [`NOTE_BYTES_MAX`] |
//! | `[2..)` | a [`Note`] as JSON |
//!
//! The version of these words is the `1` in both ALPN names.

use crate::model::{Code, Digest, Fault, Res};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest note in bytes. All that a stranger can make us keep.
pub(in crate::link) const NOTE_BYTES_MAX: usize = 8 << 10;
/// Longest sentence that is taken from a peer, in characters.
const WORDS_MAX: usize = 300;

/// A note.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(in crate::link) enum Note {
    /// The listener knows the dialler's key: frames may flow (or, when pairing, the proof may come).
    Welcome {},
    /// The listener says why not, and closes.
    Refused { fault: Fault },
    /// The dialler proves the code and says who it is and where it listens.
    Prove { proof: Digest, name: String, address: String },
    /// The listener has kept the dialler's key, proves the code in turn and says who it is.
    Paired { proof: Digest, name: String },
}

/// Writes a note and flushes it.
pub(in crate::link) async fn write(io: &mut (impl AsyncWrite + Unpin), note: &Note) -> std::io::Result<()> {
    let mut bytes = vec![0; 2];
    serde_json::to_writer(&mut bytes, note)?;
    let length = u16::try_from(bytes.len() - 2).map_err(|_| std::io::ErrorKind::InvalidInput)?;
    bytes[..2].copy_from_slice(&length.to_le_bytes());
    io.write_all(&bytes).await?;
    io.flush().await
}

/// Reads a note. The outer error is the connection's, the inner one the note's (`PROTOCOL_ERROR`).
pub(in crate::link) async fn read(io: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Res<Note>> {
    let length = usize::from(io.read_u16_le().await?);
    if length > NOTE_BYTES_MAX {
        return Ok(Err(Fault::protocol(format!("a note of {length} bytes, the largest is {NOTE_BYTES_MAX}"))));
    }
    let mut bytes = vec![0; length];
    io.read_exact(&mut bytes).await?;
    Ok(match serde_json::from_slice(&bytes) {
        Ok(Note::Refused { fault }) => Ok(Note::Refused { fault: tidy(fault) }),
        Ok(note) => Ok(note),
        Err(_) => Err(Fault::protocol("a note that is none of those that this version knows")),
    })
}

/// A fault without control characters and of bounded length: it is printed on a terminal, and fits in a note.
pub(in crate::link) fn tidy(fault: Fault) -> Fault {
    let tidy = |text: String| text.chars().filter(|c| !c.is_control()).take(WORDS_MAX).collect::<String>();
    Fault::new(fault.code, tidy(fault.thing), tidy(fault.cause), tidy(fault.next))
}

/// The fault of a note that came out of turn.
pub(in crate::link) fn out_of_turn() -> Fault {
    Fault::protocol("a note out of turn")
}

/// The refusal of a key that is not pinned.
pub(in crate::link) fn stranger() -> Fault {
    Fault::new(
        Code::PeerNotTrusted,
        "this host",
        "the other side does not know its key",
        "pair the two hosts again: `doublure pair` there, then here with its code",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_note_arrives_as_it_was_and_a_strange_one_is_refused() {
        let mut wire = Vec::new();
        let sent = Note::Prove { proof: Digest([7; 32]), name: "lyon".into(), address: "[::1]:7".into() };
        write(&mut wire, &sent).await.unwrap();
        let got = read(&mut wire.as_slice()).await.unwrap().unwrap();
        assert_eq!(format!("{got:?}"), format!("{sent:?}"));
        for bad in [&b"\x02\0{}"[..], b"\x03\0\xff\xff\xff", b"\x0d\0{\"welcome\":1}", b"\0\0", b"\xff\xff"] {
            assert_eq!(read(&mut &bad[..]).await.unwrap().unwrap_err().code, Code::ProtocolError, "{bad:?}");
        }
        assert!(read(&mut &wire[..20]).await.is_err());
    }

    #[tokio::test]
    async fn a_refusal_fits_and_cannot_draw_on_the_terminal() {
        let fault = tidy(Fault::new(Code::Internal, "\u{1b}[2J\"".repeat(9999), "\\".repeat(9999), "é".repeat(9999)));
        let mut wire = Vec::new();
        write(&mut wire, &Note::Refused { fault }).await.unwrap();
        assert!(wire.len() <= NOTE_BYTES_MAX);
        let Note::Refused { fault } = read(&mut wire.as_slice()).await.unwrap().unwrap() else { panic!("another note") };
        assert!(!fault.to_string().contains('\u{1b}'));
    }
}
