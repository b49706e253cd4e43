//! The Hopper kernel.
//!
//! `wgmma`, TMA and mbarriers: sm_90a alone. Persistent: each SM runs one CTA, which walks its share of the work list. In warpgroup 0
//! one warp looks up what comes next, and three load Q once per item, and K and V blocks through two rings. Each of the
//! other two warpgroups computes 64 query rows, with scores, weights and outputs in registers.
//!
//! * Numbers: at head_dim 128 a pass over 128 keys does 8.4 MFLOP for 64 KB of K and V: 1 byte of L2 traffic per 128 FLOP. Matrix
//!   instructions need 2,048 cycles of the SM for it, the 16,384 exponentials 1,024: both must overlap.
//! * Loads cost power, and the GPU runs at its limit: half of them left out, for a trial, made the kernel 6 % faster at head_dim 128 and 5 % at
//!   64. So two CTAs on neighbouring SMs, a cluster, compute two tiles of a head that keep much the same (the scheduler pairs them), and
//!   a block that both keep is loaded once, half by each CTA, to both. Both begin these blocks together; the order of a tile's
//!   other blocks is free, so whoever got less to do since the last time does more of them before, and nobody waits for tiles of other
//!   lengths. Measured: 5 % faster where all blocks are kept; even at density 0.25 of banded masks, where tiles have three quarters in
//!   common: waiting for each other costs what the loads save. So they share from [`SHARE_FROM`] sixteenths on.
//! * Overlap: the scores of a block and the weighted sum of the one before are issued together, and softmax runs under the latter;
//!   while one warpgroup weighs, the other multiplies. Taking turns by named barriers brought nothing more (0 to 3 % slower).
//! * Weights are relative to the maximum of a row's first block, not of all blocks so far: each pass saves a maximum per score, the
//!   shuffles and the rescaling. bfloat16 and single precision keep their relative precision at any scale, so that nothing is lost
//!   while sums stay finite. A weight of [`weight_limit`] or more (scores 41 nats above that maximum, 9 in fp16), or NaN, is
//!   caught by a vote before anything is added: the scores are computed again from shared memory, where their keys still are, the
//!   maximum is raised and the sums shrink. Measured: 9 % at head_dim 128, 14 % at 64; the GPU runs at its power limit, and work
//!   left out is power for the products.
//! * Sums of weights are products, too: eight columns of ones follow the values, a panel of them in every stage. It saves an addition
//!   per score and widens a product by 6 to 12 %; the check above takes one instruction for four packed weights. Measured: 4 to 5 %
//!   at both head_dims. These are sums of rounded weights, as the outputs are: where sums leave the kernel (log-sum-exp) they are
//!   added up in single precision as before.
//! * A last round of CTAs that few tiles fill takes as long as a whole one: where all tiles of a layer are of one length (dense and
//!   anchor heads) its tiles are computed in parts along the keys, and whichever CTA is last adds them up (`templates/hopper/parts`).
//!   Lists of differing lengths are evened out by the scheduler.
//! * Registers: 384 threads share 65,536. `setmaxnreg` leaves 56 to the loading warpgroup (at 24 and 32 its walk over the mask row
//!   spills, at 40 that over a part of it) and gives 224 to the computing ones: outputs 68 + scores 64 + weights 32. A second set of
//!   weights, to round them before the products are done, would spill.
//! * Only the first pass, which is peeled, can end inside a block: each run of a mask row is walked from its last block down, and a ragged
//!   block is never shared, so that it comes first.
//! * Outputs go from registers to global memory, transposed within quads to 16-byte stores: no shared memory, so the next tile's
//!   queries load meanwhile, and anchor rows are copied to wherever they go by the same code.
//! * At head_dim 128 three stages of K and two of V (224 KB with the ones). K is held until its weights were checked, and a stage for both
//!   CTAs has to be empty in both: with two, sharing made the kernel 3 to 6 % slower. K and V have a warp each, so that neither waits
//!   for the other's.
//! * Handing out work by an atomic counter was 5 to 10 % slower at head_dim 128 than each CTA's fixed share, which the scheduler makes
//!   even.
//! * Tried and left out: the tiles of a CTA as one stream of blocks, whose first scores hide the last tile's end (10 to 15 % slower:
//!   its branches keep softmax from running under the products); queries in registers (even); scores of two blocks in flight at
//!   head_dim 64 (even, and so is any order of products and exponentials there: turns, a head start for one warpgroup, exponentials forced
//!   under the weighted sum); part of the exponentials by a polynomial (0 to 4 % slower: power again); four computing warpgroups with
//!   passes of 64 keys at head_dim 64 (7 % slower: registers allow no more, and each pass has a fixed price in power).
//!
//! # Wide tiles
//!
//! Kernels for tiles of 192 rows at head_dim 64, off until they have run on a GPU (the feature `wide-tiles` of `calibc-ir`; tests compile
//! them). An experiment whose masks had rows of 192 queries, too, made 549 TFLOP/s where tiles of 128 made 491 (40 x 32,760, density 0.25),
//! and 575 to 584 where they made 522 to 526 (dense; FA3 537), hot.
//!
//! * Outputs are half as large as at head_dim 128, so that a third warpgroup has room, and what is loaded serves half as many rows again.
//!   Masks have rows of 128, so a tile has strips of two query blocks, 2 : 1 or 1 : 2. What either keeps is loaded, with a tag beside each
//!   stage of keys that says who does; a warpgroup passes over the rest.
//! * Passing over blocks: weights may wait for the next block their rows keep, with the stage of values they need, over one block, so that
//!   they are still added up under other scores; at a second they are added up at once. So of all warpgroups the one furthest behind always
//!   goes on: at block n it waits for keys n or values n at most, whose stages are empty once all have given back blocks n - 5; the others
//!   are at n or later, and hold no stage of keys below n, nor of values below n - 2. (Were weights to wait for any number of blocks, the
//!   ring of values would fill up and nothing would arrive.) Stages of values that are passed over are given back in order and once they
//!   are full, so that an arrival never counts for the round before. A simulation of all barriers under random schedules, of two CTAs that
//!   share blocks, found no deadlock in this, and no arrival in a wrong round; the text, run under an emulation of barriers, copies and
//!   products, computes what it should.
//! * The same simulation says of anchor rows, whose tiles do not wait for the warp that loads queries: were that warp not to run for
//!   a whole tile, it could miss two rounds of `q_empty`. Warps are scheduled more often than that; waiting for it there, too, would rule it out.
//! * Six stages of K and five of V (219 KB): warpgroups may be so many blocks apart, and they drift where they keep different ones. One
//!   panel of ones serves all stages: the operand has two panels, and their distance is a field of its descriptor.
//! * Registers: 32 for the loading warpgroup, 160 for the computing ones. So of a tile nothing but the count of blocks is kept over its
//!   passes; the rest is read again from shared memory, and the work is given back at the end. The loading warps walk a mask row by
//!   what is left of it and keep no addresses.
//! * The pass that only computes scores is the first one, and each one after a break; it raises the maximum.

use calibc_ir::{BLOCK, DType, Family, Variant, abi};
use serde::Serialize;

use crate::{CodegenError, Common, KernelSource, Part, part, spell};

/// Rows of a warpgroup.
const WARPGROUP_ROWS: u32 = 64;
/// Threads of a warpgroup.
const WARPGROUP_THREADS: u32 = 128;
/// What a part of a tile costs beside its keys (queries, first and last pass, accumulators to memory and back), in key blocks.
const PART_COST: u32 = 4;
/// What two tiles must have in common to be loaded for both, in sixteenths of the longer row.
const SHARE_FROM: u32 = 14;
/// Columns of ones after the values: the least that a product's width grows by.
const SUM_COLUMNS: u32 = 8;
/// Bytes of a row of a panel: what the swizzle spans.
const PANEL_ROW_BYTES: u32 = 128;

/// What a weight must stay below, in bits of `dtype`: far from where sums of all blocks times values overflow in single precision,
/// and from where weights overflow `dtype`.
const fn weight_limit(dtype: DType) -> &'static str {
    match dtype {
        DType::Bf16 => "0x5d80 /* 2^60 */",
        DType::Fp16 => "0x7400 /* 2^14 */",
    }
}

/// What follows from the number of query rows of a tile.
struct Shape {
    /// Warpgroups that compute, in words.
    computing: &'static str,
    /// Registers of a thread of the warpgroup that loads, and of one that computes.
    registers: (u32, u32),
    /// Stages of keys and of values.
    stages: (u32, u32),
    /// Shared memory for barriers and the work handed over.
    barrier_bytes: u32,
}

impl Shape {
    const fn of(tile_rows: u32, head_dim: u32) -> Self {
        if tile_rows > BLOCK {
            Self { computing: "three", registers: (32, 160), stages: (6, 5), barrier_bytes: 2560 }
        } else {
            let stages = if head_dim == 64 { (4, 4) } else { (3, 2) };
            Self { computing: "two", registers: (56, 224), stages, barrier_bytes: 1280 }
        }
    }
}

/// What the templates see.
#[derive(Serialize)]
struct KernelCx {
    #[serde(flatten)]
    common: Common,
    computing: &'static str,
    threads: u32,
    key_stages: u32,
    value_stages: u32,
    barrier_bytes: u32,
    share_from: u32,
    weight_limit: &'static str,
    sum_columns: u32,
    value_columns: u32,
    ones: u32,
    producer_registers: u32,
    consumer_registers: u32,
    part_cost: u32,
    max_parts: u32,
    slots_per_cta: u32,
    tensor_map_bytes: u32,
    tensor_map_align: u32,
    /// Accumulators of a thread, and what comes after them in the operand list of a product.
    score_regs: Vec<u32>,
    out_regs: Vec<u32>,
    weight_operands: Vec<u32>,
    value_operand: u32,
}

/// The parts of a variant's source, in order.
fn parts(variant: &Variant, tile_rows: u32) -> Vec<Part> {
    let (rows, queries) = if variant.anchors {
        (part!("common", "rows_anchors"), part!("hopper", "queries_gathered"))
    } else {
        (part!("common", "rows_direct"), part!("hopper", "queries_direct"))
    };
    let (work, compute): (&[Part], Part) = if tile_rows > BLOCK {
        (&[part!("hopper", "work_rows"), part!("hopper", "load_rows")], part!("hopper", "compute_rows"))
    } else {
        (&[part!("hopper", "work_row")], part!("hopper", "compute_row"))
    };
    let mut parts = vec![
        part!("common", "contract"),
        part!("hopper", "prelude"),
        part!("hopper", "ptx"),
        rows,
        part!("hopper", "walk"),
    ];
    parts.extend(work);
    parts.extend([
        part!("hopper", "load_queries"),
        queries,
        part!("hopper", "softmax"),
        part!("hopper", "parts"),
        part!("hopper", "epilogue"),
        compute,
        part!("hopper", "kernel"),
    ]);
    parts
}

pub(crate) fn generate(variant: &Variant, tile_rows: u32) -> Result<KernelSource, CodegenError> {
    let (family, parts) = (Family::Hopper, parts(variant, tile_rows));
    let common = Common::new(variant, family, tile_rows, &parts);
    let tile_bytes = BLOCK * common.row_bytes;
    let Shape { computing, registers, stages: (key_stages, value_stages), barrier_bytes } =
        Shape::of(tile_rows, variant.head_dim);
    let threads = WARPGROUP_THREADS * (1 + tile_rows / WARPGROUP_ROWS);
    let symbol = common.symbol.clone();
    let sum_columns = if variant.lse { 0 } else { SUM_COLUMNS };
    let value_columns = variant.head_dim + sum_columns;
    // An operand has one distance between its panels: where those of values are one, that of ones may lie anywhere behind it.
    let ones = if tile_rows > BLOCK { 1 } else { value_stages };
    // A thread holds half a row of accumulators: 64 rows of a warpgroup over 128 threads.
    let (scores, outs) = (BLOCK / 2, value_columns / 2);
    let cx = KernelCx {
        common,
        computing,
        threads,
        key_stages,
        value_stages,
        barrier_bytes,
        share_from: SHARE_FROM,
        weight_limit: weight_limit(variant.dtype),
        sum_columns,
        value_columns,
        ones,
        producer_registers: registers.0,
        consumer_registers: registers.1,
        part_cost: PART_COST,
        max_parts: abi::MAX_PARTS,
        slots_per_cta: abi::SLOTS_PER_CTA,
        tensor_map_bytes: abi::TENSOR_MAP_BYTES,
        tensor_map_align: abi::TENSOR_MAP_ALIGN,
        score_regs: (0..scores).collect(),
        out_regs: (0..outs).collect(),
        weight_operands: (outs..outs + 4).collect(),
        value_operand: outs + 4,
    };
    let text = spell(variant, family, &parts, &cx)?;
    let ones_bytes = if sum_columns > 0 { ones * BLOCK * PANEL_ROW_BYTES } else { 0 };
    let query_bytes = tile_rows * variant.head_dim * 2;
    let shared_bytes = query_bytes + (key_stages + value_stages) * tile_bytes + ones_bytes + barrier_bytes;
    Ok(KernelSource { variant: *variant, family, symbol, text, threads, shared_bytes })
}
