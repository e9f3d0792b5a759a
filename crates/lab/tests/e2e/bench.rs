//! What all the tests stand on.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use holdfast_api::{VmState, VmView};
use holdfast_lab::cluster::{ApiError, Cluster, ClusterSpec};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};

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

/// The word and the sentence with which a request was refused.
pub fn refused<T: std::fmt::Debug>(answer: Result<T, ApiError>) -> (String, String) {
    match answer {
        Err(ApiError::Refused { status, code, message }) => {
            assert!((400..500).contains(&status), "{status} {code}: {message}");
            assert!(message.len() > 10, "no sentence: {message:?}");
            (code, message)
        }
        other => panic!("not refused: {other:?}"),
    }
}

/// Waits until `look` finds something in what the lab's own files show.
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < until, "not within {DEADLINE:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether a VM runs on another node than `before`.
pub fn elsewhere(before: &str) -> impl Fn(&VmView) -> bool {
    move |vm| vm.state == VmState::Running && vm.node.as_deref().is_some_and(|node| node != before)
}

/// Puts a VM onto a node.
pub fn bring(cluster: &Cluster, vm: &str, node: &str) {
    if cluster.node_of(vm).unwrap() != node {
        cluster.migrate(vm, node, DEADLINE).unwrap();
    }
}

/// The nodes that were declared lost by events with an index above `since`, once
/// for each time.
pub fn lost_since(cluster: &Cluster, since: u64) -> Vec<String> {
    let events = cluster.any().unwrap().events(since).unwrap();
    let lost = events.into_iter().filter(|event| event.text.starts_with("is lost"));
    lost.filter_map(|event| event.subject.strip_prefix("node ").map(str::to_owned)).collect()
}

/// The names of all hosts but these.
pub fn all_but(cluster: &Cluster, names: &[&str]) -> Vec<String> {
    let hosts = cluster.hosts();
    hosts.iter().map(|host| host.name().to_owned()).filter(|name| !names.contains(&name.as_str())).collect()
}

/// Asks a node over HTTPS from outside the cluster, trusting the authority `ca`; the
/// whole answer. `head` is the request's line and its own headers.
pub fn https(cluster: &Cluster, address: &str, ca: &str, head: &str, body: &str) -> String {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from(address.to_owned()).unwrap();
    let mut tls = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let outside = cluster.lab().fabric().client();
    let mut tcp = outside.run(|| TcpStream::connect((address, 7470)).unwrap()).unwrap();
    tcp.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut stream = rustls::Stream::new(&mut tls, &mut tcp);
    let rest = format!("Host: {address}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(format!("{head}\r\n{rest}").as_bytes()).unwrap();
    let mut answer = Vec::new();
    // The server may end the connection without TLS's own farewell.
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}
