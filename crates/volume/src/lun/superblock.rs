//! The superblock: what a LUN is, written twice.

use uuid::Uuid;

use super::geometry::Geometry;
use super::{PAGE_BYTES, Reader, put_text};

const MAGIC: &[u8; 8] = b"HOLDFAST";
const VERSION: u32 = 1;
/// Where the checksum is: the last four bytes of the page.
const CHECKSUM: usize = PAGE_BYTES - 4;

/// Whose volume it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The volume; drawn when it was made.
    pub volume: Uuid,
    /// The cluster that it belongs to.
    pub cluster: Uuid,
    /// Its name there.
    pub name: String,
}

/// What a LUN is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Whose it is.
    pub identity: Identity,
    /// Where things are.
    pub geometry: Geometry,
    /// When it was made, milliseconds since the Unix epoch.
    pub made_ms: u64,
    /// Counts the times that it was written: the greater one of the two counts.
    pub written: u64,
}

/// Why a page is no superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoSuperblock {
    /// It holds something else, or nothing.
    Other,
    /// It was one, and is damaged.
    Damaged,
    /// It is one of a later version.
    Version(u32),
}

impl Superblock {
    /// The page.
    pub fn encode(&self) -> Vec<u8> {
        let mut page = MAGIC.to_vec();
        page.extend(VERSION.to_le_bytes());
        page.extend(self.written.to_le_bytes());
        page.extend(self.identity.volume.as_bytes());
        page.extend(self.identity.cluster.as_bytes());
        page.extend(self.made_ms.to_le_bytes());
        page.extend(self.geometry.slab_bytes.to_le_bytes());
        page.extend(self.geometry.slabs.to_le_bytes());
        page.extend(self.geometry.area_bytes.to_le_bytes());
        put_text(&mut page, &self.identity.name);
        page.resize(CHECKSUM, 0);
        page.extend(crc32fast::hash(&page).to_le_bytes());
        page
    }

    pub(super) fn decode(page: &[u8]) -> Result<Superblock, NoSuperblock> {
        let mut reader = Reader(page);
        if page.len() != PAGE_BYTES || reader.bytes(8) != Some(MAGIC) {
            return Err(NoSuperblock::Other);
        }
        let checksum = u32::from_le_bytes([page[CHECKSUM], page[CHECKSUM + 1], page[CHECKSUM + 2], page[CHECKSUM + 3]]);
        if crc32fast::hash(&page[..CHECKSUM]) != checksum {
            return Err(NoSuperblock::Damaged);
        }
        match reader.u32() {
            Some(VERSION) => Superblock::parse(&mut reader).ok_or(NoSuperblock::Damaged),
            Some(version) => Err(NoSuperblock::Version(version)),
            None => Err(NoSuperblock::Damaged),
        }
    }

    fn parse(reader: &mut Reader<'_>) -> Option<Superblock> {
        let written = reader.u64()?;
        let (volume, cluster) = (Uuid::from_bytes(reader.array()?), Uuid::from_bytes(reader.array()?));
        let made_ms = reader.u64()?;
        let geometry = Geometry { slab_bytes: reader.u64()?, slabs: reader.u32()?, area_bytes: reader.u64()? };
        let name = reader.text()?.to_owned();
        let sound = Geometry::of(geometry.end(), Some(geometry.slab_bytes)).is_some()
            && geometry.area_bytes.is_multiple_of(PAGE_BYTES as u64);
        sound.then_some(Superblock { identity: Identity { volume, cluster, name }, geometry, made_ms, written })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn example() -> Superblock {
        Superblock {
            identity: Identity { volume: Uuid::from_u128(1), cluster: Uuid::from_u128(2), name: "vol1".into() },
            geometry: Geometry::of(100 << 30, None).unwrap(),
            made_ms: 1_790_000_000_000,
            written: 3,
        }
    }

    #[test]
    fn it_is_read_as_it_was_written() {
        assert_eq!(Superblock::decode(&example().encode()), Ok(example()));
        assert_eq!(example().encode().len(), PAGE_BYTES);
    }

    #[test]
    fn damage_and_later_versions_are_told_apart_from_other_data() {
        assert_eq!(Superblock::decode(&[0; PAGE_BYTES]), Err(NoSuperblock::Other));
        let mut page = example().encode();
        page[8] = 9;
        assert_eq!(Superblock::decode(&page), Err(NoSuperblock::Damaged));
        let checksum = crc32fast::hash(&page[..CHECKSUM]).to_le_bytes();
        page[CHECKSUM..].copy_from_slice(&checksum);
        assert_eq!(Superblock::decode(&page), Err(NoSuperblock::Version(9)));
    }

    proptest! {
        #[test]
        fn a_page_with_a_flipped_bit_is_never_taken_for_sound(at in 8..PAGE_BYTES, bit in 0..8) {
            let mut page = example().encode();
            page[at] ^= 1_u8 << bit;
            prop_assert_eq!(Superblock::decode(&page), Err(NoSuperblock::Damaged));
        }
    }
}
