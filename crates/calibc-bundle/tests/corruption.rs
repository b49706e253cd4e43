//! Whatever is wrong with a file, opening it says so by name and does not panic.

mod support;

use calibc_bundle::{Bundle, BundleError, FORMAT_VERSION, MAGIC};
use support::{Parts, Rng, header, sample};

/// `part: reason` of a corrupt file.
fn corrupt(file: &[u8]) -> String {
    match Bundle::parse(file) {
        Err(BundleError::Corrupt { what, why }) => format!("{what}: {why}"),
        other => panic!("not corrupt: {:?}", other.map(|b| b.digest())),
    }
}

/// Where the payload area of `file` starts.
fn area(file: &[u8]) -> usize {
    (88 + u32::from_le_bytes(file[12..16].try_into().unwrap()) as usize).next_multiple_of(64)
}

#[test]
fn every_flip_of_header_and_manifest_is_detected() {
    let mut file = sample().encode();
    for at in 0..area(&file) {
        for bit in 0..8 {
            file[at] ^= 1 << bit;
            let error = Bundle::parse(&file).expect_err("a flipped bit");
            match (at, error) {
                (0..8, BundleError::NotABundle) => {}
                (8.., BundleError::Corrupt { what, .. }) => {
                    assert!(
                        ["header", "manifest"].contains(&what.as_str()) || what.starts_with("padding"),
                        "{at}: {what}"
                    );
                }
                (_, other) => panic!("byte {at}: {other}"),
            }
            file[at] ^= 1 << bit;
        }
    }
    Bundle::parse(&file).unwrap();
}

#[test]
fn every_flip_of_payloads_and_padding_is_detected() {
    let mut file = sample().encode();
    let mut rng = Rng(7);
    for at in area(&file)..file.len() {
        let flip = 1 + rng.below(255) as u8;
        file[at] ^= flip;
        let found = corrupt(&file);
        assert!(found.starts_with("payload ") || found.starts_with("padding before "), "{at}: {found}");
        file[at] ^= flip;
    }
    Bundle::parse(&file).unwrap();
}

#[test]
fn every_truncation_is_detected() {
    let file = sample().encode();
    for len in 0..file.len() {
        match Bundle::parse(&file[..len]) {
            Err(BundleError::NotABundle) => assert!(len < MAGIC.len()),
            Err(BundleError::Corrupt { what, .. }) => assert!(len >= MAGIC.len() && what == "header"),
            other => panic!("{len}: {:?}", other.map(|b| b.digest())),
        }
    }
}

#[test]
fn appended_bytes_are_detected() {
    for tail in [&b"\0"[..], &[0; 64], b"x"] {
        let mut file = sample().encode();
        file.extend_from_slice(tail);
        assert!(corrupt(&file).starts_with("header: the file should have"));
    }
    // The same with a header that knows of them.
    let parts = Parts::of(&sample().encode());
    for tail in [1, 64, 1000] {
        let mut area = parts.area();
        area.resize(area.len() + tail, 0);
        let found = corrupt(&parts.build_with(parts.manifest().as_bytes(), &area));
        assert_eq!(found, format!("the end of the file: {tail} bytes after the last payload"));
    }
}

#[test]
fn a_later_version_is_told_from_a_damaged_file() {
    let mut parts = Parts::of(&sample().encode());
    for version in [0, 1, FORMAT_VERSION + 1, u32::MAX] {
        parts.version = version;
        match Bundle::parse(&parts.build()) {
            Err(BundleError::VersionNotReadable { found, readable }) => {
                assert_eq!((found, readable), (version, FORMAT_VERSION));
            }
            other => panic!("{:?}", other.map(|b| b.digest())),
        }
    }
}

#[test]
fn headers_that_lie_are_detected() {
    let file = sample().encode();
    let digest = blake3::Hash::from(<[u8; 32]>::try_from(&file[24..56]).unwrap());
    let len = u32::from_le_bytes(file[12..16].try_into().unwrap());
    let total = file.len() as u64;
    for (manifest_len, file_len) in [
        (u32::MAX, total),
        ((16 << 20) + 1, total),
        (total as u32, total),
        (total as u32 - 87, total),
        (len, u64::MAX),
        (len, 0),
        (len, total - 1),
    ] {
        let mut lie = header(&MAGIC, FORMAT_VERSION, manifest_len, file_len, digest);
        lie.extend_from_slice(&file[88..]);
        assert!(corrupt(&lie).starts_with("header: "), "{manifest_len} {file_len}");
    }
    for manifest_len in [0, 1, len - 1, len + 1] {
        let mut lie = header(&MAGIC, FORMAT_VERSION, manifest_len, total, digest);
        lie.extend_from_slice(&file[88..]);
        assert!(corrupt(&lie).starts_with("manifest: its bytes do not have the digest"), "{manifest_len}");
    }
    let only = header(&MAGIC, FORMAT_VERSION, 0, 88, blake3::hash(b""));
    assert!(corrupt(&only).starts_with("manifest: EOF"));
}

#[test]
fn another_launch_contract_is_its_own_error() {
    let mut parts = Parts::of(&sample().encode());
    parts.edit("\"abi\":\"abi 5;", "\"abi\":\"abi 7;");
    match Bundle::parse(&parts.build()) {
        Err(BundleError::AbiMismatch { found, expected }) => {
            assert_eq!(found.replacen("abi 7;", "abi 5;", 1), expected);
        }
        other => panic!("{:?}", other.map(|b| b.digest())),
    }
}

/// Manifests with right digests that mean something else, or nothing.
#[test]
fn manifests_that_lie_are_detected() {
    let good = Parts::of(&sample().encode());
    let manifest = good.manifest();
    let first = manifest.find("\"payloads\":").unwrap();
    let swap = |from: &str, to: &str| {
        assert!(manifest.contains(from), "{from}: {manifest}");
        manifest.replacen(from, to, 1)
    };
    // In the payload table only.
    let entry = |field: &str, value: &str, nth: usize| {
        let at =
            manifest[first..].match_indices(&format!("\"{field}\":")).nth(nth).unwrap().0 + first + field.len() + 3;
        let end = at + manifest[at..].find([',', '}']).unwrap();
        format!("{}{value}{}", &manifest[..at], &manifest[end..])
    };
    let max = u64::MAX.to_string();
    let (variants, kernels) = (manifest.find("\"variants\":").unwrap(), manifest.find("\"kernels\":").unwrap());
    let no_variants = format!("{}\"variants\":[],{}", &manifest[..variants], &manifest[kernels..]);
    let cases: Vec<(String, &str)> = vec![
        // Spelling.
        (String::new(), "manifest: EOF"),
        ("null".into(), "manifest: invalid type"),
        (swap("{", "{ "), "manifest: not in canonical form"),
        (format!("{manifest}\n"), "manifest: not in canonical form"),
        (swap("\"calibc_version\":\"1.2.3\",", ""), "manifest: missing field `calibc_version`"),
        (swap("{\"calibc_version\"", "{\"extra\":1,\"calibc_version\""), "manifest: unknown field `extra`"),
        (swap("{\"name\":\"tiny", "{\"gqa\":1,\"name\":\"tiny"), "manifest: unknown field `gqa`"),
        (swap("\"frames\":3", "\"frames\":3,\"frames\":3"), "manifest: duplicate field `frames`"),
        (swap("\"frames\":3", "\"frames\":3.0"), "manifest: invalid type"),
        (swap("\"frames\":3", "\"frames\":-3"), "manifest: invalid value"),
        (swap("\"frames\":3", "\"frames\":4294967296"), "manifest: invalid value"),
        (swap(",\"kv_tokens\":null", ""), "manifest: not in canonical form"),
        (swap("\"kv_tokens\":null", "\"kv_tokens\":null,\"kv\":0"), "manifest: unknown field"),
        (swap("\"before\"", "\"around\""), "manifest: unknown variant `around`"),
        (swap("\"raster\"", "{\"tile\":[1,2]}"), "manifest: invalid length"),
        (swap("\u{3b5}", "\\u03b5"), "manifest: not in canonical form"),
        (swap("\"sigmas\":[", "\"sigmas\":[1e999,"), "manifest: number out of range"),
        (swap("\"sigmas\":[", "\"sigmas\":[null,"), "manifest: invalid type"),
        ("[".repeat(100_000), "manifest: "),
        // Dimensions.
        (swap("\"frames\":3", "\"frames\":0"), "manifest field geometry: frames is 0"),
        (swap("\"frames\":3", "\"frames\":4294967295"), "manifest field geometry: "),
        (swap("\"text_tokens\":70", "\"text_tokens\":0"), "manifest field geometry: "),
        (swap("\"raster\"", "{\"tile\":[1,0,1]}"), "manifest field geometry: layout tile is 0"),
        (swap("\"layers\":2", "\"layers\":0"), "manifest field model: "),
        (swap("\"layers\":2", "\"layers\":4294967295"), "manifest field model: "),
        (swap("\"heads\":3", "\"heads\":65536"), "payload ops: it should hold 1572864 bytes"),
        (swap("\"layers\":2", "\"layers\":3"), "payload ops: it should hold"),
        (swap("\"head_dim\":", "\"head_dim\":1"), "plan: head dimension 1"),
        (swap("\"frames\":3", "\"frames\":30"), "payload masks/0: it should hold"),
        (swap("\"anchors\":2", "\"anchors\":null"), "payload ops: an anchor head where"),
        (swap("\"anchors\":2", "\"anchors\":0"), "manifest field anchors: "),
        (swap("\"anchors\":2", "\"anchors\":11"), "manifest field anchors: "),
        (swap("\"anchors\":2", "\"anchors\":3"), "payload anchors: "),
        (
            swap("\"masks\":[{\"step\":0,\"masks\":", "\"masks\":[{\"step\":0,\"masks\":1"),
            "payload masks/0: it should hold 312 bytes",
        ),
        (
            swap(
                "\"masks\":[{\"step\":0,\"masks\":",
                "\"masks\":[{\"step\":0,\"masks\":4294967295},{\"step\":0,\"masks\":",
            ),
            "manifest field masks: ",
        ),
        (swap("\"masks\":[{\"step\":0", "\"masks\":[{\"step\":1"), "manifest field masks: the chunks are not cut"),
        (swap("\"lists\":", "\"lists\":4294"), "manifest field schedule: "),
        (swap("\"items\":", "\"items\":4294"), "manifest field schedule: "),
        (swap("\"schedule\":{", "\"schedule\":null,\"x\":{"), "manifest: invalid type"),
        // Kernels.
        (no_variants, "manifest field variants: 0 are not"),
        (swap("\"threads\":128", "\"threads\":0"), "manifest field kernels[0]: 0 threads"),
        (swap("\"variant\":0", "\"variant\":3"), "manifest field kernels[0]: there is no variant 3"),
        (swap("\"variant\":0", "\"variant\":1"), "manifest field kernels[1]: not in ascending order"),
        (swap("\"arch\":\"sm_80\"", "\"arch\":\"sm_81\""), "manifest field kernels[0]: `sm_81` is not"),
        (swap("\"arch\":\"sm_80\"", "\"arch\":\"sm_89\""), "manifest field kernels[1]: not in ascending order"),
        (
            swap("\"family\":\"portable\",\"arch\":\"sm_80\"", "\"family\":\"hopper\",\"arch\":\"sm_80\""),
            "manifest field kernels[1]: not in",
        ),
        (swap("\"family\":\"portable\"", "\"family\":\"ampere\""), "manifest: unknown variant `ampere`"),
        (swap("\"symbol\":\"c", "\"symbol\":\"1"), "manifest field kernels[0]: symbol"),
        (swap("\"nvrtc\":[13,0]", "\"nvrtc\":[13,0,0]"), "manifest: "),
        (swap("\"lse\":true,\"anchors\":true", "\"lse\":true,\"anchors\":false"), "plan: "),
        // Spans.
        (entry("offset", "64", 0), "payload masks/0: it should be at offset 0"),
        (entry("offset", "0", 1), "payload masks/1: it should be at offset"),
        (entry("offset", &max, 1), "payload masks/1: it should be at offset"),
        (entry("offset", "18446744073709551552", 2), "payload ops: it should be at offset"),
        (entry("stored", &max, 0), "payload masks/0: 18446744073709551615 bytes run past the end"),
        (entry("stored", "9223372036854775807", 3), "payload schedule: "),
        (entry("stored", "0", 0), "payload masks/1: it should be at offset 0"),
        (entry("stored", "1", 0), "padding before payload masks/1: it is not zero"),
        (entry("raw", "0", 0), "payload masks/0: it should hold"),
        (entry("raw", &max, 0), "payload masks/0: it should hold"),
        (entry("raw", &max, 5), "payload spec: 17 bytes are stored for 18446744073709551615"),
        (entry("raw", "16", 5), "payload spec: 17 bytes are stored for 16"),
        (entry("codec", "\"lz4\"", 0), "manifest: unknown variant `lz4`"),
        (entry("codec", "\"zstd\"", 5), "payload spec: zstd: "),
        (entry("blake3", "\"00\"", 0), "manifest: "),
        (entry("blake3", &format!("\"{}\"", "0".repeat(64)), 0), "payload masks/0: its bytes do not have the digest"),
        (entry("name", "\"masks/1\"", 0), "manifest field payloads: `masks/1` stands where `masks/0` should"),
        (entry("name", "\"masks/0\"", 1), "manifest field payloads: `masks/0` stands where `masks/1` should"),
        (entry("name", "\"notes\"", 5), "manifest field payloads: `notes` stands where `spec` should"),
        (format!("{}\"payloads\":[]}}", good.head), "manifest field payloads: it is empty"),
    ];
    for (i, (lie, want)) in cases.iter().enumerate() {
        let found = corrupt(&good.build_with(lie.as_bytes(), &good.area()));
        assert!(found.starts_with(want), "case {i}: wanted `{want}`, found `{found}`");
    }
    // An upper-case digest is right, and yet another spelling.
    let digest = blake3::hash(&good.payloads[0].bytes).to_hex();
    let lie = manifest.replace(digest.as_str(), &digest.to_uppercase());
    assert_eq!(corrupt(&good.build_with(lie.as_bytes(), &good.area())), "manifest: not in canonical form");
}

/// An edit of the parts, and how the error starts.
type Case = (fn(&mut Parts), &'static str);

#[test]
fn payloads_that_lie_are_detected() {
    let cases: &[Case] = &[
        (|p| drop(p.payloads.remove(0)), "manifest field payloads: `masks/1` stands where `masks/0` should"),
        (|p| drop(p.payloads.pop()), "manifest field payloads: `cubin/"),
        (|p| p.payloads.swap(0, 1), "manifest field payloads: `masks/1` stands where"),
        (|p| p.payloads.push(p.payloads[2].clone()), "manifest field payloads: nothing refers to `ops`"),
        (|p| p.payloads.insert(1, p.payloads[0].clone()), "manifest field payloads: `masks/0` stands where"),
        // Masks.
        (
            |p| {
                let mut words = p.part("masks/0").words();
                let rows = 6;
                let first = words[..rows].to_vec();
                words[rows..2 * rows].copy_from_slice(&first);
                p.part("masks/0").set_words(&words);
            },
            "payload masks/0: m1 is the same mask as m0",
        ),
        (|p| set_word(p, "masks/0", 0, u32::MAX), "payload masks/0: a bit is set past the last column"),
        (|p| set_word(p, "masks/0", 2, 0), "plan: m0 q2: "),
        (|p| set_word(p, "masks/0", 0, 1), "plan: m0 q0: a text block must attend"),
        (
            |p| {
                let content = p.part("masks/0").content();
                p.part("masks/0").set([content, vec![0; 4]].concat());
            },
            "payload masks/0: it should hold",
        ),
        // Compression.
        (|p| p.part("ops").bytes[0] ^= 1, "payload ops: zstd: "),
        (|p| p.part("ops").bytes.truncate(10), "payload ops: zstd: "),
        (|p| p.part("ops").bytes.push(0), "payload ops: zstd: "),
        (|p| compress(p, "ops", vec![0; 71]), "payload ops: it should hold 72 bytes and holds 71"),
        (|p| compress(p, "ops", vec![0; 73]), "payload ops: zstd: "),
        (|p| compress(p, "ops", vec![0; 1 << 24]), "payload ops: zstd: "),
        (
            |p| {
                compress(p, "spec", vec![b' '; 1 << 24]);
                p.part("spec").raw = 1 << 24;
            },
            "payload spec: ",
        ),
        (
            |p| {
                compress(p, "spec", vec![b' '; 4096]);
                p.part("spec").raw = 1 << 62;
            },
            "payload spec: ",
        ),
        // Ops.
        (|p| set_word(p, "ops", 5, 1000), "plan: s0.l1.h2: m1000 is not in the table"),
        (|p| p.part("ops").set_words(&[u32::MAX - 1; 18]), "manifest field masks: "),
        (
            |p| {
                let words = p.part("ops").words();
                p.part("ops").set_words(
                    &words.iter().map(|&w| if w == u32::MAX - 1 { u32::MAX } else { w }).collect::<Vec<_>>(),
                );
            },
            "manifest field anchors: given, but no head uses anchor rows",
        ),
        (|p| p.part("ops").set_words(&[u32::MAX; 17]), "payload ops: it should hold 72 bytes"),
        // Schedule.
        (|p| set_word(p, "schedule", 0, 77), "plan: s0.l0: w77 is not one of"),
        (|p| set_word(p, "schedule", 6, 1), "plan: schedule: list_ptr[0]"),
        (|p| set_word(p, "schedule", 7, u32::MAX), "plan: schedule: list_ptr"),
        (|p| last_item(p, |_| 0xffff), "plan: "),
        (|p| last_item(p, |other| other), "plan: "),
        (
            |p| {
                // One tile less, and every number says so.
                let mut words = p.part("schedule").words();
                let lists: usize = digits(&p.head, "\"lists\":").parse().unwrap();
                let items = digits(&p.head, "\"items\":").to_owned();
                words.pop();
                words[6 + lists] -= 1;
                p.part("schedule").set_words(&words);
                let less: u32 = items.parse::<u32>().unwrap() - 1;
                p.edit(&format!("\"items\":{items}"), &format!("\"items\":{less}"));
            },
            "plan: s",
        ),
        // Anchors.
        (|p| set_word(p, "anchors", 1, 3), "payload anchors: not the anchor table"),
        (|p| p.part("anchors").set(vec![]), "payload anchors: it should hold"),
        // Text.
        (|p| p.part("spec").set(vec![0xff]), "payload spec: invalid utf-8"),
        (|p| p.part("report").set(b"{".to_vec()), "payload report: EOF"),
        (|p| p.part("report").set(b"[".repeat(1000)), "payload report: recursion limit"),
        (|p| p.part("report").set(vec![]), "payload report: EOF"),
        (
            |p| p.payloads.iter_mut().find(|p| p.name.starts_with("source/")).unwrap().set(vec![0xc0]),
            "payload source/calibc_attn",
        ),
        (|p| p.payloads.last_mut().unwrap().set(vec![]), "manifest field kernels[11]: its machine code is empty"),
        (hopper_code_for_another_architecture, "manifest field kernels[11]: there are no hopper kernels for sm_90"),
    ];
    for (i, (spoil, want)) in cases.iter().enumerate() {
        let mut parts = Parts::of(&sample().encode());
        spoil(&mut parts);
        let found = corrupt(&parts.build());
        assert!(found.starts_with(want), "case {i}: wanted `{want}`, found `{found}`");
    }
}

fn set_word(parts: &mut Parts, name: &str, at: usize, word: u32) {
    let mut words = parts.part(name).words();
    words[at] = word;
    parts.part(name).set_words(&words);
}

/// Replaces the last work item by what `new` makes of the one before it.
fn last_item(parts: &mut Parts, new: impl Fn(u32) -> u32) {
    let words = parts.part("schedule").words();
    set_word(parts, "schedule", words.len() - 1, new(words[words.len() - 2]));
}

/// Stores `content` compressed; the declared length stays.
fn compress(parts: &mut Parts, name: &str, content: Vec<u8>) {
    let part = parts.part(name);
    part.codec = "zstd".into();
    part.bytes = zstd::bulk::compress(&content, 19).unwrap();
}

/// The last kernel is the Hopper one of its variant.
fn hopper_code_for_another_architecture(parts: &mut Parts) {
    let at = parts.head.rfind("\"arch\":\"sm_90a\"").unwrap();
    parts.head.replace_range(at..at + 15, "\"arch\":\"sm_90\"");
    let name = &mut parts.payloads.last_mut().unwrap().name;
    assert!(name.ends_with("_hopper/sm_90a"), "{name}");
    name.pop();
}

fn digits<'a>(text: &'a str, after: &str) -> &'a str {
    let rest = &text[text.find(after).unwrap() + after.len()..];
    &rest[..rest.find(|c: char| !c.is_ascii_digit()).unwrap()]
}

#[test]
fn a_file_that_asks_for_more_memory_than_plans_need_is_refused() {
    // Two million sites and masks of 128 MiB: nothing of it is allocated.
    let mut parts = Parts::of(&sample().encode());
    parts.edit("\"frames\":3,\"height\":10,\"width\":20", "\"frames\":4,\"height\":1000,\"width\":1000");
    parts.edit("\"layers\":2", "\"layers\":200000");
    parts.edit("\"masks\":[{\"step\":0,\"masks\":", "\"masks\":[{\"step\":0,\"masks\":100000");
    assert!(corrupt(&parts.build()).starts_with("manifest field masks: "));
}

#[test]
fn random_damage_below_sound_digests_never_panics() {
    let good = Parts::of(&sample().encode());
    let mut rng = Rng(11);
    for _ in 0..3000 {
        let mut parts = good.clone();
        for _ in 0..1 + rng.below(3) {
            let at = rng.below(parts.payloads.len() as u32) as usize;
            let part = &mut parts.payloads[at];
            let mut content = part.content();
            let byte = rng.below(content.len() as u32) as usize;
            content[byte] = match rng.below(3) {
                0 => 0xff,
                1 => content[byte] ^ 1 << rng.below(8),
                _ => rng.next() as u8,
            };
            part.set(content);
        }
        // What parses must be a plan that the verifier accepts, so that it encodes.
        if let Ok(bundle) = Bundle::parse(&parts.build()) {
            let contents = calibc_bundle::Contents {
                plan: bundle.plan(),
                kernels: bundle.kernels(),
                spec: bundle.spec(),
                report: bundle.report(),
                calibc_version: bundle.calibc_version(),
            };
            calibc_bundle::encode(&contents).unwrap();
        }
    }
}
