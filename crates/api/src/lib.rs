//! What travels over Holdfast's REST API: requests and views.
//!
//! No server and no core internals: whoever talks to a cluster from outside can
//! use this crate alone. Times are `*_ms`: moments are milliseconds since the
//! Unix epoch, durations plain milliseconds. `*_bytes` are bytes. Requests
//! refuse unknown fields, so a misspelt one is not silently ignored; views may
//! grow fields in later versions, so readers must tolerate unknown ones.

mod cluster;
mod error;
mod fencing;
mod job;
mod lun;
mod network;
mod node;
mod quorum;
mod size;
mod stream;
mod token;
mod vm;
mod volume;
mod what_if;
mod witness;

pub use cluster::{ClusterView, Counts, FoundCluster, Founded, HandOver, HandedOver, ProfileName, Quorum, SetProfile};
pub use error::{ErrorBody, ErrorDetail};
pub use fencing::{FenceTestView, FencingView, SetFencing, WatchdogState, WatchdogView};
pub use job::{Event, JobOutcome, JobState, JobView, Moved, Severity};
pub use lun::{FileView, ImportVolume, VolumeCheck};
pub use network::{AddSwitch, NetworkView, SetNetwork, SwitchKind, SwitchView};
pub use node::{Address, JoinCluster, JoinLine, MakeJoinToken, NodeState, NodeView, SetNode, StaysView};
pub use quorum::{ForceQuorum, ForcedQuorum, QuorumView, SeatView};
pub use size::{BadSize, Size};
pub use stream::{Change, ChangeKind};
pub use token::{AddToken, MadeToken, TokenView};
pub use vm::{
    Allocation, Cause, CreateVm, DesiredState, DiskDefinition, DiskFormat, DiskView, Explanation, KernelBoot,
    MigrateVm, NicDefinition, Priority, StopVm, VmDefinition, VmState, VmView,
};
pub use volume::{
    AddVolume, OwnerView, PathState, Reach, RenameVolume, SetOwner, SetRedirect, SetRedirectPatience, VolumeKind,
    VolumeSpace, VolumeView,
};
pub use what_if::{VmFate, VmForecast, WhatIfView, Within};
pub use witness::{SetWitness, WitnessView};
