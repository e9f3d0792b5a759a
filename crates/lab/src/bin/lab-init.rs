//! PID 1 of a lab host, and the guard that tidies up after a lab that was
//! killed. The tests of this crate use this program; the product offers the
//! same entry point as a hidden subcommand.

use std::process::ExitCode;

fn main() -> ExitCode {
    holdfast_lab::init::main(std::env::args_os().skip(1))
}
