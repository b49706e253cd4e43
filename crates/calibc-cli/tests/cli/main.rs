//! The built binary, as users run it: exit codes, streams, files, determinism.
//!
//! Needs NVRTC for whatever makes machine code; without it those tests say `skipped:`.

mod commands;
mod compile;
mod support;
