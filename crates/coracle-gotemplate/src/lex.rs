//! Tokens of a template: text, and what stands between `{{` and `}}`.
//!
//! Trim markers and comments are gone after this; a space inside an action is a token, because `.A.B` and
//! `.A .B` differ.

use crate::TemplateError;

/// One token.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Token {
    /// Byte where it begins.
    pub(crate) start: usize,
    /// Byte after it.
    pub(crate) end: usize,
    /// What it is.
    pub(crate) kind: Kind,
}

/// What a token is.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Kind {
    Text(String),
    Open,
    Close,
    Space,
    /// A word: function, keyword, `true`, `nil`.
    Word(String),
    /// `.Name`, without the dot.
    Field(String),
    Dot,
    /// `$` or `$name`, with the sign.
    Variable(String),
    Str(String),
    Char(char),
    Number(String),
    LeftParen,
    RightParen,
    Pipe,
    Declare,
    Assign,
    Comma,
}

/// Number of the line on which a byte lies.
pub(crate) fn line_of(text: &str, at: usize) -> usize {
    1 + text.bytes().take(at).filter(|b| *b == b'\n').count()
}

struct Lexer<'a> {
    text: &'a str,
    at: usize,
    tokens: Vec<Token>,
}

/// Splits a template.
pub(crate) fn lex(text: &str) -> Result<Vec<Token>, TemplateError> {
    let mut lexer = Lexer { text, at: 0, tokens: Vec::new() };
    let mut trim_next = false;
    while lexer.at < text.len() {
        let rest = lexer.rest();
        let open = rest.find("{{").unwrap_or(rest.len());
        let plain = rest.get(..open).unwrap_or("");
        let after = rest.get(open..).unwrap_or("");
        let trims_left = after.starts_with("{{-") && after.get(3..).is_some_and(|r| r.starts_with(is_space));
        let mut shown = if trim_next { plain.trim_start_matches(is_space) } else { plain };
        if trims_left {
            shown = shown.trim_end_matches(is_space);
        }
        if !shown.is_empty() {
            let start = lexer.at;
            lexer.tokens.push(Token { start, end: start + open, kind: Kind::Text(shown.to_owned()) });
        }
        lexer.at += open;
        trim_next = false;
        if !after.is_empty() {
            trim_next = lexer.action(trims_left)?;
        }
    }
    Ok(lexer.tokens)
}

fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\r' | '\n')
}

fn is_word(c: char) -> bool {
    c == '_' || c.is_alphanumeric()
}

impl<'a> Lexer<'a> {
    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or("")
    }

    fn error(&self, at: usize, message: &str) -> TemplateError {
        TemplateError::Parse { line: line_of(self.text, at), message: message.to_owned() }
    }

    fn push(&mut self, length: usize, kind: Kind) {
        self.tokens.push(Token { start: self.at, end: self.at + length, kind });
        self.at += length;
    }

    /// One action from `{{` to `}}`; whether the text after it loses its leading space.
    fn action(&mut self, trims_left: bool) -> Result<bool, TemplateError> {
        let begin = self.at;
        let skip = if trims_left { 4 } else { 2 };
        let inner = self.text.get(begin + skip..).unwrap_or("");
        if inner.starts_with("/*") {
            return self.comment(begin, skip);
        }
        self.push(2, Kind::Open);
        if trims_left {
            self.at += 1;
        }
        loop {
            let rest = self.rest();
            let lean = rest.trim_start_matches(is_space);
            if lean.len() < rest.len() && lean.starts_with("-}}") {
                self.at += rest.len() - lean.len() + 1;
                self.push(2, Kind::Close);
                return Ok(true);
            }
            if rest.starts_with("}}") {
                self.push(2, Kind::Close);
                return Ok(false);
            }
            if rest.is_empty() {
                return Err(self.error(begin, "unclosed action"));
            }
            self.token(rest)?;
        }
    }

    fn comment(&mut self, begin: usize, skip: usize) -> Result<bool, TemplateError> {
        let inner = self.text.get(begin + skip..).unwrap_or("");
        let Some(end) = inner.find("*/") else { return Err(self.error(begin, "unclosed comment")) };
        let tail = inner.get(end + 2..).unwrap_or("");
        let lean = tail.trim_start_matches(is_space);
        if tail.starts_with("}}") {
            self.at = begin + skip + end + 4;
            return Ok(false);
        }
        if lean.len() < tail.len() && lean.starts_with("-}}") {
            self.at = self.text.len() - lean.len() + 3;
            return Ok(true);
        }
        Err(self.error(begin, "comment ends before closing delimiter"))
    }

    fn token(&mut self, rest: &str) -> Result<(), TemplateError> {
        let first = rest.chars().next().unwrap_or(' ');
        let second = rest.chars().nth(1).unwrap_or(' ');
        match first {
            c if is_space(c) => {
                let length = rest.len() - rest.trim_start_matches(is_space).len();
                self.push(length, Kind::Space);
            }
            '"' | '`' | '\'' => return self.quoted(rest, first),
            ':' if second == '=' => self.push(2, Kind::Declare),
            '=' => self.push(1, Kind::Assign),
            '|' => self.push(1, Kind::Pipe),
            ',' => self.push(1, Kind::Comma),
            '(' => self.push(1, Kind::LeftParen),
            ')' => self.push(1, Kind::RightParen),
            '$' => {
                let name = word(rest.get(1..).unwrap_or(""));
                self.push(1 + name.len(), Kind::Variable(format!("${name}")));
            }
            '.' if second.is_ascii_digit() => self.number(rest),
            '.' => {
                let name = word(rest.get(1..).unwrap_or(""));
                let kind = if name.is_empty() { Kind::Dot } else { Kind::Field(name.to_owned()) };
                self.push(1 + name.len(), kind);
            }
            '+' | '-' | '0'..='9' => self.number(rest),
            c if is_word(c) => {
                let name = word(rest);
                self.push(name.len(), Kind::Word(name.to_owned()));
            }
            c => {
                let message = format!("unexpected bad character U+{:04X} '{c}' in command", u32::from(c));
                return Err(self.error(self.at, &message));
            }
        }
        Ok(())
    }

    fn number(&mut self, rest: &str) {
        let mut previous = ' ';
        let end = rest
            .char_indices()
            .find(|(at, c)| {
                let sign = matches!(c, '+' | '-') && (*at == 0 || matches!(previous, 'e' | 'E' | 'p' | 'P'));
                previous = *c;
                !(sign || *c == '.' || is_word(*c))
            })
            .map_or(rest.len(), |(at, _)| at);
        self.push(end, Kind::Number(rest.get(..end).unwrap_or("").to_owned()));
    }

    fn quoted(&mut self, rest: &str, quote: char) -> Result<(), TemplateError> {
        let what = match quote {
            '"' => "unterminated quoted string",
            '`' => "unterminated raw quoted string",
            _ => "unterminated character constant",
        };
        let mut escaped = false;
        for (at, c) in rest.char_indices().skip(1) {
            match c {
                '\\' if quote != '`' && !escaped => escaped = true,
                '\n' if quote != '`' => break,
                c if c == quote && !escaped => {
                    let inner = rest.get(1..at).unwrap_or("");
                    let kind = self.unquote(inner, quote)?;
                    self.push(at + 1, kind);
                    return Ok(());
                }
                _ => escaped = false,
            }
        }
        Err(self.error(self.at, what))
    }

    fn unquote(&self, inner: &str, quote: char) -> Result<Kind, TemplateError> {
        if quote == '`' {
            return Ok(Kind::Str(inner.to_owned()));
        }
        let text = unescape(inner).ok_or_else(|| self.error(self.at, "invalid syntax"))?;
        if quote == '"' {
            return Ok(Kind::Str(text));
        }
        let mut chars = text.chars();
        match (chars.next(), chars.next()) {
            (Some(c), None) => Ok(Kind::Char(c)),
            _ => Err(self.error(self.at, &format!("malformed character constant: '{inner}'"))),
        }
    }
}

fn word(rest: &str) -> &str {
    let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
    rest.get(..end).unwrap_or("")
}

/// Go's escapes in interpreted strings.
fn unescape(text: &str) -> Option<String> {
    let mut bytes: Vec<u8> = Vec::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
            continue;
        }
        let e = chars.next()?;
        let mut digits = |n: usize, radix: u32, seed: Option<char>| -> Option<u32> {
            let mut value = seed.map_or(Some(0), |s| s.to_digit(radix))?;
            for _ in 0..n {
                value = value.checked_mul(radix)?.checked_add(chars.next()?.to_digit(radix)?)?;
            }
            Some(value)
        };
        let simple = match e {
            'a' => Some(7),
            'b' => Some(8),
            'f' => Some(12),
            'n' => Some(b'\n'),
            'r' => Some(b'\r'),
            't' => Some(b'\t'),
            'v' => Some(11),
            '\\' | '\'' | '"' => u8::try_from(e).ok(),
            'x' => u8::try_from(digits(2, 16, None)?).ok(),
            '0'..='7' => u8::try_from(digits(2, 8, Some(e))?).ok(),
            'u' | 'U' => {
                let code = digits(if e == 'u' { 4 } else { 8 }, 16, None)?;
                bytes.extend_from_slice(char::from_u32(code)?.encode_utf8(&mut [0; 4]).as_bytes());
                continue;
            }
            _ => None,
        };
        bytes.push(simple?);
    }
    String::from_utf8(bytes).ok()
}
