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
/// It is asked again after twice as long each time, up to eleven minutes.
const MOST_DOUBLINGS: u32 = 6;

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
            // Those that were away would take an old copy for the disk itself.
            let known = self.state.witness.as_ref().map_or(witness.missing, |witness| witness.missing);
            if let Some(seen) = said.missing.filter(|seen| *seen > known) {
                self.decide(Action::WitnessMissing { node: *id, seen }, Cause::Told { node: *id });
            }
            if let Some(epoch) = said.hosts_since.filter(|epoch| *epoch > witness.epoch) {
                self.decide(Action::WitnessHosted { node: *id, epoch }, Cause::Told { node: *id });
            }
            if said.trouble.is_some() {
                unfit.insert(*id);
            }
        }
        unfit.extend(self.state.nodes.keys().filter(|id| id.0 > HOSTS));
        // It moves only to a node that is there for certain: a coordinator that was
        // just elected with the witness's vote has heard of nobody else yet, and would
        // lose its majority with it.
        let stays = |id: &NodeId| witness.host == Some(*id) || attendance.present.contains(id);
        unfit.extend(self.state.nodes.keys().filter(|id| !stays(id)));
        let Some(witness) = self.state.witness.clone() else { return };
        let Some(host) = witness_host(&self.state, attendance.coordinator, &unfit) else { return };
        // One that cannot use the disk is named when nobody can; asking again is no use.
        let strayed = witness.hosted_by.is_some_and(|by| by != host) && !unfit.contains(&host);
        // Whoever should have it was silent when another took over, and may be dead:
        // giving it back at once would give the majority away with it. Each time that
        // comes to nothing, as with a disk that nobody can use, it waits twice as long.
        // Counted, not read off clocks: those of two coordinators may be hours apart.
        let wait_ms = BACK_AFTER_MS << witness.asked.saturating_sub(1).min(MOST_DOUBLINGS);
        let long_ago = |at_ms: u64| self.now_ms.abs_diff(at_ms) >= wait_ms;
        let back = strayed && long_ago(witness.decided_ms) && long_ago(witness.hosted_ms);
        if witness.host != Some(host) || back {
            let cause = match host == attendance.coordinator {
                true => Cause::NobodyElse { coordinator: host },
                false => Cause::BesideCoordinator { coordinator: attendance.coordinator },
            };
            self.decide(Action::SeatWitness { host }, cause);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::check;
    use crate::observed::{Attending, NodeObserved, NodeReport, Observed, WitnessReport};
    use crate::plan::plan;
    use crate::quorum::tests::{WITNESS, cluster};
    use crate::state::ClusterState;

    const ONE: NodeId = NodeId(1);
    const TWO: NodeId = NodeId(2);

    fn observed(coordinator: NodeId, present: &[NodeId]) -> Observed {
        let attendance = Attending { coordinator, present: present.iter().copied().collect(), ..Attending::default() };
        Observed { attendance: Some(attendance), ..Observed::default() }
    }

    fn actions(state: &ClusterState, observed: &Observed, now_ms: u64) -> Vec<Action> {
        let plan = plan(state, observed, now_ms);
        check(state, &plan).expect("the plan breaks no rule");
        plan.decisions.into_iter().map(|decision| decision.action).collect()
    }

    fn hosted_by(node: NodeId) -> ClusterState {
        let mut state = cluster(&["-", "-"], true);
        if let Some(witness) = &mut state.witness {
            (witness.host, witness.hosted_by, witness.epoch) = (Some(node), Some(node), 1);
        }
        state
    }

    #[test]
    fn it_sits_beside_the_coordinator() {
        let new = cluster(&["-", "-"], true);
        assert_eq!(actions(&new, &observed(ONE, &[TWO]), 0), [Action::SeatWitness { host: TWO }]);
        assert_eq!(actions(&hosted_by(TWO), &observed(ONE, &[TWO]), 0), []);
        assert_eq!(actions(&hosted_by(ONE), &observed(ONE, &[TWO]), 0), [Action::SeatWitness { host: TWO }]);
    }

    #[test]
    fn a_coordinator_that_was_elected_with_it_keeps_it_until_it_hears_another() {
        let state = hosted_by(TWO);
        assert_eq!(actions(&state, &observed(TWO, &[]), 0), [], "node 1 may be dead");
        assert_eq!(actions(&state, &observed(TWO, &[ONE]), 0), [Action::SeatWitness { host: ONE }]);
    }

    #[test]
    fn who_took_it_over_does_not_give_it_back_to_one_that_may_be_dead() {
        let mut state = hosted_by(TWO);
        let mut observed = observed(ONE, &[TWO]);
        let node = &state.nodes[&ONE];
        let said = WitnessReport { id: WITNESS, hosts_since: Some(2), ..WitnessReport::default() };
        let report =
            NodeReport { incarnation: node.incarnation, term: node.term, witness: Some(said), ..NodeReport::default() };
        observed.nodes.insert(ONE, NodeObserved { report: Some(report), ..NodeObserved::default() });
        let now_ms = 1_000_000;
        for decision in plan(&state, &observed, now_ms).decisions {
            assert_eq!(decision.action, Action::WitnessHosted { node: ONE, epoch: 2 });
            state.decide(now_ms, &decision);
        }
        assert_eq!(actions(&state, &observed, now_ms + BACK_AFTER_MS - 1), []);
        let back = Action::SeatWitness { host: TWO };
        assert_eq!(actions(&state, &observed, now_ms + BACK_AFTER_MS), [back]);
    }

    #[test]
    fn who_does_not_take_it_is_asked_more_and_more_seldom() {
        let mut state = hosted_by(ONE);
        let observed = observed(ONE, &[TWO]);
        let mut asked = Vec::new();
        for now_ms in (0..1_000_000).step_by(1_000) {
            for decision in plan(&state, &observed, now_ms).decisions {
                assert_eq!(decision.action, Action::SeatWitness { host: TWO });
                state.decide(now_ms, &decision);
                asked.push(now_ms / 1_000);
            }
        }
        assert_eq!(asked, [0, 10, 30, 70, 150, 310, 630]);
    }

    #[test]
    fn a_clock_that_was_wrong_once_does_not_have_it_asked_for_ever() {
        let mut state = hosted_by(ONE);
        if let Some(witness) = &mut state.witness {
            // Told by a coordinator whose clock was an hour ahead.
            witness.hosted_ms = 3_600_000;
        }
        let observed = observed(ONE, &[TWO]);
        let mut asked = 0;
        for now_ms in (0..600_000).step_by(1_000) {
            for decision in plan(&state, &observed, now_ms).decisions {
                state.decide(now_ms, &decision);
                asked += 1;
            }
        }
        assert_eq!(asked, 6);
    }

    #[test]
    fn what_one_node_misses_on_the_disk_is_agreed_on() {
        let mut state = hosted_by(TWO);
        let mut observed = observed(ONE, &[TWO]);
        let node = &state.nodes[&TWO];
        let seen = crate::witness::Memory { epoch: 1, counter: 9 };
        let trouble = Some("shows less".to_owned());
        let said = WitnessReport { id: WITNESS, hosts_since: None, trouble: trouble.clone(), missing: Some(seen) };
        let report =
            NodeReport { incarnation: node.incarnation, term: node.term, witness: Some(said), ..NodeReport::default() };
        observed.nodes.insert(TWO, NodeObserved { report: Some(report), ..NodeObserved::default() });
        let told = [
            Action::WitnessTrouble { node: TWO, why: trouble },
            Action::WitnessMissing { node: TWO, seen },
            Action::SeatWitness { host: ONE },
        ];
        assert_eq!(actions(&state, &observed, 0), told);
        for decision in plan(&state, &observed, 0).decisions {
            state.decide(0, &decision);
        }
        assert_eq!(state.witness.as_ref().map(|witness| witness.missing), Some(seen), "so node 1 does not host it");
        assert_eq!(actions(&state, &observed, 0), []);
    }

    #[test]
    fn what_nodes_say_is_told_once_and_a_node_that_cannot_use_the_disk_does_not_host() {
        let mut state = hosted_by(TWO);
        let mut observed = observed(ONE, &[TWO]);
        let node = &state.nodes[&TWO];
        let trouble = Some("cannot read it".into());
        let said = WitnessReport { id: WITNESS, hosts_since: Some(4), trouble, missing: None };
        let report =
            NodeReport { incarnation: node.incarnation, term: node.term, witness: Some(said), ..NodeReport::default() };
        observed.nodes.insert(TWO, NodeObserved { report: Some(report), ..NodeObserved::default() });
        let trouble = Action::WitnessTrouble { node: TWO, why: Some("cannot read it".into()) };
        let hosts = Action::WitnessHosted { node: TWO, epoch: 4 };
        let moves = Action::SeatWitness { host: ONE };
        assert_eq!(actions(&state, &observed, 0), [trouble, hosts, moves]);
        for decision in plan(&state, &observed, 0).decisions {
            state.decide(0, &decision);
        }
        assert_eq!(actions(&state, &observed, 0), []);
        // Node 2 still hosts it: it is asked again, but not at once.
        assert_eq!(actions(&state, &observed, BACK_AFTER_MS), [Action::SeatWitness { host: ONE }]);
    }
}
