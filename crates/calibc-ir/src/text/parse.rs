//! The parser of the text form.

use std::iter::Peekable;
use std::str::{CharIndices, FromStr};

use thiserror::Error;

use crate::geometry::{BLOCK, Geometry, Layout, MAX_TOKENS, TextPosition};
use crate::ids::{HeadId, MaskId, Site};
use crate::mask::{BlockMask, MaskTable};
use crate::plan::{AttnOp, Model, Plan, Schedule, WorkItem};
use crate::variant::Variant;

/// Why a text is not a plan, and where.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("line {line}: {problem}")]
pub struct ParseError {
    /// Line of the text, from 1.
    pub line: usize,
    /// What is wrong there.
    pub problem: Problem,
}

/// What is wrong with a line.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Problem {
    /// Something else should stand here.
    #[error("expected {expected}, found {found}")]
    Expected {
        /// What should.
        expected: &'static str,
        /// What does.
        found: String,
    },
    /// A string that no quote ends.
    #[error("the quoted name does not end on its line")]
    OpenQuote,
    /// The same thing twice.
    #[error("`{0}` is given twice")]
    Twice(String),
    /// Something that must be there is not.
    #[error("`{0}` is missing")]
    Missing(String),
    /// An index that is out of range.
    #[error("`{what}` is out of range; the limit is {limit}")]
    OutOfRange {
        /// The text.
        what: String,
        /// First value that is too large.
        limit: u32,
    },
    /// A mask equal to an earlier one.
    #[error("{mask} equals {earlier}; equal masks have one id")]
    EqualMasks {
        /// The mask.
        mask: MaskId,
        /// The earlier one.
        earlier: MaskId,
    },
    /// Blocks of another size than kernels are made for.
    #[error("blocks of {0} tokens; only {BLOCK} is supported")]
    Block(u32),
}

/// Reads the text form. The result describes one plan, but may be one the verifier refuses.
pub fn parse(text: &str) -> Result<Plan, ParseError> {
    Parser { lexer: Lexer { text, chars: text.char_indices().peekable(), line: 1, depth: 0 }, peeked: None, line: 1 }
        .plan()
}

/// Most work items of a plan in text: far more than anyone reads, and their offsets fit `u32`.
const MAX_ITEMS: u32 = 1 << 28;

#[derive(Clone, Debug, PartialEq)]
enum Token<'a> {
    Word(&'a str),
    Quoted(String),
    Punct(char),
    Newline,
    End,
}

impl Token<'_> {
    fn describe(&self) -> String {
        match self {
            Self::Word(word) => format!("`{word}`"),
            Self::Quoted(name) => format!("{name:?}"),
            Self::Punct(c) => format!("`{c}`"),
            Self::Newline => "the end of the line".into(),
            Self::End => "the end of the text".into(),
        }
    }
}

struct Lexer<'a> {
    text: &'a str,
    chars: Peekable<CharIndices<'a>>,
    line: usize,
    // Braces open: inside them lines do not end statements and `;` separates.
    depth: u32,
}

impl<'a> Lexer<'a> {
    fn next(&mut self) -> Result<Token<'a>, Problem> {
        while let Some((at, c)) = self.chars.next() {
            match c {
                '\n' => {
                    self.line += 1;
                    if self.depth == 0 {
                        return Ok(Token::Newline);
                    }
                }
                ';' if self.depth == 0 => while self.chars.next_if(|&(_, c)| c != '\n').is_some() {},
                '{' | '}' | ';' | ':' | '=' | ',' => {
                    self.depth = match c {
                        '{' => self.depth + 1,
                        '}' => self.depth.saturating_sub(1),
                        _ => self.depth,
                    };
                    return Ok(Token::Punct(c));
                }
                '"' => return self.quoted(),
                c if c.is_whitespace() => {}
                _ => {
                    let in_word = |c: char| !c.is_whitespace() && !"{};:=,\"".contains(c);
                    let mut end = at + c.len_utf8();
                    while let Some((at, c)) = self.chars.next_if(|&(_, c)| in_word(c)) {
                        end = at + c.len_utf8();
                    }
                    return Ok(Token::Word(&self.text[at..end]));
                }
            }
        }
        Ok(Token::End)
    }

    /// The rest of a string in the escapes of `{:?}`.
    fn quoted(&mut self) -> Result<Token<'a>, Problem> {
        let mut name = String::new();
        loop {
            match self.chars.next_if(|&(_, c)| c != '\n').ok_or(Problem::OpenQuote)?.1 {
                '"' => return Ok(Token::Quoted(name)),
                '\\' => name.push(self.escape().ok_or(Problem::Expected {
                    expected: "an escape: n, r, t, 0, \\, \", ' or u{..}",
                    found: "another character after `\\`".into(),
                })?),
                c => name.push(c),
            }
        }
    }

    fn escape(&mut self) -> Option<char> {
        Some(match self.chars.next()?.1 {
            'n' => '\n',
            'r' => '\r',
            't' => '\t',
            '0' => '\0',
            c @ ('\\' | '"' | '\'') => c,
            'u' => {
                self.chars.next_if(|&(_, c)| c == '{')?;
                let mut code = 0_u32;
                while let Some((_, c)) = self.chars.next_if(|&(_, c)| c != '}') {
                    code = code.checked_mul(16)?.checked_add(c.to_digit(16)?)?;
                }
                self.chars.next()?;
                char::from_u32(code)?
            }
            _ => return None,
        })
    }
}

struct Parser<'a> {
    lexer: Lexer<'a>,
    peeked: Option<Token<'a>>,
    // Line of the token last taken or peeked at.
    line: usize,
}

type Parsed<T> = Result<T, ParseError>;

impl<'a> Parser<'a> {
    fn plan(mut self) -> Parsed<Plan> {
        let (mut model, mut grid, mut sigmas, mut variants) = (None, None, None, None);
        let mut masks = MaskTable::default();
        let mut ops: Vec<(Site, AttnOp, usize)> = Vec::new();
        let mut lists: Vec<Vec<WorkItem>> = Vec::new();
        let mut list_of: Vec<(Site, u32, usize)> = Vec::new();
        let (mut scheduled, mut items) = (false, 0);
        loop {
            let token = self.next()?;
            let at = self.line;
            match token {
                Token::End => break,
                Token::Newline => continue,
                Token::Word(word) => match word {
                    "plan" => self.once(&mut model, word, Self::model)?,
                    "grid" => self.once(&mut grid, word, Self::grid)?,
                    "sigmas" => self.once(&mut sigmas, word, |p| p.words("a number", |w| w.parse::<f64>().ok()))?,
                    "variants" => self.once(&mut variants, word, |p| p.words("a kernel's symbol", variant))?,
                    "schedule" => scheduled = true,
                    _ if word.starts_with('m') => self.mask(word, &mut masks)?,
                    _ if word.starts_with('w') => {
                        let list = self.list(word, lists.len())?;
                        items += list.len();
                        if items > MAX_ITEMS as usize {
                            return Err(self.error(Problem::OutOfRange { what: "work items".into(), limit: MAX_ITEMS }));
                        }
                        lists.push(list);
                    }
                    _ => {
                        let (step, layer, head) = site(word).ok_or_else(|| {
                            self.expected(
                                "plan, grid, sigmas, variants, schedule, or an id such as m0, w0, s0.l0.h0",
                                word,
                            )
                        })?;
                        self.punct(':', "`:`")?;
                        let site = Site::new(step, layer, head.unwrap_or(0));
                        match head {
                            Some(_) => ops.push((site, self.op()?, at)),
                            None => list_of.push((site, self.id('w', "a work list such as w0")?, at)),
                        }
                    }
                },
                other => return Err(self.wrong("a statement", &other)),
            }
            match self.next()? {
                Token::Newline => {}
                Token::End => break,
                other => return Err(self.wrong("the end of the line", &other)),
            }
        }
        let missing = |name: &str| self.error(Problem::Missing(name.into()));
        let model: Model = model.ok_or_else(|| missing("plan"))?;
        let geometry = grid.ok_or_else(|| missing("grid"))?;
        let sigmas: Vec<f64> = sigmas.ok_or_else(|| missing("sigmas"))?;
        let steps = sigmas.len() as u32;
        let ops = self.in_order(ops, [steps, model.layers, model.heads], Site::to_string)?;
        if !(scheduled || lists.is_empty() && list_of.is_empty()) {
            return Err(missing("schedule"));
        }
        let schedule = if scheduled {
            let pair = |site: &Site| format!("{}.{}", site.step, site.layer);
            let list_of = self.in_order(list_of, [steps, model.layers, 1], pair)?;
            let ends = lists.iter().scan(0, |end, list| {
                *end += list.len() as u32;
                Some(*end)
            });
            Some(Schedule { list_of, list_ptr: std::iter::once(0).chain(ends).collect(), items: lists.concat() })
        } else {
            None
        };
        Ok(Plan { model, geometry, sigmas, masks, ops, variants: variants.unwrap_or_default(), schedule })
    }

    /// The values of `[steps, layers, heads]` sites in site order: each exactly once.
    fn in_order<T>(
        &self,
        mut values: Vec<(Site, T, usize)>,
        [steps, layers, heads]: [u32; 3],
        name: impl Fn(&Site) -> String,
    ) -> Parsed<Vec<T>> {
        values.sort_by_key(|v| v.0);
        let mut all =
            (0..steps).flat_map(|s| (0..layers).flat_map(move |l| (0..heads).map(move |h| Site::new(s, l, h))));
        let mut previous = None;
        let mut ordered = Vec::with_capacity(values.len());
        for (site, value, line) in values {
            let outside = [(site.step.0, steps), (site.layer.0, layers), (site.head.0, heads)];
            let problem = if let Some((_, limit)) = outside.into_iter().find(|(n, limit)| n >= limit) {
                Problem::OutOfRange { what: name(&site), limit }
            } else if previous == Some(site) {
                Problem::Twice(name(&site))
            } else {
                match all.next() {
                    Some(next) if next != site => return Err(self.error(Problem::Missing(name(&next)))),
                    _ => {
                        previous = Some(site);
                        ordered.push(value);
                        continue;
                    }
                }
            };
            return Err(ParseError { line, problem });
        }
        match all.next() {
            Some(next) => Err(self.error(Problem::Missing(name(&next)))),
            None => Ok(ordered),
        }
    }

    fn model(&mut self) -> Parsed<Model> {
        let name = match self.next()? {
            Token::Word(word) => word.to_owned(),
            Token::Quoted(name) => name,
            other => return Err(self.wrong("the model's name", &other)),
        };
        let [mut layers, mut heads, mut head_dim] = [None; 3];
        self.fields(|p, key| {
            let slot = match key {
                "q_block" | "kv_block" => {
                    let block = p.number("a block size")?;
                    return if block == BLOCK { Ok(()) } else { Err(p.error(Problem::Block(block))) };
                }
                "head_dim" => &mut head_dim,
                "layers" => &mut layers,
                "heads" => &mut heads,
                _ => return Err(p.expected("q_block, kv_block, head_dim, layers or heads", key)),
            };
            let value = p.number("a number")?;
            match slot.replace(value) {
                Some(_) => Err(p.error(Problem::Twice(key.into()))),
                None => Ok(()),
            }
        })?;
        let missing = |name: &str| self.error(Problem::Missing(name.into()));
        Ok(Model {
            name,
            layers: layers.ok_or_else(|| missing("layers"))?,
            heads: heads.ok_or_else(|| missing("heads"))?,
            head_dim: head_dim.ok_or_else(|| missing("head_dim"))?,
        })
    }

    fn grid(&mut self) -> Parsed<Geometry> {
        const SHAPE: &str = "a grid such as 21x45x80";
        let [frames, height, width] = self.word(SHAPE, dims)?;
        let mut g = Geometry::video(frames, height, width);
        self.fields(|p, key| {
            match key {
                "text_tokens" => g.text_tokens = p.number("a number of tokens")?,
                "text_position" => {
                    let all = [TextPosition::None, TextPosition::Before, TextPosition::After];
                    let parse = |w: &str| all.into_iter().find(|position| position.to_string() == w);
                    g.text_position = p.word("none, before or after", parse)?;
                }
                "layout" => {
                    let parse = |w: &str| if w == "raster" { Some(Layout::Raster) } else { dims(w).map(Layout::Tile) };
                    g.layout = p.word("raster or a tile such as 2x8x8", parse)?;
                }
                "kv_tokens" => g.kv_tokens = Some(p.number("a number of tokens")?),
                _ => return Err(p.expected("text_tokens, text_position, layout or kv_tokens", key)),
            }
            Ok(())
        })?;
        Ok(g)
    }

    fn mask(&mut self, name: &str, masks: &mut MaskTable) -> Parsed<()> {
        let next = MaskId(masks.len() as u32);
        if name != next.to_string() {
            return Err(self.error(Problem::Expected { expected: "mask ids in order", found: format!("`{name}`") }));
        }
        self.punct('=', "`=`")?;
        let [rows, cols] = self.word("a shape such as 4x4", dims)?;
        let limit = MAX_TOKENS / BLOCK + 1;
        if rows == 0 || cols == 0 || rows >= limit || cols >= limit {
            return Err(self.error(Problem::OutOfRange { what: format!("{rows}x{cols}"), limit }));
        }
        self.punct('{', "`{`")?;
        let mut words = Vec::new();
        let mut row = 0;
        while row < rows {
            let (first, last) = self.word("a row such as q0 or q0-3", |w| range(w.strip_prefix('q')?))?;
            if first != row || last < first {
                let expected = "rows in order, each once";
                return Err(self.error(Problem::Expected { expected, found: format!("q{first}") }));
            }
            if last >= rows {
                return Err(self.error(Problem::OutOfRange { what: format!("q{last}"), limit: rows }));
            }
            self.punct(':', "`:`")?;
            let kept = self.columns(cols)?;
            (first..=last).for_each(|_| words.extend_from_slice(kept.words()));
            row = last + 1;
            self.separator(row < rows)?;
        }
        self.punct('}', "`}`")?;
        let mask = BlockMask::from_words(rows, cols, words).expect("whole rows of columns in range");
        let id = masks.intern(mask);
        if id != next {
            return Err(self.error(Problem::EqualMasks { mask: next, earlier: id }));
        }
        Ok(())
    }

    /// `none`, or the kept columns `0-3,7`, as a mask of one row.
    fn columns(&mut self, cols: u32) -> Parsed<BlockMask> {
        let mut kept = BlockMask::empty(1, cols);
        if self.peek()? == &Token::Word("none") {
            self.next()?;
            return Ok(kept);
        }
        loop {
            let (first, last) = self.word("kept columns such as 0-3,7", range)?;
            if last >= cols {
                return Err(self.error(Problem::OutOfRange { what: format!("{first}-{last}"), limit: cols }));
            }
            (first..=last).for_each(|c| kept.set(0, c));
            if self.peek()? != &Token::Punct(',') {
                return Ok(kept);
            }
            self.next()?;
        }
    }

    fn list(&mut self, name: &str, index: usize) -> Parsed<Vec<WorkItem>> {
        if name != format!("w{index}") {
            return Err(self.error(Problem::Expected { expected: "work lists in order", found: format!("`{name}`") }));
        }
        self.punct('=', "`=`")?;
        self.punct('{', "`{`")?;
        const LIMIT: u32 = 1 << 16;
        let mut items = Vec::new();
        while self.peek()? != &Token::Punct('}') {
            let head = HeadId(self.id('h', "a head such as h0")?);
            self.punct(':', "`:`")?;
            while let Token::Word(_) = self.peek()? {
                let (first, last) = self.word("tiles such as 3 or 0-7", range)?;
                if head.0 >= LIMIT || first.max(last) >= LIMIT {
                    return Err(
                        self.error(Problem::OutOfRange { what: format!("{head}: {first}-{last}"), limit: LIMIT })
                    );
                }
                let item = |tile| WorkItem::new(head, tile);
                if first <= last {
                    items.extend((first..=last).map(item));
                } else {
                    items.extend((last..=first).rev().map(item));
                }
            }
            let more = self.peek()? != &Token::Punct('}');
            self.separator(more)?;
        }
        self.next()?;
        Ok(items)
    }

    /// The `;` between two entries, optional after the last.
    fn separator(&mut self, more: bool) -> Parsed<()> {
        if more {
            return self.punct(';', "`;`");
        }
        if self.peek()? == &Token::Punct(';') {
            self.next()?;
        }
        Ok(())
    }

    fn op(&mut self) -> Parsed<AttnOp> {
        const OPS: &str = "dense, block_sparse or anchor_rows";
        match self.next()? {
            Token::Word("dense") => Ok(AttnOp::Dense),
            Token::Word("block_sparse") => Ok(AttnOp::BlockSparse { mask: MaskId(self.id('m', "a mask such as m0")?) }),
            Token::Word("anchor_rows") => Ok(AttnOp::AnchorRows { anchors: self.number("a number of anchor rows")? }),
            other => Err(self.wrong(OPS, &other)),
        }
    }

    fn once<T>(&mut self, slot: &mut Option<T>, name: &str, read: impl FnOnce(&mut Self) -> Parsed<T>) -> Parsed<()> {
        if slot.is_some() {
            return Err(self.error(Problem::Twice(name.into())));
        }
        *slot = Some(read(self)?);
        Ok(())
    }

    /// `key=value` pairs to the end of the line.
    fn fields(&mut self, mut read: impl FnMut(&mut Self, &'a str) -> Parsed<()>) -> Parsed<()> {
        while let &Token::Word(key) = self.peek()? {
            self.next()?;
            self.punct('=', "`=`")?;
            read(self, key)?;
        }
        Ok(())
    }

    /// Words to the end of the line.
    fn words<T>(&mut self, expected: &'static str, read: impl Fn(&str) -> Option<T>) -> Parsed<Vec<T>> {
        let mut values = Vec::new();
        while let Token::Word(_) = self.peek()? {
            values.push(self.word(expected, &read)?);
        }
        Ok(values)
    }

    fn word<T>(&mut self, expected: &'static str, read: impl FnOnce(&str) -> Option<T>) -> Parsed<T> {
        let token = self.next()?;
        let value = if let Token::Word(word) = token { read(word) } else { None };
        value.ok_or_else(|| self.wrong(expected, &token))
    }

    fn number<T: FromStr>(&mut self, expected: &'static str) -> Parsed<T> {
        self.word(expected, |w| w.parse().ok())
    }

    fn id(&mut self, prefix: char, expected: &'static str) -> Parsed<u32> {
        self.word(expected, |w| w.strip_prefix(prefix)?.parse().ok())
    }

    fn punct(&mut self, c: char, expected: &'static str) -> Parsed<()> {
        match self.next()? {
            Token::Punct(found) if found == c => Ok(()),
            other => Err(self.wrong(expected, &other)),
        }
    }

    fn peek(&mut self) -> Parsed<&Token<'a>> {
        let token = self.next()?;
        Ok(self.peeked.insert(token))
    }

    fn next(&mut self) -> Parsed<Token<'a>> {
        if let Some(token) = self.peeked.take() {
            return Ok(token);
        }
        let token = self.lexer.next();
        // A newline has been counted by now, but ends the line it stands on.
        self.line = self.lexer.line - usize::from(token == Ok(Token::Newline));
        token.map_err(|problem| self.error(problem))
    }

    fn expected(&self, expected: &'static str, word: &'a str) -> ParseError {
        self.wrong(expected, &Token::Word(word))
    }

    fn wrong(&self, expected: &'static str, found: &Token<'_>) -> ParseError {
        self.error(Problem::Expected { expected, found: found.describe() })
    }

    fn error(&self, problem: Problem) -> ParseError {
        ParseError { line: self.line, problem }
    }
}

/// `21x45x80`.
fn dims<const N: usize>(word: &str) -> Option<[u32; N]> {
    word.split('x').map(|n| n.parse().ok()).collect::<Option<Vec<u32>>>()?.try_into().ok()
}

/// `3` or `3-7`.
fn range(word: &str) -> Option<(u32, u32)> {
    let (first, last) = word.split_once('-').unwrap_or((word, word));
    Some((first.parse().ok()?, last.parse().ok()?))
}

/// `s0.l1.h2`, or `s0.l1` for a (step, layer).
fn site(word: &str) -> Option<(u32, u32, Option<u32>)> {
    let mut parts = word.split('.');
    let mut id = |prefix| parts.next()?.strip_prefix(prefix)?.parse().ok();
    let (step, layer) = (id('s')?, id('l')?);
    match parts.next() {
        None => Some((step, layer, None)),
        Some(head) => {
            let head = head.strip_prefix('h')?.parse().ok()?;
            parts.next().is_none().then_some((step, layer, Some(head)))
        }
    }
}

/// A kernel's symbol.
fn variant(symbol: &str) -> Option<Variant> {
    let (dtype, rest) = symbol.strip_prefix("calibc_attn_")?.split_once("_hd")?;
    let mut flags = rest.split('_');
    let head_dim = flags.next()?.parse().ok()?;
    let mut variant = Variant { dtype: dtype.parse().ok()?, head_dim, lse: false, anchors: false, ragged: false };
    for flag in flags {
        match flag {
            "lse" => variant.lse = true,
            "anchors" => variant.anchors = true,
            "ragged" => variant.ragged = true,
            _ => return None,
        }
    }
    // Symbols have one spelling.
    (variant.to_string() == symbol).then_some(variant)
}
