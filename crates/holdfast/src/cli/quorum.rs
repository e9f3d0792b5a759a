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
