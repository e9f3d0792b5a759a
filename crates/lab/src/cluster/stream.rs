//! Server-sent events: what changes in the cluster, and what happens in it.

use std::io::{self, ErrorKind, Read};
use std::time::{Duration, Instant};

use holdfast_api::{Change, Event};
use serde::de::DeserializeOwned;

use super::http::Body;

/// A message that grows beyond this is no message, in bytes.
const MAX_MESSAGE: usize = 4 << 20;

#[derive(Debug)]
struct Messages {
    body: Body,
    /// Read, but not yet a whole message.
    pending: Vec<u8>,
}

impl Messages {
    /// The next message's name and data. `None`: nothing came within `patience`.
    fn next(&mut self, patience: Duration) -> io::Result<Option<(String, String)>> {
        let until = Instant::now() + patience;
        loop {
            if let Some(end) = self.pending.windows(2).position(|pair| pair == b"\n\n") {
                let message: Vec<u8> = self.pending.drain(..end + 2).collect();
                let message = String::from_utf8_lossy(&message);
                let field = |name: &str| message.lines().find_map(|line| line.strip_prefix(name));
                if let Some(data) = field("data:") {
                    let name = field("event:").unwrap_or_default().trim().to_owned();
                    return Ok(Some((name, data.trim().to_owned())));
                }
                // A comment: the stream is alive.
                continue;
            }
            if self.pending.len() > MAX_MESSAGE {
                return Err(io::Error::new(ErrorKind::InvalidData, "a message without an end"));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.body.set_patience(left)?;
            let mut part = [0; 4096];
            match self.body.read(&mut part) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(read) => self.pending.extend_from_slice(&part[..read]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    fn next_as<T: DeserializeOwned>(&mut self, name: &str, patience: Duration) -> io::Result<Option<T>> {
        let until = Instant::now() + patience;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.next(left)? {
                None => return Ok(None),
                Some((found, data)) if found == name => return Ok(Some(serde_json::from_str(&data)?)),
                Some(_) => {}
            }
        }
    }
}

/// What changes in the cluster, as one node learns of it.
#[derive(Debug)]
pub struct ChangeStream(Messages);

impl ChangeStream {
    pub(super) fn new(body: Body) -> Self {
        Self(Messages { body, pending: Vec::new() })
    }

    /// The next change; `None` when there is none within `patience`.
    ///
    /// # Errors
    /// When the stream has ended: ask for everything anew.
    pub fn next(&mut self, patience: Duration) -> io::Result<Option<Change>> {
        self.0.next_as("change", patience)
    }
}

/// What happens in the cluster, as one node learns of it.
#[derive(Debug)]
pub struct EventStream(Messages);

impl EventStream {
    pub(super) fn new(body: Body) -> Self {
        Self(Messages { body, pending: Vec::new() })
    }

    /// The next event; `None` when there is none within `patience`.
    ///
    /// # Errors
    /// When the stream has ended: it can be resumed at any node.
    pub fn next(&mut self, patience: Duration) -> io::Result<Option<Event>> {
        self.0.next_as("event", patience)
    }
}
