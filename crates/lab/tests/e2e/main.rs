//! The product, end to end: real nodes, real guests, in the lab. Each behaviour
//! has its own file. They run one after another; they need root, QEMU, the built
//! program (`cargo build -p holdfast`) and the tiny guest (`guest/build.sh`).
#![allow(missing_docs)]

mod bench;
mod boot;
