//! The launch contract between generated kernels and the runtime: one parameter struct, passed by value, and the tables it
//! points to. Code generation spells the struct from [`PARAMS`]; the runtime fills the same layout; a bundle carries
//! [`describe`] and is refused where it differs.
//!
//! ```text
//! grid  = (items of the longest work list of the layer over all steps, batch, 1)     block = THREADS
//! steps[step] -> StepTable { lists, items, ops, masks }
//!   lists[layer] = { begin, count }       items of this layer, in execution order
//!   items[begin + blockIdx.x] = head << 16 | tile
//!   ops[layer * heads + head] = OP_DENSE | OP_ANCHORS | mask index
//!   masks + mask * q_blocks * words_per_row + tile * words_per_row    -> bit row over kv blocks
//! ```
//!
//! A CTA whose index is past the list's count does nothing. A step at or past `num_steps` launches nothing and writes nothing.

/// Version of everything on this page.
pub const ABI_VERSION: u32 = 1;

/// `ops` word of a dense head.
pub const OP_DENSE: u32 = u32::MAX;

/// `ops` word of a head computed at anchor rows. Any other word is the index of a mask.
pub const OP_ANCHORS: u32 = u32::MAX - 1;

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

/// Fields of the parameter struct in order, each aligned to its size: 8-byte fields first, so that there are no holes.
///
/// Strides count elements. `lse` and `step_ptr` may be null. `anchor_*` is the [`crate::AnchorTable`] of the plan, null
/// without anchor heads. `scale_log2` = softmax scale * log2(e).
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
    ("q_len", Scalar::U32),
    ("kv_len", Scalar::U32),
    ("num_q_blocks", Scalar::U32),
    ("num_kv_blocks", Scalar::U32),
    ("num_anchor_queries", Scalar::U32),
    ("scale_log2", Scalar::F32),
];

/// The four addresses of a step's tables, in order.
pub const STEP_TABLE: &[&str] = &["lists", "items", "ops", "masks"];

/// The layout in one line, as a bundle stores it: `abi 1; q:ptr@0 k:ptr@8 ...; 272 bytes; lists items ops masks`.
pub fn describe() -> String {
    let mut at = 0;
    let mut line = format!("abi {ABI_VERSION};");
    for &(name, scalar) in PARAMS {
        line += &format!(" {name}:{}@{at}", scalar.name());
        at += scalar.size();
    }
    line + &format!("; {at} bytes; {}", STEP_TABLE.join(" "))
}
