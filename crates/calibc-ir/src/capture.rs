//! What capture kernels and the runtime agree on: the parameter struct of a launch, and which query rows stand for a block.
//!
//! ```text
//! portable   kernel(const __grid_constant__ Params p)
//! hopper     kernel(const __grid_constant__ Params p, const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map)
//! grid = (ceil(q_blocks * rows_per_block / 128), heads, 1)      block = the kernel's threads      dynamic shared memory = the kernel's
//! ```
//!
//! Tensor maps are those of [`crate::abi`]. Outputs are `[heads, q_blocks, kv_blocks]`, contiguous, every element written.
//!
//! # Which rows
//!
//! A block of n rows is cut into `rows_per_block` equal strata, and one row is drawn in each: every row is equally likely (to
//! 2^-16), so means over the sample are unbiased, and closer than with rows drawn anywhere. Where `rows_per_block` is n or more,
//! all n rows are used, once. The draw is a hash of seed, head, query block and slot: the same everywhere, another one per head.

use crate::abi::Scalar;
use crate::geometry::BLOCK;

/// Query rows of a block that a capture may use: a warp holds 16, a launch no more than a block.
pub const ROWS_PER_BLOCK: [u32; 4] = [16, 32, 64, 128];

/// Query rows of a CTA.
pub const TILE_ROWS: u32 = 128;

/// Fields of the parameter struct in order, as [`crate::abi::PARAMS`]. One batch element; strides count elements.
/// `scale_log2` = softmax scale * log2(e).
pub const PARAMS: &[(&str, Scalar)] = &[
    ("q", Scalar::Ptr),
    ("k", Scalar::Ptr),
    ("v", Scalar::Ptr),
    ("out", Scalar::Ptr),
    ("lse", Scalar::Ptr),
    ("energy", Scalar::Ptr),
    ("deviation", Scalar::Ptr),
    ("q_head_stride", Scalar::I64),
    ("q_token_stride", Scalar::I64),
    ("k_head_stride", Scalar::I64),
    ("k_token_stride", Scalar::I64),
    ("v_head_stride", Scalar::I64),
    ("v_token_stride", Scalar::I64),
    ("out_head_stride", Scalar::I64),
    ("out_token_stride", Scalar::I64),
    ("lse_head_stride", Scalar::I64),
    ("seed_low", Scalar::U32),
    ("seed_high", Scalar::U32),
    ("q_len", Scalar::U32),
    ("kv_len", Scalar::U32),
    ("num_q_blocks", Scalar::U32),
    ("num_kv_blocks", Scalar::U32),
    ("rows_per_block", Scalar::U32),
    ("scale_log2", Scalar::F32),
];

/// The hash's mixing step: a bijection of 32 bits (MurmurHash3's finaliser after a Weyl increment).
fn mix(x: u32) -> u32 {
    let mut x = x.wrapping_add(0x9e37_79b9);
    x = (x ^ x >> 16).wrapping_mul(0x85eb_ca6b);
    x = (x ^ x >> 13).wrapping_mul(0xc2b2_ae35);
    x ^ x >> 16
}

/// Seed of one attention call, from what names it.
pub fn seed(prompt: &str, step: u32, branch: &str, layer: u32) -> u64 {
    // FNV-1a over the names with their lengths, then two mixes for its halves.
    let words = [prompt.as_bytes(), &[0xff], branch.as_bytes(), &[0xff], &step.to_le_bytes(), &layer.to_le_bytes()];
    let fnv = words
        .concat()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let (low, high) = (fnv as u32, (fnv >> 32) as u32);
    let low = mix(low ^ mix(high));
    u64::from(low) | u64::from(mix(high ^ low)) << 32
}

/// The token at `slot` of the sample of a query block; `None` where the block has fewer rows than slots. `rows_per_block` is one of
/// [`ROWS_PER_BLOCK`], `slot` below it.
pub fn sampled_row(q_len: u32, rows_per_block: u32, seed: u64, head: u32, q_block: u32, slot: u32) -> Option<u32> {
    let first = q_block * BLOCK;
    let rows = q_len.saturating_sub(first).min(BLOCK);
    let row = if rows_per_block >= rows {
        slot
    } else {
        let at = mix(head ^ mix(q_block.wrapping_mul(BLOCK) + slot));
        let draw = mix(seed as u32 ^ mix((seed >> 32) as u32 ^ at));
        (((slot << 16) | (draw >> 16)) * rows) / (rows_per_block << 16)
    };
    (row < rows).then_some(first + row)
}

/// The tokens that stand for each query block, ascending. One may occur twice where the strata are no whole number of rows.
pub fn sampled_rows(q_len: u32, rows_per_block: u32, seed: u64, head: u32) -> Vec<Vec<u32>> {
    (0..q_len.div_ceil(BLOCK))
        .map(|block| {
            (0..rows_per_block).filter_map(|slot| sampled_row(q_len, rows_per_block, seed, head, block, slot)).collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_stratum_gives_one_row() {
        for (head, seed) in [(0, 0), (7, 0x1234_5678_9abc_def0)] {
            for (block, rows) in sampled_rows(75_600, 16, seed, head).iter().enumerate() {
                let n = if block == 590 { 80 } else { 128 };
                assert_eq!(rows.len(), 16);
                for (slot, row) in rows.iter().enumerate() {
                    let at = row - block as u32 * 128;
                    assert_eq!(at as usize * 16 / n, slot, "block {block}, row {row}");
                }
            }
        }
    }

    #[test]
    fn short_blocks_give_every_row_once() {
        for q_len in [1, 15, 16, 128, 130, 300] {
            for per_block in ROWS_PER_BLOCK {
                for (block, rows) in (0..).zip(sampled_rows(q_len, per_block, 3, 1)) {
                    let n = (q_len - block * 128).min(128);
                    assert_eq!(rows.len() as u32, n.min(per_block));
                    assert!(rows.is_sorted() && rows.iter().all(|row| (block * 128..block * 128 + n).contains(row)));
                    if per_block >= n {
                        assert_eq!(rows, (block * 128..block * 128 + n).collect::<Vec<_>>());
                    }
                }
            }
        }
    }

    /// Each row of a ragged block of 80 is drawn about equally often, by head, block and seed alike.
    #[test]
    fn rows_are_equally_likely() {
        let mut counts = [0u32; 80];
        for seed in 0..400 {
            for head in 0..40 {
                for row in &sampled_rows(80, 16, seed, head)[0] {
                    counts[*row as usize] += 1;
                }
            }
        }
        // 3,200 each; the standard deviation of a binomial count is 51.
        assert!(counts.iter().all(|&n| (2950..3450).contains(&n)), "{counts:?}");
        let blocks: BTreeSet<Vec<u32>> = (0..50)
            .map(|block| sampled_rows(50 * 128, 16, 9, 2)[block].iter().map(|row| row % 128).collect())
            .collect();
        assert_eq!(blocks.len(), 50, "every block draws for itself");
    }

    #[test]
    fn seeds_differ_by_every_part_of_the_name() {
        let names = [
            ("p0", 1, "cond", 2),
            ("p1", 1, "cond", 2),
            ("p0", 2, "cond", 2),
            ("p0", 1, "uncond", 2),
            ("p0", 1, "cond", 3),
        ];
        let seeds: BTreeSet<u64> = names.iter().map(|&(p, s, b, l)| seed(p, s, b, l)).collect();
        assert_eq!(seeds.len(), names.len());
    }

    #[test]
    fn fields_are_aligned_without_holes() {
        let mut at = 0;
        for &(name, scalar) in PARAMS {
            assert_eq!(at % scalar.size(), 0, "{name}");
            at += scalar.size();
        }
        assert_eq!(at % 8, 0);
    }
}
