//! Server-sent events: what changes, what happens, and going on after a break.

use std::time::{Duration, Instant};

use holdfast_api::{AddSwitch, Change, ChangeKind, Event, SwitchKind};
use holdfast_lab::cluster::{ChangeStream, Cluster, EventStream};

use crate::bench::DEADLINE;

pub fn changes_and_events_are_told_and_resumed(cluster: &Cluster) {
    let (n1, n2) = (cluster.client("n1"), cluster.client("n2"));
    let add = |name: &str| {
        n1.add_switch(&AddSwitch { name: name.into(), kind: SwitchKind::Private, uplink: None }).unwrap();
    };

    // Whatever node is listened to, and whatever node the change was made at.
    let mut changes = n2.changes().unwrap();
    let mut events = n2.follow_events(cluster.last_event().unwrap()).unwrap();
    add("one");
    let told = change(&mut changes, "one");
    assert_eq!((told.kind, told.removed), (ChangeKind::Switch, false));
    let first = event(&mut events, "switch one");
    n1.delete("/api/v1/switches/one").unwrap();
    let gone = change(&mut changes, "one");
    assert!(gone.removed && gone.revision > told.revision, "{gone:?} after {told:?}");
    let last = event(&mut events, "switch one");
    assert!(last.index > first.index);

    // A reader that was away misses nothing and hears nothing twice, at another node.
    drop(events);
    add("two");
    n1.delete("/api/v1/switches/two").unwrap();
    let mut resumed = n1.resume_events(last.index).unwrap();
    let next = resumed.next(DEADLINE).unwrap().expect("an event");
    assert_eq!((next.index, next.subject.as_str()), (last.index + 1, "switch two"), "{next:?}");
    assert_eq!(event(&mut resumed, "switch two").index, next.index + 1);
    add("three");
    let live = event(&mut resumed, "switch three");
    n1.delete("/api/v1/switches/three").unwrap();
    let since: Vec<Event> = n1.events(live.index - 1).unwrap();
    assert_eq!(since.first(), Some(&live), "the list and the stream tell the same");
}

fn change(stream: &mut ChangeStream, name: &str) -> Change {
    until(|left| stream.next(left).unwrap().filter(|change| change.kind == ChangeKind::Switch && change.name == name))
}

fn event(stream: &mut EventStream, subject: &str) -> Event {
    until(|left| stream.next(left).unwrap().filter(|event| event.subject == subject))
}

fn until<T>(mut next: impl FnMut(Duration) -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "not told within {DEADLINE:?}");
        if let Some(found) = next(left) {
            return found;
        }
    }
}
