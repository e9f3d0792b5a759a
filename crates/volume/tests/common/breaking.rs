//! Storage in memory with several doors, each a real NBD server that works, fails or
//! hangs as the test says, and a record of the order in which writes reached the memory.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use holdfast_volume::nbd::{Command, HEADER_BYTES, Handshake, Offer, Request, Step};

/// How a door treats requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It does them.
    Works,
    /// It says that they failed.
    Fails,
    /// It keeps them until that changes.
    Hangs,
}

struct Inside {
    bytes: Vec<u8>,
    modes: Vec<Mode>,
    /// Offset and first eight bytes of each write, in the order of their arrival.
    log: Vec<(u64, u64)>,
    /// Requests that a door keeps.
    kept: usize,
    /// No door reads or writes this byte.
    spoilt: Option<u64>,
}

/// The storage.
#[derive(Clone)]
pub struct Breaking(Arc<(Mutex<Inside>, Condvar)>);

impl Breaking {
    pub fn new(bytes: u64, doors: usize) -> Breaking {
        let inside = Inside {
            bytes: vec![0; bytes as usize],
            modes: vec![Mode::Works; doors],
            log: Vec::new(),
            kept: 0,
            spoilt: None,
        };
        Breaking(Arc::new((Mutex::new(inside), Condvar::new())))
    }

    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.0.0.lock().unwrap()
    }

    pub fn set(&self, door: usize, mode: Mode) {
        self.inside().modes[door] = mode;
        self.0.1.notify_all();
    }

    /// From now on nobody can read or write what is around a byte.
    pub fn spoil(&self, byte: u64) {
        self.inside().spoilt = Some(byte);
    }

    pub fn log(&self) -> Vec<(u64, u64)> {
        self.inside().log.clone()
    }

    pub fn read(&self, at: u64, length: usize) -> Vec<u8> {
        self.inside().bytes[at as usize..][..length].to_vec()
    }

    /// Waits until doors keep so many requests.
    pub fn wait_kept(&self, count: usize) {
        drop(self.0.1.wait_while(self.inside(), |inside| inside.kept < count).unwrap());
    }

    /// Opens a door at a socket in a directory; says its address as a LUN.
    pub fn open(&self, door: usize, dir: &Path) -> PathBuf {
        let socket = dir.join(format!("door-{door}"));
        let listener = UnixListener::bind(&socket).unwrap();
        let storage = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let storage = storage.clone();
                std::thread::spawn(move || drop(storage.serve(door, stream)));
            }
        });
        format!("nbd+unix:///lun?socket={}", socket.display()).into()
    }

    fn serve(&self, door: usize, mut stream: UnixStream) -> io::Result<()> {
        let size = self.inside().bytes.len() as u64;
        let offer = Offer { name: "lun".into(), size, read_only: false, block: 512, preferred: 4096 };
        let mut out = Vec::new();
        let mut handshake = Handshake::begin(&mut out);
        let mut input = Vec::new();
        loop {
            stream.write_all(&std::mem::take(&mut out))?;
            let (used, step) = handshake.take(&offer, &input, &mut out);
            input.drain(..used);
            match step {
                Step::Transmit(_) => break,
                Step::Close => return Ok(()),
                Step::More => {}
            }
            let mut some = [0; 512];
            let count = stream.read(&mut some)?;
            if count == 0 {
                return Ok(());
            }
            input.extend(&some[..count]);
        }
        stream.write_all(&out)?;
        loop {
            let mut header = [0; HEADER_BYTES];
            stream.read_exact(&mut header)?;
            let request = Request::parse(&header).ok_or(io::ErrorKind::InvalidData)?;
            let mut data = vec![0; request.payload() as usize];
            stream.read_exact(&mut data)?;
            let (error, data) = self.request(door, &request, &data);
            let mut reply = 0x6744_6698_u32.to_be_bytes().to_vec();
            reply.extend(error.to_be_bytes());
            reply.extend(request.cookie.to_be_bytes());
            reply.extend(data);
            stream.write_all(&reply)?;
        }
    }

    fn request(&self, door: usize, request: &Request, data: &[u8]) -> (u32, Vec<u8>) {
        let mut inside = self.inside();
        if inside.modes[door] == Mode::Hangs {
            inside.kept += 1;
            self.0.1.notify_all();
            inside = self.0.1.wait_while(inside, |inside| inside.modes[door] == Mode::Hangs).unwrap();
            inside.kept -= 1;
        }
        let (from, end) = (request.offset, request.offset + u64::from(request.length));
        let spoilt = inside.spoilt.is_some_and(|byte| (from..end).contains(&byte));
        if inside.modes[door] == Mode::Fails || spoilt {
            return (5, Vec::new());
        }
        let (at, length) = (request.offset as usize, request.length as usize);
        match request.command {
            Command::Read => return (0, inside.bytes[at..at + length].to_vec()),
            Command::Write { .. } => {
                inside.bytes[at..at + length].copy_from_slice(data);
                let first = u64::from_be_bytes(data[..8].try_into().unwrap());
                inside.log.push((request.offset, first));
            }
            Command::Zero { .. } => inside.bytes[at..at + length].fill(0),
            _ => {}
        }
        (0, Vec::new())
    }
}
