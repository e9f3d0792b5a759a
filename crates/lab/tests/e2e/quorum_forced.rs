//! The disaster door: most nodes are gone, and one goes on alone.

use std::time::Duration;

use holdfast_api::{ForceQuorum, ForcedQuorum, Severity, VmState};
use holdfast_lab::cluster::{ApiClient, VmTemplate};

use crate::bench::{DEADLINE, eventually, three_nodes};

fn force(client: &ApiClient, cluster: &str, others_are_off: bool) -> Result<ForcedQuorum, String> {
    let wish = ForceQuorum { cluster: cluster.into(), with: Vec::new(), others_are_off };
    client.post("/api/v1/quorum/force", &wish).map_err(|error| error.code().to_owned())
}

#[test]
fn one_of_three_goes_on_alone_and_the_others_come_back_as_listeners() {
    let (cluster, _turn) = three_nodes();
    let name = cluster.any().unwrap().cluster().unwrap().name;
    let web = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    let db = cluster.create_vm(&VmTemplate::new("db", 102)).unwrap();
    let written = web.writer(Duration::from_millis(10)).unwrap();
    let followers = cluster.followers().unwrap();
    let (survivor, lost) = (followers[0].clone(), [followers[1].clone(), cluster.coordinator().unwrap()]);
    let client = cluster.client(&survivor);
    assert_eq!(force(&client, &name, true), Err("conflict".into()), "there is a quorum");

    // One vote of three is left: nothing runs any more.
    let alive = cluster.host(&survivor).unwrap();
    for node in &lost {
        cluster.host(node).unwrap().power_off().unwrap();
    }
    let all_gone = || cluster.watch().timeline().iter().all(|seen| seen.gone.is_some()).then_some(());
    eventually("no VM runs", all_gone);
    let written = written.stop().unwrap();
    assert_eq!(force(&client, "another", true), Err("invalid".into()));
    let told = force(&client, &name, false).unwrap();
    assert!(!told.done && told.left_out.len() == 2, "{told:?}");
    assert!(!client.quorum().unwrap().has_quorum);

    let done = force(&client, &name, true).unwrap();
    assert!(done.done && done.generation == 1, "{done:?}");
    for vm in ["web", "db"] {
        cluster
            .wait_vm(vm, DEADLINE, |vm| vm.state == VmState::Running && vm.node.as_ref() == Some(&survivor))
            .unwrap();
    }
    web.wait_answer(DEADLINE).unwrap();
    let events = cluster.client(&survivor).events(0).unwrap();
    let recorded = events.iter().find(|event| event.text.contains("forced a quorum")).unwrap();
    assert_eq!(recorded.severity, Severity::Error, "{recorded:?}");
    assert!(lost.iter().all(|node| recorded.text.contains(node.as_str())), "{recorded:?}");

    // The others come back, meet the new generation, and learn anew.
    cluster.power_on_all().unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    let whole = cluster.wait("three votes", DEADLINE, |client| {
        client.quorum().ok().filter(|quorum| quorum.settled && quorum.present == 3)
    });
    assert_eq!(whole.unwrap().votes, 3);
    for node in &lost {
        let told = cluster.client(node).cluster().unwrap();
        assert_eq!(told.name, name);
    }
    assert!(alive.is_on());
    cluster.assert_clean(&[(&web, &written.acknowledged), (&db, &[])]).unwrap();
}
