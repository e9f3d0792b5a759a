//! The peer of a failover: Pacemaker and corosync as Debian packages them, with the
//! QEMU command line of one of our VMs as their resource, on hosts of the same
//! kind, whose power is cut in the same way and whose QEMUs the same watch sees.

mod agent;
mod pacemaker;

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use holdfast_api::ProfileName;
use holdfast_lab::CpuHogs;

use self::agent::Resource;
use self::pacemaker::Pacemaker;
use super::bare::Model;
use super::failover::{Measured, Victim};
use super::table::{Row, millis};

/// What has to be there for this bench and for nothing else.
const PROGRAMS: [&str; 5] = ["corosync", "pacemakerd", "cibadmin", "crm_mon", "crm_resource"];

/// How the peer is configured, and what of ours it is compared with.
struct Setting {
    name: &'static str,
    /// corosync's `token`, in milliseconds; its default when absent.
    token_ms: Option<u32>,
    profile: ProfileName,
    /// How many times as fast as the peer ours has to be.
    times: Option<f64>,
}

const SETTINGS: [Setting; 3] = [
    Setting { name: "Pacemaker's defaults", token_ms: None, profile: ProfileName::Default, times: Some(3.5) },
    Setting { name: "Pacemaker, token 1000", token_ms: Some(1000), profile: ProfileName::Default, times: None },
    Setting { name: "Pacemaker, token 500", token_ms: Some(500), profile: ProfileName::Fast, times: Some(2.0) },
];

/// Checks that the peer is installed, before anything is measured.
///
/// # Errors
/// When a program is not there; says how to install it.
pub fn look() -> Result<()> {
    let places = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    let missing = |program: &&&str| !places.iter().any(|place| Path::new(place).join(program).is_file());
    if let Some(program) = PROGRAMS.iter().find(missing) {
        bail!(
            "the peer is not installed ({program} is not there). Its daemons need not run on this machine itself: \
             apt-get install --no-install-recommends pacemaker pacemaker-cli-utils corosync, then systemctl disable --now pacemaker corosync"
        );
    }
    Ok(())
}

/// Measures `runs` losses of a node that is not the peer's coordinator and of its
/// coordinator under each setting, and for `load` whether it takes busy nodes for
/// dead ones; returns rows that set ours beside it.
///
/// # Errors
/// When the peer does not come about, or an experiment with it fails.
pub fn run(binary: &Path, runs: usize, load: Duration, ours: &Measured, model: &Model) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for setting in &SETTINGS {
        let resource = Resource::like(model);
        let mut peer = Pacemaker::form(binary, setting.token_ms, resource)
            .with_context(|| format!("{} could not be made to run", setting.name))?;
        for victim in [Victim::Follower, Victim::Coordinator] {
            let mut started = Vec::new();
            for run in 1..=runs {
                let took = peer
                    .lose(victim)
                    .with_context(|| format!("{}, loss of the {}, run {run} of {runs}", setting.name, victim.name()))?;
                eprintln!("{}, {} lost, run {run}: QEMU {} ms", setting.name, victim.name(), took.as_millis());
                started.push(took);
            }
            let name = format!("{:?} beside {}, {} lost: QEMU elsewhere", setting.profile, setting.name, victim.name());
            let row = Row::millis(&name, ours.started(setting.profile, victim)).beside(&millis(&started));
            rows.push(setting.times.map_or(row.clone(), |times| row.goal(1.0 / times)));
        }
        if setting.times.is_some() {
            let false_failovers = peer.under_load(load)?;
            let name = format!(
                "{:?} beside {}: false failovers in {} s with all cores busy",
                setting.profile,
                setting.name,
                load.as_secs()
            );
            let ours = ours.false_failovers(setting.profile);
            let row = Row::of(name, &[ours]).beside(&[f64::from(false_failovers)]);
            rows.push(Row { ratio: None, ..row }.worst_goal(0.0));
        }
    }
    Ok(rows)
}

/// Keeps every core busy for so long.
pub fn saturate(length: Duration) -> Result<()> {
    let hogs = CpuHogs::start(thread::available_parallelism()?.get())?;
    let until = Instant::now() + length;
    thread::sleep(until.saturating_duration_since(Instant::now()));
    drop(hogs);
    Ok(())
}
