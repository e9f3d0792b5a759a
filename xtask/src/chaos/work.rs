//! What goes on while things fail: writes over the API, migrations, and records in
//! the guests.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use holdfast_api::{AddSwitch, CreateVm, JobView, SwitchKind, SwitchView};
use holdfast_lab::cluster::{ApiClient, ApiError, Cluster, VmTemplate};

/// How long one request may take: longer than an election, shorter than a round.
const ANSWER_WITHIN: Duration = Duration::from_secs(8);
/// Time between two writes.
const PACE: Duration = Duration::from_millis(150);
/// No more writes in a round than this: each is a bridge on every node.
const WRITES: usize = 12;
/// The answers with which nobody is lied to: nobody knows, or nothing was done.
const HONEST: [&str; 3] = ["unknown", "no_coordinator", "no_answer"];

/// What became of the writes of a round.
#[derive(Debug, Default)]
pub struct Written {
    /// Switches that were acknowledged.
    pub acknowledged: BTreeSet<String>,
    /// Writes of which nobody knows.
    pub unknown: usize,
    /// Answers that no fault explains.
    pub wrong: Vec<String>,
}

/// Adds switches through one node after another until it is told to stop.
pub fn write(clients: &[ApiClient], round: u64, stop: &AtomicBool) -> Written {
    let mut written = Written::default();
    for (number, client) in (0..WRITES).zip(clients.iter().cycle()) {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let name = format!("c{round}x{number}");
        let request = AddSwitch { name, kind: SwitchKind::Private, uplink: None };
        let answer: Result<SwitchView, ApiError> = client.within(ANSWER_WITHIN).add_switch(&request);
        match answer {
            Ok(view) => drop(written.acknowledged.insert(view.name)),
            Err(error) if HONEST.contains(&error.code()) => written.unknown += 1,
            Err(error) => written.wrong.push(error.to_string()),
        }
        thread::sleep(PACE);
    }
    written
}

/// Asks a node to make a VM that is not started; the job if it agreed.
pub fn create_spare(cluster: &Cluster, client: &ApiClient, name: &str) -> Option<JobView> {
    let template = VmTemplate::new(name, 199).off();
    client.within(ANSWER_WITHIN).create_vm(&CreateVm { vm: cluster.definition(&template), start: false }).ok()
}
