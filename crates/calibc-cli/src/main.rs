//! The calibc binary.
fn main() {}
