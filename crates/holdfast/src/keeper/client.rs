//! The agent's connection to its keeper.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::protocol::{Call, Event, LONGEST_LINE, Refusal, Reply, Request, ToClient};

/// Events that may wait to be read; with more the connection ends, and whoever
/// reads so slowly has to list again.
const EVENTS: usize = 1_024;

/// Why a call has no reply.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no keeper.
    #[error("cannot reach the keeper at {path}: {source}: is it running, and as this user?")]
    Connect {
        /// Its socket.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// It took too long; what was asked for may still happen.
    #[error("the keeper did not answer within {0:?}: what was asked for may still happen")]
    Deadline(Duration),
    /// The keeper or this end closed the connection; what was asked for may have happened.
    #[error("the connection to the keeper ended: what was asked for may have happened")]
    Closed,
    /// The request is too long to be sent.
    #[error("the request has {bytes} bytes: at most {LONGEST_LINE} can be sent to the keeper")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// The keeper said no.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

type Askers = HashMap<u64, oneshot::Sender<Result<Reply, Refusal>>>;

/// `None` once the connection has ended.
type Waiting = Arc<Mutex<Option<Askers>>>;

/// A connection to the keeper. It does not come back by itself: when it ends, the
/// event stream ends, and whoever owns both connects and lists again.
pub struct KeeperClient {
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    waiting: Waiting,
    next: AtomicU64,
    reader: JoinHandle<()>,
}

impl KeeperClient {
    /// Connects to the keeper's socket. Events come after [`Request::Subscribe`].
    pub async fn connect(
        path: &Path,
        deadline: Duration,
    ) -> Result<(KeeperClient, mpsc::Receiver<Event>), ClientError> {
        let stream = tokio::time::timeout(deadline, UnixStream::connect(path))
            .await
            .map_err(|_| ClientError::Deadline(deadline))?
            .map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        let (read, write) = stream.into_split();
        let (events, received) = mpsc::channel(EVENTS);
        let waiting = Waiting::new(Mutex::new(Some(HashMap::new())));
        let reader = tokio::spawn({
            let connection = Connection(waiting.clone());
            async move { read_all(read, &connection.0, &events).await }
        });
        let client = KeeperClient { writer: tokio::sync::Mutex::new(write), waiting, next: AtomicU64::new(1), reader };
        Ok((client, received))
    }

    /// Asks, and waits for the reply at most `deadline`.
    pub async fn call(&self, request: Request, deadline: Duration) -> Result<Reply, ClientError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut line = serde_json::to_vec(&Call { id, request }).map_err(|_| ClientError::Closed)?;
        line.push(b'\n');
        if line.len() > LONGEST_LINE {
            return Err(ClientError::TooLong { bytes: line.len() });
        }
        let (answer, answered) = oneshot::channel();
        match &mut *self.waiting() {
            Some(waiting) => waiting.insert(id, answer),
            None => return Err(ClientError::Closed),
        };
        let outcome = tokio::time::timeout(deadline, async {
            self.write(line).await?;
            answered.await.map_err(|_| ClientError::Closed)
        })
        .await;
        if let Some(waiting) = &mut *self.waiting() {
            waiting.remove(&id);
        }
        Ok(outcome.map_err(|_| ClientError::Deadline(deadline))???)
    }

    async fn write(&self, line: Vec<u8>) -> Result<(), ClientError> {
        let mut writer = self.writer.lock().await;
        let mut cut = HangUp { reader: &self.reader, armed: true };
        writer.write_all(&line).await.map_err(|_| ClientError::Closed)?;
        cut.armed = false;
        Ok(())
    }

    fn waiting(&self) -> MutexGuard<'_, Option<Askers>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for KeeperClient {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// A line that was cut short by a deadline cannot be taken back: the stream is no
/// use any more, and its reader has to end so that everybody notices.
struct HangUp<'a> {
    reader: &'a JoinHandle<()>,
    armed: bool,
}

impl Drop for HangUp<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.reader.abort();
        }
    }
}

/// Lives as long as the reader: everybody who waits learns when it is over.
struct Connection(Waiting);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

async fn read_all(read: OwnedReadHalf, waiting: &Waiting, events: &mpsc::Sender<Event>) {
    let mut reader = BufReader::new(read);
    let mut line = Vec::new();
    // The keeper's own limit on what it queues is above any list that it can send.
    let limit = 4 * LONGEST_LINE as u64;
    loop {
        line.clear();
        match (&mut reader).take(limit).read_until(b'\n', &mut line).await {
            Ok(1..) if line.ends_with(b"\n") => {}
            _ => return,
        }
        match serde_json::from_slice(&line) {
            Ok(ToClient::Reply { id, result }) => {
                let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
                let asker = waiting.as_mut().and_then(|waiting| waiting.remove(&id));
                if let Some(asker) = asker {
                    // Nobody there: its deadline has passed.
                    let _ = asker.send(result);
                }
            }
            Ok(ToClient::Event(event)) => {
                if events.try_send(event).is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::error!(%error, "the keeper said something that this agent does not understand");
                return;
            }
        }
    }
}
