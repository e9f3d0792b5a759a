//! The oracle: knows everything, touches nothing, and says what was broken.

use std::collections::BTreeMap;
use std::rc::Rc;

use holdfast_core::*;

use super::World;
use super::host::{Qemu, Stage, host_of};
use crate::raft::{Entry, RaftMessage};

/// A rule that was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// When, in milliseconds of true time.
    pub at_ms: u64,
    /// Which rule.
    pub rule: &'static str,
    /// How.
    pub text: String,
}

/// What was committed, once for all nodes: each of them has to commit the same.
#[derive(Default)]
pub struct Chain {
    entries: Vec<Entry>,
    states: Vec<Rc<ClusterState>>,
    replies: Vec<Reply>,
    ids: BTreeMap<RequestId, usize>,
    /// Decisions that were applied.
    pub decisions: usize,
}

impl Chain {
    /// The state after so many entries.
    pub fn state(&self, index: usize) -> Rc<ClusterState> {
        match index.checked_sub(1) {
            Some(at) => self.states[at].clone(),
            None => Rc::default(),
        }
    }

    /// The state after all of them.
    pub fn latest(&self) -> Rc<ClusterState> {
        self.state(self.len())
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// What became of an entry.
    pub fn reply(&self, index: usize) -> Reply {
        self.replies[index - 1].clone()
    }

    /// Where a proposal was first committed.
    pub fn index_of(&self, id: RequestId) -> Option<usize> {
        self.ids.get(&id).copied()
    }

    /// Applies the next entry.
    pub fn append(&mut self, entry: &Entry) {
        let mut state = self.latest();
        let mut reply = Reply::Done;
        if let Some(proposal) = entry.proposal() {
            reply = Rc::make_mut(&mut state).apply(proposal);
            self.ids.entry(proposal.id).or_insert(self.entries.len() + 1);
            if matches!(proposal.command, Command::Decide { .. }) && reply == Reply::Done {
                self.decisions += 1;
            }
        }
        self.entries.push(entry.clone());
        self.states.push(state);
        self.replies.push(reply);
    }

    fn proposals(&self) -> impl Iterator<Item = &Rc<Proposal>> {
        self.entries.iter().filter_map(Entry::proposal)
    }
}

/// What is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Elections that were won.
    pub elections: u64,
    /// Entries about who takes part that were proposed.
    pub moves: u64,
    /// The longest that queues were: what `world::rest` has bounds for, in its order.
    pub fullest: [u64; 6],
    /// From the heal until everything was settled: epochs that one VM got, entries
    /// about who takes part, elections.
    pub unrest: [u64; 3],
}

impl Tally {
    /// The most of each.
    pub fn or(self, other: Tally) -> Tally {
        let most = |(one, other): (u64, u64)| one.max(other);
        let mut both = self;
        both.elections = self.elections.max(other.elections);
        both.moves = self.moves.max(other.moves);
        both.fullest.iter_mut().zip(other.fullest).for_each(|(one, other)| *one = most((*one, other)));
        both.unrest.iter_mut().zip(other.unrest).for_each(|(one, other)| *one = most((*one, other)));
        both
    }
}

impl World {
    pub(super) fn broken(&mut self, rule: &'static str, text: String) {
        if self.violation.is_none() {
            self.log(|| format!("BROKEN {rule}: {text}"));
            self.violation = Some(Violation { at_ms: self.now_ms(), rule, text });
        }
    }

    /// A node has committed an entry. Whether a node was called lost by it, for the
    /// first time.
    pub(super) fn commit(&mut self, index: usize, entry: &Entry) -> bool {
        if let Some(known) = self.chain.entries.get(index - 1) {
            if !known.is(entry) {
                self.broken("one log", format!("two entries were committed at index {index}"));
            }
            return false;
        }
        let before = self.chain.latest();
        self.chain.append(entry);
        let after = self.chain.latest();
        let decided = entry.proposal().is_some_and(|proposal| {
            matches!(proposal.command, Command::Decide { .. }) && self.chain.reply(index) == Reply::Done
        });
        if decided {
            self.last_decision = self.now;
        }
        self.judge_epochs(&before, &after);
        self.judge_drained(&before, &after);
        self.judge_history(&after);
        self.judge_volumes(&before, &after);
        self.tell_news(&before, &after);
        let was_up = |node: &&Node| !node.is_up() && before.nodes.get(&node.id).is_some_and(Node::is_up);
        let lost: Vec<_> = after.nodes.values().filter(was_up).collect();
        for node in &lost {
            self.judge_condemned(usize::MAX, node.id, node.term);
        }
        // Whoever is no node any more has no right to anything: not while it has a lease.
        for node in before.nodes.values().filter(|node| !after.nodes.contains_key(&node.id)) {
            self.judge_condemned(usize::MAX, node.id, node.term);
        }
        !lost.is_empty()
    }

    fn tell_news(&mut self, before: &ClusterState, after: &ClusterState) {
        if !self.setting.trace {
            return;
        }
        for event in after.events.iter().filter(|event| event.index > before.last_event) {
            let text = format!("{}: {}", event.subject, event.text);
            self.timeline.push((self.now, text));
        }
    }

    fn judge_epochs(&mut self, before: &ClusterState, after: &ClusterState) {
        for (id, node) in &after.nodes {
            if before.nodes.get(id).is_some_and(|was| was.term > node.term) {
                self.broken("terms only grow", format!("{} went back to term {}", node.name, node.term));
            }
        }
        for (id, vm) in &after.vms {
            let Some(was) = before.vms.get(id) else {
                continue;
            };
            let new = vm.tenures().filter(|tenure| !was.tenures().any(|old| old == *tenure));
            let reused = new.filter(|tenure| tenure.epoch <= was.last_epoch).count();
            let beyond = vm.tenures().any(|tenure| tenure.epoch > vm.last_epoch);
            if was.last_epoch > vm.last_epoch || reused > 0 || beyond {
                self.broken("epochs only grow", format!("{}: {:?} after {:?}", vm.name, vm.placement, was.placement));
            }
        }
    }

    /// Nothing comes to a node that is drained.
    fn judge_drained(&mut self, before: &ClusterState, after: &ClusterState) {
        for (id, vm) in &after.vms {
            let was = before.vms.get(id);
            let came = vm.tenures().find(|tenure| {
                let drained = |state: &ClusterState| {
                    state.nodes.get(&tenure.node).is_some_and(|node| node.drained_ms.is_some() || node.leaves)
                };
                let there = was.is_some_and(|was| was.tenures().any(|old| old.node == tenure.node));
                drained(before) && drained(after) && !there
            });
            if let Some(came) = came {
                self.broken("drained nodes take nothing", format!("{} came to n{}", vm.name, host_of(came.node) + 1));
            }
        }
    }

    /// A node's lease in this term is said to be over.
    pub(super) fn judge_condemned(&mut self, by: usize, node: NodeId, term: NodeTerm) {
        let host = host_of(node);
        let now = self.boot(host);
        if self.hosts[host].powered && self.holds_in(host, term, now) {
            let who = if by == usize::MAX { "the cluster".into() } else { format!("n{}", by + 1) };
            self.broken(
                "leases end first",
                format!("{who} says that the lease of n{} in term {term} is over, but it lasts", host + 1),
            );
        }
    }

    /// A grant came in.
    pub(super) fn judge_lease(&mut self, host: usize) {
        let now = self.boot(host);
        let state = self.chain.latest();
        let Some(node) = state.nodes.get(&self.node_of(host)) else {
            return;
        };
        if !node.is_up() && self.holds_in(host, node.term, now) {
            self.broken(
                "leases end first",
                format!("n{} holds a lease in term {}, in which it was called lost", host + 1, node.term),
            );
        }
    }

    /// A guest begins to run or goes on: nobody else may have it.
    pub(super) fn judge_owners(&mut self, vm: VmId) {
        let owners = self.owners(vm);
        if owners.len() > 1 {
            let places: Vec<_> = owners.iter().map(|(host, epoch)| format!("n{} (epoch {epoch})", host + 1)).collect();
            let name = self.vm_name(vm);
            self.broken("one owner", format!("{name} runs on {}", places.join(" and on ")));
        }
    }

    /// The witness says something: nobody may have read its disk since it was.
    pub(super) fn judge_witness(&mut self, host: usize) {
        let instance = self.hosts[host].agent.hosting.as_ref().and_then(|hosting| hosting.instance.as_ref());
        if let Some(instance) = instance.filter(|instance| instance.seat.life != self.witness_read) {
            let epoch = instance.epoch;
            let text = format!("n{} speaks for it under epoch {epoch}, but it was read since", host + 1);
            self.broken("one witness", text);
        }
    }

    /// A vote is given: nobody gives two in a term.
    pub(super) fn judge_vote(&mut self, who: usize, to: usize, message: &RaftMessage) {
        let RaftMessage::Vote { pre: false, term, granted: true } = message else {
            return;
        };
        let before = *self.votes.entry((who, *term)).or_insert(to);
        if before != to {
            let names = (self.name_of(who), self.name_of(before), self.name_of(to));
            let text = format!("{} voted for {} and for {} in term {term}", names.0, names.1, names.2);
            self.broken("one vote in a term", text);
        }
    }

    /// A client was told what became of its command.
    pub(super) fn judge_reply(&mut self, index: usize, reply: &Reply) {
        let id = self.clients[index].proposal.id;
        let committed = self.chain.index_of(id).map(|at| self.chain.reply(at));
        if committed.as_ref() != Some(reply) {
            self.broken(
                "no acknowledged command lost",
                format!("a client was told {reply:?}, the log says {committed:?}"),
            );
        }
    }

    /// At the end: the log, applied again from its text, gives the same state, and
    /// what was called failed did not happen.
    pub fn judge_log(&mut self) {
        let mut again = ClusterState::default();
        let proposals: Vec<_> = self.chain.proposals().cloned().collect();
        for proposal in proposals {
            let text = serde_json::to_string(&*proposal).unwrap_or_default();
            match serde_json::from_str::<Proposal>(&text) {
                Ok(read) if read == *proposal => drop(again.apply(&read)),
                _ => return self.broken("the log reads back", text),
            }
        }
        if again != *self.chain.latest() {
            self.broken("apply is deterministic", "the same log gave another state".into());
        }
        let happened = self.clients.iter().find(|client| {
            let at = self.chain.index_of(client.proposal.id);
            client.given_up_as_failed && at.is_some_and(|at| !matches!(self.chain.reply(at), Reply::Refused(_)))
        });
        if let Some(client) = happened {
            let text = format!("a client was told that this failed: {:?}", client.proposal.command);
            self.broken("unknown is a result", text);
        }
    }

    /// It took longer than the bound.
    pub fn not_settled(&mut self, what: &[String]) {
        self.broken("settles", what.join("; "));
    }

    /// What is not yet as it should be once everything works again.
    pub fn unsettled(&self) -> Vec<String> {
        let mut all = Vec::new();
        let state = self.chain.latest();
        let coordinators: Vec<_> = (0..self.hosts.len()).filter(|host| self.is_settled(*host)).collect();
        if coordinators.len() != 1 {
            all.push(format!("{} coordinators that have nothing on their mind", coordinators.len()));
        }
        if self.now < self.last_decision + 3_000_000_000 {
            all.push("decisions are still made".into());
        }
        for node in state.nodes.values() {
            let host = host_of(node.id);
            let open = self.hosts[host].keeper.open;
            if !node.is_up() || open != Some(node.term) {
                all.push(format!("{} is {:?} in term {}, and holds {open:?}", node.name, node.membership, node.term));
            }
        }
        for job in state.running_jobs() {
            all.push(format!("job {} goes on: {} {}", job.id, job.work.verb(), job.vm_name));
        }
        all.extend(self.unsettled_volumes(&state));
        for vm in state.vms.values() {
            all.extend(self.unsettled_vm(&state, vm));
        }
        for (index, host) in self.hosts.iter().enumerate() {
            for ((vm, epoch), qemu) in &host.keeper.processes {
                let wanted = state
                    .vms
                    .get(vm)
                    .is_some_and(|vm| vm.tenures().any(|t| (host_of(t.node), t.epoch) == (index, *epoch)));
                if !qemu.is_dead() && !wanted {
                    all.push(format!("n{} runs {vm} (epoch {epoch}) that nobody wants", index + 1));
                }
            }
        }
        all
    }

    fn unsettled_vm(&self, state: &ClusterState, vm: &Vm) -> Option<String> {
        let tell = |what: String| Some(format!("{}: {what}", vm.name));
        if vm.disks != DiskStage::Ready {
            return tell(format!("its disks are {:?}", vm.disks));
        }
        match (&vm.placement, vm.desired.wants_qemu()) {
            (Placement::Nowhere, false) => None,
            (Placement::Nowhere, true) => match &vm.hold {
                Some(Hold::Failed { .. } | Hold::NotProtected) => None,
                Some(Hold::NoRoom { .. }) => roomy(state, vm)
                    .and_then(|node| tell(format!("is held for want of room, but {} has it", node.name))),
                Some(Hold::DiskLocked { .. }) | None => tell("should run, but is nowhere and nobody says why".into()),
            },
            (Placement::On(tenure), true) => {
                let host = &self.hosts[host_of(tenure.node)];
                let stage = host.keeper.processes.get(&(vm.id, tenure.epoch)).map(|qemu: &Qemu| qemu.stage);
                let drained = state.nodes.get(&tenure.node).is_some_and(|node| node.drained_ms.is_some());
                if let Some(node) = roomy(state, vm).filter(|_| drained && vm.desired == Desired::Running) {
                    return tell(format!("is on a drained node, and {} has room", node.name));
                }
                let as_wanted = match vm.desired {
                    Desired::Paused => stage == Some(Stage::Paused),
                    _ => stage == Some(Stage::Running),
                };
                if as_wanted { None } else { tell(format!("should be {:?} as {tenure:?}, is {stage:?}", vm.desired)) }
            }
            (placement, _) => tell(format!("{:?} is wanted, is {placement:?}", vm.desired)),
        }
    }
}

/// A node that VMs may come to and that has room for this one.
fn roomy<'a>(state: &'a ClusterState, vm: &Vm) -> Option<&'a Node> {
    let needs = |vm: &Vm| vm.spec.memory_bytes + (64 << 20);
    state.nodes.values().filter(|node| node.drained_ms.is_none()).find(|node| {
        let on = |other: &&Vm| other.tenures().any(|tenure| tenure.node == node.id);
        let taken: u64 = state.vms.values().filter(on).map(needs).sum();
        node.facts.memory_bytes.saturating_sub(taken) >= needs(vm)
    })
}
