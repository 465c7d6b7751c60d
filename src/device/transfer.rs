//! The geometry of one run on its way: which piece comes next, and through which door (direct or page cache) it fits.

use crate::model::ByteRun;

/// What an image allows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lanes {
    /// Alignment of offset and length that direct I/O asks for, in bytes; `None` where there is no direct I/O.
    pub(super) align: Option<u64>,
    /// Whether a piece that does not fit direct I/O may be read through the page cache. Not on a block device: a mounted file
    /// system keeps metadata there that it has not submitted yet, and no power cut could have left those bytes.
    pub(super) cached_reads: bool,
}

/// One system call's worth: `len` bytes at `offset` of the image, `at` bytes into the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Through the O_DIRECT descriptor.
    pub(super) direct: bool,
    pub(super) offset: u64,
    pub(super) at: usize,
    pub(super) len: usize,
}

/// What came of a piece.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum After {
    /// The run is whole.
    Whole,
    /// Ask for the next piece.
    More,
    /// Nothing moved: the image ends here, or the device takes no more. Offset in bytes.
    Stuck(u64),
}

/// A run being moved.
#[derive(Clone, Copy, Debug)]
pub(super) struct Transfer {
    pub(super) run: ByteRun,
    write: bool,
    done: u64,
    lanes: Lanes,
    /// Direct I/O stopped inside one alignment unit: the rest goes through the page cache.
    cached: bool,
}

impl Transfer {
    pub(super) fn new(run: ByteRun, write: bool, lanes: Lanes) -> Transfer {
        Transfer { run, write, done: 0, lanes, cached: false }
    }

    /// The next piece. A read's length is rounded up to the alignment (the buffer is large enough, and the kernel stops at the
    /// end of the file); a write's is rounded down, and what is left at the unaligned end of an image goes through the page cache.
    pub(super) fn piece(&self) -> Piece {
        let offset = self.run.offset + self.done;
        let left = self.run.len - self.done;
        let (direct, len) = match self.lanes.align {
            Some(align) if !self.cached && offset.is_multiple_of(align) => match self.write {
                false => (true, left.next_multiple_of(align)),
                true if left >= align => (true, left / align * align),
                true => (false, left),
            },
            _ => (false, left),
        };
        Piece { direct, offset, at: self.done as usize, len: len as usize }
    }

    /// Counts what a system call moved.
    pub(super) fn advance(&mut self, piece: Piece, moved: usize) -> After {
        let end = (self.done + moved as u64).min(self.run.len);
        if end == self.run.len {
            self.done = end;
            return After::Whole;
        }
        if moved == 0 {
            return After::Stuck(self.run.offset + self.done);
        }
        let align = if piece.direct { self.lanes.align.unwrap_or(1) } else { 1 };
        let usable = end / align * align;
        if usable == self.done {
            // Less than one unit came: asking for the same again could go on for ever.
            if !self.write && !self.lanes.cached_reads {
                return After::Stuck(self.run.offset + end);
            }
            self.cached = true;
        }
        self.done = usable;
        After::More
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FILE: Lanes = Lanes { align: Some(4096), cached_reads: true };

    fn run(offset: u64, len: u64) -> ByteRun {
        ByteRun { offset, len }
    }

    #[test]
    fn an_unaligned_tail_is_read_direct_and_written_through_the_cache() {
        let read = Transfer::new(run(8192, 4096 + 512), false, FILE);
        assert_eq!(read.piece(), Piece { direct: true, offset: 8192, at: 0, len: 8192 });
        let mut write = Transfer::new(run(8192, 4096 + 512), true, FILE);
        let bulk = write.piece();
        assert_eq!(bulk, Piece { direct: true, offset: 8192, at: 0, len: 4096 });
        assert_eq!(write.advance(bulk, 4096), After::More);
        assert_eq!(write.piece(), Piece { direct: false, offset: 12288, at: 4096, len: 512 });
    }

    #[test]
    fn a_block_device_is_never_read_through_the_cache_after_a_ragged_read() {
        let lanes = Lanes { align: Some(4096), cached_reads: false };
        let mut read = Transfer::new(run(0, 8192), false, lanes);
        let piece = read.piece();
        assert_eq!(read.advance(piece, 5000), After::More);
        assert_eq!(read.piece(), Piece { direct: true, offset: 4096, at: 4096, len: 4096 });
        let piece = read.piece();
        assert_eq!(read.advance(piece, 100), After::Stuck(4196));
    }

    #[test]
    fn nothing_moved_is_an_end_not_an_endless_loop() {
        let mut read = Transfer::new(run(512, 512), false, FILE);
        let piece = read.piece();
        assert_eq!(read.advance(piece, 0), After::Stuck(512));
    }

    proptest! {
        /// However the kernel cuts pieces short, the run is covered from its start, without a gap and within the buffer.
        #[test]
        fn any_short_counts_cover_the_run(
            sectors in 1u64..512, start in 0u64..64, write: bool, shift in 9u32..13, direct: bool,
            cuts in prop::collection::vec(1usize..300_000, 1..40),
        ) {
            let whole = run(start * 512, sectors * 512);
            let lanes = Lanes { align: direct.then_some(1 << shift), cached_reads: true };
            let mut transfer = Transfer::new(whole, write, lanes);
            let mut covered = 0;
            for step in 0.. {
                prop_assert!(step < 2000, "no end");
                let piece = transfer.piece();
                prop_assert!(piece.len > 0 && piece.at as u64 <= covered, "gap at {covered}: {piece:?}");
                prop_assert_eq!(piece.offset, whole.offset + piece.at as u64);
                prop_assert!(piece.at as u64 + piece.len as u64 <= crate::device::RUN_BYTES_MAX);
                if write {
                    prop_assert!(piece.offset + piece.len as u64 <= whole.end(), "wrote past the run");
                }
                if piece.direct {
                    prop_assert!(piece.offset.is_multiple_of(1 << shift) && (piece.len as u64).is_multiple_of(1 << shift));
                }
                let moved = cuts[step % cuts.len()].min(piece.len);
                covered = covered.max(piece.at as u64 + moved as u64);
                if transfer.advance(piece, moved) == After::Whole {
                    break;
                }
            }
            prop_assert!(covered >= whole.len);
        }
    }
}
