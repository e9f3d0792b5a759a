//! The writer: which records the guest has promised to keep.

use std::net::{SocketAddrV4, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use holdfast_guest::verify::Acknowledged;
use holdfast_guest::wire::{Kind, Request};

use super::{STOP_CHECK, acknowledged, receive, udp_socket};

/// What a [`Writer`] was told.
#[derive(Debug, Clone, Default)]
pub struct WriterReport {
    /// Every write that the guest acknowledged as durable.
    pub acknowledged: Vec<Acknowledged>,
    /// Writes that the guest refused or that its disk failed.
    pub refused: u64,
    /// Requests sent.
    pub sent: u64,
    /// The longest time between two acknowledgements.
    pub longest_gap: Duration,
}

/// What was acknowledged so far, and the times without an acknowledgement.
#[derive(Debug, Default)]
struct Heard {
    /// The highest sequence (0: none).
    highest: u64,
    last: Option<Instant>,
    longest: Duration,
    /// Since it was asked last.
    recent: Duration,
}

impl Heard {
    /// One more, up to now.
    fn end(&mut self, now: Instant) {
        let gap = self.last.map_or(Duration::ZERO, |last| now - last);
        (self.longest, self.recent) = (self.longest.max(gap), self.recent.max(gap));
    }
}

impl WriterReport {
    /// The highest acknowledged sequence (0: none).
    pub fn highest(&self) -> u64 {
        self.acknowledged.iter().map(|write| write.sequence).max().unwrap_or(0)
    }
}

/// Has a guest write records one after another and remembers those that were acknowledged.
#[derive(Debug)]
pub struct Writer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<WriterReport>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    heard: Mutex<Heard>,
    /// An acknowledgement came.
    more: Condvar,
}

impl Shared {
    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    fn stops(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

impl Writer {
    /// Starts writing: the next request goes out `interval` after the last one was answered, or
    /// after `patience` without an answer. Late acknowledgements count as well.
    ///
    /// # Errors
    /// When the namespace is not there or has no route to the guest.
    pub fn start(netns: Option<&str>, address: SocketAddrV4, interval: Duration, patience: Duration) -> Result<Self> {
        let socket = udp_socket(netns, address)?;
        socket.set_read_timeout(Some(STOP_CHECK))?;
        let shared = Arc::<Shared>::default();
        let theirs = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("writer".into())
            .spawn(move || write_records(&socket, &theirs, interval, patience))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// The highest sequence acknowledged so far (0: none).
    pub fn highest(&self) -> u64 {
        self.shared.heard().highest
    }

    /// Waits until the sequence is so much higher than now.
    ///
    /// # Errors
    /// When it is not within `patience`.
    pub fn wait_more(&self, count: u64, patience: Duration) -> Result<()> {
        let heard = self.shared.heard();
        let wanted = heard.highest + count;
        let waited = self.shared.more.wait_timeout_while(heard, patience, |heard| heard.highest < wanted);
        let (heard, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        ensure!(!waited.timed_out(), "the guest wrote {} of {wanted} records within {patience:?}", heard.highest);
        Ok(())
    }

    /// The longest time without an acknowledgement that ended since this was asked last,
    /// or has not ended yet.
    pub fn recent_gap(&self) -> Duration {
        let mut heard = self.shared.heard();
        heard.end(Instant::now());
        std::mem::take(&mut heard.recent)
    }

    /// Stops writing.
    ///
    /// # Errors
    /// When the writing thread broke down.
    pub fn stop(mut self) -> Result<WriterReport> {
        self.shared.stop();
        let thread = self.thread.take().context("the writer was stopped before")?;
        thread.join().map_err(|_| anyhow!("the writer's thread panicked"))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn write_records(socket: &UdpSocket, shared: &Shared, interval: Duration, patience: Duration) -> WriterReport {
    let mut report = WriterReport::default();
    while !shared.stops() {
        report.sent += 1;
        let request = Request { kind: Kind::Write, sequence: report.sent };
        let sent = socket.send(&request.encode()).is_ok();
        let until = Instant::now() + patience;
        while Instant::now() < until && !shared.stops() {
            let Some(reply) = receive(socket).filter(|reply| reply.kind == Kind::Write) else {
                if !sent {
                    break;
                }
                continue;
            };
            match acknowledged(&reply) {
                Some(write) => {
                    let mut heard = shared.heard();
                    let now = Instant::now();
                    heard.end(now);
                    heard.last = Some(now);
                    heard.highest = heard.highest.max(write.sequence);
                    shared.more.notify_all();
                    report.longest_gap = heard.longest;
                    report.acknowledged.push(write);
                }
                None => report.refused += 1,
            }
            if reply.sequence == report.sent {
                break;
            }
        }
        thread::sleep(interval);
    }
    report
}
