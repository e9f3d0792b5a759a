//! Nodes.

use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::{Extension, Json};
use holdfast_api as api;
use holdfast_core::{Command, NodeId, Refusal};
use tokio::time::timeout;

use crate::agent::Agent;

use super::{Outlook, execute, state};
use crate::http::Served;
use crate::http::create::rehearse;
use crate::http::error::{ApiError, Body};
use crate::http::gate::Caller;
use crate::http::views;

/// Within so long a node that is removed is none any more: longer than any lease.
const REMOVED_WITHIN: Duration = Duration::from_secs(20);
/// For how long a join token is good when nothing else is said.
const TOKEN_VALID_MS: u64 = 60 * 60 * 1000;
/// The longest that a join token may be good.
const TOKEN_VALID_AT_MOST_MS: u64 = 30 * 24 * 60 * 60 * 1000;

/// The nodes.
#[utoipa::path(get, path = "/api/v1/nodes", operation_id = "listNodes", tag = "nodes", responses(
    (status = 200, body = Vec<api::NodeView>),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn list(State(served): State<Served>) -> Result<Json<Vec<api::NodeView>>, ApiError> {
    let outlook = Outlook::take(&served.agent).await;
    let state = state(&served.agent)?;
    let view = |node| views::node(&state, node, outlook.vantage());
    Ok(Json(state.nodes.values().map(view).collect()))
}

/// A node, by its name or its number.
#[utoipa::path(get, path = "/api/v1/nodes/{name}", operation_id = "showNode", tag = "nodes", params(("name" = String, Path)), responses(
    (status = 200, body = api::NodeView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn show(State(served): State<Served>, Path(name): Path<String>) -> Result<Json<api::NodeView>, ApiError> {
    let state = state(&served.agent)?;
    let node = super::node(&state, &name)?;
    let outlook = Outlook::take(&served.agent).await;
    Ok(Json(views::node(&state, node, outlook.vantage())))
}

/// Says at which site a node stands.
#[utoipa::path(patch, path = "/api/v1/nodes/{name}", operation_id = "setNode", tag = "nodes", params(("name" = String, Path)), request_body = api::SetNode, responses(
    (status = 200, body = api::NodeView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn set(
    State(served): State<Served>,
    Extension(by): Extension<Caller>,
    Path(name): Path<String>,
    Body(request): Body<api::SetNode>,
) -> Result<Json<api::NodeView>, ApiError> {
    let node = super::node(&*state(&served.agent)?, &name)?.id;
    let site = Some(request.site).filter(|site| site != "none");
    execute(&served.agent, &by, Command::SetSite { node, site }).await?;
    show(State(served), Path(name)).await
}

/// Empties a node for maintenance: its VMs move away while they run, one after the other
/// and as far as there is room, its volumes get other owners, and nothing comes to it
/// until it is resumed.
#[utoipa::path(post, path = "/api/v1/nodes/{name}/drain", operation_id = "drainNode", tag = "nodes", params(("name" = String, Path)), responses(
    (status = 200, body = api::NodeView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn drain(
    State(served): State<Served>,
    Extension(by): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<Json<api::NodeView>, ApiError> {
    set_drained(served, &by, name, true).await
}

/// Lets VMs come to a node again that was drained.
#[utoipa::path(post, path = "/api/v1/nodes/{name}/resume", operation_id = "resumeNode", tag = "nodes", params(("name" = String, Path)), responses(
    (status = 200, body = api::NodeView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn resume(
    State(served): State<Served>,
    Extension(by): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<Json<api::NodeView>, ApiError> {
    set_drained(served, &by, name, false).await
}

async fn set_drained(
    served: Served,
    by: &Caller,
    name: String,
    drained: bool,
) -> Result<Json<api::NodeView>, ApiError> {
    let node = super::node(&*state(&served.agent)?, &name)?.id;
    execute(&served.agent, by, Command::DrainNode { node, drained }).await?;
    show(State(served), Path(name)).await
}

/// Removes a node from the cluster. No VM may be on it, unless it is lost.
///
/// One that coordinates hands the coordination over first: whoever is removed is not
/// listened to any more, and could not do it then.
#[utoipa::path(delete, path = "/api/v1/nodes/{name}", operation_id = "removeNode", tag = "nodes", params(("name" = String, Path)), responses(
    (status = 204, description = "it is no node any more"),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn remove(
    State(served): State<Served>,
    Extension(by): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    let node = super::node(&*state(&served.agent)?, &name)?.id;
    let command = Command::RemoveNode { node };
    rehearse(&*state(&served.agent)?, command.clone())?;
    if served.agent.coordinator() == Some(node) {
        served.agent.hand_over(None).await?;
    }
    // Whoever removes itself never applies it, and may learn of it sooner than of the answer.
    let own = served.agent.me() == Some(node);
    let gone = async {
        execute(&served.agent, &by, command).await?;
        until_gone(&served.agent, node).await
    };
    tokio::select! {
        done = gone => done?,
        () = served.agent.removed(), if own => {}
    }
    Ok(StatusCode::NO_CONTENT)
}

/// A node that was up is one until its lease has ended.
async fn until_gone(agent: &Agent, node: NodeId) -> Result<(), ApiError> {
    let mut changes = agent.changes();
    let gone = changes.wait_for(|state| !state.nodes.contains_key(&node));
    match timeout(REMOVED_WITHIN, gone).await {
        Ok(_) => Ok(()),
        Err(_) => Err(ApiError::from(Refusal::Conflict(format!(
            "{} gets no lease any more, and is no node any more once that has ended: see `holdfast node list`",
            agent.state().node_name(node)
        )))),
    }
}

/// Makes a token with which one host may join, once.
#[utoipa::path(post, path = "/api/v1/join-tokens", operation_id = "makeJoinToken", tag = "nodes", request_body = api::MakeJoinToken, responses(
    (status = 201, body = api::JoinLine),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn make_join_token(
    State(served): State<Served>,
    Extension(Caller(by)): Extension<Caller>,
    Body(request): Body<api::MakeJoinToken>,
) -> Result<(StatusCode, Json<api::JoinLine>), ApiError> {
    let valid_ms = request.valid_ms.unwrap_or(TOKEN_VALID_MS);
    if !(1000..=TOKEN_VALID_AT_MOST_MS).contains(&valid_ms) {
        return Err(ApiError::invalid("a join token is good for at least a second and at most 30 days"));
    }
    let line = served.agent.join_line(&by, valid_ms / 1000).await?;
    let line = api::JoinLine { address: line.address, token: line.token };
    Ok((StatusCode::CREATED, Json(line)))
}
