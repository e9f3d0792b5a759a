//! Files on a LUN are plain files for plain tools, on every node; the process that shows
//! them may be killed, and nothing of it is left when the volume goes.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Output;

use holdfast_api::CreateVm;
use holdfast_lab::HostProcess;
use holdfast_lab::cluster::{Cluster, ClusterSpec, VmTemplate};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;

use crate::bench::{DEADLINE, eventually, form, spec};
use crate::shell::Shell;

const LUN: &str = "san";
const LUN_BYTES: u64 = 480 << 20;
/// No multiple of anything.
const BYTES: u64 = (20 << 20) + 12_345;

fn image(path: &Path) {
    let file = File::create(path).unwrap();
    let words = (0..BYTES / 8).flat_map(|word| (word.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes());
    file.write_all_at(&words.collect::<Vec<_>>(), 0).unwrap();
    file.set_len(BYTES).unwrap();
}

/// Where a file of the LUN is, as every node sees it.
fn at(cluster: &Cluster, name: &str) -> PathBuf {
    cluster.lab().directory().join("host/clusterstorage").join(LUN).join(name)
}

fn run(cluster: &Cluster, host: &str, words: &[&str]) -> Output {
    cluster.host(host).unwrap().exec(words).unwrap()
}

fn ok(cluster: &Cluster, host: &str, words: &[&str]) -> String {
    let output = run(cluster, host, words);
    assert!(output.status.success(), "{words:?} on {host}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn fails(cluster: &Cluster, host: &str, words: &[&str]) -> String {
    let output = run(cluster, host, words);
    assert!(!output.status.success(), "{words:?} on {host}: {output:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// Waits until a file is seen on a node.
fn shown(cluster: &Cluster, host: &str, name: &str) -> String {
    let path = at(cluster, name).display().to_string();
    eventually("a file on a mount", || run(cluster, host, &["test", "-f", &path]).status.success().then_some(()));
    path
}

fn sum(text: &str) -> String {
    text.split_whitespace().next().unwrap().to_owned()
}

/// The process that shows the files on a node.
fn mount_pid(cluster: &Cluster, host: &str) -> Option<i32> {
    let path = at(cluster, "");
    let path = path.to_str().unwrap().trim_end_matches('/');
    cluster.host(host).unwrap().pids(&["volume", "mount", path]).first().copied()
}

/// A copy on a node that waits half way, with the file open, until it is looked after.
struct HalfCopy {
    copy: HostProcess,
    takes: File,
}

impl HalfCopy {
    fn begin(cluster: &Cluster, host: &str, path: &str) -> Self {
        // A pipe holds less than the file.
        let pipe = cluster.lab().directory().join("pipe");
        let pipe_text = pipe.to_str().unwrap();
        let _ = std::fs::remove_file(&pipe);
        nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
        let takes = File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open(&pipe).unwrap();
        let host = cluster.host(host).unwrap();
        let copy = host.spawn(&["cp", path, pipe_text]).unwrap();
        eventually("a copy with the file open", || {
            let pid = host.pids(&["cp", path, pipe_text]).first().copied()?;
            let open = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
            let mut links = open.filter_map(|fd| std::fs::read_link(fd.path()).ok());
            links.any(|link| link.ends_with("a.iso")).then_some(())
        });
        HalfCopy { copy, takes }
    }

    /// Lets it go on to its end, which is none that it should have.
    fn fails(self) {
        let HalfCopy { copy, mut takes } = self;
        let ended = std::thread::spawn(move || copy.output(DEADLINE).unwrap());
        let (mut came, mut piece) = (0, vec![0; 1 << 20]);
        eventually("the end of a copy", || {
            while let Ok(some @ 1..) = takes.read(&mut piece) {
                came += some as u64;
            }
            ended.is_finished().then_some(())
        });
        let ended = ended.join().unwrap();
        assert!(!ended.status.success() && came < BYTES, "{came} bytes came: {ended:?}");
    }
}

#[test]
fn files_on_a_lun_are_plain_files_on_every_node() {
    let (cluster, _turn) = form(ClusterSpec { nodes: 2, ..spec() });
    cluster.add_lun(LUN, LUN_BYTES).unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    let dir = cluster.lab().directory();
    let (here, back, disk) = (dir.join("a.iso"), dir.join("back.iso"), dir.join("disk.qcow2"));
    let [here_text, back_text, disk_text] = [&here, &back, &disk].map(|path| path.to_str().unwrap());
    image(&here);
    ok(&cluster, "n1", &["qemu-img", "create", "-q", "-f", "qcow2", disk_text, "64M"]);
    let shells = ["n1", "n2"].map(|host| Shell::on(&cluster, host));
    shells[0].ok(&["volume", "put", LUN, here_text, "iso/deep/a.iso"]);
    shells[1].ok(&["volume", "put", LUN, disk_text, "disk.qcow2"]);

    let wanted = sum(&ok(&cluster, "n1", &["sha256sum", here_text]));
    for host in ["n1", "n2"] {
        let path = shown(&cluster, host, "iso/deep/a.iso");
        let volume = at(&cluster, "").display().to_string();
        assert_eq!(ok(&cluster, host, &["ls", &volume]), "disk.qcow2\niso\n");
        assert_eq!(ok(&cluster, host, &["find", &volume, "-type", "f", "-name", "*.iso"]).trim(), path);
        assert_eq!(ok(&cluster, host, &["stat", "-c", "%s", &path]).trim(), BYTES.to_string());
        assert_eq!(sum(&ok(&cluster, host, &["sha256sum", &path])), wanted);
        ok(&cluster, host, &["cp", &path, back_text]);
        assert!(std::fs::read(&back).unwrap() == std::fs::read(&here).unwrap());
        // No piece of it begins where a block does.
        let (from, to) = (format!("if={path}"), format!("of={back_text}"));
        ok(&cluster, host, &["dd", &from, &to, "bs=5000", "skip=3", "count=7", "status=none"]);
        assert!(std::fs::read(&back).unwrap() == std::fs::read(&here).unwrap()[15_000..50_000]);
        let image = shown(&cluster, host, "disk.qcow2");
        assert!(ok(&cluster, host, &["qemu-img", "info", &image]).contains("file format: qcow2"));
        let size: u64 = ok(&cluster, host, &["stat", "-f", "-c", "%b", &volume]).trim().parse().unwrap();
        assert!(size * 4096 > LUN_BYTES / 2 && size * 4096 <= LUN_BYTES, "{size}");
        // It is for reading.
        assert!(
            fails(&cluster, host, &["cp", here_text, &at(&cluster, "b").display().to_string()]).contains("Read-only")
        );
        assert!(fails(&cluster, host, &["mv", &image, &format!("{image}.old")]).contains("Read-only"));
        let writes = format!("of={image}");
        assert!(
            fails(&cluster, host, &["dd", "if=/dev/zero", &writes, "count=1", "conv=notrunc"]).contains("Read-only")
        );
    }

    // What is open stays, and what a VM has is its own.
    let path = at(&cluster, "iso/deep/a.iso").display().to_string();
    let copy = HalfCopy::begin(&cluster, "n2", &path);
    let why = shells[0].fails(&["volume", "rm", LUN, "iso/deep/a.iso"], 1);
    assert!(why.contains("read on n2"), "{why}");
    assert!(
        fails(&cluster, "n1", &["rm", "-f", &at(&cluster, "iso/deep/a.iso").display().to_string()]).contains("busy")
    );
    drop(copy);
    let vm = cluster.definition(&VmTemplate::new("web", 101).disk(LUN, 64 << 20));
    let job = cluster.any().unwrap().create_vm(&CreateVm { vm, start: false }).unwrap();
    cluster.job_done(&job, DEADLINE).unwrap();
    let disk = cluster.any().unwrap().volume_files(LUN).unwrap().into_iter().find(|file| file.vm.is_some()).unwrap();
    let disk = shown(&cluster, "n2", &disk.name);
    assert!(fails(&cluster, "n2", &["cat", &disk]).contains("busy"));

    // Removing is removing.
    eventually("a file that nobody has open", || {
        run(&cluster, "n2", &["rm", "-f", &path]).status.success().then_some(())
    });
    let folder = at(&cluster, "iso").display().to_string();
    eventually("a folder without files", || {
        (!run(&cluster, "n1", &["test", "-e", &folder]).status.success()).then_some(())
    });
    assert_eq!(cluster.any().unwrap().check_volume(LUN).unwrap().findings, Vec::<String>::new());
}

#[test]
fn the_process_of_a_mount_may_be_killed_and_leaves_nothing() {
    let (cluster, _turn) = form(ClusterSpec { nodes: 2, ..spec() });
    cluster.add_lun(LUN, LUN_BYTES).unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    let here = cluster.lab().directory().join("a.iso");
    image(&here);
    let n1 = Shell::on(&cluster, "n1");
    n1.ok(&["volume", "put", LUN, here.to_str().unwrap(), "a.iso"]);
    let wanted = sum(&ok(&cluster, "n2", &["sha256sum", here.to_str().unwrap()]));
    let agents = || ["n1", "n2"].map(|host| cluster.agent_pid(host).unwrap());
    let before = agents();

    // The copy ends with an error, and everything else goes on.
    let path = shown(&cluster, "n2", "a.iso");
    let copy = HalfCopy::begin(&cluster, "n2", &path);
    let killed = mount_pid(&cluster, "n2").unwrap();
    cluster.host("n2").unwrap().kill(killed, Signal::SIGKILL).unwrap();
    copy.fails();
    eventually("the next process", || mount_pid(&cluster, "n2").filter(|pid| *pid != killed));
    let path = shown(&cluster, "n2", "a.iso");
    assert_eq!(sum(&ok(&cluster, "n2", &["sha256sum", &path])), wanted);
    assert_eq!(agents(), before);

    // An agent that dies takes its mounts along, and its successor makes them anew.
    let copy = HalfCopy::begin(&cluster, "n2", &path);
    let first = mount_pid(&cluster, "n2").unwrap();
    cluster.kill_agent("n2").unwrap();
    copy.fails();
    eventually("the next process", || mount_pid(&cluster, "n2").filter(|pid| *pid != first));
    let path = shown(&cluster, "n2", "a.iso");
    assert_eq!(sum(&ok(&cluster, "n2", &["sha256sum", &path])), wanted);

    // With the volume go its mounts and their directories.
    eventually("a file that nobody has open", || {
        n1.run(&["volume", "rm", LUN, "a.iso"]).status.success().then_some(())
    });
    n1.ok(&["volume", "remove", LUN]);
    for host in ["n1", "n2"] {
        let path = at(&cluster, "").display().to_string();
        eventually("a volume that is gone", || {
            (!run(&cluster, host, &["test", "-e", &path]).status.success()).then_some(())
        });
        eventually("no process", || mount_pid(&cluster, host).is_none().then_some(()));
        assert!(!ok(&cluster, host, &["cat", "/proc/self/mountinfo"]).contains(" holdfast:"));
    }
}
