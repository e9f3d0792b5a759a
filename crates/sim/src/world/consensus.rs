//! Where consensus meets disks: a participant says nothing before what it says is
//! durable, and a crash leaves what had reached the disk, which may be more than
//! was said, and may be half of a write.

use std::collections::VecDeque;

use super::{Event, Message, World};
use crate::mutation::Mutation;
use crate::raft::{Out, Raft, RaftMessage, What};

/// Entries of a leader that wait for the disk; what finds no room is sent again.
const STORES: usize = 2;
/// Writes, and what waits behind them to be said, with which a participant hears and
/// asks nothing more until its disk has done some: an engine that stands still for
/// its disk does not even look.
const BACKLOG: usize = 40;

/// A participant of consensus where it runs.
pub struct Seat {
    pub raft: Raft,
    /// What is on its way to the disk, one after the other.
    pub writes: VecDeque<Write>,
    /// Until when the disk is busy with it.
    pub disk_until: u64,
    /// Tells the writes of one life from those of another.
    pub life: u64,
    /// The last term that it was elected in.
    elected: u64,
}

/// A write, or what waits for the writes before it.
#[derive(Clone, Debug)]
pub enum Write {
    Vote((u64, Option<usize>)),
    /// The leader's own entries after so many, up to so many.
    Log {
        after: usize,
        length: usize,
    },
    /// A leader's entries.
    Append(usize, RaftMessage),
    Say(Out),
}

impl Seat {
    pub fn new(raft: Raft, life: u64) -> Self {
        Seat { raft, writes: VecDeque::new(), disk_until: 0, life, elected: 0 }
    }

    fn has(&self, what: impl Fn(&Write) -> bool) -> usize {
        self.writes.iter().filter(|write| what(write)).count()
    }

    /// Whether its disk has so much to do that it does nothing else.
    fn is_overdue(&self) -> bool {
        self.writes.len() >= BACKLOG
    }

    /// A crash: `whole` writes had reached the disk, and `part` entries of the next.
    pub fn crash(&mut self, whole: usize, part: usize) {
        let now = holdfast_core::lease::BootTime(0);
        for (at, write) in std::mem::take(&mut self.writes).into_iter().enumerate() {
            match write {
                _ if at > whole => {}
                Write::Vote(vote) if at < whole => self.raft.vote_saved(vote),
                Write::Log { length, .. } => {
                    let length = if at < whole { length } else { length.min(self.raft.flushed() + part) };
                    self.raft.log_flushed(length, now);
                }
                Write::Append(from, RaftMessage::Append { term, prev, mut entries, commit, sent }) => {
                    if at == whole {
                        entries.truncate(part);
                    }
                    if !entries.is_empty() {
                        self.raft.stored(from, RaftMessage::Append { term, prev, entries, commit, sent });
                    }
                }
                Write::Vote(_) | Write::Append(..) | Write::Say(_) => {}
            }
        }
    }
}

impl World {
    /// The participant `who`, if it runs on this host.
    fn seat(&mut self, host: usize, who: usize) -> Option<&mut Seat> {
        let agent = &mut self.hosts[host].agent;
        if !agent.alive {
            return None;
        }
        match who == host {
            true => Some(&mut agent.seat),
            false => Some(&mut agent.hosting.as_mut()?.instance.as_mut()?.seat),
        }
    }

    /// Every participant on a host does what is due.
    pub(super) fn tick_consensus(&mut self, host: usize) {
        let now = self.boot(host);
        let jitter = if self.setting.calm { 20 * host as u64 } else { self.rng.between(0, 150) };
        let seat = &mut self.hosts[host].agent.seat;
        if !seat.is_overdue() || seat.raft.leads_since().is_some() {
            let out = seat.raft.tick(now, jitter);
            self.after_raft(host, host, out);
        }
        if self.disk.is_some() {
            self.tick_witness(host, jitter);
        }
    }

    /// Has what changed made durable, then says what is to be said.
    pub(super) fn after_raft(&mut self, host: usize, who: usize, out: Out) {
        let Some(seat) = self.seat(host, who) else {
            return;
        };
        let (vote, length) = (seat.raft.unsaved_vote(), seat.raft.unflushed());
        if let Some(vote) = vote {
            self.write(host, who, Write::Vote(vote));
        }
        if let Some((after, length)) = length {
            self.write(host, who, Write::Log { after, length });
        }
        let Some(seat) = self.seat(host, who) else {
            return;
        };
        if out.is_empty() {
        } else if seat.has(|write| matches!(write, Write::Vote(_))) > 0 {
            self.write(host, who, Write::Say(out));
        } else {
            self.say(host, who, out);
        }
        let Some(seat) = self.seat(host, who) else {
            return;
        };
        let term = seat.raft.term;
        if seat.raft.leads_since().is_some() && seat.elected < term {
            seat.elected = term;
            self.tally.elections += 1;
            let name = self.name_of(who);
            self.log(|| format!("  {name} is elected (term {term})"));
        }
        if who == host {
            self.apply(host);
        }
    }

    fn say(&mut self, host: usize, who: usize, out: Out) {
        // What the witness says leaves its host only while the lease lasts.
        if who == self.witness() {
            if !self.may_speak(host) {
                return;
            }
            self.judge_witness(host);
        }
        for (to, message) in out {
            self.judge_vote(who, to, &message);
            if to != self.witness() {
                self.send(host, to, Message::Raft { from: who, to, message });
                continue;
            }
            for at in self.witness_hosts() {
                self.send(host, at, Message::Raft { from: who, to, message: message.clone() });
            }
        }
    }

    /// Writes go through the disk one after the other.
    fn write(&mut self, host: usize, who: usize, write: Write) {
        if who == self.witness() {
            return self.write_witness(host, write);
        }
        let ns = if matches!(write, Write::Say(_)) { 0 } else { self.disk_ns(host) };
        let now = self.now;
        let Some(seat) = self.seat(host, who) else {
            return;
        };
        let life = seat.life;
        let at = seat.disk_until.max(now) + ns;
        seat.disk_until = at;
        seat.writes.push_back(write);
        self.at(at, Event::Stored { host, who, life });
    }

    /// The next write of a participant has reached the disk.
    pub(super) fn stored(&mut self, host: usize, who: usize, life: u64) {
        let now = self.boot(host);
        let Some(seat) = self.seat(host, who).filter(|seat| seat.life == life) else {
            return;
        };
        let Some(write) = seat.writes.pop_front() else {
            return;
        };
        let durable = !matches!(write, Write::Say(_));
        let out = match write {
            Write::Say(out) => return self.say(host, who, out),
            Write::Vote(vote) => {
                seat.raft.vote_saved(vote);
                Vec::new()
            }
            Write::Log { length, .. } => seat.raft.log_flushed(length, now),
            Write::Append(from, message) => seat.raft.stored(from, message),
        };
        if durable && who == self.witness() {
            self.witness_wrote(host);
        }
        self.after_raft(host, who, out);
    }

    pub(super) fn hear_raft(&mut self, host: usize, from: usize, who: usize, message: RaftMessage) {
        let now = self.boot(host);
        let witness = who == self.witness();
        if witness && !self.may_speak(host) {
            return;
        }
        let early = self.mutated(Mutation::AcknowledgeBeforeTheDisk) && !witness;
        let Some(seat) = self.seat(host, who) else {
            return;
        };
        // Whoever sent it waits for an answer, and asks again.
        if seat.is_overdue() {
            return;
        }
        let (mut out, stored) = seat.raft.receive(from, message, now);
        match stored {
            Some(message) if early && seat.has(|write| matches!(write, Write::Log { .. })) < STORES => {
                let durable = seat.raft.flushed();
                out.extend(seat.raft.stored(from, message));
                seat.raft.forget_flush(durable);
            }
            // What does not fit is refused at once, and needs no frame on the disk.
            Some(message) if witness && !seat.raft.fits(&message) => out.extend(seat.raft.stored(from, message)),
            Some(_) if witness && seat.has(|write| matches!(write, Write::Append(..))) > 0 => {}
            Some(message) if seat.has(|write| matches!(write, Write::Append(..))) < STORES => {
                self.after_raft(host, who, Vec::new());
                self.write(host, who, Write::Append(from, message));
            }
            _ => {}
        }
        self.after_raft(host, who, out);
    }

    /// Takes something into the log of an agent that leads.
    pub(super) fn propose(&mut self, host: usize, what: What) -> bool {
        let now = self.boot(host);
        let Some(out) = self.hosts[host].agent.seat.raft.propose(what, now) else {
            return false;
        };
        self.after_raft(host, host, out);
        true
    }

    /// What a crash leaves of the writes under way: in a calm world nothing.
    pub(super) fn lose_writes(&mut self, host: usize) {
        let torn = self.troubled;
        let (whole, part) = (self.rng.next() as usize, self.rng.next() as usize);
        let seat = &mut self.hosts[host].agent.seat;
        let (whole, part) = if torn { (whole % (seat.writes.len() + 1), part % 5) } else { (0, 0) };
        seat.crash(whole, part);
        seat.disk_until = 0;
    }
}
