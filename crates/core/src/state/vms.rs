//! What a user can ask of a VM.

use crate::model::*;
use crate::placement;

use super::commands::{Executed, valid_name};
use super::{ClusterState, JOBS_KEPT, Refusal, Reply};

impl ClusterState {
    #[allow(clippy::too_many_arguments, reason = "the fields of one command")]
    pub(super) fn create_vm(
        &mut self,
        at_ms: u64,
        by: &str,
        id: VmId,
        name: String,
        spec: VmSpec,
        node: NodeId,
        sources: Sources,
    ) -> Executed {
        valid_name("VM", &name)?;
        if self.vm_named(&name).is_some() || self.vms.contains_key(&id) {
            return Err(Refusal::duplicate("VM", &name));
        }
        self.valid_spec(&spec)?;
        self.valid_lun_disks(&spec)?;
        if !self.nodes.contains_key(&node) {
            return Err(Refusal::unknown("node", node));
        }
        if let Err(denials) = placement::choose(self, id, &spec, &[], &[]) {
            return Err(Refusal::NoRoom { vm: name, why: placement::tell(self, &denials) });
        }
        let job = self.begin_job(at_ms, by, Work::Create { start: sources.start }, id, &name);
        self.event(at_ms, Severity::Info, format!("vm {name}"), format!("{by} created it"));
        self.make_lun_files(id, &spec);
        let vm = Vm {
            id,
            name,
            spec,
            desired: Desired::Stopped,
            placement: Placement::Nowhere,
            last_epoch: Epoch(0),
            seen: Seen::Nothing,
            restart: None,
            disks: DiskStage::Making { node, job, sources },
            hold: None,
            crashes: Vec::new(),
            causes: vec![Because { at_ms, what: "was created".into(), cause: Cause::Requested { by: by.into() } }],
            created_ms: at_ms,
        };
        self.vms.insert(id, vm);
        Ok(Reply::Job(job))
    }

    fn valid_spec(&self, spec: &VmSpec) -> Result<(), Refusal> {
        let invalid = |text: String| Err(Refusal::Invalid(text));
        if spec.cpus == 0 || spec.cpus > 512 {
            return invalid(format!("{} processors: a VM has 1 to 512", spec.cpus));
        }
        if spec.memory_bytes < 16 << 20 || !spec.memory_bytes.is_multiple_of(1 << 20) {
            return invalid(format!("{} bytes of memory: a VM has at least 16 MiB, in whole MiB", spec.memory_bytes));
        }
        for disk in &spec.disks {
            if !self.volumes.contains_key(&disk.volume) {
                return Err(Refusal::unknown("volume", &disk.volume));
            }
            if let Some(most) = disk.format.most_bytes().filter(|most| disk.size_bytes > *most) {
                let (format, most) = (disk.format.extension(), most >> 30);
                return invalid(format!(
                    "a disk of {} bytes: in format {format} it has {most} GiB at most",
                    disk.size_bytes
                ));
            }
            if disk.size_bytes == 0 || !disk.size_bytes.is_multiple_of(512) {
                return invalid(format!("a disk of {} bytes: its size is a positive multiple of 512", disk.size_bytes));
            }
        }
        if let Some(boot) = &spec.direct_boot
            && !self.volumes.contains_key(&boot.volume)
        {
            return Err(Refusal::unknown("volume", &boot.volume));
        }
        for nic in &spec.nics {
            if !self.switches.contains_key(&nic.switch) {
                return Err(Refusal::unknown("switch", &nic.switch));
            }
            if nic.vlan.is_some_and(|vlan| !(1..=4094).contains(&vlan)) {
                return invalid("a VLAN is 1 to 4094".into());
            }
            if let Some(vm) = self.vms.values().find(|vm| vm.spec.nics.iter().any(|other| other.mac == nic.mac)) {
                return Err(Refusal::Conflict(format!(
                    "VM {:?} has the hardware address {} already",
                    vm.name, nic.mac
                )));
            }
        }
        Ok(())
    }

    pub(super) fn set_desired(&mut self, at_ms: u64, by: &str, id: VmId, desired: Desired) -> Executed {
        let vm = self.ready_vm(id)?;
        let name = vm.name.clone();
        let was = vm.desired;
        let off = vm.placement == Placement::Nowhere;
        match desired {
            Desired::Running if was == Desired::Running && vm.hold.is_none() => {
                return Err(Refusal::Conflict(format!("VM {name:?} is started already")));
            }
            Desired::Running if !was.wants_qemu() && !off => {
                return Err(Refusal::Conflict(format!(
                    "VM {name:?} is still shutting down: wait, or stop it with --force"
                )));
            }
            Desired::Paused if !was.wants_qemu() || off => {
                return Err(Refusal::Conflict(format!("VM {name:?} does not run, so it cannot be paused")));
            }
            Desired::Paused if was == Desired::Paused => {
                return Err(Refusal::Conflict(format!("VM {name:?} is paused already")));
            }
            Desired::Stopped | Desired::ForcedOff if off && !was.wants_qemu() => {
                return Err(Refusal::Conflict(format!("VM {name:?} is off already")));
            }
            Desired::Stopped if was == Desired::Paused => {
                return Err(Refusal::Conflict(format!(
                    "VM {name:?} is paused, so its guest cannot shut down: resume it first, or stop it with --force"
                )));
            }
            Desired::Stopped if matches!(vm.placement, Placement::Moving { .. }) => {
                return Err(Refusal::Conflict(format!(
                    "VM {name:?} is being migrated: wait, cancel the job, or use --force"
                )));
            }
            Desired::Paused if matches!(vm.placement, Placement::Moving { .. }) => {
                return Err(Refusal::Conflict(format!("VM {name:?} is being migrated: wait, or cancel the job")));
            }
            _ => {}
        }
        if desired == Desired::Running
            && off
            && let Err(denials) = placement::choose(self, id, &self.vms[&id].spec.clone(), &[], &[])
        {
            return Err(Refusal::NoRoom { vm: name, why: placement::tell(self, &denials) });
        }
        let work = match desired {
            Desired::Running if was == Desired::Paused => Work::Resume,
            Desired::Running => Work::Start,
            Desired::Paused => Work::Pause,
            Desired::Stopped | Desired::ForcedOff => Work::Stop,
        };
        let Some(vm) = self.vms.get_mut(&id) else {
            return Err(Refusal::unknown("VM", id));
        };
        vm.desired = desired;
        vm.restart = None;
        vm.hold = None;
        if desired == Desired::Running && off {
            vm.crashes.clear();
        }
        if let Placement::Moving { cancel, .. } = &mut vm.placement {
            *cancel = true;
        }
        let wish = match desired {
            Desired::Running if was == Desired::Paused => "resumed",
            Desired::Running => "started",
            Desired::Paused => "paused",
            Desired::Stopped => "shut down",
            Desired::ForcedOff => "switched off",
        };
        vm.remember(at_ms, format!("to be {wish}"), Cause::Requested { by: by.into() });
        self.event(at_ms, Severity::Info, format!("vm {name}"), format!("{by} wants it {wish}"));
        self.supersede_jobs(at_ms, id);
        Ok(Reply::Job(self.begin_job(at_ms, by, work, id, &name)))
    }

    pub(super) fn restart_vm(&mut self, at_ms: u64, by: &str, id: VmId) -> Executed {
        let vm = self.ready_vm(id)?;
        let name = vm.name.clone();
        let Placement::On(Tenure { epoch, .. }) = vm.placement else {
            return Err(Refusal::Conflict(format!(
                "VM {name:?} does not run in one place right now, so it cannot be restarted"
            )));
        };
        if vm.desired != Desired::Running {
            return Err(Refusal::Conflict(format!("VM {name:?} is not running, so it cannot be restarted")));
        }
        if let Some(vm) = self.vms.get_mut(&id) {
            vm.restart = Some(epoch);
        }
        self.event(at_ms, Severity::Info, format!("vm {name}"), format!("{by} wants it restarted"));
        self.supersede_jobs(at_ms, id);
        Ok(Reply::Job(self.begin_job(at_ms, by, Work::Restart { epoch }, id, &name)))
    }

    pub(super) fn delete_vm(&mut self, at_ms: u64, by: &str, id: VmId, node: NodeId) -> Executed {
        let vm = self.ready_vm(id)?;
        let name = vm.name.clone();
        if vm.placement != Placement::Nowhere || vm.desired.wants_qemu() {
            return Err(Refusal::Conflict(format!("VM {name:?} is not off: stop it first")));
        }
        if !self.nodes.get(&node).is_some_and(Node::is_up) {
            return Err(Refusal::Conflict(format!("{} is not up, so it cannot delete disks", self.node_name(node))));
        }
        self.event(at_ms, Severity::Info, format!("vm {name}"), format!("{by} deletes it"));
        self.supersede_jobs(at_ms, id);
        let job = self.begin_job(at_ms, by, Work::Delete, id, &name);
        if let Some(vm) = self.vms.get_mut(&id) {
            vm.disks = DiskStage::Deleting { node, job };
        }
        Ok(Reply::Job(job))
    }

    pub(super) fn migrate_vm(&mut self, at_ms: u64, by: &str, id: VmId, to: Option<NodeId>) -> Executed {
        let (from, to) = self.can_move(id, to)?;
        Ok(Reply::Job(self.begin_move(at_ms, by, id, from, to, Cause::Requested { by: by.into() })))
    }

    /// From where to where a VM would be migrated; to the node with the most room when
    /// none is named.
    pub(crate) fn can_move(&self, id: VmId, to: Option<NodeId>) -> Result<(Tenure, NodeId), Refusal> {
        let vm = self.ready_vm(id)?;
        let name = vm.name.clone();
        let from = match &vm.placement {
            Placement::On(tenure) if vm.desired.wants_qemu() && matches!(vm.seen, Seen::Running | Seen::Paused) => {
                *tenure
            }
            Placement::Moving { job, .. } => {
                return Err(Refusal::Conflict(format!("VM {name:?} is being migrated already, by job {job}")));
            }
            _ => {
                return Err(Refusal::Conflict(format!(
                    "VM {name:?} does not run right now, so it cannot be live-migrated"
                )));
            }
        };
        if vm.restart.is_some() {
            return Err(Refusal::Conflict(format!("VM {name:?} is being restarted: wait")));
        }
        if self.is_void(&from) {
            return Err(Refusal::Conflict(format!("the node of VM {name:?} was lost: it restarts elsewhere")));
        }
        if let Some(volume) = crate::explain::waits_for_room(self, vm) {
            return Err(Refusal::Conflict(format!(
                "VM {name:?} stands still in a write until there is room on volume {volume:?}: it cannot move before that"
            )));
        }
        if let Some((index, disk)) = (0..).zip(&vm.spec.disks).find(|(_, disk)| !disk.format.migrates()) {
            let index: u32 = index;
            return Err(Refusal::Conflict(format!(
                "VM {name:?} cannot be live-migrated: QEMU cannot hand over its disk {index}, in format {}, while the guest runs; shut it down and it can start on another node, or create it anew with that disk as image of a qcow2 or raw one",
                disk.format.extension()
            )));
        }
        let spec = vm.spec.clone();
        let to = match to {
            Some(to) if to == from.node => {
                return Err(Refusal::Conflict(format!("VM {name:?} is on {} already", self.node_name(to))));
            }
            Some(to) => {
                let node = self.nodes.get(&to).ok_or_else(|| Refusal::unknown("node", to))?;
                placement::fits(self, node, Some(id), &spec).map_err(|denial| Refusal::NoRoom {
                    vm: name.clone(),
                    why: placement::tell(self, &[(to, denial)]),
                })?;
                to
            }
            None => {
                placement::choose(self, id, &spec, &[from.node], &[])
                    .map_err(|mut denials| {
                        denials.retain(|(node, _)| *node != from.node);
                        Refusal::NoRoom { vm: name.clone(), why: placement::tell(self, &denials) }
                    })?
                    .0
            }
        };
        let source = self.nodes.get(&from.node).ok_or_else(|| Refusal::unknown("node", from.node))?;
        let target = self.nodes.get(&to).ok_or_else(|| Refusal::unknown("node", to))?;
        if source.facts.accelerator != target.facts.accelerator {
            return Err(Refusal::Conflict(format!(
                "{} runs guests with {}, {} with {}: a running guest cannot move between the two",
                source.name, source.facts.accelerator, target.name, target.facts.accelerator
            )));
        }
        Ok((from, to))
    }

    pub(super) fn begin_move(
        &mut self,
        at_ms: u64,
        by: &str,
        id: VmId,
        from: Tenure,
        to: NodeId,
        cause: Cause,
    ) -> JobId {
        let (target_name, term) = (self.node_name(to), self.nodes.get(&to).map_or(NodeTerm(0), |node| node.term));
        let name = self.vms.get(&id).map(|vm| vm.name.clone()).unwrap_or_default();
        self.supersede_jobs(at_ms, id);
        let job = self.begin_job(at_ms, by, Work::Migrate { from: from.node, to }, id, &name);
        if let Some(vm) = self.vms.get_mut(&id) {
            vm.last_epoch = vm.last_epoch.next();
            let to = Tenure { node: to, term, epoch: vm.last_epoch };
            vm.placement = Placement::Moving { from, to, job, stage: MoveStage::Preparing, cancel: false };
            vm.remember(at_ms, format!("to be migrated to {target_name}"), cause.clone());
        }
        let why = match cause {
            Cause::Requested { .. } => String::new(),
            cause => format!(": {cause}"),
        };
        self.event(at_ms, Severity::Info, format!("vm {name}"), format!("{by} migrates it to {target_name}{why}"));
        job
    }

    pub(super) fn cancel_job(&mut self, at_ms: u64, by: &str, id: JobId) -> Executed {
        let job = self.jobs.get(&id).ok_or_else(|| Refusal::unknown("job", id))?;
        if job.end.is_some() {
            return Err(Refusal::Conflict(format!("job {id} has ended already")));
        }
        let cannot = || {
            Err(Refusal::Conflict(format!(
                "job {id} cannot be cancelled: only migrations, shut-downs and the making of disks can"
            )))
        };
        let (vm, name) = (job.vm, job.vm_name.clone());
        match job.work {
            Work::Migrate { .. } => match self.vms.get_mut(&vm).map(|vm| &mut vm.placement) {
                Some(Placement::Moving { cancel, .. }) => *cancel = true,
                _ => return cannot(),
            },
            Work::Create { .. } if self.vms.get(&vm).is_some_and(|vm| vm.disks != DiskStage::Ready) => {
                // Nothing half-made: the node that makes its disks deletes them.
                self.vms.remove(&vm);
                self.unmake_lun_files(vm);
                self.end_job(at_ms, id, Outcome::Cancelled);
            }
            Work::Stop => {
                if let Some(vm) = self.vms.get_mut(&vm)
                    && vm.desired == Desired::Stopped
                    && vm.placement != Placement::Nowhere
                {
                    vm.desired = Desired::Running;
                }
                self.end_job(at_ms, id, Outcome::Cancelled);
            }
            _ => return cannot(),
        }
        self.event(at_ms, Severity::Info, format!("vm {name}"), format!("{by} cancels job {id}"));
        Ok(Reply::Done)
    }

    fn ready_vm(&self, id: VmId) -> Result<&Vm, Refusal> {
        let vm = self.vms.get(&id).ok_or_else(|| Refusal::unknown("VM", id))?;
        match vm.disks {
            DiskStage::Ready => Ok(vm),
            DiskStage::Making { .. } => Err(Refusal::Conflict(format!("VM {:?} is still being created", vm.name))),
            DiskStage::Deleting { .. } => Err(Refusal::Conflict(format!("VM {:?} is being deleted", vm.name))),
        }
    }

    fn begin_job(&mut self, at_ms: u64, by: &str, work: Work, vm: VmId, vm_name: &str) -> JobId {
        let id = JobId(self.last_job.0 + 1);
        self.last_job = id;
        let job = Job {
            id,
            work,
            vm,
            vm_name: vm_name.into(),
            by: by.into(),
            began_ms: at_ms,
            progress: Progress::default(),
            end: None,
            moved: None,
        };
        self.jobs.insert(id, job);
        let ended: Vec<_> = self.jobs.values().filter(|job| job.end.is_some()).map(|job| job.id).collect();
        for id in ended.iter().take(ended.len().saturating_sub(JOBS_KEPT)) {
            self.jobs.remove(id);
        }
        id
    }

    /// A new wish for a VM ends what earlier wishes were still waiting for; a
    /// migration ends by its own road.
    fn supersede_jobs(&mut self, at_ms: u64, vm: VmId) {
        let older: Vec<_> = self
            .running_jobs()
            .filter(|job| {
                job.vm == vm
                    && matches!(job.work, Work::Start | Work::Pause | Work::Resume | Work::Stop | Work::Restart { .. })
            })
            .map(|job| job.id)
            .collect();
        for id in older {
            self.end_job(at_ms, id, Outcome::Cancelled);
        }
    }
}
