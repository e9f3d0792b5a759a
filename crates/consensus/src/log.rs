//! The log as the engine sees it: everything in memory, made durable by [`crate::wal`].

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::ops::RangeBounds;
use std::sync::{Arc, Mutex, MutexGuard};

use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use openraft::{EntryPayload, OptionalSend, alias};
use tokio::sync::oneshot;

use crate::record::{EntryRecord, Position, VoteRecord};
use crate::types::{Entry, LogId, Types, Vote};
use crate::wal::{Op, Recovered, Wal};

/// A handle to the log; clones share it.
#[derive(Clone)]
pub(crate) struct Log {
    memory: Arc<Mutex<Memory>>,
    wal: Arc<Wal>,
}

/// Bounded by the snapshots: the engine purges what is in one.
struct Memory {
    entries: BTreeMap<u64, Entry>,
    vote: Option<Vote>,
    committed: Option<LogId>,
    purged: Option<LogId>,
}

impl Log {
    pub(crate) fn new(recovered: Recovered, wal: Arc<Wal>) -> Self {
        let memory = Memory {
            entries: recovered.entries,
            vote: recovered.vote.map(Vote::from),
            committed: recovered.committed.map(LogId::from),
            purged: recovered.purged.map(LogId::from),
        };
        Log { memory: Arc::new(Mutex::new(memory)), wal }
    }

    fn memory(&self) -> io::Result<MutexGuard<'_, Memory>> {
        self.memory.lock().map_err(|_| io::Error::other("a thread panicked while it changed the log"))
    }

    async fn write_and_wait(&self, ops: Vec<Op>) -> io::Result<()> {
        let (tell, told) = oneshot::channel();
        let done = Box::new(move |outcome| {
            let _ = tell.send(outcome);
        });
        self.wal.write(ops, Some(done)).await?;
        told.await.map_err(|_| io::Error::other("the log was closed before the write was done"))?
    }
}

fn by_index(entries: Vec<Entry>) -> impl Iterator<Item = (u64, Entry)> {
    entries.into_iter().map(|entry| (entry.log_id.index, entry))
}

impl RaftLogReader<Types> for Log {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let memory = self.memory()?;
        Ok(memory.entries.range(range).map(|(_, e)| e.clone()).collect())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.memory()?.vote)
    }
}

impl RaftLogStorage<Types> for Log {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<Types>, io::Error> {
        let memory = self.memory()?;
        let last = memory.entries.last_key_value().map(|(_, entry)| entry.log_id);
        Ok(LogState { last_purged_log_id: memory.purged, last_log_id: last.or(memory.purged) })
    }

    async fn get_log_reader(&mut self) -> Self::LogReader {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &alias::VoteOf<Types>) -> Result<(), io::Error> {
        self.memory()?.vote = Some(*vote);
        self.write_and_wait(vec![Op::vote(VoteRecord::from(vote))?]).await
    }

    /// Not waited for: losing it costs only a later start some work, because the
    /// entries themselves are durable and the coordinator says again how far they
    /// are committed.
    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.memory()?.committed = committed;
        let op = Op::committed(committed.as_ref().map(Position::from))?;
        self.wal.write(vec![op], None).await
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.memory()?.committed)
    }

    /// Who takes part is durable here before anybody else learns of it. Otherwise those who
    /// vote no more could know of it while their leader has lost it: they may be all that
    /// is needed of the old voters, would refuse it and not stand themselves.
    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<_> = entries.into_iter().collect();
        let ops = entries.iter().map(|entry| Op::entry(&EntryRecord::from(entry))).collect::<Result<Vec<_>, _>>()?;
        if entries.iter().any(|entry| matches!(entry.payload, EntryPayload::Membership(_))) {
            let outcome = self.write_and_wait(ops).await;
            self.memory()?.entries.extend(by_index(entries));
            callback.io_completed(outcome);
            return Ok(());
        }
        self.memory()?.entries.extend(by_index(entries));
        let done = Box::new(move |outcome| callback.io_completed(outcome));
        self.wal.write(ops, Some(done)).await
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        let keep = last.map(|id| id.index);
        self.memory()?.entries.split_off(&keep.map_or(0, |keep| keep + 1));
        self.write_and_wait(vec![Op::truncate_after(keep)?]).await
    }

    /// Not waited for: until it is durable, more is kept than needed.
    async fn purge(&mut self, up_to: LogId) -> Result<(), io::Error> {
        {
            let mut memory = self.memory()?;
            memory.entries = memory.entries.split_off(&(up_to.index + 1));
            memory.purged = Some(up_to);
        }
        let op = Op::purge(Position::from(&up_to))?;
        self.wal.write(vec![op], None).await
    }
}
