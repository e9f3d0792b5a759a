//! Keepers and the QEMUs below them: what `crates/holdfast/src/keeper` does.

use holdfast_core::lease::{BootTime, Grant, Granted, Heartbeat, NodeLease};
use holdfast_core::*;

use super::host::{Leaving, LeavingState, Qemu, Stage};
use super::{Event, GuestTimer, Message, Part, World};
use crate::clock::MS;
use crate::mutation::Mutation;
use crate::script::Traffic;

/// Why the keeper starts nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    NoLease,
    WrongTerm,
    AlreadyRunning,
    EpochUsed,
}

/// Killed because the lease ended.
pub const FENCED: &str = "its lease ended";
const KILLED: &str = "killed";
pub(super) const LOCKED: &str = "Failed to get \"write\" lock";

impl World {
    pub(super) fn start_keeper(&mut self, host: usize) {
        let life = Incarnation(self.rng.next());
        let nodes = self.setting.nodes;
        let keeper = &mut self.hosts[host].keeper;
        keeper.alive = true;
        keeper.life += 1;
        keeper.lease = NodeLease::new(life);
        keeper.open = None;
        keeper.alarm = 0;
        keeper.sequence = 0;
        keeper.echoes = vec![0; nodes];
        keeper.acknowledged = vec![0; nodes];
        // It knows nothing of before; leftovers are dead before it asks.
        keeper.last_epoch.clear();
        keeper.processes.clear();
        let number = keeper.life;
        self.log(|| format!("  n{} keeper starts as {life}", host + 1));
        self.keeper_beat(host, number);
    }

    /// With the keeper its VMs die, and it is started again once they are dead.
    pub(super) fn crash_keeper(&mut self, index: usize) {
        self.end_serving(index);
        let host = &mut self.hosts[index];
        host.keeper.alive = false;
        host.keeper.open = None;
        host.keeper_stopped = false;
        host.waiting.retain(|(part, _)| *part != Part::Keeper);
        host.keeper.processes.clear();
        let power = host.power;
        let us = self.draw(20_000, 400_000);
        self.after_us(us, Event::Start(index, Part::Keeper, power));
    }

    pub(super) fn keeper_beat(&mut self, host: usize, life: u64) {
        if !self.hosts[host].keeper.is_life(life) {
            return;
        }
        self.keeper_turn(host);
        let now = self.boot(host);
        let node = self.node_of(host);
        let keeper = &mut self.hosts[host].keeper;
        keeper.sequence += 1;
        let (incarnation, sequence) = (keeper.lease.incarnation(), keeper.sequence);
        let said: Vec<_> = keeper.echoes.iter().copied().zip(keeper.acknowledged.iter().copied()).collect();
        let next = now.plus_ms(keeper.period_ms);
        // Only a coordinator does anything with it; where messages take long, whoever
        // gets it may be one by then.
        let slow = self.links.late_ms > 0;
        for (to, (echo, acknowledged)) in said.into_iter().enumerate() {
            if slow || self.hosts[to].agent.coordinatorship.is_some() {
                let heartbeat = Heartbeat { node, incarnation, sequence, sent: now, acknowledged };
                self.send(host, to, Message::Heartbeat(heartbeat, echo));
            }
        }
        let at = self.hosts[host].clock.when(next, self.now);
        self.at(at, Event::KeeperBeat(host, life));
    }

    pub(super) fn keeper_challenged(&mut self, from: usize, host: usize, life: Incarnation, challenge: u64) {
        let now = self.boot(host);
        let node = self.node_of(host);
        let keeper = &mut self.hosts[host].keeper;
        if !keeper.alive || keeper.lease.incarnation() != life || keeper.echoes[from] == challenge {
            return;
        }
        keeper.echoes[from] = challenge;
        keeper.sequence += 1;
        let (sequence, acknowledged) = (keeper.sequence, keeper.acknowledged[from]);
        let heartbeat = Heartbeat { node, incarnation: life, sequence, sent: now, acknowledged };
        self.send(host, from, Message::Heartbeat(heartbeat, challenge));
    }

    /// An answer of the agent at `from` arrived, with a lease or without.
    pub(super) fn keeper_answered(&mut self, from: usize, host: usize, life: Incarnation, sequence: u64) {
        let keeper = &mut self.hosts[host].keeper;
        if keeper.alive && keeper.lease.incarnation() == life {
            keeper.acknowledged[from] = keeper.acknowledged[from].max(sequence);
        }
    }

    pub(super) fn keeper_granted(&mut self, host: usize, grant: &Grant) {
        let now = self.boot(host);
        let mut grant = *grant;
        if self.mutated(Mutation::LeaseFromReceipt) {
            grant.sent = now;
        }
        if !self.hosts[host].keeper.alive {
            return;
        }
        if self.hosts[host].keeper.open.is_some() && !self.lease_held(host, now) {
            self.end_lease(host);
        }
        let granted = self.hosts[host].keeper.lease.grant(&grant, now);
        match granted {
            Granted::Ignored => return,
            Granted::NewTerm if self.hosts[host].keeper.open.is_some() => self.end_lease(host),
            Granted::NewTerm | Granted::Renewed => {}
        }
        self.hosts[host].keeper.period_ms = grant.timing.heartbeat_ms;
        self.keeper_turn(host);
        self.judge_lease(host);
    }

    /// Everything that is due.
    pub(super) fn keeper_turn(&mut self, host: usize) {
        let now = self.boot(host);
        if !self.keeper_answers(host) || self.hosts[host].suspended {
            return;
        }
        let held = self.lease_held(host, now);
        if self.hosts[host].keeper.open.is_some() && !held {
            self.end_lease(host);
        }
        let keeper = &mut self.hosts[host].keeper;
        if held && keeper.open.is_none() && keeper.processes.values().all(Qemu::is_dead) {
            let term = keeper.lease.term();
            keeper.open = Some(term);
            self.log(|| format!("  n{} holds its lease (term {term})", host + 1));
        }
        let keeper = &self.hosts[host].keeper;
        if let (Some(_), Some(ends)) = (keeper.open.filter(|_| held), keeper.lease.ends()) {
            // The alarm that is set already looks at the time again when it rings.
            let life = keeper.life;
            let at = self.hosts[host].clock.when(ends, self.now);
            if self.hosts[host].keeper.alarm <= self.now || self.hosts[host].keeper.alarm > at {
                self.hosts[host].keeper.alarm = at;
                self.at(at, Event::KeeperAlarm(host, life));
            }
        }
    }

    fn end_lease(&mut self, host: usize) {
        if self.mutated(Mutation::OutliveTheLease) {
            return;
        }
        self.end_serving(host);
        let keeper = &mut self.hosts[host].keeper;
        let term = keeper.open.take();
        let doomed: Vec<_> = keeper.processes.iter().filter(|(_, qemu)| !qemu.is_dead()).map(|(tag, _)| *tag).collect();
        let (killed, number) = (doomed.len(), term.unwrap_or_default());
        self.log(|| format!("  n{} lease of term {number} ended: {killed} VMs killed", host + 1));
        for (vm, epoch) in doomed {
            self.kill(host, vm, epoch, FENCED);
        }
    }

    /// SIGKILL, or a crash: dead a few milliseconds later.
    pub(super) fn kill(&mut self, host: usize, vm: VmId, epoch: Epoch, why: &'static str) {
        let us = match why {
            KILLED | FENCED => self.draw(1_000, 8_000),
            _ => self.draw(10, 500),
        };
        let Some(qemu) = self.hosts[host].keeper.processes.get_mut(&(vm, epoch)) else {
            return;
        };
        if qemu.is_dead() || qemu.dying.is_some() {
            return;
        }
        qemu.dying = Some(why);
        let serial = qemu.serial;
        self.after_us(us, Event::Guest(host, serial, GuestTimer::Dead));
    }

    /// The agent's request to start a QEMU.
    pub(super) fn keeper_start(
        &mut self,
        host: usize,
        vm: VmId,
        tenure: &Tenure,
        incoming: bool,
    ) -> Result<(), Refused> {
        let now = self.boot(host);
        let (ignore_term, ignore_epoch) = (self.mutated(Mutation::IgnoreTerm), self.mutated(Mutation::IgnoreEpoch));
        let held = self.lease_held(host, now);
        let keeper = &mut self.hosts[host].keeper;
        let open = keeper.open.filter(|_| held).ok_or(Refused::NoLease)?;
        if open != tenure.term && !ignore_term {
            return Err(Refused::WrongTerm);
        }
        if keeper.processes.iter().any(|((of, _), qemu)| *of == vm && !qemu.is_dead()) {
            return Err(Refused::AlreadyRunning);
        }
        if keeper.last_epoch.get(&vm).is_some_and(|last| *last >= tenure.epoch) && !ignore_epoch {
            return Err(Refused::EpochUsed);
        }
        keeper.last_epoch.insert(vm, tenure.epoch);
        self.serial += 1;
        let qemu = Qemu {
            serial: self.serial,
            stage: if incoming { Stage::Waiting } else { Stage::Booting },
            dying: None,
            ram: 0,
            asked: false,
            leaving: None,
            round: 0,
        };
        let serial = qemu.serial;
        self.hosts[host].keeper.processes.insert((vm, tenure.epoch), qemu);
        let (name, epoch) = (self.vm_name(vm), tenure.epoch);
        let what = if incoming { "waits for" } else { "starts" };
        self.log(|| format!("  n{} QEMU {what} {name} (epoch {epoch})", host + 1));
        if !incoming {
            self.begins_to_run(host, vm, tenure.epoch);
            let us = self.draw(150_000, 900_000);
            self.after_us(us, Event::Guest(host, serial, GuestTimer::Booted));
        }
        Ok(())
    }

    /// Uses an epoch up without starting it.
    pub(super) fn keeper_retire(&mut self, host: usize, vm: VmId, epoch: Epoch) {
        let last = self.hosts[host].keeper.last_epoch.entry(vm).or_default();
        *last = (*last).max(epoch);
    }

    /// A guest begins to run or goes on: with locks it needs them, and its memory
    /// has to belong to what is on its disks.
    fn begins_to_run(&mut self, host: usize, vm: VmId, epoch: Epoch) {
        if self.setting.image_locks && self.locked_elsewhere(host, vm, epoch) {
            if let Some(qemu) = self.hosts[host].keeper.processes.get_mut(&(vm, epoch)) {
                // Refused before the first instruction.
                qemu.stage = Stage::Waiting;
            }
            return self.kill(host, vm, epoch, LOCKED);
        }
        let written = self.disks.entry(vm).or_default();
        *written += 1;
        let ram = *written;
        if let Some(qemu) = self.hosts[host].keeper.processes.get_mut(&(vm, epoch)) {
            qemu.ram = ram;
        }
        self.judge_owners(vm);
    }

    fn locked_elsewhere(&self, host: usize, vm: VmId, epoch: Epoch) -> bool {
        let all = self.hosts.iter().enumerate();
        let mut processes =
            all.flat_map(|(at, host)| host.keeper.processes.iter().map(move |(tag, qemu)| (at, tag, qemu)));
        processes.any(|(at, (of, number), qemu)| *of == vm && qemu.owns() && (at, *number) != (host, epoch))
    }

    /// Continues a migration's target.
    pub(super) fn continue_guest(&mut self, host: usize, vm: VmId, epoch: Epoch) {
        let written = self.disks.get(&vm).copied().unwrap_or(0);
        let Some(qemu) = self.hosts[host].keeper.processes.get_mut(&(vm, epoch)) else {
            return;
        };
        if qemu.stage != Stage::Loaded || qemu.dying.is_some() {
            return;
        }
        qemu.stage = Stage::Running;
        let ram = qemu.ram;
        let name = self.vm_name(vm);
        self.log(|| format!("  n{} continues {name} (epoch {epoch})", host + 1));
        if ram != written {
            self.broken(
                "stale guest",
                format!(
                    "{name} goes on on n{} with the memory of run {ram}, but run {written} wrote to its disks since",
                    host + 1
                ),
            );
        }
        self.begins_to_run(host, vm, epoch);
    }

    fn tag_of(&self, host: usize, serial: u64) -> Option<(VmId, Epoch)> {
        let mut processes = self.hosts[host].keeper.processes.iter();
        processes.find(|(_, qemu)| qemu.serial == serial).map(|(tag, _)| *tag)
    }

    pub(super) fn guest_timer(&mut self, host: usize, serial: u64, timer: GuestTimer) {
        let Some((vm, epoch)) = self.tag_of(host, serial) else {
            return;
        };
        let Some(qemu) = self.hosts[host].keeper.processes.get_mut(&(vm, epoch)) else {
            return;
        };
        match timer {
            _ if qemu.is_dead() => {}
            GuestTimer::Booted if qemu.stage == Stage::Booting => qemu.stage = Stage::Running,
            GuestTimer::ShutDown if matches!(qemu.stage, Stage::Running | Stage::Booting) => {
                let still_asked = qemu.asked;
                if still_asked {
                    qemu.stage = Stage::GuestOff;
                }
            }
            GuestTimer::Dead => self.died(host, vm, epoch),
            GuestTimer::Step => self.leaving_step(host, vm, epoch),
            GuestTimer::GiveUp => self.stay(host, vm, epoch, "the target did not acknowledge"),
            _ => {}
        }
    }

    fn died(&mut self, host: usize, vm: VmId, epoch: Epoch) {
        let Some(qemu) = self.hosts[host].keeper.processes.get_mut(&(vm, epoch)) else {
            return;
        };
        let why = qemu.dying.unwrap_or(KILLED);
        qemu.stage = Stage::Dead(why);
        let broken = qemu.leaving.filter(|_| qemu.moving()).map(|l| (l.target, l.to));
        let name = self.vm_name(vm);
        self.log(|| format!("  n{} QEMU of {name} (epoch {epoch}) is dead: {why}", host + 1));
        if let Some((target, to)) = broken {
            self.send(host, target, Message::StreamBroken { vm, to });
        }
        self.keeper_turn(host);
    }

    /// QMP `system_powerdown`: most guests shut down some time later.
    pub(super) fn power_button(&mut self, host: usize, vm: VmId, epoch: Epoch) {
        let ignores = self.chance(250);
        let us = self.draw(100_000, 3_000_000);
        let Some(qemu) = self.hosts[host].keeper.processes.get_mut(&(vm, epoch)) else {
            return;
        };
        if qemu.asked {
            return;
        }
        qemu.asked = true;
        let serial = qemu.serial;
        if !ignores {
            self.after_us(us, Event::Guest(host, serial, GuestTimer::ShutDown));
        }
    }

    /// QMP `migrate`.
    pub(super) fn migrate_away(&mut self, host: usize, vm: VmId, epoch: Epoch, to: Tenure) {
        let target = super::host::host_of(to.node);
        let us = self.draw(20_000, 300_000);
        let Some(qemu) = self.hosts[host].keeper.processes.get_mut(&(vm, epoch)) else {
            return;
        };
        qemu.round += 1;
        qemu.leaving = Some(Leaving { to: to.epoch, target, percent: 0, state: LeavingState::Active });
        let serial = qemu.serial;
        let name = self.vm_name(vm);
        self.log(|| format!("  n{} sends {name} to n{}", host + 1, target + 1));
        self.after_us(us, Event::Guest(host, serial, GuestTimer::Step));
    }

    fn leaving_step(&mut self, host: usize, vm: VmId, epoch: Epoch) {
        let (fails, us, gives_up) = (self.chance(15), self.draw(20_000, 300_000), self.draw(600_000, 1_500_000));
        let more = self.draw(5, 35) as u8;
        let Some(qemu) = self.hosts[host].keeper.processes.get_mut(&(vm, epoch)) else {
            return;
        };
        let Some(leaving) = qemu.leaving.as_mut().filter(|l| l.state == LeavingState::Active) else {
            return;
        };
        let (serial, target, to) = (qemu.serial, leaving.target, leaving.to);
        let open = |a, b| !self.links.is_cut(a, b, Traffic::Migration);
        if fails || !open(host, target) || !open(target, host) {
            return self.stay(host, vm, epoch, "the stream broke");
        }
        leaving.percent = leaving.percent.saturating_add(more).min(99);
        if leaving.percent < 99 {
            return self.after_us(us, Event::Guest(host, serial, GuestTimer::Step));
        }
        // The guest stands still from here on, and its last pages are sent.
        leaving.state = LeavingState::Switching;
        let ram = qemu.ram;
        self.send(host, target, Message::Stream { vm, from: epoch, to, ram });
        self.after_us(gives_up, Event::Guest(host, serial, GuestTimer::GiveUp));
        // The worst moment to be cut off: all is sent, and the answer will not come.
        if self.chance(60) {
            self.isolate(host, true);
            self.after_us(4_000_000, Event::Rejoin(host));
        }
    }

    /// A migration is given up and the guest goes on where it was.
    pub(super) fn stay(&mut self, host: usize, vm: VmId, epoch: Epoch, why: &'static str) {
        let Some(qemu) = self.hosts[host].keeper.processes.get_mut(&(vm, epoch)) else {
            return;
        };
        if !qemu.moving() || qemu.is_dead() || qemu.dying.is_some() {
            return;
        }
        let Some(leaving) = &mut qemu.leaving else {
            return;
        };
        let switching = leaving.state == LeavingState::Switching;
        leaving.state = LeavingState::Failed(why);
        let (target, to) = (leaving.target, leaving.to);
        let name = self.vm_name(vm);
        self.log(|| format!("  n{} keeps {name}: {why}", host + 1));
        self.send(host, target, Message::StreamBroken { vm, to });
        if switching {
            self.begins_to_run(host, vm, epoch);
        }
    }

    pub(super) fn stream_arrived(
        &mut self,
        from: usize,
        host: usize,
        vm: VmId,
        source: Epoch,
        target: Epoch,
        ram: u64,
    ) {
        let Some(qemu) = self.hosts[host].keeper.processes.get_mut(&(vm, target)) else {
            return;
        };
        if qemu.stage == Stage::Waiting && qemu.dying.is_none() {
            qemu.stage = Stage::Loaded;
            qemu.ram = ram;
            self.send(host, from, Message::StreamTaken { vm, from: source, to: target });
        }
    }

    pub(super) fn stream_taken(&mut self, host: usize, vm: VmId, epoch: Epoch, to: Epoch) {
        let Some(qemu) = self.hosts[host].keeper.processes.get_mut(&(vm, epoch)) else {
            return;
        };
        let Some(leaving) = qemu.leaving.as_mut().filter(|l| l.to == to) else {
            return;
        };
        if leaving.state == LeavingState::Switching && qemu.dying.is_none() && qemu.stage != Stage::Sent {
            leaving.state = LeavingState::Completed;
            qemu.stage = Stage::Sent;
            let name = self.vm_name(vm);
            self.log(|| format!("  n{} has sent {name}", host + 1));
        }
    }

    pub(super) fn stream_broken(&mut self, host: usize, vm: VmId, target: Epoch) {
        let waits = |qemu: &Qemu| qemu.stage == Stage::Waiting;
        if self.hosts[host].keeper.processes.get(&(vm, target)).is_some_and(waits) {
            self.kill(host, vm, target, "the migration stream broke");
        }
    }

    pub(super) fn vm_name(&self, vm: VmId) -> String {
        let latest = self.chain.latest();
        latest.vms.get(&vm).map_or_else(|| format!("VM {}", vm.0.as_fields().0), |vm| vm.name.clone())
    }

    /// When a host or its keeper goes on, the keeper looks at the time first.
    pub(super) fn catch_up(&mut self, host: usize) {
        self.keeper_turn(host);
        let waiting = std::mem::take(&mut self.hosts[host].waiting);
        for (_, event) in waiting {
            self.at(self.now, event);
        }
    }

    /// Whether the lease that the keeper has is of this term and lasts.
    pub(super) fn holds_in(&self, host: usize, term: NodeTerm, now: BootTime) -> bool {
        let keeper = &self.hosts[host].keeper;
        keeper.alive && keeper.lease.term() == term && keeper.lease.held(now)
    }

    /// Nanoseconds of a disk write of this host.
    pub(super) fn disk_ns(&mut self, host: usize) -> u64 {
        match self.hosts[host].disk_ms {
            0 => self.draw(100, 2_000) * 1_000,
            ms => ms * MS,
        }
    }
}
