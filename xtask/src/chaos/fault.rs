//! What can go wrong, and how it is made to.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use holdfast_lab::Network;
use holdfast_lab::cluster::{Cluster, GuestVm};

use crate::dice::Dice;

/// The networks that nodes talk on.
const NETWORKS: [Network; 4] = [Network::Management, Network::Heartbeat, Network::Migration, Network::Storage];

/// One fault.
#[derive(Debug, Clone)]
pub enum Fault {
    /// The power of these nodes is cut at once.
    Power(Vec<String>),
    /// All cables of a node are pulled.
    Cables(String),
    /// A node's cable to one network is pulled.
    Cable(String, Network),
    /// A whole network goes dark.
    Network(Network),
    /// Nothing gets from the one nodes to the others; the way back is open.
    OneWay(Vec<String>, Vec<String>),
    /// Two sides do not see each other.
    Parted(Vec<String>, Vec<String>),
    /// So many percent of the frames between all nodes vanish on a network.
    Loss(Network, u8),
    /// A node's cables are pulled and plugged in, over and over.
    Flapping(String, Vec<(u64, u64)>),
    /// An agent stands still.
    AgentStopped(String),
    /// An agent is killed.
    AgentKilled(String),
    /// A keeper is killed.
    KeeperKilled(String),
    /// A VM's QEMU is killed, wherever it is.
    QemuKilled(String),
    /// The disk under a node's log is full.
    DiskFull(String),
}

impl Fault {
    /// Draws one for a cluster of these nodes and VMs; `small` are the nodes whose
    /// disk can be filled.
    pub fn draw(dice: &mut Dice, nodes: &[String], vms: &[String], small: &[String]) -> Fault {
        let node = dice.one_of(nodes).clone();
        let mixed = dice.shuffled(nodes);
        let (one, rest) = (vec![mixed[0].clone()], mixed[1..].to_vec());
        match dice.between(0, 15) {
            0 if dice.one_in(3) => Fault::Power(mixed),
            0..=2 => Fault::Power(one),
            3 => Fault::Cables(node),
            4 => Fault::Cable(node, *dice.one_of(&NETWORKS)),
            5 => Fault::Network(*dice.one_of(&NETWORKS)),
            6 => Fault::OneWay(one, rest),
            7 => Fault::OneWay(rest, one),
            8 => {
                let half = nodes.len() / 2;
                Fault::Parted(mixed[..half].to_vec(), mixed[half..].to_vec())
            }
            9 => Fault::Parted(one, vec![mixed[1].clone()]),
            10 => Fault::Loss(*dice.one_of(&NETWORKS), *dice.one_of(&[10, 30, 60])),
            11 => Fault::Flapping(node, (0..4).map(|_| (dice.between(50, 2000), dice.between(20, 800))).collect()),
            12 => Fault::AgentStopped(node),
            13 => match dice.one_in(2) {
                true => Fault::AgentKilled(node),
                false => Fault::KeeperKilled(node),
            },
            14 => Fault::QemuKilled(dice.one_of(vms).clone()),
            _ => Fault::DiskFull(dice.one_of(small).clone()),
        }
    }

    /// Its kind, as the report counts it.
    pub fn kind(&self) -> &'static str {
        match self {
            Fault::Power(nodes) if nodes.len() > 1 => "power of all nodes cut",
            Fault::Power(_) => "power cut",
            Fault::Cables(_) => "all cables of a node pulled",
            Fault::Cable(..) => "one cable pulled",
            Fault::Network(_) => "one network dark",
            Fault::OneWay(..) => "one-way loss",
            Fault::Parted(..) => "partition",
            Fault::Loss(..) => "frames lost at random",
            Fault::Flapping(..) => "links flapping",
            Fault::AgentStopped(_) => "agent stopped",
            Fault::AgentKilled(_) => "agent killed",
            Fault::KeeperKilled(_) => "keeper killed",
            Fault::QemuKilled(_) => "QEMU killed",
            Fault::DiskFull(_) => "disk full",
        }
    }

    /// Makes it happen; what has to be undone is noted in `undo`.
    ///
    /// # Errors
    /// When it cannot happen right now, e.g. as the node has no power.
    pub fn inject(&self, cluster: &Cluster, vms: &[GuestVm], undo: &mut Undo) -> Result<()> {
        let fabric = cluster.lab().fabric();
        let names = |all: &[String]| all.iter().map(|name| cluster.host(name)).collect::<Result<Vec<_>>>();
        fn text(all: &[String]) -> Vec<&str> {
            all.iter().map(String::as_str).collect()
        }
        match self {
            Fault::Power(nodes) => {
                let hosts = names(nodes)?;
                std::thread::scope(|scope| {
                    let cuts: Vec<_> = hosts.iter().map(|host| scope.spawn(|| host.power_off().is_ok())).collect();
                    // The last one too, whether or not the first had power.
                    let cut = cuts.into_iter().filter_map(|cut| cut.join().ok()).filter(|cut| *cut).count();
                    if cut == 0 { bail!("no power to cut") } else { Ok(()) }
                })
            }
            Fault::Cables(node) => fabric.pull_all(node).map(drop),
            Fault::Cable(node, network) => fabric.pull(node, *network),
            Fault::Network(network) => cluster.hosts().iter().try_for_each(|host| fabric.pull(host.name(), *network)),
            Fault::OneWay(from, to) => from
                .iter()
                .flat_map(|from| to.iter().map(move |to| (from, to)))
                .try_for_each(|(from, to)| fabric.drop_from(from, to)),
            Fault::Parted(one, other) => fabric.partition(&text(one), &text(other)),
            Fault::Loss(network, percent) => {
                let hosts = cluster.hosts();
                let pairs = hosts.iter().flat_map(|one| hosts.iter().map(move |other| (one.name(), other.name())));
                pairs
                    .filter(|(one, other)| one != other)
                    .try_for_each(|(one, other)| fabric.lose(*network, one, other, *percent))
            }
            Fault::Flapping(node, times) => {
                let times: Vec<_> = times
                    .iter()
                    .map(|(out, into)| (Duration::from_millis(*out), Duration::from_millis(*into)))
                    .collect();
                let length = times.iter().map(|(out, into)| *out + *into).sum();
                fabric.flap(node, length, times).map(drop)
            }
            Fault::AgentStopped(node) => {
                undo.stopped.push((node.clone(), cluster.stop_agent(node)?));
                Ok(())
            }
            Fault::AgentKilled(node) => cluster.kill_agent(node),
            Fault::KeeperKilled(node) => cluster.kill_keeper(node),
            Fault::QemuKilled(name) => {
                let Some(vm) = vms.iter().find(|vm| vm.name == *name) else { bail!("there is no VM {name}") };
                let hosts = cluster.hosts();
                let Some(host) = hosts.iter().find(|host| cluster.qemu_pid(host.name(), &vm.id).is_ok()) else {
                    bail!("VM {name} runs nowhere")
                };
                cluster.kill_qemu(host.name(), &vm.id)
            }
            Fault::DiskFull(node) => {
                let filler = cluster.host(node)?.directory().join("var/filler");
                undo.fillers.push(filler.clone());
                fill(&filler)
            }
        }
    }
}

/// Writes until there is no room.
fn fill(file: &PathBuf) -> Result<()> {
    let mut filler = fs::File::create(file)?;
    loop {
        match filler.write_all(&[b'x'; 4096]) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// What has to be undone by hand when all is to be well again.
#[derive(Debug, Default)]
pub struct Undo {
    stopped: Vec<(String, i32)>,
    fillers: Vec<PathBuf>,
}

impl Undo {
    /// Ends every fault: all cables in, all frames through, everybody awake, room
    /// on the disks, power for all.
    ///
    /// # Errors
    /// When a host does not come up.
    pub fn heal(self, cluster: &Cluster) -> Result<()> {
        let fabric = cluster.lab().fabric();
        fabric.heal()?;
        for host in cluster.hosts() {
            fabric.plug_all(host.name())?;
        }
        for filler in self.fillers {
            let _ = fs::remove_file(filler);
        }
        for (node, pid) in self.stopped {
            // It may have lost its power while it stood still.
            let _ = cluster.go_on(&node, pid);
        }
        cluster.power_on_all()
    }
}
