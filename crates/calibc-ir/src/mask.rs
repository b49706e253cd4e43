//! Block masks as bit rows, and the table that interns them.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;

use crate::ids::MaskId;

/// A boolean matrix over blocks, `[q_blocks, kv_blocks]`.
///
/// Stored the way the GPU reads it: each row is `words_per_row` little-endian `u32` words, column `c` is bit `c % 32` of
/// word `c / 32`, and the bits past the last column are 0.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockMask {
    rows: u32,
    cols: u32,
    words: Vec<u32>,
}

impl BlockMask {
    /// Words of one row of `cols` columns.
    pub fn words_for(cols: u32) -> usize {
        cols.div_ceil(32) as usize
    }

    /// A mask that keeps nothing.
    pub fn empty(rows: u32, cols: u32) -> Self {
        Self { rows, cols, words: vec![0; rows as usize * Self::words_for(cols)] }
    }

    /// A mask that keeps everything.
    pub fn full(rows: u32, cols: u32) -> Self {
        let mut mask = Self::empty(rows, cols);
        (0..rows).for_each(|r| mask.fill_row(r));
        mask
    }

    /// The mask that keeps `(row, col)` where `keep` says so.
    pub fn from_fn(rows: u32, cols: u32, mut keep: impl FnMut(u32, u32) -> bool) -> Self {
        let mut mask = Self::empty(rows, cols);
        for r in 0..rows {
            for c in 0..cols {
                if keep(r, c) {
                    mask.set(r, c);
                }
            }
        }
        mask
    }

    /// The mask over raw words; `None` if their number is not the shape's or a bit past the last column is set.
    pub fn from_words(rows: u32, cols: u32, words: Vec<u32>) -> Option<Self> {
        let per_row = Self::words_for(cols);
        let spare = (per_row * 32) as u32 - cols;
        let tail = if spare == 0 { 0 } else { u32::MAX << (32 - spare) };
        let clean = || words.chunks_exact(per_row).all(|row| row[per_row - 1] & tail == 0);
        (rows > 0 && cols > 0 && words.len() == rows as usize * per_row && clean()).then_some(Self {
            rows,
            cols,
            words,
        })
    }

    /// Query blocks.
    pub fn rows(&self) -> u32 {
        self.rows
    }

    /// Key blocks.
    pub fn cols(&self) -> u32 {
        self.cols
    }

    /// Words of one row.
    pub fn words_per_row(&self) -> usize {
        Self::words_for(self.cols)
    }

    /// All words, row by row.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// The words of row `r`.
    pub fn row(&self, r: u32) -> &[u32] {
        &self.words[self.row_span(r)]
    }

    fn row_span(&self, r: u32) -> Range<usize> {
        let per_row = self.words_per_row();
        r as usize * per_row..(r as usize + 1) * per_row
    }

    /// Whether block `(r, c)` is kept.
    pub fn get(&self, r: u32, c: u32) -> bool {
        debug_assert!(c < self.cols);
        self.row(r)[(c / 32) as usize] >> (c % 32) & 1 == 1
    }

    /// Keeps block `(r, c)`.
    pub fn set(&mut self, r: u32, c: u32) {
        debug_assert!(c < self.cols);
        let at = self.row_span(r).start + (c / 32) as usize;
        self.words[at] |= 1 << (c % 32);
    }

    /// Keeps every block of row `r`.
    pub fn fill_row(&mut self, r: u32) {
        for c in 0..self.cols {
            self.set(r, c);
        }
    }

    /// Keeps every block of column `c`.
    pub fn fill_col(&mut self, c: u32) {
        for r in 0..self.rows {
            self.set(r, c);
        }
    }

    /// Kept columns of row `r`, ascending.
    pub fn kept(&self, r: u32) -> impl Iterator<Item = u32> + '_ {
        self.row(r).iter().enumerate().flat_map(|(w, &word)| {
            std::iter::successors((word != 0).then_some(word), |&rest| {
                let rest = rest & (rest - 1);
                (rest != 0).then_some(rest)
            })
            .map(move |rest| w as u32 * 32 + rest.trailing_zeros())
        })
    }

    /// Kept blocks of row `r`.
    pub fn row_count(&self, r: u32) -> u32 {
        self.row(r).iter().map(|w| w.count_ones()).sum()
    }

    /// Kept blocks.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Kept blocks / all blocks.
    pub fn density(&self) -> f64 {
        self.count() as f64 / (f64::from(self.rows) * f64::from(self.cols))
    }

    /// Whether every block is kept.
    pub fn is_full(&self) -> bool {
        self.count() == u64::from(self.rows) * u64::from(self.cols)
    }

    /// Keeps what `other`, of the same shape, keeps too.
    pub fn union_with(&mut self, other: &Self) {
        assert_eq!((self.rows, self.cols), (other.rows, other.cols), "masks of one shape");
        self.words.iter_mut().zip(&other.words).for_each(|(a, b)| *a |= b);
    }
}

/// Masks by content: equal masks get equal ids, in order of first use.
#[derive(Clone, Debug, Default)]
pub struct MaskTable {
    masks: Vec<BlockMask>,
    // Hash -> ids with that hash: the masks themselves are held once. Looked up, never iterated.
    by_hash: HashMap<u64, Vec<MaskId>>,
    hasher: RandomState,
}

impl MaskTable {
    /// The id of `mask`, new if it was not seen before.
    pub fn intern(&mut self, mask: BlockMask) -> MaskId {
        let ids = self.by_hash.entry(self.hasher.hash_one(&mask)).or_default();
        if let Some(&id) = ids.iter().find(|id| self.masks[id.index()] == mask) {
            return id;
        }
        let id = MaskId(u32::try_from(self.masks.len()).expect("sites are counted in u32"));
        ids.push(id);
        self.masks.push(mask);
        id
    }

    /// The mask behind `id`, if the table holds it.
    pub fn get(&self, id: MaskId) -> Option<&BlockMask> {
        self.masks.get(id.index())
    }

    /// Number of distinct masks.
    pub fn len(&self) -> usize {
        self.masks.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.masks.is_empty()
    }

    /// The masks in id order, for a pass that rebuilds the table without holding each mask twice.
    pub fn into_masks(self) -> Vec<BlockMask> {
        self.masks
    }

    /// Ids and masks in id order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (MaskId, &BlockMask)> {
        self.masks.iter().enumerate().map(|(i, m)| (MaskId(i as u32), m))
    }
}

impl std::ops::Index<MaskId> for MaskTable {
    type Output = BlockMask;

    fn index(&self, id: MaskId) -> &BlockMask {
        &self.masks[id.index()]
    }
}

impl PartialEq for MaskTable {
    fn eq(&self, other: &Self) -> bool {
        self.masks == other.masks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_and_counts_agree_across_word_boundaries() {
        let mask = BlockMask::from_fn(3, 70, |r, c| (r + c) % 3 == 0);
        for r in 0..3 {
            let kept: Vec<_> = (0..70).filter(|c| (r + c) % 3 == 0).collect();
            assert_eq!(mask.kept(r).collect::<Vec<_>>(), kept);
            assert_eq!(mask.row_count(r) as usize, kept.len());
        }
        assert!(BlockMask::full(3, 70).is_full() && !mask.is_full());
        assert_eq!(BlockMask::from_words(3, 70, mask.words().to_vec()), Some(mask.clone()));
        let mut dirty = mask.words().to_vec();
        dirty[2] |= 1 << 31;
        assert_eq!(BlockMask::from_words(3, 70, dirty), None);
    }

    #[test]
    fn interning_is_by_content_in_order_of_first_use() {
        let mut table = MaskTable::default();
        let (a, b) = (BlockMask::full(2, 2), BlockMask::from_fn(2, 2, |r, c| r == c));
        let ids = [a.clone(), b.clone(), a.clone()].map(|m| table.intern(m));
        assert_eq!(ids, [MaskId(0), MaskId(1), MaskId(0)]);
        assert_eq!(table.iter().map(|(_, m)| m.clone()).collect::<Vec<_>>(), [a, b]);
    }
}
