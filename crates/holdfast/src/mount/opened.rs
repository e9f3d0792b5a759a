//! Files that are open. Each has a thread that reads it, so that one that waits for its
//! storage holds up no other.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};

use fuser::{Errno, ReplyData};
use holdfast_core::LUN_BLOCK_BYTES;
use holdfast_volume::Lun as Device;
use holdfast_volume::lun::Device as _;

use super::line::Line;
use super::locked;
use super::protocol::{Answer, Ask};

/// So many files can be open at a time.
const MOST: usize = 256;

/// The files that are open, by their handles.
#[derive(Default)]
pub struct Opened(Mutex<BTreeMap<u64, File>>);

struct File {
    bytes: u64,
    reads: Sender<Read>,
}

/// Something that is to be read.
pub struct Read {
    /// From where, in bytes.
    pub offset: u64,
    /// How many bytes.
    pub size: u32,
    /// Whom to tell.
    pub reply: ReplyData,
}

impl Opened {
    /// Opens a file for reading; says its handle.
    ///
    /// # Errors
    /// What the agent says; too many are open.
    pub fn open(&self, agent: &Line, name: String) -> Result<u64, Errno> {
        if locked(&self.0).len() >= MOST {
            return Err(Errno::ENFILE);
        }
        let (handle, answer) = agent.ask_numbered(Ask::Open { name })?;
        let Answer::Opened { address, bytes } = answer else { return Err(Errno::EIO) };
        let (reads, receive) = channel();
        let serves = std::thread::Builder::new().name("reads".into());
        if let Err(error) = serves.spawn(move || serve(address.as_deref(), bytes, receive)) {
            let _ = agent.ask(Ask::Close { handle });
            return Err(error.into());
        }
        locked(&self.0).insert(handle, File { bytes, reads });
        Ok(handle)
    }

    /// How long a file is that is open, in bytes.
    pub fn bytes(&self, handle: u64) -> Option<u64> {
        locked(&self.0).get(&handle).map(|file| file.bytes)
    }

    /// Has something read.
    pub fn read(&self, handle: u64, read: Read) {
        match locked(&self.0).get(&handle) {
            Some(file) => {
                if let Err(unread) = file.reads.send(read) {
                    unread.0.reply.error(Errno::EIO);
                }
            }
            None => read.reply.error(Errno::EBADF),
        }
    }

    /// Lets go of a file. The kernel waits for what is read of it before it says so.
    pub fn close(&self, agent: &Line, handle: u64) {
        drop(locked(&self.0).remove(&handle));
        let _ = agent.ask(Ask::Close { handle });
    }
}

fn serve(address: Option<&str>, bytes: u64, reads: Receiver<Read>) {
    let mut device = None;
    for Read { offset, size, reply } in reads {
        let read = match address {
            Some(address) if offset < bytes => read(&mut device, address, offset, u64::from(size).min(bytes - offset)),
            _ => Ok(Vec::new()),
        };
        match read {
            Ok(data) => reply.data(&data),
            Err(error) => {
                tracing::warn!(%error, "cannot read a file");
                // The next attempt has a connection of its own.
                device = None;
                reply.error(error.into());
            }
        }
    }
}

/// Reads whole blocks, and gives what of them was asked for.
fn read(device: &mut Option<Device>, address: &str, offset: u64, size: u64) -> io::Result<Vec<u8>> {
    let device = match device {
        Some(device) => device,
        None => device.insert(Device::open(Path::new(address)).map_err(io::Error::other)?),
    };
    let from = offset / LUN_BLOCK_BYTES * LUN_BLOCK_BYTES;
    let until = (offset + size).next_multiple_of(LUN_BLOCK_BYTES);
    let length = |bytes: u64| usize::try_from(bytes).map_err(io::Error::other);
    let mut data = vec![0; length(until - from)?];
    device.read(from, &mut data)?;
    data.drain(..length(offset - from)?);
    data.truncate(length(size)?);
    Ok(data)
}
