//! Borrowed tensors: device pointers with shapes and strides, and host slices.

use calibc_ir::DType;
use half::{bf16, f16};

use crate::error::{Operand, RuntimeError};
use crate::shape::extent;

/// Strides in elements of a contiguous `[batch, head, token, head_dim]` tensor.
fn bhsd([_, heads, tokens, head_dim]: [usize; 4]) -> [i64; 4] {
    let [h, s, d] = [heads, tokens, head_dim].map(|n| n as i64);
    [h.saturating_mul(s).saturating_mul(d), s.saturating_mul(d), d, 1]
}

/// Strides in elements, in the order `[batch, head, token, head_dim]`, of a contiguous `[batch, token, head, head_dim]` tensor.
fn bshd([_, heads, tokens, head_dim]: [usize; 4]) -> [i64; 4] {
    let [h, s, d] = [heads, tokens, head_dim].map(|n| n as i64);
    [s.saturating_mul(h).saturating_mul(d), d, h.saturating_mul(d), 1]
}

/// A bf16 or fp16 tensor in device memory, borrowed: whoever makes one keeps the memory alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceTensor {
    /// Device address of the first element.
    pub ptr: u64,
    /// Element type.
    pub dtype: DType,
    /// Ordinal of the GPU that holds it.
    pub device: u32,
    /// Logical shape `[batch, head, token, head_dim]`, whatever the order in memory.
    pub shape: [usize; 4],
    /// Strides in elements, in the order of `shape`.
    pub strides: [i64; 4],
}

impl DeviceTensor {
    /// A contiguous `[batch, head, token, head_dim]` tensor; `shape` is in that order.
    pub fn bhsd(ptr: u64, dtype: DType, device: u32, shape: [usize; 4]) -> Self {
        Self { ptr, dtype, device, shape, strides: bhsd(shape) }
    }

    /// A contiguous `[batch, token, head, head_dim]` tensor; `shape` is still `[batch, head, token, head_dim]`.
    pub fn bshd(ptr: u64, dtype: DType, device: u32, shape: [usize; 4]) -> Self {
        Self { ptr, dtype, device, shape, strides: bshd(shape) }
    }
}

/// The log-sum-exp output: f32 in device memory, borrowed; natural logarithm, `-inf` for a query that saw no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceLse {
    /// Device address of the first element.
    pub ptr: u64,
    /// Ordinal of the GPU that holds it.
    pub device: u32,
    /// Shape `[batch, head, token]`.
    pub shape: [usize; 3],
    /// Strides in elements; the last one is 1.
    pub strides: [i64; 3],
}

impl DeviceLse {
    /// A contiguous `[batch, head, token]` tensor.
    pub fn contiguous(ptr: u64, device: u32, shape: [usize; 3]) -> Self {
        let [_, heads, tokens] = shape.map(|n| n as i64);
        Self { ptr, device, shape, strides: [heads.saturating_mul(tokens), tokens, 1] }
    }
}

/// Elements of a host tensor.
#[derive(Clone, Copy, Debug)]
pub enum HostData<'a> {
    /// f32.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// IEEE half.
    Fp16(&'a [f16]),
}

impl HostData<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::Bf16(data) => data.len(),
            Self::Fp16(data) => data.len(),
        }
    }
}

impl<'a> From<&'a [f32]> for HostData<'a> {
    fn from(data: &'a [f32]) -> Self {
        Self::F32(data)
    }
}

impl<'a> From<&'a [bf16]> for HostData<'a> {
    fn from(data: &'a [bf16]) -> Self {
        Self::Bf16(data)
    }
}

impl<'a> From<&'a [f16]> for HostData<'a> {
    fn from(data: &'a [f16]) -> Self {
        Self::Fp16(data)
    }
}

/// A tensor in host memory with logical shape `[batch, head, token, head_dim]`, borrowed. Any strides, bounds checked once.
#[derive(Clone, Copy, Debug)]
pub struct HostTensor<'a> {
    data: HostData<'a>,
    shape: [usize; 4],
    strides: [usize; 4],
}

impl<'a> HostTensor<'a> {
    /// A view with the given strides in elements. `operand` is only named in the error.
    pub fn new(
        operand: Operand,
        data: impl Into<HostData<'a>>,
        shape: [usize; 4],
        strides: [i64; 4],
    ) -> Result<Self, RuntimeError> {
        let data = data.into();
        let fits = extent(&shape, &strides).is_some_and(|end| end <= data.len() as u64);
        if !fits {
            return Err(RuntimeError::Extent { operand, shape: shape.to_vec(), strides: strides.to_vec() });
        }
        // A dimension of size 1 is never stepped along: its stride may be anything.
        let strides = std::array::from_fn(|i| if shape[i] > 1 { strides[i] as usize } else { 0 });
        Ok(Self { data, shape, strides })
    }

    /// A contiguous `[batch, head, token, head_dim]` tensor.
    pub fn bhsd(operand: Operand, data: impl Into<HostData<'a>>, shape: [usize; 4]) -> Result<Self, RuntimeError> {
        Self::new(operand, data, shape, bhsd(shape))
    }

    /// A contiguous `[batch, token, head, head_dim]` tensor; `shape` is still `[batch, head, token, head_dim]`.
    pub fn bshd(operand: Operand, data: impl Into<HostData<'a>>, shape: [usize; 4]) -> Result<Self, RuntimeError> {
        Self::new(operand, data, shape, bshd(shape))
    }

    /// Logical shape `[batch, head, token, head_dim]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Writes the elements of one token of one head, widened to f32, to `row`.
    pub(crate) fn read(&self, batch: usize, head: usize, token: usize, row: &mut [f32]) {
        let [sb, sh, ss, sd] = self.strides;
        let start = batch * sb + head * sh + token * ss;
        match self.data {
            HostData::F32(data) => gather(&data[start..], sd, row, |x| x),
            HostData::Bf16(data) => gather(&data[start..], sd, row, bf16::to_f32),
            HostData::Fp16(data) => gather(&data[start..], sd, row, f16::to_f32),
        }
    }
}

fn gather<T: Copy>(data: &[T], stride: usize, row: &mut [f32], widen: impl Fn(T) -> f32) {
    if stride == 1 {
        row.iter_mut().zip(data).for_each(|(to, &from)| *to = widen(from));
    } else {
        row.iter_mut().enumerate().for_each(|(i, to)| *to = widen(data[i * stride]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_layouts_read_the_same_element() {
        let shape = [2, 3, 5, 4];
        let at = |b: usize, h: usize, s: usize, d: usize| (b * 1000 + h * 100 + s * 10 + d) as f32;
        let mut a = vec![0.0; 120];
        let mut b = vec![0.0; 120];
        for (i, x) in a.iter_mut().enumerate() {
            *x = at(i / 60, i / 20 % 3, i / 4 % 5, i % 4);
        }
        for (i, x) in b.iter_mut().enumerate() {
            *x = at(i / 60, i / 4 % 3, i / 12 % 5, i % 4);
        }
        let tensors = [
            HostTensor::bhsd(Operand::Q, a.as_slice(), shape).unwrap(),
            HostTensor::bshd(Operand::Q, b.as_slice(), shape).unwrap(),
        ];
        for t in tensors {
            let mut row = [0.0; 4];
            t.read(1, 2, 3, &mut row);
            assert_eq!(row, [1230.0, 1231.0, 1232.0, 1233.0]);
        }
    }

    #[test]
    fn views_past_the_end_are_refused() {
        let data = [0.0f32; 120];
        let new = |shape, strides| HostTensor::new(Operand::K, &data[..], shape, strides);
        assert!(new([2, 3, 5, 4], [60, 20, 4, 1]).is_ok());
        assert!(matches!(new([2, 3, 5, 4], [61, 20, 4, 1]), Err(RuntimeError::Extent { operand: Operand::K, .. })));
        assert!(matches!(new([2, 3, 5, 4], [60, 20, -4, 1]), Err(RuntimeError::Extent { .. })));
        assert!(matches!(new([2, 3, 5, 4], [i64::MAX, 20, 4, 1]), Err(RuntimeError::Extent { .. })));
        // Broadcast over heads, and a size-1 batch with a stride that is never used.
        assert!(new([1, 300, 5, 4], [-7, 0, 4, 1]).is_ok());
    }
}
