//! Ctrl-C and SIGTERM: the story ends at its next step and everything is cleared
//! up; a story that does not come to its next step is left to the lab's guard.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::timeout;

/// How long the story may take to end after it was interrupted.
const GRACE: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The story was interrupted by a signal.
#[derive(Debug)]
pub struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// Whether the story was interrupted; all clones say the same.
#[derive(Clone, Debug, Default)]
pub struct Interruption(Arc<AtomicBool>);

impl Interruption {
    /// Fails once the story was interrupted.
    pub fn check(&self) -> Result<()> {
        match self.0.load(Ordering::Relaxed) {
            true => Err(Interrupted.into()),
            false => Ok(()),
        }
    }

    /// Waits until `look` finds something.
    ///
    /// # Errors
    /// When it was interrupted, or nothing was found within `deadline`.
    pub fn wait<T>(&self, what: &str, deadline: Duration, mut look: impl FnMut() -> Option<T>) -> Result<T> {
        let until = Instant::now() + deadline;
        while Instant::now() < until {
            self.check()?;
            if let Some(found) = look() {
                return Ok(found);
            }
            std::thread::sleep(LOOK_EVERY);
        }
        bail!("{what}: not within {} s", deadline.as_secs())
    }

    /// Waits until it is interrupted.
    pub fn await_signal(&self) {
        while self.check().is_ok() {
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

/// Tells a story on a thread of its own while this one waits for signals.
///
/// # Errors
/// The story's own, [`Interrupted`] among them.
pub fn watching(interruption: &Interruption, story: impl FnOnce() -> Result<bool> + Send + 'static) -> Result<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut signals =
            [signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::hangup())?];
        let (tell, mut told) = oneshot::channel();
        std::thread::Builder::new().name("story".into()).spawn(move || tell.send(story()))?;
        let [interrupt, terminate, hangup] = &mut signals;
        tokio::select! {
            told = &mut told => return told.context("the story's thread panicked")?,
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
        interruption.0.store(true, Ordering::Relaxed);
        eprintln!("\nending; everything is cleared up");
        match timeout(GRACE, told).await {
            Ok(told) => told.context("the story's thread panicked")?,
            // This process ends now, and the lab's guard removes what is left.
            Err(_) => Err(Interrupted.into()),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_story_that_ends_by_itself_is_told() {
        assert!(watching(&Interruption::default(), || Ok(true)).unwrap());
        let error = watching(&Interruption::default(), || bail!("no hosts")).unwrap_err();
        assert_eq!(error.to_string(), "no hosts");
    }

    #[test]
    fn a_wait_ends_when_the_story_is_interrupted() {
        let interruption = Interruption::default();
        let waits = interruption.clone();
        let waiting =
            std::thread::spawn(move || waits.wait("what never comes", Duration::from_secs(60), || None::<()>));
        interruption.0.store(true, Ordering::Relaxed);
        assert!(waiting.join().unwrap().unwrap_err().is::<Interrupted>());
    }
}
