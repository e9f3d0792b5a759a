//! Power fencing: how a node's host can be switched off.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Says how a node's host can be switched off.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetFencing {
    /// A fence agent of Debian's `fence-agents`, such as `fence_ipmilan`.
    pub agent: String,
    /// Its options.
    #[serde(default)]
    pub options: BTreeMap<String, String>,
    /// Options that are never shown again, such as `password`.
    #[serde(default)]
    pub secrets: BTreeMap<String, String>,
}

/// How a node's host can be switched off.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FencingView {
    /// The node.
    pub node: String,
    /// The fence agent.
    pub agent: String,
    /// Its options.
    pub options: BTreeMap<String, String>,
    /// The names of the options that are not shown.
    pub secrets: Vec<String>,
    /// What the last test showed; absent when these options were never tested.
    pub test: Option<FenceTestView>,
    /// Somebody has asked to switch the host off, and that is not decided yet.
    pub asked: bool,
}

/// What a test showed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FenceTestView {
    /// When.
    pub at_ms: u64,
    /// From which node.
    pub from: String,
    /// Whether the host could be switched off from there, as far as can be told
    /// without doing it.
    pub passed: bool,
    /// What it showed, for a person.
    pub text: String,
}

/// A node's hardware watchdog.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WatchdogView {
    /// How it stands.
    pub state: WatchdogState,
    /// The device; absent when none is used.
    pub device: Option<String>,
    /// What the device says that it is.
    pub identity: Option<String>,
    /// How long after its last feeding it resets the host, while it is armed.
    pub timeout_s: Option<u32>,
    /// Why none is used.
    pub why: Option<String>,
}

/// How a hardware watchdog stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WatchdogState {
    /// None is used.
    Absent,
    /// It is armed when a VM runs.
    Ready,
    /// It is armed and fed.
    Armed,
    /// It is armed and not fed any more: it resets the host.
    Left,
}
