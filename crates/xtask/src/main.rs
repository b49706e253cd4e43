//! Developer commands: `cargo xtask demo`, `cargo xtask test` and their parts.
//!
//! They do all their set-up on a machine that has Rust and Python 3: [`provision`] puts NumPy and NVRTC, which comes as a
//! wheel and needs no GPU, into a Python environment under the target folder, for `test` also PyTorch and a second NVRTC, and nothing
//! anywhere else.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line tool")]

mod demo;
mod package;
mod process;
mod provision;
mod tally;
mod test;
mod workspace;

use std::{env, process::ExitCode};

use workspace::Workspace;

const USAGE: &str = "\
usage: cargo xtask COMMAND

  demo           compile the example traces into a bundle, and execute it
  test           everything: format, lints, tests, Python tests, docs
  check-kernels  compile every generated kernel with two versions of NVRTC
  package        build the Python package, install it into target/python, and run the Python tests
  provision      only fetch what the others need into the target folder

environment:
  CALIBC_NVRTC   use this libnvrtc (a file or folder) instead of the fetched one; kernels are compiled with another version too
  PYTHON         the Python 3 to start from; default: python3 on PATH";

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let outcome = match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["demo"] => Workspace::find().and_then(|w| demo::run(&w)),
        ["test"] => Workspace::find().and_then(|w| test::run(&w)),
        ["check-kernels"] => Workspace::find().and_then(|w| test::check_kernels(&w)),
        ["package"] => Workspace::find().and_then(|w| test::package(&w)),
        ["provision"] => Workspace::find().and_then(|w| provision::run(&w)),
        ["help" | "-h" | "--help"] => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
