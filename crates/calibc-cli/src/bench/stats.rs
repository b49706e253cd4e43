//! What is said of a set of measurements.

use serde_json::{Value, json};

/// Percentiles that are reported, with their names; 50 is the median.
const REPORTED: [(&str, f64); 6] =
    [("min", 0.0), ("p10", 10.0), ("median", 50.0), ("p90", 90.0), ("p99", 99.0), ("max", 100.0)];

/// Measurements in ascending order, at least one.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Measured(Vec<f64>);

impl Measured {
    /// `None` without measurements.
    pub(super) fn new(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        if values.is_empty() { None } else { Some(Self(values)) }
    }

    /// The value that `p` percent of the measurements do not exceed, between two of them by linear interpolation (as NumPy does).
    pub(super) fn percentile(&self, p: f64) -> f64 {
        let Self(values) = self;
        let at = p / 100.0 * (values.len() - 1) as f64;
        let below = values[at.floor() as usize];
        let above = values[at.ceil() as usize];
        below + (above - below) * at.fract()
    }

    pub(super) fn median(&self) -> f64 {
        self.percentile(50.0)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The reported percentiles by name.
    pub(super) fn json(&self) -> Value {
        REPORTED
            .iter()
            .map(|&(name, p)| (name.to_owned(), json!(self.percentile(p))))
            .collect::<serde_json::Map<_, _>>()
            .into()
    }

    /// The reported percentiles, and over them the names, each 9 columns wide.
    pub(super) fn columns(&self) -> String {
        REPORTED.iter().map(|&(_, p)| format!("{:>9}", number(self.percentile(p)))).collect()
    }

    /// The names that stand over [`Measured::columns`].
    pub(super) fn names() -> String {
        REPORTED.iter().map(|(name, _)| format!("{name:>9}")).collect()
    }
}

/// Four significant digits at least, and no digits that say nothing.
pub(super) fn number(x: f64) -> String {
    match x {
        x if x < 10.0 => format!("{x:.3}"),
        x if x < 100.0 => format!("{x:.2}"),
        x => format!("{x:.1}"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn percentiles_are_numpys() {
        // numpy.percentile([7, 1, 3, 10], [0, 10, 50, 90, 99, 100])
        let measured = Measured::new(vec![7.0, 1.0, 3.0, 10.0]).unwrap();
        let got = REPORTED.map(|(_, p)| measured.percentile(p));
        for (got, want) in got.into_iter().zip([1.0, 1.6, 5.0, 9.1, 9.91, 10.0]) {
            assert!((got - want).abs() < 1e-12, "{got} {want}");
        }
        assert_eq!(measured.json()["p90"].as_f64().map(|x| (x * 10.0).round()), Some(91.0));
        assert_eq!(Measured::new(vec![2.5]).unwrap().percentile(99.0), 2.5);
        assert_eq!(Measured::new(vec![]), None);
    }

    #[test]
    fn columns_stand_under_their_names() {
        let measured = Measured::new(vec![0.5, 12.34, 123.45]).unwrap();
        assert_eq!(Measured::names(), "      min      p10   median      p90      p99      max");
        assert_eq!(measured.columns(), "    0.500    2.868    12.34    101.2    121.2    123.5");
    }

    proptest! {
        #[test]
        fn percentiles_ascend_within_the_measurements(values in proptest::collection::vec(0.0..1e6_f64, 1..60)) {
            let measured = Measured::new(values.clone()).unwrap();
            let got = REPORTED.map(|(_, p)| measured.percentile(p));
            prop_assert!(got.windows(2).all(|pair| pair[0] <= pair[1] * (1.0 + 1e-12)), "{:?}", got);
            prop_assert_eq!(got[0], values.iter().copied().fold(f64::INFINITY, f64::min));
            prop_assert_eq!(got[5], values.iter().copied().fold(0.0, f64::max));
            // Half of them are not above the median, half not below.
            let median = measured.median();
            prop_assert!(2 * values.iter().filter(|&&x| x <= median + 1e-9).count() >= values.len());
            prop_assert!(2 * values.iter().filter(|&&x| x >= median - 1e-9).count() >= values.len());
        }
    }
}
