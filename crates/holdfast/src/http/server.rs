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

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// Longer than anything here takes, shorter than anybody wants to wait.
    const DEADLINE: Duration = Duration::from_secs(20);

    async fn ask(stream: &mut UnixStream) -> String {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut answer = [0; 4096];
        let read = tokio::time::timeout(DEADLINE, stream.read(&mut answer)).await.unwrap().unwrap();
        String::from_utf8_lossy(&answer[..read]).into_owned()
    }

    #[tokio::test]
    async fn a_left_over_socket_is_replaced_and_one_in_use_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        drop(bind_unix(&path, None).unwrap());
        assert!(path.exists());
        let _listener = bind_unix(&path, Some("no-such-group")).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        assert!(matches!(bind_unix(&path, None), Err(ServeError::InUse(_))));
        let nowhere = dir.path().join("gone/agent.sock");
        assert!(bind_unix(&nowhere, None).unwrap_err().to_string().contains("gone/agent.sock"));
    }

    #[tokio::test]
    async fn callers_are_named_by_the_kernel_and_idle_ones_do_not_hold_up_a_stop() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let listener = bind_unix(&path, None).unwrap();
        let router = Router::new()
            .route("/", get(|axum::Extension(peer): axum::Extension<Peer>| async move { format!("{peer:?}") }));
        let stop = CancellationToken::new();
        let serving = tokio::spawn(serve_unix(listener, router, stop.clone()));
        let mut caller = UnixStream::connect(&path).await.unwrap();
        let me = User::from_uid(Uid::current()).unwrap().map_or("uid".into(), |user| user.name);
        let answer = ask(&mut caller).await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains(&me), "{answer}");
        // The connection is kept open, as clients do.
        stop.cancel();
        let stopped = tokio::time::Instant::now();
        tokio::time::timeout(DEADLINE, serving).await.unwrap().unwrap();
        assert!(stopped.elapsed() < STOP_WITHIN);
        let mut rest = Vec::new();
        tokio::time::timeout(DEADLINE, caller.read_to_end(&mut rest)).await.unwrap().unwrap();
        assert!(rest.is_empty(), "{rest:?}");
    }
}
