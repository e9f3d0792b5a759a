//! The arguments of `holdfast node fencing`.

use clap::Subcommand;

/// `holdfast node fencing`.
#[derive(Debug, Subcommand)]
pub enum FencingCommand {
    /// Say how a node's host can be switched off.
    Set {
        /// The node.
        node: String,
        /// A fence agent (Debian: apt install fence-agents), such as `fence_ipmilan`.
        #[arg(long, value_name = "FENCE_AGENT")]
        agent: String,
        /// An option of it; `fence_ipmilan -o metadata` lists those that it has.
        #[arg(long, value_name = "KEY=VALUE")]
        option: Vec<String>,
        /// An option that is kept secret, read from a file or, for @-, from standard input.
        #[arg(long, value_name = "KEY=@FILE")]
        option_secret: Vec<String>,
    },
    /// How a node's host can be switched off, without its secrets.
    Show {
        /// The node.
        node: String,
    },
    /// Forget how a node's host can be switched off.
    Clear {
        /// The node.
        node: String,
    },
}
