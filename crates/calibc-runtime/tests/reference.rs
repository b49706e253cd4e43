//! The blocked f32 reference against the naive f64 one, over everything a plan can ask for.

use calibc_ir::{AttnOp, BlockMask, DType, Geometry, LayerId, Layout, Model, Plan, Site, StepId, TextPosition};
use calibc_runtime::reference::{self, Options, Output, masked};
use calibc_runtime::{HostData, HostTensor, Operand, RuntimeError};
use half::{bf16, f16};
use proptest::prelude::*;

/// A stream of numbers that a seed decides (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// Roughly normal, variance 1.
    fn normal(&mut self) -> f32 {
        let sum: f32 = (0..12).map(|_| (self.next() >> 40) as f32 / (1 << 24) as f32).sum();
        sum - 6.0
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    head_dim: u32,
    geometry: Geometry,
    batch: usize,
    token_major: bool,
    stored_as: u8,
    cut: (u32, u32),
    /// Most scores are near 0 at 1, and far apart at 6.
    spread: f32,
    seed: u64,
}

fn geometries() -> impl Strategy<Value = Geometry> {
    let grid = (1u32..4, 4u32..11, 1u32..20);
    let text = (1u32..150, prop_oneof![Just(TextPosition::Before), Just(TextPosition::After)]);
    let layout = prop_oneof![Just(Layout::Raster), Just(Layout::Tile([2, 3, 4]))];
    prop_oneof![
        (1u32..400, 1u32..400).prop_map(|(q, kv)| Geometry::sequence(q, kv)),
        (grid.clone(), layout.clone()).prop_map(|((f, h, w), layout)| Geometry { layout, ..Geometry::video(f, h, w) }),
        (grid, layout, text).prop_map(|((f, h, w), layout, (text_tokens, text_position))| Geometry {
            layout,
            text_tokens,
            text_position,
            ..Geometry::video(f, h, w)
        }),
    ]
}

fn cases() -> impl Strategy<Value = Case> {
    let scalars = (prop_oneof![Just(64u32), Just(128), Just(72)], 1usize..3, any::<bool>(), 0u8..3);
    (scalars, geometries(), any::<(u16, u16)>(), prop_oneof![Just(1.0f32), Just(6.0)], any::<u64>()).prop_map(
        |((head_dim, batch, token_major, stored_as), geometry, cut, spread, seed)| {
            let text = if geometry.text_position == TextPosition::After { geometry.text_tokens } else { 0 };
            let cut = (u32::from(cut.0) % (text + 1), u32::from(cut.1) % (text + 1));
            Case { head_dim, geometry, batch, token_major, stored_as, cut, spread, seed }
        },
    )
}

/// One head of each op, and one whose mask has empty rows.
fn plan(case: &Case, numbers: &mut Numbers) -> Plan {
    let geometry = case.geometry;
    let model = Model { name: "m".into(), layers: 1, heads: 4, head_dim: case.head_dim };
    let mut plan = Plan::dense(model, geometry, vec![1.0]);
    let (rows, cols) = (geometry.num_q_blocks(), geometry.num_kv_blocks());
    for (head, one_in) in [(1, 2), (3, 5)] {
        let mask = BlockMask::from_fn(rows, cols, |_, _| numbers.below(one_in) == 0);
        plan.ops[head] = AttnOp::BlockSparse { mask: plan.masks.intern(mask) };
    }
    plan.ops[2] = AttnOp::AnchorRows { anchors: 1 + numbers.below(u64::from(geometry.height.min(4))) as u16 };
    plan
}

struct Inputs {
    /// q, k, v.
    data: [Vec<f32>; 3],
    shapes: [[usize; 4]; 3],
    token_major: bool,
}

impl Inputs {
    fn new(case: &Case, plan: &Plan, numbers: &mut Numbers) -> Self {
        let (q, kv) = (case.geometry.q_tokens() - case.cut.0, case.geometry.kv_tokens() - case.cut.1);
        let shape = |tokens: u32| [case.batch, plan.model.heads as usize, tokens as usize, case.head_dim as usize];
        let shapes = [shape(q), shape(kv), shape(kv)];
        let data = std::array::from_fn(|i| {
            let factor = if i == 0 { case.spread } else { 1.0 };
            (0..shapes[i].iter().product::<usize>()).map(|_| factor * numbers.normal()).collect()
        });
        Self { data, shapes, token_major: case.token_major }
    }

    fn with<R>(&self, stored_as: u8, run: impl FnOnce(&[HostTensor<'_>; 3]) -> R) -> R {
        let bf: [Vec<bf16>; 3] = self.data.each_ref().map(|x| x.iter().map(|&x| bf16::from_f32(x)).collect());
        let fp: [Vec<f16>; 3] = self.data.each_ref().map(|x| x.iter().map(|&x| f16::from_f32(x)).collect());
        let new = if self.token_major { HostTensor::bshd } else { HostTensor::bhsd };
        run(&std::array::from_fn(|i| {
            let data: HostData<'_> = match stored_as {
                0 => self.data[i].as_slice().into(),
                1 => bf[i].as_slice().into(),
                _ => fp[i].as_slice().into(),
            };
            new(Operand::Q, data, self.shapes[i]).expect("the data has the shape's size")
        }))
    }
}

fn run(plan: &Plan, [q, k, v]: &[HostTensor<'_>; 3], options: &Options) -> Result<Output, RuntimeError> {
    reference::attention(plan, StepId(0), LayerId(0), q, k, v, options)
}

/// Greatest difference of outputs over the outputs' size, and of log-sum-exps.
fn compare(got: &Output, plan: &Plan, [q, k, v]: &[HostTensor<'_>; 3], numbers: &mut Numbers) -> (f64, f64) {
    let [batch, heads, tokens, head_dim] = got.shape;
    let (mut error, mut norm, mut lse_error) = (0.0, 0.0, 0.0f64);
    for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
        let mut positions: Vec<u32> = (0..16).map(|_| numbers.below(tokens as u64) as u32).collect();
        positions.extend([0, tokens as u32 - 1]);
        let site = Site::new(0, 0, h as u32);
        let rows = masked::rows(plan, site, b, q, k, v, None, &positions).expect("the same call was executed");
        for (&position, row) in positions.iter().zip(&rows) {
            let at = (b * heads + h) * tokens + position as usize;
            for (&x, &want) in got.out[at * head_dim..][..head_dim].iter().zip(&row.out) {
                error += (f64::from(x) - want).powi(2);
                norm += want * want;
            }
            let lse = f64::from(got.lse[at]);
            if lse != row.lse {
                lse_error = lse_error.max((lse - row.lse).abs());
            }
        }
    }
    (if norm == 0.0 { error } else { (error / norm).sqrt() }, lse_error)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn blocked_equals_naive(case in cases()) {
        let mut numbers = Numbers(case.seed);
        let plan = plan(&case, &mut numbers);
        let inputs = Inputs::new(&case, &plan, &mut numbers);
        let (error, lse_error) = inputs.with(case.stored_as, |tensors| {
            let got = run(&plan, tensors, &Options::default()).expect("a call that fits the plan");
            compare(&got, &plan, tensors, &mut numbers)
        });
        prop_assert!(error < 3e-6, "relative error {error}");
        prop_assert!(lse_error < 3e-5, "log-sum-exp error {lse_error}");
    }
}

fn small(geometry: Geometry) -> (Case, Plan, Inputs) {
    let case =
        Case { head_dim: 64, geometry, batch: 1, token_major: false, stored_as: 0, cut: (0, 0), spread: 1.0, seed: 3 };
    let mut numbers = Numbers(case.seed);
    let plan = plan(&case, &mut numbers);
    let inputs = Inputs::new(&case, &plan, &mut numbers);
    (case, plan, inputs)
}

#[test]
fn the_comparison_notices_one_wrong_block() {
    let (_, mut plan, inputs) = small(Geometry::video(1, 20, 20));
    inputs.with(0, |tensors| {
        let full = plan.masks.intern(BlockMask::full(4, 4));
        plan.ops = vec![AttnOp::BlockSparse { mask: full }; 4];
        let got = run(&plan, tensors, &Options::default()).unwrap();
        let less = plan.masks.intern(BlockMask::from_fn(4, 4, |r, c| (r, c) != (1, 2)));
        plan.ops[1] = AttnOp::BlockSparse { mask: less };
        let (error, lse_error) = compare(&got, &plan, tensors, &mut Numbers(1));
        assert!(error > 1e-2 && lse_error > 1e-2, "{error} {lse_error}");
    });
}

#[test]
fn a_query_without_keys_gets_zeros_and_minus_infinity() {
    // One key block holds video, one only text: with all text cut, a row that keeps the second block alone keeps nothing.
    let geometry = Geometry { text_tokens: 60, text_position: TextPosition::After, ..Geometry::video(1, 1, 128) };
    let (mut case, mut plan, _) = small(geometry);
    case.cut = (60, 60);
    let mask = plan.masks.intern(BlockMask::from_fn(2, 2, |_, c| c == 1));
    plan.ops[1] = AttnOp::BlockSparse { mask };
    let inputs = Inputs::new(&case, &plan, &mut Numbers(5));
    inputs.with(0, |tensors| {
        let got = run(&plan, tensors, &Options::default()).unwrap();
        assert_eq!(got.shape, [1, 4, 128, 64]);
        assert!(got.out[128 * 64..2 * 128 * 64].iter().all(|&x| x == 0.0));
        assert!(got.lse[128..256].iter().all(|&x| x == f32::NEG_INFINITY));
        assert!(got.lse[..128].iter().all(|x| x.is_finite()));
        let (error, lse_error) = compare(&got, &plan, tensors, &mut Numbers(2));
        assert!(error < 3e-6 && lse_error < 3e-5, "{error} {lse_error}");
    });
}

#[test]
fn rounding_is_to_the_element_type() {
    let (_, plan, inputs) = small(Geometry::video(1, 10, 13));
    inputs.with(0, |tensors| {
        let exact = run(&plan, tensors, &Options::default()).unwrap();
        let round_to = |dtype| run(&plan, tensors, &Options { round_to: Some(dtype), ..Options::default() }).unwrap();
        let pairs = exact.out.iter().zip(round_to(DType::Bf16).out).zip(round_to(DType::Fp16).out);
        for ((&x, b), f) in pairs {
            assert_eq!((b, f), (bf16::from_f32(x).to_f32(), f16::from_f32(x).to_f32()));
        }
    });
}

#[test]
fn the_softmax_scale_multiplies_the_scores() {
    let (_, plan, inputs) = small(Geometry::video(1, 10, 13));
    let scaled = Inputs { data: inputs.data.clone(), ..inputs };
    let doubled = Inputs {
        data: [scaled.data[0].iter().map(|x| x * 2.0).collect(), scaled.data[1].clone(), scaled.data[2].clone()],
        ..scaled
    };
    let quarter = Options { softmax_scale: Some(0.25), ..Options::default() };
    let a = inputs.with(0, |t| run(&plan, t, &quarter)).unwrap();
    let b = doubled.with(0, |t| run(&plan, t, &Options::default())).unwrap();
    assert_eq!(a, b);
}

#[test]
fn what_does_not_fit_the_plan_is_refused() {
    let (case, mut plan, inputs) = small(Geometry::video(1, 10, 13));
    inputs.with(0, |tensors| {
        let [q, k, v] = tensors;
        let go = |step, layer| reference::attention(&plan, StepId(step), LayerId(layer), q, k, v, &Options::default());
        assert!(matches!(go(1, 0), Err(RuntimeError::Step { step: 1, num_steps: 1 })));
        assert!(matches!(go(0, 1), Err(RuntimeError::Layer { layer: 1, num_layers: 1 })));
        let scale = Options { softmax_scale: Some(f32::NAN), ..Options::default() };
        assert!(matches!(run(&plan, tensors, &scale), Err(RuntimeError::Scale { .. })));
        let row = masked::rows(&plan, Site::new(0, 0, 0), 0, q, k, v, None, &[130]);
        assert!(matches!(row, Err(RuntimeError::Position { position: 130, q_len: 130 })));
        let row = masked::rows(&plan, Site::new(0, 0, 0), 1, q, k, v, None, &[0]);
        assert!(matches!(row, Err(RuntimeError::Batch { batch: 1 })));
        let row = masked::rows(&plan, Site::new(0, 0, 4), 0, q, k, v, None, &[0]);
        assert!(matches!(row, Err(RuntimeError::Plan { head: 4, .. })));
    });
    let shorter = Inputs::new(&Case { cut: (1, 0), ..case }, &plan, &mut Numbers(1));
    let got = shorter.with(0, |t| run(&plan, t, &Options::default()));
    assert!(matches!(got, Err(RuntimeError::Length { operand: Operand::Q, got: 129, min: 130, max: 130 })));
    // Ops that no verifier would let pass.
    for bad in [AttnOp::BlockSparse { mask: calibc_ir::MaskId(99) }, AttnOp::AnchorRows { anchors: 0 }] {
        plan.ops[0] = bad;
        let got = inputs.with(0, |t| run(&plan, t, &Options::default()));
        assert!(matches!(got, Err(RuntimeError::Plan { head: 0, .. })));
    }
}
