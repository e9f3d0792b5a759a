//! Agents: heartbeats, proposals, and the turn in which everything is
//! compared with what it should be.

use std::rc::Rc;

use holdfast_core::lease::{Answer, Authority, Heartbeat};
use holdfast_core::*;

use super::coordinator::Coordinatorship;
use super::host::host_of;
use super::{Event, Message, World};
use crate::clock::MS;
use crate::mutation::Mutation;
use crate::raft::What;

impl World {
    pub(super) fn agent_tick(&mut self, host: usize, life: u64) {
        let agent = &self.hosts[host].agent;
        if !agent.alive || agent.life != life {
            return;
        }
        self.tick_consensus(host);
        self.coordinate(host);
        self.serve_volumes(host);
        self.reconcile(host);
        self.judge_queues(host);
        let pace_us = self.hosts[host].pace_us;
        let us = self.draw(pace_us / 4, pace_us);
        self.after_us(us, Event::AgentTick(host, life));
    }

    /// Applies what is committed.
    pub(super) fn apply(&mut self, host: usize) {
        let agent = &self.hosts[host].agent;
        let (from, to) = (agent.applied, agent.seat.raft.commit);
        if from < to {
            for index in from + 1..=to {
                let entry = self.hosts[host].agent.seat.raft.log[index - 1].clone();
                if self.commit(index, &entry) {
                    self.verdict();
                }
                let agent = &mut self.hosts[host].agent;
                agent.applied = index;
                agent.state = self.chain.state(index);
                let Some(proposal) = entry.proposal() else {
                    continue;
                };
                if let Some(waiting) = agent.asked.remove(&proposal.id) {
                    let reply = self.chain.reply(index);
                    for to in waiting {
                        self.send(host, to, Message::Proposed(proposal.id, reply.clone()));
                    }
                }
            }
            if self.chance(60) {
                self.hosts[host].agent.snapshot = to;
            }
        }
        let agent = &mut self.hosts[host].agent;
        if !agent.caught_up {
            let known = agent.applied >= agent.length_at_start.min(agent.seat.raft.log.len());
            agent.caught_up = known
                && agent.seat.raft.leader.is_some()
                && agent.seat.raft.term_at(agent.applied) == agent.seat.raft.term;
        }
    }

    pub(super) fn agent_heartbeat(&mut self, from: usize, host: usize, heartbeat: &Heartbeat, echo: u64) {
        let now = self.boot(host);
        let challenge = self.rng.next();
        let (any_life, any_authority) =
            (self.mutated(Mutation::HearEarlierLives), self.mutated(Mutation::GrantWithoutAuthority));
        let window_ms = self.election().window_ms;
        let agent = &mut self.hosts[host].agent;
        let fresh = &mut agent.fresh[from];
        if fresh.life != Some(heartbeat.incarnation) {
            if echo != fresh.challenge && !any_life {
                let challenge = fresh.challenge;
                return self.send(host, from, Message::Challenge(heartbeat.incarnation, challenge));
            }
            fresh.life = Some(heartbeat.incarnation);
            fresh.challenge = challenge;
            fresh.newest = heartbeat.sequence;
        } else if heartbeat.sequence <= fresh.newest {
            return;
        }
        fresh.newest = heartbeat.sequence;
        let acked = agent.seat.raft.quorum_acked(now);
        let Some(coordinatorship) = &mut agent.coordinatorship else {
            return;
        };
        let timing = agent.state.settings.profile.timing();
        let authority = match acked {
            _ if any_authority => Authority::from_quorum(now, window_ms),
            Some(acked) => Authority::from_quorum(acked, window_ms),
            None => Authority::NONE,
        };
        let slots = &mut coordinatorship.slots;
        let Some(slot) = slots.iter_mut().find(|slot| slot.node == heartbeat.node) else {
            return;
        };
        let (heard, before) = (slot.heard_within(u64::MAX, now), slot.silent_ms(now));
        let answer = slot.answer(heartbeat, timing, authority, now);
        coordinatorship.dirty |= heard != Some(heartbeat.incarnation) || before > 500;
        match answer {
            Answer::Grant(grant) => self.send(host, from, Message::Grant(grant)),
            Answer::Probe => self.send(host, from, Message::Probe(heartbeat.incarnation, heartbeat.sequence)),
            Answer::Silence => {}
        }
    }

    pub(super) fn agent_report(&mut self, host: usize, node: NodeId, sent: u64, report: Rc<NodeReport>) {
        let Some(coordinatorship) = &mut self.hosts[host].agent.coordinatorship else {
            return;
        };
        if coordinatorship.reported.get(&node).is_some_and(|at| *at >= sent) {
            return;
        }
        coordinatorship.reported.insert(node, sent);
        coordinatorship.dirty = true;
        coordinatorship.reports.insert(node, report);
    }

    /// A proposal from a client of this agent, or passed on by another one.
    pub(super) fn agent_propose(&mut self, from: usize, host: usize, proposal: Rc<Proposal>) {
        let agent = &mut self.hosts[host].agent;
        if agent.coordinatorship.is_some() {
            let repeated = agent.asked.contains_key(&proposal.id);
            agent.asked.entry(proposal.id).or_default().insert(from);
            if !repeated {
                self.propose(host, What::Command(proposal));
            }
        } else if from == host
            && let Some(leader) =
                agent.seat.raft.leader.filter(|leader| *leader != host && *leader < self.setting.nodes)
        {
            self.send(host, leader, Message::Propose(proposal));
        }
    }

    /// What became of a client's proposal, as the coordinator says.
    pub(super) fn agent_proposed(&mut self, host: usize, id: RequestId, reply: Reply) {
        if let Some(client) = self.hosts[host].agent.callers.remove(&id) {
            self.answered(client, reply);
        }
    }

    pub(super) fn own_proposal(&mut self, host: usize, command: Command) -> RequestId {
        let at_ms = self.wall_ms(host);
        let proposal = self.proposal("coordinator", at_ms, command);
        let id = proposal.id;
        self.propose(host, What::Command(proposal));
        id
    }

    /// A node's whole report, when it changed or got old; its facts come last.
    pub(super) fn report(&mut self, host: usize, report: NodeReport) {
        let agent = &mut self.hosts[host].agent;
        let Some(leader) = agent.seat.raft.leader.filter(|leader| *leader < self.setting.nodes) else {
            return;
        };
        let old = self.now.saturating_sub(agent.said_at) > 250 * MS;
        if !old && agent.said.as_ref() == Some(&report) {
            return;
        }
        agent.said = Some(report.clone());
        agent.said_at = self.now;
        let (node, now) = (NodeId(host as u64 + 1), self.now);
        let witness = agent.hosting.as_ref().map(|hosting| WitnessReport {
            id: NodeId::witness(1),
            hosts_since: hosting.hosts_since(),
            trouble: hosting.misses().map(|_| "shows less than was seen before".into()),
            missing: hosting.misses(),
        });
        let facts = agent.state.nodes.get(&node).map(|node| node.facts.clone()).unwrap_or_default();
        self.send(host, leader, Message::Report(node, now, Rc::new(NodeReport { facts, witness, ..report })));
    }

    /// The source's word about a migration, to the agent of its target.
    pub(super) fn agent_word(&mut self, from: usize, host: usize, word: super::Word) {
        use super::host::Stage;
        if !self.keeper_answers(host) {
            return;
        }
        let keeper = &self.hosts[host].keeper;
        let known = keeper.processes.get(&(word.vm, word.to)).map(|qemu| (qemu.stage, qemu.dying.is_some()));
        match known {
            Some((Stage::Loaded, false)) if word.sent => self.continue_guest(host, word.vm, word.to),
            Some((Stage::Waiting | Stage::Loaded, _)) => self.kill(host, word.vm, word.to, "the source is over"),
            Some((Stage::Dead(_), _)) => self.send(host, from, Message::TargetOver(word.vm, word.to)),
            Some(_) => {}
            None => {
                // Never started here, or forgotten: never will be.
                self.keeper_retire(host, word.vm, word.to);
                self.send(host, from, Message::TargetOver(word.vm, word.to));
            }
        }
    }

    pub(super) fn begin_coordinating(&mut self, host: usize) {
        let now = self.boot(host);
        // Whoever is heard from here on is alive now.
        for node in 0..self.setting.nodes {
            let challenge = self.rng.next();
            let fresh = &mut self.hosts[host].agent.fresh[node];
            (fresh.life, fresh.challenge, fresh.newest) = (None, challenge, 0);
        }
        let term = self.hosts[host].agent.seat.raft.term;
        let state = self.hosts[host].agent.state.clone();
        let skip = self.mutated(Mutation::SkipWait);
        let coordinatorship = Coordinatorship::begin(term, now, &state, skip);
        self.hosts[host].agent.coordinatorship = Some(coordinatorship);
        self.log(|| format!("n{} is the coordinator", host + 1));
    }

    /// The target host of a tenure.
    pub(super) fn host_with(&self, tenure: &Tenure) -> usize {
        host_of(tenure.node)
    }
}
