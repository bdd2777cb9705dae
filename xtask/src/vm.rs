//! A small virtual machine with the distribution's kernel, for tests that need another machine than this one:
//! cgroup v2 alone with all its controllers, and a kernel years older.
//!
//! Emulated in software, it needs no rights and no support of the hardware. Its root is one archive made here:
//! a static busybox, the modules that containers need, and the files a test asks for. It has no disk and no
//! network; what its script writes comes back over a serial port, and the machine ends with the script.
//!
//! ```text
//! kernel ─► /init (rootfs) ─► moves all to a tmpfs, mounts, switch_root ─► sh /script ─► "@@end CODE" ─► off
//! ```
//!
//! A root that is the kernel's own `rootfs` cannot be pivoted away from, hence the move.
//! Source: cpio "newc" format of Linux `Documentation/driver-api/early-userspace/buffer-format.rst`.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufWriter, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{TaskError, io};
use crate::shell::{self, Background};

/// What containers need of the kernel that Debian builds as modules. Missing ones are left out: the tests then
/// say what they lack.
const MODULES: [&str; 9] =
    ["overlay", "erofs", "loop", "veth", "bridge", "nf_tables", "nft_chain_nat", "nft_masq", "nft_ct"];
const MAKE_EXT4: &str = "/sbin/mke2fs";
const SYSTEMD: [&str; 4] =
    ["/lib/systemd/systemd", "/usr/bin/systemctl", "/usr/bin/busctl", "/usr/bin/dbus-daemon"];
/// Files below `/etc` of a machine with systemd.
const UNITS: [(&str, &str); 6] = [
    ("machine-id", "0123456789abcdef0123456789abcdef\n"),
    (
        "systemd/system/default.target",
        "[Unit]\nDescription=test\nRequires=script.service\nAfter=script.service\nAllowIsolate=yes\n",
    ),
    (
        "systemd/system/dbus.service",
        "[Unit]\nDefaultDependencies=no\nRequires=dbus.socket\n[Service]\nType=notify\n\
         ExecStart=/usr/bin/dbus-daemon --nofork --nopidfile --address=systemd: --config-file=/etc/bus.conf\n",
    ),
    // systemd takes its own name on the bus only where the socket is a unit.
    (
        "systemd/system/dbus.socket",
        "[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=/run/dbus/system_bus_socket\n",
    ),
    (
        "systemd/system/script.service",
        "[Unit]\nDefaultDependencies=no\nRequires=dbus.service\nAfter=dbus.service\n\
         [Service]\nType=oneshot\nExecStart=/bin/sh /run-script\n",
    ),
    (
        "bus.conf",
        "<busconfig><type>system</type><listen>unix:path=/run/dbus/system_bus_socket</listen><auth>EXTERNAL</auth>\
         <policy context='default'><allow send_destination='*'/><allow receive_sender='*'/><allow own='*'/>\
         <allow user='*'/></policy></busconfig>\n",
    ),
];
/// Lines of the guest's output that are kept.
const LINES_MAX: usize = 20_000;
const BOOT: &str = include_str!("../assets/vm-init.sh");
const END: &str = "@@end ";

/// What to run in a machine.
#[derive(Debug, Default)]
pub struct Guest {
    /// Files of this machine, by their path in the guest. They keep their permissions.
    pub files: Vec<(PathBuf, String)>,
    /// A shell script; its exit code is the result's.
    pub script: String,
    /// The cgroup controllers' layout is v1 instead of v2.
    pub cgroup_v1: bool,
    /// The distribution's systemd and message bus run in the guest, and the script is a unit.
    pub systemd: bool,
    /// How long everything may take.
    pub timeout: Duration,
}

/// How a script ended.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit code.
    pub code: i32,
    /// What it wrote.
    pub lines: Vec<String>,
}

/// A kernel and its modules.
#[derive(Debug)]
struct Kernel {
    image: PathBuf,
    modules: PathBuf,
}

/// What this machine lacks to run another one.
#[must_use]
pub fn missing() -> Option<String> {
    if std::env::consts::ARCH != "x86_64" {
        return Some("needs an x86-64 machine".to_owned());
    }
    if shell::find("qemu-system-x86_64").is_none() {
        return Some("needs qemu-system-x86_64 (package qemu-system-x86)".to_owned());
    }
    if shell::find("busybox").is_none() {
        return Some("needs busybox (package busybox-static)".to_owned());
    }
    if Kernel::find().is_none() {
        return Some("needs a kernel with its modules (package linux-image-cloud-amd64)".to_owned());
    }
    None
}

/// Boots a machine, runs the script and waits for its end.
///
/// # Errors
/// If the machine cannot be made or ends without having run the script.
pub fn run(guest: &Guest, scratch: &Path) -> Result<Outcome, TaskError> {
    let kernel = Kernel::find().ok_or_else(|| TaskError::Missing {
        what: "a kernel for a virtual machine".to_owned(),
        remedy: "apt-get install linux-image-cloud-amd64".to_owned(),
    })?;
    let archive = scratch.join("initrd");
    write_archive(guest, &kernel, &archive)?;
    let log = scratch.join("console.log");
    let cgroups = match (guest.systemd, guest.cgroup_v1) {
        (true, _) => "vm.init=systemd cgroup_no_v1=all systemd.unified_cgroup_hierarchy=1",
        (false, true) => "vm.cgroup=1",
        (false, false) => "vm.cgroup=2 cgroup_no_v1=all",
    };
    let mut command = shell::command("nice");
    command.args(["-n", "5", "qemu-system-x86_64", "-machine", "pc,accel=tcg", "-cpu", "max"]);
    command.args(["-smp", "2", "-m", "1536", "-nodefaults", "-no-user-config", "-display", "none"]);
    command.args(["-monitor", "none", "-no-reboot"]);
    command.arg("-serial").arg(format!("file:{}", log.display())).args(["-serial", "stdio"]);
    command.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(&archive);
    command
        .arg("-append")
        .arg(format!("console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off psi=1 {cgroups}"));
    let machine = Background::start(&mut command)?;
    let lines = RefCell::new(Vec::new());
    let ended = machine.wait_for_line("the end of the virtual machine", guest.timeout, |line| {
        let line = line.trim_end_matches('\r');
        if let Some(code) = line.strip_prefix(END) {
            return Some(code.trim().parse::<i32>().unwrap_or(-1));
        }
        if lines.borrow().len() < LINES_MAX {
            lines.borrow_mut().push(line.to_owned());
        }
        None
    });
    drop(machine);
    let lines = lines.into_inner();
    match ended {
        Ok(code) => Ok(Outcome { code, lines }),
        Err(error) => {
            let console = fs::read_to_string(&log).unwrap_or_default();
            // A panicking kernel's registers say nothing to whoever wrote a test.
            let said: Vec<&str> = console.lines().take_while(|line| !line.contains("Call Trace")).collect();
            let text = format!("{}\n{}", lines.join("\n"), said.join("\n"));
            Err(TaskError::Failed(format!("{error}; the machine's last words: {text}")))
        }
    }
}

impl Kernel {
    /// The cloud kernel, which boots fastest, or the newest other one.
    fn find() -> Option<Self> {
        let mut found: Vec<(bool, Self)> = fs::read_dir("/boot")
            .ok()?
            .filter_map(|entry| {
                let name = entry.ok()?.file_name().into_string().ok()?;
                let release = name.strip_prefix("vmlinuz-")?;
                let modules = Path::new("/lib/modules").join(release);
                let image = Path::new("/boot").join(&name);
                let usable = modules.join("modules.dep").exists() && fs::File::open(&image).is_ok();
                usable.then(|| (release.contains("cloud"), Self { image, modules }))
            })
            .collect();
        found.sort_by(|a, b| (a.0, &a.1.image).cmp(&(b.0, &b.1.image)));
        found.pop().map(|(_, kernel)| kernel)
    }

    /// Files of modules, each behind those it needs. `modules.dep` names what a module needs, itself first and
    /// the deepest need last.
    fn modules(&self, names: &[&str]) -> Result<Vec<PathBuf>, TaskError> {
        let list = self.modules.join("modules.dep");
        let text = fs::read_to_string(&list).map_err(io("read", &list))?;
        let mut files = Vec::new();
        let mut seen = BTreeSet::new();
        for name in names {
            let line = text.lines().find_map(|line| {
                let (file, needs) = line.split_once(':')?;
                let base = Path::new(file).file_name()?.to_str()?.split('.').next()?;
                (base.replace('-', "_") == *name).then_some((file, needs))
            });
            let Some((file, needs)) = line else { continue };
            for file in needs.split_whitespace().rev().chain([file]) {
                if seen.insert(file.to_owned()) {
                    files.push(self.modules.join(file));
                }
            }
        }
        Ok(files)
    }
}

fn write_archive(guest: &Guest, kernel: &Kernel, path: &Path) -> Result<(), TaskError> {
    let file = fs::File::create(path).map_err(io("create", path))?;
    let mut archive =
        Archive { out: BufWriter::new(file), path, dirs: BTreeSet::new(), files: BTreeSet::new(), next: 1 };
    let busybox = shell::find("busybox").ok_or_else(|| TaskError::Missing {
        what: "busybox".to_owned(),
        remedy: "apt-get install busybox-static".to_owned(),
    })?;
    archive.copy(&busybox, "bin/busybox")?;
    archive.add("init", 0o100_755, BOOT.as_bytes())?;
    archive.add("payload/script", 0o100_755, guest.script.as_bytes())?;
    let mut order = String::new();
    for module in kernel.modules(&MODULES)? {
        let name = module.file_name().unwrap_or_default().to_string_lossy().into_owned();
        archive.copy(&module, &format!("modules/{name}"))?;
        order.push_str(&name);
        order.push('\n');
    }
    archive.add("modules/order", 0o100_644, order.as_bytes())?;
    // For a file system that maps ids and knows fs-verity: tmpfs of older kernels does neither.
    if Path::new(MAKE_EXT4).exists() {
        add_programs(&mut archive, &[MAKE_EXT4])?;
    }
    if guest.systemd {
        add_systemd(&mut archive)?;
    }
    for (from, to) in &guest.files {
        archive.copy(from, &format!("payload/{}", to.trim_start_matches('/')))?;
    }
    archive.finish()
}

/// What is missing for a machine with systemd.
#[must_use]
pub fn missing_systemd() -> Option<String> {
    let absent = SYSTEMD.into_iter().find(|file| !Path::new(file).exists());
    absent.map(|file| format!("needs {file} (packages systemd and dbus)"))
}

/// Programs with their libraries.
fn add_programs(archive: &mut Archive<'_>, programs: &[&str]) -> Result<(), TaskError> {
    let mut files = BTreeSet::new();
    for program in programs {
        files.insert((*program).to_owned());
        let needs = shell::stdout(shell::command("ldd").arg(program))?;
        // `libc.so.6 => /lib/… (0x…)`, or the loader's path alone.
        files.extend(needs.lines().filter_map(|line| {
            line.split_whitespace().find(|word| word.starts_with('/')).map(str::to_owned)
        }));
    }
    for file in files {
        // Read by several sets of programs, and written once.
        if archive.files.insert(file.clone()) {
            archive.copy(Path::new(&file), &format!("payload{file}"))?;
        }
    }
    Ok(())
}

/// The distribution's programs, and as few units as let them run.
fn add_systemd(archive: &mut Archive<'_>) -> Result<(), TaskError> {
    add_programs(archive, &SYSTEMD)?;
    for (name, text) in UNITS {
        archive.add(&format!("payload/etc/{name}"), 0o100_644, text.as_bytes())?;
    }
    Ok(())
}

/// A cpio archive as the kernel unpacks it.
struct Archive<'a> {
    out: BufWriter<fs::File>,
    path: &'a Path,
    dirs: BTreeSet<String>,
    /// Files of this machine that are in it under their own names.
    files: BTreeSet<String>,
    next: u32,
}

impl Archive<'_> {
    fn copy(&mut self, from: &Path, to: &str) -> Result<(), TaskError> {
        let bytes = fs::read(from).map_err(io("read", from))?;
        let mode = fs::metadata(from).map_err(io("read", from))?.permissions().mode();
        self.add(to, 0o100_000 | (mode & 0o7777), &bytes)
    }

    fn add(&mut self, name: &str, mode: u32, bytes: &[u8]) -> Result<(), TaskError> {
        let parents: Vec<&str> = name.match_indices('/').filter_map(|(at, _)| name.get(..at)).collect();
        for parent in parents {
            if self.dirs.insert(parent.to_owned()) {
                self.entry(parent, 0o040_755, &[])?;
            }
        }
        self.entry(name, mode, bytes)
    }

    fn entry(&mut self, name: &str, mode: u32, bytes: &[u8]) -> Result<(), TaskError> {
        let number = self.next;
        self.next += 1;
        let (size, name_size) = (bytes.len(), name.len() + 1);
        // Magic, inode, mode, uid, gid, links, time, size, device twice, name, no checksum.
        let header = format!(
            "070701{number:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{size:08x}{0:08x}{0:08x}{0:08x}{0:08x}\
             {name_size:08x}{0:08x}{name}\0",
            0, 1
        );
        let written = self.padded(header.as_bytes()).and_then(|()| self.padded(bytes));
        written.map_err(io("write", self.path))
    }

    fn padded(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.out.write_all(bytes)?;
        let padding = bytes.len().next_multiple_of(4) - bytes.len();
        self.out.write_all([0; 4].get(..padding).unwrap_or_default())
    }

    fn finish(mut self) -> Result<(), TaskError> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.out.flush().map_err(io("write", self.path))
    }
}
