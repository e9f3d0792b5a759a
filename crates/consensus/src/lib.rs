//! Holdfast: consensus.
