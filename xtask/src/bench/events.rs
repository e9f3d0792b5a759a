//! The cluster's events, each with the moment at which it arrived here.
//!
//! A node that dies in an experiment takes its stream with it, so every node's
//! stream is followed, and an event counts from when the first of them told it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use holdfast_api::Event;
use holdfast_lab::cluster::ApiClient;

/// After the end of a node's stream, until it is opened again.
const AGAIN: Duration = Duration::from_millis(50);
/// How often a silent stream looks whether it is still wanted.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// An event and when it arrived.
#[derive(Debug, Clone)]
pub struct Told {
    /// When the first node told it.
    pub at: Instant,
    /// What happened.
    pub event: Event,
}

#[derive(Default)]
struct Shared {
    told: Mutex<Vec<Told>>,
    changed: Condvar,
    stop: AtomicBool,
}

impl Shared {
    fn told(&self) -> MutexGuard<'_, Vec<Told>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Follows the events of a cluster until it is dropped.
pub struct Events(Arc<Shared>);

impl Events {
    /// Follows these nodes, over the ends and beginnings of their agents.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn follow(nodes: Vec<ApiClient>) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        for node in nodes {
            let shared = Arc::clone(&shared);
            // Not joined: it ends soon after this value, whatever its node does.
            thread::Builder::new()
                .name("events".into())
                .spawn(move || {
                    while !shared.stop.load(Ordering::Relaxed) {
                        // A node without power has no stream: it is tried until it has one.
                        let _ = read(&node, &shared);
                        thread::sleep(AGAIN);
                    }
                })
                .context("starting a thread for events")?;
        }
        Ok(Events(shared))
    }

    /// The number of the last event so far: where to look from.
    pub fn last(&self) -> u64 {
        self.0.told().iter().map(|told| told.event.index).max().unwrap_or(0)
    }

    /// Events with a greater index than `after`.
    pub fn since(&self, after: u64) -> Vec<Told> {
        self.0.told().iter().filter(|told| told.event.index > after).cloned().collect()
    }

    /// Waits for an event with a greater index than `after`.
    ///
    /// # Errors
    /// When there is none within `deadline`; says what there was.
    pub fn wait(&self, after: u64, deadline: Duration, wanted: impl Fn(&Event) -> bool) -> Result<Told> {
        let find = |told: &[Told]| told.iter().find(|told| told.event.index > after && wanted(&told.event)).cloned();
        let (told, _) = self
            .0
            .changed
            .wait_timeout_while(self.0.told(), deadline, |told| find(told).is_none())
            .unwrap_or_else(PoisonError::into_inner);
        match find(&told) {
            Some(found) => Ok(found),
            None => {
                let texts = told.iter().filter(|told| told.event.index > after);
                let texts: Vec<_> = texts.map(|told| format!("{}: {}", told.event.subject, told.event.text)).collect();
                bail!("no such event within {deadline:?}; there were:\n  {}", texts.join("\n  "))
            }
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }
}

/// Whether an event tells that `node` is lost.
pub fn lost(node: &str) -> impl Fn(&Event) -> bool {
    let subject = format!("node {node}");
    move |event| event.subject == subject && is_loss(event)
}

/// Whether an event tells that a node is lost.
pub fn is_loss(event: &Event) -> bool {
    event.subject.starts_with("node ") && event.text.starts_with("is lost")
}

fn read(node: &ApiClient, shared: &Shared) -> Result<()> {
    // From the first event on: what another node told already is known.
    let mut stream = node.follow_events(0)?;
    while !shared.stop.load(Ordering::Relaxed) {
        let Some(event) = stream.next(LOOK_EVERY)? else { continue };
        let at = Instant::now();
        let mut told = shared.told();
        if !told.iter().rev().any(|known| known.event.index == event.index) {
            told.push(Told { at, event });
            shared.changed.notify_all();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn the_first_node_that_tells_counts_and_each_event_once() {
        let directory = std::env::temp_dir().join(format!("bench-events-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a directory");
        let sockets: Vec<_> = ["a", "b"].map(|name| directory.join(name)).to_vec();
        let listeners: Vec<_> = sockets.iter().map(|path| UnixListener::bind(path).expect("listening")).collect();
        let events = Events::follow(sockets.iter().map(ApiClient::new).collect()).expect("following");
        for listener in &listeners {
            let (mut stream, _) = listener.accept().expect("a reader");
            let text = "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n:\n\nid: 4\nevent: event\ndata: {\"index\":4,\"at_ms\":1,\
                        \"severity\":\"error\",\"subject\":\"node n2\",\"text\":\"is lost: silence\"}\n\n";
            stream.write_all(text.as_bytes()).expect("told");
        }
        let told = events.wait(3, Duration::from_secs(10), lost("n2")).expect("the loss");
        assert_eq!((told.event.index, events.since(3).len(), events.last()), (4, 1, 4));
        assert!(events.wait(4, Duration::ZERO, |_| true).is_err(), "nothing came after it");
        std::fs::remove_dir_all(&directory).expect("tidying up");
    }
}
