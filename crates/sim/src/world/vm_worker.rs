//! The agent's work on VMs: what is there is compared with what the applied state
//! says should be, the difference is acted on, and everything is reported.

use holdfast_core::*;

use super::host::{LeavingState, Qemu, Stage};
use super::keeper::{FENCED, LOCKED, Refused};
use super::{Message, Word, World};
use crate::clock::MS;
use crate::mutation::Mutation;

/// A word between agents is repeated this often until the state has moved on.
const REPEAT_MS: u64 = 60;

impl World {
    pub(super) fn reconcile(&mut self, host: usize) {
        if !self.keeper_answers(host) {
            return;
        }
        let state = self.hosts[host].agent.state.clone();
        let me = self.node_of(host);
        self.sweep(host, &state, me);
        let mut report = NodeReport {
            incarnation: self.hosts[host].keeper.lease.incarnation(),
            term: self.hosts[host].keeper.open.unwrap_or_default(),
            ..NodeReport::default()
        };
        for vm in state.vms.values() {
            if let Some(tenure) = vm.tenure_of(me).copied()
                && let Some(run) = self.work_on(host, &state, vm, &tenure)
            {
                report.vms.insert(vm.id, VmReport { epoch: tenure.epoch, run, moved: None });
            }
            self.disk_work(host, vm, me, &mut report);
        }
        self.report_volumes(host, &state, &mut report);
        if self.hosts[host].agent.caught_up {
            self.report(host, report);
        }
    }

    /// Ends what nobody has a right to, and forgets what has ended and is not
    /// spoken of any more. An epoch that the state does not know yet is left alone.
    fn sweep(&mut self, host: usize, state: &ClusterState, me: NodeId) {
        let superseded = |(vm, epoch): &(VmId, Epoch)| {
            state
                .vms
                .get(vm)
                .is_some_and(|vm| *epoch <= vm.last_epoch && !vm.tenures().any(|t| t.node == me && t.epoch == *epoch))
        };
        let processes = self.hosts[host].keeper.processes.iter();
        let over: Vec<_> =
            processes.filter(|(tag, _)| superseded(tag)).map(|(tag, qemu)| (*tag, qemu.is_dead())).collect();
        for ((vm, epoch), dead) in over {
            if dead {
                self.hosts[host].keeper.processes.remove(&(vm, epoch));
            } else {
                self.kill(host, vm, epoch, "killed");
            }
        }
    }

    fn work_on(&mut self, host: usize, state: &ClusterState, vm: &Vm, tenure: &Tenure) -> Option<Run> {
        let qemu = self.hosts[host].keeper.processes.get(&(vm.id, tenure.epoch)).cloned();
        match &vm.placement {
            Placement::Nowhere => None,
            Placement::On(_) => self.settled(host, state, vm, tenure, qemu),
            Placement::Moving { from, to, stage, cancel, .. } if from.node == tenure.node => {
                self.source(host, state, vm, (from, to), (stage, *cancel), qemu)
            }
            Placement::Moving { from, to, .. } => self.target(host, state, vm, (from, to), qemu),
        }
    }

    fn start(&mut self, host: usize, vm: &Vm, tenure: &Tenure, incoming: bool) -> Option<Run> {
        if self.chance(5) {
            self.keeper_retire(host, vm.id, tenure.epoch);
        }
        match self.keeper_start(host, vm.id, tenure, incoming) {
            Ok(()) => Some(Run::Starting),
            Err(Refused::EpochUsed) => Some(Run::StartFailed { detail: "its epoch is used up".into() }),
            Err(Refused::NoLease | Refused::WrongTerm | Refused::AlreadyRunning) => None,
        }
    }

    fn settled(
        &mut self,
        host: usize,
        state: &ClusterState,
        vm: &Vm,
        tenure: &Tenure,
        qemu: Option<Qemu>,
    ) -> Option<Run> {
        let restart = vm.restart == Some(tenure.epoch);
        let Some(qemu) = qemu else {
            if state.is_void(tenure) {
                return None;
            }
            if !vm.desired.wants_qemu() {
                self.keeper_retire(host, vm.id, tenure.epoch);
                return Some(Run::StartFailed { detail: "it is not wanted any more".into() });
            }
            return self.start(host, vm, tenure, false);
        };
        let (id, epoch) = (vm.id, tenure.epoch);
        match qemu.stage {
            Stage::Dead(why) => Some(ended(why)),
            _ if vm.desired == Desired::ForcedOff => {
                self.kill(host, id, epoch, "killed");
                Some(Run::Stopping)
            }
            Stage::GuestOff if !vm.desired.wants_qemu() || restart => {
                self.kill(host, id, epoch, "the guest shut down");
                Some(Run::Stopping)
            }
            Stage::GuestOff => Some(Run::GuestShutdown),
            Stage::Sent => Some(Run::Sent),
            Stage::Waiting | Stage::Loaded => None,
            _ if vm.desired == Desired::Stopped || restart => {
                if let Some(qemu) = self.hosts[host].keeper.processes.get_mut(&(id, epoch))
                    && qemu.stage == Stage::Paused
                {
                    // A guest that stands still does not see the button.
                    qemu.stage = Stage::Running;
                }
                self.power_button(host, id, epoch);
                Some(Run::Stopping)
            }
            Stage::Booting => Some(Run::Starting),
            Stage::Running | Stage::Paused => {
                // QMP `migrate_cancel` does nothing where nothing moves.
                self.stay(host, id, epoch, "it was given up");
                let paused = vm.desired == Desired::Paused;
                if let Some(qemu) = self.hosts[host].keeper.processes.get_mut(&(id, epoch)) {
                    qemu.stage = if paused { Stage::Paused } else { Stage::Running };
                }
                Some(if paused { Run::Paused } else { Run::Running })
            }
        }
    }

    fn source(
        &mut self,
        host: usize,
        state: &ClusterState,
        vm: &Vm,
        (from, to): (&Tenure, &Tenure),
        (stage, cancel): (&MoveStage, bool),
        qemu: Option<Qemu>,
    ) -> Option<Run> {
        let (id, epoch) = (vm.id, from.epoch);
        let Some(qemu) = qemu else {
            if state.is_void(from) {
                return None;
            }
            self.keeper_retire(host, id, epoch);
            self.word(host, vm.id, to, false);
            return Some(Run::Exited { detail: "it is gone".into() });
        };
        let target_void = state.is_void(to);
        let kept = |why: &str| Some(Run::Kept { why: why.into() });
        match qemu.stage {
            Stage::Dead(why) => {
                self.word(host, id, to, false);
                return Some(ended(why));
            }
            Stage::Sent => {
                if target_void || self.hosts[host].agent.targets_over.contains(&(id, to.epoch)) {
                    self.kill(host, id, epoch, "the target lost the guest");
                } else {
                    self.word(host, id, to, true);
                }
                return Some(Run::Sent);
            }
            Stage::Waiting | Stage::Loaded => return None,
            Stage::GuestOff | Stage::Booting | Stage::Running | Stage::Paused => {}
        }
        if *stage == MoveStage::Preparing {
            return Some(match qemu.stage {
                Stage::GuestOff => Run::Kept { why: "the guest shut down".into() },
                Stage::Paused => Run::Paused,
                Stage::Booting => Run::Starting,
                _ => Run::Running,
            });
        }
        if !self.hosts[host].agent.caught_up {
            return Some(Run::Running);
        }
        let leaving = qemu.leaving.filter(|leaving| leaving.to == to.epoch);
        let give_up = match qemu.stage {
            _ if cancel => Some("it was cancelled"),
            _ if target_void => Some("the target was lost"),
            Stage::GuestOff => Some("the guest shut down"),
            _ => None,
        };
        match (leaving.map(|leaving| (leaving.state, leaving.percent)), give_up) {
            (Some((LeavingState::Failed(why), _)), _) => kept(why),
            (None, Some(why)) => kept(why),
            (Some(_), Some(why)) => {
                self.stay(host, id, epoch, why);
                let failed = self.hosts[host].keeper.processes.get(&(id, epoch));
                match failed.and_then(|qemu| qemu.leaving).map(|leaving| leaving.state) {
                    Some(LeavingState::Failed(why)) => kept(why),
                    _ => Some(Run::Running),
                }
            }
            (None, None) => {
                self.migrate_away(host, id, epoch, *to);
                Some(Run::Sending { progress: Progress { percent: 0, note: "RAM".into() } })
            }
            (Some((_, percent)), None) => Some(Run::Sending { progress: Progress { percent, note: "RAM".into() } }),
        }
    }

    fn target(
        &mut self,
        host: usize,
        state: &ClusterState,
        vm: &Vm,
        (from, to): (&Tenure, &Tenure),
        qemu: Option<Qemu>,
    ) -> Option<Run> {
        let (id, epoch) = (vm.id, to.epoch);
        let source_void = state.is_void(from);
        let Some(qemu) = qemu else {
            if state.is_void(to) {
                return None;
            }
            if source_void {
                self.keeper_retire(host, id, epoch);
                return Some(Run::StartFailed { detail: "the source is lost".into() });
            }
            return self.start(host, vm, to, true);
        };
        let waiting = || Some(Run::Waiting { address: format!("10.77.1.{}:{}", host + 1, 49_152 + epoch.0) });
        match qemu.stage {
            Stage::Dead(why) => Some(ended(why)),
            Stage::Loaded if self.mutated(Mutation::ContinueWithoutWord) => {
                self.continue_guest(host, id, epoch);
                waiting()
            }
            Stage::Loaded if source_void && self.mutated(Mutation::ContinueForTheLost) => {
                self.continue_guest(host, id, epoch);
                waiting()
            }
            // Without the source's word nobody knows whether its guest went on
            // after it sent this one, and wrote to its disks.
            Stage::Waiting | Stage::Loaded if source_void => {
                self.kill(host, id, epoch, "the source is lost");
                waiting()
            }
            Stage::Waiting | Stage::Loaded => waiting(),
            Stage::Paused => Some(Run::Paused),
            Stage::Booting | Stage::Running | Stage::GuestOff => Some(Run::Running),
            Stage::Sent => None,
        }
    }

    /// Tells the target's agent; again and again until the state has moved on.
    fn word(&mut self, host: usize, vm: VmId, to: &Tenure, sent: bool) {
        let now = self.now;
        let said = self.hosts[host].agent.word_at.get(&vm);
        if said.is_some_and(|at| now - at < REPEAT_MS * MS) {
            return;
        }
        self.hosts[host].agent.word_at.insert(vm, now);
        let target = self.host_with(to);
        self.send(host, target, Message::Word(Word { vm, to: to.epoch, sent }));
    }

    fn disk_work(&mut self, host: usize, vm: &Vm, me: NodeId, report: &mut NodeReport) {
        let (node, job) = match &vm.disks {
            DiskStage::Ready => return,
            DiskStage::Making { node, job, .. } | DiskStage::Deleting { node, job } => (*node, *job),
        };
        if node != me {
            return;
        }
        let us = self.draw(50_000, 1_500_000);
        let done = self.now + us * 1_000;
        let done = *self.hosts[host].agent.work.entry(job).or_insert(done);
        let end = (self.now >= done).then_some(Ok(()));
        report.work.insert(job, WorkReport { progress: Progress::default(), end });
    }
}

fn ended(why: &str) -> Run {
    match why {
        FENCED => Run::Fenced,
        LOCKED => Run::Locked { detail: why.into() },
        _ => Run::Exited { detail: why.into() },
    }
}
