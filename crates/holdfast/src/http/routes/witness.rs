//! The witness.

use axum::extract::State;
use axum::http::StatusCode;
use axum::{Extension, Json};
use holdfast_api as api;

use super::{Outlook, state};
use crate::http::Served;
use crate::http::error::{ApiError, Body};
use crate::http::gate::Caller;
use crate::http::views;
use crate::realtime::boot_time;

async fn view(served: &Served) -> Result<api::WitnessView, ApiError> {
    let state = state(&served.agent)?;
    let witness = state.witness.as_ref().ok_or_else(|| {
        ApiError::new("not_found", "there is no witness: set one with `holdfast quorum witness set --disk PATH`")
    })?;
    let health = served.agent.witness_health();
    let seen_ms = health.as_ref().map(|health| boot_time().ms_since(health.last));
    let trouble = health.and_then(|health| health.trouble);
    let outlook = Outlook::take(&served.agent).await;
    Ok(views::witness(&state, witness, outlook.vantage(), seen_ms, trouble))
}

/// Where the witness is, who hosts it, and how it does.
#[utoipa::path(get, path = "/api/v1/quorum/witness", operation_id = "showWitness", tag = "quorum", responses(
    (status = 200, body = api::WitnessView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn show(State(served): State<Served>) -> Result<Json<api::WitnessView>, ApiError> {
    view(&served).await.map(Json)
}

/// Makes a disk the witness, after every node that is up was seen to read and write it.
#[utoipa::path(put, path = "/api/v1/quorum/witness", operation_id = "setWitness", tag = "quorum", request_body = api::SetWitness, responses(
    (status = 200, body = api::WitnessView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn set(
    State(served): State<Served>,
    Extension(Caller(by)): Extension<Caller>,
    Body(request): Body<api::SetWitness>,
) -> Result<Json<api::WitnessView>, ApiError> {
    served.agent.set_witness(&by, &request.disk).await?;
    view(&served).await.map(Json)
}

/// Does without a witness. What is on its disk stays.
#[utoipa::path(delete, path = "/api/v1/quorum/witness", operation_id = "clearWitness", tag = "quorum", responses(
    (status = 204, description = "there is no witness any more"),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn clear(
    State(served): State<Served>,
    Extension(Caller(by)): Extension<Caller>,
) -> Result<StatusCode, ApiError> {
    served.agent.clear_witness(&by).await?;
    Ok(StatusCode::NO_CONTENT)
}
