//! One VM on this node: compares what it should be with what it is, and acts on
//! the difference. The same road after a start, a crash and an upgrade.
//!
//! A process is started only when the state gives this node the right under an
//! epoch that was never used here; the keeper refuses everything else. What
//! became of it is said only when the keeper has seen it.

mod launch;
mod source;

use std::time::Duration;

use holdfast_core::*;
use holdfast_qemu::{Event, Exit, ExitReason, Launch, QemuError, Qmp, RunState};
use tokio::sync::{broadcast, watch};
use tokio::time::{Instant, timeout};

use super::keeper_link::View;
use super::{Agent, Member};
use crate::keeper::protocol::{self, ProcessState, Request, Tag, VmProcess};

/// Looked at at every event, and this often in case one was missed.
const EVERY: Duration = Duration::from_secs(5);
/// After something failed that may succeed a moment later.
const SOON: Duration = Duration::from_millis(200);
/// How long a fresh QEMU may take to answer on its monitor.
const GREETING: Duration = Duration::from_secs(10);
/// A QEMU that waits for whoever serves its disks is given up after this.
const MUTE: Duration = Duration::from_secs(60);
/// A guest may miss the first press of its power button while it boots.
const PRESS_AGAIN: Duration = Duration::from_secs(10);
/// A disk that failed is tried again this often.
const DISK_AGAIN: Duration = Duration::from_secs(1);

/// What this node should do with a VM.
#[derive(Clone, Debug, PartialEq)]
enum Wish {
    /// Have no process of it.
    Nothing,
    /// Run it under this right.
    Run { tenure: Tenure, desired: Desired, restart: bool },
    /// Be the target of its migration.
    Receive { tenure: Tenure, from: NodeId, source_void: bool },
    /// Be the source of its migration; `address` once the target is ready.
    Send { tenure: Tenure, desired: Desired, to: Tenure, address: Option<String>, cancel: bool, target_void: bool },
}

fn wish(state: &ClusterState, me: NodeId, vm: VmId) -> Wish {
    let Some(vm) = state.vms.get(&vm) else { return Wish::Nothing };
    match &vm.placement {
        Placement::On(tenure) if tenure.node == me && !state.is_void(tenure) => {
            Wish::Run { tenure: *tenure, desired: vm.desired, restart: vm.restart == Some(tenure.epoch) }
        }
        Placement::Moving { from, to, .. } if to.node == me && !state.is_void(to) => {
            Wish::Receive { tenure: *to, from: from.node, source_void: state.is_void(from) }
        }
        Placement::Moving { from, to, stage, cancel, .. } if from.node == me && !state.is_void(from) => Wish::Send {
            tenure: *from,
            desired: vm.desired,
            to: *to,
            address: match stage {
                MoveStage::Preparing => None,
                MoveStage::Transferring { address } => Some(address.clone()),
            },
            cancel: *cancel,
            target_void: state.is_void(to),
        },
        _ => Wish::Nothing,
    }
}

/// When to look again.
enum Next {
    /// At the next event.
    Wait,
    /// Soon, or at the next event.
    Soon(Duration),
    /// There is nothing left to look after.
    Over,
}

/// The task of one VM.
struct Guest {
    agent: Agent,
    member: &'static Member,
    vm: VmId,
    /// The monitor of the process of this epoch.
    monitor: Option<(Epoch, Qmp, broadcast::Receiver<Event>)>,
    /// When the power button was pressed last, in this epoch.
    pressed: Option<(Epoch, Instant)>,
    /// The target's epoch of the migration that was begun here.
    begun: Option<Epoch>,
    /// When a failed disk was last tried again.
    disk_tried: Option<Instant>,
    /// Since when the monitor does not answer, in this epoch.
    mute_since: Option<(Epoch, Instant)>,
    /// The epoch whose QEMU has died and asks nothing of its disks any more.
    withdrawn: Option<Epoch>,
}

impl Agent {
    pub(super) async fn keep_guest(self, member: &'static Member, vm: VmId) {
        let mut changes = self.changes();
        let mut keeper = self.0.keeper.watch();
        let mut guest = Guest {
            agent: self,
            member,
            vm,
            monitor: None,
            pressed: None,
            begun: None,
            disk_tried: None,
            mute_since: None,
            withdrawn: None,
        };
        loop {
            changes.borrow_and_update();
            keeper.borrow_and_update();
            let pause = match guest.step().await {
                Ok(Next::Wait) => EVERY,
                Ok(Next::Soon(pause)) => pause,
                Ok(Next::Over) => return,
                Err(error) => {
                    tracing::warn!(%vm, %error, "will be tried again");
                    SOON
                }
            };
            let _ = timeout(pause, guest.anything(&mut changes, &mut keeper)).await;
        }
    }
}

impl Guest {
    fn wish(&self) -> Wish {
        wish(&self.agent.state(), self.member.me, self.vm)
    }

    fn view(&self) -> View {
        self.agent.0.keeper.watch().borrow().clone()
    }

    fn say(&self, epoch: Epoch, run: Run) {
        self.member.reports.say_vm(self.vm, epoch, run);
    }

    /// Waits for anything that could make a difference to this VM.
    async fn anything(
        &mut self,
        changes: &mut watch::Receiver<std::sync::Arc<ClusterState>>,
        keeper: &mut watch::Receiver<View>,
    ) {
        let event = async {
            match &mut self.monitor {
                Some((_, _, events)) => drop(events.recv().await),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = changes.changed() => {}
            _ = keeper.changed() => {}
            () = event => {}
        }
    }

    async fn step(&mut self) -> anyhow::Result<Next> {
        let wish = self.wish();
        let view = self.view();
        let tenure = match &wish {
            Wish::Nothing => None,
            Wish::Run { tenure, .. } | Wish::Receive { tenure, .. } | Wish::Send { tenure, .. } => Some(*tenure),
        };
        let epoch = tenure.map(|tenure| tenure.epoch);
        // A process of any other epoch has no right to be.
        if let Some(alive) = view.alive(self.vm).filter(|alive| Some(alive.epoch) != epoch) {
            self.monitor = None;
            self.agent.0.keeper.kill(self.vm, alive.epoch).await?;
            return Ok(Next::Soon(Duration::ZERO));
        }
        self.forget_all_but(epoch, &view).await;
        let Some(tenure) = tenure else {
            self.agent.withdraw_disks(self.member, self.vm, None).await?;
            self.clear_away().await;
            return Ok(Next::Over);
        };
        let epoch = tenure.epoch;
        let process = view.process(self.vm, epoch).cloned();
        if let Some(over) = process.as_ref().and_then(|process| self.how_it_ended(process, &view)) {
            // Said only when nothing that it had asked of its disks is under way.
            if self.withdrawn != Some(epoch) {
                self.agent.withdraw_all_disks(self.member, self.vm, tenure).await?;
                self.withdrawn = Some(epoch);
            }
            self.monitor = None;
            self.member.guests.set_waiting(self.vm, None);
            self.say(epoch, over);
            return Ok(Next::Wait);
        }
        self.agent.withdraw_disks(self.member, self.vm, Some(epoch)).await?;
        if process.is_some()
            && let Wish::Run { tenure, .. } | Wish::Send { tenure, .. } = &wish
        {
            self.agent.keep_disks_served(self.member, self.vm, *tenure).await?;
        }
        match wish {
            Wish::Nothing => Ok(Next::Over),
            Wish::Run { tenure, desired, restart } => {
                self.member.guests.set_waiting(self.vm, None);
                if process.is_none() {
                    if desired.wants_qemu() {
                        return self.launch(tenure, false).await;
                    }
                    // It was to be off before it was ever started.
                    return self.never(tenure, "it was switched off before it started").await;
                }
                self.run(tenure, desired, restart).await
            }
            Wish::Receive { tenure, from, source_void } => {
                if process.is_none() {
                    if source_void {
                        return self.never(tenure, "its source was lost").await;
                    }
                    return self.launch(tenure, true).await;
                }
                self.receive(tenure, from, source_void).await
            }
            Wish::Send { tenure, desired, to, address, cancel, target_void } => {
                let Some(address) = address.filter(|_| process.is_some()) else {
                    return self.run(tenure, desired, false).await;
                };
                self.send(tenure, to, &address, cancel || target_void).await
            }
        }
    }

    /// The process's last word, once it is dead.
    fn how_it_ended(&self, process: &VmProcess, view: &View) -> Option<Run> {
        let ProcessState::Exited { exit, .. } = process.state else { return None };
        if view.fenced.contains(&(self.vm, process.epoch)) {
            return Some(Run::Fenced);
        }
        let log = std::fs::read(self.log()).unwrap_or_default();
        let tail = String::from_utf8_lossy(&log[log.len().saturating_sub(8192)..]).into_owned();
        let exit = match exit {
            protocol::Exit::Status(status) => Exit::Code(status),
            protocol::Exit::Signal(signal) => Exit::Signal(signal),
        };
        let reason = ExitReason::find(exit, &tail);
        let detail = reason.to_string();
        Some(match reason {
            ExitReason::ImageLocked { .. } => Run::Locked { detail },
            _ => Run::Exited { detail },
        })
    }

    fn log(&self) -> std::path::PathBuf {
        self.agent.0.config.vm_dir(self.vm).join("qemu.log")
    }

    async fn forget_all_but(&self, epoch: Option<Epoch>, view: &View) {
        let ended = view
            .processes
            .get(&self.vm)
            .into_iter()
            .flatten()
            .filter(|(_, process)| process.state != ProcessState::Running);
        for (old, _) in ended.filter(|(old, _)| Some(**old) != epoch) {
            let tag = Tag { vm: self.vm, epoch: *old };
            if let Err(error) = self.agent.0.keeper.ask(Request::Forget(tag)).await {
                tracing::debug!(vm = %self.vm, epoch = %old, %error, "an ended process stays listed");
            }
        }
    }

    /// Nothing of the VM is left on this node.
    async fn clear_away(&mut self) {
        self.monitor = None;
        self.member.guests.set_waiting(self.vm, None);
        self.member.reports.say(|report| drop(report.vms.remove(&self.vm)));
        self.remove_taps().await;
        let _ = std::fs::remove_dir_all(self.agent.0.config.vm_dir(self.vm));
    }

    /// Makes it final that this epoch was not and will not be started here.
    async fn never(&self, tenure: Tenure, why: &str) -> anyhow::Result<Next> {
        self.agent.0.keeper.ask(Request::Retire(Tag { vm: self.vm, epoch: tenure.epoch })).await?;
        self.say(tenure.epoch, Run::StartFailed { detail: why.to_owned() });
        Ok(Next::Wait)
    }

    /// The monitor of the living process.
    async fn monitor(&mut self, epoch: Epoch) -> Result<Qmp, QemuError> {
        if let Some((known, qmp, _)) = &self.monitor
            && *known == epoch
            && !qmp.closed()
        {
            return Ok(qmp.clone());
        }
        let lost = self.monitor.take().is_some_and(|(known, ..)| known == epoch);
        let socket = Launch::monitor_socket(&self.agent.0.config.vm_dir(self.vm));
        if lost {
            // Most likely QEMU has ended; the keeper tells in a moment.
            return Err(QemuError::Gone { socket });
        }
        let qmp = Qmp::connect(&socket, GREETING).await?;
        let events = qmp.events();
        self.monitor = Some((epoch, qmp.clone(), events));
        Ok(qmp)
    }

    /// Its monitor does not answer. One whose disk is served waits for the server before
    /// it answers, perhaps for ever: it is as good as one that does not start.
    async fn mute(&mut self, epoch: Epoch, error: QemuError) -> anyhow::Result<Next> {
        let (of, since) = *self.mute_since.get_or_insert((epoch, Instant::now()));
        if of != epoch {
            self.mute_since = None;
        } else if self.agent.has_served_disks(self.member, self.vm) && since.elapsed() >= MUTE {
            tracing::error!(vm = %self.vm, %error, "its QEMU does not come to life; it is ended");
            self.agent.0.keeper.kill(self.vm, epoch).await?;
            return Ok(Next::Soon(Duration::ZERO));
        }
        Err(error.into())
    }

    /// A VM that runs here and should.
    async fn run(&mut self, tenure: Tenure, desired: Desired, restart: bool) -> anyhow::Result<Next> {
        let epoch = tenure.epoch;
        if desired == Desired::ForcedOff {
            self.agent.0.keeper.kill(self.vm, epoch).await?;
            return Ok(Next::Soon(Duration::ZERO));
        }
        let qmp = match self.monitor(epoch).await {
            Ok(qmp) => qmp,
            // It is on its way out; the keeper tells.
            Err(error) if error.is_gone() => return Ok(Next::Soon(SOON)),
            Err(error) => return self.mute(epoch, error).await,
        };
        self.mute_since = None;
        let asked_off = desired == Desired::Stopped || restart;
        let state = qmp.query_status().await?.state;
        match state {
            RunState::Shutdown if asked_off => {
                self.agent.0.keeper.kill(self.vm, epoch).await?;
                return Ok(Next::Soon(Duration::ZERO));
            }
            RunState::Shutdown => self.say(epoch, Run::GuestShutdown),
            RunState::GuestPanicked | RunState::InternalError | RunState::PostMigrate => {
                // A guest that can never go on is as good as crashed, and is
                // treated as such when its process is dead.
                tracing::warn!(vm = %self.vm, %state, "its guest can never go on; QEMU is ended");
                self.agent.0.keeper.kill(self.vm, epoch).await?;
                return Ok(Next::Soon(Duration::ZERO));
            }
            RunState::IoError => {
                self.say(epoch, Run::Paused);
                // It would stand still again at once. The next change of the state wakes.
                let state = self.agent.state();
                if state.vms.get(&self.vm).is_some_and(|vm| state.full_volume(&vm.spec).is_some()) {
                    return Ok(Next::Wait);
                }
                if self.disk_tried.is_none_or(|at| at.elapsed() >= DISK_AGAIN) {
                    self.disk_tried = Some(Instant::now());
                    qmp.resume().await?;
                }
                return Ok(Next::Soon(DISK_AGAIN));
            }
            RunState::Running if asked_off => {
                if self.pressed.is_none_or(|(of, at)| of != epoch || at.elapsed() >= PRESS_AGAIN) {
                    qmp.powerdown().await?;
                    self.pressed = Some((epoch, Instant::now()));
                }
                self.say(epoch, Run::Stopping);
                return Ok(Next::Soon(PRESS_AGAIN));
            }
            RunState::Running if desired == Desired::Paused => {
                qmp.pause().await?;
                self.say(epoch, Run::Paused);
            }
            RunState::Running | RunState::Suspended => {
                self.pressed = None;
                self.say(epoch, Run::Running);
            }
            RunState::Paused | RunState::Prelaunch if desired == Desired::Paused => self.say(epoch, Run::Paused),
            RunState::Paused | RunState::Prelaunch => {
                qmp.resume().await?;
                return Ok(Next::Soon(Duration::ZERO));
            }
            _ => return Ok(Next::Soon(SOON)),
        }
        Ok(Next::Wait)
    }
}
