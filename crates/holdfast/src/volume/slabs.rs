//! The thread that gets slabs for all disks: what it does is decided in `supply.rs`.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::Duration;

use holdfast_core::Mapped;
use holdfast_volume::lun::Geometry;
use holdfast_volume::{Allocator, Fence, Grant, Lun, Refusal, Release, Wanted};
use uuid::Uuid;

use super::protocol::{Answer, DiskId, ToAgent};
use super::returns::Returns;
use super::supply::{Supply, Todo};

/// A slab that could not be zeroed is tried again after this.
const WIPE_AGAIN: Duration = Duration::from_secs(1);
/// How often a lease that does not last is looked at again.
const LEASE_AGAIN: Duration = Duration::from_millis(5);

/// What the thread hears of.
pub enum News {
    /// A LUN was opened.
    Opened { volume: Uuid, lun: Lun, geometry: Geometry, lease: Arc<dyn Fence> },
    /// It is not needed here any more.
    Closed { volume: Uuid },
    /// A writer needs slabs.
    Wanted { volume: Uuid, disk: DiskId, parts: Range<u32>, grant: Grant },
    /// A disk does not need parts any more.
    Returned { volume: Uuid, disk: DiskId, parts: Range<u32>, release: Release },
    /// A disk is not served any more.
    Gone { volume: Uuid, disk: DiskId },
    /// A slab was zeroed, or could not be.
    Wiped { volume: Uuid, slab: u32, done: bool },
    /// The cluster answered.
    Answered { id: u64, answer: Answer },
    /// An agent has come: it gets all questions from now on.
    Agent(Sender<ToAgent>),
}

/// What a disk asks of the thread.
pub struct Slabs {
    /// The volume.
    pub volume: Uuid,
    /// The disk.
    pub disk: DiskId,
    /// The thread.
    pub line: Sender<News>,
}

impl Allocator for Slabs {
    fn allocate(&self, wanted: Wanted, grant: Grant) {
        let (volume, disk) = (self.volume, self.disk);
        // Without the thread, which ends with the process, nobody waits any more.
        let _ = self.line.send(News::Wanted { volume, disk, parts: wanted.parts, grant });
    }

    fn release(&self, parts: Range<u32>, release: Release) {
        let (volume, disk) = (self.volume, self.disk);
        let _ = self.line.send(News::Returned { volume, disk, parts, release });
    }
}

struct Pool {
    supply: Supply<Grant>,
    returns: Returns<Release>,
    /// While the LUN is open.
    wiper: Option<Sender<u32>>,
}

/// Gets slabs, for ever.
pub fn run(inbox: &Receiver<News>, line: &Sender<News>) {
    let mut pools = BTreeMap::<Uuid, Pool>::new();
    let mut agent = None::<Sender<ToAgent>>;
    let (mut number, mut todo) = (0, Vec::new());
    while let Ok(news) = inbox.recv() {
        match news {
            News::Opened { volume, lun, geometry, lease } => {
                let wiper = start_wiper(volume, lun, geometry, lease, line.clone());
                let supply = || Supply::new(volume, geometry.slab_bytes);
                let pool = || Pool { supply: supply(), returns: Returns::default(), wiper: None };
                pools.entry(volume).or_insert_with(pool).wiper = Some(wiper);
            }
            News::Closed { volume } => {
                // What it knows of slabs stays: they are the node's, and what was asked
                // for is still to be answered.
                if let Some(pool) = pools.get_mut(&volume) {
                    pool.wiper = None;
                    pool.supply.nobody_waits(&mut todo);
                }
            }
            News::Wanted { volume, disk, parts, grant } => {
                if let Some(pool) = pools.get_mut(&volume) {
                    pool.supply.want(disk, parts.collect(), grant);
                }
            }
            News::Returned { volume, disk, parts, release } => {
                if let Some(pool) = pools.get_mut(&volume) {
                    pool.returns.give_back(disk, parts, release);
                }
            }
            News::Gone { volume, disk } => {
                if let Some(pool) = pools.get_mut(&volume) {
                    pool.returns.gone(disk);
                }
            }
            News::Wiped { volume, slab, done } => {
                if let Some(pool) = pools.get_mut(&volume) {
                    pool.supply.wiped(slab, done);
                }
            }
            News::Answered { id, answer } => {
                let given = pools.values_mut().any(|pool| pool.supply.answered(id, &answer, &mut todo));
                if !given {
                    let returned = pools.values_mut().find_map(|pool| pool.returns.answered(id, &answer));
                    returned.into_iter().flatten().for_each(Release::done);
                }
            }
            News::Agent(new) => {
                let questions = |pool: &Pool| {
                    pool.supply.open_questions().into_iter().chain(pool.returns.open_questions()).collect::<Vec<_>>()
                };
                let open = pools.values().flat_map(questions);
                open.for_each(|(id, ask)| drop(new.send(ToAgent::Ask { id, ask })));
                agent = Some(new);
            }
        }
        for pool in pools.values_mut() {
            if pool.wiper.is_some() {
                pool.supply.go_on(&mut number, &mut todo);
            }
            let returns = pool.returns.go_on(&mut number);
            todo.extend(returns.into_iter().map(|(id, ask)| Todo::Ask(id, ask)));
            for todo in todo.drain(..) {
                act(todo, pool, agent.as_ref());
            }
        }
    }
}

fn act(todo: Todo<Grant>, pool: &Pool, agent: Option<&Sender<ToAgent>>) {
    match todo {
        // Whoever comes next as an agent gets the open questions.
        Todo::Ask(id, ask) => drop(agent.map(|agent| agent.send(ToAgent::Ask { id, ask }))),
        Todo::Wipe(slab) => drop(pool.wiper.as_ref().map(|wiper| wiper.send(slab))),
        Todo::Give(grant, found) => {
            grant.give(&found.into_iter().flat_map(Mapped::one_by_one).collect::<Vec<_>>());
        }
        // Dropped, it is asked for again a moment later.
        Todo::Later(grant) => drop(grant),
        Todo::NoSpace(grant) => grant.refuse(Refusal::NoSpace),
    }
}

/// Zeroes slabs, one after the other, while the node has the lease under which this
/// server was started: afterwards they may be somebody else's.
fn start_wiper(volume: Uuid, lun: Lun, geometry: Geometry, lease: Arc<dyn Fence>, line: Sender<News>) -> Sender<u32> {
    let (order, orders) = channel::<u32>();
    let name = "zeroes".to_owned();
    let body = move || {
        while let Ok(slab) = orders.recv() {
            let wiped = loop {
                match lun.wipe_while(geometry.slab(slab), geometry.slab_bytes, &*lease) {
                    // Nobody needs it any more. There is never a second order before the
                    // first was reported.
                    Ok(false) if orders.try_recv() == Err(TryRecvError::Disconnected) => break Ok(false),
                    // A lease that is over never opens it again, and then the keeper ends
                    // this process.
                    Ok(false) => std::thread::sleep(LEASE_AGAIN),
                    wiped => break wiped,
                }
            };
            if let Err(error) = &wiped {
                tracing::warn!(%volume, slab, %error, "a slab cannot be zeroed: it is tried again");
                std::thread::sleep(WIPE_AGAIN);
            }
            let _ = line.send(News::Wiped { volume, slab, done: matches!(wiped, Ok(true)) });
        }
    };
    if let Err(error) = std::thread::Builder::new().name(name).stack_size(128 << 10).spawn(body) {
        // Without it no write would ever come to an end.
        tracing::error!(%error, "there can be no thread that zeroes slabs");
        std::process::abort();
    }
    order
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    use holdfast_core::Taking;

    use super::*;

    /// Says when it is asked.
    struct Gate {
        open: AtomicBool,
        asked: Mutex<Sender<()>>,
    }

    impl Fence for Gate {
        fn may_write(&self) -> bool {
            let open = self.open.load(Ordering::SeqCst);
            let _ = self.asked.lock().unwrap().send(());
            open
        }
    }

    #[test]
    fn a_lun_that_is_closed_is_let_go_of_and_nothing_on_it_is_zeroed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lun");
        std::fs::write(&path, vec![7; 64 << 20]).unwrap();
        let lun = Lun::open(&path).unwrap();
        let geometry = Geometry::of(lun.bytes(), Some(16 << 20)).unwrap();
        let ((asked, questions), (line, inbox), (say, words)) = (channel(), channel(), channel());
        let gate = Arc::new(Gate { open: false.into(), asked: Mutex::new(asked) });
        let theirs = line.clone();
        std::thread::spawn(move || run(&inbox, &theirs));
        let volume = Uuid::nil();
        let opened = |lun| News::Opened { volume, lun, geometry, lease: gate.clone() };
        assert!(lun.hold(Duration::ZERO).unwrap());
        line.send(News::Agent(say)).unwrap();
        line.send(opened(lun)).unwrap();
        let ToAgent::Ask { id, .. } = words.recv().unwrap() else { panic!("it asks") };
        let answer = Answer::Slabs(Taking { number: 1, slabs: vec![(0, 1).into()] });
        line.send(News::Answered { id, answer }).unwrap();
        // It is about to be zeroed.
        questions.recv().unwrap();
        line.send(News::Closed { volume }).unwrap();
        let again = Lun::open(&path).unwrap();
        assert!(again.hold(Duration::from_secs(60)).unwrap());
        while questions.try_recv().is_ok() {}
        assert!(std::fs::read(&path).unwrap().iter().all(|byte| *byte == 7));
        // The slab is the node's still, and goes on where it was.
        line.send(opened(again)).unwrap();
        questions.recv().unwrap();
    }

    #[test]
    fn no_slab_is_zeroed_without_a_lease() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lun");
        std::fs::write(&path, vec![7; 64 << 20]).unwrap();
        let lun = Lun::open(&path).unwrap();
        let geometry = Geometry::of(lun.bytes(), Some(16 << 20)).unwrap();
        let ((asked, questions), (line, news)) = (channel(), channel());
        let gate = Arc::new(Gate { open: false.into(), asked: Mutex::new(asked) });
        let wiper = start_wiper(Uuid::nil(), lun, geometry, gate.clone(), line);
        wiper.send(0).unwrap();
        // The second question comes after everything that follows the first.
        (0..2).for_each(|_| questions.recv().unwrap());
        let slab = || std::fs::read(&path).unwrap()[geometry.slab(0) as usize..][..16 << 20].to_vec();
        assert!(slab().iter().all(|byte| *byte == 7));
        gate.open.store(true, Ordering::SeqCst);
        assert!(matches!(news.recv().unwrap(), News::Wiped { slab: 0, done: true, .. }));
        assert!(slab().iter().all(|byte| *byte == 0));
    }
}
