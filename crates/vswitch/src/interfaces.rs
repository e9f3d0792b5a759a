//! The networks that the host is on, and when they change.

use std::net::IpAddr;
use std::pin::pin;

use futures_util::StreamExt;
use rtnetlink::{MulticastGroup, new_multicast_connection};
use tokio::sync::mpsc;

use crate::Vswitch;
use crate::error::{Error, Result};
use crate::link::{Addresses, Link, Shape};
use crate::sys;

/// A network interface of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Interface name.
    pub name: String,
    /// What it is.
    pub kind: InterfaceKind,
    /// Its address, if it is Ethernet.
    pub mac: Option<[u8; 6]>,
    /// MTU in bytes.
    pub mtu: u32,
    /// Whether it is switched on.
    pub up: bool,
    /// Whether a cable with somebody at the other end is in it.
    pub carrier: bool,
    /// Link speed in Mbit/s, where the driver knows one.
    pub speed_mbps: Option<u32>,
    /// Usable addresses with their prefix lengths; no link-local IPv6 ones.
    pub addresses: Vec<(IpAddr, u8)>,
    /// The bridge, bond or VRF that it is a port of.
    pub master: Option<String>,
}

/// What an interface is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum InterfaceKind {
    /// A NIC with a driver of its own.
    Nic,
    /// A bridge.
    Bridge,
    /// A bond.
    Bond,
    /// A VLAN on another interface.
    Vlan,
    /// One end of a virtual cable: how a host that is itself a container has its NICs.
    Veth,
    /// Another virtual interface.
    Other,
}

impl Vswitch {
    /// The interfaces that lead to the host's real networks, by name: no loopback, no taps, no
    /// containers' ends of foreign bridges, no bridge of a switch that leads nowhere.
    ///
    /// # Errors
    /// The kernel refuses or does not answer.
    pub async fn interfaces(&self) -> Result<Vec<Interface>> {
        let links = self.links().await?;
        let mut addresses = self.addresses(Addresses::Usable).await?;
        let socket = sys::query_socket().map_err(Error::Open)?;
        let mut interfaces: Vec<Interface> = links
            .values()
            .filter_map(|link| {
                let addresses = addresses.remove(&link.index).unwrap_or_default();
                let master = link.master.and_then(|index| links.get(&index));
                leads_out(link, master, !addresses.is_empty()).then(|| Interface {
                    name: link.name.clone(),
                    kind: kind(link),
                    mac: link.mac,
                    mtu: link.mtu,
                    up: link.up,
                    carrier: link.up && link.carrier,
                    speed_mbps: sys::link_speed(&socket, &link.name),
                    addresses,
                    master: master.map(|master| master.name.clone()),
                })
            })
            .collect();
        interfaces.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(interfaces)
    }

    /// Tells when links or addresses have changed in this namespace: one message, however many
    /// changes came since the last one was taken. Subscribe first and list then, and no change is
    /// missed. Ends when the receiver is dropped.
    ///
    /// # Errors
    /// [`Error::Open`] when the kernel refuses the socket.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn watch(&self) -> Result<mpsc::Receiver<()>> {
        let (connection, handle, mut messages) =
            new_multicast_connection(&[MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr])
                .map_err(Error::Open)?;
        let (changed, changes) = mpsc::channel(1);
        tokio::spawn(async move {
            // Without a handle the connection would end.
            let _handle = handle;
            let mut connection = pin!(connection);
            loop {
                tokio::select! {
                    () = &mut connection => return,
                    () = changed.closed() => return,
                    message = messages.next() => match message {
                        // A full channel means that the reader has yet to look anyway. What the
                        // message says does not matter, not even that some were lost.
                        Some(_) => drop(changed.try_send(())),
                        None => return,
                    },
                }
            }
        });
        Ok(changes)
    }
}

fn kind(link: &Link) -> InterfaceKind {
    match link.shape {
        Shape::Nic => InterfaceKind::Nic,
        Shape::Bridge(_) => InterfaceKind::Bridge,
        Shape::Bond => InterfaceKind::Bond,
        Shape::Vlan => InterfaceKind::Vlan,
        Shape::Veth => InterfaceKind::Veth,
        Shape::Tun { .. } | Shape::Other(_) => InterfaceKind::Other,
    }
}

fn leads_out(link: &Link, master: Option<&Link>, has_addresses: bool) -> bool {
    if link.loopback || link.is_tun() {
        return false;
    }
    if let Some(mark) = link.mark() {
        // On an internal switch every host may have the same address: that is not a shared network.
        return mark.uplink.is_some() && has_addresses;
    }
    match (&link.shape, master) {
        // The uplink of a switch of ours stays visible, containers on docker0 and the like do not.
        (Shape::Veth, Some(master)) => master.mark().is_some() || master.bridge().is_none(),
        // The kernel's fallback tunnel devices (sit0, tunl0 ...) are there unasked.
        (Shape::Other(_), _) => link.ethernet || has_addresses,
        _ => true,
    }
}
