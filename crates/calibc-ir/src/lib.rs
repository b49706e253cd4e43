//! The plan IR of calibc: ids, token geometry, block masks, ops, kernel variants and the order of work.
//!
//! ```text
//! BlockEnergy (per prompt) --vote--> ThresholdMap --epsilon--> BlockMask --intern--> Plan { one AttnOp per Site }
//! ```
//!
//! Ids are `u32` newtypes whose `Display` is the spelling of every dump (`s3.l7.h2`, `m41`). A [`Plan`] has a readable text
//! form ([`text`]) and a verifier ([`verify`]); a plan that passes it cannot make code generation or execution fail.
//!
//! No I/O and no CUDA here, and no type derives `Serialize`: the text form and the bundle's own wire structs are the only
//! stable forms, so that passes stay free to change the IR. Nothing depends on hash order or on threads.

pub mod abi;
mod anchors;
pub mod capture;
mod evidence;
mod geometry;
mod ids;
mod mask;
mod plan;
pub mod text;
mod variant;
pub mod verify;

pub use anchors::{AnchorTable, anchor_rows, nearest_anchor};
pub use evidence::{BlockEnergy, ThresholdMap};
pub use geometry::{BLOCK, Geometry, GeometryError, Layout, MAX_TOKENS, TextPosition};
pub use ids::{HeadId, LayerId, MaskId, Site, StepId};
pub use mask::{BlockMask, MaskTable};
pub use plan::{AttnOp, Model, Plan, Schedule, WorkItem};
pub use variant::{Arch, ArchError, DType, DTypeError, Family, FamilyError, HEAD_DIMS, Variant};
