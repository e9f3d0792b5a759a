//! Keeps the structure of ARCHITECTURE.md true: who depends on whom, which crate
//! alone may name what, and where unsafe code is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Writes the golden file anew when this variable is set.
const RENEW: &str = "HOLDFAST_RENEW";

/// A dependency: its name and whether only tests have it.
type Dependencies = BTreeMap<String, BTreeSet<(String, bool)>>;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The workspace's packages and what they depend on.
fn dependencies() -> Dependencies {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(root())
        .output()
        .expect("cargo metadata runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let packages = metadata["packages"].as_array().expect("packages");
    packages
        .iter()
        .map(|package| {
            let all = package["dependencies"].as_array().expect("dependencies").iter();
            let all = all.map(|dependency| (text(&dependency["name"]), dependency["kind"] == "dev"));
            (text(&package["name"]), all.collect())
        })
        .collect()
}

/// The packages of ours on which `package` depends, tests aside.
fn of_ours<'a>(all: &'a Dependencies, package: &str) -> Vec<&'a str> {
    let mine = all.get(package).unwrap_or_else(|| panic!("there is a package {package}"));
    mine.iter().filter(|(name, tests)| !tests && all.contains_key(name)).map(|(name, _)| name.as_str()).collect()
}

#[test]
fn the_crates_are_a_star() {
    let all = dependencies();
    assert_eq!(of_ours(&all, "holdfast-core"), Vec::<&str>::new(), "core depends on none of ours");
    for leaf in
        ["holdfast-consensus", "holdfast-qemu", "holdfast-vswitch", "holdfast-volume", "holdfast-api", "holdfast-sim"]
    {
        let others: Vec<&str> = of_ours(&all, leaf).into_iter().filter(|name| *name != "holdfast-core").collect();
        assert!(others.is_empty(), "{leaf} may depend on holdfast-core alone, but depends on {others:?}");
    }
    for name in of_ours(&all, "holdfast-lab") {
        let allowed = ["holdfast-api", "holdfast-guest"];
        assert!(allowed.contains(&name), "the lab drives the binary from outside, but depends on {name}");
    }
    assert_eq!(of_ours(&all, "holdfast-guest"), Vec::<&str>::new(), "the guest knows nothing of its cluster");
    let parts = ["holdfast-consensus", "holdfast-qemu", "holdfast-vswitch", "holdfast-volume"];
    for package in all.keys().filter(|package| *package != "holdfast") {
        let composed: Vec<&str> = of_ours(&all, package).into_iter().filter(|name| parts.contains(name)).collect();
        assert!(composed.is_empty(), "only the binary composes, but {package} depends on {composed:?}");
    }
}

#[test]
fn some_crates_are_named_by_one_of_ours_only() {
    let all = dependencies();
    for (theirs, ours, tests_too) in [
        ("openraft", "holdfast-consensus", true),
        ("rtnetlink", "holdfast-vswitch", true),
        ("axum", "holdfast", true),
        ("io-uring", "holdfast-volume", true),
        // Tests that pretend to be a host that joins speak TLS themselves.
        ("rustls", "holdfast", false),
    ] {
        let names = |mine: &BTreeSet<(String, bool)>| {
            mine.iter().any(|(name, only_tests)| name == theirs && (tests_too || !only_tests))
        };
        let users: Vec<&str> =
            all.iter().filter(|(_, mine)| names(mine)).map(|(package, _)| package.as_str()).collect();
        assert_eq!(users, [ours], "only {ours} may name {theirs}");
    }
}

#[test]
fn core_is_pure() {
    let all = dependencies();
    let names: Vec<&str> =
        all["holdfast-core"].iter().filter(|(_, tests)| !tests).map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["serde", "thiserror", "uuid"], "nothing in core may have a clock, a socket or a file");
    for file in sources(&root().join("crates/core/src")) {
        let text = fs::read_to_string(&file).expect("a source is readable");
        for word in ["std::fs", "TcpStream", "UdpSocket", "std::thread", "Instant::now", "SystemTime", "Uuid::new_v4"] {
            assert!(!text.contains(word), "{} names {word}", file.display());
        }
    }
}

#[test]
fn unsafe_code_is_in_one_file_per_crate() {
    let packages = fs::read_dir(root().join("crates")).expect("crates/").flatten().map(|entry| entry.path());
    for package in packages.chain([root().join("guest"), root().join("xtask")]) {
        let is_unsafe = |file: &PathBuf| {
            let text = fs::read_to_string(file).expect("a source is readable");
            ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"].iter().any(|word| text.contains(word))
        };
        let files: Vec<PathBuf> = sources(&package.join("src")).into_iter().filter(is_unsafe).collect();
        assert!(files.len() <= 1, "unsafe code is in more than one file: {files:?}");
    }
}

/// The Rust sources below `directory`.
fn sources(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> = entries
        .flat_map(|path| match path.is_dir() {
            true => sources(&path),
            false => vec![path],
        })
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .collect();
    files.sort();
    files
}

#[test]
fn the_dependencies_between_our_crates_are_the_committed_ones() {
    let all = dependencies();
    let mut now = String::from("# Who depends on whom. Renewed by `cargo xtask fix`.\n");
    for (package, mine) in &all {
        let ours = mine.iter().filter(|(name, _)| all.contains_key(name));
        let ours: Vec<String> =
            ours.map(|(name, tests)| if *tests { format!("{name} (tests)") } else { name.clone() }).collect();
        let ours = if ours.is_empty() { "nothing of ours".to_owned() } else { ours.join(", ") };
        now += &format!("{package} -> {ours}\n");
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/structure.golden");
    if std::env::var_os(RENEW).is_some() {
        fs::write(&path, &now).expect("the golden file can be written");
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == now,
        "the dependencies between our crates have changed; if that is meant, run `cargo xtask fix` and change \
         ARCHITECTURE.md. Committed:\n{committed}\nNow:\n{now}"
    );
}
