//! Tensor maps: what [`TensorMapSpec`] says, as the opaque bytes that Hopper kernels take by value. Host work alone: nothing is
//! allocated, nothing reaches the GPU.

use calibc_ir::{DType, abi};
use cudarc::driver::result::DriverError;
use cudarc::driver::sys;

use super::device::text;
use crate::error::{Operand, RuntimeError};
use crate::launch::{Call, LaunchArgs};
use crate::tensor::DeviceTensor;
use crate::tensor_map::TensorMapSpec;

/// The operands that have a map, in the order of [`abi::TENSOR_MAPS`].
const MAPPED: [Operand; 3] = [Operand::Q, Operand::K, Operand::V];

/// The maps of q, k and v, in the order of the kernel's parameters.
///
/// # Errors
/// [`RuntimeError::TensorMap`] for the first tensor that the driver refuses.
pub(super) fn tensor_maps(call: &Call<'_>, args: &LaunchArgs) -> Result<[sys::CUtensorMap; 3], RuntimeError> {
    let mut maps = [sys::CUtensorMap { opaque: [0; 16] }; 3];
    for (to, (operand, tensor)) in maps.iter_mut().zip(MAPPED.into_iter().zip([call.q, call.k, call.v])) {
        let spec = TensorMapSpec::new(args, operand).expect("inputs have a map");
        tensor_map(to, &spec, operand, tensor)?;
    }
    Ok(maps)
}

/// Writes one map.
///
/// # Errors
/// [`RuntimeError::TensorMap`] if the driver refuses it.
pub(super) fn tensor_map(
    to: &mut sys::CUtensorMap,
    spec: &TensorMapSpec,
    operand: Operand,
    tensor: &DeviceTensor,
) -> Result<(), RuntimeError> {
    encode(to, spec).map_err(|error| refused(operand, tensor, error))
}

fn encode(to: &mut sys::CUtensorMap, spec: &TensorMapSpec) -> Result<(), DriverError> {
    let &TensorMapSpec { address, dtype, dims, strides, box_dims } = spec;
    let dtype = match dtype {
        DType::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        DType::Fp16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    };
    // SAFETY: the arrays have the lengths that rank 5 asks for and are only read; `to` has the size and alignment of a tensor map
    // (asserted below). The address is stored, not followed.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            to,
            dtype,
            dims.len() as u32,
            address as usize as *mut std::ffi::c_void,
            dims.as_ptr(),
            strides.as_ptr(),
            box_dims.as_ptr(),
            [1; 5].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
}

/// Off the path of a launch: it allocates.
#[cold]
fn refused(operand: Operand, tensor: &DeviceTensor, error: DriverError) -> RuntimeError {
    let (shape, strides) = (tensor.shape.to_vec(), tensor.strides.to_vec());
    let (name, message) = text(error);
    RuntimeError::TensorMap { operand, shape, strides, name, message }
}

const _: () = {
    assert!(MAPPED.len() == abi::TENSOR_MAPS.len());
    assert!(size_of::<sys::CUtensorMap>() == abi::TENSOR_MAP_BYTES as usize);
    assert!(align_of::<sys::CUtensorMap>() >= abi::TENSOR_MAP_ALIGN as usize);
};
