//! The Hopper kernel.
//!
//! `wgmma`, TMA and mbarriers: sm_90a alone. Persistent: each SM runs one CTA, which walks its share of the work list. Warpgroup 0
//! loads, one thread of it: Q once per item, then K and V blocks through two rings, in the order in which the mask row keeps them.
//! Each other warpgroup computes 64 query rows, scores and outputs in registers.
//!
//! * Numbers: at head_dim 128 a pass over 128 keys does 8.4 MFLOP for 64 KB of K and V: 1 byte of L2 traffic per 128 FLOP.
//! * Registers: 384 threads share 65,536. The loading warpgroup gives its registers to the computing ones (`setmaxnreg`): 24 and
//!   240, 64,512 in all.
//! * Shared memory: one Q tile, which later holds the outputs, the two rings, and room for the barriers. Tiles are what one TMA box
//!   fills: 64-column panels of 128 rows of 128 bytes, swizzled, each at a multiple of 1 KB.

use calibc_ir::{BLOCK, Family, Variant, abi};
use serde::Serialize;

use crate::{CodegenError, Common, KernelSource, Part, part, spell};

/// Warpgroups that compute, of 64 query rows each.
const CONSUMERS: u32 = 2;
/// Threads of a warpgroup.
const WARPGROUP: u32 = 128;
/// Registers of a thread of the warpgroup that loads.
const PRODUCER_REGISTERS: u32 = 24;
/// Registers of a thread of a warpgroup that computes.
const CONSUMER_REGISTERS: u32 = 240;
/// Shared memory for barriers.
const BARRIER_BYTES: u32 = 1024;

/// K and V tiles in flight, by head dimension.
fn stages(head_dim: u32) -> [u32; 2] {
    if head_dim == 64 { [4, 4] } else { [2, 2] }
}

/// What the templates see.
#[derive(Serialize)]
struct KernelCx {
    #[serde(flatten)]
    common: Common,
    /// Names of the tensor maps, in the order of the parameters.
    tensor_maps: &'static [&'static str],
    tensor_map_bytes: u32,
    tensor_map_align: u32,
    /// Query rows of a tile.
    block_m: u32,
    /// Keys of a tile.
    block_n: u32,
    threads: u32,
    consumers: u32,
    producer_registers: u32,
    consumer_registers: u32,
    /// 64-column panels of a tile.
    panels: u32,
    /// One panel of a tile of 128 rows, in bytes.
    panel_bytes: u32,
    /// The Q tile, in bytes.
    q_bytes: u32,
    /// One K or V tile, in bytes.
    tile_bytes: u32,
    k_stages: u32,
    v_stages: u32,
    barrier_bytes: u32,
    /// All of it: Q, K ring, V ring, barriers.
    shared_bytes: u32,
}

/// The parts of a variant's source, in order.
fn parts(variant: &Variant) -> [Part; 8] {
    let rows = if variant.anchors { part!("hopper", "rows_anchors") } else { part!("hopper", "rows_direct") };
    [
        part!("hopper", "prelude"),
        part!("hopper", "ptx"),
        rows,
        part!("hopper", "loads"),
        part!("hopper", "products"),
        part!("hopper", "softmax"),
        part!("hopper", "epilogue"),
        part!("hopper", "kernel"),
    ]
}

pub(crate) fn generate(variant: &Variant) -> Result<KernelSource, CodegenError> {
    let (family, parts) = (Family::Hopper, parts(variant));
    let common = Common::new(variant, family, &parts);
    let (block_m, block_n) = (BLOCK, abi::TENSOR_MAP_TOKENS);
    let [k_stages, v_stages] = stages(variant.head_dim);
    let (q_bytes, tile_bytes) = (block_m * common.row_bytes, block_n * common.row_bytes);
    let shared_bytes = q_bytes + (k_stages + v_stages) * tile_bytes + BARRIER_BYTES;
    let threads = (1 + CONSUMERS) * WARPGROUP;
    let symbol = common.symbol.clone();
    let cx = KernelCx {
        common,
        tensor_maps: abi::TENSOR_MAPS,
        tensor_map_bytes: abi::TENSOR_MAP_BYTES,
        tensor_map_align: abi::TENSOR_MAP_ALIGN,
        block_m,
        block_n,
        threads,
        consumers: CONSUMERS,
        producer_registers: PRODUCER_REGISTERS,
        consumer_registers: CONSUMER_REGISTERS,
        panels: variant.head_dim / abi::TENSOR_MAP_COLUMNS,
        panel_bytes: block_n * abi::TENSOR_MAP_COLUMNS * 2,
        q_bytes,
        tile_bytes,
        k_stages,
        v_stages,
        barrier_bytes: BARRIER_BYTES,
        shared_bytes,
    };
    let text = spell(variant, family, &parts, &cx)?;
    Ok(KernelSource { variant: *variant, family, symbol, text, threads, shared_bytes })
}
