//! What a session tells while it works, and how it is stopped.

use std::time::Duration;

use calibc_ir::Arch;

/// The long parts of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Reading and checking traces; counted in bytes.
    Open,
    /// A pass, by name; counted in its own units.
    Pass(&'static str),
    /// Measuring recall; counted in sites.
    Recall,
    /// Compiling kernels; counted in kernels.
    Kernels,
    /// Encoding the bundle.
    Encode,
    /// Opening it again.
    Check,
}

impl Stage {
    /// A word for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "reading traces",
            Self::Pass(name) => name,
            Self::Recall => "measuring recall",
            Self::Kernels => "compiling kernels",
            Self::Encode => "packing",
            Self::Check => "checking",
        }
    }
}

/// Something that happened.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// `done` of `total` units of a stage.
    Progress {
        /// The stage.
        stage: Stage,
        /// Units done.
        done: u64,
        /// All units.
        total: u64,
    },
    /// A pass had something to say.
    Remark {
        /// The pass.
        pass: &'a str,
        /// What.
        text: &'a str,
    },
    /// The plan after a pass, as asked for by [`crate::Options::dump_after`].
    Dump {
        /// Number of the pass, from 0.
        index: usize,
        /// Its name.
        pass: &'a str,
        /// The plan's text form.
        text: &'a str,
    },
    /// A kernel is there.
    Kernel {
        /// Its entry point.
        symbol: &'a str,
        /// Its architecture.
        arch: Arch,
        /// Whether it came from the cache.
        cached: bool,
        /// How long it took.
        time: Duration,
    },
    /// A stage is over.
    Done {
        /// The stage.
        stage: Stage,
        /// How long it took.
        time: Duration,
    },
    /// Something the user should know although the session goes on.
    Warning {
        /// What.
        text: &'a str,
    },
}

/// Listens to a session. Called from many threads, in no particular order.
pub trait Observer: Sync {
    /// Something happened.
    fn event(&self, event: &Event<'_>) {
        let _ = event;
    }

    /// Whether the session should stop; it then ends with [`crate::DriverError::Cancelled`].
    fn cancelled(&self) -> bool {
        false
    }
}

/// Hears nothing and never stops a session.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {}
