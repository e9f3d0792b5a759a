//! Where things are on a LUN.

use super::PAGE_BYTES;

/// Where the first superblock is, in bytes.
pub(super) const SUPERBLOCK: u64 = 0;
/// Where nodes write to find out whether they see the same device, in bytes; a page each.
pub(super) const PROBE: u64 = 1 << 20;
/// Where the second superblock is, in bytes.
pub(super) const SUPERBLOCK_COPY: u64 = 2 << 20;
/// Where the areas begin, in bytes.
const AREAS: u64 = 4 << 20;
/// Data begins at a multiple of this, in bytes.
const DATA_ALIGNMENT: u64 = 1 << 20;

const SMALLEST_SLAB: u64 = 16 << 20;
const LARGEST_SLAB: u64 = 1 << 30;
/// A slab is chosen so large that there are at most about so many.
const SLABS_AIMED_AT: u64 = 32_768;
const SMALLEST_AREA: u64 = 4 << 20;
/// Space in an area for each slab, in bytes: a run of one slab takes 21, twice over,
/// so that a snapshot leaves half of the area to the journal.
const AREA_PER_SLAB: u64 = 64;

/// The sizes from which all positions follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size of a slab in bytes, a power of two.
    pub slab_bytes: u64,
    /// How many slabs there are.
    pub slabs: u32,
    /// Size of each of the two areas in bytes.
    pub area_bytes: u64,
}

impl Geometry {
    /// For a LUN of `lun_bytes`; `None` if it is too small, or if `slab_bytes` is
    /// no power of two from 16 MiB to 1 GiB. Without `slab_bytes` one is chosen.
    pub fn of(lun_bytes: u64, slab_bytes: Option<u64>) -> Option<Geometry> {
        let fitting = (lun_bytes / SLABS_AIMED_AT).next_power_of_two().clamp(SMALLEST_SLAB, LARGEST_SLAB);
        let slab_bytes = slab_bytes.unwrap_or(fitting);
        if !slab_bytes.is_power_of_two() || !(SMALLEST_SLAB..=LARGEST_SLAB).contains(&slab_bytes) {
            return None;
        }
        let most = lun_bytes / slab_bytes;
        let area_bytes = (most * AREA_PER_SLAB).next_multiple_of(DATA_ALIGNMENT).max(SMALLEST_AREA);
        let mut geometry = Geometry { slab_bytes, slabs: 0, area_bytes };
        let left = lun_bytes.checked_sub(geometry.data_start())?;
        geometry.slabs = u32::try_from(left / slab_bytes).ok()?;
        (geometry.slabs > 0).then_some(geometry)
    }

    /// Where an area (0 or 1) begins, in bytes.
    pub fn area(&self, which: usize) -> u64 {
        AREAS + self.area_bytes * which as u64
    }

    /// Where the first slab begins, in bytes.
    pub fn data_start(&self) -> u64 {
        self.area(2).next_multiple_of(DATA_ALIGNMENT)
    }

    /// Where a slab begins, in bytes.
    pub fn slab(&self, slab: u32) -> u64 {
        self.data_start() + self.slab_bytes * u64::from(slab)
    }

    /// The end of the last slab, in bytes.
    pub fn end(&self) -> u64 {
        self.slab(self.slabs)
    }

    /// The page of a node, by its number modulo 256, in the region where nodes find
    /// out whether they see the same device.
    pub fn probe_page(node: u64) -> u64 {
        PROBE + (node % 256) * PAGE_BYTES as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slabs_grow_with_the_lun() {
        let slab = |gib: u64| Geometry::of(gib << 30, None).unwrap().slab_bytes >> 20;
        assert_eq!([slab(1), slab(500), slab(1024), slab(16 << 10), slab(200 << 10)], [16, 16, 32, 512, 1024]);
    }

    #[test]
    fn everything_is_inside_and_nothing_overlaps() {
        for bytes in [64 << 20, (100 << 30) + 12345 * 512, 1 << 44] {
            let geometry = Geometry::of(bytes, None).unwrap();
            assert!(geometry.area(0) >= SUPERBLOCK_COPY + PAGE_BYTES as u64);
            assert!(geometry.area(1) == geometry.area(0) + geometry.area_bytes);
            assert!(geometry.data_start() >= geometry.area(1) + geometry.area_bytes);
            assert!(geometry.end() <= bytes && geometry.end() + geometry.slab_bytes > bytes);
            assert!(Geometry::probe_page(255) + PAGE_BYTES as u64 <= SUPERBLOCK_COPY);
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert_eq!(Geometry::of(20 << 20, None), None);
        assert_eq!(Geometry::of(1 << 40, Some(24 << 20)), None);
        assert_eq!(Geometry::of(1 << 40, Some(1 << 20)), None);
        assert_eq!(Geometry::of(u64::MAX, Some(16 << 20)), None, "more slabs than can be numbered");
    }
}
