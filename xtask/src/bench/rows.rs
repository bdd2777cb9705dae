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

/// Runs of a bundle by the runtimes installed here.
///
/// # Errors
/// If the bundles cannot be made.
pub fn bundles(coracle: &Path, dir: &Path, rounds: Rounds) -> Result<Vec<Row>, TaskError> {
    let bundles = Bundles::make(&dir.join("bundle"))?;
    let mut rows = Vec::new();
    let both = [
        ("with Docker's seccomp profile", bundles.filtered.as_deref(), 0.25),
        ("without seccomp", Some(&*bundles.plain), 0.5),
    ];
    for (how, bundle, share) in both {
        let Some(bundle) = bundle else { continue };
        let mut candidates = vec![runtime("coracle", coracle.to_owned(), &["oci"], bundle, dir)];
        for name in ["crun", "runc", "youki"] {
            if let Some(program) = shell::find(name) {
                candidates.push(runtime(name, program, &[], bundle, dir));
            }
        }
        candidates.push(Candidate {
            name: "floor (kernel alone, no seccomp)".to_owned(),
            work: Box::new(|| time_command(shell::command(&bundles.floor).arg(&bundles.rootfs))),
        });
        rows.push(Row {
            work: format!("OCI bundle, static `true`, {how}"),
            unit: "ms",
            samples: take_turns(candidates, rounds.warm_up, rounds.short),
            goals: vec![Goal::Of { peer: "crun", share }],
        });
    }
    Ok(rows)
}

fn runtime<'a>(
    name: &str,
    program: PathBuf,
    prefix: &'a [&'a str],
    bundle: &'a Path,
    dir: &'a Path,
) -> Candidate<'a> {
    let state = dir.join(format!("{name}-state"));
    let own_name = name.to_owned();
    let mut n = 0_u32;
    let work = move || {
        n += 1;
        let mut command = shell::command(&program);
        match prefix {
            // A runtime of engines is told where to keep its state; Coracle's keeps none.
            [] => command.arg("--root").arg(&state),
            _ => command.args(prefix),
        };
        command.arg("run").arg("--bundle").arg(bundle);
        time_command(command.arg(format!("bench-{own_name}-{}-{n}", std::process::id())))
    };
    Candidate { name: name.to_owned(), work: Box::new(work) }
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
        goals: vec![Goal::Of { peer: "docker", share: 1.0 / 12.0 }],
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
