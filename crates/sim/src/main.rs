//! Runs the simulation from a command line: see [`USAGE`].

use std::collections::{BTreeMap, VecDeque};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use holdfast_sim::{Caught, Exploration, Mutation, Options, Scenario, Violation, catch, explore, play, run, shrink};
use serde_json::json;

const USAGE: &str = "usage:
  sim --seed N            one seed, with its timeline
      --only TEXT         ... with the rule broken that has this in its name
  sim --seeds N           many, from --start S (0); a failing one is shrunk and told
  sim --mutants           (also with --seeds) breaks each rule on purpose and says which seed caught it
      --budget N          ... within so many seeds each (2000)
      --only TEXT         ... only those with this in their name
  sim --scenario FILE     plays a scenario file
options:
      --threads N         as many as there are processors
      --json FILE         figures for programs";

#[derive(Default)]
struct Arguments {
    seed: Option<u64>,
    seeds: Option<u64>,
    start: u64,
    mutants: bool,
    budget: u64,
    only: String,
    scenario: Option<String>,
    threads: Option<u64>,
    json: Option<String>,
}

fn arguments() -> Result<Arguments, String> {
    let mut words: VecDeque<String> = std::env::args().skip(1).collect();
    let mut arguments = Arguments { budget: 2000, ..Arguments::default() };
    while let Some(word) = words.pop_front() {
        let mut value = || words.pop_front().ok_or_else(|| format!("{word} needs a value"));
        let number = |text: String| text.parse::<u64>().map_err(|_| format!("{text:?} is no number"));
        match word.as_str() {
            "--seed" => arguments.seed = Some(number(value()?)?),
            "--seeds" => arguments.seeds = Some(number(value()?)?),
            "--start" => arguments.start = number(value()?)?,
            "--budget" => arguments.budget = number(value()?)?,
            "--only" => arguments.only = value()?,
            "--threads" => arguments.threads = Some(number(value()?)?.max(1)),
            "--mutants" => arguments.mutants = true,
            "--scenario" => arguments.scenario = Some(value()?),
            "--json" => arguments.json = Some(value()?),
            _ => return Err(format!("{word:?} is not understood")),
        }
    }
    Ok(arguments)
}

fn main() -> ExitCode {
    let done = arguments().and_then(|arguments| act(&arguments));
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("{why}\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn act(arguments: &Arguments) -> Result<bool, String> {
    let (good, figures) = if let Some(file) = &arguments.scenario {
        let text = std::fs::read_to_string(file).map_err(|error| format!("cannot read {file}: {error}"))?;
        let scenario: Scenario = text.parse().map_err(|error| format!("{file}: {error}"))?;
        print!("{}", play(&scenario));
        (true, json!({}))
    } else if let Some(seed) = arguments.seed {
        one(seed, &arguments.only)
    } else if arguments.mutants || arguments.seeds.is_some() {
        let explored = arguments.seeds.map(|seeds| many(arguments.start, seeds, arguments.threads));
        let broken = arguments.mutants.then(|| mutants(arguments.budget, &arguments.only, arguments.threads));
        let done: Vec<_> = explored.into_iter().chain(broken).collect();
        let figures = done.iter().filter_map(|(_, figures)| figures.as_object().cloned()).flatten().collect();
        (done.iter().all(|(good, _)| *good), serde_json::Value::Object(figures))
    } else {
        return Err("what is to be done?".into());
    };
    if let Some(file) = &arguments.json {
        let text = serde_json::to_string_pretty(&figures).map_err(|error| error.to_string())?;
        std::fs::write(file, text + "\n").map_err(|error| format!("cannot write {file}: {error}"))?;
    }
    Ok(good)
}

fn named(only: &str) -> Vec<Mutation> {
    Mutation::ALL.into_iter().filter(|mutation| mutation.to_string().contains(only)).collect()
}

fn one(seed: u64, only: &str) -> (bool, serde_json::Value) {
    let mutation = if only.is_empty() { None } else { named(only).first().copied() };
    let outcome = run(seed, &Options { trace: true, mutation });
    print!("{}", outcome.story());
    let settled = outcome.settled_ms;
    match &outcome.violation {
        Some(violation) => println!("seed {seed}: BROKEN {}: {}", violation.rule, violation.text),
        None => println!("seed {seed}: settled {settled} ms after everything worked again"),
    }
    let broken = outcome.violation.is_some();
    (!broken, json!({ "seed": seed, "violations": u64::from(broken), "settled_ms": settled }))
}

fn as_many(threads: Option<u64>) -> u64 {
    threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get() as u64))
}

fn many(start: u64, seeds: u64, threads: Option<u64>) -> (bool, serde_json::Value) {
    let threads = as_many(threads);
    let began = Instant::now();
    let share = seeds.div_ceil(threads.max(1)).max(1);
    let mut all = Exploration::default();
    std::thread::scope(|scope| {
        let ranges = (start..start + seeds).step_by(share as usize);
        let running: Vec<_> = ranges
            .map(|from| scope.spawn(move || explore(from..(from + share).min(start + seeds), &Options::default())))
            .collect();
        for thread in running {
            match thread.join() {
                Ok(part) => all.add(part),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    let seconds = began.elapsed().as_secs_f64();
    let hours = all.virtual_ms as f64 / 3_600_000.0;
    let rate = all.seeds as f64 / seconds;
    let (slowest, slowest_seed) = all.slowest_settled_ms;
    println!(
        "{} seeds, {hours:.1} simulated hours, {} commits, {} violations; {rate:.1} seeds/s, {:.1} simulated hours/s; slowest to settle: {slowest} ms (seed {slowest_seed})",
        all.seeds,
        all.commits,
        all.failed.len(),
        hours / seconds,
    );
    let (full, unrest) = (all.most.fullest, all.most.unrest);
    println!(
        "at most {} writes and {} proposals waited, {} events, {} ended jobs, {} causes and {} crashes were kept",
        full[0], full[1], full[2], full[3], full[4], full[5],
    );
    println!(
        "after everything worked again a VM got {} epochs, votes moved in {} steps, {} were elected, at most",
        unrest[0], unrest[1], unrest[2],
    );
    for (seed, violation) in &all.failed {
        println!("seed {seed}: BROKEN {}: {}", violation.rule, violation.text);
    }
    if let Some((seed, _)) = all.failed.first()
        && let Some(failure) = shrink(*seed, &Options::default())
    {
        println!("\nseed {seed}, shrunk to {} of {} steps:", failure.steps.0, failure.steps.1);
        print!("{}", failure.outcome.story());
    }
    let broke =
        |(seed, violation): &(u64, Violation)| json!({ "seed": seed, "rule": violation.rule, "text": violation.text });
    let figures = json!({
        "seeds": all.seeds, "simulated_hours": hours, "violations": all.failed.len(),
        "broken": all.failed.iter().map(broke).collect::<Vec<_>>(),
        "commits": all.commits, "seeds_per_s": rate, "simulated_hours_per_s": hours / seconds,
        "slowest_settled_ms": slowest,
        "at_most": {
            "writes": full[0], "proposals": full[1], "events": full[2], "ended_jobs": full[3], "causes": full[4],
            "crashes": full[5], "epochs_after_heal": unrest[0], "moves_after_heal": unrest[1],
            "elections_after_heal": unrest[2],
        },
    });
    (all.failed.is_empty(), figures)
}

fn mutants(budget: u64, only: &str, threads: Option<u64>) -> (bool, serde_json::Value) {
    let named = named(only);
    let next = AtomicUsize::new(0);
    let found = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..as_many(threads) {
            scope.spawn(|| {
                while let Some(mutation) = named.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let caught = catch(*mutation, budget);
                    match &caught {
                        Some(by) => println!("{mutation:<48} caught by seed {:>5}: {}", by.seed, by.violation.rule),
                        None => println!("{mutation:<48} NOT caught by {budget} seeds"),
                    }
                    found.lock().unwrap_or_else(PoisonError::into_inner).insert(*mutation, caught);
                }
            });
        }
    });
    let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    let (all, caught) = (found.len(), found.values().flatten().count());
    println!("{caught} of {all} caught");
    let row = |(mutation, caught): (&Mutation, &Option<Caught>)| {
        let (seed, rule) = (caught.as_ref().map(|by| by.seed), caught.as_ref().map(|by| by.violation.rule));
        json!({ "mutation": mutation.to_string(), "seed": seed, "rule": rule })
    };
    let rows: Vec<_> = found.iter().map(row).collect();
    (caught == all, json!({ "mutants": all, "mutants_caught": caught, "budget": budget, "caught": rows }))
}
