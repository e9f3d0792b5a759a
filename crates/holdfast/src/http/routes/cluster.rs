//! The cluster: founding, joining, settings, tokens, metrics.

use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::{Extension, Json};
use holdfast_api as api;
use holdfast_core::{Command, Profile};

use super::{Outlook, execute, state};
use crate::agent::Failure;
use crate::http::Served;
use crate::http::error::{ApiError, Body};
use crate::http::gate::Caller;
use crate::http::{metrics as text, views};

/// How long this node may take to learn what it has just become part of.
const LEARN_WITHIN: Duration = Duration::from_secs(20);

async fn view(served: &Served) -> Result<api::ClusterView, ApiError> {
    let outlook = Outlook::take(&served.agent).await;
    Ok(views::cluster(&*state(&served.agent)?, outlook.vantage()))
}

/// How the cluster stands.
#[utoipa::path(get, path = "/api/v1/cluster", operation_id = "showCluster", tag = "cluster", responses(
    (status = 200, body = api::ClusterView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn show(State(served): State<Served>) -> Result<Json<api::ClusterView>, ApiError> {
    view(&served).await.map(Json)
}

/// Founds a cluster with the asked host as its first node.
#[utoipa::path(post, path = "/api/v1/cluster", operation_id = "foundCluster", tag = "cluster", request_body = api::FoundCluster, responses(
    (status = 201, body = api::Founded),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn found(
    State(served): State<Served>,
    Extension(Caller(by)): Extension<Caller>,
    Body(request): Body<api::FoundCluster>,
) -> Result<(StatusCode, Json<api::Founded>), ApiError> {
    let join = served.agent.found(&by, &request.name, request.site).await?;
    let founded = api::Founded {
        cluster: view(&served).await?,
        join: api::JoinLine { address: join.address, token: join.token },
    };
    Ok((StatusCode::CREATED, Json(founded)))
}

/// Hands the coordination to another node: nothing stops, and no VM notices.
#[utoipa::path(post, path = "/api/v1/cluster/hand-over", operation_id = "handOver", tag = "cluster", request_body = api::HandOver, responses(
    (status = 200, body = api::HandedOver),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn hand_over(
    State(served): State<Served>,
    Body(request): Body<api::HandOver>,
) -> Result<Json<api::HandedOver>, ApiError> {
    let named = |name: &String| Ok::<_, ApiError>(super::node(&*state(&served.agent)?, name)?.id);
    let to = request.to.as_ref().map(named).transpose()?;
    let coordinator = served.agent.hand_over(to).await?;
    Ok(Json(api::HandedOver { coordinator: state(&served.agent)?.node_name(coordinator) }))
}

/// Makes the asked host join a cluster.
#[utoipa::path(post, path = "/api/v1/join-cluster", operation_id = "joinCluster", tag = "cluster", request_body = api::JoinCluster, responses(
    (status = 201, body = api::NodeView, description = "the node that the host is now"),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn join(
    State(served): State<Served>,
    Body(request): Body<api::JoinCluster>,
) -> Result<(StatusCode, Json<api::NodeView>), ApiError> {
    let id = served.agent.join(&request.address, &request.token, request.site).await?;
    let mut changes = served.agent.changes();
    let learned = changes.wait_for(|state| state.nodes.contains_key(&id));
    let state = match tokio::time::timeout(LEARN_WITHIN, learned).await {
        Ok(Ok(state)) => std::sync::Arc::clone(&state),
        _ => return Err(Failure::Unknown.into()),
    };
    let node = state.nodes.get(&id).ok_or(ApiError::from(Failure::Unknown))?;
    let view = views::node(&state, node, Outlook::take(&served.agent).await.vantage());
    Ok((StatusCode::CREATED, Json(view)))
}

/// Chooses the failover profile.
#[utoipa::path(put, path = "/api/v1/cluster/profile", operation_id = "setProfile", tag = "cluster", request_body = api::SetProfile, responses(
    (status = 200, body = api::ClusterView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn set_profile(
    State(served): State<Served>,
    Extension(by): Extension<Caller>,
    Body(request): Body<api::SetProfile>,
) -> Result<Json<api::ClusterView>, ApiError> {
    let profile = match request.profile {
        api::ProfileName::Default => Profile::Default,
        api::ProfileName::Fast => Profile::Fast,
        api::ProfileName::Wan => Profile::Wan,
    };
    execute(&served.agent, &by, Command::SetProfile { profile }).await?;
    view(&served).await.map(Json)
}

/// Chooses how long VMs stay on a node that reaches their disks only through another.
#[utoipa::path(put, path = "/api/v1/cluster/redirect-patience", operation_id = "setRedirectPatience", tag = "cluster", request_body = api::SetRedirectPatience, responses(
    (status = 200, body = api::ClusterView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn set_redirect_patience(
    State(served): State<Served>,
    Extension(by): Extension<Caller>,
    Body(request): Body<api::SetRedirectPatience>,
) -> Result<Json<api::ClusterView>, ApiError> {
    execute(&served.agent, &by, Command::SetRedirectPatience { seconds: request.seconds }).await?;
    view(&served).await.map(Json)
}

/// The API tokens, without their secrets.
#[utoipa::path(get, path = "/api/v1/tokens", operation_id = "listTokens", tag = "tokens", responses(
    (status = 200, body = Vec<api::TokenView>),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn list_tokens(State(served): State<Served>) -> Result<Json<Vec<api::TokenView>>, ApiError> {
    Ok(Json(views::tokens(&*state(&served.agent)?)))
}

/// Makes an API token.
#[utoipa::path(post, path = "/api/v1/tokens", operation_id = "addToken", tag = "tokens", request_body = api::AddToken, responses(
    (status = 201, body = api::MadeToken),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn add_token(
    State(served): State<Served>,
    Extension(Caller(by)): Extension<Caller>,
    Body(request): Body<api::AddToken>,
) -> Result<(StatusCode, Json<api::MadeToken>), ApiError> {
    let token = served.agent.add_api_token(&by, &request.name).await?;
    let made = api::MadeToken {
        name: request.name,
        token,
        ca_certificate: state(&served.agent)?.cluster.ca_certificate.clone(),
    };
    Ok((StatusCode::CREATED, Json(made)))
}

/// Revokes an API token.
#[utoipa::path(delete, path = "/api/v1/tokens/{name}", operation_id = "removeToken", tag = "tokens", params(("name" = String, Path)), responses(
    (status = 204, description = "it is worth nothing now"),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn remove_token(
    State(served): State<Served>,
    Extension(by): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    execute(&served.agent, &by, Command::RemoveApiToken { name }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Metrics in Prometheus' text format.
#[utoipa::path(get, path = "/metrics", operation_id = "metrics", tag = "metrics", responses(
    (status = 200, body = String, content_type = "application/openmetrics-text"),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn metrics(State(served): State<Served>) -> Result<impl IntoResponse, ApiError> {
    let outlook = Outlook::take(&served.agent).await;
    let text = text::text(&*state(&served.agent)?, outlook.vantage())
        .map_err(|error| ApiError::new("internal", error.to_string()))?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, kind)], text))
}
