//! From what the spec says and what the traces are to the job: everything filled in, nothing contradictory.

use std::fmt;

use calibc_ir::{Arch, Geometry, Model};

use crate::error::DriverError;
use crate::spec::{AnchorsSpec, ArchSpec, GeometrySpec, ModelSpec, PolicySpec, RepetitionSpec, Spec};

/// Most sites of a plan: thirty times those of the largest models. A slip of the pen must not take all memory.
pub const MAX_SITES: u64 = 1 << 22;

/// What the traces say of the problem.
#[derive(Clone, Copy, Debug)]
pub struct TraceFacts<'a> {
    /// The attention stack.
    pub model: &'a Model,
    /// The token grid.
    pub geometry: &'a Geometry,
    /// Noise level of each step.
    pub sigmas: &'a [f64],
}

/// A field in which a spec and the traces differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The field, as the spec spells it: `geometry.height`.
    pub field: &'static str,
    /// Its value in the spec.
    pub spec: String,
    /// Its value in the traces.
    pub traces: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: spec {}, traces {}", self.field, self.spec, self.traces)
    }
}

/// One compile job.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// The attention stack.
    pub model: Model,
    /// The token grid.
    pub geometry: Geometry,
    /// Noise level of each step.
    pub sigmas: Vec<f64>,
    /// Architectures machine code is made for, ascending, each once.
    pub archs: Vec<Arch>,
    /// The spec with every field filled in.
    pub spec: Spec,
}

fn push<T: PartialEq + fmt::Display>(found: &mut Vec<Difference>, field: &'static str, spec: T, traces: T) {
    if spec != traces {
        found.push(Difference { field, spec: spec.to_string(), traces: traces.to_string() });
    }
}

/// Every field in which `spec` and the traces differ, in the order of the spec.
fn differences(spec: &Spec, traces: &TraceFacts<'_>) -> Vec<Difference> {
    let mut found = Vec::new();
    if let Some(ModelSpec { name, layers, heads, head_dim }) = &spec.model {
        if let Some(name) = name {
            push(&mut found, "model.name", name, &traces.model.name);
        }
        push(&mut found, "model.layers", *layers, traces.model.layers);
        push(&mut found, "model.heads", *heads, traces.model.heads);
        push(&mut found, "model.head_dim", *head_dim, traces.model.head_dim);
    }
    if let Some(geometry) = &spec.geometry {
        // Destructured whole: a new field of the geometry must be compared as well.
        let Geometry { frames, height, width, text_tokens, text_position, layout, kv_tokens } = geometry.to_ir();
        let keys = |tokens: Option<u32>| tokens.map_or("those of the queries".to_owned(), |n| n.to_string());
        let of = traces.geometry;
        push(&mut found, "geometry.frames", frames, of.frames);
        push(&mut found, "geometry.height", height, of.height);
        push(&mut found, "geometry.width", width, of.width);
        push(&mut found, "geometry.text_tokens", text_tokens, of.text_tokens);
        push(&mut found, "geometry.text_position", text_position.to_string(), of.text_position.to_string());
        push(&mut found, "geometry.layout", layout.to_string(), of.layout.to_string());
        push(&mut found, "geometry.kv_tokens", keys(kv_tokens), keys(of.kv_tokens));
    }
    if let Some(steps) = spec.steps {
        push(&mut found, "steps", steps as usize, traces.sigmas.len());
    }
    if let Some(sigmas) = &spec.sigmas {
        if sigmas.len() != traces.sigmas.len() {
            push(&mut found, "sigmas", format!("{} values", sigmas.len()), format!("{} values", traces.sigmas.len()));
        } else if let Some((a, b)) = sigmas.iter().zip(traces.sigmas).find(|(a, b)| a != b) {
            push(&mut found, "sigmas", *a, *b);
        }
    }
    found
}

/// The job that `spec` and the traces, if there are any, describe together. `archs`, unless empty, replace the spec's.
///
/// # Errors
/// [`DriverError::SpecIsNotForTraces`] where the two differ, [`DriverError::SpecIsIncomplete`] where neither says,
/// [`DriverError::TooManySites`] where no memory would do.
pub fn resolve(spec: &Spec, traces: Option<&TraceFacts<'_>>, archs: &[Arch]) -> Result<Job, DriverError> {
    if let Some(traces) = traces {
        let differences = differences(spec, traces);
        if !differences.is_empty() {
            return Err(DriverError::SpecIsNotForTraces { differences });
        }
    } else if !matches!(spec.policy, PolicySpec::Explicit(_)) {
        return Err(DriverError::PolicyNeedsTraces);
    }
    let missing = |field| DriverError::SpecIsIncomplete { field };
    let geometry = match (traces, &spec.geometry) {
        (Some(traces), _) => *traces.geometry,
        (None, Some(geometry)) => geometry.to_ir(),
        (None, None) => return Err(missing("geometry")),
    };
    let model = match (traces, &spec.model) {
        (Some(traces), _) => traces.model.clone(),
        (None, Some(ModelSpec { name, layers, heads, head_dim })) => {
            let name = name.clone().or_else(|| spec.name.clone()).unwrap_or_else(|| "unnamed".to_owned());
            Model { name, layers: *layers, heads: *heads, head_dim: *head_dim }
        }
        (None, None) => return Err(missing("model")),
    };
    let sigmas = match (traces, &spec.sigmas, spec.steps) {
        (Some(traces), ..) => traces.sigmas.to_vec(),
        (None, Some(sigmas), _) => sigmas.clone(),
        (None, None, Some(steps)) => (0..steps).map(|i| 1.0 - f64::from(i) / f64::from(steps)).collect(),
        (None, None, None) => return Err(missing("steps")),
    };
    // Three factors below 2^32 fit u128.
    if sigmas.len() as u128 * u128::from(model.layers) * u128::from(model.heads) > u128::from(MAX_SITES) {
        return Err(DriverError::TooManySites { steps: sigmas.len(), layers: model.layers, heads: model.heads });
    }
    let mut archs: Vec<Arch> =
        if archs.is_empty() { spec.target.archs.iter().map(|a| a.0).collect() } else { archs.to_vec() };
    archs.sort();
    archs.dedup();
    let mut spec = Spec {
        name: Some(spec.name.clone().unwrap_or_else(|| model.name.clone())),
        model: Some(ModelSpec {
            name: Some(model.name.clone()),
            layers: model.layers,
            heads: model.heads,
            head_dim: model.head_dim,
        }),
        geometry: Some(GeometrySpec::from_ir(&geometry)),
        steps: Some(sigmas.len() as u32),
        sigmas: Some(sigmas.clone()),
        ..spec.clone()
    };
    spec.target.archs = archs.iter().copied().map(ArchSpec).collect();
    spec.target.dtypes.sort();
    spec.target.dtypes.dedup();
    // The paper's five anchor rows cannot be where frames have fewer rows; specs that ask for them are refused when read.
    match &mut spec.policy {
        PolicySpec::CalibAtt(policy) => {
            if let RepetitionSpec::On(on) = policy.repetition
                && u32::from(on.anchors) > geometry.height
            {
                policy.repetition = RepetitionSpec::Off;
            }
        }
        PolicySpec::Budget(policy) => {
            if policy.anchors == AnchorsSpec::default() && geometry.height < 5 {
                policy.anchors = AnchorsSpec::Off;
            }
        }
        PolicySpec::Explicit(_) => {}
    }
    Ok(Job { model, geometry, sigmas, archs, spec })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn spec(text: &str) -> Spec {
        Spec::parse(text, Path::new("p.yaml")).unwrap()
    }

    fn facts() -> (Model, Geometry, Vec<f64>) {
        let model = Model { name: "small".into(), layers: 2, heads: 3, head_dim: 64 };
        (model, Geometry::video(4, 8, 8), vec![1.0, 0.5])
    }

    #[test]
    fn every_difference_is_named() {
        let (model, geometry, sigmas) = facts();
        let traces = TraceFacts { model: &model, geometry: &geometry, sigmas: &sigmas };
        let text = "model: {name: big, layers: 3, heads: 4, head_dim: 128}\nsteps: 3\n\
                    geometry: {frames: 5, height: 9, width: 10, text_tokens: 7, text_position: after, layout: {tile: [1, 2, 2]}, kv_tokens: ~}\n";
        let Err(DriverError::SpecIsNotForTraces { differences }) = resolve(&spec(text), Some(&traces), &[]) else {
            panic!("these differ")
        };
        let fields: Vec<_> = differences.iter().map(|d| d.field).collect();
        assert_eq!(
            fields,
            [
                "model.name",
                "model.layers",
                "model.heads",
                "model.head_dim",
                "geometry.frames",
                "geometry.height",
                "geometry.width",
                "geometry.text_tokens",
                "geometry.text_position",
                "geometry.layout",
                "steps"
            ]
        );
        assert_eq!(differences[4].to_string(), "geometry.frames: spec 5, traces 4");
        let sigma = resolve(&spec("sigmas: [1.0, 0.25]"), Some(&traces), &[]).unwrap_err();
        assert_eq!(sigma.to_string().lines().last(), Some("  sigmas: spec 0.25, traces 0.5"));
    }

    #[test]
    fn what_the_spec_leaves_out_comes_from_the_traces() {
        let (model, geometry, sigmas) = facts();
        let traces = TraceFacts { model: &model, geometry: &geometry, sigmas: &sigmas };
        let job = resolve(&Spec::default(), Some(&traces), &[]).unwrap();
        assert_eq!((&job.model, &job.geometry, &job.sigmas), (&model, &geometry, &sigmas));
        assert_eq!(job.archs, Arch::DEFAULT);
        // The effective spec says it all: it resolves to itself, with and without the traces.
        assert_eq!(resolve(&job.spec, Some(&traces), &[]).unwrap(), job);
        let yaml = job.spec.to_yaml().unwrap();
        assert_eq!(spec(&yaml), job.spec);
    }

    #[test]
    fn archs_of_the_command_line_win() {
        let (model, geometry, sigmas) = facts();
        let traces = TraceFacts { model: &model, geometry: &geometry, sigmas: &sigmas };
        let archs = ["sm_90a", "sm_80", "sm_90a"].map(|a| a.parse().unwrap());
        let job = resolve(&spec("target: {archs: [sm_120]}"), Some(&traces), &archs).unwrap();
        assert_eq!(job.archs, Arch::DEFAULT);
        assert_eq!(job.spec.target.archs.len(), 2);
    }

    #[test]
    fn without_traces_the_spec_must_say_it_all() {
        let whole =
            "model: {layers: 1, heads: 1, head_dim: 64}\ngeometry: {frames: 1, height: 2, width: 2}\nsteps: 4\n";
        let explicit = "policy: {kind: explicit, masks: m}\n";
        let job = resolve(&spec(&format!("{whole}{explicit}")), None, &[]).unwrap();
        assert_eq!(job.sigmas, [1.0, 0.75, 0.5, 0.25]);
        assert!(matches!(resolve(&spec(whole), None, &[]), Err(DriverError::PolicyNeedsTraces)));
        for (line, field) in whole.lines().zip(["model", "geometry", "steps"]) {
            let text = format!("{}{explicit}", whole.replace(line, ""));
            let found = resolve(&spec(&text), None, &[]);
            assert!(matches!(found, Err(DriverError::SpecIsIncomplete { field: f }) if f == field), "{field}");
        }
    }

    #[test]
    fn anchors_that_cannot_be_are_dropped() {
        let (model, _, sigmas) = facts();
        let geometry = Geometry::video(4, 4, 8);
        let traces = TraceFacts { model: &model, geometry: &geometry, sigmas: &sigmas };
        let job = resolve(&Spec::default(), Some(&traces), &[]).unwrap();
        let PolicySpec::CalibAtt(policy) = job.spec.policy else { panic!("the default is calibatt") };
        assert_eq!(policy.repetition, RepetitionSpec::Off);
    }
}
