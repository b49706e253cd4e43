//! What goes in comes out, byte for byte the same file each time, and what would not come out does not go in.

mod support;

use calibc_bundle::{Bundle, BundleError, Codec, Expected, encode};
use calibc_ir::{AnchorTable, AttnOp, DType, Family, Geometry, HeadId, MaskId, TextPosition, Variant, WorkItem};
use proptest::prelude::*;
use support::{Owned, Parts, Rng, arch, plan, random, sample};

fn assert_same(bundle: &Bundle, owned: &Owned) {
    assert_eq!(bundle.plan(), &owned.plan);
    assert_eq!(bundle.spec(), owned.spec);
    assert_eq!(bundle.report(), &owned.report);
    assert_eq!(bundle.calibc_version(), "1.2.3");
    let table = owned.plan.anchors().map(|anchors| AnchorTable::new(&owned.plan.geometry, anchors));
    assert_eq!(bundle.anchor_table(), table.as_ref());
    let mut kernels = owned.kernels.clone();
    kernels.sort_by_key(|k| (owned.plan.variants.iter().position(|v| *v == k.variant), k.family, k.arch));
    assert_eq!(bundle.kernels(), kernels);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_plan_comes_back_and_encodes_to_the_same_bytes(seed: u64) {
        let mut owned = random(seed);
        let file = owned.encode();
        let bundle = Bundle::parse(&file).unwrap();
        assert_same(&bundle, &owned);
        owned.kernels.reverse();
        owned.plan = bundle.plan().clone();
        prop_assert_eq!(&owned.encode(), &file, "neither the kernels' order nor a round trip changes the bytes");
        prop_assert_eq!(Parts::of(&file).build(), file, "the independent writer agrees on every byte");
    }
}

#[test]
fn bytes_do_not_depend_on_threads() {
    let owned = sample();
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let four = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
    assert_eq!(one.install(|| owned.encode()), four.install(|| owned.encode()));
}

#[test]
fn a_written_file_opens() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plan.bundle");
    let owned = sample();
    let file = owned.encode();
    calibc_bundle::write(&path, &file).unwrap();
    let bundle = Bundle::open(&path).unwrap();
    assert_same(&bundle, &owned);
    assert_eq!(bundle.file_len(), file.len() as u64);
    let header: [u8; 32] = file[56..88].try_into().unwrap();
    assert_eq!(bundle.digest(), blake3::Hash::from(header).to_hex().to_string());
    let stored: u64 = bundle.sections().iter().map(|s| s.stored).sum();
    assert!(stored < bundle.file_len() && bundle.sections().iter().any(|s| s.codec == Codec::Zstd && s.stored < s.raw));
    let names: Vec<_> = bundle.sections().iter().map(|s| s.name.as_str()).filter(|n| !n.contains("/calibc")).collect();
    assert_eq!(names, ["masks/0", "masks/1", "ops", "schedule", "anchors", "spec", "report"]);
}

#[test]
fn what_is_not_a_readable_file_is_an_io_error() {
    let folder = tempfile::tempdir().unwrap();
    for path in [folder.path().to_owned(), folder.path().join("missing"), "/dev/null".into(), "/dev/zero".into()] {
        match Bundle::open(&path) {
            Err(BundleError::Io { action: "read", path: at, .. }) => assert_eq!(at, path),
            other => panic!("{}: {other:?}", path.display()),
        }
    }
    let empty = folder.path().join("empty");
    std::fs::write(&empty, b"").unwrap();
    assert!(matches!(Bundle::open(&empty), Err(BundleError::NotABundle)));
}

#[test]
fn the_best_kernel_for_a_gpu_is_found_or_what_there_is_is_named() {
    let mut owned = sample();
    let variant = owned.plan.variants[0];
    owned.kernels = support::kernels(&owned.plan, &["sm_80", "sm_86", "sm_89", "sm_90", "sm_90a"], &mut Rng(1));
    owned.kernels.retain(|k| k.variant == variant || k.arch == arch("sm_80"));
    owned.kernels.retain(|k| k.variant != owned.plan.variants[2]);
    let bundle = Bundle::parse(&owned.encode()).unwrap();
    for (cc, want) in [((8, 0), "sm_80"), ((8, 7), "sm_86"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((9, 1), "sm_90")] {
        let kernel = bundle.kernel_for(cc, &variant).unwrap();
        assert_eq!((kernel.arch, kernel.family), (arch(want), Family::of(arch(want))), "{cc:?}");
    }
    owned.kernels.retain(|k| k.family == Family::Portable);
    let twin = Bundle::parse(&owned.encode()).unwrap();
    let kernel = twin.kernel_for((9, 0), &variant).unwrap();
    assert_eq!(
        (kernel.arch, kernel.family),
        (arch("sm_90a"), Family::Portable),
        "the correctness twin, where it is alone"
    );
    let other = owned.plan.variants[1];
    match bundle.kernel_for((9, 0), &other) {
        Err(e @ BundleError::NotForThisGpu { .. }) => assert_eq!(
            e.to_string(),
            "no kernel for compute capability 9.0: the bundle has sm_80; recompile with `--arch` for this GPU"
        ),
        other => panic!("{other:?}"),
    }
    let absent = owned.plan.variants[2];
    match bundle.kernel_for((8, 0), &absent) {
        Err(BundleError::NoSuchVariant { variant: v, available }) => {
            assert_eq!((v, available), (absent, vec![variant, other]))
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn another_model_or_shape_is_refused_by_name() {
    let bundle = Bundle::parse(&sample().encode()).unwrap();
    let plan = bundle.plan();
    let exact = Expected {
        layers: Some(2),
        heads: Some(3),
        head_dim: Some(plan.model.head_dim),
        steps: Some(3),
        q_tokens: Some(670),
        kv_tokens: Some(670),
    };
    bundle.check_model(&exact).unwrap();
    bundle.check_model(&Expected::default()).unwrap();
    let model = |expected| match bundle.check_model(&expected) {
        Err(BundleError::NotForThisModel { what, .. }) => what,
        other => panic!("{other:?}"),
    };
    assert_eq!(model(Expected { layers: Some(3), ..exact }), "layers");
    assert_eq!(model(Expected { heads: Some(4), ..exact }), "heads");
    assert_eq!(model(Expected { head_dim: Some(96), ..exact }), "head_dim");
    assert_eq!(model(Expected { steps: Some(50), ..exact }), "steps");
    for (expected, what) in [
        (Expected { q_tokens: Some(669), ..exact }, "query tokens"),
        (Expected { kv_tokens: Some(671), ..exact }, "key tokens"),
    ] {
        assert!(
            matches!(bundle.check_model(&expected), Err(BundleError::NotForThisShape { what: w, .. }) if w == what)
        );
    }
}

#[test]
fn trailing_text_may_be_shorter_but_no_shorter_than_the_video() {
    let geometry = Geometry { text_tokens: 70, text_position: TextPosition::After, ..Geometry::video(3, 10, 20) };
    let owned = Owned { plan: plan(geometry, 1, 1, 1, None, &mut Rng(1)), kernels: vec![], ..sample() };
    let bundle = Bundle::parse(&owned.encode()).unwrap();
    let check = |q, kv| bundle.check_model(&Expected { q_tokens: Some(q), kv_tokens: Some(kv), ..Expected::default() });
    for n in [600, 601, 670] {
        check(n, n).unwrap();
    }
    for (q, kv) in [(599, 599), (671, 671), (600, 601), (670, 600)] {
        assert!(matches!(check(q, kv), Err(BundleError::NotForThisShape { .. })), "{q} {kv}");
    }
}

/// An edit of the sample that spoils it, and the part that the error must name.
type Spoil = (fn(&mut Owned), &'static str);

#[test]
fn contents_that_would_not_open_are_refused() {
    let first_mask = |owned: &mut Owned| {
        let sparse = owned.plan.ops.iter_mut().find(|op| matches!(op, AttnOp::BlockSparse { .. }));
        *sparse.unwrap() = AttnOp::BlockSparse { mask: MaskId(1000) };
    };
    let cases: &[Spoil] = &[
        (first_mask, "plan"),
        (|o| o.plan.sigmas[1] = f64::NAN, "plan"),
        (|o| o.plan.schedule.as_mut().unwrap().items[0] = WorkItem::new(HeadId(2), 99), "plan"),
        (|o| o.plan.geometry.height = 0, "plan"),
        (|o| o.plan.schedule = None, "plan"),
        (|o| (o.plan.variants, o.kernels) = (vec![], vec![]), "plan"),
        (|o| o.kernels[0].symbol = "a\0b".into(), "kernel"),
        (|o| o.kernels[0].symbol = String::new(), "kernel"),
        (|o| o.kernels[0].cubin.clear(), "kernel"),
        (|o| o.kernels[0].threads = 0, "kernel"),
        (|o| o.kernels[0].threads = 1025, "kernel"),
        (|o| o.kernels[0].source.push(' '), "kernel"),
        (|o| o.kernels[0].arch.minor = 77, "kernel"),
        (|o| o.kernels[0].family = Family::Hopper, "kernel"),
        (|o| o.kernels.push(o.kernels[0].clone()), "kernel"),
        (|o| o.kernels[0].variant = Variant { dtype: DType::Fp16, lse: true, ..o.kernels[0].variant }, "kernel"),
        (|o| (0..300).for_each(|_| o.report = serde_json::json!([o.report])), "report"),
        (|o| o.plan.model.name = "x".repeat(17 << 20), "manifest"),
    ];
    for (i, (spoil, part)) in cases.iter().enumerate() {
        let mut owned = sample();
        spoil(&mut owned);
        match encode(&owned.contents()) {
            Err(BundleError::Unwritable { what, .. }) => assert!(what.starts_with(part), "case {i}: {what}"),
            other => panic!("case {i}: {other:?}"),
        }
    }
}
