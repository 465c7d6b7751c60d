//! Owns what the standby is known to hold: one 128-bit digest a block, in a sparse file that mirrors the volume.
//! Gives the digest that a block is known to have there, so that what would change nothing is not sent.
//! Keeps an entry only while it is proven: forgotten before a block is sent, set again by its receipt.
//! Never speaks to the standby, never reads the volume.
//! Assumes a shared mapping survives the death of the process, not of the host (after which all is compared anyway).
#![allow(unsafe_code)]

use crate::delta::BlockDigest;
use crate::model::{BlockRun, BlockSet, Digest, Fault, Res};
use memmap2::MmapMut;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

const DIGEST_BYTES: usize = 16;
/// The header: magic, version, then 32 bytes that say which copy of which group the digests describe.
const HEADER_BYTES: u64 = 4096;
const MAGIC: &[u8; 8] = b"DBLKNOW1";

/// The digests of one volume's replica.
pub struct Known {
    map: MmapMut,
    file: File,
    blocks: u64,
    path: String,
    /// Pages of the file that have room on the disk, as far as this process made sure of it.
    roomy: BlockSet,
}

/// Bytes of a page of the mapping.
const PAGE_BYTES: u64 = 4096;

impl Known {
    /// Opens the file of a volume of `blocks` blocks, or makes it. `about` names the copy (a digest over group, volume and
    /// peer): a file about anything else is emptied. `.1` = it holds nothing to be relied on, now and at every later opening
    /// until [`Known::trust`].
    pub fn open(path: &Path, blocks: u64, about: Digest) -> Res<(Known, bool)> {
        let shown = path.display().to_string();
        let io = |e: std::io::Error| Fault::io(format!("digest map {shown}"), &e);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path).map_err(io)?;
        let want = HEADER_BYTES + blocks * DIGEST_BYTES as u64;
        let mut fresh = file.metadata().map_err(io)?.len() != want;
        if fresh {
            file.set_len(0).map_err(io)?;
            file.set_len(want).map_err(io)?;
        }
        // SAFETY: the file is ours alone (0600 in a locked state directory) and is never truncated while mapped.
        let map = unsafe { MmapMut::map_mut(&file) }.map_err(io)?;
        let mut known = Known { map, file, blocks, path: shown, roomy: BlockSet::empty(want.div_ceil(PAGE_BYTES)) };
        known.make_room(0, HEADER_BYTES)?;
        if known.header() != header(about) {
            fresh = true;
            known.all_zero()?;
        }
        Ok((known, fresh))
    }

    fn header(&self) -> [u8; 40] {
        let mut bytes = [0; 40];
        bytes.copy_from_slice(&self.map[..40]);
        bytes
    }

    /// Starts over: zero everywhere, about no copy. Whoever fills it says with [`Known::trust`] when it is true; a death before
    /// that leaves a file that the next opening calls empty.
    pub fn all_zero(&mut self) -> Res<()> {
        // First of all: half of an old map must not be taken for a whole one.
        self.map[..40].fill(0);
        let len = HEADER_BYTES + self.blocks * DIGEST_BYTES as u64;
        // Punching the whole file makes every mapped page read as zero again and costs no write.
        // SAFETY: plain fallocate(2) on a descriptor that we own.
        let done = unsafe {
            libc::fallocate(self.file.as_raw_fd(), libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, 0, len as libc::off_t)
        };
        if done != 0 {
            self.make_room(0, len)?;
            self.map.fill(0);
        }
        self.roomy = BlockSet::empty(self.roomy.blocks());
        self.make_room(0, HEADER_BYTES)
    }

    /// Takes room on the disk for bytes of the file before they are written through the mapping: there a full disk would not be an
    /// error but a signal that ends the process. Error: `DISK_FULL`.
    fn make_room(&mut self, from: u64, to: u64) -> Res<()> {
        let (first, last) = (from / PAGE_BYTES, to.saturating_sub(1) / PAGE_BYTES);
        if (first..=last).all(|page| self.roomy.contains(page)) {
            return Ok(());
        }
        let pages = BlockRun { start: first, count: last - first + 1 };
        let (offset, len) = (first * PAGE_BYTES, (last - first + 1) * PAGE_BYTES);
        let whole = HEADER_BYTES + self.blocks * DIGEST_BYTES as u64;
        let len = len.min(whole - offset);
        // SAFETY: plain fallocate(2) on a descriptor that we own.
        let done = unsafe { libc::fallocate(self.file.as_raw_fd(), 0, offset as libc::off_t, len as libc::off_t) };
        if done != 0 {
            let error = std::io::Error::last_os_error();
            // A file system that cannot take room beforehand (none that we make volumes on) keeps the old risk.
            if error.raw_os_error() != Some(libc::EOPNOTSUPP) {
                return Err(Fault::io(format!("digest map {}", self.path), &error));
            }
        }
        self.roomy.insert(pages);
        Ok(())
    }

    /// From here on every entry is proven to be about this copy, and what is not is marked dirty.
    pub fn trust(&mut self, about: Digest) {
        self.map[..40].copy_from_slice(&header(about));
    }

    fn at(&self, block: u64) -> usize {
        HEADER_BYTES as usize + block as usize * DIGEST_BYTES
    }

    /// What the standby holds of a block.
    pub fn get(&self, block: u64) -> BlockDigest {
        let mut digest = [0; DIGEST_BYTES];
        digest.copy_from_slice(&self.map[self.at(block)..self.at(block) + DIGEST_BYTES]);
        BlockDigest(digest)
    }

    /// The standby has proven to hold these digests from `start` on (16 bytes each). Error: `PROTOCOL_ERROR` past the volume.
    pub fn set(&mut self, start: u64, digests: &[u8]) -> Res<()> {
        let count = (digests.len() / DIGEST_BYTES) as u64;
        if !digests.len().is_multiple_of(DIGEST_BYTES) || start.checked_add(count).is_none_or(|end| end > self.blocks) {
            return Err(Fault::protocol(format!("digests for blocks {start}+{count} of a volume of {} blocks", self.blocks)));
        }
        if count == 0 {
            return Ok(());
        }
        let at = self.at(start);
        self.make_room(at as u64, (at + digests.len()) as u64)?;
        self.map[at..at + digests.len()].copy_from_slice(digests);
        Ok(())
    }

    /// From now on nothing is known of these blocks. Error: `DISK_FULL`; then what was known stays, and they are not to be sent.
    pub fn forget(&mut self, run: BlockRun) -> Res<()> {
        let (from, to) = (self.at(run.start.min(self.blocks)), self.at(run.end().min(self.blocks)));
        if from < to {
            self.make_room(from as u64, to as u64)?;
            self.map[from..to].fill(0xff);
        }
        Ok(())
    }

    /// The blocks that may be other than zero on the standby: found by the file's data extents, so that a sparse volume costs
    /// nothing. Error: `IO_ERROR`.
    pub fn nonzero(&self) -> Res<BlockSet> {
        let mut set = BlockSet::empty(self.blocks);
        let end = HEADER_BYTES + self.blocks * DIGEST_BYTES as u64;
        let mut at = HEADER_BYTES;
        while at < end {
            let Some(data) = self.seek(at, libc::SEEK_DATA)? else { break };
            let hole = self.seek(data, libc::SEEK_HOLE)?.unwrap_or(end).min(end);
            for index in
                (data.max(HEADER_BYTES) - HEADER_BYTES) / DIGEST_BYTES as u64..(hole - HEADER_BYTES).div_ceil(DIGEST_BYTES as u64)
            {
                if index < self.blocks && self.get(index) != BlockDigest::ZERO {
                    set.insert(BlockRun { start: index, count: 1 });
                }
            }
            at = hole;
        }
        Ok(set)
    }

    fn seek(&self, from: u64, whence: i32) -> Res<Option<u64>> {
        // SAFETY: lseek(2) on a descriptor that we own; the file position is used by nobody.
        let at = unsafe { libc::lseek(self.file.as_raw_fd(), from as libc::off_t, whence) };
        if at >= 0 {
            return Ok(Some(at as u64));
        }
        let error = std::io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::ENXIO) => Ok(None),
            // A file system without holes: everything may hold data.
            Some(libc::EINVAL) if whence == libc::SEEK_DATA => Ok(Some(from)),
            _ => Err(Fault::io(format!("digest map {}", self.path), &error)),
        }
    }

    /// Number of blocks.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }
}

fn header(about: Digest) -> [u8; 40] {
    let mut bytes = [0; 40];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..].copy_from_slice(&about.0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_map_is_all_zero_and_remembers_only_what_was_proven() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("map");
        let about = Digest([7; 32]);
        let (mut known, fresh) = Known::open(&path, 10_000, about).unwrap();
        assert!(fresh);
        assert_eq!(known.get(9_999), BlockDigest::ZERO);
        known.set(5_000, &[1; 32]).unwrap();
        known.forget(BlockRun { start: 7_000, count: 2 }).unwrap();
        assert_eq!(known.get(5_001), BlockDigest([1; 16]));
        assert_eq!(known.get(7_001), BlockDigest::UNKNOWN);
        let set = known.nonzero().unwrap();
        assert_eq!(
            set.runs(99).collect::<Vec<_>>(),
            vec![BlockRun { start: 5_000, count: 2 }, BlockRun { start: 7_000, count: 2 }]
        );
        assert!(known.set(9_999, &[1; 32]).is_err());
        known.trust(about);
        drop(known);
        let (known, fresh) = Known::open(&path, 10_000, about).unwrap();
        assert!(!fresh);
        assert_eq!(known.get(5_000), BlockDigest([1; 16]));
        drop(known);
        for (blocks, about) in [(10_000, Digest([8; 32])), (10_001, Digest([8; 32]))] {
            let (known, fresh) = Known::open(&path, blocks, about).unwrap();
            assert!(fresh);
            assert_eq!(known.get(5_000), BlockDigest::ZERO);
        }
    }

    #[test]
    fn a_comparison_that_was_broken_off_is_never_believed_later() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("map");
        let about = Digest([7; 32]);
        // Made, and the process dies before anything was compared: as often as it likes.
        for _ in 0..2 {
            assert!(Known::open(&path, 1_000, about).unwrap().1);
        }
        let (mut known, _) = Known::open(&path, 1_000, about).unwrap();
        known.trust(about);
        known.set(5, &[1; 16]).unwrap();
        // Trusted, then a new comparison begins and dies half way.
        known.all_zero().unwrap();
        known.set(5, &[2; 16]).unwrap();
        drop(known);
        for _ in 0..2 {
            let (known, fresh) = Known::open(&path, 1_000, about).unwrap();
            assert!(fresh);
            assert_eq!(known.get(5), BlockDigest::ZERO);
        }
    }

    #[test]
    fn a_full_disk_is_an_error_and_not_a_signal() {
        let dir = tempfile::tempdir().unwrap();
        let (mut known, _) = Known::open(&dir.path().join("map"), 1 << 20, Digest([7; 32])).unwrap();
        let closed = OpenOptions::new().read(true).open(dir.path().join("map")).unwrap();
        // A descriptor that may not write cannot take room: the same path as a disk that has none.
        let open = std::mem::replace(&mut known.file, closed);
        assert!(known.forget(BlockRun { start: 300_000, count: 1 }).is_err());
        assert!(known.set(300_000, &[1; 16]).is_err());
        assert_eq!(known.get(300_000), BlockDigest::ZERO);
        known.file = open;
        known.set(300_000, &[1; 16]).unwrap();
        assert_eq!(known.get(300_000), BlockDigest([1; 16]));
    }
}
