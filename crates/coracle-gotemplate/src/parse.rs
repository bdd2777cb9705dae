//! Tokens to tree.
//!
//! Every expression keeps the byte that Go would report for it: for a chain of fields that is the second
//! field, not the first.

use std::collections::BTreeMap;

use serde_json::{Number, Value};

use crate::lex::{Kind, Token, lex, line_of};
use crate::{DEPTH_MAX, TemplateError, funcs};

/// A template and those that it defines.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    pub(crate) root: Vec<Node>,
    pub(crate) defined: BTreeMap<String, Vec<Node>>,
}

/// A piece of a template.
#[derive(Debug, Clone)]
pub(crate) enum Node {
    Text(String),
    Action(Pipe),
    If(Branch),
    Range(Branch),
    With(Branch),
    Template { name: String, pipe: Option<Pipe>, span: Span },
    Break,
    Continue,
}

/// `if`, `range` or `with`.
#[derive(Debug, Clone)]
pub(crate) struct Branch {
    pub(crate) pipe: Pipe,
    pub(crate) body: Vec<Node>,
    pub(crate) otherwise: Vec<Node>,
}

/// Where something stands.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span {
    /// What Go reports as its position.
    pub(crate) at: usize,
    /// Its text.
    pub(crate) start: usize,
    pub(crate) end: usize,
}

/// Commands joined by `|`, and the variables that take the result.
#[derive(Debug, Clone)]
pub(crate) struct Pipe {
    pub(crate) variables: Vec<String>,
    pub(crate) assigns: bool,
    pub(crate) commands: Vec<Command>,
}

/// A call or a value.
#[derive(Debug, Clone)]
pub(crate) struct Command {
    pub(crate) span: Span,
    pub(crate) args: Vec<Expr>,
}

/// An operand.
#[derive(Debug, Clone)]
pub(crate) struct Expr {
    pub(crate) span: Span,
    pub(crate) kind: ExprKind,
}

/// What an operand is.
#[derive(Debug, Clone)]
pub(crate) enum ExprKind {
    Dot,
    Nil,
    Literal(Value),
    Function(String),
    Fields(Vec<String>),
    Variable(String, Vec<String>),
    Group(Box<Pipe>),
    Chain(Box<Expr>, Vec<String>),
}

struct Parser<'a> {
    text: &'a str,
    tokens: Vec<Token>,
    at: usize,
    variables: Vec<String>,
    defined: BTreeMap<String, Vec<Node>>,
    depth: usize,
    loops: usize,
}

/// How a list of nodes ended.
enum End {
    Text,
    Closed,
    Else,
}

/// Reads a template.
pub(crate) fn parse(text: &str) -> Result<Tree, TemplateError> {
    let mut parser = Parser {
        text,
        tokens: lex(text)?,
        at: 0,
        variables: vec!["$".to_owned()],
        defined: BTreeMap::new(),
        depth: 0,
        loops: 0,
    };
    let (root, end) = parser.list()?;
    match end {
        End::Text => Ok(Tree { root, defined: parser.defined }),
        End::Closed => Err(parser.error("unexpected {{end}}")),
        End::Else => Err(parser.error("unexpected {{else}}")),
    }
}

impl Parser<'_> {
    fn error(&self, message: &str) -> TemplateError {
        let at = self.tokens.get(self.at.saturating_sub(1)).map_or(self.text.len(), |t| t.start);
        TemplateError::Parse { line: line_of(self.text, at), message: message.to_owned() }
    }

    fn peek(&self) -> Option<&Kind> {
        self.tokens.get(self.at).map(|t| &t.kind)
    }

    fn next(&mut self) -> Option<Token> {
        let token = self.tokens.get(self.at).cloned();
        self.at += 1;
        token
    }

    fn skip_space(&mut self) {
        while matches!(self.peek(), Some(Kind::Space)) {
            self.at += 1;
        }
    }

    fn shown(&self, token: Option<&Token>) -> String {
        match token {
            None => "EOF".to_owned(),
            Some(t) => match &t.kind {
                Kind::Word(w) if is_keyword(w) => format!("<{w}>"),
                _ => {
                    let text = self.text.get(t.start..t.end).unwrap_or("");
                    if text.chars().count() > 10 {
                        format!("\"{}\"...", text.chars().take(10).collect::<String>())
                    } else {
                        format!("\"{text}\"")
                    }
                }
            },
        }
    }

    fn unexpected(&self, token: Option<&Token>, place: &str) -> TemplateError {
        match token.map(|t| &t.kind) {
            None => self.error("unexpected EOF"),
            Some(_) => self.error(&format!("unexpected {} in {place}", self.shown(token))),
        }
    }

    fn list(&mut self) -> Result<(Vec<Node>, End), TemplateError> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(self.error("too deeply nested"));
        }
        let mut nodes = Vec::new();
        let end = loop {
            let Some(token) = self.next() else { break End::Text };
            match token.kind {
                Kind::Text(text) => nodes.push(Node::Text(text)),
                _ => {
                    self.skip_space();
                    let word = match self.peek() {
                        Some(Kind::Word(w)) => w.clone(),
                        _ => String::new(),
                    };
                    match word.as_str() {
                        "end" => {
                            self.at += 1;
                            self.close("end")?;
                            break End::Closed;
                        }
                        "else" => {
                            self.at += 1;
                            break End::Else;
                        }
                        _ => nodes.extend(self.action(&word)?),
                    }
                }
            }
        };
        self.depth -= 1;
        Ok((nodes, end))
    }

    fn close(&mut self, place: &str) -> Result<(), TemplateError> {
        self.skip_space();
        let token = self.next();
        if token.as_ref().is_some_and(|t| t.kind == Kind::Close) {
            return Ok(());
        }
        Err(self.unexpected(token.as_ref(), place))
    }

    fn action(&mut self, word: &str) -> Result<Option<Node>, TemplateError> {
        if is_keyword(word) {
            self.at += 1;
        }
        Ok(Some(match word {
            "if" => Node::If(self.branch("if")?),
            "with" => Node::With(self.branch("with")?),
            "range" => Node::Range(self.branch("range")?),
            "break" | "continue" => {
                self.close(word)?;
                if self.loops == 0 {
                    return Err(self.error(&format!("{{{{{word}}}}} outside {{{{range}}}}")));
                }
                if word == "break" { Node::Break } else { Node::Continue }
            }
            "define" => {
                self.define()?;
                return Ok(None);
            }
            "template" => self.template()?,
            "block" => self.block()?,
            _ => Node::Action(self.pipeline("command", false)?),
        }))
    }

    /// The pipeline, the body and what follows `else`, of which `else if` and `else with` are a nested branch.
    fn branch(&mut self, word: &str) -> Result<Branch, TemplateError> {
        let known = self.variables.len();
        let pipe = self.pipeline(word, word == "range")?;
        self.loops += usize::from(word == "range");
        let (body, end) = self.list()?;
        self.loops -= usize::from(word == "range");
        let mut otherwise = Vec::new();
        match end {
            End::Text => return Err(self.error("unexpected EOF")),
            End::Closed => {}
            End::Else => {
                self.skip_space();
                match self.peek() {
                    Some(Kind::Word(w)) if w == word && word != "range" => {
                        self.at += 1;
                        let nested = self.branch(word)?;
                        otherwise.push(if word == "if" { Node::If(nested) } else { Node::With(nested) });
                    }
                    _ => {
                        self.close("else")?;
                        let (nodes, end) = self.list()?;
                        match end {
                            End::Closed => otherwise = nodes,
                            End::Else => return Err(self.error("expected end; found {{else}}")),
                            End::Text => return Err(self.error("unexpected EOF")),
                        }
                    }
                }
            }
        }
        self.variables.truncate(known);
        Ok(Branch { pipe, body, otherwise })
    }

    fn name(&mut self, place: &str) -> Result<(String, Span), TemplateError> {
        self.skip_space();
        let token = self.next();
        match token {
            Some(Token { kind: Kind::Str(name), start, end }) => Ok((name, Span { at: start, start, end })),
            other => Err(self.unexpected(other.as_ref(), place)),
        }
    }

    fn body(&mut self, name: &str) -> Result<(), TemplateError> {
        let outer = std::mem::replace(&mut self.variables, vec!["$".to_owned()]);
        let loops = std::mem::replace(&mut self.loops, 0);
        let (nodes, end) = self.list()?;
        self.variables = outer;
        self.loops = loops;
        match end {
            End::Closed => {
                self.defined.insert(name.to_owned(), nodes);
                Ok(())
            }
            End::Else => Err(self.error("unexpected {{else}} in define clause")),
            End::Text => Err(self.error("unexpected EOF")),
        }
    }

    fn define(&mut self) -> Result<(), TemplateError> {
        let (name, _) = self.name("define clause")?;
        self.close("define clause")?;
        self.body(&name)
    }

    fn template(&mut self) -> Result<Node, TemplateError> {
        let (name, span) = self.name("template clause")?;
        self.skip_space();
        if self.peek() == Some(&Kind::Close) {
            self.at += 1;
            return Ok(Node::Template { name, pipe: None, span });
        }
        let pipe = self.pipeline("template clause", false)?;
        Ok(Node::Template { name, pipe: Some(pipe), span })
    }

    fn block(&mut self) -> Result<Node, TemplateError> {
        let (name, span) = self.name("block clause")?;
        let pipe = self.pipeline("block clause", false)?;
        self.body(&name)?;
        Ok(Node::Template { name, pipe: Some(pipe), span })
    }

    /// A pipeline with its closing delimiter.
    fn pipeline(&mut self, place: &str, is_range: bool) -> Result<Pipe, TemplateError> {
        self.skip_space();
        let (variables, assigns) = self.declaration(is_range)?;
        let commands = self.commands(&Kind::Close, place)?;
        if !assigns {
            self.variables.extend(variables.iter().cloned());
        }
        Ok(Pipe { variables, assigns, commands })
    }

    /// `$a :=`, `$a =`, `$i, $e :=`; nothing is taken if there is none.
    fn declaration(&mut self, is_range: bool) -> Result<(Vec<String>, bool), TemplateError> {
        let begin = self.at;
        let mut names = Vec::new();
        while let Some(Kind::Variable(name)) = self.peek() {
            names.push(name.clone());
            self.at += 1;
            self.skip_space();
            match self.peek() {
                Some(Kind::Declare) => {
                    self.at += 1;
                    return Ok((names, false));
                }
                Some(Kind::Assign) => {
                    self.at += 1;
                    if let Some(unknown) = names.iter().find(|n| !self.variables.contains(n)) {
                        return Err(self.error(&format!("undefined variable \"{unknown}\"")));
                    }
                    return Ok((names, true));
                }
                Some(Kind::Comma) if is_range && names.len() == 1 => {
                    self.at += 1;
                    self.skip_space();
                }
                Some(Kind::Comma) => return Err(self.error("too many declarations in command")),
                _ => break,
            }
        }
        self.at = begin;
        Ok((Vec::new(), false))
    }

    fn commands(&mut self, closing: &Kind, place: &str) -> Result<Vec<Command>, TemplateError> {
        let mut commands: Vec<Command> = Vec::new();
        loop {
            self.skip_space();
            let command = self.command(place)?;
            let after = self.next();
            if command.args.is_empty() {
                return Err(match after.as_ref().map(|t| &t.kind) {
                    Some(k) if k == closing => self.error(&format!("missing value for {place}")),
                    Some(Kind::Pipe) => self.error("missing value for command"),
                    _ => self.unexpected(after.as_ref(), place),
                });
            }
            if let (false, Some(first)) = (commands.is_empty(), command.args.first())
                && matches!(first.kind, ExprKind::Literal(_) | ExprKind::Nil | ExprKind::Dot)
            {
                let text = self.text.get(first.span.start..first.span.end).unwrap_or("");
                let message =
                    format!("non executable command in pipeline stage {}: {text}", commands.len() + 1);
                return Err(self.error(&message));
            }
            commands.push(command);
            match after.as_ref().map(|t| &t.kind) {
                Some(k) if k == closing => return Ok(commands),
                Some(Kind::Pipe) => {}
                None if *closing == Kind::RightParen => return Err(self.error("unclosed left paren")),
                _ => return Err(self.unexpected(after.as_ref(), place)),
            }
        }
    }

    fn command(&mut self, place: &str) -> Result<Command, TemplateError> {
        let start = self.tokens.get(self.at).map_or(self.text.len(), |t| t.start);
        let mut args = Vec::new();
        let mut end = start;
        while let Some(arg) = self.operand(place)? {
            end = arg.span.end;
            args.push(arg);
            match self.peek() {
                Some(Kind::Space) => self.skip_space(),
                Some(Kind::Pipe | Kind::RightParen | Kind::Close) | None => break,
                Some(_) => {
                    let token = self.next();
                    return Err(self.unexpected(token.as_ref(), "operand"));
                }
            }
        }
        Ok(Command { span: Span { at: start, start, end }, args })
    }

    /// A term and the fields that follow it without a space; `None` where a command ends.
    fn operand(&mut self, place: &str) -> Result<Option<Expr>, TemplateError> {
        let Some(mut expr) = self.term(place)? else { return Ok(None) };
        let mut fields = Vec::new();
        let second = self.tokens.get(self.at).map_or(0, |t| t.start);
        while let Some(Kind::Field(name)) = self.peek() {
            fields.push(name.clone());
            let end = self.tokens.get(self.at).map_or(0, |t| t.end);
            expr.span.end = end;
            self.at += 1;
        }
        if fields.is_empty() {
            return Ok(Some(expr));
        }
        expr.span.at = second;
        let span = expr.span;
        let kind = match expr.kind {
            ExprKind::Fields(mut first) => {
                first.append(&mut fields);
                ExprKind::Fields(first)
            }
            ExprKind::Variable(name, mut first) => {
                first.append(&mut fields);
                ExprKind::Variable(name, first)
            }
            ExprKind::Literal(_) | ExprKind::Nil | ExprKind::Dot => {
                let text = self.text.get(span.start..second).unwrap_or("");
                return Err(self.error(&format!("unexpected . after term \"{text}\"")));
            }
            kind => ExprKind::Chain(Box::new(Expr { span, kind }), fields),
        };
        Ok(Some(Expr { span, kind }))
    }

    fn term(&mut self, place: &str) -> Result<Option<Expr>, TemplateError> {
        let Some(token) = self.tokens.get(self.at).cloned() else { return Ok(None) };
        let kind = match token.kind {
            Kind::Close | Kind::Pipe | Kind::RightParen => return Ok(None),
            Kind::Dot => ExprKind::Dot,
            Kind::Field(name) => ExprKind::Fields(vec![name]),
            Kind::Str(text) => ExprKind::Literal(Value::String(text)),
            Kind::Char(c) => ExprKind::Literal(Value::from(u32::from(c))),
            Kind::Number(ref text) => ExprKind::Literal(
                number(text).ok_or_else(|| self.error(&format!("bad number syntax: \"{text}\"")))?,
            ),
            Kind::Variable(name) => {
                if !self.variables.contains(&name) {
                    return Err(self.error(&format!("undefined variable \"{name}\"")));
                }
                ExprKind::Variable(name, Vec::new())
            }
            Kind::LeftParen => return self.group(&token).map(Some),
            Kind::Word(ref word) => match word.as_str() {
                "true" => ExprKind::Literal(Value::Bool(true)),
                "false" => ExprKind::Literal(Value::Bool(false)),
                "nil" => ExprKind::Nil,
                w if is_keyword(w) => {
                    self.at += 1;
                    return Err(self.unexpected(Some(&token), place));
                }
                w if funcs::find(w).is_some() => ExprKind::Function(w.to_owned()),
                w => return Err(self.error(&format!("function \"{w}\" not defined"))),
            },
            _ => {
                self.at += 1;
                return Err(self.unexpected(Some(&token), place));
            }
        };
        self.at += 1;
        let span = Span { at: token.start, start: token.start, end: token.end };
        Ok(Some(Expr { span, kind }))
    }

    fn group(&mut self, open: &Token) -> Result<Expr, TemplateError> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(self.error("too deeply nested"));
        }
        self.at += 1;
        let commands = self.commands(&Kind::RightParen, "parenthesized pipeline")?;
        self.depth -= 1;
        let end = self.tokens.get(self.at.saturating_sub(1)).map_or(open.end, |t| t.end);
        let pipe = Pipe { variables: Vec::new(), assigns: false, commands };
        let span = Span { at: open.start, start: open.start, end };
        Ok(Expr { span, kind: ExprKind::Group(Box::new(pipe)) })
    }
}

fn is_keyword(word: &str) -> bool {
    matches!(
        word,
        "if" | "else" | "end" | "range" | "with" | "define" | "block" | "template" | "break" | "continue"
    )
}

/// Go's number literals: decimal, `0x`, `0o`, `0b`, leading zero for octal, underscores, floats.
fn number(text: &str) -> Option<Value> {
    let plain = text.replace('_', "");
    let (negative, digits) = match plain.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, plain.strip_prefix('+').unwrap_or(&plain)),
    };
    let lower = digits.to_ascii_lowercase();
    let (radix, rest) = match lower.get(..2) {
        Some("0x") => (16, lower.get(2..)?),
        Some("0o") => (8, lower.get(2..)?),
        Some("0b") => (2, lower.get(2..)?),
        Some(two) if two.starts_with('0') && lower.bytes().all(|b| b.is_ascii_digit()) => {
            (8, lower.get(1..)?)
        }
        _ => (10, lower.as_str()),
    };
    if let Ok(whole) = i128::from_str_radix(rest, radix) {
        let whole = if negative { -whole } else { whole };
        return i64::try_from(whole).map(Value::from).or_else(|_| u64::try_from(whole).map(Value::from)).ok();
    }
    let float: f64 = if rest.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        rest.parse().ok()?
    } else {
        return None;
    };
    Number::from_f64(if negative { -float } else { float }).map(Value::Number)
}
