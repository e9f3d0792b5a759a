//! A disk that is served, and a plain client of it.
#![allow(dead_code, reason = "each test uses its part")]

pub mod breaking;
pub mod exported;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use holdfast_volume::{DiskSpec, Export, Fence, Server};

pub const SIZE: u64 = 16 << 20;

/// A fence that a test opens and closes.
#[derive(Default)]
pub struct Gate(pub AtomicBool);

impl Fence for Gate {
    fn may_write(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

pub struct Served {
    pub dir: tempfile::TempDir,
    pub server: Server,
    pub gate: Arc<Gate>,
}

impl Served {
    /// A sparse disk of [`SIZE`] bytes, served by so many threads as number 1.
    pub fn new(threads: usize, read_only: bool) -> Served {
        // Beside the program, because /tmp may be of a kind that has no direct I/O.
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        File::create(dir.path().join("disk")).unwrap().set_len(SIZE).unwrap();
        let gate = Arc::new(Gate(AtomicBool::new(true)));
        let server = Server::start(threads).unwrap();
        let spec = DiskSpec { name: "disk".into(), path: dir.path().join("disk"), read_only };
        let export = Export::open(&spec, gate.clone()).unwrap();
        server.serve(1, UnixListener::bind(dir.path().join("socket")).unwrap(), export);
        Served { dir, server, gate }
    }

    pub fn disk(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    pub fn url(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.socket().display())
    }

    pub fn client(&self) -> Client {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        assert_eq!(Client::shake_hands(&mut stream), SIZE);
        Client { stream }
    }
}

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const ZERO: u16 = 6;

/// Speaks the protocol with simple answers.
pub struct Client {
    pub stream: UnixStream,
}

impl Client {
    pub fn connect(mut stream: UnixStream) -> Client {
        Client::shake_hands(&mut stream);
        Client { stream }
    }

    /// Says how large the disk is.
    pub fn shake_hands(stream: &mut UnixStream) -> u64 {
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        let mut hello = 3_u32.to_be_bytes().to_vec();
        hello.extend(b"IHAVEOPT");
        hello.extend(1_u32.to_be_bytes());
        hello.extend(0_u32.to_be_bytes());
        stream.write_all(&hello).unwrap();
        let mut export = [0; 10];
        stream.read_exact(&mut export).unwrap();
        u64::from_be_bytes(export[..8].try_into().unwrap())
    }

    pub fn ask(&mut self, kind: u16, cookie: u64, offset: u64, length: u32, data: &[u8]) {
        self.ask_flagged(0, kind, cookie, offset, length, data);
    }

    pub fn ask_flagged(&mut self, flags: u16, kind: u16, cookie: u64, offset: u64, length: u32, data: &[u8]) {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.extend(data);
        self.stream.write_all(&bytes).unwrap();
    }

    /// The next answer: its cookie and error.
    pub fn answer(&mut self) -> (u64, u32) {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head).unwrap();
        assert_eq!(head[..4], 0x6744_6698_u32.to_be_bytes());
        (u64::from_be_bytes(head[8..].try_into().unwrap()), u32::from_be_bytes(head[4..8].try_into().unwrap()))
    }

    pub fn read(&mut self, offset: u64, length: u32) -> Vec<u8> {
        self.ask(READ, 9, offset, length, &[]);
        assert_eq!(self.answer(), (9, 0));
        self.payload(length)
    }

    /// The data of a read that was answered.
    pub fn payload(&mut self, length: u32) -> Vec<u8> {
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data).unwrap();
        data
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.ask(WRITE, 8, offset, data.len() as u32, data);
        assert_eq!(self.answer(), (8, 0));
    }
}

/// Runs a program that has to succeed, and returns all that it wrote.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text}");
    text
}
