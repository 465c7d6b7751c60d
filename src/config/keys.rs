//! The keys of the file, one line each: name, how it is read, its limits, its default.

use crate::config::units::{parse_duration, parse_size};
use crate::config::{Mode, Settings};
use crate::model::{Code, EngineKind, Fault, Res, check_name};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;
use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};

/// Every key, in the order in which errors and the manual list them.
const KNOWN: [&str; 19] = [
    "host",
    "state_dir",
    "volume_dir",
    "run_dir",
    "pin_dir",
    "listen",
    "docker_socket",
    "mode",
    "interval",
    "checkpoint_interval",
    "capture_ring",
    "freeze_deadline",
    "cut_max",
    "journal",
    "bandwidth",
    "io_engine",
    "queue_depth",
    "credit",
    "health_timeout",
];
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const HOUR: Duration = Duration::from_secs(3600);
/// Larger than any disk: keeps sums of sizes from overflowing.
const SIZE_MAX: u64 = 1 << 50;

/// Parses the text of a configuration file; `name` is shown in errors.
///
/// Errors: `CONFIG_INVALID`, one sentence with file name, line and key.
pub fn parse(text: &str, name: &str) -> Res<Settings> {
    let file = File { text, name, table: None };
    let parsed = DeTable::parse(text).map_err(|error| {
        let at = error.span().map(|span| span.start);
        file.fault(at, one_line(error.message()), "correct the TOML there")
    })?;
    let file = File { table: Some(parsed.get_ref()), ..file };
    file.refuse_unknown()?;

    let path = |key, default: &str| Ok(file.path(key)?.unwrap_or_else(|| PathBuf::from(default)));
    let state_dir: PathBuf = path("state_dir", "/var/lib/doublure")?;
    let mode = file.mode()?.unwrap_or(Mode::Continuous);
    Ok(Settings {
        host: file.host()?,
        volume_dir: file.path("volume_dir")?.unwrap_or_else(|| state_dir.join("volumes")),
        run_dir: path("run_dir", "/run/doublure")?,
        pin_dir: path("pin_dir", "/sys/fs/bpf/doublure")?,
        listen: file.listen()?,
        docker_socket: path("docker_socket", "/run/docker.sock")?,
        mode,
        interval: file.duration("interval", Duration::from_millis(50)..=HOUR)?.unwrap_or(match mode {
            Mode::Continuous => Duration::from_millis(100),
            Mode::Interval | Mode::Freeze => Duration::from_secs(1),
        }),
        checkpoint_interval: file
            .duration("checkpoint_interval", Duration::from_secs(1)..=HOUR)?
            .unwrap_or(Duration::from_secs(60)),
        capture_ring_bytes: file.size("capture_ring", MIB..=1024 * MIB)?.unwrap_or(64 * MIB).next_power_of_two(),
        freeze_deadline: file
            .duration("freeze_deadline", Duration::from_millis(100)..=Duration::from_secs(10))?
            .unwrap_or(Duration::from_secs(2)),
        cut_max_bytes: file.size("cut_max", MIB..=256 * MIB)?.unwrap_or(32 * MIB),
        journal_bytes: file.size("journal", 16 * MIB..=SIZE_MAX)?.unwrap_or(1024 * MIB),
        bandwidth_bytes_per_second: file.size("bandwidth", 64 * KIB..=SIZE_MAX)?,
        io_engine: file.engine()?.unwrap_or(EngineKind::Auto),
        queue_depth: file.queue_depth()?.unwrap_or(32),
        credit_bytes: file.size("credit", MIB..=256 * MIB)?.unwrap_or(16 * MIB),
        health_timeout: file.duration("health_timeout", Duration::from_secs(1)..=HOUR)?.unwrap_or(Duration::from_secs(60)),
        state_dir,
    })
}

/// The file while it is read: enough of it to say where something is wrong.
#[derive(Clone, Copy)]
struct File<'t> {
    text: &'t str,
    name: &'t str,
    table: Option<&'t DeTable<'t>>,
}

/// A value with its key and where it stands.
struct Found<'t> {
    key: &'t str,
    value: &'t DeValue<'t>,
    at: usize,
}

impl<'t> File<'t> {
    /// One sentence about the byte at `at` of the text.
    fn fault(&self, at: Option<usize>, cause: impl Into<String>, next: impl Into<String>) -> Fault {
        let line = |at: usize| self.text.bytes().take(at).filter(|b| *b == b'\n').count() + 1;
        let thing = match at {
            Some(at) => format!("{} line {}", self.name, line(at)),
            None => self.name.to_string(),
        };
        Fault::new(Code::ConfigInvalid, thing, cause, next)
    }

    fn refuse_unknown(&self) -> Res<()> {
        // The map is sorted by name; the first wrong line is what a person wants to be shown.
        let strange = |key: &&Spanned<DeString<'_>>| !KNOWN.contains(&key.get_ref().as_ref());
        let first = self.table.iter().flat_map(|table| table.keys()).filter(strange).min_by_key(|key| key.span().start);
        match first {
            None => Ok(()),
            Some(key) => {
                let known = KNOWN.join(", ");
                let word: String = one_line(key.get_ref()).chars().take(60).collect();
                let cause = format!("unknown key `{word}`; known keys are {known}");
                Err(self.fault(Some(key.span().start), cause, "remove or correct it"))
            }
        }
    }

    fn find(&self, key: &'static str) -> Option<Found<'t>> {
        debug_assert!(KNOWN.contains(&key));
        let value = self.table?.get(key)?;
        Some(Found { key, value: value.get_ref(), at: value.span().start })
    }

    /// A fault about a value that was found.
    fn wrong(&self, found: &Found<'_>, cause: impl std::fmt::Display, next: impl Into<String>) -> Fault {
        self.fault(Some(found.at), format!("`{}` {cause}", found.key), next)
    }

    fn text(&self, key: &'static str, example: &str) -> Res<Option<(Found<'t>, &'t str)>> {
        let Some(found) = self.find(key) else { return Ok(None) };
        match found.value.as_str() {
            Some(text) => Ok(Some((found, text))),
            None => {
                let kind = found.value.type_str();
                Err(self.wrong(
                    &found,
                    format!("is a TOML {kind} where text is wanted"),
                    format!("write it as {key} = {example:?}"),
                ))
            }
        }
    }

    fn host(&self) -> Res<String> {
        let Some((found, host)) = self.text("host", "paris-1")? else {
            return Err(self.fault(None, "the key `host` is missing", "add a line such as host = \"paris-1\""));
        };
        check_name("host", host).map_err(|fault| self.wrong(&found, format!("cannot be used: {}", fault.cause), fault.next))?;
        Ok(host.to_string())
    }

    fn path(&self, key: &'static str) -> Res<Option<PathBuf>> {
        let Some((found, text)) = self.text(key, "/some/where")? else { return Ok(None) };
        let odd = text.chars().any(char::is_control) || text.split('/').any(|part| part == "..");
        match text.starts_with('/') && !odd {
            true => Ok(Some(PathBuf::from(text))),
            false => Err(self.wrong(
                &found,
                "is not an absolute path free of `..` and control characters",
                "write the whole path from / on",
            )),
        }
    }

    fn listen(&self) -> Res<Option<String>> {
        let Some((found, text)) = self.text("listen", "10.0.0.1:7420")? else { return Ok(None) };
        match text.parse::<SocketAddr>() {
            Ok(address) => Ok(Some(address.to_string())),
            Err(_) => Err(self.wrong(
                &found,
                "is not a numeric address with a port",
                "write it as listen = \"10.0.0.1:7420\" or \"[fd00::1]:7420\"",
            )),
        }
    }

    fn mode(&self) -> Res<Option<Mode>> {
        let Some((found, text)) = self.text("mode", "continuous")? else { return Ok(None) };
        match text {
            "continuous" => Ok(Some(Mode::Continuous)),
            "interval" => Ok(Some(Mode::Interval)),
            "freeze" => Ok(Some(Mode::Freeze)),
            _ => Err(self.wrong(&found, "is none of continuous, interval and freeze", "choose one of the three")),
        }
    }

    fn engine(&self) -> Res<Option<EngineKind>> {
        let Some((found, text)) = self.text("io_engine", "auto")? else { return Ok(None) };
        match text {
            "auto" => Ok(Some(EngineKind::Auto)),
            "io_uring" => Ok(Some(EngineKind::IoUring)),
            "pread" => Ok(Some(EngineKind::Pread)),
            _ => Err(self.wrong(&found, "is none of auto, io_uring and pread", "choose one of the three")),
        }
    }

    fn duration(&self, key: &'static str, limits: RangeInclusive<Duration>) -> Res<Option<Duration>> {
        let Some((found, text)) = self.text(key, "1s")? else { return Ok(None) };
        let value =
            parse_duration(text).map_err(|fault| self.wrong(&found, format!("cannot be used: {}", fault.cause), fault.next))?;
        self.within(&found, value, &limits, |value| format!("{value:?}")).map(Some)
    }

    fn size(&self, key: &'static str, limits: RangeInclusive<u64>) -> Res<Option<u64>> {
        let Some(found) = self.find(key) else { return Ok(None) };
        let parsed = match found.value {
            DeValue::String(text) => parse_size(text),
            DeValue::Integer(number) if number.radix() == 10 => parse_size(number.as_str()),
            other => {
                let cause = format!("is a TOML {} where a size is wanted", other.type_str());
                return Err(self.wrong(&found, cause, format!("write it as {key} = \"64 MiB\"")));
            }
        };
        let value = parsed.map_err(|fault| self.wrong(&found, format!("cannot be used: {}", fault.cause), fault.next))?;
        self.within(&found, value, &limits, |bytes| size_text(*bytes)).map(Some)
    }

    fn queue_depth(&self) -> Res<Option<usize>> {
        let Some(found) = self.find("queue_depth") else { return Ok(None) };
        let number = found.value.as_integer().filter(|n| n.radix() == 10).and_then(|n| n.as_str().parse::<i64>().ok());
        match number {
            Some(number) => {
                let number = self.within(&found, number, &(1..=256), i64::to_string)?;
                Ok(Some(usize::try_from(number).unwrap_or(1)))
            }
            None => Err(self.wrong(&found, "is not a whole number", "write it as queue_depth = 32")),
        }
    }

    fn within<T: PartialOrd>(
        &self,
        found: &Found<'_>,
        value: T,
        limits: &RangeInclusive<T>,
        say: impl Fn(&T) -> String,
    ) -> Res<T> {
        match limits.contains(&value) {
            true => Ok(value),
            false => {
                let (from, to) = (say(limits.start()), say(limits.end()));
                Err(self.wrong(found, format!("is {}, out of range", say(&value)), format!("choose from {from} to {to}")))
            }
        }
    }
}

/// A size as people read it: the largest unit that divides it.
fn size_text(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    match units.iter().find(|(shift, _)| bytes != 0 && bytes.is_multiple_of(1 << shift)) {
        Some((shift, unit)) => format!("{} {unit}", bytes >> shift),
        None => format!("{bytes} bytes"),
    }
}

/// An error is one sentence on one line, whatever a parser or a key says.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}
