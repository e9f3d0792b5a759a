//! Connections: accepting, bounding and ending them.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use nix::unistd::{Gid, Group, Uid, User};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::gate::Peer;
use crate::identity::node_of_certificate;

/// How many connections each listener keeps at once; more wait to be accepted.
const CONNECTIONS: usize = 512;
/// How long a client may take for its TLS handshake and for a request's headers.
const HEADERS_WITHIN: Duration = Duration::from_secs(10);
/// How long requests may go on when the agent stops.
const STOP_WITHIN: Duration = Duration::from_secs(5);
/// How long accepting pauses when the process is out of descriptors.
const BREATH: Duration = Duration::from_millis(100);
/// Requests that one HTTP/2 connection may have open.
const STREAMS: u32 = 128;
/// A peer that answers no ping for so long is gone.
const PING: Duration = Duration::from_secs(20);

/// A socket that cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The unix socket cannot be made.
    #[error("the socket {path} cannot be made: {source}")]
    Socket {
        /// Where.
        path: PathBuf,
        /// What stopped it.
        source: std::io::Error,
    },
    /// Another agent answers there.
    #[error("another agent already answers on {0}: stop it first")]
    InUse(PathBuf),
}

/// Opens the unix socket: mode 0660, owned by `group` where the host has it.
///
/// A socket that nobody answers on is left over and replaced.
///
/// # Errors
/// [`ServeError`].
pub fn bind_unix(path: &Path, group: Option<&str>) -> Result<UnixListener, ServeError> {
    let failed = |source| ServeError::Socket { path: path.into(), source };
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(ServeError::InUse(path.into()));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    // Nobody may connect before owner and mode are right: the socket is made
    // under another name, in a directory that only root can write to.
    let draft = path.with_extension("new");
    let _ = std::fs::remove_file(&draft);
    let listener = UnixListener::bind(&draft).map_err(failed)?;
    std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    let group: Option<Gid> = group.and_then(|name| Group::from_name(name).ok().flatten()).map(|group| group.gid);
    if let Some(gid) = group {
        nix::unistd::chown(&draft, None, Some(gid)).map_err(|errno| failed(errno.into()))?;
    }
    std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o660)).map_err(failed)?;
    std::fs::rename(&draft, path).map_err(failed)?;
    Ok(listener)
}

/// Serves `router` on a unix socket until `stop`.
pub async fn serve_unix(listener: UnixListener, router: Router, stop: CancellationToken) {
    let connections = Connections::new();
    loop {
        let Some(slot) = connections.slot(&stop).await else {
            break;
        };
        let stream = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    pause(&error).await;
                    continue;
                }
            },
        };
        let Some(peer) = local_peer(&stream) else {
            continue;
        };
        let (connections, router, stop) = (connections.clone(), router.clone(), stop.clone());
        tokio::spawn(async move {
            connections.serve(stream, router, peer, stop).await;
            drop(slot);
        });
    }
    connections.finish().await;
}

/// Serves `router` over TLS until `stop`. HTTP/1.1 and HTTP/2 are offered when
/// `config` names no protocols itself.
pub async fn serve_tls(listener: TcpListener, config: Arc<ServerConfig>, router: Router, stop: CancellationToken) {
    let config = if config.alpn_protocols.is_empty() {
        let mut config = (*config).clone();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Arc::new(config)
    } else {
        config
    };
    let acceptor = TlsAcceptor::from(config);
    let connections = Connections::new();
    loop {
        let Some(slot) = connections.slot(&stop).await else {
            break;
        };
        let stream = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    pause(&error).await;
                    continue;
                }
            },
        };
        // Consensus answers are small and waited for: Nagle would hold them back.
        let _ = stream.set_nodelay(true);
        let (acceptor, router, stop) = (acceptor.clone(), router.clone(), stop.clone());
        let connections = connections.clone();
        tokio::spawn(async move {
            let handshake = tokio::time::timeout(HEADERS_WITHIN, acceptor.accept(stream));
            if let Ok(Ok(stream)) = handshake.await {
                let node = stream.get_ref().1.peer_certificates().and_then(|chain| node_of_certificate(chain.first()?));
                connections.serve(stream, router, Peer::Remote { node }, stop).await;
            }
            drop(slot);
        });
    }
    connections.finish().await;
}

/// Out of descriptors or memory: accepting again at once would only spin.
async fn pause(error: &std::io::Error) {
    tracing::warn!("a connection cannot be accepted: {error}");
    tokio::time::sleep(BREATH).await;
}

/// Who is at the other end of a unix socket, as the kernel says.
fn local_peer(stream: &UnixStream) -> Option<Peer> {
    let uid = stream.peer_cred().ok()?.uid();
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten().map_or_else(|| format!("uid {uid}"), |user| user.name);
    Some(Peer::Local { user })
}

/// The connections of one listener.
#[derive(Clone)]
struct Connections {
    slots: Arc<Semaphore>,
    ending: CancellationToken,
}

impl Connections {
    fn new() -> Self {
        Connections { slots: Arc::new(Semaphore::new(CONNECTIONS)), ending: CancellationToken::new() }
    }

    /// Room for one more connection; `None` when the agent stops.
    async fn slot(&self, stop: &CancellationToken) -> Option<tokio::sync::OwnedSemaphorePermit> {
        tokio::select! {
            () = stop.cancelled() => None,
            slot = Arc::clone(&self.slots).acquire_owned() => slot.ok(),
        }
    }

    /// Serves one connection to its end.
    async fn serve(
        &self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        router: Router,
        peer: Peer,
        stop: CancellationToken,
    ) {
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADERS_WITHIN);
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(STREAMS)
            .keep_alive_interval(PING)
            .keep_alive_timeout(PING);
        let service = hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(peer.clone());
            router.clone().oneshot(request)
        });
        let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
        tokio::pin!(connection);
        let ended = tokio::select! {
            ended = &mut connection => ended,
            () = stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                tokio::select! {
                    ended = &mut connection => ended,
                    () = self.ending.cancelled() => return,
                }
            }
        };
        if let Err(error) = ended {
            tracing::debug!("a connection ended: {error}");
        }
    }

    /// Waits until every connection has ended, but not for ever.
    async fn finish(&self) {
        let everything = u32::try_from(CONNECTIONS).unwrap_or(u32::MAX);
        let all = self.slots.acquire_many(everything);
        if tokio::time::timeout(STOP_WITHIN, all).await.is_err() {
            tracing::warn!("requests were cut off: they took too long to end");
        }
        self.ending.cancel();
    }
}
