//! Serves one disk without a cluster, for tests and measurements.
//!
//! `serve-disks THREADS file PATH`, `serve-disks THREADS lun PATH NAME`: serves a file,
//! or a file of a volume on a LUN that nobody else uses, on the listening socket that
//! is its standard input, until it is killed. `serve-disks format PATH NAME BYTES`:
//! makes a volume on a device or file, whatever is on it, with one file of that name.
//! `serve-disks pieces PATH SLABS`: makes one with so many slabs of 16 MiB in use, no two
//! of them in one run. `serve-disks read PATH`: reads what stands on it, and says how
//! many slabs are in use.

use std::error::Error;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use holdfast_volume::lun::{Alone, FileId, Identity, Op, Store};
use holdfast_volume::{DiskSpec, Export, Lun, Open, Server};
use uuid::Uuid;

/// How long a server before this one may take to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// Files among which pieces are spread, and the size of their slabs.
const FILES: u32 = 100;
const SLAB_BYTES: u64 = 16 << 20;

const USAGE: &str =
    "serve-disks THREADS file PATH | THREADS lun PATH NAME | format PATH NAME BYTES | pieces PATH SLABS | read PATH";

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["format", path, name, bytes] => format(Path::new(path), name, bytes.parse()?),
        ["pieces", path, slabs] => pieces(Path::new(path), slabs.parse()?),
        ["read", path] => {
            println!("{}", Store::open(Lun::open(Path::new(path))?)?.contents().used_slabs());
            Ok(())
        }
        [threads, "file", path] => {
            let spec = DiskSpec { name: "disk".into(), path: path.into(), read_only: false };
            let export = Export::open(&spec, Arc::new(Open))?;
            held(export.hold(PATIENCE)?)?;
            serve(threads, export)
        }
        [threads, "lun", path, name] => {
            let lun = Lun::open(Path::new(path))?;
            // Before anything of it is read: the last one's writes may be on their way.
            held(lun.hold(PATIENCE)?)?;
            let volume = Alone::new(lun.clone(), Store::open(lun)?)?;
            serve(threads, volume.open(name, Arc::new(Open))?)
        }
        _ => Err(USAGE.into()),
    }
}

fn held(held: bool) -> Result<(), &'static str> {
    held.then_some(()).ok_or("another process holds it")
}

fn serve(threads: &str, export: Export) -> Result<(), Box<dyn Error>> {
    let server = Server::start(threads.parse()?)?;
    let listener = UnixListener::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    server.serve(1, listener, export);
    loop {
        std::thread::park();
    }
}

fn make(path: &Path, slab_bytes: Option<u64>) -> Result<Store<Lun>, Box<dyn Error>> {
    let now_ms = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis() as u64;
    let identity = Identity { volume: Uuid::from_u128(u128::from(now_ms)), cluster: Uuid::nil(), name: "alone".into() };
    Ok(Store::format(Lun::open(path)?, identity, slab_bytes, now_ms, 1)?)
}

fn format(path: &Path, name: &str, bytes: u64) -> Result<(), Box<dyn Error>> {
    let mut store = make(path, None)?;
    store.commit(1, &[Op::Create { file: FileId(1), bytes, name: name.into() }])?;
    Ok(())
}

/// Slabs go to the files in turn.
fn pieces(path: &Path, slabs: u32) -> Result<(), Box<dyn Error>> {
    let mut store = make(path, Some(SLAB_BYTES))?;
    let each = slabs.div_ceil(FILES);
    for number in 0..FILES {
        let file = FileId(u64::from(number) + 1);
        let create = Op::Create { file, bytes: u64::from(each) * SLAB_BYTES, name: format!("disk-{number}") };
        let places = (number..slabs).step_by(FILES as usize).zip(0..);
        let maps = places.map(|(slab, index)| Op::Map { file, index, slab, count: 1 });
        let ops: Vec<_> = std::iter::once(create).chain(maps).collect();
        store.commit(store.revision() + 1, &ops)?;
    }
    Ok(())
}
