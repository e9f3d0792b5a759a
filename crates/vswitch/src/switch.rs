//! A virtual switch as a bridge.

use rtnetlink::packet_route::link::BridgeStpState;
use rtnetlink::{LinkBridge, LinkUnspec};
use tracing::{info, warn};

use crate::Vswitch;
use crate::error::{Error, Result};
use crate::link::{Addresses, Link, answer, without_ipv6};
use crate::name::{bridge_name, check_interface};

/// A virtual switch as it should be on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Switch {
    /// Its name in the cluster, at most 64 bytes.
    pub name: String,
    /// What it connects its VMs with.
    pub kind: SwitchKind,
}

/// What a switch connects its VMs with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SwitchKind {
    /// The network behind a NIC of the host, or behind a bridge that the host already has.
    External {
        /// The NIC, bond or VLAN interface that becomes a port of the switch; or the host's own
        /// bridge (`vmbr0`, `br0`), which then *is* the switch and is never changed or deleted.
        uplink: String,
    },
    /// Each other and the host, which may have an address on the bridge.
    Internal,
    /// Nothing but each other.
    Private,
}

/// What the bridge's alias says: whose it is and which uplink was given to it. It outlives us, so
/// a later run can tell its own bridges from others and can release an uplink that has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    pub switch: String,
    pub kind: String,
    pub uplink: Option<String>,
}

const MARK: &str = "holdfast";

impl Mark {
    fn of(switch: &Switch) -> Mark {
        let (kind, uplink) = match &switch.kind {
            SwitchKind::External { uplink } => ("external", Some(uplink.clone())),
            SwitchKind::Internal => ("internal", None),
            SwitchKind::Private => ("private", None),
        };
        Mark { switch: switch.name.clone(), kind: kind.to_owned(), uplink }
    }

    fn text(&self) -> String {
        let uplink = self.uplink.as_deref().unwrap_or("-");
        format!("{MARK} {} {uplink} {}", self.kind, self.switch)
    }

    /// Reads an alias; `None` when it is not one of ours.
    pub fn parse(alias: &str) -> Option<Mark> {
        // The name comes last because it alone may have spaces.
        let mut parts = alias.splitn(4, ' ');
        let (mark, kind, uplink, switch) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        (mark == MARK).then(|| Mark {
            switch: switch.to_owned(),
            kind: kind.to_owned(),
            uplink: (uplink != "-").then(|| uplink.to_owned()),
        })
    }
}

impl Link {
    /// The mark on a bridge of ours.
    pub(crate) fn mark(&self) -> Option<Mark> {
        self.bridge()?;
        Mark::parse(self.alias.as_deref()?)
    }
}

impl Vswitch {
    /// Brings the switch into the wanted state and returns the name of the bridge that its taps go
    /// to: `hf-<name>`, or the uplink itself where that is a bridge of the host.
    ///
    /// On a bridge of ours spanning tree is off and ports forward at once. Multicast snooping is
    /// off too: without a querier behind it, a guest that has just moved in would miss its groups.
    ///
    /// # Errors
    /// The uplink is missing, carries the host's addresses, belongs to something else or is no
    /// NIC; the bridge's name is taken by something that is not this switch; the kernel refuses.
    pub async fn ensure_switch(&self, switch: &Switch) -> Result<String> {
        let _changing = self.changing.lock().await;
        let name = bridge_name(&switch.name)?;
        let uplink = match &switch.kind {
            SwitchKind::External { uplink } => Some(self.uplink(switch, uplink).await?),
            SwitchKind::Internal | SwitchKind::Private => None,
        };
        if let Some(uplink) = uplink.as_ref().filter(|uplink| uplink.bridge().is_some()) {
            // The switch may have had a bridge of its own before its uplink became one.
            self.remove_bridge(&switch.name, &name).await?;
            if !uplink.up {
                warn!(bridge = uplink.name, switch = switch.name, "the host's bridge is down");
            }
            return Ok(uplink.name.clone());
        }
        if let Some(uplink) = &uplink {
            self.check_uplink(switch, uplink, &name).await?;
        }
        let bridge = self.ensure_bridge(switch, &name).await?;
        if let Some(uplink) = uplink {
            if uplink.master != Some(bridge.index) {
                info!(bridge = name, uplink = uplink.name, "plugging the uplink in");
                self.set_master(&uplink, Some(&bridge)).await?;
            }
            if !uplink.up {
                self.set_up(&uplink).await?;
            }
            if bridge.bridge().is_some_and(|settings| settings.vlan_filtering) {
                self.sync_uplink_vlans(&bridge).await?;
            }
        }
        Ok(name)
    }

    /// Removes the switch's bridge and releases its uplink. A switch that is not there, or that
    /// lives on a bridge of the host's own, needs nothing.
    ///
    /// # Errors
    /// [`Error::SwitchInUse`] while taps or other interfaces are on it; [`Error::NameTaken`] when
    /// the bridge is not this switch's.
    pub async fn remove_switch(&self, name: &str) -> Result<()> {
        let _changing = self.changing.lock().await;
        self.remove_bridge(name, &bridge_name(name)?).await
    }

    async fn remove_bridge(&self, switch: &str, name: &str) -> Result<()> {
        let Some(bridge) = self.link(name).await? else {
            return Ok(());
        };
        check_ours(&bridge, switch)?;
        let uplink = bridge.mark().and_then(|mark| mark.uplink);
        let mut ports = self.ports(bridge.index).await?;
        ports.retain(|port| Some(&port.name) != uplink.as_ref());
        if !ports.is_empty() {
            return Err(Error::SwitchInUse {
                switch: switch.to_owned(),
                ports: ports.into_iter().map(|port| port.name).collect(),
            });
        }
        info!(bridge = name, switch, "removing the switch's bridge");
        self.delete(&bridge).await
    }

    /// Looks the uplink up and refuses what cannot be one.
    async fn uplink(&self, switch: &Switch, uplink: &str) -> Result<Link> {
        check_interface("uplink", uplink)?;
        let Some(link) = self.link(uplink).await? else {
            return Err(Error::UplinkMissing { switch: switch.name.clone(), uplink: uplink.to_owned() });
        };
        let foreign_switch = link.mark().is_some();
        if link.loopback || link.is_tun() || !link.ethernet || foreign_switch {
            return Err(Error::UplinkUnsuitable {
                switch: switch.name.clone(),
                uplink: link.name.clone(),
                what: match foreign_switch {
                    true => "another switch's bridge",
                    false => link.what(),
                },
            });
        }
        Ok(link)
    }

    /// Refuses an uplink that is in use, before anything is made for the switch.
    async fn check_uplink(&self, switch: &Switch, uplink: &Link, bridge: &str) -> Result<()> {
        if let Some(master) = uplink.master {
            let master = match self.links().await?.remove(&master) {
                Some(link) if link.name == bridge => return Ok(()),
                Some(link) => link.name,
                None => format!("interface {master}"),
            };
            return Err(Error::UplinkInUse { switch: switch.name.clone(), uplink: uplink.name.clone(), master });
        }
        match self.addresses(Addresses::All).await?.remove(&uplink.index) {
            Some(addresses) => Err(Error::UplinkHasAddresses {
                switch: switch.name.clone(),
                uplink: uplink.name.clone(),
                addresses: addresses.into_iter().map(|(address, _)| address).collect(),
            }),
            None => Ok(()),
        }
    }

    async fn ensure_bridge(&self, switch: &Switch, name: &str) -> Result<Link> {
        let mark = Mark::of(switch);
        if self.link(name).await?.is_none() {
            info!(bridge = name, switch = switch.name, "making the switch's bridge");
            let message = LinkBridge::new(name)
                .down()
                .stp_state(BridgeStpState::Disabled)
                .forward_delay(0)
                .mcast_snooping(false)
                .build();
            answer(|| format!("make bridge {name}"), self.handle.link().add(message).execute()).await?;
        }
        let bridge = self.bridge_link(name, switch).await?;
        let settings = bridge.bridge().unwrap_or_default();
        let marked = bridge.mark();
        let doing = || format!("set up bridge {name}");

        // Release the uplink of an earlier wish, or a private switch would not be private.
        if let Some(old) = marked.as_ref().and_then(|mark| mark.uplink.as_deref())
            && mark.uplink.as_deref() != Some(old)
            && let Some(port) = self.link(old).await?
            && port.master == Some(bridge.index)
        {
            info!(bridge = name, uplink = old, "releasing the former uplink");
            self.set_master(&port, None).await?;
        }
        // The kernel refuses a delay of 0 while spanning tree is on, so that goes first.
        if settings.stp {
            let message = LinkBridge::new(name).stp_state(BridgeStpState::Disabled);
            self.change(doing, message.build()).await?;
        }
        if settings.forward_delay != 0 || settings.multicast_snooping {
            let message = LinkBridge::new(name).forward_delay(0).mcast_snooping(false);
            self.change(doing, message.build()).await?;
        }

        // Only an internal switch has the host on it. Without NOARP the host would answer requests
        // for any of its addresses on any bridge, and going down drops a link-local address.
        let arp = switch.kind != SwitchKind::Private;
        let kind_changed = marked.as_ref().is_none_or(|old| old.kind != mark.kind);
        let change = || LinkUnspec::new_with_index(bridge.index);
        if kind_changed && switch.kind != SwitchKind::Internal {
            self.change(doing, without_ipv6(change()).down().build()).await?;
        }
        if kind_changed || !bridge.up || bridge.arp != arp {
            self.change(doing, change().arp(arp).up().build()).await?;
        }

        // The mark comes last, so that whatever was cut off above is done again; but before the
        // uplink is plugged in, so that there is never one that the mark does not name.
        if marked.as_ref() != Some(&mark) {
            let mut change = change().alias(mark.text());
            if let Some(mac) = bridge.mac.filter(|_| marked.is_none()) {
                // Set even to what it is, an address stays; otherwise the bridge would take on
                // another one whenever a port with a lower address comes.
                change = change.address(mac.to_vec());
            }
            self.change(doing, change.build()).await?;
        }
        self.bridge_link(name, switch).await
    }

    async fn bridge_link(&self, name: &str, switch: &Switch) -> Result<Link> {
        let bridge = self.link(name).await?.ok_or_else(|| Error::NoBridge { bridge: name.to_owned() })?;
        check_ours(&bridge, &switch.name)?;
        Ok(bridge)
    }
}

/// Refuses a link that is not the bridge of `switch`. A bridge with our name and no alias is one
/// that a crash left between making and marking it.
fn check_ours(bridge: &Link, switch: &str) -> Result<()> {
    let taken = |what: String| Error::NameTaken { name: bridge.name.clone(), what };
    if bridge.bridge().is_none() {
        return Err(taken(format!("is {}", bridge.what())));
    }
    match (bridge.alias.as_deref(), bridge.mark()) {
        (None | Some(""), _) => Ok(()),
        (_, Some(mark)) if mark.switch == switch => Ok(()),
        (_, Some(mark)) => Err(taken(format!("belongs to switch {:?}", mark.switch))),
        (Some(alias), None) => Err(taken(format!("is a bridge of something else ({alias:?})"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_reads_back() {
        for kind in [SwitchKind::Internal, SwitchKind::Private, SwitchKind::External { uplink: "eth1".into() }] {
            let mark = Mark::of(&Switch { name: "office on the left".into(), kind });
            assert_eq!(Mark::parse(&mark.text()), Some(mark));
        }
        for alias in ["", "holdfast", "uplink to the core", "other internal - lan"] {
            assert_eq!(Mark::parse(alias), None, "{alias:?}");
        }
    }
}
