//! The manifest as JSON: wire structs of their own, so that the IR stays free to change.
//!
//! Conversions destructure without `..`: a field added to the IR does not compile until it is decided how it is stored.

use calibc_ir as ir;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::{BundleError, Resources};

/// The manifest, field by field in file order; `payloads` comes last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Manifest {
    pub(crate) calibc_version: String,
    pub(crate) abi: String,
    pub(crate) model: Model,
    pub(crate) geometry: Geometry,
    pub(crate) sigmas: Vec<f64>,
    pub(crate) anchors: Option<u16>,
    pub(crate) masks: Vec<MaskChunk>,
    pub(crate) schedule: ScheduleSize,
    pub(crate) variants: Vec<Variant>,
    pub(crate) kernels: Vec<Kernel>,
    pub(crate) payloads: Vec<Payload>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Model {
    name: String,
    pub(crate) layers: u32,
    pub(crate) heads: u32,
    head_dim: u32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Geometry {
    frames: u32,
    height: u32,
    width: u32,
    text_tokens: u32,
    text_position: TextPosition,
    layout: Layout,
    kv_tokens: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum TextPosition {
    None,
    Before,
    After,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Layout {
    Raster,
    Tile([u32; 3]),
}

/// `masks` consecutive masks whose first use is at `step`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MaskChunk {
    pub(crate) step: u32,
    pub(crate) masks: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ScheduleSize {
    pub(crate) lists: u32,
    pub(crate) items: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Variant {
    dtype: DType,
    head_dim: u32,
    lse: bool,
    anchors: bool,
    ragged: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum DType {
    Bf16,
    Fp16,
}

/// How a kernel is built; in the order of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Family {
    Portable,
    Hopper,
}

/// A kernel; its code is in the payloads `source/<kernel>` and `cubin/<kernel>/<arch>`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Kernel {
    /// Index into `variants`.
    pub(crate) variant: u32,
    pub(crate) family: Family,
    pub(crate) arch: String,
    pub(crate) symbol: String,
    pub(crate) threads: u32,
    pub(crate) shared_bytes: u32,
    pub(crate) registers: u32,
    pub(crate) static_shared_bytes: u32,
    pub(crate) stack_bytes: u32,
    pub(crate) spill_stores: u32,
    pub(crate) spill_loads: u32,
    pub(crate) nvrtc: [u32; 2],
}

impl Kernel {
    pub(crate) fn resources(&self) -> Resources {
        let &Self { registers, static_shared_bytes, stack_bytes, spill_stores, spill_loads, .. } = self;
        Resources { registers, static_shared_bytes, stack_bytes, spill_stores, spill_loads }
    }
}

/// One payload; `offset` counts from the first byte of the payload area.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Payload {
    pub(crate) name: String,
    pub(crate) offset: u64,
    pub(crate) stored: u64,
    pub(crate) raw: u64,
    pub(crate) codec: Codec,
    pub(crate) blake3: Digest,
}

/// How a payload is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Codec {
    /// As it is.
    None,
    /// As one zstd frame.
    Zstd,
}

/// 64 lower-case hex digits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Digest(pub(crate) blake3::Hash);

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0.to_hex())
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        blake3::Hash::from_hex(text).map(Self).map_err(de::Error::custom)
    }
}

impl Manifest {
    /// The one spelling: compact, fields in declaration order.
    pub(crate) fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("the manifest's structs have string keys only")
    }

    /// Reads the one spelling; any other text, even of equal meaning, is refused.
    pub(crate) fn from_json(bytes: &[u8]) -> Result<Self, BundleError> {
        let manifest: Self =
            serde_json::from_slice(bytes).map_err(|e| BundleError::corrupt("manifest", e.to_string()))?;
        if manifest.to_json() != bytes {
            return Err(BundleError::corrupt("manifest", "not in canonical form"));
        }
        Ok(manifest)
    }
}

impl From<&ir::Model> for Model {
    fn from(model: &ir::Model) -> Self {
        let ir::Model { name, layers, heads, head_dim } = model;
        Self { name: name.clone(), layers: *layers, heads: *heads, head_dim: *head_dim }
    }
}

impl From<Model> for ir::Model {
    fn from(model: Model) -> Self {
        let Model { name, layers, heads, head_dim } = model;
        Self { name, layers, heads, head_dim }
    }
}

impl From<ir::Geometry> for Geometry {
    fn from(geometry: ir::Geometry) -> Self {
        let ir::Geometry { frames, height, width, text_tokens, text_position, layout, kv_tokens } = geometry;
        let text_position = match text_position {
            ir::TextPosition::None => TextPosition::None,
            ir::TextPosition::Before => TextPosition::Before,
            ir::TextPosition::After => TextPosition::After,
        };
        let layout = match layout {
            ir::Layout::Raster => Layout::Raster,
            ir::Layout::Tile(tile) => Layout::Tile(tile),
        };
        Self { frames, height, width, text_tokens, text_position, layout, kv_tokens }
    }
}

impl From<&Geometry> for ir::Geometry {
    fn from(geometry: &Geometry) -> Self {
        let &Geometry { frames, height, width, text_tokens, text_position, layout, kv_tokens } = geometry;
        let text_position = match text_position {
            TextPosition::None => ir::TextPosition::None,
            TextPosition::Before => ir::TextPosition::Before,
            TextPosition::After => ir::TextPosition::After,
        };
        let layout = match layout {
            Layout::Raster => ir::Layout::Raster,
            Layout::Tile(tile) => ir::Layout::Tile(tile),
        };
        Self { frames, height, width, text_tokens, text_position, layout, kv_tokens }
    }
}

impl From<ir::Variant> for Variant {
    fn from(variant: ir::Variant) -> Self {
        let ir::Variant { dtype, head_dim, lse, anchors, ragged } = variant;
        let dtype = match dtype {
            ir::DType::Bf16 => DType::Bf16,
            ir::DType::Fp16 => DType::Fp16,
        };
        Self { dtype, head_dim, lse, anchors, ragged }
    }
}

impl From<Variant> for ir::Variant {
    fn from(variant: Variant) -> Self {
        let Variant { dtype, head_dim, lse, anchors, ragged } = variant;
        let dtype = match dtype {
            DType::Bf16 => ir::DType::Bf16,
            DType::Fp16 => ir::DType::Fp16,
        };
        Self { dtype, head_dim, lse, anchors, ragged }
    }
}

impl From<ir::Family> for Family {
    fn from(family: ir::Family) -> Self {
        match family {
            ir::Family::Portable => Self::Portable,
            ir::Family::Hopper => Self::Hopper,
        }
    }
}

impl From<Family> for ir::Family {
    fn from(family: Family) -> Self {
        match family {
            Family::Portable => Self::Portable,
            Family::Hopper => Self::Hopper,
        }
    }
}
