//! Leases: the time-limited right of a node to run VMs (safety rules 1 and 2).
//!
//! ```text
//!  node:         sent ────────── lease ends = sent + length
//!                  \            (on the node's own clock)
//!  coordinator:     answered ─────────────── lost ≥ answered + length + margin
//! ```
//! `sent` comes before `answered`, so the node's view always ends first; the
//! margin pays for clocks that run at different rates. A coordinator may answer
//! only while a quorum has acknowledged it recently ([`Authority`]), and a new
//! one waits out what an earlier one may have granted ([`LeaseSlot::assumed`]).
//!
//! A node that is heard but hears nobody has no lease, however often it is
//! answered. Heartbeats therefore say which answers have arrived, and one that
//! says so of none for [`LeaseTiming::deaf_after_ms`] is only probed from then on
//! ([`Answer::Probe`]): its lease runs out in the coordinator's eyes as well.

use serde::{Deserialize, Serialize};

use crate::model::{Incarnation, NodeId, NodeTerm};

/// A reading of CLOCK_BOOTTIME in nanoseconds. It runs on while the host sleeps,
/// and readings of different hosts have nothing to do with each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BootTime(pub u64);

impl BootTime {
    /// This moment plus `ms` milliseconds.
    pub fn plus_ms(self, ms: u64) -> Self {
        BootTime(self.0.saturating_add(ms.saturating_mul(1_000_000)))
    }

    /// Whole milliseconds from `earlier` to this moment, zero if it is later.
    pub fn ms_since(self, earlier: BootTime) -> u64 {
        self.0.saturating_sub(earlier.0) / 1_000_000
    }
}

/// How long leases are and how often they are renewed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseTiming {
    /// Length of a lease in milliseconds.
    pub length_ms: u64,
    /// Time between two heartbeats in milliseconds.
    pub heartbeat_ms: u64,
}

impl LeaseTiming {
    /// How much longer than a lease the coordinator waits: 10 %, which pays for
    /// clocks that differ by up to 10 % in rate.
    pub fn margin_ms(self) -> u64 {
        self.length_ms.div_ceil(10)
    }

    /// A node of which it is not known for so long that it hears the answers gets
    /// none that count, in milliseconds: several heartbeats in each profile.
    pub fn deaf_after_ms(self) -> u64 {
        self.length_ms / 3
    }

    /// Lease and margin, in milliseconds.
    pub fn lost_after_ms(self) -> u64 {
        self.length_ms + self.margin_ms()
    }
}

/// A node's request to renew its lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Who asks.
    pub node: NodeId,
    /// The life of the keeper that asks.
    pub incarnation: Incarnation,
    /// Counts the heartbeats of one life.
    pub sequence: u64,
    /// When it was sent, on the sender's clock.
    pub sent: BootTime,
    /// The newest heartbeat of this life to which the receiver's answer had
    /// arrived; 0 for none.
    pub acknowledged: u64,
}

/// The coordinator's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// The life of the keeper that asked.
    pub incarnation: Incarnation,
    /// The heartbeat that is answered.
    pub sequence: u64,
    /// When that heartbeat was sent, on its sender's clock: the lease counts from here.
    pub sent: BootTime,
    /// The node's term; rights to run VMs from any other are void.
    pub term: NodeTerm,
    /// How long the lease is and when to ask again.
    pub timing: LeaseTiming,
}

/// A node's own view of its lease.
#[derive(Clone, Copy, Debug)]
pub struct NodeLease {
    incarnation: Incarnation,
    term: NodeTerm,
    ends: Option<BootTime>,
}

/// What a grant meant for a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granted {
    /// It is for another life, older than what is known, or from the future.
    Ignored,
    /// The lease now ends later.
    Renewed,
    /// The node was admitted anew: every VM of an earlier term has to be dead
    /// before [`NodeLease::held`] is asked again.
    NewTerm,
}

impl NodeLease {
    /// No lease yet, for a keeper that just started.
    pub fn new(incarnation: Incarnation) -> Self {
        NodeLease { incarnation, term: NodeTerm(0), ends: None }
    }

    /// The life of the keeper that it belongs to.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// The term of the last grant.
    pub fn term(&self) -> NodeTerm {
        self.term
    }

    /// When it ends or ended, `None` before the first grant.
    pub fn ends(&self) -> Option<BootTime> {
        self.ends
    }

    /// Whether the node may run VMs at `now`.
    pub fn held(&self, now: BootTime) -> bool {
        self.ends.is_some_and(|ends| now < ends)
    }

    /// Takes a grant in. It counts from when the node sent the heartbeat.
    pub fn grant(&mut self, grant: &Grant, now: BootTime) -> Granted {
        if grant.incarnation != self.incarnation || grant.term < self.term || grant.sent > now {
            return Granted::Ignored;
        }
        let ends = grant.sent.plus_ms(grant.timing.length_ms);
        if grant.term > self.term {
            self.term = grant.term;
            self.ends = Some(ends);
            return Granted::NewTerm;
        }
        if self.ends.is_some_and(|known| ends <= known) {
            return Granted::Ignored;
        }
        self.ends = Some(ends);
        Granted::Renewed
    }
}

/// Until when a coordinator may grant leases.
///
/// Followers refuse to elect another coordinator for `window_ms` after they
/// acknowledged this one, so as long as it grants only within that window of
/// its last acknowledged quorum, no successor exists yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Authority {
    /// The moment from which nothing may be granted any more.
    pub until: BootTime,
}

impl Authority {
    /// None at all: what everybody but the coordinator has.
    pub const NONE: Authority = Authority { until: BootTime(0) };

    /// The authority that follows from a quorum's acknowledgement of what was
    /// sent at `acknowledged`.
    pub fn from_quorum(acknowledged: BootTime, window_ms: u64) -> Self {
        Authority { until: acknowledged.plus_ms(window_ms) }
    }

    /// Whether leases may be granted at `now`.
    pub fn holds(self, now: BootTime) -> bool {
        now < self.until
    }
}

/// The coordinator's view of one node's lease, within one coordinatorship.
#[derive(Clone, Copy, Debug)]
pub struct LeaseSlot {
    /// The node.
    pub node: NodeId,
    /// The keeper's life that the cluster admitted.
    pub admitted: Incarnation,
    /// The node's term.
    pub term: NodeTerm,
    /// Whether the cluster considers it up.
    pub up: bool,
    /// No lease of this node can last beyond this moment.
    bound: BootTime,
    /// When it was last answered, or when this coordinator took over.
    answered: BootTime,
    /// Called lost: never answered again in this term.
    condemned: bool,
    /// Being removed: never answered again.
    retired: bool,
    /// The newest heartbeat's life, when it was taken in, and its number.
    heard: Option<(Incarnation, BootTime, u64)>,
    /// The oldest answer of which it is not known that any answer since then has
    /// arrived: to which heartbeat, and when.
    unacknowledged: Option<(u64, BootTime)>,
}

/// What the coordinator does with a heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Send this.
    Grant(Grant),
    /// No lease, as it is not admitted, condemned, or does not seem to hear; but
    /// tell it that its heartbeat arrived, so that it can say that it heard that.
    Probe,
    /// Nothing: no authority.
    Silence,
}

impl LeaseSlot {
    /// A slot for a coordinator that took over at `since`: an earlier one may
    /// have granted a lease of `longest_ms` up to that moment.
    pub fn assumed(
        node: NodeId,
        admitted: Incarnation,
        term: NodeTerm,
        up: bool,
        since: BootTime,
        longest: LeaseTiming,
    ) -> Self {
        LeaseSlot {
            node,
            admitted,
            term,
            up,
            bound: since.plus_ms(longest.lost_after_ms()),
            answered: since,
            condemned: false,
            retired: false,
            heard: None,
            unacknowledged: None,
        }
    }

    /// Takes over what the cluster has agreed on since: a new term lifts a condemnation.
    pub fn admit(&mut self, admitted: Incarnation, term: NodeTerm, up: bool) {
        if term != self.term {
            self.condemned = false;
        }
        (self.admitted, self.term, self.up) = (admitted, term, up);
    }

    /// Takes over whether the node is being removed: then its last lease runs out.
    pub fn retire(&mut self, leaves: bool) {
        self.retired = leaves;
    }

    /// Whether it gets nothing more because its node is being removed.
    pub fn retired(&self) -> bool {
        self.retired
    }

    /// Answers a heartbeat at `now`.
    pub fn answer(
        &mut self,
        heartbeat: &Heartbeat,
        timing: LeaseTiming,
        authority: Authority,
        now: BootTime,
    ) -> Answer {
        let before = self.heard.filter(|(life, ..)| *life == heartbeat.incarnation);
        // A life that was not heard before has just proved that it hears: it was challenged.
        if before.is_none() || self.unacknowledged.is_some_and(|(first, _)| heartbeat.acknowledged >= first) {
            self.unacknowledged = None;
        }
        let deaf = self.unacknowledged.is_some_and(|(_, since)| now.ms_since(since) >= timing.deaf_after_ms());
        if !deaf && before.is_none_or(|(_, _, sequence)| sequence < heartbeat.sequence) {
            self.heard = Some((heartbeat.incarnation, now, heartbeat.sequence));
        }
        if !authority.holds(now) {
            return Answer::Silence;
        }
        self.unacknowledged.get_or_insert((heartbeat.sequence, now));
        let entitled = self.up && !self.condemned && !self.retired && self.admitted == heartbeat.incarnation;
        if !entitled || deaf {
            return Answer::Probe;
        }
        self.answered = self.answered.max(now);
        self.bound = self.bound.max(now.plus_ms(timing.lost_after_ms()));
        Answer::Grant(Grant {
            incarnation: heartbeat.incarnation,
            sequence: heartbeat.sequence,
            sent: heartbeat.sent,
            term: self.term,
            timing,
        })
    }

    /// Whether its lease has certainly ended at `now`. Once that was said, the
    /// node is condemned: it gets nothing more in this term, so the answer stays
    /// true however long it takes to commit what follows from it.
    pub fn condemn_if_ended(&mut self, now: BootTime) -> bool {
        if self.up && now >= self.bound {
            self.condemned = true;
        }
        self.condemned
    }

    /// The moment at which its lease will certainly have ended if it is never
    /// answered again.
    pub fn bound(&self) -> BootTime {
        self.bound
    }

    /// How long it has not been answered, in milliseconds.
    pub fn silent_ms(&self, now: BootTime) -> u64 {
        now.ms_since(self.answered)
    }

    /// The life of a keeper that was heard within the last `recent_ms`, and heard
    /// this coordinator.
    pub fn heard_within(&self, recent_ms: u64, now: BootTime) -> Option<Incarnation> {
        self.heard.filter(|(_, at, _)| now.ms_since(*at) <= recent_ms).map(|(life, _, _)| life)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMING: LeaseTiming = LeaseTiming { length_ms: 1500, heartbeat_ms: 100 };
    const LIFE: Incarnation = Incarnation(7);

    fn at(ms: u64) -> BootTime {
        BootTime(0).plus_ms(ms)
    }

    fn heartbeat(sequence: u64, sent_ms: u64) -> Heartbeat {
        Heartbeat { node: NodeId(1), incarnation: LIFE, sequence, sent: at(sent_ms), acknowledged: sequence - 1 }
    }

    fn slot() -> LeaseSlot {
        LeaseSlot::assumed(NodeId(1), LIFE, NodeTerm(1), true, at(0), TIMING)
    }

    fn authority(until_ms: u64) -> Authority {
        Authority { until: at(until_ms) }
    }

    #[test]
    fn a_lease_counts_from_the_sending_of_the_heartbeat() {
        let mut lease = NodeLease::new(LIFE);
        let Answer::Grant(grant) = slot().answer(&heartbeat(1, 1000), TIMING, authority(9999), at(5000)) else {
            panic!("an admitted node is answered");
        };
        assert_eq!(lease.grant(&grant, at(1400)), Granted::NewTerm);
        assert!(lease.held(at(2499)));
        assert!(!lease.held(at(2500)));
    }

    #[test]
    fn a_grant_for_another_life_or_an_older_term_is_ignored() {
        let grant = Grant { incarnation: LIFE, sequence: 1, sent: at(10), term: NodeTerm(2), timing: TIMING };
        assert_eq!(NodeLease::new(Incarnation(8)).grant(&grant, at(20)), Granted::Ignored);
        let mut lease = NodeLease::new(LIFE);
        assert_eq!(lease.grant(&grant, at(20)), Granted::NewTerm);
        assert_eq!(lease.grant(&Grant { term: NodeTerm(1), sent: at(500), ..grant }, at(600)), Granted::Ignored);
        assert_eq!(lease.grant(&Grant { sent: at(700), ..grant }, at(600)), Granted::Ignored, "from the future");
        assert_eq!(lease.grant(&Grant { sent: at(5), ..grant }, at(600)), Granted::Ignored, "reordered");
        assert_eq!(lease.grant(&Grant { sent: at(500), ..grant }, at(600)), Granted::Renewed);
        assert_eq!(lease.ends(), Some(at(2000)));
    }

    #[test]
    fn the_coordinator_waits_longer_than_the_node() {
        let mut slot = slot();
        slot.answer(&heartbeat(1, 900), TIMING, authority(9999), at(1000));
        assert!(!slot.condemn_if_ended(at(2649)));
        assert!(slot.condemn_if_ended(at(2650)));
    }

    #[test]
    fn a_condemned_node_is_silent_until_its_next_term() {
        let mut slot = slot();
        assert!(slot.condemn_if_ended(at(1650)));
        assert_eq!(slot.answer(&heartbeat(1, 1700), TIMING, authority(9999), at(1700)), Answer::Probe);
        assert_eq!(slot.heard_within(100, at(1750)), Some(LIFE));
        slot.admit(LIFE, NodeTerm(2), true);
        assert!(
            matches!(slot.answer(&heartbeat(2, 1800), TIMING, authority(9999), at(1800)), Answer::Grant(grant) if grant.term == NodeTerm(2))
        );
    }

    #[test]
    fn without_authority_or_admission_nothing_is_granted() {
        let mut slot = slot();
        assert_eq!(slot.answer(&heartbeat(1, 10), TIMING, authority(20), at(20)), Answer::Silence);
        slot.admit(Incarnation(8), NodeTerm(1), true);
        assert_eq!(slot.answer(&heartbeat(2, 10), TIMING, authority(9999), at(20)), Answer::Probe);
        slot.admit(LIFE, NodeTerm(1), false);
        assert_eq!(slot.answer(&heartbeat(3, 10), TIMING, authority(9999), at(20)), Answer::Probe);
    }

    #[test]
    fn a_node_that_hears_nothing_loses_its_lease_although_it_is_heard() {
        let mut slot = slot();
        let deaf = |sequence: u64, ms: u64| Heartbeat { acknowledged: 3, ..heartbeat(sequence, ms) };
        let mut ask = |heartbeat: Heartbeat, ms: u64| slot.answer(&heartbeat, TIMING, authority(9999), at(ms));
        assert!((1..=4).all(|n| matches!(ask(heartbeat(n, n * 100), n * 100), Answer::Grant(_))));
        // From the answer to its fourth heartbeat on it hears nothing.
        assert!((5..=8).all(|n| matches!(ask(deaf(n, n * 100), n * 100), Answer::Grant(_))));
        assert!((9..=24).all(|n| ask(deaf(n, n * 100), n * 100) == Answer::Probe));
        assert_eq!(slot.heard_within(500, at(1400)), None, "nothing to admit it for");
        assert!(!slot.condemn_if_ended(at(800 + 1649)));
        assert!(slot.condemn_if_ended(at(800 + 1650)));
        // One probe that arrived, and it is to be reckoned with again.
        assert_eq!(slot.answer(&heartbeat(30, 3000), TIMING, authority(9999), at(3000)), Answer::Probe);
        assert_eq!(slot.heard_within(500, at(3000)), Some(LIFE));
    }

    #[test]
    fn a_few_lost_answers_or_a_pause_cost_nothing() {
        let mut slot = slot();
        let mut ask = |heartbeat: Heartbeat, ms: u64| slot.answer(&heartbeat, TIMING, authority(99_999), at(ms));
        assert!(matches!(ask(heartbeat(1, 100), 100), Answer::Grant(_)));
        assert!(matches!(ask(Heartbeat { acknowledged: 0, ..heartbeat(2, 200) }, 200), Answer::Grant(_)));
        assert!(matches!(ask(heartbeat(3, 1500), 1500), Answer::Grant(_)), "it stood still and had heard");
        assert!(matches!(ask(Heartbeat { acknowledged: 0, ..heartbeat(4, 1600) }, 1600), Answer::Grant(_)));
    }

    #[test]
    fn a_new_coordinator_waits_out_the_longest_lease_of_its_predecessors() {
        let long = LeaseTiming { length_ms: 10_000, heartbeat_ms: 500 };
        let mut slot = LeaseSlot::assumed(NodeId(1), LIFE, NodeTerm(1), true, at(100), long);
        slot.answer(&heartbeat(1, 100), TIMING, authority(9999), at(150));
        assert!(!slot.condemn_if_ended(at(11_099)), "a shorter grant does not shorten an older lease");
        assert!(slot.condemn_if_ended(at(11_100)));
    }
}
