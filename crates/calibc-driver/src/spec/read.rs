//! Reading a spec file: strict YAML, errors with their place.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, de::IgnoredAny};

use super::{
    AnchorsSpec, BudgetSpec, CalibAttSpec, ExplicitSpec, GeometrySpec, MAX_SPEC_BYTES, MAX_STEPS, ModelSpec,
    PolicySpec, Problem, RepetitionSpec, ShareSpec, Spec, SpecError, TargetSpec,
};

/// The file as it is read. Generic over the policy: its kind is looked up first, so that fields stream straight into their
/// type and errors keep their line (a serde tag would buffer them and lose it).
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SpecFile<P> {
    name: Option<String>,
    description: Option<String>,
    model: Option<ModelSpec>,
    geometry: Option<GeometrySpec>,
    steps: Option<u32>,
    sigmas: Option<Vec<f64>>,
    policy: Option<P>,
    #[serde(default)]
    target: TargetSpec,
    #[serde(default)]
    share: ShareSpec,
}

/// Where the sections stand, and which policy it is.
#[derive(Deserialize)]
struct Probe {
    geometry: Option<serde_yaml::Spanned<IgnoredAny>>,
    steps: Option<serde_yaml::Spanned<IgnoredAny>>,
    sigmas: Option<serde_yaml::Spanned<IgnoredAny>>,
    policy: Option<serde_yaml::Spanned<PolicyProbe>>,
}

#[derive(Deserialize)]
struct PolicyProbe {
    kind: Option<serde_yaml::Spanned<String>>,
    repetition: Option<serde_yaml::Spanned<IgnoredAny>>,
    anchors: Option<serde_yaml::Spanned<IgnoredAny>>,
    step_floor: Option<serde_yaml::Spanned<IgnoredAny>>,
}

const POLICY_KINDS: [&str; 3] = ["calibatt", "budget", "explicit"];

impl Spec {
    /// Reads and checks the file at `path`.
    pub fn read(path: &Path) -> Result<Self, SpecError> {
        let io = |source| SpecError::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        // Not by the file's size: a pipe or a device has none, and may have no end.
        let mut text = Vec::new();
        file.take(MAX_SPEC_BYTES + 1).read_to_end(&mut text).map_err(io)?;
        if text.len() as u64 > MAX_SPEC_BYTES {
            return Err(SpecError::TooLarge { path: path.to_owned() });
        }
        let text = String::from_utf8(text).map_err(|_| SpecError::NotText { path: path.to_owned() })?;
        Self::parse(&text, path)
    }

    /// Parses and checks `text`; `path` is named in errors.
    pub fn parse(text: &str, path: &Path) -> Result<Self, SpecError> {
        let options = || {
            serde_yaml::options! {
                strict_booleans: true,
                with_snippet: false,
                merge_keys: serde_yaml::MergeKeyPolicy::Error,
                duplicate_keys: serde_yaml::DuplicateKeyPolicy::Error,
                reject_unsupported_tags: true,
            }
        };
        let fail = |error: serde_yaml::Error| SpecError::from_yaml(path, text, &error);
        let probe: Option<Probe> = serde_yaml::from_str_with_options(text, options()).map_err(fail)?;
        let Some(probe) = probe else {
            return Err(SpecError::at(path, (1, 1), Problem::Empty));
        };
        let kind = match &probe.policy {
            None => "calibatt",
            Some(policy) => match &policy.value.kind {
                Some(kind) if POLICY_KINDS.contains(&kind.value.as_str()) => kind.value.as_str(),
                Some(kind) => {
                    let problem = Problem::UnknownValue { value: kind.value.clone(), expected: POLICY_KINDS.to_vec() };
                    return Err(SpecError::at(path, place(&kind.referenced), problem));
                }
                None => {
                    let problem = Problem::MissingField { field: "kind" };
                    return Err(SpecError::at(path, place(&policy.referenced), problem));
                }
            },
        };
        let spec = match kind {
            "explicit" => serde_yaml::from_str_with_options::<SpecFile<ExplicitSpec>>(text, options())
                .map_err(fail)?
                .into_spec(PolicySpec::Explicit),
            "budget" => serde_yaml::from_str_with_options::<SpecFile<BudgetSpec>>(text, options())
                .map_err(fail)?
                .into_spec(PolicySpec::Budget),
            _ => serde_yaml::from_str_with_options::<SpecFile<CalibAttSpec>>(text, options())
                .map_err(fail)?
                .into_spec(PolicySpec::CalibAtt),
        };
        spec.check(path, &probe)?;
        Ok(spec)
    }

    /// What no single field can tell.
    fn check(&self, path: &Path, probe: &Probe) -> Result<(), SpecError> {
        let at = |section: &Option<serde_yaml::Spanned<_>>, problem| {
            let found = section.as_ref().map_or((1, 1), |s: &serde_yaml::Spanned<IgnoredAny>| place(&s.referenced));
            Err(SpecError::at(path, found, Problem::Value(problem)))
        };
        if let Some(geometry) = &self.geometry
            && let Err(error) = geometry.to_ir().validate()
        {
            return at(&probe.geometry, error.to_string());
        }
        if let Some(steps) = self.steps
            && !(1..=MAX_STEPS).contains(&steps)
        {
            return at(&probe.steps, format!("{steps} steps are out of range; give 1 to {MAX_STEPS}"));
        }
        if let Some(sigmas) = &self.sigmas {
            if sigmas.is_empty() || sigmas.len() > MAX_STEPS as usize {
                return at(&probe.sigmas, format!("{} sigmas are out of range; give 1 to {MAX_STEPS}", sigmas.len()));
            }
            if let Some(i) = sigmas.iter().position(|s| !s.is_finite() || *s < 0.0) {
                return at(&probe.sigmas, format!("sigma {i} is {}; give finite numbers of at least 0", sigmas[i]));
            }
            if let Some(steps) = self.steps
                && steps as usize != sigmas.len()
            {
                return at(&probe.sigmas, format!("{} sigmas for {steps} steps; give one per step", sigmas.len()));
            }
        }
        let given = probe.policy.as_ref().map(|policy| &policy.value);
        let (anchors, asked, off) = match &self.policy {
            PolicySpec::CalibAtt(CalibAttSpec { repetition: RepetitionSpec::On(on), .. }) => {
                (on.anchors, given.and_then(|policy| policy.repetition.as_ref()), "repetition: off")
            }
            PolicySpec::Budget(BudgetSpec { anchors: AnchorsSpec::Rows(rows), .. }) => {
                (*rows, given.and_then(|policy| policy.anchors.as_ref()), "anchors: off")
            }
            _ => (0, None, ""),
        };
        // The default of 5 anchors is dropped where it cannot be; what the file asks for is not.
        if let (Some(geometry), Some(asked)) = (&self.geometry, asked)
            && u32::from(anchors) > geometry.height
        {
            let height = geometry.height;
            let problem =
                format!("{anchors} anchor rows do not fit frames of {height} rows; lower anchors or set `{off}`");
            return Err(SpecError::at(path, place(&asked.referenced), Problem::Value(problem)));
        }
        if let PolicySpec::Budget(BudgetSpec { density, step_floor, .. }) = self.policy
            && let Some(asked) = given.and_then(|policy| policy.step_floor.as_ref())
            && step_floor > density
        {
            let problem = format!("{step_floor} is more than the density of {density}; give each step at most that");
            return Err(SpecError::at(path, place(&asked.referenced), Problem::Value(problem)));
        }
        Ok(())
    }

    /// The spec as YAML: every field in a fixed order, the same text for the same spec.
    pub fn to_yaml(&self) -> Result<String, SpecError> {
        serde_yaml::to_string(self).map_err(|e| SpecError::Unwritable { reason: e.to_string() })
    }

    /// The JSON Schema of spec files.
    pub fn json_schema() -> serde_json::Value {
        schemars::schema_for!(Spec).to_value()
    }
}

impl<P> SpecFile<P> {
    fn into_spec(self, policy: impl FnOnce(P) -> PolicySpec) -> Spec {
        let Self { name, description, model, geometry, steps, sigmas, policy: chosen, target, share } = self;
        let policy = chosen.map_or_else(PolicySpec::default, policy);
        Spec { name, description, model, geometry, steps, sigmas, policy, target, share }
    }
}

fn place(location: &serde_yaml::Location) -> (u64, u64) {
    (location.line(), location.column())
}
