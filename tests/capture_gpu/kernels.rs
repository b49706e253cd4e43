//! Capture kernels for the suite, compiled here or brought along: `CALIBC_TEST_KERNELS` names a folder of machine code, to which
//! what it lacks is added. Files are named after the source they were compiled from, so stale ones are never used.

use std::path::PathBuf;

use anyhow::Context;
use calibc_codegen::{CaptureSource, CaptureVariant, Statistic, generate_capture};
use calibc_ir::{Arch, DType, Family, HEAD_DIMS};
use calibc_nvrtc::{Nvrtc, Request};
use calibc_runtime::CaptureCode;
use calibc_runtime::cuda::CaptureKernel;

pub(crate) fn variants() -> impl Iterator<Item = CaptureVariant> {
    (0..8usize).map(|i| CaptureVariant {
        dtype: DType::ALL[i & 1],
        head_dim: HEAD_DIMS[i >> 1 & 1],
        statistic: Statistic::ALL[i >> 2],
    })
}

/// The most specific architecture that runs on `cc`.
pub(crate) fn arch_for(cc: (u32, u32)) -> anyhow::Result<Arch> {
    ["sm_120", "sm_100", "sm_90a", "sm_89", "sm_86", "sm_80"]
        .iter()
        .filter_map(|name| name.parse::<Arch>().ok())
        .find(|arch| arch.runs_on(cc))
        .with_context(|| format!("no architecture runs on compute capability {}.{}", cc.0, cc.1))
}

/// Families whose kernels run on `arch`; `CALIBC_TEST_FAMILY` picks one.
pub(crate) fn families(arch: Arch) -> Vec<Family> {
    let only = std::env::var("CALIBC_TEST_FAMILY").ok().map(|name| name.parse::<Family>().expect("a family's name"));
    let wanted = |family: &Family| family.compiles_for(arch) && only.is_none_or(|only| only == *family);
    Family::ALL.into_iter().filter(wanted).collect()
}

fn cubin(source: &CaptureSource, arch: Arch) -> anyhow::Result<Vec<u8>> {
    let folder = std::env::var_os("CALIBC_TEST_KERNELS").map(PathBuf::from);
    let digest = blake3::hash(source.text.as_bytes()).to_hex();
    let path = folder.map(|folder| folder.join(format!("{}.{arch}.{}.cubin", source.symbol, &digest[..16])));
    if let Some(Ok(cubin)) = path.as_ref().map(std::fs::read) {
        return Ok(cubin);
    }
    let nvrtc = calibc_nvrtc::testing::nvrtc().map_or_else(|| Nvrtc::find(None), Ok)?;
    let request = Request { source: &source.text, symbol: &source.symbol, arch: &arch.to_string() };
    let compiled = nvrtc.compile(&request)?;
    if let Some(path) = path {
        std::fs::create_dir_all(path.parent().unwrap_or(&path))?;
        std::fs::write(path, &compiled.cubin)?;
    }
    Ok(compiled.cubin)
}

/// Loads a kernel onto GPU 0.
pub(crate) fn load(variant: CaptureVariant, family: Family, arch: Arch) -> anyhow::Result<CaptureKernel> {
    let source = generate_capture(&variant, family)?;
    let code = CaptureCode {
        cubin: &cubin(&source, arch)?,
        symbol: &source.symbol,
        family,
        dtype: variant.dtype,
        head_dim: variant.head_dim,
        statistic_bytes: variant.statistic.bytes() as u32,
        threads: source.threads,
        shared_bytes: source.shared_bytes,
    };
    Ok(CaptureKernel::load(0, &code)?)
}

/// Fills the folder of machine code for another machine.
pub(crate) fn prepare() -> anyhow::Result<()> {
    let arch = arch_for((9, 0))?;
    for family in families(arch) {
        for variant in variants() {
            cubin(&generate_capture(&variant, family)?, arch)?;
        }
    }
    Ok(())
}
