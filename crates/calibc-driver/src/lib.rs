//! One compile session: traces and spec in, bundle out.
mod error;
pub mod kernels;
pub mod masks;
mod observe;
pub mod resolve;
pub mod spec;

pub use error::{DriverError, Family};
pub use observe::{Event, Observer, Silent, Stage};
