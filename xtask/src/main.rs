//! The command line of the project's tasks.

use std::process::ExitCode;

use coracle_base::Explain as _;
use coracle_base::explain::chain;
use xtask::error::TaskError;
use xtask::{bench, demo, packages, rootfs, say, suite, tidy};

const HELP: &str = "\
usage: ./dev TASK [ARGS]

  demo              build the release binary and run a database with it, from a real image
  test [NAME...]    run the test suite; missing Debian packages are installed first
  tidy              check what the compiler cannot: imports between crates, sizes, heads
  bench [OPTIONS]   compare with the engines installed here, write docs/BENCHMARKS.md
      --quick           few rounds, print only
      --profile NAME    release (default) or profiling
      --only WORDS      rows whose name contains one of the words, comma separated; print only
  images            make the images that tests, demo and bench use
  setup             install what all tasks need";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            use std::io::Write as _;
            let mut stderr = std::io::stderr().lock();
            let hint = error.hint().map(|h| format!("hint: {h}\n")).unwrap_or_default();
            // Without standard error there is nobody to tell.
            write!(stderr, "dev: {}\n{hint}", chain(&error)).ok();
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<(), TaskError> {
    let rest = args.get(1..).unwrap_or_default();
    match args.first().map(String::as_str) {
        Some("demo") => demo::main(),
        Some("test") => suite::main(rest),
        Some("tidy") => tidy::main(),
        Some("bench") => bench::main(rest),
        Some("images") => images(),
        Some("setup") => setup(),
        Some("help" | "-h" | "--help") => {
            say!("{HELP}");
            Ok(())
        }
        Some(other) => Err(TaskError::Failed(format!("there is no task {other:?}; ./dev help lists them"))),
        None => Err(TaskError::Failed("no task given; ./dev help lists them".to_owned())),
    }
}

fn setup() -> Result<(), TaskError> {
    // All at once: most of what a package manager needs its time for does not depend on how much it installs.
    let mut sets = vec![
        packages::BUILD,
        packages::CROSS,
        packages::IMAGES,
        packages::TESTS,
        packages::DEMO,
        packages::ENGINES,
    ];
    if cfg!(target_arch = "x86_64") {
        sets.push(packages::MACHINE);
    }
    packages::ensure(&sets)
}

fn images() -> Result<(), TaskError> {
    packages::ensure(&[packages::IMAGES, packages::TESTS])?;
    let layout = rootfs::layout()?;
    rootfs::busybox(&layout)?;
    rootfs::debian(&layout)?;
    rootfs::many(&layout)?;
    say!("{}", layout.dir().display());
    Ok(())
}
