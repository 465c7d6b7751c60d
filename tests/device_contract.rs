//! The contract of `device`, held by both engines on real files, with and without direct I/O, and by the RAM disk.
#![allow(missing_docs, unsafe_code)]

use doublure::device::double::RamDisk;
use doublure::device::{DeviceFile, Engine, RUN_BYTES_MAX, engine};
use doublure::model::{ByteRun, Code, EngineKind, Fault, Res};
use proptest::prelude::*;
use std::collections::HashMap;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

const KINDS: [EngineKind; 2] = [EngineKind::IoUring, EngineKind::Pread];

fn run(offset: u64, len: u64) -> ByteRun {
    ByteRun { offset, len }
}

/// Where images of a test lie.
enum Place {
    Dir(tempfile::TempDir),
    Ram(Arc<RamDisk>),
}

impl Place {
    /// The build directory's disk, the RAM file system, a RAM disk.
    fn all(size: u64) -> Vec<Place> {
        let mut places =
            vec![Place::Dir(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()), Place::Ram(RamDisk::new(size))];
        if Path::new("/dev/shm").is_dir() {
            places.push(Place::Dir(tempfile::tempdir_in("/dev/shm").unwrap()));
        }
        places
    }
    fn make(&self, size: u64) -> DeviceFile {
        match self {
            Place::Dir(dir) => DeviceFile::create(&dir.path().join("image"), size).unwrap(),
            Place::Ram(disk) => disk.open(true),
        }
    }
    fn bytes(&self) -> Vec<u8> {
        match self {
            Place::Dir(dir) => std::fs::read(dir.path().join("image")).unwrap(),
            Place::Ram(disk) => disk.bytes(),
        }
    }
}

/// Writes each run filled with its byte, in the order given.
fn write_all(engine: &mut dyn Engine, file: &DeviceFile, runs: &[(ByteRun, u8)]) -> Res<()> {
    let mut left = runs.iter();
    engine.write(file, &mut |buffer| {
        assert_eq!(buffer.len() as u64, RUN_BYTES_MAX);
        assert_eq!(buffer.as_ptr().addr() % 4096, 0);
        Ok(left.next().map(|(run, fill)| {
            buffer[..run.len as usize].fill(*fill);
            *run
        }))
    })
}

/// Reads the runs; gives them as they were delivered.
fn read_all(engine: &mut dyn Engine, file: &DeviceFile, runs: &[ByteRun]) -> Res<Vec<(ByteRun, Vec<u8>)>> {
    let mut got = Vec::new();
    engine.read(file, &mut runs.iter().copied(), &mut |run, bytes| {
        got.push((run, bytes.to_vec()));
        Ok(())
    })?;
    Ok(got)
}

/// A run of whole sectors within `sectors`, at most the largest allowed.
fn any_run(sectors: u64) -> impl Strategy<Value = ByteRun> {
    (0..sectors).prop_flat_map(move |start| {
        let room = (sectors - start).min(RUN_BYTES_MAX / 512);
        prop_oneof![1..=room, 1..=room.min(8)].prop_map(move |count| run(start * 512, count * 512))
    })
}

/// A size that is often not a multiple of 4096, and a list of runs for it.
fn any_case() -> impl Strategy<Value = (u64, Vec<(ByteRun, u8)>, Vec<ByteRun>, usize)> {
    (1u64..4000).prop_flat_map(|sectors| {
        let writes = prop::collection::vec((any_run(sectors), any::<u8>()), 0..40);
        (Just(sectors * 512), writes, prop::collection::vec(any_run(sectors), 0..40), 1usize..20)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Overlapping runs land in the order given, reads come back in the order asked for, on every medium and at any depth.
    #[test]
    fn random_runs_agree_with_a_plain_vector((size, writes, reads, depth) in any_case()) {
        let mut oracle = vec![0u8; size as usize];
        for (run, fill) in &writes {
            oracle[run.offset as usize..run.end() as usize].fill(*fill);
        }
        for kind in KINDS {
            for place in Place::all(size) {
                let mut engine = engine(kind, depth).unwrap();
                let file = place.make(size);
                write_all(&mut *engine, &file, &writes).unwrap();
                file.flush().unwrap();
                let got = read_all(&mut *engine, &file, &reads).unwrap();
                prop_assert_eq!(got.len(), reads.len());
                for (asked, (run, bytes)) in reads.iter().zip(&got) {
                    prop_assert_eq!(asked, run);
                    prop_assert!(bytes == &oracle[run.offset as usize..run.end() as usize], "{} {:?} of {}", engine.name(), run, size);
                }
                prop_assert!(place.bytes() == oracle, "{} left other bytes", engine.name());
            }
        }
    }

    /// Zeroing and its holes: what is not in an extent reads as zeroes.
    #[test]
    fn zeroed_ranges_read_as_zeroes((size, writes, zeroes, _) in any_case()) {
        let mut oracle = vec![0u8; size as usize];
        for (run, fill) in &writes {
            oracle[run.offset as usize..run.end() as usize].fill(*fill);
        }
        for run in &zeroes {
            oracle[run.offset as usize..run.end() as usize].fill(0);
        }
        for place in Place::all(size) {
            let file = place.make(size);
            write_all(&mut *engine(EngineKind::Auto, 4).unwrap(), &file, &writes).unwrap();
            for run in &zeroes {
                file.zero(*run).unwrap();
            }
            prop_assert!(place.bytes() == oracle);
            let mut last = 0;
            for extent in file.data_extents(run(0, size)).unwrap() {
                prop_assert!(extent.len > 0 && extent.offset >= last && extent.end() <= size);
                prop_assert!(oracle[last as usize..extent.offset as usize].iter().all(|b| *b == 0));
                last = extent.end();
            }
            prop_assert!(oracle[last as usize..].iter().all(|b| *b == 0));
        }
    }
}

#[test]
fn each_engine_says_its_name_and_auto_gets_the_ring_where_there_is_one() {
    assert_eq!(engine(EngineKind::Pread, 8).unwrap().name(), "pread");
    let ring = engine(EngineKind::IoUring, 8);
    let auto = engine(EngineKind::Auto, 8).unwrap().name();
    match ring {
        Ok(ring) => assert_eq!((ring.name(), auto), ("io_uring", "io_uring")),
        Err(fault) => assert_eq!((fault.code, auto), (Code::KernelUnsupported, "pread")),
    }
}

/// Lets io_uring_setup(2) fail in this thread, as a container's seccomp profile does.
fn forbid_io_uring(errno: i32) {
    let load_number = libc::sock_filter { code: 0x20, jt: 0, jf: 0, k: 0 };
    let is_setup = libc::sock_filter { code: 0x15, jt: 0, jf: 1, k: libc::SYS_io_uring_setup as u32 };
    let refuse = libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: libc::SECCOMP_RET_ERRNO | errno as u32 };
    let allow = libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW };
    let mut program = [load_number, is_setup, refuse, allow];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the filter is copied by the kernel and binds this thread alone.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
    }
}

#[test]
fn where_io_uring_is_refused_auto_reads_on_with_pread() {
    for errno in [libc::EPERM, libc::ENOSYS] {
        let refused = std::thread::spawn(move || {
            forbid_io_uring(errno);
            let fault = engine(EngineKind::IoUring, 8).err().unwrap();
            assert_eq!(fault.code, Code::KernelUnsupported, "{fault}");
            let mut engine = engine(EngineKind::Auto, 8).unwrap();
            let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            let file = DeviceFile::create(&dir.path().join("image"), 8192).unwrap();
            write_all(&mut *engine, &file, &[(run(4096, 4096), 3)]).unwrap();
            assert_eq!(read_all(&mut *engine, &file, &[run(4096, 512)]).unwrap()[0].1, [3; 512]);
            engine.name()
        });
        assert_eq!(refused.join().unwrap(), "pread");
    }
}

#[test]
fn direct_io_is_used_where_it_works_and_admitted_where_not() {
    let disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let probe = disk.path().join("probe");
    std::fs::write(&probe, [0; 4096]).unwrap();
    let expected = {
        use std::os::unix::fs::OpenOptionsExt;
        std::fs::File::options().read(true).custom_flags(libc::O_DIRECT).open(&probe).is_ok()
    };
    assert_eq!(DeviceFile::open(&probe, false).unwrap().direct(), expected);
    assert!(!RamDisk::new(4096).open(false).direct());
    if Path::new("/dev/shm").is_dir() {
        let memory = tempfile::tempdir_in("/dev/shm").unwrap();
        assert!(!DeviceFile::create(&memory.path().join("image"), 4096).unwrap().direct());
    }
}

#[test]
fn a_new_image_is_private_sparse_and_made_once() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("new");
    let file = DeviceFile::create(&path, 1 << 40).unwrap();
    assert_eq!(file.size_bytes(), 1 << 40);
    assert_eq!(file.data_extents(run(0, 1 << 40)).unwrap(), []);
    let meta = std::fs::metadata(&path).unwrap();
    assert_eq!(meta.permissions().mode() & 0o7777, 0o600);
    use std::os::unix::fs::MetadataExt;
    assert_eq!(file.identity().unwrap(), (meta.dev(), meta.ino()));
    assert_eq!(DeviceFile::create(&path, 4096).err().unwrap().code, Code::NameTaken);
    for bad in [0, 511, u64::MAX - 511] {
        assert_eq!(DeviceFile::create(&dir.path().join("bad"), bad).err().unwrap().code, Code::BadArgument);
    }
    assert!(!dir.path().join("bad").exists());
}

#[test]
fn what_is_no_image_is_refused() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let ragged = dir.path().join("ragged");
    std::fs::write(&ragged, [1; 700]).unwrap();
    let empty = dir.path().join("empty");
    std::fs::write(&empty, []).unwrap();
    for path in [dir.path(), &ragged, &empty, Path::new("/dev/null")] {
        assert_eq!(DeviceFile::open(path, false).err().unwrap().code, Code::NotABlockImage, "{path:?}");
    }
    assert_eq!(DeviceFile::open(&dir.path().join("none"), false).err().unwrap().code, Code::IoError);
}

#[test]
fn a_run_outside_the_image_moves_nothing_and_spoils_nothing() {
    for kind in KINDS {
        for place in Place::all(8192 + 512) {
            let file = place.make(8192 + 512);
            let mut engine = engine(kind, 4).unwrap();
            for bad in
                [run(8192, 1024), run(100, 512), run(0, 100), run(0, 0), run(u64::MAX - 511, 512), run(0, RUN_BYTES_MAX + 512)]
            {
                let fault = engine.write(&file, &mut |_| Ok(Some(bad))).unwrap_err();
                assert_eq!(fault.code, Code::Internal, "{bad:?}");
                assert_eq!(read_all(&mut *engine, &file, &[bad]).unwrap_err().code, Code::Internal);
            }
            file.flush().unwrap();
            // What was asked before the bad run is delivered.
            let mut seen = 0;
            let asked = [run(0, 4096), run(4096, 4096), run(8192, 1024)];
            let fault = engine.read(&file, &mut asked.into_iter(), &mut |_, _| {
                seen += 1;
                Ok(())
            });
            assert_eq!((fault.unwrap_err().code, seen), (Code::Internal, 2));
        }
    }
}

#[test]
fn a_read_only_handle_refuses_writes() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("image");
    drop(DeviceFile::create(&path, 4096).unwrap());
    let file = DeviceFile::open(&path, false).unwrap();
    for kind in KINDS {
        assert_eq!(write_all(&mut *engine(kind, 2).unwrap(), &file, &[(run(0, 512), 1)]).unwrap_err().code, Code::Internal);
    }
    assert_eq!(file.zero(run(0, 512)).unwrap_err().code, Code::Internal);
    assert_eq!(std::fs::read(&path).unwrap(), [0; 4096]);
}

#[test]
fn an_image_cut_short_behind_our_back_is_an_error_with_its_offset() {
    for kind in KINDS {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = dir.path().join("image");
        let file = DeviceFile::create(&path, 1 << 20).unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(512 << 10).unwrap();
        let runs: Vec<ByteRun> = (0..4).map(|i| run(i * RUN_BYTES_MAX, RUN_BYTES_MAX)).collect();
        let mut seen = 0;
        let fault = engine(kind, 8).unwrap().read(&file, &mut runs.into_iter(), &mut |_, _| {
            seen += 1;
            Ok(())
        });
        let fault = fault.unwrap_err();
        assert_eq!((fault.code, seen), (Code::IoError, 2));
        assert!(fault.thing.contains("at byte 524288"), "{fault}");
    }
}

#[test]
fn a_sink_that_fails_or_panics_leaves_the_engine_usable() {
    for kind in KINDS {
        for place in Place::all(4 << 20) {
            let file = place.make(4 << 20);
            let mut engine = engine(kind, 8).unwrap();
            let runs: Vec<(ByteRun, u8)> = (0..16).map(|i| (run(i * RUN_BYTES_MAX, RUN_BYTES_MAX), i as u8 + 1)).collect();
            write_all(&mut *engine, &file, &runs).unwrap();
            let asked: Vec<ByteRun> = runs.iter().map(|(run, _)| *run).collect();
            let stop = Fault::internal("the sink", "it had enough");
            let got = engine.read(&file, &mut asked.iter().copied(), &mut |_, _| Err(stop.clone()));
            assert_eq!(got, Err(stop));
            let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                engine.read(&file, &mut asked.iter().copied(), &mut |run, _| {
                    assert!(run.offset < RUN_BYTES_MAX * 3, "enough");
                    Ok(())
                })
            }));
            assert!(panicked.is_err());
            for ((run, fill), (got, bytes)) in runs.iter().zip(read_all(&mut *engine, &file, &asked).unwrap()) {
                assert_eq!(*run, got);
                assert!(bytes.iter().all(|b| b == fill));
            }
        }
    }
}

#[test]
fn one_engine_serves_files_of_both_kinds_in_turn() {
    for kind in KINDS {
        let mut engine = engine(kind, 4).unwrap();
        for round in 1..4u8 {
            for place in Place::all(4096 * 3 + 512) {
                let file = place.make(4096 * 3 + 512);
                write_all(&mut *engine, &file, &[(run(4096, 4096 * 2 + 512), round)]).unwrap();
                let got = read_all(&mut *engine, &file, &[run(0, 4096 * 3 + 512)]).unwrap();
                assert!(got[0].1[4096..].iter().all(|b| *b == round) && got[0].1[..4096].iter().all(|b| *b == 0));
            }
        }
    }
}

#[test]
fn buffered_bytes_of_somebody_else_are_seen_by_a_direct_read() {
    for kind in KINDS {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = dir.path().join("image");
        let file = DeviceFile::create(&path, 64 << 10).unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().write_all_at(&[7; 5000], 3000).unwrap();
        let got = read_all(&mut *engine(kind, 4).unwrap(), &file, &[run(0, 64 << 10)]).unwrap();
        assert!(got[0].1[3000..8000].iter().all(|b| *b == 7));
    }
}

#[test]
fn a_failed_write_or_flush_is_remembered_for_ever() {
    for kind in KINDS {
        let disk = RamDisk::new(1 << 20);
        let mut engine = engine(kind, 4).unwrap();
        let file = disk.open(true);
        disk.fail_nth(2, libc::EIO);
        let fault = write_all(&mut *engine, &file, &[(run(0, 4096), 1), (run(4096, 4096), 2), (run(8192, 4096), 3)]).unwrap_err();
        assert_eq!(fault.code, Code::IoError);
        assert!(fault.thing.contains("at byte 4096"), "{fault}");
        assert_eq!(disk.bytes()[8192], 0, "it went on after a failed write");
        let doomed: [Res<()>; 4] = [
            file.flush(),
            file.zero(run(0, 512)),
            write_all(&mut *engine, &file, &[(run(0, 512), 9)]),
            read_all(&mut *engine, &file, &[run(0, 512)]).map(drop),
        ];
        for got in doomed {
            assert_eq!(got.unwrap_err().code, Code::FlushFailed);
        }

        let file = disk.open(true);
        write_all(&mut *engine, &file, &[(run(0, 4096), 5)]).unwrap();
        disk.fail_nth(1, libc::EIO);
        assert_eq!(file.flush().unwrap_err().code, Code::FlushFailed);
        assert_eq!(file.flush().unwrap_err().code, Code::FlushFailed, "a failed flush must not be retried");
        disk.open(true).flush().unwrap();
        disk.cut_power(&mut |_| false);
        assert_eq!(disk.bytes()[0], 0, "what a failed flush lost came back");

        // A full disk accepted nothing, so nothing can get lost: the handle stays good.
        let file = disk.open(true);
        disk.fail_nth(1, libc::ENOSPC);
        assert_eq!(write_all(&mut *engine, &file, &[(run(0, 4096), 5)]).unwrap_err().code, Code::DiskFull);
        write_all(&mut *engine, &file, &[(run(0, 4096), 5)]).unwrap();
        file.flush().unwrap();
        // A failed read is no write: the handle stays good.
        disk.fail_nth(1, libc::EIO);
        assert_eq!(read_all(&mut *engine, &file, &[run(0, 512)]).unwrap_err().code, Code::IoError);
        file.flush().unwrap();
    }
}

#[test]
fn a_power_cut_keeps_what_was_flushed_and_any_part_of_the_rest() {
    let disk = RamDisk::new(64 << 10);
    let file = disk.open(true);
    let mut engine = engine(EngineKind::Pread, 1).unwrap();
    write_all(&mut *engine, &file, &[(run(0, 8192), 1)]).unwrap();
    file.flush().unwrap();
    write_all(&mut *engine, &file, &[(run(4096, 8192), 2)]).unwrap();
    let mut asked = HashMap::new();
    disk.cut_power(&mut |sector| *asked.entry(sector).or_insert(sector % 2 == 0));
    let bytes = disk.bytes();
    for sector in 0..24u64 {
        let expected = match sector {
            0..8 => 1,
            8..16 => 1 + u8::from(sector % 2 == 0),
            _ => 2 * u8::from(sector % 2 == 0),
        };
        assert!(bytes[sector as usize * 512..][..512].iter().all(|b| *b == expected), "sector {sector}");
    }
}
