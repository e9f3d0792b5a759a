//! The prober: a client's view of a blackout.

use std::net::{SocketAddrV4, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use holdfast_guest::wire::{Kind, Request};

use super::{STOP_CHECK, receive, udp_socket};

/// How long answers to the last pings may take before they count as lost.
const LAST_ANSWERS: Duration = Duration::from_millis(500);
/// 5.5 hours at 5 ms: a forgotten prober must not eat the machine's memory.
const MAX_SAMPLES: usize = 4_000_000;

/// One ping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// When it was sent.
    pub sent: Instant,
    /// When its answer arrived; `None`: not (yet).
    pub answered: Option<Instant>,
    /// The boot that answered (0: none).
    pub boot_id: u64,
}

/// A time without answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// The last sign of life before it.
    pub from: Instant,
    /// How long it lasted.
    pub length: Duration,
}

#[derive(Debug, Default)]
struct Samples {
    all: Vec<Sample>,
    /// Indices into `all`, in the order in which answers arrived.
    arrivals: Vec<u32>,
}

#[derive(Debug, Default)]
struct Probe {
    samples: Mutex<Samples>,
    arrived: Condvar,
    stop_sending: AtomicBool,
    stop_receiving: AtomicBool,
}

impl Probe {
    fn lock(&self) -> MutexGuard<'_, Samples> {
        self.samples.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Pings a guest at a steady pace, whether it answers or not, and remembers every answer.
#[derive(Debug)]
pub struct Prober {
    probe: Arc<Probe>,
    threads: Vec<JoinHandle<()>>,
}

impl Prober {
    /// Starts pinging every `interval` (5 ms is a good choice), from inside `netns` if given.
    ///
    /// # Errors
    /// When the namespace is not there or has no route to the guest.
    pub fn start(netns: Option<&str>, address: SocketAddrV4, interval: Duration) -> Result<Self> {
        let socket = Arc::new(udp_socket(netns, address)?);
        socket.set_read_timeout(Some(STOP_CHECK))?;
        let probe = Arc::new(Probe::default());
        let sender = (Arc::clone(&socket), Arc::clone(&probe));
        let receiver = (socket, Arc::clone(&probe));
        let threads = vec![
            thread::Builder::new().name("ping".into()).spawn(move || send_pings(&sender.0, &sender.1, interval))?,
            thread::Builder::new().name("pong".into()).spawn(move || receive_pongs(&receiver.0, &receiver.1))?,
        ];
        Ok(Self { probe, threads })
    }

    /// Waits for an answer that `wanted` accepts, those that have arrived already included.
    ///
    /// # Errors
    /// When none came within `deadline`.
    pub fn wait_for(&self, deadline: Duration, wanted: impl Fn(&Sample) -> bool) -> Result<Sample> {
        let until = Instant::now() + deadline;
        let mut samples = self.probe.lock();
        let mut seen = 0;
        loop {
            while let Some(index) = samples.arrivals.get(seen) {
                let sample = samples.all[*index as usize];
                if wanted(&sample) {
                    return Ok(sample);
                }
                seen += 1;
            }
            let left = until.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "no such answer of the guest within {} ms", deadline.as_millis());
            samples = self.probe.arrived.wait_timeout(samples, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Stops pinging, gives the last answers 500 ms to arrive, and returns what was seen.
    pub fn stop(mut self) -> ProbeReport {
        self.end();
        let mut samples = self.probe.lock();
        ProbeReport { samples: std::mem::take(&mut *samples), ended: Instant::now() }
    }

    fn end(&mut self) {
        self.probe.stop_sending.store(true, Ordering::Relaxed);
        let until = Instant::now() + LAST_ANSWERS;
        let mut samples = self.probe.lock();
        while samples.arrivals.len() < samples.all.len() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            samples = self.probe.arrived.wait_timeout(samples, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(samples);
        self.probe.stop_receiving.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // It cannot have panicked but by a bug, and then the report shows what it saw.
            let _ = thread.join();
        }
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        if !self.threads.is_empty() {
            self.end();
        }
    }
}

fn send_pings(socket: &UdpSocket, probe: &Probe, interval: Duration) {
    let mut next = Instant::now();
    while !probe.stop_sending.load(Ordering::Relaxed) {
        let sequence = {
            let mut samples = probe.lock();
            if samples.all.len() >= MAX_SAMPLES {
                return;
            }
            samples.all.push(Sample { sent: Instant::now(), answered: None, boot_id: 0 });
            samples.all.len() as u64 - 1
        };
        // A ping that cannot leave is a ping without an answer.
        let _ = socket.send(&Request { kind: Kind::Ping, sequence }.encode());
        next = (next + interval).max(Instant::now());
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

fn receive_pongs(socket: &UdpSocket, probe: &Probe) {
    while !probe.stop_receiving.load(Ordering::Relaxed) {
        let Some(reply) = receive(socket) else {
            continue;
        };
        let now = Instant::now();
        let mut samples = probe.lock();
        let Ok(index) = u32::try_from(reply.sequence) else {
            continue;
        };
        let Some(sample) = samples.all.get_mut(index as usize) else {
            continue;
        };
        if reply.kind == Kind::Ping && sample.answered.is_none() {
            sample.answered = Some(now);
            sample.boot_id = reply.boot_id;
            samples.arrivals.push(index);
            probe.arrived.notify_all();
        }
    }
}

/// What a [`Prober`] saw.
#[derive(Debug)]
pub struct ProbeReport {
    samples: Samples,
    ended: Instant,
}

impl ProbeReport {
    /// All pings, in the order of sending.
    pub fn samples(&self) -> &[Sample] {
        &self.samples.all
    }

    /// How many pings were sent.
    pub fn sent(&self) -> usize {
        self.samples.all.len()
    }

    /// How many of them had no answer.
    pub fn lost(&self) -> usize {
        self.samples.all.len() - self.samples.arrivals.len()
    }

    /// The boots that answered, in the order of their first answer.
    pub fn boots(&self) -> Vec<u64> {
        let mut boots = Vec::new();
        for index in &self.samples.arrivals {
            let boot_id = self.samples.all[*index as usize].boot_id;
            if !boots.contains(&boot_id) {
                boots.push(boot_id);
            }
        }
        boots
    }

    /// The longest time between two answers: the client's blackout. Time before the first answer
    /// does not count, an end without answers does. `None`: there was no answer at all.
    pub fn longest_gap(&self) -> Option<Gap> {
        let start = self.arrival_times().next()?;
        self.longest_gap_between(start, self.last_sent()?.max(start))
    }

    /// The longest time without an answer within `from..to`, its edges counted like answers.
    /// `None` when `to` is before `from`.
    pub fn longest_gap_between(&self, from: Instant, to: Instant) -> Option<Gap> {
        let within = self.arrival_times().filter(|at| (from..to).contains(at));
        let mut last = from;
        let mut longest = Gap { from, length: Duration::ZERO };
        for at in within.chain([to.min(self.ended)]) {
            let length = at.saturating_duration_since(last);
            if length > longest.length {
                longest = Gap { from: last, length };
            }
            last = at;
        }
        (to >= from).then_some(longest)
    }

    /// When the first answer arrived to a ping that was sent at `instant` or later.
    pub fn first_answer_after(&self, instant: Instant) -> Option<Instant> {
        self.samples.all.iter().filter(|sample| sample.sent >= instant).filter_map(|sample| sample.answered).min()
    }

    fn arrival_times(&self) -> impl Iterator<Item = Instant> {
        self.samples.arrivals.iter().filter_map(|index| self.samples.all[*index as usize].answered)
    }

    fn last_sent(&self) -> Option<Instant> {
        self.samples.all.last().map(|sample| sample.sent)
    }
}
