//! Files on volumes, as users put, get, list and remove them.
//!
//! What is put has no name before all of it is there. On a LUN it is a file that this node
//! holds (`files.rs`), and is gone with the hold; in a directory it stands beside its place
//! under a name that is not listed. What is all zeroes is not written, so it stays absent.

mod directory;
mod flow;

use futures_util::{Stream, StreamExt as _};
use holdfast_core::*;
use holdfast_volume::Lun as Device;
use tokio::sync::mpsc;

use super::files::Held;
use super::{Agent, Failure};
pub(super) use directory::Drafts;
pub use directory::{Found, user};
use flow::{Sink, Source};

/// Pieces of a body that are on their way between the network and the storage.
const ON_THE_WAY: usize = 4;
/// An error with which a body breaks off.
pub type Broken = Box<dyn std::error::Error + Send + Sync>;

impl Agent {
    /// Whether a file of `bytes` could be put onto a volume now.
    ///
    /// # Errors
    /// As for [`Agent::put_file`].
    pub async fn may_put(&self, volume: &str, naming: &Naming, bytes: u64) -> Result<(), Failure> {
        let state = self.volume_state(volume)?;
        state::valid_file_name(&naming.name)?;
        match state.luns.contains_key(volume) {
            true => Ok(state.may_be_put(volume, naming, bytes).map(drop)?),
            false => self.may_put_in_directory(&state, volume, naming, bytes).await,
        }
    }

    /// Puts a file of `bytes` onto a volume.
    ///
    /// # Errors
    /// Its name cannot be, or is in use; the body is not as long as it should be; there is no
    /// room. Nothing of it is there then.
    pub async fn put_file<S, B>(
        &self,
        by: &str,
        volume: &str,
        naming: Naming,
        bytes: u64,
        mut body: S,
    ) -> Result<(), Failure>
    where
        S: Stream<Item = Result<bytes::Bytes, B>> + Unpin,
        B: std::fmt::Display,
    {
        self.may_put(volume, &naming, bytes).await?;
        let state = self.volume_state(volume)?;
        let (held, sink) = if state.luns.contains_key(volume) {
            let held = self.hold(by, volume, Holding::New { bytes }).await?;
            let sink = Sink::OnLun(open(&held).await?);
            (Some(held), sink)
        } else {
            (None, self.draft_in_directory(&state, volume, &naming).await?)
        };
        let (send, receive) = mpsc::channel(ON_THE_WAY);
        let writing = tokio::task::spawn_blocking(move || flow::fill(receive, sink, bytes));
        let mut came = 0;
        let mut broken = None;
        while let Some(piece) = body.next().await {
            let piece = match piece {
                Ok(piece) => piece,
                Err(error) => {
                    broken = Some(format!("it broke off after {came} bytes: {error}"));
                    break;
                }
            };
            came += piece.len() as u64;
            if came > bytes || send.send(piece).await.is_err() {
                break;
            }
        }
        drop(send);
        let sink = writing.await.map_err(|error| Failure::other("internal", error.to_string()))?;
        let sink = sink.map_err(|error| failed(volume, &error))?;
        if let Some(why) = broken {
            return Err(Failure::other("incomplete", why));
        }
        if came != bytes {
            return Err(Failure::other("incomplete", format!("{came} bytes came, and {bytes} were announced")));
        }
        match held {
            Some(held) => held.end(by, Some(naming)).await,
            None => self.keep_in_directory(volume, sink, naming).await,
        }
    }

    /// Opens a file on a volume for reading: how long it is, and its bytes in order.
    ///
    /// # Errors
    /// It is not there, or in use.
    pub async fn get_file(
        &self,
        by: &str,
        volume: &str,
        name: &str,
    ) -> Result<(u64, impl Stream<Item = Result<bytes::Bytes, Broken>> + use<>), Failure> {
        let state = self.volume_state(volume)?;
        state::valid_file_name(name)?;
        let source = if state.luns.contains_key(volume) {
            let held = self.hold(by, volume, Holding::File { name: name.into(), kind: HoldKind::Reads }).await?;
            let device = open(&held).await?;
            Source::OnLun(held, device)
        } else {
            Source::File(self.open_in_directory(&state, volume, name).await?)
        };
        let bytes = source.bytes().map_err(|error| failed(volume, &error))?;
        Ok((bytes, flow::pour(source, bytes)))
    }

    /// Removes a file from a volume.
    ///
    /// # Errors
    /// It is not there, or in use.
    pub async fn remove_file(&self, by: &str, volume: &str, name: &str) -> Result<(), Failure> {
        let state = self.volume_state(volume)?;
        state::valid_file_name(name)?;
        match state.luns.contains_key(volume) {
            true => {
                let command = Command::RemoveFile { volume: volume.into(), name: name.into() };
                self.execute(by, command).await.map(drop)
            }
            false => self.remove_in_directory(&state, volume, name).await,
        }
    }

    fn volume_state(&self, volume: &str) -> Result<std::sync::Arc<ClusterState>, Failure> {
        self.member()?;
        let state = self.state();
        match state.volumes.contains_key(volume) {
            true => Ok(state),
            false => Err(Refusal::Unknown { what: "volume".into(), name: volume.into() }.into()),
        }
    }
}

/// The file that is held, by its connection to the volume server; none if it has no length.
pub(super) async fn open(held: &Held) -> Result<Option<Device>, Failure> {
    if held.file.bytes == 0 {
        return Ok(None);
    }
    let address = holdfast_qemu::nbd_address(held.socket());
    let opened = tokio::task::spawn_blocking(move || Device::open(address.as_ref())).await;
    let opened = opened.map_err(|error| Failure::other("internal", error.to_string()))?;
    opened.map(Some).map_err(|error| Failure::other("volume_unreachable", error.to_string()))
}

fn failed(volume: &str, error: &std::io::Error) -> Failure {
    match error.raw_os_error() {
        Some(nix::libc::ENOSPC | nix::libc::EDQUOT) => {
            Failure::other("no_space", format!("volume {volume:?} is full: nothing of the file is kept"))
        }
        _ => Failure::other("io", format!("volume {volume:?}: {error}")),
    }
}
