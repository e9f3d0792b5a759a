//! How jobs end: each by what the state says of its VM, never by a timer.

use crate::model::*;

use super::ClusterState;

impl ClusterState {
    pub(super) fn end_job(&mut self, at_ms: u64, id: JobId, outcome: Outcome) {
        let Some(job) = self.jobs.get_mut(&id).filter(|job| job.end.is_none()) else {
            return;
        };
        if outcome == Outcome::Done {
            job.progress.percent = 100;
        }
        job.end = Some(JobEnd { at_ms, outcome: outcome.clone() });
        let (subject, work) = (format!("vm {}", job.vm_name), job.work.verb());
        match outcome {
            Outcome::Done => self.event(at_ms, Severity::Info, subject, format!("{work}: done (job {id})")),
            Outcome::Cancelled => self.event(at_ms, Severity::Info, subject, format!("{work}: cancelled (job {id})")),
            Outcome::Failed { why } => {
                self.event(at_ms, Severity::Warning, subject, format!("{work}: failed (job {id}): {why}"));
            }
        }
    }

    /// Ends every job whose end the state shows.
    pub(super) fn settle_jobs(&mut self, at_ms: u64) {
        let ended: Vec<_> = self.running_jobs().filter_map(|job| Some((job.id, self.outcome(job)?))).collect();
        for (id, outcome) in ended {
            self.end_job(at_ms, id, outcome);
        }
    }

    fn outcome(&self, job: &Job) -> Option<Outcome> {
        let Some(vm) = self.vms.get(&job.vm) else {
            return Some(match job.work {
                Work::Delete => Outcome::Done,
                _ => Outcome::Failed { why: "the VM is gone".into() },
            });
        };
        let ready = vm.disks == DiskStage::Ready;
        match job.work {
            Work::Create { start: false } => ready.then_some(Outcome::Done),
            Work::Create { start: true } | Work::Start | Work::Pause | Work::Resume => {
                if ready {
                    vm.started()
                } else {
                    None
                }
            }
            Work::Stop => (vm.placement == Placement::Nowhere).then_some(Outcome::Done),
            // Not by the epoch: a migration that came to nothing uses up one as well.
            Work::Restart { .. } => {
                if vm.restart.is_none() || vm.placement == Placement::Nowhere {
                    vm.started()
                } else {
                    None
                }
            }
            // These end where they are decided: the state alone does not show how.
            Work::Delete | Work::Migrate { .. } => None,
        }
    }
}

impl Vm {
    /// How the wish to have it running has ended, if it has.
    fn started(&self) -> Option<Outcome> {
        match (&self.hold, &self.seen) {
            (Some(Hold::Failed { why } | Hold::NoRoom { why } | Hold::DiskLocked { why, .. }), _) => {
                Some(Outcome::Failed { why: why.clone() })
            }
            (Some(Hold::NotProtected), _) => Some(Outcome::Failed {
                why: "its node was lost, and a VM of priority none is not restarted elsewhere".into(),
            }),
            (_, Seen::Running) if self.desired == Desired::Running => Some(Outcome::Done),
            (_, Seen::Paused) if self.desired == Desired::Paused => Some(Outcome::Done),
            _ if !self.desired.wants_qemu() => Some(Outcome::Failed { why: "it was switched off meanwhile".into() }),
            _ => None,
        }
    }
}

impl Work {
    /// What it does, for a person.
    pub fn verb(&self) -> &'static str {
        match self {
            Work::Create { .. } => "create",
            Work::Start => "start",
            Work::Pause => "pause",
            Work::Resume => "resume",
            Work::Stop => "stop",
            Work::Restart { .. } => "restart",
            Work::Delete => "delete",
            Work::Migrate { .. } => "migrate",
        }
    }
}
