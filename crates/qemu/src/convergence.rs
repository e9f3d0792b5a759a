//! How hard a migration is pressed to come to its end: pure decisions.
//!
//! QEMU lets the guest stand still for as long as the downtime limit allows, if
//! that ends the migration sooner. So the limit starts small, grows only while
//! passes over the RAM get nowhere, and only then is the guest slowed down: a
//! throttled guest feels much worse than a short stop.

use std::time::Duration;

use crate::MigrationProgress;

/// What a migration may cost the guest and the network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationSettings {
    /// How long the guest may stand still, tried in this order.
    pub downtime_limits: Vec<Duration>,
    /// Whether the guest may be slowed down when the last limit is not enough.
    pub throttle: bool,
    /// At most so many bytes a second; `None`: what the network gives.
    pub bandwidth_bytes_per_s: Option<u64>,
    /// Send RAM over so many connections at once. Both ends must say the same.
    /// Pays from some GiB of RAM on.
    pub multifd_channels: Option<u8>,
    /// How long the guest may stand still while the last part is on its way,
    /// before the migration is cancelled and the guest goes on at the source.
    pub switchover_deadline: Duration,
    /// How long the whole may take before it is cancelled.
    pub deadline: Duration,
}

impl Default for MigrationSettings {
    fn default() -> Self {
        MigrationSettings {
            downtime_limits: [50, 100, 300].map(Duration::from_millis).to_vec(),
            throttle: true,
            bandwidth_bytes_per_s: None,
            multifd_channels: None,
            switchover_deadline: Duration::from_secs(5),
            deadline: Duration::from_secs(3600),
        }
    }
}

impl MigrationSettings {
    pub(crate) fn first_downtime_limit(&self) -> Duration {
        let first = self.downtime_limits.first().copied();
        first.unwrap_or(Duration::from_millis(50))
    }
}

/// A change to a running migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Adjustment {
    /// The guest may stand still for so long.
    DowntimeLimit(Duration),
    /// The guest may be slowed down by up to so many percent.
    Throttle(u8),
}

/// A pass is in vain when the expected downtime did not fall by a tenth.
const PASSES_IN_VAIN: u32 = 3;

/// A limit is given at least so long.
const STAGE_MIN: Duration = Duration::from_secs(1);

/// The throttles that are tried last, in percent.
const THROTTLES: [u8; 2] = [60, 99];

/// Follows a migration and says when to press harder.
#[derive(Clone, Debug)]
pub struct Convergence {
    steps: std::vec::IntoIter<Adjustment>,
    since: Duration,
    passes: u64,
    expected: Duration,
    in_vain: u32,
}

impl Convergence {
    /// For a migration that starts with the settings' first downtime limit.
    pub fn new(settings: &MigrationSettings) -> Self {
        let limits = settings.downtime_limits.iter().skip(1).copied();
        let mut steps: Vec<_> = limits.map(Adjustment::DowntimeLimit).collect();
        if settings.throttle {
            steps.extend(THROTTLES.map(Adjustment::Throttle));
        }
        Convergence { steps: steps.into_iter(), since: Duration::ZERO, passes: 0, expected: Duration::MAX, in_vain: 0 }
    }

    /// What to change now, if anything, `elapsed` after the migration's start.
    pub fn adjust(&mut self, elapsed: Duration, progress: &MigrationProgress) -> Option<Adjustment> {
        if progress.ram.passes <= self.passes {
            return None;
        }
        // The first pass sends everything: it says nothing of the end.
        let first = progress.ram.passes < 2;
        self.passes = progress.ram.passes;
        let expected = progress.expected_downtime();
        if !first && expected >= self.expected.mul_f64_saturating(0.9) {
            self.in_vain += 1;
        }
        self.expected = expected;
        if self.in_vain < PASSES_IN_VAIN || elapsed.saturating_sub(self.since) < STAGE_MIN {
            return None;
        }
        self.in_vain = 0;
        self.since = elapsed;
        self.steps.next()
    }
}

trait MulSaturating {
    fn mul_f64_saturating(self, factor: f64) -> Duration;
}

impl MulSaturating for Duration {
    fn mul_f64_saturating(self, factor: f64) -> Duration {
        Duration::try_from_secs_f64(self.as_secs_f64() * factor).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(passes: u64, expected_ms: u64) -> MigrationProgress {
        serde_json::from_value(serde_json::json!({
            "status": "active",
            "expected-downtime": expected_ms,
            "ram": {"dirty-sync-count": passes},
        }))
        .expect("a progress")
    }

    fn run(settings: &MigrationSettings, expected: impl Fn(u64) -> u64) -> Vec<Adjustment> {
        let mut convergence = Convergence::new(settings);
        (1..60)
            .filter_map(|pass| convergence.adjust(Duration::from_millis(500 * pass), &at(pass, expected(pass))))
            .collect()
    }

    #[test]
    fn a_migration_that_gets_closer_is_left_alone() {
        let shrinking = |pass: u64| (4000.0 * 0.8_f64.powi(pass as i32)) as u64 + 1;
        let steps = run(&MigrationSettings::default(), |pass| shrinking(pass.min(30)));
        // Only the flat tail, far below any limit, counts as in vain.
        assert!(steps.len() <= 5);
        let mut convergence = Convergence::new(&MigrationSettings::default());
        for pass in 1..30 {
            let now = Duration::from_secs(pass);
            assert_eq!(convergence.adjust(now, &at(pass, shrinking(pass))), None);
        }
    }

    #[test]
    fn one_that_gets_nowhere_is_pressed_step_by_step_and_then_no_further() {
        let steps = run(&MigrationSettings::default(), |_| 700);
        assert_eq!(
            steps,
            [
                Adjustment::DowntimeLimit(Duration::from_millis(100)),
                Adjustment::DowntimeLimit(Duration::from_millis(300)),
                Adjustment::Throttle(60),
                Adjustment::Throttle(99),
            ]
        );
    }

    #[test]
    fn throttling_can_be_forbidden() {
        let settings = MigrationSettings { throttle: false, ..Default::default() };
        assert_eq!(run(&settings, |_| 700).len(), 2);
    }

    #[test]
    fn quick_passes_are_given_time_and_repeated_looks_do_not_count() {
        let mut convergence = Convergence::new(&MigrationSettings::default());
        for pass in 1..90 {
            let now = Duration::from_millis(10 * pass);
            assert_eq!(convergence.adjust(now, &at(pass, 700)), None);
        }
        let mut convergence = Convergence::new(&MigrationSettings::default());
        for second in 1..100 {
            let now = Duration::from_secs(second);
            assert_eq!(convergence.adjust(now, &at(2, 700)), None);
        }
    }
}
