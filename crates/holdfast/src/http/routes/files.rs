//! Files on volumes.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::{Extension, Json};
use futures_util::StreamExt as _;
use holdfast_api as api;
use holdfast_core::Naming;
use utoipa::IntoParams;

use super::{Params, state};
use crate::agent::copies;
use crate::http::Served;
use crate::http::error::ApiError;
use crate::http::gate::Caller;
use crate::http::views;

/// For how long the rest of a file that is refused is taken in.
const DRAIN_WITHIN: Duration = Duration::from_secs(10);

/// The files of a volume.
#[utoipa::path(get, path = "/api/v1/volumes/{name}/files", operation_id = "listVolumeFiles", tag = "volumes", params(("name" = String, Path)), responses(
    (status = 200, body = Vec<api::FileView>),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn list(
    State(served): State<Served>,
    Path(name): Path<String>,
) -> Result<Json<Vec<api::FileView>>, ApiError> {
    // Somebody may have put one through another node a moment ago.
    served.agent.catch_up().await;
    let state = state(&served.agent)?;
    match (state.luns.get(&name), state.volumes.contains_key(&name)) {
        (Some(lun), _) => Ok(Json(views::files(&state, lun))),
        (None, true) => {
            let found = served.agent.files_in_directory(&name).await?;
            let view = |file: copies::Found| api::FileView {
                vm: copies::user(&state, &name, &file.name).map(|vm| vm.name.clone()),
                name: file.name,
                size_bytes: file.bytes,
                allocated_bytes: file.allocated,
            };
            Ok(Json(found.into_iter().map(view).collect()))
        }
        (None, false) => Err(ApiError::not_found("volume", &name)),
    }
}

/// Reads a file of a volume. Nobody else writes to it meanwhile.
#[utoipa::path(get, path = "/api/v1/volumes/{name}/files/{file}", operation_id = "getVolumeFile", tag = "volumes", params(
    ("name" = String, Path),
    ("file" = String, Path, description = "the file's name, slashes in it as %2F"),
), responses(
    (status = 200, description = "what is in it", content_type = "application/octet-stream"),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn get(
    State(served): State<Served>,
    Extension(Caller(by)): Extension<Caller>,
    Path((name, file)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let (bytes, body) = served.agent.get_file(&by, &name, &file).await?;
    let headers =
        [(header::CONTENT_TYPE, "application/octet-stream".to_owned()), (header::CONTENT_LENGTH, bytes.to_string())];
    Ok((headers, Body::from_stream(body)).into_response())
}

/// How a file is put.
#[derive(serde::Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct Put {
    /// A file of this name goes when the new one is whole.
    #[serde(default)]
    replace: bool,
    /// Only say whether a file of so many bytes could be put now.
    dry_run_bytes: Option<u64>,
}

/// Puts a file onto a volume: the body, whose length has to be given. It is there when all
/// of it has come, and not before; what is all zeroes takes no room.
#[utoipa::path(put, path = "/api/v1/volumes/{name}/files/{file}", operation_id = "putVolumeFile", tag = "volumes", params(
    ("name" = String, Path),
    ("file" = String, Path, description = "the file's name, slashes in it as %2F"),
    Put,
), request_body(content = (), content_type = "application/octet-stream"), responses(
    (status = 201, description = "all of it is there"),
    (status = 204, description = "it could be put, of a dry run"),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn put(
    State(served): State<Served>,
    Extension(Caller(by)): Extension<Caller>,
    Path((name, file)): Path<(String, String)>,
    Params(Put { replace, dry_run_bytes }): Params<Put>,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let naming = Naming { name: file, replaces: replace };
    if let Some(bytes) = dry_run_bytes {
        served.agent.may_put(&name, &naming, bytes).await?;
        return Ok(StatusCode::NO_CONTENT);
    }
    let length = request.headers().get(header::CONTENT_LENGTH);
    let bytes = length.and_then(|length| length.to_str().ok()?.parse().ok());
    let bytes = bytes.ok_or_else(|| ApiError::new("bad_request", "a file is put with its Content-Length"))?;
    let mut body = request.into_body().into_data_stream();
    let put = served.agent.put_file(&by, &name, naming, bytes, &mut body).await;
    if put.is_err() {
        // Whoever still sends hears nothing before that is taken in.
        let _ = tokio::time::timeout(DRAIN_WITHIN, body.for_each(|_| std::future::ready(()))).await;
    }
    put?;
    Ok(StatusCode::CREATED)
}

/// Removes a file that no VM has and nobody has open.
#[utoipa::path(delete, path = "/api/v1/volumes/{name}/files/{file}", operation_id = "removeVolumeFile", tag = "volumes", params(
    ("name" = String, Path),
    ("file" = String, Path, description = "the file's name, slashes in it as %2F"),
), responses(
    (status = 204, description = "it is gone"),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn remove(
    State(served): State<Served>,
    Extension(Caller(by)): Extension<Caller>,
    Path((name, file)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    served.agent.remove_file(&by, &name, &file).await?;
    Ok(StatusCode::NO_CONTENT)
}
