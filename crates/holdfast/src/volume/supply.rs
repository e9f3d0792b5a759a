//! The slabs of one LUN that this node has taken, zeroed ahead of time: pure.
//!
//! ```text
//!  asked for ─▶ to wipe ─▶ being wiped ─▶ wiped ─▶ offered ─▶ mapped, given to a writer
//!      ▲                                              │
//!      └──── forgotten: nobody knows what came of it ◀┘
//! ```
//! The cluster's state decides what is mapped; a slab of which the outcome is not
//! known is forgotten here, and is zeroed again if it turns out to be ours still.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use holdfast_core::{Mapped, Slabs};

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
    volume: String,
    to_wipe: VecDeque<u32>,
    wiping: Option<u32>,
    wiped: BTreeSet<u32>,
    waiting: VecDeque<Writer<G>>,
    mapping: BTreeMap<u64, (Ask, Writer<G>)>,
    taking: Option<(u64, Ask)>,
    /// Given once a slab among theirs is not being wiped any more.
    held: Vec<(u32, G, Vec<Mapped>)>,
    /// The slab that is being wiped was seen in use meanwhile.
    wiping_is_used: bool,
    /// Slabs that were seen in use, with the last question at that time: an answer to
    /// that one or an earlier one may come late and still say that they are ours.
    used: BTreeMap<u32, u64>,
    last: u64,
    /// How many slabs are kept ahead, and how many at most.
    ahead: (u32, u32),
    /// The cluster had fewer than it was asked for last: nothing is kept ahead.
    scarce: bool,
    /// It had none.
    empty: bool,
}

impl<G> Supply<G> {
    /// Nothing taken yet.
    pub fn new(volume: &str, slab_bytes: u64) -> Self {
        let slabs = |bytes: u64, most: u32| u32::try_from(bytes / slab_bytes).unwrap_or(most).clamp(1, most);
        Supply {
            volume: volume.to_owned(),
            to_wipe: VecDeque::new(),
            wiping: None,
            wiped: BTreeSet::new(),
            waiting: VecDeque::new(),
            mapping: BTreeMap::new(),
            taking: None,
            held: Vec::new(),
            wiping_is_used: false,
            used: BTreeMap::new(),
            last: 0,
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
            if let Answer::Slabs(slabs) = answer {
                let given = slabs.iter().map(|run| run.count).sum::<u32>();
                self.scarce = matches!(ask, Ask::Take { most, .. } if given < most);
                self.empty = given == 0;
                for slab in slabs.iter().flat_map(|run| run.first..run.end()) {
                    if self.was_ours(id, slab) {
                        self.forget(slab);
                        self.to_wipe.push_back(slab);
                    }
                }
            }
            return true;
        }
        let Some((ask, writer)) = self.mapping.remove(&id) else { return false };
        let (Answer::Mapped(found), Ask::Map { wanted, .. }) = (answer, ask) else {
            todo.push(Todo::Later(writer.grant));
            return true;
        };
        let slab_of = |part: u32| {
            let run = found.iter().find(|run| run.part <= part && part - run.part < run.count)?;
            Some(run.slab + (part - run.part))
        };
        for offer in &wanted {
            // What was not needed is still ours; what is nowhere is not.
            if slab_of(offer.part).is_some_and(|slab| slab != offer.slab) && self.was_ours(id, offer.slab) {
                self.wiped.insert(offer.slab);
            }
        }
        let mut busy = None;
        for slab in found.iter().flat_map(|run| run.slab..run.slab + run.count) {
            if self.in_use(slab) {
                busy = Some(slab);
            }
        }
        match busy {
            _ if found.is_empty() => todo.push(Todo::Later(writer.grant)),
            Some(slab) => self.held.push((slab, writer.grant, found.clone())),
            None => todo.push(Todo::Give(writer.grant, found.clone())),
        }
        true
    }

    /// A slab is part of a disk: it is neither wiped nor offered any more. `true` if it
    /// is being wiped right now: nobody may write to it before that is over.
    pub fn in_use(&mut self, slab: u32) -> bool {
        self.forget(slab);
        self.used.insert(slab, self.last);
        let busy = self.wiping == Some(slab);
        self.wiping_is_used |= busy;
        busy
    }

    /// Whether nobody was seen to use a slab since a question was asked.
    fn was_ours(&self, id: u64, slab: u32) -> bool {
        self.used.get(&slab).is_none_or(|last| *last < id)
    }

    fn forget(&mut self, slab: u32) {
        self.wiped.remove(&slab);
        self.to_wipe.retain(|other| *other != slab);
    }

    /// A slab was zeroed, or could not be.
    pub fn wiped(&mut self, slab: u32, done: bool, todo: &mut Vec<Todo<G>>) {
        self.wiping = None;
        let (ready, held) = std::mem::take(&mut self.held).into_iter().partition(|(busy, ..)| *busy == slab);
        self.held = held;
        let ready: Vec<_> = ready;
        if !std::mem::take(&mut self.wiping_is_used) {
            match done {
                true => drop(self.wiped.insert(slab)),
                false => self.to_wipe.push_back(slab),
            }
        }
        todo.extend(ready.into_iter().map(|(_, grant, found)| Todo::Give(grant, found)));
    }

    /// Everything that can be done now. `number` numbers questions.
    pub fn go_on(&mut self, number: &mut u64, todo: &mut Vec<Todo<G>>) {
        let oldest = self.taking.iter().map(|(id, _)| *id).chain(self.mapping.keys().copied()).min();
        self.used.retain(|_, last| oldest.is_some_and(|oldest| *last >= oldest));
        while let Some(writer) = self.waiting.front()
            && !self.wiped.is_empty()
        {
            let count = writer.parts.len().min(self.wiped.len()).min(AT_ONCE);
            let slabs: Vec<_> = self.wiped.iter().copied().take(count).collect();
            self.wiped.retain(|slab| !slabs.contains(slab));
            let Some(writer) = self.waiting.pop_front() else { break };
            let offers = writer.parts.iter().zip(slabs);
            let wanted = offers.map(|(part, slab)| Mapped { part: *part, slab, count: 1 }).collect();
            *number += 1;
            self.last = *number;
            let ask = Ask::Map { disk: writer.disk, wanted };
            todo.push(Todo::Ask(*number, ask.clone()));
            self.mapping.insert(*number, (ask, writer));
        }
        if self.wiping.is_none()
            && let Some(slab) = self.to_wipe.pop_front()
        {
            self.wiping = Some(slab);
            todo.push(Todo::Wipe(slab));
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
            self.last = *number;
            let ask = Ask::Take { volume: self.volume.clone(), known: self.known(), most: most as u32 };
            todo.push(Todo::Ask(*number, ask.clone()));
            self.taking = Some((*number, ask));
        }
    }

    fn known(&self) -> Vec<Slabs> {
        let offered = self.mapping.values().flat_map(|(ask, _)| match ask {
            Ask::Map { wanted, .. } => wanted.iter().map(|run| run.slab).collect(),
            Ask::Take { .. } => Vec::new(),
        });
        let all: BTreeSet<u32> =
            self.to_wipe.iter().chain(&self.wiping).chain(&self.wiped).copied().chain(offered).collect();
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
    const ME: NodeId = NodeId(1);
    const TERM: NodeTerm = NodeTerm(1);
    const DISK: DiskId = DiskId { vm: VmId(uuid::Uuid::nil()), disk: 0, epoch: 1 };

    /// A volume server and the cluster that it asks, with everything that is on its way
    /// between them.
    struct World {
        lun: Lun,
        supply: Supply<u32>,
        number: u64,
        todo: Vec<Todo<u32>>,
        /// Questions that the cluster has not decided; answers that were not heard.
        asked: Vec<(u64, Ask)>,
        answers: Vec<(u64, Answer)>,
        wiping: Vec<u32>,
        /// What each slab holds: zeroes, or something.
        zero: Vec<bool>,
        /// Parts that were given to a writer, which wrote there.
        written: BTreeMap<u32, u32>,
        /// Parts of the disk that is to be served once no slab of it is being wiped.
        to_serve: Option<Vec<(u32, u32)>>,
    }

    impl World {
        fn new(slabs: u32) -> World {
            let mut lun = Lun::new(SLAB, slabs);
            lun.files.insert("disk".into(), LunFile::new(DISK.vm, 64 * SLAB));
            World {
                lun,
                supply: Supply::new("san", SLAB),
                number: 0,
                todo: Vec::new(),
                asked: Vec::new(),
                answers: Vec::new(),
                wiping: Vec::new(),
                zero: vec![false; slabs as usize],
                written: BTreeMap::new(),
                to_serve: None,
            }
        }

        fn settle(&mut self) {
            self.supply.go_on(&mut self.number, &mut self.todo);
            for todo in std::mem::take(&mut self.todo) {
                match todo {
                    Todo::Ask(id, ask) => self.asked.push((id, ask)),
                    Todo::Wipe(slab) => {
                        let mapped = self.written.values().any(|written| *written == slab);
                        assert!(!mapped, "slab {slab} is wiped, and a writer has written to it");
                        self.wiping.push(slab);
                    }
                    Todo::Give(_, found) => {
                        one_by_one(&found).for_each(|(part, slab)| self.write(part, slab));
                    }
                    Todo::Later(_) | Todo::NoSpace(_) => {}
                }
            }
        }

        /// A guest writes to a part from now on.
        fn write(&mut self, part: u32, slab: u32) {
            let known = self.written.contains_key(&part);
            assert!(known || self.zero[slab as usize], "part {part} is given slab {slab}, which is not zeroed");
            assert!(!self.wiping.contains(&slab), "slab {slab} is given and being wiped");
            assert_eq!(self.lun.files["disk"].slab(part), Some(slab));
            self.written.insert(part, slab);
            self.zero[slab as usize] = false;
        }

        fn serve(&mut self) {
            for (part, slab) in self.to_serve.take().into_iter().flatten() {
                self.write(part, slab);
            }
        }

        fn decide(&mut self, at: usize, answered: bool) {
            if self.asked.is_empty() {
                return;
            }
            let (id, ask) = self.asked.remove(at % self.asked.len());
            let answer = match ask {
                Ask::Take { known, most, .. } => Answer::Slabs(self.lun.take(ME, TERM, &known, most)),
                Ask::Map { wanted, .. } => Answer::Mapped(self.lun.map("disk", ME, TERM, &wanted)),
            };
            self.answers.push((id, if answered { answer } else { Answer::Unknown }));
        }

        fn step(&mut self, step: &Step) {
            match *step {
                Step::Want(part, count) => {
                    let parts = (part..part + count).filter(|part| !self.written.contains_key(part)).collect();
                    self.supply.want(DISK, parts, part);
                }
                Step::Decide(at) => self.decide(at, true),
                Step::LoseAnswer(at) => self.decide(at, false),
                Step::GiveUp(at) => {
                    // Nobody knows: it may still be decided.
                    if !self.asked.is_empty() {
                        let (id, ask) = self.asked[at % self.asked.len()].clone();
                        self.answers.push((id, Answer::Unknown));
                        self.asked.retain(|(other, _)| *other != id);
                        self.asked.push((u64::MAX - id, ask));
                    }
                }
                Step::Hear(at) => {
                    if !self.answers.is_empty() {
                        let (id, answer) = self.answers.remove(at % self.answers.len());
                        self.supply.answered(id, &answer, &mut self.todo);
                    }
                }
                Step::Wiped(done) => {
                    if let Some(slab) = self.wiping.pop() {
                        self.zero[slab as usize] = true;
                        self.supply.wiped(slab, done, &mut self.todo);
                        self.serve();
                    }
                }
                Step::Serve => {
                    let parts: Vec<_> = one_by_one(&self.lun.files["disk"].parts).collect();
                    let busy = parts.iter().filter(|(_, slab)| self.supply.in_use(*slab)).count();
                    self.to_serve = Some(parts);
                    if busy == 0 {
                        self.serve();
                    }
                }
                Step::Restart => {
                    // A process that is gone wipes nothing any more.
                    (self.supply, self.wiping) = (Supply::new("san", SLAB), Vec::new());
                    self.to_serve = None;
                    self.answers.clear();
                    self.asked =
                        std::mem::take(&mut self.asked).into_iter().map(|(id, ask)| (u64::MAX - id, ask)).collect();
                }
            }
            self.settle();
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
        Serve,
        Restart,
    }

    fn one_by_one(runs: &[Mapped]) -> impl Iterator<Item = (u32, u32)> {
        runs.iter().flat_map(|run| (0..run.count).map(|step| (run.part + step, run.slab + step)))
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0..40u32, 1..6u32).prop_map(|(part, count)| Step::Want(part, count)),
            6 => any::<usize>().prop_map(Step::Decide),
            1 => any::<usize>().prop_map(Step::LoseAnswer),
            1 => any::<usize>().prop_map(Step::GiveUp),
            6 => any::<usize>().prop_map(Step::Hear),
            6 => (0..10u8).prop_map(|one| Step::Wiped(one > 0)),
            2 => Just(Step::Serve),
            1 => Just(Step::Restart),
        ]
    }

    #[test]
    fn a_writer_gets_what_it_waits_for_and_is_told_when_there_is_nothing() {
        let mut world = World::new(3);
        world.supply.want(DISK, (0..5).collect(), 0);
        world.settle();
        for _ in 0..40 {
            [Step::Decide(0), Step::Hear(0), Step::Wiped(true)].iter().for_each(|step| world.step(step));
        }
        world.supply.want(DISK, vec![3, 4], 0);
        for _ in 0..40 {
            [Step::Decide(0), Step::Hear(0), Step::Wiped(true)].iter().for_each(|step| world.step(step));
        }
        assert!(!world.written.is_empty() && world.lun.free_slabs() == 0);
        world.supply.want(DISK, vec![9, 10, 11], 7);
        let mut todo = Vec::new();
        for _ in 0..8 {
            world.supply.go_on(&mut world.number, &mut todo);
            if todo.iter().any(|todo| matches!(todo, Todo::NoSpace(7))) {
                return;
            }
            for (id, ask) in
                todo.drain(..).filter_map(|todo| if let Todo::Ask(id, ask) = todo { Some((id, ask)) } else { None })
            {
                world.asked.push((id, ask));
                world.decide(0, true);
                let (id, answer) = world.answers.pop().unwrap();
                world.supply.answered(id, &answer, &mut Vec::new());
            }
        }
        panic!("nobody said that there is no space");
    }

    /// The first of what was asked of this kind.
    fn asked(world: &World, take: bool) -> usize {
        world.asked.iter().position(|(_, ask)| matches!(ask, Ask::Take { .. }) == take).unwrap()
    }

    /// A world with a slab that is wiped and offered to part 0, by a question that nobody
    /// knows the fate of.
    fn offered() -> World {
        let mut world = World::new(1);
        world.step(&Step::Want(0, 1));
        [Step::Decide(0), Step::Hear(0), Step::Wiped(true)].iter().for_each(|step| world.step(step));
        let map = asked(&world, false);
        world.asked.swap(0, map);
        world.asked.truncate(1);
        world
    }

    #[test]
    fn a_slab_that_a_disk_is_served_with_is_not_wiped() {
        for wiping in [false, true] {
            let mut world = offered();
            world.step(&Step::Restart);
            // Still ours.
            let take = asked(&world, true);
            world.step(&Step::Decide(take));
            if wiping {
                world.step(&Step::Hear(0));
                assert_eq!(world.wiping, [0]);
            }
            // And then it is not.
            let map = asked(&world, false);
            world.step(&Step::Decide(map));
            world.step(&Step::Serve);
            assert_eq!(world.written.is_empty(), wiping, "it waits for the end of the wipe");
            (0..10).for_each(|_| world.step(&Step::Hear(0)));
            world.step(&Step::Wiped(true));
            assert_eq!(world.written, [(0, 0)].into());
            assert!(world.wiping.is_empty() && world.supply.known().is_empty());
        }
    }

    #[test]
    fn a_slab_is_not_wiped_because_an_answer_came_late() {
        let mut world = offered();
        let (id, map) = world.asked.remove(0);
        world.asked.push((u64::MAX - id, map));
        world.answers = vec![(id, Answer::Unknown)];
        world.step(&Step::Hear(0));
        world.step(&Step::Want(0, 1));
        let take = asked(&world, true);
        world.step(&Step::Decide(take));
        let ours = Answer::Slabs(vec![Slabs { first: 0, count: 1 }]);
        assert!(world.answers.iter().any(|(_, answer)| *answer == ours));
        let map = asked(&world, false);
        world.step(&Step::Decide(map));
        world.step(&Step::Serve);
        (0..10).for_each(|_| world.step(&Step::Hear(0)));
        assert!(world.wiping.is_empty() && world.supply.known().is_empty());
    }

    proptest! {
        #[test]
        fn nobody_is_given_a_slab_that_is_not_zeroed_and_none_is_wiped_after(
            slabs in 1..30u32,
            steps in proptest::collection::vec(step(), 0..200),
        ) {
            let mut world = World::new(slabs);
            for step in &steps {
                world.step(step);
            }
        }
    }
}
