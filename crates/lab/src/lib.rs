//! Holdfast: lab.
