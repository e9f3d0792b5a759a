//! Setting a witness and giving one up.

use std::path::{Path, PathBuf};
use std::time::Duration;

use holdfast_consensus::Disk;
use holdfast_core::witness::{Block, HOSTS};
use holdfast_core::*;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use uuid::Uuid;

use super::super::{Agent, Failure, Member, rpc};

/// A disk that does not answer for so long is as good as not there. A former
/// witness's is watched for up to 4.4 s before it is used again.
const DEADLINE: Duration = Duration::from_secs(10);

/// Does this node see the disk with this mark, and can it write there?
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Probe {
    path: PathBuf,
    mark: Uuid,
}

/// What a node sees; the error is a clause that follows the node's name.
pub type Probed = Result<(), String>;

impl Agent {
    /// Makes the disk at `path` the witness, after every node that is up was seen to
    /// read and write the same disk there.
    ///
    /// # Errors
    /// The disk is missing, holds something, or is not the same on all nodes; a
    /// former witness still votes. Nothing was changed then.
    pub async fn set_witness(&self, by: &str, path: &str) -> Result<(), Failure> {
        let member = self.member()?;
        let disk = PathBuf::from(path);
        if !disk.is_absolute() {
            return Err(
                Refusal::Invalid(format!("{path:?} is no absolute path: name the disk as every node sees it")).into()
            );
        }
        let state = self.state();
        let here = state.node_name(member.me);
        let standing = self.standing();
        let votes = |witness: &&Witness| standing.as_ref().is_some_and(|now| now.voters.contains(&witness.id));
        if state.former_witness.iter().any(|former| votes(&former)) {
            let text = "the witness of before still votes: try again in a moment";
            return Err(Refusal::Conflict(text.into()).into());
        }
        if state.witness.as_ref().is_some_and(|witness| witness.disk == path) {
            let text = format!(
                "{path} is the witness already: to make it anew, give it up first (`holdfast quorum witness set --none`)"
            );
            return Err(Refusal::Conflict(text).into());
        }
        let mark = Uuid::new_v4();
        let (cluster, at) = (state.cluster.id, disk.clone());
        let former: Vec<_> = state.former_witness.iter().map(|former| former.mark).collect();
        let created = on_disk(move || Disk::format(&at, cluster, mark, &former).map_err(|error| error.to_string()))
            .await
            .map_err(|why| Failure::other("bad_disk", format!("{here} {why}")))?;
        let set = self.set_formatted(member, &state, by, &disk, mark).await;
        // Only a disk that is certainly no witness loses its mark.
        if let Err(failure) = &set
            && !matches!(failure, Failure::Unknown)
        {
            let undo = move || {
                let wiped = Disk::wipe(&disk, mark);
                if created {
                    std::fs::remove_file(&disk).map_err(|error| error.to_string())
                } else {
                    wiped.map_err(|error| error.to_string())
                }
            };
            if let Err(error) = on_disk(undo).await {
                tracing::warn!(%error, "a disk that did not become the witness keeps its mark");
            }
        }
        set
    }

    async fn set_formatted(
        &self,
        member: &Member,
        state: &ClusterState,
        by: &str,
        path: &Path,
        mark: Uuid,
    ) -> Result<(), Failure> {
        let probe = Probe { path: path.to_owned(), mark };
        let up: Vec<_> = state.nodes.values().filter(|node| node.is_up()).collect();
        for node in &up {
            let probed: Probed = match node.id == member.me {
                true => self.probe_witness(probe.clone()).await,
                false => member
                    .peers
                    .ask(node.id, rpc::PROBE_WITNESS, &probe, DEADLINE + Duration::from_secs(1))
                    .await
                    .unwrap_or_else(|error| Err(format!("could not be asked: it {error}"))),
            };
            if let Err(why) = probed {
                return Err(Failure::other("witness_not_shared", format!("{} {why}", node.name)));
            }
        }
        let disk = path.to_owned();
        let look = move || {
            let disk = Disk::open(&disk, mark).map_err(|error| error.to_string())?;
            disk.look().map_err(|error| format!("cannot read {}: {error}", disk.path().display()))
        };
        let here = state.node_name(member.me);
        let seen = on_disk(look).await.map_err(|why| Failure::other("bad_disk", format!("{here} {why}")))?;
        for node in up.iter().filter(|node| node.id.0 <= HOSTS) {
            if !seen.blocks.contains_key(&node.id) {
                let text = format!(
                    "{here} does not see what {} wrote to {}: the nodes have to share the disk, not copies of it",
                    node.name,
                    path.display()
                );
                return Err(Failure::other("witness_not_shared", text));
            }
        }
        self.execute(by, Command::SetWitness { disk: path.to_string_lossy().into_owned(), mark }).await.map(drop)
    }

    /// Looks at a disk that is to become the witness, and writes this node's block.
    pub(in super::super) async fn probe_witness(&self, probe: Probe) -> Probed {
        let me = self.me().unwrap_or_default();
        on_disk(move || {
            let disk = Disk::open(&probe.path, probe.mark).map_err(|error| error.to_string())?;
            if me.0 == 0 || me.0 > HOSTS {
                return Ok(());
            }
            let written = disk.write_block(&Block { node: me, counter: 1, ..Block::default() });
            written.map_err(|error| format!("cannot write {}: {error}", probe.path.display()))
        })
        .await
    }

    /// Does without a witness from now on.
    ///
    /// # Errors
    /// There is none; or as [`Agent::execute`].
    pub async fn clear_witness(&self, by: &str) -> Result<(), Failure> {
        self.execute(by, Command::ClearWitness).await.map(drop)
    }

    /// How the witness stands from this node.
    pub fn witness_health(&self) -> Option<super::Health> {
        let member = self.0.member.get()?;
        member.witnesses.health(self.state().witness.as_ref()?.id)
    }
}

/// Runs something that may hang with the disk behind it, for a bounded time.
async fn on_disk<T: Send + 'static>(work: impl FnOnce() -> Result<T, String> + Send + 'static) -> Result<T, String> {
    match timeout(DEADLINE, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(done)) => done,
        Ok(Err(error)) => Err(format!("failed: {error}")),
        Err(_) => Err(format!("gets no answer from the disk within {} s", DEADLINE.as_secs())),
    }
}
