//! The disaster door: a node without a quorum goes on alone.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::future::join_all;
use holdfast_core::lease::LeaseTiming;
use holdfast_core::*;
use uuid::Uuid;

use super::enter::broken;
use super::{Agent, Failure, now_ms, rpc};

/// How long a node may take to answer before it counts as switched off.
const GREETING: Duration = Duration::from_secs(2);

/// What a forced quorum would begin, or has begun, with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forced {
    /// The new generation's number.
    pub generation: u64,
    /// For how long this node has heard no coordinator.
    pub unheard: Duration,
    /// Term and index of the last entry that this node's log has.
    pub log_end: (u64, u64),
    /// The nodes that do not come along.
    pub left_out: Vec<String>,
    /// How long until this node coordinates: leases that others granted end first.
    pub wait: Duration,
}

impl Agent {
    /// Makes this node the only voter, by its own log, under a new generation. With
    /// `others_are_off` it is done: this agent ends and its successor goes on alone.
    /// Without, it only tells.
    ///
    /// # Errors
    /// There is a quorum; a node that is left out answers; one that comes along knows
    /// more; the name is another cluster's; a node is not known; the
    /// disk refuses it. Nothing has changed then.
    pub async fn force_quorum(
        &self,
        by: &str,
        cluster: &str,
        with: &[String],
        others_are_off: bool,
    ) -> Result<Forced, Failure> {
        let member = self.member()?;
        let state = self.state();
        if cluster != state.cluster.name {
            let text = format!("this cluster is {:?}, not {cluster:?}: nothing was done", state.cluster.name);
            return Err(Refusal::Invalid(text).into());
        }
        if !state.nodes.contains_key(&member.me) {
            return Err(Failure::other("conflict", "this node was removed from the cluster: nothing was done"));
        }
        let mut along = BTreeSet::new();
        for name in with {
            let node =
                state.node_named(name).ok_or_else(|| Refusal::Unknown { what: "node".into(), name: name.clone() })?;
            along.insert(node.id);
        }
        if member.consensus.barrier().await.is_ok() {
            let text = "the cluster has a quorum, so none has to be forced: nothing was done. `holdfast quorum show` says who votes";
            return Err(Refusal::Conflict(text.into()).into());
        }
        let log_end = member.consensus.log_end();
        let asked = state.nodes.values().filter(|node| node.id != member.me);
        let asked = asked.map(|node| async move { (node, member.peers.ask(node.id, rpc::GREET, &(), GREETING).await) });
        for (node, answer) in join_all(asked).await {
            let (name, Ok(theirs)): (_, Result<(u64, u64), _>) = (&node.name, answer) else { continue };
            if !along.contains(&node.id) {
                let text = format!(
                    "{name} answers, so it is not switched off: nothing was done. Switch it off, or take it along with `--with \
                     {name}`"
                );
                return Err(Refusal::Conflict(text).into());
            }
            if theirs > log_end {
                let text = format!("{name} knows more than this node: nothing was done. Force the quorum there");
                return Err(Refusal::Conflict(text).into());
            }
        }
        let out = state.nodes.values().filter(|node| node.id != member.me && !along.contains(&node.id));
        let longest = LeaseTiming::lost_after_ms(state.settings.longest_lease)
            .max(state.settings.profile.timing().lost_after_ms());
        let forced = Forced {
            generation: member.allegiance.generation().number + 1,
            unheard: member.consensus.unheard_for(),
            log_end,
            left_out: out.map(|node| node.name.clone()).collect(),
            wait: Duration::from_millis(longest),
        };
        if others_are_off {
            let generation = Generation { number: forced.generation, mark: Uuid::new_v4() };
            let command = Command::ForceQuorum { generation, node: member.me, with: along };
            let proposal = Proposal { id: RequestId(Uuid::new_v4()), at_ms: now_ms(), by: by.to_owned(), command };
            tracing::error!(%by, %generation, "forces a quorum");
            member.allegiance.force(generation, proposal, forced.wait).map_err(broken)?;
        }
        Ok(forced)
    }
}
