//! From variants to machine code: generate each variant's source in the families that the architectures want, compile each for the
//! architectures it serves, keep the order.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use calibc_bundle::{Kernel, Resources};
use calibc_codegen::KernelSource;
use calibc_ir::{Arch, Family, Variant};
use calibc_nvrtc::{Cache, Nvrtc, Request};
use rayon::prelude::*;

use crate::error::DriverError;
use crate::observe::{Event, Observer, Stage};

/// The version that goes into bundles and cache keys.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// An architecture, and the family of kernels made for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelTarget {
    /// The architecture.
    pub arch: Arch,
    /// The family; it compiles for the architecture.
    pub family: Family,
}

impl KernelTarget {
    /// The best family for each of `archs`, or the portable one for all.
    pub fn of(archs: &[Arch], portable: bool) -> Vec<Self> {
        let family = |arch| if portable { Family::Portable } else { Family::of(arch) };
        archs.iter().map(|&arch| Self { arch, family: family(arch) }).collect()
    }
}

/// The sources of `variants` in the families of `targets`: by variant in their order, then by family.
///
/// # Errors
/// [`DriverError::Codegen`].
pub fn sources(variants: &[Variant], targets: &[KernelTarget]) -> Result<Vec<KernelSource>, DriverError> {
    let families: Vec<Family> =
        Family::ALL.into_iter().filter(|&family| targets.iter().any(|target| target.family == family)).collect();
    let pairs = variants.iter().flat_map(|variant| families.iter().map(move |&family| (variant, family)));
    pairs.map(|(variant, family)| Ok(calibc_codegen::generate(variant, family)?)).collect()
}

/// The oldest NVRTC whose ptxas makes whole Hopper kernels: those of 12.4 spill registers, those of 12.5 serialise products.
/// So does 12.6 before its second update (12.6.68), which a version does not tell; there the build gate refuses the kernel.
pub(crate) const OLDEST_NVRTC_FOR_HOPPER: (u32, u32) = (12, 6);

/// Whether NVRTC `version`, which lies at `path`, is new enough for kernels of `family`.
///
/// # Errors
/// [`DriverError::OldNvrtc`].
pub fn check_nvrtc(family: Family, version: (u32, u32), path: &Path) -> Result<(), DriverError> {
    match family {
        Family::Hopper if version < OLDEST_NVRTC_FOR_HOPPER => {
            Err(DriverError::OldNvrtc { found: version, path: path.to_owned() })
        }
        Family::Hopper | Family::Portable => Ok(()),
    }
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

/// Compiles every source for the targets of its family, in parallel; the result is ordered by variant, family and architecture.
///
/// # Errors
/// [`DriverError::OldNvrtc`] before anything is compiled, then the first [`DriverError::Nvrtc`] in that order, or
/// [`DriverError::Cancelled`].
pub fn build(
    sources: &[KernelSource],
    targets: &[KernelTarget],
    nvrtc: &Nvrtc,
    cache: Option<&Cache>,
    observer: &dyn Observer,
) -> Result<Vec<Built>, DriverError> {
    sources.iter().try_for_each(|source| check_nvrtc(source.family, nvrtc.version(), nvrtc.path()))?;
    let served = |source: &KernelSource, target: &KernelTarget| source.family == target.family;
    let mut jobs: Vec<(&KernelSource, Arch)> = sources
        .iter()
        .flat_map(|source| targets.iter().filter(move |target| served(source, target)).map(move |t| (source, t.arch)))
        .collect();
    jobs.sort_by_key(|&(source, arch)| (source.variant, source.family, arch));
    jobs.dedup_by_key(|&mut (source, arch)| (source.variant, source.family, arch));
    let (total, done) = (jobs.len() as u64, AtomicU64::new(0));
    observer.event(&Event::Progress { stage: Stage::Kernels, done: 0, total });
    let built: Vec<Result<Built, DriverError>> = jobs
        .par_iter()
        .map(|&(source, arch)| {
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
                variant: source.variant,
                family: source.family,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hopper_kernels_want_a_newer_nvrtc_than_portable_ones() {
        let check = |family, version| check_nvrtc(family, version, Path::new("/opt/libnvrtc.so.12"));
        for version in [(12, 6), (12, 9), (13, 0)] {
            check(Family::Hopper, version).unwrap();
        }
        check(Family::Portable, (12, 4)).unwrap();
        let error = check(Family::Hopper, (12, 5)).unwrap_err();
        assert_eq!(error.family(), crate::error::Family::Environment);
        let text = error.to_string();
        for word in ["12.6", "12.5", "/opt/libnvrtc.so.12", "nvidia-cuda-nvrtc-cu12", "--portable"] {
            assert!(text.contains(word), "{word}: {text}");
        }
    }
}
