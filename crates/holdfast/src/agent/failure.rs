//! Why something that was asked of the agent did not happen.

use std::path::PathBuf;

use holdfast_core::Refusal;

/// Why something that was asked of the agent did not happen.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The cluster refused it; nothing changed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// This host belongs to no cluster.
    #[error("this host belongs to no cluster yet: `holdfast cluster init` founds one, `holdfast node join` joins one")]
    NotInCluster,
    /// This host belongs to no cluster any more.
    #[error(
        "this host was removed from its cluster: `holdfast node join` lets it join again or join another one; what it knew is kept in {}",
        kept.display()
    )]
    Removed {
        /// The directory.
        kept: PathBuf,
    },
    /// Nobody decides right now.
    #[error("no coordinator could be reached within {seconds} s: a majority of the voters has to be up and connected")]
    NoCoordinator {
        /// How long it was tried.
        seconds: u64,
    },
    /// It may or may not have been done (safety rule 5).
    #[error(
        "the coordinator was lost before it answered: the change may or may not have been made; look before you repeat it"
    )]
    Unknown,
    /// Anything else, with a machine-readable code.
    #[error("{text}")]
    Other {
        /// For programs.
        code: &'static str,
        /// For people.
        text: String,
    },
}

impl Failure {
    /// Anything that has no variant of its own.
    pub fn other(code: &'static str, text: impl Into<String>) -> Self {
        Failure::Other { code, text: text.into() }
    }
}
