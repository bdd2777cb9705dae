//! Tree and value to text.

use std::borrow::Cow;

use serde_json::Value;

use crate::format::{print_value, type_name};
use crate::funcs::{self, Param};
use crate::lex::line_of;
use crate::parse::{Branch, Command, Expr, ExprKind, Node, Pipe, Span, Tree};
use crate::{DEPTH_MAX, Functions, OUTPUT_BYTES_MAX, RANGE_MAX, Root, TemplateError};

type Val<'a> = Cow<'a, Value>;

/// What follows a node.
#[derive(PartialEq, Eq)]
enum Flow {
    On,
    Break,
    Continue,
}

struct Exec<'a> {
    text: &'a str,
    tree: &'a Tree,
    root: &'a Root<'a>,
    functions: Functions,
    out: String,
    variables: Vec<(String, Val<'a>)>,
    depth: usize,
}

/// Renders a tree.
pub(crate) fn render<'a>(
    text: &'a str,
    tree: &'a Tree,
    root: &'a Root<'a>,
    functions: Functions,
) -> Result<String, TemplateError> {
    let dot = Cow::Borrowed(root.value);
    let variables = vec![("$".to_owned(), dot.clone())];
    let mut exec = Exec { text, tree, root, functions, out: String::new(), variables, depth: 0 };
    exec.list(&tree.root, &dot)?;
    Ok(exec.out)
}

impl<'a> Exec<'a> {
    fn error(&self, span: Span, message: impl Into<String>) -> TemplateError {
        let before = self.text.get(..span.at).unwrap_or("");
        TemplateError::Exec {
            line: line_of(self.text, span.at),
            column: before.rfind('\n').map_or(span.at, |newline| span.at - newline - 1),
            context: self.text.get(span.start..span.end).unwrap_or("").to_owned(),
            message: message.into(),
        }
    }

    fn deeper(&mut self, span: Span) -> Result<(), TemplateError> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(self.error(span, format!("exceeded maximum template depth ({DEPTH_MAX})")));
        }
        if self.out.len() > OUTPUT_BYTES_MAX {
            return Err(self.error(span, "output is too long"));
        }
        Ok(())
    }

    fn list(&mut self, nodes: &'a [Node], dot: &Val<'a>) -> Result<Flow, TemplateError> {
        let known = self.variables.len();
        for node in nodes {
            let flow = self.node(node, dot)?;
            if flow != Flow::On {
                self.variables.truncate(known);
                return Ok(flow);
            }
        }
        self.variables.truncate(known);
        Ok(Flow::On)
    }

    fn node(&mut self, node: &'a Node, dot: &Val<'a>) -> Result<Flow, TemplateError> {
        match node {
            Node::Text(text) => self.out.push_str(text),
            Node::Action(pipe) => {
                let value = self.pipe(pipe, dot)?;
                if pipe.variables.is_empty() {
                    self.show(pipe, &value);
                }
            }
            Node::If(branch) => return self.conditional(branch, dot, false),
            Node::With(branch) => return self.conditional(branch, dot, true),
            Node::Range(branch) => return self.range(branch, dot),
            Node::Template { name, pipe, span } => self.template(name, pipe.as_ref(), *span, dot)?,
            Node::Break => return Ok(Flow::Break),
            Node::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::On)
    }

    fn show(&mut self, pipe: &Pipe, value: &Value) {
        if !value.is_null() {
            print_value(&mut self.out, value);
            return;
        }
        let field = match pipe.commands.as_slice() {
            [Command { args, .. }] => match args.as_slice() {
                [
                    Expr {
                        kind: ExprKind::Fields(f) | ExprKind::Variable(_, f) | ExprKind::Chain(_, f), ..
                    },
                ] => f.last(),
                _ => None,
            },
            _ => None,
        };
        let text = self.root.null_text.zip(field).and_then(|(null_text, field)| null_text(field));
        self.out.push_str(text.unwrap_or("<no value>"));
    }

    fn conditional(
        &mut self,
        branch: &'a Branch,
        dot: &Val<'a>,
        moves_dot: bool,
    ) -> Result<Flow, TemplateError> {
        let known = self.variables.len();
        let value = self.pipe(&branch.pipe, dot)?;
        let flow = if is_true(&value) {
            self.list(&branch.body, if moves_dot { &value } else { dot })
        } else {
            self.list(&branch.otherwise, dot)
        };
        self.variables.truncate(known);
        flow
    }

    fn range(&mut self, branch: &'a Branch, dot: &Val<'a>) -> Result<Flow, TemplateError> {
        let known = self.variables.len();
        let span = branch.pipe.commands.first().map_or(Span { at: 0, start: 0, end: 0 }, |c| c.span);
        let value = self.commands(&branch.pipe, dot)?;
        let items = self.items(&value, span)?;
        if items.is_empty() {
            return self.list(&branch.otherwise, dot);
        }
        for (key, item) in items {
            match branch.pipe.variables.as_slice() {
                [only] => self.bind(only, item.clone(), branch.pipe.assigns),
                [first, second] => {
                    self.bind(first, Cow::Owned(key), branch.pipe.assigns);
                    self.bind(second, item.clone(), branch.pipe.assigns);
                }
                _ => {}
            }
            let flow = self.list(&branch.body, &item)?;
            self.variables.truncate(known);
            if self.out.len() > OUTPUT_BYTES_MAX {
                return Err(self.error(span, "output is too long"));
            }
            if flow == Flow::Break {
                break;
            }
        }
        Ok(Flow::On)
    }

    fn items(&self, value: &Val<'a>, span: Span) -> Result<Vec<(Value, Val<'a>)>, TemplateError> {
        Ok(match value {
            Cow::Borrowed(Value::Array(list)) => {
                list.iter().enumerate().map(|(i, v)| (Value::from(i), Cow::Borrowed(v))).collect()
            }
            Cow::Owned(Value::Array(list)) => {
                list.iter().enumerate().map(|(i, v)| (Value::from(i), Cow::Owned(v.clone()))).collect()
            }
            Cow::Borrowed(Value::Object(map)) => {
                let mut items: Vec<_> = map.iter().collect();
                items.sort_by_key(|(k, _)| *k);
                items.into_iter().map(|(k, v)| (Value::from(k.as_str()), Cow::Borrowed(v))).collect()
            }
            Cow::Owned(Value::Object(map)) => {
                let mut items: Vec<_> = map.iter().collect();
                items.sort_by_key(|(k, _)| *k);
                items.into_iter().map(|(k, v)| (Value::from(k.as_str()), Cow::Owned(v.clone()))).collect()
            }
            other => match other.as_ref() {
                Value::Null => Vec::new(),
                Value::Number(n) if n.is_i64() || n.is_u64() => {
                    let count = n.as_u64().unwrap_or(0);
                    if count > RANGE_MAX {
                        return Err(self.error(span, format!("range over more than {RANGE_MAX}")));
                    }
                    (0..count).map(|i| (Value::from(i), Cow::Owned(Value::from(i)))).collect()
                }
                v => {
                    let mut shown = String::new();
                    print_value(&mut shown, v);
                    return Err(self.error(span, format!("range can't iterate over {shown}")));
                }
            },
        })
    }

    fn template(
        &mut self,
        name: &str,
        pipe: Option<&'a Pipe>,
        span: Span,
        dot: &Val<'a>,
    ) -> Result<(), TemplateError> {
        let Some(nodes) = self.tree.defined.get(name) else {
            return Err(self.error(span, format!("template \"{name}\" not defined")));
        };
        let value = match pipe {
            Some(pipe) => self.pipe(pipe, dot)?,
            None => Cow::Owned(Value::Null),
        };
        self.deeper(span)?;
        let outer = std::mem::replace(&mut self.variables, vec![("$".to_owned(), value.clone())]);
        self.list(nodes, &value)?;
        self.variables = outer;
        self.depth -= 1;
        Ok(())
    }

    fn bind(&mut self, name: &str, value: Val<'a>, assigns: bool) {
        match self.variables.iter_mut().rev().find(|(n, _)| n == name) {
            Some(slot) if assigns => slot.1 = value,
            _ => self.variables.push((name.to_owned(), value)),
        }
    }

    fn pipe(&mut self, pipe: &'a Pipe, dot: &Val<'a>) -> Result<Val<'a>, TemplateError> {
        let value = self.commands(pipe, dot)?;
        for name in &pipe.variables {
            self.bind(name, value.clone(), pipe.assigns);
        }
        Ok(value)
    }

    fn commands(&mut self, pipe: &'a Pipe, dot: &Val<'a>) -> Result<Val<'a>, TemplateError> {
        let mut last: Option<Val<'a>> = None;
        for command in &pipe.commands {
            last = Some(self.command(command, dot, last)?);
        }
        Ok(last.unwrap_or(Cow::Owned(Value::Null)))
    }

    fn command(
        &mut self,
        command: &'a Command,
        dot: &Val<'a>,
        piped: Option<Val<'a>>,
    ) -> Result<Val<'a>, TemplateError> {
        let Some((first, rest)) = command.args.split_first() else {
            return Ok(Cow::Owned(Value::Null));
        };
        let alone = rest.is_empty() && piped.is_none();
        match &first.kind {
            ExprKind::Function(name) => self.call(name, command, dot, piped),
            ExprKind::Fields(fields) if !alone => self.method(first, fields, dot, (rest, piped)),
            _ if alone => match &first.kind {
                ExprKind::Nil => Err(self.error(first.span, "nil is not a command")),
                _ => self.operand(first, dot),
            },
            _ => {
                let text = self.text.get(first.span.start..first.span.end).unwrap_or("");
                Err(self.error(first.span, format!("can't give argument to non-function {text}")))
            }
        }
    }

    fn operand(&mut self, expr: &'a Expr, dot: &Val<'a>) -> Result<Val<'a>, TemplateError> {
        match &expr.kind {
            ExprKind::Dot => Ok(dot.clone()),
            ExprKind::Nil => Ok(Cow::Owned(Value::Null)),
            ExprKind::Literal(value) => Ok(Cow::Borrowed(value)),
            ExprKind::Function(name) => {
                let command = Command { span: expr.span, args: Vec::new() };
                self.run(name, &command, Vec::new())
            }
            ExprKind::Fields(fields) => self.fields(dot.clone(), fields, expr.span),
            ExprKind::Variable(name, fields) => {
                let found = self.variables.iter().rev().find(|(n, _)| n == name);
                let value = found.map_or(Cow::Owned(Value::Null), |(_, v)| v.clone());
                self.fields(value, fields, expr.span)
            }
            ExprKind::Group(pipe) => {
                self.deeper(expr.span)?;
                let value = self.pipe(pipe, dot)?;
                self.depth -= 1;
                Ok(value)
            }
            ExprKind::Chain(inner, fields) => {
                let value = self.operand(inner, dot)?;
                self.fields(value, fields, expr.span)
            }
        }
    }

    fn fields(&self, mut value: Val<'a>, fields: &[String], span: Span) -> Result<Val<'a>, TemplateError> {
        for name in fields {
            value = self.field(&value, name, span)?;
        }
        Ok(value)
    }

    fn is_root(&self, value: &Val<'a>) -> bool {
        matches!(value, Cow::Borrowed(v) if std::ptr::eq(*v, self.root.value))
    }

    fn field(&self, value: &Val<'a>, name: &str, span: Span) -> Result<Val<'a>, TemplateError> {
        let is_root = self.is_root(value);
        let found = match value {
            Cow::Borrowed(Value::Object(map)) => map.get(name).map(Cow::Borrowed),
            Cow::Owned(Value::Object(map)) => map.get(name).cloned().map(Cow::Owned),
            other => {
                let message = match other.as_ref() {
                    Value::Null => format!("nil pointer evaluating interface {{}}.{name}"),
                    v => format!("can't evaluate field {name} in type {}", type_name(v)),
                };
                return Err(self.error(span, message));
            }
        };
        if let Some(found) = found {
            return Ok(found);
        }
        if is_root
            && let Some(method) = self.root.method
            && let Some(result) = method(name, &[])
        {
            let failed = |e| self.error(span, format!("error calling {name}: {e}"));
            return result.map(Cow::Owned).map_err(failed);
        }
        Err(self.error(
            span,
            match self.root.type_name {
                Some(root) if is_root => format!("can't evaluate field {name} in type {root}"),
                _ => format!("map has no entry for key \"{name}\""),
            },
        ))
    }

    /// `.Label "x"`: the last field is called with arguments.
    fn method(
        &mut self,
        expr: &'a Expr,
        fields: &'a [String],
        dot: &Val<'a>,
        (rest, piped): (&'a [Expr], Option<Val<'a>>),
    ) -> Result<Val<'a>, TemplateError> {
        let Some((last, before)) = fields.split_last() else { return Ok(dot.clone()) };
        let receiver = self.fields(dot.clone(), before, expr.span)?;
        let mut args = Vec::new();
        for arg in rest {
            args.push(self.operand(arg, dot)?.into_owned());
        }
        args.extend(piped.map(Cow::into_owned));
        if self.is_root(&receiver)
            && let Some(method) = self.root.method
            && let Some(result) = method(last, &args)
        {
            let failed = |e| self.error(expr.span, format!("error calling {last}: {e}"));
            return result.map(Cow::Owned).map_err(failed);
        }
        Err(self.error(expr.span, format!("{last} is not a method but has arguments")))
    }

    fn call(
        &mut self,
        name: &str,
        command: &'a Command,
        dot: &Val<'a>,
        piped: Option<Val<'a>>,
    ) -> Result<Val<'a>, TemplateError> {
        let exprs = command.args.get(1..).unwrap_or(&[]);
        if name == "and" || name == "or" {
            return self.short_circuit(name, (command, exprs), dot, piped);
        }
        let mut args: Vec<(Option<Span>, Val<'a>)> = Vec::with_capacity(exprs.len() + 1);
        for expr in exprs {
            let value = self.operand(expr, dot)?;
            args.push((Some(expr.span), value));
        }
        if let Some(value) = piped {
            args.push((None, value));
        }
        self.run(name, command, args)
    }

    fn short_circuit(
        &mut self,
        name: &str,
        (command, exprs): (&'a Command, &'a [Expr]),
        dot: &Val<'a>,
        piped: Option<Val<'a>>,
    ) -> Result<Val<'a>, TemplateError> {
        let stops = |value: &Val<'a>| is_true(value) == (name == "or");
        let mut last = None;
        for expr in exprs {
            let value = self.operand(expr, dot)?;
            if stops(&value) {
                return Ok(value);
            }
            last = Some(value);
        }
        piped.or(last).ok_or_else(|| {
            self.error(command.span, format!("wrong number of args for {name}: want at least 1 got 0"))
        })
    }

    fn run(
        &mut self,
        name: &str,
        command: &Command,
        args: Vec<(Option<Span>, Val<'a>)>,
    ) -> Result<Val<'a>, TemplateError> {
        let Some(function) = funcs::find(name) else {
            return Err(self.error(command.span, format!("\"{name}\" is not a defined function")));
        };
        let (got, want) = (args.len(), function.params.len());
        if got < want || (got > want && function.rest.is_none()) {
            let least = if function.rest.is_some() { "at least " } else { "" };
            let message = format!("wrong number of args for {name}: want {least}{want} got {got}");
            return Err(self.error(command.span, message));
        }
        if self.functions == Functions::Header && function.docker {
            return Ok(args.into_iter().next().map_or(Cow::Owned(Value::Null), |(_, v)| v));
        }
        let mut values = Vec::with_capacity(args.len());
        for (at, (span, value)) in args.into_iter().enumerate() {
            let param = function.params.get(at).copied().or(function.rest).unwrap_or(Param::Any);
            if !param.takes(&value) {
                let message =
                    format!("wrong type for value; expected {}; got {}", param.name(), type_name(&value));
                return Err(self.error(span.unwrap_or(command.span), message));
            }
            values.push(value.into_owned());
        }
        let failed = |e| self.error(command.span, format!("error calling {name}: {e}"));
        (function.run)(&values).map(Cow::Owned).map_err(failed)
    }
}

/// Whether Go's templates take a value for true.
pub(crate) fn is_true(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(b) => *b,
        Value::Number(n) => n.as_f64() != Some(0.0),
        Value::String(s) => !s.is_empty(),
        Value::Array(a) => !a.is_empty(),
        Value::Object(o) => !o.is_empty(),
    }
}
