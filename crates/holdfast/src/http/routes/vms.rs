//! Virtual machines. Whatever takes long is answered with its job.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::{Extension, Json};
use holdfast_api as api;
use holdfast_core::{ClusterState, Command, Desired, Node, Refusal, Reply, Vm, VmId};

use super::{execute, node, state, vm};
use crate::http::error::{ApiError, Body};
use crate::http::gate::Caller;
use crate::http::{Served, create, views};

type Answer = Result<(StatusCode, Json<api::JobView>), ApiError>;

/// Has a command agreed on that begins a job, and answers with the job.
async fn begin(served: &Served, by: &Caller, command: Command) -> Answer {
    let Reply::Job(id) = execute(&served.agent, by, command).await? else {
        return Err(ApiError::new("internal", "the command began no job"));
    };
    let state = state(&served.agent)?;
    // Many short jobs may have ended since: then it is forgotten already.
    let job = state.jobs.get(&id).ok_or_else(|| ApiError::not_found("job", &id.to_string()))?;
    Ok((StatusCode::ACCEPTED, Json(views::job(&state, job))))
}

/// The VMs.
#[utoipa::path(get, path = "/api/v1/vms", operation_id = "listVms", tag = "vms", responses(
    (status = 200, body = Vec<api::VmView>),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn list(State(served): State<Served>) -> Result<Json<Vec<api::VmView>>, ApiError> {
    let state = state(&served.agent)?;
    let mut views: Vec<_> = state.vms.values().map(|vm| views::vm(&state, vm)).collect();
    views.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(Json(views))
}

/// Creates a VM. Images, kernels and disks are handled by the asked node.
#[utoipa::path(post, path = "/api/v1/vms", operation_id = "createVm", tag = "vms", request_body = api::CreateVm, responses(
    (status = 202, body = api::JobView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn create(
    State(served): State<Served>,
    Extension(by): Extension<Caller>,
    Body(request): Body<api::CreateVm>,
) -> Answer {
    let command = create::command(&served.agent, request).await?;
    begin(&served, &by, command).await
}

/// A VM, by its name or its id.
#[utoipa::path(get, path = "/api/v1/vms/{name}", operation_id = "showVm", tag = "vms", params(("name" = String, Path)), responses(
    (status = 200, body = api::VmView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn show(State(served): State<Served>, Path(name): Path<String>) -> Result<Json<api::VmView>, ApiError> {
    let state = state(&served.agent)?;
    Ok(Json(views::vm(&state, vm(&state, &name)?)))
}

/// Deletes a VM that is off, and its disks.
#[utoipa::path(delete, path = "/api/v1/vms/{name}", operation_id = "deleteVm", tag = "vms", params(("name" = String, Path)), responses(
    (status = 202, body = api::JobView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn delete(
    State(served): State<Served>,
    Extension(by): Extension<Caller>,
    Path(name): Path<String>,
) -> Answer {
    let state = state(&served.agent)?;
    let vm = vm(&state, &name)?.id;
    // This node deletes the disks, or else one that can.
    let me = served.agent.me().and_then(|me| state.nodes.get(&me));
    let able = |node: &&Node| node.is_up();
    let node = me
        .filter(able)
        .or_else(|| state.nodes.values().find(able))
        .ok_or_else(|| ApiError::from(Refusal::Conflict("no node is up that could delete disks".into())))?
        .id;
    begin(&served, &by, Command::DeleteVm { vm, node }).await
}

/// What is wanted of a VM from now on.
async fn want(
    served: &Served,
    by: &Caller,
    name: &str,
    desired: Desired,
    check: impl FnOnce(&ClusterState, &Vm) -> Result<(), Refusal>,
) -> Answer {
    let state = state(&served.agent)?;
    let vm = vm(&state, name)?;
    check(&state, vm)?;
    let vm: VmId = vm.id;
    begin(served, by, Command::SetDesired { vm, desired }).await
}

/// Starts a VM.
#[utoipa::path(post, path = "/api/v1/vms/{name}/start", operation_id = "startVm", tag = "vms", params(("name" = String, Path)), responses(
    (status = 202, body = api::JobView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn start(State(served): State<Served>, Extension(by): Extension<Caller>, Path(name): Path<String>) -> Answer {
    want(&served, &by, &name, Desired::Running, |_, vm| match vm.desired {
        Desired::Paused => Err(Refusal::Conflict(format!("VM {:?} is paused: resume it", vm.name))),
        _ => Ok(()),
    })
    .await
}

/// Shuts a VM down, or switches it off at once.
#[utoipa::path(post, path = "/api/v1/vms/{name}/stop", operation_id = "stopVm", tag = "vms", params(("name" = String, Path)), request_body = Option<api::StopVm>, responses(
    (status = 202, body = api::JobView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn stop(
    State(served): State<Served>,
    Extension(by): Extension<Caller>,
    Path(name): Path<String>,
    Body(request): Body<api::StopVm>,
) -> Answer {
    let desired = match request.force {
        true => Desired::ForcedOff,
        false => Desired::Stopped,
    };
    want(&served, &by, &name, desired, |_, _| Ok(())).await
}

/// Shuts a VM down and starts it again.
#[utoipa::path(post, path = "/api/v1/vms/{name}/restart", operation_id = "restartVm", tag = "vms", params(("name" = String, Path)), responses(
    (status = 202, body = api::JobView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn restart(
    State(served): State<Served>,
    Extension(by): Extension<Caller>,
    Path(name): Path<String>,
) -> Answer {
    let vm = vm(&*state(&served.agent)?, &name)?.id;
    begin(&served, &by, Command::RestartVm { vm }).await
}

/// Makes a VM's processors stand still.
#[utoipa::path(post, path = "/api/v1/vms/{name}/pause", operation_id = "pauseVm", tag = "vms", params(("name" = String, Path)), responses(
    (status = 202, body = api::JobView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn pause(State(served): State<Served>, Extension(by): Extension<Caller>, Path(name): Path<String>) -> Answer {
    want(&served, &by, &name, Desired::Paused, |_, _| Ok(())).await
}

/// Lets a paused VM go on.
#[utoipa::path(post, path = "/api/v1/vms/{name}/resume", operation_id = "resumeVm", tag = "vms", params(("name" = String, Path)), responses(
    (status = 202, body = api::JobView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn resume(
    State(served): State<Served>,
    Extension(by): Extension<Caller>,
    Path(name): Path<String>,
) -> Answer {
    want(&served, &by, &name, Desired::Running, |_, vm| match vm.desired {
        Desired::Paused => Ok(()),
        _ => Err(Refusal::Conflict(format!("VM {:?} is not paused", vm.name))),
    })
    .await
}

/// Moves a VM to another node while it runs.
#[utoipa::path(post, path = "/api/v1/vms/{name}/migrate", operation_id = "migrateVm", tag = "vms", params(("name" = String, Path)), request_body = Option<api::MigrateVm>, responses(
    (status = 202, body = api::JobView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn migrate(
    State(served): State<Served>,
    Extension(by): Extension<Caller>,
    Path(name): Path<String>,
    Body(request): Body<api::MigrateVm>,
) -> Answer {
    let state = state(&served.agent)?;
    let vm = vm(&state, &name)?.id;
    let to = match &request.to {
        Some(to) => Some(node(&state, to)?.id),
        None => None,
    };
    begin(&served, &by, Command::MigrateVm { vm, to }).await
}

/// Why a VM is where it is and in which state.
#[utoipa::path(get, path = "/api/v1/vms/{name}/explain", operation_id = "explainVm", tag = "vms", params(("name" = String, Path)), responses(
    (status = 200, body = api::Explanation),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn explain(
    State(served): State<Served>,
    Path(name): Path<String>,
) -> Result<Json<api::Explanation>, ApiError> {
    let state = state(&served.agent)?;
    Ok(Json(views::explanation(&state, vm(&state, &name)?)))
}
