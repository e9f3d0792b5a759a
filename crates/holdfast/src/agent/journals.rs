//! The descriptions of files on LUNs that this node has to keep true: has the volume
//! server write each as it is agreed on, and tells the cluster how far it is.

use std::collections::BTreeMap;
use std::time::Duration;

use holdfast_core::*;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::serving::CallError;
use super::{Agent, Member};
use crate::volume::protocol::{Call, Description, Known};

/// How long one change of a description may take.
const WRITE_WITHIN: Duration = Duration::from_secs(30);
/// Between two changes: a guest that fills its disk makes one in this time.
const PACE: Duration = Duration::from_millis(500);
/// Between two attempts.
const AGAIN: Duration = Duration::from_secs(1);
/// So many attempts may fail before the cluster is told.
const QUIET_FAILURES: u32 = 3;
/// What stands in the way of a claim may end without a change of the state.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// What is to be done about one description.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Claim,
    Write,
    End,
    Wait,
}

/// What the volume server was told last: the epoch and the revision.
type Told = Option<(u64, u64)>;

fn step(state: &ClusterState, volume: &str, me: Writer, told: Told) -> Step {
    let Some(lun) = state.luns.get(volume) else { return Step::Wait };
    let ours = lun.journal.writer == Some(me);
    match state.may_claim_journal(volume, me) {
        Err(_) if ours => Step::End,
        Err(_) => Step::Wait,
        Ok(()) if !ours => Step::Claim,
        Ok(()) if lun.journal.repair || told != Some((lun.journal.epoch, lun.revision)) => Step::Write,
        Ok(()) => Step::Wait,
    }
}

impl Agent {
    /// Keeps a task for each LUN, so that one that hangs holds up no other.
    pub(super) async fn keep_journals(self, member: &'static Member) {
        let mut changes = self.changes();
        let mut tasks = BTreeMap::<Uuid, JoinHandle<()>>::new();
        loop {
            tasks.retain(|_, task| !task.is_finished());
            let state = changes.borrow_and_update().clone();
            for volume in state.luns.keys().filter_map(|name| state.volumes.get(name)) {
                tasks.entry(volume.id).or_insert_with(|| tokio::spawn(self.clone().keep_journal(member, volume.id)));
            }
            drop(state);
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Until the volume is gone.
    async fn keep_journal(self, member: &'static Member, id: Uuid) {
        let mut changes = self.changes();
        let (mut told, mut failures) = (None, 0);
        loop {
            let state = changes.borrow_and_update().clone();
            let Some(volume) = state.volume_named_by(id).cloned() else {
                if let Some((epoch, _)) = told {
                    self.end_description(member, id, epoch).await;
                }
                return;
            };
            let me = Writer { node: member.me, term: self.0.keeper.watch().borrow().term };
            match step(&state, &volume, me, told) {
                Step::Wait => {
                    let _ = timeout(LOOK_AGAIN, changes.changed()).await;
                }
                Step::Claim => {
                    let claim = Command::ClaimJournal { volume: volume.clone(), writer: me };
                    if let Err(error) = self.execute(&member.by(), claim).await {
                        tracing::debug!(%error, volume, "its description is not claimed");
                        sleep(AGAIN).await;
                    }
                }
                Step::Write => match self.describe(member, &state, &volume, id).await {
                    Ok(now) => {
                        (told, failures) = (Some(now), 0);
                        self.tell_written(member, &state, &volume, me, now).await;
                        sleep(PACE).await;
                    }
                    Err(error) => {
                        failures += 1;
                        let why = format!("{error:#}");
                        tracing::warn!(volume, error = why, "it is not described on its LUN");
                        let known = state.luns.get(&volume).and_then(|lun| lun.journal.trouble.clone());
                        if failures >= QUIET_FAILURES && known.as_ref() != Some(&why) {
                            self.tell_outcome(member, &volume, me, Err(why), false, false).await;
                        }
                        sleep(AGAIN).await;
                    }
                },
                Step::End => {
                    let Some(lun) = state.luns.get(&volume) else { continue };
                    if self.end_description(member, id, lun.journal.epoch).await {
                        let written = lun.journal.written;
                        self.tell_outcome(member, &volume, me, Ok(written), false, true).await;
                        told = None;
                    }
                    sleep(AGAIN).await;
                }
            }
        }
    }

    /// Says what of the LUN's files is agreed on; returns when it stands there.
    async fn describe(
        &self,
        member: &'static Member,
        state: &ClusterState,
        volume: &str,
        id: Uuid,
    ) -> anyhow::Result<(u64, u64)> {
        let (Some(lun), Some(known)) = (state.luns.get(volume), state.volumes.get(volume)) else {
            anyhow::bail!("it was removed");
        };
        let VolumeKind::Lun { device, slab_bytes, .. } = &known.kind else { anyhow::bail!("it is no LUN") };
        let made = Known { slab_bytes: *slab_bytes, slabs: lun.slabs, made_ms: known.added_ms };
        let description = Description {
            volume: volume.to_owned(),
            volume_id: id,
            cluster: state.cluster.id,
            device: member.serving.device(id).unwrap_or_else(|| device.into()),
            epoch: lun.journal.epoch,
            revision: lun.revision,
            files: lun.named_files().map(|(name, file)| (name.clone(), (file.bytes, file.parts.clone()))).collect(),
            repair: lun.journal.repair.then_some(made),
        };
        self.line(member).await?.call(Call::Describe(description), WRITE_WITHIN).await?;
        Ok((lun.journal.epoch, lun.revision))
    }

    /// `true` if nothing of it is under way any more.
    async fn end_description(&self, member: &'static Member, id: Uuid, epoch: u64) -> bool {
        let end = Call::EndDescription { volume_id: id, epoch };
        let ended = match self.line(member).await {
            Ok(line) => line.call(end, WRITE_WITHIN).await,
            Err(error) => Err(CallError::Unknown(error)),
        };
        if let Err(error) = &ended {
            tracing::debug!(volume = %id, error = format!("{error:#}"), "its description may still be open here");
        }
        ended.is_ok()
    }

    /// Tells the cluster that a description is written, if anything waits for that.
    async fn tell_written(
        &self,
        member: &'static Member,
        state: &ClusterState,
        volume: &str,
        me: Writer,
        (_, revision): (u64, u64),
    ) {
        let Some(lun) = state.luns.get(volume) else { return };
        let repaired = lun.journal.repair;
        if repaired || lun.journal.trouble.is_some() || !lun.freed.is_empty() {
            self.tell_outcome(member, volume, me, Ok(revision), repaired, false).await;
        }
    }

    async fn tell_outcome(
        &self,
        member: &'static Member,
        volume: &str,
        writer: Writer,
        outcome: Result<u64, String>,
        repaired: bool,
        ends: bool,
    ) {
        let written = Command::JournalWritten { volume: volume.to_owned(), writer, outcome, repaired, ends };
        if let Err(error) = self.execute(&member.by(), written).await {
            tracing::debug!(%error, volume, "what became of its description is not known to the cluster");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: Writer = Writer { node: NodeId(1), term: NodeTerm(1) };

    fn state(writer: Option<Writer>) -> ClusterState {
        let mut state = ClusterState::default();
        for number in 1..=2 {
            let node = Node {
                id: NodeId(number),
                name: format!("n{number}"),
                port: 0,
                heartbeat_port: 0,
                heartbeat_key: [0; 32],
                membership: Membership::Up,
                term: NodeTerm(1),
                incarnation: Incarnation(1),
                facts: NodeFacts::default(),
                joined_ms: 0,
                site: None,
                drained_ms: None,
                leaves: false,
            };
            state.nodes.insert(node.id, node);
        }
        let mut lun = Lun::new(16 << 20, 20);
        (lun.journal.writer, lun.journal.epoch, lun.revision) = (writer, 3, 7);
        state.luns.insert("san".into(), lun);
        state
    }

    #[test]
    fn a_description_is_claimed_written_when_it_changes_and_ended() {
        let other = Writer { node: NodeId(2), ..ME };
        assert_eq!(step(&state(None), "san", ME, None), Step::Claim);
        assert_eq!(step(&state(Some(Writer { term: NodeTerm(0), ..ME })), "san", ME, None), Step::Claim);
        assert_eq!(step(&state(Some(other)), "san", ME, None), Step::Wait, "it writes still");
        assert_eq!(step(&state(Some(other)), "san", other, Some((3, 7))), Step::End);
        let ours = state(Some(ME));
        for (told, expected) in [(None, Step::Write), (Some((3, 6)), Step::Write), (Some((3, 7)), Step::Wait)] {
            assert_eq!(step(&ours, "san", ME, told), expected);
        }
        let mut broken = ours;
        broken.luns.get_mut("san").unwrap().journal.repair = true;
        assert_eq!(step(&broken, "san", ME, Some((3, 7))), Step::Write);
        assert_eq!(step(&broken, "gone", ME, None), Step::Wait);
    }
}
