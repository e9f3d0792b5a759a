//! What would happen if.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What would happen; nothing has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WhatIfView {
    /// What was asked.
    pub asked: String,
    /// Whether the cluster could still decide anything.
    pub has_quorum: bool,
    /// Votes there are.
    pub votes: usize,
    /// Votes that are left on the side that has the most.
    pub votes_left: usize,
    /// Who coordinates afterwards: one of these; nobody without a quorum.
    pub coordinators: Vec<String>,
    /// Who votes afterwards.
    pub voters_afterwards: Vec<String>,
    /// Nodes that are called lost.
    pub lost: Vec<String>,
    /// When they are called lost.
    pub lost_within: Option<Within>,
    /// Every VM.
    pub vms: Vec<VmForecast>,
    /// What else there is to say.
    pub notes: Vec<String>,
}

/// From and to, in milliseconds after the event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Within {
    /// At the earliest.
    pub from_ms: u64,
    /// At the latest, on a machine that keeps up.
    pub to_ms: u64,
}

/// What would become of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmForecast {
    /// Its name.
    pub name: String,
    /// What happens to it.
    pub fate: VmFate,
    /// Where it is now.
    pub from: Option<String>,
    /// Where it is afterwards.
    pub to: Option<String>,
    /// When it stops or its start is ordered; QEMU's start and the guest's boot
    /// come on top.
    pub within: Option<Within>,
    /// Why.
    pub why: Option<String>,
}

/// What would become of a VM, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmFate {
    /// Nothing happens to it.
    Stays,
    /// It starts elsewhere.
    Restarts,
    /// It moves while it runs.
    Migrates,
    /// It stops and stays off, or its guest stands still.
    Stops,
    /// It would have to move, and cannot.
    Cannot,
}
