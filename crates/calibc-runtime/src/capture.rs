//! One capture: a dense attention's tensors and where its block statistics go, checked, as the parameter struct capture kernels take.
//! Needs no GPU. What the statistics are, and which rows are sampled: [`calibc_ir::capture`] and [`crate::reference::capture`].

use calibc_ir::capture::{ROWS_PER_BLOCK, TILE_ROWS};
use calibc_ir::{BLOCK, DType, MAX_TOKENS, abi};

use crate::error::{Dim, Operand, RuntimeError};
use crate::launch::{check_extent, check_pointer, check_strides, check_tensor};
use crate::tensor::{DeviceLse, DeviceTensor};
use crate::tensor_map::TensorMapSpec;

/// Most heads of one launch: the second dimension of a CUDA grid.
const MAX_HEADS: usize = 65_535;

/// What a compiled capture kernel is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CaptureCode<'a> {
    /// Machine code for the GPU.
    pub cubin: &'a [u8],
    /// Its entry point.
    pub symbol: &'a str,
    /// How it is built.
    pub family: calibc_ir::Family,
    /// Element type of q, k, v and out.
    pub dtype: DType,
    /// Head dimension.
    pub head_dim: u32,
    /// Bytes of a statistic: 4 for f32, 1 for `log2-u8` codes.
    pub statistic_bytes: u32,
    /// Threads per CTA.
    pub threads: u32,
    /// Dynamic shared memory in bytes.
    pub shared_bytes: u32,
}

/// One call of [`crate::cuda::CaptureKernel::block_statistics`]. Tensors have one batch element.
#[derive(Clone, Copy, Debug)]
pub struct CaptureCall<'a> {
    /// Queries.
    pub q: &'a DeviceTensor,
    /// Keys.
    pub k: &'a DeviceTensor,
    /// Values.
    pub v: &'a DeviceTensor,
    /// The dense attention's output, of the shape of q.
    pub out: &'a DeviceTensor,
    /// Its log-sum-exp, natural logarithm.
    pub lse: &'a DeviceLse,
    /// Rows that stand for a query block, one of [`ROWS_PER_BLOCK`]; 128 is all.
    pub rows_per_block: u32,
    /// Which rows; see [`calibc_ir::capture::seed`].
    pub seed: u64,
    /// Factor on the scores; `1 / sqrt(head_dim)` if absent.
    pub softmax_scale: Option<f32>,
    /// Device address of the energies, `[heads, q_blocks, kv_blocks]`, contiguous.
    pub energy: u64,
    /// Device address of the deviations, alike.
    pub deviation: u64,
}

/// The parameter struct of a capture kernel, laid out as [`calibc_ir::capture::PARAMS`] says.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[expect(missing_docs, reason = "each field is described by its name in calibc_ir::capture::PARAMS")]
pub struct CaptureParams {
    pub q: u64,
    pub k: u64,
    pub v: u64,
    pub out: u64,
    pub lse: u64,
    pub energy: u64,
    pub deviation: u64,
    pub q_head_stride: i64,
    pub q_token_stride: i64,
    pub k_head_stride: i64,
    pub k_token_stride: i64,
    pub v_head_stride: i64,
    pub v_token_stride: i64,
    pub out_head_stride: i64,
    pub out_token_stride: i64,
    pub lse_head_stride: i64,
    pub seed_low: u32,
    pub seed_high: u32,
    pub q_len: u32,
    pub kv_len: u32,
    pub num_q_blocks: u32,
    pub num_kv_blocks: u32,
    pub rows_per_block: u32,
    pub scale_log2: f32,
}

/// A checked capture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CaptureArgs {
    /// The parameter struct.
    pub params: CaptureParams,
    /// CTAs.
    pub grid: [u32; 3],
    /// What the kernel's tensor maps of k and v say.
    pub maps: [TensorMapSpec; 2],
}

impl CaptureArgs {
    /// Checks a call for `code` on GPU `device`.
    ///
    /// # Errors
    /// Whatever would make the kernel read or write wrong memory, each with its own error.
    pub fn new(code: &CaptureCode<'_>, device: u32, call: &CaptureCall<'_>) -> Result<Self, RuntimeError> {
        let &CaptureCall { q, k, v, out, lse, rows_per_block, seed, softmax_scale, energy, deviation } = call;
        if !ROWS_PER_BLOCK.contains(&rows_per_block) {
            return Err(RuntimeError::RowsPerBlock { rows: rows_per_block });
        }
        let scale = softmax_scale.unwrap_or_else(|| 1.0 / (code.head_dim as f32).sqrt());
        if !(scale.is_finite() && scale > 0.0) {
            return Err(RuntimeError::Scale { scale });
        }
        let heads = q.shape[1];
        let tensors = [(Operand::Q, q), (Operand::K, k), (Operand::V, v), (Operand::Out, out)];
        for (operand, tensor) in tensors {
            if tensor.dtype != code.dtype {
                return Err(RuntimeError::CaptureDType { operand, got: tensor.dtype, want: code.dtype });
            }
            let tokens = if matches!(operand, Operand::Q | Operand::Out) { q.shape[2] } else { k.shape[2] };
            let want = [1, heads, tokens, code.head_dim as usize];
            check_shape(operand, &tensor.shape, &want)?;
        }
        check_shape(Operand::Lse, &lse.shape, &[1, heads, q.shape[2]])?;
        if heads == 0 || heads > MAX_HEADS {
            return Err(RuntimeError::CaptureSize { operand: Operand::Q, dim: Dim::Head, got: heads, most: MAX_HEADS });
        }
        let [q_len, kv_len] = [(Operand::Q, q), (Operand::K, k)].map(|(operand, tensor)| {
            let (got, most) = (tensor.shape[2], MAX_TOKENS as usize);
            let size = RuntimeError::CaptureSize { operand, dim: Dim::Token, got, most };
            if (1..=most).contains(&got) { Ok(got as u32) } else { Err(size) }
        });
        let (q_len, kv_len) = (q_len?, kv_len?);
        let [[_, q_head, q_token], [_, k_head, k_token], [_, v_head, v_token], [_, out_head, out_token]] = {
            let mut strides = [[0; 4]; 4];
            for (to, (operand, tensor)) in strides.iter_mut().zip(tensors) {
                let [batch, head, token] = check_tensor(operand, tensor, device)?;
                *to = [0, batch, head, token];
            }
            strides.map(|[_, batch, head, token]| [batch, head, token])
        };
        check_pointer(Operand::Lse, lse.ptr, 4, lse.device, device)?;
        check_strides(Operand::Lse, &lse.shape, &lse.strides, &Dim::ALL[..3])?;
        check_extent(Operand::Lse, lse.ptr, 4, &lse.shape, &lse.strides)?;
        let (num_q_blocks, num_kv_blocks) = (q_len.div_ceil(BLOCK), kv_len.div_ceil(BLOCK));
        let shape = [heads, num_q_blocks as usize, num_kv_blocks as usize];
        let strides = [shape[1] as i64 * shape[2] as i64, shape[2] as i64, 1];
        let bytes = u64::from(code.statistic_bytes);
        for (operand, ptr) in [(Operand::Energy, energy), (Operand::Deviation, deviation)] {
            check_pointer(operand, ptr, bytes, device, device)?;
            check_extent(operand, ptr, bytes, &shape, &strides)?;
        }
        let map = |address: u64, head: i64, token: i64| {
            let panels = code.head_dim / abi::TENSOR_MAP_COLUMNS;
            // Nothing steps along a dimension of size 1, but the encoder wants a multiple of 16 there too.
            let bytes = |stride: i64, size: u32| 2 * if size > 1 { stride as u64 } else { u64::from(code.head_dim) };
            TensorMapSpec {
                address,
                dtype: code.dtype,
                dims: [abi::TENSOR_MAP_COLUMNS, kv_len, panels, heads as u32, 1].map(u64::from),
                strides: [
                    bytes(token, kv_len),
                    2 * u64::from(abi::TENSOR_MAP_COLUMNS),
                    bytes(head, heads as u32),
                    bytes(0, 1),
                ],
                box_dims: [abi::TENSOR_MAP_COLUMNS, BLOCK, panels, 1, 1],
            }
        };
        let params = CaptureParams {
            q: q.ptr,
            k: k.ptr,
            v: v.ptr,
            out: out.ptr,
            lse: lse.ptr,
            energy,
            deviation,
            q_head_stride: q_head,
            q_token_stride: q_token,
            k_head_stride: k_head,
            k_token_stride: k_token,
            v_head_stride: v_head,
            v_token_stride: v_token,
            out_head_stride: out_head,
            out_token_stride: out_token,
            lse_head_stride: if heads > 1 { lse.strides[1] } else { 0 },
            seed_low: seed as u32,
            seed_high: (seed >> 32) as u32,
            q_len,
            kv_len,
            num_q_blocks,
            num_kv_blocks,
            rows_per_block,
            scale_log2: (f64::from(scale) * std::f64::consts::LOG2_E) as f32,
        };
        Ok(Self {
            params,
            // A sequence has at most 2^22 tokens: the product fits.
            grid: [(num_q_blocks * rows_per_block).div_ceil(TILE_ROWS), heads as u32, 1],
            maps: [map(k.ptr, k_head, k_token), map(v.ptr, v_head, v_token)],
        })
    }
}

fn check_shape(operand: Operand, shape: &[usize], want: &[usize]) -> Result<(), RuntimeError> {
    for ((dim, &got), &want) in Dim::ALL.into_iter().zip(shape).zip(want) {
        if got != want {
            return Err(RuntimeError::CaptureShape { operand, dim, got, want });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use calibc_ir::Family;
    use calibc_ir::capture::PARAMS;

    use super::*;

    #[test]
    fn the_struct_is_the_launch_contract() {
        macro_rules! offsets {
            ($($field:ident)*) => { [$((stringify!($field), offset_of!(CaptureParams, $field))),*] };
        }
        let offsets = offsets!(q k v out lse energy deviation q_head_stride q_token_stride k_head_stride k_token_stride
            v_head_stride v_token_stride out_head_stride out_token_stride lse_head_stride seed_low seed_high q_len kv_len
            num_q_blocks num_kv_blocks rows_per_block scale_log2);
        let mut at = 0;
        let want: Vec<_> = (PARAMS.iter())
            .map(|&(name, scalar)| {
                at += scalar.size() as usize;
                (name, at - scalar.size() as usize)
            })
            .collect();
        assert_eq!(offsets.to_vec(), want);
        assert_eq!(size_of::<CaptureParams>(), at);
    }

    const PTR: u64 = 1 << 30;

    struct Sample {
        tensors: [DeviceTensor; 4],
        lse: DeviceLse,
        rows: u32,
        scale: Option<f32>,
        outputs: [u64; 2],
    }

    impl Sample {
        fn new() -> Self {
            let q = DeviceTensor::bshd(PTR, DType::Bf16, 1, [1, 3, 300, 128]);
            let k = DeviceTensor::bhsd(2 * PTR, DType::Bf16, 1, [1, 3, 200, 128]);
            let lse = DeviceLse::contiguous(PTR, 1, [1, 3, 300]);
            Self { tensors: [q, k, k, q], lse, rows: 16, scale: None, outputs: [PTR, PTR] }
        }

        fn run(&self) -> Result<CaptureArgs, RuntimeError> {
            let code = CaptureCode {
                cubin: &[],
                symbol: "",
                family: Family::Hopper,
                dtype: DType::Bf16,
                head_dim: 128,
                statistic_bytes: 4,
                threads: 384,
                shared_bytes: 0,
            };
            let [q, k, v, out] = &self.tensors;
            let [energy, deviation] = self.outputs;
            let call = CaptureCall {
                q,
                k,
                v,
                out,
                lse: &self.lse,
                rows_per_block: self.rows,
                seed: 0x1_0000_0002,
                softmax_scale: self.scale,
                energy,
                deviation,
            };
            CaptureArgs::new(&code, 1, &call)
        }
    }

    #[test]
    fn a_right_call_becomes_a_launch() {
        let args = Sample::new().run().unwrap();
        assert_eq!(args.grid, [1, 3, 1]);
        let p = args.params;
        assert_eq!((p.num_q_blocks, p.num_kv_blocks, p.q_len, p.kv_len), (3, 2, 300, 200));
        assert_eq!((p.q_head_stride, p.q_token_stride, p.k_head_stride, p.k_token_stride), (128, 384, 200 * 128, 128));
        assert_eq!((p.seed_low, p.seed_high, p.lse_head_stride), (2, 1, 300));
        assert!((f64::from(p.scale_log2) - std::f64::consts::LOG2_E / 128f64.sqrt()).abs() < 1e-8);
        assert_eq!(args.maps[0].dims, [64, 200, 2, 3, 1]);
        assert_eq!(args.maps[1].strides, [256, 128, 200 * 256, 256]);
        assert_eq!(Sample { rows: 128, ..Sample::new() }.run().unwrap().grid, [3, 3, 1]);
    }

    #[test]
    fn wrong_calls_are_refused() {
        type E = RuntimeError;
        let error = |change: &dyn Fn(&mut Sample)| {
            let mut sample = Sample::new();
            change(&mut sample);
            sample.run().unwrap_err()
        };
        assert!(matches!(error(&|s| s.rows = 24), E::RowsPerBlock { rows: 24 }));
        assert!(matches!(error(&|s| s.scale = Some(0.0)), E::Scale { .. }));
        let shape = |operand, dim| move |e: E| matches!(e, E::CaptureShape { operand: o, dim: d, .. } if (o, d) == (operand, dim));
        assert!(shape(Operand::Q, Dim::Batch)(error(&|s| s.tensors[0].shape[0] = 2)));
        assert!(shape(Operand::K, Dim::Head)(error(&|s| s.tensors[1].shape[1] = 2)));
        assert!(shape(Operand::V, Dim::Token)(error(&|s| s.tensors[2].shape[2] = 199)));
        assert!(shape(Operand::Out, Dim::Token)(error(&|s| s.tensors[3].shape[2] = 299)));
        assert!(shape(Operand::Q, Dim::HeadDim)(error(&|s| s.tensors[0].shape[3] = 64)));
        assert!(shape(Operand::Lse, Dim::Token)(error(&|s| s.lse.shape[2] = 1)));
        let none = error(&|s| s.tensors.iter_mut().for_each(|t| t.shape[2] = 0));
        assert!(matches!(none, E::CaptureShape { operand: Operand::Lse, .. }));
        let no_keys = error(&|s| s.tensors[1..3].iter_mut().for_each(|t| t.shape[2] = 0));
        assert!(matches!(no_keys, E::CaptureSize { operand: Operand::K, dim: Dim::Token, got: 0, .. }));
        let other = error(&|s| s.tensors[1].dtype = DType::Fp16);
        assert!(matches!(other, E::CaptureDType { operand: Operand::K, got: DType::Fp16, want: DType::Bf16 }));
        assert!(matches!(error(&|s| s.outputs[0] = 0), E::Null { operand: Operand::Energy }));
        assert!(matches!(error(&|s| s.outputs[1] += 2), E::Alignment { operand: Operand::Deviation, align: 4, .. }));
        assert!(matches!(error(&|s| s.outputs[1] = u64::MAX - 3), E::Extent { operand: Operand::Deviation, .. }));
        assert!(matches!(error(&|s| s.tensors[2].ptr += 2), E::Alignment { operand: Operand::V, .. }));
        assert!(matches!(error(&|s| s.tensors[2].device = 0), E::Device { operand: Operand::V, .. }));
        assert!(matches!(error(&|s| s.tensors[3].strides[2] = 130), E::StrideAlignment { operand: Operand::Out, .. }));
        assert!(matches!(error(&|s| s.lse.strides[2] = 2), E::InnerStride { operand: Operand::Lse, .. }));
    }
}
