//! The VM as Pacemaker's resource: an OCF agent, a shell script as most of them are.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context, Result};

use crate::bench::bare::{Model, TAP, UUID};

/// Where the QEMU of the resource keeps its sockets, on every host for itself.
const RUN_DIR: &str = "/run/peer";
/// The bridge to the production network on every host.
pub const BRIDGE: &str = "peer0";
/// The guest's address there ends with this.
pub const ADDRESS: u8 = 120;

/// A VM that Pacemaker keeps, with the command line of one of ours.
pub struct Resource<'a> {
    model: &'a Model,
}

impl<'a> Resource<'a> {
    /// One like the model.
    pub fn like(model: &'a Model) -> Self {
        Resource { model }
    }

    /// The UUID by which the watch knows its QEMU.
    pub fn uuid(&self) -> &'static str {
        UUID
    }

    /// The agent's program, for a disk and boot images that all hosts see.
    ///
    /// # Errors
    /// When the model's command line is not understood.
    pub fn agent(&self, disk: &Path, kernel: &Path, initrd: &Path, ip: Ipv4Addr) -> Result<String> {
        let text = |path: &Path| path.to_str().map(str::to_owned).context("a path that is not UTF-8");
        let mut argv = self.model.argv(RUN_DIR, &text(disk)?, ip, false)?;
        for (option, image) in [("-kernel", text(kernel)?), ("-initrd", text(initrd)?)] {
            let at = argv.iter().position(|word| word == option).with_context(|| format!("no {option}"))?;
            *argv.get_mut(at + 1).with_context(|| format!("nothing after {option}"))? = image;
        }
        let command = argv.iter().fold(String::new(), |mut line, word| {
            let _ = write!(line, " '{}'", word.replace('\'', r"'\''"));
            line
        });
        Ok(format!(
            r#"#!/bin/sh
# One QEMU as a resource of Pacemaker: what its OCF interface asks for and no more.
pidfile={RUN_DIR}/pid
alive() {{
    pid=$(cat $pidfile 2>/dev/null) && tr '\0' ' ' < /proc/$pid/cmdline 2>/dev/null | grep -q {UUID}
}}
case "$1" in
start)
    alive && exit 0
    mkdir -p {RUN_DIR}
    ip link del {TAP} 2>/dev/null
    ip tuntap add {TAP} mode tap vnet_hdr && ip link set {TAP} master {BRIDGE} && ip link set {TAP} up || exit 1
    setsid{command} >{RUN_DIR}/log 2>&1 </dev/null &
    echo $! > $pidfile
    kill -0 $! && exit 0
    exit 1 ;;
stop)
    alive || exit 0
    kill -KILL $pid
    while alive; do sleep 0.02; done
    exit 0 ;;
monitor)
    alive && exit 0
    exit 7 ;;
validate-all)
    exit 0 ;;
meta-data)
    cat <<END
<?xml version="1.0"?>
<resource-agent name="qemu" version="1">
  <version>1.0</version>
  <longdesc lang="en">One QEMU, for a benchmark.</longdesc>
  <shortdesc lang="en">One QEMU</shortdesc>
  <parameters/>
  <actions>
    <action name="start" timeout="60s"/>
    <action name="stop" timeout="60s"/>
    <action name="monitor" timeout="20s" interval="10s" depth="0"/>
    <action name="meta-data" timeout="5s"/>
    <action name="validate-all" timeout="5s"/>
  </actions>
</resource-agent>
END
    exit 0 ;;
*)
    exit 3 ;;
esac
"#
        ))
    }
}
