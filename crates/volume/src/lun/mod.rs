//! A volume on one shared block device (a LUN): slabs, files made of slabs, and a
//! description of them on the LUN itself. `docs/lun-format.md` has every byte.
//!
//! ```text
//!  0        1 MiB     2 MiB   4 MiB                    data_start
//!  │ super- │ probe   │ super-│ area 0    │ area 1    │ slab 0 │ slab 1 │ …
//!  │ block  │ pages   │ block │ (snapshot, then journal of the files)  │
//! ```
//! A file is a list of slabs, some of them absent: they read as zero. One node, the
//! volume's owner, writes the description; whoever knows its newest state writes
//! the slabs of the files that it has a right to.
//!
//! Everything here is pure but for [`Device`], so that tests can crash it anywhere, and
//! for [`Alone`].

mod alone;
mod contents;
mod follow;
mod frame;
mod geometry;
mod inspect;
mod op;
mod store;
mod superblock;

pub use alone::{Alone, AloneError};
pub use contents::{Contents, FileId, LunFile, Segment, Wrong};
pub use follow::Agreed;
pub use geometry::Geometry;
pub use inspect::{AreaState, Condition, Inspection, inspect};
pub use op::Op;
pub use store::{Device, Store, StoreError};
pub use superblock::{Identity, Superblock};

/// Everything that describes a LUN is read and written in pages of so many bytes.
pub const PAGE_BYTES: usize = 4096;

/// Reads little-endian numbers and texts from bytes that may be anything.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A text with its length before it.
    fn text(&mut self) -> Option<&'a str> {
        let length = self.u16()?;
        std::str::from_utf8(self.bytes(usize::from(length))?).ok()
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u16).to_le_bytes());
    out.extend(text.as_bytes());
}
