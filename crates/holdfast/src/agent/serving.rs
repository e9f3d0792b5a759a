//! The disks on LUNs that the volume server of this node has to serve, and its
//! questions to the cluster. It keeps nothing itself: each of its lives is told all
//! of it again.

mod line;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use holdfast_core::*;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::routes::{Paths, Traffic};
use super::{Agent, Member};
use crate::keeper::protocol::Request;
pub(super) use line::{CallError, Line};

use crate::volume::protocol::{Answer, Ask, Call, Disk, DiskId, LONGEST_LINE, SOCKET, ToAgent, ToServer};

/// How long the volume server may take to open a disk.
pub(super) const SERVE_WITHIN: Duration = Duration::from_secs(10);
/// How long what is under way may take when a disk is withdrawn.
const WITHDRAW_WITHIN: Duration = Duration::from_secs(30);
/// Between two attempts to reach the volume server, or to have a question answered.
const AGAIN: Duration = Duration::from_millis(20);
const ASK_AGAIN: Duration = Duration::from_millis(100);
/// A disk that could not be served is tried again this often.
pub(super) const SERVE_AGAIN: Duration = Duration::from_secs(1);
/// A barrier that does not come about is asked for again after this.
const APPLIED_WITHIN: Duration = Duration::from_secs(1);

/// What is to be served here, and the line to who serves it.
pub struct Serving {
    wanted: Mutex<BTreeMap<DiskId, Disk>>,
    /// How many connections to volume servers there were, and the one whose answers
    /// change where wanted disks' parts are. Looked at while `wanted` is locked.
    connections: AtomicU64,
    current: AtomicU64,
    line: watch::Sender<Option<Arc<Line>>>,
    /// Where LUNs were found on this node, by their volumes.
    devices: Mutex<BTreeMap<Uuid, PathBuf>>,
    /// How this node reaches LUNs.
    pub(super) paths: Paths,
}

impl Default for Serving {
    fn default() -> Self {
        let (wanted, devices, paths) = (Mutex::default(), Mutex::default(), Paths::default());
        let (connections, current) = Default::default();
        Serving { wanted, connections, current, line: watch::Sender::new(None), devices, paths }
    }
}

impl Serving {
    /// LUNs were found here. One that is not found now is still where it was.
    pub fn found(&self, devices: BTreeMap<Uuid, PathBuf>) {
        let mut known = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        let moved = devices.iter().any(|(volume, device)| known.get(volume) != Some(device));
        known.extend(devices);
        if moved {
            self.paths.moved.notify_one();
        }
    }

    /// Where the LUN of a volume was found on this node.
    pub(super) fn device(&self, volume: Uuid) -> Option<PathBuf> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner).get(&volume).cloned()
    }

    fn wanted(&self) -> MutexGuard<'_, BTreeMap<DiskId, Disk>> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Agent {
    fn volume_socket(&self) -> PathBuf {
        self.0.config.run_dir.join(SOCKET)
    }

    /// Where QEMU finds a disk that the volume server serves.
    pub(super) fn disk_socket(&self, vm: VmId, disk: u32) -> PathBuf {
        self.0.config.vm_dir(vm).join(format!("disk{disk}.sock"))
    }

    /// Keeps a volume server, told of everything that it has to serve, while there are
    /// volumes on LUNs.
    pub(super) async fn keep_serving(self, member: &'static Member) {
        let mut changes = self.changes();
        loop {
            if changes.wait_for(|state| !state.luns.is_empty()).await.is_err() {
                return;
            }
            let path = self.volume_socket();
            if let Err(error) = self.0.keeper.ask(Request::Listen { path: path.clone() }).await {
                tracing::error!(%error, "no disk on a LUN can be served");
                sleep(Duration::from_secs(1)).await;
                continue;
            }
            let serving = async {
                loop {
                    if let Err(error) = self.serve_one_life(member).await {
                        tracing::debug!(%error, "the volume server");
                    }
                    member.serving.line.send_replace(None);
                    sleep(AGAIN).await;
                }
            };
            tokio::select! {
                () = serving => {}
                _ = changes.wait_for(|state| state.luns.is_empty()) => {}
            }
            member.serving.line.send_replace(None);
            if let Err(error) = self.0.keeper.ask(Request::Unlisten { path }).await {
                tracing::warn!(%error, "the volume server goes on without a need");
            }
        }
    }

    async fn serve_one_life(&self, member: &'static Member) -> anyhow::Result<()> {
        let stream = UnixStream::connect(self.volume_socket()).await?;
        let (reader, writer) = stream.into_split();
        let number = member.serving.connections.fetch_add(1, Ordering::Relaxed) + 1;
        let line = Arc::new(Line::new(number, writer));
        let told = async {
            let mut state = self.agreed_so_far(member).await;
            if has_lun_disks(&state, member.me) {
                // A guest may have written since to what an earlier life was giving back.
                self.void_unmaps(member).await;
                state = self.agreed_so_far(member).await;
            }
            let ways = self.tell_ways(member, &line, &state).await?;
            let disks = async {
                let mut left = self.tell_everything(member, &line, &state).await?;
                member.serving.line.send_replace(Some(line.clone()));
                while !left.is_empty() {
                    sleep(SERVE_AGAIN).await;
                    left = self.tell_of(member, &line, left).await;
                }
                Ok(())
            };
            tokio::try_join!(disks, self.keep_routes(member, &line, ways)).map(drop)
        };
        tokio::select! {
            heard = self.clone().hear(member, reader, line.clone()) => heard,
            told = told => told,
        }
    }

    /// Everything that there is to serve, with where its parts are by now: a life of the
    /// volume server before this one may have been told of more than this agent was.
    async fn tell_everything(
        &self,
        member: &'static Member,
        line: &Line,
        state: &ClusterState,
    ) -> anyhow::Result<Vec<DiskId>> {
        self.adopt(member, state, line);
        // A right that is over is never given again: QEMU is dead, its disks are only
        // still to be withdrawn.
        let lasts = |disk: &Disk| {
            if let Some((.., hold)) = state.hold(HoldId(disk.vm.0)) {
                return hold.tenure == disk.tenure && !state.is_void(&disk.tenure);
            }
            let vm = state.vms.get(&disk.vm);
            !state.is_void(&disk.tenure) && vm.is_some_and(|vm| vm.tenures().any(|right| *right == disk.tenure))
        };
        let wanted: Vec<DiskId> = member.serving.wanted().values().filter(|disk| lasts(disk)).map(Disk::id).collect();
        line.call(Call::Only(wanted.clone()), WITHDRAW_WITHIN).await?;
        Ok(self.tell_of(member, line, wanted).await)
    }

    /// Has disks served; says which are not.
    async fn tell_of(&self, member: &'static Member, line: &Line, disks: Vec<DiskId>) -> Vec<DiskId> {
        let mut left = Vec::new();
        for id in disks {
            let disk = member.serving.wanted().get(&id).cloned();
            if let Some(disk) = disk
                && let Err(error) = line.call(Call::Serve(disk), SERVE_WITHIN).await
            {
                tracing::error!(vm = %id.vm, disk = id.disk, error = format!("{error:#}"), "a disk is not served");
                left.push(id);
            }
        }
        left
    }

    /// The state with everything in it that was agreed on before now, however long it
    /// takes to be sure of that: an earlier life of this agent may have started QEMUs
    /// and mapped parts that this one has not read of yet.
    async fn agreed_so_far(&self, member: &'static Member) -> Arc<ClusterState> {
        loop {
            if let Ok(index) = member.consensus.barrier().await
                && member.consensus.wait_applied(index, APPLIED_WITHIN).await
            {
                return member.consensus.state().borrow().clone();
            }
            sleep(AGAIN).await;
        }
    }

    /// Sees to it that nothing is given back any more that this node's volume server has
    /// asked for by now.
    async fn void_unmaps(&self, member: &'static Member) {
        let by = member.by();
        while let Err(error) = self.execute(&by, Command::VoidUnmaps { node: member.me }).await {
            tracing::debug!(%error, "no disk is served yet");
            sleep(ASK_AGAIN).await;
        }
    }

    /// What QEMUs that live have open is wanted, even if this agent did not start them.
    fn adopt(&self, member: &'static Member, state: &ClusterState, line: &Line) {
        let view = self.0.keeper.watch().borrow().clone();
        for vm in state.vms.values() {
            let Some(tenure) = vm.tenure_of(member.me) else { continue };
            if view.alive(vm.id).is_none_or(|process| process.epoch != tenure.epoch) {
                continue;
            }
            for (disk, at) in lun_disks(state, vm) {
                match self.disk_to_serve(member, state, vm, (disk, at), *tenure, writes(vm, tenure)) {
                    Ok(disk) => drop(member.serving.wanted().entry(disk.id()).or_insert(disk)),
                    Err(error) => tracing::error!(vm = vm.name, error = format!("{error:#}"), "a disk is not served"),
                }
            }
        }
        let mut wanted = member.serving.wanted();
        for disk in wanted.values_mut() {
            disk.parts = parts_of(state, disk.vm, disk.disk);
        }
        member.serving.current.store(line.number, Ordering::Relaxed);
        line.adopted.send_replace(true);
    }

    fn disk_to_serve(
        &self,
        member: &'static Member,
        state: &ClusterState,
        vm: &Vm,
        (disk, at): (u32, &DiskSpec),
        tenure: Tenure,
        may_write: bool,
    ) -> anyhow::Result<Disk> {
        let volume = state.volumes.get(&at.volume).with_context(|| format!("there is no volume {:?}", at.volume))?;
        let VolumeKind::Lun { device, .. } = &volume.kind else { bail!("volume {:?} is not on a LUN", at.volume) };
        let found = member.serving.device(volume.id);
        Ok(Disk {
            vm: vm.id,
            disk,
            tenure,
            socket: self.disk_socket(vm.id, disk),
            volume: at.volume.clone(),
            volume_id: volume.id,
            // Whoever opens it looks whether it is the right one.
            device: found.unwrap_or_else(|| device.into()),
            bytes: at.size_bytes,
            parts: parts_of(state, vm.id, disk),
            may_write,
        })
    }

    /// Has the VM's disks on LUNs served for a QEMU that is to be started under a right,
    /// and returns when they are.
    ///
    /// The state that gave the right holds everything that was mapped and unmapped under
    /// earlier ones; what happens under this one is followed here.
    pub(super) async fn serve_disks(
        &self,
        member: &'static Member,
        vm: &Vm,
        tenure: Tenure,
        may_write: bool,
    ) -> anyhow::Result<()> {
        let state = member.consensus.state().borrow().clone();
        for at in lun_disks(&state, vm) {
            let disk = self.disk_to_serve(member, &state, vm, at, tenure, may_write)?;
            let (id, new) = (disk.id(), !member.serving.wanted().contains_key(&disk.id()));
            let served = self.serve_disk(member, disk).await;
            // One that may be served all the same, now or later, stays here to be
            // withdrawn before the VM gets another QEMU on this node: that one would find
            // it behind its socket. Until then nobody writes to it.
            if new && matches!(served, Err(CallError::Refused(_))) {
                member.serving.wanted().remove(&id);
            }
            served?;
        }
        Ok(())
    }

    /// Sees to it that the disks of a QEMU that lives are served and may be written to,
    /// whoever started it.
    pub(super) async fn keep_disks_served(
        &self,
        member: &'static Member,
        vm: VmId,
        tenure: Tenure,
    ) -> anyhow::Result<()> {
        let missing = |state: &ClusterState| {
            let wanted = member.serving.wanted();
            let served = |disk: u32| {
                let id = DiskId { vm, disk, epoch: tenure.epoch.0 };
                wanted.get(&id).is_some_and(|disk| disk.may_write)
            };
            let vm = state.vms.get(&vm)?;
            lun_disks(state, vm).iter().any(|(disk, _)| !served(*disk)).then(|| vm.clone())
        };
        if missing(&self.state()).is_none() {
            return Ok(());
        }
        let state = self.agreed_so_far(member).await;
        let Some(vm) = missing(&state) else { return Ok(()) };
        for at in lun_disks(&state, &vm) {
            let disk = self.disk_to_serve(member, &state, &vm, at, tenure, true)?;
            self.serve_disk(member, disk).await?;
        }
        Ok(())
    }

    pub(super) async fn serve_disk(&self, member: &'static Member, disk: Disk) -> Result<(), CallError> {
        let listening = self.0.keeper.ask(Request::Listen { path: disk.socket.clone() }).await;
        listening.map_err(|error| CallError::Unknown(error.into()))?;
        let line = self.line(member).await.map_err(CallError::Unknown)?;
        // Before it is served: the next life of the server has to hear of it, too.
        let disk = {
            let mut wanted = member.serving.wanted();
            let known = wanted.entry(disk.id()).or_insert_with(|| disk.clone());
            // Once it is written to, its parts are followed here.
            if !known.may_write {
                *known = disk;
            }
            known.clone()
        };
        line.call(Call::Serve(disk), SERVE_WITHIN).await
    }

    /// Whether disks of the VM are served here.
    pub(super) fn has_served_disks(&self, member: &'static Member, vm: VmId) -> bool {
        member.serving.wanted().keys().any(|disk| disk.vm == vm)
    }

    /// The volume server, once it is there.
    pub(super) async fn line(&self, member: &'static Member) -> anyhow::Result<Arc<Line>> {
        let mut line = member.serving.line.subscribe();
        let there = timeout(SERVE_WITHIN, line.wait_for(Option::is_some)).await;
        let there = there.context("the volume server of this node does not run")??;
        there.clone().context("the volume server of this node does not run")
    }

    /// A migration's target: from now on the guest may write here, and the disks' parts
    /// are where the source had them.
    pub(super) async fn admit_writes(
        &self,
        member: &'static Member,
        vm: VmId,
        epoch: Epoch,
        parts: &BTreeMap<u32, Vec<Mapped>>,
    ) -> anyhow::Result<()> {
        let ours: Vec<Disk> = {
            let mut wanted = member.serving.wanted();
            let ours = wanted.values_mut().filter(|disk| disk.vm == vm && disk.tenure.epoch == epoch);
            ours.map(|disk| {
                if !disk.may_write {
                    disk.parts = parts.get(&disk.disk).cloned().unwrap_or_default();
                    disk.may_write = true;
                }
                disk.clone()
            })
            .collect()
        };
        let state = self.state();
        let all = state.vms.get(&vm).map_or(0, |vm| lun_disks(&state, vm).len());
        if ours.len() != all {
            bail!("{} of its {all} disks on LUNs are served here yet", ours.len());
        }
        for disk in ours {
            self.line(member).await?.call(Call::Serve(disk), SERVE_WITHIN).await?;
        }
        Ok(())
    }

    /// Where the parts of the VM's disks are, as the source of its migration knows.
    pub(super) fn mapped_here(&self, member: &'static Member, vm: VmId, epoch: Epoch) -> BTreeMap<u32, Vec<Mapped>> {
        let wanted = member.serving.wanted();
        let ours = wanted.values().filter(|disk| disk.vm == vm && disk.tenure.epoch == epoch);
        ours.map(|disk| (disk.disk, disk.parts.clone())).collect()
    }

    /// Serves the disks of a VM no more, but for those of the epoch that is kept, and
    /// returns when nothing of them is under way: QEMU is dead, but what it had asked
    /// for may not be.
    pub(super) async fn withdraw_disks(
        &self,
        member: &'static Member,
        vm: VmId,
        keep: Option<Epoch>,
    ) -> anyhow::Result<()> {
        let over: Vec<Disk> = {
            let wanted = member.serving.wanted();
            let over = wanted.values().filter(|disk| disk.vm == vm && Some(disk.tenure.epoch) != keep);
            over.cloned().collect()
        };
        for disk in over {
            let withdrawn = self.line(member).await?.call(Call::Withdraw(disk.clone()), WITHDRAW_WITHIN).await;
            withdrawn.with_context(|| format!("disk {} of a VM that ended", disk.disk))?;
            let last = {
                let mut wanted = member.serving.wanted();
                wanted.remove(&disk.id());
                !wanted.values().any(|other| other.socket == disk.socket)
            };
            if last {
                self.0.keeper.ask(Request::Unlisten { path: disk.socket }).await?;
            }
        }
        Ok(())
    }

    /// Withdraws the disks of a QEMU that has died under a right, whoever had them
    /// served: an earlier life of this agent may have, of which this one was not told.
    pub(super) async fn withdraw_all_disks(
        &self,
        member: &'static Member,
        vm: VmId,
        tenure: Tenure,
    ) -> anyhow::Result<()> {
        let state = self.state();
        if let Some(vm) = state.vms.get(&vm) {
            for at in lun_disks(&state, vm) {
                let disk = self.disk_to_serve(member, &state, vm, at, tenure, false)?;
                member.serving.wanted().entry(disk.id()).or_insert(disk);
            }
        }
        self.withdraw_disks(member, vm, None).await
    }

    /// Withdraws a disk that an earlier life of this agent may have had served.
    pub(super) async fn withdraw_unknown(&self, member: &'static Member, disk: Disk) -> anyhow::Result<()> {
        let vm = disk.vm;
        member.serving.wanted().entry(disk.id()).or_insert(disk);
        self.withdraw_disks(member, vm, None).await
    }

    async fn hear(self, member: &'static Member, reader: OwnedReadHalf, line: Arc<Line>) -> anyhow::Result<()> {
        let mut reader = BufReader::new(reader);
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            if (&mut reader).take(LONGEST_LINE).read_until(b'\n', &mut bytes).await? == 0 {
                bail!("the volume server ended");
            }
            match serde_json::from_slice(&bytes)? {
                ToAgent::Reply { id, result } => line.answered(id, result),
                ToAgent::Path { volume_id, path } => self.path_is(member, volume_id, path),
                ToAgent::Redirected { volume_id, requests, bytes } => {
                    self.redirected(member, volume_id, Traffic { requests, bytes });
                }
                ToAgent::Ask { id, ask } => {
                    let (agent, line) = (self.clone(), line.clone());
                    tokio::spawn(async move {
                        let answer = agent.answer(member, &line, ask).await;
                        // One that does not arrive is asked for again by whoever needs it.
                        let _ = line.say(&ToServer::Answer { id, answer }).await;
                    });
                }
            }
        }
    }

    /// Whether slabs of a volume wait for its journal.
    fn frees(&self, volume: &str) -> bool {
        self.state().luns.get(volume).is_some_and(|lun| lun.freed_slabs() > 0)
    }

    async fn answer(&self, member: &'static Member, line: &Line, ask: Ask) -> Answer {
        let by = member.by();
        let _ = line.adopted.subscribe().wait_for(|adopted| *adopted).await;
        let unmapped = match &ask {
            Ask::Unmap { parts, .. } => parts.clone(),
            _ => Vec::new(),
        };
        let (command, disk) = match ask {
            Ask::Take { volume_id, known, most } => {
                let Some(volume) = self.state().volume_named_by(volume_id).cloned() else {
                    // It was removed, and nobody has a disk there.
                    return Answer::Slabs(Taking::default());
                };
                let term = self.0.keeper.watch().borrow().term;
                (Command::TakeSlabs { volume, node: member.me, term, known, most }, None)
            }
            Ask::Map { disk, wanted, takings } => {
                let Some(tenure) = self.tenure_to_write(member, disk).await else { return Answer::Unknown };
                (Command::MapSlabs { vm: disk.vm, disk: disk.disk, tenure, wanted, takings }, Some(disk))
            }
            Ask::Unmap { disk, number, parts } => {
                let Some(tenure) = self.tenure_to_write(member, disk).await else { return Answer::Unknown };
                (Command::UnmapSlabs { vm: disk.vm, disk: disk.disk, tenure, number, parts }, Some(disk))
            }
        };
        let volume = match &command {
            Command::TakeSlabs { volume, .. } => volume.clone(),
            _ => String::new(),
        };
        match self.execute(&by, command).await {
            // Some will be free in a moment.
            Ok(Reply::Slabs(taking)) if taking.slabs.is_empty() && self.frees(&volume) => {
                sleep(ASK_AGAIN).await;
                Answer::Unknown
            }
            Ok(Reply::Slabs(slabs)) => Answer::Slabs(slabs),
            Ok(Reply::Mapped(found)) => {
                // Before the volume server hears of it: a guest that writes there may be
                // handed over the next moment.
                self.follow(member, line, disk, |file| {
                    let one_by_one = found.iter().copied().flat_map(Mapped::one_by_one);
                    one_by_one.for_each(|(part, slab)| file.put(part, slab));
                });
                Answer::Mapped(found)
            }
            Ok(Reply::Unmapped(done)) => {
                if !done.left {
                    self.follow(member, line, disk, |file| {
                        let parts = unmapped.iter().flat_map(|(first, count)| *first..first.saturating_add(*count));
                        for part in parts {
                            file.cut(part);
                        }
                    });
                }
                Answer::Unmapped(done)
            }
            outcome => {
                tracing::debug!(?outcome, "a question of the volume server");
                sleep(ASK_AGAIN).await;
                Answer::Unknown
            }
        }
    }

    /// The right under which a disk is served; without one nothing is to be asked for it
    /// right now.
    async fn tenure_to_write(&self, member: &'static Member, disk: DiskId) -> Option<Tenure> {
        let tenure = member.serving.wanted().get(&disk).map(|disk| disk.tenure);
        if tenure.is_none() {
            sleep(ASK_AGAIN).await;
        }
        tenure
    }

    /// Where a disk's parts are has changed, by an answer to the volume server's question.
    /// That of an earlier connection says nothing new: the state was read since.
    fn follow(&self, member: &'static Member, line: &Line, disk: Option<DiskId>, change: impl FnOnce(&mut LunFile)) {
        let mut wanted = member.serving.wanted();
        if member.serving.current.load(Ordering::Relaxed) == line.number
            && let Some(disk) = disk.and_then(|id| wanted.get_mut(&id))
        {
            let mut file = LunFile::new(disk.vm, disk.bytes);
            file.parts = std::mem::take(&mut disk.parts);
            change(&mut file);
            disk.parts = file.parts;
        }
    }
}

/// Whether the right is one to write: a migration's target has it when the guest runs.
fn writes(vm: &Vm, tenure: &Tenure) -> bool {
    !matches!(&vm.placement, Placement::Moving { to, .. } if to == tenure)
}

/// The VM's disks that are on LUNs, with their numbers.
fn lun_disks<'a>(state: &ClusterState, vm: &'a Vm) -> Vec<(u32, &'a DiskSpec)> {
    (0..).zip(&vm.spec.disks).filter(|(_, disk)| state.luns.contains_key(&disk.volume)).collect()
}

/// Whether a node has a file open, or a right to run a VM that has disks on LUNs.
fn has_lun_disks(state: &ClusterState, node: NodeId) -> bool {
    let here = |vm: &&Vm| vm.tenures().any(|right| right.node == node && !state.is_void(right));
    state.vms.values().filter(here).any(|vm| !lun_disks(state, vm).is_empty()) || state.holds_of(node).next().is_some()
}

fn parts_of(state: &ClusterState, vm: VmId, disk: u32) -> Vec<Mapped> {
    let file = || {
        if let Some((_, lun, hold)) = state.hold(HoldId(vm.0)) {
            return lun.files.get(&hold.file);
        }
        let disk = state.vms.get(&vm)?.spec.disks.get(disk as usize)?;
        state.luns.get(&disk.volume)?.files.get(&disk.file)
    };
    file().map_or_else(Vec::new, |file| file.parts.clone())
}
