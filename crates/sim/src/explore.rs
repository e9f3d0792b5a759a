//! Runs of seeds, and what to show of those that break something.

use holdfast_core::Profile;

use crate::generate::{Plot, plot};
use crate::mutation::Mutation;
use crate::world::{Setting, Tally, Violation, World};

/// After everything works again it may take this long until all is settled: a
/// multiple of the longest lease, and what jobs and guests take by themselves.
fn settle_ms(longest_lease_ms: u64) -> u64 {
    3 * longest_lease_ms + 40_000
}

/// One seed in so many is watched while it rests.
const RESTS_EVERY: u64 = 8;
/// Votes that come back do so within so much time, in milliseconds: nothing happened
/// for so long when the rest begins. The witness may have to wait for the longest
/// lease on its disk, and then attends for three seconds before it votes.
const VOTES_COME_BACK_MS: u64 = 12_000;
/// Then nothing may happen for so long, in milliseconds: longer than whoever took the
/// witness over keeps it from whom it was given to.
const REST_MS: u64 = 15_000;

/// How a seed is run.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A rule that is broken on purpose.
    pub mutation: Option<Mutation>,
    /// Keep a timeline.
    pub trace: bool,
}

/// What became of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Its seed.
    pub seed: u64,
    /// The rule that was broken, if one was.
    pub violation: Option<Violation>,
    /// How long it lasted in virtual time, in milliseconds.
    pub virtual_ms: u64,
    /// How long it took from the heal until everything was settled, in milliseconds.
    pub settled_ms: u64,
    /// What was counted.
    pub tally: Tally,
    /// Log entries that were committed.
    pub commits: usize,
    /// Plans that were carried out.
    pub decisions: usize,
    /// What happened, with its moment in nanoseconds; empty without a trace.
    pub timeline: Vec<(u64, String)>,
}

impl Outcome {
    /// The timeline as text, a line each, with seconds in front.
    pub fn story(&self) -> String {
        let line = |(at, text): &(u64, String)| format!("{:10.4} {text}\n", *at as f64 / 1e9);
        self.timeline.iter().map(line).collect()
    }
}

/// Runs a seed.
pub fn run(seed: u64, options: &Options) -> Outcome {
    run_plot(seed, &plot(seed), options)
}

fn run_plot(seed: u64, plot: &Plot, options: &Options) -> Outcome {
    let setting = Setting {
        seed,
        nodes: plot.nodes,
        memory_mib: plot.memory_mib,
        profile: plot.profile,
        witness: plot.witness,
        luns: plot.luns,
        calm: false,
        mutation: options.mutation,
        trace: options.trace,
        image_locks: plot.steps.iter().any(|step| step.deed.stops_a_keeper()),
    };
    let mut world = World::new(setting, plot.steps.clone());
    world.run_until(plot.heal_ms);
    world.heal();
    // A leftover of the script may still break something: wait for its end.
    let scripted = plot.steps.last().map_or(0, |step| step.at_ms).max(plot.heal_ms);
    world.run_until(scripted);
    world.heal();
    let healed = world.now_ms();
    let mark = world.mark();
    let bound = healed + settle_ms(Profile::Wan.timing().length_ms);
    while world.violation().is_none() {
        let unsettled = world.unsettled();
        if unsettled.is_empty() {
            break;
        }
        if world.now_ms() >= bound {
            world.not_settled(&unsettled);
            break;
        }
        let next = world.now_ms() + 500;
        world.run_until(next);
    }
    let settled = world.now_ms();
    world.judge_recovery(&mark);
    if world.violation().is_none() && seed.is_multiple_of(RESTS_EVERY) {
        while world.quiet_ms() < VOTES_COME_BACK_MS && world.violation().is_none() {
            if world.now_ms() >= bound {
                world.not_settled(&["votes or decisions".into()]);
            }
            let next = world.now_ms() + 500;
            world.run_until(next);
        }
        let (mark, rested) = (world.mark(), world.now_ms() + REST_MS);
        world.run_until(rested);
        world.judge_rest(&mark);
    }
    if world.violation().is_none() {
        world.judge_log();
    }
    let (commits, decisions) = world.committed();
    Outcome {
        seed,
        violation: world.violation().cloned(),
        virtual_ms: world.now_ms(),
        settled_ms: settled.saturating_sub(healed),
        tally: world.tally(),
        commits,
        decisions,
        timeline: world.into_timeline(),
    }
}

/// A seed that broke something, with as little as breaks the same rule.
#[derive(Clone, Debug)]
pub struct Failure {
    /// How many steps were needed of how many.
    pub steps: (usize, usize),
    /// The shrunk run, with its timeline.
    pub outcome: Outcome,
}

/// Leaves out what is not needed to break the same rule, then tells the rest.
pub fn shrink(seed: u64, options: &Options) -> Option<Failure> {
    let mut plot = plot(seed);
    let all = plot.steps.len();
    let quiet = Options { trace: false, ..options.clone() };
    let rule = run_plot(seed, &plot, &quiet).violation?.rule;
    let same = |plot: &Plot| run_plot(seed, plot, &quiet).violation.is_some_and(|v| v.rule == rule);
    let mut chunk = all.div_ceil(2).max(1);
    loop {
        let mut at = 0;
        let mut shrunk = false;
        while at < plot.steps.len() {
            let mut fewer = plot.clone();
            fewer.steps.drain(at..(at + chunk).min(fewer.steps.len()));
            if same(&fewer) {
                plot = fewer;
                shrunk = true;
            } else {
                at += chunk;
            }
        }
        if chunk > 1 {
            chunk = chunk.div_ceil(2);
        } else if !shrunk {
            break;
        }
    }
    for nodes in 2..plot.nodes {
        let smaller = Plot { nodes, ..plot.clone() };
        if same(&smaller) {
            plot = smaller;
            break;
        }
    }
    let outcome = run_plot(seed, &plot, &Options { trace: true, ..options.clone() });
    Some(Failure { steps: (plot.steps.len(), all), outcome })
}

/// What many seeds showed.
#[derive(Clone, Debug, Default)]
pub struct Exploration {
    /// How many were run.
    pub seeds: u64,
    /// Virtual time, in milliseconds.
    pub virtual_ms: u64,
    /// Log entries that were committed.
    pub commits: u64,
    /// The longest that a run took to settle, in milliseconds, and its seed.
    pub slowest_settled_ms: (u64, u64),
    /// The longest that queues were, and the most that a recovery took: see [`Tally`].
    pub most: Tally,
    /// Every seed that broke something.
    pub failed: Vec<(u64, Violation)>,
}

/// Runs seeds one after the other.
pub fn explore(seeds: std::ops::Range<u64>, options: &Options) -> Exploration {
    let mut all = Exploration::default();
    for seed in seeds {
        all.count(&run(seed, options));
    }
    all
}

impl Exploration {
    fn count(&mut self, outcome: &Outcome) {
        self.seeds += 1;
        self.virtual_ms += outcome.virtual_ms;
        self.commits += outcome.commits as u64;
        self.slowest_settled_ms = self.slowest_settled_ms.max((outcome.settled_ms, outcome.seed));
        self.most = self.most.or(outcome.tally);
        if let Some(violation) = &outcome.violation {
            self.failed.push((outcome.seed, violation.clone()));
        }
    }

    /// Adds what other seeds showed.
    pub fn add(&mut self, other: Exploration) {
        self.seeds += other.seeds;
        self.virtual_ms += other.virtual_ms;
        self.commits += other.commits;
        self.slowest_settled_ms = self.slowest_settled_ms.max(other.slowest_settled_ms);
        self.most = self.most.or(other.most);
        self.failed.extend(other.failed);
    }
}

/// A mutation that was caught.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caught {
    /// By which seed.
    pub seed: u64,
    /// By which rule.
    pub violation: Violation,
}

/// The first of `budget` seeds that a mutation is caught by.
pub fn catch(mutation: Mutation, budget: u64) -> Option<Caught> {
    let options = Options { mutation: Some(mutation), trace: false };
    (0..budget).find_map(|seed| {
        let violation = run(seed, &options).violation?;
        Some(Caught { seed, violation })
    })
}
