//! Compiles the tracker's eBPF programs with clang, which is all that is needed: no kernel headers, no libbpf headers.

use std::path::PathBuf;
use std::process::{Command, exit};

/// Each is an object of its own: capture may be refused by a kernel that takes the bitmap.
const OBJECTS: [&str; 2] = ["bitmap", "capture"];
const HEADERS: [&str; 2] = ["shared.bpf.h", "flight.bpf.h"];

/// One sentence that says what is wrong and what helps, then the end of the build.
fn give_up(source: &str, cause: &str) -> ! {
    eprintln!("cannot build src/tracker/{source}: {cause}");
    exit(1);
}

fn main() {
    println!("cargo::rerun-if-env-changed=CLANG");
    HEADERS.iter().for_each(|header| println!("cargo::rerun-if-changed=src/tracker/{header}"));
    let clang = std::env::var("CLANG").unwrap_or_else(|_| "clang".to_owned());
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for object in OBJECTS {
        let source = format!("{object}.bpf.c");
        println!("cargo::rerun-if-changed=src/tracker/{source}");
        // The object's hash names the pins in the kernel: the same source must give the same bytes in any directory.
        // Version 3 of the instruction set has the atomic exchanges (kernel 5.12, clang 12).
        let built = Command::new(&clang)
            .current_dir("src/tracker")
            .args(["-O2", "-g", "-target", "bpf", "-mcpu=v3", "-Wall", "-Werror", "-fdebug-compilation-dir=."])
            .args(["-c", &source, "-o"])
            .arg(out.join(format!("{object}.bpf.o")))
            .status();
        match built {
            Ok(status) if status.success() => {}
            Ok(status) => give_up(&source, &format!("{clang} failed ({status}); its words stand above")),
            Err(error) => give_up(
                &source,
                &format!("{clang} cannot be run ({error}); install clang (12 or later) or set CLANG to its path"),
            ),
        }
    }
}
