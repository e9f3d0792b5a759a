//! Power fencing of nodes.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::{Extension, Json};
use holdfast_api as api;
use holdfast_core::{Command, PowerFencing, Secret};

use super::{execute, state};
use crate::http::Served;
use crate::http::error::{ApiError, Body};
use crate::http::gate::Caller;
use crate::http::views;

/// How a node's host can be switched off; its secrets are not told.
#[utoipa::path(get, path = "/api/v1/nodes/{name}/fencing", operation_id = "showFencing", tag = "nodes", params(("name" = String, Path)), responses(
    (status = 200, body = api::FencingView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn show(State(served): State<Served>, Path(name): Path<String>) -> Result<Json<api::FencingView>, ApiError> {
    let state = state(&served.agent)?;
    let node = super::node(&state, &name)?;
    let view = views::fencing(&state, node.id);
    view.map(Json).ok_or_else(|| {
        ApiError::new("not_found", format!("node {name:?} has no power fencing: its leases alone are waited for"))
    })
}

/// Says how a node's host can be switched off.
#[utoipa::path(put, path = "/api/v1/nodes/{name}/fencing", operation_id = "setFencing", tag = "nodes", params(("name" = String, Path)), request_body = api::SetFencing, responses(
    (status = 200, body = api::FencingView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn set(
    State(served): State<Served>,
    Extension(by): Extension<Caller>,
    Path(name): Path<String>,
    Body(request): Body<api::SetFencing>,
) -> Result<Json<api::FencingView>, ApiError> {
    let node = super::node(&*state(&served.agent)?, &name)?.id;
    let fencing = PowerFencing {
        agent: request.agent,
        options: request.options,
        secrets: request.secrets.into_iter().map(|(key, value)| (key, Secret(value))).collect(),
        test: None,
        asked: None,
    };
    execute(&served.agent, &by, Command::SetFencing { node, fencing: Some(fencing) }).await?;
    show(State(served), Path(name)).await
}

/// Forgets how a node's host can be switched off.
#[utoipa::path(delete, path = "/api/v1/nodes/{name}/fencing", operation_id = "clearFencing", tag = "nodes", params(("name" = String, Path)), responses(
    (status = 204, description = "its leases alone are waited for"),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn clear(
    State(served): State<Served>,
    Extension(by): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    let node = super::node(&*state(&served.agent)?, &name)?.id;
    execute(&served.agent, &by, Command::SetFencing { node, fencing: None }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Tries out a node's power fencing from another node; switches nothing. Takes up
/// to a minute.
#[utoipa::path(post, path = "/api/v1/nodes/{name}/fence-test", operation_id = "testFencing", tag = "nodes", params(("name" = String, Path)), responses(
    (status = 200, body = api::FenceTestView, description = "what it showed, passed or not"),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn test(
    State(served): State<Served>,
    Extension(Caller(by)): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<Json<api::FenceTestView>, ApiError> {
    let state = state(&served.agent)?;
    let node = super::node(&state, &name)?.id;
    let test = served.agent.test_fencing(&by, node).await?;
    Ok(Json(views::fence_test(&state, &test)))
}

/// Has a node's host switched off, whether it is silent or not. When that is
/// confirmed its VMs start elsewhere.
#[utoipa::path(post, path = "/api/v1/nodes/{name}/fence", operation_id = "fenceNode", tag = "nodes", params(("name" = String, Path)), responses(
    (status = 202, body = api::FencingView, description = "the coordinator does it; events tell what became of it"),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn fence(
    State(served): State<Served>,
    Extension(by): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<(StatusCode, Json<api::FencingView>), ApiError> {
    let node = super::node(&*state(&served.agent)?, &name)?.id;
    execute(&served.agent, &by, Command::AskFence { node }).await?;
    Ok((StatusCode::ACCEPTED, show(State(served), Path(name)).await?))
}
