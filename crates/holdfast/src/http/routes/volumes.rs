//! Cluster shared volumes.

use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::{Extension, Json};
use holdfast_api as api;
use holdfast_core::{ClusterState, Command, LunPath, Volume};

use super::{Outlook, execute, node, state};
use crate::http::Served;
use crate::http::error::{ApiError, Body};
use crate::http::gate::Caller;
use crate::http::views::{self, Room, Seen};

/// A volume whose storage is cut off may never answer: then its room is unknown.
const ROOM_WITHIN: Duration = Duration::from_secs(1);

async fn view(
    served: &Served,
    state: &ClusterState,
    name: &str,
    volume: &Volume,
    observed: Seen<'_>,
) -> api::VolumeView {
    let path = served.agent.volume_path(name, "");
    let mounted_at = path.display().to_string().trim_end_matches('/').to_owned();
    let found = tokio::task::spawn_blocking(move || nix::sys::statvfs::statvfs(&path));
    let room = match tokio::time::timeout(ROOM_WITHIN, found).await {
        Ok(Ok(Ok(found))) => {
            let unit = found.fragment_size();
            Some(Room { size: found.blocks() * unit, free: found.blocks_available() * unit })
        }
        _ => None,
    };
    views::volume(state, name, volume, mounted_at, room, observed)
}

pub(super) async fn one(served: &Served, name: &str) -> Result<api::VolumeView, ApiError> {
    let state = state(&served.agent)?;
    let volume = state.volumes.get(name).ok_or_else(|| ApiError::not_found("volume", name))?;
    let asked = state.nodes.keys().copied().filter(|node| {
        let reached = state.reached(name, *node);
        reached.is_some_and(|reached| !matches!(reached.path, LunPath::Unavailable { .. }))
    });
    let (outlook, said) = tokio::join!(Outlook::take(&served.agent), served.agent.traffic(asked));
    let mut shown = view(served, &state, name, volume, outlook.observed.as_ref()).await;
    views::count(&mut shown, &state, volume.id, &said);
    Ok(shown)
}

/// The volumes.
#[utoipa::path(get, path = "/api/v1/volumes", operation_id = "listVolumes", tag = "volumes", responses(
    (status = 200, body = Vec<api::VolumeView>),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn list(State(served): State<Served>) -> Result<Json<Vec<api::VolumeView>>, ApiError> {
    let state = state(&served.agent)?;
    let outlook = Outlook::take(&served.agent).await;
    let all = state.volumes.iter().map(|(name, volume)| view(&served, &state, name, volume, outlook.observed.as_ref()));
    Ok(Json(futures_util::future::join_all(all).await))
}

/// Adds a volume, after every node that is up was seen to reach it.
#[utoipa::path(post, path = "/api/v1/volumes", operation_id = "addVolume", tag = "volumes", request_body = api::AddVolume, responses(
    (status = 201, body = api::VolumeView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn add(
    State(served): State<Served>,
    Extension(Caller(by)): Extension<Caller>,
    Body(request): Body<api::AddVolume>,
) -> Result<(StatusCode, Json<api::VolumeView>), ApiError> {
    let absolute = |path: &str, what: &str| match path.starts_with('/') {
        true => Ok(()),
        false => Err(ApiError::invalid(format!("{path:?} is no absolute path: name {what}"))),
    };
    match (&request.directory, &request.lun) {
        (Some(directory), None) if request.erase.is_none() => {
            absolute(directory, "the directory as every node sees it")?;
            served.agent.add_volume(&by, &request.name, directory).await?;
        }
        (None, Some(lun)) => {
            if !holdfast_volume::Lun::is_address(std::path::Path::new(lun)) {
                absolute(lun, "the device as this node sees it, or an export: nbd://HOST/EXPORT")?;
            }
            served.agent.add_lun(&by, &request.name, lun, request.erase.as_deref()).await?;
        }
        _ => {
            return Err(ApiError::invalid(
                "a volume is either a `directory` or a `lun`; only what is on a LUN can be told to `erase`",
            ));
        }
    }
    Ok((StatusCode::CREATED, Json(one(&served, &request.name).await?)))
}

/// A volume.
#[utoipa::path(get, path = "/api/v1/volumes/{name}", operation_id = "showVolume", tag = "volumes", params(("name" = String, Path)), responses(
    (status = 200, body = api::VolumeView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn show(State(served): State<Served>, Path(name): Path<String>) -> Result<Json<api::VolumeView>, ApiError> {
    one(&served, &name).await.map(Json)
}

/// Renames a volume. VMs with files on it have to be off.
#[utoipa::path(patch, path = "/api/v1/volumes/{name}", operation_id = "renameVolume", tag = "volumes", params(("name" = String, Path)), request_body = api::RenameVolume, responses(
    (status = 200, body = api::VolumeView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn rename(
    State(served): State<Served>,
    Extension(by): Extension<Caller>,
    Path(name): Path<String>,
    Body(request): Body<api::RenameVolume>,
) -> Result<Json<api::VolumeView>, ApiError> {
    execute(&served.agent, &by, Command::RenameVolume { name, new: request.name.clone() }).await?;
    one(&served, &request.name).await.map(Json)
}

/// Chooses who owns a volume on a LUN: it does I/O for nodes without a path of their own.
#[utoipa::path(put, path = "/api/v1/volumes/{name}/owner", operation_id = "setVolumeOwner", tag = "volumes", params(("name" = String, Path)), request_body = api::SetOwner, responses(
    (status = 200, body = api::VolumeView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn set_owner(
    State(served): State<Served>,
    Extension(by): Extension<Caller>,
    Path(name): Path<String>,
    Body(request): Body<api::SetOwner>,
) -> Result<Json<api::VolumeView>, ApiError> {
    let node = node(&*state(&served.agent)?, &request.node)?.id;
    execute(&served.agent, &by, Command::SetOwner { volume: name.clone(), node }).await?;
    one(&served, &name).await.map(Json)
}

/// Sends a node's I/O on a LUN through the volume's owner although it need not, as for
/// work on its paths; or takes that back.
#[utoipa::path(put, path = "/api/v1/volumes/{name}/redirect", operation_id = "setVolumeRedirect", tag = "volumes", params(("name" = String, Path)), request_body = api::SetRedirect, responses(
    (status = 200, body = api::VolumeView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn set_redirect(
    State(served): State<Served>,
    Extension(by): Extension<Caller>,
    Path(name): Path<String>,
    Body(request): Body<api::SetRedirect>,
) -> Result<Json<api::VolumeView>, ApiError> {
    let node = node(&*state(&served.agent)?, &request.node)?.id;
    let command = Command::SetRedirect { volume: name.clone(), node, redirect: request.redirect };
    execute(&served.agent, &by, command).await?;
    one(&served, &name).await.map(Json)
}

/// Removes a volume that no VM uses. What is on it stays.
#[utoipa::path(delete, path = "/api/v1/volumes/{name}", operation_id = "removeVolume", tag = "volumes", params(("name" = String, Path)), responses(
    (status = 204, description = "it is no volume any more; its files stay"),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn remove(
    State(served): State<Served>,
    Extension(by): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    execute(&served.agent, &by, Command::RemoveVolume { name }).await?;
    Ok(StatusCode::NO_CONTENT)
}
