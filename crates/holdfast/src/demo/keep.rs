//! `holdfast demo --keep`: the cluster stays up, and this is how to use it.

use std::time::Duration;

use anyhow::Result;
use holdfast_api::VmState;
use holdfast_lab::cluster::Cluster;
use holdfast_lab::guest;

use super::{Actor, Story};

const DEADLINE: Duration = Duration::from_secs(60);

impl Story {
    /// Brings everything back up, says how to use it, and waits for Ctrl-C.
    pub(super) fn leave_up(&self, cluster: &Cluster, actors: &[Actor]) -> Result<()> {
        self.narrator.act("The cluster is yours");
        let step = self.narrator.begin("powering the lost node on, starting the VMs that were switched off");
        cluster.power_on_all()?;
        cluster.wait_ready(DEADLINE)?;
        let client = cluster.any()?;
        for view in client.vms()?.iter().filter(|vm| vm.state == VmState::Off) {
            client.start_vm(&view.name)?;
        }
        for actor in actors {
            self.interruption.check()?;
            actor.vm.wait_answer(DEADLINE)?;
        }
        step.done("three nodes are up again, all VMs answer");
        for line in self.usage(cluster, actors) {
            self.narrator.say(&line);
        }
        self.interruption.await_signal();
        Ok(())
    }

    fn usage(&self, cluster: &Cluster, actors: &[Actor]) -> Vec<String> {
        let program = self.spec.binary.display();
        let mut lines = vec!["In another terminal, as root:".to_owned()];
        for (number, host) in cluster.hosts().iter().enumerate() {
            let verb = if number == 0 { "export" } else { "# or" };
            lines.push(format!("  {verb} HOLDFAST_SOCKET={}", cluster.socket(host.name()).display()));
        }
        for command in
            ["cluster status", "vm list", "vm console web", "vm migrate web", "explain vm web", "events --follow"]
        {
            lines.push(format!("  {program} {command}"));
        }
        let users = cluster.lab().fabric().client().name().to_owned();
        if let Some(actor) = actors.first() {
            lines.push("Users of the guests are in a namespace of their own:".to_owned());
            let asking = format!("exec 3<>/dev/tcp/{}/{}; echo status >&3; head -1 <&3", actor.vm.ip, guest::PORT);
            lines.push(format!("  ip netns exec {users} bash -c '{asking}'"));
        }
        lines.push("Cut a host's power (it stays off; its VMs start elsewhere):".to_owned());
        for host in cluster.hosts() {
            if let Some(init) = host.processes().into_iter().find(|process| process.host_pid == 1) {
                lines.push(format!("  kill -9 {}    # {}", init.pid, host.name()));
            }
        }
        lines.push("Or pull one of its cables, and plug it in again with `up`:".to_owned());
        let fabric = cluster.lab().fabric().namespace().name().to_owned();
        lines.push(format!("  ip -n {fabric} link set n1-hb down"));
        lines.push("Ctrl-C here ends everything and clears it up.".to_owned());
        lines
    }
}
