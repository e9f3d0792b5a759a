//! The witness: a vote on a disk that the nodes share.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Makes a disk the witness.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SetWitness {
    /// The path of the disk or file, the same on every node. A file that is not
    /// there is created; whatever holds something is refused.
    pub disk: String,
}

/// How the witness stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WitnessView {
    /// The path of its disk.
    pub disk: String,
    /// What is written on the disk, to recognise it.
    pub mark: String,
    /// The node that should host it.
    pub host: Option<String>,
    /// The node that hosts it, as far as it was told.
    pub hosted_by: Option<String>,
    /// Counts the claims on the disk.
    pub epoch: u64,
    /// Whether it votes now.
    pub votes: bool,
    /// Whether it acknowledges what the coordinator says; absent when no coordinator
    /// answered.
    pub present: Option<bool>,
    /// For how long it has acknowledged nothing, in milliseconds.
    pub silent_ms: Option<u64>,
    /// The node that was asked, and how long ago it last read or wrote the disk, in
    /// milliseconds.
    pub seen_from: Option<String>,
    /// See `seen_from`.
    pub seen_ms: Option<u64>,
    /// Whether all is well with it.
    pub healthy: bool,
    /// What is not.
    pub why: Option<String>,
}
