//! Scheduler, input and output priority, CPUs, memory nodes and personality of a process.
//!
//! Everything is read and checked before the process exists, so that a mistake names its field; what is not asked
//! for costs no system call. It is applied while the capabilities that the kernel may want are still there.
//!
//! Source: OCI runtime-spec 1.3 `config.md#linux-process`, `config-linux.md#personality`, `#memory-policy`.

use coracle_sys::schedule::{self, Mask, SchedulerAttributes};
use oci_spec::runtime::{
    ExecCPUAffinity, IOPriorityClass, LinuxIOPriority, LinuxMemoryPolicy, LinuxPersonality,
    LinuxPersonalityDomain, LinuxSchedulerFlag, LinuxSchedulerPolicy, MemoryPolicyFlagType,
    MemoryPolicyModeType, Process, Scheduler,
};

use crate::LaunchError;
use crate::channel::Child;

const SCHED_DEADLINE: u32 = 6;
/// The least and the most that a deadline scheduler can count with.
const RUNTIME_NS_MIN: u64 = 1 << 10;
const RUNTIME_NS_MAX: u64 = i64::MAX.cast_unsigned();
const PER_LINUX32: u32 = 8;

/// What a process asks for, in the kernel's numbers.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Tuning {
    scheduler: Option<SchedulerAttributes>,
    io_priority: Option<u32>,
    personality: Option<u32>,
    /// Flags of the personality that nobody defines.
    personality_flags: Vec<String>,
    memory: Option<(i32, Mask)>,
}

impl Tuning {
    pub(crate) fn of(process: &Process) -> Result<Self, LaunchError> {
        Ok(Self {
            scheduler: process.scheduler().as_ref().map(scheduler).transpose()?,
            io_priority: process.io_priority().as_ref().map(io_priority).transpose()?,
            ..Self::default()
        })
    }

    /// What belongs to the whole container.
    pub(crate) fn add(
        &mut self,
        personality: Option<&LinuxPersonality>,
        memory: Option<&LinuxMemoryPolicy>,
    ) -> Result<(), LaunchError> {
        self.personality = personality.map(|personality| match personality.domain() {
            LinuxPersonalityDomain::PerLinux => 0,
            LinuxPersonalityDomain::PerLinux32 => PER_LINUX32,
        });
        self.personality_flags = personality.and_then(|p| p.flags().clone()).unwrap_or_default();
        self.memory = memory.map(memory_policy).transpose()?;
        Ok(())
    }

    pub(crate) fn apply(&self, channel: &Child) -> Result<(), LaunchError> {
        if let Some(attributes) = &self.scheduler {
            schedule::set_scheduler(attributes)
                .map_err(|error| match (attributes.policy, error.raw_os_error()) {
                    (SCHED_DEADLINE, Some(libc::EPERM)) => {
                        let reason = "the kernel refuses SCHED_DEADLINE: process scheduler can't be used together \
                                      with AllowedCPUs, and needs CAP_SYS_NICE";
                        LaunchError::spec("process.scheduler", reason)
                    }
                    _ => LaunchError::step("set the scheduler of process.scheduler", error),
                })?;
        }
        if let Some(priority) = self.io_priority {
            schedule::set_io_priority(priority)
                .map_err(|error| LaunchError::step("set the priority of process.ioPriority", error))?;
        }
        if let Some(persona) = self.personality {
            schedule::set_personality(persona)
                .map_err(|error| LaunchError::step("set the personality of linux.personality", error))?;
        }
        if !self.personality_flags.is_empty() {
            let flags = self.personality_flags.join(", ");
            channel.warn(&format!("linux.personality.flags: no flags are defined, so not these: {flags}"));
        }
        if let Some((mode, nodes)) = &self.memory {
            schedule::set_memory_policy(*mode, nodes)
                .map_err(|error| LaunchError::step("set the policy of linux.memoryPolicy", error))?;
        }
        Ok(())
    }
}

/// Writes flags as the types of `oci-spec` read them, which have two of them by other names than the
/// specification.
pub(crate) fn respell_flags(process: &mut serde_json::Value) {
    let flags = process.pointer_mut("/scheduler/flags").and_then(serde_json::Value::as_array_mut);
    for flag in flags.into_iter().flatten() {
        match flag.as_str() {
            Some("SCHED_FLAG_RESET_ON_FORK") => *flag = "SCHED_RESET_ON_FORK".into(),
            Some("SCHED_FLAG_DL_OVERRUN") => *flag = "SCHED_FLAG_D_L_OVERRUN".into(),
            _ => {}
        }
    }
}

/// CPUs of an exec: `initial` before it joins the container's cgroups, `last` afterwards.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Affinity {
    initial: Option<Mask>,
    last: Option<Mask>,
}

impl Affinity {
    pub(crate) fn of(wanted: Option<&ExecCPUAffinity>) -> Result<Self, LaunchError> {
        let Some(wanted) = wanted else { return Ok(Self::default()) };
        let mask = |list: &Option<String>, field: &str| match list.as_deref() {
            None | Some("") => Ok(None),
            Some(list) => cpus(list, &format!("process.execCPUAffinity.{field}")).map(Some),
        };
        Ok(Self {
            initial: mask(wanted.initial(), "initial")?,
            last: mask(wanted.cpu_affinity_final(), "final")?,
        })
    }

    pub(crate) fn apply_initial(&self) -> Result<(), LaunchError> {
        match &self.initial {
            Some(mask) => schedule::set_affinity(mask)
                .map_err(|error| LaunchError::step("set the CPUs of process.execCPUAffinity.initial", error)),
            None => Ok(()),
        }
    }

    /// Where neither is asked for, the caller's own binding must not stay.
    pub(crate) fn apply_final(&self) -> Result<(), LaunchError> {
        match (&self.initial, &self.last) {
            (_, Some(mask)) => schedule::set_affinity(mask)
                .map_err(|error| LaunchError::step("set the CPUs of process.execCPUAffinity.final", error)),
            (Some(_), None) => Ok(()),
            (None, None) => coracle_sys::process::reset_cpu_affinity()
                .map_err(|error| LaunchError::step("reset the CPU affinity", error)),
        }
    }
}

fn cpus(list: &str, field: &str) -> Result<Mask, LaunchError> {
    match Mask::parse(list) {
        Some(mask) if !mask.is_empty() => Ok(mask),
        _ => {
            let most = schedule::MASK_BITS_MAX;
            let what =
                if field.starts_with("linux.memoryPolicy") { "invalid memory policy nodes: " } else { "" };
            let reason = format!("{what}{list:?} is no list of numbers up to {most} such as 0-3,7");
            Err(LaunchError::spec(field, reason))
        }
    }
}

fn scheduler(wanted: &Scheduler) -> Result<SchedulerAttributes, LaunchError> {
    use LinuxSchedulerPolicy as Policy;
    let field = |name: &str| format!("process.scheduler.{name}");
    let (nice, priority) = (wanted.nice().unwrap_or(0), wanted.priority().unwrap_or(0));
    let policy = match *wanted.policy() {
        Policy::SchedOther => 0,
        Policy::SchedFifo => 1,
        Policy::SchedRr => 2,
        Policy::SchedBatch => 3,
        Policy::SchedIdle => 5,
        Policy::SchedDeadline => SCHED_DEADLINE,
        Policy::SchedIso => {
            let reason = "Linux has never had SCHED_ISO: SCHED_OTHER, SCHED_FIFO, SCHED_RR, SCHED_BATCH, \
                          SCHED_IDLE and SCHED_DEADLINE are allowed";
            return Err(LaunchError::spec(field("policy"), reason));
        }
    };
    if matches!(policy, 0 | 3) && !(-20..=19).contains(&nice) {
        return Err(LaunchError::spec(
            field("nice"),
            format!("invalid scheduler.nice: {nice} is not within -20 and 19"),
        ));
    }
    if priority != 0 && !matches!(policy, 1 | 2) {
        return Err(LaunchError::spec(
            field("priority"),
            "scheduler.priority can only be specified for SchedFIFO or SchedRR policy",
        ));
    }
    let priority = u32::try_from(priority)
        .map_err(|_negative| LaunchError::spec(field("priority"), "it is negative; 1 to 99 are allowed"))?;
    let deadline =
        [("runtime", wanted.runtime()), ("deadline", wanted.deadline()), ("period", wanted.period())];
    if let Some((name, _)) =
        deadline.iter().find(|(_, value)| policy != SCHED_DEADLINE && value.unwrap_or(0) != 0)
    {
        return Err(LaunchError::spec(
            field(name),
            "scheduler runtime/deadline/period can only be specified for SchedDeadline policy",
        ));
    }
    if policy == SCHED_DEADLINE {
        check_deadline(wanted)?;
    }
    Ok(SchedulerAttributes {
        policy,
        flags: wanted.flags().iter().flatten().fold(0, |flags, flag| flags | scheduler_flag(*flag)),
        nice,
        priority,
        runtime: wanted.runtime().unwrap_or(0),
        deadline: wanted.deadline().unwrap_or(0),
        period: wanted.period().unwrap_or(0),
        ..SchedulerAttributes::default()
    })
}

/// What the kernel would refuse without a word on what is wrong. Source: sched_setattr(2), sched(7).
fn check_deadline(wanted: &Scheduler) -> Result<(), LaunchError> {
    let refused = |name: &str, reason: &str| {
        let reason = format!("sched_setattr: `SCHED_DEADLINE` {reason}");
        Err(LaunchError::spec(format!("process.scheduler.{name}"), reason))
    };
    let &Some(runtime) = wanted.runtime() else { return refused("runtime", "requires `runtime`") };
    let &Some(deadline) = wanted.deadline() else { return refused("deadline", "requires `deadline`") };
    // Without a period it is the deadline.
    let period = wanted.period().filter(|period| *period != 0).unwrap_or(deadline);
    if runtime == 0 {
        return refused("runtime", "runtime must be greater than 0 ns");
    }
    if !(RUNTIME_NS_MIN..=RUNTIME_NS_MAX).contains(&runtime) {
        let range = format!("runtime {runtime} must be between {RUNTIME_NS_MIN} and {RUNTIME_NS_MAX} ns");
        return refused("runtime", &range);
    }
    if runtime > deadline {
        return refused("runtime", &format!("runtime {runtime} must be <= deadline {deadline}"));
    }
    if deadline > period {
        return refused("deadline", &format!("deadline {deadline} must be <= period {period}"));
    }
    Ok(())
}

fn scheduler_flag(flag: LinuxSchedulerFlag) -> u64 {
    match flag {
        LinuxSchedulerFlag::SchedResetOnFork => 0x01,
        LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
        LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
        LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
        LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
        LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
        LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
    }
}

fn io_priority(wanted: &LinuxIOPriority) -> Result<u32, LaunchError> {
    let class = match wanted.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    match u32::try_from(wanted.priority()) {
        Ok(level @ 0..=7) => Ok(class << 13 | level),
        _ => {
            let reason = format!("{} is not within 0 and 7", wanted.priority());
            Err(LaunchError::spec("process.ioPriority.priority", reason))
        }
    }
}

fn memory_policy(wanted: &LinuxMemoryPolicy) -> Result<(i32, Mask), LaunchError> {
    use MemoryPolicyModeType as Mode;
    let nodes = match wanted.nodes().as_deref().unwrap_or("") {
        "" => Mask::default(),
        list => cpus(list, "linux.memoryPolicy.nodes")?,
    };
    let mode = match wanted.mode() {
        Mode::MpolDefault => 0,
        Mode::MpolPreferred => 1,
        Mode::MpolBind => 2,
        Mode::MpolInterleave => 3,
        Mode::MpolLocal => 4,
        Mode::MpolPreferredMany => 5,
        Mode::MpolWeightedInterleave => 6,
    };
    let field = "linux.memoryPolicy.nodes";
    match (mode, nodes.is_empty()) {
        (0 | 4, false) => {
            let reason =
                format!("memory policy mode requires 0 nodes but got {}: {}", nodes.len(), wanted.mode());
            return Err(LaunchError::spec(field, reason));
        }
        (2 | 3 | 5 | 6, true) => {
            let reason =
                format!("memory policy mode requires at least one node but got 0: {}", wanted.mode());
            return Err(LaunchError::spec(field, reason));
        }
        _ => {}
    }
    let flags = wanted.flags().iter().flatten().fold(0, |flags, flag| {
        flags
            | match flag {
                MemoryPolicyFlagType::MpolFNumaBalancing => 1 << 13,
                MemoryPolicyFlagType::MpolFRelativeNodes => 1 << 14,
                MemoryPolicyFlagType::MpolFStaticNodes => 1 << 15,
            }
    });
    Ok((mode | flags, nodes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> Result<Tuning, String> {
        let mut process = serde_json::to_value(Process::default()).unwrap();
        let more: serde_json::Map<String, serde_json::Value> = serde_json::from_str(json).unwrap();
        process.as_object_mut().unwrap().extend(more);
        let process: Process = serde_json::from_value(process).unwrap();
        Tuning::of(&process).map_err(|error| error.to_string())
    }

    #[test]
    fn a_scheduler_is_told_in_the_kernels_numbers() {
        let tuning = of(r#"{"scheduler":{"policy":"SCHED_DEADLINE","flags":["SCHED_RESET_ON_FORK"],
            "runtime":1024,"deadline":2000,"period":3000}}"#)
        .unwrap();
        let scheduler = tuning.scheduler.unwrap();
        assert_eq!((scheduler.policy, scheduler.flags, scheduler.period), (6, 1, 3000));
        let tuning = of(r#"{"scheduler":{"policy":"SCHED_FIFO","priority":7}}"#).unwrap();
        assert_eq!(tuning.scheduler.unwrap().priority, 7);
    }

    #[test]
    fn flags_are_read_in_the_words_of_the_specification() {
        let mut process = serde_json::json!({"scheduler": {"policy": "SCHED_OTHER", "flags": [
            "SCHED_FLAG_RESET_ON_FORK", "SCHED_FLAG_DL_OVERRUN", "SCHED_FLAG_RECLAIM"]}});
        respell_flags(&mut process);
        let scheduler: Scheduler = serde_json::from_value(process["scheduler"].clone()).unwrap();
        assert_eq!(super::scheduler(&scheduler).unwrap().flags, 7);
    }

    #[test]
    fn what_a_policy_does_not_have_is_refused_by_its_field() {
        for (json, field) in [
            (r#"{"policy":"SCHED_OTHER","nice":20}"#, "process.scheduler.nice"),
            (r#"{"policy":"SCHED_BATCH","priority":1}"#, "process.scheduler.priority"),
            (r#"{"policy":"SCHED_FIFO","priority":-1}"#, "process.scheduler.priority"),
            (r#"{"policy":"SCHED_RR","period":1}"#, "process.scheduler.period"),
            (r#"{"policy":"SCHED_ISO"}"#, "process.scheduler.policy"),
            (r#"{"policy":"SCHED_DEADLINE","deadline":2000}"#, "requires `runtime`"),
            (r#"{"policy":"SCHED_DEADLINE","runtime":2000}"#, "requires `deadline`"),
            (r#"{"policy":"SCHED_DEADLINE","runtime":0,"deadline":2000}"#, "runtime must be greater than 0"),
            (r#"{"policy":"SCHED_DEADLINE","runtime":1023,"deadline":2000}"#, "must be between 1024 and"),
            (
                r#"{"policy":"SCHED_DEADLINE","runtime":3000,"deadline":2000}"#,
                "3000 must be <= deadline 2000",
            ),
            (
                r#"{"policy":"SCHED_DEADLINE","runtime":1500,"deadline":2000,"period":1900}"#,
                "2000 must be <= period 1900",
            ),
        ] {
            let error = of(&format!(r#"{{"scheduler":{json}}}"#)).unwrap_err();
            assert!(error.contains(field), "{error}");
        }
    }

    #[test]
    fn a_priority_of_input_and_output_has_eight_levels() {
        let with = |class: &str, level: i32| {
            of(&format!(r#"{{"ioPriority":{{"class":"IOPRIO_CLASS_{class}","priority":{level}}}}}"#))
        };
        assert_eq!(with("RT", 0).unwrap().io_priority, Some(1 << 13));
        assert_eq!(with("IDLE", 7).unwrap().io_priority, Some(3 << 13 | 7));
        assert!(with("BE", 8).unwrap_err().contains("process.ioPriority.priority"));
        assert!(with("BE", -1).is_err());
    }

    #[test]
    fn memory_policies_take_the_nodes_that_they_need() {
        let with = |json: &str| {
            let policy: LinuxMemoryPolicy = serde_json::from_str(json).unwrap();
            memory_policy(&policy).map(|(mode, _)| mode).map_err(|error| error.to_string())
        };
        assert_eq!(
            with(r#"{"mode":"MPOL_BIND","nodes":"0","flags":["MPOL_F_STATIC_NODES"]}"#),
            Ok(2 | 1 << 15)
        );
        assert_eq!(with(r#"{"mode":"MPOL_LOCAL"}"#), Ok(4));
        assert_eq!(with(r#"{"mode":"MPOL_PREFERRED","nodes":""}"#), Ok(1));
        for wrong in [
            r#"{"mode":"MPOL_BIND"}"#,
            r#"{"mode":"MPOL_DEFAULT","nodes":"0"}"#,
            r#"{"mode":"MPOL_INTERLEAVE","nodes":"x"}"#,
        ] {
            assert!(with(wrong).unwrap_err().contains("linux.memoryPolicy.nodes"), "{wrong}");
        }
    }

    #[test]
    fn an_affinity_is_read_from_both_fields() {
        let wanted: ExecCPUAffinity = serde_json::from_str(r#"{"initial":"0-1","final":"1"}"#).unwrap();
        let affinity = Affinity::of(Some(&wanted)).unwrap();
        assert_eq!((affinity.initial, affinity.last), (Mask::parse("0-1"), Mask::parse("1")));
        assert_eq!(Affinity::of(None).unwrap(), Affinity::default());
        let wanted: ExecCPUAffinity = serde_json::from_str(r#"{"final":"99999"}"#).unwrap();
        assert!(Affinity::of(Some(&wanted)).unwrap_err().to_string().contains("execCPUAffinity.final"));
    }
}
