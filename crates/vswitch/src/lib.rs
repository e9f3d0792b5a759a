//! Holdfast: vswitch.
