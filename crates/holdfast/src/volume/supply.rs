//! The slabs of one LUN that this node has taken, zeroed ahead of time: pure.
//!
//! ```text
//!  asked for ─▶ to wipe ─▶ being wiped ─▶ wiped ─▶ offered ─▶ mapped, given to a writer
//!      ▲                                              │
//!      └──── forgotten: nobody knows what came of it ◀┘
//! ```
//! The cluster's state decides what is mapped; a slab of which the outcome is not
//! known is forgotten here, and is zeroed again if it turns out to be ours still: by
//! another taking, so that what was asked for before does not map it any more.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use holdfast_core::{Mapped, Slabs, Taking};
use uuid::Uuid;

use super::protocol::{Answer, Ask, DiskId};

/// Bytes that are zeroed ahead when nobody streams, and when somebody does.
const AHEAD_BYTES: (u64, u64) = (64 << 20, 1 << 30);
/// Slabs that are zeroed ahead, likewise, at most.
const AHEAD_SLABS: (u32, u32) = (4, 32);
/// Parts that one question maps.
const AT_ONCE: usize = 64;

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub enum Todo<G> {
    /// Ask the cluster.
    Ask(u64, Ask),
    /// Zero a slab, and say so with [`Supply::wiped`].
    Wipe(u32),
    /// A writer's parts are here.
    Give(G, Vec<Mapped>),
    /// A writer has to ask again later.
    Later(G),
    /// There is no room for a writer.
    NoSpace(G),
}

/// A writer that needs slabs.
#[derive(Debug)]
struct Writer<G> {
    disk: DiskId,
    parts: Vec<u32>,
    grant: G,
}

/// The supply of one LUN.
#[derive(Debug)]
pub struct Supply<G> {
    volume: Uuid,
    /// Slabs, each with the number of the taking that gave it.
    to_wipe: VecDeque<(u32, u64)>,
    wiping: Option<(u32, u64)>,
    wiped: BTreeMap<u32, u64>,
    waiting: VecDeque<Writer<G>>,
    mapping: BTreeMap<u64, (Ask, Writer<G>)>,
    taking: Option<(u64, Ask)>,
    /// The last taking that was heard of.
    heard: u64,
    /// How many slabs are kept ahead, and how many at most.
    ahead: (u32, u32),
    /// The cluster had fewer than it was asked for last: nothing is kept ahead.
    scarce: bool,
    /// It had none.
    empty: bool,
}

impl<G> Supply<G> {
    /// Nothing taken yet.
    pub fn new(volume: Uuid, slab_bytes: u64) -> Self {
        let slabs = |bytes: u64, most: u32| u32::try_from(bytes / slab_bytes).unwrap_or(most).clamp(1, most);
        Supply {
            volume,
            to_wipe: VecDeque::new(),
            wiping: None,
            wiped: BTreeMap::new(),
            waiting: VecDeque::new(),
            mapping: BTreeMap::new(),
            taking: None,
            heard: 0,
            ahead: (slabs(AHEAD_BYTES.0, AHEAD_SLABS.0), slabs(AHEAD_BYTES.1, AHEAD_SLABS.1)),
            scarce: false,
            empty: false,
        }
    }

    /// A writer needs slabs for these parts.
    pub fn want(&mut self, disk: DiskId, parts: Vec<u32>, grant: G) {
        (self.scarce, self.empty) = (false, false);
        if self.wiped.is_empty() {
            // Somebody has to wait: whoever writes so much gets more ahead.
            self.ahead.0 = (self.ahead.0 * 2).min(self.ahead.1);
        }
        self.waiting.push_back(Writer { disk, parts, grant });
    }

    /// Those who wait for slabs are not served any more.
    pub fn nobody_waits(&mut self, todo: &mut Vec<Todo<G>>) {
        todo.extend(self.waiting.drain(..).map(|writer| Todo::Later(writer.grant)));
    }

    /// The questions that have no answer yet: for an agent that has just come.
    pub fn open_questions(&self) -> Vec<(u64, Ask)> {
        self.taking.iter().cloned().chain(self.mapping.iter().map(|(id, (ask, _))| (*id, ask.clone()))).collect()
    }

    /// The cluster answered; `false` if it was not asked that here.
    pub fn answered(&mut self, id: u64, answer: &Answer, todo: &mut Vec<Todo<G>>) -> bool {
        if let Some((_, ask)) = self.taking.take_if(|(asked, _)| *asked == id) {
            if let Answer::Slabs(Taking { number, slabs }) = answer {
                let given = slabs.iter().map(|run| run.count).sum::<u32>();
                self.scarce = matches!(ask, Ask::Take { most, .. } if given < most);
                self.empty = given == 0;
                // What an earlier taking gave may have been offered since.
                if *number > self.heard {
                    self.heard = *number;
                    let new = slabs.iter().flat_map(|run| run.first..run.end());
                    self.to_wipe.extend(new.map(|slab| (slab, *number)));
                }
            }
            return true;
        }
        let Some((ask, writer)) = self.mapping.remove(&id) else { return false };
        let (Answer::Mapped(found), Ask::Map { wanted, takings, .. }) = (answer, ask) else {
            todo.push(Todo::Later(writer.grant));
            return true;
        };
        let slab_of = |part: u32| {
            let run = found.iter().find(|run| run.part <= part && part - run.part < run.count)?;
            Some(run.slab + (part - run.part))
        };
        for (offer, taking) in wanted.iter().zip(takings) {
            // What was not needed is still ours; what is nowhere is not.
            if slab_of(offer.part).is_some_and(|slab| slab != offer.slab) {
                self.wiped.insert(offer.slab, taking);
            }
        }
        todo.push(match found.is_empty() {
            true => Todo::Later(writer.grant),
            false => Todo::Give(writer.grant, found.clone()),
        });
        true
    }

    /// A slab was zeroed, or could not be.
    pub fn wiped(&mut self, slab: u32, done: bool) {
        let Some((slab, taking)) = self.wiping.take_if(|(wiping, _)| *wiping == slab) else { return };
        match done {
            true => drop(self.wiped.insert(slab, taking)),
            false => self.to_wipe.push_back((slab, taking)),
        }
    }

    /// Everything that can be done now. `number` numbers questions.
    pub fn go_on(&mut self, number: &mut u64, todo: &mut Vec<Todo<G>>) {
        while let Some(writer) = self.waiting.front()
            && !self.wiped.is_empty()
        {
            let count = writer.parts.len().min(self.wiped.len()).min(AT_ONCE);
            let Some(writer) = self.waiting.pop_front() else { break };
            let slabs = std::iter::from_fn(|| self.wiped.pop_first()).take(count);
            let offers = writer.parts.iter().zip(slabs);
            let offer = |(part, (slab, taking)): (&u32, _)| (Mapped { part: *part, slab, count: 1 }, taking);
            let (wanted, takings) = offers.map(offer).unzip();
            *number += 1;
            let ask = Ask::Map { disk: writer.disk, wanted, takings };
            todo.push(Todo::Ask(*number, ask.clone()));
            self.mapping.insert(*number, (ask, writer));
        }
        if self.wiping.is_none()
            && let Some(next) = self.to_wipe.pop_front()
        {
            self.wiping = Some(next);
            todo.push(Todo::Wipe(next.0));
        }
        let on_the_way = self.to_wipe.len() + usize::from(self.wiping.is_some());
        if self.empty && on_the_way == 0 {
            todo.extend(self.waiting.drain(..).map(|writer| Todo::NoSpace(writer.grant)));
        }
        let waited_for: usize = self.waiting.iter().map(|writer| writer.parts.len()).sum();
        let ahead = if self.scarce { 0 } else { self.ahead.0 as usize };
        let wanted = ahead + waited_for.min(AT_ONCE);
        let most = wanted.saturating_sub(on_the_way + self.wiped.len());
        if most > 0 && self.taking.is_none() && !self.empty {
            *number += 1;
            let ask = Ask::Take { volume_id: self.volume, known: self.known(), most: most as u32 };
            todo.push(Todo::Ask(*number, ask.clone()));
            self.taking = Some((*number, ask));
        }
    }

    fn known(&self) -> Vec<Slabs> {
        let offered = self.mapping.values().flat_map(|(ask, _)| match ask {
            Ask::Map { wanted, .. } => wanted.iter().map(|run| run.slab).collect(),
            Ask::Take { .. } | Ask::Unmap { .. } => Vec::new(),
        });
        let dirty = self.to_wipe.iter().chain(&self.wiping).map(|(slab, _)| *slab);
        let all: BTreeSet<u32> = dirty.chain(self.wiped.keys().copied()).chain(offered).collect();
        let mut runs = Vec::<Slabs>::new();
        for slab in all {
            match runs.last_mut() {
                Some(last) if last.end() == slab => last.count += 1,
                _ => runs.push(Slabs { first: slab, count: 1 }),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use holdfast_core::{Lun, LunFile, NodeId, NodeTerm, VmId};
    use proptest::prelude::*;

    use super::*;

    const SLAB: u64 = 16 << 20;
    const VM: VmId = VmId(uuid::Uuid::nil());

    /// A node's volume server, and what is on its way between it and the cluster.
    struct Node {
        term: NodeTerm,
        supply: Supply<u32>,
        number: u64,
        /// Questions that the cluster has not decided, with the term in which they were
        /// asked; answers that were not heard.
        asked: Vec<(u64, NodeTerm, Ask)>,
        answers: Vec<(u64, Answer)>,
        wiping: Vec<u32>,
    }

    impl Node {
        fn new() -> Node {
            Node {
                term: NodeTerm(1),
                supply: Supply::new(Uuid::from_u128(9), SLAB),
                number: 0,
                asked: Vec::new(),
                answers: Vec::new(),
                wiping: Vec::new(),
            }
        }

        /// Another life of the server; what the one before it had asked may be decided
        /// still, and its answer goes nowhere.
        fn restart(&mut self) {
            // A process that is gone wipes nothing any more.
            (self.supply, self.wiping) = (Supply::new(Uuid::from_u128(9), SLAB), Vec::new());
            self.answers.clear();
            self.asked.iter_mut().for_each(|(id, ..)| *id = u64::MAX);
        }
    }

    /// Two nodes and the cluster that they ask about slabs; one disk, which moves.
    struct World {
        lun: Lun,
        nodes: [Node; 2],
        /// Which nodes may write to the disk, by epochs, and under which the guest does.
        rights: BTreeMap<u64, usize>,
        home: u64,
        last_epoch: u64,
        /// What each slab holds: zeroes, or something.
        zero: Vec<bool>,
        /// Parts that the guest may have written to.
        written: BTreeMap<u32, u32>,
    }

    impl World {
        fn new(slabs: u32) -> World {
            let mut lun = Lun::new(SLAB, slabs);
            lun.files.insert("disk".into(), LunFile::new(VM, 64 * SLAB));
            World {
                lun,
                nodes: [Node::new(), Node::new()],
                rights: [(1, 0)].into(),
                home: 1,
                last_epoch: 1,
                zero: vec![false; slabs as usize],
                written: BTreeMap::new(),
            }
        }

        fn settle(&mut self, at: usize) {
            self.go_on(at, Vec::new());
        }

        fn go_on(&mut self, at: usize, mut todo: Vec<Todo<u32>>) {
            let node = &mut self.nodes[at];
            node.supply.go_on(&mut node.number, &mut todo);
            for todo in todo {
                let node = &mut self.nodes[at];
                match todo {
                    Todo::Ask(id, ask) => node.asked.push((id, node.term, ask)),
                    Todo::Wipe(slab) => node.wiping.push(slab),
                    Todo::Give(epoch, found) if u64::from(epoch) == self.home => {
                        one_by_one(&found).for_each(|(part, slab)| self.write(part, slab));
                    }
                    Todo::Give(..) | Todo::Later(_) | Todo::NoSpace(_) => {}
                }
            }
            self.judge();
        }

        /// No slab of the disk is being zeroed, by anybody.
        fn judge(&self) {
            for slab in self.nodes.iter().flat_map(|node| &node.wiping) {
                let mut parts = one_by_one(&self.lun.files["disk"].parts);
                assert!(!parts.any(|(_, used)| used == *slab), "slab {slab} is being zeroed and part of the disk");
            }
        }

        /// The guest writes to a part from now on.
        fn write(&mut self, part: u32, slab: u32) {
            let known = self.written.contains_key(&part);
            assert!(known || self.zero[slab as usize], "part {part} has slab {slab}, which is not zeroed");
            assert_eq!(self.lun.files["disk"].slab(part), Some(slab));
            self.written.insert(part, slab);
            self.zero[slab as usize] = false;
        }

        fn decide(&mut self, at: usize, which: usize, answered: bool) {
            if self.nodes[at].asked.is_empty() {
                return;
            }
            let which = which % self.nodes[at].asked.len();
            let (id, term, ask) = self.nodes[at].asked.remove(which);
            let me = NodeId(at as u64);
            let answer = match ask {
                Ask::Take { known, most, .. } if term == self.nodes[at].term => {
                    Answer::Slabs(self.lun.take(me, term, &known, most))
                }
                Ask::Map { disk, wanted, takings }
                    if term == self.nodes[at].term && self.rights.get(&disk.epoch) == Some(&at) =>
                {
                    Answer::Mapped(self.lun.map("disk", me, term, &wanted, &takings))
                }
                _ => Answer::Unknown,
            };
            self.judge();
            self.nodes[at].answers.push((id, if answered { answer } else { Answer::Unknown }));
        }

        fn step(&mut self, at: usize, step: &Step) {
            let node = &mut self.nodes[at];
            match *step {
                Step::Want(part, count) => {
                    let (epoch, at) = (self.home, self.rights[&self.home]);
                    let parts: Vec<_> = (part..part + count).filter(|part| !self.written.contains_key(part)).collect();
                    let disk = DiskId { vm: VM, disk: 0, epoch };
                    if !parts.is_empty() {
                        self.nodes[at].supply.want(disk, parts, epoch as u32);
                    }
                    return self.settle(at);
                }
                Step::Decide(which) => self.decide(at, which, true),
                Step::LoseAnswer(which) => self.decide(at, which, false),
                Step::GiveUp(which) => {
                    // Nobody knows: it may still be decided, once or twice.
                    if !node.asked.is_empty() {
                        let which = which % node.asked.len();
                        let (id, term, ask) = node.asked[which].clone();
                        node.answers.push((id, Answer::Unknown));
                        node.asked[which].0 = u64::MAX;
                        node.asked.push((u64::MAX, term, ask));
                    }
                }
                Step::Hear(which) => {
                    if !node.answers.is_empty() {
                        let which = which % node.answers.len();
                        let (id, answer) = node.answers.remove(which);
                        let mut todo = Vec::new();
                        node.supply.answered(id, &answer, &mut todo);
                        return self.go_on(at, todo);
                    }
                }
                Step::Wiped(done) => {
                    if let Some(slab) = node.wiping.pop() {
                        self.zero[slab as usize] = true;
                        node.supply.wiped(slab, done);
                    }
                }
                Step::Restart => node.restart(),
                Step::Lose => {
                    node.restart();
                    node.term = NodeTerm(node.term.0 + 1);
                    self.lun.give_back(NodeId(at as u64));
                    self.rights.retain(|_, home| *home != at);
                    self.begin_anew();
                }
                Step::BeginMove => {
                    if self.rights.len() == 1 {
                        let away = 1 - self.rights[&self.home];
                        self.grant(away);
                    }
                }
                Step::EndMove => {
                    if self.rights.len() > 1 {
                        self.rights.remove(&self.home);
                        self.arrive();
                    }
                }
                Step::Delete => {
                    self.lun.drop_files(VM);
                    self.lun.files.insert("disk".into(), LunFile::new(VM, 64 * SLAB));
                    self.written.clear();
                    self.rights.clear();
                    self.begin_anew();
                }
            }
            self.settle(at);
        }

        fn grant(&mut self, at: usize) {
            self.last_epoch += 1;
            self.rights.insert(self.last_epoch, at);
        }

        /// The VM is started again unless it has somewhere to be.
        fn begin_anew(&mut self) {
            if self.rights.is_empty() {
                self.grant(self.last_epoch as usize % 2);
            }
            self.arrive();
        }

        /// The guest is where it has a right to be, and whoever serves its disk there
        /// knows the parts from the state.
        fn arrive(&mut self) {
            if !self.rights.contains_key(&self.home) {
                self.home = *self.rights.keys().next().expect("a right");
                let parts: Vec<_> = one_by_one(&self.lun.files["disk"].parts).collect();
                parts.into_iter().for_each(|(part, slab)| self.write(part, slab));
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Want(u32, u32),
        Decide(usize),
        LoseAnswer(usize),
        GiveUp(usize),
        Hear(usize),
        Wiped(bool),
        Restart,
        Lose,
        BeginMove,
        EndMove,
        Delete,
    }

    fn one_by_one(runs: &[Mapped]) -> impl Iterator<Item = (u32, u32)> {
        runs.iter().copied().flat_map(Mapped::one_by_one)
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0..40u32, 1..6u32).prop_map(|(part, count)| Step::Want(part, count)),
            6 => any::<usize>().prop_map(Step::Decide),
            1 => any::<usize>().prop_map(Step::LoseAnswer),
            1 => any::<usize>().prop_map(Step::GiveUp),
            6 => any::<usize>().prop_map(Step::Hear),
            6 => (0..10u8).prop_map(|one| Step::Wiped(one > 0)),
            1 => prop_oneof![Just(Step::Restart), Just(Step::Lose), Just(Step::Delete)],
            1 => prop_oneof![Just(Step::BeginMove), Just(Step::EndMove)],
        ]
    }

    fn all_in_order(world: &mut World) {
        for _ in 0..40 {
            [Step::Decide(0), Step::Hear(0), Step::Wiped(true)].iter().for_each(|step| world.step(0, step));
        }
    }

    #[test]
    fn a_writer_gets_what_it_waits_for_and_is_told_when_there_is_nothing() {
        let mut world = World::new(3);
        world.step(0, &Step::Want(0, 5));
        all_in_order(&mut world);
        world.step(0, &Step::Want(3, 2));
        all_in_order(&mut world);
        assert!(!world.written.is_empty() && world.lun.free_slabs() == 0);
        let (supply, mut number, mut todo) = (&mut world.nodes[0].supply, 1 << 20, Vec::new());
        supply.want(DiskId { vm: VM, disk: 0, epoch: 1 }, vec![9, 10, 11], 7);
        for _ in 0..8 {
            supply.go_on(&mut number, &mut todo);
            for todo in std::mem::take(&mut todo) {
                match todo {
                    Todo::NoSpace(grant) => return assert_eq!(grant, 7),
                    Todo::Ask(id, Ask::Take { .. }) => {
                        supply.answered(id, &Answer::Slabs(Taking::default()), &mut Vec::new());
                    }
                    _ => {}
                }
            }
        }
        panic!("nobody said that there is no space");
    }

    /// The first of what was asked of this kind.
    fn asked(world: &World, take: bool) -> usize {
        world.nodes[0].asked.iter().position(|(.., ask)| matches!(ask, Ask::Take { .. }) == take).unwrap()
    }

    /// A slab was zeroed and offered, nobody knows what came of it, and so it is taken
    /// again and zeroed again: what was asked first is decided after that.
    #[test]
    fn a_slab_that_is_zeroed_again_is_not_mapped_by_what_was_asked_before() {
        for moves in [false, true] {
            let mut world = World::new(1);
            world.step(0, &Step::Want(0, 1));
            [Step::Decide(0), Step::Hear(0), Step::Wiped(true)].iter().for_each(|step| world.step(0, step));
            let map = asked(&world, false);
            world.step(0, &Step::GiveUp(map));
            world.step(0, &Step::Hear(0));
            world.step(0, &Step::Want(0, 1));
            while world.nodes[0].wiping.is_empty() {
                let take = asked(&world, true);
                world.step(0, &Step::Decide(take));
                world.step(0, &Step::Hear(0));
            }
            if moves {
                world.step(0, &Step::BeginMove);
            }
            let late = asked(&world, false);
            world.step(0, &Step::Decide(late));
            assert_eq!(world.lun.used_slabs(), 0);
            if moves {
                world.step(0, &Step::EndMove);
            }
            world.step(0, &Step::Wiped(true));
        }
    }

    proptest! {
        #[test]
        fn no_slab_of_a_disk_is_zeroed_and_none_is_given_that_is_not(
            slabs in 1..30u32,
            steps in proptest::collection::vec((0..2usize, step()), 0..250),
        ) {
            let mut world = World::new(slabs);
            for (at, step) in &steps {
                world.step(*at, step);
            }
        }
    }
}
