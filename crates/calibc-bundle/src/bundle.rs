//! Bytes to a validated [`Bundle`].

use std::fs::File;
use std::io;
use std::path::Path;

use calibc_ir::{AnchorTable, Plan, TextPosition, Variant, abi};
use memmap2::Mmap;

use crate::encode::{check_kernel, cubin_name, source_name};
use crate::layout::Container;
use crate::plan::{self, Dimensions, Payloads};
use crate::wire::{Codec, Manifest};
use crate::{BundleError, Kernel};

/// A bundle whose every part was checked: no look-up fails.
///
/// Holds everything in memory, masks decompressed; the file may go away.
#[derive(Clone, Debug)]
pub struct Bundle {
    plan: Plan,
    anchors: Option<AnchorTable>,
    kernels: Vec<Kernel>,
    spec: String,
    report: serde_json::Value,
    calibc_version: String,
    sections: Vec<Section>,
    file_len: u64,
    digest: blake3::Hash,
}

/// One payload of the file, for reports on where the bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Its name, as in the crate's documentation: `masks/0`, `ops`, `cubin/<kernel>/<arch>`, ...
    pub name: String,
    /// Bytes in the file.
    pub stored: u64,
    /// Bytes when decompressed.
    pub raw: u64,
    /// How it is stored.
    pub codec: Codec,
}

/// What a caller is about to run, for [`Bundle::check_model`]. Fields that are `None` are not compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Expected {
    /// Attention layers.
    pub layers: Option<u32>,
    /// Heads per layer.
    pub heads: Option<u32>,
    /// Head dimension.
    pub head_dim: Option<u32>,
    /// Denoising steps.
    pub steps: Option<u32>,
    /// Query tokens.
    pub q_tokens: Option<u32>,
    /// Key tokens.
    pub kv_tokens: Option<u32>,
}

impl Bundle {
    /// Reads and checks the bundle at `path`.
    ///
    /// # Errors
    /// [`BundleError::Io`] where the file cannot be read, else as [`Bundle::parse`].
    pub fn open(path: &Path) -> Result<Self, BundleError> {
        let cure = "give a bundle that `calibc compile` wrote and you may read";
        let io = |source| BundleError::Io { action: "read", path: path.to_owned(), source, cure };
        // Asked before opening: to open a pipe is to wait for whoever writes to it.
        if !path.metadata().map_err(io)?.is_file() {
            return Err(io(io::Error::other("not a regular file")));
        }
        let file = File::open(path).map_err(io)?;
        Self::parse(&map(&file).map_err(io)?)
    }

    /// Checks `bytes` and takes everything out of them.
    ///
    /// # Errors
    /// [`BundleError::NotABundle`], [`BundleError::VersionNotReadable`], [`BundleError::Corrupt`] or
    /// [`BundleError::AbiMismatch`].
    pub fn parse(bytes: &[u8]) -> Result<Self, BundleError> {
        let Container { manifest, payloads: stored, digest } = Container::read(bytes)?;
        if manifest.abi != abi::describe() {
            return Err(BundleError::AbiMismatch { found: manifest.abi, expected: abi::describe() });
        }
        let mut payloads = Payloads::new(&manifest.payloads, &stored);
        let (plan, anchors) = Dimensions::of(&manifest)?.decode(&manifest, &mut payloads)?;
        plan::verify(&plan).map_err(|why| BundleError::corrupt("plan", why))?;
        let spec = payloads.take_text("spec")?;
        let report = serde_json::from_slice(&payloads.take("report", None)?)
            .map_err(|e| BundleError::corrupt("payload report", e.to_string()))?;
        let kernels = kernels(&plan, &manifest, &mut payloads)?;
        payloads.finish()?;
        let sections = manifest.payloads.into_iter();
        let sections =
            sections.map(|p| Section { name: p.name, stored: p.stored, raw: p.raw, codec: p.codec }).collect();
        let (calibc_version, file_len) = (manifest.calibc_version, bytes.len() as u64);
        Ok(Self { plan, anchors, kernels, spec, report, calibc_version, sections, file_len, digest })
    }

    /// The plan. It passed the verifier.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Gather and scatter lists of the plan's anchor heads; `None` without such heads.
    pub fn anchor_table(&self) -> Option<&AnchorTable> {
        self.anchors.as_ref()
    }

    /// The effective spec, YAML.
    pub fn spec(&self) -> &str {
        &self.spec
    }

    /// Numbers of the compile report.
    pub fn report(&self) -> &serde_json::Value {
        &self.report
    }

    /// Kernels, by variant in the plan's order, then by family, then by architecture.
    pub fn kernels(&self) -> &[Kernel] {
        &self.kernels
    }

    /// Version of the compiler that wrote the bundle.
    pub fn calibc_version(&self) -> &str {
        &self.calibc_version
    }

    /// Payloads in file order, with their sizes.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// Length of the file in bytes.
    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    /// Identity of the bundle: the header's BLAKE3 digest as 64 hex digits. It commits to every byte of the file, but is not
    /// the BLAKE3 of the file.
    pub fn digest(&self) -> String {
        self.digest.to_hex().to_string()
    }

    /// The kernel of `variant` for a GPU of compute capability `cc` = (major, minor): of those that run there, one of the Hopper
    /// family, else the one made for the architecture itself, else the latest.
    ///
    /// # Errors
    /// [`BundleError::NoSuchVariant`] where no kernel has this variant, [`BundleError::NotForThisGpu`] where none of them runs.
    pub fn kernel_for(&self, cc: (u32, u32), variant: &Variant) -> Result<&Kernel, BundleError> {
        let of_variant = || self.kernels.iter().filter(|k| k.variant == *variant);
        if of_variant().next().is_none() {
            let mut available: Vec<_> = self.kernels.iter().map(|k| k.variant).collect();
            available.dedup();
            return Err(BundleError::NoSuchVariant { variant: *variant, available });
        }
        of_variant()
            .filter(|k| k.arch.runs_on(cc))
            .max_by_key(|k| (k.family, k.arch.specific, k.arch.minor))
            .ok_or_else(|| {
                let mut available: Vec<_> = of_variant().map(|k| k.arch).collect();
                available.sort();
                available.dedup();
                BundleError::NotForThisGpu { cc, available }
            })
    }

    /// Whether the bundle is for what the caller is about to run.
    ///
    /// Where text stands after the video tokens, fewer of it may be passed than the plan has: any self-attention length from
    /// the video tokens to all tokens will do.
    ///
    /// # Errors
    /// [`BundleError::NotForThisModel`] or [`BundleError::NotForThisShape`], with the first dimension that differs.
    pub fn check_model(&self, expected: &Expected) -> Result<(), BundleError> {
        let &Expected { layers, heads, head_dim, steps, q_tokens, kv_tokens } = expected;
        let (model, geometry) = (&self.plan.model, &self.plan.geometry);
        for (what, bundle, found) in [
            ("layers", model.layers, layers),
            ("heads", model.heads, heads),
            ("head_dim", model.head_dim, head_dim),
            ("steps", self.plan.num_steps(), steps),
        ] {
            if let Some(found) = found.filter(|&found| found != bundle) {
                return Err(BundleError::NotForThisModel { what, bundle, found });
            }
        }
        let shorter =
            geometry.text_position == TextPosition::After && q_tokens.zip(kv_tokens).is_none_or(|(q, kv)| q == kv);
        for (what, bundle, found) in
            [("query tokens", geometry.q_tokens(), q_tokens), ("key tokens", geometry.kv_tokens(), kv_tokens)]
        {
            let least = if shorter { geometry.video_tokens() } else { bundle };
            if let Some(found) = found.filter(|found| !(least..=bundle).contains(found)) {
                return Err(BundleError::NotForThisShape { what, bundle, found });
            }
        }
        Ok(())
    }
}

/// The kernels of the manifest with their code.
fn kernels(plan: &Plan, manifest: &Manifest, payloads: &mut Payloads<'_>) -> Result<Vec<Kernel>, BundleError> {
    let field = |i: usize, why: String| BundleError::corrupt(format!("manifest field kernels[{i}]"), why);
    let mut kernels: Vec<Kernel> = Vec::with_capacity(manifest.kernels.len());
    let mut previous = None;
    for (i, wire) in manifest.kernels.iter().enumerate() {
        let variant = plan.variants.get(wire.variant as usize);
        let &variant = variant.ok_or_else(|| field(i, format!("there is no variant {}", wire.variant)))?;
        let arch = wire.arch.parse().map_err(|e: calibc_ir::ArchError| field(i, e.to_string()))?;
        let (family, place) = (wire.family.into(), (wire.variant, wire.family, arch));
        if previous.replace(place).is_some_and(|previous| previous >= place) {
            return Err(field(i, "not in ascending order of variant, family and architecture".to_owned()));
        }
        kernels.push(Kernel {
            variant,
            family,
            arch,
            symbol: wire.symbol.clone(),
            source: String::new(),
            cubin: Vec::new(),
            threads: wire.threads,
            shared_bytes: wire.shared_bytes,
            resources: wire.resources(),
            nvrtc: wire.nvrtc.into(),
        });
    }
    for group in kernels.chunk_by_mut(|a, b| (a.variant, a.family) == (b.variant, b.family)) {
        let source = payloads.take_text(&source_name(&group[0]))?;
        group.iter_mut().for_each(|kernel| kernel.source.clone_from(&source));
    }
    for (i, kernel) in kernels.iter_mut().enumerate() {
        kernel.cubin = payloads.take(&cubin_name(kernel), None)?;
        check_kernel(kernel).map_err(|why| field(i, why))?;
    }
    Ok(kernels)
}

#[expect(unsafe_code, reason = "memory maps are unsafe to make")]
fn map(file: &File) -> io::Result<Mmap> {
    // SAFETY: a map must not change while it is read. Bundles are replaced by rename and never written in place
    // (`crate::write`), and this map ends with `Bundle::open`, which copies what it keeps. Whoever writes into the file
    // meanwhile breaks that promise knowingly.
    unsafe { Mmap::map(file) }
}
