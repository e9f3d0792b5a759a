//! The TCP session: does a connection outlive a live migration?

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use super::{LINE_BYTES, tcp_stream};

/// How a [`TcpSession`] went.
#[derive(Debug, Clone, Default)]
pub struct TcpReport {
    /// Pings that were answered, each in its turn.
    pub answered: u64,
    /// The longest time from a ping to its answer.
    pub longest_round_trip: Duration,
    /// Why the session broke; `None`: it survived.
    pub failure: Option<String>,
}

/// One TCP connection over which pings go back and forth until it is stopped or breaks.
#[derive(Debug)]
pub struct TcpSession {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    thread: Option<JoinHandle<TcpReport>>,
}

impl TcpSession {
    /// Connects and starts. A ping that has no answer within `patience` breaks the session.
    ///
    /// # Errors
    /// When the guest cannot be reached within `patience`.
    pub fn start(netns: Option<&str>, address: SocketAddrV4, interval: Duration, patience: Duration) -> Result<Self> {
        let stream = tcp_stream(netns, address, patience)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&answered));
        let thread = thread::Builder::new().name("tcp-session".into()).spawn(move || {
            let mut report = TcpReport::default();
            let result = converse(&stream, &stopped, &count, interval, &mut report);
            report.failure = result.err().map(|error| format!("{error:#}"));
            report
        })?;
        Ok(Self { stop, answered, thread: Some(thread) })
    }

    /// Pings answered so far.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Whether the session has ended by itself.
    pub fn broken(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Ends the session and says whether it had survived.
    ///
    /// # Errors
    /// When the session's thread broke down.
    pub fn stop(mut self) -> Result<TcpReport> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("the session was stopped before")?;
        thread.join().map_err(|_| anyhow!("the session's thread panicked"))
    }
}

impl Drop for TcpSession {
    fn drop(&mut self) {
        // The thread ends by itself, at the latest when its patience does.
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn converse(
    mut stream: &TcpStream,
    stop: &AtomicBool,
    answered: &AtomicU64,
    interval: Duration,
    report: &mut TcpReport,
) -> Result<()> {
    let mut reader = BufReader::new(stream);
    let mut boot_id = None;
    while !stop.load(Ordering::Relaxed) {
        let n = report.answered + 1;
        let sent = Instant::now();
        stream.write_all(format!("ping {n}\n").as_bytes()).with_context(|| format!("sending ping {n}"))?;
        let mut line = String::new();
        reader.by_ref().take(LINE_BYTES).read_line(&mut line).with_context(|| format!("waiting for pong {n}"))?;
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        ensure!(
            words.first() == Some(&"pong") && words.get(1) == Some(&n.to_string().as_str()),
            "the answer to ping {n} was {line:?}"
        );
        let boot = words.iter().find_map(|word| word.strip_prefix("boot_id=")).unwrap_or_default().to_owned();
        ensure!(boot_id.get_or_insert_with(|| boot.clone()) == &boot, "pong {n} came from another boot, {boot}");
        report.longest_round_trip = report.longest_round_trip.max(sent.elapsed());
        report.answered = n;
        answered.store(n, Ordering::Relaxed);
        thread::sleep(interval);
    }
    Ok(())
}
