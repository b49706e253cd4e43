//! The real libnvrtc: compiles, the build gate, threads, the cache. Needs no GPU; skips visibly where there is no libnvrtc.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use calibc_nvrtc::{Cache, GateFailure, Nvrtc, NvrtcError, Request, WhyNot, testing};

const PLAIN: &str = r#"extern "C" __global__ void plain(float* x) {
    __shared__ float s[64];
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = s[63 - threadIdx.x];
}
"#;

const SPILLING: &str = r#"extern "C" __global__ void __launch_bounds__(1024, 2) spilling(float* x, int n) {
    float a[128];
    #pragma unroll
    for (int i = 0; i < 128; i++) a[i] = x[i * 1024 + threadIdx.x];
    for (int j = 0; j < n; j++) {
        #pragma unroll
        for (int i = 0; i < 128; i++) a[i] = a[(i + 1) % 128] * a[i] + x[j];
    }
    #pragma unroll
    for (int i = 0; i < 128; i++) x[i * 1024 + threadIdx.x] = a[i];
}
"#;

/// Touches an accumulator while wgmma owns it: compiles, with C7511 and C7517 in the log.
const SERIALISED: &str = r#"extern "C" __global__ void __launch_bounds__(128, 1)
serialised(unsigned long long a, unsigned long long b, float* o, int n) {
    float c0 = 0, c1 = 0, c2 = 0, c3 = 0;
    asm volatile("wgmma.fence.sync.aligned;");
    for (int i = 0; i < n; i++) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3},%4,%5,1,1,1,0,0;"
                     : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3) : "l"(a), "l"(b));
        asm volatile("wgmma.commit_group.sync.aligned;");
        c0 *= 2.0f;
        a += i;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;");
    o[threadIdx.x] = c0 + c1 + c2 + c3;
}
"#;

fn request<'a>(source: &'a str, symbol: &'a str, arch: &'a str) -> Request<'a> {
    Request { source, symbol, arch }
}

#[test]
fn a_kernel_becomes_machine_code_with_its_resources() {
    let Some(nvrtc) = testing::nvrtc() else { return };
    assert!(nvrtc.path().is_file(), "{}", nvrtc.path().display());
    for arch in ["sm_80", "sm_90", "sm_90a"] {
        let first = nvrtc.compile(&request(PLAIN, "plain", arch)).expect("a plain kernel compiles");
        assert!(first.cubin.starts_with(b"\x7fELF"));
        assert!((1..=64).contains(&first.resources.registers), "{:?}", first.resources);
        assert_eq!((first.resources.shared_bytes, first.resources.stack_bytes), (256, 0));
        assert_eq!(first.warnings, [] as [&str; 0]);
        let second = nvrtc.compile(&request(PLAIN, "plain", arch)).expect("it still compiles");
        assert_eq!(first, second, "bytes, resources and log are reproducible");
    }
}

#[test]
fn warnings_are_kept() {
    let Some(nvrtc) = testing::nvrtc() else { return };
    let source = "extern \"C\" __global__ void k(float* x) { int unused; x[0] = 1; }\n";
    let compiled = nvrtc.compile(&request(source, "k", "sm_80")).expect("a warning is no error");
    assert_eq!(compiled.warnings.len(), 1, "{:?}", compiled.warnings);
    assert!(compiled.warnings[0].contains("\"unused\" was declared but never referenced"));
}

#[test]
fn the_gate_refuses_spills_serialised_wgmma_and_missing_entries() {
    let Some(nvrtc) = testing::nvrtc() else { return };
    let dir = tempfile::tempdir().expect("temporary folder");
    let cache = Cache::open(Some(dir.path())).expect("open");
    let refuse = |source, symbol| match cache.compile(&nvrtc, &request(source, symbol, "sm_90a"), "0") {
        Err(NvrtcError::Gate { reason, failure }) => (reason, failure),
        other => panic!("expected the gate to refuse, got {other:?}"),
    };

    let (reason, failure) = refuse(SPILLING, "spilling");
    assert!(matches!(reason, GateFailure::Spills { stores, loads } if stores > 0 && loads > 0), "{reason:?}");
    assert!(failure.log.contains("bytes spill stores") && failure.options.contains(&"-std=c++17".to_owned()));
    let saved = failure.source_path.clone().expect("the folder is writable");
    assert!(saved.starts_with(dir.path()));
    assert_eq!(fs::read_to_string(&saved).expect("saved"), SPILLING);
    let text = NvrtcError::Gate { reason, failure }.to_string();
    assert!(text.contains("`spilling` for sm_90a") && text.contains(&saved.display().to_string()), "{text}");

    let (reason, _) = refuse(SERIALISED, "serialised");
    assert!(
        matches!(&reason, GateFailure::Diagnostics { codes } if codes.iter().all(|c| c.starts_with("C75"))),
        "{reason:?}"
    );

    let (reason, _) = refuse(PLAIN, "planar");
    assert_eq!(reason, GateFailure::NoEntry { found: vec!["plain".into()] });

    assert_eq!(cache.entries().expect("entries"), [], "failures are not cached");
}

#[test]
fn rejected_sources_carry_the_log() {
    let Some(nvrtc) = testing::nvrtc() else { return };
    for source in [
        "extern \"C\" __global__ void k(float* x) { x[0] = nowhere; }\n",
        "extern \"C\" __global__ void k(float* x) { asm volatile(\"bogus.instruction;\"); }\n",
        "extern \"C\" __global__ void k(float* x) { __shared__ float s[65536]; s[x != 0] = 1; x[0] = s[3]; }\n",
        "#include <cuda_bf16.h>\n",
    ] {
        match nvrtc.compile(&request(source, "k", "sm_90a")) {
            Err(NvrtcError::Compile(failure)) => {
                assert!(!failure.log.is_empty() && failure.source_path.is_some(), "{failure}");
            }
            other => panic!("expected a compile error for {source:?}, got {other:?}"),
        }
    }
    let nul = nvrtc.compile(&request("a\0b", "k", "sm_90a"));
    assert!(matches!(nul, Err(NvrtcError::BadRequest { .. })), "{nul:?}");
}

#[test]
fn unsupported_architectures_are_named_with_the_supported_ones() {
    let Some(nvrtc) = testing::nvrtc() else { return };
    // Virtual architectures give no machine code, and an architecture-specific target begins with sm_90a.
    for arch in
        ["sm_20", "sm_999", "compute_90a", "sm_", "sm_+90", "sm_90 --x", "90", "sm_80a", "sm_90b", "sm_90af", "sm_é"]
    {
        match nvrtc.compile(&request(PLAIN, "plain", arch)) {
            Err(error @ NvrtcError::UnsupportedArch { .. }) => {
                let text = error.to_string();
                let version = nvrtc.version();
                assert!(text.contains(&format!("NVRTC {}.{}", version.0, version.1)), "{text}");
                assert!(text.contains("sm_80, ") && text.contains(arch), "{text}");
            }
            other => panic!("expected `{arch}` to be unsupported, got {other:?}"),
        }
    }
}

#[test]
fn threads_compile_at_the_same_time() {
    let Some(nvrtc) = testing::nvrtc() else { return };
    let sources: Vec<(String, String)> = (0..12)
        .map(|i| (format!("k{i}"), PLAIN.replace("plain", &format!("k{i}")).replace("63 -", &format!("{} ^", i + 1))))
        .collect();
    let compile = |(symbol, source): &(String, String)| {
        nvrtc.compile(&request(source, symbol, "sm_90a")).expect("a plain kernel compiles")
    };
    let one_by_one: Vec<_> = sources.iter().map(compile).collect();
    let at_once: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = sources.iter().map(|source| scope.spawn(|| compile(source))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no thread panics")).collect()
    });
    assert_eq!(one_by_one, at_once);
}

#[test]
fn the_cache_gives_back_what_was_compiled_and_rebuilds_what_was_damaged() {
    let Some(nvrtc) = testing::nvrtc() else { return };
    let dir = tempfile::tempdir().expect("temporary folder");
    let cache = Cache::open(Some(&dir.path().join("deep/er"))).expect("open");
    let request = request(PLAIN, "plain", "sm_90a");
    let (first, from_cache) = cache.compile(&nvrtc, &request, "0.1.0").expect("compiles");
    assert!(!from_cache);
    let (second, from_cache) = cache.compile(&nvrtc, &request, "0.1.0").expect("compiles");
    assert!(from_cache);
    assert_eq!(first, second);
    let (_, from_cache) = cache.compile(&nvrtc, &request, "0.1.1").expect("compiles");
    assert!(!from_cache, "another calibc may generate other code");

    let entries = cache.entries().expect("entries");
    assert_eq!(entries.len(), 2);
    for entry in &entries {
        assert_eq!((entry.symbol.as_str(), entry.arch.as_str(), entry.nvrtc), ("plain", "sm_90a", nvrtc.version()));
        let path = cache.dir().join(&entry.key).with_extension("kernel");
        let mut bytes = fs::read(&path).expect("listed");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, bytes).expect("write");
    }
    let (third, from_cache) = cache.compile(&nvrtc, &request, "0.1.0").expect("compiles");
    assert!(!from_cache, "the damaged entry is not used");
    assert_eq!(first, third);
    let (_, from_cache) = cache.compile(&nvrtc, &request, "0.1.0").expect("compiles");
    assert!(from_cache, "it was replaced");
}

#[test]
fn many_compiles_of_one_key_agree() {
    let Some(nvrtc) = testing::nvrtc() else { return };
    let dir = tempfile::tempdir().expect("temporary folder");
    let cache = Cache::open(Some(dir.path())).expect("open");
    let results: Vec<_> = thread::scope(|scope| {
        let run = || cache.compile(&nvrtc, &request(PLAIN, "plain", "sm_80"), "0").expect("compiles").0;
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(run)).collect();
        threads.into_iter().map(|thread| thread.join().expect("no thread panics")).collect()
    });
    assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
    assert_eq!(cache.entries().expect("entries").len(), 1);
    assert_eq!(fs::read_dir(dir.path()).expect("folder").count(), 1, "no litter");
}

#[test]
fn a_cache_that_cannot_be_written_costs_nothing() {
    let Some(nvrtc) = testing::nvrtc() else { return };
    let file = tempfile::NamedTempFile::new().expect("temporary file");
    // Below a file there can be no folder, not even for root.
    let cache = Cache::open(Some(&file.path().join("cache"))).expect("not there yet");
    for _ in 0..2 {
        let (_, from_cache) = cache.compile(&nvrtc, &request(PLAIN, "plain", "sm_80"), "0").expect("compiles");
        assert!(!from_cache);
    }
    let failed = cache.compile(&nvrtc, &request("nonsense", "k", "sm_80"), "0");
    assert!(matches!(failed, Err(NvrtcError::Compile(failure)) if failure.source_path.is_none()));
}

#[test]
fn a_named_place_without_a_library_is_one_clear_error() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let fake = dir.path().join("libnvrtc.so.13");
    fs::write(&fake, "not a library").expect("write");
    let cases: [(&Path, &str); 4] = [
        (Path::new("/nowhere/libnvrtc.so.13"), "no such file"),
        (&fake, "file too short"),
        (dir.path(), "file too short"),
        (&dir.path().join("empty"), "holds no libnvrtc"),
    ];
    fs::create_dir(dir.path().join("empty")).expect("folder");
    for (place, why) in cases {
        let error = Nvrtc::find(Some(place)).expect_err("there is no library");
        let text = error.to_string();
        assert!(matches!(error, NvrtcError::NotThere { named_by: "--nvrtc", .. }), "{text}");
        assert!(text.contains(why), "{text}");
    }
}

/// Makes a library that claims to be an NVRTC; `functions` are those that answer nothing.
fn fake_nvrtc(dir: &Path, major: u32, functions: &[&str]) -> PathBuf {
    let mut source = format!(
        "#[unsafe(no_mangle)] pub unsafe extern \"C\" fn nvrtcVersion(a: *mut i32, b: *mut i32) -> i32 {{ unsafe {{ *a = {major}; *b = 2; }} 0 }}\n"
    );
    for name in functions {
        source += &format!("#[unsafe(no_mangle)] pub extern \"C\" fn {name}() -> i32 {{ 1 }}\n");
    }
    let (text, library) = (dir.join("fake.rs"), dir.join("libnvrtc.so"));
    fs::write(&text, source).expect("write");
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.args(["--edition=2024", "--crate-type=cdylib", "-Cpanic=abort"]).arg(&text).arg("-o").arg(&library);
    assert!(rustc.status().expect("the compiler that built this test").success());
    library
}

#[test]
fn libraries_of_other_versions_are_refused_by_name() {
    let all = [
        "nvrtcGetErrorString",
        "nvrtcGetNumSupportedArchs",
        "nvrtcGetSupportedArchs",
        "nvrtcCreateProgram",
        "nvrtcDestroyProgram",
        "nvrtcCompileProgram",
        "nvrtcGetProgramLogSize",
        "nvrtcGetProgramLog",
        "nvrtcGetCUBINSize",
        "nvrtcGetCUBIN",
    ];
    let cases: [(u32, &[&str], WhyNot); 3] = [
        (11, &all, WhyNot::TooOld((11, 2))),
        (14, &all, WhyNot::TooNew((14, 2))),
        (11, &all[..9], WhyNot::MissingFunction("nvrtcGetCUBIN")),
    ];
    for (major, functions, expected) in cases {
        let dir = tempfile::tempdir().expect("temporary folder");
        let library = fake_nvrtc(dir.path(), major, functions);
        match Nvrtc::find(Some(dir.path())) {
            Err(NvrtcError::NotThere { tried, .. }) => {
                assert!(tried.iter().any(|t| t.why == expected && t.place == library), "{tried:?}");
            }
            other => panic!("expected {expected:?}, got {other:?}"),
        }
    }
}

/// A library without NVRTC's functions: the one this process already uses for C itself.
#[test]
fn another_library_is_not_an_nvrtc() {
    let maps = fs::read_to_string("/proc/self/maps").expect("tests run on Linux");
    let libc = maps.lines().filter_map(|line| line.get(line.find('/')?..)).find(|path| path.contains("libc.so"));
    let libc = libc.expect("the test harness is linked to libc dynamically");
    let text = Nvrtc::find(Some(Path::new(libc))).expect_err("libc is no compiler").to_string();
    assert!(text.contains("it has no nvrtcGetErrorString"), "{text}");
}
