//! Labels of AppArmor and SELinux, which take effect at the `execve`.
//!
//! They are written to the process's own `attr` directory. By then `/proc` is the container's, and what is written
//! there may go anywhere (CVE-2019-16884, CVE-2025-52881); so the host's is kept open as a directory from before,
//! and nothing mounted in it is followed.
//!
//! Source: OCI runtime-spec `config.md#linux-process`; proc_pid_attr(5).

use std::os::fd::{AsFd, OwnedFd};

use oci_spec::runtime::Process;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::LaunchError;

const PROC_SUPER_MAGIC: i64 = 0x9fa0;
const SELINUX_MAGIC: i64 = 0xf97c_ff8c;

/// The labels of a process, and the way to set them.
#[derive(Debug)]
pub(crate) struct Labels {
    /// The host's procfs.
    proc: OwnedFd,
    apparmor: Option<String>,
    selinux: Option<String>,
}

impl Labels {
    /// `None` where no label is asked for. An `unconfined` profile is none where AppArmor is off.
    pub(crate) fn of(process: &Process) -> Result<Option<Self>, LaunchError> {
        let given = |label: &Option<String>| label.clone().filter(|label| !label.is_empty());
        let (mut apparmor, selinux) = (given(process.apparmor_profile()), given(process.selinux_label()));
        if let Some(profile) = &apparmor
            && !is_apparmor_enabled()
        {
            if profile != "unconfined" {
                let reason = format!("{profile:?} cannot be applied: AppArmor is not enabled on this host");
                return Err(LaunchError::spec("process.apparmorProfile", reason));
            }
            apparmor = None;
        }
        if let Some(label) = &selinux
            && !is_selinux_enabled()
        {
            let reason = format!(
                "{label:?}: selinux label is specified in config, but selinux is disabled or not supported"
            );
            return Err(LaunchError::spec("process.selinuxLabel", reason));
        }
        if apparmor.is_none() && selinux.is_none() {
            return Ok(None);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let cannot = |error| LaunchError::step("open /proc", error);
        let proc = rustix::fs::openat(CWD, "/proc", flags, Mode::empty()).map_err(cannot)?;
        if rustix::fs::fstatfs(&proc).map_err(cannot)?.f_type != PROC_SUPER_MAGIC {
            return Err(cannot(Errno::NOTDIR));
        }
        Ok(Some(Self { proc, apparmor, selinux }))
    }

    /// The label of keys that are made from now on, the session keyring first of all.
    pub(crate) fn label_keys(&self) -> Result<(), LaunchError> {
        match &self.selinux {
            Some(label) => self.write("keycreate", label, "label keys by process.selinuxLabel"),
            None => Ok(()),
        }
    }

    /// From the `execve` on.
    pub(crate) fn apply(&self) -> Result<(), LaunchError> {
        if let Some(label) = &self.selinux {
            self.write("exec", label, "apply process.selinuxLabel")?;
        }
        let Some(profile) = &self.apparmor else { return Ok(()) };
        let (step, text) = ("apply process.apparmorProfile", format!("exec {profile}"));
        match self.open("apparmor/exec") {
            Ok(file) => put(&file, &text, step),
            // Before Linux 5.1 there was one directory for all modules.
            Err(Errno::NOENT) => self.write("exec", &text, step),
            Err(error) => Err(LaunchError::step(step, error)),
        }
    }

    fn open(&self, name: &str) -> Result<OwnedFd, Errno> {
        let path = format!("self/attr/{name}");
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(self.proc.as_fd(), path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty(), resolve)
    }

    fn write(&self, name: &str, text: &str, step: &str) -> Result<(), LaunchError> {
        let file = self.open(name).map_err(|error| LaunchError::step(step, error))?;
        put(&file, text, step)
    }
}

fn put(file: &OwnedFd, text: &str, step: &str) -> Result<(), LaunchError> {
    match rustix::io::write(file, text.as_bytes()) {
        Ok(_) => Ok(()),
        // The kernel's answer for a label that no policy has.
        Err(Errno::NOENT | Errno::INVAL) => {
            Err(LaunchError::spec(step.trim_start_matches("apply "), format!("the host knows no {text:?}")))
        }
        Err(error) => Err(LaunchError::step(step, error)),
    }
}

fn is_apparmor_enabled() -> bool {
    std::fs::read("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.first() == Some(&b'Y'))
}

fn is_selinux_enabled() -> bool {
    rustix::fs::statfs("/sys/fs/selinux").is_ok_and(|stat| stat.f_type == SELINUX_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(apparmor: &str, selinux: &str) -> Process {
        let mut process = Process::default();
        process.set_apparmor_profile(Some(apparmor.into())).set_selinux_label(Some(selinux.into()));
        process
    }

    #[test]
    fn no_label_costs_nothing() {
        assert!(Labels::of(&process("", "")).unwrap().is_none());
    }

    #[test]
    fn a_label_is_refused_where_nobody_would_enforce_it() {
        if is_apparmor_enabled() {
            println!("skipped: AppArmor is enabled here");
        } else {
            let error = Labels::of(&process("docker-default", "")).unwrap_err().to_string();
            assert!(error.contains("process.apparmorProfile") && error.contains("not enabled"), "{error}");
            assert!(Labels::of(&process("unconfined", "")).unwrap().is_none());
        }
        if is_selinux_enabled() {
            println!("skipped: SELinux is enabled here");
        } else {
            let error = Labels::of(&process("", "system_u:system_r:container_t:s0")).unwrap_err().to_string();
            assert!(error.contains("process.selinuxLabel"), "{error}");
        }
    }

    #[test]
    fn only_the_processs_own_attributes_can_be_opened() {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let proc = rustix::fs::open("/proc", flags, Mode::empty()).unwrap();
        let labels = Labels { proc, apparmor: None, selinux: None };
        assert!(
            labels.open("../../sys/kernel/hostname").is_ok_and(|_| false) || labels.open("../cwd").is_err()
        );
        labels.apply().unwrap();
    }
}
