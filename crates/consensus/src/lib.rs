//! Holdfast: consensus. The only crate that knows the Raft engine (openraft).
//!
//! [`Consensus`] replicates [`holdfast_core::ClusterState`]: proposals go in at the
//! coordinator, the applied state comes out everywhere. Bodies between nodes are
//! carried by a [`Transport`], which the binary provides.
//!
//! # Why the coordinator may grant leases
//!
//! [`Standing::quorum_acked`] and [`Consensus::authority_window_ms`] make a
//! [`holdfast_core::lease::Authority`]. With `window` and `hold` from
//! [`Settings::election_ms`]:
//!
//! ```text
//! coordinator:  sent ─────────── authority ends = sent + window
//!                  \
//! a majority:       accepted ──────────────── elects another ≥ accepted + hold
//! ```
//! `sent` is before `accepted` and `window < hold`, so authority ends first if
//! clocks differ in rate by less than `hold / window` (12 % by default). That a
//! voter holds still for so long rests on these points (paths in openraft 0.10.0-alpha.37):
//!
//! * Accepting an append or heartbeat sets the voter's lease to `hold`
//!   (`src/engine/handler/vote_handler/mod.rs`, `update_vote`; the length is
//!   `election_timeout_max`, `src/engine/engine_config.rs`). Until it is over, votes and
//!   pre-votes are refused (`src/engine/engine_impl.rs`, `handle_vote_req`,
//!   `handle_pre_vote_req`) and it does not campaign (`pre_elect`; the engine's own
//!   tick is off, and what `pace.rs` does waits longer still). Voters measure it on
//!   CLOCK_MONOTONIC: one that sleeps holds still longer, never shorter.
//! * A restarted voter has forgotten its lease (`src/storage/helper.rs` starts it
//!   with length zero). So a node that finds anything in its directory neither
//!   votes nor campaigns for `hold` after its start, unless it is the only voter and
//!   no other node can have been elected with its vote ([`Consensus::start`]).
//! * The coordinator is a voter too, and counts itself in the majority. It refuses
//!   votes for `hold` after its own last acknowledged quorum ([`Consensus::handle`]).
//! * A restarted coordinator is no coordinator (`enable_leader_restore` is off).
//! * A hand-over lets the voters elect at once (`HandleTransferLeader` in
//!   `src/core/raft_core.rs` disables their lease). So when [`Consensus::transfer`]
//!   begins, this node reports no authority and no role for the rest of the term,
//!   even if the hand-over fails. A removed coordinator would hand over by itself;
//!   [`Consensus::set_members`] does not remove it.
//! * Changing voters: both sets must acknowledge while they change, and a new set
//!   alone elects nobody before the change is committed in both. So whoever could be
//!   elected needs a majority of the set that this node counts last: an older list
//!   of members needs it as the old half, a newer one comes from this node alone.
//!
//! **The caller of [`Consensus::transfer`] stops granting leases when it is told to**,
//! and lets no grant out that it has decided on but not yet sent. The successor waits
//! out what was granted before, as after any change of coordinator.

mod authority;
mod consensus;
mod error;
mod force;
mod log;
mod machine;
mod mark;
mod medium;
mod members;
mod network;
mod pace;
mod record;
mod settings;
mod snapshot;
mod standing;
#[cfg(test)]
mod suite;
mod transport;
mod types;
mod wal;
mod witness;

pub use consensus::{Consensus, MAX_PROPOSAL_BYTES};
pub use error::{ConsensusError, ProposeError, RpcError, TransportError};
pub use force::force;
pub use members::Participants;
pub use settings::Settings;
pub use standing::{Role, Standing};
pub use transport::{RpcKind, Transport};
pub use witness::{Disk, DiskError, Gate, Seat};
