//! Contents to bytes.

use calibc_ir::{Arch, Plan, abi};
use rayon::prelude::*;

use crate::plan::{self, Raw};
use crate::{BundleError, Kernel, Resources, layout, wire};

/// What goes into a bundle.
#[derive(Clone, Copy, Debug)]
pub struct Contents<'a> {
    /// The plan; it must pass the verifier, and have variants and a schedule.
    pub plan: &'a Plan,
    /// Kernels, each of one of the plan's variants, at most one per (variant, family, architecture), in any order. May be empty:
    /// the CPU needs none.
    pub kernels: &'a [Kernel],
    /// The effective spec, as YAML.
    pub spec: &'a str,
    /// Numbers of the compile report.
    pub report: &'a serde_json::Value,
    /// Version of the compiler.
    pub calibc_version: &'a str,
}

/// The bytes of a bundle: equal contents give equal bytes.
///
/// # Errors
/// [`BundleError::Unwritable`] for contents that would not open again.
pub fn encode(contents: &Contents<'_>) -> Result<Vec<u8>, BundleError> {
    let &Contents { plan, kernels, spec, report, calibc_version } = contents;
    plan::verify(plan).map_err(|why| BundleError::unwritable("plan", why))?;
    let unfinished = || BundleError::unwritable("plan", "it has no schedule");
    let schedule = plan.schedule.as_ref().ok_or_else(unfinished)?;
    let report = encode_report(report)?;

    let chunks = plan::mask_chunks(&plan.ops, (plan.model.layers * plan.model.heads) as usize, plan.masks.len());
    let mut payloads = plan::payloads(plan, schedule, &chunks);
    payloads.push(("spec".to_owned(), Raw::Bytes(spec.as_bytes().to_vec())));
    payloads.push(("report".to_owned(), Raw::Bytes(report)));
    let wire_kernels = encode_kernels(plan, kernels, &mut payloads)?;

    let manifest = wire::Manifest {
        calibc_version: calibc_version.to_owned(),
        abi: abi::describe(),
        model: (&plan.model).into(),
        geometry: plan.geometry.into(),
        sigmas: plan.sigmas.clone(),
        anchors: plan.anchors(),
        masks: chunks,
        schedule: wire::ScheduleSize { lists: schedule.list_ptr.len() as u32 - 1, items: schedule.items.len() as u32 },
        variants: plan.variants.iter().map(|&v| v.into()).collect(),
        kernels: wire_kernels,
        payloads: Vec::new(),
    };
    // What a reader refuses for its size must not be written either.
    plan::Dimensions::of(&manifest).map_err(|e| BundleError::unwritable("plan", e.to_string()))?;
    let packed: Vec<_> =
        payloads.into_par_iter().map(|(name, raw)| layout::pack(name, raw.into_bytes(&plan.masks))).collect();
    layout::assemble(manifest, packed.into_iter().collect::<Result<_, _>>()?)
}

fn encode_report(report: &serde_json::Value) -> Result<Vec<u8>, BundleError> {
    let bytes = serde_json::to_vec(report).map_err(|e| BundleError::unwritable("report", e.to_string()))?;
    // Nested too deep is written happily and read never.
    match serde_json::from_slice::<serde_json::Value>(&bytes) {
        Ok(back) if back == *report => Ok(bytes),
        Ok(_) => Err(BundleError::unwritable("report", "it reads back as something else")),
        Err(e) => Err(BundleError::unwritable("report", e.to_string())),
    }
}

/// The manifest's kernels in order, their sources and cubins appended to `payloads`.
fn encode_kernels(
    plan: &Plan,
    kernels: &[Kernel],
    payloads: &mut Vec<(String, Raw)>,
) -> Result<Vec<wire::Kernel>, BundleError> {
    let mut sorted = Vec::with_capacity(kernels.len());
    for kernel in kernels {
        let what = || name(kernel);
        let index = plan.variants.iter().position(|v| *v == kernel.variant);
        let index = index.ok_or_else(|| BundleError::unwritable(what(), "the plan has no such variant"))?;
        check_kernel(kernel).map_err(|why| BundleError::unwritable(what(), why))?;
        kernel.arch.to_string().parse::<Arch>().map_err(|e| BundleError::unwritable(what(), e.to_string()))?;
        sorted.push((index as u32, kernel));
    }
    sorted.sort_by_key(|&(index, kernel)| (index, kernel.family, kernel.arch));
    for pair in sorted.windows(2) {
        let [(a, first), (b, second)] = pair else { continue };
        if (a, first.family) != (b, second.family) {
            continue;
        }
        if first.arch == second.arch {
            return Err(BundleError::unwritable(name(second), "given twice"));
        }
        if first.source != second.source {
            let why = format!("its source is not that for {}", first.arch);
            return Err(BundleError::unwritable(name(second), why));
        }
    }
    let mut previous = None;
    for &(index, kernel) in &sorted {
        if previous.replace((index, kernel.family)) != Some((index, kernel.family)) {
            payloads.push((source_name(kernel), Raw::Bytes(kernel.source.as_bytes().to_vec())));
        }
    }
    payloads.extend(sorted.iter().map(|&(_, kernel)| (cubin_name(kernel), Raw::Bytes(kernel.cubin.clone()))));
    Ok(sorted.into_iter().map(|(index, kernel)| to_wire(index, kernel)).collect())
}

/// The kernel, as errors call it.
fn name(kernel: &Kernel) -> String {
    format!("kernel {} for {}", kernel.family.symbol(&kernel.variant), kernel.arch)
}

fn to_wire(variant: u32, kernel: &Kernel) -> wire::Kernel {
    let Kernel { variant: _, family, arch, symbol, source: _, cubin: _, threads, shared_bytes, resources, nvrtc } =
        kernel;
    let &Resources { registers, static_shared_bytes, stack_bytes, spill_stores, spill_loads } = resources;
    wire::Kernel {
        variant,
        family: (*family).into(),
        arch: arch.to_string(),
        symbol: symbol.clone(),
        threads: *threads,
        shared_bytes: *shared_bytes,
        registers,
        static_shared_bytes,
        stack_bytes,
        spill_stores,
        spill_loads,
        nvrtc: [nvrtc.0, nvrtc.1],
    }
}

/// Name of the payload with the kernel's CUDA text.
pub(crate) fn source_name(kernel: &Kernel) -> String {
    format!("source/{}", kernel.family.symbol(&kernel.variant))
}

/// Name of the payload with the kernel's machine code.
pub(crate) fn cubin_name(kernel: &Kernel) -> String {
    format!("cubin/{}/{}", kernel.family.symbol(&kernel.variant), kernel.arch)
}

/// What a launch relies on: the symbol becomes a C string, the code is not empty, a block has threads, and the code is of the
/// family it says, as far as the architecture can tell.
pub(crate) fn check_kernel(kernel: &Kernel) -> Result<(), String> {
    let mut letters = kernel.symbol.bytes();
    let starts = letters.next().is_some_and(|b| b == b'_' || b.is_ascii_alphabetic());
    if !starts || !letters.all(|b| b == b'_' || b.is_ascii_alphanumeric()) {
        return Err(format!("symbol {:?} is not a C identifier", kernel.symbol));
    }
    if !(1..=1024).contains(&kernel.threads) {
        return Err(format!("{} threads are not a block of 1..=1024", kernel.threads));
    }
    if !kernel.family.compiles_for(kernel.arch) {
        return Err(format!("there are no {} kernels for {}", kernel.family, kernel.arch));
    }
    if kernel.cubin.is_empty() {
        return Err("its machine code is empty".to_owned());
    }
    Ok(())
}
