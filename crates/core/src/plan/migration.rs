//! Decisions about a VM on the move (safety rule 3).
//!
//! The target's guest is continued only after the source's QEMU said that it
//! has sent everything (`Run::Sent`, final), so at no instant both run. Who has
//! the guest at the end is never guessed: while both ends are in their terms
//! their words decide; when one is lost the survivor's word does; when both are
//! lost, or both QEMUs are dead, the VM is started anew.

use crate::model::*;
use crate::observed::Run;

use super::{Action, Ended, Evidence, Planner};

/// How long the target of a migration may take to get ready, in milliseconds.
const READY_MS: u64 = 60_000;

impl Planner<'_> {
    pub(super) fn moving(&mut self, vm: &Vm) {
        let Placement::Moving { from, to, job, stage, cancel } = vm.placement.clone() else {
            return;
        };
        let source = self.end_of(vm.id, from);
        let target = self.end_of(vm.id, to);

        if let (Some(first), Some(second)) = (source.over(from), target.over(to)) {
            // Both ends have lost it for good.
            let cause = self.why_over(&source, &target, from, to);
            let crashed = first.evidence == Evidence::Exited && second.evidence == Evidence::Exited;
            let after = vec![first, second];
            return match cause {
                Cause::Exited { .. } | Cause::StartFailed { .. } if crashed && !vm.desired.wants_qemu() => {
                    self.decide(Action::Vacate { vm: vm.id, after }, cause);
                }
                _ => self.after_loss(vm, after, cause),
            };
        }
        if let End::Alive(Some(Run::Running | Run::Paused)) = target {
            // The target's guest was continued, so the source has sent it.
            let moved = self.state.nodes.get(&to.node).and_then(|node| self.observed.said_of(node, vm.id, &to)?.moved);
            return self
                .decide(Action::FinishMove { vm: vm.id, moved }, Cause::TargetRuns { node: to.node, epoch: to.epoch });
        }
        let kept = |detail: String| Cause::SourceKept { node: from.node, epoch: from.epoch, detail };
        match (&source, &target, &stage) {
            (End::Alive(Some(Run::Kept { why })), ..) => {
                self.decide(Action::AbortMove { vm: vm.id }, kept(why.clone()));
            }
            // The source was never told where to send: the guest is still there.
            (
                End::Alive(_),
                End::Alive(Some(Run::StartFailed { detail } | Run::Exited { detail } | Run::Locked { detail })),
                MoveStage::Preparing,
            ) => {
                self.decide(Action::AbortMove { vm: vm.id }, kept(format!("the target could not take it: {detail}")));
            }
            (End::Alive(_), End::Void, MoveStage::Preparing) => {
                self.decide(Action::AbortMove { vm: vm.id }, kept("the target was lost".into()));
            }
            (End::Alive(_), _, MoveStage::Preparing) if cancel => {
                self.decide(Action::AbortMove { vm: vm.id }, kept("it was cancelled".into()));
            }
            (End::Alive(_), _, MoveStage::Preparing) if self.is_older(job, READY_MS) => {
                let why = format!("the target was not ready within {} s", READY_MS / 1000);
                self.decide(Action::AbortMove { vm: vm.id }, kept(why));
            }
            (End::Alive(_), End::Alive(Some(Run::Waiting { address })), MoveStage::Preparing) => {
                let cause = Cause::TargetWaits { node: to.node, epoch: to.epoch };
                self.decide(Action::Transfer { vm: vm.id, address: address.clone() }, cause);
            }
            (End::Alive(Some(Run::Sending { progress })), ..) => self.progress(job, progress.clone()),
            _ => {}
        }
    }

    fn end_of(&self, vm: VmId, tenure: Tenure) -> End {
        match self.state.nodes.get(&tenure.node) {
            Some(node) if !self.state.is_void(&tenure) => End::Alive(self.observed.run_of(node, vm, &tenure).cloned()),
            _ => End::Void,
        }
    }

    fn why_over(&self, source: &End, target: &End, from: Tenure, to: Tenure) -> Cause {
        let of = |end: &End, tenure: &Tenure| match end {
            End::Alive(Some(Run::Exited { detail })) => {
                Some(Cause::Exited { node: tenure.node, epoch: tenure.epoch, detail: detail.clone() })
            }
            End::Alive(Some(Run::StartFailed { detail })) => {
                Some(Cause::StartFailed { node: tenure.node, epoch: tenure.epoch, detail: detail.clone() })
            }
            End::Alive(Some(Run::Locked { detail })) => {
                Some(Cause::DiskLocked { node: tenure.node, epoch: tenure.epoch, detail: detail.clone() })
            }
            End::Alive(Some(Run::Fenced)) => Some(Cause::Fenced { node: tenure.node, epoch: tenure.epoch }),
            End::Alive(_) => None,
            End::Void => Some(self.why_void(tenure)),
        };
        let lost = Cause::is_loss_of_node;
        let (first, second) = (of(source, &from), of(target, &to));
        match (first, second) {
            (Some(first), Some(second)) if !lost(&first) && lost(&second) => second,
            (Some(first), _) => first,
            (None, Some(second)) => second,
            (None, None) => self.why_void(&from),
        }
    }
}

/// What is known of one end of a migration.
enum End {
    /// Its node was lost or admitted anew: nothing of it is alive.
    Void,
    /// Its node is in its term and said this, if anything.
    Alive(Option<Run>),
}

impl End {
    fn over(&self, tenure: Tenure) -> Option<Ended> {
        match self {
            End::Void => Some(Ended { tenure, evidence: Evidence::TermOver }),
            End::Alive(Some(run)) if run.is_over() => Some(Ended { tenure, evidence: Evidence::Exited }),
            End::Alive(_) => None,
        }
    }
}
