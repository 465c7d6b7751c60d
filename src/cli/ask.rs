//! From words to a request: every argument is checked here, before anything is touched.

use crate::cli::args::{Protect, Verb, VolumeVerb};
use crate::cli::secret::read_code;
use crate::config::parse_size;
use crate::control::Request;
use crate::model::{Code, Fault, Res, check_name};
use std::io::{BufRead, IsTerminal, Read, stderr, stdin};

/// Checks the words alone; looks at nothing else.
pub(super) fn check(verb: &Verb) -> Res<()> {
    match verb {
        Verb::Agent | Verb::Doctor | Verb::Status { .. } | Verb::Pair { address: None } => Ok(()),
        Verb::Pair { address: Some(address) } => check_address(address),
        Verb::Volume { verb: VolumeVerb::List } => Ok(()),
        Verb::Volume { verb: VolumeVerb::Create { name, size, mount_options, .. } } => {
            check_name("volume", name)?;
            parse_size(size)?;
            check_mount_options(mount_options)
        }
        Verb::Volume { verb: VolumeVerb::Remove { name, confirm } } => {
            check_name("volume", name)?;
            match confirm {
                Some(again) if again != name => Err(not_confirmed(name, &format!("--confirm says {again:?}"))),
                _ => Ok(()),
            }
        }
        Verb::Protect(Protect { group, containers, volumes, peer }) => {
            check_name("group", group)?;
            containers.iter().try_for_each(|name| check_name("container", name))?;
            volumes.iter().try_for_each(|name| check_name("volume", name))?;
            peer.iter().try_for_each(|name| check_name("host", name))
        }
        Verb::Sync { group, .. } | Verb::Failover { group, .. } | Verb::Verify { group } => check_name("group", group),
    }
}

/// The request of a checked verb; asks its question where one is allowed. `None` for the verbs that are more than one request.
pub(super) fn request(verb: &Verb) -> Res<Option<Request>> {
    Ok(Some(match verb {
        Verb::Agent => return Ok(None),
        Verb::Doctor => Request::Doctor,
        Verb::Status { .. } => Request::Status,
        Verb::Pair { address: None } => Request::PairOpen,
        Verb::Pair { address: Some(address) } => {
            let code = read_code(&format!("code shown by `doublure pair` on {address}: "))?;
            Request::Pair { address: address.clone(), code }
        }
        Verb::Volume { verb: VolumeVerb::List } => Request::VolumeList,
        Verb::Volume { verb: VolumeVerb::Create { name, size, fs, mount_options } } => Request::VolumeCreate {
            name: name.clone(),
            size_bytes: parse_size(size)?,
            fs: (*fs).into(),
            mount_options: mount_options.clone(),
        },
        Verb::Volume { verb: VolumeVerb::Remove { name, confirm } } => {
            let confirm = match confirm {
                Some(again) => Some(again.clone()),
                None => ask_to_remove(name)?,
            };
            Request::VolumeRemove { name: name.clone(), confirm }
        }
        Verb::Protect(Protect { group, containers, volumes, peer }) => Request::Protect {
            group: group.clone(),
            peer: peer.clone(),
            containers: containers.clone(),
            volumes: volumes.clone(),
        },
        Verb::Sync { group, wait } => Request::Sync { group: group.clone(), wait: *wait },
        Verb::Failover { group, dry_run, force } => Request::Failover { group: group.clone(), dry_run: *dry_run, force: *force },
        Verb::Verify { group } => Request::Verify { group: group.clone() },
    }))
}

fn check_address(address: &str) -> Res<()> {
    let bad = |cause: &str| {
        let shown = address.chars().take(80).collect::<String>();
        Err(Fault::new(
            Code::BadArgument,
            format!("address {shown:?}"),
            cause,
            "write it as 10.0.0.2:7400, [fd00::2]:7400 or beta:7400",
        ))
    };
    let Some((host, port)) = address.rsplit_once(':') else {
        return bad("it has no port");
    };
    let inside = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let host_fine = match inside {
        Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
        None => check_name("host", host).is_ok(),
    };
    match (host_fine, port.parse::<u16>(), port.bytes().all(|b| b.is_ascii_digit())) {
        (true, Ok(1..), true) => Ok(()),
        (false, ..) => bad("its host is neither a name nor an address"),
        _ => bad("its port is not a number from 1 to 65535"),
    }
}

fn check_mount_options(options: &str) -> Res<()> {
    match options.len() <= 1024 && options.bytes().all(|b| b.is_ascii_graphic()) {
        true => Ok(()),
        false => Err(Fault::new(
            Code::BadArgument,
            "--mount-options",
            "they have a blank or another character that no mount option has, or are longer than 1024",
            "write them as in mount -o, with commas",
        )),
    }
}

fn not_confirmed(name: &str, cause: &str) -> Fault {
    let next = format!("repeat its name if its data may go: --confirm {name}");
    Fault::new(Code::BadArgument, format!("removal of volume {name} and its data"), cause, next)
}

/// On a terminal the name is asked for; elsewhere nothing is, and the agent says what it would take.
fn ask_to_remove(name: &str) -> Res<Option<String>> {
    if !stdin().is_terminal() || !stderr().is_terminal() {
        return Ok(None);
    }
    eprint!("This removes volume {name} and all its data. Type its name to go on: ");
    let mut line = Vec::new();
    stdin().lock().take(256).read_until(b'\n', &mut line).map_err(|e| Fault::io("standard input", &e))?;
    match String::from_utf8_lossy(&line).trim() {
        again if again == name => Ok(Some(name.to_string())),
        _ => Err(not_confirmed(name, "another name was typed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_a_host_and_a_port() {
        for good in ["10.0.0.2:7400", "beta:1", "beta.example.org:65535", "[fd00::2]:7400", "[::]:1"] {
            check_address(good).unwrap();
        }
        for bad in [
            "",
            ":",
            "beta",
            "beta:",
            ":7400",
            "beta:0",
            "beta:65536",
            "beta:+1",
            "beta:x",
            "fd00::2:7400",
            "[fd00::2]",
            "[x]:1",
            "a b:1",
            "a/b:1",
            "b\u{e9}ta:1",
        ] {
            assert_eq!(check_address(bad).unwrap_err().code, Code::BadArgument, "{bad}");
        }
    }

    #[test]
    fn mount_options_are_one_plain_word() {
        for good in ["", "noatime", "noatime,data=ordered"] {
            check_mount_options(good).unwrap();
        }
        for bad in ["a b", "a\nb", "a\0", "\u{e9}", &"x".repeat(1025)] {
            assert!(check_mount_options(bad).is_err(), "{bad:?}");
        }
    }
}
