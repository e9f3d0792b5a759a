//! Keepers as processes of their own (this test binary, executed again), asked
//! over their sockets, with leases from a real answering thread over loopback.

use std::fs;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use holdfast_core::lease::{Authority, BootTime, LeaseTiming};
use holdfast_core::{Epoch, Incarnation, NodeId, NodeTerm, VmId};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::sync::mpsc;
use uuid::Uuid;

use super::super::client::{ClientError, KeeperClient};
use super::super::protocol::*;
use super::super::watchdog::{Choice, tests::below};
use super::super::*;
use crate::heartbeat::SecretKey;
use crate::leases::tests::loopback;
use crate::leases::{Admission, Leases, LeasesConfig, PeerKey};
use crate::realtime::{boot_time, pidfd_open};

pub const SOON: Duration = Duration::from_secs(10);
pub const NODE: NodeId = NodeId(1);
pub const CLUSTER: Uuid = Uuid::from_u128(0xc1);
pub const TIMING: LeaseTiming = LeaseTiming { length_ms: 600, heartbeat_ms: 50 };

pub const DEFAULT_PROFILE: LeaseTiming = LeaseTiming { length_ms: 1_500, heartbeat_ms: 100 };

pub const RUN_DIR: &str = "HOLDFAST_TEST_RUN_DIR";
const WATCHDOG: &str = "HOLDFAST_TEST_WATCHDOG";

/// Not a test: the keeper that the tests start.
#[test]
#[ignore = "the keeper process of other tests"]
fn keeper_process() {
    let Some(run_dir) = std::env::var_os(RUN_DIR).map(PathBuf::from) else {
        return;
    };
    let agents = run_dir.join("agents");
    let agent = format!("echo $$ >> {}; exec sleep 1000", agents.display());
    let watchdogs = match std::env::var_os(WATCHDOG) {
        Some(root) => below(root.into()),
        None => Watchdogs::of_host(Choice::Never),
    };
    // Says who it is, and with which descriptor.
    let volume = format!("echo $$ $0 >> {}; exec sleep 1000", run_dir.join("volumes").display());
    let shell = |script: &str| ["sh", "-c", script].map(OsString::from).to_vec();
    let config = KeeperConfig { run_dir, agent: shell(&agent), volume: shell(&volume), drain: SOON, watchdogs };
    if let Err(error) = Keeper::run(config) {
        eprintln!("{error}");
        std::process::exit(3);
    }
    std::process::exit(0);
}

pub struct Lab {
    pub directory: TempDir,
    pub leases: Leases,
    /// Where the keepers' watchdog is; without, they use none.
    pub watchdog: Option<PathBuf>,
}

pub struct Running {
    pub process: Child,
    pub client: KeeperClient,
    pub events: mpsc::Receiver<Event>,
    pub life: Incarnation,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub fn secret() -> SecretKey {
    SecretKey([5; 32])
}

pub fn vm(number: u128) -> VmId {
    VmId(Uuid::from_u128(number))
}

pub fn tag(number: u128, epoch: u64) -> Tag {
    Tag { vm: vm(number), epoch: Epoch(epoch) }
}

impl Lab {
    pub fn new() -> Lab {
        let leases = Leases::start(LeasesConfig {
            cluster: CLUSTER,
            node: NODE,
            secret: secret(),
            bind: vec![loopback()],
            peers: vec![PeerKey { node: NODE, public: secret().public() }],
        })
        .unwrap();
        let directory = tempfile::tempdir().unwrap();
        Lab { directory, leases, watchdog: None }
    }

    pub fn run_dir(&self) -> PathBuf {
        self.directory.path().join("run")
    }

    /// Starts a keeper that dies with this thread. libtest has threads of its own,
    /// so the keeper's signals are blocked from before its start.
    pub async fn keeper(&self) -> Running {
        let role = format!("{}::keeper_process", module_path!());
        let role = role.split_once("::").unwrap().1.to_owned();
        let process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "env", "--block-signal=TERM,INT,CHLD"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", &role, "--ignored", "--nocapture", "--test-threads=1"])
            .env(RUN_DIR, self.run_dir())
            .envs(self.watchdog.iter().map(|root| (WATCHDOG, root)))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + SOON;
        let socket = self.run_dir().join(SOCKET);
        let (client, events) = loop {
            match KeeperClient::connect(&socket, SOON).await {
                Ok(connected) => break connected,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        let mut running = Running { process, client, events, life: Incarnation(0) };
        running.life = running.hello().await.incarnation;
        assert_eq!(running.ask(Request::Subscribe).await, Ok(Reply::Vms(vec![])));
        running
    }

    pub fn admit(&self, life: Incarnation, term: u64) -> [Admission; 1] {
        [Admission { node: NODE, admitted: life, term: NodeTerm(term), up: true, leaves: false }]
    }

    /// Configures the keeper and gives it its lease.
    pub async fn grant(&self, keeper: &mut Running, term: u64) {
        // It asks already when the coordinator begins: whoever is silent for a lease is
        // condemned, and on a busy machine that is soon over.
        assert_eq!(keeper.ask(self.configure()).await, Ok(Reply::Done));
        let nodes = self.admit(keeper.life, term);
        self.leases.become_coordinator(boot_time(), &nodes, TIMING, TIMING).unwrap();
        self.leases.set_authority(FOREVER);
        let term = NodeTerm(term);
        assert_eq!(keeper.event().await, Event::LeaseGained { term });
    }

    pub fn configure(&self) -> Request {
        Request::Configure(Configuration {
            generation: Default::default(),
            cluster: CLUSTER,
            node: NODE,
            secret: secret(),
            bind: vec![],
            peers: vec![PeerAddresses { node: NODE, public: secret().public(), addresses: self.leases.addresses() }],
            heartbeat_ms: TIMING.heartbeat_ms,
        })
    }

    pub fn start(&self, number: u128, epoch: u64, term: u64) -> Request {
        self.start_program(number, epoch, term, &["sleep", "1000"])
    }

    pub fn start_program(&self, number: u128, epoch: u64, term: u64, argv: &[&str]) -> Request {
        Request::Start(StartVm {
            vm: vm(number),
            epoch: Epoch(epoch),
            term: NodeTerm(term),
            argv: argv.iter().map(|word| word.to_string()).collect(),
            env: vec![("HOLDFAST_TEST".into(), "yes".into())],
            cgroup: None,
            log: self.directory.path().join("vm.log"),
            run_dir: self.directory.path().into(),
        })
    }

    /// The volume servers that were started so far.
    pub async fn volume_server(&self, count: usize) -> i32 {
        let file = self.run_dir().join("volumes");
        let deadline = Instant::now() + SOON;
        loop {
            let lines = fs::read_to_string(&file).unwrap_or_default();
            // A line that is not whole yet has no end.
            let pids: Vec<&str> = lines.split_inclusive('\n').filter(|line| line.ends_with('\n')).collect();
            if let Some(line) = pids.get(count - 1) {
                return line.split(' ').next().unwrap().parse().unwrap();
            }
            assert!(Instant::now() < deadline, "volume servers: {lines:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub fn agents(&self) -> Vec<i32> {
        let lines = fs::read_to_string(self.run_dir().join("agents")).unwrap_or_default();
        lines.lines().map(|line| line.parse().unwrap()).collect()
    }

    pub async fn agent(&self, count: usize) -> i32 {
        let deadline = Instant::now() + SOON;
        while self.agents().len() < count {
            assert!(Instant::now() < deadline, "agents: {:?}", self.agents());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.agents()[count - 1]
    }
}

pub const FOREVER: Authority = Authority { until: BootTime(u64::MAX) };

impl Running {
    pub async fn ask(&self, request: Request) -> Result<Reply, Refusal> {
        match self.client.call(request, SOON).await {
            Ok(reply) => Ok(reply),
            Err(ClientError::Refused(refusal)) => Err(refusal),
            Err(error) => panic!("{error}"),
        }
    }

    pub async fn hello(&self) -> Greeting {
        match self.ask(Request::Hello).await {
            Ok(Reply::Hello(greeting)) => greeting,
            other => panic!("{other:?}"),
        }
    }

    pub async fn list(&self) -> Vec<VmProcess> {
        match self.ask(Request::List).await {
            Ok(Reply::Vms(vms)) => vms,
            other => panic!("{other:?}"),
        }
    }

    pub async fn started(&self, request: Request) -> OwnedFd {
        match self.ask(request).await {
            Ok(Reply::Started { pid }) => pidfd_open(pid).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// Events until this one.
    pub async fn until(&mut self, wanted: Event) {
        while self.event().await != wanted {}
    }

    pub async fn event(&mut self) -> Event {
        tokio::time::timeout(SOON, self.events.recv()).await.unwrap().unwrap()
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.process.id().cast_signed())
    }
}

pub fn exited(number: u128, epoch: u64, exit: Exit) -> Event {
    Event::Exited { vm: vm(number), epoch: Epoch(epoch), exit }
}

pub const KILLED: Exit = Exit::Signal(9);
