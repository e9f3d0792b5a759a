//! The processes of a node, to be killed.

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use super::Cluster;

impl Cluster {
    /// The pid of a node's keeper.
    ///
    /// # Errors
    /// When it has none.
    pub fn keeper_pid(&self, host: &str) -> Result<i32> {
        self.only_pid(host, "keeper", &["keeper", "--config"])
    }

    /// The pid of a node's agent.
    ///
    /// # Errors
    /// When it has none right now.
    pub fn agent_pid(&self, host: &str) -> Result<i32> {
        self.only_pid(host, "agent", &["agent", "--config"])
    }

    /// The pid of a node's volume server.
    ///
    /// # Errors
    /// When it has none right now.
    pub fn volume_server_pid(&self, host: &str) -> Result<i32> {
        self.only_pid(host, "volume server", &["volume", "serve"])
    }

    /// The pid of the QEMU of the VM with this id on a node.
    ///
    /// # Errors
    /// When it has none.
    pub fn qemu_pid(&self, host: &str, vm: &str) -> Result<i32> {
        self.only_pid(host, "QEMU", &["-uuid", vm])
    }

    fn only_pid(&self, host: &str, what: &str, words: &[&str]) -> Result<i32> {
        // The keeper's and the agent's words stand for themselves; a path may contain them too.
        let exact = |argv: &[String]| words.iter().all(|word| argv.iter().any(|argument| argument == word));
        let mut processes = self.host(host)?.processes();
        processes.retain(|process| process.is_alive() && process.host_pid != 1 && exact(&process.argv));
        processes.first().map(|process| process.pid).with_context(|| format!("host {host} has no {what}"))
    }

    /// Kills a node's agent at once. The keeper starts it anew.
    ///
    /// # Errors
    /// When there is none.
    pub fn kill_agent(&self, host: &str) -> Result<()> {
        self.host(host)?.kill(self.agent_pid(host)?, Signal::SIGKILL)
    }

    /// Lets a node's agent stand still, as a debugger or a hypervisor would.
    /// Returns its pid, for [`Cluster::go_on`].
    ///
    /// # Errors
    /// When there is none.
    pub fn stop_agent(&self, host: &str) -> Result<i32> {
        let pid = self.agent_pid(host)?;
        self.host(host)?.kill(pid, Signal::SIGSTOP)?;
        Ok(pid)
    }

    /// Lets a process that was stopped go on.
    ///
    /// # Errors
    /// When it is gone.
    pub fn go_on(&self, host: &str, pid: i32) -> Result<()> {
        self.host(host)?.kill(pid, Signal::SIGCONT)
    }

    /// Kills a node's keeper at once. The host's init starts it anew.
    ///
    /// # Errors
    /// When there is none.
    pub fn kill_keeper(&self, host: &str) -> Result<()> {
        self.host(host)?.kill(self.keeper_pid(host)?, Signal::SIGKILL)
    }

    /// Kills a node's volume server at once. The keeper starts it anew.
    ///
    /// # Errors
    /// When there is none.
    pub fn kill_volume_server(&self, host: &str) -> Result<()> {
        self.host(host)?.kill(self.volume_server_pid(host)?, Signal::SIGKILL)
    }

    /// Kills the QEMU of a VM on a node at once.
    ///
    /// # Errors
    /// When there is none.
    pub fn kill_qemu(&self, host: &str, vm: &str) -> Result<()> {
        self.host(host)?.kill(self.qemu_pid(host, vm)?, Signal::SIGKILL)
    }
}
