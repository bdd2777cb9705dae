//! Which devices a container may use: written as rules on cgroup v1, compiled to a program on v2.
//!
//! The configuration's list means what the v1 files do with it: a rule for all devices sets the default and
//! forgets the rest, later rules are exceptions from the default. [`Policy`] keeps that state; the program asks
//! its exceptions in turn. The nodes that every container has are always allowed, as runc does.
//!
//! Source: Linux `Documentation/admin-guide/cgroup-v1/devices.rst`; OCI `config-linux.md#allowed-device-list`.

use std::os::fd::AsFd;
use std::path::Path;

use coracle_sys::bpf::{self, Instruction};
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};
use rustix::fs::{Mode, OFlags};

use super::{Cgroup, failed, is_privileged};
use crate::LaunchError;

const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MKNOD | READ | WRITE;
/// Rules of one container: a program of nine instructions each stays far below what any kernel verifies.
const RULES_MAX: usize = 400;

/// One entry of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    /// `None` is every device.
    kind: Option<Kind>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Block,
    Character,
}

impl Cgroup {
    /// `replace`: there may be rules already, of a container that runs.
    pub(super) fn apply_devices(
        &self,
        rules: &[LinuxDeviceCgroup],
        replace: bool,
    ) -> Result<(), LaunchError> {
        let mut rules = rules.iter().map(Rule::of).collect::<Result<Vec<_>, _>>()?;
        rules.extend(always_allowed());
        if rules.len() > RULES_MAX {
            let reason = format!("more than {RULES_MAX} rules");
            return Err(LaunchError::spec("linux.resources.devices", reason));
        }
        if let Some(dir) = self.controller("devices") {
            return write_rules(dir, &rules);
        }
        match &self.v2 {
            Some(dir) => attach_program(dir, &Policy::of(&rules), replace),
            None => Err(LaunchError::unsupported("device rules without a devices cgroup")),
        }
    }
}

impl Rule {
    fn of(rule: &LinuxDeviceCgroup) -> Result<Self, LaunchError> {
        let number = |n: Option<i64>| match n {
            Some(n) if n >= 0 => i32::try_from(n).map(Some).map_err(|_too_large| {
                LaunchError::spec("linux.resources.devices", format!("there is no device number {n}"))
            }),
            _ => Ok(None),
        };
        let mut access = 0;
        let text = rule.access().as_deref().filter(|access| !access.is_empty()).unwrap_or("rwm");
        for letter in text.chars() {
            access |= match letter {
                'm' => MKNOD,
                'r' => READ,
                'w' => WRITE,
                // No letter of the specification. Configurations for runc have it in rules that deny, where the
                // most that it can mean is safe; in one that allows it would be a guess.
                'a' if !rule.allow() => MKNOD | READ | WRITE,
                other => {
                    let reason = format!("there is no access {other:?}");
                    return Err(LaunchError::spec("linux.resources.devices", reason));
                }
            };
        }
        let kind = match rule.typ() {
            Some(LinuxDeviceType::B) => Some(Kind::Block),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(Kind::Character),
            _ => None,
        };
        Ok(Self {
            allow: rule.allow(),
            kind,
            major: number(rule.major())?,
            minor: number(rule.minor())?,
            access,
        })
    }

    /// As the v1 files take it.
    fn line(&self) -> String {
        let number = |n: Option<i32>| n.map_or_else(|| "*".to_owned(), |n| n.to_string());
        let kind = match self.kind {
            // The kernel reads no further.
            None => return "a".to_owned(),
            Some(Kind::Block) => 'b',
            Some(Kind::Character) => 'c',
        };
        let mut line = format!("{kind} {}:{} ", number(self.major), number(self.minor));
        for (bit, letter) in [(READ, 'r'), (WRITE, 'w'), (MKNOD, 'm')] {
            if self.access & bit != 0 {
                line.push(letter);
            }
        }
        line
    }

    fn same_devices(&self, other: &Self) -> bool {
        (self.kind, self.major, self.minor) == (other.kind, other.major, other.minor)
    }
}

/// Nodes of `/dev` that every container has, and making any node, which opens nothing.
fn always_allowed() -> impl Iterator<Item = Rule> {
    let character = |major, minor| (Some(Kind::Character), Some(major), minor, ALL);
    [
        (Some(Kind::Character), None, None, MKNOD),
        (Some(Kind::Block), None, None, MKNOD),
        character(1, Some(3)),
        character(1, Some(5)),
        character(1, Some(7)),
        character(1, Some(8)),
        character(1, Some(9)),
        character(5, Some(0)),
        character(5, Some(2)),
        character(136, None),
    ]
    .into_iter()
    .map(|(kind, major, minor, access)| Rule { allow: true, kind, major, minor, access })
}

/// The rules go in their order; consecutive ones of a sort share one open file.
fn write_rules(dir: &Path, rules: &[Rule]) -> Result<(), LaunchError> {
    for run in rules.chunk_by(|a, b| a.allow == b.allow) {
        let allow = run.first().is_some_and(|rule| rule.allow);
        let file = dir.join(if allow { "devices.allow" } else { "devices.deny" });
        let cannot = |line: &str, error| failed(format!("write {line} to {}", file.display()), error);
        let fd = rustix::fs::open(&file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| cannot("a rule", error))?;
        for rule in run {
            let line = rule.line();
            rustix::io::write(&fd, line.as_bytes()).map_err(|error| cannot(&line, error))?;
        }
    }
    Ok(())
}

/// What a list of rules comes to.
#[derive(Debug, PartialEq, Eq)]
struct Policy {
    allow_by_default: bool,
    exceptions: Vec<Rule>,
}

impl Policy {
    fn of(rules: &[Rule]) -> Self {
        // A cgroup without rules allows everything.
        let mut policy = Self { allow_by_default: true, exceptions: Vec::new() };
        for rule in rules {
            policy.add(*rule);
        }
        policy
    }

    fn add(&mut self, rule: Rule) {
        if rule.kind.is_none() {
            *self = Self { allow_by_default: rule.allow, exceptions: Vec::new() };
            return;
        }
        let known = self.exceptions.iter_mut().find(|exception| exception.same_devices(&rule));
        match (rule.allow == self.allow_by_default, known) {
            // Back to the default: takes away from an exception for the same devices.
            (true, Some(exception)) => exception.access &= !rule.access,
            (true, None) => {}
            (false, Some(exception)) => exception.access |= rule.access,
            (false, None) => self.exceptions.push(rule),
        }
        self.exceptions.retain(|exception| exception.access != 0);
    }

    /// The kernel calls it with the kind and access wanted, major and minor; 1 allows.
    ///
    /// An exception that allows must cover all of the access wanted, one that denies any of it.
    fn program(&self) -> Vec<Instruction> {
        const KIND: u8 = 2;
        const ACCESS: u8 = 3;
        const MAJOR: u8 = 4;
        const MINOR: u8 = 5;
        // The first 16 bits say which kind, the others which access.
        let mut program = vec![
            instruction(LOAD_WORD, KIND | CONTEXT << 4, 0, 0),
            instruction(MOVE_REGISTER, ACCESS | KIND << 4, 0, 0),
            instruction(SHIFT_RIGHT, ACCESS, 0, 16),
            instruction(AND, KIND, 0, 0xffff),
            instruction(LOAD_WORD, MAJOR | CONTEXT << 4, 4, 0),
            instruction(LOAD_WORD, MINOR | CONTEXT << 4, 8, 0),
        ];
        for exception in &self.exceptions {
            let kind = if exception.kind == Some(Kind::Block) { 1 } else { 2 };
            let mut tests = vec![instruction(JUMP_NOT_EQUAL, KIND, 0, kind)];
            if self.allow_by_default || exception.access != ALL {
                let bits = if self.allow_by_default { exception.access } else { !exception.access };
                tests.push(instruction(MOVE_REGISTER, SCRATCH | ACCESS << 4, 0, 0));
                tests.push(instruction(AND, SCRATCH, 0, bits));
                let jump = if self.allow_by_default { JUMP_EQUAL } else { JUMP_NOT_EQUAL };
                tests.push(instruction(jump, SCRATCH, 0, 0));
            }
            tests.extend(exception.major.map(|n| instruction(JUMP_NOT_EQUAL, MAJOR, 0, n)));
            tests.extend(exception.minor.map(|n| instruction(JUMP_NOT_EQUAL, MINOR, 0, n)));
            // Behind the two instructions that answer.
            let n = tests.len();
            for (idx, test) in tests.iter_mut().enumerate() {
                if matches!(test.code, JUMP_EQUAL | JUMP_NOT_EQUAL) {
                    test.offset = i16::try_from(n - idx + 1).unwrap_or(i16::MAX);
                }
            }
            program.extend(tests);
            program.extend(answer(!self.allow_by_default));
        }
        program.extend(answer(self.allow_by_default));
        program
    }
}

const CONTEXT: u8 = 1;
/// The context is not needed any more once it is read.
const SCRATCH: u8 = 1;
const LOAD_WORD: u8 = 0x61;
const MOVE_REGISTER: u8 = 0xbc;
const MOVE: u8 = 0xb4;
const SHIFT_RIGHT: u8 = 0x74;
const AND: u8 = 0x54;
const JUMP_EQUAL: u8 = 0x15;
const JUMP_NOT_EQUAL: u8 = 0x55;
const EXIT: u8 = 0x95;

fn instruction(code: u8, registers: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers, offset, immediate }
}

fn answer(allow: bool) -> [Instruction; 2] {
    [instruction(MOVE, 0, 0, i32::from(allow)), instruction(EXIT, 0, 0, 0)]
}

fn attach_program(dir: &Path, policy: &Policy, replace: bool) -> Result<(), LaunchError> {
    let cannot = |error: std::io::Error| LaunchError::Cgroup {
        step: format!("enforce device rules in {}", dir.display()),
        source: error,
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let cgroup = rustix::fs::open(dir, flags, Mode::empty()).map_err(|error| cannot(error.into()))?;
    let program = match bpf::load_device_program(&policy.program()) {
        // In a user namespace nobody loads programs, and nobody makes or opens device nodes that the host's root
        // has not made for him.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) && !is_privileged() => return Ok(()),
        other => other.map_err(cannot)?,
    };
    if replace {
        return bpf::replace_device_programs(cgroup.as_fd(), program.as_fd()).map_err(cannot);
    }
    bpf::attach_device_program(cgroup.as_fd(), program.as_fd()).map_err(cannot)
}

#[cfg(test)]
mod tests {
    use super::super::{Driver, Location};
    use super::*;

    fn rules(json: &str) -> Vec<Rule> {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
        rules.iter().map(|rule| Rule::of(rule).unwrap()).collect()
    }

    const DENY_ALL: &str = r#"{"allow":false,"access":"rwm"}"#;

    #[test]
    fn rules_are_written_as_the_kernel_reads_them() {
        let rules = rules(&format!(
            r#"[{DENY_ALL},{{"allow":true,"type":"c","major":10,"minor":229,"access":"rw"}},
                {{"allow":true,"type":"b","major":8,"access":"r"}}]"#
        ));
        let lines: Vec<String> = rules.iter().map(Rule::line).collect();
        assert_eq!(lines, ["a", "c 10:229 rw", "b 8:* r"]);
    }

    #[test]
    fn all_access_can_be_denied_by_a_letter_but_not_allowed() {
        let denied = rules(r#"[{"allow":false,"type":"c","major":1,"minor":11,"access":"rwa"}]"#);
        assert_eq!(denied[0].access, READ | WRITE | MKNOD);
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        let rule = |json: &str| Rule::of(&serde_json::from_str(json).unwrap());
        assert!(rule(r#"{"allow":true,"type":"c","major":1,"access":"rwa"}"#).is_err());
        assert!(rule(r#"{"allow":true,"type":"c","access":"rx"}"#).is_err());
        assert!(rule(r#"{"allow":true,"type":"c","major":4294967296}"#).is_err());
    }

    /// Runs a program as the kernel would.
    fn allows(program: &[Instruction], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let mut registers = [0_i64; 11];
        let mut at = 0_usize;
        loop {
            let i = program[at];
            let (to, from) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            let immediate = i64::from(i.immediate);
            at += 1;
            let jump = |holds: bool| if holds { usize::try_from(i.offset).unwrap() } else { 0 };
            match i.code {
                LOAD_WORD => {
                    registers[to] = match i.offset {
                        0 => i64::from(access << 16 | kind),
                        4 => major.into(),
                        8 => minor.into(),
                        other => panic!("load of {other}"),
                    }
                }
                MOVE_REGISTER => registers[to] = registers[from],
                MOVE => registers[to] = immediate,
                SHIFT_RIGHT => registers[to] >>= immediate,
                AND => registers[to] &= immediate,
                JUMP_EQUAL => at += jump(registers[to] == immediate),
                JUMP_NOT_EQUAL => at += jump(registers[to] != immediate),
                EXIT => return registers[0] == 1,
                other => panic!("code {other:#x}"),
            }
        }
    }

    #[test]
    fn a_program_allows_what_the_list_allows() {
        let mut list = rules(&format!(
            r#"[{DENY_ALL},{{"allow":true,"type":"c","major":10,"minor":229,"access":"rw"}},
                {{"allow":true,"type":"b","major":8,"access":"r"}},
                {{"allow":true,"type":"c","major":10,"minor":200,"access":"rwm"}},
                {{"allow":false,"type":"c","major":10,"minor":200,"access":"w"}}]"#
        ));
        list.extend(always_allowed());
        let program = Policy::of(&list).program();
        let (block, character) = (1, 2);
        assert!(allows(&program, character, READ | WRITE, 1, 3));
        assert!(allows(&program, character, READ | WRITE, 10, 229));
        assert!(allows(&program, character, MKNOD, 7, 7), "any node may be made");
        assert!(allows(&program, block, READ, 8, 17));
        assert!(!allows(&program, block, WRITE, 8, 17));
        assert!(!allows(&program, block, READ | WRITE, 8, 17));
        assert!(!allows(&program, character, READ, 8, 17));
        assert!(allows(&program, character, READ, 10, 200));
        assert!(!allows(&program, character, WRITE, 10, 200), "taken away by a later rule");
        assert!(allows(&program, character, READ, 136, 12));
    }

    #[test]
    fn exceptions_from_an_allowing_default_deny() {
        let list =
            rules(r#"[{"allow":true,"access":"rwm"},{"allow":false,"type":"b","major":8,"access":"w"}]"#);
        let program = Policy::of(&list).program();
        assert!(allows(&program, 1, READ, 8, 0));
        assert!(!allows(&program, 1, READ | WRITE, 8, 0));
        assert!(allows(&program, 2, WRITE, 8, 0));
    }

    #[test]
    fn the_kernel_takes_the_program() {
        let name = format!("/coracle-test-devices-{}", std::process::id());
        let location = Location::resolve(Some(Path::new(&name)), "devices", Driver::Cgroupfs).unwrap();
        let cgroup = match Cgroup::create(&location, None, &mut Vec::new()) {
            Ok(cgroup) => cgroup,
            Err(error) => return println!("skipped: {}", coracle_base::explain::chain(&error)),
        };
        let mut list = rules(&format!("[{DENY_ALL}]"));
        list.extend(always_allowed());
        let attached = cgroup.v2.as_deref().map(|dir| attach_program(dir, &Policy::of(&list), false));
        cgroup.remove().unwrap();
        match attached {
            Some(result) => result.unwrap(),
            None => println!("skipped: no cgroup v2 here"),
        }
    }
}
