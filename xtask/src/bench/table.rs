//! What a benchmark found: rows for a person and rows for a program.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

/// One figure.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// What was measured, with its unit at the end.
    pub name: String,
    /// What Holdfast does: the median of all runs.
    pub ours: f64,
    /// What something else does at the same in the same run, where there is a peer.
    pub peer: Option<f64>,
    /// `ours / peer`.
    pub ratio: Option<f64>,
    /// The highest acceptable `ratio` where there is a peer, `ours` otherwise; the
    /// lowest if more is better.
    pub goal: Option<f64>,
    /// More is better.
    pub more_is_better: bool,
    /// Whether the goal is reached; absent without a goal.
    pub met: Option<bool>,
    /// The least of all runs.
    pub min: f64,
    /// The greatest of all runs.
    pub max: f64,
    /// How many runs.
    pub runs: usize,
}

impl Row {
    /// The median of `samples`. With no samples the row says so by `runs` = 0,
    /// and no goal is met.
    pub fn of(name: impl Into<String>, samples: &[f64]) -> Self {
        let sorted = sorted(samples);
        Row {
            name: name.into(),
            ours: quantile(&sorted, 0.5),
            peer: None,
            ratio: None,
            goal: None,
            more_is_better: false,
            met: None,
            min: sorted.first().copied().unwrap_or_default(),
            max: sorted.last().copied().unwrap_or_default(),
            runs: sorted.len(),
        }
    }

    /// Durations in milliseconds.
    pub fn millis(name: &str, samples: &[Duration]) -> Self {
        let samples: Vec<f64> = samples.iter().map(|sample| sample.as_secs_f64() * 1e3).collect();
        Row::of(format!("{name}, ms"), &samples)
    }

    /// With what is acceptable.
    pub fn goal(mut self, goal: f64) -> Self {
        self.goal = Some(goal);
        self.met = Some(self.runs > 0 && self.ratio.unwrap_or(self.ours) <= goal);
        self
    }

    /// With what is acceptable, where more is better.
    pub fn at_least(mut self, goal: f64) -> Self {
        self.goal = Some(goal);
        self.more_is_better = true;
        self.met = Some(self.runs > 0 && self.ratio.unwrap_or(self.ours) >= goal);
        self
    }

    /// For what must hold of every run, not of the median.
    pub fn worst_goal(mut self, goal: f64) -> Self {
        self.ours = self.max;
        self.goal(goal)
    }

    /// Beside a peer that was measured in the same run.
    pub fn beside(mut self, peer: &[f64]) -> Self {
        let peer = quantile(&sorted(peer), 0.5);
        self.peer = Some(peer);
        self.ratio = (peer > 0.0).then(|| self.ours / peer);
        self
    }
}

fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// The `q`-quantile of sorted samples, between neighbours in proportion; 0 of none.
pub fn quantile(sorted: &[f64], q: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let at = q * last as f64;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    below + (above - below) * at.fract()
}

/// Durations as milliseconds, for [`Row::beside`].
pub fn millis(samples: &[Duration]) -> Vec<f64> {
    samples.iter().map(|sample| sample.as_secs_f64() * 1e3).collect()
}

/// The rows as a table of text.
pub fn table(rows: &[Row]) -> String {
    let heads = ["", "median", "min", "max", "runs", "peer", "ratio", "goal", "met"].map(str::to_owned);
    let cells = rows.iter().map(|row| {
        let met = row.met.map_or("", |met| if met { "yes" } else { "NO" });
        let cell = |value: Option<f64>| value.map(figure).unwrap_or_default();
        [
            row.name.clone(),
            figure(row.ours),
            figure(row.min),
            figure(row.max),
            row.runs.to_string(),
            cell(row.peer),
            cell(row.ratio),
            row.goal
                .map(|goal| format!("{} {}", if row.more_is_better { '≥' } else { '≤' }, figure(goal)))
                .unwrap_or_default(),
            met.to_owned(),
        ]
    });
    let lines: Vec<_> = std::iter::once(heads).chain(cells).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..lines[0].len()).map(width).collect();
    let mut text = String::new();
    for line in &lines {
        let mut out = format!("{:<1$}", line[0], widths[0]);
        for (cell, width) in line.iter().zip(&widths).skip(1) {
            let _ = write!(out, "  {cell:>width$}");
        }
        text.push_str(out.trim_end());
        text.push('\n');
    }
    text
}

fn figure(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        size if size < 10.0 => format!("{value:.2}"),
        size if size < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// Writes the rows as JSON.
///
/// # Errors
/// When the file cannot be written.
pub fn write_json(rows: &[Row], file: &Path) -> Result<()> {
    let text = serde_json::to_string_pretty(rows).context("writing the rows as JSON")?;
    fs::write(file, text + "\n").with_context(|| format!("cannot write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_lies_between_the_middle_two() {
        let row = Row::of("x", &[4.0, 1.0, 2.0, 10.0]).goal(3.0);
        assert_eq!((row.ours, row.min, row.max, row.runs, row.met), (3.0, 1.0, 10.0, 4, Some(true)));
        assert_eq!(Row::of("x", &[1.0, 9.0]).worst_goal(8.0).met, Some(false));
    }

    #[test]
    fn a_goal_beside_a_peer_is_about_the_ratio() {
        let row = Row::of("x", &[11.0]).beside(&[10.0]).goal(1.15);
        assert_eq!((row.peer, row.met), (Some(10.0), Some(true)));
        assert_eq!(Row::of("x", &[12.0]).beside(&[10.0]).goal(1.15).met, Some(false));
    }

    #[test]
    fn where_more_is_better_the_goal_is_the_least() {
        let row = Row::of("x", &[9.0]).beside(&[10.0]).at_least(1.0);
        assert_eq!((row.ratio, row.met), (Some(0.9), Some(false)));
        assert!(table(&[row]).contains("≥ 1.00"));
        assert_eq!(Row::of("x", &[9.0]).at_least(8.0).met, Some(true));
    }

    #[test]
    fn nothing_measured_meets_no_goal() {
        let row = Row::of("x", &[]).goal(1.0);
        assert_eq!((row.runs, row.met), (0, Some(false)));
        assert!(table(&[row]).contains("NO"));
    }

    #[test]
    fn columns_line_up() {
        let text = table(&[Row::of("short", &[1.0]).goal(2.0), Row::of("rather longer", &[1234.5])]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        let column = |line: &str, of: &str| line[..line.find(of).unwrap()].chars().count() + of.chars().count();
        assert_eq!(column(lines[0], "median"), column(lines[1], "1.00"));
        assert_eq!(column(lines[1], "1.00"), column(lines[2], "1234"));
    }
}
