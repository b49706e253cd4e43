//! The portable kernel.
//!
//! `mma.sync` m16n8k16 with fp32 accumulators, `cp.async`, `ldmatrix`: everything sm_80 has, and every later GPU runs. One CTA
//! computes 128 query rows of one head of one batch element, a work item or a query block of one, against the kept blocks of their mask row.
//!
//! * Numbers: at head_dim 128 a pass over 32 keys does 128 * 32 * 128 * 4 = 2.1 MFLOP for 16 KB of K and V, so L2 has to
//!   deliver 1 byte per 128 FLOP; matrix instructions bound it, then shared-memory reads by `ldmatrix`.
//! * Considered: 8 warps of 16 rows (twice the `ldmatrix` traffic: shared memory becomes the bound), and passes of 64 keys with
//!   single K and V buffers filled in turns (64 registers of scores beside 128 of outputs: some architectures spill). Taken: 4 warps
//!   of 32 rows and a ring of two stages of 32 keys (64 at head_dim 64), with one barrier a pass: the next stage arrives while one
//!   is computed on. 64 KB per CTA at head_dim 128, so that two share an SM where there are 164 KB or more.
//! * Registers: outputs 128 + scores 32 of 255 at head_dim 128; nothing spills on any architecture (tests hold it there).
//! * A mask row is read once into shared memory as bits; every thread walks it, so control flow is uniform.

use calibc_ir::{BLOCK, Family, Variant, abi};
use serde::Serialize;

use crate::{CodegenError, Common, KernelSource, Part, part, spell};

/// What the templates see.
#[derive(Serialize)]
struct KernelCx {
    #[serde(flatten)]
    common: Common,
    block_n: u32,
    warps: u32,
    threads: u32,
    rows_per_warp: u32,
    m_tiles: u32,
    chunks: u32,
    list_rows: u32,
    list_blocks: u32,
}

const ROWS_PER_WARP: u32 = 32;

/// The parts of a variant's source, in order.
fn parts(variant: &Variant) -> [Part; 9] {
    let rows = if variant.anchors { part!("common", "rows_anchors") } else { part!("common", "rows_direct") };
    let place = if abi::tile_blocks(variant.head_dim) > 1 {
        part!("portable", "place_blocks")
    } else {
        part!("portable", "place_tile")
    };
    [
        part!("common", "contract"),
        part!("portable", "prelude"),
        part!("portable", "ptx"),
        rows,
        place,
        part!("portable", "tiles"),
        part!("portable", "softmax"),
        part!("portable", "epilogue"),
        part!("portable", "kernel"),
    ]
}

pub(crate) fn generate(variant: &Variant) -> Result<KernelSource, CodegenError> {
    let (family, parts) = (Family::Portable, parts(variant));
    let common = Common::new(variant, family, BLOCK, &parts);
    let (block_m, row_bytes) = (BLOCK, common.row_bytes);
    // 8 KB of keys and as much of values per stage, whatever the head dimension.
    let keys_per_pass = 4096 / variant.head_dim;
    let warps = block_m / ROWS_PER_WARP;
    let threads = warps * 32;
    let symbol = common.symbol.clone();
    let cx = KernelCx {
        common,
        block_n: keys_per_pass,
        warps,
        threads,
        rows_per_warp: ROWS_PER_WARP,
        m_tiles: ROWS_PER_WARP / 16,
        chunks: row_bytes / 16,
        list_rows: abi::tile_rows(variant.head_dim),
        list_blocks: abi::tile_blocks(variant.head_dim),
    };
    let text = spell(variant, family, &parts, &cx)?;
    let shared_bytes = (block_m + 4 * keys_per_pass) * row_bytes;
    Ok(KernelSource { variant: *variant, family, symbol, text, threads, shared_bytes })
}
