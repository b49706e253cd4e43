//! Each check of the verifier, broken once in a small plan that passes.

use calibc_ir::verify::{self, Stage};
use calibc_ir::{Plan, text};

// 16x36 video tokens and 20 text tokens: blocks 0..4 video, block 4 both; 2 anchor rows compute 72 + 84 queries: 2 tiles.
const GOOD: &str = "\
plan toy  q_block=128 kv_block=128 head_dim=128 layers=1 heads=3
grid 1x16x36 text_tokens=20 text_position=after
sigmas 1 0.5
variants calibc_attn_bf16_hd128_anchors_ragged calibc_attn_bf16_hd128_lse_anchors_ragged
m0 = 5x5 { q0-3: 0,4; q4: 0-4 }
m1 = 5x5 { q0-3: 1-4; q4: 0-4 }
s0.l0.h0: block_sparse m0
s0.l0.h1: dense
s0.l0.h2: anchor_rows 2
s1.l0.h0: dense
s1.l0.h1: block_sparse m1
s1.l0.h2: block_sparse m0
schedule
w0 = { h0: 0-4; h1: 0-4; h2: 0-1 }
w1 = { h2: 0-4; h1: 0-4; h0: 4-0 }
s0.l0: w0
s1.l0: w1
";

fn errors(text: &str, stage: Stage) -> Vec<String> {
    let plan = text::parse(text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    verify::verify_at(&plan, stage).err().unwrap_or_default().iter().map(ToString::to_string).collect()
}

#[test]
fn every_check_fires_alone() {
    assert_eq!(errors(GOOD, Stage::Protected), [""; 0]);
    #[rustfmt::skip]
    let cases: &[(&str, &str, &[&str])] = &[
        ("1x16x36", "0x16x36", &["geometry: frames is 0; every dimension of the token grid must be at least 1"]),
        ("head_dim=128", "head_dim=96", &["head dimension 96 is not one of [64, 128]"]),
        ("sigmas 1", "sigmas inf", &["s0: sigma inf is not finite"]),
        ("s0.l0.h0: block_sparse m0", "s0.l0.h0: block_sparse m7", &[
            "s0.l0.h0: m7 is not in the table of 2 masks",
            "s1.l0.h1: m1 is used before m0; mask ids follow the order of first use",
        ]),
        ("s0.l0.h0: block_sparse m0", "s0.l0.h0: block_sparse m1", &[
            "s0.l0.h0: m1 is used before m0; mask ids follow the order of first use",
        ]),
        ("block_sparse m1", "dense", &["m1 is used by no site"]),
        ("m0 = 5x5 { q0-3: 0,4; q4: 0-4 }", "m0 = 5x6 { q0-3: 0,4; q4: 0-5 }", &["m0 is 5x6, the geometry has 5x5 blocks"]),
        ("m0 = 5x5 { q0-3: 0,4;", "m0 = 5x5 { q0: 4; q1-2: none; q3: 4;", &[
            "m0 q1: keeps no block (2 such rows)",
            "m0 q1: drops a text block (2 such rows)",
        ]),
        ("m0 = 5x5 { q0-3: 0,4; q4: 0-4", "m0 = 5x5 { q0-3: 0,4; q4: 0,4", &[
            "m0 q4: a text block must attend to every key block (1 such rows)",
        ]),
        ("m0 = 5x5 { q0-3: 0,4;", "m0 = 5x5 { q0-3: 0;", &["m0 q0: drops a text block (4 such rows)"]),
        ("anchor_rows 2", "anchor_rows 17", &[
            "s0.l0.h2: 17 anchor rows in a frame of 16 rows",
            "s0.l0: w0 holds tile 0 of h2, which has 0 tiles",
        ]),
        ("s1.l0.h0: dense", "s1.l0.h0: anchor_rows 3", &[
            "s1.l0.h0: 3 anchor rows where the plan uses 2",
            "s1.l0: w1 holds tile 4 of h0, which has 2 tiles",
        ]),
        ("bf16_hd128_anchors_ragged", "bf16_hd64_anchors_ragged", &["calibc_attn_bf16_hd64_anchors_ragged: head_dim should be 128"]),
        ("bf16_hd128_anchors_ragged", "bf16_hd128_ragged", &["calibc_attn_bf16_hd128_ragged: anchors should be 1"]),
        ("bf16_hd128_anchors_ragged", "bf16_hd128_anchors", &["calibc_attn_bf16_hd128_anchors: ragged should be 1"]),
        ("bf16_hd128_anchors_ragged", "bf16_hd128_lse_anchors_ragged", &["calibc_attn_bf16_hd128_lse_anchors_ragged is listed twice"]),
        ("s1.l0: w1", "s1.l0: w2", &["s1.l0: w2 is not one of 2 work lists", "w1 is used by no step"]),
        ("w1 = { h2: 0-4;", "w1 = { h3: 0-4;", &["s1.l0: w1 holds tile 0 of h3, which has 0 tiles"]),
        ("w1 = { h2: 0-4;", "w1 = { h2: 0-5;", &["s1.l0: w1 holds tile 5 of h2, which has 5 tiles"]),
        ("w1 = { h2: 0-4;", "w1 = { h2: 0-4 2;", &["s1.l0: w1 holds tile 2 of h2 twice"]),
        ("w1 = { h2: 0-4;", "w1 = { h2: 0-1 3;", &["s1.l0: w1 lacks 2 tiles, the first is tile 2 of h2"]),
        ("s1.l0: w1", "s1.l0: w0", &["s1.l0: w0 lacks 3 tiles, the first is tile 2 of h2", "w1 is used by no step"]),
    ];
    for (from, to, want) in cases {
        assert!(GOOD.contains(from), "{from}");
        assert_eq!(&errors(&GOOD.replacen(from, to, 1), Stage::Protected), want, "`{from}` -> `{to}`");
    }
}

#[test]
fn a_selected_plan_may_have_empty_rows_and_dropped_text() {
    let text = GOOD.replacen("m0 = 5x5 { q0-3: 0,4; q4: 0-4 }", "m0 = 5x5 { q0-3: none; q4: 0 }", 1);
    assert_eq!(errors(&text, Stage::Protected).len(), 3);
    assert_eq!(errors(&text, Stage::Selected), [""; 0]);
}

fn broken(change: impl FnOnce(&mut Plan)) -> Vec<String> {
    let mut plan = text::parse(GOOD).unwrap();
    change(&mut plan);
    verify::verify(&plan).err().unwrap_or_default().iter().map(ToString::to_string).collect()
}

#[test]
fn plans_no_text_can_spell_are_refused_too() {
    assert_eq!(broken(|p| p.sigmas.clear()), ["the plan has no steps"]);
    assert_eq!(broken(|p| p.model.layers = 0), ["the plan has no layers"]);
    assert_eq!(
        broken(|p| p.model.heads = u32::MAX),
        [
            "4294967295 heads exceed 65535",
            "8589934590 sites exceed 4294967295",
            "42949672950 work items exceed 4294967295"
        ]
    );
    assert_eq!(broken(|p| p.ops.truncate(5)), ["5 ops for 6 sites"]);
    let schedule = |change: fn(&mut calibc_ir::Schedule)| broken(|p| change(p.schedule.as_mut().unwrap()));
    let at = |i: u32| [format!("schedule: list_ptr[{i}] is out of order or out of bounds")];
    assert_eq!(schedule(|s| s.list_ptr.clear()), at(0));
    assert_eq!(schedule(|s| s.list_ptr[0] = 1), at(0));
    assert_eq!(schedule(|s| s.list_ptr[1] = 99), at(2));
    assert_eq!(schedule(|s| s.list_ptr[2] += 1), at(2));
    assert_eq!(schedule(|s| s.items.truncate(1)), at(2));
    assert_eq!(
        schedule(|s| s.list_of.truncate(1)),
        ["schedule: 1 list ids for 2 (step, layer) pairs", "w1 is used by no step"]
    );
}

/// At head_dim 64 two tiles are three query blocks: 5 blocks and 2 of anchor rows are 4 tiles and 1, of 596 and 156 rows.
#[test]
fn tiles_at_head_dim_64_are_a_block_and_a_half() {
    let narrow = GOOD.replace("head_dim=128", "head_dim=64").replace("hd128", "hd64");
    let good = narrow
        .replace("0-4; h1", "0-3; h1")
        .replace("h1: 0-4", "h1: 0-3")
        .replace("h2: 0-1", "h2: 0")
        .replace("h2: 0-4", "h2: 0-3");
    let good = good.replace("h0: 4-0", "h0: 3-0");
    assert_eq!(errors(&good, Stage::Protected), [""; 0]);
    assert_eq!(errors(&narrow, Stage::Protected)[0], "s0.l0: w0 holds tile 4 of h0, which has 4 tiles");
    let missing = good.replace("h1: 0-3; h2: 0 ", "h1: 0-2; h2: 0 ");
    assert_eq!(errors(&missing, Stage::Protected), ["s0.l0: w0 lacks 1 tiles, the first is tile 3 of h1"]);
}

#[test]
fn a_separate_key_sequence_has_its_own_columns() {
    let text = "\
plan cross  q_block=128 kv_block=128 head_dim=128 layers=1 heads=1
grid 2x8x32 kv_tokens=300
sigmas 1
m0 = 4x3 { q0-3: 0,2 }
s0.l0.h0: block_sparse m0
";
    assert_eq!(errors(text, Stage::Protected), [""; 0]);
    let anchors = text.replace("m0 = 4x3 { q0-3: 0,2 }\n", "").replace("block_sparse m0", "anchor_rows 8");
    assert_eq!(errors(&anchors, Stage::Protected), [""; 0]);
}
