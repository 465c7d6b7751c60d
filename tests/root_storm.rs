//! The storm on real loop devices, mounted file systems and a full disk. The cuts here are clones of the backing file, which the
//! file system makes in one instant: so each of them is a legal image, and the checker has to say so.
#![allow(missing_docs, unsafe_code)]

mod storm;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use storm::{Checked, Mode, Options, SECTOR, Storm, Target};

const MIB: u64 = 1 << 20;

/// Given back in reverse order, also when a test fails.
struct Lab {
    dir: tempfile::TempDir,
    undo: Vec<Made>,
}

enum Made {
    Loop(PathBuf),
    Mount(PathBuf),
}

fn tool(name: &str, arguments: &[&str]) -> String {
    let out = Command::new(name).args(arguments).output().unwrap_or_else(|e| panic!("{name}: {e}"));
    assert!(out.status.success(), "{name} {arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap().trim().to_string()
}

impl Lab {
    fn new() -> Lab {
        assert!(nix::unistd::geteuid().is_root(), "this test needs root");
        Lab { dir: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(), undo: Vec::new() }
    }
    fn image(&self, at: &Path, bytes: u64) -> PathBuf {
        File::create(at).unwrap().set_len(bytes).unwrap();
        at.into()
    }
    /// A loop device over a part of a file.
    fn attach(&mut self, image: &Path, from: u64, bytes: u64) -> PathBuf {
        let (from, bytes) = (from.to_string(), bytes.to_string());
        let arguments = ["--find", "--show", "--offset", &from, "--sizelimit", &bytes, image.to_str().unwrap()];
        let device = PathBuf::from(tool("losetup", &arguments));
        self.undo.push(Made::Loop(device.clone()));
        device
    }
    fn mount(&mut self, source: &Path, fs: &str, options: Option<&str>) -> PathBuf {
        let at = self.dir.path().join(format!("mnt{}", self.undo.len()));
        std::fs::create_dir_all(&at).unwrap();
        mount(Some(source), &at, Some(fs), MsFlags::empty(), options).unwrap();
        self.undo.push(Made::Mount(at.clone()));
        at
    }
    /// A file system whose files can be cloned.
    fn cloning(&mut self, bytes: u64) -> PathBuf {
        let image = self.image(&self.dir.path().join("below"), bytes);
        let device = self.attach(&image, 0, bytes);
        tool("mkfs.xfs", &["-q", "-m", "reflink=1", device.to_str().unwrap()]);
        self.mount(&device, "xfs", None)
    }
    /// Ends what was made last.
    fn give_back(&mut self, count: usize) {
        for _ in 0..count {
            match self.undo.pop().unwrap() {
                Made::Mount(at) => umount2(&at, MntFlags::MNT_DETACH).unwrap_or_else(|e| eprintln!("left mounted: {e}")),
                Made::Loop(device) => {
                    let done = Command::new("losetup").arg("--detach").arg(&device).status();
                    if !done.is_ok_and(|s| s.success()) {
                        eprintln!("left behind: {}", device.display());
                    }
                }
            }
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.give_back(self.undo.len());
    }
}

/// Another file with the content of this one at one instant.
fn clone_of(image: &Path) -> PathBuf {
    const FICLONE: libc::c_ulong = 0x4004_9409;
    let at = image.with_extension("clone");
    let (from, to) = (File::open(image).unwrap(), File::create(&at).unwrap());
    // SAFETY: FICLONE takes a file descriptor.
    let done = unsafe { libc::ioctl(to.as_raw_fd(), FICLONE as _, from.as_raw_fd()) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    at
}

fn wait(storm: &Storm, writes: u64) {
    let until = storm.writes() + writes;
    while storm.writes() < until {
        assert!(!storm.broken(), "a writer is gone");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn instants_of_two_raw_devices_are_legal_and_two_instants_are_not() {
    let mut lab = Lab::new();
    let below = lab.cloning(2048 * MIB);
    let bytes = 48 * MIB;
    let image = lab.image(&below.join("image"), 2 * bytes);
    let devices = [lab.attach(&image, 0, bytes), lab.attach(&image, bytes, bytes)];
    let targets = devices.iter().map(|device| Target::raw(device, bytes)).collect();
    let options = Options { chains: vec![(0, 1, false), (1, 0, true)], largest: 16 << 20, depth: 512, ..Options::default() };
    let storm = Storm::start(11, targets, options);
    let mut checker = storm.checker();
    let mut sum = Checked::default();
    for cut in 0..40 {
        wait(&storm, 200);
        let t_low = storm.now();
        let clone = clone_of(&image);
        let t_high = storm.now();
        for volume in 0..2u32 {
            checker.load(volume, &clone, u64::from(volume) * bytes).unwrap();
        }
        let checked = checker.check(t_low, t_high).unwrap_or_else(|v| panic!("cut {cut}: {v}"));
        sum.changed += checked.changed;
        sum.required += checked.required;
        sum.links += checked.links;
    }
    println!("{sum:?}");
    assert!(sum.changed > 100_000 && sum.required > 4000 && sum.links > 100, "{sum:?}");
    // Each volume of another instant: the second is ahead.
    let mut other = storm.checker();
    other.load(0, &clone_of(&image), 0).unwrap();
    wait(&storm, 3000);
    other.load(1, &clone_of(&image), bytes).unwrap();
    let violation = other.check(0, storm.now()).expect_err("two volumes of two instants");
    println!("{violation}");
    let journal = storm.journal();
    let summary = storm.stop();
    println!("{summary:?}");
    assert!(summary.zeroed > 0 && summary.discarded > 0 && summary.linked > 0 && summary.again > 0, "{summary:?}");
    for (volume, device) in (0..).zip(&devices) {
        checker.load(volume, device, 0).unwrap();
    }
    checker.check(journal.now(), journal.now()).unwrap_or_else(|v| panic!("{v}"));
    for (volume, device) in (0..).zip(&devices) {
        assert_eq!(checker.final_equal(volume, device).unwrap(), 0);
    }
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn instants_of_mounted_file_systems_hold_what_was_synced() {
    let mut lab = Lab::new();
    let below = lab.cloning(4096 * MIB);
    let (disk, bytes) = (128 * MIB, 24 * MIB);
    let image = lab.image(&below.join("image"), 2 * disk);
    let mut targets = Vec::new();
    let mut trim = Vec::new();
    for volume in 0..2 {
        let device = lab.attach(&image, volume * disk, disk);
        tool("mkfs.ext4", &["-q", device.to_str().unwrap()]);
        let at = lab.mount(&device, "ext4", None);
        std::fs::write(at.join("file"), vec![0; bytes as usize]).unwrap();
        targets.push(Target::file(&at.join("file"), bytes));
        trim.push(at);
    }
    // What the storm did not write is there before it begins.
    nix::unistd::sync();
    let options = Options { chains: vec![(0, 1, true), (1, 0, false)], trim, ..Options::default() };
    let storm = Storm::start(12, targets, options);
    let mut sum = Checked::default();
    let mut checker = storm.checker();
    for cut in 0..6 {
        wait(&storm, 300);
        let t_low = storm.now();
        let clone = clone_of(&image);
        let t_high = storm.now();
        for volume in 0..2u32 {
            let device = lab.attach(&clone, u64::from(volume) * disk, disk);
            let at = lab.mount(&device, "ext4", None);
            checker.load(volume, &at.join("file"), 0).unwrap();
            lab.give_back(2);
        }
        let checked = checker.check(t_low, t_high).unwrap_or_else(|v| panic!("cut {cut}: {v}"));
        sum.required += checked.required;
        sum.links += checked.links;
    }
    println!("{sum:?}");
    assert!(sum.required > 500 && sum.links > 5, "{sum:?}");
    let summary = storm.stop();
    println!("{summary:?}");
    assert!(summary.trims > 0, "{summary:?}");
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn a_full_disk_leaves_undefined_ranges_and_nothing_else() {
    let mut lab = Lab::new();
    let small = lab.mount(Path::new("tmpfs"), "tmpfs", Some("size=10m"));
    let bytes = 32 * MIB;
    let image = lab.image(&small.join("image"), bytes);
    let device = lab.attach(&image, 0, bytes);
    let modes = vec![Mode::Direct, Mode::Buffered, Mode::Ring];
    let storm = Storm::start(13, vec![Target { modes, read_back: true, ..Target::raw(&device, bytes) }], Options::default());
    let mut checker = storm.checker();
    wait(&storm, 5000);
    let journal = storm.journal();
    let summary = storm.stop();
    println!("{summary:?}");
    assert!(summary.failed > summary.again && summary.failed < summary.writes, "{summary:?}");
    // As it is in the file, whatever the device's cache shows.
    checker.load(0, &image, 0).unwrap();
    let checked = checker.check(journal.now(), journal.now()).unwrap_or_else(|v| panic!("{v}"));
    println!("{checked:?}");
    assert!(checked.undefined > 0, "{checked:?}");
    println!("{} sectors differ in the cache", checker.final_equal(0, &device).unwrap());
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn the_largest_writes_are_followed_too() {
    let mut lab = Lab::new();
    let bytes = 512 * MIB;
    let image = lab.image(&lab.dir.path().join("image"), bytes);
    let device = lab.attach(&image, 0, bytes);
    let options = Options { largest: 512 << 20, large_once_in: 1, ..Options::default() };
    let storm = Storm::start(14, vec![Target { modes: vec![Mode::Direct], ..Target::raw(&device, bytes) }], options);
    let mut checker = storm.checker();
    wait(&storm, 8);
    let journal = storm.journal();
    let summary = storm.stop();
    println!("{summary:?}");
    assert!(summary.bytes > 512 * MIB && summary.failed == 0, "{summary:?}");
    checker.load(0, &device, 0).unwrap();
    let checked = checker.check(journal.now(), journal.now()).unwrap_or_else(|v| panic!("{v}"));
    println!("{checked:?}");
    assert_eq!(checker.final_equal(0, &device).unwrap(), 0);
    // One sector in the middle is enough.
    checker.apply(0, bytes / 2, &[1; SECTOR]);
    assert!(checker.check(journal.now(), journal.now()).is_err());
}
