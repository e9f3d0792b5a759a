//! A host's CLOCK_BOOTTIME: starts anywhere and runs at its own rate.

use holdfast_core::lease::BootTime;

/// Nanoseconds in a millisecond.
pub const MS: u64 = 1_000_000;

const MILLION: u128 = 1_000_000;

/// A clock that was `shown` at true time `at`.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    at: u64,
    shown: u64,
    /// Parts per million of the true rate: 1,000,000 is exact.
    rate: u64,
}

impl Clock {
    /// Shows `shown` nanoseconds at true time `at` and drifts by `drift_ppm`.
    pub fn new(at: u64, shown: u64, drift_ppm: i64) -> Self {
        let rate = 1_000_000_u64.saturating_add_signed(drift_ppm);
        Clock { at, shown, rate }
    }

    /// What it shows at true time `now`.
    pub fn read(&self, now: u64) -> BootTime {
        let passed = u128::from(now - self.at) * u128::from(self.rate) / MILLION;
        BootTime(self.shown + passed as u64)
    }

    /// The first true moment, not before `now`, at which it shows at least `wanted`.
    pub fn when(&self, wanted: BootTime, now: u64) -> u64 {
        let left = u128::from(wanted.0.saturating_sub(self.read(now).0));
        now + (left * MILLION).div_ceil(u128::from(self.rate)) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alarm_never_rings_early_and_rings_within_a_microsecond() {
        for drift in [-40_000, -7, 0, 3, 40_000] {
            let clock = Clock::new(1_000, 77, drift);
            for (now, ahead) in [(1_000, 1), (5 * MS, 1500 * MS), (9_999_999, 7)] {
                let wanted = BootTime(clock.read(now).0 + ahead);
                let rings = clock.when(wanted, now);
                assert!(clock.read(rings) >= wanted);
                assert!(clock.read(rings - 1) <= wanted);
            }
        }
    }
}
