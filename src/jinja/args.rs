//! Arguments of a call.

use std::sync::Arc;

use super::error::Error;
use super::value::Value;

/// Arguments of a call.
#[derive(Clone, Debug, Default)]
pub struct Args {
    pub positional: Vec<Value>,
    pub named: Vec<(Arc<str>, Value)>,
}

impl Args {
    /// The value of each of `names`, by place or by name.
    pub fn bind<const N: usize>(self, names: [&str; N]) -> Result<[Option<Value>; N], Error> {
        if self.positional.len() > N {
            let n = self.positional.len();
            return Err(Error::new(format!("takes {N} arguments, but {n} are given")));
        }
        let mut bound = [const { None }; N];
        for (place, value) in bound.iter_mut().zip(self.positional) {
            *place = Some(value);
        }
        for (name, value) in self.named {
            match names.iter().position(|known| **known == *name) {
                Some(i) if bound[i].is_none() => bound[i] = Some(value),
                Some(_) => {
                    return Err(Error::new(format!("got multiple values for argument '{name}'")));
                }
                None => {
                    return Err(Error::new(format!("got an unexpected keyword argument '{name}'")));
                }
            }
        }
        Ok(bound)
    }

    /// The value of each of `names`, by name only.
    pub fn bind_named<const N: usize>(self, names: [&str; N]) -> Result<[Option<Value>; N], Error> {
        Self { positional: Vec::new(), named: self.named }.bind(names)
    }
}
