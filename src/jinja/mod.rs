//! Jinja as Python's library renders it, for chat templates, which are written for that library in
//! the environment that Hugging Face's transformers gives them.
//!
//! It prints, compares, slices, scopes and formats as Python does, and its texts remember which of
//! their bytes came from outside the template ([`Text`]), through all that a template does to them.
//! It must not know what a template is for.
//!
//! Sources and values may be anybody's: nesting, steps, and the sizes of texts and lists have
//! limits, and all work is done on a stack that has room for the deepest nesting.

mod args;
mod ast;
mod checks;
mod error;
mod filters;
mod format;
mod lexer;
mod methods;
mod ops;
mod parser;
mod print;
mod render;
mod text;
mod value;

use jiff::Zoned;
use serde_json::{Map, Value as Json};

use ast::Node;
pub use error::Error;
use render::Renderer;
pub use text::Text;
use value::Value;

/// Bytes of a template's source.
const MAX_SOURCE_BYTES: usize = 4 << 20;
/// Of a stack with room for nesting up to the limit, in a build without optimization too.
const STACK_BYTES: usize = 64 << 20;

/// A parsed template.
#[derive(Debug)]
pub struct Template {
    nodes: Vec<Node>,
}

impl Template {
    /// Parses a source.
    ///
    /// # Errors
    /// It is not valid, or beyond a limit.
    pub fn new(source: &str) -> Result<Self, Error> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(Error::new(format!("it has over {MAX_SOURCE_BYTES} bytes")));
        }
        on_large_stack(|| parser::parse(source)).map(|nodes| Self { nodes })
    }

    /// Renders with variables from outside and `own` ones, which count as the template's text.
    /// `now` is what `strftime_now` tells.
    ///
    /// # Errors
    /// The template's own, by `raise_exception`; what Python refuses to do; or a limit is reached.
    pub fn render(
        &self,
        outside: &Map<String, Json>,
        own: &[(&str, &str)],
        now: &Zoned,
    ) -> Result<Text, Error> {
        on_large_stack(|| {
            let mut variables = Vec::with_capacity(outside.len() + own.len());
            for (name, value) in outside {
                variables.push((name.as_str().into(), Value::from_json(value)?));
            }
            variables.extend(own.iter().map(|(name, text)| ((*name).into(), Value::own(text))));
            Renderer::new(variables, now).render(&self.nodes)
        })
    }
}

/// Runs `work` on a thread of its own, whose stack takes the deepest nesting.
fn on_large_stack<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, work);
        match thread.expect("the system has threads").join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> Result<String, Error> {
        let text = Template::new(source)?.render(&Map::new(), &[], &Zoned::now())?;
        Ok(text.to_string())
    }

    #[test]
    fn errors_name_what_is_wrong() {
        for (source, why) in [
            ("a\n{% if x %}", "line 2: 'endif' is missing"),
            ("{{ 1 + }}", "line 1: expected a value"),
            ("{% do x %}", "line 1: unknown tag 'do'"),
            ("{{ x.y }}", "'x' is undefined"),
            ("{{ 'a' + 1 }}", "unsupported operand type(s) for +: 'str' and 'int'"),
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
            ("{{ 1 | nothing }}", "No filter named 'nothing'."),
        ] {
            assert_eq!(render(source).unwrap_err().to_string(), why, "{source}");
        }
    }

    /// Nesting, steps and sizes have limits, whichever way a template goes about it.
    #[test]
    fn hostile_templates_are_errors() {
        let n = 100_000;
        let doubled = |body: &str| {
            format!(
                "{{% set ns = namespace(s='xxxxxxxx', l=[1]) %}}{{% for i in range(99) %}}{body}{{% endfor %}}"
            )
        };
        for source in [
            "{% if 1 %}".repeat(n),
            "{{".to_owned() + &"(".repeat(n),
            "{{".to_owned() + &"[".repeat(n),
            "{{".to_owned() + &"{1:".repeat(n),
            "{{".to_owned() + &"not ".repeat(n) + "1 }}",
            "{{".to_owned() + &"-".repeat(n) + "1 }}",
            "{{".to_owned() + &"x[".repeat(n),
            "{{".to_owned() + &"1 if 1 else ".repeat(n) + "1 }}",
            "{% for x in ".to_owned() + &"(".repeat(n),
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".into(),
            "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}".into(),
            "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
                .into(),
            "{% for i in range(10 ** 9) %}{% endfor %}".into(),
            "{{ 'x' * 10 ** 9 }}".into(),
            "{{ [0] * 10 ** 9 }}".into(),
            "{{ 2 ** (10 ** 9) }}".into(),
            "{{ '%999999999d' % 1 }}".into(),
            "{{ '{:>999999999}'.format(1) }}".into(),
            "{{ 'x'.center(10 ** 9) }}{{ 'x'.zfill(10 ** 9) }}".into(),
            "{{ 'x' | indent(10 ** 9, true) }}".into(),
            "{{ [1, [2]] | tojson(indent=10 ** 9) }}".into(),
            "{{ [1, 2] | slice(10 ** 9) }}".into(),
            "{{ '\t'.expandtabs(10 ** 9) }}".into(),
            doubled("{% set ns.s = ns.s ~ ns.s %}"),
            doubled("{% set ns.s = ns.s.replace('x', ns.s) %}"),
            doubled("{% set ns.s = [ns.s, ns.s] | join %}"),
            doubled("{% set ns.l = ns.l + ns.l %}"),
            doubled("{% set ns.l = [ns.l, ns.l] %}{{ ns.l == ns.l }}"),
            doubled(
                "{% set ns.l = [ns.l] %}{% for j in range(99) %}{% set ns.l = [ns.l] %}{% endfor %}",
            ),
            doubled("{% for j in range(9999) %}{{ 'x' * 9999 }}{% endfor %}"),
            doubled("{% for j in range(9999) %}{% set ns.s = 'x' * 9999999 %}{% endfor %}"),
        ] {
            let shown: String = source.chars().take(80).collect();
            assert!(render(&source).is_err(), "{shown}");
        }
        // Long is not deep.
        let long =
            "{{ 1".to_owned() + &" + 1".repeat(n) + " }}{{ 'x'" + &" | trim".repeat(n) + " }}";
        assert_eq!(render(&long).unwrap(), "100001x");
        assert_eq!(render(&("{{ x".to_owned() + &" or x".repeat(n) + " }}")).unwrap(), "");
    }
}
