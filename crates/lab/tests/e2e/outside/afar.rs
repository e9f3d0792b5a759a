//! `--server`, `--token` and `--ca`.

use holdfast_api::{NodeView, VmView};
use holdfast_lab::cluster::Cluster;

use crate::shell::Shell;

pub fn the_command_line_works_from_afar(cluster: &Cluster) {
    let n1 = Shell::on(cluster, "n1");
    let files = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = files.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let ca = file("ca.pem", &n1.ok(&["cluster", "ca"]));
    let token = n1.ok(&["token", "create", "ci"]).trim().to_owned();
    let afar =
        |server: &str, token: &str, ca: &str| Shell::afar(cluster, &["--server", server, "--token", token, "--ca", ca]);

    // Any node is as good as another, for reading and for writing.
    for server in ["https://10.77.1.11", "https://10.77.1.12:7470"] {
        let nodes: Vec<NodeView> = afar(server, &token, &ca).json(&["node", "list", "--json"]);
        assert_eq!(nodes.len(), 2);
    }
    let n2 = afar("https://10.77.1.12", &token, &ca);
    n2.ok(&["vm", "start", "web"]);
    let web: VmView = n2.json(&["vm", "show", "web", "--json"]);
    assert!(web.node.is_some(), "{web:?}");
    n2.ok(&["vm", "stop", "web", "--force"]);
    assert!(n1.ok(&["events"]).contains("token ci"), "who did it is told");

    // A file of the machine outside is none of the node's.
    let relative = n2.fails(&["vm", "create", "x", "--disk", "vol1", "--image", "x.raw"], 1);
    assert!(relative.contains("x.raw") && relative.contains("absolute"), "{relative}");
    let wrong = afar("https://10.77.1.11", "guess", &ca).fails(&["node", "list"], 1);
    assert!(wrong.contains("token") && wrong.contains("holdfast token create"), "{wrong}");
    let stranger = rcgen::generate_simple_self_signed(["stranger".to_owned()]).unwrap();
    let other_ca = file("other.pem", &stranger.cert.pem());
    let other = afar("https://10.77.1.11", &token, &other_ca).fails(&["node", "list"], 1);
    assert!(other.contains("--ca") && other.contains("certificate"), "{other}");
    assert!(!other.contains(&token), "{other}");
    let no_ca = afar("https://10.77.1.11", &token, &file("empty.pem", "")).fails(&["node", "list"], 1);
    assert!(no_ca.contains("empty.pem"), "{no_ca}");
    let missing = Shell::afar(cluster, &["--server", "https://10.77.1.11", "--ca", &ca]).fails(&["node", "list"], 1);
    assert!(missing.contains("--token"), "{missing}");
    let nobody = afar("https://10.77.1.99", &token, &ca).fails(&["node", "list"], 1);
    assert!(nobody.contains("10.77.1.99"), "{nobody}");

    n1.ok(&["token", "revoke", "ci"]);
    let revoked = n2.fails(&["vm", "start", "web"], 1);
    assert!(revoked.contains("revoked"), "{revoked}");
}
