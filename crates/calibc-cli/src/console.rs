//! The two streams: data on stdout, everything else on stderr.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use serde_json::{Value, json};
use tracing_subscriber::EnvFilter;

use crate::args::{Global, Progress};
use crate::exit::Failure;

/// Version of the shape of every `--json` output.
pub(crate) const SCHEMA_VERSION: u32 = 1;

/// Where commands write, and how much.
#[derive(Clone, Debug)]
pub(crate) struct Console {
    pub(crate) quiet: bool,
    pub(crate) verbose: u8,
    pub(crate) bars: bool,
}

impl Console {
    pub(crate) fn new(global: &Global) -> Self {
        let bars = global.progress == Progress::Auto && !global.quiet && io::stderr().is_terminal();
        Self { quiet: global.quiet, verbose: global.verbose, bars }
    }

    /// Sends the log to stderr; `CALIBC_LOG` takes a filter such as `calibc_nvrtc=debug`.
    pub(crate) fn start_log(&self) {
        let level = match (self.quiet, self.verbose) {
            (true, _) => "error",
            (_, 0) => "warn",
            (_, 1) => "info",
            _ => "debug",
        };
        let filter = EnvFilter::try_from_env("CALIBC_LOG").unwrap_or_else(|_| EnvFilter::new(level));
        let ansi = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
        // A second call in one process (a test, Python) keeps the first log.
        let _ = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(io::stderr)
            .with_ansi(ansi)
            .with_target(false)
            .without_time()
            .try_init();
    }

    /// Data: a text that ends in a line break.
    pub(crate) fn data(&self, text: &str) -> Result<(), Failure> {
        self.bytes(text.as_bytes())
    }

    /// Data of any kind. A reader that went away is not an error: it has what it wanted.
    pub(crate) fn bytes(&self, bytes: &[u8]) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        match out.write_all(bytes).and_then(|()| out.flush()) {
            Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(Failure::io("write to", "stdout".as_ref(), e)),
            _ => Ok(()),
        }
    }

    /// A JSON document with the version of its shape.
    pub(crate) fn json(&self, kind: &str, mut value: Value) -> Result<(), Failure> {
        let mut document = json!({ "schema_version": SCHEMA_VERSION, "kind": kind });
        if let (Value::Object(document), Value::Object(fields)) = (&mut document, &mut value) {
            document.append(fields);
        }
        self.data(&format!("{document:#}\n"))
    }

    /// A line for the user, unless `-q`.
    pub(crate) fn note(&self, text: &str) {
        if !self.quiet {
            stderr_line(text);
        }
    }
}

/// A line on stderr, whatever the settings. Nothing can be done where stderr is closed.
pub(crate) fn stderr_line(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// `3.2 MB`.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    match unit {
        0 => format!("{n} B"),
        _ if value < 9.95 => format!("{value:.1} {}", UNITS[unit]),
        _ => format!("{value:.0} {}", UNITS[unit]),
    }
}

/// `1.3 s`.
pub(crate) fn seconds(time: Duration) -> String {
    let s = time.as_secs_f64();
    if s < 0.1 {
        format!("{:.0} ms", s * 1000.0)
    } else if s < 100.0 {
        format!("{s:.1} s")
    } else {
        format!("{:.0} min {:.0} s", (s / 60.0).floor(), s % 60.0)
    }
}

/// `1 kernel`, `2 kernels`.
pub(crate) fn count(n: u64, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        assert_eq!(
            [0, 999, 1000, 9_949_000, 9_951_000, 1 << 40].map(bytes),
            ["0 B", "999 B", "1.0 kB", "9.9 MB", "10 MB", "1.1 TB"]
        );
    }

    #[test]
    fn times_read_well() {
        let of = |ms| seconds(Duration::from_millis(ms));
        assert_eq!([of(7), of(1240), of(99_900), of(130_000)], ["7 ms", "1.2 s", "99.9 s", "2 min 10 s"]);
    }
}
