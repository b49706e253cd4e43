//! The launch contract between generated kernels and the runtime: one parameter struct, passed by value, and the tables it
//! points to. Code generation spells the struct from [`PARAMS`]; the runtime fills the same layout; a bundle carries
//! [`describe`] and is refused where it differs.
//!
//! ```text
//! steps[step] -> StepTable { lists, items, ops, masks }
//!   lists[layer] = { begin, count }       items of this layer, in execution order; count may carry SPLIT_TAIL
//!   items[begin + i] = head << 16 | tile
//!   ops[layer * heads + head] = OP_DENSE | OP_ANCHORS | mask index
//!   masks + mask * q_blocks * words_per_row + tile * words_per_row    -> bit row over kv blocks
//! ```
//!
//! Tile `t` is rows `t * tile_rows` on, of the sequence or, of an anchor head, of the computed queries ([`tile_rows`]). That is a query block;
//! at head_dim 64 one and a half, so that tiles 2n and 2n + 1 are three query blocks, of which each has one of its own and half of the one
//! between.
//!
//! A step at or past `num_steps` writes nothing. Every CTA reads the list's count itself: the launch only knows a bound where the
//! step is in device memory. `bound` is the count of a step known on the host, else that of the layer's longest list over all steps.
//!
//! # Portable kernels
//!
//! ```text
//! kernel(const __grid_constant__ Params p)
//! grid = (bound * tile_blocks, batch, 1)      block = the kernel's threads      dynamic shared memory = the kernel's + one mask row
//! ```
//!
//! CTA (i, b) computes, of batch element b and item i / tile_blocks, query block i % tile_blocks of those that begin in the tile
//! ([`tile_blocks`]); it does nothing where there is no such item or block.
//!
//! # Hopper kernels
//!
//! ```text
//! kernel(const __grid_constant__ Params p, const __grid_constant__ TensorMap q_map, ... k_map, ... v_map)
//! grid = (min(bound * batch, SMs), 1, 1), even      block = the kernel's threads      dynamic shared memory = the kernel's, exactly
//! clusters of 2 CTAs, which the kernel's code asks for
//! ```
//!
//! Persistent: CTA c computes work c, c + grid, ... below count * batch; work w is item w % count of batch element w / count. The
//! runtime keeps bound * batch below 2^31. Works 2n and 2n + 1 are those of a cluster: where they are tiles of one head, the blocks that
//! both keep may be loaded once for both.
//!
//! A list whose count carries [`SPLIT_TAIL`] has tiles of one length, and its last round of CTAs may be far from full. The tiles of
//! that round are then computed in parts, each by a CTA of its own over a share of the keys: the kernel chooses their number so that
//! the round ends soonest, at most [`MAX_PARTS`] of a tile and [`SLOTS_PER_CTA`] * grid in all. A part leaves its accumulators in a
//! slot of `partials`, and of each warp the one that arrives last, by the counter of its tile and warp in `arrivals`, adds them up
//! in the order of the keys: the same bits whoever comes last. It also sets the counter back to 0, as it was found. `partials` holds
//! [`SLOTS_PER_CTA`] * SMs slots of [`slot_bytes`], `arrivals` [`warps`] counters of each of as many tiles as there are SMs; no two
//! launches that may run at the same time share them.
//!
//! A `TensorMap` is the driver's tensor map, [`TENSOR_MAP_BYTES`] opaque bytes aligned to [`TENSOR_MAP_ALIGN`]. The three are made
//! alike, of the launch's own tensors, lengths included:
//!
//! ```text
//! element         bfloat16 or float16      rank 5, innermost first
//! dims            { 64, tokens, head_dim / 64, heads, batch }
//! byte strides    { token_stride * 2, 128, head_stride * 2, batch_stride * 2 }     any legal one where the dimension is 1
//! box             half a block: { 64, 128, 1, 1, 1 } of head_dim 128, { 64, 64, 1, 1, 1 } of 64      element strides 1
//! no interleave, 128-byte swizzle, 256-byte L2 promotion, zeros where the box leaves the tensor
//! ```

use crate::BLOCK;

/// Version of everything on this page.
pub const ABI_VERSION: u32 = 5;

/// `ops` word of a dense head.
pub const OP_DENSE: u32 = u32::MAX;

/// `ops` word of a head computed at anchor rows. Any other word is the index of a mask.
pub const OP_ANCHORS: u32 = u32::MAX - 1;

/// Flag in a work list's count: its tiles are all of one length, so that splitting those of a short last round pays.
pub const SPLIT_TAIL: u32 = 1 << 31;

/// Most parts of a tile.
pub const MAX_PARTS: u32 = 32;

/// Parts that are computed at most, per CTA of the launch.
pub const SLOTS_PER_CTA: u32 = 2;

/// Query rows of a tile. A Hopper CTA at head_dim 64 has room for a third warpgroup that reads what is loaded once.
pub const fn tile_rows(head_dim: u32) -> u32 {
    if head_dim <= 64 { BLOCK / 2 * 3 } else { BLOCK }
}

/// Query blocks that begin in a tile, at most: CTAs that portable kernels take for one.
pub const fn tile_blocks(head_dim: u32) -> u32 {
    tile_rows(head_dim).div_ceil(BLOCK)
}

/// Warps of a Hopper kernel that compute, 16 rows of a tile each.
pub const fn warps(head_dim: u32) -> u32 {
    tile_rows(head_dim) / 16
}

/// Bytes of a part's accumulators: of each computing thread half a row of outputs and sums, and two maxima and sums, in single precision.
pub const fn slot_bytes(head_dim: u32) -> u32 {
    ((head_dim + 8) / 2 + 4) * warps(head_dim) * 32 * 4
}

/// Type of one parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scalar {
    /// A device address.
    Ptr,
    /// Signed 64-bit.
    I64,
    /// Unsigned 32-bit.
    U32,
    /// 32-bit float.
    F32,
}

impl Scalar {
    /// Size and alignment in bytes.
    pub const fn size(self) -> u32 {
        match self {
            Self::Ptr | Self::I64 => 8,
            Self::U32 | Self::F32 => 4,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Ptr => "ptr",
            Self::I64 => "i64",
            Self::U32 => "u32",
            Self::F32 => "f32",
        }
    }
}

/// Fields of the parameter struct in order, each aligned to its size: 8-byte fields first, so that there are no holes between
/// them; the end is padded to [`PARAMS_BYTES`].
///
/// Strides count elements. `lse` and `step_ptr` may be null. `anchor_*` is the [`crate::AnchorTable`] of the plan, null
/// without anchor heads. `scale_log2` = softmax scale * log2(e). `partials` and `arrivals` are null where no list of the launch carries
/// [`SPLIT_TAIL`].
pub const PARAMS: &[(&str, Scalar)] = &[
    ("q", Scalar::Ptr),
    ("k", Scalar::Ptr),
    ("v", Scalar::Ptr),
    ("out", Scalar::Ptr),
    ("lse", Scalar::Ptr),
    ("step_ptr", Scalar::Ptr),
    ("steps", Scalar::Ptr),
    ("anchor_queries", Scalar::Ptr),
    ("anchor_copy_ptr", Scalar::Ptr),
    ("anchor_copies", Scalar::Ptr),
    ("partials", Scalar::Ptr),
    ("arrivals", Scalar::Ptr),
    ("q_batch_stride", Scalar::I64),
    ("q_head_stride", Scalar::I64),
    ("q_token_stride", Scalar::I64),
    ("k_batch_stride", Scalar::I64),
    ("k_head_stride", Scalar::I64),
    ("k_token_stride", Scalar::I64),
    ("v_batch_stride", Scalar::I64),
    ("v_head_stride", Scalar::I64),
    ("v_token_stride", Scalar::I64),
    ("out_batch_stride", Scalar::I64),
    ("out_head_stride", Scalar::I64),
    ("out_token_stride", Scalar::I64),
    ("lse_batch_stride", Scalar::I64),
    ("lse_head_stride", Scalar::I64),
    ("step", Scalar::U32),
    ("num_steps", Scalar::U32),
    ("layer", Scalar::U32),
    ("num_heads", Scalar::U32),
    ("batch", Scalar::U32),
    ("q_len", Scalar::U32),
    ("kv_len", Scalar::U32),
    ("num_q_blocks", Scalar::U32),
    ("num_kv_blocks", Scalar::U32),
    ("num_anchor_queries", Scalar::U32),
    ("scale_log2", Scalar::F32),
];

/// Size of the parameter struct: that of its fields, rounded up to 8, its alignment.
pub const PARAMS_BYTES: u32 = {
    let (mut bytes, mut i) = (0, 0);
    while i < PARAMS.len() {
        bytes += PARAMS[i].1.size();
        i += 1;
    }
    bytes.next_multiple_of(8)
};

/// What Hopper kernels take after the parameter struct, in order: the tensor maps of q, k and v.
pub const TENSOR_MAPS: &[&str] = &["q_map", "k_map", "v_map"];

/// Size of a tensor map.
pub const TENSOR_MAP_BYTES: u32 = 128;

/// Alignment of a tensor map.
pub const TENSOR_MAP_ALIGN: u32 = 64;

/// Elements of a head in one box row: what a 128-byte swizzle spans.
pub const TENSOR_MAP_COLUMNS: u32 = 64;

/// CTAs of a cluster of a Hopper kernel.
pub const CLUSTER: u32 = 2;

/// Tokens of a box: of half a block of keys.
pub const fn tensor_map_tokens(head_dim: u32) -> u32 {
    if head_dim > TENSOR_MAP_COLUMNS { BLOCK } else { BLOCK / 2 }
}

/// The four addresses of a step's tables, in order.
pub const STEP_TABLE: &[&str] = &["lists", "items", "ops", "masks"];

/// The layout in one line, as a bundle stores it:
/// `abi 5; q:ptr@0 k:ptr@8 ...; 256 bytes; lists items ops masks; hopper q_map k_map v_map of 128 bytes, clusters of 2`.
pub fn describe() -> String {
    let mut at = 0;
    let mut line = format!("abi {ABI_VERSION};");
    for &(name, scalar) in PARAMS {
        line += &format!(" {name}:{}@{at}", scalar.name());
        at += scalar.size();
    }
    line += &format!("; {PARAMS_BYTES} bytes; {}", STEP_TABLE.join(" "));
    let maps = TENSOR_MAPS.join(" ");
    line + &format!("; hopper {maps} of {TENSOR_MAP_BYTES} bytes, clusters of {CLUSTER}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_description_names_every_field_and_both_families() {
        let line = describe();
        assert!(line.starts_with("abi 5; q:ptr@0 k:ptr@8 v:ptr@16 out:ptr@24 "), "{line}");
        assert!(line.contains(" num_heads:u32@220 batch:u32@224 q_len:u32@228 "), "{line}");
        assert!(
            line.contains(" scale_log2:f32@248; 256 bytes; lists items ops masks; hopper q_map k_map v_map "),
            "{line}"
        );
        assert!(line.ends_with(" of 128 bytes, clusters of 2"), "{line}");
    }

    #[test]
    fn fields_are_aligned_without_holes() {
        let mut at = 0;
        for &(name, scalar) in PARAMS {
            assert_eq!(at % scalar.size(), 0, "{name}");
            at += scalar.size();
        }
        assert!((at..at + 8).contains(&PARAMS_BYTES));
    }
}
