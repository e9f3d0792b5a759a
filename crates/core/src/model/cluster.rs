//! The cluster itself: its identity, its settings, its tokens.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::lease::LeaseTiming;

/// What makes this cluster this cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// Its name.
    pub name: String,
    /// Its identity, drawn when it was founded.
    pub id: Uuid,
    /// When it was founded, milliseconds since the Unix epoch.
    pub founded_ms: u64,
    /// The certificate of its authority, PEM.
    pub ca_certificate: String,
    /// The private key of its authority, PEM. Every node can become the
    /// coordinator and has to sign then, so every node has it.
    pub ca_key: String,
}

/// Which of the histories of a cluster counts: a new one begins when a quorum is
/// forced, and whatever is of an older one is refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generation {
    /// Counts how often a quorum was forced.
    pub number: u64,
    /// Tells apart two that were forced on both sides of a split, and so have the
    /// same number.
    pub mark: Uuid,
}

impl Generation {
    /// What heartbeats are bound to in place of the cluster's identity, so that none
    /// is understood in another generation.
    pub fn scope(self, cluster: Uuid) -> Uuid {
        Uuid::from_u128(cluster.as_u128() ^ self.mark.as_u128())
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.number, self.mark.simple())
    }
}

impl FromStr for Generation {
    type Err = ();

    /// As [`Generation`] is displayed.
    fn from_str(text: &str) -> Result<Self, ()> {
        let (number, mark) = text.split_once('.').ok_or(())?;
        Ok(Generation { number: number.parse().map_err(drop)?, mark: mark.parse().map_err(drop)? })
    }
}

/// What an administrator can choose for the whole cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// How fast a lost node is noticed.
    pub profile: Profile,
    /// The longest lease that may be out: longer than the profile's for a while
    /// after a change to a faster one.
    pub longest_lease: LeaseTiming,
    /// Virtual processors that may be placed per real one.
    pub cpu_overcommit: u32,
    /// Crashes of a VM on one node, within the window, after which it is tried elsewhere.
    pub crash_budget: u32,
    /// How long a crash counts, in seconds.
    pub crash_window_s: u64,
    /// How long a node may reach a LUN only through another before its VMs move to one
    /// that reaches it by itself, in seconds.
    #[serde(default = "redirect_patience_s")]
    pub redirect_patience_s: u64,
}

fn redirect_patience_s() -> u64 {
    60
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            profile: Profile::Default,
            longest_lease: Profile::Default.timing(),
            cpu_overcommit: 8,
            crash_budget: 3,
            crash_window_s: 600,
            redirect_patience_s: redirect_patience_s(),
        }
    }
}

/// How fast a lost node is noticed, against how much disturbance is tolerated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// For any local network.
    #[default]
    Default,
    /// For quiet, dedicated networks.
    Fast,
    /// Between sites.
    Wan,
}

impl Profile {
    /// The leases of this profile.
    pub fn timing(self) -> LeaseTiming {
        match self {
            Profile::Default => LeaseTiming { length_ms: 1500, heartbeat_ms: 100 },
            Profile::Fast => LeaseTiming { length_ms: 600, heartbeat_ms: 50 },
            Profile::Wan => LeaseTiming { length_ms: 10_000, heartbeat_ms: 500 },
        }
    }
}

/// A token that lets one host join, once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinToken {
    /// From when on it is worth nothing, milliseconds since the Unix epoch.
    pub expires_ms: u64,
    /// The node that used it.
    pub used_by: Option<String>,
}

/// A token that lets a program or a person use the API from afar.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiToken {
    /// SHA-256 of the token, in hexadecimal.
    pub digest: String,
    /// When it was made, milliseconds since the Unix epoch.
    pub created_ms: u64,
}
