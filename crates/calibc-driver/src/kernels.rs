//! From variants to machine code: generate each variant's source, compile it for every architecture, keep the order.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use calibc_bundle::{Kernel, Resources};
use calibc_codegen::KernelSource;
use calibc_ir::{Arch, Variant};
use calibc_nvrtc::{Cache, Nvrtc, Request};
use rayon::prelude::*;

use crate::error::DriverError;
use crate::observe::{Event, Observer, Stage};

/// The version that goes into bundles and cache keys.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The sources of `variants`, in their order.
///
/// # Errors
/// [`DriverError::Codegen`].
pub fn sources(variants: &[Variant]) -> Result<Vec<(Variant, KernelSource)>, DriverError> {
    variants.iter().map(|variant| Ok((*variant, calibc_codegen::generate(variant)?))).collect()
}

/// One compiled kernel, and what it took.
#[derive(Clone, Debug)]
pub struct Built {
    /// The kernel.
    pub kernel: Kernel,
    /// Whether it came from the cache.
    pub cached: bool,
    /// What the compiler warned of.
    pub warnings: Vec<String>,
    /// How long it took.
    pub time: Duration,
}

/// Compiles every source for every architecture, in parallel; the result is ordered by source, then architecture.
///
/// # Errors
/// The first [`DriverError::Nvrtc`] in that order, or [`DriverError::Cancelled`].
pub fn build(
    sources: &[(Variant, KernelSource)],
    archs: &[Arch],
    nvrtc: &Nvrtc,
    cache: Option<&Cache>,
    observer: &dyn Observer,
) -> Result<Vec<Built>, DriverError> {
    let mut jobs: Vec<_> =
        sources.iter().flat_map(|(variant, source)| archs.iter().map(move |arch| (*variant, source, *arch))).collect();
    jobs.sort_by_key(|&(variant, _, arch)| (variant, arch));
    jobs.dedup_by_key(|&mut (variant, _, arch)| (variant, arch));
    let (total, done) = (jobs.len() as u64, AtomicU64::new(0));
    observer.event(&Event::Progress { stage: Stage::Kernels, done: 0, total });
    let built: Vec<Result<Built, DriverError>> = jobs
        .par_iter()
        .map(|&(variant, source, arch)| {
            if observer.cancelled() {
                return Err(DriverError::Cancelled);
            }
            let start = Instant::now();
            let name = arch.to_string();
            let request = Request { source: &source.text, symbol: &source.symbol, arch: &name };
            let (compiled, cached) = match cache {
                Some(cache) => cache.compile(nvrtc, &request, VERSION)?,
                None => (nvrtc.compile(&request)?, false),
            };
            let time = start.elapsed();
            observer.event(&Event::Kernel { symbol: &source.symbol, arch, cached, time });
            let done = done.fetch_add(1, Ordering::Relaxed) + 1;
            observer.event(&Event::Progress { stage: Stage::Kernels, done, total });
            let resources = Resources {
                registers: compiled.resources.registers,
                static_shared_bytes: compiled.resources.shared_bytes,
                stack_bytes: compiled.resources.stack_bytes,
                spill_stores: compiled.resources.spill_stores,
                spill_loads: compiled.resources.spill_loads,
            };
            let kernel = Kernel {
                variant,
                arch,
                symbol: source.symbol.clone(),
                source: source.text.clone(),
                cubin: compiled.cubin,
                threads: source.threads,
                shared_bytes: source.shared_bytes,
                resources,
                nvrtc: nvrtc.version(),
            };
            Ok(Built { kernel, cached, warnings: compiled.warnings, time })
        })
        .collect();
    built.into_iter().collect()
}
