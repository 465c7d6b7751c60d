//! Lines from a socket, bounded in length and in time.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// What came instead of a line.
#[derive(Debug)]
pub(super) enum NoLine {
    /// The other side closed, after this many bytes of an unfinished line.
    End(usize),
    /// The line is longer than allowed.
    TooLong,
    /// The time is over.
    Late,
    /// The socket failed.
    Io(std::io::Error),
}

/// Reads lines from a stream; holds at most one line and one read's worth of bytes.
pub(super) struct Lines<'a> {
    stream: &'a UnixStream,
    held: Vec<u8>,
    /// Bytes of `held` that are known to have no newline: a long line is scanned once, not once a read.
    scanned: usize,
    max_bytes: usize,
}

const READ_BYTES: usize = 64 << 10;

impl<'a> Lines<'a> {
    /// Lines of at most `max_bytes` each, newline included.
    pub(super) fn new(stream: &'a UnixStream, max_bytes: usize) -> Self {
        Lines { stream, held: Vec::new(), scanned: 0, max_bytes }
    }
    /// The next line without its newline. The whole line has `patience`, so that a trickle of bytes does not prolong it.
    pub(super) fn next(&mut self, patience: Duration) -> Result<Vec<u8>, NoLine> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(at) = self.held[self.scanned..].iter().position(|b| *b == b'\n') {
                let end = self.scanned + at;
                if end + 1 > self.max_bytes {
                    return Err(NoLine::TooLong);
                }
                let rest = self.held.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.held, rest);
                line.pop();
                self.scanned = 0;
                return Ok(line);
            }
            self.scanned = self.held.len();
            if self.held.len() >= self.max_bytes {
                return Err(NoLine::TooLong);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(NoLine::Late);
            }
            self.stream.set_read_timeout(Some(left)).map_err(NoLine::Io)?;
            let was = self.held.len();
            self.held.resize(was + READ_BYTES, 0);
            let got = (&mut &*self.stream).read(&mut self.held[was..]);
            self.held.truncate(was + *got.as_ref().unwrap_or(&0));
            match got {
                Ok(0) => return Err(NoLine::End(was)),
                Ok(_) => {}
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                    return Err(NoLine::Late);
                }
                // A peer that closed with our bytes unread: its end is all there is to say.
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return Err(NoLine::End(was)),
                Err(e) => return Err(NoLine::Io(e)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn lines_come_one_by_one_however_they_were_cut() {
        let (mut a, b) = UnixStream::pair().unwrap();
        let mut lines = Lines::new(&b, 100);
        a.write_all(b"one\ntw").unwrap();
        assert_eq!(lines.next(LONG).unwrap(), b"one");
        assert!(matches!(lines.next(Duration::from_millis(20)), Err(NoLine::Late)));
        a.write_all(b"o\n\nthree").unwrap();
        drop(a);
        assert_eq!(lines.next(LONG).unwrap(), b"two");
        assert_eq!(lines.next(LONG).unwrap(), b"");
        assert!(matches!(lines.next(LONG), Err(NoLine::End(5))));
    }

    #[test]
    fn the_longest_line_passes_and_one_byte_more_does_not() {
        for (len, passes) in [(99, true), (100, false), (5000, false)] {
            for newline in [true, false] {
                let (mut a, b) = UnixStream::pair().unwrap();
                let mut text = vec![b'x'; len];
                if newline {
                    text.push(b'\n');
                }
                a.write_all(&text).unwrap();
                drop(a);
                let got = Lines::new(&b, 100).next(LONG);
                match (passes, newline) {
                    (true, true) => assert_eq!(got.unwrap().len(), len),
                    (true, false) => assert!(matches!(got, Err(NoLine::End(n)) if n == len), "{len}"),
                    (false, _) => assert!(matches!(got, Err(NoLine::TooLong)), "{len}"),
                }
            }
        }
    }
}
