use serde_json::{Value, json};

use crate::{Functions, MethodResult, Root, Template};

fn data() -> Value {
    json!({
        "Name": "/web", "Id": "0123456789abcdef", "Size": 1982562, "Ratio": 0.5, "Running": true, "None": null,
        "State": {"Status": "running", "ExitCode": 0, "Pid": 42},
        "Env": ["A=1", "PATH=/bin"], "Mixed": ["a", 1],
        "Labels": {"b": "2", "a": "1"},
        "Ports": {"80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "8080"}], "53/udp": null},
        "Empty": [],
    })
}

fn check(template: &str, want: &str) {
    let value = data();
    let got = Template::parse(template).and_then(|t| t.render(&Root::map(&value)));
    assert_eq!(got.as_deref(), Ok(want), "{template}");
}

fn fails(template: &str, want: &str) {
    let value = data();
    let got = Template::parse(template).and_then(|t| t.render(&Root::map(&value)));
    assert_eq!(got.map_err(|e| e.to_string()), Err(want.to_owned()), "{template}");
}

#[test]
fn fields_and_nesting() {
    check("plain", "plain");
    check("{{.Name}} {{.State.Status}} {{.State.ExitCode}}", "/web running 0");
    check("{{.Ratio}} {{.Running}} {{.Size}}", "0.5 true 1982562");
    check("{{.Env}} {{.Labels}}", "[A=1 PATH=/bin] map[a:1 b:2]");
    check("{{.None}}", "<no value>");
    check("{{(.State).Pid}} {{$.State.Pid}}", "42 42");
}

#[test]
fn control_structures() {
    check("{{if .Running}}y{{else}}n{{end}}", "y");
    check("{{if .Empty}}y{{else if .Running}}z{{else}}n{{end}}", "z");
    check("{{with .State}}{{.Pid}}{{end}}{{with .Empty}}x{{else}}none{{end}}", "42none");
    check("{{with .Empty}}x{{else with .State}}{{.Pid}}{{end}}", "42");
    check("{{range .Env}}[{{.}}]{{end}}", "[A=1][PATH=/bin]");
    check("{{range $i, $e := .Env}}{{if $i}},{{end}}{{$e}}{{end}}", "A=1,PATH=/bin");
    check("{{range $k, $v := .Labels}}{{$k}}={{$v}};{{end}}", "a=1;b=2;");
    check("{{range .Empty}}x{{else}}empty{{end}}", "empty");
    check("{{range .None}}x{{else}}empty{{end}}", "empty");
    check("{{range 3}}{{.}}{{end}}", "012");
    check("{{range .Env}}{{if eq . \"PATH=/bin\"}}{{break}}{{end}}{{.}}{{end}}", "A=1");
    check("{{range .Env}}{{if eq . \"A=1\"}}{{continue}}{{end}}{{.}}{{end}}", "PATH=/bin");
}

#[test]
fn variables() {
    check("{{$x := .Name}}{{$x}}", "/web");
    check("{{$x := 1}}{{if true}}{{$x = 2}}{{end}}{{$x}}", "2");
    check("{{$x := 1}}{{if true}}{{$x := 2}}{{end}}{{$x}}", "1");
    check("{{$s := .State}}{{$s.Pid}}", "42");
    fails("{{$x}}", "template: :1: undefined variable \"$x\"");
    fails("{{if true}}{{$y := 1}}{{end}}{{$y}}", "template: :1: undefined variable \"$y\"");
}

#[test]
fn trimming_and_comments() {
    check("a  {{- .State.Pid -}}  b", "a42b");
    check("a {{/* no */}} b{{- /* no */ -}} c", "a  bc");
    check("{{- /* x */ -}} a", "a");
    check("{{3 -}} 1", "31");
    check("{{-3}}", "-3");
}

#[test]
fn literals_and_pipelines() {
    check(
        r#"{{"a\tb" | printf "%q"}} {{`r\aw`}} {{'a'}} {{0x10}} {{1e3}} {{true}}"#,
        r#""a\tb" r\aw 97 16 1000 true"#,
    );
    check(r#"{{.Env | len | printf "%03d"}}"#, "002");
    check(r#"{{printf "%-6s|%6.2f|%x|%v" "ab" 1.5 255 .Env}}"#, "ab    |  1.50|ff|[A=1 PATH=/bin]");
    check(
        r#"{{printf "%d %s" 1}} {{printf "%d" "x"}} {{printf "a" 1}}"#,
        "1 %!s(MISSING) %!d(string=x) a%!(EXTRA int=1)",
    );
    check(r#"{{print 1 2 "a" 3}}|{{println "a" 1}}"#, "1 2a3|a 1\n");
    check("{{slice .Id 2 5}} {{slice .Env 1}} {{index .Env 1}}", "234 [PATH=/bin] PATH=/bin");
    check(r#"{{(index (index .Ports "80/tcp") 0).HostPort}}"#, "8080");
    check(r#"{{index .Ports "99/tcp"}}"#, "<no value>");
}

#[test]
fn comparison_and_logic() {
    check(
        r#"{{eq .State.Status "exited" "running"}} {{ne 1 2}} {{lt 1 2}} {{ge "b" "a"}}"#,
        "true true true true",
    );
    check(r#"{{or .Empty "none"}} {{and .Running .Name}} {{not .Running}}"#, "none /web false");
    check(r#"{{and false (index .Env 9)}}"#, "false");
    fails(
        r#"{{eq 1 "a"}}"#,
        "template: :1:2: executing \"\" at <eq 1 \"a\">: error calling eq: incompatible types for comparison",
    );
}

#[test]
fn escapers() {
    check(r#"{{html "<a href='x'>&"}}"#, "&lt;a href=&#39;x&#39;&gt;&amp;");
    check(r#"{{js "<'\">"}}"#, r#"\u003C\'\"\u003E"#);
    check(r#"{{urlquery "a b/c?d=e~"}}"#, "a+b%2Fc%3Fd%3De~");
}

#[test]
fn named_templates() {
    check(r#"{{define "x"}}<{{.}}>{{end}}{{template "x" .Name}}"#, "</web>");
    check(r#"{{block "y" .State}}{{.Pid}}{{end}}"#, "42");
    fails(r#"{{template "z"}}"#, "template: :1:11: executing \"\" at <\"z\">: template \"z\" not defined");
    let endless = Template::parse(r#"{{define "x"}}{{template "x"}}{{end}}{{template "x"}}"#).unwrap();
    assert!(endless.render(&Root::map(&data())).is_err());
}

#[test]
fn docker_functions() {
    check(
        r#"{{json .State}} {{json .Env}} {{json "<&>"}}"#,
        r#"{"Status":"running","ExitCode":0,"Pid":42} ["A=1","PATH=/bin"] "<&>""#,
    );
    check(
        r#"{{upper .Name}} {{lower "ABC"}} {{title "ab cd_ef"}} {{split .Name "e"}}"#,
        "/WEB abc Ab Cd_ef [/w b]",
    );
    check(r#"{{join .Env ", "}}|{{truncate .Id 4}}|{{pad "1" 1 2}}|"#, "A=1, PATH=/bin|0123| 1  |");
}

#[test]
fn errors_read_as_in_go() {
    fails("{{.Nope}}", "template: :1:2: executing \"\" at <.Nope>: map has no entry for key \"Nope\"");
    fails(
        "\n {{.State.Nope}}",
        "template: :2:9: executing \"\" at <.State.Nope>: map has no entry for key \"Nope\"",
    );
    fails(
        "{{.Name.X}}",
        "template: :1:7: executing \"\" at <.Name.X>: can't evaluate field X in type string",
    );
    fails(
        "{{.None.X}}",
        "template: :1:7: executing \"\" at <.None.X>: nil pointer evaluating interface {}.X",
    );
    fails(
        "{{upper .Env}}",
        "template: :1:8: executing \"\" at <.Env>: wrong type for value; expected string; got []interface {}",
    );
    fails(
        "{{join .Mixed \",\"}}",
        "template: :1:7: executing \"\" at <.Mixed>: wrong type for value; expected []string; got []interface {}",
    );
    fails(
        "{{index .Env 5}}",
        "template: :1:2: executing \"\" at <index .Env 5>: error calling index: index out of range: 5",
    );
    fails("{{len 3}}", "template: :1:2: executing \"\" at <len 3>: error calling len: len of type int");
    fails("{{len}}", "template: :1:2: executing \"\" at <len>: wrong number of args for len: want 1 got 0");
    fails(
        "{{range .Name}}{{end}}",
        "template: :1:8: executing \"\" at <.Name>: range can't iterate over /web",
    );
    fails("{{.Name 1}}", "template: :1:2: executing \"\" at <.Name>: Name is not a method but has arguments");
    fails("{{3 4}}", "template: :1:2: executing \"\" at <3>: can't give argument to non-function 3");
    fails("{{nil}}", "template: :1:2: executing \"\" at <nil>: nil is not a command");
}

#[test]
fn syntax_errors_read_as_in_go() {
    fails("{{.Name", "template: :1: unclosed action");
    fails("{{nosuch .Name}}", "template: :1: function \"nosuch\" not defined");
    fails("{{if .Name}}", "template: :1: unexpected EOF");
    fails("{{end}}", "template: :1: unexpected {{end}}");
    fails("a\n{{}}", "template: :2: missing value for command");
    fails("{{\"a}}", "template: :1: unterminated quoted string");
    fails("{{(len .Name}}", "template: :1: unexpected \"}}\" in parenthesized pipeline");
    fails("{{.Name | 3}}", "template: :1: non executable command in pipeline stage 2: 3");
    fails("{{/* x", "template: :1: unclosed comment");
    fails("{{break}}", "template: :1: {{break}} outside {{range}}");
    fails("{{#}}", "template: :1: unexpected bad character U+0023 '#' in command");
}

#[test]
fn a_structure_names_its_type_and_has_methods() {
    let value = data();
    let labelled = |name: &str, args: &[Value]| -> MethodResult {
        (name == "Label").then(|| match args {
            [Value::String(key)] => Ok(Value::String(format!("<{key}>"))),
            _ => Err("want a name".to_owned()),
        })
    };
    let root = Root {
        value: &value,
        type_name: Some("*formatter.ContainerContext"),
        method: Some(&labelled),
        null_text: Some(|field| (field == "None").then_some("[]")),
    };
    let render = |text: &str| Template::parse(text).and_then(|t| t.render(&root)).map_err(|e| e.to_string());
    assert_eq!(render("{{.Label \"a.b\"}}{{.None}}"), Ok("<a.b>[]".to_owned()));
    assert_eq!(
        render("{{.Foo}}"),
        Err("template: :1:2: executing \"\" at <.Foo>: can't evaluate field Foo in type *formatter.ContainerContext".to_owned())
    );
}

#[test]
fn header_functions_keep_their_argument() {
    let value = json!({"Names": "NAMES", "ID": "CONTAINER ID"});
    let template = Template::parse("{{upper .Names}} {{truncate .ID 4}} {{json .Names}}").unwrap();
    let got = template.render_with(&Root::map(&value), Functions::Header);
    assert_eq!(got.as_deref(), Ok("NAMES CONTAINER ID NAMES"));
}
