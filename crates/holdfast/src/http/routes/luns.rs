//! What is on volumes on LUNs.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::{Extension, Json};
use holdfast_api as api;

use super::volumes;
use crate::http::Served;
use crate::http::error::{ApiError, Body};
use crate::http::gate::Caller;
use crate::volume::view;

/// Takes over a LUN that is a volume already, with its files.
#[utoipa::path(post, path = "/api/v1/volume-imports", operation_id = "importVolume", tag = "volumes", request_body = api::ImportVolume, responses(
    (status = 201, body = api::VolumeView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn import(
    State(served): State<Served>,
    Extension(Caller(by)): Extension<Caller>,
    Body(request): Body<api::ImportVolume>,
) -> Result<(StatusCode, Json<api::VolumeView>), ApiError> {
    served.agent.import_lun(&by, &request.name, &request.lun, request.take.as_deref()).await?;
    Ok((StatusCode::CREATED, Json(volumes::one(&served, &request.name).await?)))
}

/// Looks at all of a LUN's description on the asked node, and compares it with the
/// cluster's state. Changes nothing.
#[utoipa::path(get, path = "/api/v1/volumes/{name}/check", operation_id = "checkVolume", tag = "volumes", params(("name" = String, Path)), responses(
    (status = 200, body = api::VolumeCheck),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn check(State(served): State<Served>, Path(name): Path<String>) -> Result<Json<api::VolumeCheck>, ApiError> {
    let looked = served.agent.check_volume(&name).await?;
    let mut check = view::check(&looked.device, &looked.found);
    check.agreed_revision = Some(looked.agreed);
    check.findings = looked.findings;
    Ok(Json(check))
}

/// Has a LUN's description written anew from the cluster's state.
#[utoipa::path(post, path = "/api/v1/volumes/{name}/repair", operation_id = "repairVolume", tag = "volumes", params(("name" = String, Path)), responses(
    (status = 200, body = api::VolumeCheck),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn repair(
    State(served): State<Served>,
    Extension(Caller(by)): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<Json<api::VolumeCheck>, ApiError> {
    served.agent.repair_volume(&by, &name).await?;
    check(State(served), Path(name)).await
}
