//! Random plans with everything a bundle can hold, and a second, independent writer of the container: it lays out whatever
//! manifest and payloads it is given, with digests that are right, so that lies below the digests can be told.

#![allow(dead_code, reason = "each test file uses its part")]

use calibc_bundle::{Contents, Kernel, Resources, encode};
use calibc_ir::{
    Arch, AttnOp, BlockMask, DType, Family, Geometry, HeadId, Layout, MaskTable, Model, Plan, Schedule, TextPosition,
    Variant, WorkItem,
};

/// splitmix64.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: u32) -> u32 {
        (self.next() % u64::from(n)) as u32
    }
}

/// Everything [`Contents`] borrows.
#[derive(Clone, Debug)]
pub(crate) struct Owned {
    pub(crate) plan: Plan,
    pub(crate) kernels: Vec<Kernel>,
    pub(crate) spec: String,
    pub(crate) report: serde_json::Value,
}

impl Owned {
    pub(crate) fn contents(&self) -> Contents<'_> {
        let Self { plan, kernels, spec, report } = self;
        Contents { plan, kernels, spec, report, calibc_version: "1.2.3" }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        encode(&self.contents()).unwrap()
    }
}

/// A plan that the verifier accepts.
pub(crate) fn plan(
    geometry: Geometry,
    steps: u32,
    layers: u32,
    heads: u32,
    anchors: Option<u16>,
    rng: &mut Rng,
) -> Plan {
    let model =
        Model { name: "tiny \"model\" \u{3b5}".into(), layers, heads, head_dim: [64, 128][rng.below(2) as usize] };
    let sigmas = (0..steps).map(|s| 1.0 / (f64::from(s) + 0.1 + f64::from(rng.below(1000)) / 1e7)).collect();
    let mut plan = Plan::dense(model, geometry, sigmas);
    let (rows, cols, text) = (geometry.num_q_blocks(), geometry.num_kv_blocks(), geometry.text_blocks());
    let pool: Vec<_> = (0..1 + rng.below(8))
        .map(|_| {
            let density = 1 + rng.below(9);
            let mut mask = BlockMask::from_fn(rows, cols, |_, _| rng.below(10) < density);
            (0..rows).for_each(|r| mask.set(r, rng.below(cols)));
            text.clone().for_each(|b| {
                mask.fill_row(b);
                mask.fill_col(b);
            });
            mask
        })
        .collect();
    let mut masks = MaskTable::default();
    for (i, op) in plan.ops.iter_mut().enumerate() {
        *op = match (rng.below(5), anchors) {
            (0, _) => AttnOp::Dense,
            (1, Some(anchors)) => AttnOp::AnchorRows { anchors },
            _ => AttnOp::BlockSparse { mask: masks.intern(pool[rng.below(pool.len() as u32) as usize].clone()) },
        };
        if i == 0
            && let Some(anchors) = anchors
        {
            *op = AttnOp::AnchorRows { anchors };
            masks = MaskTable::default();
        }
    }
    plan.masks = masks;
    let variant = |dtype, lse| Variant {
        dtype,
        head_dim: plan.model.head_dim,
        lse,
        anchors: anchors.is_some(),
        ragged: geometry.ragged(),
    };
    plan.variants = match rng.below(2) {
        0 => vec![variant(DType::Fp16, true)],
        _ => vec![variant(DType::Bf16, true), variant(DType::Bf16, false), variant(DType::Fp16, false)],
    };
    plan.schedule = Some(schedule(&plan, rng));
    plan
}

fn schedule(plan: &Plan, rng: &mut Rng) -> Schedule {
    let mut schedule = Schedule { list_ptr: vec![0], ..Schedule::default() };
    let mut known: Vec<Vec<WorkItem>> = Vec::new();
    for ops in plan.ops.chunks(plan.model.heads as usize) {
        let mut items: Vec<_> = (0..)
            .map(HeadId)
            .zip(ops)
            .flat_map(|(head, op)| (0..plan.num_tiles(*op)).map(move |tile| WorkItem::new(head, tile)))
            .collect();
        if rng.below(2) == 0 {
            items.reverse();
        }
        let list = known.iter().position(|list| *list == items).unwrap_or_else(|| {
            schedule.items.extend(&items);
            schedule.list_ptr.push(schedule.items.len() as u32);
            known.push(items);
            known.len() - 1
        });
        schedule.list_of.push(list as u32);
    }
    schedule
}

/// Kernels of random bytes for every variant of `plan`, of every family that compiles for the architecture, in no order.
pub(crate) fn kernels(plan: &Plan, archs: &[&str], rng: &mut Rng) -> Vec<Kernel> {
    let mut kernels = Vec::new();
    for &variant in plan.variants.iter().rev() {
        for (arch, family) in archs.iter().flat_map(|&name| Family::ALL.map(|family| (arch(name), family))) {
            if !family.compiles_for(arch) {
                continue;
            }
            let symbol = family.symbol(&variant);
            kernels.push(Kernel {
                variant,
                family,
                arch,
                source: format!("extern \"C\" __global__ void {symbol}() {{}}\n"),
                symbol,
                cubin: (0..1 + rng.below(300)).map(|_| rng.next() as u8).collect(),
                threads: 128,
                shared_bytes: rng.below(1 << 17),
                resources: Resources { registers: rng.below(256), ..Resources::default() },
                nvrtc: (13, 0),
            });
        }
    }
    kernels
}

/// A small bundle with every kind of payload.
pub(crate) fn sample() -> Owned {
    let geometry = Geometry { text_tokens: 70, text_position: TextPosition::Before, ..Geometry::video(3, 10, 20) };
    let mut rng = Rng(4);
    let mut plan = plan(geometry, 3, 2, 3, Some(2), &mut rng);
    // Three masks from step 0 on, two more from step 2 on.
    let highest = |plan: &Plan, steps: usize| {
        let ids = plan.ops[..steps * 6].iter().filter_map(|op| match op {
            AttnOp::BlockSparse { mask } => Some(mask.0),
            _ => None,
        });
        ids.max()
    };
    while plan.variants.len() < 3 || [1, 2, 3].map(|steps| highest(&plan, steps)) != [Some(2), Some(2), Some(4)] {
        plan = self::plan(geometry, 3, 2, 3, Some(2), &mut rng);
    }
    let kernels = kernels(&plan, &["sm_80", "sm_90a", "sm_89"], &mut rng);
    let report = serde_json::json!({ "recall": { "mean": 0.1 + 0.2, "worst": 1e-9 }, "sites": [1, 2, 3] });
    Owned { plan, kernels, spec: "policy: calibatt\n".into(), report }
}

/// Any geometry with up to some thousand tokens.
pub(crate) fn geometry(rng: &mut Rng) -> Geometry {
    let mut g = Geometry::video(1 + rng.below(4), 1 + rng.below(12), 1 + rng.below(40));
    if rng.below(3) == 0 {
        g.layout = Layout::Tile([1 + rng.below(3), 1 + rng.below(5), 1 + rng.below(9)]);
    }
    match rng.below(4) {
        0 => (g.text_tokens, g.text_position) = (1 + rng.below(300), TextPosition::Before),
        1 => (g.text_tokens, g.text_position) = (1 + rng.below(300), TextPosition::After),
        2 => g.kv_tokens = Some(1 + rng.below(6000)),
        _ => {}
    }
    g
}

/// Contents that [`encode`] accepts.
pub(crate) fn random(seed: u64) -> Owned {
    let mut rng = Rng(seed);
    let geometry = geometry(&mut rng);
    let anchors = (rng.below(2) == 0).then(|| 1 + rng.below(geometry.height) as u16);
    let (steps, layers, heads) = (1 + rng.below(5), 1 + rng.below(4), 1 + rng.below(6));
    let plan = plan(geometry, steps, layers, heads, anchors, &mut rng);
    let archs: Vec<_> = ["sm_120", "sm_80", "sm_90", "sm_90a"].into_iter().filter(|_| rng.below(2) == 0).collect();
    let kernels = kernels(&plan, &archs, &mut rng);
    let spec = "x\u{e9}".repeat(rng.below(100) as usize);
    let numbers: Vec<_> = (0..rng.below(40)).map(|_| f64::from_bits(rng.next())).filter(|x| x.is_finite()).collect();
    Owned { plan, kernels, spec, report: serde_json::json!({ "numbers": numbers }) }
}

/// A bundle taken apart.
#[derive(Clone, Debug)]
pub(crate) struct Parts {
    pub(crate) magic: [u8; 8],
    pub(crate) version: u32,
    /// The manifest's text before its payload table.
    pub(crate) head: String,
    pub(crate) payloads: Vec<Part>,
}

#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) name: String,
    pub(crate) raw: u64,
    pub(crate) codec: String,
    pub(crate) bytes: Vec<u8>,
}

impl Part {
    /// Its content.
    pub(crate) fn content(&self) -> Vec<u8> {
        if self.codec == "none" { self.bytes.clone() } else { zstd::bulk::decompress(&self.bytes, 1 << 24).unwrap() }
    }

    /// Stores `content` as it is.
    pub(crate) fn set(&mut self, content: Vec<u8>) {
        (self.raw, self.codec, self.bytes) = (content.len() as u64, "none".into(), content);
    }

    pub(crate) fn words(&self) -> Vec<u32> {
        self.content().chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    pub(crate) fn set_words(&mut self, words: &[u32]) {
        self.set(words.iter().flat_map(|w| w.to_le_bytes()).collect());
    }
}

impl Parts {
    pub(crate) fn of(file: &[u8]) -> Self {
        let len = u32::from_le_bytes(file[12..16].try_into().unwrap()) as usize;
        let manifest = std::str::from_utf8(&file[88..88 + len]).unwrap();
        let area = (88 + len).next_multiple_of(64);
        let table: serde_json::Value = serde_json::from_str(manifest).unwrap();
        let payloads = table["payloads"].as_array().unwrap().iter().map(|entry| {
            let number = |name: &str| entry[name].as_u64().unwrap();
            let text = |name: &str| entry[name].as_str().unwrap().to_owned();
            let start = area + number("offset") as usize;
            Part {
                name: text("name"),
                raw: number("raw"),
                codec: text("codec"),
                bytes: file[start..start + number("stored") as usize].to_vec(),
            }
        });
        let head = manifest[..manifest.find("\"payloads\":").unwrap()].to_owned();
        let version = u32::from_le_bytes(file[8..12].try_into().unwrap());
        Self { magic: file[..8].try_into().unwrap(), version, head, payloads: payloads.collect() }
    }

    pub(crate) fn part(&mut self, name: &str) -> &mut Part {
        self.payloads.iter_mut().find(|p| p.name == name).unwrap_or_else(|| panic!("no payload {name}"))
    }

    /// Replaces one spot of the manifest's head.
    pub(crate) fn edit(&mut self, from: &str, to: &str) {
        assert_eq!(self.head.matches(from).count(), 1, "`{from}` in {}", self.head);
        self.head = self.head.replace(from, to);
    }

    pub(crate) fn manifest(&self) -> String {
        let mut end = 0;
        let entry = |part: &Part| {
            let offset = usize::next_multiple_of(end, 64);
            end = offset + part.bytes.len();
            let Part { name, raw, codec, bytes } = part;
            let (stored, digest) = (bytes.len(), blake3::hash(bytes).to_hex());
            format!(
                r#"{{"name":"{name}","offset":{offset},"stored":{stored},"raw":{raw},"codec":"{codec}","blake3":"{digest}"}}"#
            )
        };
        let entries: Vec<_> = self.payloads.iter().map(entry).collect();
        format!("{}\"payloads\":[{}]}}", self.head, entries.join(","))
    }

    /// The payload area.
    pub(crate) fn area(&self) -> Vec<u8> {
        let mut area = Vec::new();
        for part in &self.payloads {
            area.resize(area.len().next_multiple_of(64), 0);
            area.extend_from_slice(&part.bytes);
        }
        area
    }

    pub(crate) fn build(&self) -> Vec<u8> {
        self.build_with(self.manifest().as_bytes(), &self.area())
    }

    /// A file with sound header, digest of the manifest and lengths.
    pub(crate) fn build_with(&self, manifest: &[u8], area: &[u8]) -> Vec<u8> {
        let at = (88 + manifest.len()).next_multiple_of(64);
        let file_len = (at + area.len()) as u64;
        let mut file = header(&self.magic, self.version, manifest.len() as u32, file_len, blake3::hash(manifest));
        file.extend_from_slice(manifest);
        file.resize(at, 0);
        file.extend_from_slice(area);
        file
    }
}

/// A header with the digest that belongs to it.
pub(crate) fn header(
    magic: &[u8; 8],
    version: u32,
    manifest_len: u32,
    file_len: u64,
    manifest: blake3::Hash,
) -> Vec<u8> {
    let mut header = magic.to_vec();
    header.extend_from_slice(&version.to_le_bytes());
    header.extend_from_slice(&manifest_len.to_le_bytes());
    header.extend_from_slice(&file_len.to_le_bytes());
    header.extend_from_slice(manifest.as_bytes());
    header.extend_from_slice(blake3::hash(&header).as_bytes());
    header
}

pub(crate) fn arch(name: &str) -> Arch {
    name.parse().unwrap()
}
