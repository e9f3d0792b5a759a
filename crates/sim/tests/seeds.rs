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

/// `sim --mutants` searches; here are the seeds that it found, which are searched for
/// again only when the world has changed.
#[test]
fn broken_rules_are_caught() {
    let known = [
        (Mutation::DropMargin, 1),
        (Mutation::LeaseFromReceipt, 446),
        (Mutation::SkipWait, 1),
        (Mutation::IgnoreEpoch, 394),
        (Mutation::IgnoreTerm, 18),
        (Mutation::SilenceIsLost, 0),
        (Mutation::TimeoutIsFailure, 34),
        (Mutation::ContinueWithoutWord, 0),
        (Mutation::ContinueForTheLost, 9),
        (Mutation::GrantWithoutAuthority, 11),
        (Mutation::VoteAtOnce, 122),
        (Mutation::HearEarlierLives, 83),
        (Mutation::OutliveTheLease, 9),
        (Mutation::BelieveFailedFence, 87),
        (Mutation::ForgetHold, 98),
        (Mutation::AcknowledgeBeforeTheDisk, 228),
        (Mutation::SkipJoint, 11),
        (Mutation::UnheardIsLost, 1),
        (Mutation::CoordinateAtOnce, 18),
        (Mutation::StaleWitnessVotes, 8),
        (Mutation::AnswerWithoutLease, 6),
        (Mutation::ClaimWithoutLooking, 10),
        (Mutation::LeaveEarly, 4),
        (Mutation::ForgetAtOnce, 2),
    ];
    assert!(known.iter().map(|(mutation, _)| *mutation).eq(Mutation::ALL), "each has its seed");
    for (mutation, seed) in known {
        let options = Options { mutation: Some(mutation), trace: false };
        let caught = run(seed, &options).violation.is_some() || catch(mutation, 100).is_some();
        assert!(caught, "not caught: {mutation}");
    }
}
