//! One launch: what a call asks, checked against the plan, as the parameter struct kernels take. Needs no GPU.

use calibc_ir::{DType, Family, Plan, Variant, abi};

use crate::error::{Dim, Operand, RuntimeError};
use crate::shape::{Lengths, Shape, extent, same};
use crate::step_image::splits;
use crate::tensor::{DeviceLse, DeviceTensor};

/// Most problems of one launch: the second dimension of a CUDA grid.
const MAX_BATCH: usize = 65_535;

/// Most work items of a launch, over the batch.
const MAX_WORK: u64 = i32::MAX as u64;

/// Kernels read and write 16 bytes at a time.
const ALIGN_BYTES: u64 = 16;
const ALIGN_ELEMENTS: i64 = 8;

/// Where the denoising step of a call comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepArg {
    /// The step's index.
    Host(u32),
    /// Device address of a `u32` that holds the index when the kernel runs: what a captured graph replays with. A value past
    /// the last step makes the launch write nothing.
    Device(u64),
}

/// One call of [`crate::cuda::Engine::attention`].
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// The denoising step.
    pub step: StepArg,
    /// The layer.
    pub layer: u32,
    /// Queries.
    pub q: &'a DeviceTensor,
    /// Keys.
    pub k: &'a DeviceTensor,
    /// Values.
    pub v: &'a DeviceTensor,
    /// The output, of the shape of q.
    pub out: &'a DeviceTensor,
    /// The log-sum-exp output `[batch, head, token]`, if wanted.
    pub lse: Option<&'a DeviceLse>,
    /// Factor on the scores; `1 / sqrt(head_dim)` if absent.
    pub softmax_scale: Option<f32>,
}

/// The parameter struct of every kernel, laid out as [`calibc_ir::abi::PARAMS`] says. Four bytes of padding end it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[expect(missing_docs, reason = "each field is described by its name in calibc_ir::abi::PARAMS")]
pub struct Params {
    pub q: u64,
    pub k: u64,
    pub v: u64,
    pub out: u64,
    pub lse: u64,
    pub step_ptr: u64,
    pub steps: u64,
    pub anchor_queries: u64,
    pub anchor_copy_ptr: u64,
    pub anchor_copies: u64,
    pub partials: u64,
    pub arrivals: u64,
    pub q_batch_stride: i64,
    pub q_head_stride: i64,
    pub q_token_stride: i64,
    pub k_batch_stride: i64,
    pub k_head_stride: i64,
    pub k_token_stride: i64,
    pub v_batch_stride: i64,
    pub v_head_stride: i64,
    pub v_token_stride: i64,
    pub out_batch_stride: i64,
    pub out_head_stride: i64,
    pub out_token_stride: i64,
    pub lse_batch_stride: i64,
    pub lse_head_stride: i64,
    pub step: u32,
    pub num_steps: u32,
    pub layer: u32,
    pub num_heads: u32,
    pub batch: u32,
    pub q_len: u32,
    pub kv_len: u32,
    pub num_q_blocks: u32,
    pub num_kv_blocks: u32,
    pub num_anchor_queries: u32,
    pub scale_log2: f32,
}

/// What launches need of a plan, computed once so that a call looks nothing up that grows with the plan.
#[derive(Clone, Debug)]
pub struct LaunchPlan {
    shape: Shape,
    num_steps: u32,
    num_layers: u32,
    num_q_blocks: u32,
    num_kv_blocks: u32,
    variants: Vec<Variant>,
    /// Items of each (step, layer), step-major.
    items: Vec<u32>,
    /// Items of each layer's longest list.
    longest: Vec<u32>,
    /// Whether the tiles of each (step, layer) are all of one length, step-major.
    splits: Vec<bool>,
    /// Whether they are at any step, by layer.
    may_split: Vec<bool>,
}

impl LaunchPlan {
    /// Prepares a scheduled plan that has passed the verifier for kernels of `variants`.
    pub fn new(plan: &Plan, variants: &[Variant]) -> Result<Self, RuntimeError> {
        let schedule = plan.schedule.as_ref().ok_or(RuntimeError::Unscheduled)?;
        let items: Vec<u32> = schedule.list_of.iter().map(|&list| schedule.list(list).len() as u32).collect();
        let num_layers = plan.model.layers as usize;
        let mut longest = vec![0; num_layers];
        for step in items.chunks_exact(num_layers) {
            longest.iter_mut().zip(step).for_each(|(most, &n)| *most = n.max(*most));
        }
        let splits: Vec<bool> = plan.ops.chunks_exact(plan.model.heads as usize).map(splits).collect();
        let may_split =
            (0..num_layers).map(|layer| splits.iter().skip(layer).step_by(num_layers).any(|&on| on)).collect();
        Ok(Self {
            shape: Shape::of(plan),
            num_steps: plan.num_steps(),
            num_layers: plan.model.layers,
            num_q_blocks: plan.geometry.num_q_blocks(),
            num_kv_blocks: plan.geometry.num_kv_blocks(),
            variants: variants.to_vec(),
            items,
            longest,
            splits,
            may_split,
        })
    }

    /// Whether any layer's tiles may be computed in parts.
    pub fn splits(&self) -> bool {
        self.may_split.contains(&true)
    }

    /// Whether `step` is one of the plan's.
    pub fn check_step(&self, step: u32) -> Result<(), RuntimeError> {
        if step < self.num_steps { Ok(()) } else { Err(RuntimeError::Step { step, num_steps: self.num_steps }) }
    }

    /// The variant for an element type, with or without log-sum-exp output.
    fn variant(&self, dtype: DType, lse: bool) -> Result<Variant, RuntimeError> {
        let fits = |v: &&Variant| v.dtype == dtype && v.lse == lse;
        self.variants.iter().find(fits).copied().ok_or(RuntimeError::NoVariant { dtype, lse })
    }
}

/// A checked launch. The addresses of the plan's tables are still 0: the engine that holds them fills them in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LaunchArgs {
    /// The kernel to run, of whichever family there is.
    pub variant: Variant,
    /// The kernel's argument.
    pub params: Params,
    /// Work items of one batch element: those of a step known on the host, else the most of any step.
    pub items: u32,
    /// Whether tiles may be computed in parts, which takes memory for their accumulators (`partials` and `arrivals`).
    pub splits: bool,
}

impl LaunchArgs {
    /// Checks `call` against `plan` for an engine on GPU `device`.
    pub fn new(plan: &LaunchPlan, device: u32, call: &Call<'_>) -> Result<Self, RuntimeError> {
        let &Call { step, layer, q, k, v, out, lse, softmax_scale } = call;
        if layer >= plan.num_layers {
            return Err(RuntimeError::Layer { layer, num_layers: plan.num_layers });
        }
        let (step, step_ptr, items, splits) = match step {
            StepArg::Host(step) => {
                plan.check_step(step)?;
                let at = (step * plan.num_layers + layer) as usize;
                (step, 0, plan.items[at], plan.splits[at])
            }
            StepArg::Device(ptr) if ptr == 0 || !ptr.is_multiple_of(4) => {
                return Err(RuntimeError::StepPointer { ptr });
            }
            StepArg::Device(ptr) => (0, ptr, plan.longest[layer as usize], plan.may_split[layer as usize]),
        };

        let Lengths { batch, q_len, kv_len } = plan.shape.check(q.shape, k.shape, v.shape)?;
        if batch > MAX_BATCH {
            return Err(RuntimeError::Batch { batch });
        }
        for (dim, (&got, &want)) in Dim::ALL.into_iter().zip(out.shape.iter().zip(&q.shape)) {
            same(Operand::Out, dim, got, want)?;
        }
        for (operand, tensor) in [(Operand::K, k), (Operand::V, v), (Operand::Out, out)] {
            if tensor.dtype != q.dtype {
                return Err(RuntimeError::DType { operand, got: tensor.dtype, want: q.dtype });
            }
        }
        if u64::from(items) * batch as u64 > MAX_WORK {
            return Err(RuntimeError::Work { batch, items });
        }
        let variant = plan.variant(q.dtype, lse.is_some())?;
        let [q_strides, k_strides, v_strides, out_strides] = [
            check_tensor(Operand::Q, q, device)?,
            check_tensor(Operand::K, k, device)?,
            check_tensor(Operand::V, v, device)?,
            check_tensor(Operand::Out, out, device)?,
        ];
        check_writable(Operand::Out, &out.shape, &out.strides)?;
        let lse_strides = lse.map_or(Ok([0; 2]), |lse| check_lse(lse, [batch, q.shape[1], q.shape[2]], device))?;

        let scale = softmax_scale.unwrap_or_else(|| 1.0 / (plan.shape.head_dim as f32).sqrt());
        if !scale.is_finite() || scale <= 0.0 {
            return Err(RuntimeError::Scale { scale });
        }
        let params = Params {
            q: q.ptr,
            k: k.ptr,
            v: v.ptr,
            out: out.ptr,
            lse: lse.map_or(0, |lse| lse.ptr),
            step_ptr,
            q_batch_stride: q_strides[0],
            q_head_stride: q_strides[1],
            q_token_stride: q_strides[2],
            k_batch_stride: k_strides[0],
            k_head_stride: k_strides[1],
            k_token_stride: k_strides[2],
            v_batch_stride: v_strides[0],
            v_head_stride: v_strides[1],
            v_token_stride: v_strides[2],
            out_batch_stride: out_strides[0],
            out_head_stride: out_strides[1],
            out_token_stride: out_strides[2],
            lse_batch_stride: lse_strides[0],
            lse_head_stride: lse_strides[1],
            step,
            num_steps: plan.num_steps,
            layer,
            num_heads: plan.shape.heads,
            batch: batch as u32,
            q_len,
            kv_len,
            num_q_blocks: plan.num_q_blocks,
            num_kv_blocks: plan.num_kv_blocks,
            scale_log2: scale * std::f32::consts::LOG2_E,
            ..Params::default()
        };
        Ok(Self { variant, params, items, splits })
    }

    /// CTAs in x, y and z of a kernel of `family` on a GPU of `multiprocessors` SMs.
    pub fn grid(&self, family: Family, multiprocessors: u32) -> [u32; 3] {
        match family {
            Family::Portable => [self.items * abi::tile_blocks(self.variant.head_dim), self.params.batch, 1],
            // Clusters are whole. Parts may fill the GPU where tiles do not. No overflow: at most `MAX_WORK`.
            Family::Hopper => {
                let work = if self.splits {
                    u32::MAX
                } else {
                    (self.items * self.params.batch).next_multiple_of(abi::CLUSTER)
                };
                let fit = multiprocessors / abi::CLUSTER * abi::CLUSTER;
                [work.min(fit).max(abi::CLUSTER), 1, 1]
            }
        }
    }
}

/// Checks one tensor and returns its batch, head and token strides; 0 along a dimension of size 1.
pub(crate) fn check_tensor(operand: Operand, tensor: &DeviceTensor, device: u32) -> Result<[i64; 3], RuntimeError> {
    let &DeviceTensor { ptr, dtype: _, device: got, ref shape, ref strides } = tensor;
    check_pointer(operand, ptr, ALIGN_BYTES, got, device)?;
    check_strides(operand, shape, strides, &Dim::ALL)?;
    let outer: [i64; 3] = std::array::from_fn(|i| if shape[i] > 1 { strides[i] } else { 0 });
    for (dim, &stride) in Dim::ALL.into_iter().zip(&outer) {
        if stride % ALIGN_ELEMENTS != 0 {
            return Err(RuntimeError::StrideAlignment { operand, dim, stride });
        }
    }
    check_extent(operand, ptr, 2, shape, strides)?;
    Ok(outer)
}

/// Checks the log-sum-exp output and returns its batch and head strides; 0 along a dimension of size 1.
fn check_lse(lse: &DeviceLse, want: [usize; 3], device: u32) -> Result<[i64; 2], RuntimeError> {
    let operand = Operand::Lse;
    for (dim, (&got, &want)) in Dim::ALL.into_iter().zip(lse.shape.iter().zip(&want)) {
        same(operand, dim, got, want)?;
    }
    check_pointer(operand, lse.ptr, 4, lse.device, device)?;
    check_strides(operand, &lse.shape, &lse.strides, &Dim::ALL[..3])?;
    check_extent(operand, lse.ptr, 4, &lse.shape, &lse.strides)?;
    check_writable(operand, &lse.shape, &lse.strides)?;
    Ok(std::array::from_fn(|i| if lse.shape[i] > 1 { lse.strides[i] } else { 0 }))
}

pub(crate) fn check_pointer(operand: Operand, ptr: u64, align: u64, got: u32, want: u32) -> Result<(), RuntimeError> {
    if ptr == 0 {
        Err(RuntimeError::Null { operand })
    } else if !ptr.is_multiple_of(align) {
        Err(RuntimeError::Alignment { operand, ptr, align })
    } else if got != want {
        Err(RuntimeError::Device { operand, got, want })
    } else {
        Ok(())
    }
}

/// No used stride is negative, and the innermost one is 1.
pub(crate) fn check_strides(
    operand: Operand,
    shape: &[usize],
    strides: &[i64],
    dims: &[Dim],
) -> Result<(), RuntimeError> {
    for ((&dim, &size), &stride) in dims.iter().zip(shape).zip(strides) {
        if size > 1 && stride < 0 {
            return Err(RuntimeError::NegativeStride { operand, dim, stride });
        }
    }
    match (dims.last(), shape.last(), strides.last()) {
        (Some(&dim), Some(&size), Some(&stride)) if size > 1 && stride != 1 => {
            Err(RuntimeError::InnerStride { operand, dim, stride })
        }
        _ => Ok(()),
    }
}

/// The last element's address exists, and offsets to it fit a signed 64-bit byte count.
pub(crate) fn check_extent(
    operand: Operand,
    ptr: u64,
    element_bytes: u64,
    shape: &[usize],
    strides: &[i64],
) -> Result<(), RuntimeError> {
    let bytes = extent(shape, strides).and_then(|n| n.checked_mul(element_bytes)).filter(|&n| n <= i64::MAX as u64);
    match bytes.and_then(|n| ptr.checked_add(n)) {
        Some(_) => Ok(()),
        None => Err(RuntimeError::Extent { operand, shape: shape.to_vec(), strides: strides.to_vec() }),
    }
}

/// No two elements of an output share an address: from the innermost dimension out, each stride steps over all the
/// dimensions inside it. Every permuted, sliced or padded layout passes.
fn check_writable(operand: Operand, shape: &[usize], strides: &[i64]) -> Result<(), RuntimeError> {
    let mut used = [(0i64, 0usize); 4];
    let used = &mut used[..shape.len()];
    used.iter_mut().zip(strides.iter().zip(shape)).for_each(|(to, (&stride, &size))| *to = (stride, size));
    used.sort_unstable();
    // Extents were checked to fit an i64, so neither operation overflows.
    let mut inside = 1;
    for &(stride, size) in used.iter().filter(|&&(_, size)| size > 1) {
        if stride < inside {
            return Err(RuntimeError::Overlap { operand, shape: shape.to_vec(), strides: strides.to_vec() });
        }
        inside += stride * (size as i64 - 1);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use calibc_ir::{AttnOp, BlockMask, Geometry, Model, Schedule, TextPosition, WorkItem, abi};

    use super::*;

    #[test]
    fn the_struct_is_the_launch_contract() {
        macro_rules! fields {
            ($($name:ident),* $(,)?) => { vec![$((stringify!($name), offset_of!(Params, $name))),*] };
        }
        let got = fields![
            q,
            k,
            v,
            out,
            lse,
            step_ptr,
            steps,
            anchor_queries,
            anchor_copy_ptr,
            anchor_copies,
            partials,
            arrivals,
            q_batch_stride,
            q_head_stride,
            q_token_stride,
            k_batch_stride,
            k_head_stride,
            k_token_stride,
            v_batch_stride,
            v_head_stride,
            v_token_stride,
            out_batch_stride,
            out_head_stride,
            out_token_stride,
            lse_batch_stride,
            lse_head_stride,
            step,
            num_steps,
            layer,
            num_heads,
            batch,
            q_len,
            kv_len,
            num_q_blocks,
            num_kv_blocks,
            num_anchor_queries,
            scale_log2,
        ];
        let mut at = 0;
        let want: Vec<_> = (abi::PARAMS.iter())
            .map(|&(name, scalar)| {
                let offset = at;
                at += scalar.size() as usize;
                (name, offset)
            })
            .collect();
        assert_eq!(got, want);
        assert_eq!(size_of::<Params>(), abi::PARAMS_BYTES as usize);
        assert_eq!(size_of::<Params>(), at.next_multiple_of(8));
    }

    const PTR: u64 = 1 << 40;

    /// 2 steps, 3 layers, 2 heads of 64; 300 video and 20 text tokens. The list of (1, 2) is shorter than that of (0, 2).
    fn plan(text_position: TextPosition) -> Plan {
        let text_tokens = if text_position == TextPosition::None { 0 } else { 20 };
        let geometry = Geometry { text_tokens, text_position, ..Geometry::video(3, 10, 10) };
        let model = Model { name: "m".into(), layers: 3, heads: 2, head_dim: 64 };
        let mut plan = Plan::dense(model, geometry, vec![1.0, 0.5]);
        let mask = plan.masks.intern(BlockMask::full(3, 3));
        plan.ops[0] = AttnOp::BlockSparse { mask };
        let variant = |dtype, lse| Variant { dtype, head_dim: 64, lse, anchors: false, ragged: true };
        plan.variants = vec![variant(DType::Bf16, false), variant(DType::Bf16, true), variant(DType::Fp16, false)];
        let items = (0..6).map(|i| WorkItem(i << 16)).collect();
        plan.schedule = Some(Schedule { list_of: vec![0, 0, 0, 0, 0, 1], list_ptr: vec![0, 4, 6], items });
        plan
    }

    #[derive(Clone)]
    struct Setup {
        plan: LaunchPlan,
        step: StepArg,
        layer: u32,
        tensors: [DeviceTensor; 4],
        lse: Option<DeviceLse>,
        scale: Option<f32>,
    }

    impl Setup {
        fn new(text_position: TextPosition) -> Self {
            let plan = plan(text_position);
            let tokens = plan.geometry.q_tokens() as usize;
            Self {
                plan: LaunchPlan::new(&plan, &plan.variants).unwrap(),
                step: StepArg::Host(0),
                layer: 2,
                tensors: [DeviceTensor::bshd(PTR, DType::Bf16, 1, [2, 2, tokens, 64]); 4],
                lse: None,
                scale: None,
            }
        }

        fn lse(mut self) -> Self {
            let [b, h, s, _] = self.tensors[0].shape;
            self.lse = Some(DeviceLse::contiguous(PTR, 1, [b, h, s]));
            self
        }

        fn run(&self) -> Result<LaunchArgs, RuntimeError> {
            let [q, k, v, out] = &self.tensors;
            let (step, layer, lse, softmax_scale) = (self.step, self.layer, self.lse.as_ref(), self.scale);
            LaunchArgs::new(&self.plan, 1, &Call { step, layer, q, k, v, out, lse, softmax_scale })
        }

        /// The error after one change to a call that is otherwise right.
        fn error(&self, change: impl FnOnce(&mut Self)) -> RuntimeError {
            self.run().unwrap();
            let mut changed = self.clone();
            change(&mut changed);
            changed.run().unwrap_err()
        }
    }

    #[test]
    fn a_right_call_becomes_a_launch() {
        let args = Setup::new(TextPosition::None).lse().run().unwrap();
        assert_eq!(args.variant.to_string(), "calibc_attn_bf16_hd64_lse_ragged");
        assert_eq!((args.items, args.params.batch), (4, 2));
        let p = args.params;
        assert_eq!([p.q_batch_stride, p.k_head_stride, p.out_token_stride], [300 * 128, 64, 128]);
        assert_eq!([p.lse_batch_stride, p.lse_head_stride], [600, 300]);
        assert_eq!([p.step, p.num_steps, p.layer, p.num_heads], [0, 2, 2, 2]);
        assert_eq!([p.q_len, p.kv_len, p.num_q_blocks, p.num_kv_blocks], [300, 300, 3, 3]);
        assert_eq!(p.scale_log2, 0.125 * std::f32::consts::LOG2_E);
    }

    #[test]
    fn the_grid_is_the_list_of_a_known_step_or_the_longest_of_an_unknown_one() {
        let mut setup = Setup::new(TextPosition::None);
        setup.step = StepArg::Host(1);
        assert_eq!(setup.run().unwrap().grid(Family::Portable, 132), [4, 2, 1]);
        setup.step = StepArg::Device(PTR + 4);
        let args = setup.run().unwrap();
        assert_eq!((args.grid(Family::Portable, 132), args.params.step_ptr), ([8, 2, 1], PTR + 4));
    }

    #[test]
    fn persistent_kernels_get_no_more_ctas_than_work_or_sms() {
        // Layer 2 has no masks: parts of its tiles fill the GPU. Layer 0 has one at step 0.
        let mut setup = Setup::new(TextPosition::None);
        for (layer, step, wants) in [
            (2, StepArg::Host(0), [(132, 132), (8, 8), (7, 6)]),
            (0, StepArg::Host(0), [(132, 8), (8, 8), (7, 6)]),
            (0, StepArg::Device(PTR), [(132, 132), (8, 8), (7, 6)]),
        ] {
            (setup.layer, setup.step) = (layer, step);
            let args = setup.run().unwrap();
            for (sms, want) in wants {
                assert_eq!(args.grid(Family::Hopper, sms), [want, 1, 1], "layer {layer}, {step:?}");
            }
        }
        // The second CTA of a cluster may have nothing to do.
        setup.tensors.iter_mut().for_each(|t| t.shape[0] = 1);
        (setup.layer, setup.step) = (0, StepArg::Host(0));
        setup.plan.items.fill(3);
        let args = setup.run().unwrap();
        assert_eq!([args.items * args.params.batch, args.grid(Family::Hopper, 132)[0]], [3, 4]);
    }

    #[test]
    fn more_tiles_than_a_launch_can_count_are_refused() {
        let mut setup = Setup::new(TextPosition::None);
        setup.plan.items.fill(1 << 16);
        setup.tensors.iter_mut().for_each(|t| t.shape[0] = (1 << 15) - 1);
        assert_eq!(setup.run().unwrap().grid(Family::Hopper, 132), [132, 1, 1]);
        let error = setup.error(|s| s.tensors.iter_mut().for_each(|t| t.shape[0] = 1 << 15));
        assert!(matches!(error, RuntimeError::Work { batch: 32_768, items: 65_536 }));
    }

    #[test]
    fn text_at_the_end_may_be_cut_and_nothing_else() {
        let cut = |s: &mut Setup, q: usize, kv: usize| {
            for (tensor, tokens) in s.tensors.iter_mut().zip([q, kv, kv, q]) {
                *tensor = DeviceTensor::bshd(PTR, DType::Bf16, 1, [2, 2, tokens, 64]);
            }
        };
        let after = Setup::new(TextPosition::After);
        for (q, kv) in [(300, 300), (305, 320), (320, 301)] {
            let mut s = after.clone();
            cut(&mut s, q, kv);
            let p = s.run().unwrap().params;
            assert_eq!((p.q_len as usize, p.kv_len as usize, p.num_q_blocks), (q, kv, 3));
        }
        for (q, kv) in [(299, 320), (320, 299), (321, 320), (320, 321)] {
            assert!(matches!(after.error(|s| cut(s, q, kv)), RuntimeError::Length { min: 300, max: 320, .. }));
        }
        let before = Setup::new(TextPosition::Before);
        let error = before.error(|s| cut(s, 319, 320));
        assert!(matches!(error, RuntimeError::Length { operand: Operand::Q, got: 319, min: 320, max: 320 }));
    }

    #[test]
    fn wrong_places_in_the_plan_are_refused() {
        let ok = Setup::new(TextPosition::None);
        assert!(matches!(ok.error(|s| s.step = StepArg::Host(2)), RuntimeError::Step { step: 2, num_steps: 2 }));
        assert!(matches!(ok.error(|s| s.layer = 3), RuntimeError::Layer { layer: 3, num_layers: 3 }));
        for ptr in [0, PTR + 2] {
            let error = ok.error(|s| s.step = StepArg::Device(ptr));
            assert!(matches!(error, RuntimeError::StepPointer { ptr: got } if got == ptr));
        }
        let mut unscheduled = plan(TextPosition::None);
        unscheduled.schedule = None;
        assert!(matches!(LaunchPlan::new(&unscheduled, &[]), Err(RuntimeError::Unscheduled)));
    }

    #[test]
    fn wrong_sizes_and_types_are_refused() {
        let ok = Setup::new(TextPosition::None).lse();
        for (tensor, operand) in [Operand::Q, Operand::K, Operand::V, Operand::Out].into_iter().enumerate() {
            for (axis, dim) in [(1, Dim::Head), (3, Dim::HeadDim)] {
                let error = ok.error(|s| s.tensors[tensor].shape[axis] += 1);
                assert!(matches!(error, RuntimeError::Size { operand: o, dim: d, .. } if (o, d) == (operand, dim)));
            }
        }
        let error = ok.error(|s| s.tensors[1].shape[0] = 1);
        assert!(matches!(error, RuntimeError::Size { operand: Operand::K, dim: Dim::Batch, got: 1, want: 2 }));
        let error = ok.error(|s| s.tensors[2].shape[2] = 299);
        assert!(matches!(error, RuntimeError::Size { operand: Operand::V, dim: Dim::Token, got: 299, want: 300 }));
        let error = ok.error(|s| s.tensors[3].shape[2] = 299);
        assert!(matches!(error, RuntimeError::Size { operand: Operand::Out, dim: Dim::Token, .. }));
        let error = ok.error(|s| s.lse = Some(DeviceLse::contiguous(PTR, 1, [2, 2, 299])));
        assert!(matches!(error, RuntimeError::Size { operand: Operand::Lse, dim: Dim::Token, .. }));
        for batch in [0, 65_536] {
            let error = ok.error(|s| s.tensors.iter_mut().for_each(|t| t.shape[0] = batch));
            assert!(matches!(error, RuntimeError::Batch { batch: got } if got == batch));
        }
        let error = ok.error(|s| s.tensors[2].dtype = DType::Fp16);
        assert!(matches!(error, RuntimeError::DType { operand: Operand::V, got: DType::Fp16, want: DType::Bf16 }));
        let error = ok.error(|s| s.tensors.iter_mut().for_each(|t| t.dtype = DType::Fp16));
        assert!(matches!(error, RuntimeError::NoVariant { dtype: DType::Fp16, lse: true }));
        for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            assert!(matches!(ok.error(|s| s.scale = Some(scale)), RuntimeError::Scale { .. }));
        }
    }

    #[test]
    fn wrong_pointers_are_refused() {
        let ok = Setup::new(TextPosition::None).lse();
        for (tensor, operand) in [Operand::Q, Operand::K, Operand::V, Operand::Out].into_iter().enumerate() {
            let error = ok.error(|s| s.tensors[tensor].ptr = 0);
            assert!(matches!(error, RuntimeError::Null { operand: o } if o == operand));
            let error = ok.error(|s| s.tensors[tensor].ptr += 8);
            assert!(matches!(error, RuntimeError::Alignment { operand: o, align: 16, .. } if o == operand));
            let error = ok.error(|s| s.tensors[tensor].device = 0);
            assert!(matches!(error, RuntimeError::Device { operand: o, got: 0, want: 1 } if o == operand));
            let error = ok.error(|s| s.tensors[tensor].ptr = u64::MAX - 15);
            assert!(matches!(error, RuntimeError::Extent { operand: o, .. } if o == operand));
        }
        let lse = |s: &mut Setup, change: fn(&mut DeviceLse)| s.lse.iter_mut().for_each(change);
        let error = ok.error(|s| lse(s, |l| l.ptr = 0));
        assert!(matches!(error, RuntimeError::Null { operand: Operand::Lse }));
        let error = ok.error(|s| lse(s, |l| l.ptr += 2));
        assert!(matches!(error, RuntimeError::Alignment { operand: Operand::Lse, align: 4, .. }));
        let error = ok.error(|s| lse(s, |l| l.device = 7));
        assert!(matches!(error, RuntimeError::Device { operand: Operand::Lse, got: 7, want: 1 }));
    }

    #[test]
    fn wrong_strides_are_refused() {
        let ok = Setup::new(TextPosition::None).lse();
        let stride = |tensor: usize, axis: usize, value: i64| ok.error(|s| s.tensors[tensor].strides[axis] = value);
        assert!(matches!(stride(0, 3, 2), RuntimeError::InnerStride { operand: Operand::Q, stride: 2, .. }));
        assert!(matches!(stride(1, 3, 0), RuntimeError::InnerStride { operand: Operand::K, stride: 0, .. }));
        for (axis, dim) in [(0, Dim::Batch), (1, Dim::Head), (2, Dim::Token)] {
            for (tensor, operand) in [Operand::Q, Operand::K, Operand::V, Operand::Out].into_iter().enumerate() {
                let error = stride(tensor, axis, -128);
                assert!(
                    matches!(error, RuntimeError::NegativeStride { operand: o, dim: d, .. } if (o, d) == (operand, dim))
                );
                let error = stride(tensor, axis, 38_404);
                assert!(
                    matches!(error, RuntimeError::StrideAlignment { operand: o, dim: d, .. } if (o, d) == (operand, dim))
                );
            }
        }
        assert!(matches!(stride(1, 0, i64::MAX - 7), RuntimeError::Extent { operand: Operand::K, .. }));
        assert!(matches!(stride(1, 0, 1 << 62), RuntimeError::Extent { operand: Operand::K, .. }));
        // Inputs may repeat memory (a head shared by several), outputs may not.
        let mut shared = ok.clone();
        shared.tensors[1].strides[1] = 0;
        shared.run().unwrap();
        for (axis, value) in [(0, 0), (1, 0), (2, 64), (0, 64), (1, 56)] {
            assert!(
                matches!(stride(3, axis, value), RuntimeError::Overlap { operand: Operand::Out, .. }),
                "{axis} {value}"
            );
        }
        for (axis, value) in [(0, 300), (1, 299)] {
            let error = ok.error(|s| s.lse.iter_mut().for_each(|l| l.strides[axis] = value));
            assert!(matches!(error, RuntimeError::Overlap { operand: Operand::Lse, .. }));
        }
        let error = ok.error(|s| s.lse.iter_mut().for_each(|l| l.strides[2] = 2));
        assert!(matches!(error, RuntimeError::InnerStride { operand: Operand::Lse, dim: Dim::Token, .. }));
    }

    #[test]
    fn a_dimension_of_size_one_has_no_stride() {
        let mut setup = Setup::new(TextPosition::None);
        for tensor in &mut setup.tensors {
            tensor.shape[0] = 1;
            tensor.strides[0] = -3;
        }
        assert_eq!(setup.run().unwrap().params.q_batch_stride, 0);
    }
}
