//! Generated kernels through every NVRTC at hand.

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};

use calibc_nvrtc::{Cache, Nvrtc, Request, testing};
use rayon::prelude::*;

/// A kernel to compile.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Work {
    pub(crate) symbol: String,
    pub(crate) source: String,
    pub(crate) arch: String,
}

impl Work {
    fn request(&self) -> Request<'_> {
        Request { source: &self.source, symbol: &self.symbol, arch: &self.arch }
    }
}

/// What compilers have against kernels: errors, warnings, spills. The first NVRTC compiles all of them; other versions, which see
/// other things, those that `also` picks, for architectures they know. Says on stderr which versions there were. What the compile cache
/// has from an earlier run is not compiled again, where `CALIBC_CACHE_DIR` names one.
pub(crate) fn complaints(work: &[Work], also: impl Fn(&Work) -> bool) -> Vec<String> {
    let compilers = testing::every_nvrtc();
    let mut pairs: Vec<(&Nvrtc, &Work)> = Vec::new();
    for (number, nvrtc) in compilers.iter().enumerate() {
        let known = |work: &Work| nvrtc.supports(&work.request());
        pairs.extend(work.iter().filter(|work| number == 0 || also(work) && known(work)).map(|work| (nvrtc, work)));
    }
    let cache = std::env::var_os("CALIBC_CACHE_DIR").map(|_| Cache::open(None).expect("a usable CALIBC_CACHE_DIR"));
    let cached = AtomicUsize::new(0);
    let complaints = pairs.par_iter().filter_map(|(nvrtc, work)| complaint(nvrtc, work, cache.as_ref(), &cached));
    let complaints = complaints.collect();
    let with = compilers.iter().map(|nvrtc| {
        let count = pairs.iter().filter(|(with, _)| std::ptr::eq(*with, nvrtc)).count();
        let (major, minor) = nvrtc.version();
        format!("{count} with NVRTC {major}.{minor} ({})", nvrtc.path().display())
    });
    let with = with.collect::<Vec<_>>().join(", ");
    let name = std::thread::current().name().unwrap_or("a test").to_owned();
    let line = format!("{name}: kernels compiled: {with}; {} from the cache\n", cached.into_inner());
    // Past the test harness, which would swallow it.
    let _ = std::io::stderr().write_all(line.as_bytes());
    complaints
}

fn complaint(nvrtc: &Nvrtc, work: &Work, cache: Option<&Cache>, cached: &AtomicUsize) -> Option<String> {
    let Work { symbol, arch, .. } = work;
    let request = work.request();
    let result = match cache {
        None => nvrtc.compile(&request).map(|compiled| (compiled, false)),
        Some(cache) => cache.compile(nvrtc, &request, env!("CARGO_PKG_VERSION")),
    };
    let (major, minor) = nvrtc.version();
    let what = match result {
        Err(error) => error.to_string(),
        Ok((compiled, from_cache)) => {
            cached.fetch_add(usize::from(from_cache), Ordering::Relaxed);
            let r = &compiled.resources;
            let spills = r.spill_stores + r.spill_loads + r.stack_bytes;
            if spills == 0 && compiled.warnings.is_empty() && !compiled.cubin.is_empty() && r.registers > 0 {
                return None;
            }
            format!("{r:?} {:?}", compiled.warnings)
        }
    };
    Some(format!("{symbol} for {arch} with NVRTC {major}.{minor}: {what}"))
}
