//! Child programs: found or named as missing, their words kept within bounds.

use crate::model::{Code, Fault, Res};
use std::io::{self, Read};
use std::path::Path;
use std::process::{Command, Stdio};

/// So much of a tool's output is kept, in bytes: enough for its last words, whatever a damaged file system makes it say.
const KEPT: usize = 64 << 10;

/// How a tool ended.
pub(super) struct Ended {
    /// Its exit code; `None` when a signal ended it.
    pub(super) code: Option<i32>,
    /// The end of what it said, both streams in order.
    pub(super) said: String,
}

impl Ended {
    /// The last line that says anything.
    pub(super) fn last_words(&self) -> String {
        let line = self.said.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or("it said nothing");
        line.chars().filter(|c| !c.is_control()).take(300).collect()
    }
}

/// Runs `tool` with `args` and then `device`, without input, in the C locale. `TOOL_FAILED` when it is not there.
pub(super) fn run(tool: &str, args: &[&str], device: &Path, package: &str) -> Res<Ended> {
    let fault = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Fault::new(
            Code::ToolFailed,
            tool,
            "it is not installed on this host",
            format!("install the package {package} and try again"),
        ),
        _ => Fault::new(
            Code::ToolFailed,
            tool,
            format!("it could not be run: {error}"),
            "try again when the host has memory and processes to spare",
        ),
    };
    // A service manager's PATH may lack the places where these live.
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin");
    let (mut out, into) = io::pipe().map_err(fault)?;
    let mut command = Command::new(tool);
    command.args(args).arg(device).env("PATH", path).env("LC_ALL", "C").current_dir("/").stdin(Stdio::null());
    command.stdout(into.try_clone().map_err(fault)?).stderr(into);
    let mut child = command.spawn().map_err(fault)?;
    // The command still has the writing ends: without this the read below never ends.
    drop(command);
    let mut said = Vec::new();
    let mut chunk = [0; 8192];
    loop {
        match out.read(&mut chunk) {
            Ok(0) => break,
            Ok(got) => {
                said.extend_from_slice(&chunk[..got]);
                if said.len() > 2 * KEPT {
                    said.drain(..said.len() - KEPT);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    let status = child.wait().map_err(fault)?;
    Ok(Ended { code: status.code(), said: String::from_utf8_lossy(&said).into_owned() })
}

/// `TOOL_FAILED` with its last line.
pub(super) fn failed(tool: &str, device: &Path, ended: &Ended) -> Fault {
    let how = ended.code.map_or("was killed".to_string(), |code| format!("ended with {code}"));
    let cause = format!("{tool} {how}: {}", ended.last_words());
    Fault::new(Code::ToolFailed, device.display().to_string(), cause, "see what it says and correct that, then try again")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_tool_is_named_with_its_package() {
        let fault = run("mkfs.no-such-thing", &[], Path::new("/dev/null"), "the-package").err().unwrap();
        assert_eq!(fault.code, Code::ToolFailed);
        assert!(fault.to_string().contains("the-package"), "{fault}");
    }

    #[test]
    fn much_output_is_drained_and_its_end_kept() {
        let script = "i=0; while [ $i -lt 20000 ]; do echo line-of-some-length-$i; i=$((i+1)); done; echo the end >&2; exit 3";
        let ended = run("sh", &["-c", script], Path::new("x"), "dash").unwrap();
        assert_eq!((ended.code, ended.last_words().as_str()), (Some(3), "the end"));
        assert!(ended.said.len() <= 2 * KEPT + 8192);
    }
}
