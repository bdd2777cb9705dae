//! `-v`, `--mount` and `--tmpfs`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use coracle_engine::MountRequest;
use coracle_state::container::{BindIdmap, MountSource, MountSpec};

use super::{Outside, Parse, invalid};
use crate::cli::flags::Parsed;

/// All mounts asked for, in the order volumes, mounts, memory.
pub(super) fn read(parsed: &Parsed, outside: &Outside<'_>) -> Parse<Vec<MountRequest>> {
    let mut all: Vec<MountRequest> = Vec::new();
    let mut seen = BTreeSet::new();
    // The very same option twice is one, as with Docker.
    for text in parsed.all("volume").filter(|text| seen.insert(*text)) {
        add(&mut all, volume(text, outside)?)?;
    }
    for text in parsed.all("mount") {
        add(&mut all, long_form(text, outside).map_err(|e| invalid(text, "mount", e))?)?;
    }
    for text in parsed.all("tmpfs") {
        add(&mut all, tmpfs(text)?)?;
    }
    Ok(all)
}

fn add(all: &mut Vec<MountRequest>, mount: MountRequest) -> Parse<()> {
    if all.iter().any(|m| m.spec.target == mount.spec.target) {
        return Err(format!("Duplicate mount point: {}", mount.spec.target));
    }
    all.push(mount);
    Ok(())
}

fn request(target: String, source: MountSource, read_only: bool, mode: &str) -> MountRequest {
    MountRequest {
        spec: MountSpec { target, source, read_only, mode: mode.to_owned() },
        create_source: false,
        no_copy: false,
        volume_labels: BTreeMap::new(),
        volume_options: BTreeMap::new(),
    }
}

/// An absolute path without `.`, `..` and doubled slashes.
fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for component in Path::new(path).components() {
        match component {
            Component::Normal(part) => parts.extend(part.to_str()),
            Component::ParentDir => {
                parts.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    format!("/{}", parts.join("/"))
}

/// The path in the container, cleaned, or why it cannot be one.
fn target(path: &str) -> Parse<String> {
    if !path.starts_with('/') {
        return Err(format!("invalid mount path: '{path}' mount path must be absolute"));
    }
    let path = clean(path);
    if path == "/" {
        return Err("invalid specification: destination can't be '/'".to_owned());
    }
    Ok(path)
}

fn absolute(path: &str, outside: &Outside<'_>) -> Parse<String> {
    if path.starts_with('/') {
        return Ok(clean(path));
    }
    let directory = (outside.directory)().map_err(|e| format!("cannot tell the current directory: {e}"))?;
    Ok(clean(&directory.join(path).to_string_lossy()))
}

const PROPAGATIONS: &[&str] = &["private", "rprivate", "shared", "rshared", "slave", "rslave"];

/// What the last part of `-v` says.
#[derive(Default)]
struct Mode<'a> {
    read_only: bool,
    no_copy: bool,
    propagation: &'a str,
    idmap: BindIdmap,
}

fn mode(text: &str) -> Option<Mode<'_>> {
    let mut mode = Mode::default();
    let (mut access, mut copies) = (0, 0);
    for part in text.split(',') {
        match part {
            "ro" | "readonly" => (mode.read_only, access) = (true, access + 1),
            "rw" => access += 1,
            "nocopy" => (mode.no_copy, copies) = (true, copies + 1),
            // Labels of SELinux and hints for other systems: nothing to do here.
            "z" | "Z" | "consistent" | "cached" | "delegated" => {}
            "idmap" => mode.idmap = BindIdmap::Userns,
            p if p.starts_with("idmap=") => mode.idmap = idmap(p.trim_start_matches("idmap="))?,
            p if PROPAGATIONS.contains(&p) && mode.propagation.is_empty() => mode.propagation = p,
            _ => return None,
        }
    }
    (access <= 1 && copies <= 1).then_some(mode)
}

/// What `bind-idmap` can be.
fn idmap(text: &str) -> Option<BindIdmap> {
    match text {
        "off" => Some(BindIdmap::Off),
        "userns" => Some(BindIdmap::Userns),
        "match-user" => Some(BindIdmap::MatchUser { ids: None }),
        _ => None,
    }
}

fn check_volume_name(name: &str) -> Parse<()> {
    if name.len() < 2 {
        return Err(format!(
            "create {name}: volume name is too short, names should be at least two alphanumeric characters"
        ));
    }
    let mut bytes = name.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_alphanumeric());
    if first && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-')) {
        return Ok(());
    }
    Err(format!(
        "create {name}: \"{name}\" includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed. If you intended to pass a host directory, use absolute path"
    ))
}

/// `/path`, `name:/path[:mode]`, `/host:/path[:mode]`, `./host:/path[:mode]`.
fn volume(text: &str, outside: &Outside<'_>) -> Parse<MountRequest> {
    let wrong = |why: String| format!("invalid volume specification: '{text}': {why}");
    let parts: Vec<&str> = text.split(':').collect();
    if parts.iter().any(|p| p.is_empty()) {
        return Err(format!("invalid spec: {text}: empty section between colons"));
    }
    let (source, path, options) = match parts.as_slice() {
        [path] => ("", *path, ""),
        // With two parts the second may be a mode, but only of an anonymous volume, which Docker refuses too.
        [source, path] => (*source, *path, ""),
        [source, path, options] => (*source, *path, *options),
        _ => return Err(format!("invalid volume specification: '{text}'")),
    };
    let is_path = source.starts_with(['/', '.', '~']);
    let kind = if is_path { "bind" } else { "volume" };
    let path = target(path).map_err(|e| wrong(format!("invalid mount config for type \"{kind}\": {e}")))?;
    let mode = if options.is_empty() { Some(Mode::default()) } else { mode(options) };
    let Some(mode) = mode else {
        return Err(format!("invalid mode: {options}")).map_err(wrong);
    };
    if is_path {
        if mode.no_copy {
            return Err(wrong(format!("invalid mode: {options}")));
        }
        let bind = MountSource::Bind {
            path: absolute(source, outside)?,
            propagation: mode.propagation.to_owned(),
            recursive: true,
            idmap: mode.idmap,
        };
        return Ok(MountRequest { create_source: true, ..request(path, bind, mode.read_only, options) });
    }
    if !mode.propagation.is_empty() || mode.idmap != BindIdmap::Off {
        return Err(wrong(format!("invalid mode: {options}")));
    }
    if !source.is_empty() {
        check_volume_name(source)?;
    }
    let volume =
        MountSource::Volume { name: source.to_owned(), anonymous: source.is_empty(), subpath: String::new() };
    Ok(MountRequest { no_copy: mode.no_copy, ..request(path, volume, mode.read_only, options) })
}

/// Fields of `--mount`, before it is known which of them belong together.
#[derive(Default)]
struct Fields {
    kind: String,
    source: String,
    target: String,
    read_only: bool,
    bind: Vec<String>,
    volume: Vec<String>,
    tmpfs: Vec<String>,
    propagation: String,
    not_recursive: bool,
    idmap: BindIdmap,
    create_source: bool,
    no_copy: bool,
    subpath: String,
    labels: BTreeMap<String, String>,
    options: BTreeMap<String, String>,
    memory: Vec<String>,
}

fn boolean(key: &str, value: Option<&str>) -> Parse<bool> {
    match value {
        None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        Some(value) => Err(format!("invalid value for {key}: {value}")),
    }
}

/// The fields of a line of comma-separated values; a field in double quotes may hold commas.
fn split_csv(text: &str) -> Parse<Vec<String>> {
    let mut fields = vec![String::new()];
    let mut quoted = false;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                push(&mut fields, '"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            c => push(&mut fields, c),
        }
    }
    if quoted {
        return Err("parse error: extraneous or missing \" in quoted-field".to_owned());
    }
    Ok(fields)
}

fn push(fields: &mut [String], c: char) {
    if let Some(last) = fields.last_mut() {
        last.push(c);
    }
}

fn fields(text: &str) -> Parse<Fields> {
    if text.is_empty() {
        return Err("value is empty".to_owned());
    }
    let mut out = Fields { kind: "volume".to_owned(), ..Fields::default() };
    for field in split_csv(text)? {
        let (key, value) = match field.split_once('=') {
            Some((key, value)) => (key.trim().to_ascii_lowercase(), Some(value)),
            None => (field.trim().to_ascii_lowercase(), None),
        };
        if value.is_none()
            && !matches!(
                key.as_str(),
                "readonly" | "ro" | "volume-nocopy" | "bind-nonrecursive" | "bind-create-src"
            )
        {
            return Err(format!("invalid field '{field}' must be a key=value pair"));
        }
        field_of(&mut out, &key, value)
            .map_err(|e| e.unwrap_or_else(|| format!("unknown option '{key}' in '{field}'")))?;
    }
    Ok(out)
}

/// Takes one field; the error is `None` for a key that is not known.
fn field_of(out: &mut Fields, key: &str, value: Option<&str>) -> Result<(), Option<String>> {
    let text = value.unwrap_or("").to_owned();
    let pair = |map: &mut BTreeMap<String, String>| {
        let (name, value) = text.split_once('=').unwrap_or((&text, ""));
        map.insert(name.to_owned(), value.to_owned());
    };
    match key {
        "type" => out.kind = text.to_ascii_lowercase(),
        "source" | "src" => out.source = text,
        "target" | "destination" | "dst" => out.target = text,
        "readonly" | "ro" => out.read_only = boolean(key, value)?,
        "consistency" => {}
        "bind-propagation" => {
            if !PROPAGATIONS.contains(&text.as_str()) {
                return Err(Some(format!("invalid propagation value: {text}")));
            }
            out.propagation = text;
        }
        "bind-nonrecursive" => out.not_recursive = boolean(key, value)?,
        "bind-recursive" => match text.as_str() {
            "enabled" | "writable" => {}
            "disabled" => out.not_recursive = true,
            "readonly" => {
                return Err(Some(
                    "bind-recursive=readonly is not supported; \"ro\" covers the mount itself".to_owned(),
                ));
            }
            other => {
                return Err(Some(format!(
                    "invalid value for {key}: {other} (must be \"enabled\", \"disabled\", \"writable\", or \"readonly\")"
                )));
            }
        },
        "bind-idmap" => {
            out.idmap = idmap(&text).ok_or_else(|| {
                Some(format!(
                    "invalid value for {key}: {text} (must be \"match-user\", \"userns\" or \"off\")"
                ))
            })?;
        }
        "bind-create-src" => out.create_source = boolean(key, value)?,
        "volume-nocopy" => out.no_copy = boolean(key, value)?,
        "volume-subpath" => out.subpath = text,
        "volume-label" => pair(&mut out.labels),
        "volume-opt" => pair(&mut out.options),
        "volume-driver" if matches!(text.as_str(), "" | "local") => {}
        "volume-driver" => {
            return Err(Some(format!("volume driver \"{text}\" is not there; the only one is local")));
        }
        "tmpfs-size" => {
            let bytes = coracle_base::units::parse_size(&text)
                .ok_or_else(|| Some(format!("invalid value for {key}: {text}")))?;
            out.memory.push(format!("size={bytes}"));
        }
        "tmpfs-mode" => {
            u32::from_str_radix(&text, 8)
                .map_err(|_unused| Some(format!("invalid value for {key}: {text}")))?;
            out.memory.push(format!("mode={text}"));
        }
        _ => return Err(None),
    }
    let group = match key.split_once('-').map(|(kind, _)| kind) {
        Some("bind") => &mut out.bind,
        Some("volume") => &mut out.volume,
        Some("tmpfs") => &mut out.tmpfs,
        _ => return Ok(()),
    };
    group.push(key.to_owned());
    Ok(())
}

fn long_form(text: &str, outside: &Outside<'_>) -> Parse<MountRequest> {
    let fields = fields(text)?;
    if fields.target.is_empty() {
        return Err("target is required".to_owned());
    }
    let kind = fields.kind.as_str();
    for (of, given) in [("bind", &fields.bind), ("volume", &fields.volume), ("tmpfs", &fields.tmpfs)] {
        if !given.is_empty() && of != kind {
            return Err(format!("cannot mix '{of}-*' options with mount type '{kind}'"));
        }
    }
    let config = |e: String| format!("invalid mount config for type \"{kind}\": {e}");
    let path = target(&fields.target).map_err(config)?;
    let base = |source| request(path.clone(), source, fields.read_only, "");
    match kind {
        "bind" => {
            if fields.source.is_empty() {
                return Err(config("field Source must not be empty".to_owned()));
            }
            let bind = MountSource::Bind {
                path: absolute(&fields.source, outside)?,
                propagation: fields.propagation.clone(),
                recursive: !fields.not_recursive,
                idmap: fields.idmap,
            };
            Ok(MountRequest { create_source: fields.create_source, ..base(bind) })
        }
        "volume" => {
            let name = fields.source.clone();
            if !name.is_empty() {
                check_volume_name(&name).map_err(config)?;
            }
            let volume =
                MountSource::Volume { anonymous: name.is_empty(), name, subpath: fields.subpath.clone() };
            Ok(MountRequest {
                no_copy: fields.no_copy,
                volume_labels: fields.labels.clone(),
                volume_options: fields.options.clone(),
                ..base(volume)
            })
        }
        "tmpfs" => {
            if !fields.source.is_empty() {
                return Err(config("field Source must not be specified".to_owned()));
            }
            Ok(base(MountSource::Tmpfs { options: fields.memory.clone() }))
        }
        "image" | "npipe" | "cluster" => Err(format!("mount type \"{kind}\" is not supported")),
        _ => Err(config("mount type unknown".to_owned())),
    }
}

/// Flags and options with a value that tmpfs takes.
const TMPFS_FLAGS: &[&str] = &[
    "ro",
    "rw",
    "exec",
    "noexec",
    "suid",
    "nosuid",
    "dev",
    "nodev",
    "sync",
    "async",
    "dirsync",
    "mand",
    "nomand",
    "atime",
    "noatime",
    "diratime",
    "nodiratime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "private",
    "rprivate",
    "shared",
    "rshared",
    "slave",
    "rslave",
    "unbindable",
    "runbindable",
];
const TMPFS_VALUES: &[&str] = &["size", "mode", "uid", "gid", "nr_inodes", "nr_blocks", "mpol", "huge"];

/// `/run`, `/run:size=64m,mode=1777`.
fn tmpfs(text: &str) -> Parse<MountRequest> {
    let (path, options) = text.split_once(':').unwrap_or((text, ""));
    let path = target(path).map_err(|e| format!("invalid tmpfs specification: '{text}': {e}"))?;
    let options: Vec<String> = options.split(',').filter(|o| !o.is_empty()).map(str::to_owned).collect();
    for option in &options {
        let good = match option.split_once('=') {
            Some((key, _)) => TMPFS_VALUES.contains(&key),
            None => TMPFS_FLAGS.contains(&option.as_str()),
        };
        if !good {
            return Err(format!("Invalid tmpfs option [\"{option}\"]"));
        }
    }
    let read_only = options.iter().any(|o| o == "ro");
    Ok(request(path, MountSource::Tmpfs { options }, read_only, ""))
}
