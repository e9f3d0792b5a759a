//! Networks and virtual switches.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::{Extension, Json};
use holdfast_api as api;
use holdfast_core::{ClusterState, Command, Network, Roles, SwitchKind};

use super::{execute, state};
use crate::http::Served;
use crate::http::error::{ApiError, Body};
use crate::http::gate::Caller;
use crate::http::views;

/// The networks that the nodes share.
#[utoipa::path(get, path = "/api/v1/networks", operation_id = "listNetworks", tag = "networks", responses(
    (status = 200, body = Vec<api::NetworkView>),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn list(State(served): State<Served>) -> Result<Json<Vec<api::NetworkView>>, ApiError> {
    let state = state(&served.agent)?;
    let view = |(subnet, network): (&String, &Network)| views::network(&state, subnet, network);
    Ok(Json(state.networks.iter().map(view).collect()))
}

/// A network by its name, or by its subnet with `-` for `/`.
fn find<'a>(state: &'a ClusterState, name: &str) -> Result<(&'a String, &'a Network), ApiError> {
    state
        .networks
        .iter()
        .find(|(subnet, network)| network.name == name || subnet.replace('/', "-") == name)
        .ok_or_else(|| ApiError::not_found("network", name))
}

/// Renames a network or changes its use. It is named by its name, or by its
/// subnet with `-` for `/`.
#[utoipa::path(patch, path = "/api/v1/networks/{name}", operation_id = "setNetwork", tag = "networks", params(("name" = String, Path)), request_body = api::SetNetwork, responses(
    (status = 200, body = api::NetworkView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn set(
    State(served): State<Served>,
    Extension(by): Extension<Caller>,
    Path(name): Path<String>,
    Body(request): Body<api::SetNetwork>,
) -> Result<Json<api::NetworkView>, ApiError> {
    let before = state(&served.agent)?;
    let (subnet, network) = find(&before, &name)?;
    let roles = (request.cluster.is_some() || request.migration.is_some()).then_some(Roles {
        cluster: request.cluster.unwrap_or(network.roles.cluster),
        migration: request.migration.unwrap_or(network.roles.migration),
    });
    let command = Command::SetNetwork { network: subnet.clone(), name: request.name, roles, metric: request.metric };
    execute(&served.agent, &by, command).await?;
    let after = state(&served.agent)?;
    let network = after.networks.get(subnet).ok_or_else(|| ApiError::not_found("network", subnet))?;
    Ok(Json(views::network(&after, subnet, network)))
}

/// The virtual switches.
#[utoipa::path(get, path = "/api/v1/switches", operation_id = "listSwitches", tag = "switches", responses(
    (status = 200, body = Vec<api::SwitchView>),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn list_switches(State(served): State<Served>) -> Result<Json<Vec<api::SwitchView>>, ApiError> {
    let state = state(&served.agent)?;
    let view = |(name, kind): (&String, &SwitchKind)| views::switch(&state, name, kind);
    Ok(Json(state.switches.iter().map(view).collect()))
}

/// Adds a virtual switch.
#[utoipa::path(post, path = "/api/v1/switches", operation_id = "addSwitch", tag = "switches", request_body = api::AddSwitch, responses(
    (status = 201, body = api::SwitchView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn add_switch(
    State(served): State<Served>,
    Extension(by): Extension<Caller>,
    Body(request): Body<api::AddSwitch>,
) -> Result<(StatusCode, Json<api::SwitchView>), ApiError> {
    let kind = match (request.kind, request.uplink) {
        (api::SwitchKind::External, Some(uplink)) if uplink_is_valid(&uplink) => SwitchKind::External { uplink },
        (api::SwitchKind::External, Some(uplink)) => {
            return Err(ApiError::invalid(format!(
                "{uplink:?} cannot be the name of an interface: it has 1 to 15 characters, no '/' and no spaces"
            )));
        }
        (api::SwitchKind::External, None) => {
            return Err(ApiError::invalid(
                "an external switch needs an uplink: the interface, or an existing bridge, of every node",
            ));
        }
        (_, Some(_)) => {
            return Err(ApiError::invalid("only an external switch has an uplink"));
        }
        (api::SwitchKind::Internal, None) => SwitchKind::Internal,
        (api::SwitchKind::Private, None) => SwitchKind::Private,
    };
    let command = Command::AddSwitch { name: request.name.clone(), kind: kind.clone() };
    execute(&served.agent, &by, command).await?;
    let view = views::switch(&*state(&served.agent)?, &request.name, &kind);
    Ok((StatusCode::CREATED, Json(view)))
}

/// As Linux names interfaces (`dev_valid_name` in net/core/dev.c).
fn uplink_is_valid(name: &str) -> bool {
    let allowed = |c: char| !c.is_whitespace() && !matches!(c, '/' | ':') && !c.is_control();
    (1..=15).contains(&name.len()) && !matches!(name, "." | "..") && name.chars().all(allowed)
}

/// Removes a virtual switch that no VM uses.
#[utoipa::path(delete, path = "/api/v1/switches/{name}", operation_id = "removeSwitch", tag = "switches", params(("name" = String, Path)), responses(
    (status = 204, description = "it is gone"),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn remove_switch(
    State(served): State<Served>,
    Extension(by): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    execute(&served.agent, &by, Command::RemoveSwitch { name }).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_uplink_is_named_as_linux_names_interfaces() {
        for name in ["eth0", "enp1s0f0np0", "br-lan", "vlan.10"] {
            assert!(uplink_is_valid(name), "{name}");
        }
        for name in ["", ".", "..", "a/b", "a b", "eth0:1", "sixteen-letters-"] {
            assert!(!uplink_is_valid(name), "{name}");
        }
    }
}
