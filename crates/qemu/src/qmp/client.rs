//! The connection itself.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, oneshot};
use tokio::time::{Instant, sleep, timeout_at};

use super::{Event, Stamp};
use crate::QemuError;

/// How many events a slow subscriber may fall behind before it is told so.
const EVENT_QUEUE: usize = 256;

/// How many commands may wait for an answer at once.
const PENDING_MAX: usize = 64;

/// The longest message that is taken from QEMU, in bytes. The longest one that
/// Holdfast asks for (`query-blockstats` of many disks) has some 100 KiB.
const MESSAGE_MAX: usize = 8 << 20;

/// How long a socket may refuse connections before QEMU counts as gone. QEMU
/// binds and listens within microseconds; a socket that refuses for longer is
/// one that a dead QEMU left behind.
const REFUSED_MAX: Duration = Duration::from_millis(200);

/// A connection to the monitor of one QEMU.
///
/// Cheap to clone; the connection closes with the last clone. A QMP socket
/// serves one client at a time.
#[derive(Clone, Debug)]
pub struct Qmp {
    shared: Arc<Shared>,
    version: (u32, u32, u32),
}

#[derive(Debug)]
struct Shared {
    socket: PathBuf,
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    pending: Mutex<Pending>,
    events: broadcast::Sender<Event>,
    next_id: AtomicU64,
    reader: tokio::task::AbortHandle,
}

type Answer = Result<Value, (String, String)>;

#[derive(Debug, Default)]
struct Pending {
    /// Why nothing can be asked any more.
    closed: Option<Closed>,
    waiting: HashMap<u64, oneshot::Sender<Answer>>,
}

#[derive(Clone, Debug)]
enum Closed {
    /// QEMU closed the socket.
    Gone,
    /// A command was not answered in time.
    Hung,
    /// QEMU sent something that is not QMP.
    Protocol(String),
}

/// A message from QEMU. Unknown fields are ignored.
#[derive(Deserialize)]
struct Message {
    id: Option<u64>,
    #[serde(rename = "return")]
    result: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    data: Option<Value>,
    #[serde(default)]
    timestamp: Stamp,
}

#[derive(Deserialize)]
struct Refusal {
    class: String,
    desc: String,
}

#[derive(Deserialize)]
struct Greeting {
    #[serde(rename = "QMP")]
    qmp: GreetingBody,
}

#[derive(Deserialize)]
struct GreetingBody {
    version: Versions,
}

#[derive(Deserialize)]
struct Versions {
    qemu: Triple,
}

#[derive(Deserialize)]
struct Triple {
    major: u32,
    minor: u32,
    micro: u32,
}

impl Qmp {
    /// Connects to the monitor that listens on `socket` and negotiates.
    ///
    /// Waits for a socket that is not there yet, so it may be called right after
    /// QEMU was started; give an adopted QEMU a short `deadline`.
    ///
    /// # Errors
    /// [`QemuError::Gone`] when nobody listens there, [`QemuError::Timeout`]
    /// when QEMU does not greet (it hangs, or another client holds the monitor).
    pub async fn connect(socket: &Path, deadline: Duration) -> Result<Qmp, QemuError> {
        let until = Instant::now() + deadline;
        let hung = || QemuError::Timeout { socket: socket.to_owned(), command: "the greeting", after: deadline };
        let stream = open(socket, until).await?;
        let (read, write) = stream.into_split();
        let mut read = BufReader::new(read);
        let greeting = timeout_at(until, message(&mut read))
            .await
            .map_err(|_| hung())?
            .map_err(|closed| closed.error(socket, "the greeting", deadline))?;
        let greeting: Greeting = serde_json::from_slice(&greeting).map_err(|error| QemuError::Protocol {
            socket: socket.to_owned(),
            what: format!("its greeting is unreadable ({error})"),
        })?;
        let Triple { major, minor, micro } = greeting.qmp.version.qemu;

        let (events, _) = broadcast::channel(EVENT_QUEUE);
        let shared = Arc::new_cyclic(|weak: &std::sync::Weak<Shared>| {
            let weak = weak.clone();
            let reader = tokio::spawn(async move { read_all(read, weak).await });
            Shared {
                socket: socket.to_owned(),
                writer: tokio::sync::Mutex::new(write),
                pending: Mutex::default(),
                events,
                next_id: AtomicU64::new(1),
                reader: reader.abort_handle(),
            }
        });
        let qmp = Qmp { shared, version: (major, minor, micro) };
        let left = until.saturating_duration_since(Instant::now());
        let _: Value = qmp.execute("qmp_capabilities", json!({}), left).await?;
        Ok(qmp)
    }

    /// QEMU's version: major, minor, micro.
    pub fn version(&self) -> (u32, u32, u32) {
        self.version
    }

    /// The socket that this connection was made to.
    pub fn socket(&self) -> &Path {
        &self.shared.socket
    }

    /// What QEMU reports from now on. The queue is bounded: a receiver that gets
    /// `RecvError::Lagged` has missed events and must ask for the state again;
    /// `RecvError::Closed` does not come while this `Qmp` lives, so watch
    /// [`Qmp::closed`] or [`Event::Closed`], which is always the last event.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.shared.events.subscribe()
    }

    /// Whether the connection has ended (QEMU gone, hung, or not speaking QMP).
    pub fn closed(&self) -> bool {
        self.shared.lock().closed.is_some()
    }

    /// Sends one command and waits for its answer.
    pub(crate) async fn execute<T: DeserializeOwned>(
        &self,
        command: &'static str,
        arguments: Value,
        deadline: Duration,
    ) -> Result<T, QemuError> {
        let shared = &self.shared;
        let until = Instant::now() + deadline;
        let id = shared.next_id.fetch_add(1, Ordering::Relaxed);
        let fail = |closed: &Closed| closed.error(&shared.socket, command, deadline);

        let (sender, answer) = oneshot::channel();
        {
            let mut pending = shared.lock();
            if let Some(closed) = &pending.closed {
                return Err(fail(closed));
            }
            if pending.waiting.len() >= PENDING_MAX {
                return Err(QemuError::Refused {
                    command,
                    class: "Busy".into(),
                    desc: format!("{PENDING_MAX} commands already wait for QEMU's answers"),
                });
            }
            pending.waiting.insert(id, sender);
        }
        // A caller that is cancelled in the middle of a write would leave half a
        // command on the wire; the guard breaks the connection in that case.
        let guard = Abandoned { shared, id };
        let mut message = Map::new();
        message.insert("execute".into(), command.into());
        message.insert("id".into(), id.into());
        if arguments.as_object().is_some_and(|map| !map.is_empty()) {
            message.insert("arguments".into(), arguments);
        }
        let mut line = Value::Object(message).to_string();
        line.push('\n');

        let sent = timeout_at(until, async {
            let mut writer = shared.writer.lock().await;
            let half = HalfWritten(Some(shared));
            let result = writer.write_all(line.as_bytes()).await;
            half.whole();
            result
        })
        .await;
        let answer = match sent {
            Ok(Ok(())) => timeout_at(until, answer).await,
            // The reader finds the closed socket too and says why; until then
            // a failed write means the same.
            Ok(Err(_)) => {
                shared.close(Closed::Gone);
                return Err(fail(&Closed::Gone));
            }
            Err(elapsed) => Err(elapsed),
        };
        drop(guard);
        let value = match answer {
            Ok(Ok(Ok(value))) => value,
            Ok(Ok(Err((class, desc)))) => {
                return Err(QemuError::Refused { command, class, desc });
            }
            Ok(Err(_)) => {
                let closed = shared.lock().closed.clone().unwrap_or(Closed::Gone);
                return Err(fail(&closed));
            }
            Err(_) => {
                shared.close(Closed::Hung);
                return Err(fail(&Closed::Hung));
            }
        };
        serde_json::from_value(value).map_err(|error| QemuError::Protocol {
            socket: shared.socket.clone(),
            what: format!("its answer to {command} is unreadable ({error})"),
        })
    }
}

/// Forgets a command whose caller no longer waits.
struct Abandoned<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Abandoned<'_> {
    fn drop(&mut self) {
        self.shared.lock().waiting.remove(&self.id);
    }
}

/// Breaks the connection when a write is dropped half way.
struct HalfWritten<'a>(Option<&'a Shared>);

impl HalfWritten<'_> {
    fn whole(mut self) {
        self.0 = None;
    }
}

impl Drop for HalfWritten<'_> {
    fn drop(&mut self) {
        if let Some(shared) = self.0 {
            shared.close(Closed::Hung);
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the connection for everybody; the first reason stays.
    fn close(&self, why: Closed) {
        let waiting = {
            let mut pending = self.lock();
            if pending.closed.is_some() {
                return;
            }
            pending.closed = Some(why);
            std::mem::take(&mut pending.waiting)
        };
        drop(waiting);
        self.reader.abort();
        // Nobody listening is no error.
        let _ = self.events.send(Event::Closed);
    }

    fn dispatch(&self, message: Message) {
        if let Some(name) = message.event {
            let event = Event::decode(name, message.data.unwrap_or(Value::Null), message.timestamp);
            let _ = self.events.send(event);
            return;
        }
        let Some(id) = message.id else {
            // QEMU answers a command that it cannot even parse without an id.
            tracing::warn!(socket = %self.socket.display(), "a QMP answer without an id");
            return;
        };
        let answer = match (message.result, message.error) {
            (_, Some(Refusal { class, desc })) => Err((class, desc)),
            (result, None) => Ok(result.unwrap_or(Value::Null)),
        };
        if let Some(waiting) = self.lock().waiting.remove(&id) {
            let _ = waiting.send(answer);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Closed {
    fn error(&self, socket: &Path, command: &'static str, after: Duration) -> QemuError {
        let socket = socket.to_owned();
        match self {
            Closed::Gone => QemuError::Gone { socket },
            Closed::Hung => QemuError::Timeout { socket, command, after },
            Closed::Protocol(what) => QemuError::Protocol { socket, what: what.clone() },
        }
    }
}

async fn open(socket: &Path, until: Instant) -> Result<UnixStream, QemuError> {
    let mut pause = Duration::from_millis(1);
    let mut refused_since = None;
    loop {
        let error = match timeout_at(until, UnixStream::connect(socket)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => error,
            Err(_) => std::io::Error::from(ErrorKind::TimedOut),
        };
        let now = Instant::now();
        let gone = match error.kind() {
            ErrorKind::NotFound => false,
            // A full backlog of a QEMU that hangs, or is just busy.
            ErrorKind::WouldBlock | ErrorKind::TimedOut => false,
            ErrorKind::ConnectionRefused => now - *refused_since.get_or_insert(now) >= REFUSED_MAX,
            _ => {
                let doing = format!("cannot connect to {}", socket.display());
                return Err(QemuError::io(doing)(error));
            }
        };
        if gone || now + pause >= until {
            return Err(QemuError::Gone { socket: socket.to_owned() });
        }
        sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(16));
    }
}

/// Reads one line, without its end.
async fn message<R: AsyncRead + Unpin>(read: &mut BufReader<R>) -> Result<Vec<u8>, Closed> {
    let mut line = Vec::new();
    loop {
        // A reset means what an end means: QEMU is not there any more.
        let chunk = read.fill_buf().await.map_err(|_| Closed::Gone)?;
        if chunk.is_empty() {
            return Err(Closed::Gone);
        }
        match chunk.iter().position(|byte| *byte == b'\n') {
            Some(end) => {
                line.extend_from_slice(&chunk[..end]);
                read.consume(end + 1);
                return Ok(line);
            }
            None => {
                line.extend_from_slice(chunk);
                let length = chunk.len();
                read.consume(length);
            }
        }
        if line.len() > MESSAGE_MAX {
            return Err(Closed::Protocol(format!("a message of more than {MESSAGE_MAX} bytes")));
        }
    }
}

async fn read_all(mut read: BufReader<OwnedReadHalf>, shared: std::sync::Weak<Shared>) {
    loop {
        let line = message(&mut read).await;
        let Some(shared) = shared.upgrade() else {
            return;
        };
        let line = match line {
            Ok(line) => line,
            Err(closed) => return shared.close(closed),
        };
        match serde_json::from_slice::<Message>(&line) {
            Ok(message) => shared.dispatch(message),
            Err(error) => {
                return shared.close(Closed::Protocol(format!("an unreadable message ({error})")));
            }
        }
    }
}
