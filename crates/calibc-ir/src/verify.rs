//! The verifier. A plan that passes [`verify`] cannot make code generation, bundling or execution fail.
//!
//! Every error is collected, with the id it concerns. The checks:
//!
//! Problem
//! * the geometry is valid ([`crate::Geometry::validate`]);
//! * there is at least one step, layer and head, and the head dimension is one kernels are made for;
//! * every sigma is finite;
//! * ids fit: at most 65535 heads (an item packs its head into 16 bits), sites and work items counted in `u32`
//!   (that a tile fits 16 bits follows from the longest sequence a geometry allows).
//!
//! Ops
//! * one op per site;
//! * every mask id is in the table;
//! * mask ids are dense in order of first use by site: none unused, so that equal plans have equal bytes;
//! * anchor heads have `1..=height` anchor rows, and one number serves the whole plan. (A separate key sequence is no
//!   obstacle to them: only queries are gathered, and they attend to every key.)
//!
//! Masks
//! * the shape is the geometry's;
//! * from [`Stage::Protected`] on: every row keeps a block, rows and columns of text blocks keep everything.
//!
//! Variants (where assigned)
//! * the head dimension is the model's, none is listed twice;
//! * `anchors` where and only where the plan has anchor heads, `ragged` where and only where [`crate::Geometry::ragged`].
//!
//! Schedule (where present)
//! * one known list per (step, layer), lists in bounds and without holes, none unused;
//! * the list of a (step, layer) holds each tile of each head exactly once ([`Plan::num_tiles`]).
//!
//! Recall floors are a matter of evidence, which a plan does not carry: the pass that promises one checks it.
//!
//! The cost is one pass over the ops, the rows of the masks (a row is left at its first kept block) and the work items.

use thiserror::Error;

use crate::geometry::GeometryError;
use crate::ids::{HeadId, LayerId, MaskId, Site, StepId};
use crate::mask::BlockMask;
use crate::plan::{AttnOp, Plan, Schedule};
use crate::variant::{HEAD_DIMS, Variant};

/// Most heads of a layer.
pub const MAX_HEADS: u32 = u16::MAX as u32;

/// How far along a plan is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// A policy chose the ops; rows may still be empty and text blocks dropped.
    Selected,
    /// Every check of the module doc holds.
    Protected,
}

/// One thing wrong with a plan.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum VerifyError {
    /// The geometry is not valid.
    #[error("geometry: {0}")]
    Geometry(#[from] GeometryError),
    /// There are no steps, layers or heads.
    #[error("the plan has no {what}")]
    Nothing {
        /// `steps`, `layers` or `heads`.
        what: &'static str,
    },
    /// No kernel is made for the head dimension.
    #[error("head dimension {head_dim} is not one of {HEAD_DIMS:?}")]
    HeadDim {
        /// The model's head dimension.
        head_dim: u32,
    },
    /// A sigma is not a finite number.
    #[error("{step}: sigma {sigma} is not finite")]
    Sigma {
        /// The step.
        step: StepId,
        /// Its noise level.
        sigma: f64,
    },
    /// More heads than [`MAX_HEADS`].
    #[error("{heads} heads exceed {MAX_HEADS}")]
    TooManyHeads {
        /// Heads of a layer.
        heads: u32,
    },
    /// Sites or work items are not countable in 32 bits.
    #[error("{count} {what} exceed {}", u32::MAX)]
    TooMany {
        /// `sites` or `work items`.
        what: &'static str,
        /// Their number.
        count: u128,
    },
    /// Not one op per site.
    #[error("{found} ops for {expected} sites")]
    OpCount {
        /// Sites.
        expected: u64,
        /// Ops.
        found: u64,
    },
    /// An op names a mask the table does not hold.
    #[error("{site}: {mask} is not in the table of {masks} masks")]
    UnknownMask {
        /// Where.
        site: Site,
        /// The id.
        mask: MaskId,
        /// Masks in the table.
        masks: u32,
    },
    /// A mask appears before one with a lower id.
    #[error("{site}: {mask} is used before {expected}; mask ids follow the order of first use")]
    MaskOrder {
        /// First use of the mask.
        site: Site,
        /// The mask.
        mask: MaskId,
        /// The lowest id not used before.
        expected: MaskId,
    },
    /// No site uses a mask.
    #[error("{mask} is used by no site")]
    UnusedMask {
        /// The mask.
        mask: MaskId,
    },
    /// A mask has another shape than the geometry.
    #[error("{mask} is {}x{}, the geometry has {}x{} blocks", found.0, found.1, expected.0, expected.1)]
    MaskShape {
        /// The mask.
        mask: MaskId,
        /// Query and key blocks of the geometry.
        expected: (u32, u32),
        /// Query and key blocks of the mask.
        found: (u32, u32),
    },
    /// Rows of a mask keep nothing.
    #[error("{mask} q{first}: keeps no block ({rows} such rows)")]
    EmptyRow {
        /// The mask.
        mask: MaskId,
        /// The first such row.
        first: u32,
        /// How many there are.
        rows: u32,
    },
    /// Rows of text blocks are not dense.
    #[error("{mask} q{first}: a text block must attend to every key block ({rows} such rows)")]
    TextRow {
        /// The mask.
        mask: MaskId,
        /// The first such row.
        first: u32,
        /// How many there are.
        rows: u32,
    },
    /// Rows drop columns of text blocks.
    #[error("{mask} q{first}: drops a text block ({rows} such rows)")]
    TextColumn {
        /// The mask.
        mask: MaskId,
        /// The first such row.
        first: u32,
        /// How many there are.
        rows: u32,
    },
    /// More anchor rows than rows, or none.
    #[error("{site}: {anchors} anchor rows in a frame of {height} rows")]
    Anchors {
        /// Where.
        site: Site,
        /// Anchor rows per frame.
        anchors: u16,
        /// Rows of a frame.
        height: u32,
    },
    /// Two numbers of anchor rows in one plan.
    #[error("{site}: {anchors} anchor rows where the plan uses {expected}")]
    MixedAnchors {
        /// Where.
        site: Site,
        /// Anchor rows here.
        anchors: u16,
        /// Anchor rows of the first anchor head.
        expected: u16,
    },
    /// A variant contradicts the plan.
    #[error("{variant}: {field} should be {expected}")]
    Variant {
        /// The variant.
        variant: Variant,
        /// `head_dim`, `anchors` or `ragged`.
        field: &'static str,
        /// What the plan needs.
        expected: u32,
    },
    /// A variant is listed twice.
    #[error("{variant} is listed twice")]
    DuplicateVariant {
        /// The variant.
        variant: Variant,
    },
    /// Not one list per (step, layer).
    #[error("schedule: {found} list ids for {expected} (step, layer) pairs")]
    ListCount {
        /// Pairs.
        expected: u64,
        /// List ids.
        found: u64,
    },
    /// `list_ptr` does not cut the items into lists: it must start at 0, never fall, and end at the number of items.
    #[error("schedule: list_ptr[{at}] is out of order or out of bounds")]
    ListPtr {
        /// Index of the offending entry.
        at: usize,
    },
    /// A (step, layer) names a list that is not there.
    #[error("{step}.{layer}: w{list} is not one of {lists} work lists")]
    UnknownList {
        /// Step.
        step: StepId,
        /// Layer.
        layer: LayerId,
        /// The list.
        list: u32,
        /// Lists of the schedule.
        lists: u32,
    },
    /// No (step, layer) uses a list.
    #[error("w{list} is used by no step")]
    UnusedList {
        /// The list.
        list: u32,
    },
    /// A work item whose head or tile does not exist.
    #[error("{step}.{layer}: w{list} holds tile {tile} of {head}, which has {tiles} tiles")]
    ItemRange {
        /// Step.
        step: StepId,
        /// Layer.
        layer: LayerId,
        /// The list.
        list: u32,
        /// Head of the item.
        head: HeadId,
        /// Tile of the item.
        tile: u32,
        /// Tiles of the head; 0 if there is no such head.
        tiles: u32,
    },
    /// A work item that appears twice.
    #[error("{step}.{layer}: w{list} holds tile {tile} of {head} twice")]
    ItemTwice {
        /// Step.
        step: StepId,
        /// Layer.
        layer: LayerId,
        /// The list.
        list: u32,
        /// Head of the item.
        head: HeadId,
        /// Tile of the item.
        tile: u32,
    },
    /// Work items that do not appear.
    #[error("{step}.{layer}: w{list} lacks {missing} tiles, the first is tile {tile} of {head}")]
    ItemMissing {
        /// Step.
        step: StepId,
        /// Layer.
        layer: LayerId,
        /// The list.
        list: u32,
        /// Head of the first missing item.
        head: HeadId,
        /// Its tile.
        tile: u32,
        /// How many are missing.
        missing: u64,
    },
}

/// Checks every invariant of the module doc; all errors at once, in a fixed order.
pub fn verify(plan: &Plan) -> Result<(), Vec<VerifyError>> {
    verify_at(plan, Stage::Protected)
}

/// [`verify`] for a plan that may still be in the making.
pub fn verify_at(plan: &Plan, stage: Stage) -> Result<(), Vec<VerifyError>> {
    let mut errors = Vec::new();
    problem(plan, &mut errors);
    if errors.is_empty() {
        ops(plan, &mut errors);
        masks(plan, stage, &mut errors);
        variants(plan, &mut errors);
        if let Some(schedule) = &plan.schedule
            && plan.ops.len() as u64 == num_sites(plan) as u64
        {
            work(plan, schedule, &mut errors);
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

fn num_sites(plan: &Plan) -> u128 {
    // Three factors below 2^64, 2^32 and 2^32: no overflow.
    plan.sigmas.len() as u128 * u128::from(plan.model.layers) * u128::from(plan.model.heads)
}

fn problem(plan: &Plan, errors: &mut Vec<VerifyError>) {
    let (model, geometry) = (&plan.model, &plan.geometry);
    let valid = geometry.validate();
    errors.extend(valid.clone().err().map(VerifyError::Geometry));
    let counts = [("steps", plan.sigmas.len()), ("layers", model.layers as usize), ("heads", model.heads as usize)];
    errors.extend(counts.iter().filter(|(_, n)| *n == 0).map(|&(what, _)| VerifyError::Nothing { what }));
    if !HEAD_DIMS.contains(&model.head_dim) {
        errors.push(VerifyError::HeadDim { head_dim: model.head_dim });
    }
    let sigmas = (0..).map(StepId).zip(&plan.sigmas).filter(|(_, sigma)| !sigma.is_finite());
    errors.extend(sigmas.map(|(step, &sigma)| VerifyError::Sigma { step, sigma }));
    if model.heads > MAX_HEADS {
        errors.push(VerifyError::TooManyHeads { heads: model.heads });
    }
    let sites = num_sites(plan);
    let tiles = if valid.is_ok() { plan.num_tiles(AttnOp::Dense) } else { 0 };
    for (what, count) in [("sites", sites), ("work items", sites.saturating_mul(tiles.into()))] {
        if count > u128::from(u32::MAX) {
            errors.push(VerifyError::TooMany { what, count });
        }
    }
}

fn ops(plan: &Plan, errors: &mut Vec<VerifyError>) {
    let sites = num_sites(plan) as u64;
    if plan.ops.len() as u64 != sites {
        errors.push(VerifyError::OpCount { expected: sites, found: plan.ops.len() as u64 });
    }
    let (masks, height, anchors) = (plan.masks.len() as u32, plan.geometry.height, plan.anchors());
    let mut used = vec![false; masks as usize];
    let mut next = MaskId(0);
    for (site, &op) in plan.sites().zip(&plan.ops) {
        match op {
            AttnOp::Dense => {}
            AttnOp::BlockSparse { mask } if mask.0 >= masks => {
                errors.push(VerifyError::UnknownMask { site, mask, masks });
            }
            AttnOp::BlockSparse { mask } => {
                if !std::mem::replace(&mut used[mask.index()], true) && mask > next {
                    errors.push(VerifyError::MaskOrder { site, mask, expected: next });
                }
                next = next.max(MaskId(mask.0 + 1));
            }
            AttnOp::AnchorRows { anchors: n } => {
                if n == 0 || u32::from(n) > height {
                    errors.push(VerifyError::Anchors { site, anchors: n, height });
                }
                if let Some(expected) = anchors.filter(|&expected| expected != n) {
                    errors.push(VerifyError::MixedAnchors { site, anchors: n, expected });
                }
            }
        }
    }
    let unused = (0..masks).map(MaskId).filter(|m| !used[m.index()]);
    errors.extend(unused.map(|mask| VerifyError::UnusedMask { mask }));
}

fn masks(plan: &Plan, stage: Stage, errors: &mut Vec<VerifyError>) {
    let expected = (plan.geometry.num_q_blocks(), plan.geometry.num_kv_blocks());
    let text = plan.geometry.text_blocks();
    // Without a separate key sequence, which excludes text, rows and columns are the same blocks.
    let mut need = BlockMask::empty(1, expected.1);
    text.clone().for_each(|c| need.set(0, c));
    let full = BlockMask::full(1, expected.1);
    let lacks = |row: &[u32], need: &BlockMask| row.iter().zip(need.words()).any(|(have, need)| have & need != *need);
    for (mask, bits) in plan.masks.iter() {
        let found = (bits.rows(), bits.cols());
        if found != expected {
            errors.push(VerifyError::MaskShape { mask, expected, found });
            continue;
        }
        if stage < Stage::Protected {
            continue;
        }
        let (mut empty, mut text_row, mut text_col) = (Rows::default(), Rows::default(), Rows::default());
        for r in 0..expected.0 {
            let row = bits.row(r);
            empty.note(r, row.iter().all(|&w| w == 0));
            if text.contains(&r) {
                text_row.note(r, lacks(row, &full));
            } else if !text.is_empty() {
                text_col.note(r, lacks(row, &need));
            }
        }
        errors.extend(empty.0.map(|(first, rows)| VerifyError::EmptyRow { mask, first, rows }));
        errors.extend(text_row.0.map(|(first, rows)| VerifyError::TextRow { mask, first, rows }));
        errors.extend(text_col.0.map(|(first, rows)| VerifyError::TextColumn { mask, first, rows }));
    }
}

/// The first of the rows noted, and how many they are: one error per mask, however bad it is.
#[derive(Default)]
struct Rows(Option<(u32, u32)>);

impl Rows {
    fn note(&mut self, row: u32, bad: bool) {
        if bad {
            let (first, rows) = self.0.unwrap_or((row, 0));
            self.0 = Some((first, rows + 1));
        }
    }
}

fn variants(plan: &Plan, errors: &mut Vec<VerifyError>) {
    let (anchors, ragged) = (plan.anchors().is_some(), plan.geometry.ragged());
    for (i, &variant) in plan.variants.iter().enumerate() {
        let fields = [
            ("head_dim", variant.head_dim, plan.model.head_dim),
            ("anchors", variant.anchors.into(), anchors.into()),
            ("ragged", variant.ragged.into(), ragged.into()),
        ];
        let wrong = fields.into_iter().filter(|&(_, found, expected)| found != expected);
        errors.extend(wrong.map(|(field, _, expected)| VerifyError::Variant { variant, field, expected }));
        if plan.variants[..i].contains(&variant) {
            errors.push(VerifyError::DuplicateVariant { variant });
        }
    }
}

fn work(plan: &Plan, schedule: &Schedule, errors: &mut Vec<VerifyError>) {
    let layers = plan.model.layers;
    let pairs = u64::from(plan.num_steps()) * u64::from(layers);
    if schedule.list_of.len() as u64 != pairs {
        errors.push(VerifyError::ListCount { expected: pairs, found: schedule.list_of.len() as u64 });
    }
    let ptr = &schedule.list_ptr;
    let ends_well = |i: usize| i + 1 < ptr.len() || ptr[i] as usize == schedule.items.len();
    let in_order = |i: usize| if i == 0 { ptr[0] == 0 } else { ptr[i - 1] <= ptr[i] };
    if let Some(at) = (0..ptr.len().max(1)).find(|&i| i >= ptr.len() || !in_order(i) || !ends_well(i)) {
        errors.push(VerifyError::ListPtr { at });
        return;
    }
    let lists = (ptr.len() - 1) as u32;
    // A list is checked for its first user, and again only for users whose heads have other tile counts.
    let mut first_user: Vec<Option<Vec<u32>>> = vec![None; lists as usize];
    let anchor_tiles = plan.anchors().map(|n| match n {
        n if n > 0 && u32::from(n) <= plan.geometry.height => plan.num_tiles(AttnOp::AnchorRows { anchors: n }),
        _ => 0, // already an error of its own
    });
    let dense = plan.num_tiles(AttnOp::Dense);
    let mut seen = vec![0_u64; (plan.model.heads as usize * dense as usize).div_ceil(64)];
    let pair_ids = (0..plan.num_steps()).flat_map(|s| (0..layers).map(move |l| (StepId(s), LayerId(l))));
    for ((step, layer), &list) in pair_ids.zip(&schedule.list_of) {
        if list >= lists {
            errors.push(VerifyError::UnknownList { step, layer, list, lists });
            continue;
        }
        let tiles: Vec<u32> = plan
            .layer_ops(step, layer)
            .iter()
            .map(|op| match op {
                AttnOp::AnchorRows { .. } => anchor_tiles.unwrap_or(0),
                _ => dense,
            })
            .collect();
        let known = &mut first_user[list as usize];
        if known.as_ref() != Some(&tiles) {
            errors.extend(list_error(schedule, (step, layer, list), &tiles, dense, &mut seen));
            known.get_or_insert(tiles);
        }
    }
    let unused = (0..lists).filter(|&list| first_user[list as usize].is_none());
    errors.extend(unused.map(|list| VerifyError::UnusedList { list }));
}

/// The first thing wrong with the list of one (step, layer) whose head `h` has `tiles[h]` tiles, at most the `dense` of a dense
/// one. `seen` is all zero before and after.
fn list_error(
    schedule: &Schedule,
    (step, layer, list): (StepId, LayerId, u32),
    tiles: &[u32],
    dense: u32,
    seen: &mut [u64],
) -> Option<VerifyError> {
    let bit = |head: HeadId, tile: u32| head.index() * dense as usize + tile as usize;
    let items = schedule.list(list);
    let mut noted = 0;
    let wrong = items.iter().find_map(|item| {
        let (head, tile) = (item.head(), item.tile());
        let count = tiles.get(head.index()).copied().unwrap_or(0);
        if tile >= count {
            return Some(VerifyError::ItemRange { step, layer, list, head, tile, tiles: count });
        }
        let at = bit(head, tile);
        if seen[at / 64] >> (at % 64) & 1 == 1 {
            return Some(VerifyError::ItemTwice { step, layer, list, head, tile });
        }
        seen[at / 64] |= 1 << (at % 64);
        noted += 1;
        None
    });
    let wrong = wrong.or_else(|| {
        // No item is out of range and none appears twice, so the list is complete where the numbers agree.
        let missing = tiles.iter().map(|&n| u64::from(n)).sum::<u64>() - items.len() as u64;
        let mut all = (0..).map(HeadId).zip(tiles).flat_map(|(head, &n)| (0..n).map(move |tile| (head, tile)));
        let absent = |&(head, tile): &(HeadId, u32)| {
            let at = bit(head, tile);
            seen[at / 64] >> (at % 64) & 1 == 0
        };
        let (head, tile) = (missing > 0).then(|| all.find(absent)).flatten()?;
        Some(VerifyError::ItemMissing { step, layer, list, head, tile, missing })
    });
    // Clears what was touched, no more: the whole of `seen` may be far larger than a list that lacks most items.
    for item in &items[..noted] {
        seen[bit(item.head(), item.tile()) / 64] = 0;
    }
    wrong
}
