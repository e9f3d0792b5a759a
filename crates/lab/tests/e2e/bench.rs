//! What all the tests stand on.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use holdfast_lab::cluster::{Cluster, ClusterSpec};

/// Long enough for a busy machine; nothing takes this long unless it is broken.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// One cluster at a time: two would take each other's processors.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Held by a test for as long as it has a cluster.
pub type Turn = MutexGuard<'static, ()>;

pub fn turn() -> Turn {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The built program: `HOLDFAST_BINARY`, or the one beside the tests.
fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("HOLDFAST_BINARY") {
        return path.into();
    }
    let test = std::env::current_exe().expect("the test's own path");
    // .../debug/deps/e2e-0123
    let profile = test.parent().and_then(Path::parent).expect("a build directory");
    profile.join("holdfast")
}

fn guest() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../out/guest")
}

pub fn spec() -> ClusterSpec {
    ClusterSpec::new(binary(), guest()).unwrap()
}

/// Three nodes, all in order.
pub fn three_nodes() -> (Cluster, Turn) {
    form(spec())
}

pub fn form(spec: ClusterSpec) -> (Cluster, Turn) {
    let turn = turn();
    (Cluster::form(spec).unwrap(), turn)
}
