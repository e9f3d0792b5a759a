//! Power fencing: the coordinator has a silent host switched off, by a fence agent
//! that works, fails, hangs or cannot tell: `crates/holdfast/src/agent/fencing.rs`.

use holdfast_core::fencing::due;
use holdfast_core::lease::BootTime;
use holdfast_core::*;

use super::coordinator::Coordinatorship;
use super::host::host_of;
use super::{Event, World};
use crate::mutation::Mutation;

const AGENT: &str = "fence_sim";

/// What a fence agent does to a host, and what it says of it, in microseconds
/// from its order.
#[derive(Clone, Debug)]
pub struct Fence {
    /// Which host loses its power, in which of its boots.
    pub host: usize,
    pub power: u64,
    /// Whose order it is: a host, a life of its agent, a term of Raft.
    pub by: (usize, u64, u64),
    pub word: FenceWord,
}

/// The commands with which a cluster of such hosts begins.
pub fn configuration(nodes: usize) -> Vec<Command> {
    let fencing = PowerFencing {
        agent: AGENT.into(),
        options: Default::default(),
        secrets: Default::default(),
        test: None,
        asked: None,
    };
    let set = |node| Command::SetFencing { node: NodeId(node), fencing: Some(fencing.clone()) };
    (1..=nodes as u64).map(set).collect()
}

impl World {
    /// Orders what is due, once in each term of a node.
    pub(super) fn fence(
        &mut self,
        host: usize,
        mine: &mut Coordinatorship,
        state: &ClusterState,
        observed: &Observed,
        now: BootTime,
    ) {
        let acked = self.hosts[host].agent.seat.raft.quorum_acked(now);
        if state.fencing.is_empty() || acked.is_none_or(|at| now >= at.plus_ms(self.election().window_ms)) {
            return;
        }
        for due in due(state, observed, self.node_of(host)) {
            if !mine.ordered.insert((due.node, due.term)) {
                continue;
            }
            let target = host_of(due.node);
            self.log(|| format!("! n{} has n{} switched off: {}", host + 1, target + 1, due.why));
            let by = (host, self.hosts[host].agent.life, mine.term);
            let word = |off, status| FenceWord { term: due.term, agent: AGENT.into(), off, status, took_ms: 0 };
            let mut fence = Fence { host: target, power: self.hosts[target].power, by, word: word(Some(0), Some(2)) };
            let (cut_us, said_us) = (self.draw(5_000, 700_000), self.draw(1_000, 200_000));
            match self.rng.between(0, 9) {
                0..=5 => self.after_us(cut_us, Event::PowerCut(target, fence.power)),
                // It works, and its word never comes, or cannot be read.
                6 => {
                    self.after_us(cut_us, Event::PowerCut(target, fence.power));
                    fence.word = word(Some(0), None);
                }
                7 => fence.word = word(Some(1), Some(0)),
                8 => fence.word = word(Some(0), Some(1)),
                _ => fence.word = word(None, None),
            }
            if self.mutated(Mutation::BelieveFailedFence) {
                fence.word = word(Some(0), Some(2));
            }
            self.after_us(cut_us + said_us, Event::FenceSaid(fence));
        }
    }

    /// The power goes, and comes back when somebody has pressed the button.
    pub(super) fn power_cut(&mut self, host: usize, power: u64) {
        if self.hosts[host].powered && self.hosts[host].power == power {
            self.power_off(host);
            let us = self.draw(1_000_000, 6_000_000);
            self.after_us(us, Event::PowerBack(host, power));
        }
    }

    pub(super) fn power_back(&mut self, host: usize, power: u64) {
        if self.hosts[host].power == power {
            self.power_on(host);
        }
    }

    /// The fence agent's word reaches the agent that asked for it, if that is still
    /// the same coordinator.
    pub(super) fn fence_said(&mut self, fence: Fence) {
        let (host, life, term) = fence.by;
        let now = self.boot(host);
        let agent = &mut self.hosts[host].agent;
        if !agent.alive || agent.life != life {
            return;
        }
        if let Some(mine) = agent.coordinatorship.as_mut().filter(|mine| mine.term == term) {
            mine.fences.insert(NodeId(fence.host as u64 + 1), (fence.word, now));
            mine.dirty = true;
        }
    }
}
