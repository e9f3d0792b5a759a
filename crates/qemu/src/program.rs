//! Runs one of QEMU's programs to its end, within a deadline.

use std::io::ErrorKind;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use crate::QemuError;

/// The output of `program`, which is killed when the deadline passes or the
/// caller goes away.
pub(crate) async fn output(
    program: &Path,
    package: &'static str,
    arguments: impl IntoIterator<Item = impl AsRef<std::ffi::OsStr>>,
    doing: &str,
    deadline: Duration,
) -> Result<Output, QemuError> {
    let child = Command::new(program)
        .args(arguments)
        // Its messages are read.
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| not_started(program, package, source))?;
    timeout(deadline, child.wait_with_output())
        .await
        .map_err(|_| QemuError::TooSlow { doing: doing.to_owned(), after: deadline })?
        .map_err(QemuError::io(format!("cannot read what {} says", program.display())))
}

/// Why a program could not be started.
pub(crate) fn not_started(program: &Path, package: &'static str, source: std::io::Error) -> QemuError {
    match source.kind() {
        ErrorKind::NotFound => QemuError::Missing { program: program.to_owned(), package },
        _ => QemuError::io(format!("cannot run {}", program.display()))(source),
    }
}
