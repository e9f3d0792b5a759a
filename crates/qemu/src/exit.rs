//! Why did QEMU end? From its exit status and its last words to a sentence.
//!
//! Only for people: QEMU's texts change, so nothing is decided by these.

use std::fmt;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It returned this code.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

/// Why a QEMU ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExitReason {
    /// It was asked to end.
    Quit,
    /// It was killed.
    Killed {
        /// By which signal.
        signal: i32,
    },
    /// It crashed.
    Crashed {
        /// By which signal.
        signal: i32,
        /// What it said last.
        last: String,
    },
    /// Another QEMU has the image open.
    ImageLocked {
        /// The image, where QEMU says so.
        image: Option<String>,
    },
    /// A file is missing.
    FileMissing {
        /// Which.
        file: String,
    },
    /// A file may not be opened.
    FileDenied {
        /// Which.
        file: String,
    },
    /// A disk has another format than the VM's description says.
    WrongFormat {
        /// The format that was expected.
        expected: String,
    },
    /// The file system cannot do direct I/O.
    NoDirectIo,
    /// The host has too little memory.
    OutOfMemory,
    /// A tap could not be opened.
    Tap {
        /// The interface; empty when none could.
        interface: String,
        /// Why.
        why: String,
    },
    /// KVM cannot be used.
    NoKvm,
    /// This QEMU does not have the machine type.
    MachineUnknown,
    /// This QEMU does not have the processor model.
    CpuUnknown {
        /// Which.
        model: String,
    },
    /// A socket or port could not be bound.
    Bind {
        /// What QEMU says.
        what: String,
    },
    /// A guest that came from another QEMU could not be taken over.
    MigrationRefused {
        /// What QEMU says.
        what: String,
    },
    /// Something else.
    Other {
        /// The exit code.
        code: i32,
        /// What it said last.
        last: String,
    },
}

impl ExitReason {
    /// Finds the reason from the exit and the end of what QEMU wrote to its
    /// standard error since its start.
    pub fn find(exit: Exit, log: &str) -> ExitReason {
        let words = || log.lines().map(message).filter(|line| !is_noise(line));
        let last = || words().next_back().unwrap_or_default().to_owned();
        let code = match exit {
            Exit::Code(0) => return ExitReason::Quit,
            Exit::Code(code) => code,
            Exit::Signal(signal @ (nix::libc::SIGKILL | nix::libc::SIGTERM)) => {
                return ExitReason::Killed { signal };
            }
            Exit::Signal(signal) => {
                return ExitReason::Crashed { signal, last: last() };
            }
        };
        // The first complaint is the cause, later ones are its consequences;
        // but a lock's second line names the image.
        words()
            .find_map(explain)
            .map(|reason| match reason {
                ExitReason::ImageLocked { .. } => ExitReason::ImageLocked {
                    image: words().find_map(|line| between(line, "using the image [", "]")).map(str::to_owned),
                },
                reason => reason,
            })
            .unwrap_or_else(|| ExitReason::Other { code, last: last() })
    }
}

fn explain(line: &str) -> Option<ExitReason> {
    let has = |text: &str| line.contains(text);
    let file = || {
        let open = between(line, "pen '", "'").or_else(|| between(line, "file '", "'"));
        open.unwrap_or_default().to_owned()
    };
    Some(if has("Failed to get \"write\" lock") || has("Failed to get shared \"write\" lock") {
        ExitReason::ImageLocked { image: None }
    } else if has("cannot set up guest memory") || has("Cannot allocate memory") {
        ExitReason::OutOfMemory
    } else if has("could not configure /dev/net/tun") {
        ExitReason::Tap { interface: between(line, "/dev/net/tun (", ")").unwrap_or_default().into(), why: tail(line) }
    } else if has("could not open /dev/net/tun") {
        ExitReason::Tap { interface: String::new(), why: tail(line) }
    } else if has("failed to initialize kvm") || has("Could not access KVM kernel module") {
        ExitReason::NoKvm
    } else if has("unsupported machine type") {
        ExitReason::MachineUnknown
    } else if has("unable to find CPU model") {
        ExitReason::CpuUnknown { model: between(line, "model '", "'").unwrap_or_default().into() }
    } else if has("does not support O_DIRECT") {
        ExitReason::NoDirectIo
    } else if has("Image is not in ") {
        ExitReason::WrongFormat { expected: between(line, "Image is not in ", " format").unwrap_or_default().into() }
    } else if has("Failed to bind socket") || has("Address already in use") {
        ExitReason::Bind { what: line.into() }
    } else if (has("ould not open") || has("ould not load")) && has("No such file") {
        ExitReason::FileMissing { file: file() }
    } else if has("ould not open") && has("Permission denied") {
        ExitReason::FileDenied { file: file() }
    } else if has("load of migration failed") || has("error while loading state") || has("Unknown savevm section") {
        ExitReason::MigrationRefused { what: line.into() }
    } else {
        return None;
    })
}

/// A line without the time and the program's name.
fn message(line: &str) -> &str {
    let line = line.trim();
    let line = match line.split_once(' ') {
        Some((time, rest)) if time.ends_with('Z') && time.contains('T') => rest,
        _ => line,
    };
    match line.split_once(": ") {
        Some((program, rest)) if program.starts_with("qemu") => rest,
        _ => line,
    }
}

fn is_noise(line: &str) -> bool {
    line.is_empty() || line.starts_with("warning:") || line.starts_with("info:")
}

fn between<'a>(line: &'a str, before: &str, after: &str) -> Option<&'a str> {
    let (_, rest) = line.split_once(before)?;
    rest.split_once(after).map(|(found, _)| found)
}

fn tail(line: &str) -> String {
    line.rsplit(": ").next().unwrap_or(line).to_owned()
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ExitReason::Quit => write!(f, "QEMU ended as it was asked to"),
            ExitReason::Killed { signal } => write!(f, "QEMU was killed (signal {signal})"),
            ExitReason::Crashed { signal, last } if last.is_empty() => {
                write!(f, "QEMU crashed (signal {signal})")
            }
            ExitReason::Crashed { signal, last } => {
                write!(f, "QEMU crashed (signal {signal}); it said last: {last}")
            }
            ExitReason::ImageLocked { image } => write!(
                f,
                "the disk image {}is in use by another QEMU: end that one first",
                image.as_ref().map(|image| format!("{image} ")).unwrap_or_default()
            ),
            ExitReason::FileMissing { file } => {
                write!(f, "{file} is missing: is its volume mounted here?")
            }
            ExitReason::FileDenied { file } => {
                write!(f, "{file} may not be opened: check its owner and mode")
            }
            ExitReason::WrongFormat { expected } => {
                write!(f, "a disk image is not in {expected} format: the VM's description and the file disagree")
            }
            ExitReason::NoDirectIo => write!(
                f,
                "the volume's file system does not support direct I/O (O_DIRECT): put the disks on another one"
            ),
            ExitReason::OutOfMemory => {
                write!(f, "the host has not enough memory for this guest")
            }
            ExitReason::Tap { interface, why } if interface.is_empty() => {
                write!(f, "no tap interface could be opened ({why})")
            }
            ExitReason::Tap { interface, why } => {
                write!(f, "the tap interface {interface} could not be opened ({why})")
            }
            ExitReason::NoKvm => write!(f, "KVM cannot be used on this host"),
            ExitReason::MachineUnknown => {
                write!(f, "this host's QEMU does not know the VM's machine type: it is too old for this VM")
            }
            ExitReason::CpuUnknown { model } => {
                write!(f, "this host's QEMU does not know the processor model {model}")
            }
            ExitReason::Bind { what } => write!(f, "QEMU could not listen: {what}"),
            ExitReason::MigrationRefused { what } => {
                write!(f, "the guest could not be taken over: {what}")
            }
            ExitReason::Other { code, last } if last.is_empty() => {
                write!(f, "QEMU ended with code {code} and said nothing")
            }
            ExitReason::Other { code, last } => {
                write!(f, "QEMU ended with code {code}: {last}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(log: &str) -> ExitReason {
        ExitReason::find(Exit::Code(1), log)
    }

    #[test]
    fn what_qemu_7_and_10_say() {
        let locked = "2026-11-23T02:41:52.307428Z qemu-system-x86_64: -device virtio-blk-pci,drive=d: Failed to get \"write\" lock\n\
             Is another process using the image [/vol/a b.raw]?\n";
        assert_eq!(of(locked), ExitReason::ImageLocked { image: Some("/vol/a b.raw".into()) });
        assert_eq!(
            of(
                "2026-11-23T02:41:52Z qemu-system-x86_64: -blockdev {\"driver\":\"file\"}: Could not open '/nope/d.raw': No such file or directory"
            ),
            ExitReason::FileMissing { file: "/nope/d.raw".into() }
        );
        assert_eq!(
            of("qemu: could not open kernel file '/nope/k': No such file or directory"),
            ExitReason::FileMissing { file: "/nope/k".into() }
        );
        assert_eq!(
            of("2026-11-23T02:41:56Z qemu-system-x86_64: warning: netdev n has no peer\n\
                 2026-11-23T02:41:56Z qemu-system-x86_64: -netdev {}: could not configure /dev/net/tun (tap7): Device or resource busy"),
            ExitReason::Tap { interface: "tap7".into(), why: "Device or resource busy".into() }
        );
        assert_eq!(
            of("qemu-system-x86_64: cannot set up guest memory 'ram': Cannot allocate memory"),
            ExitReason::OutOfMemory
        );
        assert_eq!(
            of("qemu-system-x86_64: unsupported machine type: \"pc-q35-99.1\"\nUse -machine help"),
            ExitReason::MachineUnknown
        );
        assert_eq!(
            of(
                "Could not access KVM kernel module: Permission denied\nqemu-system-x86_64: -accel kvm: failed to initialize kvm: Permission denied"
            ),
            ExitReason::NoKvm
        );
        assert_eq!(
            of("qemu-system-x86_64: -blockdev {}: Image is not in qcow2 format"),
            ExitReason::WrongFormat { expected: "qcow2".into() }
        );
    }

    #[test]
    fn ends_without_an_explanation() {
        assert_eq!(ExitReason::find(Exit::Code(0), "noise"), ExitReason::Quit);
        assert_eq!(ExitReason::find(Exit::Signal(9), "noise"), ExitReason::Killed { signal: 9 });
        assert_eq!(
            ExitReason::find(Exit::Signal(6), "a\nassertion failed\n\n"),
            ExitReason::Crashed { signal: 6, last: "assertion failed".into() }
        );
        assert_eq!(
            of("qemu-system-x86_64: something new: and odd").to_string(),
            "QEMU ended with code 1: something new: and odd"
        );
        assert_eq!(of("").to_string(), "QEMU ended with code 1 and said nothing");
    }
}
