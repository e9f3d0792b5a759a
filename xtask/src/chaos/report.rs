//! What a run found, for a person and for a program.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

/// What happened in a run.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// With which the same faults are drawn again.
    pub seed: u64,
    /// How many nodes.
    pub nodes: usize,
    /// How long it ran, in seconds.
    pub seconds: u64,
    /// Rounds of faults, each healed and judged.
    pub rounds: u64,
    /// Faults by their kinds.
    pub faults: BTreeMap<&'static str, u64>,
    /// How often a QEMU was started after a fault, in place or elsewhere.
    pub restarts: usize,
    /// Those that were started on another node.
    pub failovers: usize,
    /// Migrations that were asked for, and those that were done.
    pub migrations: (u64, u64),
    /// Writes over the API that were acknowledged.
    pub writes_acknowledged: usize,
    /// Writes of which nobody knows whether they were applied.
    pub writes_unknown: usize,
    /// Records that guests acknowledged, all found on their disks.
    pub records: usize,
    /// The longest from the end of the faults until all was in order, in milliseconds.
    pub slowest_ms: u64,
    /// In which round that was.
    pub slowest_round: u64,
    /// The median of the same.
    pub median_ms: u64,
    /// What must never be; empty when all is well.
    pub violations: Vec<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} rounds in {} s on {} nodes, seed {}", self.rounds, self.seconds, self.nodes, self.seed)?;
        for (kind, count) in &self.faults {
            writeln!(f, "  {count:>4}  {kind}")?;
        }
        writeln!(f, "VMs started again {} times, {} of them elsewhere", self.restarts, self.failovers)?;
        writeln!(f, "migrations: {} asked for, {} done", self.migrations.0, self.migrations.1)?;
        writeln!(
            f,
            "writes over the API: {} acknowledged and kept, {} unknown; records of guests: {} acknowledged and kept",
            self.writes_acknowledged, self.writes_unknown, self.records
        )?;
        writeln!(
            f,
            "all in order again after {} ms in the median, at most {} ms (round {})",
            self.median_ms, self.slowest_ms, self.slowest_round
        )?;
        match self.violations.as_slice() {
            [] => writeln!(f, "no violations"),
            violations => violations.iter().try_for_each(|text| writeln!(f, "VIOLATION: {text}")),
        }
    }
}
