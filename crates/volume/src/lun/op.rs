//! Changes to the files of a LUN, as its journal has them.

use super::contents::FileId;
use super::{Reader, put_text};

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// A new file, all of it absent.
    Create {
        /// Its number, never used before on this LUN.
        file: FileId,
        /// Its size in bytes.
        bytes: u64,
        /// Its name: parts with slashes between them.
        name: String,
    },
    /// A file is gone, and its slabs are free.
    Remove {
        /// Which.
        file: FileId,
    },
    /// A file has another name.
    Rename {
        /// Which.
        file: FileId,
        /// The new one.
        name: String,
    },
    /// A file has another size; slabs beyond it are free.
    Resize {
        /// Which.
        file: FileId,
        /// The new one, in bytes.
        bytes: u64,
    },
    /// `count` slabs from `slab` on become parts `index` and following of a file.
    Map {
        /// Which file.
        file: FileId,
        /// The first part.
        index: u32,
        /// The first slab.
        slab: u32,
        /// How many.
        count: u32,
    },
    /// Parts of a file are absent again, and their slabs free.
    Unmap {
        /// Which file.
        file: FileId,
        /// The first part.
        index: u32,
        /// How many.
        count: u32,
    },
}

impl Op {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let begin = |out: &mut Vec<u8>, kind: u8, file: &FileId| {
            out.push(kind);
            out.extend(file.0.to_le_bytes());
        };
        match self {
            Op::Create { file, bytes, name } => {
                begin(out, 1, file);
                out.extend(bytes.to_le_bytes());
                put_text(out, name);
            }
            Op::Remove { file } => begin(out, 2, file),
            Op::Rename { file, name } => {
                begin(out, 3, file);
                put_text(out, name);
            }
            Op::Resize { file, bytes } => {
                begin(out, 4, file);
                out.extend(bytes.to_le_bytes());
            }
            Op::Map { file, index, slab, count } => {
                begin(out, 5, file);
                [index, slab, count].into_iter().for_each(|number| out.extend(number.to_le_bytes()));
            }
            Op::Unmap { file, index, count } => {
                begin(out, 6, file);
                [index, count].into_iter().for_each(|number| out.extend(number.to_le_bytes()));
            }
        }
    }

    /// Reads all of them; `None` if the bytes are anything else.
    pub(super) fn decode_all(bytes: &[u8]) -> Option<Vec<Op>> {
        let mut reader = Reader(bytes);
        let mut ops = Vec::new();
        while !reader.0.is_empty() {
            ops.push(Op::decode(&mut reader)?);
        }
        Some(ops)
    }

    fn decode(reader: &mut Reader<'_>) -> Option<Op> {
        let (kind, file) = (reader.u8()?, FileId(reader.u64()?));
        Some(match kind {
            1 => Op::Create { file, bytes: reader.u64()?, name: reader.text()?.to_owned() },
            2 => Op::Remove { file },
            3 => Op::Rename { file, name: reader.text()?.to_owned() },
            4 => Op::Resize { file, bytes: reader.u64()? },
            5 => Op::Map { file, index: reader.u32()?, slab: reader.u32()?, count: reader.u32()? },
            6 => Op::Unmap { file, index: reader.u32()?, count: reader.u32()? },
            _ => return None,
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Any change, sensible or not.
    pub fn any_op() -> impl Strategy<Value = Op> {
        let file = || (1_u64..6).prop_map(FileId);
        let name = || "[a-c]{1,2}(/[a-c]{1,2})?";
        let bytes = || (0_u64..(200 << 20) / 512).prop_map(|sectors| sectors * 512);
        prop_oneof![
            (file(), bytes(), name()).prop_map(|(file, bytes, name)| Op::Create { file, bytes, name }),
            file().prop_map(|file| Op::Remove { file }),
            (file(), name()).prop_map(|(file, name)| Op::Rename { file, name }),
            (file(), bytes()).prop_map(|(file, bytes)| Op::Resize { file, bytes }),
            (file(), 0_u32..12, 0_u32..40, 0_u32..5).prop_map(|(file, index, slab, count)| Op::Map {
                file,
                index,
                slab,
                count
            }),
            (file(), 0_u32..12, 0_u32..5).prop_map(|(file, index, count)| Op::Unmap { file, index, count }),
        ]
    }

    proptest! {
        #[test]
        fn changes_are_read_as_they_were_written(ops in proptest::collection::vec(any_op(), 0..20)) {
            let mut bytes = Vec::new();
            ops.iter().for_each(|op| op.encode(&mut bytes));
            prop_assert_eq!(Op::decode_all(&bytes), Some(ops));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            Op::decode_all(&bytes);
        }
    }
}
