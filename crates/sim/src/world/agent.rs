//! Agents: consensus, heartbeats, proposals, and the turn in which everything is
//! compared with what it should be.

use std::rc::Rc;

use holdfast_core::lease::{Answer, Authority, Heartbeat};
use holdfast_core::*;

use super::coordinator::Coordinatorship;
use super::host::host_of;
use super::{Event, Message, Storage, World};
use crate::clock::MS;
use crate::mutation::Mutation;
use crate::raft::{Out, RaftMessage};

/// Between two turns of an agent, in microseconds.
const TURN_US: (u64, u64) = (5_000, 20_000);

impl World {
    pub(super) fn agent_tick(&mut self, host: usize, life: u64) {
        let agent = &self.hosts[host].agent;
        if !agent.alive || agent.life != life {
            return;
        }
        let now = self.boot(host);
        let jitter = if self.setting.calm { 20 * host as u64 } else { self.rng.between(0, 150) };
        let out = self.hosts[host].agent.raft.tick(now, jitter);
        self.after_raft(host, out);
        self.coordinate(host);
        self.reconcile(host);
        let us = self.draw(TURN_US.0, TURN_US.1);
        self.after_us(us, Event::AgentTick(host, life));
    }

    fn after_raft(&mut self, host: usize, out: Out) {
        for (to, message) in out {
            self.send(host, to, Message::Raft(message));
        }
        let raft = &self.hosts[host].agent.raft;
        if raft.wants_blank() && self.hosts[host].agent.coordinatorship.is_none() {
            let term = raft.term;
            let begun = self.hosts[host].agent.asked.contains_key(&blank(term));
            if !begun {
                self.hosts[host].agent.asked.insert(blank(term), Default::default());
                self.log(|| format!("  n{} is elected (term {term})", host + 1));
                self.store(host, Storage::Own(term, None));
            }
        }
        self.apply(host);
    }

    /// Writes go through the disk one after the other.
    fn store(&mut self, host: usize, what: Storage) {
        let ns = self.disk_ns(host);
        let at = self.hosts[host].disk_until.max(self.now) + ns;
        self.hosts[host].disk_until = at;
        let life = self.hosts[host].agent.life;
        self.at(at, Event::Stored(host, life, what));
    }

    pub(super) fn agent_stored(&mut self, host: usize, life: u64, what: Storage) {
        let now = self.boot(host);
        let agent = &mut self.hosts[host].agent;
        if !agent.alive || agent.life != life {
            return;
        }
        let out = match what {
            Storage::Append(from, message) => {
                agent.storing -= 1;
                agent.raft.stored(from, message)
            }
            Storage::Own(term, proposal) => agent.raft.store(term, proposal, now),
        };
        self.after_raft(host, out);
    }

    pub(super) fn agent_raft(&mut self, from: usize, host: usize, message: RaftMessage) {
        let now = self.boot(host);
        let (out, stored) = self.hosts[host].agent.raft.receive(from, message, now);
        // The queue before a disk is short; what finds no room is sent again.
        if let Some(message) = stored.filter(|_| self.hosts[host].agent.storing < 2) {
            self.hosts[host].agent.storing += 1;
            self.store(host, Storage::Append(from, message));
        }
        self.after_raft(host, out);
    }

    /// Applies what is committed.
    fn apply(&mut self, host: usize) {
        let agent = &self.hosts[host].agent;
        let (from, to) = (agent.applied, agent.raft.commit);
        if from < to {
            for index in from + 1..=to {
                let entry = self.hosts[host].agent.raft.log[index - 1].clone();
                self.commit(index, &entry);
                let agent = &mut self.hosts[host].agent;
                agent.applied = index;
                agent.state = self.chain.state(index);
                let Some(proposal) = entry.proposal else {
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
            let known = agent.applied >= agent.length_at_start.min(agent.raft.log.len());
            agent.caught_up =
                known && agent.raft.leader.is_some() && agent.raft.term_at(agent.applied) == agent.raft.term;
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
        let acked = agent.raft.quorum_acked(now);
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
            let term = agent.raft.term;
            if !repeated {
                self.store(host, Storage::Own(term, Some(proposal)));
            }
        } else if from == host
            && let Some(leader) = agent.raft.leader.filter(|leader| *leader != host)
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
        let (id, term) = (proposal.id, self.hosts[host].agent.raft.term);
        self.store(host, Storage::Own(term, Some(proposal)));
        id
    }

    /// A node's whole report, when it changed or got old.
    pub(super) fn report(&mut self, host: usize, report: NodeReport) {
        let agent = &mut self.hosts[host].agent;
        let Some(leader) = agent.raft.leader else {
            return;
        };
        let old = self.now.saturating_sub(agent.said_at) > 250 * MS;
        if !old && agent.said.as_ref() == Some(&report) {
            return;
        }
        agent.said = Some(report.clone());
        agent.said_at = self.now;
        let (node, now) = (self.node_of(host), self.now);
        self.send(host, leader, Message::Report(node, now, Rc::new(report)));
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
        let term = self.hosts[host].agent.raft.term;
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

fn blank(term: u64) -> RequestId {
    RequestId(uuid::Uuid::from_u128(u128::from(term)))
}
