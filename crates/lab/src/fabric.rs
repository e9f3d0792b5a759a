//! Switches and cables: a namespace with one bridge per network, and a veth
//! pair from it to every host's interface.
//!
//! ```text
//!  host n1                     fabric                       host n2
//!  mgmt0 ──────── n1-mgmt ─[bridge mgmt]─ n2-mgmt ──────── mgmt0
//!  hb0   ──────── n1-hb   ─[bridge hb  ]─ n2-hb   ──────── hb0      … mig, prod, stor
//! ```
//!
//! Pulling a cable takes the fabric's end down, so the host sees what it would
//! see of a real one: its link is gone. Loss and partitions are rules on the
//! bridges: the links stay up and frames vanish, as behind a broken switch.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::netns::{Namespace, pipe_into};
use crate::network::Network;
use crate::sys;

/// The name by which [`Fabric::drop_from`] and [`Fabric::partition`] know the
/// lab's client, beside the hosts' names.
pub const CLIENT: &str = "client";

/// The lab's switches and cables.
#[derive(Debug)]
pub struct Fabric {
    // Declared before `namespace`: its cables end with it, and go first.
    client: Namespace,
    namespace: Namespace,
    /// Made inside the fabric's namespace: what it switches is switched there.
    link_socket: OwnedFd,
    wiring: Mutex<Wiring>,
}

#[derive(Debug, Default)]
struct Wiring {
    /// Nodes whose cables exist at the moment, i.e. that have power.
    attached: BTreeSet<String>,
    /// Cables that were pulled. Outlives a power cycle, as in a real rack.
    pulled: BTreeSet<(String, Network)>,
    /// Percentage of frames that vanish from one node to another.
    losses: BTreeMap<Path, u8>,
}

/// One direction between two nodes on one network.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Path {
    network: Network,
    from: String,
    to: String,
}

impl Fabric {
    /// Builds the switches and the client in namespaces whose names start with `tag`.
    pub(crate) fn create(tag: &str) -> Result<Self> {
        let namespace = Namespace::create(&format!("{tag}-fabric"))?;
        // The switches themselves have nothing to say: without this, every
        // bridge and port would send IPv6 router solicitations.
        namespace.run(|| std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1"))?.ok();
        let mut lines = String::new();
        for network in Network::ALL {
            let bridge = network.bridge();
            let _ = writeln!(
                lines,
                "link add {bridge} type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
                 link set {bridge} up"
            );
        }
        namespace.ip_batch(&lines)?;
        let link_socket = namespace
            .run(|| socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None))?
            .context("making the socket that switches the cables")?;
        let client = Namespace::create(&format!("{tag}-{CLIENT}"))?;
        let fabric = Self { client, namespace, link_socket, wiring: Mutex::default() };
        for network in Network::ALL {
            if let Some(address) = network.client_address() {
                fabric.lay_cable(CLIENT, network, &fabric.client, None)?;
                let interface = network.interface();
                fabric.client.ip_batch(&format!("addr add {address}/24 dev {interface}\nlink set {interface} up\n"))?;
                sys::set_interface_up(&fabric.link_socket, &port(CLIENT, network), true)
                    .context("plugging in the client")?;
            }
        }
        Ok(fabric)
    }

    /// The namespace of a machine outside the cluster: a user of the guests and
    /// of the API, at .1 of the management and the production network.
    pub fn client(&self) -> &Namespace {
        &self.client
    }

    /// The namespace that the switches are in.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Lays the cables of a host that is being powered on and gives its
    /// interfaces their addresses.
    pub(crate) fn attach(&self, node: &str, number: u8, at: &Namespace) -> Result<()> {
        let mut wiring = self.wiring();
        // First, so that `detach` clears up after a failure half-way.
        wiring.attached.insert(node.to_owned());
        let mut lines = String::new();
        for network in Network::ALL {
            self.lay_cable(node, network, at, Some(network.mac(number)))?;
            let interface = network.interface();
            if let Some(address) = network.host_address(number) {
                let _ = writeln!(lines, "addr add {address}/24 dev {interface}");
            }
            let _ = writeln!(lines, "link set {interface} up");
        }
        at.ip_batch(&lines)?;
        for network in Network::ALL {
            if !wiring.pulled.contains(&(node.to_owned(), network)) {
                self.switch(node, network, true)?;
            }
        }
        Ok(())
    }

    /// Takes away what [`Fabric::attach`] made. Which cables are pulled is kept.
    pub(crate) fn detach(&self, node: &str) -> Result<()> {
        let mut wiring = self.wiring();
        if !wiring.attached.remove(node) {
            return Ok(());
        }
        let lines: String = Network::ALL.iter().fold(String::new(), |mut lines, network| {
            let _ = writeln!(lines, "link del {}", port(node, *network));
            lines
        });
        self.namespace.ip_batch(&lines)
    }

    /// Lets the node's links go dark all at once without remembering that as
    /// pulled cables: its power is being cut.
    pub(crate) fn darken(&self, node: &str) -> Result<()> {
        self.for_attached(&self.wiring(), node, false)
    }

    /// Pulls one cable of `node`: its link goes down, nothing gets through.
    ///
    /// # Errors
    /// When the kernel refuses to switch the interface.
    pub fn pull(&self, node: &str, network: Network) -> Result<()> {
        let mut wiring = self.wiring();
        wiring.pulled.insert((node.to_owned(), network));
        if wiring.attached.contains(node) {
            self.switch(node, network, false)?;
        }
        Ok(())
    }

    /// Plugs one cable of `node` in again.
    ///
    /// # Errors
    /// When the kernel refuses to switch the interface.
    pub fn plug(&self, node: &str, network: Network) -> Result<()> {
        let mut wiring = self.wiring();
        wiring.pulled.remove(&(node.to_owned(), network));
        if wiring.attached.contains(node) {
            self.switch(node, network, true)?;
        }
        Ok(())
    }

    /// Pulls all cables of `node` and returns the instants just before the
    /// first and just after the last one: about a millisecond apart.
    ///
    /// # Errors
    /// When the kernel refuses to switch an interface.
    pub fn pull_all(&self, node: &str) -> Result<(Instant, Instant)> {
        let mut wiring = self.wiring();
        wiring.pulled.extend(Network::ALL.map(|network| (node.to_owned(), network)));
        let before = Instant::now();
        self.for_attached(&wiring, node, false)?;
        Ok((before, Instant::now()))
    }

    /// Plugs all cables of `node` in again.
    ///
    /// # Errors
    /// When the kernel refuses to switch an interface.
    pub fn plug_all(&self, node: &str) -> Result<()> {
        let mut wiring = self.wiring();
        wiring.pulled.retain(|(pulled, _)| pulled != node);
        self.for_attached(&wiring, node, true)
    }

    /// Pulls all cables of `node` and plugs them in again, over and over, for
    /// `length`. Each next of `times` tells how long they are out and then in.
    /// Returns with all of them in, and says how often they were out.
    ///
    /// # Errors
    /// When the kernel refuses to switch an interface.
    pub fn flap(
        &self,
        node: &str,
        length: Duration,
        times: impl IntoIterator<Item = (Duration, Duration)>,
    ) -> Result<u32> {
        let until = Instant::now() + length;
        let mut count = 0;
        for (out, into) in times {
            self.pull_all(node)?;
            count += 1;
            std::thread::sleep(out);
            self.plug_all(node)?;
            if Instant::now() >= until {
                break;
            }
            std::thread::sleep(into);
        }
        Ok(count)
    }

    /// Lets `percent` of the frames from `from` to `to` vanish on `network`;
    /// 0 lets all of them through again. The way back is not touched.
    ///
    /// # Errors
    /// When `percent` is above 100 or `nft` fails (Debian package `nftables`).
    pub fn lose(&self, network: Network, from: &str, to: &str, percent: u8) -> Result<()> {
        if percent > 100 {
            bail!("a loss of {percent} % is not possible");
        }
        let mut wiring = self.wiring();
        wiring.losses.insert(Path { network, from: from.to_owned(), to: to.to_owned() }, percent);
        self.apply_losses(&mut wiring)
    }

    /// Lets every frame from `from` to `to` vanish, on all networks. The way
    /// back is not touched.
    ///
    /// # Errors
    /// As for [`Fabric::lose`].
    pub fn drop_from(&self, from: &str, to: &str) -> Result<()> {
        self.drop_between(&[from], &[to], false)
    }

    /// Parts the nodes of `left` from those of `right` on all networks, both
    /// ways at one instant. Inside each side everything works as before.
    ///
    /// # Errors
    /// As for [`Fabric::lose`].
    pub fn partition(&self, left: &[&str], right: &[&str]) -> Result<()> {
        self.drop_between(left, right, true)
    }

    /// Ends every loss and partition. Pulled cables stay pulled.
    ///
    /// # Errors
    /// As for [`Fabric::lose`].
    pub fn heal(&self) -> Result<()> {
        let mut wiring = self.wiring();
        wiring.losses.clear();
        self.apply_losses(&mut wiring)
    }

    /// Limits what `node` receives on `network` to `mbit_per_s` megabits a
    /// second; `None` lifts the limit.
    ///
    /// # Errors
    /// When the node has no power, or `tc` fails.
    pub fn limit(&self, node: &str, network: Network, mbit_per_s: Option<u32>) -> Result<()> {
        let port = port(node, network);
        let shape = match mbit_per_s {
            // A burst of 2 ms at that rate, but no less than a full veth frame
            // with segmentation offload (64 KiB), which tbf would never pass.
            Some(rate) => format!(
                "qdisc replace dev {port} root tbf rate {rate}mbit burst {} latency 50ms\n",
                (u64::from(rate) * 250).max(128 * 1024)
            ),
            None => format!("qdisc del dev {port} root\n"),
        };
        self.namespace
            .run(|| pipe_into(Command::new("tc").args(["-batch", "-"]), &shape))?
            .with_context(|| format!("limiting {node} on the {network} network"))
    }

    fn drop_between(&self, left: &[&str], right: &[&str], both_ways: bool) -> Result<()> {
        let mut wiring = self.wiring();
        for (a, b) in left.iter().flat_map(|a| right.iter().map(move |b| (*a, *b))) {
            for network in Network::ALL {
                let mut lose = |from: &str, to: &str| {
                    let path = Path { network, from: from.to_owned(), to: to.to_owned() };
                    wiring.losses.insert(path, 100);
                };
                lose(a, b);
                if both_ways {
                    lose(b, a);
                }
            }
        }
        self.apply_losses(&mut wiring)
    }

    /// Replaces the bridges' rules in one transaction.
    fn apply_losses(&self, wiring: &mut Wiring) -> Result<()> {
        wiring.losses.retain(|_, percent| *percent > 0);
        let mut rules = String::from(
            "table bridge lab\ndelete table bridge lab\ntable bridge lab {\n\
             chain losses {\ntype filter hook forward priority -200\n",
        );
        for (path, percent) in &wiring.losses {
            let (from, to) = (port(&path.from, path.network), port(&path.to, path.network));
            let some = match percent {
                100 => String::new(),
                percent => format!("numgen random mod 100 < {percent} "),
            };
            let _ = writeln!(rules, "iifname \"{from}\" oifname \"{to}\" {some}drop");
        }
        rules.push_str("}\n}\n");
        self.namespace
            .run(|| pipe_into(Command::new("nft").args(["-f", "-"]), &rules))?
            .context("changing the rules of the lab's switches")
    }

    fn for_attached(&self, wiring: &Wiring, node: &str, up: bool) -> Result<()> {
        if !wiring.attached.contains(node) {
            return Ok(());
        }
        Network::ALL.iter().try_for_each(|network| self.switch(node, *network, up))
    }

    fn switch(&self, node: &str, network: Network, up: bool) -> Result<()> {
        sys::set_interface_up(&self.link_socket, &port(node, network), up).with_context(|| {
            let verb = if up { "plugging in" } else { "pulling" };
            format!("{verb} the {network} cable of {node}")
        })
    }

    fn lay_cable(&self, node: &str, network: Network, at: &Namespace, mac: Option<String>) -> Result<()> {
        let (port, bridge, interface) = (port(node, network), network.bridge(), network.interface());
        let mac = mac.map(|mac| format!("address {mac} ")).unwrap_or_default();
        self.namespace
            .ip_batch(&format!(
                "link add {port} type veth peer name {interface} {mac}netns {}\n\
                 link set {port} master {bridge}\n",
                at.name()
            ))
            .with_context(|| format!("laying the {network} cable of {node}"))
    }

    fn wiring(&self) -> MutexGuard<'_, Wiring> {
        self.wiring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The name of the switch port that the cable of `node` is in.
fn port(node: &str, network: Network) -> String {
    format!("{node}-{}", network.bridge())
}
