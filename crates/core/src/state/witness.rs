//! The witness: which disk, who hosts it, and what is wrong with it.

use uuid::Uuid;

use crate::model::*;

use super::commands::Executed;
use super::{ClusterState, Refusal, Reply};

const SUBJECT: &str = "witness";

impl ClusterState {
    pub(super) fn set_witness(&mut self, at_ms: u64, by: &str, disk: String, mark: Uuid) -> Executed {
        if !disk.starts_with('/') {
            return Err(Refusal::Invalid(format!("{disk:?} is no absolute path: name the disk as every node sees it")));
        }
        if self.witness.as_ref().is_some_and(|witness| witness.disk == disk) {
            return Err(Refusal::Conflict(format!(
                "{disk} is the witness already: to make it anew, give it up first (`holdfast quorum witness set --none`)"
            )));
        }
        self.last_witness += 1;
        let witness = Witness::new(NodeId::witness(self.last_witness), disk, mark);
        self.event(at_ms, Severity::Info, SUBJECT, format!("{by} set it to {}", witness.disk));
        if let Some(before) = self.witness.replace(witness) {
            self.former_witness = Some(before);
        }
        Ok(Reply::Done)
    }

    pub(super) fn clear_witness(&mut self, at_ms: u64, by: &str) -> Executed {
        let Some(before) = self.witness.take() else {
            return Err(Refusal::Conflict("there is no witness".into()));
        };
        self.event(at_ms, Severity::Info, SUBJECT, format!("{by} gave up the one on {}", before.disk));
        self.former_witness = Some(before);
        Ok(Reply::Done)
    }

    pub(super) fn seat_witness(&mut self, at_ms: u64, host: NodeId) {
        if let Some(witness) = &mut self.witness {
            witness.host = Some(host);
            witness.decided += 1;
            witness.decided_ms = at_ms;
            witness.asked = witness.asked.saturating_add(1);
        }
    }

    pub(super) fn witness_hosted(&mut self, at_ms: u64, host: NodeId, epoch: u64) {
        let name = self.node_name(host);
        let Some(witness) = &mut self.witness else { return };
        let moved = witness.hosted_by != Some(host);
        witness.hosted_by = Some(host);
        witness.hosted_ms = at_ms;
        witness.asked = 0;
        witness.epoch = witness.epoch.max(epoch);
        if moved {
            self.event(at_ms, Severity::Info, SUBJECT, format!("is hosted by {name} (epoch {epoch})"));
        }
    }

    pub(super) fn witness_trouble(&mut self, at_ms: u64, node: NodeId, why: Option<&String>) {
        let name = self.node_name(node);
        let Some(witness) = &mut self.witness else { return };
        let (severity, text) = match why {
            Some(why) => {
                witness.trouble.insert(node, why.clone());
                (Severity::Warning, format!("{name} {why}"))
            }
            None => {
                witness.trouble.remove(&node);
                (Severity::Info, format!("{name} can use its disk again"))
            }
        };
        self.event(at_ms, severity, SUBJECT, text);
    }
}
