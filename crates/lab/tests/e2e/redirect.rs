//! A LUN on the storage network: a node loses its path to it while a VM there writes, and
//! goes on through the volume's owner, also when that dies, until its path is back.

use std::time::Duration;

use holdfast_api::{AddVolume, PathState, VolumeView};
use holdfast_lab::cluster::{Cluster, VmTemplate};
use holdfast_lab::{Network, San};

use crate::bench::{DEADLINE, eventually, three_nodes};
use crate::lun::nothing_is_lost;

const LUN: &str = "san";
const LUN_BYTES: u64 = 480 << 20;
const SLAB_BYTES: u64 = 16 << 20;

fn volume(cluster: &Cluster) -> VolumeView {
    let volumes = cluster.any().unwrap().volumes().unwrap();
    volumes.into_iter().find(|volume| volume.name == LUN).unwrap()
}

fn wait_path(cluster: &Cluster, node: &str, wanted: PathState) {
    eventually(&format!("{node} is {wanted:?}"), || {
        let volume = volume(cluster);
        let reach = volume.reach.iter().find(|reach| reach.node == node)?;
        (reach.path == Some(wanted)).then_some(())
    });
}

fn owner(cluster: &Cluster) -> String {
    eventually("an owner", || volume(cluster).owner.map(|owner| owner.node))
}

#[test]
fn a_vm_writes_on_while_its_node_has_no_path_and_while_owners_die() {
    let (cluster, _turn) = three_nodes();
    let device = cluster.lab().directory().join("lun");
    let san = San::start(cluster.lab(), &device, LUN_BYTES).unwrap();
    let request = AddVolume { name: LUN.into(), directory: None, lun: Some(san.lun()), erase: None };
    eventually("the LUN becomes a volume", || cluster.any().unwrap().add_volume(&request).ok());
    cluster.wait_ready(DEADLINE).unwrap();
    let template = VmTemplate::new("web", 101).memory(192 << 20).disk(LUN, SLAB_BYTES);
    let vm = cluster.create_vm(&template).unwrap();
    let boot = vm.wait_answer(DEADLINE).unwrap().boot_id;
    let first = owner(&cluster);
    if cluster.node_of("web").unwrap() == first {
        let away = cluster.hosts().iter().map(|host| host.name().to_owned()).find(|name| *name != first).unwrap();
        cluster.migrate("web", &away, DEADLINE).unwrap();
    }
    let home = cluster.node_of("web").unwrap();
    let writer = vm.writer(Duration::from_millis(10)).unwrap();
    let wrote = |count: u64| {
        let wanted = writer.highest() + count;
        eventually("records", || (writer.highest() >= wanted).then_some(()));
    };
    wrote(50);
    let fabric = cluster.lab().fabric();

    // Its node's cable to the storage is pulled, and plugged in again.
    for _ in 0..2 {
        fabric.pull(&home, Network::Storage).unwrap();
        wait_path(&cluster, &home, PathState::Redirected);
        wrote(50);
        fabric.plug(&home, Network::Storage).unwrap();
        wait_path(&cluster, &home, PathState::Direct);
        wrote(50);
    }

    // The owner's volume server dies while it is gone through, and then its host.
    fabric.pull(&home, Network::Storage).unwrap();
    wait_path(&cluster, &home, PathState::Redirected);
    wrote(20);
    let server = cluster.volume_server_pid(&first).unwrap();
    cluster.host(&first).unwrap().kill(server, nix::sys::signal::Signal::SIGKILL).unwrap();
    wrote(50);
    cluster.host(&first).unwrap().power_off().unwrap();
    wrote(50);
    assert_ne!(owner(&cluster), first);
    fabric.plug(&home, Network::Storage).unwrap();
    wait_path(&cluster, &home, PathState::Direct);
    wrote(50);

    assert_eq!(vm.wait_answer(DEADLINE).unwrap().boot_id, boot);
    nothing_is_lost(&cluster, &device, &vm, writer);
}
