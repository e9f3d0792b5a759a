//! The witness on this node: who should host it, the lease on its disk, and the
//! participant itself while this node hosts it.
//!
//! ```text
//!  state (who should host) ─▶ order ─▶ lease (a thread, the disk) ─▶ view
//!                                                                     │ mine
//!                 calls of other nodes ─▶ Seats ◀── participant ◀─────┘
//! ```
//! Level-triggered like everything here. A node hosts when it should; when nobody is
//! active on the disk, any node that votes takes over by itself, one after the other,
//! also without a quorum: that is what the witness is for. It gives the witness up
//! again when the cluster decides anew who hosts.

mod lease;
mod setting;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use holdfast_consensus::{Consensus, RpcError, RpcKind, Seat, Settings, Standing};
use holdfast_core::lease::BootTime;
use holdfast_core::witness::{DiskTiming, HOSTS, Memory, Want};
use holdfast_core::*;
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use super::lane::ConsensusLane;
use super::{Agent, Member};
use crate::identity::write_durably;
use lease::{Lease, Order, View};

pub use setting::{Probe, Probed};

/// The log on a disk is copied by whoever takes over: it is kept short.
const SNAPSHOT_EVERY: u64 = 500;
/// After a participant failed it is not tried again for so long.
const PAUSE: Duration = Duration::from_secs(3);
/// What was seen on the disk is written down at least this often while it changes.
const REMEMBER_EVERY: Duration = Duration::from_secs(30);
/// The file that keeps it.
const MEMORY_FILE: &str = "witness-seen.json";

/// The witnesses that are hosted here, and who hosts those that are not.
#[derive(Default)]
pub struct Seats {
    here: RwLock<BTreeMap<NodeId, Consensus>>,
    /// By the last look at the disk, or the last answer.
    elsewhere: Mutex<BTreeMap<NodeId, NodeId>>,
    health: Mutex<BTreeMap<NodeId, Health>>,
}

/// How a witness stands from this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// The epoch under which this node hosts it.
    pub epoch: Option<u64>,
    /// Why this node cannot use the disk.
    pub trouble: Option<String>,
    /// When the disk was last read or written from here, on this node's clock.
    pub last: BootTime,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change is complete in itself: a panic leaves nothing half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Seats {
    /// The participant, if it is hosted here.
    pub fn here(&self, witness: NodeId) -> Option<Consensus> {
        self.here.read().unwrap_or_else(PoisonError::into_inner).get(&witness).cloned()
    }

    fn seat(&self, witness: NodeId, participant: Option<Consensus>) {
        let mut here = self.here.write().unwrap_or_else(PoisonError::into_inner);
        match participant {
            Some(participant) => drop(here.insert(witness, participant)),
            None => drop(here.remove(&witness)),
        }
    }

    /// Who hosts it, as far as this node knows.
    pub fn elsewhere(&self, witness: NodeId) -> Option<NodeId> {
        locked(&self.elsewhere).get(&witness).copied()
    }

    /// That node hosts it.
    pub fn found(&self, witness: NodeId, at: NodeId) {
        locked(&self.elsewhere).insert(witness, at);
    }

    /// How it stands from here; `None` if this node has nothing to do with it.
    pub fn health(&self, witness: NodeId) -> Option<Health> {
        locked(&self.health).get(&witness).cloned()
    }

    /// Has the participant answer a call, if it is hosted here.
    ///
    /// # Errors
    /// [`RpcError::NotHosted`] or what the participant says.
    pub async fn handle(&self, witness: NodeId, kind: RpcKind, body: Bytes) -> Result<Bytes, RpcError> {
        self.here(witness).ok_or(RpcError::NotHosted)?.handle(kind, body).await
    }
}

/// What is kept of a disk, so that an older one is recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    mark: Uuid,
    #[serde(flatten)]
    memory: Memory,
}

impl Agent {
    /// Takes this node's part in hosting the witnesses that there are, for ever.
    pub(super) async fn keep_witnesses(self, member: &'static Member) {
        let mut changes = self.changes();
        let mut standing = member.consensus.place();
        let mut tasks: BTreeMap<NodeId, JoinHandle<()>> = BTreeMap::new();
        loop {
            let state = changes.borrow_and_update().clone();
            let members = members(&standing.borrow_and_update());
            let current = state.witness.iter();
            let former = state.former_witness.iter().filter(|former| members.contains(&former.id));
            let wanted: Vec<&Witness> = current.chain(former).filter(|_| member.me.0 <= HOSTS).collect();
            tasks.retain(|id, task| {
                let keep = wanted.iter().any(|witness| witness.id == *id) && !task.is_finished();
                if !keep {
                    task.abort();
                    self.leave(member, *id);
                }
                keep
            });
            for witness in wanted {
                tasks
                    .entry(witness.id)
                    .or_insert_with(|| tokio::spawn(self.clone().keep_witness(member, witness.clone())));
            }
            drop(state);
            // The standing changes with every acknowledgement; only its members matter.
            let other = async {
                if standing.wait_for(|now| self::members(now) != members).await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = other => {}
            }
        }
    }

    /// Nothing of that witness is here any more.
    fn leave(&self, member: &Member, id: NodeId) {
        if let Some(participant) = member.witnesses.here(id) {
            member.witnesses.seat(id, None);
            tokio::spawn(async move { participant.stop().await });
        }
        locked(&member.witnesses.health).remove(&id);
        member.reports.say(|report| report.witness = report.witness.take().filter(|said| said.id != id));
    }

    async fn keep_witness(self, member: &'static Member, witness: Witness) {
        let mut changes = self.changes();
        let mut standing = member.consensus.place();
        let mut remembered = self.remembered(witness.mark).await;
        let mut host =
            Host { witness: witness.id, taken: None, released: None, held_back: None, trouble: None, running: None };
        let order = host.order(member, &self.state(), &standing.borrow(), None);
        let lease = match Lease::start(member.me, &witness, order, remembered.memory) {
            Ok(lease) => lease,
            Err(error) => {
                tracing::error!(%error, "the witness's disk is not looked after");
                return;
            }
        };
        let mut view = lease.view();
        let mut written = Instant::now();
        loop {
            let seen = view.borrow_and_update().clone();
            host.follow(member, &lease, &seen).await;
            let state = changes.borrow_and_update().clone();
            let epoch = seen.mine.as_ref().map(|(epoch, _)| *epoch);
            let order = host.order(member, &state, &standing.borrow_and_update(), epoch);
            if order.want == Want::Nothing {
                // It falls silent before another may speak.
                host.stop(member).await;
            }
            lease.order(order);
            host.say(member, &seen);
            drop(state);
            if let Some(other) = seen.other.filter(|_| seen.mine.is_none()) {
                member.witnesses.found(witness.id, other);
            }
            let due = seen.memory.epoch != remembered.memory.epoch || written.elapsed() > REMEMBER_EVERY;
            if due && seen.memory > remembered.memory {
                remembered.memory = seen.memory;
                written = Instant::now();
                self.remember(remembered).await;
            }
            let voters = voters(&standing.borrow());
            let other_voters = async {
                if standing.wait_for(|now| self::voters(now) != voters).await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            let failed = host.failed();
            let wake = async {
                tokio::select! {
                    _ = view.changed() => {}
                    _ = changes.changed() => {}
                    () = other_voters => {}
                    () = failed => {}
                }
            };
            let _ = timeout(host.pause(), wake).await;
        }
    }

    fn memory_file(&self) -> PathBuf {
        self.0.config.state_dir.join(MEMORY_FILE)
    }

    /// What this node saw on the disk with this mark in an earlier life.
    async fn remembered(&self, mark: Uuid) -> Remembered {
        let path = self.memory_file();
        let read = tokio::task::spawn_blocking(move || std::fs::read(path)).await;
        let known = read.ok().and_then(Result::ok).and_then(|bytes| serde_json::from_slice::<Remembered>(&bytes).ok());
        known.filter(|known| known.mark == mark).unwrap_or(Remembered { mark, memory: Memory::default() })
    }

    async fn remember(&self, remembered: Remembered) {
        let path = self.memory_file();
        let write = move || write_durably(&path, &serde_json::to_vec(&remembered)?);
        if let Ok(Err(error)) = tokio::task::spawn_blocking(write).await {
            tracing::warn!(%error, "what was seen on the witness's disk was not written down");
        }
    }
}

fn members(standing: &Standing) -> Vec<NodeId> {
    standing.voters.iter().chain(&standing.learners).copied().collect()
}

fn voters(standing: &Standing) -> Vec<NodeId> {
    standing.voters.clone()
}

/// Hosting one witness.
struct Host {
    witness: NodeId,
    /// How often it had been decided who hosts when this node took over.
    taken: Option<u64>,
    /// The epoch that it gives up, until the lease is gone.
    released: Option<u64>,
    /// Until when this node keeps its hands off, because the participant failed.
    held_back: Option<Instant>,
    trouble: Option<String>,
    running: Option<(u64, Consensus)>,
}

impl Host {
    /// What to do about the lease.
    fn order(&mut self, member: &Member, state: &ClusterState, standing: &Standing, epoch: Option<u64>) -> Order {
        let witness =
            [&state.witness, &state.former_witness].into_iter().flatten().find(|known| known.id == self.witness);
        let timing = DiskTiming::of(state.settings.profile.timing());
        let longest_ms = DiskTiming::of(state.settings.longest_lease).length_ms;
        let want = witness.map_or(Want::Nothing, |witness| self.want(member, witness, standing, epoch));
        let (epoch, missing) = witness.map_or_else(Default::default, |witness| (witness.epoch, witness.missing));
        Order { want, timing, longest_ms, epoch, missing }
    }

    fn want(&mut self, member: &Member, witness: &Witness, standing: &Standing, epoch: Option<u64>) -> Want {
        if self.released.is_some() && self.released == epoch {
            return Want::Nothing;
        }
        self.released = None;
        if self.held_back.is_some_and(|until| Instant::now() < until) {
            return Want::Nothing;
        }
        self.held_back = None;
        if witness.host == Some(member.me) {
            if self.running.is_some() {
                self.taken = Some(witness.decided);
            }
            return Want::Host;
        }
        if self.running.is_some() {
            // It was decided anew since this node took over, and that node is there.
            let decided = *self.taken.get_or_insert(witness.decided) != witness.decided;
            if decided {
                self.released = epoch;
                return Want::Nothing;
            }
        } else {
            self.taken = None;
        }
        match standing.voters.iter().filter(|id| !id.is_witness()).position(|id| *id == member.me) {
            Some(rank) => Want::StandIn { rank: rank as u64 },
            None => Want::Nothing,
        }
    }

    /// Starts the participant when this node has the right to, and stops it when it
    /// has lost it.
    async fn follow(&mut self, member: &'static Member, lease: &Lease, seen: &View) {
        let epoch = seen.mine.as_ref().map(|(epoch, _)| *epoch);
        let lost = self.running.as_ref().is_some_and(|(of, _)| Some(*of) != epoch);
        let broken = self.running.as_ref().and_then(|(_, participant)| participant.place().borrow().trouble.clone());
        if lost || broken.is_some() {
            self.stop(member).await;
        }
        if let Some(why) = broken {
            self.fail(format!("cannot use the witness's disk: {why}"));
            return;
        }
        let (None, Some((epoch, disk))) = (&self.running, &seen.mine) else { return };
        if self.held_back.is_some() || self.released == Some(*epoch) {
            return;
        }
        let seat = Seat {
            disk: disk.clone(),
            host: member.me,
            epoch: *epoch,
            kept: lease.kept.clone(),
            held: lease.gate(*epoch),
        };
        let settings = Settings { snapshot_every: SNAPSHOT_EVERY, ..Settings::new(self.witness, disk.path()) };
        let lane = ConsensusLane {
            peers: member.peers.clone(),
            witnesses: member.witnesses.clone(),
            me: member.me,
            home: Some(member.consensus.clone()),
        };
        match Consensus::start_witness(settings, seat, Arc::new(lane)).await {
            Ok(participant) => {
                tracing::info!(epoch, "this node hosts the witness");
                self.trouble = None;
                member.witnesses.seat(self.witness, Some(participant.clone()));
                self.running = Some((*epoch, participant));
            }
            Err(error) => self.fail(error.to_string().trim_start_matches("this node ").to_owned()),
        }
    }

    fn fail(&mut self, why: String) {
        tracing::error!(%why, "the witness cannot be hosted here");
        self.trouble = Some(why);
        self.held_back = Some(Instant::now() + PAUSE);
    }

    async fn stop(&mut self, member: &Member) {
        if let Some((_, participant)) = self.running.take() {
            member.witnesses.seat(self.witness, None);
            participant.stop().await;
            tracing::info!("this node does not host the witness any more");
        }
    }

    /// Tells the coordinator, and whoever asks this node.
    fn say(&self, member: &Member, seen: &View) {
        let epoch = self.running.as_ref().map(|(epoch, _)| *epoch);
        let trouble = self.trouble.clone().or_else(|| seen.trouble.clone());
        let missing = seen.stale.then_some(seen.memory);
        let said = WitnessReport { id: self.witness, hosts_since: epoch, trouble: trouble.clone(), missing };
        locked(&member.witnesses.health).insert(self.witness, Health { epoch, trouble, last: seen.last });
        // Of two, the coordinator hears of the one that counts.
        member.reports.say(|report| {
            if report.witness.as_ref().is_none_or(|known| known.id <= said.id) {
                report.witness = Some(said);
            }
        });
    }

    /// Waits until the participant has failed by itself; for ever if none runs.
    fn failed(&self) -> impl Future<Output = ()> + 'static {
        let mut standing = self.running.as_ref().map(|(_, participant)| participant.place());
        async move {
            match &mut standing {
                Some(standing) => drop(standing.wait_for(|now| now.trouble.is_some()).await),
                None => std::future::pending().await,
            }
        }
    }

    fn pause(&self) -> Duration {
        self.held_back.map_or(REMEMBER_EVERY, |until| until.saturating_duration_since(Instant::now()))
    }
}
