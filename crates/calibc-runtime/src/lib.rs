//! Opens a bundle and executes it, on CUDA or on the CPU reference.
