//! What this machine offers: `doctor` and `cache`.

use std::fs;
use std::path::Path;

use calibc_driver::kernels::check_nvrtc;
use calibc_ir::Family;
use calibc_nvrtc::{Cache, Nvrtc, Request};
use calibc_runtime::cuda::Device;
use serde_json::json;

use crate::args::{CacheArgs, DoctorArgs};
use crate::console::{Console, bytes, count};
use crate::exit::{Exit, Failure};

/// Whether files can be made in `dir`, which may not exist yet.
fn writable(dir: &Path) -> Result<(), String> {
    let existing = dir.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    if !existing.is_dir() {
        return Err(format!("{} is not a folder", existing.display()));
    }
    tempfile::tempfile_in(existing).map(drop).map_err(|e| format!("{}: {e}", existing.display()))
}

pub(crate) fn doctor(console: &Console, args: &DoctorArgs) -> Result<Exit, Failure> {
    let toolchain = &args.toolchain;
    // Found is not enough: a library without its builtins loads and compiles nothing.
    let nvrtc = Nvrtc::find(toolchain.nvrtc.as_deref()).and_then(|nvrtc| {
        let probe =
            Request { source: "extern \"C\" __global__ void calibc_probe() {}", symbol: "calibc_probe", arch: "sm_80" };
        nvrtc.compile(&probe).map(|_| nvrtc)
    });
    let cache = Cache::open(toolchain.cache_dir.as_deref()).map_err(|e| e.to_string());
    let cache_state = cache.as_ref().map_err(Clone::clone).and_then(|cache| {
        writable(cache.dir())?;
        let entries = cache.entries().map_err(|e| e.to_string())?;
        Ok((entries.len() as u64, entries.iter().map(|e| e.bytes).sum::<u64>()))
    });
    let gpus: Result<Vec<_>, _> =
        Device::count().and_then(|n| (0..n).map(|ordinal| Device::open(ordinal)?.info()).collect());
    // A compile needs NVRTC; without a cache it is slow, without a GPU it is complete.
    let exit = if nvrtc.is_ok() { Exit::Ok } else { Exit::Environment };
    if args.json {
        let value = json!({
            "calibc": calibc_driver::VERSION,
            "can_compile": nvrtc.is_ok(),
            "nvrtc": match &nvrtc {
                Ok(nvrtc) => json!({
                    "path": nvrtc.path(), "version": [nvrtc.version().0, nvrtc.version().1],
                    "archs": nvrtc.supported_archs(), "hopper_kernels": check_nvrtc(Family::Hopper, nvrtc.version(), nvrtc.path()).is_ok(),
                }),
                Err(e) => json!({ "error": e.to_string() }),
            },
            "driver": match &gpus {
                Ok(gpus) => json!({ "gpus": gpus.iter().map(|gpu| json!({
                    "name": gpu.name, "compute_capability": [gpu.compute_capability.0, gpu.compute_capability.1],
                    "memory_bytes": gpu.memory_bytes,
                })).collect::<Vec<_>>() }),
                Err(e) => json!({ "error": e.to_string() }),
            },
            "cache": match (&cache, &cache_state) {
                (Ok(cache), Ok((entries, bytes))) => json!({ "dir": cache.dir(), "entries": entries, "bytes": bytes }),
                (Ok(cache), Err(e)) => json!({ "dir": cache.dir(), "error": e }),
                (Err(e), _) => json!({ "error": e }),
            },
        });
        console.json("doctor", value)?;
        return Ok(exit);
    }
    let mut text = format!("calibc {}\n", calibc_driver::VERSION);
    text += &match &nvrtc {
        Ok(nvrtc) => {
            let (major, minor) = nvrtc.version();
            match check_nvrtc(Family::Hopper, (major, minor), nvrtc.path()) {
                Ok(()) => format!("ok       NVRTC {major}.{minor} at {}\n", nvrtc.path().display()),
                Err(e) => format!("old      {e}\n"),
            }
        }
        Err(e) => format!("missing  {e}\n"),
    };
    text += &match &gpus {
        Ok(gpus) if gpus.is_empty() => {
            "none     the driver shows no GPU; compiling works, `--device cuda` does not\n".to_owned()
        }
        Ok(gpus) => gpus
            .iter()
            .enumerate()
            .map(|(i, gpu)| {
                let (major, minor) = gpu.compute_capability;
                format!(
                    "ok       GPU {i}: {}, compute capability {major}.{minor}, {}\n",
                    gpu.name,
                    bytes(gpu.memory_bytes)
                )
            })
            .collect(),
        Err(e) => format!("none     {e}; compiling works without a GPU\n"),
    };
    text += &match (&cache, &cache_state) {
        (Ok(cache), Ok((n, size))) => {
            format!("ok       cache {}: {}, {}\n", cache.dir().display(), count(*n, "kernel"), bytes(*size))
        }
        (Ok(cache), Err(e)) => format!("warning  cache {} cannot be used: {e}\n", cache.dir().display()),
        (Err(e), _) => format!("warning  {e}\n"),
    };
    console.data(&text)?;
    Ok(exit)
}

pub(crate) fn cache_dir(console: &Console, args: &CacheArgs) -> Result<Exit, Failure> {
    let cache = Cache::open(args.cache_dir.as_deref())?;
    console.data(&format!("{}\n", cache.dir().display()))?;
    Ok(Exit::Ok)
}

pub(crate) fn cache_ls(console: &Console, args: &CacheArgs, as_json: bool) -> Result<Exit, Failure> {
    let cache = Cache::open(args.cache_dir.as_deref())?;
    let entries = cache.entries()?;
    if as_json {
        let entries: Vec<_> = entries
            .iter()
            .map(|e| {
                json!({
                    "key": e.key, "bytes": e.bytes, "symbol": e.symbol, "arch": e.arch,
                    "nvrtc": [e.nvrtc.0, e.nvrtc.1], "calibc": e.calibc_version,
                })
            })
            .collect();
        console.json("cache", json!({ "dir": cache.dir(), "entries": entries }))?;
        return Ok(Exit::Ok);
    }
    let mut text = String::new();
    for e in &entries {
        let (major, minor) = e.nvrtc;
        text +=
            &format!("{}  {:>8}  {:8}  NVRTC {major}.{minor}  {}\n", &e.key[..12], bytes(e.bytes), e.arch, e.symbol);
    }
    console.data(&text)?;
    let total = entries.iter().map(|e| e.bytes).sum();
    console.note(&format!("{}, {} in {}", count(entries.len() as u64, "kernel"), bytes(total), cache.dir().display()));
    Ok(Exit::Ok)
}

pub(crate) fn cache_clear(console: &Console, args: &CacheArgs) -> Result<Exit, Failure> {
    let cache = Cache::open(args.cache_dir.as_deref())?;
    if fs::symlink_metadata(cache.dir()).is_err() {
        console.note(&format!("{} does not exist; nothing to remove", cache.dir().display()));
        return Ok(Exit::Ok);
    }
    let cleared = cache.clear()?;
    console.note(&format!(
        "removed {}, {} from {}",
        count(cleared.files, "file"),
        bytes(cleared.bytes),
        cache.dir().display()
    ));
    Ok(Exit::Ok)
}
