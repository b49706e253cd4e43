//! The token grid: how many tokens there are, where text sits, and which token stands at which position of the sequence.

use std::{fmt, ops::Range};

use thiserror::Error;

/// Tokens per block, for queries and for keys. The last block of a sequence may be ragged.
pub const BLOCK: u32 = 128;

/// Longest sequence a plan may describe, in tokens (32 768 blocks).
pub const MAX_TOKENS: u32 = 1 << 22;

/// Where the text tokens of a joint sequence stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TextPosition {
    /// There are none (text enters through cross-attention).
    None,
    /// Before the video tokens (CogVideoX).
    Before,
    /// After the video tokens (Mochi, HunyuanVideo).
    After,
}

impl fmt::Display for TextPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Before => "before",
            Self::After => "after",
        })
    }
}

/// Order of the video tokens in the sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// Frame by frame, row by row.
    Raster,
    /// Sorted by tile of `[frames, height, width]`, raster inside a tile; edge tiles are smaller, nothing is padded.
    Tile([u32; 3]),
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Raster => f.write_str("raster"),
            Self::Tile([t, h, w]) => write!(f, "{t}x{h}x{w}"),
        }
    }
}

/// What is wrong with a [`Geometry`].
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum GeometryError {
    /// A dimension is zero.
    #[error("{what} is 0; every dimension of the token grid must be at least 1")]
    Zero {
        /// The dimension.
        what: &'static str,
    },
    /// The sequence is longer than [`MAX_TOKENS`], or its length overflows.
    #[error("{frames}x{height}x{width} video tokens + {text} text tokens exceed the largest sequence ({MAX_TOKENS})")]
    TooManyTokens {
        /// Latent frames.
        frames: u32,
        /// Latent rows.
        height: u32,
        /// Latent columns.
        width: u32,
        /// Text tokens.
        text: u32,
    },
    /// The key sequence is longer than [`MAX_TOKENS`].
    #[error("{0} key tokens exceed the largest sequence ({MAX_TOKENS})")]
    TooManyKeys(u32),
    /// `text_tokens` and `text_position` contradict each other.
    #[error("text_tokens is {tokens} but text_position is `{position}`; give both or neither")]
    Text {
        /// Text tokens.
        tokens: u32,
        /// Their position.
        position: TextPosition,
    },
    /// Text tokens together with a separate key sequence.
    #[error("a separate key sequence (kv_tokens) cannot carry text tokens; leave one of the two out")]
    TextWithKeys,
}

/// The token grid of one attention problem, after patchify.
///
/// Query tokens = `frames * height * width + text_tokens`. Keys are the same tokens unless `kv_tokens` says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Geometry {
    /// Latent frames.
    pub frames: u32,
    /// Latent rows of a frame.
    pub height: u32,
    /// Latent columns of a frame.
    pub width: u32,
    /// Text tokens in the joint sequence.
    pub text_tokens: u32,
    /// Where they stand.
    pub text_position: TextPosition,
    /// Order of the video tokens.
    pub layout: Layout,
    /// Length of a separate key sequence; `None` in self-attention.
    pub kv_tokens: Option<u32>,
}

impl Geometry {
    /// A raster grid without text.
    pub fn video(frames: u32, height: u32, width: u32) -> Self {
        Self {
            frames,
            height,
            width,
            text_tokens: 0,
            text_position: TextPosition::None,
            layout: Layout::Raster,
            kv_tokens: None,
        }
    }

    /// A plain sequence of `q_tokens` queries over `kv_tokens` keys, for masks that know no grid.
    pub fn sequence(q_tokens: u32, kv_tokens: u32) -> Self {
        let kv_tokens = (kv_tokens != q_tokens).then_some(kv_tokens);
        Self { kv_tokens, ..Self::video(1, 1, q_tokens) }
    }

    /// Checks every dimension; all other methods rely on it.
    pub fn validate(&self) -> Result<(), GeometryError> {
        let dims = [("frames", self.frames), ("height", self.height), ("width", self.width)];
        if let Some((what, _)) = dims.into_iter().find(|&(_, n)| n == 0) {
            return Err(GeometryError::Zero { what });
        }
        if let Layout::Tile(tile) = self.layout
            && tile.contains(&0)
        {
            return Err(GeometryError::Zero { what: "layout tile" });
        }
        // u128: three u32 factors cannot overflow it.
        let video = u128::from(self.frames) * u128::from(self.height) * u128::from(self.width);
        if video + u128::from(self.text_tokens) > u128::from(MAX_TOKENS) {
            let Self { frames, height, width, text_tokens: text, .. } = *self;
            return Err(GeometryError::TooManyTokens { frames, height, width, text });
        }
        if (self.text_tokens == 0) != (self.text_position == TextPosition::None) {
            return Err(GeometryError::Text { tokens: self.text_tokens, position: self.text_position });
        }
        match self.kv_tokens {
            Some(0) => Err(GeometryError::Zero { what: "kv_tokens" }),
            Some(n) if n > MAX_TOKENS => Err(GeometryError::TooManyKeys(n)),
            Some(_) if self.text_tokens > 0 => Err(GeometryError::TextWithKeys),
            _ => Ok(()),
        }
    }

    /// Video tokens: `frames * height * width`.
    pub fn video_tokens(&self) -> u32 {
        self.frames * self.height * self.width
    }

    /// Query tokens, text included.
    pub fn q_tokens(&self) -> u32 {
        self.video_tokens() + self.text_tokens
    }

    /// Key tokens, text included.
    pub fn kv_tokens(&self) -> u32 {
        self.kv_tokens.unwrap_or_else(|| self.q_tokens())
    }

    /// Query blocks, the ragged one included.
    pub fn num_q_blocks(&self) -> u32 {
        self.q_tokens().div_ceil(BLOCK)
    }

    /// Key blocks, the ragged one included.
    pub fn num_kv_blocks(&self) -> u32 {
        self.kv_tokens().div_ceil(BLOCK)
    }

    /// Whether kernels must serve sequences that end inside a block: a length is no multiple of [`BLOCK`], or text at the end
    /// lets the caller pass fewer tokens than the plan has.
    pub fn ragged(&self) -> bool {
        !self.q_tokens().is_multiple_of(BLOCK)
            || !self.kv_tokens().is_multiple_of(BLOCK)
            || self.text_position == TextPosition::After
    }

    /// Positions of the text tokens in the sequence (empty without text).
    pub fn text_range(&self) -> Range<u32> {
        match self.text_position {
            TextPosition::None => 0..0,
            TextPosition::Before => 0..self.text_tokens,
            TextPosition::After => self.video_tokens()..self.q_tokens(),
        }
    }

    /// Blocks that hold any text token: always dense, as rows and as columns.
    pub fn text_blocks(&self) -> Range<u32> {
        let text = self.text_range();
        if text.is_empty() { 0..0 } else { text.start / BLOCK..text.end.div_ceil(BLOCK) }
    }

    /// Position in the sequence of the first video token.
    pub fn video_start(&self) -> u32 {
        if self.text_position == TextPosition::Before { self.text_tokens } else { 0 }
    }

    /// Position in the sequence of the video token at `(frame, y, x)` of the latent grid.
    pub fn position(&self, frame: u32, y: u32, x: u32) -> u32 {
        let (f, h, w) = (self.frames, self.height, self.width);
        let within = match self.layout {
            Layout::Raster => (frame * h + y) * w + x,
            Layout::Tile([tf, th, tw]) => {
                // Full slabs before this one, then full bars of the slab, then full tiles of the bar, then inside.
                let (f0, y0, x0) = (frame / tf * tf, y / th * th, x / tw * tw);
                let (df, dy, dx) = (tf.min(f - f0), th.min(h - y0), tw.min(w - x0));
                f0 * h * w + df * (y0 * w + dy * x0) + ((frame - f0) * dy + (y - y0)) * dx + (x - x0)
            }
        };
        self.video_start() + within
    }
}

impl fmt::Display for Geometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{}", self.frames, self.height, self.width)?;
        match self.text_position {
            TextPosition::None => {}
            position => write!(f, " + {} text {position}", self.text_tokens)?,
        }
        if let Layout::Tile(_) = self.layout {
            write!(f, ", tiles {}", self.layout)?;
        }
        write!(f, " = {} tokens", self.q_tokens())?;
        match self.kv_tokens {
            Some(kv) => write!(f, " over {kv} keys"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tile_order_visits_every_position_once_and_tiles_in_sequence() {
        let g = Geometry { layout: Layout::Tile([2, 3, 4]), ..Geometry::video(3, 7, 9) };
        let mut tokens: Vec<_> =
            (0..3).flat_map(|f| (0..7).flat_map(move |y| (0..9).map(move |x| (f, y, x)))).collect();
        tokens.sort_by_key(|&(f, y, x)| (f / 2, y / 3, x / 4, f, y, x));
        for (want, (f, y, x)) in (0..).zip(tokens) {
            assert_eq!(g.position(f, y, x), want, "({f},{y},{x})");
        }
    }

    #[test]
    fn text_blocks_cover_the_shared_block() {
        let g = Geometry { text_tokens: 20, text_position: TextPosition::After, ..Geometry::video(1, 10, 20) };
        assert_eq!((g.q_tokens(), g.text_range(), g.text_blocks()), (220, 200..220, 1..2));
        let g = Geometry { text_tokens: 130, text_position: TextPosition::Before, ..Geometry::video(1, 10, 20) };
        assert_eq!((g.text_blocks(), g.position(0, 0, 0)), (0..2, 130));
    }

    #[test]
    fn impossible_grids_are_refused() {
        let huge = Geometry::video(u32::MAX, u32::MAX, u32::MAX);
        assert!(matches!(huge.validate(), Err(GeometryError::TooManyTokens { .. })));
        assert_eq!(Geometry::video(1, 0, 1).validate(), Err(GeometryError::Zero { what: "height" }));
        let text = Geometry { text_tokens: 5, ..Geometry::video(1, 1, 1) };
        assert!(matches!(text.validate(), Err(GeometryError::Text { .. })));
    }
}
