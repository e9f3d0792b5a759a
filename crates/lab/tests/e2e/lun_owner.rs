//! Who owns a volume on a LUN: somebody at once, whom a user names, and somebody else
//! when its node is lost. Its name can change while its VMs are off.

use std::time::Duration;

use holdfast_api::{PathState, VolumeView};
use holdfast_lab::cluster::{Cluster, VmTemplate};

use crate::bench::{DEADLINE, all_but, eventually, refused, three_nodes};

const LUN: &str = "san";
const LUN_BYTES: u64 = 480 << 20;
const DISK_BYTES: u64 = 16 << 20;

fn volume(cluster: &Cluster, name: &str) -> VolumeView {
    cluster.any().unwrap().volume(name).unwrap()
}

/// The owner and its epoch, once the volume has one that is not `before`.
fn owner(cluster: &Cluster, name: &str, before: &str) -> (String, u64) {
    let settled = || {
        let owner = cluster.any().ok()?.volume(name).ok()?.owner?;
        (owner.node != before && !owner.leaving).then_some((owner.node, owner.epoch))
    };
    eventually("an owner", settled)
}

#[test]
fn a_volume_has_an_owner_whom_users_choose_and_losses_replace() {
    let (cluster, _turn) = three_nodes();
    cluster.add_lun(LUN, LUN_BYTES).unwrap();
    let (first, epoch) = owner(&cluster, LUN, "");
    let direct = || {
        let reach = volume(&cluster, LUN).reach;
        reach.iter().all(|reach| reach.path == Some(PathState::Direct)).then_some(())
    };
    eventually("three direct paths", direct);
    let template = VmTemplate::new("web", 101).memory(192 << 20).disk(LUN, DISK_BYTES);
    let vm = cluster.create_vm(&template).unwrap();
    vm.wait_answer(DEADLINE).unwrap();
    let writer = vm.writer(Duration::from_millis(10)).unwrap();

    // Whom a user names.
    let api = cluster.any().unwrap();
    assert_eq!(refused(api.set_owner(LUN, &first)).0, "conflict");
    assert_eq!(refused(api.set_owner(LUN, "n9")).0, "not_found");
    let next = all_but(&cluster, &[&first]).remove(0);
    api.set_owner(LUN, &next).unwrap();
    assert_eq!(owner(&cluster, LUN, &first), (next.clone(), epoch + 1));

    // Not who is redirected by hand.
    api.set_redirect(LUN, &next, true).unwrap();
    let (third, third_epoch) = owner(&cluster, LUN, &next);
    assert_eq!(third_epoch, epoch + 2);
    let shown = volume(&cluster, LUN);
    assert!(shown.reach.iter().all(|reach| reach.by_hand == (reach.node == next)), "{:?}", shown.reach);
    assert_eq!(refused(api.set_owner(LUN, &next)).0, "conflict");
    api.set_redirect(LUN, &next, false).unwrap();
    assert_eq!(owner(&cluster, LUN, ""), (third.clone(), third_epoch), "nothing else asks for another");

    // Nor who is lost.
    let lost = cluster.host(&third).unwrap();
    lost.power_off().unwrap();
    let (fourth, fourth_epoch) = owner(&cluster, LUN, &third);
    assert!(fourth != third && fourth_epoch == third_epoch + 1, "{fourth} {fourth_epoch}");
    vm.wait_answer(DEADLINE).unwrap();
    let wrote = writer.highest();
    eventually("a record", || (writer.highest() > wrote).then_some(()));
    let report = writer.stop().unwrap();
    assert_eq!(report.refused, 0, "the guest saw an error");

    // The name goes with the disks, once nobody has them open under the old one.
    let api = cluster.any().unwrap();
    assert_eq!(refused(api.rename_volume(LUN, "fast")).0, "conflict");
    cluster.switch_off("web").unwrap();
    assert_eq!(api.rename_volume(LUN, "fast").unwrap().vms, ["web"]);
    assert_eq!(refused(api.volume(LUN)).0, "not_found");
    assert_eq!(owner(&cluster, "fast", ""), (fourth, fourth_epoch));
    let job = api.start_vm("web").unwrap();
    cluster.job_done(&job, DEADLINE).unwrap();
    vm.wait_answer(DEADLINE).unwrap();
    let again = vm.writer(Duration::from_millis(10)).unwrap();
    eventually("records", || (again.highest() > report.highest() + 50).then_some(()));
    assert_eq!(again.stop().unwrap().refused, 0);
}
