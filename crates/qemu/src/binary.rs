//! What the installed QEMU is and can do.

use std::path::{Path, PathBuf};
use std::time::Duration;

use holdfast_core::Accelerator;

use crate::program::output;
use crate::{QemuError, kvm};

/// The Debian package that brings QEMU.
const PACKAGE: &str = "qemu-system-x86";

/// The oldest QEMU that can be driven.
const OLDEST: (u32, u32, u32) = (7, 2, 0);

/// How long QEMU may take to describe itself.
const DEADLINE: Duration = Duration::from_secs(10);

/// A QEMU that is installed and new enough.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binary {
    /// The program.
    pub path: PathBuf,
    /// Its version: major, minor, micro.
    pub version: (u32, u32, u32),
    /// The versioned machine types that it offers (`pc-q35-7.2`), newest last.
    pub machines: Vec<String>,
    /// How it runs guests here.
    pub accelerator: Accelerator,
    /// Why not on KVM; `None` when it is.
    pub no_kvm: Option<String>,
    /// Whether the kernel moves packets for its guests (`/dev/vhost-net`).
    pub vhost_net: bool,
}

impl Binary {
    /// Looks at the QEMU at `path` (or of that name on the search path), and
    /// runs a small guest under KVM to see whether KVM works. Takes well under a
    /// second, or five more when KVM hangs; keep the result.
    ///
    /// # Errors
    /// [`QemuError::Missing`], [`QemuError::TooOld`], [`QemuError::Odd`] when it
    /// is something else.
    pub async fn probe(path: &Path) -> Result<Binary, QemuError> {
        let version = ask(path, "--version").await?;
        let version = parse_version(&version).ok_or_else(|| odd(path, "--version", &version))?;
        if version < OLDEST {
            return Err(QemuError::TooOld { program: path.to_owned(), version });
        }
        // Without an accelerator's name some builds try KVM first and fail.
        let listed = ask(path, "-machine help").await?;
        let machines = parse_machines(&listed);
        if machines.is_empty() {
            return Err(odd(path, "-machine help", &listed));
        }
        let no_kvm = kvm::probe(path).await.err();
        let accelerator = match no_kvm {
            None => Accelerator::Kvm,
            Some(_) => Accelerator::Tcg,
        };
        Ok(Binary {
            path: path.to_owned(),
            version,
            machines,
            accelerator,
            no_kvm,
            vhost_net: accelerator == Accelerator::Kvm && Path::new("/dev/vhost-net").exists(),
        })
    }

    /// The machine type that new VMs get: the newest.
    pub fn machine(&self) -> &str {
        self.machines.last().map_or("", String::as_str)
    }
}

async fn ask(path: &Path, question: &'static str) -> Result<String, QemuError> {
    let doing = format!("{} {question}", path.display());
    let answer = output(path, PACKAGE, question.split(' '), &doing, DEADLINE).await?;
    let text = String::from_utf8_lossy(&answer.stdout).into_owned();
    if answer.status.success() {
        return Ok(text);
    }
    Err(odd(path, question, &String::from_utf8_lossy(&answer.stderr)))
}

fn odd(path: &Path, question: &'static str, answer: &str) -> QemuError {
    QemuError::Odd { program: path.to_owned(), question, answer: answer.trim().chars().take(120).collect() }
}

fn parse_version(text: &str) -> Option<(u32, u32, u32)> {
    let rest = text.strip_prefix("QEMU emulator version ")?;
    let number = rest.split([' ', '\n', '(']).next()?;
    let mut parts = number.split('.').map(|part| part.parse().ok());
    Some((parts.next()??, parts.next()??, parts.next().flatten().unwrap_or(0)))
}

fn parse_machines(text: &str) -> Vec<String> {
    let mut machines: Vec<(Vec<u32>, String)> = text
        .lines()
        .filter_map(|line| {
            let name = line.split_whitespace().next()?;
            let version = name.strip_prefix("pc-q35-")?;
            let numbers: Option<Vec<u32>> = version.split('.').map(|part| part.parse().ok()).collect();
            Some((numbers?, name.to_owned()))
        })
        .collect();
    machines.sort();
    machines.into_iter().map(|(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_distributions() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright";
        assert_eq!(parse_version(debian), Some((7, 2, 22)));
        assert_eq!(parse_version("QEMU emulator version 10.0.2\n"), Some((10, 0, 2)));
        assert_eq!(parse_version("QEMU emulator version 9.2.0-rc1 (v9)"), Some((9, 2, 0)));
        assert_eq!(parse_version("bash 5.2"), None);
    }

    #[test]
    fn machines_are_sorted_as_versions_and_aliases_left_out() {
        let listed = "Supported machines are:\n\
             q35                  Standard PC (alias of pc-q35-10.0)\n\
             pc-q35-10.0          Standard PC (Q35 + ICH9, 2009)\n\
             pc-q35-2.12          Standard PC (Q35 + ICH9, 2009) (deprecated)\n\
             pc-q35-9.2           Standard PC (Q35 + ICH9, 2009)\n\
             pc-q35-4.0.1         Standard PC\n\
             pc-q35-4.0           Standard PC\n\
             pc-i440fx-9.2        Standard PC\n";
        assert_eq!(parse_machines(listed), ["pc-q35-2.12", "pc-q35-4.0", "pc-q35-4.0.1", "pc-q35-9.2", "pc-q35-10.0"]);
    }
}
