//! The witness: a participant of consensus on a shared disk, hosted by one agent at
//! a time. Who that is, `core::witness` decides; this does what it says to the disk,
//! and lets out what the witness has to say only while the lease on the disk lasts.

use holdfast_core::witness::{Block, DiskLease, DiskTiming, Kept, Look, Memory, Seen, Step, Use, Want};
use holdfast_core::*;

use super::consensus::{Seat, Write};
use super::shared_disk::{Frame, SharedDisk, Transfer};
use super::{Event, World};
use crate::clock::MS;
use crate::mutation::Mutation;
use crate::raft::{Entry, Raft, RaftMessage};

/// An agent's part in hosting the witness.
pub struct Hosting {
    lease: DiskLease,
    /// What the disk is doing for it.
    busy: bool,
    /// Counts what it asked the disk for.
    asked: u64,
    /// What it saw last, and the claim that it has written since.
    looked: Look,
    claimed: Option<Block>,
    /// The witness itself, while this agent hosts it.
    pub instance: Option<Instance>,
    /// It is being read from the disk.
    recovering: bool,
    /// How often this agent began an area under its epoch.
    generation: u64,
    /// How often it had been decided who hosts when this agent took over.
    taken: Option<u64>,
    /// The epoch that it gives up, until the lease is gone.
    released: Option<u64>,
}

impl Hosting {
    /// What was seen on the disk before, if that shows less now.
    pub fn misses(&self) -> Option<Memory> {
        self.lease.stale().then(|| self.lease.memory())
    }

    /// The epoch under which the witness runs here, if it does.
    pub fn hosts_since(&self) -> Option<u64> {
        self.instance.as_ref().filter(|instance| instance.ready).map(|instance| instance.epoch)
    }
}

/// The witness as one host runs it.
pub struct Instance {
    pub seat: Seat,
    pub epoch: u64,
    generation: u64,
    area: usize,
    /// Frames that were written or are being written, and those that are durable.
    written: usize,
    durable: usize,
    ready: bool,
}

/// What comes back from the disk.
#[derive(Clone, Debug)]
pub enum DiskWord {
    Looked(Look),
    Wrote,
    /// The new area has begun.
    Began,
    Recovered,
    Failed,
}

impl World {
    /// Which participant the witness is.
    pub(super) fn witness(&self) -> usize {
        self.setting.nodes
    }

    /// The hosts on which a witness runs: more than one is a defect, seen elsewhere.
    pub(super) fn witness_hosts(&self) -> Vec<usize> {
        let runs = |host: &usize| {
            let agent = &self.hosts[*host].agent;
            agent.alive && agent.hosting.as_ref().is_some_and(|hosting| hosting.instance.is_some())
        };
        (0..self.hosts.len()).filter(runs).collect()
    }

    pub(super) fn begin_hosting(&mut self, host: usize) {
        if self.disk.is_none() {
            return;
        }
        let memory =
            if self.mutated(Mutation::StaleWitnessVotes) { Default::default() } else { self.hosts[host].memory };
        let agent = &mut self.hosts[host].agent;
        let timing = DiskTiming::of(agent.state.settings.profile.timing());
        let longest_ms = DiskTiming::of(Profile::Wan.timing()).length_ms;
        let lease = DiskLease::new(NodeId(host as u64 + 1), timing, longest_ms, memory);
        agent.hosting = Some(Hosting {
            lease,
            busy: false,
            asked: 0,
            looked: Look::default(),
            claimed: None,
            instance: None,
            recovering: false,
            generation: 0,
            taken: None,
            released: None,
        });
        let life = agent.life;
        self.after_us(500, Event::HostingTurn(host, life));
    }

    /// What this node has to do with the witness, by the state that it knows: as
    /// `crates/holdfast/src/agent/witness.rs` has it.
    fn want(&mut self, host: usize) -> Want {
        let now = self.boot(host);
        let agent = &mut self.hosts[host].agent;
        let me = NodeId(host as u64 + 1);
        let Some(witness) = agent.state.witness.as_ref().filter(|_| agent.state.nodes.contains_key(&me)) else {
            return Want::Nothing;
        };
        let Some(hosting) = agent.hosting.as_mut() else { return Want::Nothing };
        let epoch = hosting.lease.held(now).then(|| hosting.lease.epoch());
        if hosting.released.is_some() && hosting.released == epoch {
            return Want::Nothing;
        }
        hosting.released = None;
        if witness.host == Some(me) {
            if hosting.instance.is_some() {
                hosting.taken = Some(witness.decided);
            }
            return Want::Host;
        }
        if hosting.instance.is_some() {
            // It was decided anew since this node took over, and that node is there.
            if *hosting.taken.get_or_insert(witness.decided) != witness.decided {
                hosting.released = epoch;
                return Want::Nothing;
            }
        } else {
            hosting.taken = None;
        }
        let voters = agent.seat.raft.members().voting();
        let mut before = (0..host).filter(|other| voters.contains(*other));
        match voters.contains(host) {
            true => Want::StandIn { rank: before.by_ref().count() as u64 },
            false => Want::Nothing,
        }
    }

    pub(super) fn hosting_turn(&mut self, host: usize, life: u64) {
        if !self.hosts[host].agent.alive || self.hosts[host].agent.life != life {
            return;
        }
        self.hosting_step(host);
        let us = self.draw(10_000, 30_000);
        self.after_us(us, Event::HostingTurn(host, life));
    }

    fn hosting_step(&mut self, host: usize) {
        let now = self.boot(host);
        let want = self.want(host);
        let blind = self.mutated(Mutation::ClaimWithoutLooking);
        let forgetful = self.mutated(Mutation::StaleWitnessVotes);
        let agent = &mut self.hosts[host].agent;
        let timing = DiskTiming::of(agent.state.settings.profile.timing());
        let longest_ms = DiskTiming::of(agent.state.settings.longest_lease).length_ms;
        let (agreed, missing) =
            agent.state.witness.as_ref().map_or_else(Default::default, |witness| (witness.epoch, witness.missing));
        let Some(hosting) = &mut agent.hosting else {
            return;
        };
        hosting.lease.want(want);
        hosting.lease.set_timing(timing, longest_ms);
        if !forgetful {
            hosting.lease.agreed(agreed);
            hosting.lease.seen_by_another(missing);
        }
        let memory = hosting.lease.memory();
        self.hosts[host].memory = self.hosts[host].memory.max(memory);
        let Some(hosting) = &mut self.hosts[host].agent.hosting else {
            return;
        };
        if !hosting.busy {
            match hosting.lease.next(now) {
                Step::Wait(_) => {}
                Step::Look if let Some(claim) = hosting.claimed.take_if(|_| blind) => {
                    let mut before = hosting.looked.clone();
                    before.blocks.insert(claim.node, Seen::Block(claim));
                    hosting.lease.looked(now, &before);
                    return self.hosting_step(host);
                }
                Step::Look => self.ask_disk(host, None),
                Step::Write(block) => {
                    hosting.claimed = (block.state == Use::Claim).then_some(block);
                    self.ask_disk(host, Some(Transfer::Block(block)));
                }
            }
        }
        self.host_or_not(host);
    }

    /// Runs the witness exactly while the lease on the disk is held.
    fn host_or_not(&mut self, host: usize) {
        let now = self.boot(host);
        let loose = self.mutated(Mutation::AnswerWithoutLease);
        let Some(hosting) = &mut self.hosts[host].agent.hosting else {
            return;
        };
        if hosting.lease.held(now) {
            if hosting.instance.is_none() && !hosting.recovering {
                hosting.recovering = true;
                self.recover(host);
            }
        } else if !loose && hosting.instance.take().is_some() {
            self.log(|| format!("  n{} no longer hosts the witness", host + 1));
        }
    }

    /// One access to the disk for the lease: a look, or a write.
    fn ask_disk(&mut self, host: usize, transfer: Option<Transfer>) {
        let Some(hosting) = &mut self.hosts[host].agent.hosting else {
            return;
        };
        hosting.busy = true;
        hosting.asked += 1;
        let asked = hosting.asked;
        let (lands, done) = self.disk_times();
        let life = self.hosts[host].agent.life;
        let Some(disk) = self.disk.as_ref().filter(|disk| disk.reached_by(host)) else {
            let at = self.now + self.draw(50, 400) * MS;
            return self.at(at, Event::DiskSays { host, life, asked, word: DiskWord::Failed });
        };
        match transfer {
            // What is read is what was there at some moment in between.
            None => {
                let word = DiskWord::Looked(disk.look());
                self.at(lands, Event::DiskSays { host, life, asked, word });
            }
            Some(transfer) => {
                self.land_at(host, lands, transfer);
                self.at(done, Event::DiskSays { host, life, asked, word: DiskWord::Wrote });
            }
        }
    }

    /// When an access reaches the disk, and when its end is known.
    fn disk_times(&mut self) -> (u64, u64) {
        let slow_ms = self.disk.as_ref().map_or(0, |disk| disk.slow_ms);
        let hangs = if self.chance(4) { self.draw(300, 7_000) * MS } else { 0 };
        let lands = self.now + self.draw(100, 3_000) * 1_000 + slow_ms * MS + hangs;
        let done = lands + self.draw(20, 400) * 1_000;
        (lands, done)
    }

    /// What was sent to the disk reaches it, whatever becomes of the host; if that
    /// loses its power now and then only in part.
    fn land_at(&mut self, host: usize, at: u64, transfer: Transfer) {
        let power = self.hosts[host].power;
        self.at(at, Event::Lands { host, power, transfer });
    }

    pub(super) fn lands(&mut self, host: usize, power: u64, transfer: Transfer) {
        let lost_power = !self.hosts[host].powered || self.hosts[host].power != power;
        let (gone, cut_short) = (lost_power && self.chance(300), lost_power && self.chance(300));
        if let Some(disk) = self.disk.as_mut().filter(|_| !gone) {
            disk.land(transfer, cut_short);
        }
    }

    pub(super) fn disk_says(&mut self, host: usize, life: u64, asked: u64, word: DiskWord) {
        let now = self.boot(host);
        if !self.hosts[host].agent.alive || self.hosts[host].agent.life != life {
            return;
        }
        let Some(hosting) = &mut self.hosts[host].agent.hosting else {
            return;
        };
        match word {
            DiskWord::Looked(_) | DiskWord::Wrote | DiskWord::Failed if asked != hosting.asked => return,
            DiskWord::Looked(look) => {
                hosting.lease.looked(now, &look);
                hosting.looked = look;
            }
            DiskWord::Wrote => hosting.lease.wrote(now),
            DiskWord::Failed => hosting.lease.failed(now),
            DiskWord::Recovered => return self.recovered(host),
            DiskWord::Began => return self.began(host),
        }
        hosting.busy = false;
        self.hosting_step(host);
    }

    fn recover(&mut self, host: usize) {
        let (_, done) = self.disk_times();
        let life = self.hosts[host].agent.life;
        self.at(done, Event::DiskSays { host, life, asked: 0, word: DiskWord::Recovered });
    }

    /// The disk was read: the witness goes on from there, in another area.
    fn recovered(&mut self, host: usize) {
        let now = self.boot(host);
        let careless = self.mutated(Mutation::StaleWitnessVotes);
        let (witness, members, timing, defects) = (self.witness(), self.founders, self.election(), self.defects());
        let participants = self.participants();
        let reached = self.disk.as_ref().filter(|disk| disk.reached_by(host));
        let newest = reached.and_then(|disk| if careless { disk.newest_unchecked() } else { disk.newest() });
        self.serial += 1;
        let serial = self.serial;
        let Some(hosting) = &mut self.hosts[host].agent.hosting else {
            return;
        };
        hosting.recovering = false;
        let Some((newest, area)) = newest.filter(|_| hosting.lease.held(now)) else {
            return;
        };
        let epoch = hosting.lease.epoch();
        let mut raft = Raft::new(witness, participants, members, timing, defects);
        for frame in &area.frames {
            match frame {
                Frame::Vote(vote) => raft.vote_saved(*vote),
                Frame::Entries(after, entries) => raft.read_back(*after, entries),
            }
        }
        raft.last_resort_ms = 2 * timing.hold_ms;
        raft.restart(now);
        let target = SharedDisk::next_area(newest, epoch);
        let written = area.frames.len();
        let seat = Seat::new(raft, serial);
        hosting.generation += 1;
        let generation = hosting.generation;
        hosting.instance = Some(Instance { seat, epoch, generation, area: target, written, durable: 0, ready: false });
        self.witness_read = serial;
        let (lands, done) = self.disk_times();
        let life = self.hosts[host].agent.life;
        self.land_at(host, lands, Transfer::Begin { area: target, head: (epoch, generation), frames: area.frames });
        self.at(done, Event::DiskSays { host, life, asked: serial, word: DiskWord::Began });
    }

    fn began(&mut self, host: usize) {
        let now = self.boot(host);
        let Some(hosting) = &mut self.hosts[host].agent.hosting else {
            return;
        };
        let held = hosting.lease.held(now);
        let Some(instance) = hosting.instance.as_mut().filter(|instance| held && !instance.ready) else {
            return;
        };
        instance.ready = true;
        instance.durable = instance.written;
        hosting.lease.keep(Kept {
            epoch: instance.epoch,
            generation: instance.generation,
            length: instance.durable as u64,
        });
        let epoch = instance.epoch;
        self.log(|| format!("  n{} hosts the witness (epoch {epoch})", host + 1));
    }

    /// Whether the witness may speak on this host now.
    pub(super) fn may_speak(&self, host: usize) -> bool {
        let now = self.boot(host);
        let Some(hosting) = &self.hosts[host].agent.hosting else {
            return false;
        };
        let ready = hosting.instance.as_ref().is_some_and(|instance| instance.ready);
        ready && (hosting.lease.held(now) || self.mutated(Mutation::AnswerWithoutLease))
    }

    /// A write of the witness goes to its area.
    pub(super) fn write_witness(&mut self, host: usize, write: Write) {
        let (lands, mut done) = self.disk_times();
        let who = self.witness();
        let Some(instance) = self.hosts[host].agent.hosting.as_mut().and_then(|h| h.instance.as_mut()) else {
            return;
        };
        let frame = match &write {
            Write::Vote(vote) => Some(Frame::Vote(*vote)),
            Write::Log { after, length } => {
                Some(Frame::Entries(*after, instance.seat.raft.log[*after..*length].to_vec()))
            }
            Write::Append(_, RaftMessage::Append { prev, entries, .. }) => {
                Some(Frame::Entries(prev.1, entries.clone()))
            }
            Write::Append(..) | Write::Say(_) => None,
        };
        let life = instance.seat.life;
        if frame.is_none() {
            done = self.now;
        }
        // One after the other.
        let begins = instance.seat.disk_until.saturating_sub(self.now);
        let done = done + begins;
        instance.seat.disk_until = done;
        instance.seat.writes.push_back(write);
        let (area, head, at) = (instance.area, (instance.epoch, instance.generation), instance.written);
        instance.written += usize::from(frame.is_some());
        if let Some(frame) = frame {
            if self.disk.as_ref().is_some_and(|disk| disk.reached_by(host)) {
                self.land_at(host, lands + begins, Transfer::Frame { area, head, at, frame });
            } else {
                // Nothing of this life can be relied on any more: it is read again.
                if let Some(hosting) = &mut self.hosts[host].agent.hosting {
                    hosting.instance = None;
                }
                return;
            }
        }
        self.at(done, Event::Stored { host, who, life });
    }

    /// A write of the witness is done: the next renewal says so.
    pub(super) fn witness_wrote(&mut self, host: usize) {
        if let Some(hosting) = &mut self.hosts[host].agent.hosting
            && let Some(instance) = &mut hosting.instance
        {
            instance.durable += 1;
            hosting.lease.keep(Kept {
                epoch: instance.epoch,
                generation: instance.generation,
                length: instance.durable as u64,
            });
        }
    }

    /// The witness leads only to hand over, to a node that has everything.
    pub(super) fn tick_witness(&mut self, host: usize, jitter_ms: u64) {
        let (now, who, hold_ms) = (self.boot(host), self.witness(), self.election().hold_ms);
        if !self.may_speak(host) {
            return;
        }
        let Some(instance) = self.hosts[host].agent.hosting.as_mut().and_then(|h| h.instance.as_mut()) else {
            return;
        };
        let raft = &mut instance.seat.raft;
        let mut out = raft.tick(now, jitter_ms);
        if raft.leads_since().is_some_and(|blank| raft.commit >= blank) {
            let fit = |to: &usize| raft.lacks(*to) == 0 && raft.acked(*to).is_some_and(|at| now <= at.plus_ms(hold_ms));
            let heir = raft.members().voting().iter().find(|to| *to != who && fit(to));
            out.extend(heir.and_then(|heir| raft.hand_over(heir, now)).unwrap_or_default());
        }
        self.after_raft(host, who, out);
    }

    /// What the witness begins with on its disk.
    pub(super) fn found_witness(log: Vec<Entry>) -> SharedDisk {
        SharedDisk::new(vec![Frame::Vote((1, None)), Frame::Entries(0, log)])
    }
}
