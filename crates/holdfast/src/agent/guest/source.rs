//! Both ends of a live migration on this node (safety rule 3).
//!
//! The order in the guest's blackout, with no commit in it: the source's guest
//! stands still, the source's QEMU says for good that it has sent everything, the
//! source's agent tells the target's agent, which continues the guest. All that can
//! wait does: where the guest is now is reported when it has run for a moment.

use std::net::IpAddr;
use std::time::Duration;

use holdfast_core::*;
use holdfast_qemu::{
    Arrival, Begun, MigrationProgress, MigrationSettings, Outcome, Qmp, Role, Step, Word, cancel, prepare_incoming,
    progress, start, watch, word,
};
use tokio::time::Instant;

use super::super::guests::Waiting;
use super::super::rpc::{HandedOver, HandoverCall, continue_path};
use super::{Guest, Next, SOON, Wish};

const CALL: Duration = Duration::from_secs(2);
/// Between two attempts to reach the target while the guest stands still.
const CALL_AGAIN: Duration = Duration::from_millis(20);
/// A migration that is over before tells no progress: agreeing on it would take
/// time from what it tells of.
const TELL_AFTER: Duration = Duration::from_millis(250);

impl Guest {
    /// The target: waits for the guest, and for the source's word to continue it.
    pub(super) async fn receive(&mut self, tenure: Tenure, from: NodeId, source_void: bool) -> anyhow::Result<Next> {
        let epoch = tenure.epoch;
        let qmp = match self.monitor(epoch).await {
            Ok(qmp) => qmp,
            Err(error) if error.is_gone() => return Ok(Next::Soon(SOON)),
            Err(error) => return Err(error.into()),
        };
        match word(&qmp, Role::Target).await? {
            Word::Runs => {
                self.say(epoch, Run::Running);
                Ok(Next::Wait)
            }
            // Without the source's word nobody knows whether the guest that is here is
            // the last of it: the source may have gone on after it sent this, written
            // to the disks, and been fenced then. So it is started anew.
            Word::Waiting | Word::InFlight | Word::Arrived if source_void => {
                self.agent.0.keeper.kill(self.vm, epoch).await?;
                Ok(Next::Soon(Duration::ZERO))
            }
            Word::InFlight | Word::Arrived => {
                // An agent that was started meanwhile takes the source's calls, too.
                if self.member.guests.waiting(self.vm, epoch).is_none() {
                    self.expect(&qmp, epoch);
                }
                Ok(Next::Wait)
            }
            Word::Waiting => {
                if self.member.guests.waiting(self.vm, epoch).is_none() {
                    let address = self.get_ready(&qmp, epoch, from).await?;
                    self.say(epoch, Run::Waiting { address });
                }
                Ok(Next::Wait)
            }
            Word::Failed | Word::Kept | Word::Sent | Word::Unclear { .. } => {
                self.agent.0.keeper.kill(self.vm, epoch).await?;
                Ok(Next::Soon(Duration::ZERO))
            }
        }
    }

    async fn get_ready(&self, qmp: &Qmp, epoch: Epoch, from: NodeId) -> anyhow::Result<String> {
        let state = self.agent.state();
        let address = migration_address(&state, self.member.me, from).ok_or_else(|| {
            anyhow::anyhow!("no network that may carry migrations joins this node and {}", state.node_name(from))
        })?;
        let listens = prepare_incoming(qmp, address, &MigrationSettings::default()).await?;
        self.expect(qmp, epoch);
        Ok(listens.to_string())
    }

    /// From now on the source's calls find the QEMU that waits for the guest.
    fn expect(&self, qmp: &Qmp, epoch: Epoch) {
        let arrival = Arrival::expect(qmp);
        self.member.guests.set_waiting(self.vm, Some(Waiting { epoch, arrival }));
    }

    /// The source: sends the guest, and when it is sent has it continued there.
    pub(super) async fn send(
        &mut self,
        tenure: Tenure,
        to: Tenure,
        address: &str,
        give_up: bool,
    ) -> anyhow::Result<Next> {
        let epoch = tenure.epoch;
        let qmp = match self.monitor(epoch).await {
            Ok(qmp) => qmp,
            Err(error) if error.is_gone() => return Ok(Next::Soon(SOON)),
            Err(error) => return Err(error.into()),
        };
        let mut began = None;
        match word(&qmp, Role::Source).await? {
            Word::Sent => return self.hand_over(tenure, to, None).await,
            Word::Kept if give_up => {
                self.say(epoch, Run::Kept { why: "it was given up before it began".into() });
                return Ok(Next::Wait);
            }
            // This attempt is over; what it left behind stays said.
            Word::Kept if self.begun == Some(to.epoch) => return Ok(Next::Wait),
            Word::Kept => {
                let settings = MigrationSettings::default();
                let target = address.parse()?;
                self.begun = Some(to.epoch);
                self.get_in_touch(to.node);
                match start(&qmp, target, &settings).await {
                    Ok(begun) => began = begun,
                    Err(error) => {
                        self.say(epoch, Run::Kept { why: error.to_string() });
                        return Ok(Next::Wait);
                    }
                }
            }
            Word::InFlight => {}
            other => anyhow::bail!("the source of a migration is in an unexpected state: {other:?}"),
        }
        self.follow(&qmp, tenure, to, began).await
    }

    /// Connects to the target: while the guest stands still there is no time for that.
    fn get_in_touch(&self, target: NodeId) {
        let member = self.member;
        tokio::spawn(async move {
            if let Err(error) = member.peers.reach(target, CALL).await {
                tracing::warn!(node = %target, %error, "the target of a migration");
            }
        });
    }

    /// Follows a migration to its end, and gives it up when that is wished.
    async fn follow(&mut self, qmp: &Qmp, tenure: Tenure, to: Tenure, began: Option<Begun>) -> anyhow::Result<Next> {
        let settings = MigrationSettings::default();
        let (member, vm, epoch) = (self.member, self.vm, tenure.epoch);
        let tell_from = Instant::now() + TELL_AFTER;
        let on = |step: Step| match step {
            Step::Progress(progress) if !progress.status.is_over() && Instant::now() >= tell_from => {
                member.reports.say_vm(vm, epoch, Run::Sending { progress: told(&progress) });
            }
            _ => {}
        };
        let mut changes = self.agent.changes();
        let mut given_up = false;
        let watching = watch(qmp, &settings, began, on);
        tokio::pin!(watching);
        let outcome = loop {
            let give_up = matches!(
                self.wish(),
                Wish::Send { cancel, target_void, .. } if cancel || target_void
            );
            if give_up && !given_up {
                given_up = true;
                // What comes of it, the watch tells.
                cancel(qmp).await?;
            }
            tokio::select! {
                outcome = &mut watching => break outcome,
                changed = changes.changed() => changed?,
            }
        };
        match outcome {
            Ok(Outcome::Completed { mut total, mut downtime }) => {
                // QEMU says that it is done before it has added up how long that took.
                if total.is_zero()
                    && let Ok(added_up) = progress(qmp).await
                {
                    (total, downtime) = (added_up.total_time(), added_up.downtime());
                }
                let moved = Moved { total_ms: total.as_millis() as u64, downtime_ms: downtime.as_millis() as u64 };
                self.hand_over(tenure, to, Some(moved)).await
            }
            Ok(Outcome::Cancelled) => self.kept(qmp, tenure, "it was cancelled".into()).await,
            Ok(Outcome::Failed { reason, guest_still_here: true }) => self.kept(qmp, tenure, reason).await,
            // Not decided yet, or QEMU is gone: look again.
            Ok(Outcome::Failed { .. }) => Ok(Next::Soon(SOON)),
            Err(error) if error.is_gone() => Ok(Next::Soon(SOON)),
            Err(error) => Err(error.into()),
        }
    }

    /// The guest stays: its frames have to come here again.
    async fn kept(&self, qmp: &Qmp, tenure: Tenure, why: String) -> anyhow::Result<Next> {
        if let Err(error) = qmp.announce_self(3, Duration::from_millis(50)).await {
            tracing::warn!(vm = %self.vm, %error, "its hardware address was not announced again");
        }
        self.say(tenure.epoch, Run::Kept { why });
        Ok(Next::Wait)
    }

    /// The guest is sent and stands still: its target has to continue it, and
    /// nothing else is worth doing before that.
    async fn hand_over(&self, tenure: Tenure, to: Tenure, moved: Option<Moved>) -> anyhow::Result<Next> {
        let parts = self.agent.mapped_here(self.member, self.vm, tenure.epoch);
        let call = HandoverCall { epoch: to.epoch, moved, parts };
        let path = continue_path(self.vm);
        let began = Instant::now();
        let mut changes = self.agent.changes();
        let waits = || matches!(self.wish(), Wish::Send { target_void: false, .. });
        loop {
            let asking = self.member.peers.ask::<_, HandedOver>(to.node, &path, &call, CALL);
            tokio::pin!(asking);
            // What is decided meanwhile ends the waiting for an answer: either the
            // target was seen to run the guest, or it is lost.
            let answer = loop {
                tokio::select! {
                    answer = &mut asking => break Some(answer),
                    changed = changes.changed() => changed?,
                }
                if !waits() {
                    break None;
                }
            };
            match answer {
                None => {}
                Some(Ok(HandedOver::Done)) => return Ok(Next::Wait),
                Some(Ok(HandedOver::Gone)) => {
                    tracing::error!(vm = %self.vm, "the target lost the guest after it was sent");
                    self.agent.0.keeper.kill(self.vm, tenure.epoch).await?;
                    return Ok(Next::Soon(Duration::ZERO));
                }
                Some(Ok(HandedOver::Again(why))) => {
                    tracing::debug!(vm = %self.vm, why, "the target does not continue the guest yet")
                }
                Some(Err(error)) => {
                    tracing::warn!(vm = %self.vm, %error, waited = ?began.elapsed(), "the target of a sent guest")
                }
            }
            // Nobody needs to know of it but when it takes long.
            self.say(tenure.epoch, Run::Sent);
            match self.wish() {
                Wish::Send { target_void: false, .. } => tokio::time::sleep(CALL_AGAIN).await,
                // The target is lost with the guest: nothing of it may stay here.
                Wish::Send { target_void: true, .. } => {
                    self.agent.0.keeper.kill(self.vm, tenure.epoch).await?;
                    return Ok(Next::Soon(Duration::ZERO));
                }
                _ => return Ok(Next::Soon(Duration::ZERO)),
            }
        }
    }
}

fn told(progress: &MigrationProgress) -> Progress {
    let ram = &progress.ram;
    Progress {
        percent: (progress.fraction() * 100.0) as u8,
        note: format!("{} MiB of {} MiB left, pass {}", ram.remaining_bytes >> 20, ram.total_bytes >> 20, ram.passes),
    }
}

/// This node's address on the best network that may carry migrations and that
/// both nodes are on.
fn migration_address(state: &ClusterState, me: NodeId, other: NodeId) -> Option<IpAddr> {
    let (mine, theirs) = (state.nodes.get(&me)?, state.nodes.get(&other)?);
    let shared = |address: &&NodeAddress| theirs.facts.addresses.iter().any(|their| subnet(their) == subnet(address));
    let on_network = |address: &NodeAddress| {
        let network = state.networks.get(&subnet(address))?;
        // One that carries nothing else comes first.
        network.roles.migration.then_some((network.roles.cluster, network.metric, address.ip))
    };
    mine.facts.addresses.iter().filter(shared).filter_map(on_network).min().map(|(.., ip)| ip)
}
