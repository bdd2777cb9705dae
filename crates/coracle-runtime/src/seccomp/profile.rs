//! Profiles: reading both JSON forms, resolving Docker's conditions.

use std::borrow::Cow;

use oci_spec::runtime::{Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompOperator};
use serde::Deserialize;

use super::abi::{Abi, multiplexed};
use super::invalid;
use crate::{LaunchError, caps};

/// The native architecture as Docker's profiles name it.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: &str = "amd64";
/// The native architecture as Docker's profiles name it.
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: &str = "arm64";

pub(super) const RET_ALLOW: u32 = 0x7fff_0000;
pub(super) const RET_ERRNO: u32 = 0x0005_0000;
const RET_KILL_THREAD: u32 = 0;
const RET_KILL_PROCESS: u32 = 0x8000_0000;
const RET_TRAP: u32 = 0x0003_0000;
pub(super) const RET_TRACE: u32 = 0x7ff0_0000;
pub(super) const RET_LOG: u32 = 0x7ffc_0000;
pub(super) const RET_NOTIFY: u32 = 0x7fc0_0000;
const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// A profile with every condition resolved, for each ABI that it speaks of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Profile {
    /// The native one first.
    pub(super) policies: Vec<Policy>,
    /// What a call of any other ABI gets, as the kernel's return value.
    pub(super) foreign: u32,
}

/// A profile with every name and condition resolved for one ABI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Policy {
    pub(super) abi: Abi,
    /// What a call without a rule gets, as the kernel's return value.
    pub(super) default: u32,
    /// In the profile's order.
    pub(super) rules: Vec<Rule>,
    /// The highest number that the profile names, if it names any.
    pub(super) highest: Option<u32>,
}

/// What calls of a number get if all conditions hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) number: u32,
    pub(super) conditions: Vec<Condition>,
    pub(super) result: u32,
}

/// A comparison of one argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Condition {
    pub(super) argument: u32,
    pub(super) comparison: Comparison,
}

/// How an argument is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Comparison {
    Equal(u64),
    NotEqual(u64),
    Less(u64),
    LessOrEqual(u64),
    Greater(u64),
    GreaterOrEqual(u64),
    /// Mask, then the value that is left.
    MaskedEqual(u64, u64),
}

/// Both JSON forms: Docker's has conditions, and `name` in its oldest revisions.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    #[serde(borrow)]
    default_action: Cow<'a, str>,
    default_errno_ret: Option<u32>,
    #[serde(borrow, default)]
    syscalls: Vec<Entry<'a>>,
    #[serde(borrow)]
    listener_path: Option<Cow<'a, str>>,
    #[serde(borrow)]
    listener_metadata: Option<Cow<'a, str>>,
    flags: Option<Vec<String>>,
    #[serde(borrow)]
    architectures: Option<Vec<Cow<'a, str>>>,
    #[serde(borrow)]
    arch_map: Option<Vec<Family<'a>>>,
}

/// An architecture and the other ABIs that its kernels run.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Family<'a> {
    #[serde(borrow)]
    architecture: Cow<'a, str>,
    #[serde(borrow)]
    sub_architectures: Option<Vec<Cow<'a, str>>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry<'a> {
    // Borrowed: a default start reads 450 names.
    #[serde(borrow, default)]
    names: Vec<&'a str>,
    #[serde(borrow)]
    name: Option<&'a str>,
    #[serde(borrow)]
    action: Cow<'a, str>,
    errno_ret: Option<u32>,
    #[serde(borrow)]
    args: Option<Vec<Argument<'a>>>,
    #[serde(borrow)]
    includes: Option<Filter<'a>>,
    #[serde(borrow)]
    excludes: Option<Filter<'a>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Argument<'a> {
    index: u32,
    value: u64,
    #[serde(default)]
    value_two: u64,
    #[serde(borrow)]
    op: Cow<'a, str>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Filter<'a> {
    #[serde(borrow)]
    caps: Option<Vec<Cow<'a, str>>>,
    #[serde(borrow)]
    arches: Option<Vec<Cow<'a, str>>>,
    #[serde(borrow)]
    min_kernel: Option<Cow<'a, str>>,
}

fn parse(json: &str) -> Result<Document<'_>, LaunchError> {
    serde_json::from_str(json).map_err(|error| invalid(error.to_string()))
}

/// Reads a profile for a process with the capabilities in `bounding`. It is one of ours: no listener, and the
/// ABIs are `abis`, whatever it lists. Calls of others find no such call.
pub(super) fn read(json: &str, bounding: u64, abis: &[Abi]) -> Result<Profile, LaunchError> {
    let document = parse(json)?;
    let default = action(&document.default_action, document.default_errno_ret)?;
    let mut profile = Profile::new(default, abis, RET_ERRNO | ENOSYS);
    let kernel = kernel_version();
    for entry in &document.syscalls {
        if !entry.applies(bounding, kernel)? {
            continue;
        }
        let result = action(&entry.action, entry.errno_ret)?;
        let conditions =
            entry.args.iter().flatten().map(Argument::condition).collect::<Result<Vec<_>, _>>()?;
        for name in entry.names.iter().copied().chain(entry.name) {
            profile.add(name, &conditions, result);
        }
    }
    Ok(profile)
}

impl Profile {
    fn new(default: u32, abis: &[Abi], foreign: u32) -> Self {
        let policy = |abi: &Abi| Policy { abi: *abi, default, rules: Vec::with_capacity(512), highest: None };
        Self { policies: abis.iter().map(policy).collect(), foreign }
    }

    /// Names of other architectures and of newer kernels are passed over, as runc does.
    fn add(&mut self, name: &str, conditions: &[Condition], result: u32) {
        for policy in &mut self.policies {
            policy.add(name, conditions, result);
        }
    }

    /// Whether any call waits for the word of a listener.
    pub(super) fn notifies(&self) -> bool {
        self.policies.iter().flat_map(|policy| &policy.rules).any(|rule| rule.result == RET_NOTIFY)
    }
}

impl Policy {
    fn add(&mut self, name: &str, conditions: &[Condition], result: u32) {
        let Some(number) = self.abi.number_of(name) else { return };
        if !self.abi.is_private(number) {
            self.highest = self.highest.max(Some(number));
        }
        // The same as if it were not there: an earlier rule for the call keeps its say (runc).
        if conditions.is_empty() && result == self.default {
            return;
        }
        let conditions: Vec<Condition> =
            conditions.iter().map(|condition| self.abi.narrowed(*condition)).collect();
        if conditions.is_empty()
            && let Some((multiplexer, call)) = multiplexed(self.abi, name)
        {
            // The same call by another way, where only its own number can be looked at.
            let comparison = Comparison::Equal(call);
            let conditions = vec![Condition { argument: 0, comparison }];
            self.rules.push(Rule { number: multiplexer, conditions, result });
        }
        if repeats_an_argument(&conditions) {
            let alone = |condition| Rule { number, conditions: vec![condition], result };
            self.rules.extend(conditions.into_iter().map(alone));
        } else {
            self.rules.push(Rule { number, conditions, result });
        }
    }
}

/// Several conditions on one argument are alternatives instead of a conjunction: libseccomp cannot express it,
/// runc makes a rule of each, and profiles count on that.
fn repeats_an_argument(conditions: &[Condition]) -> bool {
    let mut seen = conditions.iter().map(|condition| condition.argument).collect::<Vec<_>>();
    seen.sort_unstable();
    seen.windows(2).any(|pair| matches!(pair, [a, b] if a == b))
}

/// The configuration's own form, which has no conditions. Calls of ABIs that it does not list kill, as with
/// libseccomp.
pub(super) fn of_spec(spec: &LinuxSeccomp) -> Result<Profile, LaunchError> {
    let default = result_of(spec.default_action(), spec.default_errno_ret())?;
    if default == RET_NOTIFY {
        return Err(invalid(
            "SCMP_ACT_NOTIFY cannot be used as default action: nobody could hand the listener over",
        ));
    }
    let mut abis = vec![Abi::NATIVE];
    for arch in spec.architectures().iter().flatten() {
        if let Some(abi) = abi_of(*arch)
            && !abis.contains(&abi)
        {
            abis.push(abi);
        }
    }
    let mut profile = Profile::new(default, &abis, RET_KILL_THREAD);
    for entry in spec.syscalls().iter().flatten() {
        let result = result_of(entry.action(), entry.errno_ret())?;
        let mut conditions = Vec::new();
        for arg in entry.args().iter().flatten() {
            let index = u32::try_from(arg.index()).unwrap_or(u32::MAX);
            let comparison = comparison_of(arg.op(), arg.value(), arg.value_two().unwrap_or(0));
            conditions.push(condition(index, comparison)?);
        }
        for name in entry.names() {
            if result == RET_NOTIFY && name == "write" {
                let reason = "SCMP_ACT_NOTIFY cannot be used for the write syscall, by which the listener is handed over";
                return Err(invalid(reason));
            }
            profile.add(name, &conditions, result);
        }
    }
    Ok(profile)
}

/// The ABI of this machine that an architecture stands for. Calls of the others never come here.
fn abi_of(arch: Arch) -> Option<Abi> {
    let abi = match arch {
        Arch::ScmpArchNative => Abi::NATIVE,
        Arch::ScmpArchX86_64 => Abi::X86_64,
        Arch::ScmpArchX86 => Abi::X86,
        Arch::ScmpArchX32 => Abi::X32,
        Arch::ScmpArchAarch64 => Abi::Aarch64,
        Arch::ScmpArchArm => Abi::Arm,
        _ => return None,
    };
    abi.is_of_this_machine().then_some(abi)
}

/// Docker's form with its conditions resolved, as OCI's form.
pub(super) fn resolve(json: &str, bounding: u64) -> Result<LinuxSeccomp, LaunchError> {
    let document = parse(json)?;
    let architectures = document.architectures()?;
    let kernel = kernel_version();
    let mut entries = Vec::new();
    for entry in &document.syscalls {
        if entry.applies(bounding, kernel)? {
            let names: Vec<&str> = entry.names.iter().copied().chain(entry.name).collect();
            let args: Vec<serde_json::Value> = entry
                .args
                .iter()
                .flatten()
                .map(|arg| {
                    serde_json::json!({
                        "index": arg.index, "value": arg.value, "valueTwo": arg.value_two, "op": arg.op,
                    })
                })
                .collect();
            let mut value = serde_json::json!({"names": names, "action": entry.action, "args": args});
            if let (Some(errno), Some(fields)) = (entry.errno_ret, value.as_object_mut()) {
                fields.insert("errnoRet".to_owned(), errno.into());
            }
            entries.push(value);
        }
    }
    let mut value = serde_json::json!({"defaultAction": document.default_action, "syscalls": entries});
    if let Some(fields) = value.as_object_mut() {
        if let Some(errno) = document.default_errno_ret {
            fields.insert("defaultErrnoRet".to_owned(), errno.into());
        }
        if let Some(flags) = document.flags {
            fields.insert("flags".to_owned(), flags.into());
        }
        if let Some(path) = document.listener_path {
            fields.insert("listenerPath".to_owned(), path.into());
        }
        if let Some(metadata) = document.listener_metadata {
            fields.insert("listenerMetadata".to_owned(), metadata.into());
        }
        if let Some(architectures) = architectures {
            fields.insert("architectures".to_owned(), architectures.into());
        }
    }
    serde_json::from_value(value).map_err(|error| invalid(error.to_string()))
}

impl Document<'_> {
    /// Those that the profile lists, or its map gives for this machine.
    fn architectures(&self) -> Result<Option<Vec<String>>, LaunchError> {
        let owned = |names: &[Cow<'_, str>]| names.iter().map(|name| name.clone().into_owned()).collect();
        let listed = self.architectures.as_deref().unwrap_or_default();
        match (listed, self.arch_map.as_deref().unwrap_or_default()) {
            ([], []) => Ok(None),
            (listed, []) => Ok(Some(owned(listed))),
            ([], families) => {
                let family = families.iter().find(|family| family.architecture == Abi::NATIVE.name());
                Ok(family.map(|family| {
                    let mut names: Vec<String> =
                        owned(family.sub_architectures.as_deref().unwrap_or_default());
                    names.insert(0, family.architecture.clone().into_owned());
                    names
                }))
            }
            _ => Err(invalid("it has both architectures and archMap; one of them is allowed")),
        }
    }
}

impl Entry<'_> {
    fn applies(&self, bounding: u64, kernel: (u32, u32)) -> Result<bool, LaunchError> {
        let has = |name: &str| caps::number_of(name).is_some_and(|number| bounding >> number & 1 == 1);
        if let Some(includes) = &self.includes {
            if includes.arches.as_ref().is_some_and(|l| !l.is_empty() && !l.iter().any(|a| a == ARCHITECTURE))
            {
                return Ok(false);
            }
            // All of them, as Docker reads the list.
            if includes.caps.iter().flatten().any(|name| !has(name)) {
                return Ok(false);
            }
            if kernel < includes.kernel()? {
                return Ok(false);
            }
        }
        if let Some(excludes) = &self.excludes {
            if excludes.arches.iter().flatten().any(|a| a == ARCHITECTURE)
                || excludes.caps.iter().flatten().any(|name| has(name))
            {
                return Ok(false);
            }
            if excludes.min_kernel.is_some() && kernel >= excludes.kernel()? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Filter<'_> {
    fn kernel(&self) -> Result<(u32, u32), LaunchError> {
        match &self.min_kernel {
            None => Ok((0, 0)),
            Some(text) => version(text).ok_or_else(|| invalid(format!("minKernel {text} is no version"))),
        }
    }
}

impl Argument<'_> {
    fn condition(&self) -> Result<Condition, LaunchError> {
        let comparison = match self.op.as_ref() {
            "SCMP_CMP_EQ" => Comparison::Equal(self.value),
            "SCMP_CMP_NE" => Comparison::NotEqual(self.value),
            "SCMP_CMP_LT" => Comparison::Less(self.value),
            "SCMP_CMP_LE" => Comparison::LessOrEqual(self.value),
            "SCMP_CMP_GT" => Comparison::Greater(self.value),
            "SCMP_CMP_GE" => Comparison::GreaterOrEqual(self.value),
            "SCMP_CMP_MASKED_EQ" => Comparison::MaskedEqual(self.value, self.value_two),
            other => return Err(invalid(format!("the operator {other} is not known"))),
        };
        condition(self.index, comparison)
    }
}

fn condition(argument: u32, comparison: Comparison) -> Result<Condition, LaunchError> {
    if argument > 5 {
        return Err(invalid(format!("a system call has six arguments, and no number {argument}")));
    }
    Ok(Condition { argument, comparison })
}

fn comparison_of(op: LinuxSeccompOperator, value: u64, value_two: u64) -> Comparison {
    match op {
        LinuxSeccompOperator::ScmpCmpEq => Comparison::Equal(value),
        LinuxSeccompOperator::ScmpCmpNe => Comparison::NotEqual(value),
        LinuxSeccompOperator::ScmpCmpLt => Comparison::Less(value),
        LinuxSeccompOperator::ScmpCmpLe => Comparison::LessOrEqual(value),
        LinuxSeccompOperator::ScmpCmpGt => Comparison::Greater(value),
        LinuxSeccompOperator::ScmpCmpGe => Comparison::GreaterOrEqual(value),
        LinuxSeccompOperator::ScmpCmpMaskedEq => Comparison::MaskedEqual(value, value_two),
    }
}

fn action(name: &str, errno: Option<u32>) -> Result<u32, LaunchError> {
    let errno = errno.unwrap_or(EPERM) & 0xffff;
    Ok(match name {
        "SCMP_ACT_ALLOW" => RET_ALLOW,
        "SCMP_ACT_ERRNO" => RET_ERRNO | errno,
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => RET_KILL_THREAD,
        "SCMP_ACT_KILL_PROCESS" => RET_KILL_PROCESS,
        "SCMP_ACT_TRAP" => RET_TRAP,
        "SCMP_ACT_TRACE" => RET_TRACE | errno,
        "SCMP_ACT_LOG" => RET_LOG,
        "SCMP_ACT_NOTIFY" => RET_NOTIFY,
        other => return Err(invalid(format!("the action {other} is not known"))),
    })
}

fn result_of(kind: LinuxSeccompAction, errno: Option<u32>) -> Result<u32, LaunchError> {
    action(
        match kind {
            LinuxSeccompAction::ScmpActAllow => "SCMP_ACT_ALLOW",
            LinuxSeccompAction::ScmpActErrno => "SCMP_ACT_ERRNO",
            LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => "SCMP_ACT_KILL",
            LinuxSeccompAction::ScmpActKillProcess => "SCMP_ACT_KILL_PROCESS",
            LinuxSeccompAction::ScmpActTrap => "SCMP_ACT_TRAP",
            LinuxSeccompAction::ScmpActTrace => "SCMP_ACT_TRACE",
            LinuxSeccompAction::ScmpActLog => "SCMP_ACT_LOG",
            LinuxSeccompAction::ScmpActNotify => "SCMP_ACT_NOTIFY",
        },
        errno,
    )
}

/// `4.8` or `6.18.44-generic`.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split(['.', '-']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn kernel_version() -> (u32, u32) {
    rustix::system::uname().release().to_str().ok().and_then(version).unwrap_or((0, 0))
}
