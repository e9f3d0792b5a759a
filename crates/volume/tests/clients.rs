//! What clients get, the well-behaved and the others.

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::*;
use proptest::prelude::*;

#[test]
fn what_one_connection_writes_another_reads() {
    let served = Served::new(2, false);
    let (mut one, mut other) = (served.client(), served.client());
    one.write(8192, &[7; 4096]);
    assert_eq!(other.read(8192, 4096), [7; 4096]);
    assert_eq!(other.read(0, 512), [0; 512]);
    one.ask(FLUSH, 1, 0, 0, &[]);
    assert_eq!(one.answer(), (1, 0));
}

#[test]
fn a_closed_fence_holds_writes_back_and_lets_reads_pass() {
    let served = Served::new(1, false);
    let mut client = served.client();
    client.write(0, &[1; 512]);
    served.gate.0.store(false, Ordering::Release);
    client.ask(WRITE, 2, 0, 512, &[2; 512]);
    client.ask(TRIM, 3, 4096, 4096, &[]);
    let mut other = served.client();
    // In order on one thread: when this is answered, the write has been looked at.
    assert_eq!(client_reads_past_writes(&mut client, &mut other), [1; 512]);
    let file = std::fs::File::open(served.disk()).unwrap();
    let mut on_disk = [0; 512];
    file.read_exact_at(&mut on_disk, 0).unwrap();
    assert_eq!(on_disk, [1; 512], "nothing was submitted");
    served.gate.0.store(true, Ordering::Release);
    let mut answered = [client.answer(), client.answer()];
    answered.sort_unstable();
    assert_eq!(answered, [(2, 0), (3, 0)]);
    assert_eq!(other.read(0, 512), [2; 512]);
}

/// A read on the connection whose writes wait, and one on another.
fn client_reads_past_writes(client: &mut Client, other: &mut Client) -> Vec<u8> {
    let first = client.read(0, 512);
    assert_eq!(other.read(0, 512), first);
    first
}

#[test]
fn a_disk_that_is_withdrawn_writes_nothing_more() {
    let served = Served::new(2, false);
    let mut clients = [served.client(), served.client()];
    for client in &mut clients {
        client.write(0, &[1; 512]);
    }
    served.gate.0.store(false, Ordering::Release);
    for client in &mut clients {
        client.ask(WRITE, 2, 0, 512, &[2; 512]);
        client.read(0, 512);
    }
    assert!(served.server.withdraw(1, Duration::from_secs(10)));
    served.gate.0.store(true, Ordering::Release);
    for client in &mut clients {
        assert_eq!(client.stream.read(&mut [0; 16]).unwrap_or(0), 0, "the connection is over");
    }
    let mut on_disk = [0; 512];
    std::fs::File::open(served.disk()).unwrap().read_exact_at(&mut on_disk, 0).unwrap();
    assert_eq!(on_disk, [1; 512]);
    assert!(!served.server.withdraw(1, Duration::from_secs(10)), "it is not served any more");
}

#[test]
fn requests_that_make_no_sense_are_refused_and_the_others_go_on() {
    let served = Served::new(1, false);
    let mut client = served.client();
    const INVALID: u32 = 22;
    const NO_SPACE: u32 = 28;
    for (kind, offset, length, error) in [
        (READ, SIZE, 512, INVALID),
        (READ, u64::MAX, 512, INVALID),
        (READ, 1, 512, INVALID),
        (READ, 0, 0, INVALID),
        (READ, 0, (32 << 20) + 512, INVALID),
        (TRIM, SIZE - 512, 1024, INVALID),
        (ZERO, SIZE - 512, 1024, NO_SPACE),
        (5, 0, 512, INVALID),
        (77, 0, 512, INVALID),
    ] {
        client.ask(kind, 5, offset, length, &[]);
        assert_eq!(client.answer(), (5, error), "{kind} at {offset} for {length}");
    }
    client.ask(WRITE, 6, SIZE, 1024, &[1; 1024]);
    assert_eq!(client.answer(), (6, NO_SPACE));
    let long = (32 << 20) + 512;
    client.ask(WRITE, 7, 0, long, &vec![1; long as usize]);
    assert_eq!(client.answer(), (7, INVALID));
    assert_eq!(client.read(0, 512), [0; 512]);
}

#[test]
fn a_read_only_disk_is_not_written_to() {
    let served = Served::new(1, true);
    let mut client = served.client();
    client.ask(WRITE, 1, 0, 512, &[1; 512]);
    assert_eq!(client.answer(), (1, 1));
    client.ask(ZERO, 2, 0, 512, &[]);
    assert_eq!(client.answer(), (2, 1));
    assert_eq!(client.read(0, 512), [0; 512]);
}

#[test]
fn clients_that_vanish_or_talk_nonsense_harm_nobody() {
    let served = Served::new(1, false);
    for _ in 0..20 {
        let mut half = served.client();
        half.stream.write_all(&[0x25, 0x60, 0x95]).unwrap();
        let mut payload = served.client();
        payload.ask(WRITE, 1, 0, 1 << 20, &[1; 512]);
        let mut unread = served.client();
        for cookie in 0..64 {
            unread.ask(READ, cookie, 0, 1 << 20, &[]);
        }
        let mut nonsense = served.client();
        nonsense.stream.write_all(&[0xff; 64]).unwrap();
        assert_eq!(nonsense.stream.read(&mut [0; 16]).unwrap_or(0), 0, "it is sent away");
    }
    assert_eq!(served.client().read(0, 512), [0; 512]);
}

#[test]
fn more_requests_than_are_served_at_a_time_are_all_answered() {
    let served = Served::new(1, false);
    let mut client = served.client();
    let mut sender = Client { stream: client.stream.try_clone().unwrap() };
    const MANY: u64 = 2000;
    let asking = std::thread::spawn(move || {
        for cookie in 0..MANY {
            sender.ask(WRITE, cookie, (cookie % 64) * 4096, 4096, &[cookie as u8; 4096]);
        }
    });
    let mut cookies: Vec<_> = (0..MANY).map(|_| client.answer()).collect();
    asking.join().unwrap();
    cookies.sort_unstable();
    assert_eq!(cookies, (0..MANY).map(|cookie| (cookie, 0)).collect::<Vec<_>>());
}

#[test]
fn what_was_asked_for_before_the_end_is_answered() {
    let served = Served::new(1, false);
    let mut client = served.client();
    for cookie in 0..16 {
        client.ask(WRITE, cookie, cookie * 4096, 4096, &[3; 4096]);
    }
    client.ask(2, 99, 0, 0, &[]);
    client.stream.shutdown(Shutdown::Write).unwrap();
    let mut answers = Vec::new();
    client.stream.read_to_end(&mut answers).unwrap();
    assert_eq!(answers.len(), 16 * 16);
}

#[derive(Clone, Debug)]
enum Op {
    Write(u64, u32, u8),
    Zero(u64, u32),
    Trim(u64, u32),
    Read(u64, u32),
}

fn op() -> impl Strategy<Value = Op> {
    let place = || (0..SIZE / 512 - 512, 1_u32..512);
    prop_oneof![
        (place(), any::<u8>()).prop_map(|((at, length), byte)| Op::Write(at * 512, length * 512, byte)),
        place().prop_map(|(at, length)| Op::Zero(at * 512, length * 512)),
        place().prop_map(|(at, length)| Op::Trim(at * 512, length * 512)),
        place().prop_map(|(at, length)| Op::Read(at * 512, length * 512)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn a_disk_is_as_an_array_of_bytes(ops in proptest::collection::vec(op(), 1..60)) {
        let served = Served::new(1, false);
        let mut client = served.client();
        let mut model = vec![0_u8; SIZE as usize];
        for op in ops {
            let range = |at: u64, length: u32| at as usize..at as usize + length as usize;
            match op {
                Op::Write(at, length, byte) => {
                    client.write(at, &vec![byte; length as usize]);
                    model[range(at, length)].fill(byte);
                }
                Op::Zero(at, length) | Op::Trim(at, length) => {
                    let kind = if matches!(op, Op::Zero(..)) { ZERO } else { TRIM };
                    client.ask(kind, 4, at, length, &[]);
                    prop_assert_eq!(client.answer(), (4, 0));
                    // A file's holes read as zero, so here a trim is one too.
                    model[range(at, length)].fill(0);
                }
                Op::Read(at, length) => prop_assert!(client.read(at, length) == model[range(at, length)]),
            }
        }
    }
}
