//! What sysfs says of a disk: whether it can be tracked, whether it is the one that is meant, how much it wrote.

use crate::host::DeviceIdentity;
use crate::model::{Code, Fault, Res};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// A whole disk's directory under `/sys/dev/block`.
pub(super) struct Disk {
    dir: PathBuf,
    name: String,
}

impl Disk {
    /// The disk with this number. Error: `IDENTITY_CHANGED` when there is none.
    pub(super) fn find(major: u32, minor: u32) -> Res<Disk> {
        let link = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
        let dir = fs::canonicalize(&link).map_err(|_| {
            let next = "attach the device again, then track it anew";
            Fault::new(Code::IdentityChanged, format!("device {major}:{minor}"), "the kernel has no such block device", next)
        })?;
        let name = dir.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        Ok(Disk { dir, name })
    }
    fn word(&self, attribute: &str) -> Option<String> {
        fs::read_to_string(self.dir.join(attribute)).ok().map(|text| text.trim().to_owned())
    }
    fn number(&self, attribute: &str) -> Option<u64> {
        self.word(attribute)?.parse().ok()
    }
    /// `/dev/loopN` or the like.
    pub(super) fn device(&self) -> String {
        format!("/dev/{}", self.name)
    }
    /// Sectors of 512 bytes written plus discarded by the kernel's account since the disk came up.
    pub(super) fn sectors_changed(&self) -> Res<u64> {
        let text =
            fs::read_to_string(self.dir.join("stat")).map_err(|e| Fault::io(format!("statistics of {}", self.device()), &e))?;
        sectors_in(&text)
            .ok_or_else(|| Fault::internal(format!("statistics of {}", self.device()), format!("cannot be read: {text:?}")))
    }
    /// The same account, to be read often.
    pub(super) fn account(&self) -> Res<Account> {
        let open = |attribute: &str| {
            let path = self.dir.join(attribute);
            File::open(&path).map_err(|e| Fault::io(path.display().to_string(), &e))
        };
        Ok(Account { stat: open("stat")?, diskseq: open("diskseq")?, device: self.device() })
    }
    /// Whether no request is with the driver now.
    pub(super) fn is_idle(&self) -> bool {
        self.word("inflight").is_some_and(|text| text.split_whitespace().all(|number| number == "0"))
    }
    /// Whether the kernel keeps the account that [`Disk::sectors_changed`] reads.
    pub(super) fn keeps_account(&self) -> bool {
        self.number("queue/iostats") != Some(0)
    }
    /// Whether the disk promises that some writes are never torn (RWF_ATOMIC).
    pub(super) fn has_atomic_writes(&self) -> bool {
        self.number("queue/atomic_write_max_bytes").is_some_and(|bytes| bytes > 0)
    }
    /// Refuses a disk whose writes the programs would not all see, each kind with its own sentence.
    pub(super) fn check_trackable(&self) -> Res<()> {
        let refuse = |code, cause: &str, next: &str| Err(Fault::new(code, self.device(), cause, next));
        if self.dir.join("partition").exists() {
            return refuse(
                Code::NotABlockImage,
                "it is a partition: a partition's writes are seen at the whole disk only",
                "use a whole disk",
            );
        }
        if self.dir.join("dm").exists() || self.dir.join("md").exists() || !self.dir.join("mq").exists() {
            return refuse(
                Code::KernelUnsupported,
                "it has no request queue of its own (device-mapper, md, zram and the like): when its writes complete cannot be seen yet",
                "put the volume on a loop device or a plain disk",
            );
        }
        if self.word("queue/zoned").is_some_and(|zoned| zoned != "none") {
            return refuse(
                Code::NotABlockImage,
                "it is a zoned device: where a zone append lands is not known at submit",
                "use a conventional disk",
            );
        }
        if self.number("queue/dax").is_some_and(|dax| dax != 0) {
            return refuse(
                Code::NotABlockImage,
                "it can be mapped directly (DAX): stores to it are seen by nobody",
                "use a disk without DAX",
            );
        }
        match self.holders().first() {
            None => Ok(()),
            Some(holder) => refuse(
                Code::VolumeInUse,
                &format!("{holder} is built on top of it and may write through it unseen"),
                "track the upper device, or take it down",
            ),
        }
    }
    /// Devices built on top of the disk or of one of its partitions.
    fn holders(&self) -> Vec<String> {
        let names = |dir: &Path| -> Vec<String> {
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
        };
        let mut found = names(&self.dir.join("holders"));
        for part in names(&self.dir).into_iter().filter(|name| name.starts_with(&self.name)) {
            found.extend(names(&self.dir.join(part).join("holders")));
        }
        found
    }
    /// In words, how the disk differs from `known`; `None` when it does not.
    pub(super) fn difference(&self, known: &DeviceIdentity) -> Option<String> {
        let diskseq = self.number("diskseq");
        if diskseq != Some(known.diskseq) {
            let now = diskseq.map_or("unknown".to_owned(), |seq| seq.to_string());
            return Some(format!(
                "another disk is under the name {} (sequence number {now}, was {})",
                self.device(),
                known.diskseq
            ));
        }
        let size = self.number("size").map(|sectors| sectors.saturating_mul(512));
        if size != Some(known.size_bytes) {
            return Some(format!("{} has {} bytes, had {}", self.device(), size.unwrap_or(0), known.size_bytes));
        }
        let backing = known.backing.as_ref()?;
        let window = [("loop/offset", backing.offset_bytes), ("loop/sizelimit", backing.sizelimit_bytes)];
        window.into_iter().find(|(attribute, was)| self.number(attribute) != Some(*was)).map(|(attribute, was)| {
            let now = self.word(attribute).unwrap_or_else(|| "unknown".to_owned());
            format!("{attribute} of {} is {now}, was {was}", self.device())
        })
    }
}

/// The statistics of a disk, kept open. When the disk goes, reading them fails, also if another one gets its number.
pub(super) struct Account {
    stat: File,
    diskseq: File,
    device: String,
}

impl Account {
    /// Whether the disk still has this sequence number: a loop device keeps its files when another image is attached.
    pub(super) fn is_of(&self, diskseq: u64) -> bool {
        read_whole(&self.diskseq).is_ok_and(|text| text.trim().parse() == Ok(diskseq))
    }
    /// As [`Disk::sectors_changed`].
    pub(super) fn sectors_changed(&self) -> Res<u64> {
        let thing = || format!("statistics of {}", self.device);
        let text = read_whole(&self.stat).map_err(|e| Fault::io(thing(), &e))?;
        sectors_in(&text).ok_or_else(|| Fault::internal(thing(), format!("cannot be read: {text:?}")))
    }
}

/// An attribute of sysfs, made anew by the kernel for each read from its start; far shorter than the buffer.
fn read_whole(file: &File) -> io::Result<String> {
    let mut buffer = [0; 1024];
    let length = file.read_at(&mut buffer, 0)?;
    String::from_utf8(buffer[..length].to_vec()).map_err(io::Error::other)
}

/// Raises the soft limit of open files towards the hard one: each volume keeps two, and 1,024 is what a service starts with.
pub(super) fn allow_many_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    const ENOUGH: u64 = 1 << 14;
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| match soft < ENOUGH.min(hard) {
        true => setrlimit(Resource::RLIMIT_NOFILE, ENOUGH.min(hard), hard),
        false => Ok(()),
    });
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays as it is: a few hundred volumes may be too many for it");
    }
}

/// Sectors written (7th number) plus discarded (14th, since 4.18) of a `stat` file.
fn sectors_in(text: &str) -> Option<u64> {
    let fields: Vec<u64> = text.split_whitespace().map(|field| field.parse().ok()).collect::<Option<_>>()?;
    Some(fields.get(6)? + fields.get(13).copied().unwrap_or(0))
}

/// The kernel's boot id as 16 bytes.
pub(super) fn boot_id() -> Res<[u8; 16]> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = fs::read_to_string(path).map_err(|e| Fault::io(path, &e))?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let id: crate::model::Uuid = digits.parse()?;
    Ok(id.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stat_file_is_read_by_column() {
        let text = "   10  0  80  1  7  0  4242  3  0  5  6  2  0  58  0  0  0\n";
        assert_eq!(sectors_in(text), Some(4300));
        assert_eq!(sectors_in("1 2 3 4 5 6 7 8 9 10 11"), Some(7));
        for bad in ["", "1 2 3", "1 2 3 4 5 6 x 8"] {
            assert_eq!(sectors_in(bad), None, "{bad:?}");
        }
    }
}
