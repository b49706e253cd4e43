//! Running a command so that its output is both seen and kept.

use std::{
    ffi::OsStr,
    io::{self, BufRead, BufReader, Read, Write},
    path::Path,
    process::{Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

/// What a command did.
pub(crate) struct Outcome {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) time: Duration,
}

/// The command as one would type it: the program without its folder, arguments with blanks in quotes.
pub(crate) fn spelled(command: &Command) -> String {
    let quote = |word: &OsStr| {
        let word = word.to_string_lossy();
        if word.is_empty() || word.contains(char::is_whitespace) { format!("'{word}'") } else { word.into_owned() }
    };
    let program = Path::new(command.get_program());
    std::iter::once(program.file_name().unwrap_or(program.as_os_str()))
        .chain(command.get_args())
        .map(quote)
        .collect::<Vec<_>>()
        .join(" ")
}

/// Runs a command; its output goes to this process's streams line by line, and is kept.
pub(crate) fn stream(command: &mut Command) -> Result<Outcome> {
    let start = Instant::now();
    let spelling = spelled(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run `{spelling}`"))?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let (stdout, stderr) = thread::scope(|scope| {
        let stderr = scope.spawn(|| tee(err, io::stderr()));
        (tee(out, io::stdout()), stderr.join().unwrap_or_default())
    });
    let status = child.wait().with_context(|| format!("cannot wait for `{spelling}`"))?;
    Ok(Outcome { status, stdout, stderr, time: start.elapsed() })
}

fn tee(from: Option<impl Read>, mut to: impl Write) -> String {
    let mut kept = Vec::new();
    if let Some(from) = from {
        let mut reader = BufReader::new(from);
        let mut line = Vec::new();
        while matches!(reader.read_until(b'\n', &mut line), Ok(n) if n > 0) {
            // A closed terminal does not stop the command.
            let _ = to.write_all(&line).and_then(|()| to.flush());
            kept.append(&mut line);
        }
    }
    String::from_utf8_lossy(&kept).into_owned()
}
