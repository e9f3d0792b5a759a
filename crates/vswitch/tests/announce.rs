//! An announcement moves a guest's traffic before the guest says a word.

mod common;

use std::time::{Duration, Instant};

use common::{DEADLINE, Guest, Namespace, eventually, external, frame, tap};
use holdfast_vswitch::{Error, SwitchKind};

const GUEST: [u8; 6] = [0x52, 0x54, 0, 0xaa, 0xbb, 1];
const CLIENT: [u8; 6] = [0x52, 0x54, 0, 0xaa, 0xbb, 2];
const TAP: &str = "hft-guest-0";

/// Two hosts with a switch and the guest's tap each, and a client, on one fabric.
struct Site {
    fabric: Namespace,
    hosts: [Namespace; 2],
    guests: [Guest; 2],
    client: Guest,
}

impl Site {
    fn new(vlan: Option<u16>) -> Site {
        let fabric = Namespace::new();
        let filtering = if vlan.is_some() { "vlan_filtering 1" } else { "" };
        fabric.ip(&format!("link add fabric up type bridge forward_delay 0 mcast_snooping 0 {filtering}"));
        let hosts = [Namespace::new(), Namespace::new()];
        for (host, port) in hosts.iter().zip(["pa", "pb"]) {
            host.cable("eth1", &fabric, port);
            fabric.ip(&format!("link set {port} master fabric"));
            host.run(|vswitch| async move {
                vswitch.ensure_switch(&external("lan", "eth1")).await.unwrap();
                vswitch.ensure_tap(&tap(TAP, "hf-lan", vlan)).await.unwrap();
            });
        }
        fabric.ip("tuntap add hft-client mode tap vnet_hdr");
        fabric.ip("link set hft-client master fabric up");
        if let Some(vlan) = vlan {
            for port in ["pa", "pb"] {
                fabric.bridge(&format!("vlan add dev {port} vid {vlan}"));
            }
            fabric.bridge(&format!("vlan add dev hft-client vid {vlan} pvid untagged"));
        }
        let client = fabric.guest("hft-client");
        let guests = [hosts[0].guest(TAP), hosts[1].guest(TAP)];
        let site = Site { fabric, hosts, guests, client };
        eventually("every port forwards", || {
            [(&site.fabric, 3), (&site.hosts[0], 2), (&site.hosts[1], 2)].iter().all(|(namespace, ports)| {
                let links = namespace.bridge("link show");
                let links = links.as_array().unwrap();
                links.iter().filter(|link| link["state"] == "forwarding").count() == *ports
            })
        });
        site
    }

    fn fabric_knows(&self) -> Vec<String> {
        self.fabric.learned(GUEST).into_iter().map(|(port, _)| port).collect()
    }
}

fn traffic_moves(vlan: Option<u16>) {
    let mut site = Site::new(vlan);
    let [source, target] = &mut site.guests;
    source.send(&frame([0xff; 6], GUEST, b"I am at the source"));
    assert!(site.client.receives(b"I am at the source", DEADLINE));
    assert_eq!(site.fabric.learned(GUEST), [("pa".to_owned(), vlan.map(u64::from))]);

    site.client.send(&frame(GUEST, CLIENT, b"before"));
    assert!(source.receives(b"before", DEADLINE));
    assert!(!target.receives(b"before", Duration::from_millis(50)));

    let took = site.hosts[1].run(|vswitch| async move {
        let announcement = vswitch.prepare_announcement("hf-lan", TAP, GUEST).await.unwrap();
        let started = Instant::now();
        announcement.send().await.unwrap();
        started.elapsed()
    });
    println!("announced within {took:?}");
    // Sent at once, with no waiting in between: the announcement has already arrived.
    site.client.send(&frame(GUEST, CLIENT, b"after"));
    assert!(site.guests[1].receives(b"after", DEADLINE), "waits in the target's queue");
    assert!(!site.guests[0].receives(b"after", Duration::from_millis(50)));
    assert_eq!(site.fabric_knows(), ["pb"]);
    let here = site.hosts[1].learned(GUEST);
    assert!(!here.is_empty() && here.iter().all(|(port, _)| port == TAP), "{here:?}");
    assert!(site.hosts[0].learned(GUEST).iter().all(|(port, _)| port == "eth1"));

    // The migration failed after all: the target forgets, the source announces.
    site.hosts[1].run(|vswitch| async move {
        for _ in 0..2 {
            vswitch.retract(TAP, GUEST).await.unwrap();
        }
    });
    assert_eq!(site.hosts[1].learned(GUEST), []);
    site.hosts[0].run(|vswitch| async move {
        vswitch.announce("hf-lan", TAP, GUEST).await.unwrap();
    });
    site.client.send(&frame(GUEST, CLIENT, b"again"));
    assert!(site.guests[0].receives(b"again", DEADLINE));
    assert_eq!(site.fabric_knows(), ["pa"]);
}

#[test]
fn traffic_moves_with_the_announcement() {
    traffic_moves(None);
}

#[test]
fn traffic_in_a_vlan_moves_with_the_announcement() {
    // A kernel without VLANs in bridges has no such switches; that it says so is tap.rs's test.
    if Namespace::new().kernel_filters_vlans() {
        traffic_moves(Some(42));
    }
}

#[test]
fn an_announcement_takes_less_than_a_millisecond() {
    let site = Site::new(None);
    let (mut sends, mut alls) = site.hosts[1].run(|vswitch| async move {
        let announcement = vswitch.prepare_announcement("hf-lan", TAP, GUEST).await.unwrap();
        let (mut sends, mut alls) = (Vec::new(), Vec::new());
        for _ in 0..101 {
            let started = Instant::now();
            announcement.send().await.unwrap();
            sends.push(started.elapsed());
            let started = Instant::now();
            vswitch.announce("hf-lan", TAP, GUEST).await.unwrap();
            alls.push(started.elapsed());
        }
        (sends, alls)
    });
    sends.sort();
    alls.sort();
    println!("send: median {:?}, longest {:?}", sends[50], sends[100]);
    println!("prepare and send: median {:?}, longest {:?}", alls[50], alls[100]);
    // The machine may be busy with other things, so the best of many is what is held to it.
    assert!(sends[0] < Duration::from_millis(1), "{:?}", sends[0]);
}

#[test]
fn an_announcement_into_nowhere_is_refused() {
    let host = Namespace::new();
    host.run(|vswitch| async move {
        let private = holdfast_vswitch::Switch { name: "lan".into(), kind: SwitchKind::Private };
        let announce = async || vswitch.announce("hf-lan", TAP, GUEST).await;
        assert!(matches!(announce().await, Err(Error::NoBridge { .. })));
        vswitch.ensure_switch(&private).await.unwrap();
        assert!(matches!(announce().await, Err(Error::NoTap { .. })));
        vswitch.ensure_tap(&tap(TAP, "hf-lan", None)).await.unwrap();
        assert!(matches!(announce().await, Err(Error::TapIdle { .. })));
        vswitch.retract(TAP, GUEST).await.unwrap();
        // Opened just now: the port may not forward yet, the announcement waits for it.
        let _guest = holdfast_vswitch::attach_tap(TAP).unwrap();
        announce().await.unwrap();
    });
    eventually("the guest is gone, and its entries with it", || host.learned(GUEST).is_empty());
}
