//! Hosts that cannot do what a node has to: without QEMU, with one that is too
//! old, or with a clock that is far off.

use std::os::unix::fs::PermissionsExt as _;
use std::time::{SystemTime, UNIX_EPOCH};

use holdfast_api::{CreateVm, MakeJoinToken, VmState};
use holdfast_lab::cluster::VmTemplate;

use crate::bench::{DEADLINE, eventually, form, https, refused, spec};

#[test]
fn no_vm_starts_where_qemu_is_missing_or_too_old() {
    let scratch = tempfile::tempdir().unwrap();
    let old = scratch.path().join("qemu-system-x86_64");
    std::fs::write(&old, "#!/bin/sh\necho 'QEMU emulator version 6.2.0 (Debian 1:6.2+dfsg-2)'\n").unwrap();
    std::fs::set_permissions(&old, std::fs::Permissions::from_mode(0o755)).unwrap();
    let spec = spec().configure("n2", "qemu", &old.display().to_string()).configure(
        "n3",
        "qemu",
        "/nowhere/qemu-system-x86_64",
    );
    let (cluster, _turn) = form(spec);

    let nodes = cluster.any().unwrap().nodes().unwrap();
    let qemu: Vec<bool> = nodes.iter().map(|node| node.qemu.is_some()).collect();
    assert_eq!(qemu, [true, false, false], "{nodes:?}");
    let log = |host: &str| std::fs::read_to_string(cluster.host(host).unwrap().log_path()).unwrap();
    assert!(log("n2").contains("is QEMU 6.2.0: at least 7.2 is needed"), "{}", log("n2"));
    assert!(log("n3").contains("/nowhere/qemu-system-x86_64 is not there"), "{}", log("n3"));

    // It runs where it can, and nowhere else, whoever is asked.
    let vm = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    assert_eq!(cluster.node_of("web").unwrap(), "n1");
    let (code, why) = refused(cluster.client("n3").migrate_vm("web", Some("n2")));
    assert!(code == "no_room" || code == "conflict", "{code} {why}");
    assert!(why.contains("QEMU"), "{why}");
    // A guest answers before it has opened its disk.
    let mut guest = vm.client().unwrap();
    let kept = eventually("a record is kept", || guest.write(DEADLINE).ok());
    cluster.assert_clean(&[(&vm, &[kept])]).unwrap();

    // Without the one that can, what should run waits and says why.
    cluster.job_done(&cluster.any().unwrap().start_vm("web").unwrap(), DEADLINE).unwrap();
    cluster.host("n1").unwrap().power_off().unwrap();
    let waiting = cluster.wait_vm("web", DEADLINE, |vm| vm.state == VmState::Waiting).unwrap();
    assert!(waiting.hold.as_ref().is_some_and(|why| why.contains("QEMU")), "{:?}", waiting.hold);
    let more = CreateVm { vm: cluster.definition(&VmTemplate::new("more", 102)), start: true };
    assert_eq!(refused(cluster.any().unwrap().create_vm(&more)).0, "no_room");
}

#[test]
fn a_host_whose_clock_is_far_off_does_not_join() {
    let mut spec = spec();
    spec.nodes = 1;
    let (cluster, _turn) = form(spec);
    let api = cluster.client("n1");
    let token = api.make_join_token(&MakeJoinToken::default()).unwrap().token;
    let secret = token.split_once('.').unwrap().0;
    let ca = api.cluster().unwrap().ca_certificate;
    let key = [7_u8; 32];
    let now_ms = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap();
    for clock_ms in [now_ms - 3_600_000, now_ms + 3_600_000, 0] {
        // What a host says when it joins, but for the clock.
        let request = serde_json::json!({
            "secret": secret,
            "clock_ms": clock_ms,
            "node": {
                "name": "n9", "port": 7470, "heartbeat_port": 7470, "heartbeat_key": key,
                "facts": {
                    "cpus": 1, "memory_bytes": 1 << 30, "accelerator": "tcg", "qemu": null, "machines": [],
                    "addresses": [], "version": "0.1.0", "watchdog": null
                }
            },
            "certificate_request": "",
        });
        let body = request.to_string();
        let head = "POST /api/v1/join HTTP/1.1\r\nContent-Type: application/json";
        let answer = https(&cluster, "10.77.1.11", &ca, head, &body);
        assert!(answer.starts_with("HTTP/1.1 422"), "{answer}");
        assert!(answer.contains(r#""code":"clock""#) && answer.contains("n9") && answer.contains("NTP"), "{answer}");
    }
    assert_eq!(api.nodes().unwrap().len(), 1);
}
