//! The one shape of every answer that is not a success.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The body of every answer with a 4xx or 5xx status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    /// A word for programs, stable across versions: `not_found`, `already_exists`,
    /// `conflict`, `invalid`, `no_room`, `bad_token`, `not_in_cluster`,
    /// `no_coordinator`, `unknown` and others.
    #[schema(example = "not_found")]
    pub code: String,
    /// What happened, to what, and what to do, for a person.
    #[schema(example = "there is no VM \"web\"")]
    pub message: String,
}
