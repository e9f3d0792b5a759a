//! Bytes on their way to and from files on volumes. Everything here blocks, in threads of
//! its own.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use bytes::Bytes;
use futures_util::Stream;
use holdfast_core::LUN_BLOCK_BYTES;
use holdfast_volume::Lun as Device;
use holdfast_volume::lun::Device as _;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::super::files::Held;
use super::directory::Draft;
use super::{Broken, ON_THE_WAY};

/// What is read and written at a time, in bytes.
const PIECE_BYTES: usize = 1 << 20;
/// Whole blocks are written to a LUN and read from it, in bytes.
const BLOCK_BYTES: usize = LUN_BLOCK_BYTES as usize;

/// Where a file that is put goes. All of it reads as zero before.
pub enum Sink {
    /// A file on a LUN; none if it has no length.
    OnLun(Option<Device>),
    /// A file in a directory.
    File(Draft),
}

impl Sink {
    fn write(&self, at: u64, piece: &mut Vec<u8>) -> io::Result<()> {
        match self {
            Sink::OnLun(None) => Err(io::ErrorKind::FileTooLarge.into()),
            Sink::OnLun(Some(device)) => {
                piece.resize(piece.len().next_multiple_of(BLOCK_BYTES), 0);
                device.write(at, piece)
            }
            Sink::File(draft) => draft.file.write_all_at(piece, at),
        }
    }

    fn finish(&self, bytes: u64) -> io::Result<()> {
        match self {
            Sink::OnLun(None) => Ok(()),
            Sink::OnLun(Some(device)) => device.flush(),
            Sink::File(draft) => {
                draft.file.set_len(bytes)?;
                draft.file.sync_all()
            }
        }
    }
}

/// Writes what comes, and makes it durable if all of it has come.
pub fn fill(mut body: Receiver<Bytes>, sink: Sink, bytes: u64) -> io::Result<Sink> {
    let (mut at, mut piece) = (0, Vec::with_capacity(PIECE_BYTES));
    let mut write = |piece: &mut Vec<u8>| {
        let length = piece.len() as u64;
        if piece.iter().any(|byte| *byte != 0) {
            sink.write(at, piece)?;
        }
        at += length;
        piece.clear();
        Ok::<_, io::Error>(())
    };
    while let Some(came) = body.blocking_recv() {
        let mut came = &came[..];
        while !came.is_empty() {
            let (first, rest) = came.split_at(came.len().min(PIECE_BYTES - piece.len()));
            piece.extend_from_slice(first);
            came = rest;
            if piece.len() == PIECE_BYTES {
                write(&mut piece)?;
            }
        }
    }
    write(&mut piece)?;
    if at == bytes {
        sink.finish(bytes)?;
    }
    Ok(sink)
}

/// Where a file that is got comes from.
pub enum Source {
    /// A file on a LUN; no device if it has no length.
    OnLun(Held, Option<Device>),
    /// A file in a directory.
    File(File),
}

impl Source {
    pub fn bytes(&self) -> io::Result<u64> {
        match self {
            Source::OnLun(held, _) => Ok(held.file.bytes),
            Source::File(file) => Ok(file.metadata()?.len()),
        }
    }

    fn read(&self, at: u64, length: usize) -> io::Result<Vec<u8>> {
        match self {
            Source::File(file) => {
                let mut piece = vec![0; length];
                file.read_exact_at(&mut piece, at)?;
                Ok(piece)
            }
            Source::OnLun(held, device) => {
                let mut piece = vec![0; length.next_multiple_of(BLOCK_BYTES)];
                // A piece is never in two parts: slabs are longer, and both powers of two.
                let part = u32::try_from(at / held.part_bytes).unwrap_or(u32::MAX);
                if let Some(device) = device.as_ref().filter(|_| held.file.slab(part).is_some()) {
                    device.read(at, &mut piece)?;
                }
                piece.truncate(length);
                Ok(piece)
            }
        }
    }
}

/// The bytes of a file, in order. Whoever reads too slowly, or not at all, holds nothing up
/// but this.
pub fn pour(source: Source, bytes: u64) -> impl Stream<Item = Result<Bytes, Broken>> + use<> {
    let (send, receive) = channel(ON_THE_WAY);
    tokio::task::spawn_blocking(move || read_all(&source, bytes, &send));
    futures_util::stream::unfold(receive, async |mut receive| Some((receive.recv().await?, receive)))
}

fn read_all(source: &Source, bytes: u64, send: &Sender<Result<Bytes, Broken>>) {
    let mut at = 0;
    while at < bytes {
        let length = (bytes - at).min(PIECE_BYTES as u64);
        let piece = source.read(at, length as usize).map(Bytes::from).map_err(Broken::from);
        let ends = piece.is_err();
        if send.blocking_send(piece).is_err() || ends {
            return;
        }
        at += length;
    }
}
