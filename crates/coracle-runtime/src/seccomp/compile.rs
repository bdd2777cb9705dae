//! From a policy to instructions.
//!
//! ```text
//! load architecture; another one → ENOSYS
//! load number
//! tree of "number ≥ k?" over ranges with one verdict each
//!   leaf: return, or the argument rules of one number, then return
//! ```
//!
//! A conditional jump reaches 255 instructions; a subtree that is longer is jumped over by `JA`.

use coracle_sys::seccomp::{INSTRUCTIONS_MAX, Instruction};

use super::invalid;
use super::profile::{Comparison, Condition, Policy, RET_ERRNO, Rule};
use crate::LaunchError;

const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const RETURN: u16 = 0x06;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_GREATER_OR_EQUAL: u16 = 0x35;

/// Conditions of one rule: six instructions each, which a jump behind the rule must reach over.
const CONDITIONS_MAX: usize = 32;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

#[cfg(target_arch = "x86_64")]
const NATIVE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const NATIVE: u32 = 0xc000_00b7;

/// Calls of the x32 ABI come with the native architecture and this bit.
#[cfg(target_arch = "x86_64")]
const X32: Option<u32> = Some(0x4000_0000);
/// There is no second ABI under the native architecture.
#[cfg(target_arch = "aarch64")]
const X32: Option<u32> = None;

const ENOSYS: u32 = RET_ERRNO | 38;

/// What a range of numbers gets.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Leaf {
    Return(u32),
    /// These rules in order, then this result.
    Rules(Vec<usize>, u32),
}

pub(super) fn compile(policy: &Policy) -> Result<Vec<Instruction>, LaunchError> {
    if let Some(rule) = policy.rules.iter().find(|rule| rule.conditions.len() > CONDITIONS_MAX) {
        return Err(invalid(format!(
            "a rule for call {} has more than {CONDITIONS_MAX} conditions",
            rule.number
        )));
    }
    let ranges = ranges(policy);
    let mut program = Vec::with_capacity(512);
    program.push(instruction(LOAD, ARCHITECTURE));
    program.push(Instruction { code: JUMP_EQUAL, jt: 1, jf: 0, k: NATIVE });
    program.push(instruction(RETURN, ENOSYS));
    program.push(instruction(LOAD, NUMBER));
    tree(&ranges, &policy.rules, &mut program);
    if program.len() > INSTRUCTIONS_MAX {
        return Err(invalid(format!("it needs {} instructions, the kernel takes 4096", program.len())));
    }
    Ok(program)
}

fn instruction(code: u16, k: u32) -> Instruction {
    Instruction { code, jt: 0, jf: 0, k }
}

/// Verdicts by first number; each holds up to the next one.
fn ranges(policy: &Policy) -> Vec<(u32, Leaf)> {
    let n = usize::try_from(policy.highest).unwrap_or(0) + 1;
    let mut by_number: Vec<Leaf> = vec![Leaf::Return(policy.default); n];
    // Conditional rules go first, in their order; the unconditional one is what is left when none holds.
    for (idx, rule) in policy.rules.iter().enumerate() {
        let Some(leaf) = usize::try_from(rule.number).ok().and_then(|number| by_number.get_mut(number))
        else {
            continue;
        };
        match (leaf, rule.conditions.is_empty()) {
            (Leaf::Return(result) | Leaf::Rules(_, result), true) => *result = rule.result,
            (Leaf::Rules(rules, _), false) => rules.push(idx),
            (leaf @ Leaf::Return(_), false) => {
                if let Leaf::Return(result) = *leaf {
                    *leaf = Leaf::Rules(vec![idx], result);
                }
            }
        }
    }
    let mut ranges: Vec<(u32, Leaf)> = Vec::new();
    let mut add = |start: u32, leaf: Leaf| {
        if !matches!((ranges.last(), &leaf), (Some((_, Leaf::Return(a))), Leaf::Return(b)) if a == b) {
            ranges.push((start, leaf));
        }
    };
    for (number, leaf) in (0_u32..).zip(by_number) {
        // Rules that all end as the rest does decide nothing.
        let leaf = match leaf {
            Leaf::Rules(rules, rest)
                if rules.iter().all(|idx| policy.rules.get(*idx).is_some_and(|r| r.result == rest)) =>
            {
                Leaf::Return(rest)
            }
            other => other,
        };
        add(number, leaf);
    }
    let is_error = policy.default & 0xffff_0000 == RET_ERRNO;
    add(policy.highest + 1, Leaf::Return(if is_error { ENOSYS } else { policy.default }));
    if let Some(bit) = X32 {
        add(bit, Leaf::Return(ENOSYS));
    }
    ranges
}

fn tree(ranges: &[(u32, Leaf)], rules: &[Rule], program: &mut Vec<Instruction>) {
    match ranges {
        [] => {}
        [(_, leaf)] => emit_leaf(leaf, rules, program),
        _ => {
            let (left, right) = ranges.split_at(ranges.len() / 2);
            let first = right.first().map_or(0, |(start, _)| *start);
            let at = program.len();
            program.push(instruction(JUMP_GREATER_OR_EQUAL, first));
            tree(left, rules, program);
            let length = program.len() - at - 1;
            match u8::try_from(length) {
                Ok(length) => set_jumps(program, at, length, 0),
                Err(_) => {
                    // Jumps inside the subtree are relative to themselves and move along.
                    set_jumps(program, at, 0, 1);
                    program.insert(at + 1, instruction(JUMP, u32::try_from(length).unwrap_or(u32::MAX)));
                }
            }
            tree(right, rules, program);
        }
    }
}

fn set_jumps(program: &mut [Instruction], at: usize, jt: u8, jf: u8) {
    if let Some(instruction) = program.get_mut(at) {
        instruction.jt = jt;
        instruction.jf = jf;
    }
}

fn emit_leaf(leaf: &Leaf, rules: &[Rule], program: &mut Vec<Instruction>) {
    let rest = match leaf {
        Leaf::Return(result) => *result,
        Leaf::Rules(indices, rest) => {
            for rule in indices.iter().filter_map(|idx| rules.get(*idx)) {
                emit_rule(rule, program);
            }
            *rest
        }
    };
    program.push(instruction(RETURN, rest));
}

/// The conditions in turn, each jumping past the rule's `return` when it does not hold.
fn emit_rule(rule: &Rule, program: &mut Vec<Instruction>) {
    let mut blocks: Vec<Vec<Test>> = rule.conditions.iter().map(tests).collect();
    let length: usize = blocks.iter().map(Vec::len).sum();
    let mut done = 0;
    for block in &mut blocks {
        let n = block.len();
        for (idx, test) in block.iter().enumerate() {
            let place = |to: To| match to {
                To::Next => 0,
                // The end of this condition: on to the following one.
                To::Holds => n - idx - 1,
                // Behind the rule's return.
                To::Fails => length - done - idx,
            };
            let jump = |to: To| u8::try_from(place(to)).unwrap_or(u8::MAX);
            program.push(Instruction { code: test.code, jt: jump(test.yes), jf: jump(test.no), k: test.k });
        }
        done += n;
    }
    program.push(instruction(RETURN, rule.result));
}

#[derive(Clone, Copy)]
enum To {
    Next,
    Holds,
    Fails,
}

#[derive(Clone, Copy)]
struct Test {
    code: u16,
    k: u32,
    yes: To,
    no: To,
}

/// A comparison of 64 bits is made of loads and comparisons of 32 bits, high word first.
fn tests(condition: &Condition) -> Vec<Test> {
    let low = ARGUMENTS + condition.argument * 8;
    let high = low + 4;
    let load = |offset| Test { code: LOAD, k: offset, yes: To::Next, no: To::Next };
    let test = |code, k, yes, no| Test { code, k, yes, no };
    let ordered = |value: u64, low_code, above, below, last_yes, last_no| {
        vec![
            load(high),
            test(JUMP_GREATER, word(value >> 32), above, To::Next),
            test(JUMP_EQUAL, word(value >> 32), To::Next, below),
            load(low),
            test(low_code, word(value), last_yes, last_no),
        ]
    };
    match condition.comparison {
        Comparison::Equal(value) => vec![
            load(high),
            test(JUMP_EQUAL, word(value >> 32), To::Next, To::Fails),
            load(low),
            test(JUMP_EQUAL, word(value), To::Holds, To::Fails),
        ],
        Comparison::NotEqual(value) => vec![
            load(high),
            test(JUMP_EQUAL, word(value >> 32), To::Next, To::Holds),
            load(low),
            test(JUMP_EQUAL, word(value), To::Fails, To::Holds),
        ],
        Comparison::Greater(v) => ordered(v, JUMP_GREATER, To::Holds, To::Fails, To::Holds, To::Fails),
        Comparison::GreaterOrEqual(v) => {
            ordered(v, JUMP_GREATER_OR_EQUAL, To::Holds, To::Fails, To::Holds, To::Fails)
        }
        Comparison::LessOrEqual(v) => ordered(v, JUMP_GREATER, To::Fails, To::Holds, To::Fails, To::Holds),
        Comparison::Less(v) => ordered(v, JUMP_GREATER_OR_EQUAL, To::Fails, To::Holds, To::Fails, To::Holds),
        Comparison::MaskedEqual(mask, value) => {
            let and = |mask| Test { code: AND, k: mask, yes: To::Next, no: To::Next };
            vec![
                load(high),
                and(word(mask >> 32)),
                test(JUMP_EQUAL, word(value >> 32), To::Next, To::Fails),
                load(low),
                and(word(mask)),
                test(JUMP_EQUAL, word(value), To::Holds, To::Fails),
            ]
        }
    }
}

/// The low 32 bits.
fn word(bits: u64) -> u32 {
    u32::try_from(bits & u64::from(u32::MAX)).unwrap_or(u32::MAX)
}
