//! The quorum.

use axum::Json;
use axum::extract::State;
use holdfast_api as api;

use super::{Outlook, state};
use crate::http::Served;
use crate::http::error::ApiError;
use crate::http::views;

/// Who votes and why, and how many more losses the cluster survives.
#[utoipa::path(get, path = "/api/v1/quorum", operation_id = "showQuorum", tag = "quorum", responses(
    (status = 200, body = api::QuorumView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn show(State(served): State<Served>) -> Result<Json<api::QuorumView>, ApiError> {
    let outlook = Outlook::take(&served.agent).await;
    Ok(Json(views::quorum(&*state(&served.agent)?, outlook.vantage())))
}
