//! The writer: which records the guest has promised to keep.

use std::net::{SocketAddrV4, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
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

/// Times without an acknowledgement.
#[derive(Debug, Default)]
struct Gaps {
    last: Option<Instant>,
    longest: Duration,
    /// Since it was asked last.
    recent: Duration,
}

impl Gaps {
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
    stop: Arc<AtomicBool>,
    highest: Arc<AtomicU64>,
    gaps: Arc<Mutex<Gaps>>,
    thread: Option<JoinHandle<WriterReport>>,
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
        let (stop, highest) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let gaps = Arc::<Mutex<Gaps>>::default();
        let (stopped, seen, timed) = (Arc::clone(&stop), Arc::clone(&highest), Arc::clone(&gaps));
        let thread = thread::Builder::new()
            .name("writer".into())
            .spawn(move || write_records(&socket, &stopped, &seen, &timed, interval, patience))?;
        Ok(Self { stop, highest, gaps, thread: Some(thread) })
    }

    /// The highest sequence acknowledged so far (0: none).
    pub fn highest(&self) -> u64 {
        self.highest.load(Ordering::Relaxed)
    }

    /// The longest time without an acknowledgement that ended since this was asked last,
    /// or has not ended yet.
    pub fn recent_gap(&self) -> Duration {
        let mut gaps = self.gaps.lock().unwrap_or_else(PoisonError::into_inner);
        gaps.end(Instant::now());
        std::mem::take(&mut gaps.recent)
    }

    /// Stops writing.
    ///
    /// # Errors
    /// When the writing thread broke down.
    pub fn stop(mut self) -> Result<WriterReport> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("the writer was stopped before")?;
        thread.join().map_err(|_| anyhow!("the writer's thread panicked"))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn write_records(
    socket: &UdpSocket,
    stop: &AtomicBool,
    highest: &AtomicU64,
    gaps: &Mutex<Gaps>,
    interval: Duration,
    patience: Duration,
) -> WriterReport {
    let mut report = WriterReport::default();
    while !stop.load(Ordering::Relaxed) {
        report.sent += 1;
        let request = Request { kind: Kind::Write, sequence: report.sent };
        let sent = socket.send(&request.encode()).is_ok();
        let until = Instant::now() + patience;
        while Instant::now() < until && !stop.load(Ordering::Relaxed) {
            let Some(reply) = receive(socket).filter(|reply| reply.kind == Kind::Write) else {
                if !sent {
                    break;
                }
                continue;
            };
            match acknowledged(&reply) {
                Some(write) => {
                    let mut gaps = gaps.lock().unwrap_or_else(PoisonError::into_inner);
                    let now = Instant::now();
                    gaps.end(now);
                    gaps.last = Some(now);
                    report.longest_gap = gaps.longest;
                    report.acknowledged.push(write);
                    highest.fetch_max(write.sequence, Ordering::Relaxed);
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
