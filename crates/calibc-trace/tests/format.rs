//! What is written is read back, in every encoding, and the real traces of the repository are good.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use calibc_ir::{Geometry, HeadId, LayerId, Layout, Model, Site, StepId, TextPosition};
use calibc_trace::planted::Planted;
use calibc_trace::summary::EPSILONS;
use calibc_trace::writer::{Extras, LayerTensors, TraceSpec, TraceWriter};
use calibc_trace::{Encoding, MANIFEST, Prompt, Sensitivity, Split, Trace, TraceError, check, threshold};

fn open(dir: &Path) -> Trace {
    Trace::open(dir, &|_, _| ()).unwrap()
}

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/traces")
}

fn spec(encoding: Encoding) -> TraceSpec {
    TraceSpec {
        model: Model { name: "toy".into(), layers: 2, heads: 2, head_dim: 64 },
        geometry: Geometry::video(1, 20, 16),
        sigmas: vec![1.0, 0.5, 0.25],
        branches: vec!["uncond".into(), "cond".into()],
        encoding,
        anchor_counts: vec![2, 5],
    }
}

fn prompt(id: &str, split: Split) -> Prompt {
    Prompt { id: id.into(), seed: None, split, label: "a red \"square\"\n".into() }
}

/// 2 heads x 3 x 3, rows that sum to 1 and have no exact code.
fn energy(shift: f32) -> Vec<f32> {
    (0..6)
        .flat_map(|r| [0.5 + shift, 0.3 - shift / 2.0, 0.2 - shift / 2.0].map(|e| if r == 5 { 1.0 / 3.0 } else { e }))
        .collect()
}

fn write_shard(writer: &mut TraceWriter, id: &str, step: u32, branch: &str, shift: f32) -> Result<(), TraceError> {
    let extras = Extras { deviation: true, anchor_similarity: true, anchor_error: false };
    let mut shard = writer.shard(id, StepId(step), branch, extras)?;
    // Layers may come in any order.
    for layer in [1, 0] {
        let tensors = LayerTensors {
            energy: &energy(shift + layer as f32 / 64.0),
            deviation: &[0.25; 18],
            anchor_similarity: &[0.5 + shift, 0.75, 0.875, 1.0],
            anchor_error: &[],
        };
        shard.layer(LayerId(layer), tensors)?;
    }
    shard.finish()
}

#[test]
fn every_encoding_reads_back_what_was_written() {
    for encoding in Encoding::ALL {
        let root = tempfile::tempdir().unwrap();
        let mut writer = TraceWriter::create(root.path(), spec(encoding)).unwrap();
        writer.add_prompt(prompt("a", Split::Holdout)).unwrap();
        writer.add_prompt(prompt("b", Split::Calibration)).unwrap();
        for (p, shift) in [("a", 0.0), ("b", 0.125)] {
            for branch in ["cond", "uncond"] {
                write_shard(&mut writer, p, 1, branch, shift).unwrap();
            }
        }
        let weights = Sensitivity { step: vec![3.0, 2.0, 1.0], head: (0..12).map(|i| i as f32).collect() };
        writer.set_sensitivity(&weights).unwrap();
        assert!(!root.path().join(MANIFEST).exists(), "no trace before commit");
        writer.commit().unwrap();
        let trace = open(root.path());
        assert_eq!(trace.manifest(), writer.manifest());
        assert_eq!((trace.branch(), trace.covered_steps()), ("cond", &[StepId(1)][..]));
        assert_eq!([Split::Calibration, Split::Holdout].map(|s| trace.num_prompts(s)), [1, 1]);
        assert_eq!(trace.sensitivity(), Some(&weights));
        assert_eq!([0, 2].map(|s| trace.nearest_covered(StepId(s))), [StepId(1); 2]);

        let got = trace.energy(Split::Calibration, 0, StepId(1), LayerId(1), HeadId(1)).unwrap();
        let want = &energy(0.125 + 1.0 / 64.0)[9..];
        let bound = match encoding {
            Encoding::Log2U8 => 0.0443,
            Encoding::F16 => 1.0 / 2048.0,
            Encoding::F32 => 0.0,
        };
        for (&got, &want) in got.values.iter().zip(want) {
            let want = f64::from(want);
            assert!((got - want).abs() <= bound * want, "{encoding}: {got} for {want}");
        }
        let deviation = trace.deviation(Split::Holdout, 0, StepId(1), LayerId(0), HeadId(0)).unwrap().unwrap();
        assert_eq!(deviation.values, [0.25; 9]);
        let similarity = |anchors| trace.anchor_similarity(StepId(1), LayerId(0), HeadId(0), anchors).unwrap();
        assert_eq!([2, 5, 7].map(similarity), [Some(0.625), Some(0.75), None]);
        assert_eq!(trace.anchor_error(StepId(1), LayerId(0), HeadId(0), 5).unwrap(), None);
        let extras = [("block_deviation", true), ("anchor_similarity", true), ("anchor_error", false)];
        assert_eq!((trace.coverage().extras, trace.coverage().shards), (extras, 4));
        // No temporary file is left.
        let files = fs::read_dir(root.path().join("a")).unwrap().count();
        assert_eq!(files, 2);
    }
}

#[test]
fn prompts_can_be_added_to_a_finished_trace() {
    let root = tempfile::tempdir().unwrap();
    let mut writer =
        TraceWriter::create(root.path(), TraceSpec { branches: vec!["cond".into()], ..spec(Encoding::F16) }).unwrap();
    writer.add_prompt(prompt("a", Split::Calibration)).unwrap();
    write_shard(&mut writer, "a", 0, "cond", 0.0).unwrap();
    writer.commit().unwrap();
    assert!(matches!(TraceWriter::create(root.path(), spec(Encoding::F16)), Err(TraceError::AlreadyATrace { .. })));
    let mut writer = TraceWriter::open(root.path()).unwrap();
    writer.add_prompt(prompt("b", Split::Calibration)).unwrap();
    // The old trace stays until the new one is complete.
    assert!(matches!(writer.commit(), Err(TraceError::MissingShard { .. })));
    assert_eq!(open(root.path()).num_prompts(Split::Calibration), 1);
    write_shard(&mut writer, "b", 0, "cond", 0.125).unwrap();
    writer.commit().unwrap();
    assert_eq!(open(root.path()).num_prompts(Split::Calibration), 2);
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let root = tempfile::tempdir().unwrap();
    let bad = TraceSpec { branches: Vec::new(), ..spec(Encoding::F32) };
    assert!(matches!(TraceWriter::create(root.path(), bad), Err(TraceError::Empty { field: "branches" })));
    let mut writer = TraceWriter::create(root.path(), spec(Encoding::Log2U8)).unwrap();
    assert!(matches!(writer.add_prompt(prompt("../a", Split::Holdout)), Err(TraceError::BadName { .. })));
    writer.add_prompt(prompt("a", Split::Calibration)).unwrap();
    assert!(matches!(writer.add_prompt(prompt("a", Split::Holdout)), Err(TraceError::DuplicateName { .. })));
    assert!(matches!(write_shard(&mut writer, "b", 0, "cond", 0.0), Err(TraceError::UnknownPrompt { .. })));
    assert!(matches!(write_shard(&mut writer, "a", 3, "cond", 0.0), Err(TraceError::StepOutOfRange { .. })));
    assert!(matches!(write_shard(&mut writer, "a", 0, "both", 0.0), Err(TraceError::UnknownBranch { .. })));
    write_shard(&mut writer, "a", 0, "cond", 0.0).unwrap();
    assert!(matches!(write_shard(&mut writer, "a", 0, "cond", 0.0), Err(TraceError::DuplicateShard { .. })));

    let mut shard = writer.shard("a", StepId(1), "cond", Extras::default()).unwrap();
    let mut refuse = |energy: &[f32], layer: u32| {
        shard.layer(LayerId(layer), LayerTensors { energy, ..LayerTensors::default() }).unwrap_err()
    };
    let mut values = energy(0.0);
    assert!(matches!(refuse(&values[1..], 0), TraceError::ValueCount { expected: 18, found: 17, .. }));
    assert!(matches!(refuse(&values, 2), TraceError::OutOfRange { what: "layer", .. }));
    for (value, sum) in [(f32::NAN, false), (-0.1, false), (f32::INFINITY, false), (0.9, true)] {
        values[4] = value;
        assert_eq!(matches!(refuse(&values, 0), TraceError::RowSum { .. }), sum, "{value}");
    }
    assert!(matches!(shard.finish(), Err(TraceError::MissingTensor { .. })));
    let short = Sensitivity { step: vec![1.0], head: Vec::new() };
    assert!(matches!(writer.set_sensitivity(&short), Err(TraceError::ValueCount { .. })));
}

#[test]
fn planted_traces_of_every_shape_are_good_and_repeatable() {
    let video = Geometry::video(3, 10, 17);
    let text = |text_tokens, text_position| Geometry { text_tokens, text_position, ..video };
    let tiles = Geometry { layout: Layout::Tile([2, 4, 8]), ..text(200, TextPosition::After) };
    let grids =
        [video, text(300, TextPosition::Before), text(40, TextPosition::After), tiles, Geometry::video(1, 5, 1)];
    for (geometry, encoding) in grids.into_iter().zip(Encoding::ALL.into_iter().cycle()) {
        let planted = Planted { geometry, encoding, deviation: true, ..Planted::default() };
        let [a, b] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        planted.write(a.path()).unwrap();
        planted.write(b.path()).unwrap();
        assert!(check(a.path(), &|_, _| ()).is_empty());
        let manifests = [&a, &b].map(|dir| fs::read(dir.path().join(MANIFEST)).unwrap());
        assert!(manifests[0] == manifests[1], "the digests in it cover the shards");
    }
}

#[test]
fn planted_bytes_are_the_same_on_every_platform() {
    let dir = tempfile::tempdir().unwrap();
    Planted::default().write(dir.path()).unwrap();
    let digest = blake3::hash(&fs::read(dir.path().join(MANIFEST)).unwrap()).to_string();
    assert_eq!(digest, "c352fa1548fe827bc4a5fdb7d0ca98e976553eb2bb8fa8bba51d7d042ab3f57e");
}

#[test]
fn repetitive_heads_are_similar_and_others_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let planted = Planted { model: Model { heads: 16, ..Planted::default().model }, ..Planted::default() };
    planted.write(dir.path()).unwrap();
    let trace = open(dir.path());
    let heads = (0..2).flat_map(|l| (0..16).map(move |h| (LayerId(l), HeadId(h))));
    let similar: Vec<f64> = heads.map(|(l, h)| trace.anchor_similarity(StepId(2), l, h, 5).unwrap().unwrap()).collect();
    assert!(similar.iter().all(|s| !(0.75..0.9).contains(s)), "{similar:?}");
    let repetitive = similar.iter().filter(|&&s| s > 0.87).count();
    assert!((3..=16).contains(&repetitive), "{repetitive} of 32");
}

#[test]
fn threshold_maps_of_a_trace_are_those_of_its_energies() {
    for encoding in Encoding::ALL {
        let dir = tempfile::tempdir().unwrap();
        Planted { encoding, ..Planted::default() }.write(dir.path()).unwrap();
        let trace = open(dir.path());
        let site = (StepId(2), LayerId(1), HeadId(3));
        let energy = |p| trace.energy(Split::Calibration, p, site.0, site.1, site.2).unwrap();
        for (leave_out, rest) in [(None, vec![0, 1, 2]), (Some(1), vec![0, 2])] {
            let energies: Vec<_> = rest.into_iter().map(energy).collect();
            let map = trace.threshold_map(site.0, site.1, site.2, 0.5, leave_out).unwrap();
            assert_eq!(map, threshold::threshold_map(&energies, 0.5));
        }
    }
}

#[test]
fn questions_about_what_is_not_there_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    Planted { calibration: 1, anchor_counts: Vec::new(), ..Planted::default() }.write(dir.path()).unwrap();
    let trace = open(dir.path());
    let map = |s, l, h, out| trace.threshold_map(StepId(s), LayerId(l), HeadId(h), 0.5, out).unwrap_err();
    assert!(matches!(map(1, 0, 0, None), TraceError::StepNotCovered { step: StepId(1) }));
    assert!(matches!(map(0, 2, 0, None), TraceError::OutOfRange { what: "layer", index: 2, count: 2 }));
    assert!(matches!(map(0, 0, 4, None), TraceError::OutOfRange { what: "head", .. }));
    let site = Site::new(0, 0, 0);
    assert!(matches!(map(0, 0, 0, Some(0)), TraceError::NoVotes { site: s } if s == site));
    let energy = trace.energy(Split::Holdout, 1, StepId(0), LayerId(0), HeadId(0));
    assert!(matches!(energy, Err(TraceError::OutOfRange { what: "holdout prompt", .. })));
    assert_eq!(trace.anchor_similarity(StepId(0), LayerId(0), HeadId(0), 5).unwrap(), None);
    assert_eq!(trace.deviation(Split::Holdout, 0, StepId(0), LayerId(0), HeadId(0)).unwrap(), None);
}

#[test]
fn the_example_traces_are_good_and_as_dense_as_the_recipe_makes_them() {
    let (bytes, total) = (AtomicU64::new(0), AtomicU64::new(0));
    let progress = |done, of| {
        bytes.fetch_max(done, Ordering::Relaxed);
        total.store(of, Ordering::Relaxed);
    };
    assert!(check(&examples(), &progress).is_empty());
    assert_eq!((bytes.into_inner(), total.into_inner()), (6 * 592_064, 6 * 592_064));
    let trace = open(&examples());
    let density = trace.density(&EPSILONS, 0.5, &|_, _| ()).unwrap();
    // As NumPy computes them from sorted sums and votes.
    let rounded = density.overall.iter().map(|d| (d * 1e4).round() / 1e4).collect::<Vec<_>>();
    assert_eq!(rounded, [0.4494, 0.56, 0.6498, 0.8559]);
    assert!(density.layers.iter().all(|l| l.is_sorted()) && density.layers.len() == 6);
    assert_eq!(density.steps.iter().map(|(s, _)| s.0).collect::<Vec<_>>(), [3, 13]);
    let mean = density.steps.iter().map(|(_, d)| d[1]).sum::<f64>() / 2.0;
    assert!((mean - density.overall[1]).abs() < 1e-12);
}
