//! What a person needs to see when something did not come true.

use std::fmt::Write as _;
use std::fs;

use super::Cluster;

/// How much of each node's log is shown, in lines.
const LOG_LINES: usize = 40;
const EVENTS: usize = 30;

impl Cluster {
    /// The cluster's state, its last events and the ends of the nodes' logs.
    pub fn diagnosis(&self) -> String {
        let mut text = String::new();
        match self.any() {
            Err(error) => drop(writeln!(text, "no node answers: {error}")),
            Ok(client) => {
                let _ = writeln!(text, "cluster, says {}:", client.socket().display());
                match client.cluster() {
                    Ok(mut view) => {
                        view.ca_certificate.clear();
                        let _ = writeln!(text, "  {view:?}");
                    }
                    Err(error) => drop(writeln!(text, "  {error}")),
                }
                for node in client.nodes().unwrap_or_default() {
                    let _ =
                        writeln!(text, "  node {} {:?} voter={} vms={}", node.name, node.state, node.voter, node.vms);
                }
                for vm in client.vms().unwrap_or_default() {
                    let at = (&vm.node, &vm.target);
                    let _ =
                        writeln!(text, "  VM {} {:?} {at:?} epoch {}: {}", vm.name, vm.state, vm.epoch, vm.standing);
                }
                for job in client.jobs().unwrap_or_default() {
                    let _ = writeln!(
                        text,
                        "  job {} {} {} {:?} {}% {} {:?}",
                        job.id, job.work, job.vm, job.state, job.percent, job.note, job.outcome
                    );
                }
                let events = client.events(0).unwrap_or_default();
                for event in events.iter().skip(events.len().saturating_sub(EVENTS)) {
                    let _ = writeln!(text, "  {} {} {}: {}", event.index, event.at_ms, event.subject, event.text);
                }
            }
        }
        text + &self.log_tails()
    }

    /// The ends of the nodes' logs.
    pub(super) fn log_tails(&self) -> String {
        let mut text = String::new();
        for host in self.hosts() {
            let log = fs::read(host.log_path()).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            let lines: Vec<&str> = log.lines().collect();
            let _ = writeln!(text, "--- log of {}", host.name());
            for line in lines.iter().skip(lines.len().saturating_sub(LOG_LINES)) {
                let _ = writeln!(text, "{line}");
            }
        }
        text
    }

    pub(super) fn with_logs(&self, error: anyhow::Error) -> anyhow::Error {
        error.context(self.log_tails())
    }
}
