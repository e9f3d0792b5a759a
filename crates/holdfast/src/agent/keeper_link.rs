//! The agent's view of its keeper: the lease, and the processes of the VMs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use holdfast_core::watchdog::Standing;
use holdfast_core::{Epoch, Incarnation, NodeTerm, VmId};
use tokio::sync::{Mutex, mpsc, watch};

use crate::keeper::client::{ClientError, KeeperClient};
use crate::keeper::protocol::{Event, ProcessState, Reply, Request, Tag, VmProcess};

/// The keeper waits for no disk, so it answers at once or something is wrong.
const DEADLINE: Duration = Duration::from_secs(5);
/// A process that was killed may have to wait for its disk before it is dead.
const KILL_DEADLINE: Duration = Duration::from_secs(60);

/// What the keeper says.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// This life of the keeper.
    pub incarnation: Incarnation,
    /// Whether VMs may run.
    pub held: bool,
    /// The node's term of the last lease.
    pub term: NodeTerm,
    /// The processes of this life, by VM and epoch.
    pub processes: BTreeMap<VmId, BTreeMap<Epoch, VmProcess>>,
    /// Those that were alive when the lease ended.
    pub fenced: BTreeSet<(VmId, Epoch)>,
    /// How this host's watchdog stands; `None` before it was told.
    pub watchdog: Option<Standing>,
}

impl View {
    /// The VM's living process.
    pub fn alive(&self, vm: VmId) -> Option<&VmProcess> {
        self.processes.get(&vm)?.values().find(|process| process.state == ProcessState::Running)
    }

    /// The VM's process of an epoch.
    pub fn process(&self, vm: VmId, epoch: Epoch) -> Option<&VmProcess> {
        self.processes.get(&vm)?.get(&epoch)
    }
}

/// The connection to the keeper; when it ends, the keeper is gone, and so is this
/// process a moment later.
#[derive(Clone)]
pub struct KeeperLink {
    client: Arc<KeeperClient>,
    view: Arc<watch::Sender<View>>,
    /// One listing at a time, so that an older one never replaces a newer.
    listing: Arc<Mutex<()>>,
}

impl KeeperLink {
    /// Connects and follows the keeper's events.
    ///
    /// # Errors
    /// The keeper does not answer.
    pub async fn connect(socket: &Path) -> Result<KeeperLink, ClientError> {
        let (client, events) = KeeperClient::connect(socket, DEADLINE).await?;
        let link = KeeperLink {
            client: Arc::new(client),
            view: Arc::new(watch::Sender::new(View::default())),
            listing: Arc::new(Mutex::new(())),
        };
        link.client.call(Request::Subscribe, DEADLINE).await?;
        if let Reply::Hello(greeting) = link.client.call(Request::Hello, DEADLINE).await? {
            link.view.send_modify(|view| {
                view.incarnation = greeting.incarnation;
                view.held = greeting.lease.held;
                view.term = greeting.lease.term;
                view.watchdog = Some(greeting.watchdog);
            });
            link.store(greeting.vms);
        }
        tokio::spawn(link.clone().follow(events));
        Ok(link)
    }

    async fn follow(self, mut events: mpsc::Receiver<Event>) {
        while let Some(event) = events.recv().await {
            match event {
                Event::LeaseGained { term } => self.view.send_modify(|view| (view.held, view.term) = (true, term)),
                Event::LeaseLost { term, killed } => {
                    tracing::error!(%term, killed, "this node's lease has ended, its VMs were killed");
                    self.view.send_modify(|view| {
                        view.held = false;
                        let alive = view
                            .processes
                            .iter()
                            .flat_map(|(vm, epochs)| epochs.values().map(|process| (*vm, process)));
                        let alive: Vec<_> = alive
                            .filter(|(_, process)| process.state == ProcessState::Running)
                            .map(|(vm, process)| (vm, process.epoch))
                            .collect();
                        view.fenced.extend(alive);
                    });
                }
                Event::Exited { .. } => {}
                Event::WatchdogChanged => {
                    match self.client.call(Request::Hello, DEADLINE).await {
                        Ok(Reply::Hello(greeting)) => {
                            self.view.send_modify(|view| view.watchdog = Some(greeting.watchdog));
                        }
                        outcome => tracing::warn!(?outcome, "the keeper did not say how its watchdog stands"),
                    }
                    continue;
                }
            }
            if let Err(error) = self.refresh().await {
                tracing::warn!(%error, "the keeper did not list its VMs");
            }
        }
        // The keeper is the parent of this process, and closed its end.
        tracing::error!(
            "the connection to the keeper ended: the agent ends too, and is started again by its next life"
        );
        std::process::exit(1);
    }

    async fn refresh(&self) -> Result<(), ClientError> {
        let _one = self.listing.lock().await;
        if let Reply::Vms(vms) = self.client.call(Request::List, DEADLINE).await? {
            self.store(vms);
        }
        Ok(())
    }

    fn store(&self, vms: Vec<VmProcess>) {
        let mut processes: BTreeMap<VmId, BTreeMap<Epoch, VmProcess>> = BTreeMap::new();
        for process in vms {
            processes.entry(process.vm).or_default().insert(process.epoch, process);
        }
        self.view.send_if_modified(|view| {
            let changed = view.processes != processes;
            view.processes = processes;
            changed
        });
    }

    /// What the keeper says now and from now on.
    pub fn watch(&self) -> watch::Receiver<View> {
        self.view.subscribe()
    }

    /// Asks the keeper, and sees what came of it before returning.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn ask(&self, request: Request) -> Result<Reply, ClientError> {
        let changes_processes = matches!(request, Request::Start(_) | Request::Kill(_) | Request::Forget(_));
        let deadline = if matches!(request, Request::Kill(_)) { KILL_DEADLINE } else { DEADLINE };
        let reply = self.client.call(request, deadline).await;
        if changes_processes {
            self.refresh().await?;
        }
        reply
    }

    /// Kills a VM's process and returns when it is dead.
    ///
    /// # Errors
    /// It could not be seen dead in time.
    pub async fn kill(&self, vm: VmId, epoch: Epoch) -> Result<(), ClientError> {
        self.ask(Request::Kill(Tag { vm, epoch })).await.map(drop)
    }
}
