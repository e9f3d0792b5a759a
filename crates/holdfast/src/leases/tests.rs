//! The answering thread over real sockets, asked by the keeper's side of the wire.

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use holdfast_core::lease::Grant;

use super::*;
use crate::heartbeat::{DATAGRAM_BYTES, Datagram, Header, Message};
use crate::realtime::boot_time;
use crate::realtime::tests::{allocations, readable};

const SOON: Duration = Duration::from_secs(5);

/// For what does not depend on an end: longer than any test on a busy machine.
const TIMING: LeaseTiming = LeaseTiming { length_ms: 60_000, heartbeat_ms: 100 };

/// The default profile.
const SHORT: LeaseTiming = LeaseTiming { length_ms: 1_500, heartbeat_ms: 100 };
const AGENT: NodeId = NodeId(1);
const KEEPER: NodeId = NodeId(2);

fn agent_secret() -> SecretKey {
    SecretKey([1; 32])
}

fn keeper_secret() -> SecretKey {
    SecretKey([2; 32])
}

pub(crate) fn loopback() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 0))
}

fn config() -> LeasesConfig {
    LeasesConfig {
        cluster: Uuid::from_u128(7),
        node: AGENT,
        secret: agent_secret(),
        bind: vec![loopback(), loopback()],
        peers: vec![PeerKey { node: KEEPER, public: keeper_secret().public() }],
    }
}

fn admission(life: u64, term: u64) -> Admission {
    Admission { node: KEEPER, admitted: Incarnation(life), term: NodeTerm(term), up: true, leaves: false }
}

fn forever() -> Authority {
    Authority { until: boot_time().plus_ms(3_600_000) }
}

/// Waits until the snapshot satisfies `wanted`, woken by changes.
pub(crate) fn wait_for(leases: &Leases, what: &str, wanted: impl Fn(&[SlotView]) -> bool) {
    let deadline = Instant::now() + SOON;
    while !wanted(&leases.snapshot()) {
        assert!(Instant::now() < deadline, "{what}: {:?}", leases.snapshot());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A keeper's end of the wire.
struct Asker {
    socket: UdpSocket,
    link: Link,
    sequence: u64,
    echo: u64,
    acknowledged: u64,
}

impl Asker {
    fn new(life: u64) -> Asker {
        let ends = Ends {
            cluster: Uuid::from_u128(7),
            me: KEEPER,
            secret: &keeper_secret(),
            peer: AGENT,
            public: agent_secret().public(),
        };
        Asker {
            socket: UdpSocket::bind(loopback()).unwrap(),
            link: Link::new(&ends, Side::Keeper, life).unwrap(),
            sequence: 0,
            echo: 0,
            acknowledged: 0,
        }
    }

    fn ask(&mut self, path: u8, to: SocketAddr) -> Datagram {
        self.sequence += 1;
        let message = Message::Heartbeat { sent: boot_time(), echo: self.echo, acknowledged: self.acknowledged };
        let sealed = self.link.seal(path, self.sequence, &message);
        self.socket.send_to(sealed.as_bytes(), to).unwrap();
        sealed
    }

    fn answer(&mut self, within: Duration) -> Option<Message> {
        if !readable(&self.socket, within) {
            return None;
        }
        let mut bytes = [0; DATAGRAM_BYTES];
        let length = self.socket.recv(&mut bytes).unwrap();
        let header = Header::parse(&bytes[..length]).unwrap();
        let answer = self.link.open(&header, &mut bytes[..length]).unwrap();
        match answer {
            Message::Grant(Grant { sequence, .. }) | Message::Probe { sequence, .. } => {
                self.acknowledged = self.acknowledged.max(sequence);
            }
            _ => {}
        }
        Some(answer)
    }

    /// Passes the challenge.
    fn introduce(&mut self, to: SocketAddr) {
        self.ask(0, to);
        let Some(Message::Challenge { challenge, .. }) = self.answer(SOON) else {
            panic!("an unknown life is challenged");
        };
        self.echo = challenge;
    }

    fn granted(&mut self, to: SocketAddr) -> Grant {
        self.ask(0, to);
        match self.answer(SOON) {
            Some(Message::Grant(grant)) => grant,
            other => panic!("expected a grant, not {other:?}"),
        }
    }
}

fn lease_of(leases: &Leases) -> Option<LeaseSlotView> {
    let all = leases.snapshot();
    all.iter().find(|view| view.node == KEEPER).and_then(|view| view.lease)
}

fn coordinator(life: u64, timing: LeaseTiming) -> Leases {
    let leases = Leases::start(config()).unwrap();
    let now = boot_time();
    leases.become_coordinator(now, &[admission(life, 4)], timing, timing).unwrap();
    leases.set_authority(forever());
    leases
}

#[test]
fn an_admitted_keeper_is_granted_its_lease_and_silence_condemns_it_at_its_bound() {
    let leases = coordinator(7, SHORT);
    let to = leases.addresses()[0];
    let mut keeper = Asker::new(7);
    keeper.introduce(to);
    let grant = keeper.granted(to);
    assert_eq!((grant.term, grant.timing), (NodeTerm(4), SHORT));
    let answered = boot_time();

    wait_for(&leases, "condemned", |_| lease_of(&leases).is_some_and(|lease| lease.condemned));
    let seen = boot_time();
    let bound = lease_of(&leases).unwrap().bound;
    assert!(seen >= bound);
    assert!(bound >= grant.sent.plus_ms(1_650) && bound <= answered.plus_ms(1_650));
    assert!(seen.ms_since(bound) < 20, "{} ms late", seen.ms_since(bound));

    keeper.ask(0, to);
    let answer = keeper.answer(SOON);
    assert!(matches!(answer, Some(Message::Probe { .. })), "a lease again in this term: {answer:?}");
    leases.update(&[admission(7, 5)], SHORT).unwrap();
    wait_for(&leases, "its next term", |_| lease_of(&leases).is_some_and(|lease| lease.term == NodeTerm(5)));
    assert!(!lease_of(&leases).unwrap().condemned);
    assert_eq!(keeper.granted(to).term, NodeTerm(5));
}

#[test]
fn without_authority_or_after_stepping_down_nothing_is_granted() {
    let leases = coordinator(7, TIMING);
    let to = leases.addresses()[0];
    let mut keeper = Asker::new(7);
    keeper.introduce(to);
    keeper.granted(to);
    leases.set_authority(Authority::NONE);
    keeper.ask(0, to);
    assert_eq!(keeper.answer(Duration::from_millis(50)), None);
    leases.set_authority(forever());
    keeper.granted(to);
    leases.step_down().unwrap();
    leases.set_authority(forever());
    keeper.ask(0, to);
    assert_eq!(keeper.answer(Duration::from_millis(50)), None);
    assert_eq!(lease_of(&leases), None);
}

#[test]
fn a_replayed_heartbeat_is_not_answered() {
    let leases = coordinator(7, TIMING);
    let to = leases.addresses()[0];
    let mut keeper = Asker::new(7);
    keeper.introduce(to);
    let sealed = keeper.ask(0, to);
    assert!(matches!(keeper.answer(SOON), Some(Message::Grant(_))));
    keeper.socket.send_to(sealed.as_bytes(), to).unwrap();
    assert_eq!(keeper.answer(Duration::from_millis(50)), None);

    // What the first life left in the network does not look like a restart.
    let mut next = Asker::new(8);
    next.introduce(to);
    next.ask(0, to);
    wait_for(&leases, "the second life", |views| views[0].heard.is_some_and(|(life, _)| life == Incarnation(8)));
    keeper.ask(0, to);
    assert!(matches!(keeper.answer(SOON), Some(Message::Challenge { .. })));
    assert_eq!(leases.snapshot()[0].heard.unwrap().0, Incarnation(8));
}

#[tokio::test]
async fn a_new_life_wakes_who_waits() {
    let leases = Leases::start(config()).unwrap();
    let mut changed = leases.changed();
    let to = leases.addresses()[0];
    let mut keeper = Asker::new(9);
    keeper.introduce(to);
    keeper.ask(0, to);
    let heard = async {
        while leases.snapshot().iter().all(|view| view.heard.is_none()) {
            changed.changed().await.unwrap();
        }
    };
    tokio::time::timeout(SOON, heard).await.unwrap();
    let view = leases.snapshot()[0];
    assert_eq!(view.heard_within(1_000, boot_time()), Some(Incarnation(9)));
    assert_eq!(view.lease, None);
}

#[test]
fn each_network_is_known_by_what_came_over_it() {
    let leases = Leases::start(config()).unwrap();
    let addresses = leases.addresses();
    let mut keeper = Asker::new(7);
    keeper.introduce(addresses[0]);
    keeper.ask(0, addresses[0]);
    keeper.ask(1, addresses[1]);
    let deadline = Instant::now() + SOON;
    while leases.link_view().len() < 2 {
        assert!(Instant::now() < deadline, "{:?}", leases.link_view());
        // The board shows times when further heartbeats come in.
        keeper.ask(0, addresses[0]);
        std::thread::sleep(Duration::from_millis(10));
    }
    for (link, local) in leases.link_view().iter().zip(addresses) {
        assert_eq!((link.node, link.local), (KEEPER, local));
        assert_eq!(link.remote, keeper.socket.local_addr().unwrap());
    }
}

#[test]
fn peers_that_stay_keep_what_is_known_of_them() {
    let leases = coordinator(7, TIMING);
    let to = leases.addresses()[0];
    let mut keeper = Asker::new(7);
    keeper.introduce(to);
    keeper.granted(to);
    let mut peers = config().peers;
    peers.push(PeerKey { node: NodeId(3), public: SecretKey([3; 32]).public() });
    leases.set_peers(&peers).unwrap();
    wait_for(&leases, "three nodes", |views| views.len() == 2);
    keeper.granted(to);
}

#[test]
fn an_address_that_is_taken_is_named() {
    let taken = UdpSocket::bind(loopback()).unwrap();
    let address = taken.local_addr().unwrap();
    let bind = vec![address];
    let error = Leases::start(LeasesConfig { bind, ..config() }).err().unwrap();
    assert!(error.to_string().contains(&address.to_string()), "{error}");
}

/// The thread's own turns, in this thread, so that its allocations can be counted.
#[test]
fn answering_allocates_nothing() {
    let socket = UdpSocket::bind(loopback()).unwrap();
    socket.set_nonblocking(true).unwrap();
    let to = socket.local_addr().unwrap();
    let (outbox, inbox) = sync_channel(QUEUE);
    let (retire, retired) = sync_channel(QUEUE);
    let lines = Lines {
        inbox,
        wake: eventfd(EfdFlags::EFD_NONBLOCK).unwrap(),
        retire,
        bell: eventfd(EfdFlags::EFD_NONBLOCK).unwrap(),
        board: Arc::new(Mutex::new(Board::with_room())),
    };
    let peers = build_peers(&config(), 5, &config().peers).unwrap();
    let mut thread = AnsweringThread::new(vec![(socket, to)], peers, lines).unwrap();
    let coordination = Box::new(thread::Coordination {
        since: boot_time(),
        nodes: vec![admission(7, 4)],
        timing: TIMING,
        longest: TIMING,
        slots: Vec::with_capacity(NODES),
        authority: Arc::new(AtomicU64::new(u64::MAX)),
    });
    outbox.try_send(Told::Coordinate(coordination)).unwrap();
    let mut keeper = Asker::new(7);
    let mut turn = |keeper: &mut Asker| {
        let before = allocations();
        thread.turn();
        assert_eq!(allocations(), before);
        keeper.answer(Duration::ZERO)
    };
    keeper.ask(0, to);
    let Some(Message::Challenge { challenge, .. }) = turn(&mut keeper) else {
        panic!("an unknown life is challenged");
    };
    keeper.echo = challenge;
    for _ in 0..100 {
        keeper.ask(0, to);
        assert!(matches!(turn(&mut keeper), Some(Message::Grant(_))));
    }
    outbox.try_send(Told::StepDown).unwrap();
    keeper.ask(0, to);
    assert_eq!(turn(&mut keeper), None);
    assert!(matches!(retired.try_recv(), Ok(Told::Coordinate(_))));
    assert!(keeper.socket.as_raw_fd() >= 0);
}
