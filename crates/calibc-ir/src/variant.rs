//! Kernel variants: what one compiled kernel is specialised for, how it is built, and which GPUs its machine code runs on.

use std::{fmt, str::FromStr};

use thiserror::Error;

/// Element type of q, k, v and out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DType {
    /// bfloat16.
    Bf16,
    /// IEEE half.
    Fp16,
}

impl DType {
    /// Every element type kernels are made for.
    pub const ALL: [Self; 2] = [Self::Bf16, Self::Fp16];
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::Fp16 => "fp16",
        })
    }
}

/// Not the name of an element type.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("`{0}` is not an element type; use bf16 or fp16")]
pub struct DTypeError(pub String);

impl FromStr for DType {
    type Err = DTypeError;

    fn from_str(s: &str) -> Result<Self, DTypeError> {
        Self::ALL.into_iter().find(|d| d.to_string() == s).ok_or_else(|| DTypeError(s.to_owned()))
    }
}

/// Head dimensions kernels are made for.
pub const HEAD_DIMS: [u32; 2] = [64, 128];

/// What a kernel is specialised for. `Display` is the symbol of its portable kernel; see [`Family::symbol`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Variant {
    /// Element type.
    pub dtype: DType,
    /// Head dimension, one of [`HEAD_DIMS`].
    pub head_dim: u32,
    /// Writes the log-sum-exp (natural log).
    pub lse: bool,
    /// Serves anchor-row heads beside dense and block-sparse ones.
    pub anchors: bool,
    /// Serves sequences that end inside a block.
    pub ragged: bool,
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "calibc_attn_{}_hd{}", self.dtype, self.head_dim)?;
        for (on, name) in [(self.lse, "_lse"), (self.anchors, "_anchors"), (self.ragged, "_ragged")] {
            f.write_str(if on { name } else { "" })?;
        }
        Ok(())
    }
}

/// A GPU architecture as compilers spell it: `sm_80`, `sm_90a`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Arch {
    /// Compute capability, major.
    pub major: u32,
    /// Compute capability, minor.
    pub minor: u32,
    /// `a`: the architecture's own instructions, and no other GPU runs it.
    pub specific: bool,
}

impl Arch {
    /// What `compile` targets unless told otherwise: Ampere and Ada through `sm_80`, Hopper through `sm_90a`.
    pub const DEFAULT: [Self; 2] =
        [Self { major: 8, minor: 0, specific: false }, Self { major: 9, minor: 0, specific: true }];

    /// Whether a cubin for this architecture runs on a GPU of compute capability `(major, minor)`.
    ///
    /// Machine code runs on later minor versions of its own major version; `a` code on exactly its own.
    pub fn runs_on(&self, (major, minor): (u32, u32)) -> bool {
        self.major == major && if self.specific { self.minor == minor } else { self.minor <= minor }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sm_{}{}{}", self.major, self.minor, if self.specific { "a" } else { "" })
    }
}

/// How kernels are built: one text per variant and family. A compiled kernel is a variant, a family and an architecture.
///
/// Every family has its own launch contract ([`crate::abi`]) and gives the same results up to rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// `mma.sync` and `cp.async`: what sm_80 has, so every architecture.
    Portable,
    /// `wgmma`, TMA and mbarriers, persistent: sm_90a alone.
    Hopper,
}

impl Family {
    /// Every family, the preferred one last.
    pub const ALL: [Self; 2] = [Self::Portable, Self::Hopper];

    /// The family that serves `arch` best.
    pub fn of(arch: Arch) -> Self {
        if Self::Hopper.compiles_for(arch) { Self::Hopper } else { Self::Portable }
    }

    /// Whether kernels of this family compile for `arch`.
    pub fn compiles_for(self, arch: Arch) -> bool {
        match self {
            Self::Portable => true,
            Self::Hopper => arch == Arch { major: 9, minor: 0, specific: true },
        }
    }

    /// Entry point of the kernel of `variant`: `{variant}`, and `{variant}_hopper` in the Hopper family.
    pub fn symbol(self, variant: &Variant) -> String {
        match self {
            Self::Portable => variant.to_string(),
            Self::Hopper => format!("{variant}_hopper"),
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Portable => "portable",
            Self::Hopper => "hopper",
        })
    }
}

/// Not the name of a family.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("`{0}` is not a kernel family; use portable or hopper")]
pub struct FamilyError(pub String);

impl FromStr for Family {
    type Err = FamilyError;

    fn from_str(s: &str) -> Result<Self, FamilyError> {
        Self::ALL.into_iter().find(|f| f.to_string() == s).ok_or_else(|| FamilyError(s.to_owned()))
    }
}

/// Not an architecture calibc makes kernels for.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("`{0}` is not a supported architecture; use one of sm_80, sm_86, sm_89, sm_90, sm_90a, sm_100, sm_120")]
pub struct ArchError(pub String);

impl FromStr for Arch {
    type Err = ArchError;

    fn from_str(s: &str) -> Result<Self, ArchError> {
        let (major, minor, specific) = match s {
            "sm_80" => (8, 0, false),
            "sm_86" => (8, 6, false),
            "sm_89" => (8, 9, false),
            "sm_90" => (9, 0, false),
            "sm_90a" => (9, 0, true),
            "sm_100" => (10, 0, false),
            "sm_120" => (12, 0, false),
            _ => return Err(ArchError(s.to_owned())),
        };
        Ok(Self { major, minor, specific })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_code_runs_within_its_major_version() {
        let arch = |s: &str| s.parse::<Arch>().unwrap();
        assert!(arch("sm_80").runs_on((8, 9)) && !arch("sm_86").runs_on((8, 0)));
        assert!(arch("sm_90a").runs_on((9, 0)) && !arch("sm_80").runs_on((9, 0)));
        assert!(arch("sm_120").runs_on((12, 1)) && !arch("sm_120").runs_on((10, 0)));
        assert_eq!(arch("sm_90a").to_string(), "sm_90a");
        assert!("sm_91".parse::<Arch>().is_err());
    }

    #[test]
    fn hopper_kernels_are_for_sm_90a_alone() {
        let arch = |s: &str| s.parse::<Arch>().unwrap();
        for name in ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"] {
            assert_eq!(Family::of(arch(name)), Family::Portable, "{name}");
            assert!(Family::Portable.compiles_for(arch(name)) && !Family::Hopper.compiles_for(arch(name)), "{name}");
        }
        assert_eq!(Family::of(arch("sm_90a")), Family::Hopper);
        assert!(Family::Portable.compiles_for(arch("sm_90a")));
        let variant = Variant { dtype: DType::Bf16, head_dim: 64, lse: true, anchors: false, ragged: false };
        let symbols = Family::ALL.map(|family| family.symbol(&variant));
        assert_eq!(symbols, ["calibc_attn_bf16_hd64_lse", "calibc_attn_bf16_hd64_lse_hopper"]);
        assert!(Family::ALL.iter().all(|family| family.to_string().parse() == Ok(*family)));
        assert!("ampere".parse::<Family>().is_err());
    }
}
