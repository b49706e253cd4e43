//! What a caller may watch and stop, and the parallel loops that listen.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use calibc_ir::Plan;
use rayon::prelude::*;

use crate::error::OptError;
use crate::passes::budget::Selection;

/// What a pass did.
#[derive(Clone, Debug, PartialEq)]
pub struct PassReport {
    /// Name of the pass, one of [`crate::PASSES`].
    pub pass: &'static str,
    /// Whether the plan changed.
    pub changed: bool,
    /// Remarks for people: `12 sites keep everything and are dense`.
    pub remarks: Vec<String>,
    /// What the policy `budget` found, of the pass that chose for it.
    pub selection: Option<Selection>,
}

/// Called with the plan as each pass leaves it, after the verifier.
pub type AfterPass<'a> = &'a mut dyn FnMut(&PassReport, &Plan);

/// Called with the name of the work (a pass, or `report`), and how many of its parts are done; from any thread, and numbers
/// may arrive out of order.
pub type Progress<'a> = &'a (dyn Fn(&'static str, u64, u64) + Sync);

/// What a caller watches and stops. All optional.
#[derive(Default)]
pub struct Hooks<'a> {
    /// For `--dump-after`, timings and remarks.
    pub after_pass: Option<AfterPass<'a>>,
    /// For progress bars.
    pub progress: Option<Progress<'a>>,
    /// When set, work ends soon with [`OptError::Cancelled`].
    pub cancel: Option<&'a AtomicBool>,
}

/// The part of the hooks that parallel loops see.
#[derive(Clone, Copy)]
pub(crate) struct Watch<'a> {
    progress: Option<Progress<'a>>,
    cancel: Option<&'a AtomicBool>,
}

impl<'a> Watch<'a> {
    pub(crate) fn new(hooks: &Hooks<'a>) -> Self {
        Self { progress: hooks.progress, cancel: hooks.cancel }
    }

    /// The loop counter of work of `total` parts.
    pub(crate) fn work(&self, name: &'static str, total: u64) -> Work<'a> {
        Work { watch: *self, name, total, done: AtomicU64::new(0) }
    }

    pub(crate) fn check(&self) -> Result<(), OptError> {
        match self.cancel {
            Some(cancel) if cancel.load(Ordering::Relaxed) => Err(OptError::Cancelled),
            _ => Ok(()),
        }
    }
}

/// Work under way.
pub(crate) struct Work<'a> {
    watch: Watch<'a>,
    name: &'static str,
    total: u64,
    done: AtomicU64,
}

impl Work<'_> {
    /// There is more to do than was known.
    pub(crate) fn more(&mut self, parts: u64) {
        self.total += parts;
    }

    /// `f` of every item, on all threads; results in the order of the items, and of several errors the first in that order.
    /// Each item is one part of the work.
    pub(crate) fn map<T: Send, R: Send>(
        &self,
        items: impl IndexedParallelIterator<Item = T>,
        f: impl Fn(T) -> Result<R, OptError> + Sync,
    ) -> Result<Vec<R>, OptError> {
        let one = |item| {
            self.watch.check()?;
            let result = f(item);
            let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
            if let Some(progress) = self.watch.progress {
                progress(self.name, done, self.total);
            }
            result
        };
        // Collected as results first: a parallel `collect::<Result<_, _>>` returns whichever error came first in time.
        items.map(one).collect::<Vec<_>>().into_iter().collect()
    }
}
