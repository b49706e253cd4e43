//! Checks of single values, for `deserialize_with`: what is out of range is an error that names the rule.

use calibc_ir as ir;
use serde::Deserialize;
use serde::de::{self, Deserializer};

fn checked<'de, D: Deserializer<'de>, T: Deserialize<'de> + Copy + std::fmt::Display>(
    deserializer: D,
    holds: impl FnOnce(T) -> bool,
    rule: &str,
) -> Result<T, D::Error> {
    let value = T::deserialize(deserializer)?;
    if holds(value) { Ok(value) } else { Err(de::Error::custom(format_args!("{value} is out of range; {rule}"))) }
}

pub(super) fn positive<'de, D: Deserializer<'de>>(d: D) -> Result<u32, D::Error> {
    checked(d, |n: u32| n > 0, "give a whole number of at least 1")
}

pub(super) fn positive_u16<'de, D: Deserializer<'de>>(d: D) -> Result<u16, D::Error> {
    checked(d, |n: u16| n > 0, "give a whole number of at least 1")
}

pub(super) fn positive_u64<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
    checked(d, |n: u64| n > 0, "give a whole number of at least 1")
}

pub(super) fn head_dim<'de, D: Deserializer<'de>>(d: D) -> Result<u32, D::Error> {
    checked(d, |n: u32| ir::HEAD_DIMS.contains(&n), "kernels exist for a head_dim of 64 and 128")
}

pub(super) fn open_unit<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
    checked(d, |x: f64| x > 0.0 && x <= 1.0, "give a number above 0 and up to 1")
}

pub(super) fn closed_unit<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
    checked(d, |x: f64| (0.0..=1.0).contains(&x), "give a number from 0 to 1")
}

pub(super) fn below_one<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
    checked(d, |x: f64| (0.0..1.0).contains(&x), "give a number from 0 to below 1")
}

pub(super) fn finite<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
    checked(d, |x: f64| x.is_finite(), "give a finite number")
}

pub(super) fn finite_option<'de, D: Deserializer<'de>>(d: D) -> Result<Option<f64>, D::Error> {
    finite(d).map(Some)
}

pub(super) fn non_empty<'de, D: Deserializer<'de>, T: Deserialize<'de>>(d: D) -> Result<Vec<T>, D::Error> {
    let list = Vec::deserialize(d)?;
    if list.is_empty() { Err(de::Error::custom("the list is empty; name at least one")) } else { Ok(list) }
}
