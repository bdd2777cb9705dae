//! `version` and `info`.

use coracle_engine::Engine;
use coracle_gotemplate::{Root, Template};
use coracle_state::Status;
use serde_json::{Value, json};

use crate::cli::flags::{Flag, Parsed, text};
use crate::cli::{Args, Command, Outcome};
use crate::context::Context;
use crate::failure::Failure;
use crate::output;

/// Version of this program.
pub(crate) const VERSION_TEXT: &str = env!("CARGO_PKG_VERSION");

const FORMAT: &[Flag] = &[text("format", Some('f'), "string", "Print by a Go template, or json")];

pub(crate) const VERSION: Command = Command {
    path: "system version",
    aliases: &["version"],
    operands: "",
    about: "Print the version",
    example: "coracle version --format '{{.Client.Version}}'",
    flags: &[FORMAT],
    anywhere: true,
    args: Args::None,
    run: version,
};

pub(crate) const INFO: Command = Command {
    path: "system info",
    aliases: &["info"],
    operands: "",
    about: "Print what is there and where it lies",
    example: "coracle info --format '{{.DockerRootDir}}'",
    flags: &[FORMAT],
    anywhere: true,
    args: Args::None,
    run: info,
};

/// Go's name of this machine's architecture.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn formatted(format: Option<&str>, value: &Value, plain: impl FnOnce() -> String) -> Outcome {
    match format.filter(|f| !f.is_empty()) {
        None => output::print(&plain())?,
        Some("json") => output::line(&coracle_gotemplate::json(value))?,
        Some(format) => {
            let wrong = |e| Failure::plain(format!("template parsing error: {e}"));
            let template = Template::parse(format).map_err(wrong)?;
            output::line(&template.render(&Root::map(value)).map_err(wrong)?)?;
        }
    }
    Ok(0)
}

fn version(_context: &Context, parsed: &Parsed) -> Outcome {
    let uname = rustix::system::uname();
    let kernel = uname.release().to_string_lossy().into_owned();
    let side = json!({
        "Version": VERSION_TEXT, "Os": "linux", "Arch": architecture(), "KernelVersion": kernel,
    });
    let value = json!({ "Client": side, "Server": side });
    formatted(parsed.text("format"), &value, || {
        format!("Coracle {VERSION_TEXT}\n OS/Arch: linux/{}\n Kernel:  {kernel}\n", architecture())
    })
}

fn counts(engine: &Engine) -> Result<[usize; 4], Failure> {
    let containers = engine.containers()?;
    let count = |fits: &dyn Fn(&Status) -> bool| containers.iter().filter(|c| fits(&c.state.status)).count();
    let paused = count(&|s| matches!(s, Status::Running { paused: true, .. }));
    let running = count(&|s| matches!(s, Status::Running { .. })) - paused;
    Ok([containers.len(), running, paused, containers.len() - running - paused])
}

/// What every container has unless it is told otherwise, in the words of `docker info`.
fn security_options(is_rootless: bool) -> Vec<&'static str> {
    let all =
        [("name=seccomp,profile=builtin", true), ("name=rootless", is_rootless), ("name=cgroupns", true)];
    all.into_iter().filter_map(|(option, holds)| holds.then_some(option)).collect()
}

/// As Docker prints them: the name, and what more there is of it below.
fn security_lines(options: &[&str]) -> String {
    let mut text = "Security Options:\n".to_owned();
    for option in options {
        for (index, word) in option.split(',').enumerate() {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            let line = if index == 0 { format!("  {value}\n") } else { format!("   {key}: {value}\n") };
            text.push_str(&line);
        }
    }
    text
}

fn info(context: &Context, parsed: &Parsed) -> Outcome {
    let engine = context.engine()?;
    let [all, running, paused, stopped] = counts(&engine)?;
    let images = engine.images()?.len();
    let uname = rustix::system::uname();
    let text = |t: &std::ffi::CStr| t.to_string_lossy().into_owned();
    let unified = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let security = security_options(context.rootless);
    let value = json!({
        "Containers": all, "ContainersRunning": running, "ContainersPaused": paused, "ContainersStopped": stopped,
        "Images": images, "Driver": "overlay", "LoggingDriver": "json-file", "CgroupDriver": "cgroupfs",
        "CgroupVersion": if unified { "2" } else { "1" }, "KernelVersion": text(uname.release()),
        "OSType": "linux", "Architecture": std::env::consts::ARCH, "NCPU": processors,
        "DockerRootDir": context.dirs.data.to_string_lossy(), "Name": text(uname.nodename()),
        "ServerVersion": VERSION_TEXT, "SecurityOptions": security,
    });
    formatted(parsed.text("format"), &value, || {
        format!(
            "Containers: {all}\n Running: {running}\n Paused: {paused}\n Stopped: {stopped}\nImages: {images}\nServer Version: {VERSION_TEXT}\nStorage Driver: overlay\nCgroup Version: {}\n{}Kernel Version: {}\nCPUs: {processors}\nData: {}\nRun: {}\n",
            if unified { 2 } else { 1 },
            security_lines(&security),
            text(uname.release()),
            context.dirs.data.display(),
            context.dirs.run.display(),
        )
    })
}
