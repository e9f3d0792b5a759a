//! The VMs that this node may run, or has a process of: each has one task that
//! keeps what is equal to what should be (`guest.rs`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use holdfast_core::*;
use holdfast_qemu::{Arrival, QemuError, Role, Word, word};
use holdfast_vswitch::tap_name;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;

use super::rpc::{HandedOver, HandoverCall};
use super::{Agent, Member};

/// How long a target may take from having everything to being able to continue.
const LAST_STEP: Duration = Duration::from_millis(500);
/// For so long a node reports nothing while a guest is continued: agreeing on where it
/// is takes processors and disks of several nodes, and a guest that stood still has
/// more to do with them.
const REST: Duration = Duration::from_millis(100);

/// The QEMUs that wait here for a guest, for the calls of their sources.
#[derive(Default)]
pub struct Guests {
    waiting: Mutex<BTreeMap<VmId, Arc<Waiting>>>,
}

/// A QEMU that waits for a guest.
pub struct Waiting {
    /// Under which epoch it was started.
    pub epoch: Epoch,
    /// What was seen of it since it waits.
    pub arrival: Arrival,
}

impl Guests {
    /// A QEMU waits for a guest; or, with `None`, does not any more.
    pub fn set_waiting(&self, vm: VmId, waiting: Option<Waiting>) {
        let mut all = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        match waiting {
            Some(waiting) => all.insert(vm, Arc::new(waiting)),
            None => all.remove(&vm),
        };
    }

    /// The QEMU that waits for a VM's guest under an epoch.
    pub fn waiting(&self, vm: VmId, epoch: Epoch) -> Option<Arc<Waiting>> {
        let all = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(&vm).filter(|waiting| waiting.epoch == epoch).cloned()
    }
}

impl Agent {
    /// The source has sent the guest and never continues it: continue it here.
    pub(super) async fn continue_here(&self, member: &'static Member, vm: VmId, call: HandoverCall) -> HandedOver {
        let Some(waiting) = member.guests.waiting(vm, call.epoch) else {
            // Either its task has not come so far, or the process is gone.
            let used = self.0.keeper.watch().borrow().process(vm, call.epoch).is_some();
            let alive = self.0.keeper.watch().borrow().alive(vm).is_some_and(|process| process.epoch == call.epoch);
            let gone = used && !alive;
            return if gone { HandedOver::Gone } else { HandedOver::Again("its QEMU is not ready here".into()) };
        };
        let paused = self.state().vms.get(&vm).is_some_and(|vm| vm.desired == Desired::Paused);
        // Before it runs: its task here sees that too, and may be the first to say so.
        member.reports.keep_moved(vm, call.epoch, call.moved);
        // The source writes nothing any more.
        if let Err(error) = self.admit_writes(member, vm, call.epoch, &call.parts).await {
            return HandedOver::Again(format!("{error:#}"));
        }
        // What has to be agreed on when it runs can wait until it has answered its users.
        member.reports.rest(REST);
        // The source's word can be faster than QEMU's last step here.
        let until = Instant::now() + LAST_STEP;
        let done = loop {
            let done = if paused {
                match word(waiting.arrival.qmp(), Role::Target).await {
                    Ok(Word::Arrived | Word::Runs) => Ok(Run::Paused),
                    Ok(other) => return HandedOver::Again(format!("{other:?}")),
                    Err(error) => Err(error),
                }
            } else {
                waiting.arrival.resume().await.map(|()| Run::Running)
            };
            match done {
                Err(QemuError::NotHere { .. }) if Instant::now() < until => {
                    tokio::time::sleep(Duration::from_millis(1)).await
                }
                other => break other,
            }
        };
        match done {
            Ok(run) => {
                member.reports.say_vm(vm, call.epoch, run);
                HandedOver::Done
            }
            Err(error) if error.is_gone() => HandedOver::Gone,
            Err(error) => HandedOver::Again(error.to_string()),
        }
    }

    /// Gives each VM of this node its task, for ever.
    pub(super) async fn keep_guests(self, member: &'static Member) {
        let mut changes = self.changes();
        let mut keeper = self.0.keeper.watch();
        let mut tasks = JoinSet::new();
        let mut kept: BTreeMap<VmId, AbortHandle> = BTreeMap::new();
        let mut swept = false;
        loop {
            let wanted: BTreeSet<VmId> = {
                let state = changes.borrow_and_update();
                let view = keeper.borrow_and_update();
                let mine = state.vms.values().filter(|vm| vm.tenure_of(member.me).is_some()).map(|vm| vm.id);
                mine.chain(view.processes.keys().copied()).collect()
            };
            let known = !changes.borrow().cluster.name.is_empty();
            if known && !swept {
                self.sweep_taps(&wanted).await;
                swept = true;
            }
            kept.retain(|_, task| !task.is_finished());
            if known {
                for vm in wanted {
                    kept.entry(vm).or_insert_with(|| tasks.spawn(self.clone().keep_guest(member, vm)));
                }
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                changed = keeper.changed() => if changed.is_err() { return },
                // A VM may have been given to this node again while its task ended.
                Some(_) = tasks.join_next() => {}
            }
        }
    }

    /// Removes taps that an earlier life of the agent left and that no VM here uses.
    async fn sweep_taps(&self, wanted: &BTreeSet<VmId>) {
        let state = self.state();
        let taps = match self.0.vswitch.list_taps().await {
            Ok(taps) => taps,
            Err(error) => return tracing::warn!(%error, "the taps cannot be listed"),
        };
        let used: BTreeSet<_> = wanted
            .iter()
            .filter_map(|id| state.vms.get(id))
            .flat_map(|vm| (0..vm.spec.nics.len()).map(|nic| tap_name(&vm.id.to_string(), nic as u8)))
            .collect();
        for tap in taps.iter().filter(|tap| !tap.open && !used.contains(&tap.name)) {
            if let Err(error) = self.0.vswitch.remove_tap(&tap.name).await {
                tracing::warn!(tap = tap.name, %error, "a tap that nobody uses stays");
            }
        }
    }
}
