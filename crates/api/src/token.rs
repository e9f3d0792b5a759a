//! Tokens with which programs and people use the API from afar.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A token, without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenView {
    /// Its name.
    pub name: String,
    /// When it was made.
    pub created_ms: u64,
}

/// Makes a token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddToken {
    /// Its name, by which it is revoked.
    pub name: String,
}

/// A token that was just made. Its secret is told this once.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MadeToken {
    /// Its name.
    pub name: String,
    /// Its secret: `Authorization: Bearer SECRET`.
    pub token: String,
    /// The certificate of the cluster's authority, PEM, that clients pin.
    pub ca_certificate: String,
}

/// Keeps a secret out of logs.
macro_rules! debug_without_secret {
    ($($kind:path { $shown:ident }),*) => {$(
        impl std::fmt::Debug for $kind {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($kind))
                    .field(stringify!($shown), &self.$shown)
                    .finish_non_exhaustive()
            }
        }
    )*};
}
debug_without_secret!(MadeToken { name }, crate::JoinLine { address }, crate::JoinCluster { address });
