//! `holdfast quorum`.

use clap::Subcommand;

/// `holdfast quorum`.
#[derive(Debug, Subcommand)]
pub enum QuorumCommand {
    /// Who votes and why, and how many more losses the cluster survives.
    Show,
}
