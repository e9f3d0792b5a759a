//! Memory for data on its way, aligned as direct I/O wants it, and used again.

/// Direct I/O wants memory aligned to the block size of the device: at most this.
pub const ALIGNMENT: usize = 4096;

/// Sizes are powers of two from here.
const SMALLEST: usize = 4096;
/// Larger ones are given back to the system when they are not needed.
const LARGEST_KEPT: usize = 4 << 20;
/// Sizes from the smallest to the largest that is kept.
const CLASSES: usize = (LARGEST_KEPT / SMALLEST).ilog2() as usize + 1;
/// What is kept for later, at most, in bytes: enough for a client that streams.
const KEPT_BYTES: usize = 16 << 20;

/// Aligned memory.
#[derive(Debug, Default)]
pub struct Buffer {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl Buffer {
    fn new(class: usize, length: usize) -> Buffer {
        // Zeroed by the system as it is touched, so that no contents of another
        // disk can ever go out.
        let memory = vec![0; class + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        Buffer { memory, start, length }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }

    /// The bytes, to change them.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }

    fn class(&self) -> usize {
        self.memory.len() - ALIGNMENT.min(self.memory.len())
    }
}

/// Buffers that are not in use.
#[derive(Debug, Default)]
pub struct Pool {
    free: [Vec<Buffer>; CLASSES],
    bytes: usize,
}

impl Pool {
    /// A buffer of `length` bytes; what is in it is old data of any disk, and has
    /// to be overwritten.
    pub fn get(&mut self, length: usize) -> Buffer {
        let class = length.next_power_of_two().max(SMALLEST);
        match self.free.get_mut(rank(class)).and_then(Vec::pop) {
            Some(mut buffer) => {
                self.bytes -= class;
                buffer.length = length;
                buffer
            }
            None => Buffer::new(class, length),
        }
    }

    /// Takes a buffer back.
    pub fn put(&mut self, buffer: Buffer) {
        let class = buffer.class();
        if (SMALLEST..=LARGEST_KEPT).contains(&class) && self.bytes + class <= KEPT_BYTES {
            self.bytes += class;
            self.free[rank(class)].push(buffer);
        }
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Gives everything back to the system.
    pub fn clear(&mut self) {
        *self = Pool::default();
    }
}

/// Where buffers of a size, a power of two, are kept.
fn rank(class: usize) -> usize {
    (class / SMALLEST).ilog2() as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_used_again() {
        let mut pool = Pool::default();
        for length in [1, 512, 4096, 5000, 1 << 20, 3 << 20, 9 << 20] {
            let buffer = pool.get(length);
            assert_eq!(buffer.bytes().len(), length);
            assert!(buffer.bytes().as_ptr().addr().is_multiple_of(ALIGNMENT));
            pool.put(buffer);
        }
        let kept = pool.bytes;
        assert!(kept > 0 && kept <= KEPT_BYTES);
        let buffer = pool.get(4000);
        assert_eq!(pool.bytes, kept - 4096);
        pool.put(buffer);
        assert_eq!(pool.bytes, kept);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut pool = Pool::default();
        let many: Vec<_> = (0..64).map(|_| pool.get(1 << 20)).collect();
        many.into_iter().for_each(|buffer| pool.put(buffer));
        assert!(pool.bytes <= KEPT_BYTES);
    }
}
