//! The values of a rendering: Python's, as far as templates meet them. None can change but a
//! namespace, as in Jinja2's immutable sandbox.

use std::cmp::Ordering;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use indexmap::{Equivalent, IndexMap};

use super::error::{Error, MAX_NESTING, MAX_TEXT_BYTES};
use super::text::Text;

/// A value. What a renderer owns is known by its number there.
#[derive(Clone, Debug)]
pub enum Value {
    /// Of a name or attribute that is not there; it prints as nothing.
    Undefined(Arc<str>),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(Text),
    List(Arc<List>),
    Tuple(Arc<List>),
    Dict(Arc<Dict>),
    Namespace(usize),
    Macro(usize),
    Loop(usize),
    /// Known by its name.
    Function(&'static str),
    Method(Arc<(Value, Arc<str>)>),
}

/// The items of a list or a tuple.
#[derive(Debug, Default)]
pub struct List {
    pub items: Vec<Value>,
    size: Size,
}

/// The items of a dictionary, in the order in which they came.
#[derive(Debug, Default)]
pub struct Dict {
    pub items: IndexMap<Key, Value>,
    size: Size,
}

/// What limits a walk over a value.
#[derive(Clone, Copy, Debug, Default)]
struct Size {
    /// Levels of lists and dictionaries in each other.
    nesting: usize,
    /// As in [`Value::weight`].
    weight: usize,
}

impl Size {
    /// Of a list or dictionary of `values`; an error where it is too much to walk.
    fn of<'a>(values: impl Iterator<Item = &'a Value>) -> Result<Self, Error> {
        let mut size = Self { nesting: 0, weight: Value::WEIGHT };
        for value in values {
            let nesting = match value {
                Value::List(list) | Value::Tuple(list) => list.size.nesting,
                Value::Dict(dict) => dict.size.nesting,
                _ => 0,
            };
            size.nesting = size.nesting.max(nesting);
            size.weight += value.weight();
            if size.weight > 4 * MAX_TEXT_BYTES {
                return Err(Error::new("a value holds too much"));
            }
        }
        size.nesting += 1;
        if size.nesting > MAX_NESTING {
            return Err(Error::new(format!("a value is nested over {MAX_NESTING} levels deep")));
        }
        Ok(size)
    }
}

impl Value {
    /// Bytes of a value beside its text.
    const WEIGHT: usize = 32;

    /// Bytes that a walk over it meets, however often it shares them.
    pub fn weight(&self) -> usize {
        match self {
            Self::Text(text) => Self::WEIGHT + text.len(),
            Self::List(list) | Self::Tuple(list) => list.size.weight,
            Self::Dict(dict) => dict.size.weight,
            _ => Self::WEIGHT,
        }
    }

    pub fn own(text: &str) -> Self {
        Self::Text(Text::own(text))
    }

    pub fn undefined(name: &str) -> Self {
        Self::Undefined(name.into())
    }

    pub fn list(items: Vec<Self>) -> Result<Self, Error> {
        let size = Size::of(items.iter())?;
        Ok(Self::List(Arc::new(List { items, size })))
    }

    pub fn tuple(items: Vec<Self>) -> Result<Self, Error> {
        let size = Size::of(items.iter())?;
        Ok(Self::Tuple(Arc::new(List { items, size })))
    }

    pub fn dict(items: IndexMap<Key, Self>) -> Result<Self, Error> {
        let size = Size::of(items.iter().flat_map(|(key, value)| [key.value(), value]))?;
        Ok(Self::Dict(Arc::new(Dict { items, size })))
    }

    /// A value from outside, and so are all its texts and keys.
    pub fn from_json(json: &serde_json::Value) -> Result<Self, Error> {
        use serde_json::Value as Json;
        Ok(match json {
            Json::Null => Self::None,
            Json::Bool(b) => Self::Bool(*b),
            Json::Number(n) => match (n.as_i64(), n.as_u64()) {
                (Some(n), _) => Self::Int(n.into()),
                (_, Some(n)) => Self::Int(n.into()),
                _ => Self::Float(n.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(text) => Self::Text(Text::outside(text)),
            Json::Array(items) => {
                Self::list(items.iter().map(Self::from_json).collect::<Result<_, _>>()?)?
            }
            Json::Object(items) => {
                let item = |(key, value): (&String, &Json)| {
                    Ok((Key(Self::Text(Text::outside(key))), Self::from_json(value)?))
                };
                Self::dict(items.iter().map(item).collect::<Result<_, Error>>()?)?
            }
        })
    }

    pub fn is_true(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(b) => *b,
            Self::Int(n) => *n != 0,
            Self::Float(x) => *x != 0.0,
            Self::Text(text) => !text.is_empty(),
            Self::List(list) | Self::Tuple(list) => !list.items.is_empty(),
            Self::Dict(dict) => !dict.items.is_empty(),
            _ => true,
        }
    }

    /// Its type's name in Python.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Text(_) => "str",
            Self::List(_) => "list",
            Self::Tuple(_) => "tuple",
            Self::Dict(_) => "dict",
            Self::Namespace(_) => "Namespace",
            Self::Macro(_) => "Macro",
            Self::Loop(_) => "LoopContext",
            Self::Function(_) => "function",
            Self::Method(_) => "builtin_function_or_method",
        }
    }

    /// An integer, as which Python also takes a bool.
    pub fn as_int(&self) -> Option<i128> {
        match self {
            Self::Bool(b) => Some((*b).into()),
            Self::Int(n) => Some(*n),
            _ => None,
        }
    }

    /// A number.
    pub fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float(x) => Some(*x),
            _ => self.as_int().map(|n| n as f64),
        }
    }

    pub fn as_text(&self) -> Option<&Text> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Number of items, or characters.
    pub fn len(&self) -> Result<usize, Error> {
        match self {
            Self::Undefined(_) => Ok(0),
            Self::Text(text) => Ok(text.chars().count()),
            Self::List(list) | Self::Tuple(list) => Ok(list.items.len()),
            Self::Dict(dict) => Ok(dict.items.len()),
            _ => Err(Error::new(format!("object of type '{}' has no len()", self.kind()))),
        }
    }

    /// What a loop over it meets.
    pub fn iterate(&self) -> Result<Vec<Self>, Error> {
        match self {
            Self::Undefined(_) => Ok(Vec::new()),
            Self::Text(text) => Ok(text.chars_of().into_iter().map(Self::Text).collect()),
            Self::List(list) | Self::Tuple(list) => Ok(list.items.clone()),
            Self::Dict(dict) => Ok(dict.items.keys().map(|key| key.0.clone()).collect()),
            _ => Err(Error::new(format!("'{}' object is not iterable", self.kind()))),
        }
    }

    /// The order of two values that Python can order.
    pub fn compare(&self, other: &Self) -> Result<Ordering, Error> {
        let fail = || {
            let (a, b) = (self.kind(), other.kind());
            Error::new(format!("'{a}' and '{b}' have no order"))
        };
        match (self, other) {
            (Self::Text(a), Self::Text(b)) => Ok(a.as_bytes().cmp(b.as_bytes())),
            (Self::List(a), Self::List(b)) | (Self::Tuple(a), Self::Tuple(b)) => {
                for (x, y) in a.items.iter().zip(&b.items) {
                    if x != y {
                        return x.compare(y);
                    }
                }
                Ok(a.items.len().cmp(&b.items.len()))
            }
            _ => match (self.as_int(), other.as_int()) {
                (Some(a), Some(b)) => Ok(a.cmp(&b)),
                _ => {
                    let (a, b) =
                        (self.as_float().ok_or_else(fail)?, other.as_float().ok_or_else(fail)?);
                    Ok(a.partial_cmp(&b).unwrap_or(Ordering::Greater))
                }
            },
        }
    }

    /// Whether it holds `item`.
    pub fn contains(&self, item: &Self) -> Result<bool, Error> {
        match self {
            Self::Undefined(_) => Ok(false),
            Self::Text(text) => match item {
                Self::Text(part) => Ok(text.contains(&**part)),
                _ => {
                    let kind = item.kind();
                    Err(Error::new(format!(
                        "'in <string>' requires string as left operand, not {kind}"
                    )))
                }
            },
            Self::List(list) | Self::Tuple(list) => Ok(list.items.contains(item)),
            Self::Dict(dict) => Ok(dict.items.contains_key(&Key::new(item.clone())?)),
            _ => Err(Error::new(format!("argument of type '{}' is not iterable", self.kind()))),
        }
    }
}

/// `value[item]`, if there is one.
pub fn item(value: &Value, item: &Value) -> Result<Option<Value>, Error> {
    Ok(match value {
        Value::Undefined(name) => return Err(Error::new(format!("'{name}' is undefined"))),
        Value::Dict(dict) => match item {
            Value::Text(text) => dict.items.get(&**text).cloned(),
            Value::List(_) | Value::Dict(_) => None,
            item => dict.items.get(&Key::new(item.clone())?).cloned(),
        },
        Value::List(list) | Value::Tuple(list) => {
            index(item, list.items.len()).map(|i| list.items[i].clone())
        }
        Value::Text(text) => {
            let Some(n) = item.as_int() else { return Ok(None) };
            let at = if n >= 0 {
                usize::try_from(n).ok().and_then(|n| text.char_indices().nth(n))
            } else {
                usize::try_from(-1 - n).ok().and_then(|n| text.char_indices().nth_back(n))
            };
            at.map(|(i, c)| Value::Text(text.slice(i..i + c.len_utf8())))
        }
        _ => None,
    })
}

fn index(item: &Value, n: usize) -> Option<usize> {
    let i = item.as_int()?;
    let i = if i < 0 { i + n as i128 } else { i };
    usize::try_from(i).ok().filter(|&i| i < n)
}

impl PartialEq for Value {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Undefined(_), Self::Undefined(_)) | (Self::None, Self::None) => true,
            (Self::Text(a), Self::Text(b)) => **a == **b,
            (Self::List(a), Self::List(b)) | (Self::Tuple(a), Self::Tuple(b)) => a.items == b.items,
            (Self::Dict(a), Self::Dict(b)) => a.items == b.items,
            (Self::Namespace(a), Self::Namespace(b))
            | (Self::Macro(a), Self::Macro(b))
            | (Self::Loop(a), Self::Loop(b)) => a == b,
            (Self::Function(a), Self::Function(b)) => a == b,
            (Self::Method(a), Self::Method(b)) => a == b,
            _ => match (self.as_int(), other.as_int()) {
                (Some(a), Some(b)) => a == b,
                _ => self.as_float().is_some() && self.as_float() == other.as_float(),
            },
        }
    }
}

/// A key of a dictionary: a value that does not change.
#[derive(Clone, Debug, PartialEq)]
pub struct Key(Value);

impl Key {
    /// # Errors
    /// Python cannot hash it.
    pub fn new(value: Value) -> Result<Self, Error> {
        match &value {
            Value::List(_) | Value::Dict(_) => {
                Err(Error::new(format!("unhashable type: '{}'", value.kind())))
            }
            Value::Tuple(list) => {
                list.items.iter().try_for_each(|item| Self::new(item.clone()).map(drop))?;
                Ok(Self(value))
            }
            _ => Ok(Self(value)),
        }
    }

    pub fn value(&self) -> &Value {
        &self.0
    }
}

impl Eq for Key {}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        match &self.0 {
            Value::Text(text) => (**text).hash(state),
            Value::Tuple(list) => list.items.iter().for_each(|item| Self(item.clone()).hash(state)),
            // Equal numbers of two types need equal hashes.
            value => match value.as_float() {
                Some(x) => (x + 0.0).to_bits().hash(state),
                None => value.kind().hash(state),
            },
        }
    }
}

impl Equivalent<Key> for str {
    fn equivalent(&self, key: &Key) -> bool {
        key.0.as_text().is_some_and(|text| **text == *self)
    }
}
