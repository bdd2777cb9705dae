//! `./dev bench`: Coracle beside the engines and runtimes installed here, interleaved in one run.
//!
//! The bench runs in network and mount namespaces of its own: bridges, rules and mounts of all engines end
//! with it and the machine's own are left alone. On a machine with cgroup v1 and a v2 hierarchy beside it,
//! the latter is out of sight, because crun refuses that mixture.

pub mod bundle;
pub mod engines;
pub mod measure;
pub mod report;
pub mod rows;

use std::fs;
use std::path::Path;

use crate::bench::engines::Engine;
use crate::bench::report::Row;
use crate::bench::rows::Rounds;
use crate::binary::Profile;
use crate::error::{TaskError, io};
use crate::registry::Registry;
use crate::{binary, packages, rootfs, say, scratch, shell};

/// Says to the second process that it is inside.
const INSIDE: &str = "CORACLE_BENCH_INSIDE";

#[derive(Debug, Clone)]
struct Options {
    quick: bool,
    profile: Profile,
    only: Vec<String>,
}

/// Runs the bench.
///
/// # Errors
/// If an option is unknown, something needed is missing, or Coracle itself fails at a row.
pub fn main(args: &[String]) -> Result<(), TaskError> {
    let options = parse(args)?;
    if !shell::is_root() {
        return Err(TaskError::Missing { what: "root".to_owned(), remedy: "sudo ./dev bench".to_owned() });
    }
    if shell::environment(INSIDE).is_none() {
        packages::ensure(&[packages::BUILD, packages::IMAGES, packages::TESTS])?;
        let layout = rootfs::layout()?;
        rootfs::busybox(&layout)?;
        rootfs::many(&layout)?;
        binary::build(options.profile)?;
        return enter(args);
    }
    let dir = scratch::unique(&scratch::data_root()?, "bench")?;
    let rows = measure(&options, &dir);
    fs::remove_dir_all(&dir).map_err(io("remove", &dir))?;
    let (rows, machine) = (rows?, machine());
    let text = report::document(&machine, &notes(), &rows);
    say!("\n{text}");
    if options.quick || !options.only.is_empty() {
        return Ok(());
    }
    let path = scratch::workspace().join("docs/BENCHMARKS.md");
    fs::write(&path, text).map_err(io("write", &path))?;
    let path = scratch::workspace().join("README.md");
    let readme = fs::read_to_string(&path).map_err(io("read", &path))?;
    let readme = report::with_summary(&readme, &machine, &rows)
        .ok_or_else(|| TaskError::Failed("README.md has no place for the table".to_owned()))?;
    fs::write(&path, readme).map_err(io("write", &path))?;
    say!("written to docs/BENCHMARKS.md and README.md");
    Ok(())
}

fn parse(args: &[String]) -> Result<Options, TaskError> {
    let mut options = Options { quick: false, profile: Profile::Release, only: Vec::new() };
    let mut rest = args.iter();
    let missing = |flag: &str| TaskError::Failed(format!("bench: {flag} needs a value"));
    while let Some(arg) = rest.next() {
        match arg.as_str() {
            "--quick" => options.quick = true,
            "--only" => {
                let words = rest.next().ok_or_else(|| missing(arg))?;
                options.only = words.split(',').map(str::to_owned).collect();
            }
            "--profile" => {
                options.profile = match rest.next().ok_or_else(|| missing(arg))?.as_str() {
                    "release" => Profile::Release,
                    "profiling" => Profile::Profiling,
                    "dev" => Profile::Debug,
                    other => return Err(TaskError::Failed(format!("bench: unknown profile {other:?}"))),
                };
            }
            other => return Err(TaskError::Failed(format!("bench: unknown option {other:?}"))),
        }
    }
    Ok(options)
}

/// Starts the bench again in namespaces of its own.
fn enter(args: &[String]) -> Result<(), TaskError> {
    // Not by its name: a build meanwhile would replace the file.
    let own = format!("/proc/{}/exe", std::process::id());
    let script = "ip link set lo up; \
                  if [ -e /sys/fs/cgroup/unified/cgroup.procs ]; then umount /sys/fs/cgroup/unified; fi; \
                  exec \"$0\" bench \"$@\"";
    let mut command = shell::command("unshare");
    command.args(["--net", "--mount", "--propagation", "private", "sh", "-c", script]).arg(own).args(args);
    shell::run(command.env(INSIDE, "1"))
}

fn measure(options: &Options, dir: &Path) -> Result<Vec<Row>, TaskError> {
    let rounds = if options.quick {
        Rounds { warm_up: 1, short: 10, long: 2 }
    } else {
        Rounds { warm_up: 5, short: 60, long: 5 }
    };
    let wanted =
        |words: &str| options.only.is_empty() || options.only.iter().any(|w| words.contains(w.as_str()));
    let coracle = binary::build(options.profile)?;
    let layout = rootfs::layout()?;
    let registry = Registry::start(&dir.join("registry"))?;
    let image = registry.push(layout.dir(), rootfs::BUSYBOX, "busybox:latest")?;
    let mut engines = vec![Engine::coracle(&coracle, &dir.join("coracle"))?];
    engines.extend(Engine::peers(dir)?);
    for engine in &engines {
        shell::stdout(engine.pull(&image).as_mut())?;
        engine.check(&image)?;
    }
    let mut rows = Vec::new();
    if wanted("binary version") {
        say!("binary …");
        rows.extend(rows::binary(&coracle, &engines, rounds)?);
    }
    if wanted("bundle") {
        say!("bundles …");
        rows.extend(rows::bundles(&coracle, dir, rounds)?);
    }
    if wanted("run") {
        say!("run --rm …");
        rows.extend(rows::runs(&engines, &image, rounds));
    }
    if wanted("exec") {
        say!("exec …");
        rows.push(rows::exec(&engines, &image, rounds)?);
    }
    if wanted("many") {
        say!("50 containers …");
        rows.extend(rows::many(&engines, &image, rounds)?);
    }
    if wanted("pull") {
        for (name, what) in [(rootfs::MANY, "gzip"), (rootfs::MANY_ZSTD, "zstd")] {
            say!("pull, {what} …");
            // A registry of its own: skopeo, which knows that both images hold the same files, would reuse the
            // blobs of the other.
            let registry = Registry::start(&dir.join(name))?;
            let many = registry.push(layout.dir(), name, &format!("{name}:1"))?;
            rows.push(rows::pull(&engines, &many, what, dir, rounds));
        }
    }
    Ok(rows)
}

/// Which machine it was, and when.
fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu
        .lines()
        .find_map(|l| l.strip_prefix("model name"))
        .map(|l| l.trim_start_matches([' ', '\t', ':']));
    let memory = read("/proc/meminfo");
    let kib: u64 = memory
        .lines()
        .find_map(|l| l.strip_prefix("MemTotal:"))
        .and_then(|l| l.trim().strip_suffix("kB")?.trim().parse().ok())
        .unwrap_or(0);
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let day = coracle_base::time::Timestamp::now().rfc3339();
    format!(
        "{}: {cores} × {}, {} GB, Linux {}, cgroup {}.",
        day.get(..10).unwrap_or_default(),
        model.unwrap_or(std::env::consts::ARCH),
        kib / 1_000_000,
        read("/proc/sys/kernel/osrelease").trim(),
        if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() { "v2" } else { "v1" },
    )
}

fn notes() -> Vec<String> {
    let texts = [
        "Times are wall time from the start of the command to its end, as a script sees them.",
        "floor: a C program that makes a container with the fewest system calls (`xtask/assets/floor.c`): what the \
         kernel alone costs.",
        "Memory is the proportional set size of the engine's own processes, containers' processes not counted.",
        "Podman runs with lowered limits (`--ulimit`): its defaults need a right that not every machine gives.",
    ];
    texts.map(str::to_owned).to_vec()
}
