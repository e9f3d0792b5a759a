//! The engine's own tests of log and state machine, run on ours.

use openraft::StorageError;
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::testing::log::{StoreBuilder, Suite};
use std::sync::Arc;
use tempfile::TempDir;
use tokio::sync::watch;

use crate::log::Log;
use crate::machine::Machine;
use crate::medium::{Directory, Medium};
use crate::record::{EntryRecord, Members, Payload};
use crate::types::Types;
use crate::wal::{self, Wal};
use holdfast_core::NodeId;

struct Builder;

impl StoreBuilder<Types, Log, Machine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, Log, Machine), StorageError<Types>> {
        let directory = TempDir::new().expect("a temporary directory");
        let path = directory.path();
        let medium: Arc<dyn Medium> = Arc::new(Directory::new(path));
        let (mut recovered, end) = wal::recover(&*medium, NodeId(0), true).expect("a new log");
        let trouble = watch::Sender::new(None);
        // So small that the suite also compacts.
        let compact_above_bytes = 512;
        let wal = Wal::start(medium.clone(), 0, end, &mut recovered, compact_above_bytes, trouble.clone());
        let log = Log::new(recovered, Arc::new(wal.expect("a thread")));
        let machine = Machine::open(medium, None, trouble).expect("no snapshot");
        Ok((directory, log, machine))
    }
}

#[tokio::test]
async fn log_and_state_machine_do_what_the_engine_expects() {
    Suite::test_all(Builder).await.expect("the engine's suite passes");
}

#[tokio::test]
async fn who_takes_part_is_durable_before_anybody_could_be_sent_it() {
    let (directory, mut log, _machine) = Builder.build().await.expect("a log");
    let members = Members { voters: vec![[1].into()], addresses: [(1, String::new())].into() };
    let record = EntryRecord { term: 1, index: 0, payload: Payload::Members(members) };
    let entry = record.clone().restore().expect("an entry");
    log.append([entry], IOFlushed::noop()).await.expect("appended");
    // What a crash would leave at this moment.
    let (found, _) = wal::recover(&Directory::new(directory.path()), NodeId(0), false).expect("the log");
    assert_eq!(found.entries.values().map(EntryRecord::from).collect::<Vec<_>>(), [record]);
}
