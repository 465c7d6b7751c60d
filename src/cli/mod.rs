//! Owns the words people type and what they read back: parse, ask the agent, print, exit code.
//! Gives the binary its `main`.
//! Keeps terminals clean (no control character of others, no colour, no question where nobody sits) and pipes quiet.
//! Never decides anything about a group; the agent does, behind `control`.
//! Assumes the agent of the same version answers at `run_dir`.

mod args;
mod ask;
mod follow;
mod out;
mod secret;
mod status;

use crate::cli::args::{Args, CONFIG_DEFAULT, Verb, VolumeVerb};
use crate::cli::follow::{Follow, step_line};
use crate::cli::out::{Out, describe, objects, plain, word};
use crate::config::Settings;
use crate::control::{Event, Request, call, socket_in};
use crate::model::{Code, Exit, Fault, Moment, Res};
use clap::Parser;
use serde_json::{Value, json};
use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

/// What `main` does, all of it.
pub fn main() -> ExitCode {
    // Before anything else: the helper holds frozen file systems, so it runs without threads and without parsing.
    if std::env::args_os().nth(1).is_some_and(|verb| verb == "freeze-helper") {
        return ExitCode::from(u8::try_from(crate::host::freeze_helper_main()).unwrap_or(1));
    }
    let mut out = Out::new();
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return usage(&error, &mut out),
    };
    let ended = run(&args, &mut out);
    let exit = ended.unwrap_or_else(|fault| {
        tell(&fault, args.json, &mut out);
        fault.code.exit()
    });
    finish(exit, &out)
}

/// The exit code; an answer that could not be printed is not a success.
fn finish(exit: Exit, out: &Out) -> ExitCode {
    if let (Some(e), Exit::Done) = (out.failure(), exit) {
        complain(&format!("doublure: {}", Fault::io("standard output", e)));
        return ExitCode::from(Exit::Failed as u8);
    }
    ExitCode::from(exit as u8)
}

/// Help and version are answers; the rest is a mistake in the words.
fn usage(error: &clap::Error, out: &mut Out) -> ExitCode {
    if !error.use_stderr() {
        let text = error.render();
        out.say(&if out.terminal { text.ansi().to_string() } else { text.to_string() });
        return finish(Exit::Done, out);
    }
    if std::env::args_os().any(|a| a == "--json") {
        let text = error.render().to_string();
        let cause = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
        tell(&Fault::new(Code::BadArgument, "the command line", cause, "see doublure --help"), true, out);
    } else {
        let _ = error.print();
    }
    ExitCode::from(Exit::Usage as u8)
}

/// Says a fault once, where its reader looks for it.
fn tell(fault: &Fault, json: bool, out: &mut Out) {
    match json {
        true => out.json(&json!({"error": fault})),
        false => complain(&format!("doublure: {}", plain(&fault.to_string()))),
    }
}

/// A line on standard error, which may be closed too.
fn complain(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

fn run(args: &Args, out: &mut Out) -> Res<Exit> {
    ask::check(&args.verb)?;
    if !nix::unistd::geteuid().is_root() && !matches!(args.verb, Verb::Doctor) {
        let cause = format!("it was started by user {}", nix::unistd::geteuid());
        return Err(Fault::new(Code::NotRoot, "doublure", cause, "run the command as root (sudo doublure ...)"));
    }
    let settings = settings(args)?;
    let socket = socket_in(&settings.run_dir);
    match (&args.verb, ask::request(&args.verb)?) {
        (Verb::Status { watch: true }, _) => watch(&socket, args.json, out),
        (Verb::Doctor, Some(request)) => {
            let answer = ask_agent(&socket, &request, args, out);
            match answer {
                Err(fault) if matches!(fault.code, Code::NoAgent | Code::NotRoot) => doctor_alone(&settings, args, out),
                answer => answer,
            }
        }
        (_, Some(request)) => ask_agent(&socket, &request, args, out),
        (_, None) => agent(settings),
    }
}

/// Reads the configuration. Only `doctor` does without one: it is asked before there is any.
fn settings(args: &Args) -> Res<Settings> {
    let path = args.config.as_deref().unwrap_or(Path::new(CONFIG_DEFAULT));
    let invalid = |cause: String| {
        let next = match cause.starts_with("Permission denied") {
            true => "run the command as root (sudo doublure ...), or name another with --config FILE",
            false => "write one (a line `host = \"NAME\"` is a beginning), or name another with --config FILE",
        };
        Fault::new(Code::ConfigInvalid, format!("configuration {}", path.display()), cause, next)
    };
    match read_text(path) {
        Ok(text) => crate::config::parse(&text, &path.display().to_string()),
        Err(e) if e.kind() == ErrorKind::NotFound && args.config.is_none() && matches!(args.verb, Verb::Doctor) => {
            complain(&format!("doublure: there is no {} yet, its defaults are assumed", path.display()));
            let host = nix::unistd::gethostname().ok().and_then(|h| h.into_string().ok());
            let host = host.filter(|h| crate::model::check_name("host", h).is_ok()).unwrap_or("localhost".into());
            crate::config::parse(&format!("host = \"{host}\"\n"), "the defaults")
        }
        Err(e) => Err(invalid(e.to_string())),
    }
}

/// A text file of at most a MiB.
fn read_text(path: &Path) -> std::io::Result<String> {
    const MAX_BYTES: u64 = 1 << 20;
    let file = std::fs::File::open(path)?;
    let mut text = String::new();
    file.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    match text.len() as u64 > MAX_BYTES {
        true => Err(std::io::Error::new(ErrorKind::FileTooLarge, "it is larger than a MiB")),
        false => Ok(text),
    }
}

/// One request: its events as they come, then its value.
fn ask_agent(socket: &Path, request: &Request, args: &Args, out: &mut Out) -> Res<Exit> {
    let mut follow = Follow::new(out, args.json);
    let last = call(socket, request, &mut |event| follow.event(event));
    let stepped = follow.stepped;
    drop(follow);
    match last? {
        Event::Done { value, exit } => {
            show(&args.verb, &value, stepped, args.json, out);
            Ok(exit)
        }
        Event::Failed { fault } => Err(fault),
        other => Err(Fault::internal("the agent's reply", format!("it ended with {other:?}"))),
    }
}

/// The doctor where no agent answers: it looks for itself.
fn doctor_alone(settings: &Settings, args: &Args, out: &mut Out) -> Res<Exit> {
    let (value, exit) = crate::agent::doctor(settings)?;
    show(&args.verb, &value, false, args.json, out);
    Ok(exit)
}

/// Prints the value that a verb ended with.
fn show(verb: &Verb, value: &Value, stepped: bool, json: bool, out: &mut Out) {
    if json {
        return out.json(value);
    }
    let text = match verb {
        Verb::Status { .. } => status::render(value, now()),
        Verb::Pair { address: None } => pairing(value),
        Verb::Doctor => checks(value),
        Verb::Failover { .. } if value["words"].is_string() => plan(value, stepped),
        Verb::Volume { verb: VolumeVerb::List } => volumes(value),
        _ => report(value, stepped),
    };
    out.say(&text);
}

/// What to type on the other host.
fn pairing(value: &Value) -> String {
    let Some(code) = value["code"].as_str() else {
        return describe(value, "");
    };
    let listen = value["listen"].as_str().unwrap_or("");
    // What listens everywhere is reached at an address that only the reader knows.
    let anywhere = ["0.0.0.0:", "[::]:", "*:"].iter().find_map(|any| listen.strip_prefix(any));
    let address = match (listen, anywhere) {
        ("", _) => "ADDRESS:PORT".into(),
        (_, Some(port)) => format!("ADDRESS-OF-THIS-HOST:{port}"),
        (listen, None) => listen.to_string(),
    };
    let lasts = value["valid_seconds"].as_f64().map_or(String::new(), |s| format!(", good for {}", out::seconds(s)));
    format!(
        "pairing code: {}   (once{lasts})\n\nOn the other host, as root:\n\n    doublure pair {}\n\nand type the code when it is asked for.\n",
        plain(code),
        plain(&address)
    )
}

/// The doctor's findings: what is well, what is not, and the cure beside it.
fn checks(value: &Value) -> String {
    let Some(list) = value["checks"].as_array() else {
        return describe(value, "");
    };
    let mut text = String::new();
    for check in list {
        let mark = match check["outcome"].as_str() {
            Some("ok") => "ok",
            Some("degraded") => "warn",
            Some("failed") => "FAIL",
            _ => "?",
        };
        text.push_str(&format!("  {mark:<4} {:<20} {}\n", word(&check["name"]), word(&check["detail"])));
        if let Some(cure) = check["cure"].as_str().filter(|c| !c.is_empty()) {
            text.push_str(&format!("       {:<20} cure: {}\n", "", plain(cure)));
        }
    }
    text + match value["ok"].as_bool() {
        Some(true) => "This host can replicate.\n",
        Some(false) => "This host cannot replicate until every FAIL above is cured.\n",
        None => "Whether this host can replicate is unknown.\n",
    }
}

fn volumes(value: &Value) -> String {
    let list = value.as_array().or_else(|| value["volumes"].as_array());
    match list.map(Vec::as_slice) {
        Some([]) => "no volumes: make one with `doublure volume create NAME --size 2G`\n".into(),
        Some(list) => objects(list, ""),
        None => describe(value, ""),
    }
}

/// A plan, or why there is none, in its own words; numbered steps only where they were not shown one by one.
fn plan(value: &Value, stepped: bool) -> String {
    let is_step = |line: &str| {
        let rest = line.trim_start().trim_start_matches(|c: char| c.is_ascii_digit());
        rest.starts_with(". ") && rest.len() < line.trim_start().len()
    };
    let lines = value["words"].as_str().unwrap_or_default().lines();
    let mut text: String = lines.filter(|line| !(stepped && is_step(line))).map(|line| plain(line) + "\n").collect();
    if let Some(loss) = value.get("expected_loss_ms") {
        let loss = loss.as_f64().map_or("unknown".into(), |ms| out::seconds(ms / 1000.0));
        text.push_str(&format!("  expected loss: {loss}\n"));
    }
    text
}

/// A report, without the steps that were shown already.
fn report(value: &Value, stepped: bool) -> String {
    let mut value = value.clone();
    let mut text = String::new();
    if let Some(object) = value.as_object_mut() {
        for key in ["steps", "checks"] {
            let steps = object.get(key).and_then(Value::as_array);
            let Some(steps) = steps.filter(|list| list.iter().all(|s| s["name"].is_string() && s["outcome"].is_string())) else {
                continue;
            };
            if !stepped {
                let line = |s: &Value| {
                    step_line(
                        &word(&s["name"]),
                        &word(&s["outcome"]),
                        s["detail"].as_str().unwrap_or(""),
                        s["ms"].as_u64().unwrap_or(0),
                    )
                };
                text.extend(steps.iter().map(line));
            }
            object.remove(key);
        }
    }
    text + &describe(&value, "")
}

fn now() -> Moment {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Moment(since.as_millis() as u64)
}

/// The status once a second, until nobody reads it any more. Once it has begun, an agent that restarts does not end it.
fn watch(socket: &Path, json: bool, out: &mut Out) -> Res<Exit> {
    let mut began = false;
    loop {
        let tick = Instant::now();
        let answer = match call(socket, &Request::Status, &mut |_| {}) {
            Ok(Event::Done { value, .. }) => Ok(value),
            Ok(Event::Failed { fault }) | Err(fault) => Err(fault),
            Ok(other) => Err(Fault::internal("the agent's reply", format!("it ended with {other:?}"))),
        };
        match answer {
            Ok(value) if json => out.json(&value),
            Ok(value) if out.terminal => redraw(&status::render(&value, now()), out),
            Ok(value) => out.say(&status::lines(&value, now())),
            Err(fault) if !began => return Err(fault),
            Err(fault) if out.terminal && !json => redraw(&format!("doublure: {}\n", plain(&fault.to_string())), out),
            Err(fault) => tell(&fault, json, out),
        }
        if out.closed() {
            return Ok(Exit::Done);
        }
        began = true;
        std::thread::sleep(Duration::from_secs(1).saturating_sub(tick.elapsed()));
    }
}

/// Writes over what was there, line by line, then clears the rest: no flicker.
fn redraw(text: &str, out: &mut Out) {
    let lines: String = text.lines().map(|line| format!("{line}\x1b[K\n")).collect();
    out.say(&format!("\x1b[H{lines}\x1b[J"));
}

/// Runs the agent in this process.
fn agent(settings: Settings) -> Res<Exit> {
    let colours = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(colours).with_target(false);
    // Under systemd the journal has its own clock.
    match std::env::var_os("JOURNAL_STREAM") {
        Some(_) => log.without_time().init(),
        None => log.init(),
    }
    let host = settings.host.clone();
    crate::agent::run(settings, &|| {
        tracing::info!("the agent of {host} is ready");
        notify_ready();
    })?;
    Ok(Exit::Done)
}

/// Tells a service manager (`Type=notify`) that we are ready; nobody else is told.
fn notify_ready() {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let told = (|| {
        use std::os::linux::net::SocketAddrExt;
        use std::os::unix::ffi::OsStrExt;
        use std::os::unix::net::{SocketAddr, UnixDatagram};
        let address = match name.as_bytes() {
            [b'@', hidden @ ..] => SocketAddr::from_abstract_name(hidden)?,
            path => SocketAddr::from_pathname(Path::new(std::ffi::OsStr::from_bytes(path)))?,
        };
        UnixDatagram::unbound()?.send_to_addr(b"READY=1\n", &address)
    })();
    if let Err(e) = told {
        tracing::warn!("the service manager could not be told that the agent is ready: {e}");
    }
}
