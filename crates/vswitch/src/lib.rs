//! The network of the guests: bridges, taps and VLANs.
//!
//! A virtual switch is a Linux bridge, a NIC of a VM is a tap on it:
//!
//! ```text
//!   guest ── tap hft1a2b3c4d-0 ──┐
//!   guest ── tap hft5e6f7a8b-0 ──┴─ bridge hf-NAME ── uplink NIC ── fabric    external
//!                                   bridge hf-NAME ── the host's IP stack     internal
//!                                   bridge hf-NAME                            private
//!   guest ── tap hft9c0d1e2f-0 ──── bridge vmbr0 (the host's own) ── NIC      external, uplink is a bridge
//! ```
//!
//! This is the only crate that names netlink. Everything acts in the network namespace of the
//! thread that called [`Vswitch::open`]; taps are made in the namespace of the thread that calls
//! [`Vswitch::ensure_tap`], so both must run in the same one. Every `ensure_` call is
//! level-triggered: it looks at what is there, changes only what differs, and may be repeated or
//! cut off at any point. Whatever was made here is recognised again by its name and its interface
//! alias, never by memory, so a restarted agent goes on where the last one ended.

mod error;
mod interfaces;
mod link;
mod name;
mod switch;
mod sys;
mod tap;
mod vlan;

use std::sync::Arc;

use rtnetlink::Handle;
use tokio::sync::Mutex;

pub use error::{Error, Result};
pub use interfaces::{Interface, InterfaceKind};
pub use name::{SWITCH_PREFIX, TAP_PREFIX, bridge_name, tap_name};
pub use switch::{Switch, SwitchKind};
pub use tap::{Tap, TapState, attach_tap};

/// A connection to the kernel's network configuration. Cheap to clone.
#[derive(Clone)]
pub struct Vswitch {
    handle: Handle,
    /// Changes read what is there first; two at once would act on what the other is changing.
    changing: Arc<Mutex<()>>,
    /// A netlink socket can list one thing at a time: the kernel refuses a second list with EBUSY.
    listing: Arc<Mutex<()>>,
}

impl Vswitch {
    /// Connects to the kernel in the calling thread's network namespace and spawns the task that
    /// serves the connection; it ends with the last clone.
    ///
    /// # Errors
    /// [`Error::Open`] when the kernel refuses the socket.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn open() -> Result<Vswitch> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(Error::Open)?;
        tokio::spawn(connection);
        Ok(Vswitch { handle, changing: Arc::default(), listing: Arc::default() })
    }
}
