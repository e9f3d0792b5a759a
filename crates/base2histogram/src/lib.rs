//! The histograms in which the consensus engine counts what it does, at the size
//! that suits a node on which nothing happens.
//!
//! The crate of this name on crates.io makes tables for every precision that it
//! offers as soon as the first histogram is made: 26 MiB that stay resident in
//! every agent, of which the engine uses 2 KiB. So the workspace puts this one in
//! its place. It has what openraft calls, under the same names, and no more: a
//! version of the engine that calls for more does not compile.
//!
//! Values are counted by their number of binary digits. A percentile is therefore
//! told as the greatest value that it could be, less than twice what it is.

use std::fmt;
use std::marker::PhantomData;

/// Zero has no binary digits, the greatest value has 64.
const BUCKETS: usize = 65;

/// How often values of each size were recorded.
///
/// `T` would be what a period of a sliding window is marked with; the engine has
/// no such windows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram<T = ()> {
    counts: [u64; BUCKETS],
    periods: PhantomData<T>,
}

impl<T> Histogram<T> {
    /// Empty.
    pub fn new() -> Self {
        Histogram { counts: [0; BUCKETS], periods: PhantomData }
    }

    /// Counts a value.
    pub fn record(&mut self, value: u64) {
        self.record_n(value, 1);
    }

    /// Counts a value so many times.
    pub fn record_n(&mut self, value: u64, times: u64) {
        let count = &mut self.counts[digits(value)];
        *count = count.saturating_add(times);
    }

    /// How many values were counted.
    pub fn total(&self) -> u64 {
        self.counts.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// The value that `part` (0 to 1) of all values do not exceed, rounded up to
    /// the greatest of as many binary digits; 0 when nothing was counted.
    pub fn percentile(&self, part: f64) -> u64 {
        // At least one value lies at or below any percentile.
        let rank = ((self.total() as f64 * part).ceil() as u64).max(1);
        let mut seen = 0u64;
        for (digits, count) in self.counts.iter().enumerate() {
            seen = seen.saturating_add(*count);
            if seen >= rank {
                return greatest(digits);
            }
        }
        0
    }

    /// The percentiles that the engine tells.
    pub fn percentile_stats(&self) -> PercentileStats {
        PercentileStats {
            samples: self.total(),
            p0_1: self.percentile(0.001),
            p1: self.percentile(0.01),
            p5: self.percentile(0.05),
            p10: self.percentile(0.1),
            p50: self.percentile(0.5),
            p90: self.percentile(0.9),
            p99: self.percentile(0.99),
            p99_9: self.percentile(0.999),
        }
    }
}

impl<T> Default for Histogram<T> {
    fn default() -> Self {
        Histogram::new()
    }
}

fn digits(value: u64) -> usize {
    (u64::BITS - value.leading_zeros()) as usize
}

/// The greatest value of so many binary digits.
fn greatest(digits: usize) -> u64 {
    match digits {
        0 => 0,
        digits => u64::MAX >> (BUCKETS - 1 - digits),
    }
}

/// Percentiles of a [`Histogram`], rounded up as it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PercentileStats {
    /// How many values were counted.
    pub samples: u64,
    /// What 0.1 % do not exceed.
    pub p0_1: u64,
    /// What 1 % do not exceed.
    pub p1: u64,
    /// What 5 % do not exceed.
    pub p5: u64,
    /// What 10 % do not exceed.
    pub p10: u64,
    /// What half of them do not exceed.
    pub p50: u64,
    /// What 90 % do not exceed.
    pub p90: u64,
    /// What 99 % do not exceed.
    pub p99: u64,
    /// What 99.9 % do not exceed.
    pub p99_9: u64,
}

impl fmt::Display for PercentileStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} samples, median {}, 99 % at most {}", self.samples, self.p50, self.p99)
    }
}

/// Several histograms under their names, for people to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AsciiChart<T = ()> {
    series: Vec<(String, Histogram<T>)>,
}

impl<T> AsciiChart<T> {
    /// Of nothing.
    pub fn new() -> Self {
        AsciiChart { series: Vec::new() }
    }

    /// One more.
    pub fn add(mut self, name: &str, histogram: Histogram<T>) -> Self {
        self.series.push((name.to_owned(), histogram));
        self
    }

    /// With every count.
    pub fn detailed(&self) -> Detailed<'_, T> {
        Detailed(self)
    }
}

/// An [`AsciiChart`] with every count.
pub struct Detailed<'a, T = ()>(&'a AsciiChart<T>);

impl<T> fmt::Display for Detailed<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, histogram) in &self.0.series {
            writeln!(f, "{name}: {}", histogram.percentile_stats())?;
            for (digits, count) in histogram.counts.iter().enumerate().filter(|(_, count)| **count > 0) {
                writeln!(f, "  at most {}: {count}", greatest(digits))?;
            }
        }
        Ok(())
    }
}

impl<T> Default for AsciiChart<T> {
    fn default() -> Self {
        AsciiChart::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_counted_by_their_size() {
        let mut histogram: Histogram = Histogram::new();
        assert_eq!((histogram.total(), histogram.percentile(0.5)), (0, 0));
        for value in [0, 1, 5, 6, 7] {
            histogram.record(value);
        }
        histogram.record_n(1000, 5);
        assert_eq!(histogram.total(), 10);
        assert_eq!([0.0, 0.1, 0.2, 0.5, 0.51, 1.0].map(|part| histogram.percentile(part)), [0, 0, 1, 7, 1023, 1023]);
        let stats = histogram.percentile_stats();
        assert_eq!((stats.samples, stats.p0_1, stats.p50, stats.p99_9), (10, 0, 7, 1023));
    }

    #[test]
    fn the_greatest_value_and_count_fit() {
        let mut histogram: Histogram = Histogram::default();
        histogram.record_n(u64::MAX, u64::MAX);
        histogram.record(u64::MAX);
        assert_eq!((histogram.total(), histogram.percentile(1.0)), (u64::MAX, u64::MAX));
    }

    #[test]
    fn a_chart_names_each_and_its_counts() {
        let mut one: Histogram = Histogram::new();
        one.record_n(3, 2);
        let chart = AsciiChart::new().add("batches", one).add("waits", Histogram::new());
        let text = chart.detailed().to_string();
        assert_eq!(
            text,
            "batches: 2 samples, median 3, 99 % at most 3\n  at most 3: 2\nwaits: 0 samples, median 0, 99 % at most 0\n"
        );
    }

    #[test]
    fn a_histogram_is_small() {
        assert!(size_of::<Histogram>() <= 1024);
    }
}
