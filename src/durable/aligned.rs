//! Memory that a direct read or write takes without another copy.

/// What offset, length and address of a direct transfer must be a multiple of, in bytes.
pub const ALIGN_BYTES: usize = 4096;

/// A buffer of fixed length whose address is a multiple of [`ALIGN_BYTES`]; zero when made.
#[derive(Debug)]
pub struct AlignedBuf {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    /// A buffer of `len_bytes` zeroes.
    pub fn new(len_bytes: usize) -> AlignedBuf {
        // A little too much is allocated and the aligned part is used: no `unsafe`, and the pages cost nothing until touched.
        let memory = vec![0u8; len_bytes + ALIGN_BYTES];
        let start = memory.as_ptr().align_offset(ALIGN_BYTES);
        AlignedBuf { memory, start, len: len_bytes }
    }
}

impl std::ops::Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

impl std::ops::DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_a_multiple_of_a_block_wherever_the_buffer_moves() {
        for len in [1, 512, 4096, 1 << 20] {
            let buf = Box::new(AlignedBuf::new(len));
            assert_eq!((buf.as_ptr() as usize % ALIGN_BYTES, buf.len()), (0, len));
            let moved = *buf;
            assert_eq!(moved.as_ptr() as usize % ALIGN_BYTES, 0);
        }
    }
}
