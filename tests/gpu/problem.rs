//! The problems of the suite: everything about them follows from their number.

use std::fmt;

use calibc_ir::{
    BLOCK, BlockMask, DType, Geometry, HEAD_DIMS, LayerId, Layout, Model, Plan, Site, StepId, TextPosition, Variant,
};
use calibc_opt::{Explicit, Hooks, NoCalibration, Policy, SiteMask, Target, standard};
use calibc_runtime::{HostTensor, Operand};
use calibc_trace::random::SplitMix64;
use half::{bf16, f16};

/// Problems whose every property is drawn.
pub(crate) const DRAWN: u64 = 96;
/// Problems of the suite: the drawn ones, then those of [`chosen`].
pub(crate) const COUNT: u64 = DRAWN + CHOSEN;
/// Kinds of geometry, in turn.
const KINDS: u64 = 6;
const STEPS: u32 = 2;
const LAYERS: u32 = 2;

/// A stream of numbers that a seed decides.
#[derive(Clone, Debug)]
pub(crate) struct Numbers(SplitMix64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(SplitMix64::new(seed))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0.next()
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0.below(n)
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// Roughly normal, variance 1.
    fn normal(&mut self) -> f32 {
        let sum: f32 = (0..6).map(|_| ((self.next() >> 40) as f32) / (1 << 24) as f32).sum();
        (sum - 3.0) * std::f32::consts::SQRT_2
    }
}

/// Which blocks a head keeps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kept {
    /// One block of each row.
    OnePerRow,
    /// Each block with this chance in 100, and one of each row at least.
    Percent(u64),
    /// The diagonal and its neighbours.
    Band,
    /// Every block of a mask.
    All,
    /// Runs of so many blocks, in turn those of the even rows and of the odd ones: neighbours have nothing in common.
    Runs(u32),
    /// Every block of the even rows, one of each odd one.
    Lone,
}

/// What one head does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum HeadKind {
    Dense,
    Mask(Kept),
    Anchors(u16),
}

/// How the magnitude of keys changes along the sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ramp {
    Rising,
    Falling,
}

/// One problem.
#[derive(Clone, Debug)]
pub(crate) struct Problem {
    pub(crate) number: u64,
    pub(crate) dtype: DType,
    pub(crate) head_dim: u32,
    pub(crate) geometry: Geometry,
    /// One per head, at the step and layer that run.
    pub(crate) heads: Vec<HeadKind>,
    pub(crate) batch: usize,
    /// Text tokens missing at run time, of queries and of keys.
    pub(crate) cut: (u32, u32),
    pub(crate) lse: bool,
    /// `[B, S, H, D]` in memory, else `[B, H, S, D]`.
    pub(crate) token_major: bool,
    /// Unused elements between rows and between heads.
    pub(crate) gaps: bool,
    pub(crate) step_on_device: bool,
    /// Steps of the plan.
    pub(crate) steps: u32,
    pub(crate) step: StepId,
    pub(crate) layer: LayerId,
    pub(crate) softmax_scale: Option<f32>,
    /// How far apart scores lie.
    pub(crate) spread: f32,
    /// Whether keys grow or shrink along the sequence, so that a row's maximum moves from block to block.
    pub(crate) ramp: Option<Ramp>,
    /// All heads read the keys and values of one: their stride over heads is 0.
    pub(crate) one_kv_head: bool,
}

impl Problem {
    /// Problem `number`.
    pub(crate) fn new(number: u64) -> Self {
        match number.checked_sub(DRAWN) {
            None => Self::drawn(number),
            Some(index) => chosen(index, Self::drawn(number)),
        }
    }

    fn drawn(number: u64) -> Self {
        // Every kind of geometry meets every combination of the four switches, in an order unlike that of the sizes.
        const SWITCHES: [u32; 16] = [0, 7, 9, 12, 2, 4, 15, 11, 1, 6, 10, 13, 3, 8, 5, 14];
        let (kind, round) = (number % KINDS, number / KINDS);
        let switch = |at: u32| SWITCHES[((round + 3 * kind) % 16) as usize] >> at & 1 == 1;
        let mut n = Numbers::new(0xca11b << 32 | number);
        let geometry = geometry(kind, round, &mut n);
        let text = if geometry.text_position == TextPosition::After { geometry.text_tokens } else { 0 };
        // Where the video fills its blocks, rows that keep text blocks alone are left without keys.
        let no_text = text > 0 && geometry.video_tokens().is_multiple_of(BLOCK);
        let some = |n: &mut Numbers| n.below(u64::from(text) + 1) as u32;
        let cut = match n.below(4) {
            _ if no_text => (text, text),
            0 => (0, 0),
            1 => (text, text),
            2 => (some(&mut n), some(&mut n)),
            _ => (0, some(&mut n)),
        };
        // A grid has anchor rows to offer; a plain sequence is one row.
        let anchors = (geometry.height > 1 && !no_text && n.below(3) > 0)
            .then(|| 1 + n.below(u64::from(geometry.height.min(5))) as u16);
        let large = geometry.kv_tokens() > 4096;
        let heads = (0..if large { 2 } else { 1 + n.below(5) })
            .map(|head| match (n.below(4), anchors) {
                _ if head == 0 && no_text => HeadKind::Mask(Kept::OnePerRow),
                (0, _) => HeadKind::Dense,
                (1, Some(anchors)) => HeadKind::Anchors(anchors),
                _ => HeadKind::Mask(n.pick(&[
                    Kept::OnePerRow,
                    Kept::Percent(5),
                    Kept::Percent(25),
                    Kept::Percent(50),
                    Kept::Percent(90),
                    Kept::Band,
                    Kept::All,
                ])),
            })
            .collect();
        Self {
            number,
            dtype: if switch(0) { DType::Fp16 } else { DType::Bf16 },
            head_dim: if switch(1) { 64 } else { 128 },
            geometry,
            heads,
            batch: 1 + n.below(3) as usize,
            cut,
            lse: switch(2),
            token_major: switch(3),
            gaps: n.below(2) == 1,
            step_on_device: n.below(2) == 1,
            steps: STEPS,
            step: StepId(n.below(u64::from(STEPS)) as u32),
            layer: LayerId(n.below(u64::from(LAYERS)) as u32),
            softmax_scale: n.pick(&[None, None, None, Some(0.06)]),
            spread: n.pick(&[1.0, 1.0, 4.0]),
            ramp: None,
            one_kv_head: false,
        }
    }

    /// Query and key tokens at run time.
    pub(crate) fn tokens(&self) -> (u32, u32) {
        (self.geometry.q_tokens() - self.cut.0, self.geometry.kv_tokens() - self.cut.1)
    }

    /// Logical shapes `[batch, head, token, head_dim]` of q and out, and of k and v.
    pub(crate) fn shapes(&self) -> [[usize; 4]; 2] {
        let (q, kv) = self.tokens();
        [q, kv].map(|tokens| [self.batch, self.heads.len(), tokens as usize, self.head_dim as usize])
    }

    /// The kernel it runs.
    pub(crate) fn variant(&self, plan: &Plan) -> Variant {
        let fits = |v: &&Variant| (v.dtype, v.lse) == (self.dtype, self.lse);
        *plan.variants.iter().find(fits).expect("the target asks for every element type, with and without LSE")
    }

    /// The whole plan, through the real pipeline. Sites that do not run get other ops, so that a wrong table shows.
    pub(crate) fn plan(&self) -> Plan {
        let model =
            Model { name: "suite".into(), layers: LAYERS, heads: self.heads.len() as u32, head_dim: self.head_dim };
        let problem = self.clone();
        let source = move |site: Site| problem.site(site);
        let plan = Plan::dense(model, self.geometry, vec![1.0; self.steps as usize]);
        standard(&Policy::Explicit(Explicit::new(source)), &Target::default())
            .run(plan, &NoCalibration, Hooks::default())
            .expect("problems are valid plans")
    }

    fn site(&self, site: Site) -> SiteMask {
        let mut n = Numbers::new(self.number << 32 | u64::from(site.step.0 << 20 | site.layer.0 << 16 | site.head.0));
        let (rows, cols) = (self.geometry.num_q_blocks(), self.geometry.num_kv_blocks());
        let runs = (site.step, site.layer) == (self.step, self.layer);
        let kept = match self.heads[site.head.index()] {
            HeadKind::Dense if runs => return SiteMask::Dense,
            HeadKind::Anchors(anchors) if runs => return SiteMask::Anchors(anchors),
            HeadKind::Mask(kept) if runs => kept,
            _ => Kept::Percent(50),
        };
        let one: Vec<u32> = (0..rows).map(|_| n.below(u64::from(cols)) as u32).collect();
        SiteMask::Mask(BlockMask::from_fn(rows, cols, |r, c| match kept {
            Kept::All => true,
            Kept::OnePerRow => c == one[r as usize],
            Kept::Runs(length) => (c / length + r) % 2 == 0,
            Kept::Lone => r % 2 == 0 || c == one[r as usize],
            Kept::Percent(percent) => c == one[r as usize] || n.below(100) < percent,
            Kept::Band => (u64::from(r) * u64::from(cols) / u64::from(rows)).abs_diff(u64::from(c)) <= 1,
        }))
    }

    /// q, k and v.
    pub(crate) fn inputs(&self) -> Inputs {
        let mut n = Numbers::new(self.number.wrapping_mul(0x5851_f42d_4c95_7f2d) | 1);
        let [q, kv] = self.shapes();
        let shapes = [q, kv, kv];
        let mut values = |shape: [usize; 4], factor: f32| -> Vec<u16> {
            let values = (0..shape.iter().product()).map(|_: usize| factor * n.normal());
            values.map(|x| narrow(self.dtype, x)).collect()
        };
        let mut data = [values(q, self.spread), values(kv, 1.0), values(kv, 1.0)];
        if let Some(ramp) = self.ramp {
            let (tokens, d) = (kv[2], kv[3]);
            for (row, key) in data[1].chunks_exact_mut(d).enumerate() {
                let place = (row % tokens) as f32 / tokens as f32;
                let factor = match ramp {
                    Ramp::Rising => 0.25 + 4.0 * place,
                    Ramp::Falling => 0.01 + 4.0 * (1.0 - place),
                };
                key.iter_mut().for_each(|bits| *bits = narrow(self.dtype, factor * widen(self.dtype, *bits)));
            }
        }
        if self.one_kv_head {
            let head = kv[2] * kv[3];
            for batch in data[1..].iter_mut().flat_map(|data| data.chunks_exact_mut(kv[1] * head)) {
                let (first, rest) = batch.split_at_mut(head);
                rest.chunks_exact_mut(head).for_each(|other| other.copy_from_slice(first));
            }
        }
        Inputs { dtype: self.dtype, shapes, data }
    }
}

/// Problems of [`chosen`].
const CHOSEN: u64 = 52;

/// What chance rarely draws: `base` with the properties that chosen problem `index` is about. The four problems of a case are the
/// four combinations of element type and head_dim.
fn chosen(index: u64, base: Problem) -> Problem {
    use HeadKind::{Anchors, Dense, Mask};
    let (case, turn) = (index / 4, (index % 4) as usize);
    let base = Problem {
        dtype: DType::ALL[turn % 2],
        head_dim: HEAD_DIMS[turn / 2],
        lse: (turn + turn / 2 + case as usize).is_multiple_of(2),
        token_major: (turn / 2 + case as usize / 2).is_multiple_of(2),
        ..base
    };
    let sequence = |heads: Vec<HeadKind>, q: u32, kv: u32| Problem {
        geometry: Geometry::sequence(q, kv),
        heads,
        cut: (0, 0),
        ..base.clone()
    };
    match case {
        // Rows of more than 1024 blocks: a warp reads their mask in several pieces.
        0 => {
            let heads = [Mask(Kept::Percent(5)), Mask(Kept::OnePerRow), Mask(Kept::Percent(50)), Dense];
            let kv = [1025 * 128 + 1, 1100 * 128 + 77, 1056 * 128, 2049 * 128 + 127][turn];
            Problem { batch: 1, ..sequence(vec![heads[turn]], [130, 257, 64, 1][turn], kv) }
        }
        // One head, and many.
        1 => {
            sequence(vec![[Dense, Mask(Kept::Band), Mask(Kept::Percent(25)), Mask(Kept::OnePerRow)][turn]], 1400, 1400)
        }
        2 => {
            let kinds =
                [Dense, Mask(Kept::Percent(25)), Mask(Kept::OnePerRow), Mask(Kept::Percent(90)), Mask(Kept::All)];
            let heads = (0..[24, 40, 48, 96][turn]).map(|head| kinds[head % kinds.len()]).collect();
            Problem { batch: 1, ..sequence(heads, 300, 300) }
        }
        // Far more keys than queries, and the other way round.
        3 => {
            let (q, kv) = [(1, 6000), (64, 9001), (2900, 3), (2561, 129)][turn];
            sequence(vec![Mask(Kept::Percent(50)), Dense, Mask(Kept::OnePerRow)], q, kv)
        }
        // Every row keeps exactly one block.
        4 => sequence(vec![Mask(Kept::OnePerRow); 3], [1280, 1153, 1407, 900][turn], [1280, 1153, 1025, 2047][turn]),
        // Everything in one launch.
        5 => Problem {
            geometry: Geometry::video(3, 15, [26, 30, 17, 64][turn]),
            heads: vec![
                Anchors(3),
                Dense,
                Mask(Kept::Percent(5)),
                Mask(Kept::OnePerRow),
                Anchors(3),
                Mask(Kept::All),
                Dense,
                Mask(Kept::Percent(50)),
            ],
            cut: (0, 0),
            batch: 3,
            ..base
        },
        // Scores so far apart that weights underflow, and maxima that move with every block.
        6 => {
            let rising = Some(Ramp::Rising);
            let (spread, ramp) = [(30.0, None), (60.0, None), (8.0, rising), (20.0, rising)][turn];
            let heads = vec![Dense, Mask(Kept::Percent(50)), Mask(Kept::Band)];
            Problem { spread, ramp, softmax_scale: None, ..sequence(heads, 700, 1200 + 31 * turn as u32) }
        }
        // A scale of the caller's.
        7 => {
            let softmax_scale = Some([0.3, 0.011, 1.0, 1e-4][turn]);
            Problem { softmax_scale, ..sequence(vec![Mask(Kept::Percent(50)), Dense], 500, 777) }
        }
        // Scores that outgrow the maximum of the block a row begins with, the last one, by more than weights may.
        8 => {
            let ramp = Some(Ramp::Falling);
            let heads = vec![Dense, Mask(Kept::Percent(50)), Mask(Kept::Band)];
            Problem { spread: 20.0, ramp, softmax_scale: None, ..sequence(heads, 700, [1100, 1200, 1153, 900][turn]) }
        }
        // Tiles of one length, so few in their last round that several CTAs compute each: alone, after a whole round, of anchor heads,
        // and with maxima that differ from part to part.
        9 => match turn {
            0 => Problem { batch: 1, ..sequence(vec![Dense; 3], 300, 9001) },
            1 => Problem { batch: 2, ..sequence(vec![Dense; 23], 300, 4000) },
            2 => Problem {
                geometry: Geometry::video(4, 30, 52),
                heads: vec![Anchors(5), Anchors(5)],
                cut: (0, 0),
                batch: 2,
                ..base
            },
            _ => {
                let ramp = Some(Ramp::Falling);
                Problem { spread: 20.0, ramp, softmax_scale: None, batch: 3, ..sequence(vec![Dense, Dense], 257, 3001) }
            }
        },
        // Rows that share a tile (at head_dim 64) and keep different blocks, in runs of any length; last tiles of one strip of 64 rows.
        10 => {
            let heads = [Kept::Runs(1), Kept::Runs(2), Kept::Runs(9), Kept::Lone].map(Mask).to_vec();
            let (q, kv) = [(424, 5197), (1364, 4224), (300, 2900), (1000, 1281)][turn];
            sequence(heads, q, kv)
        }
        // The same with rows of more than 1024 blocks, which both tiles of a cluster keep.
        11 => {
            let (q, kv) = [(300, 1030 * 128 + 5), (577, 1026 * 128), (130, 1025 * 128), (257, 1040 * 128 + 1)][turn];
            Problem { batch: 1, ..sequence(vec![Mask(Kept::Lone)], q, kv) }
        }
        // A batch of three, tails on both sides.
        _ => {
            let (q, kv) = [(257, 383), (511, 641), (1023, 130), (129, 1151)][turn];
            Problem { batch: 3, ..sequence(vec![Mask(Kept::Band), Mask(Kept::Percent(25)), Dense], q, kv) }
        }
    }
}

/// Token counts of every residue class, a grid with and without text, or more keys than one mask word has blocks.
fn geometry(kind: u64, round: u64, n: &mut Numbers) -> Geometry {
    const EDGES: [u32; 14] = [1, 127, 128, 129, 7, 64, 130, 191, 250, 255, 256, 257, 383, 640];
    let tokens = |n: &mut Numbers, salt: u64| match (round + salt) % 2 {
        0 => EDGES[((round / 2 + salt * 3) % 14) as usize],
        _ => (128 * n.below(6) + 8 * n.below(16) + 1 + (round / 2 + salt * 5) % 8) as u32,
    };
    let grid = |n: &mut Numbers| Geometry::video(1 + n.below(4) as u32, 2 + n.below(11) as u32, 3 + n.below(28) as u32);
    let tile = |n: &mut Numbers| Layout::Tile([n.pick(&[1, 2]), n.pick(&[4, 5, 8]), n.pick(&[4, 8])]);
    let text = |n: &mut Numbers| n.pick(&[1u32, 9, 77, 128, 226, 333]);
    match kind {
        0 => Geometry::sequence(tokens(n, 0), tokens(n, 1)),
        1 if round % 5 == 3 => Geometry::sequence(tokens(n, 0).min(400), 4200 + n.below(4500) as u32),
        1 => {
            let same = tokens(n, 0);
            Geometry::sequence(same, same)
        }
        2 => grid(n),
        3 => Geometry { layout: tile(n), ..grid(n) },
        4 => {
            let layout = if round.is_multiple_of(2) { Layout::Raster } else { tile(n) };
            // Sometimes the video fills its blocks, so that a text block holds text alone and can be cut away whole.
            let video = if round.is_multiple_of(3) { Geometry::video(2, 8, 16) } else { grid(n) };
            Geometry { text_tokens: text(n), text_position: TextPosition::After, layout, ..video }
        }
        _ => {
            let layout = if round.is_multiple_of(2) { Layout::Raster } else { tile(n) };
            Geometry { text_tokens: text(n), text_position: TextPosition::Before, layout, ..grid(n) }
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (q, kv) = self.tokens();
        let layout = if self.token_major { "bshd" } else { "bhsd" };
        write!(f, "#{:<3} {} d{:<3} b{} {layout}", self.number, self.dtype, self.head_dim, self.batch)?;
        write!(f, "{} q {q:<4} kv {kv:<4}", if self.gaps { "+gaps" } else { "     " })?;
        write!(f, " {:<6}", if self.geometry.layout == Layout::Raster { "raster" } else { "tiles" })?;
        write!(f, " text {:<6}", self.geometry.text_position.to_string())?;
        write!(
            f,
            " {:<3} step {}",
            if self.lse { "lse" } else { "" },
            if self.step_on_device { "gpu " } else { "host" }
        )?;
        let heads: Vec<String> = (self.heads.iter())
            .map(|head| match head {
                HeadKind::Dense => "dense".into(),
                HeadKind::Anchors(k) => format!("anchors{k}"),
                HeadKind::Mask(Kept::OnePerRow) => "1/row".into(),
                HeadKind::Mask(Kept::Percent(p)) => format!("{p}%"),
                HeadKind::Mask(Kept::Band) => "band".into(),
                HeadKind::Mask(Kept::All) => "all".into(),
                HeadKind::Mask(Kept::Runs(n)) => format!("runs{n}"),
                HeadKind::Mask(Kept::Lone) => "lone".into(),
            })
            .collect();
        write!(f, " {}", heads.join(","))
    }
}

/// q, k and v as bits of the problem's element type, contiguous `[batch, head, token, head_dim]`.
pub(crate) struct Inputs {
    dtype: DType,
    pub(crate) shapes: [[usize; 4]; 3],
    pub(crate) data: [Vec<u16>; 3],
}

impl Inputs {
    /// Runs `f` on host views of q, k and v.
    pub(crate) fn with<R>(&self, f: impl FnOnce(&[HostTensor<'_>; 3]) -> R) -> R {
        use half::slice::HalfBitsSliceExt;
        let operands = [Operand::Q, Operand::K, Operand::V];
        f(&std::array::from_fn(|i| {
            let view = match self.dtype {
                DType::Bf16 => HostTensor::bhsd(operands[i], self.data[i].reinterpret_cast::<bf16>(), self.shapes[i]),
                DType::Fp16 => HostTensor::bhsd(operands[i], self.data[i].reinterpret_cast::<f16>(), self.shapes[i]),
            };
            view.expect("the data has the shape's size")
        }))
    }
}

/// The bits of the element nearest to `x`.
fn narrow(dtype: DType, x: f32) -> u16 {
    match dtype {
        DType::Bf16 => bf16::from_f32(x).to_bits(),
        DType::Fp16 => f16::from_f32(x).to_bits(),
    }
}

/// The value behind the bits of an element.
pub(crate) fn widen(dtype: DType, bits: u16) -> f32 {
    match dtype {
        DType::Bf16 => bf16::from_bits(bits).to_f32(),
        DType::Fp16 => f16::from_bits(bits).to_f32(),
    }
}

mod tests {
    use std::collections::BTreeSet;

    use calibc_ir::AttnOp;

    use super::*;

    /// What the suite claims to cover, it covers.
    #[test]
    fn problems_cover_every_dimension() {
        let problems: Vec<Problem> = (0..COUNT).map(Problem::new).collect();
        let all = |what: &str, want: usize, of: &dyn Fn(&Problem) -> Vec<u64>| {
            let seen: BTreeSet<u64> = problems.iter().flat_map(of).collect();
            assert_eq!(seen.len(), want, "{what}: {seen:?}");
        };
        all("query tails", 8, &|p| vec![u64::from(p.tokens().0 % 8)]);
        all("key tails", 8, &|p| vec![u64::from(p.tokens().1 % 8)]);
        all("dtype, head_dim, lse, layout, kind of geometry", 96, &|p| {
            // The chosen problems have geometries of their own.
            if p.number >= DRAWN {
                return Vec::new();
            }
            let switches = [p.dtype == DType::Fp16, p.head_dim == 64, p.lse, p.token_major];
            vec![switches.iter().fold(p.number % KINDS, |key, &on| key * 2 + u64::from(on))]
        });
        all("batches", 3, &|p| vec![p.batch as u64]);
        all("gaps and step", 4, &|p| vec![u64::from(p.gaps) | u64::from(p.step_on_device) << 1]);
        all("steps and layers", 4, &|p| vec![u64::from(p.step.0 * 2 + p.layer.0)]);
        all("text", 3, &|p| vec![p.geometry.text_position as u64]);
        let any = |what: &str, at_least: usize, of: &dyn Fn(&Problem) -> bool| {
            let count = problems.iter().filter(|p| of(p)).count();
            assert!(count >= at_least, "{what}: {count}");
        };
        for tokens in [1, 127, 128, 129] {
            any("query edge", 1, &|p| p.tokens().0 == tokens);
            any("key edge", 1, &|p| p.tokens().1 == tokens);
        }
        any("q and kv lengths differ", 10, &|p| p.tokens().0 != p.tokens().1);
        any("shorter text", 8, &|p| p.cut != (0, 0));
        any("several mask words", 3, &|p| p.geometry.num_kv_blocks() > 32);
        any("a multiple of the block", 2, &|p| p.tokens().0 % 128 == 0 && p.tokens().1 % 128 == 0);
        any("not ragged", 2, &|p| !p.geometry.ragged());
        any("tiles", 10, &|p| p.geometry.layout != Layout::Raster);
        for kept in [Kept::OnePerRow, Kept::Percent(5), Kept::Percent(50), Kept::Band, Kept::All] {
            any("masks", 5, &|p| p.heads.contains(&HeadKind::Mask(kept)));
        }
        let kinds = |p: &Problem| {
            let anchors = p.heads.iter().any(|h| matches!(h, HeadKind::Anchors(_)));
            let masks = p.heads.iter().any(|h| matches!(h, HeadKind::Mask(_)));
            [anchors, masks, p.heads.contains(&HeadKind::Dense)]
        };
        any("three ops in one launch", 8, &|p| kinds(p) == [true; 3]);
        any("anchors with text after", 2, &|p| kinds(p)[0] && p.geometry.text_position == TextPosition::After);
        any("anchors with text before", 2, &|p| kinds(p)[0] && p.geometry.text_position == TextPosition::Before);
        let blocks = |p: &Problem| (p.geometry.num_q_blocks(), p.geometry.num_kv_blocks());
        any("mask rows of several pieces", 4, &|p| blocks(p).1 > 1024);
        any("one head", 4, &|p| p.heads.len() == 1 && blocks(p).0 > 4);
        any("rows of a tile with nothing in common", 2, &|p| {
            p.head_dim == 64 && p.heads.contains(&HeadKind::Mask(Kept::Runs(9)))
        });
        any("rows of a tile of which one keeps one block", 4, &|p| {
            p.head_dim == 64 && p.heads.contains(&HeadKind::Mask(Kept::Lone))
        });
        any("last tiles of one strip, of either half of a block", 1, &|p| {
            p.head_dim == 64 && p.tokens().0 > 192 && (1..=64).contains(&(p.tokens().0 % 384))
        });
        any("last tiles of one strip, of the other half", 1, &|p| {
            p.head_dim == 64 && p.tokens().0 > 192 && (193..=256).contains(&(p.tokens().0 % 384))
        });
        any("many heads", 4, &|p| p.heads.len() >= 24);
        any("far more keys than queries", 2, &|p| p.tokens().1 > 100 * p.tokens().0);
        any("far more queries than keys", 2, &|p| p.tokens().0 > 10 * p.tokens().1);
        any("one block of every row", 4, &|p| {
            blocks(p).0 > 4 && p.heads.iter().all(|&head| head == HeadKind::Mask(Kept::OnePerRow))
        });
        any("all ops in a batch of three", 4, &|p| kinds(p) == [true; 3] && p.batch == 3 && p.heads.len() == 8);
        any("tiles in parts", 4, &|p| {
            blocks(p).1 > 20 && p.heads.iter().all(|head| matches!(head, HeadKind::Dense | HeadKind::Anchors(_)))
        });
        any("weights that underflow", 2, &|p| p.spread >= 30.0);
        any("maxima that move", 2, &|p| p.ramp == Some(Ramp::Rising));
        any("maxima outgrown", 2, &|p| p.ramp == Some(Ramp::Falling));
        any("a scale of the caller's", 8, &|p| p.softmax_scale.is_some());
        any("anchors in tiles", 2, &|p| kinds(p)[0] && p.geometry.layout != Layout::Raster);
    }

    /// The plan that runs has the ops the problem lists.
    #[test]
    fn plans_have_the_ops_of_the_problem() {
        for problem in (0..COUNT).map(Problem::new) {
            let plan = problem.plan();
            for (op, head) in plan.layer_ops(problem.step, problem.layer).iter().zip(&problem.heads) {
                let same = match (op, head) {
                    (AttnOp::AnchorRows { anchors }, HeadKind::Anchors(k)) => anchors == k,
                    // A mask that keeps everything may have become dense.
                    (AttnOp::Dense, HeadKind::Dense | HeadKind::Mask(_)) => true,
                    (AttnOp::BlockSparse { .. }, HeadKind::Mask(_)) => true,
                    _ => false,
                };
                assert!(same, "{problem}: {op:?}");
            }
        }
    }
}
