//! The lab's networks and their addresses.

use std::fmt;
use std::net::Ipv4Addr;

/// A network that all hosts of a lab share; one switch (a Linux bridge) each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Network {
    /// API, CLI and consensus.
    Management,
    /// Heartbeats and nothing else.
    Heartbeat,
    /// Live migration's RAM stream.
    Migration,
    /// The guests' users. Hosts have no address here: their interface is the
    /// uplink of an external switch.
    Production,
    /// Shared storage.
    Storage,
}

impl Network {
    /// Every network.
    pub const ALL: [Self; 5] = [Self::Management, Self::Heartbeat, Self::Migration, Self::Production, Self::Storage];

    /// The name of the network's bridge in the fabric: `mgmt`, `hb`, `mig`, `prod`, `stor`.
    pub fn bridge(self) -> &'static str {
        match self {
            Self::Management => "mgmt",
            Self::Heartbeat => "hb",
            Self::Migration => "mig",
            Self::Production => "prod",
            Self::Storage => "stor",
        }
    }

    /// The name of a host's interface on the network: the bridge's name with a
    /// 0 after it.
    pub fn interface(self) -> &'static str {
        match self {
            Self::Management => "mgmt0",
            Self::Heartbeat => "hb0",
            Self::Migration => "mig0",
            Self::Production => "prod0",
            Self::Storage => "stor0",
        }
    }

    /// The third byte of the network's addresses, 10.77.*n*.0/24.
    fn number(self) -> u8 {
        match self {
            Self::Management => 1,
            Self::Heartbeat => 2,
            Self::Migration => 3,
            Self::Storage => 4,
            Self::Production => 5,
        }
    }

    /// The network's address in CIDR notation, such as `10.77.1.0/24`.
    pub fn subnet(self) -> String {
        format!("10.77.{}.0/24", self.number())
    }

    /// The address that the lab's client has here: .1 on the management and
    /// production networks, none elsewhere.
    pub fn client_address(self) -> Option<Ipv4Addr> {
        matches!(self, Self::Management | Self::Production).then(|| self.address_ending_in(1))
    }

    /// The address of the host with number `host` (counted from 0): .11, .12 …;
    /// none on the production network.
    pub fn host_address(self, host: u8) -> Option<Ipv4Addr> {
        (self != Self::Production).then(|| self.address_ending_in(FIRST_HOST + host))
    }

    /// The address 10.77.*n*.`last` here, for guests (by custom from .100 up on production).
    pub fn address_ending_in(self, last: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.number(), last)
    }

    /// The hardware address of host `host` (counted from 0) here. It is the same
    /// after every power cycle, as a network card's is.
    pub(crate) fn mac(self, host: u8) -> String {
        format!("02:68:66:00:{:02x}:{:02x}", self.number(), FIRST_HOST + host)
    }
}

/// The last byte of the first host's addresses.
const FIRST_HOST: u8 = 11;

/// How many hosts the addresses have room for, below the guests' .100.
pub(crate) const MAX_HOSTS: u8 = 100 - FIRST_HOST;

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Management => "management",
            Self::Heartbeat => "heartbeat",
            Self::Migration => "migration",
            Self::Production => "production",
            Self::Storage => "storage",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_distinct_and_production_has_none() {
        let mut seen = std::collections::BTreeSet::new();
        for network in Network::ALL {
            for host in 0..MAX_HOSTS {
                match network.host_address(host) {
                    Some(address) => assert!(seen.insert(address)),
                    None => assert_eq!(network, Network::Production),
                }
            }
        }
        assert_eq!(Network::Management.host_address(0), Some(Ipv4Addr::new(10, 77, 1, 11)));
        assert_eq!(Network::Production.client_address(), Some(Ipv4Addr::new(10, 77, 5, 1)));
        assert_eq!(Network::Heartbeat.client_address(), None);
    }
}
