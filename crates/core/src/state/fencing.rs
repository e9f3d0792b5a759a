//! What is kept of power fencing.

use crate::model::*;

use super::ClusterState;
use super::command::{Refusal, Reply};
use super::commands::Executed;

impl ClusterState {
    pub(super) fn set_fencing(&mut self, at_ms: u64, by: &str, id: NodeId, fencing: Option<PowerFencing>) -> Executed {
        let name = self.nodes.get(&id).ok_or_else(|| Refusal::unknown("node", id))?.name.clone();
        let text = match fencing {
            Some(fencing) => {
                valid_fencing(&fencing)?;
                let text = format!("{by} chose {} to switch its power off", fencing.agent);
                self.fencing.insert(id, PowerFencing { test: None, asked: None, ..fencing });
                text
            }
            None => {
                if self.fencing.remove(&id).is_none() {
                    return Err(Refusal::Conflict(format!("node {name:?} has no power fencing")));
                }
                format!("{by} removed its power fencing")
            }
        };
        self.event(at_ms, Severity::Info, format!("node {name}"), text);
        Ok(Reply::Done)
    }

    pub(super) fn fence_tested(&mut self, id: NodeId, agent: &str, test: FenceTest) -> Executed {
        let name = self.node_name(id);
        let fencing = self.fencing.get_mut(&id).filter(|fencing| fencing.agent == agent);
        let fencing = fencing
            .ok_or_else(|| Refusal::Conflict(format!("the power fencing of node {name:?} was changed meanwhile")))?;
        let (severity, verdict) = match test.passed {
            true => (Severity::Info, "passed"),
            false => (Severity::Warning, "failed"),
        };
        let text = format!("a test of its power fencing {verdict}: {}", test.text);
        let at_ms = test.at_ms;
        fencing.test = Some(test);
        self.event(at_ms, severity, format!("node {name}"), text);
        Ok(Reply::Done)
    }

    pub(super) fn ask_fence(&mut self, at_ms: u64, by: &str, id: NodeId) -> Executed {
        let node = self.nodes.get(&id).ok_or_else(|| Refusal::unknown("node", id))?;
        let (name, term, up) = (node.name.clone(), node.term, node.is_up());
        let Some(fencing) = self.fencing.get_mut(&id) else {
            return Err(Refusal::Conflict(format!(
                "node {name:?} has no power fencing: configure it with `holdfast node fencing set`"
            )));
        };
        if !up {
            return Err(Refusal::Conflict(format!(
                "node {name:?} is not up, so no VM has a right to run there that a power cut could end"
            )));
        }
        fencing.asked = Some(term);
        self.event(at_ms, Severity::Warning, format!("node {name}"), format!("{by} wants its power switched off"));
        Ok(Reply::Done)
    }

    pub(super) fn fence_failed(&mut self, at_ms: u64, id: NodeId, term: NodeTerm, why: &str) -> Executed {
        let name = self.nodes.get(&id).ok_or_else(|| Refusal::unknown("node", id))?.name.clone();
        if let Some(fencing) = self.fencing.get_mut(&id)
            && fencing.asked == Some(term)
        {
            fencing.asked = None;
        }
        let text = format!("its power was not shown to be off: {why}");
        self.event(at_ms, Severity::Warning, format!("node {name}"), text);
        Ok(Reply::Done)
    }

    pub(super) fn watchdog_left(&mut self, at_ms: u64, id: NodeId, device: &str, timeout_s: u32) -> Executed {
        let name = self.nodes.get(&id).ok_or_else(|| Refusal::unknown("node", id))?.name.clone();
        let text = format!(
            "VMs of a lease that is over could not be shown dead: its watchdog {device} is not fed any more and resets it within {timeout_s} s"
        );
        self.event(at_ms, Severity::Error, format!("node {name}"), text);
        Ok(Reply::Done)
    }
}

/// An agent is named, never given as a path: its name becomes a program to run as
/// root on every node. Options travel as lines.
fn valid_fencing(fencing: &PowerFencing) -> Result<(), Refusal> {
    let invalid = |text: String| Err(Refusal::Invalid(text));
    let agent = &fencing.agent;
    let word = |text: &str| {
        !text.is_empty() && text.len() <= 63 && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c))
    };
    if !agent.starts_with("fence_") || !word(agent) {
        return invalid(format!("{agent:?} is no fence agent: name one of /usr/sbin/fence_*, without the directory"));
    }
    let secrets = fencing.secrets.iter().map(|(key, secret)| (key, &secret.0));
    for (key, value) in fencing.options.iter().chain(secrets) {
        if !word(key) || key == "action" {
            return invalid(format!("{key:?} cannot be an option: see `{agent} -o metadata` for those that it has"));
        }
        if value.contains(['\n', '\r', '\0']) {
            return invalid(format!("the value of option {key:?} has more than one line"));
        }
        if fencing.options.contains_key(key) && fencing.secrets.contains_key(key) {
            return invalid(format!("option {key:?} is given twice, openly and as a secret"));
        }
    }
    Ok(())
}
