//! Tensors in and out: safetensors files, random inputs, rounding.

use std::path::Path;

use calibc_ir::DType;
use calibc_runtime::{HostTensor, Operand, RuntimeError};
use calibc_trace::random::SplitMix64;
use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata, TensorView};
use safetensors::{SafeTensorError, SafeTensors};

use crate::exit::Failure;

/// Elements as they are stored.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Data {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    Fp16(Vec<f16>),
}

/// A tensor in host memory.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tensor {
    pub(crate) data: Data,
    /// Logical shape `[batch, head, token, head_dim]`.
    pub(crate) shape: [usize; 4],
    /// Whether memory is `[batch, token, head, head_dim]`.
    pub(crate) tokens_major: bool,
}

impl Tensor {
    /// The tensor as the runtime sees it.
    pub(crate) fn view(&self, operand: Operand) -> Result<HostTensor<'_>, RuntimeError> {
        macro_rules! of {
            ($data:expr) => {
                if self.tokens_major {
                    HostTensor::bshd(operand, $data.as_slice(), self.shape)
                } else {
                    HostTensor::bhsd(operand, $data.as_slice(), self.shape)
                }
            };
        }
        match &self.data {
            Data::F32(data) => of!(data),
            Data::Bf16(data) => of!(data),
            Data::Fp16(data) => of!(data),
        }
    }

    /// The element type, unless it is f32.
    pub(crate) fn dtype(&self) -> Option<DType> {
        match self.data {
            Data::F32(_) => None,
            Data::Bf16(_) => Some(DType::Bf16),
            Data::Fp16(_) => Some(DType::Fp16),
        }
    }

    /// Contiguous `[batch, head, token, head_dim]` values, rounded to the element type of `like` and in its memory order.
    pub(crate) fn from_f32(values: Vec<f32>, shape: [usize; 4], like: &Self) -> Self {
        let values = if like.tokens_major { swap_heads_and_tokens(&values, shape) } else { values };
        let data = match like.data {
            Data::F32(_) => Data::F32(values),
            Data::Bf16(_) => Data::Bf16(values.into_iter().map(bf16::from_f32).collect()),
            Data::Fp16(_) => Data::Fp16(values.into_iter().map(f16::from_f32).collect()),
        };
        Self { data, shape, tokens_major: like.tokens_major }
    }

    /// The values in memory order, widened.
    pub(crate) fn into_f32(self) -> Vec<f32> {
        match self.data {
            Data::F32(values) => values,
            Data::Bf16(values) => values.into_iter().map(bf16::to_f32).collect(),
            Data::Fp16(values) => values.into_iter().map(f16::to_f32).collect(),
        }
    }

    /// The shape as it is in memory.
    pub(crate) fn stored_shape(&self) -> Vec<usize> {
        let [b, h, s, d] = self.shape;
        if self.tokens_major { vec![b, s, h, d] } else { vec![b, h, s, d] }
    }

    /// Type and bytes for a safetensors file.
    pub(crate) fn stored(&self) -> (Dtype, Vec<u8>) {
        match &self.data {
            Data::F32(data) => (Dtype::F32, data.iter().flat_map(|x| x.to_le_bytes()).collect()),
            Data::Bf16(data) => (Dtype::BF16, data.iter().flat_map(|x| x.to_le_bytes()).collect()),
            Data::Fp16(data) => (Dtype::F16, data.iter().flat_map(|x| x.to_le_bytes()).collect()),
        }
    }
}

/// `[batch, head, token, head_dim]` to `[batch, token, head, head_dim]`.
fn swap_heads_and_tokens(values: &[f32], [batch, heads, tokens, dim]: [usize; 4]) -> Vec<f32> {
    let mut swapped = Vec::with_capacity(values.len());
    for b in 0..batch {
        for s in 0..tokens {
            for h in 0..heads {
                let at = ((b * heads + h) * tokens + s) * dim;
                swapped.extend_from_slice(&values[at..at + dim]);
            }
        }
    }
    swapped
}

/// `q`, `k` and `v` of the safetensors file at `path`.
pub(crate) fn read_qkv(path: &Path, tokens_major: bool) -> Result<[Tensor; 3], Failure> {
    let io = |e| Failure::io("read", path, e);
    // Asked before opening: a pipe makes readers wait, a device may have no end.
    if !path.metadata().map_err(io)?.is_file() {
        return Err(io(std::io::Error::other("not a regular file")));
    }
    let raw = std::fs::read(path).map_err(io)?;
    let wrong = |what: String| Failure::bad_input(format_args!("{}: {what}", path.display()));
    let unsound = |e| wrong(format!("not a sound safetensors file ({e}); write q, k and v with safetensors"));
    fills(&raw).map_err(unsound)?;
    let file = SafeTensors::deserialize(&raw).map_err(unsound)?;
    let read = |name: &str| {
        let view = file.tensor(name).map_err(|_| {
            let mut names = file.names();
            names.sort_unstable();
            let there = if names.is_empty() { "nothing".to_owned() } else { names.join(", ") };
            wrong(format!("there is no tensor `{name}`, only {there}; name the inputs q, k and v"))
        })?;
        let &[b, x, y, d] = view.shape() else {
            let order =
                if tokens_major { "[batch, tokens, heads, head_dim]" } else { "[batch, heads, tokens, head_dim]" };
            return Err(wrong(format!("`{name}` has shape {:?}; it must be {order}", view.shape())));
        };
        let shape = if tokens_major { [b, y, x, d] } else { [b, x, y, d] };
        let data = match view.dtype() {
            Dtype::F32 => Data::F32(elements(view.data(), f32::from_le_bytes)),
            Dtype::BF16 => Data::Bf16(elements(view.data(), bf16::from_le_bytes)),
            Dtype::F16 => Data::Fp16(elements(view.data(), f16::from_le_bytes)),
            other => return Err(wrong(format!("`{name}` is {other:?}; give BF16, F16 or F32"))),
        };
        Ok(Tensor { data, shape, tokens_major })
    };
    Ok([read("q")?, read("k")?, read("v")?])
}

/// Whether the tensors take the bytes after the header, all of them. `SafeTensors` sums up the same without looking for
/// overflow, and panics on a header that describes nearly 2^64 bytes.
fn fills(raw: &[u8]) -> Result<(), SafeTensorError> {
    let (length, rest) = raw.split_first_chunk::<8>().ok_or(SafeTensorError::HeaderTooSmall)?;
    let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| SafeTensorError::HeaderTooLarge)?;
    let (header, data) = rest.split_at_checked(length).ok_or(SafeTensorError::InvalidHeaderLength)?;
    let metadata: Metadata = serde_json::from_slice(header).map_err(SafeTensorError::InvalidHeaderDeserialization)?;
    if metadata.data_len() == data.len() { Ok(()) } else { Err(SafeTensorError::MetadataIncompleteBuffer) }
}

fn elements<T, const N: usize>(bytes: &[u8], from: fn([u8; N]) -> T) -> Vec<T> {
    let (chunks, _) = bytes.as_chunks::<N>();
    chunks.iter().map(|&chunk| from(chunk)).collect()
}

/// Writes `out`, and `lse` where there is one, to `path`.
pub(crate) fn write_out(path: &Path, out: &Tensor, lse: Option<(&[f32], [usize; 3])>) -> Result<(), Failure> {
    let (dtype, bytes) = out.stored();
    let lse: Option<(Vec<u8>, Vec<usize>)> =
        lse.map(|(lse, shape)| (lse.iter().flat_map(|x| x.to_le_bytes()).collect(), shape.to_vec()));
    let internal = |e| Failure::new(crate::exit::Exit::Internal, e);
    let mut views = vec![("out", TensorView::new(dtype, out.stored_shape(), &bytes).map_err(internal)?)];
    if let Some((bytes, shape)) = &lse {
        views.push(("lse", TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(internal)?));
    }
    let file = safetensors::serialize(views, None).map_err(internal)?;
    Ok(calibc_bundle::write(path, &file)?)
}

/// Near enough to a standard normal for test inputs: twelve uniforms.
pub(crate) fn normal(random: &mut SplitMix64) -> f32 {
    // Six 10-bit uniforms of each draw.
    let sum: u64 = (0..2).map(|_| random.next()).map(|z| (0..6).map(|i| z >> (10 * i) & 1023).sum::<u64>()).sum();
    sum as f32 / 1023.0 - 6.0
}

/// A contiguous random tensor of logical shape `shape` in a random memory order, rounded to `dtype`, or f32 without one.
pub(crate) fn random(random: &mut SplitMix64, shape: [usize; 4], dtype: Option<DType>) -> Tensor {
    let n = shape.iter().product();
    let tokens_major = random.below(2) == 1;
    let values = std::iter::repeat_with(|| normal(random)).take(n);
    let data = match dtype {
        None => Data::F32(values.collect()),
        Some(DType::Bf16) => Data::Bf16(values.map(bf16::from_f32).collect()),
        Some(DType::Fp16) => Data::Fp16(values.map(f16::from_f32).collect()),
    };
    Tensor { data, shape, tokens_major }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_round_trip_in_both_orders() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        let values: Vec<f32> = (0..48).map(|i| i as f32).collect();
        for tokens_major in [false, true] {
            for data in [Data::F32(vec![]), Data::Bf16(vec![]), Data::Fp16(vec![])] {
                let like = Tensor { data, shape: [0; 4], tokens_major };
                let tensor = Tensor::from_f32(values.clone(), [1, 3, 4, 4], &like);
                let (dtype, bytes) = tensor.stored();
                let views =
                    ["q", "k", "v"].map(|name| (name, TensorView::new(dtype, tensor.stored_shape(), &bytes).unwrap()));
                std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
                assert_eq!(read_qkv(&path, tokens_major).unwrap(), [tensor.clone(), tensor.clone(), tensor]);
            }
        }
    }

    #[test]
    fn random_inputs_are_normal_and_reproducible() {
        let draw = |seed| match random(&mut SplitMix64::new(seed), [1, 1, 100, 100], None).data {
            Data::F32(values) => values,
            _ => unreachable!("f32 was asked for"),
        };
        let values = draw(7);
        assert_eq!(values, draw(7));
        assert_ne!(values, draw(8));
        let mean = values.iter().sum::<f32>() / 1e4;
        let variance = values.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / 1e4;
        assert!(mean.abs() < 0.05 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
    }
}
