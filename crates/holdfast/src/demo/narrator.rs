//! The story on the terminal: with spinners and bars on one, in plain lines
//! everywhere else.

use std::io::IsTerminal;
use std::time::Duration;

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, ContentArrangement, Table};
use indicatif::{ProgressBar, ProgressStyle};

use super::figures::Figures;

const TURN: Duration = Duration::from_millis(100);

/// Tells the story.
pub struct Narrator {
    terminal: bool,
}

/// A step of the story that takes a while.
pub struct Step(Option<ProgressBar>);

impl Narrator {
    /// Looks whether anybody watches.
    pub fn new() -> Self {
        Self { terminal: std::io::stdout().is_terminal() && std::io::stderr().is_terminal() }
    }

    /// A line.
    pub fn say(&self, text: &str) {
        println!("{text}");
    }

    /// A line about the act that goes on.
    pub fn tell(&self, text: &str) {
        println!("    {text}");
    }

    /// A new act.
    pub fn act(&self, title: &str) {
        match self.terminal {
            true => println!("\n\x1b[1m{title}\x1b[0m"),
            false => println!("\n{title}"),
        }
    }

    /// A step begins.
    pub fn begin(&self, text: &str) -> Step {
        if !self.terminal {
            println!("  ... {text}");
            return Step(None);
        }
        let bar = ProgressBar::new_spinner().with_message(text.to_owned());
        if let Ok(style) = ProgressStyle::with_template("  {spinner} {wide_msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(TURN);
        Step(Some(bar))
    }

    /// A step begins that knows how far it is.
    pub fn begin_bar(&self, text: &str) -> Step {
        let step = self.begin(text);
        if let Step(Some(bar)) = &step
            && let Ok(style) = ProgressStyle::with_template("  {spinner} {prefix} [{bar:30}] {percent:>3} % {wide_msg}")
        {
            bar.set_style(style);
            bar.set_length(100);
            bar.set_prefix(text.to_owned());
            bar.set_message("");
        }
        step
    }

    /// The table of figures.
    pub fn figures(&self, figures: &Figures) {
        let mut table = Table::new();
        table.load_style(UTF8_FULL_CONDENSED).set_header(["", "measured", "what it is"]);
        match self.terminal {
            true => table.set_content_arrangement(ContentArrangement::Dynamic),
            false => table.force_no_tty(),
        };
        for row in figures.rows() {
            table.add_row(row);
        }
        if let Some(column) = table.column_mut(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        println!("\n{table}");
    }
}

impl Step {
    /// How far it is, 0 to 100.
    pub fn progress(&self, percent: u8, note: &str) {
        if let Some(bar) = &self.0 {
            bar.set_position(percent.into());
            bar.set_message(note.to_owned());
        }
    }

    /// What came of it.
    pub fn done(self, text: &str) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
        println!("  ✓ {text}");
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = &self.0
            && !bar.is_finished()
        {
            bar.finish_and_clear();
        }
    }
}
