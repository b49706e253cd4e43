//! The calibc command line: the only place of the workspace that prints.
//!
//! ```text
//! args --clap--> Command --> driver (compile) / trace / bundle / runtime --> data on stdout, the rest on stderr --> exit code
//! ```
//!
//! [`run`] takes the arguments and returns the exit code; it never exits the process, so that the Python package can run it too.
//! Exit codes: 0 done, 1 a negative result, 2 wrong usage, 3 bad input, 4 the environment lacks something, 5 the file system
//! refused, 70 a bug. `--json` prints one document with `schema_version` and `kind`.

mod args;
mod bench;
mod compile;
mod console;
mod describe;
mod exit;
mod gpu;
mod inspect;
mod machine;
mod numerics;
mod progress;
mod tensors;
mod trace;
mod verify;

use std::ffi::OsString;
use std::panic::{AssertUnwindSafe, catch_unwind};

use clap::{CommandFactory, Parser};

use args::{CacheCommand, Cli, Command, TraceCommand};
use console::{Console, stderr_line};

pub use compile::check_output;
pub use exit::{Exit, Failure};
pub use progress::Bars;

/// Runs one command line, the program's name first, and returns its exit code.
pub fn run(args: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> i32 {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are errors to clap; printing fails only where nobody reads.
            let _ = error.print();
            return error.exit_code();
        }
    };
    let console = Console::new(&cli.global);
    console.start_log();
    guarded(|| dispatch(&console, cli.command)) as i32
}

/// Runs a command to its exit code. A panic has printed its place and words by the time it arrives here.
fn guarded(command: impl FnOnce() -> Result<Exit, Failure>) -> Exit {
    match catch_unwind(AssertUnwindSafe(command)) {
        Ok(Ok(exit)) => exit,
        Ok(Err(failure)) => {
            stderr_line(&format!("error: {failure}"));
            failure.exit
        }
        Err(_) => {
            stderr_line("error: this is a bug of calibc; please report it with the lines above");
            Exit::Internal
        }
    }
}

fn dispatch(console: &Console, command: Command) -> Result<Exit, Failure> {
    match command {
        Command::Compile(args) => compile::compile(console, &args),
        Command::Trace(TraceCommand::Check(args)) => trace::check(console, &args),
        Command::Trace(TraceCommand::Info(args)) => trace::info(console, &args),
        Command::Trace(TraceCommand::Merge(args)) => trace::merge(console, &args),
        Command::Inspect(args) => inspect::inspect(console, &args),
        Command::Export(args) => inspect::export(console, &args),
        Command::Verify(args) => verify::verify(console, &args),
        Command::Run(args) => verify::run(console, &args),
        Command::Bench(args) => bench::bench(console, &args),
        Command::Doctor(args) => machine::doctor(console, &args),
        Command::Cache(CacheCommand::Dir(args)) => machine::cache_dir(console, &args),
        Command::Cache(CacheCommand::Ls { cache, json }) => machine::cache_ls(console, &cache, json),
        Command::Cache(CacheCommand::Clear(args)) => machine::cache_clear(console, &args),
        Command::Schema => {
            console.data(&format!("{:#}\n", calibc_driver::spec::Spec::json_schema()))?;
            Ok(Exit::Ok)
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "calibc", &mut script);
            console.bytes(&script)?;
            Ok(Exit::Ok)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_panic_is_exit_code_70_and_errors_keep_theirs() {
        assert_eq!(guarded(|| panic!("a test of the panic guard")) as i32, 70);
        assert_eq!(guarded(|| Err(Failure::bad_input("x"))) as i32, 3);
        assert_eq!(guarded(|| Ok(Exit::Negative)) as i32, 1);
    }
}
