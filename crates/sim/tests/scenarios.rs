//! Every scenario has a log that a person has read. `UPDATE=1` writes it anew.

use std::fs;
use std::path::Path;

use holdfast_sim::{Scenario, play};

#[test]
fn every_scenario_goes_as_its_log_says() {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let mut names: Vec<_> = fs::read_dir(&all).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    assert!(!names.is_empty());
    let mut wrong = Vec::new();
    for directory in names {
        let scenario: Scenario = fs::read_to_string(directory.join("commands")).unwrap().parse().unwrap();
        let log = play(&scenario);
        let expected = directory.join("expected.log");
        if std::env::var_os("UPDATE").is_some() {
            fs::write(&expected, &log).unwrap();
        } else if fs::read_to_string(&expected).unwrap_or_default() != log {
            wrong.push(format!("{}:\n{log}", directory.display()));
        }
    }
    assert!(wrong.is_empty(), "these went another way; UPDATE=1 accepts it:\n{}", wrong.join("\n"));
}
