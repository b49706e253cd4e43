//! Anchor rows (CalibAtt, spatial repetition): which queries a repetitive head computes, and where their outputs are copied.

use crate::geometry::Geometry;

/// The anchor rows of a frame of `height` rows: `a_i = floor((i + 0.5) * height / anchors)`.
pub fn anchor_rows(height: u32, anchors: u32) -> Vec<u32> {
    let row = |i: u32| (u64::from(2 * i + 1) * u64::from(height) / u64::from(2 * anchors)) as u32;
    (0..anchors).map(row).collect()
}

/// Index of the anchor nearest to `row`; ties go to the lower anchor.
pub fn nearest_anchor(anchor_rows: &[u32], row: u32) -> usize {
    // min_by_key keeps the first of equals, and anchors ascend.
    (0..anchor_rows.len()).min_by_key(|&i| anchor_rows[i].abs_diff(row)).unwrap_or(0)
}

/// Gather and scatter lists of a repetitive head, in positions of the sequence.
///
/// The computed queries are the tokens of the anchor rows and every token of a text block (those blocks stay dense). Each
/// output goes to its own position and, for an anchor row, to the rows nearest to it that are not computed themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnchorTable {
    /// Anchor rows per frame.
    pub anchors: u16,
    /// Position of each computed query, ascending.
    pub queries: Vec<u32>,
    /// `copies[copy_ptr[i]..copy_ptr[i + 1]]` are the positions written from computed query `i`, its own included.
    pub copy_ptr: Vec<u32>,
    /// Positions written, each position of the sequence exactly once.
    pub copies: Vec<u32>,
}

impl AnchorTable {
    /// The table of a valid geometry. `anchors` must be in `1..=height`.
    pub fn new(geometry: &Geometry, anchors: u16) -> Self {
        let rows = anchor_rows(geometry.height, u32::from(anchors));
        let text = geometry.text_blocks();
        let in_text_block = |position: u32| text.contains(&(position / crate::BLOCK));
        // source[p]: the position whose output p receives.
        let mut source: Vec<u32> = (0..geometry.q_tokens()).collect();
        for frame in 0..geometry.frames {
            for y in 0..geometry.height {
                let anchor = rows[nearest_anchor(&rows, y)];
                for x in 0..geometry.width {
                    let to = geometry.position(frame, y, x);
                    if !in_text_block(to) {
                        source[to as usize] = geometry.position(frame, anchor, x);
                    }
                }
            }
        }
        let mut pairs: Vec<(u32, u32)> = (0u32..).zip(&source).map(|(to, &from)| (from, to)).collect();
        pairs.sort_unstable();
        let (mut queries, mut copy_ptr) = (Vec::new(), Vec::new());
        for (i, &(from, _)) in pairs.iter().enumerate() {
            if queries.last() != Some(&from) {
                queries.push(from);
                copy_ptr.push(i as u32);
            }
        }
        copy_ptr.push(pairs.len() as u32);
        Self { anchors, queries, copy_ptr, copies: pairs.into_iter().map(|(_, to)| to).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::{Layout, TextPosition};

    #[test]
    fn anchors_of_the_paper() {
        assert_eq!(anchor_rows(30, 5), [3, 9, 15, 21, 27]);
        assert_eq!(anchor_rows(32, 5), [3, 9, 16, 22, 28]);
        // Row 6 is as far from 3 as from 9: the lower one.
        assert_eq!(nearest_anchor(&[3, 9, 15], 6), 0);
        assert_eq!(nearest_anchor(&[3, 9, 15], 7), 1);
    }

    #[test]
    fn every_position_is_written_once_from_its_nearest_anchor() {
        for layout in [Layout::Raster, Layout::Tile([2, 4, 4])] {
            for (text_tokens, text_position) in
                [(0, TextPosition::None), (40, TextPosition::Before), (40, TextPosition::After)]
            {
                let g = Geometry { text_tokens, text_position, layout, ..Geometry::video(3, 10, 17) };
                let table = AnchorTable::new(&g, 3);
                let mut source = vec![u32::MAX; g.q_tokens() as usize];
                for (i, &from) in table.queries.iter().enumerate() {
                    for &to in &table.copies[table.copy_ptr[i] as usize..table.copy_ptr[i + 1] as usize] {
                        assert_eq!(std::mem::replace(&mut source[to as usize], from), u32::MAX);
                    }
                    assert_eq!(source[from as usize], from, "a computed query keeps its own output");
                }
                let rows = anchor_rows(10, 3);
                for (f, y, x) in (0..3).flat_map(|f| (0..10).flat_map(move |y| (0..17).map(move |x| (f, y, x)))) {
                    let to = g.position(f, y, x);
                    let anchor = g.position(f, rows[nearest_anchor(&rows, y)], x);
                    let want = if g.text_blocks().contains(&(to / crate::BLOCK)) { to } else { anchor };
                    assert_eq!(source[to as usize], want);
                }
                assert!(g.text_range().all(|p| source[p as usize] == p));
            }
        }
    }
}
