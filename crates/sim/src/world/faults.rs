//! What the script does to the world.

use holdfast_core::VmId;

use super::host::{Qemu, Stage};
use super::volumes::LUNS;
use super::{Event, Part, World};
use crate::role;
use crate::script::{Deed, Fault, Traffic};

impl World {
    pub(super) fn play(&mut self, index: usize) {
        let deed = self.steps[index].deed.clone();
        match deed {
            Deed::Ask(wish) => self.ask(wish),
            Deed::Fault(Fault::Cast) => self.cast(),
            Deed::Fault(fault) => {
                // A role that nobody plays has no fate.
                let Some(fault) = fault.played_by(&self.cast) else {
                    return;
                };
                self.log(|| format!("! {}", Deed::Fault(fault.clone())));
                self.fault(&fault);
            }
        }
    }

    fn fault(&mut self, fault: &Fault) {
        let known = |node: &usize| *node < self.hosts.len();
        let awake = |node: &usize| self.hosts.get(*node).is_some_and(|host| !host.suspended);
        match fault {
            Fault::Lose(node) if known(node) => self.power_off(*node),
            Fault::Return(node) if known(node) => self.power_on(*node),
            Fault::Cut(from, to, what) if known(from) && known(to) => self.links.set(*from, *to, *what, true),
            Fault::Join(from, to, what) if known(from) && known(to) => self.links.set(*from, *to, *what, false),
            Fault::LoseAtVerdict(node) if known(node) => self.doomed = Some(*node),
            Fault::CrashAgent(node) if known(node) && self.hosts[*node].powered => {
                let us = self.draw(20_000, 500_000);
                self.restart_agent(*node, us);
            }
            Fault::RestartAgent(node, ms) if known(node) && self.hosts[*node].powered => {
                self.restart_agent(*node, ms * 1_000);
            }
            Fault::CrashKeeper(node) if awake(node) && self.hosts[*node].powered => self.crash_keeper(*node),
            Fault::FreezeAgent(node) if known(node) => self.hosts[*node].agent_stopped = true,
            Fault::FreezeKeeper(node) if known(node) => self.hosts[*node].keeper_stopped = true,
            Fault::Suspend(node) if known(node) => {
                let host = &mut self.hosts[*node];
                (host.suspended, host.keeper_stopped, host.agent_stopped) = (true, true, true);
            }
            Fault::ThawAgent(node) if awake(node) => {
                self.hosts[*node].agent_stopped = false;
                self.catch_up(*node);
            }
            Fault::ThawKeeper(node) if awake(node) => {
                self.hosts[*node].keeper_stopped = false;
                self.catch_up(*node);
            }
            Fault::Wake(node) if known(node) => {
                let host = &mut self.hosts[*node];
                (host.suspended, host.keeper_stopped, host.agent_stopped) = (false, false, false);
                self.catch_up(*node);
            }
            Fault::Crash(vm) => {
                if let Some(vm) = self.id_named(vm) {
                    let doomed = self.owners(vm);
                    for (host, epoch) in doomed {
                        self.kill(host, vm, epoch, "QEMU crashed");
                    }
                }
            }
            Fault::Shutdown(vm) => {
                if let Some(vm) = self.id_named(vm) {
                    for (host, epoch) in self.owners(vm) {
                        if let Some(qemu) = self.hosts[host].keeper.processes.get_mut(&(vm, epoch))
                            && qemu.stage == Stage::Running
                            && !qemu.moving()
                        {
                            qemu.stage = Stage::GuestOff;
                        }
                    }
                }
            }
            Fault::SlowDisk(node, ms) if known(node) => self.hosts[*node].disk_ms = *ms,
            Fault::Storm(lost, doubled, late) => {
                (self.links.lost, self.links.doubled, self.links.late_ms) = (*lost, *doubled, *late);
            }
            Fault::CutDisk(node) | Fault::JoinDisk(node) if known(node) => {
                if let Some(disk) = &mut self.disk {
                    match fault {
                        Fault::CutDisk(_) => disk.out_of_reach |= 1 << node,
                        _ => disk.out_of_reach &= !(1 << node),
                    }
                }
            }
            Fault::CutPath(node, lun) if known(node) && *lun < LUNS => self.hosts[*node].paths_cut |= 1 << lun,
            Fault::JoinPath(node, lun) if known(node) && *lun < LUNS => self.hosts[*node].paths_cut &= !(1 << lun),
            Fault::SlowWitness(ms) => {
                if let Some(disk) = &mut self.disk {
                    disk.slow_ms = *ms;
                }
            }
            Fault::CopyDisk => {
                if let Some(disk) = &mut self.disk {
                    disk.copy();
                }
            }
            // What nobody has seen newer cannot be recognised as old.
            Fault::OldDisk => {
                let seen = self.hosts.iter().map(|host| host.memory).min();
                if let (Some(disk), Some(seen)) = (&mut self.disk, seen)
                    && disk.copy_shows() < (seen.epoch, seen.counter)
                {
                    disk.restore();
                }
            }
            Fault::SetClock(node, ms) if known(node) => self.hosts[*node].wall_skew_ms += ms,
            Fault::Heal => self.heal(),
            _ => {}
        }
    }

    /// Everything works again, and nothing breaks by itself any more.
    pub fn heal(&mut self) {
        self.log(|| "! heal".into());
        self.troubled = false;
        self.fault(&Fault::Storm(0, 0, 0));
        self.fault(&Fault::SlowWitness(0));
        self.doomed = None;
        self.last_heal = self.now;
        for node in 0..self.hosts.len() {
            self.hosts[node].disk_ms = 0;
            self.hosts[node].paths_cut = 0;
            for other in 0..self.hosts.len() {
                self.links.set(node, other, Traffic::All, false);
            }
        }
        for node in 0..self.hosts.len() {
            self.fault(&Fault::JoinDisk(node));
            self.fault(&Fault::Wake(node));
            self.power_on(node);
        }
    }

    /// Says who plays which role from now on, if somebody coordinates.
    fn cast(&mut self) {
        let leads = |at: &usize| {
            let host = &self.hosts[*at];
            host.powered && host.agent.alive && host.agent.coordinatorship.is_some()
        };
        let leading = (0..self.hosts.len()).filter(leads);
        let Some(coordinator) = leading.max_by_key(|at| self.hosts[*at].agent.seat.raft.term) else {
            return;
        };
        let members = *self.hosts[coordinator].agent.seat.raft.members();
        let others = members.voting().iter().chain(members.learners.iter());
        let mut others = others.filter(|who| *who != coordinator && *who < self.hosts.len());
        let host = self.witness_hosts().first().copied();
        self.cast = [Some(coordinator), others.next(), others.next(), host];
        let names: Vec<_> = self.cast.iter().flatten().map(|node| role::written(*node)).collect();
        self.log(|| format!("! cast {}", names.join(" ")));
    }

    fn restart_agent(&mut self, node: usize, down_us: u64) {
        let host = &mut self.hosts[node];
        host.agent_stopped = false;
        host.waiting.retain(|(part, _)| *part != Part::Agent);
        let power = host.power;
        self.stop_agent(node);
        self.after_us(down_us, Event::Start(node, Part::Agent, power));
    }

    /// It was agreed on that a node is lost: whoever was to lose its power then does.
    pub(super) fn verdict(&mut self) {
        if let Some(host) = self.doomed.take() {
            self.at(self.now, Event::Doom(host));
        }
    }

    pub(super) fn doom(&mut self, host: usize) {
        self.isolate(host, true);
        self.log(|| format!("! lose n{}", host + 1));
        self.power_off(host);
        self.after_us(10_000, Event::Rejoin(host));
    }

    /// Cuts a host off but for what its migrations send, or joins it again.
    pub(super) fn isolate(&mut self, host: usize, cut: bool) {
        self.log(|| format!("! {} n{}", if cut { "isolate" } else { "rejoin" }, host + 1));
        for other in (0..self.hosts.len()).filter(|other| *other != host) {
            self.links.set(other, host, Traffic::All, cut);
            self.links.set(host, other, Traffic::Heartbeats, cut);
            self.links.set(host, other, Traffic::Agents, cut);
        }
    }

    fn id_named(&self, name: &str) -> Option<VmId> {
        self.chain.latest().vm_named(name).map(|vm| vm.id)
    }

    /// Every QEMU that has the guest of a VM.
    pub(super) fn owners(&self, vm: VmId) -> Vec<(usize, holdfast_core::Epoch)> {
        let mut owners = Vec::new();
        for (index, host) in self.hosts.iter().enumerate() {
            let of_vm = host.keeper.processes.iter().filter(|((of, _), _)| *of == vm);
            owners.extend(of_vm.filter(|(_, qemu)| Qemu::owns(qemu)).map(|((_, epoch), _)| (index, *epoch)));
        }
        owners
    }
}
