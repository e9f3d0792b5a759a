//! The quorum.

use holdfast_api as api;

use super::args::QuorumCommand;
use super::client::Client;
use super::{Done, output};

/// `holdfast quorum`.
pub async fn quorum(client: &Client, command: QuorumCommand, json: bool) -> Done {
    match command {
        QuorumCommand::Show => {
            let quorum: api::QuorumView = client.get("/api/v1/quorum").await?;
            match json {
                true => output::json(&quorum),
                false => show(&quorum),
            }
        }
        QuorumCommand::Force { cluster, with, the_others_are_switched_off: others_are_off } => {
            let request = api::ForceQuorum { cluster, with, others_are_off };
            let forced: api::ForcedQuorum = client.post("/api/v1/quorum/force", &request).await?;
            match json {
                true => output::json(&forced),
                false => output::line(&tell(&forced)),
            }
        }
    }
}

fn tell(forced: &api::ForcedQuorum) -> String {
    let out = match forced.left_out.is_empty() {
        true => "no node".to_owned(),
        false => forced.left_out.join(", "),
    };
    let known = format!(
        "It goes on by its own log, which ends at entry {} of term {} and heard no coordinator for {} s: what was agreed on \
         without it is lost.",
        forced.log_index,
        forced.log_term,
        forced.unheard_ms / 1000
    );
    if forced.done {
        format!(
            "FORCED: {} goes on alone, as generation {}. {known}\nLeft out: {out}. They join again by themselves when they come \
             back.\nIt coordinates in about {} s; `holdfast quorum show` tells.",
            forced.node,
            forced.generation,
            forced.wait_ms.div_ceil(1000) + 1
        )
    } else {
        format!(
            "NOTHING WAS DONE. With --the-others-are-switched-off, {} would go on alone, as generation {}. {known}\nLeft out: \
             {out}. SWITCH THEM OFF FIRST: if one of them still runs VMs, they will run twice, and their disks will be ruined.",
            forced.node, forced.generation
        )
    }
}

fn show(quorum: &api::QuorumView) -> Done {
    let moving = if quorum.settled { "" } else { " (votes are about to move)" };
    output::facts(&[
        ("coordinator", quorum.coordinator.clone().unwrap_or_else(|| "none".into())),
        ("votes", format!("{} of {} present, {} needed{moving}", quorum.present, quorum.votes, quorum.needed)),
        ("outlook", quorum.outlook.clone()),
    ])?;
    output::line("")?;
    let row = |seat: &api::SeatView| {
        [
            seat.name.clone(),
            output::or_dash(seat.site.as_ref()),
            output::yes(seat.votes),
            output::or_dash(seat.present.map(output::yes)),
            seat.why.clone(),
        ]
    };
    output::table(["name", "site", "votes", "present", "why"], quorum.seats.iter().map(row))
}
