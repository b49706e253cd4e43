//! A launch allocates nothing on its way through the host.

#[path = "support/counting.rs"]
mod counting;

use calibc_ir::{
    AttnOp, BlockMask, DType, Family, Geometry, HeadId, Model, Plan, Schedule, TextPosition, Variant, WorkItem,
};
use calibc_runtime::{Call, DeviceLse, DeviceTensor, LaunchArgs, LaunchPlan, Operand, StepArg, TensorMapSpec};
use counting::allocations;

const PTR: u64 = 1 << 40;
const STEPS: u32 = 3;
const LAYERS: u32 = 2;

fn plan(head_dim: u32) -> Plan {
    let model = Model { name: "m".into(), layers: LAYERS, heads: 2, head_dim };
    let geometry = Geometry { text_tokens: 20, text_position: TextPosition::After, ..Geometry::video(3, 10, 10) };
    let mut plan = Plan::dense(model, geometry, vec![1.0, 0.7, 0.3]);
    plan.ops[0] = AttnOp::BlockSparse { mask: plan.masks.intern(BlockMask::full(3, 3)) };
    plan.ops[3] = AttnOp::AnchorRows { anchors: 2 };
    plan.variants = DType::ALL
        .into_iter()
        .flat_map(|dtype| [false, true].map(|lse| Variant { dtype, head_dim, lse, anchors: true, ragged: true }))
        .collect();
    let items = (0..2).flat_map(|head| (0..3).map(move |tile| WorkItem::new(HeadId(head), tile))).collect();
    plan.schedule = Some(Schedule { list_of: vec![0; (STEPS * LAYERS) as usize], list_ptr: vec![0, 6], items });
    plan
}

#[test]
fn counting_counts() {
    assert_eq!(allocations(|| std::hint::black_box(vec![1, 2, 3]).len()), (3, 1));
    assert_eq!(allocations(|| std::hint::black_box(7)), (7, 0));
}

#[test]
fn a_launch_allocates_nothing_before_the_driver_sees_it() {
    for head_dim in calibc_ir::HEAD_DIMS {
        let plan = plan(head_dim);
        let plan = LaunchPlan::new(&plan, &plan.variants).unwrap();
        let mut launches = 0;
        let ((), asked) = allocations(|| {
            for (dtype, lse, token_major, batch, tokens) in DType::ALL.into_iter().flat_map(|dtype| {
                [(false, false, 1, 320), (true, true, 2, 311), (true, false, 3, 300)]
                    .map(|(l, t, b, n)| (dtype, l, t, b, n))
            }) {
                let shape = [batch, 2, tokens, head_dim as usize];
                let make = if token_major { DeviceTensor::bshd } else { DeviceTensor::bhsd };
                let tensor = make(PTR, dtype, 0, shape);
                let lse = lse.then(|| DeviceLse::contiguous(PTR, 0, [batch, 2, tokens]));
                for step in [StepArg::Host(2), StepArg::Device(PTR)] {
                    let call = Call {
                        step,
                        layer: 1,
                        q: &tensor,
                        k: &tensor,
                        v: &tensor,
                        out: &tensor,
                        lse: lse.as_ref(),
                        softmax_scale: None,
                    };
                    let args = LaunchArgs::new(&plan, 0, &call).unwrap();
                    let grids = Family::ALL.map(|family| args.grid(family, 132));
                    let maps = [Operand::Q, Operand::K, Operand::V].map(|operand| TensorMapSpec::new(&args, operand));
                    std::hint::black_box((args, grids, maps));
                    launches += 1;
                }
            }
        });
        assert_eq!((launches, asked), (12, 0));
    }
}
