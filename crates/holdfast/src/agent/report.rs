//! Reports: what this node says of itself, and what the coordinator heard.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use holdfast_core::lease::BootTime;
use holdfast_core::*;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout};

use super::{Agent, Member, rpc};
use crate::realtime::boot_time;

/// A report is sent at every change, and at least this often: a coordinator that
/// missed one learns of it.
const EVERY: Duration = Duration::from_secs(5);
const DEADLINE: Duration = Duration::from_secs(2);

/// A report on its way, with what tells newer from older.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Numbered {
    /// When this life of the agent began, on the node's CLOCK_BOOTTIME: one life
    /// of the agent follows another within one life of the keeper.
    life: BootTime,
    /// Counts the reports of one life.
    sequence: u64,
    report: NodeReport,
}

impl Numbered {
    fn is_newer_than(&self, other: &Numbered) -> bool {
        let rank = |numbered: &Numbered| (numbered.life, numbered.sequence);
        self.report.incarnation != other.report.incarnation || rank(self) > rank(other)
    }
}

/// What this node is about to say, and on the coordinator what all nodes said.
pub struct Reports {
    life: BootTime,
    own: Mutex<NodeReport>,
    changed: Notify,
    rests_until: Mutex<Option<Instant>>,
    heard: Mutex<BTreeMap<NodeId, Numbered>>,
    news: Notify,
}

impl Reports {
    /// Nothing said, nothing heard.
    pub fn new() -> Self {
        Reports {
            life: boot_time(),
            own: Mutex::default(),
            changed: Notify::new(),
            rests_until: Mutex::default(),
            heard: Mutex::default(),
            news: Notify::new(),
        }
    }

    /// Changes what this node says; it is sent if that made a difference.
    pub fn say(&self, change: impl FnOnce(&mut NodeReport)) {
        let mut own = locked(&self.own);
        let before = own.clone();
        change(&mut own);
        if *own != before {
            self.changed.notify_one();
        }
    }

    /// Says how a VM's QEMU of an epoch is.
    pub fn say_vm(&self, vm: VmId, epoch: Epoch, run: Run) {
        self.say(|report| {
            let moved = report.vms.get(&vm).filter(|known| known.epoch == epoch).and_then(|known| known.moved);
            report.vms.insert(vm, VmReport { epoch, run, moved });
        });
    }

    /// Keeps the figures of the migration that brings a VM here, to be told with
    /// whatever is said of it next.
    pub fn keep_moved(&self, vm: VmId, epoch: Epoch, moved: Option<Moved>) {
        let mut own = locked(&self.own);
        if let Some(known) = own.vms.get_mut(&vm).filter(|known| known.epoch == epoch) {
            known.moved = moved.or(known.moved);
        }
    }

    /// Sends nothing for a moment, unless it rests already: one rest after another would
    /// keep what is said from the coordinator.
    pub fn rest(&self, pause: Duration) {
        let now = Instant::now();
        let mut until = locked(&self.rests_until);
        if until.is_none_or(|until| until <= now) {
            *until = Some(now + pause);
        }
    }

    async fn rested(&self) {
        let until = *locked(&self.rests_until);
        if let Some(until) = until {
            sleep_until(until).await;
        }
    }

    /// Takes in what a node said, on the coordinator.
    pub fn hear(&self, node: NodeId, said: Numbered) {
        let mut heard = locked(&self.heard);
        if heard.get(&node).is_none_or(|known| said.is_newer_than(known)) {
            heard.insert(node, said);
            drop(heard);
            self.news.notify_one();
        }
    }

    /// Forgets what was heard: a new coordinator believes only what it is told anew.
    pub fn forget(&self) {
        locked(&self.heard).clear();
    }

    /// What the nodes said.
    pub fn heard(&self) -> BTreeMap<NodeId, NodeReport> {
        locked(&self.heard).iter().map(|(node, said)| (*node, said.report.clone())).collect()
    }

    /// Waits for news from a node.
    pub async fn news(&self) {
        self.news.notified().await;
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change is complete in itself, so a panic elsewhere leaves nothing half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Agent {
    /// Sends this node's report to whoever is coordinator, for ever.
    pub(super) async fn keep_reporting(self, member: &'static Member) {
        let mut standing = member.consensus.place();
        let mut keeper = self.0.keeper.watch();
        let mut sequence = 0;
        loop {
            member.reports.rested().await;
            let (incarnation, term) = {
                let view = keeper.borrow_and_update();
                (view.incarnation, view.term)
            };
            locked(&member.reports.own).incarnation = incarnation;
            locked(&member.reports.own).term = term;
            let coordinator = standing.borrow_and_update().coordinator;
            sequence += 1;
            let said = Numbered { life: member.reports.life, sequence, report: locked(&member.reports.own).clone() };
            let delivered = match coordinator {
                Some(node) if node == member.me => {
                    member.reports.hear(node, said);
                    true
                }
                Some(node) => member.peers.ask::<_, ()>(node, rpc::REPORT, &said, DEADLINE).await.is_ok(),
                None => false,
            };
            // A report that did not arrive is tried again soon, with what is true then.
            let pause = if delivered { EVERY } else { Duration::from_millis(50) };
            // Of where this node stands only another coordinator makes a difference here.
            let another = async {
                if standing.wait_for(|now| now.coordinator != coordinator).await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            let wake = async {
                tokio::select! {
                    () = member.reports.changed.notified(), if delivered => {}
                    _ = keeper.changed(), if delivered => {}
                    () = another => {}
                }
            };
            let _ = timeout(pause, wake).await;
        }
    }
}
