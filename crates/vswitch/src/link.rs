//! What netlink tells about interfaces, reduced to what matters here, and the few requests.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use rtnetlink::packet_core::Nla;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags};
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, BridgeStpState, In6AddrGenMode, InfoBridge, InfoData, InfoKind, InfoTun, LinkAttribute,
    LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::{LinkMessageBuilder, LinkUnspec};

use crate::Vswitch;
use crate::error::{Error, Result};

/// Longest time that the kernel may take for one answer. It holds one lock for all network
/// configuration, and tearing down a namespace can keep that for hundreds of milliseconds.
pub const DEADLINE: Duration = Duration::from_secs(5);

/// `IFLA_TUN_TYPE` and `IFLA_TUN_MULTI_QUEUE` of `linux/if_link.h`.
const IFLA_TUN_TYPE: u16 = 3;
const IFLA_TUN_MULTI_QUEUE: u16 = 7;

/// An interface as the kernel has it.
#[derive(Debug, Clone)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub shape: Shape,
    pub mac: Option<[u8; 6]>,
    pub mtu: u32,
    pub up: bool,
    pub carrier: bool,
    pub loopback: bool,
    pub arp: bool,
    pub ethernet: bool,
    pub master: Option<u32>,
    pub alias: Option<String>,
}

/// Which addresses of an interface count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Addresses {
    All,
    /// Not those that are being checked for duplicates, or that failed the check.
    Usable,
}

/// What an interface is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shape {
    /// No kind at all: a NIC with a driver of its own (or loopback).
    Nic,
    Bridge(BridgeSettings),
    Tun {
        tap: bool,
        multi_queue: bool,
    },
    Bond,
    Vlan,
    Veth,
    Other(String),
}

/// The settings of a bridge that matter to a switch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BridgeSettings {
    pub stp: bool,
    /// Hundredths of a second.
    pub forward_delay: u32,
    pub vlan_filtering: bool,
    pub default_pvid: u16,
    pub multicast_snooping: bool,
}

impl Link {
    pub fn bridge(&self) -> Option<BridgeSettings> {
        match self.shape {
            Shape::Bridge(settings) => Some(settings),
            _ => None,
        }
    }

    pub fn is_tun(&self) -> bool {
        matches!(self.shape, Shape::Tun { .. })
    }

    /// For messages: "it is ...".
    pub fn what(&self) -> &'static str {
        match self.shape {
            Shape::Nic if self.loopback => "the loopback interface",
            Shape::Nic => "a network card",
            Shape::Bridge(_) => "a bridge",
            Shape::Tun { tap: true, .. } => "a tap",
            Shape::Tun { tap: false, .. } => "a tunnel of a process",
            Shape::Bond => "a bond",
            Shape::Vlan => "a VLAN interface",
            Shape::Veth => "one end of a virtual cable",
            Shape::Other(_) => "a virtual interface",
        }
    }

    fn parse(message: LinkMessage) -> Link {
        let flags = message.header.flags;
        let mut link = Link {
            index: message.header.index,
            name: String::new(),
            shape: Shape::Nic,
            mac: None,
            mtu: 0,
            up: flags.contains(LinkFlags::Up),
            carrier: flags.contains(LinkFlags::LowerUp),
            loopback: flags.contains(LinkFlags::Loopback),
            arp: !flags.contains(LinkFlags::Noarp),
            ethernet: message.header.link_layer_type == LinkLayerType::Ether,
            master: None,
            alias: None,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
                LinkAttribute::Address(mac) => link.mac = mac.try_into().ok(),
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::Controller(master) => link.master = Some(master),
                LinkAttribute::LinkInfo(infos) => link.shape = shape(&infos),
                _ => {}
            }
        }
        link
    }
}

fn shape(infos: &[LinkInfo]) -> Shape {
    let kind = infos.iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    });
    let details = infos.iter().find_map(|info| match info {
        LinkInfo::Data(details) => Some(details),
        _ => None,
    });
    match (kind, details) {
        (None, _) => Shape::Nic,
        (Some(InfoKind::Bridge), Some(InfoData::Bridge(attributes))) => Shape::Bridge(bridge_settings(attributes)),
        (Some(InfoKind::Bridge), _) => Shape::Bridge(BridgeSettings::default()),
        (Some(InfoKind::Tun), details) => {
            let byte = |wanted: u16| match details {
                Some(InfoData::Tun(attributes)) => attributes.iter().find_map(|attribute| {
                    let InfoTun::Other(nla) = attribute else {
                        return None;
                    };
                    let mut value = vec![0; nla.value_len()];
                    nla.emit_value(&mut value);
                    (nla.kind() == wanted).then(|| value.first().copied()).flatten()
                }),
                _ => None,
            };
            Shape::Tun {
                tap: byte(IFLA_TUN_TYPE) == Some(libc::IFF_TAP as u8),
                multi_queue: byte(IFLA_TUN_MULTI_QUEUE) == Some(1),
            }
        }
        (Some(InfoKind::Bond), _) => Shape::Bond,
        (Some(InfoKind::Vlan), _) => Shape::Vlan,
        (Some(InfoKind::Veth), _) => Shape::Veth,
        (Some(other), _) => Shape::Other(other.to_string()),
    }
}

fn bridge_settings(attributes: &[InfoBridge]) -> BridgeSettings {
    let mut settings = BridgeSettings::default();
    for attribute in attributes {
        match attribute {
            InfoBridge::StpState(state) => settings.stp = *state != BridgeStpState::Disabled,
            InfoBridge::ForwardDelay(delay) => settings.forward_delay = *delay,
            InfoBridge::VlanFiltering(on) => settings.vlan_filtering = *on,
            InfoBridge::VlanDefaultPvid(vlan) => settings.default_pvid = *vlan,
            InfoBridge::MulticastSnooping(on) => settings.multicast_snooping = *on,
            _ => {}
        }
    }
    settings
}

/// No link-local address: a bridge or tap of guests is not a place where the host itself talks.
pub fn without_ipv6(builder: LinkMessageBuilder<LinkUnspec>) -> LinkMessageBuilder<LinkUnspec> {
    builder.append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![
        AfSpecInet6::AddrGenMode(In6AddrGenMode::None),
    ])]))
}

/// Waits for the kernel's answer, but not for ever.
pub async fn answer<T>(
    doing: impl Fn() -> String,
    request: impl Future<Output = std::result::Result<T, rtnetlink::Error>>,
) -> Result<T> {
    match tokio::time::timeout(DEADLINE, request).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(rtnetlink::Error::NetlinkError(message))) => {
            Err(Error::Kernel { doing: doing(), source: io::Error::from_raw_os_error(message.raw_code().abs()) })
        }
        Ok(Err(rtnetlink::Error::RequestFailed)) => Err(Error::Closed { doing: doing() }),
        Ok(Err(other)) => Err(Error::Protocol { doing: doing(), answer: other.to_string() }),
        Err(_) => Err(Error::Timeout { doing: doing(), after: DEADLINE }),
    }
}

impl Vswitch {
    /// The interface called `name`, if there is one.
    pub(crate) async fn link(&self, name: &str) -> Result<Option<Link>> {
        let mut answers = self.handle.link().get().match_name(name).execute();
        let found = answer(|| format!("look for interface {name}"), async { answers.next().await.transpose() }).await;
        match found {
            Ok(message) => Ok(message.map(Link::parse)),
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Every interface, by its index.
    pub(crate) async fn links(&self) -> Result<BTreeMap<u32, Link>> {
        let _alone = self.listing.lock().await;
        let messages: Vec<LinkMessage> =
            answer(|| "list the interfaces".to_owned(), self.handle.link().get().execute().try_collect()).await?;
        Ok(messages.into_iter().map(|message| (message.header.index, Link::parse(message))).collect())
    }

    /// The addresses of every interface with their prefix lengths, without link-local IPv6 ones:
    /// every NIC has one of those, and it is no use without a scope.
    pub(crate) async fn addresses(&self, which: Addresses) -> Result<BTreeMap<u32, Vec<(IpAddr, u8)>>> {
        let request = self.handle.address().get();
        let _alone = self.listing.lock().await;
        let messages: Vec<_> = answer(|| "list the addresses".to_owned(), request.execute().try_collect()).await?;
        let mut addresses: BTreeMap<u32, Vec<(IpAddr, u8)>> = BTreeMap::new();
        let unusable = AddressHeaderFlags::Tentative | AddressHeaderFlags::Dadfailed;
        for message in messages {
            if which == Addresses::Usable && message.header.flags.intersects(unusable) {
                continue;
            }
            // On a point-to-point link, "address" is the other end and "local" is ours.
            let mut address = None;
            for attribute in &message.attributes {
                match attribute {
                    AddressAttribute::Local(local) => address = Some(*local),
                    AddressAttribute::Address(own) => address = address.or(Some(*own)),
                    _ => {}
                }
            }
            let link_local = |address: &IpAddr| match address {
                IpAddr::V4(_) => false,
                IpAddr::V6(v6) => v6.is_unicast_link_local(),
            };
            if let Some(address) = address.filter(|address| !link_local(address)) {
                addresses.entry(message.header.index).or_default().push((address, message.header.prefix_len));
            }
        }
        for list in addresses.values_mut() {
            list.sort();
        }
        Ok(addresses)
    }

    /// Changes an interface that is there (`RTM_NEWLINK` without `NLM_F_CREATE`).
    pub(crate) async fn change(&self, doing: impl Fn() -> String, message: LinkMessage) -> Result<()> {
        answer(doing, self.handle.link().change(message).execute()).await
    }

    /// Makes `port` a port of `bridge`, or of nothing.
    pub(crate) async fn set_master(&self, port: &Link, bridge: Option<&Link>) -> Result<()> {
        let builder = LinkUnspec::new_with_index(port.index);
        match bridge {
            Some(bridge) => {
                let doing = || format!("make {} a port of bridge {}", port.name, bridge.name);
                self.change(doing, builder.controller(bridge.index).build()).await
            }
            None => {
                let doing = || format!("release {} from its bridge", port.name);
                self.change(doing, builder.nocontroller().build()).await
            }
        }
    }

    pub(crate) async fn set_up(&self, link: &Link) -> Result<()> {
        self.change(|| format!("bring {} up", link.name), LinkUnspec::new_with_index(link.index).up().build()).await
    }

    /// Deletes an interface; one that has just gone by itself is no error.
    pub(crate) async fn delete(&self, link: &Link) -> Result<()> {
        let request = self.handle.link().del(link.index).execute();
        match answer(|| format!("delete interface {}", link.name), request).await {
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(()),
            other => other,
        }
    }

    /// The ports of `bridge`.
    pub(crate) async fn ports(&self, bridge: u32) -> Result<Vec<Link>> {
        let mut links: Vec<Link> = self.links().await?.into_values().collect();
        links.retain(|link| link.master == Some(bridge));
        Ok(links)
    }
}

/// For a bridge dump's family.
pub const BRIDGE_FAMILY: AddressFamily = AddressFamily::Bridge;
