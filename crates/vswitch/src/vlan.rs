//! VLANs of bridge ports: a tap is an access port, the uplink a trunk.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::TryStreamExt;
use rtnetlink::packet_route::link::{
    AfSpecBridge, BridgeVlanInfo, BridgeVlanInfoFlags, LinkAttribute, LinkExtentMask, LinkMessage,
};
use rtnetlink::{LinkBridge, LinkBridgeVlan};

use crate::Vswitch;
use crate::error::{Error, Result};
use crate::link::{BRIDGE_FAMILY, Link, answer};
use crate::tap::Tap;

/// What an access port does with its VLAN: untagged frames in belong to it, and leave untagged.
fn access() -> BridgeVlanInfoFlags {
    BridgeVlanInfoFlags::Pvid | BridgeVlanInfoFlags::Untagged
}

impl Vswitch {
    /// The VLANs of every bridge port, by the port's index.
    pub(crate) async fn vlans(&self) -> Result<BTreeMap<u32, Vec<BridgeVlanInfo>>> {
        let request = self.handle.link().get().set_filter_mask(BRIDGE_FAMILY, vec![LinkExtentMask::Brvlan]).execute();
        let _alone = self.listing.lock().await;
        let messages: Vec<LinkMessage> =
            answer(|| "list the VLANs of the bridges".to_owned(), request.try_collect()).await?;
        let mut vlans: BTreeMap<u32, Vec<BridgeVlanInfo>> = BTreeMap::new();
        for message in messages {
            let list = vlans.entry(message.header.index).or_default();
            for attribute in message.attributes {
                let LinkAttribute::AfSpecBridge(specs) = attribute else {
                    continue;
                };
                list.extend(specs.into_iter().filter_map(|spec| match spec {
                    AfSpecBridge::VlanInfo(vlan) => Some(vlan),
                    _ => None,
                }));
            }
        }
        Ok(vlans)
    }

    /// Makes sure that `bridge` can tell VLANs apart when `tap` wants one. Comes before the tap is
    /// made, so that nothing is half-made where it cannot.
    pub(crate) async fn ensure_filtering(&self, tap: &Tap, bridge: &Link) -> Result<()> {
        let on = bridge.bridge().is_some_and(|settings| settings.vlan_filtering);
        let Some(vlan) = tap.vlan.filter(|_| !on) else {
            return Ok(());
        };
        if bridge.mark().is_none() {
            return Err(Error::BridgeWithoutVlans { tap: tap.name.clone(), bridge: bridge.name.clone(), vlan });
        }
        // Nothing changes for the ports that are there: all are untagged in the default VLAN.
        let message = LinkBridge::new(&bridge.name).vlan_filtering(true).build();
        let doing = || format!("turn VLAN filtering on in bridge {}", bridge.name);
        match self.change(doing, message).await {
            Err(error) if error.errno() == Some(libc::EOPNOTSUPP) => {
                Err(Error::KernelWithoutVlans { tap: tap.name.clone(), vlan })
            }
            other => other,
        }
    }

    /// Makes `tap` an access port of `vlan`, or of the bridge's default VLAN.
    pub(crate) async fn ensure_access_vlan(&self, tap: &Link, bridge: &Link, vlan: Option<u16>) -> Result<()> {
        let settings = bridge.bridge().unwrap_or_default();
        if !settings.vlan_filtering && vlan.is_none() {
            return Ok(());
        }
        let wanted = vlan.unwrap_or(settings.default_pvid);
        let present = self.vlans().await?.remove(&tap.index).unwrap_or_default();
        let right = |vlan: &BridgeVlanInfo| vlan.vid == wanted && vlan.flags.contains(access());
        if wanted != 0 && !present.iter().any(right) {
            self.add_vlan(tap, wanted, access()).await?;
        }
        for extra in present.iter().filter(|vlan| vlan.vid != wanted) {
            self.remove_vlan(tap, extra.vid).await?;
        }
        if bridge.mark().is_some() {
            self.sync_uplink_vlans(bridge).await?;
        }
        Ok(())
    }

    /// Makes the uplink of a bridge of ours a trunk of exactly the VLANs that its taps are in,
    /// beside the default one.
    pub(crate) async fn sync_uplink_vlans(&self, bridge: &Link) -> Result<()> {
        let default = bridge.bridge().unwrap_or_default().default_pvid;
        let Some(name) = bridge.mark().and_then(|mark| mark.uplink) else {
            return Ok(());
        };
        let (ports, vlans) = (self.ports(bridge.index).await?, self.vlans().await?);
        let Some(uplink) = ports.iter().find(|port| port.name == name) else {
            return Ok(());
        };
        let of = |port: &Link| vlans.get(&port.index).into_iter().flatten();
        let wanted: BTreeSet<u16> = ports
            .iter()
            .filter(|port| port.is_tun())
            .flat_map(of)
            .map(|vlan| vlan.vid)
            .filter(|vid| *vid != default)
            .collect();
        let present: BTreeSet<u16> = of(uplink).map(|vlan| vlan.vid).filter(|vid| *vid != default).collect();
        for vid in wanted.difference(&present) {
            self.add_vlan(uplink, *vid, BridgeVlanInfoFlags::empty()).await?;
        }
        for vid in present.difference(&wanted) {
            self.remove_vlan(uplink, *vid).await?;
        }
        Ok(())
    }

    async fn add_vlan(&self, port: &Link, vid: u16, flags: BridgeVlanInfoFlags) -> Result<()> {
        let message = LinkBridgeVlan::new(port.index).vlan(vid, flags).build();
        answer(|| format!("put {} into VLAN {vid}", port.name), self.handle.link().set(message).execute()).await
    }

    async fn remove_vlan(&self, port: &Link, vid: u16) -> Result<()> {
        let message = LinkBridgeVlan::new(port.index).vlan(vid, BridgeVlanInfoFlags::empty()).build();
        answer(
            || format!("take {} out of VLAN {vid}", port.name),
            self.handle.link().del_with_message(message).execute(),
        )
        .await
    }
}
