//! The quorum.

use holdfast_api as api;
use hyper::Method;

use super::args::{QuorumCommand, WitnessCommand};
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
        QuorumCommand::Witness(WitnessCommand::Show) => {
            let view: api::WitnessView = client.get("/api/v1/quorum/witness").await?;
            show_witness(&view, json)
        }
        QuorumCommand::Witness(WitnessCommand::Set { disk: Some(disk), .. }) => {
            let request = api::SetWitness { disk };
            let view: api::WitnessView = client.send_json(Method::PUT, "/api/v1/quorum/witness", &request).await?;
            show_witness(&view, json)
        }
        QuorumCommand::Witness(WitnessCommand::Set { disk: None, .. }) => {
            let () = client.delete("/api/v1/quorum/witness").await?;
            output::line("there is no witness any more; its disk can be used for something else once it votes no more")
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

fn show_witness(witness: &api::WitnessView, json: bool) -> Done {
    if json {
        return output::json(witness);
    }
    let age = |ms: Option<u64>| ms.map_or_else(|| "-".into(), |ms| format!("{ms} ms ago"));
    let health = match (&witness.why, witness.healthy) {
        (Some(why), _) => format!("no: {why}"),
        (None, healthy) => output::yes(healthy),
    };
    let seen = match &witness.seen_from {
        Some(node) => format!("{}, from {node}", age(witness.seen_ms)),
        None => "-".into(),
    };
    output::facts(&[
        ("disk", witness.disk.clone()),
        ("votes", output::yes(witness.votes)),
        ("healthy", health),
        ("host", output::or_dash(witness.host.as_ref())),
        ("hosted by", format!("{} (epoch {})", output::or_dash(witness.hosted_by.as_ref()), witness.epoch)),
        ("acknowledged", age(witness.silent_ms)),
        ("disk seen", seen),
    ])
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
