//! Which fields a documented body and the objects in it have.

use std::collections::BTreeMap;

use serde_json::Value;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{AdditionalProperties, ArrayItems, Object, Schema};

/// What becomes of a field that nobody knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unknown {
    /// It is ignored, and named in the answer's head.
    Ignored,
    /// The body is refused.
    Refused,
}

/// The fields that a value may have, as a schema names them; of alternatives those of all.
#[derive(Debug, Default)]
pub struct Shape {
    /// Of an object; `None`: any.
    fields: Option<BTreeMap<String, Shape>>,
    /// Of a list's items.
    items: Option<Box<Shape>>,
    /// An object may have others.
    is_open: bool,
}

/// Deeper objects may have any fields.
const MAX_DEPTH: usize = 16;

impl Shape {
    /// Of a body; `parts` are what it refers to.
    pub fn of(schema: &Object, parts: &[(String, RefOr<Schema>)]) -> Self {
        let mut shape = Self::default();
        shape.add(&Schema::Object(schema.clone()), parts, MAX_DEPTH);
        shape
    }

    fn add(&mut self, schema: &Schema, parts: &[(String, RefOr<Schema>)], depth: usize) {
        if depth == 0 {
            self.is_open = true;
            return;
        }
        match schema {
            Schema::Object(object) => {
                self.is_open |= match object.additional_properties.as_deref() {
                    None | Some(AdditionalProperties::FreeForm(false)) => false,
                    Some(_) => true,
                };
                for (name, field) in &object.properties {
                    let fields = self.fields.get_or_insert_default();
                    fields.entry(name.clone()).or_default().add_ref(field, parts, depth - 1);
                }
            }
            Schema::Array(array) => {
                if let ArrayItems::RefOrSchema(item) = &array.items {
                    self.items.get_or_insert_default().add_ref(item, parts, depth - 1);
                }
            }
            Schema::OneOf(of) => of.items.iter().for_each(|s| self.add_ref(s, parts, depth)),
            Schema::AllOf(of) => of.items.iter().for_each(|s| self.add_ref(s, parts, depth)),
            Schema::AnyOf(of) => of.items.iter().for_each(|s| self.add_ref(s, parts, depth)),
            _ => self.is_open = true,
        }
    }

    fn add_ref(&mut self, schema: &RefOr<Schema>, parts: &[(String, RefOr<Schema>)], depth: usize) {
        match schema {
            RefOr::T(schema) => self.add(schema, parts, depth),
            RefOr::Ref(to) => {
                let name = to.ref_location.rsplit('/').next().unwrap_or_default();
                match parts.iter().find(|(part, _)| part == name) {
                    Some((_, part)) => self.add_ref(part, parts, depth.saturating_sub(1)),
                    None => self.is_open = true,
                }
            }
        }
    }

    /// Takes every field out of `value` that the shape does not have, and names each to `unknown`,
    /// by its path from `at`.
    ///
    /// # Errors
    /// The first of `unknown`.
    pub fn strip<E>(
        &self,
        value: &mut Value,
        at: &str,
        unknown: &mut impl FnMut(&str, &Value) -> Result<(), E>,
    ) -> Result<(), E> {
        match (value, &self.fields, &self.items) {
            (Value::Object(map), Some(fields), _) => {
                let path = |name: &str| {
                    if at.is_empty() { name.to_owned() } else { format!("{at}.{name}") }
                };
                let mut noted = Ok(());
                map.retain(|name, value| {
                    let is_known = self.is_open || fields.contains_key(name);
                    if !is_known && noted.is_ok() {
                        noted = unknown(&path(name), value);
                    }
                    is_known
                });
                noted?;
                map.iter_mut().try_for_each(|(name, value)| match fields.get(name) {
                    Some(field) => field.strip(value, &path(name), unknown),
                    None => Ok(()),
                })
            }
            (Value::Array(list), _, Some(item)) => {
                let at = format!("{at}[]");
                list.iter_mut().try_for_each(|value| item.strip(value, &at, unknown))
            }
            _ => Ok(()),
        }
    }
}
