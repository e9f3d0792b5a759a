//! The wire format, and what must not pass.

use super::*;
use crate::realtime::tests::allocations;

fn pair() -> (Link, Link) {
    let (one, two) = (SecretKey([1; 32]), SecretKey([2; 32]));
    let cluster = Uuid::from_u128(0x5eed);
    let keeper = Ends { cluster, me: NodeId(1), secret: &one, peer: NodeId(2), public: two.public() };
    let agent = Ends { cluster, me: NodeId(2), secret: &two, peer: NodeId(1), public: one.public() };
    (Link::new(&keeper, Side::Keeper, 7).unwrap(), Link::new(&agent, Side::Agent, 9).unwrap())
}

const ASK: Message = Message::Heartbeat { sent: BootTime(1_000), echo: 5, acknowledged: 2 };
const GRANT: Message = Message::Grant(Grant {
    incarnation: Incarnation(7),
    sequence: 3,
    sent: BootTime(1_000),
    term: NodeTerm(4),
    timing: LeaseTiming { length_ms: 1_500, heartbeat_ms: 100 },
});

fn open(link: &mut Link, datagram: &[u8]) -> Option<Message> {
    let mut bytes = [0; 256];
    bytes[..datagram.len()].copy_from_slice(datagram);
    let header = Header::parse(datagram)?;
    link.open(&header, &mut bytes[..datagram.len()])
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The wire format is a contract between versions: a change needs a new version
/// byte. The expected bytes come from an independent implementation (Python's
/// `cryptography` and `hmac`).
#[test]
fn the_wire_format_is_what_it_was() {
    let (keeper, agent) = pair();
    assert_eq!(
        hex(keeper.seal(2, 3, &ASK).as_bytes()),
        "4846484202010200010000000000000007000000000000000300000000000000ca54ff0883066f4f96cac265c5d63e1120717960f0eb34ae07651c9d42bd608acbc3d5a02c158a99"
    );
    assert_eq!(
        hex(agent.seal(0, 8, &GRANT).as_bytes()),
        "4846484202020000020000000000000009000000000000000800000000000000f8c6ba87140f14f709a3070c501f774fe2a1875475ec69d28adcdc9785440657b0e4a39790b374fcabe6c9892bc10d61a1ae8637f413e61d292f3b2ccd973f8d"
    );
}

#[test]
fn both_sides_understand_each_other() {
    let (mut keeper, mut agent) = pair();
    let sealed = keeper.seal(2, 3, &ASK);
    assert_eq!(open(&mut agent, sealed.as_bytes()), Some(ASK));
    let header = Header::parse(sealed.as_bytes()).unwrap();
    assert_eq!((header.from, header.life, header.counter, header.path), (NodeId(1), 7, 3, 2));
    let (incarnation, challenge, sequence) = (Incarnation(7), 11, 3);
    for answer in [GRANT, Message::Challenge { incarnation, challenge }, Message::Probe { incarnation, sequence }] {
        assert_eq!(open(&mut keeper, agent.seal(0, 1, &answer).as_bytes()), Some(answer));
    }
}

#[test]
fn every_changed_bit_is_noticed() {
    let (mut keeper, mut agent) = pair();
    for (sealed, link) in [(keeper.seal(1, 3, &ASK), &mut agent), (pair().1.seal(0, 8, &GRANT), &mut keeper)] {
        let length = sealed.as_bytes().len();
        for bit in 0..length * 8 {
            let mut changed = sealed;
            changed.bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(open(link, changed.as_bytes()), None, "bit {bit}");
        }
        for shorter in 0..length {
            assert_eq!(open(link, &sealed.as_bytes()[..shorter]), None, "{shorter} bytes");
        }
    }
}

#[test]
fn a_datagram_is_bound_to_cluster_receiver_and_direction() {
    let (mut keeper, _) = pair();
    let (one, two) = (SecretKey([1; 32]), SecretKey([2; 32]));
    let sealed = keeper.seal(0, 1, &ASK);
    let ends = Ends { cluster: Uuid::from_u128(1), me: NodeId(2), secret: &two, peer: NodeId(1), public: one.public() };
    let mut elsewhere = Link::new(&ends, Side::Agent, 9).unwrap();
    assert_eq!(open(&mut elsewhere, sealed.as_bytes()), None);
    let ends = Ends { cluster: Uuid::from_u128(0x5eed), me: NodeId(3), ..ends };
    let mut other_node = Link::new(&ends, Side::Agent, 9).unwrap();
    assert_eq!(open(&mut other_node, sealed.as_bytes()), None);
    assert_eq!(open(&mut keeper, sealed.as_bytes()), None, "reflected");
}

#[test]
fn a_public_key_of_low_order_is_refused() {
    let secret = SecretKey::generate().unwrap();
    let ends = Ends { cluster: Uuid::nil(), me: NodeId(1), secret: &secret, peer: NodeId(2), public: [0; 32] };
    assert_eq!(Link::new(&ends, Side::Keeper, 1).err(), Some(KeyError::Weak { node: NodeId(2) }));
}

fn header(life: u64, path: u8, counter: u64) -> Header {
    Header { kind: 1, path, from: NodeId(1), life, counter }
}

#[test]
fn a_heartbeat_counts_once_per_path() {
    let mut seen = Freshness::new().unwrap();
    let Ok(Verdict::Challenge(challenge)) = seen.judge(&header(7, 0, 1), 0) else {
        panic!("an unknown life is challenged");
    };
    assert_eq!(seen.judge(&header(7, 0, 2), challenge), Ok(Verdict::Fresh(true)));
    assert_eq!(seen.judge(&header(7, 0, 2), challenge), Ok(Verdict::Stale));
    assert_eq!(seen.judge(&header(7, 1, 2), challenge), Ok(Verdict::Fresh(false)));
    assert_eq!(seen.judge(&header(7, 0, 1), challenge), Ok(Verdict::Stale));
    assert_eq!(seen.judge(&header(7, 0, 20), challenge), Ok(Verdict::Fresh(false)));
    assert_eq!(seen.judge(&header(7, 1, 11), challenge), Ok(Verdict::Stale), "kept back on the other path");
}

#[test]
fn an_earlier_life_never_comes_back() {
    let mut seen = Freshness::new().unwrap();
    let Ok(Verdict::Challenge(first)) = seen.judge(&header(7, 0, 1), 0) else {
        panic!("an unknown life is challenged");
    };
    assert_eq!(seen.judge(&header(7, 0, 2), first), Ok(Verdict::Fresh(true)));
    let Ok(Verdict::Challenge(second)) = seen.judge(&header(8, 0, 1), 0) else {
        panic!("a second life is challenged");
    };
    assert_ne!(first, second);
    assert_eq!(seen.judge(&header(8, 0, 2), second), Ok(Verdict::Fresh(true)));
    assert!(matches!(seen.judge(&header(7, 1, 900), first), Ok(Verdict::Challenge(_))));
    assert_eq!(seen.life(), Some(Incarnation(8)));
}

#[test]
fn sealing_and_opening_allocate_nothing() {
    let (keeper, mut agent) = pair();
    let mut bytes = [0; DATAGRAM_BYTES];
    let before = allocations();
    for counter in 0..100 {
        let sealed = keeper.seal(0, counter, &ASK);
        let length = sealed.as_bytes().len();
        bytes[..length].copy_from_slice(sealed.as_bytes());
        let header = Header::parse(&bytes[..length]);
        let opened = header.and_then(|header| agent.open(&header, &mut bytes[..length]));
        assert_eq!(opened, Some(ASK));
    }
    assert_eq!(allocations(), before);
}
