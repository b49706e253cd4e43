//! The plan as payloads: masks, ops, schedule and anchor table, to bytes and back.

use calibc_ir::{AnchorTable, AttnOp, BlockMask, Geometry, MaskId, MaskTable, Plan, Schedule, WorkItem, abi};
use rayon::prelude::*;

use crate::wire::{Manifest, MaskChunk, Payload, ScheduleSize};
use crate::{BundleError, layout};

/// All masks of a plan may not exceed this: eight times the largest plan known to be of use.
const MAX_MASK_BYTES: u64 = 64 << 30;

/// Far above the number of kernels a plan can tell apart.
const MAX_VARIANTS: usize = 64;

/// Little-endian bytes.
pub(crate) fn bytes_of(words: impl ExactSizeIterator<Item = u32>) -> Vec<u8> {
    let mut bytes = vec![0; words.len() * 4];
    bytes.chunks_exact_mut(4).zip(words).for_each(|(to, word)| to.copy_from_slice(&word.to_le_bytes()));
    bytes
}

/// Words from little-endian bytes; their number is a multiple of 4, as every expected length is.
fn words_of(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// Masks in id order, cut where the step of first use moves on. A mask that no op uses goes with the one before it.
///
/// Ops may refer to masks past `num_masks`; the verifier names them.
pub(crate) fn mask_chunks(ops: &[AttnOp], sites_per_step: usize, num_masks: usize) -> Vec<MaskChunk> {
    let mut first_use = vec![None; num_masks];
    for (site, op) in ops.iter().enumerate() {
        if let AttnOp::BlockSparse { mask } = op
            && let Some(step @ None) = first_use.get_mut(mask.index())
        {
            *step = Some((site / sites_per_step) as u32);
        }
    }
    let mut chunks: Vec<MaskChunk> = Vec::new();
    for used in first_use {
        match chunks.last_mut() {
            Some(chunk) if used.is_none_or(|step| step <= chunk.step) => chunk.masks += 1,
            _ => chunks.push(MaskChunk { step: used.unwrap_or(0), masks: 1 }),
        }
    }
    chunks
}

/// The op as the GPU and the file hold it.
fn op_word(op: &AttnOp) -> u32 {
    match op {
        AttnOp::Dense => abi::OP_DENSE,
        AttnOp::AnchorRows { .. } => abi::OP_ANCHORS,
        AttnOp::BlockSparse { mask } => mask.0,
    }
}

/// Payloads of `plan` and their names, in file order, not yet compressed. `plan` is verified.
pub(crate) fn payloads(plan: &Plan, schedule: &Schedule, chunks: &[MaskChunk]) -> Vec<(String, Raw)> {
    let mut payloads = Vec::new();
    let mut next = 0;
    for (i, chunk) in chunks.iter().enumerate() {
        payloads.push((format!("masks/{i}"), Raw::Masks(next..next + chunk.masks)));
        next += chunk.masks;
    }
    payloads.push(("ops".to_owned(), Raw::Bytes(bytes_of(plan.ops.iter().map(op_word)))));
    let Schedule { list_of, list_ptr, items } = schedule;
    let mut words = Vec::with_capacity(list_of.len() + list_ptr.len() + items.len());
    words.extend_from_slice(list_of);
    words.extend_from_slice(list_ptr);
    words.extend(items.iter().map(|item| item.0));
    payloads.push(("schedule".to_owned(), Raw::Bytes(bytes_of(words.into_iter()))));
    if let Some(anchors) = plan.anchors() {
        let words = anchor_words(&AnchorTable::new(&plan.geometry, anchors));
        payloads.push(("anchors".to_owned(), Raw::Bytes(bytes_of(words.into_iter()))));
    }
    payloads
}

/// Bytes of a payload, or the masks to take them from when their turn comes: all masks at once may be gigabytes.
pub(crate) enum Raw {
    Bytes(Vec<u8>),
    Masks(std::ops::Range<u32>),
}

impl Raw {
    pub(crate) fn into_bytes(self, masks: &MaskTable) -> Vec<u8> {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Masks(ids) => {
                let mut bytes = Vec::new();
                for id in ids {
                    bytes.extend_from_slice(&bytes_of(masks[MaskId(id)].words().iter().copied()));
                }
                bytes
            }
        }
    }
}

fn anchor_words(table: &AnchorTable) -> Vec<u32> {
    let AnchorTable { anchors: _, queries, copy_ptr, copies } = table;
    [&[queries.len() as u32], &queries[..], copy_ptr, copies].concat()
}

/// What the manifest says of the plan, checked as far as it bounds the payloads' lengths.
pub(crate) struct Dimensions {
    geometry: Geometry,
    steps: u32,
    layers: u32,
    heads: u32,
    sites: u32,
    mask_bytes: u64,
    anchors: Option<u16>,
    schedule: ScheduleSize,
}

impl Dimensions {
    /// Checks the manifest's numbers. Everything allocated later is bounded by them.
    pub(crate) fn of(manifest: &Manifest) -> Result<Self, BundleError> {
        let field = |name: &str, why: String| BundleError::corrupt(format!("manifest field {name}"), why);
        let geometry = Geometry::from(&manifest.geometry);
        geometry.validate().map_err(|e| field("geometry", e.to_string()))?;
        let (layers, heads) = (manifest.model.layers, manifest.model.heads);
        let steps = u32::try_from(manifest.sigmas.len()).map_err(|e| field("sigmas", e.to_string()))?;
        let sites = steps.checked_mul(layers).and_then(|n| n.checked_mul(heads)).filter(|&n| n > 0);
        let sites = sites.ok_or_else(|| {
            field("model", format!("{steps} steps x {layers} layers x {heads} heads is no site count"))
        })?;
        let num_masks = manifest.masks.iter().try_fold(0_u32, |sum, chunk| sum.checked_add(chunk.masks));
        let num_masks = num_masks
            .filter(|&n| n <= sites)
            .ok_or_else(|| field("masks", format!("more masks than the {sites} sites that could use them")))?;
        // Rows and words of a valid geometry: below 2^15 * 2^10 * 4.
        let words = BlockMask::words_for(geometry.num_kv_blocks()) as u64;
        let mask_bytes = u64::from(geometry.num_q_blocks()) * words * 4;
        if u64::from(num_masks).checked_mul(mask_bytes).is_none_or(|total| total > MAX_MASK_BYTES) {
            return Err(field("masks", format!("{num_masks} masks of {mask_bytes} bytes exceed {MAX_MASK_BYTES}")));
        }
        if let Some(anchors) = manifest.anchors
            && !(1..=geometry.height).contains(&u32::from(anchors))
        {
            return Err(field("anchors", format!("{anchors} anchor rows in frames of {} rows", geometry.height)));
        }
        let ScheduleSize { lists, items } = manifest.schedule;
        // No overflow: at most 2^15 blocks of each of 2^32 heads.
        let tiles = u64::from(geometry.num_q_blocks()) * u64::from(heads);
        let most = u64::from(lists).saturating_mul(tiles);
        if u64::from(lists) > u64::from(steps) * u64::from(layers) || u64::from(items) > most {
            return Err(field("schedule", format!("{items} items in {lists} lists exceed the plan's tiles")));
        }
        // The verifier compares each with each.
        if !(1..=MAX_VARIANTS).contains(&manifest.variants.len()) {
            return Err(field("variants", format!("{} are not 1..={MAX_VARIANTS}", manifest.variants.len())));
        }
        let (anchors, schedule) = (manifest.anchors, manifest.schedule);
        Ok(Self { geometry, steps, layers, heads, sites, mask_bytes, anchors, schedule })
    }

    /// The plan, and the anchor table where it has anchor heads, from the payloads that come first. The plan is not verified yet.
    pub(crate) fn decode(
        &self,
        manifest: &Manifest,
        payloads: &mut Payloads<'_>,
    ) -> Result<(Plan, Option<AnchorTable>), BundleError> {
        let masks = self.masks(&manifest.masks, payloads)?;
        let ops = self.ops(payloads)?;
        if mask_chunks(&ops, (self.layers * self.heads) as usize, masks.len()) != manifest.masks {
            return Err(BundleError::corrupt(
                "manifest field masks",
                "the chunks are not cut where the ops' first use is",
            ));
        }
        let schedule = self.schedule(payloads)?;
        let anchors = self.anchors.map(|anchors| self.anchors(anchors, payloads)).transpose()?;
        let plan = Plan {
            model: manifest.model.clone().into(),
            geometry: self.geometry,
            sigmas: manifest.sigmas.clone(),
            masks,
            ops,
            variants: manifest.variants.iter().map(|&v| v.into()).collect(),
            schedule: Some(schedule),
        };
        Ok((plan, anchors))
    }

    fn masks(&self, chunks: &[MaskChunk], payloads: &mut Payloads<'_>) -> Result<MaskTable, BundleError> {
        let (rows, cols) = (self.geometry.num_q_blocks(), self.geometry.num_kv_blocks());
        let stored = (0..chunks.len()).map(|i| payloads.next(&format!("masks/{i}"))).collect::<Result<Vec<_>, _>>()?;
        let decode = |(chunk, &(entry, stored)): (&MaskChunk, &(&Payload, &[u8]))| {
            let raw = layout::unpack(entry, stored, Some(u64::from(chunk.masks) * self.mask_bytes))?;
            let mask = |bytes| {
                BlockMask::from_words(rows, cols, words_of(bytes)).ok_or_else(|| {
                    BundleError::corrupt(
                        format!("payload {}", entry.name),
                        "a bit is set past the last column of a mask",
                    )
                })
            };
            raw.chunks_exact(self.mask_bytes as usize).map(mask).collect::<Result<Vec<_>, _>>()
        };
        // Collected in order before the first error is taken: which one it is must not depend on threads.
        let decoded: Vec<_> = chunks.par_iter().zip(&stored).map(decode).collect();
        let mut masks = MaskTable::default();
        for (chunk, (entry, _)) in decoded.into_iter().zip(stored) {
            for mask in chunk? {
                let next = MaskId(masks.len() as u32);
                let id = masks.intern(mask);
                if id != next {
                    let why = format!("{next} is the same mask as {id}");
                    return Err(BundleError::corrupt(format!("payload {}", entry.name), why));
                }
            }
        }
        Ok(masks)
    }

    fn ops(&self, payloads: &mut Payloads<'_>) -> Result<Vec<AttnOp>, BundleError> {
        let words = words_of(&payloads.take("ops", Some(u64::from(self.sites) * 4))?);
        let op = |word| match word {
            abi::OP_DENSE => Ok(AttnOp::Dense),
            abi::OP_ANCHORS => self.anchors.map(|anchors| AttnOp::AnchorRows { anchors }).ok_or_else(|| {
                BundleError::corrupt("payload ops", "an anchor head where the manifest gives no number of anchor rows")
            }),
            // Whether the table holds it is for the verifier to say, which names the site.
            mask => Ok(AttnOp::BlockSparse { mask: MaskId(mask) }),
        };
        let ops = words.into_iter().map(op).collect::<Result<Vec<_>, _>>()?;
        if self.anchors.is_some() && !ops.iter().any(|op| matches!(op, AttnOp::AnchorRows { .. })) {
            return Err(BundleError::corrupt("manifest field anchors", "given, but no head uses anchor rows"));
        }
        Ok(ops)
    }

    fn schedule(&self, payloads: &mut Payloads<'_>) -> Result<Schedule, BundleError> {
        // Cannot overflow: three numbers below 2^32.
        let (pairs, ptrs) = (u64::from(self.steps) * u64::from(self.layers), u64::from(self.schedule.lists) + 1);
        let words = words_of(&payloads.take("schedule", Some((pairs + ptrs + u64::from(self.schedule.items)) * 4))?);
        let (list_of, rest) = words.split_at(pairs as usize);
        let (list_ptr, items) = rest.split_at(ptrs as usize);
        Ok(Schedule {
            list_of: list_of.to_vec(),
            list_ptr: list_ptr.to_vec(),
            items: items.iter().map(|&item| WorkItem(item)).collect(),
        })
    }

    fn anchors(&self, anchors: u16, payloads: &mut Payloads<'_>) -> Result<AnchorTable, BundleError> {
        let table = AnchorTable::new(&self.geometry, anchors);
        let expected = bytes_of(anchor_words(&table).into_iter());
        if payloads.take("anchors", Some(expected.len() as u64))? != expected {
            return Err(BundleError::corrupt("payload anchors", "not the anchor table of the plan's geometry"));
        }
        Ok(table)
    }
}

/// The payloads of a container, handed out in file order.
pub(crate) struct Payloads<'a> {
    rest: std::iter::Zip<std::slice::Iter<'a, Payload>, std::slice::Iter<'a, &'a [u8]>>,
}

impl<'a> Payloads<'a> {
    pub(crate) fn new(table: &'a [Payload], stored: &'a [&'a [u8]]) -> Self {
        Self { rest: table.iter().zip(stored) }
    }

    /// The next payload, which must be `name`.
    fn next(&mut self, name: &str) -> Result<(&'a Payload, &'a [u8]), BundleError> {
        match self.rest.next() {
            Some((entry, stored)) if entry.name == name => Ok((entry, stored)),
            Some((entry, _)) => {
                let why = format!("`{}` stands where `{name}` should", entry.name);
                Err(BundleError::corrupt("manifest field payloads", why))
            }
            None => Err(BundleError::corrupt("manifest field payloads", format!("`{name}` is missing"))),
        }
    }

    /// The raw bytes of the next payload, which must be `name` and hold `expected` bytes, where that is known.
    pub(crate) fn take(&mut self, name: &str, expected: Option<u64>) -> Result<Vec<u8>, BundleError> {
        let (entry, stored) = self.next(name)?;
        layout::unpack(entry, stored, expected)
    }

    /// [`Payloads::take`] for text.
    pub(crate) fn take_text(&mut self, name: &str) -> Result<String, BundleError> {
        String::from_utf8(self.take(name, None)?)
            .map_err(|e| BundleError::corrupt(format!("payload {name}"), e.to_string()))
    }

    /// Nothing may be left.
    pub(crate) fn finish(mut self) -> Result<(), BundleError> {
        match self.rest.next() {
            None => Ok(()),
            Some((entry, _)) => {
                Err(BundleError::corrupt("manifest field payloads", format!("nothing refers to `{}`", entry.name)))
            }
        }
    }
}

/// What the verifier says of `plan`, in one line.
pub(crate) fn verify(plan: &Plan) -> Result<(), String> {
    calibc_ir::verify::verify(plan).map_err(|errors| {
        let mut line: Vec<_> = errors.iter().take(3).map(ToString::to_string).collect();
        if errors.len() > line.len() {
            line.push(format!("and {} more", errors.len() - line.len()));
        }
        line.join("; ")
    })
}
