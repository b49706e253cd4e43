//! What can be wrong with a spec file, with line, column and a suggestion.

use std::fmt;
use std::path::{Path, PathBuf};

use serde_yaml::Error as YamlError;
use thiserror::Error;

use super::MAX_SPEC_BYTES;

/// Why a spec was refused.
#[derive(Debug, Error)]
pub enum SpecError {
    /// The file cannot be read.
    #[error("cannot read the spec {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is far larger than any spec.
    #[error("the spec {} has more than the {MAX_SPEC_BYTES} bytes a spec may have; is it the right file?", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The file is not UTF-8.
    #[error("the spec {} is not UTF-8 text; save it as UTF-8 YAML", path.display())]
    NotText {
        /// The file.
        path: PathBuf,
    },
    /// Something in the file is wrong.
    #[error("{}:{line}:{column}: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: u64,
        /// Column, from 1.
        column: u64,
        /// What is wrong.
        problem: Problem,
    },
    /// The effective spec cannot be spelled as YAML.
    #[error("the effective spec cannot be written as YAML: {reason}")]
    Unwritable {
        /// Why.
        reason: String,
    },
}

/// What is wrong at one place of a spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// The file holds nothing.
    Empty,
    /// A field the spec does not have.
    UnknownField {
        /// The field.
        field: String,
        /// Fields of that section.
        expected: Vec<&'static str>,
    },
    /// A word where one of a few others must stand.
    UnknownValue {
        /// The word.
        value: String,
        /// The words it may be.
        expected: Vec<&'static str>,
    },
    /// A required field is absent.
    MissingField {
        /// The field.
        field: &'static str,
    },
    /// A field is given twice.
    DuplicateField {
        /// The field.
        field: String,
    },
    /// A value of another type.
    WrongType {
        /// What must stand there.
        expected: String,
        /// What does, where known.
        found: Option<String>,
    },
    /// A value of the right type that cannot be.
    Value(String),
    /// Not YAML, or YAML that specs do not use.
    Syntax(String),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("the file is empty; give at least `policy: {kind: calibatt}`"),
            Self::UnknownField { field, expected } => {
                write!(f, "unknown field `{field}`")?;
                suggest(f, field, expected)
            }
            Self::UnknownValue { value, expected } => {
                write!(f, "unknown value `{value}`")?;
                suggest(f, value, expected)
            }
            Self::MissingField { field } => write!(f, "the field `{field}` is missing; add it to this section"),
            Self::DuplicateField { field } => write!(f, "the field `{field}` is given twice; remove one"),
            Self::WrongType { expected, found: Some(found) } => write!(f, "expected {expected}, found {found}"),
            Self::WrongType { expected, found: None } => write!(f, "expected {expected}"),
            Self::Value(problem) | Self::Syntax(problem) => f.write_str(problem),
        }
    }
}

/// `; did you mean X?` where X is near, else the words there are.
fn suggest(f: &mut fmt::Formatter<'_>, word: &str, expected: &[&str]) -> fmt::Result {
    let near = expected
        .iter()
        .map(|candidate| (strsim::jaro_winkler(&word.to_lowercase(), candidate), candidate))
        .filter(|(score, _)| *score >= 0.75)
        // Equal scores: the first of the list.
        .reduce(|best, next| if next.0 > best.0 { next } else { best });
    match near {
        Some((_, candidate)) => write!(f, "; did you mean `{candidate}`?"),
        None if expected.is_empty() => f.write_str("; no field fits here"),
        None => {
            f.write_str("; use ")?;
            for (i, candidate) in expected.iter().enumerate() {
                let link = match i {
                    0 => "",
                    _ if i + 1 == expected.len() => " or ",
                    _ => ", ",
                };
                write!(f, "{link}`{candidate}`")?;
            }
            Ok(())
        }
    }
}

/// The bare word that stands at `(line, column)`.
fn word_at(text: &str, (line, column): (u64, u64)) -> Option<String> {
    let line = text.lines().nth(usize::try_from(line).ok()?.checked_sub(1)?)?;
    let rest = line.chars().skip(usize::try_from(column).ok()?.checked_sub(1)?);
    let word: String = rest.take_while(|c| c.is_alphanumeric() || "+-._".contains(*c)).take(40).collect();
    (!word.is_empty()).then(|| format!("`{word}`"))
}

/// What Rust's type names mean to a reader of YAML.
fn plain(expected: &str) -> String {
    match expected {
        "u16" | "u32" | "u64" | "usize" => "a whole number".to_owned(),
        "f64" | "f32" | "float" | "floating point" => "a number".to_owned(),
        "bool" => "`true` or `false`".to_owned(),
        "mapping start" => "a mapping of fields".to_owned(),
        "sequence start" => "a list".to_owned(),
        "scalar" => "a single value".to_owned(),
        other if other.starts_with("struct ") => "a mapping of fields".to_owned(),
        other => other.to_owned(),
    }
}

impl SpecError {
    /// An error at `(line, column)` of `path`.
    pub(crate) fn at(path: &Path, (line, column): (u64, u64), problem: Problem) -> Self {
        Self::Invalid { path: path.to_owned(), line: line.max(1), column: column.max(1), problem }
    }

    /// What the YAML reader found, in our words.
    pub(crate) fn from_yaml(path: &Path, text: &str, error: &YamlError) -> Self {
        let error = error.without_snippet();
        let place = error.location().map_or((1, 1), |l| (l.line(), l.column()));
        let problem = match error {
            YamlError::SerdeUnknownField { field, expected, .. } => {
                Problem::UnknownField { field: field.clone(), expected: expected.clone() }
            }
            YamlError::SerdeUnknownVariant { variant, expected, .. } => {
                Problem::UnknownValue { value: variant.clone(), expected: expected.clone() }
            }
            YamlError::SerdeMissingField { field, .. } => Problem::MissingField { field },
            YamlError::DuplicateMappingKey { key, .. } => {
                Problem::DuplicateField { field: key.clone().unwrap_or_default() }
            }
            YamlError::InvalidScalar { ty, .. } => {
                Problem::WrongType { expected: plain(ty), found: word_at(text, place) }
            }
            YamlError::InvalidBooleanStrict { .. } => {
                Problem::WrongType { expected: plain("bool"), found: word_at(text, place) }
            }
            YamlError::NullIntoString { .. } => {
                Problem::WrongType { expected: "text".to_owned(), found: Some("nothing".to_owned()) }
            }
            YamlError::SerdeInvalidType { unexpected, expected, .. }
            | YamlError::SerdeInvalidValue { unexpected, expected, .. } => {
                Problem::WrongType { expected: plain(expected), found: Some(unexpected.clone()) }
            }
            YamlError::SerdeInvalidLength { len, expected, .. } => {
                Problem::WrongType { expected: plain(expected), found: Some(format!("{len} items")) }
            }
            YamlError::Unexpected { expected, .. } => {
                Problem::WrongType { expected: plain(expected), found: word_at(text, place) }
            }
            YamlError::Message { msg, .. } => Problem::Value(msg.clone()),
            other => {
                let text = other.render_with_formatter(&serde_yaml::UserMessageFormatter);
                // The place leads our message; the reader repeats it at the end of its own.
                let text = text.split(" at line ").next().unwrap_or_default().trim_end_matches(&[',', ':', ' '][..]);
                Problem::Syntax(text.to_owned())
            }
        };
        Self::at(path, place, problem)
    }
}
