//! A small honest Raft: what `openraft` does for Holdfast, without its machinery.
//!
//! Terms, votes, pre-votes, a log, members that change by joint consensus, and
//! what is Holdfast's own: a voter that accepted a leader's message elects nobody
//! else for `hold`, one that comes back holds still first, and the leader knows
//! since when a majority has acknowledged it. Messages come in and go out as data.
//! What has to be durable before a message may leave is for the caller to see to:
//! [`Raft::unsaved_vote`], [`Raft::unflushed`] and [`Raft::receive`] say what.

mod members;
mod message;

use std::rc::Rc;

use holdfast_core::lease::BootTime;

pub use members::{Group, Members};
pub use message::{Entry, RaftMessage, What};

/// How long things take, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct ElectionTiming {
    /// The leader relies on an acknowledgement for so long.
    pub window_ms: u64,
    /// A voter holds still for so long.
    pub hold_ms: u64,
    /// Between two heartbeats.
    pub heartbeat_ms: u64,
}

/// What is broken on purpose.
#[derive(Clone, Copy, Debug, Default)]
pub struct Defects {
    /// Votes without holding still.
    pub votes_at_once: bool,
    /// A voter that comes back does not hold still.
    pub forgets_hold: bool,
}

/// Entries that one message carries.
const BATCH: usize = 16;

#[derive(Clone, Debug)]
enum Role {
    Follower,
    Asking { pre: bool, votes: Group },
    Leader(Leading),
}

#[derive(Clone, Debug)]
struct Leading {
    next: Vec<usize>,
    matched: Vec<usize>,
    acked: Vec<Option<BootTime>>,
    next_beat: BootTime,
    /// Index of the blank entry.
    blank: usize,
}

/// A participant.
#[derive(Clone, Debug)]
pub struct Raft {
    me: usize,
    all: usize,
    timing: ElectionTiming,
    defects: Defects,
    /// The current term.
    pub term: u64,
    voted_for: Option<usize>,
    /// What of term and vote is, or is being, saved.
    saving: (u64, Option<usize>),
    saved: (u64, Option<usize>),
    /// The log.
    pub log: Vec<Entry>,
    /// How much of it is durable, and how much is on its way to the disk.
    flushed: usize,
    flushing: usize,
    /// Every entry about members, by its index; the first is older than the log.
    members: Vec<(usize, Rc<Members>)>,
    /// How far it is known to be committed.
    pub commit: usize,
    role: Role,
    /// Who leads, as far as is known.
    pub leader: Option<usize>,
    heard: Option<BootTime>,
    held_until: BootTime,
    campaign: BootTime,
    /// Waits so much longer than others before it campaigns, in milliseconds.
    pub last_resort_ms: u64,
    /// The last term whose leadership it has begun to hand over.
    handed_over: u64,
}

/// Messages and their receivers.
pub type Out = Vec<(usize, RaftMessage)>;

impl Raft {
    /// A participant of `all` with an empty log.
    pub fn new(me: usize, all: usize, members: Members, timing: ElectionTiming, defects: Defects) -> Self {
        Raft {
            me,
            all,
            timing,
            defects,
            term: 0,
            voted_for: None,
            saving: (0, None),
            saved: (0, None),
            log: Vec::new(),
            flushed: 0,
            flushing: 0,
            members: vec![(0, Rc::new(members))],
            commit: 0,
            role: Role::Follower,
            leader: None,
            heard: None,
            held_until: BootTime(0),
            campaign: BootTime(0),
            last_resort_ms: 0,
            handed_over: 0,
        }
    }

    /// The durable state that it begins with.
    pub fn found(&mut self, term: u64, log: Vec<Entry>) {
        self.term = term;
        (self.saving, self.saved) = ((term, None), (term, None));
        log.into_iter().for_each(|entry| self.push(entry));
        (self.flushed, self.flushing) = (self.log.len(), self.log.len());
    }

    /// Comes back with what was durable: a leader may rely on its earlier life's
    /// acknowledgement, so it holds still first, unless nobody else votes.
    pub fn restart(&mut self, now: BootTime) {
        (self.term, self.voted_for) = self.saved;
        self.saving = self.saved;
        self.truncate(self.flushed);
        self.flushing = self.flushed;
        self.commit = 0;
        self.role = Role::Follower;
        self.leader = None;
        self.heard = None;
        // Who voted for another may have helped to elect one by a newer list of
        // members, which is not in this log yet.
        let elected_none = self.voted_for.is_none_or(|to| to == self.me);
        let sole = elected_none && self.members().sole() == Some(self.me);
        let at_once = sole || self.defects.votes_at_once || self.defects.forgets_hold;
        self.held_until = if at_once { now } else { now.plus_ms(self.timing.hold_ms) };
        let turn_ms = if sole { 0 } else { self.timing.heartbeat_ms * (1 + self.me as u64 % 7) };
        self.campaign = self.held_until.plus_ms(turn_ms + self.last_resort_ms);
    }

    /// Who takes part: by the last entry that says so, committed or not.
    pub fn members(&self) -> &Members {
        let last = self.members.last().or(self.members.first());
        last.map(|(_, members)| &**members).unwrap_or_else(|| unreachable!("the first is never cut off"))
    }

    /// Whether it is not yet certain who takes part.
    pub fn is_changing(&self) -> bool {
        self.members.last().is_some_and(|(index, _)| *index > self.commit)
    }

    fn push(&mut self, entry: Entry) {
        if let What::Members(members) = &entry.what {
            self.members.push((self.log.len() + 1, members.clone()));
        }
        self.log.push(entry);
    }

    fn truncate(&mut self, length: usize) {
        self.log.truncate(length);
        self.members.retain(|(index, _)| *index <= length);
        self.flushed = self.flushed.min(length);
        self.flushing = self.flushing.min(length);
    }

    /// The leader's index of the first entry of its term; nobody's after it began
    /// to hand over.
    pub fn leads_since(&self) -> Option<usize> {
        match &self.role {
            Role::Leader(leading) if self.handed_over < self.term => Some(leading.blank),
            _ => None,
        }
    }

    /// The leader's: since when a majority has acknowledged it.
    pub fn quorum_acked(&self, now: BootTime) -> Option<BootTime> {
        let Role::Leader(leading) = &self.role else {
            return None;
        };
        if self.handed_over >= self.term {
            return None;
        }
        let acked = |who| if who == self.me { Some(now) } else { leading.acked[who] };
        self.members().reached(acked).flatten()
    }

    /// The leader's: when it sent what a participant last acknowledged.
    pub fn acked(&self, who: usize) -> Option<BootTime> {
        match &self.role {
            Role::Leader(leading) => leading.acked[who],
            _ => None,
        }
    }

    /// The leader's: how many entries of its log a participant does not have.
    pub fn lacks(&self, who: usize) -> usize {
        match &self.role {
            Role::Leader(leading) => self.log.len() - leading.matched[who].min(self.log.len()),
            _ => usize::MAX,
        }
    }

    fn last(&self) -> (u64, usize) {
        (self.term_at(self.log.len()), self.log.len())
    }

    /// The term of an entry, zero before the first.
    pub fn term_at(&self, index: usize) -> u64 {
        index.checked_sub(1).and_then(|at| self.log.get(at)).map_or(0, |entry| entry.term)
    }

    fn holds_still(&self, now: BootTime) -> bool {
        if self.defects.votes_at_once {
            return false;
        }
        let hold = self.timing.hold_ms;
        now < self.held_until
            || self.heard.is_some_and(|at| now <= at.plus_ms(hold))
            || self.quorum_acked(now).is_some_and(|at| now <= at.plus_ms(hold))
    }

    /// What is due.
    pub fn tick(&mut self, now: BootTime, jitter_ms: u64) -> Out {
        if let Role::Leader(leading) = &mut self.role {
            if now < leading.next_beat {
                return Vec::new();
            }
            leading.next_beat = now.plus_ms(self.timing.heartbeat_ms);
            let mut out = self.broadcast(now);
            if self.handed_over >= self.term {
                // It beats no more, but whoever is to lead gets what it lacks.
                out.retain(|(to, _)| self.lacks(*to) > 0);
            }
            return out;
        }
        // Without holding still there is nothing to wait for either.
        let patience = if self.defects.votes_at_once { 2 * self.timing.heartbeat_ms } else { self.timing.hold_ms };
        let silent = self.heard.is_none_or(|at| now > at.plus_ms(patience + self.last_resort_ms));
        if !self.members().voting().contains(self.me) || !silent || now < self.campaign || now < self.held_until {
            return Vec::new();
        }
        self.campaign = now.plus_ms(self.timing.heartbeat_ms + 20 + jitter_ms + self.last_resort_ms);
        self.ask(true, now)
    }

    fn ask(&mut self, pre: bool, now: BootTime) -> Out {
        if !pre {
            self.term += 1;
            self.voted_for = Some(self.me);
            self.leader = None;
        }
        let votes = [self.me].into_iter().collect();
        self.role = Role::Asking { pre, votes };
        if self.members().agree(votes) {
            return if pre { self.ask(false, now) } else { self.lead(now) };
        }
        let term = self.term + u64::from(pre);
        let last = self.last();
        let others = self.members().voting().iter().filter(|voter| *voter != self.me);
        others.map(|voter| (voter, RaftMessage::Ask { pre, term, last })).collect()
    }

    fn lead(&mut self, now: BootTime) -> Out {
        self.push(Entry { term: self.term, what: What::Blank });
        self.role = Role::Leader(Leading {
            next: vec![self.log.len(); self.all],
            matched: vec![0; self.all],
            acked: vec![None; self.all],
            next_beat: now.plus_ms(self.timing.heartbeat_ms),
            blank: self.log.len(),
        });
        self.leader = Some(self.me);
        self.broadcast(now)
    }

    fn follow(&mut self, term: u64, leader: Option<usize>) {
        if term > self.term {
            self.term = term;
            self.voted_for = None;
            self.leader = None;
        }
        if leader.is_some() {
            self.leader = leader;
        }
        self.role = Role::Follower;
    }

    /// Takes something into the log, if this one leads.
    pub fn propose(&mut self, what: What, now: BootTime) -> Option<Out> {
        self.leads_since()?;
        self.push(Entry { term: self.term, what });
        Some(self.broadcast(now))
    }

    /// Lets the voters elect `to` at once, which has to vote and to answer.
    pub fn hand_over(&mut self, to: usize, now: BootTime) -> Option<Out> {
        self.leads_since()?;
        let answers = self.acked(to).is_some_and(|at| now <= at.plus_ms(self.timing.hold_ms));
        let voting = self.members().voting();
        if to == self.me || !answers || !voting.contains(to) {
            return None;
        }
        self.handed_over = self.term;
        let message = RaftMessage::HandOver { term: self.term, to, last: self.last() };
        Some(voting.iter().filter(|voter| *voter != self.me).map(|voter| (voter, message.clone())).collect())
    }

    /// Term and vote, if they changed since they were asked for last: they have to
    /// be on the disk before anything else is said.
    pub fn unsaved_vote(&mut self) -> Option<(u64, Option<usize>)> {
        let now = (self.term, self.voted_for);
        (self.saving != now).then(|| {
            self.saving = now;
            now
        })
    }

    /// Term and vote are on the disk.
    pub fn vote_saved(&mut self, vote: (u64, Option<usize>)) {
        self.saved = vote;
    }

    /// The length of the log before and now, if it grew since it was asked for last.
    pub fn unflushed(&mut self) -> Option<(usize, usize)> {
        (self.flushing < self.log.len()).then(|| {
            let before = std::mem::replace(&mut self.flushing, self.log.len());
            (before, self.flushing)
        })
    }

    /// Takes in what an earlier life had made durable.
    pub fn read_back(&mut self, after: usize, entries: &[Entry]) {
        self.take(after, entries.iter().cloned());
    }

    /// Whether entries can be stored as they come.
    pub fn fits(&self, message: &RaftMessage) -> bool {
        matches!(message, RaftMessage::Append { term, prev, .. } if *term == self.term && self.has(*prev))
    }

    fn has(&self, (term, index): (u64, usize)) -> bool {
        index <= self.log.len() && self.term_at(index) == term
    }

    /// Entries that follow after so many; what contradicts them goes.
    fn take(&mut self, after: usize, entries: impl Iterator<Item = Entry>) {
        for (index, entry) in (after + 1..).zip(entries) {
            if self.term_at(index) != entry.term || index > self.log.len() {
                self.truncate(index - 1);
                self.push(entry);
            }
        }
        (self.flushed, self.flushing) = (self.log.len(), self.log.len());
    }

    /// The log is on the disk up to here.
    pub fn log_flushed(&mut self, length: usize, now: BootTime) -> Out {
        let before = (self.commit, self.ready());
        self.flushed = self.flushed.max(length.min(self.log.len()));
        self.advance();
        let more = (self.commit, self.ready()) != before && matches!(self.role, Role::Leader(_));
        if more { self.broadcast(now) } else { Vec::new() }
    }

    /// How much of the log is on the disk.
    pub fn flushed(&self) -> usize {
        self.flushed
    }

    /// Whoever says so before it is true acknowledges what a crash takes away.
    pub fn forget_flush(&mut self, length: usize) {
        self.flushed = length.min(self.log.len());
        self.flushing = self.flushed;
    }

    fn broadcast(&self, now: BootTime) -> Out {
        let others = self.members().all().iter().filter(|to| *to != self.me);
        others.map(|to| (to, self.append(to, now))).collect()
    }

    fn append(&self, to: usize, sent: BootTime) -> RaftMessage {
        let next = match &self.role {
            Role::Leader(leading) => leading.next[to],
            _ => 1,
        };
        let until = self.ready().max(next - 1).min(next - 1 + BATCH);
        RaftMessage::Append {
            term: self.term,
            prev: (self.term_at(next - 1), next - 1),
            entries: self.log[next - 1..until].to_vec(),
            commit: self.commit,
            sent,
        }
    }

    /// So much of the log may be sent: who takes part only once it is on the leader's disk.
    /// Those who vote no more may be all that is needed of the old voters; if they knew what
    /// the leader has lost, they would refuse it and not stand themselves.
    fn ready(&self) -> usize {
        let unflushed = self.log[self.flushed..].iter();
        unflushed.take_while(|entry| !matches!(entry.what, What::Members(_))).count() + self.flushed
    }

    fn advance(&mut self) {
        let Role::Leader(leading) = &self.role else {
            return;
        };
        let matched = |who| if who == self.me { self.flushed } else { leading.matched[who] };
        let agreed = self.members().reached(matched).unwrap_or(0);
        if agreed > self.commit && self.term_at(agreed) == self.term {
            self.commit = agreed;
        }
    }

    /// Takes a message in. The second part has entries: it goes through the disk
    /// and then to [`Raft::stored`].
    pub fn receive(&mut self, from: usize, message: RaftMessage, now: BootTime) -> (Out, Option<RaftMessage>) {
        match message {
            RaftMessage::Ask { pre, term, last } => {
                let fresh = last >= self.last();
                let free = term > self.term || (term == self.term && self.voted_for.is_none_or(|to| to == from));
                let granted = fresh && free && !self.holds_still(now);
                if !pre && !self.holds_still(now) && term > self.term {
                    self.follow(term, None);
                }
                if granted && !pre {
                    self.voted_for = Some(from);
                    self.campaign = now.plus_ms(self.timing.hold_ms);
                }
                let term = if granted { term } else { self.term };
                (vec![(from, RaftMessage::Vote { pre, term, granted })], None)
            }
            RaftMessage::Vote { pre, term, granted } => (self.count(from, pre, term, granted, now), None),
            RaftMessage::Append { term, .. } if term < self.term => {
                let (term, length) = (self.term, self.log.len());
                // Its acknowledgement would carry an older term's stamp.
                let reply = RaftMessage::Appended { term, matched: None, length, sent: BootTime(0) };
                (vec![(from, reply)], None)
            }
            RaftMessage::Append { term, entries, prev, commit, sent } => {
                self.follow(term, Some(from));
                self.heard = Some(now);
                let message = RaftMessage::Append { term, entries, prev, commit, sent };
                match &message {
                    RaftMessage::Append { entries, .. } if entries.is_empty() => (self.stored(from, message), None),
                    _ => (Vec::new(), Some(message)),
                }
            }
            RaftMessage::Appended { term, matched, length, sent } => {
                (self.acknowledged(from, term, matched, length, sent, now), None)
            }
            RaftMessage::HandOver { term, to, last } => {
                if term != self.term || self.leader != Some(from) {
                    return (Vec::new(), None);
                }
                self.heard = None;
                let mine = to == self.me && self.last() >= last && now >= self.held_until;
                (if mine { self.ask(false, now) } else { Vec::new() }, None)
            }
        }
    }

    fn count(&mut self, from: usize, pre: bool, term: u64, granted: bool, now: BootTime) -> Out {
        let wanted = self.term + u64::from(pre);
        let members = *self.members();
        let Role::Asking { pre: asked, votes } = &mut self.role else {
            return Vec::new();
        };
        if !granted {
            if term > self.term && !self.holds_still(now) {
                self.follow(term, None);
            }
            return Vec::new();
        }
        if pre != *asked || term != wanted {
            return Vec::new();
        }
        votes.insert(from);
        if !members.agree(*votes) {
            return Vec::new();
        }
        if pre { self.ask(false, now) } else { self.lead(now) }
    }

    /// Entries are on the disk.
    pub fn stored(&mut self, from: usize, message: RaftMessage) -> Out {
        let RaftMessage::Append { term, prev, entries, commit, sent } = message else {
            return Vec::new();
        };
        if term != self.term {
            return Vec::new();
        }
        let mut matched = None;
        if self.has(prev) {
            let agreed = prev.1 + entries.len();
            if !entries.is_empty() {
                self.take(prev.1, entries.into_iter());
            }
            self.commit = self.commit.max(commit.min(agreed));
            // A leader of before may have entries of its own that are still under way.
            matched = Some(agreed.min(self.flushed));
        }
        let length = self.log.len();
        vec![(from, RaftMessage::Appended { term, matched, length, sent })]
    }

    fn acknowledged(
        &mut self,
        from: usize,
        term: u64,
        matched: Option<usize>,
        length: usize,
        sent: BootTime,
        now: BootTime,
    ) -> Out {
        if term > self.term {
            self.follow(term, None);
            return Vec::new();
        }
        let length_here = self.log.len();
        let Role::Leader(leading) = &mut self.role else {
            return Vec::new();
        };
        if term != self.term {
            return Vec::new();
        }
        leading.acked[from] = leading.acked[from].max(Some(sent));
        match matched {
            None => {
                leading.next[from] = (leading.next[from] - 1).min(length + 1).max(1);
                vec![(from, self.append(from, now))]
            }
            Some(agreed) => {
                let news = agreed > leading.matched[from];
                leading.matched[from] = leading.matched[from].max(agreed);
                leading.next[from] = leading.matched[from] + 1;
                let before = self.commit;
                self.advance();
                if self.commit > before {
                    self.broadcast(now)
                } else if news && agreed < length_here {
                    vec![(from, self.append(from, now))]
                } else {
                    Vec::new()
                }
            }
        }
    }
}
