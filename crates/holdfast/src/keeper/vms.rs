//! The VMs' processes: started once per epoch, killed, reaped, remembered.
//! Everything here runs in the keeper's main thread.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use holdfast_core::{Epoch, NodeTerm, VmId};

use super::control::Asked;
use super::leftovers::Records;
use super::protocol::{Exit, ProcessState, Refusal, Reply, StartVm, Tag, VmProcess};
use super::table::{CAPACITY, Permit, Published, Table, Withdrawn};
use crate::realtime::{Gated, Image, Report, boot_time, fork_gated};

/// Ended processes that are remembered at most; beyond that the earliest go first.
const REMEMBERED: usize = 4_096;

/// What the kernel may kill when memory runs out: VMs before the agent, the keeper never.
const OOM_SCORE: i16 = 100;

/// All VMs' processes of this keeper's life.
pub struct Vms {
    table: Arc<Table>,
    records: Records,
    last_epoch: BTreeMap<VmId, Epoch>,
    processes: BTreeMap<Tag, Process>,
    withdrawn: Vec<Withdrawn>,
}

struct Process {
    term: NodeTerm,
    pid: i32,
    state: Stage,
    kills: Vec<Asked>,
}

enum Stage {
    /// Behind its gate, not known to execute yet.
    Starting {
        published: Published,
        report: Report,
        asked: Asked,
    },
    Running(Published),
    Ended(ProcessState),
}

/// An answer that is due.
pub type Due = (Asked, Result<Reply, Refusal>);

impl Vms {
    /// None yet.
    pub fn new(table: Arc<Table>, records: Records) -> Self {
        Vms { table, records, last_epoch: BTreeMap::new(), processes: BTreeMap::new(), withdrawn: Vec::new() }
    }

    /// The records of what runs.
    pub fn records(&self) -> &Records {
        &self.records
    }

    /// Starts a VM; answered at once when refused, else when it executes.
    pub fn start(&mut self, asked: Asked, wanted: &StartVm) -> Option<Due> {
        let tag = Tag { vm: wanted.vm, epoch: wanted.epoch };
        match self.try_start(asked, tag, wanted) {
            Ok(()) => None,
            Err(refusal) => Some((asked, Err(refusal))),
        }
    }

    fn try_start(&mut self, asked: Asked, tag: Tag, wanted: &StartVm) -> Result<(), Refusal> {
        let permit = self.table.permit(wanted.term)?;
        if let Some(epoch) = self.alive(tag.vm) {
            return Err(Refusal::AlreadyRunning { epoch });
        }
        if let Some(last) = self.last_epoch.get(&tag.vm)
            && *last >= tag.epoch
        {
            return Err(Refusal::EpochUsed { last: *last });
        }
        let image = image(wanted).map_err(|error| failed("be prepared", &error))?;
        // Used from here on: whatever comes of it, it never starts again.
        self.last_epoch.insert(tag.vm, tag.epoch);
        let gated = fork_gated(&image).map_err(|error| failed("be forked", &error))?;
        let pid = gated.pid;
        if let Err(error) = self.records.write(tag, pid) {
            return Err(failed("be recorded", &error));
        }
        let state = match self.release(gated, permit) {
            Ok((published, report)) => Stage::Starting { published, report, asked },
            Err(refusal) => {
                self.records.remove(tag);
                return Err(refusal);
            }
        };
        let term = wanted.term;
        let kills = Vec::new();
        self.processes.insert(tag, Process { term, pid, state, kills });
        Ok(())
    }

    /// Publishes the child's pidfd, then opens its gate if the lease still lasts:
    /// see [`super::table`]. Every other way out leaves the gate shut for ever, and
    /// the child exits without having done anything.
    fn release(&mut self, gated: Gated, permit: Permit) -> Result<(Published, Report), Refusal> {
        let pidfd = gated.pidfd.try_clone().map_err(|error| failed("be published", &error))?;
        let published = self.table.publish(pidfd).map_err(|_| Refusal::Full { limit: CAPACITY as u32 })?;
        let opened = if self.table.lasts(permit) {
            gated.open().map_err(|error| failed("pass its gate", &error))
        } else {
            Err(Refusal::NoLease)
        };
        match opened {
            Ok((_, report)) => Ok((published, report)),
            Err(refusal) => {
                self.withdrawn.push(self.table.withdraw(published));
                Err(refusal)
            }
        }
    }

    /// The epoch under which a VM is alive.
    fn alive(&self, vm: VmId) -> Option<Epoch> {
        let all = Tag { vm, epoch: Epoch(0) }..=Tag { vm, epoch: Epoch(u64::MAX) };
        let mut of_vm = self.processes.range(all);
        of_vm.find_map(|(tag, process)| (!matches!(process.state, Stage::Ended(_))).then_some(tag.epoch))
    }

    /// Uses an epoch up without starting it.
    pub fn retire(&mut self, tag: Tag) -> Result<Reply, Refusal> {
        if self.alive(tag.vm) == Some(tag.epoch) {
            return Err(Refusal::AlreadyRunning { epoch: tag.epoch });
        }
        if self.processes.contains_key(&tag) {
            return Err(Refusal::EpochUsed { last: tag.epoch });
        }
        let last = self.last_epoch.entry(tag.vm).or_default();
        *last = (*last).max(tag.epoch);
        Ok(Reply::Done)
    }

    /// Kills a VM; answered when it is dead.
    pub fn kill(&mut self, asked: Asked, tag: Tag) -> Option<Due> {
        let Some(process) = self.processes.get_mut(&tag) else {
            return Some((asked, Err(Refusal::NotFound)));
        };
        match &process.state {
            Stage::Ended(ProcessState::Exited { exit, .. }) => Some((asked, Ok(Reply::Dead { exit: *exit }))),
            Stage::Ended(ProcessState::Running) => None,
            Stage::Starting { published, .. } | Stage::Running(published) => match published.kill() {
                Ok(_) => {
                    process.kills.push(asked);
                    None
                }
                Err(error) => Some((asked, Err(failed("be killed", &error)))),
            },
        }
    }

    /// Kills everything that is alive.
    pub fn kill_all(&self) {
        for process in self.processes.values() {
            if let Stage::Starting { published, .. } | Stage::Running(published) = &process.state
                && let Err(error) = published.kill()
            {
                tracing::error!(pid = process.pid, %error, "cannot kill a VM");
            }
        }
    }

    /// How many are alive.
    pub fn alive_count(&self) -> usize {
        let alive = |process: &&Process| !matches!(process.state, Stage::Ended(_));
        self.processes.values().filter(alive).count()
    }

    /// Drops an ended one from the list.
    pub fn forget(&mut self, tag: Tag) -> Result<Reply, Refusal> {
        match self.processes.get(&tag).map(|process| &process.state) {
            None => Err(Refusal::NotFound),
            Some(Stage::Ended(_)) => {
                self.processes.remove(&tag);
                Ok(Reply::Done)
            }
            Some(_) => Err(Refusal::AlreadyRunning { epoch: tag.epoch }),
        }
    }

    /// Those whose start is under way, to be polled for reading.
    pub fn reports(&self) -> impl Iterator<Item = (Tag, &Report)> {
        self.processes.iter().filter_map(|(tag, process)| match &process.state {
            Stage::Starting { report, .. } => Some((*tag, report)),
            _ => None,
        })
    }

    /// Reads what became of a start.
    pub fn read_report(&mut self, tag: Tag) -> Option<Due> {
        let process = self.processes.get_mut(&tag)?;
        let Stage::Starting { report, .. } = &mut process.state else {
            return None;
        };
        let outcome = report.read()?;
        let pid = process.pid;
        // Its end, which is near when it failed, is told apart from this.
        let ended = Stage::Ended(ProcessState::Running);
        let Stage::Starting { published, asked, .. } = std::mem::replace(&mut process.state, ended) else {
            return None;
        };
        process.state = Stage::Running(published);
        let result = match outcome {
            Ok(()) => Ok(Reply::Started { pid }),
            Err(failure) => Err(failed(failure.step, &io::Error::from_raw_os_error(failure.errno))),
        };
        Some((asked, result))
    }

    /// Takes note of a child's end. `None`: it is none of the VMs.
    pub fn ended(&mut self, pid: i32, exit: Exit) -> Option<(Tag, Vec<Due>)> {
        let alive = |process: &Process| process.pid == pid && !matches!(process.state, Stage::Ended(_));
        let tag = *self.processes.iter().find(|(_, process)| alive(process))?.0;
        let mut due: Vec<Due> = self.read_report(tag).into_iter().collect();
        let process = self.processes.get_mut(&tag)?;
        let at = boot_time();
        let ended = Stage::Ended(ProcessState::Exited { exit, at });
        match std::mem::replace(&mut process.state, ended) {
            Stage::Starting { published, asked, .. } => {
                due.push((asked, Err(failed("start", &"it ended first"))));
                self.withdrawn.push(self.table.withdraw(published));
            }
            Stage::Running(published) => self.withdrawn.push(self.table.withdraw(published)),
            Stage::Ended(_) => {}
        }
        let kills = std::mem::take(&mut process.kills);
        due.extend(kills.into_iter().map(|asked| (asked, Ok(Reply::Dead { exit }))));
        self.records.remove(tag);
        self.forget_the_earliest();
        Some((tag, due))
    }

    fn forget_the_earliest(&mut self) {
        if self.processes.len() <= REMEMBERED {
            return;
        }
        let earliest = self.processes.iter().filter_map(|(tag, process)| match process.state {
            Stage::Ended(ProcessState::Exited { at, .. }) => Some((at, *tag)),
            _ => None,
        });
        if let Some((_, tag)) = earliest.min() {
            self.processes.remove(&tag);
        }
    }

    /// Closes the pidfds that no killing pass uses any more.
    pub fn tidy(&mut self) {
        let table = &self.table;
        self.withdrawn.retain(|withdrawn| !table.passed(withdrawn));
    }

    /// Every process that is known, ordered by VM and epoch.
    pub fn list(&self) -> Vec<VmProcess> {
        let view = |(tag, process): (&Tag, &Process)| VmProcess {
            vm: tag.vm,
            epoch: tag.epoch,
            term: process.term,
            pid: process.pid,
            state: match &process.state {
                Stage::Ended(state) => state.clone(),
                _ => ProcessState::Running,
            },
        };
        self.processes.iter().map(view).collect()
    }
}

fn image(wanted: &StartVm) -> io::Result<Image> {
    let mut image =
        Image::new(&wanted.argv, &wanted.env)?.directory(&wanted.run_dir)?.log(&wanted.log)?.oom_score(OOM_SCORE);
    if let Some(cgroup) = &wanted.cgroup {
        image = image.cgroup(cgroup)?;
    }
    Ok(image)
}

fn failed(step: &str, error: &dyn ToString) -> Refusal {
    Refusal::StartFailed { step: step.into(), error: error.to_string() }
}
