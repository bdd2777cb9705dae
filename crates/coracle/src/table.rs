//! Lists of things: as a table, as JSON, or by the user's template.
//!
//! Columns are those of Go's `text/tabwriter` as Docker sets it up: a cell is padded to the widest of its
//! column plus three, and to ten at least; the last cell of a line is not padded.

use std::collections::BTreeMap;

use coracle_gotemplate::{Functions, MethodResult, Root, Template, json_html_escaped};
use serde_json::{Map, Value};

use crate::failure::Failure;
use crate::output;

/// What a list of one kind of thing looks like.
pub(crate) struct Shape {
    /// Go's name of the row's type.
    pub(crate) type_name: &'static str,
    /// Headers by field.
    pub(crate) headers: &'static [(&'static str, &'static str)],
    /// Field that `-q` prints.
    pub(crate) quiet: &'static str,
}

/// One thing.
pub(crate) struct Row {
    /// Its fields, all texts.
    pub(crate) fields: Value,
    /// Its labels, for `.Label "x"`.
    pub(crate) labels: BTreeMap<String, String>,
}

const WIDTH_MIN: usize = 10;
const PADDING: usize = 3;

/// Prints a list. `columns` are the fields of the default table.
pub(crate) fn print(
    shape: &Shape,
    columns: &[&str],
    rows: &[Row],
    format: Option<&str>,
    quiet: bool,
) -> Result<(), Failure> {
    output::print(&render(shape, columns, rows, format, quiet)?)
}

fn render(
    shape: &Shape,
    columns: &[&str],
    rows: &[Row],
    format: Option<&str>,
    quiet: bool,
) -> Result<String, Failure> {
    let format = format.map(|f| f.trim_matches(' ')).filter(|f| !f.is_empty());
    match format {
        None | Some("table") if quiet => {
            Ok(rows.iter().map(|r| format!("{}\n", cell(r, shape.quiet))).collect())
        }
        None | Some("table") => Ok(plain(shape, columns, rows)),
        Some("json") => Ok(rows.iter().map(|r| format!("{}\n", json_html_escaped(&r.fields))).collect()),
        Some(format) => match format.strip_prefix("table").filter(|rest| rest.starts_with([' ', '\t'])) {
            Some(rest) => by_template(shape, rest.trim_start(), rows, true),
            None => by_template(shape, format, rows, false),
        },
    }
}

fn cell<'a>(row: &'a Row, field: &str) -> &'a str {
    row.fields.get(field).and_then(Value::as_str).unwrap_or("")
}

fn header(shape: &Shape, field: &str) -> &'static str {
    shape.headers.iter().find(|(f, _)| *f == field).map_or("", |(_, h)| h)
}

fn plain(shape: &Shape, columns: &[&str], rows: &[Row]) -> String {
    let mut text = columns.iter().map(|c| header(shape, c)).collect::<Vec<_>>().join("\t");
    text.push('\n');
    for row in rows {
        // A cell is one cell, whatever is in it.
        let cell = |c: &&str| output::harmless(&cell(row, c).replace(['\t', '\n'], " ")).into_owned();
        let cells: Vec<String> = columns.iter().map(cell).collect();
        text.push_str(&cells.join("\t"));
        text.push('\n');
    }
    align(&text)
}

fn by_template(shape: &Shape, text: &str, rows: &[Row], table: bool) -> Result<String, Failure> {
    let text = text.replace("\\t", "\t").replace("\\n", "\n");
    let template =
        Template::parse(&text).map_err(|e| Failure::plain(format!("template parsing error: {e}")))?;
    let failed = |e| Failure::plain(format!("failed to execute template: {e}"));
    let mut out = String::new();
    if table {
        let fields: Map<String, Value> =
            shape.headers.iter().map(|(f, h)| ((*f).to_owned(), Value::from(*h))).collect();
        let fields = Value::Object(fields);
        let root = Root { method: Some(&label_header), ..root(&fields, shape) };
        out.push_str(&template.render_with(&root, Functions::Header).map_err(failed)?);
        out.push('\n');
    }
    for row in rows {
        let method = |name: &str, args: &[Value]| -> MethodResult {
            (name == "Label").then(|| match args {
                [Value::String(key)] => Ok(Value::from(row.labels.get(key).map_or("", String::as_str))),
                _ => Err(format!("wrong number of args for Label: want 1 got {}", args.len())),
            })
        };
        let root = Root { method: Some(&method), ..root(&row.fields, shape) };
        out.push_str(&template.render(&root).map_err(failed)?);
        out.push('\n');
    }
    Ok(if table { align(&out) } else { out })
}

fn root<'a>(fields: &'a Value, shape: &'a Shape) -> Root<'a> {
    Root { value: fields, type_name: Some(shape.type_name), method: None, null_text: Some(|_| Some("<nil>")) }
}

/// The header of `.Label "com.example.some-name"` is `some name`.
fn label_header(name: &str, args: &[Value]) -> MethodResult {
    (name == "Label").then(|| {
        let label = args.first().and_then(Value::as_str).unwrap_or("");
        Ok(Value::from(label.rsplit('.').next().unwrap_or("").replace(['-', '_'], " ")))
    })
}

/// Go's `tabwriter`: a column is a run of lines that have a cell there with a tab after it.
pub(crate) fn align(text: &str) -> String {
    let body = text.strip_suffix('\n').unwrap_or(text);
    let lines: Vec<Vec<&str>> = body.split('\n').map(|l| l.split('\t').collect()).collect();
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let mut widths: Vec<Vec<usize>> = lines.iter().map(|l| vec![0; l.len()]).collect();
    for column in 0..columns {
        let ends_there = |line: &[&str]| line.len() > column + 1;
        let mut start = 0;
        while start < lines.len() {
            let run = lines.iter().skip(start).take_while(|l| ends_there(l)).count();
            let cells = lines.iter().skip(start).take(run).filter_map(|l| l.get(column));
            let widest = cells.map(|c| c.chars().count() + PADDING).max().unwrap_or(0).max(WIDTH_MIN);
            for line in widths.iter_mut().skip(start).take(run) {
                if let Some(width) = line.get_mut(column) {
                    *width = widest;
                }
            }
            start += run.max(1);
        }
    }
    let mut out = String::with_capacity(text.len() * 2);
    for (line, widths) in lines.iter().zip(&widths) {
        for (cell, width) in line.iter().zip(widths) {
            out.push_str(cell);
            out.extend(std::iter::repeat_n(' ', width.saturating_sub(cell.chars().count())));
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::{Row, Shape, align, render};

    const SHAPE: Shape = Shape {
        type_name: "*formatter.ContainerContext",
        headers: &[("ID", "CONTAINER ID"), ("Names", "NAMES"), ("Status", "STATUS")],
        quiet: "ID",
    };

    fn rows() -> Vec<Row> {
        let row = |id: &str, name: &str, status: &str| Row {
            fields: json!({"ID": id, "Names": name, "Status": status}),
            labels: BTreeMap::from([("a.b-c".to_owned(), "v".to_owned())]),
        };
        vec![
            row("c7ab4c0104c9", "featc2", "Exited (3) 2 seconds ago"),
            row("e1d7df3f3bb3", "featc1", "Up > 2"),
        ]
    }

    fn shown(format: Option<&str>, quiet: bool) -> Result<String, String> {
        render(&SHAPE, &["ID", "Names", "Status"], &rows(), format, quiet).map_err(|e| e.message)
    }

    #[test]
    fn the_default_table_is_padded_like_dockers() {
        let want = "CONTAINER ID   NAMES     STATUS\nc7ab4c0104c9   featc2    Exited (3) 2 seconds ago\ne1d7df3f3bb3   featc1    Up > 2\n";
        assert_eq!(shown(None, false).as_deref(), Ok(want));
        assert_eq!(shown(Some(r"table {{.ID}}\t{{.Names}}\t{{.Status}}"), false).as_deref(), Ok(want));
    }

    #[test]
    fn quiet_json_and_templates() {
        assert_eq!(shown(None, true).as_deref(), Ok("c7ab4c0104c9\ne1d7df3f3bb3\n"));
        assert!(shown(Some("json"), false).unwrap().contains(r#""Status":"Up \u003e 2"}"#));
        assert_eq!(
            shown(Some(r#"{{.Names}} {{.Label "a.b-c"}}{{.Label "x"}}"#), false).as_deref(),
            Ok("featc2 v\nfeatc1 v\n")
        );
        assert_eq!(
            shown(Some(r#"table {{.Names}} {{.Label "a.b-c"}}"#), false).unwrap().lines().next(),
            Some("NAMES b c")
        );
    }

    #[test]
    fn an_unknown_field_is_dockers_error() {
        assert_eq!(
            shown(Some("{{.Foo}}"), false),
            Err("failed to execute template: template: :1:2: executing \"\" at <.Foo>: can't evaluate field Foo in type *formatter.ContainerContext".to_owned())
        );
        assert_eq!(
            shown(Some("{{"), false),
            Err("template parsing error: template: :1: unclosed action".to_owned())
        );
    }

    #[test]
    fn an_empty_last_cell_leaves_the_padding() {
        assert_eq!(align("SIZE\tCOMMENT\n2.01MB\t\n"), "SIZE      COMMENT\n2.01MB    \n");
        assert_eq!(align("a\n"), "a\n");
    }
}
