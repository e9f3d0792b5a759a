//! What the demo measured, for programs and for people.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

/// Everything that was measured. Times are in milliseconds; the names are those
/// of the JSON that `--json` writes, which programs rely on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Figures {
    /// How many nodes the cluster has.
    pub nodes: usize,
    /// How many VMs ran.
    pub vms: usize,
    /// How QEMU ran their guests: `kvm` or `tcg`.
    pub accelerator: String,
    /// From power-on until every node was up, voting and reaching the volume.
    pub cluster_ready_ms: u64,
    /// From the start of the first VM's QEMU until its guest answered.
    pub vm_boot_ms: u64,
    /// The live migration of the loaded VM.
    pub migration: Migration,
    /// The loss of the node that ran the loaded VM.
    pub failover: Failover,
    /// Whether two QEMUs of one VM were ever seen running it together.
    pub split_brain: bool,
}

/// A live migration under load.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Migration {
    /// From its start to its end, by the account of QEMU.
    pub total_ms: u64,
    /// How long the guest stood still, by the account of QEMU.
    pub downtime_ms: u64,
    /// The longest time without an answer that a client saw, pinging every 5 ms.
    pub blackout_ms: u64,
    /// Its pings without an answer.
    pub lost_packets: usize,
    /// Whether the client's TCP connection went on.
    pub tcp_survived: bool,
}

/// A failover, counted from the pulled plug. The times are the loaded VM's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Failover {
    /// Until the cluster had declared the node lost.
    pub detected_ms: u64,
    /// Until the VM's QEMU had started elsewhere.
    pub started_ms: u64,
    /// Until the VM's guest answered again.
    pub serving_ms: u64,
    /// Records that were acknowledged as durable and are not on their disk.
    pub lost_records: usize,
}

impl Figures {
    /// Whether nothing happened that must never happen.
    pub fn is_sound(&self) -> bool {
        self.failover.lost_records == 0 && !self.split_brain
    }

    /// Writes them as JSON.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, file: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        std::fs::write(file, text).with_context(|| format!("writing {}", file.display()))
    }

    /// The rows of a table: name, figure, meaning.
    pub fn rows(&self) -> Vec<[String; 3]> {
        let (moved, lost) = (&self.migration, &self.failover);
        let row = |name: &str, figure: String, what: &str| [name.to_owned(), figure, what.to_owned()];
        let ms = |ms: u64| format!("{ms} ms");
        let yes = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
        vec![
            row("cluster ready", ms(self.cluster_ready_ms), "power-on → every node up, voting, reaching the volume"),
            row("VM boot", ms(self.vm_boot_ms), "QEMU started → guest answers, alone on the machine"),
            row("migration, total", ms(moved.total_ms), "start → end, by QEMU's account, under load"),
            row("migration, downtime", ms(moved.downtime_ms), "the guest stood still, by QEMU's account"),
            row("migration, blackout", ms(moved.blackout_ms), "longest time without an answer, seen by a client"),
            row("migration, lost pings", moved.lost_packets.to_string(), "of one every 5 ms"),
            row("migration, TCP survived", yes(moved.tcp_survived), "one connection, open all the time"),
            row("failover, detected", ms(lost.detected_ms), "plug pulled → node declared lost"),
            row("failover, started", ms(lost.started_ms), "plug pulled → QEMU runs elsewhere"),
            row("failover, serving", ms(lost.serving_ms), "plug pulled → guest answers again"),
            row("lost records", lost.lost_records.to_string(), "acknowledged, and not on the disk: must be 0"),
            row("split brain", yes(self.split_brain), "two QEMUs of one VM seen running together: must be no"),
        ]
    }
}

/// Whole milliseconds, rounded.
pub fn milliseconds(duration: Duration) -> u64 {
    u64::try_from((duration.as_micros() + 500) / 1000).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_find_the_figures_under_their_names() {
        let json = serde_json::to_value(Figures::default()).unwrap();
        let mut names = Vec::new();
        for (name, value) in json.as_object().unwrap() {
            match value.as_object() {
                Some(parts) => names.extend(parts.keys().map(|part| format!("{name}.{part}"))),
                None => names.push(name.clone()),
            }
        }
        names.sort();
        assert_eq!(
            names,
            [
                "accelerator",
                "cluster_ready_ms",
                "failover.detected_ms",
                "failover.lost_records",
                "failover.serving_ms",
                "failover.started_ms",
                "migration.blackout_ms",
                "migration.downtime_ms",
                "migration.lost_packets",
                "migration.tcp_survived",
                "migration.total_ms",
                "nodes",
                "split_brain",
                "vm_boot_ms",
                "vms",
            ]
        );
    }

    #[test]
    fn a_lost_record_and_a_split_brain_are_failures() {
        let mut figures = Figures::default();
        assert!(figures.is_sound());
        figures.failover.lost_records = 1;
        assert!(!figures.is_sound());
        assert!(!Figures { split_brain: true, ..Figures::default() }.is_sound());
    }

    #[test]
    fn times_are_rounded() {
        assert_eq!(milliseconds(Duration::from_micros(1499)), 1);
        assert_eq!(milliseconds(Duration::from_micros(1500)), 2);
    }
}
