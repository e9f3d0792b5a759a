//! Decisions about one VM that is not on the move.

use crate::model::*;
use crate::observed::Run;
use crate::placement::{self, Denial};

use super::{Action, Ended, Evidence, Planner};

/// How long after a try that found a disk locked the next one follows, in
/// milliseconds: twice as long each time, up to 8 s.
fn unlock_pause_ms(tries: u32) -> u64 {
    500 << tries.saturating_sub(1).min(4)
}

impl Planner<'_> {
    pub(super) fn vm(&mut self, id: VmId) {
        let Some(vm) = self.state.vms.get(&id).cloned() else {
            return;
        };
        match &vm.disks {
            DiskStage::Ready => {}
            DiskStage::Making { node, job, .. } => return self.disk_work(&vm, *node, *job, true),
            DiskStage::Deleting { node, job } => return self.disk_work(&vm, *node, *job, false),
        }
        match vm.placement {
            Placement::Nowhere => {
                let blocked = matches!(vm.hold, Some(Hold::Failed { .. } | Hold::NotProtected));
                if vm.desired.wants_qemu() && !blocked {
                    let cause = vm.causes.last().map_or_else(|| by_hand(&vm), |because| because.cause.clone());
                    self.place_anew(&vm, Vec::new(), cause);
                }
            }
            Placement::On(tenure) if self.state.is_void(&tenure) => {
                let cause = self.why_void(&tenure);
                self.after_loss(&vm, vec![Ended { tenure, evidence: Evidence::TermOver }], cause);
            }
            Placement::On(tenure) => self.placed(&vm, tenure),
            Placement::Moving { .. } => self.moving(&vm),
        }
    }

    /// What to do about a VM whose every right to run was lost with its node.
    pub(super) fn after_loss(&mut self, vm: &Vm, after: Vec<Ended>, cause: Cause) {
        if !vm.desired.wants_qemu() {
            self.decide(Action::Vacate { vm: vm.id, after }, cause);
        } else if vm.spec.priority == Priority::None {
            self.decide(Action::Vacate { vm: vm.id, after }, cause.clone());
            self.decide(Action::Hold { vm: vm.id, hold: Hold::NotProtected }, cause);
        } else {
            self.place_anew(vm, after, cause);
        }
    }

    /// Places a VM on the best node, or says why it stays off until there is one.
    fn place_anew(&mut self, vm: &Vm, after: Vec<Ended>, cause: Cause) {
        match placement::choose(&self.state, vm.id, &vm.spec, &[], &self.quiet()) {
            Ok((node, _)) => self.decide(Action::Place { vm: vm.id, node, after }, cause),
            Err(denials) => {
                if !after.is_empty() {
                    self.decide(Action::Vacate { vm: vm.id, after }, cause);
                }
                let why = placement::tell(&self.state, &denials);
                if !matches!(vm.hold, Some(Hold::NoRoom { .. })) {
                    let cause = Cause::NoRoom { why: why.clone() };
                    self.decide(Action::Hold { vm: vm.id, hold: Hold::NoRoom { why } }, cause);
                }
            }
        }
    }

    /// A VM whose node holds its right: what the node says of it decides.
    fn placed(&mut self, vm: &Vm, tenure: Tenure) {
        let Some(node) = self.state.nodes.get(&tenure.node) else {
            return;
        };
        let Some(run) = self.observed.run_of(node, vm.id, &tenure).cloned() else {
            return;
        };
        let over = |detail: String| Cause::Exited { node: tenure.node, epoch: tenure.epoch, detail };
        let ended = run.is_over();
        match run {
            Run::Exited { detail } if vm.restart == Some(tenure.epoch) => self.again(vm, tenure, over(detail)),
            Run::Exited { detail } if vm.desired.wants_qemu() => self.crashed(vm, tenure, over(detail)),
            Run::Fenced if vm.desired.wants_qemu() => {
                self.again(vm, tenure, Cause::Fenced { node: tenure.node, epoch: tenure.epoch });
            }
            Run::Locked { detail } if vm.desired.wants_qemu() => self.locked(vm, tenure, detail),
            Run::Exited { .. } | Run::StartFailed { .. } | Run::Fenced | Run::Locked { .. }
                if !vm.desired.wants_qemu() =>
            {
                let after = vec![Ended { tenure, evidence: Evidence::Exited }];
                let asked = vm
                    .causes
                    .iter()
                    .rev()
                    .find(|because| matches!(because.cause, Cause::Requested { .. } | Cause::GuestShutdown { .. }));
                let ended = || over("it was to be off".into());
                let cause = asked.map_or_else(ended, |because| because.cause.clone());
                self.decide(Action::Vacate { vm: vm.id, after }, cause);
            }
            Run::StartFailed { detail } => {
                let cause = Cause::StartFailed { node: tenure.node, epoch: tenure.epoch, detail };
                self.crashed(vm, tenure, cause);
            }
            Run::GuestShutdown if vm.desired.wants_qemu() && vm.restart.is_none() => {
                let cause = Cause::GuestShutdown { node: tenure.node, epoch: tenure.epoch };
                self.decide(Action::SwitchOff { vm: vm.id }, cause);
            }
            Run::Starting => self.saw(vm, Seen::Starting),
            // A guest that a finished or given-up migration left here runs here.
            Run::Running | Run::Kept { .. } => self.saw(vm, Seen::Running),
            Run::Paused => self.saw(vm, Seen::Paused),
            Run::Stopping => self.saw(vm, Seen::Stopping),
            _ => {}
        }
        if !ended {
            self.give_up_waiting(vm);
            self.leave_drained(vm, tenure);
            self.leave_bad_path(vm, tenure);
        }
    }

    pub(super) fn saw(&mut self, vm: &Vm, seen: Seen) {
        if vm.seen != seen {
            let cause = why_wanted(vm);
            self.decide(Action::Saw { vm: vm.id, seen }, cause);
        }
    }

    /// QEMU died under a VM that should run: in place while the budget lasts,
    /// then on another node while its budget lasts, then not at all.
    pub(super) fn crashed(&mut self, vm: &Vm, tenure: Tenure, cause: Cause) {
        let after = vec![Ended { tenure, evidence: Evidence::Exited }];
        let settings = &self.state.settings;
        let (window_s, budget) = (settings.crash_window_s, settings.crash_budget);
        let recent = |crash: &&Crash| crash.at_ms.abs_diff(self.now_ms) < window_s * 1000;
        let on = |node: NodeId| vm.crashes.iter().filter(recent).filter(|crash| crash.node == node).count() as u32;
        let in_all = vm.crashes.iter().filter(recent).count() as u32;
        let here = on(tenure.node);
        // What cannot be started here will not be startable a moment later: elsewhere at once.
        let stays = matches!(cause, Cause::Exited { .. }) && here < budget;
        let spent: Vec<_> =
            self.state.nodes.keys().copied().filter(|node| *node == tenure.node || on(*node) >= budget).collect();
        let (Cause::Exited { detail, .. } | Cause::StartFailed { detail, .. }) = &cause else {
            return;
        };
        let detail = detail.clone();
        if stays
            && self
                .state
                .nodes
                .get(&tenure.node)
                .is_some_and(|node| placement::fits(&self.state, node, Some(vm.id), &vm.spec).is_ok())
        {
            return self.decide(Action::Place { vm: vm.id, node: tenure.node, after }, cause);
        }
        match placement::choose(&self.state, vm.id, &vm.spec, &spent, &self.quiet()) {
            Ok((node, _)) if in_all < 2 * budget => self.decide(Action::Place { vm: vm.id, node, after }, cause),
            // No fault of its own: it waits until somebody reaches its disks.
            Err(denials) if denials.iter().any(|(_, denial)| matches!(denial, Denial::NoPath { .. })) => {
                self.place_anew(vm, after, cause);
            }
            _ => {
                let why = format!("{cause}; {} crashes in the last {window_s} s", in_all + 1);
                self.decide(Action::Vacate { vm: vm.id, after }, cause);
                let cause = Cause::BudgetSpent { crashes: in_all + 1, window_s, detail };
                self.decide(Action::Hold { vm: vm.id, hold: Hold::Failed { why } }, cause);
            }
        }
    }

    /// Another QEMU has a disk open. That is no fault of this VM: it waits, and is tried
    /// again under a new epoch, ever more rarely, until the lock is free.
    fn locked(&mut self, vm: &Vm, tenure: Tenure, why: String) {
        let now_ms = self.now_ms;
        let cause = Cause::DiskLocked { node: tenure.node, epoch: tenure.epoch, detail: why.clone() };
        let (epoch, tried_ms) = (tenure.epoch, now_ms);
        let hold = match vm.hold {
            Some(Hold::DiskLocked { epoch: of, tries, tried_ms, .. }) if of == epoch => {
                // A clock that was set back keeps nobody waiting.
                if now_ms.abs_diff(tried_ms) >= unlock_pause_ms(tries) {
                    self.again(vm, tenure, cause);
                }
                return;
            }
            Some(Hold::DiskLocked { tries, since_ms, .. }) => {
                Hold::DiskLocked { why, epoch, tries: tries.saturating_add(1), since_ms, tried_ms }
            }
            _ => Hold::DiskLocked { why, epoch, tries: 1, since_ms: now_ms, tried_ms },
        };
        self.decide(Action::Hold { vm: vm.id, hold }, cause);
    }

    /// The old run ended as a restart wanted it: start again, here if possible.
    fn again(&mut self, vm: &Vm, tenure: Tenure, fallback: Cause) {
        let after = vec![Ended { tenure, evidence: Evidence::Exited }];
        let cause = self.asked_for_restart(vm).unwrap_or(fallback);
        let here = self.state.nodes.get(&tenure.node);
        if here.is_some_and(|node| placement::fits(&self.state, node, Some(vm.id), &vm.spec).is_ok()) {
            return self.decide(Action::Place { vm: vm.id, node: tenure.node, after }, cause);
        }
        self.place_anew(vm, after, cause);
    }

    fn asked_for_restart(&self, vm: &Vm) -> Option<Cause> {
        let restarting = |job: &&Job| job.vm == vm.id && matches!(job.work, Work::Restart { .. });
        self.state.running_jobs().find(restarting).map(|job| Cause::Requested { by: job.by.clone() })
    }

    /// A guest that does not react to its power button goes on, and the job says so.
    fn give_up_waiting(&mut self, vm: &Vm) {
        let timeout_ms = u64::from(vm.spec.stop_timeout_s) * 1000;
        let waits = |job: &&Job| match job.work {
            Work::Stop => job.vm == vm.id && vm.desired == Desired::Stopped,
            Work::Restart { .. } => job.vm == vm.id && vm.restart.is_some(),
            _ => false,
        };
        let Some(job) = self.state.running_jobs().find(waits).cloned() else { return };
        if !self.is_older(job.id, timeout_ms) {
            return;
        }
        let cause = Cause::NoReaction { seconds: vm.spec.stop_timeout_s };
        match job.work {
            Work::Stop => self.decide(Action::GiveUpStop { vm: vm.id }, cause),
            _ => self.decide(Action::GiveUpRestart { vm: vm.id }, cause),
        }
    }

    /// Whether a job began longer than `age_ms` ago; or so much later than now, because
    /// a clock was set back: nothing waits for it to catch up.
    pub(super) fn is_older(&self, job: JobId, age_ms: u64) -> bool {
        let old = |job: &Job| self.now_ms.abs_diff(job.began_ms) >= age_ms;
        self.state.jobs.get(&job).is_some_and(old)
    }

    fn disk_work(&mut self, vm: &Vm, node: NodeId, job: JobId, making: bool) {
        let cause = by_hand(vm);
        let gone = match self.state.nodes.get(&node) {
            Some(node) if node.is_up() => None,
            _ => Some(format!("{} was lost while it worked on the disks", self.state.node_name(node))),
        };
        let report = self
            .state
            .nodes
            .get(&node)
            .and_then(|known| self.observed.nodes.get(&node)?.report_in_term(known)?.work.get(&job).cloned());
        let end = match (&report, gone) {
            (Some(report), None) => report.end.clone(),
            (_, Some(why)) => Some(Err(why)),
            (None, None) => None,
        };
        match end {
            Some(Ok(())) if making => self.decide(Action::DisksMade { vm: vm.id }, cause),
            Some(Ok(())) => self.decide(Action::DisksDeleted { vm: vm.id }, cause),
            Some(Err(why)) if making => self.decide(Action::DisksFailed { vm: vm.id, why }, cause),
            Some(Err(why)) => self.decide(Action::DeleteFailed { vm: vm.id, why }, cause),
            None => {
                if let Some(report) = report {
                    self.progress(job, report.progress);
                }
            }
        }
    }

    /// Commits progress in steps, so that a long job does not fill the log.
    pub(super) fn progress(&mut self, job: JobId, progress: Progress) {
        let Some(known) = self.state.jobs.get(&job) else {
            return;
        };
        let stepped = progress.percent.abs_diff(known.progress.percent) >= 5 || known.progress.note.is_empty();
        if stepped && progress != known.progress {
            let cause = Cause::Requested { by: known.by.clone() };
            self.decide(Action::Progress { job, progress }, cause);
        }
    }

    pub(super) fn why_void(&self, tenure: &Tenure) -> Cause {
        match self.state.nodes.get(&tenure.node) {
            Some(node) if node.is_up() => Cause::KeeperRestarted { node: node.id, incarnation: node.incarnation },
            _ => {
                let seen = self.observed.nodes.get(&tenure.node);
                let silent_ms = seen.map_or(0, |seen| seen.silent_ms);
                let word = seen.filter(|seen| !seen.lease_ended).and_then(|seen| seen.fence.as_ref());
                if let Some(word) = word.filter(|word| word.term == tenure.term && word.is_confirmed()) {
                    return Cause::PowerFenced { node: tenure.node, word: word.clone() };
                }
                Cause::LeaseEnded { node: tenure.node, term: tenure.term, silent_ms }
            }
        }
    }
}

/// Why it should run where it does not yet: the user's wish, or what ended its
/// last run. A crash is not repeated here: it was counted when it happened.
fn why_wanted(vm: &Vm) -> Cause {
    let lost = |cause: &Cause| matches!(cause, Cause::Requested { .. }) || cause.is_loss_of_node();
    vm.causes
        .iter()
        .rev()
        .map(|because| &because.cause)
        .find(|cause| lost(cause))
        .cloned()
        .unwrap_or_else(|| by_hand(vm))
}

fn by_hand(vm: &Vm) -> Cause {
    let asked = vm.causes.iter().rev().find(|because| matches!(because.cause, Cause::Requested { .. }));
    asked.map_or_else(|| Cause::Requested { by: "its creator".into() }, |because| because.cause.clone())
}
