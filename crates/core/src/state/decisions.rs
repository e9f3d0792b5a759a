//! What each decision of the coordinator does to the state.
//!
//! The coordinator tries its decisions on a copy of the state first, with this
//! same code, so a decision that does not apply here is a defect: it is passed
//! over (on every node alike) rather than half-done.

use crate::model::*;
use crate::plan::{Action, Decision};

use super::ClusterState;

impl ClusterState {
    pub(crate) fn decide(&mut self, at_ms: u64, decision: &Decision) {
        let cause = &decision.cause;
        match &decision.action {
            Action::DeclareLost { node } => self.declare_lost(at_ms, *node, cause),
            Action::Forget { node } => self.forget_node(at_ms, *node),
            Action::Admit { node, incarnation } => self.admit(at_ms, *node, *incarnation),
            Action::Place { vm, node, after: _ } => self.place(at_ms, *vm, *node, cause),
            Action::Vacate { vm, after: _ } => {
                let Some(vm) = self.vms.get_mut(vm) else {
                    return;
                };
                let moving = match std::mem::take(&mut vm.placement) {
                    Placement::Moving { job, .. } => Some(job),
                    _ => None,
                };
                vm.seen = Seen::Nothing;
                vm.restart = None;
                vm.hold.take_if(|hold| matches!(hold, Hold::DiskLocked { .. }));
                vm.remember(at_ms, "runs nowhere", cause.clone());
                let (subject, text) = (format!("vm {}", vm.name), format!("is off: {cause}"));
                self.event(at_ms, Severity::Info, subject, text);
                if let Some(job) = moving {
                    self.end_job(at_ms, job, Outcome::Failed { why: format!("the VM is off: {cause}") });
                }
            }
            Action::Hold { vm, hold } => {
                let Some(vm) = self.vms.get_mut(vm) else {
                    return;
                };
                vm.hold = Some(hold.clone());
                let subject = format!("vm {}", vm.name);
                match hold {
                    Hold::DiskLocked { tries, .. } => {
                        vm.remember_try(at_ms, "waits for its disk", cause);
                        if *tries == 1 {
                            let text = format!("waits until its disk is free: {cause}");
                            self.event(at_ms, Severity::Warning, subject, text);
                        }
                    }
                    _ => {
                        vm.remember(at_ms, "stays off", cause.clone());
                        self.event(at_ms, Severity::Error, subject, format!("stays off: {cause}"));
                    }
                }
            }
            Action::SwitchOff { vm } => {
                let Some(vm) = self.vms.get_mut(vm) else {
                    return;
                };
                vm.desired = Desired::Stopped;
                vm.remember(at_ms, "to be off", cause.clone());
            }
            Action::GiveUpStop { vm } => {
                let Some(vm) = self.vms.get_mut(vm) else {
                    return;
                };
                vm.desired = Desired::Running;
                let (vm, why) = (vm.id, cause.to_string());
                self.end_jobs_of(at_ms, vm, |work| matches!(work, Work::Stop), &Outcome::Failed { why });
            }
            Action::GiveUpRestart { vm } => {
                let Some(vm) = self.vms.get_mut(vm) else {
                    return;
                };
                vm.restart = None;
                let (vm, why) = (vm.id, cause.to_string());
                self.end_jobs_of(at_ms, vm, |work| matches!(work, Work::Restart { .. }), &Outcome::Failed { why });
            }
            Action::Transfer { vm, address: listens } => {
                if let Some(Placement::Moving { stage, .. }) = self.vms.get_mut(vm).map(|vm| &mut vm.placement) {
                    *stage = MoveStage::Transferring { address: listens.clone() };
                }
            }
            Action::FinishMove { vm, moved } => {
                if let Some(Placement::Moving { job, .. }) = self.vms.get(vm).map(|vm| &vm.placement)
                    && let Some(job) = self.jobs.get_mut(job)
                {
                    job.moved = *moved;
                }
                self.end_move(at_ms, *vm, true, cause);
            }
            Action::AbortMove { vm } => self.end_move(at_ms, *vm, false, cause),
            Action::Saw { vm, seen } => self.saw(at_ms, *vm, seen),
            Action::Progress { job, progress } => {
                if let Some(job) = self.jobs.get_mut(job) {
                    job.progress = progress.clone();
                }
            }
            Action::DisksMade { vm } => {
                let Some(vm) = self.vms.get_mut(vm) else {
                    return;
                };
                if let DiskStage::Making { sources, .. } = std::mem::take(&mut vm.disks)
                    && sources.start
                {
                    vm.desired = Desired::Running;
                    vm.remember(at_ms, "to be started", cause.clone());
                }
            }
            Action::DisksFailed { vm, why } => {
                // Nothing half-made: a VM whose disks could not be made never was.
                if let Some(vm) = self.vms.remove(vm) {
                    self.unmake_lun_files(vm.id);
                    self.end_jobs_of(at_ms, vm.id, |_| true, &Outcome::Failed { why: why.clone() });
                }
            }
            Action::DisksDeleted { vm } => {
                self.vms.remove(vm);
                self.drop_lun_files(*vm);
            }
            Action::DeleteFailed { vm, why } => {
                let Some(vm) = self.vms.get_mut(vm) else {
                    return;
                };
                vm.disks = DiskStage::Ready;
                let vm = vm.id;
                self.end_jobs_of(at_ms, vm, |work| matches!(work, Work::Delete), &Outcome::Failed { why: why.clone() });
            }
            Action::SeatWitness { host } => self.seat_witness(at_ms, *host),
            Action::WitnessHosted { node, epoch } => self.witness_hosted(at_ms, *node, *epoch),
            Action::WitnessTrouble { node, why } => self.witness_trouble(at_ms, *node, why.as_ref()),
            Action::WitnessMissing { seen, .. } => {
                if let Some(witness) = &mut self.witness {
                    witness.missing = witness.missing.max(*seen);
                }
            }
            Action::PathIs { volume, node, path } => self.path_is(at_ms, volume, *node, path),
            Action::LeaveVolume { volume } => self.leave_volume(at_ms, volume, cause),
            Action::OwnVolume { volume, to, after } => self.own_volume(at_ms, volume, *to, *after, cause),
            Action::MoveAway { vm, to } => {
                if let Ok((from, to)) = self.can_move(*vm, Some(*to)) {
                    self.begin_move(at_ms, "coordinator", *vm, from, to, cause.clone());
                }
            }
            Action::LeasesSettled => self.settings.longest_lease = self.settings.profile.timing(),
        }
    }

    fn declare_lost(&mut self, at_ms: u64, id: NodeId, cause: &Cause) {
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        node.membership = Membership::Lost { since_ms: at_ms };
        if node.leaves {
            return;
        }
        let subject = format!("node {}", node.name);
        self.event(at_ms, Severity::Error, subject, format!("is lost: {cause}"));
    }

    fn admit(&mut self, at_ms: u64, id: NodeId, incarnation: Incarnation) {
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        let first = node.term == NodeTerm(0);
        node.membership = Membership::Up;
        node.term = node.term.next();
        node.incarnation = incarnation;
        let (subject, term) = (format!("node {}", node.name), node.term);
        let text = if first { "is up".to_owned() } else { format!("is up again (term {term})") };
        self.event(at_ms, Severity::Info, subject, text);
    }

    fn place(&mut self, at_ms: u64, id: VmId, node: NodeId, cause: &Cause) {
        let Some(term) = self.nodes.get(&node).map(|node| node.term) else {
            return;
        };
        let node_name = self.node_name(node);
        let window_ms = self.settings.crash_window_s * 1000;
        let Some(vm) = self.vms.get_mut(&id) else {
            return;
        };
        if let Cause::Exited { node, .. } | Cause::StartFailed { node, .. } = cause {
            vm.crashes.retain(|crash| crash.at_ms.abs_diff(at_ms) < window_ms);
            vm.crashes.push(Crash { at_ms, node: *node });
        }
        let moving = match &vm.placement {
            Placement::Moving { job, .. } => Some(*job),
            _ => None,
        };
        vm.last_epoch = vm.last_epoch.next();
        vm.placement = Placement::On(Tenure { node, term, epoch: vm.last_epoch });
        vm.seen = Seen::Nothing;
        vm.restart = None;
        let epoch = vm.last_epoch;
        let what = format!("to run on {node_name} (epoch {epoch})");
        if let (Cause::DiskLocked { .. }, Some(Hold::DiskLocked { .. })) = (cause, &vm.hold) {
            // It waits until it was seen to run: one more try is no news.
            vm.remember_try(at_ms, &what, cause);
            return;
        }
        vm.hold = None;
        vm.remember(at_ms, what, cause.clone());
        let subject = format!("vm {}", vm.name);
        let severity = match cause {
            Cause::Exited { .. } | Cause::StartFailed { .. } => Severity::Warning,
            cause if cause.is_loss_of_node() => Severity::Warning,
            _ => Severity::Info,
        };
        self.event(at_ms, severity, subject, format!("starts on {node_name}: {cause}"));
        if let Some(job) = moving {
            self.end_job(at_ms, job, Outcome::Failed { why: format!("the VM had to be started anew: {cause}") });
        }
    }

    fn end_move(&mut self, at_ms: u64, id: VmId, finished: bool, cause: &Cause) {
        let Some(vm) = self.vms.get_mut(&id) else {
            return;
        };
        let Placement::Moving { from, to, job, cancel, .. } = vm.placement.clone() else {
            return;
        };
        let owner = if finished { to } else { from };
        vm.placement = Placement::On(owner);
        let what = if finished { "was migrated" } else { "stays where it was" };
        vm.remember(at_ms, what, cause.clone());
        let outcome = match (finished, cancel) {
            (true, _) => Outcome::Done,
            (false, true) => Outcome::Cancelled,
            (false, false) => Outcome::Failed { why: cause.to_string() },
        };
        self.end_job(at_ms, job, outcome);
    }

    fn saw(&mut self, at_ms: u64, id: VmId, seen: &Seen) {
        let Some(vm) = self.vms.get_mut(&id) else {
            return;
        };
        let was = std::mem::replace(&mut vm.seen, seen.clone());
        if matches!(seen, Seen::Running | Seen::Paused) {
            vm.hold.take_if(|hold| matches!(hold, Hold::DiskLocked { .. }));
        }
        let (subject, node) = (format!("vm {}", vm.name), vm.node());
        let on = node.map_or_else(String::new, |node| format!(" on {}", self.node_name(node)));
        let full = self.vms.get(&id).and_then(|vm| crate::explain::waits_for_room(self, vm)).map(str::to_owned);
        match (was, seen) {
            (Seen::Paused, Seen::Running) => self.event(at_ms, Severity::Info, subject, format!("goes on{on}")),
            (_, Seen::Running) => self.event(at_ms, Severity::Info, subject, format!("runs{on}")),
            (_, Seen::Paused) if let Some(volume) = full => {
                let text = format!("stands still{on}: it waits for room on volume {volume}, which is full");
                self.event(at_ms, Severity::Warning, subject, text);
            }
            (_, Seen::Paused) => self.event(at_ms, Severity::Info, subject, format!("is paused{on}")),
            _ => {}
        }
    }

    fn end_jobs_of(&mut self, at_ms: u64, vm: VmId, which: impl Fn(&Work) -> bool, outcome: &Outcome) {
        let jobs: Vec<_> =
            self.running_jobs().filter(|job| job.vm == vm && which(&job.work)).map(|job| job.id).collect();
        for job in jobs {
            self.end_job(at_ms, job, outcome.clone());
        }
    }
}
