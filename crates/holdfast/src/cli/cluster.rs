//! The cluster and what it consists of: nodes, networks, switches, volumes,
//! tokens.

use std::time::Duration;

use holdfast_api as api;
use hyper::Method;
use tokio::time::sleep;

use super::args::*;
use super::client::Client;
use super::vm::segment;
use super::{Done, fencing, files, luns, output};

/// So often a node that is being drained is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(300);

/// `holdfast cluster`.
pub async fn cluster(client: &Client, command: ClusterCommand, json: bool) -> Done {
    match command {
        ClusterCommand::Init { name, site } => {
            let founded: api::Founded = client.post("/api/v1/cluster", &api::FoundCluster { name, site }).await?;
            if json {
                return output::json(&founded);
            }
            output::line(&format!(
                "Cluster {} is founded, with {} as its first node.",
                founded.cluster.name, founded.cluster.answered_by
            ))?;
            output::line("Let the next host join within a day, with this line on it:\n")?;
            output::line(&join_line(&founded.join))
        }
        ClusterCommand::Status => status(&client.get("/api/v1/cluster").await?, json),
        ClusterCommand::Profile { profile } => {
            let profile = match profile {
                ProfileArg::Default => api::ProfileName::Default,
                ProfileArg::Fast => api::ProfileName::Fast,
                ProfileArg::Wan => api::ProfileName::Wan,
            };
            let request = api::SetProfile { profile };
            status(&client.send_json(Method::PUT, "/api/v1/cluster/profile", &request).await?, json)
        }
        ClusterCommand::RedirectPatience { seconds } => {
            let request = api::SetRedirectPatience { seconds };
            status(&client.send_json(Method::PUT, "/api/v1/cluster/redirect-patience", &request).await?, json)
        }
        ClusterCommand::Handover { to } => {
            let handed: api::HandedOver = client.post("/api/v1/cluster/hand-over", &api::HandOver { to }).await?;
            match json {
                true => output::json(&handed),
                false => output::line(&format!("Node {} coordinates now.", handed.coordinator)),
            }
        }
        ClusterCommand::Ca => {
            let cluster: api::ClusterView = client.get("/api/v1/cluster").await?;
            match json {
                true => output::json(&cluster.ca_certificate),
                false => output::line(cluster.ca_certificate.trim_end()),
            }
        }
    }
}

fn status(cluster: &api::ClusterView, json: bool) -> Done {
    if json {
        return output::json(cluster);
    }
    let (counts, quorum) = (&cluster.counts, &cluster.quorum);
    output::facts(&[
        ("cluster", format!("{} ({})", cluster.name, cluster.id)),
        ("profile", format!("{} (lease {} ms)", output::word(&cluster.profile), cluster.lease_ms)),
        ("coordinator", cluster.coordinator.clone().unwrap_or_else(|| "none".into())),
        ("quorum", format!("{} of {} voters connected, {} needed", quorum.connected, quorum.voters, quorum.needed)),
        ("nodes", format!("{} of {} up", counts.nodes_up, counts.nodes)),
        ("vms", format!("{} of {} running", counts.vms_running, counts.vms)),
        ("volumes", counts.volumes.to_string()),
        ("redirected VMs", format!("leave their node after {} s", cluster.redirect_patience_s)),
        ("jobs", counts.jobs.to_string()),
        ("answered by", cluster.answered_by.clone()),
    ])?;
    for warning in &cluster.warnings {
        output::line(&format!("warning: {warning}"))?;
    }
    Ok(())
}

fn join_line(line: &api::JoinLine) -> String {
    format!("holdfast node join {} --token {}", line.address, line.token)
}

/// `holdfast node`.
pub async fn node(client: &Client, command: NodeCommand, json: bool) -> Done {
    match command {
        NodeCommand::List => {
            let nodes: Vec<api::NodeView> = client.get("/api/v1/nodes").await?;
            if json {
                return output::json(&nodes);
            }
            let row = |node: &api::NodeView| {
                [
                    node.name.clone(),
                    match (node.leaves, node.drained_since_ms) {
                        (true, _) => format!("{}, leaves", output::word(&node.state)),
                        (_, Some(_)) => format!("{}, drained", output::word(&node.state)),
                        _ => output::word(&node.state),
                    },
                    if node.coordinator {
                        "coordinator"
                    } else if node.voter {
                        "voter"
                    } else {
                        "-"
                    }
                    .into(),
                    node.vms.to_string(),
                    format!("{} free of {}", output::size(node.memory_free_bytes), output::size(node.memory_bytes)),
                    node.cpus.to_string(),
                    node.accelerator.clone(),
                    output::or_dash(node.qemu.as_ref()),
                    node.version.clone(),
                ]
            };
            let heads = ["name", "state", "role", "vms", "memory", "cpus", "accel", "qemu", "version"];
            output::table(heads, nodes.iter().map(row))
        }
        NodeCommand::Show { name } => {
            let node: api::NodeView = client.get(&format!("/api/v1/nodes/{}", segment(&name))).await?;
            match json {
                true => output::json(&node),
                false => show_node(&node),
            }
        }
        NodeCommand::Set { name, site } => {
            let request = api::SetNode { site };
            let path = format!("/api/v1/nodes/{}", segment(&name));
            let node: api::NodeView = client.send_json(Method::PATCH, &path, &request).await?;
            match json {
                true => output::json(&node),
                false => show_node(&node),
            }
        }
        NodeCommand::Drain { name, no_wait } => drain(client, &name, no_wait, json).await,
        NodeCommand::Resume { name } => {
            let path = format!("/api/v1/nodes/{}/resume", segment(&name));
            let node: api::NodeView = client.post(&path, &serde_json::json!({})).await?;
            match json {
                true => output::json(&node),
                false => output::line(&format!("VMs may come to node {name} again.")),
            }
        }
        NodeCommand::Remove { name } => {
            let () = client.delete(&format!("/api/v1/nodes/{}", segment(&name))).await?;
            done(json, format!("Node {name} is removed."))
        }
        NodeCommand::Join { address, token, site } => {
            let request = api::JoinCluster { address, token, site };
            let node: api::NodeView = client.post("/api/v1/join-cluster", &request).await?;
            match json {
                true => output::json(&node),
                false => {
                    output::line(&format!("This host is node {} (number {}) of the cluster now.", node.name, node.id))
                }
            }
        }
        NodeCommand::Fencing { command } => fencing::fencing(client, command, json).await,
        NodeCommand::FenceTest { name } => fencing::test(client, &name, json).await,
        NodeCommand::Fence { name, yes } => fencing::fence(client, &name, yes, json).await,
        NodeCommand::Token { valid } => {
            let request = api::MakeJoinToken { valid_ms: Some(valid * 60_000) };
            let line: api::JoinLine = client.post("/api/v1/join-tokens", &request).await?;
            match json {
                true => output::json(&line),
                false => output::line(&join_line(&line)),
            }
        }
    }
}

/// Waits until nothing runs there, or what does cannot leave.
async fn drain(client: &Client, name: &str, no_wait: bool, json: bool) -> Done {
    let path = format!("/api/v1/nodes/{}", segment(name));
    let mut node: api::NodeView = client.post(&format!("{path}/drain"), &serde_json::json!({})).await?;
    let mut told = 0;
    while !no_wait && node.drained_since_ms.is_some() && node.vms > node.stays.len() {
        if node.vms != told && !json {
            output::line(&format!("{} VMs on node {name}", node.vms))?;
            told = node.vms;
        }
        sleep(LOOK_EVERY).await;
        node = client.get(&path).await?;
    }
    if json {
        output::json(&node)?;
    }
    if no_wait || node.vms == 0 {
        return if json { Ok(()) } else { output::line(&format!("Node {name} is drained: {} VMs on it.", node.vms)) };
    }
    let stays: Vec<_> = node.stays.iter().map(|stays| format!("{}: {}", stays.vm, stays.why)).collect();
    let text = format!("node {name} is not empty: {}; they leave when they can", stays.join("; "));
    Err(super::CliError::Job(text))
}

/// What is said when there is nothing else to say.
fn done(json: bool, text: String) -> Done {
    match json {
        true => output::json(&serde_json::json!({})),
        false => output::line(&text),
    }
}

fn show_node(node: &api::NodeView) -> Done {
    let address = |address: &api::Address| {
        let network = output::or_dash(address.network.as_ref());
        format!("{}/{} on {} ({network})", address.ip, address.prefix, address.interface)
    };
    let accelerator = match node.accelerator.as_str() {
        "tcg" => "tcg: in software, many times slower than KVM, which does not work on this host".into(),
        other => other.to_owned(),
    };
    let mut facts = vec![
        ("name", node.name.clone()),
        ("number", node.id.to_string()),
        ("state", output::word(&node.state)),
        ("drained", node.drained_since_ms.map_or_else(|| "no".into(), |at| format!("since {}", output::moment(at)))),
        ("term", node.term.to_string()),
        ("coordinator", output::yes(node.coordinator)),
        ("voter", output::yes(node.voter)),
        ("site", output::or_dash(node.site.as_ref())),
        ("accelerator", accelerator),
        ("qemu", node.qemu.clone().unwrap_or_else(|| "missing, or older than 7.2".into())),
        ("newest machine", output::or_dash(node.newest_machine.as_ref())),
        ("cpus", format!("{}, {} virtual ones promised", node.cpus, node.cpus_promised)),
        (
            "memory",
            format!(
                "{}, {} promised, {} free",
                output::size(node.memory_bytes),
                output::size(node.memory_promised_bytes),
                output::size(node.memory_free_bytes)
            ),
        ),
        ("vms", node.vms.to_string()),
        ("addresses", node.addresses.iter().map(address).collect::<Vec<_>>().join("\n")),
        ("port", node.port.to_string()),
        ("fencing", node.fencing.replace("; ", "\n")),
        ("version", node.version.clone()),
        ("joined", output::moment(node.joined_ms)),
    ];
    if let Some(power) = &node.power_fencing {
        facts.push(("last fence test", fencing::told(power.test.as_ref())));
    }
    if let Some(watchdog) = &node.watchdog {
        facts.push(("watchdog", fencing::watchdog(watchdog)));
    }
    if let Some(silent_ms) = node.silent_ms {
        facts.push(("last answered", format!("{silent_ms} ms ago")));
    }
    if let Some(since) = node.lost_since_ms {
        facts.push(("lost since", output::moment(since)));
    }
    output::facts(&facts)
}

/// `holdfast network`.
pub async fn network(client: &Client, command: NetworkCommand, json: bool) -> Done {
    let networks: Vec<api::NetworkView> = match command {
        NetworkCommand::List => client.get("/api/v1/networks").await?,
        NetworkCommand::Set { network, name, cluster, migration, metric } => {
            let path = format!("/api/v1/networks/{}", segment(&network.replace('/', "-")));
            let request = api::SetNetwork { name, cluster, migration, metric };
            let changed: api::NetworkView = client.send_json(Method::PATCH, &path, &request).await?;
            if json {
                return output::json(&changed);
            }
            vec![changed]
        }
    };
    if json {
        return output::json(&networks);
    }
    let row = |network: &api::NetworkView| {
        [
            network.name.clone(),
            network.subnet.clone(),
            output::yes(network.cluster),
            output::yes(network.migration),
            network.metric.to_string(),
            network.nodes.join(", "),
        ]
    };
    output::table(["name", "subnet", "cluster", "migration", "metric", "nodes"], networks.iter().map(row))
}

/// `holdfast switch`.
pub async fn switch(client: &Client, command: SwitchCommand, json: bool) -> Done {
    let switches: Vec<api::SwitchView> = match command {
        SwitchCommand::List => client.get("/api/v1/switches").await?,
        SwitchCommand::Add { name, kind, uplink } => {
            let kind = match kind {
                Some(SwitchKindArg::Internal) => api::SwitchKind::Internal,
                Some(SwitchKindArg::Private) => api::SwitchKind::Private,
                Some(SwitchKindArg::External) | None => api::SwitchKind::External,
            };
            let added: api::SwitchView =
                client.post("/api/v1/switches", &api::AddSwitch { name, kind, uplink }).await?;
            if json {
                return output::json(&added);
            }
            vec![added]
        }
        SwitchCommand::Remove { name } => {
            let () = client.delete(&format!("/api/v1/switches/{}", segment(&name))).await?;
            return done(json, format!("Switch {name} is removed."));
        }
    };
    if json {
        return output::json(&switches);
    }
    let row = |switch: &api::SwitchView| {
        let uplink = output::or_dash(switch.uplink.as_ref());
        [switch.name.clone(), output::word(&switch.kind), uplink, switch.vms.join(", ")]
    };
    output::table(["name", "kind", "uplink", "vms"], switches.iter().map(row))
}

/// `holdfast volume`.
pub async fn volume(client: &Client, command: VolumeCommand, json: bool) -> Done {
    let volume: api::VolumeView = match command {
        VolumeCommand::List => {
            let volumes: Vec<api::VolumeView> = client.get("/api/v1/volumes").await?;
            if json {
                return output::json(&volumes);
            }
            let row = |volume: &api::VolumeView| {
                let away = volume
                    .reach
                    .iter()
                    .filter(|reach| reach.ok == Some(false) || reach.path == Some(api::PathState::Redirected));
                let away = away.map(|reach| match reach.path {
                    Some(path) => format!("{} ({})", reach.node, output::word(&path)),
                    None => reach.node.clone(),
                });
                let away = away.collect::<Vec<_>>().join(", ");
                [
                    volume.name.clone(),
                    output::word(&volume.kind),
                    volume.path.clone(),
                    output::or_dash(volume.owner.as_ref().map(|owner| owner.node.clone())),
                    output::or_dash(volume.size_bytes.map(output::size)),
                    output::or_dash(volume.free_bytes.map(output::size)),
                    if away.is_empty() { "-".into() } else { away },
                ]
            };
            let heads = ["name", "kind", "path", "owner", "size", "free", "not direct from"];
            return output::table(heads, volumes.iter().map(row));
        }
        VolumeCommand::Df { name } => return space(client, name, json).await,
        VolumeCommand::Remove { name } => {
            let () = client.delete(&format!("/api/v1/volumes/{}", segment(&name))).await?;
            return done(json, format!("Volume {name} is removed; its files stay."));
        }
        VolumeCommand::Rename { name, new } => {
            let path = format!("/api/v1/volumes/{}", segment(&name));
            client.send_json(Method::PATCH, &path, &api::RenameVolume { name: new }).await?
        }
        VolumeCommand::SetOwner { name, node } => {
            let path = format!("/api/v1/volumes/{}/owner", segment(&name));
            client.send_json(Method::PUT, &path, &api::SetOwner { node }).await?
        }
        VolumeCommand::Maintenance { name, redirect, direct } => {
            let path = format!("/api/v1/volumes/{}/redirect", segment(&name));
            let (away, node) = (redirect.is_some(), redirect.or(direct).unwrap_or_default());
            client.send_json(Method::PUT, &path, &api::SetRedirect { node, redirect: away }).await?
        }
        VolumeCommand::Add { name, directory, lun, erase } => {
            client.post("/api/v1/volumes", &api::AddVolume { name, directory, lun, erase }).await?
        }
        VolumeCommand::Import { name, lun, take } => {
            client.post("/api/v1/volume-imports", &api::ImportVolume { name, lun, take }).await?
        }
        VolumeCommand::Ls { name } => {
            let files: Vec<api::FileView> = client.get(&format!("/api/v1/volumes/{}/files", segment(&name))).await?;
            return luns::list(&files, json);
        }
        VolumeCommand::Put { name, from, to, replace } => {
            return files::put(client, &name, &from, to, replace, json).await;
        }
        VolumeCommand::Get { name, from, to } => return files::get(client, &name, &from, to, json).await,
        VolumeCommand::Rm { name, file } => {
            let () = client.delete(&files::path(&name, &file)).await?;
            return done(json, format!("{file} is removed from volume {name}."));
        }
        VolumeCommand::Cp { from, to, replace } => return files::copy(client, &from, &to, replace, json).await,
        VolumeCommand::Check { name, .. } => {
            let name = name.unwrap_or_default();
            return luns::check(&client.get(&format!("/api/v1/volumes/{}/check", segment(&name))).await?, json);
        }
        VolumeCommand::Repair { name } => {
            return luns::check(&client.post(&format!("/api/v1/volumes/{}/repair", segment(&name)), &()).await?, json);
        }
        VolumeCommand::Serve { .. } | VolumeCommand::Mount { .. } => {
            return Err(super::CliError::Local("this command is not run by the client".into()));
        }
        VolumeCommand::Show { name } => client.get(&format!("/api/v1/volumes/{}", segment(&name))).await?,
    };
    if json {
        return output::json(&volume);
    }
    output::facts(&[
        ("name", volume.name.clone()),
        ("id", volume.id.clone()),
        ("kind", output::word(&volume.kind)),
        ("path", volume.path.clone()),
        ("mounted at", output::or_dash(volume.mounted_at.clone())),
        ("size", output::or_dash(volume.size_bytes.map(output::size))),
        ("used", output::or_dash(volume.used_bytes.map(output::size))),
        ("free", output::or_dash(volume.free_bytes.map(output::size))),
        ("promised", output::or_dash(volume.promised_bytes.map(output::size))),
        ("owner", output::or_dash(volume.owner.as_ref().map(owner))),
        ("nodes", volume.reach.iter().map(reach).collect::<Vec<_>>().join("\n")),
        ("vms", volume.vms.join(", ")),
        ("added", output::moment(volume.added_ms)),
    ])
}

fn owner(owner: &api::OwnerView) -> String {
    match (&owner.next, owner.leaving) {
        (Some(next), _) => format!("{}, hands it over to {next}", owner.node),
        (None, true) => format!("{}, hands it over", owner.node),
        (None, false) => owner.node.clone(),
    }
}

/// How a node reaches a volume: how, why, since when, through whom, how much.
fn reach(reach: &api::Reach) -> String {
    let why = reach.why.as_deref().unwrap_or("it did not say why");
    let by_hand = if reach.by_hand { ", by hand" } else { "" };
    let how = match (reach.path, reach.ok) {
        (_, None) => return format!("{}: has not said yet{by_hand}", reach.node),
        (None, Some(true)) => return format!("{}: reaches it", reach.node),
        (None, Some(false)) => return format!("{}: does not: {why}", reach.node),
        // What it was told by hand it will do.
        (Some(api::PathState::Direct), _) => return format!("{}: direct{by_hand}", reach.node),
        (Some(api::PathState::Unavailable), _) => "unavailable".to_owned(),
        (Some(api::PathState::Redirected), _) => {
            let through = reach.through.as_deref().unwrap_or("the owner");
            format!("redirected through {through}{by_hand}")
        }
    };
    let since = reach.since_ms.map_or_else(String::new, |since| format!(" since {}", output::moment(since)));
    let much = match (reach.redirected_requests, reach.redirected_bytes) {
        (Some(requests), Some(bytes)) => format!("; {requests} requests, {}", output::size(bytes)),
        _ => String::new(),
    };
    format!("{}: {how}{since}: {why}{much}", reach.node)
}

/// `holdfast volume df`.
async fn space(client: &Client, name: Option<String>, json: bool) -> Done {
    let volumes: Vec<api::VolumeView> = match name {
        Some(name) => vec![client.get(&format!("/api/v1/volumes/{}", segment(&name))).await?],
        None => client.get("/api/v1/volumes").await?,
    };
    if json {
        return output::json(&volumes.iter().map(api::VolumeSpace::from).collect::<Vec<_>>());
    }
    let size = |bytes: Option<u64>| output::or_dash(bytes.map(output::size));
    let row = |volume: &api::VolumeView| {
        let used = volume.used_bytes.zip(volume.size_bytes).map(|(used, size)| used * 100 / size.max(1));
        let percent = |percent: Option<u64>| output::or_dash(percent.map(|percent| format!("{percent} %")));
        [
            volume.name.clone(),
            size(volume.size_bytes),
            size(volume.used_bytes),
            percent(used),
            size(volume.ahead_bytes),
            size(volume.free_bytes),
            size(volume.promised_bytes),
            percent(volume.promised_percent),
        ]
    };
    output::table(
        ["name", "size", "used", "used %", "ahead", "free", "promised", "promised %"],
        volumes.iter().map(row),
    )
}

/// `holdfast token`.
pub async fn token(client: &Client, command: TokenCommand, json: bool) -> Done {
    match command {
        TokenCommand::Create { name } => {
            let made: api::MadeToken = client.post("/api/v1/tokens", &api::AddToken { name }).await?;
            if json {
                return output::json(&made);
            }
            eprintln!("This is shown only once. Use it with --server, --token and --ca (see `holdfast cluster ca`).");
            output::line(&made.token)
        }
        TokenCommand::List => {
            let tokens: Vec<api::TokenView> = client.get("/api/v1/tokens").await?;
            if json {
                return output::json(&tokens);
            }
            let row = |token: &api::TokenView| [token.name.clone(), output::moment(token.created_ms)];
            output::table(["name", "created"], tokens.iter().map(row))
        }
        TokenCommand::Revoke { name } => {
            let () = client.delete(&format!("/api/v1/tokens/{}", segment(&name))).await?;
            done(json, format!("Token {name} is revoked."))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_a_node_reaches_a_lun_is_told_with_all_that_is_known() {
        let mut shown = api::Reach {
            node: "n2".into(),
            ok: Some(true),
            why: Some("input/output error".into()),
            path: Some(api::PathState::Redirected),
            through: Some("n1".into()),
            since_ms: Some(0),
            by_hand: false,
            redirected_requests: Some(7),
            redirected_bytes: Some(4096),
        };
        let told = reach(&shown);
        assert!(told.starts_with("n2: redirected through n1 since "), "{told}");
        assert!(told.ends_with(": input/output error; 7 requests, 4 KiB"), "{told}");
        shown.path = Some(api::PathState::Direct);
        assert_eq!(reach(&shown), "n2: direct");
        (shown.path, shown.ok) = (None, None);
        assert_eq!(reach(&shown), "n2: has not said yet");
    }
}
