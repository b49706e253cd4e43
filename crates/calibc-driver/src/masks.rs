//! The mask file: masks in and out as safetensors, for `explicit` specs and for `calibc export --masks`.
//!
//! ```text
//! s<step>.l<layer>       U8 [heads, q_blocks, kv_blocks]   1 where a block is kept; all ones for dense and anchor heads
//! s<step>.l<layer>.op    U8 [heads]                        0 dense, 1 block-sparse, 2 anchor rows; may be absent when read
//! ```
//!
//! Without `.op` a head whose blocks are all kept is dense, any other is block-sparse. Files are read and written head by
//! head: a plan of a large model has tens of gigabytes of bytes for its few gigabytes of bits.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use calibc_ir::{AttnOp, BlockMask, LayerId, Plan, Site, StepId};
use safetensors::tensor::{Dtype, Metadata};
use thiserror::Error;

/// Largest header of a mask file, in bytes (the bound of the safetensors format).
const MAX_HEADER: u64 = 100_000_000;

/// Why a mask file cannot be read or written.
#[derive(Debug, Error)]
pub enum MaskFileError {
    /// The file system refused.
    #[error("cannot {action} the mask file {}: {source}", path.display())]
    Io {
        /// `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not a safetensors file, or a damaged one.
    #[error("{} is not a sound safetensors file: {reason}; write it again", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A tensor the plan needs is absent.
    #[error("{} has no tensor `{tensor}`; add it, or set `default: dense` in the policy", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor that belongs to no step and layer of the plan.
    #[error(
        "{} holds `{tensor}`, which names no step and layer of this plan ({steps} steps, {layers} layers); remove it, or \
         correct the spec", path.display()
    )]
    Unexpected {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Steps of the plan.
        steps: u32,
        /// Layers of the plan.
        layers: u32,
    },
    /// A tensor of another type.
    #[error("{}: `{tensor}` is {found}; masks are U8", path.display())]
    DType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type.
        found: String,
    },
    /// A tensor of another shape.
    #[error("{}: `{tensor}` has shape {found:?}; this plan needs {expected:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape of the plan.
        expected: Vec<usize>,
    },
    /// A byte that means nothing.
    #[error("{}: `{tensor}` holds {value} at {at:?}; the values are {allowed}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The byte.
        value: u8,
        /// Its index.
        at: Vec<usize>,
        /// What it may be.
        allowed: &'static str,
    },
    /// A query block with nothing to attend to.
    #[error("{}: `{tensor}` keeps no block in row {row} of head {head}; keep at least one", path.display())]
    EmptyRow {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The head.
        head: usize,
        /// The query block.
        row: u32,
    },
    /// The op of a head contradicts its mask.
    #[error("{}: `{tensor}.op` says {op} for head {head}, whose mask drops blocks; keep them all, or use op 1", path.display())]
    OpContradictsMask {
        /// The file.
        path: PathBuf,
        /// The mask tensor.
        tensor: String,
        /// `dense` or `anchor rows`.
        op: &'static str,
        /// The head.
        head: usize,
    },
}

/// What a mask file says about one head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeadChoice {
    /// Every block.
    Dense,
    /// The blocks of this mask; no row is empty.
    Blocks(BlockMask),
    /// Anchor rows.
    Anchors,
}

/// An opened mask file: its header is checked against the plan's dimensions, its masks are read on demand.
#[derive(Debug)]
pub struct MaskFile {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    data_start: u64,
    q_blocks: u32,
    kv_blocks: u32,
}

fn tensor_name(step: StepId, layer: LayerId) -> String {
    format!("{step}.{layer}")
}

impl MaskFile {
    /// Opens `path` for a plan shaped like `plan`; with `require_all`, every step and layer must have its tensor.
    pub fn open(path: &Path, plan: &Plan, require_all: bool) -> Result<Self, MaskFileError> {
        let io = |source| MaskFileError::Io { action: "read", path: path.to_owned(), source };
        let format = |reason: String| MaskFileError::Format { path: path.to_owned(), reason };
        // Asked before opening: to open a pipe is to wait for whoever writes to it.
        if !path.metadata().map_err(io)?.is_file() {
            return Err(io(io::Error::other("not a regular file")));
        }
        let mut file = File::open(path).map_err(io)?;
        let bytes = file.metadata().map_err(io)?.len();
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(|_| format(format!("{bytes} bytes are too few for a header")))?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER || length > bytes.saturating_sub(8) {
            return Err(format(format!("its header claims {length} bytes, the file has {bytes}")));
        }
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header).map_err(io)?;
        let metadata: Metadata = serde_json::from_slice(&header).map_err(|e| format(e.to_string()))?;
        // A header may describe up to 2^64 bytes: no sum with that.
        let (described, found) = (metadata.data_len() as u64, bytes.saturating_sub(8 + length));
        if described != found {
            return Err(format(format!("its tensors take {described} bytes, and {found} follow the header")));
        }
        let geometry = &plan.geometry;
        let this = Self {
            path: path.to_owned(),
            file,
            metadata,
            data_start: 8 + length,
            q_blocks: geometry.num_q_blocks(),
            kv_blocks: geometry.num_kv_blocks(),
        };
        this.check_names(plan, require_all)?;
        Ok(this)
    }

    fn check_names(&self, plan: &Plan, require_all: bool) -> Result<(), MaskFileError> {
        let (steps, layers, heads) = (plan.num_steps(), plan.model.layers, plan.model.heads as usize);
        let path = || self.path.clone();
        let mut expected = std::collections::BTreeSet::new();
        for (step, layer) in (0..steps).flat_map(|s| (0..layers).map(move |l| (StepId(s), LayerId(l)))) {
            let name = tensor_name(step, layer);
            if require_all && self.metadata.info(&name).is_none() {
                return Err(MaskFileError::Missing { path: path(), tensor: name });
            }
            expected.insert(format!("{name}.op"));
            expected.insert(name);
        }
        for name in self.metadata.offset_keys() {
            if !expected.contains(&name) {
                return Err(MaskFileError::Unexpected { path: path(), tensor: name, steps, layers });
            }
            let Some(info) = self.metadata.info(&name) else { continue };
            if info.dtype != Dtype::U8 {
                return Err(MaskFileError::DType { path: path(), tensor: name, found: format!("{:?}", info.dtype) });
            }
            let mask = name.strip_suffix(".op");
            let shape = match mask {
                Some(_) => vec![heads],
                None => vec![heads, self.q_blocks as usize, self.kv_blocks as usize],
            };
            if info.shape != shape {
                return Err(MaskFileError::Shape {
                    path: path(),
                    tensor: name,
                    found: info.shape.clone(),
                    expected: shape,
                });
            }
            if let Some(mask) = mask
                && self.metadata.info(mask).is_none()
            {
                return Err(MaskFileError::Missing { path: path(), tensor: mask.to_owned() });
            }
        }
        Ok(())
    }

    /// Bytes `from..from + len` of a tensor.
    fn bytes(&self, name: &str, from: usize, len: usize) -> Result<Option<Vec<u8>>, MaskFileError> {
        let Some(info) = self.metadata.info(name) else { return Ok(None) };
        let mut bytes = vec![0; len];
        self.file
            .read_exact_at(&mut bytes, self.data_start + (info.data_offsets.0 + from) as u64)
            .map_err(|source| MaskFileError::Io { action: "read", path: self.path.clone(), source })?;
        Ok(Some(bytes))
    }

    /// What the file says about `site`, which must be one of the plan's. `None` where it says nothing.
    ///
    /// # Errors
    /// A byte that means nothing, a row without any block, an op that contradicts its mask, or a failing disk.
    pub fn head(&self, site: Site) -> Result<Option<HeadChoice>, MaskFileError> {
        let (name, head) = (tensor_name(site.step, site.layer), site.head.index());
        let (rows, cols) = (self.q_blocks as usize, self.kv_blocks as usize);
        let Some(mask) = self.bytes(&name, head * rows * cols, rows * cols)? else { return Ok(None) };
        let op_name = format!("{name}.op");
        let op = self.bytes(&op_name, head, 1)?.map(|bytes| bytes[0]);
        let path = || self.path.clone();
        if let Some(at) = mask.iter().position(|&byte| byte > 1) {
            return Err(MaskFileError::Value {
                path: path(),
                tensor: name,
                value: mask[at],
                at: vec![head, at / cols, at % cols],
                allowed: "0 and 1",
            });
        }
        let full = mask.iter().all(|&byte| byte == 1);
        let contradiction = |op| Err(MaskFileError::OpContradictsMask { path: path(), tensor: name.clone(), op, head });
        match op {
            Some(0) if !full => contradiction("dense"),
            Some(2) if !full => contradiction("anchor rows"),
            Some(2) => Ok(Some(HeadChoice::Anchors)),
            Some(value @ 3..) => Err(MaskFileError::Value {
                path: path(),
                tensor: op_name,
                value,
                at: vec![head],
                allowed: "0 (dense), 1 (block-sparse) and 2 (anchor rows)",
            }),
            Some(0) | None if full => Ok(Some(HeadChoice::Dense)),
            _ => {
                let kept = |r: u32, c: u32| mask[r as usize * cols + c as usize] == 1;
                let blocks = BlockMask::from_fn(self.q_blocks, self.kv_blocks, kept);
                match (0..self.q_blocks).find(|&r| blocks.row_count(r) == 0) {
                    Some(row) => Err(MaskFileError::EmptyRow { path: path(), tensor: name, head, row }),
                    None => Ok(Some(HeadChoice::Blocks(blocks))),
                }
            }
        }
    }
}

/// Writes the masks of `plan` to `path`: to a temporary sibling first, which then takes the name. Returns the bytes written.
pub fn write(plan: &Plan, path: &Path) -> Result<u64, MaskFileError> {
    let io = |source| MaskFileError::Io { action: "write", path: path.to_owned(), source };
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // Temporary files are private by default; the result has the rights any new file gets.
    let rights = std::fs::Permissions::from_mode(0o666);
    let mut temporary =
        tempfile::Builder::new().prefix(".calibc-").permissions(rights).tempfile_in(folder).map_err(io)?;
    let mut out = BufWriter::with_capacity(1 << 20, temporary.as_file_mut());
    let bytes = write_to(plan, &mut out).and_then(|bytes| out.flush().map(|()| bytes)).map_err(io)?;
    drop(out);
    temporary.as_file().sync_all().map_err(io)?;
    temporary.persist(path).map_err(|e| io(e.error))?;
    Ok(bytes)
}

fn write_to(plan: &Plan, out: &mut impl Write) -> io::Result<u64> {
    let (heads, geometry) = (plan.model.heads, &plan.geometry);
    let (rows, cols) = (geometry.num_q_blocks(), geometry.num_kv_blocks());
    let pairs = || (0..plan.num_steps()).flat_map(|s| (0..plan.model.layers).map(move |l| (StepId(s), LayerId(l))));
    let cells = u64::from(heads) * u64::from(rows) * u64::from(cols);
    // The header is spelled here because its order is part of the bytes: masks of a pair, then their ops, pair by pair.
    let (mut header, mut at) = (String::from("{"), 0);
    for (step, layer) in pairs() {
        let name = tensor_name(step, layer);
        let (mid, end) = (at + cells, at + cells + u64::from(heads));
        if at > 0 {
            header.push(',');
        }
        header += &format!(
            r#""{name}":{{"dtype":"U8","shape":[{heads},{rows},{cols}],"data_offsets":[{at},{mid}]}},"{name}.op":{{"dtype":"U8","shape":[{heads}],"data_offsets":[{mid},{end}]}}"#
        );
        at = end;
    }
    header.push('}');
    while header.len() % 8 != 0 {
        header.push(' ');
    }
    if header.len() as u64 > MAX_HEADER {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            "more steps and layers than one safetensors header holds",
        ));
    }
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    let full = vec![1; rows as usize * cols as usize];
    let mut bytes = full.clone();
    for (step, layer) in pairs() {
        let ops = plan.layer_ops(step, layer);
        for op in ops {
            match *op {
                AttnOp::Dense | AttnOp::AnchorRows { .. } => out.write_all(&full)?,
                AttnOp::BlockSparse { mask } => {
                    let mask = &plan.masks[mask];
                    bytes.fill(0);
                    for r in 0..rows {
                        mask.kept(r).for_each(|c| bytes[r as usize * cols as usize + c as usize] = 1);
                    }
                    out.write_all(&bytes)?;
                }
            }
        }
        let codes: Vec<u8> = ops
            .iter()
            .map(|op| match op {
                AttnOp::Dense => 0,
                AttnOp::BlockSparse { .. } => 1,
                AttnOp::AnchorRows { .. } => 2,
            })
            .collect();
        out.write_all(&codes)?;
    }
    Ok(8 + header.len() as u64 + at)
}

#[cfg(test)]
mod tests {
    use calibc_ir::{Geometry, Model};

    use super::*;

    fn plan() -> Plan {
        let model = Model { name: "m".into(), layers: 2, heads: 3, head_dim: 64 };
        let mut plan = Plan::dense(model, Geometry::video(3, 8, 11), vec![1.0, 0.5]);
        let mask = plan.masks.intern(BlockMask::from_fn(3, 3, |r, c| c <= r));
        plan.ops[1] = AttnOp::BlockSparse { mask };
        plan.ops[11] = AttnOp::AnchorRows { anchors: 5 };
        plan
    }

    #[test]
    fn what_is_written_reads_back() {
        let (plan, dir) = (plan(), tempfile::tempdir().unwrap());
        let path = dir.path().join("m.safetensors");
        let bytes = write(&plan, &path).unwrap();
        assert_eq!(bytes, std::fs::metadata(&path).unwrap().len());
        let file = MaskFile::open(&path, &plan, true).unwrap();
        for site in plan.sites() {
            let want = match plan.op(site) {
                AttnOp::Dense => HeadChoice::Dense,
                AttnOp::BlockSparse { mask } => HeadChoice::Blocks(plan.masks[mask].clone()),
                AttnOp::AnchorRows { .. } => HeadChoice::Anchors,
            };
            assert_eq!(file.head(site).unwrap(), Some(want), "{site}");
        }
        // The whole file again through the reference reader.
        let raw = std::fs::read(&path).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&raw).unwrap();
        assert_eq!(tensors.tensor("s0.l0").unwrap().shape(), [3, 3, 3]);
        assert_eq!(tensors.tensor("s0.l0").unwrap().data()[9..18], [1, 0, 0, 1, 1, 0, 1, 1, 1]);
        assert_eq!(tensors.tensor("s1.l1.op").unwrap().data(), [0, 0, 2]);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside the file");
    }

    /// Every wrong file has its own refusal.
    #[test]
    fn wrong_files_are_refused() {
        use safetensors::tensor::{TensorView, serialize};
        let (plan, dir) = (plan(), tempfile::tempdir().unwrap());
        let path = dir.path().join("m.safetensors");
        let full = vec![1u8; 27];
        let refuse = |tensors: Vec<(&str, Dtype, Vec<usize>, &[u8])>, all: bool| {
            let views = tensors
                .into_iter()
                .map(|(name, dtype, shape, data)| (name.to_owned(), TensorView::new(dtype, shape, data).unwrap()));
            std::fs::write(&path, serialize(views, None).unwrap()).unwrap();
            let file = MaskFile::open(&path, &plan, all)?;
            (0..3).map(|head| file.head(Site::new(0, 0, head))).collect::<Result<Option<Vec<_>>, _>>()
        };
        fn mask(data: &[u8]) -> (&str, Dtype, Vec<usize>, &[u8]) {
            ("s0.l0", Dtype::U8, vec![3, 3, 3], data)
        }
        assert!(
            matches!(refuse(vec![mask(&full)], true), Err(MaskFileError::Missing { tensor, .. }) if tensor == "s0.l1")
        );
        assert_eq!(refuse(vec![mask(&full)], false).unwrap(), Some(vec![HeadChoice::Dense; 3]));
        let other = ("s9.l0", Dtype::U8, vec![3, 3, 3], &full[..]);
        assert!(matches!(refuse(vec![other], false), Err(MaskFileError::Unexpected { .. })));
        let wide = ("s0.l0", Dtype::U8, vec![3, 9], &full[..]);
        assert!(matches!(refuse(vec![wide], false), Err(MaskFileError::Shape { .. })));
        let signed = ("s0.l0", Dtype::I8, vec![3, 3, 3], &full[..]);
        assert!(matches!(refuse(vec![signed], false), Err(MaskFileError::DType { .. })));
        let orphan = ("s0.l0.op", Dtype::U8, vec![3], &[0u8, 0, 0][..]);
        assert!(matches!(refuse(vec![orphan], false), Err(MaskFileError::Missing { .. })));
        let mut two = full.clone();
        two[13] = 2;
        assert!(matches!(refuse(vec![mask(&two)], false), Err(MaskFileError::Value { at, .. }) if at == [1, 1, 1]));
        let mut empty = full.clone();
        empty[12..15].fill(0);
        assert!(matches!(refuse(vec![mask(&empty)], false), Err(MaskFileError::EmptyRow { head: 1, row: 1, .. })));
        let mut sparse = full.clone();
        sparse[0] = 0;
        for (op, name) in [(0u8, "dense"), (2, "anchor rows")] {
            let ops = [op, 0, 0];
            let ops = ("s0.l0.op", Dtype::U8, vec![3], &ops[..]);
            let found = refuse(vec![mask(&sparse), ops], false);
            assert!(matches!(found, Err(MaskFileError::OpContradictsMask { op, .. }) if op == name));
        }
        let ops = ("s0.l0.op", Dtype::U8, vec![3], &[0u8, 3, 0][..]);
        assert!(matches!(refuse(vec![mask(&full), ops], false), Err(MaskFileError::Value { value: 3, .. })));
    }

    #[test]
    fn damaged_files_are_refused() {
        let (plan, dir) = (plan(), tempfile::tempdir().unwrap());
        let path = dir.path().join("m.safetensors");
        write(&plan, &path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for cut in [0, 4, 8, 20, whole.len() - 1] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert!(matches!(MaskFile::open(&path, &plan, true), Err(MaskFileError::Format { .. })), "{cut}");
        }
        let mut huge = whole.clone();
        huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        std::fs::write(&path, huge).unwrap();
        assert!(matches!(MaskFile::open(&path, &plan, true), Err(MaskFileError::Format { .. })));
        std::fs::write(&path, [&whole[..], b"more"].concat()).unwrap();
        assert!(matches!(MaskFile::open(&path, &plan, true), Err(MaskFileError::Format { .. })));
        assert!(matches!(
            MaskFile::open(dir.path(), &plan, true),
            Err(MaskFileError::Format { .. } | MaskFileError::Io { .. })
        ));
    }
}
