//! The floor plan as a test: which room may know which, who guards each outside crate, who may prove what.
//! It reads the source as text. Blind spots: paths made by macros, and names re-exported under another room's name.

use std::{collections::BTreeSet, fs, path::Path};

#[derive(PartialEq)]
enum Kind {
    /// Decides: no I/O, clock, thread or `unsafe`.
    Quiet,
    /// Touches one outside thing.
    Hand,
    /// Puts hands in a fixed order.
    Stage,
    /// Faces people and time.
    Front,
}
use Kind::{Front, Hand, Quiet, Stage};

struct Room {
    name: &'static str,
    kind: Kind,
    may_know: &'static [&'static str],
    /// Outside crates that only rooms listing them may name.
    guards: &'static [&'static str],
}

const fn room(name: &'static str, kind: Kind, may_know: &'static [&'static str], guards: &'static [&'static str]) -> Room {
    Room { name, kind, may_know, guards }
}

/// In the order of the floors: a room may only know rooms above it.
const ROOMS: &[Room] = &[
    room("model", Quiet, &[], &[]),
    room("config", Quiet, &["model"], &["toml"]),
    room("delta", Quiet, &["model"], &["lz4_flex", "crc32fast", "blake3"]),
    room("format", Quiet, &["model"], &["crc32fast", "blake3"]),
    room("session", Quiet, &["model", "format"], &["blake3"]),
    room("role", Quiet, &["model", "format"], &[]),
    room("durable", Hand, &["model"], &[]),
    room("device", Hand, &["model"], &["io_uring", "memmap2"]),
    room("host", Hand, &["model"], &[]),
    room("known", Hand, &["model", "delta"], &["memmap2"]),
    room("tracker", Hand, &["model", "host"], &["libbpf_rs", "memmap2"]),
    room("link", Hand, &["model", "format"], &["tokio_rustls", "rcgen", "rustls_pki_types", "blake3", "tokio"]),
    room("journal", Hand, &["model", "delta", "format", "durable"], &["blake3"]),
    room("ledger", Hand, &["model", "format", "durable"], &[]),
    room("docker", Hand, &["model"], &["bollard", "sha2", "tar", "futures_util", "bytes", "flate2", "tokio"]),
    room("reader", Stage, &["model", "device"], &[]),
    room("cut", Stage, &["model", "device", "host", "tracker", "reader"], &[]),
    room("apply", Stage, &["model", "delta", "device", "journal", "ledger"], &[]),
    room("verify", Stage, &["model", "delta", "device", "reader"], &[]),
    room("failover", Stage, &["model", "role", "durable", "host", "device", "docker", "journal", "ledger", "apply"], &[]),
    room("control", Front, &["model"], &[]),
    room(
        "agent",
        Front,
        &[
            "model", "config", "delta", "format", "session", "role", "durable", "device", "host", "known", "tracker", "link",
            "journal", "ledger", "docker", "reader", "cut", "apply", "verify", "failover", "control",
        ],
        &["tokio"],
    ),
    room("cli", Front, &["model", "config", "host", "control", "agent"], &["clap", "indicatif", "tracing_subscriber"]),
];

/// The proofs that cross rooms, and the only places that may make them.
const PROOFS: &[(&str, &[&str])] = &[("SealedProof for", &["src/journal/", "src/apply/"]), ("Receipt for", &["src/session/"])];

/// Every source file as (room, path, text); `lib.rs` and `main.rs` belong to no room.
fn sources(dir: &Path, out: &mut Vec<(String, String, String)>) {
    let mut entries: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            sources(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let shown = path.display().to_string();
            let room = shown.trim_start_matches("src/").split(['/', '.']).next().unwrap();
            out.push((room.to_string(), shown.clone(), fs::read_to_string(&path).unwrap()));
        }
    }
}

fn ident(text: &str) -> &str {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap()
}

/// Whether `line` names the outside crate `krate` as a path's first part.
fn names_crate(line: &str, krate: &str) -> bool {
    line.match_indices(&format!("{krate}::")).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        before.is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != ':')
    })
}

fn plan_breaches(all: &[(String, String, String)]) -> Vec<String> {
    let (mut used, mut wrong) = (BTreeSet::new(), Vec::new());
    for (room, path, text) in all {
        if !text.starts_with("//!") {
            wrong.push(format!("{path}: no door note"));
        }
        if room == "lib" || room == "main" {
            continue;
        }
        let Some(plan) = ROOMS.iter().find(|r| r.name == room) else {
            wrong.push(format!("{path}: room `{room}` is not in the plan"));
            continue;
        };
        // Tests of a room may use its neighbours' words freely; the plan binds what ships.
        let shipped = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        if path.ends_with("tests.rs") {
            continue;
        }
        for (n, line) in shipped.lines().enumerate().map(|(n, l)| (n + 1, l.trim())) {
            let line = line.split("//").next().unwrap();
            if line.contains("crate::{") || line.contains("super::super") {
                wrong.push(format!("{path}:{n}: name one room per line, by its full name"));
            }
            for (at, hit) in line.match_indices("crate::") {
                let to = ident(&line[at + hit.len()..]);
                let other = to != room && ROOMS.iter().any(|r| r.name == to);
                if other && !plan.may_know.contains(&to) {
                    wrong.push(format!("{path}:{n}: `{room}` may not know `{to}`"));
                }
                used.insert((room.clone(), to.to_string()));
            }
            for guarded in ROOMS.iter().flat_map(|r| r.guards) {
                if names_crate(line, guarded) && !plan.guards.contains(guarded) {
                    wrong.push(format!("{path}:{n}: `{room}` is not a guardian of {guarded}"));
                }
            }
            for (proof, makers) in PROOFS {
                if line.starts_with("impl") && line.contains(proof) && !makers.iter().any(|m| path.starts_with(m)) {
                    wrong.push(format!("{path}:{n}: only {makers:?} may prove {proof}"));
                }
            }
            if plan.kind == Quiet && line.contains("unsafe ") {
                wrong.push(format!("{path}:{n}: a quiet room has no unsafe"));
            }
        }
    }
    for (floor, room) in ROOMS.iter().enumerate() {
        let door = all.iter().find(|(r, p, _)| r == room.name && p.ends_with("mod.rs"));
        let quiet_lines = ["forbid(unsafe_code)", "disallowed_methods", "disallowed_types"];
        match door {
            None => wrong.push(format!("`{}` is in the plan but has no door in src/", room.name)),
            Some((_, path, text)) => {
                if room.kind == Quiet && !quiet_lines.iter().all(|l| text.contains(l)) {
                    wrong.push(format!("{path}: a quiet room says so with its lint lines"));
                }
                if text.contains("allow(unsafe_code)") && room.kind != Hand {
                    wrong.push(format!("{path}: unsafe lives in hands only"));
                }
                for word in ["Owns", "Gives", "Keeps", "Never", "Assumes"] {
                    if !text.contains(&format!("//! {word} ")) {
                        wrong.push(format!("{path}: the door note lacks `{word}`"));
                    }
                }
            }
        }
        for known in room.may_know {
            if !ROOMS[..floor].iter().any(|r| r.name == *known) {
                wrong.push(format!("`{}` knows `{known}`, which is not above it", room.name));
            }
            if !used.contains(&(room.name.to_string(), known.to_string())) {
                wrong.push(format!("`{}` may know `{known}` but does not: drop it", room.name));
            }
        }
    }
    wrong
}

#[test]
fn every_line_knows_its_room() {
    let mut all = Vec::new();
    sources(Path::new("src"), &mut all);
    let wrong = plan_breaches(&all);
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn the_test_itself_notices_breaches() {
    let mut all = Vec::new();
    sources(Path::new("src"), &mut all);
    let clean = plan_breaches(&all).len();
    let planted = [
        ("model", "use crate::agent::x;"),
        ("delta", "let x = io_uring::y();"),
        ("session", "let x = unsafe { 1 };"),
        ("cut", "impl SealedProof for X {}"),
        ("agent", "use crate::{model, delta};"),
    ];
    for (room, line) in planted {
        let mut all = all.clone();
        all.push((room.into(), format!("src/{room}/planted.rs"), format!("//! x\n{line}\n")));
        assert!(plan_breaches(&all).len() > clean, "`{line}` in {room} was not noticed");
    }
    let mut nowhere = all.clone();
    nowhere.push(("utils".into(), "src/utils/mod.rs".into(), "//! x\n".into()));
    assert!(plan_breaches(&nowhere).len() > clean);
}
