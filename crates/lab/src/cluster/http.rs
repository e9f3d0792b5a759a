//! HTTP/1.1 over a unix socket, as little of it as the API needs: one request per
//! connection, bodies of known length or in chunks, and the console's upgrade.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// The longest line of a head or of a stream, in bytes.
const MAX_LINE: u64 = 4 << 20;
/// The longest body that is read whole, in bytes.
const MAX_BODY: u64 = 64 << 20;
const MAX_HEADERS: usize = 100;

/// An answer whose body was not read yet.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: Body,
}

/// The body of an answer.
#[derive(Debug)]
pub(super) struct Body {
    reader: BufReader<UnixStream>,
    length: Length,
}

#[derive(Debug, Clone, Copy)]
enum Length {
    Left(u64),
    /// What is left of the chunk.
    Chunked(u64),
    UntilClosed,
    Ended,
}

/// Sends a request and reads the answer's head.
pub(super) fn send(
    socket: &Path,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
    deadline: Duration,
) -> io::Result<Answer> {
    let until = Instant::now() + deadline;
    let mut stream = UnixStream::connect(socket)?;
    stream.set_write_timeout(Some(deadline))?;
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: holdfast\r\nContent-Length: {}\r\n", body.len());
    if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("connection")) {
        head.push_str("Connection: close\r\n");
    }
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)?;
    stream.set_read_timeout(Some(left(until)?))?;
    let mut reader = BufReader::new(stream);
    let status = line(&mut reader)?;
    let status: u16 = status
        .strip_prefix("HTTP/1.1 ")
        .and_then(|rest| rest.get(..3)?.parse().ok())
        .ok_or_else(|| malformed(format!("not an HTTP answer: {status:?}")))?;
    let mut length = Length::UntilClosed;
    for _ in 0..MAX_HEADERS {
        let header = line(&mut reader)?;
        if header.is_empty() {
            if matches!(status, 204 | 304) {
                length = Length::Ended;
            }
            return Ok(Answer { status, body: Body { reader, length } });
        }
        let Some((name, value)) = header.split_once(':') else { continue };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => {
                let bytes = value.trim().parse().map_err(|_| malformed("a bad Content-Length"))?;
                length = Length::Left(bytes);
            }
            "transfer-encoding" if value.trim().eq_ignore_ascii_case("chunked") => length = Length::Chunked(0),
            _ => {}
        }
    }
    Err(malformed("an answer with too many headers"))
}

fn left(until: Instant) -> io::Result<Duration> {
    match until.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(ErrorKind::TimedOut.into()),
        left => Ok(left),
    }
}

fn malformed(what: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what.into())
}

/// A line without its end.
fn line(reader: &mut BufReader<UnixStream>) -> io::Result<String> {
    let mut line = String::new();
    reader.by_ref().take(MAX_LINE).read_line(&mut line)?;
    match line.strip_suffix('\n') {
        Some(line) => Ok(line.trim_end_matches('\r').to_owned()),
        None => Err(ErrorKind::UnexpectedEof.into()),
    }
}

impl Body {
    /// All of it, read until `deadline` from now at most.
    pub(super) fn whole(mut self, deadline: Duration) -> io::Result<Vec<u8>> {
        let until = Instant::now() + deadline;
        let mut bytes = Vec::new();
        let mut part = [0; 16 << 10];
        loop {
            self.set_patience(left(until)?)?;
            match self.read(&mut part)? {
                0 => return Ok(bytes),
                read => bytes.extend_from_slice(&part[..read]),
            }
            if bytes.len() as u64 > MAX_BODY {
                return Err(malformed("the body is too long"));
            }
        }
    }

    /// How long one read may wait.
    pub(super) fn set_patience(&self, patience: Duration) -> io::Result<()> {
        self.reader.get_ref().set_read_timeout(Some(patience.max(Duration::from_millis(1))))
    }

    /// The connection itself, after an upgrade.
    pub(super) fn upgraded(self) -> Console {
        Console { reader: self.reader }
    }
}

impl Read for Body {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = match self.length {
            Length::Ended => return Ok(0),
            Length::UntilClosed => return self.reader.read(into),
            Length::Left(left) => left,
            Length::Chunked(0) => {
                // A time-out may strike between two chunks, not within a chunk's head:
                // the server writes those in one piece.
                let size = line(&mut self.reader)?;
                let size = size.split(';').next().unwrap_or_default().trim();
                let size = u64::from_str_radix(size, 16).map_err(|_| malformed("a bad chunk"))?;
                if size == 0 {
                    self.length = Length::Ended;
                    return Ok(0);
                }
                size
            }
            Length::Chunked(left) => left,
        };
        let chunked = matches!(self.length, Length::Chunked(_));
        if chunked {
            // Remembered before the read, which a time-out may end.
            self.length = Length::Chunked(left);
        }
        if left == 0 {
            self.length = Length::Ended;
            return Ok(0);
        }
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(into.len());
        let read = self.reader.read(&mut into[..most])?;
        if read == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let left = left - read as u64;
        if chunked && left == 0 {
            line(&mut self.reader)?;
        }
        self.length = if chunked { Length::Chunked(left) } else { Length::Left(left) };
        Ok(read)
    }
}

/// The serial console of a VM.
#[derive(Debug)]
pub struct Console {
    reader: BufReader<UnixStream>,
}

impl Console {
    /// Types a line and the return key.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn type_line(&mut self, text: &str) -> io::Result<()> {
        self.reader.get_mut().write_all(format!("{text}\n").as_bytes())
    }

    /// Reads until a line contains `word` and returns that line.
    ///
    /// # Errors
    /// With all that was read instead, when the connection ends or `deadline` passes.
    pub fn wait_for(&mut self, word: &str, deadline: Duration) -> io::Result<String> {
        let until = Instant::now() + deadline;
        let mut seen = String::new();
        let mut byte = [0; 1];
        loop {
            let patience = left(until).map_err(|error| io::Error::new(error.kind(), seen.clone()))?;
            self.reader.get_ref().set_read_timeout(Some(patience.max(Duration::from_millis(1))))?;
            match self.reader.read(&mut byte) {
                Ok(0) => return Err(io::Error::new(ErrorKind::UnexpectedEof, seen)),
                Ok(_) => seen.push(char::from(byte[0])),
                Err(error) => return Err(io::Error::new(error.kind(), seen)),
            }
            if byte[0] == b'\n' && seen.lines().last().is_some_and(|line| line.contains(word)) {
                return Ok(seen.lines().last().unwrap_or_default().trim().to_owned());
            }
        }
    }
}
