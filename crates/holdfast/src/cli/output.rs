//! How results are printed: tables, figures, times, JSON.

use std::io::{IsTerminal, Write};

use comfy_table::presets::NOTHING;
use comfy_table::{ContentArrangement, Table};
use serde::Serialize;

use super::{CliError, Done};

/// Prints a value as JSON.
pub fn json(value: &impl Serialize) -> Done {
    let text = serde_json::to_string_pretty(value).map_err(|error| CliError::Local(error.to_string()))?;
    line(&text)
}

/// Prints a line. Unlike `println!` it does not panic when the reader is gone.
pub fn line(text: &str) -> Done {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}

/// Prints a table; columns are as wide as the terminal allows, and as their
/// contents where there is none.
pub fn table<const N: usize>(heads: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> Done {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(heads.map(|head| head.to_uppercase()));
    if std::io::stdout().is_terminal() {
        table.set_content_arrangement(ContentArrangement::Dynamic);
    } else {
        table.force_no_tty();
    }
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let text = table.to_string();
    for row in text.lines() {
        line(row.trim_end())?;
    }
    Ok(())
}

/// Prints names and values below each other.
pub fn facts(facts: &[(&str, String)]) -> Done {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, value) in facts {
        for (index, part) in value.split('\n').enumerate() {
            let name = if index == 0 { name } else { "" };
            line(format!("{name:width$}  {part}").trim_end())?;
        }
    }
    Ok(())
}

/// An amount for a person: `1.5 GiB`.
pub fn size(bytes: u64) -> String {
    holdfast_api::Size(bytes).rounded()
}

/// A moment as `2026-11-23 02:33:07.123Z`.
pub fn moment(at_ms: u64) -> String {
    let (days, rest) = (at_ms / 86_400_000, at_ms % 86_400_000);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (rest / 3_600_000, rest / 60_000 % 60, rest / 1000 % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{:03}Z", at_ms % 1000)
}

/// The date of a day counted from 1970-01-01. After Howard Hinnant's
/// "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`: a year that
/// begins in March has its leap day at the end.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

/// `yes` or `no`.
pub fn yes(value: bool) -> String {
    if value { "yes" } else { "no" }.into()
}

/// The value, or a dash.
pub fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".into(), |value| value.to_string())
}

/// The word by which a state travels.
pub fn word(state: &impl Serialize) -> String {
    match serde_json::to_value(state) {
        Ok(serde_json::Value::String(word)) => word,
        _ => "unknown".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_dates() {
        for (at_ms, text) in [
            (0, "1970-01-01 00:00:00.000Z"),
            (951_782_400_000, "2000-02-29 00:00:00.000Z"),
            (1_709_251_199_999, "2024-02-29 23:59:59.999Z"),
            (4_107_542_400_000, "2100-03-01 00:00:00.000Z"),
        ] {
            assert_eq!(moment(at_ms), text);
        }
    }
}
