//! The world: hosts, processes, messages and time, all in one place and one thread.

mod agent;
mod client;
mod consensus;
mod coordinator;
mod faults;
mod fencing;
mod host;
mod keeper;
mod network;
mod oracle;
mod queue;
mod rest;
mod seats;
mod shared_disk;
mod vm_worker;
mod volumes;
mod witness;

use std::collections::BTreeMap;
use std::rc::Rc;

use holdfast_core::lease::{BootTime, Grant, Heartbeat};
use holdfast_core::*;
use uuid::Uuid;

use crate::clock::MS;
use crate::mutation::Mutation;
use crate::raft::{Defects, ElectionTiming, Entry, Members, RaftMessage, What};
use crate::rng::Rng;
use crate::role::Cast;
use crate::script::Step;

pub use oracle::{Tally, Violation};

use client::Client;
use host::{Host, host_of};
use network::Links;
use oracle::Chain;
use queue::Queue;
use shared_disk::{SharedDisk, Transfer};
use witness::DiskWord;

/// The wall clocks' zero in milliseconds since the Unix epoch: some day in 2026.
const WALL_ZERO_MS: u64 = 1_790_000_000_000;

/// How a world begins.
#[derive(Clone, Debug)]
pub struct Setting {
    /// Seeds what the plot does not say: delays, drifts, what guests do.
    pub seed: u64,
    /// How many nodes.
    pub nodes: usize,
    /// Memory for VMs on each, in MiB.
    pub memory_mib: u64,
    /// The failover profile.
    pub profile: Profile,
    /// There is a witness.
    pub witness: bool,
    /// There are volumes on LUNs.
    pub luns: bool,
    /// Exact clocks, even delays, obedient guests: for scenarios that people read.
    pub calm: bool,
    /// A rule that is broken on purpose.
    pub mutation: Option<Mutation>,
    /// Keep a timeline.
    pub trace: bool,
    /// Keepers are stopped in this run, so image locks are on and the oracle
    /// looks at who can write; else there are none, and it looks at who runs.
    pub image_locks: bool,
}

/// Part of a host that messages go to and that can die or stand still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Keeper,
    Agent,
    /// The VMs: they live and die with the keeper, and stand still with the host.
    Guests,
}

#[derive(Clone, Debug)]
enum Event {
    Script(usize),
    Deliver {
        from: usize,
        to: usize,
        message: Message,
    },
    /// Starts a part again, if nothing has happened to its host since.
    Start(usize, Part, u64),
    KeeperBeat(usize, u64),
    KeeperAlarm(usize, u64),
    AgentTick(usize, u64),
    /// The next write of a participant is on the disk, in this life of the agent.
    Stored {
        host: usize,
        who: usize,
        life: u64,
    },
    Guest(usize, u64, GuestTimer),
    /// An agent looks after the witness.
    HostingTurn(usize, u64),
    /// A write reaches the witness's disk; its writer had this much of its boots then.
    Lands {
        host: usize,
        power: u64,
        transfer: Transfer,
    },
    /// The witness's disk has done what this life of an agent asked for.
    DiskSays {
        host: usize,
        life: u64,
        asked: u64,
        word: DiskWord,
    },
    Client(usize),
    /// An I/O for another host is over, in this life of the volume server.
    IoDone {
        host: usize,
        lun: usize,
        life: u64,
    },
    /// A fence agent switches a host off, in this of its boots.
    PowerCut(usize, u64),
    /// Somebody switches it on again.
    PowerBack(usize, u64),
    /// What a fence agent has to say comes in.
    FenceSaid(fencing::Fence),
    /// A host loses its power, and nothing that it has sent arrives.
    Doom(usize),
    /// A host that was cut off at a bad moment is joined again.
    Rejoin(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GuestTimer {
    Booted,
    Dead,
    ShutDown,
    /// The migration goes on.
    Step,
    /// The target's acknowledgement did not come.
    GiveUp,
}

#[derive(Clone, Debug)]
enum Message {
    Heartbeat(Heartbeat, u64),
    Grant(Grant),
    Probe(Incarnation, u64),
    Challenge(Incarnation, u64),
    /// Between participants of consensus.
    Raft {
        from: usize,
        to: usize,
        message: RaftMessage,
    },
    /// Reports of one node keep their order: this is when it was sent.
    Report(NodeId, u64, Rc<NodeReport>),
    Propose(Rc<Proposal>),
    Proposed(RequestId, Reply),
    Word(Word),
    /// The target of this migration is over.
    TargetOver(VmId, Epoch),
    /// All of the guest, to the QEMU of this epoch; and which state of it.
    Stream {
        vm: VmId,
        from: Epoch,
        to: Epoch,
        ram: u64,
    },
    StreamTaken {
        vm: VmId,
        from: Epoch,
        to: Epoch,
    },
    StreamBroken {
        vm: VmId,
        to: Epoch,
    },
    /// I/O of a host that does not reach a LUN by itself, to its owner of this epoch.
    Io {
        lun: usize,
        epoch: Epoch,
    },
}

/// What the agent of a migration's source tells that of its target.
#[derive(Clone, Copy, Debug)]
struct Word {
    vm: VmId,
    to: Epoch,
    /// The source has sent it and never continues it; else the source is dead.
    sent: bool,
}

impl Message {
    fn part(&self) -> Part {
        match self {
            Message::Grant(_) | Message::Probe(..) | Message::Challenge(..) => Part::Keeper,
            Message::Stream { .. }
            | Message::StreamTaken { .. }
            | Message::StreamBroken { .. }
            | Message::Io { .. } => Part::Guests,
            _ => Part::Agent,
        }
    }
}

/// Everything.
pub struct World {
    setting: Setting,
    /// True time in nanoseconds.
    now: u64,
    queue: Queue,
    rng: Rng,
    steps: Vec<Step>,
    hosts: Vec<Host>,
    links: Links,
    chain: Chain,
    /// How often each VM's disks were written by a guest that began to run.
    disks: BTreeMap<VmId, u64>,
    /// What was done on LUNs for others.
    done: [volumes::Done; volumes::LUNS],
    serial: u64,
    clients: Vec<Client>,
    /// Things break by themselves, too: off once everything is to heal.
    troubled: bool,
    last_decision: u64,
    last_move: u64,
    last_asked: u64,
    last_heal: u64,
    tally: Tally,
    /// The disk that the witness lives on.
    disk: Option<SharedDisk>,
    /// Which life of the witness was last read from it.
    witness_read: u64,
    /// Who plays which role in the script.
    cast: Cast,
    /// Loses its power when a node is next called lost.
    doomed: Option<usize>,
    /// Who takes part in the beginning.
    founders: Members,
    /// Whom each participant voted for, by its number and the term.
    votes: BTreeMap<(usize, u64), usize>,
    violation: Option<Violation>,
    timeline: Vec<(u64, String)>,
}

impl World {
    /// Hosts with a cluster whose log says that it was founded and joined.
    pub fn new(setting: Setting, steps: Vec<Step>) -> Self {
        let rng = Rng::new(setting.seed ^ 0x0077_6f72_6c64);
        let nodes = setting.nodes;
        let mut world = World {
            now: 0,
            queue: Queue::default(),
            rng,
            hosts: Vec::new(),
            links: Links::new(nodes),
            chain: Chain::default(),
            disks: BTreeMap::new(),
            done: Default::default(),
            serial: 0,
            clients: Vec::new(),
            troubled: !setting.calm,
            last_decision: 0,
            last_move: 0,
            last_asked: 0,
            last_heal: 0,
            tally: Tally::default(),
            disk: None,
            witness_read: 0,
            cast: Cast::default(),
            doomed: None,
            founders: Members::default(),
            votes: BTreeMap::new(),
            violation: None,
            timeline: Vec::new(),
            steps,
            setting,
        };
        world.found();
        for (index, step) in world.steps.iter().enumerate() {
            world.queue.push(step.at_ms * MS, Event::Script(index));
        }
        for host in 0..nodes {
            world.power_on(host);
        }
        world
    }

    fn election(&self) -> ElectionTiming {
        let (window_ms, hold_ms, heartbeat_ms) = match self.setting.profile {
            Profile::Fast => (200, 225, 40),
            _ => (320, 360, 60),
        };
        ElectionTiming { window_ms, hold_ms, heartbeat_ms }
    }

    /// The log that the cluster begins with, the same on every disk.
    fn found(&mut self) {
        let facts = |index: usize, memory_mib: u64| NodeFacts {
            cpus: 64,
            memory_bytes: memory_mib << 20,
            accelerator: Accelerator::Tcg,
            qemu: Some("7.2.0".into()),
            machines: vec!["pc-q35-7.2".into()],
            addresses: vec![NodeAddress {
                interface: "lan".into(),
                ip: [10, 77, 1, index as u8 + 1].into(),
                prefix: 24,
            }],
            version: "0.1.0".into(),
            watchdog: None,
            volume_port: 0,
        };
        let memory = self.setting.memory_mib;
        let host = |index: usize| NewNode {
            name: format!("n{}", index + 1),
            port: 7001,
            heartbeat_port: 7002,
            heartbeat_key: [index as u8 + 1; 32],
            facts: facts(index, memory),
            site: None,
        };
        let cluster = Cluster {
            name: "sim".into(),
            id: Uuid::from_u128(1),
            founded_ms: WALL_ZERO_MS,
            ca_certificate: String::new(),
            ca_key: String::new(),
        };
        let mut commands = vec![Command::Found { cluster, node: host(0) }];
        for index in 1..self.setting.nodes {
            let digest = format!("token-{index}");
            commands.push(Command::AddJoinToken { digest: digest.clone(), expires_ms: u64::MAX });
            commands.push(Command::Join { digest, node: host(index) });
        }
        // Some have a long life behind them: what is kept of it is at its bound.
        if !self.setting.calm && self.setting.seed % 500 == 77 {
            let turns = [Profile::Fast, Profile::Default].into_iter().cycle().take(1_100);
            commands.extend(turns.map(|profile| Command::SetProfile { profile }));
        }
        if self.setting.profile != Profile::Default {
            commands.push(Command::SetProfile { profile: self.setting.profile });
        }
        if self.setting.witness {
            commands.push(Command::SetWitness { disk: "/dev/witness".into(), mark: Uuid::from_u128(3) });
        }
        // Some clusters can switch their hosts off.
        if !self.setting.calm && self.setting.seed.is_multiple_of(3) {
            commands.extend(fencing::configuration(self.setting.nodes));
        }
        let kind = VolumeKind::Directory { path: "/srv/vol1".into() };
        commands.push(Command::AddVolume { name: "vol1".into(), id: Uuid::from_u128(2), kind });
        if self.setting.luns {
            commands.extend(volumes::configuration());
        }
        let entries: Vec<_> =
            commands.into_iter().map(|command| self.proposal("setup", WALL_ZERO_MS, command)).collect();
        let log: Vec<_> =
            entries.into_iter().map(|proposal| Entry { term: 1, what: What::Command(proposal) }).collect();
        for entry in &log {
            self.chain.append(entry);
        }
        if self.setting.witness {
            self.disk = Some(World::found_witness(log.clone()));
        }
        // As if every node had been given its seat when it joined.
        let seats = quorum::seats(&self.chain.latest(), NodeId(1), &Default::default(), &Default::default());
        let (voters, learners) = (self.group(&seats.voters), self.group(&seats.learners));
        let members = Members { voters, before: None, learners };
        self.founders = members;
        for index in 0..self.setting.nodes {
            let host = Host::new(index, self, members, log.clone());
            self.hosts.push(host);
        }
    }

    /// How many participants of consensus there can be.
    fn participants(&self) -> usize {
        self.setting.nodes + usize::from(self.setting.witness)
    }

    /// Which participant of consensus a node is.
    fn participant(&self, id: NodeId) -> usize {
        if id.is_witness() { self.witness() } else { host_of(id) }
    }

    fn name_of(&self, who: usize) -> String {
        if who == self.witness() { "the witness".into() } else { format!("n{}", who + 1) }
    }

    /// The node, or witness, that a participant is.
    fn node_id(&self, who: usize) -> NodeId {
        if who == self.witness() { NodeId::witness(1) } else { NodeId(who as u64 + 1) }
    }

    fn defects(&self) -> Defects {
        Defects { votes_at_once: self.mutated(Mutation::VoteAtOnce), forgets_hold: self.mutated(Mutation::ForgetHold) }
    }

    fn proposal(&mut self, by: &str, at_ms: u64, command: Command) -> Rc<Proposal> {
        let id = RequestId(Uuid::from_u64_pair(self.rng.next(), self.rng.next()));
        Rc::new(Proposal { id, at_ms, by: by.into(), command })
    }

    /// Draws from a range; its middle in a calm world.
    fn draw(&mut self, low: u64, high: u64) -> u64 {
        if self.setting.calm { (low + high) / 2 } else { self.rng.between(low, high) }
    }

    /// Whether something unlikely happens now; never in a calm world.
    fn chance(&mut self, permille: u64) -> bool {
        self.troubled && self.rng.permille(permille)
    }

    fn mutated(&self, mutation: Mutation) -> bool {
        self.setting.mutation == Some(mutation)
    }

    fn at(&mut self, at: u64, event: Event) {
        self.queue.push(at.max(self.now), event);
    }

    fn after_us(&mut self, us: u64, event: Event) {
        self.at(self.now + us * 1_000, event);
    }

    fn boot(&self, host: usize) -> BootTime {
        self.hosts[host].clock.read(self.now)
    }

    fn wall_ms(&self, host: usize) -> u64 {
        (WALL_ZERO_MS + self.now / MS).saturating_add_signed(self.hosts[host].wall_skew_ms)
    }

    fn log(&mut self, text: impl FnOnce() -> String) {
        if self.setting.trace {
            let at = self.now;
            self.timeline.push((at, text()));
        }
    }

    /// True time, in milliseconds.
    pub fn now_ms(&self) -> u64 {
        self.now / MS
    }

    /// What was broken, if anything.
    pub fn violation(&self) -> Option<&Violation> {
        self.violation.as_ref()
    }

    /// What happened, with its moment in nanoseconds.
    pub fn into_timeline(self) -> Vec<(u64, String)> {
        self.timeline
    }

    /// How many entries were committed and how many of them were decisions.
    pub fn committed(&self) -> (usize, usize) {
        (self.chain.len(), self.chain.decisions)
    }

    /// What was counted.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Runs until `ms` of true time, or until something is broken.
    pub fn run_until(&mut self, ms: u64) {
        while self.violation.is_none() {
            let Some((at, event)) = self.queue.pop(ms * MS) else {
                self.now = self.now.max(ms * MS);
                return;
            };
            self.now = at;
            self.happen(event);
        }
    }

    fn happen(&mut self, event: Event) {
        let Some(event) = self.unless_stopped(event) else {
            return;
        };
        match event {
            Event::Script(index) => self.play(index),
            Event::Deliver { from, to, message } => self.deliver(from, to, message),
            Event::Start(host, part, power) => self.start_part(host, part, power),
            Event::KeeperBeat(host, life) => self.keeper_beat(host, life),
            Event::KeeperAlarm(host, life) => {
                if self.hosts[host].keeper.is_life(life) {
                    self.keeper_turn(host);
                }
            }
            Event::AgentTick(host, life) => self.agent_tick(host, life),
            Event::Stored { host, who, life } => self.stored(host, who, life),
            Event::Guest(host, serial, timer) => self.guest_timer(host, serial, timer),
            Event::HostingTurn(host, life) => self.hosting_turn(host, life),
            Event::Lands { host, power, transfer } => self.lands(host, power, transfer),
            Event::DiskSays { host, life, asked, word } => self.disk_says(host, life, asked, word),
            Event::Client(index) => self.client_turn(index),
            Event::IoDone { host, lun, life } => self.io_done(host, lun, life),
            Event::PowerCut(host, power) => self.power_cut(host, power),
            Event::PowerBack(host, power) => self.power_back(host, power),
            Event::FenceSaid(fence) => self.fence_said(fence),
            Event::Doom(host) => self.doom(host),
            Event::Rejoin(host) => self.isolate(host, false),
        }
    }

    /// What is meant for a part that stands still waits for it.
    fn unless_stopped(&mut self, event: Event) -> Option<Event> {
        let (host, part) = match &event {
            Event::Deliver { to, message, .. } => (*to, message.part()),
            Event::KeeperBeat(host, _) | Event::KeeperAlarm(host, _) => (*host, Part::Keeper),
            Event::AgentTick(host, _)
            | Event::HostingTurn(host, _)
            | Event::Stored { host, .. }
            | Event::DiskSays { host, .. } => (*host, Part::Agent),
            Event::Guest(host, ..) => (*host, Part::Guests),
            _ => return Some(event),
        };
        let host = &mut self.hosts[host];
        let stopped = match part {
            Part::Keeper => host.keeper_stopped,
            Part::Agent => host.agent_stopped,
            Part::Guests => host.suspended,
        };
        if !stopped {
            return Some(event);
        }
        // A socket's buffer is not endless.
        if host.waiting.len() < 20_000 {
            host.waiting.push((part, event));
        }
        None
    }
}
