//! The data path: serves the disks of VMs, from files and devices, to QEMU.
//!
//! ```text
//!  guest ─ QEMU ─ NBD over a unix socket ─ [Server] ─ io_uring, O_DIRECT ─ storage
//! ```
//! The only crate that does I/O for guests. It submits no write while its
//! [`Fence`] is closed: what comes then waits, and QEMU sees a slow request.
//!
//! What is durable: whatever was answered before a flush was asked for is on
//! stable storage when the flush is answered, on whichever connection; a write with
//! FUA is when it is answered. What was answered without either may be lost with
//! the host, as in any disk with a cache.

mod buffer;
mod connection;
mod engine;
mod export;
pub mod lun;
pub mod nbd;
mod order;
mod ring;
mod server;

pub use export::{DiskSpec, Export, Fence, Open, OpenError};
pub use server::Server;
