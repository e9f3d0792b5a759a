//! What a cluster consists of, in the words of the field.

mod access;
mod cause;
mod cluster;
mod fencing;
mod hold;
mod ids;
mod job;
mod journal;
mod lun;
mod network;
mod node;
mod slabs;
mod vm;
mod witness;

pub use access::*;
pub use cause::*;
pub use cluster::*;
pub use fencing::*;
pub use hold::*;
pub use ids::*;
pub use job::*;
pub use journal::*;
pub use lun::*;
pub use network::*;
pub use node::*;
pub use slabs::Slabs;
pub use vm::*;
pub use witness::*;
