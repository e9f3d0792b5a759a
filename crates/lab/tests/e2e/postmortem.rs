//! What a guest that hangs can be asked: what its QEMU says, where its processor is,
//! whether it works or waits, and what it wrote on its console last.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use holdfast_lab::cluster::{Cluster, GuestVm};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(5);
/// Of the console, in bytes.
const LAST: usize = 2000;

/// Everything that can be found out about a VM whose QEMU still is there.
pub fn examine(cluster: &Cluster, vm: &GuestVm) -> String {
    let mut text = format!("--- VM {}\n", vm.name);
    for host in cluster.hosts() {
        let Ok(pid) = cluster.qemu_pid(host.name(), &vm.id) else { continue };
        let run = host.directory().join("run/guests").join(&vm.id);
        let _ = writeln!(text, "its QEMU is process {pid} on {}", host.name());
        let before = threads(pid);
        let said = ask(&run.join("qmp2.sock")).unwrap_or_else(|error| format!("its monitor: {error}\n"));
        text += &said;
        text += &format!("its threads, before and after that question:\n{before}{}", threads(pid));
        for log in ["serial.log", "qemu.log"] {
            let written = fs::read(run.join(log)).unwrap_or_default();
            let last = String::from_utf8_lossy(&written[written.len().saturating_sub(LAST)..]).into_owned();
            let _ = writeln!(text, "the end of its {log}:\n{last}");
        }
    }
    text
}

/// Name, state, where it waits in the kernel, and ticks of processor time, for each.
fn threads(pid: i32) -> String {
    let mut text = String::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let read = |file: &str| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let stat = read("stat");
        // proc(5): after the name in brackets come the state, and as 12th and 13th the times.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let field = |at: usize| fields.get(at).copied().unwrap_or("?");
        let (user, system) = (field(11), field(12));
        let _ = writeln!(text, "  {:16} {} {user}+{system} {}", read("comm").trim(), field(0), read("wchan"));
    }
    text
}

/// Asks by the second monitor, which nobody else uses. Twice for the registers: does it
/// go round in a circle, or stand still?
fn ask(socket: &Path) -> std::io::Result<String> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let mut say = |command: Value| -> std::io::Result<Value> {
        (&stream).write_all(format!("{command}\n").as_bytes())?;
        loop {
            let line = lines.next().ok_or(std::io::ErrorKind::UnexpectedEof)??;
            let answer: Value = serde_json::from_str(&line)?;
            if answer.get("return").is_some() || answer.get("error").is_some() {
                return Ok(answer);
            }
        }
    };
    say(json!({"execute": "qmp_capabilities"}))?;
    let mut text = format!("query-status: {}\n", say(json!({"execute": "query-status"}))?);
    for command in ["info registers", "info lapic", "info pic", "info block", "info registers"] {
        let answer = say(json!({"execute": "human-monitor-command", "arguments": {"command-line": command}}))?;
        let answer = answer["return"].as_str().unwrap_or("no answer").replace('\r', "");
        // The vector registers say nothing.
        let plain = answer.lines().filter(|line| !line.starts_with("YMM") && !line.starts_with("XMM"));
        let _ = writeln!(text, "{command}:\n{}", plain.collect::<Vec<_>>().join("\n"));
    }
    Ok(text)
}
