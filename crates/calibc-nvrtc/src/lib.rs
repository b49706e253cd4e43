//! CUDA text to cubin: finding libnvrtc, compiling, caching.
