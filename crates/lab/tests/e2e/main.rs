//! The product, end to end: real nodes, real guests, in the lab. Each behaviour
//! has its own file. They run one after another; they need root, QEMU, the built
//! program (`cargo build -p holdfast`) and the tiny guest (`guest/build.sh`).
#![allow(missing_docs)]

mod bench;
mod postmortem;
mod shell;

mod agent_killed;
mod agent_stopped;
mod bad_hosts;
mod bad_requests;
mod boot;
mod command_line;
mod coordinator_killed;
mod cut_off;
mod damaged_files;
mod demo;
mod disks;
mod drain;
mod everything_restarts;
mod fencing;
mod files;
mod flapping;
mod full_disk;
mod hand_over;
mod import;
mod keeper_killed;
mod keeper_stopped;
mod lun;
mod lun_full;
mod lun_owner;
mod migration;
mod migration_faults;
mod mount;
mod node_removed;
mod one_way;
mod outside;
mod partition;
mod power_loss;
mod qemu_killed;
mod quorum;
mod quorum_forced;
mod redirect;
mod room;
mod sixteen;
mod watchdog;
mod what_if;
mod witness;
