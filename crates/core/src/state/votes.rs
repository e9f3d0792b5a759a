//! Sites, and what is told of votes.

use std::collections::BTreeSet;

use crate::model::*;

use super::commands::{Executed, valid_name};
use super::{ClusterState, Refusal, Reply};

/// A site has a name like everything else; `none` takes it back.
pub(super) fn valid_site(site: Option<&str>) -> Result<(), Refusal> {
    match site {
        Some("none") => {
            Err(Refusal::Invalid("\"none\" cannot be the name of a site: it means that there is none".into()))
        }
        Some(site) => valid_name("site", site),
        None => Ok(()),
    }
}

impl ClusterState {
    pub(super) fn set_site(&mut self, at_ms: u64, by: &str, id: NodeId, site: Option<String>) -> Executed {
        valid_site(site.as_deref())?;
        let node = self.nodes.get_mut(&id).ok_or_else(|| Refusal::unknown("node", id))?;
        if node.site == site {
            return Ok(Reply::Done);
        }
        let text = match &site {
            Some(site) => format!("{by} said that it stands at site {site}"),
            None => format!("{by} said that it stands at no site"),
        };
        node.site = site;
        let subject = format!("node {}", node.name);
        self.event(at_ms, Severity::Info, subject, text);
        Ok(Reply::Done)
    }

    pub(super) fn votes_moved(&mut self, at_ms: u64, voters: BTreeSet<NodeId>) -> Reply {
        if voters == self.voters {
            return Reply::Done;
        }
        let names = |ids: &mut dyn Iterator<Item = &NodeId>| {
            ids.map(|id| self.participant_name(*id)).collect::<Vec<_>>().join(", ")
        };
        let gained = names(&mut voters.difference(&self.voters));
        let given_up = names(&mut self.voters.difference(&voters));
        let moved = match (gained.is_empty(), given_up.is_empty()) {
            (false, false) => format!("{gained} in place of {given_up}"),
            (false, true) => format!("{gained} may vote now"),
            (true, _) => format!("{given_up} may not vote any more"),
        };
        let now = names(&mut voters.iter());
        let votes = if voters.len() == 1 { "vote" } else { "votes" };
        self.event(at_ms, Severity::Info, "quorum", format!("{moved}: {} {votes} ({now})", voters.len()));
        self.voters = voters;
        Reply::Done
    }

    /// The name of a participant of consensus for messages.
    pub fn participant_name(&self, id: NodeId) -> String {
        if id.is_witness() { "the witness".into() } else { self.node_name(id) }
    }
}
