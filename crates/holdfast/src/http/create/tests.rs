use proptest::prelude::*;

use super::*;
use crate::http::views;

fn node(id: u64, machines: &[&str]) -> Node {
    Node {
        id: NodeId(id),
        name: format!("n{id}"),
        port: 1,
        heartbeat_port: 1,
        heartbeat_key: [0; 32],
        membership: Membership::Up,
        term: NodeTerm(1),
        incarnation: Incarnation(1),
        facts: NodeFacts {
            qemu: Some("7.2.0".into()),
            machines: machines.iter().map(|&machine| machine.into()).collect(),
            ..NodeFacts::default()
        },
        joined_ms: 0,
        site: None,
        drained_ms: None,
        leaves: false,
    }
}

fn nodes(nodes: impl IntoIterator<Item = Node>) -> ClusterState {
    let mut state = ClusterState::default();
    state.nodes.extend(nodes.into_iter().map(|node| (node.id, node)));
    state
}

fn vm(id: VmId, name: &str, spec: VmSpec) -> Vm {
    Vm {
        id,
        name: name.into(),
        spec,
        desired: Desired::Stopped,
        placement: Placement::Nowhere,
        last_epoch: Epoch(0),
        seen: Default::default(),
        restart: None,
        disks: DiskStage::Ready,
        hold: None,
        crashes: Vec::new(),
        causes: Vec::new(),
        created_ms: 0,
    }
}

#[test]
fn the_newest_machine_type_that_all_nodes_offer_is_chosen() {
    let old = node(1, &["pc-i440fx-7.2", "pc-q35-6.2", "pc-q35-7.2"]);
    let new = node(2, &["pc-q35-6.2", "pc-q35-7.2", "pc-q35-10.0", "pc-q35-9.2"]);
    let both = nodes([old.clone(), new.clone()]);
    assert_eq!(machine(&both, None).unwrap(), "pc-q35-7.2");
    // 10.0 is newer than 9.2, whatever their letters say.
    assert_eq!(machine(&nodes([new.clone()]), None).unwrap(), "pc-q35-10.0");
    let mut lost = old.clone();
    lost.membership = Membership::Lost { since_ms: 1 };
    assert_eq!(machine(&nodes([lost, new]), None).unwrap(), "pc-q35-10.0");
    assert_eq!(machine(&both, Some("pc-i440fx-7.2")).unwrap(), "pc-i440fx-7.2");
    assert_eq!(machine(&both, Some("q35")).unwrap_err().code, "invalid");
    assert_eq!(machine(&nodes([]), None).unwrap_err().code, "no_room");
    let apart = nodes([old, node(3, &["pc-q35-11.0"])]);
    assert_eq!(machine(&apart, None).unwrap_err().code, "no_machine_type");
}

#[test]
fn a_disk_is_as_large_as_asked_and_never_smaller_than_its_image() {
    let size = |bytes| Some(api::Size(bytes));
    assert_eq!(disk_size(0, size(1 << 20), None, 512), Ok(1 << 20));
    assert_eq!(disk_size(0, size(1 << 20), Some(512), 512), Ok(1 << 20));
    assert_eq!(disk_size(0, None, Some(513), 512), Ok(1024));
    for (wanted, image, text) in [
        (size(0), None, "is 0"),
        (size(100), None, "no multiple of 512"),
        (size(512), Some(1024), "smaller than its image"),
        (None, None, "has to be given"),
        (None, Some(0), "empty"),
        (None, Some(u64::MAX), "empty"),
    ] {
        let refused = disk_size(1, wanted, image, 512).unwrap_err();
        assert!(refused.message.contains(text), "{refused}");
        assert!(refused.message.starts_with("disk 1"), "{refused}");
    }
}

#[test]
fn a_disk_larger_than_its_volume_is_refused() {
    let mut disk = definition("web", None).disks.remove(0);
    assert_eq!(fits_volume(0, 10, &disk, Ok(10)), Ok(()));
    let refused = fits_volume(0, 11 << 30, &disk, Ok(10 << 30)).unwrap_err();
    assert_eq!(refused.message, "disk 0: its size, 11 GiB, is larger than volume \"main\", 10 GiB");
    let gone = std::io::Error::from(std::io::ErrorKind::NotFound);
    assert_eq!(fits_volume(0, 1, &disk, Err(gone)).unwrap_err().code, "volume_unreachable");
    disk.allocate = api::Allocation::Full;
    let refused = fits_volume(0, 11 << 30, &disk, Ok(10 << 30)).unwrap_err();
    assert_eq!(refused.message, "disk 0: it is to be fully allocated with 11 GiB, and volume \"main\" has 10 GiB free");
    let room = |kind| room_at(Path::new("/"), kind).unwrap();
    let (all, free) = (room(api::Allocation::Thin), room(api::Allocation::Full));
    assert!(free > 0 && free <= all);
}

#[test]
fn a_source_is_a_path_here_or_on_a_volume_and_never_outside_of_it() {
    assert_eq!(source("/a:b/c").unwrap(), Source::Here("/a:b/c".into()));
    let on = Source::OnVolume { volume: "main".into(), file: "images/debian.qcow2".into() };
    assert_eq!(source("main:images/debian.qcow2").unwrap(), on);
    for text in ["", "debian.qcow2", "main:", ":x", "main:/etc/shadow", "main:../x", "main:a/../../x", "main:./x"] {
        assert!(source(text).is_err(), "{text}");
    }
}

#[test]
fn kernel_and_ramdisk_are_on_one_volume() {
    let mut state = nodes([]);
    for name in ["main", "fast"] {
        let volume = Volume { id: Uuid::nil(), kind: VolumeKind::Directory { path: name.into() }, added_ms: 0 };
        state.volumes.insert(name.into(), volume);
    }
    let mut wanted = definition("web", None);
    let here = Source::Here("/vmlinuz".into());
    let on = |volume: &str| source(&format!("{volume}:vmlinuz")).unwrap();
    assert_eq!(boot_volume(&state, &wanted, &on("fast"), Some(&here)).unwrap(), "fast");
    assert_eq!(boot_volume(&state, &wanted, &here, Some(&on("fast"))).unwrap(), "fast");
    assert!(boot_volume(&state, &wanted, &on("fast"), Some(&on("main"))).is_err());
    assert_eq!(boot_volume(&state, &wanted, &here, None).unwrap(), "main");
    wanted.disks.clear();
    assert!(boot_volume(&state, &wanted, &here, None).is_err());
    state.volumes.remove("main");
    assert_eq!(boot_volume(&state, &wanted, &here, None).unwrap(), "fast");
    assert_eq!(boot_volume(&state, &wanted, &on("gone"), None).unwrap_err().code, "not_found");
}

#[test]
fn hardware_addresses_are_drawn_fresh_and_never_twice() {
    let mut state = nodes([]);
    let mut wanted = definition("web", None);
    let nic = |mac: Option<&str>| api::NicDefinition { switch: "lan".into(), mac: mac.map(Into::into), vlan: None };
    wanted.nics = vec![nic(None), nic(None)];
    let mut next = 0;
    // Draws each address twice.
    let mut draw = || {
        next += 1;
        Mac([0x52, 0x54, 0, 0, 0, next / 2])
    };
    let compose = |state: &ClusterState, wanted: &api::VmDefinition, draw: &mut dyn FnMut() -> Mac| {
        compose(state, VmId(Uuid::new_v4()), wanted, &[512], "pc-q35-7.2".into(), None, draw)
    };
    let first = compose(&state, &wanted, &mut draw).unwrap();
    let macs = |spec: &VmSpec| spec.nics.iter().map(|nic| nic.mac.0[5]).collect::<Vec<_>>();
    assert_eq!(macs(&first), [0, 1]);
    let id = VmId(Uuid::new_v4());
    state.vms.insert(id, vm(id, "first", first));
    next = 0;
    let mut draw = || {
        next += 1;
        Mac([0x52, 0x54, 0, 0, 0, next / 2])
    };
    assert_eq!(macs(&compose(&state, &wanted, &mut draw).unwrap()), [2, 3]);
    wanted.nics = vec![nic(Some("52:54:00:00:00:09")), nic(Some("52:54:00:00:00:09"))];
    assert!(compose(&state, &wanted, &mut draw).unwrap_err().message.contains("two network adapters"));
    wanted.nics = vec![nic(Some("nonsense"))];
    assert!(compose(&state, &wanted, &mut draw).unwrap_err().message.contains("not a hardware address"));
    assert_eq!(draw_mac().0[..3], [0x52, 0x54, 0]);
}

#[test]
fn a_file_has_the_digest_of_its_contents() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), b"abc").unwrap();
    // SHA-256 of "abc": FIPS 180-2, appendix B.1.
    assert!(digest_of(file.path()).unwrap().starts_with("ba7816bf8f01cfea"));
}

#[test]
fn a_copy_is_there_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("vmlinuz");
    std::fs::write(&from, b"kernel").unwrap();
    let to = dir.path().join("boot/kernel-1");
    let copying = Copying { from, to: to.clone() };
    copy(&copying).unwrap();
    copy(&copying).unwrap();
    assert_eq!(std::fs::read(&to).unwrap(), b"kernel");
    let gone = Copying { from: dir.path().join("gone"), to: dir.path().join("boot/kernel-2") };
    assert!(copy(&gone).is_err());
    let left: Vec<_> = std::fs::read_dir(dir.path().join("boot")).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

#[test]
fn what_the_cluster_would_refuse_is_refused_before_anything_is_copied() {
    let spec = create(&definition("web", None)).spec;
    let command = Command::CreateVm {
        id: VmId(Uuid::new_v4()),
        name: "web".into(),
        spec,
        node: NodeId(1),
        sources: Sources::default(),
    };
    let mut state = nodes([node(1, &[])]);
    state.cluster.name = "prod".into();
    assert_eq!(rehearse(&state, command).unwrap_err().code, "not_found");
}

#[tokio::test]
async fn what_is_not_a_readable_file_is_refused_with_its_path() {
    let dir = tempfile::tempdir().unwrap();
    let refused = readable("kernel", dir.path()).await.unwrap_err();
    assert!(refused.message.contains("not a regular file"), "{refused}");
    let missing = dir.path().join("vmlinuz");
    let refused = readable("kernel", &missing).await.unwrap_err();
    assert_eq!(refused.code, "unreadable");
    assert!(refused.message.contains(&missing.display().to_string()), "{refused}");
    // Nobody writes to this pipe: opening it would never end.
    nix::unistd::mkfifo(&missing, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(readable("kernel", &missing).await.is_err());
}

fn definition(name: &str, boot: Option<api::KernelBoot>) -> api::VmDefinition {
    api::VmDefinition {
        name: name.into(),
        cpus: 2,
        memory: api::Size(512 << 20),
        machine: None,
        cpu_model: None,
        boot,
        disks: vec![api::DiskDefinition {
            volume: "main".into(),
            size: None,
            format: api::DiskFormat::Qcow2,
            allocate: api::Allocation::Thin,
            image: None,
            file: None,
        }],
        nics: Vec::new(),
        priority: api::Priority::High,
        stop_timeout_s: 30,
    }
}

prop_compose! {
    fn definitions()(
        name in "[a-z][a-z0-9-]{0,10}", cpus in 1..512u32, mib in 16..1_000_000u64,
        cpu_model in proptest::option::of("[a-z]{1,8}"),
        boot in proptest::option::of(("[a-z]{1,4}/[a-z]{1,4}", proptest::option::of("[a-z]{1,8}"), "[a-z =]{0,9}")),
        disks in proptest::collection::vec(
            ("[a-z]{1,5}", proptest::option::of(1..9_000_000u64), 0..4usize, any::<bool>()), 0..4),
        nics in proptest::collection::vec(("[a-z]{1,5}", any::<bool>(), proptest::option::of(1..4095u16)), 0..4),
        priority in 0..4usize, stop_timeout_s: u32,
    ) -> api::VmDefinition {
        api::VmDefinition {
            name, cpus, memory: api::Size(mib << 20), machine: None, cpu_model, stop_timeout_s,
            boot: boot.map(|(kernel, initrd, append)| api::KernelBoot {
                kernel: format!("main:{kernel}"), initrd: initrd.map(|file| format!("main:{file}")), append,
            }),
            disks: disks.into_iter().map(|(volume, blocks, format, full)| api::DiskDefinition {
                volume, size: blocks.map(|blocks| api::Size(blocks * 512)), image: None, file: None,
                allocate: if full { api::Allocation::Full } else { api::Allocation::Thin },
                format: {
                    use api::DiskFormat::*;
                    [Raw, Qcow2, Vhdx, Vhd][format]
                },
            }).collect(),
            nics: nics.into_iter().enumerate().map(|(index, (switch, named, vlan))| api::NicDefinition {
                switch, vlan, mac: named.then(|| format!("52:54:00:00:01:{index:02x}")),
            }).collect(),
            priority: [api::Priority::None, api::Priority::Low, api::Priority::Medium, api::Priority::High][priority],
        }
    }
}

/// Creates a VM as the API would, with the sizes that images would give.
fn create(wanted: &api::VmDefinition) -> Vm {
    let sizes: Vec<_> = wanted.disks.iter().map(|disk| disk_size(0, disk.size, Some(512), 512).unwrap()).collect();
    let on_volume = |text: &str| match source(text).unwrap() {
        Source::OnVolume { volume, file } => (volume, file),
        Source::Here(path) => panic!("{} is copied by another way", path.display()),
    };
    let boot = wanted.boot.as_ref().map(|boot| {
        let (volume, kernel) = on_volume(&boot.kernel);
        DirectBoot {
            volume,
            kernel,
            initrd: boot.initrd.as_deref().map(|initrd| on_volume(initrd).1),
            append: boot.append.clone(),
        }
    });
    let id = VmId(Uuid::new_v4());
    let machine = wanted.machine.clone().unwrap_or("pc-q35-7.2".into());
    let spec = compose(&nodes([]), id, wanted, &sizes, machine, boot, draw_mac).unwrap();
    vm(id, &wanted.name, spec)
}

proptest! {
    #[test]
    fn what_is_shown_creates_an_equal_vm(wanted in definitions()) {
        let shown = views::definition(&create(&wanted));
        let yaml = serde_norway::to_string(&shown).unwrap();
        let read: api::VmDefinition = serde_norway::from_str(&yaml).unwrap();
        let again = create(&read);
        prop_assert_eq!(views::definition(&again), shown.clone());
        // And nothing that was asked for got lost on the way there.
        prop_assert_eq!(shown.cpus, wanted.cpus);
        prop_assert_eq!(&shown.boot, &wanted.boot);
        let kinds = |vm: &api::VmDefinition| vm.disks.iter().map(|disk| (disk.format, disk.allocate)).collect::<Vec<_>>();
        prop_assert_eq!(kinds(&shown), kinds(&wanted));
        for (nic, wanted) in shown.nics.iter().zip(&wanted.nics) {
            prop_assert!(wanted.mac.is_none() || wanted.mac == nic.mac);
        }
    }
}
