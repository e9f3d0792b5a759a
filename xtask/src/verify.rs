//! Everything that must hold before a change goes in. Changes no source.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::leftovers::{Before, MARK};
use crate::step::{Outcome, Step, minutes};
use crate::{e2e, root, sim};

/// Runs every check, also after one has failed, so that one run tells all.
pub fn run(quick: bool) -> Result<bool> {
    let mut outcomes = Vec::new();
    if quick {
        for step in [formatting(), clippy(), structure()] {
            outcomes.push(step.run()?);
        }
        return Ok(told(&outcomes));
    }
    let me = fs::metadata("/proc/self").context("looking at /proc/self")?.uid();
    ensure!(me == 0, "the tests build hosts from namespaces, which needs root: run `sudo make test`");
    let before = Before::look();
    for step in steps()? {
        outcomes.push(step.env(MARK, before.mark()).run()?);
    }
    outcomes.push(cleanliness(&before));
    Ok(told(&outcomes))
}

fn steps() -> Result<Vec<Step>> {
    let mut steps =
        vec![formatting(), clippy(), guest(), binary(), tests()?, documentation(), boots(), sim(Vec::new())];
    if root().join("crates/lab/tests/e2e").exists() {
        steps.push(e2e(None));
    }
    if cargo_has("deny") {
        steps.push(Step::cargo("licences and advisories", &["deny", "--workspace", "check", "--hide-inclusion-graph"]));
    }
    Ok(steps)
}

fn formatting() -> Step {
    Step::cargo("formatting", &["fmt", "--all", "--check"])
}

fn clippy() -> Step {
    Step::cargo("clippy", &["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"])
        .within(minutes(40))
}

fn structure() -> Step {
    Step::cargo("structure", &["test", "--quiet", "-p", "xtask", "--test", "structure"])
}

/// The guest that tests boot.
pub fn guest() -> Step {
    Step::new("tiny guest", "guest/build.sh")
}

/// The binary that the lab's hosts run.
pub fn binary() -> Step {
    Step::cargo("the binary", &["build", "--quiet", "-p", "holdfast"]).within(minutes(40))
}

/// All tests but the end-to-end ones, which get the machine to themselves.
fn tests() -> Result<Step> {
    let step = Step::cargo("tests", &["test", "--workspace", "--no-fail-fast", "--lib", "--bins"]).within(minutes(40));
    let names = test_targets()?.into_iter().filter(|name| name != "e2e");
    Ok(step.args(names.flat_map(|name| ["--test".to_owned(), name])))
}

fn documentation() -> Step {
    Step::cargo("documentation's examples", &["test", "--workspace", "--doc", "--quiet"])
}

fn boots() -> Step {
    Step::cargo(
        "the guest's boots",
        &["test", "-p", "holdfast-guest", "--test", "boot", "--", "--ignored", "--test-threads=1"],
    )
}

/// The names of all integration tests.
fn test_targets() -> Result<Vec<String>> {
    let metadata = metadata()?;
    let packages = metadata["packages"].as_array().context("cargo metadata names no packages")?;
    let targets = packages.iter().flat_map(|package| package["targets"].as_array().into_iter().flatten());
    let tests = targets.filter(|target| target["kind"].as_array().is_some_and(|kinds| kinds.contains(&"test".into())));
    let mut names: Vec<String> = tests.filter_map(|target| target["name"].as_str()).map(str::to_owned).collect();
    names.sort();
    names.dedup();
    Ok(names)
}

fn metadata() -> Result<serde_json::Value> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(root())
        .stderr(Stdio::inherit())
        .output()
        .context("running cargo metadata")?;
    ensure!(output.status.success(), "cargo metadata failed: {}", output.status);
    serde_json::from_slice(&output.stdout).context("reading cargo metadata")
}

fn cargo_has(subcommand: &str) -> bool {
    let found = Command::new(format!("cargo-{subcommand}"))
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    found.is_ok_and(|status| status.success())
}

fn cleanliness(before: &Before) -> Outcome {
    let begun = std::time::Instant::now();
    println!("\n== nothing left behind ==");
    let left = before.left();
    for thing in &left {
        println!("left behind: {thing}");
    }
    let failure = (!left.is_empty()).then(|| format!("{} things are left", left.len()));
    Outcome { name: "nothing left behind", took: begun.elapsed(), failure }
}

/// Prints how it went.
fn told(outcomes: &[Outcome]) -> bool {
    println!("\n== summary ==");
    for outcome in outcomes {
        let word = if outcome.passed() { "passed" } else { "FAILED" };
        let why = outcome.failure.as_deref().unwrap_or_default();
        println!("{word}  {:>5} s  {}  {why}", outcome.took.as_secs(), outcome.name);
    }
    let failed = outcomes.iter().filter(|outcome| !outcome.passed()).count();
    let seconds: u64 = outcomes.iter().map(|outcome| outcome.took.as_secs()).sum();
    println!("{} checks, {failed} failed, {} min {} s", outcomes.len(), seconds / 60, seconds % 60);
    failed == 0
}
