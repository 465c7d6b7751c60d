//! What the file may say, and how each mistake is answered.

use crate::config::Mode;
use crate::config::{Settings, parse, parse_duration, parse_size};
use crate::model::{Code, EngineKind};
use proptest::prelude::*;
use std::time::Duration;

fn read(text: &str) -> Settings {
    parse(text, "doublure.toml").unwrap()
}

/// The sentence that a file with `host` on line 1 and `line` on line 3 gets.
fn sentence(line: &str) -> String {
    let fault = parse(&format!("host = \"a\"\n# a remark\n{line}\n"), "doublure.toml").unwrap_err();
    assert_eq!(fault.code, Code::ConfigInvalid, "{line}");
    let text = fault.to_string();
    assert!(!text.contains('\n'), "{text}");
    text
}

#[test]
fn a_host_alone_gets_every_default() {
    let settings = read("host = \"paris-1\"\n");
    let expected = Settings {
        host: "paris-1".into(),
        state_dir: "/var/lib/doublure".into(),
        volume_dir: "/var/lib/doublure/volumes".into(),
        run_dir: "/run/doublure".into(),
        pin_dir: "/sys/fs/bpf/doublure".into(),
        listen: None,
        docker_socket: "/run/docker.sock".into(),
        mode: Mode::Continuous,
        interval: Duration::from_millis(100),
        checkpoint_interval: Duration::from_secs(60),
        capture_ring_bytes: 64 << 20,
        freeze_deadline: Duration::from_secs(2),
        cut_max_bytes: 32 << 20,
        journal_bytes: 1 << 30,
        bandwidth_bytes_per_second: None,
        io_engine: EngineKind::Auto,
        queue_depth: 32,
        credit_bytes: 16 << 20,
        health_timeout: Duration::from_secs(60),
    };
    assert_eq!(settings, expected);
}

#[test]
fn every_key_reaches_its_setting() {
    let settings = read(
        r#"
        host = "lyon"
        state_dir = "/srv/d"
        volume_dir = "/srv/images"
        run_dir = "/run/d"
        pin_dir = "/sys/fs/bpf/d"
        listen = "[::1]:7420"
        docker_socket = "/var/run/d.sock"
        mode = "interval"
        interval = "250ms"
        checkpoint_interval = "5s"
        capture_ring = "9 MiB"
        freeze_deadline = "3s"
        cut_max = "8 MiB"
        journal = "2G"
        bandwidth = 1048576
        io_engine = "io_uring"
        queue_depth = 7
        credit = "64m"
        health_timeout = "2m"
        "#,
    );
    let expected = Settings {
        host: "lyon".into(),
        state_dir: "/srv/d".into(),
        volume_dir: "/srv/images".into(),
        run_dir: "/run/d".into(),
        pin_dir: "/sys/fs/bpf/d".into(),
        listen: Some("[::1]:7420".into()),
        docker_socket: "/var/run/d.sock".into(),
        mode: Mode::Interval,
        interval: Duration::from_millis(250),
        checkpoint_interval: Duration::from_secs(5),
        capture_ring_bytes: 16 << 20,
        freeze_deadline: Duration::from_secs(3),
        cut_max_bytes: 8 << 20,
        journal_bytes: 2 << 30,
        bandwidth_bytes_per_second: Some(1 << 20),
        io_engine: EngineKind::IoUring,
        queue_depth: 7,
        credit_bytes: 64 << 20,
        health_timeout: Duration::from_secs(120),
    };
    assert_eq!(settings, expected);
}

#[test]
fn the_interval_depends_on_the_mode() {
    for (mode, ms) in [("continuous", 100), ("interval", 1000), ("freeze", 1000)] {
        assert_eq!(read(&format!("host = \"a\"\nmode = \"{mode}\"")).interval, Duration::from_millis(ms));
    }
}

#[test]
fn volumes_live_below_the_state_directory_unless_told_otherwise() {
    assert_eq!(read("host = \"a\"\nstate_dir = \"/d\"").volume_dir, std::path::Path::new("/d/volumes"));
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_known_ones() {
    assert_eq!(
        sentence("intervall = \"1s\""),
        "doublure.toml line 3: unknown key `intervall`; known keys are host, state_dir, volume_dir, run_dir, pin_dir, listen, \
         docker_socket, mode, interval, checkpoint_interval, capture_ring, freeze_deadline, cut_max, journal, bandwidth, io_engine, queue_depth, credit, health_timeout; \
         remove or correct it [CONFIG_INVALID]"
    );
    assert!(sentence("[agent]\ninterval = \"1s\"").starts_with("doublure.toml line 3: unknown key `agent`"));
    // The first wrong line is named, not the first in the alphabet.
    assert!(sentence("zzz = 1\naaa = 1").contains("line 3: unknown key `zzz`"));
}

#[test]
fn a_wrong_value_is_named_with_its_line_its_key_and_the_cure() {
    for (line, words) in [
        ("interval = \"49ms\"", "line 3: `interval` is 49ms, out of range; choose from 50ms to 3600s"),
        ("mode = \"sync\"", "`mode` is none of continuous, interval and freeze; choose one of the three"),
        ("interval = \"2h\"", "`interval` is 7200s, out of range"),
        ("interval = \"10\"", "`interval` cannot be used: it has no unit"),
        ("interval = 10", "`interval` is a TOML integer where text is wanted; write it as interval = \"1s\""),
        ("freeze_deadline = \"11s\"", "choose from 100ms to 10s"),
        ("freeze_deadline = \"10 years\"", "its unit is not one of ms, s, m and h"),
        ("cut_max = \"1023K\"", "`cut_max` is 1023 KiB, out of range; choose from 1 MiB to 256 MiB"),
        ("cut_max = \"257 MiB\"", "out of range"),
        ("journal = \"15 MiB\"", "choose from 16 MiB to 1024 TiB"),
        ("journal = \"1 GiBB\"", "its unit is not one of B, K, M, G and T"),
        ("journal = \"99999999T\"", "it is too large"),
        ("journal = -5", "it does not begin with a whole number"),
        ("journal = 0x1000000000", "is a TOML integer where a size is wanted"),
        ("bandwidth = 0", "`bandwidth` is 0 bytes, out of range"),
        ("bandwidth = true", "`bandwidth` is a TOML boolean where a size is wanted"),
        ("credit = \"0\"", "out of range"),
        ("credit = \"300M\"", "choose from 1 MiB to 256 MiB"),
        ("queue_depth = 0", "choose from 1 to 256"),
        ("queue_depth = 257", "choose from 1 to 256"),
        ("queue_depth = \"32\"", "`queue_depth` is not a whole number"),
        ("health_timeout = \"0s\"", "choose from 1s to 3600s"),
        ("io_engine = \"aio\"", "`io_engine` is none of auto, io_uring and pread"),
        ("listen = \"somewhere:7420\"", "`listen` is not a numeric address with a port"),
        ("listen = \"10.0.0.1\"", "`listen` is not a numeric address with a port"),
        ("state_dir = \"var/lib\"", "`state_dir` is not an absolute path"),
        ("run_dir = \"/run/../etc\"", "`run_dir` is not an absolute path free of `..`"),
        ("docker_socket = \"\"", "`docker_socket` is not an absolute path"),
        ("journal = \"1G\"\njournal = \"2G\"", "line 4: "),
        ("journal = ", "line 3: "),
    ] {
        let text = sentence(line);
        assert!(text.contains(words), "{line}: {text}");
    }
}

#[test]
fn a_host_is_required_and_must_be_a_name() {
    let missing = parse("", "/etc/doublure/doublure.toml").unwrap_err().to_string();
    assert_eq!(
        missing,
        "/etc/doublure/doublure.toml: the key `host` is missing; add a line such as host = \"paris-1\" [CONFIG_INVALID]"
    );
    let bad = parse("\nhost = \"a/b\"", "f").unwrap_err().to_string();
    assert!(bad.starts_with("f line 2: `host` cannot be used: it may only have letters"), "{bad}");
}

#[test]
fn sizes_are_binary_and_exact() {
    for (text, bytes) in [
        ("0", 0),
        ("1048576", 1 << 20),
        ("64k", 64 << 10),
        ("64 KB", 64 << 10),
        ("512 MiB", 512 << 20),
        ("512mib", 512 << 20),
        ("2G", 2 << 30),
        (" 3 T ", 3 << 40),
        ("7B", 7),
        ("16777215T", 16777215 << 40),
    ] {
        assert_eq!(parse_size(text).unwrap(), bytes, "{text}");
    }
    for text in ["", "G", "-1", "+1", "1.5G", "1 GG", "1 i", "16777216T", "99999999999999999999", "1_000", "１"] {
        assert_eq!(parse_size(text).unwrap_err().code, Code::BadArgument, "{text}");
    }
}

#[test]
fn durations_need_a_unit() {
    for (text, milliseconds) in [("250ms", 250), ("1s", 1000), ("2m", 120_000), ("1 h", 3_600_000)] {
        assert_eq!(parse_duration(text).unwrap(), Duration::from_millis(milliseconds), "{text}");
    }
    for text in ["", "1", "s", "-1s", "1.5s", "1S", "1d", "18446744073709551615h"] {
        assert_eq!(parse_duration(text).unwrap_err().code, Code::BadArgument, "{text}");
    }
}

/// Text that is nearly a configuration, so that the interesting branches are reached.
fn nearly() -> impl Strategy<Value = String> {
    let key =
        prop::sample::select(vec!["host", "interval", "journal", "listen", "queue_depth", "state_dir", "x", "[host]", "a.b"]);
    let value = prop_oneof![
        "\"[a-zA-Z0-9/.: ]{0,12}\"",
        "-?[0-9]{1,25}",
        "0x[0-9a-f]{1,20}",
        "\\PC{0,12}",
        Just("[1, 2]".to_string()),
        Just("{ a = 1 }".to_string()),
        Just("\"\"\"\n\n\"\"\"".to_string()),
    ];
    prop::collection::vec((key, value), 0..6)
        .prop_map(|lines| lines.into_iter().map(|(key, value)| format!("{key} = {value}\n")).collect())
}

proptest! {
    #[test]
    fn no_text_makes_it_panic_and_every_mistake_is_one_line(text in prop_oneof![any::<String>(), nearly()]) {
        if let Err(fault) = parse(&text, "f") {
            prop_assert_eq!(fault.code, Code::ConfigInvalid);
            prop_assert!(!fault.to_string().contains('\n'));
        }
        let _ = (parse_size(&text), parse_duration(&text));
    }

    #[test]
    fn a_size_in_bytes_reads_back(bytes in any::<u64>()) {
        prop_assert_eq!(parse_size(&bytes.to_string()).unwrap(), bytes);
    }
}
