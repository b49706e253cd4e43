//! Counts of scores, and what they say: the work that sites do at each price, and the score at which a number of blocks is reached.

use std::ops::Range;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use crate::scoring::KEYS;

/// Buckets of scores: the upper 16 bits of a key, 128 buckets to the octave.
pub(super) const COARSE: usize = (KEYS >> 16) as usize;
/// Prices that are tried, the lower edges of buckets: beyond the largest score, up to where no loss is worth a block.
pub(super) const GRID: usize = 0x5000;
/// Keys of one bucket.
const FINE: usize = 1 << 16;

/// The price at a place of the grid.
pub(super) fn price_at(place: usize) -> f64 {
    f64::from(f32::from_bits((place as u32) << 16))
}

/// What stands for the scores of a bucket: its middle, but 0 for the lowest, which is where scores of 0 are.
fn middle(bucket: usize) -> f64 {
    if bucket == 0 { 0.0 } else { (price_at(bucket) + price_at(bucket + 1)) / 2.0 }
}

fn counters(n: usize) -> Vec<AtomicU64> {
    (0..n).map(|_| AtomicU64::new(0)).collect()
}

/// A site at anchor rows.
#[derive(Clone, Copy)]
pub(super) struct Anchored {
    /// Its loss, in the scale of scores.
    pub(super) loss: f64,
    /// Its work, in blocks.
    pub(super) blocks: f64,
}

/// The prices, as places of the grid, at which a site does better at anchor rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    first: u16,
    last: u16,
}

impl Span {
    const NEVER: Self = Self { first: 1, last: 0 };

    pub(super) fn contains(self, place: usize) -> bool {
        (usize::from(self.first)..=usize::from(self.last)).contains(&place)
    }
}

/// Sums over sites of the work at each price, by differences from the price above; differences wrap.
pub(super) struct Level {
    kept: Vec<AtomicU64>,
    anchored: Vec<AtomicU64>,
}

impl Level {
    pub(super) fn new() -> Self {
        Self { kept: counters(GRID + 1), anchored: counters(GRID + 1) }
    }

    /// Adds a site of `forced` blocks and free ones by bucket, which may use anchor rows. Returns the prices at which it does.
    pub(super) fn add(&self, forced: u64, buckets: &[u32], anchored: Option<Anchored>) -> Span {
        let span = anchored.map_or(Span::NEVER, |anchored| span(forced, buckets, anchored));
        let add = |to: &[AtomicU64], place: usize, n: u64| {
            if n != 0 {
                to[place].fetch_add(n, Relaxed);
            }
        };
        if span == Span::NEVER {
            add(&self.kept, GRID, forced);
            buckets.iter().enumerate().for_each(|(bucket, &n)| add(&self.kept, bucket, n.into()));
            return span;
        }
        // Blocks kept, price by price downwards: none counts while the site is at anchor rows.
        let (mut kept, mut counted) = (forced, 0_u64);
        for place in (0..=GRID).rev() {
            kept += buckets.get(place).map_or(0, |&n| u64::from(n));
            let now = if span.contains(place) { 0 } else { kept };
            add(&self.kept, place, now.wrapping_sub(counted));
            counted = now;
        }
        add(&self.anchored, usize::from(span.last), 1);
        if let Some(below) = usize::from(span.first).checked_sub(1) {
            add(&self.anchored, below, 1_u64.wrapping_neg());
        }
        span
    }

    /// The sums at each price.
    pub(super) fn curve(self) -> Curve {
        let sums = |differences: Vec<AtomicU64>| {
            let mut sum = 0_u64;
            let mut sums: Vec<u64> = differences.into_iter().map(AtomicU64::into_inner).collect();
            for value in sums.iter_mut().rev() {
                sum = sum.wrapping_add(*value);
                *value = sum;
            }
            sums
        };
        Curve { kept: sums(self.kept), anchored: sums(self.anchored) }
    }
}

/// Where anchor rows win. What a mask loses plus the price of its blocks is a concave function of the price, the same of anchor
/// rows a line, so that there is one stretch of prices; from its first to its last place, should rounding break it.
fn span(forced: u64, buckets: &[u32], anchored: Anchored) -> Span {
    let mut kept = forced + buckets.iter().map(|&n| u64::from(n)).sum::<u64>();
    let mut loss = 0.0;
    let mut found: Option<Span> = None;
    for place in 1..=GRID {
        // At this price the bucket below it is dropped.
        if let Some(&n) = buckets.get(place - 1).filter(|&&n| n > 0) {
            kept -= u64::from(n);
            loss += f64::from(n) * middle(place - 1);
        }
        let price = price_at(place);
        if anchored.loss + price * anchored.blocks < loss + price * kept as f64 {
            let place = place as u16;
            found = Some(Span { first: found.map_or(place, |span| span.first), last: place });
        }
    }
    found.unwrap_or(Span::NEVER)
}

/// Work at each price of the grid: blocks that masks keep, and sites at anchor rows.
pub(super) struct Curve {
    kept: Vec<u64>,
    anchored: Vec<u64>,
}

/// A limit of work, and what work costs.
pub(super) struct Bound {
    /// Units at most.
    pub(super) units: u128,
    /// Units of a block.
    pub(super) block: u64,
    /// Units of a site at anchor rows.
    pub(super) anchored: u64,
}

impl Bound {
    pub(super) fn units_of(&self, kept: u64, anchored: u64) -> u128 {
        u128::from(kept) * u128::from(self.block) + u128::from(anchored) * u128::from(self.anchored)
    }

    pub(super) fn cost(&self, curves: &[&Curve], place: usize) -> u128 {
        curves.iter().map(|curve| self.units_of(curve.kept[place], curve.anchored[place])).sum()
    }
}

/// The lowest price of the grid that keeps within the bound, else the highest.
pub(super) fn price(curves: &[&Curve], bound: &Bound) -> usize {
    (0..=GRID).find(|&place| bound.cost(curves, place) <= bound.units).unwrap_or(GRID)
}

/// Scores of sites with masks: by bucket, and to the bit inside a window of buckets.
pub(super) struct Count {
    pub(super) window: Range<usize>,
    coarse: Vec<AtomicU64>,
    fine: Vec<AtomicU64>,
    /// Blocks of floors and text.
    pub(super) forced: AtomicU64,
    /// Sites at anchor rows.
    pub(super) anchored: AtomicU64,
}

/// Where scores are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// Free blocks of larger keys stay.
    pub(super) key: u32,
    /// So many of this key stay too.
    pub(super) equals: u64,
    /// Free blocks that stay.
    pub(super) kept: u64,
}

impl Cut {
    /// The loss per block at the cut; none where no free block stays.
    pub(super) fn threshold(&self, largest: f64) -> Option<f64> {
        (self.kept > 0).then(|| f64::from(f32::from_bits(self.key)) * largest)
    }
}

impl Count {
    pub(super) fn new(window: Range<usize>) -> Self {
        let fine = counters(window.len() * FINE);
        Self { window, coarse: counters(COARSE), fine, forced: AtomicU64::new(0), anchored: AtomicU64::new(0) }
    }

    /// Adds the free blocks of a site: by bucket, and the keys inside the window.
    pub(super) fn add(&self, buckets: &[u32], near: &[u32]) {
        for (to, &n) in self.coarse.iter().zip(buckets).filter(|(_, n)| **n > 0) {
            to.fetch_add(n.into(), Relaxed);
        }
        let first = self.window.start * FINE;
        for &key in near {
            self.fine[key as usize - first].fetch_add(1, Relaxed);
        }
    }

    /// Where to cut so that `wanted` free blocks stay, or as many as there are; the bucket of the cut where it is not in the window.
    pub(super) fn cut(&self, wanted: u64) -> Result<Cut, usize> {
        if wanted == 0 {
            return Ok(Cut { key: KEYS, equals: 0, kept: 0 });
        }
        let mut above = 0;
        for (bucket, n) in self.coarse.iter().enumerate().rev() {
            let n = n.load(Relaxed);
            if above + n >= wanted {
                return if self.window.contains(&bucket) {
                    Ok(self.inside(bucket, above, wanted))
                } else {
                    Err(bucket)
                };
            }
            above += n;
        }
        Ok(Cut { key: 0, equals: u64::MAX, kept: above })
    }

    /// The cut in a bucket of the window, above which `above` blocks stay.
    fn inside(&self, bucket: usize, mut above: u64, wanted: u64) -> Cut {
        let start = (bucket - self.window.start) * FINE;
        for (low, n) in self.fine[start..start + FINE].iter().enumerate().rev() {
            let n = n.load(Relaxed);
            if above + n >= wanted {
                let key = (bucket << 16 | low) as u32;
                return Cut { key, equals: wanted - above, kept: wanted };
            }
            above += n;
        }
        unreachable!("a bucket counts the keys that are counted in it one by one")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buckets(of: &[(usize, u32)]) -> Vec<u32> {
        let mut buckets = vec![0; COARSE];
        of.iter().for_each(|&(bucket, n)| buckets[bucket] = n);
        buckets
    }

    /// The upper half of the bits of a score.
    fn bucket(score: f32) -> usize {
        (score.to_bits() >> 16) as usize
    }

    #[test]
    fn a_curve_is_the_work_at_every_price_with_and_without_anchor_rows() {
        let level = Level::new();
        let (low, high) = (bucket(0.001), bucket(0.5));
        let sites = buckets(&[(low, 50), (high, 40)]);
        assert_eq!(level.add(10, &sites, None), Span::NEVER);
        // At a price that drops the lower bucket, 50 blocks are kept; anchor rows do with 20 and lose less than 30 x 0.5.
        let anchored = Anchored { loss: 1.0, blocks: 20.0 };
        let span = level.add(10, &sites, Some(anchored));
        let curve = level.curve();
        for place in 0..=GRID {
            let kept = 10 + if place <= low { 50 } else { 0 } + if place <= high { 40 } else { 0 };
            let loss = if place > low { 50.0 * middle(low) } else { 0.0 }
                + if place > high { 40.0 * middle(high) } else { 0.0 };
            let price = price_at(place);
            let wins = 1.0 + price * 20.0 < loss + price * f64::from(kept);
            assert_eq!(span.contains(place), wins, "{place}");
            let (sparse, at_rows) = if wins { (u64::from(kept as u32), 1) } else { (2 * u64::from(kept as u32), 0) };
            assert_eq!((curve.kept[place], curve.anchored[place]), (sparse, at_rows), "{place}");
        }
        assert!(span.contains(bucket(0.1)) && !span.contains(low) && !span.contains(GRID));
    }

    #[test]
    fn the_price_is_the_lowest_within_the_bound() {
        let level = Level::new();
        level.add(4, &buckets(&[(100, 6), (200, 10)]), None);
        let curve = level.curve();
        let at = |units| price(&[&curve], &Bound { units, block: 2, anchored: 0 });
        assert_eq!([40, 39, 28, 27, 8, 7].map(at), [0, 101, 101, 201, 201, GRID]);
    }

    #[test]
    fn a_cut_keeps_the_number_wanted() {
        let count = Count::new(7..9);
        let keys = [7 << 16 | 3, 7 << 16 | 3, 8 << 16, 8 << 16 | 9];
        count.add(&buckets(&[(3, 5), (7, 2), (8, 2)]), &keys);
        let cut = |wanted| count.cut(wanted).map(|cut| (cut.key, cut.equals, cut.kept));
        assert_eq!(cut(0), Ok((KEYS, 0, 0)));
        assert_eq!(cut(1), Ok((8 << 16 | 9, 1, 1)));
        assert_eq!(cut(3), Ok((7 << 16 | 3, 1, 3)));
        assert_eq!(cut(4), Ok((7 << 16 | 3, 2, 4)));
        assert_eq!(cut(5), Err(3));
        assert_eq!(cut(10), Ok((0, u64::MAX, 9)));
    }
}
