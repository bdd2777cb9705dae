//! Go's `text/template` as Docker's `--format` uses it, over JSON values.
//!
//! The one idea: an error reads as Go's would, position included, because scripts and people search for those
//! texts (`template: :1:2: executing "" at <.Nope>: map has no entry for key "Nope"`). The crates that port
//! the whole package (`gtmpl`, `gotmpl`) have their own wording, no positions while executing and no methods
//! with arguments (`.Label "x"`), so this one exists. It covers what the package documents except `call`,
//! channels and iterator functions: JSON has neither functions nor channels.
//!
//! ```text
//! lex.rs    action text → tokens      parse.rs  tokens → tree      exec.rs  tree + value → text
//! funcs.rs  the functions, Go's and Docker's                       format.rs  `print`, `printf`, quoting
//! ```
//!
//! Invariant: rendering ends. Loops run over finite values or at most [`RANGE_MAX`] numbers, nesting is at most
//! [`DEPTH_MAX`], and the output has at most [`OUTPUT_BYTES_MAX`] bytes.
//!
//! Source: <https://pkg.go.dev/text/template>; Docker's functions:
//! <https://docs.docker.com/engine/cli/formatting/>.

mod exec;
mod format;
mod funcs;
mod lex;
mod parse;

use serde_json::Value;

pub use format::{json, json_html_escaped};

/// Most rounds of `range` over a number.
pub const RANGE_MAX: u64 = 1 << 20;
/// Deepest nesting of templates, parentheses and control structures.
pub const DEPTH_MAX: usize = 100;
/// Longest output of one rendering.
pub const OUTPUT_BYTES_MAX: usize = 64 << 20;

/// Why a template is no template, or cannot be rendered. The texts are Go's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// The text is not a template.
    #[error("template: :{line}: {message}")]
    Parse {
        /// Line, from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// It is one, but it does not fit the value.
    #[error("template: :{line}:{column}: executing \"\" at <{context}>: {message}")]
    Exec {
        /// Line, from 1.
        line: usize,
        /// Byte in the line, from 0.
        column: usize,
        /// The piece of the template.
        context: String,
        /// What is wrong.
        message: String,
    },
}

/// What a method gives back: nothing if there is no such method.
pub type MethodResult = Option<Result<Value, String>>;

/// Methods of a root by name, with their arguments.
pub type Method<'a> = &'a dyn Fn(&str, &[Value]) -> MethodResult;

/// The value that a template is rendered with.
#[derive(Clone, Copy)]
pub struct Root<'a> {
    /// The value.
    pub value: &'a Value,
    /// Go's name of its type if it stands for a structure, for the error text of an unknown field; `None` if
    /// it is a map.
    pub type_name: Option<&'a str>,
    /// Methods of the root, by name, with arguments: `.Label "x"`.
    pub method: Option<Method<'a>>,
    /// What is printed for a field that is null, by the field's name: Go prints a nil slice as `[]` and a nil
    /// map as `map[]`, which JSON does not tell from one another.
    pub null_text: Option<fn(&str) -> Option<&'static str>>,
}

impl std::fmt::Debug for Root<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Root").field("value", self.value).field("type_name", &self.type_name).finish()
    }
}

impl<'a> Root<'a> {
    /// A plain map.
    #[must_use]
    pub const fn map(value: &'a Value) -> Self {
        Self { value, type_name: None, method: None, null_text: None }
    }
}

/// Which set of functions a template sees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Functions {
    /// Go's and Docker's.
    #[default]
    Docker,
    /// The same names, but Docker's give back their first argument: for the header of a table.
    Header,
}

/// A template that was read.
#[derive(Debug, Clone)]
pub struct Template {
    text: String,
    tree: parse::Tree,
}

impl Template {
    /// Reads a template.
    ///
    /// # Errors
    /// [`TemplateError::Parse`].
    pub fn parse(text: &str) -> Result<Self, TemplateError> {
        Ok(Self { text: text.to_owned(), tree: parse::parse(text)? })
    }

    /// Renders it.
    ///
    /// # Errors
    /// [`TemplateError::Exec`]; what was rendered so far is lost.
    pub fn render(&self, root: &Root<'_>) -> Result<String, TemplateError> {
        self.render_with(root, Functions::Docker)
    }

    /// Renders it with a choice of functions.
    ///
    /// # Errors
    /// [`TemplateError::Exec`]; what was rendered so far is lost.
    pub fn render_with(&self, root: &Root<'_>, functions: Functions) -> Result<String, TemplateError> {
        exec::render(&self.text, &self.tree, root, functions)
    }
}

#[cfg(test)]
mod tests;
