//! `device` on real block devices: I/O errors, sectors of 4096 bytes, zeroing.
#![allow(missing_docs, unsafe_code)]

use doublure::device::{DeviceFile, RUN_BYTES_MAX, engine};
use doublure::host::{attach_loop, detach_loop, loops_of, make_fs};
use doublure::model::{ByteRun, Code, EngineKind, FileSystem};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const KINDS: [EngineKind; 2] = [EngineKind::IoUring, EngineKind::Pread];
const MIB: u64 = 1 << 20;

/// Given back in reverse order, also when a test fails: a later image may lie on an earlier device.
struct Lab {
    dir: tempfile::TempDir,
    undo: Vec<Made>,
}

enum Made {
    Image(PathBuf),
    Mount(PathBuf),
}

impl Lab {
    fn new() -> Lab {
        assert!(nix::unistd::geteuid().is_root(), "this test needs root");
        Lab { dir: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(), undo: Vec::new() }
    }
    fn image(&mut self, path: PathBuf, size: u64) -> PathBuf {
        DeviceFile::create(&path, size).unwrap();
        self.undo.push(Made::Image(path.clone()));
        path
    }
    fn mount(&mut self, source: &Path, fs: &str, options: Option<&str>) -> PathBuf {
        let at = self.dir.path().join(format!("mnt{}", self.undo.len()));
        std::fs::create_dir(&at).unwrap();
        mount(Some(source), &at, Some(fs), MsFlags::empty(), options).unwrap();
        self.undo.push(Made::Mount(at.clone()));
        at
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for made in self.undo.drain(..).rev() {
            match made {
                Made::Mount(at) => {
                    let _ = umount2(&at, MntFlags::MNT_DETACH);
                }
                Made::Image(image) => {
                    for device in loops_of(&image).unwrap_or_default() {
                        if let Err(fault) = detach_loop(&device, Duration::from_secs(10)) {
                            eprintln!("left behind: {fault}");
                        }
                    }
                }
            }
        }
    }
}

fn run(offset: u64, len: u64) -> ByteRun {
    ByteRun { offset, len }
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_failing_disk_is_reported_with_its_offset_and_not_believed_again() {
    nix::ioctl_read!(shut_down, b'X', 125, u32);
    for kind in KINDS {
        let mut lab = Lab::new();
        let disk = lab.image(lab.dir.path().join("disk"), 64 * MIB);
        let (device, _) = attach_loop(&disk, false).unwrap();
        make_fs(&device.path, FileSystem::Ext4).unwrap();
        let at = lab.mount(&device.path, "ext4", None);
        let image = lab.image(at.join("image"), 16 * MIB);
        let file = DeviceFile::open(&image, true).unwrap();
        let (bystander, reader) = (DeviceFile::open(&image, true).unwrap(), DeviceFile::open(&image, false).unwrap());
        let mut engine = engine(kind, 8).unwrap();
        let mut write = |file: &DeviceFile, from: u64| {
            let mut at = from;
            let done = engine.write(file, &mut |buffer| {
                buffer.fill(1);
                at += RUN_BYTES_MAX;
                Ok((at <= file.size_bytes()).then(|| run(at - RUN_BYTES_MAX, RUN_BYTES_MAX)))
            });
            (done, at)
        };
        write(&file, 8 * MIB).0.unwrap();
        // The file system refuses everything from now on, as after a fatal error of its disk.
        let mut without_a_flush = 2u32;
        // SAFETY: the ioctl reads one u32 from the place given.
        unsafe { shut_down(File::open(&at).unwrap().as_raw_fd(), &raw mut without_a_flush) }.unwrap();
        let (done, reached) = write(&file, 4096);
        let fault = done.unwrap_err();
        assert_eq!(fault.code, Code::IoError, "{fault}");
        assert!(fault.thing.contains("writing at byte 4096)"), "{fault}");
        assert!(reached < 8 * MIB, "it went on to {reached} after the first error");
        assert_eq!(file.flush().unwrap_err().code, Code::FlushFailed);
        assert_eq!(write(&file, 0).0.unwrap_err().code, Code::FlushFailed);
        for _ in 0..2 {
            assert_eq!(bystander.flush().unwrap_err().code, Code::FlushFailed);
        }
        let fault = engine.read(&reader, &mut std::iter::once(run(8192, 4096)), &mut |_, _| Ok(())).unwrap_err();
        assert!(fault.code == Code::IoError && fault.thing.contains("reading at byte 8192)"), "{fault}");
        // The engine itself is fine.
        let good = DeviceFile::open(&disk, false).unwrap();
        engine.read(&good, &mut std::iter::once(run(0, RUN_BYTES_MAX)), &mut |_, _| Ok(())).unwrap();
    }
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_full_disk_is_called_full_and_spoils_nothing() {
    for kind in KINDS {
        let mut lab = Lab::new();
        // Through a device with direct I/O below it, and through the page cache. (A loop over tmpfs has no direct I/O before 6.6, and
        // a loop without it says EIO there for whatever went wrong below.)
        let disk = lab.image(lab.dir.path().join("disk"), 8 * MIB);
        let (below, _) = attach_loop(&disk, false).unwrap();
        make_fs(&below.path, FileSystem::Ext4).unwrap();
        let small = lab.mount(&below.path, "ext4", None);
        let image = lab.image(small.join("image"), 64 * MIB);
        let (device, _) = attach_loop(&image, false).unwrap();
        let cached = lab.mount(Path::new("tmpfs"), "tmpfs", Some("size=4m"));
        let cached = lab.image(cached.join("image"), 64 * MIB);
        let mut engine = engine(kind, 8).unwrap();
        for path in [&device.path, &cached] {
            let file = DeviceFile::open(path, true).unwrap();
            assert_eq!(file.direct(), path == &device.path);
            let mut at = 0;
            let fault = engine
                .write(&file, &mut |buffer| {
                    buffer.fill(1);
                    at += RUN_BYTES_MAX;
                    Ok((at <= file.size_bytes()).then(|| run(at - RUN_BYTES_MAX, RUN_BYTES_MAX)))
                })
                .unwrap_err();
            assert_eq!(fault.code, Code::DiskFull, "{fault}");
            assert!(at < 16 * MIB, "it went on to {at} after the first error");
            file.zero(run(0, 64 * MIB)).unwrap();
            let mut left = Some(run(60 * MIB, 4096));
            engine.write(&file, &mut |_| Ok(left.take())).unwrap();
            file.flush().unwrap();
        }
    }
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn on_sectors_of_4096_bytes_every_byte_still_lands() {
    let mut lab = Lab::new();
    let disk = lab.image(lab.dir.path().join("disk"), 128 * MIB);
    let out = Command::new("losetup").args(["-f", "-b", "4096"]).arg(&disk).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let device = loops_of(&disk).unwrap().remove(0).path;

    // The device itself: whole sectors only.
    let raw = DeviceFile::open(&device, true).unwrap();
    assert!(raw.direct());
    for kind in KINDS {
        let mut engine = engine(kind, 4).unwrap();
        for bad in [run(512, 4096), run(4096, 512)] {
            assert_eq!(engine.write(&raw, &mut |_| Ok(Some(bad))).unwrap_err().code, Code::Internal);
            assert_eq!(engine.read(&raw, &mut std::iter::once(bad), &mut |_, _| Ok(())).unwrap_err().code, Code::Internal);
        }
        let mut left = [(run(4096, 8192), 7), (run(128 * MIB - 4096, 4096), 8)].into_iter();
        engine
            .write(&raw, &mut |buffer| {
                Ok(left.next().map(|(run, fill)| {
                    buffer.fill(fill);
                    run
                }))
            })
            .unwrap();
        raw.flush().unwrap();
        raw.zero(run(8192, 4096)).unwrap();
        let expected = [(run(4096, 4096), 7), (run(8192, 4096), 0), (run(128 * MIB - 4096, 4096), 8)];
        let mut seen = 0;
        engine
            .read(&raw, &mut expected.iter().map(|(run, _)| *run), &mut |_, bytes| {
                assert!(bytes.iter().all(|b| *b == expected[seen].1));
                seen += 1;
                Ok(())
            })
            .unwrap();
        assert_eq!(seen, 3);
    }
    drop(raw);

    // An image on a file system there, whose last 512 bytes fit no direct write.
    make_fs(&device, FileSystem::Ext4).unwrap();
    let at = lab.mount(&device, "ext4", None);
    for (kind, name) in KINDS.into_iter().zip(["ring", "pread"]) {
        let size = 3 * MIB + 512;
        let image = lab.image(at.join(name), size);
        let file = DeviceFile::open(&image, true).unwrap();
        assert!(file.direct());
        let mut engine = engine(kind, 4).unwrap();
        let runs =
            [run(0, RUN_BYTES_MAX), run(512, 1024), run(2 * MIB + 512, 4096), run(3 * MIB - 4096, 4096 + 512), run(3 * MIB, 512)];
        let mut oracle = vec![0u8; size as usize];
        let mut fill = 0u8;
        let mut left = runs.iter();
        engine
            .write(&file, &mut |buffer| {
                Ok(left.next().map(|run| {
                    fill += 1;
                    buffer.fill(fill);
                    oracle[run.offset as usize..run.end() as usize].fill(fill);
                    *run
                }))
            })
            .unwrap();
        file.flush().unwrap();
        assert!(std::fs::read(&image).unwrap() == oracle, "{name} left other bytes");
        assert_eq!(std::fs::metadata(&image).unwrap().len(), size);
        engine
            .read(&file, &mut runs.into_iter().chain([run(size - 512, 512)]), &mut |run, bytes| {
                assert!(*bytes == oracle[run.offset as usize..run.end() as usize], "{name} read other bytes at {run:?}");
                Ok(())
            })
            .unwrap();
        // Such an image can be attached, with the small sectors that its size needs.
        let (attached, _) = attach_loop(&image, false).unwrap();
        assert_eq!(attached.identity.size_bytes, size);
    }
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn zeroing_a_device_gives_the_space_back_and_zeroes_all() {
    let mut lab = Lab::new();
    let image = lab.image(lab.dir.path().join("image"), 64 * MIB);
    File::options().write(true).open(&image).unwrap().write_all_at(&vec![9; 32 * MIB as usize], 0).unwrap();
    File::open(&image).unwrap().sync_all().unwrap();
    let before = std::fs::metadata(&image).unwrap().blocks();
    let (device, _) = attach_loop(&image, false).unwrap();
    let file = DeviceFile::open(&device.path, true).unwrap();
    file.zero(run(MIB + 512, 20 * MIB)).unwrap();
    file.flush().unwrap();
    let after = std::fs::metadata(&image).unwrap().blocks();
    assert!(after * 2 < before, "{before} sectors of 32 MiB became {after} when 20 were zeroed");
    let bytes = std::fs::read(&image).unwrap();
    let expected = |at: u64| if (MIB + 512..21 * MIB + 512).contains(&at) || at >= 32 * MIB { 0 } else { 9 };
    assert!(bytes.iter().enumerate().all(|(at, b)| *b == expected(at as u64)));
    let whole = [run(0, 64 * MIB)];
    assert_eq!(file.data_extents(whole[0]).unwrap(), whole, "a device does not tell its holes");
    // The image does, and zeroing through it frees its blocks.
    drop(file);
    let file = DeviceFile::open(&image, true).unwrap();
    file.zero(run(0, 32 * MIB)).unwrap();
    assert!(std::fs::metadata(&image).unwrap().blocks() < before / 8);
    assert_eq!(file.data_extents(whole[0]).unwrap(), []);
}
