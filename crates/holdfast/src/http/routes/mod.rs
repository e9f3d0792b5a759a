//! The routes, by what they are about.

mod cluster;
mod console;
mod fencing;
mod files;
mod jobs;
mod luns;
mod networks;
mod nodes;
mod quorum;
mod vms;
mod volumes;
mod what_if;
mod witness;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{FromRequestParts, Query};
use axum::http::request::Parts;
use holdfast_consensus::Standing;
use holdfast_core::quorum::Survey;
use holdfast_core::*;
use serde::de::DeserializeOwned;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Served;
use super::error::ApiError;
use super::gate::Caller;
use super::views::Vantage;
use crate::agent::Agent;

/// How long a view waits for what only the coordinator knows.
const OBSERVED_WITHIN: Duration = Duration::from_millis(1500);

/// Every route of the API.
pub fn all() -> OpenApiRouter<Served> {
    OpenApiRouter::new()
        .routes(routes!(cluster::show, cluster::found))
        .routes(routes!(cluster::hand_over))
        .routes(routes!(cluster::join))
        .routes(routes!(cluster::set_profile))
        .routes(routes!(cluster::set_redirect_patience))
        .routes(routes!(cluster::list_tokens, cluster::add_token))
        .routes(routes!(cluster::remove_token))
        .routes(routes!(cluster::metrics))
        .routes(routes!(nodes::list))
        .routes(routes!(nodes::show, nodes::set, nodes::remove))
        .routes(routes!(nodes::drain))
        .routes(routes!(nodes::resume))
        .routes(routes!(nodes::make_join_token))
        .routes(routes!(fencing::show, fencing::set, fencing::clear))
        .routes(routes!(fencing::test))
        .routes(routes!(fencing::fence))
        .routes(routes!(quorum::show))
        .routes(routes!(what_if::ask))
        .routes(routes!(quorum::force))
        .routes(routes!(witness::show, witness::set, witness::clear))
        .routes(routes!(networks::list))
        .routes(routes!(networks::set))
        .routes(routes!(networks::list_switches, networks::add_switch))
        .routes(routes!(networks::remove_switch))
        .routes(routes!(volumes::list, volumes::add))
        .routes(routes!(volumes::show, volumes::rename, volumes::remove))
        .routes(routes!(volumes::set_owner))
        .routes(routes!(volumes::set_redirect))
        .routes(routes!(luns::import))
        .routes(routes!(files::list))
        .routes(routes!(files::get, files::put, files::remove))
        .routes(routes!(luns::check))
        .routes(routes!(luns::repair))
        .routes(routes!(vms::list, vms::create))
        .routes(routes!(vms::show, vms::delete))
        .routes(routes!(vms::start))
        .routes(routes!(vms::stop))
        .routes(routes!(vms::restart))
        .routes(routes!(vms::pause))
        .routes(routes!(vms::resume))
        .routes(routes!(vms::migrate))
        .routes(routes!(vms::explain))
        .routes(routes!(console::open))
        .routes(routes!(jobs::list))
        .routes(routes!(jobs::show))
        .routes(routes!(jobs::cancel))
        .routes(routes!(jobs::events))
        .routes(routes!(jobs::stream_events))
        .routes(routes!(jobs::stream_changes))
}

/// The state, once this host is in a cluster.
fn state(agent: &Agent) -> Result<Arc<ClusterState>, ApiError> {
    let state = agent.state();
    match state.cluster.name.is_empty() {
        true => Err(agent.outside().into()),
        false => Ok(state),
    }
}

/// What is known here beside the state.
struct Outlook {
    me: Option<NodeId>,
    standing: Option<Standing>,
    observed: Option<BTreeMap<NodeId, NodeObserved>>,
    survey: Option<Survey>,
}

impl Outlook {
    /// Asks the coordinator too, and goes without it when it does not answer.
    async fn take(agent: &Agent) -> Outlook {
        let (observed, survey) = tokio::join!(
            tokio::time::timeout(OBSERVED_WITHIN, agent.observed()),
            tokio::time::timeout(OBSERVED_WITHIN, agent.survey()),
        );
        Outlook {
            observed: observed.ok().and_then(Result::ok),
            survey: survey.ok().and_then(Result::ok),
            me: agent.me(),
            standing: agent.standing(),
        }
    }

    fn vantage(&self) -> Vantage<'_> {
        let standing = self.standing.as_ref();
        Vantage {
            me: self.me,
            coordinator: standing.and_then(|standing| standing.coordinator),
            term: standing.map_or(0, |standing| standing.term),
            voters: standing.map_or(&[], |standing| &standing.voters),
            trouble: standing.and_then(|standing| standing.trouble.as_deref()),
            observed: self.observed.as_ref(),
            survey: self.survey.as_ref(),
        }
    }
}

/// A node by its name or its number.
fn node<'a>(state: &'a ClusterState, name: &str) -> Result<&'a Node, ApiError> {
    let by_number = || state.nodes.get(&NodeId(name.parse().ok()?));
    state.node_named(name).or_else(by_number).ok_or_else(|| ApiError::not_found("node", name))
}

/// A VM by its name or its id.
fn vm<'a>(state: &'a ClusterState, name: &str) -> Result<&'a Vm, ApiError> {
    let by_id = || state.vms.get(&VmId(name.parse().ok()?));
    state.vm_named(name).or_else(by_id).ok_or_else(|| ApiError::not_found("VM", name))
}

/// Has a command agreed on.
async fn execute(agent: &Agent, Caller(by): &Caller, command: Command) -> Result<Reply, ApiError> {
    Ok(agent.execute(by, command).await?)
}

/// The parameters of a query.
struct Params<T>(T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Params<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        Query::try_from_uri(&parts.uri)
            .map(|Query(params)| Params(params))
            .map_err(|refused| ApiError::new("bad_request", refused.body_text()))
    }
}
