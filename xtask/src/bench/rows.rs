//! What is measured: one function per group of rows.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::bench::bundle::Bundles;
use crate::bench::engines::Engine;
use crate::bench::measure::{Candidate, Samples, take_turns, time_command, timed};
use crate::bench::report::{Goal, Row};
use crate::error::{TaskError, io};
use crate::shell;

/// Containers of the rows that run many.
pub const MANY: usize = 50;
/// Bytes of a megabyte, as disks count.
const MEGABYTE: f64 = 1e6;

/// How often things are done.
#[derive(Debug, Clone, Copy)]
pub struct Rounds {
    /// Rounds that do not count.
    pub warm_up: usize,
    /// Rounds of work of some milliseconds.
    pub short: usize,
    /// Rounds of work of seconds.
    pub long: usize,
}

/// Runs of a bundle by the runtimes installed here: alone, ten at once, and on a host with many mounts.
///
/// # Errors
/// If the bundles cannot be made.
pub fn bundles(coracle: &Path, dir: &Path, rounds: Rounds) -> Result<Vec<Row>, TaskError> {
    let bundles = Bundles::make(&dir.join("bundle"))?;
    let all = |bundle| runtimes(coracle, bundle, dir, &bundles);
    let alone = |bundle| all(bundle).into_iter().map(|r: Runtime<'_>| r.times(1)).collect();
    let row = |work: &str, samples, goals| Row {
        work: format!("OCI bundle, static `true`, {work}"),
        unit: "ms",
        samples,
        goals,
    };
    let crun = |share| Goal::Of { peer: "crun", share };
    let mut rows = Vec::new();
    if let Some(filtered) = bundles.filtered.as_deref() {
        let samples = take_turns(alone(filtered), rounds.warm_up, rounds.short);
        rows.push(row("with Docker's seccomp profile", samples, vec![crun(0.25)]));
    }
    let samples = take_turns(alone(&bundles.plain), rounds.warm_up, rounds.short);
    rows.push(row("without seccomp", samples, vec![crun(0.5), FLOOR]));
    let at_once = all(&bundles.plain).into_iter().map(|r| r.times(AT_ONCE)).collect();
    let samples = take_turns(at_once, 1, rounds.short.div_ceil(3));
    rows.push(row("ten at once, each", samples, vec![crun(0.5), FLOOR]));
    rows.push(oci_exec(coracle, dir, &bundles, rounds)?);
    let mounts = Mounts::make(&dir.join("mounts"))?;
    let samples = take_turns(alone(&bundles.plain), rounds.warm_up, rounds.short);
    drop(mounts);
    rows.push(row(&format!("host with {MORE_MOUNTS} more mounts"), samples, vec![crun(0.5), FLOOR]));
    Ok(rows)
}

/// What a runtime may add to what the kernel takes.
const FLOOR: Goal = Goal::Of { peer: "floor", share: 1.5 };
/// How many bundles run at once in the row that does so.
const AT_ONCE: u32 = 10;
/// Mounts of a host with many containers of other engines.
const MORE_MOUNTS: usize = 1000;

/// A way to run one container, any number of times.
struct Runtime<'a> {
    name: String,
    command: Box<dyn FnMut() -> Command + 'a>,
}

impl<'a> Runtime<'a> {
    /// Milliseconds for each of so many containers that are started at once.
    fn times(mut self, n: u32) -> Candidate<'a> {
        let name = self.name.clone();
        let work = move || {
            if n == 1 {
                return time_command(&mut (self.command)());
            }
            let commands: Vec<Command> = (0..n).map(|_| (self.command)()).collect();
            timed(|| shell::run_all(commands)).map(|ms| ms / f64::from(n))
        };
        Candidate { name, work: Box::new(work) }
    }
}

fn runtimes<'a>(coracle: &Path, bundle: &'a Path, dir: &'a Path, bundles: &'a Bundles) -> Vec<Runtime<'a>> {
    let mut all = vec![runtime("coracle", coracle.to_owned(), &["oci"], bundle, dir)];
    for name in ["crun", "runc", "youki"] {
        if let Some(program) = shell::find(name) {
            all.push(runtime(name, program, &[], bundle, dir));
        }
    }
    all.push(Runtime {
        name: "floor (kernel alone, no seccomp)".to_owned(),
        command: Box::new(|| {
            let mut floor = shell::command(&bundles.floor);
            floor.arg(&bundles.rootfs);
            floor
        }),
    });
    all
}

/// `exec` by the runtimes themselves, in a container of each.
fn oci_exec(coracle: &Path, dir: &Path, bundles: &Bundles, rounds: Rounds) -> Result<Row, TaskError> {
    // One that no other runtime has: some of them would share its cgroup.
    let id = |name: &str| format!("bench-exec-{name}-{}", std::process::id());
    let found = ["crun", "runc", "youki"].into_iter().filter_map(|name| Some((name, shell::find(name)?)));
    let all: Vec<(&str, PathBuf)> = [("coracle", coracle.to_owned())].into_iter().chain(found).collect();
    let command = |(name, program): &(&str, PathBuf), args: &[&str]| {
        let mut command = shell::command(program);
        if *name == "coracle" {
            command.arg("oci");
        }
        command.arg("--root").arg(dir.join(format!("{name}-state"))).args(args);
        command
    };
    for one in &all {
        let bundle = bundles.waiting.display().to_string();
        shell::run_all(vec![command(one, &["run", "--detach", "--bundle", &bundle, &id(one.0)])])?;
    }
    let candidates = all.iter().map(|one| Candidate {
        name: one.0.to_owned(),
        work: Box::new(|| time_command(&mut command(one, &["exec", &id(one.0), "/true"]))),
    });
    let samples = take_turns(candidates.collect(), rounds.warm_up, rounds.short);
    for one in &all {
        shell::run_all(vec![command(one, &["delete", "--force", &id(one.0)])])?;
    }
    let goals = vec![Goal::AtMost(3.0)];
    Ok(Row { work: "`exec` of static `true` by the OCI runtime".to_owned(), unit: "ms", samples, goals })
}

/// Mounts that nobody needs, until dropped.
struct Mounts(PathBuf);

impl Mounts {
    fn make(dir: &Path) -> Result<Self, TaskError> {
        let failed = |error: rustix::io::Errno| TaskError::Failed(format!("cannot mount tmpfs: {error}"));
        fs::create_dir_all(dir).map_err(io("create", dir))?;
        let none = rustix::mount::MountFlags::empty();
        let mount = |on: &Path| rustix::mount::mount("bench", on, "tmpfs", none, None).map_err(failed);
        mount(dir)?;
        let mounts = Self(dir.to_owned());
        for n in 0..MORE_MOUNTS {
            let below = dir.join(n.to_string());
            fs::create_dir(&below).map_err(io("create", &below))?;
            mount(&below)?;
        }
        Ok(mounts)
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        if let Err(error) = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH) {
            crate::say!("cannot unmount {}: {error}", self.0.display());
        }
    }
}

fn runtime<'a>(
    name: &str,
    program: PathBuf,
    prefix: &'a [&'a str],
    bundle: &'a Path,
    dir: &'a Path,
) -> Runtime<'a> {
    let state = dir.join(format!("{name}-state"));
    let own_name = name.to_owned();
    let mut n = 0_u32;
    let command = move || {
        n += 1;
        let mut command = shell::command(&program);
        match prefix {
            // A runtime of engines is told where to keep its state; Coracle's keeps none.
            [] => command.arg("--root").arg(&state),
            _ => command.args(prefix),
        };
        command.arg("run").arg("--bundle").arg(bundle);
        command.arg(format!("bench-{own_name}-{}-{n}", std::process::id()));
        command
    };
    Runtime { name: name.to_owned(), command: Box::new(command) }
}

/// One candidate per engine, each timing a command.
fn per_engine<'a>(
    engines: &'a [Engine],
    command: impl Fn(&Engine) -> Box<Command> + Copy + 'a,
) -> Vec<Candidate<'a>> {
    engines
        .iter()
        .map(|engine| Candidate {
            name: engine.name.clone(),
            work: Box::new(move || time_command(command(engine).as_mut())),
        })
        .collect()
}

/// `run --rm`, with and without network.
#[must_use]
pub fn runs(engines: &[Engine], image: &str, rounds: Rounds) -> Vec<Row> {
    let row = |work: &str, share: f64, args: &[&str]| Row {
        work: work.to_owned(),
        unit: "ms",
        samples: take_turns(per_engine(engines, |e| e.run(args)), rounds.warm_up, rounds.short),
        goals: vec![Goal::Of { peer: "docker", share }],
    };
    vec![
        row("`run --rm --network none`", 1.0 / 20.0, &["--rm", "--network", "none", image, "true"]),
        row("`run --rm`, bridge", 1.0 / 15.0, &["--rm", image, "true"]),
    ]
}

/// `exec` in a running container.
///
/// # Errors
/// If the container cannot be started or removed.
pub fn exec(engines: &[Engine], image: &str, rounds: Rounds) -> Result<Row, TaskError> {
    for engine in engines {
        shell::stdout(engine.run(&["-d", "--name", "bench-exec", image, "sleep", "100000"]).as_mut())?;
    }
    let candidates = per_engine(engines, |e| e.command(&["exec", "bench-exec", "true"]));
    let samples = take_turns(candidates, rounds.warm_up, rounds.short);
    for engine in engines {
        shell::stdout(engine.remove(&["bench-exec".to_owned()]).as_mut())?;
    }
    Ok(Row {
        work: "`exec true`".to_owned(),
        unit: "ms",
        samples,
        goals: vec![Goal::Of { peer: "docker", share: 1.0 / 12.0 }, Goal::AtMost(3.0)],
    })
}

/// Fifty containers: starting them, their memory, removing them.
///
/// # Errors
/// If an engine cannot start or remove them.
pub fn many(engines: &[Engine], image: &str, rounds: Rounds) -> Result<Vec<Row>, TaskError> {
    let row = |work: &str, unit, goals| Row { work: work.to_owned(), unit, samples: Vec::new(), goals };
    let mut start = row("`run -d`, bridge, each of 50", "ms", vec![Goal::Of { peer: "docker", share: 0.1 }]);
    let mut each =
        row("memory of the engine per container (PSS, 50 running)", "KiB", vec![Goal::AtMost(350.0)]);
    let mut shared = row("memory of daemons", "KiB", vec![Goal::AtMost(0.0)]);
    let mut removal = row("`rm -f` of 50", "ms", vec![Goal::AtMost(300.0)]);
    for engine in engines {
        let (mut starts, mut memory, mut daemons, mut removals) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds.long {
            let names: Vec<String> = (0..MANY).map(|n| format!("bench-{n}")).collect();
            for name in &names {
                starts.push(time_command(
                    engine.run(&["-d", "--name", name, image, "sleep", "100000"]).as_mut(),
                )?);
            }
            let now = engine.memory(MANY)?;
            memory.push(now.each);
            daemons.push(now.shared);
            removals.push(time_command(engine.remove(&names).as_mut())?);
        }
        for (row, values) in
            [(&mut start, starts), (&mut each, memory), (&mut shared, daemons), (&mut removal, removals)]
        {
            row.samples.push(Samples::new(&engine.name, values));
        }
    }
    Ok(vec![start, each, shared, removal])
}

/// A pull of the many-layer image into a store that has none of it.
#[must_use]
pub fn pull(engines: &[Engine], image: &str, what: &str, dir: &Path, rounds: Rounds) -> Row {
    let mut candidates: Vec<Candidate<'_>> = engines
        .iter()
        .map(|engine| Candidate {
            name: engine.name.clone(),
            work: Box::new(move || {
                // What the last pull left to be written back is not this one's.
                rustix::fs::sync();
                let taken = time_command(engine.pull(image).as_mut())?;
                // Fails if the image is not there.
                engine.forget(image)?;
                Ok(taken)
            }),
        })
        .collect();
    if let Some(skopeo) = shell::find("skopeo") {
        let copy = dir.join("skopeo-copy");
        candidates.push(Candidate {
            name: "skopeo copy (nothing unpacked)".to_owned(),
            work: Box::new(move || {
                rustix::fs::sync();
                let mut command = shell::command(&skopeo);
                command.args(["copy", "--insecure-policy", "--src-tls-verify=false"]);
                command.arg(format!("docker://{image}")).arg(format!("dir:{}", copy.display()));
                let taken = time_command(&mut command)?;
                fs::remove_dir_all(&copy).map_err(io("remove", &copy))?;
                Ok(taken)
            }),
        });
    }
    let third = |peer| Goal::Of { peer, share: 1.0 / 3.0 };
    // Debian's docker cannot read zstd, so that row has nothing to be held against.
    let goals = if what == "gzip" { vec![third("docker"), third("podman")] } else { Vec::new() };
    Row {
        work: format!("`pull` of 318 MB in 8 layers ({what}) from loopback into an empty store"),
        unit: "ms",
        samples: take_turns(candidates, 1, rounds.long),
        goals,
    }
}

/// The binary itself.
///
/// # Errors
/// If its file cannot be looked at.
pub fn binary(coracle: &Path, engines: &[Engine], rounds: Rounds) -> Result<Vec<Row>, TaskError> {
    let bytes = fs::metadata(coracle).map_err(io("read", coracle))?.len();
    #[expect(clippy::cast_precision_loss, reason = "three digits are printed")]
    let size = bytes as f64 / MEGABYTE;
    let mut candidates = per_engine(engines, |e| e.command(&["--version"]));
    candidates.push(Candidate {
        name: "static program that does nothing".to_owned(),
        work: Box::new({
            let nothing = coracle.with_file_name("bench-nothing");
            let source = crate::scratch::workspace().join("xtask/assets/true.S");
            shell::stdout(
                shell::command("musl-gcc")
                    .args(["-static", "-nostdlib", "-s"])
                    .arg(source)
                    .arg("-o")
                    .arg(&nothing),
            )?;
            move || timed(|| shell::run(&mut shell::command(&nothing)))
        }),
    });
    Ok(vec![
        Row {
            work: "size of the binary".to_owned(),
            unit: "MB",
            samples: vec![Samples::new("coracle", vec![size])],
            goals: vec![Goal::AtMost(20.0)],
        },
        Row {
            work: "`--version`".to_owned(),
            unit: "ms",
            samples: take_turns(candidates, rounds.warm_up, rounds.short),
            goals: vec![Goal::AtMost(2.0)],
        },
    ])
}
