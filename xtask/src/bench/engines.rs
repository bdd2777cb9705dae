//! The engines that are compared: Coracle, and Docker and Podman where they are installed.
//!
//! Each has a store of its own below the bench's directory; a private `dockerd` is started, so that an
//! engine in use on the machine is neither measured nor disturbed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::error::{TaskError, io};
use crate::shell::{self, Background};

/// How long `dockerd` may take to start.
const START: Duration = Duration::from_secs(60);

/// An engine with a store of its own.
#[derive(Debug)]
pub struct Engine {
    /// Its name and version.
    pub name: String,
    kind: Kind,
    dir: PathBuf,
    program: PathBuf,
    /// Its daemon, if it needs one.
    daemon: Option<Background>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Coracle,
    Docker,
    Podman,
}

/// Memory of an engine's processes, in KiB.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Memory {
    /// Of the processes that exist once per container, for each container.
    pub each: f64,
    /// Of those that exist once.
    pub shared: f64,
}

impl Engine {
    /// The engine that is built here.
    ///
    /// # Errors
    /// If its directory cannot be made or the binary does not run.
    pub fn coracle(binary: &Path, dir: &Path) -> Result<Self, TaskError> {
        let version = shell::stdout(shell::command(binary).arg("--version"))?;
        let version = version.rsplit(' ').next().unwrap_or_default().to_owned();
        Self::new(format!("coracle {version}"), Kind::Coracle, binary.to_owned(), dir)
    }

    /// The engines installed here.
    ///
    /// # Errors
    /// If one is installed and cannot be started.
    pub fn peers(dir: &Path) -> Result<Vec<Self>, TaskError> {
        let mut peers = Vec::new();
        if let (Some(program), Some(daemon)) = (shell::find("docker"), shell::find("dockerd")) {
            let mut docker = Self::new(String::new(), Kind::Docker, program, &dir.join("docker"))?;
            let mut command = shell::command(daemon);
            command.arg("--data-root").arg(docker.dir.join("data"));
            command.arg("--exec-root").arg(docker.dir.join("exec"));
            command.arg("--pidfile").arg(docker.dir.join("pid")).arg("--host").arg(docker.socket());
            let daemon = Background::start(&mut command)?;
            daemon.wait_for_line("dockerd's start", START, |l| l.contains("API listen on").then_some(()))?;
            docker.daemon = Some(daemon);
            let version =
                shell::stdout(docker.command(&["version", "--format", "{{.Server.Version}}"]).as_mut())?;
            docker.name = format!("docker {}", version.split('+').next().unwrap_or_default());
            peers.push(docker);
        }
        if let Some(program) = shell::find("podman") {
            let version = shell::stdout(shell::command(&program).arg("--version"))?;
            let version = version.rsplit(' ').next().unwrap_or_default();
            peers.push(Self::new(format!("podman {version}"), Kind::Podman, program, &dir.join("podman"))?);
        }
        Ok(peers)
    }

    fn new(name: String, kind: Kind, program: PathBuf, dir: &Path) -> Result<Self, TaskError> {
        fs::create_dir_all(dir).map_err(io("create", dir))?;
        Ok(Self { name, kind, dir: dir.to_owned(), program, daemon: None })
    }

    fn socket(&self) -> String {
        format!("unix://{}", self.dir.join("sock").display())
    }

    /// Whether it is the one that others are compared with.
    #[must_use]
    pub fn is_coracle(&self) -> bool {
        self.kind == Kind::Coracle
    }

    /// One of its commands.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Box<Command> {
        let mut command = Box::new(shell::command(&self.program));
        match self.kind {
            Kind::Coracle => {
                command.env("CORACLE_DATA_DIR", self.dir.join("data")).env("CORACLE_RUN_DIR", self.run_dir());
            }
            Kind::Docker => {
                command.arg("--host").arg(self.socket());
            }
            Kind::Podman => {
                command.arg("--root").arg(self.dir.join("data")).arg("--runroot").arg(self.dir.join("run"));
            }
        }
        command.args(args);
        command
    }

    /// A `run` with these arguments.
    #[must_use]
    pub fn run(&self, args: &[&str]) -> Box<Command> {
        let mut command = self.command(&["run"]);
        if self.kind == Kind::Podman {
            // Its defaults raise limits, which a machine without the right to do so refuses.
            command.args(["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]);
        }
        command.args(args);
        command
    }

    /// A `pull` from a registry on loopback.
    #[must_use]
    pub fn pull(&self, image: &str) -> Box<Command> {
        let mut command = self.command(&["pull", "--quiet"]);
        if self.kind == Kind::Podman {
            command.arg("--tls-verify=false");
        }
        command.arg(image);
        command
    }

    /// On tmpfs where the machine has one there, as `/run/coracle` is.
    fn run_dir(&self) -> PathBuf {
        PathBuf::from(format!("/run/coracle-bench-{}", std::process::id()))
    }

    /// Removes containers by force and at once.
    #[must_use]
    pub fn remove(&self, names: &[String]) -> Box<Command> {
        let mut command = self.command(&["rm", "-f"]);
        if self.kind == Kind::Podman {
            // Without, it waits ten seconds for each process that ignores SIGTERM.
            command.args(["-t", "0"]);
        }
        command.args(names);
        command
    }

    /// Makes sure that it runs containers at all: a command that does nothing would be the fastest.
    ///
    /// # Errors
    /// If the container's output is not what it wrote.
    pub fn check(&self, image: &str) -> Result<(), TaskError> {
        let said = shell::stdout(self.run(&["--rm", image, "echo", "it works"]).as_mut())?;
        if said == "it works" {
            return Ok(());
        }
        Err(TaskError::Failed(format!(
            "{} ran a container that said {said:?} instead of \"it works\"",
            self.name
        )))
    }

    /// Empties the store of this image.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn forget(&self, image: &str) -> Result<(), TaskError> {
        shell::stdout(self.command(&["image", "inspect", image]).as_mut())?;
        shell::stdout(self.command(&["rmi", "--force", image]).as_mut()).map(drop)
    }

    /// Memory of its processes while `containers` run.
    ///
    /// # Errors
    /// If `/proc` cannot be read.
    pub fn memory(&self, containers: usize) -> Result<Memory, TaskError> {
        // A monitor runs from a detached mount, so its executable has no name; its command line has.
        let run_dir = self.run_dir();
        let each = match self.kind {
            Kind::Coracle => {
                pss_kib(|_, line| line.contains("@monitor") && line.contains(&*run_dir.to_string_lossy()))?
            }
            Kind::Docker => {
                pss_kib(|program, _| program.starts_with("containerd-shim") || program == "docker-proxy")?
            }
            Kind::Podman => pss_kib(|program, _| program == "conmon")?,
        };
        let shared = match self.kind {
            Kind::Docker => pss_kib(|program, _| program == "dockerd" || program == "containerd")?,
            Kind::Coracle | Kind::Podman => 0.0,
        };
        if each <= 0.0 {
            return Err(TaskError::Failed(format!(
                "no process of {} was found though containers run",
                self.name
            )));
        }
        #[expect(clippy::cast_precision_loss, reason = "a handful of containers")]
        let containers = containers as f64;
        Ok(Memory { each: each / containers, shared })
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.daemon = None;
        fs::remove_dir_all(self.run_dir()).ok();
    }
}

/// The proportional set size, in KiB, of all processes in this process's network namespace that `wanted` picks by
/// the name of their executable and their command line. Daemons of other benches and engines live in others.
fn pss_kib(wanted: impl Fn(&str, &str) -> bool) -> Result<f64, TaskError> {
    let own = fs::read_link("/proc/self/ns/net").map_err(io("read", "/proc/self/ns/net"))?;
    let mut sum = 0.0;
    let all = fs::read_dir("/proc").map_err(io("read", "/proc"))?;
    for process in all.filter_map(Result::ok).map(|e| e.path()) {
        // Kernel threads have no executable; a process may end at any time.
        let Ok(program) = fs::read_link(process.join("exe")) else { continue };
        if fs::read_link(process.join("ns/net")).ok().as_ref() != Some(&own) {
            continue;
        }
        let name = program.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let line = fs::read(process.join("cmdline")).unwrap_or_default();
        if !wanted(name.trim_end_matches(" (deleted)"), &String::from_utf8_lossy(&line)) {
            continue;
        }
        let Ok(text) = fs::read_to_string(process.join("smaps_rollup")) else { continue };
        sum += pss_line(&text).unwrap_or(0.0);
    }
    Ok(sum)
}

fn pss_line(text: &str) -> Option<f64> {
    text.lines().find_map(|l| l.strip_prefix("Pss:"))?.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pss_is_read_from_the_rollup() {
        assert_eq!(pss_line("Rss:  900 kB\nPss:                 123 kB\nPss_Dirty:  5 kB\n"), Some(123.0));
        assert!(pss_kib(|program, _| program == "no such program").unwrap().abs() < f64::EPSILON);
        assert!(pss_kib(|_, line| line.contains("xtask")).unwrap() > 100.0, "this process was not found");
    }
}
