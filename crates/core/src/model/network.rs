//! Networks that the nodes share, virtual switches, and volumes.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::NodeAddress;

/// A subnet that the nodes share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its name, unique in the cluster.
    pub name: String,
    /// What it is used for.
    pub roles: Roles,
    /// Preference for live migration and other bulk traffic: lowest first.
    pub metric: u32,
}

/// What a network is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Roles {
    /// Heartbeats and the traffic between agents.
    pub cluster: bool,
    /// Live migrations.
    pub migration: bool,
}

/// A subnet as text, the key of a [`Network`]: `10.77.1.0/24`.
pub fn subnet(address: &NodeAddress) -> String {
    let prefix = u32::from(address.prefix);
    match address.ip {
        IpAddr::V4(ip) => {
            let mask = u32::MAX.checked_shl(32 - prefix.min(32)).unwrap_or(0);
            format!("{}/{prefix}", std::net::Ipv4Addr::from(u32::from(ip) & mask))
        }
        IpAddr::V6(ip) => {
            let mask = u128::MAX.checked_shl(128 - prefix.min(128)).unwrap_or(0);
            format!("{}/{prefix}", std::net::Ipv6Addr::from(u128::from(ip) & mask))
        }
    }
}

/// A virtual switch, the same on every node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SwitchKind {
    /// Reaches a physical network through this interface of every node.
    External {
        /// The interface, or an existing bridge, on every node.
        uplink: String,
    },
    /// Reaches the other VMs of the node and the node itself.
    Internal,
    /// Reaches the other VMs of the node.
    Private,
}

/// A cluster shared volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its identity, also written on it.
    pub id: Uuid,
    /// What is behind it.
    pub kind: VolumeKind,
    /// When it was added, milliseconds since the Unix epoch.
    pub added_ms: u64,
}

/// What is behind a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeKind {
    /// A directory that every node sees under the same path.
    Directory {
        /// The path.
        path: String,
    },
    /// A block device that every node sees, recognised by what is written on it. Who
    /// has which slab of it is in [`super::Lun`].
    Lun {
        /// Where a node looks for it first: its path on the node that added it.
        device: String,
        /// The size of a slab in bytes.
        slab_bytes: u64,
        /// How many there are.
        slabs: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets_are_cut_at_the_prefix() {
        let cases = [
            ("10.77.1.12", 24, "10.77.1.0/24"),
            ("10.77.1.12", 32, "10.77.1.12/32"),
            ("10.77.1.12", 0, "0.0.0.0/0"),
            ("fd00:1::12", 64, "fd00:1::/64"),
            ("fd00:1::12", 0, "::/0"),
        ];
        for (ip, prefix, expected) in cases {
            let address = NodeAddress { interface: "eth0".into(), ip: ip.parse().unwrap(), prefix };
            assert_eq!(subnet(&address), expected);
        }
    }
}
