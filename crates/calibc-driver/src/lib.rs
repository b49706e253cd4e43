//! One compile session: traces and spec in, bundle out.
pub mod spec;
