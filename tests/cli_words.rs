//! The words of the command: help with an example for every verb, and every mistake with its exit code and its sentence.
//! Nothing here needs root or an agent.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Every verb, as it is typed.
const VERBS: [&str; 11] = [
    "agent",
    "doctor",
    "pair",
    "volume create",
    "volume list",
    "volume remove",
    "protect",
    "status",
    "sync",
    "failover",
    "verify",
];

fn doublure(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_doublure")).args(words).stdin(Stdio::null()).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn every_verb_has_help_with_an_example() {
    for verb in VERBS.iter().chain(&["", "volume"]) {
        for flag in ["--help", "-h"] {
            let words: Vec<&str> = verb.split_whitespace().chain([flag]).collect();
            let out = doublure(&words);
            assert_eq!(out.status.code(), Some(0), "{words:?}");
            assert!(out.stderr.is_empty(), "{words:?}");
            let help = text(&out.stdout);
            let example = help.split("Example").nth(1).unwrap_or_else(|| panic!("{words:?} has no example:\n{help}"));
            assert!(example.contains(format!("doublure {verb}").trim_end()), "{words:?}:\n{help}");
            assert!(help.contains("--json") && help.contains("--config"), "{words:?}");
            assert!(!help.contains('\u{1b}'), "no colour in a pipe: {words:?}");
        }
    }
}

#[test]
fn the_verbs_are_these_and_the_helper_is_not_shown() {
    let listed = |words: &[&str]| -> Vec<String> {
        let out = doublure(words);
        let help = text(&out.stdout).to_string();
        let list = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap().to_string();
        list.lines().filter_map(|l| l.split_whitespace().next()).map(String::from).filter(|v| v != "help").collect()
    };
    let mut all = listed(&["--help"]);
    all.retain(|v| v != "volume");
    all.extend(listed(&["volume", "--help"]).iter().map(|v| format!("volume {v}")));
    all.sort();
    let mut wanted = VERBS.map(String::from).to_vec();
    wanted.sort();
    assert_eq!(all, wanted);
}

#[test]
fn the_version_is_the_crate_s() {
    let out = doublure(&["--version"]);
    assert_eq!((out.status.code(), text(&out.stdout)), (Some(0), concat!("doublure ", env!("CARGO_PKG_VERSION"), "\n")));
}

#[test]
fn words_that_do_not_fit_end_with_two_and_touch_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("doublure.toml");
    let before = format!("host = \"alpha\"\nrun_dir = \"{}\"\nstate_dir = \"{0}\"\n", dir.path().join("run").display());
    std::fs::write(&config, &before).unwrap();
    let long = "x".repeat(129);
    let cases: Vec<(Vec<&str>, &str)> = vec![
        (vec![], "Usage"),
        (vec!["dance"], "unrecognized subcommand"),
        (vec!["freeze"], "unrecognized subcommand"),
        (vec!["status", "--wait"], "unexpected argument"),
        (vec!["status", "shop"], "unexpected argument"),
        (vec!["volume"], "Usage"),
        (vec!["volume", "create", "a"], "--size"),
        (vec!["volume", "create", "--size", "2G"], "<NAME>"),
        (vec!["volume", "create", "a", "--size", "2G", "--fs", "ntfs"], "invalid value 'ntfs'"),
        (vec!["volume", "create", "a", "--size", "2 bushels"], "[BAD_ARGUMENT]"),
        (vec!["volume", "create", "a", "--size", "-1"], "'-1'"),
        (vec!["volume", "create", "a", "--size", ""], "[BAD_ARGUMENT]"),
        (vec!["volume", "create", "../a", "--size", "2G"], "[BAD_ARGUMENT]"),
        (vec!["volume", "create", "a", "--size", "2G", "--mount-options", "ro, suid"], "[BAD_ARGUMENT]"),
        (vec!["volume", "remove", "a/b", "--confirm", "a/b"], "[BAD_ARGUMENT]"),
        (vec!["volume", "remove", "a", "--confirm", "b"], "--confirm a [BAD_ARGUMENT]"),
        (vec!["protect", "shop"], "--container"),
        (vec!["protect", "--container", "db"], "<GROUP>"),
        (vec!["protect", "sh op", "--container", "db"], "[BAD_ARGUMENT]"),
        (vec!["protect", "shop", "--container", ""], "[BAD_ARGUMENT]"),
        (vec!["protect", "shop", "--volume", ".."], "[BAD_ARGUMENT]"),
        (vec!["protect", "shop", "--volume", "a", "--peer", "b\nc"], "[BAD_ARGUMENT]"),
        (vec!["sync"], "<GROUP>"),
        (vec!["sync", "é"], "[BAD_ARGUMENT]"),
        (vec!["failover", &long], "[BAD_ARGUMENT]"),
        (vec!["failover", "shop", "--forse"], "--force"),
        (vec!["verify", ""], "[BAD_ARGUMENT]"),
        (vec!["pair", "beta"], "it has no port"),
        (vec!["pair", "beta:0"], "port"),
        (vec!["pair", "beta:7400", "1234-5678"], "unexpected argument"),
    ];
    for (words, says) in cases {
        let words: Vec<&str> = words.into_iter().chain(["--config", config.to_str().unwrap()]).collect();
        let out = doublure(&words);
        assert_eq!(out.status.code(), Some(2), "{words:?}");
        assert!(out.stdout.is_empty(), "{words:?}");
        let said = text(&out.stderr);
        assert!(said.contains(says), "{words:?} said {said}");
        assert!(!said.contains("panicked") && !said.contains('\u{1b}'), "{words:?} said {said}");

        let out = doublure(&[&["--json"], &words[..]].concat());
        assert_eq!(out.status.code(), Some(2), "{words:?}");
        let error: Value = serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{words:?}: {e}"));
        let keys: Vec<&String> = error["error"].as_object().unwrap().keys().collect();
        assert_eq!(keys, ["cause", "code", "next", "thing"], "{words:?}");
        assert_eq!(error["error"]["code"], "BAD_ARGUMENT", "{words:?}");
        assert!(out.stderr.is_empty(), "{words:?}");
    }
    assert_eq!(std::fs::read_to_string(&config).unwrap(), before);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was made beside the configuration");
}

/// `doctor` is the verb that anybody may try, so it shows what is wrong with a configuration.
fn with_config(config: &Path) -> (Option<i32>, String) {
    let out = doublure(&["doctor", "--config", config.to_str().unwrap()]);
    assert!(out.stdout.is_empty());
    let said = text(&out.stderr).to_string();
    assert!(said.starts_with("doublure: ") && said.ends_with("[CONFIG_INVALID]\n") && said.lines().count() == 1, "{said}");
    (out.status.code(), said)
}

#[test]
fn a_configuration_that_is_wrong_ends_with_two_and_stays_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("doublure.toml");
    let cases: [(&[u8], &str); 5] = [
        (b"host = \"alpha\"\nintervall = \"1 s\"\n", "intervall"),
        (b"host = \"alpha\"\ninterval = 7\n", "interval"),
        (b"host = \"alpha\n", "line 1"),
        (b"host = \"al\xffpha\"\n", "UTF-8"),
        (b"", "host"),
    ];
    for (bytes, says) in cases {
        std::fs::write(&config, bytes).unwrap();
        let (code, said) = with_config(&config);
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains(says) && said.contains("doublure.toml"), "{said}");
        assert_eq!(std::fs::read(&config).unwrap(), bytes);
    }
    std::fs::write(&config, vec![b'#'; (1 << 20) + 1]).unwrap();
    assert!(with_config(&config).1.contains("larger than a MiB"));
    let (code, said) = with_config(&dir.path().join("missing.toml"));
    assert_eq!(code, Some(2));
    assert!(said.contains("missing.toml: No such file") && said.contains("--config FILE"), "{said}");
    assert_eq!(with_config(dir.path()).0, Some(2), "a directory");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_closed_pipe_is_quiet_and_a_full_disk_is_not() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_doublure"));
    let child = child.args(["failover", "--help"]).stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null());
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let out = child.stdout(writer).spawn().unwrap().wait_with_output().unwrap();
    assert_eq!((out.status.code(), text(&out.stderr)), (Some(0), ""));

    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let out = child.stdout(full).spawn().unwrap().wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).starts_with("doublure: standard output: No space left"), "{}", text(&out.stderr));
}
