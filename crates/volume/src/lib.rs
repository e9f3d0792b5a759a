//! The data path: serves the disks of VMs, from files and devices, to QEMU.
//!
//! ```text
//!  guest ─ QEMU ─ NBD over a unix socket ─ [Server] ─ io_uring, O_DIRECT ─ storage
//! ```
//! A disk is a file or a device ([`Export::open`]), or a list of slabs of a [`Lun`] (a device
//! or an export of an NBD server) that many disks share ([`Export::on_lun`]), in which case slabs come from an
//! [`Allocator`] when they are first written to, and go back when they are discarded.
//!
//! The only crate that does I/O for guests. It submits no write while its
//! [`Fence`] is closed: what comes then waits, and QEMU sees a slow request.
//!
//! What is durable: whatever was answered before a flush was asked for is on
//! stable storage when the flush is answered, on whichever connection; a write with
//! FUA is when it is answered. What was answered without either may be lost with
//! the host, as in any disk with a cache.

mod buffer;
mod connection;
mod device;
mod engine;
mod export;
pub mod link;
pub mod lun;
pub mod nbd;
mod order;
mod parts;
mod paths;
mod piece;
mod pipe;
mod remote;
mod ring;
mod server;
mod tally;

pub use device::Lun;
pub use export::{DiskSpec, Export, Fence, LunDisk, Open, OpenError};
pub use parts::{Allocator, Grant, Refusal, Release, Wanted};
pub use paths::{Carried, Hears, Reach};
pub use pipe::Pipe;
pub use remote::SETTLES_WITHIN;
pub use server::{Hosted, Server};
pub use tally::Counters;
