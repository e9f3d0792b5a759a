//! The quorum.

use axum::extract::State;
use axum::{Extension, Json};
use holdfast_api as api;

use super::{Outlook, state};
use crate::http::error::ApiError;
use crate::http::gate::Caller;
use crate::http::{Served, views};

/// Who votes and why, and how many more losses the cluster survives.
#[utoipa::path(get, path = "/api/v1/quorum", operation_id = "showQuorum", tag = "quorum", responses(
    (status = 200, body = api::QuorumView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn show(State(served): State<Served>) -> Result<Json<api::QuorumView>, ApiError> {
    let outlook = Outlook::take(&served.agent).await;
    Ok(Json(views::quorum(&*state(&served.agent)?, outlook.vantage())))
}

/// Makes the node that is asked the only voter when there is no quorum, by its own
/// log: the disaster door. Without `others_are_off` it only tells what would happen.
#[utoipa::path(post, path = "/api/v1/quorum/force", operation_id = "forceQuorum", tag = "quorum",
    request_body = api::ForceQuorum, responses(
    (status = 200, body = api::ForcedQuorum),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn force(
    State(served): State<Served>,
    Extension(caller): Extension<Caller>,
    Json(request): Json<api::ForceQuorum>,
) -> Result<Json<api::ForcedQuorum>, ApiError> {
    let api::ForceQuorum { cluster, with, others_are_off } = request;
    let known = state(&served.agent)?;
    let node = served.agent.me().map_or_else(String::new, |me| known.node_name(me));
    let forced = served.agent.force_quorum(&caller.0, &cluster, &with, others_are_off).await?;
    Ok(Json(api::ForcedQuorum {
        node,
        done: others_are_off,
        generation: forced.generation,
        log_term: forced.log_end.0,
        log_index: forced.log_end.1,
        unheard_ms: forced.unheard.as_millis() as u64,
        left_out: forced.left_out,
        wait_ms: forced.wait.as_millis() as u64,
    }))
}
