//! One runnable file per user story.
