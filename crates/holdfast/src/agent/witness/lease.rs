//! The thread that keeps this node's lease on a witness's disk: it alone reads and
//! writes the blocks, one after the other, as [`DiskLease`] says.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use holdfast_consensus::{Disk, DiskError, Gate};
use holdfast_core::lease::BootTime;
use holdfast_core::witness::{DiskLease, DiskTiming, Kept, Memory, Step, Want};
use holdfast_core::{NodeId, Witness};
use tokio::sync::watch;

use crate::realtime::boot_time;

/// A disk that cannot be opened is tried again after this.
const OPEN_AGAIN: Duration = Duration::from_secs(1);

/// What this node should do about a witness.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// Whether to host it.
    pub want: Want,
    /// How long leases are.
    pub timing: DiskTiming,
    /// The longest that any node's may be, in milliseconds.
    pub longest_ms: u64,
    /// The highest epoch that was agreed on.
    pub epoch: u64,
    /// What another node has seen on the disk and misses there.
    pub missing: Memory,
}

/// How a witness's disk looks from here.
#[derive(Clone, Default)]
pub struct View {
    /// Under which epoch this node speaks for the witness, and the disk, if it does.
    pub mine: Option<(u64, Arc<Disk>)>,
    /// Who else is active there.
    pub other: Option<NodeId>,
    /// Why the disk cannot be used; a clause that follows a node's name.
    pub trouble: Option<String>,
    /// It shows less than was seen on it.
    pub stale: bool,
    /// What was seen on it, to be remembered.
    pub memory: Memory,
    /// When it was last written or read with success.
    pub last: BootTime,
}

/// This node's lease on one disk. Ends its thread when dropped.
pub struct Lease {
    shared: Arc<Shared>,
    view: watch::Receiver<View>,
    /// What is durable of the log, for the renewals to say.
    pub kept: Arc<Mutex<Kept>>,
}

struct Shared {
    order: Mutex<(Order, bool)>,
    changed: Condvar,
    /// Under which epoch and until when this node speaks for the witness.
    held: Mutex<Option<(u64, BootTime)>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change is one assignment: a panic leaves nothing half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lease {
    /// Begins to watch the witness's disk.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(me: NodeId, witness: &Witness, order: Order, memory: Memory) -> std::io::Result<Lease> {
        let shared =
            Arc::new(Shared { order: Mutex::new((order, false)), changed: Condvar::new(), held: Mutex::new(None) });
        let (publish, view) = watch::channel(View { memory, ..View::default() });
        let kept = Arc::new(Mutex::new(Kept::default()));
        let mut keeper = Keeper {
            shared: shared.clone(),
            publish,
            kept: kept.clone(),
            path: witness.disk.clone().into(),
            mark: witness.mark,
            disk: None,
            lease: DiskLease::new(me, order.timing, order.longest_ms, memory),
        };
        std::thread::Builder::new().name("witness-lease".into()).spawn(move || keeper.run())?;
        Ok(Lease { shared, view, kept })
    }

    /// What to do from now on.
    pub fn order(&self, order: Order) {
        let mut current = locked(&self.shared.order);
        if current.0 != order {
            current.0 = order;
            self.shared.changed.notify_all();
        }
    }

    /// How the disk looks; told anew when something changes.
    pub fn view(&self) -> watch::Receiver<View> {
        self.view.clone()
    }

    /// Says whether this node speaks for the witness under `epoch` at the moment at
    /// which it is asked.
    pub fn gate(&self, epoch: u64) -> Gate {
        let shared = self.shared.clone();
        Arc::new(move || {
            let held = *locked(&shared.held);
            held.is_some_and(|(of, until)| of == epoch && boot_time() < until)
        })
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        locked(&self.shared.order).1 = true;
        *locked(&self.shared.held) = None;
        self.shared.changed.notify_all();
    }
}

struct Keeper {
    shared: Arc<Shared>,
    publish: watch::Sender<View>,
    kept: Arc<Mutex<Kept>>,
    path: PathBuf,
    mark: uuid::Uuid,
    disk: Option<Arc<Disk>>,
    lease: DiskLease,
}

impl Keeper {
    fn run(&mut self) {
        loop {
            let (order, stopped) = *locked(&self.shared.order);
            if stopped {
                break;
            }
            self.take(order);
            let pause = match self.disk.clone() {
                Some(disk) => self.step(&disk),
                None => self.open(),
            };
            if !pause.is_zero() {
                let current = locked(&self.shared.order);
                let unchanged = |(now, stopped): &mut (Order, bool)| *now == order && !*stopped;
                drop(self.shared.changed.wait_timeout_while(current, pause, unchanged));
            }
        }
        // Others need not wait for the end of a lease that nobody uses.
        self.lease.want(Want::Nothing);
        if let Some(disk) = self.disk.clone() {
            for _ in 0..2 {
                self.step(&disk);
            }
        }
    }

    fn take(&mut self, order: Order) {
        self.lease.set_timing(order.timing, order.longest_ms);
        self.lease.agreed(order.epoch);
        self.lease.seen_by_another(order.missing);
        self.lease.want(order.want);
        self.lease.keep(*locked(&self.kept));
    }

    fn open(&mut self) -> Duration {
        match Disk::open(&self.path, self.mark) {
            Ok(disk) => {
                self.disk = Some(Arc::new(disk));
                Duration::ZERO
            }
            Err(error) => {
                self.tell(Some(error.to_string()));
                OPEN_AGAIN
            }
        }
    }

    /// Does what is next, and says how long there is nothing to do.
    fn step(&mut self, disk: &Arc<Disk>) -> Duration {
        let now = boot_time();
        let done = match self.lease.next(now) {
            Step::Wait(until) => {
                self.hold();
                let trouble = self.publish.borrow().trouble.clone();
                self.tell(trouble);
                return Duration::from_nanos(until.0.saturating_sub(now.0));
            }
            Step::Look => disk.look().map(|look| self.lease.looked(boot_time(), &look)),
            Step::Write(block) => {
                // An owner that gives up stops to speak before it says so.
                self.hold();
                disk.write_block(&block).map(|()| self.lease.wrote(boot_time()))
            }
        };
        let trouble = match done {
            Ok(()) => {
                let stale = "it shows less than before, so it was restored or exchanged. Its vote could undo what was \
                             agreed on, so it is not used: set a witness anew";
                self.lease.stale().then(|| format!("finds {} stale: {stale}", self.path.display()))
            }
            Err(error) => {
                self.lease.failed(boot_time());
                // What the path names may have changed: it is opened anew, unless this
                // node still speaks for the witness on the one that is open.
                if self.lease.until().is_none() {
                    self.disk = None;
                }
                Some(DiskError::Io { action: "use", path: self.path.clone(), source: error }.to_string())
            }
        };
        self.hold();
        self.tell(trouble);
        Duration::ZERO
    }

    /// Lets answers out for as long as the lease lasts, and not longer.
    fn hold(&self) {
        *locked(&self.shared.held) = self.lease.until().map(|until| (self.lease.epoch(), until));
    }

    fn tell(&self, trouble: Option<String>) {
        let mine = self.lease.held(boot_time()).then(|| Some((self.lease.epoch(), self.disk.clone()?))).flatten();
        let (other, stale) = (self.lease.active(), self.lease.stale());
        let memory = self.lease.memory();
        self.publish.send_if_modified(|view| {
            let epochs = |view: &Option<(u64, Arc<Disk>)>| view.as_ref().map(|(epoch, _)| *epoch);
            let changed = epochs(&view.mine) != epochs(&mine)
                || (view.other, view.stale, &view.trouble) != (other, stale, &trouble)
                || view.memory.epoch != memory.epoch;
            let last = if trouble.is_none() { boot_time() } else { view.last };
            *view = View { mine, other, trouble, stale, memory, last };
            changed
        });
    }
}
