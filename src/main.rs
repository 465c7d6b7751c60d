//! Calls `cli` and nothing else.

fn main() -> std::process::ExitCode {
    // The hidden verb comes before any parsing: the helper must not depend on what a config or a terminal looks like.
    if std::env::args_os().nth(1).is_some_and(|verb| verb == "freeze-helper") {
        return std::process::ExitCode::from(doublure::host::freeze_helper_main() as u8);
    }
    doublure::cli::main()
}
