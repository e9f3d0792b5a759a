//! Streams of server-sent events: what happened, and what changed.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::sync::Arc;

use axum::response::sse;
use futures_util::Stream;
use holdfast_api::{Change, ChangeKind};
use holdfast_core::ClusterState;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::views;

type Changes = watch::Receiver<Arc<ClusterState>>;
type Message = Result<sse::Event, Infallible>;

/// Every event after the one with index `after`, from the oldest that is kept,
/// until the reader goes or the agent stops. An event's id is its index.
pub fn events(mut changes: Changes, after: u64, stop: CancellationToken) -> impl Stream<Item = Message> {
    changes.mark_changed();
    stream(changes, stop, after, |after, state| {
        let fresh = state.events.iter().filter(|event| event.index > *after);
        let messages = fresh.map(|event| message("event", event.index, &views::event(event))).collect();
        *after = state.last_event.max(*after);
        messages
    })
}

/// Every thing that changes from now on; a first message names the revision
/// that they start from. A change's id is the revision.
pub fn changed(mut changes: Changes, stop: CancellationToken) -> impl Stream<Item = Message> {
    changes.mark_changed();
    stream(changes, stop, None::<Arc<ClusterState>>, |before, state| {
        let messages = match before {
            None => vec![sse::Event::default().event("revision").data(state.revision.to_string())],
            Some(before) => {
                diff(before, state).iter().map(|change| message("change", change.revision, change)).collect()
            }
        };
        *before = Some(Arc::clone(state));
        messages
    })
}

fn message(name: &str, id: u64, body: &impl serde::Serialize) -> sse::Event {
    let event = sse::Event::default().event(name).id(id.to_string());
    // Views are made of texts and numbers: they always become JSON.
    match event.clone().json_data(body) {
        Ok(event) => event,
        Err(_) => event,
    }
}

/// Messages that `step` makes of each new state. A slow reader does not pile
/// them up: the next state is only looked at when the last one's are taken.
fn stream<S: Send + 'static>(
    changes: Changes,
    stop: CancellationToken,
    start: S,
    step: impl Fn(&mut S, &Arc<ClusterState>) -> Vec<sse::Event> + Send + 'static,
) -> impl Stream<Item = Message> {
    let ready = VecDeque::new();
    let begin = (changes, stop, start, ready, step);
    futures_util::stream::unfold(begin, async |(mut changes, stop, mut at, mut ready, step)| {
        loop {
            if let Some(message) = ready.pop_front() {
                return Some((Ok(message), (changes, stop, at, ready, step)));
            }
            tokio::select! {
                () = stop.cancelled() => return None,
                changed = changes.changed() => changed.ok()?,
            }
            let state = Arc::clone(&changes.borrow_and_update());
            ready.extend(step(&mut at, &state));
        }
    })
}

/// What differs between two states.
fn diff(before: &ClusterState, now: &ClusterState) -> Vec<Change> {
    let mut changes = Differences { revision: now.revision, found: Vec::new() };
    if before.cluster != now.cluster || before.settings != now.settings {
        changes.add(ChangeKind::Cluster, now.cluster.name.clone(), false);
    }
    let name = |node: &holdfast_core::Node| node.name.clone();
    changes.maps(ChangeKind::Node, &before.nodes, &now.nodes, |_, node| name(node));
    changes.maps(ChangeKind::Network, &before.networks, &now.networks, |subnet, _| subnet.clone());
    changes.maps(ChangeKind::Switch, &before.switches, &now.switches, |name, _| name.clone());
    changes.maps(ChangeKind::Volume, &before.volumes, &now.volumes, |name, _| name.clone());
    changes.maps(ChangeKind::Vm, &before.vms, &now.vms, |_, vm| vm.name.clone());
    changes.maps(ChangeKind::Job, &before.jobs, &now.jobs, |id, _| id.to_string());
    changes.maps(ChangeKind::Token, &before.api_tokens, &now.api_tokens, |name, _| name.clone());
    if before.last_event != now.last_event {
        changes.add(ChangeKind::Event, now.last_event.to_string(), false);
    }
    changes.found
}

struct Differences {
    revision: u64,
    found: Vec<Change>,
}

impl Differences {
    fn add(&mut self, kind: ChangeKind, name: String, removed: bool) {
        self.found.push(Change { kind, name, removed, revision: self.revision });
    }

    fn maps<K: Ord, V: PartialEq>(
        &mut self,
        kind: ChangeKind,
        before: &BTreeMap<K, V>,
        now: &BTreeMap<K, V>,
        name: impl Fn(&K, &V) -> String,
    ) {
        for (key, value) in before {
            if !now.contains_key(key) {
                self.add(kind, name(key, value), true);
            }
        }
        for (key, value) in now {
            if before.get(key) != Some(value) {
                self.add(kind, name(key, value), false);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;
    use holdfast_core::{Event, Severity, SwitchKind};

    use super::*;

    fn with_events(state: &mut ClusterState, count: u64) {
        for _ in 0..count {
            state.last_event += 1;
            state.events.push_back(Event {
                index: state.last_event,
                at_ms: 7,
                severity: Severity::Info,
                subject: "cluster".into(),
                text: "it happened".into(),
            });
        }
    }

    #[test]
    fn what_came_changed_and_went_is_told() {
        let mut before = ClusterState::default();
        before.switches.insert("gone".into(), SwitchKind::Private);
        before.switches.insert("same".into(), SwitchKind::Private);
        before.switches.insert("other".into(), SwitchKind::Private);
        let mut now = before.clone();
        now.revision = 9;
        now.switches.remove("gone");
        now.switches.insert("other".into(), SwitchKind::Internal);
        now.switches.insert("new".into(), SwitchKind::Internal);
        with_events(&mut now, 1);
        let told: Vec<_> = diff(&before, &now)
            .into_iter()
            .map(|change| (change.kind, change.name, change.removed, change.revision))
            .collect();
        let expected = [
            (ChangeKind::Switch, "gone", true),
            (ChangeKind::Switch, "new", false),
            (ChangeKind::Switch, "other", false),
            (ChangeKind::Event, "1", false),
        ];
        let expected = expected.map(|(kind, name, removed)| (kind, name.to_owned(), removed, 9));
        assert_eq!(told, expected);
        assert!(diff(&now, &now).is_empty());
    }

    #[tokio::test]
    async fn a_reader_resumes_after_the_last_event_it_saw_and_ends_with_the_agent() {
        let mut state = ClusterState::default();
        with_events(&mut state, 3);
        let (sender, changes) = watch::channel(Arc::new(state.clone()));
        let stop = CancellationToken::new();
        let mut stream = std::pin::pin!(events(changes, 2, stop.clone()));
        assert!(format!("{:?}", stream.next().await.unwrap()).contains("id: 3"));
        with_events(&mut state, 2);
        sender.send_replace(Arc::new(state));
        assert!(format!("{:?}", stream.next().await.unwrap()).contains("id: 4"));
        assert!(format!("{:?}", stream.next().await.unwrap()).contains("id: 5"));
        stop.cancel();
        assert!(stream.next().await.is_none());
    }
}
