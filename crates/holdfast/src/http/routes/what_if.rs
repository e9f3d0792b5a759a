//! What would happen if.

use axum::Json;
use axum::extract::State;
use holdfast_api as api;
use holdfast_core::Observed;
use holdfast_core::what_if::{Question, Situation, what_if};
use serde::Deserialize;

use super::{OBSERVED_WITHIN, Outlook, Params, state};
use crate::agent::{Failure, now_ms};
use crate::http::Served;
use crate::http::error::ApiError;
use crate::http::views;

/// What is asked.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    ask: String,
}

/// Says what would happen to every VM, and changes nothing. `ask` is a phrase such
/// as `lose n2`, `lose n1 and n2`, `lose volume main on n3`, `cut network lan`,
/// `drain n1`.
#[utoipa::path(get, path = "/api/v1/what-if", operation_id = "whatIf", tag = "cluster", params(("ask" = String, Query, description = "what is supposed to happen")), responses(
    (status = 200, body = api::WhatIfView),
    (status = "default", body = api::ErrorBody, description = "an error"),
))]
pub async fn ask(
    State(served): State<Served>,
    Params(Asked { ask }): Params<Asked>,
) -> Result<Json<api::WhatIfView>, ApiError> {
    let outlook = Outlook::take(&served.agent).await;
    let state = state(&served.agent)?;
    let question = Question::read(&ask, &state).map_err(|error| ApiError::invalid(error.to_string()))?;
    let none = || Failure::NoCoordinator { seconds: OBSERVED_WITHIN.as_secs() };
    let coordinator = served.agent.coordinator().ok_or_else(none)?;
    let (nodes, survey) = (outlook.observed.ok_or_else(none)?, outlook.survey.ok_or_else(none)?);
    let observed = Observed { nodes, ..Observed::default() };
    // A voter elects nobody for a while after the last word of a coordinator; then it
    // takes some messages.
    let window = served.agent.authority_window_ms().ok_or_else(|| served.agent.outside())?;
    let situation = Situation {
        state: &state,
        observed: &observed,
        coordinator,
        survey: &survey,
        election_ms: (window, window * 3 / 2),
        now_ms: now_ms(),
    };
    let forecast = what_if(&question, situation)
        .map_err(|broken| ApiError::new("internal", format!("the plan would break a safety rule: {broken}")))?;
    Ok(Json(views::what_if(&state, &ask, &forecast)))
}
