//! Telling the network where a guest is, before the guest can do so itself.
//!
//! QEMU announces a guest's address when the guest resumes, so until then, and for as long as the
//! frame takes, the network sends to where the guest was. Announced at the switchover, *before* the
//! guest resumes, frames wait in the target's tap instead:
//!
//! ```text
//!   source pauses the guest ── announce() on the target ── target resumes the guest
//!                                 1. this bridge: the guest's MAC is behind its tap
//!                                 2. every uplink: a RARP frame *from* that MAC, so each switch
//!                                    on the way learns that it is now in this direction
//! ```

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rtnetlink::packet_route::link::{BridgeVlanInfo, BridgeVlanInfoFlags};
use rtnetlink::packet_route::neighbour::{NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState};
use tokio::time::Instant;

use crate::Vswitch;
use crate::error::{Error, Result};
use crate::link::{BRIDGE_FAMILY, Link, answer};
use crate::sys;

/// `ETH_P_RARP` and `ETH_P_8021Q` of `linux/if_ether.h`.
const ETHERTYPE_RARP: u16 = 0x8035;
const ETHERTYPE_VLAN: u16 = 0x8100;

/// Shortest Ethernet frame without its checksum, in bytes.
const MIN_FRAME: usize = 60;

/// How long a tap that was opened just now may take until its bridge port forwards: the kernel
/// hands the change of carrier to a worker.
const PORT_SETTLES: Duration = Duration::from_millis(100);

/// An announcement with everything looked up and opened that can be before the switchover.
pub struct Announcement {
    vswitch: Vswitch,
    tap: String,
    tap_index: u32,
    mac: [u8; 6],
    uplinks: Vec<Uplink>,
}

struct Uplink {
    name: String,
    index: u32,
    frame: Vec<u8>,
}

impl Vswitch {
    /// Prepares the announcement of the guest with the address `mac` behind `tap` on `bridge`:
    /// looks the uplinks and VLANs up, so that [`Announcement::send`] need not. Valid while the
    /// bridge keeps its ports, so prepare it when the target's QEMU is ready.
    ///
    /// # Errors
    /// [`Error::NoBridge`], [`Error::NoTap`], [`Error::TapIdle`], or the kernel refuses.
    pub async fn prepare_announcement(&self, bridge: &str, tap: &str, mac: [u8; 6]) -> Result<Announcement> {
        let links = self.links().await?;
        let find = |name: &str| links.values().find(|link| link.name == name);
        let bridge = find(bridge)
            .filter(|link| link.bridge().is_some())
            .ok_or_else(|| Error::NoBridge { bridge: bridge.to_owned() })?;
        let tap = find(tap)
            .filter(|link| link.master == Some(bridge.index))
            .ok_or_else(|| Error::NoTap { tap: tap.to_owned(), bridge: bridge.name.clone() })?;
        // The port of a tap that was made just now may still forward, so the kernel cannot be left
        // to refuse this.
        if !tap.carrier {
            return Err(Error::TapIdle { tap: tap.name.clone() });
        }
        let vlans = match bridge.bridge() {
            Some(settings) if settings.vlan_filtering => Some(self.vlans().await?),
            _ => None,
        };
        let of = |port: &Link| -> Option<&[BridgeVlanInfo]> {
            vlans.as_ref().map(|vlans| vlans.get(&port.index).map_or(&[][..], Vec::as_slice))
        };
        let uplinks = links
            .values()
            // The other taps are guests of this host: the bridge's own table is enough for them.
            .filter(|port| port.master == Some(bridge.index) && !port.is_tun() && port.carrier)
            .filter_map(|port| {
                Some(Uplink {
                    name: port.name.clone(),
                    index: port.index,
                    frame: rarp(mac, egress(of(tap), of(port))?),
                })
            })
            .collect();
        self.frame_socket().map_err(|source| Error::Announce { uplink: bridge.name.clone(), source })?;
        Ok(Announcement { vswitch: self.clone(), tap: tap.name.clone(), tap_index: tap.index, mac, uplinks })
    }

    /// Prepares and sends in one go; see [`Announcement::send`].
    ///
    /// # Errors
    /// As for the two.
    pub async fn announce(&self, bridge: &str, tap: &str, mac: [u8; 6]) -> Result<()> {
        self.prepare_announcement(bridge, tap, mac).await?.send().await
    }

    /// Takes an announcement back on the tap's bridge, when the migration failed after it. The network
    /// beyond is put right by whoever resumes the guest: QEMU at the source announces it again
    /// (`announce-self`), or [`Vswitch::announce`] there does.
    ///
    /// # Errors
    /// The kernel refuses or does not answer. That the tap or the entry has gone is none.
    pub async fn retract(&self, tap: &str, mac: [u8; 6]) -> Result<()> {
        match self.link(tap).await? {
            Some(link) => self.forget(&link.name, link.index, mac).await,
            None => Ok(()),
        }
    }

    fn frame_socket(&self) -> io::Result<&OwnedFd> {
        if let Some(socket) = self.frames.get() {
            return Ok(socket);
        }
        // Of two that come here at once, one socket is kept; either will do.
        let socket = sys::frame_socket()?;
        Ok(self.frames.get_or_init(|| socket))
    }

    async fn forget(&self, tap: &str, index: u32, mac: [u8; 6]) -> Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = BRIDGE_FAMILY;
        message.header.ifindex = index;
        message.header.flags = NeighbourFlags::Controller;
        message.attributes = vec![NeighbourAttribute::LinkLayerAddress(mac.to_vec())];
        let request = self.handle.neighbours().del(message).execute();
        match answer(|| format!("retract the announcement on tap {tap}"), request).await {
            // Aged out, learned elsewhere by now, or the tap left its bridge: nothing to take back.
            Err(error)
                if matches!(error.errno(), Some(libc::ENOENT | libc::ENODEV | libc::EINVAL | libc::EOPNOTSUPP)) =>
            {
                Ok(())
            }
            other => other,
        }
    }
}

impl Announcement {
    /// Makes this bridge deliver the guest's frames to its tap and tells the network beyond. Call
    /// it after the source has paused the guest (a guest that still sends would pull its address
    /// back) and before the target resumes it. Takes a fraction of a millisecond
    /// (0.03 ms measured, median of 101, debug build). May be repeated.
    ///
    /// # Errors
    /// [`Error::TapIdle`] when no process has the tap open; [`Error::Announce`] when a frame could
    /// not leave, after the others were sent: the guest's own announcement follows when it resumes,
    /// so the migration need not fail for it.
    pub async fn send(&self) -> Result<()> {
        self.learn().await?;
        let mut outcome = Ok(());
        for uplink in &self.uplinks {
            let sent =
                self.vswitch.frame_socket().and_then(|socket| sys::send_frame(socket, uplink.index, &uplink.frame));
            if let Err(source) = sent {
                outcome = outcome.and(Err(Error::Announce { uplink: uplink.name.clone(), source }));
            }
        }
        outcome
    }

    /// Takes it back on this bridge; see [`Vswitch::retract`].
    ///
    /// # Errors
    /// The kernel refuses or does not answer.
    pub async fn retract(&self) -> Result<()> {
        self.vswitch.forget(&self.tap, self.tap_index, self.mac).await
    }

    /// An entry that ages and moves as if the bridge had learned it. The kernel puts it into every
    /// VLAN of the port.
    async fn learn(&self) -> Result<()> {
        let deadline = Instant::now() + PORT_SETTLES;
        loop {
            let request = self
                .vswitch
                .handle
                .neighbours()
                .add_bridge(self.tap_index, &self.mac)
                .state(NeighbourState::Reachable)
                .flags(NeighbourFlags::Controller)
                .replace()
                .execute();
            let doing = || format!("announce the guest behind tap {}", self.tap);
            let error = match answer(doing, request).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            // The kernel's word for "this bridge port does not forward".
            if error.errno() != Some(libc::EPERM) {
                return Err(error);
            }
            match self.vswitch.link(&self.tap).await? {
                Some(link) if link.carrier && link.up && Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                Some(link) if link.carrier && link.up => return Err(error),
                _ => {
                    return Err(Error::TapIdle { tap: self.tap.clone() });
                }
            }
        }
    }
}

/// How a frame of the tap leaves by the port: not at all (`None`), or with this VLAN tag, if any.
fn egress(tap: Option<&[BridgeVlanInfo]>, port: Option<&[BridgeVlanInfo]>) -> Option<Option<u16>> {
    let (Some(tap), Some(port)) = (tap, port) else {
        return Some(None);
    };
    let vid = tap.iter().find(|vlan| vlan.flags.contains(BridgeVlanInfoFlags::Pvid))?.vid;
    let there = port.iter().find(|vlan| vlan.vid == vid)?;
    match there.flags.contains(BridgeVlanInfoFlags::Untagged) {
        true => Some(None),
        false => Some(Some(vid)),
    }
}

/// A reverse ARP request (RFC 903, opcode 3) from `mac` about itself, to everybody: what QEMU sends
/// too. It asks for nothing that anybody answers, but every switch learns from it.
fn rarp(mac: [u8; 6], vlan: Option<u16>) -> Vec<u8> {
    let mut frame = Vec::with_capacity(MIN_FRAME + 4);
    frame.extend([0xff; 6]);
    frame.extend(mac);
    if let Some(vid) = vlan {
        frame.extend(ETHERTYPE_VLAN.to_be_bytes());
        frame.extend(vid.to_be_bytes());
    }
    frame.extend(ETHERTYPE_RARP.to_be_bytes());
    frame.extend([0, 1, 0x08, 0, 6, 4, 0, 3]);
    for _sender_then_target in 0..2 {
        frame.extend(mac);
        frame.extend([0; 4]);
    }
    frame.resize(MIN_FRAME + if vlan.is_some() { 4 } else { 0 }, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

    #[test]
    fn rarp_is_what_rfc_903_says() {
        let frame = rarp(MAC, None);
        assert_eq!(frame.len(), 60);
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[6..12], MAC);
        assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!((&frame[22..28], &frame[32..38]), (&MAC[..], &MAC[..]));
        assert!(frame[38..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_tagged_rarp_carries_its_vlan() {
        let frame = rarp(MAC, Some(0x123));
        assert_eq!(frame[12..18], [0x81, 0, 0x01, 0x23, 0x80, 0x35]);
        assert_eq!(frame.len(), 64);
    }

    #[test]
    fn vlans_decide_how_an_announcement_leaves() {
        let vlan = |vid, flags| BridgeVlanInfo { vid, flags };
        let access = BridgeVlanInfoFlags::Pvid | BridgeVlanInfoFlags::Untagged;
        let tap = [vlan(7, access)];
        let trunk = [vlan(1, access), vlan(7, BridgeVlanInfoFlags::empty())];
        assert_eq!(egress(None, None), Some(None));
        assert_eq!(egress(Some(&tap), Some(&trunk)), Some(Some(7)));
        assert_eq!(egress(Some(&tap), Some(&tap)), Some(None));
        assert_eq!(egress(Some(&tap), Some(&trunk[..1])), None);
        assert_eq!(egress(Some(&[]), Some(&trunk)), None);
    }
}
