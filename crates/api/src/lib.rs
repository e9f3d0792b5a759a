//! Holdfast: api.
