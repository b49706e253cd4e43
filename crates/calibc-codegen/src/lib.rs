//! Plan to variants to CUDA text; a pure function.
