//! How long this node may rely on being the coordinator.
//!
//! Every append and heartbeat is stamped on this node's CLOCK_BOOTTIME before it
//! is handed to the network, and the stamp counts once the answer shows that the
//! other node accepted this coordinator's term. The moment that a majority has
//! acknowledged is [`Stamps::quorum`]. The engine has such a figure too
//! (`last_quorum_acked`, openraft 0.10.0-alpha.37 `src/proposer/leader.rs`, also
//! taken before sending, `src/core/heartbeat/event.rs`), but on CLOCK_MONOTONIC,
//! which stands still while a host sleeps: a coordinator that was suspended would
//! wake up believing in a long lost authority.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use holdfast_core::lease::BootTime;
use nix::time::{ClockId, clock_gettime};
use tokio::sync::Notify;

/// A reading of CLOCK_BOOTTIME.
pub(crate) fn boot_time() -> BootTime {
    // The clock exists on every Linux since 2.6.39. If it could not be read, zero
    // is safe for stamps: it is so long ago that nothing follows from it.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(BootTime(0), |time| BootTime(Duration::from(time).as_nanos() as u64))
}

/// What the other nodes have acknowledged in the current term.
#[derive(Default)]
pub(crate) struct Stamps {
    inner: Mutex<Inner>,
    /// Told at every new acknowledgement.
    pub(crate) changed: Notify,
}

#[derive(Default)]
struct Inner {
    term: u64,
    acknowledged: BTreeMap<u64, BootTime>,
    /// The latest term whose coordination this node has begun to hand over.
    handed_over: u64,
}

impl Stamps {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Each change is a single assignment, so a panic leaves nothing half done.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `node` accepted what was sent to it in `term` at `sent`.
    pub(crate) fn acknowledged(&self, term: u64, node: u64, sent: BootTime) {
        let mut inner = self.inner();
        if term > inner.term {
            inner.term = term;
            inner.acknowledged.clear();
        }
        if term == inner.term {
            let stamp = inner.acknowledged.entry(node).or_default();
            *stamp = sent.max(*stamp);
            drop(inner);
            self.changed.notify_one();
        }
    }

    /// When the last message that `node` acknowledged in `term` was sent.
    pub(crate) fn of(&self, term: u64, node: u64) -> Option<BootTime> {
        let inner = self.inner();
        let stamps = (inner.term == term).then_some(&inner.acknowledged)?;
        stamps.get(&node).copied()
    }

    /// Nothing follows from acknowledgements in `term` any more: the voters were
    /// told that they may elect another coordinator at once.
    pub(crate) fn hand_over(&self, term: u64) {
        let mut inner = self.inner();
        inner.handed_over = inner.handed_over.max(term);
        drop(inner);
        self.changed.notify_one();
    }

    /// Whether the coordination of `term` was, or is being, handed over.
    pub(crate) fn handed_over(&self, term: u64) -> bool {
        self.inner().handed_over >= term
    }

    /// The latest moment such that a majority of every set of voters acknowledged
    /// something that was sent then or later. This node acknowledges itself at any time.
    pub(crate) fn quorum(&self, term: u64, me: u64, voters: &[BTreeSet<u64>], now: BootTime) -> Option<BootTime> {
        let inner = self.inner();
        if inner.handed_over >= term {
            return None;
        }
        let none = BTreeMap::new();
        let stamps = if inner.term == term { &inner.acknowledged } else { &none };
        let majority = |set: &BTreeSet<u64>| {
            let mut times: Vec<Option<BootTime>> =
                set.iter().map(|node| if *node == me { Some(now) } else { stamps.get(node).copied() }).collect();
            times.sort_unstable_by(|a, b| b.cmp(a));
            times.get(set.len() / 2).copied().flatten()
        };
        voters.iter().map(majority).min().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(nodes: &[u64]) -> BTreeSet<u64> {
        nodes.iter().copied().collect()
    }

    const NOW: BootTime = BootTime(1000);

    #[test]
    fn a_sole_voter_acknowledges_itself_at_all_times() {
        assert_eq!(Stamps::default().quorum(1, 1, &[set(&[1])], NOW), Some(NOW));
    }

    #[test]
    fn a_majority_counts_and_an_older_answer_takes_nothing_back() {
        let stamps = Stamps::default();
        let voters = [set(&[1, 2, 3, 4, 5])];
        stamps.acknowledged(1, 2, BootTime(20));
        assert_eq!(stamps.quorum(1, 1, &voters, NOW), None);
        stamps.acknowledged(1, 3, BootTime(30));
        stamps.acknowledged(1, 2, BootTime(10));
        assert_eq!(stamps.quorum(1, 1, &voters, NOW), Some(BootTime(20)));
        stamps.acknowledged(1, 4, BootTime(40));
        assert_eq!(stamps.quorum(1, 1, &voters, NOW), Some(BootTime(30)));
    }

    #[test]
    fn an_even_number_of_voters_needs_more_than_half() {
        let stamps = Stamps::default();
        stamps.acknowledged(1, 2, BootTime(20));
        assert_eq!(stamps.quorum(1, 1, &[set(&[1, 2, 3, 4])], NOW), None);
        assert_eq!(stamps.quorum(1, 1, &[set(&[1, 2])], NOW), Some(BootTime(20)));
    }

    #[test]
    fn while_voters_change_both_sets_must_agree() {
        let stamps = Stamps::default();
        stamps.acknowledged(1, 2, BootTime(20));
        let joint = [set(&[1, 2, 3]), set(&[1, 4, 5])];
        assert_eq!(stamps.quorum(1, 1, &joint, NOW), None);
        stamps.acknowledged(1, 5, BootTime(15));
        assert_eq!(stamps.quorum(1, 1, &joint, NOW), Some(BootTime(15)));
    }

    #[test]
    fn learners_and_other_terms_do_not_count() {
        let stamps = Stamps::default();
        let voters = [set(&[1, 2, 3])];
        stamps.acknowledged(1, 9, BootTime(50));
        assert_eq!(stamps.quorum(1, 1, &voters, NOW), None);
        stamps.acknowledged(2, 2, BootTime(60));
        stamps.acknowledged(1, 3, BootTime(70));
        assert_eq!(stamps.quorum(1, 1, &voters, NOW), None);
        assert_eq!(stamps.quorum(2, 1, &voters, NOW), Some(BootTime(60)));
        assert_eq!(stamps.quorum(3, 1, &voters, NOW), None);
    }

    #[test]
    fn nothing_follows_from_a_term_that_was_handed_over() {
        let stamps = Stamps::default();
        let voters = [set(&[1, 2])];
        stamps.acknowledged(4, 2, BootTime(20));
        stamps.hand_over(4);
        stamps.acknowledged(4, 2, BootTime(30));
        assert_eq!(stamps.quorum(4, 1, &voters, NOW), None);
        stamps.acknowledged(6, 2, BootTime(40));
        assert_eq!(stamps.quorum(6, 1, &voters, NOW), Some(BootTime(40)));
    }
}
