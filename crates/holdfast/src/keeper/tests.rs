//! What a keeper promises, tried on real processes.

mod lab;
mod watchdog;

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use holdfast_core::lease::Authority;
use holdfast_core::{Epoch, Incarnation, NodeId, NodeTerm};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::protocol::*;
use super::*;
use crate::leases::tests::{loopback, wait_for};
use crate::realtime::tests::{allocations, readable};
use crate::realtime::{boot_time, pidfd_open};

use self::lab::*;

#[tokio::test]
async fn no_vm_starts_without_a_lease() {
    let lab = Lab::new();
    let keeper = lab.keeper().await;
    let greeting = keeper.hello().await;
    assert_ne!(greeting.incarnation, Incarnation(0));
    assert!(!greeting.lease.held);
    assert_eq!(keeper.ask(lab.start(1, 1, 0)).await, Err(Refusal::NoLease));
    assert_eq!(keeper.list().await, vec![]);
}

#[tokio::test]
async fn each_epoch_starts_once() {
    let lab = Lab::new();
    let mut keeper = lab.keeper().await;
    lab.grant(&mut keeper, 1).await;
    let current = NodeTerm(1);
    assert_eq!(keeper.ask(lab.start(1, 5, 2)).await, Err(Refusal::WrongTerm { current }));

    let process = keeper.started(lab.start(1, 5, 1)).await;
    let epoch = Epoch(5);
    assert_eq!(keeper.ask(lab.start(1, 6, 1)).await, Err(Refusal::AlreadyRunning { epoch }));
    assert_eq!(keeper.ask(Request::Forget(tag(1, 5))).await, Err(Refusal::AlreadyRunning { epoch }));
    let dead = Ok(Reply::Dead { exit: KILLED });
    assert_eq!(keeper.ask(Request::Kill(tag(1, 5))).await, dead);
    assert!(readable(&process, Duration::ZERO));
    assert_eq!(keeper.event().await, exited(1, 5, KILLED));
    let last = Epoch(5);
    assert_eq!(keeper.ask(lab.start(1, 5, 1)).await, Err(Refusal::EpochUsed { last }));
    assert_eq!(keeper.ask(lab.start(1, 4, 1)).await, Err(Refusal::EpochUsed { last }));
    assert_eq!(keeper.ask(Request::Kill(tag(1, 5))).await, dead, "asked again");
    let vms = keeper.list().await;
    assert_eq!((vms.len(), vms[0].epoch), (1, epoch));
    assert!(matches!(vms[0].state, ProcessState::Exited { exit: KILLED, .. }));
    assert_eq!(keeper.ask(Request::Forget(tag(1, 5))).await, Ok(Reply::Done));
    assert_eq!(keeper.list().await, vec![]);
    assert_eq!(
        keeper.ask(lab.start(1, 5, 1)).await,
        Err(Refusal::EpochUsed { last }),
        "forgetting the process does not give the epoch back"
    );

    assert_eq!(keeper.ask(Request::Retire(tag(1, 6))).await, Ok(Reply::Done));
    let last = Epoch(6);
    assert_eq!(keeper.ask(lab.start(1, 6, 1)).await, Err(Refusal::EpochUsed { last }));
    keeper.started(lab.start(1, 7, 1)).await;
    assert_eq!(keeper.ask(Request::Kill(tag(9, 1))).await, Err(Refusal::NotFound));
}

#[tokio::test]
async fn a_process_that_cannot_start_or_ends_by_itself_says_how() {
    let lab = Lab::new();
    let mut keeper = lab.keeper().await;
    lab.grant(&mut keeper, 1).await;
    let refused = keeper.ask(lab.start_program(1, 1, 1, &["/does/not/exist"])).await;
    let Err(Refusal::StartFailed { step, error }) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(step, "execute the program");
    assert!(error.contains("No such file"), "{error}");
    assert_eq!(keeper.event().await, exited(1, 1, Exit::Status(127)));

    let said = "echo to the log: $HOLDFAST_TEST >&2; exit 3";
    let request = lab.start_program(2, 1, 1, &["sh", "-c", said]);
    assert!(matches!(keeper.ask(request).await, Ok(Reply::Started { .. })));
    assert_eq!(keeper.event().await, exited(2, 1, Exit::Status(3)));
    let log = fs::read_to_string(lab.directory.path().join("vm.log")).unwrap();
    assert_eq!(log, "to the log: yes\n");
    assert!(fs::read_dir(lab.run_dir().join("vms")).unwrap().next().is_none());
}

#[tokio::test]
async fn when_the_lease_ends_its_vms_are_dead_before_the_coordinator_counts_on_it() {
    let lab = Lab::new();
    let mut keeper = lab.keeper().await;
    lab.grant(&mut keeper, 1).await;
    let one = keeper.started(lab.start(1, 1, 1)).await;
    let two = keeper.started(lab.start(2, 1, 1)).await;
    lab.leases.update(&lab.admit(keeper.life, 1), DEFAULT_PROFILE).unwrap();
    let deadline = Instant::now() + SOON;
    while keeper.hello().await.lease.ends_in_ms < TIMING.length_ms {
        assert!(Instant::now() < deadline, "the longer lease never came");
    }
    lab.leases.set_authority(Authority::NONE);
    let died = tokio::task::spawn_blocking(move || {
        // Else this would measure how long the observer waits for a processor.
        let _ = crate::realtime::go_realtime(LEASE_PRIORITY - 1);
        assert!(readable(&one, SOON) && readable(&two, SOON));
        boot_time()
    });
    let died = died.await.unwrap();
    let bound = lab.leases.snapshot()[0].lease.unwrap().bound;
    assert!(died < bound);

    let mut seen = vec![];
    while seen.len() < 3 {
        seen.push(keeper.event().await);
    }
    let (term, killed) = (NodeTerm(1), 2);
    assert!(seen.contains(&Event::LeaseLost { term, killed }), "{seen:?}");
    let late_us = keeper.hello().await.lease.last_late_us.unwrap();
    let spare_ms = bound.ms_since(died);
    eprintln!("killed {late_us} us after the lease's end, dead {spare_ms} ms before the bound");
    assert!(late_us < 20_000, "killed {late_us} us late");
    // The lease ended the margin before the bound, or a little more.
    assert!(spare_ms <= DEFAULT_PROFILE.margin_ms() + 50, "before its time");
    assert!(seen.contains(&exited(1, 1, KILLED)) && seen.contains(&exited(2, 1, KILLED)));
    let refused = keeper.ask(lab.start(1, 2, 1)).await;
    assert_eq!(refused, Err(Refusal::NoLease));
    wait_for(&lab.leases, "condemned", |views| views[0].lease.unwrap().condemned);
}

#[tokio::test]
async fn a_new_term_counts_only_when_the_vms_of_the_last_are_dead() {
    let lab = Lab::new();
    let mut keeper = lab.keeper().await;
    lab.grant(&mut keeper, 1).await;
    let process = keeper.started(lab.start(1, 1, 1)).await;
    lab.leases.update(&lab.admit(keeper.life, 2), TIMING).unwrap();
    let mut seen = vec![];
    loop {
        let event = keeper.event().await;
        if event == (Event::LeaseGained { term: NodeTerm(2) }) {
            break;
        }
        seen.push(event);
    }
    assert!(readable(&process, Duration::ZERO), "dead before the lease counted");
    let (term, killed) = (NodeTerm(1), 1);
    assert!(seen.contains(&Event::LeaseLost { term, killed }), "{seen:?}");
    let current = NodeTerm(2);
    assert_eq!(keeper.ask(lab.start(1, 2, 1)).await, Err(Refusal::WrongTerm { current }));
    keeper.started(lab.start(1, 2, 2)).await;
}

#[tokio::test]
async fn children_die_with_their_keeper() {
    let lab = Lab::new();
    let mut keeper = lab.keeper().await;
    lab.grant(&mut keeper, 1).await;
    let process = keeper.started(lab.start(1, 1, 1)).await;
    let agent = pidfd_open(lab.agent(1).await).unwrap();
    keeper.process.kill().unwrap();
    assert!(readable(&process, SOON));
    assert!(readable(&agent, SOON));

    // The next one is another life, which the coordinator hears of.
    let first = keeper.life;
    drop(keeper);
    let keeper = lab.keeper().await;
    assert_ne!(keeper.life, first);
    assert_eq!(keeper.ask(lab.configure()).await, Ok(Reply::Done));
    wait_for(&lab.leases, "the second life", |views| views[0].heard.is_some_and(|(life, _)| life == keeper.life));
}

#[tokio::test]
async fn what_an_earlier_keeper_left_is_dead_before_a_lease_is_asked_for() {
    let lab = Lab::new();
    fs::create_dir_all(lab.run_dir()).unwrap();
    let records = Records::open(&lab.run_dir()).unwrap();
    let mut left = Command::new("sleep").arg("1000").spawn().unwrap();
    records.write(tag(1, 1), left.id().cast_signed()).unwrap();
    let unreadable = lab.run_dir().join("vms/unreadable.json");
    fs::write(&unreadable, "").unwrap();

    let mut keeper = lab.keeper().await;
    let status = left.wait().unwrap();
    assert_eq!(status.signal(), Some(9));
    let nodes = lab.admit(keeper.life, 1);
    lab.leases.become_coordinator(boot_time(), &nodes, TIMING, TIMING).unwrap();
    lab.leases.set_authority(FOREVER);
    assert_eq!(keeper.ask(lab.configure()).await, Ok(Reply::Done));
    let greeting = keeper.hello().await;
    assert_eq!(greeting.leftovers.len(), 1);
    assert!(greeting.leftovers[0].contains("unreadable.json"), "{greeting:?}");
    wait_for(&lab.leases, "silence", |views| views[0].lease.unwrap().condemned);
    assert_eq!(lab.leases.snapshot()[0].heard, None);

    // An operator says that nothing runs, and the coordinator admits the keeper anew.
    fs::remove_file(&unreadable).unwrap();
    wait_for(&lab.leases, "its heartbeat", |views| views[0].heard.is_some());
    lab.leases.update(&lab.admit(keeper.life, 2), TIMING).unwrap();
    assert_eq!(keeper.event().await, Event::LeaseGained { term: NodeTerm(2) });
}

#[tokio::test]
async fn the_agent_is_restarted_and_a_frozen_one_does_not_matter() {
    let lab = Lab::new();
    let mut keeper = lab.keeper().await;
    lab.grant(&mut keeper, 1).await;
    let process = keeper.started(lab.start(1, 1, 1)).await;
    kill(Pid::from_raw(lab.agent(1).await), Signal::SIGKILL).unwrap();
    let second = Pid::from_raw(lab.agent(2).await);
    kill(second, Signal::SIGSTOP).unwrap();
    let alive = tokio::task::spawn_blocking(move || !readable(&process, Duration::from_millis(3 * TIMING.length_ms)));
    assert!(alive.await.unwrap(), "the VM lives on");
    assert!(keeper.hello().await.lease.held);
    kill(second, Signal::SIGKILL).unwrap();
    lab.agent(3).await;
}

#[tokio::test]
async fn told_to_stop_it_ends_the_agent_then_the_vms_then_itself() {
    for by_signal in [true, false] {
        let lab = Lab::new();
        let mut keeper = lab.keeper().await;
        lab.grant(&mut keeper, 1).await;
        let process = keeper.started(lab.start(1, 1, 1)).await;
        let agent = pidfd_open(lab.agent(1).await).unwrap();
        match by_signal {
            true => kill(keeper.pid(), Signal::SIGTERM).unwrap(),
            false => assert_eq!(keeper.ask(Request::End).await, Ok(Reply::Done)),
        }
        assert_eq!(keeper.event().await, exited(1, 1, KILLED));
        assert!(readable(&agent, Duration::ZERO) && readable(&process, Duration::ZERO));
        assert_eq!(keeper.process.wait().unwrap().code(), Some(0));
        assert!(!lab.run_dir().join(SOCKET).exists());
    }
}

#[tokio::test]
async fn one_keeper_per_run_directory_and_one_node_per_keeper() {
    let lab = Lab::new();
    let mut keeper = lab.keeper().await;
    lab.grant(&mut keeper, 1).await;
    let Request::Configure(configuration) = lab.configure() else { unreachable!() };
    let node = NodeId(2);
    let other = Configuration { node, ..configuration.clone() };
    let refused = Err(Refusal::OtherIdentity { cluster: CLUSTER, node: NODE });
    assert_eq!(keeper.ask(Request::Configure(other)).await, refused);
    let mut weak = configuration;
    weak.peers[0].public = [0; 32];
    let refused = keeper.ask(Request::Configure(weak)).await;
    assert!(matches!(refused, Err(Refusal::Unusable { .. })), "{refused:?}");

    let second = tokio::task::spawn_blocking({
        let run_dir = lab.run_dir();
        move || lock(&run_dir).map(drop)
    });
    assert!(matches!(second.await.unwrap(), Err(KeeperError::AlreadyRunning { .. })));
    assert!(keeper.hello().await.lease.held, "undisturbed");
}

#[tokio::test]
async fn a_line_that_is_no_request_is_answered_and_a_second_client_sees_the_same() {
    use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
    let lab = Lab::new();
    let mut keeper = lab.keeper().await;
    lab.grant(&mut keeper, 1).await;
    keeper.started(lab.start(1, 1, 1)).await;
    let mut stream = tokio::net::UnixStream::connect(lab.run_dir().join(SOCKET)).await.unwrap();
    stream.write_all(b"{\"id\":3}\n{\"id\":4,\"request\":\"list\"}\n").await.unwrap();
    let mut lines = BufReader::new(stream).lines();
    let mut next = async || {
        let line = tokio::time::timeout(SOON, lines.next_line()).await.unwrap().unwrap().unwrap();
        serde_json::from_str::<ToClient>(&line).unwrap()
    };
    assert!(matches!(next().await, ToClient::Reply { id: 0, result: Err(Refusal::Malformed { .. }) }));
    let listed = next().await;
    let vms = keeper.list().await;
    assert_eq!(listed, ToClient::Reply { id: 4, result: Ok(Reply::Vms(vms)) });
}

/// The lease thread's own turns, in this thread, so that its allocations can be counted.
#[test]
fn the_lease_thread_allocates_nothing_and_regains_only_when_all_are_dead() {
    let lab = Lab::new();
    let life = Incarnation(77);
    let nodes = lab.admit(life, 1);
    lab.leases.become_coordinator(boot_time(), &nodes, TIMING, TIMING).unwrap();
    lab.leases.set_authority(FOREVER);
    let Request::Configure(configuration) = lab.configure() else { unreachable!() };
    let bell = || Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap());
    let (table, wake, notify) = (Arc::new(Table::new().unwrap()), bell(), bell());
    let (outbox, inbox) = sync_channel(QUEUE);
    let (their_outbox, said) = sync_channel(QUEUE);
    let lines = Lines { inbox, wake: wake.clone(), outbox: their_outbox, notify };
    let mut thread = LeaseThread::new(life, table.clone(), lines).unwrap();
    let heartbeating = Heartbeating::new(&configuration, life).unwrap();
    outbox.try_send(ToLease::Ask(Box::new(heartbeating))).unwrap();
    wake.write(1).unwrap();
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    let pidfd = pidfd_open(child.id().cast_signed()).unwrap();
    let deadline = Instant::now() + SOON;
    let mut turns_until = |done: &dyn Fn() -> bool| {
        while !done() {
            assert!(Instant::now() < deadline);
            let before = allocations();
            thread.wait();
            thread.turn();
            assert_eq!(allocations(), before);
        }
    };
    turns_until(&|| table.open());
    let watch = pidfd.try_clone().unwrap();
    let published = table.publish(pidfd).unwrap();
    let some_beats = || {
        let until = Instant::now() + Duration::from_millis(3 * TIMING.heartbeat_ms);
        move || Instant::now() > until
    };
    turns_until(&some_beats());
    lab.leases.set_authority(Authority::NONE);
    turns_until(&|| !table.open());
    assert!(readable(&watch, SOON), "its VM was killed");
    assert_eq!(child.wait().unwrap().signal(), Some(9));

    // Granted again, it does not count before the main thread has seen the VM dead.
    lab.leases.set_authority(FOREVER);
    turns_until(&some_beats());
    assert!(!table.open());
    drop(table.withdraw(published));
    wake.write(1).unwrap();
    turns_until(&|| table.open());
    assert!(matches!(said.try_recv(), Ok(FromLease::Gained { .. })));
    let lost = said.try_recv();
    assert!(matches!(lost, Ok(FromLease::Lost { killed: 1, .. })));
    assert!(matches!(said.try_recv(), Ok(FromLease::Gained { .. })));
}

/// Counters of the heartbeats that came in at a socket, in their order.
fn counters(socket: &std::net::UdpSocket) -> Vec<u64> {
    let mut bytes = [0; crate::heartbeat::DATAGRAM_BYTES];
    let mut counters = vec![];
    while let Ok(length) = socket.recv(&mut bytes) {
        counters.push(crate::heartbeat::Header::parse(&bytes[..length]).unwrap().counter);
    }
    counters
}

#[test]
fn who_grants_is_asked_and_everybody_when_nobody_does() {
    let lab = Lab::new();
    let life = Incarnation(77);
    lab.leases.become_coordinator(boot_time(), &lab.admit(life, 1), TIMING, TIMING).unwrap();
    lab.leases.set_authority(FOREVER);
    let other = std::net::UdpSocket::bind(loopback()).unwrap();
    other.set_nonblocking(true).unwrap();
    let Request::Configure(mut configuration) = lab.configure() else { unreachable!() };
    configuration.peers.push(PeerAddresses {
        node: NodeId(2),
        public: crate::heartbeat::SecretKey([9; 32]).public(),
        addresses: vec![other.local_addr().unwrap()],
    });
    let bell = || Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap());
    let (table, wake) = (Arc::new(Table::new().unwrap()), bell());
    let (outbox, inbox) = sync_channel(QUEUE);
    let (their_outbox, _said) = sync_channel(QUEUE);
    let lines = Lines { inbox, wake: wake.clone(), outbox: their_outbox, notify: bell() };
    let mut thread = LeaseThread::new(life, table.clone(), lines).unwrap();
    outbox.try_send(ToLease::Ask(Box::new(Heartbeating::new(&configuration, life).unwrap()))).unwrap();
    wake.write(1).unwrap();
    let deadline = Instant::now() + SOON;
    let mut turn = || {
        assert!(Instant::now() < deadline);
        thread.wait();
        thread.turn();
    };
    while !table.open() {
        turn();
    }
    assert!(!counters(&other).is_empty(), "nobody had granted yet");

    // A machine that is busy may let some answers come late, never most of them.
    let mut told = vec![];
    while told.iter().filter(|counter| *counter % 10 == 0).count() < 3 {
        turn();
        told.extend(counters(&other));
    }
    assert!(told.len() < 10, "of the 20 heartbeats and more since: {told:?}");

    lab.leases.set_authority(Authority::NONE);
    let mut told = vec![];
    while table.open() {
        turn();
        told.extend(counters(&other));
    }
    let in_a_row = told.windows(2).filter(|pair| pair[0] + 1 == pair[1]).count();
    assert!(in_a_row >= 3, "well before the lease's end: {told:?}");
}

#[tokio::test]
async fn the_volume_server_lives_while_somebody_listens_and_the_lease_lasts() {
    let lab = Lab::new();
    let mut keeper = lab.keeper().await;
    let path = lab.run_dir().join("disk.sock");
    assert_eq!(keeper.ask(Request::Listen { path: path.clone() }).await, Ok(Reply::Done));
    // Nobody serves it yet, and whoever comes waits.
    let early = std::os::unix::net::UnixStream::connect(&path).unwrap();
    lab.grant(&mut keeper, 1).await;
    let first = lab.volume_server(1).await;

    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    let second = pidfd_open(lab.volume_server(2).await).unwrap();
    std::os::unix::net::UnixStream::connect(&path).unwrap();
    drop(early);

    // With the lease it is dead, and is not started again before there is one.
    lab.leases.set_authority(Authority { until: boot_time() });
    assert!(matches!(keeper.event().await, Event::LeaseLost { killed: 1, .. }));
    assert!(readable(&second, SOON));
    lab.leases.set_authority(FOREVER);
    assert!(matches!(keeper.event().await, Event::LeaseGained { .. }));
    let third = pidfd_open(lab.volume_server(3).await).unwrap();

    assert_eq!(keeper.ask(Request::Unlisten { path: path.clone() }).await, Ok(Reply::Done));
    assert!(readable(&third, SOON));
    assert!(!path.exists());
    let nowhere = keeper.ask(Request::Listen { path: "/does/not/exist/disk.sock".into() }).await;
    assert!(matches!(nowhere, Err(Refusal::NoSocket { .. })), "{nowhere:?}");
}
