//! The calibc command line.
