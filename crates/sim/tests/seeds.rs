//! A few seeds of each kind; `sim --seeds` runs many more.

use holdfast_sim::{Mutation, Options, catch, explore, run, shrink};

#[test]
fn sixty_seeds_break_nothing() {
    let all = explore(0..60, &Options::default());
    assert_eq!(all.seeds, 60);
    assert!(all.failed.is_empty(), "{:?}", all.failed);
    // It was a life with events, not an empty one.
    assert!(all.virtual_ms > 60 * 15_000 && all.commits > 60 * 20, "{all:?}");
}

#[test]
fn a_seed_always_means_the_same_run() {
    let traced = Options { trace: true, mutation: None };
    for seed in [3, 17] {
        let (first, second) = (run(seed, &traced), run(seed, &traced));
        assert!(first.timeline.len() > 50);
        assert_eq!(first, second);
    }
}

#[test]
fn a_failing_seed_shrinks_to_what_breaks_the_same_rule() {
    let options = Options { mutation: Some(Mutation::SkipWait), trace: false };
    let caught = catch(Mutation::SkipWait, 200).expect("caught");
    let failure = shrink(caught.seed, &options).expect("it fails");
    assert_eq!(failure.outcome.violation.as_ref().map(|v| v.rule), Some(caught.violation.rule));
    assert!(failure.steps.0 < failure.steps.1, "{:?}", failure.steps);
    assert!(failure.outcome.story().contains("BROKEN"));
}

/// The budget that `sim --mutants` has for each is larger; these are quick.
#[test]
fn broken_rules_are_caught() {
    let quick = [
        (Mutation::DropMargin, 40),
        (Mutation::SkipWait, 40),
        (Mutation::IgnoreEpoch, 150),
        (Mutation::IgnoreTerm, 40),
        (Mutation::SilenceIsLost, 20),
        (Mutation::TimeoutIsFailure, 60),
        (Mutation::ContinueWithoutWord, 40),
        (Mutation::ContinueForTheLost, 80),
        (Mutation::GrantWithoutAuthority, 60),
        (Mutation::OutliveTheLease, 60),
    ];
    let missed: Vec<_> = quick
        .iter()
        .filter(|(mutation, budget)| catch(*mutation, *budget).is_none())
        .map(|(m, _)| m.to_string())
        .collect();
    assert!(missed.is_empty(), "not caught: {missed:?}");
}
