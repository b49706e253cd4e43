//! The calibc binary: everything is in the library.

fn main() {
    std::process::exit(calibc_cli::run(std::env::args_os()));
}
