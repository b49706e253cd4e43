//! The text form: print and parse are inverse on every plan, broken ones included, and errors name their line.

use calibc_ir::text::{self, Options};
use calibc_ir::{
    AttnOp, BlockMask, DType, Geometry, Layout, MaskId, MaskTable, Model, Plan, Schedule, TextPosition, Variant,
    WorkItem,
};
use proptest::collection::vec;
use proptest::prelude::*;

fn geometry() -> impl Strategy<Value = Geometry> {
    let position = prop::sample::select(vec![TextPosition::None, TextPosition::Before, TextPosition::After]);
    let layout = prop_oneof![Just(Layout::Raster), (1..4_u32, 0..9_u32, 1..9_u32).prop_map(|t| Layout::Tile(t.into()))];
    (0..9_u32, 1..40_u32, any::<u32>(), 0..300_u32, position, layout, prop::option::of(any::<u32>())).prop_map(
        |(frames, height, width, text_tokens, text_position, layout, kv_tokens)| Geometry {
            frames,
            height,
            width,
            text_tokens,
            text_position,
            layout,
            kv_tokens,
        },
    )
}

fn mask() -> impl Strategy<Value = BlockMask> {
    (1..20_u32, 1..70_u32, 1..9_u32, any::<u64>()).prop_map(|(rows, cols, stripes, seed)| {
        // Few distinct rows, so that runs of equal rows, empty rows and full ones all occur.
        BlockMask::from_fn(rows, cols, |r, c| {
            let kind = (r / stripes).wrapping_mul(7) ^ seed as u32;
            kind.is_multiple_of(5) || (!kind.is_multiple_of(3) && seed >> ((r / stripes + c) % 64) & 1 == 1)
        })
    })
}

fn variant() -> impl Strategy<Value = Variant> {
    (any::<[bool; 4]>(), 0..300_u32).prop_map(|([bf16, lse, anchors, ragged], head_dim)| Variant {
        dtype: if bf16 { DType::Bf16 } else { DType::Fp16 },
        head_dim,
        lse,
        anchors,
        ragged,
    })
}

fn schedule(pairs: usize) -> impl Strategy<Value = Schedule> {
    let item = prop_oneof![0..40_u32, any::<u32>()].prop_map(WorkItem);
    (vec(any::<u32>(), pairs), vec(vec(item, 0..30), 0..4)).prop_map(|(list_of, lists)| {
        let mut list_ptr = vec![0];
        lists.iter().for_each(|list| list_ptr.push(list_ptr[list_ptr.len() - 1] + list.len() as u32));
        Schedule { list_of, list_ptr, items: lists.concat() }
    })
}

prop_compose! {
    fn plan()(steps in 0..3_usize, layers in 0..3_u32, heads in 0..4_u32)
        (model in ("\\PC{0,8}|[a-z0-9_.]{1,8}|[\\\\\"\n;={}\t]{1,4}", any::<u32>()), geometry in geometry(),
         sigmas in vec(prop_oneof![-1e300..1e300, Just(f64::INFINITY), Just(1.0), 0.0..1.0], steps),
         masks in vec(mask(), 0..4), variants in vec(variant(), 0..3),
         schedule in prop::option::of(schedule(steps * layers as usize)),
         ops in vec((0..4_u32, any::<u16>()), steps * (layers * heads) as usize), layers in Just(layers), heads in Just(heads))
        -> Plan
    {
        let mut table = MaskTable::default();
        masks.into_iter().for_each(|mask| { table.intern(mask); });
        let op = |&(kind, n): &(u32, u16)| match kind {
            0 => AttnOp::Dense,
            1 => AttnOp::AnchorRows { anchors: n },
            _ => AttnOp::BlockSparse { mask: MaskId(u32::from(n) % 5) },
        };
        let (name, head_dim) = model;
        let model = Model { name, layers, heads, head_dim };
        Plan { model, geometry, sigmas, masks: table, ops: ops.iter().map(op).collect(), variants, schedule }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_printed_is_read_back(plan in plan()) {
        let text = text::print(&plan, Options { schedule: true }).to_string();
        prop_assert_eq!(text::parse(&text).map_err(|e| format!("{e}\n{text}")), Ok(plan.clone()));
        let plain = text::parse(&plan.to_string()).map_err(|e| e.to_string());
        prop_assert_eq!(plain, Ok(Plan { schedule: None, ..plan }));
    }

    #[test]
    fn damaged_text_never_panics(plan in plan(), cut in any::<prop::sample::Index>(), with in "[-0-9smwhlq{}:;=, \"\n]{0,3}") {
        let text = text::print(&plan, Options { schedule: true }).to_string();
        let at = cut.index(text.len());
        if text.is_char_boundary(at) && text.is_char_boundary(at + 1) {
            let damaged = format!("{}{with}{}", &text[..at], &text[at + 1..]);
            if let Ok(again) = text::parse(&damaged) {
                let printed = text::print(&again, Options { schedule: true }).to_string();
                prop_assert!(text::parse(&printed).is_ok());
            }
        }
    }
}

const SMALL: &str = "\
plan toy  q_block=128 kv_block=128 head_dim=64 layers=1 heads=2
grid 1x16x32
sigmas 1
m0 = 4x4 {
  q0-2: 0;
  q3: 0-3 }
s0.l0.h0: block_sparse m0
s0.l0.h1: dense
schedule
w0 = { h0: 0-3; h1: 3-0 }
s0.l0: w0
";

#[test]
fn errors_name_the_line_and_what_stands_there() {
    let cases: &[(&str, &str, &str)] = &[
        (
            "plan toy  q_block=128 kv_block=128 head_dim=64 layers=1 heads=2",
            "plan",
            "line 1: expected the model's name, found the end of the line",
        ),
        ("plan toy  ", "plan \"toy", "line 1: the quoted name does not end on its line"),
        ("q_block=128", "q_block=64", "line 1: blocks of 64 tokens; only 128 is supported"),
        ("layers=1 ", "", "line 1: `layers` is missing"),
        ("heads=2", "heads=2 heads=2", "line 1: `heads` is given twice"),
        ("heads=2", "hats=2", "line 1: expected q_block, kv_block, head_dim, layers or heads, found `hats`"),
        ("1x16x32", "1x16", "line 2: expected a grid such as 21x45x80, found `1x16`"),
        ("sigmas 1", "sigmas one", "line 3: expected a number, found `one`"),
        ("sigmas 1", "sigmas 1 0.5", "line 12: `s1.l0.h0` is missing"),
        ("m0 =", "m1 =", "line 4: expected mask ids in order, found `m1`"),
        ("4x4", "4x99999", "line 4: `4x99999` is out of range; the limit is 32769"),
        ("q0-2: 0;", "q1: 0;", "line 5: expected rows in order, each once, found q1"),
        ("q0-2: 0;", "q0-2: 4;", "line 5: `4-4` is out of range; the limit is 4"),
        ("q3: 0-3 }", "}", "line 6: expected a row such as q0 or q0-3, found `}`"),
        ("q3: 0-3 }", "q3: 0-3 }\nm1 = 4x4 { q0-2: 0; q3: 0-3 }", "line 7: m1 equals m0; equal masks have one id"),
        ("block_sparse m0", "block_sparse", "line 7: expected a mask such as m0, found the end of the line"),
        ("h1: dense", "h1: Dense", "line 8: expected dense, block_sparse or anchor_rows, found `Dense`"),
        ("h1: dense", "h0: dense", "line 8: `s0.l0.h0` is given twice"),
        ("s0.l0.h1: dense", "s0.l0.h2: dense", "line 8: `s0.l0.h2` is out of range; the limit is 2"),
        ("s0.l0.h1: dense\n", "", "line 11: `s0.l0.h1` is missing"),
        ("schedule\n", "", "line 11: `schedule` is missing"),
        ("h0: 0-3;", "h0: 0-99999;", "line 10: `h0: 0-99999` is out of range; the limit is 65536"),
        ("s0.l0: w0\n", "s0.l0: w0", ""),
        ("s0.l0: w0", "s0.l0: w0 w0", "line 11: expected the end of the line, found `w0`"),
        (
            "s0.l0: w0",
            "x",
            "line 11: expected plan, grid, sigmas, variants, schedule, or an id such as m0, w0, s0.l0.h0, found `x`",
        ),
        ("s0.l0: w0\n", "", "line 11: `s0.l0` is missing"),
    ];
    for (from, to, want) in cases {
        assert!(SMALL.contains(from), "{from}");
        let got = text::parse(&SMALL.replacen(from, to, 1)).err().map(|e| e.to_string()).unwrap_or_default();
        assert_eq!(&got, want, "`{from}` -> `{to}`");
    }
}
