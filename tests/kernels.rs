//! Generated CUDA as reviewers see it, and as the compiler sees it: every snapshot compiles for every architecture of its family,
//! without warnings and without spills.

mod compiling;

use std::path::Path;

use calibc_codegen::generate;
use calibc_ir::{Arch, DType, Family, HEAD_DIMS, Variant};

use compiling::{Work, complaints};

const ARCHS: [&str; 7] = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120"];

/// The base variant, each knob alone, and everything at once.
fn cases() -> Vec<Variant> {
    let base = Variant { dtype: DType::Bf16, head_dim: 128, lse: false, anchors: false, ragged: false };
    let all = Variant { lse: true, anchors: true, ragged: true, ..base };
    vec![
        base,
        Variant { dtype: DType::Fp16, ..base },
        Variant { head_dim: 64, ..base },
        Variant { lse: true, ..base },
        Variant { anchors: true, ..base },
        Variant { ragged: true, ..base },
        all,
        Variant { dtype: DType::Fp16, head_dim: 64, ..all },
    ]
}

/// Both head dimensions and element types, with as little as a kernel can do and with everything.
fn hopper_cases() -> Vec<Variant> {
    let base = Variant { dtype: DType::Bf16, head_dim: 128, lse: false, anchors: false, ragged: false };
    let all = Variant { lse: true, anchors: true, ragged: true, ..base };
    vec![
        base,
        Variant { lse: true, ragged: true, ..base },
        all,
        Variant { head_dim: 64, ragged: true, ..base },
        Variant { dtype: DType::Fp16, head_dim: 64, ..all },
    ]
}

fn every_variant() -> Vec<Variant> {
    let mut variants = Vec::new();
    for dtype in DType::ALL {
        for head_dim in HEAD_DIMS {
            for knobs in 0..8 {
                let [lse, anchors, ragged] = [1, 2, 4].map(|bit| knobs & bit != 0);
                variants.push(Variant { dtype, head_dim, lse, anchors, ragged });
            }
        }
    }
    variants
}

#[test]
fn cuda_snapshots() {
    insta::with_settings!({ snapshot_path => "snapshots", prepend_module_to_snapshot => false, omit_expression => true }, {
        for variant in cases() {
            insta::assert_snapshot!(variant.to_string(), generate(&variant, Family::Portable).unwrap().text);
        }
        for variant in hopper_cases() {
            let kernel = generate(&variant, Family::Hopper).unwrap();
            insta::assert_snapshot!(kernel.symbol, kernel.text);
        }
    });
}

#[test]
fn every_snapshot_compiles_for_every_architecture() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("snapshots");
    let (mut work, mut found) = (Vec::new(), [0; 2]);
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        if !name.starts_with("calibc_attn_") || path.extension().is_none_or(|e| e != "snap") {
            continue;
        }
        // A snapshot file is a header between two `---` lines, then the text.
        let file = std::fs::read_to_string(&path).unwrap();
        let source = file.splitn(3, "---\n").nth(2).expect("an insta snapshot").to_owned();
        let family = if name.ends_with("_hopper") { Family::Hopper } else { Family::Portable };
        found[family as usize] += 1;
        let archs =
            ARCHS.iter().filter(|arch| family.compiles_for(arch.parse().expect("the list holds architectures")));
        work.extend(archs.map(|&arch| Work { symbol: name.clone(), source: source.clone(), arch: arch.to_owned() }));
    }
    work.sort();
    assert!(found[0] >= 8 && found[1] >= 4, "at least 8 portable and 4 Hopper snapshots, found {found:?}");
    assert_eq!(complaints(&work, |_| true), Vec::<String>::new());
}

#[test]
fn every_variant_compiles_for_the_default_architectures() {
    let mut work = Vec::new();
    for variant in every_variant() {
        for arch in Arch::DEFAULT {
            // The portable kernel too where it is only the correctness twin.
            for family in Family::ALL.into_iter().filter(|family| family.compiles_for(arch)) {
                let kernel = generate(&variant, family).unwrap();
                work.push(Work { symbol: kernel.symbol, source: kernel.text, arch: arch.to_string() });
            }
        }
    }
    // Versions differ in what they say of asynchronous products.
    let hopper = |work: &Work| work.symbol.ends_with("_hopper");
    assert_eq!(work.iter().filter(|work| hopper(work)).count(), every_variant().len());
    assert_eq!(complaints(&work, hopper), Vec::<String>::new());
}
