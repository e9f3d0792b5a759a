//! What is in the log, and what participants say to each other.

use std::rc::Rc;

use holdfast_core::Proposal;
use holdfast_core::lease::BootTime;

use super::Members;

/// One entry of the log.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The leader's term.
    pub term: u64,
    /// What it says.
    pub what: What,
}

/// What an entry says.
#[derive(Clone, Debug)]
pub enum What {
    /// A new leader's first.
    Blank,
    /// A command for the state.
    Command(Rc<Proposal>),
    /// Who takes part from here on.
    Members(Rc<Members>),
}

impl Entry {
    /// The command, if it is one.
    pub fn proposal(&self) -> Option<&Rc<Proposal>> {
        match &self.what {
            What::Command(proposal) => Some(proposal),
            What::Blank | What::Members(_) => None,
        }
    }

    /// Whether it is the same entry: of the same leader, saying the same.
    pub fn is(&self, other: &Entry) -> bool {
        let same = match (&self.what, &other.what) {
            (What::Blank, What::Blank) => true,
            (What::Command(a), What::Command(b)) => a.id == b.id,
            (What::Members(a), What::Members(b)) => a == b,
            _ => false,
        };
        same && self.term == other.term
    }
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
    /// The leader lets the voters elect `to` at once.
    HandOver {
        /// The leader's term.
        term: u64,
        /// Who should lead.
        to: usize,
        /// `(term, index)` of the leader's last entry.
        last: (u64, usize),
    },
}
