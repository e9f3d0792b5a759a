//! Taps: their life and their VLANs.

mod common;

use common::{DEADLINE, Namespace, eventually, external, frame, tap};
use holdfast_vswitch::{Error, Switch, SwitchKind, Tap, tap_name};

fn private(name: &str) -> Switch {
    Switch { name: name.into(), kind: SwitchKind::Private }
}

#[test]
fn a_tap_lives_as_long_as_it_is_wanted() {
    let host = Namespace::new();
    let name = tap_name("6e1c5c2e-1f5a-4a55-9d6c-6c8f3f1f2a01", 0);
    let wanted = Tap { mtu: Some(1400), ..tap(&name, "hf-lan", None) };
    host.run(|vswitch| async move {
        let early = vswitch.ensure_tap(&wanted).await;
        assert!(matches!(early, Err(Error::NoBridge { .. })), "{early:?}");
        vswitch.ensure_switch(&private("lan")).await.unwrap();
        for _ in 0..2 {
            vswitch.ensure_tap(&wanted).await.unwrap();
        }
    });
    let made = host.link(&name);
    assert_eq!((made["master"].as_str(), made["mtu"].as_u64()), (Some("hf-lan"), Some(1400)));
    assert!(made["address"].as_str().unwrap().starts_with("fe:"));
    let details = &made["linkinfo"]["info_data"];
    assert_eq!(details["type"], "tap");
    assert_eq!((&details["persist"], &details["vnet_hdr"]), (&true.into(), &true.into()));
    assert_eq!((&details["multi_queue"], &details["pi"]), (&false.into(), &false.into()));

    // Moved to another switch while a guest has it open: the guest's queue stays.
    let guest = host.guest(&name);
    let moved = name.clone();
    host.run(|vswitch| async move {
        vswitch.ensure_switch(&private("other")).await.unwrap();
        vswitch.ensure_tap(&tap(&moved, "hf-other", None)).await.unwrap();
        let taps = vswitch.list_taps().await.unwrap();
        assert_eq!(taps.len(), 1);
        assert_eq!(taps[0].bridge.as_deref(), Some("hf-other"));
        assert!(taps[0].open && taps[0].up);
        assert_eq!(taps[0].mtu, 1500);
    });
    assert_eq!(host.link(&name)["ifindex"], made["ifindex"]);
    drop(guest);

    host.run(|vswitch| async move {
        assert!(!vswitch.list_taps().await.unwrap()[0].open);
        vswitch.remove_tap(&name).await.unwrap();
        vswitch.remove_tap(&name).await.unwrap();
        assert_eq!(vswitch.list_taps().await.unwrap(), []);
    });
}

#[test]
fn what_is_not_a_vms_tap_is_neither_listed_nor_touched() {
    let host = Namespace::new();
    host.ip("tuntap add vnet0 mode tap");
    host.ip("link add hft-cable type veth peer name other");
    host.ip("tuntap add hft-many mode tap multi_queue");
    host.run(|vswitch| async move {
        vswitch.ensure_switch(&private("lan")).await.unwrap();
        let listed = vswitch.list_taps().await.unwrap();
        assert_eq!(listed.iter().map(|tap| tap.name.as_str()).collect::<Vec<_>>(), ["hft-many"]);
        for name in ["hft-cable", "hft-many"] {
            let made = vswitch.ensure_tap(&tap(name, "hf-lan", None)).await;
            assert!(matches!(made, Err(Error::NameTaken { .. })), "{made:?}");
            assert!(matches!(vswitch.remove_tap(name).await, Err(Error::NameTaken { .. })));
        }
        assert!(matches!(vswitch.remove_tap("vnet0").await, Err(Error::InvalidName { .. })));
        let wide = Tap { mtu: Some(70_000), ..tap("hft-x", "hf-lan", None) };
        assert!(matches!(vswitch.ensure_tap(&wide).await, Err(Error::InvalidMtu { .. })));
        for vlan in [0, 4095] {
            let refused = vswitch.ensure_tap(&tap("hft-x", "hf-lan", Some(vlan))).await;
            assert!(matches!(refused, Err(Error::InvalidVlan { .. })), "{refused:?}");
        }
    });
    assert!(host.has("vnet0") && host.has("hft-cable") && !host.has("hft-x"));
}

#[test]
fn vlans_part_guests_and_reach_the_uplink_tagged() {
    let (host, fabric) = (Namespace::new(), Namespace::new());
    if !host.kernel_filters_vlans() {
        // What is promised there is a clear refusal, with nothing made.
        host.run(|vswitch| async move {
            vswitch.ensure_switch(&private("lan")).await.unwrap();
            let refused = vswitch.ensure_tap(&tap("hft-a", "hf-lan", Some(10))).await;
            assert!(matches!(refused, Err(Error::KernelWithoutVlans { vlan: 10, .. })), "{refused:?}");
            assert_eq!(vswitch.list_taps().await.unwrap(), []);
        });
        return;
    }
    host.cable("eth1", &fabric, "p1");
    host.run(|vswitch| async move {
        vswitch.ensure_switch(&external("lan", "eth1")).await.unwrap();
        for (name, vlan) in [("hft-a", Some(10)), ("hft-b", Some(10)), ("hft-c", Some(20)), ("hft-d", None)] {
            for _ in 0..2 {
                vswitch.ensure_tap(&tap(name, "hf-lan", vlan)).await.unwrap();
            }
        }
    });
    assert_eq!(host.vlans("hft-a"), [(10, true)]);
    assert_eq!(host.vlans("hft-d"), [(1, true)]);
    assert_eq!(host.vlans("eth1"), [(1, true), (10, false), (20, false)]);

    let [mut a, mut b, mut c, mut d] = ["hft-a", "hft-b", "hft-c", "hft-d"].map(|name| host.guest(name));
    eventually("the ports forward", || {
        let ports = host.bridge("link show");
        let ports = ports.as_array().unwrap();
        ports.iter().filter(|port| port["state"] == "forwarding").count() == 5
    });
    let everybody = [0xff; 6];
    a.send(&frame(everybody, [2, 0, 0, 0, 0, 1], b"for VLAN 10"));
    assert!(b.receives(b"for VLAN 10", DEADLINE));
    // Each gets a frame of its own VLAN after it; had the other leaked, it would have come first.
    d.send(&frame(everybody, [2, 0, 0, 0, 0, 2], b"for VLAN 1"));
    assert!(!c.receives(b"for VLAN 10", std::time::Duration::from_millis(50)));
    assert!(!d.receives(b"for VLAN 10", std::time::Duration::from_millis(50)));

    host.run(|vswitch| async move {
        vswitch.ensure_tap(&tap("hft-a", "hf-lan", None)).await.unwrap();
        vswitch.remove_tap("hft-c").await.unwrap();
    });
    assert_eq!(host.vlans("hft-a"), [(1, true)]);
    assert_eq!(host.vlans("eth1"), [(1, true), (10, false)]);
    // A new uplink is given the VLANs too.
    host.cable("eth2", &fabric, "p2");
    host.run(|vswitch| async move {
        vswitch.ensure_switch(&external("lan", "eth2")).await.unwrap();
    });
    assert_eq!(host.vlans("eth2"), [(1, true), (10, false)]);
}
