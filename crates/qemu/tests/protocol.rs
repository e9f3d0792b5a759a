//! The monitor's client against a scripted monitor: what a real QEMU does not
//! do on demand.

mod common;

use std::time::Duration;

use common::within;
use holdfast_qemu::{Event, QemuError, Qmp, RunState};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixListener;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

const GREETING: &str = r#"{"QMP":{"version":{"qemu":{"micro":1,"minor":1,"major":11},"package":"x","new":1},"capabilities":["oob","new"]}}"#;

struct Monitor {
    lines: Lines<BufReader<OwnedReadHalf>>,
    write: OwnedWriteHalf,
}

impl Monitor {
    async fn say(&mut self, text: &str) {
        let line = format!("{text}\r\n");
        self.write.write_all(line.as_bytes()).await.expect("said");
    }

    /// The next command, with its id.
    async fn hear(&mut self) -> (String, u64) {
        let line = within("a command", self.lines.next_line()).await;
        let line = line.expect("readable").expect("a command");
        let command: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        let name = command["execute"].as_str().expect("a name").to_owned();
        (name, command["id"].as_u64().expect("an id"))
    }
}

/// A connection, and the other end of it.
async fn connected() -> (Qmp, Monitor, TempDir) {
    let directory = TempDir::with_prefix("hfq-").expect("a directory");
    let socket = directory.path().join("qmp");
    let listener = UnixListener::bind(&socket).expect("a socket");
    let monitor = async {
        let (stream, _) = listener.accept().await.expect("a client");
        let (read, write) = stream.into_split();
        let mut monitor = Monitor { lines: BufReader::new(read).lines(), write };
        monitor.say(GREETING).await;
        let (name, id) = monitor.hear().await;
        assert_eq!(name, "qmp_capabilities");
        monitor.say(&format!(r#"{{"return":{{}},"id":{id}}}"#)).await;
        monitor
    };
    let (qmp, monitor) = tokio::join!(Qmp::connect(&socket, common::SOON), monitor);
    (qmp.expect("connected"), monitor, directory)
}

#[tokio::test]
async fn what_a_newer_qemu_adds_is_tolerated() {
    let (qmp, mut monitor, _directory) = connected().await;
    assert_eq!(qmp.version(), (11, 1, 1));
    let mut events = qmp.events();
    let script = async {
        let (name, id) = monitor.hear().await;
        assert_eq!(name, "query-status");
        monitor
            .say(r#"{"event":"TELEPORTED","data":{"where":[1,2]},"timestamp":{"seconds":1,"microseconds":2}}"#)
            .await;
        monitor.say(r#"{"event":"MIGRATION","data":{"status":"warping","more":true}}"#).await;
        monitor.say(r#"{"event":"MIGRATION_PASS","data":{"pass":"odd"}}"#).await;
        monitor.say(r#"{"return":{},"id":424242}"#).await;
        monitor.say(&format!(r#"{{"return":{{"status":"meditating","running":false,"x":[]}},"id":{id},"y":0}}"#)).await;
    };
    let (status, ()) = tokio::join!(qmp.query_status(), script);
    let status = status.expect("a status");
    assert_eq!(status.state, RunState::Other("meditating".into()));
    assert!(!status.state.may_continue());
    assert!(matches!(events.recv().await, Ok(Event::Other { name, .. }) if name == "TELEPORTED"));
    let migration = events.recv().await.expect("an event");
    assert!(matches!(migration, Event::Migration(status, _) if status.to_string() == "warping"));
    assert!(matches!(events.recv().await, Ok(Event::Other { .. })));
}

#[tokio::test]
async fn answers_find_their_questions_in_any_order() {
    let (qmp, mut monitor, _directory) = connected().await;
    let script = async {
        let first = monitor.hear().await;
        let second = monitor.hear().await;
        for (name, id) in [second, first] {
            let answer = match name.as_str() {
                "query-status" => r#""return":{"status":"running","running":true}"#,
                _ => r#""error":{"class":"GenericError","desc":"no"}"#,
            };
            monitor.say(&format!(r#"{{{answer},"id":{id}}}"#)).await;
        }
    };
    let (status, paused, ()) = tokio::join!(qmp.query_status(), qmp.pause(), script);
    assert!(status.expect("a status").running);
    assert!(matches!(
        paused,
        Err(QemuError::Refused { command: "stop", desc, .. }) if desc == "no"
    ));
}

#[tokio::test]
async fn a_monitor_that_goes_away_is_gone_for_everybody() {
    let (qmp, mut monitor, _directory) = connected().await;
    let mut events = qmp.events();
    let script = async move {
        monitor.hear().await;
        drop(monitor);
    };
    let (status, ()) = tokio::join!(qmp.query_status(), script);
    assert!(status.expect_err("gone").is_gone());
    assert_eq!(events.recv().await, Ok(Event::Closed));
    assert!(qmp.closed());
    assert!(qmp.query_status().await.expect_err("still gone").is_gone());
}

#[tokio::test(start_paused = true)]
async fn a_monitor_that_hangs_breaks_the_connection() {
    let (qmp, mut monitor, _directory) = connected().await;
    let (status, (_, id)) = tokio::join!(qmp.query_status(), monitor.hear());
    assert!(matches!(status, Err(QemuError::Timeout { .. })));
    // Its late answer is nobody's any more.
    let late = format!("{{\"return\":{{}},\"id\":{id}}}\n");
    let _ = monitor.write.write_all(late.as_bytes()).await;
    assert!(matches!(qmp.query_status().await, Err(QemuError::Timeout { .. })));
}

#[tokio::test]
async fn nonsense_is_told_apart_from_silence() {
    let (qmp, mut monitor, _directory) = connected().await;
    let script = async {
        monitor.hear().await;
        monitor.say("SSH-2.0-OpenSSH").await;
    };
    let (status, ()) = tokio::join!(qmp.query_status(), script);
    assert!(matches!(status, Err(QemuError::Protocol { .. })));
}

#[tokio::test]
async fn a_slow_subscriber_is_told_that_it_missed_something() {
    let (qmp, mut monitor, _directory) = connected().await;
    let mut events = qmp.events();
    let script = async {
        let (_, id) = monitor.hear().await;
        for _ in 0..1000 {
            monitor.say(r#"{"event":"RTC_CHANGE","data":{"offset":1}}"#).await;
        }
        monitor.say(&format!(r#"{{"return":{{"status":"running","running":true}},"id":{id}}}"#)).await;
    };
    let (status, ()) = tokio::join!(qmp.query_status(), script);
    status.expect("a status");
    assert!(matches!(events.recv().await, Err(tokio::sync::broadcast::error::RecvError::Lagged(_))));
}

#[tokio::test]
async fn nobody_there() {
    let directory = TempDir::with_prefix("hfq-").expect("a directory");
    let absent = directory.path().join("absent");
    let error = Qmp::connect(&absent, Duration::from_millis(30)).await;
    assert!(error.expect_err("nobody").is_gone());
    // A socket that a dead QEMU left behind.
    let left = directory.path().join("left");
    drop(std::os::unix::net::UnixListener::bind(&left).expect("a socket"));
    let error = within("an answer", Qmp::connect(&left, Duration::from_secs(3600))).await;
    assert!(error.expect_err("nobody").is_gone());
    // One that does not greet: another client holds it, or it hangs.
    let silent = directory.path().join("silent");
    let _listener = UnixListener::bind(&silent).expect("a socket");
    let error = Qmp::connect(&silent, Duration::from_millis(30)).await;
    assert!(matches!(error, Err(QemuError::Timeout { .. })));
}
