//! Volumes on LUNs: which hosts reach them by themselves, and who does I/O for those
//! that do not. What `crates/holdfast` and its volume server do, without the bytes:
//! an I/O for another host is begun under an epoch, is under way for a while, and is over.

use holdfast_core::*;
use uuid::Uuid;

use super::host::host_of;
use super::{Event, Message, World};
use crate::mutation::Mutation;

/// How many there are where there are any.
pub const LUNS: usize = 2;

/// A VM leaves a node without a path of its own after so long, in seconds: a run lasts
/// no minute.
const PATIENCE_S: u64 = 4;

/// A host's volume server, as far as it does I/O for others on one LUN.
#[derive(Clone, Debug, Default)]
pub struct Serving {
    /// As its owner, under this epoch: what its agent told it last.
    epoch: Option<Epoch>,
    /// What is under way.
    under_way: u32,
    /// Tells the I/O of one life of the volume server from that of another.
    life: u64,
}

/// What there is of a LUN beside what is agreed on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Done {
    /// The highest epoch under which an I/O was done for another host, and where.
    last: Option<(Epoch, usize)>,
}

/// Its name.
pub fn name(lun: usize) -> String {
    format!("lun{}", lun + 1)
}

fn id(lun: usize) -> Uuid {
    Uuid::from_u128(16 + lun as u128)
}

/// The commands that make them.
pub fn configuration() -> Vec<Command> {
    let add = |lun: usize| {
        let kind = VolumeKind::Lun { device: format!("/dev/{}", name(lun)), slab_bytes: 16 << 20, slabs: 1_000 };
        Command::AddVolume { name: name(lun), id: id(lun), kind }
    };
    let patience = Command::SetRedirectPatience { seconds: PATIENCE_S };
    (0..LUNS).map(add).chain([patience]).collect()
}

impl World {
    fn luns(&self) -> usize {
        if self.setting.luns { LUNS } else { 0 }
    }

    fn reaches(&self, host: usize, lun: usize) -> bool {
        self.hosts[host].paths_cut >> lun & 1 == 0
    }

    /// The agent tells its volume server whether it owns, and the volume server sends
    /// what it cannot do itself to who does.
    pub(super) fn serve_volumes(&mut self, host: usize) {
        let now = self.boot(host);
        let me = self.node_of(host);
        let held = self.lease_held(host, now) && self.keeper_answers(host);
        for lun in 0..self.luns() {
            let agent = &self.hosts[host].agent;
            let owner = agent.state.owner(&name(lun)).copied().filter(|owner| !owner.leaving);
            let open = self.hosts[host].keeper.open;
            let mine = owner.filter(|owner| owner.node == me && open == Some(owner.term));
            self.hosts[host].serving[lun].epoch = mine.map(|owner| owner.epoch);
            if let Some(owner) = owner.filter(|owner| owner.node != me && held && !self.reaches(host, lun)) {
                self.send(host, host_of(owner.node), Message::Io { lun, epoch: owner.epoch });
            }
        }
    }

    /// Another host's I/O comes in at the volume server.
    pub(super) fn do_io(&mut self, host: usize, lun: usize, epoch: Epoch) {
        let now = self.boot(host);
        let held = self.lease_held(host, now);
        if self.hosts[host].serving[lun].epoch != Some(epoch) || !held || !self.reaches(host, lun) {
            return;
        }
        // A keeper that stands still ends nothing: then only what is short is over in time.
        let long = !self.setting.image_locks && self.rng.permille(60);
        let us = if long { self.draw(50_000, 900_000) } else { self.draw(500, 6_000) };
        let serving = &mut self.hosts[host].serving[lun];
        serving.under_way += 1;
        let life = serving.life;
        self.after_us(us, Event::IoDone { host, lun, life });
        self.judge_io(host, lun, epoch);
    }

    pub(super) fn io_done(&mut self, host: usize, lun: usize, life: u64) {
        let serving = &mut self.hosts[host].serving[lun];
        if serving.life == life {
            serving.under_way -= 1;
        }
    }

    /// The volume server dies: with the lease, with the keeper, with the host.
    pub(super) fn end_serving(&mut self, host: usize) {
        for serving in &mut self.hosts[host].serving {
            *serving = Serving { life: serving.life + 1, ..Serving::default() };
        }
    }

    /// What a node says of its paths, and of what it has left.
    pub(super) fn report_volumes(&self, host: usize, state: &ClusterState, report: &mut NodeReport) {
        let me = self.node_of(host);
        for lun in 0..self.luns() {
            let Some(known) = state.luns.get(&name(lun)) else { continue };
            let why = || "input/output error".to_owned();
            let owner = state.owner(&name(lun)).filter(|owner| owner.node != me && !owner.leaving);
            let path = match (self.reaches(host, lun), owner) {
                (true, _) => LunPath::Direct,
                (false, Some(owner)) => LunPath::Redirected { why: why(), through: owner.node },
                (false, None) => LunPath::Unavailable { why: why() },
            };
            report.paths.insert(id(lun), path);
            let leaves = known.access.owner.filter(|owner| owner.node == me && owner.leaving);
            let idle = self.hosts[host].serving[lun].under_way == 0 || self.mutated(Mutation::LeaveEarly);
            if let Some(owner) = leaves.filter(|_| idle) {
                report.left.insert(id(lun), owner.epoch);
            }
        }
    }

    /// At one time only one owner's I/O is under way, and no earlier one's follows.
    fn judge_io(&mut self, host: usize, lun: usize, epoch: Epoch) {
        let before = self.done[lun].last;
        let other = (0..self.hosts.len()).find(|at| *at != host && self.hosts[*at].serving[lun].under_way > 0);
        if let Some(other) = other {
            let text = format!(
                "n{} does I/O for others on {} under epoch {epoch} while some of n{} is under way",
                host + 1,
                name(lun),
                other + 1
            );
            self.broken("one owner of a volume", text);
        }
        if let Some((last, at)) = before.filter(|(last, at)| *last > epoch || *last == epoch && *at != host) {
            let text = format!("n{} does I/O under epoch {epoch}, n{} did under {last}", host + 1, at + 1);
            self.broken("one owner of a volume", text);
        }
        self.done[lun].last = Some((epoch, host));
    }

    /// What was just agreed on: an owner's epoch is a new one, and whoever is called
    /// lost is succeeded in the same breath by one that can.
    pub(super) fn judge_volumes(&mut self, before: &ClusterState, after: &ClusterState) {
        for lun in 0..self.luns() {
            let name = name(lun);
            let (Some(was), Some(is)) = (before.luns.get(&name), after.luns.get(&name)) else { continue };
            let (was, is) = (&was.access, &is.access);
            let new = is.owner.filter(|owner| was.owner.is_none_or(|old| old.epoch != owner.epoch));
            if is.last_epoch < was.last_epoch || new.is_some_and(|owner| owner.epoch <= was.last_epoch) {
                self.broken("epochs only grow", format!("{name}: {:?} after {:?}", is.owner, was.owner));
            }
            let lost = was.owner.is_some_and(|owner| {
                let node = after.nodes.get(&owner.node);
                !before.is_owner_void(&owner) && node.is_some_and(|node| !node.is_up())
            });
            let fit = after.nodes.keys().any(|node| after.is_fit(&name, *node));
            if lost && fit && after.owner(&name).is_none() {
                self.broken("volumes are owned", format!("{name} lost its owner, and nobody else got it"));
            }
        }
    }

    /// What is not as it should be of the volumes once everything works again.
    pub(super) fn unsettled_volumes(&self, state: &ClusterState) -> Vec<String> {
        let mut all = Vec::new();
        for name in (0..self.luns()).map(name) {
            match state.owner(&name) {
                Some(owner) if !owner.leaving && state.is_fit(&name, owner.node) => {}
                other => all.push(format!("{name} is owned by {other:?}")),
            }
            let direct = |node: &NodeId| state.reached(&name, *node).is_some_and(|at| at.path == LunPath::Direct);
            all.extend(
                state.nodes.keys().filter(|node| !direct(node)).map(|node| format!("{node} does not reach {name}")),
            );
        }
        all
    }

    /// Where the disk of a VM is: some are on LUNs.
    pub(super) fn volume_of(&self, vm: &str) -> String {
        match vm.bytes().last().map(usize::from) {
            Some(last) if self.setting.luns && last % 3 != 0 => name(last % 3 - 1),
            _ => "vol1".into(),
        }
    }

    /// Owners, for rest.
    pub(super) fn owners_of_volumes(state: &ClusterState) -> Vec<(Option<Owner>, Epoch)> {
        state.luns.values().map(|lun| (lun.access.owner, lun.access.last_epoch)).collect()
    }
}
