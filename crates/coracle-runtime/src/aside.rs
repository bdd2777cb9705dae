//! A mount namespace with next to nothing in it, to start from on hosts with very many mounts.
//!
//! A new mount namespace is a copy of its maker's, and everything that is copied is taken down again after the
//! pivot: 1.3 ms for a thousand mounts, which is as much as all the rest. The kernel has had a namespace with one
//! visible mount since it booted, that of its thread `kdevtmpfs`, so the container's is copied from there.
//!
//! The first process goes there late, when the host's paths have been used for the last time; everything that
//! comes after it goes by descriptors. Where that does not hold ([`may_start_aside`]), where there are few mounts,
//! and where the thread cannot be seen (inside another container), the usual way is gone.
//!
//! Source: Linux `drivers/base/devtmpfs.c`; listmount(2), Linux 6.8.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use oci_spec::runtime::Spec;
use rustix::fs::{Mode, OFlags};

use crate::hooks::{self, HookPoint};
use crate::namespaces::{Mounts, Plan, User};
use crate::root::Entry;

/// From so many mounts on it is worth looking for the thread.
const MOUNTS_MIN: usize = 256;
/// The threads of the kernel are among the first processes.
const PID_MAX: u32 = 1024;
/// The parent of all of the kernel's threads.
const KTHREADD: &str = "2";
/// In the flags of a thread of the kernel (Linux `include/linux/sched.h`): no user's process has it.
const PF_KTHREAD: u64 = 0x0020_0000;
/// Options of mounts up to this length are given to the kernel without a path.
const OPTION_BYTES_MAX: usize = 255;

/// The namespace, if there are many mounts and this container can be set up from there.
pub(crate) fn namespace_for(spec: &Spec, plan: &Plan, entry: &Entry) -> Option<OwnedFd> {
    // Only the host's root may go there, and a helper has no need to.
    let is_usual = matches!((&plan.mounts, &plan.user), (Mounts::New, User::Caller)) && !plan.needs_helper();
    if !is_usual
        || !matches!(entry, Entry::Pivot)
        || !coracle_sys::mount::has_at_least(MOUNTS_MIN)
        || !may_start_aside(spec)
    {
        return None;
    }
    let thread = (KTHREADD.parse().ok()?..PID_MAX).find(|pid| is_kdevtmpfs(*pid))?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    rustix::fs::open(format!("/proc/{thread}/ns/mnt"), flags, Mode::empty()).ok()
}

/// Nothing of the configuration needs a path of the host once the namespace is entered: hooks do, mounts whose
/// options have to go through `mount(2)`, and masks where the container has no null device of its own.
fn may_start_aside(spec: &Spec) -> bool {
    let points = [HookPoint::Prestart, HookPoint::CreateRuntime, HookPoint::CreateContainer];
    let mut mounts = spec.mounts().iter().flatten();
    let has_dev =
        mounts.clone().any(|m| m.destination() == Path::new("/dev") && m.typ().as_deref() == Some("tmpfs"));
    let is_odd = |option: &String| option.len() > OPTION_BYTES_MAX || option.contains("iversion");
    let is_plain = !mounts.any(|mount| mount.options().iter().flatten().any(is_odd));
    let has_label = spec.linux().as_ref().is_some_and(|linux| linux.mount_label().is_some());
    has_dev && is_plain && !has_label && !hooks::has_any(spec.hooks().as_ref(), &points)
}

/// By its name, which anybody may have, and by what only threads of the kernel have.
fn is_kdevtmpfs(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| is_its_stat(&stat))
}

fn is_its_stat(stat: &str) -> bool {
    let Some((name, rest)) = stat.rsplit_once(')') else { return false };
    let mut fields = rest.split_whitespace();
    let parent = fields.nth(1);
    let flags = fields.nth(4).and_then(|flags| flags.parse::<u64>().ok());
    name.ends_with("(kdevtmpfs") && parent == Some(KTHREADD) && flags.is_some_and(|f| f & PF_KTHREAD != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::defaults::default_spec;

    #[test]
    fn nobody_can_pass_for_the_kernels_thread() {
        assert!(is_its_stat("25 (kdevtmpfs) S 2 0 0 0 -1 2129984 0 0"));
        assert!(!is_its_stat("25 (kdevtmpfs) S 1 0 0 0 -1 2129984 0 0"), "another parent");
        assert!(!is_its_stat("25 (kdevtmpfs) S 2 0 0 0 -1 4194560 0 0"), "a user's process");
        assert!(!is_its_stat("25 (x) S 2 0 0 0 -1 2129984 (kdevtmpfs"));
        assert!(!is_its_stat("25 (kdevtmpf) S 2 0 0 0 -1 2129984 0 0"));
    }

    #[test]
    fn what_needs_the_hosts_paths_starts_among_them() {
        assert!(may_start_aside(&default_spec()));
        let mut hooked = default_spec();
        let hooks = serde_json::from_str(r#"{"createContainer": [{"path": "/bin/true"}]}"#).unwrap();
        hooked.set_hooks(Some(hooks));
        assert!(!may_start_aside(&hooked));
        let mut bare = default_spec();
        bare.set_mounts(None);
        assert!(!may_start_aside(&bare));
    }
}
