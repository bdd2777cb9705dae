//! The program, emulated as the kernel would run it, against a direct interpretation of the rules.

use std::time::Duration;

use coracle_sys::seccomp::Instruction;

use super::abi::X32_BIT;
use super::profile::{Comparison, Policy, Profile, RET_ALLOW, RET_ERRNO, RET_NOTIFY};
use super::*;

const ENOSYS: u32 = RET_ERRNO | 38;

struct Call {
    arch: u32,
    number: u32,
    args: [u64; 6],
}

impl Call {
    fn native(number: u32, args: [u64; 6]) -> Self {
        Self::by(Abi::NATIVE, number, args)
    }

    fn by(abi: Abi, number: u32, args: [u64; 6]) -> Self {
        let number = if abi == Abi::X32 { number | X32_BIT } else { number };
        Self { arch: abi.audit(), number, args }
    }

    fn load(&self, offset: u32) -> u32 {
        match offset {
            0 => self.number,
            4 => self.arch,
            16..64 => {
                let arg = self.args[usize::try_from((offset - 16) / 8).unwrap()];
                let shift = if (offset - 16) % 8 == 4 { 32 } else { 0 };
                u32::try_from(arg >> shift & 0xffff_ffff).unwrap()
            }
            _ => panic!("load of {offset}"),
        }
    }
}

/// The value a program returns; panics where the kernel's verifier would refuse it.
fn emulate(program: &[Instruction], call: &Call) -> u32 {
    let (mut at, mut a) = (0_usize, 0_u32);
    loop {
        let i = program[at];
        at += 1;
        let jump = |holds: bool| usize::from(if holds { i.jt } else { i.jf });
        match i.code {
            0x20 => a = call.load(i.k),
            0x54 => a &= i.k,
            0x06 => return i.k,
            0x05 => at += usize::try_from(i.k).unwrap(),
            0x15 => at += jump(a == i.k),
            0x25 => at += jump(a > i.k),
            0x35 => at += jump(a >= i.k),
            code => panic!("code {code:#x}"),
        }
    }
}

/// What the rules say, read one by one.
fn interpret(profile: &Profile, call: &Call) -> u32 {
    let is_x32 = call.arch == Abi::X32.audit() && call.number >= X32_BIT;
    let is_its = |policy: &&Policy| policy.abi.audit() == call.arch && (policy.abi == Abi::X32) == is_x32;
    let policy = profile.policies.iter().find(is_its);
    let Some(policy) = policy else { return profile.foreign };
    let number = if is_x32 { call.number & !X32_BIT } else { call.number };
    let holds = |rule: &&super::profile::Rule| {
        rule.number == number
            && rule.conditions.iter().all(|condition| {
                let arg = call.args[usize::try_from(condition.argument).unwrap()];
                match condition.comparison {
                    Comparison::Equal(v) => arg == v,
                    Comparison::NotEqual(v) => arg != v,
                    Comparison::Less(v) => arg < v,
                    Comparison::LessOrEqual(v) => arg <= v,
                    Comparison::Greater(v) => arg > v,
                    Comparison::GreaterOrEqual(v) => arg >= v,
                    Comparison::MaskedEqual(mask, v) => arg & mask == v,
                }
            })
    };
    let conditional = policy.rules.iter().filter(|rule| !rule.conditions.is_empty()).find(holds);
    let unconditional = policy.rules.iter().rev().filter(|rule| rule.conditions.is_empty()).find(holds);
    if let Some(rule) = conditional.or(unconditional) {
        return rule.result;
    }
    let named = policy.rules.iter().any(|rule| rule.number == number);
    // ALLOW, LOG and TRACE let through what the profile cannot have known.
    let permissive = [0x7fff, 0x7ffc, 0x7ff0].contains(&(policy.default >> 16));
    match policy.highest {
        Some(highest) if number > highest && !permissive && !named => ENOSYS,
        _ => policy.default,
    }
}

/// Every value at which a comparison changes its mind, and its neighbours in both words.
fn boundaries(policy: &Policy) -> Vec<u64> {
    let mut values = vec![0, 1, u64::MAX, 1 << 32, (1 << 32) - 1];
    for condition in policy.rules.iter().flat_map(|rule| &rule.conditions) {
        let v = match condition.comparison {
            Comparison::Equal(v)
            | Comparison::NotEqual(v)
            | Comparison::Less(v)
            | Comparison::LessOrEqual(v)
            | Comparison::Greater(v)
            | Comparison::GreaterOrEqual(v) => v,
            Comparison::MaskedEqual(mask, v) => {
                values.extend([mask, !mask, v | !mask, mask & mask.wrapping_neg()]);
                v
            }
        };
        values.extend([v, v.wrapping_sub(1), v.wrapping_add(1), v ^ 1 << 32, v ^ 1 << 63]);
    }
    values.sort_unstable();
    values.dedup();
    values
}

fn check(profile: &Profile) -> usize {
    let program = compile::compile(profile).unwrap();
    for policy in &profile.policies {
        check_policy(profile, policy, &program);
    }
    let ours = |arch: u32| profile.policies.iter().any(|policy| policy.abi.audit() == arch);
    for arch in
        [0x4000_0003, 0x4000_0028, 0xc000_003e, 0xc000_00b7, 0].into_iter().filter(|arch| !ours(*arch))
    {
        assert_eq!(
            emulate(&program, &Call { arch, number: 1, args: [0; 6] }),
            profile.foreign,
            "a foreign ABI"
        );
    }
    program.len()
}

fn check_policy(profile: &Profile, policy: &Policy, program: &[Instruction]) {
    let with_args: std::collections::BTreeSet<u32> =
        policy.rules.iter().filter(|r| !r.conditions.is_empty()).map(|r| r.number).collect();
    let boundaries = boundaries(policy);
    let highest = policy.highest.unwrap_or(0);
    let edge = [highest + 1, highest + 2, 0x3fff_ffff, 0x4000_0000, 0x4000_0001, 0x4000_0200, u32::MAX];
    let beyond = policy.rules.iter().map(|rule| rule.number).filter(|number| *number > highest);
    for number in (0..=highest).chain(edge).chain(beyond) {
        let values: &[u64] = if with_args.contains(&number) { &boundaries } else { &[0, u64::MAX] };
        for first in values {
            for second in values {
                let call = Call::by(policy.abi, number, [*first, *second, *first, *second, *first, *second]);
                assert_eq!(
                    emulate(program, &call),
                    interpret(profile, &call),
                    "{:?}: call {number} with {first:#x}, {second:#x}",
                    policy.abi
                );
            }
        }
    }
}

fn number(name: &str) -> u32 {
    Abi::NATIVE.number_of(name).unwrap()
}

fn read(json: &str, bounding: u64) -> Result<Profile, LaunchError> {
    profile::read(json, bounding, &[Abi::NATIVE])
}

fn spec(json: &str) -> LinuxSeccomp {
    serde_json::from_str(json).unwrap()
}

fn docker_caps() -> u64 {
    crate::caps::mask(Some(&crate::defaults::capabilities()))
}

#[test]
fn dockers_profile_means_the_same_as_a_program() {
    let policy = read(DEFAULT_PROFILE, docker_caps()).unwrap();
    let n = check(&policy);
    assert!(n < 250, "{n} instructions");
    check(&read(DEFAULT_PROFILE, u64::MAX).unwrap());
    check(&read(DEFAULT_PROFILE, 0).unwrap());
}

#[test]
fn dockers_profile_denies_what_it_is_known_for() {
    let filter = filter(SeccompSource::Default, None, docker_caps()).unwrap().unwrap();
    let verdict = |name: &str, args| emulate(&filter.program, &Call::native(number(name), args));
    let eperm = RET_ERRNO | 1;
    for name in ["mount", "bpf", "keyctl", "unshare", "setns", "reboot", "init_module", "open_by_handle_at"] {
        assert_eq!(verdict(name, [0; 6]), eperm, "{name}");
    }
    for name in ["read", "openat", "execve", "chroot", "capset", "futex"] {
        assert_eq!(verdict(name, [0; 6]), RET_ALLOW, "{name}");
    }
    assert_eq!(verdict("clone3", [0; 6]), ENOSYS);
    assert_eq!(verdict("clone", [0x1200011, 0, 0, 0, 0, 0]), RET_ALLOW);
    assert_eq!(verdict("clone", [0x1000_0000, 0, 0, 0, 0, 0]), eperm, "a new user namespace");
    let (inet, alg, vsock) = (2, 38, 40);
    assert_eq!(verdict("socket", [inet, 0, 0, 0, 0, 0]), RET_ALLOW);
    assert_eq!(verdict("socket", [alg, 0, 0, 0, 0, 0]), eperm);
    assert_eq!(verdict("socket", [vsock, 0, 0, 0, 0, 0]), eperm);
}

#[test]
fn capabilities_open_what_they_stand_for() {
    let with = |caps| filter(SeccompSource::Default, None, caps).unwrap().unwrap();
    let call = |name| Call::native(number(name), [0; 6]);
    assert_eq!(emulate(&with(crate::caps::SYS_ADMIN).program, &call("mount")), RET_ALLOW);
    assert_eq!(emulate(&with(crate::caps::SYS_ADMIN).program, &call("clone3")), RET_ALLOW);
    assert_ne!(emulate(&with(0).program, &call("chroot")), RET_ALLOW);
}

#[test]
fn every_operator_and_their_combinations_mean_the_same_as_a_program() {
    let ops = ["EQ", "NE", "LT", "LE", "GT", "GE", "MASKED_EQ"];
    let values = [0_u64, 7, 0xffff_ffff, 0x1_0000_0000, 0x7_0000_0003, u64::MAX];
    for op in ops {
        for other in ops {
            for value in values {
                let json = format!(
                    r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
                    {{"names":["read","write"],"action":"SCMP_ACT_ALLOW","args":[
                        {{"index":0,"value":{value},"valueTwo":3,"op":"SCMP_CMP_{op}"}},
                        {{"index":1,"value":5,"valueTwo":1,"op":"SCMP_CMP_{other}"}}]}},
                    {{"names":["write"],"action":"SCMP_ACT_TRAP","args":[
                        {{"index":1,"value":{value},"op":"SCMP_CMP_{other}"}}]}},
                    {{"names":["write"],"action":"SCMP_ACT_LOG"}}]}}"#
                );
                check(&read(&json, 0).unwrap());
            }
        }
    }
}

#[test]
fn subtrees_longer_than_a_jump_are_reached() {
    let rules: Vec<String> = (0..40)
        .flat_map(|value| {
            ["read", "write", "socket", "ioctl"].map(|name| {
                format!(
                    r#"{{"names":["{name}"],"action":"SCMP_ACT_ALLOW",
                        "args":[{{"index":0,"value":{},"op":"SCMP_CMP_EQ"}}]}}"#,
                    value * 3
                )
            })
        })
        .collect();
    let json = format!(r#"{{"defaultAction":"SCMP_ACT_KILL","syscalls":[{}]}}"#, rules.join(","));
    assert!(check(&read(&json, 0).unwrap()) > 600);
}

#[test]
fn both_forms_give_the_same_verdicts() {
    let caps = crate::defaults::capabilities();
    let resolved = resolve(DEFAULT_PROFILE, &caps).unwrap();
    let from_spec = profile::of_spec(&resolved).unwrap();
    let default = read(DEFAULT_PROFILE, docker_caps()).unwrap();
    assert_eq!(from_spec.policies[0], default.policies[0]);
    assert!(from_spec.policies.len() > 1, "the profile's own map of architectures counts");
    check(&from_spec);
}

#[test]
fn an_abi_that_is_listed_has_its_own_numbers_and_others_kill() {
    let json = |archs: &str| {
        format!(
            r#"{{"defaultAction":"SCMP_ACT_ALLOW","architectures":[{archs}],"syscalls":[
            {{"names":["mkdir","mkdirat","socket","msgget","arm_nosuch"],"action":"SCMP_ACT_ERRNO","errnoRet":7}},
            {{"names":["ioctl"],"action":"SCMP_ACT_ERRNO","errnoRet":8,
              "args":[{{"index":1,"value":18446744073709551615,"op":"SCMP_CMP_EQ"}}]}}]}}"#
        )
    };
    let all = profile::of_spec(&spec(&json(
        r#""SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32","SCMP_ARCH_ARM","SCMP_ARCH_AARCH64""#,
    )))
    .unwrap();
    check(&all);
    let none = profile::of_spec(&spec(&json(r#""SCMP_ARCH_S390X""#))).unwrap();
    check(&none);
    assert_eq!((none.policies.len(), none.foreign), (1, 0));
    if cfg!(target_arch = "x86_64") {
        let program = compile::compile(&all).unwrap();
        let verdict = |abi, number, args| emulate(&program, &Call::by(abi, number, args));
        let denied = RET_ERRNO | 7;
        assert_eq!(verdict(Abi::X86, 39, [0; 6]), denied, "mkdir of i386");
        assert_eq!(verdict(Abi::X86, 83, [0; 6]), RET_ALLOW, "83 is mkdir of x86_64 only");
        assert_eq!(verdict(Abi::X86, 359, [0; 6]), denied, "socket");
        assert_eq!(verdict(Abi::X86, 102, [1, 0, 0, 0, 0, 0]), denied, "socketcall(SYS_SOCKET)");
        assert_eq!(verdict(Abi::X86, 102, [2, 0, 0, 0, 0, 0]), RET_ALLOW, "socketcall(SYS_BIND)");
        assert_eq!(verdict(Abi::X86, 117, [13, 0, 0, 0, 0, 0]), denied, "ipc(MSGGET)");
        assert_eq!(
            verdict(Abi::X86, 54, [0, 0xffff_ffff, 0, 0, 0, 0]),
            RET_ERRNO | 8,
            "32 bits are all there is"
        );
        assert_eq!(verdict(Abi::X32, 83, [0; 6]), denied, "mkdir of x32");
        assert_eq!(verdict(Abi::X32, 514, [0, u64::MAX, 0, 0, 0, 0]), RET_ERRNO | 8, "ioctl of x32");
        let one = compile::compile(&none).unwrap();
        assert_eq!(emulate(&one, &Call::by(Abi::X86, 3, [0; 6])), 0, "i386 is not listed");
        assert_eq!(emulate(&one, &Call::by(Abi::X32, 0, [0; 6])), 0, "x32 neither");
    }
}

#[test]
fn images_of_32_bit_programs_get_the_profile_for_their_calls() {
    let filter = filter(SeccompSource::DefaultOf32Bit, None, docker_caps()).unwrap().unwrap();
    let verdict = |name: &str| {
        let number = Abi::NARROW.number_of(name).unwrap();
        emulate(&filter.program, &Call::by(Abi::NARROW, number, [0; 6]))
    };
    assert_eq!((verdict("read"), verdict("clock_gettime64")), (RET_ALLOW, RET_ALLOW));
    assert_eq!((verdict("mount"), verdict("clone3")), (RET_ERRNO | 1, ENOSYS));
    check(&profile::read(DEFAULT_PROFILE, docker_caps(), &[Abi::NATIVE, Abi::NARROW]).unwrap());
}

#[test]
fn numbers_beyond_the_profile_do_not_exist_unless_all_is_let_through() {
    for (default, beyond) in [
        ("ERRNO", ENOSYS),
        ("KILL", ENOSYS),
        ("KILL_PROCESS", ENOSYS),
        ("TRAP", ENOSYS),
        ("TRACE", 0x7ff0_0001),
        ("LOG", 0x7ffc_0000),
        ("ALLOW", RET_ALLOW),
    ] {
        let json = format!(
            r#"{{"defaultAction":"SCMP_ACT_{default}","syscalls":[{{"names":["read"],"action":"SCMP_ACT_ALLOW"}}]}}"#
        );
        let profile = profile::of_spec(&spec(&json)).unwrap();
        check(&profile);
        let program = compile::compile(&profile).unwrap();
        assert_eq!(emulate(&program, &Call::native(10_000, [0; 6])), beyond, "{default}");
    }
    let nothing_named = profile::of_spec(&spec(r#"{"defaultAction":"SCMP_ACT_ERRNO"}"#)).unwrap();
    check(&nothing_named);
}

#[test]
fn a_listener_needs_a_socket_and_may_not_ask_for_what_hands_it_over() {
    let refused = |json: &str| filter(SeccompSource::FromSpec, Some(&spec(json)), 0).unwrap_err().to_string();
    let rule = |name: &str| format!(r#""syscalls":[{{"names":["{name}"],"action":"SCMP_ACT_NOTIFY"}}]"#);
    let json = format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW",{}}}"#, rule("mkdir"));
    assert!(refused(&json).contains("linux.seccomp.listenerPath"));
    let json = format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/x",{}}}"#, rule("write"));
    assert!(refused(&json).contains("write"));
    assert!(refused(r#"{"defaultAction":"SCMP_ACT_NOTIFY","listenerPath":"/x"}"#).contains("default action"));
    let json = format!(
        r#"{{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/x","listenerMetadata":"m",
        "flags":["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"],{}}}"#,
        rule("mkdir")
    );
    let filter = filter(SeccompSource::FromSpec, Some(&spec(&json)), 0).unwrap().unwrap();
    assert_eq!(filter.flags, FLAG_WAIT_KILLABLE);
    assert_eq!(filter.listener.unwrap().metadata.as_deref(), Some("m"));
    assert_eq!(emulate(&filter.program, &Call::native(number("mkdirat"), [0; 6])), RET_ALLOW);
    if cfg!(target_arch = "x86_64") {
        assert_eq!(emulate(&filter.program, &Call::native(number("mkdir"), [0; 6])), RET_NOTIFY);
    }
}

#[test]
fn conditions_on_one_argument_are_alternatives() {
    let json = r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["personality"],"action":"SCMP_ACT_ALLOW",
        "args":[{"index":0,"value":0,"op":"SCMP_CMP_EQ"},{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]}]}"#;
    let profile = profile::of_spec(&spec(json)).unwrap();
    check(&profile);
    let program = compile::compile(&profile).unwrap();
    let verdict = |value| emulate(&program, &Call::native(number("personality"), [value, 0, 0, 0, 0, 0]));
    assert_eq!((verdict(0), verdict(8), verdict(4)), (RET_ALLOW, RET_ALLOW, RET_ERRNO | 1));
}

#[test]
fn an_allowing_default_does_not_turn_into_enosys() {
    let json = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
        {"names":["mkdir","nosuchcall"],"action":"SCMP_ACT_ERRNO","errnoRet":5}]}"#;
    let policy = read(json, 0).unwrap();
    check(&policy);
    let program = compile::compile(&policy).unwrap();
    assert_eq!(emulate(&program, &Call::native(number("mkdirat"), [0; 6])), RET_ALLOW);
}

#[test]
fn what_is_no_profile_is_refused_with_a_reason() {
    let refused = |json: &str| read(json, 0).unwrap_err().to_string();
    assert!(refused("{}").contains("defaultAction"));
    assert!(refused(r#"{"defaultAction":"SCMP_ACT_PANIC"}"#).contains("SCMP_ACT_PANIC"));
    let args = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_KILL",
        "args":[{"index":6,"value":0,"op":"SCMP_CMP_EQ"}]}]}"#;
    assert!(refused(args).contains("six arguments"));
}

#[test]
fn names_of_the_default_profile_are_known_except_those_of_other_architectures() {
    // 450 names, of which this architecture lacks the 32-bit and foreign ones.
    let policy = read(DEFAULT_PROFILE, u64::MAX).unwrap();
    let known: std::collections::BTreeSet<u32> =
        policy.policies[0].rules.iter().map(|rule| rule.number).collect();
    let (table, least) =
        if cfg!(target_arch = "x86_64") { (syscalls::X86_64, 330) } else { (syscalls::AARCH64, 290) };
    assert!(known.len() > least, "{}", known.len());
    assert!(table.is_sorted_by(|a, b| a.0 < b.0), "look-up is by binary search");
    for table in [compat::X86, compat::X32_ONLY, compat::ARM] {
        assert!(table.is_sorted_by(|a, b| a.0 < b.0), "look-up is by binary search");
    }
}

#[test]
fn the_default_filter_is_made_fast_enough_for_every_start() {
    let made = (0..20)
        .map(|_| {
            let before = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
            filter(SeccompSource::Default, None, docker_caps()).unwrap();
            let after = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
            Duration::try_from(after - before).unwrap()
        })
        .min()
        .unwrap();
    println!("default filter: {made:?}");
    // Without optimisation and on a loaded machine; a release build takes a tenth.
    assert!(made < Duration::from_millis(20), "{made:?}");
}
