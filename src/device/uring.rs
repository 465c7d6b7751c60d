//! The io_uring engine: many requests in flight, results in the order asked for.

use crate::device::file::{DeviceFile, buffer};
use crate::device::pread::Pread;
use crate::device::transfer::{After, Piece, Transfer};
use crate::device::{Engine, RUN_BYTES_MAX};
use crate::model::{ByteRun, Code, Fault, Res};
use io_uring::{IoUring, Probe, opcode, types};
use memmap2::MmapMut;
use std::collections::VecDeque;
use std::io;

/// How often one piece may be told "try again" before that counts as an error.
const RETRIES_MAX: u32 = 1000;

/// A ring and its buffers.
pub(super) struct Uring {
    ring: IoUring,
    slots: Vec<Slot>,
    depth: usize,
    /// The kernel keeps a table of our buffers (5.19 and later).
    table: bool,
}

/// One buffer and what is being done with it. Its index is the request's `user_data` and its place in the kernel's table.
struct Slot {
    buffer: MmapMut,
    /// In the kernel's table: its pages stay pinned, which saves looking them up for every request.
    fixed: bool,
    state: State,
    retries: u32,
}

enum State {
    Free,
    /// A request for this piece is queued or in flight.
    Busy(Transfer, Piece),
    Whole(ByteRun),
    Failed(Fault),
}

impl Uring {
    /// `KERNEL_UNSUPPORTED` when the kernel gives no ring or lacks its plain read and write (before 5.6).
    pub(super) fn new(depth: usize) -> Res<Uring> {
        let refused = |cause: String| {
            Fault::new(
                Code::KernelUnsupported,
                "io_uring",
                cause,
                "use the `auto` or `pread` engine, or allow io_uring (kernel.io_uring_disabled, seccomp)",
            )
        };
        let ring = IoUring::new(depth as u32).map_err(|e| refused(format!("the kernel gives no ring: {e}")))?;
        let mut probe = Probe::new();
        ring.submitter()
            .register_probe(&mut probe)
            .map_err(|e| refused(format!("the kernel does not tell what it can do: {e}")))?;
        if !probe.is_supported(opcode::Read::CODE) || !probe.is_supported(opcode::Write::CODE) {
            return Err(refused("the kernel's ring knows no plain read and write".into()));
        }
        let table = ring.submitter().register_buffers_sparse(depth as u32).is_ok();
        Ok(Uring { ring, slots: Vec::new(), depth, table })
    }

    /// The index of a free slot, made if there may be one more.
    fn free_slot(&mut self) -> Res<Option<usize>> {
        if let Some(index) = self.slots.iter().position(|slot| matches!(slot.state, State::Free)) {
            return Ok(Some(index));
        }
        if self.slots.len() == self.depth {
            return Ok(None);
        }
        let mut buffer = buffer()?;
        let index = self.slots.len();
        let vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        // SAFETY: the buffer outlives the table: it sits in `slots` until this engine goes, and the kernel pins its pages besides.
        let fixed = self.table && unsafe { self.ring.submitter().register_buffers_update(index as u32, &[vector], None) }.is_ok();
        self.slots.push(Slot { buffer, fixed, state: State::Free, retries: 0 });
        Ok(Some(index))
    }
}

impl Engine for Uring {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    fn read(
        &mut self,
        file: &DeviceFile,
        runs: &mut dyn Iterator<Item = ByteRun>,
        sink: &mut dyn FnMut(ByteRun, &[u8]) -> Res<()>,
    ) -> Res<()> {
        let mut flight = Flight::new(self, file, false);
        let mut order: VecDeque<usize> = VecDeque::new();
        let mut more = true;
        let mut refused = None;
        loop {
            while more && order.len() < flight.engine.depth {
                let Some(run) = runs.next() else {
                    more = false;
                    break;
                };
                if let Err(fault) = file.check(run, false) {
                    // What was asked before it is still delivered.
                    (more, refused) = (false, Some(fault));
                    break;
                }
                let Some(transfer) = file.transfer(run, false) else {
                    drop(flight);
                    return Pread::new()?.read(file, &mut std::iter::once(run).chain(runs), sink);
                };
                let slot =
                    flight.engine.free_slot()?.ok_or_else(|| Fault::internal(file.name(), "no free buffer below the depth"))?;
                flight.start(slot, transfer)?;
                order.push_back(slot);
            }
            let Some(front) = order.pop_front() else {
                return refused.map_or(Ok(()), Err);
            };
            flight.settle(front)?;
            match std::mem::replace(&mut flight.engine.slots[front].state, State::Free) {
                State::Whole(run) => sink(run, &flight.engine.slots[front].buffer[..run.len as usize])?,
                State::Failed(fault) => return Err(fault),
                State::Free | State::Busy(..) => return Err(Fault::internal(file.name(), "a settled buffer holds nothing")),
            }
        }
    }

    fn write(&mut self, file: &DeviceFile, fill: &mut dyn FnMut(&mut [u8]) -> Res<Option<ByteRun>>) -> Res<()> {
        let mut flight = Flight::new(self, file, true);
        loop {
            let slot = loop {
                flight.retire()?;
                match flight.engine.free_slot()? {
                    Some(slot) => break slot,
                    None => flight.wait()?,
                }
            };
            let Some(run) = fill(&mut flight.engine.slots[slot].buffer)? else {
                return flight.land();
            };
            file.check(run, true)?;
            let Some(transfer) = file.transfer(run, true) else {
                let bytes = &flight.engine.slots[slot].buffer;
                file.write_run(run, bytes)?;
                continue;
            };
            while flight.engine.slots.iter().any(|s| matches!(&s.state, State::Busy(other, _) if other.run.overlaps(run))) {
                flight.wait()?;
            }
            flight.retire()?;
            flight.start(slot, transfer)?;
        }
    }
}

/// Requests in flight on one file. Dropping it waits for every one of them: the kernel must not write into a buffer that is used
/// again or gone, whatever ended the caller, a panic included.
struct Flight<'a> {
    engine: &'a mut Uring,
    file: &'a DeviceFile,
    write: bool,
    /// Pushed, not yet handed to the kernel.
    queued: usize,
    /// Handed to the kernel, not yet come back.
    flying: usize,
    /// So many are gathered for one system call.
    batch: usize,
}

impl<'a> Flight<'a> {
    fn new(engine: &'a mut Uring, file: &'a DeviceFile, write: bool) -> Flight<'a> {
        for slot in &mut engine.slots {
            slot.state = State::Free;
        }
        let batch = (engine.depth / 4).clamp(1, 16);
        Flight { engine, file, write, queued: 0, flying: 0, batch }
    }

    /// Begins a transfer in a free slot; hands requests to the kernel once a batch is there, or when nothing is flying.
    fn start(&mut self, slot: usize, transfer: Transfer) -> Res<()> {
        self.engine.slots[slot].retries = 0;
        self.push(slot, transfer)?;
        if self.queued >= self.batch || self.flying == 0 {
            self.enter(0)?;
        }
        Ok(())
    }

    fn push(&mut self, index: usize, transfer: Transfer) -> Res<()> {
        let piece = transfer.piece();
        let slot = &mut self.engine.slots[index];
        if piece.at + piece.len > RUN_BYTES_MAX as usize {
            return Err(Fault::internal(self.file.name(), "a piece larger than its buffer"));
        }
        let fd = types::Fd(self.file.descriptor(piece));
        let bytes = slot.buffer[piece.at..].as_mut_ptr();
        let (len, place) = (piece.len as u32, index as u16);
        let entry = match (self.write, slot.fixed) {
            (false, true) => opcode::ReadFixed::new(fd, bytes, len, place).offset(piece.offset).build(),
            (false, false) => opcode::Read::new(fd, bytes, len).offset(piece.offset).build(),
            (true, true) => opcode::WriteFixed::new(fd, bytes, len, place).offset(piece.offset).build(),
            (true, false) => opcode::Write::new(fd, bytes, len).offset(piece.offset).build(),
        };
        let entry = entry.user_data(index as u64);
        // SAFETY: the buffer is not touched, moved or freed while its slot is Busy, and Drop waits for every request; the descriptor
        // belongs to `file`, which this Flight borrows; the piece was checked to lie within the buffer.
        if unsafe { self.engine.ring.submission().push(&entry) }.is_err() {
            return Err(Fault::internal(self.file.name(), "the submission queue is full below its depth"));
        }
        slot.state = State::Busy(transfer, piece);
        self.queued += 1;
        Ok(())
    }

    /// Hands the queued requests to the kernel and waits until `want` have come back; then takes what has.
    fn enter(&mut self, want: usize) -> Res<()> {
        match self.engine.ring.submit_and_wait(want) {
            Ok(taken) => {
                let taken = taken.min(self.queued);
                self.queued -= taken;
                self.flying += taken;
            }
            // A signal, or the kernel is short of something: take what has come back and let the caller come again.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR)) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            Err(error) => return Err(Fault::io("io_uring", &error)),
        }
        self.reap()
    }

    /// Takes what has come back; what is not whole goes out again.
    fn reap(&mut self) -> Res<()> {
        loop {
            let Some(entry) = self.engine.ring.completion().next() else { return Ok(()) };
            self.flying = self.flying.saturating_sub(1);
            let index = entry.user_data() as usize;
            let Some(slot) = self.engine.slots.get_mut(index) else {
                return Err(Fault::internal("io_uring", format!("an answer to request {index}, which was never made")));
            };
            let State::Busy(mut transfer, piece) = std::mem::replace(&mut slot.state, State::Free) else {
                return Err(Fault::internal("io_uring", format!("a second answer to request {index}")));
            };
            let doing = if self.write { "writing" } else { "reading" };
            let failed = |file: &DeviceFile, error: &io::Error| match self.write {
                true => file.spoil(doing, piece.offset, error),
                false => file.fault(doing, piece.offset, error),
            };
            match entry.result() {
                code if matches!(-code, libc::EINTR | libc::EAGAIN) => {
                    slot.retries += 1;
                    match slot.retries > RETRIES_MAX {
                        true => slot.state = State::Failed(failed(self.file, &io::Error::from_raw_os_error(-code))),
                        false => {
                            if slot.retries > 10 {
                                std::thread::sleep(std::time::Duration::from_millis(1));
                            }
                            self.push(index, transfer)?;
                        }
                    }
                }
                code if code < 0 => slot.state = State::Failed(failed(self.file, &io::Error::from_raw_os_error(-code))),
                moved => match transfer.advance(piece, moved as usize) {
                    After::Whole => slot.state = State::Whole(transfer.run),
                    After::More => self.push(index, transfer)?,
                    After::Stuck(offset) => slot.state = State::Failed(self.file.stuck(self.write, offset)),
                },
            }
        }
    }

    /// Waits for at least one answer, if any is due.
    fn wait(&mut self) -> Res<()> {
        match self.queued + self.flying {
            0 => Ok(()),
            _ => self.enter(1),
        }
    }

    /// Waits until this slot is whole or failed; the others go on meanwhile.
    fn settle(&mut self, slot: usize) -> Res<()> {
        self.reap()?;
        while matches!(self.engine.slots[slot].state, State::Busy(..)) {
            self.wait()?;
        }
        Ok(())
    }

    /// Frees the slots of whole writes; the first failed one is the answer.
    fn retire(&mut self) -> Res<()> {
        for slot in &mut self.engine.slots {
            match std::mem::replace(&mut slot.state, State::Free) {
                State::Whole(_) => {}
                State::Failed(fault) => return Err(fault),
                other => slot.state = other,
            }
        }
        Ok(())
    }

    /// Waits for everything.
    fn land(&mut self) -> Res<()> {
        while self.queued + self.flying > 0 {
            self.enter(1)?;
        }
        self.retire()
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        while self.queued + self.flying > 0 {
            if let Err(fault) = self.enter(1) {
                // The ring itself is broken, and a request may still write into its buffer: give the memory up rather than reuse it.
                tracing::error!(%fault, "io_uring broke with requests in flight; their buffers are abandoned");
                std::mem::forget(std::mem::take(&mut self.engine.slots));
                self.engine.table = false;
                return;
            }
        }
        for slot in &mut self.engine.slots {
            slot.state = State::Free;
        }
    }
}
