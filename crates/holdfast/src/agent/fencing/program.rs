//! A fence agent: a program of Debian's `fence-agents`, called the way Pacemaker
//! calls them (FenceAgentAPI of ClusterLabs): options as `key=value` lines on
//! standard input, so that no secret stands in an argument; the answer is the
//! exit code.

use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use holdfast_core::PowerFencing;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// What a fence agent may say is kept up to here, in bytes.
const MOST_OUTPUT: u64 = 64 << 10;
/// How much of it is told.
const TOLD: usize = 300;
/// How long output may come after the program's end: something that it started
/// may hold its end of the pipe for ever.
const AFTERWARDS: Duration = Duration::from_millis(200);

/// What a fence agent is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// Switch the host off.
    Off,
    /// Say whether it is on: 0; off: 2.
    Status,
    /// Say whether the device that does it can be reached: 0.
    Monitor,
}

impl Deed {
    /// As the agent knows it.
    pub fn as_str(self) -> &'static str {
        match self {
            Deed::Off => "off",
            Deed::Status => "status",
            Deed::Monitor => "monitor",
        }
    }
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ran {
    /// Its exit code; `None` when a signal ended it.
    pub exit: Option<i32>,
    /// The end of what it said, without secrets.
    pub said: String,
}

/// Why there is no exit code.
#[derive(Debug, thiserror::Error)]
pub enum NotRun {
    /// It is not installed.
    #[error("there is no {program} on this node: install it (Debian: apt install fence-agents)")]
    Missing {
        /// Where it was looked for.
        program: String,
    },
    /// It could not be run.
    #[error("{agent} could not be run: {source}")]
    System {
        /// The fence agent.
        agent: String,
        /// The system's reason.
        source: io::Error,
    },
    /// It took too long and was killed.
    #[error("{agent} did not end within {} s ({}) and was killed", within.as_secs(), deed.as_str())]
    Late {
        /// The fence agent.
        agent: String,
        /// What it was asked to do.
        deed: Deed,
        /// How long it had.
        within: Duration,
    },
}

/// Runs a fence agent from `directory`. It is killed, with all that it started, when
/// `within` has passed, and when this is dropped.
///
/// # Errors
/// [`NotRun`]: what it did before is unknown.
pub async fn run(directory: &Path, fencing: &PowerFencing, deed: Deed, within: Duration) -> Result<Ran, NotRun> {
    let agent = &fencing.agent;
    let program = directory.join(agent);
    let failed = |source| NotRun::System { agent: agent.clone(), source };
    let child = Command::new(&program)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => NotRun::Missing { program: program.display().to_string() },
            _ => failed(source),
        })?;
    let mut group = Group(child);
    let late = || NotRun::Late { agent: agent.clone(), deed, within };
    timeout(within, group.converse(&lines(fencing, deed)))
        .await
        .map_err(|_| late())?
        .map_err(failed)
        .map(|(exit, output)| Ran { exit, said: told(&output, fencing) })
}

/// What the program is told.
fn lines(fencing: &PowerFencing, deed: Deed) -> String {
    let secrets = fencing.secrets.iter().map(|(key, secret)| (key, &secret.0));
    let options = fencing.options.iter().chain(secrets);
    options.fold(format!("action={}\n", deed.as_str()), |text, (key, value)| text + &format!("{key}={value}\n"))
}

/// The end of what a program said, in one line, with its secrets blotted out.
fn told(output: &[u8], fencing: &PowerFencing) -> String {
    let mut text = String::from_utf8_lossy(output).into_owned();
    for secret in fencing.secrets.values().filter(|secret| !secret.0.is_empty()) {
        text = text.replace(&secret.0, "***");
    }
    let text = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
    let from = text.char_indices().rev().nth(TOLD).map_or(0, |(at, _)| at);
    text[from..].to_owned()
}

/// A program and all that it starts: one process group.
struct Group(Child);

impl Group {
    async fn converse(&mut self, lines: &str) -> io::Result<(Option<i32>, Vec<u8>)> {
        if let Some(mut stdin) = self.0.stdin.take() {
            // One that does not listen may still do what it is there for.
            let _ = stdin.write_all(lines.as_bytes()).await;
        }
        let (stdout, stderr) = (self.0.stdout.take(), self.0.stderr.take());
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let status = {
            let reading = async { tokio::join!(read(stdout, &mut out), read(stderr, &mut err)) };
            tokio::pin!(reading);
            tokio::select! {
                status = self.0.wait() => {
                    let _ = timeout(AFTERWARDS, &mut reading).await;
                    status?
                }
                _ = &mut reading => self.0.wait().await?,
            }
        };
        out.extend_from_slice(&err);
        Ok((status.code(), out))
    }
}

async fn read(pipe: Option<impl AsyncRead + Unpin>, into: &mut Vec<u8>) {
    if let Some(pipe) = pipe {
        let _ = pipe.take(MOST_OUTPUT).read_to_end(into).await;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Not waited for yet, so its number is still its own.
        if let Some(pid) = self.0.id() {
            let _ = killpg(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use holdfast_core::Secret;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    fn agent(directory: &Path, script: &str) -> PowerFencing {
        let program = directory.join("fence_test");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        PowerFencing {
            agent: "fence_test".into(),
            options: [("ip".to_owned(), "10.9.0.2".to_owned())].into(),
            secrets: [("password".to_owned(), Secret("hush".into()))].into(),
            test: None,
            asked: None,
        }
    }

    #[tokio::test]
    async fn it_is_told_everything_on_its_standard_input_and_nothing_in_arguments() {
        let directory = tempfile::tempdir().unwrap();
        let told = directory.path().join("told");
        let fencing = agent(directory.path(), &format!("cat > {0}; echo \"$# $*\" >> {0}; exit 2", told.display()));
        let ran = run(directory.path(), &fencing, Deed::Status, LONG).await.unwrap();
        assert_eq!(ran.exit, Some(2));
        assert_eq!(fs::read_to_string(told).unwrap(), "action=status\nip=10.9.0.2\npassword=hush\n0 \n");
    }

    #[tokio::test]
    async fn what_it_says_is_told_without_its_secrets() {
        let directory = tempfile::tempdir().unwrap();
        let fencing = agent(directory.path(), "echo trying; echo 'login hush refused' >&2; exit 1");
        let ran = run(directory.path(), &fencing, Deed::Off, LONG).await.unwrap();
        assert_eq!(ran, Ran { exit: Some(1), said: "trying; login *** refused".into() });
    }

    #[tokio::test]
    async fn one_that_hangs_is_killed_with_all_that_it_started() {
        let directory = tempfile::tempdir().unwrap();
        let child = directory.path().join("child");
        let fencing = agent(directory.path(), &format!("sleep 1000 & echo $! > {}; wait", child.display()));
        let late = run(directory.path(), &fencing, Deed::Off, Duration::from_secs(2)).await.unwrap_err();
        assert!(matches!(late, NotRun::Late { .. }), "{late}");
        let pid = fs::read_to_string(child).unwrap().trim().to_owned();
        let stat = Path::new("/proc").join(pid).join("stat");
        let until = tokio::time::Instant::now() + LONG;
        // Dead; whoever inherited it may not have waited for it yet.
        while fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
            assert!(tokio::time::Instant::now() < until, "what it started still runs");
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn one_that_is_not_there_says_what_to_install() {
        let directory = tempfile::tempdir().unwrap();
        let mut fencing = agent(directory.path(), "");
        fencing.agent = "fence_nowhere".into();
        let missing = run(directory.path(), &fencing, Deed::Monitor, LONG).await.unwrap_err();
        assert!(missing.to_string().contains("apt install fence-agents"), "{missing}");
    }

    #[tokio::test]
    async fn the_ecosystem_s_own_dummy_is_understood() {
        let directory = Path::new("/usr/sbin");
        if !directory.join("fence_dummy").exists() {
            eprintln!("fence-agents is not installed: the real program was not tried");
            return;
        }
        let state = tempfile::tempdir().unwrap();
        let fencing = PowerFencing {
            agent: "fence_dummy".into(),
            options: [
                ("type".to_owned(), "file".to_owned()),
                ("status_file".to_owned(), state.path().join("power").display().to_string()),
            ]
            .into(),
            secrets: Default::default(),
            test: None,
            asked: None,
        };
        fs::write(state.path().join("power"), "on").unwrap();
        let exit = async |deed| run(directory, &fencing, deed, LONG).await.unwrap().exit;
        assert_eq!(exit(Deed::Monitor).await, Some(0));
        assert_eq!(exit(Deed::Status).await, Some(0));
        assert_eq!(exit(Deed::Off).await, Some(0));
        assert_eq!(exit(Deed::Status).await, Some(2));
    }
}
