//! Parts of disks whose slabs are to be given back: pure.
//!
//! ```text
//!  discarded ─▶ waiting ─▶ asked ─▶ done: they have no slab any more
//!                  ▲         │
//!                  └─────────┘ nobody knows, or it came too late: asked again
//! ```
//! No I/O to such a part is under way, and none begins before it is known what became of
//! it. There is one question for each disk at a time, and it carries how often the disk
//! has given parts back: the state passes over a question with another number. So one
//! that is decided late takes nothing from a part that was written to again.

use std::collections::BTreeMap;
use std::ops::Range;

use super::protocol::{Answer, Ask, DiskId};

/// What the disks of one LUN give back. `R` is who waits for it.
#[derive(Debug)]
pub struct Returns<R> {
    disks: BTreeMap<DiskId, Returning<R>>,
}

#[derive(Debug)]
struct Returning<R> {
    /// How often the disk has given back, as far as is known.
    number: u64,
    waiting: Vec<(Range<u32>, R)>,
    asked: Option<Asked<R>>,
}

#[derive(Debug)]
struct Asked<R> {
    id: u64,
    ask: Ask,
    who: Vec<(Range<u32>, R)>,
}

impl<R> Default for Returns<R> {
    fn default() -> Self {
        Returns { disks: BTreeMap::new() }
    }
}

impl<R> Returns<R> {
    /// A disk does not need these parts any more.
    pub fn give_back(&mut self, disk: DiskId, parts: Range<u32>, who: R) {
        let new = || Returning { number: 0, waiting: Vec::new(), asked: None };
        self.disks.entry(disk).or_insert_with(new).waiting.push((parts, who));
    }

    /// Nobody uses the disk any more, nor what it was to give back.
    pub fn gone(&mut self, disk: DiskId) {
        self.disks.remove(&disk);
    }

    /// The questions that can be asked now. `number` numbers them.
    pub fn go_on(&mut self, number: &mut u64) -> Vec<(u64, Ask)> {
        let mut questions = Vec::new();
        for (disk, returning) in &mut self.disks {
            if returning.asked.is_none() && !returning.waiting.is_empty() {
                *number += 1;
                let who = std::mem::take(&mut returning.waiting);
                let parts = who.iter().map(|(parts, _)| (parts.start, parts.end - parts.start)).collect();
                let ask = Ask::Unmap { disk: *disk, number: returning.number, parts };
                questions.push((*number, ask.clone()));
                returning.asked = Some(Asked { id: *number, ask, who });
            }
        }
        questions
    }

    /// The questions that have no answer yet: for an agent that has just come.
    pub fn open_questions(&self) -> impl Iterator<Item = (u64, Ask)> {
        self.disks
            .values()
            .filter_map(|returning| Some((returning.asked.as_ref()?.id, returning.asked.as_ref()?.ask.clone())))
    }

    /// The cluster answered: says for whom it is done. `None` if it was not asked that
    /// here.
    pub fn answered(&mut self, id: u64, answer: &Answer) -> Option<Vec<R>> {
        let mut all = self.disks.values_mut();
        let returning = all.find(|returning| returning.asked.as_ref().is_some_and(|asked| asked.id == id))?;
        let who = returning.asked.take()?.who;
        if let Answer::Unmapped(unmapped) = answer {
            returning.number = unmapped.number;
            if !unmapped.left {
                return Some(who.into_iter().map(|(_, who)| who).collect());
            }
        }
        returning.waiting.splice(0..0, who);
        Some(Vec::new())
    }
}

#[cfg(test)]
mod tests {
    use holdfast_core::{Lun, Mapped, NodeId, NodeTerm, VmId};
    use proptest::prelude::*;

    use super::*;

    const SLAB: u64 = 16 << 20;
    const PARTS: u32 = 6;
    const VM: VmId = VmId(uuid::Uuid::nil());

    /// A disk that is served by one life of a server after the other, and the cluster.
    struct World {
        lun: Lun,
        returns: Returns<Range<u32>>,
        number: u64,
        epoch: u64,
        /// Questions that are not decided, each perhaps more than once; answers that
        /// were not heard.
        asked: Vec<(u64, Ask)>,
        answers: Vec<(u64, Answer)>,
        /// Where the server knows parts to be, and which are on their way out.
        present: BTreeMap<u32, u32>,
        leaving: BTreeMap<u32, u32>,
    }

    impl World {
        fn new() -> World {
            let mut lun = Lun::new(SLAB, 20);
            lun.make_file("disk", VM, u64::from(PARTS) * SLAB);
            World {
                lun,
                returns: Returns::default(),
                number: 0,
                epoch: 1,
                asked: Vec::new(),
                answers: Vec::new(),
                present: BTreeMap::new(),
                leaving: BTreeMap::new(),
            }
        }

        fn disk(&self) -> DiskId {
            DiskId { vm: VM, disk: 0, epoch: self.epoch }
        }

        fn write(&mut self, part: u32) {
            if self.present.contains_key(&part) || self.leaving.contains_key(&part) {
                return;
            }
            let (node, term) = (NodeId(1), NodeTerm(1));
            let taking = self.lun.take(node, term, &[], 1);
            let slab = taking.slabs[0].first;
            let found = self.lun.map("disk", node, term, &[(part, slab, 1).into()], &[taking.number]);
            self.lun.give_back(node);
            self.present.insert(part, found[0].slab);
        }

        fn discard(&mut self, part: u32) {
            let Some(slab) = self.present.remove(&part) else { return };
            self.leaving.insert(part, slab);
            self.returns.give_back(self.disk(), part..part + 1, part..part + 1);
        }

        fn decide(&mut self, which: usize, keep: bool) {
            if self.asked.is_empty() {
                return;
            }
            let which = which % self.asked.len();
            let (id, ask) = self.asked[which].clone();
            if !keep {
                self.asked.remove(which);
            }
            let Ask::Unmap { disk, number, parts } = ask else { return };
            let answer = match disk == self.disk() {
                true => Answer::Unmapped(self.lun.unmap("disk", number, &parts)),
                false => Answer::Unknown,
            };
            self.answers.push((id, answer));
        }

        /// Another life of the server, or another host: served as the state has it.
        fn serve_anew(&mut self) {
            (self.returns, self.leaving) = (Returns::default(), BTreeMap::new());
            self.answers.clear();
            self.asked.iter_mut().for_each(|(id, _)| *id = u64::MAX);
            let parts = &self.lun.files["disk"].parts;
            self.present = parts.iter().copied().flat_map(Mapped::one_by_one).collect();
        }

        fn step(&mut self, step: &Step) {
            match *step {
                Step::Write(part) => self.write(part),
                Step::Discard(part) => self.discard(part),
                Step::Decide(which, keep) => self.decide(which, keep),
                Step::GiveUp(which) => {
                    if !self.asked.is_empty() {
                        let which = which % self.asked.len();
                        self.answers.push((self.asked[which].0, Answer::Unknown));
                    }
                }
                Step::Hear(which) => {
                    if !self.answers.is_empty() {
                        let (id, answer) = self.answers.remove(which % self.answers.len());
                        for part in self.returns.answered(id, &answer).into_iter().flatten().flatten() {
                            assert!(self.leaving.remove(&part).is_some());
                            assert_eq!(self.lun.files["disk"].slab(part), None, "part {part} was said to be absent");
                        }
                    }
                }
                Step::Restart => {
                    self.lun.void_unmaps("disk");
                    self.serve_anew();
                }
                Step::Move => {
                    self.epoch += 1;
                    self.serve_anew();
                }
            }
            let questions = self.returns.go_on(&mut self.number);
            self.asked.extend(questions);
            for (part, slab) in &self.present {
                let found = self.lun.files["disk"].slab(*part);
                assert_eq!(found, Some(*slab), "part {part} is written to in a slab that is not its own");
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write(u32),
        Discard(u32),
        /// Whether it is under way once more.
        Decide(usize, bool),
        GiveUp(usize),
        Hear(usize),
        Restart,
        Move,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..PARTS).prop_map(Step::Write),
            4 => (0..PARTS).prop_map(Step::Discard),
            4 => (any::<usize>(), any::<bool>()).prop_map(|(which, keep)| Step::Decide(which, keep)),
            1 => any::<usize>().prop_map(Step::GiveUp),
            4 => any::<usize>().prop_map(Step::Hear),
            1 => prop_oneof![Just(Step::Restart), Just(Step::Move)],
        ]
    }

    #[test]
    fn what_is_discarded_is_given_back_once_and_asked_for_until_it_is_known() {
        let mut world = World::new();
        for step in [Step::Write(0), Step::Write(1), Step::Write(2), Step::Discard(0), Step::Discard(1)] {
            world.step(&step);
        }
        assert_eq!(world.asked.len(), 1, "one question at a time");
        // Nobody knows what came of it, and it is decided later.
        [Step::GiveUp(0), Step::Hear(0)].iter().for_each(|step| world.step(step));
        let again = Ask::Unmap { disk: world.disk(), number: 0, parts: vec![(0, 1), (1, 1)] };
        assert_eq!(world.asked[1], (2, again));
        world.step(&Step::Decide(0, false));
        assert_eq!(world.lun.files["disk"].slabs(), 2);
        for _ in 0..2 {
            [Step::Decide(0, false), Step::Hear(0), Step::Hear(0)].iter().for_each(|step| world.step(step));
        }
        assert!(world.leaving.is_empty() && world.asked.is_empty());
        assert_eq!((world.lun.files["disk"].slabs(), world.lun.files["disk"].unmaps), (1, 2));
    }

    proptest! {
        #[test]
        fn no_part_that_is_written_to_loses_its_slab(steps in proptest::collection::vec(step(), 0..150)) {
            let mut world = World::new();
            for step in &steps {
                world.step(step);
            }
        }
    }
}
