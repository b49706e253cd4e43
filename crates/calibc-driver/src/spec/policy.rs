//! The policies of a spec: how masks are chosen.

use std::path::PathBuf;

use calibc_opt::{Budget, HeadWeights, Importance, OverPrompts, StepWeights};
use schemars::JsonSchema;
use serde::de::{self, Deserializer, MapAccess, value::MapAccessDeserializer};
use serde::{Deserialize, Serialize, Serializer};

use super::checks::{below_one, closed_unit, finite, finite_option, open_unit, positive_u16};

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
    /// The square root of what was measured (`calibc.sensitivity`), which serves other prompts better than the measurement itself. Where
    /// the traces have no measurement, `uniform`.
    #[default]
    Tempered,
    /// As measured. Where the traces have no measurement, `uniform`.
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
                HeadWeightsSpec::Tempered => HeadWeights::Tempered,
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
