//! A connection to the volume server: calls, and what came of them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

use crate::volume::protocol::{Call, ToServer};

/// What came of a call.
type Told = Result<(), String>;

/// One connection to one life of the volume server.
pub(in crate::agent) struct Line {
    /// Counts the connections.
    pub(super) number: u64,
    /// What was agreed on before it began is known here: its questions can be answered.
    pub(super) adopted: watch::Sender<bool>,
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    calls: Mutex<HashMap<u64, oneshot::Sender<Told>>>,
    next: AtomicU64,
}

impl Line {
    pub(super) fn new(number: u64, writer: OwnedWriteHalf) -> Line {
        Line {
            number,
            adopted: watch::Sender::new(false),
            writer: tokio::sync::Mutex::new(writer),
            calls: Mutex::default(),
            next: AtomicU64::new(1),
        }
    }

    fn calls(&self) -> MutexGuard<'_, HashMap<u64, oneshot::Sender<Told>>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn say(&self, word: &ToServer) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(word)?;
        line.push(b'\n');
        Ok(self.writer.lock().await.write_all(&line).await?)
    }

    /// The number of a call that is about to be said, and where its answer will be.
    fn expect(&self) -> (u64, oneshot::Receiver<Told>) {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (tell, told) = oneshot::channel();
        self.calls().insert(id, tell);
        (id, told)
    }

    /// The volume server has answered a call.
    pub(super) fn answered(&self, id: u64, result: Told) {
        let call = self.calls().remove(&id);
        if let Some(call) = call {
            let _ = call.send(result);
        }
    }

    /// Says a call; calls are begun in the order in which they are said.
    pub(in crate::agent) async fn say_call(&self, call: Call) -> anyhow::Result<oneshot::Receiver<Told>> {
        let (id, told) = self.expect();
        self.say(&ToServer::Call { id, call }).await?;
        Ok(told)
    }

    pub(in crate::agent) async fn call(&self, call: Call, within: Duration) -> Result<(), CallError> {
        let (id, told) = self.expect();
        let answered = timeout(within, async {
            self.say(&ToServer::Call { id, call }).await?;
            told.await.context("the volume server ended")
        });
        let answered = answered.await;
        self.calls().remove(&id);
        let answered = answered.context("the volume server does not answer").and_then(|answered| answered);
        answered.map_err(CallError::Unknown)?.map_err(CallError::Refused)
    }
}

/// Why a call to the volume server was not answered with success.
#[derive(Debug, thiserror::Error)]
pub(in crate::agent) enum CallError {
    /// It says that it did not do it.
    #[error("{0}")]
    Refused(String),
    /// It may have done it, or do it later.
    #[error(transparent)]
    Unknown(anyhow::Error),
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt as _, BufReader};
    use tokio::net::UnixStream;

    use super::*;

    #[tokio::test]
    async fn only_an_answer_says_that_a_call_did_nothing() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let line = Line::new(1, ours.into_split().1);
        let call = || line.call(Call::Only(Vec::new()), Duration::from_secs(60));
        let mut theirs = BufReader::new(theirs);
        let mut word = String::new();
        let refusing = async {
            theirs.read_line(&mut word).await.unwrap();
            line.answered(1, Err("no such device".into()));
        };
        let (refused, ()) = tokio::join!(call(), refusing);
        assert!(matches!(refused, Err(CallError::Refused(why)) if why == "no such device"));

        let mute = line.call(Call::Only(Vec::new()), Duration::ZERO).await;
        assert!(matches!(mute, Err(CallError::Unknown(_))), "{mute:?}");
        drop(theirs);
        let gone = call().await;
        assert!(matches!(gone, Err(CallError::Unknown(_))), "{gone:?}");
    }
}
