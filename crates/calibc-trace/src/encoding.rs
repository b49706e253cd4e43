//! How energies are stored: three encodings, decoded to `f64` in a way that any other implementation can repeat bit for bit.

use std::fmt;

use half::f16;
use safetensors::Dtype;

/// Storage of block energies (and of block deviations).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// One byte: `2^(-code/8)`, and 0 for code 255. Relative error at most 4.4 %.
    Log2U8,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
}

/// `2^(-j/8)`, correctly rounded.
const EIGHTHS: [f64; 8] = [
    1.0,
    0.9170040432046712,
    0.8408964152537145,
    0.7711054127039704,
    std::f64::consts::FRAC_1_SQRT_2,
    0.6484197773255048,
    0.5946035575013605,
    0.5452538663326288,
];

/// `2^(-(2j+1)/16)`, correctly rounded: the borders between the codes.
const BORDERS: [f64; 8] = [
    0.9576032806985737,
    0.8781260801866497,
    0.8052451659746271,
    0.7384130729697497,
    0.6771277734684463,
    0.620928906036742,
    0.5693943173783458,
    0.5221368912137069,
];

/// `2^-k * roots[j]` at index `8 * k + j`. Scaling by a power of two is exact.
const fn scaled(roots: [f64; 8]) -> [f64; 256] {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let power = f64::from_bits((1023 - (code as u64 / 8)) << 52);
        table[code] = roots[code % 8] * power;
        code += 1;
    }
    table
}

/// Energy of each `log2-u8` code. Strictly falling, so codes order energies.
pub(crate) static ENERGY_OF_CODE: [f64; 256] = {
    let mut table = scaled(EIGHTHS);
    table[255] = 0.0;
    table
};

static BORDER_BELOW_CODE: [f64; 256] = scaled(BORDERS);

impl Encoding {
    /// Every encoding, in the order of their cost.
    pub const ALL: [Self; 3] = [Self::Log2U8, Self::F16, Self::F32];

    /// The manifest's word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Log2U8 => "log2-u8",
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }

    /// Bytes per element.
    pub fn bytes(self) -> usize {
        match self {
            Self::Log2U8 => 1,
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// How far a row of decoded energies may miss a sum of 1.
    pub fn tolerance(self) -> f64 {
        match self {
            Self::Log2U8 => 0.06,
            Self::F16 => 0.01,
            Self::F32 => 0.001,
        }
    }

    pub(crate) fn dtype(self) -> Dtype {
        match self {
            Self::Log2U8 => Dtype::U8,
            Self::F16 => Dtype::F16,
            Self::F32 => Dtype::F32,
        }
    }

    pub(crate) fn dtype_name(self) -> &'static str {
        match self {
            Self::Log2U8 => "U8",
            Self::F16 => "F16",
            Self::F32 => "F32",
        }
    }

    /// Decodes stored elements, little-endian, in order. A negative zero becomes zero.
    pub(crate) fn decode(self, bytes: &[u8]) -> impl Iterator<Item = f64> + '_ {
        bytes.chunks_exact(self.bytes()).map(move |b| match self {
            Self::Log2U8 => ENERGY_OF_CODE[usize::from(b[0])],
            Self::F16 => f16::from_le_bytes([b[0], b[1]]).to_f64() + 0.0,
            Self::F32 => f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])) + 0.0,
        })
    }

    /// Appends `values` as they are stored. `log2-u8` takes the nearest code, without calling a logarithm, so that every
    /// platform writes the same bytes.
    pub fn encode(self, values: &[f32], out: &mut Vec<u8>) {
        match self {
            Self::Log2U8 => out.extend(values.iter().map(|&e| code(f64::from(e)))),
            Self::F16 => out.extend(values.iter().flat_map(|&e| f16::from_f32(e).to_le_bytes())),
            Self::F32 => out.extend(values.iter().flat_map(|&e| e.to_le_bytes())),
        }
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// `round(-8 * log2(e))`, from 0 for everything near or above 1 to 255, which means 0.
fn code(e: f64) -> u8 {
    BORDER_BELOW_CODE[..255].partition_point(|&border| e < border) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_survives_a_round_trip_and_decodes_to_its_formula() {
        for c in 0..=255u8 {
            let e = ENERGY_OF_CODE[usize::from(c)];
            assert_eq!(code(e), c);
            let formula = if c == 255 { 0.0 } else { (-f64::from(c) / 8.0).exp2() };
            assert!((e - formula).abs() <= 2.0 * f64::EPSILON * formula, "code {c}");
        }
        assert!(ENERGY_OF_CODE.windows(2).all(|w| w[0] > w[1]));
    }

    #[test]
    fn codes_are_the_nearest_on_the_logarithmic_scale() {
        for i in 1..20_000u32 {
            let e = f64::from(i) / 20_000.0;
            let want = (-8.0 * e.log2()).round();
            assert_eq!(f64::from(code(e)), want.min(255.0), "{e}");
        }
        assert_eq!([code(2.0), code(0.0), code(1e-30), code(2f64.powi(-31))], [0, 255, 255, 248]);
    }

    #[test]
    fn halves_and_singles_widen_exactly_and_lose_the_sign_of_zero() {
        for encoding in [Encoding::F16, Encoding::F32] {
            let mut bytes = Vec::new();
            encoding.encode(&[0.25, -0.0, 1.0], &mut bytes);
            let decoded: Vec<f64> = encoding.decode(&bytes).collect();
            assert_eq!(decoded, [0.25, 0.0, 1.0]);
            assert!(decoded[1].is_sign_positive());
        }
    }
}
