//! The monitor protocol: one connection, typed commands, a stream of events.
//!
//! ```text
//!  callers ──execute──▶ pending[id] + write half ──▶ QEMU
//!     ▲                      ▲                        │
//!     └────── oneshot ───────┤ reader task ◀──────────┘
//!  subscribers ◀─ broadcast ─┘   (ends: every pending command is Gone)
//! ```
//!
//! A command whose deadline passes breaks the connection: its answer could
//! still come, and a monitor that hangs once is not to be queued behind.

mod client;
mod commands;
mod event;
mod state;

pub use client::Qmp;
pub use commands::{BlockStats, Identity};
pub use event::{Event, Stamp};
pub use state::{MigrationProgress, MigrationStatus, RamProgress, RunState, Status};
