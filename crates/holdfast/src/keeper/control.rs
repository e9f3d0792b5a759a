//! The keeper's socket: several clients, one JSON document a line, bounded in
//! every direction. Everything is non-blocking; the main loop polls.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::poll::PollFlags;
use nix::sys::stat::{Mode, umask};

use super::protocol::{Call, Event, LONGEST_LINE, Refusal, Reply, ToClient};

const CLIENTS: usize = 32;

/// A client that has more than this unread, in bytes, is disconnected: it lists
/// again when it comes back.
const UNREAD: usize = 4 * LONGEST_LINE;

/// Which client asked, and under which number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// The connection.
    pub client: u64,
    /// The call's number.
    pub id: u64,
}

/// The listening socket and its connections.
pub struct Control {
    path: PathBuf,
    listener: UnixListener,
    clients: BTreeMap<u64, Client>,
    next: u64,
}

struct Client {
    stream: UnixStream,
    received: Vec<u8>,
    unsent: Vec<u8>,
    subscribed: bool,
}

impl Control {
    /// Listens at `path`, which only this user may open. Whoever calls this has
    /// made sure that no other keeper listens there.
    pub fn listen(path: &Path) -> io::Result<Control> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let before = umask(Mode::from_bits_truncate(0o177));
        let listener = UnixListener::bind(path);
        umask(before);
        let listener = listener?;
        listener.set_nonblocking(true)?;
        Ok(Control { path: path.to_owned(), listener, clients: BTreeMap::new(), next: 1 })
    }

    /// What to poll the listener for.
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// What to poll the clients for.
    pub fn clients(&self) -> impl Iterator<Item = (u64, BorrowedFd<'_>, PollFlags)> {
        self.clients.iter().map(|(id, client)| {
            let mut interest = PollFlags::POLLIN;
            if !client.unsent.is_empty() {
                interest |= PollFlags::POLLOUT;
            }
            (*id, client.stream.as_fd(), interest)
        })
    }

    /// Takes new connections.
    pub fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.clients.len() >= CLIENTS {
                tracing::warn!("refused a connection: {CLIENTS} clients are connected already");
                continue;
            }
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            let client = Client { stream, received: Vec::new(), unsent: Vec::new(), subscribed: false };
            self.clients.insert(self.next, client);
            self.next += 1;
        }
    }

    /// Reads what a client sent: complete calls, or the answers to lines that are none.
    pub fn read(&mut self, id: u64) -> Vec<Result<(Asked, Call), Refusal>> {
        let Some(client) = self.clients.get_mut(&id) else {
            return Vec::new();
        };
        let open = client.fill();
        let mut calls = Vec::new();
        let mut start = 0;
        while let Some(length) = client.received[start..].iter().position(|byte| *byte == b'\n') {
            let line = &client.received[start..start + length];
            start += length + 1;
            calls.push(match serde_json::from_slice::<Call>(line) {
                Ok(call) => Ok((Asked { client: id, id: call.id }, call)),
                Err(error) => Err(Refusal::Malformed { why: error.to_string() }),
            });
        }
        client.received.drain(..start);
        if !open || client.received.len() > LONGEST_LINE {
            self.clients.remove(&id);
        }
        calls
    }

    /// Sends a client what it did not take before.
    pub fn flush(&mut self, id: u64) {
        if self.clients.get_mut(&id).is_some_and(|client| !client.flush()) {
            self.clients.remove(&id);
        }
    }

    /// Answers a call, if the client is still there.
    pub fn reply(&mut self, asked: Asked, result: Result<Reply, Refusal>) {
        let id = asked.id;
        self.send(asked.client, &ToClient::Reply { id, result });
    }

    /// Sends a client events from now on.
    pub fn subscribe(&mut self, client: u64) {
        if let Some(client) = self.clients.get_mut(&client) {
            client.subscribed = true;
        }
    }

    /// Tells every subscriber.
    pub fn publish(&mut self, event: Event) {
        let subscribed = |(id, client): (&u64, &Client)| client.subscribed.then_some(*id);
        let subscribers: Vec<_> = self.clients.iter().filter_map(subscribed).collect();
        for client in subscribers {
            self.send(client, &ToClient::Event(event));
        }
    }

    fn send(&mut self, id: u64, message: &ToClient) {
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        let Ok(mut line) = serde_json::to_vec(message) else {
            return;
        };
        line.push(b'\n');
        client.unsent.append(&mut line);
        if !client.flush() || client.unsent.len() > UNREAD {
            tracing::warn!("disconnected a client that left or does not read");
            self.clients.remove(&id);
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Client {
    /// `false` when the connection is over.
    fn fill(&mut self) -> bool {
        let mut bytes = [0; 16_384];
        while self.received.len() <= LONGEST_LINE {
            match self.stream.read(&mut bytes) {
                Ok(0) => return false,
                Ok(count) => self.received.extend_from_slice(&bytes[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
        true
    }

    /// `false` when the connection is over.
    fn flush(&mut self) -> bool {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
        true
    }
}
