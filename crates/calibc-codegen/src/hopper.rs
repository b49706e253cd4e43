//! The Hopper kernel.
//!
//! `wgmma`, TMA and mbarriers: sm_90a alone. Persistent: each SM runs one CTA, which walks its share of the work list. In warpgroup 0
//! one warp looks up what comes next, and three load Q once per item, and K and V blocks through two rings. Each of the
//! other warpgroups, two at head_dim 128 and three at 64, computes 64 query rows, with scores, weights and outputs in registers.
//!
//! * Numbers: at head_dim 128 a pass over 128 keys does 8.4 MFLOP for 64 KB of K and V: 1 byte of L2 traffic per 128 FLOP. Matrix
//!   instructions need 2,048 cycles of the SM for it, the 16,384 exponentials 1,024: both must overlap.
//! * Loads cost power, and the GPU runs at its limit: half of them left out, for a trial, made the kernel 6 % faster at head_dim 128 and 5 % at
//!   64. So two CTAs on neighbouring SMs, a cluster, compute two tiles of a head that keep much the same (the scheduler pairs them), and
//!   a block that both keep is loaded once, half by each CTA, to both. Both begin these blocks together; the order of a tile's
//!   other blocks is free, so whoever got less to do since the last time does more of them before, and nobody waits for tiles of other
//!   lengths. Measured: 5 % faster where all blocks are kept; even at density 0.25 of banded masks, where tiles have three quarters in
//!   common: waiting for each other costs what the loads save. So they share from [`SHARE_FROM`] sixteenths on.
//! * Overlap: the scores of a block and the weighted sum of the one before are issued together; while one warpgroup weighs, others multiply.
//!   Softmax begins when both products are done, so that weights go where the next sum reads them: under the sum they need other
//!   registers, and 32 moves a pass. Measured: 0 to 1 % faster at head_dim 128; for 64 see "Wide tiles".
//! * Weights are relative to the maximum of a row's first block, not of all blocks so far: each pass saves a maximum per score, the
//!   shuffles and the rescaling. bfloat16 and single precision keep their relative precision at any scale, so that nothing is lost
//!   while sums stay finite. A weight of [`weight_limit`] or more (scores 41 nats above that maximum, 9 in fp16), or NaN, is
//!   caught by a vote before anything is added: the scores are computed again from shared memory, where their keys still are, the
//!   maximum is raised and the sums shrink. Measured: 9 % at head_dim 128, 14 % at 64; the GPU runs at its power limit, and work
//!   left out is power for the products.
//! * What all lanes of a warp have alike (numbers of blocks, the warpgroup's place) comes out of a reduction, so that the compiler knows: loops
//!   are uniform, and positions, addresses and descriptors stay in uniform registers, where 16 (32 at head_dim 64) moves between the products
//!   of a pass would put them. Maxima are kept times the scale, two multiplications and two registers less. Measured together: 2.4 to 2.9 % at
//!   head_dim 128 (40 x 32,760, density 0.1 and 0.25).
//! * Sums of weights are products, too: eight columns of ones follow the values, a panel of them in every stage. It saves an addition
//!   per score and widens a product by 6 to 12 %; the check above takes one instruction for four packed weights. Measured: 4 to 5 %
//!   at both head_dims. These are sums of rounded weights, as the outputs are: where sums leave the kernel (log-sum-exp) they are
//!   added up in single precision as before.
//! * A last round of CTAs that few tiles fill takes as long as a whole one: where all tiles of a layer are of one length (dense and
//!   anchor heads) its tiles are computed in parts along the keys, and whichever CTA is last adds them up (`templates/hopper/parts`).
//!   Lists of differing lengths are evened out by the scheduler.
//! * Registers at head_dim 128: 384 threads share 65,536. `setmaxnreg` leaves 56 to the loading warpgroup (at 24 and 32 its walk over the mask row
//!   spills, at 40 that over a part of it) and gives 224 to the computing ones: outputs 68 + scores 64 + weights 32. The look-up warp alone
//!   walks the work list, and tells the others when there is no more: what they all knew of it would cost each of them registers.
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
//!   head_dim 64 (even, and with two warpgroups so is any order of products and exponentials there: turns, a head start for one
//!   warpgroup, exponentials forced under the weighted sum); at head_dim 128 exponentials forced under the sum (0 to 1 % faster, or dense 5 %
//!   slower where values are then waited for early) and turns (even); part of the exponentials by a polynomial (0 to 4 % slower: power
//!   again); sums added up in single precision where products can (0 to 3 % slower); four computing warpgroups with
//!   passes of 64 keys at head_dim 64 (7 % slower: registers allow no more, and each pass has a fixed price in power).
//!
//! # Wide tiles
//!
//! At head_dim 64 a tile has 192 rows. Outputs are half as large as at head_dim 128, so that a third warpgroup has room, and what is loaded
//! serves half as many rows again. Masks have rows of 128, so a tile has strips of two query blocks, 2 : 1 or 1 : 2.
//!
//! * What either query block keeps is loaded, in an order that numbers describe: a ragged block, blocks that both keep, then blocks that one
//!   keeps, one of the first and one of the second in turn, then the rest of the longer. A warpgroup passes over blocks not its own, and gives
//!   them back once they are there: it waits for every round of every stage, as else a later one could be taken for it. Between two of its
//!   own there is at most one of them, which is waited for under the products of the second.
//! * The warpgroups take turns: each issues its products when the one before it has issued its own. So products follow one another, where
//!   three at once would all be late, and then all weigh at once. All have the same number of turns: at blocks that both query blocks keep,
//!   and at as many that one keeps as both have.
//! * Nobody waits for ever. A turn comes from somebody at an earlier block or at the same; so whoever is furthest behind waits, at block n, for
//!   keys n + 1 and values n at most. Their stages are empty once all have given back keys n - 4 and values n - 5, and nobody who is at n or
//!   later holds keys below n - 1 or values below n - 3.
//! * Two stages of queries, so that warpgroups need not wait for each other between tiles, five of K and of V (226 KB). One panel of ones
//!   serves all stages of V: the operand has two panels, and their distance is a field of its descriptor.
//! * Registers: 32 for the loading warpgroup, 160 for the computing ones. So of a tile little is kept over its passes; the rest is read again
//!   from shared memory, and the work is given back at the end. The loading warps walk a mask row by what is left of it.
//!
//! Measured on an H200 (700 W), 40 x 32,760, banded masks and, last, random ones, TFLOP/s on kept blocks (`calibc bench`), first and last row in
//! one run, steps in others, of the row above. Clocks differ by 2 to 3 % from machine to machine:
//!
//! | | 1 | 0.5 | 0.25 | 0.1 | 0.25, random |
//! |---|---|---|---|---|---|
//! | one stage of queries, softmax under the sum, no turns | 567 | 548 | 524 | 484 | 500 |
//! | two stages of queries | +1.9 % | +1.8 % | +2.5 % | +3.4 % | +3.7 % |
//! | softmax after the sum | +1.2 % | -1.3 % | -1.8 % | -1.7 % | +1.3 % |
//! | turns at blocks that both keep; waits for passed-over ones under the products | +1.0 % | +4.7 % | +7.1 % | +8.8 % | +0.7 % |
//! | turns at blocks that one keeps | 0 | 0 | +0.7 % | +0.5 % | +3.5 % |
//! | now | 593 | 582 | 572 | 541 | 550 |
//!
//! In an earlier run tiles of 128 rows made 530, 528, 530 and 512 where wide ones made 578, 560, 535 and 493.
//! Tried and left out: turns at every block, passed-over ones included (random 14 % slower); the turn passed on between the two products (11 %
//! slower), two instructions early (2 %), or when they are done (2 % and more); softmax under the sum with turns (dense 7 % slower, 0.25 4 %);
//! weights checked before they are packed (without turns 2 % faster at 0.25, dense 2 % slower); loops of their own for blocks that both keep
//! (even); a tag beside each stage of keys that says who keeps it, in place of the order (even on banded masks, 7 % slower on random ones);
//! loading for both CTAs of a cluster (dense 500 instead of 563 TFLOP/s; with four stages of each 538).
//!
//! What limits: in one launch, all blocks kept, the tensor cores are busy 75 % of the time and the special function units 71 % (ncu, 1.76 GHz);
//! in a benchmark the GPU is at its power limit besides.

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
    /// Stages of queries, of keys and of values.
    stages: [u32; 3],
    /// Shared memory for barriers and the work handed over.
    barrier_bytes: u32,
}

impl Shape {
    const fn of(tile_rows: u32) -> Self {
        if tile_rows > BLOCK {
            Self { computing: "three", registers: (32, 160), stages: [2, 5, 5], barrier_bytes: 1536 }
        } else {
            Self { computing: "two", registers: (56, 224), stages: [1, 3, 2], barrier_bytes: 1280 }
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
    query_stages: u32,
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
fn parts(variant: &Variant) -> Vec<Part> {
    let (rows, queries) = if variant.anchors {
        (part!("common", "rows_anchors"), part!("hopper", "queries_gathered"))
    } else {
        (part!("common", "rows_direct"), part!("hopper", "queries_direct"))
    };
    let (work, compute) = if abi::tile_rows(variant.head_dim) > BLOCK {
        (part!("hopper", "work_rows"), part!("hopper", "compute_rows"))
    } else {
        (part!("hopper", "work_row"), part!("hopper", "compute_row"))
    };
    vec![
        part!("common", "contract"),
        part!("hopper", "prelude"),
        part!("hopper", "ptx"),
        rows,
        part!("hopper", "walk"),
        work,
        part!("hopper", "load_queries"),
        queries,
        part!("hopper", "softmax"),
        part!("hopper", "parts"),
        part!("hopper", "epilogue"),
        part!("hopper", "passes"),
        compute,
        part!("hopper", "kernel"),
    ]
}

pub(crate) fn generate(variant: &Variant) -> Result<KernelSource, CodegenError> {
    let (family, parts, tile_rows) = (Family::Hopper, parts(variant), abi::tile_rows(variant.head_dim));
    let common = Common::new(variant, family, tile_rows, &parts);
    let tile_bytes = BLOCK * common.row_bytes;
    let Shape { computing, registers, stages: [query_stages, key_stages, value_stages], barrier_bytes } =
        Shape::of(tile_rows);
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
        query_stages,
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
    let query_bytes = query_stages * tile_rows * variant.head_dim * 2;
    let shared_bytes = query_bytes + (key_stages + value_stages) * tile_bytes + ones_bytes + barrier_bytes;
    Ok(KernelSource { variant: *variant, family, symbol, text, threads, shared_bytes })
}
