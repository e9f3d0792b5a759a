//! Chance that can be had again: SplitMix64, as Steele, Lea and Flood gave it in
//! "Fast splittable pseudorandom number generators" (2014). And the options of what is drawn.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

use crate::{root, verify};

/// The options of a run in which chance decides.
#[derive(Debug, clap::Args)]
pub struct Drawn {
    /// Draw the same as in an earlier run.
    #[arg(long)]
    seed: Option<u64>,
    /// Write the report to this file as well.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Run this program instead of building one; the guest is taken as it is, too.
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

impl Drawn {
    /// The program that is run.
    ///
    /// # Errors
    /// It, or the guest, could not be built.
    pub fn binary(&self) -> Result<PathBuf> {
        if let Some(binary) = &self.binary {
            return Ok(binary.clone());
        }
        ensure!(verify::guest().run()?.passed() && verify::binary().run()?.passed(), "it could not be built");
        let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
        Ok(root().join(target).join("debug/holdfast"))
    }

    /// What the draws follow from.
    ///
    /// # Errors
    /// The clock is before 1970.
    pub fn seed(&self) -> Result<u64> {
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).context("before 1970")?;
        Ok(self.seed.unwrap_or(clock.as_secs()))
    }
}

/// A source of chance; the same seed gives the same draws.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Dice(seed)
    }

    /// 64 bits.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number from `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low + 1)
    }

    /// True once in `times` draws.
    pub fn one_in(&mut self, times: u64) -> bool {
        self.next().is_multiple_of(times)
    }

    /// One of them; they must not be none.
    pub fn one_of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.between(0, all.len() as u64 - 1) as usize]
    }

    /// The same in another order.
    pub fn shuffled<T: Clone>(&mut self, all: &[T]) -> Vec<T> {
        let mut all = all.to_vec();
        for last in (1..all.len()).rev() {
            all.swap(last, self.between(0, last as u64) as usize);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_again_and_another_one_does_not() {
        let draws = |seed| {
            let mut dice = Dice::new(seed);
            (dice.between(1, 1_000_000), dice.shuffled(&[1, 2, 3, 4, 5, 6, 7, 8]))
        };
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
        let mut dice = Dice::new(3);
        assert!((0..1000).all(|_| (3..=5).contains(&dice.between(3, 5))));
        let mut sorted = dice.shuffled(&[1, 2, 3, 4]);
        sorted.sort_unstable();
        assert_eq!(sorted, [1, 2, 3, 4]);
    }
}
