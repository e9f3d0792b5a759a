//! Whatever is listed or shown, `--json` shows to programs.

use std::collections::BTreeSet;
use std::fs::File;

use holdfast_lab::cluster::Cluster;
use serde_json::Value;

use crate::shell::Shell;

/// A volume on a LUN, with the disk of a VM on it.
const LUN: &str = "vol2";
const LUN_BYTES: u64 = 480 << 20;

/// Every command that lists or shows something: its words, what is asked for, where in
/// the JSON a figure is and what it is there. `*` is the number of the last job.
const SHOWS: &[(&str, &str, &str, &str)] = &[
    ("cluster status", "", "/name", "lab"),
    ("cluster ca", "", "", "-----BEGIN CERTIFICATE-----"),
    ("node list", "", "/1/name", "n2"),
    ("node show", "n2", "/name", "n2"),
    ("node fencing show", "n2", "/agent", "fence_test"),
    ("quorum show", "", "/seats/0/name", "n1"),
    ("quorum witness show", "", "/disk", "witness"),
    ("network list", "", "/0/subnet", "10.77.1.0/24"),
    ("switch list", "", "/0/kind", "external"),
    ("volume list", "", "/0/name", "vol1"),
    ("volume show", "vol1", "/reach/1/node", "n2"),
    ("volume df", LUN, "/0/name", LUN),
    ("volume ls", LUN, "/0/vm", "x"),
    ("volume check", LUN, "/volume", LUN),
    ("vm list", "", "/0/name", "web"),
    ("vm show", "web", "/definition/name", "web"),
    ("job list", "", "/0/work", "create"),
    ("job show", "*", "/vm", "e"),
    ("events", "", "/0/subject", "cluster"),
    ("explain vm", "web", "/causes/0/text", ""),
    ("what-if", "lose n2", "/lost/0", "n2"),
    ("token list", "", "/0/name", "prometheus"),
];

/// Every other command.
const DOES: &[&str] = &[
    "agent",
    "cluster handover",
    "cluster init",
    "cluster profile",
    "cluster redirect-patience",
    "completions",
    "demo",
    "job cancel",
    "keeper",
    "man",
    "network set",
    "node drain",
    "node fence",
    "node fence-test",
    "node fencing clear",
    "node fencing set",
    "node join",
    "node remove",
    "node resume",
    "node set",
    "node token",
    "quorum force",
    "quorum witness set",
    "switch add",
    "switch remove",
    "token create",
    "token revoke",
    "vm console",
    "vm create",
    "vm delete",
    "vm migrate",
    "vm pause",
    "vm restart",
    "vm resume",
    "vm start",
    "vm stop",
    "volume add",
    "volume cp",
    "volume get",
    "volume import",
    "volume maintenance",
    "volume put",
    "volume remove",
    "volume rename",
    "volume repair",
    "volume rm",
    "volume set-owner",
];

pub fn everything_shown_is_shown_to_programs_too(cluster: &Cluster) {
    let n1 = Shell::on(cluster, "n1");
    let listed: BTreeSet<String> =
        SHOWS.iter().map(|show| show.0).chain(DOES.iter().copied()).map(str::to_owned).collect();
    assert_eq!(listed, commands(&n1), "a command is new or gone: say above whether it shows something");

    let witness = cluster.on_volume("witness").display().to_string();
    n1.ok(&["quorum", "witness", "set", "--disk", &witness]);
    n1.ok(&["node", "fencing", "set", "n2", "--agent", "fence_test", "--option", "plug=2"]);
    let device = cluster.lab().directory().join("lun");
    File::create(&device).unwrap().set_len(LUN_BYTES).unwrap();
    n1.ok(&["volume", "add", LUN, "--lun", &device.display().to_string()]);
    n1.ok(&["vm", "create", "x", "--memory", "128M", "--disk", "vol2:64M,format=raw"]);
    let jobs = cluster.client("n1").jobs().unwrap();
    let last = jobs.iter().rfind(|job| job.vm == "e").expect("a job").id.to_string();
    for (command, of, at, value) in SHOWS {
        let of = if *of == "*" { &last } else { *of };
        let mut words: Vec<&str> = command.split(' ').chain(of.split(' ').filter(|word| !word.is_empty())).collect();
        assert!(!n1.ok(&words).trim().is_empty(), "{command}");
        words.push("--json");
        let shown: Value = n1.json(&words);
        let found =
            shown.pointer(at).and_then(Value::as_str).unwrap_or_else(|| panic!("{command}: no {at} in {shown}"));
        assert!(!found.is_empty() && found.contains(value), "{command}: {at} is {found:?}, not {value:?}: {shown}");
    }
    n1.ok(&["node", "fencing", "clear", "n2"]);
    n1.ok(&["quorum", "witness", "set", "--none"]);
}

/// Every command that has no commands of its own, by the man pages, which are made from
/// the definition of the command line.
fn commands(shell: &Shell<'_>) -> BTreeSet<String> {
    let directory = tempfile::tempdir().unwrap();
    shell.ok(&["man", directory.path().to_str().unwrap()]);
    let mut leaves = BTreeSet::new();
    for page in std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path()) {
        let text = std::fs::read_to_string(&page).unwrap();
        if text.contains("\n.SH SUBCOMMANDS\n") {
            continue;
        }
        // NAME: `holdfast\-vm\-list \- List the VMs`; SYNOPSIS has the words apart.
        let synopsis = text.split("\n.SH SYNOPSIS\n").nth(1).and_then(|rest| rest.lines().next()).unwrap();
        let words = synopsis.trim_start_matches("\\fB").split("\\fR").next().unwrap().replace('\\', "");
        leaves.insert(words.trim_start_matches("holdfast ").to_owned());
    }
    leaves
}
