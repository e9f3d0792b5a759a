//! Starting a VM's QEMU: taps, command line, keeper, monitor.

use std::time::Duration;

use anyhow::Context;
use holdfast_core::*;
use holdfast_qemu::{Binary, DiskAt, Kernel, Launch};
use holdfast_vswitch::{Switch, Tap, tap_name};

use super::{Guest, Next, SOON};
use crate::keeper::client::ClientError;
use crate::keeper::protocol::{Refusal, Reply, Request, StartVm};

impl Guest {
    /// Starts the VM under its right; everything that stops it is final for the
    /// epoch, except a lease that is not there yet.
    pub(super) async fn launch(&mut self, tenure: Tenure, incoming: bool) -> anyhow::Result<Next> {
        let lease = self.view();
        if !lease.held || lease.term != tenure.term {
            return Ok(Next::Soon(SOON));
        }
        let Some(vm) = self.agent.state().vms.get(&self.vm).cloned() else { return Ok(Next::Soon(SOON)) };
        self.say(tenure.epoch, Run::Starting);
        let start = match self.prepare(&vm, tenure, incoming).await {
            Ok(start) => start,
            Err(error) => return self.never(tenure, &format!("{error:#}")).await,
        };
        match self.agent.0.keeper.ask(Request::Start(start)).await {
            Ok(Reply::Started { pid }) => {
                tracing::info!(vm = vm.name, epoch = %tenure.epoch, pid, incoming, "QEMU started");
                Ok(Next::Soon(Duration::ZERO))
            }
            Ok(other) => anyhow::bail!("the keeper answered {other:?} to a start"),
            Err(ClientError::Refused(Refusal::NoLease | Refusal::WrongTerm { .. })) => Ok(Next::Soon(SOON)),
            // An attempt whose answer was lost; the list tells what became of it.
            Err(ClientError::Refused(Refusal::AlreadyRunning { .. })) => Ok(Next::Soon(SOON)),
            Err(ClientError::Refused(refusal)) => self.never(tenure, &refusal.to_string()).await,
            Err(error) => Err(error.into()),
        }
    }

    async fn prepare(&self, vm: &Vm, tenure: Tenure, incoming: bool) -> anyhow::Result<StartVm> {
        let binary = self.agent.usable_qemu().await.map_err(anyhow::Error::msg)?;
        let run_dir = self.agent.0.config.vm_dir(vm.id);
        std::fs::create_dir_all(&run_dir).with_context(|| format!("cannot make {}", run_dir.display()))?;
        let taps = self.ensure_taps(vm).await?;
        // A QEMU that finds nobody behind a disk's socket would wait for ever.
        self.agent.serve_disks(self.member, vm, tenure, !incoming).await?;
        let luns = &self.agent.state().luns;
        let disks = (0..).zip(&vm.spec.disks).map(|(index, disk)| match luns.contains_key(&disk.volume) {
            true => DiskAt::Socket(self.agent.disk_socket(vm.id, index)),
            false => DiskAt::File(self.agent.volume_path(&disk.volume, &disk.file)),
        });
        let kernel = vm.spec.direct_boot.as_ref().map(|boot| Kernel {
            kernel: self.agent.volume_path(&boot.volume, &boot.kernel),
            initrd: boot.initrd.as_ref().map(|initrd| self.agent.volume_path(&boot.volume, initrd)),
        });
        let Binary { path, accelerator, vhost_net, .. } = &binary;
        let launch = Launch {
            binary: path,
            vm: vm.id,
            name: &vm.name,
            epoch: tenure.epoch,
            spec: &vm.spec,
            accelerator: *accelerator,
            vhost_net: *vhost_net,
            disks: disks.collect(),
            kernel,
            taps,
            run_dir: run_dir.clone(),
            incoming,
            paused: vm.desired == Desired::Paused,
        };
        let argv = launch.argv()?.into_iter().map(|word| word.into_string());
        let argv = argv.collect::<Result<Vec<_>, _>>().map_err(|word| anyhow::anyhow!("{word:?} is not UTF-8"))?;
        let log = self.log();
        // What an earlier QEMU said must not be taken for what this one says.
        let _ = std::fs::remove_file(&log);
        Ok(StartVm {
            vm: vm.id,
            epoch: tenure.epoch,
            term: tenure.term,
            argv,
            env: Vec::new(),
            cgroup: None,
            log,
            run_dir,
        })
    }

    async fn ensure_taps(&self, vm: &Vm) -> anyhow::Result<Vec<String>> {
        let mut taps = Vec::new();
        for (index, nic) in vm.spec.nics.iter().enumerate() {
            let bridge = self.ensure_switch(&nic.switch).await?;
            let name = tap_name(&vm.id.to_string(), index as u8);
            let tap = Tap { name: name.clone(), bridge, mtu: None, vlan: nic.vlan };
            self.agent.0.vswitch.ensure_tap(&tap).await?;
            taps.push(name);
        }
        Ok(taps)
    }

    /// The bridge of a switch on this node.
    pub(super) async fn ensure_switch(&self, name: &str) -> anyhow::Result<String> {
        let state = self.agent.state();
        let kind = match state.switches.get(name).with_context(|| format!("there is no switch {name:?}"))? {
            SwitchKind::External { uplink } => holdfast_vswitch::SwitchKind::External { uplink: uplink.clone() },
            SwitchKind::Internal => holdfast_vswitch::SwitchKind::Internal,
            SwitchKind::Private => holdfast_vswitch::SwitchKind::Private,
        };
        Ok(self.agent.0.vswitch.ensure_switch(&Switch { name: name.to_owned(), kind }).await?)
    }

    /// Removes whatever taps the VM has here; without NICs known, none can be named.
    pub(super) async fn remove_taps(&self) {
        let nics = self.agent.state().vms.get(&self.vm).map_or(8, |vm| vm.spec.nics.len());
        for index in 0..nics {
            let name = tap_name(&self.vm.to_string(), index as u8);
            if let Err(error) = self.agent.0.vswitch.remove_tap(&name).await {
                tracing::warn!(
                    tap = name,
                    error = format!("{:#}", anyhow::Error::from(error)),
                    "a tap that nobody uses stays"
                );
            }
        }
    }
}
