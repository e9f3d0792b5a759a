//! Ways to LUNs: what the volume server of this node is told of their owners, and what
//! this node says of its own paths.
//!
//! ```text
//!  state: who owns it ──▶ Routes ──▶ volume server ── Path ──▶ report ──▶ coordinator
//!                                      (left) ── Reply ─────────▶ report ──▶ next owner
//! ```

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use holdfast_core::*;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::sleep;
use uuid::Uuid;

use super::serving::{Line, SERVE_AGAIN, SERVE_WITHIN};
use super::{Agent, Member, peers};
use crate::volume::protocol::{Call, Links, Peer, Routes};

/// How long a node may take to say what it has done through others.
const TRAFFIC_WITHIN: Duration = Duration::from_secs(1);

/// What went through other nodes, in this life of the volume server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// How many requests.
    pub requests: u64,
    /// How many bytes were read and written.
    pub bytes: u64,
}

/// What is known of this node's paths.
#[derive(Default)]
pub struct Paths {
    known: Mutex<Known>,
    /// LUNs were found elsewhere than before.
    pub(super) moved: Notify,
}

#[derive(Default)]
struct Known {
    /// By looks at the LUNs.
    looked: BTreeMap<Uuid, LunPath>,
    /// By the word of the volume server, for those that are open there: it counts more.
    said: BTreeMap<Uuid, LunPath>,
    traffic: BTreeMap<Uuid, Traffic>,
}

impl Known {
    fn say(&mut self, volume: Uuid, path: Option<LunPath>) {
        match path {
            Some(path) => drop(self.said.insert(volume, path)),
            None => self.unsay(volume),
        }
    }

    /// The volume server has it open no more. What it knew lasts until the next look.
    fn unsay(&mut self, volume: Uuid) {
        if let Some(last) = self.said.remove(&volume).filter(|last| *last != LunPath::Direct) {
            self.looked.insert(volume, last);
        }
    }

    fn paths(&self) -> BTreeMap<Uuid, LunPath> {
        let mut paths = self.looked.clone();
        paths.extend(self.said.iter().map(|(volume, path)| (*volume, path.clone())));
        paths
    }
}

impl Paths {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one life of the volume server was told.
#[derive(Default)]
pub(super) struct Told {
    routes: BTreeMap<Uuid, Routes>,
    answers: FuturesUnordered<BoxFuture<'static, (Routes, Result<(), String>)>>,
}

impl Agent {
    /// LUNs were looked at.
    pub(super) fn looked_at(&self, member: &Member, looked: BTreeMap<Uuid, LunPath>) {
        member.serving.paths.known().looked = looked;
        self.say_paths(member);
    }

    /// The volume server says how it reaches a LUN.
    pub(super) fn path_is(&self, member: &Member, volume: Uuid, path: Option<LunPath>) {
        tracing::info!(%volume, ?path, "the path to a LUN");
        member.serving.paths.known().say(volume, path);
        self.say_paths(member);
    }

    /// The volume server says how much it has done through other nodes.
    pub(super) fn redirected(&self, member: &Member, volume: Uuid, traffic: Traffic) {
        member.serving.paths.known().traffic.insert(volume, traffic);
    }

    /// What this node's volume server has done through other nodes.
    pub(super) fn traffic_here(&self) -> BTreeMap<Uuid, Traffic> {
        self.0.member.get().map(|member| member.serving.paths.known().traffic.clone()).unwrap_or_default()
    }

    fn say_paths(&self, member: &Member) {
        let state = member.consensus.state().borrow().clone();
        let mut paths = member.serving.paths.known().paths();
        paths.retain(|id, _| state.volume_named_by(*id).is_some());
        member.reports.say(|report| report.paths = paths);
    }

    /// A new life of the volume server: who this node is, and all ways to LUNs.
    pub(super) async fn tell_ways(
        &self,
        member: &'static Member,
        line: &Line,
        state: &ClusterState,
    ) -> anyhow::Result<Told> {
        {
            let mut known = member.serving.paths.known();
            let open: Vec<_> = known.said.keys().copied().collect();
            open.into_iter().for_each(|volume| known.unsay(volume));
            known.traffic.clear();
        }
        let config = &self.0.config;
        let links = Links { state_dir: config.state_dir.clone(), node: member.me, port: config.volume_port };
        line.call(Call::Links(links), SERVE_WITHIN).await?;
        let mut told = Told::default();
        self.tell_routes(member, line, state, &mut told).await?;
        Ok(told)
    }

    /// Says what of the routes has changed, in the order of the state's changes. The
    /// answers come later: that of a volume whose storage hangs may never.
    async fn tell_routes(
        &self,
        member: &'static Member,
        line: &Line,
        state: &ClusterState,
        told: &mut Told,
    ) -> anyhow::Result<()> {
        let mut wanted = self.routes(member, state);
        for (id, known) in &told.routes {
            wanted.entry(*id).or_insert_with(|| Routes { owner: None, mine: None, leaves: None, ..known.clone() });
        }
        for (id, routes) in wanted {
            if told.routes.get(&id) == Some(&routes) {
                continue;
            }
            let answer = line.say_call(Call::Routes(routes.clone())).await?;
            told.routes.insert(id, routes.clone());
            told.answers.push(Box::pin(async move {
                let answer = answer.await.unwrap_or_else(|_| Err("the volume server ended".into()));
                if let Err(why) = &answer {
                    tracing::warn!(volume = routes.volume, why, "the volume server does not take a volume's routes");
                    sleep(SERVE_AGAIN).await;
                }
                (routes, answer)
            }));
        }
        Ok(())
    }

    /// Keeps the routes true that one life of the volume server was told.
    pub(super) async fn keep_routes(&self, member: &'static Member, line: &Line, mut told: Told) -> anyhow::Result<()> {
        let mut changes = self.changes();
        let mut keeper = self.0.keeper.watch();
        loop {
            keeper.borrow_and_update();
            let state = changes.borrow_and_update().clone();
            self.tell_routes(member, line, &state, &mut told).await?;
            tokio::select! {
                changed = changes.changed() => changed?,
                changed = keeper.changed() => changed?,
                () = member.serving.paths.moved.notified() => {}
                Some((routes, answer)) = told.answers.next() => match (answer, routes.leaves) {
                    (Ok(()), Some(epoch)) => {
                        member.reports.say(|report| {
                            report.left.insert(routes.volume_id, Epoch(epoch));
                        });
                    }
                    (Ok(()), None) => {}
                    // It is said again, unless something else was said since.
                    (Err(_), _) => {
                        let same = told.routes.get(&routes.volume_id) == Some(&routes);
                        if same {
                            told.routes.remove(&routes.volume_id);
                        }
                    }
                },
            }
        }
    }

    /// The ways to every LUN, as the state has them.
    fn routes(&self, member: &'static Member, state: &ClusterState) -> BTreeMap<Uuid, Routes> {
        let term = self.0.keeper.watch().borrow().term;
        let volumes = state.luns.iter().filter_map(|(name, lun)| Some((name, lun, state.volumes.get(name)?)));
        let routes = volumes.filter_map(|(name, lun, volume)| {
            let VolumeKind::Lun { device, .. } = &volume.kind else { return None };
            let device = member.serving.device(volume.id).unwrap_or_else(|| device.into());
            Some((volume.id, routes(state, member.me, term, (name, lun, volume), device)))
        });
        routes.collect()
    }

    /// How much each of these nodes has done through others; those that do not answer
    /// in time are missing.
    pub async fn traffic(&self, nodes: impl IntoIterator<Item = NodeId>) -> BTreeMap<NodeId, BTreeMap<Uuid, Traffic>> {
        let Some(member) = self.0.member.get().copied() else { return BTreeMap::new() };
        let asked = nodes.into_iter().map(async |node| {
            let said = match node == member.me {
                true => self.traffic_here(),
                false => member.peers.ask(node, super::rpc::TRAFFIC, &(), TRAFFIC_WITHIN).await.ok()?,
            };
            Some((node, said))
        });
        futures_util::future::join_all(asked).await.into_iter().flatten().collect()
    }
}

fn routes(
    state: &ClusterState,
    me: NodeId,
    term: NodeTerm,
    (name, lun, volume): (&str, &Lun, &Volume),
    device: PathBuf,
) -> Routes {
    let owner = state.owner(name);
    // What this node owns, it owns in one of its terms: a state that lags says nothing
    // of the one that the volume server lives in.
    let ours = owner.filter(|owner| owner.node == me && owner.term == term);
    let theirs = owner.filter(|owner| owner.node != me);
    Routes {
        volume: name.to_owned(),
        volume_id: volume.id,
        device,
        owner: theirs.and_then(|owner| {
            let node = state.nodes.get(&owner.node)?;
            Some(Peer { node: node.id, term: owner.term, epoch: owner.epoch.0, addresses: addresses(state, node) })
        }),
        term,
        mine: ours.filter(|owner| !owner.leaving).map(|owner| owner.epoch.0),
        leaves: ours.filter(|owner| owner.leaving).map(|owner| owner.epoch.0),
        planned: lun.access.redirected.contains(&me),
    }
}

/// Where a node's volume server answers, the best network first.
fn addresses(state: &ClusterState, node: &Node) -> Vec<SocketAddr> {
    let port = node.facts.volume_port;
    peers::on_cluster_networks(state, node).map(|ip| SocketAddr::new(ip, port)).filter(|_| port != 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAN: Uuid = Uuid::from_u128(9);

    fn away() -> LunPath {
        LunPath::Unavailable { why: "input/output error".into() }
    }

    #[test]
    fn what_the_volume_server_says_counts_more_than_a_look() {
        let mut known = Known::default();
        let path = |known: &Known| known.paths().remove(&SAN);
        known.looked.insert(SAN, LunPath::Direct);
        assert_eq!(path(&known), Some(LunPath::Direct));
        known.say(SAN, Some(away()));
        assert_eq!(path(&known), Some(away()));
        // A look that began before it was away must not make it direct when it is closed.
        known.say(SAN, None);
        assert_eq!(path(&known), Some(away()));
        known.looked.insert(SAN, LunPath::Direct);
        assert_eq!(path(&known), Some(LunPath::Direct));
        known.looked.insert(SAN, away());
        known.say(SAN, Some(LunPath::Direct));
        known.say(SAN, None);
        assert_eq!(path(&known), Some(away()), "it was direct; the look is all there is");
    }

    #[test]
    fn a_node_owns_a_volume_in_its_term_alone() {
        let (one, two) = (NodeId(1), NodeId(2));
        let mut state = ClusterState::default();
        let founded = Command::Found {
            cluster: Cluster { name: "lab".into(), ..Cluster::default() },
            node: NewNode {
                name: "n1".into(),
                port: 7470,
                heartbeat_port: 7470,
                heartbeat_key: [0; 32],
                facts: NodeFacts {
                    addresses: vec![NodeAddress { interface: "eth0".into(), ip: [10, 0, 0, 1].into(), prefix: 24 }],
                    volume_port: 7471,
                    ..NodeFacts::default()
                },
                site: None,
            },
        };
        let kind = VolumeKind::Lun { device: "/dev/sdb".into(), slab_bytes: 16 << 20, slabs: 9 };
        for command in [founded, Command::AddVolume { name: "san".into(), id: SAN, kind }] {
            let id = RequestId(Uuid::new_v4());
            state.apply(&Proposal { id, at_ms: 0, by: "anna".into(), command });
        }
        let node = state.nodes.get_mut(&one).unwrap();
        (node.membership, node.term) = (Membership::Up, NodeTerm(3));
        let owner = Owner { node: one, term: NodeTerm(3), epoch: Epoch(5), leaving: false };
        state.luns.get_mut("san").unwrap().access.owner = Some(owner);
        let told = |state: &ClusterState, me: NodeId, term: u64| {
            let volume = (("san"), &state.luns["san"], &state.volumes["san"]);
            routes(state, me, NodeTerm(term), volume, "/dev/sdc".into())
        };
        let ours = told(&state, one, 3);
        assert_eq!((ours.mine, ours.leaves, &ours.owner), (Some(5), None, &None));
        assert_eq!(told(&state, one, 4).mine, None, "the state lags");
        let theirs = told(&state, two, 1);
        let peer = Peer { node: one, term: NodeTerm(3), epoch: 5, addresses: vec![([10, 0, 0, 1], 7471).into()] };
        assert_eq!((theirs.owner, theirs.mine), (Some(peer), None));
        state.luns.get_mut("san").unwrap().access.owner = Some(Owner { leaving: true, ..owner });
        let ours = told(&state, one, 3);
        assert_eq!((ours.mine, ours.leaves), (None, Some(5)));
        state.nodes.get_mut(&one).unwrap().term = NodeTerm(4);
        assert_eq!(told(&state, two, 1).owner, None, "its right is void");
    }
}
