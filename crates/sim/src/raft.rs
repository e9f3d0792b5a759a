//! A small honest Raft: what `openraft` does for Holdfast, without its machinery.
//!
//! Terms, votes, pre-votes, a log, and two things of Holdfast's own: a voter that
//! accepted a leader's message elects nobody else for `hold`, and the leader knows
//! since when a majority has acknowledged it. Messages come in and go out as data;
//! what is to be stored goes through the world's disk first.

use std::collections::BTreeSet;
use std::rc::Rc;

use holdfast_core::Proposal;
use holdfast_core::lease::BootTime;

/// One entry of the log; without a proposal it is a new leader's blank one.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The leader's term.
    pub term: u64,
    /// What is proposed.
    pub proposal: Option<Rc<Proposal>>,
}

/// What participants say to each other.
#[derive(Clone, Debug)]
pub enum RaftMessage {
    /// Asks for a vote.
    Ask {
        /// Changes nothing yet.
        pre: bool,
        /// The term that it would begin.
        term: u64,
        /// `(term, index)` of the last entry.
        last: (u64, usize),
    },
    /// The answer.
    Vote {
        /// To a question that changes nothing.
        pre: bool,
        /// For this term; the voter's own if it refuses.
        term: u64,
        /// Yes or no.
        granted: bool,
    },
    /// Entries, or none as a heartbeat.
    Append {
        /// The leader's term.
        term: u64,
        /// `(term, index)` of the entry before the first.
        prev: (u64, usize),
        /// The entries.
        entries: Vec<Entry>,
        /// How far the log is committed.
        commit: usize,
        /// When it was sent, on the leader's clock.
        sent: BootTime,
    },
    /// The answer.
    Appended {
        /// The follower's term.
        term: u64,
        /// How far the logs agree; `None`: not at `prev`.
        matched: Option<usize>,
        /// How long the follower's log is.
        length: usize,
        /// As in the message that is answered.
        sent: BootTime,
    },
}

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

/// Entries that one message carries.
const BATCH: usize = 16;

#[derive(Clone, Debug)]
enum Role {
    Follower,
    Asking { pre: bool, votes: BTreeSet<usize> },
    Leader(Leading),
}

#[derive(Clone, Debug)]
struct Leading {
    next: Vec<usize>,
    matched: Vec<usize>,
    acked: Vec<Option<BootTime>>,
    next_beat: BootTime,
    /// Index of the blank entry; zero until it is stored.
    blank: usize,
}

/// A participant; participants below `voters` vote.
#[derive(Clone, Debug)]
pub struct Raft {
    me: usize,
    voters: usize,
    all: usize,
    timing: ElectionTiming,
    /// The current term; durable.
    pub term: u64,
    voted_for: Option<usize>,
    /// The log; durable.
    pub log: Vec<Entry>,
    /// How far it is known to be committed.
    pub commit: usize,
    role: Role,
    /// Who leads, as far as is known.
    pub leader: Option<usize>,
    heard: Option<BootTime>,
    held_until: BootTime,
    campaign: BootTime,
    vote_at_once: bool,
}

/// Messages and their receivers.
pub type Out = Vec<(usize, RaftMessage)>;

impl Raft {
    /// A participant with an empty log.
    pub fn new(me: usize, voters: usize, all: usize, timing: ElectionTiming, vote_at_once: bool) -> Self {
        Raft {
            me,
            voters,
            all,
            timing,
            term: 0,
            voted_for: None,
            log: Vec::new(),
            commit: 0,
            role: Role::Follower,
            leader: None,
            heard: None,
            held_until: BootTime(0),
            campaign: BootTime(0),
            vote_at_once,
        }
    }

    /// Comes back with what was durable: a leader may rely on its earlier life's
    /// acknowledgement, so it holds still first.
    pub fn restart(&mut self, now: BootTime) {
        self.commit = 0;
        self.role = Role::Follower;
        self.leader = None;
        self.heard = None;
        self.held_until = if self.vote_at_once { now } else { now.plus_ms(self.timing.hold_ms) };
        self.campaign = self.held_until.plus_ms(self.timing.heartbeat_ms * (1 + self.me as u64));
    }

    /// The leader's index of the first entry of its term, once it is stored.
    pub fn leads_since(&self) -> Option<usize> {
        match &self.role {
            Role::Leader(leading) if leading.blank > 0 => Some(leading.blank),
            _ => None,
        }
    }

    /// The leader's: since when a majority has acknowledged it.
    pub fn quorum_acked(&self, now: BootTime) -> Option<BootTime> {
        let Role::Leader(leading) = &self.role else {
            return None;
        };
        let mut times: Vec<Option<BootTime>> =
            (0..self.voters).map(|voter| if voter == self.me { Some(now) } else { leading.acked[voter] }).collect();
        times.sort_unstable_by(|a, b| b.cmp(a));
        times.get(self.voters / 2).copied().flatten()
    }

    fn last(&self) -> (u64, usize) {
        (self.term_at(self.log.len()), self.log.len())
    }

    /// The term of an entry, zero before the first.
    pub fn term_at(&self, index: usize) -> u64 {
        index.checked_sub(1).and_then(|at| self.log.get(at)).map_or(0, |entry| entry.term)
    }

    fn holds_still(&self, now: BootTime) -> bool {
        if self.vote_at_once {
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
            return self.broadcast(now);
        }
        // Without holding still there is nothing to wait for either.
        let patience = if self.vote_at_once { 2 * self.timing.heartbeat_ms } else { self.timing.hold_ms };
        let silent = self.heard.is_none_or(|at| now > at.plus_ms(patience));
        if self.me >= self.voters || !silent || now < self.campaign || now < self.held_until {
            return Vec::new();
        }
        self.campaign = now.plus_ms(self.timing.heartbeat_ms + 20 + jitter_ms);
        self.ask(true, now)
    }

    fn ask(&mut self, pre: bool, now: BootTime) -> Out {
        if !pre {
            self.term += 1;
            self.voted_for = Some(self.me);
            self.leader = None;
        }
        let votes = BTreeSet::from([self.me]);
        self.role = Role::Asking { pre, votes };
        if self.voters == 1 {
            return if pre { self.ask(false, now) } else { self.lead(now) };
        }
        let term = self.term + u64::from(pre);
        let last = self.last();
        let others = (0..self.voters).filter(|voter| *voter != self.me);
        others.map(|voter| (voter, RaftMessage::Ask { pre, term, last })).collect()
    }

    fn lead(&mut self, now: BootTime) -> Out {
        self.role = Role::Leader(Leading {
            next: vec![self.log.len() + 1; self.all],
            matched: vec![0; self.all],
            acked: vec![None; self.all],
            next_beat: now.plus_ms(self.timing.heartbeat_ms),
            blank: 0,
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

    /// Takes a proposal of this term's leader into the log, once it is on the disk.
    pub fn store(&mut self, term: u64, proposal: Option<Rc<Proposal>>, now: BootTime) -> Out {
        let blank = proposal.is_none();
        let Role::Leader(leading) = &mut self.role else {
            return Vec::new();
        };
        if term != self.term || blank != (leading.blank == 0) {
            return Vec::new();
        }
        self.log.push(Entry { term, proposal });
        if blank {
            leading.blank = self.log.len();
        }
        self.advance();
        self.broadcast(now)
    }

    /// Whether the blank entry still has to be stored.
    pub fn wants_blank(&self) -> bool {
        matches!(&self.role, Role::Leader(leading) if leading.blank == 0)
    }

    fn broadcast(&self, now: BootTime) -> Out {
        (0..self.all).filter(|to| *to != self.me).map(|to| (to, self.append(to, now))).collect()
    }

    fn append(&self, to: usize, sent: BootTime) -> RaftMessage {
        let next = match &self.role {
            Role::Leader(leading) => leading.next[to],
            _ => 1,
        };
        let until = self.log.len().min(next - 1 + BATCH);
        RaftMessage::Append {
            term: self.term,
            prev: (self.term_at(next - 1), next - 1),
            entries: self.log[next - 1..until].to_vec(),
            commit: self.commit,
            sent,
        }
    }

    fn advance(&mut self) {
        let Role::Leader(leading) = &self.role else {
            return;
        };
        let mut matched: Vec<_> = (0..self.voters)
            .map(|voter| if voter == self.me { self.log.len() } else { leading.matched[voter] })
            .collect();
        matched.sort_unstable_by(|a, b| b.cmp(a));
        let agreed = matched[self.voters / 2];
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
                let granted = fresh && free && self.me < self.voters && !self.holds_still(now);
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
        }
    }

    fn count(&mut self, from: usize, pre: bool, term: u64, granted: bool, now: BootTime) -> Out {
        let wanted = self.term + u64::from(pre);
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
        if votes.len() <= self.voters / 2 {
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
        if prev.1 <= self.log.len() && self.term_at(prev.1) == prev.0 {
            let agreed = prev.1 + entries.len();
            for (index, entry) in (prev.1 + 1..).zip(entries) {
                if self.term_at(index) != entry.term || index > self.log.len() {
                    self.log.truncate(index - 1);
                    self.log.push(entry);
                }
            }
            self.commit = self.commit.max(commit.min(agreed));
            matched = Some(agreed);
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
                } else if news && agreed < self.log.len() {
                    vec![(from, self.append(from, now))]
                } else {
                    Vec::new()
                }
            }
        }
    }
}
