//! The watchdog thread's own turns, on a stand-in for the device.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use holdfast_core::NodeTerm;
use holdfast_core::watchdog::Device;

use super::stand_in::{ABLE, Note, StandIn};
use super::*;
use crate::keeper::table::Published;
use crate::realtime::pidfd_open;
use crate::realtime::tests::allocations;

/// The stand-ins below `root`.
pub fn below(root: PathBuf) -> Watchdogs {
    Watchdogs { choice: Choice::Auto, devices: root.join("dev"), described: root.join("sys") }
}

struct Bench {
    dog: WatchdogThread,
    device: StandIn,
    run_dir: tempfile::TempDir,
}

impl Bench {
    fn new(options: u32, longest_s: u32) -> Bench {
        let run_dir = tempfile::tempdir().unwrap();
        let device = StandIn::with(record(run_dir.path()), options, longest_s);
        let dog = thread(&device, run_dir.path());
        dog.signs.cleared.store(true, SeqCst);
        Bench { dog, device, run_dir }
    }

    fn lease(&self, length_ms: u64) {
        self.dog.table.lasting(length_ms);
        self.dog.table.gain(NodeTerm(1), boot_time().plus_ms(60_000));
    }

    fn vm(&self) -> (Child, Published) {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pidfd = pidfd_open(child.id().cast_signed()).unwrap();
        (child, self.dog.table.publish(pidfd).unwrap())
    }

    fn recorded(&self) -> bool {
        record(self.run_dir.path()).exists()
    }
}

fn record(run_dir: &Path) -> PathBuf {
    run_dir.join("watchdog.json")
}

fn thread(device: &StandIn, run_dir: &Path) -> WatchdogThread {
    let signs = Signs {
        wake: EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap(),
        cleared: AtomicBool::new(false),
        stopping: AtomicBool::new(false),
    };
    let book = Book::open(run_dir).unwrap();
    WatchdogThread::new(below(device.root()), book, Arc::new(Table::new().unwrap()), Arc::new(signs)).unwrap()
}

fn end(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn it_is_recorded_then_armed_fed_without_memory_and_disarmed() {
    let mut bench = Bench::new(ABLE, u32::MAX);
    assert!(matches!(&bench.dog.standing, Standing::Ready { device } if device.identity == "Stand-in"));
    bench.lease(1_500);
    bench.dog.turn();
    assert_eq!(bench.device.notes(), [], "nothing to watch");

    let (child, published) = bench.vm();
    bench.dog.turn();
    assert_eq!(bench.device.notes(), [Note::Armed { recorded: true }, Note::Set(10)]);
    assert!(matches!(&bench.dog.standing, Standing::Armed { timeout_s: 10, .. }));
    let fed = bench.device.state().feedings;
    let before = allocations();
    for _ in 0..3 {
        bench.dog.turn();
    }
    assert_eq!(allocations(), before);
    assert_eq!(bench.device.state().feedings, fed + 3);

    // The profile has become another one.
    bench.dog.table.lasting(10_000);
    bench.dog.turn();
    assert_eq!(bench.device.state().timeout_s, 15);

    drop(bench.dog.table.withdraw(published));
    bench.dog.turn();
    assert_eq!(bench.device.notes().last(), Some(&Note::Disarmed));
    assert!(!bench.recorded());
    assert!(matches!(&bench.dog.standing, Standing::Ready { .. }));
    end(child);
}

#[test]
fn a_watchdog_that_is_not_fit_is_not_armed_and_says_why() {
    let why = |bench: &mut Bench| {
        bench.lease(1_500);
        let vm = bench.vm();
        bench.dog.turn();
        assert!(!bench.recorded());
        end(vm.0);
        match &bench.dog.standing {
            Standing::Absent { why } => why.clone(),
            other => panic!("{other:?}"),
        }
    };
    for (file, text, reason) in [("nowayout", "1\n", "(nowayout)"), ("state", "active\n", "armed by something else")] {
        let mut bench = Bench::new(ABLE, u32::MAX);
        bench.device.describe(file, text);
        let why = why(&mut bench);
        assert!(why.contains(reason), "{why}");
        assert_eq!(bench.device.notes(), [], "not even opened");
    }

    // These are known only from the device, which is armed by opening it.
    let mut bench = Bench::new(ABLE & !0x100, u32::MAX);
    let unable = why(&mut bench);
    assert!(unable.contains("abilities"), "{unable}");
    assert_eq!(bench.device.notes(), [Note::Armed { recorded: true }, Note::Disarmed]);
    let mut bench = Bench::new(ABLE, 4);
    let short = why(&mut bench);
    assert!(short.contains("waits for 4 s at most"), "{short}");
    assert_eq!(bench.device.notes().last(), Some(&Note::Disarmed));

    let bench = Bench::new(ABLE, u32::MAX);
    let other = Watchdogs { choice: Choice::Named("watchdog3".into()), ..below(bench.device.root()) };
    assert!(other.find().unwrap_err().contains("watchdog3 is not there"));
    let never = Watchdogs { choice: Choice::Never, ..below(bench.device.root()) };
    assert_eq!(never.find(), Err("the configuration says none".into()));
    assert_eq!(
        Watchdogs { described: "/does/not/exist".into(), ..never }.find().unwrap_err(),
        "the configuration says none"
    );
    let somebody = fs::OpenOptions::new().write(true).open(bench.device.root().join("dev/watchdog0")).unwrap();
    let book = Book::open(bench.run_dir.path()).unwrap();
    let device = Device { path: bench.device.root().join("dev/watchdog0").display().to_string(), ..Device::default() };
    let busy = book.arm(device, 10).err().unwrap();
    assert!(busy.contains("in use by another process"), "{busy}");
    drop(somebody);
}

#[test]
fn what_an_earlier_keeper_left_armed_is_disarmed_when_all_it_ran_is_dead_and_not_before() {
    let mut bench = Bench::new(ABLE, u32::MAX);
    bench.lease(1_500);
    let vm = bench.vm();
    bench.dog.turn();
    // It goes without a word.
    let Bench { dog, device, run_dir } = bench;
    drop(dog);
    device.wait("abandoned", |state| state.notes.ends_with(&[Note::Abandoned]));

    let mut next = thread(&device, run_dir.path());
    assert!(matches!(&next.standing, Standing::Left { timeout_s: 10, .. }), "{:?}", next.standing);
    next.turn();
    assert_eq!(device.notes().last(), Some(&Note::Abandoned), "what it ran may be alive");
    end(vm.0);
    next.signs.cleared.store(true, SeqCst);
    next.turn();
    assert_eq!(device.notes().last(), Some(&Note::Disarmed));
    assert!(!record(run_dir.path()).exists());
    assert!(matches!(&next.standing, Standing::Ready { .. }), "{:?}", next.standing);
}
