//! What would happen if.

use holdfast_api as api;

use super::client::Client;
use super::vm::segment;
use super::{Done, output};

/// `holdfast what-if`.
pub async fn what_if(client: &Client, phrase: &[String], json: bool) -> Done {
    let path = format!("/api/v1/what-if?ask={}", segment(&phrase.join(" ")));
    let view: api::WhatIfView = client.get(&path).await?;
    match json {
        true => output::json(&view),
        false => show(&view),
    }
}

fn show(view: &api::WhatIfView) -> Done {
    let quorum = match view.has_quorum {
        true => format!("yes: {} of {} votes are left", view.votes_left, view.votes),
        false => format!("no: {} of {} votes are left", view.votes_left, view.votes),
    };
    let lost = match (view.lost.is_empty(), view.lost_within) {
        (true, _) => "none".into(),
        (false, Some(span)) => format!("{}, {} after the event", view.lost.join(", "), within(Some(span))),
        (false, None) => view.lost.join(", "),
    };
    let coordinator = if view.has_quorum { view.coordinators.join(" or ") } else { "nobody".into() };
    output::facts(&[
        ("quorum", quorum),
        ("coordinator", coordinator),
        ("votes afterwards", view.voters_afterwards.join(", ")),
        ("lost nodes", lost),
    ])?;
    if !view.vms.is_empty() {
        output::line("")?;
        let row = |vm: &api::VmForecast| {
            [
                vm.name.clone(),
                output::word(&vm.fate),
                output::or_dash(vm.from.as_ref()),
                output::or_dash(vm.to.as_ref()),
                within(vm.within),
                output::or_dash(vm.why.as_ref()),
            ]
        };
        output::table(["vm", "fate", "from", "to", "after", "why"], view.vms.iter().map(row))?;
    }
    for note in &view.notes {
        output::line(&format!("\n{note}"))?;
    }
    output::line("\nNothing was changed.")
}

fn within(span: Option<api::Within>) -> String {
    output::or_dash(span.map(|span| match span.from_ms == span.to_ms {
        true => format!("{} ms", span.to_ms),
        false => format!("{}-{} ms", span.from_ms, span.to_ms),
    }))
}
