//! How Go prints values: `fmt`'s default format, `printf`, and the escapers.

use std::fmt::Write as _;

use serde_json::Value;

/// Go's name of a JSON value's type.
pub(crate) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "nil",
        Value::Bool(_) => "bool",
        Value::Number(n) if n.is_f64() => "float64",
        Value::Number(_) => "int",
        Value::String(_) => "string",
        Value::Array(_) => "[]interface {}",
        Value::Object(_) => "map[string]interface {}",
    }
}

/// Appends a value as `%v` prints it.
pub(crate) fn print_value(out: &mut String, value: &Value) {
    match value {
        Value::Null => out.push_str("<nil>"),
        Value::Bool(true) => out.push_str("true"),
        Value::Bool(false) => out.push_str("false"),
        Value::Number(n) => match n.as_f64() {
            Some(float) if n.is_f64() => out.push_str(&float_shortest(float)),
            _ => out.push_str(&n.to_string()),
        },
        Value::String(s) => out.push_str(s),
        Value::Array(list) => {
            out.push('[');
            for (at, item) in list.iter().enumerate() {
                if at > 0 {
                    out.push(' ');
                }
                print_value(out, item);
            }
            out.push(']');
        }
        Value::Object(map) => {
            let mut items: Vec<_> = map.iter().collect();
            items.sort_by_key(|(k, _)| *k);
            out.push_str("map[");
            for (at, (key, item)) in items.into_iter().enumerate() {
                if at > 0 {
                    out.push(' ');
                }
                out.push_str(key);
                out.push(':');
                print_value(out, item);
            }
            out.push(']');
        }
    }
}

/// `strconv`'s shortest form, with an exponent from 1e21 on and below 1e-4.
fn float_shortest(value: f64) -> String {
    let magnitude = value.abs();
    if magnitude != 0.0 && !(1e-4..1e21).contains(&magnitude) {
        return exponent_go(&format!("{value:e}"));
    }
    format!("{value}")
}

/// `1e21` as Go writes it: a sign and two digits at least.
fn exponent_go(text: &str) -> String {
    let Some((mantissa, exponent)) = text.split_once('e') else { return text.to_owned() };
    let (sign, digits) = match exponent.strip_prefix('-') {
        Some(digits) => ('-', digits),
        None => ('+', exponent),
    };
    format!("{mantissa}e{sign}{digits:0>2}")
}

/// `fmt.Sprint`: a space between operands when neither is a string.
pub(crate) fn sprint(args: &[Value]) -> String {
    let mut out = String::new();
    for (at, value) in args.iter().enumerate() {
        let before = at.checked_sub(1).and_then(|b| args.get(b));
        if before.is_some_and(|b| !b.is_string() && !value.is_string()) {
            out.push(' ');
        }
        print_value(&mut out, value);
    }
    out
}

/// `fmt.Sprintln`.
pub(crate) fn sprintln(args: &[Value]) -> String {
    let mut out = String::new();
    for (at, value) in args.iter().enumerate() {
        if at > 0 {
            out.push(' ');
        }
        print_value(&mut out, value);
    }
    out.push('\n');
    out
}

/// Flags, width and precision of one verb.
#[derive(Default)]
struct Spec {
    left: bool,
    plus: bool,
    space: bool,
    zero: bool,
    sharp: bool,
    width: Option<usize>,
    precision: Option<usize>,
}

/// Widest column that a format may ask for.
const WIDTH_MAX: usize = 4096;

/// `fmt.Sprintf` for what JSON can hold.
pub(crate) fn sprintf(format: &str, args: &[Value]) -> String {
    let mut out = String::new();
    let mut used = 0;
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut spec = Spec::default();
        while let Some(flag) = chars.next_if(|c| matches!(c, '-' | '+' | ' ' | '0' | '#')) {
            match flag {
                '-' => spec.left = true,
                '+' => spec.plus = true,
                ' ' => spec.space = true,
                '0' => spec.zero = true,
                _ => spec.sharp = true,
            }
        }
        spec.width = number(&mut chars, args, &mut used);
        if chars.next_if_eq(&'.').is_some() {
            spec.precision = Some(number(&mut chars, args, &mut used).unwrap_or(0));
        }
        match chars.next() {
            None => out.push_str("%!(NOVERB)"),
            Some('%') => out.push('%'),
            Some(verb) => match args.get(used) {
                None => push(&mut out, format_args!("%!{verb}(MISSING)")),
                Some(value) => {
                    used += 1;
                    out.push_str(&formatted(verb, &spec, value));
                }
            },
        }
    }
    for (at, extra) in args.iter().skip(used).enumerate() {
        out.push_str(if at == 0 { "%!(EXTRA " } else { ", " });
        out.push_str(type_name(extra));
        out.push('=');
        print_value(&mut out, extra);
    }
    if used < args.len() {
        out.push(')');
    }
    out
}

/// Writing to a `String` cannot fail.
fn push(out: &mut String, text: std::fmt::Arguments<'_>) {
    match out.write_fmt(text) {
        Ok(()) | Err(std::fmt::Error) => {}
    }
}

fn number(
    chars: &mut std::iter::Peekable<std::str::Chars<'_>>,
    args: &[Value],
    used: &mut usize,
) -> Option<usize> {
    if chars.next_if_eq(&'*').is_some() {
        let value = args.get(*used).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        *used += 1;
        return value.map(|n| n.min(WIDTH_MAX));
    }
    let mut value: Option<usize> = None;
    while let Some(digit) = chars.peek().and_then(|c| c.to_digit(10)) {
        chars.next();
        let digit = usize::try_from(digit).unwrap_or(0);
        value = Some((value.unwrap_or(0) * 10 + digit).min(WIDTH_MAX));
    }
    value
}

fn formatted(verb: char, spec: &Spec, value: &Value) -> String {
    if let (Value::Array(list), true) = (value, !matches!(verb, 'v')) {
        let parts: Vec<String> = list.iter().map(|v| formatted(verb, spec, v)).collect();
        return format!("[{}]", parts.join(" "));
    }
    let body = match (verb, value) {
        ('v', Value::Number(n)) if n.is_f64() => signed(spec, float_shortest(n.as_f64().unwrap_or(0.0))),
        ('v', Value::Number(n)) => signed(spec, n.to_string()),
        ('v', Value::String(s)) if spec.sharp => quote(s),
        ('v', other) => {
            let mut text = String::new();
            print_value(&mut text, other);
            text
        }
        ('s', Value::String(s)) => cut(s, spec.precision),
        ('q', Value::String(s)) => quote(&cut(s, spec.precision)),
        ('x' | 'X', Value::String(s)) => {
            let digits: String = s.bytes().map(|b| format!("{b:02x}")).collect();
            if verb == 'X' { digits.to_uppercase() } else { digits }
        }
        ('t', Value::Bool(b)) => b.to_string(),
        (_, Value::Number(n)) if !n.is_f64() => {
            let whole = n.as_i64().map(i128::from).or_else(|| n.as_u64().map(i128::from));
            match integer(verb, spec, whole.unwrap_or(0)) {
                Some(text) => text,
                None => return bad_verb(verb, value),
            }
        }
        (_, Value::Number(n)) => match float(verb, spec, n.as_f64().unwrap_or(0.0)) {
            Some(text) => text,
            None => return bad_verb(verb, value),
        },
        _ => return bad_verb(verb, value),
    };
    padded(&body, spec, value.is_number())
}

fn bad_verb(verb: char, value: &Value) -> String {
    if value.is_null() {
        return format!("%!{verb}(<nil>)");
    }
    let mut shown = String::new();
    print_value(&mut shown, value);
    format!("%!{verb}({}={shown})", type_name(value))
}

fn cut(text: &str, precision: Option<usize>) -> String {
    precision.map_or_else(|| text.to_owned(), |most| text.chars().take(most).collect())
}

fn signed(spec: &Spec, text: String) -> String {
    match (text.starts_with('-'), spec.plus, spec.space) {
        (false, true, _) => format!("+{text}"),
        (false, false, true) => format!(" {text}"),
        _ => text,
    }
}

fn integer(verb: char, spec: &Spec, value: i128) -> Option<String> {
    let magnitude = value.unsigned_abs();
    let digits = match verb {
        'd' => format!("{magnitude}"),
        'b' => format!("{magnitude:b}"),
        'o' => format!("{magnitude:o}"),
        'O' => format!("0o{magnitude:o}"),
        'x' => format!("{magnitude:x}"),
        'X' => format!("{magnitude:X}"),
        'c' => return u32::try_from(magnitude).ok().and_then(char::from_u32).map(String::from),
        'q' => {
            let c = u32::try_from(magnitude).ok().and_then(char::from_u32)?;
            return Some(format!("'{c}'"));
        }
        'U' => return Some(format!("U+{magnitude:04X}")),
        _ => return None,
    };
    let prefix = match verb {
        'x' if spec.sharp => "0x",
        'X' if spec.sharp => "0X",
        'b' if spec.sharp => "0b",
        'o' if spec.sharp => "0",
        _ => "",
    };
    let digits = format!("{:0>1$}", digits, spec.precision.unwrap_or(0));
    let sign = if value < 0 { "-" } else { "" };
    Some(signed(spec, format!("{sign}{prefix}{digits}")))
}

fn float(verb: char, spec: &Spec, value: f64) -> Option<String> {
    let precision = spec.precision.unwrap_or(6);
    let text = match verb {
        'f' | 'F' => format!("{value:.precision$}"),
        'e' => exponent_go(&format!("{value:.precision$e}")),
        'E' => exponent_go(&format!("{value:.precision$e}")).to_uppercase(),
        'g' | 'G' => match spec.precision {
            None => float_shortest(value),
            Some(digits) => {
                let scientific = format!("{value:.*e}", digits.max(1) - 1);
                let short: f64 = scientific.parse().unwrap_or(value);
                float_shortest(short)
            }
        },
        _ => return None,
    };
    Some(signed(spec, text))
}

fn padded(body: &str, spec: &Spec, is_number: bool) -> String {
    let width = spec.width.unwrap_or(0);
    let length = body.chars().count();
    if length >= width {
        return body.to_owned();
    }
    let fill = width - length;
    if spec.left {
        return format!("{body}{}", " ".repeat(fill));
    }
    if spec.zero && is_number {
        let sign = usize::from(body.starts_with(['-', '+', ' ']));
        let (sign, digits) = body.split_at(sign);
        return format!("{sign}{}{digits}", "0".repeat(fill));
    }
    format!("{}{body}", " ".repeat(fill))
}

/// `strconv.Quote`.
pub(crate) fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{b}' => out.push_str("\\v"),
            c if u32::from(c) < 0x20 || c == '\u{7f}' => {
                push(&mut out, format_args!("\\x{:02x}", u32::from(c)));
            }
            c if c.is_control() => push(&mut out, format_args!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// `template.HTMLEscapeString`.
pub(crate) fn html(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '"' => out.push_str("&#34;"),
            '\'' => out.push_str("&#39;"),
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\0' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// `template.JSEscapeString`.
pub(crate) fn js(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\\' | '\'' | '"' => {
                out.push('\\');
                out.push(c);
            }
            '<' | '>' | '&' | '=' => push(&mut out, format_args!("\\u{:04X}", u32::from(c))),
            c if c.is_control() => push(&mut out, format_args!("\\u{:04X}", u32::from(c))),
            c => out.push(c),
        }
    }
    out
}

/// `url.QueryEscape`.
pub(crate) fn url_query(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for b in text.bytes() {
        match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(b)),
            b' ' => out.push('+'),
            b => push(&mut out, format_args!("%{b:02X}")),
        }
    }
    out
}

/// JSON on one line as Docker's `json` function writes it: Go's encoder without its escapes for HTML.
#[must_use]
pub fn json(value: &Value) -> String {
    // Go escapes these two always, and they can stand in strings only.
    value.to_string().replace('\u{2028}', "\\u2028").replace('\u{2029}', "\\u2029")
}

/// JSON on one line as Go's encoder writes it, with `<`, `>` and `&` escaped.
#[must_use]
pub fn json_html_escaped(value: &Value) -> String {
    json(value).replace('<', "\\u003c").replace('>', "\\u003e").replace('&', "\\u0026")
}
