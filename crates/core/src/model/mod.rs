//! What a cluster consists of, in the words of the field.

mod ids;
mod node;
mod vm;

pub use ids::*;
pub use node::*;
pub use vm::*;
