//! Kernels for the suite: compiled here, or brought along.
//!
//! `CALIBC_TEST_KERNELS` names a folder of machine code. What it lacks is compiled and added; a machine without NVRTC needs it
//! complete. Files are named after the source they were compiled from, so stale ones are never used.

use std::collections::BTreeMap;
use std::path::PathBuf;

use calibc_bundle::{Kernel, Resources};
use calibc_codegen::KernelSource;
use calibc_ir::{Arch, Family, Variant};
use calibc_nvrtc::{Cache, Nvrtc, Request};
use rayon::prelude::*;

/// The families whose kernels run on `arch`, the portable one first.
pub(crate) fn families(arch: Arch) -> Vec<Family> {
    Family::ALL.into_iter().filter(|family| family.compiles_for(arch)).collect()
}

/// Kernels of `variants` for `arch`, of every family that it runs.
pub(crate) fn kernels(variants: &[Variant], arch: Arch) -> anyhow::Result<BTreeMap<(Family, Variant), Kernel>> {
    let folder = std::env::var_os("CALIBC_TEST_KERNELS").map(PathBuf::from);
    let path = |source: &KernelSource| {
        let digest = blake3::hash(source.text.as_bytes()).to_hex();
        folder.as_ref().map(|folder| folder.join(format!("{}.{arch}.{}.cubin", source.symbol, &digest[..16])))
    };
    let mut ready = Vec::new();
    let mut missing = Vec::new();
    for family in families(arch) {
        for variant in variants {
            let source = calibc_codegen::generate(variant, family)?;
            match path(&source).and_then(|path| std::fs::read(path).ok()) {
                Some(cubin) => ready.push(kernel(arch, source, cubin)),
                None => missing.push(source),
            }
        }
    }
    if !missing.is_empty() {
        let nvrtc = find_nvrtc()?;
        let cache = Cache::open(None)?;
        let compiled: Vec<anyhow::Result<Kernel>> = (missing.into_par_iter())
            .map(|source| {
                let arch_name = arch.to_string();
                let request = Request { source: &source.text, symbol: &source.symbol, arch: &arch_name };
                let (compiled, _) = cache.compile(&nvrtc, &request, env!("CARGO_PKG_VERSION"))?;
                if let Some(path) = path(&source) {
                    std::fs::create_dir_all(path.parent().unwrap_or(&path))?;
                    std::fs::write(path, &compiled.cubin)?;
                }
                Ok(kernel(arch, source, compiled.cubin))
            })
            .collect();
        ready.extend(compiled.into_iter().collect::<anyhow::Result<Vec<_>>>()?);
    }
    Ok(ready.into_iter().map(|kernel| ((kernel.family, kernel.variant), kernel)).collect())
}

pub(crate) fn kernel(arch: Arch, source: KernelSource, cubin: Vec<u8>) -> Kernel {
    Kernel {
        variant: source.variant,
        family: source.family,
        arch,
        symbol: source.symbol,
        source: source.text,
        cubin,
        threads: source.threads,
        shared_bytes: source.shared_bytes,
        resources: Resources::default(),
        nvrtc: (0, 0),
    }
}

fn find_nvrtc() -> anyhow::Result<Nvrtc> {
    match calibc_nvrtc::testing::nvrtc() {
        Some(nvrtc) => Ok(nvrtc),
        None => Ok(Nvrtc::find(None)?),
    }
}

/// The architecture to compile for: `CALIBC_TEST_ARCH`, else the most specific one that runs on `cc`.
pub(crate) fn arch_for(cc: (u32, u32)) -> anyhow::Result<Arch> {
    if let Ok(name) = std::env::var("CALIBC_TEST_ARCH") {
        return Ok(name.parse()?);
    }
    ["sm_120", "sm_100", "sm_90a", "sm_90", "sm_89", "sm_86", "sm_80"]
        .iter()
        .filter_map(|name| name.parse::<Arch>().ok())
        .find(|arch| arch.runs_on(cc))
        .ok_or_else(|| anyhow::anyhow!("no architecture runs on compute capability {}.{}", cc.0, cc.1))
}
