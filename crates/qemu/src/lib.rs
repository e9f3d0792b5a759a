//! Holdfast: qemu.
