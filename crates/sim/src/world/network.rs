//! Messages between hosts: late, lost, doubled, overtaken, one way only.

use super::{Event, Message, World};
use crate::script::Traffic;

/// What gets through.
pub struct Links {
    hosts: usize,
    /// A bit for each kind of traffic that is cut, by sender and receiver.
    cut: Vec<u8>,
    /// Of a thousand messages this many are lost.
    pub lost: u64,
    /// And this many come twice.
    pub doubled: u64,
    /// A tenth is late by up to so many milliseconds.
    pub late_ms: u64,
}

const HEARTBEATS: u8 = 1;
const AGENTS: u8 = 2;
const MIGRATION: u8 = 4;

fn bits(traffic: Traffic) -> u8 {
    match traffic {
        Traffic::All => HEARTBEATS | AGENTS | MIGRATION,
        Traffic::Heartbeats => HEARTBEATS,
        Traffic::Agents => AGENTS,
        Traffic::Migration => MIGRATION,
    }
}

impl Links {
    /// Everything gets through.
    pub fn new(hosts: usize) -> Self {
        Links { hosts, cut: vec![0; hosts * hosts], lost: 0, doubled: 0, late_ms: 0 }
    }

    /// Cuts or joins a link in one direction.
    pub fn set(&mut self, from: usize, to: usize, traffic: Traffic, cut: bool) {
        if let Some(link) = self.cut.get_mut(from * self.hosts + to) {
            if cut {
                *link |= bits(traffic);
            } else {
                *link &= !bits(traffic);
            }
        }
    }

    /// Whether this traffic is cut.
    pub fn is_cut(&self, from: usize, to: usize, traffic: Traffic) -> bool {
        from != to && self.cut[from * self.hosts + to] & bits(traffic) != 0
    }
}

impl Message {
    fn traffic(&self) -> Traffic {
        match self {
            Message::Heartbeat(..) | Message::Grant(_) | Message::Probe(..) | Message::Challenge(..) => {
                Traffic::Heartbeats
            }
            Message::Stream { .. } | Message::StreamTaken { .. } | Message::StreamBroken { .. } => Traffic::Migration,
            _ => Traffic::Agents,
        }
    }
}

impl World {
    pub(super) fn send(&mut self, from: usize, to: usize, message: Message) {
        if from == to {
            return self.after_us(20, Event::Deliver { from, to, message });
        }
        if self.links.is_cut(from, to, message.traffic()) {
            return;
        }
        let streamed = message.traffic() == Traffic::Migration;
        let (lost, doubled) = if streamed { (0, 0) } else { (self.links.lost, self.links.doubled) };
        if self.chance(lost) {
            return;
        }
        if self.chance(doubled) {
            let us = self.delay_us();
            self.after_us(us, Event::Deliver { from, to, message: message.clone() });
        }
        let us = self.delay_us();
        self.after_us(us, Event::Deliver { from, to, message });
    }

    fn delay_us(&mut self) -> u64 {
        let late = self.links.late_ms;
        match late {
            0 => self.draw(100, 1_500),
            _ if self.rng.permille(100) => self.rng.between(100, late * 1_000),
            _ => self.rng.between(100, 5_000),
        }
    }

    pub(super) fn deliver(&mut self, from: usize, to: usize, message: Message) {
        // What is under way when a link is cut does not arrive either.
        if self.links.is_cut(from, to, message.traffic()) || !self.hosts[to].powered {
            return;
        }
        match message {
            Message::Grant(grant) => {
                self.keeper_answered(from, to, grant.incarnation, grant.sequence);
                self.keeper_granted(to, &grant);
            }
            Message::Probe(life, sequence) => self.keeper_answered(from, to, life, sequence),
            Message::Challenge(life, challenge) => self.keeper_challenged(from, to, life, challenge),
            Message::Stream { vm, from: source, to: target, ram } => {
                self.stream_arrived(from, to, vm, source, target, ram);
            }
            Message::StreamTaken { vm, from: source, to: target } => self.stream_taken(to, vm, source, target),
            Message::StreamBroken { vm, to: target } => self.stream_broken(to, vm, target),
            Message::Io { lun, epoch } => self.do_io(to, lun, epoch),
            _ if !self.hosts[to].agent.alive => {}
            Message::Heartbeat(heartbeat, echo) => self.agent_heartbeat(from, to, &heartbeat, echo),
            Message::Raft { from, to: who, message } => self.hear_raft(to, from, who, message),
            Message::Report(node, sent, report) => self.agent_report(to, node, sent, report),
            Message::Propose(proposal) => self.agent_propose(from, to, proposal),
            Message::Proposed(id, reply) => self.agent_proposed(to, id, reply),
            Message::Word(word) => self.agent_word(from, to, word),
            Message::TargetOver(vm, target) => {
                self.hosts[to].agent.targets_over.insert((vm, target));
            }
        }
    }
}
