//! What can go wrong, in words for the person who has to put it right.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why the network could not be brought into the wanted state.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The netlink socket could not be opened.
    #[error("cannot open a netlink socket; run as root or with CAP_NET_ADMIN")]
    Open(#[source] io::Error),

    /// The task that serves the netlink socket has ended.
    #[error("{doing}: the netlink connection is closed; open it again")]
    Closed {
        /// What was being done.
        doing: String,
    },

    /// The kernel did not answer.
    #[error("{doing}: no answer from the kernel within {} ms; whether it happened is unknown", .after.as_millis())]
    Timeout {
        /// What was being done.
        doing: String,
        /// How long the answer was waited for.
        after: Duration,
    },

    /// The kernel said no.
    #[error("{doing}")]
    Kernel {
        /// What was being done, to what.
        doing: String,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },

    /// The kernel answered with something that is not an answer to the question.
    #[error("{doing}: unexpected netlink answer: {answer}")]
    Protocol {
        /// What was being done.
        doing: String,
        /// The answer as text.
        answer: String,
    },

    /// A switch, tap or interface name that cannot be used.
    #[error("{what} name {name:?} cannot be used: {why}")]
    InvalidName {
        /// Switch, tap, bridge or uplink.
        what: &'static str,
        /// The name as given.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },

    /// An MTU outside of what a tap can carry.
    #[error("tap {tap}: an MTU of {mtu} bytes is not possible; choose 68 to 65521")]
    InvalidMtu {
        /// The tap.
        tap: String,
        /// The MTU as given, in bytes.
        mtu: u32,
    },

    /// A VLAN id outside of 802.1Q's range.
    #[error("tap {tap}: VLAN {vlan} does not exist; choose 1 to 4094")]
    InvalidVlan {
        /// The tap.
        tap: String,
        /// The VLAN id as given.
        vlan: u16,
    },

    /// Another thing already has the name.
    #[error("interface {name} exists already and {what}; remove or rename it, or choose another name")]
    NameTaken {
        /// The interface.
        name: String,
        /// What it is instead.
        what: String,
    },

    /// The uplink of an external switch does not exist on this host.
    #[error(
        "switch {switch}: uplink {uplink} does not exist on this host; check the cable, the driver and the name (ip link)"
    )]
    UplinkMissing {
        /// The switch.
        switch: String,
        /// Its uplink.
        uplink: String,
    },

    /// The uplink carries the host's own addresses.
    #[error(
        "switch {switch}: uplink {uplink} carries the host's address {}; making it a port of a switch would cut the host off: name the host's bridge instead (move the address to one), or another NIC",
        .addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    )]
    UplinkHasAddresses {
        /// The switch.
        switch: String,
        /// Its uplink.
        uplink: String,
        /// The addresses.
        addresses: Vec<IpAddr>,
    },

    /// The uplink is already a port of something else.
    #[error(
        "switch {switch}: uplink {uplink} belongs to {master} already; name {master} as the uplink, or another NIC"
    )]
    UplinkInUse {
        /// The switch.
        switch: String,
        /// Its uplink.
        uplink: String,
        /// The bridge, bond or VRF that it is a port of.
        master: String,
    },

    /// The uplink is of a kind that leads nowhere.
    #[error("switch {switch}: {uplink} cannot be an uplink: it is {what}; name a NIC or a bridge")]
    UplinkUnsuitable {
        /// The switch.
        switch: String,
        /// Its uplink.
        uplink: String,
        /// What it is.
        what: &'static str,
    },

    /// A switch cannot go while NICs are plugged into it.
    #[error("switch {switch} still has ports: {}; remove them first", .ports.join(", "))]
    SwitchInUse {
        /// The switch.
        switch: String,
        /// The interfaces that are on it.
        ports: Vec<String>,
    },

    /// The bridge is not there.
    #[error("{bridge} is not a bridge on this host; make the switch first")]
    NoBridge {
        /// The name as given.
        bridge: String,
    },

    /// A bridge of the host's own that does not filter VLANs.
    #[error(
        "tap {tap}: bridge {bridge} does not filter VLANs and is the host's own, so it is left alone; turn vlan_filtering on there, or use another switch for VLAN {vlan}"
    )]
    BridgeWithoutVlans {
        /// The tap.
        tap: String,
        /// The bridge.
        bridge: String,
        /// The wanted VLAN.
        vlan: u16,
    },

    /// The kernel was built without VLAN filtering in bridges.
    #[error(
        "tap {tap}: this host's kernel cannot filter VLANs in a bridge (CONFIG_BRIDGE_VLAN_FILTERING); use another kernel, or a switch whose uplink is a VLAN interface instead of VLAN {vlan}"
    )]
    KernelWithoutVlans {
        /// The tap.
        tap: String,
        /// The wanted VLAN.
        vlan: u16,
    },

    /// The tap is not there, or is on another bridge.
    #[error("tap {tap} is not a port of bridge {bridge}; make it first")]
    NoTap {
        /// The tap.
        tap: String,
        /// The bridge.
        bridge: String,
    },

    /// A tap could not be made or opened.
    #[error("tap {tap}: {doing}")]
    Tap {
        /// The tap.
        tap: String,
        /// What failed.
        doing: &'static str,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// The kernel's error number, where it gave one.
    pub(crate) fn errno(&self) -> Option<i32> {
        match self {
            Error::Kernel { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}
