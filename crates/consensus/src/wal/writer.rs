//! Writing the log: a thread of its own, one fdatasync for all that waits.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use super::{BATCH_BYTES, Effect, HEADER_BYTES, Op, Recovered, frame, header};
use crate::medium::{Medium, NotReplaced, is_full};

/// Jobs that may wait for the disk; more make the engine wait.
const QUEUE: usize = 1024;
/// How long to wait for room on a full disk before trying again.
const FULL_RETRY: Duration = Duration::from_millis(100);

/// Called with the outcome once it is certain.
pub(crate) type Done = Box<dyn FnOnce(io::Result<()>) + Send>;

struct Job {
    ops: Vec<Op>,
    /// `None`: nobody waits, so it may go along with the next job that is waited for.
    done: Option<Done>,
}

/// Where the bytes that are still needed stand: offset and length of each operation.
#[derive(Debug, Default)]
pub(super) struct Layout {
    pub(super) entries: BTreeMap<u64, (u64, usize)>,
    pub(super) vote: Option<(u64, usize)>,
    pub(super) committed: Option<(u64, usize)>,
    purged: Option<(u64, usize)>,
}

impl Layout {
    pub(super) fn entry(&mut self, index: u64, place: (u64, usize)) {
        self.entries.split_off(&index);
        self.entries.insert(index, place);
    }

    pub(super) fn truncate(&mut self, keep: Option<u64>) {
        self.entries.split_off(&keep.map_or(0, |keep| keep + 1));
    }

    pub(super) fn purge(&mut self, up_to: u64, place: (u64, usize)) {
        self.entries = self.entries.split_off(&(up_to + 1));
        self.purged = Some(place);
    }

    fn apply(&mut self, effect: Effect, place: (u64, usize)) {
        match effect {
            Effect::Entry(index) => self.entry(index, place),
            Effect::Vote => self.vote = Some(place),
            Effect::Committed => self.committed = Some(place),
            Effect::Truncate(keep) => self.truncate(keep),
            Effect::Purge(up_to) => self.purge(up_to, place),
        }
    }

    /// In the order in which they can be read again: the purge says where entries begin.
    fn places(&self) -> impl Iterator<Item = (u64, usize)> + '_ {
        let single = [self.purged, self.vote, self.committed];
        single.into_iter().flatten().chain(self.entries.values().copied())
    }

    fn bytes(&self) -> u64 {
        self.places().map(|(_, length)| length as u64).sum()
    }
}

/// The handle to the writing thread.
pub(crate) struct Wal {
    jobs: Mutex<Option<mpsc::Sender<Job>>>,
    stopping: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Wal {
    /// Starts the thread on a log that [`super::recover`] has read up to `end`. What
    /// is wrong with the disk, if anything, shows in `trouble`.
    pub(crate) fn start(
        medium: Arc<dyn Medium>,
        node: u64,
        end: u64,
        recovered: &mut Recovered,
        compact_above_bytes: u64,
        trouble: watch::Sender<Option<String>>,
    ) -> io::Result<Wal> {
        let (jobs, queue) = mpsc::channel(QUEUE);
        let stopping = Arc::new(AtomicBool::new(false));
        let writer = Writer {
            medium,
            node,
            end,
            layout: std::mem::take(&mut recovered.layout),
            compact_above_bytes,
            lazy: Vec::new(),
            broken: None,
            stopping: stopping.clone(),
            trouble,
        };
        let thread = std::thread::Builder::new().name("consensus-log".into()).spawn(move || writer.run(queue))?;
        Ok(Wal { jobs: Mutex::new(Some(jobs)), stopping, thread: Mutex::new(Some(thread)) })
    }

    /// Hands operations to the thread. They are durable when `done` is called
    /// with success; without a `done`, at some later time.
    pub(crate) async fn write(&self, ops: Vec<Op>, done: Option<Done>) -> io::Result<()> {
        let sender = match self.jobs.lock() {
            Ok(jobs) => jobs.clone(),
            Err(_) => None,
        };
        let stopped = || io::Error::other("the log has been closed");
        let sender = sender.ok_or_else(stopped)?;
        sender.send(Job { ops, done }).await.map_err(|_| stopped())
    }

    /// Lets the thread finish what it has and waits for its end. A write that
    /// waits for room on a full disk is given up.
    pub(crate) fn close(&self) {
        if let Ok(mut jobs) = self.jobs.lock() {
            jobs.take();
        }
        self.stopping.store(true, Ordering::Release);
        let thread = self.thread.lock().ok().and_then(|mut slot| slot.take());
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the log's thread panicked");
        }
    }
}

impl Drop for Wal {
    fn drop(&mut self) {
        self.close();
    }
}

struct Writer {
    medium: Arc<dyn Medium>,
    node: u64,
    /// Where the last acknowledged frame ends.
    end: u64,
    layout: Layout,
    compact_above_bytes: u64,
    /// Operations that go along with the next write; at most one of each effect.
    lazy: Vec<Op>,
    /// Once a flush failed, nobody knows what is on the disk: nothing is
    /// acknowledged any more until a restart has read it again.
    broken: Option<String>,
    stopping: Arc<AtomicBool>,
    trouble: watch::Sender<Option<String>>,
}

impl Writer {
    fn run(mut self, mut queue: mpsc::Receiver<Job>) {
        while let Some(first) = queue.blocking_recv() {
            let mut bytes = 0;
            let mut ops = Vec::new();
            let mut waiting = Vec::new();
            let mut next = Some(first);
            while let Some(job) = next {
                match job.done {
                    Some(done) => {
                        bytes += job.ops.iter().map(|op| op.bytes.len()).sum::<usize>();
                        ops.extend(job.ops);
                        waiting.push(done);
                    }
                    None => self.postpone(job.ops),
                }
                next = if bytes < BATCH_BYTES { queue.try_recv().ok() } else { None };
            }
            if waiting.is_empty() {
                continue;
            }
            let outcome = self.write(ops);
            for done in waiting {
                done(match &outcome {
                    Ok(()) => Ok(()),
                    Err(e) => Err(io::Error::new(e.kind(), e.to_string())),
                });
            }
            self.compact_if_large();
        }
        if !self.lazy.is_empty() && self.broken.is_none() {
            // Only saves work after the next start, so a failure here costs nothing.
            let _ = self.write(Vec::new());
        }
    }

    fn postpone(&mut self, ops: Vec<Op>) {
        for op in ops {
            let kind = std::mem::discriminant(&op.effect);
            self.lazy.retain(|old| std::mem::discriminant(&old.effect) != kind);
            self.lazy.push(op);
        }
    }

    fn write(&mut self, ops: Vec<Op>) -> io::Result<()> {
        if let Some(broken) = &self.broken {
            return Err(io::Error::other(broken.clone()));
        }
        let mut all = std::mem::take(&mut self.lazy);
        all.extend(ops);
        let body: Vec<u8> = all.iter().flat_map(|op| op.bytes.iter().copied()).collect();
        let frame = frame(self.end, &body)
            .ok_or_else(|| self.break_down(format!("a batch of {} bytes is too long", body.len())))?;
        self.write_frame(&frame)?;
        let mut at = self.end + super::FRAME_HEAD_BYTES as u64;
        for op in &all {
            self.layout.apply(op.effect, (at, op.bytes.len()));
            at += op.bytes.len() as u64;
        }
        self.end += frame.len() as u64;
        Ok(())
    }

    /// Returns when the frame is on stable storage. While the disk is full it
    /// waits: giving up would stop the node, and what is not acknowledged is
    /// not relied upon by anybody.
    fn write_frame(&mut self, frame: &[u8]) -> io::Result<()> {
        let mut waited = false;
        loop {
            match self.medium.append(self.end, frame) {
                Ok(()) => break,
                Err(e) if is_full(&e) => {
                    if self.stopping.load(Ordering::Acquire) {
                        return Err(e);
                    }
                    if !waited {
                        let text = format!(
                            "no room for the consensus log in {}: {e}. Nothing is lost, but this node \
                             accepts nothing new until there is room again",
                            self.medium.log_path().display()
                        );
                        tracing::error!("{text}");
                        self.trouble.send_replace(Some(text));
                        waited = true;
                    }
                    std::thread::sleep(FULL_RETRY);
                }
                Err(e) => return Err(self.break_down(e.to_string())),
            }
        }
        if waited {
            tracing::info!("there is room for the consensus log again");
            self.trouble.send_replace(None);
        }
        Ok(())
    }

    fn break_down(&mut self, what: String) -> io::Error {
        let text = format!(
            "{}: {what}. This node takes no further part; restart it when the disk works",
            self.medium.log_path().display()
        );
        tracing::error!("{text}");
        self.trouble.send_replace(Some(text.clone()));
        self.broken = Some(text.clone());
        io::Error::other(text)
    }

    fn compact_if_large(&mut self) {
        let needed = self.layout.bytes();
        if self.broken.is_some() || self.end < self.compact_above_bytes.max(needed * 2) {
            return;
        }
        match self.compact() {
            Ok(()) => {}
            Err(NotReplaced::Kept(e)) => {
                tracing::warn!("the log in {} could not be made smaller: {e}", self.medium.log_path().display());
                // Trying after each write would cost more than it saves.
                self.compact_above_bytes = self.compact_above_bytes.max(self.end) * 2;
            }
            Err(NotReplaced::Unknown(what)) => drop(self.break_down(what)),
        }
    }

    fn compact(&mut self) -> Result<(), NotReplaced> {
        let mut bytes = header(self.node).to_vec();
        let mut body = Vec::new();
        for (at, length) in self.layout.places() {
            let start = body.len();
            body.resize(start + length, 0);
            self.medium.read_at(at, &mut body[start..])?;
            if body.len() >= BATCH_BYTES {
                append_frame(&mut bytes, &body)?;
                body.clear();
            }
        }
        append_frame(&mut bytes, &body)?;
        // The copy is read back by the reader that a start would use: a
        // replacement that cannot be read must not replace anything.
        let path = self.medium.log_path();
        let (recovered, end) =
            super::recover::parse(&path, &bytes, holdfast_core::NodeId(self.node)).map_err(io::Error::other)?;
        if end != bytes.len() || recovered.layout.bytes() != self.layout.bytes() {
            return Err(io::Error::other("the copy differs from the original").into());
        }
        self.medium.replace_log(&bytes)?;
        self.end = end as u64;
        self.layout = recovered.layout;
        tracing::debug!(bytes = self.end, "made the log smaller");
        Ok(())
    }
}

fn append_frame(bytes: &mut Vec<u8>, body: &[u8]) -> io::Result<()> {
    debug_assert!(bytes.len() >= HEADER_BYTES);
    if !body.is_empty() {
        let frame =
            frame(bytes.len() as u64, body).ok_or_else(|| io::Error::other("a record is too long for a frame"))?;
        bytes.extend_from_slice(&frame);
    }
    Ok(())
}
