//! Plan to variants to CUDA text: a pure function of the [`Variant`] and the [`Family`], with no GPU and no CUDA toolkit.
//!
//! ```text
//! Variant, Family --decide--> context (flat) + parts of templates/{common,<family>}/ --spell--> one CUDA file, no #include
//! ```
//!
//! Rust decides, templates spell: a template substitutes and loops over its context, and never branches. What differs between
//! variants is a constant of the prelude, or a part chosen in the family's `parts`. Why each family is built as it is stands in
//! its module, `portable` and `hopper`; kernels that capture calibration statistics (`templates/capture`) in `capture`.
//!
//! A kernel's launch contract is [`calibc_ir::abi`]; the parameter struct is spelled from that table.

mod capture;
mod hopper;
mod portable;

use calibc_ir::{BLOCK, DType, Family, HEAD_DIMS, Variant, abi};
use serde::Serialize;
use tera::{Context, Tera};
use thiserror::Error;

pub use capture::{CaptureSource, CaptureVariant, Statistic, generate_capture};

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
    #[error("{family} template `{template}` of {variant} did not render (a bug of calibc): {source}")]
    Template {
        /// The family.
        family: Family,
        /// The part.
        template: &'static str,
        /// The variant.
        variant: Variant,
        /// What the engine says.
        source: Box<tera::Error>,
    },
    /// A template of a capture kernel and its context disagree: a bug of calibc.
    #[error("capture template `{template}` of {symbol} did not render (a bug of calibc): {source}")]
    CaptureTemplate {
        /// The part.
        template: &'static str,
        /// The kernel.
        symbol: String,
        /// What the engine says.
        source: Box<tera::Error>,
    },
}

/// A self-contained CUDA translation unit with one entry point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelSource {
    /// What the kernel is specialised for.
    pub variant: Variant,
    /// How it is built, and so what it compiles for and how it is launched.
    pub family: Family,
    /// The entry point, [`Family::symbol`] of the variant.
    pub symbol: String,
    /// CUDA C++ without includes. The same for every architecture of the family.
    pub text: String,
    /// Threads per CTA.
    pub threads: u32,
    /// Dynamic shared memory in bytes, less the mask row of portable kernels: see [`KernelSource::launch_shared_bytes`].
    pub shared_bytes: u32,
}

impl KernelSource {
    /// Dynamic shared memory of a launch over `num_kv_blocks` key blocks: of portable kernels, one mask row more than
    /// `shared_bytes`.
    pub fn launch_shared_bytes(&self, num_kv_blocks: u32) -> u32 {
        match self.family {
            Family::Portable => self.shared_bytes + num_kv_blocks.div_ceil(32) * 4,
            Family::Hopper => self.shared_bytes,
        }
    }
}

/// What the templates of every family see. Flat: scalars, and the field lists of the launch contract.
#[derive(Serialize)]
struct Common {
    symbol: String,
    family: String,
    dtype: String,
    ptx_type: &'static str,
    heads: &'static str,
    ragged: bool,
    lse: bool,
    head_dim: u32,
    row_bytes: u32,
    block: u32,
    tile_rows: u32,
    op_anchors: u32,
    split_tail: u32,
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

/// A named template.
type Part = (&'static str, &'static str);

/// A template of `templates/`, as a [`Part`].
macro_rules! part {
    ($family:literal, $name:literal) => {
        ($name, include_str!(concat!("../../../templates/", $family, "/", $name, ".cu.tera")))
    };
}
use part;

impl Common {
    fn new(variant: &Variant, family: Family, tile_rows: u32, parts: &[Part]) -> Self {
        let mut digest = blake3::Hasher::new();
        parts.iter().for_each(|(_, text)| {
            digest.update(text.as_bytes());
        });
        Self {
            symbol: family.symbol(variant),
            family: family.to_string(),
            dtype: variant.dtype.to_string(),
            ptx_type: match variant.dtype {
                DType::Bf16 => "bf16",
                DType::Fp16 => "f16",
            },
            heads: if variant.anchors { "dense, block-sparse and anchor-row" } else { "dense and block-sparse" },
            ragged: variant.ragged,
            lse: variant.lse,
            head_dim: variant.head_dim,
            row_bytes: variant.head_dim * 2,
            block: BLOCK,
            tile_rows,
            op_anchors: abi::OP_ANCHORS,
            split_tail: abi::SPLIT_TAIL,
            abi_version: abi::ABI_VERSION,
            template_digest: digest.finalize().to_hex()[..16].to_owned(),
            step_table: abi::STEP_TABLE
                .iter()
                .map(|&name| Field { r#type: if name == "lists" { "WorkList" } else { "u32" }, name })
                .collect(),
            params: abi::PARAMS
                .iter()
                .map(|&(name, scalar)| Field { r#type: param_type(name, scalar), name })
                .collect(),
        }
    }
}

/// C++ type of a launch parameter: addresses get the type of what they point to.
fn param_type(name: &str, scalar: abi::Scalar) -> &'static str {
    match (scalar, name) {
        (abi::Scalar::Ptr, "q" | "k" | "v") => "const u16*",
        (abi::Scalar::Ptr, "out") => "u16*",
        (abi::Scalar::Ptr, "lse" | "partials") => "float*",
        (abi::Scalar::Ptr, "arrivals") => "u32*",
        (abi::Scalar::Ptr, "steps") => "const StepTable*",
        (abi::Scalar::Ptr, _) => "const u32*",
        (abi::Scalar::I64, _) => "i64",
        (abi::Scalar::U32, _) => "u32",
        (abi::Scalar::F32, _) => "float",
    }
}

/// The parts one after the other, spelled with the context `cx`.
fn spell(variant: &Variant, family: Family, parts: &[Part], cx: &impl Serialize) -> Result<String, CodegenError> {
    let mut text = String::new();
    for &(template, source) in parts {
        let spell = || Tera::one_off(source, &Context::from_serialize(cx)?, false);
        let part = spell().map_err(|source| CodegenError::Template {
            family,
            template,
            variant: *variant,
            source: Box::new(source),
        })?;
        text += &part;
    }
    Ok(text)
}

/// The CUDA text of `variant` in `family`.
///
/// # Errors
/// [`CodegenError::HeadDim`] for a head dimension without kernels.
pub fn generate(variant: &Variant, family: Family) -> Result<KernelSource, CodegenError> {
    if !HEAD_DIMS.contains(&variant.head_dim) {
        return Err(CodegenError::HeadDim { found: variant.head_dim });
    }
    match family {
        Family::Portable => portable::generate(variant),
        Family::Hopper => hopper::generate(variant),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn every_kernel_is_self_contained_and_named_after_what_it_is() {
        for family in Family::ALL {
            let mut texts: Vec<_> = all_variants()
                .map(|variant| {
                    let kernel = generate(&variant, family).unwrap();
                    assert_eq!((kernel.variant, kernel.family), (variant, family));
                    assert_eq!(kernel.symbol, family.symbol(&variant));
                    assert!(!kernel.text.contains("#include") && !kernel.text.contains("{%"));
                    let signature = match family {
                        Family::Portable => "(const __grid_constant__ Params p)",
                        Family::Hopper => {
                            "(const __grid_constant__ Params p, const __grid_constant__ TensorMap q_map, \
                             const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map)"
                        }
                    };
                    // Templates may break the line between two parameters.
                    let words = kernel.text.split_whitespace().collect::<Vec<_>>().join(" ");
                    assert!(words.contains(&format!(" {}{signature}", kernel.symbol)), "{}", kernel.symbol);
                    kernel.text
                })
                .collect();
            texts.sort();
            texts.dedup();
            assert_eq!(texts.len(), 32, "every knob changes the {family} source");
        }
    }

    #[test]
    fn shared_memory_fits_the_smallest_gpu_of_the_family() {
        // Per CTA: 99 KB on sm_86, sm_89 and sm_120, 227 KB on sm_90. For the longest sequence a plan may have.
        for (family, most) in Family::ALL.into_iter().zip([99 * 1024, 227 * 1024]) {
            for variant in all_variants() {
                let longest = calibc_ir::MAX_TOKENS / BLOCK;
                let kernel = generate(&variant, family).unwrap();
                assert!(kernel.launch_shared_bytes(longest) <= most, "{}", kernel.symbol);
            }
        }
    }

    #[test]
    fn other_head_dims_are_refused() {
        let variant = Variant { head_dim: 96, ..all_variants().next().unwrap() };
        for family in Family::ALL {
            assert!(matches!(generate(&variant, family), Err(CodegenError::HeadDim { found: 96 })));
        }
    }
}
