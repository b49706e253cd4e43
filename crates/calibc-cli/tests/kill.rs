//! `calibc compile` killed at any moment, and many of them at once: the file is the old bundle, or the new one, or not there,
//! and nothing else lies about.

#[path = "cli/support.rs"]
#[allow(dead_code, reason = "shared with other test binaries")]
mod support;

use std::fs;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use calibc_bundle::{Bundle, BundleError};
use calibc_ir::{Geometry, Model};
use calibc_trace::planted::Planted;
use calibc_trace::random::SplitMix64;

use support::*;

const OUT: &str = "out/plan.bundle";
const KILLS: usize = 20;

/// Traces that take a moment, and two specs that make different bundles of them.
struct Site {
    bench: Bench,
    old: Vec<u8>,
    new: Vec<u8>,
}

impl Site {
    fn new() -> Option<Self> {
        let bench = Bench::new()?;
        let planted = Planted {
            model: Model { name: "planted".into(), layers: 3, heads: 8, head_dim: 64 },
            geometry: Geometry::video(8, 24, 24),
            num_steps: 4,
            covered: vec![0, 1, 2, 3],
            calibration: 3,
            ..Planted::default()
        };
        planted.write(&bench.path("busy")).unwrap();
        for folder in ["out", "tmp"] {
            fs::create_dir(bench.path(folder)).unwrap();
        }
        let mut made = Vec::new();
        for (name, rho) in [("old", 0.4), ("new", 0.9)] {
            let target = "target: {dtypes: [bf16], lse: false, archs: [sm_80]}\n";
            bench.file(&format!("{name}.yaml"), &format!("policy: {{kind: calibatt, rho: {rho}}}\n{target}"));
            bench.ok(&["compile", "busy", "-o", name, "--spec", &format!("{name}.yaml"), "-q"]);
            made.push(bench.bytes(name));
        }
        let [old, new] = <[Vec<u8>; 2]>::try_from(made).unwrap();
        assert_ne!(old, new);
        Some(Self { bench, old, new })
    }

    /// Compiles the new bundle to its place, with the cache of the tests or this one.
    fn start(&self, cache: Option<&str>) -> Child {
        let mut command = self.bench.command(&["compile", "busy", "-o", OUT, "--spec", "new.yaml", "--json"]);
        if let Some(cache) = cache {
            command.args(["--cache-dir", cache]);
        }
        command.env("TMPDIR", self.bench.path("tmp")).env("HOME", self.bench.path("tmp"));
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn finish(child: Child) -> Ended {
        ended(child.wait_with_output().unwrap()).expect(OK)
    }

    /// How long a compile takes when nobody kills it, and whether it found its kernel in the cache.
    fn time(&self, cache: Option<&str>) -> (Duration, bool) {
        let start = Instant::now();
        let ended = Self::finish(self.start(cache));
        (start.elapsed(), ended.json("compile")["kernels"][0]["cached"].as_bool().unwrap())
    }

    fn names(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.bench.path(folder)).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Kills compiles at moments spread over their whole run. Before every second one the old bundle lies at its place.
    fn kill(&self, seed: u64, cache: impl Fn(usize) -> Option<String>) {
        let (mut whole, cached) = self.time(cache(KILLS).as_deref());
        let mut rng = SplitMix64::new(seed);
        let (mut killed, mut news, mut siblings) = (0, 0, 0);
        for i in 0..KILLS {
            let cache = cache(i);
            match i % 2 {
                0 => fs::write(self.bench.path(OUT), &self.old).unwrap(),
                _ => fs::remove_file(self.bench.path(OUT)).unwrap_or_default(),
            }
            // One moment from each twentieth of the run; a quarter of them near its end, where the file is written.
            let share = (i as f64 + rng.unit()) / KILLS as f64;
            let moment = if i % 8 < 2 { 0.85 + 0.2 * rng.unit() } else { share };
            let mut child = self.start(cache.as_deref());
            std::thread::sleep(whole.mul_f64(moment));
            child.kill().unwrap();
            killed += usize::from(!child.wait().unwrap().success());
            let context = format!("kill {i} at {moment:.3} of {whole:?}");

            let found = fs::read(self.bench.path(OUT)).ok();
            match &found {
                None => assert_eq!(i % 2, 1, "{context}: the old bundle is gone"),
                Some(bytes) if *bytes == self.new => news += 1,
                Some(bytes) => assert!(i % 2 == 0 && *bytes == self.old, "{context}: {} bytes of neither", bytes.len()),
            }
            if found.is_some() {
                Bundle::open(&self.bench.path(OUT)).unwrap_or_else(|e| panic!("{context}: {e}"));
            }
            let mut names = self.names("out");
            names.retain(|name| name != "plan.bundle");
            // Between link and rename the new file has a second name; the next compile to this place removes it.
            if i % 2 == 0 && names.len() == 1 && names[0].starts_with(".calibc-") {
                siblings += 1;
                names.clear();
            }
            assert!(names.is_empty(), "{context}: {names:?}");
            assert!(self.names("tmp").is_empty(), "{context}: {:?}", self.names("tmp"));

            // Whatever was left behind, in the cache as well, the next compile is as good as any.
            if i % 4 == 0 || siblings > 0 || i + 1 == KILLS {
                let time = self.time(cache.as_deref());
                assert!(self.bench.bytes(OUT) == self.new, "{context}");
                assert_eq!(self.names("out"), ["plan.bundle"], "{context}");
                // As fast as the machine is now: tests run beside this one.
                if time.1 == cached {
                    whole = whole.min(time.0);
                }
            }
        }
        assert!(killed >= KILLS / 4, "only {killed} compiles were still running when they were killed");
        assert!(news < KILLS, "every compile had ended");
        assert!(siblings <= 1, "the instant between link and rename was met {siblings} times");
    }
}

#[test]
fn killed_with_its_kernels_in_the_cache() {
    let Some(site) = Site::new() else { return };
    site.kill(0x5eed, |_| None);
}

#[test]
fn killed_while_it_compiles_kernels() {
    let Some(site) = Site::new() else { return };
    // A cache of its own for each: NVRTC is at work for most of the run.
    site.kill(0xc01d, |i| Some(format!("cache/{i}")));
    // What a killed compile leaves in the cache is whole, or a temporary file that `cache clear` removes.
    for i in 0..=KILLS {
        let dir = site.bench.path(&format!("cache/{i}"));
        let cache = calibc_nvrtc::Cache::open(Some(&dir)).unwrap();
        assert!(cache.entries().unwrap().len() <= 1);
        cache.clear().unwrap();
        assert!(!dir.exists() || fs::read_dir(&dir).unwrap().next().is_none(), "{i}");
    }
}

/// Says that it is over, also where a check failed.
struct Until<'a>(&'a AtomicBool);

impl Drop for Until<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn many_at_once_make_one_bundle() {
    let Some(site) = Site::new() else { return };
    fs::write(site.bench.path(OUT), &site.old).unwrap();
    let done = AtomicBool::new(false);
    let digest = Bundle::parse(&site.new).unwrap().digest();
    std::thread::scope(|scope| {
        let until = Until(&done);
        // Whoever reads meanwhile sees the old bundle or the new one.
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let bytes = fs::read(site.bench.path(OUT)).unwrap();
                assert!(bytes == site.old || bytes == site.new, "{} bytes of neither", bytes.len());
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let children: Vec<_> = (0..6).map(|_| site.start(Some("cache/shared"))).collect();
        for child in children {
            let ended = Site::finish(child);
            assert_eq!((ended.json("compile")["digest"].as_str(), ended.stderr.as_str()), (Some(&*digest), ""));
        }
        drop(until);
    });
    assert!(site.bench.bytes(OUT) == site.new);
    assert_eq!(site.names("out"), ["plan.bundle"]);
    // One kernel, under its name, and no temporary file.
    let names = site.names("cache/shared");
    assert!(names.len() == 1 && names[0].ends_with(".kernel"), "{names:?}");
}

#[test]
fn the_killed_do_not_disturb_the_others() {
    let Some(site) = Site::new() else { return };
    let (whole, _) = site.time(Some("cache/first"));
    let mut rng = SplitMix64::new(0xd15);
    for round in 0..4 {
        let _ = fs::remove_file(site.bench.path(OUT));
        let cache = format!("cache/{round}");
        let mut children: Vec<_> = (0..4).map(|_| site.start(Some(&cache))).collect();
        let survivors = children.split_off(2);
        for mut child in children {
            std::thread::sleep(whole.mul_f64(0.8 * rng.unit()));
            child.kill().unwrap();
            child.wait().unwrap();
            match Bundle::open(&site.bench.path(OUT)) {
                Ok(_) => assert!(site.bench.bytes(OUT) == site.new),
                Err(BundleError::Io { .. }) => assert!(!site.bench.path(OUT).exists()),
                Err(error) => panic!("{error}"),
            }
        }
        survivors.into_iter().for_each(|child| drop(Site::finish(child)));
        assert!(site.bench.bytes(OUT) == site.new);
        // A process that was killed between link and rename leaves a name that the last of the others removed.
        Site::finish(site.start(Some(&cache)));
        assert_eq!(site.names("out"), ["plan.bundle"]);
    }
}
