//! The peer of a live migration: two QEMUs of the same build with the command
//! line of one of ours, driven by a plain script over QMP.

use std::io::{BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use holdfast_lab::cluster::{Cluster, GuestVm};
use holdfast_lab::{Host, HostProcess, Network};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(60);
/// The UUID of the guest; QEMU wants the same at both ends.
pub const UUID: &str = "ba4e0000-0000-4000-8000-000000000001";
const MAC: &str = "52:54:00:ba:4e:01";
/// Its tap.
pub const TAP: &str = "bare0";
/// How often a socket is tried that is not there yet.
const POLL: Duration = Duration::from_millis(2);

/// What the guest of ours has that the bare one cannot share.
pub struct Model {
    /// The command line of the running QEMU.
    pub argv: Vec<String>,
    /// The VM's UUID.
    pub uuid: String,
    /// Its disk, as the command line has it.
    pub disk: String,
    /// Its address.
    pub ip: Ipv4Addr,
    /// The bridge that its tap is in, the same on every host.
    pub bridge: String,
}

impl Model {
    /// The QEMU of a VM that runs on a node.
    ///
    /// # Errors
    /// When it does not run there.
    pub fn of(cluster: &Cluster, vm: &GuestVm, node: &str) -> Result<Self> {
        let host = cluster.host(node)?;
        let pid = cluster.qemu_pid(node, &vm.id)?;
        let qemu = host.processes().into_iter().find(|process| process.pid == pid).context("its QEMU has ended")?;
        let file = vm.image.file_name().and_then(|name| name.to_str()).context("a disk without a name")?;
        let disk = qemu.argv.iter().find_map(|word| {
            let options: Value = serde_json::from_str(word).ok()?;
            options["filename"].as_str().filter(|name| name.ends_with(file)).map(str::to_owned)
        });
        let tap = json_of(&qemu.argv, "-netdev", "ifname").context("it has no tap")?;
        let link = String::from_utf8(run(&host, &["ip", "-o", "link", "show", &tap])?)?;
        let bridge = link.split_whitespace().skip_while(|word| *word != "master").nth(1);
        Ok(Model {
            disk: disk.context("it has no disk")?,
            bridge: bridge.context("its tap is in no bridge")?.to_owned(),
            argv: qemu.argv,
            uuid: vm.id.clone(),
            ip: vm.ip,
        })
    }

    /// The command line of a bare QEMU with a disk and an address of its own.
    ///
    /// # Errors
    /// When the model's is not understood.
    pub fn argv(&self, run_dir: &str, disk: &str, ip: Ipv4Addr, incoming: bool) -> Result<Vec<String>> {
        let old_run_dir = value_after(&self.argv, "-chardev", "path=")
            .and_then(|path| Some(path.rsplit_once('/')?.0.to_owned()))
            .context("the model's command line has no monitor's socket")?;
        let tap = json_of(&self.argv, "-netdev", "ifname").context("the model's command line has no tap")?;
        let mac = json_of(&self.argv, "virtio-net-pci", "mac").context("the model's command line has no NIC")?;
        let mut argv = Vec::new();
        let mut words = self.argv.iter();
        while let Some(word) = words.next() {
            match word.as_str() {
                "-incoming" => drop(words.next()),
                "-S" => {}
                "-name" => {
                    words.next();
                    argv.extend(["-name".to_owned(), "guest=bare,debug-threads=on".to_owned()]);
                }
                _ => {
                    let word = word
                        .replace(&self.uuid, UUID)
                        .replace(&self.disk, disk)
                        .replace(&tap, TAP)
                        .replace(&mac, MAC)
                        .replace(&format!("hf.ip={}/", self.ip), &format!("hf.ip={ip}/"));
                    // The directory's name holds the UUID, which is replaced by now.
                    argv.push(word.replace(&old_run_dir.replace(&self.uuid, UUID), run_dir));
                }
            }
        }
        if incoming {
            argv.extend(["-incoming".to_owned(), "defer".to_owned()]);
        }
        Ok(argv)
    }
}

/// The value of `key` in the first `option` that has it, up to a comma.
fn value_after(argv: &[String], option: &str, key: &str) -> Option<String> {
    let values = argv.windows(2).filter(|pair| pair[0] == option).map(|pair| &pair[1]);
    values.into_iter().find_map(|value| Some(value.split_once(key)?.1.split(',').next()?.to_owned()))
}

/// The text under `key` in the first JSON argument that mentions `beside` or follows it.
fn json_of(argv: &[String], beside: &str, key: &str) -> Option<String> {
    let mentions = |pair: &&[String]| pair[0] == beside || pair[1].contains(beside);
    let texts = argv.windows(2).filter(mentions).map(|pair| &pair[1]);
    texts.into_iter().find_map(|text| Some(serde_json::from_str::<Value>(text).ok()?.get(key)?.as_str()?.to_owned()))
}

/// A bare guest that runs on one of two hosts.
pub struct Bare {
    model: Model,
    ip: Ipv4Addr,
    disk: String,
    at: Qemu,
    other: Arc<Host>,
    moves: u32,
}

/// How a bare migration went.
#[derive(Debug, Clone, Copy)]
pub struct Moved {
    /// From the start of the transfer to its end, by QEMU's account.
    pub total: Duration,
    /// How long the guest stood still, by QEMU's account.
    pub downtime: Duration,
}

struct Qemu {
    host: Arc<Host>,
    /// Ends with this value.
    process: HostProcess,
    qmp: Qmp,
}

impl Bare {
    /// Boots a bare guest on the first of two hosts, with a record disk beside the
    /// model's.
    ///
    /// # Errors
    /// When a tap or QEMU cannot be made or started.
    pub fn boot(model: Model, (host, other): (Arc<Host>, Arc<Host>), ip: Ipv4Addr) -> Result<Self> {
        let disk = format!("{}.bare", model.disk);
        run(&host, &["truncate", "-s", "64M", &disk])?;
        for host in [&host, &other] {
            // An earlier bare guest may have left its tap; that there is none is no failure.
            host.exec(&["ip", "link", "del", TAP])?;
            run(host, &["ip", "tuntap", "add", TAP, "mode", "tap", "vnet_hdr"])?;
            run(host, &["ip", "link", "set", TAP, "master", &model.bridge])?;
            run(host, &["ip", "link", "set", TAP, "up"])?;
        }
        let at = start(&host, &model, &disk, ip, 0, false)?;
        Ok(Bare { model, ip, disk, at, other, moves: 0 })
    }

    /// Moves the guest to the other host, over the lab's migration network, and ends
    /// the source as Holdfast does, as soon as it has sent everything: on a machine that
    /// is both ends, giving its memory back takes time from the guest. Then `then` is asked.
    ///
    /// # Errors
    /// When QEMU refuses or the migration fails.
    pub fn migrate<T>(&mut self, then: impl FnOnce(Moved) -> Result<T>) -> Result<T> {
        let address = self.other.address(Network::Migration).context("no address for migrations")?;
        self.moves += 1;
        let mut target = start(&self.other, &self.model, &self.disk, self.ip, self.moves, true)?;
        // What Holdfast sets, in the same values.
        target.qmp.ask("migrate-set-capabilities", capabilities(&[("events", true), ("return-path", true)]))?;
        target.qmp.ask("migrate-incoming", json!({"uri": format!("tcp:{address}:0")}))?;
        let port = target.qmp.ask("query-migrate", json!({}))?["socket-address"][0]["port"].clone();
        let port = port.as_str().context("the target does not say where it listens")?.to_owned();
        let source = &mut self.at.qmp;
        let on = [("events", true), ("return-path", true), ("validate-uuid", true), ("auto-converge", true)];
        source.ask("migrate-set-capabilities", capabilities(&on))?;
        source.ask(
            "migrate-set-parameters",
            json!({
                "downtime-limit": 50, "max-bandwidth": 1u64 << 40, "throttle-trigger-threshold": 100,
                "cpu-throttle-initial": 1, "cpu-throttle-increment": 1, "max-cpu-throttle": 1,
            }),
        )?;
        source.ask("migrate", json!({"uri": format!("tcp:{address}:{port}")}))?;
        let ended = source.wait_migrated()?;
        let millis = |key: &str| {
            let value = ended[key].as_f64().with_context(|| format!("QEMU tells no {key}"))?;
            Ok::<_, anyhow::Error>(Duration::from_secs_f64(value / 1e3))
        };
        let moved = Moved { total: millis("total-time")?, downtime: millis("downtime")? };
        let mut source = std::mem::replace(&mut self.at, target);
        self.other = Arc::clone(&source.host);
        source.qmp.ask("quit", json!({}))?;
        let result = then(moved)?;
        source.process.wait(DEADLINE)?;
        Ok(result)
    }
}

fn start(host: &Arc<Host>, model: &Model, disk: &str, ip: Ipv4Addr, number: u32, incoming: bool) -> Result<Qemu> {
    let own = host.directory();
    let name = format!("run/bare{number}");
    std::fs::create_dir_all(own.join(&name)).context("making the bare QEMU's directory")?;
    // A host finds its own directory beside all hosts', under the same path as every other host.
    let lab = own.ancestors().nth(2).context("a host without a lab")?;
    let run_dir = lab.join("host").join(&name);
    let argv = model.argv(run_dir.to_str().context("the lab's path is not UTF-8")?, disk, ip, incoming)?;
    let mut process = host.spawn(&argv)?;
    let socket = own.join(&name).join("qmp.sock");
    let qmp = Qmp::connect(&socket, || process.wait(Duration::ZERO).is_err())
        .with_context(|| format!("the bare QEMU on {}: {}", host.name(), process.stderr()))?;
    Ok(Qemu { host: Arc::clone(host), process, qmp })
}

/// Runs a command on a host and returns what it wrote.
fn run(host: &Host, argv: &[&str]) -> Result<Vec<u8>> {
    let output = host.exec(argv)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{} on {}: {said}", argv.join(" "), host.name());
    Ok(output.stdout)
}

fn capabilities(on: &[(&str, bool)]) -> Value {
    let list: Vec<_> = on.iter().map(|(name, state)| json!({"capability": name, "state": state})).collect();
    json!({"capabilities": list})
}

/// A monitor, in the plainest way.
struct Qmp {
    stream: BufReader<UnixStream>,
    /// The last state of a migration that QEMU told by itself.
    migration: String,
}

impl Qmp {
    /// Connects as soon as the socket is there, for as long as QEMU is `alive`.
    fn connect(socket: &Path, mut alive: impl FnMut() -> bool) -> Result<Self> {
        let until = Instant::now() + DEADLINE;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > until || !alive() => {
                    return Err(error).with_context(|| format!("nobody answers on {}", socket.display()));
                }
                Err(_) => thread::sleep(POLL),
            }
        };
        stream.set_read_timeout(Some(DEADLINE))?;
        let mut qmp = Qmp { stream: BufReader::new(stream), migration: String::new() };
        qmp.line()?;
        qmp.ask("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        ensure!(self.stream.read_line(&mut line)? > 0, "QEMU has ended");
        let said: Value = serde_json::from_str(&line).with_context(|| format!("QEMU said {line:?}"))?;
        if said["event"] == "MIGRATION" {
            self.migration = said["data"]["status"].as_str().unwrap_or_default().to_owned();
        }
        Ok(said)
    }

    /// Waits for the end of a migration, told by QEMU itself, and returns its figures.
    fn wait_migrated(&mut self) -> Result<Value> {
        let until = Instant::now() + DEADLINE;
        loop {
            ensure!(Instant::now() < until, "the bare migration does not end");
            match self.migration.as_str() {
                "completed" => {
                    let figures = self.ask("query-migrate", json!({}))?;
                    // QEMU says that it is done before it has added up how long that took.
                    if figures["total-time"] != 0 {
                        return Ok(figures);
                    }
                }
                "failed" | "cancelled" => bail!("the bare migration failed"),
                _ => drop(self.line()?),
            }
        }
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        self.stream.get_mut().write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refused {command}: {error}");
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_command_line_differs_in_names_only() {
        let words = "qemu -name guest=a -uuid 1-2 -chardev socket,id=qmp,server=on,path=/h/run/vms/1-2/qmp.sock \
                     -incoming defer -S -append hf.ip=10.0.0.1/24 -blockdev {\"filename\":\"/v/a.raw\"} \
                     -netdev {\"ifname\":\"hft1\"} -device {\"driver\":\"virtio-net-pci\",\"mac\":\"52:54:00:00:00:07\"}";
        let model = Model {
            argv: words.split_whitespace().map(str::to_owned).collect(),
            uuid: "1-2".into(),
            disk: "/v/a.raw".into(),
            ip: Ipv4Addr::new(10, 0, 0, 1),
            bridge: "br".into(),
        };
        let argv = model.argv("/h/run/bare1", "/v/b.raw", Ipv4Addr::new(10, 0, 0, 9), true).expect("a command line");
        let expected = format!(
            "qemu -name guest=bare,debug-threads=on -uuid {UUID} -chardev \
             socket,id=qmp,server=on,path=/h/run/bare1/qmp.sock -append hf.ip=10.0.0.9/24 -blockdev \
             {{\"filename\":\"/v/b.raw\"}} -netdev {{\"ifname\":\"{TAP}\"}} -device \
             {{\"driver\":\"virtio-net-pci\",\"mac\":\"{MAC}\"}} -incoming defer"
        );
        assert_eq!(argv.join(" "), expected);
    }
}
