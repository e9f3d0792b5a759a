//! What would happen if: what is foretold is what happens.

use holdfast_api::{VmFate, VmState, WhatIfView};
use holdfast_lab::cluster::VmTemplate;

use crate::bench::{DEADLINE, bring, form, spec};

#[test]
fn a_lost_node_does_what_was_foretold_and_foretelling_does_nothing() {
    let (cluster, _turn) = form(spec());
    let vm = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    let victim = cluster.followers().unwrap().remove(0);
    bring(&cluster, "web", &victim);
    let client = cluster.any().unwrap();
    let since = cluster.last_event().unwrap();
    let ask = |phrase: &str| client.get::<WhatIfView>(&format!("/api/v1/what-if?ask={}", phrase.replace(' ', "%20")));

    let foretold = ask(&format!("lose {victim}")).unwrap();
    assert!(foretold.has_quorum, "{foretold:?}");
    assert_eq!(foretold.lost, std::slice::from_ref(&victim));
    assert_eq!(foretold.coordinators, [cluster.coordinator().unwrap()]);
    let web = &foretold.vms[0];
    assert_eq!((web.fate, web.from.as_ref()), (VmFate::Restarts, Some(&victim)), "{foretold:?}");
    let refused = ask("explode everything").unwrap_err();
    assert_eq!(refused.code(), "invalid");
    // Votes may still move by themselves after the cluster was formed.
    let happened = client.events(since).unwrap();
    assert!(happened.iter().all(|event| event.subject == "quorum"), "{happened:?}");

    cluster.host(&victim).unwrap().power_off().unwrap();
    let elsewhere = |view: &holdfast_api::VmView| view.state == VmState::Running && view.node.as_ref() != Some(&victim);
    let after = cluster.wait_vm("web", DEADLINE, elsewhere).unwrap();
    assert_eq!(after.node, web.to, "where it was foretold");
    vm.wait_answer(DEADLINE).unwrap();
    cluster.assert_clean(&[(&vm, &[])]).unwrap();
}
