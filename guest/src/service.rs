//! The counter service.
//!
//! ```text
//! UDP thread ────────────┐ write            ┌─ replies to UDP clients
//! a thread per TCP client ├──► bounded queue ──► disk thread ─┤
//! writer (hf.writer)     ┘                  └─ answers the waiting thread
//! ```
//!
//! Pings are answered by the UDP thread alone, so they measure the network and the machine, never
//! the disk. The disk thread takes what has queued up, writes it, flushes once, then acknowledges.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::command::{Command, HELP};
use crate::disk::{DiskError, RecordDisk};
use crate::load::Load;
use crate::sys::{self, Power};
use crate::wire::{Kind, Outcome, Reply, Request};

const QUEUED_WRITES: usize = 256;
const BATCH: usize = 64;
const CONNECTIONS: usize = 64;
const LINE_BYTES: u64 = 256;
const STACK_BYTES: usize = 128 << 10;
const MAX_WRITER_PER_S: u32 = 100_000;
/// How long a text `write` waits for the disk. Longer than a volume's longest accepted pause.
const WRITE_DEADLINE: Duration = Duration::from_secs(120);
/// How long a peer may refuse to take an answer before its connection is given up.
const SEND_DEADLINE: Duration = Duration::from_secs(60);
/// How long a peer may take to hear that the machine ends.
const FAREWELL: Duration = Duration::from_secs(1);
const KEEP_ALIVE: Duration = Duration::from_secs(60);

/// Who hears how a write ended.
#[derive(Debug)]
enum Waiter {
    Datagram { socket: Arc<UdpSocket>, client: SocketAddr, sequence: u64 },
    Thread(SyncSender<Result<u64, Outcome>>),
}

#[derive(Debug)]
enum DiskRequest {
    Append(Waiter),
    Close(SyncSender<()>),
}

/// The guest as its clients see it.
#[derive(Debug)]
pub struct Guest {
    boot_id: u64,
    disk: SyncSender<DiskRequest>,
    disk_state: Mutex<String>,
    last: AtomicU64,
    epoch: AtomicU64,
    disk_errors: AtomicU32,
    load: Load,
    writer: Mutex<Option<(u32, Arc<AtomicBool>)>>,
    connections: AtomicUsize,
    power: SyncSender<Power>,
}

/// The disk thread's end of the queue.
#[derive(Debug)]
pub struct DiskQueue {
    requests: Receiver<DiskRequest>,
}

impl Guest {
    /// A guest without a disk yet: writes queue up until [`DiskQueue::run`] takes them. What clients
    /// ask of the machine's power goes to `power`.
    pub fn new(boot_id: u64, power: SyncSender<Power>) -> (Arc<Self>, DiskQueue) {
        let (disk, requests) = sync_channel(QUEUED_WRITES);
        let guest = Guest {
            boot_id,
            disk,
            disk_state: Mutex::new("opening".to_owned()),
            last: AtomicU64::new(0),
            epoch: AtomicU64::new(0),
            disk_errors: AtomicU32::new(0),
            load: Load::default(),
            writer: Mutex::new(None),
            connections: AtomicUsize::new(0),
            power,
        };
        (Arc::new(guest), DiskQueue { requests })
    }

    /// Answers datagrams for ever, on a thread of its own.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn serve_udp(self: &Arc<Self>, socket: UdpSocket) -> io::Result<()> {
        let (guest, socket) = (Arc::clone(self), Arc::new(socket));
        spawn("udp", move || {
            let mut bytes = [0; 64];
            loop {
                let Ok((length, client)) = socket.recv_from(&mut bytes) else {
                    continue;
                };
                let Ok(request) = Request::decode(&bytes[..length]) else {
                    continue;
                };
                if let Some(reply) = guest.answer(request, &socket, client) {
                    // A lost reply is the network's business; the client counts it.
                    let _ = socket.send_to(&reply.encode(), client);
                }
            }
        })
    }

    /// Accepts connections for ever, on a thread of its own, and answers each on another.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn serve_tcp(self: &Arc<Self>, listener: TcpListener) -> io::Result<()> {
        let guest = Arc::clone(self);
        spawn("tcp", move || {
            loop {
                let Ok((mut stream, _)) = listener.accept() else {
                    // Out of descriptors or memory: give the connections time to end.
                    thread::sleep(Duration::from_millis(100));
                    continue;
                };
                if guest.connections.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS {
                    guest.connections.fetch_sub(1, Ordering::Relaxed);
                    let _ = stream.write_all(b"error too many connections: close one\n");
                    continue;
                }
                let connection = Arc::clone(&guest);
                let started = spawn("connection", move || {
                    // The peer is gone or broke the protocol; either way the connection is over.
                    let _ = connection.converse(&stream);
                    connection.connections.fetch_sub(1, Ordering::Relaxed);
                });
                if started.is_err() {
                    guest.connections.fetch_sub(1, Ordering::Relaxed);
                }
            }
        })
    }

    /// Does what a command says. The second value is what the machine is to do once the answer was
    /// given.
    pub fn execute(self: &Arc<Self>, command: &Command) -> (String, Option<Power>) {
        let done = |result: Result<(), String>| match result {
            Ok(()) => "ok".to_owned(),
            Err(text) => format!("error {text}"),
        };
        let text = match command {
            Command::Ping(n) => {
                format!("pong {n} uptime_ms={} boot_id={:016x}", sys::uptime().as_millis(), self.boot_id)
            }
            Command::Write => match self.write_and_wait() {
                Ok(sequence) => format!("written {sequence} durable boot_id={:016x}", self.boot_id),
                Err(Outcome::NoDisk) => format!("error no record disk: {}", self.disk_state()),
                Err(Outcome::Busy) => "error too many writes wait: try again".to_owned(),
                Err(_) => "error the disk failed or gave no answer: the record may be there or not".to_owned(),
            },
            Command::Status => self.status(),
            Command::Echo(text) => text.clone(),
            Command::Dirty(rate, size) => done(self.load.dirty(*rate, *size).map_err(|error| error.to_string())),
            Command::StopDirty => {
                self.load.stop_dirty();
                done(Ok(()))
            }
            Command::Fill(size) => done(self.load.fill(*size).map_err(|error| error.to_string())),
            Command::Writer(rate) => done(self.set_writer(*rate)),
            Command::Idle => {
                self.load.stop_dirty();
                done(self.set_writer(None))
            }
            Command::Power(power) => return ("ok".to_owned(), Some(*power)),
            Command::Help => HELP.to_owned(),
        };
        (text, None)
    }

    /// Asks for the machine to end. A request that is not first is dropped: the first one wins.
    pub fn request_power(&self, power: Power) {
        let _ = self.power.try_send(power);
    }

    /// Lets the writes that wait finish, then refuses further ones. False: not within `deadline`.
    pub fn close_disk(&self, deadline: Duration) -> bool {
        let until = Instant::now() + deadline;
        let (done, closed) = sync_channel(1);
        let mut request = DiskRequest::Close(done);
        loop {
            match self.disk.try_send(request) {
                Ok(()) => break,
                Err(TrySendError::Disconnected(_)) => return true,
                Err(TrySendError::Full(_)) if Instant::now() >= until => return false,
                Err(TrySendError::Full(back)) => request = back,
            }
            thread::sleep(Duration::from_millis(5));
        }
        closed.recv_timeout(until.saturating_duration_since(Instant::now())) != Err(RecvTimeoutError::Timeout)
    }

    /// Random, new at every boot.
    pub fn boot_id(&self) -> u64 {
        self.boot_id
    }

    /// The line that `status` answers with.
    pub fn status(&self) -> String {
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map_or(0, |(rate, _)| *rate);
        format!(
            "status last={} epoch={} boot_id={:016x} uptime_ms={} dirty_mb_s={} writer_per_s={writer} disk_errors={} disk={}",
            self.last.load(Ordering::Relaxed),
            self.epoch.load(Ordering::Relaxed),
            self.boot_id,
            sys::uptime().as_millis(),
            self.load.dirty_mb_s(),
            self.disk_errors.load(Ordering::Relaxed),
            self.disk_state(),
        )
    }

    fn answer(&self, request: Request, socket: &Arc<UdpSocket>, client: SocketAddr) -> Option<Reply> {
        if request.kind != Kind::Write {
            return Some(self.reply(request.kind, request.sequence, Ok(self.last.load(Ordering::Relaxed))));
        }
        let waiter = Waiter::Datagram { socket: Arc::clone(socket), client, sequence: request.sequence };
        let refused = self.enqueue(waiter).err()?;
        Some(self.reply(Kind::Write, request.sequence, Err(refused)))
    }

    fn reply(&self, kind: Kind, sequence: u64, result: Result<u64, Outcome>) -> Reply {
        Reply {
            kind,
            outcome: result.err().unwrap_or(Outcome::Done),
            durable: kind == Kind::Write && result.is_ok(),
            sequence,
            uptime_ms: u64::try_from(sys::uptime().as_millis()).unwrap_or(u64::MAX),
            boot_id: self.boot_id,
            record: result.unwrap_or(0),
            epoch: self.epoch.load(Ordering::Relaxed),
            dirty_mb_s: self.load.dirty_mb_s(),
            disk_errors: self.disk_errors.load(Ordering::Relaxed),
        }
    }

    fn enqueue(&self, waiter: Waiter) -> Result<(), Outcome> {
        self.disk.try_send(DiskRequest::Append(waiter)).map_err(|error| match error {
            TrySendError::Full(_) => Outcome::Busy,
            TrySendError::Disconnected(_) => Outcome::NoDisk,
        })
    }

    fn write_and_wait(&self) -> Result<u64, Outcome> {
        let (done, ended) = sync_channel(1);
        self.enqueue(Waiter::Thread(done))?;
        ended.recv_timeout(WRITE_DEADLINE).unwrap_or(Err(Outcome::DiskError))
    }

    fn disk_state(&self) -> String {
        self.disk_state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_disk_state(&self, state: String) {
        *self.disk_state.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    fn set_writer(self: &Arc<Self>, rate: Option<u32>) -> Result<(), String> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, stop)) = writer.take() {
            stop.store(true, Ordering::Relaxed);
        }
        let Some(rate) = rate else { return Ok(()) };
        if !(1..=MAX_WRITER_PER_S).contains(&rate) {
            return Err(format!("the rate must be 1 to {MAX_WRITER_PER_S} records per second"));
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (guest, stopped) = (Arc::clone(self), Arc::clone(&stop));
        spawn("writer", move || {
            let period = Duration::from_secs(1) / rate;
            let mut next = Instant::now();
            while !stopped.load(Ordering::Relaxed) {
                // A failed write is counted by the disk thread; the writer goes on, as a program would.
                let _ = guest.write_and_wait();
                next = (next + period).max(Instant::now());
                thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        })
        .map_err(|error| format!("cannot start the writer: {error}"))?;
        *writer = Some((rate, stop));
        Ok(())
    }

    fn converse(self: &Arc<Self>, stream: &TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(SEND_DEADLINE))?;
        sys::keep_alive(stream.as_fd(), KEEP_ALIVE)?;
        let mut reader = BufReader::with_capacity(LINE_BYTES as usize, stream);
        let mut writer = stream;
        let mut line = String::new();
        loop {
            line.clear();
            if reader.by_ref().take(LINE_BYTES).read_line(&mut line)? == 0 {
                return Ok(());
            }
            if !line.ends_with('\n') {
                writer.write_all(b"error the line is longer than 256 bytes or was cut off\n")?;
                return Ok(());
            }
            let (mut text, power) = match Command::parse(&line) {
                Ok(command) => self.execute(&command),
                Err(error) => (format!("error {error}"), None),
            };
            text.push('\n');
            let sent = writer.write_all(text.as_bytes());
            if let Some(power) = power {
                // What is written is not yet sent: a machine that ends at once may take the
                // answer with it. The client's end of the conversation shows that it has it.
                let _ = stream.shutdown(Shutdown::Write);
                let _ = stream.set_read_timeout(Some(FAREWELL));
                let _ = reader.by_ref().take(LINE_BYTES).read_until(b'\n', &mut Vec::new());
                self.request_power(power);
            }
            sent?;
        }
    }
}

impl DiskQueue {
    /// Serves the queue until the disk is closed, and refuses writes after that or when there is no
    /// disk. Runs on the calling thread and returns only when the guest is gone.
    pub fn run(self, guest: &Guest, disk: Result<RecordDisk, DiskError>) {
        let mut disk = match disk {
            Ok(disk) => {
                guest.last.store(disk.last(), Ordering::Relaxed);
                guest.epoch.store(disk.epoch(), Ordering::Relaxed);
                guest.set_disk_state("ok".to_owned());
                Some(disk)
            }
            Err(error) => {
                guest.set_disk_state(error.to_string());
                None
            }
        };
        while let Ok(first) = self.requests.recv() {
            let mut waiters = Vec::new();
            let mut closers = Vec::new();
            for request in std::iter::once(first).chain(self.requests.try_iter().take(BATCH - 1)) {
                match request {
                    DiskRequest::Append(waiter) => waiters.push(waiter),
                    DiskRequest::Close(closer) => closers.push(closer),
                }
            }
            append(guest, disk.as_mut(), waiters);
            if !closers.is_empty() {
                disk = None;
                guest.set_disk_state("closed for shutdown".to_owned());
            }
            for closer in closers {
                let _ = closer.send(());
            }
        }
    }
}

fn append(guest: &Guest, disk: Option<&mut RecordDisk>, waiters: Vec<Waiter>) {
    if waiters.is_empty() {
        return;
    }
    let first = match disk {
        None => Err(Outcome::NoDisk),
        Some(disk) => disk.append(waiters.len() as u64).map_err(|_| {
            guest.disk_errors.fetch_add(1, Ordering::Relaxed);
            Outcome::DiskError
        }),
    };
    if let Ok(first) = first {
        guest.last.store(first + waiters.len() as u64 - 1, Ordering::Relaxed);
    }
    for (index, waiter) in (0..).zip(waiters) {
        let result = first.map(|first| first + index);
        // Whoever waited may be gone by now; the record stays.
        match waiter {
            Waiter::Thread(waiting) => {
                let _ = waiting.try_send(result);
            }
            Waiter::Datagram { socket, client, sequence } => {
                let _ = socket.send_to(&guest.reply(Kind::Write, sequence, result).encode(), client);
            }
        }
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES).spawn(run).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::sync_channel;

    struct Served {
        guest: Arc<Guest>,
        udp: UdpSocket,
        tcp: BufReader<TcpStream>,
        power: Receiver<Power>,
    }

    /// The real service on loopback, with a file as its disk.
    fn serve(disk: Result<RecordDisk, DiskError>) -> Served {
        let (power, powered) = sync_channel(1);
        let (guest, queue) = Guest::new(0xabc, power);
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        udp.connect(socket.local_addr().unwrap()).unwrap();
        udp.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        guest.serve_udp(socket).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        guest.serve_tcp(listener).unwrap();
        let served = Arc::clone(&guest);
        thread::spawn(move || queue.run(&served, disk));
        Served { guest, udp, tcp: BufReader::new(stream), power: powered }
    }

    impl Served {
        fn ask(&self, kind: Kind, sequence: u64) -> Reply {
            self.udp.send(&Request { kind, sequence }.encode()).unwrap();
            let mut bytes = [0; 128];
            let length = self.udp.recv(&mut bytes).unwrap();
            Reply::decode(&bytes[..length]).unwrap()
        }

        fn say(&mut self, line: &str) -> String {
            writeln!(self.tcp.get_mut(), "{line}").unwrap();
            let mut answer = String::new();
            self.tcp.read_line(&mut answer).unwrap();
            answer.trim_end().to_owned()
        }
    }

    fn image() -> tempfile::NamedTempFile {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        image
    }

    #[test]
    fn datagrams_and_lines_share_one_sequence() {
        let image = image();
        let mut served = serve(RecordDisk::open(image.path(), 0xabc, false));
        let reply = served.ask(Kind::Write, 77);
        assert_eq!((reply.sequence, reply.outcome, reply.durable, reply.record), (77, Outcome::Done, true, 1));
        assert_eq!(served.say("write"), "written 2 durable boot_id=0000000000000abc");
        assert_eq!(served.ask(Kind::Write, 78).record, 3);
        let reply = served.ask(Kind::Status, 79);
        assert_eq!((reply.record, reply.boot_id, reply.epoch, reply.durable), (3, 0xabc, 1, false));
        assert!(served.say("ping 5").starts_with("pong 5 uptime_ms="));
        assert!(served.say("status").starts_with("status last=3 epoch=1 boot_id=0000000000000abc "));
        assert!(served.say("nonsense").starts_with("error cannot understand \"nonsense\""));
        let report = crate::verify::RecordsReport::read(image.path()).unwrap();
        assert_eq!((report.highest, report.present), (3, 3));
    }

    #[test]
    fn guest_without_a_disk_serves_and_refuses_writes() {
        let mut served = serve(RecordDisk::open("/nonexistent/disk".as_ref(), 1, false));
        assert_eq!(served.ask(Kind::Write, 1).outcome, Outcome::NoDisk);
        assert_eq!(served.ask(Kind::Ping, 2).outcome, Outcome::Done);
        assert!(served.say("write").starts_with("error no record disk: cannot use the record disk /nonexistent"));
    }

    #[test]
    fn writer_writes_by_itself_until_told_to_stop() {
        let image = image();
        let mut served = serve(RecordDisk::open(image.path(), 1, false));
        assert_eq!(served.say("writer on 0"), "error the rate must be 1 to 100000 records per second");
        assert_eq!(served.say("writer on 1000"), "ok");
        let until = Instant::now() + Duration::from_secs(10);
        while served.ask(Kind::Status, 0).record < 20 {
            assert!(Instant::now() < until, "the writer writes nothing");
        }
        assert_eq!(served.say("writer off"), "ok");
        assert!(served.say("status").contains(" writer_per_s=0 "));
    }

    #[test]
    fn closing_finishes_writes_and_refuses_later_ones() {
        let image = image();
        let mut served = serve(RecordDisk::open(image.path(), 1, false));
        assert_eq!(served.ask(Kind::Write, 1).record, 1);
        assert!(served.guest.close_disk(Duration::from_secs(10)));
        assert_eq!(served.say("write"), "error no record disk: closed for shutdown");
        assert_eq!(served.say("poweroff"), "ok");
        assert_eq!(served.power.recv_timeout(Duration::from_secs(10)), Ok(Power::Off));
    }

    #[test]
    fn overlong_line_ends_only_its_own_connection() {
        let mut served = serve(Err(DiskError::TooSmall { path: "x".into(), bytes: 0 }));
        assert!(served.say(&"x".repeat(300)).starts_with("error the line is longer"));
        assert_eq!(served.ask(Kind::Ping, 3).sequence, 3);
    }
}
