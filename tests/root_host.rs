//! `host` on the real kernel: loop devices, mounts, file systems, freezes.
#![allow(missing_docs, unsafe_code)]

use doublure::device::{DeviceFile, engine};
use doublure::host::{
    Freezer, LoopDevice, attach_loop, check_fs, detach_loop, hold_exclusive, identity, loops_of, make_fs, mounts_of,
    sectors_changed, sync_fs, thaw_leftover,
};
use doublure::model::{ByteRun, Code, EngineKind, FileSystem};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(10);
const MIB: u64 = 1 << 20;
/// Small enough to be quick, large enough for XFS.
const SIZE: u64 = 320 * MIB;
/// A deadline that no test reaches.
const FAR: Duration = Duration::from_secs(120);

/// Everything a test made; given back in the right order, also when it fails.
struct Lab {
    dir: tempfile::TempDir,
    freezers: Vec<Freezer>,
    writers: Vec<Writer>,
    children: Vec<Child>,
    mounts: Vec<PathBuf>,
    images: Vec<PathBuf>,
}

impl Lab {
    fn new() -> Lab {
        assert!(nix::unistd::geteuid().is_root(), "this test needs root");
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Lab { dir, freezers: vec![], writers: vec![], children: vec![], mounts: vec![], images: vec![] }
    }
    /// A sparse image.
    fn image(&mut self, name: &str, size: u64) -> PathBuf {
        let path = self.dir.path().join(name);
        DeviceFile::create(&path, size).unwrap();
        self.images.push(path.clone());
        path
    }
    /// An attached device with a file system.
    fn device(&mut self, name: &str, fs: FileSystem) -> LoopDevice {
        let image = self.image(name, SIZE);
        let (device, new) = attach_loop(&image, false).unwrap();
        assert!(new);
        make_fs(&device.path, fs).unwrap();
        device
    }
    fn dir(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }
    fn mount(&mut self, device: &Path, name: &str, fs: FileSystem) -> PathBuf {
        let at = self.dir(name);
        mount(Some(device), &at, Some(fs.name()), MsFlags::empty(), None::<&str>).unwrap();
        self.mounts.push(at.clone());
        at
    }
    fn unmount(&mut self, at: &Path) {
        umount2(at, MntFlags::empty()).unwrap();
        self.mounts.retain(|mount| mount != at);
    }
    /// A mounted file system with a writer at work on it.
    fn busy(&mut self, name: &str, fs: FileSystem) -> (PathBuf, Arc<AtomicU64>) {
        let device = self.device(&format!("{name}.img"), fs);
        let at = self.mount(&device.path, name, fs);
        let writer = Writer::start(&at);
        let rounds = writer.rounds.clone();
        self.writers.push(writer);
        advances(&rounds, 3);
        (at, rounds)
    }
    fn freezer(&mut self) -> usize {
        self.freezers.push(Freezer::start(Path::new(env!("CARGO_BIN_EXE_doublure"))).unwrap());
        self.freezers.len() - 1
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.freezers.clear();
        for at in &self.mounts {
            while thaw_leftover(at).unwrap_or(false) {}
        }
        self.writers.clear();
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        for at in self.mounts.iter().rev() {
            let _ = umount2(at, MntFlags::MNT_DETACH);
        }
        for image in &self.images {
            for device in loops_of(image).unwrap_or_default() {
                if let Err(fault) = detach_loop(&device, PATIENCE) {
                    eprintln!("left behind: {fault}");
                }
            }
        }
    }
}

/// A thread that writes and fsyncs without end.
struct Writer {
    rounds: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    fn start(at: &Path) -> Writer {
        let (rounds, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, halt, path) = (rounds.clone(), stop.clone(), at.join("writer"));
        let thread = std::thread::spawn(move || {
            let file = File::create(path).unwrap();
            while !halt.load(Ordering::SeqCst) {
                let round = count.load(Ordering::SeqCst);
                file.write_all_at(&round.to_le_bytes(), round % 64 * 4096).unwrap();
                file.sync_all().unwrap();
                count.fetch_add(1, Ordering::SeqCst);
            }
        });
        Writer { rounds, stop, thread: Some(thread) }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn eventually(what: &str, mut happened: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    while !happened() {
        assert!(Instant::now() < until, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The writer gets `by` further rounds done.
fn advances(rounds: &AtomicU64, by: u64) {
    let from = rounds.load(Ordering::SeqCst);
    eventually("the writer goes on", || rounds.load(Ordering::SeqCst) >= from + by);
}

/// The writer is blocked: at most the round that was under way comes to its end.
fn stands_still(rounds: &AtomicU64) {
    let from = rounds.load(Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(200));
    let now = rounds.load(Ordering::SeqCst);
    assert!(now <= from + 1, "the writer went on from {from} to {now} while frozen");
}

fn run(program: &str, args: &[&str]) {
    let out = Command::new(program).args(args).output().unwrap();
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

// ---- loop devices and identity

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_file_is_attached_once_and_let_go_for_certain() {
    let mut lab = Lab::new();
    let image = lab.image("a.img", 8 * MIB);
    let (first, new) = attach_loop(&image, false).unwrap();
    assert!(new);
    assert_eq!(first.path, PathBuf::from(format!("/dev/loop{}", first.number)));
    let meta = std::fs::metadata(&image).unwrap();
    let backing = first.identity.backing.clone().unwrap();
    assert_eq!((backing.dev, backing.inode, backing.offset_bytes, backing.sizelimit_bytes), (meta.dev(), meta.ino(), 0, 0));
    assert_eq!((first.identity.size_bytes, first.identity.major), (8 * MIB, 7));
    assert_eq!(identity(&first.path).unwrap(), first.identity);
    assert_eq!(DeviceFile::open(&image, false).unwrap().identity().unwrap(), (backing.dev, backing.inode));
    let direct = std::fs::read_to_string(format!("/sys/block/loop{}/loop/dio", first.number)).unwrap();
    assert_eq!(direct.trim() == "1", DeviceFile::open(&image, false).unwrap().direct());

    // Already so, under any name of the file.
    let link = lab.dir.path().join("other name");
    std::fs::hard_link(&image, &link).unwrap();
    assert_eq!(attach_loop(&link, false).unwrap(), (first.clone(), false));
    assert_eq!(loops_of(&link).unwrap(), std::slice::from_ref(&first));
    let fault = attach_loop(&image, true).unwrap_err();
    assert_eq!(fault.code, Code::VolumeInUse);
    assert!(fault.cause.contains(text(&first.path)), "{fault}");

    detach_loop(&first, PATIENCE).unwrap();
    assert_eq!(loops_of(&image).unwrap(), []);
    detach_loop(&first, PATIENCE).unwrap();

    let (second, new) = attach_loop(&image, false).unwrap();
    assert!(new);
    assert_ne!(second.identity.diskseq, first.identity.diskseq);
    // The old handle means the old attachment, whatever its number serves now.
    let stale = LoopDevice { path: second.path.clone(), number: second.number, identity: first.identity.clone() };
    detach_loop(&stale, PATIENCE).unwrap();
    assert_eq!(loops_of(&image).unwrap(), [second]);
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn read_only_means_that_no_byte_is_taken() {
    let mut lab = Lab::new();
    let image = lab.image("a.img", MIB);
    let (device, _) = attach_loop(&image, true).unwrap();
    assert_eq!(attach_loop(&image, true).unwrap(), (device.clone(), false));
    assert_eq!(attach_loop(&image, false).unwrap_err().code, Code::VolumeInUse);
    assert!(hold_exclusive(&device.path, true).is_err());
    drop(hold_exclusive(&device.path, false).unwrap());
    assert!(DeviceFile::open(&device.path, true).is_err());
    assert_eq!(DeviceFile::open(&device.path, false).unwrap().size_bytes(), MIB);
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn what_cannot_be_used_as_it_is_attached_is_refused() {
    let mut lab = Lab::new();
    let image = lab.image("a.img", MIB);
    run("losetup", &["-f", "--offset", "4096", text(&image)]);
    assert_eq!(attach_loop(&image, false).unwrap_err().code, Code::VolumeInUse);
    let second = lab.image("b.img", MIB);
    for _ in 0..2 {
        run("losetup", &["-f", text(&second)]);
    }
    let fault = attach_loop(&second, false).unwrap_err();
    assert!(fault.code == Code::VolumeInUse && fault.cause.contains(" and /dev/loop"), "{fault}");
    // A partition has no identity of its own.
    let third = lab.image("c.img", 8 * MIB);
    run("losetup", &["-f", "-P", text(&third)]);
    let whole = loops_of(&third).unwrap().remove(0);
    // Told to the kernel directly: it may know no partition table at all.
    run("addpart", &[text(&whole.path), "1", "2048", "2048"]);
    let partition = PathBuf::from(format!("{}p1", text(&whole.path)));
    eventually("the partition's node appears", || partition.exists());
    assert_eq!(identity(&partition).unwrap_err().code, Code::NotABlockImage);
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn many_at_once_attach_each_file_once() {
    let mut lab = Lab::new();
    let images: Vec<PathBuf> = (0..3).map(|i| lab.image(&format!("{i}.img"), MIB)).collect();
    let got: Vec<(PathBuf, LoopDevice, bool)> = std::thread::scope(|scope| {
        let attach = |image: &PathBuf| {
            let (device, new) = attach_loop(image, false).unwrap();
            (image.clone(), device, new)
        };
        let threads: Vec<_> = (0..12).map(|i| &images[i % 3]).map(|image| scope.spawn(move || attach(image))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for image in &images {
        let mine: Vec<_> = got.iter().filter(|(of, ..)| of == image).collect();
        assert_eq!(mine.iter().filter(|(.., new)| *new).count(), 1, "{image:?} was attached more or less than once");
        assert!(mine.iter().all(|(_, device, _)| *device == mine[0].1));
        assert_eq!(loops_of(image).unwrap().len(), 1);
    }
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn identity_sees_an_offset_that_was_moved_under_the_device() {
    let mut lab = Lab::new();
    let image = lab.image("a.img", 8 * MIB);
    let (device, _) = attach_loop(&image, false).unwrap();
    let open = File::open(&device.path).unwrap();
    let mut info = [0u64; 29];
    // SAFETY: both ioctls move one loop_info64 of 232 bytes.
    unsafe {
        assert_eq!(libc::ioctl(open.as_raw_fd(), 0x4C05, info.as_mut_ptr()), 0);
        (info[3], info[4]) = (MIB, MIB);
        assert_eq!(libc::ioctl(open.as_raw_fd(), 0x4C04, info.as_mut_ptr()), 0);
    }
    let now = identity(&device.path).unwrap();
    assert_eq!(now.diskseq, device.identity.diskseq, "the sequence number alone would not have told");
    assert_ne!(now, device.identity);
    let backing = now.backing.unwrap();
    assert_eq!((backing.offset_bytes, backing.sizelimit_bytes), (MIB, MIB));
    assert_eq!(attach_loop(&image, false).unwrap_err().code, Code::VolumeInUse);
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_device_in_use_is_detached_when_its_user_goes() {
    let mut lab = Lab::new();
    let device = lab.device("a.img", FileSystem::Ext4);
    let at = lab.mount(&device.path, "mnt", FileSystem::Ext4);
    let fault = detach_loop(&device, Duration::from_millis(200)).unwrap_err();
    assert_eq!(fault.code, Code::VolumeInUse);
    assert!(fault.cause.contains(text(&at)), "{fault}");
    std::fs::write(at.join("still"), "writable").unwrap();
    // Marked to vanish: not something to build on.
    assert_eq!(attach_loop(&lab.images[0], false).unwrap_err().code, Code::VolumeInUse);
    lab.unmount(&at);
    detach_loop(&device, PATIENCE).unwrap();
    assert_eq!(loops_of(&lab.images[0]).unwrap(), []);
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn written_and_discarded_sectors_are_counted() {
    let mut lab = Lab::new();
    let image = lab.image("a.img", 8 * MIB);
    let (device, _) = attach_loop(&image, false).unwrap();
    let count = || sectors_changed(device.identity.major, device.identity.minor).unwrap();
    let before = count();
    let file = DeviceFile::open(&device.path, true).unwrap();
    assert!(file.direct());
    let mut left = Some(ByteRun { offset: 4096, len: 64 << 10 });
    engine(EngineKind::Auto, 4)
        .unwrap()
        .write(&file, &mut |buffer| {
            buffer.fill(7);
            Ok(left.take())
        })
        .unwrap();
    eventually("the write is counted", || count() == before + 128);
    run("blkdiscard", &["-o", "0", "-l", "1048576", text(&device.path)]);
    eventually("the discard is counted", || count() == before + 128 + 2048);
}

// ---- who uses a device

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn an_exclusive_hold_keeps_mounts_out_and_names_who_is_in() {
    let mut lab = Lab::new();
    let device = lab.device("a.img", FileSystem::Ext4);
    let at = lab.dir("mnt");
    let hold = hold_exclusive(&device.path, true).unwrap();
    let refused = mount(Some(&device.path), &at, Some("ext4"), MsFlags::empty(), None::<&str>);
    assert_eq!(refused, Err(nix::errno::Errno::EBUSY));
    assert_eq!(hold_exclusive(&device.path, false).unwrap_err().code, Code::VolumeInUse);
    drop(hold);

    lab.mount(&device.path, "mnt", FileSystem::Ext4);
    let fault = hold_exclusive(&device.path, false).unwrap_err();
    assert_eq!(fault.code, Code::VolumeInUse);
    assert!(fault.cause.contains(text(&at)), "{fault}");
    for fs in [FileSystem::Ext4, FileSystem::Xfs] {
        assert_eq!(make_fs(&device.path, fs).unwrap_err().code, Code::VolumeInUse);
        assert_eq!(check_fs(&device.path, fs, &lab.dir("scratch")).unwrap_err().code, Code::VolumeInUse);
    }
    lab.unmount(&at);

    // A process that holds it without a mount.
    let exclusive = File::options().read(true).custom_flags(libc::O_EXCL).open(&device.path).unwrap();
    let sleeper = Command::new("sleep").arg("1000").stdin(exclusive).spawn().unwrap();
    let pid = sleeper.id();
    lab.children.push(sleeper);
    let fault = hold_exclusive(&device.path, false).unwrap_err();
    assert_eq!(fault.code, Code::VolumeInUse);
    assert!(fault.cause.contains(&format!("process {pid} (")), "{fault}");
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn mounts_are_found_in_other_mount_namespaces() {
    let mut lab = Lab::new();
    let device = lab.device("a.img", FileSystem::Ext4);
    let at = lab.dir("with space\tand \\040 tab");
    let script = r#"mount "$1" "$2" && echo ready && exec sleep 1000"#;
    let mut child = Command::new("unshare")
        .args(["-m", "--propagation", "private", "sh", "-c", script, "sh"])
        .args([&device.path, &at])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = child.id();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    lab.children.push(child);
    assert_eq!(line, "ready\n");
    let (major, minor) = (device.identity.major, device.identity.minor);
    let found = mounts_of(major, minor).unwrap();
    let expected = PathBuf::from(format!("/proc/{pid}/root")).join(at.strip_prefix("/").unwrap());
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!((&found[0].path, found[0].fs.as_str(), found[0].read_only), (&expected, "ext4", false));
    let fault = hold_exclusive(&device.path, false).unwrap_err();
    assert!(fault.code == Code::VolumeInUse && fault.cause.contains(text(&expected)), "{fault}");

    // Such a path is good enough to freeze by, and nothing there stays busy afterwards.
    let freezer = lab.freezer();
    sync_fs(&expected).unwrap();
    lab.freezers[freezer].freeze(std::slice::from_ref(&expected), FAR).unwrap().thaw().unwrap();

    // Our own mount comes first, as a plain path, even when another one lies on top of it.
    let own = lab.mount(&device.path, "own", FileSystem::Ext4);
    assert_eq!(mounts_of(major, minor).unwrap()[0].path, own);
    mount(Some("tmpfs"), &own, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    lab.mounts.push(own.clone());
    let found = mounts_of(major, minor).unwrap();
    assert_eq!((found.len(), &found[0].path, &found[1].path), (2, &expected, &own));

    kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
    lab.children.pop().unwrap().wait().unwrap();
    assert_eq!(mounts_of(major, minor).unwrap().len(), 1);
}

// ---- file systems

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_new_file_system_is_sparse_and_leaves_nothing_to_do_later() {
    let mut lab = Lab::new();
    let finished = |device: &Path| {
        let out = Command::new("dumpe2fs").arg(device).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let groups = text.lines().filter(|line| line.starts_with("Group ") && line.contains(": (Blocks ")).count();
        (groups, text.matches("ITABLE_ZEROED").count())
    };
    let image = lab.image("sparse.img", 4 << 30);
    let (device, _) = attach_loop(&image, false).unwrap();
    make_fs(&device.path, FileSystem::Ext4).unwrap();
    let (groups, zeroed) = finished(&device.path);
    assert!(groups == 32 && zeroed == groups, "{zeroed} of {groups} inode tables are ready");
    let taken = std::fs::metadata(&image).unwrap().blocks() * 512;
    assert!(taken < 4 * MIB, "a new file system of 4 GiB takes {taken} bytes");
    assert!(!check_fs(&device.path, FileSystem::Ext4, &lab.dir("scratch")).unwrap());

    // Not on a file that holds something already: its old bytes must not shine through.
    let used = lab.image("used.img", 256 * MIB);
    File::options().write(true).open(&used).unwrap().write_all_at(&vec![0xa5; 64 << 20], 0).unwrap();
    let (device, _) = attach_loop(&used, false).unwrap();
    make_fs(&device.path, FileSystem::Ext4).unwrap();
    let (groups, zeroed) = finished(&device.path);
    assert!(groups > 0 && zeroed == groups, "{zeroed} of {groups} inode tables are ready");
    run("e2fsck", &["-fn", text(&device.path)]);

    let small = lab.image("small.img", MIB);
    let (device, _) = attach_loop(&small, false).unwrap();
    let fault = make_fs(&device.path, FileSystem::Xfs).unwrap_err();
    assert!(fault.code == Code::ToolFailed && fault.cause.contains("mkfs.xfs"), "{fault}");
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_crashed_file_system_is_replayed_once_and_keeps_its_files() {
    for fs in [FileSystem::Ext4, FileSystem::Xfs] {
        let mut lab = Lab::new();
        let device = lab.device("a.img", fs);
        let scratch = lab.dir.path().join("made when needed");
        assert!(!check_fs(&device.path, fs, &scratch).unwrap(), "{fs:?}: a new file system was changed");
        let at = lab.mount(&device.path, "mnt", fs);
        for i in 0..50 {
            let mut file = File::create(at.join(format!("file{i}"))).unwrap();
            file.write_all(&[i; 5000]).unwrap();
            file.sync_all().unwrap();
        }
        // What a power cut leaves: the bytes of the device while it is mounted.
        let crashed = lab.dir.path().join("crashed.img");
        run("cp", &["--sparse=always", text(&lab.images[0]), text(&crashed)]);
        lab.images.push(crashed.clone());
        let (copy, _) = attach_loop(&crashed, false).unwrap();
        // The original is still mounted, with the same UUID.
        assert!(check_fs(&copy.path, fs, &scratch).unwrap(), "{fs:?}: nothing was replayed");
        assert!(!check_fs(&copy.path, fs, &scratch).unwrap(), "{fs:?}: replayed twice");
        assert_eq!(mounts_of(copy.identity.major, copy.identity.minor).unwrap(), [], "the check left a mount");
        drop(hold_exclusive(&copy.path, true).unwrap());
        lab.unmount(&at);
        let again = lab.mount(&copy.path, "copy", fs);
        for i in 0..50 {
            assert_eq!(std::fs::read(again.join(format!("file{i}"))).unwrap(), [i; 5000]);
        }
    }
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn garbage_and_damage_are_told_apart_from_health() {
    let mut lab = Lab::new();
    let scratch = lab.dir("scratch");
    let garbage = lab.image("garbage.img", SIZE);
    let noise: Vec<u8> = (0..4 * MIB).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    File::options().write(true).open(&garbage).unwrap().write_all_at(&noise, 0).unwrap();
    let (device, _) = attach_loop(&garbage, false).unwrap();
    for fs in [FileSystem::Ext4, FileSystem::Xfs] {
        let fault = check_fs(&device.path, fs, &scratch).unwrap_err();
        assert_eq!(fault.code, Code::FileSystemDamaged, "{fault}");
        println!("{fault}");
    }
    // Sound superblock, ruined tables behind it (ext4: group descriptors; XFS: headers of the second allocation group).
    for (fs, name) in [(FileSystem::Ext4, "e.img"), (FileSystem::Xfs, "x.img")] {
        let device = lab.device(name, fs);
        let at = match fs {
            FileSystem::Ext4 => 4096,
            FileSystem::Xfs => SIZE / 4 + 512,
        };
        let file = File::options().write(true).open(&device.path).unwrap();
        file.write_all_at(&noise[..8192], at).unwrap();
        file.sync_all().unwrap();
        let fault = check_fs(&device.path, fs, &scratch).unwrap_err();
        assert_eq!(fault.code, Code::FileSystemDamaged, "{fault}");
        println!("{fault}");
    }
}

// ---- freeze

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_freeze_blocks_a_group_of_two_and_a_thaw_releases_it() {
    let mut lab = Lab::new();
    let (a, a_rounds) = lab.busy("ext4", FileSystem::Ext4);
    let (b, b_rounds) = lab.busy("xfs", FileSystem::Xfs);
    let freezer = lab.freezer();
    for _ in 0..3 {
        // The same file system twice is frozen once.
        let frozen = lab.freezers[freezer].freeze(&[a.clone(), b.clone(), a.join(".")], FAR).unwrap();
        stands_still(&a_rounds);
        stands_still(&b_rounds);
        let held = frozen.thaw().unwrap();
        assert!(held >= Duration::from_millis(400), "{held:?} is less than this test took");
        advances(&a_rounds, 3);
        advances(&b_rounds, 3);
    }
    drop(lab.freezers[freezer].freeze(&[a.clone(), b.clone()], FAR).unwrap());
    advances(&a_rounds, 3);
    advances(&b_rounds, 3);
    // Nothing is held open after a thaw.
    lab.writers.clear();
    lab.unmount(&a);
    lab.unmount(&b);
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn all_are_frozen_or_none() {
    let mut lab = Lab::new();
    let (a, a_rounds) = lab.busy("xfs", FileSystem::Xfs);
    let (b, b_rounds) = lab.busy("ext4", FileSystem::Ext4);
    let freezer = lab.freezer();
    run("fsfreeze", &["-f", text(&b)]);
    let fault = lab.freezers[freezer].freeze(&[a.clone(), b.clone()], FAR).err().unwrap();
    assert_eq!(fault.code, Code::IoError);
    assert!(fault.thing.contains(text(&b)) && fault.cause.contains("somebody else"), "{fault}");
    advances(&a_rounds, 3);
    // The other one's freeze is not ours to undo.
    stands_still(&b_rounds);
    assert!(thaw_leftover(&b).unwrap());
    assert!(!thaw_leftover(&b).unwrap());
    advances(&b_rounds, 3);
    lab.freezers[freezer].freeze(&[a.clone(), b], FAR).unwrap().thaw().unwrap();

    let not_there = lab.dir.path().join("none");
    assert_eq!(lab.freezers[freezer].freeze(&[a.clone(), not_there], FAR).err().unwrap().code, Code::IoError);
    for refused in [vec![], vec![PathBuf::from("/")], vec![a, PathBuf::from("/usr")]] {
        assert_eq!(lab.freezers[freezer].freeze(&refused, FAR).err().unwrap().code, Code::BadArgument);
    }
    advances(&a_rounds, 3);
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn at_the_deadline_the_helper_thaws_and_the_cut_is_told_so() {
    let mut lab = Lab::new();
    let (a, a_rounds) = lab.busy("ext4", FileSystem::Ext4);
    let (b, b_rounds) = lab.busy("xfs", FileSystem::Xfs);
    let freezer = lab.freezer();
    let frozen = lab.freezers[freezer].freeze(&[a.clone(), b.clone()], Duration::from_secs(5)).unwrap();
    stands_still(&a_rounds);
    advances(&a_rounds, 3);
    advances(&b_rounds, 3);
    let fault = frozen.thaw().unwrap_err();
    assert_eq!(fault.code, Code::FreezeTimeout, "{fault}");
    // The next one is as good as new.
    let frozen = lab.freezers[freezer].freeze(&[a.clone(), b], FAR).unwrap();
    stands_still(&a_rounds);
    frozen.thaw().unwrap();
    advances(&a_rounds, 3);

    // Somebody else thaws: what was read meanwhile is not one instant.
    let frozen = lab.freezers[freezer].freeze(std::slice::from_ref(&a), FAR).unwrap();
    run("fsfreeze", &["-u", text(&a)]);
    advances(&a_rounds, 1);
    assert_eq!(frozen.thaw().unwrap_err().code, Code::FreezeTimeout);

    // A deadline that has passed before the first ioctl freezes nothing.
    let fault = lab.freezers[freezer].freeze(std::slice::from_ref(&a), Duration::ZERO).err().unwrap();
    assert_eq!(fault.code, Code::FreezeTimeout, "{fault}");
    advances(&a_rounds, 3);
    eventually("the helper is ready again", || lab.freezers[freezer].freeze(std::slice::from_ref(&a), FAR).is_ok());
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn an_agent_killed_while_frozen_leaves_nothing_frozen() {
    // This test is its own agent: started once more, with the mount to freeze.
    if let Some(at) = std::env::var_os("ROOT_HOST_FREEZE") {
        let mut freezer = Freezer::start(Path::new(env!("CARGO_BIN_EXE_doublure"))).unwrap();
        let helper = freezer.helper_pid().unwrap();
        let _frozen = freezer.freeze(&[at.into()], FAR).unwrap();
        println!("frozen by {helper}");
        loop {
            std::thread::park();
        }
    }
    let mut lab = Lab::new();
    let (at, rounds) = lab.busy("ext4", FileSystem::Ext4);
    let name = "an_agent_killed_while_frozen_leaves_nothing_frozen";
    let mut agent = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", name])
        .env("ROOT_HOST_FREEZE", &at)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = agent.id();
    let said = BufReader::new(agent.stdout.take().unwrap());
    lab.children.push(agent);
    let helper =
        said.lines().map_while(Result::ok).find_map(|line| line.split_once("frozen by ").map(|(_, pid)| pid.to_string()));
    let helper: i32 = helper.expect("the agent froze it").parse().unwrap();
    stands_still(&rounds);
    // What a service manager sends first does not stop the helper.
    kill(Pid::from_raw(helper), Signal::SIGTERM).unwrap();
    stands_still(&rounds);
    kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
    advances(&rounds, 3);
    eventually("the helper ends", || !Path::new(&format!("/proc/{helper}")).exists() || zombie(helper));
}

fn zombie(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z')))
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_helper_killed_or_hung_while_frozen_leaves_nothing_frozen() {
    let mut lab = Lab::new();
    let (a, rounds) = lab.busy("ext4", FileSystem::Ext4);
    let (b, b_rounds) = lab.busy("xfs", FileSystem::Xfs);
    let both = [a, b];
    let freezer = lab.freezer();
    let helper = |lab: &Lab| Pid::from_raw(lab.freezers[freezer].helper_pid().unwrap() as i32);

    // Killed: thawed at once, whether anybody asks or not.
    let pid = helper(&lab);
    let frozen = lab.freezers[freezer].freeze(&both, FAR).unwrap();
    stands_still(&rounds);
    kill(pid, Signal::SIGKILL).unwrap();
    advances(&rounds, 3);
    advances(&b_rounds, 3);
    assert_eq!(frozen.thaw().unwrap_err().code, Code::FreezeTimeout);

    // A new one is started, and killed with the freeze given up.
    let frozen = lab.freezers[freezer].freeze(&both, FAR).unwrap();
    stands_still(&rounds);
    drop(frozen);
    let pid = helper(&lab);
    let frozen = lab.freezers[freezer].freeze(&both, FAR).unwrap();
    kill(pid, Signal::SIGKILL).unwrap();
    drop(frozen);
    advances(&rounds, 3);
    advances(&b_rounds, 3);

    // Hung: we thaw by our own hand, and the freeze was whole until then.
    drop(lab.freezers[freezer].freeze(&both, FAR).unwrap());
    let pid = helper(&lab);
    let frozen = lab.freezers[freezer].freeze(&both, FAR).unwrap();
    kill(pid, Signal::SIGSTOP).unwrap();
    stands_still(&rounds);
    assert!(frozen.thaw().is_ok());
    advances(&rounds, 3);
    advances(&b_rounds, 3);
    let frozen = lab.freezers[freezer].freeze(&both, FAR).unwrap();
    stands_still(&rounds);
    frozen.thaw().unwrap();
    advances(&rounds, 3);

    // Hung before it could freeze.
    kill(helper(&lab), Signal::SIGSTOP).unwrap();
    let fault = lab.freezers[freezer].freeze(&both, Duration::from_millis(100)).err().unwrap();
    assert_eq!(fault.code, Code::FreezeTimeout, "{fault}");
    advances(&rounds, 3);
    advances(&b_rounds, 3);
}
