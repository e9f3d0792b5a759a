//! The tiny Linux guest that tests, benchmarks and the demo boot.
//!
//! The library is everything of it that can run anywhere: the wire format that its clients share
//! with it, the record disk, and the counter service. The binary `holdfast-guest` adds what only
//! PID 1 of a virtual machine does: mounts, modules, addresses, the power button.

pub mod cmdline;
pub mod command;
pub mod disk;
pub mod load;
pub mod records;
pub mod service;
pub mod sys;
pub mod verify;
pub mod wire;
