//! The server is killed in the middle of its work, and another one goes on from the
//! same listening socket.

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use common::*;

const MIB: u64 = 1 << 20;
const DISK: u64 = 64 * MIB;

/// A server process, and the listening socket that outlives it.
struct Process {
    dir: tempfile::TempDir,
    listener: UnixListener,
    what: Vec<String>,
    server: Child,
}

impl Process {
    fn of_a_file() -> Process {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let disk = dir.path().join("disk");
        File::create(&disk).unwrap().set_len(DISK).unwrap();
        Process::start(dir, &["file", disk.to_str().unwrap()])
    }

    fn of_a_lun() -> Process {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let lun = dir.path().join("lun");
        File::create(&lun).unwrap().set_len(DISK + 64 * MIB).unwrap();
        let made = Command::new(program()).arg("format").arg(&lun).args(["disk", &DISK.to_string()]).status();
        assert!(made.unwrap().success());
        Process::start(dir, &["lun", lun.to_str().unwrap(), "disk"])
    }

    fn start(dir: tempfile::TempDir, what: &[&str]) -> Process {
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let what: Vec<String> = what.iter().map(|arg| (*arg).to_owned()).collect();
        let server = spawn(&listener, &what);
        Process { dir, listener, what, server }
    }

    /// Kills it as the system would, and lets another take its place.
    fn replace(&mut self) {
        self.kill();
        self.server = spawn(&self.listener, &self.what);
    }

    fn kill(&mut self) {
        self.server.kill().unwrap();
        self.server.wait().unwrap();
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    fn client(&self) -> Client {
        Client::connect(UnixStream::connect(self.socket()).unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_serve-disks"))
}

fn spawn(listener: &UnixListener, what: &[String]) -> Child {
    let socket = Stdio::from(OwnedFd::from(listener.try_clone().unwrap()));
    Command::new(program()).arg("2").args(what).stdin(socket).spawn().unwrap()
}

/// Keeps 16 writes under way in random places, kills the server again and again, and
/// looks at what is there: what was flushed has to be, and nothing that nobody wrote.
fn what_was_flushed_is_there(mut process: Process) {
    const BLOCKS: u64 = DISK / 4096;
    let block = |round: u64, at: u64| [(round * 31 + at * 7) as u8 | 1; 4096];
    // By block: the rounds that may be found there, the first of them being flushed.
    let mut possible = vec![vec![0_u64]; BLOCKS as usize];
    let expected = |round: u64, at: u64| if round == 0 { [0; 4096] } else { block(round, at) };
    let mut seed = 1_u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        seed >> 33
    };
    for round in 1..=12 {
        let mut client = process.client();
        let mut answered = Vec::new();
        for batch in 0..8 {
            let mut sent = Vec::new();
            for cookie in 0..16 {
                let at = random() % BLOCKS;
                if sent.contains(&at) {
                    continue;
                }
                possible[at as usize].push(round);
                client.ask(WRITE, cookie, at * 4096, 4096, &block(round, at));
                sent.push(at);
            }
            if batch == 7 {
                // Killed with all of these under way.
                break;
            }
            for _ in &sent {
                assert_eq!(client.answer().1, 0);
            }
            answered.extend(sent);
            if batch == 5 {
                client.ask(FLUSH, 99, 0, 0, &[]);
                assert_eq!(client.answer(), (99, 0));
                for at in answered.drain(..) {
                    possible[at as usize] = vec![round];
                }
            }
        }
        process.replace();
        let mut client = process.client();
        for (at, rounds) in possible.iter_mut().enumerate().filter(|(_, rounds)| rounds.len() > 1 || rounds[0] == round)
        {
            let found = client.read(at as u64 * 4096, 4096);
            let is = rounds.iter().rev().find(|round| found == expected(**round, at as u64));
            *rounds = vec![*is.unwrap_or_else(|| panic!("block {at} holds none of rounds {rounds:?}"))];
        }
    }
}

#[test]
fn what_was_flushed_to_a_file_is_there_after_a_kill() {
    what_was_flushed_is_there(Process::of_a_file());
}

#[test]
fn what_was_flushed_to_a_lun_is_there_after_a_kill() {
    what_was_flushed_is_there(Process::of_a_lun());
}

/// QEMU's block layer with a command line.
struct Qemu {
    process: Child,
    input: ChildStdin,
    output: ChildStdout,
}

impl Qemu {
    fn start(socket: &Path) -> Qemu {
        let disk =
            format!("driver=nbd,server.type=unix,server.path={},export=disk,reconnect-delay=60", socket.display());
        let mut process = Command::new("qemu-io")
            .args(["--image-opts", &disk, "-t", "none"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        let mut qemu = Qemu { process, input, output };
        qemu.told();
        qemu
    }

    /// What it says until it asks for the next command. It takes one at a time.
    fn told(&mut self) -> String {
        const PROMPT: &[u8] = b"qemu-io> ";
        let mut told = Vec::new();
        while !told.ends_with(PROMPT) {
            let mut byte = [0];
            self.output.read_exact(&mut byte).unwrap();
            told.push(byte[0]);
        }
        let told = String::from_utf8(told).unwrap();
        assert!(!told.contains("rror") && !told.contains("failed"), "{told}");
        told
    }

    fn ask(&mut self, command: &str) -> String {
        writeln!(self.input, "{command}").unwrap();
        self.told()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// With 16 requests under way, as a VM may have: it connects again by itself and sends
/// again what was not answered.
fn qemu_does_not_notice(mut process: Process) {
    const ROUNDS: u64 = 12;
    const CHUNK: u64 = 256 << 10;
    let place = |round: u64, slot: u64| slot * (DISK / 16) + round * CHUNK;
    let value = |round: u64, slot: u64| 1 + round * 16 + slot;
    let mut qemu = Qemu::start(&process.socket());
    for round in 0..ROUNDS {
        let mut told = String::new();
        for slot in 0..16 {
            told += &qemu.ask(&format!("aio_write -P {} {} {CHUNK}", value(round, slot), place(round, slot)));
        }
        process.replace();
        told += &qemu.ask("aio_flush");
        assert_eq!(told.matches("wrote 262144/262144 bytes").count(), 16, "{told}");
        qemu.ask("flush");
    }
    for (round, slot) in (0..ROUNDS).flat_map(|round| (0..16).map(move |slot| (round, slot))) {
        let told = qemu.ask(&format!("read -P {} {} {CHUNK}", value(round, slot), place(round, slot)));
        assert!(told.contains("read 262144/262144 bytes") && !told.contains("verification"), "{told}");
    }
}

#[test]
fn qemu_does_not_notice_that_the_server_of_a_file_was_killed() {
    qemu_does_not_notice(Process::of_a_file());
}

#[test]
fn qemu_does_not_notice_that_the_server_of_a_lun_was_killed() {
    qemu_does_not_notice(Process::of_a_lun());
}
