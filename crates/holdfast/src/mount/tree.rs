//! Folders made of the names of files: a LUN knows none, so one is there while a file in
//! it is.

use std::collections::BTreeMap;

use super::protocol::{Listing, Size};

/// The number of the folder that the volume is.
pub const ROOT: u64 = 1;

/// What has a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// A folder.
    Folder,
    /// A file.
    File(Size),
}

impl Listing {
    /// What is there under a name; none is the volume's own.
    pub fn find(&self, name: &str) -> Option<Found> {
        if let Some(size) = self.files.get(name) {
            return Some(Found::File(*size));
        }
        (name.is_empty() || self.below(name).next().is_some()).then_some(Found::Folder)
    }

    /// What stands in a folder, by its last names.
    pub fn entries(&self, folder: &str) -> BTreeMap<String, Found> {
        let entry = |(rest, size): (&str, Size)| match rest.split_once('/') {
            Some((first, _)) => (first.to_owned(), Found::Folder),
            None => (rest.to_owned(), Found::File(size)),
        };
        self.below(folder).map(entry).collect()
    }

    /// The files below a folder, by the rest of their names.
    fn below(&self, folder: &str) -> impl Iterator<Item = (&str, Size)> {
        let prefix = if folder.is_empty() { String::new() } else { format!("{folder}/") };
        let from = self.files.range(prefix.clone()..);
        from.map_while(move |(name, size)| Some((name.strip_prefix(&prefix)?, *size)))
    }
}

/// The numbers that the kernel knows names by. A name keeps its number for the life of the
/// mount, whatever stands there.
#[derive(Debug)]
pub struct Numbers {
    names: Vec<String>,
    numbers: BTreeMap<String, u64>,
}

impl Default for Numbers {
    fn default() -> Self {
        Numbers { names: vec![String::new()], numbers: BTreeMap::from([(String::new(), ROOT)]) }
    }
}

impl Numbers {
    /// The number of a name, a new one if it has none.
    pub fn of(&mut self, name: &str) -> u64 {
        if let Some(number) = self.numbers.get(name) {
            return *number;
        }
        self.names.push(name.to_owned());
        let number = self.names.len() as u64;
        self.numbers.insert(name.to_owned(), number);
        number
    }

    /// The name that has a number.
    pub fn name(&self, number: u64) -> Option<&str> {
        let at = usize::try_from(number.checked_sub(ROOT)?).ok()?;
        self.names.get(at).map(String::as_str)
    }
}

/// The name of what stands in a folder.
pub fn within(folder: &str, name: &str) -> String {
    if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing() -> Listing {
        let size = |bytes| Size { bytes, allocated: 0 };
        let files = [("a", 1), ("iso/deep/b", 2), ("iso/c", 3), ("iso-old", 4)];
        Listing { files: files.map(|(name, bytes)| (name.into(), size(bytes))).into(), ..Listing::default() }
    }

    #[test]
    fn folders_are_where_files_are_below() {
        let listing = listing();
        for folder in ["", "iso", "iso/deep"] {
            assert_eq!(listing.find(folder), Some(Found::Folder), "{folder}");
        }
        for nothing in ["is", "iso/d", "a/b", "iso/deep/b/c"] {
            assert_eq!(listing.find(nothing), None, "{nothing}");
        }
        let names = |folder| listing.entries(folder).into_keys().collect::<Vec<_>>();
        assert_eq!(names(""), ["a", "iso", "iso-old"]);
        assert_eq!(names("iso"), ["c", "deep"]);
        assert_eq!(names("iso/deep"), ["b"]);
        assert_eq!(listing.entries("iso")["deep"], Found::Folder);
        assert_eq!(listing.entries("iso")["c"], Found::File(Size { bytes: 3, allocated: 0 }));
    }

    #[test]
    fn a_name_keeps_its_number() {
        let mut numbers = Numbers::default();
        let (a, b) = (numbers.of("a"), numbers.of(&within("iso", "b")));
        assert_eq!((numbers.of("a"), numbers.of("iso/b"), numbers.of("")), (a, b, ROOT));
        assert_eq!((numbers.name(ROOT), numbers.name(b)), (Some(""), Some("iso/b")));
        assert_eq!((numbers.name(0), numbers.name(b + 1)), (None, None));
    }
}
