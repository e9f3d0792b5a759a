//! Where the witness should sit, and what the nodes say of it.

use std::collections::BTreeSet;

use crate::model::*;
use crate::plan::Action;
use crate::quorum::witness_host;
use crate::witness::HOSTS;

use super::Planner;

/// Whoever took over keeps the witness for so long before it is asked to give it
/// back, in milliseconds: a host that comes and goes does not drag it along.
const BACK_AFTER_MS: u64 = 10_000;

impl Planner<'_> {
    pub(super) fn witness(&mut self) {
        let Some(attendance) = self.observed.attendance.as_ref() else { return };
        let Some(witness) = self.state.witness.clone() else { return };
        let mut unfit: BTreeSet<NodeId> = attendance.silent.clone();
        for (id, seen) in &self.observed.nodes {
            let node = self.state.nodes.get(id);
            let Some(report) = node.and_then(|node| seen.report_in_term(node)) else { continue };
            let Some(said) = report.witness.as_ref().filter(|said| said.id == witness.id) else { continue };
            if said.trouble.as_ref() != witness.trouble.get(id) {
                let action = Action::WitnessTrouble { node: *id, why: said.trouble.clone() };
                self.decide(action, Cause::Told { node: *id });
            }
            if let Some(epoch) = said.hosts_since.filter(|epoch| *epoch > witness.epoch) {
                self.decide(Action::WitnessHosted { node: *id, epoch }, Cause::Told { node: *id });
            }
            if said.trouble.is_some() {
                unfit.insert(*id);
            }
        }
        unfit.extend(self.state.nodes.keys().filter(|id| id.0 > HOSTS));
        let Some(witness) = self.state.witness.clone() else { return };
        let Some(host) = witness_host(&self.state, attendance.coordinator, &unfit) else { return };
        let strayed = witness.hosted_by.is_some_and(|by| by != host);
        let back = strayed && self.now_ms.saturating_sub(witness.decided_ms) >= BACK_AFTER_MS;
        if witness.host != Some(host) || back {
            let cause = match host == attendance.coordinator {
                true => Cause::NobodyElse { coordinator: host },
                false => Cause::BesideCoordinator { coordinator: attendance.coordinator },
            };
            self.decide(Action::SeatWitness { host }, cause);
        }
    }
}
