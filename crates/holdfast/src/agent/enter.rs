//! How this host becomes part of a cluster, and takes up its part again.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use holdfast_consensus::{Consensus, Settings};
use holdfast_core::*;
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use uuid::Uuid;

use super::lane::ConsensusLane;
use super::peers::{Peers, addresses, heartbeat_addresses};
use super::{Agent, Failure, Member, copies, files, guests, members, now_ms, report, rpc, serving};
use crate::generation::{Allegiance, Kept};
use crate::heartbeat::SecretKey;
use crate::identity::{self, Identity};
use crate::keeper::protocol::{Configuration, PeerAddresses, Request};
use crate::leases::{Leases, LeasesConfig, PeerKey};

/// Clocks may differ by so much when a host joins: certificates and the times of
/// events mean nothing beyond that.
const CLOCK_TOLERANCE_MS: u64 = 5 * 60 * 1000;
/// As many as the lease thread can listen on.
const MOST_SOCKETS: usize = crate::leases::ADDRESSES;
/// Between two questions whether everything was applied.
const ASK_AGAIN: Duration = Duration::from_millis(50);
const JOIN_DEADLINE: Duration = Duration::from_secs(30);
const GREETING: Duration = Duration::from_secs(2);

/// What `holdfast cluster init` and `node token` print for the other hosts.
#[derive(Clone, Debug)]
pub struct JoinLine {
    /// Where a member answers: `ADDRESS:PORT`.
    pub address: String,
    /// The token: secret, one-time, expiring; pins the cluster's authority.
    pub token: String,
}

/// What a host sends to a member of the cluster that it joins.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JoinRequest {
    /// The secret part of the token.
    secret: String,
    /// Its clock, milliseconds since the Unix epoch.
    clock_ms: u64,
    node: NewNode,
    /// The request to certify its key, PEM.
    certificate_request: String,
}

/// What it gets.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JoinAnswer {
    node: NodeId,
    #[serde(default)]
    generation: Generation,
    cluster: Uuid,
    ca_certificate: String,
    certificate: String,
}

/// A refusal as it travels to the host that wanted to join.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JoinRefusal {
    /// For programs.
    pub code: String,
    /// For people.
    pub text: String,
}

impl Agent {
    /// Takes up this host's part in its cluster.
    pub(super) async fn enter(&self, identity: Identity) -> Result<&'static Member> {
        let config = &self.0.config;
        let me = identity.node;
        let directory = config.state_dir.join("consensus");
        let kept = Kept::load(&config.state_dir)?.settle(&config.state_dir, &directory, me).await?;
        let generation = kept.generation;
        let allegiance = Arc::new(Allegiance::new(generation, config.state_dir.clone(), self.0.stop.clone()));
        let peers = Arc::new(Peers::new(identity.client_config()?, self.changes(), allegiance.clone()));
        let settings = Settings::new(me, directory);
        let witnesses = Arc::new(super::witness::Seats::default());
        let lane = ConsensusLane { peers: Arc::clone(&peers), witnesses: Arc::clone(&witnesses), me, home: None };
        let engine = &self.0.engine;
        let consensus = engine.spawn(Consensus::start(settings, Arc::new(lane))).await??;
        // What it reads of earlier generations is not how things are.
        let mut state = consensus.state();
        if !kept.survivor && state.borrow().generation != generation {
            consensus.only_listen(true);
            let reading = consensus.clone();
            tokio::spawn(async move {
                let _ = state.wait_for(|state| state.generation == generation).await;
                reading.only_listen(false);
            });
        }
        let leases = Leases::start(LeasesConfig {
            cluster: generation.scope(identity.cluster),
            node: me,
            secret: identity.heartbeat.clone(),
            bind: self.heartbeat_sockets().await,
            peers: Vec::new(),
        })?;
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, config.port)).await.with_context(|| {
            format!("cannot listen on TCP port {}: choose another `port` in the configuration", config.port)
        })?;
        let tls = identity.server_config()?;
        let member: &'static Member = Box::leak(Box::new(Member {
            me,
            identity,
            consensus,
            allegiance,
            peers,
            leases,
            lending: Default::default(),
            reports: report::Reports::new(),
            fences: super::fencing::Fences::default(),
            roll: members::Roll::new(),
            witnesses,
            guests: guests::Guests::default(),
            serving: serving::Serving::default(),
            holds: files::Holds::default(),
            drafts: copies::Drafts::default(),
        }));
        if self.0.member.set(member).is_err() {
            anyhow::bail!("this host is in a cluster already");
        }
        let routes = rpc::routes(self.clone(), member);
        let (allegiance, stop) = (member.allegiance.clone(), self.0.stop.clone());
        tokio::spawn(crate::http::serve_tls(listener, tls, self.clone(), routes, allegiance, stop));
        tokio::spawn(self.clone().keep_state(member.consensus.state()));
        tokio::spawn(self.clone().keep_listening(member));
        engine.spawn(self.clone().keep_authority(member));
        tokio::spawn(self.clone().keep_coordinating(member));
        tokio::spawn(self.clone().keep_reporting(member));
        tokio::spawn(self.clone().keep_witnesses(member));
        tokio::spawn(self.clone().act_when_caught_up(member));
        tokio::spawn(self.clone().greet(member));
        tokio::spawn(self.clone().end_when_removed(member));
        Ok(member)
    }

    /// Calls every node once, so that one that was left out when a quorum was forced
    /// learns of it before it could take part in anything: what a call says of the
    /// generation is taken in on both sides.
    async fn greet(self, member: &'static Member) {
        let state = member.consensus.state().borrow().clone();
        let others: Vec<_> = state.nodes.keys().copied().filter(|node| *node != member.me).collect();
        let calls = others.into_iter().map(|node| member.peers.post(node, rpc::GREET, Bytes::new(), GREETING));
        futures_util::future::join_all(calls).await;
    }

    /// A keeper serves one node of one cluster: when this node was removed, the service
    /// starts anew, as that of a host without a cluster. Nothing runs here any more:
    /// a node is removed only when its VMs are elsewhere or its term is over.
    async fn end_when_removed(self, member: &'static Member) {
        member.allegiance.over().await;
        if let Err(error) = self.0.keeper.ask(Request::End).await {
            tracing::error!(%error, "the keeper does not end: restart the service, so that this host can join a cluster");
            self.0.stop.cancel();
        }
    }

    /// A fresh agent reads its log again from the last snapshot on. What it sees on
    /// the way was true once; acting on it would end VMs that were started since. So
    /// it acts only after it has applied all that was agreed on when it asked.
    async fn act_when_caught_up(self, member: &'static Member) {
        loop {
            if let Ok(index) = member.consensus.barrier().await
                && member.consensus.wait_applied(index, JOIN_DEADLINE).await
            {
                let revision = member.consensus.state().borrow().revision;
                self.applied(revision, Instant::now() + JOIN_DEADLINE).await;
                break;
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
        tokio::spawn(self.clone().keep_facts(member));
        tokio::spawn(self.clone().keep_watchdog(member));
        tokio::spawn(self.clone().keep_volumes(member));
        tokio::spawn(self.clone().keep_guests(member));
        tokio::spawn(self.clone().keep_serving(member));
        tokio::spawn(self.clone().keep_journals(member));
        tokio::spawn(self.clone().keep_disks(member));
        tokio::spawn(self.clone().keep_holds(member));
        tokio::spawn(self.clone().keep_mounts(member));
    }

    /// One socket for each address that there is, so that it shows which networks
    /// carry heartbeats, and one for addresses that come later.
    async fn heartbeat_sockets(&self) -> Vec<SocketAddr> {
        let port = self.0.config.port;
        let mut sockets = vec![SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))];
        let known = self.addresses().await.unwrap_or_default();
        sockets.extend(known.iter().map(|address| SocketAddr::new(address.ip, port)).take(MOST_SOCKETS - 1));
        sockets
    }

    async fn keep_state(self, mut applied: watch::Receiver<Arc<ClusterState>>) {
        loop {
            let state = applied.borrow_and_update().clone();
            self.0.state.send_replace(state);
            if applied.changed().await.is_err() {
                return;
            }
        }
    }

    /// Keeps the keeper and the lease thread told of whom to ask and whom to answer.
    async fn keep_listening(self, member: &'static Member) {
        let mut changes = self.changes();
        let mut told: Option<Configuration> = None;
        loop {
            let (configuration, keys) = {
                let state = changes.borrow_and_update();
                let peers = state.nodes.values().map(|node| PeerAddresses {
                    node: node.id,
                    public: node.heartbeat_key,
                    addresses: heartbeat_addresses(&state, node),
                });
                let configuration = Configuration {
                    cluster: member.identity.cluster,
                    generation: member.allegiance.generation(),
                    node: member.me,
                    secret: member.identity.heartbeat.clone(),
                    bind: Vec::new(),
                    peers: peers.collect(),
                    heartbeat_ms: state.settings.profile.timing().heartbeat_ms,
                };
                let keys: Vec<_> =
                    state.nodes.values().map(|node| PeerKey { node: node.id, public: node.heartbeat_key }).collect();
                (configuration, keys)
            };
            if told.as_ref() != Some(&configuration) {
                let heard = member.leases.set_peers(&keys).map_err(anyhow::Error::from);
                let asked =
                    self.0.keeper.ask(Request::Configure(configuration.clone())).await.map_err(anyhow::Error::from);
                match heard.and(asked) {
                    Ok(_) => told = Some(configuration),
                    Err(error) => tracing::error!(%error, "the heartbeats do not follow the cluster's nodes"),
                }
            }
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Founds a cluster with this host as its first node.
    ///
    /// # Errors
    /// This host is in a cluster already, or has no address, or its disk fails.
    pub async fn found(&self, by: &str, name: &str, site: Option<String>) -> Result<JoinLine, Failure> {
        let _one = self.0.entering.lock().await;
        self.not_in_a_cluster_yet()?;
        state::valid_name("cluster", name)?;
        let heartbeat = SecretKey::generate().map_err(broken)?;
        let node = self.new_node(&heartbeat, site).await?;
        let id = Uuid::new_v4();
        let (ca_certificate, ca_key) = identity::new_authority(name).map_err(broken)?;
        let (key, request) = identity::new_request().map_err(broken)?;
        let ips: Vec<_> = node.facts.addresses.iter().map(|address| address.ip).collect();
        let me = NodeId(1);
        let certificate = identity::certify(&ca_certificate, &ca_key, &request, me, &ips).map_err(broken)?;
        let identity = Identity::new(id, me, ca_certificate.clone(), certificate, key, heartbeat);
        let cluster = Cluster { name: name.to_owned(), id, founded_ms: now_ms(), ca_certificate, ca_key };

        self.set_interrupted_log_aside()?;
        // The identity is kept last: without it, whatever else is there belongs to
        // an attempt that did not come to its end.
        let address = node
            .facts
            .addresses
            .first()
            .map_or_else(String::new, |first| SocketAddr::new(first.ip, node.port).to_string());
        let member = self.enter(identity.clone()).await.map_err(broken)?;
        member.consensus.initialize(&address).await.map_err(broken)?;
        self.execute(by, Command::Found { cluster, node }).await?;
        identity.store(&self.0.config.state_dir).map_err(broken)?;
        self.join_line(by, 24 * 3600).await
    }

    fn not_in_a_cluster_yet(&self) -> Result<(), Failure> {
        match self.0.member.get() {
            None => Ok(()),
            Some(_) => Err(Refusal::AlreadyFounded { name: self.state().cluster.name.clone() }.into()),
        }
    }

    /// A log without an identity is what an interrupted attempt left; it is moved
    /// aside, never overwritten.
    fn set_interrupted_log_aside(&self) -> Result<(), Failure> {
        let log = self.0.config.state_dir.join("consensus");
        if !log.exists() {
            return Ok(());
        }
        let aside = self.0.config.state_dir.join(format!("consensus.interrupted-{}", now_ms()));
        tracing::warn!(from = %log.display(), to = %aside.display(), "an interrupted attempt left a log; it is moved aside");
        std::fs::rename(&log, &aside).map_err(broken)
    }

    async fn new_node(&self, heartbeat: &SecretKey, site: Option<String>) -> Result<NewNode, Failure> {
        let facts = self.facts().await.map_err(broken)?;
        if facts.addresses.is_empty() {
            let why = "this host has no network address that a cluster could use: give an interface an address, or look at `ignore_interfaces` in the configuration";
            return Err(Failure::other("no_address", why));
        }
        let name = self.0.config.name();
        state::valid_name("node", &name)?;
        let port = self.0.config.port;
        let site = site.or_else(|| self.0.config.site());
        Ok(NewNode { name, port, heartbeat_port: port, heartbeat_key: heartbeat.public(), facts, site })
    }

    /// Makes a join token that is good for one host, for `valid_s` seconds.
    ///
    /// # Errors
    /// As [`Agent::execute`].
    pub async fn join_line(&self, by: &str, valid_s: u64) -> Result<JoinLine, Failure> {
        let member = self.member()?;
        let secret = new_secret()?;
        let digest = identity::digest(secret.as_bytes());
        let expires_ms = now_ms() + valid_s * 1000;
        self.execute(by, Command::AddJoinToken { digest, expires_ms }).await?;
        let state = self.state();
        let address = state.nodes.get(&member.me).and_then(|node| addresses(&state, node).first().copied());
        let address =
            address.ok_or_else(|| Failure::other("no_address", "this node has no address on a cluster network"))?;
        let pin = identity::pin(&member.identity.ca_certificate).map_err(broken)?;
        Ok(JoinLine { address: address.to_string(), token: format!("{secret}.{pin}") })
    }

    /// A new API token's secret, after it was agreed on.
    ///
    /// # Errors
    /// As [`Agent::execute`].
    pub async fn add_api_token(&self, by: &str, name: &str) -> Result<String, Failure> {
        let secret = new_secret()?;
        let digest = identity::digest(secret.as_bytes());
        self.execute(by, Command::AddApiToken { name: name.to_owned(), digest }).await?;
        Ok(secret)
    }

    /// Makes this host join the cluster of which a member answers at `address`.
    ///
    /// # Errors
    /// This host is in a cluster already; the member cannot be reached, is not the
    /// one that the token was made for, or refuses.
    pub async fn join(&self, address: &str, token: &str, site: Option<String>) -> Result<NodeId, Failure> {
        let _one = self.0.entering.lock().await;
        self.not_in_a_cluster_yet()?;
        let malformed = || {
            Failure::from(Refusal::Token(
                "this is not a join token: copy the whole line that `holdfast node token` prints".into(),
            ))
        };
        let (secret, pin) = token.trim().split_once('.').ok_or_else(malformed)?;
        if pin.len() != 64 || secret.is_empty() {
            return Err(malformed());
        }
        let heartbeat = SecretKey::generate().map_err(broken)?;
        let node = self.new_node(&heartbeat, site).await?;
        let (key, certificate_request) = identity::new_request().map_err(broken)?;
        let request = JoinRequest { secret: secret.to_owned(), clock_ms: now_ms(), node, certificate_request };
        let asked = timeout(JOIN_DEADLINE, ask_to_join(address, self.0.config.port, pin, &request)).await;
        let answer = asked.map_err(|_| {
            Failure::other("unreachable", format!("{address} did not answer within {} s", JOIN_DEADLINE.as_secs()))
        })??;
        let identity =
            Identity::new(answer.cluster, answer.node, answer.ca_certificate, answer.certificate, key, heartbeat);
        self.set_interrupted_log_aside()?;
        Kept::store(&self.0.config.state_dir, answer.generation, None).map_err(broken)?;
        identity.store(&self.0.config.state_dir).map_err(broken)?;
        let member = self.enter(identity).await.map_err(broken)?;
        // Joined when the cluster's state has arrived here.
        let mut changes = self.changes();
        let arrived = changes.wait_for(|state| state.nodes.contains_key(&member.me));
        match timeout(JOIN_DEADLINE, arrived).await {
            Ok(_) => Ok(member.me),
            Err(_) => Err(Failure::other(
                "joining",
                format!(
                    "this host is node {} now, but has not received the cluster's state within {} s: check that the nodes reach \
                     it on TCP port {}; it goes on trying",
                    member.me,
                    JOIN_DEADLINE.as_secs(),
                    self.0.config.port
                ),
            )),
        }
    }

    /// Lets a host join: what a member does with its request.
    pub(super) async fn admit(&self, request: JoinRequest) -> Result<JoinAnswer, Failure> {
        let apart_ms = now_ms().abs_diff(request.clock_ms);
        if apart_ms > CLOCK_TOLERANCE_MS {
            let text = format!(
                "the clock of {:?} is {} s away from this cluster's: set it right (NTP) and join again",
                request.node.name,
                apart_ms / 1000
            );
            return Err(Failure::other("clock", text));
        }
        let ips: Vec<_> = request.node.facts.addresses.iter().map(|address| address.ip).collect();
        let by = format!("host {}", request.node.name);
        let digest = identity::digest(request.secret.as_bytes());
        let reply = self.execute(&by, Command::Join { digest, node: request.node }).await?;
        let Reply::Node(node) = reply else {
            return Err(Failure::other("internal", format!("unexpected reply {reply:?}")));
        };
        let (cluster, generation) = (self.state().cluster.clone(), self.member()?.allegiance.generation());
        let certificate =
            identity::certify(&cluster.ca_certificate, &cluster.ca_key, &request.certificate_request, node, &ips)
                .map_err(|error| Failure::other("invalid", format!("{error:#}")))?;
        Ok(JoinAnswer { node, generation, cluster: cluster.id, ca_certificate: cluster.ca_certificate, certificate })
    }
}

/// Secret enough that guessing is hopeless: 256 bits.
fn new_secret() -> Result<String, Failure> {
    let random: [u8; 32] = ring::rand::generate(&ring::rand::SystemRandom::new())
        .map_err(|_| Failure::other("internal", "the system gives no random numbers"))?
        .expose();
    Ok(identity::hex(&random))
}

pub(super) fn broken(error: impl Into<anyhow::Error>) -> Failure {
    Failure::other("host", format!("{:#}", error.into()))
}

async fn ask_to_join(address: &str, port: u16, pin: &str, request: &JoinRequest) -> Result<JoinAnswer, Failure> {
    let unreachable = |why: String| {
        Failure::other("unreachable", format!("cannot reach a member of the cluster at {address}: {why}"))
    };
    let with_port = if address.parse::<SocketAddr>().is_ok()
        || address.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok())
    {
        address.to_owned()
    } else {
        format!("{address}:{port}")
    };
    let stream = TcpStream::connect(&with_port).await.map_err(|error| unreachable(error.to_string()))?;
    let name = rustls::pki_types::ServerName::try_from(identity::ANY_NODE).map_err(broken)?;
    let tls = TlsConnector::from(identity::pinned_client_config(pin)).connect(name, stream).await.map_err(|error| {
        unreachable(format!("{error}: is the token of this cluster, and are the clocks of both hosts right?"))
    })?;
    let (mut sender, driver) = hyper::client::conn::http1::handshake(TokioIo::new(tls))
        .await
        .map_err(|error| unreachable(error.to_string()))?;
    tokio::spawn(driver);
    let body = serde_json::to_vec(request).map_err(broken)?;
    let question = hyper::Request::post(rpc::JOIN)
        .header(hyper::header::HOST, identity::ANY_NODE)
        .header(hyper::header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(broken)?;
    let response = sender.send_request(question).await.map_err(|error| unreachable(error.to_string()))?;
    let ok = response.status().is_success();
    let body = Limited::new(response.into_body(), 1 << 20)
        .collect()
        .await
        .map_err(|error| unreachable(error.to_string()))?
        .to_bytes();
    let unreadable = |error: serde_json::Error| unreachable(format!("it answered something unreadable: {error}"));
    if ok {
        return serde_json::from_slice(&body).map_err(unreadable);
    }
    let refusal: JoinRefusal = serde_json::from_slice(&body).map_err(unreadable)?;
    let code = match refusal.code.as_str() {
        "bad_token" => "bad_token",
        "already_exists" => "already_exists",
        "clock" => "clock",
        "no_coordinator" => "no_coordinator",
        _ => "refused",
    };
    Err(Failure::Other { code, text: refusal.text })
}
