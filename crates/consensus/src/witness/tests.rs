//! The disk's format, and what a power cut or a bad disk can do to it.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use holdfast_core::NodeId;
use holdfast_core::witness::{Block, Kept, Seen, Use};
use tempfile::TempDir;
use uuid::Uuid;

use super::disk::{Disk, DiskError};
use super::layout::{self, AREAS, AREAS_AT, AreaHead, BLOCK, FoundSuperblock, RecordHead, Superblock};
use super::store::{Blocks, Store};
use crate::medium::Medium;

const MARK: Uuid = Uuid::from_u128(0x17);
const ME: NodeId = NodeId(2);
const AREA: usize = 64 << 10;

/// A disk in memory that can lose its power in the middle of a write.
struct Memory {
    bytes: Mutex<Vec<u8>>,
    /// So many writes are done; of the next one some sectors.
    left: Mutex<usize>,
    torn: fn(usize) -> bool,
}

impl Memory {
    fn new(bytes: Vec<u8>, writes: usize, torn: fn(usize) -> bool) -> Arc<Self> {
        Arc::new(Memory { bytes: Mutex::new(bytes), left: Mutex::new(writes), torn })
    }

    fn blank() -> Vec<u8> {
        vec![0; AREAS_AT as usize + AREAS * AREA]
    }

    fn content(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }
}

impl Blocks for Memory {
    fn path(&self) -> &Path {
        Path::new("/dev/memory")
    }

    fn mark(&self) -> Uuid {
        MARK
    }

    fn area(&self) -> usize {
        AREA
    }

    fn heads(&self) -> io::Result<Vec<(usize, AreaHead)>> {
        let bytes = self.bytes.lock().unwrap();
        let head = |area: usize| {
            let at = layout::head_at(area) as usize;
            Some((area, AreaHead::decode(MARK, &bytes[at..at + BLOCK])?))
        };
        Ok((0..AREAS).filter_map(head).collect())
    }

    fn read(&self, at: u64, bytes: usize) -> io::Result<Vec<u8>> {
        Ok(self.bytes.lock().unwrap()[at as usize..at as usize + bytes].to_vec())
    }

    fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        assert_eq!(at % BLOCK as u64, 0, "everything begins at a whole block");
        let mut left = self.left.lock().unwrap();
        let mut disk = self.bytes.lock().unwrap();
        let at = at as usize;
        if *left == 0 {
            for (sector, part) in bytes.chunks(512).enumerate().filter(|(sector, _)| (self.torn)(*sector)) {
                disk[at + sector * 512..][..part.len()].copy_from_slice(part);
            }
            // Whatever else comes is lost.
            *left = usize::MAX;
            drop(left);
            return Err(io::Error::other("the power is gone"));
        }
        if *left == usize::MAX {
            return Err(io::Error::other("the power is gone"));
        }
        *left -= 1;
        disk[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
}

type Content = (Option<Vec<u8>>, Option<Vec<u8>>);

fn content(store: &Store) -> Content {
    (store.read_log().unwrap(), store.read_snapshot().unwrap())
}

/// One change and what is there after it.
type Change = (Box<dyn Fn(&Store) -> Result<(), String>>, Content);

fn changes() -> Vec<Change> {
    let mut changes: Vec<Change> = Vec::new();
    let (mut log, mut snapshot) = (b"the header".to_vec(), None);
    let text = |error: &dyn std::fmt::Debug| format!("{error:?}");
    let first = log.clone();
    changes.push((Box::new(move |store| store.create_log(&first).map_err(|e| text(&e))), (Some(log.clone()), None)));
    // More than an area holds, in records of less and of more than a block.
    for round in 0..14u8 {
        for bytes in [100, 9000] {
            let (at, record) = (log.len() as u64, vec![round; bytes]);
            log.extend_from_slice(&record);
            let after = (Some(log.clone()), snapshot.clone());
            changes.push((Box::new(move |store| store.append(at, &record).map_err(|e| text(&e))), after));
        }
        if round % 5 == 2 {
            let new = vec![b'S' + round; 5000];
            snapshot = Some(new.clone());
            let after = (Some(log.clone()), snapshot.clone());
            changes.push((Box::new(move |store| store.write_snapshot(&new).map_err(|e| text(&e))), after));
        }
        if round % 4 == 3 {
            log = [b"the header".as_slice(), &log[log.len() - 3000..]].concat();
            let (new, after) = (log.clone(), (Some(log.clone()), snapshot.clone()));
            changes.push((Box::new(move |store| store.replace_log(&new).map_err(|e| text(&e))), after));
        }
    }
    log.truncate(500);
    let after = (Some(log.clone()), snapshot.clone());
    changes.push((Box::new(move |store| store.cut_log(500).map_err(|e| text(&e))), after));
    changes
}

fn open(disk: Arc<Memory>, epoch: u64, known: Kept) -> Result<(Store, Arc<Mutex<Kept>>), DiskError> {
    let kept = Arc::new(Mutex::new(known));
    Store::open(disk, ME, epoch, known, Arc::clone(&kept)).map(|store| (store, kept))
}

#[test]
fn a_power_cut_at_any_write_loses_only_what_was_not_acknowledged() {
    let torn: [fn(usize) -> bool; 6] = [
        |_| false,
        |sector| sector == 0,
        |sector| sector != 0,
        |sector| sector % 2 == 1,
        |sector| sector < 3,
        |_| true,
    ];
    let changes = changes();
    let mut cuts = 0;
    for writes in 0.. {
        let mut went_through = false;
        for torn in torn {
            let disk = Memory::new(Memory::blank(), writes, torn);
            let (store, kept) = open(disk.clone(), 1, Kept::default()).expect("a blank disk");
            let mut before: Content = (None, None);
            let mut after = None;
            for (change, then) in &changes {
                if change(&store).is_err() {
                    after = Some(then.clone());
                    break;
                }
                before = then.clone();
                assert_eq!(content(&store), before);
            }
            went_through = after.is_none();
            let known = *kept.lock().unwrap();
            let again = Memory::new(disk.content(), usize::MAX - 1, |_| true);
            let (store, _) = open(again, 2, known).unwrap_or_else(|e| panic!("cut at write {writes}: {e}"));
            let found = content(&store);
            let expected = Some(&found) == after.as_ref() || found == before;
            assert!(expected, "cut at write {writes}: neither what was there before nor after it");
            cuts += 1;
        }
        if went_through {
            break;
        }
    }
    assert!(cuts > 6 * changes.len(), "{cuts} cuts");
}

/// A store that has been through all changes, and its disk.
fn used() -> (Arc<Memory>, Store, Kept, Content) {
    let disk = Memory::new(Memory::blank(), usize::MAX - 1, |_| true);
    let (store, kept) = open(disk.clone(), 1, Kept::default()).expect("a blank disk");
    for (change, _) in &changes() {
        change(&store).expect("it is written");
    }
    for _ in 0..5 {
        let end = store.read_log().unwrap().unwrap().len() as u64;
        store.append(end, b"some more").expect("it is written");
    }
    let (kept, found) = (*kept.lock().unwrap(), content(&store));
    (disk, store, kept, found)
}

#[test]
fn what_a_former_owner_still_writes_is_not_seen() {
    let (disk, former, kept, before) = used();
    let (owner, now_kept) = open(disk.clone(), 2, kept).expect("it takes over");
    assert_eq!(content(&owner), before);
    let end = before.0.unwrap().len() as u64;
    former.append(end, b"too late").expect("the disk takes it");
    former.write_snapshot(b"too late").expect("the disk takes it");
    owner.append(end, b"in time").expect("it is written");
    let expected = content(&owner);
    let known = *now_kept.lock().unwrap();
    let (third, _) = open(disk.clone(), 3, known.max(kept)).expect("it takes over");
    assert_eq!(content(&third), expected);
    former.append(end + 8, b"much too late").expect("the disk takes it");
    let (fourth, _) = open(disk, 4, known).expect("it takes over");
    assert_eq!(content(&fourth), expected);
}

#[test]
fn damage_is_refused_or_does_not_matter() {
    let (disk, _, kept, expected) = used();
    let whole = disk.content();
    let heads = disk.heads().unwrap();
    let (area, _) = heads.iter().max_by_key(|(_, head)| *head).copied().unwrap();
    let mut refused = 0;
    let begin = AREAS_AT as usize + area * AREA;
    let head = layout::head_at(area) as usize;
    for at in (begin..begin + AREA).step_by(97).chain((head..head + 80).step_by(3)) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x20;
        match open(Memory::new(bytes, usize::MAX - 1, |_| true), 2, kept) {
            Ok((store, _)) => assert_eq!(content(&store), expected, "byte {at}"),
            Err(DiskError::Damaged { .. }) => refused += 1,
            Err(other) => panic!("byte {at}: {other}"),
        }
    }
    assert!(refused > 30, "only {refused} were found");
    // Without what the blocks say it could be taken for an older log.
    let mut bytes = whole;
    bytes[head + 9] ^= 1;
    assert!(open(Memory::new(bytes, usize::MAX - 1, |_| true), 2, kept).is_err());
}

#[test]
fn a_disk_of_before_is_less_than_what_is_known() {
    let disk = Memory::new(Memory::blank(), usize::MAX - 1, |_| true);
    let (store, _) = open(disk.clone(), 1, Kept::default()).unwrap();
    store.create_log(b"the header").unwrap();
    let old = disk.content();
    let (store, kept) = open(disk, 2, Kept::default()).unwrap();
    store.append(10, b"acknowledged").unwrap();
    let known = *kept.lock().unwrap();
    let refused = open(Memory::new(old, usize::MAX - 1, |_| true), 3, known);
    assert!(matches!(refused, Err(DiskError::Damaged { .. })));
}

fn hexdump(title: &str, bytes: &[u8]) -> String {
    let mut text = format!("{title}\n");
    let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    for line in bytes[..used].chunks(16) {
        let hex: String = line.iter().map(|byte| format!("{byte:02x}")).collect();
        let shown = line.iter().map(|byte| if byte.is_ascii_graphic() { char::from(*byte) } else { '.' });
        text.push_str(&format!("{hex:<32} {}\n", shown.collect::<String>()));
    }
    text
}

#[test]
fn the_bytes_are_those_of_version_1() {
    let cluster = Uuid::from_u128(0xc1);
    let superblock = Superblock { cluster, mark: MARK, area: 0x1_0000 };
    let kept = Kept { epoch: 7, generation: 3, length: 0x1234 };
    let block = Block { node: ME, epoch: 8, counter: 99, state: Use::Own, length_ms: 600, kept };
    let area = AreaHead { epoch: 7, generation: 3, node: ME, snapshot: 5000, snapshot_crc: 0xabcd, log: 20 };
    let record = RecordHead::encode(MARK, &area, 4, 20, b"bytes of the log");
    let written = [
        hexdump("superblock", &superblock.encode()),
        hexdump("block of a node", &layout::encode_block(MARK, &block)),
        hexdump("head of an area", &area.encode(MARK)),
        hexdump("record", &record),
    ]
    .join("\n");
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/witness-v1.txt");
    if std::env::var_os("HOLDFAST_WRITE_GOLDEN").is_some() {
        fs::write(&golden, &written).expect("the golden file");
    }
    let committed = fs::read_to_string(&golden).expect("the golden file");
    assert_eq!(
        written, committed,
        "the format changed: raise layout::VERSION, read both, and change docs/witness-disk.md"
    );

    assert!(matches!(Superblock::decode(&superblock.encode()), FoundSuperblock::Valid(found) if found == superblock));
    let bytes = layout::encode_block(MARK, &block);
    assert_eq!(layout::decode_block(MARK, ME, &bytes), Seen::Block(block));
    assert!(matches!(layout::decode_block(MARK, NodeId(3), &bytes), Seen::Torn(_)), "in another node's place");
    assert_eq!(layout::decode_block(Uuid::from_u128(1), ME, &bytes), Seen::Empty, "of a former witness");
    for at in 0..84 {
        let mut torn = bytes.clone();
        torn[at] ^= 1;
        assert!(matches!(layout::decode_block(MARK, ME, &torn), Seen::Torn(_)), "byte {at}");
    }
    assert_eq!(AreaHead::decode(MARK, &area.encode(MARK)), Some(area));
    let head = RecordHead::decode(MARK, &area, &record).expect("a record");
    assert_eq!((head.sequence, head.at, &record[head.payload()]), (4, 20, b"bytes of the log".as_slice()));
}

#[test]
fn a_file_is_made_and_whatever_holds_something_is_refused() {
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("witness");
    let cluster = Uuid::from_u128(0xc1);
    Disk::format(&path, cluster, MARK, &[]).expect("it is made");
    let disk = Disk::open(&path, MARK).expect("it is there");
    assert_eq!(disk.look().expect("a look"), Default::default());
    let block = Block { node: ME, epoch: 1, counter: 1, state: Use::Claim, length_ms: 600, kept: Kept::default() };
    disk.write_block(&block).expect("it is written");
    let again = Disk::open(&path, MARK).expect("it is there");
    assert_eq!(again.look().expect("a look").blocks.get(&ME), Some(&Seen::Block(block)));
    assert!(disk.write_block(&Block { node: NodeId(257), ..block }).is_err());

    let other = Disk::open(&path, Uuid::from_u128(9)).err().expect("another mark");
    assert!(matches!(other, DiskError::Other { .. }), "{other}");
    let used = Disk::format(&path, cluster, Uuid::from_u128(9), &[]).expect_err("it is a witness");
    assert!(used.to_string().contains("a witness of cluster"), "{used}");
    // A former witness of this cluster may be used again, once nobody is active there.
    disk.write_block(&Block { state: Use::Idle, counter: 2, ..block }).expect("it is written");
    Disk::format(&path, cluster, Uuid::from_u128(9), &[MARK]).expect("it is made anew");
    assert!(disk.look().expect("a look").blocks.is_empty());

    let moved = directory.path().join("elsewhere");
    fs::rename(&path, &moved).expect("it is moved away");
    assert!(disk.look().is_err(), "the path names nothing");
    assert!(disk.write_block(&block).is_err());
    fs::copy(&moved, &path).expect("a copy");
    assert!(disk.write_block(&block).is_err(), "the path names another file");

    for (at, mark, what) in
        [(0x438, vec![0x53, 0xef], "ext"), (0, b"XFSB".to_vec(), "XFS"), (70_000, vec![1], "not zeros")]
    {
        let file = directory.path().join("used");
        let mut bytes = vec![0; 32 << 20];
        bytes[at..at + mark.len()].copy_from_slice(&mark);
        fs::write(&file, &bytes).expect("a used disk");
        let refused = Disk::format(&file, cluster, MARK, &[]).expect_err("it holds something");
        assert!(refused.to_string().contains(what), "{refused}");
        assert_eq!(fs::read(&file).expect("the disk"), bytes, "it is untouched");
    }
    let small = directory.path().join("small");
    fs::write(&small, vec![0; 4 << 20]).expect("a small disk");
    assert!(matches!(Disk::format(&small, cluster, MARK, &[]), Err(DiskError::Small { .. })));
    let nowhere = directory.path().join("missing/witness");
    assert!(matches!(Disk::format(&nowhere, cluster, MARK, &[]), Err(DiskError::Missing { .. })));
    assert!(matches!(Disk::open(&nowhere, MARK), Err(DiskError::Missing { .. })));
}
