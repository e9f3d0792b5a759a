//! Switches on real bridges.

mod common;

use common::{Namespace, external, tap};
use holdfast_vswitch::{Error, Switch, SwitchKind};

#[test]
fn a_private_switch_is_made_once_repaired_and_removed() {
    let host = Namespace::new();
    let switch = Switch { name: "quiet room".into(), kind: SwitchKind::Private };
    let bridge = host.run(|vswitch| async move {
        let bridge = vswitch.ensure_switch(&switch).await.unwrap();
        assert_eq!(vswitch.ensure_switch(&switch).await.unwrap(), bridge);
        bridge
    });
    let before = host.link(&bridge);
    assert_eq!(before["linkinfo"]["info_data"]["stp_state"], 0);
    assert_eq!(before["linkinfo"]["info_data"]["forward_delay"], 0);
    assert!(before["flags"].to_string().contains("UP"));
    assert!(before["flags"].to_string().contains("NOARP"));
    assert!(!host.ip(&format!("addr show {bridge}")).contains("inet6"));

    host.ip(&format!("link set {bridge} down type bridge stp_state 1 mcast_snooping 1"));
    host.run(|vswitch| async move {
        let switch = Switch { name: "quiet room".into(), kind: SwitchKind::Private };
        vswitch.ensure_switch(&switch).await.unwrap();
    });
    let repaired = host.link(&bridge);
    assert_eq!(repaired["linkinfo"]["info_data"]["stp_state"], 0);
    assert_eq!(repaired["linkinfo"]["info_data"]["mcast_snooping"], 0);
    assert!(repaired["flags"].to_string().contains("UP"));
    assert_eq!(repaired["ifindex"], before["ifindex"], "repaired, not made anew");
    assert_eq!(repaired["address"], before["address"]);

    host.run(|vswitch| async move {
        vswitch.remove_switch("quiet room").await.unwrap();
        vswitch.remove_switch("quiet room").await.unwrap();
    });
    assert!(!host.has(&bridge));
}

#[test]
fn an_external_switch_takes_its_uplink_and_gives_it_back() {
    let (host, fabric) = (Namespace::new(), Namespace::new());
    host.cable("eth1", &fabric, "p1");
    host.cable("eth2", &fabric, "p2");
    host.ip("link set eth1 down");
    host.run(|vswitch| async move {
        for _ in 0..2 {
            assert_eq!(vswitch.ensure_switch(&external("lan", "eth1")).await.unwrap(), "hf-lan");
        }
    });
    assert_eq!(host.link("eth1")["master"], "hf-lan");
    assert!(host.link("eth1")["flags"].to_string().contains("\"UP\""));

    // Another uplink replaces the first, an internal switch has none at all.
    host.run(|vswitch| async move {
        vswitch.ensure_switch(&external("lan", "eth2")).await.unwrap();
    });
    assert!(host.link("eth1")["master"].is_null());
    assert_eq!(host.link("eth2")["master"], "hf-lan");
    host.run(|vswitch| async move {
        let internal = Switch { name: "lan".into(), kind: SwitchKind::Internal };
        vswitch.ensure_switch(&internal).await.unwrap();
    });
    assert!(host.link("eth2")["master"].is_null());

    host.run(|vswitch| async move {
        vswitch.ensure_switch(&external("lan", "eth1")).await.unwrap();
        vswitch.ensure_tap(&tap("hft-x", "hf-lan", None)).await.unwrap();
        match vswitch.remove_switch("lan").await {
            Err(Error::SwitchInUse { ports, .. }) => assert_eq!(ports, ["hft-x"]),
            other => panic!("{other:?}"),
        }
        vswitch.remove_tap("hft-x").await.unwrap();
        vswitch.remove_switch("lan").await.unwrap();
    });
    assert!(!host.has("hf-lan"));
    assert!(host.link("eth1")["master"].is_null());
}

#[test]
fn a_bridge_of_the_host_is_used_and_left_alone() {
    let host = Namespace::new();
    host.ip("link add vmbr0 up type bridge stp_state 1");
    host.ip("addr add 192.0.2.1/24 dev vmbr0");
    let before = host.link("vmbr0");
    host.run(|vswitch| async move {
        assert_eq!(vswitch.ensure_switch(&external("lan", "vmbr0")).await.unwrap(), "vmbr0");
        vswitch.ensure_tap(&tap("hft-x", "vmbr0", None)).await.unwrap();
        let refused = vswitch.ensure_tap(&tap("hft-x", "vmbr0", Some(5))).await;
        assert!(matches!(refused, Err(Error::BridgeWithoutVlans { .. })), "{refused:?}");
        vswitch.remove_switch("lan").await.unwrap();
    });
    assert!(!host.has("hf-lan"));
    let after = host.link("vmbr0");
    assert_eq!(after["linkinfo"]["info_data"]["stp_state"], 1);
    assert_eq!(after["linkinfo"]["info_data"]["vlan_filtering"], 0);
    assert_eq!(after["mtu"], before["mtu"]);
}

#[test]
fn unusable_uplinks_are_refused_and_nothing_is_made() {
    let (host, fabric) = (Namespace::new(), Namespace::new());
    host.cable("eth0", &fabric, "p0");
    host.ip("addr add 192.0.2.7/24 dev eth0");
    host.cable("eth1", &fabric, "p1");
    host.ip("link add other type bridge");
    host.ip("link set eth1 master other");
    host.ip("tuntap add tap0 mode tap");
    host.run(|vswitch| async move {
        let refusal = async |uplink: &str| vswitch.ensure_switch(&external("lan", uplink)).await.unwrap_err();
        let error = refusal("eth0").await;
        assert!(matches!(error, Error::UplinkHasAddresses { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("192.0.2.7") && text.contains("another NIC"), "{text}");
        assert!(matches!(refusal("eth9").await, Error::UplinkMissing { .. }));
        match refusal("eth1").await {
            Error::UplinkInUse { master, .. } => assert_eq!(master, "other"),
            other => panic!("{other:?}"),
        }
        assert!(matches!(refusal("lo").await, Error::UplinkUnsuitable { .. }));
        assert!(matches!(refusal("tap0").await, Error::UplinkUnsuitable { .. }));
        assert!(matches!(refusal("no such name").await, Error::InvalidName { .. }));
    });
    assert!(host.link("eth0")["master"].is_null());
    assert!(!host.has("hf-lan"), "a refused switch leaves nothing behind");
}

#[test]
fn a_name_that_is_taken_is_refused() {
    let host = Namespace::new();
    host.ip("link add hf-a type veth peer name other");
    host.ip("link add hf-b type bridge");
    host.ip("link set hf-b alias somebody-elses");
    host.ip("link add hf-c type bridge");
    host.run(|vswitch| async move {
        let switch = |name: &str| Switch { name: name.into(), kind: SwitchKind::Internal };
        for name in ["a", "b"] {
            let refused = vswitch.ensure_switch(&switch(name)).await;
            assert!(matches!(refused, Err(Error::NameTaken { .. })), "{refused:?}");
            let refused = vswitch.remove_switch(name).await;
            assert!(matches!(refused, Err(Error::NameTaken { .. })), "{refused:?}");
        }
        // What a crash left between making and marking is taken up again.
        vswitch.ensure_switch(&switch("c")).await.unwrap();
    });
    assert!(host.has("hf-a") && host.has("hf-b"));
    assert_eq!(host.link("hf-c")["ifalias"], "holdfast internal - c");
}
