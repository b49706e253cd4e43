//! What a cubin says of its own kernels, for compiles that ptxas did not report on.

use object::read::elf::ElfFile64;
use object::{Endianness, Object, ObjectSection, ObjectSymbol, SymbolIndex};

use crate::report::Resources;

/// Attributes of `.nv.info`: format 4 is a size in bytes and as many bytes, here a symbol's index and a number; of the others the
/// two bytes after the attribute are the value.
const SIZED: u8 = 0x04;
const REGISTER_COUNT: u8 = 0x2f;
const FRAME_SIZE: u8 = 0x11;

/// What the entry function `symbol` takes; `None` where the cubin has no such kernel or does not say. The stack is that of the
/// largest function. Spills lie on the stack: without one there are none, and with one this cannot tell them apart, so that all of
/// it counts as spilled.
pub(crate) fn resources(cubin: &[u8], symbol: &str) -> Option<Resources> {
    let file = ElfFile64::<Endianness>::parse(cubin).ok()?;
    file.section_by_name(&format!(".text.{symbol}"))?;
    let shared = file.section_by_name(&format!(".nv.shared.{symbol}")).map_or(0, |section| section.size());
    let info = file.section_by_name(".nv.info")?.data().ok()?;
    let (mut registers, mut stack) = (None, None);
    let mut rest = info;
    while let [format, attribute, a, b, tail @ ..] = rest {
        let size = usize::from(u16::from_le_bytes([*a, *b]));
        rest = tail;
        if *format != SIZED {
            continue;
        }
        let payload = tail.get(..size)?;
        rest = &tail[size..];
        let [i0, i1, i2, i3, v0, v1, v2, v3] = *payload else { continue };
        let (index, value) = (u32::from_le_bytes([i0, i1, i2, i3]), u32::from_le_bytes([v0, v1, v2, v3]));
        let named = || file.symbol_by_index(SymbolIndex(index as usize)).ok()?.name().ok();
        match *attribute {
            REGISTER_COUNT if named() == Some(symbol) => registers = Some(value),
            FRAME_SIZE => stack = stack.max(Some(value)),
            _ => {}
        }
    }
    let stack_bytes = stack?;
    Some(Resources {
        registers: registers?,
        shared_bytes: u32::try_from(shared).ok()?,
        stack_bytes,
        spill_stores: stack_bytes,
        spill_loads: stack_bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Nvrtc, Request};

    const KERNELS: &str = "\
extern \"C\" __global__ void plain(float* out) {\n\
    __shared__ float shared[64];\n\
    shared[threadIdx.x] = out[threadIdx.x];\n\
    __syncthreads();\n\
    out[threadIdx.x] = shared[63 - threadIdx.x];\n\
}\n";

    fn compiled(nvrtc: &Nvrtc, symbol: &str) -> crate::Compiled {
        nvrtc.compile(&Request { source: KERNELS, symbol, arch: "sm_80" }).expect("a sound kernel")
    }

    #[test]
    fn a_cubin_says_what_ptxas_reports() {
        let Some(nvrtc) = crate::testing::nvrtc() else { return };
        let compiled = compiled(&nvrtc, "plain");
        let read = resources(&compiled.cubin, "plain").expect("the kernel is there");
        assert_eq!(read, compiled.resources);
        assert!(read.registers > 0 && read.shared_bytes == 256);
        assert_eq!(resources(&compiled.cubin, "other"), None);
    }

    #[test]
    fn damage_is_no_kernel() {
        let Some(nvrtc) = crate::testing::nvrtc() else { return };
        let cubin = compiled(&nvrtc, "plain").cubin;
        assert_eq!(resources(b"", "plain"), None);
        for end in (0..cubin.len()).step_by(97) {
            resources(&cubin[..end], "plain");
        }
    }
}
