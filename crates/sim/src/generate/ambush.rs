//! Ambushes: each lets happen, in the order that hurts most, what one rule of
//! safety is there for. Chance alone meets such an order once in many thousand
//! runs. Nothing happens in them that could not happen to a cluster; who it
//! happens to is said by roles.

use holdfast_core::Profile;

use super::{Author, Plot, has_luns};
use crate::rng::Rng;
use crate::role::{COORDINATOR, HOST, VOTER1, VOTER2};
use crate::script::{Fault, Traffic, Wish};

#[derive(Clone, Copy, Debug)]
enum Ambush {
    /// What a voter acknowledged was not on its disk yet when it lost its power, and
    /// the coordinator is lost with it: do the others know what was agreed on?
    Unwritten,
    /// A voter's agent comes back at once and does not remember the coordinator,
    /// whose leases rely on it.
    Forgetful,
    /// What a keeper said before it died arrives when its successor runs VMs.
    EarlierLife,
    /// A node is called lost, and whoever says so is lost before it can tell: the
    /// next one has agreed to it without knowing.
    UntoldVerdict,
    /// The cluster has shrunk to one voter, which loses its power again and again
    /// while the votes grow back.
    Growth,
    /// The witness's disk comes back as it was before its last agreements, when its
    /// vote would make a majority of a node that missed them as well.
    OldWitness,
    /// The host of the witness is gone and its disk is slow: several want it at once.
    Contest,
}

const ALL: [Ambush; 7] = [
    Ambush::Unwritten,
    Ambush::Forgetful,
    Ambush::EarlierLife,
    Ambush::UntoldVerdict,
    Ambush::Growth,
    Ambush::OldWitness,
    Ambush::Contest,
];

impl Ambush {
    /// How many nodes it needs, and whether a witness.
    fn stage(self) -> (usize, bool) {
        match self {
            Ambush::OldWitness => (2, true),
            Ambush::Contest => (4, true),
            _ => (3, false),
        }
    }
}

/// A plot of ambushes of one kind.
pub fn plot(seed: u64) -> Plot {
    let mut rng = Rng::new(seed);
    let ambush = *rng.pick(&ALL);
    let (nodes, witness) = ambush.stage();
    let profile = *rng.pick(&[Profile::Default, Profile::Fast]);
    let vms = (1..=rng.between(1, 3)).map(|n| format!("vm{n}")).collect();
    let taste = vec![1; 16];
    let mut author =
        Author { steps: Vec::new(), nodes, witness, heal_ms: 5_000, vms, taste, stops_keepers: false, rng };
    author.begin();
    let rounds = if matches!(ambush, Ambush::OldWitness) { 1 } else { author.rng.between(1, 3) };
    let mut at = author.rng.between(4_500, 7_000);
    for _ in 0..rounds {
        at = author.lay(ambush, at) + author.rng.between(500, 3_000);
    }
    author.heal_ms = at;
    if author.rng.permille(300) {
        author.fault();
    }
    let mut steps = author.steps;
    steps.sort_by_key(|step| step.at_ms);
    Plot { nodes, memory_mib: 4096, profile, witness, luns: has_luns(seed), steps, heal_ms: at }
}

impl Author {
    /// Lays one, from this moment on; says when it is over.
    fn lay(&mut self, ambush: Ambush, at: u64) -> u64 {
        self.push(at, Fault::Cast);
        match ambush {
            Ambush::Unwritten => self.unwritten(at),
            Ambush::Forgetful => self.forgetful(at),
            Ambush::EarlierLife => self.earlier_life(at),
            Ambush::UntoldVerdict => self.untold_verdict(at),
            Ambush::Growth => self.growth(at),
            Ambush::OldWitness => self.old_witness(at),
            Ambush::Contest => self.contest(at),
        }
    }

    fn unwritten(&mut self, at: u64) -> u64 {
        let lost = at + self.rng.between(350, 700);
        self.both_ways(at, lost, COORDINATOR, VOTER2, Traffic::Agents);
        self.push(at, Fault::SlowDisk(VOTER1, 1_500));
        for _ in 0..2 {
            let (asked, node) = (self.rng.between(at + 20, lost - 100), self.node());
            self.ask(asked, Wish::Memory(node, 4096));
        }
        self.push(lost, Fault::Lose(VOTER1));
        self.push(lost, Fault::Lose(COORDINATOR));
        self.push(lost, Fault::SlowDisk(VOTER1, 0));
        self.push(lost + 20, Fault::Return(VOTER1));
        self.push(lost + 5_000, Fault::Return(COORDINATOR));
        lost + 6_000
    }

    fn forgetful(&mut self, at: u64) -> u64 {
        let restarts = at + self.rng.between(500, 900);
        let joined = restarts + 3_000;
        self.both_ways(at, joined, COORDINATOR, VOTER2, Traffic::All);
        self.both_ways(restarts, joined, COORDINATOR, VOTER1, Traffic::All);
        let down_ms = self.rng.between(10, 30);
        self.push(restarts, Fault::RestartAgent(VOTER1, down_ms));
        joined + 1_000
    }

    fn earlier_life(&mut self, at: u64) -> u64 {
        let dies = at + 3_000;
        self.push(at, Fault::Storm(0, 500, 6_000));
        self.push(dies, Fault::CrashKeeper(VOTER1));
        for vm in self.vms.clone() {
            let asked = dies + self.rng.between(500, 1_500);
            self.ask(asked, Wish::Migrate(vm, Some(VOTER1)));
        }
        self.push(dies + 6_000, Fault::Storm(0, 0, 0));
        dies + 7_000
    }

    fn untold_verdict(&mut self, at: u64) -> u64 {
        let ms = *self.rng.pick(&[20, 60, 150]);
        let over = at + 8_000;
        self.both_ways(at, over, COORDINATOR, VOTER2, Traffic::Heartbeats);
        for voter in [VOTER1, VOTER2] {
            self.push(at, Fault::SlowDisk(voter, ms));
            self.push(over, Fault::SlowDisk(voter, 0));
        }
        self.push(at, Fault::LoseAtVerdict(COORDINATOR));
        self.push(over, Fault::Return(COORDINATOR));
        over + 1_000
    }

    fn growth(&mut self, at: u64) -> u64 {
        self.push(at, Fault::Lose(VOTER1));
        self.push(at + 3_000, Fault::Lose(VOTER2));
        let back = at + 6_000;
        self.push(back, Fault::Return(VOTER1));
        self.push(back, Fault::Return(VOTER2));
        let slow_ms = *self.rng.pick(&[40, 200, 700]);
        self.push(back, Fault::SlowDisk(COORDINATOR, slow_ms));
        let mut lost = back + self.rng.between(3_000, 6_000);
        for _ in 0..self.rng.between(1, 3) {
            self.push(lost, Fault::Lose(COORDINATOR));
            let returned = lost + self.rng.between(20, 600);
            self.push(returned, Fault::Return(COORDINATOR));
            lost = returned + self.rng.between(300, 1_500);
        }
        self.push(lost, Fault::SlowDisk(COORDINATOR, 0));
        lost + 1_000
    }

    fn old_witness(&mut self, at: u64) -> u64 {
        self.push(at, Fault::CopyDisk);
        let first = at + self.rng.between(1_000, 2_000);
        self.push(first, Fault::Lose(VOTER1));
        // The coordinator has hosted the witness, and agreed on something with it.
        let second = first + self.rng.between(1_500, 4_000);
        self.push(second, Fault::Lose(COORDINATOR));
        // Longer than a write to the disk can take.
        let back = second + self.rng.between(8_000, 9_000);
        for node in 0..self.nodes {
            self.push(second, Fault::CutDisk(node));
            self.push(back + 1, Fault::JoinDisk(node));
        }
        self.push(back, Fault::OldDisk);
        self.push(back + 2, Fault::Return(VOTER1));
        self.push(back + 5_000, Fault::Return(COORDINATOR));
        back + 6_000
    }

    fn contest(&mut self, at: u64) -> u64 {
        let ms = self.rng.between(20, 120);
        self.push(at, Fault::SlowWitness(ms));
        let gone = at + self.rng.between(500, 1_500);
        let back = gone + self.rng.between(1_000, 4_000);
        if self.rng.permille(500) {
            self.push(gone, Fault::Lose(HOST));
            self.push(back, Fault::Return(HOST));
        } else {
            self.push(gone, Fault::FreezeAgent(HOST));
            self.push(back, Fault::ThawAgent(HOST));
        }
        self.push(back + 1_000, Fault::SlowWitness(0));
        back + 2_000
    }

    fn both_ways(&mut self, from: u64, until: u64, a: usize, b: usize, traffic: Traffic) {
        self.cut(from, until - from, a, b, traffic);
        self.cut(from, until - from, b, a, traffic);
    }
}
