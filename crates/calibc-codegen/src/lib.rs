//! Plan to variants to CUDA text: a pure function of the [`Variant`], with no GPU and no CUDA toolkit.
//!
//! ```text
//! Variant --decide--> KernelCx (flat) + list of parts --spell--> templates/portable/*.cu.tera --> one CUDA file, no #include
//! ```
//!
//! Rust decides, templates spell: a template substitutes and loops over `KernelCx`, and never branches. What differs between
//! variants is a constant of the prelude, or a part chosen in `parts`.
//!
//! # The portable kernel
//!
//! `mma.sync` m16n8k16 with fp32 accumulators, `cp.async`, `ldmatrix`: everything sm_80 has, and every later GPU runs. One CTA
//! computes one work item: 128 query rows of one head of one batch element against the kept blocks of their mask row.
//!
//! * Numbers: at head_dim 128 a pass over 64 keys does 128 * 64 * 128 * 4 = 4.2 MFLOP for 32 KB of K and V, so L2 has to
//!   deliver 1 byte per 128 FLOP; matrix instructions bound it, then shared-memory reads by `ldmatrix`.
//! * Considered: 8 warps of 16 rows (64 KB of `ldmatrix` traffic more per pass: shared memory becomes the bound), and two-stage
//!   K/V rings (96 KB: one CTA fewer per SM). Taken: 4 warps of 32 rows, single K and V buffers filled in turns, so that V loads
//!   under the scores and the next K under softmax and the weighted sum; 64 KB per CTA, and a second CTA on the SM covers the rest.
//! * Registers: outputs 128 + scores 64 of 255 at head_dim 128; nothing spills on any architecture (tests hold it there).
//! * A mask row is read once into shared memory as bits; every thread walks it, so control flow is uniform.
//!
//! The kernel's launch contract is [`calibc_ir::abi`]; the parameter struct is spelled from that table.

use calibc_ir::{BLOCK, HEAD_DIMS, Variant, abi};
use serde::Serialize;
use tera::{Context, Tera};
use thiserror::Error;

/// Why no kernel was generated.
#[derive(Debug, Error)]
pub enum CodegenError {
    /// No template serves this head dimension.
    #[error("no kernel for head_dim {found}; supported: {HEAD_DIMS:?}")]
    HeadDim {
        /// The head dimension asked for.
        found: u32,
    },
    /// A template and its context disagree: a bug of calibc.
    #[error("template `{template}` of {variant} did not render (a bug of calibc): {source}")]
    Template {
        /// The part.
        template: &'static str,
        /// The variant.
        variant: Variant,
        /// What the engine says.
        source: Box<tera::Error>,
    },
}

/// A self-contained CUDA translation unit with one entry point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelSource {
    /// The entry point; says what the kernel is specialised for.
    pub symbol: String,
    /// CUDA C++ without includes. The same for every architecture.
    pub text: String,
    /// Threads per CTA.
    pub threads: u32,
    /// Dynamic shared memory in bytes, less the mask row: see [`KernelSource::launch_shared_bytes`].
    pub shared_bytes: u32,
}

impl KernelSource {
    /// Dynamic shared memory of a launch over `num_kv_blocks` key blocks: one mask row more than `shared_bytes`.
    pub fn launch_shared_bytes(&self, num_kv_blocks: u32) -> u32 {
        self.shared_bytes + num_kv_blocks.div_ceil(32) * 4
    }
}

/// What the templates see. Flat: scalars, and the two field lists of the launch contract.
#[derive(Serialize)]
struct KernelCx {
    symbol: String,
    dtype: String,
    ptx_type: &'static str,
    heads: &'static str,
    ragged: bool,
    lse: bool,
    head_dim: u32,
    block: u32,
    block_m: u32,
    block_n: u32,
    warps: u32,
    threads: u32,
    rows_per_warp: u32,
    m_tiles: u32,
    chunks: u32,
    row_bytes: u32,
    op_anchors: u32,
    abi_version: u32,
    template_digest: String,
    step_table: Vec<Field>,
    params: Vec<Field>,
}

#[derive(Serialize)]
struct Field {
    r#type: &'static str,
    name: &'static str,
}

const ROWS_PER_WARP: u32 = 32;

macro_rules! part {
    ($name:literal) => {
        ($name, include_str!(concat!("../../../templates/portable/", $name, ".cu.tera")))
    };
}

/// The parts of a variant's source, in order.
fn parts(variant: &Variant) -> [(&'static str, &'static str); 7] {
    let rows = if variant.anchors { part!("rows_anchors") } else { part!("rows_direct") };
    [part!("prelude"), part!("ptx"), rows, part!("tiles"), part!("softmax"), part!("epilogue"), part!("kernel")]
}

/// C++ type of a launch parameter: addresses get the type of what they point to.
fn param_type(name: &str, scalar: abi::Scalar) -> &'static str {
    match (scalar, name) {
        (abi::Scalar::Ptr, "q" | "k" | "v") => "const u16*",
        (abi::Scalar::Ptr, "out") => "u16*",
        (abi::Scalar::Ptr, "lse") => "float*",
        (abi::Scalar::Ptr, "steps") => "const StepTable*",
        (abi::Scalar::Ptr, _) => "const u32*",
        (abi::Scalar::I64, _) => "i64",
        (abi::Scalar::U32, _) => "u32",
        (abi::Scalar::F32, _) => "float",
    }
}

/// The CUDA text of `variant`.
pub fn generate(variant: &Variant) -> Result<KernelSource, CodegenError> {
    if !HEAD_DIMS.contains(&variant.head_dim) {
        return Err(CodegenError::HeadDim { found: variant.head_dim });
    }
    let parts = parts(variant);
    let mut digest = blake3::Hasher::new();
    parts.iter().for_each(|(_, text)| {
        digest.update(text.as_bytes());
    });
    let (block_m, row_bytes) = (BLOCK, variant.head_dim * 2);
    // 8 KB of keys and as much of values per stage, whatever the head dimension.
    let keys_per_pass = 4096 / variant.head_dim;
    let warps = block_m / ROWS_PER_WARP;
    let cx = KernelCx {
        symbol: variant.to_string(),
        dtype: variant.dtype.to_string(),
        ptx_type: match variant.dtype {
            calibc_ir::DType::Bf16 => "bf16",
            calibc_ir::DType::Fp16 => "f16",
        },
        heads: if variant.anchors { "dense, block-sparse and anchor-row" } else { "dense and block-sparse" },
        ragged: variant.ragged,
        lse: variant.lse,
        head_dim: variant.head_dim,
        block: BLOCK,
        block_m,
        block_n: keys_per_pass,
        warps,
        threads: warps * 32,
        rows_per_warp: ROWS_PER_WARP,
        m_tiles: ROWS_PER_WARP / 16,
        chunks: row_bytes / 16,
        row_bytes,
        op_anchors: abi::OP_ANCHORS,
        abi_version: abi::ABI_VERSION,
        template_digest: digest.finalize().to_hex()[..16].to_owned(),
        step_table: abi::STEP_TABLE
            .iter()
            .map(|&name| Field { r#type: if name == "lists" { "WorkList" } else { "u32" }, name })
            .collect(),
        params: abi::PARAMS.iter().map(|&(name, scalar)| Field { r#type: param_type(name, scalar), name }).collect(),
    };
    let threads = cx.threads;
    let mut text = String::new();
    for (template, source) in parts {
        let spell = || Tera::one_off(source, &Context::from_serialize(&cx)?, false);
        let part = spell().map_err(|source| CodegenError::Template {
            template,
            variant: *variant,
            source: Box::new(source),
        })?;
        text += &part;
    }
    let shared_bytes = (block_m + 4 * keys_per_pass) * row_bytes;
    Ok(KernelSource { symbol: variant.to_string(), text, threads, shared_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use calibc_ir::DType;

    fn all_variants() -> impl Iterator<Item = Variant> {
        (0..32u32).map(|i| Variant {
            dtype: DType::ALL[(i & 1) as usize],
            head_dim: HEAD_DIMS[(i >> 1 & 1) as usize],
            lse: i & 4 != 0,
            anchors: i & 8 != 0,
            ragged: i & 16 != 0,
        })
    }

    #[test]
    fn every_variant_is_self_contained_and_named_after_what_it_is() {
        let mut texts: Vec<_> = all_variants()
            .map(|variant| {
                let kernel = generate(&variant).unwrap();
                assert!(!kernel.text.contains("#include") && !kernel.text.contains("{%"));
                assert!(kernel.text.contains(&format!(" {}(const __grid_constant__ Params p)", variant)));
                kernel.text
            })
            .collect();
        texts.sort();
        texts.dedup();
        assert_eq!(texts.len(), 32, "every knob changes the source");
    }

    #[test]
    fn shared_memory_fits_the_smallest_gpu() {
        // 99 KB per CTA on sm_86, sm_89 and sm_120, for the longest sequence a plan may have.
        for variant in all_variants() {
            let longest = calibc_ir::MAX_TOKENS / BLOCK;
            assert!(generate(&variant).unwrap().launch_shared_bytes(longest) <= 99 * 1024);
        }
    }

    #[test]
    fn other_head_dims_are_refused() {
        let variant = Variant { head_dim: 96, ..all_variants().next().unwrap() };
        assert!(matches!(generate(&variant), Err(CodegenError::HeadDim { found: 96 })));
    }
}
