//! Files to and from volumes.

use std::io::{self, IsTerminal as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use http_body_util::{BodyExt, BodyStream, StreamBody};
use hyper::body::{Frame, Incoming};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::io::AsyncReadExt as _;
use tokio::time::timeout;

use super::client::{Client, whole};
use super::vm::segment;
use super::{CliError, Done, output};

/// What is read of a file at a time, in bytes.
const PIECE_BYTES: usize = 1 << 20;
/// A file of which nothing comes for so long will not come.
const SILENCE: Duration = Duration::from_secs(60);

/// Where a file of a volume is in the API.
pub fn path(volume: &str, file: &str) -> String {
    format!("/api/v1/volumes/{}/files/{}", segment(volume), segment(file))
}

/// `holdfast volume put`.
pub async fn put(client: &Client, volume: &str, from: &Path, to: Option<String>, replace: bool, json: bool) -> Done {
    let here = |error: io::Error| CliError::Local(format!("{}: {error}", from.display()));
    let name = || from.file_name().and_then(|name| name.to_str()).map(str::to_owned);
    let to = to.or_else(name).ok_or_else(|| CliError::Local("name the file as it is to be called there".into()))?;
    let file = tokio::fs::File::open(from).await.map_err(here)?;
    let metadata = file.metadata().await.map_err(here)?;
    if !metadata.is_file() {
        return Err(CliError::Local(format!("{}: it is not a regular file", from.display())));
    }
    let bytes = metadata.len();
    let pieces = futures_util::stream::unfold(Some(file), async |file| {
        let mut file = file?;
        let mut piece = vec![0; PIECE_BYTES];
        match file.read(&mut piece).await {
            Ok(0) => None,
            Ok(read) => {
                piece.truncate(read);
                Some((Ok(Bytes::from(piece)), Some(file)))
            }
            Err(error) => Some((Err(error), None)),
        }
    });
    send(client, (volume, &to), replace, bytes, pieces, json).await
}

/// `holdfast volume get`.
pub async fn get(client: &Client, volume: &str, from: &str, to: Option<PathBuf>, json: bool) -> Done {
    let name = from.rsplit('/').next().unwrap_or(from);
    let to = match to {
        Some(to) if to.is_dir() => to.join(name),
        Some(to) => to,
        None => PathBuf::from(name),
    };
    let (bytes, body) = client.get_body(&path(volume, from)).await?;
    let here = |error: io::Error| CliError::Local(format!("{}: {error}", to.display()));
    let dir = to.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let draft = Draft(dir.join(format!(".{name}.part-{}", std::process::id())));
    let file = std::fs::File::create_new(&draft.0).map_err(here)?;
    let progress = Progress::new(&format!("get {from}"), bytes, json);
    let (mut came, mut pieces) = (0, std::pin::pin!(pieces(body)));
    while let Some(piece) = pieces.next().await {
        let piece = piece?;
        // What is not written is a hole, and reads as zero.
        if piece.iter().any(|byte| *byte != 0) {
            file.write_all_at(&piece, came).map_err(here)?;
        }
        came += piece.len() as u64;
        progress.at(came);
    }
    if came != bytes {
        return Err(CliError::Local(format!("{from} broke off after {came} of {bytes} bytes: nothing of it is kept")));
    }
    file.set_len(bytes).and_then(|()| file.sync_all()).map_err(here)?;
    std::fs::rename(&draft.0, &to).map_err(here)?;
    progress.end();
    done(json, bytes, format!("{} has {from} of volume {volume}, {}.", to.display(), output::size(bytes)))
}

/// `holdfast volume cp`.
pub async fn copy(client: &Client, from: &str, to: &str, replace: bool, json: bool) -> Done {
    let split = |text: &str| match text.split_once(':') {
        Some((volume, file)) if !volume.is_empty() && !file.is_empty() => Ok((volume.to_owned(), file.to_owned())),
        _ => Err(CliError::Local(format!("{text:?} names no file on a volume: write VOLUME:FILE"))),
    };
    let ((from_volume, from), (to_volume, to)) = (split(from)?, split(to)?);
    let (bytes, body) = client.get_body(&path(&from_volume, &from)).await?;
    let pieces = pieces(body).map(|piece| piece.map_err(|error| io::Error::other(error.to_string())));
    send(client, (&to_volume, &to), replace, bytes, pieces, json).await
}

async fn send(
    client: &Client,
    (volume, name): (&str, &str),
    replace: bool,
    bytes: u64,
    pieces: impl Stream<Item = io::Result<Bytes>> + Send + Sync + 'static,
    json: bool,
) -> Done {
    let to = format!("{}?replace={replace}", path(volume, name));
    // Whoever sends hears of a refusal late, or not at all.
    client.put_body(&format!("{to}&dry_run_bytes={bytes}"), 0, whole(Bytes::new())).await?;
    let progress = Progress::new(&format!("put {name}"), bytes, json);
    let (seen, mut sent) = (progress.clone(), 0);
    let frames = pieces.map(move |piece| {
        sent += piece.as_ref().map_or(0, |piece| piece.len() as u64);
        seen.at(sent);
        piece.map(Frame::data)
    });
    client.put_body(&to, bytes, BodyExt::boxed(StreamBody::new(frames))).await?;
    progress.end();
    done(json, bytes, format!("Volume {volume} has {name}, {}.", output::size(bytes)))
}

fn done(json: bool, bytes: u64, text: String) -> Done {
    match json {
        true => output::json(&serde_json::json!({ "bytes": bytes })),
        false => output::line(&text),
    }
}

/// The pieces of a body. An error ends them.
fn pieces(body: Incoming) -> impl Stream<Item = Result<Bytes, CliError>> {
    futures_util::stream::unfold(Some(BodyStream::new(body)), async |body| {
        let mut body = body?;
        loop {
            let broken = |why: String| Some((Err(CliError::Local(format!("the file broke off: {why}"))), None));
            return match timeout(SILENCE, body.next()).await {
                Err(_) => broken(format!("nothing came for {} s", SILENCE.as_secs())),
                Ok(None) => None,
                Ok(Some(Err(error))) => broken(error.to_string()),
                Ok(Some(Ok(frame))) => match frame.into_data() {
                    Ok(bytes) => Some((Ok(bytes), Some(body))),
                    Err(_) => continue,
                },
            };
        }
    })
}

/// A file that is not whole yet; gone unless it was renamed.
struct Draft(PathBuf);

impl Drop for Draft {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A bar on a terminal, nothing elsewhere.
#[derive(Clone)]
struct Progress(Option<ProgressBar>);

impl Progress {
    fn new(what: &str, bytes: u64, json: bool) -> Progress {
        if json || !io::stderr().is_terminal() {
            return Progress(None);
        }
        let bar = ProgressBar::new(bytes).with_prefix(what.to_owned());
        let template = "{prefix} [{bar:30}] {percent:>3} % {binary_bytes_per_sec} {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        Progress(Some(bar))
    }

    fn at(&self, bytes: u64) {
        if let Some(bar) = &self.0 {
            bar.set_position(bytes);
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
