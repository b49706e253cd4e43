//! Dense `u32` ids. What `Display` prints is the spelling used in every text dump, report and error.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u32);

        impl $name {
            /// The id as an index into a table.
            pub fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

id!(
    /// A denoising step; 0 is the noisiest. Prints as `s3`.
    StepId,
    "s"
);
id!(
    /// A transformer layer. Prints as `l7`.
    LayerId,
    "l"
);
id!(
    /// An attention head. Prints as `h2`.
    HeadId,
    "h"
);
id!(
    /// An interned block mask. Prints as `m41`.
    MaskId,
    "m"
);

/// One attention head of one layer at one denoising step. Prints as `s3.l7.h2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Site {
    /// Denoising step.
    pub step: StepId,
    /// Layer.
    pub layer: LayerId,
    /// Head.
    pub head: HeadId,
}

impl Site {
    /// The site at plain indices.
    pub fn new(step: u32, layer: u32, head: u32) -> Self {
        Self { step: StepId(step), layer: LayerId(layer), head: HeadId(head) }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.step, self.layer, self.head)
    }
}
