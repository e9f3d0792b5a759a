//! Users: they ask any agent, repeat themselves under the same id, and remember
//! what they were told.

use std::rc::Rc;

use holdfast_core::*;
use uuid::Uuid;

use super::{Event, Message, WALL_ZERO_MS, World, volumes};
use crate::clock::MS;
use crate::mutation::Mutation;
use crate::role;
use crate::script::{Deed, Wish};

/// After this long a client asks again.
const PATIENCE_MS: u64 = 1_500;

/// A user's one command.
pub struct Client {
    pub proposal: Rc<Proposal>,
    pub tries: u32,
    pub reply: Option<Reply>,
    /// It was told that nothing happened, without a reply.
    pub given_up_as_failed: bool,
}

impl World {
    /// Turns a wish into a command, as the API does with the state that it sees.
    pub(super) fn ask(&mut self, wish: Wish) {
        let alive: Vec<_> = (0..self.hosts.len()).filter(|host| self.hosts[*host].agent.alive).collect();
        if alive.is_empty() {
            return;
        }
        let through = if self.setting.calm { alive[0] } else { *self.rng.pick(&alive) };
        let state = self.hosts[through].agent.state.clone();
        let Some(command) = self.command(&state, through, &wish) else {
            self.log(|| format!("> {}: there is no such thing", Deed::Ask(wish)));
            return;
        };
        let at_ms = WALL_ZERO_MS + self.now / MS;
        let proposal = self.proposal("user", at_ms, command);
        self.log(|| format!("> {}", Deed::Ask(wish)));
        self.clients.push(Client { proposal, tries: 0, reply: None, given_up_as_failed: false });
        self.client_turn(self.clients.len() - 1);
    }

    fn command(&mut self, state: &ClusterState, through: usize, wish: &Wish) -> Option<Command> {
        let named = |name: &String| state.vm_named(name).map(|vm| vm.id);
        let desired = |vm: &String, desired| Some(Command::SetDesired { vm: named(vm)?, desired });
        let cast = self.cast;
        let node = |index: usize| role::player(&cast, index).map(|index| NodeId(index as u64 + 1));
        match wish {
            Wish::Create { vm, memory_mib, priority } => {
                let id = VmId(Uuid::from_u64_pair(self.rng.next(), self.rng.next()));
                let stop_timeout_s = self.draw(2, 8) as u32;
                let file = format!("{}/disk0.raw", Vm::directory(id, vm));
                let disk = DiskSpec {
                    volume: self.volume_of(vm),
                    file,
                    size_bytes: 1 << 30,
                    format: DiskFormat::Raw,
                    allocation: Allocation::Thin,
                };
                Some(Command::CreateVm {
                    id,
                    name: vm.clone(),
                    spec: VmSpec {
                        cpus: 1,
                        memory_bytes: memory_mib << 20,
                        machine: "pc-q35-7.2".into(),
                        cpu_model: None,
                        direct_boot: None,
                        disks: vec![disk],
                        nics: Vec::new(),
                        priority: *priority,
                        stop_timeout_s,
                    },
                    node: self.node_of(through),
                    sources: Sources { start: true, ..Sources::default() },
                })
            }
            Wish::Start(vm) => desired(vm, Desired::Running),
            Wish::Stop(vm) => desired(vm, Desired::Stopped),
            Wish::Force(vm) => desired(vm, Desired::ForcedOff),
            Wish::Pause(vm) => desired(vm, Desired::Paused),
            Wish::Restart(vm) => Some(Command::RestartVm { vm: named(vm)? }),
            Wish::Delete(vm) => Some(Command::DeleteVm { vm: named(vm)?, node: self.node_of(through) }),
            Wish::Migrate(vm, None) => Some(Command::MigrateVm { vm: named(vm)?, to: None }),
            Wish::Migrate(vm, Some(to)) => Some(Command::MigrateVm { vm: named(vm)?, to: Some(node(*to)?) }),
            Wish::Cancel(vm) => {
                let vm = named(vm)?;
                let mut jobs = state.running_jobs();
                let job = jobs.find(|job| job.vm == vm && matches!(job.work, Work::Migrate { .. } | Work::Stop))?;
                Some(Command::CancelJob { job: job.id })
            }
            Wish::Remove(index) => Some(Command::RemoveNode { node: node(*index)? }),
            Wish::Drain(index) => Some(Command::DrainNode { node: node(*index)?, drained: true }),
            Wish::Resume(index) => Some(Command::DrainNode { node: node(*index)?, drained: false }),
            Wish::Memory(index, mib) => {
                let mut facts = state.nodes.get(&node(*index)?)?.facts.clone();
                facts.memory_bytes = mib << 20;
                Some(Command::SetFacts { node: node(*index)?, facts })
            }
            Wish::Profile(profile) => Some(Command::SetProfile { profile: *profile }),
            Wish::Own(lun, index) => Some(Command::SetOwner { volume: volumes::name(*lun), node: node(*index)? }),
        }
    }

    pub(super) fn client_turn(&mut self, index: usize) {
        let client = &mut self.clients[index];
        if client.reply.is_some() || client.given_up_as_failed || client.tries >= 12 {
            return;
        }
        client.tries += 1;
        self.last_asked = self.now;
        if client.tries == 2 && self.setting.mutation == Some(Mutation::TimeoutIsFailure) {
            client.given_up_as_failed = true;
            return;
        }
        let proposal = client.proposal.clone();
        let alive: Vec<_> = (0..self.hosts.len()).filter(|host| self.hosts[*host].agent.alive).collect();
        if !alive.is_empty() {
            let through = if self.setting.calm { alive[0] } else { *self.rng.pick(&alive) };
            self.hosts[through].agent.callers.insert(proposal.id, index);
            self.send(through, through, Message::Propose(proposal));
        }
        self.at(self.now + PATIENCE_MS * MS, Event::Client(index));
    }

    pub(super) fn answered(&mut self, index: usize, reply: Reply) {
        let client = &mut self.clients[index];
        if client.reply.is_none() {
            if let Reply::Refused(refusal) = &reply {
                let why = refusal.to_string();
                self.log(|| format!("< refused: {why}"));
            }
            self.clients[index].reply = Some(reply.clone());
        }
        self.judge_reply(index, &reply);
    }
}
