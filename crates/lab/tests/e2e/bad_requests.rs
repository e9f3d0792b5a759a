//! What cannot be done is refused with a sentence and a word for programs, and
//! nothing half-made is left.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use holdfast_api::{
    AddSwitch, AddToken, AddVolume, CreateVm, JoinCluster, MadeToken, MakeJoinToken, Size, SwitchKind, VmDefinition,
};
use holdfast_lab::cluster::{Cluster, SWITCH, VOLUME, VmTemplate};

use crate::bench::{DEADLINE, eventually, form, refused, spec, three_nodes};

#[test]
fn bad_requests_are_refused_and_leave_nothing() {
    let (cluster, _turn) = three_nodes();
    cluster.create_vm_unawaited(&VmTemplate::new("web", 101).off()).unwrap();
    let api = cluster.client("n1");
    let before = listing(&cluster.on_volume(""));

    let named = [
        refused(api.vm("nobody")),
        refused(api.start_vm("nobody")),
        refused(api.delete_vm("nobody")),
        refused(api.job(4711)),
        refused(api.explain("nobody")),
        refused(api.set_network("nowhere", &Default::default())),
        refused(api.get::<holdfast_api::NodeView>("/api/v1/nodes/n9")),
        refused(api.get::<holdfast_api::VolumeView>("/api/v1/volumes/vol9")),
        refused(api.migrate_vm("web", Some("n9"))),
        refused(api.console("nobody")),
        refused(api.cancel_job(4711)),
        refused(api.fence("n9")),
        refused(api.set_site("n9", "east")),
        refused(api.delete("/api/v1/nodes/n9")),
        refused(api.delete("/api/v1/switches/lan9")),
        refused(api.delete("/api/v1/volumes/vol9")),
        refused(api.delete("/api/v1/tokens/nobody")),
    ];
    for (code, _) in named {
        assert_eq!(code, "not_found");
    }
    assert_eq!(refused(api.found("again")).0, "already_in_cluster");
    assert_eq!(refused(api.join(&line("10.77.1.11", "x"))).0, "already_in_cluster");
    let switch = AddSwitch { name: SWITCH.into(), kind: SwitchKind::Private, uplink: None };
    assert_eq!(refused(api.add_switch(&switch)).0, "already_exists");
    let token = AddToken { name: "ci".into() };
    api.post::<MadeToken>("/api/v1/tokens", &token).unwrap();
    assert_eq!(refused(api.post::<MadeToken>("/api/v1/tokens", &token)).0, "already_exists");
    for (used, by) in [(format!("volumes/{VOLUME}"), "web"), (format!("switches/{SWITCH}"), "web")] {
        let (code, why) = refused(api.delete(&format!("/api/v1/{used}")));
        assert!(code == "conflict" && why.contains(by), "{code} {why}");
    }
    bad_vms(&cluster);
    bad_volumes(&cluster);

    assert_eq!(listing(&cluster.on_volume("")), before, "something half-made is left on the volume");
    assert_eq!(api.vms().unwrap().len(), 1);
    assert_eq!(api.volumes().unwrap().len(), 1);
}

fn bad_vms(cluster: &Cluster) {
    let try_with = |change: &dyn Fn(&mut VmDefinition)| {
        let mut vm = cluster.definition(&VmTemplate::new("bad", 102));
        change(&mut vm);
        refused(cluster.client("n2").create_vm(&CreateVm { vm, start: true }))
    };
    assert_eq!(try_with(&|vm| vm.name = "web".into()).0, "already_exists");
    assert_eq!(try_with(&|vm| vm.name = "a b".into()).0, "invalid");
    assert_eq!(try_with(&|vm| vm.name = String::new()).0, "invalid");
    assert_eq!(try_with(&|vm| vm.cpus = 0).0, "invalid");
    assert_eq!(try_with(&|vm| vm.memory = Size(0)).0, "invalid");
    assert_eq!(try_with(&|vm| vm.memory = Size(1 << 40)).0, "no_room");
    assert_eq!(try_with(&|vm| vm.disks[0].size = Some(Size(0))).0, "invalid");
    assert_eq!(try_with(&|vm| vm.disks[0].size = None).0, "invalid");
    let (code, why) = try_with(&|vm| vm.disks[0].size = Some(Size(1 << 60)));
    assert!(code == "no_space" && why.contains(VOLUME), "{code} {why}");
    assert_eq!(try_with(&|vm| vm.disks[0].volume = "vol9".into()).0, "not_found");
    assert_eq!(try_with(&|vm| vm.nics[0].switch = "lan9".into()).0, "not_found");
    assert_eq!(try_with(&|vm| vm.nics[0].mac = Some("5".into())).0, "invalid");
    assert_eq!(try_with(&|vm| vm.machine = Some("q35".into())).0, "invalid");
    for image in ["/nowhere/image.raw".to_owned(), format!("{VOLUME}:nothing.raw"), "/tmp".to_owned()] {
        let (code, why) = try_with(&|vm| vm.disks[0].image = Some(image.clone()));
        assert!(code == "unreadable" && why.contains(image.rsplit(':').next().unwrap()), "{code} {why}");
    }
    assert_eq!(try_with(&|vm| vm.disks[0].image = Some(format!("{VOLUME}:../escape"))).0, "invalid");
    let (code, why) = try_with(&|vm| vm.boot.as_mut().unwrap().kernel = "/nowhere/vmlinuz".into());
    assert!(code == "unreadable" && why.contains("vmlinuz"), "{code} {why}");
    let (code, why) = refused(cluster.client("n2").raw(
        "POST",
        "/api/v1/vms",
        br#"{"vm":{"name":"x","memory":"128M","colour":"red"}}"#,
    ));
    assert!(code == "invalid" && why.contains("colour"), "{code} {why}");
}

fn bad_volumes(cluster: &Cluster) {
    let api = cluster.client("n1");
    let add = |name: &str, directory: PathBuf| {
        refused(api.add_volume(&AddVolume {
            name: name.into(),
            directory: Some(directory.display().to_string()),
            lun: None,
            erase: None,
        }))
    };
    let (code, why) = add("vol2", "/nowhere/at/all".into());
    assert!(code == "bad_path" && why.contains("/nowhere/at/all"), "{code} {why}");
    assert_eq!(add("vol2", "relative".into()).0, "invalid");
    assert_eq!(add(VOLUME, cluster.on_volume("")).0, "already_exists");
    assert_eq!(add("vol2", cluster.on_volume("")).0, "bad_path");
    // Only one node has it.
    let below = "etc/only-here";
    let (seen, only_here) =
        (cluster.host("n1").unwrap().directory().join(below), cluster.lab().host_directory().join(below));
    fs::create_dir(&seen).unwrap();
    let (code, why) = add("vol2", only_here.clone());
    assert!(code == "volume_not_shared" && why.contains("n2 has no directory") && why.contains(below), "{code} {why}");
    assert!(why.contains("mount it there first"), "{why}");
    assert_eq!(listing(&seen), Vec::<PathBuf>::new());
    let directory = Some(only_here.display().to_string());
    let request = AddVolume { name: "vol2".into(), directory, lun: None, erase: None };
    let (code, why) = refused(cluster.client("n3").add_volume(&request));
    assert!(code == "bad_path" && why.contains("n3 has no directory"), "{code} {why}");
    // The same path on every node, but each has its own directory there.
    let own = cluster.lab().host_directory().join("etc");
    let (code, why) = add("vol2", own);
    assert!(code == "volume_not_shared" && (why.contains("n2") || why.contains("n3")), "{code} {why}");
    for host in cluster.hosts() {
        assert!(!host.directory().join("etc/.holdfast-volume.json").exists());
        let linked = fs::read_dir(host.directory().join("clusterstorage")).unwrap();
        let linked: Vec<_> = linked.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(linked, [VOLUME], "on {}", host.name());
    }
}

fn line(address: &str, token: &str) -> JoinCluster {
    JoinCluster { address: address.into(), token: token.into(), site: None }
}

/// Every file below a directory.
fn listing(directory: &std::path::Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
        match entry.is_dir() {
            true => files.extend(listing(&entry)),
            false => files.push(entry),
        }
    }
    files.sort();
    files
}

#[test]
fn a_host_joins_only_with_a_token_that_is_good() {
    let (cluster, _turn) = form(spec().configure("n5", "node_name", "n1"));
    let host = cluster.add_host("n4").unwrap();
    host.power_on().unwrap();
    cluster.wait_api("n4", DEADLINE).unwrap();
    let (member, n4) = (cluster.client("n1"), cluster.client("n4"));
    assert_eq!(refused(n4.vms()).0, "not_in_cluster");

    let good = member.make_join_token(&MakeJoinToken::default()).unwrap();
    let join = |token: &str| refused(n4.join(&line(&good.address, token)));
    assert_eq!(join("nonsense").0, "bad_token");
    let (secret, pin) = good.token.split_once('.').unwrap();
    let never_issued = format!("{}.{pin}", "0".repeat(secret.len()));
    assert_eq!(join(&never_issued).0, "bad_token");
    // A token of another cluster pins another authority: nothing is told to a stranger.
    let other_pin = format!("{secret}.{}", "0".repeat(pin.len()));
    let (code, why) = join(&other_pin);
    assert!(!why.contains(secret), "the secret is told: {why}");
    println!("another authority: {code}: {why}");
    let (code, why) = refused(n4.join(&line("10.77.1.99:7470", &good.token)));
    assert!(why.contains("10.77.1.99"), "{code} {why}");

    let short = member.make_join_token(&MakeJoinToken { valid_ms: Some(1000) }).unwrap();
    assert_eq!(refused(member.make_join_token(&MakeJoinToken { valid_ms: Some(0) })).0, "invalid");
    let ends = Instant::now() + Duration::from_millis(1001);
    eventually("the token's end", || (Instant::now() > ends).then_some(()));
    let (code, why) = refused(n4.join(&line(&short.address, &short.token)));
    assert!(code == "bad_token" && why.contains("expired"), "{code} {why}");
    assert_eq!(member.nodes().unwrap().len(), 3);

    assert_eq!(n4.join(&line(&good.address, &good.token)).unwrap().name, "n4");
    let used = cluster.add_host("n5").unwrap();
    used.power_on().unwrap();
    cluster.wait_api("n5", DEADLINE).unwrap();
    let (code, why) = refused(cluster.client("n5").join(&line(&good.address, &good.token)));
    assert!(code == "bad_token" && why.contains("n4"), "{code} {why}");
    // Two hosts of one name cannot be told apart.
    let fresh = member.make_join_token(&MakeJoinToken::default()).unwrap();
    let (code, why) = refused(cluster.client("n5").join(&line(&fresh.address, &fresh.token)));
    assert!(code == "already_exists" && why.contains("n1"), "{code} {why}");
    assert_eq!(refused(cluster.client("n5").vms()).0, "not_in_cluster");
    assert_eq!(member.nodes().unwrap().len(), 4);
    cluster.wait_ready(DEADLINE).unwrap();

    // A node that is removed is none any more.
    member.delete("/api/v1/nodes/n4").unwrap();
    assert_eq!(member.nodes().unwrap().len(), 3);
    cluster
        .wait("three voters", DEADLINE, |client| {
            let quorum = client.cluster().ok()?.quorum;
            (quorum.voters == 3 && quorum.connected == 3).then_some(())
        })
        .unwrap();
}
