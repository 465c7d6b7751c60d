//! Apply on real disks of 4096-byte sectors: a block device, which takes nothing less, and an image on a file system there.

use doublure::apply::{apply_direct, flush_replicas};
use doublure::delta::{encode, encode_sectors};
use doublure::device::{DeviceFile, engine};
use doublure::durable::double::Dice;
use doublure::host::{detach_loop, loops_of, make_fs};
use doublure::model::{BLOCK_BYTES, BlockRun, ByteRun, EngineKind, FileSystem, GroupSpec, Uuid, VolumeSpec};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// A device, and an image that ends within a block.
const SIZES: [u64; 2] = [2 * MIB, 2 * MIB + 1536];

/// Given back in reverse order, also when a test fails.
struct Lab {
    dir: tempfile::TempDir,
    images: Vec<PathBuf>,
    mounted: Option<PathBuf>,
}

impl Lab {
    fn new() -> Lab {
        assert!(nix::unistd::geteuid().is_root(), "this test needs root");
        Lab { dir: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(), images: Vec::new(), mounted: None }
    }

    /// A loop device of 4096-byte sectors.
    fn disk(&mut self, name: &str, size: u64) -> PathBuf {
        let image = self.dir.path().join(name);
        DeviceFile::create(&image, size).unwrap();
        self.images.push(image.clone());
        let out = Command::new("losetup").args(["-f", "-b", "4096"]).arg(&image).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        loops_of(&image).unwrap().remove(0).path
    }

    fn mount(&mut self, device: &Path) -> PathBuf {
        let at = self.dir.path().join("mnt");
        std::fs::create_dir(&at).unwrap();
        mount(Some(device), &at, Some("ext4"), MsFlags::empty(), None::<&str>).unwrap();
        self.mounted = Some(at.clone());
        at
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(at) = self.mounted.take() {
            let _ = umount2(&at, MntFlags::MNT_DETACH);
        }
        for image in &self.images {
            for device in loops_of(image).unwrap_or_default() {
                if let Err(fault) = detach_loop(&device, Duration::from_secs(10)) {
                    eprintln!("left behind: {fault}");
                }
            }
        }
    }
}

fn spec() -> GroupSpec {
    let volume = |n: u8| VolumeSpec {
        id: Uuid([n; 16]),
        name: format!("v{n}"),
        size_bytes: SIZES[usize::from(n)],
        fs: FileSystem::Ext4,
        mount_options: String::new(),
    };
    GroupSpec { id: Uuid([3; 16]), name: "shop".into(), volumes: vec![volume(0), volume(1)], containers: vec![] }
}

/// Blocks and sectors, zero and not, long and short, crowded at the beginning and at the end; made on `plain` as well.
fn payload(dice: &mut Dice, plain: &mut [Vec<u8>; 2]) -> Vec<u8> {
    let mut out = Vec::new();
    for _ in 0..400 {
        let volume = dice.roll() as usize % 2;
        let size = SIZES[volume];
        let unit = [512, 512, BLOCK_BYTES][dice.roll() as usize % 3];
        let units = size.div_ceil(unit);
        let start = match dice.roll() % 4 {
            0 => dice.roll() % 24,
            1 => units - 1 - dice.roll() % 12,
            _ => dice.roll() % units,
        };
        let count = if dice.roll().is_multiple_of(4) { dice.roll() % ((256 << 10) / unit) + 1 } else { dice.roll() % 5 + 1 };
        let offset = start * unit;
        let end = (offset + count * unit).min(size);
        let fill = if dice.roll().is_multiple_of(3) { 0 } else { dice.roll() as u8 };
        let data: Vec<u8> = (offset..end).map(|at| if fill == 0 { 0 } else { fill ^ (at / 7) as u8 }).collect();
        match unit {
            512 => encode_sectors(volume as u16, start, &data, true, &mut out),
            _ => encode(volume as u16, BlockRun { start, count: (end - offset).div_ceil(BLOCK_BYTES) }, &data, &mut out),
        }
        plain[volume][offset as usize..end as usize].copy_from_slice(&data);
    }
    out
}

#[test]
#[ignore = "needs root: sudo ./dev check kernel"]
fn sectors_land_exactly_on_disks_of_4096_bytes() {
    let mut lab = Lab::new();
    let raw = lab.disk("raw", SIZES[0]);
    let under = lab.disk("under", 64 * MIB);
    make_fs(&under, FileSystem::Ext4).unwrap();
    let image = lab.mount(&under).join("image");
    DeviceFile::create(&image, SIZES[1]).unwrap();
    let mut plain = SIZES.map(|size| vec![0; size as usize]);
    let mut dice = Dice::new(7);
    for round in 0..6 {
        let mut engine = engine([EngineKind::IoUring, EngineKind::Pread][round % 2], 16).unwrap();
        let replicas = [&raw, &image].map(|path| DeviceFile::open(path, true).unwrap());
        for replica in &replicas {
            assert_eq!((replica.align_bytes(), replica.direct()), (4096, true));
        }
        let records = payload(&mut dice, &mut plain);
        // Twice: the second time on what the first left.
        for _ in 0..2 {
            apply_direct(&records, &spec(), &replicas, &mut *engine).unwrap();
            flush_replicas(&replicas).unwrap();
        }
        drop(replicas);
        let mut stored = |path: &Path, size: u64| {
            let file = DeviceFile::open(path, false).unwrap();
            let mut runs = (0..size).step_by(1 << 18).map(|offset| ByteRun { offset, len: (1 << 18).min(size - offset) });
            let mut bytes = Vec::new();
            engine
                .read(&file, &mut runs, &mut |_, piece| {
                    bytes.extend_from_slice(piece);
                    Ok(())
                })
                .unwrap();
            bytes
        };
        for (path, plain) in [&raw, &image].into_iter().zip(&plain) {
            let found = stored(path, plain.len() as u64);
            let wrong = found.iter().zip(plain).position(|(a, b)| a != b);
            assert_eq!((found.len(), wrong), (plain.len(), None), "round {round}, {}", path.display());
        }
    }
}
