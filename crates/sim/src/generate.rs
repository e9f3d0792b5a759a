//! Draws what happens to a world: sizes, commands and faults, all from the seed.

mod ambush;

use holdfast_core::{Priority, Profile};

use crate::rng::Rng;
use crate::script::{Deed, Fault, Step, Traffic, Wish};

/// A world and what happens to it before everything heals.
#[derive(Clone, Debug)]
pub struct Plot {
    /// How many nodes.
    pub nodes: usize,
    /// Memory for VMs on each, in MiB.
    pub memory_mib: u64,
    /// The failover profile from the beginning.
    pub profile: Profile,
    /// There is a witness.
    pub witness: bool,
    /// There are volumes on LUNs.
    pub luns: bool,
    /// What happens, in order of time.
    pub steps: Vec<Step>,
    /// When everything heals, in milliseconds.
    pub heal_ms: u64,
}

/// The plot of a seed: every fifth is one of ambushes, and a few are of large clusters.
pub fn plot(seed: u64) -> Plot {
    if seed % 5 == 3 {
        return ambush::plot(seed);
    }
    let mut rng = Rng::new(seed);
    let small = *rng.pick(&[2, 3, 3, 3, 3, 4, 5, 5, 7, 9]);
    let (nodes, longest_ms) = match seed {
        _ if seed % 250 == 142 => (64, 18_000),
        _ if seed % 50 == 27 => (16, 30_000),
        _ => (small, 40_000),
    };
    let heal_ms = rng.between(15_000, longest_ms);
    let witness = rng.permille(match nodes {
        2 => 700,
        4 => 500,
        _ => 150,
    });
    let profile = *rng.pick(&[Profile::Default, Profile::Default, Profile::Fast]);
    let vms: Vec<String> = (1..=rng.between(1, 5)).map(|n| format!("vm{n}")).collect();
    let mut author = Author {
        steps: Vec::new(),
        nodes,
        witness,
        heal_ms,
        vms,
        // Each run has its own taste, so that some are all crashes and some all partitions.
        taste: (0..16).map(|_| rng.between(0, 6)).collect(),
        stops_keepers: rng.permille(250),
        rng,
    };
    author.begin();
    let (faults, wishes) = (author.rng.between(1, 14), author.rng.between(3, 20));
    for _ in 0..faults {
        author.fault();
    }
    for _ in 0..wishes {
        author.wish();
    }
    if seed % 4 == 1 {
        author.drains();
    }
    let luns = has_luns(seed);
    if luns {
        author.paths();
    }
    let memory_mib = *author.rng.pick(&[1024, 2048, 4096]);
    let mut steps = author.steps;
    steps.sort_by_key(|step| step.at_ms);
    Plot { nodes, memory_mib, profile, witness, luns, steps, heal_ms }
}

/// Whether there are volumes on LUNs.
fn has_luns(seed: u64) -> bool {
    seed % 6 == 4
}

struct Author {
    rng: Rng,
    steps: Vec<Step>,
    nodes: usize,
    witness: bool,
    heal_ms: u64,
    vms: Vec<String>,
    taste: Vec<u64>,
    stops_keepers: bool,
}

impl Author {
    fn node(&mut self) -> usize {
        self.rng.between(0, self.nodes as u64 - 1) as usize
    }

    fn vm(&mut self) -> String {
        self.rng.pick(&self.vms).clone()
    }

    fn at(&mut self) -> u64 {
        self.rng.between(2_000, self.heal_ms - 1_000)
    }

    /// Outages are short, about a lease, or long.
    fn span(&mut self) -> u64 {
        match self.rng.between(0, 2) {
            0 => self.rng.between(20, 400),
            1 => self.rng.between(400, 2_500),
            _ => self.rng.between(2_500, 9_000),
        }
    }

    fn push(&mut self, at_ms: u64, fault: Fault) {
        self.steps.push(Step { at_ms, deed: Deed::Fault(fault) });
    }

    fn ask(&mut self, at_ms: u64, wish: Wish) {
        self.steps.push(Step { at_ms, deed: Deed::Ask(wish) });
    }

    fn begin(&mut self) {
        for vm in self.vms.clone() {
            let at = self.rng.between(600, 2_500);
            let memory_mib = *self.rng.pick(&[64, 256, 512, 900]);
            let priority =
                *self.rng.pick(&[Priority::None, Priority::Low, Priority::Medium, Priority::Medium, Priority::High]);
            self.ask(at, Wish::Create { vm, memory_mib, priority });
        }
    }

    fn fault(&mut self) {
        let kind = self.weighed();
        let (at, span, node) = (self.at(), self.span(), self.node());
        match kind {
            0 => {
                self.push(at, Fault::Lose(node));
                self.push(at + span + 50, Fault::Return(node));
            }
            1 => self.cut_off(at, span, node),
            2 => {
                let other = self.node();
                let traffic = self.traffic();
                self.cut(at, span, node, other, traffic);
            }
            3 => {
                // A split in two, or one that hears but is not heard.
                let mask = self.rng.next();
                let one_way = self.rng.permille(400);
                for (a, b) in self.pairs() {
                    if (mask >> a) & 1 == 1 && (mask >> b) & 1 == 0 {
                        self.cut(at, span, a, b, Traffic::All);
                        if !one_way {
                            self.cut(at, span, b, a, Traffic::All);
                        }
                    }
                }
            }
            4 => self.push(at, Fault::CrashAgent(node)),
            5 => self.push(at, Fault::CrashKeeper(node)),
            6 => {
                self.push(at, Fault::FreezeAgent(node));
                self.push(at + span, Fault::ThawAgent(node));
            }
            7 => {
                let vm = self.vm();
                self.push(at, Fault::Crash(vm));
            }
            8 => {
                let vm = self.vm();
                self.push(at, Fault::Shutdown(vm));
            }
            9 => {
                let ms = *self.rng.pick(&[5, 80, 700]);
                self.push(at, Fault::SlowDisk(node, ms));
                self.push(at + span, Fault::SlowDisk(node, 0));
            }
            10 => {
                let (lost, doubled) = (self.rng.between(0, 300), self.rng.between(0, 200));
                let late = *self.rng.pick(&[10, 100, 900, 3_000]);
                self.push(at, Fault::Storm(lost, doubled, late));
                self.push(at + span, Fault::Storm(0, 0, 0));
            }
            11 => {
                let (mut at, every) = (at, self.rng.between(50, 900));
                for _ in 0..self.rng.between(2, 6) {
                    self.cut_off(at, every, node);
                    at += 2 * every;
                }
            }
            13 if self.witness => {
                // One node loses its way to the witness's disk, or all do.
                let all = self.rng.permille(400);
                for other in (0..self.nodes).filter(|other| all || *other == node) {
                    self.push(at, Fault::CutDisk(other));
                    self.push(at + span, Fault::JoinDisk(other));
                }
            }
            14 if self.witness => self.stale_disk(at, node),
            15 => {
                let ms = *self.rng.pick(&[-3_600_000, -5_000, 5_000, 3_600_000]);
                self.push(at, Fault::SetClock(node, ms));
            }
            _ if self.stops_keepers => {
                let (stop, go) = match self.rng.between(0, 1) {
                    0 => (Fault::FreezeKeeper(node), Fault::ThawKeeper(node)),
                    _ => (Fault::Suspend(node), Fault::Wake(node)),
                };
                self.push(at, stop);
                self.push(at + span, go);
            }
            _ => self.ambush(at, node),
        }
    }

    /// The witness's disk goes away, longer than anything that was sent to it can
    /// take, and comes back as it was some time before; perhaps when it is needed most.
    fn stale_disk(&mut self, back: u64, node: usize) {
        let gone = back.saturating_sub(self.rng.between(8_000, 11_000));
        let copied = gone.saturating_sub(self.rng.between(1_000, 6_000));
        if copied < 1_500 {
            return;
        }
        self.push(copied, Fault::CopyDisk);
        for other in 0..self.nodes {
            self.push(gone, Fault::CutDisk(other));
            self.push(back + 1, Fault::JoinDisk(other));
        }
        self.push(back, Fault::OldDisk);
        if self.rng.permille(600) {
            let lost = back.saturating_sub(self.rng.between(0, 3_000));
            self.push(lost, Fault::Lose(node));
            self.push(lost + 5_000, Fault::Return(node));
        }
    }

    /// Hosts lose their paths to LUNs, one or all, and users choose owners.
    fn paths(&mut self) {
        for _ in 0..self.rng.between(2, 7) {
            let (at, span, node) = (self.at(), self.span(), self.node());
            let (all, lun) = (self.rng.permille(200), self.rng.between(0, 1) as usize);
            for other in (0..self.nodes).filter(|other| all || *other == node) {
                self.push(at, Fault::CutPath(other, lun));
                self.push(at + span, Fault::JoinPath(other, lun));
            }
        }
        for _ in 0..self.rng.between(0, 4) {
            let (at, lun, node) = (self.at(), self.rng.between(0, 1) as usize, self.node());
            self.ask(at, Wish::Own(lun, node));
        }
    }

    /// Nodes are emptied, and some may take VMs again.
    fn drains(&mut self) {
        for _ in 0..self.rng.between(1, 4) {
            let (at, span, node) = (self.at(), self.span(), self.node());
            self.ask(at, Wish::Drain(node));
            if self.rng.permille(600) {
                self.ask(at + span, Wish::Resume(node));
            }
        }
    }

    /// Several things at the moments at which they hurt most.
    fn ambush(&mut self, at: u64, node: usize) {
        let (second, third) = (self.node(), self.node());
        match self.rng.between(0, 2) {
            0 => {
                self.push(at, Fault::CrashKeeper(node));
                let later = at + self.rng.between(0, 600);
                self.push(later, Fault::CrashAgent(second));
            }
            // What a keeper said before it died comes when its successor is known.
            1 => {
                let late = *self.rng.pick(&[400, 1_500, 3_000]);
                self.push(at.saturating_sub(300), Fault::Storm(20, 50, late));
                self.push(at, Fault::CrashKeeper(node));
                self.push(at + 4_000, Fault::Storm(0, 0, 0));
            }
            // An agent slept while a keeper was replaced, and wakes when the
            // coordinator is gone.
            _ => {
                self.push(at, Fault::FreezeAgent(second));
                self.push(at + 100, Fault::CrashKeeper(node));
                let gone = at + self.rng.between(600, 1_200);
                self.push(gone, Fault::Lose(third));
                let wakes = gone + self.rng.between(100, 500);
                self.push(wakes, Fault::ThawAgent(second));
                self.push(wakes + 4_000, Fault::Return(third));
                if self.rng.permille(500) {
                    // It hears the keeper and is not heard by it.
                    self.cut(at, wakes + 4_000 - at, second, node, Traffic::Heartbeats);
                }
            }
        }
    }

    fn weighed(&mut self) -> usize {
        let all: u64 = self.taste.iter().sum::<u64>().max(1);
        let mut left = self.rng.between(0, all - 1);
        for (kind, weight) in self.taste.iter().enumerate() {
            if left < *weight {
                return kind;
            }
            left -= weight;
        }
        0
    }

    fn traffic(&mut self) -> Traffic {
        *self.rng.pick(&[Traffic::All, Traffic::Heartbeats, Traffic::Agents, Traffic::Migration])
    }

    fn pairs(&self) -> Vec<(usize, usize)> {
        let all = 0..self.nodes;
        all.clone().flat_map(|a| all.clone().map(move |b| (a, b))).filter(|(a, b)| a != b).collect()
    }

    fn cut(&mut self, at: u64, span: u64, a: usize, b: usize, traffic: Traffic) {
        if a != b {
            self.push(at, Fault::Cut(a, b, traffic));
            self.push(at + span, Fault::Join(a, b, traffic));
        }
    }

    fn cut_off(&mut self, at: u64, span: u64, node: usize) {
        let traffic = self.traffic();
        for other in 0..self.nodes {
            self.cut(at, span, node, other, traffic);
            self.cut(at, span, other, node, traffic);
        }
    }

    fn wish(&mut self) {
        let (at, vm, node) = (self.at(), self.vm(), self.node());
        match self.rng.between(0, 19) {
            0..=6 => {
                let to = self.rng.permille(600).then_some(node);
                self.ask(at, Wish::Migrate(vm.clone(), to));
                if self.rng.permille(250) {
                    let later = at + self.rng.between(5, 2_000);
                    self.ask(later, Wish::Cancel(vm));
                }
            }
            7 => self.ask(at, Wish::Pause(vm)),
            8 | 9 => self.ask(at, Wish::Stop(vm)),
            10 => self.ask(at, Wish::Force(vm)),
            11..=13 => self.ask(at, Wish::Start(vm)),
            14 => self.ask(at, Wish::Restart(vm)),
            15 => self.ask(at, Wish::Delete(vm)),
            16 if self.nodes > 3 => self.ask(at, Wish::Remove(node)),
            17 => {
                let mib = *self.rng.pick(&[256, 1024, 4096]);
                self.ask(at, Wish::Memory(node, mib));
            }
            18 => {
                let to = *self.rng.pick(&[Profile::Default, Profile::Fast, Profile::Fast, Profile::Wan]);
                self.ask(at, Wish::Profile(to));
            }
            _ => {
                let priority = *self.rng.pick(&[Priority::Low, Priority::High]);
                self.ask(at, Wish::Create { vm, memory_mib: 128, priority });
            }
        }
    }
}
