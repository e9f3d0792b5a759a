//! The file format, and what a crash or a bad disk can do to it.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use holdfast_core::{Command, NodeId, Proposal, RequestId};
use tempfile::TempDir;
use tokio::sync::{oneshot, watch};

use super::recover::parse;
use super::*;
use crate::error::ConsensusError;
use crate::medium::Directory;
use crate::record::{Members, Payload};
use crate::types::Item;

const ME: NodeId = NodeId(7);

fn blank(term: u64, index: u64) -> EntryRecord {
    EntryRecord { term, index, payload: Payload::Blank }
}

fn proposal(index: u64) -> EntryRecord {
    let proposal = Proposal {
        id: RequestId::default(),
        at_ms: 1,
        by: "a test".into(),
        command: Command::RemoveApiToken { name: format!("token-{index}") },
    };
    EntryRecord { payload: Payload::Proposal(Item(Arc::new(proposal))), ..blank(1, index) }
}

fn members(index: u64) -> EntryRecord {
    let members =
        Members { voters: vec![[1, 7].into()], addresses: [(1, "a:1".to_owned()), (7, "b:2".to_owned())].into() };
    EntryRecord { payload: Payload::Members(members), ..blank(1, index) }
}

fn vote(term: u64) -> Op {
    let (node, won) = (ME.0, true);
    Op::vote(VoteRecord { term, node, won }).expect("a vote is plain data")
}

fn entry(record: EntryRecord) -> Op {
    Op::entry(&record).expect("an entry is plain data")
}

/// Each inner list was acknowledged before the next was written.
async fn written(directory: &Path, batches: Vec<Vec<Op>>, compact_above_bytes: u64) {
    let medium = Arc::new(Directory::new(directory));
    let (mut recovered, end) = recover(&*medium, ME, true).expect("the log opens");
    let trouble = watch::Sender::new(None);
    let wal = Wal::start(medium, ME.0, end, &mut recovered, compact_above_bytes, trouble);
    let wal = wal.expect("a thread");
    for batch in batches {
        let (tell, told) = oneshot::channel::<io::Result<()>>();
        let done = Box::new(move |outcome| drop(tell.send(outcome)));
        wal.write(batch, Some(done)).await.expect("it is queued");
        told.await.expect("it is answered").expect("it is written");
    }
}

fn example() -> Vec<Vec<Op>> {
    vec![
        vec![vote(1)],
        vec![entry(members(0)), entry(blank(1, 1))],
        vec![entry(proposal(2))],
        vec![Op::committed(Some(Position { term: 1, index: 2 })).expect("plain data"), entry(proposal(3))],
        vec![Op::truncate_after(Some(2)).expect("plain data")],
        vec![vote(2), entry(blank(2, 3))],
        vec![Op::purge(Position { term: 1, index: 1 }).expect("plain data")],
    ]
}

/// What can be told apart after a restart.
fn summary(recovered: &Recovered) -> String {
    let entries: Vec<String> = recovered.entries.values().map(ToString::to_string).collect();
    format!("{:?} {:?} {:?} {entries:?}", recovered.vote, recovered.committed, recovered.purged)
}

fn hexdump(bytes: &[u8]) -> String {
    let lines = bytes.chunks(32).map(|line| {
        let hex: String = line.iter().map(|byte| format!("{byte:02x}")).collect();
        let text = line.iter().map(|byte| match byte {
            0x20..=0x7e => char::from(*byte),
            _ => '.',
        });
        format!("{hex:<64} {}\n", text.collect::<String>())
    });
    lines.collect()
}

#[tokio::test]
async fn the_bytes_are_those_of_version_1() {
    let directory = TempDir::new().expect("a directory");
    written(directory.path(), example(), u64::MAX).await;
    let bytes = fs::read(directory.path().join(FILE)).expect("the log");
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/log-v1.txt");
    let written = hexdump(&bytes);
    if std::env::var_os("HOLDFAST_WRITE_GOLDEN").is_some() {
        fs::write(&golden, &written).expect("the golden file");
    }
    let committed = fs::read_to_string(&golden).expect("the golden file");
    assert_eq!(
        written,
        committed,
        "the log's format changed. Old files must stay readable: raise wal::VERSION, read both, and only then change {}",
        golden.display()
    );
}

#[tokio::test]
async fn everything_acknowledged_is_read_again() {
    let directory = TempDir::new().expect("a directory");
    written(directory.path(), example(), u64::MAX).await;
    let (recovered, _) = recover(&Directory::new(directory.path()), ME, true).expect("the log opens");
    assert_eq!(recovered.vote.map(|vote| vote.term), Some(2));
    assert_eq!(recovered.purged, Some(Position { term: 1, index: 1 }));
    assert_eq!(recovered.committed, Some(Position { term: 1, index: 2 }));
    let ids: Vec<(u64, u64)> =
        recovered.entries.values().map(|entry| (entry.log_id.leader_id.term, entry.log_id.index)).collect();
    assert_eq!(ids, [(1, 2), (2, 3)]);
}

/// Where each frame of a log ends, the header counted as the first.
fn frame_ends(bytes: &[u8]) -> Vec<usize> {
    let mut ends = vec![HEADER_BYTES];
    while let Some(length) = bytes.get(ends[ends.len() - 1]..).and_then(|rest| rest.first_chunk::<4>()) {
        ends.push(ends[ends.len() - 1] + FRAME_HEAD_BYTES + u32::from_le_bytes(*length) as usize + 1);
    }
    ends
}

#[tokio::test]
async fn a_crash_at_any_byte_loses_only_what_was_not_acknowledged() {
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join(FILE);
    written(directory.path(), example(), u64::MAX).await;
    let whole = fs::read(&path).expect("the log");
    let ends = frame_ends(&whole);
    assert_eq!(ends.len(), example().len() + 1);
    assert_eq!(ends.last(), Some(&whole.len()));
    for length in HEADER_BYTES..=whole.len() {
        let acknowledged = ends.iter().rev().find(|end| **end <= length).copied().expect("the header");
        let expected = summary(&parse(&path, &whole[..acknowledged], ME).expect("whole frames").0);
        for zeros in [0, 1, 300] {
            let mut cut = whole[..length].to_vec();
            // A file that had grown before its blocks were written ends in zeros:
            // within the frame, or where the next one would begin.
            let room = ends.iter().find(|end| **end > length).map_or(zeros, |end| end - length);
            cut.resize(length + if length == acknowledged { zeros } else { zeros.min(room) }, 0);
            fs::write(&path, &cut).expect("a cut log");
            // The note was not flushed: a loss of power may have taken it along.
            let _ = fs::remove_file(directory.path().join(crate::mark::FILE));
            let (recovered, _) = recover(&Directory::new(directory.path()), ME, true)
                .unwrap_or_else(|e| panic!("cut at {length} with {zeros} zeros: {e}"));
            assert_eq!(summary(&recovered), expected, "cut at {length} with {zeros} zeros");
            assert_eq!(fs::metadata(&path).expect("the log").len(), acknowledged as u64, "the rest is cut off");
        }
    }
}

#[tokio::test]
async fn a_log_that_was_truncated_is_refused_and_left_alone() {
    let directory = TempDir::new().expect("a directory");
    written(directory.path(), example(), u64::MAX).await;
    let path = directory.path().join(FILE);
    let whole = fs::read(&path).expect("the log");
    for length in HEADER_BYTES..whole.len() {
        fs::write(&path, &whole[..length]).expect("a truncated log");
        let error = recover(&Directory::new(directory.path()), ME, true).err();
        let Some(ConsensusError::Corrupt { file, .. }) = &error else {
            panic!("cut at {length} of {}: {error:?}", whole.len());
        };
        assert_eq!(*file, path);
        assert_eq!(fs::metadata(&path).expect("the log").len(), length as u64, "it was changed");
    }
    fs::write(&path, &whole).expect("the whole log");
    assert!(recover(&Directory::new(directory.path()), ME, true).is_ok());
}

#[tokio::test]
async fn a_flipped_bit_anywhere_is_refused_and_left_alone() {
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join(FILE);
    written(directory.path(), example(), u64::MAX).await;
    let whole = fs::read(&path).expect("the log");
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(&path, &bytes).expect("a damaged log");
        let error = recover(&Directory::new(directory.path()), ME, true).err();
        let error = error.unwrap_or_else(|| panic!("a flipped bit in byte {at} went unnoticed"));
        let ConsensusError::Corrupt { file, offset, .. } = &error else {
            panic!("byte {at}: {error}");
        };
        assert_eq!(file, &path);
        assert!(*offset <= at as u64, "byte {at} was reported at {offset}");
        assert!(error.to_string().contains("join it again"), "it says what to do: {error}");
        assert_eq!(fs::read(&path).expect("the log"), bytes, "the file is untouched");
    }
}

#[tokio::test]
async fn other_nodes_and_newer_versions_are_refused() {
    let directory = TempDir::new().expect("a directory");
    written(directory.path(), example(), u64::MAX).await;
    let other = recover(&Directory::new(directory.path()), NodeId(8), true).err();
    assert!(matches!(other, Some(ConsensusError::OtherNode { found: ME, .. })), "{other:?}");
    let path = directory.path().join(FILE);
    let mut bytes = fs::read(&path).expect("the log");
    bytes[7] = VERSION + 1;
    let crc = crc32fast::hash(&bytes[..16]).to_le_bytes();
    bytes[16..20].copy_from_slice(&crc);
    fs::write(&path, bytes).expect("a newer log");
    let newer = recover(&Directory::new(directory.path()), ME, true).err();
    assert!(matches!(newer, Some(ConsensusError::TooNew { .. })), "{newer:?}");
}

#[tokio::test]
async fn a_log_that_is_mostly_obsolete_shrinks_and_keeps_everything_needed() {
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join(FILE);
    let mut batches = vec![vec![vote(3)]];
    for index in 0..2000 {
        batches.push(vec![entry(proposal(index))]);
        if index % 100 == 99 {
            let up_to = Position { term: 1, index: index - 20 };
            batches.push(vec![Op::purge(up_to).expect("plain data")]);
        }
    }
    written(directory.path(), batches, 16 << 10).await;
    let length = fs::metadata(&path).expect("the log").len();
    assert!(length < 64 << 10, "{length} bytes are left");
    let (recovered, _) = recover(&Directory::new(directory.path()), ME, true).expect("the log opens");
    assert_eq!(recovered.vote.map(|vote| vote.term), Some(3));
    assert_eq!(recovered.purged.map(|purged| purged.index), Some(1979));
    assert_eq!(recovered.entries.keys().copied().collect::<Vec<_>>(), (1980..2000).collect::<Vec<_>>());
    assert!(!directory.path().join(NEW_FILE).exists());
}

#[tokio::test]
async fn a_replacement_that_a_crash_left_behind_is_ignored() {
    let directory = TempDir::new().expect("a directory");
    written(directory.path(), example(), u64::MAX).await;
    fs::write(directory.path().join(NEW_FILE), b"half a log").expect("a leftover");
    let (recovered, _) = recover(&Directory::new(directory.path()), ME, true).expect("the log opens");
    assert_eq!(recovered.entries.len(), 2);
    assert!(!directory.path().join(NEW_FILE).exists());
}
