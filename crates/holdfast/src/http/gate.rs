//! Who may call what.
//!
//! - The unix socket is open to root and to the group that its mode names; the
//!   kernel says which user is on the other end.
//! - Over TLS a caller shows an API token, or it is a node with a certificate
//!   of the cluster. A node may call what stands under `/node/` and nothing
//!   else; nobody else may call that.
//! - A host that joins has neither yet: `/api/v1/join` checks the join token
//!   that its body carries.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use holdfast_core::{ClusterState, NodeId};
use tokio::sync::watch;

use super::error::ApiError;
use crate::identity::digest;

/// The word with which a node is told that it was removed.
pub const REMOVED: &str = "removed";
/// How the paths begin over which participants of consensus call each other.
const FOR_CONSENSUS: &str = "/node/consensus/";

/// Who is at the other end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A process of this host, on the unix socket.
    Local {
        /// The name of its user; the number when it has no name.
        user: String,
    },
    /// Somebody on the network.
    Remote {
        /// The node that its verified certificate names.
        node: Option<NodeId>,
    },
}

/// Who makes a request, as events and causes name them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller(pub String);

/// Asks who makes a request and lets it pass or answers it.
pub async fn gate(
    State(state): State<watch::Receiver<Arc<ClusterState>>>,
    mut request: Request,
    next: Next,
) -> Response {
    let state = Arc::clone(&state.borrow());
    match caller(&state, &request) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(refused) => refused.into_response(),
    }
}

/// Who makes a request, if they may make it as things stand in `state`.
///
/// # Errors
/// Why they may not.
pub fn caller(state: &ClusterState, request: &Request) -> Result<Caller, ApiError> {
    let unknown = || ApiError::new("internal", "the connection has no peer");
    let peer = request.extensions().get::<Peer>().ok_or_else(unknown)?;
    let bearer = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "));
    admit(state, peer, request.uri().path(), bearer)
}

/// Whether a node makes a request that only nodes may make.
pub fn is_call_of_a_node(request: &Request) -> bool {
    let by_node = matches!(request.extensions().get(), Some(Peer::Remote { node: Some(_) }));
    by_node && for_nodes(request.uri().path())
}

fn for_nodes(path: &str) -> bool {
    path == "/node" || path.starts_with("/node/")
}

/// Who the caller is, if they may call `path`.
fn admit(state: &ClusterState, peer: &Peer, path: &str, bearer: Option<&str>) -> Result<Caller, ApiError> {
    let forbidden = |text: &str| Err(ApiError::new("forbidden", text));
    let for_nodes = for_nodes(path);
    match peer {
        Peer::Remote { node: Some(node) } if for_nodes => {
            // A number that this node never heard of may be newer than what it
            // knows, and the news may come from that very node. One that it
            // knows to be gone was removed, and removal ends its rights.
            if *node <= state.last_node && !state.nodes.contains_key(node) {
                // Its vote is still counted: without it nobody could end it.
                if state.voters.contains(node) {
                    return match path.starts_with(FOR_CONSENSUS) {
                        true => Ok(Caller(format!("node {node}"))),
                        false => forbidden("a node that is being removed only votes until its vote is ended"),
                    };
                }
                return Err(ApiError::new(REMOVED, format!("node {node} was removed from the cluster")));
            }
            Ok(Caller(state.node_name(*node)))
        }
        _ if for_nodes => forbidden("only nodes of the cluster may call this"),
        Peer::Local { user } => Ok(Caller(user.clone())),
        Peer::Remote { .. } if path == "/api/v1/join" => Ok(Caller("a joining host".into())),
        Peer::Remote { .. } => {
            let Some(bearer) = bearer else {
                return Err(ApiError::new(
                    "no_token",
                    "a token is needed: make one with `holdfast token create NAME` on a node and send it as `Authorization: Bearer TOKEN`",
                ));
            };
            match token_name(state, bearer) {
                Some(name) => Ok(Caller(format!("token {name}"))),
                None => Err(ApiError::new(
                    "bad_token",
                    "this token is not known here, or was revoked: make one with `holdfast token create NAME` on a node",
                )),
            }
        }
    }
}

/// The name of an API token. Looks at every token and at every byte, so that
/// the time it takes says nothing about which of them matched how far.
fn token_name<'a>(state: &'a ClusterState, secret: &str) -> Option<&'a str> {
    let shown = digest(secret.as_bytes());
    let mut found = None;
    for (name, token) in &state.api_tokens {
        if same(token.digest.as_bytes(), shown.as_bytes()) {
            found = Some(name.as_str());
        }
    }
    found
}

fn same(one: &[u8], other: &[u8]) -> bool {
    let differing = one.iter().zip(other).fold(0, |sum, (a, b)| std::hint::black_box(sum | (a ^ b)));
    one.len() == other.len() && differing == 0
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::body::Body;
    use axum::http::StatusCode;
    use axum::routing::get;
    use holdfast_core::{ApiToken, Generation, Node};
    use http_body_util::BodyExt;
    use tokio_util::sync::CancellationToken;
    use tower::ServiceExt;

    use super::*;
    use crate::generation::{self, Allegiance, GENERATION};

    fn state() -> ClusterState {
        let mut state = ClusterState::default();
        state.last_node = NodeId(3);
        state.voters = [NodeId(1), NodeId(3)].into();
        let node = Node {
            id: NodeId(1),
            name: "n1".into(),
            port: 1,
            heartbeat_port: 1,
            heartbeat_key: [0; 32],
            membership: Default::default(),
            term: Default::default(),
            incarnation: Default::default(),
            facts: Default::default(),
            joined_ms: 0,
            site: None,
            drained_ms: None,
            leaves: false,
        };
        state.nodes.insert(NodeId(1), node);
        let token = ApiToken { digest: digest(b"secret"), created_ms: 0 };
        state.api_tokens.insert("ci".into(), token);
        state
    }

    async fn call(peer: Peer, path: &str, token: Option<&str>) -> (StatusCode, String) {
        let (_keep, changes) = watch::channel(Arc::new(state()));
        let who = get(|axum::Extension(Caller(by)): axum::Extension<Caller>| async { by });
        let app = Router::new()
            .route("/api/v1/join", who.clone())
            .route("/api/v1/vms", who.clone())
            .route("/metrics", who.clone())
            .route("/node/report", who.clone())
            .route("/node/consensus/vote", who)
            .layer(axum::middleware::from_fn_with_state(changes, gate));
        let mut request = Request::get(path).extension(peer);
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let answer = app.oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
        let status = answer.status();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn each_caller_reaches_what_is_theirs_and_nothing_else() {
        let local = || Peer::Local { user: "root".into() };
        let node = |id| Peer::Remote { node: Some(NodeId(id)) };
        let stranger = || Peer::Remote { node: None };
        let cases = [
            (local(), "/api/v1/vms", None, 200, "root"),
            (local(), "/metrics", None, 200, "root"),
            (local(), "/node/report", None, 403, "only nodes"),
            (stranger(), "/api/v1/vms", None, 401, "no_token"),
            (stranger(), "/metrics", None, 401, "no_token"),
            (stranger(), "/api/v1/vms", Some("guess"), 403, "bad_token"),
            (stranger(), "/api/v1/vms", Some(""), 403, "bad_token"),
            (stranger(), "/api/v1/vms", Some("secret"), 200, "token ci"),
            (stranger(), "/node/report", Some("secret"), 403, "only nodes"),
            (stranger(), "/api/v1/join", None, 200, "a joining host"),
            (node(1), "/node/report", None, 200, "n1"),
            (node(2), "/node/report", None, 403, r#""code":"removed""#),
            // Its vote is still counted.
            (node(3), "/node/report", None, 403, "until its vote is ended"),
            (node(3), "/node/consensus/vote", None, 200, "node 3"),
            // Newer than this node's knowledge: it may be the one that brings it.
            (node(4), "/node/report", None, 200, "node 4"),
            (node(1), "/api/v1/vms", None, 401, "no_token"),
        ];
        for (peer, path, token, status, text) in cases {
            let told = format!("{peer:?} {path} {token:?}");
            let (got, body) = call(peer, path, token).await;
            assert_eq!(got.as_u16(), status, "{told}: {body}");
            assert!(body.contains(text), "{told}: {body}");
        }
    }

    #[tokio::test]
    async fn a_node_of_another_generation_is_not_told_that_it_was_removed() {
        let ours = Generation { number: 2, mark: uuid::Uuid::from_u128(2) };
        let dir = tempfile::tempdir().unwrap();
        let allegiance = Arc::new(Allegiance::new(ours, dir.path().to_owned(), CancellationToken::new()));
        let (_keep, changes) = watch::channel(Arc::new(state()));
        let app = Router::new()
            .route("/node/report", get(|| async { "heard" }))
            .layer(axum::middleware::from_fn_with_state(changes, gate))
            .layer(axum::middleware::from_fn_with_state(allegiance, generation::gate));
        let earlier = Generation { number: 1, mark: uuid::Uuid::from_u128(1) };
        let torn = Generation { number: 2, mark: uuid::Uuid::from_u128(3) };
        let cases = [
            (2, earlier, StatusCode::CONFLICT),
            (2, torn, StatusCode::CONFLICT),
            (2, ours, StatusCode::FORBIDDEN),
            (1, earlier, StatusCode::CONFLICT),
            (1, ours, StatusCode::OK),
        ];
        for (node, theirs, status) in cases {
            let peer = Peer::Remote { node: Some(NodeId(node)) };
            let request = Request::get("/node/report").extension(peer).header(GENERATION, theirs.to_string());
            let answer = app.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
            assert_eq!(answer.status(), status, "node {node} of {theirs}");
            assert_eq!(answer.headers()[GENERATION], ours.to_string().as_str());
        }
        // Nobody but a node moves this one to another generation.
        let later = Generation { number: 3, mark: uuid::Uuid::from_u128(4) };
        let stranger = Request::get("/node/report").extension(Peer::Remote { node: None });
        let stranger = stranger.header(GENERATION, later.to_string()).body(Body::empty()).unwrap();
        assert_eq!(app.oneshot(stranger).await.unwrap().status(), StatusCode::FORBIDDEN);
        assert!(!dir.path().join(generation::FILE).exists());
    }

    #[test]
    fn digests_are_compared_whole() {
        assert!(same(b"abc", b"abc"));
        assert!(!same(b"abc", b"abd"));
        assert!(!same(b"abc", b"ab"));
        assert!(!same(b"", b"a"));
    }
}
