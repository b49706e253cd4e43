//! Reads, checks, streams and writes calibration traces.
