//! A rig for the root tests of tracker and capture that cleans up after itself: pins, loop devices, mounts.
#![allow(dead_code)]

use doublure::host::{Backing, DeviceIdentity};
use doublure::model::BLOCK_BYTES;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A pin directory of its own in bpffs; unpinned at the end, so that the programs go.
pub struct Pins(pub PathBuf);

impl Pins {
    pub fn new(name: &str) -> Pins {
        let pins = Pins(PathBuf::from(format!("/sys/fs/bpf/doublure-test-{name}-{}", std::process::id())));
        pins.clear();
        pins
    }
    /// The directory of the build under test; there is exactly one.
    pub fn inner(&self) -> PathBuf {
        let found: Vec<_> = fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(found.len(), 1, "{found:?}");
        found[0].clone()
    }
    pub fn clear(&self) {
        for dir in fs::read_dir(&self.0).into_iter().flatten().flatten() {
            for pin in fs::read_dir(dir.path()).into_iter().flatten().flatten() {
                let _gone = fs::remove_file(pin.path());
            }
            let _gone = fs::remove_dir(dir.path());
        }
        let _gone = fs::remove_dir(&self.0);
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        self.clear();
    }
}

/// A loop device over a sparse file in a directory of its own.
pub struct Loop {
    dir: tempfile::TempDir,
    path: PathBuf,
    options: &'static [&'static str],
}

impl Loop {
    pub fn new(bytes: u64) -> Loop {
        Loop::on(Path::new("/var/tmp"), bytes, &["--direct-io=on"])
    }
    /// Its file below `place`, attached with these options of losetup.
    pub fn on(place: &Path, bytes: u64, options: &'static [&'static str]) -> Loop {
        let dir = tempfile::Builder::new().prefix("doublure-capture").tempdir_in(place).unwrap();
        File::create(dir.path().join("image")).unwrap().set_len(bytes).unwrap();
        let mut made = Loop { dir, path: PathBuf::new(), options };
        made.attach();
        made
    }
    /// Over a file that is there already.
    pub fn of(file: &Path) -> Loop {
        let dir = tempfile::Builder::new().prefix("doublure-capture").tempdir_in(file.parent().unwrap()).unwrap();
        fs::rename(file, dir.path().join("image")).unwrap();
        let mut made = Loop { dir, path: PathBuf::new(), options: &[] };
        made.attach();
        made
    }
    pub fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }
    pub fn attach(&mut self) {
        let image = self.image();
        let arguments = [&["--find", "--show"], self.options, &[image.to_str().unwrap()]].concat();
        self.path = run("losetup", &arguments).trim().into();
    }
    pub fn path(&self) -> &Path {
        &self.path
    }
    pub fn name(&self) -> String {
        self.path.file_name().unwrap().to_string_lossy().into_owned()
    }
    pub fn sys(&self, attribute: &str) -> u64 {
        fs::read_to_string(format!("/sys/block/{}/{attribute}", self.name())).unwrap().trim().parse().unwrap()
    }
    pub fn identity(&self) -> DeviceIdentity {
        let (device, image) = (fs::metadata(&self.path).unwrap().rdev(), fs::metadata(self.image()).unwrap());
        DeviceIdentity {
            major: nix::sys::stat::major(device) as u32,
            minor: nix::sys::stat::minor(device) as u32,
            diskseq: self.sys("diskseq"),
            size_bytes: self.sys("size") * 512,
            backing: Some(Backing {
                dev: image.dev(),
                inode: image.ino(),
                offset_bytes: self.sys("loop/offset"),
                sizelimit_bytes: self.sys("loop/sizelimit"),
            }),
        }
    }
    pub fn blocks(&self) -> u64 {
        self.identity().size_bytes.div_ceil(BLOCK_BYTES)
    }
    pub fn direct(&self) -> File {
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&self.path).unwrap()
    }
    /// The bytes of the backing file, which is what a reader of the device would see once writes have completed.
    pub fn bytes(&self) -> Vec<u8> {
        fs::read(self.image()).unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _gone = Command::new("losetup").args(["-d", self.path.to_str().unwrap()]).output();
    }
}

/// A mounted file system.
pub struct Mounted {
    dir: tempfile::TempDir,
}

impl Mounted {
    pub fn new(device: &Loop, kind: &str) -> Mounted {
        let path = device.path.to_str().unwrap();
        // Without discarding everything first: a test that expects some blocks must not find all.
        let options: &[&str] = if kind == "xfs" { &["-q", "-f", "-K", path] } else { &["-q", "-F", "-E", "nodiscard", path] };
        run(&format!("mkfs.{kind}"), options);
        let dir = tempfile::Builder::new().prefix("doublure-capture-mnt").tempdir_in("/var/tmp").unwrap();
        run("mount", &[path, dir.path().to_str().unwrap()]);
        Mounted { dir }
    }
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _gone = Command::new("umount").arg(self.dir.path()).output();
    }
}
