//! `holdfast quorum`.

use clap::Subcommand;

/// `holdfast quorum`.
#[derive(Debug, Subcommand)]
pub enum QuorumCommand {
    /// Who votes and why, and how many more losses the cluster survives.
    Show,
    /// The disaster door: go on with this node alone when the others are gone for good.
    ///
    /// Only for when most voters are lost at once and will not be back in time. This
    /// node becomes the only voter, by what its own log says: what the others agreed
    /// on without it is lost. Nodes that come back later set aside what they knew and
    /// join again by themselves.
    ///
    /// If a node that is left out still runs, two halves of the cluster may run the
    /// same VM and ruin its disks. Switch the others off first.
    Force {
        /// The cluster's name, to show that this is the one that is meant.
        #[arg(long, value_name = "NAME")]
        cluster: String,
        /// A node that is up and comes along; not left out, so it need not be off.
        #[arg(long, value_name = "NODE")]
        with: Vec<String>,
        /// The nodes that are left out have been switched off. Without it, the command
        /// only says what it would do.
        #[arg(long)]
        the_others_are_switched_off: bool,
    },
    /// The witness: a vote on a disk or file that every node sees.
    #[command(subcommand)]
    Witness(WitnessCommand),
}

/// `holdfast quorum witness`.
#[derive(Debug, Subcommand)]
pub enum WitnessCommand {
    /// Makes a disk the witness, or does without one.
    Set {
        /// The disk or file, under the same path on every node; a file that is not
        /// there is created, whatever holds something is refused.
        #[arg(long, value_name = "PATH", required_unless_present = "none", conflicts_with = "none")]
        disk: Option<String>,
        /// Do without a witness.
        #[arg(long)]
        none: bool,
    },
    /// Where it is, who hosts it, and how it does.
    Show,
}
