//! A host and what runs on it.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use holdfast_core::lease::{BootTime, NodeLease};
use holdfast_core::witness::Memory;
use holdfast_core::*;

use super::consensus::Seat;
use super::coordinator::Coordinatorship;
use super::volumes::{LUNS, Serving};
use super::witness::Hosting;
use super::{Event, Part, World};
use crate::clock::Clock;
use crate::raft::{Entry, Members, Raft};

/// A host.
pub struct Host {
    /// Its node.
    pub id: NodeId,
    /// It has power.
    pub powered: bool,
    /// Counts its boots.
    pub power: u64,
    /// CLOCK_BOOTTIME.
    pub clock: Clock,
    /// How wrong its wall clock is.
    pub wall_skew_ms: i64,
    /// Between two turns of its agent at most, in microseconds.
    pub pace_us: u64,
    /// What it has seen on the witness's disk; durable.
    pub memory: Memory,
    /// How long a write takes; zero: as usual.
    pub disk_ms: u64,
    /// Which LUNs it does not reach: a bit for each.
    pub paths_cut: u8,
    /// Its volume server.
    pub serving: [Serving; LUNS],
    /// Stands still as a whole.
    pub suspended: bool,
    /// The keeper stands still.
    pub keeper_stopped: bool,
    /// The agent stands still.
    pub agent_stopped: bool,
    /// What waits for a part that stands still.
    pub waiting: Vec<(Part, Event)>,
    /// The keeper.
    pub keeper: Keeper,
    /// The agent.
    pub agent: Agent,
}

/// A keeper: `crates/holdfast/src/keeper`.
pub struct Keeper {
    pub alive: bool,
    pub life: u64,
    pub lease: NodeLease,
    /// Under which term VMs may run now.
    pub open: Option<NodeTerm>,
    pub sequence: u64,
    pub period_ms: u64,
    /// For when its alarm is set, in true nanoseconds.
    pub alarm: u64,
    /// The challenges to echo, by coordinator.
    pub echoes: Vec<u64>,
    /// The newest heartbeat to which each agent's answer arrived.
    pub acknowledged: Vec<u64>,
    pub last_epoch: BTreeMap<VmId, Epoch>,
    pub processes: BTreeMap<(VmId, Epoch), Qemu>,
}

impl Keeper {
    pub fn is_life(&self, life: u64) -> bool {
        self.alive && self.life == life
    }
}

/// A QEMU.
#[derive(Clone, Debug)]
pub struct Qemu {
    pub serial: u64,
    pub stage: Stage,
    /// It was sent SIGKILL or is dying of something else.
    pub dying: Option<&'static str>,
    /// Which state of the disks its guest's memory belongs to.
    pub ram: u64,
    /// The guest was asked to shut down.
    pub asked: bool,
    /// Its last migration away.
    pub leaving: Option<Leaving>,
    /// How often that went on: timers of an earlier one are void.
    pub round: u64,
}

/// How a QEMU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Booting,
    Running,
    Paused,
    /// The guest shut itself down.
    GuestOff,
    /// A migration's target without the guest.
    Waiting,
    /// A migration's target with all of the guest.
    Loaded,
    /// A migration's source after the switch.
    Sent,
    Dead(&'static str),
}

/// A migration away.
#[derive(Clone, Copy, Debug)]
pub struct Leaving {
    pub to: Epoch,
    pub target: usize,
    pub percent: u8,
    pub state: LeavingState,
}

/// How far a migration away is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeavingState {
    /// RAM moves, the guest runs.
    Active,
    /// The guest stands still, everything is sent, the target has not said so yet.
    Switching,
    /// Given up; the guest is here.
    Failed(&'static str),
    /// The target has it all.
    Completed,
}

impl Qemu {
    pub fn is_dead(&self) -> bool {
        matches!(self.stage, Stage::Dead(_))
    }

    /// Whether its guest runs, or could go on at any moment without anybody's
    /// word: what may be so for one QEMU of a VM only. A sent one never goes on,
    /// a target not before it is continued.
    pub fn owns(&self) -> bool {
        matches!(self.stage, Stage::Booting | Stage::Running | Stage::Paused | Stage::GuestOff)
    }

    pub fn moving(&self) -> bool {
        self.leaving.is_some_and(|l| matches!(l.state, LeavingState::Active | LeavingState::Switching))
    }
}

/// An agent: consensus, decisions, reconciling.
pub struct Agent {
    pub alive: bool,
    pub life: u64,
    /// Its part in consensus.
    pub seat: Seat,
    /// Its part in hosting the witness.
    pub hosting: Option<Hosting>,
    /// How far the log is applied.
    pub applied: usize,
    pub state: Rc<ClusterState>,
    /// It knows all that was agreed on before it started.
    pub caught_up: bool,
    pub length_at_start: usize,
    /// Which heartbeats are fresh, by node.
    pub fresh: Vec<Freshness>,
    pub coordinatorship: Option<Coordinatorship>,
    /// Who waits for what became of a proposal.
    pub asked: BTreeMap<RequestId, BTreeSet<usize>>,
    /// Clients of this agent.
    pub callers: BTreeMap<RequestId, usize>,
    pub work: BTreeMap<JobId, u64>,
    pub said: Option<NodeReport>,
    pub said_at: u64,
    /// Words between agents are repeated, not rained.
    pub word_at: BTreeMap<VmId, u64>,
    pub targets_over: BTreeSet<(VmId, Epoch)>,
    /// Last applied index that was written to a snapshot.
    pub snapshot: usize,
}

/// Which heartbeats count: `crates/holdfast/src/heartbeat.rs`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Freshness {
    pub life: Option<Incarnation>,
    pub challenge: u64,
    pub newest: u64,
}

impl Host {
    pub fn new(index: usize, world: &World, members: Members, log: Vec<Entry>) -> Self {
        let (nodes, timing) = (world.setting.nodes, world.election());
        let mut raft = Raft::new(index, world.participants(), members, timing, world.defects());
        let applied = log.len();
        raft.found(1, log);
        Host {
            id: NodeId(index as u64 + 1),
            powered: false,
            power: 0,
            clock: Clock::new(0, 0, 0),
            wall_skew_ms: 0,
            pace_us: 20_000,
            memory: Memory::default(),
            disk_ms: 0,
            paths_cut: 0,
            serving: Default::default(),
            suspended: false,
            keeper_stopped: false,
            agent_stopped: false,
            waiting: Vec::new(),
            keeper: Keeper {
                alive: false,
                life: 0,
                lease: NodeLease::new(Incarnation(0)),
                open: None,
                sequence: 0,
                period_ms: world.setting.profile.timing().heartbeat_ms,
                alarm: 0,
                echoes: vec![0; nodes],
                acknowledged: vec![0; nodes],
                last_epoch: BTreeMap::new(),
                processes: BTreeMap::new(),
            },
            agent: Agent {
                alive: false,
                life: 0,
                seat: Seat::new(raft, 0),
                hosting: None,
                applied,
                state: world.chain.state(applied),
                caught_up: false,
                length_at_start: 0,
                fresh: vec![Freshness::default(); nodes],
                coordinatorship: None,
                asked: BTreeMap::new(),
                callers: BTreeMap::new(),
                work: BTreeMap::new(),
                said: None,
                said_at: 0,
                word_at: BTreeMap::new(),
                targets_over: BTreeSet::new(),
                snapshot: applied,
            },
        }
    }
}

impl World {
    pub(super) fn power_on(&mut self, host: usize) {
        if self.hosts[host].powered {
            return;
        }
        let drift = if self.setting.calm { 0 } else { self.rng.between(0, 80_000) as i64 - 40_000 };
        let shown = self.rng.between(1, 1 << 40);
        let pace_us = if self.setting.calm { 20_000 } else { *self.rng.pick(&[20_000, 40_000, 60_000]) };
        let skew = if self.setting.calm { 0 } else { self.rng.between(0, 4_000) as i64 - 2_000 };
        let now = self.now;
        let host_state = &mut self.hosts[host];
        host_state.powered = true;
        host_state.power += 1;
        host_state.clock = Clock::new(now, shown, drift);
        host_state.wall_skew_ms = skew;
        host_state.pace_us = pace_us;
        let power = host_state.power;
        for part in [Part::Keeper, Part::Agent] {
            let us = self.draw(5_000, 300_000);
            self.after_us(us, Event::Start(host, part, power));
        }
    }

    pub(super) fn power_off(&mut self, host: usize) {
        self.lose_writes(host);
        self.end_serving(host);
        let host = &mut self.hosts[host];
        host.powered = false;
        (host.suspended, host.keeper_stopped, host.agent_stopped) = (false, false, false);
        host.waiting.clear();
        host.keeper.alive = false;
        host.keeper.open = None;
        host.keeper.processes.clear();
        host.agent.alive = false;
        host.agent.hosting = None;
        host.agent.coordinatorship = None;
    }

    pub(super) fn start_part(&mut self, host: usize, part: Part, power: u64) {
        let known = &self.hosts[host];
        if !known.powered || known.power != power {
            return;
        }
        match part {
            Part::Keeper if !known.keeper.alive => self.start_keeper(host),
            Part::Agent if !known.agent.alive => self.start_agent(host),
            _ => {}
        }
    }

    fn start_agent(&mut self, index: usize) {
        let now = self.boot(index);
        let replays = if self.setting.calm { 0 } else { self.rng.between(0, 12) as usize };
        let nodes = self.setting.nodes;
        let challenges: Vec<_> = (0..nodes).map(|_| self.rng.next()).collect();
        let agent = &mut self.hosts[index].agent;
        agent.alive = true;
        agent.life += 1;
        agent.seat.life = agent.life;
        agent.seat.raft.restart(now);
        // The applied state comes from a snapshot, which may be a while old.
        let known = agent.applied.min(agent.seat.raft.flushed());
        agent.applied = known.saturating_sub(replays).max(agent.snapshot.min(known));
        agent.state = self.chain.state(agent.applied);
        agent.length_at_start = agent.seat.raft.log.len();
        agent.caught_up = false;
        agent.fresh =
            challenges.iter().map(|challenge| Freshness { challenge: *challenge, ..Freshness::default() }).collect();
        agent.coordinatorship = None;
        agent.asked.clear();
        agent.callers.clear();
        agent.work.clear();
        agent.said = None;
        agent.word_at.clear();
        agent.targets_over.clear();
        let life = agent.life;
        self.log(|| format!("  n{} agent starts", index + 1));
        let us = self.draw(100, 60_000);
        self.after_us(us, Event::AgentTick(index, life));
        self.begin_hosting(index);
    }

    pub(super) fn stop_agent(&mut self, host: usize) {
        self.lose_writes(host);
        let agent = &mut self.hosts[host].agent;
        agent.alive = false;
        agent.hosting = None;
        agent.coordinatorship = None;
    }

    /// Whether the agent can talk to its keeper now.
    pub(super) fn keeper_answers(&self, host: usize) -> bool {
        self.hosts[host].keeper.alive && !self.hosts[host].keeper_stopped
    }

    pub(super) fn node_of(&self, host: usize) -> NodeId {
        self.hosts[host].id
    }

    pub(super) fn lease_held(&self, host: usize, now: BootTime) -> bool {
        let keeper = &self.hosts[host].keeper;
        keeper.alive && keeper.lease.held(now)
    }
}

/// The host of a node.
pub fn host_of(node: NodeId) -> usize {
    (node.0 - 1) as usize
}
