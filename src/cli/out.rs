//! Standard output that may be closed early, and values as people read them.

use crate::control::rfc3339;
use crate::model::Moment;
use serde_json::Value;
use std::io::{ErrorKind, IsTerminal, Write};

/// Standard output. Somebody who closes it early (`| head`) ends the printing, never the operation.
pub(super) struct Out {
    closed: bool,
    failed: Option<std::io::Error>,
    /// Whether a person looks at it.
    pub terminal: bool,
}

impl Out {
    pub(super) fn new() -> Out {
        Out { closed: false, failed: None, terminal: std::io::stdout().is_terminal() }
    }
    /// Prints text as it is, at once.
    pub(super) fn say(&mut self, text: &str) {
        if self.closed {
            return;
        }
        let mut stdout = std::io::stdout().lock();
        if let Err(e) = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            self.closed = true;
            self.failed = (e.kind() != ErrorKind::BrokenPipe).then_some(e);
        }
    }
    /// Prints a value as one line of JSON.
    pub(super) fn json(&mut self, value: &Value) {
        self.say(&format!("{value}\n"));
    }
    /// Nobody reads any more.
    pub(super) fn closed(&self) -> bool {
        self.closed
    }
    /// Why printing failed, if it did (a full disk; not a closed pipe).
    pub(super) fn failure(&self) -> Option<&std::io::Error> {
        self.failed.as_ref()
    }
}

/// Text without control characters: what a peer or a container is called must not steer the terminal.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// One value in words; what is not known is called so.
pub(super) fn word(value: &Value) -> String {
    match value {
        Value::Null => "unknown".into(),
        Value::Bool(yes) => if *yes { "yes" } else { "no" }.into(),
        Value::Number(n) => n.to_string(),
        Value::String(text) => plain(text),
        Value::Object(o) if o.len() == 2 && o.contains_key("epoch") && o.contains_key("generation") => {
            format!("{}/{}", word(&o["epoch"]), word(&o["generation"])) // a position, as people write it
        }
        other => plain(&other.to_string()),
    }
}

/// `4.0 KiB`: three digits or so, binary units.
pub(super) fn bytes(count: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut scaled = count as f64 / 1024.0;
    let mut unit = 0;
    // 1023.95 would print as 1024.0
    while scaled >= 1023.95 && unit + 1 < units.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    format!("{scaled:.1} {}", units[unit])
}

/// `0.8 s`, `3 min 5 s`, `2 h 4 min`, `3 d 2 h`. Rounded up: a lag is never shown smaller than it is.
pub(super) fn seconds(value: f64) -> String {
    if !value.is_finite() || value < 0.0 {
        return "unknown".into();
    }
    if value < 10.0 {
        return format!("{:.1} s", (value * 10.0 - 1e-6).ceil().abs() / 10.0);
    }
    let whole = (value - 1e-6).ceil() as u64;
    let pair = |big: u64, big_unit: &str, small: u64, small_unit: &str| match small {
        0 => format!("{big} {big_unit}"),
        _ => format!("{big} {big_unit} {small} {small_unit}"),
    };
    match whole {
        0..60 => format!("{whole} s"),
        60..3600 => pair(whole / 60, "min", whole % 60, "s"),
        _ => {
            let minutes = whole.div_ceil(60);
            match minutes {
                0..1440 => pair(minutes / 60, "h", minutes % 60, "min"),
                _ => {
                    let hours = minutes.div_ceil(60);
                    pair(hours / 24, "d", hours % 24, "h")
                }
            }
        }
    }
}

/// Milliseconds since 1970 rather than a duration or a count: `started_at`, `recoverable_to_ms`.
fn is_instant(key: &str) -> bool {
    ["_at", "_to", "_at_ms", "_to_ms"].iter().any(|end| key.ends_with(end))
}

/// A value under its key, whose ending says the unit.
pub(super) fn quantity(key: &str, value: &Value) -> String {
    if let (Some(count), true) = (value.as_u64(), key.ends_with("_bytes")) {
        return bytes(count);
    }
    if let (Some(ms), true) = (value.as_u64(), is_instant(key)) {
        return rfc3339(Moment(ms)).unwrap_or("unknown".into());
    }
    match value.as_f64() {
        Some(n) if key.ends_with("_seconds") => seconds(n),
        Some(_) if key.ends_with("_ms") => format!("{value} ms"),
        _ => word(value),
    }
}

/// A key as a heading: its unit stands with the value.
pub(super) fn heading(key: &str) -> String {
    let short = ["_bytes", "_seconds", "_ms"].iter().find_map(|unit| key.strip_suffix(unit)).unwrap_or(key);
    plain(&short.replace('_', " "))
}

/// A table whose columns are as wide as they must be. A head beginning with `>` marks a column aligned to the right.
pub(super) fn table(indent: &str, heads: &[&str], rows: &[Vec<String>]) -> String {
    let names: Vec<&str> = heads.iter().map(|h| h.trim_start_matches('>')).collect();
    let width =
        |n: usize| rows.iter().filter_map(|r| r.get(n)).map(|c| c.chars().count()).chain([names[n].chars().count()]).max();
    let widths: Vec<usize> = (0..heads.len()).map(|n| width(n).unwrap_or(0)).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = cells
            .zip(&widths)
            .zip(heads)
            .map(|((cell, width), head)| match head.starts_with('>') {
                true => format!("{cell:>width$}"),
                false => format!("{cell:<width$}"),
            })
            .collect();
        format!("{indent}{}\n", padded.join("  ").trim_end())
    };
    let mut text = line(&mut names.iter().copied());
    for row in rows {
        text.push_str(&line(&mut row.iter().map(String::as_str)));
    }
    text
}

/// Any value, for people: scalars as `key: value`, lists of objects as tables, the rest indented.
pub(super) fn describe(value: &Value, indent: &str) -> String {
    let Some(object) = value.as_object() else {
        return match value {
            Value::Null => String::new(),
            other => format!("{indent}{}\n", word(other)),
        };
    };
    let mut text = String::new();
    for (key, value) in object {
        match value {
            Value::Array(items) if items.is_empty() => {}
            Value::Array(items) if items.iter().all(Value::is_object) => {
                text.push_str(&format!("{indent}{}:\n", heading(key)));
                text.push_str(&objects(items, &format!("{indent}  ")));
            }
            Value::Array(items) => {
                let words: Vec<String> = items.iter().map(word).collect();
                text.push_str(&format!("{indent}{}: {}\n", heading(key), words.join(", ")));
            }
            Value::Object(o) if !o.contains_key("generation") => {
                text.push_str(&format!("{indent}{}:\n", heading(key)));
                text.push_str(&describe(value, &format!("{indent}  ")));
            }
            _ => text.push_str(&format!("{indent}{}: {}\n", heading(key), quantity(key, value))),
        }
    }
    text
}

/// A list of objects as one table; the name comes first, the others in the order of their keys.
pub(super) fn objects(items: &[Value], indent: &str) -> String {
    let mut keys: Vec<&String> = Vec::new();
    for key in items.iter().filter_map(Value::as_object).flat_map(|o| o.keys()) {
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    keys.sort_by_key(|key| key.as_str() != "name"); // stable: only the name moves
    let heads: Vec<String> = keys
        .iter()
        .map(|key| {
            let right = if key.ends_with("_bytes") || key.ends_with("_ms") || key.ends_with("_seconds") { ">" } else { "" };
            format!("{right}{}", heading(key).to_uppercase())
        })
        .collect();
    let heads: Vec<&str> = heads.iter().map(String::as_str).collect();
    let row = |item: &Value| keys.iter().map(|key| item.get(*key).map_or(String::new(), |v| quantity(key, v))).collect();
    table(indent, &heads, &items.iter().map(row).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn sizes_read_well_at_every_edge() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (2 << 30, "2.0 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn a_lag_is_never_shown_smaller_than_it_is() {
        for (value, text) in [
            (0.0, "0.0 s"),
            (0.81, "0.9 s"),
            (1.2, "1.2 s"),
            (9.99, "10.0 s"),
            (10.2, "11 s"),
            (60.0, "1 min"),
            (65.0, "1 min 5 s"),
            (3600.0, "1 h"),
            (3601.0, "1 h 1 min"),
            (86_400.0, "1 d"),
            (90_000.5, "1 d 2 h"),
            (f64::NAN, "unknown"),
            (-1.0, "unknown"),
        ] {
            assert_eq!(seconds(value), text, "{value}");
        }
    }

    #[test]
    fn no_text_of_others_steers_the_terminal() {
        assert_eq!(plain("a\u{1b}[2Jb\nc\u{9b}d"), "a\u{fffd}[2Jb\u{fffd}c\u{fffd}d");
        let text = describe(&json!({"na\u{1b}me": "x\u{1b}]0;y\u{7}", "list": ["\r"], "rows": [{"k\u{8}": "\u{0}"}]}), "");
        assert!(text.chars().all(|c| c == '\n' || !c.is_control()), "{text:?}");
    }

    #[test]
    fn values_become_lines_and_tables() {
        let value = json!({"group": "shop", "rto_ms": 812, "blocks_bytes": 8192, "lag_seconds": 1.5, "cut_at": null, "recoverable_to_ms": 1_787_393_472_345u64, "seen_at_ms": 0, "position": {"epoch": 2, "generation": 7}, "ok": true,
            "faults": ["a", "b"], "none": [], "volumes": [{"size_bytes": 1024, "name": "pgdata"}, {"name": "x", "fs": "xfs"}], "peer": {"name": "beta"}});
        assert_eq!(
            describe(&value, ""),
            "blocks: 8.0 KiB\ncut at: unknown\nfaults: a, b\ngroup: shop\nlag: 1.5 s\nok: yes\npeer:\n  name: beta\nposition: 2/7\nrecoverable to: 2026-08-22T10:11:12.345Z\nrto: 812 ms\nseen at: unknown\n\
             volumes:\n  NAME       SIZE  FS\n  pgdata  1.0 KiB\n  x                xfs\n"
        );
    }
}
