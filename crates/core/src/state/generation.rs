//! What a forced quorum does to the state.
//!
//! The node that goes on may not have heard of the last things that were agreed on
//! before: who was admitted, which epochs were given, which hosts joined. So that
//! nothing of that is given out a second time, every counter takes a leap.

use std::collections::BTreeSet;

use crate::model::*;

use super::commands::Executed;
use super::{ClusterState, Refusal, Reply};

/// How far terms of nodes and epochs of VMs leap: more than can have been missed.
const LEAP: u64 = 1 << 20;
/// How far the numbers of hosts and witnesses leap: those are few, and small numbers.
const SHORT_LEAP: u64 = 16;

impl ClusterState {
    pub(super) fn force_quorum(
        &mut self,
        at_ms: u64,
        by: &str,
        generation: Generation,
        id: NodeId,
        with: &BTreeSet<NodeId>,
    ) -> Executed {
        if generation.number <= self.generation.number {
            return Err(Refusal::Conflict(format!("generation {} is past already", generation.number)));
        }
        let name = self.nodes.get(&id).ok_or_else(|| Refusal::unknown("node", id))?.name.clone();
        self.generation = generation;
        self.last_node.0 += SHORT_LEAP;
        self.last_witness += SHORT_LEAP;
        for node in self.nodes.values_mut() {
            // All rights are void. Whoever forced the quorum has waited until no lease
            // is out any more, and has been told that the others do not run.
            node.term.0 += LEAP;
            node.membership = Membership::Lost { since_ms: at_ms };
        }
        for vm in self.vms.values_mut() {
            vm.last_epoch.0 += LEAP;
        }
        // What others have written on LUNs meanwhile is overwritten.
        for lun in self.luns.values_mut() {
            lun.revision += LEAP;
            lun.journal.epoch += LEAP;
            lun.journal.writer = None;
        }
        self.voters = BTreeSet::from([id]);
        let left_out: Vec<_> =
            self.nodes.keys().filter(|other| **other != id && !with.contains(other)).copied().collect();
        let left_out = match left_out.is_empty() {
            true => "no node is left out".to_owned(),
            false => {
                let names: Vec<_> = left_out.into_iter().map(|node| self.node_name(node)).collect();
                format!("left out, on the word that they are switched off: {}", names.join(", "))
            }
        };
        let witness = match self.witness.take() {
            Some(_) => "; the witness is given up, set it anew",
            None => "",
        };
        let text = format!(
            "{by} forced a quorum on {name}, which goes on alone by its own log as generation {}; {left_out}{witness}",
            generation.number
        );
        self.event(at_ms, Severity::Error, "quorum", text);
        Ok(Reply::Done)
    }
}
