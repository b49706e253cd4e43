//! Reading what ptxas says under `-v`: registers, memory, spills, diagnostics.
//!
//! The lines this reads, the same from NVRTC 11.8 to 13.5 (a `Compile time` line, newer ones only, is not reproducible and
//! is dropped):
//!
//! ```text
//! ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized ..
//! ptxas info    : Compiling entry function 'k' for 'sm_90a'
//! ptxas info    : Function properties for k
//! ptxas         .     560 bytes stack frame, 1036 bytes spill stores, 1036 bytes spill loads
//! ptxas info    : Used 32 registers, used 1 barriers, 256 bytes smem, 560 bytes cumulative stack size, 364 bytes cmem[0]
//! ```

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// What one thread or block of a kernel takes, as ptxas reports it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// Registers per thread.
    pub registers: u32,
    /// Static shared memory per block, bytes (dynamic shared memory is chosen at launch and not counted).
    pub shared_bytes: u32,
    /// Stack frame of the entry function, bytes per thread.
    pub stack_bytes: u32,
    /// Spill stores, bytes per thread; 0 in everything that passed the build gate.
    pub spill_stores: u32,
    /// Spill loads, bytes per thread; 0 in everything that passed the build gate.
    pub spill_loads: u32,
}

/// A program log, read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    /// Of the requested entry function, if ptxas reported on it. Spills are summed over every function of the program.
    pub(crate) resources: Option<Resources>,
    /// Every entry function, in the log's order.
    pub(crate) entries: Vec<String>,
    /// Lines that warn.
    pub(crate) warnings: Vec<String>,
    /// Codes `C75xx`, ascending.
    pub(crate) diagnostics: Vec<String>,
}

/// `log` without the lines that differ from run to run.
pub(crate) fn reproducible(log: &str) -> String {
    let kept = log.lines().filter(|line| !(line.starts_with("ptxas") && line.contains("Compile time =")));
    let mut text = kept.collect::<Vec<_>>().join("\n");
    text.truncate(text.trim_end().len());
    if !text.is_empty() {
        text.push('\n');
    }
    text
}

/// Reads a program log for the entry function `symbol`.
pub(crate) fn read(log: &str, symbol: &str) -> Report {
    let mut report = Report::default();
    let mut resources = Resources::default();
    let mut seen = false;
    let mut codes = BTreeSet::new();
    // The function the property line speaks of, and the entry function the `Used` line speaks of.
    let (mut function, mut entry) = ("", "");
    for line in log.lines() {
        if is_warning(line) {
            report.warnings.push(line.trim().to_owned());
        }
        let Some(text) = line.strip_prefix("ptxas") else { continue };
        codes.extend(diagnostic_codes(text));
        if let Some((_, rest)) = text.split_once("Compiling entry function '") {
            entry = rest.split('\'').next().unwrap_or_default();
            function = entry;
            report.entries.push(entry.to_owned());
        } else if let Some((_, rest)) = text.split_once("Function properties for ") {
            function = rest.trim();
        } else if text.contains("bytes stack frame") {
            resources.spill_stores = resources.spill_stores.saturating_add(before(text, "bytes spill stores"));
            resources.spill_loads = resources.spill_loads.saturating_add(before(text, "bytes spill loads"));
            if function == symbol {
                resources.stack_bytes = before(text, "bytes stack frame");
            }
        } else if entry == symbol && text.contains(": Used ") && text.contains(" registers") {
            seen = true;
            resources.registers = before(text, "registers");
            resources.shared_bytes = before(text, "bytes smem");
        }
    }
    report.resources = seen.then_some(resources);
    report.diagnostics = codes.into_iter().collect();
    report
}

/// The number in front of `unit`; 0 where `text` does not have it.
fn before(text: &str, unit: &str) -> u32 {
    let Some((head, _)) = text.split_once(unit) else { return 0 };
    head.split_whitespace().next_back().and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// `k.cu(3): warning #177-D: ..`, `ptxas warning : ..`, `nvrtc: warning: ..`; not an echoed source line that says the word.
fn is_warning(line: &str) -> bool {
    let Some((head, tail)) = line.split_once("warning") else { return false };
    let head = head.trim_end();
    (head.ends_with(':') || head == "ptxas" || head.is_empty())
        && (tail.trim_start().starts_with(':') || tail.trim_start().starts_with('#'))
}

/// Words of the form `C75dd`.
fn diagnostic_codes(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| {
            word.len() == 5 && word.starts_with("C75") && word.bytes().skip(1).all(|byte| byte.is_ascii_digit())
        })
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO_ENTRIES: &str = "\
k.cu(1): warning #177-D: variable \"unused\" was declared but never referenced
  int unused; // warning : not one
Remark: The warnings can be suppressed with \"-diag-suppress <warning-number>\"
nvrtc: warning: Architectures prior to '<compute/sm>_75' are deprecated and may be removed in a future release
ptxas warning : Registers are spilled to local memory in function 'k', 12 bytes spill stores, 8 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k2' for 'sm_80'
ptxas info    : Function properties for k2
ptxas         .     16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 360 bytes cmem[0]
ptxas info    : Compile time = 1.130 ms
ptxas info    : Compiling entry function 'k' for 'sm_80'
ptxas info    : Function properties for k
ptxas         .     560 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 256 bytes smem, 560 bytes cumulative stack size, 364 bytes cmem[0]
ptxas info    : Compile time = 24.185 ms
ptxas info    : Function properties for _Z1ff
ptxas         .     40 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads

";

    #[test]
    fn resources_are_those_of_the_requested_entry_and_spills_those_of_all_functions() {
        let report = read(TWO_ENTRIES, "k");
        let expected =
            Resources { registers: 32, shared_bytes: 256, stack_bytes: 560, spill_stores: 16, spill_loads: 12 };
        assert_eq!(report.resources, Some(expected));
        assert_eq!(report.entries, ["k2", "k"]);
        let other = read(TWO_ENTRIES, "k2").resources.expect("k2 is in the log");
        assert_eq!((other.registers, other.shared_bytes, other.stack_bytes), (8, 0, 16));
        assert_eq!(read(TWO_ENTRIES, "k3").resources, None);
    }

    #[test]
    fn warnings_are_lines_that_warn_not_lines_that_say_so() {
        let warnings = read(TWO_ENTRIES, "k").warnings;
        let starts = ["k.cu(1): warning #177-D", "nvrtc: warning: Arch", "ptxas warning : Registers"];
        assert_eq!(warnings.len(), starts.len(), "{warnings:?}");
        for (line, start) in warnings.iter().zip(starts) {
            assert!(line.starts_with(start), "{line}");
        }
        assert!(is_warning("k.cu(1): warning #1105-D: #warning directive: hi"));
        assert!(!is_warning("  #warning hi"));
        assert!(!is_warning("  // a warning: in a comment"));
    }

    #[test]
    fn diagnostics_are_whole_codes_of_ptxas() {
        let log = "ptxas info    : (C7517) wait_group is injected\nptxas info    : (C7511) Potential Performance Loss\n\
                   ptxas info    : (C7517) again\nptxas info    : C75110 C751 xC7512 k_C7513 C75_1 C7601\n\
                   k.cu(1): C7599 outside of ptxas\n";
        assert_eq!(read(log, "k").diagnostics, ["C7511", "C7517"]);
    }

    #[test]
    fn the_kept_log_has_no_times() {
        let kept = reproducible(TWO_ENTRIES);
        assert!(!kept.contains("Compile time"));
        assert!(kept.ends_with("spill loads\n"));
        assert_eq!(kept.lines().count(), TWO_ENTRIES.trim_end().lines().count() - 2);
        assert_eq!(reproducible("\n\n"), "");
    }
}
