//! Disk images, made and changed by `qemu-img`.
//!
//! A new image is made under a temporary name beside its own, flushed, and only
//! then renamed: it is either wholly there or not at all, and never replaces
//! another file. Dropping one of these futures ends `qemu-img` and deletes what
//! it has made so far.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use holdfast_core::{Allocation, DiskFormat, DiskSpec};
use serde::Deserialize;
use serde_json::Value;
use tempfile::NamedTempFile;
use tokio::io::AsyncReadExt;
use tokio::process::Command;
use tokio::time::timeout;

use crate::program::{not_started, output};
use crate::{NBD_EXPORT, QemuError};

mod vhd;

/// The Debian package that brings `qemu-img`.
const PACKAGE: &str = "qemu-utils";

/// Formats that a foreign image may have. Others (`nbd`, `blkdebug`, `luks` …)
/// are refused, for they reach further than the file.
const FORMATS: [&str; 6] = ["raw", "qcow2", "vhdx", "vpc", "vmdk", "vdi"];

/// `qemu-img`, which makes, copies and measures images.
#[derive(Clone, Debug)]
pub struct QemuImg {
    program: PathBuf,
}

/// Where an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageAt<'a> {
    /// In a file, or on a device.
    File(&'a Path),
    /// Behind the socket of a volume server.
    Socket(&'a Path),
}

impl<'a> From<&'a Path> for ImageAt<'a> {
    fn from(path: &'a Path) -> Self {
        ImageAt::File(path)
    }
}

impl<'a> From<&'a PathBuf> for ImageAt<'a> {
    fn from(path: &'a PathBuf) -> Self {
        ImageAt::File(path)
    }
}

impl ImageAt<'_> {
    pub(crate) fn path(&self) -> &Path {
        match self {
            ImageAt::File(path) | ImageAt::Socket(path) => path,
        }
    }

    pub(crate) fn argument(&self) -> OsString {
        match self {
            ImageAt::File(path) => path.as_os_str().to_owned(),
            ImageAt::Socket(path) => nbd_address(path).into(),
        }
    }

    /// How qemu-img is told to open it as an image of a format: options, and the name.
    fn opened_as(&self, format: &str) -> (Vec<OsString>, OsString) {
        match (format, vhd::address(self)) {
            ("vpc", Some(address)) => (Vec::new(), address.into()),
            _ => (vec!["-f".into(), format.into()], self.argument()),
        }
    }
}

/// The address of what a volume server serves on a socket.
pub fn nbd_address(socket: &Path) -> String {
    let mut address = format!("nbd+unix:///{NBD_EXPORT}?socket=");
    for byte in socket.as_os_str().as_encoded_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'_' | b'.' => address.push(char::from(*byte)),
            other => address.push_str(&format!("%{other:02X}")),
        }
    }
    address
}

/// How a new disk is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Its format.
    pub format: DiskFormat,
    /// When it takes its room.
    pub allocation: Allocation,
}

impl From<DiskFormat> for Layout {
    fn from(format: DiskFormat) -> Self {
        Layout { format, allocation: Allocation::Thin }
    }
}

impl From<&DiskSpec> for Layout {
    fn from(disk: &DiskSpec) -> Self {
        Layout { format: disk.format, allocation: disk.allocation }
    }
}

impl Layout {
    /// What qemu-img is told of it.
    fn options(self) -> Option<&'static str> {
        match (self.format, self.allocation) {
            // Every cluster has its place in the file; the room for them is taken after that.
            (DiskFormat::Qcow2, Allocation::Full) => Some("preallocation=metadata"),
            (DiskFormat::Vhdx, Allocation::Full) => Some("subformat=fixed"),
            // Without force_size it would be as large as cylinders, heads and sectors can say.
            (DiskFormat::Vhd, Allocation::Thin) => Some("subformat=dynamic,force_size=on"),
            (DiskFormat::Vhd, Allocation::Full) => Some("subformat=fixed,force_size=on"),
            (DiskFormat::Raw, _) | (DiskFormat::Qcow2 | DiskFormat::Vhdx, Allocation::Thin) => None,
        }
    }
}

/// What an image file says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// QEMU's name of its format: `raw`, `qcow2`, `vhdx` …
    pub format: String,
    /// What a guest sees, in bytes.
    pub virtual_bytes: u64,
    /// What it takes on its file system now, in bytes.
    pub actual_bytes: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Described {
    format: String,
    virtual_size: u64,
    #[serde(default)]
    actual_size: u64,
    backing_filename: Option<String>,
    #[serde(default)]
    format_specific: Value,
}

impl QemuImg {
    /// The `qemu-img` at `program`, or of that name on the search path.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        QemuImg { program: program.into() }
    }

    /// Makes an empty disk of `size_bytes`.
    ///
    /// # Errors
    /// [`QemuError::Exists`] when `path` does, [`QemuError::TooSlow`] after
    /// `deadline`, [`QemuError::Image`] when qemu-img says no, [`QemuError::Io`] when
    /// there is no room for a disk that takes all of it.
    pub async fn create(
        &self,
        path: &Path,
        layout: impl Into<Layout>,
        size_bytes: u64,
        deadline: Duration,
    ) -> Result<(), QemuError> {
        let partial = Partial::beside(path)?;
        self.lay_out(&partial, layout.into(), size_bytes, deadline).await?;
        partial.keep().await
    }

    async fn lay_out(
        &self,
        partial: &Partial,
        layout: Layout,
        size_bytes: u64,
        deadline: Duration,
    ) -> Result<(), QemuError> {
        let doing = format!("create {}", partial.path.display());
        let size = size_bytes.to_string();
        let mut arguments: Vec<&OsStr> =
            vec!["create".as_ref(), "-q".as_ref(), "-f".as_ref(), layout.format.as_str().as_ref()];
        if let Some(options) = layout.options() {
            arguments.extend(["-o".as_ref(), OsStr::new(options)]);
        }
        arguments.extend([partial.path().as_os_str(), size.as_ref()]);
        self.run(&arguments, &partial.path, &doing, deadline).await?;
        match layout.allocation {
            Allocation::Thin => Ok(()),
            Allocation::Full => partial.take_room().await,
        }
    }

    /// Copies the image `source`, of whatever format, to a new disk at `path`, which
    /// is `size_bytes` large if the image is smaller. `on` is told the
    /// progress, 0 to 1.
    ///
    /// # Errors
    /// As for [`QemuImg::create`] and [`QemuImg::inspect`].
    pub async fn convert(
        &self,
        source: impl Into<ImageAt<'_>>,
        path: &Path,
        layout: impl Into<Layout>,
        size_bytes: Option<u64>,
        deadline: Duration,
        on: impl FnMut(f64) + Send,
    ) -> Result<(), QemuError> {
        let (source, layout) = (source.into(), layout.into());
        let image = self.inspect(source, deadline).await?;
        self.check(source, &image.format, deadline).await?;
        let partial = Partial::beside(path)?;
        // Not every format can be made larger, so it has its size before it is filled.
        let bytes = size_bytes.unwrap_or_default().max(image.virtual_bytes);
        self.lay_out(&partial, layout, bytes, deadline).await?;
        let to = ["-O".as_ref(), layout.format.as_str().as_ref(), partial.path().as_os_str()];
        let how = ["-n", "--target-is-zero"].map(OsStr::new);
        self.copy(source, &image.format, to, &how, deadline, on).await?;
        partial.keep().await
    }

    /// Copies the image `source`, of whatever format, to the disk that a volume server
    /// serves on `socket`: one that reads as zero, and is as large as the image at least.
    /// `on` is told the progress, 0 to 1.
    ///
    /// # Errors
    /// As for [`QemuImg::convert`]; some of it may be there then.
    pub async fn fill(
        &self,
        source: ImageAt<'_>,
        socket: &Path,
        deadline: Duration,
        on: impl FnMut(f64) + Send,
    ) -> Result<(), QemuError> {
        let image = self.inspect(source, deadline).await?;
        self.check(source, &image.format, deadline).await?;
        let address = nbd_address(socket);
        // Zeroes are left out, and what is written is flushed at the end.
        let how = ["-n", "--target-is-zero", "-t", "writeback"].map(OsStr::new);
        self.copy(source, &image.format, ["-O".as_ref(), "raw".as_ref(), address.as_ref()], &how, deadline, on).await
    }

    /// Refuses an image that is damaged by its own account. One that was not copied to
    /// its end is: qemu-img would read zeroes where the rest should be. Formats that
    /// cannot be checked pass.
    async fn check(&self, source: ImageAt<'_>, format: &str, deadline: Duration) -> Result<(), QemuError> {
        /// Of qemu-img's manual, "check": the check was completed, the image is corrupted.
        const CORRUPTED: i32 = 2;
        let doing = format!("copy {}", source.path().display());
        let (options, name) = source.opened_as(format);
        let checking = Command::new(&self.program)
            .args(["check", "-q"])
            .args(options)
            .arg(name)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // A line for each cluster; which ones they are helps nobody here.
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .status();
        let status = timeout(deadline, checking)
            .await
            .map_err(|_| QemuError::TooSlow { doing: doing.clone(), after: deadline })?
            .map_err(|error| not_started(&self.program, PACKAGE, error))?;
        if status.code() == Some(CORRUPTED) {
            let why = "it is damaged, or was not copied here to its end: fetch it again";
            return Err(QemuError::Image { doing, why: why.into() });
        }
        Ok(())
    }

    async fn copy(
        &self,
        source: ImageAt<'_>,
        source_format: &str,
        to: [&OsStr; 3],
        how: &[&OsStr],
        deadline: Duration,
        on: impl FnMut(f64) + Send,
    ) -> Result<(), QemuError> {
        let doing = format!("copy {}", source.path().display());
        let copying = self.copy_for_long(source, source_format, to, how, on);
        timeout(deadline, copying).await.map_err(|_| QemuError::TooSlow { doing, after: deadline })?
    }

    async fn copy_for_long(
        &self,
        source: ImageAt<'_>,
        source_format: &str,
        [option, format, target]: [&OsStr; 3],
        how: &[&OsStr],
        mut on: impl FnMut(f64) + Send,
    ) -> Result<(), QemuError> {
        let doing = format!("copy {}", source.path().display());
        let (options, name) = source.opened_as(source_format);
        let mut child = Command::new(&self.program)
            .env("LC_ALL", "C.UTF-8")
            .args(["convert", "-p"])
            .args(options)
            .args(how)
            .args([option, format, &name, target])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| not_started(&self.program, PACKAGE, error))?;
        let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
        let progress = async {
            let Some(stdout) = &mut stdout else { return };
            // One report is some 20 bytes, "    (12.34/100%)\r".
            let mut line = Vec::with_capacity(64);
            let mut chunk = [0; 1024];
            while let Ok(read @ 1..) = stdout.read(&mut chunk).await {
                for byte in &chunk[..read] {
                    if matches!(byte, b'\r' | b'\n') {
                        if let Some(fraction) = parse_progress(&line) {
                            on(fraction);
                        }
                        line.clear();
                    } else if line.len() < 64 {
                        line.push(*byte);
                    }
                }
            }
        };
        let complaints = async {
            let mut text = Vec::new();
            if let Some(stderr) = &mut stderr {
                // A little is kept, all is read, so that it never blocks.
                let mut chunk = [0; 1024];
                while let Ok(read @ 1..) = stderr.read(&mut chunk).await {
                    let room = 4096_usize.saturating_sub(text.len()).min(read);
                    text.extend_from_slice(&chunk[..room]);
                }
            }
            text
        };
        let ((), complaints) = tokio::join!(progress, complaints);
        let status = child.wait().await.map_err(QemuError::io("cannot wait for qemu-img"))?;
        if status.success() {
            return Ok(());
        }
        Err(refusal(source.path(), &doing, &complaints))
    }

    /// What the image at `path` is, without disturbing a VM that uses it.
    ///
    /// # Errors
    /// [`QemuError::NotSelfContained`] when it refers to another file: its author
    /// could have named any file of this host. [`QemuError::Io`] when it is not
    /// there, [`QemuError::Image`] when it is none.
    pub async fn inspect(&self, image: impl Into<ImageAt<'_>>, deadline: Duration) -> Result<Image, QemuError> {
        let at = image.into();
        let path = at.path();
        let doing = format!("read {}", path.display());
        absolute(path)?;
        if let ImageAt::File(path) = at {
            let metadata = std::fs::metadata(path).map_err(QemuError::io(doing.clone()))?;
            if !metadata.is_file() && !metadata.file_type().is_block_device() {
                return Err(QemuError::Image { doing, why: "it is neither a file nor a disk".into() });
            }
        }
        let argument = at.argument();
        let mut image = self.describe(path, &argument, &doing, deadline).await?;
        if let Some(refers_to) = image.refers_to(Path::new(&argument)) {
            return Err(QemuError::NotSelfContained { path: path.to_owned(), refers_to });
        }
        if let Some(address) = self.is_vhd(at, &image.format, image.virtual_size, &doing, deadline).await? {
            image = self.describe(path, address.as_ref(), &doing, deadline).await?;
        }
        if !FORMATS.contains(&image.format.as_str()) {
            return Err(QemuError::Image {
                doing,
                why: format!("its format is {}: supported are {}", image.format, FORMATS.join(", ")),
            });
        }
        Ok(Image { format: image.format, virtual_bytes: image.virtual_size, actual_bytes: image.actual_size })
    }

    async fn describe(
        &self,
        path: &Path,
        argument: &OsStr,
        doing: &str,
        deadline: Duration,
    ) -> Result<Described, QemuError> {
        let arguments: [&OsStr; 4] = ["info".as_ref(), "-U".as_ref(), "--output=json".as_ref(), argument];
        let said = self.run(&arguments, path, doing, deadline).await?;
        serde_json::from_slice(&said).map_err(|error| QemuError::Image {
            doing: doing.to_owned(),
            why: format!("its answer is unreadable ({error})"),
        })
    }

    /// Makes a disk larger. Never smaller: that would cut data off.
    ///
    /// # Errors
    /// [`QemuError::Locked`] while a VM uses it (see [`crate::Qmp::block_resize`]),
    /// [`QemuError::Image`] when it is larger already.
    pub async fn resize(
        &self,
        path: &Path,
        format: DiskFormat,
        size_bytes: u64,
        deadline: Duration,
    ) -> Result<(), QemuError> {
        let doing = format!("resize {}", path.display());
        absolute(path)?;
        let size = size_bytes.to_string();
        let arguments: [&OsStr; 6] =
            ["resize".as_ref(), "-q".as_ref(), "-f".as_ref(), format.as_str().as_ref(), path.as_ref(), size.as_ref()];
        self.run(&arguments, path, &doing, deadline).await.map(drop)
    }

    pub(crate) async fn run(
        &self,
        arguments: &[&OsStr],
        path: &Path,
        doing: &str,
        deadline: Duration,
    ) -> Result<Vec<u8>, QemuError> {
        let output = output(&self.program, PACKAGE, arguments, doing, deadline).await?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        Err(refusal(path, doing, &output.stderr))
    }
}

impl Described {
    /// Another file that this image would make QEMU open.
    fn refers_to(&self, path: &Path) -> Option<String> {
        if let Some(backing) = &self.backing_filename {
            return Some(backing.clone());
        }
        let specific = &self.format_specific["data"];
        if let Some(file) = specific["data-file"].as_str() {
            return Some(file.to_owned());
        }
        let extents = specific["extents"].as_array()?;
        extents
            .iter()
            .filter_map(|extent| extent["filename"].as_str())
            .find(|file| Path::new(file) != path)
            .map(str::to_owned)
    }
}

/// A file that is being made; deleted unless it is kept.
struct Partial {
    file: NamedTempFile,
    path: PathBuf,
}

impl Partial {
    /// Begins a file beside `path`, and removes what an interrupted attempt left.
    fn beside(path: &Path) -> Result<Partial, QemuError> {
        absolute(path)?;
        let doing = || format!("cannot make {}", path.display());
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(QemuError::io(doing())(std::io::ErrorKind::InvalidInput.into()));
        };
        if path.symlink_metadata().is_ok() {
            return Err(QemuError::Exists { path: path.to_owned() });
        }
        let mut prefix = std::ffi::OsString::from(".");
        prefix.push(name);
        prefix.push(".partial-");
        // Whoever may still be making one finds it gone when it wants to rename
        // it, and fails.
        for entry in std::fs::read_dir(directory).map_err(QemuError::io(doing()))?.flatten() {
            let left = entry.file_name();
            if left.as_encoded_bytes().starts_with(prefix.as_encoded_bytes()) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
        let file = tempfile::Builder::new().prefix(&prefix).tempfile_in(directory).map_err(QemuError::io(doing()))?;
        Ok(Partial { file, path: path.to_owned() })
    }

    fn path(&self) -> &Path {
        self.file.path()
    }

    /// Takes room on the file system for everything that it may hold. Where that has to
    /// be written, it takes long.
    async fn take_room(&self) -> Result<(), QemuError> {
        let doing = format!("cannot take room for all of {}", self.path.display());
        let path = self.path().to_owned();
        let take = move || {
            let file = File::options().read(true).write(true).open(path)?;
            let bytes = i64::try_from(file.metadata()?.len()).map_err(std::io::Error::other)?;
            Ok(nix::fcntl::posix_fallocate(file.as_fd(), 0, bytes)?)
        };
        blocking(&doing, take).await
    }

    /// Flushes it and gives it its name.
    async fn keep(self) -> Result<(), QemuError> {
        let doing = format!("cannot make {}", self.path.display());
        // qemu-img may have replaced the file that the temporary one was.
        let temporary = self.file.path().to_owned();
        blocking(&doing, move || File::open(temporary)?.sync_all()).await?;
        let path = self.path;
        self.file.persist_noclobber(&path).map_err(|error| {
            if error.error.kind() == std::io::ErrorKind::AlreadyExists {
                return QemuError::Exists { path: path.clone() };
            }
            QemuError::io(doing.clone())(error.error)
        })?;
        let directory = path.parent().map(Path::to_owned).unwrap_or_default();
        blocking(&doing, move || File::open(directory)?.sync_all()).await
    }
}

/// Runs something that may wait for the disk.
async fn blocking(doing: &str, work: impl FnOnce() -> std::io::Result<()> + Send + 'static) -> Result<(), QemuError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(std::io::Error::other(error)))
        .map_err(QemuError::io(doing))
}

/// A path that starts with `/` cannot be taken for one of QEMU's protocols
/// (`nbd:…`, `json:…`) or for an option.
fn absolute(path: &Path) -> Result<(), QemuError> {
    if path.is_absolute() {
        return Ok(());
    }
    Err(QemuError::Image { doing: format!("use {}", path.display()), why: "the path must be absolute".into() })
}

fn refusal(path: &Path, doing: &str, stderr: &[u8]) -> QemuError {
    let text = String::from_utf8_lossy(stderr);
    // Only the wording of the error depends on this.
    if text.contains("Failed to get") && text.contains("lock") {
        return QemuError::Locked { path: path.to_owned() };
    }
    let line = text.lines().find(|line| !line.trim().is_empty());
    let line = line.unwrap_or("it said nothing");
    QemuError::Image { doing: doing.to_owned(), why: line.strip_prefix("qemu-img: ").unwrap_or(line).to_owned() }
}

fn parse_progress(line: &[u8]) -> Option<f64> {
    let text = std::str::from_utf8(line).ok()?.trim();
    let percent = text.strip_prefix('(')?.strip_suffix("/100%)")?;
    let percent: f64 = percent.trim().parse().ok()?;
    Some((percent / 100.0).clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_as_qemu_img_prints_it() {
        assert_eq!(parse_progress(b"    (12.50/100%)"), Some(0.125));
        assert_eq!(parse_progress(b"    (100.00/100%)"), Some(1.0));
        assert_eq!(parse_progress(b"nothing"), None);
    }
}
