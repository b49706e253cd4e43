//! The text form of a plan: what `--dump-after` and `--emit plan` write, and what golden tests are written in.
//!
//! ```text
//! plan moving-shapes  q_block=128 kv_block=128 head_dim=64 layers=1 heads=4
//! grid 1x16x32
//! sigmas 1 0.5
//! variants calibc_attn_bf16_hd64
//! m0 = 4x4 { q0: 0-1; q1-2: 0-2; q3: 0,3 }  ; density 0.62
//! s0.l0.h0: block_sparse m0
//! s0.l0.h1: dense
//! s0.l0.h2: anchor_rows 5
//! s1.l0.h0: block_sparse m0  ; shared with s0.l0.h0
//! ...
//! schedule
//! w0 = { h1: 0-3; h0: 2 0-1 3 }
//! s0.l0: w0
//! ...
//! ```
//!
//! A mask lists the kept columns of each row; equal neighbouring rows stand together (`q1-2`), `none` is a row without any,
//! and masks of more than [`INLINE_ROWS`] runs of rows take a line for each. A work list gives items in execution order, a
//! head and its tiles, ascending or descending runs as ranges. `grid` carries `text_tokens=`, `text_position=`, `layout=` and
//! `kv_tokens=` where they differ from a raster grid without text. `;` starts a comment, outside braces.
//!
//! [`parse`] reads everything [`print()`] writes, valid plans and broken ones alike, so that tests of the verifier can be
//! written in it; it only insists that the text describes one plan. Without [`Options::schedule`] the work lists are a
//! comment, and the plan read back has none.

use std::fmt::{self, Display, Formatter, Write as _};

use crate::geometry::{BLOCK, Geometry, Layout, TextPosition};
use crate::ids::{LayerId, StepId};
use crate::mask::BlockMask;
use crate::plan::{AttnOp, Plan, Schedule, WorkItem};

mod parse;

pub use parse::{ParseError, Problem, parse};

/// Masks with at most this many runs of equal rows are printed on one line.
pub const INLINE_ROWS: usize = 8;

/// What [`print()`] writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The work lists in full; otherwise a comment says how many there are.
    pub schedule: bool,
}

/// The text form of `plan`.
pub fn print(plan: &Plan, options: Options) -> impl Display + '_ {
    Printed { plan, options }
}

struct Printed<'a> {
    plan: &'a Plan,
    options: Options,
}

impl Display for Printed<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write_plan(f, self.plan, self.options)
    }
}

impl Display for Plan {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write_plan(f, self, Options::default())
    }
}

impl Display for AttnOp {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dense => f.write_str("dense"),
            Self::BlockSparse { mask } => write!(f, "block_sparse {mask}"),
            Self::AnchorRows { anchors } => write!(f, "anchor_rows {anchors}"),
        }
    }
}

/// `4x4 { q0: 0-1; q1-3: 0-2 }`.
impl Display for BlockMask {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for r in 0..self.rows() {
            match runs.last_mut() {
                Some((first, last)) if self.row(*first) == self.row(r) => *last = r,
                _ => runs.push((r, r)),
            }
        }
        let (open, between, close) = if runs.len() > INLINE_ROWS { ("\n  ", ";\n  ", "\n") } else { (" ", "; ", " ") };
        write!(f, "{}x{} {{", self.rows(), self.cols())?;
        for (i, &(first, last)) in runs.iter().enumerate() {
            f.write_str(if i == 0 { open } else { between })?;
            write!(f, "q{}: ", Range(first, last))?;
            let mut kept = self.kept(first).peekable();
            if kept.peek().is_none() {
                f.write_str("none")?;
            }
            let mut comma = "";
            while let Some(start) = kept.next() {
                let mut end = start;
                while let Some(next) = kept.next_if_eq(&(end + 1)) {
                    end = next;
                }
                write!(f, "{comma}{}", Range(start, end))?;
                comma = ",";
            }
        }
        write!(f, "{close}}}")
    }
}

/// `3` or `3-7`.
struct Range(u32, u32);

impl Display for Range {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if self.0 == self.1 { write!(f, "{}", self.0) } else { write!(f, "{}-{}", self.0, self.1) }
    }
}

/// A model's name: bare where it is one word, quoted with escapes otherwise.
struct Name<'a>(&'a str);

impl Display for Name<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let bare = |c: char| c.is_ascii_alphanumeric() || "_-./+".contains(c);
        if !self.0.is_empty() && self.0.chars().all(bare) { f.write_str(self.0) } else { write!(f, "{:?}", self.0) }
    }
}

fn write_plan(f: &mut Formatter<'_>, plan: &Plan, options: Options) -> fmt::Result {
    let model = &plan.model;
    write!(f, "plan {}  q_block={BLOCK} kv_block={BLOCK}", Name(&model.name))?;
    writeln!(f, " head_dim={} layers={} heads={}", model.head_dim, model.layers, model.heads)?;
    write_grid(f, &plan.geometry)?;
    write_words(f, "sigmas", &plan.sigmas)?;
    if !plan.variants.is_empty() {
        write_words(f, "variants", &plan.variants)?;
    }
    for (id, mask) in plan.masks.iter() {
        writeln!(f, "{id} = {mask}  ; density {:.2}", mask.density())?;
    }
    let mut first_use = vec![None; plan.masks.len()];
    for (site, op) in plan.sites().zip(&plan.ops) {
        write!(f, "{site}: {op}")?;
        if let AttnOp::BlockSparse { mask } = op
            && let Some(first) = first_use.get_mut(mask.index())
        {
            match first {
                Some(first) => write!(f, "  ; shared with {first}")?,
                None => *first = Some(site),
            }
        }
        f.write_char('\n')?;
    }
    match &plan.schedule {
        None => Ok(()),
        Some(schedule) if options.schedule => write_schedule(f, plan, schedule),
        Some(s) => {
            writeln!(f, "; schedule: {} work lists, {} items", s.list_ptr.len().saturating_sub(1), s.items.len())
        }
    }
}

fn write_grid(f: &mut Formatter<'_>, g: &Geometry) -> fmt::Result {
    write!(f, "grid {}x{}x{}", g.frames, g.height, g.width)?;
    if g.text_tokens != 0 {
        write!(f, " text_tokens={}", g.text_tokens)?;
    }
    if g.text_position != TextPosition::None {
        write!(f, " text_position={}", g.text_position)?;
    }
    if g.layout != Layout::Raster {
        write!(f, " layout={}", g.layout)?;
    }
    if let Some(kv) = g.kv_tokens {
        write!(f, " kv_tokens={kv}")?;
    }
    f.write_char('\n')
}

fn write_words<T: Display>(f: &mut Formatter<'_>, keyword: &str, words: &[T]) -> fmt::Result {
    f.write_str(keyword)?;
    words.iter().try_for_each(|word| write!(f, " {word}"))?;
    f.write_char('\n')
}

fn write_schedule(f: &mut Formatter<'_>, plan: &Plan, schedule: &Schedule) -> fmt::Result {
    writeln!(f, "schedule")?;
    for (i, bounds) in schedule.list_ptr.windows(2).enumerate() {
        // A broken schedule is printed as far as it goes.
        let items = schedule.items.get(bounds[0] as usize..bounds[1] as usize).unwrap_or_default();
        write!(f, "w{i} = {{")?;
        for (n, items) in items.chunk_by(|a, b| a.head() == b.head()).enumerate() {
            write!(f, "{} {}:", if n == 0 { "" } else { ";" }, items[0].head())?;
            write_tiles(f, items)?;
        }
        writeln!(f, " }}")?;
    }
    let pairs = (0..plan.num_steps()).flat_map(|s| (0..plan.model.layers).map(move |l| (StepId(s), LayerId(l))));
    for ((step, layer), list) in pairs.zip(&schedule.list_of) {
        writeln!(f, "{step}.{layer}: w{list}")?;
    }
    Ok(())
}

/// Tiles of one head in order, runs by one up or down as ranges.
fn write_tiles(f: &mut Formatter<'_>, items: &[WorkItem]) -> fmt::Result {
    let mut rest = items;
    while let [first, tail @ ..] = rest {
        let first = first.tile();
        let run = |down: bool| {
            let expected = |i: usize| {
                let i = i as u32 + 1;
                if down { first.checked_sub(i) } else { Some(first + i) }
            };
            tail.iter().enumerate().take_while(|&(i, item)| expected(i) == Some(item.tile())).count()
        };
        let (up, down) = (run(false), run(true));
        let steps = up.max(down);
        let last = if down > up { first - steps as u32 } else { first + steps as u32 };
        write!(f, " {}", Range(first, last))?;
        rest = &tail[steps..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Model;

    #[test]
    fn the_example_of_the_module_doc_is_what_is_printed() {
        let model = Model { name: "moving-shapes".into(), layers: 1, heads: 4, head_dim: 64 };
        let mut plan = Plan::dense(model, Geometry::video(1, 16, 32), vec![1.0, 0.5]);
        let mask = plan.masks.intern(BlockMask::from_fn(4, 4, |r, c| match r {
            0 => c < 2,
            3 => c % 3 == 0,
            _ => c < 3,
        }));
        plan.ops[0] = AttnOp::BlockSparse { mask };
        plan.ops[4] = AttnOp::BlockSparse { mask };
        plan.ops[2] = AttnOp::AnchorRows { anchors: 5 };
        plan.schedule = Some(Schedule {
            list_of: vec![0, 1],
            list_ptr: vec![0, 4, 8],
            items: [0x10000, 0x10001, 0x10002, 0x10003, 2, 0, 1, 3].map(WorkItem).to_vec(),
        });
        let text = print(&plan, Options { schedule: true }).to_string();
        let want = "\
plan moving-shapes  q_block=128 kv_block=128 head_dim=64 layers=1 heads=4
grid 1x16x32
sigmas 1 0.5
m0 = 4x4 { q0: 0-1; q1-2: 0-2; q3: 0,3 }  ; density 0.62
s0.l0.h0: block_sparse m0
s0.l0.h1: dense
s0.l0.h2: anchor_rows 5
s0.l0.h3: dense
s1.l0.h0: block_sparse m0  ; shared with s0.l0.h0
s1.l0.h1: dense
s1.l0.h2: dense
s1.l0.h3: dense
schedule
w0 = { h1: 0-3 }
w1 = { h0: 2 0-1 3 }
s0.l0: w0
s1.l0: w1
";
        assert_eq!(text, want);
        assert_eq!(parse(&text).unwrap(), plan);
        assert!(plan.to_string().ends_with("s1.l0.h3: dense\n; schedule: 2 work lists, 8 items\n"));
        assert_eq!(parse(&plan.to_string()).unwrap(), Plan { schedule: None, ..plan });
    }
}
