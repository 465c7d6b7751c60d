//! Calls `cli` and nothing else.

fn main() -> std::process::ExitCode {
    doublure::cli::main()
}
