//! Generated capture kernels as reviewers see them, and as the compiler sees them: every one compiles for every architecture of its
//! family, without warnings and without spills.

mod compiling;

use calibc_codegen::{CaptureVariant, Statistic, generate_capture};
use calibc_ir::{DType, Family, HEAD_DIMS};

use compiling::{Work, complaints};

const ARCHS: [&str; 7] = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120"];

fn variants() -> Vec<CaptureVariant> {
    let mut variants = Vec::new();
    for dtype in DType::ALL {
        for head_dim in HEAD_DIMS {
            for statistic in Statistic::ALL {
                variants.push(CaptureVariant { dtype, head_dim, statistic });
            }
        }
    }
    variants
}

#[test]
fn capture_snapshots() {
    let codes = CaptureVariant { dtype: DType::Bf16, head_dim: 128, statistic: Statistic::Log2U8 };
    let floats = CaptureVariant { dtype: DType::Fp16, head_dim: 64, statistic: Statistic::F32 };
    insta::with_settings!({ snapshot_path => "snapshots", prepend_module_to_snapshot => false, omit_expression => true }, {
        for family in Family::ALL {
            for variant in [codes, floats] {
                let kernel = generate_capture(&variant, family).unwrap();
                insta::assert_snapshot!(kernel.symbol, kernel.text);
            }
        }
    });
}

#[test]
fn every_capture_kernel_compiles_for_every_architecture() {
    let mut work = Vec::new();
    for family in Family::ALL {
        for variant in variants() {
            let kernel = generate_capture(&variant, family).unwrap();
            let archs =
                ARCHS.iter().filter(|arch| family.compiles_for(arch.parse().expect("the list holds architectures")));
            work.extend(archs.map(|&arch| Work {
                symbol: kernel.symbol.clone(),
                source: kernel.text.clone(),
                arch: arch.to_owned(),
            }));
        }
    }
    assert_eq!(complaints(&work, |_| true), Vec::<String>::new());
}
