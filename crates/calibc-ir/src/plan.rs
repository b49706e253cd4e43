//! The plan: one op per site, the masks they share, the variants that run them and the order of work.

use crate::abi;
use crate::anchors::AnchorTable;
use crate::geometry::Geometry;
use crate::ids::{HeadId, LayerId, MaskId, Site, StepId};
use crate::mask::MaskTable;
use crate::variant::Variant;

/// How one head attends at one step of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AttnOp {
    /// Every query attends to every key.
    Dense,
    /// Each query block attends to the key blocks its mask row keeps.
    BlockSparse {
        /// The mask.
        mask: MaskId,
    },
    /// Queries of the anchor rows attend to every key; their outputs are copied to the rows nearest to them.
    AnchorRows {
        /// Anchor rows per frame.
        anchors: u16,
    },
}

/// The attention stack a plan is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    /// The model's name.
    pub name: String,
    /// Attention layers.
    pub layers: u32,
    /// Heads per layer.
    pub heads: u32,
    /// Head dimension.
    pub head_dim: u32,
}

/// The chosen ops for all sites.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The attention stack.
    pub model: Model,
    /// The token grid.
    pub geometry: Geometry,
    /// Noise level of each step of the sampler; their number is the number of steps.
    pub sigmas: Vec<f64>,
    /// The distinct masks.
    pub masks: MaskTable,
    /// One op per site, step-major, then layer, then head: see [`Plan::site_index`].
    pub ops: Vec<AttnOp>,
    /// Kernel variants that run this plan (set by variant assignment).
    pub variants: Vec<Variant>,
    /// Order of work (set by the scheduler).
    pub schedule: Option<Schedule>,
}

impl Plan {
    /// A plan whose every site is dense.
    pub fn dense(model: Model, geometry: Geometry, sigmas: Vec<f64>) -> Self {
        let sites = sigmas.len() * model.layers as usize * model.heads as usize;
        Self {
            model,
            geometry,
            sigmas,
            masks: MaskTable::default(),
            ops: vec![AttnOp::Dense; sites],
            variants: Vec::new(),
            schedule: None,
        }
    }

    /// Steps of the sampler.
    pub fn num_steps(&self) -> u32 {
        self.sigmas.len() as u32
    }

    /// Where `site` stands in [`Plan::ops`].
    pub fn site_index(&self, site: Site) -> usize {
        (site.step.index() * self.model.layers as usize + site.layer.index()) * self.model.heads as usize
            + site.head.index()
    }

    /// The op at `site`.
    pub fn op(&self, site: Site) -> AttnOp {
        self.ops[self.site_index(site)]
    }

    /// The ops of all heads of one layer at one step.
    pub fn layer_ops(&self, step: StepId, layer: LayerId) -> &[AttnOp] {
        let start = self.site_index(Site { step, layer, head: HeadId(0) });
        &self.ops[start..start + self.model.heads as usize]
    }

    /// Every site, in the order of [`Plan::ops`].
    pub fn sites(&self) -> impl Iterator<Item = Site> + use<> {
        let (steps, layers, heads) = (self.num_steps(), self.model.layers, self.model.heads);
        (0..steps).flat_map(move |s| (0..layers).flat_map(move |l| (0..heads).map(move |h| Site::new(s, l, h))))
    }

    /// Anchor rows per frame of the plan's anchor heads; one number serves the whole plan. `None` without such heads.
    pub fn anchors(&self) -> Option<u16> {
        self.ops.iter().find_map(|op| match op {
            AttnOp::AnchorRows { anchors } => Some(*anchors),
            _ => None,
        })
    }

    /// Tiles of a head that attends as `op` says ([`abi::tile_rows`]).
    pub fn num_tiles(&self, op: AttnOp) -> u32 {
        let rows = match op {
            AttnOp::Dense | AttnOp::BlockSparse { .. } => self.geometry.q_tokens(),
            AttnOp::AnchorRows { anchors } => AnchorTable::new(&self.geometry, anchors).queries.len() as u32,
        };
        rows.div_ceil(abi::tile_rows(self.model.head_dim))
    }

    /// Share of the dense query-key work that `op` computes, in blocks: kept / all blocks, or computed / all queries.
    pub fn density(&self, op: AttnOp) -> f64 {
        match op {
            AttnOp::Dense => 1.0,
            AttnOp::BlockSparse { mask } => self.masks[mask].density(),
            AttnOp::AnchorRows { anchors } => {
                let computed = AnchorTable::new(&self.geometry, anchors).queries.len();
                computed as f64 / f64::from(self.geometry.q_tokens())
            }
        }
    }
}

/// One unit of work: a tile of up to [`abi::tile_rows`] queries of one head. Stored as `head << 16 | tile`.
///
/// Tiles count queries of the sequence; for anchor heads, computed queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkItem(pub u32);

impl WorkItem {
    /// The item of `tile` of `head`.
    pub fn new(head: HeadId, tile: u32) -> Self {
        debug_assert!(head.0 < 1 << 16 && tile < 1 << 16);
        Self(head.0 << 16 | tile)
    }

    /// Its head.
    pub fn head(self) -> HeadId {
        HeadId(self.0 >> 16)
    }

    /// Its tile.
    pub fn tile(self) -> u32 {
        self.0 & 0xffff
    }
}

/// Work lists in execution order, shared between the (step, layer) pairs that have equal ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schedule {
    /// For each (step, layer), step-major: which list.
    pub list_of: Vec<u32>,
    /// List `i` is `items[list_ptr[i]..list_ptr[i + 1]]`.
    pub list_ptr: Vec<u32>,
    /// All items.
    pub items: Vec<WorkItem>,
}

impl Schedule {
    /// Items of list `list`.
    pub fn list(&self, list: u32) -> &[WorkItem] {
        &self.items[self.list_ptr[list as usize] as usize..self.list_ptr[list as usize + 1] as usize]
    }
}
