//! The disaster door: a node without a quorum becomes the only voter, by its own log.
//!
//! One frame is appended to the log of a stopped engine: a vote of a later term, a
//! list of members in which this node alone votes, and a proposal that tells the
//! state of it. A frame is on the disk whole or not at all (wal/mod.rs), so a crash
//! leaves the log as it was or as it should be. Nothing is taken away: entries that
//! the others may never have acknowledged stay, and are committed with the new ones.
//!
//! This breaks what consensus promises to those who are left out. Whoever calls it
//! makes sure that messages between them and this node are refused from then on.

use std::path::Path;
use std::sync::Arc;

use holdfast_core::{NodeId, Proposal};
use openraft::EntryPayload;
use tokio::sync::{oneshot, watch};

use crate::consensus::{last_members, lock};
use crate::error::ConsensusError;
use crate::medium::{Directory, Medium};
use crate::record::{EntryRecord, Members, Payload, VoteRecord};
use crate::snapshot;
use crate::types::Item;
use crate::wal::{self, Op, Wal};

/// Makes `me` the only voter of the log in `directory`, which no process uses, and
/// adds `proposal` to it. Does nothing if that was done before with the same
/// proposal, so it can be repeated after a crash.
///
/// # Errors
/// The log is damaged, holds nothing, or cannot be written.
pub async fn force(directory: &Path, me: NodeId, proposal: Proposal) -> Result<(), ConsensusError> {
    let _lock = lock(directory)?;
    let medium: Arc<dyn Medium> = Arc::new(Directory::new(directory));
    let stored = snapshot::read(&*medium)?;
    let (mut recovered, end) = wal::recover(&*medium, me, stored.is_none())?;
    let done_before = recovered.entries.values().any(|entry| match &entry.payload {
        EntryPayload::Normal(item) => item.0.id == proposal.id,
        _ => false,
    });
    if done_before {
        return Ok(());
    }
    let in_snapshot = stored.as_ref().and_then(|stored| stored.head.last);
    let last = recovered.entries.values().next_back().map(|entry| (entry.log_id.leader_id.term, entry.log_id.index));
    let (last_term, last_index) =
        last.or_else(|| in_snapshot.map(|last| (last.term, last.index))).ok_or(ConsensusError::NothingKnown)?;
    let term = last_term.max(recovered.vote.map_or(0, |vote| vote.term)) + 1;
    // The others stay as listeners, without those that have no host.
    let mut addresses = last_members(&recovered, stored.as_ref()).addresses;
    addresses.retain(|id, _| !NodeId(*id).is_witness());
    addresses.entry(me.0).or_default();
    let members = Members { voters: vec![[me.0].into()], addresses };
    let entry = |offset: u64, payload: Payload| EntryRecord { term, index: last_index + offset, payload };
    let ops = [
        Op::vote(VoteRecord { term, node: me.0, won: true }),
        Op::entry(&entry(1, Payload::Members(members))),
        Op::entry(&entry(2, Payload::Proposal(Item(proposal.into())))),
    ];
    let ops = ops.into_iter().collect::<Result<Vec<_>, _>>();
    let wrote = ConsensusError::io("write the log in", directory);
    append(medium, me, end, &mut recovered, ops.map_err(std::io::Error::from)).await.map_err(wrote)
}

async fn append(
    medium: Arc<dyn Medium>,
    me: NodeId,
    end: u64,
    recovered: &mut wal::Recovered,
    ops: std::io::Result<Vec<Op>>,
) -> std::io::Result<()> {
    let (trouble, _) = watch::channel(None);
    let wal = Wal::start(medium, me.0, end, recovered, u64::MAX, trouble)?;
    let (tell, told) = oneshot::channel();
    let done = Box::new(move |outcome| drop(tell.send(outcome)));
    wal.write(ops?, Some(done)).await?;
    let outcome = told.await.map_err(|_| std::io::Error::other("the log was closed before the write was done"))?;
    tokio::task::spawn_blocking(move || wal.close()).await.map_err(std::io::Error::other)?;
    outcome
}
