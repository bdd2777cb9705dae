//! `./dev tidy`: what the compiler cannot check.
//!
//! The table of imports between crates is the one in ARCHITECTURE.md: prose and check cannot drift apart.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::error::{TaskError, io};
use crate::{binary, say, scratch, shell};

/// Lines of a source file, tests not counted.
const FILE_LINES_MAX: usize = 800;

/// Checks the workspace.
///
/// # Errors
/// If something is not in order; every finding has been printed.
pub fn main() -> Result<(), TaskError> {
    let root = scratch::workspace();
    let architecture = read(&root.join("ARCHITECTURE.md"))?;
    let mut findings = Vec::new();
    findings.extend(imports(&architecture, &workspace_crates()?));
    let listed = shell::stdout(shell::command("git").arg("-C").arg(&root).args(["ls-files", "-z"]))?;
    for name in listed.split('\0').filter(|n| !n.is_empty()) {
        let path = root.join(name);
        if name.ends_with(".rs") && path.exists() {
            findings.extend(source(name, &read(&path)?));
        } else if path.exists() && is_text(name) {
            findings.extend(paths_of_a_machine(name, &read(&path)?));
        }
    }
    for finding in &findings {
        say!("{finding}");
    }
    if findings.is_empty() { Ok(()) } else { Err(TaskError::Failed(format!("{} findings", findings.len()))) }
}

fn read(path: &Path) -> Result<String, TaskError> {
    fs::read_to_string(path).map_err(io("read", path))
}

fn is_text(name: &str) -> bool {
    [".md", ".toml", ".sh", ".c", ".json", ".yml"].iter().any(|end| name.ends_with(end))
        || !name.rsplit('/').next().unwrap_or(name).contains('.')
}

/// A crate's dependencies on others of the workspace, without the common prefix; development ones are not
/// counted, they end in no binary.
fn workspace_crates() -> Result<BTreeMap<String, Vec<String>>, TaskError> {
    let text =
        shell::stdout(binary::cargo().args(["metadata", "--no-deps", "--offline", "--format-version", "1"]))?;
    let metadata: Value = serde_json::from_str(&text)
        .map_err(|source| TaskError::Json { subject: "cargo metadata".to_owned(), source })?;
    let list =
        |value: &Value, key: &str| value.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
    let name = |value: &Value| value.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
    Ok(list(&metadata, "packages")
        .iter()
        .map(|package| {
            let imports = list(package, "dependencies")
                .iter()
                .filter(|d| d.get("kind").is_none_or(Value::is_null))
                .map(&name)
                .filter_map(|d| short(&d))
                .collect();
            (name(package), imports)
        })
        .filter_map(|(name, imports)| Some((short(&name)?, imports)))
        .collect())
}

/// `coracle-net` is `net`, `coracle` and `xtask` are themselves, others are not ours.
fn short(name: &str) -> Option<String> {
    if name == "coracle" || name == "xtask" {
        return Some(name.to_owned());
    }
    name.strip_prefix("coracle-").map(str::to_owned)
}

/// Compares the imports with the table `| crate | … | may import |`.
fn imports(architecture: &str, crates: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let table = import_table(architecture);
    if table.is_empty() {
        return vec!["ARCHITECTURE.md: no table `| crate | … | may import |`".to_owned()];
    }
    let mut findings = Vec::new();
    for (name, used) in crates {
        let Some(allowed) = table.get(name.as_str()) else {
            findings.push(format!("ARCHITECTURE.md: the crate {name} is not in the import table"));
            continue;
        };
        for import in used.iter().filter(|i| !allowed.contains(i)) {
            findings.push(format!("crates: {name} imports {import}, which ARCHITECTURE.md does not allow"));
        }
    }
    for name in table.keys().filter(|n| !crates.contains_key(**n)) {
        findings.push(format!("ARCHITECTURE.md: the import table names {name}, which does not exist"));
    }
    findings
}

/// Rows of the import table: the first cell names the crate, the last one lists what it may import.
fn import_table(text: &str) -> BTreeMap<&str, Vec<String>> {
    text.lines()
        .skip_while(|l| !(l.starts_with("| crate |") && l.contains("may import")))
        .skip(2)
        .take_while(|l| l.starts_with('|'))
        .filter_map(|l| {
            let cells: Vec<&str> = l.trim_matches('|').split('|').map(str::trim).collect();
            let name = cells.first()?.trim_matches('`');
            let allowed = cells.last()?.split([',', ' ']).map(|w| w.trim_matches('`').to_owned()).collect();
            Some((name.strip_prefix("coracle-").unwrap_or(name), allowed))
        })
        .collect()
}

/// Checks one source file.
fn source(name: &str, text: &str) -> Vec<String> {
    let mut findings = paths_of_a_machine(name, text);
    let code = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap_or(text);
    let lines = code.lines().count();
    let is_test = name.contains("/tests") || name.starts_with("tests/");
    if lines > FILE_LINES_MAX && !is_test {
        findings.push(format!("{name}: {lines} lines, at most {FILE_LINES_MAX} without tests"));
    }
    if !text.starts_with("//!") && !name.ends_with("/tests.rs") {
        findings.push(format!("{name}: has no head; begin with `//!` and say what it is"));
    }
    findings
}

/// Finds paths that exist on one machine only.
fn paths_of_a_machine(name: &str, text: &str) -> Vec<String> {
    // Put together here, or this file would find itself.
    let forbidden =
        [["/wo", "rk/main"], ["/wo", "rk/shared"], ["/wo", "rk/."], ["/ro", "ot/."]].map(|p| p.concat());
    text.lines()
        .enumerate()
        .filter(|(_, line)| forbidden.iter().any(|p| holds_path(line, p)))
        .map(|(n, _)| format!("{name}:{}: names a path of one machine", n + 1))
        .collect()
}

/// Whether `line` has `prefix` at the beginning of a path.
fn holds_path(line: &str, prefix: &str) -> bool {
    line.match_indices(prefix).any(|(at, _)| {
        let before = line.get(..at).and_then(|l| l.chars().next_back());
        before.is_none_or(|c| !c.is_alphanumeric() && !"_-./}$~".contains(c))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "text\n\n| crate | may import |\n|---|---|\n| base | - |\n| `coracle-net` | `base`, sys (for sockets) |\n\nmore";

    fn crates(all: &[(&str, &[&str])]) -> BTreeMap<String, Vec<String>> {
        all.iter().map(|(n, i)| ((*n).to_owned(), i.iter().map(|s| (*s).to_owned()).collect())).collect()
    }

    #[test]
    fn an_import_that_the_table_allows_is_no_finding() {
        assert_eq!(
            imports(TABLE, &crates(&[("base", &[]), ("net", &["base", "sys"])])),
            Vec::<String>::new()
        );
    }

    #[test]
    fn a_forbidden_import_and_an_unknown_crate_are_findings() {
        let findings = imports(TABLE, &crates(&[("base", &["net"]), ("net", &[]), ("new", &[])]));
        assert_eq!(findings.len(), 2, "{findings:?}");
        assert!(findings.iter().any(|f| f.contains("base imports net")));
        assert!(findings.iter().any(|f| f.contains("new is not in the import table")));
    }

    #[test]
    fn a_crate_that_went_is_a_finding() {
        let findings = imports(TABLE, &crates(&[("base", &[])]));
        assert_eq!(findings, ["ARCHITECTURE.md: the import table names net, which does not exist"]);
    }

    #[test]
    fn a_long_file_is_a_finding_unless_it_is_tests() {
        let at_limit = format!("//! Head.\n{}", "x\n".repeat(FILE_LINES_MAX - 1));
        assert!(source("src/a.rs", &at_limit).is_empty());
        let beyond = format!("{at_limit}x\n");
        assert_eq!(source("src/a.rs", &beyond).len(), 1);
        assert!(source("tests/it/a.rs", &beyond).is_empty());
        let tests = format!("//! Head.\n\n#[cfg(test)]\nmod tests {{\n{}}}\n", "x\n".repeat(FILE_LINES_MAX));
        assert!(source("src/a.rs", &tests).is_empty());
    }

    #[test]
    fn a_file_without_head_is_a_finding() {
        assert_eq!(source("src/a.rs", "fn a() {}\n").len(), 1);
    }

    #[test]
    fn a_path_of_one_machine_is_a_finding() {
        let path = ["/wo", "rk/main/x"].concat();
        assert_eq!(
            paths_of_a_machine("a.md", &format!("see {path}")),
            ["a.md:1: names a path of one machine"]
        );
        let others = ["a/wo", "rk/main and /work/src"].concat();
        assert!(paths_of_a_machine("a.md", &others).is_empty());
    }
}
