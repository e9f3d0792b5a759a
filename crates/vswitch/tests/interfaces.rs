//! The host's networks, and news of them.

mod common;

use common::{DEADLINE, Namespace, external, tap};
use holdfast_vswitch::InterfaceKind;
use tokio::time::timeout;

#[test]
fn only_what_leads_out_is_listed() {
    let (host, fabric) = (Namespace::new(), Namespace::new());
    for (name, peer) in [("eth0", "p0"), ("eth1", "p1"), ("cont0", "c0")] {
        host.cable(name, &fabric, peer);
    }
    host.ip("addr add 192.0.2.7/24 dev eth0");
    host.ip("addr add 2001:db8::7/64 dev eth0 nodad");
    host.ip("link set eth0 mtu 1400");
    host.ip("link add docker0 up type bridge");
    host.ip("link set cont0 master docker0");
    fabric.ip("link set p1 down");
    host.run(|vswitch| async move {
        vswitch.ensure_switch(&external("lan", "eth1")).await.unwrap();
        vswitch.ensure_tap(&tap("hft-x", "hf-lan", None)).await.unwrap();
        let interfaces = vswitch.interfaces().await.unwrap();
        let names: Vec<_> = interfaces.iter().map(|interface| interface.name.as_str()).collect();
        assert_eq!(names, ["docker0", "eth0", "eth1"]);
        let [bridge, eth0, eth1] = &interfaces[..] else { unreachable!("three names") };
        assert_eq!(bridge.kind, InterfaceKind::Bridge);
        assert_eq!(eth0.addresses, [("192.0.2.7".parse().unwrap(), 24), ("2001:db8::7".parse().unwrap(), 64)]);
        assert_eq!((eth0.mtu, eth0.up, eth0.carrier), (1400, true, true));
        assert_eq!(eth0.kind, InterfaceKind::Veth);
        assert_eq!(eth0.speed_mbps, Some(10_000), "what the kernel says of every veth");
        assert!(eth0.mac.is_some() && eth0.master.is_none());
        assert_eq!(eth1.master.as_deref(), Some("hf-lan"));
        assert!(eth1.up && !eth1.carrier);
    });
}

#[test]
fn changes_are_told_and_put_together() {
    let (host, fabric) = (Namespace::new(), Namespace::new());
    host.cable("eth0", &fabric, "p0");
    let (host, fabric) = (&host, &fabric);
    host.run(|vswitch| async move {
        let mut changes = vswitch.watch().unwrap();
        host.ip("addr add 192.0.2.7/24 dev eth0");
        timeout(DEADLINE, changes.recv()).await.expect("an address is news").unwrap();

        // Thirty more while nobody reads (this runtime has one thread) are one or two pieces of
        // news, and the last change is always followed by one.
        let mut pieces = 0;
        for host_part in 10..40 {
            host.ip(&format!("addr add 192.0.2.{host_part}/24 dev eth0"));
        }
        loop {
            timeout(DEADLINE, changes.recv()).await.expect("addresses are news").unwrap();
            pieces += 1;
            let interfaces = vswitch.interfaces().await.unwrap();
            if interfaces[0].addresses.len() == 31 && changes.is_empty() {
                break;
            }
        }
        assert!(pieces <= 3, "{pieces} pieces of news");

        fabric.ip("link set p0 down");
        timeout(DEADLINE, changes.recv()).await.expect("a pulled cable is news").unwrap();
    });
}
