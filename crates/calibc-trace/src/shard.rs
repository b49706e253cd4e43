//! One shard: where its tensors are, and whether their values are what the format says.

use calibc_ir::Model;
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::encoding::{ENERGY_OF_CODE, Encoding};
use crate::error::{At, Others, TraceError};
use crate::manifest::Manifest;

/// The header of a shard with 100 layers has 50 KB.
const MAX_HEADER: u64 = 4 << 20;

/// The tensors of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Similarity,
    Error,
    Energy,
    Deviation,
}

impl Kind {
    pub(crate) const ALL: [Self; 4] = [Self::Similarity, Self::Error, Self::Energy, Self::Deviation];

    /// The tensor's name at `layer`.
    pub(crate) fn name(self, layer: u32) -> String {
        let kind = match self {
            Self::Similarity => "anchor_similarity",
            Self::Error => "anchor_error",
            Self::Energy => "block_energy",
            Self::Deviation => "block_deviation",
        };
        format!("layers.{layer}.{kind}")
    }

    pub(crate) fn encoding(self, manifest: &Manifest) -> Encoding {
        match self {
            Self::Energy | Self::Deviation => manifest.encoding,
            Self::Similarity | Self::Error => Encoding::F32,
        }
    }

    pub(crate) fn shape(self, manifest: &Manifest) -> Vec<usize> {
        match self {
            Self::Energy | Self::Deviation => manifest.energy_shape().to_vec(),
            Self::Similarity | Self::Error => vec![manifest.model.heads as usize, manifest.anchor_counts.len()],
        }
    }
}

/// Byte offsets in the file of one layer's tensors, by [`Kind`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerIndex([Option<u64>; 4]);

impl LayerIndex {
    pub(crate) fn get(&self, kind: Kind) -> Option<u64> {
        self.0[kind as usize]
    }
}

/// Where everything is in a shard, layer by layer.
pub(crate) type ShardIndex = Vec<LayerIndex>;

/// The header of a safetensors file and the offset of its data.
///
/// The header is sliced out here and only then handed to the parser: its size is capped first, and the sum over tensors is
/// compared without the additions that a hostile header could overflow.
pub(crate) fn header(file: &str, bytes: &[u8]) -> Result<(Metadata, u64), TraceError> {
    let truncated = || TraceError::HeaderTruncated { file: file.into() };
    let (length, rest) = bytes.split_first_chunk::<8>().ok_or_else(truncated)?;
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(TraceError::HeaderTooLarge { file: file.into(), bytes: length, limit: MAX_HEADER });
    }
    let (header, data) = rest.split_at_checked(length as usize).ok_or_else(truncated)?;
    let metadata: Metadata = serde_json::from_slice(header)
        .map_err(|e| TraceError::BadHeader { file: file.into(), reason: e.to_string() })?;
    let (expected, found) = (metadata.data_len() as u64, data.len() as u64);
    if expected != found {
        return Err(TraceError::DataLength { file: file.into(), expected, found });
    }
    Ok((metadata, 8 + length))
}

/// Checks the header of a shard: every tensor is one the format has, of its type and shape, and none is missing.
pub(crate) fn index(file: &str, bytes: &[u8], manifest: &Manifest) -> Result<ShardIndex, Vec<TraceError>> {
    let (metadata, data) = header(file, bytes).map_err(|e| vec![e])?;
    let mut problems = Vec::new();
    let mut known = 0;
    let mut layers = Vec::with_capacity(manifest.model.layers as usize);
    for layer in 0..manifest.model.layers {
        let mut offsets = [None; 4];
        for kind in Kind::ALL {
            let tensor = kind.name(layer);
            match metadata.info(&tensor) {
                Some(info) => {
                    known += 1;
                    check_tensor(file, &tensor, info, kind.encoding(manifest), &kind.shape(manifest), &mut problems);
                    offsets[kind as usize] = Some(data + info.data_offsets.0 as u64);
                }
                None if kind == Kind::Energy => {
                    problems.push(TraceError::MissingTensor { file: file.into(), tensor });
                }
                None => {}
            }
        }
        layers.push(LayerIndex(offsets));
    }
    let names = metadata.offset_keys();
    if names.len() > known {
        let expected = |name: &String| is_known(name, &manifest.model);
        let unknown = names.into_iter().filter(|name| !expected(name));
        problems.extend(unknown.map(|tensor| TraceError::UnknownTensor { file: file.into(), tensor }));
    }
    if problems.is_empty() { Ok(layers) } else { Err(problems) }
}

fn is_known(name: &str, model: &Model) -> bool {
    let layer = name.strip_prefix("layers.").and_then(|rest| rest.split('.').next()?.parse::<u32>().ok());
    layer.is_some_and(|layer| layer < model.layers && Kind::ALL.iter().any(|kind| kind.name(layer) == name))
}

/// Checks the type and the shape of one tensor.
pub(crate) fn check_tensor(
    file: &str,
    tensor: &str,
    info: &TensorInfo,
    encoding: Encoding,
    shape: &[usize],
    problems: &mut Vec<TraceError>,
) {
    if info.dtype != encoding.dtype() {
        let found = match info.dtype {
            Dtype::U8 => "U8".into(),
            other => other.to_string(),
        };
        let (file, tensor) = (file.into(), tensor.into());
        problems.push(TraceError::TensorType { file, tensor, expected: encoding.dtype_name(), found });
    }
    if info.shape != shape {
        let (expected, found) = (shape.to_vec(), info.shape.clone());
        problems.push(TraceError::TensorShape { file: file.into(), tensor: tensor.into(), expected, found });
    }
}

/// Checks every value of an indexed shard. In parallel over layers, problems in the order of layers and kinds.
pub(crate) fn check_values(file: &str, bytes: &[u8], index: &ShardIndex, manifest: &Manifest) -> Vec<TraceError> {
    let check = |layer: usize| {
        Kind::ALL.into_iter().flat_map(move |kind| {
            let Some(offset) = index[layer].get(kind) else { return Vec::new() };
            let elements: usize = kind.shape(manifest).iter().product();
            let size = elements * kind.encoding(manifest).bytes();
            let tensor = &bytes[offset as usize..][..size];
            check_tensor_values(file, &kind.name(layer as u32), kind, manifest, tensor)
        })
    };
    (0..index.len()).into_par_iter().flat_map_iter(check).collect()
}

/// What one row can be accused of.
enum Fault {
    Nan(usize),
    Infinite(usize),
    Negative(usize, f64),
    AboveOne(usize, f64),
    Sum(f64),
}

/// The limits of a tensor's values: all of them are finite.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    non_negative: bool,
    at_most_one: bool,
    row_sum: Option<f64>,
}

impl Limits {
    pub(crate) fn of(kind: Kind, manifest: &Manifest) -> Self {
        Self {
            non_negative: kind != Kind::Similarity,
            at_most_one: kind == Kind::Deviation,
            row_sum: (kind == Kind::Energy).then(|| manifest.encoding.tolerance()),
        }
    }

    /// Finite and not negative.
    pub(crate) const NON_NEGATIVE: Self = Self { non_negative: true, at_most_one: false, row_sum: None };

    fn fault(self, row: impl Iterator<Item = f64>) -> Option<Fault> {
        let mut sum = 0.0;
        for (column, value) in row.enumerate() {
            // One compare for the common case.
            let fine = (0.0..=1.0).contains(&value);
            if !fine {
                if value.is_nan() {
                    return Some(Fault::Nan(column));
                } else if value.is_infinite() {
                    return Some(Fault::Infinite(column));
                } else if value < 0.0 && self.non_negative {
                    return Some(Fault::Negative(column, value));
                } else if value > 1.0 && self.at_most_one {
                    return Some(Fault::AboveOne(column, value));
                }
            }
            sum += value;
        }
        let off = self.row_sum.is_some_and(|tolerance| (sum - 1.0).abs() > tolerance);
        off.then_some(Fault::Sum(sum))
    }
}

fn check_tensor_values(file: &str, tensor: &str, kind: Kind, manifest: &Manifest, bytes: &[u8]) -> Vec<TraceError> {
    let limits = Limits::of(kind, manifest);
    let [_, q_blocks, kv_blocks] = manifest.energy_shape();
    match (kind, manifest.encoding) {
        // Codes cannot be out of range.
        (Kind::Deviation, Encoding::Log2U8) => Vec::new(),
        (Kind::Energy, Encoding::Log2U8) => {
            let rows = bytes.chunks_exact(kv_blocks).map(|row| {
                let sum: f64 = row.iter().map(|&code| ENERGY_OF_CODE[usize::from(code)]).sum();
                ((sum - 1.0).abs() > Encoding::Log2U8.tolerance()).then_some(Fault::Sum(sum))
            });
            accuse(file, tensor, Some(q_blocks), limits, rows)
        }
        (Kind::Energy | Kind::Deviation, encoding) => {
            let rows = bytes.chunks_exact(kv_blocks * encoding.bytes());
            accuse(file, tensor, Some(q_blocks), limits, rows.map(|row| limits.fault(encoding.decode(row))))
        }
        (Kind::Similarity | Kind::Error, _) => {
            let row = (manifest.anchor_counts.len() * Encoding::F32.bytes()).max(1);
            let rows = bytes.chunks_exact(row);
            accuse(file, tensor, None, limits, rows.map(|row| limits.fault(Encoding::F32.decode(row))))
        }
    }
}

/// Checks values that are about to be written, before encoding hides their faults (row sums are left to the check after).
pub(crate) fn check_given(
    file: &str,
    tensor: &str,
    kind: Kind,
    manifest: &Manifest,
    values: &[f32],
) -> Vec<TraceError> {
    let limits = Limits { row_sum: None, ..Limits::of(kind, manifest) };
    let [_, q_blocks, kv_blocks] = manifest.energy_shape();
    let (width, rows_per_head) = match kind {
        Kind::Energy | Kind::Deviation => (kv_blocks, Some(q_blocks)),
        Kind::Similarity | Kind::Error => (manifest.anchor_counts.len().max(1), None),
    };
    let rows = values.chunks_exact(width).map(|row| limits.fault(row.iter().map(|&v| f64::from(v))));
    accuse(file, tensor, rows_per_head, limits, rows)
}

/// Checks values that have just been encoded, as a reader will.
pub(crate) fn check_encoded(
    file: &str,
    tensor: &str,
    kind: Kind,
    manifest: &Manifest,
    bytes: &[u8],
) -> Vec<TraceError> {
    check_tensor_values(file, tensor, kind, manifest, bytes)
}

/// Turns the faults of a tensor's rows into one problem of each kind: where it is first, and how many more rows have it.
fn accuse(
    file: &str,
    tensor: &str,
    rows_per_head: Option<usize>,
    limits: Limits,
    faults: impl Iterator<Item = Option<Fault>>,
) -> Vec<TraceError> {
    let mut problems: Vec<TraceError> = Vec::new();
    // By kind of fault: position of its entry in `problems`.
    let mut seen: [Option<usize>; 5] = [None; 5];
    for (i, fault) in faults.enumerate() {
        let Some(fault) = fault else { continue };
        let kind = match fault {
            Fault::Nan(_) => 0,
            Fault::Infinite(_) => 1,
            Fault::Negative(..) => 2,
            Fault::AboveOne(..) => 3,
            Fault::Sum(_) => 4,
        };
        if let Some(first) = seen[kind] {
            problems[first].count_another();
            continue;
        }
        seen[kind] = Some(problems.len());
        let at = |column| {
            let (head, row) = match rows_per_head {
                Some(rows) => (i / rows, Some(i % rows)),
                None => (i, None),
            };
            At { head, row, column }
        };
        let (file, tensor, others) = (file.to_owned(), tensor.to_owned(), Others(0));
        problems.push(match fault {
            Fault::Nan(c) => TraceError::NotANumber { file, tensor, at: at(Some(c)), others },
            Fault::Infinite(c) => TraceError::Infinite { file, tensor, at: at(Some(c)), others },
            Fault::Negative(c, value) => TraceError::Negative { file, tensor, at: at(Some(c)), value, others },
            Fault::AboveOne(c, value) => TraceError::AboveOne { file, tensor, at: at(Some(c)), value, others },
            Fault::Sum(sum) => {
                let tolerance = limits.row_sum.unwrap_or_default();
                TraceError::RowSum { file, tensor, at: at(None), sum, tolerance, others }
            }
        });
    }
    problems
}

/// Checks a table of finite, non-negative numbers with `width` columns (positions are reported as head and column).
pub(crate) fn check_table(file: &str, tensor: &str, width: usize, values: &[f32]) -> Vec<TraceError> {
    let limits = Limits::NON_NEGATIVE;
    let rows = values.chunks_exact(width.max(1)).map(|row| limits.fault(row.iter().map(|&v| f64::from(v))));
    accuse(file, tensor, None, limits, rows)
}
