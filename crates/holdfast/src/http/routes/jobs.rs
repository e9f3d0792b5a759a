//! Jobs, events and streams.

use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::response::IntoResponse;
use axum::response::sse::{KeepAlive, Sse};
use axum::{Extension, Json};
use holdfast_api as api;
use holdfast_core::{Command, JobId};
use serde::Deserialize;
use utoipa::IntoParams;

use super::{Params, execute, state};
use crate::http::error::ApiError;
use crate::http::gate::Caller;
use crate::http::{Served, changes, views};

/// The longest that a request waits for a job, in seconds.
const WAIT_AT_MOST: u64 = 60;
/// A stream on which nothing happens shows in this rhythm that it is alive.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Whether and how long to wait.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Wait {
    /// Answer when the job ends, or after so many seconds, at most 60.
    #[serde(default)]
    wait: u64,
}

/// From where on.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Since {
    /// Only events with a greater index.
    #[serde(default)]
    since: u64,
}

/// The jobs that go on and the last ones that ended, oldest first.
#[utoipa::path(get, path = "/api/v1/jobs", operation_id = "listJobs", tag = "jobs", responses(
    (status = 200, body = Vec<api::JobView>),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn list(State(served): State<Served>) -> Result<Json<Vec<api::JobView>>, ApiError> {
    let state = state(&served.agent)?;
    Ok(Json(state.jobs.values().map(|job| views::job(&state, job)).collect()))
}

/// A job; with `wait`, as it is when it ends.
#[utoipa::path(get, path = "/api/v1/jobs/{id}", operation_id = "showJob", tag = "jobs", params(("id" = u64, Path), Wait), responses(
    (status = 200, body = api::JobView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn show(
    State(served): State<Served>,
    Path(id): Path<String>,
    Params(Wait { wait }): Params<Wait>,
) -> Result<Json<api::JobView>, ApiError> {
    state(&served.agent)?;
    let job = parse(&id)?;
    let mut changes = served.agent.changes();
    let ended = changes.wait_for(|state| state.jobs.get(&job).is_none_or(|job| job.end.is_some()));
    let deadline = Duration::from_secs(wait.min(WAIT_AT_MOST));
    tokio::select! {
        () = served.stop.cancelled() => {}
        _ = tokio::time::timeout(deadline, ended) => {}
    }
    one(&served, job)
}

fn parse(id: &str) -> Result<JobId, ApiError> {
    id.parse().map(JobId).map_err(|_| ApiError::not_found("job", id))
}

fn one(served: &Served, id: JobId) -> Result<Json<api::JobView>, ApiError> {
    let state = state(&served.agent)?;
    let job = state.jobs.get(&id).ok_or_else(|| ApiError::not_found("job", &id.to_string()))?;
    Ok(Json(views::job(&state, job)))
}

/// Asks a migration or a shut-down to stop.
#[utoipa::path(post, path = "/api/v1/jobs/{id}/cancel", operation_id = "cancelJob", tag = "jobs", params(("id" = u64, Path)), responses(
    (status = 200, body = api::JobView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn cancel(
    State(served): State<Served>,
    Extension(by): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<api::JobView>, ApiError> {
    let job = parse(&id)?;
    execute(&served.agent, &by, Command::CancelJob { job }).await?;
    one(&served, job)
}

/// The last thousand events, oldest first.
#[utoipa::path(get, path = "/api/v1/events", operation_id = "listEvents", tag = "events", params(Since), responses(
    (status = 200, body = Vec<api::Event>),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn events(
    State(served): State<Served>,
    Params(Since { since }): Params<Since>,
) -> Result<Json<Vec<api::Event>>, ApiError> {
    let state = state(&served.agent)?;
    let fresh = state.events.iter().filter(|event| event.index > since);
    Ok(Json(fresh.map(views::event).collect()))
}

/// Events as they happen, as server-sent events named `event` whose data is an
/// `Event` and whose id is its index. `Last-Event-ID` resumes after that one, at
/// any node.
#[utoipa::path(get, path = "/api/v1/events/stream", operation_id = "streamEvents", tag = "events", params(Since, ("Last-Event-ID" = Option<u64>, Header)), responses(
    (status = 200, body = String, content_type = "text/event-stream"),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn stream_events(
    State(served): State<Served>,
    Params(Since { since }): Params<Since>,
    headers: HeaderMap,
) -> Result<impl IntoResponse, ApiError> {
    state(&served.agent)?;
    let after = headers.get("last-event-id").and_then(|value| value.to_str().ok()?.parse().ok()).unwrap_or(since);
    let stream = changes::events(served.agent.changes(), after, served.stop);
    Ok(Sse::new(stream).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)))
}

/// What changes, as server-sent events. The first, named `revision`, tells from
/// where on; then one named `change` per thing, whose data is a `Change`. After a
/// break, ask for everything anew.
#[utoipa::path(get, path = "/api/v1/stream", operation_id = "streamChanges", tag = "events", responses(
    (status = 200, body = String, content_type = "text/event-stream"),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn stream_changes(State(served): State<Served>) -> impl IntoResponse {
    let stream = changes::changed(served.agent.changes(), served.stop);
    Sse::new(stream).keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
}
