//! The REST API, metrics and streams of the agent.
//!
//! Any agent answers any request: reads from the state that it has applied
//! itself, writes through [`Agent::execute`], which finds the coordinator. A
//! write is answered after this node has applied it, so whoever wrote through
//! an agent also reads it there.

mod changes;
mod create;
mod error;
mod gate;
mod metrics;
mod routes;
mod server;
mod views;

use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;

use crate::agent::Agent;
use crate::generation::Allegiance;

pub use error::ApiError;
pub use gate::{Peer, REMOVED, is_call_of_a_node};
pub use server::ServeError;

/// The largest body of a request to the API, in bytes.
const LARGEST_BODY: usize = 1 << 20;

/// What every route can reach.
#[derive(Clone)]
struct Served {
    agent: Agent,
    stop: CancellationToken,
}

/// The description at the head of the OpenAPI document.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Holdfast",
        description = "The API of a Holdfast cluster. Any node answers any request. On a node it is reached over the unix socket of the agent; from elsewhere over HTTPS with `Authorization: Bearer TOKEN`. Moments are milliseconds since the Unix epoch.",
    ),
    components(schemas(holdfast_api::Change, holdfast_api::ErrorBody)),
    security((), ("token" = [])),
    modifiers(&TokenScheme),
)]
struct Description;

struct TokenScheme;

impl utoipa::Modify for TokenScheme {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
        let scheme = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("token", scheme);
    }
}

fn api() -> OpenApiRouter<Served> {
    OpenApiRouter::with_openapi(Description::openapi()).merge(routes::all())
}

/// The OpenAPI document, as it is committed.
///
/// # Errors
/// Never in practice: the document is always JSON.
pub fn openapi() -> serde_json::Result<String> {
    let mut text = api().into_openapi().to_pretty_json()?;
    text.push('\n');
    Ok(text)
}

/// Everything that the agent answers, behind the gate. `node_routes` are full
/// paths: `/node/…`, which only nodes may call, and `/api/v1/join`, which checks
/// its own token. They bound their bodies themselves.
///
/// Every request must carry a [`Peer`] among its extensions.
fn router(agent: Agent, node_routes: Router, stop: CancellationToken) -> Router {
    let changes = agent.changes();
    let catching_up = agent.clone();
    let (routes, document) = api().split_for_parts();
    routes
        .route("/api/v1/openapi.json", get(move || std::future::ready(axum::Json(document.clone()))))
        .with_state(Served { agent, stop })
        .layer(DefaultBodyLimit::max(LARGEST_BODY))
        .layer(axum::middleware::from_fn_with_state(catching_up, catch_up))
        .merge(node_routes)
        .fallback(|| async { ApiError::new("not_found", "there is no such path: see /api/v1/openapi.json") })
        .method_not_allowed_fallback(|| async {
            ApiError::new("method_not_allowed", "this path does not know this method: see /api/v1/openapi.json")
        })
        .layer(axum::middleware::from_fn_with_state(changes, gate::gate))
}

/// A write names things that may have been made through another node a moment ago.
async fn catch_up(State(agent): State<Agent>, request: Request, next: Next) -> Response {
    if !request.method().is_safe() {
        agent.catch_up().await;
        // A token may have been revoked there as well.
        if let Err(refused) = gate::caller(&agent.state(), &request) {
            return refused.into_response();
        }
    }
    next.run(request).await
}

/// Answers on a unix socket: mode 0660, owned by `group` where the host has it.
///
/// After `stop` it accepts nothing more, ends streams and consoles, lets requests
/// finish, and returns, after five seconds at the latest. So does [`serve_tls`].
///
/// # Errors
/// [`ServeError`] when the socket cannot be made.
pub async fn serve(
    agent: Agent,
    unix_socket: PathBuf,
    group: Option<&str>,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    let listener = server::bind_unix(&unix_socket, group)?;
    let router = router(agent, Router::new(), stop.clone());
    server::serve_unix(listener, router, stop).await;
    Ok(())
}

/// Answers on the network until `stop`. `config` verifies client certificates
/// where one is shown; nodes have to be of the generation of `allegiance`.
pub async fn serve_tls(
    listener: TcpListener,
    config: Arc<ServerConfig>,
    agent: Agent,
    node_routes: Router,
    allegiance: Arc<Allegiance>,
    stop: CancellationToken,
) {
    let router = router(agent, node_routes, stop.clone())
        .layer(axum::middleware::from_fn_with_state(allegiance, crate::generation::gate));
    server::serve_tls(listener, config, router, stop).await;
}

#[cfg(test)]
mod tests {
    /// Writes the document anew when this variable is set.
    const RENEW: &str = "HOLDFAST_RENEW";

    #[test]
    fn the_committed_openapi_document_is_true() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/api/openapi.json");
        let now = super::openapi().unwrap();
        if std::env::var_os(RENEW).is_some() {
            std::fs::write(path, &now).unwrap();
        }
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            committed == now,
            "docs/api/openapi.json is out of date: run `cargo xtask fix` (or this test with {RENEW}=1) and look at the difference"
        );
    }
}
