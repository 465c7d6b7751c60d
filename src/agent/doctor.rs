//! What this host can and cannot do, each with its cure; nothing is changed.

use crate::config::Settings;
use crate::device;
use crate::docker::Docker;
use crate::host;
use crate::model::{EngineKind, Exit, Fault, Res};
use crate::tracker::Tracker;
use serde_json::{Value, json};
use std::path::Path;

struct Check {
    name: &'static str,
    /// Without it replication cannot work at all.
    needed: bool,
    outcome: Result<String, (String, String)>,
}

fn check(name: &'static str, needed: bool, outcome: Result<String, (String, String)>) -> Check {
    Check { name, needed, outcome }
}

fn said(fault: Fault) -> (String, String) {
    (format!("{}: {} [{}]", fault.thing, fault.cause, fault.code.as_str()), fault.next)
}

/// Looks at the host. Exit: 0 all well, 4 something optional is missing, 3 something needed is missing.
pub fn doctor(settings: &Settings) -> Res<(Value, Exit)> {
    let mut checks = vec![kernel(), btf()];
    checks.extend(tracker(settings));
    checks.push(engine(settings));
    for (name, needed, tool, package) in [
        ("mkfs.ext4", true, "mkfs.ext4", "e2fsprogs"),
        ("e2fsck", true, "e2fsck", "e2fsprogs"),
        ("mkfs.xfs", false, "mkfs.xfs", "xfsprogs"),
        ("xfs_repair", false, "xfs_repair", "xfsprogs"),
    ] {
        checks.push(check(
            name,
            needed,
            find_tool(tool).ok_or_else(|| (format!("{tool} is not installed"), format!("install the package {package}"))),
        ));
    }
    checks.push(docker(settings));
    checks.push(state_dir(settings));
    checks.push(check(
        "listen",
        false,
        settings.listen.clone().ok_or_else(|| {
            ("nothing listens for a peer".into(), "set `listen` in the configuration to stand by for another host".into())
        }),
    ));
    let bad_needed = checks.iter().any(|c| c.needed && c.outcome.is_err());
    let bad = checks.iter().any(|c| c.outcome.is_err());
    let mut rows: Vec<Value> = Vec::new();
    for c in checks {
        let (outcome, detail, cure) = match (c.outcome, c.needed) {
            (Ok(detail), _) => ("ok", detail, String::new()),
            (Err((detail, cure)), true) => ("failed", detail, cure),
            (Err((detail, cure)), false) => ("degraded", detail, cure),
        };
        rows.push(json!({ "name": c.name, "outcome": outcome, "needed": c.needed, "detail": detail, "cure": cure }));
    }
    let exit = match (bad_needed, bad) {
        (true, _) => Exit::Refused,
        (false, true) => Exit::Degraded,
        _ => Exit::Done,
    };
    Ok((json!({ "host": settings.host, "checks": rows, "ok": !bad_needed }), exit))
}

fn kernel() -> Check {
    let outcome = match std::fs::read_to_string("/proc/sys/kernel/osrelease") {
        Ok(release) => {
            let release = release.trim().to_string();
            let mut parts = release.split(['.', '-']).map(|p| p.parse::<u32>().unwrap_or(0));
            match (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= (6, 1) {
                true => Ok(release),
                false => Err((format!("kernel {release} is older than 6.1"), "boot a kernel of 6.1 or later".into())),
            }
        }
        Err(e) => Err((e.to_string(), "mount /proc".into())),
    };
    check("kernel", true, outcome)
}

fn btf() -> Check {
    let path = "/sys/kernel/btf/vmlinux";
    let outcome = match Path::new(path).exists() {
        true => Ok(path.into()),
        false => Err((format!("{path} is missing"), "boot a kernel built with CONFIG_DEBUG_INFO_BTF=y".into())),
    };
    check("btf", true, outcome)
}

/// Loads the programs under a name of their own and lets them prove that they see every kind of write, and copy it right.
fn tracker(settings: &Settings) -> [Check; 2] {
    let pins = settings.pin_dir.with_file_name(format!("doublure-doctor-{}", std::process::id()));
    let scratch = if settings.state_dir.is_dir() { settings.state_dir.clone() } else { std::env::temp_dir() };
    let mut opened = Tracker::open(&pins);
    let seen = opened.as_mut().map_err(|fault| fault.clone()).and_then(|tracker| tracker.self_test(&scratch));
    let copied = opened.as_mut().map_err(|fault| fault.clone()).and_then(|tracker| tracker.prepare_capture(&scratch));
    drop(opened);
    let _ = std::fs::remove_dir_all(&pins);
    let seen = seen.map(|()| "every kind of write was seen".to_string()).map_err(said);
    let copied = copied.map(|()| "every kind of write was copied right: no freeze is needed".to_string()).map_err(said);
    [check("tracker self-test", true, seen), check("capture", false, copied)]
}

fn engine(settings: &Settings) -> Check {
    let outcome = match device::engine(EngineKind::IoUring, 4) {
        Ok(_) => Ok("io_uring".into()),
        Err(fault) if settings.io_engine == EngineKind::IoUring => Err(said(fault)),
        Err(fault) => Err((
            fault.to_string(),
            "replication works with pread, more slowly; allow io_uring (kernel.io_uring_disabled=0)".into(),
        )),
    };
    check("io engine", settings.io_engine == EngineKind::IoUring, outcome)
}

fn find_tool(tool: &str) -> Option<String> {
    ["/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin", "/usr/local/bin"]
        .iter()
        .map(|dir| Path::new(dir).join(tool))
        .find(|path| path.exists())
        .map(|path| path.display().to_string())
}

fn docker(settings: &Settings) -> Check {
    let connect = || {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| Fault::io("the runtime", &e))?;
        // The connection's calls block on a handle, so the runtime runs on a thread of its own for as long as they last.
        let handle = runtime.handle().clone();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let running = std::thread::spawn(move || {
            let _ = runtime.block_on(stopped);
        });
        let result = Docker::connect(handle, &settings.docker_socket).map(drop);
        let _ = stop.send(());
        let _ = running.join();
        result
    };
    check("docker", true, connect().map(|()| settings.docker_socket.display().to_string()).map_err(said))
}

fn state_dir(settings: &Settings) -> Check {
    let dir = match settings.volume_dir.is_dir() {
        true => settings.volume_dir.clone(),
        false => std::env::temp_dir(),
    };
    let outcome = match host::free_bytes(&dir) {
        Ok(free) if free > settings.journal_bytes => Ok(format!("{} GiB free at {}", free >> 30, dir.display())),
        Ok(free) => Err((
            format!("only {} MiB free at {}", free >> 20, dir.display()),
            "the journal alone takes more: free space or lower `journal`".into(),
        )),
        Err(fault) => Err(said(fault)),
    };
    check("space", true, outcome)
}
