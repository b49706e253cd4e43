//! The capture kernel: block energies and block deviations of a dense attention that has just run.
//!
//! For sampled query rows i of a block r and every key block c, with the dense output O and log-sum-exp L at hand:
//!
//! ```text
//! p_ij = exp(scale * q_i . k_j - L_i)       m_ic = sum of p_ij over c         (PV)_ic = sum of p_ij v_j over c
//! energy[r, c] = mean_i m_ic                deviation[r, c] = min(1, mean_i |(PV)_ic - m_ic O_i|^2 / mean_i |O_i|^2)
//! ```
//!
//! Means over i are over the sample ([`calibc_ir::capture`]), but the last one, the deviation's denominator, is over all rows of the
//! block: it is exact, so that the deviation is unbiased too.
//!
//! # Numbers
//! Wan 2.1 14B at 720p, 40 heads x 75,600 tokens x 128, 16 rows of each of 591 blocks: two products of 9,456 x 75,600 x 128 a head,
//! 14.6 TFLOP a layer, an eighth of dense attention: 25 ms at 590 TFLOP/s. K and V are 2 x 774 MB and are read by 74 CTAs a
//! head, which walk them in step, from L2: 128 rows a CTA need one byte per 128 FLOP, as in dense attention. Outputs are 2 x 14 MB
//! of codes (56 MB each as f32), O is read once, 774 MB: 0.3 ms. Per score: FFMA, EX2, FADD, half a CVT; per element of (PV): an
//! unpack and two FFMA. That is 0.45 of the issue slots of the products' time, and EX2 half of its pipe: products bound it.
//!
//! # Considered
//! * Expanding |PV - mO|^2 = |PV|^2 - 2m PV.O + m^2 |O|^2: as many operations, and it cancels.
//! * Projecting V on fewer random columns: unbiased and up to 1.6 times as fast, with 25 % noise at 32 columns, the same in every
//!   row. Not exact, so not done.
//! * The masses by a column of ones beside V: 3 % more tensor work to save 14 % of the issue slots, which are not the bound.
//! * One tile per query block of 16 rows padded to 64: wastes three quarters. Here a warp owns 16 rows, whichever block they are
//!   from: a tile of 128 rows is 8 blocks of 16 sampled rows or one whole block, and the kernel is the same.
//!
//! # Taken
//! * No online softmax: with L known, a weight needs no maximum and nothing is ever rescaled. (PV) starts at zero in every block.
//! * Hopper: the roles of the attention kernel. One warp loads, two warpgroups of 64 rows take turns: while one's products run, the
//!   other computes weights and deviations; a weighted sum runs while the next block's weights are computed. O stays packed in
//!   registers (32), beside scores (64), partial outputs (64) and weights (32). A warp reduces its block to two numbers, and another
//!   warp turns 32 key blocks' worth of them into means, encodes and stores them.
//! * Portable: `mma.sync`, 8 warps of 16 rows, a ring of two stages of 32 keys (64 at head_dim 64); the warps store every 32 key blocks.
//! * fp16 weights are kept times 2^15: a weight of 1e-5, the mean at 75,600 tokens, would be subnormal.
//! * `log2-u8` codes are those of the trace writer, bit for bit, by comparing mantissas: no logarithm is rounded.

use calibc_ir::capture::{PARAMS, TILE_ROWS};
use calibc_ir::{BLOCK, DType, Family, HEAD_DIMS, abi};
use serde::Serialize;
use std::fmt;
use tera::{Context, Tera};

use crate::{CodegenError, Field, Part, param_type, part};

/// What a capture kernel writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Statistic {
    /// 32-bit floats.
    F32,
    /// The trace format's `log2-u8` codes.
    Log2U8,
}

impl Statistic {
    /// Both.
    pub const ALL: [Self; 2] = [Self::F32, Self::Log2U8];

    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Log2U8 => 1,
        }
    }
}

/// The trace format's word for it.
impl fmt::Display for Statistic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Log2U8 => "log2-u8",
        })
    }
}

/// What a capture kernel is specialised for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CaptureVariant {
    /// Element type of q, k, v and out.
    pub dtype: DType,
    /// Head dimension, one of [`HEAD_DIMS`].
    pub head_dim: u32,
    /// Element type of the statistics.
    pub statistic: Statistic,
}

impl CaptureVariant {
    /// Entry point of its kernel.
    pub fn symbol(&self, family: Family) -> String {
        let Self { dtype, head_dim, statistic } = self;
        let statistic = match statistic {
            Statistic::F32 => "f32",
            Statistic::Log2U8 => "u8",
        };
        let family = match family {
            Family::Portable => "",
            Family::Hopper => "_hopper",
        };
        format!("calibc_capture_{dtype}_hd{head_dim}_{statistic}{family}")
    }
}

/// A self-contained CUDA translation unit with one capture kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaptureSource {
    /// What it is specialised for.
    pub variant: CaptureVariant,
    /// How it is built.
    pub family: Family,
    /// The entry point.
    pub symbol: String,
    /// CUDA C++ without includes.
    pub text: String,
    /// Threads per CTA.
    pub threads: u32,
    /// Dynamic shared memory in bytes.
    pub shared_bytes: u32,
}

/// The warpgroup that loads and writes, and two that compute.
const HOPPER_THREADS: u32 = 384;
const PRODUCER_REGISTERS: u32 = 40;
const CONSUMER_REGISTERS: u32 = 232;
/// Groups of 16 rows, a warp each.
const GROUPS: u32 = TILE_ROWS / 16;
/// Sums of 32 key blocks: two of each group.
const REPORT_BYTES: u32 = 32 * 2 * GROUPS * 4;

/// What the templates see.
#[derive(Serialize)]
struct CaptureCx {
    symbol: String,
    family: String,
    dtype: String,
    ptx_type: &'static str,
    head_dim: u32,
    row_bytes: u32,
    block: u32,
    tile_rows: u32,
    encoding: String,
    shift: u32,
    borders: Vec<u32>,
    params: Vec<Field>,
    template_digest: String,
    threads: u32,
    stages: u32,
    pass_keys: u32,
    producer_registers: u32,
    consumer_registers: u32,
    tensor_map_bytes: u32,
    tensor_map_align: u32,
    /// Accumulators of a thread, and what comes after them in the operand list of a product.
    score_regs: Vec<u32>,
    out_regs: Vec<u32>,
    weight_operands: Vec<u32>,
    value_operand: u32,
    accumulate_operand: u32,
}

fn parts(variant: &CaptureVariant, family: Family) -> [Part; 7] {
    let unpack = match variant.dtype {
        DType::Bf16 => part!("capture", "unpack_bf16"),
        DType::Fp16 => part!("capture", "unpack_fp16"),
    };
    let store = match variant.statistic {
        Statistic::F32 => part!("capture", "store_f32"),
        Statistic::Log2U8 => part!("capture", "store_log2_u8"),
    };
    let (instructions, kernel) = match family {
        Family::Portable => (part!("capture", "portable_ptx"), part!("capture", "portable_kernel")),
        Family::Hopper => (part!("capture", "hopper_ptx"), part!("capture", "hopper_kernel")),
    };
    [
        part!("capture", "contract"),
        unpack,
        part!("capture", "dense"),
        store,
        part!("capture", "report"),
        instructions,
        kernel,
    ]
}

/// Mantissa bits of the next f32 above 2^(-(2j+1)/16), the borders between `log2-u8` codes in [0.5, 1).
fn borders() -> Vec<u32> {
    let border = |j: u32| {
        let exact = (-f64::from(2 * j + 1) / 16.0).exp2();
        let nearest = exact as f32;
        let above = if f64::from(nearest) < exact { nearest.next_up() } else { nearest };
        above.to_bits() & 0x7f_ffff
    };
    (0..8).map(border).collect()
}

/// The CUDA text of a capture kernel; the same for every architecture of the family.
///
/// # Errors
/// [`CodegenError::HeadDim`] for a head dimension without kernels.
pub fn generate_capture(variant: &CaptureVariant, family: Family) -> Result<CaptureSource, CodegenError> {
    if !HEAD_DIMS.contains(&variant.head_dim) {
        return Err(CodegenError::HeadDim { found: variant.head_dim });
    }
    let parts = parts(variant, family);
    let mut digest = blake3::Hasher::new();
    for (_, text) in &parts {
        digest.update(text.as_bytes());
    }
    let row_bytes = variant.head_dim * 2;
    let (tile_bytes, pass_keys) = (BLOCK * row_bytes, 4096 / variant.head_dim);
    let stages = if variant.head_dim == 64 { 4 } else { 2 };
    let (threads, shared_bytes) = match family {
        Family::Portable => (GROUPS * 32, (TILE_ROWS + 4 * pass_keys) * row_bytes + REPORT_BYTES + GROUPS * 4),
        // Barriers and the groups' squares fit in the last 256 bytes.
        Family::Hopper => (HOPPER_THREADS, (1 + 2 * stages) * tile_bytes + 2 * REPORT_BYTES + 256),
    };
    // A thread holds half a row of accumulators: 64 rows of a warpgroup over 128 threads.
    let (scores, outs) = (BLOCK / 2, variant.head_dim / 2);
    let cx = CaptureCx {
        symbol: variant.symbol(family),
        family: family.to_string(),
        dtype: variant.dtype.to_string(),
        ptx_type: match variant.dtype {
            DType::Bf16 => "bf16",
            DType::Fp16 => "f16",
        },
        head_dim: variant.head_dim,
        row_bytes,
        block: BLOCK,
        tile_rows: TILE_ROWS,
        encoding: variant.statistic.to_string(),
        shift: match variant.dtype {
            DType::Bf16 => 0,
            DType::Fp16 => 15,
        },
        borders: borders(),
        params: PARAMS
            .iter()
            .map(|&(name, scalar)| {
                let r#type = match name {
                    "out" => "const u16*",
                    "lse" => "const float*",
                    "energy" | "deviation" => "void*",
                    _ => param_type(name, scalar),
                };
                Field { r#type, name }
            })
            .collect(),
        template_digest: digest.finalize().to_hex()[..16].to_owned(),
        threads,
        stages,
        pass_keys,
        producer_registers: PRODUCER_REGISTERS,
        consumer_registers: CONSUMER_REGISTERS,
        tensor_map_bytes: abi::TENSOR_MAP_BYTES,
        tensor_map_align: abi::TENSOR_MAP_ALIGN,
        score_regs: (0..scores).collect(),
        out_regs: (0..outs).collect(),
        weight_operands: (outs..outs + 4).collect(),
        value_operand: outs + 4,
        accumulate_operand: outs + 5,
    };
    let mut text = String::new();
    for (template, source) in parts {
        let spell = || Tera::one_off(source, &Context::from_serialize(&cx)?, false);
        text += &spell().map_err(|source| CodegenError::CaptureTemplate {
            template,
            symbol: cx.symbol.clone(),
            source: Box::new(source),
        })?;
    }
    Ok(CaptureSource { variant: *variant, family, symbol: cx.symbol, text, threads, shared_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> impl Iterator<Item = (CaptureVariant, Family)> {
        (0..16usize).map(|i| {
            let variant = CaptureVariant {
                dtype: DType::ALL[i & 1],
                head_dim: HEAD_DIMS[i >> 1 & 1],
                statistic: Statistic::ALL[i >> 2 & 1],
            };
            (variant, Family::ALL[i >> 3])
        })
    }

    #[test]
    fn every_kernel_is_self_contained_and_its_own() {
        let mut texts = Vec::new();
        for (variant, family) in all() {
            let kernel = generate_capture(&variant, family).unwrap();
            assert!(
                kernel.text.contains(&kernel.symbol)
                    && !kernel.text.contains("#include")
                    && !kernel.text.contains("{%")
            );
            // Per CTA: 99 KB on sm_86, sm_89 and sm_120, 227 KB on sm_90.
            let most = [99 * 1024, 227 * 1024][family as usize];
            assert!(kernel.shared_bytes <= most, "{}", kernel.symbol);
            texts.push(kernel.text);
        }
        texts.sort();
        texts.dedup();
        assert_eq!(texts.len(), 16, "every knob changes the source");
    }

    #[test]
    fn other_head_dims_are_refused() {
        let variant = CaptureVariant { dtype: DType::Bf16, head_dim: 96, statistic: Statistic::F32 };
        for family in Family::ALL {
            assert!(matches!(generate_capture(&variant, family), Err(CodegenError::HeadDim { found: 96 })));
        }
    }

    /// The kernel's arithmetic, against the definition.
    #[test]
    fn mantissas_give_the_nearest_code() {
        let borders = borders();
        assert!(borders.is_sorted_by(|a, b| a > b));
        let code = |value: f32| {
            let bits = value.to_bits();
            if bits >= 0x3f80_0000 {
                return 0;
            }
            let below = borders.iter().filter(|&&border| bits & 0x7f_ffff < border).count() as u32;
            ((126 - (bits >> 23)) * 8 + below).min(255)
        };
        for i in 0..200_000u32 {
            let value = f32::from_bits(0x2f00_0000 + i * 1300);
            let exact = -8.0 * f64::from(value).log2();
            assert!(
                (exact - exact.floor() - 0.5).abs() < 1e-9 || f64::from(code(value)) == exact.round().clamp(0.0, 255.0),
                "{value}"
            );
        }
        assert_eq!([code(0.0), code(1e-40), code(1.0), code(7.0), code(f32::NAN)], [255, 255, 0, 0, 0]);
    }
}
