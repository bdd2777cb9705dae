//! Debian packages that tests, demo and benchmarks need, installed when they are missing.
//!
//! A package is looked for by a program of it, not by name: a tool that came from elsewhere serves as well,
//! and with everything in place nothing is started at all.

use std::path::Path;

use crate::error::TaskError;
use crate::shell;

/// A program and the Debian package that brings it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tool {
    /// The program's name, or the absolute path of a file.
    pub program: &'static str,
    /// The package.
    pub package: &'static str,
}

const fn tool(program: &'static str, package: &'static str) -> Tool {
    Tool { program, package }
}

/// Compiles Coracle for its first target.
pub const BUILD: &[Tool] = &[tool("cc", "gcc"), tool("musl-gcc", "musl-tools")];

/// Compiles C dependencies for the second target.
pub const CROSS: &[Tool] = &[
    tool("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"),
    // The compiler only recommends its headers.
    tool("/usr/aarch64-linux-gnu/include/stdint.h", "libc6-dev-arm64-cross"),
];

/// Makes and pushes images.
pub const IMAGES: &[Tool] = &[
    tool("mmdebstrap", "mmdebstrap"),
    tool("docker-registry", "docker-registry"),
    tool("skopeo", "skopeo"),
    tool("tar", "tar"),
];

/// What integration tests use as content, helpers and oracles.
pub const TESTS: &[Tool] = &[
    tool("busybox", "busybox-static"),
    tool("ip", "iproute2"),
    tool("nft", "nftables"),
    tool("skopeo", "skopeo"),
    tool("docker-registry", "docker-registry"),
    tool("mkfs.erofs", "erofs-utils"),
    tool("newuidmap", "uidmap"),
    tool("pasta", "passt"),
];

/// Engines that run their containers on ours in tests.
pub const ENGINES: &[Tool] = &[
    tool("dockerd", "docker.io"),
    tool("ctr", "containerd"),
    tool("podman", "podman"),
    tool("conmon", "conmon"),
    tool("script", "bsdutils"),
];

/// Runs tests in a virtual machine: cgroup v2 alone, and an older kernel.
pub const MACHINE: &[Tool] = &[
    tool("qemu-system-x86_64", "qemu-system-x86"),
    tool("/lib/systemd/systemd", "systemd"),
    tool("dbus-daemon", "dbus-daemon"),
    // A package of the current kernel's name changes with each update; this one follows them.
    tool("/usr/share/doc/linux-image-cloud-amd64", "linux-image-cloud-amd64"),
];

/// Talks to the demo's database from the host.
pub const DEMO: &[Tool] = &[tool("psql", "postgresql-client")];

/// Packages of the tools that are missing, each once.
#[must_use]
pub fn missing(sets: &[&[Tool]]) -> Vec<&'static str> {
    let mut packages: Vec<&'static str> = Vec::new();
    for tool in sets.iter().copied().flatten() {
        let is_there = if tool.program.starts_with('/') {
            Path::new(tool.program).exists()
        } else {
            shell::find(tool.program).is_some()
        };
        if !is_there && !packages.contains(&tool.package) {
            packages.push(tool.package);
        }
    }
    packages
}

/// Installs what is missing of these sets.
///
/// # Errors
/// If packages are missing and cannot be installed: not root, no apt-get, no network.
pub fn ensure(sets: &[&[Tool]]) -> Result<(), TaskError> {
    let packages = missing(sets);
    if packages.is_empty() {
        return Ok(());
    }
    if shell::find("apt-get").is_none() || !shell::is_root() {
        return Err(TaskError::Missing {
            what: packages.join(", "),
            remedy: format!("run as root on Debian, or: sudo apt-get install {}", packages.join(" ")),
        });
    }
    crate::say!("installing {}", packages.join(" "));
    let apt = |args: &[&str]| {
        let mut command = shell::command("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command.args(["-qq", "-y", "-o", "DPkg::Lock::Timeout=300"]).args(args);
        shell::stdout(&mut command)
    };
    apt(&["update"])?;
    let mut install = vec!["install", "--no-install-recommends"];
    install.extend(&packages);
    apt(&install)?;
    // Debian starts a service as soon as it is installed; nobody asked for a registry on port 5000.
    if packages.contains(&"docker-registry") && Path::new("/run/systemd/system").is_dir() {
        shell::stdout(shell::command("systemctl").args(["disable", "--now", "docker-registry"]))?;
    }
    match missing(sets).as_slice() {
        [] => Ok(()),
        still => Err(TaskError::Failed(format!("{} did not bring the expected programs", still.join(", ")))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_package_is_named_once() {
        const A: &[Tool] =
            &[tool("no-such-program-a", "x"), tool("no-such-program-b", "x"), tool("sh", "dash")];
        assert_eq!(missing(&[A, A]), ["x"]);
    }
}
