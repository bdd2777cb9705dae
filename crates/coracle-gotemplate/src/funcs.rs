//! The functions of templates: Go's and Docker's.

use std::cmp::Ordering;

use serde_json::Value;

use crate::exec::is_true;
use crate::format::{html, js, json, print_value, sprint, sprintf, sprintln, type_name, url_query};

/// What a parameter takes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Param {
    Any,
    Str,
    Int,
    Strings,
}

impl Param {
    pub(crate) fn takes(self, value: &Value) -> bool {
        match self {
            Self::Any => true,
            Self::Str => value.is_string(),
            Self::Int => value.is_i64() || value.is_u64(),
            Self::Strings => {
                value.is_null() || value.as_array().is_some_and(|list| list.iter().all(Value::is_string))
            }
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Any => "interface {}",
            Self::Str => "string",
            Self::Int => "int",
            Self::Strings => "[]string",
        }
    }
}

/// One function.
pub(crate) struct Function {
    name: &'static str,
    pub(crate) params: &'static [Param],
    pub(crate) rest: Option<Param>,
    /// It is one of Docker's: in a table's header it gives back its first argument.
    pub(crate) docker: bool,
    pub(crate) run: fn(&[Value]) -> Result<Value, String>,
}

const fn go(
    name: &'static str,
    params: &'static [Param],
    rest: Option<Param>,
    run: fn(&[Value]) -> Result<Value, String>,
) -> Function {
    Function { name, params, rest, docker: false, run }
}

const fn docker(
    name: &'static str,
    params: &'static [Param],
    run: fn(&[Value]) -> Result<Value, String>,
) -> Function {
    Function { name, params, rest: None, docker: true, run }
}

use Param::{Any, Int, Str, Strings};

static FUNCTIONS: &[Function] = &[
    go("and", &[Any], Some(Any), |_| Ok(Value::Null)),
    go("or", &[Any], Some(Any), |_| Ok(Value::Null)),
    go("not", &[Any], None, |a| Ok(Value::Bool(!is_true(arg(a, 0))))),
    go("eq", &[Any], Some(Any), eq),
    go("ne", &[Any, Any], None, |a| Ok(Value::Bool(!same(arg(a, 0), arg(a, 1))?))),
    go("lt", &[Any, Any], None, |a| Ok(Value::Bool(order(a)? == Ordering::Less))),
    go("le", &[Any, Any], None, |a| Ok(Value::Bool(order(a)? != Ordering::Greater))),
    go("gt", &[Any, Any], None, |a| Ok(Value::Bool(order(a)? == Ordering::Greater))),
    go("ge", &[Any, Any], None, |a| Ok(Value::Bool(order(a)? != Ordering::Less))),
    go("len", &[Any], None, len),
    go("index", &[Any], Some(Any), index),
    go("slice", &[Any], Some(Any), slice),
    go("call", &[Any], Some(Any), |a| Err(format!("call of non-function of type {}", type_name(arg(a, 0))))),
    go("print", &[], Some(Any), |a| Ok(Value::String(sprint(a)))),
    go("printf", &[Str], Some(Any), |a| Ok(Value::String(sprintf(text(a, 0), a.get(1..).unwrap_or(&[]))))),
    go("println", &[], Some(Any), |a| Ok(Value::String(sprintln(a)))),
    go("html", &[], Some(Any), |a| Ok(Value::String(html(&joined(a))))),
    go("js", &[], Some(Any), |a| Ok(Value::String(js(&joined(a))))),
    go("urlquery", &[], Some(Any), |a| Ok(Value::String(url_query(&joined(a))))),
    docker("json", &[Any], |a| Ok(Value::String(json(arg(a, 0))))),
    docker("split", &[Str, Str], |a| Ok(split(text(a, 0), text(a, 1)))),
    docker("join", &[Strings, Str], |a| Ok(join(arg(a, 0), text(a, 1)))),
    docker("title", &[Str], |a| Ok(Value::String(title(text(a, 0))))),
    docker("lower", &[Str], |a| Ok(Value::String(text(a, 0).to_lowercase()))),
    docker("upper", &[Str], |a| Ok(Value::String(text(a, 0).to_uppercase()))),
    docker("pad", &[Str, Int, Int], |a| Ok(Value::String(pad(text(a, 0), arg(a, 1), arg(a, 2))))),
    docker("truncate", &[Str, Int], |a| Ok(Value::String(truncate(text(a, 0), arg(a, 1))))),
];

/// Looks a function up.
pub(crate) fn find(name: &str) -> Option<&'static Function> {
    FUNCTIONS.iter().find(|f| f.name == name)
}

fn arg(args: &[Value], at: usize) -> &Value {
    args.get(at).unwrap_or(&Value::Null)
}

fn text(args: &[Value], at: usize) -> &str {
    arg(args, at).as_str().unwrap_or("")
}

fn joined(args: &[Value]) -> String {
    match args {
        [Value::String(only)] => only.clone(),
        _ => sprint(args),
    }
}

fn eq(args: &[Value]) -> Result<Value, String> {
    if args.len() < 2 {
        return Err("missing argument for comparison".to_owned());
    }
    for other in args.iter().skip(1) {
        if same(arg(args, 0), other)? {
            return Ok(Value::Bool(true));
        }
    }
    Ok(Value::Bool(false))
}

fn same(a: &Value, b: &Value) -> Result<bool, String> {
    match (a, b) {
        (Value::Null, Value::Null) => Ok(true),
        (Value::Null, _) | (_, Value::Null) => Ok(false),
        (Value::Array(_) | Value::Object(_), _) => Err(format!("non-comparable type: {}", type_name(a))),
        (_, Value::Array(_) | Value::Object(_)) => Err(format!("non-comparable type: {}", type_name(b))),
        (Value::Bool(a), Value::Bool(b)) => Ok(a == b),
        (Value::String(a), Value::String(b)) => Ok(a == b),
        (Value::Number(_), Value::Number(_)) => Ok(numbers(a, b)? == Ordering::Equal),
        _ => Err("incompatible types for comparison".to_owned()),
    }
}

fn order(args: &[Value]) -> Result<Ordering, String> {
    match (arg(args, 0), arg(args, 1)) {
        (Value::String(a), Value::String(b)) => Ok(a.cmp(b)),
        (a @ Value::Number(_), b @ Value::Number(_)) => numbers(a, b),
        (Value::String(_), Value::Number(_)) | (Value::Number(_), Value::String(_)) => {
            Err("incompatible types for comparison".to_owned())
        }
        _ => Err("invalid type for comparison".to_owned()),
    }
}

fn whole(value: &Value) -> Option<i128> {
    value.as_i64().map(i128::from).or_else(|| value.as_u64().map(i128::from))
}

fn numbers(a: &Value, b: &Value) -> Result<Ordering, String> {
    match (whole(a), whole(b)) {
        (Some(a), Some(b)) => Ok(a.cmp(&b)),
        (None, None) => match a.as_f64().partial_cmp(&b.as_f64()) {
            Some(order) => Ok(order),
            None => Err("incompatible types for comparison".to_owned()),
        },
        _ => Err("incompatible types for comparison".to_owned()),
    }
}

fn len(args: &[Value]) -> Result<Value, String> {
    match arg(args, 0) {
        // A nil slice or map of Go's, which JSON writes as null.
        Value::Null => Ok(Value::from(0)),
        Value::String(s) => Ok(Value::from(s.len())),
        Value::Array(a) => Ok(Value::from(a.len())),
        Value::Object(o) => Ok(Value::from(o.len())),
        other => Err(format!("len of type {}", type_name(other))),
    }
}

/// An index into something of a length, or why it is none.
fn position(at: &Value, end: usize) -> Result<usize, String> {
    let Some(number) = whole(at) else {
        return Err(match at {
            Value::Null => "cannot index slice/array with nil".to_owned(),
            other => format!("cannot index slice/array with type {}", type_name(other)),
        });
    };
    usize::try_from(number).ok().filter(|n| *n <= end).ok_or_else(|| format!("index out of range: {number}"))
}

fn index(args: &[Value]) -> Result<Value, String> {
    let mut value = arg(args, 0).clone();
    for at in args.iter().skip(1) {
        value = match (&value, at) {
            (Value::Null, _) => return Err("index of untyped nil".to_owned()),
            (Value::Array(list), at) => {
                let position = position(at, list.len())?;
                list.get(position).cloned().ok_or_else(|| format!("index out of range: {position}"))?
            }
            (Value::String(s), at) => {
                let position = position(at, s.len())?;
                let byte = s.as_bytes().get(position);
                Value::from(*byte.ok_or_else(|| format!("index out of range: {position}"))?)
            }
            (Value::Object(map), Value::String(key)) => map.get(key).cloned().unwrap_or(Value::Null),
            (Value::Object(_), Value::Null) => {
                return Err("value is nil; should be of type string".to_owned());
            }
            (Value::Object(_), at) => {
                return Err(format!("value has type {}; should be string", type_name(at)));
            }
            (other, _) => return Err(format!("can't index item of type {}", type_name(other))),
        };
    }
    Ok(value)
}

fn slice(args: &[Value]) -> Result<Value, String> {
    let value = arg(args, 0);
    let length = match value {
        Value::String(s) => s.len(),
        Value::Array(a) => a.len(),
        Value::Null => return Err("slice of untyped nil".to_owned()),
        other => return Err(format!("can't slice item of type {}", type_name(other))),
    };
    let most = if value.is_string() { 2 } else { 3 };
    if args.len() - 1 > most {
        return Err(if value.is_string() {
            "cannot 3-index slice a string".to_owned()
        } else {
            format!("too many slice indexes: {}", args.len() - 1)
        });
    }
    let mut bounds = [0, length, length];
    for (bound, at) in bounds.iter_mut().zip(args.iter().skip(1)) {
        *bound = position(at, length)?;
    }
    let [from, to, capacity] = bounds;
    for (a, b) in [(from, to), (to, capacity)] {
        if a > b {
            return Err(format!("invalid slice index: {a} > {b}"));
        }
    }
    Ok(match value {
        Value::Array(list) => Value::Array(list.get(from..to).unwrap_or(&[]).to_vec()),
        other => {
            let bytes = other.as_str().unwrap_or("").as_bytes().get(from..to).unwrap_or(&[]);
            Value::String(String::from_utf8_lossy(bytes).into_owned())
        }
    })
}

fn split(text: &str, separator: &str) -> Value {
    let parts: Vec<Value> = if separator.is_empty() {
        text.chars().map(|c| Value::String(c.to_string())).collect()
    } else {
        text.split(separator).map(Value::from).collect()
    };
    Value::Array(parts)
}

fn join(list: &Value, separator: &str) -> Value {
    let mut out = String::new();
    for (at, item) in list.as_array().into_iter().flatten().enumerate() {
        if at > 0 {
            out.push_str(separator);
        }
        print_value(&mut out, item);
    }
    Value::String(out)
}

/// Go's `strings.Title`: a letter after anything that is no letter, digit or underscore is a capital.
fn title(text: &str) -> String {
    let mut inside = false;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if inside {
            out.push(c);
        } else {
            out.extend(c.to_uppercase());
        }
        inside = c == '_' || c.is_alphanumeric();
    }
    out
}

/// Longest padding: a template must not fill the memory.
const PAD_MAX: usize = 4096;

fn count(value: &Value) -> usize {
    value.as_u64().and_then(|n| usize::try_from(n).ok()).unwrap_or(0)
}

fn pad(text: &str, before: &Value, after: &Value) -> String {
    if text.is_empty() {
        return String::new();
    }
    let (before, after) = (count(before).min(PAD_MAX), count(after).min(PAD_MAX));
    format!("{}{text}{}", " ".repeat(before), " ".repeat(after))
}

fn truncate(text: &str, length: &Value) -> String {
    let end = (0..=count(length).min(text.len())).rev().find(|at| text.is_char_boundary(*at));
    text.get(..end.unwrap_or(0)).unwrap_or("").to_owned()
}
