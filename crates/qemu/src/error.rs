//! What can go wrong, in words for the person who has to put it right.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why something could not be done with QEMU.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QemuError {
    /// A program of QEMU's is not installed.
    #[error("{} is not there: install the package {package}, or name another path in the configuration", .program.display())]
    Missing {
        /// What was to be run.
        program: PathBuf,
        /// The Debian package that brings it.
        package: &'static str,
    },

    /// QEMU is older than what Holdfast can drive.
    #[error("{} is QEMU {}.{}.{}: at least 7.2 is needed", .program.display(), .version.0, .version.1, .version.2)]
    TooOld {
        /// What was run.
        program: PathBuf,
        /// The version that it reports.
        version: (u32, u32, u32),
    },

    /// A program of QEMU's answered with something else than expected.
    #[error("{} {question} gave no usable answer ({answer}): is it really QEMU?", .program.display())]
    Odd {
        /// What was run.
        program: PathBuf,
        /// With which option.
        question: &'static str,
        /// The beginning of its answer.
        answer: String,
    },

    /// A program could not be run, or a file not be touched.
    #[error("{doing}")]
    Io {
        /// What was being done, to what.
        doing: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },

    /// The VM's description cannot be turned into a command line.
    #[error("this VM cannot be started: {why}")]
    Unfit {
        /// What is wrong with it and what to do.
        why: String,
    },

    /// Nobody listens on the monitor's socket any more: QEMU has ended.
    #[error("QEMU is gone: nobody answers on {}", .socket.display())]
    Gone {
        /// The monitor's socket.
        socket: PathBuf,
    },

    /// QEMU did not answer in time. Whether the command was carried out is
    /// unknown; the connection cannot be used any more.
    #[error("no answer from QEMU on {} to {command} within {} ms: it may have been done all the same; connect again and ask", .socket.display(), .after.as_millis())]
    Timeout {
        /// The monitor's socket.
        socket: PathBuf,
        /// What was asked.
        command: &'static str,
        /// How long the answer was waited for.
        after: Duration,
    },

    /// QEMU said no.
    #[error("QEMU refused {command}: {desc}")]
    Refused {
        /// What was asked.
        command: &'static str,
        /// QEMU's error class, mostly `GenericError`.
        class: String,
        /// QEMU's reason.
        desc: String,
    },

    /// QEMU said something that the protocol does not allow.
    #[error("{} does not speak QMP as expected: {what}", .socket.display())]
    Protocol {
        /// The monitor's socket.
        socket: PathBuf,
        /// What was received, or what was missing.
        what: String,
    },

    /// The guest must not run here: it was handed to another QEMU, or is not
    /// wholly here yet.
    #[error("the guest on {} is in state {state}: it must not be continued here", .socket.display())]
    NotHere {
        /// The monitor's socket.
        socket: PathBuf,
        /// QEMU's run state.
        state: String,
    },

    /// There is already a file of that name.
    #[error("{} exists already: choose another name or delete it first", .path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },

    /// The image is in use by a running QEMU.
    #[error("{} is in use by a running VM: stop the VM first", .path.display())]
    Locked {
        /// The image.
        path: PathBuf,
    },

    /// The image would make QEMU open further files that its author chose.
    #[error("{} refers to another file ({refers_to}): flatten it first with qemu-img convert", .path.display())]
    NotSelfContained {
        /// The image.
        path: PathBuf,
        /// The file that it refers to.
        refers_to: String,
    },

    /// qemu-img said no.
    #[error("qemu-img could not {doing}: {why}")]
    Image {
        /// What was being done, to what.
        doing: String,
        /// What it said last.
        why: String,
    },

    /// A program took too long and was ended.
    #[error("{doing} was not done within {} s and was given up", .after.as_secs_f32())]
    TooSlow {
        /// What was being done.
        doing: String,
        /// The deadline.
        after: Duration,
    },
}

impl QemuError {
    /// Whether the QEMU that was talked to has certainly ended.
    pub fn is_gone(&self) -> bool {
        matches!(self, QemuError::Gone { .. })
    }

    pub(crate) fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> QemuError {
        let doing = doing.into();
        move |source| QemuError::Io { doing, source }
    }
}
