//! The tensors of a launch as Hopper kernels load them: what a tensor map says, as [`calibc_ir::abi`] lays it down. Needs no GPU.

use calibc_ir::{DType, abi};

use crate::error::Operand;
use crate::launch::LaunchArgs;

/// What the driver's encoder is told of one tensor. Dimensions are innermost first: 64 columns, tokens, 64-column panels of a
/// head, heads, batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMapSpec {
    /// Device address of the first element.
    pub address: u64,
    /// Element type.
    pub dtype: DType,
    /// Sizes, in elements.
    pub dims: [u64; 5],
    /// Strides of the four outer dimensions, in bytes.
    pub strides: [u64; 4],
    /// Sizes of the box one load brings.
    pub box_dims: [u32; 5],
}

impl TensorMapSpec {
    /// The map of `Q`, `K` or `V` of a checked launch; `None` for the outputs, which have none.
    pub fn new(args: &LaunchArgs, operand: Operand) -> Option<Self> {
        let p = &args.params;
        let (address, tokens, [token, head, batch]) = match operand {
            Operand::Q => (p.q, p.q_len, [p.q_token_stride, p.q_head_stride, p.q_batch_stride]),
            Operand::K => (p.k, p.kv_len, [p.k_token_stride, p.k_head_stride, p.k_batch_stride]),
            Operand::V => (p.v, p.kv_len, [p.v_token_stride, p.v_head_stride, p.v_batch_stride]),
            Operand::Out | Operand::Lse | Operand::Energy | Operand::Deviation => return None,
        };
        let head_dim = args.variant.head_dim;
        let panels = head_dim / abi::TENSOR_MAP_COLUMNS;
        // Nothing steps along a dimension of size 1, but the encoder wants a multiple of 16 there too: a row of one head is one.
        // A checked stride is not negative, and twice it is an address difference inside the tensor.
        let bytes = |stride: i64, size: u32| 2 * if size > 1 { stride as u64 } else { u64::from(head_dim) };
        Some(Self {
            address,
            dtype: args.variant.dtype,
            dims: [abi::TENSOR_MAP_COLUMNS, tokens, panels, p.num_heads, p.batch].map(u64::from),
            strides: [
                bytes(token, tokens),
                2 * u64::from(abi::TENSOR_MAP_COLUMNS),
                bytes(head, p.num_heads),
                bytes(batch, p.batch),
            ],
            box_dims: [abi::TENSOR_MAP_COLUMNS, abi::tensor_map_tokens(head_dim), 1, 1, 1],
        })
    }
}

#[cfg(test)]
mod tests {
    use calibc_ir::Variant;
    use proptest::prelude::*;

    use super::*;
    use crate::launch::Params;
    use crate::tensor::DeviceTensor;

    fn args(shapes: [[usize; 4]; 2], strides: [i64; 4]) -> LaunchArgs {
        let [q, kv] = shapes;
        let variant = Variant { dtype: DType::Fp16, head_dim: q[3] as u32, lse: false, anchors: false, ragged: true };
        let params = Params {
            q: 1 << 40,
            k: 2 << 40,
            v: 3 << 40,
            q_batch_stride: strides[0],
            q_head_stride: strides[1],
            q_token_stride: strides[2],
            num_heads: q[1] as u32,
            batch: q[0] as u32,
            q_len: q[2] as u32,
            kv_len: kv[2] as u32,
            ..Params::default()
        };
        LaunchArgs { variant, params, items: 1, splits: false }
    }

    #[test]
    fn both_memory_orders_are_strides() {
        let shapes = [[2, 3, 300, 128], [2, 3, 40, 128]];
        let order = |make: fn(u64, DType, u32, [usize; 4]) -> DeviceTensor| make(0, DType::Fp16, 0, shapes[0]).strides;
        let map = TensorMapSpec::new(&args(shapes, order(DeviceTensor::bhsd)), Operand::Q).unwrap();
        assert_eq!((map.address, map.dtype), (1 << 40, DType::Fp16));
        assert_eq!(map.dims, [64, 300, 2, 3, 2]);
        assert_eq!(map.strides, [256, 128, 300 * 256, 3 * 300 * 256]);
        assert_eq!(map.box_dims, [64, 128, 1, 1, 1]);
        let map = TensorMapSpec::new(&args(shapes, order(DeviceTensor::bshd)), Operand::Q).unwrap();
        assert_eq!(map.strides, [3 * 256, 128, 256, 300 * 3 * 256]);
    }

    #[test]
    fn keys_and_values_have_their_own_length_and_outputs_no_map() {
        let args = args([[1, 1, 300, 64], [1, 1, 40, 64]], [0; 4]);
        for (operand, address) in [(Operand::K, 2 << 40), (Operand::V, 3 << 40)] {
            let map = TensorMapSpec::new(&args, operand).unwrap();
            assert_eq!((map.address, map.dims, map.box_dims), (address, [64, 40, 1, 1, 1], [64, 64, 1, 1, 1]));
        }
        for operand in [Operand::Out, Operand::Lse] {
            assert_eq!(TensorMapSpec::new(&args, operand), None);
        }
    }

    proptest! {
        /// Whatever passes the launch's checks is legal to the encoder, as far as strides of tensors below 2^40 bytes go.
        #[test]
        fn strides_are_multiples_of_16_whatever_the_caller_passes(
            batch in 1..4_usize, heads in 1..4_usize, tokens in 1..300_usize, wide: bool, odd in -99..99_i64, steps in 0..1000_i64,
        ) {
            let head_dim = if wide { 128 } else { 64 };
            let shape = [batch, heads, tokens, head_dim];
            // Along a dimension of size 1 anything goes; elsewhere multiples of 8 elements.
            let stride = |size: usize| if size == 1 { odd } else { 8 * steps };
            let args = args([shape, shape], [stride(batch), stride(heads), stride(tokens), 1]);
            let map = TensorMapSpec::new(&args, Operand::Q).unwrap();
            for (stride, size) in map.strides.into_iter().zip(&map.dims[1..]) {
                prop_assert!(stride % 16 == 0 && stride < 1 << 40, "{map:?}");
                prop_assert!(*size > 1 || stride > 0, "{map:?}");
            }
        }
    }
}
