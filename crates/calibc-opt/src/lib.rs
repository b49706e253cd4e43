//! Policies and passes: threshold maps in, a scheduled plan out.
