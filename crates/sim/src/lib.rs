//! A world in virtual time that tries to break the decisions of a cluster.
//!
//! The decision code of `holdfast-core` runs here unchanged: leases on both ends,
//! `plan`, `check`, `apply`. Around it are hosts with clocks that drift, keepers,
//! agents, QEMUs, disks and links, a small Raft whose voters follow the nodes, a
//! witness on a shared disk, LUNs that a host may lose its path to, users, and a
//! script of faults, part of it ambushes that are laid for one rule.
//! Everything that happens follows from a seed. An oracle that sees all of it says
//! what was broken:
//!
//! * **one owner**: no two QEMUs of a VM have its guest at the same time. Where a
//!   keeper is stopped while its VMs may run on (frozen keeper, suspended host),
//!   the lease cannot hold by itself: such runs have image locks, and the guest
//!   that is refused by them never ran. All other runs have none.
//! * **stale guest**: a guest never goes on with memory that is older than what
//!   was written to its disks.
//! * **leases end first**: whenever a lease is said to be over, and after a node
//!   was called lost, the node does not hold it.
//! * **no acknowledged command lost**, and none that was called failed happens.
//! * **one witness**: what it acknowledged or voted for is never forgotten, whoever
//!   hosts it next; **one vote in a term**.
//! * **one owner of a volume**: I/O for others is under way on one host at a time, and
//!   none follows that of a later owner; **volumes are owned**: whose owner is lost gets
//!   another with the same decision, if one can.
//! * **one log**, **epochs only grow**, **every plan passes its check**, and the
//!   log read back from its text gives the same state.
//! * **settles**: once everything works again, within a stated bound, every VM that
//!   should run and fits does, every job has ended, and nothing is decided any more.
//! * **nothing swings to and fro** until then: no VM, no vote, no coordinator more
//!   often than a stated number of times; and **rests when all is well**: for as long
//!   as some runs are watched afterwards nothing moves.
//! * **queues have bounds**: what waits for a disk or an answer, what the state keeps.
//!
//! What is simpler here than in life: the log of consensus is never cut, a keeper's
//! VMs die with it at once, clocks drift by up to 4 %, so that two of them and the
//! time that a SIGKILL takes stay within a lease's margin of 10 %, an old copy of
//! the witness's disk comes back only after the disk was away for longer than any
//! write to it can take, what a node has seen on that disk is durable at once (in life
//! a new epoch is, a counter within half a minute), and what a dead host had asked of a
//! LUN is over (in life its storage is to see to that: decision 0023).

mod clock;
mod explore;
mod generate;
mod mutation;
mod raft;
mod rng;
mod role;
mod scenario;
mod script;
mod world;

pub use explore::{Caught, Exploration, Failure, Options, Outcome, catch, explore, run, shrink};
pub use mutation::Mutation;
pub use scenario::play;
pub use script::{Deed, Fault, NotUnderstood, Scenario, Step, Traffic, Wish};
pub use world::{Tally, Violation};
