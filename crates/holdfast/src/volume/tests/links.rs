//! Two volume servers and the link between them, with the certificates of two nodes.

use std::io::{Read, Write};
use std::process::Command;
use std::sync::mpsc::Receiver;

use holdfast_core::LunPath;

use super::super::protocol::{Links, Peer, Routes};
use super::*;
use crate::heartbeat::SecretKey;
use crate::identity::{certify, new_authority, new_request};

const PATIENCE: Duration = Duration::from_secs(60);
const OWNER: NodeId = NodeId(1);
const EPOCH: u64 = 4;

/// A cluster's authority.
struct Authority(String, String);

impl Authority {
    fn new() -> Authority {
        rustls::crypto::ring::default_provider().install_default().ok();
        let (certificate, key) = new_authority("test").unwrap();
        Authority(certificate, key)
    }
}

/// A volume server with an agent that only listens.
struct Node {
    world: World,
    node: NodeId,
    port: u16,
    told: Receiver<ToAgent>,
}

impl Node {
    fn new(node: NodeId, Authority(ca, ca_key): &Authority) -> Node {
        let world = World::new();
        let (key, request) = new_request().unwrap();
        let certificate = certify(ca, ca_key, &request, node, &[]).unwrap();
        let secret = SecretKey::generate().unwrap();
        let identity = crate::identity::Identity::new(Uuid::nil(), node, ca.clone(), certificate, key, secret);
        identity.store(world.dir.path()).unwrap();
        let port = holdfast_lab::free_port().unwrap();
        let links = Links { state_dir: world.dir.path().into(), node, port };
        world.call(Call::Links(links)).unwrap();
        let (tell, told) = channel();
        world.disks.ways.agent(tell);
        Node { world, node, port, told }
    }

    fn route(&self, disk: &Disk, owner: &Node, leaves: bool) -> anyhow::Result<()> {
        self.route_under(EPOCH, disk, owner, leaves)
    }

    fn route_under(&self, epoch: u64, disk: &Disk, owner: &Node, leaves: bool) -> anyhow::Result<()> {
        let is_owner = owner.node == self.node;
        let peer =
            Peer { node: owner.node, term: NodeTerm(0), epoch, addresses: vec![([127, 0, 0, 1], owner.port).into()] };
        self.world.call(Call::Routes(Routes {
            volume: disk.volume.clone(),
            volume_id: disk.volume_id,
            device: disk.device.clone(),
            owner: (!is_owner).then_some(peer),
            term: NodeTerm(0),
            mine: (is_owner && !leaves).then_some(epoch),
            leaves: (is_owner && leaves).then_some(epoch),
            planned: false,
        }))
    }

    fn wait_path(&self, wanted: impl Fn(&LunPath) -> bool) {
        loop {
            let word = self.told.recv_timeout(PATIENCE).expect("the LUN is reached in another way");
            if let ToAgent::Path { path: Some(path), .. } = word
                && wanted(&path)
            {
                return;
            }
        }
    }
}

fn io(disk: &Disk, commands: &[&str]) {
    let url = format!("nbd+unix:///{EXPORT}?socket={}", disk.socket.display());
    let commands = commands.iter().flat_map(|command| ["-c", command]);
    let done = Command::new("qemu-io").args(["-f", "raw"]).args(commands).arg(url).output().unwrap();
    let text = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success() && !text.contains("failed"), "{text}");
}

/// A disk on the owner's LUN as a node has it that sees no device there yet.
fn without_device(node: &Node, disk: &Disk) -> Disk {
    let device = node.world.dir.path().join("device");
    let socket = node.world.dir.path().join("socket");
    node.world.disks.sockets.put(socket.clone(), UnixListener::bind(&socket).unwrap());
    Disk { device, socket, ..disk.clone() }
}

#[test]
fn a_node_without_a_device_goes_through_the_owner_until_it_has_one() {
    let authority = Authority::new();
    let (owner, node) = (Node::new(OWNER, &authority), Node::new(NodeId(2), &authority));
    let on_owner = owner.world.disk(1);
    let disk = without_device(&node, &on_owner);
    node.route(&disk, &owner, false).unwrap();
    let refused = format!("{:#}", node.world.call(Call::Serve(disk.clone())).unwrap_err());
    assert!(refused.contains("through node 1"), "{refused}");
    owner.route(&on_owner, &owner, false).unwrap();
    node.world.call(Call::Serve(disk.clone())).unwrap();
    node.wait_path(|path| matches!(path, LunPath::Redirected { through: OWNER, .. }));
    io(&disk, &["write -P 0x5a 0 20M", "flush", "read -P 0x5a 0 20M", "write -z 1M 64k", "read -P 0 1M 64k"]);
    node.world.disks.tell_carried();
    let carried =
        node.told.try_iter().any(|word| matches!(word, ToAgent::Redirected { bytes, .. } if bytes >= 40 << 20));
    assert!(carried, "it is said how much went through the owner");

    // The device appears.
    std::os::unix::fs::symlink(&on_owner.device, &disk.device).unwrap();
    node.wait_path(|path| *path == LunPath::Direct);
    io(&disk, &["read -P 0x5a 2M 18M", "write -P 0x11 0 4k", "flush"]);

    // Whoever leaves has nothing of others under way, and lets nobody in.
    owner.route(&on_owner, &owner, true).unwrap();
    assert!(owner.world.disks.book().luns.is_empty());
    node.world.call(Call::Withdraw(disk.clone())).unwrap();
    std::fs::remove_file(&disk.device).unwrap();
    let socket = node.world.dir.path().join("again");
    node.world.disks.sockets.put(socket.clone(), UnixListener::bind(&socket).unwrap());
    let refused = format!("{:#}", node.world.call(Call::Serve(Disk { socket, ..disk })).unwrap_err());
    assert!(refused.contains("does not own"), "{refused}");
}

#[test]
fn a_node_of_another_cluster_is_not_let_in() {
    let (owner, stranger) = (Node::new(OWNER, &Authority::new()), Node::new(NodeId(2), &Authority::new()));
    let on_owner = owner.world.disk(1);
    owner.route(&on_owner, &owner, false).unwrap();
    let disk = without_device(&stranger, &on_owner);
    stranger.route(&disk, &owner, false).unwrap();
    let refused = format!("{:#}", stranger.world.call(Call::Serve(disk)).unwrap_err());
    assert!(refused.contains("certificate"), "{refused}");
}

#[test]
fn a_life_that_does_not_know_what_was_sent_asks_before_it_writes() {
    let authority = Authority::new();
    let (owner, node) = (Node::new(OWNER, &authority), Node::new(NodeId(2), &authority));
    let on_owner = owner.world.disk(1);
    let disk = Disk { device: on_owner.device.clone(), ..without_device(&node, &on_owner) };
    let marks = node.world.dir.path().join(MARKS);
    std::fs::create_dir_all(&marks).unwrap();
    let mark = |epoch: u64| marks.join(format!("{}-{epoch}", disk.volume_id));
    std::fs::write(mark(EPOCH), []).unwrap();
    std::fs::write(mark(EPOCH - 1), []).unwrap();
    node.route(&disk, &owner, false).unwrap();
    node.world.call(Call::Serve(disk.clone())).unwrap();
    // The owner does not answer yet.
    node.wait_path(|path| matches!(path, LunPath::Unavailable { .. }));
    assert!(mark(EPOCH).exists() && !mark(EPOCH - 1).exists());
    owner.route(&on_owner, &owner, false).unwrap();
    node.wait_path(|path| *path == LunPath::Direct);
    io(&disk, &["write -P 0x11 0 4k", "flush"]);
    node.world.call(Call::Withdraw(disk)).unwrap();
}

#[test]
fn the_next_owner_is_heard_of_while_a_lun_is_opened_through_one_that_does_nothing() {
    let authority = Authority::new();
    let [owner, next, node] = [OWNER, NodeId(3), NodeId(2)].map(|id| Node::new(id, &authority));
    let on_owner = owner.world.disk(1);
    let disk = without_device(&node, &on_owner);
    owner.route(&on_owner, &owner, false).unwrap();
    next.route_under(EPOCH + 1, &on_owner, &next, false).unwrap();
    // It lets others in and does nothing for them.
    owner.world.disks.lease.ends.store(0, Ordering::SeqCst);
    node.route(&disk, &owner, false).unwrap();
    std::thread::scope(|scope| {
        let served = scope.spawn(|| node.world.call(Call::Serve(disk.clone())));
        node.wait_path(|_| true);
        node.route_under(EPOCH + 1, &disk, &next, false).unwrap();
        served.join().unwrap().unwrap();
    });
    io(&disk, &["write -P 0x5a 0 4k", "flush", "read -P 0x5a 0 4k"]);
}

/// How each request to an export begins.
const REQUEST: [u8; 4] = [0x25, 0x60, 0x95, 0x13];

/// Goes between a client and an export, at another socket: lets them agree on everything,
/// and keeps the client's requests to itself.
fn hanging(export: &Path, socket: &Path) {
    let (listener, export) = (UnixListener::bind(socket).unwrap(), export.to_owned());
    std::thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            let server = UnixStream::connect(&export).unwrap();
            let (mut answers, mut hears) = (server.try_clone().unwrap(), client.try_clone().unwrap());
            std::thread::spawn(move || std::io::copy(&mut answers, &mut hears));
            std::thread::spawn(move || {
                let (mut client, mut server, mut bytes) = (client, server, [0; 4096]);
                let mut hangs = false;
                while let Ok(length @ 1..) = client.read(&mut bytes) {
                    hangs |= bytes[..length].windows(4).any(|word| word == REQUEST);
                    if !hangs && server.write_all(&bytes[..length]).is_err() {
                        return;
                    }
                }
            });
        }
    });
}

#[test]
fn a_device_that_hangs_when_it_is_opened_is_gone_round() {
    let authority = Authority::new();
    let (owner, node) = (Node::new(OWNER, &authority), Node::new(NodeId(2), &authority));
    let on_owner = owner.world.disk(1);
    owner.route(&on_owner, &owner, false).unwrap();
    let behind = owner.world.disk(2);
    owner.world.call(Call::Serve(behind.clone())).unwrap();
    let socket = node.world.dir.path().join("hangs");
    hanging(&behind.socket, &socket);
    let device = format!("nbd+unix:///{EXPORT}?socket={}", socket.display()).into();
    let disk = Disk { device, ..without_device(&node, &on_owner) };
    node.route(&disk, &owner, false).unwrap();
    node.world.call(Call::Serve(disk.clone())).unwrap();
    node.wait_path(|path| matches!(path, LunPath::Redirected { through: OWNER, why } if why.contains("answer")));
    io(&disk, &["write -P 0x5a 0 4k", "flush", "read -P 0x5a 0 4k"]);
}

#[test]
fn a_new_life_of_an_owner_whose_own_path_is_away_says_that_it_has_left() {
    let owner = Node::new(OWNER, &Authority::new());
    let on_owner = owner.world.disk(1);
    let nobody = owner.world.dir.path().join("nobody");
    let away = Disk { device: format!("nbd+unix:///san?socket={}", nobody.display()).into(), ..on_owner.clone() };
    owner.route(&away, &owner, true).unwrap();
    assert!(owner.route(&away, &owner, false).is_err(), "nobody owns what it does not reach");
    // Another volume's device says nothing of this one's.
    let wrong = Disk { device: owner.world.disk(2).device, ..on_owner };
    let refused = format!("{:#}", owner.route(&wrong, &owner, true).unwrap_err());
    assert!(refused.contains("holds another volume"), "{refused}");
}
