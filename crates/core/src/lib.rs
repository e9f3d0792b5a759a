//! The decisions of a Holdfast cluster, and nothing else.
//!
//! This crate is pure: no async runtime, no clock, no randomness, no files,
//! no sockets. Time and ids come in as arguments, decisions go out as data.
//! Everything that a cluster agrees on is [`ClusterState`], changed only by
//! [`ClusterState::apply`]; everything that the coordinator decides comes from
//! [`plan::plan`] and passes [`check::check`] before it is committed.

pub mod check;
pub mod explain;
pub mod fencing;
pub mod lease;
pub mod model;
pub mod observed;
pub mod placement;
pub mod plan;
pub mod quorum;
pub mod state;
pub mod watchdog;
pub mod what_if;
pub mod witness;

pub use model::*;
pub use observed::{Attending, NodeObserved, NodeReport, Observed, Run, VmReport, WitnessReport, WorkReport};
pub use plan::{Action, Decision, Ended, Evidence, Plan};
pub use state::{ClusterState, Command, Holding, Naming, NewNode, Proposal, Refusal, Reply};
