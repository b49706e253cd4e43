//! One compile session: traces and spec in, bundle out.
pub mod masks;
pub mod spec;
