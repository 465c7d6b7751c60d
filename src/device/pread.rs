//! The plain engine: one request at a time by pread and pwrite, on any kernel.

use crate::device::Engine;
use crate::device::file::{DeviceFile, buffer};
use crate::model::{ByteRun, Res};
use memmap2::MmapMut;

/// One buffer, one request in flight.
pub(super) struct Pread {
    buffer: MmapMut,
}

impl Pread {
    pub(super) fn new() -> Res<Pread> {
        Ok(Pread { buffer: buffer()? })
    }
}

impl Engine for Pread {
    fn name(&self) -> &'static str {
        "pread"
    }

    fn read(
        &mut self,
        file: &DeviceFile,
        runs: &mut dyn Iterator<Item = ByteRun>,
        sink: &mut dyn FnMut(ByteRun, &[u8]) -> Res<()>,
    ) -> Res<()> {
        for run in runs {
            file.check(run, false)?;
            file.read_run(run, &mut self.buffer)?;
            sink(run, &self.buffer[..run.len as usize])?;
        }
        Ok(())
    }

    fn write(&mut self, file: &DeviceFile, fill: &mut dyn FnMut(&mut [u8]) -> Res<Option<ByteRun>>) -> Res<()> {
        while let Some(run) = fill(&mut self.buffer)? {
            file.check(run, true)?;
            file.write_run(run, &self.buffer)?;
        }
        Ok(())
    }
}
