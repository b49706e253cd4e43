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

mod error;
mod read;

use std::path::PathBuf;

use calibc_ir as ir;
use calibc_opt::{Budget, HeadWeights, Importance, OverPrompts, StepWeights};
use schemars::JsonSchema;
use serde::de::{self, Deserializer, MapAccess, value::MapAccessDeserializer};
use serde::{Deserialize, Serialize, Serializer};

pub use error::{Problem, SpecError};

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

/// How masks are chosen.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum PolicySpec {
    /// The recipe of CalibAtt.
    CalibAtt(CalibAttSpec),
    /// A density, spent where it is worth most.
    Budget(BudgetSpec),
    /// The user's own masks.
    Explicit(ExplicitSpec),
}

impl Default for PolicySpec {
    fn default() -> Self {
        Self::CalibAtt(CalibAttSpec::default())
    }
}

/// The recipe of CalibAtt: per prompt and query row the fewest key blocks that hold epsilon(t) of the attention, then a vote.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CalibAttSpec {
    /// `calibatt`.
    pub kind: CalibAttKind,
    /// epsilon over the steps.
    #[serde(default)]
    pub schedule: ScheduleSpec,
    /// Share of the calibration prompts that must keep a block, in (0, 1].
    #[serde(default = "default_rho", deserialize_with = "open_unit")]
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0))]
    pub rho: f64,
    /// Heads computed at anchor rows only: `off`, or when and with how many.
    #[serde(default)]
    pub repetition: RepetitionSpec,
}

impl Default for CalibAttSpec {
    fn default() -> Self {
        Self {
            kind: CalibAttKind::CalibAtt,
            schedule: ScheduleSpec::default(),
            rho: default_rho(),
            repetition: RepetitionSpec::default(),
        }
    }
}

/// The tag of [`CalibAttSpec`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum CalibAttKind {
    /// `calibatt`.
    #[serde(rename = "calibatt")]
    CalibAtt,
}

/// epsilon(t) = A + (c - A) * exp(-k * t / T) with A = a_base + a_per_token * tokens, t the step and T the number of steps.
///
/// In a file: this mapping, or one of the paper's two fits by name, `long` (the default) and `distilled` (4 steps).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, JsonSchema)]
#[schemars(with = "ScheduleForms")]
pub struct ScheduleSpec {
    /// A without tokens.
    pub a_base: f64,
    /// What each token adds to A.
    pub a_per_token: f64,
    /// epsilon of step 0.
    pub c: f64,
    /// Decay over the steps.
    pub k: f64,
}

impl ScheduleSpec {
    /// The paper's fit for samplers of many steps.
    pub const LONG: Self = Self { a_base: 0.796, a_per_token: 1.41e-6, c: 0.99, k: 16.0 };
    /// The paper's fit for 4-step distilled samplers.
    pub const DISTILLED: Self = Self { a_base: 0.763, a_per_token: 0.0, c: 0.863, k: 5.64 };

    /// A for a sequence of `tokens`.
    pub fn a(&self, tokens: u32) -> f64 {
        self.a_base + self.a_per_token * f64::from(tokens)
    }
}

impl Default for ScheduleSpec {
    fn default() -> Self {
        Self::LONG
    }
}

/// The forms a schedule takes in a file (for the JSON Schema).
#[derive(JsonSchema)]
#[schemars(untagged, rename = "ScheduleSpec")]
#[expect(dead_code, reason = "describes the file format to schemars; files are read by the visitor below")]
enum ScheduleForms {
    /// One of the paper's fits.
    Named(ScheduleName),
    /// All constants; what is left out is taken from `long`.
    Constants(ScheduleConstants),
}

#[derive(Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum ScheduleName {
    /// The paper's fit for samplers of many steps.
    Long,
    /// The paper's fit for 4-step distilled samplers.
    Distilled,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ScheduleConstants {
    /// A without tokens.
    #[serde(default, deserialize_with = "finite_option")]
    a_base: Option<f64>,
    /// What each token adds to A.
    #[serde(default, deserialize_with = "finite_option")]
    a_per_token: Option<f64>,
    /// epsilon of step 0.
    #[serde(default, deserialize_with = "finite_option")]
    c: Option<f64>,
    /// Decay over the steps.
    #[serde(default, deserialize_with = "finite_option")]
    k: Option<f64>,
}

impl<'de> Deserialize<'de> for ScheduleSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = ScheduleSpec;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("`long`, `distilled`, or a mapping of a_base, a_per_token, c and k")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<ScheduleSpec, E> {
                Ok(match ScheduleName::deserialize(de::value::StrDeserializer::new(name))? {
                    ScheduleName::Long => ScheduleSpec::LONG,
                    ScheduleName::Distilled => ScheduleSpec::DISTILLED,
                })
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ScheduleSpec, A::Error> {
                let given = ScheduleConstants::deserialize(MapAccessDeserializer::new(map))?;
                let long = ScheduleSpec::LONG;
                Ok(ScheduleSpec {
                    a_base: given.a_base.unwrap_or(long.a_base),
                    a_per_token: given.a_per_token.unwrap_or(long.a_per_token),
                    c: given.c.unwrap_or(long.c),
                    k: given.k.unwrap_or(long.k),
                })
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// Heads computed at anchor rows only, and copied to the rows nearest to them.
#[derive(Clone, Copy, Debug, PartialEq, JsonSchema)]
#[schemars(with = "RepetitionForms")]
pub enum RepetitionSpec {
    /// Never.
    Off,
    /// Where the anchor similarity reaches gamma.
    On(AnchorSpec),
}

/// When and with how many anchor rows a head is computed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AnchorSpec {
    /// Anchor rows per frame.
    #[serde(default = "default_anchors", deserialize_with = "positive_u16")]
    #[schemars(range(min = 1))]
    pub anchors: u16,
    /// Least mean cosine similarity to the nearest anchor row.
    #[serde(default = "default_gamma", deserialize_with = "finite")]
    pub gamma: f64,
}

impl Default for RepetitionSpec {
    fn default() -> Self {
        Self::On(AnchorSpec { anchors: default_anchors(), gamma: default_gamma() })
    }
}

#[derive(JsonSchema)]
#[schemars(untagged, rename = "RepetitionSpec")]
#[expect(dead_code, reason = "describes the file format to schemars; files are read by the visitor below")]
enum RepetitionForms {
    /// Never.
    Off(OffTag),
    /// Where the anchor similarity reaches gamma.
    On(AnchorSpec),
}

#[derive(JsonSchema)]
#[serde(rename_all = "lowercase")]
#[expect(dead_code, reason = "see RepetitionForms")]
enum OffTag {
    /// No head is computed at anchor rows only.
    Off,
}

impl Serialize for RepetitionSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => serializer.serialize_str("off"),
            Self::On(anchors) => anchors.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for RepetitionSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = RepetitionSpec;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("`off`, or a mapping of anchors and gamma")
            }

            // YAML 1.1 readers take a bare `off` for false.
            fn visit_bool<E: de::Error>(self, on: bool) -> Result<RepetitionSpec, E> {
                if on { Err(E::invalid_value(de::Unexpected::Bool(on), &self)) } else { Ok(RepetitionSpec::Off) }
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<RepetitionSpec, E> {
                if word == "off" {
                    Ok(RepetitionSpec::Off)
                } else {
                    Err(E::invalid_value(de::Unexpected::Str(word), &self))
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<RepetitionSpec, A::Error> {
                AnchorSpec::deserialize(MapAccessDeserializer::new(map)).map(RepetitionSpec::On)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// One global optimum: of all plans of the wanted density, the one whose predicted loss is least. Dropping a block costs the weight
/// of its step times the weight of its head times what it adds to the error of its row, beside the blocks that matter less; one
/// threshold on that decides for the whole plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BudgetSpec {
    /// `budget`.
    pub kind: BudgetKind,
    /// Share of the dense attention work that the plan does, in (0, 1]: the mean density of all its sites.
    #[serde(deserialize_with = "open_unit")]
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0))]
    pub density: f64,
    /// Share of its mean energy over the calibration prompts that every row of blocks keeps, from 0 to below 1. Its strongest block
    /// it keeps in any case.
    #[serde(default = "default_row_recall", deserialize_with = "below_one")]
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1))]
    pub row_recall: f64,
    /// Least density of any step, at most `density`; at `density` itself every step gets the same.
    #[serde(default, deserialize_with = "closed_unit")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub step_floor: f64,
    /// Anchor rows per frame that a head may compute instead of a mask, where that loses less for the same work; `off`: never.
    #[serde(default)]
    pub anchors: AnchorsSpec,
    /// What a block is worth at its site.
    #[serde(default)]
    pub importance: ImportanceSpec,
    /// How the calibration prompts are put together.
    #[serde(default)]
    pub over_prompts: OverPromptsSpec,
    /// What steps weigh.
    #[serde(default)]
    pub step_weights: StepWeightsSpec,
    /// What heads weigh.
    #[serde(default)]
    pub head_weights: HeadWeightsSpec,
    /// What happens where the traces lack what the fields above ask for.
    #[serde(default)]
    pub missing: LackSpec,
}

/// The tag of [`BudgetSpec`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum BudgetKind {
    /// `budget`.
    #[serde(rename = "budget")]
    Budget,
}

/// Anchor rows that heads may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, JsonSchema)]
#[schemars(with = "AnchorsForms")]
pub enum AnchorsSpec {
    /// None.
    Off,
    /// So many per frame.
    Rows(u16),
}

impl Default for AnchorsSpec {
    fn default() -> Self {
        Self::Rows(default_anchors())
    }
}

#[derive(JsonSchema)]
#[schemars(untagged, rename = "AnchorsSpec")]
#[expect(dead_code, reason = "describes the file format to schemars; files are read by the visitor below")]
enum AnchorsForms {
    /// Never.
    Off(OffTag),
    /// Anchor rows per frame.
    Rows(#[schemars(range(min = 1))] u16),
}

impl Serialize for AnchorsSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => serializer.serialize_str("off"),
            Self::Rows(rows) => serializer.serialize_u16(*rows),
        }
    }
}

impl<'de> Deserialize<'de> for AnchorsSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = AnchorsSpec;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("`off`, or a number of anchor rows from 1 to 65535")
            }

            // YAML 1.1 readers take a bare `off` for false.
            fn visit_bool<E: de::Error>(self, on: bool) -> Result<AnchorsSpec, E> {
                if on { Err(E::invalid_value(de::Unexpected::Bool(on), &self)) } else { Ok(AnchorsSpec::Off) }
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<AnchorsSpec, E> {
                if word == "off" {
                    Ok(AnchorsSpec::Off)
                } else {
                    Err(E::invalid_value(de::Unexpected::Str(word), &self))
                }
            }

            fn visit_u64<E: de::Error>(self, rows: u64) -> Result<AnchorsSpec, E> {
                let rows = u16::try_from(rows).ok().filter(|&rows| rows > 0);
                rows.map(AnchorsSpec::Rows).ok_or_else(|| E::custom(format_args!("expected {}", Expected(&self))))
            }

            fn visit_i64<E: de::Error>(self, rows: i64) -> Result<AnchorsSpec, E> {
                self.visit_u64(u64::try_from(rows).unwrap_or(0))
            }
        }

        /// What a visitor expects, in its own words.
        struct Expected<'a>(&'a dyn de::Expected);
        impl std::fmt::Display for Expected<'_> {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// What a block is worth at its site.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ImportanceSpec {
    /// Its deviation: what dropping it alone changes in the output of its row. Where the traces have none, energies squared.
    #[default]
    Deviation,
    /// Its energy squared.
    Energy,
}

/// How the calibration prompts are put together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OverPromptsSpec {
    /// By the mean over them.
    #[default]
    Mean,
    /// By the largest of them, block by block.
    Max,
}

/// What errors at a step weigh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StepWeightsSpec {
    /// As measured (`calibc.sensitivity`). Where the traces have no measurement, `default`.
    #[default]
    Sensitivity,
    /// exp(-2.3 t / T): falling to a tenth.
    Default,
    /// All alike.
    Uniform,
}

/// What errors of a head weigh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum HeadWeightsSpec {
    /// As measured (`calibc.sensitivity`). Where the traces have no measurement, `uniform`.
    #[default]
    Sensitivity,
    /// All alike.
    Uniform,
}

/// What happens where the traces lack something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LackSpec {
    /// What stands for it is used, with a warning.
    #[default]
    Warn,
    /// It is an error.
    Error,
}

impl BudgetSpec {
    /// The policy.
    pub fn to_policy(&self) -> Budget {
        Budget {
            density: self.density,
            row_recall: self.row_recall,
            step_floor: self.step_floor,
            anchors: match self.anchors {
                AnchorsSpec::Off => None,
                AnchorsSpec::Rows(rows) => Some(rows),
            },
            importance: match self.importance {
                ImportanceSpec::Deviation => Importance::Deviation,
                ImportanceSpec::Energy => Importance::Energy,
            },
            over_prompts: match self.over_prompts {
                OverPromptsSpec::Mean => OverPrompts::Mean,
                OverPromptsSpec::Max => OverPrompts::Max,
            },
            step_weights: match self.step_weights {
                StepWeightsSpec::Sensitivity => StepWeights::Sensitivity,
                StepWeightsSpec::Default => StepWeights::Default,
                StepWeightsSpec::Uniform => StepWeights::Uniform,
            },
            head_weights: match self.head_weights {
                HeadWeightsSpec::Sensitivity => HeadWeights::Sensitivity,
                HeadWeightsSpec::Uniform => HeadWeights::Uniform,
            },
            fallbacks: self.missing == LackSpec::Warn,
        }
    }
}

/// The user's own masks: any block mask per head.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExplicitSpec {
    /// `explicit`.
    pub kind: ExplicitKind,
    /// A safetensors file, relative to the spec's folder: per step and layer a U8 tensor `s<step>.l<layer>` of shape
    /// `[heads, q_blocks, kv_blocks]` with values 0 and 1, and optionally `s<step>.l<layer>.op`, U8 `[heads]`, with 0 dense,
    /// 1 block-sparse, 2 anchor rows. This is what `calibc export --masks` writes.
    pub masks: PathBuf,
    /// What a step and layer without a tensor gets: `error`, or `dense`.
    #[serde(default)]
    pub default: MissingSpec,
    /// Anchor rows per frame of heads whose op is 2.
    #[serde(default = "default_anchors", deserialize_with = "positive_u16")]
    #[schemars(range(min = 1))]
    pub anchors: u16,
}

/// The tag of [`ExplicitSpec`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ExplicitKind {
    /// `explicit`.
    #[serde(rename = "explicit")]
    Explicit,
}

/// What a step and layer without a tensor gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MissingSpec {
    /// It is an error.
    #[default]
    Error,
    /// All heads are dense.
    Dense,
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

fn default_rho() -> f64 {
    0.5
}

fn default_row_recall() -> f64 {
    Budget::ROW_RECALL
}

fn default_anchors() -> u16 {
    5
}

fn default_gamma() -> f64 {
    0.87
}

fn checked<'de, D: Deserializer<'de>, T: Deserialize<'de> + Copy + std::fmt::Display>(
    deserializer: D,
    holds: impl FnOnce(T) -> bool,
    rule: &str,
) -> Result<T, D::Error> {
    let value = T::deserialize(deserializer)?;
    if holds(value) { Ok(value) } else { Err(de::Error::custom(format_args!("{value} is out of range; {rule}"))) }
}

fn positive<'de, D: Deserializer<'de>>(d: D) -> Result<u32, D::Error> {
    checked(d, |n: u32| n > 0, "give a whole number of at least 1")
}

fn positive_u16<'de, D: Deserializer<'de>>(d: D) -> Result<u16, D::Error> {
    checked(d, |n: u16| n > 0, "give a whole number of at least 1")
}

fn positive_u64<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
    checked(d, |n: u64| n > 0, "give a whole number of at least 1")
}

fn head_dim<'de, D: Deserializer<'de>>(d: D) -> Result<u32, D::Error> {
    checked(d, |n: u32| ir::HEAD_DIMS.contains(&n), "kernels exist for a head_dim of 64 and 128")
}

fn open_unit<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
    checked(d, |x: f64| x > 0.0 && x <= 1.0, "give a number above 0 and up to 1")
}

fn closed_unit<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
    checked(d, |x: f64| (0.0..=1.0).contains(&x), "give a number from 0 to 1")
}

fn below_one<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
    checked(d, |x: f64| (0.0..1.0).contains(&x), "give a number from 0 to below 1")
}

fn finite<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
    checked(d, |x: f64| x.is_finite(), "give a finite number")
}

fn finite_option<'de, D: Deserializer<'de>>(d: D) -> Result<Option<f64>, D::Error> {
    finite(d).map(Some)
}

fn non_empty<'de, D: Deserializer<'de>, T: Deserialize<'de>>(d: D) -> Result<Vec<T>, D::Error> {
    let list = Vec::deserialize(d)?;
    if list.is_empty() { Err(de::Error::custom("the list is empty; name at least one")) } else { Ok(list) }
}
