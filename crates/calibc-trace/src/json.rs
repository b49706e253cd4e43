//! A JSON document as written (order and repeats kept), and a reader that collects every problem with its field's path.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

use crate::error::TraceError;

/// A JSON value. Objects are pairs in document order, so that repeated fields are seen.
pub(crate) enum Node {
    Null,
    Bool,
    Whole(u64),
    Number(f64),
    Text(String),
    List(Vec<Node>),
    Object(Vec<(String, Node)>),
}

impl Node {
    /// What the value is, in the words of an error.
    fn describe(&self) -> String {
        match self {
            Self::Null => "null".into(),
            Self::Bool => "a truth value".into(),
            Self::Whole(n) => n.to_string(),
            Self::Number(n) => n.to_string(),
            Self::Text(_) => "a string".into(),
            Self::List(_) => "a list".into(),
            Self::Object(_) => "an object".into(),
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Nodes;
        impl<'de> Visitor<'de> for Nodes {
            type Value = Node;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON value")
            }

            fn visit_unit<E>(self) -> Result<Node, E> {
                Ok(Node::Null)
            }

            fn visit_bool<E>(self, _: bool) -> Result<Node, E> {
                Ok(Node::Bool)
            }

            fn visit_u64<E>(self, n: u64) -> Result<Node, E> {
                Ok(Node::Whole(n))
            }

            fn visit_i64<E>(self, n: i64) -> Result<Node, E> {
                Ok(Node::Number(n as f64))
            }

            fn visit_f64<E>(self, n: f64) -> Result<Node, E> {
                Ok(Node::Number(n))
            }

            fn visit_str<E>(self, text: &str) -> Result<Node, E> {
                Ok(Node::Text(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
                let mut list = Vec::new();
                while let Some(node) = seq.next_element()? {
                    list.push(node);
                }
                Ok(Node::List(list))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
                let mut object = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    object.push(pair);
                }
                Ok(Node::Object(object))
            }
        }
        deserializer.deserialize_any(Nodes)
    }
}

/// The known fields of one object.
pub(crate) struct Fields<'a> {
    at: String,
    found: Vec<(&'static str, &'a Node)>,
}

impl<'a> Fields<'a> {
    /// The field, if it was given; its absence has been reported if it is required.
    pub(crate) fn get(&self, name: &str) -> Option<&'a Node> {
        self.found.iter().find(|(known, _)| *known == name).map(|&(_, node)| node)
    }

    /// The field's path from the root.
    pub(crate) fn path(&self, name: &str) -> String {
        if self.at.is_empty() { name.to_owned() } else { format!("{}.{name}", self.at) }
    }
}

/// Reads fields and collects what is wrong with them. `None` always means that a problem was recorded, or that an optional
/// field was left out.
#[derive(Default)]
pub(crate) struct Reader {
    pub(crate) problems: Vec<TraceError>,
}

impl Reader {
    pub(crate) fn mistyped(&mut self, field: String, expected: impl Into<String>, found: &Node) {
        self.problems.push(TraceError::FieldType { field, expected: expected.into(), found: found.describe() });
    }

    /// The object at `at`: unknown, repeated and missing fields are recorded.
    pub(crate) fn object<'a>(
        &mut self,
        at: String,
        node: &'a Node,
        required: &[&'static str],
        optional: &[&'static str],
    ) -> Option<Fields<'a>> {
        let Node::Object(pairs) = node else {
            self.mistyped(if at.is_empty() { "the document".into() } else { at }, "an object", node);
            return None;
        };
        let mut fields = Fields { at, found: Vec::new() };
        for (name, node) in pairs {
            let Some(&known) = required.iter().chain(optional).find(|known| *known == name) else {
                self.problems.push(TraceError::UnknownField { field: fields.path(name) });
                continue;
            };
            if fields.get(known).is_some() {
                self.problems.push(TraceError::DuplicateField { field: fields.path(known) });
            } else {
                fields.found.push((known, node));
            }
        }
        for name in required {
            if fields.get(name).is_none() {
                self.problems.push(TraceError::MissingField { field: fields.path(name) });
            }
        }
        Some(fields)
    }

    pub(crate) fn text<'a>(&mut self, fields: &Fields<'a>, name: &'static str) -> Option<&'a str> {
        match fields.get(name)? {
            Node::Text(text) => Some(text),
            other => {
                self.mistyped(fields.path(name), "a string", other);
                None
            }
        }
    }

    pub(crate) fn list<'a>(&mut self, fields: &Fields<'a>, name: &'static str) -> Option<&'a [Node]> {
        match fields.get(name)? {
            Node::List(list) => Some(list),
            other => {
                self.mistyped(fields.path(name), "a list", other);
                None
            }
        }
    }

    /// A whole number of at most `max`.
    pub(crate) fn whole_at(&mut self, field: impl FnOnce() -> String, node: &Node, max: u64) -> Option<u64> {
        match node {
            Node::Whole(n) if *n <= max => Some(*n),
            other => {
                self.mistyped(field(), format!("a whole number from 0 to {max}"), other);
                None
            }
        }
    }

    pub(crate) fn whole(&mut self, fields: &Fields<'_>, name: &'static str) -> Option<u64> {
        self.whole_at(|| fields.path(name), fields.get(name)?, u64::MAX)
    }

    pub(crate) fn whole32(&mut self, fields: &Fields<'_>, name: &'static str) -> Option<u32> {
        self.whole_at(|| fields.path(name), fields.get(name)?, u64::from(u32::MAX)).map(|n| n as u32)
    }

    pub(crate) fn number(&mut self, fields: &Fields<'_>, name: &'static str) -> Option<f64> {
        match fields.get(name)? {
            Node::Whole(n) => Some(*n as f64),
            Node::Number(n) => Some(*n),
            other => {
                self.mistyped(fields.path(name), "a number", other);
                None
            }
        }
    }
}
