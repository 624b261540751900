//! JSON in which no object has a field twice: what the last of two would win, another reader of the
//! same body would take from the first.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::map::{Entry, Map};
use serde_json::{Number, Value};

use crate::error::{Invalid, shortened};
use crate::http::problem::Problem;

/// Parses a body, in time linear in its bytes; 128 levels deep at most.
///
/// # Errors
/// [`Problem::NotJson`], or the name of a field that an object has twice.
pub fn parse(body: &[u8]) -> Result<Value, Problem> {
    let mut twice = None;
    let mut reader = serde_json::Deserializer::from_slice(body);
    let value = Unique(&mut twice).deserialize(&mut reader);
    match (value.and_then(|value| reader.end().map(|()| value)), twice) {
        (Ok(value), _) => Ok(value),
        (Err(error), None) => Err(error.into()),
        (Err(error), Some(name)) => {
            let (line, column, name) = (error.line(), error.column(), shortened(&name, 64));
            let place = format!("line {line}, column {column}");
            Err(Invalid::new(&name, format!("{name} is given twice in one object: {place}")).into())
        }
    }
}

/// Reads a value, and notes the name of the first field that an object has twice.
struct Unique<'a>(&'a mut Option<String>);

impl<'de> DeserializeSeed<'de> for Unique<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<Value, D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Unique<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(Unique(&mut *self.0))? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(name) = fields.next_key::<String>()? {
            match map.entry(name) {
                Entry::Vacant(place) => {
                    place.insert(fields.next_value_seed(Unique(&mut *self.0))?);
                }
                Entry::Occupied(first) => {
                    *self.0 = Some(first.key().clone());
                    return Err(A::Error::custom("a field is given twice"));
                }
            }
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::problem::ErrorShape;
    use serde_json::json;

    #[test]
    fn a_value_is_read_as_serde_json_reads_it() {
        for text in [
            r#"{"a":[1,-2,2.0,1e300,18446744073709551615,true,null,"\u00e9\n"],"b":{"a":{}},"c":[]}"#,
            "[[]]",
            " 7 ",
            "{\"a\":1} x",
            "{\"a\":1",
            "{\"a\" 1}",
            "[1e400]",
            "\"\\ud800\"",
            "",
        ] {
            let expected = serde_json::from_str::<Value>(text).map_err(|e| e.to_string());
            let found = parse(text.as_bytes());
            match (expected, found) {
                (Ok(expected), Ok(found)) => assert_eq!(found, expected, "{text}"),
                (Err(_), Err(Problem::NotJson(_))) => {}
                other => panic!("{text}: {other:?}"),
            }
        }
        let nested = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n));
        assert!(parse(nested(100).as_bytes()).is_ok());
        assert!(matches!(parse(nested(100_000).as_bytes()), Err(Problem::NotJson(_))));
    }

    #[test]
    fn a_field_that_is_given_twice_is_refused_by_name_at_any_depth() {
        for (text, name) in [
            (r#"{"a":1,"b":2,"a":1}"#, "a"),
            (r#"{"m":[{"role":"user","role":"system"}]}"#, "role"),
            (r#"[{"x":{"y":[[{"\u0065":1,"e":null}]]}}]"#, "e"),
        ] {
            let problem = parse(text.as_bytes()).unwrap_err();
            assert_eq!(
                json!(problem.body(ErrorShape::OpenAi, ""))["error"]["param"],
                name,
                "{problem}"
            );
            assert!(
                problem.to_string().starts_with(&format!("{name} is given twice")),
                "{problem}"
            );
        }
        assert!(parse(br#"{"a":{"a":{"a":1}},"b":[{"a":1},{"a":1}]}"#).is_ok());
    }
}
