//! `./dev demo`: the main job on real input, step by step with times.
//!
//! A database image is pulled from a registry, run on a named volume with a published port, written to
//! through `exec`, read from the host, thrown away and found again on its volume by a second container.
//!
//! Everything lives in directories of its own, so that a Coracle in use on the same machine sees none of
//! it. Invariant: containers and the registry end with the demo, also when a step fails.

use std::net::ToSocketAddrs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::channel;
use std::time::Duration;

use coracle_base::time::monotonic;

use crate::error::TaskError;
use crate::registry::Registry;
use crate::shell::{self, Background};
use crate::{binary, packages, rootfs, say, scratch};

const CONTAINER: &str = "demo-db";
const VOLUME: &str = "demo-data";
const PASSWORD: &str = "demo";
const PUBLIC_IMAGE: &str = "docker.io/library/postgres:15-bookworm";
/// How long a public registry may take to be reached.
const REACH: Duration = Duration::from_secs(3);
/// How long the database may take until it accepts connections.
const READY: Duration = Duration::from_secs(120);

/// Runs the demo.
///
/// # Errors
/// At the first step that fails.
pub fn main() -> Result<(), TaskError> {
    if !shell::is_root() {
        return Err(TaskError::Missing {
            what: "root, which the demo's network and mounts need,".to_owned(),
            remedy: "sudo ./dev demo".to_owned(),
        });
    }
    let begun = monotonic();
    step("check the tools", || packages::ensure(&[packages::BUILD, packages::IMAGES, packages::DEMO]))?;
    let binary = step("build the release binary", || binary::build(binary::Profile::Release))?;
    let demo =
        Demo { binary, data: scratch::data_root()?.join("demo"), run: PathBuf::from("/run/coracle-demo") };
    demo.forget_last_time()?;
    let outcome = demo.play();
    let cleaned = step("remove the container", || demo.run(&["rm", "--force", CONTAINER]));
    outcome?;
    cleaned?;
    say!("");
    say!("done in {:.1} s. The images and the volume are kept; go on with:", begun.elapsed().as_secs_f64());
    say!("  export CORACLE_DATA_DIR={} CORACLE_RUN_DIR={}", demo.data.display(), demo.run.display());
    say!("  {} images", demo.binary.display());
    Ok(())
}

/// Runs one step and prints how long it took.
fn step<T>(what: &str, work: impl FnOnce() -> Result<T, TaskError>) -> Result<T, TaskError> {
    let begun = monotonic();
    let outcome = work();
    let mark = if outcome.is_ok() { "ok" } else { "FAILED" };
    say!("{:>9.1} ms  {mark:<6}  {what}", begun.elapsed().as_secs_f64() * 1000.0);
    outcome
}

struct Demo {
    binary: PathBuf,
    data: PathBuf,
    run: PathBuf,
}

impl Demo {
    fn command(&self, args: &[&str]) -> Command {
        let mut command = shell::command(&self.binary);
        command.args(args).env("CORACLE_DATA_DIR", &self.data).env("CORACLE_RUN_DIR", &self.run);
        command
    }

    fn run(&self, args: &[&str]) -> Result<String, TaskError> {
        shell::stdout(&mut self.command(args))
    }

    /// Removes what an earlier demo kept, so that this one does all of its work.
    fn forget_last_time(&self) -> Result<(), TaskError> {
        self.run(&["rm", "--force", CONTAINER])?;
        self.run(&["volume", "rm", "--force", VOLUME])?;
        let images = self.run(&["images", "--quiet", "--no-trunc"])?;
        let mut images: Vec<&str> = images.lines().collect();
        images.sort_unstable();
        images.dedup();
        for image in images {
            self.run(&["rmi", "--force", image])?;
        }
        Ok(())
    }

    fn play(&self) -> Result<(), TaskError> {
        let image = match self.public_image() {
            Some(image) => image,
            None => self.own_image()?,
        };
        step("create the volume", || self.run(&["volume", "create", VOLUME]))?;
        step("start the database and wait until it is ready", || self.start(&image))?;
        step("write a row through exec", || {
            self.sql("create table voyage (id int primary key, ship text); insert into voyage values (1, 'coracle')")
        })?;
        step("read it from the host through the published port", || self.read_from_the_host())?;
        step("stop and remove the container", || {
            self.run(&["stop", CONTAINER])?;
            self.run(&["rm", CONTAINER])
        })?;
        step("start a new container on the same volume", || self.start(&image))?;
        step("find the row", || {
            let found = self.sql("select ship from voyage where id = 1")?;
            expect("the second container", &found)
        })
    }

    /// Pulls from a public registry, if one is in reach.
    fn public_image(&self) -> Option<String> {
        if !is_reachable("registry-1.docker.io:443") {
            say!("{:>12}  no public registry in reach: making images from Debian's packages", "");
            return None;
        }
        match step(&format!("pull {PUBLIC_IMAGE}"), || self.run(&["pull", "--quiet", PUBLIC_IMAGE])) {
            Ok(_) => Some(PUBLIC_IMAGE.to_owned()),
            Err(error) => {
                say!("{:>12}  {error}; making images from Debian's packages", "");
                None
            }
        }
    }

    /// Makes images, puts them into a registry on loopback and pulls them from there.
    fn own_image(&self) -> Result<String, TaskError> {
        let layout = rootfs::layout()?;
        step("make Debian and PostgreSQL images (cached)", || rootfs::debian(&layout))?;
        let dir = scratch::unique(&scratch::target_dir().join("registry"), "demo")?;
        let image = self.pull_from_loopback(layout.dir(), &dir);
        std::fs::remove_dir_all(&dir).map_err(crate::error::io("remove", &dir))?;
        image
    }

    fn pull_from_loopback(&self, layout: &Path, dir: &Path) -> Result<String, TaskError> {
        let registry = step("start a registry on loopback", || Registry::start(dir))?;
        let (debian, postgres) = step("push both images to it", || {
            Ok((
                registry.push(layout, rootfs::DEBIAN, "debian:bookworm")?,
                registry.push(layout, rootfs::POSTGRES, "postgres:15")?,
            ))
        })?;
        step("pull the Debian image", || self.run(&["pull", "--quiet", &debian]))?;
        step("pull the PostgreSQL image (shares a layer)", || self.run(&["pull", "--quiet", &postgres]))?;
        Ok(postgres)
    }

    /// Starts the database and waits for its own word that it takes connections over the network.
    fn start(&self, image: &str) -> Result<(), TaskError> {
        let volume = format!("{VOLUME}:/var/lib/postgresql/data");
        let password = format!("POSTGRES_PASSWORD={PASSWORD}");
        self.run(&[
            "run",
            "--detach",
            "--name",
            CONTAINER,
            "--volume",
            &volume,
            "--publish",
            "127.0.0.1::5432",
            "--env",
            &password,
            image,
        ])?;
        let logs = Background::start(&mut self.command(&["logs", "--follow", CONTAINER]))?;
        // An image may start a private server first, to set the cluster up; that one has no network.
        logs.wait_for_line("the database's start", READY, |line| {
            line.contains("listening on IPv4").then_some(())
        })?;
        logs.wait_for_line("the database's readiness", READY, |line| {
            line.contains("ready to accept connections").then_some(())
        })
    }

    fn sql(&self, statement: &str) -> Result<String, TaskError> {
        self.run(&["exec", CONTAINER, "psql", "--username=postgres", "-tAqc", statement])
    }

    fn read_from_the_host(&self) -> Result<(), TaskError> {
        let template = "{{(index (index .NetworkSettings.Ports \"5432/tcp\") 0).HostPort}}";
        let port = self.run(&["inspect", "--format", template, CONTAINER])?;
        let mut psql = shell::command("psql");
        psql.args([
            "--host=127.0.0.1",
            "--username=postgres",
            "--port",
            &port,
            "-tAqc",
            "select ship from voyage",
        ]);
        let found = shell::stdout(psql.env("PGPASSWORD", PASSWORD).env("PGCONNECT_TIMEOUT", "10"))?;
        expect("the host", &found)
    }
}

fn expect(who: &str, found: &str) -> Result<(), TaskError> {
    if found == "coracle" {
        return Ok(());
    }
    Err(TaskError::Failed(format!("{who} found {found:?} instead of the row \"coracle\"")))
}

/// Whether a TCP connection to `host:port` comes about in time, the name's look-up included.
fn is_reachable(host: &'static str) -> bool {
    let (sender, receiver) = channel();
    // A look-up cannot be interrupted: it is left behind when it takes too long and ends with the task.
    std::thread::spawn(move || {
        let connected = host
            .to_socket_addrs()
            .is_ok_and(|mut all| all.any(|a| std::net::TcpStream::connect_timeout(&a, REACH).is_ok()));
        sender.send(connected).ok();
    });
    receiver.recv_timeout(REACH).unwrap_or(false)
}
