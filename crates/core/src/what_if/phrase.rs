//! What can be asked, and how it is written.

use std::collections::BTreeSet;

use crate::model::*;
use crate::state::ClusterState;

/// What is supposed to happen, all at once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Question {
    /// These hosts lose their power.
    pub nodes: BTreeSet<NodeId>,
    /// The witness's disk is gone.
    pub witness: bool,
    /// These networks carry nothing any more, on every node or on one: by subnet.
    pub cut: Vec<(String, Option<NodeId>)>,
    /// These nodes do not reach these volumes any more.
    pub volumes: Vec<(String, NodeId)>,
    /// These nodes are emptied.
    pub drained: BTreeSet<NodeId>,
}

/// Why a question was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misunderstood {
    /// It is not one of the phrases.
    #[error(
        "{0:?} cannot be asked. These can: \"lose NODE\", \"lose NODE and NODE\", \"lose site SITE\", \"lose witness\", \
         \"lose volume VOLUME on NODE\", \"cut network NETWORK\", \"cut network NETWORK on NODE\", \"drain NODE\", \
         joined by \"and\""
    )]
    Phrase(String),
    /// It names something that there is not.
    #[error("there is no {what} {name:?}; there is {known}")]
    Name {
        /// A node, a volume or the like.
        what: &'static str,
        /// What was written.
        name: String,
        /// What there is.
        known: String,
    },
}

impl Question {
    /// Reads a question about this cluster. A part without a verb has that of the
    /// part before it: `lose n1 and n2`.
    ///
    /// # Errors
    /// [`Misunderstood`], which says what can be asked or what there is.
    pub fn read(text: &str, state: &ClusterState) -> Result<Self, Misunderstood> {
        let spaced = text.replace(',', " and ");
        let words: Vec<_> = spaced.split_whitespace().collect();
        let unclear = || Misunderstood::Phrase(text.trim().into());
        let mut question = Question::default();
        let mut verb = "";
        for part in words.split(|word| *word == "and").filter(|part| !part.is_empty()) {
            let rest = match part {
                [first @ ("lose" | "cut" | "drain"), rest @ ..] => {
                    verb = first;
                    rest
                }
                rest => rest,
            };
            let rest = if let ["the", rest @ ..] = rest { rest } else { rest };
            match (verb, rest) {
                ("lose", ["witness"]) if state.witness.is_some() => question.witness = true,
                ("lose", ["witness"]) => return Err(unknown("witness", "witness", &mut std::iter::empty())),
                ("lose", ["volume", volume, "on", node]) => {
                    let known = state.volumes.contains_key(*volume);
                    if !known {
                        return Err(unknown("volume", volume, &mut state.volumes.keys().map(String::as_str)));
                    }
                    question.volumes.push(((*volume).into(), find_node(state, node)?));
                }
                ("lose", ["site", site]) => question.nodes.extend(find_site(state, site)?),
                ("lose", ["node", node] | [node]) => {
                    question.nodes.insert(find_node(state, node)?);
                }
                ("cut", ["network", network, "on", node] | [network, "on", node]) => {
                    question.cut.push((find_network(state, network)?, Some(find_node(state, node)?)));
                }
                ("cut", ["network", network] | [network]) => question.cut.push((find_network(state, network)?, None)),
                ("drain", ["node", node] | [node]) => {
                    question.drained.insert(find_node(state, node)?);
                }
                _ => return Err(unclear()),
            }
        }
        if question == Question::default() { Err(unclear()) } else { Ok(question) }
    }
}

fn find_node(state: &ClusterState, name: &str) -> Result<NodeId, Misunderstood> {
    let names = &mut state.nodes.values().map(|node| node.name.as_str());
    state.node_named(name).map(|node| node.id).ok_or_else(|| unknown("node", name, names))
}

fn find_site(state: &ClusterState, site: &str) -> Result<BTreeSet<NodeId>, Misunderstood> {
    let there: BTreeSet<_> =
        state.nodes.values().filter(|node| node.site.as_deref() == Some(site)).map(|node| node.id).collect();
    let sites: BTreeSet<_> = state.nodes.values().filter_map(|node| node.site.as_deref()).collect();
    if there.is_empty() { Err(unknown("site", site, &mut sites.into_iter())) } else { Ok(there) }
}

fn find_network(state: &ClusterState, name: &str) -> Result<String, Misunderstood> {
    let found = state.networks.iter().find(|(subnet, network)| network.name == name || *subnet == name);
    let names = &mut state.networks.values().map(|network| network.name.as_str());
    found.map(|(subnet, _)| subnet.clone()).ok_or_else(|| unknown("network", name, names))
}

fn unknown(what: &'static str, name: &str, known: &mut dyn Iterator<Item = &str>) -> Misunderstood {
    let known: Vec<_> = known.collect();
    let known = if known.is_empty() { "none".into() } else { known.join(", ") };
    Misunderstood::Name { what, name: name.into(), known }
}
