//! Progress of a session: bars on a terminal, lines for `-v`, nothing else.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::sync::Mutex;

use calibc_driver::{Event, Observer, Stage};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::console::{Console, seconds};

/// Draws bars on stderr for what a session tells.
pub struct Bars {
    shown: bool,
    quiet: bool,
    verbose: u8,
    open: Mutex<BTreeMap<&'static str, ProgressBar>>,
}

impl Bars {
    /// Bars where stderr is a terminal, if wanted; warnings in any case.
    pub fn new(wanted: bool) -> Self {
        let shown = wanted && std::io::stderr().is_terminal();
        Self { shown, quiet: false, verbose: 0, open: Mutex::default() }
    }

    pub(crate) fn of(console: &Console) -> Self {
        let &Console { quiet, verbose, bars: shown } = console;
        Self { shown, quiet, verbose, open: Mutex::default() }
    }

    /// Shows `done` of `total`; bytes are told from counts by `unit`.
    pub(crate) fn show(&self, name: &'static str, done: u64, total: u64, unit: Unit) {
        if !self.shown {
            return;
        }
        let mut open = self.open.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let bar = open.entry(name).or_insert_with(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            let counts = match unit {
                Unit::Bytes => "{bytes:>9} / {total_bytes}",
                Unit::Count => "{pos:>7} / {len}",
            };
            let template = format!("{{msg:18}} {{wide_bar}} {counts} {{eta:>4}}");
            if let Ok(style) = ProgressStyle::with_template(&template) {
                bar.set_style(style);
            }
            bar.set_message(name);
            bar
        });
        bar.set_length(total);
        // Counts come from several threads and may arrive out of order.
        bar.set_position(bar.position().max(done));
    }

    /// Removes the bar of `name`.
    pub(crate) fn finish(&self, name: &'static str) {
        let bar = self.open.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).remove(name);
        if let Some(bar) = bar {
            bar.finish_and_clear();
        }
    }

    /// A line above the bars.
    pub(crate) fn line(&self, text: &str) {
        let open = self.open.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match open.values().next() {
            Some(bar) => bar.suspend(|| crate::console::stderr_line(text)),
            None => crate::console::stderr_line(text),
        }
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        let open = self.open.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        open.values().for_each(ProgressBar::finish_and_clear);
    }
}

/// What a bar counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Bytes,
    Count,
}

impl Observer for Bars {
    fn event(&self, event: &Event<'_>) {
        match *event {
            Event::Progress { stage, done, total } => {
                let unit = if stage == Stage::Open { Unit::Bytes } else { Unit::Count };
                self.show(stage.name(), done, total, unit);
            }
            Event::Done { stage, time } => {
                self.finish(stage.name());
                if self.verbose > 0 {
                    self.line(&format!("{}: {}", stage.name(), seconds(time)));
                }
            }
            Event::Remark { pass, text } if self.verbose > 0 => self.line(&format!("{pass}: {text}")),
            Event::Kernel { symbol, arch, cached, time } if self.verbose > 0 => {
                let how = if cached { "from the cache".to_owned() } else { seconds(time) };
                self.line(&format!("{symbol} {arch}: {how}"));
            }
            Event::Warning { text } if !self.quiet => self.line(&format!("warning: {text}")),
            _ => {}
        }
    }
}
