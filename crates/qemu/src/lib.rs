//! QEMU: its command line, its monitor protocol, its migrations, its images.
//!
//! The only crate that speaks QMP and knows QEMU's options. It starts no
//! guests: [`Launch::argv`] says how one is started, somebody else (the keeper)
//! is its parent, and [`Qmp::connect`] talks to whatever answers on the socket.
//! An agent that was restarted therefore adopts running guests by the same road
//! by which it meets new ones.
//!
//! QEMU 7.2 to 10 are supported: unknown events, fields and states are
//! tolerated everywhere, and nothing is decided by matching on QEMU's texts
//! except [`ExitReason`], which only explains.

mod arrival;
mod binary;
mod command_line;
mod console;
mod convergence;
mod error;
mod exit;
mod image;
mod kvm;
mod migration;
mod program;
mod qmp;
mod word;

pub use arrival::Arrival;
pub use binary::Binary;
pub use command_line::{DiskAt, Kernel, Launch, NBD_EXPORT};
pub use console::trim_log;
pub use convergence::{Convergence, MigrationSettings};
pub use error::QemuError;
pub use exit::{Exit, ExitReason};
pub use image::{Image, ImageAt, Layout, QemuImg, nbd_address};
pub use migration::{Begun, Cancelled, Outcome, Step, cancel, prepare_incoming, progress, start, watch};
pub use qmp::{
    BlockStats, Event, Identity, MigrationProgress, MigrationStatus, Qmp, RamProgress, RunState, Stamp, Status,
};
pub use word::{Role, Word, word};
