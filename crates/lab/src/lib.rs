//! The lab: hosts as network and PID namespaces on one machine, with cables to
//! pull and a power to cut. The end-to-end tests, the benchmarks and
//! `holdfast demo` run the built binary in it, from outside.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use holdfast_lab::{HostSpec, InitProgram, Lab, Network};
//!
//! let lab = Lab::new(InitProgram::new("/usr/libexec/lab-init"))?;
//! let n1 = lab.add_host(HostSpec::new("n1").service(["sleep", "1000"]))?;
//! n1.power_on()?;
//! lab.fabric().pull("n1", Network::Heartbeat)?;
//! let cut = n1.power_off()?;
//! println!("dark and dead {:?} after the plug was pulled", cut.dead - cut.at);
//! # Ok(())
//! # }
//! ```
//!
//! It needs root, iproute2, nftables and a kernel with the usual namespaces.
//! Nothing it makes outlives the process that made it.

pub mod cluster;
mod fabric;
pub mod guest;
mod host;
pub mod init;
mod lab;
mod load;
mod machine;
mod netns;
mod network;
mod process;
mod procfs;
mod registry;
mod san;
mod sys;
mod watch;

pub use fabric::{CLIENT, Fabric};
pub use host::{EXEC_DEADLINE, Host, HostSpec, PowerCut};
pub use lab::{InitProgram, Lab};
pub use load::CpuHogs;
pub use machine::ServiceEvent;
pub use netns::{Namespace, free_port, in_netns};
pub use network::Network;
pub use process::HostProcess;
pub use procfs::Process;
pub use san::{San, records_on};
pub use sys::touch_memory;
pub use watch::{HostNames, Overlap, Sighting, SplitBrainWatch};
