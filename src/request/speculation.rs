//! Where the drafts of an answer come from.

use serde::Deserialize;
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

/// The sources that drafts of an answer may come from, and how drafted tokens are accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(from = "Named")]
pub struct Speculation {
    heads: bool,
    text: bool,
    model: bool,
    typical: bool,
}

/// As requests name it.
#[derive(Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "it must be auto, heads, text, model, off, typical, or a list of heads, text and model"
)]
enum Named {
    One(Name),
    Several(Vec<SourceName>),
}

/// `auto`: from every source there is, as far as it pays; `heads`, `text` or `model`: from that one
/// alone; `off`: from none; `typical`: as `auto`, with Medusa's lossy acceptance, where a drafted token
/// need only be typical of what the model would sample.
#[derive(Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(example = "auto")]
enum Name {
    Auto,
    Heads,
    Text,
    Model,
    Off,
    Typical,
}

/// A source of drafts: heads, earlier text, or a draft model.
#[derive(Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum SourceName {
    Heads,
    Text,
    Model,
}

impl From<Named> for Speculation {
    fn from(named: Named) -> Self {
        match named {
            Named::One(Name::Auto) => Self::AUTO,
            Named::One(Name::Heads) => Self::HEADS,
            Named::One(Name::Text) => Self::TEXT,
            Named::One(Name::Model) => Self::MODEL,
            Named::One(Name::Off) => Self::OFF,
            Named::One(Name::Typical) => Self::TYPICAL,
            Named::Several(sources) => Self {
                heads: sources.contains(&SourceName::Heads),
                text: sources.contains(&SourceName::Text),
                model: sources.contains(&SourceName::Model),
                typical: false,
            },
        }
    }
}

impl PartialSchema for Speculation {
    fn schema() -> RefOr<Schema> {
        Named::schema()
    }
}

impl ToSchema for Speculation {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        Named::schemas(schemas);
    }
}

impl Default for Speculation {
    fn default() -> Self {
        Self::AUTO
    }
}

impl Speculation {
    /// From no source.
    pub const OFF: Self = Self { heads: false, text: false, model: false, typical: false };
    /// From every source there is, as far as it pays; the answer is the same as without.
    pub const AUTO: Self = Self { heads: true, text: true, model: true, typical: false };
    /// The same, from heads alone.
    pub const HEADS: Self = Self { heads: true, ..Self::OFF };
    /// The same, from earlier text alone.
    pub const TEXT: Self = Self { text: true, ..Self::OFF };
    /// The same, from a draft model alone.
    pub const MODEL: Self = Self { model: true, ..Self::OFF };
    /// As `AUTO`, but a drafted token that is typical is accepted in place of a draw: lossy.
    pub const TYPICAL: Self = Self { typical: true, ..Self::AUTO };

    /// As requests name it; several sources are joined by `+`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match (self.heads, self.text, self.model) {
            _ if self.typical => "typical",
            (true, true, true) => "auto",
            (true, true, false) => "heads+text",
            (true, false, true) => "heads+model",
            (false, true, true) => "text+model",
            (true, false, false) => "heads",
            (false, true, false) => "text",
            (false, false, true) => "model",
            (false, false, false) => "off",
        }
    }

    /// What has such a [`name`](Self::name).
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        let sets = (0..8).map(|set| Self {
            heads: set & 1 != 0,
            text: set & 2 != 0,
            model: set & 4 != 0,
            typical: false,
        });
        sets.chain([Self::TYPICAL]).find(|speculation| speculation.name() == name)
    }

    /// `true` if nothing drafts.
    #[must_use]
    pub fn is_off(self) -> bool {
        self == Self::OFF
    }

    /// `true` if a drafted token need only be typical.
    #[must_use]
    pub fn is_typical(self) -> bool {
        self.typical
    }

    /// `true` if heads draft.
    #[must_use]
    pub fn by_heads(self) -> bool {
        self.heads
    }

    /// `true` if earlier text drafts.
    #[must_use]
    pub fn by_text(self) -> bool {
        self.text
    }

    /// `true` if a draft model drafts.
    #[must_use]
    pub fn by_model(self) -> bool {
        self.model
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{from_value, json};

    #[test]
    fn sources_are_named_alone_or_in_a_list() {
        for (named, is, name) in [
            (json!("auto"), Speculation::AUTO, "auto"),
            (json!("model"), Speculation::MODEL, "model"),
            (json!("typical"), Speculation::TYPICAL, "typical"),
            (json!([]), Speculation::OFF, "off"),
            (json!(["text", "heads", "model"]), Speculation::AUTO, "auto"),
            (json!(["heads"]), Speculation::HEADS, "heads"),
            (
                json!(["model", "text"]),
                Speculation { model: true, ..Speculation::TEXT },
                "text+model",
            ),
        ] {
            let read: Speculation = from_value(named).unwrap();
            assert_eq!((read, read.name()), (is, name));
            assert_eq!(Speculation::by_name(name), Some(is));
        }
        for bad in [json!("some"), json!(true), json!(["off"]), json!(["auto"]), json!({})] {
            let error = from_value::<Speculation>(bad).unwrap_err().to_string();
            assert!(error.starts_with("it must be auto, heads"), "{error}");
        }
        assert_eq!(Speculation::by_name("model+text"), None);
    }
}
