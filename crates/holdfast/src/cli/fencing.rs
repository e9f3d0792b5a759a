//! Power fencing of nodes, from the command line.

use std::io::Read as _;

use holdfast_api as api;
use hyper::Method;

use super::args::FencingCommand;
use super::client::Client;
use super::vm::segment;
use super::{CliError, Done, output};

/// `holdfast node fencing`.
pub async fn fencing(client: &Client, command: FencingCommand, json: bool) -> Done {
    let path = |node: &str| format!("/api/v1/nodes/{}/fencing", segment(node));
    let view: api::FencingView = match command {
        FencingCommand::Set { node, agent, option, option_secret } => {
            let options = option.iter().map(|pair| split(pair)).collect::<Result<_, _>>()?;
            let secrets = option_secret.iter().map(|pair| secret(pair)).collect::<Result<_, _>>()?;
            let request = api::SetFencing { agent, options, secrets };
            client.send_json(Method::PUT, &path(&node), &request).await?
        }
        FencingCommand::Show { node } => client.get(&path(&node)).await?,
        FencingCommand::Clear { node } => {
            let () = client.delete(&path(&node)).await?;
            return match json {
                true => output::json(&serde_json::json!({})),
                false => output::line(&format!("Node {node} has no power fencing any more.")),
            };
        }
    };
    match json {
        true => output::json(&view),
        false => show(&view),
    }
}

/// `holdfast node fence-test`.
pub async fn test(client: &Client, node: &str, json: bool) -> Done {
    if !json {
        eprintln!("Asking another node to try it; nothing is switched. This takes a minute at most.");
    }
    let path = format!("/api/v1/nodes/{}/fence-test", segment(node));
    let test: api::FenceTestView = client.post(&path, &serde_json::json!({})).await?;
    if json {
        output::json(&test)?;
    } else if test.passed {
        output::line(&format!("Passed: {}.", test.text))?;
    }
    match test.passed {
        true => Ok(()),
        false => Err(CliError::Job(format!("the test failed: {}", test.text))),
    }
}

/// `holdfast node fence`.
pub async fn fence(client: &Client, node: &str, yes: bool, json: bool) -> Done {
    if !yes {
        return Err(CliError::Local(format!(
            "this cuts the power of node {node} and kills every VM that runs there: add --yes if you mean it"
        )));
    }
    let path = format!("/api/v1/nodes/{}/fence", segment(node));
    let view: api::FencingView = client.post(&path, &serde_json::json!({})).await?;
    match json {
        true => output::json(&view),
        false => output::line(&format!(
            "The coordinator has {node} switched off by {}: `holdfast events --follow` tells what comes of it.",
            view.agent
        )),
    }
}

/// A hardware watchdog, in a few words.
pub fn watchdog(view: &api::WatchdogView) -> String {
    let device = output::or_dash(view.device.as_ref());
    match view.state {
        api::WatchdogState::Absent => "none is used".into(),
        api::WatchdogState::Ready => format!("{device}, not armed: no VM runs"),
        api::WatchdogState::Armed => format!("{device}, armed with {} s", view.timeout_s.unwrap_or_default()),
        api::WatchdogState::Left => format!("{device}, not fed any more: it resets the host"),
    }
}

fn show(view: &api::FencingView) -> Done {
    let options = view.options.iter().map(|(key, value)| format!("{key}={value}"));
    let secrets = view.secrets.iter().map(|key| format!("{key}=(not shown)"));
    output::facts(&[
        ("node", view.node.clone()),
        ("agent", view.agent.clone()),
        ("options", options.chain(secrets).collect::<Vec<_>>().join("\n")),
        ("last test", told(view.test.as_ref())),
    ])
}

/// A test in a line.
pub fn told(test: Option<&api::FenceTestView>) -> String {
    match test {
        None => "never: try `holdfast node fence-test`".into(),
        Some(test) => {
            let verdict = if test.passed { "passed" } else { "failed" };
            format!("{verdict}, {}: {}", output::moment(test.at_ms), test.text)
        }
    }
}

fn split(pair: &str) -> Result<(String, String), CliError> {
    let no_pair = || CliError::Local(format!("{pair:?} is no option: write it like ip=10.0.0.1"));
    pair.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned())).ok_or_else(no_pair)
}

/// A secret comes from a file or from standard input: arguments are seen by all.
fn secret(pair: &str) -> Result<(String, String), CliError> {
    let (key, source) = split(pair)?;
    let read = match source.strip_prefix('@') {
        Some("-") => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).map(|_| text)
        }
        Some(file) => std::fs::read_to_string(file),
        None => {
            return Err(CliError::Local(format!(
                "the secret {key:?} stands in an argument, where everybody on this host can read it: write {key}=@FILE, or {key}=@- for standard input"
            )));
        }
    };
    let text =
        read.map_err(|error| CliError::Local(format!("cannot read the secret {key:?} from {source}: {error}")))?;
    Ok((key, text.trim_end_matches(['\n', '\r']).to_owned()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn secrets_come_from_files_only() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("password");
        std::fs::write(&file, "hush\n").unwrap();
        let read: BTreeMap<_, _> = [secret(&format!("password=@{}", file.display())).unwrap()].into();
        assert_eq!(read["password"], "hush");
        assert!(secret("password=hush").is_err_and(|error| error.to_string().contains("argument")));
        assert!(secret("password=@/does/not/exist").is_err());
        assert!(split("ip").is_err());
        assert_eq!(split("options=a=b").unwrap().1, "a=b");
    }
}
