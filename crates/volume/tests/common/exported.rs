//! A file that a server of QEMU's exports: a LUN that several hosts may reach.

use std::fs::File;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// The name under which it is exported.
pub const NAME: &str = "lun";
/// A server that does not answer after so long is none.
const START_WITHIN: Duration = Duration::from_secs(60);

/// Where a server listens.
enum Listens {
    At(PathBuf),
    On(u16),
}

/// A server, until it is dropped.
pub struct Exported {
    file: PathBuf,
    listens: Listens,
    args: Vec<String>,
    server: Child,
}

impl Exported {
    /// `qemu-nbd` on a unix socket beside the file.
    pub fn at_socket(file: &Path, args: &[&str]) -> Exported {
        Exported::start(file, Listens::At(file.with_extension("nbd")), args)
    }

    /// `qemu-nbd` on a port of this host.
    pub fn on_port(file: &Path, args: &[&str]) -> Exported {
        Exported::start(file, Listens::On(holdfast_lab::free_port().unwrap()), args)
    }

    fn start(file: &Path, listens: Listens, args: &[&str]) -> Exported {
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        let server = spawn(file, &listens, &args);
        let mut exported = Exported { file: file.into(), listens, args, server };
        exported.wait();
        exported
    }

    /// Its address as a LUN.
    pub fn address(&self) -> PathBuf {
        match &self.listens {
            Listens::At(socket) => format!("nbd+unix:///{NAME}?socket={}", socket.display()).into(),
            Listens::On(port) => format!("nbd://127.0.0.1:{port}/{NAME}").into(),
        }
    }

    /// Kills the server.
    pub fn kill(&mut self) {
        self.server.kill().unwrap();
        self.server.wait().unwrap();
    }

    /// Starts it again.
    pub fn restart(&mut self) {
        self.server = spawn(&self.file, &self.listens, &self.args);
        self.wait();
    }

    fn wait(&mut self) {
        let until = Instant::now() + START_WITHIN;
        let answers = |listens: &Listens| match listens {
            Listens::At(socket) => UnixStream::connect(socket).is_ok(),
            Listens::On(port) => TcpStream::connect(("127.0.0.1", *port)).is_ok(),
        };
        while !answers(&self.listens) {
            assert!(self.server.try_wait().unwrap().is_none(), "the server ended");
            assert!(Instant::now() < until, "the server does not listen");
            std::thread::yield_now();
        }
    }
}

impl Drop for Exported {
    fn drop(&mut self) {
        self.kill();
    }
}

fn spawn(file: &Path, listens: &Listens, args: &[String]) -> Child {
    let mut command = Command::new("qemu-nbd");
    command.args(["--format=raw", "--persistent", "--cache=none", "--aio=native", "--discard=unmap", "-x", NAME]);
    match listens {
        Listens::At(socket) => {
            // One that is there would be a server's that was killed.
            let _ = std::fs::remove_file(socket);
            command.arg(format!("--socket={}", socket.display()))
        }
        Listens::On(port) => command.args(["--bind=127.0.0.1", &format!("--port={port}")]),
    };
    command.args(args).arg(file).spawn().unwrap()
}

/// An empty file of so many bytes in a directory.
pub fn empty(dir: &Path, bytes: u64) -> PathBuf {
    let path = dir.join("lun");
    File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}
