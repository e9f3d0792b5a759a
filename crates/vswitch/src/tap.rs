//! The taps that VMs are plugged in with.

use std::os::fd::OwnedFd;

use rtnetlink::LinkUnspec;
use tracing::debug;

use crate::Vswitch;
use crate::error::{Error, Result};
use crate::link::{Link, Shape, without_ipv6};
use crate::name::{TAP_PREFIX, check_interface, check_tap};
use crate::sys;

/// First byte of every tap's own address: locally administered, and higher than any NIC's, because
/// a bridge takes on the lowest address among its ports and the host's own must not change its.
const TAP_MAC_PREFIX: u8 = 0xfe;

/// A tap as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tap {
    /// From [`crate::tap_name`].
    pub name: String,
    /// The bridge that it is a port of, from [`Vswitch::ensure_switch`].
    pub bridge: String,
    /// MTU in bytes; `None` takes the bridge's, so that the bridge keeps it.
    pub mtu: Option<u32>,
    /// Access VLAN, 1 to 4094; `None` is the bridge's untagged network.
    pub vlan: Option<u16>,
}

/// A tap as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapState {
    /// Interface name.
    pub name: String,
    /// The bridge that it is a port of.
    pub bridge: Option<String>,
    /// MTU in bytes.
    pub mtu: u32,
    /// Whether the interface is up.
    pub up: bool,
    /// Whether a process (QEMU) has it open.
    pub open: bool,
}

/// Attaches to the queue of the tap `name` as QEMU does, in the calling thread's namespace: what is
/// read are the frames towards the guest, what is written comes from the guest, each after a
/// `virtio_net_hdr` of 10 bytes. Non-blocking. For programs that hand the descriptor to QEMU, and
/// for those that stand in for a guest.
///
/// # Errors
/// [`Error::Tap`], for instance while another process has it open; [`Error::InvalidName`].
pub fn attach_tap(name: &str) -> Result<OwnedFd> {
    check_tap(name)?;
    sys::tap_open(name).map_err(|source| Error::Tap { tap: name.to_owned(), doing: "cannot attach to it", source })
}

impl Vswitch {
    /// Brings a tap into the wanted state: there, persistent, with offloads (`vnet_hdr`), one
    /// queue, on its bridge, in its VLAN, up. QEMU then opens it with
    /// `-netdev tap,ifname=NAME,script=no,downscript=no`. May be repeated while QEMU has it open.
    ///
    /// # Errors
    /// The bridge is missing, or does not filter VLANs and is not ours; the name belongs to
    /// something else; a value is out of range; the kernel refuses.
    pub async fn ensure_tap(&self, tap: &Tap) -> Result<()> {
        check_tap(&tap.name)?;
        check_interface("bridge", &tap.bridge)?;
        if let Some(mtu) = tap.mtu.filter(|mtu| !(68..=65_521).contains(mtu)) {
            return Err(Error::InvalidMtu { tap: tap.name.clone(), mtu });
        }
        if let Some(vlan) = tap.vlan.filter(|vlan| !(1..=4094).contains(vlan)) {
            return Err(Error::InvalidVlan { tap: tap.name.clone(), vlan });
        }
        let _changing = self.changing.lock().await;
        let bridge = self.existing_bridge(&tap.bridge).await?;
        self.ensure_filtering(tap, &bridge).await?;
        let (link, fresh) = self.existing_or_new(&tap.name).await?;

        let mut change = LinkUnspec::new_with_index(link.index);
        let mut differs = fresh;
        if fresh {
            change = without_ipv6(change);
        }
        let mtu = tap.mtu.unwrap_or(bridge.mtu);
        if link.mtu != mtu {
            change = change.mtu(mtu);
            differs = true;
        }
        if let Some(mut mac) = link.mac.filter(|mac| mac[0] != TAP_MAC_PREFIX) {
            mac[0] = TAP_MAC_PREFIX;
            change = change.address(mac.to_vec());
            differs = true;
        }
        if differs {
            self.change(|| format!("set up tap {}", tap.name), change.build()).await?;
        }
        if link.master != Some(bridge.index) {
            self.set_master(&link, Some(&bridge)).await?;
        }
        // Before it is up, so that no frame of a new tap is ever seen in the wrong VLAN.
        self.ensure_access_vlan(&link, &bridge, tap.vlan).await?;
        if !link.up {
            self.set_up(&link).await?;
        }
        Ok(())
    }

    /// Removes a tap; one that is not there needs nothing. A QEMU that still has it open keeps
    /// running without a network.
    ///
    /// # Errors
    /// [`Error::NameTaken`] when the name is not a tap's; the kernel refuses.
    pub async fn remove_tap(&self, name: &str) -> Result<()> {
        check_tap(name)?;
        let _changing = self.changing.lock().await;
        let Some(link) = self.link(name).await? else {
            return Ok(());
        };
        check_shape(&link)?;
        debug!(tap = name, "removing the tap");
        self.delete(&link).await?;
        // The uplink need not carry a VLAN whose last tap has gone.
        if let Some(master) = link.master
            && let Some(bridge) = self.links().await?.remove(&master)
            && bridge.mark().is_some()
            && bridge.bridge().is_some_and(|settings| settings.vlan_filtering)
        {
            self.sync_uplink_vlans(&bridge).await?;
        }
        Ok(())
    }

    /// The taps of VMs on this host, by name: what a reconciler compares with what should be there.
    ///
    /// # Errors
    /// The kernel refuses or does not answer.
    pub async fn list_taps(&self) -> Result<Vec<TapState>> {
        let links = self.links().await?;
        let mut taps: Vec<TapState> = links
            .values()
            .filter(|link| link.is_tun() && link.name.starts_with(TAP_PREFIX))
            .map(|link| TapState {
                name: link.name.clone(),
                bridge: link.master.and_then(|index| links.get(&index)).map(|master| master.name.clone()),
                mtu: link.mtu,
                up: link.up,
                open: link.carrier,
            })
            .collect();
        taps.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(taps)
    }

    /// The bridge called `name`.
    pub(crate) async fn existing_bridge(&self, name: &str) -> Result<Link> {
        self.link(name)
            .await?
            .filter(|link| link.bridge().is_some())
            .ok_or_else(|| Error::NoBridge { bridge: name.to_owned() })
    }

    async fn existing_or_new(&self, name: &str) -> Result<(Link, bool)> {
        if let Some(link) = self.link(name).await? {
            check_shape(&link)?;
            return Ok((link, false));
        }
        debug!(tap = name, "making the tap");
        let failed = |doing| move |source| Error::Tap { tap: name.to_owned(), doing, source };
        let queue = sys::tap_open(name).map_err(failed("cannot make it with /dev/net/tun"))?;
        sys::tap_persist(&queue).map_err(failed("cannot make it persistent"))?;
        drop(queue);
        let link = self.link(name).await?.ok_or_else(|| Error::Tap {
            tap: name.to_owned(),
            doing: "it was made but is not there; call from the thread's network namespace that \
                    the connection was opened in",
            source: std::io::Error::from_raw_os_error(libc::ENODEV),
        })?;
        Ok((link, true))
    }
}

fn check_shape(link: &Link) -> Result<()> {
    let what = match link.shape {
        Shape::Tun { tap: true, multi_queue: false } => return Ok(()),
        Shape::Tun { tap: true, multi_queue: true } => "is a tap with several queues",
        _ => {
            return Err(Error::NameTaken { name: link.name.clone(), what: format!("is {}", link.what()) });
        }
    };
    Err(Error::NameTaken { name: link.name.clone(), what: what.to_owned() })
}
