//! What a mount and its agent say to each other, in lines of JSON: the mount asks on its
//! standard output, and hears the answers on its standard input.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A question and its number; questions may be answered in any order.
#[derive(Debug, Serialize, Deserialize)]
pub struct Asked {
    /// The number of the question.
    pub id: u64,
    /// The question.
    pub ask: Ask,
}

/// What a mount asks for.
#[derive(Debug, Serialize, Deserialize)]
pub enum Ask {
    /// Which files there are.
    List,
    /// Have a file held for reading and served; it is known by the question's number.
    Open {
        /// Its name.
        name: String,
    },
    /// Let go of it.
    Close {
        /// The number of the question that opened it.
        handle: u64,
    },
    /// Remove a file.
    Remove {
        /// Its name.
        name: String,
    },
}

/// An answer and the number of its question.
#[derive(Debug, Serialize, Deserialize)]
pub struct Answered {
    /// The number of the question.
    pub id: u64,
    /// The answer.
    pub answer: Answer,
}

/// What an agent answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    /// The files.
    Listing(Listing),
    /// The file is held.
    Opened {
        /// Where it is served, as an address of an export; a file of no length is not.
        address: Option<String>,
        /// How long it is, in bytes.
        bytes: u64,
    },
    /// It is done.
    Done,
    /// It is not done, and will not be.
    Failed {
        /// Why, as a system call says it.
        errno: i32,
    },
}

/// The files of a volume, and its room.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Listing {
    /// By their names.
    pub files: BTreeMap<String, Size>,
    /// The volume's size, in bytes.
    pub size: u64,
    /// What of it is free, in bytes.
    pub free: u64,
    /// Since when it is a volume, in milliseconds since the Unix epoch.
    pub since_ms: u64,
}

/// How large a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Its length, in bytes.
    pub bytes: u64,
    /// The room that it has on the volume, in bytes.
    pub allocated: u64,
}
