//! Capture against the real kernel: what is in the ring is what was written, and a cut is exact.

mod rig;

use doublure::model::Uuid;
use doublure::tracker::{Captured, Tracker, What};
use rig::{Loop, Pins};
use std::os::unix::fs::FileExt;
use std::path::Path;

const GROUP: Uuid = Uuid(*b"group one.......");
const VOLUME: Uuid = Uuid(*b"volume one......");

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_write_is_captured_with_its_bytes_and_refusals_have_reasons() {
    let pins = Pins::new("capture");
    let mut tracker = Tracker::open(&pins.0).unwrap();
    tracker.self_test(Path::new("/var/tmp")).unwrap();
    tracker.prepare_capture(Path::new("/var/tmp")).unwrap();
    assert_eq!(tracker.capture_refusal(), None);
    let device = Loop::new(64 << 20);
    tracker.track(GROUP, VOLUME, &device.identity()).unwrap();
    let mut capture = tracker.start_capture(GROUP, &[VOLUME], 1 << 20).unwrap();
    let memory = memmap2::MmapMut::map_anon(16 << 20).unwrap();
    let mut memory = memory;
    let _huge = memory.advise(memmap2::Advice::HugePage);
    memory.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at / 512) as u8 ^ at as u8);
    let direct = device.direct();
    direct.write_all_at(&memory[4096..4096 + 1536], 8192 + 512).unwrap();
    direct.write_all_at(&memory[..65536], 1 << 20).unwrap();
    direct.write_all_at(&memory[..], 32 << 20).unwrap();
    let mut records: Vec<Captured> = Vec::new();
    let to = capture.produced();
    capture
        .walk(to, &mut |volume, record| {
            assert_eq!(volume, 0);
            records.push(record);
        })
        .unwrap();
    assert!(records.len() >= 3, "{records:?}");
    let What::Data(at) = records[0].what else { panic!("{records:?}") };
    assert_eq!((records[0].offset_bytes, records[0].len_bytes), (8192 + 512, 1536));
    assert_eq!(capture.bytes(at, 1536), &memory[4096..4096 + 1536]);
    let What::Data(at) = records[1].what else { panic!("{records:?}") };
    assert_eq!(capture.bytes(at, 65536), &memory[..65536]);
    // What is over the cap says where it was, and no more.
    let large: Vec<_> = records[2..].iter().map(|r| (r.what == What::Hole, r.len_bytes)).collect();
    assert!(large.iter().all(|(hole, len)| *hole || *len <= 1 << 20), "{large:?}");
    assert_eq!(large.iter().map(|(_, len)| len).sum::<u64>(), 16 << 20);
    assert_eq!(capture.missed().unwrap(), vec![]);
    tracker.stop_capture(GROUP).unwrap();
}
