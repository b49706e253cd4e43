//! What to compile and how: the YAML of `plans/`, read strictly.
//!
//! A spec may leave out everything: the model, the geometry and the steps then come from the traces, the policy is the
//! paper's recipe with the paper's constants. What it does say is checked to the letter: an unknown field, a value of the
//! wrong type or out of range is an error with its line, its column and a suggestion ([`SpecError`]).
//!
//! ```yaml
//! name: wan2.1-14b-720p
//! model: { layers: 40, heads: 40, head_dim: 128 }
//! geometry: { frames: 21, height: 45, width: 80 }
//! steps: 50
//! policy: { kind: calibatt, rho: 0.5 }
//! ```

mod checks;
mod error;
mod policy;
mod read;

use calibc_ir as ir;
use schemars::JsonSchema;
use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize, Serializer};

use checks::{closed_unit, head_dim, non_empty, positive, positive_u64};
pub use error::{Problem, SpecError};
pub use policy::*;

/// Largest spec file that is read, in bytes.
pub const MAX_SPEC_BYTES: u64 = 1 << 20;

/// Most denoising steps a spec may name.
pub const MAX_STEPS: u32 = 10_000;

/// One compile job. Every field has a default; see the module documentation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Spec {
    /// Name of the plan, for people. Default: the model's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Remarks, for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The attention stack. Default: the traces'.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelSpec>,
    /// The token grid. Default: the traces'.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub geometry: Option<GeometrySpec>,
    /// Number of denoising steps. Default: the traces'.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10000))]
    pub steps: Option<u32>,
    /// Noise level of each step, noisiest first. Default: the traces', or evenly spaced from 1 towards 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sigmas: Option<Vec<f64>>,
    /// How masks are chosen. Default: the paper's recipe.
    #[schemars(default)]
    pub policy: PolicySpec,
    /// What kernels are made, for which GPUs.
    #[schemars(default)]
    pub target: TargetSpec,
    /// Which masks may be merged.
    #[schemars(default)]
    pub share: ShareSpec,
}

/// The attention stack a plan is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// The model's name. Where it is given, it must be the traces' model name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Attention layers.
    #[serde(deserialize_with = "positive")]
    #[schemars(range(min = 1))]
    pub layers: u32,
    /// Heads per layer.
    #[serde(deserialize_with = "positive")]
    #[schemars(range(min = 1))]
    pub heads: u32,
    /// Head dimension: 64 or 128.
    #[serde(deserialize_with = "head_dim")]
    #[schemars(extend("enum" = [64, 128]))]
    pub head_dim: u32,
}

/// The token grid after patchify. Tokens = frames * height * width + text_tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GeometrySpec {
    /// Latent frames.
    #[serde(deserialize_with = "positive")]
    #[schemars(range(min = 1))]
    pub frames: u32,
    /// Latent rows of a frame.
    #[serde(deserialize_with = "positive")]
    #[schemars(range(min = 1))]
    pub height: u32,
    /// Latent columns of a frame.
    #[serde(deserialize_with = "positive")]
    #[schemars(range(min = 1))]
    pub width: u32,
    /// Text tokens of the joint sequence; 0 where text enters through cross-attention.
    #[serde(default)]
    pub text_tokens: u32,
    /// Where the text tokens stand.
    #[serde(default)]
    pub text_position: TextPositionSpec,
    /// Order of the video tokens: `raster`, or `tile: [frames, height, width]`.
    #[serde(default)]
    pub layout: LayoutSpec,
    /// Length of a separate key sequence, where keys are not the queries' tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub kv_tokens: Option<u32>,
}

/// Where the text tokens of a joint sequence stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TextPositionSpec {
    /// There are none.
    #[default]
    None,
    /// Before the video tokens.
    Before,
    /// After the video tokens.
    After,
}

/// Order of the video tokens in the sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LayoutSpec {
    /// Frame by frame, row by row.
    #[default]
    Raster,
    /// Sorted by tile of `[frames, height, width]`, raster inside a tile.
    Tile([u32; 3]),
}

impl GeometrySpec {
    /// The geometry, not yet validated.
    pub fn to_ir(&self) -> ir::Geometry {
        ir::Geometry {
            frames: self.frames,
            height: self.height,
            width: self.width,
            text_tokens: self.text_tokens,
            text_position: match self.text_position {
                TextPositionSpec::None => ir::TextPosition::None,
                TextPositionSpec::Before => ir::TextPosition::Before,
                TextPositionSpec::After => ir::TextPosition::After,
            },
            layout: match self.layout {
                LayoutSpec::Raster => ir::Layout::Raster,
                LayoutSpec::Tile(tile) => ir::Layout::Tile(tile),
            },
            kv_tokens: self.kv_tokens,
        }
    }

    /// The spec form of `geometry`.
    pub fn from_ir(geometry: &ir::Geometry) -> Self {
        let &ir::Geometry { frames, height, width, text_tokens, text_position, layout, kv_tokens } = geometry;
        Self {
            frames,
            height,
            width,
            text_tokens,
            text_position: match text_position {
                ir::TextPosition::None => TextPositionSpec::None,
                ir::TextPosition::Before => TextPositionSpec::Before,
                ir::TextPosition::After => TextPositionSpec::After,
            },
            layout: match layout {
                ir::Layout::Raster => LayoutSpec::Raster,
                ir::Layout::Tile(tile) => LayoutSpec::Tile(tile),
            },
            kv_tokens,
        }
    }
}

/// What kernels are made, for which GPUs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TargetSpec {
    /// Element types kernels are made for.
    #[serde(deserialize_with = "non_empty")]
    #[schemars(length(min = 1))]
    pub dtypes: Vec<DTypeSpec>,
    /// Whether kernels that also write the log-sum-exp are made.
    pub lse: bool,
    /// GPU architectures machine code is made for. `--arch` on the command line replaces them.
    #[serde(deserialize_with = "non_empty")]
    #[schemars(length(min = 1))]
    pub archs: Vec<ArchSpec>,
    /// Which kernels are made for them. `--portable` on the command line overrides it.
    pub family: FamilySpec,
    /// L2 cache that K and V of the heads at work may fill, in bytes.
    #[serde(deserialize_with = "positive_u64")]
    #[schemars(range(min = 1))]
    pub l2_bytes: u64,
    /// Tiles that run at once on the GPU the scheduler plans for.
    #[serde(deserialize_with = "positive")]
    #[schemars(range(min = 1))]
    pub running_tiles: u32,
}

impl Default for TargetSpec {
    fn default() -> Self {
        let machine = calibc_opt::Target::default();
        Self {
            dtypes: vec![DTypeSpec::Bf16, DTypeSpec::Fp16],
            lse: true,
            archs: ir::Arch::DEFAULT.map(ArchSpec).to_vec(),
            family: FamilySpec::Auto,
            l2_bytes: machine.l2_bytes,
            running_tiles: machine.running_tiles,
        }
    }
}

/// Which family of kernels serves an architecture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum FamilySpec {
    /// The fastest there is for it.
    #[default]
    Auto,
    /// The one that every architecture runs.
    Portable,
}

/// Element type of q, k, v and out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DTypeSpec {
    /// bfloat16.
    Bf16,
    /// IEEE half.
    Fp16,
}

impl From<DTypeSpec> for ir::DType {
    fn from(dtype: DTypeSpec) -> Self {
        match dtype {
            DTypeSpec::Bf16 => Self::Bf16,
            DTypeSpec::Fp16 => Self::Fp16,
        }
    }
}

/// A GPU architecture, such as `sm_90a`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, JsonSchema)]
#[schemars(with = "String", extend("enum" = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120"]))]
pub struct ArchSpec(pub ir::Arch);

impl Serialize for ArchSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for ArchSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        name.parse().map(Self).map_err(de::Error::custom)
    }
}

/// Which masks may be merged: two sites share their union where both bounds hold.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ShareSpec {
    /// Most density a merge may add to any of its masks; 0 shares equal masks only.
    #[serde(deserialize_with = "closed_unit")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub max_extra_density: f64,
}

impl Default for ShareSpec {
    fn default() -> Self {
        Self { max_extra_density: 0.0 }
    }
}
