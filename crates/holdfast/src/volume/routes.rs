//! The ways to the LUNs that are open here, as the agent says them: which node is to be
//! gone through, and for which volumes others may go through this one.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use holdfast_core::{LunPath, NodeId};
use holdfast_volume::link::{Guests, Hello, Lease, Link, Refused, Welcome, Welcomed, answer};
use holdfast_volume::lun::{Geometry, StoreError, Superblock};
use holdfast_volume::{Carried, Hosted, Lun, Pipe, Reach, SETTLES_WITHIN, Server};
use rustls::ClientConfig;
use uuid::Uuid;

use super::link::{ToOwner, listen};
use super::protocol::{Links, Peer, Routes, ToAgent};
use crate::identity::Identity;
use crate::realtime::{LeasePage, boot_time};

/// How long the owner may take to say what a LUN is like that cannot be opened here.
const LOOK_WITHIN: Duration = Duration::from_secs(3);
/// How long this host's own way may take to show what is on it.
const READ_WITHIN: Duration = Duration::from_secs(2);
/// How long what this host had under way may take when a LUN is opened anew.
const OPEN_WITHIN: Duration = Duration::from_secs(2);
/// How long what came over a node's earlier links may take before a new one is refused.
const ADMIT_WITHIN: Duration = Duration::from_secs(5);
/// How long a node may take to hear that it was let in.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
/// How long it is waited at a time for what others have under way here.
const CLOSE_AGAIN: Duration = Duration::from_secs(1);

/// The lease under which this process was started, as links want it.
struct Clock {
    lease: Arc<LeasePage>,
    generation: u64,
}

impl Lease for Clock {
    fn now_ns(&self) -> u64 {
        boot_time().0
    }

    fn ends_ns(&self) -> u64 {
        match self.lease.generation.load(Ordering::SeqCst) == self.generation {
            true => self.lease.ends.load(Ordering::SeqCst),
            false => 0,
        }
    }
}

/// This node to others.
struct Me {
    node: NodeId,
    tls: Arc<ClientConfig>,
}

/// A LUN on which this node does I/O for others.
#[derive(Clone)]
struct Host {
    guests: Guests,
    hosted: Arc<Hosted>,
    like: Welcomed,
}

/// Whom an open LUN goes through.
#[derive(Default)]
pub struct Through {
    /// The last ownership that was heard of.
    epoch: u64,
    /// Whether its node is another one, and where that answers.
    addresses: Option<Arc<Mutex<Vec<SocketAddr>>>>,
    /// How much had gone through other nodes when that was said last.
    told: Carried,
}

/// All ways.
pub struct Ways {
    clock: Arc<Clock>,
    me: OnceLock<Me>,
    /// Where marks are that links may be in use.
    marks: PathBuf,
    known: Arc<Mutex<BTreeMap<Uuid, Routes>>>,
    hosts: Mutex<BTreeMap<Uuid, Host>>,
    agent: Arc<Mutex<Option<Sender<ToAgent>>>>,
    looks: Looks,
}

/// Devices, held by this process, of which a first look has not ended yet.
type Looks = Arc<Mutex<BTreeSet<PathBuf>>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ways {
    /// None are known yet.
    pub fn new(lease: Arc<LeasePage>, generation: u64, marks: PathBuf) -> Ways {
        Ways {
            clock: Arc::new(Clock { lease, generation }),
            me: OnceLock::new(),
            marks,
            known: Arc::default(),
            hosts: Mutex::default(),
            agent: Arc::default(),
            looks: Looks::default(),
        }
    }

    /// An agent has come.
    pub fn agent(&self, agent: Sender<ToAgent>) {
        *lock(&self.agent) = Some(agent);
    }

    /// The agent says who this node is to others; `met` gets those that connect.
    pub fn links(
        &self,
        links: &Links,
        met: impl Fn(Hello, Box<dyn Pipe>) + Clone + Send + 'static,
    ) -> anyhow::Result<()> {
        let identity = Identity::load(&links.state_dir)?.context("this node has no identity")?;
        if identity.node != links.node {
            bail!("this host is node {} and not {}", identity.node, links.node);
        }
        let me = Me { node: identity.node, tls: Arc::new(identity.client_config()?) };
        if self.me.set(me).is_ok() {
            let failed = || format!("nobody can be let in at port {}", links.port);
            listen(links.port, identity.server_config()?, met).with_context(failed)?;
        }
        Ok(())
    }

    /// The agent says the ways to a LUN.
    pub fn learn(&self, routes: Routes) {
        lock(&self.known).insert(routes.volume_id, routes);
    }

    /// What the agent said of a LUN last.
    pub fn known(&self, volume: Uuid) -> Option<Routes> {
        lock(&self.known).get(&volume).cloned()
    }

    /// Whether this node is to do I/O on it for others.
    pub fn is_mine(&self, volume: Uuid) -> bool {
        lock(&self.known).get(&volume).is_some_and(|routes| routes.mine.is_some())
    }

    /// Opens a LUN by whichever way there is. Only this host's own shows its geometry at
    /// once: see [`Ways::look`].
    ///
    /// # Errors
    /// There is no way. [`Away`]: nor is anything under way on this host's own.
    pub fn open(
        &self,
        volume: Uuid,
        device: &Path,
        patience: Duration,
    ) -> anyhow::Result<(Lun, Option<Geometry>, Through)> {
        let mut direct = open_here(&self.looks, volume, device, patience);
        // No way at all is used before that is over: it may land after whatever comes then.
        match direct {
            Err(why) if why.is::<UnderWay>() => return Err(why),
            // Earlier connections of this host are broken, and their time runs out.
            Err(why) if Lun::is_address(device) => {
                std::thread::sleep(SETTLES_WITHIN);
                direct = Err(if why.is::<Another>() { why } else { Away(format!("{why:#}")).into() });
            }
            _ => {}
        }
        let owner = self.known(volume).and_then(|routes| routes.owner);
        let mut welcomed = None;
        if let (Err(why), Some(owner)) = (&direct, &owner) {
            let (mut link, _) = self.link(volume, owner)?;
            let asked = link.look(LOOK_WITHIN).with_context(|| format!("{why:#}; through node {}", owner.node))?;
            welcomed = Some(asked);
        }
        let (direct, geometry) = match direct {
            Ok((lun, geometry)) => (Ok(lun), Some(geometry)),
            Err(error) if welcomed.is_some() => (Err(format!("{error:#}")), None),
            Err(error) => return Err(error),
        };
        let (known, looks, at) = (self.known.clone(), self.looks.clone(), device.to_owned());
        let opens = move || {
            let at = lock(&known).get(&volume).map_or_else(|| at.clone(), |routes| routes.device.clone());
            open_here(&looks, volume, &at, OPEN_WITHIN)
                .map(|(lun, _)| lun)
                .map_err(|error| io::Error::other(format!("{error:#}")))
        };
        let (known, agent) = (self.known.clone(), self.agent.clone());
        let hears = Box::new(move |reach: &Reach| tell(&agent, volume, Some(path(&known, volume, reach))));
        let lun = Lun::by_ways(device, direct, welcomed, opens, hears)?;
        let mut through = Through::default();
        self.follow(volume, &lun, &mut through)?;
        if self.is_marked(volume, through.epoch) {
            lun.hold_direct();
        }
        Ok((lun, geometry, through))
    }

    /// Reads the geometry of an open LUN by whichever way works, however long none does:
    /// what is said of the ways has to be heard meanwhile.
    pub fn look(volume: Uuid, lun: &Lun) -> anyhow::Result<Geometry> {
        let Superblock { identity, geometry, .. } = Superblock::read(lun)?;
        if identity.volume != volume {
            bail!("the volume's owner has another volume there, {:?}", identity.name);
        }
        Ok(geometry)
    }

    /// Has an open LUN go through whom the agent said last.
    pub fn follow(&self, volume: Uuid, lun: &Lun, through: &mut Through) -> anyhow::Result<()> {
        let Some(routes) = self.known(volume) else { return Ok(()) };
        let epoch = routes.owner.as_ref().map(|owner| owner.epoch).or(routes.mine).or(routes.leaves);
        // An ownership is given when the one before is over, and whatever was done under it.
        let new = epoch.is_some_and(|epoch| epoch > through.epoch);
        match &routes.owner {
            Some(owner) if !new && through.addresses.is_some() => {
                if let Some(addresses) = &through.addresses {
                    lock(addresses).clone_from(&owner.addresses);
                }
            }
            Some(owner) => {
                let (link, addresses) = self.link(volume, owner)?;
                lun.go_through(Some(link), new)?;
                through.addresses = Some(addresses);
            }
            None if new || through.addresses.is_some() => {
                lun.go_through(None, new)?;
                through.addresses = None;
            }
            None => {}
        }
        through.epoch = through.epoch.max(epoch.unwrap_or(0));
        lun.plan(routes.planned);
        Ok(())
    }

    fn link(&self, volume: Uuid, owner: &Peer) -> anyhow::Result<(Link, Arc<Mutex<Vec<SocketAddr>>>)> {
        let me = self.me.get().context("this node is nobody to others yet")?;
        let addresses = Arc::new(Mutex::new(owner.addresses.clone()));
        std::fs::create_dir_all(&self.marks)?;
        let mark = self.marks.join(format!("{volume}-{}", owner.epoch));
        let dial = ToOwner {
            tls: me.tls.clone(),
            node: owner.node,
            addresses: addresses.clone(),
            marked: mark.exists(),
            mark,
        };
        let term = self.clock.lease.term.load(Ordering::SeqCst);
        let (lease, node, epoch) = (self.clock.clone(), me.node.0, owner.epoch);
        Ok((Link { dial: Box::new(dial), lease, volume, node, term, epoch }, addresses))
    }

    /// Whether an earlier life of this server may have something under way at the owner of
    /// this epoch. Marks of earlier ones mean nothing any more.
    fn is_marked(&self, volume: Uuid, epoch: u64) -> bool {
        let mut marked = false;
        for entry in std::fs::read_dir(&self.marks).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let of = name.strip_prefix(&format!("{volume}-")).and_then(|of| of.parse::<u64>().ok());
            match of {
                Some(of) if of < epoch => drop(std::fs::remove_file(entry.path())),
                Some(_) => marked = true,
                None => {}
            }
        }
        marked
    }

    /// From now on others that name this ownership are let in.
    pub fn host(&self, volume: Uuid, epoch: u64, lun: &Lun) {
        let mut hosts = lock(&self.hosts);
        let host = hosts.entry(volume).or_insert_with(|| Host {
            guests: Guests::default(),
            hosted: Arc::new(Hosted::new(lun.clone(), self.clock.clone())),
            like: Welcomed { block: lun.block_bytes(), bytes: lun.bytes() },
        });
        host.guests.open(epoch);
    }

    /// Nobody is let in any more. Returns when nothing that others asked for is under way;
    /// `false`: nobody was ever let in. One call of this and [`Ways::host`] at a time.
    pub fn host_no_more(&self, volume: Uuid) -> bool {
        let host = lock(&self.hosts).get(&volume).cloned();
        let Some(host) = host else { return false };
        while !host.guests.close(CLOSE_AGAIN) {
            tracing::warn!(%volume, "what other nodes asked for is still under way");
        }
        lock(&self.hosts).remove(&volume);
        true
    }

    /// A node has connected.
    pub fn met(&self, server: &Server, hello: Hello, mut pipe: Box<dyn Pipe>) {
        let host = lock(&self.hosts).get(&hello.volume).cloned();
        let admitted = match (&host, pipe.fd().try_clone_to_owned()) {
            (Some(host), Ok(socket)) => host.guests.admit(&hello, socket, ADMIT_WITHIN),
            _ => Err(Refused::NotOwner),
        };
        let Welcomed { block, bytes } = host.as_ref().map_or(Welcomed { block: 0, bytes: 0 }, |host| host.like);
        let refused = admitted.as_ref().err().copied();
        let welcome = Welcome { refused, block, bytes, stamp_ns: self.clock.now_ns() };
        match (answer(&mut *pipe, &welcome, ANSWER_WITHIN), admitted, host) {
            (Ok(()), Ok(guest), Some(host)) => {
                tracing::info!(node = hello.node, volume = %hello.volume, "another node goes through this one");
                server.let_in(&host.hosted, pipe, guest);
            }
            (_, Err(why), _) => tracing::info!(node = hello.node, volume = %hello.volume, %why, "a link is refused"),
            _ => {}
        }
    }

    /// Tells the agent how a LUN that is open is reached.
    pub fn tell(&self, volume: Uuid, lun: &Lun) {
        tell(&self.agent, volume, Some(path(&self.known, volume, &lun.reach().0)));
    }

    /// Tells the agent that a LUN is open no more.
    pub fn tell_closed(&self, volume: Uuid) {
        tell(&self.agent, volume, None);
    }

    /// Tells the agent how much has gone through other nodes, if it has grown.
    pub fn tell_carried(&self, volume: Uuid, lun: &Lun, through: &mut Through) {
        let (_, carried) = lun.reach();
        if carried != through.told
            && let Some(agent) = &*lock(&self.agent)
        {
            through.told = carried;
            let Carried { requests, bytes } = carried;
            let _ = agent.send(ToAgent::Redirected { volume_id: volume, requests, bytes });
        }
    }
}

fn tell(agent: &Mutex<Option<Sender<ToAgent>>>, volume_id: Uuid, path: Option<LunPath>) {
    if let Some(agent) = &*lock(agent) {
        let _ = agent.send(ToAgent::Path { volume_id, path });
    }
}

fn path(known: &Mutex<BTreeMap<Uuid, Routes>>, volume: Uuid, reach: &Reach) -> LunPath {
    let owner = || lock(known).get(&volume).and_then(|routes| routes.owner.as_ref().map(|owner| owner.node));
    match reach {
        Reach::Direct => LunPath::Direct,
        Reach::Redirected { why } => LunPath::Redirected { why: why.clone(), through: owner().unwrap_or_default() },
        Reach::Unavailable { why } => LunPath::Unavailable { why: why.clone() },
    }
}

/// An earlier life of this server had handed I/O to the kernel that is not over.
#[derive(Debug, thiserror::Error)]
#[error("I/O of an earlier volume server is still under way on {}", .0.display())]
struct UnderWay(PathBuf);

/// This host's own way does not work, and nothing of an earlier life of this server is
/// under way on it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Away(String);

/// The device is not the volume's.
#[derive(Debug, thiserror::Error)]
#[error("{} holds another volume, {:?}", .0.display(), .1)]
struct Another(PathBuf, String);

/// Opens a LUN by this host's own way, and makes sure which it is.
fn open_here(looks: &Looks, volume: Uuid, device: &Path, patience: Duration) -> anyhow::Result<(Lun, Geometry)> {
    if lock(looks).contains(device) {
        bail!(Away(format!("{} has not answered yet", device.display())));
    }
    let lun = Lun::open(device)?;
    // What an earlier life of this server had on its way may still land.
    if !lun.outlive_others(patience)? {
        bail!(UnderWay(device.to_owned()));
    }
    let Superblock { identity, geometry, .. } = look_within(looks, &lun, READ_WITHIN)?;
    if identity.volume != volume {
        bail!(Another(device.to_owned(), identity.name));
    }
    Ok((lun, geometry))
}

/// Reads what is on a device that is held. One that hangs is left to a thread of its own,
/// which keeps it held until the kernel ends the read.
fn look_within(looks: &Looks, lun: &Lun, within: Duration) -> anyhow::Result<Superblock> {
    let (says, said) = channel();
    let (theirs, reads, device) = (looks.clone(), lun.clone(), lun.path().to_owned());
    lock(looks).insert(device.clone());
    let body = move || {
        let read = Superblock::read(&reads);
        drop(reads);
        lock(&theirs).remove(&device);
        let _ = says.send(read);
    };
    if let Err(error) = std::thread::Builder::new().name("look".into()).stack_size(128 << 10).spawn(body) {
        lock(looks).remove(lun.path());
        return Err(error.into());
    }
    let read = said.recv_timeout(within).map_err(|_| Away(format!("{} does not answer", lun.path().display())))?;
    read.map_err(|error| match error {
        StoreError::Io { .. } => Away(format!("{}: {error}", lun.path().display())).into(),
        error => error.into(),
    })
}
