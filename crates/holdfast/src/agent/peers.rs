//! Calls to the agents of other nodes: HTTP/2 over mutual TLS, over whichever of
//! the cluster's networks works.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt};
use holdfast_core::lease::BootTime;
use holdfast_core::{ClusterState, Node, NodeId, subnet};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::{http1, http2};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsConnector;

use crate::generation::{Allegiance, GENERATION};
use crate::identity::node_host;
use crate::realtime::boot_time;

/// The largest answer that is read, in bytes.
const LONGEST_ANSWER: usize = 64 << 20;
/// How long one address is tried before the next one is tried beside it.
const STAGGER: Duration = Duration::from_millis(60);
/// A connection that gave no answer for so long is not used again.
const STALE_MS: u64 = 400;

/// Calls to other nodes. Consensus has connections of its own, so that a report
/// or a long answer never stands before a heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lane {
    /// What the Raft engine says.
    Consensus,
    /// What it says to a witness: its disk may hang.
    Witness,
    /// Everything else.
    Work,
}

/// Why a call gave no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// No connection, or it broke.
    #[error("cannot be reached: {0}")]
    Unreachable(String),
    /// No answer in time.
    #[error("gave no answer in time")]
    Deadline,
    /// It answered with an error.
    #[error("{text}")]
    Refused {
        /// The HTTP status.
        status: StatusCode,
        /// What it said.
        text: String,
    },
}

/// The way to every other node.
pub struct Peers {
    tls: TlsConnector,
    plain: TlsConnector,
    state: watch::Receiver<Arc<ClusterState>>,
    allegiance: Arc<Allegiance>,
    connections: Mutex<BTreeMap<(NodeId, Lane), Slot>>,
}

type Slot = Arc<tokio::sync::Mutex<Option<Arc<Connection>>>>;

struct Connection {
    sender: http2::SendRequest<Full<Bytes>>,
    answered: AtomicU64,
}

impl Connection {
    fn usable(&self) -> bool {
        !self.sender.is_closed()
    }

    fn silent_ms(&self) -> u64 {
        boot_time().ms_since(BootTime(self.answered.load(Ordering::Relaxed)))
    }
}

impl Peers {
    /// With this node's TLS, the state that tells the addresses, and what tells the generation.
    pub fn new(config: ClientConfig, state: watch::Receiver<Arc<ClusterState>>, allegiance: Arc<Allegiance>) -> Self {
        let with = |protocol: &[u8]| {
            let mut config = config.clone();
            config.alpn_protocols = vec![protocol.to_vec()];
            TlsConnector::from(Arc::new(config))
        };
        Peers { tls: with(b"h2"), plain: with(b"http/1.1"), state, allegiance, connections: Mutex::default() }
    }

    /// Posts `body` to `path` at `node` and returns the answer's body.
    ///
    /// # Errors
    /// [`CallError`]; only [`CallError::Refused`] says for sure what happened.
    pub async fn post(&self, node: NodeId, path: &str, body: Bytes, deadline: Duration) -> Result<Bytes, CallError> {
        self.call(node, Lane::Work, None, path, body, deadline).await
    }

    /// Connects to `node`, if that is not done yet, so that a call which has to be fast
    /// finds a connection.
    ///
    /// # Errors
    /// [`CallError`]: it cannot be reached.
    pub async fn reach(&self, node: NodeId, deadline: Duration) -> Result<(), CallError> {
        let slot = Arc::clone(self.slots().entry((node, Lane::Work)).or_default());
        timeout(deadline, self.connection(node, None, &slot)).await.map_err(|_| CallError::Deadline)??;
        Ok(())
    }

    /// As [`Peers::post`], with JSON both ways.
    ///
    /// # Errors
    /// As [`Peers::post`].
    pub async fn ask<Q: serde::Serialize, A: serde::de::DeserializeOwned>(
        &self,
        node: NodeId,
        path: &str,
        question: &Q,
        deadline: Duration,
    ) -> Result<A, CallError> {
        let unreadable =
            |error: serde_json::Error| CallError::Unreachable(format!("it answered something unreadable: {error}"));
        let body = serde_json::to_vec(question).map_err(unreadable)?;
        let answer = self.post(node, path, body.into(), deadline).await?;
        serde_json::from_slice(&answer).map_err(unreadable)
    }

    /// The other nodes that the state knows.
    pub fn others(&self, me: NodeId) -> Vec<NodeId> {
        self.state.borrow().nodes.keys().copied().filter(|node| *node != me).collect()
    }

    pub(super) async fn call(
        &self,
        node: NodeId,
        lane: Lane,
        known: Option<&str>,
        path: &str,
        body: Bytes,
        deadline: Duration,
    ) -> Result<Bytes, CallError> {
        let until = Instant::now() + deadline;
        let slot = Arc::clone(self.slots().entry((node, lane)).or_default());
        let connection =
            timeout_at(until, self.connection(node, known, &slot)).await.map_err(|_| CallError::Deadline)??;
        let answer = timeout_at(until, exchange(&self.allegiance, &connection, path, body))
            .await
            .unwrap_or(Err(CallError::Deadline));
        match &answer {
            Ok(_) | Err(CallError::Refused { .. }) => connection.answered.store(boot_time().0, Ordering::Relaxed),
            Err(_) if connection.silent_ms() >= STALE_MS || !connection.usable() => {
                // Nobody waits for this: whoever holds the slot connects anew already.
                if let Ok(mut held) = slot.try_lock()
                    && held.as_ref().is_some_and(|current| Arc::ptr_eq(current, &connection))
                {
                    *held = None;
                }
            }
            Err(_) => {}
        }
        answer
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, BTreeMap<(NodeId, Lane), Slot>> {
        // Only ever inserted into: a panic leaves nothing half done.
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn connection(&self, node: NodeId, known: Option<&str>, slot: &Slot) -> Result<Arc<Connection>, CallError> {
        let mut held = slot.lock().await;
        if let Some(connection) = held.as_ref().filter(|connection| connection.usable()) {
            return Ok(Arc::clone(connection));
        }
        *held = None;
        let tls = self.first_of(node, known, &self.tls).await?;
        let (sender, driver) = http2::Builder::new(TokioExecutor::new())
            .handshake(TokioIo::new(tls))
            .await
            .map_err(|error| CallError::Unreachable(error.to_string()))?;
        tokio::spawn(driver);
        let connection = Arc::new(Connection { sender, answered: AtomicU64::new(boot_time().0) });
        *held = Some(Arc::clone(&connection));
        Ok(connection)
    }

    /// Opens a byte stream to `path` at `node`.
    ///
    /// # Errors
    /// As [`Peers::post`].
    pub async fn open(
        &self,
        node: NodeId,
        path: &str,
        protocol: &str,
        deadline: Duration,
    ) -> Result<TokioIo<hyper::upgrade::Upgraded>, CallError> {
        let opening = async {
            let unreachable = |error: hyper::Error| CallError::Unreachable(error.to_string());
            let tls = self.first_of(node, None, &self.plain).await?;
            let (mut sender, driver) = http1::handshake(TokioIo::new(tls)).await.map_err(unreachable)?;
            tokio::spawn(driver.with_upgrades());
            let request = Request::builder()
                .method(Method::GET)
                .uri(path)
                .header(hyper::header::HOST, node_host(node))
                .header(hyper::header::CONNECTION, "upgrade")
                .header(hyper::header::UPGRADE, protocol)
                .header(GENERATION, self.allegiance.generation().to_string())
                .body(Full::<Bytes>::default())
                .map_err(|error| CallError::Unreachable(error.to_string()))?;
            let response = sender.send_request(request).await.map_err(unreachable)?;
            if response.status() != StatusCode::SWITCHING_PROTOCOLS {
                let status = response.status();
                let text = read(response.into_body()).await?;
                return Err(CallError::Refused { status, text: String::from_utf8_lossy(&text).into_owned() });
            }
            Ok(TokioIo::new(hyper::upgrade::on(response).await.map_err(unreachable)?))
        };
        timeout(deadline, opening).await.unwrap_or(Err(CallError::Deadline))
    }

    /// Connects to the first address that answers.
    async fn first_of(
        &self,
        node: NodeId,
        known: Option<&str>,
        tls: &TlsConnector,
    ) -> Result<tokio_rustls::client::TlsStream<TcpStream>, CallError> {
        let mut addresses = {
            let state = self.state.borrow();
            state.nodes.get(&node).map(|node| addresses(&state, node)).unwrap_or_default()
        };
        for address in known.into_iter().flat_map(|list| list.split(',')).filter_map(|address| address.parse().ok()) {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        if addresses.is_empty() {
            return Err(CallError::Unreachable("no address of it is known".into()));
        }
        let name = ServerName::try_from(node_host(node)).map_err(|error| CallError::Unreachable(error.to_string()))?;
        let mut tries: FuturesUnordered<_> = addresses
            .into_iter()
            .enumerate()
            .map(|(turn, address)| {
                let (tls, name) = (tls.clone(), name.clone());
                async move {
                    tokio::time::sleep(STAGGER * turn as u32).await;
                    connect(address, &tls, name).await.map_err(|error| format!("{address}: {error}"))
                }
            })
            .collect();
        let mut why = Vec::new();
        while let Some(tried) = tries.next().await {
            match tried {
                Ok(stream) => return Ok(stream),
                Err(error) => why.push(error),
            }
        }
        Err(CallError::Unreachable(why.join("; ")))
    }
}

async fn connect(
    address: SocketAddr,
    tls: &TlsConnector,
    name: ServerName<'static>,
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    tls.connect(name, stream).await
}

async fn exchange(
    allegiance: &Allegiance,
    connection: &Connection,
    path: &str,
    body: Bytes,
) -> Result<Bytes, CallError> {
    let unreachable = |error: hyper::Error| CallError::Unreachable(error.to_string());
    let request = Request::builder()
        .method(Method::POST)
        .uri(format!("https://{}{path}", crate::identity::ANY_NODE))
        .header(hyper::header::CONTENT_TYPE, "application/json")
        .header(GENERATION, allegiance.generation().to_string())
        .body(Full::new(body))
        .map_err(|error| CallError::Unreachable(error.to_string()))?;
    let mut sender = connection.sender.clone();
    sender.ready().await.map_err(unreachable)?;
    let response = sender.send_request(request).await.map_err(unreachable)?;
    let status = response.status();
    let of_ours = allegiance.heard(response.headers());
    let body = read(response.into_body()).await?;
    if status.is_success() {
        Ok(body)
    } else {
        if of_ours && status == StatusCode::FORBIDDEN && says_removed(&body) {
            allegiance.removed();
        }
        Err(CallError::Refused { status, text: String::from_utf8_lossy(&body).into_owned() })
    }
}

/// Whether an answer tells this node that it was removed. Whoever says so has shown
/// a certificate of the cluster, and a node that was removed never is one again in the
/// same generation.
fn says_removed(body: &[u8]) -> bool {
    serde_json::from_slice::<holdfast_api::ErrorBody>(body).is_ok_and(|body| body.error.code == crate::http::REMOVED)
}

async fn read(body: hyper::body::Incoming) -> Result<Bytes, CallError> {
    let collected = Limited::new(body, LONGEST_ANSWER).collect().await;
    collected.map(|body| body.to_bytes()).map_err(|error| CallError::Unreachable(error.to_string()))
}

/// Where a node's agent answers, the best network first.
pub fn addresses(state: &ClusterState, node: &Node) -> Vec<SocketAddr> {
    on_cluster_networks(state, node).map(|ip| SocketAddr::new(ip, node.port)).collect()
}

/// Where a node's lease thread answers, the best network first.
pub fn heartbeat_addresses(state: &ClusterState, node: &Node) -> Vec<SocketAddr> {
    on_cluster_networks(state, node).map(|ip| SocketAddr::new(ip, node.heartbeat_port)).collect()
}

/// Its addresses on networks that carry the cluster's traffic, the best network first.
pub(super) fn on_cluster_networks<'a>(
    state: &'a ClusterState,
    node: &'a Node,
) -> impl Iterator<Item = std::net::IpAddr> {
    let mut usable: Vec<_> = node
        .facts
        .addresses
        .iter()
        .filter_map(|address| {
            let network = state.networks.get(&subnet(address))?;
            network.roles.cluster.then_some((network.metric, address.ip))
        })
        .collect();
    usable.sort_unstable();
    usable.into_iter().map(|(_, ip)| ip)
}
