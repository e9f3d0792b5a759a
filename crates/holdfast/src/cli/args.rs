//! What can be written on the command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

mod fencing;
mod quorum;
mod vm;

pub use fencing::*;
pub use quorum::*;
pub use vm::*;

/// Failover clusters of virtual machines for Linux.
#[derive(Debug, Parser)]
#[command(name = "holdfast", version, propagate_version = true, max_term_width = 100)]
pub struct Cli {
    /// Which agent is asked.
    #[command(flatten)]
    pub connection: Connection,
    /// Print JSON instead of text.
    #[arg(long = "json", id = "json_before", hide = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Which agent is asked.
#[derive(Clone, Debug, Args)]
pub struct Connection {
    /// The socket of this host's agent.
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        env = "HOLDFAST_SOCKET",
        default_value = "/run/holdfast/agent.sock",
        help_heading = "Connection"
    )]
    pub socket: PathBuf,
    /// Ask this node instead: https://ADDRESS[:PORT]. Needs --token and --ca.
    #[arg(long, global = true, value_name = "URL", env = "HOLDFAST_SERVER", help_heading = "Connection")]
    pub server: Option<String>,
    /// The API token for --server (made with `holdfast token create`).
    #[arg(
        long,
        global = true,
        env = "HOLDFAST_TOKEN",
        hide_env_values = true,
        help_heading = "Connection",
        value_name = "TOKEN"
    )]
    pub token: Option<String>,
    /// The certificate of the cluster's authority, PEM (`holdfast cluster ca`).
    #[arg(long, global = true, value_name = "FILE", env = "HOLDFAST_CA", help_heading = "Connection")]
    pub ca: Option<PathBuf>,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, Args)]
pub struct Format {
    /// Print JSON instead of text.
    #[arg(long, global = true)]
    pub json: bool,
}

/// A command with commands of its own.
#[derive(Debug, Args)]
pub struct Group<C: Subcommand> {
    /// How results are printed.
    #[command(flatten)]
    pub format: Format,
    /// What to do.
    #[command(subcommand)]
    pub command: C,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Found a cluster, see how it stands, choose its failover profile.
    Cluster(Group<ClusterCommand>),
    /// The cluster's nodes: hosts that run VMs.
    Node(Group<NodeCommand>),
    /// Who votes and why, and how many more losses the cluster survives.
    Quorum(Group<QuorumCommand>),
    /// Networks that the nodes share.
    Network(Group<NetworkCommand>),
    /// Virtual switches, which NICs are plugged into.
    Switch(Group<SwitchCommand>),
    /// Cluster shared volumes, which hold disks.
    Volume(Group<VolumeCommand>),
    /// Virtual machines.
    Vm(Group<VmCommand>),
    /// Long work: its progress, and stopping it.
    Job(Group<JobCommand>),
    /// What happened.
    Events(EventsArgs),
    /// What would happen to every VM if; changes nothing.
    WhatIf(WhatIfArgs),
    /// Why something is as it is.
    Explain(Group<ExplainCommand>),
    /// Tokens for the API from afar.
    Token(Group<TokenCommand>),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Write man pages for every command into a directory.
    Man {
        /// The directory.
        dir: PathBuf,
    },
    /// Run the keeper: the parent of the agent and of every VM on this host.
    Keeper {
        /// The configuration.
        #[arg(long, value_name = "FILE", env = "HOLDFAST_CONFIG")]
        config: Option<PathBuf>,
    },
    /// Run the agent; the keeper starts it.
    Agent {
        /// The configuration.
        #[arg(long, value_name = "FILE", env = "HOLDFAST_CONFIG")]
        config: Option<PathBuf>,
    },
    /// Show a cluster of three nodes on this machine: migration and failover.
    Demo(DemoArgs),
    /// Print the OpenAPI document.
    #[command(hide = true)]
    Openapi,
    /// Run as the first process of a host in the lab.
    #[command(hide = true)]
    LabInit {
        /// What the lab passes on.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
}

/// `holdfast demo`.
#[derive(Clone, Debug, Args)]
pub struct DemoArgs {
    /// Also write the figures into this file, as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Leave the cluster up and say how to use it.
    #[arg(long)]
    pub keep: bool,
}

/// `holdfast cluster`.
#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Found a cluster with this host as its first node.
    Init {
        /// The cluster's name.
        #[arg(long)]
        name: String,
        /// The site at which this host stands: votes are spread over sites.
        #[arg(long)]
        site: Option<String>,
    },
    /// How the cluster stands.
    Status,
    /// Choose how long VMs stay on a node that reaches their disks on a LUN only through
    /// another node.
    RedirectPatience {
        /// How long, in seconds.
        seconds: u64,
    },
    /// Choose how fast a lost node is noticed.
    Profile {
        /// `default` for any network, `fast` for quiet dedicated ones, `wan` between sites.
        profile: ProfileArg,
    },
    /// Hand the coordination to another node, without a pause.
    Handover {
        /// The node; any that can when not given.
        #[arg(long, value_name = "NODE")]
        to: Option<String>,
    },
    /// Print the certificate of the cluster's authority, for --ca elsewhere.
    Ca,
}

/// A failover profile.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ProfileArg {
    /// For any local network: a lost node is noticed in about 1.7 s.
    Default,
    /// For quiet, dedicated networks: 0.7 s.
    Fast,
    /// Between sites: 11 s.
    Wan,
}

/// `holdfast node`.
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// List the nodes.
    List,
    /// Show a node.
    Show {
        /// Its name.
        name: String,
    },
    /// Change what is said of a node.
    Set {
        /// Its name.
        name: String,
        /// The site at which it stands, or `none`: votes are spread over sites.
        #[arg(long, value_name = "SITE|none")]
        site: String,
    },
    /// Empty a node for maintenance: its VMs move away while they run, and none comes.
    Drain {
        /// Its name.
        name: String,
        /// Do not wait until it is empty.
        #[arg(long)]
        no_wait: bool,
    },
    /// Let VMs come to a node again that was drained.
    Resume {
        /// Its name.
        name: String,
    },
    /// Remove a node. No VM may be on it, unless it is lost.
    Remove {
        /// Its name.
        name: String,
    },
    /// Make this host join a cluster.
    Join {
        /// Where a member answers: ADDRESS or ADDRESS:PORT.
        address: String,
        /// The join token (`holdfast node token` on a member).
        #[arg(long, value_name = "TOKEN")]
        token: String,
        /// The site at which this host stands: votes are spread over sites.
        #[arg(long)]
        site: Option<String>,
    },
    /// Power fencing: how a node's host can be switched off from another node.
    Fencing {
        /// What to do.
        #[command(subcommand)]
        command: FencingCommand,
    },
    /// Try out a node's power fencing from another node; switches nothing.
    FenceTest {
        /// The node.
        name: String,
    },
    /// Switch a node's host off: for a VM that nothing else frees.
    Fence {
        /// The node.
        name: String,
        /// Yes, cut its power.
        #[arg(long)]
        yes: bool,
    },
    /// Make a token with which one host may join, once.
    Token {
        /// For how many minutes it is good.
        #[arg(long, value_name = "MINUTES", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=43200))]
        valid: u64,
    },
}

/// `holdfast network`.
#[derive(Debug, Subcommand)]
pub enum NetworkCommand {
    /// List the networks that the nodes share.
    List,
    /// Rename a network or change its use.
    Set {
        /// Its name or subnet.
        network: String,
        /// Its new name.
        #[arg(long)]
        name: Option<String>,
        /// Whether it carries heartbeats and the traffic between agents.
        #[arg(long, value_name = "yes|no", value_parser = clap::builder::BoolishValueParser::new())]
        cluster: Option<bool>,
        /// Whether it carries live migrations.
        #[arg(long, value_name = "yes|no", value_parser = clap::builder::BoolishValueParser::new())]
        migration: Option<bool>,
        /// Preference for bulk traffic: lowest first.
        #[arg(long)]
        metric: Option<u32>,
    },
}

/// `holdfast switch`.
#[derive(Debug, Subcommand)]
pub enum SwitchCommand {
    /// Add a virtual switch.
    Add {
        /// Its name.
        name: String,
        /// What it reaches: external with an uplink, otherwise the node's VMs and the node.
        #[arg(
            long,
            value_enum,
            required_unless_present = "uplink",
            default_value_if("uplink", clap::builder::ArgPredicate::IsPresent, "external")
        )]
        kind: Option<SwitchKindArg>,
        /// For an external one: the interface, or an existing bridge, on every node.
        #[arg(long, value_name = "INTERFACE")]
        uplink: Option<String>,
    },
    /// List the virtual switches.
    List,
    /// Remove a virtual switch that no VM uses.
    Remove {
        /// Its name.
        name: String,
    },
}

/// What a switch reaches.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum SwitchKindArg {
    /// A physical network.
    External,
    /// The node and its VMs.
    Internal,
    /// The node's VMs only.
    Private,
}

/// `holdfast volume`.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Add a volume that every node reaches.
    Add {
        /// Its name.
        name: String,
        /// A directory that every node sees under this path.
        #[arg(long, value_name = "PATH", required_unless_present = "lun", conflicts_with = "lun")]
        directory: Option<String>,
        /// A LUN: a block device that every node sees, by its path on the node that is asked,
        /// or an export of an NBD server, nbd://HOST[:PORT]/EXPORT or
        /// nbd+unix:///EXPORT?socket=PATH.
        #[arg(long, value_name = "DEVICE|nbd://...")]
        lun: Option<String>,
        /// What is on the LUN and may be destroyed, in the word that the refusal gave.
        #[arg(long, value_name = "WHAT", requires = "lun")]
        erase: Option<String>,
    },
    /// List the volumes.
    List,
    /// Show a volume.
    Show {
        /// Its name.
        name: String,
    },
    /// Rename a volume. VMs with files on it have to be off.
    Rename {
        /// Its name.
        name: String,
        /// Its new name.
        new: String,
    },
    /// Choose the node that owns a volume on a LUN, and does I/O for nodes without a path.
    SetOwner {
        /// The volume.
        name: String,
        /// The node.
        node: String,
    },
    /// Send a node's I/O on a LUN through the volume's owner, as for work on its paths.
    Maintenance {
        /// The volume.
        name: String,
        /// The node that is to go through the owner.
        #[arg(long, value_name = "NODE", required_unless_present = "direct", conflicts_with = "direct")]
        redirect: Option<String>,
        /// The node that is to reach the LUN by itself again.
        #[arg(long, value_name = "NODE")]
        direct: Option<String>,
    },
    /// Show how much of the volumes is used, and how much was promised.
    Df {
        /// The volume; all of them when none is named.
        name: Option<String>,
    },
    /// Remove a volume that no VM uses. What is on it stays.
    Remove {
        /// Its name.
        name: String,
    },
    /// Take over a LUN that is a volume already, with its files, from a cluster that does not
    /// use it any more.
    Import {
        /// Its name here.
        name: String,
        /// The block device, by its path on the node that is asked.
        #[arg(long, value_name = "DEVICE")]
        lun: String,
        /// The volume's name in the cluster that it is taken from, as the refusal gave it.
        #[arg(long, value_name = "NAME")]
        take: Option<String>,
    },
    /// List the files of a volume.
    Ls {
        /// Its name.
        name: String,
    },
    /// Put a file of this host onto a volume. It is there when all of it is.
    Put {
        /// The volume.
        name: String,
        /// The file here.
        from: PathBuf,
        /// Its name there: parts with slashes between them. The same as here by default.
        to: Option<String>,
        /// Replace a file of that name.
        #[arg(long)]
        replace: bool,
    },
    /// Get a file from a volume to this host.
    Get {
        /// The volume.
        name: String,
        /// The file there.
        from: String,
        /// Where to; a file of the same name in this directory by default.
        to: Option<PathBuf>,
    },
    /// Remove a file from a volume that no VM has and nobody has open.
    Rm {
        /// The volume.
        name: String,
        /// The file.
        file: String,
    },
    /// Copy a file from a volume to the same or another one, through this host.
    Cp {
        /// What: VOLUME:FILE.
        from: String,
        /// Where to: VOLUME:FILE.
        to: String,
        /// Replace a file of that name.
        #[arg(long)]
        replace: bool,
    },
    /// Look at all of a LUN's description and compare it with the cluster's state. Changes nothing.
    Check {
        /// The volume.
        #[arg(required_unless_present = "lun", conflicts_with = "lun")]
        name: Option<String>,
        /// A device of this host instead, without any cluster.
        #[arg(long, value_name = "DEVICE")]
        lun: Option<PathBuf>,
    },
    /// Write a LUN's description anew from the cluster's state.
    Repair {
        /// Its name.
        name: String,
    },
    /// Serve this node's disks on LUNs; started by the keeper.
    #[command(hide = true)]
    Serve {
        /// The configuration file.
        #[arg(long, value_name = "FILE", env = "HOLDFAST_CONFIG")]
        config: Option<PathBuf>,
        /// The descriptor on which the keeper speaks.
        channel: i32,
    },
    /// Show the files of a volume on a LUN at a directory; started by the agent.
    #[command(hide = true)]
    Mount {
        /// What is logged.
        #[arg(long, value_name = "FILTER", default_value = "info")]
        log: String,
        /// The volume.
        volume: String,
        /// The directory.
        at: PathBuf,
    },
}

/// `holdfast job`.
#[derive(Debug, Subcommand)]
pub enum JobCommand {
    /// List the jobs that go on and the last ones that ended.
    List,
    /// Show a job.
    Show {
        /// Its number.
        id: u64,
        /// Wait until it ends.
        #[arg(long)]
        follow: bool,
    },
    /// Ask a migration or a shut-down to stop.
    Cancel {
        /// Its number.
        id: u64,
        /// Wait until it ends.
        #[arg(long)]
        follow: bool,
    },
}

/// `holdfast events`.
#[derive(Clone, Copy, Debug, Args)]
pub struct EventsArgs {
    /// How results are printed.
    #[command(flatten)]
    pub format: Format,
    /// Go on printing what happens.
    #[arg(short, long)]
    pub follow: bool,
    /// Only events with a greater index.
    #[arg(long, value_name = "INDEX", default_value_t = 0)]
    pub since: u64,
}

/// `holdfast what-if`.
#[derive(Clone, Debug, Args)]
pub struct WhatIfArgs {
    /// How results are printed.
    #[command(flatten)]
    pub format: Format,
    /// "lose NODE", "lose NODE and NODE", "lose site SITE", "lose witness", "lose volume VOLUME on
    /// NODE", "cut network NETWORK", "cut network NETWORK on NODE", "drain NODE", joined by "and".
    #[arg(required = true, value_name = "EVENT")]
    pub phrase: Vec<String>,
}

/// `holdfast explain`.
#[derive(Debug, Subcommand)]
pub enum ExplainCommand {
    /// Why a VM is where it is and in which state.
    Vm {
        /// Its name.
        name: String,
    },
}

/// `holdfast token`.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a token and print it, this once.
    Create {
        /// Its name, by which it is revoked.
        name: String,
    },
    /// List the tokens.
    List,
    /// Revoke a token.
    Revoke {
        /// Its name.
        name: String,
    },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    fn parsed(line: &str) -> Result<Cli, String> {
        let words = std::iter::once("holdfast").chain(line.split_whitespace());
        Cli::try_parse_from(words).map_err(|error| error.to_string())
    }

    #[test]
    fn every_documented_command_is_understood() {
        for line in [
            "cluster init --name prod",
            "cluster status --json",
            "cluster profile fast",
            "cluster ca",
            "--json node list",
            "node show n1",
            "node remove n1",
            "node drain n1 --no-wait --json",
            "node resume n1",
            "node set n1 --site east",
            "node join 10.0.0.1 --token abc --site west",
            "cluster init --name prod --site east",
            "quorum show --json",
            "quorum witness show --json",
            "quorum witness set --disk /dev/mapper/witness",
            "quorum witness set --none",
            "node join 10.0.0.1:7400 --token abc",
            "node token --valid 5 --json",
            "network list",
            "network set network-1 --name heartbeat --migration no --metric 10",
            "switch add lan --uplink eth1",
            "switch add private --kind private",
            "switch list",
            "switch remove lan",
            "volume add main --directory /srv/main",
            "volume add san --lun /dev/disk/by-id/wwn-0x5000 --erase ext",
            "volume show main --json",
            "volume rename main fast",
            "volume set-owner san n2",
            "volume maintenance san --redirect n1",
            "volume maintenance san --direct n1",
            "cluster redirect-patience 30",
            "volume df",
            "volume df san --json",
            "volume import san --lun /dev/sdb --take old",
            "volume ls san",
            "volume put san debian.iso iso/debian.iso --replace",
            "volume get san iso/debian.iso /tmp/debian.iso",
            "volume rm san iso/debian.iso",
            "volume cp san:iso/a.iso main:a.iso --json",
            "volume check san",
            "volume check --lun /dev/sdb --json",
            "volume repair san",
            "vm create web --cpus 2 --memory 2G --disk main:20G,format=raw --image /tmp/i.qcow2 --nic lan,vlan=7 --priority high --start",
            "vm create web --kernel /k --initrd /i --append console=ttyS0 --disk main:1G",
            "vm create -f vm.yaml --no-wait",
            "vm show web -o yaml",
            "vm stop web --force --no-wait",
            "vm migrate web --to n2",
            "vm console web",
            "job list",
            "job cancel 7 --follow",
            "events --follow --json",
            "explain vm web",
            "what-if lose n1 and n2 --json",
            "token create ci --server https://n1 --token secret --ca ca.pem",
            "completions bash",
            "man /tmp/man",
            "keeper --config /etc/holdfast/config.toml",
            "agent",
            "demo --json out.json --keep",
            "lab-init --flag value",
            "openapi",
        ] {
            if let Err(error) = parsed(line) {
                panic!("{line}: {error}");
            }
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for line in [
            "",
            "vm create",
            "what-if",
            "vm create web --disk :20G",
            "vm create web --disk main:20X",
            "vm create web --disk main:20G,format=vmdk",
            "vm create web --nic lan,vlan=5000",
            "vm create web --initrd /i",
            "vm create web --image /i",
            "vm create web -f x --cpus 2",
            "switch add lan",
            "volume check",
            "volume check san --lun /dev/sdb",
            "cluster profile slow",
            "job show seven",
            "node token --valid 0",
        ] {
            assert!(parsed(line).is_err(), "{line}");
        }
    }

    #[test]
    fn a_join_token_is_not_mistaken_for_an_api_token() {
        let cli = parsed("--token api node join 10.0.0.1 --token join").unwrap();
        let Command::Node(Group { command: NodeCommand::Join { token, .. }, .. }) = cli.command else { panic!() };
        assert_eq!(token, "join");
        assert!(parsed("--token api node join 10.0.0.1").is_err());
    }

    #[test]
    fn json_is_meant_wherever_it_is_written() {
        for line in ["--json vm list", "vm --json list", "vm list --json"] {
            let cli = parsed(line).unwrap();
            let Command::Vm(group) = cli.command else { panic!("{line}") };
            assert!(cli.json || group.format.json, "{line}");
        }
    }
}
