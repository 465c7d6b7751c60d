//! The TCP socket below TLS: its options, and a read buffer that only a proven peer gets.

use nix::sys::socket::{setsockopt, sockopt};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Sent data that nobody takes for so long ends the connection, in milliseconds. This covers a peer that is gone and (note L1) one
/// that is there but has kept its window shut all that time.
/// Longer than a standby's slowest flush should keep it from reading; a peer that is gone is noticed sooner by the agents' own silence.
const USER_TIMEOUT_MS: u32 = 30_000;
/// An idle connection is probed after so many seconds, and then every so many.
const KEEPALIVE_IDLE_S: u32 = 5;
const KEEPALIVE_EVERY_S: u32 = 2;
/// Unanswered probes that end the connection (the user timeout ends it first when it is shorter).
const KEEPALIVE_COUNT: u32 = 5;

/// Sets what every connection of ours has: no delay, keepalive, and a limit on unanswered silence.
pub(in crate::link) fn tune(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    setsockopt(tcp, sockopt::KeepAlive, &true)?;
    setsockopt(tcp, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_S)?;
    setsockopt(tcp, sockopt::TcpKeepInterval, &KEEPALIVE_EVERY_S)?;
    setsockopt(tcp, sockopt::TcpKeepCount, &KEEPALIVE_COUNT)?;
    setsockopt(tcp, sockopt::TcpUserTimeout, &USER_TIMEOUT_MS)?;
    Ok(())
}

/// A TCP stream that reads ahead once [`Socket::widen`] was called. TLS asks for 4 to 18 KiB at a time; without this that would be
/// a system call each.
pub(in crate::link) struct Socket {
    tcp: TcpStream,
    ahead: Box<[u8]>,
    at: usize,
    end: usize,
}

impl Socket {
    /// A stream that reads no more than it is asked for.
    pub fn new(tcp: TcpStream) -> Socket {
        Socket { tcp, ahead: Box::default(), at: 0, end: 0 }
    }

    /// From now on up to `bytes` are read ahead.
    pub fn widen(&mut self, bytes: usize) {
        debug_assert_eq!(self.at, self.end, "what was read ahead would be lost");
        self.ahead = vec![0; bytes].into_boxed_slice();
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.at == this.end {
            if buf.remaining() >= this.ahead.len() {
                return Pin::new(&mut this.tcp).poll_read(cx, buf);
            }
            let mut ahead = ReadBuf::new(&mut this.ahead);
            ready!(Pin::new(&mut this.tcp).poll_read(cx, &mut ahead))?;
            (this.at, this.end) = (0, ahead.filled().len());
        }
        let part = buf.remaining().min(this.end - this.at);
        buf.put_slice(&this.ahead[this.at..this.at + part]);
        this.at += part;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, bytes)
    }
    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, parts: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write_vectored(cx, parts)
    }
    fn is_write_vectored(&self) -> bool {
        true
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// Note L1: `TCP_USER_TIMEOUT` ends a connection whose peer answers every probe, but with its window shut.
    #[test]
    fn the_user_timeout_counts_a_shut_window_as_silence() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        setsockopt(&near, sockopt::TcpUserTimeout, &500).unwrap();
        // `far` lives in this very kernel and never reads: all that can end this loop is the timeout.
        let error = loop {
            if let Err(error) = near.write_all(&[0; 1 << 16]) {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        drop(far);
    }

    #[tokio::test]
    async fn what_is_read_ahead_arrives_in_order_in_any_pieces() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut far = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (near, _) = listener.accept().unwrap();
        near.set_nonblocking(true).unwrap();
        let sent: Vec<u8> = (0..50_000u32).map(|n| (n % 251) as u8).collect();
        far.write_all(&sent).unwrap();
        drop(far);
        let mut socket = Socket::new(TcpStream::from_std(near).unwrap());
        let (mut got, mut size) = (Vec::new(), 1);
        loop {
            if size == 7 * 9 + 1 {
                socket.widen(1000);
            }
            let mut piece = vec![0; size];
            match tokio::io::AsyncReadExt::read(&mut socket, &mut piece).await.unwrap() {
                0 => break,
                read => got.extend_from_slice(&piece[..read]),
            }
            size = size % 1500 + 7;
        }
        assert!(got == sent);
    }
}
