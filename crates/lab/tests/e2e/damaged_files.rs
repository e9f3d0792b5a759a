//! A node whose files are damaged does not start, says which file and what to
//! do, and leaves the file as it is.

use std::fs;

use holdfast_api::{AddSwitch, NodeState, SwitchKind};

use crate::bench::{DEADLINE, eventually, three_nodes};

type Damage = fn(&mut Vec<u8>);

#[test]
fn a_node_with_a_damaged_file_refuses_to_start() {
    let (cluster, _turn) = three_nodes();
    let node = cluster.followers().unwrap().remove(0);
    let host = cluster.host(&node).unwrap();
    let state = host.directory().join("var");
    let damages: [(&str, Damage); 4] = [
        ("identity.json", |bytes| bytes.truncate(bytes.len() / 2)),
        ("identity.json", Vec::clear),
        ("consensus/log", |bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x55;
        }),
        ("consensus/log", |bytes| bytes.truncate(bytes.len() / 2)),
    ];
    for (number, (file, damage)) in damages.into_iter().enumerate() {
        host.stop_service().unwrap();
        let path = state.join(file);
        let whole = fs::read(&path).unwrap();
        let mut bytes = whole.clone();
        damage(&mut bytes);
        assert_ne!(bytes, whole);
        fs::write(&path, &bytes).unwrap();
        let logged = fs::metadata(host.log_path()).unwrap().len();
        host.start_service().unwrap();
        let said = eventually("a refusal in the log", || {
            let log = fs::read(host.log_path()).unwrap();
            let log = String::from_utf8_lossy(&log[usize::try_from(logged).unwrap()..]).into_owned();
            // A line is there when its end is.
            log.split_inclusive('\n')
                .find(|line| line.ends_with('\n') && line.contains("the agent cannot go on"))
                .map(str::to_owned)
        });
        println!("{file}: {said}");
        assert!(said.contains(file), "{said}");
        let advised = ["remove", "restore", "Restore", "move"].iter().any(|word| said.contains(word));
        assert!(advised, "no advice: {said}");
        assert!(cluster.client(&node).cluster().is_err(), "it answers");
        assert_eq!(fs::read(&path).unwrap(), bytes, "{file} was changed");
        cluster.wait_node(&node, DEADLINE, |node| node.state == NodeState::Lost || node.silent_ms.is_some()).unwrap();
        // The others go on without it.
        let name = format!("after-{number}");
        let request = AddSwitch { name, kind: SwitchKind::Private, uplink: None };
        cluster.any().unwrap().add_switch(&request).unwrap();

        host.stop_service().unwrap();
        fs::write(&path, &whole).unwrap();
        host.start_service().unwrap();
        cluster.wait_api(&node, DEADLINE).unwrap();
        cluster.wait_ready(DEADLINE).unwrap();
    }
}
