//! The ring's consumer alone: captures a device's writes, gathers them into cuts, and throws them away.
//!
//! `drain DEVICE IMAGE SECONDS` prints one line of JSON: bytes captured, cuts, what was read again, and the processor seconds that it
//! took. `./dev bench foreground` runs it beside fio.

use doublure::cut::{Limits, Source, Step, Stream};
use doublure::device::{DeviceFile, engine};
use doublure::model::{EngineKind, Uuid};
use doublure::tracker::Tracker;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

const GROUP: Uuid = Uuid(*b"drain group.....");
const VOLUME: Uuid = Uuid(*b"drain volume....");

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let [device, image, seconds] = args.as_slice() else {
        println!("drain: nothing to do without DEVICE IMAGE SECONDS; `./dev bench foreground` runs it");
        return;
    };
    let pins = PathBuf::from(format!("/sys/fs/bpf/doublure-drain-{}", std::process::id()));
    let outcome = run(Path::new(device), Path::new(image), seconds, &pins);
    for dir in std::fs::read_dir(&pins).into_iter().flatten().flatten() {
        let _gone = std::fs::remove_dir_all(dir.path());
    }
    let _gone = std::fs::remove_dir(&pins);
    if let Err(fault) = outcome {
        eprintln!("drain: {fault}");
        std::process::exit(1);
    }
}

fn run(device: &Path, image: &Path, seconds: &str, pins: &Path) -> doublure::model::Res<()> {
    let seconds: f64 = seconds.parse().unwrap_or(10.0);
    let identity = doublure::host::identity(device)?;
    let image = DeviceFile::open(image, false)?;
    let mut engine = engine(EngineKind::Auto, 32)?;
    let mut tracker = Tracker::open(pins)?;
    tracker.prepare_capture(Path::new("/var/tmp"))?;
    tracker.track(GROUP, VOLUME, &identity)?;
    let tracker = Mutex::new(tracker);
    let sources = [Source { id: VOLUME, name: "drained", device: device.into(), identity, image: &image }];
    let limits = Limits { freeze_deadline: Duration::from_secs(2), cut_max_bytes: 32 << 20 };
    let mut stream = Stream::open(&tracker, GROUP, &sources, 64 << 20)?;
    println!("ready");
    let (began, used) = (Instant::now(), processor_seconds());
    let (mut cuts, mut large, mut bytes) = (0u64, 0u64, 0u64);
    while began.elapsed().as_secs_f64() < seconds {
        let next = Instant::now() + Duration::from_millis(100);
        match stream.look(&tracker, &sources, engine.as_mut(), limits)? {
            Step::Cut => cuts += 1,
            Step::Large(_) => large += 1,
        }
        stream.emit(&mut |_, change| {
            bytes += match change {
                doublure::cut::Change::Blocks(_, bytes) | doublure::cut::Change::Sectors(_, bytes) => bytes.len() as u64,
            };
            Ok(())
        })?;
        // As the agent does: earlier when the ring fills.
        while Instant::now() < next && stream.capture().used_bytes() * 4 < stream.capture().size_bytes() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let (wall, processor, counts) = (began.elapsed().as_secs_f64(), processor_seconds() - used, stream.counts());
    println!(
        "{{\"cuts\":{cuts},\"large\":{large},\"emitted_bytes\":{bytes},\"captured_bytes\":{},\"reread_bytes\":{},\"holes\":{},\
         \"wall_seconds\":{wall:.3},\"processor_seconds\":{processor:.3}}}",
        counts.captured_bytes, counts.reread_bytes, counts.holes
    );
    stream.close(&tracker)
}

fn processor_seconds() -> f64 {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF).expect("getrusage of this process");
    let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
    seconds(usage.user_time()) + seconds(usage.system_time())
}
