//! Cables, loss and partitions in real namespaces.

mod common;

use std::net::UdpSocket;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{eventually, lab, passes, socket};
use holdfast_lab::{CLIENT, Host, HostSpec, Lab, Network};

const PATIENCE: Duration = Duration::from_millis(500);
const NOTHING_WITHIN: Duration = Duration::from_millis(150);

fn host(lab: &Lab, name: &str) -> Arc<Host> {
    let host = lab.add_host(HostSpec::new(name)).expect("host");
    host.power_on().expect("power");
    host
}

fn on(host: &Host, network: Network) -> UdpSocket {
    socket(&host.namespace(), host.address(network).expect("address"))
}

#[test]
fn a_pulled_cable_carries_nothing_until_it_is_plugged_in() {
    let lab = lab();
    let (n1, n2) = (host(&lab, "n1"), host(&lab, "n2"));
    let (a, b) = (on(&n1, Network::Heartbeat), on(&n2, Network::Heartbeat));
    let (c, d) = (on(&n1, Network::Storage), on(&n2, Network::Storage));
    eventually("heartbeats pass", || passes(&a, &b, PATIENCE));
    eventually("storage passes", || passes(&c, &d, PATIENCE));

    lab.fabric().pull("n1", Network::Heartbeat).expect("pull");
    assert!(!passes(&a, &b, NOTHING_WITHIN) && !passes(&b, &a, NOTHING_WITHIN));
    assert!(passes(&c, &d, PATIENCE), "the other cables are not touched");
    let carrier = "/sys/class/net/hb0/carrier";
    eventually("the host sees that the link is gone", || n1.exec(&["cat", carrier]).expect("cat").stdout == b"0\n");

    let plugged = Instant::now();
    lab.fabric().plug("n1", Network::Heartbeat).expect("plug");
    eventually("heartbeats pass again", || passes(&a, &b, Duration::from_millis(20)));
    println!("traffic {:?} after plugging in", plugged.elapsed());
}

#[test]
fn all_cables_go_at_once() {
    let lab = lab();
    let (n1, n2) = (host(&lab, "n1"), host(&lab, "n2"));
    let networks = [Network::Management, Network::Heartbeat, Network::Migration, Network::Storage];
    let pairs = networks.map(|network| (on(&n1, network), on(&n2, network)));
    for (a, b) in &pairs {
        eventually("it passes", || passes(a, b, PATIENCE));
    }
    let (before, after) = lab.fabric().pull_all("n1").expect("pull");
    println!("five cables pulled within {:?}", after - before);
    assert!(after - before < Duration::from_millis(200));
    for (a, b) in &pairs {
        assert!(!passes(a, b, NOTHING_WITHIN) && !passes(b, a, NOTHING_WITHIN));
    }
    lab.fabric().plug_all("n1").expect("plug");
    for (a, b) in &pairs {
        eventually("it passes again", || passes(a, b, PATIENCE));
    }
}

#[test]
fn a_one_way_drop_leaves_the_way_back_open() {
    let lab = lab();
    let (n1, n2) = (host(&lab, "n1"), host(&lab, "n2"));
    let (a, b) = (on(&n1, Network::Heartbeat), on(&n2, Network::Heartbeat));
    eventually("both ways pass", || passes(&a, &b, PATIENCE) && passes(&b, &a, PATIENCE));

    lab.fabric().drop_from("n1", "n2").expect("drop");
    assert!(!passes(&a, &b, NOTHING_WITHIN), "n1 is not heard");
    assert!(passes(&b, &a, PATIENCE), "n2 is");
    lab.fabric().heal().expect("heal");
    assert!(passes(&a, &b, PATIENCE));

    lab.fabric().lose(Network::Heartbeat, "n1", "n2", 50).expect("lose");
    // Of 200 datagrams half are lost; outside 50..150 less often than once in 10^11.
    let passed = (0..200).filter(|_| passes(&a, &b, Duration::from_millis(20))).count();
    assert!((50..150).contains(&passed), "{passed} of 200 passed a loss of 50 %");
    assert!(lab.fabric().lose(Network::Heartbeat, "n1", "n2", 101).is_err());
}

#[test]
fn a_partition_parts_both_ways_and_spares_each_side() {
    let lab = lab();
    let (n1, n2, n3) = (host(&lab, "n1"), host(&lab, "n2"), host(&lab, "n3"));
    let management = Network::Management;
    let (a, b, c) = (on(&n1, management), on(&n2, management), on(&n3, management));
    let client = socket(lab.fabric().client().name(), management.client_address().expect("the client's address"));
    for to in [&b, &c, &client] {
        eventually("it passes", || passes(&a, to, PATIENCE) && passes(to, &a, PATIENCE));
    }
    eventually("it passes", || passes(&b, &c, PATIENCE));

    lab.fabric().partition(&["n1"], &["n2", "n3", CLIENT]).expect("partition");
    for other in [&b, &c, &client] {
        assert!(!passes(&a, other, NOTHING_WITHIN) && !passes(other, &a, NOTHING_WITHIN));
    }
    assert!(passes(&b, &c, PATIENCE) && passes(&c, &b, PATIENCE));
    lab.fabric().heal().expect("heal");
    assert!(passes(&a, &b, PATIENCE) && passes(&client, &a, PATIENCE));
}

#[test]
fn a_limited_link_is_slow_and_works() {
    let lab = lab();
    let (n1, n2) = (host(&lab, "n1"), host(&lab, "n2"));
    let transfer = |bytes: usize| {
        use std::io::{Read, Write};
        let address = (n2.address(Network::Migration).expect("address"), 7001);
        let listener = lab_listener(&n2.namespace(), address);
        let sender = n1.namespace();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                holdfast_lab::in_netns(&sender, || {
                    let mut stream = std::net::TcpStream::connect(address).expect("connect");
                    stream.set_write_timeout(Some(common::DEADLINE)).expect("timeout");
                    stream.write_all(&vec![0; bytes]).expect("write");
                })
                .expect("namespace");
            });
            let (mut stream, _) = listener.accept().expect("accept");
            stream.set_read_timeout(Some(common::DEADLINE)).expect("timeout");
            let begun = Instant::now();
            let mut received = Vec::new();
            stream.read_to_end(&mut received).expect("read");
            assert_eq!(received.len(), bytes);
            begun.elapsed()
        })
    };
    lab.fabric().limit("n2", Network::Migration, Some(100)).expect("limit");
    let slow = transfer(2 << 20);
    // 2 MiB at 100 Mbit/s last 168 ms, less what the burst lets through at once.
    assert!(slow > Duration::from_millis(100), "{slow:?}");
    lab.fabric().limit("n2", Network::Migration, None).expect("lift");
    println!("2 MiB: {slow:?} at 100 Mbit/s, {:?} without a limit", transfer(2 << 20));
}

fn lab_listener(namespace: &str, address: (std::net::Ipv4Addr, u16)) -> std::net::TcpListener {
    holdfast_lab::in_netns(namespace, || std::net::TcpListener::bind(address)).expect("namespace").expect("bind")
}

#[test]
fn names_that_do_not_fit_are_refused() {
    let lab = lab();
    for name in ["", "elevenchars", "N1", "n-1", "client", "fabric"] {
        assert!(lab.add_host(HostSpec::new(name)).is_err(), "{name:?}");
    }
    lab.add_host(HostSpec::new("n1")).expect("a good name");
    assert!(lab.add_host(HostSpec::new("n1")).is_err(), "twice");
}
