//! Tests of the whole pipeline, across crates.
