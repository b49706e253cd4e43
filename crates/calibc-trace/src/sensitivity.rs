//! `sensitivity.safetensors`: how much an error at a step, or at a head, costs the final latent.

use safetensors::{Dtype, tensor::TensorView};

use crate::encoding::Encoding;
use crate::error::TraceError;
use crate::manifest::Manifest;
use crate::shard;
use crate::writer::SENSITIVITY;

/// Weights of steps and heads in the loss of a plan (both finite, at least 0).
#[derive(Clone, Debug, PartialEq)]
pub struct Sensitivity {
    /// `[steps]`: squared error of the final latent per mean squared error of the step's guided velocity.
    pub step: Vec<f32>,
    /// `[steps, layers, heads]`: mean squared velocity error per unit of dropped deviation.
    pub head: Vec<f32>,
}

impl Sensitivity {
    /// The shapes of `step` and `head` in a trace.
    pub(crate) fn shapes(manifest: &Manifest) -> [(&'static str, Vec<usize>); 2] {
        let steps = manifest.sigmas.len();
        let (layers, heads) = (manifest.model.layers as usize, manifest.model.heads as usize);
        [("step", vec![steps]), ("head", vec![steps, layers, heads])]
    }

    /// The file's bytes, for a trace with this manifest.
    ///
    /// # Errors
    /// If lengths are wrong, or a value is not finite or negative.
    pub(crate) fn render(&self, manifest: &Manifest) -> Result<Vec<u8>, TraceError> {
        let mut tensors = Vec::new();
        for ((name, shape), values) in Self::shapes(manifest).into_iter().zip([&self.step, &self.head]) {
            let (expected, found) = (shape.iter().product(), values.len());
            if found != expected {
                return Err(TraceError::ValueCount { file: SENSITIVITY.into(), tensor: name.into(), expected, found });
            }
            let width = shape[shape.len() - 1];
            if let Some(problem) = shard::check_table(SENSITIVITY, name, width, values).into_iter().next() {
                return Err(problem);
            }
            let mut bytes = Vec::with_capacity(values.len() * 4);
            Encoding::F32.encode(values, &mut bytes);
            tensors.push((name, shape, bytes));
        }
        let views = tensors
            .iter()
            .map(|(name, shape, bytes)| TensorView::new(Dtype::F32, shape.clone(), bytes).map(|view| (*name, view)));
        views
            .collect::<Result<Vec<_>, _>>()
            .and_then(|views| safetensors::serialize(views, None))
            .map_err(|e| TraceError::BadHeader { file: SENSITIVITY.into(), reason: e.to_string() })
    }

    /// Parses the file's bytes.
    pub(crate) fn parse(file: &str, bytes: &[u8], manifest: &Manifest) -> Result<Self, Vec<TraceError>> {
        let (metadata, data) = shard::header(file, bytes).map_err(|e| vec![e])?;
        let mut problems = Vec::new();
        let shapes = Self::shapes(manifest);
        let mut tensors = Vec::new();
        for (tensor, shape) in &shapes {
            let Some(info) = metadata.info(tensor) else {
                problems.push(TraceError::MissingTensor { file: file.into(), tensor: (*tensor).into() });
                continue;
            };
            let before = problems.len();
            shard::check_tensor(file, tensor, info, Encoding::F32, shape, &mut problems);
            if problems.len() == before {
                let (start, end) = info.data_offsets;
                let values = &bytes[data as usize + start..data as usize + end];
                let values: Vec<f32> = Encoding::F32.decode(values).map(|v| v as f32).collect();
                problems.extend(shard::check_table(file, tensor, shape[shape.len() - 1], &values));
                tensors.push(values);
            }
        }
        let known = |name: &String| shapes.iter().any(|(tensor, _)| tensor == name);
        let unknown = metadata.offset_keys().into_iter().filter(|name| !known(name));
        problems.extend(unknown.map(|tensor| TraceError::UnknownTensor { file: file.into(), tensor }));
        match <[Vec<f32>; 2]>::try_from(tensors) {
            Ok([step, head]) if problems.is_empty() => Ok(Self { step, head }),
            _ => Err(problems),
        }
    }
}
