//! The pairing code from standard input: unseen on a terminal, a plain line otherwise; never in argv or the environment.

use crate::control::Secret;
use crate::model::{Code, Fault, Res};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, raise};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use std::io::{BufRead, IsTerminal, Read, Stdin, stdin};
use std::os::fd::AsFd;

/// Longer than any code; a longer line is none.
const CODE_MAX_BYTES: u64 = 256;

/// Reads the code; `prompt` is shown on a terminal only.
pub(super) fn read_code(prompt: &str) -> Res<Secret> {
    let input = stdin();
    let line = match input.is_terminal() {
        true => read_unseen(&input, prompt)?,
        false => read_line(&input)?,
    };
    code_of(&line)
}

fn code_of(line: &str) -> Res<Secret> {
    let bad = |cause: &str| {
        let next = "give the code that `doublure pair` shows on the other host, as one line";
        Err(Fault::new(Code::BadArgument, "the pairing code on standard input", cause, next))
    };
    let code = line.trim();
    match code {
        "" => bad("there is none"),
        _ if line.len() as u64 >= CODE_MAX_BYTES => bad("it is too long to be one"),
        _ if !code.bytes().all(|b| b.is_ascii_graphic() || b == b' ') => bad("it has characters that no code has"),
        _ => Ok(Secret(code.to_string())),
    }
}

fn failed(error: std::io::Error) -> Fault {
    Fault::io("standard input", &error)
}

fn read_line(input: &Stdin) -> Res<String> {
    let mut line = Vec::new();
    input.lock().take(CODE_MAX_BYTES).read_until(b'\n', &mut line).map_err(failed)?;
    Ok(String::from_utf8_lossy(&line).into_owned())
}

/// The terminal with its echo off, and on again however this ends.
struct Unseen<'a> {
    input: &'a Stdin,
    was: Termios,
}

impl<'a> Unseen<'a> {
    fn new(input: &'a Stdin) -> Result<Self, Errno> {
        let was = tcgetattr(input)?;
        let mut now = was.clone();
        now.local_flags.remove(LocalFlags::ECHO);
        now.local_flags.insert(LocalFlags::ECHONL | LocalFlags::ICANON);
        tcsetattr(input, SetArg::TCSAFLUSH, &now)?;
        Ok(Unseen { input, was })
    }
}

impl Drop for Unseen<'_> {
    fn drop(&mut self) {
        let _ = tcsetattr(self.input, SetArg::TCSAFLUSH, &self.was);
    }
}

/// Signals that would end us are held back meanwhile: a shell left without echo is a poor farewell.
fn read_unseen(input: &Stdin, prompt: &str) -> Res<String> {
    let errno = |e: Errno| failed(e.into());
    let ending = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT]);
    let mask_was = ending.thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_BLOCK).map_err(errno)?;
    let read = (|| {
        let signals = SignalFd::with_flags(&ending, SfdFlags::SFD_CLOEXEC).map_err(errno)?;
        let _unseen = Unseen::new(input).map_err(errno)?;
        eprint!("{prompt}");
        let mut ready = [PollFd::new(signals.as_fd(), PollFlags::POLLIN), PollFd::new(input.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut ready, PollTimeout::NONE) {
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(e) => return Err(errno(e)),
            }
        }
        let signalled = ready[0].any().unwrap_or(false);
        match signalled.then(|| signals.read_signal()) {
            Some(Ok(Some(info))) => Ok(Err(info.ssi_signo)),
            _ => read_line(input).map(Ok), // a terminal is ready once it has a whole line
        }
    })();
    mask_was.thread_set_mask().map_err(errno)?;
    match read? {
        Ok(line) => Ok(line),
        Err(number) => {
            if let Ok(signal) = Signal::try_from(number as i32) {
                let _ = raise(signal); // ends us, as it would have
            }
            Err(Fault::new(Code::BadArgument, "the pairing code", "the question was broken off", "type the command again"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_one_short_line_of_plain_characters() {
        for good in ["1234-5678\n", "  abc def \r\n", "x"] {
            assert_eq!(code_of(good).unwrap().0, good.trim());
        }
        for bad in ["", "\n", "   \n", "caf\u{e9}\n", "a\u{1b}b\n", &"x".repeat(256)] {
            assert_eq!(code_of(bad).unwrap_err().code, Code::BadArgument, "{bad:?}");
        }
    }
}
