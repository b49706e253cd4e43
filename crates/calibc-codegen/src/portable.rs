//! The portable kernel.
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

use calibc_ir::{BLOCK, Family, Variant};
use serde::Serialize;

use crate::{CodegenError, Common, KernelSource, Part, part, spell};

/// What the templates see.
#[derive(Serialize)]
struct KernelCx {
    #[serde(flatten)]
    common: Common,
    block_m: u32,
    block_n: u32,
    warps: u32,
    threads: u32,
    rows_per_warp: u32,
    m_tiles: u32,
    chunks: u32,
}

const ROWS_PER_WARP: u32 = 32;

/// The parts of a variant's source, in order.
fn parts(variant: &Variant) -> [Part; 7] {
    let rows = if variant.anchors { part!("portable", "rows_anchors") } else { part!("portable", "rows_direct") };
    [
        part!("portable", "prelude"),
        part!("portable", "ptx"),
        rows,
        part!("portable", "tiles"),
        part!("portable", "softmax"),
        part!("portable", "epilogue"),
        part!("portable", "kernel"),
    ]
}

pub(crate) fn generate(variant: &Variant) -> Result<KernelSource, CodegenError> {
    let (family, parts) = (Family::Portable, parts(variant));
    let common = Common::new(variant, family, &parts);
    let (block_m, row_bytes) = (BLOCK, common.row_bytes);
    // 8 KB of keys and as much of values per stage, whatever the head dimension.
    let keys_per_pass = 4096 / variant.head_dim;
    let warps = block_m / ROWS_PER_WARP;
    let threads = warps * 32;
    let symbol = common.symbol.clone();
    let cx = KernelCx {
        common,
        block_m,
        block_n: keys_per_pass,
        warps,
        threads,
        rows_per_warp: ROWS_PER_WARP,
        m_tiles: ROWS_PER_WARP / 16,
        chunks: row_bytes / 16,
    };
    let text = spell(variant, family, &parts, &cx)?;
    let shared_bytes = (block_m + 4 * keys_per_pass) * row_bytes;
    Ok(KernelSource { variant: *variant, family, symbol, text, threads, shared_bytes })
}
