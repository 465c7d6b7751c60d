//! Compiles the tracker's eBPF programs with clang, which is all that is needed: no kernel headers, no libbpf headers.

use std::path::PathBuf;
use std::process::{Command, exit};

/// One sentence that says what is wrong and what helps, then the end of the build.
fn give_up(cause: &str) -> ! {
    eprintln!("cannot build src/tracker/bitmap.bpf.c: {cause}");
    exit(1);
}

fn main() {
    println!("cargo::rerun-if-changed=src/tracker/bitmap.bpf.c");
    println!("cargo::rerun-if-env-changed=CLANG");
    let clang = std::env::var("CLANG").unwrap_or_else(|_| "clang".to_owned());
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("bitmap.bpf.o");
    // The object's hash names the pins in the kernel: the same source must give the same bytes in any directory.
    let built = Command::new(&clang)
        .current_dir("src/tracker")
        .args(["-O2", "-g", "-target", "bpf", "-Wall", "-Werror", "-fdebug-compilation-dir=."])
        .args(["-c", "bitmap.bpf.c", "-o"])
        .arg(&out)
        .status();
    match built {
        Ok(status) if status.success() => {}
        Ok(status) => give_up(&format!("{clang} failed ({status}); its words stand above")),
        Err(error) => give_up(&format!("{clang} cannot be run ({error}); install clang (11 or later) or set CLANG to its path")),
    }
}
