//! What time brings about: the coordinator's heartbeats, and the election of
//! another coordinator when there is none.
//!
//! The engine could do both, from a tick of a fifth of a heartbeat
//! (openraft 0.10.0-alpha.37, src/core/tick.rs), at which every node wakes up
//! whether there is something to do or not. That tick is off; each node sleeps
//! until something is due here:
//!
//! ```text
//! coordinator    the next heartbeat
//! voter          hold + its rank's steps after the coordinator was heard
//! sole voter     at once; hold after another coordinator was heard
//! learner        nothing, ever
//! ```

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use holdfast_core::NodeId;
use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver;
use tokio::time::{Instant, sleep_until};

use crate::standing::Node;

/// What a node has to do next, unless where it stands changes before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Tell the others that this node coordinates.
    Heartbeat,
    /// Ask the other voters for their votes; `rank` of them ask before.
    Campaign { rank: u32, voters: u32 },
    /// Nobody else can be coordinator by this node's log; `obeys` another that was
    /// elected by a newer list of members, perhaps.
    TakeOver { obeys: bool },
    /// Nothing.
    Listen,
}

impl Turn {
    fn of(me: u64, leads: bool, voters: &BTreeSet<u64>, leader: Option<u64>) -> Turn {
        if leads {
            return Turn::Heartbeat;
        }
        if !voters.contains(&me) {
            return Turn::Listen;
        }
        if voters.len() == 1 {
            return Turn::TakeOver { obeys: leader.is_some_and(|leader| leader != me) };
        }
        let rank = voters.iter().filter(|voter| Some(**voter) != leader).position(|voter| *voter == me);
        let (rank, voters) = (rank.unwrap_or(0) as u32, voters.len() as u32);
        // A witness leads only if no node can: their turn is over first.
        let rank = if NodeId(me).is_witness() { rank + voters } else { rank };
        Turn::Campaign { rank, voters }
    }
}

impl Node {
    /// Sends heartbeats while this node coordinates. Otherwise starts an election
    /// soon after the coordinator's silence has lasted for `hold`, one voter after
    /// the other. Until the engine has stopped.
    ///
    /// Asking early harms nobody: a pre-vote changes nothing, and every voter that
    /// still hears the coordinator refuses it.
    pub(crate) async fn keep_pace(self: Arc<Self>) {
        let step = (self.heartbeat / 4).clamp(Duration::from_millis(5), Duration::from_millis(20));
        if let Some(since) = self.held_since {
            sleep_until(since + self.hold).await;
            while self.held() {
                tokio::time::sleep(step).await;
            }
        }
        let mut server = self.engine.server_metrics();
        let mut next_heartbeat = Instant::now();
        // No campaign before: the last one may still be answered.
        let mut patient_until = Instant::now();
        let mut led = false;
        loop {
            let (turn, leads) = {
                let now = server.borrow_watched();
                let voters = now.membership_config.membership().voter_ids().collect();
                let leads = now.state == ServerState::Leader;
                let turn = match self.only_listens.load(Ordering::Relaxed) && !leads {
                    true => Turn::Listen,
                    false => Turn::of(self.wire.me, leads, &voters, now.current_leader),
                };
                (turn, leads)
            };
            if std::mem::replace(&mut led, leads) && !leads {
                // Whoever made it give way gets the time to win; it was not silent.
                self.heard();
            }
            let due = match turn {
                Turn::Heartbeat => Some(next_heartbeat),
                Turn::Campaign { rank, .. } => {
                    let silent = self.last_heard() + self.hold + step * rank + Duration::from_millis(1);
                    Some(silent.max(patient_until))
                }
                Turn::TakeOver { obeys: true } => Some(patient_until.max(self.last_heard() + self.hold)),
                Turn::TakeOver { obeys: false } => Some(patient_until),
                Turn::Listen => None,
            };
            let waited = async {
                match due {
                    Some(due) => sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                changed = WatchReceiver::changed(&mut server) => match changed {
                    Ok(()) => continue,
                    Err(_) => return,
                },
                () = waited => {}
            }
            let trigger = self.engine.trigger();
            let now = Instant::now();
            let running = match turn {
                Turn::Heartbeat => {
                    // Heartbeats that were missed are not made up for.
                    next_heartbeat = (next_heartbeat + self.heartbeat).max(now + self.heartbeat / 2);
                    match self.mute.load(Ordering::Relaxed) {
                        true => Ok(()),
                        false => trigger.heartbeat().await,
                    }
                }
                // It was heard since this wait began.
                Turn::Campaign { rank, .. } if now <= self.last_heard() + self.hold + step * rank => Ok(()),
                Turn::Campaign { rank, voters } => {
                    // Enough for the others' answers and, if it is won, for the first
                    // heartbeat; the ranks stay apart in the next round too.
                    patient_until = now + self.heartbeat + step * (voters + rank);
                    trigger.elect(true).await
                }
                Turn::TakeOver { obeys: true } if now < self.last_heard() + self.hold => Ok(()),
                Turn::TakeOver { .. } => {
                    patient_until = now + self.heartbeat;
                    trigger.elect(false).await
                }
                Turn::Listen => Ok(()),
            };
            if running.is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(me: u64, leads: bool, voters: &[u64], leader: Option<u64>) -> Turn {
        Turn::of(me, leads, &voters.iter().copied().collect(), leader)
    }

    #[test]
    fn voters_ask_one_after_the_other_and_the_lost_coordinator_is_not_counted() {
        assert_eq!(turn(2, false, &[1, 2, 3], Some(1)), Turn::Campaign { rank: 0, voters: 3 });
        assert_eq!(turn(3, false, &[1, 2, 3], Some(1)), Turn::Campaign { rank: 1, voters: 3 });
        assert_eq!(turn(3, false, &[1, 2, 3], Some(2)), Turn::Campaign { rank: 1, voters: 3 });
        assert_eq!(turn(3, false, &[1, 2, 3], None), Turn::Campaign { rank: 2, voters: 3 });
    }

    #[test]
    fn a_witness_asks_after_every_node() {
        let witness = NodeId::witness(1).0;
        let asked = turn(witness, false, &[1, 2, witness], Some(1));
        assert!(matches!(asked, Turn::Campaign { rank, voters: 3 } if rank >= 3), "{asked:?}");
    }

    #[test]
    fn a_coordinator_beats_even_alone_and_a_sole_voter_asks_nobody() {
        assert_eq!(turn(1, true, &[1], Some(1)), Turn::Heartbeat);
        assert_eq!(turn(1, true, &[1, 2, 3], Some(1)), Turn::Heartbeat);
        assert_eq!(turn(1, false, &[1], None), Turn::TakeOver { obeys: false });
        assert_eq!(turn(1, false, &[1], Some(2)), Turn::TakeOver { obeys: true });
    }

    #[test]
    fn who_has_no_vote_does_not_ask_for_any() {
        assert_eq!(turn(4, false, &[1, 2, 3], None), Turn::Listen);
        assert_eq!(turn(1, false, &[], None), Turn::Listen);
    }
}
