//! Docker, containerd and Podman run their containers on this runtime.
//!
//! Each engine gets directories and sockets of its own and lives in the test's network namespace: what the machine's
//! own engines do is not touched. Source: Debian's packages of them.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use xtask::image::busybox_tar;
use xtask::shell::{self, Background};

use crate::patience;
use crate::sandbox::{Outcome, Sandbox};

const PATIENCE: Duration = Duration::from_secs(120);

/// An engine's client, with the engine behind it where there is one.
struct Engine {
    /// The client with everything but the command.
    client: Vec<String>,
    /// Ends before the sandbox is cleared.
    server: Option<Background>,
    sandbox: Sandbox,
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.server = None;
    }
}

impl Engine {
    /// `None` after saying what is missing.
    fn begin(programs: &[&str]) -> Option<(Sandbox, PathBuf)> {
        let sandbox = Sandbox::new()?;
        for program in programs {
            if shell::find(program).is_none() {
                println!("skipped: needs {program}");
                return None;
            }
        }
        std::fs::create_dir_all(&sandbox.run).unwrap();
        let runtime = sandbox.run.join("coracle-runtime");
        symlink(sandbox.command(&[]).get_program(), &runtime).unwrap();
        std::fs::write(sandbox.files.join("busybox.tar"), busybox_tar().unwrap()).unwrap();
        Some((sandbox, runtime))
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = shell::command(&self.client[0]);
        command.args(&self.client[1..]).args(args).current_dir(&self.sandbox.files);
        command
    }

    #[track_caller]
    fn run(&self, args: &[&str]) -> Outcome {
        let output = patience::output(&mut self.command(args), b"").unwrap();
        Outcome {
            line: args.join(" "),
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Runs a command on a terminal.
    #[track_caller]
    fn run_on_terminal(&self, args: &[&str]) -> Outcome {
        let line = shell::line(&self.command(args));
        let mut script = shell::command("script");
        let output = patience::output(script.args(["-qec", &line, "/dev/null"]), b"").unwrap();
        let code = output.status.code().unwrap_or(-1);
        Outcome { line, code, out: String::from_utf8_lossy(&output.stdout).into_owned(), err: String::new() }
    }
}

/// What Docker and Podman have in common.
fn behaves(engine: &Engine, run: &[&str]) {
    let with = |more: &[&str]| {
        let all: Vec<&str> = ["run"].iter().chain(run).chain(more).copied().collect();
        engine.run(&all)
    };
    assert_eq!(with(&["--rm", "bb", "echo", "hello"]).ok(), "hello");
    assert_eq!(with(&["--rm", "bb", "sh", "-c", "exit 7"]).code, 7);
    assert_eq!(with(&["--rm", "bb", "no-such-program"]).code, 127);
    assert_eq!(with(&["--rm", "bb", "/etc"]).code, 126);
    with(&["--detach", "--name", "one", "bb", "sh", "-c", "echo logged; exec sleep 1000"]).ok();
    let ran = engine.run(&["exec", "one", "sh", "-c", "echo inside; exit 3"]);
    assert_eq!((ran.code, ran.out.as_str()), (3, "inside\n"), "{ran:?}");
    assert_eq!(engine.run(&["logs", "one"]).ok(), "logged");
    engine.run(&["pause", "one"]).ok();
    let status = ["inspect", "--format", "{{.State.Status}}", "one"];
    assert_eq!(engine.run(&status).ok(), "paused");
    engine.run(&["unpause", "one"]).ok();
    assert_eq!(engine.run(&status).ok(), "running");
    assert!(engine.run(&["top", "one"]).ok().contains("sleep 1000"));
    engine.run(&["stop", "--time", "0", "one"]).ok();
    assert_eq!(engine.run(&["inspect", "--format", "{{.State.ExitCode}}", "one"]).ok(), "137");
    engine.run(&["start", "one"]).ok();
    engine.run(&["rm", "--force", "one"]).ok();
    if shell::find("script").is_some() {
        let all: Vec<&str> = ["run"].iter().chain(run).chain(&["--rm", "-t", "bb", "tty"]).copied().collect();
        let shown = engine.run_on_terminal(&all);
        assert!(shown.code == 0 && shown.out.contains("/dev/pts/0"), "{shown:?}");
    }
}

#[test]
fn docker_runs_its_containers_on_it() {
    let Some((sandbox, runtime)) = Engine::begin(&["dockerd", "containerd", "docker"]) else { return };
    let socket = format!("unix://{}", sandbox.run.join("docker.sock").display());
    let mut daemon = shell::command("dockerd");
    let below = |name: &str| format!("{}/{name}", sandbox.run.display());
    daemon.arg(format!("--data-root={}", sandbox.files.join("docker").display()));
    daemon.arg(format!("--exec-root={}", below("exec"))).arg(format!("--pidfile={}", below("pid")));
    daemon.arg(format!("--add-runtime=coracle={}", runtime.display())).arg("--default-runtime=coracle");
    daemon.args(["--storage-driver=vfs", "--bridge=none", "--iptables=false", "--host", &socket]);
    let server = Background::start(&mut daemon).unwrap();
    let listens = |line: &str| line.contains("API listen on").then_some(());
    if let Err(why) = server.wait_for_line("the API", PATIENCE, listens) {
        println!("skipped: dockerd does not start here: {why}");
        return;
    }
    let client = vec!["docker".to_owned(), "--host".to_owned(), socket];
    let engine = Engine { client, server: Some(server), sandbox };
    engine.run(&["import", "busybox.tar", "bb"]).ok();
    behaves(&engine, &[]);

    engine.run(&["run", "--detach", "--name", "other", "bb", "sleep", "1000"]).ok();
    engine.run(&["update", "--pids-limit", "77", "other"]).ok();
    engine.run(&["update", "--memory", "64m", "--memory-swap", "64m", "other"]).ok();
    assert!(engine.run(&["stats", "--no-stream", "other"]).ok().contains("64MiB"));
    engine.run(&["rm", "--force", "other"]).ok();
    let hungry = ["run", "--name", "oom", "--memory", "16m", "--memory-swap", "16m", "bb"];
    let all: Vec<&str> =
        hungry.iter().chain(&["dd", "if=/dev/zero", "of=/dev/shm/x", "bs=1M", "count=60"]).copied().collect();
    assert_eq!(engine.run(&all).code, 137);
    assert_eq!(engine.run(&["inspect", "--format", "{{.State.OOMKilled}}", "oom"]).ok(), "true");
    engine.run(&["rm", "oom"]).ok();
    let with_init = engine.run(&["run", "--rm", "--init", "bb", "ps"]);
    if !with_init.err.contains("docker-init") {
        assert!(with_init.ok().contains("docker-init"));
    }
}

#[test]
fn containerd_runs_its_tasks_on_it() {
    let Some((sandbox, runtime)) = Engine::begin(&["containerd", "ctr"]) else { return };
    let run = sandbox.run.display().to_string();
    let config = format!(
        "version = 2\nroot = \"{}\"\nstate = \"{run}/state\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
         [grpc]\naddress = \"{run}/sock\"\n",
        sandbox.files.join("containerd").display()
    );
    let file = sandbox.files.join("config.toml");
    std::fs::write(&file, config).unwrap();
    let server = Background::start(shell::command("containerd").arg("--config").arg(&file)).unwrap();
    let listens = |line: &str| line.contains("successfully booted").then_some(());
    if let Err(why) = server.wait_for_line("the API", PATIENCE, listens) {
        println!("skipped: containerd does not start here: {why}");
        return;
    }
    let client = ["ctr", "--address", &format!("{run}/sock")].map(str::to_owned).to_vec();
    let engine = Engine { client, server: Some(server), sandbox };
    let root = engine.sandbox.files.join("rootfs");
    unpack(&engine.sandbox.files.join("busybox.tar"), &root);
    let root = root.to_str().unwrap().to_owned();
    let runtime = runtime.to_str().unwrap();
    let start = |more: &[&str]| {
        let base = ["run", "--runtime", "io.containerd.runc.v2", "--runc-binary", runtime];
        let all: Vec<&str> = base.iter().chain(more).copied().collect();
        engine.run(&all)
    };
    assert_eq!(start(&["--rm", "--rootfs", &root, "t1", "/bin/echo", "hello"]).ok(), "hello");
    assert_eq!(start(&["--rm", "--rootfs", &root, "t1", "/bin/sh", "-c", "exit 5"]).code, 5);
    start(&["--detach", "--rootfs", &root, "t2", "/bin/sleep", "1000"]).ok();
    let exec = ["tasks", "exec", "--exec-id", "e", "t2", "/bin/sh", "-c", "echo inside; exit 4"];
    let ran = engine.run(&exec);
    assert_eq!((ran.code, ran.out.as_str()), (4, "inside\n"), "{ran:?}");
    let status = || engine.run(&["tasks", "ls"]).ok();
    assert!(status().contains("RUNNING"));
    engine.run(&["tasks", "pause", "t2"]).ok();
    assert!(status().contains("PAUSED"));
    engine.run(&["tasks", "resume", "t2"]).ok();
    assert_eq!(engine.run(&["tasks", "ps", "t2"]).ok().lines().count(), 2);
    assert!(engine.run(&["tasks", "metrics", "t2"]).ok().contains("memory."));
    engine.run(&["tasks", "kill", "--signal", "KILL", "t2"]).ok();
    engine.run(&["tasks", "delete", "--force", "t2"]);
    engine.run(&["containers", "delete", "t2"]).ok();
}

fn unpack(tar: &Path, root: &Path) {
    std::fs::create_dir(root).unwrap();
    tar::Archive::new(std::fs::File::open(tar).unwrap()).unpack(root).unwrap();
}

#[test]
fn podman_runs_its_containers_on_it() {
    let Some((sandbox, runtime)) = Engine::begin(&["podman", "conmon"]) else { return };
    let (root, run) = (sandbox.files.join("podman"), sandbox.run.join("podman"));
    let tmp = sandbox.run.join("tmp");
    let client = [
        "podman",
        "--root",
        root.to_str().unwrap(),
        "--runroot",
        run.to_str().unwrap(),
        "--tmpdir",
        tmp.to_str().unwrap(),
        "--storage-driver",
        "vfs",
        "--cgroup-manager",
        "cgroupfs",
        "--events-backend",
        "none",
        "--runtime",
        runtime.to_str().unwrap(),
    ];
    let client = client.map(str::to_owned).to_vec();
    let engine = Engine { client, server: None, sandbox };
    let imported = engine.run(&["import", "busybox.tar", "bb"]);
    if imported.code != 0 {
        println!("skipped: podman does not work here: {}", imported.err);
        return;
    }
    behaves(&engine, &["--network", "none"]);
    engine.run(&["rm", "--all", "--force"]).ok();
}
